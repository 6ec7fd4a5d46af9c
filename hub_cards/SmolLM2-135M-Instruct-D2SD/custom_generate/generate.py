# Copyright 2026 The hf-d2sd authors. Licensed under the Apache License, Version 2.0.
"""`target.generate(..., custom_generate=THIS_REPOSITORY, trust_remote_code=True)` decodes with this pair."""

from hf_d2sd.hub.generate import generate

__all__ = ["generate"]
