"""Every name, flag and private attribute of Transformers that the library stands on: a new release is met here alone.

What the networks need of it is in `modeling.compat_d2sd`, which Hub repositories hold too.
"""

import contextlib
import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, CompileConfig, GenerationConfig
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    logits_process,
)
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerationMixin
from transformers.utils import output_capturing

from .modeling import CACHE_NAME
from .products import linear, settled

# The dispatch --------------------------------------------------------------------------------------------------------

PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)


def wrap_mode(wrapper: Callable) -> None:
    """Let `wrapper(stock, config, assistant_model)` say in which mode `generate` decodes."""
    _wrap(GenerationConfig, "get_generation_mode", wrapper)


def wrap_validation(wrapper: Callable) -> None:
    """Let `wrapper(stock, target, mode, config, mode_kwargs)` check what a call asks for."""
    _wrap(GenerationMixin, "_validate_generation_mode", wrapper)


def wrap_assisted_decoding(wrapper: Callable) -> None:
    """Let `wrapper(stock, target, input_ids, ...)` decode with an assistant."""
    _wrap(GenerationMixin, "_assisted_decoding", wrapper)


def mode_to_validate(target, mode: GenerationMode) -> GenerationMode:
    """As which mode stock checks a call of ours: in assisted decoding it refuses every target with a state."""
    return GenerationMode.GREEDY_SEARCH if is_stateful(target) else mode


def _wrap(owner: type, name: str, wrapper: Callable) -> None:
    """Replace a method by `wrapper(stock, ...)`, once, keeping the stock signature."""
    stock = getattr(owner, name)
    if getattr(stock, "_hf_d2sd_wrapped", False):
        return

    @functools.wraps(stock)
    def wrapped(self, *args, **kwargs):
        return wrapper(stock, self, *args, **kwargs)

    vars(wrapped)["_hf_d2sd_wrapped"] = True
    setattr(owner, name, wrapped)


def wrap_forward(owner: type[nn.Module], wrapper: Callable) -> None:
    """Let modules of a class run `wrapper(stock, module, ...)`, once."""
    _wrap(owner, "forward", wrapper)


# What a call brings --------------------------------------------------------------------------------------------------


def is_stateful(target) -> bool:
    """Whether a model has a state beside keys and values."""
    return target._is_stateful


def target_state_obstacle(target) -> str | None:
    """As `state_obstacle`, also of a model whose config names no layer with a state."""
    has_layers = not STATE_TYPES.isdisjoint(layer_types_of(target.config)[0])
    if is_stateful(target) and not has_layers:
        return "it does not keep its states in the cache"
    if any("forward" in vars(block) for block in state_holders(target)):
        return (
            "its modules, which keep their states themselves, have another forward than their class, accelerate's say"
        )
    return state_obstacle(target.config)


# Models with a recurrent state whose caches are the cache layers of Transformers, by the types of their configs.
_SERVED_STATES = {
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "zamba2",
}


def state_obstacle(config) -> str | None:
    """Why a model's recurrent states cannot follow a tree's accepted path; `None` if they can, or there are none."""
    text = config.get_text_config(decoder=True)
    types = set(layer_types_of(config)[0])
    if not types & STATE_TYPES:
        return None
    if not types & ATTENDING_TYPES and CACHE_NAME != "cache":
        return "that without attention is served with transformers>=5.24"
    if own_cache_class(config) is not None and text.sliding_window is not None:
        return "its layer types do not name the window that it attends by"
    if text.model_type in _SERVED_STATES:
        return None
    return f"states of {text.model_type!r} are not among those that are known to"


def state_holders(model) -> dict[nn.Module, int]:
    """Modules that keep their states themselves, in no cache: RecurrentGemma's. With their layers' indices."""
    blocks = {layer: at for at, layer in enumerate(getattr(decoder_of(model), "layers", ()))}
    held = {getattr(layer, "temporal_block", None): at for layer, at in blocks.items()}
    return {block: at for block, at in held.items() if hasattr(block, "conv1d_state")}


