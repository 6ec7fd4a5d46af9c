# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other libraries read as this one's, and what makes any checkpoint safe to read.

Pure functions of configurations and tensor names, but for those that find and open files. Which key means what is
written in docs/formats.md.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

OWN, DFLASH, SPECULATORS, NATIVE = "d2sd", "dflash", "speculators", "muse_glimmer_assistant"
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MAX_LAYERS, MAX_BLOCK_SIZE = 1024, 4096  # a config asking for more is damaged, whatever the weights are

EXTRAS = ("confidence_temperatures", "num_target_layers", "tokenizer_fingerprint")
_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1}

_KEPT = (  # keys that mean the same in Qwen3's configuration and in ours
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
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)
# What marks the drafters that need a network or a decoding of their own: key, values that do no harm, name.
_FOREIGN = (
    ("projector_type", ("dflash",), "Domino or another projector"),
    ("shift_label", (False,), "Domino"),
    ("draft_shift", (False,), "a drafter with shifted labels"),
    ("sample_from_anchor", (False,), "a drafter that samples from its anchor"),
    ("selector_rank", (), "DFlash 2"),
    ("selector_top_k", (), "DFlash 2"),
    ("conv_kernel_size", (), "DFlash 2"),
    ("markov_rank", (0,), "DSpark"),
    ("markov_head_type", (), "DSpark"),
    ("enable_confidence_head", (False,), "DSpark"),
    ("attention_mode", ("gqa", "mha"), "DFlash with another attention"),
    ("attention_modes", (), "DFlash with another attention"),
    ("attention_sink_bias", (False,), "DFlash with attention sinks"),
    ("add_swa_attention_sink_bias", (False,), "DFlash with attention sinks"),
    ("use_aux_hidden_state", (True,), "DFlash without features"),
)


def _refuse(reason: str) -> None:
    raise ValueError(f"{reason}. docs/formats.md lists the drafters that can be read.")


def layout_of(config: dict) -> str | None:
    """Which library's layout a `config.json` has; `None` for one that is no drafter's.

    Raises:
        ValueError: for drafters of a kind that is known, but cannot be decoded, by its name.
    """
    if config.get("model_type") in ("d2sd", "d2sd_drafter"):
        return OWN
    kind, architectures = config.get("speculators_model_type"), config.get("architectures") or []
    if kind is not None:
        if kind != "dflash":
            _refuse(f"This is a drafter of the kind {kind!r} (speculators_model_type); 'dflash' can be read")
        return SPECULATORS
    if config.get("model_type") == NATIVE:
        return NATIVE
    named = {name for name in architectures if re.search("DFlash|DSpark|DFlare|Domino", name)}
    if not named and "dflash_config" not in config:
        return None
    if named - {"DFlashDraftModel"}:
        _refuse(f"This is a drafter of the kind {', '.join(sorted(named))} (architectures), not 'DFlashDraftModel'")
    return DFLASH


_CLASS = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*--)?\w+\.\w+", re.ASCII)  # of this or a named repository


