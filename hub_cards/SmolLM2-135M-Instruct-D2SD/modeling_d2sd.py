# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""The drafter network, one for both roles, and the pair of drafters that is passed as `assistant_model`.

This file is also the Hub's remote code for drafter repositories: it needs torch and transformers alone.
"""

import json
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .compat_d2sd import (
    BaseModelOutputWithPast,
    Cache,
    DFlashCache,
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    attention_function,
    block_mask,
    drafted,
    load_state_dict,
    rotate_half,
)
from .configuration_d2sd import D2SDConfig, D2SDDrafterConfig
from .formats_d2sd import Format, format_of
from .weights_d2sd import HUB_OPTIONS, check_references, check_weights, drafter_shapes, find_weights


class D2SDAttention(nn.Module):
    """Block queries over the context's keys and the block's own, in both directions."""

    def __init__(self, config: D2SDDrafterConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.layer_types[layer_idx] in (config.causal_layer_types or ())
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        norm = Qwen3RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,  # (B, Q, H): the block
        context: Tensor,  # (B, C, H): features of newly committed tokens
        position_embeddings: tuple[Tensor, Tensor],  # (B, C + Q, head_dim)
        attention_mask: Tensor | None,
        cache: Cache | None,
        **kwargs,
    ) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        sources = torch.cat([context, hidden_states], dim=1)
        source_shape = (*sources.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(sources).view(source_shape)).transpose(1, 2)
        value = self.v_proj(sources).view(source_shape).transpose(1, 2)

        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        block = slice(cos.shape[-2] - query.shape[-2], None)  # queries are the block's positions, the last ones
        query = query * cos[..., block, :] + rotate_half(query) * sin[..., block, :]
        key = key * cos + rotate_half(key) * sin
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        output, _ = attention_function(self.config)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))


class D2SDConvolution(nn.Module):
    """A short convolution over a block's slots before a sublayer, and one after it; both see earlier slots alone.

    A kernel is the sum of one that is learned for every channel and one that the slot's own state makes for each group
    of neighbouring channels: DFlash 2's grouped dynamic convolution.
    """

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__()
        self.taps, self.groups = config.conv_kernel_size, config.hidden_size // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self.taps, config.hidden_size))
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * self.taps * self.groups, bias=False)

    def forward(self, hidden: Tensor, sublayer: Callable[[Tensor], Tensor], block_slots: int | None) -> Tensor:
        """(B, Q, H), the sublayer's output for states (B, Q, H), of which each `block_slots` are a block."""
        slots = hidden.shape[1] if block_slots is None else block_slots
        kernels = self.kernel_projection(hidden).unflatten(-1, (2, self.taps, self.groups))
        before, after = kernels.unbind(2)  # (B, Q, taps, groups)
        output = sublayer(self._mixed(hidden, before, self.base_kernel[0], slots))
        return self._mixed(output, after, self.base_kernel[1], slots)

    def _mixed(self, hidden: Tensor, dynamic: Tensor, base: Tensor, slots: int) -> Tensor:
        """Σ_o kernel_o ⊙ state of the slot o places before, in the same block; `base` (taps, H)."""
        blocks = hidden.reshape(-1, slots, self.groups, hidden.shape[-1] // self.groups)  # (N, slots, groups, size)
        dynamic = dynamic.reshape(-1, slots, self.taps, self.groups, 1)
        base = base.to(hidden.dtype).view(self.taps, *blocks.shape[2:])
        mixed = blocks * (dynamic[:, :, 0] + base[0])
        for tap in range(1, min(self.taps, slots)):
            earlier = nn.functional.pad(blocks[:, :-tap], (0, 0, 0, 0, tap, 0))
            mixed = mixed + earlier * (dynamic[:, :, tap] + base[tap])
        return mixed.view_as(hidden)


class D2SDDecoderLayer(nn.Module):
    def __init__(self, config: D2SDDrafterConfig, layer_idx: int):
        super().__init__()
        has_convolutions = config.conv_kernel_size is not None
        self.attention_conv = D2SDConvolution(config) if has_convolutions else None
        self.mlp_conv = D2SDConvolution(config) if has_convolutions else None
        self.self_attn = D2SDAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, context: Tensor, block_slots: int | None = None, **kwargs) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        if self.attention_conv is None:
            hidden_states = hidden_states + self.self_attn(normed, context, **kwargs)
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        attended = self.attention_conv(normed, lambda states: self.self_attn(states, context, **kwargs), block_slots)
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp_conv(normed, self.mlp, block_slots)


