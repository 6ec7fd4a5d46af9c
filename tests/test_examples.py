"""The scripts of examples/ do what they say, on a tiny target."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_d2sd import D2SDAssistant

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

LAYERS = [0, 2]


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    """A random Llama of four layers with SmolLM2's tokenizer."""
    from smollm2 import load_smollm2

    folder = tmp_path_factory.mktemp("target")
    _, tokenizer = load_smollm2()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(target_folder, tmp_path_factory):
    """Responses of the target to 200 prompts, and its features."""
    folder = tmp_path_factory.mktemp("data")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"turns": [f"What is {i} and {i}?"]}) + "\n" for i in range(200)))
    sizes = ["--max-new-tokens", 24, "--batch-size", 64, "--dtype", "float32"]
    run("distill_responses.py", "--target", target_folder, "--prompts", prompts, "--out", folder, *sizes)
    run("train_first_pair.py", "features", "--target", target_folder, "--data", folder, "--layers", *LAYERS)
    return folder


def train(target_folder, data, out, role: str, minutes: float) -> list[dict]:
    """The lines of the run's log."""
    options = ["--layers", *LAYERS, "--draft-vocab-size", 256, "--block-size", 4, "--rows", 2, "--anchors", 4]
    run(
        "train_first_pair.py", "train", "--target", target_folder, "--data", data, "--role", role, "--out", out,
        "--minutes", minutes, "--log-every", 5, *options,
    )  # fmt: skip
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_responses_are_the_targets_own_greedy_text(target_folder, data):
    from safetensors.torch import load_file

    target = tf.AutoModelForCausalLM.from_pretrained(target_folder).eval()
    shard = load_file(min(data.glob("rows-*.safetensors")))
    lengths = shard["lengths"].tolist()
    row, prompt_length = shard["tokens"].split(lengths)[0].long(), int(shard["prompt_lengths"][0])
    prompt = row[None, :prompt_length]
    out = target.generate(prompt, do_sample=False, max_new_tokens=lengths[0] - prompt_length)
    assert out[0].tolist() == row.tolist()


def test_a_pair_is_trained_stopped_resumed_joined_and_decodes(target_folder, data, tmp_path):
    for role in ("first", "second"):
        train(target_folder, data, tmp_path / role, role, minutes=0.05)
    steps = [line["step"] for line in train(target_folder, data, tmp_path / "first", "first", minutes=0.1)]
    assert steps.count(0) == 1, "the second call starts over"
    assert steps == sorted(steps)
    pair = tmp_path / "pair"
    run("train_first_pair.py", "join", "--first", tmp_path / "first" / "drafter", "--second",
        tmp_path / "second" / "drafter", "--num-branches", 2, "--out", pair)  # fmt: skip
    target = tf.AutoModelForCausalLM.from_pretrained(target_folder).eval()
    assistant = D2SDAssistant.from_pretrained(pair, dtype=torch.float32)
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = dict(do_sample=False, max_new_tokens=16)
    plain = target.generate(prompt, **options)
    assert target.generate(prompt, **options, assistant_model=assistant).tolist() == plain.tolist()


@pytest.mark.slow
def test_the_script_for_smollm2_makes_a_pair_and_goes_on_where_it_stopped(tmp_path):
    """All stages on the real target, with a few rows and steps; the first call stops in the text."""
    import os

    sizes = dict(MAX_PROMPTS=60, SELF_PROMPTS=8, FIRST_STEPS=6, SECOND_STEPS=6, ROWS=2, ANCHORS=8, BATCH_SIZE=16)
    environment = {**os.environ, **{name: str(value) for name, value in sizes.items()}, "PYTHON": sys.executable}
    command = [str(ROOT / "examples" / "train_smollm2.sh"), str(tmp_path / "run")]
    stopped = subprocess.run(command, env={**environment, "STOP_AFTER": "0"}, capture_output=True, text=True)
    assert stopped.returncode == 1 and "shards are missing" in stopped.stderr, stopped.stderr[-2000:]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for role in ("first", "second"):
        losses = [json.loads(line) for line in (tmp_path / "run" / role / "log.jsonl").read_text().splitlines()]
        assert losses[-1]["step"] == 6
    pair = D2SDAssistant.from_pretrained(tmp_path / "run" / "pair")
    assert all(len(drafter.config.confidence_temperatures) == 7 for drafter in pair.drafters)
    assert sum(parameter.numel() for parameter in pair.parameters()) < 20e6
