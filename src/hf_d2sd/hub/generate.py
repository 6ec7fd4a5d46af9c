"""What `custom_generate/generate.py` of a pair's repository runs: `generate` with the pair that lies beside it."""

import functools
import os
import sys

from ..modeling import D2SDAssistant
from ..modeling.weights_d2sd import HUB_OPTIONS


def generate(model, *args, **kwargs):
    """Transformers' `generate` of a target, decoding with the pair of the repository named as `custom_generate`.

    Called by `target.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)`; `revision`, `token` and the
    other options of loading go to the repository, all others to `generate`.

    Raises:
        ValueError: if an `assistant_model` is passed too, or the repository holds no pair for this target.
    """
    if kwargs.pop("assistant_model", None) is not None:
        raise ValueError("custom_generate names a repository with a pair; pass either it or assistant_model.")
    hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
    pair = _load(_named_repository(sys._getframe(1)), tuple(sorted(hub.items())))
    return model.generate(*args, assistant_model=pair.to(model.device), **kwargs)


def _named_repository(frame) -> str:
    """What the user passed as `custom_generate`: Transformers' `generate`, our caller, does not hand it on."""
    while frame is not None:
        named = frame.f_locals.get("custom_generate")
        if isinstance(named, (str, os.PathLike)):
            return str(named)
        frame = frame.f_back
    raise ValueError("Pass custom_generate='REPOSITORY' to generate: it cannot be known which pair to load.")


@functools.lru_cache(maxsize=2)
def _load(repository: str, hub: tuple[tuple[str, object], ...]) -> D2SDAssistant:
    return D2SDAssistant.from_pretrained(repository, **dict(hub))
