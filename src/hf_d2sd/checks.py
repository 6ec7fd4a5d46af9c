"""What a command needs for its last step, asked for before its first: folders, files, packages, devices, dtypes."""

import importlib.util
import os
from pathlib import Path

import torch


def refuse_unwritable_folder(option: str, folder: str | Path) -> None:
    """A folder must be there and writable, or such that it can be made.

    Args:
        option: how the command calls it, "--out" say.

    Raises:
        ValueError: naming the file that is in the way, or the folder that may not be written to.
    """
    absolute = Path(folder).absolute()
    nearest = next(place for place in (absolute, *absolute.parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"{option} is {folder}, and {nearest} is a file: name another folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option} is {folder}, and {nearest} may not be written to: name another folder.")


def refuse_unwritable_file(option: str, file: str | Path | None, makes_folder: bool = False) -> None:
    """A file to be written must not be a folder, and must be in a folder that is there.

    Args:
        makes_folder: that folder may be missing, and is made. A file that is not asked for, `None`, is fine.

    Raises:
        ValueError: saying what is in the way.
    """
    if file is None:
        return
    file = Path(file)
    if file.is_dir():
        raise ValueError(f"{option} is {file}, a folder: name a file in a folder that is there.")
    if not makes_folder and not file.parent.is_dir():
        missing = f"there is no folder {file.parent}"
        raise ValueError(f"{option} is {file}; {missing}: name a file in a folder that is there.")
    refuse_unwritable_folder(option, file.parent)


def refuse_missing_file(option: str, file: str | Path | None) -> None:
    """A file to be read must be there; one that is not asked for, `None`, is fine."""
    if file is not None and not Path(file).is_file():
        raise ValueError(f"{option} is {file}: there is no such file.")


def refuse_missing_packages(option: str, extra: str, *names: str) -> None:
    """Raises `ValueError` where a package is not installed, with how to install it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{option} needs {' and '.join(missing)}, which is not installed: pip install 'hf-d2sd[{extra}]'."
        )


def refuse_absent_device(device: str | None) -> None:
    """Raises `ValueError` for a device that torch does not know, or that this machine does not have."""
    if device in (None, "auto"):
        return
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device is {device!r}, which torch does not know: name cpu or cuda:1 say.") from error
    kind = getattr(torch, wanted.type, None)
    has_some = getattr(kind, "is_available", lambda: True)()
    count = getattr(kind, "device_count", lambda: 1)() if has_some else 0
    if count <= (wanted.index or 0):
        raise ValueError(f"--device is {device!r}; this machine has {count} of these. Name another one, cpu say.")


def refuse_unknown_dtype(dtype: str, *others: str) -> None:
    """Raises `ValueError` for what is no floating-point type of torch's, and none of the `others`."""
    known = getattr(torch, dtype, None)
    if dtype not in others and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"--dtype is {dtype!r}; name float32, bfloat16 or float16.")
