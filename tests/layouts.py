"""Small drafters written as other libraries write them, by hand: config.json and safetensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import LAYERS, VOCAB, WIDTH

LAYER_KEYS = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
DFLASH_KEYS = dict(
    LAYER_KEYS,
    architectures=["DFlashDraftModel"],
    model_type="qwen3",
    auto_map={"AutoModel": "dflash.DFlashDraftModel"},
    block_size=5,
    num_target_layers=LAYERS,
    rope_theta=5000.0,
    dtype="float32",
    dflash_config={"mask_token_id": 1, "target_layer_ids": [0, 2]},
)
SPECULATORS_KEYS = dict(
    architectures=["DFlashSpeculator"],
    speculators_model_type="dflash",
    block_size=5,
    mask_token_id=1,
    aux_hidden_state_layer_ids=[1, 3],
    draft_vocab_size=VOCAB,
    sliding_window_non_causal=False,
    speculators_config={"algorithm": "dflash"},
    transformer_layer_config=dict(LAYER_KEYS, model_type="qwen3", rope_theta=5000.0),
)
NATIVE_KEYS = dict(
    {name: value for name, value in LAYER_KEYS.items() if name != "vocab_size"},
    architectures=["MuseGlimmerAssistantModel"],
    model_type="muse_glimmer_assistant",
    block_size=5,
    mask_token_id=1,
    target_layer_ids=[0, 2],
    layer_types=["full_attention", "full_attention"],
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """The 25 tensors of a drafter of two layers, by the names of public DFlash checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"fc": (WIDTH, 2 * WIDTH), "hidden_norm": (WIDTH,), "norm": (WIDTH,)}
    for i in range(2):
        attention = f"layers.{i}.self_attn"
        shapes |= {f"{attention}.q_proj": (32, WIDTH), f"{attention}.k_proj": (16, WIDTH)}
        shapes |= {f"{attention}.v_proj": (16, WIDTH), f"{attention}.o_proj": (WIDTH, 32)}
        shapes |= {f"{attention}.q_norm": (8,), f"{attention}.k_norm": (8,)}
        shapes |= {f"layers.{i}.{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
        shapes |= {f"layers.{i}.mlp.{name}_proj": (48, WIDTH) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.mlp.down_proj": (WIDTH, 48)}
    return {
        f"{name}.weight": 0.4 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        for name, shape in shapes.items()
    }


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def dflash(folder: Path, inner: dict | None = None, tensors: dict | None = None, **changes) -> Path:
    """z-lab's and SpecForge's layout; `inner` changes `dflash_config`."""
    config = DFLASH_KEYS | {"dflash_config": DFLASH_KEYS["dflash_config"] | (inner or {})} | changes
    return write(folder, config, weights() if tensors is None else tensors)


def speculators(folder: Path, layers: dict | None = None, tensors: dict | None = None, **changes) -> Path:
    """The layout of speculators; `layers` changes `transformer_layer_config`."""
    inner = SPECULATORS_KEYS["transformer_layer_config"] | (layers or {})
    return write(folder, SPECULATORS_KEYS | {"transformer_layer_config": inner} | changes, tensors or weights())


def native(folder: Path, tensors: dict | None = None, **changes) -> Path:
    """The layout of Transformers' own DFlash assistants."""
    tensors = weights() if tensors is None else tensors
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    return write(folder, NATIVE_KEYS | changes, {names.get(name, name): value for name, value in tensors.items()})
