"""Training: blocks see what they may, the loss is the paper's, a killed run goes on, and drafters learn."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCAB, tiny_drafter, tiny_target
from words import save_word_target

from hf_d2sd import D2SDAssistant, D2SDDrafterModel
from hf_d2sd.training import loop
from hf_d2sd.training import trainer as module
from hf_d2sd.training.blocks import (
    NO_LABEL,
    cut_blocks,
    dense_mask,
    draw_anchors,
    draw_prefix_lengths,
    epoch_batches,
    sparse_mask,
)
from hf_d2sd.training.distill import DistillOptions, distill
from hf_d2sd.training.drafters import Trainee
from hf_d2sd.training.features import FeatureCache, TeacherCache, compute_features, compute_teacher, read_placed_rows
from hf_d2sd.training.losses import Labels, slot_losses, slot_weights
from hf_d2sd.training.options import TrainOptions
from hf_d2sd.training.pair import JoinOptions, join
from hf_d2sd.training.shards import Row, read_rows, shard_paths
from hf_d2sd.training.trainer import train


def random_rows(*lengths: int, prompt_length: int = 5) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    return [Row(torch.randint(2, VOCAB, (length,), generator=generator), prompt_length) for length in lengths]


def random_blocks(drafter, rows, count=6, base=0.9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    anchors = draw_anchors(rows, count, generator)
    prefix_lengths = draw_prefix_lengths(anchors.shape, drafter.config.block_size, base, generator)
    features = [feature.clone() for feature in compute_features(tiny_target(), rows, drafter.config.target_layer_ids)]
    return cut_blocks(rows, features, anchors, prefix_lengths, drafter.config)


class TestBlocks:
    @pytest.mark.parametrize("kind", ["plain", "sliding", "causal", "layerwise"])
    def test_blocks_side_by_side_are_what_decoding_computes_for_each_alone(self, kind):
        windows = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6)
        changes = {
            "plain": {},
            "sliding": windows,
            "causal": windows | {"causal_layer_types": ["sliding_attention"]},
            "layerwise": {"feature_fusion": "layerwise"},
        }[kind]
        drafter, rows = tiny_drafter(6, **changes), random_rows(30, 21, 12)
        if kind == "layerwise":
            torch.nn.init.normal_(drafter.layer_weights)
        blocks = random_blocks(drafter, rows)
        trainee = Trainee(drafter, tiny_target())
        with torch.no_grad():
            together = trainee.hidden(blocks)
            embeds = tiny_target().get_input_embeddings()(blocks.tokens).view(*blocks.labels.shape, -1)
            for b in range(len(rows)):
                for n, anchor in enumerate(blocks.anchors[b].tolist()):
                    alone = drafter(embeds[b, n][None], blocks.context[b, None, :anchor]).last_hidden_state[0]
                    torch.testing.assert_close(together[b, n], alone, atol=1e-5, rtol=0)

    def test_a_block_never_sees_its_own_future_or_another_block(self):
        drafter, rows = tiny_drafter(6), random_rows(30, 21)
        blocks = random_blocks(drafter, rows)
        embeds = tiny_target().get_input_embeddings()(blocks.tokens).detach().requires_grad_()
        context = blocks.context.clone().requires_grad_()
        mask = dense_mask(blocks.anchors, context.shape[1], 6)
        hidden = drafter(embeds, context, mask, blocks.position_ids).last_hidden_state.view(*blocks.labels.shape, -1)
        for b in range(2):
            for n, anchor in enumerate(blocks.anchors[b].tolist()):
                by_embeds, by_context = torch.autograd.grad(
                    hidden[b, n].pow(2).sum(), (embeds, context), retain_graph=True
                )
                own = torch.zeros(by_embeds.shape[:2], dtype=torch.bool)
                own[b, 6 * n : 6 * n + 6] = True
                past = torch.zeros(by_context.shape[:2], dtype=torch.bool)
                past[b, :anchor] = True
                assert (by_embeds.abs().sum(-1) > 0).equal(own)
                assert (by_context.abs().sum(-1) > 0).equal(past)

    @pytest.mark.parametrize("rule", [(None,), (3,), (None, True), (3, True)])
    def test_the_sparse_mask_has_the_same_rule(self, rule):
        anchors = torch.tensor([[5, 9, 17], [6, 6, 8]])
        dense, sparse = dense_mask(anchors, 20, 4, *rule), sparse_mask(anchors, 20, 4, *rule)
        queries, keys = torch.arange(12)[:, None], torch.arange(32)[None]
        for row in range(2):
            rule = sparse.mask_mod(torch.tensor(row), None, queries, keys)
            assert rule.equal(dense[row, 0])

    def test_labels_are_the_rows_tokens_after_the_visible_ones(self):
        drafter, rows = tiny_drafter(6), random_rows(12)
        anchors, prefix_lengths = torch.tensor([[5, 9]]), torch.tensor([[2, 0]])
        features = compute_features(tiny_target(), rows, [0, 2])
        blocks = cut_blocks(rows, features, anchors, prefix_lengths, drafter.config)
        row = rows[0].tokens.tolist()
        assert blocks.tokens.view(2, 6).tolist() == [[*row[5:8], 1, 1, 1], [row[9], 1, 1, 1, 1, 1]]
        assert blocks.labels[0].tolist() == [
            [NO_LABEL] * 3 + row[8:11],
            [NO_LABEL, *row[10:12]] + [NO_LABEL] * 3,  # the row ends
        ]
        assert blocks.distance[0].tolist() == [[-2, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]

    def test_anchors_cover_the_response_and_leave_its_last_token(self):
        rows = random_rows(30, 7)
        drawn = torch.cat([draw_anchors(rows, 8, torch.Generator().manual_seed(seed)) for seed in range(200)], dim=1)
        assert set(drawn[0].tolist()) == set(range(5, 29))
        assert set(drawn[1].tolist()) == {5}

    def test_prefix_lengths_follow_the_truncated_geometric_prior(self):
        drawn = draw_prefix_lengths((50_000,), 8, 0.7, torch.Generator().manual_seed(0))
        shares = drawn.bincount(minlength=7) / 50_000
        expected = torch.tensor([0.7**v / sum(0.7**u for u in range(7)) for v in range(7)])
        assert (shares - expected).abs().max() < 0.01
        assert draw_prefix_lengths((99,), 8, 0.0, torch.Generator()).eq(0).all()

    def test_every_row_comes_once_an_epoch_in_another_order(self):
        lengths = [(7 * i) % 50 + 4 for i in range(64)]
        epochs = [epoch_batches(lengths, epoch, 8, seed=3) for epoch in range(3)]
        for epoch in epochs:
            assert sorted(sum(epoch, [])) == list(range(64))
        assert epochs[0] != epochs[1] != epochs[2]
        for batch in epochs[0]:
            assert max(lengths[i] for i in batch) <= 2 * min(lengths[i] for i in batch) + 4

    def test_rows_that_fill_no_batch_are_others_in_each_epoch(self):
        left_out = {next(iter(set(range(9)) - set(sum(epoch_batches([5] * 9, e, 8, 0), [])))) for e in range(20)}
        assert len(left_out) > 3

    @pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3_image"])
    def test_features_are_the_targets_hidden_states(self, family):
        rows = random_rows(14, 9)
        for row, features in zip(rows, compute_features(tiny_target(family), rows, [0, 2])):
            with torch.no_grad():
                states = tiny_target(family)(row.tokens[None], output_hidden_states=True).hidden_states
            torch.testing.assert_close(features, torch.cat([states[1], states[3]], -1)[0], atol=1e-3, rtol=1e-3)


class TestLoss:
    def test_decay_is_equation_7(self):
        """Brute force over every slot of every block."""
        drafter, rows = tiny_drafter(6), random_rows(30, 12)
        blocks = random_blocks(drafter, rows)
        with torch.no_grad():
            loss, right, probabilities = Trainee(drafter, tiny_target(), "decay", tau=3.0, chunk=5)(blocks)
            logits = tiny_target().lm_head(Trainee(drafter, tiny_target()).hidden(blocks))
        total = weights = 0.0
        for b, n, slot in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(6)).tolist():
            label = int(blocks.labels[b, n, slot])
            if label == NO_LABEL:
                assert probabilities[b, n, slot] == 0 and not right[b, n, slot]
                continue
            probability = logits[b, n, slot].softmax(-1)[label]
            weight = math.exp(-(int(blocks.distance[b, n, slot]) - 1) / 3.0)
            total, weights = total - weight * math.log(probability), weights + weight
            assert abs(float(probabilities[b, n, slot] - probability)) < 1e-5
            assert bool(right[b, n, slot]) == (int(logits[b, n, slot].argmax()) == label)
        assert abs(float(loss) - total / weights) < 1e-4

    def test_dpace_weights_are_the_gradient_of_the_expected_length(self):
        log_p = torch.randn(2, 3, 5).sub(1).requires_grad_()
        distance = torch.arange(6).expand(2, 3, 6) - torch.tensor([0, 1, 3])[:, None]
        losses = torch.cat([torch.full((2, 3, 1), torch.inf), -log_p], dim=-1).detach()
        weights = slot_weights("dpace", losses, distance >= 1, distance, tau=1.0)
        for b in range(2):
            for n, visible in enumerate([0, 1, 3]):
                length = log_p[b, n, visible:].cumsum(-1).exp().sum()
                (gradient,) = torch.autograd.grad(length, log_p, retain_graph=True)
                expected = gradient[b, n] / gradient[b, n].sum()
                torch.testing.assert_close(weights[b, n, 1:], expected, atol=1e-6, rtol=1e-5)

    def test_logits_exist_for_one_chunk_at_a_time(self):
        sizes = []

        def head(hidden):
            sizes.append(len(hidden))
            return hidden @ torch.ones(8, 11)

        hidden = torch.randn(103, 8, requires_grad=True)
        losses, _, _ = slot_losses(hidden, Labels(torch.zeros(103, dtype=torch.long)), head, chunk=10)
        losses.sum().backward()
        assert max(sizes) == 10 and sum(sizes) == 103  # and not again in the backward pass

    @pytest.mark.parametrize("soft", [0.0, 0.4])
    def test_the_gradient_is_that_of_autograd(self, soft):
        """Against torch's own cross-entropy; with labels that the head lacks, and a weight for each slot."""
        torch.manual_seed(0)
        hidden, head, weights = torch.randn(23, 8), torch.nn.Linear(8, 11), torch.rand(23)
        tokens = torch.randint(11, (23,))
        tokens[::5] = NO_LABEL
        teacher_ids, teacher = torch.rand(23, 11).topk(3).indices, torch.rand(23, 3).log()
        teacher_ids[::4, 1] = NO_LABEL

        ours = hidden.clone().requires_grad_()
        losses, entropies, right = slot_losses(ours, Labels(tokens, teacher_ids, teacher, soft), head, chunk=4)
        (losses * weights).sum().backward()

        plain = hidden.clone().requires_grad_()
        logits = head(plain)
        hard = torch.nn.functional.cross_entropy(logits, tokens, ignore_index=NO_LABEL, reduction="none")
        wanted = torch.zeros(23, 12)
        wanted.scatter_(1, torch.where(teacher_ids == NO_LABEL, 11, teacher_ids), teacher.exp())
        mixed = (1 - soft) * hard + soft * -(wanted[:, :11] * logits.log_softmax(-1)).sum(-1)
        (mixed * weights).sum().backward()
        torch.testing.assert_close(losses, mixed)
        torch.testing.assert_close(entropies, hard)
        torch.testing.assert_close(ours.grad, plain.grad)
        assert right.equal((logits.argmax(-1) == tokens) & (tokens != NO_LABEL))

    def test_of_equally_likely_tokens_the_first_is_the_draft(self):
        def head(hidden):
            return hidden @ torch.zeros(8, 5)

        _, _, right = slot_losses(torch.randn(5, 8), Labels(torch.arange(5)), head, chunk=5)
        assert right.tolist() == [True, False, False, False, False]

    @pytest.mark.parametrize("chunk", [1, 7, 1000])
    def test_chunks_change_nothing(self, chunk):
        drafter, rows = tiny_drafter(6, draft_vocab_size=9), random_rows(30, 12)
        blocks = random_blocks(drafter, rows)
        gradients = []
        for size in (64, chunk):
            drafter.zero_grad()
            loss, _, _ = Trainee(drafter, tiny_target(), chunk=size)(blocks)
            loss.backward()
            gradients.append((loss.detach(), drafter.fc.weight.grad.clone()))
        torch.testing.assert_close(*gradients)

    @pytest.mark.parametrize("scheme", ["decay", "dpace"])
    def test_tokens_outside_the_draft_vocabulary_have_no_part(self, scheme):
        drafter, rows = tiny_drafter(6, draft_vocab_size=9), random_rows(30)
        blocks = random_blocks(drafter, rows)
        loss, right, probabilities = Trainee(drafter, tiny_target(), scheme)(blocks)
        outside = (blocks.labels >= 9) | (blocks.labels == NO_LABEL)
        assert outside.any() and not right[outside].any() and (probabilities[outside] == 0).all()
        assert loss.isfinite()


