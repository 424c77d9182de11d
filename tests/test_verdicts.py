"""No mode of verify says 0 about a part that it did not read: whatever is wrong with a checkpoint, each mode that can know says 4."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import llava_weights as lw
from llava_weights.checkpoint.manifest import MANIFEST, SUMS
from llava_weights.checks.verify import Verification, rules, verify
from llava_weights.cli import report
from llava_weights.cli.main import app
from llava_weights.errors import InputError, UsageError
from llava_weights.events import Note

BASE, TOWER = "C-v1.5/original-no-vision-bin", "common/clip-tiny-42px"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llava-hf folder as the tool writes it. Not to be changed."""
    out = tmp_path_factory.mktemp("good") / "hf"
    tower = lw.open_checkpoint(fixtures / TOWER)
    lw.execute(lw.make_plan(lw.convert(lw.open_checkpoint(fixtures / BASE), "llava-hf", tower=tower)), out)
    return out


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def headline(found: Verification) -> str:
    return report.verdict(found.findings, found.exit_code)


def said(found: Verification, verdict: str, *, rule: str = "") -> str:
    return "\n".join(each.text for each in found.findings if each.verdict == verdict and rule in ("", each.rule))


def without_records(folder: Path) -> None:
    for name in (MANIFEST, SUMS):
        (folder / name).unlink()


def edit(name: str, **changes: Any) -> Change:
    """Set keys of a JSON file; `part__key` is a key of a part, None takes the key away."""

    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        for path, new in changes.items():
            part, _, key = path.rpartition("__")
            place = value[part] if part else value
            place.pop(key, None) if new is None else place.update({key: new})
        (folder / name).write_text(json.dumps(value))

    return change


def rotate(folder: Path) -> None:
    """Every piece of tokenizer.json behind the special ones has the next piece's id."""
    core = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(core["model"]["vocab"], key=core["model"]["vocab"].__getitem__)
    core["model"]["vocab"] = {name: i for i, name in enumerate([*vocabulary[:3], *vocabulary[4:], vocabulary[3]])}
    (folder / "tokenizer.json").write_text(json.dumps(core))


def shuffled_merges(folder: Path) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    core["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(core))


def template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text().replace("USER", "HUMAN")
    assert text != path.read_text()
    path.write_text(text)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))


