"""Two checkpoints compared: the numbers against torch's, and known differences between what the original programs wrote."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_weights.checkpoint.checkpoint import Checkpoint, Origin, open_checkpoint
from llava_weights.checks import diff as module
from llava_weights.checks.diff import Difference, TensorDifference, diff, document, table
from llava_weights.cli import plot
from llava_weights.cli.plot import check_plot, heat_map, write_plot
from llava_weights.errors import InputError, OutputError, UsageError
from llava_weights.events import Progress, Started
from llava_weights.storage.reading import Workspace
from llava_weights.tensors.lazy import LazyTensor

KINDS = {"F16": (torch.float16, torch.int16), "BF16": (torch.bfloat16, torch.int16), "F32": (torch.float32, torch.int32)}
KINDS |= {"F64": (torch.float64, torch.int64)}
CODES = {kind: code for code, (kind, _) in KINDS.items()}
CODES |= {torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
UP = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Memory(LazyTensor):
    """A tensor whose bytes are at hand. Remembers the largest range that was asked of it."""

    data: bytes
    asked: list[int]

    def rows_into(self, out: memoryview, start: int, stop: int, work: Workspace) -> None:
        self.asked.append(len(out))
        out[:] = self.data[start * self.row_nbytes : stop * self.row_nbytes]


def lazy(tensor: torch.Tensor) -> Memory:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Memory(dtype=CODES[tensor.dtype], shape=tuple(tensor.shape), data=raw, asked=[])


def checkpoint(name: str = "one", **tensors: torch.Tensor) -> Checkpoint:
    """Tensors by name, with `__` for the dots that a keyword can't have."""
    named = {key.replace("__", "."): lazy(tensor) for key, tensor in tensors.items()}
    return Checkpoint(tensors=named, config={}, origin=Origin(name, Path(name), "memory", ()))


def compare(a: torch.Tensor, b: torch.Tensor, **options: Any) -> TensorDifference:
    """The one pair of two checkpoints that hold one tensor each."""
    (found,) = diff(checkpoint(x=a), checkpoint(x=b), **options).tensors
    return found


