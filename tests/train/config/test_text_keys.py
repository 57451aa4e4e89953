"""Keys of text take the text as it was typed, whatever Hydra's grammar makes of its characters."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.__main__ import _options
from train.config import load as configuration
from train.config.text_keys import quoted
from train.errors import UserError

PRINTABLE = st.text(st.characters(blacklist_categories=("C", "Z")), min_size=1, max_size=20)
HYDRAS_OWN = set("\"'\\$,")
"""Signs with which a user asks Hydra for quotes, escapes, another key's value or several values."""


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("run.name=lr=3e-4", "run", "lr=3e-4"),
        ("run.name=语料", "run", "语料"),
        ("run.name=a,b", "run", "a,b"),
        ("run.name=007", "run", "007"),
        ("run.name=1e5", "run", "1e5"),
        ("run.name=true", "run", "true"),
        ("run.name=a(b){c}", "run", "a(b){c}"),
        ("run.name=it's", "run", "it's"),
        ("run.name=100%#&;~!", "run", "100%#&;~!"),
        (r"run.name=a\,b", "run", "a,b"),
        ("run.name='quo ted'", "run", "quo ted"),
    ],
)
def test_text_of_a_name_is_taken_as_typed(override: str, section: str, value: str):
    assert getattr(configuration.load([override]), section).name == value


@pytest.mark.parametrize(
    ("typed", "paths"),
    [
        ("[语料.txt]", ["语料.txt"]),
        ("[a.txt, naïve café.txt ,b.txt]", ["a.txt", "naïve café.txt", "b.txt"]),
        ("[lr=3.txt,2024,1e5]", ["lr=3.txt", "2024", "1e5"]),
        ("[\"x,é.txt\", 'y,é.txt',z]", ["x,é.txt", "y,é.txt", "z"]),
        (r'["a\"é"]', ['a"é']),
        ("[data (1).txt,it's.txt]", ["data (1).txt", "it's.txt"]),
        ("[a,b/*.jsonl]", ["a", "b/*.jsonl"]),
    ],
)
def test_list_of_text_is_split_at_its_commas(typed: str, paths: list[str]):
    assert configuration.load(["data=text", f"data.paths={typed}"]).data.paths == paths


@settings(deadline=None, max_examples=12)
@given(PRINTABLE)
@example("语料.txt")
def test_any_printable_text_survives_in_a_key_and_in_a_list(text: str):
    """As it is, unless it asks Hydra for something; in the quotes that messages advise, always."""
    (advised,) = shlex.split(quoted("data.text_key", text))
    (listed,) = shlex.split(quoted("data.paths", text))
    overrides = [advised, listed.replace('="', '=["', 1) + "]"]
    if not HYDRAS_OWN & set(text) and text.lower() != "null":
        plain = configuration.load(
            [f"tracking.group={text}", "data=text", "data.paths=[a]", f"generation.stop=[{text}]"]
        )
        assert (plain.tracking.group, plain.generation.stop) == (text, [text])
    if "$" not in text:
        config = configuration.load(["data=text", *overrides])
        assert (config.data.text_key, config.data.paths) == (text, [text])
    assert _options([f"prompt={text}", f"to={text}"], {"prompt": "", "to": None}) == {"prompt": text, "to": text}


def test_the_last_of_two_values_counts():
    assert configuration.load(["run.name=a=b", "run.name=c"]).run.name == "c"
    assert configuration.load(["run.name=c", "run.name=a=b"]).run.name == "a=b"


def test_text_of_a_sweep_reaches_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    sweep = configuration.load_sweep(["seed=1,2", "data=text", "data.paths=[语料.txt]", "sweep.name=lr=3"])
    assert configuration.load_trial(sweep, 1, {"seed": "2"}).data.paths == ["语料.txt"]
    assert sweep.settings.name == "lr=3"


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("data.paths=b.txt", "data.paths is a list: write 'data.paths=[b.txt]'"),
        ("data.paths=语料.txt", "data.paths is a list: write 'data.paths=[语料.txt]'"),
        ("data.paths=a.txt,b.txt", "a list of them is 'data.paths=[a.txt,b.txt]'"),
        ("data.text_key=a,b", "where the comma is part of it, 'data.text_key=\"a,b\"'"),
        ("steps=ü", "steps='ü': input should be a valid integer"),
        ("model=ü", "model=ü: there is no such choice"),
        ("optimizer=Adam(lr=3)", "optimizer=Adam(lr=3): there is no such choice"),
        ("stpes=ü", "unknown key 'stpes': did you mean 'steps'?"),
        ("--steps=3", "keys have no dashes here, as in steps=3"),
        ("--steps", "keys have no dashes here, as in steps=..."),
        ("steps", "is not key=value or group=choice"),
        ("cluster.env={A: ü}", 'not a dictionary, such as cluster.env={NAME: "text"}'),
        ("run.name=${nowhere}", r"for the signs themselves write \${...}"),
    ],
)
def test_value_that_cannot_be_read_is_refused_with_its_cure(override: str, cure: str):
    with pytest.raises(UserError) as caught:
        configuration.load([override])
    assert cure in str(caught.value)
