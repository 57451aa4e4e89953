"""Mutations of a file: of its structure (JSON, YAML, lines of JSON) and of its bytes. A function of the seed alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import yaml

SCALARS: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        255,
        2**31,
        2**32 - 1,
        2**53 + 1,
        2**60,
        2**63,
        -(2**63),
        2**64,
        -(10**30),
        10**400,
    ),
    *(0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        " ",
        "0",
        "-1",
        "1e9",
        "nan",
        "null",
        "x" * 300,
        "ab" * 5000,
        "\x00",
        "\ud800",
        "a\udcff",
        "\u202e",
        "\ufeff",
    ),
    *("../../../etc/passwd", "/etc/passwd", "/dev/zero", ".", "..", "[/x]", "${x}", "%s", "{0}", "*", "\n", "\u2028"),
)
WORDS = (
    b"null",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"[[[[",
    b"{{{{",
    b"\\ud800",
    b"\\u0000",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x00" * 8,
)
BORDERS = (
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\x00" * 4,
    b"\x80" + b"\x00" * 7,
    (1 << 60).to_bytes(8, "little"),
)
DEEP = 3000

Mutation = Callable[[random.Random, bytes], bytes]


def of_bytes(draw: random.Random, content: bytes) -> bytes:
    """One to four of: truncation, flips, zero runs, splices, repeats, numbers at the borders of their types."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randint(0, len(data))
        match draw.randrange(8):
            case 0:
                del data[at:]
            case 1 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 2:
                data[at : at + draw.choice((1, 8, 64))] = bytes(draw.choice((1, 8, 512)))
            case 3:
                other = draw.randint(0, len(data))
                data[at:at] = data[other : other + draw.choice((1, 16, 600))]
            case 4:
                del data[at : at + draw.choice((1, 4, 40))]
            case 5:
                data[at:at] = draw.choice(WORDS)
            case 6:
                border = draw.choice(BORDERS)
                data[at : at + len(border)] = border
            case _:
                data[at:at] = draw.randbytes(draw.choice((1, 2, 9)))
    return bytes(data)


def of_tree(draw: random.Random, tree: Any) -> Any:
    """A tree of plain values with one to three nodes replaced, removed, renamed, repeated or wrapped, in place."""
    for _ in range(draw.randint(1, 3)):
        inner: Any = tree
        while True:
            keys: Sequence[Any] = (
                list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
            )
            if not keys:
                tree = draw.choice(SCALARS) if inner is tree else tree
                break
            key = draw.choice(keys)
            if isinstance(inner[key], dict | list) and inner[key] and draw.random() < 0.75:
                inner = inner[key]
                continue
            _change(draw, inner, key)
            break
    return tree


def _change(draw: random.Random, inner: Any, key: Any) -> None:
    """Change one entry of a dict or a list."""
    match draw.randrange(10):
        case 0:
            del inner[key]
        case 1:
            inner[key] = [inner[key]]
        case 2:
            inner[key] = {draw.choice(("a", "", "step", str(inner[key])[:40])): inner[key]}
        case 3 if isinstance(inner, dict):
            inner[draw.choice(("", "x", str(key) * 2, "\ud800", "../" + str(key)))] = inner.pop(key)
        case 3 | 4 if isinstance(inner, list):
            inner += inner[: draw.choice((1, 3, 200))]
        case 5:
            inner[key] = [draw.choice(SCALARS) for _ in range(draw.randrange(5))]
        case 6 if isinstance(inner[key], int | float) and not isinstance(inner[key], bool):
            inner[key] = draw.choice(
                (-inner[key], inner[key] + 1, inner[key] * 2**40, str(inner[key]), float(inner[key] % 2**40))
            )
        case 7:
            inner[key] = draw.choice(({}, []))
        case _:
            inner[key] = draw.choice(SCALARS)


def _break_text(draw: random.Random, text: str) -> str:
    """Sometimes what no tree can say: nesting beyond the parser's, keys twice, a literal that is no JSON."""
    match draw.randrange(40):
        case 0:
            opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
            at = max(0, text.rfind(":", 0, draw.randint(1, len(text)))) + 1 if text else 0
            return f"{text[:at]}{opening * DEEP}1{closing * DEEP}{text[at:]}"
        case 1 if '{"' in text and '",' in text.partition('{"')[2]:
            begin = text.index('{"') + 1
            return text[:begin] + text[begin : text.index('",', begin) + 2] + text[begin:]
        case 2:
            return "\ufeff" + text
        case 3:
            return text.replace("1", "9" * draw.choice((20, 5000)), 1)
    return text


