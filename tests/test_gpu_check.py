"""benchmarks/gpu_check.py runs through on a CPU, with stand-ins for the kernels and tiny shapes: it is ready."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu_check  # noqa: E402


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, as_on_a_gpu):
    monkeypatch.setattr(gpu_check, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "COMPILE", {"backend": "eager"})
    gpu_check.facts.cache_clear()
    yield
    gpu_check.facts.cache_clear()


@pytest.fixture
def without_compiling(monkeypatch):
    """What is compiled runs as it is: shapes are fixed all the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize(("name", "way"), [("packed", None), ("torch", "dense"), ("flash_attention_2", "kvcache")])
def test_the_error_of_a_right_kernel_is_within_its_bound_and_of_a_wrong_one_is_not(
    name, way, as_on_a_gpu, monkeypatch
):
    figures = gpu_check.errors_of(name, way, torch.bfloat16, trees=7)
    assert figures["holds"] and figures["error"] <= figures["bound"] < 0.2
    kernel = as_on_a_gpu[name]
    if name == "packed":
        right = kernel.varlen

        def wrong(q, k, v, packing, scoring):
            return right(q, k, v, dataclasses.replace(packing, causal=False), scoring)

        monkeypatch.setattr(kernel, "varlen", wrong)
    else:
        over_prefix = kernel.over_prefix

        def wrong(query, key, value, prefix, scoring):
            out, lse = over_prefix(query, key, value, prefix, scoring)
            return out, lse + 1

        monkeypatch.setattr(kernel, "over_prefix", wrong)
    assert not gpu_check.errors_of(name, way, torch.bfloat16, trees=7)["holds"]


def run(tmp_path, *arguments) -> dict:
    out = tmp_path / "gpu.json"
    status = gpu_check.main(["--device", "cpu", "--out", str(out), *arguments])
    written = json.loads(out.read_text())
    assert status == bool(written["failures"])
    return written


def test_the_timings_run_through(tmp_path, without_compiling):
    written = run(tmp_path, "--only", "timings", "--contexts", "40", "--batches", "1")
    assert written["failures"] == []
    names = {name.partition(": ")[2] for name in written["timings"]} - {""}
    ways = {f"{what} {way}" for what in ("plain", "cycle", "account") for way in ("eager", "compiled")}
    assert names == ways | {"floor", "ratios"}
    account = written["timings"]["context 40 batch 1: account eager"]
    assert account["operators_a_cycle"] > 200 and account["wall_ms_a_cycle"] > 0
    assert written["timings"]["context 40 batch 1: ratios"]["cycle_over_plain_eager"] > 0


@pytest.mark.slow
def test_the_ways_over_long_prefixes_are_timed(tmp_path, without_compiling):
    written = run(tmp_path, "--only", "long", "--contexts", "40", "48")
    assert written["failures"] == []
    ways = set(written["long"]["ways at 48"]) - {"seconds"}
    assert ways >= {"torch dense", "torch packed", "flash_attention_2 kvcache", "flash_attention_3 packed"}


def test_texts_are_compared(tmp_path, without_compiling):
    written = run(tmp_path, "--only", "capture")
    assert written["failures"] == [] and written["capture"]["batch 4"]["equal"] == 1.0


@pytest.mark.slow
def test_the_checks_run_through(tmp_path):
    written = run(tmp_path, "--only", "checks")
    assert written["failures"] == [] and written["checks"]["decodes in float32"]["equal"] == 1.0
    assert written["checks"]["torch dense bfloat16"]["holds"]
    assert "skipped" in written["checks"]["varlen"] and "skipped" in written["checks"]["cpu"]


@pytest.mark.slow
def test_the_strategies_run_through(tmp_path, smollm2_folder, without_compiling):
    written = run(tmp_path, "--only", "bench")
    assert written["failures"] == []
    assert written["bench"]["ar"]["tokens_per_second"] > 0 and written["bench"]["d2sd-wide"]["tokens_a_pass"] >= 1


def test_a_failure_is_written_down_and_hides_nothing(tmp_path, monkeypatch, without_compiling):
    def broken(rows, tokens):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(gpu_check, "captured_equality", broken)
    monkeypatch.setattr(gpu_check, "prefix_ways", lambda shape, context: {"holds": True})
    monkeypatch.setattr(gpu_check, "costs", lambda *arguments: None)
    written = run(tmp_path, "--only", "capture", "long", "--contexts", "40", "48")
    assert written["failures"] == ["capture batch 1", "capture batch 4"]
    assert "no kernel image" in written["capture"]["batch 1"]["failed"] and "test_gpu_check.py" in str(written)
    assert written["long"]["ways at 48"]["holds"]


def test_what_there_was_no_time_for_is_written_down(tmp_path):
    written = run(tmp_path, "--only", "capture", "timings", "--minutes", "-1")
    assert written["failures"] == []
    assert (
        written["capture"]["batch 1"] == written["timings"]["models and bandwidth"] == {"left_out": "no time was left"}
    )


def test_a_check_that_does_not_hold_is_a_failure():
    account = gpu_check.Account(None, time.monotonic() + 60)
    account.measure("checks", "one", lambda: {"holds": False})
    account.measure("checks", "two", lambda: {"holds": True})
    assert account.failed == ["checks one"]
