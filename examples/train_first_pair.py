"""Train a first small pair of drafters for a Llama target, on a CPU, from responses that the target wrote.

    python examples/train_first_pair.py features --target TARGET --data data/
    python examples/train_first_pair.py check --target TARGET --data data/
    python examples/train_first_pair.py train --target TARGET --data data/ --role first --out runs/first
    python examples/train_first_pair.py train --target TARGET --data data/ --role second --out runs/second
    python examples/train_first_pair.py join --first runs/first/drafter --second runs/second/drafter --out pair/

`data/` holds the shards of `distill_responses.py`. Every stage can be stopped and started again: `features` skips the
shards it has, `train` goes on from its last checkpoint. What is random is drawn from the seed and the step alone, so
the step is the position in the data. The drafters use the target's frozen embedding, and of its head the rows that
belong to the most frequent tokens.
"""

import argparse
import json
import math
import os
import random
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel, tokenizer_fingerprint
from hf_d2sd.capturing import embeddings_first, select_layers
from hf_d2sd.drafting import draft_head

NO_LOSS = -100
HELD_OUT = 50  # one row in so many is held out


# Data ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A prompt with the target's response, and the target's hidden states at every token."""

    tokens: Tensor  # (T,)
    features: Tensor  # (T, F)
    prompt_length: int

    @property
    def is_held_out(self) -> bool:
        """By content, so that a row stays on its side when shards are added."""
        return zlib.crc32(self.tokens.numpy().tobytes()) % HELD_OUT == 0


def shard_paths(data: Path) -> list[Path]:
    return sorted(data.glob("rows-*.safetensors"))


def features_path(shard: Path) -> Path:
    return shard.with_name(shard.name.replace("rows-", "features-"))


def save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def load_rows(data: Path) -> list[Row]:
    """The rows of all shards that have features and a response of at least two tokens."""
    rows = []
    for path in shard_paths(data):
        if not features_path(path).exists():
            continue
        shard = load_file(path)
        lengths = shard["lengths"].tolist()
        tokens = shard["tokens"].split(lengths)
        features = load_file(features_path(path))["features"].split(lengths)
        rows += map(Row, tokens, features, shard["prompt_lengths"].tolist())
    return [row for row in rows if len(row.tokens) - row.prompt_length >= 2]


def frequent_tokens(data: Path, vocab_size: int, count: int, always: list[int], response_weight: int = 4) -> Tensor:
    """(count,), ascending: the tokens that the shards hold most often, low ids where too few occur."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for path in shard_paths(data):
        shard = load_file(path)
        lengths = shard["lengths"].tolist()
        for tokens, prompt_length in zip(shard["tokens"].split(lengths), shard["prompt_lengths"].tolist()):
            counts += tokens[:prompt_length].bincount(minlength=vocab_size)
            counts += response_weight * tokens[prompt_length:].bincount(minlength=vocab_size)
    counts[always] = counts.max() + 1
    return counts.argsort(descending=True, stable=True)[:count].sort().values


@torch.inference_mode()
def row_features(target, rows: list[Tensor], layer_ids: list[int]) -> list[Tensor]:
    """(T, F) for each row (T,). Padding stands on the right, out of every token's causal sight: it needs no mask."""
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).long()  # (B, T)
    output = target.model(tokens, use_cache=False, output_hidden_states=select_layers(layer_ids))
    states = embeddings_first(output.hidden_states, selected=True)
    features = torch.cat([states[i + 1] for i in layer_ids], dim=-1)  # (B, T, F)
    return [row_features[: len(row)] for row_features, row in zip(features, rows)]


def shard_features(target, shard: dict[str, Tensor], layer_ids: list[int], batch_size: int) -> Tensor:
    """(all the shard's tokens, F), bf16, in the shard's order."""
    rows = shard["tokens"].split(shard["lengths"].tolist())
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # neighbours of like length: little padding
    features = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for i, states in zip(batch, row_features(target, [rows[i] for i in batch], layer_ids)):
            features[i] = states.bfloat16()
    return torch.cat(features)


def run_features(args: argparse.Namespace) -> None:
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval()
    for path in shard_paths(args.data):
        if features_path(path).exists():
            continue
        features = shard_features(target, load_file(path), args.layers, args.batch_size)
        layer_ids = torch.tensor(args.layers)
        save_atomically({"features": features, "layer_ids": layer_ids}, features_path(path))
        print(f"{features_path(path).name}: {tuple(features.shape)}", flush=True)