def run_with_states(stock: Callable, block: nn.Module, states: tuple, args: tuple, kwargs: dict) -> tuple:
    """What such a module gives from these states, and the states then; the module itself stays as it is.

    A shallow copy runs in its place, which shares all its weights.
    """
    twin, scan = copy.copy(block), copy.copy(block.rg_lru)
    twin._modules = {**block._modules, "rg_lru": scan}
    twin.conv1d_state, scan.recurrent_states = states
    output, _ = stock(twin, *args, **kwargs)
    return output, (twin.conv1d_state, scan.recurrent_states)


_FORGETFUL_MIXERS = {
    "FalconMambaMixer",
    "JambaMambaMixer",
    "MambaMixer",
}  # a pass over several tokens starts from no state


def goes_stepwise(mixer: nn.Module, in_prompt: bool) -> bool:
    """Whether a mixer's pass over several tokens that follow others is not what it would be one by one.

    Args:
        in_prompt: of tokens of a prompt, of which plain decoding makes one pass: some mixers limit their time steps in
            such passes alone.
    """
    unlimited = (None, (0.0, float("inf")))
    limits = getattr(mixer, "time_step_limit", None) not in unlimited
    return type(mixer).__name__ in _FORGETFUL_MIXERS or (limits and not in_prompt)


def is_users_cache(cache: Cache) -> bool:
    """Whether the user passed this cache, and `generate` did not make it."""
    return getattr(cache, "_is_user_defined", False)


def owner_of_inputs(target) -> object:
    """Whose method prepares the inputs of a model's forward: the model, or what was put in front of it."""
    return getattr(target.prepare_inputs_for_generation, "__self__", target)


def adapters_by_token(target) -> list[str]:
    """What PEFT's `generate` tells each adapter and no tree can follow: which row, or which token it is for.

    Returns:
        `adapter_names`, of several rows, and `alora_offsets`, as far as they are there.
    """
    told = [hook.keywords for module, key in _telling_hooks(target) for hook in [module._forward_pre_hooks[key]]]
    names = ["adapter_names"] if any(len(of.get("adapter_names") or ()) > 1 for of in told) else []
    return names + (["alora_offsets"] if any(of.get("alora_offsets") is not None for of in told) else [])


def forget_told_adapters(target) -> None:
    """Take off what tells adapters that: PEFT leaves it in place when a call ends in an error, for all later calls."""
    for module, key in _telling_hooks(target):
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def _telling_hooks(target) -> list[tuple[nn.Module, int]]:
    """Modules, and the keys of their hooks of that kind."""
    if not hasattr(target, "peft_config"):
        return []
    hooks = [(module, key, hook) for module in target.modules() for key, hook in module._forward_pre_hooks.items()]
    told = {"adapter_names", "alora_offsets"}
    return [(module, key) for module, key, hook in hooks if told & set(getattr(hook, "keywords", ()))]


def is_static(cache_implementation: str | None) -> bool:
    """Whether this name asks for a cache of fixed size on the device: a wish for speed, not for memory."""
    static = cache_implementation in ALL_STATIC_CACHE_IMPLEMENTATIONS
    return static and "offloaded" not in (cache_implementation or "")


def pad_token(generation_config: GenerationConfig) -> Tensor | None:
    return generation_config._pad_token_tensor


def full_length(generation_config: GenerationConfig, attention_mask: Tensor | None) -> int:
    """Columns of the prompt with what is cached of it; -1 where it is not known. A mask of ones is not handed on."""
    return attention_mask.shape[1] if attention_mask is not None else getattr(generation_config, "_mask_length", -1)


# The forward ---------------------------------------------------------------------------------------------------------

# From 5.23 on a list of entries counts as the full tuple does, embeddings first; before, it counts layers alone.
_EMBEDDINGS_COUNT = hasattr(output_capturing, "selected_hidden_states")


