"""Builds the typed, checked configuration from the command line; the only module that imports Hydra.

Hydra runs once, in the driver: it composes the groups of ``conf/`` and the overrides. The result is checked against
``train.config.schema``, every problem at once and each with its cure; derived values are filled in by pure functions.
Workers get the finished tree as JSON and never compose anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shlex
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from train.config import sweep_space
from train.config.key_effects import ineffective_keys
from train.config.schema import DISCRIMINATORS, CommandLine, Config, Section, variants
from train.config.suggest import did_you_mean, one_value_wanted, unreadable
from train.config.sweep_dir import trial_dir
from train.config.text_keys import UNPARSED, text_keys, typed_value
from train.config.validate import config_problems, worker_problems
from train.config.wandb_mode import with_wandb_mode
from train.errors import UserError, refuse_foreign_bytes
from train.util.reading import UNREADABLE, as_object, read_yaml, reason

S = TypeVar("S", bound=Section)

CONF = Path(__file__).resolve().parents[2] / "conf"

MALFORMED: tuple[type[Exception], ...] = (HydraException, OmegaConfBaseException, *UNREADABLE)
"""All that Hydra and OmegaConf raise for words that they cannot take: their parsers raise Python's errors too."""

MAX_SHOWN = 200
"""Characters of a wrong value that a message repeats."""

KeyEntry = tuple[str, str, str]
"""(type, default or "", description) of a key."""


