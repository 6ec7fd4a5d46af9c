"""Tiny random targets whose layers keep a recurrent state, alone or beside attention."""

import functools

import torch
import transformers as tf
from tiny import LAYERS, VOCAB, WIDTH

from hf_d2sd.modeling import CACHE_NAME

_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
)
_DELTA = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=4,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24)
_MIXED = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_MAMBA_2 = dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
_MAMBA_2_LAYERS = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=2)


def _without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


_BUILDERS = {
    "qwen3_next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(**_SIZES, **_DELTA, **_EXPERTS, layer_types=_MIXED)
    ),
    "qwen3_5": lambda: tf.Qwen3_5ForCausalLM(tf.Qwen3_5TextConfig(**_SIZES, **_DELTA, layer_types=_MIXED)),
    "qwen3_5_moe": lambda: tf.Qwen3_5MoeForCausalLM(
        tf.Qwen3_5MoeTextConfig(**_without(_SIZES, "intermediate_size"), **_DELTA, **_EXPERTS, layer_types=_MIXED)
    ),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(
            **_without(_SIZES, "intermediate_size", "num_attention_heads", "num_key_value_heads"),
            num_heads=8,
            state_size=8,
            n_groups=2,
            chunk_size=8,
        )
    ),
    "falcon_h1": lambda: tf.FalconH1ForCausalLM(tf.FalconH1Config(**_SIZES, **_MAMBA_2)),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **_without(_SIZES, "head_dim"),
            num_experts=2,
            num_experts_per_tok=1,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            use_mamba_kernels=False,
        )
    ),
    "lfm2": lambda: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**_SIZES, layer_types=["conv", "full_attention", "conv", "full_attention"])
    ),
    "zamba2": lambda: tf.Zamba2ForCausalLM(
        tf.Zamba2Config(
            **_without(_SIZES, "head_dim"),
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            mamba_d_state=8,
            mamba_headdim=8,
            mamba_ngroups=1,
            n_mamba_heads=8,
            chunk_size=8,
            num_mem_blocks=1,
            use_mem_rope=True,
        )
    ),
    "minimax": lambda: tf.MiniMaxForCausalLM(
        tf.MiniMaxConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, block_size=8, layer_types=_MIXED)
    ),
    "olmo_hybrid": lambda: tf.OlmoHybridForCausalLM(
        tf.OlmoHybridConfig(
            **_without(_SIZES, "head_dim"),
            **_without(_DELTA, "linear_num_value_heads"),
            linear_num_value_heads=2,
            layer_types=_MIXED,
        )
    ),
    "bamba": lambda: tf.BambaForCausalLM(
        tf.BambaConfig(**_without(_SIZES, "head_dim"), attn_layer_indices=[1, 3], **_MAMBA_2_LAYERS)
    ),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridForCausalLM(
        tf.GraniteMoeHybridConfig(
            **_without(_SIZES, "head_dim"),
            layers_block_type=["mamba", "attention", "mamba", "attention"],
            shared_intermediate_size=48,
            num_local_experts=4,
            num_experts_per_tok=2,
            **_MAMBA_2_LAYERS,
        )
    ),
    "nemotron_h": lambda: tf.NemotronHForCausalLM(
        tf.NemotronHConfig(
            **_without(_SIZES, "num_hidden_layers"),
            layers_block_type=["mamba", "attention", "mlp", "mamba"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            ssm_state_size=8,
            n_groups=2,
            chunk_size=8,
        )
    ),
    "lfm2_moe": lambda: tf.Lfm2MoeForCausalLM(
        tf.Lfm2MoeConfig(
            **_SIZES,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            num_dense_layers=1,
        )
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(
            **_without(_SIZES, "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
            state_size=8,
        )
    ),
    "falcon_mamba": lambda: tf.FalconMambaForCausalLM(
        tf.FalconMambaConfig(
            **_without(_SIZES, "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
            state_size=8,
        )
    ),
    "recurrent_gemma": lambda: tf.RecurrentGemmaForCausalLM(
        tf.RecurrentGemmaConfig(**_SIZES, lru_width=WIDTH, attention_window_size=10)
    ),
}
WITHOUT_ATTENTION = ("mamba2", "mamba", "falcon_mamba")
# Before 5.24 its configuration names no layer with a state, and it is refused.
OF_5_24 = ("recurrent_gemma", *WITHOUT_ATTENTION)
HYBRIDS = tuple(name for name in _BUILDERS if name not in OF_5_24)
# Before 5.24 models without attention have a cache of another name.
FAMILIES = (*HYBRIDS, *OF_5_24) if CACHE_NAME == "cache" else HYBRIDS


@functools.cache
def recurrent_target(family: str):
    """A random model of a family, fixed by its name; shared, so tests must not change it."""
    torch.manual_seed(sum(map(ord, family)))
    model = _BUILDERS[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def forget(model) -> None:
    """As if the model had never run: RecurrentGemma's modules go on from the last call where a prompt is one token."""
    for module in model.modules():
        if hasattr(module, "conv1d_state"):
            module.conv1d_state = module.rg_lru.recurrent_states = None
