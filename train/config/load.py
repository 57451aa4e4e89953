"""From the command line to a typed, checked configuration; the only file that knows Hydra.

Hydra runs once, in the driver: it composes the groups of ``conf/`` and the overrides. The result is checked against
``train.config.schema``, every problem at once and each with its cure; derived values are filled in by pure functions.
Workers get the finished tree as JSON and never compose anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from train.config import sweep_space
from train.config.schema import KINDS, CommandLine, Config, Section, kinds
from train.config.suggest import nearest
from train.config.sweep_dir import trial_dir
from train.config.validate import problems
from train.errors import UserError

S = TypeVar("S", bound=Section)

CONF = Path(__file__).resolve().parents[2] / "conf"


class ConfigError(UserError):
    """Everything that is wrong with a configuration, in one message."""

    def __init__(self, found: Sequence[str]) -> None:
        self.found = list(dict.fromkeys(found))
        many = f"{len(self.found)} problems:\n" + "\n".join(f"  - {p}" for p in self.found)
        super().__init__(self.found[0] if len(self.found) == 1 else many)


def load(overrides: Sequence[str]) -> Config:
    """Compose and check the configuration of ``overrides`` (``key=value``, ``group=choice``). Raises ConfigError."""
    own = [text for text in overrides if not sweep_space.of_sweep(text)]
    found = [f"{text!r} is for a sweep: say -m, or leave it out" for text in overrides if sweep_space.of_sweep(text)]
    return _load(own, found)[0]


def load_sweep(overrides: Sequence[str]) -> sweep_space.Sweeping:
    """Parse the sweep of ``overrides``: keys with several values in Hydra's syntax, and ``sweep.*``. Raises
    ConfigError.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            parser = OverridesParser.create(GlobalHydra.instance().config_loader())
            axes = [_axis(several) for text in overrides if (several := _sweep_override(parser, text)) is not None]
    except HydraException as error:
        raise ConfigError([str(error).strip()]) from error
    points, own = sweep_space.read_points(overrides), {axis.key for axis in axes}
    varied = own.union(*points)
    fixed = [text for text in overrides if sweep_space.key_of(text) not in own]
    found = [f"{axis.key}={axis.text} names nothing" for axis in axes if not (axis.values or axis.low is not None)]
    named = sweep_space.named([*overrides, *varied])
    found += [f"{key}=... is not for a sweep, whose runs have names and folders: sweep.name=..." for key in named]
    found += [
        f"{key} is the same for all runs of a sweep, which share a cluster: give one value"
        for key in sweep_space.places(varied)
    ]
    first = {**points[0], **{axis.key: axis.first for axis in axes}}
    base, settings = _load([*fixed, *(f"{key}={value}" for key, value in first.items() if key not in named)], found)
    sweep = typed(CommandLine, {**to_dict(base), "sweep": settings}).sweep
    kind = [Path(sweep.points).stem] if sweep.points else [] if sweep.sampler == "grid" else [sweep.sampler]
    name = sweep.name or "-".join([*kind, *(axis.key for axis in axes)])
    sweep = sweep.model_copy(update={"name": name, "dir": sweep.dir or str(Path("sweeps") / name)})
    sweeping = sweep_space.Sweeping(
        sweep, base, tuple(text for text in fixed if not sweep_space.of_sweep(text)), tuple(axes), points
    )
    if wrong := sweep_space.problems(sweeping):
        raise ConfigError(wrong)
    return sweeping


def load_trial(sweep: sweep_space.Sweeping, number: int, params: sweep_space.Params) -> Config:
    """Configuration of one trial of a sweep: its values alone, in a folder and a W&B group of the sweep."""
    config = load([*sweep.fixed, *(f"{key}={value}" for key, value in params.items())])
    folder = trial_dir(Path(sweep.settings.dir or ""), number)
    run = config.run.model_copy(update={"name": f"{sweep.settings.name}-{folder.name}", "dir": str(folder)})
    group = config.tracking.group or sweep.settings.name
    tracking = config.tracking.model_copy(update={"group": group, "tags": [*config.tracking.tags, "sweep"]})
    return config.model_copy(update={"run": run, "tracking": tracking})


