"""Table of Llama: ``LlamaForCausalLM`` of transformers.

RoPE rotates dimension i of a head with i + head_dim / 2 in both, so no weight is permuted.
"""

from typing import Any

from train.pretrained.hf.family import HFFamily, map_to


def normalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """Move RoPE's settings to the top level, from where transformers 4 or 5 keeps them.

    ``head_dim`` becomes None where it equals hidden_size / num_attention_heads.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    normalized = config | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    if rope.get("rope_theta") is not None:
        normalized["rope_theta"] = rope["rope_theta"]
    if config.get("head_dim") == (config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1):
        normalized["head_dim"] = None
    return normalized


def finalize_config(config: dict[str, Any]) -> dict[str, Any]:
    """Write RoPE's settings where transformers 4 reads them, and where 5 does."""
    rope = {"rope_type": config.pop("rope_type"), "rope_theta": config["rope_theta"]}
    return config | {"rope_parameters": rope}


FAMILY = HFFamily(
    name="Llama",
    model_type="llama",
    hf_classes={"": ("LlamaForCausalLM", "causal")},
    required={"family": "decoder", "position": "rope", "norm": "rms_norm", "activation": "swiglu"},
    required_equal={},
    config_keys={
        "layers": ("num_hidden_layers",),
        "width": ("hidden_size",),
        "heads": ("num_attention_heads",),
        "kv_heads": ("num_key_value_heads",),
        "mlp_width": ("intermediate_size",),
        "max_len": ("max_position_embeddings",),
        "vocab_size": ("vocab_size",),
        "norm_eps": ("rms_norm_eps",),
        "rope_theta": ("rope_theta",),
        "bias": ("attention_bias", "mlp_bias"),
        "tied": ("tie_word_embeddings",),
    },
    defaults={"norm_eps": 1e-6, "rope_theta": 10000.0, "bias": False, "tied": False},
    allowed={},
    fixed_config={"hidden_act": ("silu", "swish"), "rope_type": ("default",), "head_dim": (None,)},
    dropout_keys=(),
    modules={
        "backbone.embed": map_to("model.embed_tokens"),
        "backbone.blocks.#.attention_norm": map_to("model.layers.#.input_layernorm"),
        "backbone.blocks.#.attention.qkv": map_to(
            "model.layers.#.self_attn.q_proj",
            "model.layers.#.self_attn.k_proj",
            "model.layers.#.self_attn.v_proj",
            shares=("heads", "kv_heads", "kv_heads"),
        ),
        "backbone.blocks.#.attention.out": map_to("model.layers.#.self_attn.o_proj"),
        "backbone.blocks.#.mlp_norm": map_to("model.layers.#.post_attention_layernorm"),
        "backbone.blocks.#.mlp.gate_up": map_to("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
        "backbone.blocks.#.mlp.down": map_to("model.layers.#.mlp.down_proj"),
        "backbone.norm": map_to("model.norm"),
        "head": map_to("lm_head"),
    },
    base_prefix="model.",
    ignored_tensors=("*.rotary_emb.inv_freq",),
    normalize_config=normalize_config,
    finalize_config=finalize_config,
)
