"""Every version of transformers from 4.37 to 5.24 runs what we convert as the original ran it. Run by `make peer`."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forwards
import pytest
from checkpoint.test_hf_tokenizer import KINDS, SLOW, as_original, saved
from peers.environments import MAIN, NEWEST, Json, run, without_error
from transforms.test_convert import SOURCES, hub, same_bits, tensors_of, write

import llava_weights as lw
from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.transforms.convert import convert

VERSIONS = ("4.37.2", "4.45.2", "4.57.6", MAIN, NEWEST)
WITH_PROCESSOR = VERSIONS[1:]  # 4.36-4.42 refuse a processor_config.json that has keys
NO_NEXT = ("4.37.2", "D")  # LlavaNext came with 4.39
IMAGE, PATCH = "<image>", "<im_patch>"
IM_END, BLANK = 306, 277

pytestmark = [pytest.mark.peer, pytest.mark.timeout(300)]
every = pytest.mark.parametrize(
    ("version", "name"), [(version, name) for version in VERSIONS for name in SOURCES if (version, name) != NO_NEXT]
)
with_processor = pytest.mark.parametrize(("version", "name"), [(version, name) for version in WITH_PROCESSOR for name in SOURCES])


def prompts(fixtures: Path, name: str) -> dict[str, tuple[str, list[str]]]:
    """By case the prompt, with one image token an image as the conversion's processor takes it, and its pictures."""
    _, _, reference, prefix = SOURCES[name]
    listing = json.loads((fixtures / "E-logits" / reference / "cases.json").read_text())
    token = PATCH if name in ("A-307", "A-308", "B-imstartend") else IMAGE
    found = {}
    for case, recorded in listing.get("cases", listing).items():
        if case.startswith(prefix):
            pictures = recorded["images"] if "images" in recorded else [recorded["image"]] if recorded["image"] else []
            text = recorded["prompt"].replace(PATCH * 4, token).replace(IMAGE, token)
            found[case] = (text, [str(fixtures / "common/images" / f"{picture}.png") for picture in pictures])
    return found


