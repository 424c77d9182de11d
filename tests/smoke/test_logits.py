"""The smoke test: good models of the reference data pass, every mistake that the reference data holds fails, and a failure says where."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file
from smoke.test_forward import cases, expected

from llava_weights.checkpoint.chat_template import example
from llava_weights.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llava_weights.errors import InputError, OutputError, UsageError, VerificationError
from llava_weights.families.layouts import canonical
from llava_weights.families.prompts import CONVERSATIONS
from llava_weights.smoke.forward import Probe
from llava_weights.smoke.generate import PARAGRAPH, generate
from llava_weights.smoke.logits import Smoke, compare, compare_original, smoke_test
from llava_weights.smoke.probes import built_in_probes, find_sight, pattern, table_ids
from llava_weights.smoke.recording import (
    Recorded,
    Recording,
    make_recording,
    read_recording,
    record,
    sketch,
    write_recording,
)
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor
from llava_weights.transforms.convert import convert
from llava_weights.transforms.delta import apply_delta
from llava_weights.transforms.lora import merge_lora, open_weighted

ATOL = 5e-5  # reference README, E
CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PAIRS = {"A": "A-delta-v0/expected-307-by-main", "C": "C-v1.5/original-no-vision-bin", "D": "D-v1.6/original-vicuna"}
LORA = "B-lora/merged-of-llava-v1"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True, kw_only=True)
class Held(LazyTensor):
    """A tensor of a faulty checkpoint, in memory."""

    data: bytes

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        out[:] = self.data[start * self.row_nbytes : stop * self.row_nbytes]


def hold(value: torch.Tensor) -> Held:
    return Held(dtype=CODES[value.dtype], shape=tuple(value.shape), data=value.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def values(tensor: LazyTensor) -> torch.Tensor:
    raw = bytearray(tensor.nbytes)
    tensor.rows_into(memoryview(raw), 0, tensor.rows, Workspace())
    kind = next(kind for kind, code in CODES.items() if code == tensor.dtype)
    return torch.frombuffer(raw, dtype=kind).view(tensor.shape).clone()


def altered(checkpoint: Checkpoint, pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Checkpoint:
    """`change` made to every tensor whose canonical name has `pattern` in it."""
    names = [name for name in checkpoint.tensors if re.search(pattern, canonical(name))]
    assert names
    return replace(checkpoint, tensors={**checkpoint.tensors, **{name: hold(change(values(checkpoint.tensors[name]))) for name in names}})


def configured(checkpoint: Checkpoint, part: str = "", **changes: Any) -> Checkpoint:
    config = dict(checkpoint.config)
    if part:
        config[part] = {**config[part], **changes}
    else:
        config |= changes
    return replace(checkpoint, config=config)


def over(checkpoint: Checkpoint, other: Checkpoint) -> Checkpoint:
    """`checkpoint` with the values of `other`, on the rows that it has."""
    others = {canonical(name): tensor for name, tensor in other.parameters().items()}
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if (instead := others.get(canonical(name))) is not None:
            value = values(tensor)
            value[: instead.rows] = values(instead)
            tensors[name] = hold(value)
    return replace(checkpoint, tensors=tensors)


def swapped(checkpoint: Checkpoint) -> Checkpoint:
    """A converted v1.6 as it should be: pinpoints in transformers' order, (height, width)."""
    return configured(checkpoint, image_grid_pinpoints=[pair[::-1] for pair in checkpoint.config["image_grid_pinpoints"]])


def foreign(folder: Path, *, prefix: str = "", only: tuple[str, ...] = ()) -> Recording:
    """The logits of an original program as a recording, with ids in its own form: all places, and the embeddings where they are stored."""
    stored, probes = load_file(next(folder.glob("original-*.safetensors"))), []
    for probe in cases(folder, hf=False, prefix=prefix):
        if only and probe.name.removeprefix(prefix) not in only:
            continue
        logits = expected(folder, probe.name)
        image = np.zeros(len(logits), bool)
        image[places(folder, probe.name)] = True
        entered = stored.get(f"{probe.name}.inputs_embeds.float32")
        hidden = {} if entered is None else {"embeddings": sketch(entered[0], np.arange(len(logits)))}
        probes.append(Recorded(probe, image, np.arange(len(logits)), logits, hidden))
    return Recording(tuple(probes), {"layout": "llava", "dtype": "F32", "model": "the original"})