def captured_layers(layer_ids: Iterable[int]) -> list[int]:
    """What `capture` has to be for a forward to hand out the outputs of these layers, and no others."""
    return sorted(layer + _EMBEDDINGS_COUNT for layer in layer_ids)


def prompt_inputs(model, input_ids: Tensor, size: int, cache: Cache, model_kwargs: dict) -> dict:
    """What a forward takes for the last `size` tokens of a prompt, as `generate` would make it."""
    kwargs = {**model_kwargs, CACHE_NAME: cache}
    return model.prepare_inputs_for_generation(input_ids, next_sequence_length=size, is_first_iteration=True, **kwargs)


def plain_positions(model, tokens: Tensor) -> dict[str, Tensor]:
    """What `generate` tells a forward of the positions of whole texts (B, L), where it can be told."""
    takes_them = "position_ids" in inspect.signature(model.forward).parameters
    return {"position_ids": torch.arange(tokens.shape[1], device=tokens.device)[None]} if takes_them else {}


def with_logits_of(model_kwargs: dict, columns: Tensor) -> dict:
    """The same inputs, asking for the logits of these tokens alone, where the model can be asked."""
    return {**model_kwargs, "logits_to_keep": columns} if "logits_to_keep" in model_kwargs else model_kwargs


def tree_inputs(tokens: Tensor, positions: Tensor, attention_mask, cache: Cache) -> dict:
    """What a forward takes for a tree's nodes (B, N)."""
    inputs = dict(input_ids=tokens, position_ids=positions, attention_mask=attention_mask, use_cache=True)
    return {**inputs, CACHE_NAME: cache}


def forward(run: Callable, inputs: dict, capture: list[int] | bool) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The model's logits (B, T, V), and hidden states with entry i + 1 for the output of layer i.

    Args:
        capture: which layers' outputs to hand out, see `captured_layers`; True: all. Without any there are no entries.
    """
    output = run(**inputs, output_hidden_states=capture, return_dict=True)
    return output.logits, _embeddings_first(output.hidden_states, capture is not True) if capture else ()


def read_text(target, tokens: Tensor, layer_ids: Iterable[int]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The target's last hidden state (B, T, H) for tokens (B, T), and these layers' outputs, as `forward` has them."""
    capture = captured_layers(layer_ids)
    output = target.base_model(input_ids=tokens, use_cache=False, output_hidden_states=capture)
    return output.last_hidden_state, _embeddings_first(output.hidden_states, True)


def _embeddings_first(hidden_states: tuple[Tensor | None, ...], selected: bool) -> tuple[Tensor | None, ...]:
    if selected:  # where layers hand out several streams (S, B, T, H), drafters read the one that is predicted with
        hidden_states = tuple(one[0] if one is not None and one.ndim == 4 else one for one in hidden_states)
    return hidden_states if _EMBEDDINGS_COUNT or not selected else (None, *hidden_states)


def has_several_streams(target) -> bool:
    """Whether a layer's output is not one state a token (B, T, H) but several, (S, B, T, H)."""
    return getattr(target.config.get_text_config(decoder=True), "altup_num_inputs", 1) > 1


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate's hooks bring them from an offload."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((tensor.device for tensor in [*module.parameters(), *module.buffers()]), "cpu")
    return torch.device(device)


def without_embed_norm(embed: nn.Module) -> nn.Module:
    """Some targets norm their embeddings inside the module; drafters read them before that norm, as native DFlash.

    Returns:
        The module itself, or one of the same weights without its norm.
    """
    if getattr(embed, "embed_norm", None) is None:
        return embed
    twin = copy.copy(embed)
    twin.__dict__["_modules"] = {**embed._modules, "embed_norm": nn.Identity()}
    return twin


def embedding_scale(embed: nn.Module) -> float | Tensor:
    """What a module, or the one that an adapter wraps, multiplies its embeddings by."""
    embed = getattr(embed, "base_layer", embed)
    return getattr(embed, "scalar_embed_scale", getattr(embed, "embed_scale", 1.0))


