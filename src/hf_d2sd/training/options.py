"""The options of `hf-d2sd train`."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..checks import refuse_unknown_dtype, refuse_unwritable_folder
from ..pairs import read_drafter_config, refuse_missing_folder
from .losses import SCHEMES
from .shards import refuse_missing_rows


@dataclass
class TrainOptions:
    """Train a drafter or a draft LM on rows of `hf-d2sd distill`; a killed run goes on from its checkpoint."""

    target: str = field(metadata={"help": "folder or Hub id of the target"})
    data: list[Path] = field(metadata={"help": "folders of `hf-d2sd distill`, one or more"})
    out: Path = field(metadata={"help": "folder of the run: checkpoint, log, the last and the best drafter"})
    role: str = field(
        default="first",
        metadata={
            "help": "first, second, both in one loop, or lm",
            "choices": ["first", "second", "both", "lm"],
        },
    )
    first: str | None = field(default=None, metadata={"help": "second: the trained first drafter, or its pair"})
    init: str | None = field(
        default=None,
        metadata={"help": "a drafter to go on from, or a pair, whose drafter of this role it is; a folder or Hub id"},
    )
    features: str = field(
        default="cache",
        metadata={
            "help": "cache: computed once, kept on disk; online: in each step",
            "choices": ["cache", "online"],
        },
    )
    block_size: int = field(default=16, metadata={"help": "γ"})
    num_layers: int = field(default=2, metadata={"help": "of the drafter"})
    target_layer_ids: list[int] | None = field(default=None, metadata={"help": "layers to read; default: spread out"})
    intermediate_size: int | None = field(default=None, metadata={"help": "of the drafter; default: the target's"})
    qk_norm: bool = field(default=True, metadata={"help": "norm queries and keys, as Qwen3 does"})
    sliding_window: int | None = field(default=None, metadata={"help": "of all the drafter's layers; default: none"})
    feature_fusion: str = field(
        default="shared",
        metadata={
            "help": "shared, or layerwise: own weights of the target's layers",
            "choices": ["shared", "layerwise"],
        },
    )
    path_rank: int | None = field(
        default=None, metadata={"help": "a path head of this rank is learned with the drafter; default: none"}
    )
    path_text_weight: float | None = field(
        default=4.0,
        metadata={"help": "of what followed a token earlier in the text, for a new path head"},
    )
    path_dropout: float = field(default=0.4, metadata={"help": "of the path head, in training"})
    train: str = field(
        default="drafter",
        metadata={
            "help": "drafter: all of it; path_head: that alone, the rest stays as it is (needs --init)",
            "choices": ["drafter", "path_head"],
        },
    )
    draft_vocab_size: int | None = field(default=None, metadata={"help": "how many frequent tokens; default: all"})
    mask_token: str | None = field(default=None, metadata={"help": "default: the tokenizer's, or one the rows lack"})
    init_layers: str = field(
        default="random", metadata={"help": "random, or target: its top layers", "choices": ["random", "target"]}
    )
    loss: str = field(default="decay", metadata={"help": "weights of the slots", "choices": list(SCHEMES)})
    tau: float | None = field(default=None, metadata={"help": "of decay; default: 7, 5, 4 from γ = 16, 10, 8 down"})
    distill_top_k: int = field(default=0, metadata={"help": "also learn the target's k likeliest tokens; 0: off"})
    distill_weight: float = field(default=0.5, metadata={"help": "share of the loss that is about them"})
    prefix_base: float = field(default=0.9, metadata={"help": "second: v kept tokens with P(v) ∝ base^v"})
    on_policy: float = field(
        default=0.5,
        metadata={"help": "second: share of blocks kept up to where the first drafter is wrong (needs --first)"},
    )
    epochs: float = 6.0
    max_steps: int | None = field(default=None, metadata={"help": "instead of epochs"})
    minutes: float | None = field(
        default=None, metadata={"help": "instead of both: the schedule is one of time, and ends when it has passed"}
    )
    rows: int = field(default=4, metadata={"help": "rows in a forward, on each device"})
    anchors: int = field(default=64, metadata={"help": "blocks out of each row"})
    max_length: int = field(default=3072, metadata={"help": "longer rows are cut"})
    accumulation: int = field(default=1, metadata={"help": "forwards in an update"})
    lr: float = 6e-4
    warmup: float = field(default=0.04, metadata={"help": "share of the steps"})
    weight_decay: float = 0.01
    clip: float = field(default=1.0, metadata={"help": "greatest norm of the gradient"})
    ema: float | None = field(default=None, metadata={"help": "decay of averaged weights, e.g. 0.999"})
    mixed_precision: str = field(default="bf16", metadata={"help": "bf16 or no", "choices": ["bf16", "no"]})
    attention: str = field(default="sdpa", metadata={"help": "sdpa, or flex_attention (CUDA): skips masked tiles"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the model: a slow start, faster steps"})
    loss_chunk: int = field(default=1024, metadata={"help": "slots whose logits exist at a time"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the target"})
    held_out: int = field(default=50, metadata={"help": "one row in so many is kept for evaluation"})
    eval_every: int = field(default=500, metadata={"help": "updates"})
    eval_rows: int = field(default=16, metadata={"help": "held-out prompts to decode"})
    eval_tokens: int = field(default=64, metadata={"help": "new tokens of each"})
    save_every: int = field(default=100, metadata={"help": "updates"})
    max_shard_size: str | None = field(
        default=None, metadata={"help": "of the files of `last` and `best`, e.g. 12MB; default: one file"}
    )
    log_every: int = field(default=20, metadata={"help": "updates"})
    stop_after: float | None = field(default=None, metadata={"help": "minutes; the same command then goes on"})
    trackers: list[str] = field(default_factory=list, metadata={"help": "of accelerate: tensorboard, trackio, wandb"})
    seed: int = 0

    def __post_init__(self):
        self.data = [Path(folder) for folder in ([self.data] if isinstance(self.data, (str, Path)) else self.data)]
        self.out = Path(self.out)
        for name in "num_layers rows anchors accumulation loss_chunk eval_every save_every log_every".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.minutes is not None and (self.minutes <= 0 or self.max_steps is not None):
            raise ValueError(f"minutes must be above 0, and without max_steps; got {self.minutes}, {self.max_steps}.")
        if not 0 <= self.path_dropout < 1:
            raise ValueError(f"path_dropout must be at least 0 and below 1; got {self.path_dropout}.")
        if self.held_out < 2:
            raise ValueError(f"held_out must be at least 2, one row in so many; got {self.held_out}.")
        if self.distill_top_k < 0 or not 0 <= self.distill_weight <= 1:
            raise ValueError(
                "distill_top_k must be at least 0 and distill_weight between 0 and 1; got "
                f"{self.distill_top_k} and {self.distill_weight}."
            )
        refuse_unknown_dtype(self.dtype, "auto")
        unknown = set(self.trackers) - {str(kind) for kind in LoggerType}
        if unknown:
            known = ", ".join(sorted(str(kind) for kind in LoggerType))
            raise ValueError(f"Unsupported logging capability: {', '.join(sorted(unknown))}. trackers are {known}.")
        installed = {str(kind) for kind in get_available_trackers()}
        absent = ({str(kind) for kind in LoggerType} - {"all"} - installed) & set(self.trackers)
        if absent:
            raise ValueError(f"trackers {sorted(absent)} are not installed: pip install them, or leave them out.")
        if self.init is not None and (self.role == "lm" or self.init_layers != "random"):
            raise ValueError("init brings a drafter's weights: pass it without --role lm and without --init_layers.")
        if self.train == "path_head" and (self.init is None or self.role == "lm" or self.draft_vocab_size is not None):
            raise ValueError(
                "train=path_head adds to a drafter that is there: pass --init, its role, and no vocabulary."
            )
        if self.train == "path_head" and self.path_rank is None:
            self.path_rank = 128
        if self.role == "both" and self.first is not None:
            raise ValueError("role=both trains the first drafter too: pass it, or a pair, as --init, not as --first.")
        if self.role not in ("second", "both"):
            self.prefix_base = self.on_policy = 0.0
        elif self.role == "second" and self.first is None:
            self.on_policy = 0.0
        if self.tau is None:
            self.tau = 7.0 if self.block_size >= 16 else 5.0 if self.block_size >= 10 else 4.0

    def check_places(self) -> None:
        """Look at all that a run reads and writes, without weights.

        Raises:
            ValueError: for folders without rows, drafters that are not there, or what is in the way of the run.
        """
        for name in (self.target, self.first, self.init):
            if name is not None:
                refuse_missing_folder(name)
        refuse_missing_rows(self.data)
        refuse_unwritable_folder("--out", self.out)
        if self.role == "second" and self.first is not None:
            read_drafter_config(self.first, "first")
        if self.init is not None:
            for role in ("first", "second") if self.role == "both" else (self.role,):
                read_drafter_config(self.init, role)
