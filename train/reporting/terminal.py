"""Terminals that text of users is printed on: paths, names, prompts, samples and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from train.printable import printable


class UserConsole(Console):
    """A console of rich's that takes text as it is: ``[/v2]`` is no markup, ``:tada:`` no emoji, ESC no command.

    Colours are given by ``Text``. Lines are not wrapped unless asked for.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"highlight": False, "markup": False, "emoji": False, "soft_wrap": True} | options))

    @property
    def is_live(self) -> bool:
        """Whether lines can be drawn anew: on a terminal, but not on one that knows no cursor (TERM=dumb)."""
        return self.is_terminal and not self.is_dumb_terminal

    def render_str(self, text: str, **options: Any) -> Text:
        """The text of a string, made visible before it is measured for a table."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The segments of ``renderable``; control characters in its text are made visible, rich's own stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