class ConfigError(UserError):
    """All problems of a configuration in one message."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        listed = "\n".join(f"  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(self.problems[0] if count == 1 else f"{count} problems:\n{listed}")


def load(overrides: Sequence[str]) -> Config:
    """Compose and check the configuration of ``overrides`` (``key=value``, ``group=choice``). Raises ConfigError."""
    refuse_foreign_bytes(overrides)
    of_run, problems = [], []
    for text in overrides:
        if sweep_space.is_sweep_override(text):
            problems.append(f"{text!r} is for a sweep: say -m, or leave it out")
        else:
            of_run.append(text)
    return _compose(of_run, problems)[0]


def load_sweep(overrides: Sequence[str]) -> sweep_space.SweepSpace:
    """Parse the sweep of ``overrides``: keys with several values in Hydra's syntax, and ``sweep.*``.

    Raises ConfigError, as ``load`` does.
    """
    refuse_foreign_bytes(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            sweep_overrides = [_sweep_override(parser, text) for text in overrides]
            axes = [_axis(override) for override in sweep_overrides if override is not None]
    except MALFORMED as error:
        raise ConfigError([reason(error)]) from error
    points, axis_keys = sweep_space.read_points(overrides), {axis.key for axis in axes}
    varied = axis_keys.union(*points)
    fixed = [text for text in overrides if sweep_space.key_of(text) not in axis_keys]
    problems = [f"{axis.key}={axis.text} names nothing" for axis in axes if not axis.values and axis.low is None]
    naming_keys = sweep_space.naming_keys([*overrides, *varied])
    for key in naming_keys:
        problems.append(f"{key}=... is not for a sweep, whose runs have names and folders: sweep.name=...")
    for key in sweep_space.shared_keys(varied):
        problems.append(f"{key} is the same for all runs of a sweep, which share a cluster: give one value")
    first = {**points[0], **{axis.key: axis.first for axis in axes}}
    first_overrides = [f"{key}={value}" for key, value in first.items() if key not in naming_keys]
    base, settings = _compose([*fixed, *first_overrides], problems, varied)
    sweep = parse_section(CommandLine, {**to_dict(base), "sweep": settings}).sweep
    method = [Path(sweep.points).stem] if sweep.points else [] if sweep.sampler == "grid" else [sweep.sampler]
    name = sweep.name or "-".join([*method, *(axis.key for axis in axes)])
    sweep = sweep.model_copy(update={"name": name, "dir": sweep.dir or str(Path("sweeps") / name)})
    fixed_of_runs = tuple(text for text in fixed if not sweep_space.is_sweep_override(text))
    space = sweep_space.SweepSpace(sweep, base, fixed_of_runs, tuple(axes), points)
    without_effect = ineffective_keys({"sweep": sweep.model_dump()}, {sweep_space.key_of(text) for text in overrides})
    if sweep_problems := [*without_effect, *sweep_space.sweep_problems(space)]:
        raise ConfigError(sweep_problems)
    return space


def load_trial(sweep: sweep_space.SweepSpace, number: int, params: sweep_space.Params) -> Config:
    """Configuration of one trial of a sweep, with a folder in the sweep's and the sweep's W&B group."""
    config, _ = _compose([*sweep.fixed, *(f"{key}={value}" for key, value in params.items())], [], params)
    folder = trial_dir(Path(sweep.settings.dir or ""), number)
    run = config.run.model_copy(update={"name": f"{sweep.settings.name}-{folder.name}", "dir": str(folder)})
    group = config.tracking.group or sweep.settings.name
    tracking = config.tracking.model_copy(update={"group": group, "tags": [*config.tracking.tags, "sweep"]})
    return config.model_copy(update={"run": run, "tracking": tracking})


def _compose(
    overrides: Sequence[str], earlier_problems: Sequence[str], varied: Collection[str] = ()
) -> tuple[Config, dict[str, Any]]:
    """A run's configuration, and the values of its section ``sweep``. Raises ConfigError, earlier problems included.

    ``varied``: the keys by which the run differs from others of its sweep.
    """
    checked, typed, problems = check_overrides(overrides)
    problems = [*earlier_problems, *problems]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=checked, return_hydra_config=True)
        choices = composed.hydra.runtime.choices
        values: dict[str, Any] = {
            str(k): OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in composed.items() if k != "hydra"
        }
    except MALFORMED as error:
        raise ConfigError([*problems, _composition_error(error)]) from error
    for key, value in typed.items():
        _set(values, key, value)
    settings = values.pop("sweep")
    try:
        config = complete_config(values, name=f"{choices['model']}-{choices['data']}")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    problems += ineffective_keys(to_dict(config), {sweep_space.key_of(text) for text in overrides}, varied)
    if problems:
        raise ConfigError(problems)
    return config, settings


def _sweep_override(parser: OverridesParser, text: str) -> Override | None:
    """Parse an override that gives several values, else None; ``check_overrides`` reports what cannot be parsed."""
    with contextlib.suppress(*MALFORMED):
        [override] = parser.parse_overrides([text])
        return override if override.is_sweep_override() else None
    return None


def _axis(override: Override) -> sweep_space.SweepAxis:
    """A key with several values, expanded as Hydra's BasicSweeper does."""
    key, text, value = override.key_or_group, override.get_value_string(), override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        whole, log = isinstance(value.start, int), "log" in value.tags
        return sweep_space.SweepAxis(key, text, low=value.start, high=value.end, whole=whole, log=log)
    values = sweep_space.bounded(f"{key}={text}", override.sweep_string_iterator())
    if isinstance(value, RangeSweep) and values:
        numbers = sorted(map(float, values))
        step, whole = abs(float(value.step or 1)), all(number.is_integer() for number in numbers)
        return sweep_space.SweepAxis(key, text, values, numbers[0], numbers[-1], step, whole)
    return sweep_space.SweepAxis(key, text, values)


def read(path: Path) -> Config:
    """Read the configuration saved in a run's ``config.yaml``. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no run: {path.name} is missing. Give a run's folder: run.dir=...")
    try:
        return parse(read_yaml(path, "Restore it, or give another run's folder: run.dir=...", as_object))
    except ConfigError as error:
        cure = "Restore it, or read the run with the version that made it"
        raise UserError(f"{path} is not of this program's version, or was changed: {error}. {cure}") from error


def parse(values: dict[str, Any]) -> Config:
    """Build the typed tree from plain values. Raises ConfigError: every unknown key, missing key and wrong type."""
    return parse_section(Config, values)


def parse_section(section: type[S], values: dict[str, Any]) -> S:
    """Build one section of the tree from plain values. Raises ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_error_text(e) for e in error.errors()]) from error


