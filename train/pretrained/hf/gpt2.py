"""Table of GPT-2: ``GPT2LMHeadModel`` of transformers."""

from train.pretrained.hf.family import HFFamily, map_to

FAMILY = HFFamily(
    name="GPT-2",
    model_type="gpt2",
    hf_classes={"": ("GPT2LMHeadModel", "causal")},
    required={"family": "decoder", "position": "learned", "norm": "layer_norm", "activation": "gelu", "bias": True},
    required_equal={"kv_heads": "heads"},
    config_keys={
        "layers": ("n_layer",),
        "width": ("n_embd",),
        "heads": ("n_head",),
        "mlp_width": ("n_inner",),
        "max_len": ("n_positions",),
        "vocab_size": ("vocab_size",),
        "norm_eps": ("layer_norm_epsilon",),
        "tied": ("tie_word_embeddings",),
    },
    defaults={"norm_eps": 1e-5, "tied": True},
    allowed={},
    fixed_config={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # the same function
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # the same in fp32
        "add_cross_attention": (False,),
    },
    dropout_keys=("resid_pdrop", "embd_pdrop"),
    modules={
        "backbone.embed": map_to("transformer.wte"),
        "backbone.positions": map_to("transformer.wpe"),
        "backbone.blocks.#.attention_norm": map_to("transformer.h.#.ln_1"),
        "backbone.blocks.#.attention.qkv": map_to("transformer.h.#.attn.c_attn", transposed=True),
        "backbone.blocks.#.attention.out": map_to("transformer.h.#.attn.c_proj", transposed=True),
        "backbone.blocks.#.mlp_norm": map_to("transformer.h.#.ln_2"),
        "backbone.blocks.#.mlp.up": map_to("transformer.h.#.mlp.c_fc", transposed=True),
        "backbone.blocks.#.mlp.down": map_to("transformer.h.#.mlp.c_proj", transposed=True),
        "backbone.norm": map_to("transformer.ln_f"),
        "head": map_to("lm_head"),
    },
    base_prefix="transformer.",
    ignored_tensors=("*.attn.bias", "*.attn.masked_bias"),  # attention masks, in older files
    finalize_config=lambda config: config | {"attn_pdrop": 0.0},
)
