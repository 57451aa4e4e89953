"""The ``key=value`` words of a measurement: its own options, and overrides of the jobs that it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import load as configuration
from train.errors import UserError


@dataclass(frozen=True)
class Option:
    """An option: its value where it is not given, whose type is that of all its values, and what a given one may be."""

    usual: Any
    least: float = -math.inf
    """Of a number, or of each of a list of numbers."""
    choices: tuple[str, ...] = ()

    def parse(self, text: str) -> Any:
        """The value that ``text`` means. Raises ValueError, in words."""
        if isinstance(self.usual, bool):
            if text not in ("true", "false"):
                raise ValueError("it is true or false")
            return text == "true"
        if isinstance(self.usual, tuple):
            return tuple(self._number(int, word) for word in text.split(","))
        if isinstance(self.usual, int | float):
            return self._number(type(self.usual), text)
        if self.choices and text not in self.choices:
            raise ValueError(f"it is one of {', '.join(self.choices)}")
        return text

    def _number(self, kind: type[int] | type[float], text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"'{text}' is no {'whole ' if kind is int else ''}number") from None
        if not math.isfinite(value) or value < self.least:
            raise ValueError(f"{text} is not a number of at least {self.least:g}")
        return value


def parse_options(
    words: Sequence[str], options: Mapping[str, Option], fixed: Sequence[str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The value of every option, and the overrides of the jobs: ``fixed`` and the words that are no options, checked.

    ``fixed`` of None: the measurement starts no job that could be configured, and takes no other words. An option
    ``out`` names a file that results are appended to; it is opened at once, for measuring takes long. Raises UserError.
    """
    others = [word for word in words if word.partition("=")[0] not in options]
    values, problems = {name: option.usual for name, option in options.items()}, []
    for word in words:
        name, equals, text = word.partition("=")
        if name in options:
            try:
                values[name] = options[name].parse(text if equals else "")
            except ValueError as error:
                problems.append(f"{word}: {error}")
        elif fixed is None:
            problems.append(f"{word} is no option: there is {', '.join(options)}")
    if problems:
        raise UserError("\n".join(problems))
    overrides = [*(fixed or ()), *others]
    if fixed is not None:
        configuration.load(overrides)
    if values.get("out"):
        file = Path(values["out"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("ab").close()
    return values, overrides
