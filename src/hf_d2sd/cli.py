"""The command `hf-d2sd`."""

import importlib
import json
import sys

from transformers import HfArgumentParser

# name: module, its options (a dataclass), its function: what that returns is printed, unless it has shown it itself
COMMANDS = {
    "distill": ("training.distill", "DistillOptions", "distill"),
    "train": ("training.trainer", "TrainOptions", "train"),
    "calibrate": ("training.calibration", "CalibrateOptions", "calibrate"),
    "join": ("training.pair", "JoinOptions", "join"),
    "bench": ("benchmark.run", "BenchOptions", "bench"),
    "report": ("benchmark.report", "ReportOptions", "report_run"),
    "export": ("hub.export", "ExportOptions", "export"),
    "card": ("hub.card", "CardOptions", "card"),
    "push": ("hub.push", "PushOptions", "push"),
    "generate": ("apps.generate", "GenerateOptions", "generate"),
    "chat": ("apps.chat", "ChatOptions", "chat"),
    "explain": ("apps.explain", "ExplainOptions", "explain"),
    "doctor": ("apps.doctor", "DoctorOptions", "doctor"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command; what is wrong with its options or inputs is said in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else "--help"
    if name not in COMMANDS:
        print(f"usage: hf-d2sd {{{','.join(COMMANDS)}}} [options]\n\nhf-d2sd COMMAND --help tells the options.")
        raise SystemExit(0 if name in ("-h", "--help") else 2)
    module_name, options_name, function_name = COMMANDS[name]
    module = importlib.import_module(f".{module_name}", __package__)
    options_class = getattr(module, options_name)
    parser = HfArgumentParser(options_class, prog=f"hf-d2sd {name}", description=options_class.__doc__)
    try:
        (options,) = parser.parse_args_into_dataclasses(arguments[1:])
        result = getattr(module, function_name)(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"hf-d2sd {name}: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if result is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
