"""benchmarks/gpu_check.py runs through on a CPU, with stand-ins for the kernels and tiny shapes: it is ready."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_check  # noqa: E402


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, packed):
    monkeypatch.setattr(gpu_check, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_the_error_of_a_right_kernel_is_within_its_bound_and_of_a_wrong_one_is_not(packed, monkeypatch):
    worst, bound = gpu_check.worst_error("packed", torch.bfloat16, trees=7)
    assert worst <= bound < 0.2
    right = packed.varlen

    def without_causality(q, k, v, packing, scoring):
        return right(q, k, v, dataclasses.replace(packing, causal=False), scoring)

    monkeypatch.setattr(packed, "varlen", without_causality)
    worst, bound = gpu_check.worst_error("packed", torch.bfloat16, trees=7)
    assert worst > bound


@pytest.mark.slow
def test_decoding_is_compared():
    assert gpu_check.equality(torch.float32, "packed")["equal"] == 1.0


@torch.no_grad()
def test_the_parts_of_a_cycle_are_timed():
    model, pair = gpu_check.large_models(layers=6, width=64, vocab=100)
    assert gpu_check.plain_step(model, 40, compiled=False) > 0
    assert min(gpu_check.draft_times(model, pair, 40).values()) > 0
    eager = gpu_check.cycle_times(model, pair, 40, 20, None)
    assert eager["cycle_ms"] > eager["verify_ms"] > 0
    fixed = gpu_check.cycle_times(model, pair, 40, 20, lambda function: getattr(function, "forward", function))
    assert fixed["cycle_ms"] > 0
