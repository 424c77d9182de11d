"""Name what a chat template asks for that no chat template needs. It is parsed as transformers parses it, and never rendered.

Allowed are the kinds of expression, filters, tests, functions and methods that chat templates use; everything else is named. transformers
renders templates in a sandbox, other programs may not, and sandboxes have had holes: names with a leading underscore lead into all of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from ..text import shown

if TYPE_CHECKING:
    from jinja2 import Environment, nodes


LONGEST_TEMPLATE = 1 << 17  # characters; the longest published ones have 30,000
PASSES = 100  # over a template's names, each of which follows values one name further


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NODES = _words(
    "Template Output TemplateData For If Macro CallBlock FilterBlock With Assign AssignBlock Break Continue Scope Name NSRef Const Tuple "
    "List Dict Pair Keyword CondExpr Filter Test Call Getitem Getattr Slice Concat Compare Operand Add Sub Mul Div FloorDiv Mod Not Neg "
    "Pos And Or"
)
FILTERS = _words(
    "abs batch capitalize count d default dictsort e escape first float forceescape format groupby indent int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string striptags sum title tojson trim "
    "truncate unique upper urlencode wordcount wordwrap xmlattr"
)
TESTS = _words(
    "boolean callable defined divisibleby eq equalto escaped even false float ge greaterthan gt in integer iterable le lessthan lower lt "
    "mapping ne none number odd sameas sequence string true undefined upper == != > >= < <="
)
FUNCTIONS = _words("range dict namespace cycler joiner raise_exception strftime_now loop caller")
METHODS = _words(
    "append capitalize copy count cycle changed endswith extend find get index insert isalnum isalpha isdecimal isdigit islower "
    "isnumeric isspace isupper items join keys lower lstrip next partition pop removeprefix removesuffix replace reset rfind rindex "
    "rpartition rsplit rstrip setdefault split splitlines startswith strip title update upper values"
)
NUMBERS = _words("abs count float int length round wordcount")  # filters that give a number
# Filters and methods that return their input, or pieces of it.
PIECE_FILTERS = _words(
    "d default dictsort first items last list max min reverse slice batch sort unique map select selectattr reject rejectattr"
)
PIECE_METHODS = _words("copy get items keys values pop split rsplit splitlines strip lstrip rstrip partition rpartition")
BY_NAME = _words("map selectattr rejectattr groupby sort sum unique min max")  # filters that take the name of an attribute
INTO = _words("append extend insert update setdefault")  # methods that put their arguments into what they belong to
LOOP_NUMBERS = _words("index index0 revindex revindex0 length depth depth0")


def asks_for(template: str) -> list[str]:
    """What `template` asks for beyond what chat templates use, each as the end of "it asks for ...", without repetition, in order.

    Empty for a template that only writes text out of messages. A template that can't be parsed, or is longer than any, asks for that.
    """
    if len(template) > LONGEST_TEMPLATE:
        return [f"a parser that reads {len(template):,} characters, where others have some thousands"]
    from jinja2 import TemplateSyntaxError

    try:
        return list(dict.fromkeys(_Reader(_environment().parse(template)).findings()))
    except TemplateSyntaxError as error:
        return [f"another language than Jinja's: line {error.lineno}: {str(error.message)[:200]}"]
    except (ArithmeticError, RecursionError, ValueError) as error:  # of numbers and nesting without end
        return [f"more than a parser can give: {type(error).__name__}"]


@cache
def _environment() -> Environment:
    """Jinja with the tags that transformers adds: `generation`, `break`, `continue`."""
    from jinja2 import Environment
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as Jinja has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])


def internal(name: str) -> bool:
    """Whether an attribute, or one of several as a filter takes them, leads out of the data: into Python's own objects."""
    from jinja2 import sandbox

    own = sandbox.UNSAFE_FUNCTION_ATTRIBUTES | sandbox.UNSAFE_METHOD_ATTRIBUTES | sandbox.UNSAFE_GENERATOR_ATTRIBUTES
    own = own | sandbox.UNSAFE_COROUTINE_ATTRIBUTES | sandbox.UNSAFE_ASYNC_GENERATOR_ATTRIBUTES
    return any(part.startswith("_") or part in own or part in ("mro", "format_map") for part in re.split("[.,]", name))