def of_bits(values: list[int], kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    dtype, integer = KINDS[kind]
    return torch.tensor(values, dtype=torch.int64).to(integer).view(dtype).reshape(shape)


@cache
def ladder(kind: str) -> torch.Tensor:
    """Every finite value of a 16-bit dtype once, in order."""
    values = torch.arange(1 << 16).to(torch.int16).view(KINDS[kind][0]).double()
    return torch.unique(values[torch.isfinite(values)])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, torch.Tensor, torch.Tensor]:
    """A tensor of any bits at all, and a copy with some of them changed."""
    kind = draw(st.sampled_from(["F16", "BF16", "F32"]))
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    count, top = math.prod(shape), 1 << (8 * KINDS[kind][0].itemsize)
    specials = [0, top // 2, 0x7C00, 0x7F80, 0x7E01, 0x7F800000, 0xFF800000 % top, 0x7FC00001 % top]
    value = st.one_of(st.sampled_from([special % top for special in specials]), st.integers(0, top - 1))
    a = draw(st.lists(value, min_size=count, max_size=count))
    changed = draw(st.dictionaries(st.integers(0, max(count - 1, 0)), value, max_size=count))
    b = [changed.get(position, bits) for position, bits in enumerate(a)]
    return kind, of_bits(a, kind, shape), of_bits(b, kind, shape)


@settings(max_examples=60)
@given(pairs(), st.sampled_from([16, 64, 1 << 20]), st.sampled_from([3, 1 << 17]), st.sampled_from([0.0, 1e-3, 2.0]))
def test_numbers_are_those_that_torch_computes(
    pair: tuple[str, torch.Tensor, torch.Tensor], window: int, chunk: int, tolerance: float
) -> None:
    kind, a, b = pair
    with mock.patch.multiple(module, WINDOW_BYTES=window, CHUNK_VALUES=chunk):
        found = compare(a, b, tolerance=tolerance, jobs=1)
    apart = a.reshape(-1).view(KINDS[kind][1]) != b.reshape(-1).view(KINDS[kind][1])
    x, y = a.reshape(-1).double(), b.reshape(-1).double()
    finite = torch.isfinite(x) & torch.isfinite(y)
    distance = (x - y).abs()[finite]
    assert (found.elements, found.different) == (a.numel(), int(apart.sum()))
    assert found.beyond == (int((apart & ~((x - y).abs() <= tolerance)).sum()) if tolerance else found.different)
    assert found.status == ("differs" if found.beyond else "equal")
    assert found.max_abs == max(distance.tolist(), default=0.0)
    assert found.mean_abs == pytest.approx(math.fsum(distance.tolist()) / max(a.numel(), 1), rel=1e-12)
    assert (found.non_finite_a, found.non_finite_b) == (int((apart & ~x.isfinite()).sum()), int((apart & ~y.isfinite()).sum()))
    norm, change = math.hypot(*x[torch.isfinite(x)].tolist()), math.hypot(*distance.tolist())
    if found.different:
        assert found.relative == pytest.approx(change / norm if norm else math.inf if change else 0.0, rel=1e-9)
    if kind != "F32":
        steps = [torch.searchsorted(ladder(kind), side[finite] + 0.0) for side in (x, y)]
        assert found.max_ulps == max((steps[0] - steps[1]).abs().tolist(), default=0)


@settings(max_examples=60)
@given(st.sampled_from([np.float16, np.float32, np.float64]), st.floats(-4, 4, width=16), st.integers(1, 30), st.booleans())
def test_ulps_count_the_steps_of_nextafter(kind: Any, start: float, steps: int, tiny: bool) -> None:
    first = last = kind(0.0 if tiny else start)  # across zero too
    if tiny:
        first = last = -kind(np.nextafter(kind(0), kind(1))) * kind(3)
    for _ in range(steps):
        last = np.nextafter(last, kind(np.inf))
    found = compare(torch.tensor([first]), torch.tensor([last]))
    assert found.max_ulps == steps


def test_the_ends_of_float64_are_two_to_the_64_apart() -> None:
    largest = torch.finfo(torch.float64).max
    assert (
        compare(torch.tensor([-largest], dtype=torch.float64), torch.tensor([largest], dtype=torch.float64)).max_ulps
        == 2 * 0x7FEF_FFFF_FFFF_FFFF
    )


def test_zeros_of_both_signs_are_equal_in_value_only() -> None:
    found = compare(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert (found.status, found.different, found.max_ulps, found.max_abs) == ("differs", 1, 0, 0.0)
    assert found.note == "equal in value, signs of zeros differ"
    assert compare(torch.tensor([0.0]), torch.tensor([-0.0]), tolerance=1e-9).status == "equal"
    assert compare(torch.tensor([0.0]), torch.tensor([-0.0]).half()).status == "equal"


@pytest.mark.parametrize("tolerance", [0.0, 1e30])
def test_a_nan_equals_only_the_same_nan(tolerance: float) -> None:
    quiet, other, signalling = (of_bits([bits, 5], "F16", (2,)) for bits in (0x7E00, 0x7E01, 0x7C01))
    assert compare(quiet, quiet.clone(), tolerance=tolerance).status == "equal"
    for b in (other, signalling, torch.tensor([1.0, 5.0]).half(), torch.tensor([1.0, 5.0])):
        found = compare(quiet, b, tolerance=tolerance)
        assert (found.status, found.non_finite_a) == ("differs", 1)
    for wide in (quiet.float(), quiet.bfloat16(), quiet.double()):  # whatever its bits are there
        assert compare(quiet, wide.where(wide.isnan(), 5.0), tolerance=tolerance).non_finite_a == 0


def test_tolerance_decides_the_verdict_and_nothing_else() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.25, 2.0, 3.5])
    exact, loose, wide = (compare(a, b, tolerance=tolerance) for tolerance in (0.0, 0.25, 0.5))
    assert [(found.status, found.beyond) for found in (exact, loose, wide)] == [("differs", 2), ("differs", 1), ("equal", 0)]
    assert {(found.different, found.max_abs) for found in (exact, loose, wide)} == {(2, 0.5)}
    assert wide.note == "within the tolerance"
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="tolerance"):
            compare(a, b, tolerance=wrong)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_value_equals_itself_in_a_wider_dtype(kind: torch.dtype) -> None:
    width = 8 * kind.itemsize
    narrow = torch.arange(1 << width).to(torch.uint8 if width == 8 else torch.int16).view(kind)
    narrow = narrow[torch.isfinite(narrow.double())]
    found = compare(narrow, narrow.float())
    assert (found.status, found.different, found.max_ulps) == ("equal", 0, None)
    assert found.note == f"equal values, {CODES[kind]} vs F32"
    wide = narrow.float()
    wide[3] = 77.0
    assert compare(narrow, wide).different == 1


