"""convert-lora: what is merged from the converted adapter into the converted base is the conversion of what is merged; PEFT loads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import llava_weights as lw
from llava_weights.cli import toy
from llava_weights.families.layouts import canonical
from llava_weights.families.originals import ORIGINALS
from llava_weights.storage.reading import Workspace

PEFT = "base_model.model."
WIDE = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "out_proj")
FAMILIES = {  # a toy of every class of transformers, every decoder with names of its own, and a projector of one Linear
    "llava": ("LLaVA v1.5 and v1.6", "llama", "clip"),
    "linear": ("LLaVA v0", "llama", "clip"),
    "llava_next": ("LLaVA on Mistral, images in tiles", "mistral", "clip"),
    "llava_next_video": ("LLaVA on Qwen, videos", "qwen2", "clip"),
    "llava_onevision": ("LLaVA-OneVision", "qwen2", "siglip"),
    "vipllava": ("ViP-LLaVA", "llama", "clip"),
    "phi3": ("LLaVA++ on Phi-3", "phi3", "clip"),
}
Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def raw(checkpoint: lw.Checkpoint) -> Raw:
    """Every tensor as its dtype, shape and bytes."""
    found: Raw = {}
    with closing(Workspace()) as work:
        for name, tensor in checkpoint.tensors.items():
            data = bytearray(tensor.nbytes)
            tensor.rows_into(memoryview(data), 0, tensor.rows, work)
            found[name] = (tensor.dtype, tensor.shape, bytes(data))
    return found


def different(one: Raw, other: Raw) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def write(checkpoint: lw.Checkpoint, folder: Path) -> Path:
    lw.execute(lw.make_plan(checkpoint), folder)
    return folder


class Model:
    """A small LLaVA in both layouts. `opened` is the original."""

    def __init__(self, original: Path, hub: Path, tower: Path | None = None) -> None:
        self.original, self.hub, self.tower = original, hub, tower

    @property
    def opened(self) -> lw.Checkpoint:
        return lw.open_checkpoint(self.original)

    def square(self, adapter: Path, made: Path) -> list[str]:
        """The tensors in which the two ways around the square differ."""
        merged = lw.convert(lw.merge_lora(self.original, adapter), "llava-hf", tower=self.tower, accept_tower=self.tower is not None)
        return different(raw(merged), raw(lw.merge_lora(self.hub, made)))


def adapter(folder: Path, tensors: Mapping[str, torch.Tensor], **settings: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({PEFT + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


class Random:
    """Values that are the same in every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(13)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.05

    def low_rank(self, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]], rank: int = 4) -> dict[str, torch.Tensor]:
        """Factors for these modules."""
        found = {}
        for name in names:
            rows, columns = shapes[f"{name}.weight"]
            found |= {f"{name}.lora_A.weight": self(rank, columns), f"{name}.lora_B.weight": self(rows, rank)}
        return found


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in model.opened.tensors.items()}


def modules_of(shapes: Mapping[str, Any], *parts: str) -> list[str]:
    """The adapted modules of these parts of a model: "text", "tower", "projector"."""
    stems = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    return [
        stem
        for stem in stems
        if any(canonical(f"{stem}.weight").startswith(f"{part}.") for part in parts)
        if stem.rpartition(".")[2] in WIDE or "mm_projector" in stem
    ]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def make(name: str) -> Model:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            family, decoder, tower = FAMILIES[name]
            toy.make_llava(folder, next(row for row in ORIGINALS if row.name == family), decoder=decoder, tower=tower)
            made[name] = Model(folder / "llava", write(lw.convert(folder / "llava", "llava-hf"), folder / "hf"))
        return made[name]

    return make