def complete_config(values: dict[str, Any], name: str) -> Config:
    """Check ``values`` and fill in what is derived: the run's name and folder, the number of streams, W&B's mode."""
    config = parse(values)
    title = config.run.name or name
    run = {"name": title, "dir": config.run.dir or str(Path("runs") / title)}
    data = dict(values["data"], streams=config.data.streams or config.batch.default_streams)
    config = parse({**values, "run": run, "data": data})
    if problems := config_problems(config):
        raise ConfigError(problems)
    return with_wandb_mode(config, os.environ)


def with_workers(config: Config, workers: int) -> Config:
    """The configuration with ``cluster.workers``, where that was left out. ConfigError where they do not fit to it."""
    if config.cluster.workers is not None:
        return config
    if problems := worker_problems(config, workers):
        first = f"cluster.workers was left out, and this cluster has room for {workers}"
        raise ConfigError([f"{first}: {problem}" for problem in problems])
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": workers})})


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values under the names of the command line."""
    return config.model_dump(by_alias=True, mode="json")


def digest(config: Config) -> str:
    """Hash of all values; ranks compare it at start and refuse to differ."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ between two trees of plain values, as (key, old, new)."""
    for key in sorted({*old, *new}, key=str):  # a file may have keys that are no text
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def groups() -> dict[str, list[str]]:
    """Groups of ``conf/`` and their choices."""
    folders = [folder for folder in sorted(CONF.iterdir()) if folder.is_dir()]
    return {folder.name: _choices(folder) for folder in folders}


def _choices(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_choice(group: str, name: str) -> dict[str, Any]:
    """Values of a choice of a group, such as ``generation=beam``. Raises UserError for an unknown choice."""
    known = groups()[group]
    if name not in known:
        raise UserError(_unknown_choice(group, name, known))
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text("utf-8")))


def keys(section: type[BaseModel] = CommandLine, prefix: str = "") -> dict[str, KeyEntry]:
    """All keys of the schema, by their names on the command line."""
    entries: dict[str, KeyEntry] = {}
    for name, field in section.model_fields.items():
        key, annotation, arguments = prefix + (field.alias or name), field.annotation, get_args(field.annotation)
        held = () if get_origin(annotation) in (dict, list) else arguments  # theirs are no keys of the tree
        inner = [t for t in (annotation, *held) if isinstance(t, type) and issubclass(t, Section)]
        if inner:
            names = list(variants(name)) if field.discriminator else [name]
            trees = [keys(inner_section, key + ".") for inner_section in inner]
            entries |= _merge_variants(dict(zip(names, trees, strict=True)))
            continue
        type_name = str(annotation).replace("typing.", "") if arguments else getattr(annotation, "__name__", "")
        default = "" if field.is_required() else str(field.get_default(call_default_factory=True))
        entries[key] = (type_name, default, field.description or "")
    return entries


def _merge_variants(trees: dict[str, dict[str, KeyEntry]]) -> dict[str, KeyEntry]:
    """Merge the keys of all variants of a section; the description of a key that only some have names those."""
    entries: dict[str, KeyEntry] = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(trees.values())):
        owners = {name: tree[key] for name, tree in trees.items() if key in tree}
        type_name, default, description = next(iter(owners.values()))
        if len({default for _, default, _ in owners.values()}) > 1:
            default = ""
        note = "" if len(owners) == len(trees) else f" [{', '.join(owners)}]"
        entries[key] = type_name, default, description + note
    return entries