class PathHead(nn.Module):
    """What all kinds of path heads have in common: scores are products of a state and the candidates' keys.

    `dropout` is for training, of the kinds that have any.
    """

    dropout = 0.0

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__()

    def reset(self) -> None:
        """Make it a new one, whose scores are all 0."""
        raise NotImplementedError

    def tables(self, embed: Callable, rows: Callable) -> tuple[Callable, Callable]:
        """What gives the vectors of tokens before a slot, and of candidates at places of the draft vocabulary.

        Args:
            embed: what embeds tokens; rows: what gives rows of the LM head. They are used where it has no tables.
        """
        return embed, rows

    def states(self, hidden: Tensor, previous: Tensor) -> Tensor:
        """(..., A, rank): of slots (..., H) after each of A tokens, whose vectors are `previous` (..., A, P)."""
        raise NotImplementedError

    def keys(self, candidates: Tensor) -> Tensor:
        """(..., C, rank), of C candidates' vectors."""
        return candidates

    def forward(self, hidden: Tensor, previous: Tensor, candidates: Tensor) -> Tensor:
        """(..., A, C) in float32: the scores of C candidates after each of A tokens.

        Args:
            hidden: (..., H), last hidden states of slots.
            previous: (..., A, P), vectors of tokens that may stand before the slot, see `tables`.
            candidates: (..., C, R), vectors of tokens that may stand at it.
        """
        states, keys = self.states(hidden, previous), self.keys(candidates)
        return states.float() @ keys.float().transpose(-1, -2)


class D2SDPathHead(PathHead):
    """s(a, b | h): how much likelier candidate b is at a slot h because token a stands before it.

    A block drafter says of each slot what may stand there, whatever stands in the others. This makes it conditional:
    the score is added to b's logit. Its tables of tokens are projections of the target's embedding and LM head, which
    are frozen; so it is small, and says something of tokens that it was not trained on.

    `dropout` is for training: slots' hidden states name their rows, and are soon known by heart.
    """

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__(config)
        hidden, width, rank = config.hidden_size, config.path_width, config.path_rank
        self.slot = nn.Linear(hidden, width, bias=False)
        self.previous = nn.Linear(hidden, width, bias=False)
        self.state = nn.Linear(width, rank, bias=False)
        self.candidate = nn.Linear(hidden, rank, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        for part in (self.slot, self.previous, self.state):
            part.weight.normal_(std=part.in_features**-0.5)
        self.candidate.weight.zero_()

    def states(self, hidden: Tensor, previous: Tensor) -> Tensor:
        drop = partial(nn.functional.dropout, p=self.dropout, training=self.training)
        mixed = self.slot(drop(_normed(hidden)))[..., None, :] + self.previous(_normed(previous))
        return self.state(drop(nn.functional.silu(mixed)))

    def keys(self, candidates: Tensor) -> Tensor:
        return self.candidate(_normed(candidates))


class D2SDSelectorHead(PathHead):
    """DFlash 2's candidate selector: ⟨predecessor[a] ⊙ projected h, successor[b]⟩, of two codebooks of its own."""

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__(config)
        vocab, rank = config.vocab_size, config.path_rank
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.draft_vocab_size or vocab, rank))
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        self.hidden_projection.weight.normal_(std=self.hidden_projection.in_features**-0.5)
        self.predecessor_codebook.normal_()
        self.successor_codebook.zero_()

    def tables(self, embed: Callable, rows: Callable) -> tuple[Callable, Callable]:
        return (lambda a: _look_up(self.predecessor_codebook, a)), (lambda b: _look_up(self.successor_codebook, b))

    def states(self, hidden: Tensor, previous: Tensor) -> Tensor:
        return previous * self.hidden_projection(hidden)[..., None, :]


