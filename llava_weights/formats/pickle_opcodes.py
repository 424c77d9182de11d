"""The pickle inside a `torch.save` file, read as data: an interpreter that can build descriptions of tensors and nothing else.

A real unpickler imports what the file names and calls it. This one knows 35 opcodes and a handful of names, which it compares as
text and never looks up, so the worst that a hostile file can do is to be refused. Opcodes: Python's Lib/pickletools.py; what
`torch.save` writes with them: torch/serialization.py and torch/_utils.py, protocol 2.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ..tensors.dtypes import MAX_AXES
from ..text import shown

MAX_OPCODES = 250_000  # more than 5,000 tensors; a 13B model has 405
MAX_TEXT = 4096
MAX_INTEGER_BYTES = 16
MAX_KEY = 1 << 31  # larger ints can be made to collide in a dict, which takes quadratic time
MAX_ELEMENTS = 1 << 48

PROTO, STOP = 0x80, ord(".")
STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64", "torch.IntStorage": "I32", "torch.ShortStorage": "I16", "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
}  # fmt: skip
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor"
REBUILD_TENSOR_V2 = "torch._utils._rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
ALLOWED = {ORDERED_DICT, REBUILD_TENSOR, REBUILD_TENSOR_V2, REBUILD_PARAMETER, *STORAGES}


class Refused(ValueError):
    """Why a file is not read: the end of a sentence that begins with its name; and what to do about it."""

    hint = "ask its author for a .safetensors version, or for a file that maps names to tensors and holds nothing else"


class ForbiddenName(Refused):
    """The pickle names something other than tensors."""

    hint = "do not load this file. Ask its author for a .safetensors version"

    def __init__(self, name: str) -> None:
        super().__init__(f"is not a plain tensor file (it asks to run {shown(name)})")


@dataclass(frozen=True)
class Name:
    """One of ALLOWED. Text, not the thing itself."""

    path: str


@dataclass(frozen=True)
class Storage:
    """`numel` values of `dtype` in the zip member `data/<key>`."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor as the file describes it; `offset` and `strides` count elements of `storage`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def problem(self) -> str:
        """Why this is not a row-major range of its storage, else empty."""
        if len(self.shape) != len(self.strides):
            return "has a stride too many or too few"
        if math.prod(max(length, 1) for length in self.shape) >= MAX_ELEMENTS:
            return f"has the impossible shape {list(self.shape)}"
        numel, expected = math.prod(self.shape), 1
        if self.offset + numel > self.storage.numel:
            return "reaches beyond its stored values"
        for length, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if numel and length != 1 and stride != expected:
                return f"is not stored row by row (shape {list(self.shape)}, strides {list(self.strides)})"
            expected *= length
        return ""


def interpret(data: bytes) -> object:
    """The one value that a pickle makes, of None, bool, int, float, str, tuple, list, dict, `View`, `Storage` and `Name`.

    Raises Refused, or any of Python's own errors on damaged input (IndexError, struct.error, UnicodeDecodeError...).
    """
    return _Machine(data).run()


