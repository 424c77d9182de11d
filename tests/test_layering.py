"""The architecture as a test: the rooms in order, who may import whom, and who may print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llava_weights

PACKAGE = Path(__file__).resolve().parent.parent / "llava_weights"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a module imports from its own room and from lines above it. Rooms of one line don't know each other.
ROOMS = (
    "ground",
    "families",
    "storage",
    "tensors",
    "formats",
    "checkpoint",
    "transforms write smoke",
    "checks",
    "cli",
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms.split()}
GROUND = {"__init__", "errors", "events", "findings", "text"}  # files beside the rooms
DOOR = "__main__"  # opens the command line

# What costs more than 50 ms to import is imported inside the function that needs it, so that `--help` stays fast.
HEAVY = {"torch", "transformers", "peft", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "tqdm", "typer",
         "jinja2", "obstore", "ray", "gguf"}  # fmt: skip
HEAVY_ALLOWED = {"cli": {"typer"}}
PRINTS = "cli"


def room_of(path: Path) -> str:
    """The room that a file lies in; "" where it lies in none and is no ground file."""
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    if len(inside) > 1:
        return inside[0] if inside[0] in LEVEL.keys() - {"ground"} else ""
    return "ground" if inside[0] in GROUND else "cli" if inside[0] == DOOR else ""


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[str, ...]]:
    """Every module of this package that a file imports, anywhere in it, as its path below the package: `("checks", "verify")`. For
    `from .. import name` that is the name, for `from ..room import name` the room and the name, which may be a module or not."""
    folder = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom):
            named = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                named = folder[: len(folder) - node.level + 1] + named
            elif named[:1] == (PACKAGE.name,):
                named = named[1:]
            else:
                continue
            yield from ((*named, alias.name) for alias in node.names)


def upward(tree: ast.AST, path: Path) -> list[str]:
    """Imports that go neither down nor to the own room."""
    mine, found = room_of(path), set()
    for module in imported(tree, path):
        other = module[0] if module and module[0] in LEVEL else "ground"
        if other != mine and LEVEL[other] >= LEVEL[mine]:
            found.add(f"{mine} imports {other}, which is not below it")
    return sorted(found)


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those in functions, nor under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            waiting.append(child)


def heavy(tree: ast.Module, path: Path) -> list[str]:
    """Expensive packages that importing the module would import too."""
    names = set()
    for statement in at_import(tree):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names.add(statement.module)
    return sorted({name.split(".")[0] for name in names} & HEAVY - HEAVY_ALLOWED.get(room_of(path), set()))


def printing(tree: ast.AST) -> list[int]:
    """Lines that print."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ast.unparse(call.func) in ("print", "sys.stdout.write", "sys.stderr.write")]


def test_every_module_lies_in_a_room() -> None:
    assert [str(path.relative_to(PACKAGE)) for path in MODULES if not room_of(path)] == []


@pytest.mark.parametrize("room", sorted(LEVEL.keys() - {"ground"}))
def test_every_room_says_its_job_and_costs_nothing_to_enter(room: str) -> None:
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert [ast.unparse(statement) for statement in at_import(tree)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_the_rules(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    if path != PACKAGE / "__init__.py":  # hands on names of every room, on first use; for type checkers at once
        assert upward(tree, path) == []
    assert heavy(tree, path) == []
    if room_of(path) != PRINTS:
        assert printing(tree) == []


def test_no_room_hides_a_public_function() -> None:
    assert LEVEL.keys() & set(llava_weights.__all__) == set()


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("tensors/lazy.py", "def f():\n    from ..write.plan import Plan", "tensors imports write, which is not below it"),
        ("formats/meta.py", "from ..checkpoint.checkpoint import Step", "formats imports checkpoint, which is not below it"),
        ("formats/meta.py", "from .. import checkpoint", "formats imports checkpoint, which is not below it"),
        ("transforms/lora.py", "from ..smoke import probes", "transforms imports smoke, which is not below it"),
        ("write/plan.py", "import llava_weights.cli.main", "write imports cli, which is not below it"),
        ("checks/diff.py", "from llava_weights.cli import plot", "checks imports cli, which is not below it"),
        ("events.py", "if TYPE_CHECKING:\n    from .families.layouts import Layout", "ground imports families, which is not below it"),
    ],
)
def test_upward_is_seen(file: str, source: str, complaint: str) -> None:
    assert upward(ast.parse(source), PACKAGE / file) == [complaint]


def test_downward_and_inside_a_room_is_fine() -> None:
    own = "from .. import __version__\nfrom ..errors import InputError\nfrom . import meta\nfrom .meta import x\nfrom ..formats import meta"
    assert upward(ast.parse(own), PACKAGE / "formats/torch_zip.py") == []
    assert upward(ast.parse("from ..formats.meta import x\nimport os\nimport checks"), PACKAGE / "checkpoint/checkpoint.py") == []
    assert upward(ast.parse("from .text import size"), PACKAGE / "errors.py") == []
    assert upward(ast.parse("from .cli.main import main"), PACKAGE / "__main__.py") == []


def test_a_file_outside_of_every_room_is_seen() -> None:
    inside = {"cli/main.py": "cli", "formats/deep/er.py": "formats", "text.py": "ground", "__main__.py": "cli"}
    outside = {"utils.py": "", "helpers/text.py": "", "ground/errors.py": ""}
    assert {file: room_of(PACKAGE / file) for file in (inside | outside)} == inside | outside


def test_heavy_is_seen_only_where_it_runs() -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    eager = "class A:\n    try:\n        from torch.nn import Linear\n    except ImportError:\n        pass"
    hidden = "if not TYPE_CHECKING:\n    import torch"
    assert heavy(ast.parse(lazy), PACKAGE / "transforms/delta.py") == []
    assert heavy(ast.parse(eager), PACKAGE / "transforms/delta.py") == ["torch"]
    assert heavy(ast.parse(hidden), PACKAGE / "transforms/delta.py") == ["torch"]
    assert heavy(ast.parse("import typer, tqdm"), PACKAGE / "cli/main.py") == ["tqdm"]


def test_printing_is_seen() -> None:
    assert printing(ast.parse("x = 1\nprint(x)\nimport sys\nsys.stderr.write('x')")) == [2, 4]