def test_integers_have_no_ulps() -> None:
    found = compare(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 7]))
    assert (found.different, found.max_abs, found.max_ulps) == (1, 4.0, None)


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def totals(found: Difference) -> tuple[int, int, float]:
    """Values compared, different, and their largest distance."""
    return (
        sum(tensor.elements for tensor in found.tensors),
        sum(tensor.different for tensor in found.tensors),
        max(tensor.max_abs for tensor in found.tensors),
    )


def test_a_rounded_delta_misses_its_target_as_the_facts_say(fixtures: Path) -> None:
    reference = fixtures / "A-delta-v0"
    found = diff(opened(reference / "target-307/llava-tiny-v0"), opened(reference / "expected-307-by-main"))
    elements, different, largest = totals(found)
    assert (elements, different) == (86_208, 1_695)
    assert f"{largest:.1e}" == "3.1e-05"
    assert (found.ignored_a, found.ignored_b, found.equal) == (2, 0, False)


def test_a_base_through_bfloat16_lost_what_the_facts_say(fixtures: Path) -> None:
    reference = fixtures / "A-delta-v0"
    found = diff(opened(reference / "base-hf-bin"), opened(reference / "base-hf-from-meta13B-by-tf4.37.2-BF16"))
    assert totals(found)[:2] == (84_720, 74_262)
    assert all(tensor.note == "F16 vs BF16" and tensor.relative < 0.004 for tensor in found.tensors)


def test_two_peft_versions_merge_as_differently_as_the_facts_say(fixtures: Path) -> None:
    merged = fixtures / "B-lora" / "merged-of-llava-v1-tiny-lora-imstartend-by-main-peft0.10.0"
    found = diff(opened(merged), opened(merged.with_name("merged-of-llava-v1-tiny-lora-imstartend-by-v1.0.2")))
    modules = [tensor for tensor in found.tensors if re.search(r"model\.layers.*_proj", tensor.name)]
    assert sum(tensor.elements for tensor in modules) == 55_296
    assert sum(tensor.different for tensor in modules) == 8_240
    assert f"{max(tensor.max_abs for tensor in modules):.1e}" == "4.9e-04"


def test_metas_pieces_are_the_converted_base(fixtures: Path) -> None:
    found = diff(opened(fixtures / "A-delta-v0/base-meta"), opened(fixtures / "A-delta-v0/base-hf-bin"))
    assert found.equal
    assert found.counts["equal"] == 21


