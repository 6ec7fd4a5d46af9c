# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""What makes any checkpoint safe to read, whatever its layout: its references, its files, its tensors' shapes."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedConfig

from .compat_d2sd import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MAX_LAYERS, MAX_BLOCK_SIZE = 1024, 4096  # a config asking for more is damaged, whatever the weights are
MAX_PATH_SIZE = 65536

_ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1}
_CLASS = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*--)?\w+\.\w+", re.ASCII)  # of this or a named repository


def check_references(path: str | os.PathLike, config: dict) -> None:
    """Refuse a `config.json` that names code or files elsewhere than in its repository.

    Raises:
        ValueError: with the name.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    strange = [name for name in _mapped_classes(parts) if not _CLASS.fullmatch(str(name))]
    if strange:
        raise ValueError(
            f"auto_map names {strange[0]!r} in the config of {path}, which is no class in a file of a repository: do "
            "not use this checkpoint."
        )
    _check_kernels(path, parts)
    if "transformers_weights" in config:
        raise ValueError(
            f"transformers_weights is {config['transformers_weights']!r} in the config of {path}; a drafter's weights "
            "have their usual names: do not use this checkpoint."
        )


def _mapped_classes(parts: list[dict]) -> list:
    maps = [part["auto_map"] for part in parts if part.get("auto_map")]
    values = [value for each in maps for value in (each.values() if isinstance(each, dict) else [each])]
    return [name for value in values for name in (value if isinstance(value, (list, tuple)) else [value]) if name]


def _check_kernels(path: str | os.PathLike, parts: list[dict]) -> None:
    kernels = [
        value for part in parts for name, value in part.items() if "implementation" in name and "/" in str(value)
    ]
    if kernels:
        raise ValueError(
            f"The config of {path} asks for the kernel {kernels[0]!r} of the Hub, which would be run: do not use this "
            "checkpoint, or pass attn_implementation yourself after deleting that from its config."
        )


def drafter_shapes(config: PreTrainedConfig, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that a drafter of this configuration has; nothing is allocated."""
    hidden, features, layer = config.hidden_size, len(config.target_layer_ids), _layer_shapes(config)
    shapes = {f"layers.{i}.{name}": shape for i in range(config.num_hidden_layers) for name, shape in layer.items()}
    shapes |= {"fc.weight": (hidden, features * config.target_hidden_size)}
    shapes |= {"hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    if config.feature_fusion == "layerwise":
        shapes["layer_weights"] = (config.num_hidden_layers, features)
    if config.draft_vocab_size is not None:
        shapes["draft_token_ids"] = (config.draft_vocab_size,)
    if config.path_rank is not None:
        shapes |= {f"path_head.{name}": shape for name, shape in PATH_KINDS[config.path_kind](config).items()}
    if config.confidence_head is not None:
        inputs = hidden + (config.path_rank if config.confidence_head == "path" else 0)
        shapes |= {"confidence_head.proj.weight": (1, inputs), "confidence_head.proj.bias": (1,)}
    if config.own_embedding:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
    if config.own_head:
        shapes["lm_head.weight"] = (config.draft_vocab_size or config.vocab_size, hidden)
    return {prefix + name: shape for name, shape in shapes.items()}


def _projection_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    hidden, rank, width = config.hidden_size, config.path_rank, config.path_width
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (width, hidden) for name in ("slot", "previous")}
    return shapes | {"state.weight": (rank, width), "candidate.weight": (rank, hidden)}


def _selector_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    before, at = _path_tables(config)
    projection = {"hidden_projection.weight": (config.path_rank, config.hidden_size)}
    return {"predecessor_codebook": before, "successor_codebook": at} | projection


def _markov_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    before, at = _path_tables(config)
    return {"markov_w1.weight": before, "markov_w2.weight": at}


def _gated_markov_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    rank = config.path_rank
    gate = {"gate_proj.weight": (rank, config.hidden_size + rank), "gate_proj.bias": (rank,)}
    return _markov_shapes(config) | gate


def _path_tables(config: PreTrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of tokens that stand before a slot, whatever tokens they are, and of those that are drafted at it."""
    return (config.vocab_size, config.path_rank), (config.draft_vocab_size or config.vocab_size, config.path_rank)


# By `path_kind`, name and shape of a path head's tensors.
PATH_KINDS: dict[str, Callable[[PreTrainedConfig], dict[str, tuple[int, ...]]]] = {
    "projection": _projection_shapes,
    "selector": _selector_shapes,
    "markov": _markov_shapes,
    "gated_markov": _gated_markov_shapes,
}


def _layer_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projections = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    layer: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("input_layernorm.weight", "post_attention_layernorm.weight"), (hidden,)
    )
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, inner)}
    for name, shape in projections.items():
        layer[f"self_attn.{name}_proj.weight"] = shape
        if config.attention_bias:
            layer[f"self_attn.{name}_proj.bias"] = shape[:1]
    if config.conv_kernel_size is not None:
        taps, groups = config.conv_kernel_size, hidden // config.conv_group_size
        for name in ("attention_conv", "mlp_conv"):
            layer |= {f"{name}.base_kernel": (2, taps, hidden)}
            layer |= {f"{name}.kernel_projection.weight": (2 * taps * groups, hidden)}
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    return layer


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
        header = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
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
    problems = _differences(found, shapes)
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_shortened(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"The weights of {path} are not those of its config: tensors {listed}.")


def _differences(
    found: dict[str, tuple[str, tuple[int, ...]]], shapes: dict[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    return {
        "missing": sorted(shapes.keys() - found.keys()),
        "unexpected": sorted(found.keys() - shapes.keys()),
        "mismatched": [
            f"{name} {found[name][1]} for {shape}"
            for name, shape in shapes.items()
            if name in found and (found[name][1] != shape or (found[name][0][0] == "I") != _is_index(name))
        ],
    }


def _is_index(name: str) -> bool:
    return name.endswith("draft_token_ids")


def _shortened(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


__all__ = [
    "HUB_OPTIONS",
    "MAX_BLOCK_SIZE",
    "MAX_LAYERS",
    "MAX_PATH_SIZE",
    "PATH_KINDS",
    "check_references",
    "check_weights",
    "drafter_shapes",
    "find_weights",
    "read_header",
    "shard_names",
]
