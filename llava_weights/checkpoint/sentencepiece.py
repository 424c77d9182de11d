"""SentencePiece models: the pieces of a `tokenizer.model`, read field by field, without the sentencepiece library.

sentencepiece_model.proto: ModelProto{1: pieces{1: piece, 2: score, 3: type}, 2: trainer_spec{3: model type, 45-48: unk, bos, eos,
pad piece}, 3: normalizer_spec{2: character map, 3: add dummy prefix, 4: remove extra whitespaces}}.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..errors import InputError
from ..text import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
MAX_PIECES = 300_000  # Gemma's has 262,144, the largest of all published; a piece takes about 400 bytes of memory
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type
DEFAULT_PIECES = {45: "<unk>", 46: "<s>", 47: "</s>", 48: "<pad>"}
TRAINING, NORMALIZING = (3, *DEFAULT_PIECES), (2, 3, 4)  # the fields that are read


@dataclass(frozen=True)
class Vocabulary:
    """What tokenizer.model holds: id, score and kind of every piece, and which pieces are special (`pad`: None where there is none).

    `prefix` says whether a blank is put before every text, `verbatim` that the text is otherwise not changed.
    """

    ids: Mapping[str, int]
    bos: str
    eos: str
    unk: str
    pad: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, int] = field(default_factory=dict)
    model_type: int = UNIGRAM
    prefix: bool = True
    verbatim: bool = True

    @property
    def whole(self) -> frozenset[str]:
        """The pieces that are found in a text as a whole, as added tokens are."""
        return frozenset(piece for piece, kind in self.kinds.items() if kind in (CONTROL, USER_DEFINED))


def read_sentencepiece(data: bytes) -> Vocabulary:
    """The pieces of a SentencePiece model. Raises InputError for what SentencePiece would not load, and for one without bos or eos."""
    ids: dict[str, int] = {}
    kinds: dict[str, int] = {}
    scores: dict[str, float] = {}
    special, training, normalizing = dict(DEFAULT_PIECES), dict[int, int | bytes](), dict[int, int | bytes]()
    for number, value in _fields(data):
        if number == 1:
            if len(ids) == MAX_PIECES:
                raise _refusal(f"it has more than {MAX_PIECES:,} pieces")
            piece, score, kind = _piece(_message(value))
            if piece in ids:
                raise _refusal(f"two pieces are {shown(piece)}")
            ids[piece], kinds[piece], scores[piece] = len(ids), kind, score
        elif number == 2:
            training |= {field: found for field, found in _fields(_message(value)) if field in TRAINING}
        elif number == 3:
            normalizing |= {field: found for field, found in _fields(_message(value)) if field in NORMALIZING}
    special |= {number: _text(training[number]) for number in DEFAULT_PIECES if number in training}
    unknown = [piece for piece, kind in kinds.items() if kind == UNKNOWN]
    if len(unknown) != 1:
        raise _refusal(f"{len(unknown)} pieces are the unknown token")
    for number, role in ((46, "bos"), (47, "eos")):
        if kinds.get(special[number]) != CONTROL:
            raise _refusal(f"{shown(special[number])}, the {role} token, is not among its control pieces")
    pad = special[48] if kinds.get(special[48]) == CONTROL else None
    model_type = training.get(3, UNIGRAM)
    return Vocabulary(
        ids, bos=special[46], eos=special[47], unk=unknown[0], pad=pad, scores=scores, kinds=kinds,
        model_type=model_type if isinstance(model_type, int) else 0,
        prefix=normalizing.get(3, 1) != 0,
        verbatim=not normalizing.get(2) and normalizing.get(4, 1) == 0,
    )  # fmt: skip


def _piece(message: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1:
            text = _text(value)
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    if not text:
        raise _refusal("a piece is empty")
    if math.isnan(score):
        raise _refusal(f"the score of {shown(text)} is not a number")
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message: an int for a varint, else its bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind, size = key & 7, {1: 8, 5: 4}.get(key & 7)
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        if size is None or size > len(data) - position:
            raise _refusal(f"byte {position:,} is not part of a protobuf message")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):  # 64 bits take at most ten bytes
        if position >= len(data):
            raise _refusal("it is truncated")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _refusal(f"the number at byte {position - 10:,} has no end")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise _refusal("a number stands where a message belongs")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _message(value).decode()
    except UnicodeDecodeError as error:
        raise _refusal("a piece is not UTF-8") from error


def _refusal(reason: str) -> InputError:
    return InputError(f"`tokenizer.model` is not a LLaMA tokenizer: {reason}", hint="take it from the original LLaMA release")
