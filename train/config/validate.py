"""Checks rules between keys: values that are each valid but make no sense together."""

from __future__ import annotations

import itertools
import re

from train.config.mixture_rules import mixture_problems
from train.config.schema import Config, GenerationConfig, variants
from train.util.format import plural

MIRROR_URL = re.compile(r"(?!.*::)[a-z][a-z0-9+.-]*://(?![^/]*:[^/@]*@)[^?]+")
OWN_VARIABLES = {
    **dict.fromkeys(
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"), "it follows from cluster.workers"
    ),
    "CUDA_VISIBLE_DEVICES": "each worker sees the GPU that it was given; start the command with it to leave GPUs out",
    "OMP_NUM_THREADS": "set cluster.cpus_per_worker",
    "DS_ACCELERATOR": "set cluster.device",
}
"""Variables that a worker's driver sets, with how to change what they say."""
MIN_ROW_TOKENS = {"causal": 1, "masked": 8, "seq2seq": 8, "classify": 4}
"""Fewest tokens of a row that leave room for an objective's special tokens and spans."""


def config_problems(config: Config) -> list[str]:
    """Combinations of values that make no sense, each with its cure."""
    parts = (
        _batch_problems,
        _model_problems,
        _objective_problems,
        _data_problems,
        _variable_problems,
        _zero_problems,
        _profile_problems,
        _other_problems,
    )
    problems: list[str] = []
    for part in parts:
        problems += part(config)
    if config.cluster.workers is not None:
        problems += worker_problems(config, config.cluster.workers)
    return problems + generation_problems(config.generation)


def _batch_problems(config: Config) -> list[str]:
    b, problems = config.batch, []
    streams = config.data.streams or b.default_streams
    if b.global_ % streams:
        near = max(s for s in range(1, min(streams, b.global_) + 1) if b.global_ % s == 0)
        problems.append(
            f"data.streams={streams} does not divide batch.global={b.global_}, so streams would be read unevenly: "
            f"set data.streams={near}, or leave it out (one stream a sequence)"
        )
    return problems + (_ramp_problems(config, streams) if b.ramp else [])


def _ramp_problems(config: Config, streams: int) -> list[str]:
    """Problems of ``batch.ramp`` by itself, with the steps of the run and with its streams."""
    b, problems = config.batch, []
    sizes = [rows for rows, _ in b.ramp or []]
    ends = [end for _, end in b.ramp or []]
    growing = [*sizes, b.global_]
    if any(after <= before for before, after in itertools.pairwise(growing)):
        problems.append(
            f"batch.ramp={b.ramp} has sizes that do not grow up to batch.global={b.global_}: "
            "each stage is larger than the one before it, and the last is smaller than batch.global"
        )
    if any(after <= before for before, after in itertools.pairwise([0, *ends])):
        problems.append(
            f"batch.ramp={b.ramp} has stages that end before they begin: the second number of each is where it ends, "
            "counted from the start of the run, so they rise"
        )
    length = sum(steps for _, steps in b.ramp_steps)
    if length >= config.steps:
        problems.append(
            f"batch.ramp={b.ramp} lasts {length} steps, and steps={config.steps}: batch.global={b.global_} would never "
            "be reached. Shorten the ramp, or raise steps"
        )
    for rows in sizes:
        if rows % streams:
            problems.append(
                f"data.streams={streams} does not divide the {rows} sequences of batch.ramp: leave data.streams out, "
                f"or set it to a divisor of {b.default_streams}"
            )
    return problems


