"""The mode of W&B that its own variables and settings files ask for, read once, where the command is given."""

from __future__ import annotations

import configparser
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from train.config.schema import Config
from train.config.suggest import did_you_mean
from train.errors import UserError

Mode = Literal["online", "offline", "off"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "shared": "online",  # several processes write one run: here rank 0 alone does
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}
"""W&B's words for a mode, letter by letter as its client takes them, and what each means here."""
TRUE, FALSE = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0", "")


def with_wandb_mode(config: Config, environ: Mapping[str, str]) -> Config:
    """``config`` with the mode that ``environ``, or else W&B's settings files, ask for, where it leaves that open.

    It is decided here and not by rank 0, whose host may know neither the variables nor the files of this one. Raises
    UserError for a word that W&B does not have: it must not fall to a mode that sends what was to be kept.
    """
    if config.tracking.wandb != "auto":
        return config
    mode = requested_mode({**environ, **config.cluster.env})
    return config.model_copy(update={"tracking": config.tracking.model_copy(update={"wandb": mode or "auto"})})


def requested_mode(environ: Mapping[str, str]) -> Mode | None:
    """The mode asked for; None where nothing asks for one."""
    disabled = environ.get("WANDB_DISABLED", "").lower()
    if disabled not in (*TRUE, *FALSE):
        raise UserError(f"WANDB_DISABLED={disabled} is neither true nor false: say one of them, or unset it")
    if disabled in TRUE:
        return "off"
    if "WANDB_MODE" in environ:
        return _known("WANDB_MODE=", environ["WANDB_MODE"], "or unset it")
    for file in _settings_files(environ):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read_string(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, configparser.Error) as error:
            raise UserError(f"{file}, W&B's settings, cannot be read: {error}. Mend it, or set WANDB_MODE") from error
        if mode := parser.get("default", "mode", fallback=None):
            return _known(f"{file}: mode = ", mode, "with `wandb online`, `offline` or `disabled`")
    return None


def _known(where: str, word: str, cure: str) -> Mode:
    if word not in MODES:
        raise UserError(
            f"{where}{word} is no mode of W&B{did_you_mean(word.lower(), list(MODES))} "
            f"Its modes: {', '.join(MODES)}; set one of them, {cure}"
        )
    return MODES[word]


def _settings_files(environ: Mapping[str, str]) -> list[Path]:
    """W&B's settings files, first the one that counts: that of the working folder, then the user's."""
    working = Path(environ.get("WANDB_DIR", ".")).expanduser()
    folder = ".wandb" if (working / ".wandb").exists() else "wandb"
    user = Path(environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    return [working / folder / "settings", user / "settings"]
