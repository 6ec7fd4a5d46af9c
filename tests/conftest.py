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