def test_original_against_llava_hf(fixtures: Path) -> None:
    a, b = opened(fixtures / "C-v1.5/original-no-vision-bin"), opened(fixtures / "C-v1.5/hf-by-tf4.47.1")
    found = diff(a, b)
    assert found.counts == {"shape": 2, "differs": 0, "only A": 0, "only B": 39, "equal": 23}
    tables = {tensor.name: tensor for tensor in found.tensors if tensor.status == "shape"}
    assert tables.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {tensor.note for tensor in tables.values()} == {"304 common rows equal, 16 more in B"}
    assert all(tensor.elements == 304 * 48 for tensor in tables.values())
    assert all("vision_tower" in tensor.other for tensor in found.tensors if tensor.status == "only B")
    back = diff(b, a)
    assert (back.counts["only A"], back.counts["only B"]) == (39, 0)
    assert "304 common rows equal, 16 more in A" in {tensor.note for tensor in back.tensors}
    assert {tensor.elements for tensor in diff(a, b, rows=False).tensors if tensor.status == "shape"} == {0}


STYLES = {
    "saved by transformers 5": (
        (r"language_model\.model\.", "model.language_model."),
        (r"language_model\.lm_head", "lm_head"),
        (r"(vision_tower|multi_modal_projector)\.", r"model.\1."),
    ),
    "original": (
        (r"language_model\.(model|lm_head)\.", r"\1."),
        (r"vision_tower\.", "model.vision_tower.vision_tower."),
        (r"multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"multi_modal_projector\.linear_2", "model.mm_projector.2"),
    ),
}


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_is_the_same_model(fixtures: Path, style: str) -> None:
    a = opened(fixtures / "C-v1.5/hf-by-tf4.47.1")
    renamed = {}
    for name, tensor in reversed(a.tensors.items()):
        pattern, target = next(rule for rule in STYLES[style] if re.match(rule[0], name))
        renamed[re.sub(f"^{pattern}", target, name)] = tensor
    found = diff(a, Checkpoint(tensors=renamed, config={}, origin=a.origin))
    assert found.equal
    assert [tensor.name for tensor in found.tensors] == list(a.tensors)


def test_two_names_for_one_thing_are_no_pair() -> None:
    one = torch.ones(2)
    found = diff(
        checkpoint(lm_head__weight=one), checkpoint(language_model__lm_head__weight=one, model__language_model__lm_head__weight=one)
    )
    assert found.counts == {"shape": 0, "differs": 0, "only A": 1, "only B": 2, "equal": 0}


def test_shapes_that_do_not_fit_are_not_compared() -> None:
    grown = diff(checkpoint(model__norm__weight=torch.ones(3)), checkpoint(model__norm__weight=torch.ones(4))).tensors[0]
    turned = diff(checkpoint(lm_head__weight=torch.ones(3, 4)), checkpoint(lm_head__weight=torch.ones(4, 3))).tensors[0]
    assert [(tensor.status, tensor.elements) for tensor in (grown, turned)] == [("shape", 0), ("shape", 0)]
    wrong = diff(checkpoint(lm_head__weight=torch.zeros(3, 4)), checkpoint(lm_head__weight=torch.ones(5, 4))).tensors[0]
    assert (wrong.status, wrong.different, wrong.note) == ("differs", 12, "3 common rows differ, 2 more in B")


def test_jobs_change_no_number_and_windows_stay_small() -> None:
    torch.manual_seed(5)
    a = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(33, 17).half() for i in range(9)}
    b = {name: (tensor.float() * (1 + 1e-3 * (i % 3))).half() for i, (name, tensor) in enumerate(a.items())}
    with mock.patch.multiple(module, WINDOW_BYTES=170, CHUNK_VALUES=50):
        results = [diff(checkpoint(**a), checkpoint(**b), jobs=jobs) for jobs in (1, 3)]
        last = checkpoint(**a)
        diff(last, checkpoint(**b))
    assert results[0] == results[1]
    assert [tensor.name for tensor in results[0].tensors] == list(a)
    assert max(size for tensor in last.tensors.values() if isinstance(tensor, Memory) for size in tensor.asked) <= 170 + 2 * 17
    whole = diff(checkpoint(**a), checkpoint(**b))
    assert [(t.different, t.max_abs, t.max_ulps) for t in whole.tensors] == [
        (t.different, t.max_abs, t.max_ulps) for t in results[0].tensors
    ]


