"""The architecture as a test: who may import whom, and who may print."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llava_weights"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a module imports only from lines above its own. Some of these are still to be written.
LAYERS = (
    "events families findings threads",  # import nothing; the tables of families/ count as one module
    "wording",
    "errors",
    "executors",
    "patience",
    "web",
    "ranges",
    "workspace retention",
    "buffers exact",
    "tensors",
    "sampling",
    "formats published",  # the files of formats/ count as one module
    "hub",
    "remote",
    "checkpoint",
    "tokenizer diagnose holes integer_delta windows low_rank adapter_config adapter_names conversation resize",  # parts of what follows
    "chat_template",
    "config examine fast_tokenizer splice streamed projector processor",
    "tower",
    "adapter hf_config",
    "parts sidecars",
    "agreement_tokenizer agreement_values",
    "agreement",
    "agreement_hf",
    "delta lora conversion inspection health",  # the transforms: pure
    "plan job",
    "manifest stream",
    "card rehash destination output_file",
    "predict records",
    "upload",
    "compare_files",
    "against",
    "derive",
    "write verification comparison forward",  # side effects begin
    "probes portions",
    "reference_file",
    "smoke sample",
    "report proof plot",
    "console",
    "toy",
    "demo",
    "commands",
    "cli",
    "__main__ __init__",
)
LAYER = {module: layer for layer, modules in enumerate(LAYERS) for module in modules.split()}

# What costs more than 50 ms to import is imported inside the function that needs it, so that `--help` stays fast.
HEAVY = {"torch", "transformers", "peft", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "tqdm", "typer",
         "jinja2", "fsspec", "s3fs", "ray"}  # fmt: skip
HEAVY_ALLOWED = {"cli": {"typer"}, "commands": {"typer"}}


def module_name(path: Path) -> str:
    """The name that LAYERS uses: the file's, or the folder's for a file in a subfolder."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported name as (dotted name, leading dots), `from . import a` giving `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.level) for alias in node.names)


def siblings(tree: ast.AST, path: Path) -> set[str]:
    """Modules of this package that `path` imports, anywhere in the file, by the names that LAYERS uses."""
    depth = len(path.relative_to(PACKAGE).parts)
    relative = {name for name, dots in imports(tree) if dots == depth}
    absolute = {name.removeprefix("llava_weights.") for name, dots in imports(tree) if not dots and name.startswith("llava_weights.")}
    return {name.split(".")[0] for name in relative | absolute} - {module_name(path), "__version__"}


def at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: not those in functions, nor under `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child
            waiting.append(child)


def upward(tree: ast.AST, path: Path) -> list[str]:
    """Imports that do not go down."""
    module = module_name(path)
    others = sorted(siblings(tree, path))
    return [f"{module} imports {other}, which is not below it" for other in others if LAYER.get(other, 99) >= LAYER.get(module, 0)]


def heavy(tree: ast.Module, path: Path) -> list[str]:
    """Expensive packages that importing the module would import too."""
    roots = {name.split(".")[0] for statement in at_import(tree) for name, dots in imports(statement) if not dots}
    return sorted(roots & HEAVY - HEAVY_ALLOWED.get(module_name(path), set()))


def printing(tree: ast.AST) -> list[int]:
    """Lines that print."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ast.unparse(call.func) in ("print", "sys.stdout.write", "sys.stderr.write")]


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_every_module_has_its_layer() -> None:
    assert {module_name(path) for path in MODULES} <= LAYER.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_keeps_the_rules(path: Path) -> None:
    tree = read(path)
    assert upward(tree, path) == []
    assert heavy(tree, path) == []
    if module_name(path) != "console":
        assert printing(tree) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("tensors.py", "def f():\n    from .plan import Plan", "tensors imports plan, which is not below it"),
        ("formats/meta.py", "from ..checkpoint import Step", "formats imports checkpoint, which is not below it"),
        ("lora.py", "from . import delta", "lora imports delta, which is not below it"),
        ("plan.py", "import llava_weights.cli", "plan imports cli, which is not below it"),
    ],
)
def test_upward_is_seen(file: str, source: str, complaint: str) -> None:
    assert upward(ast.parse(source), PACKAGE / file) == [complaint]


def test_downward_and_inside_formats_is_fine() -> None:
    assert upward(ast.parse("from ..errors import InputError\nfrom . import shown\nfrom .meta import x"), PACKAGE / "formats/zip.py") == []
    assert upward(ast.parse("from .formats.meta import x\nimport os"), PACKAGE / "checkpoint.py") == []


def test_heavy_is_seen_only_where_it_runs() -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    eager = "class A:\n    try:\n        from torch.nn import Linear\n    except ImportError:\n        pass"
    assert heavy(ast.parse(lazy), PACKAGE / "delta.py") == []
    assert heavy(ast.parse(eager), PACKAGE / "delta.py") == ["torch"]
    assert heavy(ast.parse("import typer, tqdm"), PACKAGE / "cli.py") == ["tqdm"]


def test_printing_is_seen() -> None:
    assert printing(ast.parse("x = 1\nprint(x)\nimport sys\nsys.stderr.write('x')")) == [2, 4]
