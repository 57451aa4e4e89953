"""The verb ``generate``: continues prompts with the model of a run's checkpoint."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from train.config import load as configuration
from train.config import schema
from train.config.key_effects import ineffective_keys
from train.config.validate import generation_problems
from train.errors import UserError
from train.generation.text_streamer import GeneratedText, generate_text
from train.models.generation_api import Generative
from train.printable import printable
from train.run_dir.open_run import open_run
from train.util.io import to_json
from train.util.reading import read_text, reading

SETTING_KEYS = [name for name in schema.GenerationConfig.model_fields if name != "prompts"]
"""Keys of the section ``generation`` that the verb takes without its name."""


def run(options: Mapping[str, str], *, as_json: bool) -> None:
    """Generate from the prompts that ``options`` name, and print the texts. Raises UserError."""
    given = read_prompts(options["prompt"], options["prompts"])
    saved = open_run(Path(options["run.dir"]), options["checkpoint"])
    settings = choose_settings(saved.config.generation, options)
    model = saved.objective.to("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(model, Generative):
        raise UserError(
            f"{options['run.dir']} was trained by objective={saved.config.objective.name}, which does not write text"
        )
    begin = (lambda prompt: prompt) if model.continues else (lambda prompt: "")
    if len(given) == settings.n == settings.beams == 1 and not as_json:
        _write(begin(given[0]))
        list(generate_text(model, saved.tokenizer, given, settings, lambda row, piece: _write(piece)))
        _write("\n")
        return
    for number, (prompt, texts) in enumerate(
        zip(given, generate_text(model, saved.tokenizer, given, settings), strict=True), 1
    ):
        for text in texts:
            if as_json:
                _write(to_json({"prompt": prompt, **vars(text)}) + "\n")
            else:
                _write(f"{_title(number, len(given), text)}\n{begin(prompt)}{text.text}\n")


def read_prompts(text: str, file: str) -> list[str]:
    """The prompt ``text``, or those of ``file``, one a line; ``-`` for either is standard input."""
    if text and file:
        raise UserError("prompt=... and prompts=... are both given: give one of them")
    if not file:
        return [_standard_input() if text == "-" else text]
    cure = f"prompts={file} names it (looked from {Path.cwd()})"
    lines = (_standard_input() if file == "-" else read_text(Path(file), cure)).split("\n")
    nonempty = [line.removesuffix("\r") for line in lines if line.strip()]
    if not nonempty:
        raise UserError(f"prompts={file} has no line with a prompt")
    return nonempty


def _standard_input() -> str:
    if sys.stdin is None:
        raise UserError("- reads the prompt from standard input, which is closed: give prompt=TEXT or prompts=FILE")
    with reading("standard input", "The prompts have to be UTF-8 text"):
        return sys.stdin.read().removeprefix("\ufeff")


def choose_settings(trained: schema.GenerationConfig, options: Mapping[str, str]) -> schema.GenerationConfig:
    """The run's own settings, or those of a choice of ``generation=``, overridden by the keys given by name."""
    base = (
        configuration.read_choice("generation", options["generation"])
        if options["generation"]
        else trained.model_dump()
    )
    settings = configuration.parse_section(
        schema.GenerationConfig, base | {n: _value(n, options[n]) for n in SETTING_KEYS if options[n]}
    )
    given = {f"generation.{name}" for name in SETTING_KEYS if options[name]}
    if problems := generation_problems(settings) + ineffective_keys({"generation": settings.model_dump()}, given):
        raise configuration.ConfigError(problems)
    return settings


def _value(name: str, text: str) -> Any:
    """Parse the value of ``name=text``: a number, or for ``stop`` a YAML list of strings, or else a string."""
    if name == "stop":
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(text) if text.startswith("[") else [text]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _title(number: int, of: int, text: GeneratedText) -> str:
    return f"--- prompt {number} of {of}" + ("" if text.score is None else f", score {text.score:.4f}")


def _write(text: str) -> None:
    """Writes the very text, but to a terminal no characters that it would obey: a model may write any."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
