"""The folders in which xtuner keeps a LLaVA: one for each part, one for each adapter.

Sources: xtuner/model/llava.py, xtuner/model/modules/projector and xtuner/tools/model_converters/pth_to_hf.py of InternLM/xtuner, and the
repositories that it published (xtuner/llava-llama-3-8b-v1_1, llava-phi-3-mini-xtuner, llava-v1.5-7b-xtuner).
"""

from __future__ import annotations

from typing import Any

TITLE = "LLaVA in xtuner's folders"
LLM, PROJECTOR, TOWER = "llm", "projector", "visual_encoder"
PART_TITLES = {LLM: "text model", PROJECTOR: "projector", TOWER: "vision tower"}
# The folder of an adapter -> the part that it changes.
ADAPTERS = {"llm_adapter": LLM, "visual_encoder_adapter": TOWER}
# The text model may lie in the folder itself: by `llm` alone nothing is recognised, since VILA has a folder of that name too.
TELLING = (PROJECTOR, TOWER, *ADAPTERS)
FOLDERS = (LLM, *TELLING)

PROJECTOR_NAME = r"model\.(\d)\.(weight|bias)"  # of a torch.nn.Sequential: a Linear at each even place
PROJECTOR_DEFAULTS: dict[str, Any] = {"depth": 2, "hidden_act": "gelu", "bias": True}  # of its ProjectorConfig
SELECT_KEY, SELECT = "visual_select_layer", -2  # which hidden state of the tower its model takes: where nothing says another
# What its training does with every image, in the words of LLaVA's config.
SETTINGS: dict[str, Any] = {
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "trained_with": "xtuner",  # a key of our own, by which `originals` knows how it is prompted
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
}