def test_relative_change_counts_the_rows_that_did_not_change() -> None:
    a = torch.full((64, 4), 3.0)
    b = a.clone()
    b[40, 2] = 7.0
    with mock.patch.multiple(module, WINDOW_BYTES=64, CHUNK_VALUES=7):
        found = compare(a, b)
    assert found.relative == pytest.approx(4.0 / (3.0 * 16), rel=1e-12)


def test_events_end_with_every_byte_read() -> None:
    events: list[Any] = []
    diff(checkpoint(x=torch.ones(4), y=torch.ones(2)), checkpoint(x=torch.ones(4).half(), z=torch.ones(3)), on_event=events.append)
    assert events[0] == Started(shards=3, nbytes=24, what="Comparing")
    assert events[-1] == Progress(24, "z")


def test_damage_is_not_a_difference(fixtures: Path, tmp_path: Path) -> None:
    source = fixtures / "A-delta-v0/target-307/llava-tiny-v0"
    shutil.copytree(source, tmp_path / "damaged")
    path = tmp_path / "damaged/pytorch_model-00001-of-00002.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # inside a tensor's record, whose CRC-32 tells
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged|CRC"):
        diff(opened(source), opened(tmp_path / "damaged"))


def test_torch_is_not_imported(fixtures: Path) -> None:
    code = (
        "import sys; from llava_weights.checkpoint.checkpoint import open_checkpoint as o; from llava_weights.checks.diff import diff\n"
        "assert not diff(o(sys.argv[1]), o(sys.argv[2])).equal; assert 'torch' not in sys.modules"
    )
    paths = [str(fixtures / "A-delta-v0" / name) for name in ("base-meta", "base-hf-from-meta13B-by-tf4.37.2-BF16")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, cwd=fixtures.parent)


@pytest.fixture
def tuned() -> Difference:
    """Three layers changed more and more, a padded vocabulary, a projector that only B has."""
    a = {f"model__layers__{i}__mlp__up_proj__weight": torch.ones(8, 4) for i in range(12)}
    b = {name: tensor + (0.1**i if i < 3 else 0.0) for i, (name, tensor) in enumerate(a.items())}
    added = {"model__mm_projector__0__weight": torch.ones(2, 2)}
    table = {"lm_head__weight": torch.ones(3, 4)}
    return diff(checkpoint("base", **a, **table), checkpoint("tuned <b>", **b, lm_head__weight=torch.ones(5, 4), **added))


def test_table_folds_and_puts_the_worst_first(tuned: Difference) -> None:
    lines = table(tuned)
    assert [line.split()[0] for line in lines] == ["shape", "differs", "only", "equal"]
    assert "3 common rows equal, 2 more in B" in lines[0]
    assert "model.layers.{0..2}.mlp.up_proj.weight (3)" in lines[1]
    assert "96 of 96 values (100.00%)" in lines[1]
    assert "relative 1" in lines[1]
    assert "9 of 14 tensors" in lines[-1]
    short = table(tuned, limit=1)
    assert [line.split()[0] for line in short] == ["shape", "and", "equal"]
    assert "2 more" in short[1]


def test_document_is_json(tuned: Difference) -> None:
    from_nothing = diff(checkpoint(x=torch.zeros(2)), checkpoint(x=torch.ones(2)))
    assert from_nothing.tensors[0].relative == math.inf
    assert json.loads(json.dumps(document(from_nothing), allow_nan=False))["tensors"][0]["relative"] is None
    found = json.loads(json.dumps(document(tuned), allow_nan=False))
    assert (found["a"], found["b"], found["equal"]) == ("base", "tuned <b>", False)
    assert found["counts"] == {"shape": 1, "differs": 3, "only A": 0, "only B": 1, "equal": 9}
    assert len(found["tensors"]) == 14


