# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""Configurations of one drafter and of the pair that D²SD decodes with."""

from transformers import PreTrainedConfig

from .formats_d2sd import format_of
from .weights_d2sd import MAX_BLOCK_SIZE, MAX_LAYERS, MAX_PATH_SIZE, PATH_KINDS, check_references

FORMAT_VERSION = 1
_LAYER_TYPES = ("full_attention", "sliding_attention")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class _CheckedConfig(PreTrainedConfig):
    """Refuses to read a configuration that was written for another kind of model, or by a newer library."""

    reads_other_layouts = False

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        format = format_of(config_dict)
        if format is not None and not format.own:
            _require(
                cls.reads_other_layouts,
                f"{pretrained_model_name_or_path} is a single drafter in another library's layout: load it by "
                "D2SDAssistant.from_drafters(first), or a pair by D2SDAssistant.from_drafters(first, second).",
            )
            config_dict = format.read(config_dict) | {"model_type": cls.model_type}
        check_references(pretrained_model_name_or_path, config_dict)
        model_type = config_dict.get("model_type")
        _require(
            model_type == cls.model_type,
            f"{pretrained_model_name_or_path} is saved in the format {model_type!r} (architectures: "
            f"{config_dict.get('architectures')}), but {cls.__name__} reads {cls.model_type!r}. "
            "Load it with the class it was saved from.",
        )
        return config_dict, kwargs

    def _check_format_version(self) -> None:
        _require(
            self.d2sd_format_version == FORMAT_VERSION,
            f"This checkpoint has d2sd_format_version={self.d2sd_format_version!r}; this release reads version "
            f"{FORMAT_VERSION}. Update with `pip install -U hf-d2sd`, or save the drafter again.",
        )


