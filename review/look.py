"""How runs are told apart: one colour and one dash for each of a few, a scale from best to worst for many."""

from __future__ import annotations

from collections.abc import Sequence

from review.read import Run

COLOURS = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE")
"""Paul Tol's "bright" scheme: told apart by colour-blind eyes, and seen on white and on black."""
DASHES = ("solid", "dash", "dot")
FEW = len(COLOURS) * len(DASHES)
SCALE = ("#4257C4", "#7A3FA8", "#B33D98", "#E2667F", "#F5A35D", "#F3D250")
"""Best to worst where runs are many: a path of rising lightness, so that it reads without colour too."""


def colours(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(colour, dash) of every run: its own where they are few, else its place by held-out loss."""
    if len(runs) <= FEW:
        return [(COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]) for i in range(len(runs))]
    losses = sorted(loss for run in runs if (loss := run.val_loss) is not None)
    places = {loss: i / max(len(losses) - 1, 1) for i, loss in enumerate(losses)}
    return [(blend(places[loss]) if (loss := run.val_loss) is not None else "#999999", "solid") for run in runs]


def blend(place: float) -> str:
    """The colour at ``place`` of SCALE, 0 for best and 1 for worst."""
    at = place * (len(SCALE) - 1)
    i = min(int(at), len(SCALE) - 2)
    low, high = (tuple(int(SCALE[j][k : k + 2], 16) for k in (1, 3, 5)) for j in (i, i + 1))
    return "#" + "".join(f"{round(a + (b - a) * (at - i)):02X}" for a, b in zip(low, high, strict=True))