def check_references(path: str | os.PathLike, config: dict) -> None:
    """Refuse a `config.json` that names code or files elsewhere than in its repository.

    Raises:
        ValueError: with the name.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    maps = [part["auto_map"] for part in parts if part.get("auto_map")]
    values = [value for each in maps for value in (each.values() if isinstance(each, dict) else [each])]
    names = [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value]) if name]
    strange = [name for name in names if not _CLASS.fullmatch(str(name))]
    if strange:
        raise ValueError(
            f"auto_map names {strange[0]!r} in the config of {path}, which is no class in a file of a repository: do "
            "not use this checkpoint."
        )
    kernels = [
        value for part in parts for name, value in part.items() if "implementation" in name and "/" in str(value)
    ]
    if kernels:
        raise ValueError(
            f"The config of {path} asks for the kernel {kernels[0]!r} of the Hub, which would be run: do not use this "
            "checkpoint, or pass attn_implementation yourself after deleting that from its config."
        )
    if "transformers_weights" in config:
        raise ValueError(
            f"transformers_weights is {config['transformers_weights']!r} in the config of {path}; a drafter's weights "
            "have their usual names: do not use this checkpoint."
        )


def translate_config(config: dict) -> dict:
    """From a `config.json` of another layout to the arguments of `D2SDDrafterConfig`.

    Raises:
        ValueError: for a drafter that another network or decoding is needed for, naming the key that says so.
    """
    layout = layout_of(config)
    if layout == SPECULATORS:
        translated = _from_speculators(config)
    elif layout == NATIVE:
        translated = _from_native(config)
    elif layout == DFLASH:
        translated = _from_dflash(config)
    else:
        raise ValueError(f"No drafter's configuration: model_type is {config.get('model_type')!r}.")
    said = {name: value for name, value in translated.items() if value is not None or name == "vocab_size"}
    return said | {"model_type": "d2sd_drafter"}


def _from_dflash(config: dict) -> dict:
    """z-lab's and SpecForge's layout, which JetSpec's heads share; VP-Drafters have the same keys and tensors."""
    inner = config.get("dflash_config") or {}
    _check_kind(config, inner)

    def value(name: str, default=None):
        return inner.get(name, config.get(name, default))

    layers = dict(config)
    if "sliding_attention" in (config.get("layer_types") or []):
        layers.setdefault("use_sliding_window", True)
    base = _read_layers({**layers, "model_type": "qwen3"})  # whatever it says: the network is Qwen3's
    if inner.get("use_swa") and "sliding_attention" not in base["layer_types"]:
        base["layer_types"] = ["sliding_attention"] * base["num_hidden_layers"]
        base["sliding_window"] = config.get("sliding_window")
        causal_by_default = []
    else:
        causal_by_default = ["sliding_attention"]
    window = inner.get("swa_window_size", base["sliding_window"])
    return {
        **base,
        **_window(base["layer_types"], window),
        "causal_layer_types": _causal(base["layer_types"], config, inner, causal_by_default),
        "block_size": value("block_size", 16),
        "mask_token_id": value("mask_token_id"),
        "target_layer_ids": _required(value("target_layer_ids", value("layer_ids")), "target_layer_ids"),
        "target_hidden_size": config.get("target_hidden_size"),
        "num_target_layers": value("num_target_layers"),
        "output_multiplier": value("output_multiplier", config.get("logit_scale")),
        "final_logit_softcapping": value("final_logit_softcapping") or None,
        "input_embedding_scale": value("input_embedding_scale"),
        **_extras(inner),
    }


