"""Beam search: the most likely continuations that a search of bounded width finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from train.config import schema
from train.distributed import heartbeat
from train.generation.generate import Continuation, PromptBatch, Reason
from train.generation.sampling import penalised
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

    options: schema.Generation
    room: int
    full: Reason
    beams: list[Beam]
    ended: list[Continuation] = field(default_factory=list)

    def score(self, total: float, length: int) -> float:
        """Score by which texts are ranked: above 0 the length penalty favours long texts, at 0 short ones."""
        return total / max(length, 1) ** self.options.length_penalty

    def take(self, candidates: Sequence[Beam], eot: int, stopped: Callable[[Sequence[int]], bool]) -> None:
        """Extend the beams by ``candidates``, best first, two per beam.

        Finished ones are kept only if they are among the best ``beams`` of them, so that enough unfinished ones remain.
        """
        self.beams = []
        for rank, beam in enumerate(candidates):
            why = self._end(beam.tokens, eot, stopped)
            if why is None and len(self.beams) < self.options.beams:
                self.beams.append(beam)
            elif why is not None and rank < self.options.beams:
                text = beam.tokens[:-1] if why == "eot" else beam.tokens
                self.ended.append(Continuation(text, why, self.score(beam.total, len(beam.tokens))))
        self.ended = sorted(self.ended, key=lambda c: c.score or 0.0, reverse=True)[: self.options.beams]
        if len(self.ended) == self.options.beams and self.beams and not self._may_improve():
            self.beams = []

    def _end(self, tokens: list[int], eot: int, stopped: Callable[[Sequence[int]], bool]) -> Reason | None:
        if tokens[-1] == eot:
            return "eot"
        if stopped(tokens):
            return "stop"
        return self.full if len(tokens) == self.room else None

    def _may_improve(self) -> bool:
        """Whether a beam can still beat the worst text kept; a sum of log-probabilities only falls."""
        length = self.room if self.options.length_penalty > 0 else len(self.beams[0].tokens)
        return self.score(self.beams[0].total, length) > (self.ended[-1].score or 0.0)


@torch.no_grad()
def beam_search(
    model: Generative,
    prompts: Sequence[Sequence[int]],
    options: schema.Generation,
    eot: int,
    stopped: Callable[[int, Sequence[int]], bool] = lambda prompt, tokens: False,
) -> list[list[Continuation]]:
    """The ``options.n`` best continuations of each prompt found with ``options.beams`` beams, best first, with scores.

    A text's score is the sum of its tokens' log-probabilities, ``eot`` included, over their number to the power of
    ``length_penalty``. It ends at ``eot``, where ``stopped(prompt, its tokens)`` is true, or when there is no more
    room. A search goes on until no beam can beat its best texts (transformers' ``early_stopping="never"``). Nothing is
    drawn, so temperature and cuts have no effect; ``repetition_penalty`` is applied to log-probabilities, as
    transformers does.
    """
    given = PromptBatch(model, prompts, options, eot)
    searches = [
        PromptBeams(options, room, full, [Beam([], 0.0, 0)]) for room, full in zip(given.room, given.full, strict=True)
    ]
    going = [number for number, search in enumerate(searches) if search.room > 0]
    for row, number in enumerate(going):
        searches[number].beams[0].row = row
    if going:
        logits, state = given.prefill(going)
    while going:
        heartbeat.touch()
        held = [given.held[number] + beam.tokens for number in going for beam in searches[number].beams]
        scores = penalised(logits.double().log_softmax(-1), held, options.repetition_penalty)
        for number in going:
            search = searches[number]
            search.take(_candidates(search.beams, scores, 2 * options.beams), eot, partial(stopped, number))
        going = [number for number in going if searches[number].beams]
        beams = [beam for number in going for beam in searches[number].beams]
        if beams:
            state = state.rows(torch.tensor([beam.row for beam in beams], device=logits.device))
            logits, state = model.decode(torch.tensor([beam.tokens[-1] for beam in beams], device=logits.device), state)
        for row, beam in enumerate(beams):
            beam.row = row
    return [search.ended[: options.n] or [Continuation(reason=search.full, score=0.0)] for search in searches]


def _candidates(beams: Sequence[Beam], scores: Tensor, count: int) -> list[Beam]:
    """The best ``count`` one-token extensions of the beams of one prompt, best first; scores (rows, V)."""
    mine = scores[[beam.row for beam in beams]] + torch.tensor([beam.total for beam in beams]).to(scores)[:, None]
    totals, places = mine.flatten().topk(min(count, mine.numel()))
    width = scores.shape[-1]
    return [
        Beam([*beams[place // width].tokens, place % width], total, beams[place // width].row)
        for total, place in zip(totals.tolist(), places.tolist(), strict=True)
    ]
