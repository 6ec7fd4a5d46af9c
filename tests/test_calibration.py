"""Calibration: temperatures are recovered, stored, used by decoding, and measured on rows they were not fitted on."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_training import data, first, target  # noqa: F401
from tiny import WIDTH, OracleDrafts, prompt, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel
from hf_d2sd.drafting import Drafter
from hf_d2sd.training.calibration import (
    GRID,
    CalibrateOptions,
    Evidence,
    calibrate,
    choose,
    confidences,
    fit,
    helping,
    reliability,
)


def simulated(temperatures: list[float], count: int = 20_000, vocab: int = 12, seed: int = 0) -> Evidence:
    """Tokens drawn from softmax(logits / T) of each slot: with those temperatures confidences are true rates."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, vocab, generator=generator)
    slot = torch.randint(1, len(temperatures) + 1, (count,), generator=generator)
    true = (logits / torch.tensor(temperatures)[slot - 1][:, None]).softmax(-1)
    drawn = torch.multinomial(true, 1, generator=generator)[:, 0]
    return Evidence(slot, confidences(logits), drawn == logits.argmax(-1), torch.arange(count) // 4)


def test_the_temperatures_that_made_the_text_are_found():
    true = [0.5, 1.0, 2.5]
    for value, expected in zip(fit(simulated(true), block_size=4), true):
        assert abs(value / expected - 1) < 0.08


def test_a_slot_that_is_hardly_reached_takes_the_mean_of_the_others():
    evidence = simulated([1.0, 2.0])
    (alone,) = set(fit(replace(evidence, slot=evidence.slot * 0 + 1), block_size=2))
    assert fit(evidence, block_size=5)[2:] == [alone, alone]


def few_rows(seed: int, temperatures: list[float], rows: int = 3, tokens: int = 24) -> Evidence:
    """Rows that each have a bent of their own, as texts have: how often their tokens are right differs by row."""
    generator = torch.Generator().manual_seed(seed)
    evidence = simulated(temperatures, count=rows * tokens, seed=seed)
    row = torch.arange(rows).repeat_interleave(tokens)
    bent = 0.5 + torch.rand(rows, generator=generator)[row]  # one half to one and a half of what is said, at random
    rate = (evidence.confidence[:, len(GRID) // 2] * bent).clamp(0, 1)
    return replace(evidence, right=torch.rand(len(rate), generator=generator) < rate, row=row)


def test_few_rows_of_a_drafter_that_is_right_already_do_no_harm():
    """What `fit` alone would store is measured beside it, on many fresh rows: that does harm them."""
    fresh = few_rows(10**6, [1.0] * 3, rows=1000)
    neutral = reliability(fresh, [1.0] * 3)
    harm = {"fitted": [], "kept": []}
    for seed in range(40):
        halves = few_rows(2 * seed, [1.0] * 3), few_rows(2 * seed + 1, [1.0] * 3)
        kept = choose(*halves, block_size=4)["temperatures"] or [1.0] * 3
        for name, temperatures in (("fitted", fit(halves[0], 4)), ("kept", kept)):
            after = reliability(fresh, temperatures)["expected_calibration_error"]
            harm[name].append(after - neutral["expected_calibration_error"])
    assert sum(value > 0.03 for value in harm["fitted"]) >= 15, "the case does not show the harm"
    assert sum(value > 0.03 for value in harm["kept"]) <= 6
    assert sum(harm["kept"]) < sum(harm["fitted"]) / 4


def test_temperatures_that_help_are_kept_and_those_alone():
    true = [0.4, 1.0, 2.5]
    result = choose(simulated(true, seed=1), simulated(true, seed=2), block_size=4)
    assert {1, 3} <= set(result["kept"])
    assert result["after"]["expected_calibration_error"] < result["before"]["expected_calibration_error"] / 3
    assert abs(result["temperatures"][0] / 0.4 - 1) < 0.1 and abs(result["temperatures"][2] / 2.5 - 1) < 0.1


def test_a_temperature_of_other_text_is_dropped():
    """One half says 0.4, the other 2.5: neither helps there, and nothing is stored."""
    result = choose(simulated([0.4] * 3, seed=1), simulated([2.5] * 3, seed=2), block_size=4)
    assert result["temperatures"] is None and result["kept"] == []
    assert result["after"] == result["before"]
    assert result["fitted"]["expected_calibration_error"] > result["before"]["expected_calibration_error"]


def test_what_helps_is_judged_by_rows_and_not_by_tokens():
    """Half of the sure tokens are wrong: in every row, or in one row of three, which says little of the next row."""
    row = torch.tensor([0] * 300 + [1] * 150 + [2] * 150)
    confidence = torch.where(GRID < 2, 0.95, 0.6).expand(600, -1)
    spread = Evidence(torch.ones(600, dtype=torch.long), confidence, torch.arange(600) % 2 == 0, row)
    assert helping([2.5], spread) == {1}
    assert helping([2.5], replace(spread, right=row > 0)) == set()
    assert helping([2.5], replace(spread, row=row * 0)) == set()


def test_the_error_is_that_of_a_brute_force_evaluation():
    evidence = simulated([2.0, 2.0], count=500)
    index = int((GRID - 1.0).abs().argmin())
    bins: dict[int, list] = {}
    for said, right in zip(evidence.confidence[:, index].tolist(), evidence.right.tolist()):
        bins.setdefault(min(int(said * 10), 9), []).append((said, right))
    error = sum(abs(sum(said for said, _ in part) - sum(right for _, right in part)) for part in bins.values()) / 500
    assert abs(reliability(evidence, [1.0, 1.0])["expected_calibration_error"] - error) < 1e-3
    assert reliability(evidence, [2.0, 2.0])["expected_calibration_error"] < error / 2


def test_confidences_are_softmax_at_each_temperature():
    logits = torch.randn(7, 5)
    for column, temperature in enumerate(GRID.tolist()):
        expected = (logits / temperature).softmax(-1).max(-1).values
        torch.testing.assert_close(confidences(logits, chunk=3)[:, column], expected)


def test_decoding_uses_them():
    """The same tokens with other confidences: those of the logits over the temperatures."""
    temperatures = [0.5, 2.0, 4.0]
    plain, calibrated = tiny_drafter(4), tiny_drafter(4, confidence_temperatures=temperatures)
    logits = torch.randn(2, 3, 24)
    drafts = []
    for model in (plain, calibrated):
        drafter = Drafter(model, tiny_target())
        drafter._head = lambda hidden: logits.view(1, 6, 24)
        drafts.append(drafter._read(torch.zeros(1, 8, WIDTH), torch.float32, torch.zeros(1, 2, 4).long(), 1))
    assert drafts[0].tokens.equal(drafts[1].tokens)
    expected = (logits / torch.tensor(temperatures)[:, None]).softmax(-1).max(-1).values
    torch.testing.assert_close(drafts[1].best_confidence[0], expected)


def test_text_stays_the_targets(monkeypatch):
    second = tiny_drafter(4, seed=1, confidence_temperatures=[2.0] * 3)
    pair = D2SDAssistant.from_drafters(tiny_drafter(4, confidence_temperatures=[0.3, 1.0, 3.0]), second)
    plain = tiny_target().generate(prompt(), do_sample=False, max_new_tokens=24)
    OracleDrafts(monkeypatch, plain[0], 0.5)
    ours = tiny_target().generate(prompt(), assistant_model=pair, do_sample=False, max_new_tokens=24)
    assert ours.tolist() == plain.tolist()


def test_a_drafter_is_calibrated_in_place(target, data, first, tmp_path):  # noqa: F811
    folder = tmp_path / "drafter"
    D2SDDrafterModel.from_pretrained(first / "last").save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    plot = tmp_path / "plot.png"
    result = calibrate(CalibrateOptions(folder, str(target), data, held_out=10, dtype="float32", plot=plot))
    assert result["after"]["expected_calibration_error"] < result["before"]["expected_calibration_error"]
    assert result["stored"] and result["kept"]
    model = D2SDDrafterModel.from_pretrained(folder)
    assert model.config.confidence_temperatures == result["temperatures"] and len(result["temperatures"]) == 3
    assert (folder / "model.safetensors").read_bytes() == weights
    assert plot.read_bytes().startswith(b"\x89PNG")
    json.dumps(result)
    with pytest.raises(ValueError, match="0 held-out rows"):
        calibrate(CalibrateOptions(folder, str(target), data, held_out=10**9, dtype="float32"))


def test_a_pairs_drafters_are_calibrated_as_each_one_alone(target, data, first, tmp_path):  # noqa: F811
    """In the pair's one config, the second drafter after prefixes as its training drew them."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    drafter = D2SDDrafterModel.from_pretrained(first / "last", dtype=torch.bfloat16)
    drafter.save_pretrained(alone)
    D2SDAssistant.from_drafters(drafter, copy.deepcopy(drafter), tree_budget=12).bfloat16().save_pretrained(pair)
    settings = CalibrateOptions(pair, str(target), data, held_out=10, dtype="float32", plot=tmp_path / "plot.png")
    result = calibrate(settings)
    for role, base in (("first", None), ("second", 0.9)):
        assert result[role] == calibrate(replace(settings, drafter=alone, prefix_base=base))
        assert (tmp_path / f"plot-{role}.png").is_file()
    assert result["first"] != result["second"]
    loaded = D2SDAssistant.from_pretrained(pair)
    stored = [model.config.confidence_temperatures for model in loaded.drafters]
    assert stored == [result[role]["temperatures"] for role in ("first", "second")]
    assert loaded.config.tree_budget == 12
    for folder in (alone, pair):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"  # that of the weights


def test_nothing_is_stored_where_nothing_helps_and_what_was_there_goes(target, data, first, tmp_path, monkeypatch):  # noqa: F811
    folder = tmp_path / "drafter"
    model = D2SDDrafterModel.from_pretrained(first / "last")
    model.save_pretrained(folder)
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr("hf_d2sd.training.calibration.helping", lambda *_: set())
    settings = CalibrateOptions(folder, str(target), data, held_out=10, dtype="float32")
    result = calibrate(settings)
    assert not result["stored"] and result["temperatures"] is None and result["after"] == result["before"]
    assert (folder / "config.json").read_bytes() == before
    model.config.confidence_temperatures = [2.0] * 3
    model.save_pretrained(folder)
    calibrate(settings)
    assert D2SDDrafterModel.from_pretrained(folder).config.confidence_temperatures is None


@pytest.mark.parametrize("temperatures", [[1.0], [1.0, 1.0, 0.0]])
def test_temperatures_that_do_not_fit_the_block(temperatures):
    with pytest.raises(ValueError, match="3 positive numbers"):
        D2SDDrafterConfig(block_size=4, confidence_temperatures=temperatures)


def test_what_the_plot_needs_is_asked_for_before_any_work(monkeypatch, tmp_path):
    required = dict(drafter="no-such-drafter", target="no-such-target", data="no-such-folder")
    with pytest.raises(ValueError, match="there is no folder .*missing"):
        CalibrateOptions(**required, plot=tmp_path / "missing" / "plot.png")
    CalibrateOptions(**required, plot=tmp_path / "plot.png")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    CalibrateOptions(**required)
    with pytest.raises(ValueError, match="--plot needs matplotlib"):
        CalibrateOptions(**required, plot=tmp_path / "plot.png")
