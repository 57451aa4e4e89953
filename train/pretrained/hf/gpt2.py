"""GPT-2, as ``GPT2LMHeadModel`` of transformers has it."""

from train.pretrained.hf.family import HFFamily, at

FAMILY = HFFamily(
    name="GPT-2",
    model_type="gpt2",
    architectures={"": ("GPT2LMHeadModel", "causal")},
    needs={"family": "decoder", "position": "learned", "norm": "layer_norm", "activation": "gelu", "bias": True},
    equal={"kv_heads": "heads"},
    keys={
        "layers": ("n_layer",),
        "width": ("n_embd",),
        "heads": ("n_head",),
        "mlp_width": ("n_inner",),
        "max_len": ("n_positions",),
        "vocab_size": ("vocab_size",),
        "norm_eps": ("layer_norm_epsilon",),
        "tied": ("tie_word_embeddings",),
    },
    absent={"norm_eps": 1e-5, "tied": True},
    values={},
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),  # the same function
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # the same in fp32
        "add_cross_attention": (False,),
    },
    dropout=("resid_pdrop", "embd_pdrop"),
    modules={
        "backbone.embed": at("transformer.wte"),
        "backbone.positions": at("transformer.wpe"),
        "backbone.blocks.#.attention_norm": at("transformer.h.#.ln_1"),
        "backbone.blocks.#.attention.qkv": at("transformer.h.#.attn.c_attn", turned=True),
        "backbone.blocks.#.attention.out": at("transformer.h.#.attn.c_proj", turned=True),
        "backbone.blocks.#.mlp_norm": at("transformer.h.#.ln_2"),
        "backbone.blocks.#.mlp.up": at("transformer.h.#.mlp.c_fc", turned=True),
        "backbone.blocks.#.mlp.down": at("transformer.h.#.mlp.c_proj", turned=True),
        "backbone.norm": at("transformer.ln_f"),
        "head": at("lm_head"),
    },
    base="transformer.",
    ignored=("*.attn.bias", "*.attn.masked_bias"),  # masks, in older files
    dress=lambda config: config | {"attn_pdrop": 0.0},
)
