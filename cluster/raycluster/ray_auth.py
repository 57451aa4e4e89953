"""The token of a cluster: a file that only its user can read. It is never shown, logged, saved in a run, or put in an argument.

A lasting cluster uses the place that Ray's own tools know, so that they and we can be used side by side; a job's private
cluster has a token of its own in the job's folder.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from train.errors import UserError

PLACE = "~/.ray/auth_token"


def place() -> Path:
    """Where this user's token is, or would be: ``RAY_AUTH_TOKEN_PATH``, or Ray's own place."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or PLACE).expanduser()


def make(path: Path) -> None:
    """Writes a new token to ``path``, which only this user can read; one that is there already stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write(path, secrets.token_hex(32)) if not path.exists() else check(path)


def write(path: Path, token: str) -> None:
    """Writes ``token`` to ``path``, whole and readable by this user only from its first byte on."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600, exist_ok=False)
    new.write_text(token)
    new.replace(path)


def check(path: Path) -> None:
    """Raises UserError where there is no token, or where others can read it."""
    if not path.is_file():
        raise UserError(
            f"this host has no token: copy {PLACE} of the host where `./launch.sh cluster up` was said to {path} here, "
            f"readable by you only (mode 600)"
        )
    if path.stat().st_mode & 0o077:
        raise UserError(
            f"{path} can be read by others: chmod 600 {path}, and make a new one if that has been so for long"
        )


def use(path: Path) -> dict[str, str]:
    """The environment that has Ray's processes ask for the token in ``path``, and send it."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