class D2SDDrafterConfig(_CheckedConfig):
    r"""Configuration of one block-diffusion drafter, first or second.

    Names follow Transformers' own DFlash assistants and the public DFlash checkpoints (arXiv 2602.06036). Public
    DFlash, SpecForge's, speculators' and Transformers' own configurations are read too, see `formats_d2sd`.

    Args:
        vocab_size (`int`, *optional*): size of the target's vocabulary; `None` where a checkpoint does not say.
        hidden_size (`int`): width of the drafter; equals the width of the target's input embedding and LM head.
        target_hidden_size (`int`, *optional*): width of the target's hidden states; defaults to `hidden_size`.
        num_target_layers (`int`, *optional*): number of layers of the target the drafter was trained for.
        target_layer_ids (`list[int]`): layers of the target whose outputs are the drafter's features. Id `i` means
            the output of layer `i`, counted from 0.
        block_size (`int`): γ, at least 2: position 0 is the anchor, positions 1 to γ-1 are drafted.
        mask_token_id (`int`): token whose embedding stands at the positions that are to be drafted.
        draft_vocab_size (`int`, *optional*): number of target tokens the drafter can draft; `None` for all. The
            tokens are listed in the model's buffer `draft_token_ids`; logits come from those rows of the target's
            LM head (the pruning of FR-Spec, arXiv 2502.14856).
        qk_norm (`bool`): whether queries and keys are normalised per head.
        layer_types (`list[str]`, *optional*): `"full_attention"` or `"sliding_attention"` for each layer.
        sliding_window (`int`, *optional*): for sliding layers, the greatest distance at which a key is seen.
        causal_layer_types (`list[str]`, *optional*): types of the layers in which a block's tokens see only earlier
            ones of their block; in the others they see all of it.
        own_head (`bool`): whether the drafter has an LM head of its own, `lm_head`, in place of the target's.
        own_embedding (`bool`): whether it has an embedding of its own, `embed_tokens`, in place of the target's.
        drafts_from_anchor (`bool`): whether slot k predicts the token at slot k + 1, as in DSpark: the anchor's slot
            drafts the first token, and a block of γ has γ-1 slots. Else slot k predicts its own token.
        conv_kernel_size (`int`, *optional*): taps of the convolutions around each sublayer, as in DFlash 2; `None`
            for none. A slot then sees so many slots of its block before it, itself included.
        conv_group_size (`int`, *optional*): how many neighbouring channels share the part of a kernel that depends on
            the slot; a divisor of `hidden_size`.
        output_multiplier (`float`): what the head's logits are multiplied by.
        final_logit_softcapping (`float`, *optional*): c, if logits become `c * tanh(logits / c)`.
        input_embedding_scale (`float`, *optional*): where set, the scale that the target's embedding has to have.
        feature_fusion (`str`): `"shared"`, one projection of the features for all layers, or `"layerwise"`: each layer
            first weighs the target's layers in a way of its own (after DFlare, arXiv 2606.02091).
        path_rank (`int`, *optional*): rank of the path head, which corrects a slot's logits by the token before it;
            `None` for a drafter without one, whose positions know nothing of each other's tokens.
        path_kind (`str`): what the path head computes: `"projection"`, ours, of the target's embedding and head;
            `"selector"`, DFlash 2's, of a codebook each for the token before and the one at the slot; `"markov"` or
            `"gated_markov"`, DSpark's, of two tables.
        path_width (`int`, *optional*): inner width of a path head of the kind `"projection"`; defaults to twice its
            rank.
        path_candidates (`int`): how many of a slot's likeliest tokens the path head scores.
        path_text_weight (`float`, *optional*): where set, the text so far speaks of paths too, with a path head or
            without: what is added to a token's logit, at most, for having followed the token before it earlier in the
            text. See `hf_d2sd.followers.of_text`.
        confidence_head (`str`, *optional*): where set, the drafter says itself how likely a drafted token is to be
            accepted, from `"slot"`, its hidden state, or `"path"`, that and the path head's vector of the token
            before.
        confidence_temperatures (`list[float]`, *optional*): for each of the γ-1 drafted positions, what its logits
            are divided by before the confidence is taken; fitted by `hf-d2sd calibrate`.
        tokenizer_fingerprint (`str`, *optional*): see `hf_d2sd.tokenizer_fingerprint`; where set, a target's
            tokenizer that differs is refused.

    Raises:
        ValueError: for a block size under 2, layer ids out of range, a mask token outside the vocabulary, an unknown
            layer type, or a checkpoint of another format.
    """

    model_type = "d2sd_drafter"
    reads_other_layouts = True

    vocab_size: int | None = 32000
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 5
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: bool = True
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    block_size: int = 16
    mask_token_id: int | None = None
    target_layer_ids: list[int] | None = None
    target_hidden_size: int | None = None
    num_target_layers: int | None = None
    draft_vocab_size: int | None = None
    causal_layer_types: list[str] | None = None
    own_head: bool = False
    own_embedding: bool = False
    drafts_from_anchor: bool = False
    conv_kernel_size: int | None = None
    conv_group_size: int | None = None
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    input_embedding_scale: float | None = None
    feature_fusion: str = "shared"
    path_rank: int | None = None
    path_kind: str = "projection"
    path_width: int | None = None
    path_candidates: int = 16
    path_text_weight: float | None = None
    confidence_head: str | None = None
    confidence_temperatures: list[float] | None = None
    tokenizer_fingerprint: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    d2sd_format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        if self.path_rank is not None and self.path_width is None and self.path_kind == "projection":
            self.path_width = 2 * self.path_rank
        self._check_bounds()
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        if self.target_layer_ids is None:
            self.target_layer_ids = default_target_layer_ids(self.num_target_layers or 8, self.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._check_format_version()
        self._check_sizes()
        self._check_layers()
        self._check_convolutions()
        self._check_heads()

    @property
    def block_slots(self) -> int:
        """How many slots the network sees of a block of γ."""
        return self.block_size - self.drafts_from_anchor

    def _check_bounds(self) -> None:
        """Before anything is made that is as large as these numbers."""
        for name, most in (("num_hidden_layers", MAX_LAYERS), ("block_size", MAX_BLOCK_SIZE)):
            value = getattr(self, name)
            _require(value <= most, f"{name} is {value}; more than {most} is taken for a damaged config.")
        for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "head_dim", "num_key_value_heads"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("path_rank", "path_width", "path_candidates", "conv_kernel_size", "conv_group_size"):
            value = getattr(self, name)
            _require(
                value is None or 1 <= value <= MAX_PATH_SIZE,
                f"{name} is {value}; it must lie between 1 and {MAX_PATH_SIZE}.",
            )

    def _check_sizes(self) -> None:
        _require(
            self.block_size >= 2,
            f"block_size is {self.block_size}; it must be at least 2: the anchor and one drafted token.",
        )
        _require(
            self.mask_token_id is None or 0 <= self.mask_token_id < (self.vocab_size or self.mask_token_id + 1),
            f"mask_token_id is {self.mask_token_id}, outside the vocabulary of {self.vocab_size} tokens.",
        )
        _require(
            self.draft_vocab_size is None or 1 <= self.draft_vocab_size <= (self.vocab_size or 0),
            f"draft_vocab_size is {self.draft_vocab_size}; it must lie between 1 and vocab_size={self.vocab_size}.",
        )
        weight = self.path_text_weight
        _require(
            weight is None or 0 <= weight < float("inf"),
            f"path_text_weight is {weight}; it must be a number from 0 on, or None where the text is not read.",
        )
        temperatures = self.confidence_temperatures
        _require(
            temperatures is None or (len(temperatures) == self.block_size - 1 and min(temperatures) > 0),
            f"confidence_temperatures is {temperatures}; it must hold {self.block_size - 1} positive numbers, one for "
            "each drafted position.",
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} is no multiple of "
            f"num_key_value_heads={self.num_key_value_heads}.",
        )

    def _check_layers(self) -> None:
        _require(
            len(self.layer_types) == self.num_hidden_layers and set(self.layer_types) <= set(_LAYER_TYPES),
            f"layer_types is {self.layer_types}; it must name one of {_LAYER_TYPES} for each of the "
            f"{self.num_hidden_layers} layers.",
        )
        _require(
            self.feature_fusion in ("shared", "layerwise"),
            f"feature_fusion is {self.feature_fusion!r}; it must be 'shared' or 'layerwise'.",
        )
        _require(
            set(self.causal_layer_types or ()) <= set(_LAYER_TYPES),
            f"causal_layer_types is {self.causal_layer_types}; it may name only {_LAYER_TYPES}.",
        )
        _require(
            "sliding_attention" not in self.layer_types or self.sliding_window is not None,
            "layer_types has sliding layers, but sliding_window is not set.",
        )
        ids, layers = self.target_layer_ids, self.num_target_layers
        _require(
            len(ids) > 0 and all(0 <= i and (layers is None or i < layers) for i in ids),
            f"target_layer_ids is {ids}; it must hold ids from 0 to {'L-1' if layers is None else layers - 1} "
            f"of the target's {'L' if layers is None else layers} layers.",
        )

    def _check_convolutions(self) -> None:
        size, group = self.conv_kernel_size, self.conv_group_size
        _require(
            (size is None) == (group is None),
            f"conv_kernel_size is {size}, conv_group_size is {group}; both are set, or neither.",
        )
        _require(
            group is None or self.hidden_size % group == 0,
            f"conv_group_size is {group}, which does not divide hidden_size={self.hidden_size}.",
        )

    def _check_heads(self) -> None:
        tables = self.path_rank is not None and self.path_kind != "projection"
        for name, holds in (("own_head", self.own_head), ("own_embedding", self.own_embedding), ("path_kind", tables)):
            _require(
                not holds or self.vocab_size is not None,
                f"{name} is {getattr(self, name)}, and vocab_size is None: its table of tokens has no size.",
            )
        _require(
            self.path_kind in PATH_KINDS,
            f"path_kind is {self.path_kind!r}; it must be one of {', '.join(PATH_KINDS)}.",
        )
        _require(
            self.confidence_head in (None, "slot", "path"),
            f"confidence_head is {self.confidence_head!r}; it must be 'slot', 'path' or None.",
        )
        _require(
            self.confidence_head != "path" or tables,
            "confidence_head is 'path', and there is no path head with a table of its own.",
        )


