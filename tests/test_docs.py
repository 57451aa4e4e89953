"""The documents agree with the code: commands compose; keys, files, tests and links exist.

Their tables of fences and words are those of the code, no document names a machine, and README and glossary stay short.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import shlex
from pathlib import Path

import pytest

from bench.tools.run import modules as bench_modules
from cluster.cli import cluster
from review import __main__ as review
from train.config import load as configuration
from train.config import schema

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
FILE = re.compile(r"`((?:train|cluster|kernels|bench|conf|tests|docs|review)/[\w./-]+\.(?:py|md|yaml|png))`")
KEY = re.compile(r"[a-z_]+(\.[a-z_]+)*")
NAME = re.compile(r"\(`(\w+)`\)$")
MAX_README_LINES, MAX_GLOSSARY = 200, 40
MACHINE = re.compile(
    r"/(?:work|root|home|Users|mnt|tmp|opt|usr)/|\bpypi\b|https?://\S*(?:/simple\b|artifact|mirror|registry|index)"
)

SAVED = {
    "evaluate": {"run.dir", "checkpoint", "split"},
    "trace": {"run.dir", "step"},
    "generate": {"run.dir", "checkpoint", "prompt", "generation", *schema.GenerationConfig.model_fields},
    "chat": {"run.dir", "checkpoint", "system", "generation", *schema.GenerationConfig.model_fields},
    "export": {"run.dir", "to", "checkpoint", "shard_mb"},
}
"""Verbs that take a run's folder, and the options of each."""
PLAN = {"gpu", "nodes", "gpus_a_node", "price", "every"}
"""Options of ``plan`` beside the run's own command."""
LOOK = {"rows", "html"}
"""Options of ``look`` beside the run's own command."""
TEMPLATES = {("group", "choice"), ("key", "value")}
SECTIONS = {key.split(".")[0] for key in configuration.keys() if "." in key}  # noqa: SIM118  a function, not a dict


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def inline(document: Path) -> list[str]:
    """The code between single backticks, blocks left out."""
    return CODE.findall(FENCE.sub("", document.read_text("utf-8")))


def commands(document: Path) -> list[list[str]]:
    """The arguments of every ``./launch.sh`` in the sh blocks and inline code; output blocks are not commands."""
    blocks = [block for kind, block in FENCE.findall(document.read_text("utf-8")) if kind == "sh"]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()] + inline(document)
    split = [shlex.split(line, comments=True) for line in lines if "./launch.sh" in line]
    return [words[words.index("./launch.sh") + 1 :] for words in split if "./launch.sh" in words]


@functools.cache
def verbs() -> set[str]:
    """The verbs that launch.sh itself knows."""
    line = re.search(r'^verbs="([^"]+)"', (ROOT / "launch.sh").read_text(), re.MULTILINE)
    assert line
    return set(line[1].split())


COMMANDS = [(document, words) for document in DOCUMENTS for words in commands(document)]


def command_name(value: object) -> str:
    return name(value) if isinstance(value, Path) else " ".join(map(str, value)) if isinstance(value, list) else ""


def test_commands_are_found():
    assert len(COMMANDS) > 20
    assert {words[0] for _, words in COMMANDS if words} >= {
        "train",
        "prepare",
        "evaluate",
        "generate",
        "test",
        "check",
        "bench",
    }


