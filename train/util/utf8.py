"""UTF-8 for all text of a process and its children, whatever the locale: names, arguments, pipes, files of libraries.

Our own files name their encoding, which `tests/test_architecture.py` holds. Imports nothing that takes time.
"""

from __future__ import annotations

import locale
import os
import sys


def use_utf8() -> None:
    """Begin this process anew in Python's UTF-8 mode, unless it is in it or the locale is one of UTF-8.

    What a terminal cannot show is replaced. Standard input that is not UTF-8 raises UnicodeDecodeError when it is read.
    """
    is_utf8 = sys.flags.utf8_mode or locale.getencoding().lower() in ("utf-8", "utf8")
    if not is_utf8 and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if sys.stdin is not None:
        sys.stdin.reconfigure(errors="strict")  # type: ignore[union-attr]
    os.environ.pop("PYTHONIOENCODING", None)  # of this terminal: the children write to our pipes and files
