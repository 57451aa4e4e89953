"""Layout of a run's folder: the name of every file in it, spelled once. Imports no torch.

config.yaml, tokenizer.json, corpus.json, environment.json, init.json   what the run is, and what it came from
gradient.json                                                           the proof of the first gradient, where asked for
chat_template.json                                                      of a run that is trained on conversations
kernels.json                                                             which kernels run, where they were measured
metrics.jsonl, samples.jsonl, skipped.jsonl                              lines by step
run.json, startup.json, world.json, restarts.jsonl, ranks.jsonl              its starts, ranks and failures
summary.json                                                             once it is complete
checkpoints/step_<n>/, checkpoints/latest                                see ``train.checkpoint``
profile/                                                                 traces of steps, where asked for
logs/rank_<n>.log, logs/rank_<n>.flight.jsonl, lock, logs/writer.lock, wandb/
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT_NAME = re.compile(r"step_(0|[1-9]\d*)")


def checkpoint_name(step: int) -> str:
    """The name of the folder of a step's checkpoint."""
    return f"step_{step}"


def checkpoint_step(name: str) -> int | None:
    """The step of a checkpoint's folder, by its name; None where that is no checkpoint's."""
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps in a folder of checkpoints, in order: a folder of that name is complete, whether or not it is damaged
    since.
    """
    steps = [checkpoint_step(path.name) for path in checkpoints.glob("step_*")]
    return sorted(step for step in steps if step is not None)


def shard_name(rank: int) -> str:
    """The name of a rank's file in a checkpoint."""
    return f"rank_{rank}.safetensors"


@dataclass(frozen=True)
class RunDir:
    """The folder of one run, ``run.dir``."""

    path: Path

    @property
    def config(self) -> Path:
        """The composed configuration of the newest start, secrets hidden."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        """The corpus' tokenizer, as the ``tokenizers`` library reads it."""
        return self.path / "tokenizer.json"

    @property
    def chat_template(self) -> Path:
        """The chat template of a corpus of conversations: see ``train.data.chat.template``."""
        return self.path / "chat_template.json"

    @property
    def corpus(self) -> Path:
        """Folder and fingerprint of the corpus."""
        return self.path / "corpus.json"

    @property
    def environment(self) -> Path:
        """Versions, commit and machine of the newest start."""
        return self.path / "environment.json"

    @property
    def init(self) -> Path:
        """Where the first weights came from, if they were loaded."""
        return self.path / "init.json"

    @property
    def kernels(self) -> Path:
        """The kernels' tiles and the attention that the run has measured, and on what: kept over its starts."""
        return self.path / "kernels.json"

    @property
    def gradient(self) -> Path:
        """The engine's gradient of the first step against plain autograd's: see ``train.engine.gradient_check``."""
        return self.path / "gradient.json"

    @property
    def profile(self) -> Path:
        """Traces of the steps that were profiled."""
        return self.path / "profile"

    @property
    def metrics(self) -> Path:
        """A line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """A line for each sampled text."""
        return self.path / "samples.jsonl"

    @property
    def skipped(self) -> Path:
        """A line for each step whose rows are left out: see ``train.stability.skipped_rows``."""
        return self.path / "skipped.jsonl"

    @property
    def summary(self) -> Path:
        """The last numbers of a complete run."""
        return self.path / "summary.json"

    @property
    def starts(self) -> Path:
        """State kept over the starts of a run: their count, the seconds by cause, the W&B id."""
        return self.path / "run.json"

    @property
    def startup(self) -> Path:
        """Seconds from the command to each phase of the newest start."""
        return self.path / "startup.json"

    @property
    def world(self) -> Path:
        """Where each rank of the newest attempt runs."""
        return self.path / "world.json"

    @property
    def restarts(self) -> Path:
        """A line for each recovery from a failure."""
        return self.path / "restarts.jsonl"

    @property
    def ranks(self) -> Path:
        """Seconds that the ranks worked on a step: a line every ten seconds at most."""
        return self.path / "ranks.jsonl"

    @property
    def wandb(self) -> Path:
        """The folder of W&B's own files."""
        return self.path / "wandb"

    @property
    def lock(self) -> Path:
        """Locked by the driver while it lives."""
        return self.path / "lock"

    @property
    def logs(self) -> Path:
        """The folder of the ranks' logs."""
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """All that a rank and its libraries print."""
        return self.logs / f"rank_{rank}.log"

    def flight_record(self, rank: int) -> Path:
        """The last collectives of a rank that hung, by torch's flight recorder: a line of JSON for each recorder."""
        return self.logs / f"rank_{rank}.flight.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.checkpoints / checkpoint_name(step)
