"""The token of a cluster: a file that only its user can read, never shown, logged or an argument.

A lasting cluster uses the file that Ray's own tools know, so that they and we can be used side by side. A cluster of
one job has a token of its own in the job's private folder.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cluster.raycluster import ray_internals
from train.errors import UserError

DEFAULT_PATH = "~/.ray/auth_token"
MODES = ("token", "disabled")
"""Ray's words for whether a cluster asks its clients for a token, in letters of either case."""
LOOPBACK = "127.0.0.1"
"""A cluster that listens here is reached from this host only."""


def token_path() -> Path:
    """The file of this user's token, which need not exist: ``RAY_AUTH_TOKEN_PATH``, or Ray's default."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or DEFAULT_PATH).expanduser()


def create_token(path: Path) -> None:
    """Writes a new token to ``path``, which only this user can read. An existing one is checked and kept."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_token(path, secrets.token_hex(32)) if not path.exists() else check_token(path)


def write_token(path: Path, token: str) -> None:
    """Writes ``token`` to ``path`` atomically, readable by this user only from its first byte on."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600, exist_ok=False)
    new.write_text(token, encoding="utf-8")
    new.replace(path)


def check_token(path: Path) -> None:
    """Raises UserError where there is no token, or where others can read it."""
    if not path.is_file():
        raise UserError(
            f"this host has no token: copy {DEFAULT_PATH} of the host where `./launch.sh cluster up` was said "
            f"to {path} here, readable by you only (mode 600)"
        )
    if path.stat().st_mode & 0o077:
        raise UserError(
            f"{path} can be read by others: chmod 600 {path}, and make a new one if that has been so for long"
        )


def authenticate(path: Path | None, address: str) -> None:
    """Has this process, and those that it starts, use the token in ``path`` with the cluster at ``address``.

    ``path`` None: the token that this user has, if any. It is named by its file and never put into the environment,
    which every worker can see. UserError where ``RAY_AUTH_MODE`` is a word that Ray would silently take for "disabled".
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if path is None and mode is not None and mode.lower() not in MODES:
        raise UserError(f"RAY_AUTH_MODE={mode} is neither {' nor '.join(MODES)}: set one of them, or unset it")
    if path is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)})
    elif "RAY_AUTH_MODE" not in os.environ and ray_internals.has_auth_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    if address.startswith(LOOPBACK):
        ray_internals.allow_loopback_cluster()
    ray_internals.reread_environment()
    ray_internals.forget_auth_token()
