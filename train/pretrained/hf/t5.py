"""T5, as ``T5ForConditionalGeneration`` of transformers has it."""

from typing import Any

from train.pretrained.hf.family import HFFamily, Stored, at

ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
"""Their names and ours."""


NEEDS = {
    "family": "encdec",
    "position": "relative",
    "norm": "rms_norm",
    "norm_first": True,
    "scaled": False,
    "bias": False,
}


def tidy(config: dict[str, Any]) -> dict[str, Any]:
    """The activation by our name; as many layers on either side left out.

    transformers 5 writes every T5 as tied. That one is not, as version 1.1, it keeps in what followed from it: scores unscaled.
    """
    found = config | {
        "feed_forward_proj": ACTIVATIONS.get(
            str(config.get("feed_forward_proj", "relu")), config.get("feed_forward_proj")
        )
    }
    if config.get("scale_decoder_outputs") is False:
        found["tie_word_embeddings"] = False
    return found | {"num_decoder_layers": config.get("num_decoder_layers") or config.get("num_layers")}


def dress(config: dict[str, Any]) -> dict[str, Any]:
    """The activation by theirs; a target begins with padding, as ours does."""
    theirs = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    return config | {
        "feed_forward_proj": theirs[config["feed_forward_proj"]],
        "decoder_start_token_id": config["pad_token_id"],
    }


def stack(side: str, mlp: int) -> dict[str, Stored]:
    """The table of one side, whose MLP is number ``mlp`` of a block's layers."""
    block, ours = f"{side}.block.#.layer", f"backbone.{side}.blocks.#"
    return {
        f"backbone.{side}.relative": at(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
        f"{ours}.attention.norm": at(f"{block}.0.layer_norm"),
        f"{ours}.attention.layer.qkv": at(*(f"{block}.0.SelfAttention.{name}" for name in "qkv")),
        f"{ours}.attention.layer.out": at(f"{block}.0.SelfAttention.o"),
        f"{ours}.mlp.norm": at(f"{block}.{mlp}.layer_norm"),
        f"{ours}.mlp.layer.up": at(f"{block}.{mlp}.DenseReluDense.wi"),
        f"{ours}.mlp.layer.gate_up": at(f"{block}.{mlp}.DenseReluDense.wi_0", f"{block}.{mlp}.DenseReluDense.wi_1"),
        f"{ours}.mlp.layer.down": at(f"{block}.{mlp}.DenseReluDense.wo"),
        f"backbone.{side}.norm": at(f"{side}.final_layer_norm"),
    }


FAMILY = HFFamily(
    name="T5",
    model_type="t5",
    architectures={"": ("T5ForConditionalGeneration", "seq2seq")},
    needs=NEEDS,
    equal={},
    keys={
        "layers": ("num_layers", "num_decoder_layers"),
        "width": ("d_model",),
        "heads": ("num_heads",),
        "head_dim": ("d_kv",),
        "mlp_width": ("d_ff",),
        "vocab_size": ("vocab_size",),
        "activation": ("feed_forward_proj",),
        "buckets": ("relative_attention_num_buckets",),
        "max_distance": ("relative_attention_max_distance",),
        "norm_eps": ("layer_norm_epsilon",),
        "tied": ("tie_word_embeddings",),
    },
    absent={"tied": True, "norm_eps": 1e-6, "buckets": 32, "max_distance": 128},
    values={"activation": tuple(ACTIVATIONS.values())},
    fixed={"is_encoder_decoder": (True,)},
    dropout=("dropout_rate",),
    modules={
        "backbone.embed": at("shared"),
        "head": at("lm_head"),
        **stack("encoder", 1),
        **stack("decoder", 2),
        "backbone.decoder.blocks.#.cross.norm": at("decoder.block.#.layer.1.layer_norm"),
        "backbone.decoder.blocks.#.cross.layer.q": at("decoder.block.#.layer.1.EncDecAttention.q"),
        "backbone.decoder.blocks.#.cross.layer.kv": at(
            *(f"decoder.block.#.layer.1.EncDecAttention.{name}" for name in "kv")
        ),
        "backbone.decoder.blocks.#.cross.layer.out": at("decoder.block.#.layer.1.EncDecAttention.o"),
    },
    base="",
    ignored=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    tidy=tidy,
    dress=dress,
)
