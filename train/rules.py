"""What must hold between the values of a configuration: each is right by itself, and together they may make no sense."""

from __future__ import annotations

import re

from train.schema import Config

MIRROR = re.compile(r"(?!.*::)[a-z][a-z0-9+.-]*://(?![^/]*:[^/@]*@)[^?]+")


def problems(config: Config) -> list[str]:
    """Values that are right one by one and wrong together, each with its cure."""
    return [*_problems_of_batch(config), *_problems_of_model(config), *_problems_of_data(config), *_problems_of_rest(config)]


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
        found.append(f"cluster.min_workers={least} is more than cluster.workers={workers}: lower the one or raise the other")
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
    b, m, found = config.batch, config.model, []
    if b.seq_len > m.max_len:
        found.append(f"batch.seq_len={b.seq_len} is longer than model.max_len={m.max_len}: lower the one or raise the other")
    if m.width % m.heads:
        found.append(f"model.heads={m.heads} does not divide model.width={m.width}")
    elif m.position == "rope" and (m.width // m.heads) % 2:
        found.append(f"rope needs an even head size, and model.width/model.heads is {m.width // m.heads}")
    if m.kv_heads is not None and m.heads % m.kv_heads:
        found.append(f"model.kv_heads={m.kv_heads} does not divide model.heads={m.heads}")
    return found


def _problems_of_data(config: Config) -> list[str]:
    d, found = config.data, []
    if d.source == "text" and not d.paths:
        found.append("data=text needs data.paths, such as data.paths=[notes.txt,folder,'logs/*.jsonl']")
    if d.source != "text" and d.paths:
        found.append(f"data.paths is for data=text, and data.source is {d.source}: add data=text")
    if d.tokenizer.kind == "file" and not d.tokenizer.path:
        found.append("data.tokenizer.kind=file needs data.tokenizer.path, a tokenizer.json")
    if d.tokenizer.kind == "bpe" and (d.tokenizer.vocab_size or 0) < 257:
        found.append("data.tokenizer.vocab_size must be at least 257 for bpe: 256 bytes and the end of text")
    return found


def _problems_of_rest(config: Config) -> list[str]:
    found = []
    if config.zero.offload and config.zero.stage == 0:
        found.append("zero.offload needs zero.stage 1, 2 or 3")
    if config.save_mirror is not None and not MIRROR.fullmatch(config.save_mirror):  # not shown: it may hold a password
        found.append(
            "save_mirror is no plain URL: give one such as s3://bucket/runs or file:///shared, without password, query or chain; "
            "credentials come from the environment or fsspec's own configuration"
        )
    warmup = config.schedule.warmup
    if isinstance(warmup, int) and warmup >= config.steps and warmup > 0:
        found.append(f"schedule.warmup={warmup} takes all of steps={config.steps}: lower it, or give a fraction such as 0.02")
    if config.init.skip and not config.init.from_:
        found.append("init.skip is about what init.from holds, and that is not given: give it, or leave init.skip out")
    if config.stop.patience and not config.eval_every:
        found.append("stop.patience counts evaluations, and with eval_every=0 there are none: set eval_every")
    return found
