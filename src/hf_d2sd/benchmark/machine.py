"""What a reader of figures must know of the machine and the software that they come from."""

import platform
import subprocess
import time
from pathlib import Path

import torch
import transformers

from .. import __version__


def environment() -> dict:
    """As it is now."""
    return {
        "versions": versions(),
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def versions() -> dict[str, str]:
    packages = {"hf_d2sd": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {**packages, "python": platform.python_version()}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that this package runs from; `None` where it was installed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
