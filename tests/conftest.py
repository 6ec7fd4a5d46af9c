import sys
from pathlib import Path

import pytest
import torch
from reference import PackedReference

from hf_d2sd.kernels import KERNELS


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def packed(monkeypatch):
    """A backend "packed" that takes what FlashAttention's packed calls take, and computes it by the rule."""
    kernel = PackedReference()
    monkeypatch.setitem(KERNELS, kernel.name, kernel)
    return kernel


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct and its tokenizer, saved."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from smollm2 import save_smollm2

    return save_smollm2()
