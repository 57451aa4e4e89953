"""Typed tree of a run's configuration: every key with its type, unit and bounds.

YAML files in ``conf/`` choose and set numbers; this module says what a key means. ``train.config.load`` fills the tree
from the command line; everything else receives it resolved, and never changes it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from train.config.keys.base import FolderName, Fraction, NonNegative, Positive, Section
from train.config.keys.batch_size import BatchConfig
from train.config.keys.data import DataConfig
from train.config.keys.decoder import Decoder
from train.config.keys.encdec import EncDec
from train.config.keys.encoder import Encoder
from train.config.keys.generation import GenerationConfig
from train.config.keys.objectives import Causal, Classify, Masked, Seq2seq
from train.config.keys.recurrent import Recurrent

Model = Annotated[Decoder | Encoder | EncDec | Recurrent, Field(discriminator="family")]
"""Keys of a model; its family decides which there are."""
Objective = Annotated[Causal | Masked | Seq2seq | Classify, Field(discriminator="name")]
"""Keys of an objective; its name decides which there are."""


class RunConfig(Section):
    """Name and folder of a run."""

    name: FolderName | None = Field(None, description="default: <model>-<data>")
    dir: str | None = Field(None, description="default: runs/<run.name>; every worker must see it")


class InitConfig(Section):
    """Initial weights of a new run from another model, and what is frozen; a resumed run ignores it."""

    from_: str | None = Field(
        None, alias="from", description="a run's folder or a Hugging Face folder; default: weights are drawn"
    )
    checkpoint: str | NonNegative = Field("latest", description="of that run: latest, best or a step")
    skip: list[str] = Field([], description="parameters that are drawn all the same, as patterns such as '*embed*'")
    freeze: list[str] = Field(
        [], description="parameters that are not trained, as patterns such as 'backbone.blocks.[0-5].*'"
    )


class OptimizerConfig(Section):
    """Optimizer and its hyperparameters."""

    name: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "adagrad", "rmsprop", "lion", "muon"]
    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="not on norms, biases, embeddings")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.95), strict=False, description="decay of moments; rmsprop: of the second"
    )
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Fraction = Field(0.9, description="of momentum, nesterov and muon")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")
    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the rate of each block over that of the next one"
    )
    max_skipped: Positive = Field(10, description="updates in a row that may be skipped for non-finite numbers")


class SpikesConfig(Section):
    """Loss spikes and non-finite steps: roll back, skip the rows they read, go on."""

    watch: Literal["all", "nonfinite", "off"] = Field(
        "all", description="all: loss spikes too; off: only skip such updates"
    )
    window: Annotated[int, Field(ge=8)] = Field(64, description="steps whose losses the next is judged by")
    deviations: Annotated[float, Field(gt=0)] = Field(
        8.0, description="robust standard deviations that make a loss high"
    )
    max_rollbacks: NonNegative = Field(3, description="rollbacks in a row before the run ends: the model is at fault")


class StopConfig(Section):
    """Early stopping by a metric."""

    metric: str = Field("val_loss", description="what tells a better model: by it the best checkpoint is kept, too")
    patience: NonNegative = Field(
        0, description="evaluations in a row without a better one that end the run; 0: none do"
    )


class ScheduleConfig(Section):
    """Learning rate over steps, as a factor of ``optimizer.lr``."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
    warmup: NonNegative | Fraction = Field(0, description="steps of linear warm-up, or a fraction of all steps")
    final: Fraction = Field(0.0, description="factor at the last step, for linear, cosine and wsd")
    decay: Fraction = Field(0.2, description="share of all steps that wsd decays over")


class ZeroConfig(Section):
    """DeepSpeed ZeRO stage and offload."""

    stage: Literal[0, 1, 2, 3]
    offload: bool = Field(False, description="optimizer states (and stage 3's parameters) rest in host memory")
    overlap: bool | None = Field(
        None, description="gradients are reduced beside the backward pass; default: between GPUs"
    )
    bucket_mb: NonNegative | None = Field(
        None, description="megabytes of gradients reduced at a time; default: 200 between GPUs, else all at once"
    )
    prefetch_mb: NonNegative | None = Field(
        None, description="megabytes of weights that stage 3 gathers ahead; default: DeepSpeed's 50 million elements"
    )
    hpz: Positive = Field(
        1, description="stage 3: ranks, such as a host's GPUs, that keep the backward pass's gathers among themselves"
    )
    comm_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="format in which gradients are summed over ranks; auto: fp32 for bf16, else their own"
    )


