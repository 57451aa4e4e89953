"""Beam search for the most likely continuations of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from train.config import schema
from train.distributed import heartbeat
from train.generation.sample_loop import Continuation, PromptBatch, Reason
from train.generation.sampling import apply_repetition_penalty
from train.models.generation_api import Generative


@dataclass
class Beam:
    """An unfinished text: its tokens, the sum of their log-probabilities, and its row in the decoding state."""

    tokens: list[int]
    total: float
    row: int


@dataclass
class PromptBeams:
    """Beam search of one prompt: the unfinished beams, and the best finished texts, best first."""

    options: schema.GenerationConfig
    room: int
    """Tokens that a text may have."""
    full: Reason
    """Reason to give for a text that uses all of its room."""
    beams: list[Beam]
    finished: list[Continuation] = field(default_factory=list)

    def score(self, total: float, length: int) -> float:
        """Score by which texts are ranked: above 0 the length penalty favours long texts, at 0 short ones."""
        return total / max(length, 1) ** self.options.length_penalty

    def extend_beams(self, candidates: Sequence[Beam], eot: int, stopped: Callable[[Sequence[int]], bool]) -> None:
        """Extend the beams by ``candidates``, best first, two per beam.

        Finished ones are kept only if they are among the best ``beams`` of them, so that enough unfinished ones remain.
        """
        self.beams = []
        for rank, beam in enumerate(candidates):
            reason = self._end_reason(beam.tokens, eot, stopped)
            if reason is None and len(self.beams) < self.options.beams:
                self.beams.append(beam)
            elif reason is not None and rank < self.options.beams:
                text = beam.tokens[:-1] if reason == "eot" else beam.tokens
                self.finished.append(Continuation(text, reason, self.score(beam.total, len(beam.tokens))))
        self.finished = sorted(self.finished, key=lambda c: c.score or 0.0, reverse=True)[: self.options.beams]
        if len(self.finished) == self.options.beams and self.beams and not self._may_improve():
            self.beams = []

    def _end_reason(self, tokens: list[int], eot: int, stopped: Callable[[Sequence[int]], bool]) -> Reason | None:
        if tokens[-1] == eot:
            return "eot"
        if stopped(tokens):
            return "stop"
        return self.full if len(tokens) == self.room else None

    def _may_improve(self) -> bool:
        """Whether a beam can still beat the worst text kept; a sum of log-probabilities only falls."""
        length = self.room if self.options.length_penalty > 0 else len(self.beams[0].tokens)
        return self.score(self.beams[0].total, length) > (self.finished[-1].score or 0.0)


@torch.no_grad()
def beam_search(
    model: Generative,
    prompts: Sequence[Sequence[int]],
    options: schema.GenerationConfig,
    eot: int,
    stopped: Callable[[int, Sequence[int]], bool] = lambda prompt, tokens: False,
) -> list[list[Continuation]]:
    """The ``options.n`` best continuations of each prompt by a search with ``options.beams`` beams, best first.

    A text's score is the sum of its tokens' log-probabilities, ``eot`` included, over their number to the power of
    ``length_penalty``. It ends at ``eot``, where ``stopped(prompt, its tokens)`` is true, or when there is no more
    room. A search goes on until no beam can beat its best texts (transformers' ``early_stopping="never"``). Nothing is
    drawn, so temperature and cuts have no effect; ``repetition_penalty`` is applied to log-probabilities, as
    transformers does.
    """
    batch = PromptBatch(model, prompts, options, eot)
    rooms = zip(batch.room, batch.full, strict=True)
    searches = [PromptBeams(options, room, full, [Beam([], 0.0, 0)]) for room, full in rooms]
    unfinished = [number for number, search in enumerate(searches) if search.room > 0]
    for row, number in enumerate(unfinished):
        searches[number].beams[0].row = row
    if unfinished:
        logits, state = batch.prefill(unfinished)
    while unfinished:
        heartbeat.touch()
        written: list[list[int]] = []
        for number in unfinished:
            written += [batch.written[number] + beam.tokens for beam in searches[number].beams]
        scores = apply_repetition_penalty(logits.double().log_softmax(-1), written, options.repetition_penalty)
        for number in unfinished:
            search = searches[number]
            candidates = _candidates(search.beams, scores, 2 * options.beams)
            search.extend_beams(candidates, eot, partial(stopped, number))
        unfinished = [number for number in unfinished if searches[number].beams]
        beams: list[Beam] = []
        for number in unfinished:
            beams += searches[number].beams
        if beams:
            state = state.rows(torch.tensor([beam.row for beam in beams], device=logits.device))
            logits, state = model.decode(torch.tensor([beam.tokens[-1] for beam in beams], device=logits.device), state)
        for row, beam in enumerate(beams):
            beam.row = row
    return [search.finished[: options.n] or [Continuation(reason=search.full, score=0.0)] for search in searches]


def _candidates(beams: Sequence[Beam], scores: Tensor, count: int) -> list[Beam]:
    """The best ``count`` one-token extensions of the beams of one prompt, best first; scores (rows, V)."""
    rows = [beam.row for beam in beams]
    sums = torch.tensor([beam.total for beam in beams])
    extended = scores[rows] + sums.to(scores)[:, None]
    totals, indices = extended.flatten().topk(min(count, extended.numel()))
    candidates = []
    for total, index in zip(totals.tolist(), indices.tolist(), strict=True):
        number, token = divmod(index, scores.shape[-1])
        candidates.append(Beam([*beams[number].tokens, token], total, beams[number].row))
    return candidates
