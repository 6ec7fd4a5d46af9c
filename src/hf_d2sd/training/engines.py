"""How a target writes many replies: a batch at a time, or in slots that are refilled as replies end."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig
from transformers.utils import logging

from ..compat import attention_of, continuous_config

logger = logging.get_logger(__name__)

_PAGE = 256  # tokens of a page of the paged cache, Transformers' default
_CPU_SLOTS = 32  # attention runs over all slots' keys with a mask there: with many slots that is most of a step


class Batches:
    """`generate` of all prompts at once, padded on the left: it ends with the longest reply."""

    def __init__(self, model):
        self.model = model

    @torch.inference_mode()
    def __call__(self, prompts: list[list[int]], options: dict[str, Any]) -> list[Tensor]:
        """The response (R,) to each prompt, its end-of-sequence token included."""
        width, pad = max(map(len, prompts)), options["pad_token_id"]
        padded = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self.model.generate(
            padded.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            **options,
            cache_implementation="static",
            disable_compile=True,  # every batch has a width of its own: each would be compiled anew
        )
        responses = output[:, width:].cpu()
        ends = torch.isin(responses, torch.tensor(options["eos_token_id"] or [], dtype=torch.long))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, responses.shape[1]).tolist()
        return [response[:length] for response, length in zip(responses, lengths)]


class Continuous:
    """Transformers' continuous batching: no padding, and a reply that ended makes room for the next prompt."""

    def __init__(self, model, slots: int | None):
        self.model = model
        self.slots = slots

    def __call__(self, prompts: list[list[int]], options: dict[str, Any]) -> list[Tensor]:
        """The response (R,) to each prompt, its end-of-sequence token included.

        Raises:
            RuntimeError: if Transformers could not answer all of them.
            NotImplementedError: for what it does not support of the options or of the checkpoint's.
        """
        attention = attention_of(self.model.config)
        try:
            output = self.model.generate_batch(
                prompts,
                generation_config=continuous_config(self.model, options),
                continuous_batching_config=self._config(prompts, options["max_new_tokens"]),
                progress_bar=False,
            )
        finally:
            if attention_of(self.model.config) != attention:  # a manager that fails to start leaves its own
                self.model.set_attn_implementation(attention)
        results = list(output.values())
        errors = {result.error for result in results if result.error is not None}
        if errors or len(results) != len(prompts):
            raise RuntimeError(f"{len(results)} of {len(prompts)} replies; {'; '.join(sorted(map(str, errors)))}")
        return [torch.tensor(result.generated_tokens) for result in results]

    def _config(self, prompts: list[list[int]], max_new_tokens: int) -> ContinuousBatchingConfig:
        seed = int(torch.randint(2**31, ()))  # of torch's own generator, so that a seed decides here too
        if self.model.device.type != "cpu":
            return ContinuousBatchingConfig(seed=seed, max_requests_per_batch=self.slots)
        # On a CPU the cache would take nine tenths of the memory: as much as the slots can hold is enough.
        slots = min(self.slots or _CPU_SLOTS, len(prompts))
        pages = -(-(max(map(len, prompts)) + max_new_tokens) // _PAGE) + 1
        return ContinuousBatchingConfig(
            seed=seed,
            max_requests_per_batch=slots,
            num_blocks=slots * pages + 1,
            max_batch_tokens=max(_PAGE, slots),
            allow_block_sharing=False,
        )


class Fallback:
    """Continuous batching; where that fails, batches from there on."""

    def __init__(self, model, slots: int | None):
        self.model = model
        self.engine: Continuous | Batches = Continuous(model, slots)

    def __call__(self, prompts: list[list[int]], options: dict[str, Any]) -> list[Tensor]:
        try:
            return self.engine(prompts, options)
        except Exception as error:
            # What a target, its options or a device do not support shows in as many ways as there are errors.
            if isinstance(self.engine, Batches):
                raise
            logger.warning(f"Continuous batching failed ({type(error).__name__}: {error}); going on with batches.")
        self.engine = Batches(self.model)
        return self.engine(prompts, options)


def _automatic(model, slots: int | None):
    return Fallback(model, slots) if model.device.type == "cuda" else Batches(model)


ENGINES: dict[str, Callable] = {
    "auto": _automatic,
    "batches": lambda model, slots: Batches(model),
    "continuous": Continuous,
}


def make_engine(name: str, model, slots: int | None = None) -> Callable[[list[list[int]], dict], list[Tensor]]:
    """What turns prompts and options of `generate` into replies.

    Raises:
        ValueError: for a name that is none of `ENGINES`.
    """
    if name not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {name!r}.")
    return ENGINES[name](model, slots)