def json_file(draw: random.Random, content: bytes) -> bytes:
    """A JSON file, mutated in structure, or in its bytes one time in four."""
    if draw.random() < 0.25:
        return of_bytes(draw, content)
    text = json.dumps(of_tree(draw, json.loads(content)), ensure_ascii=draw.random() < 0.5)
    return _break_text(draw, text).encode("utf-8", "surrogatepass")


def json_lines(draw: random.Random, content: bytes) -> bytes:
    """A JSON Lines file: some of its lines mutated as JSON, dropped, repeated, cut or exchanged."""
    lines = content.splitlines()
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        match draw.randrange(8):
            case 0:
                lines[at] = of_bytes(draw, lines[at])
            case 1:
                lines.insert(at, lines[draw.randrange(len(lines))])
            case 2 if len(lines) > 1:
                del lines[at]
            case _:
                with_quotes = lines[at] if lines[at][:1] in (b"{", b"[") else b"{}"
                try:
                    lines[at] = json_file(draw, with_quotes)
                except (ValueError, RecursionError):  # a mutation before has made it no JSON
                    lines[at] = of_bytes(draw, lines[at])
    return b"\n".join(lines) + (b"\n" if draw.random() < 0.9 else b"")


def yaml_file(draw: random.Random, content: bytes) -> bytes:
    """A YAML file, mutated in structure or bytes, or with tags, anchors and aliases of its own."""
    match draw.randrange(8):
        case 0 | 1:
            return of_bytes(draw, content)
        case 2:
            tag = draw.choice(
                (
                    b"!!int ",
                    b"!!float ",
                    b"!!timestamp ",
                    b"!!bool ",
                    b"!!python/object:os.system ",
                    b"!!set ",
                    b"!!binary ",
                    b"&a ",
                    b"*a ",
                )
            )
            at = content.find(b": ", draw.randint(0, len(content))) + 2
            return content[:at] + tag + content[at:]
        case 3 if draw.random() < 0.2:
            levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, draw.choice((3, 12, 30)))]
            return content + "\n".join(["a0: &a0 [x]", *levels, "model: *a2"]).encode()
    tree = of_tree(draw, yaml.load(content, yaml.CSafeLoader))
    return yaml.dump(_without_surrogates(tree), Dumper=yaml.CSafeDumper, allow_unicode=draw.random() < 0.5).encode()


def _without_surrogates(tree: Any) -> Any:
    """YAML's writer refuses surrogates; its reader takes them as escapes, which mutated bytes give."""
    return json.loads(json.dumps(tree).replace("\\ud", "\\u0"))


def words(draw: random.Random, content: bytes) -> bytes:
    """Words, one a line (a command line's overrides): each mutated as text, dropped, repeated, with a foreign value."""
    lines = content.decode().splitlines()
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        key, equals, value = lines[at].partition("=")
        match draw.randrange(9):
            case 0:
                lines[at] = key + equals + str(draw.choice(SCALARS))
            case 1:
                lines[at] = (
                    key
                    + equals
                    + draw.choice(
                        (
                            "[",
                            "{a:",
                            "'",
                            '"x',
                            "${",
                            "${oc.env:X}",
                            "a,b",
                            "range(",
                            "interval(0,1)",
                            "\\",
                            "[1,2",
                            "{}",
                            "choice(1,2)",
                            "[" * 200,
                        )
                    )
                )
            case 2:
                lines[at] = draw.choice(("~", "+", "++", "", "=", "@", "/", ".")) + lines[at]
            case 3:
                lines[at] = key[: draw.randint(0, len(key))] + draw.choice((".", "x", "[0]", "@y", "")) + equals + value
            case 4:
                lines.append(lines[at])
            case 5:
                lines[at] = key + equals + value * draw.choice((2, 100))
            case 6:
                lines[at] = key + equals + "[" + value + "," + str(draw.choice(SCALARS)) + "]"
            case 7:
                position = draw.randint(0, len(lines[at]))
                lines[at] = (
                    lines[at][:position]
                    + draw.choice(" \t'\"\\[]{}(),:=$@!~%#\x00\ud800\udcff\x85語")
                    + lines[at][position:]
                )
            case _:
                lines[at] = key + equals + value[: draw.randint(0, len(value))]
    return "\n".join(line.replace("\n", " ") for line in lines).encode("utf-8", "surrogatepass")