# Blocks --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """N blocks of γ slots out of each of B rows, ready for one forward; S = N·γ."""

    context: Tensor  # (B, T, F)
    tokens: Tensor  # (B, S), the mask token at slots that are not visible
    position_ids: Tensor  # (B, T + S)
    attention_mask: Tensor  # (B, 1, S, T + S), bool
    labels: Tensor  # (B, N, γ), NO_LOSS at visible slots and past the row's end
    distance: Tensor  # (B, N, γ), from the last visible slot


def draw_anchors(rows: list[Row], count: int, generator: torch.Generator) -> Tensor:
    """(B, N): one response position from each of N equal parts of every response, its last token left out."""
    first = torch.tensor([row.prompt_length for row in rows])[:, None]
    span = torch.tensor([len(row.tokens) - 1 - row.prompt_length for row in rows])[:, None]
    part = (torch.arange(count) + torch.rand(len(rows), count, generator=generator)) / count
    return first + (part * span).long().clamp(max=span - 1)


def draw_prefix_lengths(shape: tuple[int, int], block_size: int, base: float, generator: torch.Generator) -> Tensor:
    """(B, N): v = 0..γ-2 with P(v) ∝ base^v; base 0 is the first drafter's, whose only visible token is the anchor."""
    weights = torch.tensor(base) ** torch.arange(block_size - 1)
    return torch.multinomial(weights, math.prod(shape), replacement=True, generator=generator).view(shape)


def cut_blocks(rows: list[Row], anchors: Tensor, prefix_lengths: Tensor, config: D2SDDrafterConfig) -> Blocks:
    """Blocks at `anchors` (B, N) that show the anchor and the `prefix_lengths` (B, N) tokens after it."""
    tokens = nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True).long()  # (B, T)
    context = nn.utils.rnn.pad_sequence([row.features for row in rows], batch_first=True)
    lengths = torch.tensor([len(row.tokens) for row in rows])[:, None, None]

    slot = torch.arange(config.block_size)
    position = anchors[..., None] + slot  # (B, N, γ)
    exists = position < lengths
    real = tokens.gather(1, position.clamp(max=tokens.shape[1] - 1).flatten(1)).view_as(position)
    visible = exists & (slot <= prefix_lengths[..., None])
    past = torch.arange(tokens.shape[1]).expand_as(tokens)
    return Blocks(
        context=context,
        tokens=torch.where(visible, real, config.mask_token_id).flatten(1),
        position_ids=torch.cat([past, position.flatten(1)], dim=1),
        attention_mask=block_mask(anchors, tokens.shape[1], config.block_size),
        labels=torch.where(exists & ~visible, real, NO_LOSS),
        distance=slot - prefix_lengths[..., None],
    )


def block_mask(anchors: Tensor, context_length: int, block_size: int) -> Tensor:
    """(B, 1, S, T + S): a block sees the context before its anchor (B, N), and itself in both directions."""
    anchor_of = anchors.repeat_interleave(block_size, dim=1)  # (B, S)
    before = torch.arange(context_length) < anchor_of[..., None]  # (B, S, T)
    block_of = torch.arange(anchors.shape[1]).repeat_interleave(block_size)
    own = (block_of[:, None] == block_of).expand(len(anchors), -1, -1)  # (B, S, S)
    return torch.cat([before, own], dim=-1)[:, None]


