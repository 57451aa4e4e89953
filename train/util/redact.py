"""Redaction of secrets in all that is written: the terminal, logs, a run's folder, W&B.

Secrets are: the value of an environment variable whose name ends like a secret's (``WANDB_API_KEY``, ``HF_TOKEN``), the
user and password in a URL (``s3://key:secret@bucket``), a signature or key in its query, and the value of a key whose
name ends like that (``wandb.key=...``). Only what is written is changed: the process still uses them.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

HIDDEN = "[hidden]"
MIN_LENGTH = 6
"""Characters of a variable's value below which it is not redacted: short values occur in ordinary text."""
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
    # wandb.key=... --password=... but not data.text_key=..., data.label_key=..., data.name_key=...
    (
        re.compile(
            r"((?:(?<!text)(?<!label)(?<!name)[._-]key|token|secret|password|passwd|passphrase)=)[^\s'\",\]]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """``text`` with the secrets in it replaced by HIDDEN."""
    for name, value in os.environ.items():
        if len(value) >= MIN_LENGTH and value in text and SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for rule, instead in RULES:
        text = rule.sub(instead, text)
    return text


def redact_tree(value: Any) -> Any:
    """A tree of dicts and lists, with every string in it redacted."""
    if isinstance(value, dict):
        return {key: HIDDEN if _names_secret(key, inner) else redact_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_tree(inner) for inner in value]
    return redact(value) if isinstance(value, str) else value


def _names_secret(key: Any, value: Any) -> bool:
    """Whether an entry is a secret of the environment; keys of the configuration, in small letters, name columns."""
    return isinstance(key, str) and isinstance(value, str) and key.isupper() and bool(SECRET_NAME.search(key))


if __name__ == "__main__":  # a filter, for launch.sh
    shown = redact(sys.stdin.buffer.read().decode("utf-8", "surrogateescape"))  # an argument may be any bytes
    sys.stdout.buffer.write(shown.encode("utf-8", "surrogateescape"))
