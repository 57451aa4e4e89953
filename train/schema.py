"""The typed tree of a run's configuration: every key, its type, its unit and its bounds.

A YAML in ``conf/`` chooses and sets numbers; what a key means stands here. ``train.config`` fills the tree from the
command line; everything else receives it whole and resolved, and never changes it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, types are not guessed at, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


class Run(Section):
    """Where the run lives."""

    name: str | None = Field(None, description="default: <model>-<data>")
    dir: str | None = Field(None, description="default: runs/<run.name>; every worker must see it")


class Batch(Section):
    """One optimizer step."""

    global_: Positive = Field(alias="global", description="sequences per optimizer step, over all workers")
    micro: Positive | None = Field(None, description="sequences per forward pass; default: a worker's whole share")
    seq_len: Positive = Field(description="tokens per sequence")


class Model(Section):
    """A decoder-only transformer: GPT-2 and Llama are settings of it."""

    family: Literal["decoder"]
    layers: Positive
    width: Positive = Field(description="features of the residual stream")
    heads: Positive
    kv_heads: Positive | None = Field(None, description="heads of keys and values; default: heads")
    mlp_width: Positive | None = Field(None, description="features inside the MLP; default: 4 * width")
    vocab_size: Positive | None = Field(None, description="default: the tokenizer's, rounded up to a multiple of 64")
    max_len: Positive = Field(description="longest sequence, in tokens, that positions are made for")
    position: Literal["learned", "rope"]
    norm: Literal["layer_norm", "rms_norm"]
    activation: Literal["gelu", "swiglu"]
    bias: bool = Field(description="biases in linear layers and layer norms")
    tied: bool = Field(description="the head shares the token embedding")
    dropout: Fraction = 0.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    rope_theta: Annotated[float, Field(gt=0)] = 10000.0
    init_std: Annotated[float, Field(gt=0)] = 0.02
    checkpoint_activations: bool = Field(False, description="recompute each block in the backward pass to save memory")


class Objective(Section):
    """What is trained."""

    name: Literal["causal"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of a target, spread over the vocabulary")
    z_loss: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of logsumexp(logits)^2 in the training loss, as PaLM's")


class Tokenizer(Section):
    """How text becomes tokens."""

    kind: Literal["bpe", "file", "chars", "bytes"]
    vocab_size: Positive | None = Field(None, description="of a trained bpe, its special token included")
    path: str | None = Field(None, description="a tokenizer.json, for kind=file")


class Data(Section):
    """The corpus, its shards and the order in which they are read."""

    source: Literal["stdlib", "text"]
    paths: list[str] = Field([], description="text files, folders, globs, .jsonl files; for source=text")
    text_key: str = Field("text", description="the field of a .jsonl line that holds the text")
    dir: str | None = Field(None, description="the prepared corpus; default: corpora/<source>-<fingerprint>")
    encoding_errors: Literal["strict", "replace"] = Field("strict", description="for bytes that are not UTF-8")
    dedup: bool = Field(True, description="drop documents whose cleaned text came before")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="share of documents held out, by hash")
    tokenizer: Tokenizer
    shard_tokens: Positive = Field(1 << 20, description="tokens per shard, about")
    streams: Positive | None = Field(None, description="ranges an epoch is cut into; default: batch.global")
    shuffle_shards: Positive = Field(16, description="shards within which samples are permuted")
    pack: bool = Field(True, description="rows are cut from a stream of documents; else a row is one document")
    isolate: bool = Field(True, description="no token attends to another document of its row")
    workers: Positive | None = Field(None, description="processes that prepare; default: the cores there are")


class Optimizer(Section):
    """The update rule."""

    name: Literal["sgd", "momentum", "adam", "adamw"]
    lr: Annotated[float, Field(gt=0)] = Field(description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="not on norms, biases, embeddings")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    momentum: Fraction = 0.9
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest global gradient norm; 0: no clipping")
    max_skipped: Positive = Field(10, description="updates in a row that may be skipped for non-finite numbers")


class Spikes(Section):
    """Steps that may not be kept: the run goes back, leaves out what they read, and goes on."""

    watch: Literal["all", "nonfinite", "off"] = Field("all", description="all: loss spikes too; off: only skip such updates")
    window: Annotated[int, Field(ge=8)] = Field(64, description="steps whose losses the next is judged by")
    deviations: Annotated[float, Field(gt=0)] = Field(8.0, description="robust standard deviations that make a loss high")
    max_rollbacks: NonNegative = Field(3, description="rollbacks in a row before the run ends: the model is at fault")


class Schedule(Section):
    """Learning rate over steps, as a factor of ``optimizer.lr``."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"]
    warmup: NonNegative | Fraction = Field(0, description="steps of linear warm-up, or a fraction of all steps")
    final: Fraction = Field(0.0, description="factor at the last step, for linear, cosine and wsd")
    decay: Fraction = Field(0.2, description="share of all steps that wsd decays over")