def shades(svg: bytes) -> dict[str, str]:
    """The colour of each cell by the name that its tip begins with."""
    space = {"svg": "http://www.w3.org/2000/svg"}
    boxes = ElementTree.fromstring(svg).findall("svg:rect", space)
    tips = {box: box.findtext("svg:title", namespaces=space) for box in boxes}
    return {tip.split(":")[0]: str(box.get("fill")) for box, tip in tips.items() if tip}


def test_svg_shows_every_layer(tuned: Difference, tmp_path: Path) -> None:
    for name in ("one.svg", "two.SVG"):
        write_plot(tuned, tmp_path / name)
    svg = (tmp_path / "one.svg").read_bytes()
    assert svg == (tmp_path / "two.SVG").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.SVG"]
    words = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert [word for word in words if word and word.isdecimal()] == [str(number) for number in range(12)]
    assert {"layer", "mlp.up_proj", "lm_head.weight", "A base, B tuned <b>"} <= set(words)
    colours = shades(svg)
    assert colours.keys() == {tensor.name or tensor.other for tensor in tuned.tensors}
    light = [sum(bytes.fromhex(colours[f"model.layers.{number}.mlp.up_proj.weight"][1:])) for number in range(4)]
    assert light == sorted(light)
    assert len(set(light)) == 4


def test_svg_of_real_checkpoints_has_all_of_their_tensors(fixtures: Path, tmp_path: Path) -> None:
    found = diff(opened(fixtures / "C-v1.5/original-no-vision-bin"), opened(fixtures / "C-v1.5/hf-by-tf4.47.1"))
    panels = heat_map(found)
    in_b = "vision_tower.vision_model.encoder.layers"  # A has no tower
    assert [(panel.title, panel.rows) for panel in panels[:2]] == [("model.layers", ("0", "1")), (in_b, ("0", "1"))]
    assert len(panels[0].columns) == 9
    write_plot(found, tmp_path / "diff.svg")
    assert shades((tmp_path / "diff.svg").read_bytes()).keys() == {tensor.name or tensor.other for tensor in found.tensors}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    name = "</text><script>\u202e\x1b" + "x" * 500
    found = diff(checkpoint(**{name: torch.ones(2)}), checkpoint(**{name: torch.full((2,), math.nan)}))
    write_plot(found, tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert not any(text in svg for text in ("<script", "\x1b", "\u202e"))
    assert len(svg) < 5000
    assert list(shades(svg.encode()).values()) == [plot.UNMEASURED]


@pytest.mark.parametrize(
    "found", [Difference((), "a", "b"), Difference((TensorDifference("", "x", "x", "", "F16", (), (2,), "only B"),), "a", "b")]
)
def test_little_makes_a_picture_too(found: Difference, tmp_path: Path) -> None:
    write_plot(found, tmp_path / "a.svg")
    ElementTree.parse(tmp_path / "a.svg")


def test_a_plot_that_can_not_be_is_refused_at_once(tuned: Difference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        check_plot(tmp_path / "a.pdf")
    (tmp_path / "a.svg").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_plot(tuned, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == "mine"
    with pytest.raises(OutputError, match="can't write"):
        write_plot(tuned, tmp_path / "nowhere" / "a.svg")
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as refused:
        check_plot(tmp_path / "a.png")
    assert "pip install 'llava-weights[plot]'" in str(refused.value.hint)


def test_png_is_the_same_picture(tuned: Difference, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    for name in ("one.png", "two.png"):
        write_plot(tuned, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    write_plot(tuned, tmp_path / "one.svg")
    colours = {bytes.fromhex(colour[1:]) for colour in shades((tmp_path / "one.svg").read_bytes()).values()}
    pixels = (image.imread(tmp_path / "one.png")[..., :3] * 255).round().astype(np.uint8)
    assert colours <= {pixel.tobytes() for pixel in np.unique(pixels.reshape(-1, 3), axis=0)}