def batch_at(rows: list[Row], step: int, size: int, seed: int) -> list[Row]:
    """The step's batch: rows of about the same length, every row once an epoch."""
    epoch, index = divmod(step, len(rows) // size)
    rng = random.Random(f"{seed}-{epoch}")
    order = sorted(rows, key=lambda row: len(row.tokens) + rng.uniform(-32, 32))
    starts = list(range(0, len(rows) - size + 1, size))
    rng.shuffle(starts)
    return order[starts[index] : starts[index] + size]


# Drafters ------------------------------------------------------------------------------------------------------------


def drafter_config(target, tokenizer, args: argparse.Namespace) -> D2SDDrafterConfig:
    """A drafter with the target's own layer shape."""
    names = (
        "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim hidden_act "
        "max_position_embeddings rms_norm_eps rope_parameters bos_token_id eos_token_id pad_token_id"
    )
    return D2SDDrafterConfig(
        **{name: getattr(target.config, name) for name in names.split()},
        num_hidden_layers=args.num_layers,
        num_target_layers=target.config.num_hidden_layers,
        target_layer_ids=args.layers,
        qk_norm=False,
        block_size=args.block_size,
        draft_vocab_size=args.draft_vocab_size,
        mask_token_id=tokenizer.convert_tokens_to_ids(args.mask_token),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )


@torch.no_grad()
def init_from_target(model: D2SDDrafterModel, target, norm_scale: float = 0.25) -> None:
    """The features' way in and the final norm start as the target's: `fc` passes its last feature layer through.

    The layers start at random: they read embeddings, and the target's top layers, which read far larger hidden
    states, drown the anchor's embedding and learn slower. The final norm is scaled down, so that random layers do not
    begin with confident logits.
    """
    last, width = model.config.target_layer_ids[-1], model.config.target_hidden_size
    model.hidden_norm.load_state_dict(target.model.layers[last + 1].input_layernorm.state_dict())
    model.fc.weight.normal_(std=1e-3)
    model.fc.weight[:, -width:] += torch.eye(width)
    model.norm.weight.copy_(norm_scale * target.model.norm.weight)


class Trainee(nn.Module):
    """A drafter in training, with the target's frozen embedding and head; parameters are the drafter's alone."""

    def __init__(self, model: D2SDDrafterModel, target):
        super().__init__()
        self.model = model
        self._frozen = (target.get_input_embeddings(), target.get_output_embeddings())  # a tuple: no submodules
        self.rebuild_head()

    def rebuild_head(self) -> None:
        """After `draft_token_ids` have changed."""
        self.model._pruned_head = None
        self._head = draft_head(self.model, self._frozen[1])
        self._draft_index = torch.full((self.model.config.vocab_size,), NO_LOSS)
        self._draft_index[self.model.draft_token_ids] = torch.arange(len(self.model.draft_token_ids))

    def hidden(self, blocks: Blocks) -> Tensor:
        """(B, N, γ, H)."""
        output = self.model(
            noise_embeds=self._frozen[0](blocks.tokens).to(self.model.dtype),
            context_hidden_states=blocks.context.to(self.model.dtype),
            position_ids=blocks.position_ids,
            attention_mask=blocks.attention_mask,
        )
        return output.last_hidden_state.view(*blocks.labels.shape, -1)

    def logits(self, blocks: Blocks) -> Tensor:
        """(M, V'): of the M slots that have labels."""
        return self._head(self.hidden(blocks)[blocks.labels != NO_LOSS]).float()

    def loss(self, blocks: Blocks, tau: float) -> tuple[Tensor, Tensor]:
        """The weighted cross-entropy (), and which labelled slots are right (M,); Eq. 7 of arXiv 2606.04446."""
        labelled = blocks.labels != NO_LOSS
        labels = self._draft_index[blocks.labels[labelled]]  # tokens outside the draft vocabulary: NO_LOSS
        weights = torch.exp(-(blocks.distance[labelled] - 1) / tau) * (labels != NO_LOSS)
        logits = self.logits(blocks)
        losses = nn.functional.cross_entropy(logits, labels, ignore_index=NO_LOSS, reduction="none")
        return (losses * weights).sum() / weights.sum(), logits.detach().argmax(-1) == labels


def new_trainee(args: argparse.Namespace) -> Trainee:
    target = AutoModelForCausalLM.from_pretrained(args.target, dtype=torch.bfloat16).eval().requires_grad_(False)
    config = drafter_config(target, AutoTokenizer.from_pretrained(args.target), args)
    torch.manual_seed(args.seed)
    model = D2SDDrafterModel(config)
    init_from_target(model, target)
    always = [config.eos_token_id]
    model.draft_token_ids.copy_(frequent_tokens(args.data, config.vocab_size, config.draft_vocab_size, always))
    return Trainee(model, target)


# Checks --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_masked_forward(trainee: Trainee, row: Row) -> None:
    """Blocks trained side by side must give what decoding gives: one block, its context, no mask.

    Raises:
        RuntimeError: where a hidden state differs by more than 1e-4.
    """
    generator = torch.Generator().manual_seed(0)
    anchors = draw_anchors([row], 8, generator)
    config = trainee.model.config
    blocks = cut_blocks([row], anchors, draw_prefix_lengths(anchors.shape, config.block_size, 0.9, generator), config)
    together = trainee.hidden(blocks)[0]  # (N, γ, H)
    embeds = trainee._frozen[0](blocks.tokens.view(1, -1, config.block_size)).float()  # (1, N, γ, H)
    for n, anchor in enumerate(anchors[0]):
        alone = trainee.model(embeds[:, n], row.features[None, :anchor].float()).last_hidden_state[0]
        if not torch.allclose(alone, together[n], atol=1e-4):
            raise RuntimeError(f"Block {n}, anchor {int(anchor)}: differs by {(alone - together[n]).abs().max():.2e}.")


def run_check(args: argparse.Namespace) -> None:
    """The masks, and whether two rows can be learned by heart."""
    rows = load_rows(args.data)[:2]
    trainee = new_trainee(args)
    check_masked_forward(trainee, rows[0])
    optimizer = new_optimizer(trainee, args)
    losses = []
    for step in range(60):
        blocks = draw_blocks(rows, step % 2, trainee.model.config, args)
        losses.append(training_step(trainee, optimizer, blocks, args)[0])
        if step % 10 == 0:
            print(f"overfitting two rows: step {step}  loss {losses[-1]:.3f}", flush=True)
    if losses[-1] > losses[0] / 4:
        raise RuntimeError(f"60 steps on two rows brought the loss only from {losses[0]:.3f} to {losses[-1]:.3f}.")


# Training ------------------------------------------------------------------------------------------------------------


def new_optimizer(trainee: Trainee, args: argparse.Namespace) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trainee.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True
    )


