"""D²SD speculative decoding for Transformers: `target.generate(..., assistant_model=D2SDAssistant)`."""

import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModel

if Version(transformers.__version__) < Version("5.20"):
    raise ImportError(
        f"hf-d2sd needs transformers 5.20 or later, found {transformers.__version__}: pip install -U transformers"
    )

from . import integration
from .binding import bind, tokenizer_fingerprint
from .modeling import D2SDAssistant, D2SDConfig, D2SDDrafterConfig, D2SDDrafterModel
from .stats import Cycle, D2SDStats
from .streaming import Piece, SourceStreamer

__version__ = "0.1.0"

integration.install()
for _config, _model in ((D2SDDrafterConfig, D2SDDrafterModel), (D2SDConfig, D2SDAssistant)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)

__all__ = [
    "Cycle",
    "D2SDAssistant",
    "D2SDConfig",
    "D2SDDrafterConfig",
    "D2SDDrafterModel",
    "D2SDStats",
    "Piece",
    "SourceStreamer",
    "bind",
    "tokenizer_fingerprint",
]