@dataclass
class _Reader:
    """One template. `values` has, by name, every expression that may give it its value: a subscript must not be a text that is built."""

    tree: nodes.Template
    macros: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)  # names that the template gives a value to
    values: defaultdict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    built: set[str] = field(default_factory=set)  # names whose value may be a text that the template puts together
    numeric: set[str] = field(default_factory=set)

    def findings(self) -> Iterator[str]:
        from jinja2 import nodes

        self._collect()
        for node in _walk(self.tree):
            kind = type(node).__name__
            if kind not in NODES:
                yield f"`{kind.lower()}`"
            elif isinstance(node, nodes.Getattr):
                yield from self._name(node.attr)
            elif isinstance(node, nodes.Getitem):
                yield from self._subscript(node.arg)
            elif isinstance(node, nodes.Keyword | nodes.NSRef):
                yield from self._name(node.key if isinstance(node, nodes.Keyword) else node.attr)
            elif isinstance(node, nodes.Name):
                known = node.name in self.own or node.name in self.macros
                if node.ctx == "load" and not known and (internal(node.name) or node.name in ("self", "super", "lipsum")):
                    yield shown(node.name)
            elif isinstance(node, nodes.Filter):
                yield from self._filter(node)
            elif isinstance(node, nodes.Test) and node.name not in TESTS:
                yield f"the test {shown(node.name)}"
            elif isinstance(node, nodes.Call):
                yield from self._call(node)

    def _collect(self) -> None:
        """Where the names get their values from, and which of them may be texts put together: a fixed point."""
        from jinja2 import nodes

        macros = [node for node in _walk(self.tree) if isinstance(node, nodes.Macro)]
        self.macros = {macro.name for macro in macros}
        for macro in macros:
            for argument in macro.args:  # whatever any call gives to the macro
                self.values[argument.name].append(nodes.Name(f"{macro.name}()", "load"))
            for rest in ("varargs", "kwargs"):
                self.values[rest].append(nodes.Name(f"{macro.name}()", "load"))
            self.values[f"{macro.name}()"] += macro.defaults
        for node in _walk(self.tree):
            match node:
                case nodes.Assign():
                    self._assign(node.target, node.node)
                case nodes.AssignBlock():
                    self._assign(node.target, nodes.Concat([]))
                case nodes.For():
                    self._assign(node.target, node.iter)
                    self.values[".previtem"].append(node.iter)
                    self.values[".nextitem"].append(node.iter)
                    if node.recursive:
                        self._assign(node.target, nodes.Name("loop()", "load"))
                case nodes.With():
                    for target, value in zip(node.targets, node.values, strict=True):
                        self._assign(target, value)
                case nodes.CallBlock():
                    for argument in node.args:
                        self._assign(argument, nodes.Name("caller()", "load"))
                case nodes.Call(node=nodes.Name(name="namespace")):
                    for keyword in node.kwargs:
                        self.values[f".{keyword.key}"].append(keyword.value)
                case nodes.Call(node=nodes.Name() as called):
                    self.values[f"{called.name}()"] += _given(node)
        self.own = {*self.values}
        for node in _walk(self.tree):
            if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) and node.node.attr in INTO:
                self._put(node.node.node, nodes.List(_given(node)))
        self.numeric = {name for name, values in self.values.items() if values}
        for _ in range(PASSES):
            lost = {name for name in self.numeric if not all(map(self._number, self.values[name]))}
            found = {name for name in self.values.keys() - self.built if any(map(self._built, self.values[name]))}
            self.numeric -= lost
            self.built = self.built | found if not lost else set()  # what was a number yesterday may be a text
            if not lost and not found:
                return
        raise RecursionError

    def _assign(self, target: Any, value: Any) -> None:
        from jinja2 import nodes

        if isinstance(target, nodes.Tuple | nodes.List):
            for item in target.items:
                self._assign(item, value)
        else:
            self.values[f".{target.attr}" if isinstance(target, nodes.NSRef) else target.name].append(value)

    def _put(self, target: Any, value: Any) -> None:
        """A list or dict gets `value` into it."""
        from jinja2 import nodes

        while isinstance(target, nodes.Getitem):
            target = target.node
        if isinstance(target, nodes.Name | nodes.Getattr):
            self.values[target.name if isinstance(target, nodes.Name) else f".{target.attr}"].append(value)

    def _name(self, name: str) -> Iterator[str]:
        if internal(name):
            yield shown(name)

    def _subscript(self, node: Any) -> Iterator[str]:
        from jinja2 import nodes

        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield from self._name(node.value)
        elif not isinstance(node, nodes.Slice) and self._built(node):
            yield "an attribute whose name it puts together"

    def _filter(self, node: Any) -> Iterator[str]:
        from jinja2 import nodes

        if node.name not in FILTERS:
            yield f"the filter {shown(node.name)}"
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            yield "arguments that it unpacks"
        keys = [keyword.value for keyword in node.kwargs if keyword.key == "attribute"]
        first = node.args[0] if node.args else None
        if node.name in ("select", "reject", "map") and first is not None:
            known = FILTERS if node.name == "map" else TESTS
            if not isinstance(first, nodes.Const) or first.value not in known:
                yield f"{'the filter' if node.name == 'map' else 'the test'} {_text(first)}"
            if node.name == "map" and isinstance(first, nodes.Const) and first.value in BY_NAME:
                keys += node.args[1:]
            keys += node.args[2:] if isinstance(first, nodes.Const) and first.value == "join" else []
        elif node.name in BY_NAME or node.name == "join":
            keys += node.args[node.name == "join" :]
        if node.name in ("selectattr", "rejectattr") and len(node.args) > 1:
            keys = node.args[:1]
            if not isinstance(node.args[1], nodes.Const) or node.args[1].value not in TESTS:
                yield f"the test {_text(node.args[1])}"
        for key in keys:
            yield from self._subscript(key)

    def _call(self, node: Any) -> Iterator[str]:
        from jinja2 import nodes

        if node.dyn_args is not None or node.dyn_kwargs is not None:
            yield "arguments that it unpacks"
        called = node.node
        if isinstance(called, nodes.Getattr):
            if called.attr not in METHODS and not internal(called.attr):
                yield f"the method {shown(called.attr)}"
        elif isinstance(called, nodes.Name):
            if called.name not in FUNCTIONS and called.name not in self.macros:
                yield f"the function {shown(called.name)}"
        elif not (isinstance(called, nodes.Getitem) and isinstance(called.arg, nodes.Const) and called.arg.value in METHODS):
            yield "a call of what it looks up"

    def _number(self, node: Any) -> bool:
        """Whether `node` can be nothing but a number."""
        from jinja2 import nodes

        match node:
            case nodes.Const():
                return not isinstance(node.value, str)
            case nodes.Name():
                return node.name in self.numeric
            case nodes.Getattr():
                loop = isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in LOOP_NUMBERS
                return loop or f".{node.attr}" in self.numeric
            case nodes.Filter():
                return node.name in NUMBERS
            case nodes.Call():
                return isinstance(node.node, nodes.Name) and node.node.name == "range"
            case nodes.Sub() | nodes.Div() | nodes.FloorDiv() | nodes.Neg() | nodes.Pos():
                return True  # of texts they are errors
            case nodes.Add() | nodes.Mod():
                return self._number(node.left)  # a number and a text together are an error
            case nodes.Mul():
                return self._number(node.left) and self._number(node.right)
            case nodes.CondExpr():
                return all(map(self._number, (node.expr1, node.expr2)))
        return False

    def _built(self, node: Any) -> bool:
        """Whether `node` may be, or hold, a text that the template puts together, or one that begins with an underscore."""
        from jinja2 import nodes

        if node is None or self._number(node):
            return False
        match node:
            case nodes.Const():
                return isinstance(node.value, str) and ("__" in node.value or internal(node.value))
            case nodes.Name():  # the special tokens come from the files of the model
                return node.name in self.built | self.macros or (node.name.endswith("_token") and node.name not in self.values)
            case nodes.Getattr():
                return f".{node.attr}" in self.built or self._built(node.node)
            case nodes.Getitem():
                key = f".{node.arg.value}" if isinstance(node.arg, nodes.Const) else ""
                return key in self.built or self._built(node.node) or self._own_text(node.node)
            case nodes.Tuple() | nodes.List():
                return any(map(self._built, node.items))
            case nodes.Add() if any(isinstance(side, nodes.List) for side in (node.left, node.right)):
                return self._built(node.left) or self._built(node.right)
            case nodes.Dict():
                return any(self._built(pair.key) or self._built(pair.value) for pair in node.items)
            case nodes.CondExpr():
                return self._built(node.expr1) or self._built(node.expr2)
            case nodes.And() | nodes.Or():
                return self._built(node.left) or self._built(node.right)
            case nodes.Compare() | nodes.Not() | nodes.Test():
                return False
            case nodes.Filter():
                turned = node.name == "reverse" and self._own_text(node.node)
                return turned or node.name not in PIECE_FILTERS or any(map(self._built, (node.node, *_given(node))))
            case nodes.Call(node=nodes.Getattr() as called):
                own = called.attr not in PIECE_METHODS or self._own_text(called.node)
                return own or any(map(self._built, (called.node, *_given(node))))
            case nodes.Call(node=nodes.Name() as called):
                return called.name in self.macros or any(map(self._built, _given(node)))
        return True

    def _own_text(self, node: Any) -> bool:
        """Whether `node` is a text that stands in the template, of which a piece may be a name."""
        from jinja2 import nodes

        every = self.values[node.name] if isinstance(node, nodes.Name) and node.name in self.values else [node]
        return any(isinstance(each, nodes.Const) and isinstance(each.value, str) for each in every)


def _walk(node: nodes.Node) -> Iterator[nodes.Node]:
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(list(node.iter_child_nodes()))


def _given(call: Any) -> list[Any]:
    return [*call.args, *(keyword.value for keyword in call.kwargs)]


def _text(node: Any) -> str:
    return shown(str(node.value)) if hasattr(node, "value") else "whose name it puts together"
