"""A small autoregressive draft LM, the "Draft-LLM" that block drafters are compared with: same text, like size."""

import copy

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .blocks import NO_LABEL
from .loop import TrainingRun
from .losses import Labels, slot_losses
from .options import TrainOptions
from .shards import Row, read_rows


def new_draft_lm(target: PreTrainedModel, num_layers: int, init_layers: str, seed: int) -> PreTrainedModel:
    """A causal LM of the target's own kind with few layers, in float32; embedding and head are the target's, frozen.

    Args:
        init_layers: "random", or "target": a copy of the target's top layers.
    """
    config = copy.deepcopy(target.config.get_text_config(decoder=True))
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[-num_layers:]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for mine, its in (
        (model.get_input_embeddings(), target.get_input_embeddings()),
        (model.get_output_embeddings(), target.get_output_embeddings()),
    ):
        mine.load_state_dict(its.state_dict())
        mine.requires_grad_(False)
    model.get_decoder().norm.load_state_dict(target.get_decoder().norm.state_dict())
    if init_layers == "target":
        for mine, its in zip(model.get_decoder().layers, target.get_decoder().layers[-num_layers:]):
            mine.load_state_dict(its.state_dict())
    model.generation_config = copy.deepcopy(target.generation_config)
    return model


class DraftLMTrainee(nn.Module):
    """The LM in training: cross-entropy of the response's tokens."""

    def __init__(self, model: PreTrainedModel, chunk: int):
        super().__init__()
        self.model, self._chunk = model, chunk

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss (), and which of the M labelled tokens are right (M,)."""
        tokens, labels = batch  # (B, T) both
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        labelled = labels[:, 1:] != NO_LABEL
        wanted = Labels(labels[:, 1:][labelled])
        losses, _, right = slot_losses(hidden[labelled], wanted, self.model.get_output_embeddings(), self._chunk)
        return losses.mean(), right


class DraftLMRun(TrainingRun):
    """The training of a draft LM; its `best` is an `assistant_model` of stock assisted decoding."""

    def __init__(self, options: TrainOptions, target, tokenizer, accelerator: Accelerator):
        model = new_draft_lm(target, options.num_layers, options.init_layers, options.seed)
        model.generation_config.num_assistant_tokens = options.block_size - 1
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.assistant_confidence_threshold = 0.0
        trainee = DraftLMTrainee(model, options.loss_chunk)
        super().__init__(options, target, accelerator, trainee, read_rows(*options.data))

    def batch(self, rows: list[Row], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """tokens and labels (B, T); padding stands on the right, out of every token's causal sight."""
        tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True)
        labels = torch.full_like(tokens, NO_LABEL)
        for row, label in zip(rows, labels):
            label[row.prompt_length : len(row.tokens)] = row.tokens[row.prompt_length :]
        return tokens.to(self.accelerator.device), labels.to(self.accelerator.device)

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel) -> float:
        assistant = model.to(self.target.dtype)
        tokens = passes = 0

        def count(*_) -> None:
            nonlocal passes
            passes += 1

        hook = self.target.register_forward_hook(count)
        try:
            for row in self.held_out[: self.options.eval_rows]:
                prompt = row.tokens[None, : row.prompt_length].to(self.target.device)
                out = self.target.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    assistant_model=assistant,
                    do_sample=False,
                    max_new_tokens=self.options.eval_tokens,
                )
                tokens += out.shape[1] - prompt.shape[1]
        finally:
            hook.remove()
        return tokens / max(passes, 1)
