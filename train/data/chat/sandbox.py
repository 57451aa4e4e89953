"""Jinja templates from outside, rendered without code of theirs: a few methods, filters and functions, bounded output
and time.

Attributes are looked up as keys; of methods only those of strings and mappings that templates use are there, and none
by which Python's own objects are reached. Every round of a loop and call of a macro looks at the clock; what may grow
(concatenation, repetition, joining) looks at the length.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_CHARACTERS = 1 << 24
"""Of what a template makes of one conversation."""
MOST_SECONDS = 5.0
"""For one conversation."""
BEGIN_MARK, END_MARK = "\ue0f0", "\ue0f1"
"""Characters of private use around what ``{% generation %}`` encloses; the text of a conversation has none of them."""

_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        ("strip", "lstrip", "rstrip", "startswith", "endswith", "split", "upper", "lower", "title", "capitalize")
    ),
    dict: frozenset(("items", "keys", "values", "get")),
    LoopContext: frozenset(
        ("index", "index0", "first", "last", "length", "revindex", "revindex0", "previtem", "nextitem", "depth")
    ),
}
_FILTERS = (
    *("trim", "upper", "lower", "title", "capitalize", "length", "count", "default", "d", "list", "first", "last"),
    *("map", "select", "selectattr", "reject", "rejectattr", "items", "dictsort", "string", "int", "safe", "abs"),
)


class TemplateError(Exception):
    """A template that cannot be read, raises, or makes too much; the message says what, without the place."""


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own form

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return BEGIN_MARK + caller() + END_MARK


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; ``begin`` starts its clock."""

    intercepted_binops = frozenset(("+", "*", "%", "**"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.filters |= {"tojson": _to_json, "join": self._join, "replace": self._replace}
        self.globals = {
            "range": self.globals["range"],
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "_tick": self._tick,
            "_bounded": self._bounded,
        }
        self._end = 0.0

    def begin(self) -> None:
        self._end = time.monotonic() + MOST_SECONDS

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, Namespace):
            return not attr.startswith("_")
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def wrap_str_format(self, value: Any) -> Any:
        return None  # no str.format: a width in it makes a text of any length

    def is_safe_callable(self, obj: Any) -> bool:
        return True  # what can be reached is what is listed here, macros, and methods of _METHODS

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "%" and isinstance(left, str)):
            raise TemplateError(f"uses {operator!r}, which templates may not")
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise TemplateError("repeats a text or a list by '*', which templates may not")
        if isinstance(left, int) and abs(left) > 1 << 62:
            raise TemplateError("computes with a number that is too large")
        return self._bounded(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        owners: list[Any] = [*tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))]
        for owner in owners:
            tick = nodes.Call(nodes.Name("_tick", "load"), [], [], None, None)
            owner.body.insert(0, nodes.Output([tick]))
        _bound_concatenation(tree)
        for node in tree.find_all(nodes.Node):
            node.set_environment(self)
            node.lineno = node.lineno or 1  # those that were put in have none
        return tree

    def _tick(self) -> str:
        if time.monotonic() > self._end:
            raise TemplateError(f"takes more than {MOST_SECONDS:g} s for one conversation")
        return ""

    def _bounded(self, value: Any) -> Any:
        self._tick()
        if isinstance(value, str | list | tuple) and len(value) > MOST_CHARACTERS:
            raise TemplateError(f"makes more than {MOST_CHARACTERS:,} characters of one conversation")
        return value

    def _join(self, values: Any, separator: str = "") -> str:
        return str(self._bounded(str(separator).join(map(str, values))))

    def _replace(self, text: Any, old: str, new: str) -> str:
        text = str(text)
        if not old or text.count(old) * len(new) > MOST_CHARACTERS:
            raise TemplateError("replaces nothing, or by too much")
        return text.replace(old, new)


def _bound_concatenation(node: nodes.Node) -> None:
    """Have every ``a ~ b`` below a node look at the length of its result."""
    for field, value in node.iter_fields():
        children = value if isinstance(value, list) else [value]
        for number, child in enumerate(children):
            if not isinstance(child, nodes.Node):
                continue
            _bound_concatenation(child)
            if isinstance(child, nodes.Concat):
                bounded = nodes.Call(nodes.Name("_bounded", "load"), [child], [], None, None)
                if isinstance(value, list):
                    value[number] = bounded
                else:
                    setattr(node, field, bounded)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """As the filter of transformers: no escapes for HTML, and other letters than ASCII as they are."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError(f"indents JSON by {indent}")
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: Any) -> None:
    raise TemplateError(f"refuses it: {str(message)[:300]}")


class CompiledTemplate:
    """A template, compiled; ``render`` may be called again and again."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError where the source is no template."""
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"is no Jinja template: {error.message} (line {error.lineno})") from None
        except RecursionError:
            raise TemplateError("is nested too deep") from None
        self.marks_generation = "generation" in {token for _, kind, token in self._tags(source) if kind == "name"}

    def _tags(self, source: str) -> Iterator[tuple[int, str, str]]:
        return self._environment.lex(source)

    def literals(self, source: str) -> list[str]:
        """Texts that the template writes as they stand, and the string constants in its expressions."""
        return [token for _, kind, token in self._tags(source) if kind in ("data", "string")]

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of a conversation. Raises TemplateError for whatever goes wrong in the template."""
        self._environment.begin()
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                size += len(part)
                self._environment._bounded("")
                if size > MOST_CHARACTERS:
                    raise TemplateError(f"makes more than {MOST_CHARACTERS:,} characters of one conversation")
        except TemplateError:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise TemplateError(f"fails at it: {str(error)[:300]}") from None
        except (RecursionError, MemoryError):
            raise TemplateError("calls itself without end") from None
        return "".join(parts)