class TestDistillation:
    """`distill_top_k`: the target's likeliest tokens beside the one that it wrote."""

    def test_the_teacher_is_the_targets_own_distribution(self):
        rows = random_rows(14, 9)
        for row, teacher in zip(rows, compute_teacher(tiny_target(), rows, top_k=3)):
            with torch.no_grad():
                expected = tiny_target()(row.tokens[None]).logits[0, :-1].log_softmax(-1).topk(3)
            assert teacher.ids[1:].equal(expected.indices)
            torch.testing.assert_close(teacher.log_probs[1:], expected.values, atol=1e-4, rtol=1e-4)
            assert teacher.log_probs[0].isneginf().all()

    @pytest.mark.parametrize("draft_vocab_size", [None, 9])
    def test_the_loss_is_a_brute_force_mixture(self, draft_vocab_size):
        drafter, rows = tiny_drafter(4, draft_vocab_size=draft_vocab_size), random_rows(20, 12)
        generator = torch.Generator().manual_seed(0)
        anchors = draw_anchors(rows, 5, generator)
        prefix_lengths = draw_prefix_lengths(anchors.shape, 4, 0.9, generator)
        features = [feature.clone() for feature in compute_features(tiny_target(), rows, [0, 2])]
        teachers = compute_teacher(tiny_target(), rows, 3)
        blocks = cut_blocks(rows, features, anchors, prefix_lengths, drafter.config, teachers)
        trainee = Trainee(drafter, tiny_target(), "decay", tau=2.0, chunk=4, soft=0.3)
        with torch.no_grad():
            loss, _, _ = trainee(blocks)
            logits = tiny_target().lm_head(trainee.hidden(blocks))[..., :draft_vocab_size].log_softmax(-1)
        total = weights = 0.0
        for b, n, slot in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(4)).tolist():
            label, place = int(blocks.labels[b, n, slot]), int(anchors[b, n]) + slot
            if label == NO_LABEL or label >= logits.shape[-1]:
                continue
            soft = sum(
                -math.exp(probability) * logits[b, n, slot, token]
                for token, probability in zip(teachers[b].ids[place].tolist(), teachers[b].log_probs[place].tolist())
                if token < logits.shape[-1]
            )
            weight = math.exp(-(int(blocks.distance[b, n, slot]) - 1) / 2.0)
            total, weights = total + weight * (0.7 * -logits[b, n, slot, label] + 0.3 * soft), weights + weight
        assert abs(float(loss) - float(total / weights)) < 1e-4


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_word_target(tmp_path_factory.mktemp("target"), layers=4)


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    """200 rows of the target's."""
    folder = tmp_path_factory.mktemp("data")
    letters = "abcdefghijklmn"
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in letters for b in letters))
    distill(DistillOptions(str(target), folder, [str(prompts)], dtype="float32", max_new_tokens=24, batch_size=64))
    return folder


