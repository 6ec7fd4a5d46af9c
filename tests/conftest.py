import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from reference import (
    PackedReference,
    dense_flash,
    efficient,
    flash_cache_kernel,
    torch_kernel,
    with_kvcache_2,
    with_kvcache_3,
)
from tiny import changed_since
from transformers import GenerationConfig

from hf_d2sd import cache, kernels
from hf_d2sd.attention import choose
from hf_d2sd.kernels import KERNELS


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_models_stay_as_they_are():
    """A test that changes them would break others, by the order in which they happen to run."""
    yield
    changed = changed_since()
    assert not changed, f"this test has changed models that others share: {changed}"


@pytest.fixture(autouse=True)
def _the_same_tree_in_each_cycle(monkeypatch):
    """What a test does not ask for with `d2sd_auto=True` is not chosen by what this machine's work happens to cost."""
    monkeypatch.setattr(GenerationConfig, "d2sd_auto", False, raising=False)


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    """Accelerate keeps what the first `Accelerator` of a process was asked for, and refuses others."""
    _forget_accelerator()
    yield
    _forget_accelerator()


def _forget_accelerator():
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.PartialState._reset_state()


@pytest.fixture
def library_default(monkeypatch):
    """Each cycle is what pays, as in any program."""
    monkeypatch.setattr(GenerationConfig, "d2sd_auto", None)


@pytest.fixture
def packed(monkeypatch):
    """A backend "packed" that takes what FlashAttention's packed calls take, and computes it by the rule."""
    kernel = PackedReference()
    monkeypatch.setitem(KERNELS, kernel.name, kernel)
    return kernel


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The backends of a GPU, and buffers as there, on a CPU: by stand-ins that refuse what the kernels refuse."""
    packed = PackedReference()
    packed.is_there = True
    chosen = {
        "torch": torch_kernel(packed),
        "flash_attention_2": flash_cache_kernel("flash_attention_2", with_kvcache_2),
        "flash_attention_3": flash_cache_kernel("flash_attention_3", with_kvcache_3),
        "packed": packed,
    }
    for name, kernel in chosen.items():
        monkeypatch.setitem(KERNELS, name, kernel)
    monkeypatch.setattr(kernels, "_efficient_kernel", efficient)
    monkeypatch.setattr(kernels, "_flash_kernel", dense_flash)
    monkeypatch.setattr(cache, "has_heads_side_by_side", lambda states: True)
    choose.cache_clear()
    yield chosen
    choose.cache_clear()  # elsewhere they cannot run


@pytest.fixture(scope="session")
def smollm2_folder():
    """SmolLM2-135M-Instruct and its tokenizer, saved."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from smollm2 import save_smollm2

    return save_smollm2()


@pytest.fixture
def bare_python(tmp_path):
    """The Python of an environment that has all packages of this one but hf-d2sd."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
    (Path(own) / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert subprocess.run([python, "-c", "import torch, hf_d2sd"], capture_output=True).returncode
    return python
