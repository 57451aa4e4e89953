"""Proof of a run's gradient: the engine's, of the run's own first batch, against plain autograd in one process.

The engine's gradient is what its optimizer is given: summed over micro-batches and ranks, divided by the count of
trained targets, clipped. The other one is made without engine, ZeRO or process group: rank 0 reads all rows of the
same global batch itself, counts their targets itself, and calls ``backward`` on a copy of the model in fp32. Dropout is
off in both; no update is made, and nothing of the run changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.batch import Batch, count_targets, to_device
from train.config.schema import Config
from train.data.corpus.shards import Corpus
from train.data.loader import RankShare, training_loader
from train.data.sampling.batch_plan import Cursor
from train.distributed import heartbeat
from train.distributed.process_group import DistContext, broadcast_, broadcast_object, gather_objects, run_on_rank0
from train.engine.allocation import allocate_parameters
from train.engine.engine import Engine
from train.errors import UserError
from train.models.layers import without_dropout
from train.objectives import describe_objective
from train.pretrained.init_from import freeze_parameters
from train.util.format import plural
from train.util.io import to_json, write_whole
from train.util.run_layout import RunDir

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest relative difference of a parameter's gradient, by precision: norm of the difference over norm."""
SCALE_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}
"""Largest relative difference of the length of the whole gradient along the expected one. Rounding errors of single
elements cancel in it, so that it shows a wrong count or factor that hides in them.
"""
FLOOR = 1e-2
"""A parameter's norm counts as at least this share of the whole gradient's, its own share of elements considered: one
whose gradient is zero but for rounding has no relative difference.
"""
SAMPLED_ABOVE = 200_000_000
"""Trained elements from which on only some parameters are compared, of so many elements together."""
SCALE_ATTEMPTS = 64
"""Attempts to find a loss scale of fp16 that does not overflow."""


@dataclass(frozen=True)
class GradientReport:
    """Outcome of one comparison, as ``gradient.json`` in the run's folder has it."""

    equal: bool
    difference: str | None
    """What differs, in words: the parameter, by how much, and what may be; None where nothing does."""
    parameters: int
    """Trained parameters."""
    compared: int
    worst: str
    """The parameter with the largest relative difference."""
    largest: float
    tolerance: float
    scale: float
    """Length of the engine's gradient along the expected one, over the length of that."""
    norm: float
    """Of the expected gradient before it is clipped; of the engine's where parameters are sampled."""
    rows: int
    targets: dict[str, int]
    """Trained targets of the global batch, by loss."""
    stage: int
    workers: int
    accumulation: int
    precision: str

    def summary(self) -> str:
        """The outcome in one line for the user."""
        if self.difference:
            return self.difference
        which = f"all {self.parameters}" if self.compared == self.parameters else f"{self.compared} sampled"
        return (
            f"the gradient of the first batch is that of plain autograd in one process: {which} parameters, largest "
            f"relative difference {self.largest:.1e} ({self.worst}), allowed {self.tolerance:.0e}"
        )


class WrongGradient(UserError):  # noqa: N818  it says what the gradient is
    """The engine's gradient is not that of plain autograd: the run ends before its first update."""


