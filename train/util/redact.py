"""Keeps secrets out of what is written: the terminal, logs, a run's folder, W&B.

What counts as one: the value of an environment variable whose name ends like a secret's (``WANDB_API_KEY``, ``HF_TOKEN``), the
user and password in a URL (``s3://key:secret@bucket``), a signature or key in its query, and what is given to a key whose name
ends like that (``wandb.key=...``). They still work; they are just not shown.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

HIDDEN = "[hidden]"
MIN_LENGTH = 6
"""Characters: a shorter value of a variable would blank out words that only look like it."""
SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
RULES = (
    # scheme://user:password@ (a password may hold slashes) and scheme://token@; as a path, such a URL loses a slash
    (re.compile(r"(\w[\w+.-]*:/+)(?:[^\s'\"@/]*:[^\s'\"@]*|[^\s'\"@/]+)@"), rf"\1{HIDDEN}@"),
    # ?X-Amz-Signature=... &token=...
    (
        re.compile(
            r"([?&][\w.-]*(?:key|token|secret|password|signature|credential|sig)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
    # wandb.key=... --password=... but not data.text_key=... and data.label_key=...
    (
        re.compile(
            r"((?:(?<!text)(?<!label)[._-]key|token|secret|password|passwd|passphrase)=)[^\s'\",\]]+", re.IGNORECASE
        ),
        rf"\1{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """``text`` without the secrets in it."""
    for name, value in os.environ.items():
        if len(value) >= MIN_LENGTH and value in text and SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for rule, instead in RULES:
        text = rule.sub(instead, text)
    return text


def redact_tree(value: Any) -> Any:
    """Plain values, with every string in them redacted."""
    if isinstance(value, dict):
        return {key: redact_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def redact_output() -> None:
    """Has all that Python code of this process, and of its forks, prints pass through ``redact``, tracebacks and libraries' logs
    included.
    """
    for stream in (sys.stdout, sys.stderr):
        write = stream.write
        stream.write = lambda text, write=write: write(redact(text))  # type: ignore[method-assign]
