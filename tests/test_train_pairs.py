"""Training both drafters in one loop, path heads, and schedules of time."""

import pytest
import torch
import transformers as tf
from accelerate import Accelerator
from test_training import data, first, log_of, options, target  # noqa: F401

from hf_d2sd import D2SDAssistant, D2SDDrafterModel
from hf_d2sd.training import loop
from hf_d2sd.training import trainer as module
from hf_d2sd.training.blocks import cut_blocks
from hf_d2sd.training.drafters import Trainee
from hf_d2sd.training.pair import JoinOptions, join
from hf_d2sd.training.trainer import train

HEAD = {"path_rank": 6, "path_dropout": 0.2}


@pytest.fixture
def pair_run(target, data):  # noqa: F811
    def make(out, **changes) -> module.PairRun:
        model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(target), tf.AutoTokenizer.from_pretrained(target)
        settings = options(target, data, out, role="both", **changes)
        return module.PairRun(settings, model.requires_grad_(False), tokenizer, Accelerator(mixed_precision="no"))

    return make


def test_one_batch_of_features_serves_both_drafters(pair_run, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        module, "compute_features", lambda *args, compute=module.compute_features: calls.append(0) or compute(*args)
    )
    run = pair_run(tmp_path, features="online", on_policy=0.0)
    blocks = run.batch_of(0)
    assert len(calls) == 1
    assert torch.equal(blocks[0].context, blocks[1].context) and torch.equal(blocks[0].anchors, blocks[1].anchors)
    shown = [its.distance.amin(-1) for its in blocks]  # minus the kept tokens
    assert (shown[0] == 0).all() and (shown[1] < 0).any()


def test_the_loss_is_the_sum_of_what_each_alone_would_have(pair_run, tmp_path):
    run = pair_run(tmp_path)
    blocks = run.batch_of(3)
    together = run.trainee(blocks)[0]
    alone = [
        Trainee(model, run.target, tau=run.options.tau)(its)[0]
        for model, its in zip(run.trainee.model.drafters, blocks)
    ]
    assert together.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    together.backward()
    assert all(drafter.fc.weight.grad.abs().sum() > 0 for drafter in run.trainee.model.drafters)


def test_on_policy_prefixes_end_where_the_first_drafter_is_wrong(pair_run, tmp_path):
    run = pair_run(tmp_path, on_policy=1.0)
    blocks = run.batch_of(0)
    right = run._first_trainee(blocks[0])[1]
    accepted = right[..., 1:].int().cumprod(-1).sum(-1).clamp(max=run.options.block_size - 2)
    assert torch.equal(-blocks[1].distance[..., 0], accepted)


def test_a_pair_is_trained_saved_and_decodes_the_targets_text(target, data, tmp_path):  # noqa: F811
    train(options(target, data, tmp_path / "run", role="both", max_steps=8, **HEAD))
    model = tf.AutoModelForCausalLM.from_pretrained(target).eval()
    pair = D2SDAssistant.from_pretrained(tmp_path / "run" / "best", dtype=torch.float32)
    assert all(drafter.path_head.candidate.weight.abs().sum() > 0 for drafter in pair.drafters)
    ids = torch.tensor([[1, 5, 6, 2]])
    plain = model.generate(ids, do_sample=False, max_new_tokens=16)
    assert model.generate(ids, assistant_model=pair, do_sample=False, max_new_tokens=16).tolist() == plain.tolist()


def test_what_a_loop_trained_is_joined_with_a_pairs_own_defaults(target, data, tmp_path):  # noqa: F811
    train(options(target, data, tmp_path / "run", role="both", max_steps=4, eval_every=4, **HEAD))
    trained = str(tmp_path / "run" / "last")
    join(JoinOptions(first=trained, second=trained, out=str(tmp_path / "pair"), num_branches=2, tree_budget=9))
    pair, last = (D2SDAssistant.from_pretrained(folder) for folder in (tmp_path / "pair", trained))
    assert (pair.config.num_branches, pair.config.tree_budget) == (2, 9)
    for name, value in last.state_dict().items():
        assert torch.equal(pair.state_dict()[name], value), name


