"""What PEFT makes of an adapter on a llava-hf folder, in the environment of a version of transformers.

`python run_peft.py JOBS.json` prints one line of JSON: for each job the keys that are missing or not expected, and the logits.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft.utils.save_and_load import load_peft_weights  # noqa: E402

OWN = (".lora_", ".modules_to_save.", "trainable_tokens_delta")


def read(job: dict[str, Any]) -> dict[str, Any]:
    architecture = json.loads((Path(job["folder"]) / "config.json").read_text())["architectures"][0]
    base = getattr(transformers, architecture).from_pretrained(job["folder"], torch_dtype=torch.float32)
    try:
        model = peft.PeftModel.from_pretrained(base, job["adapter"])
    except ValueError as error:
        return {"refused": str(error)}
    told = peft.set_peft_model_state_dict(model, load_peft_weights(job["adapter"], device="cpu"))
    missing = [key for key in told.missing_keys if any(part in key for part in OWN)]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor(job["ids"])).logits
    return {"missing": missing, "unexpected": list(told.unexpected_keys), "logits": logits.tolist()}


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps([read(job) for job in json.loads(Path(sys.argv[1]).read_text())])}\n")