def learning_rate(progress: float, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth; `progress` is the share of the training time that has passed."""
    if progress < args.warmup:
        return args.lr * (progress + 1e-3) / (args.warmup + 1e-3)
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    return args.lr * (0.1 + 0.9 * cosine)


def draw_blocks(rows: list[Row], step: int, config: D2SDDrafterConfig, args: argparse.Namespace) -> Blocks:
    generator = torch.Generator().manual_seed(1_000_003 * args.seed + step)
    anchors = draw_anchors(rows, args.anchors, generator)
    base = args.prefix_base if args.role == "second" else 0.0
    return cut_blocks(rows, anchors, draw_prefix_lengths(anchors.shape, config.block_size, base, generator), config)


def training_step(trainee: Trainee, optimizer, blocks: Blocks, args: argparse.Namespace) -> tuple[float, list[float]]:
    """One update; returns the loss and the accuracy at each distance from the last visible slot."""
    with torch.autocast("cpu", torch.bfloat16):
        loss, right = trainee.loss(blocks, args.tau)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    optimizer.step()
    distance = blocks.distance[blocks.labels != NO_LOSS]
    accuracy = [right[distance == d].float().mean().item() for d in range(1, trainee.model.config.block_size)]
    return loss.item(), accuracy


@torch.no_grad()
def evaluate(trainee: Trainee, rows: list[Row], prefix_length: int, batch_size: int = 8) -> dict:
    """Accuracy at each slot after the prefix, and the mean number of leading right slots plus one (the bonus).

    Teacher-forced: every context and prefix is the target's own text. Tokens outside the draft vocabulary are misses.
    """
    right = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        anchors = draw_anchors(batch, 32, torch.Generator().manual_seed(start))
        blocks = cut_blocks(batch, anchors, torch.full_like(anchors, prefix_length), trainee.model.config)
        whole = (blocks.labels[..., prefix_length + 1 :] != NO_LOSS).all(-1)  # blocks that end within their row
        labelled = blocks.labels != NO_LOSS
        with torch.autocast("cpu", torch.bfloat16):
            tokens = trainee.model.draft_token_ids[trainee.logits(blocks).argmax(-1)]
        hits = torch.zeros_like(labelled)
        hits[labelled] = tokens == blocks.labels[labelled]
        right.append(hits[whole][:, prefix_length + 1 :])
    right = torch.cat(right).float()  # (blocks, γ - 1 - prefix_length)
    return {
        "prefix_length": prefix_length,
        "blocks": len(right),
        "accuracy": [round(x, 4) for x in right.mean(0).tolist()],
        "expected_acceptance": round(1 + right.cumprod(1).sum(1).mean().item(), 4),
    }


@dataclass
class Run:
    """A training run that can stop after any step: what it needs to go on is in `checkpoint.safetensors`."""

    trainee: Trainee
    optimizer: torch.optim.AdamW
    out: Path
    step: int = 0
    elapsed: float = 0.0  # seconds of training so far, over all restarts

    def load(self) -> None:
        path = self.out / "checkpoint.safetensors"
        if not path.exists():
            return
        tensors = load_file(path)
        self.step, self.elapsed = int(tensors.pop("step")), float(tensors.pop("elapsed"))
        weights, moments = {}, defaultdict(dict)
        for name, tensor in tensors.items():
            part, *rest = name.split("/")
            if part == "trainee":
                weights[rest[0]] = tensor
            else:
                moments[int(rest[0])][rest[1]] = tensor
        self.trainee.load_state_dict(weights)
        self.trainee.rebuild_head()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": dict(moments)})

    def save(self) -> None:
        tensors = {f"trainee/{name}": tensor for name, tensor in self.trainee.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in moments.items()}
        tensors |= {"step": torch.tensor(self.step), "elapsed": torch.tensor(self.elapsed, dtype=torch.float64)}
        save_atomically(tensors, self.out / "checkpoint.safetensors")
        drafter = D2SDDrafterModel(self.trainee.model.config)
        drafter.load_state_dict(self.trainee.model.state_dict())
        drafter.to(torch.bfloat16).save_pretrained(self.out / "drafter")

    def log(self, **values) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.elapsed), **values})
        print(line, flush=True)
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


def train_for(run: Run, rows: list[Row], seconds: float, args: argparse.Namespace) -> Iterator[tuple[float, Tensor]]:
    """Train until `seconds` have passed in all; yields each step's loss and accuracies (γ-1,)."""
    last = time.monotonic()
    while run.elapsed < seconds:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.elapsed / seconds, args)
        batch = batch_at(rows, run.step, args.rows, args.seed)
        blocks = draw_blocks(batch, run.step, run.trainee.model.config, args)
        loss, accuracy = training_step(run.trainee, run.optimizer, blocks, args)
        run.step += 1
        now = time.monotonic()
        run.elapsed, last = run.elapsed + now - last, now
        yield loss, torch.tensor(accuracy)