def places(folder: Path, case: str) -> list[int]:
    """Which places of a case hold features of images, as the original program recorded."""
    found = json.loads((folder / "cases.json").read_text())
    if "cases" not in found:
        return found[case].get("image_positions", [])
    return [place for span in found["cases"][case].get("image_spans_in_logits", []) for place in range(*span)]


class World:
    """The good models, and where their reference is."""

    def __init__(self, fixtures: Path) -> None:
        self.at = fixtures
        self.made: dict[str, Recording] = {}

    def open(self, name: str) -> Checkpoint:
        return open_checkpoint(self.at / name)

    def recorded(self, letter: str) -> Recording:
        """The built-in probes of the unconverted checkpoint."""
        if letter not in self.made:
            model, tower = self.open(PAIRS[letter]), self.tower(28 if letter == "A" else 42)
            self.made[letter] = make_recording(model, built_in_probes(model, tower=tower), tower=tower)
        return self.made[letter]

    def tower(self, pixels: int) -> Checkpoint:
        return self.open(f"common/clip-tiny-{pixels}px")

    def good(self, letter: str) -> Checkpoint:
        names = {"A": "A-delta-v0/hf-linear-projector-307", "B": f"{LORA}.5-tiny-lora-by-main-peft0.10.0", "C": "C-v1.5/hf-by-tf4.47.1"}
        return swapped(self.open("D-v1.6/hf-by-tf4.47.1-vicuna")) if letter == "D" else self.open(names[letter])

    def reference(self, letter: str, only: tuple[str, ...] = ()) -> Recording:
        folders = {"A": "A-delta-v0", "B": "B-lora-v1.5", "C": "C-v1.5", "D": "D-v1.6"}
        prefix = "v307." if letter == "A" else ""
        return foreign(self.at / "E-logits" / folders[letter], prefix=prefix, only=only)

    def test(self, letter: str, model: Checkpoint, only: tuple[str, ...] = (), **options: Any) -> Smoke:
        tower = self.tower(28) if letter in "AB" and model.layout == "llava" else None
        return compare(model, self.reference(letter, only), tower=tower, **options)


@pytest.fixture(scope="module")
def world(fixtures: Path) -> World:
    return World(fixtures)