@dataclass
class GradientCheck:
    """Compares the gradient of a run's first step, once, on all ranks together."""

    config: Config
    """With its precision chosen."""
    world: DistContext
    corpus: Corpus
    engine: Engine
    micro: int
    """Rows of a micro-batch, in the engine and here."""
    skipped: Mapping[Cursor, frozenset[int]]
    """Rows that the run leaves out: see ``Loader.skip_rows``."""
    note: Callable[[str], None]
    """Shows the user a line of text."""

    def check(self, micro_batches: Sequence[Batch], counts: dict[str, int]) -> None:
        """Compare the gradient of this rank's ``micro_batches`` and the agreed ``counts``. A collective.

        Raises WrongGradient on every rank where they differ; the report is in the run's folder by then.
        """
        names = sampled_names({n: self.engine.shapes[n].numel() for n in self.engine.names.values()})
        with without_dropout(self.engine.module):
            gradients, norm = engine_gradients(self.engine, micro_batches, counts)
        reference = self._reference(set(names))
        targets, rows = self._differentiate(reference)
        expected_norm, clip = self._norm_and_clip(reference, norm, whole=len(names) == len(self.engine.names))
        measured = [self._compare(name, gradients, reference, clip) for name in names]
        report = self._judge(dict(zip(names, measured, strict=True)), norm, expected_norm, (targets, rows))
        file = RunDir(Path(self.config.run.dir or "")).gradient
        if error := run_on_rank0(lambda: write_whole(file, to_json(asdict(report), indent=1).encode())):
            raise UserError(error)
        if not report.equal:
            raise WrongGradient(report.summary())
        self.note(report.summary())

    def _reference(self, names: set[str]) -> nn.Module | None:
        """Rank 0's copy of the model in fp32, with the weights of the engine's forward pass. A collective at stage 3.

        Only the parameters ``names`` get gradients.
        """
        copy = None
        if self.world.is_rank0:
            copy = describe_objective(self.config, self.corpus.tokenizer.vocab_size)
            freeze_parameters(copy, self.config.init.freeze)
            allocate_parameters(copy, self.world.device, torch.float32, stage=0)
        own = dict(copy.named_parameters()) if copy else {}
        for name, param in self.engine.module.named_parameters():
            with self.engine.gathered(param), torch.no_grad():
                if copy:
                    own[name].copy_(param)
                    own[name].requires_grad_(name in names)
            heartbeat.touch()
        return copy

    def _differentiate(self, reference: nn.Module | None) -> tuple[dict[str, int], int]:
        """Rank 0: gradients of the loss over all rows of the first global batch; its targets by loss, and its rows.

        The sum over rows of each loss is divided by the count of its targets among them. A collective.
        """
        targets: dict[str, int] = {}
        rows = 0
        if reference:
            loader = training_loader(self.corpus, self.config, RankShare(0, 1, self.micro))
            loader.skip_rows(self.skipped)
            batches = loader.peek(Cursor())
            for batch in batches:
                rows += len(batch["tokens"])
                for name, count in count_targets(batch).items():
                    targets[name] = targets.get(name, 0) + count
            reference.train()
            with without_dropout(reference):
                for batch in batches:
                    heartbeat.touch()
                    losses = reference(to_device(batch, self.world.device))
                    torch.stack([total / max(targets[name], 1) for name, (total, _) in losses.items()]).sum().backward()
        targets, rows = broadcast_object([targets, rows])
        return targets, rows

    def _norm_and_clip(self, reference: nn.Module | None, norm: float, whole: bool) -> tuple[float, float]:
        """The norm of the expected gradient, and the factor that clips it. Without the ``whole`` gradient the norm is
        the engine's own. A collective.
        """
        if whole:
            grads = [p.grad for p in reference.parameters() if p.grad is not None] if reference else []
            norm = broadcast_object(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)
        limit = self.config.optimizer.clip
        return norm, min(1.0, limit / (norm + 1e-6)) if limit else 1.0

    def _compare(
        self, name: str, gradients: Mapping[str, list[tuple[int, Tensor]]], reference: nn.Module | None, clip: float
    ) -> tuple[float, float, float, int]:
        """Of one parameter: squared norms of difference and expected gradient, their product with the engine's, and the
        elements that ranks hold. A collective.
        """
        shape = self.engine.shapes[name]
        expected = torch.zeros(shape.numel(), device=self.world.device)
        if reference and (grad := reference.get_parameter(name).grad) is not None:
            expected.copy_(grad.flatten()).mul_(clip)
        broadcast_(expected, 0)
        difference, product, held = 0.0, 0.0, 0
        for start, grad in gradients.get(name, []):
            part = expected.narrow(0, start, grad.numel()).double()
            difference += float((grad.double() - part).square().sum())
            product += float((grad.double() * part).sum())
            held += grad.numel()
        by_rank = gather_objects([difference, product, held])
        if self.engine.replicated:  # each rank has all of it: the worst of them
            by_rank = [max(by_rank, key=lambda one: one[0] if one[2] == shape.numel() else math.inf)]
        difference, product, held = map(sum, zip(*by_rank, strict=True))
        return difference, float(expected.double().square().sum()), product, int(held)

    def _judge(
        self,
        measured: Mapping[str, tuple[float, float, float, int]],
        norm: float,
        expected_norm: float,
        batch: tuple[dict[str, int], int],
    ) -> GradientReport:
        """The report over all parameters' numbers of ``_compare``. A pure function of them."""
        precision = self.config.precision.name
        tolerance, sizes = TOLERANCE[precision], {name: self.engine.shapes[name].numel() for name in measured}
        squared = sum(one[1] for one in measured.values())
        elements = sum(sizes.values())
        relative, absent = {}, []
        for name, (difference, expected, _, held) in measured.items():
            floor = FLOOR**2 * squared * sizes[name] / elements
            size = math.sqrt(max(expected, floor))
            relative[name] = math.sqrt(difference) / size if size else (math.inf if difference else 0.0)
            if held != sizes[name]:
                absent.append(f"{name}: the optimizer is given {held} of its {sizes[name]} elements")
        worst = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
        longest = max(measured, key=lambda name: measured[name][1])
        scale = sum(one[2] for one in measured.values()) / squared if squared else 1.0
        problem = None
        if absent:
            problem = absent[0]
        elif not relative[worst] <= tolerance:
            problem = f"{worst} differs by {relative[worst]:.2e} of its norm, and {tolerance:.0e} is allowed"
        elif not abs(scale - 1) <= SCALE_TOLERANCE[precision]:
            allowed = f"1 within {SCALE_TOLERANCE[precision]:.0e} is allowed"
            problem = f"all parameters together, {worst} most, are {scale:.6f} times as long, and {allowed}"
        elif not abs(norm - expected_norm) <= SCALE_TOLERANCE[precision] * expected_norm:  # clipping would hide it
            problem = f"its norm, most of which is {longest}'s, is another"
        where = f"ZeRO stage {self.config.zero.stage}, {plural(self.world.size, 'worker')}"
        wrong = f"the gradient of the first batch is not that of plain autograd ({where}): {problem}. Its norm before "
        wrong += f"clipping is {norm:.6g}, expected {expected_norm:.6g}. Nothing was updated"
        return GradientReport(
            equal=problem is None,
            difference=wrong if problem else None,
            parameters=len(self.engine.names),
            compared=len(measured),
            worst=worst,
            largest=relative[worst],
            tolerance=tolerance,
            scale=scale,
            norm=expected_norm,
            rows=batch[1],
            targets=batch[0],
            stage=self.config.zero.stage,
            workers=self.world.size,
            accumulation=self.engine.engine.gradient_accumulation_steps(),
            precision=precision,
        )


