"""Llama, as ``LlamaForCausalLM`` of transformers has it. Its order of halves in RoPE is ours."""

from typing import Any

from train.pretrained.hf.family import HFFamily, at


def tidy(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's numbers at the top, from where transformers 4 or 5 keeps them; the size of a head left out where it is the usual."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = config | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    if rope.get("rope_theta") is not None:
        found["rope_theta"] = rope["rope_theta"]
    if config.get("head_dim") == (config.get("hidden_size") or 0) // (config.get("num_attention_heads") or 1):
        found["head_dim"] = None
    return found


def dress(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE's numbers where transformers 4 looks for them, and where 5 does."""
    rope = {"rope_type": config.pop("rope_type"), "rope_theta": config["rope_theta"]}
    return config | {"rope_parameters": rope}


FAMILY = HFFamily(
    name="Llama",
    model_type="llama",
    architectures={"": ("LlamaForCausalLM", "causal")},
    needs={"family": "decoder", "position": "rope", "norm": "rms_norm", "activation": "swiglu"},
    equal={},
    keys={
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
    absent={"norm_eps": 1e-6, "rope_theta": 10000.0, "bias": False, "tied": False},
    values={},
    fixed={"hidden_act": ("silu", "swish"), "rope_type": ("default",), "head_dim": (None,)},
    dropout=(),
    modules={
        "backbone.embed": at("model.embed_tokens"),
        "backbone.blocks.#.attention_norm": at("model.layers.#.input_layernorm"),
        "backbone.blocks.#.attention.qkv": at(
            "model.layers.#.self_attn.q_proj",
            "model.layers.#.self_attn.k_proj",
            "model.layers.#.self_attn.v_proj",
            shares=("heads", "kv_heads", "kv_heads"),
        ),
        "backbone.blocks.#.attention.out": at("model.layers.#.self_attn.o_proj"),
        "backbone.blocks.#.mlp_norm": at("model.layers.#.post_attention_layernorm"),
        "backbone.blocks.#.mlp.gate_up": at("model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"),
        "backbone.blocks.#.mlp.down": at("model.layers.#.mlp.down_proj"),
        "backbone.norm": at("model.norm"),
        "head": at("lm_head"),
    },
    base="model.",
    ignored=("*.rotary_emb.inv_freq",),
    tidy=tidy,
    dress=dress,
)