def log_training(run: Run, window: list[tuple[float, Tensor]]) -> None:
    losses, accuracies = zip(*window)
    accuracy = torch.stack(accuracies).nanmean(0).tolist()
    run.log(loss=round(sum(losses) / len(losses), 4), accuracy=[round(x, 4) for x in accuracy])
    window.clear()


def log_held_out(run: Run, held_out: list[Row], role: str) -> None:
    prefix_lengths = (0,) if role == "first" else (0, 1, 2, 4)
    run.log(held_out=[evaluate(run.trainee, held_out, v) for v in prefix_lengths])


def run_train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    all_rows = load_rows(args.data)
    held_out = [row for row in all_rows if row.is_held_out]
    rows = [row for row in all_rows if not row.is_held_out]
    trainee = new_trainee(args)
    check_masked_forward(trainee, held_out[0])
    run = Run(trainee, new_optimizer(trainee, args), args.out)
    run.load()
    run.log(rows=len(rows), tokens=sum(len(row.tokens) for row in rows), held_out_rows=len(held_out))
    window, saved = [], run.elapsed
    for result in train_for(run, rows, 60 * args.minutes, args):
        window.append(result)
        if len(window) == args.log_every:
            log_training(run, window)
        if run.elapsed - saved > 60 * args.save_every:
            saved = run.elapsed
            run.save()
            log_held_out(run, held_out, args.role)
    run.save()
    log_held_out(run, held_out, args.role)


def run_join(args: argparse.Namespace) -> None:
    first, second = (
        D2SDDrafterModel.from_pretrained(path, dtype=torch.bfloat16) for path in (args.first, args.second)
    )
    if not torch.equal(first.draft_token_ids, second.draft_token_ids):
        raise ValueError("The drafters have different draft vocabularies: train both on the same shards.")
    pair = D2SDAssistant.from_drafters(first, second, num_branches=args.num_branches, tree_budget=args.tree_budget)
    pair.save_pretrained(args.out)


# Command line --------------------------------------------------------------------------------------------------------


def add_training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--role", choices=["first", "second"], default="first")
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--mask-token", default="<empty_output>", help="a token that never occurs in the data")
    parser.add_argument("--rows", type=int, default=4, help="rows in a step")
    parser.add_argument("--anchors", type=int, default=32, help="blocks in a row")
    parser.add_argument("--prefix-base", type=float, default=0.9, help="second: P(v) is proportional to base^v")
    parser.add_argument("--tau", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.04)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    commands = {"features": run_features, "check": run_check, "train": run_train, "join": run_join}
    features, check, train, join = (stages.add_parser(name) for name in commands)
    for stage, command in zip((features, check, train, join), commands.values()):
        stage.set_defaults(run=command)
        stage.add_argument("--threads", type=int, default=1)
    for stage in (features, check, train):
        stage.add_argument("--target", required=True)
        stage.add_argument("--data", type=Path, required=True)
        stage.add_argument("--layers", type=int, nargs="+", default=[9, 18, 27], help="of the target: features")
    features.add_argument("--batch-size", type=int, default=16)
    add_training_options(check)
    add_training_options(train)
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--minutes", type=float, default=38, help="of training in all; the learning rate follows it")
    train.add_argument("--log-every", type=int, default=20, help="steps")
    train.add_argument("--save-every", type=float, default=3, help="minutes")
    join.add_argument("--first", required=True)
    join.add_argument("--second", required=True)
    join.add_argument("--num-branches", type=int, default=4)
    join.add_argument("--tree-budget", type=int)
    join.add_argument("--out", required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
