"""`hf-d2sd bench` on SmolLM2-135M-Instruct with the pair of this repository and its prompts.

python benchmarks/side_by_side.py --out FOLDER [--dtype float32] [any option of `hf-d2sd bench`]
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from smollm2 import NAME, load_smollm2  # noqa: E402

from hf_d2sd.cli import main  # noqa: E402

if __name__ == "__main__":
    load_smollm2()  # converts it where that was not done yet
    cache = Path(os.environ.get("HF_D2SD_CACHE") or Path.home() / ".cache" / "hf-d2sd")
    files = [str(file) for file in sorted((HERE / "prompts").glob("*.jsonl"))]
    models = ["--target", str(cache / NAME), "--drafters", str(HERE.parent / "hub_cards" / f"{NAME}-D2SD")]
    main(["bench", *models, "--prompts", *files, *sys.argv[1:]])