def everything(random: Random, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Updates of decoder and tower; projector, norms and both tables trained whole."""
    found = random.low_rank(modules_of(shapes, "text", "tower"), shapes)
    whole = ("mm_projector.", "input_layernorm.weight", "embed_tokens.weight", "lm_head.weight")
    return found | {name: random(*shape) for name, shape in shapes.items() if any(part in name for part in whole)}


def tables(random: Random, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Updates of both tables and of the projector, as PEFT saves them: with the base's own tables."""
    rows, width = shapes["model.embed_tokens.weight"]
    found = random.low_rank(["lm_head", *modules_of(shapes, "projector")], shapes)
    found |= {"model.embed_tokens.lora_embedding_A": random(4, rows), "model.embed_tokens.lora_embedding_B": random(width, 4)}
    return found | {f"{name}.base_layer.weight": random(rows, width) for name in ("model.embed_tokens", "lm_head")}


def rows(random: Random, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Updates with magnitudes, and three trained rows."""
    found = random.low_rank(modules_of(shapes, "text"), shapes)
    found |= {f"{name}.lora_magnitude_vector": random(shapes[f"{name}.weight"][0]).abs() + 0.5 for name in modules_of(shapes, "text")}
    return found | {"model.embed_tokens.token_adapter.trainable_tokens_delta": random(3, shapes["model.embed_tokens.weight"][1])}


KINDS: dict[str, tuple[Callable[..., dict[str, torch.Tensor]], dict[str, Any]]] = {
    "everything": (everything, {"modules_to_save": ["mm_projector", "embed_tokens", "lm_head", "input_layernorm"]}),
    "tables": (tables, {}),
    "rows": (rows, {"use_dora": True, "trainable_token_indices": {"embed_tokens": [9, 3, 250]}}),
}


# --- the square -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_square_on_a_toy_of_every_class(toys: Callable[[str], Model], tmp_path: Path, family: str, kind: str) -> None:
    model, (make, settings) = toys(family), KINDS[kind]
    source = adapter(tmp_path / "adapter", make(Random(), shapes_of(model)), **settings)
    made = write(lw.convert_lora(source, "llava-hf", base=model.hub), tmp_path / "made")
    assert model.square(source, made) == []
    back = lw.convert_lora(made, "llava", base=model.original)
    assert different(raw(back), raw(lw.open_checkpoint(source))) == []
    assert raw(lw.convert_lora(source, "llava-hf", base=model.original)) == raw(lw.open_checkpoint(made)), "the base in either layout"
    assert json.loads(back.files["adapter_config.json"])["trainable_token_indices"] == settings.get("trainable_token_indices")


@pytest.mark.parametrize("style", ["language_model.model.", "model.language_model."])
def test_every_key_style_of_llava_hf_is_the_same_adapter(toys: Callable[[str], Model], tmp_path: Path, style: str) -> None:
    """As transformers before and after 4.52, and after 5.6, have the names in memory."""
    model = toys("llava")
    shapes = shapes_of(model)
    tensors = Random().low_rank(modules_of(shapes, "text", "tower"), shapes)
    source = adapter(tmp_path / "adapter", tensors)
    for number, tower in enumerate(("vision_tower.vision_model.", "vision_tower.")):
        before = "model." * style.startswith("model.")
        spelled = {
            name.replace("model.vision_tower.vision_tower.vision_model.", before + tower).replace("model.layers", f"{style}layers"): tensor
            for name, tensor in tensors.items()
        }
        assert spelled.keys() & tensors.keys() == set()
        other = adapter(tmp_path / str(number), spelled)
        assert raw(lw.convert_lora(other, "llava-hf")) == raw(lw.convert_lora(source, "llava-hf"))
        assert raw(lw.convert_lora(other, "llava")) == raw(lw.open_checkpoint(source))


@pytest.fixture(scope="module")
def small(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """A LLaVA around a base of the reference set F, with a tokenizer of its 80 rows."""
    made: dict[str, Model] = {}
    tower = fixtures / "common/clip-tiny-28px"

    def make(name: str) -> Model:
        if name in made:
            return made[name]
        folder, random = tmp_path_factory.mktemp(name), Random()
        (folder / "bare").mkdir()
        tensors = load_file(fixtures / "F-peft" / name / "model.safetensors")
        dtype = tensors["lm_head.weight"].dtype
        shapes = {"0.weight": (24, 24), "0.bias": (24,), "2.weight": (24, 24), "2.bias": (24,)}
        tensors |= {f"model.mm_projector.{end}": random(*shape).to(dtype) for end, shape in shapes.items()}
        save_file(tensors, folder / "bare/model.safetensors", metadata={"format": "pt"})
        config = json.loads((fixtures / "F-peft" / name / "config.json").read_text()) | {
            "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_hidden_size": 24,
            "mm_projector_type": "mlp2x_gelu", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2, "mm_vision_tower": "common/clip-tiny-28px",
        }  # fmt: skip
        (folder / "bare/config.json").write_text(json.dumps(config))
        (folder / "bare/tokenizer.model").write_bytes(tokenizer(80))
        hub = write(lw.convert(folder / "bare", "llava-hf", tower=tower), folder / "hf")
        made[name] = Model(folder / "bare", hub, tower)
        return made[name]

    return make


def tokenizer(count: int) -> bytes:
    """A SentencePiece model of single characters."""
    special = [("<unk>", toy.UNKNOWN), ("<s>", toy.CONTROL), ("</s>", toy.CONTROL)]
    ordinary = [(letter, toy.NORMAL) for letter in ["\u2581", *map(chr, range(33, 127))][: count - len(special)]]
    pieces = [toy._field(1, text.encode()) + toy._field(2, 0.0) + toy._field(3, kind) for text, kind in (*special, *ordinary)]
    trainer = b"".join(toy._field(key, value) for key, value in {3: 2, 4: count, 40: 0, 41: 1, 42: 2, 43: -1}.items())
    return b"".join(toy._field(1, piece) for piece in pieces) + toy._field(2, trainer) + toy._field(3, toy._field(1, b"identity"))


CASES = ("plain", "rslora", "dora", "patterns", "modules-to-save", "embedding-lora")


@pytest.mark.parametrize("base", ["base-fp32", "base-fp16"])
@pytest.mark.parametrize("case", CASES)
def test_the_square_on_what_peft_wrote(fixtures: Path, small: Callable[[str], Model], tmp_path: Path, case: str, base: str) -> None:
    model, source = small(base), fixtures / "F-peft" / case / "adapter"
    made = write(lw.convert_lora(source, "llava-hf", base=model.hub), tmp_path / "made")
    assert model.square(source, made) == []
    back = lw.convert_lora(made, "llava", base=model.hub)
    assert different(raw(back), raw(lw.open_checkpoint(source))) == []
    before, after = settings_of(source), json.loads(back.files["adapter_config.json"])
    free = {"base_model_name_or_path", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern"}
    assert {key: value for key, value in after.items() if key not in free} == {key: before[key] for key in before if key not in free}
    assert {module.name: (module.rank, module.scale) for module in lw.open_adapter(source).modules} == {
        module.name: (module.rank, module.scale) for module in lw.open_adapter(write(back, tmp_path / "back")).modules
    }


LLAVAS = {
    "llava-v1.5-tiny-lora": "merged-of-llava-v1.5-tiny-lora-by-main-peft0.10.0",
    "llava-v1-tiny-lora-imstartend": "merged-of-llava-v1-tiny-lora-imstartend-by-v1.0.2",
}


@pytest.mark.parametrize("form", ["identity", "relu", "gelu"])
@pytest.mark.parametrize("name", LLAVAS)
def test_the_square_on_llavas_own(fixtures: Path, tmp_path: Path, name: str, form: str) -> None:
    """The projector, and where tokens were added the tables, come from `non_lora_trainables.bin`."""
    linear = "imstartend" in name
    if form != "identity" and not linear:
        pytest.skip("two layers have no form")
    source, base, tower = fixtures / "B-lora" / name, tmp_path / "base", fixtures / "common/clip-tiny-28px"
    shutil.copytree(fixtures / "B-lora" / LLAVAS[name], base)
    options = {"tower": tower, **({"projector_form": form} if linear else {})}
    for path in base.glob("*.safetensors"):  # another projector than the adapter's
        save_file({key: value + ("mm_projector" in key) for key, value in load_file(path).items()}, path, metadata={"format": "pt"})
    for path in base.glob("*.bin"):
        torch.save({key: value + ("mm_projector" in key) for key, value in torch.load(path).items()}, path)
    hub = write(lw.convert(base, "llava-hf", **options), tmp_path / "hf")
    made = write(lw.convert_lora(source, "llava-hf", base=hub), tmp_path / "made")
    merged = lw.convert(lw.merge_lora(base, source), "llava-hf", **options)
    assert different(raw(merged), raw(lw.merge_lora(hub, made))) == []
    back = raw(lw.convert_lora(made, "llava", base=hub))
    for trained in lw.open_adapter(source).replacements:
        assert (PEFT + trained in back) == ("mm_projector" in trained), "tables are those of the base, which was merged"
    stored = {key: value.shape for key, value in torch.load(source / "non_lora_trainables.bin").items() if "mm_projector" in key}
    assert {key: tuple(shape) for key, shape in stored.items()} == {key: back[key][1] for key in stored}


def test_what_the_base_holds_already_is_left_out(fixtures: Path, tmp_path: Path) -> None:
    """So vLLM can serve a LoRA of LLaVA's, on a base that has its projector."""
    source, base = fixtures / "B-lora/llava-v1.5-tiny-lora", fixtures / "B-lora" / LLAVAS["llava-v1.5-tiny-lora"]
    made = lw.convert_lora(source, "llava-hf", base=base)
    assert all(".lora_" in name for name in made.tensors)
    assert json.loads(made.files["adapter_config.json"])["modules_to_save"] is None
    assert any("left out, the base holds the same values" in note for note in made.history[0].notes)
    assert not any("vLLM refuses" in note for note in made.history[0].notes)
    without = lw.convert_lora(source, "llava-hf")
    assert raw(lw.convert_lora(source, "llava-hf", base=fixtures / "B-lora/base-vicuna-tiny")) == raw(without), "before LLaVA's training"
    assert len(without.tensors) == len(made.tensors) + 4
    assert any("vLLM refuses" in note for note in without.history[0].notes)


# --- adapter_config.json ----------------------------------------------------------------------------------------------


def test_targets_match_what_they_should_and_nothing_else(toys: Callable[[str], Model], tmp_path: Path) -> None:
    """Under names of which `q_proj` is the tower's too; whatever the settings said before."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    model = toys("llava")
    shapes = shapes_of(model)
    wanted = [name for name in modules_of(shapes, "text") if ".1." in name and "_proj" in name]
    built = transformers.AutoModelForImageTextToText.from_pretrained(model.hub)
    for number, said in enumerate((
        {"target_modules": ["q_proj", "k_proj"]}, {"target_modules": r".*layers\.1\..*_proj"}, {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": ["model.layers.0"]},
    )):  # fmt: skip
        source = adapter(tmp_path / f"{number}", Random().low_rank(wanted, shapes), **said)
        config = LoraConfig(**json.loads(lw.convert_lora(source, "llava-hf").files["adapter_config.json"]))
        found = [name for name, _ in built.named_modules() if check_target_module_exists(config, name) is True]
        assert sorted(found) == sorted(name.replace("model.layers", "model.language_model.layers") for name in wanted)


def test_every_key_of_pefts_own_file_is_there(fixtures: Path) -> None:
    from peft import LoraConfig

    config = json.loads(lw.convert_lora(fixtures / "F-peft/plain/adapter", "llava-hf").files["adapter_config.json"])
    saved = settings_of(fixtures / "F-peft/plain/adapter")
    assert list(config) == sorted(saved)
    assert config.keys() >= {key for key in LoraConfig().to_dict() if key != "runtime_config"} - {"peft_version"}


def test_ranks_and_alphas_follow_their_modules(fixtures: Path) -> None:
    source = fixtures / "F-peft/patterns/adapter"
    config = json.loads(lw.convert_lora(source, "llava-hf").files["adapter_config.json"])
    assert config["rank_pattern"] == {
        "v_proj": 3,
        r"model\.language_model\.layers\.0\.mlp\.up_proj": 2,
        r"model\.language_model\.layers\.1\.self_attn\.o_proj": 5,
    }
    assert config["alpha_pattern"] == {"q_proj": 20, r"model\.language_model\.layers\.1\.mlp\.down_proj": 7}
    notes = lw.convert_lora(source, "llava-hf").history[0].notes
    assert [note.partition(":")[0] for note in notes if "count more or less" in note] == ["vLLM", "SGLang"]
    assert not any(
        "count more or less" in note for note in lw.convert_lora(fixtures / "F-peft/rslora/adapter", "llava-hf").history[0].notes
    )


def test_one_scale_by_patterns_is_served_right(tmp_path: Path) -> None:
    """As PEFT saves an adapter whose ranks were found while it trained: alpha grows with the rank."""
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
    tensors = Random().low_rank([q], {f"{q}.weight": (8, 8)}) | Random().low_rank([v], {f"{v}.weight": (8, 8)}, rank=2)
    source = adapter(tmp_path / "adapter", tensors, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 3})
    made = lw.convert_lora(source, "llava-hf")
    assert json.loads(made.files["adapter_config.json"])["alpha_pattern"] == {"v_proj": 3}
    assert not any("count more or less" in note for note in made.history[0].notes)


def test_patterns_go_by_the_new_names(toys: Callable[[str], Model], tmp_path: Path) -> None:
    """`linear_1` becomes the whole projector, whose name ends otherwise; a tower's module is named by the end that every version has."""
    model = toys("linear")
    hub = {name: tensor.shape for name, tensor in lw.open_checkpoint(model.hub).tensors.items()}
    one, q = "multi_modal_projector.linear_1", "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj"
    tensors = Random().low_rank([one, q], hub, rank=2) | Random().low_rank([q.replace("layers.1", "layers.0")], hub)
    source = adapter(tmp_path / "adapter", tensors, rank_pattern={"linear_1": 2, r"layers\.1\.self_attn\.q_proj": 2})
    for to, names in (
        ("llava", {"mm_projector", r"model\.vision_tower\.vision_tower\.vision_model\.encoder\.layers\.1\.self_attn\.q_proj"}),
        ("llava-hf", {"linear_1", r"encoder\.layers\.1\.self_attn\.q_proj"}),
    ):
        made = write(lw.convert_lora(source, to, base=model.hub), tmp_path / to)
        assert set(settings_of(made)["rank_pattern"]) == names
        assert [module.rank for module in lw.open_adapter(made).modules] == [module.rank for module in lw.open_adapter(source).modules]
    relu = write(lw.convert(model.original, "llava-hf", projector_form="relu"), tmp_path / "relu")
    assert "no counterpart" in refused(tmp_path / "llava", "llava-hf", lw.MismatchError, base=relu)


# --- PEFT loads it ----------------------------------------------------------------------------------------------------


def loaded(hub: Path, made: Path) -> Any:
    """The converted base with the adapter on it; every tensor of the adapter has a place, and every place of it a tensor."""
    import peft
    from peft.utils.save_and_load import load_peft_weights

    base = transformers.AutoModelForImageTextToText.from_pretrained(hub, dtype="auto")
    model = peft.PeftModel.from_pretrained(base, made)
    told = peft.set_peft_model_state_dict(model, load_peft_weights(str(made)))
    assert told.unexpected_keys == []
    assert [key for key in told.missing_keys if ".lora_" in key or ".modules_to_save." in key or "trainable_tokens_delta" in key] == []
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("family", "kind"), [("llava", "everything"), ("linear", "tables"), ("llava_onevision", "rows")])
def test_peft_loads_and_merges_it(toys: Callable[[str], Model], tmp_path: Path, family: str, kind: str) -> None:
    model, (make, settings) = toys(family), KINDS[kind]
    source = adapter(tmp_path / "adapter", make(Random(), shapes_of(model)), **settings)
    made = write(lw.convert_lora(source, "llava-hf", base=model.hub), tmp_path / "made")
    merged = loaded(model.hub, made).merge_and_unload().state_dict()
    theirs = {canonical(name): tensor for name, tensor in merged.items()}
    ours = {
        canonical(name): tensor
        for name, tensor in load_file(write(lw.merge_lora(model.hub, made), tmp_path / "m") / "model.safetensors").items()
    }
    assert theirs.keys() == ours.keys() | ({"head.weight"} & theirs.keys())
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(source: Path, to: str, error: type[lw.LlavaWeightsError], **options: Any) -> str:
    with pytest.raises(error) as caught:
        lw.convert_lora(source, to, **options)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return str(caught.value)


def test_what_only_a_base_tells_is_refused_without_one(fixtures: Path, toys: Callable[[str], Model], tmp_path: Path) -> None:
    linear = fixtures / "B-lora/llava-v1-tiny-lora-imstartend"
    assert "model.embed_tokens.weight" in (text := refused(linear, "llava-hf", lw.InputError))
    assert "--base" in text
    model = toys("linear")
    shapes = shapes_of(model)
    source = adapter(tmp_path / "one", Random().low_rank(modules_of(shapes, "projector"), shapes))
    assert "--base" in refused(source, "llava-hf", lw.InputError)
    two = adapter(
        tmp_path / "two", Random().low_rank(["multi_modal_projector.linear_1"], {"multi_modal_projector.linear_1.weight": (8, 8)})
    )
    assert "--base" in refused(two, "llava", lw.InputError)
    assert len(lw.convert_lora(two, "llava-hf").tensors) == 2
    vicuna = fixtures / "B-lora/base-vicuna-tiny"
    assert "with its projector" in refused(two, "llava", lw.InputError, base=vicuna)
    newline = adapter(tmp_path / "newline", Random().low_rank(modules_of(shapes, "text"), shapes) | {"model.image_newline": torch.ones(64)})
    assert "--base" in refused(newline, "llava-hf", lw.InputError)
    assert "image_newline" in refused(newline, "llava-hf", lw.InputError, base=model.hub)


def test_a_newline_is_carried_where_there_is_one(toys: Callable[[str], Model], tmp_path: Path) -> None:
    model = toys("llava_next")
    shapes = shapes_of(model)
    tensors = Random().low_rank(modules_of(shapes, "text"), shapes) | {"model.image_newline": torch.ones(*shapes["model.image_newline"])}
    source = adapter(tmp_path / "adapter", tensors)
    made = write(lw.convert_lora(source, "llava-hf", base=model.hub), tmp_path / "made")
    assert model.square(source, made) == []


def test_what_has_no_place_is_refused_by_name(fixtures: Path, toys: Callable[[str], Model], tmp_path: Path) -> None:
    model = toys("llava")
    random, q = Random(), "model.layers.0.self_attn.q_proj"
    torch.save({"model.mm_projector.0.weight": random(8, 8)}, tmp_path / "mm_projector.bin")
    assert "no low-rank update" in refused(tmp_path / "mm_projector.bin", "llava-hf", lw.InputError)
    odd = adapter(tmp_path / "odd", random.low_rank(["transformer.h.0.attn.c_attn"], {"transformer.h.0.attn.c_attn.weight": (8, 8)}))
    assert "transformer.h.0.attn.c_attn" in refused(odd, "llava-hf", lw.InputError)
    deep = adapter(tmp_path / "deep", random.low_rank([q.replace("0", "77")], {f"{q.replace('0', '77')}.weight": (8, 8)}))
    assert "layers.77" in refused(deep, "llava-hf", lw.InputError, base=model.hub)
    small = adapter(tmp_path / "small", random.low_rank([q], {f"{q}.weight": (8, 8)}))
    assert q in refused(small, "llava-hf", lw.MismatchError, base=model.hub)
    experts = adapter(
        tmp_path / "experts",
        random.low_rank(["model.layers.0.mlp.experts"], {"model.layers.0.mlp.experts.weight": (8, 8)}),
        target_modules=None,
        target_parameters=["mlp.experts.gate_up_proj"],
    )
    assert "target_parameters" in refused(experts, "llava-hf", lw.InputError)
    assert "LoHa" in refused(fixtures / "F-peft/not-lora-loha/adapter", "llava-hf", lw.InputError)
    clip = fixtures / "common/clip-tiny-28px"
    assert "clip" in refused(fixtures / "F-peft/plain/adapter", "llava-hf", lw.InputError, base=clip)
    with pytest.raises(lw.UsageError):
        lw.convert_lora(small, "gguf")


def test_rows_without_their_tokens_are_refused(toys: Callable[[str], Model], tmp_path: Path) -> None:
    model = toys("llava")
    shapes, random = shapes_of(model), Random()
    count, width = shapes["lm_head.weight"]
    text = random.low_rank(modules_of(shapes, "text"), shapes)
    more = adapter(tmp_path / "more", text | {"lm_head.weight": random(count + 3, width)}, modules_to_save=["lm_head"])
    assert f"{count + 3:,} rows" in refused(more, "llava-hf", lw.MismatchError, base=model.hub)
    clash = adapter(tmp_path / "clash", text | {"lm_head.weight": random(count, width)}, modules_to_save=["lm_head"])
    (clash / "added_tokens.json").write_text(json.dumps({"<another>": 7}))
    assert "<another>" in refused(clash, "llava-hf", lw.MismatchError, base=model.hub)
    dora = random.low_rank(["lm_head"], shapes) | {"lm_head.lora_magnitude_vector": random(count)}
    assert "DoRA" in refused(adapter(tmp_path / "dora", dora, use_dora=True), "llava-hf", lw.MismatchError, base=model.hub)
    hub = {name.replace("model.layers", "model.language_model.layers"): tensor for name, tensor in text.items()}
    token = {"model.language_model.embed_tokens.token_adapter.trainable_tokens_delta": random(1, width)}
    image = adapter(tmp_path / "image", hub | token, trainable_token_indices={"embed_tokens": [count]})
    assert f"rows `{count}`" in refused(image, "llava", lw.MismatchError, base=model.hub)


def test_a_projector_that_became_two_layers_is_refused_on_the_way_back(toys: Callable[[str], Model], tmp_path: Path) -> None:
    model, random = toys("linear"), Random()
    shapes = {name: tensor.shape for name, tensor in lw.open_checkpoint(model.hub).tensors.items() if "projector" in name}
    tensors = random.low_rank(
        ["language_model.model.layers.0.self_attn.q_proj"], {"language_model.model.layers.0.self_attn.q_proj.weight": (64, 64)}
    )
    whole = {name: random(*shape) for name, shape in shapes.items()}
    source = adapter(tmp_path / "adapter", tensors | whole, modules_to_save=["multi_modal_projector"])
    assert "two layers" in refused(source, "llava", lw.MismatchError, base=model.hub)
    assert "two layers" in refused(source, "llava", lw.MismatchError, base=model.original)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(fixtures: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    source = fixtures / "B-lora/llava-v1.5-tiny-lora"
    code, out, err = cli("convert-lora", source, "-o", "made", "--dry-run")
    assert (code, (tmp_path / "made").exists()) == (0, False)
    assert "model.layers.0.mlp.down_proj -> model.language_model.layers.0.mlp.down_proj" in err
    assert cli("convert-lora", source, "-o", "made").code == 0
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert names == {"README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "llava-weights.manifest.json"}
    code, out, _ = cli("convert-lora", source, "-o", "made", "--to", "llava", "--json")
    assert code == 5
    code, out, _ = cli("convert-lora", source, "-o", "made", "--to", "llava", "--json", "--force")
    assert code == 0
    assert json.loads(out.splitlines()[-1])["output"] == "made"
    assert "library_name: peft" in (tmp_path / "made/README.md").read_text()
    assert {name for name, _ in lw.open_adapter(tmp_path / "made").replacements.items()} == set(lw.open_adapter(source).replacements)
    assert "LoRA adapter" in cli("inspect", "made").stdout
    done = cli("verify", "made", "--deep", "--strict", "-v")
    assert done.code == 0
    assert "a LoRA adapter of 14 modules" in done.stdout
    with (tmp_path / "made/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert cli("verify", "made", "--deep").code == 4


def test_one_file_or_nothing(fixtures: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT and vLLM read one file."""
    code, _, err = cli("convert-lora", fixtures / "F-peft/plain/adapter", "-o", "made", "--max-shard-size", "10kB")
    assert code == 2
    assert "one file" in err
    assert not (tmp_path / "made").exists()


def test_another_rank_than_the_config_says_is_found(fixtures: Path, tmp_path: Path) -> None:
    made = write(lw.convert_lora(fixtures / "F-peft/plain/adapter", "llava-hf"), tmp_path / "made")
    for name in ("llava-weights.manifest.json", "SHA256SUMS"):
        (made / name).unlink()
    (made / "adapter_config.json").write_text(json.dumps({**settings_of(made), "r": 3}))
    found = lw.verify(made)
    assert [finding.verdict for finding in found.findings if finding.subject == "adapter_config.json"] == ["warning"]
