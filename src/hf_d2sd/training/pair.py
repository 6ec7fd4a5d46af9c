"""`hf-d2sd join`: two trained drafters become one assistant, in one folder."""

from dataclasses import dataclass, field

import torch

from ..modeling import D2SDAssistant


@dataclass
class JoinOptions:
    """Join a first and a second drafter to the folder that `D2SDAssistant.from_pretrained` reads."""

    first: str = field(metadata={"help": "folder or Hub id of the first drafter"})
    out: str = field(metadata={"help": "folder of the pair"})
    second: str | None = field(default=None, metadata={"help": "folder or Hub id of the second drafter"})
    num_branches: int | None = field(default=None, metadata={"help": "K, the pair's default"})
    tree_budget: int | None = field(default=None, metadata={"help": "nodes in a target pass, the pair's default"})
    tree_width: int = field(default=1, metadata={"help": "tokens of a draft at one place, the pair's default"})
    dtype: str = "bfloat16"


def join(options: JoinOptions) -> dict[str, int]:
    assistant = D2SDAssistant.from_drafters(
        options.first,
        options.second,
        num_branches=options.num_branches,
        tree_budget=options.tree_budget,
        tree_width=options.tree_width,
        dtype=getattr(torch, options.dtype),
    )
    assistant.save_pretrained(options.out)
    return {"parameters": sum(parameter.numel() for parameter in assistant.parameters())}