def meta_order(weight: torch.Tensor) -> torch.Tensor:
    """Rows of q or k as Meta stores them: pairs side by side, not halves."""
    rows, columns = weight.shape
    return weight.view(4, 2, rows // 8, columns).transpose(1, 2).reshape(rows, columns)


def wrong_base(world: World) -> Checkpoint:
    base = world.open("A-delta-v0/base-hf-from-meta13B-by-tf4.37.2-BF16")
    return apply_delta(base, world.open("A-delta-v0/delta-307-apr17"), accept_base=True)


def merged(world: World, scale: float = 1.0) -> Checkpoint:
    """With one rounding, as peft 0.4.0 and 0.21 merge."""
    adapter = open_weighted(str(world.at / "B-lora/llava-v1.5-tiny-lora"))
    return merge_lora(world.open("B-lora/base-vicuna-tiny"), [adapter], scale=scale)


def bfloat(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16()


def as_tower(clip: Checkpoint) -> Checkpoint:
    return replace(clip, tensors={f"vision_tower.{n}": t for n, t in clip.tensors.items() if n.startswith("vision_model.")})


# What the originals measured in negative-controls.json, made again as a checkpoint or a config.
CONTROLS: dict[str, Callable[[World], Checkpoint]] = {
    "C q/k left in Meta (interleaved) rotary order": lambda w: altered(
        altered(w.good("C"), r"text.*q_proj", meta_order), r"text.*k_proj", meta_order
    ),
    "C vision layer -1 instead of -2": lambda w: configured(w.good("C"), vision_feature_layer=-1),
    "C CLIP gelu instead of quick_gelu": lambda w: configured(w.good("C"), "vision_config", hidden_act="gelu"),
    "C projector gelu(tanh)": lambda w: configured(w.good("C"), projector_hidden_act="gelu_pytorch_tanh"),
    "C projector without GELU": lambda w: configured(w.good("C"), projector_hidden_act="linear"),
    "C rms eps 1e-6 instead of 1e-5": lambda w: configured(w.good("C"), "text_config", rms_norm_eps=1e-6),
    "C decoder layers rounded to bf16": lambda w: altered(w.good("C"), "text.layers.", bfloat),
    "D image_newline zero": lambda w: altered(w.good("D"), "newline", torch.zeros_like),
    "D untuned CLIP instead of the checkpoint's own tower": lambda w: over(w.good("D"), as_tower(w.tower(42))),
    "A rms eps 1e-5 instead of 1e-6": lambda w: configured(w.good("A"), "text_config", rms_norm_eps=1e-5),
    "A weights of the bf16-converted base (tf 4.37.2 Meta conversion)": wrong_base,
    "A exact target instead of base+delta (fp16 rounding)": lambda w: w.open("A-delta-v0/target-307/llava-tiny-v0"),
    "A text decoder = base, delta not applied": lambda w: over(w.good("A"), w.open("A-delta-v0/base-hf-bin")),
    "A extra token rows zero in embed_tokens": lambda w: altered(
        w.good("A"), "embed_tokens", lambda x: torch.cat((x[:304], torch.zeros_like(x[304:])))
    ),
    "B LoRA not applied": lambda w: over(w.good("B"), w.open("B-lora/base-vicuna-tiny")),
    "B LoRA scale 1 instead of 3 (alpha/r ignored)": lambda w: merged(w, 1 / 3),
    "B merged by peft 0.4.0 (single rounding) instead of 0.10.0": merged,
}

MEASURED = "E-logits/negative-controls.json"
# What half precision can tell too: beyond its limits (0.15 and 0.4 standard deviations of 1.0 to 1.4), and so what float16 alone can.
SEPARABLE = {"F16": (0.3, 1.0), "BF16": (1.0, 100.0)}


def measured(world: World) -> dict[str, float]:
    entries = json.loads((world.at / MEASURED).read_text())
    return {entry["change"]: entry["max_abs_logit_diff_fp32"] for entry in entries if "nothing wrong" not in entry["change"]}


@pytest.mark.parametrize("letter", "ABCD")
def test_good_models_have_the_logits_of_the_originals(letter: str, world: World) -> None:
    model, reference = world.good(letter), world.reference(letter)
    smoke = world.test(letter, model)
    assert (smoke.verdict, smoke.exit_code, smoke.first_wrong) == ("same", 0, ""), smoke.findings
    assert {row.probe for row in smoke.rows} == {one.probe.name for one in reference.probes}
    for one in reference.probes:
        counts = {row.where: row.places for row in smoke.rows if row.probe == one.probe.name}
        assert counts.get("image", 0) == one.image.sum()
        assert sum(counts.values()) == len(one.logits)
    assert all(row.top1 == row.top5 == 1 and 0 < row.max_abs < ATOL and row.mean_kl < 1e-10 < row.min_cosine for row in smoke.rows)


@pytest.mark.parametrize(
    ("folder", "recorded", "prefix", "pixels"),
    [
        ("A-delta-v0/expected-308-by-may4", "A-delta-v0", "v308.", 28),
        (f"{LORA}-tiny-lora-imstartend-by-main-peft0.10.0", "B-lora-imstartend", "", 28),
        ("C-v1.5/original-no-vision-bin", "C-v1.5", "", 42),
        ("D-v1.6/original-vicuna", "D-v1.6", "", 42),
    ],
)
def test_the_original_layout_has_the_logits_of_the_originals(folder: str, recorded: str, prefix: str, pixels: int, world: World) -> None:
    reference = foreign(world.at / "E-logits" / recorded, prefix=prefix)
    assert compare(world.open(folder), reference, tower=world.tower(pixels), atol=ATOL).verdict == "same"
    made = make_recording(world.open(folder), [one.probe for one in reference.probes], tower=world.tower(pixels))
    for one, recorded in zip(made.probes, reference.probes, strict=True):  # where images are, as the original recorded it
        assert np.array_equal(one.image, recorded.image), one.probe.name


def test_every_negative_control_is_made(world: World) -> None:
    assert CONTROLS.keys() == measured(world).keys()


@pytest.mark.parametrize("control", CONTROLS)
def test_every_negative_control_fails_by_as_much_as_the_originals_measured(control: str, world: World) -> None:
    model, wanted = CONTROLS[control](world), measured(world)[control]
    smoke = world.test(control[0], model)
    assert smoke.exit_code == 4
    assert smoke.verdict in (("different",) if wanted > 1e-2 else ("different", "suspicious"))
    assert max(row.max_abs for row in smoke.rows) > 0.9 * wanted > ATOL
    assert smoke.first_wrong == ("embeddings" if control[0] in "CD" and re.search("CLIP|vision|projector|newline", control) else "")


def test_a_given_tolerance_decides_alone(world: World) -> None:
    good, bad = world.good("A"), CONTROLS["A exact target instead of base+delta (fp16 rounding)"](world)
    for model, atol, verdict in ((good, ATOL, "same"), (good, 1e-9, "different"), (bad, ATOL, "different"), (bad, 2e-4, "same")):
        assert world.test("A", model, atol=atol).verdict == verdict
    assert world.test("A", good, ("text",), atol=0.5, dtype="BF16").verdict == "plausible"
    assert world.test("A", good, ("text",), atol=ATOL, dtype="BF16").verdict == "different"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_at_best_plausible(dtype: str, world: World) -> None:
    for letter in "AD":
        smoke = world.test(letter, world.good(letter), ("img", "text"), dtype=dtype)
        assert (smoke.verdict, smoke.exit_code) == ("plausible", 0)
        assert all(row.max_abs > ATOL for row in smoke.rows)
    low, high = SEPARABLE[dtype]
    separable = [control for control, size in measured(world).items() if low < size <= high]
    assert separable
    for control in separable:
        smoke = world.test(control[0], CONTROLS[control](world), ("imgfirst", "img"), dtype=dtype)
        assert (smoke.verdict, smoke.exit_code) == ("different", 4), control


def test_tiles_chosen_by_the_wrong_order_of_pinpoints_fail(world: World) -> None:
    smoke = world.test("D", world.open("D-v1.6/hf-by-tf4.47.1-vicuna"))
    assert smoke.exit_code == 4
    (bad,) = [finding for finding in smoke.findings if finding.verdict == "failed"]
    assert bad.subject == "twoimg"
    assert "pinpoints" in bad.remedy


# --- against the unconverted checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("letter", PAIRS)
def test_a_conversion_is_compared_with_what_it_was_made_of(letter: str, world: World) -> None:
    original, tower = world.open(PAIRS[letter]), world.tower(28 if letter == "A" else 42)
    smoke = compare_original(world.good(letter), original, tower=tower)
    assert (smoke.verdict, smoke.exit_code) == ("same", 0)
    assert {row.where for row in smoke.rows} == {"text", "image"}
    reference = world.recorded(letter)
    assert compare(world.good(letter), reference, dtype="BF16").verdict == "plausible"
    assert compare(original, reference, tower=tower).verdict == "same"  # in the original layout too


@pytest.mark.parametrize(
    ("pattern", "change", "first"),
    [
        ("projector.2.weight", lambda x: x * 1.01, "vision"),
        ("tower.encoder.layers.0.mlp.fc1.weight", lambda x: x * 1.01, "vision"),
        ("embed_tokens", lambda x: x.roll(1, 0), "embeddings"),
        ("text.layers.0.input_layernorm", lambda x: x * 1.002, "layer.0"),
        ("text.layers.1.self_attn.q_proj", lambda x: x * 1.01, "layer.1"),
        ("text.layers.1.mlp.down_proj", lambda x: x.roll(1, 1), "layer.1"),
        ("text.norm", lambda x: x * 1.01, "head"),
        ("head.weight", lambda x: x.roll(1, 0), "head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_wrong_part_is_named(pattern: str, change: Callable[[torch.Tensor], torch.Tensor], first: str, world: World) -> None:
    smoke = compare(altered(world.good("C"), pattern, change), world.recorded("C"))
    assert (smoke.verdict, smoke.exit_code, smoke.first_wrong) == ("different", 4, first)
    failed = [finding for finding in smoke.findings if finding.verdict == "failed"]
    assert any(first in finding.text and finding.remedy for finding in failed)
    assert {finding.subject for finding in failed} == ({"image"} if first == "vision" else {"text", "rows", "table", "image"})


def test_rows_of_added_tokens_and_the_last_ones_are_looked_at(world: World) -> None:
    for row in (305, 306):  # <im_start> and <im_end>, which no probe of text holds

        def zero(weight: torch.Tensor, row: int = row) -> torch.Tensor:
            weight[row] = 0
            return weight

        smoke = compare(altered(world.good("A"), "embed_tokens", zero), world.recorded("A"))
        assert [finding.subject for finding in smoke.findings if finding.verdict == "failed"] == ["rows"]


def test_every_part_of_the_table_is_read_and_over_several_recordings_every_row() -> None:
    for rows in (1, 7, 255, 256, 304, 32_003, 128_256):
        edges = np.linspace(0, rows, min(rows, 256) + 1).astype(int)
        for seed in (0, 1, 2**32 - 1):
            assert np.histogram(table_ids(rows, seed), edges - 0.5)[0].tolist() == [1] * (len(edges) - 1)
        assert {i for seed in range(1000, 1000 + -(-rows // 256)) for i in table_ids(rows, seed)} == set(range(rows))
    assert table_ids(0, 3) == []


def test_a_wrong_row_is_found_by_the_recording_that_drew_it(world: World, tmp_path: Path) -> None:
    good = world.good("C")
    drawn = [{int(i) for probe in built_in_probes(good, seed=seed) for i in probe.ids} for seed in (0, 1)]
    row = min(drawn[1] - drawn[0])

    def zero(weight: torch.Tensor) -> torch.Tensor:
        weight[row] = 0
        return weight

    broken = altered(good, "embed_tokens", zero)
    assert compare(broken, record(good, tmp_path / "0", seed=0)).verdict == "same"
    smoke = compare(broken, record(good, tmp_path / "1", seed=1))
    assert [finding.subject for finding in smoke.findings if finding.verdict == "failed"] == ["table"]
    assert read_recording(tmp_path / "1").metadata["seed"] == "1"


def test_each_recording_draws_other_rows(world: World, tmp_path: Path) -> None:
    made = [record(world.good("A"), tmp_path / name) for name in ("one", "other")]
    assert made[0].metadata["seed"] != made[1].metadata["seed"]
    for one in made:
        again = {probe.name: probe.ids for probe in built_in_probes(world.good("A"), seed=int(one.metadata["seed"]))}
        assert all(np.array_equal(again[each.probe.name], each.probe.ids) for each in one.probes)


def test_a_recording_without_a_seed_is_still_read(world: World, tmp_path: Path) -> None:
    """As recordings were before their rows were drawn."""
    made = record(world.good("C"), tmp_path / "new")
    metadata = {key: text for key, text in made.metadata.items() if key != "seed"}
    write_recording(Recording(tuple(one for one in made.probes if one.probe.name != "table"), metadata), tmp_path / "old")
    smoke = compare(world.good("C"), tmp_path / "old")
    assert (smoke.verdict, {row.probe for row in smoke.rows}) == ("same", {"text", "rows", "image"})


def test_built_in_images_tell_the_order_of_pinpoints(world: World) -> None:
    smoke = compare(world.open("D-v1.6/hf-by-tf4.47.1-vicuna"), world.recorded("D"))
    assert [finding.subject for finding in smoke.findings if finding.verdict == "failed"] == ["image-tie"]


def test_pictures_have_no_symmetry() -> None:
    picture = pattern(2, 42)
    assert picture.dtype == np.float32
    for other in (picture[:, ::-1], picture[..., ::-1], picture[:, :, ::-1], picture.swapaxes(2, 3), picture[::-1]):
        assert (picture != other).mean() > 0.6  # the middle channel stays the middle one


@pytest.mark.parametrize(("letter", "folder"), [("C", "C-v1.5"), ("D", "D-v1.6")])
def test_an_image_has_as_many_features_as_the_original_counted(letter: str, folder: str, world: World) -> None:
    sights = [find_sight(world.good(letter)), find_sight(world.open(PAIRS[letter]), world.tower(42))]
    for case in json.loads((world.at / "E-logits" / folder / "cases.json").read_text())["cases"].values():
        for size, count in zip(case.get("image_sizes_wh") or [], case.get("feature_tokens_per_image") or [], strict=True):
            assert [sight.features((size[1], size[0])) for sight in sights if sight] == [count, count]


def test_without_a_tower_only_text_is_compared_and_that_is_said(world: World) -> None:
    smoke = compare_original(world.good("C"), world.open("C-v1.5/original-no-vision-bin"))
    assert (smoke.verdict, smoke.exit_code) == ("same", 0)
    (blind,) = [finding for finding in smoke.findings if finding.verdict == "unchecked"]
    assert "vision tower" in blind.text
    assert "--vision-tower" in blind.remedy
    images = foreign(world.at / "E-logits/C-v1.5", only=("img",))
    nothing = compare(world.open("C-v1.5/original-no-vision-bin"), images)
    assert (nothing.verdict, nothing.exit_code, nothing.rows) == (None, 3, ())


# --- recordings -----------------------------------------------------------------------------------------------------


def test_a_recording_is_run_again_as_it_was(world: World, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    made = record(world.good("D"), path)
    assert len(made.probes) == 5
    read = read_recording(path)
    assert read.metadata == {**made.metadata, "schema": "llava-weights smoke 1"}
    smoke = compare(world.good("D"), path)
    assert smoke.verdict == "same"
    assert all(row.nmse == 0 for row in smoke.rows)
    stored = load_file(path)  # the library reads it too
    for one in made.probes:
        again = next(each for each in read.probes if each.probe.name == one.probe.name)
        assert np.array_equal(again.probe.ids, stored[f"ids.{one.probe.name}"])
        assert np.array_equal(again.logits, one.logits)
        assert np.array_equal(stored[f"top.{one.probe.name}"][:, 0], one.logits.argmax(1))
        assert list(again.hidden)[-3:] == ["embeddings", "layer.0", "layer.1"]
    broken = altered(world.good("D"), "text.layers.1.mlp.up_proj", lambda x: x * 1.01)
    assert compare(broken, path).first_wrong == "layer.1"
    with pytest.raises(OutputError):
        record(world.good("D"), path)


def test_long_probes_keep_some_places_of_text_and_images(world: World) -> None:
    model = world.good("D")
    probe = next(probe for probe in built_in_probes(model) if probe.name == "image")
    (one,) = make_recording(model, [probe], values=1).probes
    assert len(one.positions) == len(one.logits) == 16
    assert one.image[one.positions].sum() == 8
    assert one.positions[-1] == len(one.image) - 1


def test_ids_of_a_recording_fit_the_other_layout(world: World) -> None:
    converted = make_recording(world.good("C"), built_in_probes(world.good("C")))
    assert converted.layout == "llava-hf"
    text = [replace(one, probe=one.probe) for one in converted.probes if one.probe.name != "rows"]  # whose last rows are padding
    smoke = compare(world.open(PAIRS["C"]), replace(converted, probes=tuple(text)), tower=world.tower(42))
    assert smoke.verdict == "same"
    assert {row.where for row in smoke.rows} == {"text", "image"}


def test_a_merge_is_forgiven_its_rounding_where_the_adapter_was_beside(fixtures: Path) -> None:
    base, other = (open_checkpoint(fixtures / f"F-peft/base-{kind}") for kind in ("fp16", "fp32"))
    merged, exact = (load_torch_file(fixtures / f"F-peft/plain/merged-base-{kind}.safetensors") for kind in ("fp16", "fp32"))
    one = "model.layers.1.self_attn.v_proj.weight"  # in a random model of this width, rounding all modules is beyond a trained one's noise
    unmerged = values(base.tensors[one]).float() + exact[one] - values(other.tensors[one])
    reference = make_recording(replace(base, tensors={**base.tensors, one: hold(unmerged)}), built_in_probes(base))
    beside = replace(reference, metadata={**reference.metadata, "adapter": "unmerged"})
    model = replace(base, tensors={**base.tensors, one: hold(merged[one])})
    assert compare(model, beside).verdict == "plausible"
    assert compare(model, reference).exit_code == 4
    assert compare(base, beside).verdict == "different"


BAD: dict[str, Callable[[dict[str, np.ndarray], dict[str, str]], Any]] = {
    "other schema": lambda a, m: m.update(schema="something else 1"),
    "no layout": lambda a, m: m.pop("layout"),
    "unknown dtype": lambda a, m: m.update(dtype="F8"),
    "foreign tensor": lambda a, m: a.update({"model.norm.weight": np.zeros(3, np.float32)}),
    "no ids": lambda a, m: a.pop("ids.text"),
    "ids of another type": lambda a, m: a.update({"ids.text": a["ids.text"].astype(np.float32)}),
    "a place twice": lambda a, m: a["positions.text"].__setitem__(1, 0),
    "a place beyond": lambda a, m: a["positions.text"].__setitem__(-1, 10**6),
    "negative place": lambda a, m: a["positions.text"].__setitem__(0, -1),
    "too few logits": lambda a, m: a.update({"logits.text": a["logits.text"][:-1]}),
    "no number": lambda a, m: a["logits.text"].__setitem__((0, 0), np.nan),
    "hidden of another form": lambda a, m: a.update({"hidden.text.layer.0": a["hidden.text.layer.0"][:, :5]}),
    "hidden of no probe": lambda a, m: a.update({"hidden.none.layer.0": a["hidden.text.layer.0"]}),
    "hidden place beyond": lambda a, m: a["hidden.text.layer.0"].__setitem__((0, 0), -5),
    "pixels of no image": lambda a, m: a.update({"pixel_values.text": np.zeros((1, 28), np.float32)}),
    "sizes without pixels": lambda a, m: a.update({"image_sizes.text": np.ones((1, 2), np.int64)}),
    "no probe": lambda a, m: a.clear(),
}


@pytest.fixture(scope="module")
def sound(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "sound.safetensors"
    write_recording(make_recording(world.good("A"), [Probe("text", np.array([1, 5, 9]))]), path)
    return path


def test_files_that_another_program_wrote_are_read(sound: Path, world: World, tmp_path: Path) -> None:
    save_file(load_file(sound), tmp_path / "copy.safetensors", dict(read_recording(sound).metadata))
    assert compare(world.good("A"), tmp_path / "copy.safetensors").verdict == "same"


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_sound_recording_are_refused(name: str, sound: Path, tmp_path: Path) -> None:
    arrays, metadata = load_file(sound), dict(read_recording(sound).metadata)
    BAD[name](arrays, metadata)
    save_file(arrays, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(InputError):
        read_recording(tmp_path / "bad.safetensors")


def test_a_model_that_is_not_finite_fails_and_is_no_reference(world: World) -> None:
    broken = altered(world.good("A"), "text.norm", lambda x: x * float("nan"))
    smoke = world.test("A", broken)
    assert (smoke.verdict, smoke.exit_code) == ("different", 4)
    assert all("infinite" in finding.text for finding in smoke.findings)
    assert compare(broken, world.reference("A"), dtype="BF16", atol=1e9).exit_code == 4
    with pytest.raises(InputError, match="no numbers"):
        make_recording(broken, [Probe("text", np.array([1, 5, 9]))])


def test_smoke_test_for_a_users_own_tests(world: World, tmp_path: Path) -> None:
    folder, path = world.at / "C-v1.5/hf-by-tf4.47.1", tmp_path / "reference.safetensors"
    record(world.open("C-v1.5/hf-by-tf4.47.1"), path)
    assert smoke_test(folder, reference=path).verdict == "same"
    original, clip = world.at / PAIRS["C"], world.at / "common/clip-tiny-42px"
    assert smoke_test(folder, original=original, tower=clip).verdict == "same"
    with pytest.raises(VerificationError) as caught:
        smoke_test(world.at / "D-v1.6/hf-by-tf4.47.1-vicuna", original=original, tower=clip)
    assert caught.value.exit_code == 4
    assert "layer.0" in str(caught.value.facts) or "embeddings" in str(caught.value.facts)
    for wrong in ({}, {"reference": path, "original": original}):
        with pytest.raises(UsageError):
            smoke_test(folder, **wrong)
    with pytest.raises(InputError, match="original layout"):
        smoke_test(folder, original=folder)
    write_recording(foreign(world.at / "E-logits/C-v1.5", only=("img",)), tmp_path / "images.safetensors")
    with pytest.raises(InputError, match="nothing could be compared"):
        smoke_test(original, reference=tmp_path / "images.safetensors")


# --- samples --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, fixtures: Path) -> tuple[Path, float]:
    """A model that knows which token follows which in the paragraph, and the perplexity that this makes. Its embeddings are one-hot,
    its layer adds nothing, and its head holds the logarithms of the shares."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("reader")
    (folder / "tokenizer.model").write_bytes((fixtures / "common/tokenizer/tokenizer.model").read_bytes())
    ids = [1, *sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).encode(PARAGRAPH)]
    counts = torch.full((304, 304), 1e-4)
    for before, after in pairwise(ids):
        counts[before, after] += 1
    shares = counts / counts.sum(1, keepdim=True)
    config = transformers.LlamaConfig(
        vocab_size=304, hidden_size=304, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=False
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(304))
        for name, parameter in model.model.layers[0].named_parameters():
            parameter.mul_(0 if "o_proj" in name or "down_proj" in name else 1)
        model.lm_head.weight.copy_(shares.log().T / 304**0.5)  # the last norm makes the one a sqrt(304)
    model.save_pretrained(folder)
    surprise = [-shares[before, after].log() for before, after in pairwise(ids)]
    return folder, float(torch.stack(surprise).mean().exp())


def test_a_model_that_reads_is_less_surprised_than_one_that_babbles(reader: tuple[Path, float], world: World) -> None:
    model = open_checkpoint(reader[0])
    found = generate(model, "The train left the small", new_tokens=12)
    assert found.perplexity == pytest.approx(reader[1], rel=1e-3)
    assert len(found.tokens) == 12
    assert found.text[0] in PARAGRAPH
    assert [finding.verdict for finding in found.findings] == ["note"]
    for change in (lambda x: x.roll(7, 0), lambda x: x * float("nan")):
        bad = generate(altered(model, "head", change), "the meaning of life is", new_tokens=3)
        assert bad.perplexity > 100 * found.perplexity
        assert [finding.verdict for finding in bad.findings] == ["note"], "how much is too much is not for us to say"


def test_an_unapplied_delta_is_a_failure_and_a_babbling_model_none(cli: Callable[..., Any], fixtures: Path) -> None:
    code, out, err = cli("smoke", fixtures / "A-delta-v0/delta-307-apr17", "--prompt", "the meaning of life is", "--json")
    line = json.loads(out.splitlines()[-1])
    assert (code, err, line["delta"], line["exit_code"]) == (4, "", True, 4)
    assert [finding["rule"] for finding in line["findings"] if finding["verdict"] == "failed"] == ["state"]
    code, out, err = cli("smoke", fixtures / "A-delta-v0/expected-307-by-main")
    assert (code, err.split()[:3]) == (0, ["Running", "2", "probes,"])
    assert "nothing to verify (1 note)" in out
    assert re.search(r"perplexity [\d,.]+ a token", out)


def test_both_layouts_write_the_same(world: World) -> None:
    options: Mapping[str, Any] = {"prompt": "the meaning of life is", "new_tokens": 6}
    one = generate(world.good("C"), **options)
    other = generate(world.open(PAIRS["C"]), **options)
    assert (one.tokens, one.text) == (other.tokens, other.text)


def test_what_generating_needs_is_asked_for(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="tokenizer is missing"):
        generate(replace(world.good("C"), files={}), "the meaning of life is")
    picture = world.at / "common/images/wide_90x36.png"
    with pytest.raises(InputError, match="vision tower"):
        generate(world.open(PAIRS["C"]), "hello", image=picture)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="pillow") as caught:
        generate(world.good("C"), "hello", image=picture)
    assert "pip install" in (caught.value.hint or "")


def test_an_image_is_seen_alike_in_both_layouts(world: World, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    for name in ("square_50x50", "wide_90x36", "tiny_18x22"):
        options: Mapping[str, Any] = {"image": world.at / f"common/images/{name}.png", "new_tokens": 4}
        one = generate(world.good("D"), "<image> hello", **options)
        assert one.tokens == generate(world.open(PAIRS["D"]), "<image> hello", tower=world.tower(42), **options).tokens
    assert one.tokens != generate(world.good("D"), "hello", new_tokens=4).tokens
    (tmp_path / "no.png").write_bytes(b"no image")
    for bad in ("no.png", "missing.png"):
        with pytest.raises(InputError):
            generate(world.good("D"), "hello", image=tmp_path / bad)


def test_a_chat_has_the_turns_of_its_family(world: World) -> None:
    """Those of the template of a conversion, which holds those of the original, around the question and its image."""
    pytest.importorskip("PIL")
    image = world.at / "common/images/square_50x50.png"
    opened, asked = world.open(PAIRS["D"]), "Who?"
    prompt = example(CONVERSATIONS["vicuna_v1"], "<image>", asked)
    plain = generate(opened, prompt, image=image, tower=world.tower(42), new_tokens=4)
    for model, tower in ((convert(opened, "llava-hf", tower=world.tower(42)), None), (opened, world.tower(42))):
        for text in (asked, f"<image> {asked}"):
            found = generate(model, text, image=image, tower=tower, new_tokens=4, chat=True)
            assert (found.prompt, found.tokens, found.warnings) == (prompt, plain.tokens, ())
    assert generate(opened, asked, new_tokens=2, chat=True).prompt == prompt.replace("<image>\n", "")
    doubted = generate(configured(world.open(PAIRS["C"]), mm_projector_type=None, conv_mode="llava_v1"), asked, new_tokens=2, chat=True)
    assert "curious human" in doubted.prompt


def test_a_tower_with_other_facts_than_the_named_one_is_a_warning_beside_the_verdict(world: World) -> None:
    """The same tower on both sides gives the same logits, whether or not it is the right one."""
    original = configured(world.open("C-v1.5/original-no-vision-bin"), mm_vision_tower=str(world.at / "common/clip-tiny-28px"))
    smoke = compare_original(original, original, tower=world.tower(42))
    assert smoke.verdict == "same"
    assert [finding.text for finding in smoke.findings if finding.verdict == "warning" and "42 pixels" in finding.text] != []


def test_a_given_tower_that_serves_nobody_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match="holds its own vision tower"):
        compare(world.good("C"), world.recorded("C"), tower=world.tower(42))
