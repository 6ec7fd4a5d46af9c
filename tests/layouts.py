"""Small drafters written as other libraries write them, by hand, and what they compute there, slot by slot."""

import json
import math
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

DFLASH2_KEYS = dict(
    LAYER_KEYS,
    architectures=["DFlash2DraftModel"],
    model_type="qwen3",
    is_causal=False,
    layer_types=["sliding_attention"] * 2,
    use_sliding_window=True,
    sliding_window=6,
    num_target_layers=LAYERS,
    rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
    dtype="float32",
    dflash_config={
        "block_size": 5,
        "conv_group_size": 8,
        "conv_kernel_size": 2,
        "final_logit_softcapping": 4.0,
        "mask_token_id": 1,
        "output_multiplier": 0.5,
        "selector_rank": 6,
        "selector_top_k": 5,
        "target_layer_ids": [0, 2],
    },
)
DSPARK_KEYS = dict(
    LAYER_KEYS,
    architectures=["Qwen3DSparkModel"],
    model_type="qwen3",
    layer_types=["full_attention"] * 2,
    num_target_layers=LAYERS,
    rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
    dtype="float32",
    block_size=4,
    mask_token_id=1,
    target_layer_ids=[0, 2],
    num_anchors=8,
    markov_rank=6,
    markov_head_type="vanilla",
    enable_confidence_head=True,
    confidence_head_with_markov=True,
    tie_word_embeddings=False,
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


def dflash2_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """With convolutions of two taps in four groups, and a selector of rank 6."""
    generator = torch.Generator().manual_seed(seed + 100)
    tensors = weights(seed)
    for name in ("layers.0", "layers.1"):
        for part in ("attention_conv", "mlp_conv"):
            base = 0.3 * torch.randn(2, 2, WIDTH, generator=generator)
            base[:, 0] += 1
            tensors[f"{name}.{part}.base_kernel"] = base
            kernels = 0.1 * torch.randn(2 * 2 * 4, WIDTH, generator=generator)
            tensors[f"{name}.{part}.kernel_projection.weight"] = kernels
    for name, shape in {"hidden_projection.weight": (6, WIDTH), "predecessor_codebook": (VOCAB, 6)}.items():
        tensors[f"candidate_selector.{name}"] = 0.5 * torch.randn(shape, generator=generator)
    tensors["candidate_selector.successor_codebook"] = torch.randn(VOCAB, 6, generator=generator)
    return tensors


def dspark_weights(seed: int = 0, gated: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 200)
    shapes = {"embed_tokens.weight": (VOCAB, WIDTH), "lm_head.weight": (VOCAB, WIDTH)}
    shapes |= {"markov_head.markov_w1.weight": (VOCAB, 6), "markov_head.markov_w2.weight": (VOCAB, 6)}
    shapes |= {"confidence_head.proj.weight": (1, WIDTH + 6), "confidence_head.proj.bias": (1,)}
    if gated:
        shapes |= {"markov_head.gate_proj.weight": (6, WIDTH + 6), "markov_head.gate_proj.bias": (6,)}
    more = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    more["confidence_head.proj.weight"] *= 0.2
    return weights(seed) | more


def dflash2(folder: Path, inner: dict | None = None, tensors: dict | None = None, **changes) -> Path:
    config = DFLASH2_KEYS | {"dflash_config": DFLASH2_KEYS["dflash_config"] | (inner or {})} | changes
    return write(folder, config, dflash2_weights() if tensors is None else tensors)


def dspark(folder: Path, tensors: dict | None = None, **changes) -> Path:
    return write(folder, DSPARK_KEYS | changes, dspark_weights() if tensors is None else tensors)


# What a network in these layouts computes: one row, one block, sums written out.


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + LAYER_KEYS["rms_norm_eps"]).sqrt()