def _from_speculators(config: dict) -> dict:
    _check_kind(config, {})
    layers = dict(config.get("transformer_layer_config") or {})
    if "sliding_attention" in (layers.get("layer_types") or []):
        layers.setdefault("use_sliding_window", True)
    base = _read_layers({"model_type": "qwen3", **layers})
    ids = _required(config.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids")
    if min(ids) < 1:
        _refuse(f"aux_hidden_state_layer_ids is {ids}: entry 0 is the embedding's output, which is no layer's")
    pruned = config.get("draft_vocab_size", 32000) != base["vocab_size"]
    causal = [] if config.get("sliding_window_non_causal", False) else ["sliding_attention"]
    return {
        **base,
        **_window(base["layer_types"], base["sliding_window"]),
        **_extras(layers),
        "causal_layer_types": [kind for kind in causal if kind in base["layer_types"]],
        "block_size": config.get("block_size", 8),
        "mask_token_id": config.get("mask_token_id"),
        "target_layer_ids": [i - 1 for i in ids],  # theirs index hidden_states, which has the embedding first
        "target_hidden_size": config.get("target_hidden_size"),
        "draft_vocab_size": config.get("draft_vocab_size", 32000) if pruned else None,
        "own_head": pruned,
    }


def _from_native(config: dict) -> dict:
    """Transformers' own DFlash assistants: blocks see themselves in both directions, also in sliding layers."""
    if NATIVE not in CONFIG_MAPPING:
        _refuse(f"This release of Transformers does not know {NATIVE!r}: pip install -U transformers")
    read = CONFIG_MAPPING[NATIVE](**{name: value for name, value in config.items() if name != "model_type"})
    base = _kept(read) | {"vocab_size": config.get("vocab_size")}
    return {
        **base,
        "layer_types": read.layer_types,
        "sliding_window": read.sliding_window,
        "block_size": read.block_size,
        "mask_token_id": read.mask_token_id,
        "target_layer_ids": read.target_layer_ids,
    }


def _extras(values: dict) -> dict:
    """What `hf-d2sd export` adds to these layouts, and other readers pass over."""
    extras = values.get("d2sd") or {}
    return {name: extras[name] for name in EXTRAS if name in extras}


def _check_kind(config: dict, inner: dict) -> None:
    for name, harmless, kind in _FOREIGN:
        value = inner.get(name, config.get(name))
        if value is not None and value not in harmless:
            _refuse(f"This is {kind}: {name} is {value!r}")


def _required(value, name: str):
    if not value:
        raise ValueError(f"The drafter's config has no {name}: it cannot be known which features it reads.")
    return value


def _read_layers(layers: dict) -> dict:
    """The layers' configuration, with the defaults of its own class, and the rotary parameters in one dictionary."""
    model_type = layers.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        _refuse(f"The drafter's layers are of the unknown model_type {model_type!r}")
    read = CONFIG_MAPPING[model_type](**layers)
    num_layers = read.num_hidden_layers
    types = getattr(read, "layer_types", None) or ["full_attention"] * num_layers
    return _kept(read) | {"layer_types": list(types), "sliding_window": getattr(read, "sliding_window", None)}


def _kept(read: PreTrainedConfig) -> dict:
    kept = {name: getattr(read, name) for name in _KEPT if getattr(read, name, None) is not None}
    kept["rope_parameters"] = _one_rope(kept.get("rope_parameters") or {})
    return kept


def _one_rope(parameters: dict) -> dict:
    """Rotary parameters that hold for all layers and for all of a head's dimensions."""
    by_type = [value for value in parameters.values() if isinstance(value, dict)]
    if by_type and any(value != by_type[0] for value in by_type):
        _refuse(f"The drafter's layers turn differently (rope_parameters is {parameters})")
    parameters = by_type[0] if by_type else parameters
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(f"Only a part of each head turns (partial_rotary_factor is {parameters['partial_rotary_factor']})")
    return parameters


def _window(layer_types: list[str], window: int | None) -> dict:
    """Elsewhere a window of W sees distances below W; `sliding_window` is the greatest distance seen."""
    sliding = "sliding_attention" in layer_types and window is not None
    if sliding and window < 1:
        raise ValueError(f"sliding_window is {window}; it must be at least 1.")
    return {"sliding_window": window - 1 if sliding else None}


def _causal(layer_types: list[str], config: dict, inner: dict, by_default: list[str]) -> list[str]:
    """The layer types in which a block's tokens see only earlier ones: as said for all layers, or the default."""
    said = (inner.get("causal"), config.get("is_causal"), inner.get("is_causal"), inner.get("causal_head") or None)
    said = next((value for value in said if value is not None), None)
    if said is None:
        return [kind for kind in by_default if kind in layer_types]
    return sorted(set(layer_types)) if said else []


def tensor_name(layout: str, name: str, config: PreTrainedConfig) -> str | None:
    """What a tensor of another layout is called here; `None` for one that is left out.

    speculators replaces `embed_tokens`, and the `lm_head` of a full vocabulary, by the target's when it loads a
    drafter, so here too they are the target's. `t2d` says nothing that `d2t` does not.
    """
    if layout == NATIVE:
        return re.sub(r"^encoder\.output_norm_enc\.", "hidden_norm.", re.sub(r"^encoder\.fc\.", "fc.", name))
    if layout == SPECULATORS:
        if name in ("embed_tokens.weight", "t2d") or (name == "lm_head.weight" and not config.own_head):
            return None
        return "draft_token_ids" if name == "d2t" and config.draft_vocab_size is not None else name
    return name


def translate_tensors(layout: str, tensors: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
    """The tensors of another layout by their names here. `d2t` holds target id minus draft id.

    Raises:
        ValueError: if `t2d` and `d2t` name different tokens.
    """
    translated = {tensor_name(layout, name, config): tensor for name, tensor in tensors.items()}
    translated.pop(None, None)
    if layout == SPECULATORS and "draft_token_ids" in translated:
        offsets = translated["draft_token_ids"].long()
        ids = translated["draft_token_ids"] = offsets + torch.arange(len(offsets))
        listed = tensors.get("t2d")
        if listed is not None and listed.bool().nonzero().flatten().tolist() != ids.sort().values.tolist():
            raise ValueError("The checkpoint's t2d and d2t name different tokens: it is damaged.")
    return translated


def drafter_shapes(config: PreTrainedConfig, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a drafter of this configuration has; nothing is allocated."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    layer = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, inner)}
    for name, shape in projections.items():
        layer[f"self_attn.{name}_proj.weight"] = shape
        if config.attention_bias:
            layer[f"self_attn.{name}_proj.bias"] = shape[:1]
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    shapes = {f"layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}
    features = len(config.target_layer_ids)
    shapes |= {"fc.weight": (hidden, features * config.target_hidden_size)}
    shapes |= {"hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    if config.feature_fusion == "layerwise":
        shapes["layer_weights"] = (config.num_hidden_layers, features)
    if config.draft_vocab_size is not None:
        shapes["draft_token_ids"] = (config.draft_vocab_size,)
    if config.own_head:
        shapes["lm_head.weight"] = (config.draft_vocab_size or config.vocab_size, hidden)
    return {prefix + name: shape for name, shape in shapes.items()}


_STRANGE_FILES = {
    "adapter_config.json": "it is an adapter, whose base would be loaded from elsewhere",
    "mask_embedding.pt": "its mask token's embedding is pickled apart from the weights",
}


def find_weights(path: str | os.PathLike, variant: str | None = None, **hub) -> list[str]:
    """The safetensors files of a folder or Hub repository, which are brought here.

    Raises:
        ValueError: for an index that leads elsewhere than to safetensors files beside it, or weights of which not all
            are safetensors.
        OSError: if there are none. Pickled weights are never read.
    """
    for name, meaning in _STRANGE_FILES.items():
        if cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub) is not None:
            raise ValueError(f"{path} has a file {name}: {meaning}, which a drafter that can be read here has not.")
    names = [_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    single, index = (cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub) for name in names)
    if single is not None:
        return [single]
    if index is None:
        raise OSError(
            f"{path} has no {names[0]} and no {names[1]}. Drafters are read from safetensors alone, since reading a "
            "pickle can run any code: ask its author for them."
        )
    return [cached_file(path, name, **hub) for name in shard_names(index)]


def _with_variant(name: str, variant: str | None) -> str:
    return name if variant is None else re.sub(r"^model\.", f"model.{variant}.", name)


def shard_names(index_file: str | os.PathLike) -> list[str]:
    """The files that an index names.

    Raises:
        ValueError: for a damaged index, or a name that is no plain safetensors file name.
    """
    with open(index_file, encoding="utf-8") as file:
        try:
            names = sorted(set(json.load(file)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index_file} is no index of weights: {error!r}.") from error
    for name in names:
        if not re.fullmatch(r"[\w.+-]*\w\.safetensors", str(name), re.ASCII):
            raise ValueError(
                f"{index_file} names the file {name!r}. Weights are read from safetensors files beside the index "
                "alone: do not use this checkpoint."
            )
    return names


def read_header(file: str | os.PathLike) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a safetensors file, without reading the tensors.

    Raises:
        ValueError: if it is no safetensors file, or a part of it is missing.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is no safetensors file, or not all of it is here: {size} bytes.")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            read = {name: (entry["dtype"], tuple(map(int, entry["shape"]))) for name, entry in entries.items()}
            needed = sum(_ITEM_SIZES[dtype] * math.prod(shape) for dtype, shape in read.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is no safetensors file of plain weights: {error!r}.") from error
    if needed != size - 8 - length:
        raise ValueError(f"{file} is damaged: its tensors need {needed} bytes, and there are {size - 8 - length}.")
    return read


def check_weights(
    path: str | os.PathLike,
    files: Iterable[str],
    shapes: dict[str, tuple[int, ...]],
    rename: Callable[[str], str | None] = lambda name: name,
) -> None:
    """Compare what the files hold with the tensors that a configuration asks for, before any is allocated.

    Raises:
        ValueError: listing the tensors that are missing, unexpected, or of another shape or kind.
    """
    found = {rename(name): entry for file in files for name, entry in read_header(file).items()}
    found.pop(None, None)
    problems = {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(found.keys() - shapes.keys()),
        "mismatched": [
            f"{name} {found[name][1]} for {shape}"
            for name, shape in shapes.items()
            if name in found and (found[name][1] != shape or (found[name][0][0] == "I") != _is_index(name))
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The weights of {path} are not those of its config: tensors {listed}.")


def _is_index(name: str) -> bool:
    return name.endswith("draft_token_ids")


def _shortened(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


__all__ = [
    "check_references",
    "check_weights",
    "drafter_shapes",
    "find_weights",
    "layout_of",
    "translate_config",
    "translate_tensors",
]