@pytest.mark.parametrize("settings", [{"role": "both", **HEAD}, {"train": "path_head", "path_rank": 6}])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(target, data, first, tmp_path, settings):  # noqa: F811
    if settings.get("train"):
        settings = settings | {"init": str(first / "last")}
    train(options(target, data, tmp_path / "whole", **settings))
    train(options(target, data, tmp_path / "parts", stop_after=0.0, **settings))
    assert max(line["step"] for line in log_of(tmp_path / "parts")) == 4
    train(options(target, data, tmp_path / "parts", **settings))
    wholes, parts = ((tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert wholes == parts
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a_path_head_alone_is_added_to_a_drafter(target, data, first, tmp_path):  # noqa: F811
    kept = D2SDDrafterModel.from_pretrained(first / "last")
    train(options(target, data, tmp_path, train="path_head", path_rank=6, init=str(first / "last")))
    headed = D2SDDrafterModel.from_pretrained(tmp_path / "last")
    assert headed.config.path_rank == 6 and headed.path_head.candidate.weight.abs().sum() > 0
    for name, value in kept.state_dict().items():
        assert torch.equal(headed.state_dict()[name], value), name
    losses = [line["loss"] for line in log_of(tmp_path) if "loss" in line]
    assert sum(losses[-4:]) < sum(losses[:4])


def test_a_schedule_of_time_ends_when_its_time_has_passed(target, data, tmp_path, monkeypatch):  # noqa: F811
    clock = iter(range(100_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock) * 6.0)  # an update takes 6 seconds
    settings = {"max_steps": None, "minutes": 1.0, "eval_every": 100}
    train(options(target, data, tmp_path, **settings))
    log = log_of(tmp_path)
    rates = [line["lr"] for line in log if "lr" in line]
    assert len(rates) == 10 and rates[0] == max(rates) and rates[-1] < 0.2 * rates[0]
    assert [line["step"] for line in log if "acceptance_length" in line] == [10]
    train(options(target, data, tmp_path, **settings))  # nothing is left to do
    assert log_of(tmp_path) == log


def test_a_stopped_schedule_of_time_goes_on_with_what_is_left(target, data, tmp_path, monkeypatch):  # noqa: F811
    clock = iter(range(100_000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock) * 6.0)
    settings = {"max_steps": None, "minutes": 1.0, "eval_every": 100}
    train(options(target, data, tmp_path, stop_after=0.0, **settings))
    assert max(line["step"] for line in log_of(tmp_path)) == 4
    train(options(target, data, tmp_path, **settings))
    assert max(line["step"] for line in log_of(tmp_path)) == 10


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"role": "both", "first": "x"}, "not as --first"),
        ({"train": "path_head"}, "pass --init"),
        ({"minutes": 0.0, "max_steps": None}, "minutes must be above 0"),
        ({"minutes": 3.0}, "without max_steps"),
        ({"path_dropout": 1.0}, "path_dropout"),
    ],
)
def test_options_that_do_not_go_together(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        options("target", tmp_path, tmp_path, **changes)


def test_drafters_that_read_other_layers_are_not_trained_in_one_loop(target, data, first, tmp_path):  # noqa: F811
    one = D2SDDrafterModel.from_pretrained(first / "last")
    two = D2SDDrafterModel.from_pretrained(first / "last")
    two.config.target_layer_ids = [1, 2]
    D2SDAssistant.from_drafters(one, two).save_pretrained(tmp_path / "pair")
    with pytest.raises(ValueError, match="read the same layers"):
        settings = dict(role="both", on_policy=0.0, init=str(tmp_path / "pair"), target_layer_ids=None)
        train(options(target, data, tmp_path / "run", **settings))


def test_blocks_of_a_pair_are_those_of_its_drafters(pair_run, tmp_path):
    run = pair_run(tmp_path, on_policy=0.0)
    rows, generator = run.rows[:4], torch.Generator().manual_seed(5)
    its = run.batch(rows, torch.Generator().manual_seed(5))
    anchors = module.draw_anchors(rows, run.options.anchors, generator)
    expected = cut_blocks(rows, run.features(rows), anchors, torch.zeros_like(anchors), run.first.config)
    assert torch.equal(its[0].tokens, expected.tokens) and torch.equal(its[0].labels, expected.labels)