@pytest.mark.parametrize(("document", "words"), COMMANDS, ids=command_name)
def test_every_command_is_one_that_launch_sh_would_take(document: Path, words: list[str]):
    verb, arguments = (words[0], words[1:]) if words and "=" not in words[0] else ("train", words)
    assert verb in verbs()
    if verb == "train" and "-m" in arguments:
        configuration.load_sweep([argument for argument in arguments if argument != "-m"])
    elif verb in ("train", "prepare", "verify-resume", "verify-gradient") and not {"--help", "..."} & set(arguments):
        configuration.load(arguments)
    elif verb in ("plan", "look"):
        configuration.load([argument for argument in arguments if argument.partition("=")[0] not in PLAN | LOOK])
    elif verb == "cluster":
        name, *rest = [*arguments, "up"]
        assert {word.partition("=")[0] for word in rest if "=" in word} <= cluster.VERBS[name][1]
    elif verb in SAVED:
        given = {argument.partition("=")[0] for argument in arguments} - {"--json", "--help"}
        assert given <= SAVED[verb]
        assert "run.dir" in given or not given
    elif verb == "review":
        review.parser().parse_args(arguments)
    elif verb == "bench" and arguments:
        assert arguments[0] in bench_modules()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_key_and_choice_that_is_mentioned_exists(document: Path):
    known, groups = configuration.keys(), configuration.groups()
    options = PLAN.union(LOOK, *SAVED.values(), *(known for _, known in cluster.VERBS.values()))
    sections = {key.rsplit(".", n)[0] for key in known for n in range(1, key.count(".") + 1)}
    for code in inline(document):
        words = (
            [] if code.startswith((".", "-")) or "_target_" in code else code.split()
        )  # that one is shown to be refused
        for key, equals, value in (word.partition("=") for word in words):
            if not KEY.fullmatch(key) or (key, value) in TEMPLATES:
                continue
            if key in groups and value and value != "...":
                assert set(value.split(",")) <= set(groups[key]), code
            elif equals:
                assert key in known or key in groups or key in options, code
            elif "." in key and key.split(".")[0] in SECTIONS and not key.endswith((".json", ".jsonl", ".py", ".yaml")):
                assert key in known or key in sections, code


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_relative_links_lead_to_files(document: Path):
    links = [link for link in LINK.findall(document.read_text("utf-8")) if not link.startswith(("http://", "https://"))]
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_files_and_tests_that_are_mentioned_exist(document: Path):
    text = document.read_text("utf-8")
    assert [file for file in FILE.findall(text) if not (ROOT / file).is_file()] == []
    assert [f"{file}::{test}" for file, test in TEST.findall(text) if test not in functions_of(file)] == []


@functools.cache
def functions_of(file: str) -> set[str]:
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_no_machine_is_named(document: Path):
    assert [match[0] for match in MACHINE.finditer(document.read_text("utf-8"))] == []


def test_the_page_of_keys_is_the_help_of_the_program():
    """When it is not: replace the first text block of the page by what ``./launch.sh train --help`` prints."""
    blocks = [
        block
        for kind, block in FENCE.findall((ROOT / "docs" / "configuration.md").read_text("utf-8"))
        if kind == "text"
    ]
    assert blocks[0].rstrip("\n") == configuration.help_text()


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [name(page) for page in (ROOT / "docs").glob("*.md") if f"({name(page)})" not in readme] == []


def test_readme_has_at_most_200_lines():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= MAX_README_LINES


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of a page of docs/, without its head."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    lines = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("|")]
    return [list(map(str.strip, row)) for row in rows[2:]]


def defined_in(file: str) -> set[str]:
    """The functions and classes of a module's top level."""
    nodes = ast.parse((ROOT / file).read_text()).body
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_glossary_has_at_most_40_words_each_defined_in_its_file():
    rows = table("processes.md", "Glossary")
    words = [word for word, _, _ in rows]
    assert 0 < len(words) <= MAX_GLOSSARY
    assert words == sorted(set(words), key=lambda word: word.strip("`").lower())
    for word, _, file in rows:
        assert FILE.fullmatch(file), file
        if name := NAME.search(word):
            assert name[1] in defined_in(file.strip("`")), f"{word} is not defined in {file}"


def test_fences_of_the_architecture_test_are_those_of_the_page():
    nodes = ast.parse((ROOT / "tests" / "test_architecture.py").read_text()).body
    [fences] = [
        node.value for node in nodes if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FENCES"
    ]
    rows = {package.strip("`"): place.strip("`") for package, place in table("architecture.md", "Fences")}
    places = ast.literal_eval(fences)
    assert rows == {name: place if isinstance(place, str) else "`, `".join(place) for name, place in places.items()}


def test_short_road_is_four_files_each_importing_the_next():
    rows = table("architecture.md", "The short road: one rank under torchrun")
    files = [file.strip("`") for file, _ in rows]
    assert len(files) == 4
    for file, after in itertools.pairwise(files):
        module = after.removesuffix(".py").replace("/", ".")
        imported = {
            node.module for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.ImportFrom)
        }
        assert module in imported, f"{file} does not import {module}"