class PrecisionConfig(Section):
    """Number format of forward and backward; master weights are always fp32."""

    name: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        description="auto: what the run began with; of a new run bf16 where every device has it, else fp32"
    )


class ProfileConfig(Section):
    """Profiler of a few steps, on a few ranks."""

    steps: Annotated[list[NonNegative], Field(min_length=2, max_length=2)] | None = Field(
        None, description="[20,25]: trace steps 21 to 25 into profile/ of the run's folder; default: none"
    )
    ranks: Annotated[list[NonNegative], Field(min_length=1)] = Field([0], description="the ranks that are traced")
    memory: bool = Field(False, description="trace allocations too; of a GPU, with a snapshot of its memory")


LONGEST_GRACE_S = 3600


class VerifyConfig(Section):
    """Proofs that a run makes of itself."""

    gradient: Literal["off", "first_step"] = Field(
        "off", description="first_step: the gradient of step 1 must be that of plain autograd in one process"
    )


def _as_text(value: Any) -> Any:
    """A number as an environment variable holds it, for the command line reads NCCL_IB_TIMEOUT=22 as one."""
    return str(int(value) if isinstance(value, bool) else value) if isinstance(value, int | float) else value


VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
VariableValue = Annotated[str, BeforeValidator(_as_text)]


class ClusterConfig(Section):
    """Number, place and recovery of the workers."""

    workers: Positive | None = Field(
        None, description="default: one a GPU that nobody holds; without GPUs two, or one on a single core"
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: gpu where the cluster has any")
    cpus_per_worker: Positive = Field(1, description="cores a worker asks for; on a CPU they are its threads")
    deterministic: bool = Field(
        False, description="slower kernels and collectives that repeat bit for bit on the same GPUs"
    )
    address: str | None = Field(
        None, description="a Ray cluster that is up; auto: this machine's; default: one for the job"
    )
    start: Literal["auto", "here", "ssh", "slurm"] = Field(
        "auto", description="where that is: auto: also on the others there are"
    )
    hosts: list[str] | str = Field(
        [], description="other machines to start it on, over ssh; or a file of a name a line"
    )
    bind: str | None = Field(None, description="this machine's address for them; default: the one that leads to them")
    remote_dir: str | None = Field(None, description="this repository's folder on them; default: the same as here")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="where rank 0 listens; 0: any free one")
    min_workers: Positive | None = Field(None, description="fewest to go on with when some are lost; default: workers")
    max_failures: NonNegative = Field(3, description="restarts in a row without progress before the job gives up")
    start_timeout: Positive = Field(300, description="seconds the workers may take to be placed and to meet")
    hang_timeout: Positive = Field(
        60, description="seconds without any progress of any worker before the job is restarted"
    )
    grow_after: NonNegative = Field(
        30, description="seconds that a lost worker's place must be back before it is used again"
    )
    stop_grace: Annotated[int, Field(gt=0, le=LONGEST_GRACE_S)] = Field(
        60, description="seconds that workers may take, after a signal to everybody, to finish their step and save"
    )
    stay_away: NonNegative = Field(
        120, description="seconds that the place of a worker that was told to end stays empty"
    )
    preflight: Literal["auto", "off"] = Field(
        "auto", description="auto: GPUs are checked and measured for two seconds before training"
    )

    env: dict[VariableName, VariableValue] = Field(
        {}, description="environment variables of every worker, such as {NCCL_ALGO: Ring}"
    )

    @property
    def worker_count(self) -> int:
        """``workers``, which the driver of a job fills in once it knows the cluster."""
        if self.workers is None:
            raise ValueError("cluster.workers is not known before the cluster is: give cluster.workers=N")
        return self.workers