def is_quantized(model) -> bool:
    """Whether weights are not plain floating-point numbers."""
    plain = (torch.Tensor, nn.Parameter)
    return getattr(model, "is_quantized", False) or any(
        type(p) not in plain or type(p.data) not in plain or not p.is_floating_point() for p in model.parameters()
    )


def has_adapters(model) -> bool:
    """Whether some module stands around another whose outputs it changes, LoRA's say: which do, may change."""
    return any(hasattr(module, "base_layer") for module in model.modules())


# Passes over a few tokens --------------------------------------------------------------------------------------------


class _FewRows(nn.Linear):
    """A linear layer by the fastest product for few rows: of a call, in which nothing but its input changes."""

    ways: dict[tuple, Callable]  # by the kind of input, once it is known

    def forward(self, input: Tensor) -> Tensor:
        own = self._parameters  # hundreds of times a pass: attributes of modules are looked up slowly
        weight, bias = own["weight"], own["bias"]
        kind = type(input), input.dtype, input.numel()
        way = self.ways.get(kind)
        if way is not None:
            return way(input, weight, bias)
        product, way = linear(input, weight, bias), settled(input, weight, bias)
        if way is not None:
            self.ways[kind] = way
        return product


def for_few_tokens(model):
    """What gives a model's outputs, faster where a pass over a few tokens can be: a twin of the same weights.

    Of the model nothing changes. Its twin has modules of its own where some plain linear layer on a CPU stands below,
    with the same dictionaries of parameters and buffers: weights that are changed later change in both. What else is
    set on a module later is not followed, so that a twin is for one call.

    Returns:
        The model itself where it has no such layer, or where someone follows or replaces calls of its modules.
    """
    if not isinstance(model, nn.Module) or getattr(model, "_is_stateful", False):
        return model
    first = next(model.parameters(), None)
    if getattr(model, "is_quantized", False) or first is None or not first.is_cpu:
        return model
    try:
        return _twin(model, {})
    except _Followed:
        return model


class _Followed(Exception):
    """Someone replaced a module's forward, or follows its calls, and would meet another module."""


def _check_unfollowed(own: dict) -> None:
    """Of a module's attributes. Hooks by which Transformers captures outputs are the same for any module."""
    if "forward" in own or "_hf_hook" in own or own.get("_compiled_call_impl") is not None:
        raise _Followed
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()):
            if getattr(hook, "__module__", None) != output_capturing.__name__:
                raise _Followed


