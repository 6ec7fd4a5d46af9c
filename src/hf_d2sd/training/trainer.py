"""`hf-d2sd train`: a drafter from the target's own text; alone, or on many devices by `accelerate launch`."""

import copy
import dataclasses
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..binding import bind
from ..compat import set_attention
from ..modeling import D2SDAssistant, D2SDDrafterModel
from ..modeling.modeling_d2sd import D2SDPathHead
from ..pairs import load_drafter
from .blocks import Blocks, cut_blocks, draw_anchors, draw_prefix_lengths
from .draft_lm import DraftLMRun
from .drafters import Trainee, drafter_config, frequent_tokens, new_drafter
from .features import (
    FeatureCache,
    PlacedRow,
    Teacher,
    TeacherCache,
    compute_features,
    compute_teacher,
    read_placed_rows,
)
from .loop import TrainingRun, refuse_other_run
from .options import TrainOptions
from .shards import Row, read_rows

# Options that say what weights a drafter has, and what its configuration calls them.
_SHAPE = {
    "block_size": "block_size",
    "num_layers": "num_hidden_layers",
    "target_layer_ids": "target_layer_ids",
    "intermediate_size": "intermediate_size",
    "qk_norm": "qk_norm",
    "feature_fusion": "feature_fusion",
    "sliding_window": "sliding_window",
    "path_rank": "path_rank",
}


def train(options: TrainOptions) -> dict:
    """Train until the last step; returns what was last measured.

    Raises:
        ValueError: for rows that are missing or damaged, or options that do not fit the target or the run.
        FloatingPointError: for a loss that is not finite; the last checkpoint is kept.
    """
    options.check_places()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.accumulation,
        log_with=options.trackers or None,
        project_dir=options.out,
    )
    if options.attention == "flex_attention" and accelerator.device.type != "cuda":
        raise ValueError(f"--attention flex_attention needs CUDA; the device is {accelerator.device}. Leave it out.")
    tokenizer = AutoTokenizer.from_pretrained(options.target)
    _mask_token_id(options, tokenizer, None)  # refused where it is no token
    refuse_other_run(options, accelerator.num_processes)
    options.out.mkdir(parents=True, exist_ok=True)
    accelerator.init_trackers("hf-d2sd", config={k: str(v) for k, v in dataclasses.asdict(options).items()})
    target = AutoModelForCausalLM.from_pretrained(options.target, dtype=options.dtype).eval().requires_grad_(False)
    target.to(accelerator.device)
    kind = {"lm": DraftLMRun, "both": PairRun}.get(options.role, DrafterRun)
    run = kind(options, target, tokenizer, accelerator)
    run.load()
    return run.run()


class DrafterRun(TrainingRun):
    """The training of a first or second drafter."""

    def __init__(self, options: TrainOptions, target, tokenizer, accelerator: Accelerator):
        rows = read_rows(*options.data)
        self.first = _load_first(options, accelerator.device)
        model = _model(options, options.role, target, tokenizer, rows, self.first)
        bind(D2SDAssistant.from_drafters(model), target, tokenizer)
        self._read_layers_of(model, options)
        rows = self._with_features(rows, options, target, accelerator)
        trainee = _trainee(model.to(accelerator.device), options, target)
        if self.first is not None:
            self._first_trainee = Trainee(self.first, target, chunk=options.loss_chunk)
        super().__init__(options, target, accelerator, trainee, rows)

    def _read_layers_of(self, model: D2SDDrafterModel, options: TrainOptions) -> None:
        """Take the target's layers that this drafter reads for all.

        Raises:
            ValueError: if the first drafter, whose acceptance is asked for, reads others.
        """
        self.layer_ids = model.config.target_layer_ids
        if options.on_policy and self.first.config.target_layer_ids != self.layer_ids:
            raise ValueError(
                f"on_policy needs drafters that read the same layers; the first reads "
                f"{self.first.config.target_layer_ids}. Pass them as target_layer_ids, or --on_policy 0."
            )

    def _with_features(self, rows: list[Row], options: TrainOptions, target, accelerator: Accelerator) -> list[Row]:
        """The rows, which know where their features are, if these shall be kept."""
        if options.features != "cache":
            return rows
        with accelerator.main_process_first():
            for folder in options.data:
                FeatureCache(self.layer_ids).fill(folder, target, batch_size=options.rows)
                if options.distill_top_k:
                    TeacherCache(options.distill_top_k).fill(folder, target, batch_size=options.rows)
        return [row for folder in options.data for row in read_placed_rows(folder)]

    def batch(self, rows: list[Row], generator: torch.Generator) -> Blocks:
        anchors = draw_anchors(rows, self.options.anchors, generator)
        features, teachers = self.features(rows), self._teachers_of(rows)
        prefix_lengths = self._prefix_lengths(rows, features, anchors, generator)
        return cut_blocks(rows, features, anchors, prefix_lengths, self.trainee.model.config, teachers)

    def _prefix_lengths(
        self, rows: list[Row], features: list[Tensor], anchors: Tensor, generator: torch.Generator
    ) -> Tensor:
        """(B, N), how many tokens after its anchor a block of this role shows."""
        options = self.options
        prefix_lengths = draw_prefix_lengths(anchors.shape, options.block_size, options.prefix_base, generator)
        if not options.on_policy:
            return prefix_lengths
        accepted = self._accepted_by_first(rows, features, anchors).to("cpu").clamp(max=options.block_size - 2)
        on_policy = torch.rand(anchors.shape, generator=generator) < options.on_policy
        return torch.where(on_policy, accepted, prefix_lengths)

    def _teachers_of(self, rows: list[Row]) -> list[Teacher]:
        return self.teachers(rows) if self.options.distill_top_k else []

    def features(self, rows: list[Row]) -> list[Tensor]:
        """(T, F) of each row."""
        if isinstance(rows[0], PlacedRow):
            cache = FeatureCache(self.layer_ids)
            return [features.to(self.accelerator.device) for row in rows for features in cache.read(row)]
        return compute_features(self.target, rows, self.layer_ids)

    def teachers(self, rows: list[Row]) -> list[Teacher]:
        """Of each row, as `distill_top_k` says."""
        if isinstance(rows[0], PlacedRow):
            cache, device = TeacherCache(self.options.distill_top_k), self.accelerator.device
            read = [cache.read(row) for row in rows]
            return [Teacher(ids.to(device, torch.int64), log_probs.to(device)) for ids, log_probs in read]
        return compute_teacher(self.target, rows, self.options.distill_top_k)

    @torch.no_grad()
    def _accepted_by_first(self, rows: list[Row], features: list[Tensor], anchors: Tensor) -> Tensor:
        """(B, N): how many tokens of the first drafter's block the target would take: the second's prefix lengths."""
        blocks = cut_blocks(rows, features, anchors, torch.zeros_like(anchors), self.first.config)
        with self.accelerator.autocast():
            _, right, _ = self._first_trainee(blocks)
        return right[..., 1:].int().cumprod(-1).sum(-1)

    def measure(self, model: D2SDDrafterModel) -> float:
        pair = [model] if self.first is None else [copy.deepcopy(self.first), model]
        assistant = D2SDAssistant.from_drafters(*pair).to(self.target.dtype)
        return acceptance_length(
            self.target, assistant, self.held_out[: self.options.eval_rows], self.options.eval_tokens
        )


