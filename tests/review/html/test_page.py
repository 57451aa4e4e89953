"""The HTML page: hostile names are inert, it requests nothing, and it works in a real browser."""

from __future__ import annotations

import itertools
import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import run_dirs
from helpers.chromium import NO_BROWSER, Browser

from review import __main__ as command
from review.html import page
from review.run_reader import read_run

HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>${1} $data &lt;b&gt; \u2028 ]]>"
)


class Elements(HTMLParser):
    """Parses a page as a browser would: tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def hostile_runs(folder: Path) -> list[Path]:
    """Writes runs of every state, one with markup in every text, and ten that differ in their learning rate."""
    bad = run_dirs.write_run(
        folder / "hostile", run__name=HOSTILE, tracking__tags=[HOSTILE], data__dir=HOSTILE, model__family=HOSTILE
    )
    (bad / "samples.jsonl").write_text(json.dumps({"step": 500, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    (bad / "environment.json").write_text(json.dumps({"commit": HOSTILE, HOSTILE: HOSTILE}))
    (bad / "corpus.json").write_text(json.dumps({"fingerprint": "f" * 64}))
    summary = json.loads((bad / "summary.json").read_text())
    (bad / "summary.json").write_text(json.dumps(summary | {"time_by_cause": {HOSTILE: 3.0, "train": 9.0}}))
    line = {"rank_step_s_min": 1.0, "rank_step_s_median": 1.1, "rank_step_s_max": 1.5, "slowest_rank": 3}
    (bad / "ranks.jsonl").write_text("".join(json.dumps({"step": step} | line) + "\n" for step in (10, 20)))
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.yaml").write_text("[" + HOSTILE)
    run_dirs.write_run(folder / "stopped", finished=False)
    for i in range(10):
        lr = 1e-4 * 2**i
        run_dirs.write_run(folder / f"lr{i}", 3 + 0.1 * abs(math.log(lr / 1e-3)), optimizer__lr=lr, seed=i % 2)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a written review, and the number of runs in it."""
    folder = tmp_path_factory.mktemp("review")
    count = len(hostile_runs(folder / "runs"))
    assert command.main([str(folder / "runs"), "--out", str(folder / "out")]) == 0
    return folder / "out", count


def test_page_requests_nothing_and_has_only_its_two_scripts(made: tuple[Path, int]):
    elements = Elements((made[0] / "review.html").read_text())
    assert [attributes.get("type") for tag, attributes in elements.tags if tag == "script"] == [
        "application/json",
        None,
        None,
    ]
    attributes = list(itertools.chain.from_iterable(own.items() for _, own in elements.tags))
    asked = [value for key, value in attributes if key in ("src", "href")]
    assert asked == ["data:,"]
    assert not [key for key, _ in attributes if key.startswith("on")]
    assert not [tag for tag, _ in elements.tags if tag == "img"]
    data = json.loads(elements.scripts[0])
    assert len(data["runs"]) == made[1]
    assert HOSTILE in [run["name"] for run in data["runs"]]
    assert {run["state"] for run in data["runs"]} == {"done", "stopped", "empty", "broken"}


def test_figures_with_data_are_written(made: tuple[Path, int]):
    names = {file.stem for file in made[0].glob("*.png") if file.read_bytes().startswith(b"\x89PNG")}
    assert names == {"loss_steps", "loss_tokens", "loss_seconds", "throughput", "goodput", "parallel", "importance"}


def test_page_of_many_and_long_runs_stays_small_and_quick(tmp_path: Path):
    long = run_dirs.write_run(tmp_path / "long", lines=100_000)
    first = run_dirs.write_run(tmp_path / "r0", lines=400)
    began = time.monotonic()
    runs = [read_run(long)] + [read_run(first) for _ in range(199)]
    for i, run in enumerate(runs):
        run.name = f"run {i}"
    text = page.render_page(runs, None, None)
    assert len(text) < 15e6
    assert time.monotonic() - began < 120  # some seconds on a machine that does nothing else
    curve = page.page_data(runs, None, None)["runs"][0]["curve"]
    assert len(curve["steps"]) < 2000
    assert curve["steps"][-1] == 1_000_000


def test_md_is_printed_and_folders_without_runs_are_refused(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main([str(made[0].parent / "runs"), "--format", "md"]) == 0
    assert capsys.readouterr().out.startswith("**")
    assert command.main([str(tmp_path / "no")]) == 2
    assert "give run folders" in capsys.readouterr().err


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
def test_page_in_a_browser_sorts_filters_and_holds_every_run(made: tuple[Path, int]):
    column = "[...document.querySelectorAll('#table tbody tr')].map(row => row.children[%d].title)"
    drawn = "[...new Set(document.getElementById('%s').data.map(t => t.meta).filter(Boolean))].length"
    with Browser() as browser:
        browser.open(made[0] / "review.html")
        assert browser.value("window.hacked") is None
        assert browser.value("document.querySelectorAll('#table tbody tr').length") == made[1]
        with_curve = made[1] - 2  # one is empty, one is broken
        assert browser.value(drawn % "loss") == with_curve
        assert browser.value(drawn % "speed") == with_curve
        assert browser.value(drawn % "parallel") == 11  # the finished ones
        assert browser.value(drawn % "ranks") == 1  # the one with such a file
        assert "rank 3 was the slowest in 2 of 2 windows" in browser.value(
            "document.getElementById('ranks-text').textContent"
        )
        losses = [float(v) for v in browser.value(column % 2) if v]
        assert losses[:11] == sorted(losses[:11])  # the finished ones, the best first
        for way in (False, True):
            browser.value("document.querySelector('th[data-key=\"val_loss\"] button').click()")
            assert [float(v) for v in browser.value(column % 2) if v] == sorted(losses, reverse=way)
        browser.value("document.querySelector('th[data-key=\"optimizer.lr\"] button').click()")
        assert browser.value("document.querySelector('th[aria-sort=\"ascending\"]').dataset.key") == "optimizer.lr"
        browser.value(
            "(f => { f.value = 'optimizer.lr=0.0001'; f.dispatchEvent(new Event('input')) })"
            "(document.getElementById('filter'))"
        )
        assert browser.value(column % 0) == ["lr0"]
        assert browser.value(drawn % "loss") == 1
        browser.value(
            "(x => { x.value = 'tokens'; x.dispatchEvent(new Event('change')) })(document.getElementById('x'))"
        )
        assert browser.value("document.getElementById('loss').data[0].x.at(-1)") == 1_024_000
        browser.value("document.getElementById('theme').click()")
        titles = browser.value("[...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title)")
        assert "Download plot as a PNG" in titles
        assert not [title for title in titles if "hare" in title]  # plotly's own bar would send charts to a server
        assert browser.messages == []
        assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []


@pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
def test_page_policy_blocks_every_other_script(made: tuple[Path, int], tmp_path: Path):
    """Markup that got into the page in spite of the escaping is not run by the browser."""
    text = (
        (made[0] / "review.html")
        .read_text()
        .replace("<h2>Runs</h2>", "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>")
    )
    (tmp_path / "torn.html").write_text(text)
    with Browser() as browser:
        browser.open(tmp_path / "torn.html")
        assert browser.value("window.hacked") is None
        assert any("Content Security Policy" in line for line in browser.messages)