def _twin(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module, or its twin if that differs anywhere; one that stands in several places has one twin."""
    if module in made:
        return made[module]
    _check_unfollowed(vars(module))
    twin = module
    if type(module) is nn.Linear:
        if type(module.weight) is nn.Parameter and type(module.weight.data) is Tensor and module.weight.is_cpu:
            twin = _like(module, _FewRows)
            vars(twin)["ways"] = {}
    else:
        here = module._modules
        below = {name: child if child is None else _twin(child, made) for name, child in here.items()}
        if any(below[name] is not child for name, child in here.items()):
            twin = _like(module, type(module))
            vars(twin)["_modules"] = below
    made[module] = twin
    return twin


def _like(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The same attributes in another module, with room of its own for hooks: Transformers may add some."""
    twin = object.__new__(kind)
    own = vars(twin)
    own.update(vars(module))
    for name in _HOOKS:
        own[name] = own[name].copy()
    return twin


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


# Continuous batching -------------------------------------------------------------------------------------------------


def continuous_config(model, options: dict) -> GenerationConfig:
    """The config that `generate(**options)` would decode with, defaults filled in, for `generate_batch`.

    Raises:
        NotImplementedError: for what continuous batching leaves out, or gets wrong, instead of refusing it.
    """
    config, _ = model._prepare_generation_config(None, **options)
    processors = model._get_logits_processor(config)
    strange = [
        type(one).__name__ for one in processors if getattr(one, "supports_continuous_batching", None) is not True
    ]
    if strange:
        raise NotImplementedError(f"continuous batching does not support {', '.join(strange)}")
    return config


# Attention -----------------------------------------------------------------------------------------------------------


def register_attention(name: str, attend: Callable) -> None:
    AttentionInterface.register(name, attend)


def stock_sdpa() -> Callable:
    """Transformers' attention function "sdpa"."""
    return AttentionInterface()["sdpa"]


def decoder_of(model):
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model if decoder is None else decoder


def attention_of(config) -> str:
    """The name of the attention implementation of a model with this config."""
    return config._attn_implementation or "eager"


def set_attention(config, name: str) -> None:
    config._attn_implementation = name


class _Running(threading.local):
    """What this thread's pass attends by: the name of an implementation, and a plan that is made for it."""

    implementation: str | None = None
    plan: object = None
    positions: Tensor | None = None  # (B, N) of the tokens, for models that do not take them
    key_positions: Tensor | None = None  # (B, keys), for models that add a bias by them


_running = _Running()


@contextlib.contextmanager
def attention_within(
    implementation: str, plan: object, positions: Tensor | None = None, key_positions: Tensor | None = None
) -> Iterator[None]:
    """Within, in this thread alone, models attend by the implementation of that name. Nothing of theirs changes."""
    before = dict(vars(_running))
    vars(_running).update(implementation=implementation, plan=plan, positions=positions, key_positions=key_positions)
    try:
        yield
    finally:
        vars(_running).clear()
        vars(_running).update(before)


def current_plan() -> Any:
    """The plan of the pass that runs in this thread."""
    return _running.plan


def _get_interface(stock, interface, attn_implementation: str, default: Callable) -> Callable:
    """As `AttentionInterface.get_interface`, by which each layer asks for its attention function."""
    running = _running.implementation
    return stock(interface, attn_implementation if running is None else running, default)


_wrap(AttentionInterface, "get_interface", _get_interface)


def own_window(model) -> str | None:
    """In words, a window that layers lay over the keys by their order, and that no cache or mask knows of."""
    if "local" in (getattr(model.config.get_text_config(decoder=True), "attention_layers", None) or []):
        return "its local layers count their window by the order of the keys, and nodes stand beside each other"
    return None


def embeds_positions_itself(model) -> bool:
    """Whether a decoder counts positions by its cache, and can be told them where it embeds them alone."""
    embed = getattr(decoder_of(model), "embed_positions", None)
    if embed is None or "position_ids" in inspect.signature(type(model).forward).parameters:
        return False
    if "position_ids" not in inspect.signature(type(embed).forward).parameters:
        return False
    _wrap(type(embed), "forward", _embed_positions)
    return True


def _embed_positions(stock: Callable, embed: nn.Module, *args, **kwargs) -> Tensor:
    """(B, N, H), as stock embeds them in one row, of the positions of this pass."""
    positions = _running.positions
    if positions is None:
        return stock(embed, *args, **kwargs)
    kwargs["position_ids"] = positions.flatten().to(execution_device(embed))
    return stock(embed, *args, **kwargs).view(*positions.shape, -1)


def biases_by_position(model) -> bool:
    """Whether a model adds a bias by the position of each key (ALiBi), which passes then have to say.

    Raises:
        ValueError: where there is no way to say it.
    """
    decoder = decoder_of(model)
    if getattr(decoder, "build_mpt_alibi_tensor", None) is not None or getattr(decoder, "use_alibi", False):
        raise ValueError(
            f"{type(model).__name__} adds a bias by the order of the keys (ALiBi) and takes no positions, so that it "
            "cannot verify a tree of candidates. Generate without assistant_model."
        )
    if getattr(decoder, "build_alibi_tensor", None) is None:
        return False
    _wrap(type(decoder), "build_alibi_tensor", _alibi_by_position)
    return True


def _alibi_by_position(stock: Callable, decoder, attention_mask: Tensor, *args, **kwargs) -> Tensor:
    """(B * heads, 1, keys), as stock builds it for keys in their order, of keys at the positions of this pass."""
    positions = _running.key_positions
    if positions is None:
        return stock(decoder, attention_mask, *args, **kwargs)
    rows, keys = positions.shape
    positions = positions.to(attention_mask.device)
    in_order = stock(decoder, torch.ones_like(positions), *args, **kwargs).view(rows, -1, 1, keys)
    return in_order.gather(3, positions[:, None, None].expand_as(in_order)).view(-1, 1, keys)


def takes_attention_functions(decoder) -> bool:
    """Models with a state do not say so, but ask for the attention function as the others do."""
    asks = getattr(decoder, "_supports_flash_attn", False) and getattr(decoder, "_is_stateful", False)
    return asks or getattr(decoder, "_supports_attention_backend", False)


def has_sdpa(decoder) -> bool:
    return getattr(decoder, "_supports_sdpa", False)


def compiled_everywhere() -> CompileConfig:
    """Settings by which `generate` compiles a static cache's passes on a CPU too."""
    config = CompileConfig(dynamic=False)
    config._compile_all_devices = True
    return config


# Caches --------------------------------------------------------------------------------------------------------------


NO_CACHE = "dummy"  # the type of layers without keys and values: of experts alone, or of another layer's
_READ: ContextVar[dict | None] = ContextVar("layers that configs were found to have", default=None)


@contextlib.contextmanager
def layers_read_once():
    """Within, what a config says of its layers is read once: a call asks thirty times, which takes up to 10 ms."""
    token = _READ.set({})
    try:
        yield
    finally:
        _READ.reset(token)


def _read_layers(text) -> tuple[list[str], list[dict]]:
    read = _READ.get()
    if read is None:
        return get_layer_types_and_kwargs(text)
    if id(text) not in read:
        read[id(text)] = get_layer_types_and_kwargs(text), text  # which is kept, so that its id stays its own
    return read[id(text)][0]


def layer_types_of(config) -> tuple[list[str], list[dict]]:
    """Of a decoder's cached layers the types, by Transformers' names, and what their caches are made with.

    Layers at the end that attend to another layer's keys and values are of its type, or left out.
    """
    text = config.get_text_config(decoder=True)
    types, options = _read_layers(text)
    cached = _attention_types(text, types)[: len(types)]
    if not STATE_TYPES.isdisjoint(cached):  # beside layers with a state those without any count as such
        cached = ["linear_attention" if kind in (NO_CACHE, "moe", "mlp") else kind for kind in cached]
    return cached, options


def attention_types_of(config) -> list[str]:
    """Of all layers of a decoder the types, by Transformers' names."""
    text = config.get_text_config(decoder=True)
    return _attention_types(text, _read_layers(text)[0])


def _attention_types(text, types: list[str]) -> list[str]:
    """Those that share keys and values have lost their own type, or until 5.23 their place."""
    own = getattr(text, "layer_types", None) if _shares_keys(text) else None
    return types if own is None else list(own)


def _shares_keys(text) -> bool:
    return bool(getattr(text, "num_kv_shared_layers", 0))


def is_without_cache(layer) -> bool:
    """Whether a layer of a cache holds nothing by design."""
    return type(layer).__name__ == "DummyLayer"  # which came with 5.21


def head_sizes(config) -> set[int]:
    """The sizes of a decoder's heads: some have other ones in layers of another type."""
    layers = config.get_text_config(decoder=True).per_layer_config
    return {
        getattr(one, "head_dim", None) or one.hidden_size // getattr(one, "num_attention_heads", 1) for one in layers
    }


# Types of layers with a convolution's or a recurrence's state, and of those that attend beside it.
STATE_TYPES = frozenset({"linear_attention", "conv", "hybrid"})
ATTENDING_TYPES = frozenset({"full_attention", "sliding_attention", "hybrid"})
_STATE = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")

States = dict[str, dict[int, Tensor | None]]  # by attribute of a cache layer, then by index: (B, ...)


def states_of(layer: LinearAttentionLayer) -> States:
    """A layer's states as they are, not copied."""
    return {name: dict(getattr(layer, name)) for name in _STATE}


def set_states(layer: LinearAttentionLayer, states: States) -> None:
    for name, values in states.items():
        setattr(layer, name, dict(values))


def copy_state_flags(layer: LinearAttentionLayer, other: LinearAttentionLayer) -> None:
    """Let a layer be as far initialised as another, whose states it is given."""
    for name in _FLAGS:
        setattr(layer, name, dict(getattr(other, name)))
    layer.number_of_states = other.number_of_states


def has_states(layer) -> bool:
    """Whether a cache layer holds a recurrent state."""
    return isinstance(layer, LinearAttentionLayer) and any(layer.has_previous_state.values())


def own_cache_class(config) -> type[Cache] | None:
    """The class of caches that a model insists on, where it does so: MiniMax keeps its states beside the layers."""
    if config.get_text_config(decoder=True).model_type != "minimax":
        return None
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    return MiniMaxCache


def give_states(cache: Cache, at: int, layer: LinearAttentionLayer) -> None:
    """Leave a layer's states in the layer of that index of a cache of Transformers, or beside it."""
    plain = cache.layers[at]
    if isinstance(plain, LinearAttentionLayer):
        copy_state_flags(plain, layer)
        set_states(plain, states_of(layer))
        plain.dtype, plain.device = layer.dtype, layer.device
    else:
        cache.set_linear_cache(at, layer.recurrent_states[0])


def cached_length(cache: Cache) -> int:
    """Tokens in a cache; 0 for one without attention that is empty.

    Raises:
        ValueError: for states of which no layer counts the tokens.
    """
    layers = cache.layers
    if not layers or any(hasattr(layer, "get_seq_length") for layer in layers):
        return cache.get_seq_length()
    if any(map(has_states, layers)):
        raise ValueError(
            f"{CACHE_NAME} holds recurrent states alone, which do not say of how many tokens. Pass the whole prompt "
            f"without {CACHE_NAME}."
        )
    return 0


# Logits processors ---------------------------------------------------------------------------------------------------

_OF_ROWS = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
_WITH_STATE = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)