def _turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(n, heads, 8) by rotary embedding: pairs of channels (i, i + 4) turn by position / θ^(i / 4)."""
    angle = positions[:, None, None] / 5000.0 ** (torch.arange(4) / 4)
    a, b = x[..., :4], x[..., 4:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _attended(tensors: dict, name: str, block: torch.Tensor, context: torch.Tensor, start: int, window: float):
    """(S, H): of a block (S, H) over the context (C, H), whose last token is at start - 1, and over all of itself."""
    key_at = torch.arange(start - len(context), start + len(block))
    sources, at = torch.cat([context, block]), key_at[len(context) :]
    parts = {}
    for part, x, positions in (("q", block, at), ("k", sources, key_at), ("v", sources, None)):
        heads = (x @ tensors[f"{name}.{part}_proj.weight"].T).unflatten(-1, (-1, 8))
        if positions is not None:
            heads = _turned(_norm(heads, tensors[f"{name}.{part}_norm.weight"]), positions)
        parts[part] = heads
    seen = (at[:, None] - key_at).abs() < window
    heads = []
    for head in range(4):  # of which two share a key
        scores = parts["q"][:, head] @ parts["k"][:, head // 2].T / math.sqrt(8)
        heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ parts["v"][:, head // 2])
    return torch.cat(heads, dim=-1) @ tensors[f"{name}.o_proj.weight"].T


def _convolved(tensors: dict, name: str, side: int, block: torch.Tensor, made_of: torch.Tensor) -> torch.Tensor:
    """DFlash 2: channel c of slot t is the sum over taps o of (base[o, c] + own[o, group of c]) · x[t - o, c]."""
    output = torch.zeros_like(block)
    kernels = (made_of @ tensors[f"{name}.kernel_projection.weight"].T).view(len(block), 2, 2, 4)
    for slot in range(len(block)):
        for tap in range(min(2, slot + 1)):
            kernel = tensors[f"{name}.base_kernel"][side, tap] + kernels[slot, side, tap].repeat_interleave(8)
            output[slot] += kernel * block[slot - tap]
    return output


def hidden_by_layout(tensors: dict, embeds: torch.Tensor, features: torch.Tensor, start: int, window=math.inf):
    """(S, H): last states of a block's embeddings (S, H), the first at `start`, given features (C, F) before it."""
    context, x = _norm(features @ tensors["fc.weight"].T, tensors["hidden_norm.weight"]), embeds
    convolves = "layers.0.mlp_conv.base_kernel" in tensors
    for layer in ("layers.0", "layers.1"):
        for part, before in (("attention", "input"), ("mlp", "post_attention")):
            normed = y = _norm(x, tensors[f"{layer}.{before}_layernorm.weight"])
            if convolves:
                y = _convolved(tensors, f"{layer}.{part}_conv", 0, y, normed)
            if part == "attention":
                y = _attended(tensors, f"{layer}.self_attn", y, context, start, window)
            else:
                gate, up = (y @ tensors[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
                y = (torch.nn.functional.silu(gate) * up) @ tensors[f"{layer}.mlp.down_proj.weight"].T
            x = x + (_convolved(tensors, f"{layer}.{part}_conv", 1, y, normed) if convolves else y)
    return _norm(x, tensors["norm.weight"])


def dflash2_drafts(tensors: dict, hidden: torch.Tensor, head: torch.Tensor, before: int) -> list[tuple[int, float]]:
    """Of slots (S, H), each token and its corrected logit: the best of a slot's five, given the one before."""
    found = []
    for state in hidden:
        logits = 4.0 * torch.tanh(0.5 * (head @ state) / 4.0)
        best = logits.topk(5).indices
        named = {
            name: tensors[f"candidate_selector.{name}"] for name in ("predecessor_codebook", "successor_codebook")
        }
        context = named["predecessor_codebook"][before] * (
            tensors["candidate_selector.hidden_projection.weight"] @ state
        )
        scores = logits[best] + named["successor_codebook"][best] @ context
        before = int(best[scores.argmax()])
        others = logits.index_fill(0, best, -math.inf).logsumexp(0)
        found.append((before, (scores.max() - torch.logaddexp(scores.logsumexp(0), others)).item()))
    return found


def dspark_drafts(tensors: dict, hidden: torch.Tensor, before: int) -> list[tuple[int, float, float]]:
    """Of slots (S, H), each token, its log probability, and how likely it is accepted."""
    found = []
    for state in hidden:
        previous = tensors["markov_head.markov_w1.weight"][before]
        both, moved = torch.cat([state, previous]), previous
        if "markov_head.gate_proj.weight" in tensors:
            gate = tensors["markov_head.gate_proj.weight"] @ both + tensors["markov_head.gate_proj.bias"]
            moved = gate.sigmoid() * previous
        logits = tensors["lm_head.weight"] @ state + tensors["markov_head.markov_w2.weight"] @ moved
        said = tensors["confidence_head.proj.weight"][0] @ both + tensors["confidence_head.proj.bias"][0]
        before = int(logits.argmax())
        found.append((before, logits.log_softmax(0).max().item(), said.sigmoid().item()))
    return found