class PairRun(DrafterRun):
    """The training of both drafters in one loop: features of the target, half of what a step costs, serve both."""

    def __init__(self, options: TrainOptions, target, tokenizer, accelerator: Accelerator):
        rows = read_rows(*options.data)
        self.first = first = _model(options, "first", target, tokenizer, rows, None)
        second = _model(options, "second", target, tokenizer, rows, first)
        pair = D2SDAssistant.from_drafters(first, second)
        bind(pair, target, tokenizer)
        self._read_layers_of(second, options)
        if first.config.target_layer_ids != self.layer_ids:
            raise ValueError(
                f"role=both needs drafters that read the same layers; these read {first.config.target_layer_ids} and "
                f"{self.layer_ids}. Train them one by one."
            )
        rows = self._with_features(rows, options, target, accelerator)
        trainee = PairTrainee(pair.to(accelerator.device), lambda model: _trainee(model, options, target))
        self._first_trainee = trainee.parts[0]
        TrainingRun.__init__(self, options, target, accelerator, trainee, rows)

    def batch(self, rows: list[Row], generator: torch.Generator) -> list[Blocks]:
        anchors = draw_anchors(rows, self.options.anchors, generator)
        features, teachers = self.features(rows), self._teachers_of(rows)
        lengths = torch.zeros_like(anchors), self._prefix_lengths(rows, features, anchors, generator)
        configs = self.first.config, self.trainee.model.second.config
        return [
            cut_blocks(rows, features, anchors, length, *rest)
            for length, *rest in zip(lengths, configs, [teachers] * 2)
        ]

    def measure(self, model: D2SDAssistant) -> float:
        rows = self.held_out[: self.options.eval_rows]
        return acceptance_length(self.target, model.to(self.target.dtype), rows, self.options.eval_tokens)


class PairTrainee(nn.Module):
    """Both drafters of a pair in training, each on its own blocks."""

    def __init__(self, pair: D2SDAssistant, trainee: Callable[[D2SDDrafterModel], Trainee]):
        super().__init__()
        self.model = pair.float().train()
        self.parts = [trainee(drafter) for drafter in pair.drafters]  # in a list: their parameters are the pair's

    def forward(self, blocks: list[Blocks]) -> tuple[Tensor]:
        return (sum(part(its)[0] for part, its in zip(self.parts, blocks)),)


def _trainee(model: D2SDDrafterModel, options: TrainOptions, target) -> Trainee:
    alone = options.train == "path_head"
    if model.path_head is not None:
        model.path_head.dropout = options.path_dropout
    return Trainee(
        model, target, options.loss, options.tau, options.loss_chunk, options.distill_weight, path_head_alone=alone
    )