def options(target, data, out, **changes) -> TrainOptions:
    settings = dict(
        target_layer_ids=[0, 2], block_size=4, anchors=6, rows=4, held_out=10, dtype="float32", mixed_precision="no",
        log_every=1, save_every=4, eval_every=8, max_steps=16, eval_rows=2, eval_tokens=12, lr=3e-3,
    )  # fmt: skip
    return TrainOptions(str(target), data, out, **{**settings, **changes})


def log_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(target, data, tmp_path_factory):
    """A run of the first drafter."""
    out = tmp_path_factory.mktemp("first")
    train(options(target, data, out))
    return out


class TestARun:
    def test_it_logs_measures_and_keeps_the_best(self, first):
        log = log_of(first)
        losses = [line["loss"] for line in log if "loss" in line]
        lengths = {line["step"]: line["acceptance_length"] for line in log if "acceptance_length" in line}
        assert len(losses) == 16 and losses[-1] < losses[0]
        assert set(lengths) == {8, 16} and min(lengths.values()) >= 1
        for name in ("last", "best"):
            assert D2SDDrafterModel.from_pretrained(first / name).dtype == torch.bfloat16

    def test_trackers_get_what_the_log_has(self, target, data, tmp_path, monkeypatch):
        class Recorder(GeneralTracker):
            name, requires_logging_directory, tracker = "recorder", False, None
            lines = []

            def __init__(self, run_name, **_):
                super().__init__()

            def store_init_configuration(self, values):
                self.config = values

            def log(self, values, step, **_):
                self.lines.append({"step": step, **values})

        for place in ("accelerate.tracking", "accelerate.accelerator"):
            monkeypatch.setitem(sys.modules[place].LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
        for place in ("accelerate.tracking", "hf_d2sd.training.options"):
            monkeypatch.setattr(f"{place}.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
        train(options(target, data, tmp_path / "run", trackers=["tensorboard"]))
        assert Recorder.lines == log_of(tmp_path / "run") and len(Recorder.lines) == 18

    def test_the_measured_length_is_that_of_the_drafters_own_trees(self, target, data, first, library_default):
        """Whatever pays on this machine."""
        model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
        drafter = D2SDDrafterModel.from_pretrained(first / "last", dtype=torch.float32)
        rows = [row for row in read_rows(data) if row.is_held_out(10)][:2]
        seen = module.acceptance_length(model, D2SDAssistant.from_drafters(drafter), rows, 12)
        tokens = cycles = 0
        for row in rows:
            prompt = row.tokens[None, : row.prompt_length]
            pair = D2SDAssistant.from_drafters(drafter)
            out = model.generate(prompt, assistant_model=pair, d2sd_auto=False, do_sample=False, max_new_tokens=12)
            tokens, cycles = tokens + out.shape[1] - prompt.shape[1] - 1, cycles + pair.last_stats.cycles
        assert seen == tokens / cycles  # the first token is the prefill's

    def test_online_features_give_the_same_losses(self, target, data, first, tmp_path):
        """But for bf16, in which the cache keeps them."""
        train(options(target, data, tmp_path / "online", features="online"))
        for line, other in zip(log_of(tmp_path / "online")[:4], log_of(first)):
            assert abs(line["loss"] - other["loss"]) < 0.05

    def test_a_second_drafter_trains_on_the_firsts_prefixes_and_joins_it(self, target, data, first, tmp_path):
        settings = dict(role="second", first=str(first / "last"), on_policy=0.5)
        train(options(target, data, tmp_path / "second", **settings))
        assert {line["step"] for line in log_of(tmp_path / "second") if "acceptance_length" in line} == {8, 16}
        parts = dict(first=str(first / "best"), second=str(tmp_path / "second" / "best"))
        join(JoinOptions(**parts, out=str(tmp_path / "pair")))
        model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
        pair = D2SDAssistant.from_pretrained(tmp_path / "pair", dtype=torch.float32)
        prompt = torch.tensor([[1, 5, 6, 2]])
        plain = model.generate(prompt, do_sample=False, max_new_tokens=16)
        ours = model.generate(prompt, assistant_model=pair, do_sample=False, max_new_tokens=16)
        assert ours.tolist() == plain.tolist()
        assert pair.last_stats.cycles > 0

    def test_layerwise_fusion_learns_weights_of_its_own(self, target, data, tmp_path):
        train(options(target, data, tmp_path / "run", feature_fusion="layerwise"))
        weights = D2SDDrafterModel.from_pretrained(tmp_path / "run" / "last", dtype=torch.float32).layer_weights
        assert weights.shape == (2, 2) and len(set(weights.flatten().tolist())) > 1

    def test_the_teacher_is_kept_and_is_that_of_each_step(self, target, data, tmp_path):
        train(options(target, data, tmp_path / "cached", distill_top_k=3))
        model, cache = tf.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32), TeacherCache(3)
        for row in read_placed_rows(data)[:5]:
            (teacher,) = compute_teacher(model, [row], 3)
            ids, log_probs = cache.read(row)
            torch.testing.assert_close(log_probs, teacher.log_probs, atol=1e-4, rtol=1e-4)
            assert ids.tolist() == teacher.ids.tolist()
        AcceleratorState._reset_state(reset_partial_state=True)
        train(options(target, data, tmp_path / "online", distill_top_k=3, features="online"))
        for line, other in zip(log_of(tmp_path / "cached"), log_of(tmp_path / "online"), strict=True):
            if "loss" in line:
                assert abs(line["loss"] - other["loss"]) < 0.05

    def test_distillation_trains(self, target, data, tmp_path):
        train(options(target, data, tmp_path / "run", distill_top_k=4))
        losses = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
        assert losses[-1] < losses[0]

    def test_accumulated_forwards_are_one_update(self, target, data, tmp_path):
        """An update of two forwards moves the weights by the mean of their gradients."""
        settings = dict(features="online", max_steps=1, warmup=0.0, clip=1e9)
        train(options(target, data, tmp_path / "run", accumulation=2, **settings))
        trained = load_file(tmp_path / "run" / "checkpoint.safetensors")
        moments = {name: tensor for name, tensor in trained.items() if name.endswith("/exp_avg")}
        AcceleratorState._reset_state(reset_partial_state=True)
        model = tf.AutoModelForCausalLM.from_pretrained(target).eval().requires_grad_(False)
        trainer = module.DrafterRun(
            options(target, data, tmp_path / "other", accumulation=2, **settings),
            model,
            tf.AutoTokenizer.from_pretrained(target),
            module.Accelerator(mixed_precision="no"),
        )
        for forward in range(2):
            (trainer.trainee(trainer.batch_of(forward))[0] / 2).backward()
        for index, parameter in enumerate(trainer.trainee.parameters()):
            expected = 0.1 * parameter.grad  # AdamW's first moment after one update, at β₁ = 0.9
            torch.testing.assert_close(moments[f"optimizer/{index}/exp_avg"], expected, atol=1e-6, rtol=1e-3)

    def test_averaged_weights_are_what_is_saved(self, target, data, tmp_path):
        train(options(target, data, tmp_path / "run", ema=0.5, max_steps=4))
        tensors = load_file(tmp_path / "run" / "checkpoint.safetensors")
        model = D2SDDrafterModel.from_pretrained(tmp_path / "run" / "last")
        for index, (name, parameter) in enumerate(model.named_parameters()):
            assert torch.equal(parameter, tensors[f"averaged/{index}"].bfloat16())
            assert not torch.equal(tensors[f"averaged/{index}"], tensors[f"model/{name}"])

    @pytest.mark.slow
    def test_a_compiled_model_takes_the_same_steps(self, target, data, tmp_path):
        settings = dict(max_steps=4, save_every=4, eval_every=99, mixed_precision="no", log_every=1)
        for name, compiled in (("plain", False), ("compiled", True)):
            train(options(target, data, tmp_path / name, compile=compiled, **settings))
        plain, compiled = (
            [line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("plain", "compiled")
        )
        assert len(plain) == 4 and compiled == pytest.approx(plain, rel=1e-4)

    def test_layers_can_start_as_the_targets_top_layers(self, target, data, tmp_path):
        with pytest.raises(ValueError, match="self_attn.q_norm.weight missing"):
            train(options(target, data, tmp_path / "run", init_layers="target"))
        AcceleratorState._reset_state(reset_partial_state=True)
        train(options(target, data, tmp_path / "run", init_layers="target", qk_norm=False, max_steps=1, lr=0.0))
        model = tf.AutoModelForCausalLM.from_pretrained(target)
        drafter = D2SDDrafterModel.from_pretrained(tmp_path / "run" / "last", dtype=torch.float32)
        for layer, source in zip(drafter.layers, model.model.layers[2:]):
            torch.testing.assert_close(layer.mlp.up_proj.weight, source.mlp.up_proj.weight, atol=0.01, rtol=0.01)


class TestGoingOn:
    """`init`: a drafter that was trained before is where another run begins."""

    def run(self, target, data, out, **changes):
        accelerator = Accelerator(mixed_precision="no")
        model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(target), tf.AutoTokenizer.from_pretrained(target)
        return module.DrafterRun(options(target, data, out, **changes), model, tokenizer, accelerator)

    @pytest.mark.parametrize("role", ["first", "second"])
    def test_it_begins_with_the_drafters_weights(self, target, data, first, tmp_path, role):
        run = self.run(target, data, tmp_path, role=role, init=str(first / "last"))
        kept = D2SDDrafterModel.from_pretrained(first / "last", dtype=torch.float32)
        for name, tensor in kept.state_dict().items():
            assert run.trainee.model.state_dict()[name].equal(tensor), name
        run.update()
        assert not run.trainee.model.fc.weight.equal(kept.fc.weight)

    def test_a_pair_stands_for_its_drafter_of_that_role(self, target, data, first, tmp_path):
        kept = D2SDDrafterModel.from_pretrained(first / "last", dtype=torch.float32)
        other = copy.deepcopy(kept)
        torch.nn.init.ones_(other.fc.weight)
        D2SDAssistant.from_drafters(kept, other).save_pretrained(tmp_path / "pair")
        pair = str(tmp_path / "pair")
        run = self.run(target, data, tmp_path / "a", init=pair, block_size=4)
        assert run.trainee.model.fc.weight.equal(kept.fc.weight)
        run = self.run(target, data, tmp_path / "b", role="second", init=pair, first=pair, block_size=4)
        assert run.trainee.model.fc.weight.equal(other.fc.weight)
        assert run.first.fc.weight.equal(kept.fc.weight)

    def test_a_pair_without_that_drafter(self, target, data, first, tmp_path):
        D2SDAssistant.from_drafters(str(first / "last")).save_pretrained(tmp_path / "pair")
        with pytest.raises(ValueError, match="has no second drafter"):
            self.run(target, data, tmp_path, role="second", init=str(tmp_path / "pair"))

    def test_it_goes_on_learning(self, target, data, first, tmp_path):
        train(options(target, data, tmp_path, init=str(first / "last"), lr=1e-3))
        before = [line["loss"] for line in log_of(first) if "loss" in line]
        after = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
        assert after[0] < sum(before[:4]) / 4
        assert sum(after[-4:]) < sum(before[-4:])

    def test_shape_and_vocabulary_are_the_drafters(self, target, data, tmp_path):
        shape = dict(draft_vocab_size=12, num_layers=1, feature_fusion="layerwise")
        train(options(target, data, tmp_path / "a", max_steps=1, **shape))
        drafter = D2SDDrafterModel.from_pretrained(tmp_path / "a" / "last")
        drafter.config.confidence_temperatures = [2.0, 2.0, 2.0]
        drafter.save_pretrained(tmp_path / "calibrated")
        run = self.run(target, data, tmp_path / "b", init=str(tmp_path / "calibrated"))
        config = run.trainee.model.config
        assert (config.draft_vocab_size, config.num_hidden_layers, config.feature_fusion) == (12, 1, "layerwise")
        assert run.trainee.model.draft_token_ids.equal(drafter.draft_token_ids)
        assert config.confidence_temperatures is None

    @pytest.mark.parametrize("before", [None, 12])
    def test_the_draft_vocabulary_can_be_chosen_anew(self, target, data, tmp_path, before):
        train(options(target, data, tmp_path / "a", max_steps=1, draft_vocab_size=before))
        init = str(tmp_path / "a" / "last")
        train(options(target, data, tmp_path / "b", max_steps=1, init=init, draft_vocab_size=20))
        drafter = D2SDDrafterModel.from_pretrained(tmp_path / "b" / "last")
        train(options(target, data, tmp_path / "c", max_steps=1, draft_vocab_size=20))
        anew = D2SDDrafterModel.from_pretrained(tmp_path / "c" / "last")
        assert drafter.config.draft_vocab_size == 20
        assert drafter.draft_token_ids.equal(anew.draft_token_ids)

    def test_both_drafters_speak_the_same_tokens(self, target, data, first, tmp_path):
        """Also where they learned from other rows."""
        train(options(target, data, tmp_path / "a", max_steps=1, draft_vocab_size=12))
        pruned = D2SDDrafterModel.from_pretrained(tmp_path / "a" / "last")
        pruned.draft_token_ids.copy_(torch.arange(12) + 3)
        pruned.save_pretrained(tmp_path / "first")
        arguments = dict(role="second", first=str(tmp_path / "first"), draft_vocab_size=12)
        for number, init in enumerate((None, str(first / "last"))):
            run = self.run(target, data, tmp_path / str(number), init=init, **arguments)
            assert run.trainee.model.draft_token_ids.equal(pruned.draft_token_ids)

    def test_it_is_resumed_exactly(self, target, data, first, tmp_path):
        arguments = dict(init=str(first / "last"), max_steps=8)
        train(options(target, data, tmp_path / "unbroken", **arguments))
        train(options(target, data, tmp_path / "stopped", **arguments, stop_after=0.0))
        assert log_of(tmp_path / "stopped")[-1]["step"] == 4
        train(options(target, data, tmp_path / "stopped", **arguments))
        assert log_of(tmp_path / "stopped") == log_of(tmp_path / "unbroken")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(block_size=3), "block_size is 4, asked for 3"),
            (dict(num_layers=1), "num_layers is 2, asked for 1"),
            (
                dict(feature_fusion="layerwise", qk_norm=False),
                "qk_norm is True, asked for False; feature_fusion is 'shared'",
            ),
        ],
    )
    def test_another_shape_is_refused(self, target, data, first, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            self.run(target, data, tmp_path, init=str(first / "last"), **changes)

    def test_a_drafter_that_names_no_mask_token(self, target, data, first, tmp_path):
        drafter = D2SDDrafterModel.from_pretrained(first / "last")
        mask = drafter.config.mask_token_id
        drafter.config.mask_token_id = drafter.config.vocab_size = None
        drafter.save_pretrained(tmp_path / "drafter")
        arguments = dict(init=str(tmp_path / "drafter"), draft_vocab_size=12)
        with pytest.raises(ValueError, match="pass --mask_token"):
            self.run(target, data, tmp_path / "a", **arguments)
        word = tf.AutoTokenizer.from_pretrained(target).convert_ids_to_tokens(mask)
        config = self.run(target, data, tmp_path / "b", mask_token=word, **arguments).trainee.model.config
        assert (config.mask_token_id, config.draft_vocab_size) == (mask, 12)

    def test_options_that_contradict_it(self, target, data, first, tmp_path):
        for changes in (dict(role="lm"), dict(init_layers="target")):
            with pytest.raises(ValueError, match="init brings a drafter's weights"):
                options(target, data, tmp_path, init=str(first / "last"), **changes)


class TestADraftLM:
    """The autoregressive draft LM of the comparisons."""

    def test_it_drafts_for_stock_assisted_decoding(self, target, data, tmp_path):
        train(options(target, data, tmp_path / "lm", role="lm"))
        losses = [line["loss"] for line in log_of(tmp_path / "lm") if "loss" in line]
        assert losses[-1] < losses[0]
        model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
        lm = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "lm" / "best", dtype=torch.float32).eval()
        assert len(lm.model.layers) == 2 and lm.generation_config.num_assistant_tokens == 3
        torch.testing.assert_close(lm.lm_head.weight, model.lm_head.weight, atol=0.01, rtol=0.01)
        prompt = torch.tensor([[1, 5, 6, 2]])
        plain = model.generate(prompt, do_sample=False, max_new_tokens=12)
        ours = model.generate(prompt, assistant_model=lm, do_sample=False, max_new_tokens=12)
        assert ours.tolist() == plain.tolist()

    def test_a_copy_of_the_whole_target_is_right_everywhere(self, target, data, tmp_path):
        """Four layers of four, copied: every draft is accepted, and the loss is the target's own."""
        made = dict(role="lm", num_layers=4, init_layers="target", lr=0.0, max_steps=1, eval_tokens=13)
        measured = train(options(target, data, tmp_path / "lm", **made))
        assert measured["acceptance_length"] >= 3.2  # 13 tokens in four passes: 4 + 4 + 4 + 1

    def test_it_is_resumed_exactly(self, target, data, tmp_path):
        train(options(target, data, tmp_path / "whole", role="lm"))
        train(options(target, data, tmp_path / "parts", role="lm", stop_after=0.0))
        assert log_of(tmp_path / "parts")[-1]["step"] == 4
        train(options(target, data, tmp_path / "parts", role="lm"))
        assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")

    def test_the_loss_is_that_of_the_response_alone(self, target, data):
        from hf_d2sd.training.draft_lm import DraftLMTrainee

        model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
        rows = read_rows(data)[:3]
        total = count = 0
        for row in rows:
            logits = model(row.tokens[None]).logits[0, row.prompt_length - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, row.tokens[row.prompt_length :], reduction="sum")
            count += row.response_length
        tokens = torch.nn.utils.rnn.pad_sequence([row.tokens for row in rows], batch_first=True)
        place = torch.arange(tokens.shape[1])
        ends = torch.tensor([[len(row.tokens)] for row in rows])
        starts = torch.tensor([[row.prompt_length] for row in rows])
        labels = torch.where((place >= starts) & (place < ends), tokens, NO_LABEL)
        loss, _ = DraftLMTrainee(model, chunk=7)((tokens, labels))
        torch.testing.assert_close(loss, total / count)


