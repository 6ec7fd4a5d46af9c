# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""The layouts that checkpoints of drafters have, this library's and those of others: one class for each.

A layout is known, read and written in its class alone, and added by a class and its entry in `FORMATS`. Which key
means what is written in docs/formats.md.
"""

import math
import re
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig

_KEYS = (  # keys that mean the same in Qwen3's configuration and in ours
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
)
# What other layouts have no key for; it is written under "d2sd", which other readers pass over.
_EXTRAS = ("confidence_temperatures", "num_target_layers", "path_text_weight", "tokenizer_fingerprint")
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
    ("dspark_bonus_anchor", (False,), "DSpark that drafts from its masks"),
    ("num_loops", (1,), "a drafter whose layers are passed several times"),
    ("attention_mode", ("gqa", "mha"), "DFlash with another attention"),
    ("attention_modes", (), "DFlash with another attention"),
    ("attention_sink_bias", (False,), "DFlash with attention sinks"),
    ("add_swa_attention_sink_bias", (False,), "DFlash with attention sinks"),
    ("use_aux_hidden_state", (True,), "DFlash without features"),
)


@dataclass(frozen=True)
class TargetParts:
    """What a layout may say of the target that a drafter was made for; it is loaded when it is called for."""

    name: str  # folder or Hub id
    architectures: Callable[[], list[str]]
    head: Callable[[], nn.Module]  # its LM head, as far as the drafter drafts: weight (V', H), bias (V',) or None


class Format:
    """One layout. This class reads and names tensors as they are, and knows no configuration."""

    name: str
    own = False  # whether it is this library's, so that Transformers reads and writes it
    engines = ""  # that read what `write` writes
    names_target = False  # whether `write` has to be told of the target

    def detect(self, config: dict) -> bool:
        """Whether a `config.json` has this layout.

        Raises:
            ValueError: for drafters of a kind that is known, but cannot be decoded, by its name.
        """
        return False

    def read(self, config: dict) -> dict:
        """From a `config.json` to the arguments of `D2SDDrafterConfig`.

        Raises:
            ValueError: for a drafter that another network or decoding is needed for, naming the key that says so.
        """
        raise NotImplementedError

    def rename(self, name: str, config: PreTrainedConfig) -> str | None:
        """What a tensor is called here; `None` for one that is left out. `config` is the drafter's."""
        return name

    def translate(self, tensors: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        """The tensors by their names here.

        Raises:
            ValueError: for tensors that contradict each other.
        """
        translated = {self.rename(name, config): tensor for name, tensor in tensors.items()}
        translated.pop(None, None)
        return translated

    def obstacles(self, config: PreTrainedConfig) -> list[str]:
        """What a drafter has and the layout cannot say, in words: without it, it would draft otherwise."""
        return []

    def left_out(self, config: PreTrainedConfig) -> dict[str, str]:
        """What is no part of what is written, though it drafts better with it: how tensors' names begin, and words."""
        return {}

    def write(
        self, config: PreTrainedConfig, tensors: dict[str, Tensor], target: TargetParts | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """The `config.json`, without its dtype, and the tensors of a drafter that has no obstacles.

        Raises:
            ValueError: if nothing is written in this layout, or the target is needed and not named.
        """
        raise ValueError(f"Drafters are not exported in the format {self.name!r}, but in {_listed_formats()}.")

    @property
    def writable(self) -> bool:
        return type(self).write is not Format.write


class OwnFormat(Format):
    """This library's, of drafters and of pairs."""

    name = "d2sd"
    own = True

    def detect(self, config: dict) -> bool:
        return config.get("model_type") in ("d2sd", "d2sd_drafter")

    def read(self, config: dict) -> dict:
        return config


class SpeculatorsFormat(Format):
    """That of speculators: the layers apart, a pruned vocabulary as offsets, with its head beside it."""

    name = "speculators"
    engines = "vLLM"
    names_target = True

    def detect(self, config: dict) -> bool:
        kind = config.get("speculators_model_type")
        if kind not in (None, "dflash"):
            _refuse(f"This is a drafter of the kind {kind!r} (speculators_model_type); 'dflash' can be read")
        return kind is not None

    def read(self, config: dict) -> dict:
        _check_kind(config)
        layers = config.get("transformer_layer_config") or {}
        base = _read_layers({"model_type": "qwen3", **layers})
        layer_ids = self._layer_ids(config)
        causal = [] if config.get("sliding_window_non_causal", False) else ["sliding_attention"]
        draft_vocab_size = config.get("draft_vocab_size", 32000)
        pruned = draft_vocab_size != base["vocab_size"]
        return _said(
            {
                **base,
                **_window(base["layer_types"], base["sliding_window"]),
                **_read_extras(layers),
                "causal_layer_types": [kind for kind in causal if kind in base["layer_types"]],
                "block_size": config.get("block_size", 8),
                "mask_token_id": config.get("mask_token_id"),
                "target_layer_ids": layer_ids,
                "target_hidden_size": config.get("target_hidden_size"),
                "draft_vocab_size": draft_vocab_size if pruned else None,
                "own_head": pruned,
            }
        )

    def _layer_ids(self, config: dict) -> list[int]:
        """Theirs index `hidden_states`, which has the embedding first."""
        ids = _required(config.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids")
        if min(ids) < 1:
            _refuse(f"aux_hidden_state_layer_ids is {ids}: entry 0 is the embedding's output, which is no layer's")
        return [i - 1 for i in ids]

    def rename(self, name: str, config: PreTrainedConfig) -> str | None:
        """speculators replaces `embed_tokens`, and the `lm_head` of a full vocabulary, by the target's when it loads
        a drafter, so here too they are the target's. `t2d` says nothing that `d2t` does not.
        """
        if name in ("embed_tokens.weight", "t2d") or (name == "lm_head.weight" and not config.own_head):
            return None
        return "draft_token_ids" if name == "d2t" and config.draft_vocab_size is not None else name

    def translate(self, tensors: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        """`d2t` holds target id minus draft id; `t2d` must name the same tokens."""
        translated = super().translate(tensors, config)
        if "draft_token_ids" in translated:
            offsets = translated["draft_token_ids"].long()
            ids = translated["draft_token_ids"] = offsets + torch.arange(len(offsets))
            listed = tensors.get("t2d")
            if listed is not None and listed.bool().nonzero().flatten().tolist() != ids.sort().values.tolist():
                raise ValueError("The checkpoint's t2d and d2t name different tokens: it is damaged.")
        return translated

    def left_out(self, config: PreTrainedConfig) -> dict[str, str]:
        return _heads_left_out(config)

    def obstacles(self, config: PreTrainedConfig) -> list[str]:
        found = _common_obstacles(config) | {
            "it has an LM head of its own": config.own_head and config.draft_vocab_size is None,
            "its full layers are causal": "full_attention" in _causal_types(config),
            f"output_multiplier is {config.output_multiplier}": config.output_multiplier != 1.0,
            "it caps its logits": config.final_logit_softcapping is not None,
            "it names its embedding's scale": config.input_embedding_scale is not None,
        }
        return [reason for reason, holds in found.items() if holds]

    def write(
        self, config: PreTrainedConfig, tensors: dict[str, Tensor], target: TargetParts | None
    ) -> tuple[dict, dict[str, Tensor]]:
        if target is None:
            raise ValueError("speculators' format names the target (its verifier): pass it as --target.")
        if config.draft_vocab_size is not None:
            tensors = self._pruned(config, tensors, target)
        written = {
            "architectures": ["DFlashSpeculator"],
            "speculators_model_type": "dflash",
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
            "target_hidden_size": config.target_hidden_size,
            "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
            "sliding_window_non_causal": "sliding_attention" not in (config.causal_layer_types or ()),
            "tie_word_embeddings": False,
            "transformer_layer_config": _write_layers(config) | _write_extras(config),
            "speculators_config": self._decoding(config, target),
        }
        return written, tensors

    def _decoding(self, config: PreTrainedConfig, target: TargetParts) -> dict:
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": config.block_size - 1,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        return {
            "algorithm": "dflash",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target.name, "architectures": target.architectures()},
        }

    def _pruned(self, config: PreTrainedConfig, tensors: dict[str, Tensor], target: TargetParts) -> dict[str, Tensor]:
        """The vocabulary's tokens as `d2t` and `t2d`, ascending, and the head's rows, which vLLM wants."""
        tensors = dict(tensors)
        ids, order = tensors.pop("draft_token_ids").sort()
        if not config.own_head:
            rows = target.head()
            if rows.bias is not None:
                raise ValueError(f"The head of {target.name} has a bias, which speculators' format cannot say.")
            tensors["lm_head.weight"] = rows.weight.to(tensors["fc.weight"].dtype)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][order]
        listed = torch.zeros(config.vocab_size, dtype=torch.bool)
        listed[ids] = True
        return tensors | {"d2t": ids - torch.arange(len(ids)), "t2d": listed}


class MuseGlimmerFormat(Format):
    """Transformers' own DFlash assistants: blocks see themselves in both directions, also in sliding layers."""

    name = "muse_glimmer_assistant"

    def detect(self, config: dict) -> bool:
        return config.get("model_type") == self.name

    def read(self, config: dict) -> dict:
        if self.name not in CONFIG_MAPPING:
            _refuse(f"This release of Transformers does not know {self.name!r}: pip install -U transformers")
        read = CONFIG_MAPPING[self.name](**{name: value for name, value in config.items() if name != "model_type"})
        return _said(
            {
                **_kept(read),
                "vocab_size": config.get("vocab_size"),
                "layer_types": read.layer_types,
                "sliding_window": read.sliding_window,
                "block_size": read.block_size,
                "mask_token_id": read.mask_token_id,
                "target_layer_ids": read.target_layer_ids,
            }
        )

    def rename(self, name: str, config: PreTrainedConfig) -> str | None:
        return re.sub(r"^encoder\.output_norm_enc\.", "hidden_norm.", re.sub(r"^encoder\.fc\.", "fc.", name))


class DFlashFormat(Format):
    """z-lab's and SpecForge's, which JetSpec's heads share; VP-Drafters have the same keys and tensors."""

    name = "dflash"
    engines = "vLLM, SGLang"
    architecture = "DFlashDraftModel"
    own_keys: tuple[str, ...] = ()  # of those that mark another kind

    def detect(self, config: dict) -> bool:
        named = _drafters_named(config)
        if named - {self.architecture}:
            kinds = ", ".join(sorted(named))
            _refuse(f"This is a drafter of the kind {kinds} (architectures), not 'DFlashDraftModel'")
        return bool(named) or "dflash_config" in config

    def read(self, config: dict) -> dict:
        inner = config.get("dflash_config") or {}
        said = ChainMap(inner, config)
        _check_kind(said, self.own_keys)
        layer_ids = said.get("target_layer_ids", said.get("layer_ids"))
        return _said(
            {
                **self._layers(config, inner),
                "block_size": said.get("block_size", 16),
                "mask_token_id": said.get("mask_token_id"),
                "target_layer_ids": _required(layer_ids, "target_layer_ids"),
                "target_hidden_size": config.get("target_hidden_size"),
                "num_target_layers": said.get("num_target_layers"),
                "output_multiplier": said.get("output_multiplier", config.get("logit_scale")),
                "final_logit_softcapping": said.get("final_logit_softcapping") or None,
                "input_embedding_scale": said.get("input_embedding_scale"),
                **_read_extras(inner),
            }
        )

    def _layers(self, config: dict, inner: dict) -> dict:
        base = _read_layers({**config, "model_type": "qwen3"})  # whatever it says: the network is Qwen3's
        causal = ["sliding_attention"]
        if inner.get("use_swa") and "sliding_attention" not in base["layer_types"]:
            base["layer_types"] = ["sliding_attention"] * base["num_hidden_layers"]
            base["sliding_window"] = config.get("sliding_window")
            causal = []
        window = _window(base["layer_types"], inner.get("swa_window_size", base["sliding_window"]))
        return base | window | {"causal_layer_types": self._causal(base["layer_types"], config, inner, causal)}

    def _causal(self, layer_types: list[str], config: dict, inner: dict, by_default: list[str]) -> list[str]:
        """The layer types in which a block's tokens see only earlier ones: as said for all layers, or the default."""
        said = (inner.get("causal"), config.get("is_causal"), inner.get("is_causal"), inner.get("causal_head") or None)
        said = next((value for value in said if value is not None), None)
        if said is None:
            return [kind for kind in by_default if kind in layer_types]
        return sorted(set(layer_types)) if said else []

    def left_out(self, config: PreTrainedConfig) -> dict[str, str]:
        return _heads_left_out(config)

    def obstacles(self, config: PreTrainedConfig) -> list[str]:
        return [reason for reason, holds in self._found(config).items() if holds]

    def _found(self, config: PreTrainedConfig) -> dict[str, bool]:
        size = config.draft_vocab_size
        return _common_obstacles(config) | {
            f"draft_vocab_size is {size} (speculators can say it)": size is not None,
            "it has an LM head of its own": config.own_head,
        }

    def write(
        self, config: PreTrainedConfig, tensors: dict[str, Tensor], target: TargetParts | None
    ) -> tuple[dict, dict[str, Tensor]]:
        logits = self._logits(config)
        inner = {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
        inner |= logits | _write_extras(config, said=("num_target_layers",))  # SGLang looks for `logits` here
        written = {
            **_write_layers(config),
            "architectures": [self.architecture],
            "block_size": config.block_size,
            "num_target_layers": config.num_target_layers,
            "target_hidden_size": config.target_hidden_size,
            **logits,  # and others here
            "dflash_config": inner,
        }
        kinds, causal = set(config.layer_types), _causal_types(config)
        if causal != kinds & {"sliding_attention"}:  # its readers' default; said for all layers, and in both words
            written["is_causal"] = inner["causal"] = bool(causal)
        return {name: value for name, value in written.items() if value is not None}, tensors

    def _logits(self, config: PreTrainedConfig) -> dict:
        logits = {
            "output_multiplier": None if config.output_multiplier == 1 else config.output_multiplier,
            "final_logit_softcapping": config.final_logit_softcapping,
            "input_embedding_scale": config.input_embedding_scale,
        }
        return {name: value for name, value in logits.items() if value is not None}


class DFlash2Format(DFlashFormat):
    """z-lab's DFlash 2: convolutions around each sublayer, and a selector of a slot's likeliest tokens."""

    name = "dflash2"
    architecture = "DFlash2DraftModel"
    own_keys = ("selector_rank", "selector_top_k", "conv_kernel_size")

    def detect(self, config: dict) -> bool:
        return _drafters_named(config) == {self.architecture}

    def read(self, config: dict) -> dict:
        said = ChainMap(config.get("dflash_config") or {}, config)
        lacking = [name for name in (*self.own_keys, "conv_group_size") if said.get(name) is None]
        if lacking:
            _refuse(f"This is an incomplete DFlash 2: its config has no {', '.join(lacking)}")
        return super().read(config) | {
            "conv_kernel_size": said["conv_kernel_size"],
            "conv_group_size": said["conv_group_size"],
            "path_kind": "selector",
            "path_rank": said["selector_rank"],
            "path_candidates": said["selector_top_k"],
        }

    def rename(self, name: str, config: PreTrainedConfig) -> str | None:
        return re.sub(r"^candidate_selector\.", "path_head.", name)

    def left_out(self, config: PreTrainedConfig) -> dict[str, str]:
        return {}

    def _found(self, config: PreTrainedConfig) -> dict[str, bool]:
        found = super()._found(config)
        found.pop(_CONVOLUTIONS)
        return found | {
            "its path head is no selector (dflash leaves it out)": config.path_rank is not None
            and config.path_kind != "selector",
            "it has no path head (dflash can say it)": config.path_rank is None,
            "it has a confidence head": config.confidence_head is not None,
        }

    def write(
        self, config: PreTrainedConfig, tensors: dict[str, Tensor], target: TargetParts | None
    ) -> tuple[dict, dict[str, Tensor]]:
        """One without convolutions gets some that pass their input through."""
        written, tensors = super().write(config, tensors, target)
        taps, group = config.conv_kernel_size or 2, config.conv_group_size or math.gcd(16, config.hidden_size)
        if config.conv_kernel_size is None:
            tensors = tensors | self._identities(config, tensors["fc.weight"], taps, group)
        written["dflash_config"] |= {
            "block_size": config.block_size,
            "conv_kernel_size": taps,
            "conv_group_size": group,
            "selector_rank": config.path_rank,
            "selector_top_k": config.path_candidates,
        }
        return written, {re.sub(r"^path_head\.", "candidate_selector.", name): x for name, x in tensors.items()}

    def _identities(self, config: PreTrainedConfig, like: Tensor, taps: int, group: int) -> dict[str, Tensor]:
        hidden, found = config.hidden_size, {}
        for layer in range(config.num_hidden_layers):
            for name in ("attention_conv", "mlp_conv"):
                base = like.new_zeros(2, taps, hidden)
                base[:, 0] = 1
                found[f"layers.{layer}.{name}.base_kernel"] = base
                projection = like.new_zeros(2 * taps * (hidden // group), hidden)
                found[f"layers.{layer}.{name}.kernel_projection.weight"] = projection
        return found


class DSparkFormat(Format):
    """DeepSpec's DSpark for Qwen3: full layers, an embedding and a head of its own, slots that say the next token."""

    name = "dspark"
    engines = "vLLM, SGLang"
    architecture = "Qwen3DSparkModel"
    own_keys = ("markov_rank", "markov_head_type", "enable_confidence_head")
    head_types = {"vanilla": "markov", "gated": "gated_markov"}
    candidates = 64  # its own decoding corrects the logits of all tokens

    def detect(self, config: dict) -> bool:
        return _drafters_named(config) == {self.architecture}

    def read(self, config: dict) -> dict:
        self._check(config)
        base = _read_layers(dict(config))
        if "sliding_attention" in base["layer_types"]:
            _refuse(f"This is DSpark with windows: layer_types is {base['layer_types']}")
        rank, extras = config.get("markov_rank") or None, config.get("d2sd") or {}
        confidence = None
        if config.get("enable_confidence_head"):
            confidence = "path" if config["confidence_head_with_markov"] else "slot"
        return _said(
            {
                **base,
                "sliding_window": None,
                "causal_layer_types": [],
                "block_size": config["block_size"] + 1,  # the anchor, and as many drafted tokens as it has slots
                "mask_token_id": config.get("mask_token_id"),
                "target_layer_ids": _required(config.get("target_layer_ids"), "target_layer_ids"),
                "num_target_layers": config.get("num_target_layers"),
                "own_head": True,
                "own_embedding": True,
                "drafts_from_anchor": True,
                "path_rank": rank,
                "path_kind": self.head_types[config["markov_head_type"]] if rank else None,
                "path_candidates": extras.get("path_candidates", self.candidates),
                "confidence_head": confidence,
                **_read_extras(config),
            }
        )

    def _check(self, config: dict) -> None:
        if config.get("dflash_config"):
            _refuse("This is a mixture: a DSpark (architectures) with the keys of DFlash (dflash_config)")
        if config.get("model_type") != "qwen3":
            _refuse(f"This is DSpark with other layers: model_type is {config.get('model_type')!r}")
        _check_kind({name: value for name, value in config.items() if name != "sample_from_anchor"}, self.own_keys)
        if config.get("sample_from_anchor") is False:
            _refuse("This is DSpark that drafts from its masks: sample_from_anchor is False")
        wanted = ["block_size"]
        wanted += ["markov_head_type"] if config.get("markov_rank") else []
        wanted += ["confidence_head_with_markov"] if config.get("enable_confidence_head") else []
        lacking = [name for name in wanted if config.get(name) is None]
        if lacking:
            _refuse(f"This is an incomplete DSpark: its config has no {', '.join(lacking)}")
        if config.get("markov_rank") and config["markov_head_type"] not in self.head_types:
            _refuse(f"This is DSpark with another Markov head: markov_head_type is {config['markov_head_type']!r}")
        if min(config.get("target_layer_ids") or [0]) < 0:
            _refuse(f"target_layer_ids is {config['target_layer_ids']}: -1 is the embedding's output, no layer's")
        size = config.get("draft_vocab_size")
        if size not in (None, config.get("vocab_size")):
            _refuse(f"This is DSpark with a pruned vocabulary: draft_vocab_size is {size}")

    def rename(self, name: str, config: PreTrainedConfig) -> str | None:
        return re.sub(r"^markov_head\.", "path_head.", name)

    def obstacles(self, config: PreTrainedConfig) -> list[str]:
        common = _common_obstacles(config)
        for name in (_FROM_ANCHOR, _EMBEDDING):
            common.pop(name)
        found = common | {
            "its anchor's slot drafts nothing": not config.drafts_from_anchor,
            "its embedding is the target's": not config.own_embedding,
            "its LM head is the target's": not config.own_head,
            f"draft_vocab_size is {config.draft_vocab_size}": config.draft_vocab_size is not None,
            "its path head is no Markov head": config.path_rank is not None
            and config.path_kind not in self.head_types.values(),
            "it has windows": "sliding_attention" in config.layer_types,
            "its layers are causal": bool(_causal_types(config)),
            f"target_hidden_size is {config.target_hidden_size}": config.target_hidden_size != config.hidden_size,
            f"output_multiplier is {config.output_multiplier}": config.output_multiplier != 1.0,
            "it caps its logits": config.final_logit_softcapping is not None,
        }
        return [reason for reason, holds in found.items() if holds]

    def write(
        self, config: PreTrainedConfig, tensors: dict[str, Tensor], target: TargetParts | None
    ) -> tuple[dict, dict[str, Tensor]]:
        extras = _write_extras(config, said=("num_target_layers",)).get("d2sd", {})
        if config.path_rank is not None and config.path_candidates != self.candidates:
            extras["path_candidates"] = config.path_candidates
        names = {kind: name for name, kind in self.head_types.items()}
        written = {
            **_write_layers(config),
            "architectures": [self.architecture],
            "block_size": config.block_slots,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": config.target_layer_ids,
            "num_target_layers": config.num_target_layers,
            "num_anchors": 512,  # of training alone; its reader wants it
            "markov_rank": config.path_rank or 0,
            "markov_head_type": names[config.path_kind] if config.path_rank else None,
            "enable_confidence_head": config.confidence_head is not None,
            "confidence_head_with_markov": config.confidence_head == "path" if config.confidence_head else None,
            "d2sd": extras or None,
        }
        written = {name: value for name, value in written.items() if value is not None}
        return written, {re.sub(r"^path_head\.", "markov_head.", name): x for name, x in tensors.items()}


# In the order in which they are tried: the architectures of the last are looked for by a part of their names.
FORMATS: tuple[Format, ...] = (
    OwnFormat(),
    SpeculatorsFormat(),
    MuseGlimmerFormat(),
    DFlash2Format(),
    DSparkFormat(),
    DFlashFormat(),
)
DEFAULT_FORMAT = DFlashFormat.name  # of `hf-d2sd export`: more engines read it


def format_of(config: dict) -> Format | None:
    """Which layout a `config.json` has; `None` for one that is no drafter's.

    Raises:
        ValueError: for drafters of a kind that is known, but cannot be decoded, by its name.
    """
    return next((format for format in FORMATS if format.detect(config)), None)


def written_formats() -> list[Format]:
    """Those that drafters are exported in, by name."""
    return sorted((format for format in FORMATS if format.writable), key=lambda format: format.name)


def format_named(name: str) -> Format:
    """The layout of this name.

    Raises:
        ValueError: if there is none.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    raise ValueError(f"There is no format {name!r}; drafters are exported in {_listed_formats()}.")


def _listed_formats() -> str:
    return ", ".join(format.name for format in written_formats())


# What several layouts share: Qwen3's keys, in both directions.


def _refuse(reason: str) -> None:
    raise ValueError(f"{reason}. docs/formats.md lists the drafters that can be read.")


def _drafters_named(config: dict) -> set[str]:
    """The architectures that are drafters of a known family."""
    return {name for name in config.get("architectures") or [] if re.search("DFlash|DSpark|DFlare|Domino", name)}


def _check_kind(config: Mapping, own: tuple[str, ...] = ()) -> None:
    for name, harmless, kind in _FOREIGN:
        value = config.get(name)
        if name not in own and value is not None and value not in harmless:
            _refuse(f"This is {kind}: {name} is {value!r}")


def _said(values: dict) -> dict:
    """Without what a checkpoint does not say; a vocabulary that is not named is none, whatever the default."""
    return {name: value for name, value in values.items() if value is not None or name == "vocab_size"}


def _required(value, name: str):
    if not value:
        raise ValueError(f"The drafter's config has no {name}: it cannot be known which features it reads.")
    return value


def _read_extras(values: dict) -> dict:
    extras = values.get("d2sd") or {}
    return {name: extras[name] for name in _EXTRAS if name in extras}


def _write_extras(config: PreTrainedConfig, said: tuple[str, ...] = ()) -> dict:
    """What the layout has no key for, and is not `said` already."""
    extras = {name: getattr(config, name) for name in _EXTRAS if name not in said}
    extras = {name: value for name, value in extras.items() if value is not None}
    return {"d2sd": extras} if extras else {}


def _read_layers(layers: dict) -> dict:
    """The layers' configuration, with the defaults of its own class, and the rotary parameters in one dictionary."""
    model_type = layers.pop("model_type")
    if "sliding_attention" in (layers.get("layer_types") or []):
        layers.setdefault("use_sliding_window", True)
    if model_type not in CONFIG_MAPPING:
        _refuse(f"The drafter's layers are of the unknown model_type {model_type!r}")
    read = CONFIG_MAPPING[model_type](**layers)
    num_layers = read.num_hidden_layers
    types = getattr(read, "layer_types", None) or ["full_attention"] * num_layers
    return _kept(read) | {"layer_types": list(types), "sliding_window": getattr(read, "sliding_window", None)}


def _write_layers(config: PreTrainedConfig) -> dict:
    """The layers as Qwen3's configuration has them; a window of W sees distances below W there."""
    window = config.sliding_window
    rope = dict(config.rope_parameters)
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {
        **{name: getattr(config, name) for name in (*_KEYS, "layer_types")},
        "model_type": "qwen3",
        "rope_theta": rope["rope_theta"],  # for readers that do not know rope_parameters
        "rope_scaling": scaling,
        "sliding_window": None if window is None else window + 1,
        "use_sliding_window": window is not None,
        "tie_word_embeddings": False,
    }


def _kept(read: PreTrainedConfig) -> dict:
    kept = {name: getattr(read, name) for name in (*_KEYS, "dtype") if getattr(read, name, None) is not None}
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


def _causal_types(config: PreTrainedConfig) -> set[str]:
    return set(config.layer_types) & set(config.causal_layer_types or ())


def _heads_left_out(config: PreTrainedConfig) -> dict[str, str]:
    found = {}
    if config.path_rank is not None:
        found["path_head."] = (
            f"the path head (path_kind {config.path_kind!r}), which no layout with these layers has: each token is "
            "drafted without regard to the one before"
        )
    if config.confidence_head is not None:
        found["confidence_head."] = "the confidence head: the confidence is the token's probability"
    return found


_CONVOLUTIONS = "it has convolutions (dflash2 can say it)"
_FROM_ANCHOR = "its anchor's slot drafts (dspark can say it)"
_EMBEDDING = "it has an embedding of its own (dspark can say it)"


def _common_obstacles(config: PreTrainedConfig) -> dict[str, bool]:
    """What Qwen3's keys cannot say, in words, and whether the drafter has it."""
    partly_causal = _causal_types(config) == {"full_attention"} and "sliding_attention" in config.layer_types
    return {
        "feature_fusion is 'layerwise'": config.feature_fusion != "shared",
        "qk_norm is False": not config.qk_norm,
        "vocab_size is None": config.vocab_size is None,
        "mask_token_id is None": config.mask_token_id is None,
        "its full layers are causal, its sliding ones are not": partly_causal,
        _CONVOLUTIONS: config.conv_kernel_size is not None,
        _FROM_ANCHOR: config.drafts_from_anchor,
        _EMBEDDING: config.own_embedding,
    }


__all__ = ["DEFAULT_FORMAT", "FORMATS", "Format", "TargetParts", "format_named", "format_of", "written_formats"]