def no_special_image(folder: Path) -> None:
    core = json.loads((folder / "tokenizer.json").read_text())
    next(entry for entry in core["added_tokens"] if entry["content"] == "<image>")["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(core))


def deleted(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "model.safetensors"
    values = load_file(path)
    change(values)
    save_file(values, path, {"format": "pt"})


def reversed_weights(folder: Path) -> None:
    weights(folder, lambda values: values.update({name: np.ascontiguousarray(value[::-1]) for name, value in values.items()}))


def one_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


WRONG: dict[str, Change] = {
    "rope_theta": edit("config.json", text_config__rope_theta=1e6),
    "rope_theta left out": edit("config.json", text_config__rope_theta=5e5, rope_theta=10000.0),
    "rope_scaling": edit("config.json", text_config__rope_scaling={"type": "linear", "factor": 2.0}),
    "decoder": edit("config.json", text_config__model_type="mistral"),
    "dtype": edit("config.json", torch_dtype="bfloat16"),
    "heads": edit("config.json", text_config__num_attention_heads=2, text_config__num_key_value_heads=2, text_config__head_dim=None),
    "eps": edit("config.json", text_config__rms_norm_eps=1e-3),
    "activation": edit("config.json", text_config__hidden_act="gelu"),
    "image_token_index": edit("config.json", image_token_index=5),
    "projector activation": edit("config.json", projector_hidden_act="relu"),
    "layer": edit("config.json", vision_feature_layer=-1),
    "strategy": edit("config.json", vision_feature_select_strategy="full"),
    "tower activation": edit("config.json", vision_config__hidden_act="gelu"),
    "tower eps": edit("config.json", vision_config__layer_norm_eps=1e-3),
    "quantised": edit("config.json", quantization_config={"load_in_4bit": True}),
    "do_normalize": edit("preprocessor_config.json", do_normalize=False),
    "mean": edit("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
    "std": edit("preprocessor_config.json", image_std=[0.5, 0.5, 0.5]),
    "resample": edit("preprocessor_config.json", resample=2),
    "squashed images": edit("preprocessor_config.json", size={"height": 42, "width": 42}),
    "patches": edit("processor_config.json", patch_size=7),
    "image token": edit("processor_config.json", image_token="<img>"),
    "eos": edit("generation_config.json", eos_token_id=1),
    "temperature": edit("generation_config.json", temperature=1.7, do_sample=True),
    "template": template,
    "no template": lambda folder: [(folder / f"chat_template.{kind}").unlink() for kind in ("json", "jinja")],  # type: ignore[dict-item]
    "vocabulary": rotate,
    "merges": shuffled_merges,
    "image token not special": no_special_image,
    "add_bos_token": edit("tokenizer_config.json", add_bos_token=False),
    "truncation": edit("tokenizer.json", truncation={"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    "flags of a token": edit("tokenizer_config.json", added_tokens_decoder__304={"content": "<image>", "lstrip": True, "special": True}),
    "special token": edit("special_tokens_map.json", eos_token="<s>"),
    "no preprocessor": deleted("preprocessor_config.json"),
    "reversed weights": reversed_weights,
    "one bit": one_bit,
}


@pytest.mark.parametrize("mode", ["folder", "manifest", "base"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_whatever_lies_beside_it(good: Path, model: Path, fixtures: Path, name: str, mode: str) -> None:
    """Records beside the changed checkpoint are taken away, so that only the comparison can tell."""
    without_records(model)
    WRONG[name](model)
    references: dict[str, dict[str, Any]] = {
        "folder": {"against": good},
        "manifest": {"against": good / MANIFEST},
        "base": {"base": fixtures / BASE, "vision_tower": fixtures / TOWER},
    }
    found = verify(model, **references[mode])
    compared = [each for each in found.findings if each.verdict == "failed" and each.level in ("against", "L4")]
    assert found.exit_code == 4
    assert compared, headline(found)


ALIKE: dict[str, Change] = {
    "order and versions": lambda folder: (folder / "config.json").write_text(  # type: ignore[dict-item]
        json.dumps(dict(reversed(json.loads((folder / "config.json").read_text()).items())) | {"transformers_version": "4.47.1"})
    ),
    "defaults left out": edit(
        "config.json", text_config__rope_theta=None, text_config__hidden_act=None, projector_hidden_act=None, vision_feature_layer=None,
        text_config__bos_token_id=None, vision_config__layer_norm_eps=None, dtype=None,
    ),
    "rope_parameters": edit(
        "config.json", text_config__rope_theta=None, text_config__rope_scaling=None,
        text_config__rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "image_token_id": edit("config.json", image_token_index=None, image_token_id=304),
    "steps left out": edit("preprocessor_config.json", do_normalize=None, do_rescale=None, resample=None, crop_size=42, size=42),
    "fast class": edit("tokenizer_config.json", tokenizer_class="LlamaTokenizerFast"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_what_another_writer_would_write_is_the_same(good: Path, model: Path, fixtures: Path, name: str) -> None:
    without_records(model)
    ALIKE[name](model)
    for reference in ({"against": good}, {"against": good / MANIFEST}, {"base": fixtures / BASE, "vision_tower": fixtures / TOWER}):
        found = verify(model, **reference)  # type: ignore[arg-type]
        assert said(found, "failed", rule="small-files") == ""


@pytest.mark.parametrize("mode", ["folder", "manifest", "base"])
def test_the_same_checkpoint_passes_with_or_without_records(good: Path, model: Path, fixtures: Path, mode: str) -> None:
    without_records(model)
    references: dict[str, dict[str, Any]] = {
        "folder": {"against": good},
        "manifest": {"against": good / MANIFEST},
        "base": {"base": fixtures / BASE, "vision_tower": fixtures / TOWER},
    }
    found = verify(model, **references[mode])
    assert found.exit_code == 0, said(found, "failed")
    assert "values of 64 tensors and small files (by " in headline(found)


# --- a record beside a checkpoint is no evidence about it -------------------------------------------------------------


@pytest.mark.parametrize("change", [one_bit, reversed_weights], ids=["one bit", "reversed"])
def test_base_and_against_never_ask_the_manifest_beside_the_weights(good: Path, model: Path, fixtures: Path, change: Change) -> None:
    """Neither mode is `--deep`: the manifest still has the digests of the right weights."""
    change(model)
    for reference in ({"base": fixtures / BASE, "vision_tower": fixtures / TOWER}, {"against": good}, {"against": good / MANIFEST}):
        found = verify(model, **reference)  # type: ignore[arg-type]
        assert found.exit_code == 4
        assert {each.level for each in found.findings if each.verdict == "failed"} & {"L4", "against"}


def test_a_manifest_alone_compares_small_files_by_digest_and_beside_its_files_by_meaning(good: Path, model: Path, tmp_path: Path) -> None:
    without_records(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(reversed(config.items())) | {"transformers_version": "4.47.1"}))
    assert verify(model, against=good / MANIFEST).exit_code == 0
    alone = shutil.copy(good / MANIFEST, tmp_path / "alone.json")
    found = verify(model, against=alone)
    assert (found.exit_code, "`config.json` is not the file that `alone.json` lists" in said(found, "failed")) == (4, True)
    (tmp_path / "model" / "tokenizer.model").unlink()
    assert "`tokenizer.model` is listed in `alone.json`" in said(verify(model, against=alone), "failed", rule="small-files")


def test_a_stale_manifest_beside_the_reference_is_said_and_not_believed(good: Path, model: Path) -> None:
    one_bit(model)
    found = verify(good, against=model)
    assert found.exit_code == 4
    assert "the manifest beside `model` is not of its values" in said(found, "warning", rule="stale-manifest")
    (model / MANIFEST).write_text("{}")
    assert "was not asked" in said(verify(good, against=model), "warning", rule="stale-manifest")


def test_how_much_is_read_is_said_before(good: Path, model: Path, fixtures: Path) -> None:
    for reference in ({"against": good}, {"against": good / MANIFEST}, {"base": fixtures / BASE, "vision_tower": fixtures / TOWER}):
        events: list[Any] = []
        verify(model, on_event=events.append, **reference)  # type: ignore[arg-type]
        assert isinstance(events[0], Note)
        assert " will be read: " in events[0].text


@pytest.mark.parametrize(
    ("key", "value"),
    [("scale", "x"), ("scale", True), ("projector_form", []), ("projector_form", "cube"), ("dtype", "F12"), ("dtype", {}),
     ("arithmetic", 3), ("arithmetic", "nope"), ("to", ["llava"]), ("conv_mode", "nobody"), ("image_token", ""), ("image_aspect", 4),
     ("tower_name", 1)],
)  # fmt: skip
def test_forged_options_of_a_recipe_are_refused(model: Path, fixtures: Path, key: str, value: Any) -> None:
    manifest = json.loads((model / MANIFEST).read_text())
    manifest["recipe"][-1]["options"][key] = value
    (model / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"records the {key}"):
        verify(model, base=fixtures / BASE, vision_tower=fixtures / TOWER)


@pytest.mark.parametrize("recipe", ["x", [3], [{"options": []}], [{"inputs": 1}], [{"warnings": "x"}], [{"warnings": [1]}], {"a": 1}])
def test_a_recipe_that_can_not_be_read_is_said(model: Path, fixtures: Path, recipe: Any) -> None:
    manifest = json.loads((model / MANIFEST).read_text())
    (model / MANIFEST).write_text(json.dumps(manifest | {"recipe": recipe}))
    found = verify(model)
    assert found.exit_code == 0
    assert "no recipe that can be read" in said(found, "unchecked", rule="recorded")
    with pytest.raises(InputError, match="no recipe"):
        verify(model, base=fixtures / BASE, vision_tower=fixtures / TOWER)


# --- weights that nothing was compared with -------------------------------------------------------------------------


def listing(folder: Path, *names: str) -> str:
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)


def test_a_list_that_names_only_a_config_proves_no_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "LIST").write_text(listing(model, "config.json"))
    found = verify(model, against=tmp_path / "LIST")
    assert found.exit_code == 3
    assert "64 tensors in 1 weight file without counterpart in `LIST`" in headline(found)
    assert "`config.json` (by `LIST`)" in headline(found)
    (tmp_path / "LIST").write_text(listing(model, "config.json").replace("a", "b"))
    assert verify(model, against=tmp_path / "LIST").exit_code == 4  # precedence: 4, then 3


def test_records_that_name_only_a_config_prove_no_weights(model: Path) -> None:
    (model / MANIFEST).unlink()
    (model / SUMS).write_text(listing(model, "config.json"))
    for deep in (False, True):
        found = verify(model, deep=deep)
        assert found.exit_code == 3
        assert "nothing recorded of 1 weight file" in headline(found)


def test_a_repository_with_other_weight_files_proves_none(good: Path, model: Path, tmp_path: Path, hub: HubServer) -> None:
    repository = Path(shutil.copytree(good, tmp_path / "repository"))
    (repository / "model.safetensors").rename(repository / "pytorch_model.bin")
    hub.add("owner/model", repository)
    found = verify(model, against="hf://owner/model")
    assert found.exit_code == 3
    assert "without counterpart" in headline(found)
    assert "`model.safetensors`" in said(found, "unproved")


def test_a_tower_is_explained_only_by_what_proves_or_records_it(good: Path, model: Path, fixtures: Path) -> None:
    recorded = verify(model, against=fixtures / BASE)
    assert (recorded.exit_code, said(recorded, "failed")) == (0, "")
    assert "39 tensors" in headline(recorded)
    assert "unchecked: 16 rows of" in headline(recorded)
    without_records(model)
    found = verify(model, against=fixtures / BASE)
    assert found.exit_code == 3
    assert "39 tensors without counterpart" in headline(found)
    assert "vision_tower.vision_model" in said(found, "unproved")
    proved = verify(model, against=fixtures / BASE, vision_tower=fixtures / TOWER)
    assert proved.exit_code == 0
    assert "the vision tower (by `clip-tiny-42px`)" in headline(proved)
    other = verify(model, against=fixtures / BASE, vision_tower=fixtures / "common/clip-tiny-28px")
    assert other.exit_code == 4


def test_a_weight_file_that_a_list_lacks_is_explained_by_a_tower_that_is_all_it_holds(model: Path, fixtures: Path, tmp_path: Path) -> None:
    without_records(model)
    values = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    tower = {name: value for name, value in values.items() if name.startswith("vision_tower.")}
    shards = {"model-00001-of-00002.safetensors": {name: values[name] for name in values if name not in tower},
              "model-00002-of-00002.safetensors": tower}  # fmt: skip
    for shard, part in shards.items():
        save_file(part, model / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    others = sorted(path.name for path in model.iterdir() if path.name != "model-00002-of-00002.safetensors")
    (tmp_path / "LIST").write_text(listing(model, *others))
    found = verify(model, against=tmp_path / "LIST")
    assert (found.exit_code, "39 tensors in 1 weight file without counterpart" in headline(found)) == (3, True)
    assert verify(model, against=tmp_path / "LIST", vision_tower=fixtures / TOWER).exit_code == 0


def test_common_rows_of_a_grown_table_are_compared(model: Path, fixtures: Path) -> None:
    def change(values: dict[str, np.ndarray]) -> None:
        values["language_model.lm_head.weight"][7, 0] += 1

    weights(model, change)
    found = verify(model, against=fixtures / BASE)
    assert "`language_model.lm_head.weight`" in said(found, "failed", rule="against")


def test_tensors_that_only_the_reference_has_are_a_failure_and_own_ones_are_unproved(good: Path, model: Path) -> None:
    without_records(model)
    weights(model, lambda values: values.update(extra=np.ones((2, 2), np.float32)))
    found = verify(model, against=good)
    assert "1 tensor not in `hf`, and nothing explains them: extra" in said(found, "unproved")
    found = verify(good, against=model)
    assert "only in `model`" in said(found, "failed", rule="against")
    assert found.exit_code == 4


def test_a_weight_file_alone_is_judged_without_small_files(good: Path, model: Path) -> None:
    alone = model / "model.safetensors"
    for reference in ({"deep": True}, {"against": good}, {"against": good / MANIFEST}, {"against": good / "model.safetensors"}):
        found = verify(alone, **reference)  # type: ignore[arg-type]
        assert (found.exit_code, said(found, "failed"), said(found, "warning")) == (0, "", "")


# --- rules of kind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["A-delta-v0/delta-308-may4", "A-delta-v0/base-hf-from-meta13B-by-tf4.37.2-BF16"])
def test_a_delta_and_a_damaged_base_are_what_they_are_compared_with(fixtures: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(fixtures / name, tmp_path / "x"))
    assert verify(folder).exit_code == 4
    found = verify(folder, against=fixtures / name)
    assert not {each.rule for each in found.findings if each.verdict == "failed"} & {"state", "bfloat16"}
    assert "so is what it was compared with" in said(found, "note")


def test_an_integer_delta_is_judged_as_a_delta(good: Path, fixtures: Path, tmp_path: Path) -> None:
    tuned = lw.open_checkpoint(fixtures / "A-delta-v0/expected-307-by-main")
    delta = lw.make_delta(lw.open_checkpoint(fixtures / "A-delta-v0/base-hf-bin"), tuned, codec="integer")
    lw.execute(lw.make_plan(delta), tmp_path / "delta")
    assert said(verify(tmp_path / "delta"), "failed") == "this is an integer delta that was never applied"
    assert verify(tmp_path / "delta", against=tmp_path / "delta").exit_code == 0


# --- what every command makes ---------------------------------------------------------------------------------------

DELTA, LLAMA, SMALL = "A-delta-v0/delta-308-may4", "A-delta-v0/base-meta", "common/clip-tiny-28px"
VICUNA, LORA = "B-lora/base-vicuna-tiny", "B-lora/llava-v1.5-tiny-lora"
MADE: dict[str, tuple[str, dict[str, str], list[str]]] = {  # command, sources that `verify --base` takes too, options that the recipe keeps
    "apply-delta": ("apply-delta --base {base}", {"base": LLAMA, "delta": DELTA}, []),
    "one pass": ("convert {base}", {"base": LLAMA, "delta": DELTA, "vision-tower": SMALL}, ["--projector-form", "gelu", "--dtype", "BF16"]),
    "options": (
        "convert {base}", {"base": BASE, "vision-tower": TOWER},
        ["--image-token", "<img>", "--image-aspect", "pad", "--conv-mode", "llava_v0", "--vocab-size", "384"],
    ),
    "back": ("convert {base} --to llava", {"base": "C-v1.5/hf-by-tf4.47.1"}, []),
    "next": ("convert {base}", {"base": "D-v1.6/original-vicuna"}, []),
    "merge-lora": ("merge-lora --base {base}", {"base": VICUNA, "lora": LORA}, ["--arithmetic", "exact", "--scale", "0.5"]),
    "merged and converted": ("convert {base}", {"base": VICUNA, "lora": LORA, "vision-tower": TOWER}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_what_a_command_makes_is_what_base_makes_again_small_files_too(fixtures: Path, tmp_path: Path, name: str) -> None:
    command, sources, options = MADE[name]
    given = [word for role, place in sources.items() if role != "base" for word in (f"--{role}", fixtures / place)]
    base, out = str(fixtures / sources["base"]), str(tmp_path / "out")
    made = CliRunner().invoke(app, [*command.format(base=base).split(), *map(str, given), *options, "-o", out, "-q"])
    assert made.exit_code == 0, made.output
    done = CliRunner().invoke(app, ["verify", out, "--base", base, *map(str, given)])
    assert done.exit_code == 0, done.output
    assert "small files (by the sources) verified" in done.output
    assert "unchecked" not in done.output
    for value in ("exact", "0.5", "gelu"):  # what the values depend on, and only the manifest tells
        assert (f"{value}, " in done.output and "as its manifest records" in done.output) == (value in options)


# --- warnings -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def doubtful(fixtures: Path, tmp_path: Path) -> Path:
    """Made with a base that the tool knew to be wrong."""
    base = lw.open_checkpoint(fixtures / "A-delta-v0/base-hf-from-meta13B-by-tf4.37.2-BF16")
    base = lw.Checkpoint(base.tensors, base.config, base.origin, lw.open_checkpoint(fixtures / "A-delta-v0/base-hf-bin").files)
    merged = lw.apply_delta(base, lw.open_checkpoint(fixtures / "A-delta-v0/delta-308-may4"), accept_base=True)
    lw.execute(lw.make_plan(merged), tmp_path / "doubtful")
    return tmp_path / "doubtful"


def test_what_the_tool_knew_when_it_wrote_is_a_warning(doubtful: Path, cli: Any) -> None:
    found = verify(doubtful)
    assert found.exit_code == 0
    assert "accepted all the same: the base went through bfloat16" in said(found, "warning", rule="recorded")
    strict = verify(doubtful, strict=True)
    assert (strict.exit_code, "accepted all the same" in said(strict, "failed", rule="recorded")) == (4, True)
    done = cli("verify", doubtful)
    assert (done.code, "[recorded]" in done.stdout) == (0, True)
    assert cli("verify", doubtful, "--strict").code == 4
    others = {each.rule for each in found.findings if each.verdict == "warning"}
    done = cli("verify", doubtful, "--strict", *(word for rule in sorted(others) for word in ("--allow", rule)))
    assert (done.code, "allowed: recorded" in done.stdout) == (0, True)


def test_strict_and_allow(model: Path, cli: Any) -> None:
    (model / "notes.txt").write_text("mine")
    (model / "run.py").write_text("print()")
    found = verify(model)
    assert found.exit_code == 0
    assert {each.rule for each in found.findings if each.verdict == "warning"} == {"unlisted-file", "code"}
    assert verify(model, strict=True).exit_code == 4
    assert verify(model, strict=True, allow=["code"]).exit_code == 4
    both = verify(model, strict=True, allow=["code", "unlisted-file"])
    assert (both.exit_code, "allowed: unlisted-file, code" in headline(both)) == (0, True)
    with pytest.raises(UsageError, match="no rule `codes`") as caught:
        verify(model, strict=True, allow=["codes"])
    assert "unlisted-file" in str(caught.value.hint)
    with pytest.raises(UsageError):
        verify(model, allow=["code"])
    assert cli("verify", model, "--strict", "--allow", "codes").code == 2


def test_every_finding_has_a_rule_that_allow_takes(model: Path, cli: Any) -> None:
    done = cli("verify", model, "--deep", "--json")
    found = json.loads(done.stdout.splitlines()[-1])["findings"]
    assert {each["rule"] for each in found} <= {*rules()}
    assert "[tensors]" in cli("verify", model, "--deep", "-v").stdout


def test_a_difference_of_names_is_no_warning(fixtures: Path, cli: Any, tmp_path: Path) -> None:
    """The adapter's config names a base of another name than the folder that is given."""
    shutil.copytree(fixtures / "B-lora/base-vicuna-tiny", tmp_path / "renamed")
    done = cli("merge-lora", "--base", "renamed", "--lora", fixtures / "B-lora/llava-v1.5-tiny-lora", "-o", "out")
    assert done.code == 0
    assert "the base given is `renamed`" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.lstrip().startswith("warning") and "renamed" in line]


def test_options_that_mean_nothing_together(model: Path, fixtures: Path) -> None:
    for options in (
        {"vision_tower": fixtures / TOWER},
        {"delta": fixtures / BASE},
        {"lora": ["x"]},
        {"against": "published", "lora": ["x"]},
    ):
        with pytest.raises(UsageError):
            verify(model, **options)  # type: ignore[arg-type]


# --- the original beside what was converted from it ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An original with a single linear projector, and what it is in llava-hf, by form. Not to be changed."""
    folder = tmp_path_factory.mktemp("linear")
    original = lw.apply_delta(lw.open_checkpoint(fixtures / "A-delta-v0/base-hf-bin"), lw.open_checkpoint(fixtures / DELTA))
    lw.execute(lw.make_plan(original), folder / "original")
    tower = lw.open_checkpoint(fixtures / SMALL)
    for form in ("identity", "gelu"):
        lw.execute(lw.make_plan(lw.convert(original, "llava-hf", tower=tower, projector_form=form)), folder / form)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("record", ["", MANIFEST])
@pytest.mark.parametrize("form", ["identity", "gelu"])
def test_a_single_projector_is_compared_by_what_it_computes(linear: dict[str, Path], form: str, record: str) -> None:
    for one, other in ((form, "original"), ("original", form)):
        found = verify(linear[one], against=linear[other] / record)
        assert (found.exit_code, "tower" in headline(found) or "39 tensors" in headline(found)) == (0, True), said(found, "failed")


@pytest.mark.parametrize("name", ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"])
def test_another_projector_is_none_of_its_forms(linear: dict[str, Path], tmp_path: Path, name: str) -> None:
    for form in ("identity", "gelu"):
        folder = Path(shutil.copytree(linear[form], tmp_path / form))
        tensors = load_file(folder / "model.safetensors")
        tensors[f"multi_modal_projector.{name}"].flat[1] += 0.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        lw.checksum(folder, force=True)
        assert verify(folder, against=linear["original"]).exit_code == 4
        assert verify(linear["original"], against=folder).exit_code == 4
        assert verify(linear["original"], against=folder / MANIFEST).exit_code == 4


def test_an_original_beside_its_conversion(fixtures: Path, good: Path, model: Path) -> None:
    found = verify(fixtures / BASE, against=good)
    assert found.exit_code == 0, said(found, "failed")
    assert f"unchecked: 16 rows of `{good.name}`, the vision tower of `{good.name}`" in headline(found)
    found = verify(fixtures / BASE, against=good / MANIFEST)  # whose digests are of tables with more rows
    assert (found.exit_code, "not compared" in headline(found)) == (3, True)
    edit("config.json", text_config__rope_theta=5000.0)(model)
    assert "rope_theta" in said(verify(fixtures / BASE, against=model), "failed")


# --- a small file that is not there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"),
    [("generation_config.json", 0), ("special_tokens_map.json", 0), ("added_tokens.json", 4), ("tokenizer.model", 4),
     ("tokenizer_config.json", 4)],
)  # fmt: skip
def test_a_small_file_that_is_gone_fails_or_is_named(linear: dict[str, Path], tmp_path: Path, name: str, code: int) -> None:
    folder = Path(shutil.copytree(linear["original"], tmp_path / "x"))
    without_records(folder)
    (folder / name).unlink()
    found = verify(folder, against=linear["original"])
    assert found.exit_code == code, headline(found)
    assert code or f"unchecked: `{name}`" in headline(found)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "tokenizer.model", "tokenizer.json", "special_tokens_map.json"]
)
def test_a_small_file_whose_content_stands_elsewhere_is_named(good: Path, model: Path, name: str) -> None:
    without_records(model)
    (model / name).unlink()
    found = verify(model, against=good)
    assert (found.exit_code, f"unchecked: `{name}`" in headline(found)) == (0, True), said(found, "failed")


def test_one_more_special_token_is_another_tokenizer(good: Path, model: Path) -> None:
    edit("special_tokens_map.json", additional_special_tokens=["ab"])(model)
    assert "`ab` is a special token here" in said(verify(model, against=good), "failed", rule="small-files")
    assert "`ab` is no special token here" in said(verify(good, against=model), "failed", rule="small-files")


def test_a_setting_that_no_table_knows_is_named_in_the_headline(good: Path, model: Path) -> None:
    edit("config.json", new_switch=True)(model)
    without_records(model)
    found = verify(model, against=good)
    assert (found.exit_code, "unchecked: `new_switch`" in headline(found)) == (0, True)
