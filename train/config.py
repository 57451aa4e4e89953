"""From the command line to a whole, typed, checked configuration: the only file that knows Hydra.

Hydra runs once, in the driver: it composes the groups of ``conf/`` and the overrides. What it composed is checked here
against ``train.schema``, every problem at once and each with its cure; then the derived values are filled in by pure
functions. Workers get the finished tree as JSON and never compose anything.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from train.errors import UserError
from train.rules import problems
from train.schema import KINDS, Config, Section, kinds

ELSEWHERE = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "grad_clip": "optimizer.clip",
    "max_grad_norm": "optimizer.clip",
    "warmup_steps": "schedule.warmup",
    "max_steps": "steps",
    "max_iters": "steps",
    "train_iters": "steps",
    "batch_size": "batch.global",
    "global_batch_size": "batch.global",
    "micro_batch_size": "batch.micro",
    "per_device_train_batch_size": "batch.micro",
    "block_size": "batch.seq_len",
    "seq_length": "batch.seq_len",
    "max_seq_len": "batch.seq_len",
    "n_layer": "model.layers",
    "num_layers": "model.layers",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "n_head": "model.heads",
    "num_heads": "model.heads",
    "num_gpus": "cluster.workers",
    "nproc_per_node": "cluster.workers",
    "world_size": "cluster.workers",
    "num_workers": "cluster.workers",
    "zero_stage": "zero.stage",
    "output_dir": "run.dir",
    "out_dir": "run.dir",
    "eval_interval": "eval_every",
    "save_steps": "save_every",
}
"""What other systems call our keys, so that a newcomer's first guess is answered."""

S = TypeVar("S", bound=Section)

CONF = Path(__file__).resolve().parent.parent / "conf"


class ConfigError(UserError):
    """Everything that is wrong with a configuration, in one message."""

    def __init__(self, found: Sequence[str]) -> None:
        self.found = list(dict.fromkeys(found))
        many = f"{len(self.found)} problems:\n" + "\n".join(f"  - {p}" for p in self.found)
        super().__init__(self.found[0] if len(self.found) == 1 else many)


def load(overrides: Sequence[str]) -> Config:
    """The configuration that ``overrides`` (``key=value``, ``group=choice``) ask for, or ConfigError."""
    known, found = check_overrides(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=known, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError([*found, str(error).strip()]) from error
    choices = composed.hydra.runtime.choices
    values = {str(k): OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in composed.items() if k != "hydra"}
    try:
        config = finish(values, name=f"{choices['model']}-{choices['data']}")
    except ConfigError as error:
        raise ConfigError([*found, *error.found]) from error
    if found:
        raise ConfigError(found)
    return config


def read(path: Path) -> Config:
    """The configuration saved in a run's ``config.yaml``."""
    try:
        return parse(yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} holds no run: {path.name} is missing. Give a run's folder: run.dir=...") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from error


def parse(values: dict[str, Any]) -> Config:
    """The typed tree of plain values. UserError lists every unknown key, missing key and wrong type."""
    return typed(Config, values)


def typed(section: type[S], values: dict[str, Any]) -> S:
    """A section of the tree from plain values, or ConfigError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()]) from error


def finish(values: dict[str, Any], name: str) -> Config:
    """Check ``values`` and fill in what is derived: the run's name and folder, the streams."""
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
    """Plain values, with the names of the command line."""
    return config.model_dump(by_alias=True, mode="json")


def digest(config: Config) -> str:
    """A hash of every value: ranks compare it at start, and refuse to differ."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key whose value differs between two trees of plain values: (key, old, new)."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def groups() -> dict[str, list[str]]:
    """The groups of ``conf/`` and their choices."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(CONF.iterdir()) if d.is_dir()}


def choice(group: str, name: str) -> dict[str, Any]:
    """The values of a choice of a group, such as ``generation=beam``. Raises UserError for one that is not there."""
    known = groups()[group]
    if name not in known:
        raise UserError(f"{group}={name}: there is no such choice{_nearest(name, known)}. Choices: {', '.join(known)}")
    return dict(yaml.safe_load((CONF / group / f"{name}.yaml").read_text()))


def keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, tuple[str, str, str]]:
    """Every key of the schema: name -> (type, default or "", description)."""
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
    """The keys of all kinds of a section; those that only some have say of which they are."""
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
    """(the overrides as Hydra takes them; the problems: each unknown key or choice, with the nearest known one)."""
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
            found.append(f"{text!r} asks for a sweep, and this command runs one job: give one value")
        elif key in known_groups:
            choice = str(override.value())
            if choice not in known_groups[key]:
                hint = _nearest(choice, known_groups[key])
                found.append(f"{key}={choice}: there is no such choice{hint}. Choices: {', '.join(known_groups[key])}")
            else:
                checked.append(f"{key}='{choice}'")  # quoted, since Hydra takes zero=3 for a number
        elif key not in known and key not in sections:
            found.append(f"unknown key {key!r}{_nearest(key, names)}")
        else:  # "++" sets a key that no YAML mentions; the schema says which keys there are
            checked.append(f"++{key}={text.split('=', 1)[1]}" if "=" in text else text)
    return checked, found


def help_text() -> str:
    """The groups with their choices, and every key with its type, default and meaning."""
    lines = ["usage: ./launch.sh train [group=choice ...] [key=value ...]", "", "Choose with group=choice:"]
    lines += [f"  {name + '=':13}{', '.join(choices)}" for name, choices in groups().items()]
    lines += ["", "Set with key=value (types as in Python; lists as [a,b]):"]
    return "\n".join([*lines, *key_lines(keys())])


def key_lines(known: dict[str, tuple[str, str, str]]) -> list[str]:
    """A line for each of ``keys()``: its name, meaning and default."""
    lines = []
    for key, (_, default, description) in known.items():
        note = description + (f" (default {default})" if default not in ("", "None", "[]") else "")
        lines.append(f"  {key:30}{note}".rstrip())
    return lines


def _nearest(name: str, names: Sequence[str]) -> str:
    elsewhere = difflib.get_close_matches(name.rsplit(".", 1)[-1], ELSEWHERE, 1, 0.85)
    if elsewhere and ELSEWHERE[elsewhere[0]] in names:
        return f": did you mean {ELSEWHERE[elsewhere[0]]!r}?"
    by_last = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    match = difflib.get_close_matches(name, names, 1, 0.6) or difflib.get_close_matches(name, list(by_last), 1, 0.6)
    return f": did you mean {by_last.get(match[0], match[0])!r}?" if match else ""


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
        return f"unknown key {path!r}{_nearest(path, list(keys()))}"
    if error["type"] == "missing":
        return f"{path} is missing"
    return f"{path}={error['input']!r}: {error['msg'].lower()}"


_TYPES = {"int", "float", "str", "bool"}
