"""`hf-d2sd export`: a drafter as other engines read it. The layouts, there and back, are `modeling.formats_d2sd`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..checks import refuse_unwritable_folder
from ..drafting import draft_head
from ..modeling import D2SDDrafterModel
from ..modeling.formats_d2sd import DEFAULT_FORMAT, Format, TargetParts, format_named, written_formats
from ..pairs import load_drafter, read_drafter_config, refuse_missing_folder

_ENGINES = "; ".join(f"{format.name} for {format.engines}" for format in written_formats())


@dataclass
class ExportOptions:
    """Write one drafter in a layout that other engines read."""

    model: str = field(metadata={"help": "folder or Hub id of a pair or a drafter"})
    out: Path = field(metadata={"help": "folder that is written"})
    format: str = field(
        default=DEFAULT_FORMAT,
        metadata={"help": f"the layout: {_ENGINES}", "choices": [format.name for format in written_formats()]},
    )
    role: Literal["first", "second"] = field(default="first", metadata={"help": "which drafter of a pair"})
    target: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the target, for a layout that names it or takes rows of its head"},
    )


def export(options: ExportOptions) -> dict:
    """Write `config.json` and `model.safetensors`; returns what was written, and in words what was left out.

    Raises:
        ValueError: naming everything of the drafter that the format cannot say.
    """
    format = format_named(options.format)
    refuse_unwritable_folder("--out", options.out)
    for name in filter(None, (options.model, options.target)):
        refuse_missing_folder(name)
    if format.names_target and options.target is None:
        raise ValueError(f"The format {format.name!r} names the target (its verifier): pass it as --target.")
    _refuse(format, format.obstacles(read_drafter_config(options.model, options.role)))
    drafter = load_drafter(options.model, options.role)
    target = None if options.target is None else _target_parts(options.target, drafter)
    left_out = format.left_out(drafter.config)
    kept = {name: x for name, x in drafter.state_dict().items() if not name.startswith(tuple(left_out))}
    written, tensors = format.write(drafter.config, kept, target)
    written["dtype"] = str(drafter.dtype).removeprefix("torch.")
    _write(options.out, written, tensors)
    said = {"format": options.format, "tensors": len(tensors), "out": str(options.out)}
    return said | ({"left_out": list(left_out.values())} if left_out else {})


def _refuse(format: Format, reasons: list[str]) -> None:
    if reasons:
        raise ValueError(f"The format {format.name!r} cannot say this of the drafter: {'; '.join(reasons)}.")


def _target_parts(target: str, drafter: D2SDDrafterModel) -> TargetParts:
    def architectures() -> list[str]:
        return AutoConfig.from_pretrained(target).architectures or []

    def head() -> nn.Module:
        return draft_head(drafter, AutoModelForCausalLM.from_pretrained(target).get_output_embeddings())

    return TargetParts(target, architectures, head)


def _write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