def worker_problems(config: Config, workers: int) -> list[str]:
    """Settings that do not fit to so many workers: the batch that they share, the fewest that are to go on."""
    b, problems = config.batch, []
    streams = config.data.streams or b.default_streams
    if workers > streams:
        problems.append(
            f"cluster.workers={workers} is more than data.streams={streams}: a worker would own no data. "
            f"Set cluster.workers={streams} or fewer, or raise {'batch.ramp' if b.ramp else 'batch.global'}"
        )
    least = config.cluster.min_workers
    if least is not None and least > workers:
        problems.append(
            f"cluster.min_workers={least} is more than cluster.workers={workers}: lower the one or raise the other"
        )
    share = -(-b.global_ // workers)
    if b.micro is not None and b.micro > share:
        problems.append(
            f"batch.micro={b.micro} is more than a worker's share of {share} sequences "
            f"(batch.global={b.global_} over cluster.workers={workers}): set batch.micro={share} or less"
        )
    if b.micro is not None and b.micro <= share and share % b.micro:
        near = max(n for n in range(1, b.micro + 1) if share % n == 0)
        problems.append(
            f"batch.micro={b.micro} does not divide a worker's share of {share} sequences "
            f"(batch.global={b.global_} over cluster.workers={workers}): set batch.micro={near}"
        )
    return problems + _ramp_share_problems(config, workers) + _rank_problems(config, workers)


def _ramp_share_problems(config: Config, workers: int) -> list[str]:
    """Sizes of a ramp that so many workers, or their micro-batches, do not share evenly."""
    micro, problems = config.batch.micro, []
    for rows, _ in config.batch.ramp_steps:
        share = rows // workers
        if rows % workers:
            near = " or ".join(str(size) for size in (share * workers, (share + 1) * workers) if size)
            problems.append(
                f"batch.ramp has a stage of {rows} sequences, which cluster.workers={workers} cannot share evenly: "
                f"take {near}, or other workers"
            )
        elif micro is not None and micro < share and share % micro:
            divides = max(n for n in range(1, micro + 1) if share % n == 0)
            problems.append(
                f"batch.micro={micro} does not divide a worker's share of {share} sequences in the stage of {rows} "
                f"of batch.ramp (over cluster.workers={workers}): set batch.micro={divides}"
            )
    return problems


def _rank_problems(config: Config, workers: int) -> list[str]:
    """Ranks named by settings, that so many workers do not make."""
    problems, hpz, profile = [], config.zero.hpz, config.profile
    if config.zero.stage == 3 and workers % hpz:
        near = max(n for n in range(1, hpz + 1) if workers % n == 0)
        problems.append(
            f"zero.hpz={hpz} does not divide cluster.workers={workers}: set it to the GPUs of a host, or to {near}"
        )
    beyond = [rank for rank in profile.ranks if rank >= workers]
    if profile.steps is not None and beyond:
        problems.append(
            f"profile.ranks={profile.ranks} has rank {beyond[0]}, and cluster.workers={workers} makes ranks "
            f"0 to {workers - 1}: name one of those"
        )
    return problems


def _variable_problems(config: Config) -> list[str]:
    """Variables that each worker gets from its driver, and which another value would break."""
    return [
        f"cluster.env={{{name}: ...}} is not to be chosen: {OWN_VARIABLES[name]}"
        for name in config.cluster.env
        if name in OWN_VARIABLES
    ]


def _model_problems(config: Config) -> list[str]:
    model, problems = config.model, [*family_mismatch(config), *config.model.problems(config.batch.seq_len)]
    streams = config.data.streams or config.batch.default_streams
    carries = model.carries_state and config.objective.name == "causal"
    if carries and not (config.data.pack and streams == config.batch.global_):
        problems.append(
            "model.carry needs rows that go on from step to step, data.pack=true and a stream a row: "
            f"here data.streams={streams} and batch.global={config.batch.global_}. "
            "Leave data.streams and batch.ramp out, or set model.carry=false"
        )
    return problems


def family_mismatch(config: Config) -> list[str]:
    """The problem of an objective that the model family does not support, with the pairs that work; at most one."""
    family, name = config.model.family, config.objective.name
    if name in config.model.objectives:
        return []
    pairs = []
    for objective in variants("objective"):
        families = [name for name, keys in variants("model").items() if objective in keys.objectives]
        pairs.append(f"objective={objective} with {', '.join(families)}")
    return [f"objective={name} makes no sense for a model of family {family}. What does: {'; '.join(pairs)}"]


def _objective_problems(config: Config) -> list[str]:
    o, d, problems = config.objective, config.data, []
    labelled = o.name == "classify" or (o.name == "seq2seq" and o.task == "pairs")
    what = "objective.task=pairs" if o.name == "seq2seq" else f"objective={o.name}"
    if labelled and d.label_key is None:
        problems.append(f"{what} needs data.label_key, the field of a .jsonl line that holds what is to be learnt")
    if labelled and d.pack:
        problems.append(f"{what} reads a document a row: set data.pack=false")
    if o.name == "classify" and o.pool == "mean" and not config.model.mean_pooling:
        problems.append(
            "objective.pool=mean means nothing for an encoder-decoder, which says one word of a row: leave it out"
        )
    if config.batch.seq_len < MIN_ROW_TOKENS[o.name]:
        problems.append(
            f"batch.seq_len={config.batch.seq_len} leaves no room for objective={o.name}: "
            f"take {MIN_ROW_TOKENS[o.name]} or more"
        )
    return problems


def _data_problems(config: Config) -> list[str]:
    d, problems = config.data, mixture_problems(config)
    if d.val_fraction + d.test_fraction >= 1:
        both = f"data.val_fraction={d.val_fraction} and data.test_fraction={d.test_fraction}"
        problems.append(f"{both} leave nothing to train on: lower them")
    if d.is_chat:
        problems += _chat_problems(config)
    elif d.template is not None or d.row_tokens is not None:
        problems.append(f"data.template and data.row_tokens are for data=chat, and data.source is {d.source}")
    if d.source == "text" and not d.paths:
        problems.append("data=text needs data.paths, such as data.paths=[notes.txt,folder,'logs/*.jsonl']")
    if d.source in ("stdlib", "mix") and d.paths:
        cure = "give each source its own, in data.sources" if d.source == "mix" else "add data=text"
        problems.append(f"data.paths is for data=text, and data.source is {d.source}: {cure}")
    hidden = [path for path in d.paths if "://" in path and not MIRROR_URL.fullmatch(path)]
    if d.source == "text" and hidden:  # their values may hold a password
        problems.append(
            f"data.paths has {plural(len(hidden), 'URL')} with a password, a query or a chain: give plain ones such as "
            "s3://bucket/folder; credentials come from the environment or fsspec's own configuration"
        )
    t = d.tokenizer
    if t.kind == "file" and not t.path:
        problems.append("data.tokenizer.kind=file needs data.tokenizer.path, a tokenizer.json")
    if t.kind != "file":
        for key in ("path", "end_token", "max_unknown"):
            if (value := getattr(t, key)) is not None:
                problems.append(
                    f"data.tokenizer.{key}={value} is about a given tokenizer.json, and data.tokenizer.kind is "
                    f"{t.kind}: add data.tokenizer.kind=file, or leave {key} out"
                )
    if d.tokenizer.kind == "bpe" and (d.tokenizer.vocab_size or 0) < 257:
        problems.append("data.tokenizer.vocab_size must be at least 257 for bpe: 256 bytes and the end of text")
    return problems


def _chat_problems(config: Config) -> list[str]:
    d, problems = config.data, []
    if not d.paths:
        problems.append("data=chat needs data.paths, such as data.paths=[dialogues.jsonl]")
    if d.template is None:
        problems.append("data=chat needs data.template, such as chatml")
    if config.objective.name != "causal":
        problems.append(f"data=chat is trained by objective=causal, and objective={config.objective.name} is set")
    if not d.isolate:
        problems.append("data.isolate=false would let a conversation see another one of its row: leave it out")
    if d.label_key is not None:
        problems.append("data.label_key means nothing for conversations: leave it out")
    if d.tokenizer.kind == "chars":
        problems.append("data=chat takes a tokenizer that knows every text: data.tokenizer.kind=bpe, bytes or file")
    if d.row_tokens is None:
        problems.append("data=chat needs data.row_tokens, such as that of batch.seq_len")
    elif d.row_tokens > config.batch.seq_len:
        problems.append(
            f"data.row_tokens={d.row_tokens} is more than batch.seq_len={config.batch.seq_len}: lower the one or raise "
            "the other"
        )
    return problems


def generation_problems(generation: GenerationConfig) -> list[str]:
    """As ``config_problems``, for generation settings."""
    g, problems = generation, []
    if g.beams > 1 and g.n > g.beams:
        problems.append(f"generation.n={g.n} is more than generation.beams={g.beams}: raise beams, or lower n")
    if g.beams == 1 and g.n > 1 and g.temperature == 0:
        problems.append(
            f"generation.n={g.n} greedy texts would be the same: set generation.temperature, or generation.beams={g.n}"
        )
    return problems


def _zero_problems(config: Config) -> list[str]:
    z, problems = config.zero, []
    if z.offload and z.stage == 0:
        problems.append("zero.offload needs zero.stage 1, 2 or 3")
    for key in ("overlap", "bucket_mb"):
        if getattr(z, key) and z.stage == 0:
            problems.append(f"zero.{key} is about ZeRO's gradients: set zero.stage 1, 2 or 3, or leave it out")
    if z.bucket_mb == 0:
        problems.append("zero.bucket_mb=0 has room for no gradient: set it to 50 or more, or leave it out")
    for key in ("prefetch_mb", "hpz"):
        if getattr(z, key) not in (None, 1) and z.stage < 3:
            problems.append(f"zero.{key} is about the weights that only zero.stage=3 shards: set that, or leave it out")
    if z.comm_dtype == "bf16" and config.precision.name not in ("bf16", "auto"):
        problems.append(
            f"zero.comm_dtype=bf16 would cut the gradients of precision={config.precision.name}: "
            "leave it out, or set precision=bf16"
        )
    return problems


def _profile_problems(config: Config) -> list[str]:
    profile = config.profile
    if profile.steps is None:
        alone = "profile.memory says what to record in profile.steps, and they are not given: profile.steps=[20,25]"
        return [alone] if profile.memory else []
    problems, (first, last) = [], profile.steps
    if not first < last <= config.steps:
        problems.append(
            f"profile.steps=[{first},{last}] names no steps of this run: after the first number, up to the second, "
            f"which is steps={config.steps} at most, such as profile.steps=[{max(0, config.steps - 5)},{config.steps}]"
        )
    return problems


def _other_problems(config: Config) -> list[str]:
    problems = []
    o = config.optimizer
    if o.name == "nesterov" and o.momentum == 0:
        problems.append(
            "optimizer=nesterov without momentum is sgd: set optimizer.momentum, such as 0.9, or optimizer=sgd"
        )
    if config.save_mirror is not None and not MIRROR_URL.fullmatch(config.save_mirror):  # its value may hold a password
        problems.append(
            "save_mirror is no plain URL: give one such as s3://bucket/runs or file:///shared, "
            "without password, query or chain; credentials come from the environment or fsspec's own configuration"
        )
    warmup = config.schedule.warmup
    if isinstance(warmup, int) and warmup >= config.steps and warmup > 0:
        problems.append(
            f"schedule.warmup={warmup} takes all of steps={config.steps}: lower it, or give a fraction such as 0.02"
        )
    if config.init.skip and not config.init.from_:
        problems.append(
            "init.skip is about what init.from holds, and that is not given: give it, or leave init.skip out"
        )
    if config.stop.patience and not config.eval_every:
        problems.append("stop.patience counts evaluations, and with eval_every=0 there are none: set eval_every")
    return problems