def check_overrides(overrides: Sequence[str]) -> tuple[list[str], dict[str, Any], list[str]]:
    """Check that keys and choices exist.

    Returns (overrides as Hydra takes them, values that it cannot read by their keys, problems with what was meant).
    """
    known, known_groups, kinds, problems, checked = keys(), groups(), text_keys(), [], []
    typed: dict[str, Any] = {}
    sections: set[str] = set()
    for name in known:
        sections |= {name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)}
    names = [*known, *sections, *known_groups]
    for text in overrides:
        override, value = _parse_override(text)
        key, equals, raw = sweep_space.key_of(text), "=" in text, text.partition("=")[2]
        typed.pop(key, None)  # the last one counts
        asks_sweep = override is not None and override.is_sweep_override()
        if asks_sweep and key not in sweep_space.NAMING_KEYS:
            problems.append(one_value_wanted(key, text, kinds.get(key)))
        elif equals and key in kinds and (as_typed := typed_value(kinds[key], raw, UNPARSED if asks_sweep else value)):
            typed[key] = as_typed
        elif override is None and equals and key in known:
            typed[key] = raw  # its type is named in what refuses it
        elif override is None and key not in known_groups:
            problems.append(unreadable(text, key, names))
        elif key in known_groups:
            choice = str(raw if override is None else override.value())
            if choice not in known_groups[key]:
                problems.append(_unknown_choice(key, choice, known_groups[key]))
            else:
                checked.append(f"{key}='{choice}'")  # quoted, since Hydra takes zero=3 for a number
        elif key not in known and key not in sections:
            problems.append(f"unknown key {key!r}{did_you_mean(key, names)}")
        else:  # "++" sets a key that no YAML mentions; the schema says which keys there are
            checked.append(f"++{key}={raw}" if equals else text)
    return checked, typed, problems


def _parse_override(text: str) -> tuple[Override | None, Any]:
    """An override as Hydra reads it, and its value; (None, UNPARSED) where its grammar refuses it."""
    try:
        override = OverridesParser.create().parse_override(text)
    except MALFORMED:
        return None, UNPARSED
    return override, None if override.is_sweep_override() else override.value()


def _composition_error(error: Exception) -> str:
    text = reason(error)
    if isinstance(error, InterpolationResolutionError):
        return (
            f"{text.partition(chr(10))[0]}: ${{...}} stands for another key; for the signs themselves write \\${{...}}"
        )
    return text


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key``, with dots, in nested dictionaries."""
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _unknown_choice(group: str, name: str, known: Sequence[str]) -> str:
    return f"{group}={name}: there is no such choice{did_you_mean(name, known)}. Choices: {', '.join(known)}"


def help_text() -> str:
    """Help of ``train``: groups with their choices, and every key with its type, default and meaning."""
    lines = ["usage: ./launch.sh train [-m] [group=choice ...] [key=value ...]", "", "Choose with group=choice:"]
    lines += [f"  {name + '=':13}{', '.join(choices)}" for name, choices in groups().items()]
    lines += ["", "Set with key=value (types as in Python; lists as [a,b]):"]
    return "\n".join([*lines, *key_lines(keys())])


def key_lines(known: dict[str, KeyEntry]) -> list[str]:
    """One line of help per key of ``keys()``: name, meaning and default."""
    lines = []
    for key, (_, default, description) in known.items():
        note = description + (f" (default {default})" if default not in ("", "None", "[]") else "")
        lines.append(f"  {key:30}{note}".rstrip())
    return lines


def _error_text(error: Any) -> str:
    """Message for one error of pydantic."""
    loc = [str(p) for p in error["loc"] if not str(p).startswith("constrained") and p not in _TYPES]
    variant = loc.pop(1) if len(loc) > 1 and loc[0] in DISCRIMINATORS else ""
    path = ".".join(loc)
    if error["type"].startswith("union_tag"):
        key = f"{path}.{DISCRIMINATORS[path]}"
        value = error["input"].get(DISCRIMINATORS[path]) if isinstance(error["input"], dict) else error["input"]
        return f"{key}={value}: there is no such one" if value else f"{key} is missing"
    if error["type"] == "extra_forbidden":
        if variant and path in keys():
            owner = f"{loc[0]}.{DISCRIMINATORS[loc[0]]}={variant}"
            return f"{path} means nothing for {owner}: leave it out, or choose another {loc[0]}"
        return f"unknown key {path!r}{did_you_mean(path, list(keys()))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    if error["type"] == "list_type":
        return f"{path} is a list: write {shlex.quote(path + '=[' + str(error['input'])[:MAX_SHOWN] + ']')}"
    shown = repr(error["input"])[:MAX_SHOWN]
    if error["type"] == "dict_type":
        return f'{path}={shown}: not a dictionary, such as {path}={{NAME: "text"}}, in quotes for the shell'
    return f"{path}={shown}: {error['msg'].lower()}"


_TYPES = {"int", "float", "str", "bool"}
