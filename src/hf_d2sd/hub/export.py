"""`hf-d2sd export`: a drafter as vLLM and SGLang read it. The way back is `modeling.formats_d2sd`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..drafting import draft_head
from ..modeling import D2SDDrafterConfig, D2SDDrafterModel
from ..modeling.formats_d2sd import EXTRAS
from ..pairs import load_drafter

_SAME = (  # keys that stay as they are
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "layer_types",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass
class ExportOptions:
    """Write one drafter in the public DFlash layout (vLLM, SGLang) or in that of speculators (vLLM)."""

    model: str = field(metadata={"help": "folder or Hub id of a pair or a drafter"})
    out: Path = field(metadata={"help": "folder that is written"})
    format: Literal["dflash", "speculators"] = field(default="dflash", metadata={"help": "the layout"})
    role: Literal["first", "second"] = field(default="first", metadata={"help": "which drafter of a pair"})
    target: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the target: speculators names it, and gives pruned drafters its head"},
    )


def export(options: ExportOptions) -> dict:
    """Write `config.json` and `model.safetensors`; returns what was written.

    Raises:
        ValueError: naming everything of the drafter that the format cannot say.
    """
    drafter = load_drafter(options.model, options.role)
    config, tensors = drafter.config, drafter.state_dict()
    _refuse(options.format, obstacles(config, options.format))
    if options.format == "speculators":
        if options.target is None:
            raise ValueError("speculators' format names the target (its verifier): pass it as --target.")
        tensors = speculators_tensors(drafter, options.target)
        written = speculators_config(config, options.target, AutoConfig.from_pretrained(options.target))
    else:
        written = dflash_config(config)
    options.out.mkdir(parents=True, exist_ok=True)
    written["dtype"] = str(drafter.dtype).removeprefix("torch.")
    (options.out / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        options.out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return {"format": options.format, "tensors": len(tensors), "out": str(options.out)}


def obstacles(config: D2SDDrafterConfig, format: str) -> list[str]:
    """What the drafter has and the format cannot say, in words."""
    sliding, causal = "sliding_attention" in config.layer_types, config.causal_layer_types or []
    causal = {kind for kind in config.layer_types if kind in causal}
    pruned = config.draft_vocab_size is not None
    speculators = format == "speculators"
    found = {
        "feature_fusion is 'layerwise'": config.feature_fusion != "shared",
        "qk_norm is False": not config.qk_norm,
        "vocab_size is None": config.vocab_size is None,
        "mask_token_id is None": config.mask_token_id is None,
        "its full layers are causal, its sliding ones are not": causal == {"full_attention"} and sliding,
        f"draft_vocab_size is {config.draft_vocab_size} (speculators can say it)": pruned and not speculators,
        "it has an LM head of its own": config.own_head and not (pruned and speculators),
        "its full layers are causal": "full_attention" in causal and speculators,
        f"output_multiplier is {config.output_multiplier}": config.output_multiplier != 1.0 and speculators,
        "it caps its logits": config.final_logit_softcapping is not None and speculators,
        "it names its embedding's scale": config.input_embedding_scale is not None and speculators,
    }
    return [reason for reason, holds in found.items() if holds]


def _refuse(format: str, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"The format {format!r} cannot say this of the drafter: {'; '.join(reasons)}.")


def _layers(config: D2SDDrafterConfig) -> dict:
    """The part that both formats write as Qwen3's configuration does; a window of W sees distances below W there."""
    window = config.sliding_window
    rope = dict(config.rope_parameters)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {
        **{name: getattr(config, name) for name in _SAME},
        "model_type": "qwen3",
        "rope_theta": rope["rope_theta"],  # for readers that do not know rope_parameters
        "rope_scaling": scaling,
        "sliding_window": None if window is None else window + 1,
        "use_sliding_window": window is not None,
        "tie_word_embeddings": False,
    }


def _extras(config: D2SDDrafterConfig, said: tuple[str, ...] = ()) -> dict:
    """What the format has no key for, and is not `said` already, under a key that other readers pass over."""
    extras = {name: getattr(config, name) for name in EXTRAS if name not in said}
    extras = {name: value for name, value in extras.items() if value is not None}
    return {"d2sd": extras} if extras else {}


def dflash_config(config: D2SDDrafterConfig) -> dict:
    """The `config.json` of the public DFlash layout."""
    kinds = set(config.layer_types)
    causal = kinds & set(config.causal_layer_types or ())
    inner = {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
    logits = {
        "output_multiplier": None if config.output_multiplier == 1 else config.output_multiplier,
        "final_logit_softcapping": config.final_logit_softcapping,
        "input_embedding_scale": config.input_embedding_scale,
    }
    logits = {name: value for name, value in logits.items() if value is not None}
    inner |= logits | _extras(config, said=("num_target_layers",))  # SGLang looks for `logits` here, others outside
    written = {
        **_layers(config),
        "architectures": ["DFlashDraftModel"],
        "block_size": config.block_size,
        "num_target_layers": config.num_target_layers,
        "target_hidden_size": config.target_hidden_size,
        **logits,
        "dflash_config": inner,
    }
    if causal != kinds & {"sliding_attention"}:  # the default of its readers; said for all layers, and in both words
        written["is_causal"] = inner["causal"] = bool(causal)
    return {name: value for name, value in written.items() if value is not None}


def speculators_config(config: D2SDDrafterConfig, target: str, verifier: PreTrainedConfig) -> dict:
    """The `config.json` of speculators."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.block_size - 1,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "target_hidden_size": config.target_hidden_size,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "sliding_window_non_causal": "sliding_attention" not in (config.causal_layer_types or ()),
        "tie_word_embeddings": False,
        "transformer_layer_config": _layers(config) | _extras(config),
        "speculators_config": {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": verifier.architectures or []},
        },
    }


def speculators_tensors(drafter: D2SDDrafterModel, target: str) -> dict[str, Tensor]:
    """With a pruned vocabulary: its tokens as `d2t` and `t2d`, ascending, and the head's rows, which vLLM wants."""
    tensors = drafter.state_dict()
    if drafter.config.draft_vocab_size is None:
        return tensors
    ids, order = tensors.pop("draft_token_ids").sort()
    if not drafter.config.own_head:
        tensors["lm_head.weight"] = _head_rows(drafter, target)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
    listed = torch.zeros(drafter.config.vocab_size, dtype=torch.bool)
    listed[ids] = True
    return tensors | {"d2t": ids - torch.arange(len(ids)), "t2d": listed}


def _head_rows(drafter: D2SDDrafterModel, target: str) -> Tensor:
    """(V', H): the target's rows, by which the drafter drafts."""
    head = AutoModelForCausalLM.from_pretrained(target).get_output_embeddings()
    rows = draft_head(drafter, head)
    if rows.bias is not None:
        raise ValueError(f"The head of {target} has a bias, which speculators' format cannot say.")
    return rows.weight.to(drafter.dtype)