class TrackingConfig(Section):
    """W&B settings, beside the local files."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: as WANDB_MODE says, else online with a key, offline without"
    )
    project: str | None = Field(None, description="of W&B; without it WANDB_PROJECT, else trireme")
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field([])


class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = RunConfig()
    steps: Positive = Field(description="optimizer steps in all")
    seed: NonNegative
    log_every: Positive = Field(description="steps between lines of metrics.jsonl")
    eval_every: NonNegative = Field(description="steps between evaluations; 0: only at the end")
    eval_tokens: Positive | None = Field(None, description="held-out tokens per evaluation in training; default: all")
    save_every: NonNegative = Field(description="steps between checkpoints; 0: only at the end or when stopped")
    keep_last: Positive = Field(description="newest checkpoints kept")
    keep_best: NonNegative = Field(
        description="kept beside them, the best by stop.metric: above 0, each best so far is saved"
    )
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto", description="auto: Triton's on CUDA, torch's own elsewhere"
    )
    save_mirror: str | None = Field(
        None, description="where checkpoints are copied to as well: a URL that fsspec knows"
    )
    batch: BatchConfig
    model: Model
    init: InitConfig = InitConfig()
    objective: Objective
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    stop: StopConfig = StopConfig()
    spikes: SpikesConfig = SpikesConfig()
    zero: ZeroConfig
    precision: PrecisionConfig
    profile: ProfileConfig = ProfileConfig()
    verify: VerifyConfig = VerifyConfig()
    cluster: ClusterConfig
    tracking: TrackingConfig
    generation: GenerationConfig


class SweepConfig(Section):
    """A sweep over keys: ``-m``, with values such as 1e-3,1e-4 or range(1,4) or interval(0,1)."""

    name: FolderName | None = Field(
        None, description="default: the keys that vary, or the name of the file of sweep.points"
    )
    dir: str | None = Field(None, description="a folder with one for each trial; default: sweeps/<sweep.name>")
    sampler: Literal["grid", "random", "tpe", "cmaes", "nsga2"] = Field("grid", description="grid: every combination")
    points: str | None = Field(
        None, description="a YAML file of trials: a list of lists of key=value, each combined with the rest"
    )
    trials: Positive = Field(20, description="of a search; a grid has as many as there are combinations")
    budget: Positive | None = Field(
        None, description="of a search: most steps of all trials together; none starts that may pass it"
    )
    metric: str | list[str] = Field(
        "val_loss", description="of metrics.jsonl; several: the best trade-offs are looked for"
    )
    direction: Literal["minimize", "maximize"] | list[Literal["minimize", "maximize"]] = Field(
        "minimize", description="one for every metric, or a list"
    )
    pruner: Literal["none", "asha", "median"] = Field("none", description="what ends trials early that are no good")
    startup: Positive | None = Field(
        None,
        description="of tpe: trials spread evenly before it looks at results; "
        "default: a fifth of sweep.trials, 4 to 10",
    )
    seed: NonNegative = Field(0, description="of the suggestions")
    parallel: Positive | None = Field(None, description="most trials at once; default: as many as there is room for")
    retries: NonNegative = Field(1, description="of a trial that was ended from outside, by the same command")


class CommandLine(Config):
    """All keys of the command line: those of a run and, with -m, of the sweep."""

    sweep: SweepConfig = SweepConfig()


def source_names(config: Config) -> tuple[str, ...]:
    """Names of the sources of a mixture, in the order of their numbers; of a single corpus there are none."""
    return tuple(sorted(config.data.sources))


DISCRIMINATORS = {name: str(field.discriminator) for name, field in Config.model_fields.items() if field.discriminator}
"""Sections with several variants, and the key that tells them apart: {"model": "family", "objective": "name"}."""


def variants(section: str) -> dict[str, Any]:
    """The classes of a section in ``DISCRIMINATORS``, by the value of its key: {"decoder": Decoder, ...}."""
    classes = get_args(Config.model_fields[section].annotation)
    return {get_args(variant.model_fields[DISCRIMINATORS[section]].annotation)[0]: variant for variant in classes}