class _Machine:
    """Stack, marks and memo, as in any unpickler. Hashing and comparing are kept to `str` and small `int`, never to a value that
    the file composed: a nested tuple takes exponential time to hash."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[object] = []
        self.below: list[list[object]] = []  # the stacks under each open mark
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        proto, protocol = self.take(2)
        if proto != PROTO:
            raise Refused("holds a pickle that does not begin with its protocol")
        for _ in range(MAX_OPCODES):
            if self.position >= len(self.data):
                raise Refused("holds a pickle that ends in the middle")
            opcode = self.data[self.position]
            self.position += 1
            if opcode == STOP:
                break
            action = ACTIONS.get(opcode)
            if action is None:
                raise Refused(f"holds the pickle opcode 0x{opcode:02x}, which `torch.save` does not write for tensors")
            action(self)
        else:
            raise Refused(f"holds a pickle of more than {MAX_OPCODES:,} opcodes")
        if protocol != 2:  # checked last, so that the error for a hostile file of another protocol says what it asks to run
            raise Refused(f"holds a pickle of protocol {protocol}, `torch.save` writes 2")
        if self.position != len(self.data) or len(self.stack) != 1 or self.below:
            raise Refused("holds a pickle with something left over")
        return self.stack[0]

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        taken = self.data[self.position : self.position + count]
        if len(taken) != count:
            raise Refused("holds a pickle that ends in the middle")
        self.position += count
        return taken

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def text(self, length: int) -> str:
        if length > MAX_TEXT:
            raise Refused(f"holds a text of {length:,} bytes in its pickle")
        return self.take(length).decode()

    def line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + MAX_TEXT)
        if end < 0:
            raise Refused("holds a name without end in its pickle")
        return self.take(end + 1 - self.position)[:-1].decode()

    def long(self) -> int:
        length = self.number("B")
        if length > MAX_INTEGER_BYTES:
            raise Refused(f"holds an integer of {length} bytes in its pickle")
        return int.from_bytes(self.take(length), "little", signed=True)

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, count: int) -> tuple[object, ...]:
        if len(self.stack) < count:
            raise Refused("holds a pickle that takes more than it put")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def append(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Refused("holds a pickle that appends to what is not a list")
        target += items

    def set_items(self, items: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is not dict and type(target) is not OrderedDict:
            raise Refused("holds a pickle that sets an item of what is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) is int and abs(key) < MAX_KEY):
                raise Refused(f"holds a dict with a {type(key).__name__} as key")
            if key in target:
                raise Refused(f"holds the name {shown(str(key))} twice")
            target[key] = value

    def name(self, module: object, attribute: object) -> None:
        if type(module) is not str or type(attribute) is not str:
            raise Refused("holds a pickle that looks up what is not a name")
        path = f"{module}.{attribute}"
        if path not in ALLOWED:
            raise ForbiddenName(path)
        self.push(Name(path))

    def build(self) -> None:
        """`OrderedDict.__dict__`, where `Module.state_dict()` keeps its modules' version numbers: ignored."""
        target, state = self.last(2)
        if type(target) is not OrderedDict or type(state) is not dict or list(state) != ["_metadata"]:
            raise Refused("holds a pickle that sets the state of an object")
        self.push(target)

    def persistent(self) -> None:
        """A reference to a zip member: `("storage", type, key, device, numel)`."""
        match self.stack.pop():
            case ("storage", Name(path), str(key), str(), int(numel)) if path in STORAGES and 0 <= numel < MAX_ELEMENTS:
                self.push(Storage(STORAGES[path], key, numel))
            case _:
                raise Refused("holds a storage that `torch.save` would not write")

    def reduce(self) -> None:
        """The result of a call to `OrderedDict` or one of the three functions, whose arguments are those of torch/_utils.py."""
        match self.last(2):
            case (Name(path), ()) if path == ORDERED_DICT:
                self.push(OrderedDict())
            case (Name(path), (Storage() as storage, offset, shape, strides)) if path == REBUILD_TENSOR:
                self.push(_view(storage, offset, shape, strides))
            case (Name(path), (Storage() as storage, offset, shape, strides, bool(), hooks)) if path == REBUILD_TENSOR_V2:
                _check_no_hooks(hooks)
                self.push(_view(storage, offset, shape, strides))
            case (Name(path), (View() as view, bool(), hooks)) if path == REBUILD_PARAMETER:
                _check_no_hooks(hooks)
                self.push(view)
            case _:
                raise Refused("holds a pickle that calls something with arguments `torch.save` does not write")


def _view(storage: Storage, offset: object, shape: object, strides: object) -> View:
    if not isinstance(offset, int) or offset < 0:
        raise Refused("holds a tensor with an impossible offset")
    return View(storage, offset, _lengths(shape), _lengths(strides))


def _lengths(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_AXES:
        raise Refused("holds a tensor with an impossible shape")
    if not all(type(length) is int and 0 <= length < MAX_ELEMENTS for length in value):
        raise Refused("holds a tensor with an impossible shape")
    return value


def _check_no_hooks(hooks: object) -> None:
    if type(hooks) is not OrderedDict or hooks:
        raise Refused("holds a tensor with backward hooks")


ACTIONS: dict[int, Callable[[_Machine], object]] = {
    ord("("): _Machine.mark,
    ord("N"): lambda machine: machine.push(None),
    0x88: lambda machine: machine.push(True),
    0x89: lambda machine: machine.push(False),
    ord("J"): lambda machine: machine.push(machine.number("<i")),
    ord("K"): lambda machine: machine.push(machine.number("B")),
    ord("M"): lambda machine: machine.push(machine.number("<H")),
    0x8A: lambda machine: machine.push(machine.long()),
    ord("G"): lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    ord("X"): lambda machine: machine.push(machine.text(machine.number("<I"))),
    ord("}"): lambda machine: machine.push({}),
    ord("]"): lambda machine: machine.push([]),
    ord(")"): lambda machine: machine.push(()),
    ord("t"): lambda machine: machine.push(tuple(machine.since_mark())),
    0x85: lambda machine: machine.push(machine.last(1)),
    0x86: lambda machine: machine.push(machine.last(2)),
    0x87: lambda machine: machine.push(machine.last(3)),
    ord("a"): lambda machine: machine.append([machine.stack.pop()]),
    ord("e"): lambda machine: machine.append(machine.since_mark()),
    ord("s"): lambda machine: machine.set_items(list(machine.last(2))),
    ord("u"): lambda machine: machine.set_items(machine.since_mark()),
    ord("q"): lambda machine: machine.memo.__setitem__(machine.number("B"), machine.stack[-1]),
    ord("r"): lambda machine: machine.memo.__setitem__(machine.number("<I"), machine.stack[-1]),
    ord("h"): lambda machine: machine.push(machine.memo[machine.number("B")]),
    ord("j"): lambda machine: machine.push(machine.memo[machine.number("<I")]),
    ord("c"): lambda machine: machine.name(machine.line(), machine.line()),
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent,
    # Protocol 4 and 5, which Python's own pickle writes: read only to say which name such a file asks for.
    0x95: lambda machine: machine.take(8),
    0x8C: lambda machine: machine.push(machine.text(machine.number("B"))),
    0x94: lambda machine: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    0x93: lambda machine: machine.name(*machine.last(2)),
}
