"""Tiny random targets of every supported family, and drafters for them that are right now and then."""

import functools

import torch
import transformers as tf

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel
from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter

VOCAB, LAYERS, WIDTH, WINDOW = 24, 4, 32, 10
IMAGE_TOKEN = 20

_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.5,  # far from flat: float32 rounding must not decide between two tokens
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
    tie_word_embeddings=False,
)
_ALTERNATING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2))


def _gemma3_text():
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_SIZES, **_ALTERNATING, query_pre_attn_scalar=8))


def _gemma3_image():
    text = tf.Gemma3TextConfig(**_SIZES, **_ALTERNATING, query_pre_attn_scalar=8)
    vision = tf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2
    )
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=IMAGE_TOKEN,
        boi_token_id=21,
        eoi_token_id=22,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return tf.Gemma3ForConditionalGeneration(config)


_BUILDERS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_SIZES)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_SIZES)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_SIZES, **_ALTERNATING, use_sliding_window=True)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_SIZES, sliding_window=WINDOW)),
    "gemma3_text": _gemma3_text,
    "gemma3_image": _gemma3_image,
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**_SIZES, **_ALTERNATING, num_local_experts=4, num_experts_per_tok=2)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**{**_SIZES, "pad_token_id": 0})),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_SIZES)),
}
FAMILIES = tuple(_BUILDERS)

_shared: list[tuple[str, torch.nn.Module, dict]] = []  # models, by what they are, and their weights as they were made


def _share(name: str, model: torch.nn.Module) -> None:
    _shared.append((name, model, _seen(model)))


def _seen(model: torch.nn.Module) -> dict[str, tuple]:
    """Of each weight, what is another once somebody has changed it."""
    return {name: (each.dtype, each.data_ptr(), each._version) for name, each in model.named_parameters()}


def changed_since() -> list[str]:
    """Shared models that somebody has changed since this was asked last."""
    changed = [name for name, model, before in _shared if _seen(model) != before]
    _shared[:] = [(name, model, _seen(model)) for name, model, _ in _shared]
    return changed


@functools.cache
def tiny_target(family: str = "llama"):
    """A random model of a family, fixed by its name; shared, so tests must not change it."""
    torch.manual_seed(sum(map(ord, family)))
    model = _BUILDERS[family]().eval()
    for parameter in model.parameters():  # norms and sinks start as constants: make every weight count
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if "gemma" in family:  # it scales its embeddings up: left so, a token predicts little but itself
        model.get_input_embeddings().weight.data *= 0.05
    if family == "gemma3_image":  # zero at initialisation: no image would ever be seen
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    _share(f"target {family}", model)
    return model


def tiny_drafter(block_size: int = 4, seed: int = 0, **changes) -> D2SDDrafterModel:
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.5,
        block_size=block_size,
        mask_token_id=1,
        target_layer_ids=[0, 2],
        num_target_layers=LAYERS,
    )
    return D2SDDrafterModel(D2SDDrafterConfig(**{**settings, **changes})).eval()


@functools.cache
def tiny_assistant(block_size: int = 4, second_block_size: int | None = None) -> D2SDAssistant:
    """A pair of random drafters for any tiny target; shared, so tests must not change it."""
    second = tiny_drafter(second_block_size or block_size, seed=1)
    assistant = D2SDAssistant.from_drafters(tiny_drafter(block_size), second)
    _share(f"drafters {block_size}, {second_block_size}", assistant)
    return assistant


def prompt(length: int = 9, seed: int = 0) -> torch.Tensor:
    """(1, length) random tokens below the special ones."""
    return torch.randint(2, IMAGE_TOKEN, (1, length), generator=torch.Generator().manual_seed(seed))


def image_inputs(length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """A prompt with one image for `gemma3_image`."""
    words = prompt(length, seed)
    image = torch.tensor([[21, *[IMAGE_TOKEN] * 4, 22]])
    input_ids = torch.cat([words[:, :3], image, words[:, 3:]], dim=1)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": input_ids, "pixel_values": pixels, "token_type_ids": (input_ids == IMAGE_TOKEN).long()}


class OracleDrafts:
    """Puts the target's own continuation into drafts, with mistakes, so that paths of every length occur.

    The networks still run: it wraps `Drafter._denoise` and changes what comes out. Where a draft is not overwritten
    it stays the network's.

    Args:
        sequence: (L,), prompt and plain continuation; or one for each row of a batch, all rows still in it.
        accuracy: share of the positions that become right.
        confidence: of every position; random by default.
    """

    def __init__(self, monkeypatch, sequence: torch.Tensor, accuracy: float, confidence=None, seed: int = 0):
        self.sequence, self.accuracy, self.confidence = sequence, accuracy, confidence
        self.generator = torch.Generator().manual_seed(seed)
        stock = Drafter._denoise
        monkeypatch.setattr(Drafter, "_denoise", lambda drafter, *args: self.correct(drafter, stock(drafter, *args)))

    def correct(self, drafter: Drafter, draft: Draft) -> Draft:
        shape, width = draft.best.shape, draft.depth
        truth = torch.stack([self.after(position, width) for position in drafter.context.positions])[:, None]
        right = torch.rand(shape, generator=self.generator) < self.accuracy
        confidence = torch.rand(shape, generator=self.generator).clamp(0.05, 0.99)
        if self.confidence is not None:
            confidence = torch.full_like(confidence, self.confidence)
        return Draft.of(torch.where(right, truth, draft.best), confidence)

    def after(self, position: int, width: int) -> torch.Tensor:
        """(width,): what follows the anchor at a position."""
        truth = self.sequence[position + 1 : position + 1 + width]
        return torch.nn.functional.pad(truth, (0, width - len(truth)), value=2)