def sampled_names(sizes: Mapping[str, int]) -> list[str]:
    """The parameters to compare, of ``sizes`` elements each: all, or, of a large model, every n-th in its order."""
    names = list(sizes)
    every = -(-sum(sizes.values()) // SAMPLED_ABOVE)
    return names[:: max(1, every)]


def engine_gradients(
    engine: Engine, micro_batches: Sequence[Batch], counts: dict[str, int]
) -> tuple[dict[str, list[tuple[int, Tensor]]], float]:
    """The gradient that the engine gives its optimizer for a step: (first element, gradient) of this rank's shards by
    parameter, and the norm before clipping. No update is made, and the state is what it was.

    Where fp16 overflows, the loss scale is lowered until it does not, as steps would.
    """
    scalars, carried = engine.scalars(), [memory.rows.clone() for memory in engine.memories]
    with captured_gradients(engine) as gradients:
        for _ in range(SCALE_ATTEMPTS if engine.scalars() else 1):
            result = engine.train_step(micro_batches, counts, 0.0, lambda: None)
            if result.update_applied:
                break
    engine.load_scalars(scalars)
    for memory, rows in zip(engine.memories, carried, strict=True):
        memory.rows.copy_(rows)
    return gradients, float(result.grad_norm)


@contextmanager
def captured_gradients(engine: Engine) -> Iterator[dict[str, list[tuple[int, Tensor]]]]:
    """Inside, the engine's optimizer keeps a copy of the gradients that it is given, and updates nothing.

    ZeRO calls it once for each group of parameters, stage 3 for each flat tensor, and takes the gradients away behind
    each call.
    """
    gradients: dict[str, list[tuple[int, Tensor]]] = {}

    def keep(*arguments: Any, **options: Any) -> None:
        given = {id(param) for group in engine.inner.param_groups for param in group["params"]}
        for shard in engine.trained:
            if id(shard.holder) in given and shard.holder.grad is not None:
                view = shard.view_of(shard.holder.grad).float().clone()
                gradients.setdefault(shard.name, []).append((shard.start, view))

    vars(engine.inner)["step"] = keep
    try:
        yield gradients
    finally:
        del vars(engine.inner)["step"]
