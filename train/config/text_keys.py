"""Values of keys of text, taken as they were typed where Hydra's grammar does not know their characters.

Hydra reads ``run.name=lr=3e-4`` and ``data.paths=[语料.txt]`` as errors, and ``run.name=007`` as a number. A key whose
type is text means the characters themselves; a list of text is split at its commas.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from train.config.schema import CommandLine, Section

TextKind = Literal["text", "list"]
ELEMENT = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)'|([^,]*?))\s*(?:,|$)""", re.DOTALL)
"""An element of a list, in either quotes or bare up to the next comma."""
ESCAPES = re.compile(r"""(\\+)(?=["']|$)""")
"""Backslashes before a quote or the end of a quoted element: two stand for one, as in Hydra."""


def text_keys(section: type[BaseModel] = CommandLine, prefix: str = "") -> dict[str, TextKind]:
    """Keys whose value is text, or a list of text."""
    kinds: dict[str, TextKind] = {}
    for name, field in section.model_fields.items():
        key, leaves = prefix + (field.alias or name), list(_leaves(field.annotation))
        for inner in leaves:
            if isinstance(inner, type) and issubclass(inner, Section):
                kinds |= text_keys(inner, key + ".")
        if any(get_origin(leaf) is list and str in _leaves(get_args(leaf)[0]) for leaf in leaves):
            kinds[key] = "list"
        elif str in leaves and not {int, float, bool} & set(leaves):
            kinds[key] = "text"
    return kinds


def _leaves(annotation: Any) -> Iterator[Any]:
    """The members of a union, of which an annotated type is its bare one; a list stays whole."""
    if get_origin(annotation) in (None, list, dict, Literal):
        yield annotation
        return
    for argument in get_args(annotation):
        if get_origin(argument) is not None or isinstance(argument, type):
            yield from _leaves(argument)


def typed_value(kind: TextKind, typed: str, parsed: Any) -> str | list[str] | None:
    """``typed`` as its key means it, where Hydra's ``parsed`` is another thing (None: it cannot parse it).

    None where Hydra's reading stands: text, quoted text, null and interpolations.
    """
    typed = typed.strip()
    if kind == "text":
        return typed if parsed is UNPARSED or isinstance(parsed, int | float) else None
    if not (typed.startswith("[") and typed.endswith("]")):
        return typed if parsed is UNPARSED else None
    plain = parsed is UNPARSED or (isinstance(parsed, list) and any(isinstance(x, int | float) for x in parsed))
    return split_list(typed[1:-1]) if plain else None


UNPARSED = object()
"""Stands for the value of an override that Hydra's grammar refuses."""


def split_list(inner: str) -> list[str]:
    """The elements of a list between its brackets."""
    elements, at = [], 0
    while at < len(inner):
        match = ELEMENT.match(inner, at)
        assert match is not None  # a bare element takes anything
        double, single, bare = match.groups()
        inside = double if double is not None else single
        elements.append(bare if bare is not None else ESCAPES.sub(lambda run: run[0][: len(run[0]) // 2], inside))
        at = match.end()
    return elements


def quoted(key: str, text: str) -> str:
    """The words of a shell that give ``key`` the value ``text``, whatever characters that has."""
    escaped = re.sub(r'\\+(?="|$)', lambda run: run[0] * 2, text).replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')
