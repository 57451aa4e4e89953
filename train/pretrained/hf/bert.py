"""Table of BERT: for pretraining, for masked tokens alone, and for sequence classification."""

from typing import Any

from train.pretrained.hf.family import HFFamily, map_to

ACTIVATIONS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
"""transformers' name -> ours."""
LAYER = "bert.encoder.layer.#"


def normalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """Replace the activation by our name for it, if we have it."""
    return config | {"hidden_act": ACTIVATIONS.get(str(config.get("hidden_act", "gelu")), config.get("hidden_act"))}


def finalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """Replace the activation by transformers' name for it; our attention has no dropout of its weights."""
    hf_names = {name: hf_name for hf_name, name in reversed(ACTIVATIONS.items())}
    return config | {"hidden_act": hf_names[config["hidden_act"]], "attention_probs_dropout_prob": 0.0}


FAMILY = HFFamily(
    name="BERT",
    model_type="bert",
    hf_classes={
        "head.next.weight": ("BertForPreTraining", "masked"),
        "head.weight": ("BertForSequenceClassification", "classify"),
        "": ("BertForMaskedLM", "masked"),
    },
    required={"family": "encoder"},
    required_equal={},
    config_keys={
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
    defaults={"norm_eps": 1e-12, "tied": True, "types": 2},
    allowed={"activation": tuple(ACTIVATIONS.values())},
    fixed_config={
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "position_embedding_type": (None, "absolute"),
    },
    dropout_keys=("hidden_dropout_prob",),
    modules={
        "backbone.embed": map_to("bert.embeddings.word_embeddings"),
        "backbone.positions": map_to("bert.embeddings.position_embeddings"),
        "backbone.types": map_to("bert.embeddings.token_type_embeddings"),
        "backbone.norm": map_to("bert.embeddings.LayerNorm"),
        "backbone.blocks.#.attention.qkv": map_to(
            *(f"{LAYER}.attention.self.{name}" for name in ("query", "key", "value"))
        ),
        "backbone.blocks.#.attention.out": map_to(f"{LAYER}.attention.output.dense"),
        "backbone.blocks.#.attention_norm": map_to(f"{LAYER}.attention.output.LayerNorm"),
        "backbone.blocks.#.mlp.up": map_to(f"{LAYER}.intermediate.dense"),
        "backbone.blocks.#.mlp.down": map_to(f"{LAYER}.output.dense"),
        "backbone.blocks.#.mlp_norm": map_to(f"{LAYER}.output.LayerNorm"),
        "backbone.pooler": map_to("bert.pooler.dense"),
        "head.tokens.transform": map_to("cls.predictions.transform.dense"),
        "head.tokens.norm": map_to("cls.predictions.transform.LayerNorm"),
        "head.tokens.bias": map_to("cls.predictions.bias"),
        "head.tokens.weight": map_to("cls.predictions.decoder.weight"),
        "head.next": map_to("cls.seq_relationship"),
        "head": map_to("classifier"),
    },
    base_prefix="bert.",
    head_matrix="cls.predictions.decoder.weight",
    stand_ins={"cls.predictions.bias": ("cls.predictions.decoder.bias", "cls.predictions.bias")},  # which it computes
    ignored_tensors=("*.position_ids", "cls.predictions.bias", "cls.predictions.decoder.bias"),
    normalize_config=normalize_config,
    finalize_config=finalize_config,
)
