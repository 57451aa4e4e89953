"""One family of Hugging Face models: which of ours it is, and where each of our parameters stands in its files.

Both directions, to there and from there, are read off the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from train.config import schema
from train.errors import UserError

Facts = dict[str, Any]
"""What makes a model the function that it is: keys of ``schema.Model``, none of them left to a default."""
Shape = tuple[int, ...]

NO_FACTS = {"dropout", "init_std", "checkpoint_activations"}
"""Keys of training: a trained model is the same without them."""


def facts_of(model: schema.Model, rows: int) -> Facts:
    """The facts of our model, whose embedding has ``rows`` rows."""
    found = model.model_dump(exclude=NO_FACTS) | {"vocab_size": rows}
    return _whole(found)


def _whole(facts: Facts) -> Facts:
    """Facts without a None: what the models make of it."""
    heads, width = facts.get("heads", 1), facts["width"]
    usual = {"kv_heads": heads, "head_dim": width // heads, "mlp_width": 4 * width}
    return {key: usual.get(key) if value is None else value for key, value in facts.items()}


@dataclass(frozen=True)
class Stored:
    """Where the parameters of one of our modules stand: in the modules named, their rows one below the other.

    ``shares`` are the facts that the parts' rows are proportional to; without, the parts are equal. ``turned``: a weight is
    stored as (inputs, outputs).
    """

    modules: tuple[str, ...]
    shares: tuple[str, ...] = ()
    turned: bool = False


def at(*modules: str, shares: tuple[str, ...] = (), turned: bool = False) -> Stored:
    """A ``Stored``, in few words; ``#`` is the number of a block."""
    return Stored(modules, shares, turned)


@dataclass(frozen=True)
class TensorSlice:
    """Rows [start, start + count) of one of our parameters, and the tensor that holds them there."""

    ours: str
    start: int
    count: int
    theirs: str
    shape: Shape
    turned: bool


@dataclass(frozen=True)
class HFFamily:
    """The table of one family."""

    name: str
    model_type: str
    architectures: dict[str, tuple[str, str]]
    """Their classes and our objectives, by a parameter of ours that only models of this class have; the last is for all others."""
    needs: Facts
    """What a model of ours must be."""
    equal: dict[str, str]
    """Facts that must be equal to others."""
    keys: dict[str, tuple[str, ...]]
    """Our facts and their names in config.json; under several names: all of them, with one value."""
    absent: Facts
    """What those mean that config.json may leave out."""
    values: dict[str, tuple[Any, ...]]
    """Facts that may have some values only."""
    fixed: dict[str, tuple[Any, ...]]
    """What other keys of config.json must be, if they are there: any of these; the first is what we write."""
    dropout: tuple[str, ...]
    modules: dict[str, Stored]
    base: str
    """The prefix that older files leave out."""
    ignored: tuple[str, ...]
    """Tensors, as patterns, that hold no parameter."""
    tidy: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Config.json as the keys above have it, from any of its forms."""
    dress: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The form in which it is written."""

    def architecture(self, names: Iterable[str]) -> str:
        """Their class for a model that has these parameters."""
        return next(theirs for mark, (theirs, _) in self.architectures.items() if mark in {"", *names})

    def objective(self, config: dict[str, Any]) -> str:
        """The objective that the head of a folder is of."""
        found = [ours for theirs, ours in self.architectures.values() if theirs in (config.get("architectures") or ())]
        return found[0] if found else self.architectures[""][1]

    def lacking(self, objective: str, facts: Facts) -> list[str]:
        """What keeps a model of ours from being one of this family, as ``key=value`` that it would need."""
        known = sorted({ours for _, ours in self.architectures.values()})
        found = [] if objective in known else [f"objective={' or '.join(known)} (not {objective})"]
        needs = {key: (value,) for key, value in self.needs.items()} | self.values
        needs |= {key: (facts.get(other),) for key, other in self.equal.items()}
        wrong = {key: values for key, values in needs.items() if facts.get(key) not in values}
        return found + [f"model.{k}={' or '.join(map(word, v))} (not {word(facts.get(k))})" for k, v in wrong.items()]

    def config(self, facts: Facts, dropout: float, more: dict[str, Any]) -> dict[str, Any]:
        """The content of config.json, ``more`` included."""
        found: dict[str, Any] = {"model_type": self.model_type, "dtype": "float32"}
        found |= {name: facts[key] for key, names in self.keys.items() for name in names}
        found |= {name: values[0] for name, values in self.fixed.items() if values[0] is not None}
        found |= dict.fromkeys(self.dropout, dropout)
        return self.dress(found | more)

    def facts(self, config: dict[str, Any]) -> tuple[Facts, list[str]]:
        """The facts that a config.json states, and what it states that no model of ours can be."""
        config, found, strange = self.tidy(config), dict(self.needs), []
        for key, names in self.keys.items():
            values = [config.get(name) for name in names]
            given = [self.absent.get(key) if value is None else value for value in values]
            if any(value != given[0] for value in given):
                strange.append(
                    ", ".join(f"{n}={word(v)}" for n, v in zip(names, given, strict=True)) + ", which must be equal"
                )
            if given[0] is None and key not in ("kv_heads", "mlp_width"):
                strange.append(f"{names[0]}, which is missing")
            if key in self.values and given[0] not in self.values[key]:
                strange.append(f"{names[0]}={word(given[0])}")
            found[key] = given[0]
        for name, right in self.fixed.items():
            if config.get(name, right[0]) not in right:
                strange.append(f"{name}={word(config[name])}, which must be {' or '.join(map(word, right))}")
        if not strange:
            found |= {key: found[other] for key, other in self.equal.items()}
            found = _whole(found)
        return found, strange

    def names(self, ours: str) -> tuple[Stored, list[str]]:
        """Where one of our parameters stands, and the names of its parts there. Raises KeyError where it has no place."""
        number = re.search(r"\.(\d+)\.", ours)
        pattern = re.sub(r"\.\d+\.", ".#.", ours, count=1)
        module, _, leaf = pattern.rpartition(".")
        whole = pattern in self.modules
        stored = self.modules[pattern if whole else module]
        names = [name if whole else f"{name}.{leaf}" for name in stored.modules]
        return stored, [name.replace("#", number[1] if number else "#") for name in names]

    def places(self, shapes: Iterable[tuple[str, Shape]], facts: Facts) -> Iterator[TensorSlice]:
        """Where the rows of our parameters stand, in our order. Raises UserError naming those that have no place there."""
        found, without = [], []
        for ours, shape in shapes:
            try:
                stored, names = self.names(ours)
            except KeyError:
                without.append(ours)
                continue
            shares = [facts[share] for share in stored.shares] or [1] * len(names)
            turned, start = stored.turned and len(shape) == 2, 0
            for name, share in zip(names, shares, strict=True):
                count = shape[0] * share // sum(shares)
                part = (count, *shape[1:])
                found.append(TensorSlice(ours, start, count, name, part[::-1] if turned else part, turned))
                start += count
        if without:
            raise UserError(f"{self.name} of transformers has no place for {', '.join(without)}")
        yield from found


def word(value: Any) -> str:
    """A value as it is written in YAML."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
