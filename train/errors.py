"""Exit codes of every command, and the exceptions by which a run ends early without a bug."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum

from train.printable import escape_foreign_bytes, printable


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

CURES = {
    **dict.fromkeys(NO_ROOM, "make room there, or name another place"),
    errno.EFBIG: "the file system takes no larger file: name another place",
    errno.ENOENT: "name what is there, or a place where it can be made",
    errno.ENOTDIR: "there is a file where a folder is meant: name another path",
    errno.EISDIR: "there is a folder where a file is meant: name a file",
    errno.EEXIST: "there is something of that name: name another path",
    errno.ENOTEMPTY: "the folder is not empty: name another one",
    errno.EACCES: "get the permission, or name another path",
    errno.EPERM: "get the permission, or name another path",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ELOOP: "its links lead in a circle: name the file itself",
    errno.EINVAL: "this file system does not have it: name another path",
    errno.ENXIO: "there is nothing behind it: name a file",
    errno.ENODEV: "there is nothing behind it: name a file",
    errno.ESTALE: "its server no longer has it: mount it again",
    errno.EIO: "the device fails: copy what can be read, and name the copy",
}
"""errno values that a path of the user's, and no bug, is the reason of -> the cure."""


def bad_input(error: BaseException) -> str | None:
    """The message of an error that the user's input or a place of the user's is the reason of; None for a bug.

    Errors of a file's content are made a UserError where it is read: see ``train.util.reading``.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in CURES and (error.filename or error.errno in NO_ROOM):
        return place_error(error)
    if isinstance(error, UnicodeEncodeError) and any("\udc80" <= c <= "\udcff" for c in error.object):
        return f"'{escape_foreign_bytes(error.object)}' is not UTF-8: convert it, or rename the file that it names"
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return "a path or a name holds a zero byte, which none may have: leave it out"
    return None


def place_error(error: OSError) -> str:
    """The path, the system's reason and the cure: "/x/y: Not a directory (there is a file ...)"."""
    paths = [shown_name(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    cure = CURES.get(error.errno or 0)
    where = f"{' -> '.join(paths)}: " if paths else ""
    return f"{where}{error.strerror or error}" + (f" ({cure})" if cure else "")


def shown_name(name: str | bytes | os.PathLike[str]) -> str:
    """A path on one line of its own characters: what a terminal would obey is an escape, such as ``\\n``."""
    return printable(os.fsdecode(name), one_line=True)


@contextmanager
def guard_verb(arguments: Sequence[str] = ()) -> Iterator[None]:
    """Raise UserError for all that ``bad_input`` knows, and for an argument that is no text: around every verb."""
    refuse_foreign_bytes(arguments)
    try:
        yield
    except Exception as error:
        message = bad_input(error)
        if message is None or isinstance(error, UserError):
            raise
        raise UserError(message) from error


def refuse_foreign_bytes(arguments: Sequence[str]) -> None:
    """Raise UserError for an argument that is not UTF-8: no configuration, log or tokenizer could hold it."""
    for argument in arguments:
        if escape_foreign_bytes(argument) != argument:
            raise UserError(
                f"the argument '{escape_foreign_bytes(argument)}' is not UTF-8 text: "
                "convert it, or rename the file that it names"
            )


def no_room(error: OSError) -> str:
    """The message for a run folder on a disk that is full or read-only."""
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"the run's folder takes no more: {error.strerror}{where}. Checkpoints that are there are untouched. "
        "Make room, then give the same command: the run goes on from the newest one."
    )
