"""Table of T5: ``T5ForConditionalGeneration`` of transformers, versions 1.0 and 1.1."""

from typing import Any

from train.pretrained.hf.family import HFFamily, ModuleMapping, map_to

ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}
"""transformers' name -> ours."""

REQUIRED = {
    "family": "encdec",
    "position": "relative",
    "norm": "rms_norm",
    "norm_first": True,
    "scaled": False,
    "bias": False,
}


def normalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """Replace the activation by our name for it; by default the decoder has as many layers as the encoder.

    transformers 5 writes ``tie_word_embeddings: true`` for every T5. An untied one (version 1.1) is recognised by
    ``scale_decoder_outputs: false``, which it writes for that case.
    """
    activation = config.get("feed_forward_proj", "relu")
    normalized = config | {"feed_forward_proj": ACTIVATIONS.get(str(activation), activation)}
    if config.get("scale_decoder_outputs") is False:
        normalized["tie_word_embeddings"] = False
    return normalized | {"num_decoder_layers": config.get("num_decoder_layers") or config.get("num_layers")}


def finalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """Replace the activation by transformers' name for it; a target starts with the padding token, as ours does."""
    hf_names = {name: hf_name for hf_name, name in ACTIVATIONS.items()}
    return config | {
        "feed_forward_proj": hf_names[config["feed_forward_proj"]],
        "decoder_start_token_id": config["pad_token_id"],
    }


def stack_modules(side: str, mlp: int) -> dict[str, ModuleMapping]:
    """Modules of one stack, "encoder" or "decoder"; ``mlp`` is the index of the MLP among the layers of a block."""
    block, own_block = f"{side}.block.#.layer", f"backbone.{side}.blocks.#"
    return {
        f"backbone.{side}.relative": map_to(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"),
        f"{own_block}.attention.norm": map_to(f"{block}.0.layer_norm"),
        f"{own_block}.attention.layer.qkv": map_to(*(f"{block}.0.SelfAttention.{name}" for name in "qkv")),
        f"{own_block}.attention.layer.out": map_to(f"{block}.0.SelfAttention.o"),
        f"{own_block}.mlp.norm": map_to(f"{block}.{mlp}.layer_norm"),
        f"{own_block}.mlp.layer.up": map_to(f"{block}.{mlp}.DenseReluDense.wi"),
        f"{own_block}.mlp.layer.gate_up": map_to(
            f"{block}.{mlp}.DenseReluDense.wi_0", f"{block}.{mlp}.DenseReluDense.wi_1"
        ),
        f"{own_block}.mlp.layer.down": map_to(f"{block}.{mlp}.DenseReluDense.wo"),
        f"backbone.{side}.norm": map_to(f"{side}.final_layer_norm"),
    }


FAMILY = HFFamily(
    name="T5",
    model_type="t5",
    hf_classes={"": ("T5ForConditionalGeneration", "seq2seq")},
    required=REQUIRED,
    required_equal={},
    config_keys={
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
    defaults={"tied": True, "norm_eps": 1e-6, "buckets": 32, "max_distance": 128},
    allowed={"activation": tuple(ACTIVATIONS.values())},
    fixed_config={"is_encoder_decoder": (True,)},
    dropout_keys=("dropout_rate",),
    modules={
        "backbone.embed": map_to("shared"),
        "head": map_to("lm_head"),
        **stack_modules("encoder", 1),
        **stack_modules("decoder", 2),
        "backbone.decoder.blocks.#.cross.norm": map_to("decoder.block.#.layer.1.layer_norm"),
        "backbone.decoder.blocks.#.cross.layer.q": map_to("decoder.block.#.layer.1.EncDecAttention.q"),
        "backbone.decoder.blocks.#.cross.layer.kv": map_to(
            *(f"decoder.block.#.layer.1.EncDecAttention.{name}" for name in "kv")
        ),
        "backbone.decoder.blocks.#.cross.layer.out": map_to("decoder.block.#.layer.1.EncDecAttention.o"),
    },
    base_prefix="",
    tied_scales=True,
    stand_ins={"shared.weight": ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")},
    ignored_tensors=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    normalize_config=normalize_config,
    finalize_config=finalize_config,
)