class D2SDMarkovHead(PathHead):
    """DSpark's Markov head: ⟨w1[a], w2[b]⟩, whatever the slot."""

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__(config)
        self.markov_w1 = nn.Embedding(config.vocab_size, config.path_rank)
        self.markov_w2 = nn.Linear(config.path_rank, config.draft_vocab_size or config.vocab_size, bias=False)

    @torch.no_grad()
    def reset(self) -> None:
        self.markov_w1.weight.normal_()
        self.markov_w2.weight.zero_()

    def tables(self, embed: Callable, rows: Callable) -> tuple[Callable, Callable]:
        return (lambda a: _look_up(self.markov_w1.weight, a)), (lambda b: _look_up(self.markov_w2.weight, b))

    def states(self, hidden: Tensor, previous: Tensor) -> Tensor:
        return previous


class D2SDGatedMarkovHead(D2SDMarkovHead):
    """The same with w1[a] gated, channel by channel, by the slot and w1[a] itself."""

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size + config.path_rank, config.path_rank)

    def states(self, hidden: Tensor, previous: Tensor) -> Tensor:
        slots = hidden[..., None, :].expand(*previous.shape[:-1], -1)
        return self.gate_proj(torch.cat([slots, previous], dim=-1)).sigmoid() * previous


def _look_up(table: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.embedding(tokens.to(table.device), table)


# By `path_kind`.
PATH_HEADS: dict[str, type[PathHead]] = {
    "projection": D2SDPathHead,
    "selector": D2SDSelectorHead,
    "markov": D2SDMarkovHead,
    "gated_markov": D2SDGatedMarkovHead,
}


class D2SDConfidenceHead(nn.Module):
    """How likely a slot's token is to be accepted, if those before it are: DSpark's confidence head."""

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__()
        self.with_previous = config.confidence_head == "path"
        self.proj = nn.Linear(config.hidden_size + (config.path_rank if self.with_previous else 0), 1)

    def forward(self, hidden: Tensor, previous: Tensor | None) -> Tensor:
        """(...,) in float32.

        Args:
            hidden: (..., H), of slots.
            previous: (..., P), vectors of the tokens before them, see `PathHead.tables`; not read by some.
        """
        inputs = [hidden] if not self.with_previous or previous is None else [hidden, previous.to(hidden.dtype)]
        return self.proj(torch.cat(inputs, dim=-1))[..., 0].float().sigmoid()


def _normed(vectors: Tensor) -> Tensor:
    return nn.functional.rms_norm(vectors, vectors.shape[-1:], eps=1e-6)


class D2SDPreTrainedModel(PreTrainedModel):
    config_class = D2SDDrafterConfig
    base_model_prefix = ""
    main_input_name = "noise_embeds"
    _no_split_modules = ["D2SDDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`, but reads safetensors alone and wants exactly the model's tensors.

        Drafters in the layouts of other libraries are read too, see `formats_d2sd`; nothing in them is run.

        Raises:
            ValueError: listing the tensors that are missing, unexpected, of another shape or not finite; for files
                that are damaged or lead elsewhere, before anything is allocated; for drafters of another kind.
            OSError: if there are no safetensors weights.
        """
        if not kwargs.setdefault("use_safetensors", True):
            raise ValueError("Drafters are read from safetensors alone; drop use_safetensors=False.")
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, output_loading_info=output_loading_info, **kwargs)
        path, hub = pretrained_model_name_or_path, {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        said = PreTrainedConfig.get_config_dict(path, **hub)[0]
        check_references(path, said)  # also where an Auto class has read the configuration
        format = format_of(said) or Format()
        config = kwargs["config"] = cls._take_config(path, hub, kwargs)
        files = find_weights(path, kwargs.get("variant"), **hub)
        check_weights(path, files, cls.tensor_shapes(config), partial(format.rename, config=config))
        if not format.own:
            tensors = {name: tensor for file in files for name, tensor in load_state_dict(file).items()}
            kwargs["state_dict"] = format.translate(tensors, config)
            path = None
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model.check_values(pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    @classmethod
    def _take_config(cls, path, hub: dict, kwargs: dict) -> PreTrainedConfig:
        """The configuration, changed by those of the arguments that are its attributes, which are taken out."""
        given = kwargs.pop("config", None)
        if isinstance(given, PreTrainedConfig):
            return given
        known = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.config_class.__annotations__}
        return cls.config_class.from_pretrained(given or path, **hub, **known)

    @classmethod
    def tensor_shapes(cls, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that a model of this configuration has."""
        raise NotImplementedError

    def check_values(self, path) -> None:
        """Refuse weights that are not finite, and a draft vocabulary that the target's does not hold."""
        weights = [(name, tensor) for name, tensor in self.named_parameters() if tensor.device.type != "meta"]
        bad = [name for name, tensor in weights if not torch.isfinite(tensor).all()]
        if bad:
            raise ValueError(f"The weights of {path} are not finite: {', '.join(bad)}.")
        for name, ids in self.named_buffers():
            if name.endswith("draft_token_ids") and ids.device.type != "meta":
                size = self.config.vocab_size
                if ids.min() < 0 or ids.max() >= size or len(ids.unique()) < len(ids):
                    raise ValueError(f"{name} of {path} must hold different ids of the {size} tokens; it is damaged.")


class D2SDDrafterModel(D2SDPreTrainedModel):
    """One block-diffusion drafter. Mostly it has no embedding and no head: both are the target's.

    Tensor names follow the public DFlash checkpoints. In the first role one token of the block is visible, the
    anchor; in the second, the anchor and a kept prefix. Both run natively in Transformers as a DFlash assistant:
    `target.generate(..., assistant_model=drafter, speculation_type="dflash")`.
    """

    def __init__(self, config: D2SDDrafterConfig):
        super().__init__(config)
        self.fc = nn.Linear(len(config.target_layer_ids) * config.target_hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList(D2SDDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        if config.feature_fusion == "layerwise":  # (layers, target layers): what each layer's context is made of
            self.layer_weights = nn.Parameter(torch.ones(config.num_hidden_layers, len(config.target_layer_ids)))
        if config.draft_vocab_size is not None:
            self.register_buffer("draft_token_ids", torch.arange(config.draft_vocab_size))
        self.path_head = PATH_HEADS[config.path_kind](config) if config.path_rank is not None else None
        self.confidence_head = D2SDConfidenceHead(config) if config.confidence_head is not None else None
        if config.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.own_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size or config.vocab_size, bias=False)
        self.post_init()
        if self.path_head is not None:
            self.path_head.reset()

    @classmethod
    def tensor_shapes(cls, config: D2SDDrafterConfig) -> dict[str, tuple[int, ...]]:
        return drafter_shapes(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, D2SDDrafterModel) and module.config.draft_vocab_size is not None:
            ids = torch.arange(module.config.draft_vocab_size, device=module.draft_token_ids.device)
            module.draft_token_ids.copy_(ids)
        if isinstance(module, D2SDDrafterModel) and module.config.feature_fusion == "layerwise":
            nn.init.ones_(module.layer_weights)
        if isinstance(module, D2SDConvolution):  # it passes its input through
            nn.init.zeros_(module.base_kernel)
            nn.init.ones_(module.base_kernel[:, 0])
            nn.init.zeros_(module.kernel_projection.weight)

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Denoise blocks of token embeddings, given features of the committed tokens.

        Args:
            noise_embeds: (B, Q, hidden_size), embeddings of the visible tokens and of the mask token.
            context_hidden_states: (B, C, len(target_layer_ids) * target_hidden_size), features of the tokens that
                were committed since the cache was last filled.
            attention_mask: a ready mask (B, 1, Q, keys), one per layer type as a dict, a padding mask (B, keys), or
                `None`: every query then sees every key.
            position_ids: (B, C + Q), positions of the context and of the block; by default they follow the cache.
            cache: keys and values of the earlier context. The new context's and the block's are appended; whoever
                calls drops the block's.
            past_key_values: the name of `cache` before Transformers 5.24.
            kwargs: for the layers: `block_slots`, how many of the Q slots are a block, where several stand side by
                side (all by default; convolutions ask), and what the attention takes.

        Returns:
            `last_hidden_state` (B, Q, hidden_size), to be read by the target's LM head: slot k predicts the token at
            slot k, or the one after it if `config.drafts_from_anchor`.
        """
        cache = cache if cache is not None else past_key_values
        if use_cache and cache is None:
            cache = DFlashCache(config=self.config)
        contexts = self._contexts(context_hidden_states)
        context_length = context_hidden_states.shape[1]
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            length = context_length + noise_embeds.shape[1]
            position_ids = torch.arange(past, past + length, device=noise_embeds.device)[None]
        masks = self._masks_by_layer_type(noise_embeds, context_length, attention_mask, cache)

        hidden_states, position_embeddings = noise_embeds, self.rotary_emb(noise_embeds, position_ids)
        for layer, layer_type, context in zip(self.layers, self.config.layer_types, contexts):
            shared = dict(position_embeddings=position_embeddings, attention_mask=masks[layer_type], cache=cache)
            hidden_states = layer(hidden_states, context, **shared, **kwargs)
        return drafted(self.norm(hidden_states), cache if use_cache else None)

    def _contexts(self, features: Tensor) -> list[Tensor]:
        """(B, C, H) for each layer."""
        if self.config.feature_fusion == "shared":
            return [self.hidden_norm(self.fc(features))] * len(self.layers)
        parts = features.unflatten(-1, (self.layer_weights.shape[1], -1))  # (B, C, target layers, width)
        weighed = (parts * weights[:, None] for weights in self.layer_weights.to(features.dtype))
        return [self.hidden_norm(self.fc(part.flatten(-2))) for part in weighed]

    def _masks_by_layer_type(
        self, noise_embeds: Tensor, context_length: int, attention_mask, cache: Cache | None
    ) -> dict[str, Tensor | None]:
        if isinstance(attention_mask, dict):
            return attention_mask
        if attention_mask is not None and attention_mask.ndim == 4:
            return dict.fromkeys(set(self.config.layer_types), attention_mask)
        if cache is None:
            # The keys are longer than the queries by the context: a DFlashCache tells the mask functions so.
            cache = DFlashCache(config=self.config)
            cache.set_previous_accepted_tokens(context_length)
        causal = self.config.causal_layer_types or ()
        rules = {layer_type: _no_later_key if layer_type in causal else None for layer_type in self.config.layer_types}
        return {
            layer_type: block_mask(self.config, layer_type, noise_embeds, attention_mask, cache, rule)
            for layer_type, rule in rules.items()
        }


def _no_later_key(batch, head, query, key):
    return key <= query


class _LatestStats:
    """The latest call's counts, by thread. They are of this object: a copy begins without any."""

    def __init__(self):
        self._of_thread, self._of_all = threading.local(), None

    def put(self, stats) -> None:
        self._of_thread.stats = self._of_all = stats

    @property
    def stats(self):
        return getattr(self._of_thread, "stats", self._of_all)

    def __deepcopy__(self, memo):
        return _LatestStats()

    def __reduce__(self):
        return _LatestStats, ()


class D2SDAssistant(D2SDPreTrainedModel):
    """Both drafters in one checkpoint: what `target.generate(..., assistant_model=assistant)` takes.

    `last_stats` holds the counts of the latest call in this thread, see `hf_d2sd.stats.D2SDStats`; in a thread that
    made none, those of the latest call of all. Threads may share an assistant, and a target.
    """

    config_class = D2SDConfig
    main_input_name = "input_ids"
    is_d2sd_assistant = True  # by which the dispatch that `import hf_d2sd` installs in `generate` knows it

    def __init__(self, config: D2SDConfig):
        super().__init__(config)
        first, second = cast("tuple[D2SDDrafterConfig, D2SDDrafterConfig | None]", (config.first, config.second))
        self.first = D2SDDrafterModel(first)
        self.second = D2SDDrafterModel(second) if second is not None else None
        self._latest = _LatestStats()
        self.compile_options: dict | None = None
        self._costs = None  # what cycles cost, as calls have measured it: an `hf_d2sd.costs.Costs`, or as loaded
        self.post_init()

    @classmethod
    def from_drafters(
        cls,
        first: str | os.PathLike | D2SDDrafterModel,
        second: str | os.PathLike | D2SDDrafterModel | None = None,
        *,
        num_branches: int | None = None,
        tree_budget: int | None = None,
        tree_width: int = 1,
        **kwargs,
    ) -> "D2SDAssistant":
        """Join two drafters, given as models, Hub ids or folders; `kwargs` go to `D2SDDrafterModel.from_pretrained`.

        Without a second drafter the assistant decodes with `num_branches=0`: DFlash alone.

        Raises:
            ValueError: if the drafters were made for different targets, or the second's block is the shorter one.
        """
        first, second = (
            D2SDDrafterModel.from_pretrained(drafter, **kwargs) if isinstance(drafter, (str, os.PathLike)) else drafter
            for drafter in (first, second)
        )
        for drafter in (first, second):
            if not isinstance(drafter, (D2SDDrafterModel, type(None))):
                raise TypeError(f"Expected a D2SDDrafterModel, a path or a Hub id; got {type(drafter).__name__}.")
        if num_branches is None:
            num_branches = 4 if second is not None else 0
        config = D2SDConfig(
            first=first.config,
            second=second.config if second is not None else None,
            num_branches=num_branches,
            tree_budget=tree_budget,
            tree_width=tree_width,
            dtype=first.dtype,
        )
        with torch.device("meta"):
            assistant = cls(config)
        assistant.first, assistant.second = first, second
        return assistant.eval()

    @classmethod
    def from_context(cls, *, tree_budget: int = 16) -> "D2SDAssistant":
        """Without drafters, for any target: what the text so far had after its last tokens is all that is proposed.

        Args:
            tree_budget: the most nodes that one pass of the target checks, the anchor included.

        Raises:
            ValueError: for a budget below 1.
        """
        with torch.device("meta"):
            assistant = cls(D2SDConfig(num_branches=0, tree_budget=tree_budget))
        assistant.first = assistant.second = None
        return assistant.eval()

    @classmethod
    def tensor_shapes(cls, config: D2SDConfig) -> dict[str, tuple[int, ...]]:
        shapes = drafter_shapes(config.first, "first.")
        return shapes if config.second is None else shapes | drafter_shapes(config.second, "second.")

    @property
    def drafters(self) -> list[D2SDDrafterModel]:
        return [drafter for drafter in (self.first, self.second) if drafter is not None]

    @property
    def last_stats(self):
        return self._latest.stats

    @last_stats.setter
    def last_stats(self, stats) -> None:
        self._latest.put(stats)

    @property
    def attention_backend(self) -> str | None:
        """Which attention verified the latest call's trees, and why; `None` before the first call."""
        return self.last_stats.attention_backend if self.last_stats is not None else None

    def compile(self, **options) -> None:
        """Let later calls decode in cycles of fixed shapes, recorded once and replayed; on a GPU as one CUDA graph.

        Args:
            options: for `torch.compile`, which fuses a cycle before it is recorded. `backend=None`: nothing is fused,
                so that recording takes seconds. `whole=False`: nothing is recorded, and the passes of a cycle are
                compiled one by one, as for calls whose cycles cannot be recorded.
        """
        self.compile_options = options

    @property
    def costs(self):
        """What cycles cost here, in plain steps, as calls have measured it; `None` before the first call."""
        return self._costs

    def save_costs(self, path: str | os.PathLike) -> None:
        """Write them to a JSON file, for `load_costs`.

        Raises:
            ValueError: before the first call.
        """
        if self._costs is None:
            raise ValueError("No costs are known yet: let a target generate with this assistant first.")
        saved = self._costs if isinstance(self._costs, dict) else self._costs.as_dict()
        with open(path, "w", encoding="utf-8") as file:
            json.dump(saved, file, indent=1)

    def load_costs(self, path: str | os.PathLike) -> None:
        """Begin with the costs of a file that `save_costs` wrote, measured on the same machine."""
        with open(path, encoding="utf-8") as file:
            self._costs = json.load(file)

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, push_to_hub: bool = False, **kwargs
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, and `custom_generate/`, by which a target decodes with this pair."""
        if self.first is None:
            raise ValueError(
                "An assistant without drafters has nothing to save: D2SDAssistant.from_context() makes one anywhere."
            )
        of_upload = "commit_message commit_description private create_pr revision tags".split()
        upload = {name: kwargs.pop(name) for name in of_upload if name in kwargs}
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            folder = os.path.join(save_directory, "custom_generate")
            os.makedirs(folder, exist_ok=True)
            for name, text in CUSTOM_GENERATE.items():
                with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                    file.write(text)
            if push_to_hub:
                self.push_to_hub(repo_id, token=kwargs.get("token"), **upload)

    @classmethod
    def can_generate(cls) -> bool:
        return False

    @property
    def generation_config(self):
        """`None`: an assistant does not generate. Asked for first by stock assisted decoding, hence the error."""
        if "hf_d2sd" in sys.modules:
            return None
        raise ImportError(_ENGINE_MISSING)

    @generation_config.setter
    def generation_config(self, value) -> None:
        if value is not None:
            raise ValueError("An assistant has no generation config: pass options to `target.generate(...)`.")

    def generate(self, *args, **kwargs):
        raise TypeError(
            "A D2SDAssistant drafts for a target and writes no text of its own: call "
            "`target.generate(..., assistant_model=assistant)`."
        )

    def forward(self, *args, **kwargs):
        return self.generate(*args, **kwargs)


CUSTOM_GENERATE = {
    "generate.py": """# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
\"\"\"`target.generate(..., custom_generate=THIS_REPOSITORY, trust_remote_code=True)` decodes with this pair.\"\"\"

from hf_d2sd.hub.generate import generate

__all__ = ["generate"]
""",
    "requirements.txt": "hf-d2sd\n",
}

_ENGINE_MISSING = (
    "Decoding with a D2SDAssistant needs the package hf-d2sd: `pip install hf-d2sd`, then `import hf_d2sd` before "
    "`target.generate(..., assistant_model=assistant)`."
)

try:  # as remote code: the installed package, if there is one, teaches `generate` to decode with this assistant
    import hf_d2sd  # noqa: F401
except ImportError:
    pass

D2SDDrafterModel.register_for_auto_class("AutoModel")
D2SDAssistant.register_for_auto_class("AutoModel")

__all__ = ["D2SDAssistant", "D2SDDrafterModel", "D2SDPreTrainedModel"]