def _load(overrides: Sequence[str], found: Sequence[str]) -> tuple[Config, dict[str, Any]]:
    """A run's configuration, and the values of its section ``sweep``; ``found`` are problems known already."""
    known, more = check_overrides(overrides)
    found = [*found, *more]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=known, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*found, str(error).strip()]) from error
    choices = composed.hydra.runtime.choices
    values: dict[str, Any] = {
        str(k): OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in composed.items() if k != "hydra"
    }
    settings = values.pop("sweep")
    try:
        config = finish(values, name=f"{choices['model']}-{choices['data']}")
    except ConfigError as error:
        raise ConfigError([*found, *error.found]) from error
    if found:
        raise ConfigError(found)
    return config, settings


def _sweep_override(parser: OverridesParser, text: str) -> Override | None:
    """Parse an override that gives several values, else None; ``check_overrides`` reports what cannot be parsed."""
    with contextlib.suppress(OverrideParseException):
        [override] = parser.parse_overrides([text])
        return override if override.is_sweep_override() else None
    return None


def _axis(override: Override) -> sweep_space.Axis:
    """A key with several values, expanded as Hydra's BasicSweeper does."""
    key, text, value = override.key_or_group, override.get_value_string(), override.value()
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        whole, log = isinstance(value.start, int), "log" in value.tags
        return sweep_space.Axis(key, text, low=value.start, high=value.end, whole=whole, log=log)
    values = tuple(override.sweep_string_iterator())
    if isinstance(value, RangeSweep) and values:
        numbers = sorted(map(float, values))
        step, whole = abs(float(value.step or 1)), all(number.is_integer() for number in numbers)
        return sweep_space.Axis(key, text, values, numbers[0], numbers[-1], step, whole)
    return sweep_space.Axis(key, text, values)


def read(path: Path) -> Config:
    """Read the configuration saved in a run's ``config.yaml``."""
    try:
        return parse(yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} holds no run: {path.name} is missing. Give a run's folder: run.dir=..."
        ) from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error


def parse(values: dict[str, Any]) -> Config:
    """Build the typed tree from plain values. Raises UserError listing every unknown key, missing key and wrong type."""
    return typed(Config, values)


