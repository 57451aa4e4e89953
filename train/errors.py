"""The two ways a run ends early that are nobody's bug."""

from __future__ import annotations

import errno


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and the cure. The command exits with 2."""


class NotFinite(UserError):  # noqa: N818  it says what the numbers are
    """The numbers of the run are infinite, not numbers, or far too high, again and again: it diverges."""


class Stopped(Exception):  # noqa: N818  it is not an error
    """The run was asked to stop, finished its step and saved. The command exits with 75."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing that are nobody's fault but the place's."""


def no_room(error: OSError) -> str:
    """What a user is told when the run's folder takes no more."""
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"the run's folder takes no more: {error.strerror}{where}. Checkpoints that are there are untouched. "
        "Make room, then give the same command: the run goes on from the newest one."
    )