def _model(
    options: TrainOptions, role: str, target, tokenizer, rows: list[Row], first: D2SDDrafterModel | None
) -> D2SDDrafterModel:
    """The drafter to train: a new one, or that of `options.init` with this role."""
    if options.init is None:
        model = _new_model(options, target, tokenizer, rows, first)
    else:
        model = _loaded_model(options, role, target, tokenizer, rows)
    if first is not None and options.draft_vocab_size is not None:
        if first.config.draft_vocab_size == options.draft_vocab_size:
            model.draft_token_ids.copy_(first.draft_token_ids)  # what both can say is the same
    return model


def _load_first(options: TrainOptions, device: torch.device) -> D2SDDrafterModel | None:
    if options.role != "second" or options.first is None:
        return None
    first = load_drafter(options.first, "first", dtype=torch.float32)
    return first.to(device).eval().requires_grad_(False)


def _new_model(
    options: TrainOptions, target, tokenizer, rows: list[Row], first: D2SDDrafterModel | None
) -> D2SDDrafterModel:
    changes = {name: getattr(options, option) for option, name in _SHAPE.items()}
    changes |= dict(
        layer_types=["sliding_attention"] * options.num_layers if options.sliding_window else None,
        draft_vocab_size=options.draft_vocab_size,
        mask_token_id=_mask_token_id(options, tokenizer, first),
        path_text_weight=None if options.path_rank is None else options.path_text_weight,
    )
    config = drafter_config(target, tokenizer, rows, **changes)
    set_attention(config, options.attention)
    return new_drafter(config, target, rows, options.init_layers, options.seed)


def _loaded_model(options: TrainOptions, role: str, target, tokenizer, rows: list[Row]) -> D2SDDrafterModel:
    """The drafter of `options.init` in float32, with a draft vocabulary chosen anew if one is asked for.

    Its calibration is not kept, since it was of other weights.

    Raises:
        ValueError: for an option that asks for another shape than the drafter has, or a drafter without a mask token.
    """
    model = load_drafter(options.init, role, dtype=torch.float32, attn_implementation=options.attention)
    config = model.config
    if config.vocab_size is None:
        config.vocab_size = target.config.get_text_config(decoder=True).vocab_size
    if config.mask_token_id is None:
        config.mask_token_id = _mask_token_id(options, tokenizer, None)
    if config.mask_token_id is None:
        raise ValueError(f"{options.init} does not say which token masks what it shall draft: pass --mask_token.")
    seen = {option: getattr(config, name) for option, name in _SHAPE.items()}
    if config.path_rank is None:
        del seen["path_rank"]  # one may be added
    seen["mask_token"] = tokenizer.convert_ids_to_tokens(config.mask_token_id)
    defaults = {field.name: field.default for field in dataclasses.fields(options)} | {"block_size": None}
    differing = [
        f"{option} is {value!r}, asked for {getattr(options, option)!r}"
        for option, value in seen.items()
        if getattr(options, option) not in (value, defaults[option])
    ]
    if differing:
        raise ValueError(
            f"{options.init} keeps its shape when it is trained further: {'; '.join(differing)}. Pass its own values, "
            "or none but --block_size."
        )
    if options.draft_vocab_size is not None:  # no weights depend on it: the head is the target's
        if config.own_head:
            raise ValueError(f"{options.init} has a head of its own, whose tokens cannot be chosen anew.")
        config.draft_vocab_size = options.draft_vocab_size
        model.register_buffer("draft_token_ids", frequent_tokens(rows, config))
    config.confidence_temperatures = None
    if options.path_rank is not None and model.path_head is None:
        torch.manual_seed(options.seed)
        config.path_rank, config.path_width = options.path_rank, 2 * options.path_rank
        config.path_text_weight = options.path_text_weight
        model.path_head = D2SDPathHead(config)
        model.path_head.reset()
    return model


def _mask_token_id(options: TrainOptions, tokenizer, first: D2SDDrafterModel | None) -> int | None:
    if options.mask_token is None:
        return first.config.mask_token_id if first is not None else None
    token = tokenizer.convert_tokens_to_ids(options.mask_token)
    if token is None or token == tokenizer.unk_token_id:
        raise ValueError(f"mask_token {options.mask_token!r} is no token of the target's tokenizer.")
    return token


@torch.inference_mode()
def acceptance_length(target, assistant: D2SDAssistant, rows: list[Row], max_new_tokens: int) -> float:
    """Tokens committed in a target pass, over the greedy answers to all rows' prompts.

    Every cycle has the pair's own tree: what pays on this machine says nothing of the drafters.
    """
    options = dict(assistant_model=assistant, d2sd_auto=False, do_sample=False, max_new_tokens=max_new_tokens)
    tokens = cycles = 0
    for row in rows:
        prompt = row.tokens[None, : row.prompt_length].to(target.device)
        target.generate(prompt, **options)
        tokens += sum(assistant.last_stats.committed_per_cycle)
        cycles += len(assistant.last_stats.committed_per_cycle)
    return tokens / max(cycles, 1)