class TestAKilledRun:
    def test_a_run_that_stops_after_some_minutes_goes_on(self, target, data, first, tmp_path):
        train(options(target, data, tmp_path / "run", stop_after=0.0))
        assert log_of(tmp_path / "run")[-1]["step"] == 4  # the first checkpoint
        AcceleratorState._reset_state(reset_partial_state=True)
        train(options(target, data, tmp_path / "run"))
        assert log_of(tmp_path / "run") == log_of(first)

    def test_its_loss_curve_is_that_of_an_unbroken_one(self, target, data, first, tmp_path):
        """SIGKILL after the checkpoint at step 4, then again after that at step 8."""
        out = tmp_path / "killed"
        made = options(target, data, out)
        names = (
            "target_layer_ids block_size anchors rows held_out dtype mixed_precision log_every save_every eval_every"
        )
        names += " max_steps eval_rows eval_tokens lr"
        command = [sys.executable, "-m", "hf_d2sd.cli", "train", "--target", target, "--data", data, "--out", out]
        for name in names.split():
            value = getattr(made, name)
            command += [f"--{name}", *(value if isinstance(value, list) else [value])]
        environment = dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()))
        for step in (4, 8):
            process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, env=environment)
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline and process.poll() is None:
                checkpoint = out / "checkpoint.safetensors"
                if checkpoint.exists() and int(load_file(checkpoint)["step"]) >= step:
                    break
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        killed_at = int(load_file(out / "checkpoint.safetensors")["step"])
        assert killed_at < 16, "the run was faster than the test"
        train(made)
        assert log_of(out) == log_of(first)
        ours, theirs = load_file(out / "checkpoint.safetensors"), load_file(first / "checkpoint.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class TestErrors:
    def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(self, target, data, tmp_path, monkeypatch):
        train(options(target, data, tmp_path / "run", max_steps=16, save_every=4))
        before = (tmp_path / "run" / "checkpoint.safetensors").read_bytes()
        AcceleratorState._reset_state(reset_partial_state=True)
        stock = loop.TrainingRun.update
        monkeypatch.setattr(loop.TrainingRun, "total_steps", property(lambda self: 32))
        monkeypatch.setattr(loop.TrainingRun, "update", lambda self: stock(self) * torch.nan)
        with pytest.raises(FloatingPointError, match="loss is nan at step 17.*--lr"):
            train(options(target, data, tmp_path / "run", max_steps=16, save_every=4))
        assert (tmp_path / "run" / "checkpoint.safetensors").read_bytes() == before

    def test_a_run_with_other_options(self, target, data, first):
        with pytest.raises(ValueError, match="lr: 0.003 there, 0.1 now"):
            train(options(target, data, first, lr=0.1))

    def test_too_few_rows_and_none(self, target, data, tmp_path):
        with pytest.raises(ValueError, match="hf-d2sd distill"):
            train(options(target, tmp_path, tmp_path / "run"))
        with pytest.raises(ValueError, match="a batch takes 4000"):
            train(options(target, data, tmp_path / "run", rows=4000))

    @pytest.mark.parametrize("damage", ["cut", "other"])
    def test_features_that_are_damaged_or_of_other_rows(self, target, data, first, tmp_path, damage):
        model = tf.AutoModelForCausalLM.from_pretrained(target)
        cache = FeatureCache([0, 2])
        path = data / cache.name / shard_paths(data)[0].name
        content = path.read_bytes()
        try:
            if damage == "cut":
                path.write_bytes(content[:-10])
            else:
                save_file(load_file(path), path, {"rows": "0"})
            with pytest.raises(ValueError, match="is damaged" if damage == "cut" else "of other rows"):
                cache.fill(data, model, 4)
        finally:
            path.write_bytes(content)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(mask_token="nothing"), "no token of the target's tokenizer"),
            (dict(target_layer_ids=[0, 9]), r"\[0, 9\]"),
            (dict(block_size=1), "at least 2"),
            (dict(distill_weight=1.5), "distill_weight between 0 and 1"),
            (dict(anchors=0), "anchors must be at least 1"),
            (dict(held_out=1), "held_out must be at least 2"),
            (dict(trackers=["nothing"]), "Unsupported logging capability: nothing"),
            (dict(draft_vocab_size=10_000), "draft_vocab_size is 10000"),
        ],
    )
    def test_options_that_do_not_fit(self, target, data, tmp_path, changes, message):
        with pytest.raises(ValueError, match=message):
            train(options(target, data, tmp_path / "run", **changes))

    def test_a_tracker_that_is_not_installed(self, target, data, tmp_path, monkeypatch):
        monkeypatch.setattr("hf_d2sd.training.options.get_available_trackers", lambda: [])
        with pytest.raises(ValueError, match=r"\['wandb'\] are not installed"):
            options(target, data, tmp_path / "run", trackers=["wandb"])


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_rows(target, data, tmp_path):
    """`accelerate launch` on two CPU processes of two rows each: the same batches with other blocks out of them."""
    made = options(target, data, tmp_path / "two", rows=2)
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "hf_d2sd.cli", "train"]
    for name in "target data out target_layer_ids block_size anchors rows held_out dtype mixed_precision".split():
        value = getattr(made, name)
        command += [f"--{name}", *(value if isinstance(value, list) else [value])]
    for name in "log_every save_every eval_every max_steps eval_rows eval_tokens lr".split():
        command += [f"--{name}", getattr(made, name)]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [line["loss"] for line in log_of(tmp_path / "two") if "loss" in line]
    assert len(losses) == 16 and losses[-1] < losses[0]
    train(options(target, data, tmp_path / "one", rows=4))
    alone = [line["loss"] for line in log_of(tmp_path / "one") if "loss" in line]
    assert abs(sum(losses) - sum(alone)) / 16 < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("role", ["first", "second"])
def test_eight_rows_are_learned_by_heart(target, tmp_path, monkeypatch, role):
    """Decoding the prompts it was trained on, a drafter of γ = 8 commits at least 0.9 γ tokens in a target pass."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a} b"}) + "\n" for a in "abcdefgh"))
    data = tmp_path / "data"
    distill(DistillOptions(str(target), data, [str(prompts)], dtype="float32", max_new_tokens=129))
    monkeypatch.setattr(loop.TrainingRun, "_split", lambda self, rows: (rows, rows))
    steps = {"first": 600, "second": 1200}[role]
    settings = dict(block_size=8, rows=8, anchors=32, mask_token="<think>", features="online", max_steps=steps)
    every = dict(log_every=100, save_every=steps, eval_every=steps, eval_rows=8, eval_tokens=129)
    measured = train(options(target, data, tmp_path / "run", role=role, **settings, **every))
    assert measured["acceptance_length"] >= 0.9 * 8