def typed(section: type[S], values: dict[str, Any]) -> S:
    """Build one section of the tree from plain values. Raises ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()]) from error


def finish(values: dict[str, Any], name: str) -> Config:
    """Check ``values`` and fill in what is derived: the run's name and folder, the number of streams."""
    config = parse(values)
    title = config.run.name or name
    run = {"name": title, "dir": config.run.dir or str(Path("runs") / title)}
    data = dict(values["data"], streams=config.data.streams or config.batch.global_)
    config = parse({**values, "run": run, "data": data})
    found = problems(config)
    if found:
        raise ConfigError(found)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values under the names of the command line."""
    return config.model_dump(by_alias=True, mode="json")


def digest(config: Config) -> str:
    """Hash of all values; ranks compare it at start and refuse to differ."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys whose values differ between two trees of plain values, as (key, old, new)."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def groups() -> dict[str, list[str]]:
    """Groups of ``conf/`` and their choices."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(CONF.iterdir()) if d.is_dir()}


def choice(group: str, name: str) -> dict[str, Any]:
    """Values of a choice of a group, such as ``generation=beam``. Raises UserError for an unknown one."""
    known = groups()[group]
    if name not in known:
        raise UserError(f"{group}={name}: there is no such choice{nearest(name, known)}. Choices: {', '.join(known)}")
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text()))


def keys(section: type[BaseModel] = CommandLine, prefix: str = "") -> dict[str, tuple[str, str, str]]:
    """All keys of the schema: name -> (type, default or "", description)."""
    found: dict[str, tuple[str, str, str]] = {}
    for name, field in section.model_fields.items():
        key, inner = prefix + (field.alias or name), field.annotation
        inners = [t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, Section)]
        if inners:
            names = list(kinds(name)) if field.discriminator else [name]
            found |= _together(dict(zip(names, (keys(t, key + ".") for t in inners), strict=True)))
            continue
        kind = getattr(inner, "__name__", "") if not get_args(inner) else str(inner).replace("typing.", "")
        default = "" if field.is_required() else str(field.get_default(call_default_factory=True))
        found[key] = (kind, default, field.description or "")
    return found


def _together(trees: dict[str, dict[str, tuple[str, str, str]]]) -> dict[str, tuple[str, str, str]]:
    """Merge the keys of all kinds of a section; a key that only some kinds have names them."""
    found: dict[str, tuple[str, str, str]] = {}
    for key in dict.fromkeys(key for tree in trees.values() for key in tree):
        having = {name: tree[key] for name, tree in trees.items() if key in tree}
        kind, default, description = next(iter(having.values()))
        if len({default for _, default, _ in having.values()}) > 1:
            default = ""
        of = "" if len(having) == len(trees) else f" [{', '.join(having)}]"
        found[key] = kind, default, description + of
    return found


def check_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """(overrides as Hydra takes them, problems): unknown keys and choices, each with the nearest known one."""
    known, known_groups, found, checked = keys(), groups(), [], []
    sections = {k.rsplit(".", n)[0] for k in known for n in range(1, k.count(".") + 1)}
    names = [*known, *sections, *known_groups]
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            found.append(f"{text!r} is not key=value or group=choice")
            continue
        key = override.key_or_group
        if override.is_sweep_override():
            found.append(
                f"{text!r} asks for a sweep, and this command runs one job: give one value, or -m for a run each"
            )
        elif key in known_groups:
            choice = str(override.value())
            if choice not in known_groups[key]:
                hint = nearest(choice, known_groups[key])
                found.append(f"{key}={choice}: there is no such choice{hint}. Choices: {', '.join(known_groups[key])}")
            else:
                checked.append(f"{key}='{choice}'")  # quoted, since Hydra takes zero=3 for a number
        elif key not in known and key not in sections:
            found.append(f"unknown key {key!r}{nearest(key, names)}")
        else:  # "++" sets a key that no YAML mentions; the schema says which keys there are
            checked.append(f"++{key}={text.split('=', 1)[1]}" if "=" in text else text)
    return checked, found


def help_text() -> str:
    """Help of ``train``: groups with their choices, and every key with its type, default and meaning."""
    lines = ["usage: ./launch.sh train [-m] [group=choice ...] [key=value ...]", "", "Choose with group=choice:"]
    lines += [f"  {name + '=':13}{', '.join(choices)}" for name, choices in groups().items()]
    lines += ["", "Set with key=value (types as in Python; lists as [a,b]):"]
    return "\n".join([*lines, *key_lines(keys())])


def key_lines(known: dict[str, tuple[str, str, str]]) -> list[str]:
    """One line of help per key of ``keys()``: name, meaning and default."""
    lines = []
    for key, (_, default, description) in known.items():
        note = description + (f" (default {default})" if default not in ("", "None", "[]") else "")
        lines.append(f"  {key:30}{note}".rstrip())
    return lines


def _explain(error: Any) -> str:
    loc = [str(p) for p in error["loc"] if not str(p).startswith("constrained") and p not in _TYPES]
    kind = loc.pop(1) if len(loc) > 1 and loc[0] in KINDS else ""
    path = ".".join(loc)
    if error["type"].startswith("union_tag"):
        key = f"{path}.{KINDS[path]}"
        given = error["input"].get(KINDS[path]) if isinstance(error["input"], dict) else error["input"]
        return f"{key}={given}: there is no such one" if given else f"{key} is missing"
    if error["type"] == "extra_forbidden":
        if kind and path in keys():
            return f"{path} means nothing for {loc[0]}.{KINDS[loc[0]]}={kind}: leave it out, or choose another {loc[0]}"
        return f"unknown key {path!r}{nearest(path, list(keys()))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path}={error['input']!r}: {error['msg'].lower()}"


_TYPES = {"int", "float", "str", "bool"}