@pytest.fixture(scope="module")
def converted(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("converted")
    squares = {name: {} if name == "D" else {"image_aspect": "square"} for name in SOURCES}  # padding needs 4.49
    return {name: hub(fixtures, name, folder / name, **squares[name]) for name in SOURCES}


@pytest.fixture(scope="module")
def seen(fixtures: Path, converted: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Json]:
    """What a version does with every conversion: one process a version."""
    folder, done = tmp_path_factory.mktemp("jobs"), {}

    def see(version: str, name: str) -> Json:
        if version not in done:
            jobs = {}
            for source, path in converted.items():
                texts, prefix = prompts(fixtures, source), SOURCES[source][3]
                one = [case for case, (_, pictures) in texts.items() if len(pictures) == 1]
                jobs[source] = {
                    "folder": str(path), "reference": str(fixtures / "E-logits" / SOURCES[source][2]), "prefix": prefix, "prompts": texts,
                    "square": "" if source == "B-imstartend" else f"{prefix}img", "batch": one if version in ("4.57.6", MAIN) else [],
                }  # fmt: skip
            done[version] = run(version, "read", jobs, folder)
        return without_error(done[version][name])

    return see


def original_ids(fixtures: Path, converted: dict[str, Path], name: str, *, single: bool) -> dict[str, list[int]]:
    """The recorded ids; in B-imstartend with the blank after `<im_end>` that tests/checkpoint/test_hf_tokenizer.py tells of."""
    image = json.loads((converted[name] / "config.json").read_text())["image_token_index"]
    cases = forwards.cases(fixtures / "E-logits" / SOURCES[name][2], SOURCES[name][3], tiled=name == "D", single=image if single else None)
    after = {IM_END: [IM_END, BLANK]} if name == "B-imstartend" else {}
    return {case: [j for i in given["input_ids"][0].tolist() for j in after.get(i, [i])] for case, given in cases.items()}


@every
def test_every_key_has_its_place(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    assert seen(version, name)["keys"] == {"missing_keys": [], "unexpected_keys": []}


def test_4_37_has_no_next(seen: Callable[[str, str], Json]) -> None:
    assert seen("4.37.2", "D") == {"lacks": "LlavaNextForConditionalGeneration"}


@every
def test_logits_are_the_originals(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    found = seen(version, name)["logits"]
    assert set(found) == {"4.37.2": {"single"}, "4.45.2": {"widened", "single"}}.get(version, {"widened"})
    for form, differences in found.items():
        assert len(differences) == (3 if name.startswith("A") else 5)
        assert max(differences.values()) <= forwards.ATOL, (form, differences)


@every
def test_the_same_answers_in_every_version(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    expected = seen(MAIN, name)["generated"]["widened"]
    assert all(1 <= len(answer) <= 5 for answer in expected.values())
    for form, answers in seen(version, name)["generated"].items():
        assert answers == expected, form


@every
def test_the_tokenizers_ids_are_the_originals(
    fixtures: Path, converted: dict[str, Path], seen: Callable[[str, str], Json], version: str, name: str
) -> None:
    expected = original_ids(fixtures, converted, name, single=True)
    assert seen(version, name)["tokenized"] == expected
    assert seen(version, name)["slowly"] == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_the_original_layout_has_the_ids_of_the_slow_tokenizer(version: str, tmp_path: Path) -> None:
    """AutoTokenizer, whatever `model_type` stands in the config, and the slow class that LLaVA's own code asks for, with tokenizer.json
    beside. tokenizers 0.15, of 4.37, puts a blank behind a special token at the start of a text though `legacy` is false."""
    jobs, expected = {}, {}
    for kind in KINDS:
        for legacy in (True, False):
            for model_type in ("llava", "llava_mistral"):
                name = f"{kind}-{legacy}-{model_type}"
                folder = saved(as_original(kind, legacy), tmp_path / name, beside=json.dumps({"model_type": model_type}))
                jobs[name] = {"folder": str(folder), "texts": SLOW["texts"]}
                expected[name] = SLOW["ids"][f"{kind}, legacy {str(legacy).lower()}"]
    for name, found in run(version, "tokenize", jobs, tmp_path).items():
        ids = without_error(found)
        assert ids["slow"] == expected[name], name
        known = range(len(SLOW["texts"]))
        if version == "4.37.2" and "False" in name:
            known = [i for i in known if not SLOW["texts"][i].startswith("<")]
        assert [ids["fast"][i] for i in known] == [expected[name][i] for i in known], name


@with_processor
def test_the_processors_ids_are_the_originals(
    fixtures: Path, converted: dict[str, Path], seen: Callable[[str, str], Json], version: str, name: str
) -> None:
    assert seen(version, name)["processed"] == original_ids(fixtures, converted, name, single=False)


@with_processor
def test_a_square_picture_gives_the_originals_logits(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    """End to end, where neither side pads or crops. B-imstartend has a blank more, so other logits."""
    found = seen(version, name)
    if name != "B-imstartend":
        assert found["square"] <= forwards.ATOL


@with_processor
def test_the_chat_template(converted: dict[str, Path], seen: Callable[[str, str], Json], version: str, name: str) -> None:
    token = json.loads((converted[name] / "processor_config.json").read_text())["image_token"]
    prompt = seen(version, name)["prompt"]
    assert prompt == seen(MAIN, name)["prompt"]
    assert prompt.count(token) == 1
    assert prompt.index(token) < prompt.index("Where?") < prompt.upper().rindex("ASSISTANT:")
    assert (f"<im_start>{token}<im_end>" in prompt) == (token == PATCH)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("version", ["4.57.6", MAIN])
def test_a_batch_padded_on_the_left_gives_the_same_answers(seen: Callable[[str, str], Json], version: str, name: str) -> None:
    found = seen(version, name)
    assert len(found["batched"]) >= 2
    assert found["batched"] == found["alone"]


# --- transformers' own converters, which 4.47.1 was the last version to ship ------------------------------------------

CONVERTERS = "4.47.1"
CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 56,
        "image_size": 28, "patch_size": 14, "projection_dim": 16}  # fmt: skip
DEEP_CLIP = {**CLIP, "num_hidden_layers": 12}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 72,
          "image_size": 33, "patch_size": 14, "vision_use_head": False}  # fmt: skip
SIGLIP_SIZES = {  # of so400m, in the converter
    "hidden_size=1152": "hidden_size=48", "image_size=384": "image_size=33", "intermediate_size=4304": "intermediate_size=72",
    "num_attention_heads=16": "num_attention_heads=3", "num_hidden_layers=26": "num_hidden_layers=2",
}  # fmt: skip
FEATURES = 4  # of an image
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
# 576, LLaVA-1.5's number; paths; a default that stands only above the decoder's own; a rope of LLaVA-NeXT-Video where nothing reads it.
OTHER_KEYS = {
    "image_seq_length", "_name_or_path", "text_config._name_or_path", "tie_word_embeddings", "text_config.factor", "text_config.type",
}  # fmt: skip
UNREAD = {"next-video": {"ignore_index"}, "two-towers": {"ignore_index"}}  # what 4.47's class wrote and later ones only keep
OLD, NEXT = "llava.convert_llava_weights_to_hf", "llava_next.convert_llava_next_weights_to_hf"
ONEVISION, VIDEO = "llava_onevision.convert_llava_onevision_weights_to_hf", "llava_next_video.convert_llava_next_video_weights_to_hf"
VIP, TWO = "vipllava.convert_vipllava_weights_to_hf", "video_llava.convert_video_llava_weights_to_hf"
FUNCTIONS = {
    OLD: "convert_llava_llama_to_hf", NEXT: "convert_llava_to_hf", ONEVISION: "convert_llava_to_hf", VIDEO: "convert_llava_to_hf",
    VIP: "convert_vipllava_llama_to_hf", TWO: "convert_video_llava_llama_to_hf",
}  # fmt: skip
BY_NAME = (NEXT, ONEVISION, VIDEO)  # of the model, where the others are given folders


@dataclass(frozen=True)
class Case:
    """A checkpoint to be made and converted: the decoder's sizes, how many tokens its tokenizer has, and the converter's constants."""

    module: str
    text: str  # model_type of the decoder
    hidden: int
    heads: int
    shared: int  # key and value heads
    rows: int
    tokens: int
    model_id: str = ""
    text_id: str = ""
    siglip: bool = False
    tied: bool = False
    newline: bool = False
    dtype: str = "float16"
    constants: tuple[str, ...] = ("32000",)  # the image token, and the padding behind it


LLAMA_3 = ("lmms-lab/llama3-llava-next-8b", "meta-llama/Meta-Llama-3-8B-Instruct")
ONEVISION_7B = ("lmms-lab/llava-onevision-qwen2-7b-ov", "Qwen/Qwen2-7B-Instruct")
VIDEO_7B = ("lmms-lab/LLaVA-NeXT-Video-7B", "lmsys/vicuna-7b-v1.5")
CASES = {
    "vicuna": Case(OLD, "llama", 48, 4, 2, 318, 318, constants=("32000", "32001")),
    "vicuna-odd": Case(OLD, "llama", 64, 4, 1, 383, 383, constants=("32000", "32001")),
    "vicuna-64": Case(OLD, "llama", 32, 2, 2, 320, 320, constants=("32000", "32001")),
    "next-vicuna": Case(NEXT, "llama", 48, 6, 2, 320, 320, "liuhaotian/llava-v1.6-vicuna-7b", "lmsys/vicuna-7b-v1.5", newline=True),
    "next-mistral": Case(
        NEXT, "mistral", 64, 8, 2, 331, 331, "liuhaotian/llava-v1.6-mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2", newline=True
    ),
    "next-llama3": Case(NEXT, "llama", 48, 4, 2, 320, 320, *LLAMA_3, newline=True, constants=("128256",)),
    "next-qwen": Case(
        NEXT, "qwen2", 64, 4, 2, 320, 303, "lmms-lab/llava-next-72b", "Qwen/Qwen1.5-72B-Chat", newline=True, constants=("151646",)
    ),
    "interleave-tied": Case(OLD, "qwen2", 64, 4, 2, 320, 303, siglip=True, tied=True, dtype="bfloat16", constants=("151646",)),
    "interleave-untied": Case(OLD, "qwen2", 48, 4, 4, 330, 303, siglip=True, constants=("151646",)),
    "onevision": Case(ONEVISION, "qwen2", 64, 4, 2, 320, 303, *ONEVISION_7B, siglip=True, newline=True, constants=()),
    "next-video": Case(VIDEO, "llama", 48, 4, 2, 320, 320, *VIDEO_7B, newline=True, dtype="bfloat16", constants=("32000", "32001")),
    "two-towers": Case(TWO, "llama", 48, 4, 2, 320, 320, constants=("32000", "32002")),
    "vip": Case(VIP, "llama", 48, 4, 2, 320, 320, constants=("32000", "32001")),
    "interleave-newline": Case(OLD, "qwen2", 48, 4, 4, 384, 303, siglip=True, newline=True, constants=("151646",)),
}


def piece_tokenizer(size: int) -> dict[str, bytes]:
    """A SentencePiece tokenizer with so many pieces, and Vicuna's settings."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, model_type="bpe", vocab_size=size, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=4,
    )  # fmt: skip
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False, **roles}
    return {
        "tokenizer.model": model.getvalue(), "tokenizer_config.json": json.dumps(settings).encode(),
        "special_tokens_map.json": json.dumps(roles).encode(),
    }  # fmt: skip


def byte_tokenizer(size: int, *, llama: bool = False) -> dict[str, bytes]:
    """A byte-level tokenizer with so many tokens, three of them added, stored as that of Qwen2 or of Llama 3."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=size - 3, initial_alphabet=alphabet, show_progress=False))
    added = LLAMA_3_TOKENS if llama else QWEN_TOKENS
    decoder = {
        str(size - 3 + i): {"content": token, "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        for i, token in enumerate(added)
    }
    if llama:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": added[0], "eos_token": added[2]}
        tokenizer.add_special_tokens(list(added))
        files = {"tokenizer.json": tokenizer.to_str().encode()}
    else:
        settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": added[2], "pad_token": added[0], "add_prefix_space": False}
        model = json.loads(tokenizer.to_str())["model"]
        merges = "#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
        files = {"vocab.json": json.dumps(model["vocab"]).encode(), "merges.txt": merges.encode()}
    return files | {"tokenizer_config.json": json.dumps({**settings, "added_tokens_decoder": decoder}).encode()}


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")
SENTENCES = ["the tall man walks along the lane to the harbor", "what can be seen in this photo of a brown horse", "where does it go"] * 4


def conversion_job(folder: Path, name: str, case: Case) -> Json:
    """The small files of the text model, the tower and the original, and what `run_transformers.convert` is told."""
    qwen, llama_3, vision = (
        case.text == "qwen2",
        name == "next-llama3",
        SIGLIP if case.siglip else DEEP_CLIP if case.module == VIP else CLIP,
    )
    tower = "siglip" if case.siglip else "clip"
    for part in ("text", "original", tower):
        (folder / part).mkdir(parents=True)
    tokenizer = byte_tokenizer(case.tokens, llama=llama_3) if qwen or llama_3 else piece_tokenizer(case.tokens)
    for file, content in tokenizer.items():
        for part in ("text", "original"):
            (folder / part / file).write_bytes(content)
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    preprocessor = {"image_processor_type": "SiglipImageProcessor", "size": side, **HALF} if case.siglip else {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": side["width"]}, "crop_size": side}  # fmt: skip
    grid = [[2 * vision["image_size"]] * 2]
    preprocessor |= {"image_grid_pinpoints": grid} if case.module in BY_NAME else {}
    (folder / tower / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    kind = "mistral" if case.text == "mistral" else "qwen" if qwen else "llama"
    ratio = "anyres_max_9" if case.module == ONEVISION else "anyres"
    tiles = {"image_aspect_ratio": ratio, "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": grid}
    tiles |= {"mm_spatial_pool_mode": "average", "mm_spatial_pool_stride": 2} if case.module == VIDEO else {}
    ids = {"bos_token_id": case.tokens - 3, "eos_token_id": case.tokens - 1} if qwen or llama_3 else {"bos_token_id": 1, "eos_token_id": 2}
    added = {
        number: case.tokens + int(number) - 32000 if case.module == TWO else case.tokens + i for i, number in enumerate(case.constants)
    }
    features = {"num_image_tokens=729": f"num_image_tokens={FEATURES}"} if case.module == ONEVISION else {}
    # What the classes assume, the sizes of published models, as those of the tiny ones.
    assumed = {
        ONEVISION: {"image_token_index": case.tokens, "video_token_index": case.tokens + 1, "image_grid_pinpoints": grid},
        VIDEO: {"video_seq_length": FEATURES // 2},
        VIP: {"image_token_index": case.tokens},
        TWO: {
            "image_token_index": case.tokens,
            "video_token_index": case.tokens + 1,
            "image_seq_length": FEATURES,
            "video_seq_length": 8 * (FEATURES + 1),
        },
    }.get(case.module, {})
    text_id = {f'"{case.text_id}"': f'"{folder / "text"}"'} if case.text_id else {}
    text = str(folder / "text")
    named = (
        {"mm_image_tower": str(folder / tower), "mm_video_tower": "video"}
        if case.module == TWO
        else {"mm_vision_tower": str(folder / tower)}
    )
    return {
        "folder": str(folder), "module": case.module, "function": FUNCTIONS[case.module], "tower": tower, "newline": case.newline,
        "dtype": case.dtype, "vision": vision, "assumed": assumed, "norm": case.module == VIP, "two": case.module == TWO,
        "replaced": {**added, **features, **text_id, **(SIGLIP_SIZES if case.siglip else {})},
        "arguments": [case.model_id, str(folder / "theirs")] if case.module in BY_NAME else
            [text, str(folder / tower), str(folder / "theirs"), "original"],
        "text": {
            "model_type": case.text, "hidden_size": case.hidden, "num_attention_heads": case.heads, "num_key_value_heads": case.shared,
            "vocab_size": case.rows, "intermediate_size": 88, "num_hidden_layers": 2, "tie_word_embeddings": case.tied, **ids,
        },
        "config": {
            "model_type": f"llava_{kind}", "architectures": [f"Llava{kind.capitalize()}ForCausalLM"], "mm_projector_type": "mlp2x_gelu",
            **named,
            "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
            **(tiles if case.newline else {"image_aspect_ratio": "pad"}),
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By case the folder that holds `theirs` and `ours`. The converter knows Qwen by its name."""
    folder = tmp_path_factory.mktemp("both")
    places = {name: folder / (f"Qwen-{name}" if case.text == "qwen2" else name) for name, case in CASES.items()}
    found = run(CONVERTERS, "convert", {name: conversion_job(places[name], name, case) for name, case in CASES.items()}, folder)
    for name, case in CASES.items():
        without_error(found[name])
        tower = open_checkpoint(places[name] / ("siglip" if case.siglip else "clip"))
        aspect = None if case.newline else "square"  # as the converter's
        made = convert(open_checkpoint(places[name] / "original"), "llava-hf", tower=tower, image_aspect=aspect, lossy=case.module == TWO)
        write(made, places[name] / "ours")
    return places


@pytest.fixture(scope="module")
def compared(both: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Json]:
    """What a version says about the two conversions of every case."""
    folder, done = tmp_path_factory.mktemp("compared"), {}

    def see(version: str, name: str) -> Json:
        if version not in done:
            done[version] = run(version, "compare", {key: comparison_job(both[key], case) for key, case in CASES.items()}, folder)
        return without_error(done[version][name])

    return see


def comparison_job(folder: Path, case: Case) -> Json:
    """Some text and an image: 4 features, and for LLaVA-NeXT four tiles more, 16 features and 4 ends of rows."""
    image = json.loads((folder / "theirs/config.json").read_text())["image_token_index"]
    side, tiled = (SIGLIP if case.siglip else CLIP)["image_size"], case.module in BY_NAME
    return {
        "folder": str(folder), "image": image, "rows": case.rows, "widened": case.module == ONEVISION,
        "pixels_are": "pixel_values_images" if case.module == TWO else "pixel_values",
        "ids": [5, 6, 7, *[image] * (24 if tiled else 4), *range(20, 40)],
        "pixels": [1, 5, 3, side, side] if tiled else [1, 3, side, side], "image_size": [50, 50] if tiled else None,
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_tensors_are_those_of_transformers_converter(both: dict[str, Path], name: str) -> None:
    """Names, shapes, and every bit but the new rows', which it draws at random."""
    case, ours, theirs = CASES[name], tensors_of(both[name] / "ours"), tensors_of(both[name] / "theirs")
    assert (HEAD in ours) != case.tied
    assert ours.keys() == theirs.keys()
    assert len(ours) > 60
    for key, tensor in theirs.items():
        old = case.rows if key in (TABLE, HEAD) else len(tensor)
        assert ours[key].shape == tensor.shape, key
        assert same_bits(ours[key][:old], tensor[:old]), key


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", [CONVERTERS, "4.57.6", MAIN])
def test_logits_are_those_of_transformers_converter(compared: Callable[[str, str], Json], version: str, name: str) -> None:
    found = compared(version, name)
    for side in ("ours", "theirs"):
        assert found[side]["keys"] == {"missing_keys": [], "unexpected_keys": []}
    assert found["spread"] > 0.1
    assert found["difference"] == 0.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("version", [CONVERTERS, "4.57.6", MAIN])
def test_the_config_says_what_transformers_converter_says(compared: Callable[[str, str], Json], version: str, name: str) -> None:
    """Of all keys that it sets or that this version fills in, but where it says nothing."""
    ours, theirs = (flat(compared(version, name)[side]["config"]) for side in ("ours", "theirs"))
    differing = {key for key, value in theirs.items() if value is not None and ours.get(key, "missing") != value}
    assert differing <= OTHER_KEYS | UNREAD.get(name, set()), {key: (ours.get(key), theirs[key]) for key in differing}
    assert len(theirs) > 60


def flat(config: Json, prefix: str = "") -> Json:
    found: Json = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", CASES)
def test_verify_finds_nothing_wrong_with_what_transformers_converter_wrote(both: dict[str, Path], name: str, tmp_path: Path) -> None:
    """But its processor files, which transformers 4.48 and later can't work with, and which a conversion to the same layout completes."""
    wrong = [each for each in lw.verify(both[name] / "theirs").findings if each.verdict in ("failed", "warning")]
    assert {each.verdict for each in wrong} <= {"warning"}, wrong
    assert {each.subject for each in wrong} <= {"processor_config.json", "chat_template.json", "config.json"}, wrong
    write(convert(open_checkpoint(both[name] / "theirs"), "llava-hf"), tmp_path / "again")
    again = [each for each in lw.verify(tmp_path / "again").findings if each.verdict in ("failed", "warning")]
    assert [each.text for each in again if "prompt not certain" not in each.text] == []
