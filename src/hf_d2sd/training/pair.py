"""`hf-d2sd join`: two trained drafters become one assistant, in one folder."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..checks import refuse_unknown_dtype, refuse_unwritable_folder
from ..modeling import D2SDAssistant
from ..options import command_fields, pair_options
from ..pairs import load_drafter, refuse_missing_folder

if TYPE_CHECKING:
    DefaultFields = Any
else:
    DefaultFields = command_fields(*pair_options())


@dataclass(kw_only=True)
class JoinOptions(DefaultFields):
    """Join a first and a second drafter to the folder that `D2SDAssistant.from_pretrained` reads."""

    first: str = field(metadata={"help": "folder or Hub id of the first drafter, or of a pair that has it"})
    out: str = field(metadata={"help": "folder of the pair"})
    second: str | None = field(default=None, metadata={"help": "folder or Hub id of the second drafter, or of a pair"})
    dtype: str = "bfloat16"
    max_shard_size: str | None = field(default=None, metadata={"help": "of a file, e.g. 12MB; default: one file"})


def join(options: JoinOptions) -> dict[str, int]:
    refuse_unknown_dtype(options.dtype)
    refuse_unwritable_folder("--out", options.out)
    for name in filter(None, (options.first, options.second)):
        refuse_missing_folder(name)
    dtype, named = getattr(torch, options.dtype), (("first", options.first), ("second", options.second))
    assistant = D2SDAssistant.from_drafters(
        *(load_drafter(name, role, dtype=dtype) for role, name in named if name is not None),
        **{name: getattr(options, name) for name in pair_options() if getattr(options, name) is not None},
    )
    sizes = {} if options.max_shard_size is None else {"max_shard_size": options.max_shard_size}
    assistant.save_pretrained(options.out, **sizes)
    return {"parameters": sum(parameter.numel() for parameter in assistant.parameters())}
