"""Decoder-only transformer, with settings for GPT-2 and Llama.

GPT-2: Radford et al. 2019. Llama: Touvron et al. 2023.

Written for one device; ZeRO is applied from outside. Shapes: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kernels
from train.batch import Batch
from train.config.keys import decoder as keys
from train.models.layers import (
    Attention,
    AttentionContext,
    Embedding,
    KVCache,
    Norm,
    build_mlp,
    dropout,
    last_token,
    linear_weights,
    run_part,
)


class Block(nn.Module):
    """Pre-norm Transformer block: attention and an MLP, each normalised before and added to the residual stream after.

    Dropout and the residual add are left to the next norm, which fuses all three: a block takes and returns the
    residual stream and the output (delta) that is still to be dropped out and added to it.
    """

    def __init__(self, model: keys.Decoder, number: int) -> None:
        super().__init__()
        self.recomputed = model.recomputed(number)
        self.attention_norm = Norm(model)
        self.attention = Attention(model)
        self.mlp_norm = Norm(model)
        self.mlp = build_mlp(model)

    def forward(
        self, x: Tensor, delta: Tensor | None, context: AttentionContext, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x, delta) -> (x, delta), each (B, T, D): the residual stream and the output not yet added to it."""
        h, x = self.attention_norm(x, delta)
        h, x = self.mlp_norm(x, run_part(self.attention, self.recomputed == "attention", h, context, cache))
        return x, run_part(self.mlp, self.recomputed == "mlp", h)


@dataclass
class DecoderState:
    """Decoding state: the KV caches and how many tokens each row holds. Only the decoder reads its fields.

    ``ends`` (B,) int64 is the number of tokens of each row; ``longest`` the largest of them, known without a device
    synchronisation. A row that is full keeps overwriting its last position: its logits are meaningless from then on.
    """

    caches: list[KVCache]
    ends: Tensor
    longest: int
    capacity: int

    def rows(self, index: Tensor) -> DecoderState:
        """State whose row i is row index[i] of this one."""
        return DecoderState([cache.rows(index) for cache in self.caches], self.ends[index], self.longest, self.capacity)


class Decoder(nn.Module):
    """Token embedding, Transformer blocks and a final norm, without a head."""

    def __init__(self, model: keys.Decoder, vocab_size: int) -> None:
        """``vocab_size`` is the number of rows of the embedding, padding included."""
        super().__init__()
        self.model = model
        self.max_len = model.max_len
        self.embed = Embedding(vocab_size, model.width, model.deviation(model.width))
        learned = model.position == "learned"
        self.positions = Embedding(model.max_len, model.width, model.deviation(model.width)) if learned else None
        self.blocks = nn.ModuleList(Block(model, number) for number in range(model.layers))
        self.norm = Norm(model)

    def forward(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden states (B, T, D). With ``isolate`` no token sees another segment of its row.

        Without it attention is plainly causal: padding is at the end of a row, where no trained token sees it.
        """
        if isolate:
            positions = batch["positions"]
            context = AttentionContext(self._rope(positions), kernels.Segments(batch["segments"], batch["segments"]))
        else:  # every row counts from 0
            positions = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)[None]
            context = AttentionContext(self._rope(positions))
        return self._run(batch["tokens"], positions, context)

    def pooled(self, batch: Batch, isolate: bool = True) -> Tensor:
        """Hidden state (B, D) of each row's last token."""
        return last_token(self(batch, isolate), batch)

    def prefill(self, tokens: Tensor, lengths: Tensor, capacity: int) -> tuple[Tensor, DecoderState]:
        """Read prompts (B, T), row b holding lengths[b] tokens and then padding; room for ``capacity`` tokens per row.

        Returns the hidden state of each row's last token, (B, D), and the decoding state.
        """
        rows, longest = tokens.shape
        positions = torch.arange(longest, device=tokens.device)[None]
        state = DecoderState([KVCache(capacity) for _ in self.blocks], lengths, longest, capacity)
        hidden = self._run(tokens, positions, AttentionContext(self._rope(positions)), state.caches)
        return hidden[torch.arange(rows, device=tokens.device), lengths - 1], state

    def decode(self, token: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Read one more token (B,) per row: its hidden state (B, D), and the state after it."""
        ends, longest = state.ends.clamp(max=state.capacity - 1), min(state.longest, state.capacity - 1)
        keys = torch.arange(longest + 1, device=token.device)
        visible = kernels.Segments(torch.ones_like(token)[:, None], (keys <= ends[:, None]).long())
        context = AttentionContext(self._rope(ends[:, None]), visible, ends, longest)
        hidden = self._run(token[:, None], ends[:, None], context, state.caches)
        return hidden[:, 0], DecoderState(state.caches, ends + 1, longest + 1, state.capacity)

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """FLOPs of matrix products, forward and backward, per token of rows of ``seq_len``; the head is not included.

        A product of (m, k) by (k, n) is 2mkn; the backward pass makes two products for each of the forward's (Kaplan
        et al. 2020; PaLM, appendix B). So 6 per weight of the linear layers, and 12 * heads * head_dim per layer and
        visible key. With ``causal`` a token sees (seq_len + 1) / 2 keys on average, the work that has to be done;
        without, seq_len, as PaLM and nanoGPT count. Recomputation is not counted.
        """
        model, block = self.model, self.blocks[0]
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        weights = linear_weights(attention) + linear_weights(mlp)
        keys = (seq_len + 1) / 2 if causal else seq_len
        return model.layers * (6 * weights + 12 * attention.heads * attention.head_dim * keys)

    def _run(
        self, tokens: Tensor, positions: Tensor, context: AttentionContext, caches: list[KVCache] | None = None
    ) -> Tensor:
        x, delta = self.embed(tokens), None
        if self.positions is not None:
            x = x + self.positions(positions)
        x = dropout(x, self.model.dropout, self.training)
        for i, block in enumerate(self.blocks):
            again = block.recomputed == "block" and torch.is_grad_enabled()
            if again and delta is not None:  # the sum alone is kept for the backward pass, not both its parts
                x, delta = x + dropout(delta, self.model.dropout, self.training), None
            x, delta = run_part(block, again, x, delta, context, caches[i] if caches else None)
        return self.norm(x, delta)[0]

    def _rope(self, positions: Tensor) -> kernels.RopeTable | None:
        if self.model.position != "rope":
            return None
        return kernels.rope_table(positions, self.model.width // self.model.heads, self.model.rope_theta)
