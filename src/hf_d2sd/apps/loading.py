"""A target and its drafters for a command; what configs and tokenizer tell is checked before weights are read."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..binding import bind
from ..checks import refuse_absent_device
from ..modeling import D2SDAssistant, D2SDConfig
from ..options import PREFIX, command_fields, option_fields, settle
from ..pairs import CONTEXT, load_assistant, read_pair_config, refuse_missing_folder

FASTEST = "fastest"
DTYPES = ("auto", FASTEST, "float32", "bfloat16", "float16")


OPTIONS = [declared.name for declared in option_fields() if declared.name != "trace"]
if TYPE_CHECKING:
    DraftingFields = Any
else:
    DraftingFields = command_fields(*OPTIONS)


def dtype_field(default: str):
    words = f"auto: the target's checkpoint's; {FASTEST}: bfloat16 where the device has units for it, else float32"
    return field(default=default, kw_only=True, metadata={"help": words, "choices": list(DTYPES)})


@dataclass(kw_only=True)
class PairOptions(DraftingFields):
    target: str = field(metadata={"help": "folder or Hub id of the target"})
    drafters: list[str] = field(
        metadata={
            "help": "folder or Hub id of a pair, or of the first drafter; then, if there is one, of the second. "
            "context: none, continuations of the text so far are all that is drafted"
        }
    )
    dtype: str = dtype_field("auto")
    device: str | None = field(
        default=None,
        metadata={"help": "cpu, cuda, cuda:1, or auto: spread the target; default: a GPU, if there is one"},
    )

    def __post_init__(self):
        if isinstance(self.drafters, str):
            self.drafters = [self.drafters]
        if not 1 <= len(self.drafters) <= 2:
            raise ValueError(
                f"--drafters names {len(self.drafters)} of {self.drafters}: name a pair, a first drafter, or a first "
                "and a second drafter."
            )
        refuse_absent_device(self.device)

    def d2sd_options(self) -> dict:
        """The options of `generate` that were given."""
        return {PREFIX + name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}


@dataclass(frozen=True)
class PairPlan:
    """What is known of a target and its drafters before their weights are read."""

    options: PairOptions
    target_config: PreTrainedConfig
    pair_config: D2SDConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def max_length(self) -> int | None:
        """The greatest number of tokens that the target has positions for."""
        return getattr(self.target_config.get_text_config(decoder=True), "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype | str:
        """What `from_pretrained` takes."""
        return dtype_of(self.options.dtype, self.options.device, self.target_config)

    @functools.cached_property
    def empty_target(self) -> PreTrainedModel:
        """The target without weights."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.target_config)

    @functools.cached_property
    def empty_assistant(self) -> D2SDAssistant:
        if self.options.drafters == CONTEXT:
            return D2SDAssistant.from_context()
        with torch.device("meta"):
            return D2SDAssistant(self.pair_config)

    def load(self) -> "Pair":
        """Read the weights."""
        options = self.options
        where = options.device or default_device()
        target = AutoModelForCausalLM.from_pretrained(options.target, dtype=self.dtype, device_map=where).eval()
        return Pair(target, self.tokenizer, load_assistant(options.drafters, target.dtype).to(target.device))


@dataclass(frozen=True)
class Pair:
    """A target, its tokenizer, and its drafters, ready to decode."""

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    assistant: D2SDAssistant


def dtype_of(name: str, device: str | None, config: PreTrainedConfig) -> torch.dtype | str:
    """What `from_pretrained` takes for one of `DTYPES`, for a target on a device; a quantized one stays as it is."""
    if name == "auto" or (name == FASTEST and getattr(config, "quantization_config", None) is not None):
        return "auto"
    if name != FASTEST:
        return getattr(torch, name)
    return fastest_dtype(torch.device(default_device() if device in (None, "auto") else device))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it; else float32, and float16 on GPUs from before (Volta, Turing)."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    has_units = device.type == "cpu" and torch.backends.mkldnn.is_available() and cpu_flags() & BFLOAT16_UNITS
    return torch.bfloat16 if has_units else torch.float32


BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16", "bf16"}  # as a CPU's flags: x86's two, and ARM's


def cpu_flags() -> set[str]:
    """What this machine's processor can, in the words of Linux; torch asks it too, from 2.10 on, on other systems."""
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}


def plan_pair(options: PairOptions) -> PairPlan:
    """Read configs and tokenizer, and refuse what they already tell does not fit.

    Raises:
        ValueError: for folders that are not there, drafters of another target, or options out of range.
        OSError: for what is there and is no model.
    """
    plan = read_plan(options)
    bind(plan.empty_assistant, plan.empty_target, plan.tokenizer)
    settle(plan.empty_assistant, GenerationConfig(**options.d2sd_options()))
    return plan


def read_plan(options: PairOptions) -> PairPlan:
    """The same without any comparison."""
    for name in (options.target, *options.drafters):
        refuse_missing_folder(name)
    logging.disable_progress_bar()
    pair_config = read_pair_config(options.drafters)
    config = AutoConfig.from_pretrained(options.target)
    return PairPlan(options, config, pair_config, AutoTokenizer.from_pretrained(options.target))


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Tensor:
    """(1, L): the conversation as the chat template writes it, up to where the reply begins.

    Raises:
        ValueError: without a chat template, or where it refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("The target's tokenizer has no chat template. With --raw the prompt is taken as it is.")
    rendered = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return rendered["input_ids"]


def refuse_too_long(length: int, max_new_tokens: int, plan: PairPlan) -> None:
    """Raises `ValueError` where prompt and reply together are longer than the target's positions."""
    limit = plan.max_length
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"The prompt has {length} tokens and max_new_tokens is {max_new_tokens}; the target has positions for "
            f"{limit}. Shorten the prompt, or lower --max_new_tokens."
        )
