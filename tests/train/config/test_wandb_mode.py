"""W&B's own switches mean what its client makes of them, and a word that it does not have sends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from train.config import load as configuration
from train.config.wandb_mode import MODES, with_wandb_mode
from train.errors import UserError


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The mode of a run under these variables, in an empty folder without settings of W&B."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))

    def mode(*overrides: str, **variables: str) -> str:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return configuration.load(["experiment=gpt_tiny", "tracking=wandb", *overrides]).tracking.wandb

    return mode


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("disabled", "off"),
        ("dryrun", "offline"),
        ("offline", "offline"),
        ("online", "online"),
        ("run", "online"),
        ("shared", "online"),
    ],
)
def test_wandb_mode_means_what_its_client_makes_of_it(asked, word: str, mode: str):
    assert asked(WANDB_MODE=word, WANDB_API_KEY="0" * 40) == mode


def test_modes_are_those_of_the_installed_client():
    from wandb import Settings

    assert set(MODES) == set(get_args(Settings.model_fields["mode"].annotation))


@pytest.mark.parametrize("word", ["Disabled", "none", "off", "false", "", "ofline"])
def test_a_word_that_wandb_does_not_have_is_refused(asked, word: str):
    with pytest.raises(UserError, match=f"WANDB_MODE={word} is no mode of W&B.*online, run, shared, offline, dryrun"):
        asked(WANDB_MODE=word)


def test_disabled_variable_turns_wandb_off_and_takes_true_or_false(asked):
    assert asked(WANDB_DISABLED="true", WANDB_MODE="online") == "off"
    assert asked(WANDB_DISABLED="false", WANDB_MODE="offline") == "offline"
    with pytest.raises(UserError, match="WANDB_DISABLED=maybe is neither true nor false"):
        asked(WANDB_DISABLED="maybe")


@pytest.mark.parametrize(("place", "word"), [("wandb", "disabled"), (".wandb", "dryrun"), ("home", "offline")])
def test_settings_file_of_wandb_offline_and_disabled_is_obeyed(asked, tmp_path: Path, place: str, word: str):
    (tmp_path / place).mkdir()
    (tmp_path / place / "settings").write_text(f"[default]\nmode = {word}\nbase_url = https://x.example/%s\n")
    assert asked() == MODES[word]
    assert asked(WANDB_MODE="online") == "online"


def test_settings_file_that_cannot_be_understood_is_refused(asked, tmp_path: Path):
    (tmp_path / "wandb").mkdir()
    file = tmp_path / "wandb" / "settings"
    file.write_text("[default]\nmode = Offline\n")
    with pytest.raises(UserError, match="settings: mode = Offline is no mode of W&B: did you mean 'offline'"):
        asked()
    file.write_text("mode = offline\n")
    with pytest.raises(UserError, match="W&B's settings, cannot be read"):
        asked()


def test_keys_of_the_run_come_before_the_variable(asked):
    assert asked("tracking.wandb=online", WANDB_MODE="disabled") == "online"
    assert asked("tracking=off", WANDB_MODE="no such word") == "off"
    assert asked("cluster.env={WANDB_MODE: disabled}", WANDB_MODE="online") == "off"


def test_every_trial_of_a_sweep_has_the_mode(asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    sweep = configuration.load_sweep(["experiment=gpt_tiny", "tracking=wandb", "seed=1,2"])
    assert configuration.load_trial(sweep, 1, {"seed": "2"}).tracking.wandb == "off"


def test_a_configuration_from_a_file_takes_the_mode_of_its_launcher(asked):
    config = configuration.load(["experiment=gpt_tiny", "tracking=wandb"])
    assert config.tracking.wandb == "auto"
    assert with_wandb_mode(config, {"WANDB_MODE": "dryrun"}).tracking.wandb == "offline"
