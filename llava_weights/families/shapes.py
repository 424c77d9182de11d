"""The tensors of a part as rows of a table: their names, and their shapes in terms of the config."""

from __future__ import annotations

import ast
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Axis = int | str  # a length, or what gives it: "num_attention_heads * head_dim", "image_size // patch_size"

MAX_LAYERS = 1024  # more are refused as absurd; the deepest published decoder has 126, the deepest tower 48
OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


@dataclass(frozen=True)
class Parameter:
    """A tensor of every model of a kind, or, with `when`, of those whose config says true for that key."""

    name: str
    shape: tuple[Axis, ...]
    when: str = ""


def length(axis: Axis, config: Mapping[str, Any]) -> int:
    """The length of `axis` for the sizes in `config`. Raises KeyError where one is missing."""
    return axis if isinstance(axis, int) else _value(_parsed(axis), config)


def shapes(parameters: Iterable[Parameter], config: Mapping[str, Any], *, before: str = "") -> dict[str, tuple[int, ...]]:
    """Shape by name, `before` in front of each, of those parameters that a model of `config` has."""
    there = (row for row in parameters if not row.when or config.get(row.when) is True)
    return {before + row.name: tuple(length(axis, config) for axis in row.shape) for row in there}


@lru_cache
def _parsed(axis: str) -> ast.expr:
    return ast.parse(axis, mode="eval").body


def _value(node: ast.expr, config: Mapping[str, Any]) -> int:
    if isinstance(node, ast.BinOp):
        return int(OPERATORS[type(node.op)](_value(node.left, config), _value(node.right, config)))
    return int(config[node.id] if isinstance(node, ast.Name) else node.value)  # type: ignore[attr-defined]
