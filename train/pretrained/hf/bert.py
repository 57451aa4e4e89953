"""BERT, as transformers has it: with both of its heads, with that of hidden tokens alone, or with one of classes."""

from typing import Any

from train.pretrained.hf.family import HFFamily, at

ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""Their names and ours."""
LAYER = "bert.encoder.layer.#"


def tidy(config: dict[str, Any]) -> dict[str, Any]:
    """The activation by our name, where we have it."""
    return config | {"hidden_act": ACTIVATIONS.get(str(config.get("hidden_act", "gelu")), config.get("hidden_act"))}


def dress(config: dict[str, Any]) -> dict[str, Any]:
    """The activation by theirs."""
    theirs = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return config | {"hidden_act": theirs[config["hidden_act"]], "attention_probs_dropout_prob": 0.0}


FAMILY = HFFamily(
    name="BERT",
    model_type="bert",
    architectures={
        "head.next.weight": ("BertForPreTraining", "masked"),
        "head.weight": ("BertForSequenceClassification", "classify"),
        "": ("BertForMaskedLM", "masked"),
    },
    needs={"family": "encoder"},
    equal={},
    keys={
        "layers": ("num_hidden_layers",),
        "width": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "mlp_width": ("intermediate_size",),
        "max_len": ("max_position_embeddings",),
        "types": ("type_vocab_size",),
        "vocab_size": ("vocab_size",),
        "activation": ("hidden_act",),
        "norm_eps": ("layer_norm_eps",),
        "tied": ("tie_word_embeddings",),
    },
    absent={"norm_eps": 1e-12, "tied": True, "types": 2},
    values={"activation": tuple(ACTIVATIONS.values())},
    fixed={"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": (None, "absolute")},
    dropout=("hidden_dropout_prob",),
    modules={
        "backbone.embed": at("bert.embeddings.word_embeddings"),
        "backbone.positions": at("bert.embeddings.position_embeddings"),
        "backbone.types": at("bert.embeddings.token_type_embeddings"),
        "backbone.norm": at("bert.embeddings.LayerNorm"),
        "backbone.blocks.#.attention.qkv": at(
            *(f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
        ),
        "backbone.blocks.#.attention.out": at(f"{LAYER}.attention.output.dense"),
        "backbone.blocks.#.attention_norm": at(f"{LAYER}.attention.output.LayerNorm"),
        "backbone.blocks.#.mlp.up": at(f"{LAYER}.intermediate.dense"),
        "backbone.blocks.#.mlp.down": at(f"{LAYER}.output.dense"),
        "backbone.blocks.#.mlp_norm": at(f"{LAYER}.output.LayerNorm"),
        "backbone.pooler": at("bert.pooler.dense"),
        "head.tokens.transform": at("cls.predictions.transform.dense"),
        "head.tokens.norm": at("cls.predictions.transform.LayerNorm"),
        "head.tokens.bias": at("cls.predictions.bias"),
        "head.tokens.weight": at("cls.predictions.decoder.weight"),
        "head.next": at("cls.seq_relationship"),
        "head": at("classifier"),
    },
    base="bert.",
    ignored=("*.position_ids", "cls.predictions.decoder.bias"),
    tidy=tidy,
    dress=dress,
)
