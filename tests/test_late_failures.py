"""What a command's last step needs is asked for before its first: no error comes after a model was loaded."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from words import WORDS, save_word_drafters, save_word_target

from hf_d2sd import D2SDAssistant, D2SDDrafterModel
from hf_d2sd.checks import refuse_absent_device
from hf_d2sd.cli import main
from hf_d2sd.training.shards import Row, write_shard

ROOT = Path(__file__).parent.parent


class Reached(BaseException):
    """A model would have been loaded, a card written, an upload begun."""


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> SimpleNamespace:
    """A target, drafters, rows, prompts, and a file where a folder should be; as words of a command line."""
    folder = tmp_path_factory.mktemp("places")
    target = save_word_target(folder / "target")
    first, second = save_word_drafters(folder)
    D2SDAssistant.from_drafters(first, second).save_pretrained(folder / "pair")
    D2SDAssistant.from_drafters(first).save_pretrained(folder / "alone")
    (folder / "rows").mkdir()
    generator = torch.Generator().manual_seed(0)
    rows = [Row(torch.randint(5, len(WORDS), (12,), generator=generator), 4) for _ in range(40)]
    write_shard(folder / "rows" / "rows-00000.safetensors", rows)
    (folder / "empty").mkdir()
    (folder / "prompts.jsonl").write_text(json.dumps({"id": 1, "turns": ["a b"]}) + "\n")
    (folder / "file").write_text("not a folder")
    names = "rows empty prompts.jsonl file pair alone".split()
    places = {name.split(".")[0]: folder / name for name in names}
    return SimpleNamespace(
        target=target, first=first, second=second, inside=folder / "file" / "deep" / "er", folder=folder, **places
    )


@pytest.fixture
def guarded(monkeypatch, tmp_path):
    """Whatever loads weights, writes a card or uploads says that it was reached."""

    def reached(*args, **kwargs):
        raise Reached

    for owner in (tf.AutoModelForCausalLM, D2SDAssistant, D2SDDrafterModel):
        monkeypatch.setattr(owner, "from_pretrained", reached)
    monkeypatch.setattr(D2SDAssistant, "from_drafters", reached)
    monkeypatch.setattr("hf_d2sd.hub.card.make_card", reached)
    monkeypatch.setattr("hf_d2sd.hub.push.checked_files", reached)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    monkeypatch.chdir(tmp_path)


COMMANDS = {
    "distill": "--target {target} --out out --prompts {prompts} --dtype float32",
    "train": "--target {target} --data {rows} --out out --dtype float32 --mixed_precision no --held_out 2",
    "calibrate": "--drafter {first} --target {target} --data {rows} --held_out 2 --dtype float32",
    "join": "--first {first} --second {second} --out out",
    "bench": "--target {target} --drafters {pair} --prompts {prompts} --out out --dtype float32",
    "export": "--model {first} --out out",
    "card": "--model {pair} --out out/README.md --base_model org/name",
    "push": "--model {pair} --repo org/name",
    "generate": "--target {target} --drafters {pair} --prompt a --format json",
    "chat": "--target {target} --drafters {pair} --format json",
    "explain": "--target {target} --drafters {pair} --prompt a --out page.html",
}

LATE = [
    ("distill", "--out {file}", "is a file: name another folder"),
    ("distill", "--out {inside}", "is a file: name another folder"),
    ("distill", "--openings nowhere.txt", "--openings is nowhere.txt: there is no such file"),
    ("distill", "--prompts nowhere.jsonl", "--prompts is nowhere.jsonl: there is no such file"),
    ("distill", "--prompts {file}", "line 1: no JSON, or torn"),
    ("distill", "--answered {empty}", "has no rows"),
    ("distill", "--template_options {{", "template_options is no JSON"),
    ("distill", "--template_options []", "must be a JSON object"),
    ("distill", "--dtype float99", "--dtype is 'float99'"),
    ("distill", "--device cuda:99", "--device is 'cuda:99'; this machine has"),
    ("distill", "--target ./nowhere", "There is no folder ./nowhere"),
    ("train", "--out {inside}", "is a file: name another folder"),
    ("train", "--data {empty}", "has no rows"),
    ("train", "--role second --first ./nowhere", "There is no folder ./nowhere"),
    ("train", "--role second --init {alone}", "has no second drafter"),
    ("train", "--mask_token nothing", "is no token of the target's tokenizer"),
    ("train", "--trackers tensorbord", "Unsupported logging capability: tensorbord"),
    ("train", "--dtype float99", "--dtype is 'float99'"),
    ("calibrate", "--drafter {empty}", "is no folder of drafters"),
    ("calibrate", "--data {empty}", "has no rows"),
    ("calibrate", "--held_out 1", "held_out must be at least 2"),
    ("calibrate", "--held_out 100000", "held-out rows; two are needed"),
    ("calibrate", "--plot plot.nothing", "a kind of file that matplotlib does not write; it writes"),
    ("calibrate", "--plot {folder}", "a folder: name a file"),
    ("calibrate", "--plot {inside}/plot.png", "there is no folder"),
    ("join", "--out {inside}", "is a file: name another folder"),
    ("join", "--second ./nowhere", "There is no folder ./nowhere"),
    ("join", "--dtype float99", "--dtype is 'float99'"),
    ("bench", "--out {inside}", "is a file: name another folder"),
    ("bench", "--device cuda:99", "--device is 'cuda:99'"),
    ("export", "--out {file}", "is a file: name another folder"),
    ("export", "--target ./nowhere", "There is no folder ./nowhere"),
    ("export", "--format speculators", "names the target"),
    ("export", "--model {alone} --role second", "has no second drafter"),
    ("card", "--out {inside}", "there is no folder|is a file"),
    ("card", "--out {folder}", "a folder: name a file"),
    ("card", "--details nowhere.md", "--details is nowhere.md: there is no such file"),
    ("card", "--results nowhere.json", "--results is nowhere.json: there is no such file"),
    ("push", "--repo org/two/three", "Repo id"),
    ("generate", "--device nothing", "which torch does not know"),
    ("chat", "--device cuda:99", "--device is 'cuda:99'"),
    ("explain", "--out {inside}", "there is no folder"),
    ("explain", "--out {folder}", "a folder: name a file"),
]


def words_of(line: str, at: SimpleNamespace) -> list[str]:
    return [word.format(**vars(at)) for word in line.split()]


def run(command: str, more: str, at: SimpleNamespace) -> None:
    """The command with its working options, those of `more` in their place."""
    base = COMMANDS[command]
    for option in [word for word in more.split() if word.startswith("--") and len(word) > 2]:
        before, found, behind = base.partition(f"{option} ")
        base = f"{before}{behind.partition(' --')[1]}{behind.partition(' --')[2]}" if found else base
    main([command, *words_of(f"{base} {more}", at)])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_control_reaches_what_costs(command, at, guarded):
    with pytest.raises(Reached):
        run(command, "", at)


@pytest.mark.parametrize("command, more, message", LATE)
def test_nothing_is_loaded_before_the_error(command, more, message, at, guarded, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, more, at)
    assert re.search(message, f"{stopped.value} {capsys.readouterr().err}")
    assert not Path("out").is_dir() or not any(Path("out").iterdir()), "and nothing is left behind"


class TestMore:
    def test_a_template_without_a_system_message(self, at, guarded, tmp_path):
        tokenizer = tf.AutoTokenizer.from_pretrained(at.target)
        tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
        folder = save_word_target(tmp_path / "target")
        tokenizer.save_pretrained(folder)
        with pytest.raises(SystemExit, match="refuses --system and a user's turn"):
            run("distill", f"--target {folder} --system be_brief", at)
        with pytest.raises(SystemExit, match="does not show the user's words"):
            run("distill", f"--target {folder} --self_prompts 3", at)

    def test_distill_in_a_folder_of_other_options(self, at, guarded):
        with pytest.raises(Reached):
            run("distill", "", at)
        with pytest.raises(SystemExit, match="is of a run with other settings: .*seed"):
            run("distill", "--seed 5", at)

    def test_train_from_a_checkpoint_of_other_options(self, at, guarded, monkeypatch):
        from hf_d2sd.training import loop

        Path("out").mkdir()
        monkeypatch.setattr(
            loop, "read_metadata", lambda path: {"options": json.dumps({"lr": 0.5, "training_rows": 3})}
        )
        Path("out/checkpoint.safetensors").write_bytes(b"")
        with pytest.raises(SystemExit, match="is of a run with other settings: .*lr: 0.5 there"):
            run("train", "", at)

    def test_a_tracker_that_cannot_begin(self, at, guarded, monkeypatch):
        """One without its key, say: it is opened before the target is loaded."""
        from accelerate.tracking import GeneralTracker
        from accelerate.utils import LoggerType

        class Locked(GeneralTracker):
            name, requires_logging_directory, tracker = "locked", False, None

            def __init__(self, run_name, **_):
                raise ValueError("no key for this tracker")

        for place in ("accelerate.tracking", "accelerate.accelerator"):
            monkeypatch.setitem(sys.modules[place].LOGGER_TYPE_TO_CLASS, "tensorboard", Locked)
        for place in ("accelerate.tracking", "hf_d2sd.training.options"):
            monkeypatch.setattr(f"{place}.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
        with pytest.raises(SystemExit, match="no key for this tracker"):
            run("train", "--trackers tensorboard", at)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="it has what is asked for")
    def test_an_attention_that_the_device_does_not_have(self, at, guarded):
        with pytest.raises(SystemExit, match="flex_attention needs CUDA; the device is cpu"):
            run("train", "--attention flex_attention", at)

    def test_a_run_of_bench_that_is_damaged(self, at, guarded):
        Path("out").mkdir()
        Path("out/rows.jsonl").write_text('{"key": [1]}\nnothing\n{"key": [2]}\n')
        with pytest.raises(SystemExit, match="rows.jsonl, line 2: no JSON object"):
            run("bench", "", at)

    def test_an_upload_without_a_token(self, at, guarded, monkeypatch):
        monkeypatch.setattr("hf_d2sd.hub.push.get_token", lambda: None)
        with pytest.raises(SystemExit, match="no token to upload with: run `hf auth login`"):
            run("push", "", at)
        with pytest.raises(Reached):
            run("push", "--dry_run True", at)

    @pytest.mark.parametrize("command", ["calibrate --plot plot.png", "bench"])
    def test_a_plot_or_a_report_without_matplotlib(self, command, at, guarded, monkeypatch):
        find = importlib.util.find_spec
        absent = lambda name, *more: None if name == "matplotlib" else find(name, *more)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", absent)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        name, _, more = command.partition(" ")
        with pytest.raises(SystemExit, match="matplotlib.*pip install 'hf-d2sd"):
            run(name, more, at)

    @pytest.mark.parametrize("command", ["generate", "chat", "doctor"])
    def test_text_without_rich(self, command, at, guarded, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "rich", None)
        monkeypatch.delitem(sys.modules, "hf_d2sd.apps.display", raising=False)
        monkeypatch.delattr("hf_d2sd.apps.display", raising=False)
        prompt = "--prompt a" if command == "generate" else ""
        line = f"--target {at.target} --drafters {at.pair} --format text {prompt}"
        with pytest.raises(SystemExit, match="rich"):
            main([command, *line.split()])

    def test_devices_that_are_there_pass(self):
        for device in (None, "auto", "cpu"):
            refuse_absent_device(device)


SCRIPTS = {
    "benchmarks/acceptance.py": "--pair {pair} --out {inside}/a.json",
    "benchmarks/cascade.py": "--out {empty}/nowhere/a.json",
    "benchmarks/equality.py": "--pair {pair} --work {empty}/work --out {empty}/nowhere/a.json",
    "benchmarks/memory.py": "--pair {pair} --out {folder}",
    "benchmarks/gpu_check.py": "--out {empty}/nowhere/a.json",
    "benchmarks/ablations.py": "--target {target} --data {rows} --work {inside}",
    "examples/passages.py": "--target {target} --data {rows} --out {empty}/nowhere/a.jsonl",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_could_not_write_what_it_measures(script, at, guarded, monkeypatch):
    path = ROOT / script
    for folder in (path.parent, ROOT / "examples"):
        monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location(f"late_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if hasattr(module, "load_smollm2"):
        monkeypatch.setattr(module, "load_smollm2", lambda *args, **kwargs: pytest.fail("the target was loaded"))
    monkeypatch.setattr(sys, "argv", [script, *words_of(SCRIPTS[script], at)])
    with pytest.raises(ValueError, match="there is no folder|is a file|a folder: name a file"):
        module.main()
    assert not list(at.empty.iterdir())
