"""`hf-d2sd push`: a folder with a pair or a drafter becomes a repository of the Hub."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from .. import modeling
from ..modeling import D2SDAssistant, D2SDConfig, D2SDDrafterModel
from ..modeling.modeling_d2sd import CUSTOM_GENERATE
from ..modeling.weights_d2sd import check_weights, find_weights
from .card import read_config

_CODE = {path.name: path.read_bytes() for path in Path(modeling.__file__).parent.glob("*_d2sd.py")}
_CODE |= {f"custom_generate/{name}": text.encode() for name, text in CUSTOM_GENERATE.items()}
_ALLOWED = re.compile(
    r"config\.json|README\.md|LICENSE(\.\w+)?|\.gitattributes|model[\w.-]*\.safetensors(\.index\.json)?"
    r"|[\w.-]+\.(png|jpg|svg|webp)|[\w.-]*results[\w.-]*\.json"
)
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|joblib|npy|npz|h5|msgpack)")
_SECRET = re.compile(
    rb"\bhf_[A-Za-z0-9]{30,}|\b(ghp|gho|github_pat)_\w{30,}|\bAKIA[0-9A-Z]{16}\b|\bsk-[\w-]{30,}"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@dataclass
class PushOptions:
    """Upload a folder with a pair or a drafter to the Hub; it may hold nothing else."""

    model: Path = field(metadata={"help": "folder of the pair or drafter"})
    repo: str = field(metadata={"help": "organisation/name; made if it is not there"})
    private: bool = field(default=False, metadata={"help": "a new repository is private"})
    dry_run: bool = field(default=False, metadata={"help": "list files and sizes, upload nothing"})
    message: str = "Upload drafters"
    revision: str | None = field(default=None, metadata={"help": "branch"})


def push(options: PushOptions) -> dict:
    """Check the folder, and upload it in one commit; returns files with their sizes, and the commit's address.

    Raises:
        ValueError: naming every file that does not belong there, or weights that are not the config's.
    """
    validate_repo_id(options.repo)
    if not options.dry_run and get_token() is None:
        raise ValueError(
            "There is no token to upload with: run `hf auth login`, or set HF_TOKEN; --dry_run needs none."
        )
    files = checked_files(options.model)
    report = {"repo": options.repo, "files": {name: (options.model / name).stat().st_size for name in files}}
    if options.dry_run:
        return report | {"dry_run": True}
    api = HfApi(library_name="hf-d2sd")
    repo = api.create_repo(options.repo, private=options.private or None, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo,
        folder_path=options.model,
        allow_patterns=files,
        commit_message=options.message,
        revision=options.revision,
    )
    return report | {"commit": str(commit.commit_url)}


def checked_files(folder: Path) -> list[str]:
    """Names of the folder's files, sorted.

    Raises:
        ValueError: naming every file that does not belong there, or weights that are not the config's.
    """
    config = read_config(folder)
    kind = D2SDAssistant if isinstance(config, D2SDConfig) else D2SDDrafterModel
    check_weights(folder, find_weights(folder), kind.tensor_shapes(config))
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    problems = [f"{name} ({reason})" for name, path in names.items() if (reason := obstacle(name, path)) is not None]
    if "README.md" not in names:
        problems.append("README.md (missing: make it by hf-d2sd card)")
    if problems:
        raise ValueError(f"{folder} cannot be pushed: {', '.join(problems)}.")
    return list(names)


def obstacle(name: str, path: Path) -> str | None:
    """Why a file is not to be uploaded; `None` if it may be."""
    if path.is_symlink():
        return "a link"
    if _PICKLE.fullmatch(name):
        return "a pickle or the like: weights are safetensors"
    if name in _CODE:
        return None if path.read_bytes() == _CODE[name] else "not this release's code: save the pair again"
    if not _ALLOWED.fullmatch(name):
        return "does not belong to a drafter's repository"
    if path.suffix in (".json", ".md", ".svg", "") and _SECRET.search(path.read_bytes()):
        return "holds what looks like a secret"
    return None
