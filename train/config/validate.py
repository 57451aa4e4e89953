"""Rules between keys: values that are each valid but make no sense together."""

from __future__ import annotations

import re

from train.config.schema import Config, Generation, kinds

MIRROR = re.compile(r"(?!.*::)[a-z][a-z0-9+.-]*://(?![^/]*:[^/@]*@)[^?]+")
LEAST = {"causal": 1, "masked": 8, "seq2seq": 8, "classify": 4}
"""Tokens of a row that an objective's own tokens and cuts need at least."""


def problems(config: Config) -> list[str]:
    """Combinations of values that make no sense, each with its cure."""
    parts = (_problems_of_batch, _problems_of_model, _problems_of_objective, _problems_of_data, _problems_of_rest)
    return [*(found for part in parts for found in part(config)), *problems_of_generation(config.generation)]


def _problems_of_batch(config: Config) -> list[str]:
    b, found = config.batch, []
    streams, workers = config.data.streams or b.global_, config.cluster.workers
    if b.global_ % streams:
        near = max(s for s in range(1, min(streams, b.global_) + 1) if b.global_ % s == 0)
        found.append(
            f"data.streams={streams} does not divide batch.global={b.global_}, so streams would be read unevenly: "
            f"set data.streams={near}, or leave it out (one stream a sequence)"
        )
    if workers > streams:
        found.append(
            f"cluster.workers={workers} is more than data.streams={streams}: a worker would own no data. "
            f"Set cluster.workers={streams} or fewer, or raise batch.global"
        )
    least = config.cluster.min_workers
    if least is not None and least > workers:
        found.append(
            f"cluster.min_workers={least} is more than cluster.workers={workers}: lower the one or raise the other"
        )
    share = -(-b.global_ // workers)
    if b.micro is not None and b.micro > share:
        found.append(
            f"batch.micro={b.micro} is more than a worker's share of {share} sequences "
            f"(batch.global={b.global_} over cluster.workers={workers}): set batch.micro={share} or less"
        )
    if b.micro is not None and b.micro <= share and share % b.micro:
        near = max(n for n in range(1, b.micro + 1) if share % n == 0)
        found.append(
            f"batch.micro={b.micro} does not divide a worker's share of {share} sequences "
            f"(batch.global={b.global_} over cluster.workers={workers}): set batch.micro={near}"
        )
    return found


def _problems_of_model(config: Config) -> list[str]:
    model, found = config.model, [*mismatch(config), *config.model.problems(config.batch.seq_len)]
    streams = config.data.streams or config.batch.global_
    carries = model.carries_state and config.objective.name == "causal"
    if carries and not (config.data.pack and streams == config.batch.global_):
        found.append(
            f"model.carry needs rows that go on from step to step, data.pack=true and a stream a row: here data.streams={streams} "
            f"and batch.global={config.batch.global_}. Leave data.streams out, or set model.carry=false"
        )
    return found


def mismatch(config: Config) -> list[str]:
    """The problem of an objective that the model cannot have, with the pairs that work."""
    family, name = config.model.family, config.objective.name
    if name in config.model.objectives:
        return []
    pairs = {
        objective: [f for f, kind in kinds("model").items() if objective in kind.objectives]
        for objective in kinds("objective")
    }
    does = "; ".join(f"objective={objective} with {', '.join(families)}" for objective, families in pairs.items())
    return [f"objective={name} makes no sense for a model of family {family}. What does: {does}"]


def _problems_of_objective(config: Config) -> list[str]:
    o, d, found = config.objective, config.data, []
    labelled = o.name == "classify" or (o.name == "seq2seq" and o.task == "pairs")
    if labelled and d.label_key is None:
        found.append(
            f"objective={o.name} needs data.label_key, the field of a .jsonl line that holds what is to be learnt"
        )
    if labelled and d.pack:
        found.append(f"objective={o.name} reads a document a row: set data.pack=false")
    if o.name == "classify" and o.pool == "mean" and not config.model.averaged:
        found.append(
            "objective.pool=mean means nothing for an encoder-decoder, which says one word of a row: leave it out"
        )
    if config.batch.seq_len < LEAST[o.name]:
        found.append(
            f"batch.seq_len={config.batch.seq_len} leaves no room for objective={o.name}: take {LEAST[o.name]} or more"
        )
    return found


def _problems_of_data(config: Config) -> list[str]:
    d, found = config.data, []
    if d.val_fraction + d.test_fraction >= 1:
        both = f"data.val_fraction={d.val_fraction} and data.test_fraction={d.test_fraction}"
        found.append(f"{both} leave nothing to train on: lower them")
    if d.source == "text" and not d.paths:
        found.append("data=text needs data.paths, such as data.paths=[notes.txt,folder,'logs/*.jsonl']")
    if d.source == "stdlib" and d.paths:
        found.append(f"data.paths is for data=text, and data.source is {d.source}: add data=text")
    if d.tokenizer.kind == "file" and not d.tokenizer.path:
        found.append("data.tokenizer.kind=file needs data.tokenizer.path, a tokenizer.json")
    if d.tokenizer.kind == "bpe" and (d.tokenizer.vocab_size or 0) < 257:
        found.append("data.tokenizer.vocab_size must be at least 257 for bpe: 256 bytes and the end of text")
    return found


def problems_of_generation(generation: Generation) -> list[str]:
    """As ``problems``, for generation settings."""
    g, found = generation, []
    if g.beams > 1 and g.n > g.beams:
        found.append(f"generation.n={g.n} is more than generation.beams={g.beams}: raise beams, or lower n")
    if g.beams == 1 and g.n > 1 and g.temperature == 0:
        found.append(
            f"generation.n={g.n} greedy texts would be the same: set generation.temperature, or generation.beams={g.n}"
        )
    return found


def _problems_of_rest(config: Config) -> list[str]:
    found = []
    o = config.optimizer
    if o.name == "nesterov" and o.momentum == 0:
        found.append(
            "optimizer=nesterov without momentum is sgd: set optimizer.momentum, such as 0.9, or optimizer=sgd"
        )
    if config.zero.offload and config.zero.stage == 0:
        found.append("zero.offload needs zero.stage 1, 2 or 3")
    if config.save_mirror is not None and not MIRROR.fullmatch(config.save_mirror):  # not shown: it may hold a password
        found.append(
            "save_mirror is no plain URL: give one such as s3://bucket/runs or file:///shared, without password, query or chain; "
            "credentials come from the environment or fsspec's own configuration"
        )
    warmup = config.schedule.warmup
    if isinstance(warmup, int) and warmup >= config.steps and warmup > 0:
        found.append(
            f"schedule.warmup={warmup} takes all of steps={config.steps}: lower it, or give a fraction such as 0.02"
        )
    if config.init.skip and not config.init.from_:
        found.append("init.skip is about what init.from holds, and that is not given: give it, or leave init.skip out")
    if config.stop.patience and not config.eval_every:
        found.append("stop.patience counts evaluations, and with eval_every=0 there are none: set eval_every")
    return found
