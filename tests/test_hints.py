"""Every error says what to do: no place in the package makes one without a hint."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llava_weights import errors

PACKAGE = Path(__file__).resolve().parent.parent / "llava_weights"
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LlavaWeightsError)}
SAYS_WHAT_IS_KEPT = {"Interrupted"}  # instead


def without_hint(source: str) -> list[int]:
    """Lines that make an error without `hint`, or with one that is nothing."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ERRORS - SAYS_WHAT_IS_KEPT:
            hint = next((word.value for word in call.keywords if word.arg == "hint"), None)
            if hint is None or (isinstance(hint, ast.Constant) and not hint.value):
                found.append(call.lineno)
    return sorted(found)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_every_error_has_a_hint(path: Path) -> None:
    assert without_hint(path.read_text(encoding="utf-8")) == []


def test_the_check_sees() -> None:
    source = 'InputError("x")\nUsageError("x", hint="")\nOutputError("x", hint="y")\nHubError("x", hint=None)'
    assert without_hint(source) == [1, 2, 4]