class Zero(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3]
    offload: bool = Field(False, description="optimizer states (and stage 3's parameters) rest in host memory")


class Precision(Section):
    """Number format of forward and backward; the master weights are fp32 always."""

    name: Literal["fp32", "bf16", "fp16"]


class Cluster(Section):
    """Where the workers run."""

    workers: Positive = 1
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: gpu where the cluster has any")
    cpus_per_worker: Positive = Field(1, description="cores a worker asks for; on a CPU they are its threads")
    address: str | None = Field(None, description="a Ray cluster that is up; auto: this machine's; default: one for the job")
    start: Literal["auto", "here", "ssh", "slurm"] = Field("auto", description="where that is: auto: also on the others there are")
    hosts: list[str] | str = Field([], description="other machines to start it on, over ssh; or a file of a name a line")
    bind: str | None = Field(None, description="this machine's address for them; default: the one that leads to them")
    remote_dir: str | None = Field(None, description="this repository's folder on them; default: the same as here")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(0, description="where rank 0 listens; 0: any free one")
    min_workers: Positive | None = Field(None, description="fewest to go on with when some are lost; default: workers")
    max_failures: NonNegative = Field(3, description="restarts in a row without progress before the job gives up")
    start_timeout: Positive = Field(300, description="seconds the workers may take to be placed and to meet")
    hang_timeout: Positive = Field(60, description="seconds without any progress of any worker before the job is restarted")
    grow_after: NonNegative = Field(30, description="seconds that a lost worker's place must be back before it is used again")
    stay_away: NonNegative = Field(120, description="seconds that the place of a worker that was told to end stays empty")


class Tracking(Section):
    """W&B beside the local files."""

    wandb: Literal["auto", "online", "offline", "off"] = Field("auto", description="auto: online with a key, else offline")
    project: str = "trireme"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []


class Generation(Section):
    """How samples are drawn."""

    prompts: list[str] = Field(description="what the samples of a run start with")
    max_tokens: NonNegative = 200
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0: greedy")
    top_k: NonNegative = Field(0, description="0: all")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: NonNegative = 0


class Config(Section):
    """A whole run."""

    run: Run = Run()
    steps: Positive = Field(description="optimizer steps in all")
    seed: NonNegative
    log_every: Positive = Field(description="steps between lines of metrics.jsonl")
    eval_every: NonNegative = Field(description="steps between evaluations; 0: only at the end")
    eval_tokens: Positive | None = Field(None, description="held-out tokens per evaluation in training; default: all")
    save_every: NonNegative = Field(description="steps between checkpoints; 0: only at the end or when stopped")
    keep_last: Positive = Field(description="newest checkpoints kept")
    keep_best: NonNegative = Field(description="checkpoints of lowest val_loss kept beside them")
    kernels: Literal["auto", "triton", "torch"] = Field("auto", description="auto: Triton's on CUDA, torch's own elsewhere")
    save_mirror: str | None = Field(None, description="where checkpoints are copied to as well: a URL that fsspec knows")
    batch: Batch
    model: Model
    objective: Objective
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    spikes: Spikes = Spikes()
    zero: Zero
    precision: Precision
    cluster: Cluster
    tracking: Tracking
    generation: Generation
