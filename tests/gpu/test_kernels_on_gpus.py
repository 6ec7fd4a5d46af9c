"""Every CUDA kernel against attention in double precision, and whole decodings; `pytest -m gpu` runs them.

`python benchmarks/gpu_check.py` runs the same checks and times what a cycle costs.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_check  # noqa: E402

from hf_d2sd.kernels import KERNELS  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA_KERNELS = [name for name in KERNELS if name != "cpu"]


@pytest.mark.parametrize("name", CUDA_KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_equals_attention_in_double_precision(name, dtype):
    reason = gpu_check.obstacle(name)
    if reason:
        pytest.skip(reason)
    worst, bound = gpu_check.worst_error(name, dtype, trees=40)
    assert worst <= bound


def test_float32_decodes_what_plain_generate_does():
    assert gpu_check.equality(torch.float32)["equal"] == 1.0


@pytest.mark.parametrize("name", CUDA_KERNELS)
def test_bfloat16_agrees_until_two_tokens_are_nearly_tied(name):
    reason = gpu_check.obstacle(name)
    if reason:
        pytest.skip(reason)
    assert gpu_check.equality(torch.bfloat16, name)["gap_at_first_difference"] < 0.5


@pytest.mark.parametrize("options", [dict(), dict(mode="reduce-overhead")])
def test_a_compiled_cycle_decodes_as_an_eager_one(options):
    assert gpu_check.compiled_equality(options)["equal"]