class D2SDConfig(_CheckedConfig):
    r"""Configuration of a pair of drafters, and the defaults they decode with.

    Args:
        first (`D2SDDrafterConfig` or `dict`): the drafter of whole blocks from the anchor (DFlash).
        second (`D2SDDrafterConfig` or `dict`, *optional*): the drafter that re-drafts from kept prefixes. Without
            one, only `num_branches=0` can be decoded.
        num_branches (`int`): K, the number of prefixes that are re-drafted in each cycle.
        tree_budget (`int`, *optional*): greatest number of nodes, anchor included, that one target pass checks.
        tree_width (`int`): W, how many of a draft's likeliest tokens may stand at one place of the tree. 1 is D²SD as
            in its paper: branches in places alone. From 2 on the tree holds the `tree_budget` likeliest paths by both
            drafters' probabilities, and the second drafter re-drafts after the `num_branches` likeliest of the first.

    The target's special tokens and vocabulary size are those of `first`, so that pipelines see one tokenizer.
    """

    model_type = "d2sd"
    sub_configs = {"first": D2SDDrafterConfig, "second": D2SDDrafterConfig}

    first: dict | PreTrainedConfig | None = None
    second: dict | PreTrainedConfig | None = None
    num_branches: int = 4
    tree_budget: int | None = None
    tree_width: int = 1
    vocab_size: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    d2sd_format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self.first = self._drafter_config(self.first) or D2SDDrafterConfig()
        self.second = self._drafter_config(self.second)
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.first, name))
        super().__post_init__(**kwargs)
        self._check_format_version()
        self._check_options()
        self._check_pair()

    def to_dict(self) -> dict:
        """Without the places the drafters were loaded from: those are nobody else's."""
        output = super().to_dict()
        for role in ("first", "second"):
            if output[role] is not None:
                output[role].pop("_name_or_path", None)
        return output

    @staticmethod
    def _drafter_config(value: dict | PreTrainedConfig | None) -> D2SDDrafterConfig | None:
        if not isinstance(value, dict):
            return value
        _require(
            value.get("model_type", "d2sd_drafter") == "d2sd_drafter",
            f"A drafter in this pair is saved in the unknown format {value.get('model_type')!r}; "
            "'d2sd_drafter' was expected.",
        )
        return D2SDDrafterConfig(**{k: v for k, v in value.items() if k != "model_type"})

    def _check_options(self) -> None:
        _require(self.num_branches >= 0, f"num_branches is {self.num_branches}; it must be 0 or more.")
        _require(
            self.tree_budget is None or self.tree_budget >= 1,
            f"tree_budget is {self.tree_budget}; it must be at least 1 (the anchor), or None for no limit.",
        )
        _require(self.tree_width >= 1, f"tree_width is {self.tree_width}; it must be at least 1.")
        _require(
            self.tree_width == 1 or self.tree_budget is not None,
            f"tree_width is {self.tree_width}: such a tree has no end of its own. Set tree_budget, 32 for example.",
        )

    def _check_pair(self) -> None:
        first, second = self.first, self.second
        if not isinstance(first, PreTrainedConfig) or not isinstance(second, PreTrainedConfig):
            return
        for name in ("vocab_size", "hidden_size", "target_hidden_size"):
            a, b = getattr(first, name), getattr(second, name)
            _require(a == b, f"The two drafters were made for different targets: {name} is {a} and {b}.")
        _require(
            second.block_size >= first.block_size,
            f"The second drafter's block_size ({second.block_size}) must be at least the first's "
            f"({first.block_size}): a branch keeps a prefix of the first block and drafts on.",
        )


def default_target_layer_ids(num_target_layers: int, num_draft_layers: int) -> list[int]:
    """Feature layers as DFlash chooses them (arXiv 2602.06036): the middle one, or evenly spread from 1 to n - 3."""
    if num_draft_layers == 1 or num_target_layers < 5:
        return [num_target_layers // 2]
    span = num_target_layers - 4
    ids = [round(1 + span * k / (num_draft_layers - 1)) for k in range(num_draft_layers)]
    return sorted(set(ids))


D2SDDrafterConfig.register_for_auto_class()
D2SDConfig.register_for_auto_class()

__all__ = ["D2SDConfig", "D2SDDrafterConfig", "FORMAT_VERSION", "default_target_layer_ids"]
