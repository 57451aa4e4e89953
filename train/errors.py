"""Exit codes of every command, and the exceptions by which a run ends early without a bug."""

from __future__ import annotations

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line and of each rank's process; scripts and batch systems rely on them."""

    OK = 0
    FAILURE = 1
    BAD_INPUT = 2
    STOPPED = 75
    """Stopped on request and saved (EX_TEMPFAIL of sysexits.h): the same command goes on."""
    INTERRUPTED = 130
    """Ended by SIGINT with nothing saved (128 + 2, as shells report it)."""


class UserError(Exception):
    """Bad input: the message says what is wrong, where, and the cure. The command exits with 2."""


class NotFinite(UserError):  # noqa: N818  it says what the numbers are
    """The numbers of the run are infinite, not numbers, or far too high, again and again: it diverges."""


class Stopped(Exception):  # noqa: N818  it is not an error
    """The run was asked to stop, finished its step and saved. The command exits with 75."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""errno values that mean the disk is full or read-only."""


def no_room(error: OSError) -> str:
    """The message for a run folder on a disk that is full or read-only."""
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"the run's folder takes no more: {error.strerror}{where}. Checkpoints that are there are untouched. "
        "Make room, then give the same command: the run goes on from the newest one."
    )
