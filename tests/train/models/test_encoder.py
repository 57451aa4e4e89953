"""Tests of the encoder as BERT: logits of both heads of transformers, losses, attention masks."""

import pytest
import torch
import transformers

from train.objectives import build_objective

SIZES = {"layers": 3, "width": 96, "heads": 3, "max_len": 48, "vocab_size": 131}
LAYER = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
OUTSIDE = {
    "backbone.embed": "bert.embeddings.word_embeddings",
    "backbone.positions": "bert.embeddings.position_embeddings",
    "backbone.types": "bert.embeddings.token_type_embeddings",
    "backbone.norm": "bert.embeddings.LayerNorm",
    "backbone.pooler": "bert.pooler.dense",
    "head.tokens.transform": "cls.predictions.transform.dense",
    "head.tokens.norm": "cls.predictions.transform.LayerNorm",
    "head.tokens": "cls.predictions.decoder",
    "head.next": "cls.seq_relationship",
}


def our_weights(state, layers):
    """Our parameters, made from those of transformers' BertForPreTraining."""
    names = dict(OUTSIDE)
    for i in range(layers):
        names |= {f"backbone.blocks.{i}.{own}": f"bert.encoder.layer.{i}.{hf_name}" for own, hf_name in LAYER.items()}
    weights = {}
    for own_name, hf_name in names.items():
        for leaf in ("weight", "bias"):
            if f"{hf_name}.{leaf}" in state:
                weights[f"{own_name}.{leaf}"] = state[f"{hf_name}.{leaf}"]
    for i in range(layers):
        for leaf in ("weight", "bias"):
            parts = [state[f"bert.encoder.layer.{i}.attention.self.{x}.{leaf}"] for x in ("query", "key", "value")]
            weights[f"backbone.blocks.{i}.attention.qkv.{leaf}"] = torch.cat(parts)
    return weights


def shaken(reference):
    """The reference with every parameter random, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            base = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=generator))
    return reference.eval()


def pairs(rows=3, length=40):
    """A batch of rows of two texts, each shorter than the one before, with padding at their ends."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(length).expand(rows, length)
    real = positions < length - 7 * torch.arange(rows)[:, None]
    return {
        "tokens": torch.randint(0, 131, (rows, length), generator=generator),
        "targets": torch.full((rows, length), -100),
        "positions": positions,
        "segments": real.int(),
        "types": ((positions > 15) & real).long(),
        "next_targets": torch.zeros(rows, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("activation", "hf_activation"), [("gelu", "gelu_new"), ("gelu_exact", "gelu"), ("relu", "relu")]
)
def test_bert_logits_of_both_heads_equal_transformers(make_config, activation, hf_activation):
    config = make_config("bert_tiny", **SIZES, activation=activation)
    sizes = {
        "vocab_size": 131,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 384,
    }
    reference = shaken(
        transformers.BertForPreTraining(
            transformers.BertConfig(**sizes, max_position_embeddings=48, hidden_act=hf_activation)
        )
    )
    objective = build_objective(config, 131).eval()
    objective.load_state_dict(our_weights(reference.state_dict(), 3))
    batch = pairs()
    with torch.no_grad():
        right = reference(batch["tokens"], attention_mask=batch["segments"], token_type_ids=batch["types"])
        real = batch["segments"] > 0
        assert (objective.logits(batch) - right.prediction_logits)[real].abs().max() < 1e-5
        hidden = objective.backbone(batch)
        next_logits = objective.head["next"](objective.backbone.pooler(hidden))
        assert (next_logits - right.seq_relationship_logits).abs().max() < 1e-5


def test_masked_and_next_losses_are_sums_with_own_counts(make_config):
    objective = build_objective(make_config("bert_tiny", **SIZES), 131)
    batch = pairs()
    batch["targets"][:, 3:8] = batch["tokens"][:, 3:8]
    batch["next_targets"][1] = -100
    losses = objective(batch)
    assert {name: int(count) for name, (_, count) in losses.items()} == {"loss": 15, "next_loss": 2}
    logits = objective.logits(batch)[:, 3:8].double()
    right = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 3:8].flatten(), reduction="sum")
    whole = objective.head["tokens"](objective.backbone(batch))
    assert whole.shape[-1] == 131
    assert losses["loss"][0].item() == pytest.approx(right.item(), rel=1e-5)
    assert objective.eval()(batch).keys() == {"loss", "accuracy", "next_loss", "next_accuracy"}


def test_encoder_token_sees_no_padding_or_other_document(make_config):
    objective = build_objective(make_config("bert_tiny", **SIZES), 131).eval()
    batch = pairs()
    batch["segments"][0, 20:] = 2
    other = {**batch, "tokens": batch["tokens"].clone()}
    other["tokens"][0, 25] += 1
    other["tokens"][2, 39] += 1
    with torch.no_grad():
        before, after = objective.logits(batch), objective.logits(other)
        joined = build_objective(make_config("bert_tiny", **SIZES, isolate=False), 131).eval()
        leaked = [joined.logits(b)[0, :20] for b in (batch, other)]
    assert torch.equal(before[0, :20], after[0, :20])
    assert torch.equal(before[2, :26], after[2, :26])
    assert not torch.equal(before[0, 20:], after[0, 20:])
    assert not torch.equal(*leaked)