_OF_LOGITS = {
    logits_process.EpsilonLogitsWarper,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
}


def reads_logits_alone(processor) -> bool:
    """Whether a processor's scores follow from the logits alone, computed without asking the host."""
    return type(processor) in _OF_LOGITS


def keeps_state_of_batch(processor) -> bool:
    return isinstance(processor, _WITH_STATE)


def is_stock_processor(processor) -> bool:
    return type(processor).__module__ == logits_process.__name__


def processor_of_row(processor, row: int, rows: int):
    """A stock processor as it treats one row of a batch of `rows`, when it sees that row alone.

    Most look at each row by itself. Of those that know the batch's prompts, or are told which row they see, a copy.
    """
    if not isinstance(processor, _OF_ROWS):
        return processor
    one = copy.copy(processor)
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        one._prefix_allowed_tokens_fn, one._num_beams = (lambda _, ids: allowed(row, ids)), 1
    elif isinstance(processor, EncoderNoRepeatNGramLogitsProcessor):
        at = row * processor.batch_size // rows  # of the prompts before they are repeated for num_return_sequences
        one.generated_ngrams, one.batch_size = processor.generated_ngrams[at : at + 1], 1
    elif isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = getattr(processor, "prompt_ignore_length", None)  # by row, where there is padding
        if isinstance(ignored, Tensor):
            at = row * len(ignored) // rows
            one.prompt_ignore_length = ignored[at : at + 1]
    else:
        at = row * len(processor.encoder_input_ids) // rows
        one.encoder_input_ids = processor.encoder_input_ids[at : at + 1]
    return one


__all__ = [
    "CACHE_NAME",
    "PLAIN_MODES",
    "BaseStreamer",
    "Cache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EosTokenCriteria",
    "GenerateDecoderOnlyOutput",
    "LinearAttentionLayer",
    "LogitsProcessorList",
    "MaxLengthCriteria",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "StoppingCriteriaList",
]
