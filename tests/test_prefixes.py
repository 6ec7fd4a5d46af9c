"""From confidences to prefix lengths: Eq. 4 and 5 of arXiv 2606.04446 against brute force."""

import itertools
import math

import pytest
import torch

from hf_d2sd.prefixes import acceptance_distribution, select_prefix_lengths


def brute_force_distribution(confidence: list[float]) -> list[float]:
    """Over all 2^(γ-1) outcomes of accepting each position by itself: how likely exactly i leading ones are."""
    r = [0.0] * (len(confidence) + 1)
    for outcome in itertools.product([True, False], repeat=len(confidence)):
        probability = math.prod(c if accepted else 1 - c for c, accepted in zip(confidence, outcome))
        leading = next((i for i, accepted in enumerate(outcome) if not accepted), len(outcome))
        r[leading] += probability
    return r


def random_confidence(size: int, seed: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("block_size", [2, 3, 4, 9])
def test_the_distribution_is_that_of_independent_positions(block_size):
    for seed in range(20):
        confidence = random_confidence(block_size - 1, seed)
        expected = brute_force_distribution(confidence.tolist())
        assert acceptance_distribution(confidence).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("block_size", [2, 8, 16, 32])
def test_the_distribution_sums_to_one(block_size):
    for seed in range(20):
        r = acceptance_distribution(random_confidence(block_size - 1, seed).float())
        assert r.shape == (block_size,)
        assert r.sum().item() == pytest.approx(1, abs=1e-6)
        assert (r >= 0).all()


@pytest.mark.parametrize("confidence", [[0.0, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
def test_certain_confidences_put_all_mass_where_it_must_be(confidence):
    expected = brute_force_distribution(confidence)
    assert acceptance_distribution(torch.tensor(confidence)).tolist() == expected


@pytest.mark.parametrize("num_branches", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("second_block_size", [8, 9, 12])
def test_the_most_probable_lengths_are_selected_best_first(num_branches, second_block_size):
    for seed in range(20):
        confidence = random_confidence(7, seed)
        r = brute_force_distribution(confidence.tolist())
        allowed = [i for i in range(len(r)) if i <= second_block_size - 2]  # a position is left to draft
        expected = sorted(allowed, key=lambda i: -r[i])[:num_branches]
        assert select_prefix_lengths(confidence, num_branches, second_block_size).tolist() == expected


def test_more_branches_than_there_are_prefixes_select_each_prefix_once():
    confidence = random_confidence(3, 0)
    assert sorted(select_prefix_lengths(confidence, 99, 4).tolist()) == [0, 1, 2]
    assert sorted(select_prefix_lengths(confidence, 99, 5).tolist()) == [0, 1, 2, 3]


def test_no_branches_select_nothing():
    assert select_prefix_lengths(random_confidence(3, 0), 0, 4).tolist() == []


def test_the_whole_block_is_a_prefix_only_for_a_longer_second_block():
    sure = torch.full((3,), 0.99)  # "all accepted" is the most probable outcome by far
    assert select_prefix_lengths(sure, 1, 5).tolist() == [3]
    assert select_prefix_lengths(sure, 1, 4).tolist() == [0]
    assert 3 not in select_prefix_lengths(sure, 4, 4).tolist()


def test_a_single_drafted_position_leaves_the_anchor_alone_or_the_whole_block():
    assert select_prefix_lengths(torch.tensor([0.9]), 4, 2).tolist() == [0]
    assert select_prefix_lengths(torch.tensor([0.9]), 4, 3).tolist() == [1, 0]
