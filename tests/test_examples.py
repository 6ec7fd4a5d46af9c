"""The scripts of examples/ do what they say."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from words import save_word_target

from hf_d2sd import D2SDAssistant
from hf_d2sd.training.distill import DistillOptions, count, distill
from hf_d2sd.training.shards import Row, read_rows, read_shard, shard_paths, write_shard

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_smollm2.sh"
TEXT = ROOT / "examples" / "smollm2_text"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A target of words, and rows that it wrote."""
    target = save_word_target(tmp_path_factory.mktemp("target"))
    out = tmp_path_factory.mktemp("text")
    distill(DistillOptions(str(target), out, self_prompts=20, dtype="float32", batch_size=16, max_new_tokens=24))
    return target, out


class TestPassages:
    def test_prompts_hold_replies_of_the_target(self, text, tmp_path):
        target, folder = text
        out = tmp_path / "prompts.jsonl"
        options = ["--target", target, "--data", folder, "--count", 9, "--shortest", 3, "--out", out]
        done = run("passages.py", *options)
        assert done.returncode == 0, done.stderr
        decode = tf.AutoTokenizer.from_pretrained(target).decode
        rows = read_rows(folder)
        replies = {decode(row.tokens[row.prompt_length :], skip_special_tokens=True).strip() for row in rows}
        prompts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
        assert len(prompts) == 9
        assert all(any(reply and reply in prompt for reply in replies) for prompt in prompts)

    def test_too_little_text_is_said(self, text, tmp_path):
        target, folder = text
        options = ["--target", target, "--data", folder, "--shortest", 999, "--out", tmp_path / "prompts.jsonl"]
        done = run("passages.py", *options)
        assert done.returncode == 1 and "--most 2: from 2 to the 0 passages" in done.stderr

    def test_long_prompts_hold_several_replies(self, text, tmp_path):
        target, folder = text
        out = tmp_path / "prompts.jsonl"
        options = ["--target", target, "--data", folder, folder, "--count", 20, "--shortest", 3, "--out", out]
        done = run("passages.py", *options, "--most", 5, "--several", 1)
        assert done.returncode == 0, done.stderr
        counts = {json.loads(line)["prompt"].count("Document ") for line in out.read_text().splitlines()}
        assert max(counts) >= 3 and counts <= {0, 2, 3, 4, 5}

    def test_requests_are_those_of_first_turns(self, text, tmp_path):
        target, _ = text
        read_texts = runpy.run_path(str(ROOT / "examples" / "passages.py"))["read_texts"]
        chats, out = tmp_path / "chats.jsonl", tmp_path / "text"
        chats.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in (["a b", "c d"], ["c d"])))
        distill(DistillOptions(str(target), out, prompts=[str(chats)], dtype="float32", max_new_tokens=4))
        requests = [request.strip() for request, _, _ in read_texts([out], tf.AutoTokenizer.from_pretrained(target))]
        assert len(read_rows(out)) == 3 and sorted(requests) == ["a b", "c d"]


class TestPromptsAboutCode:
    @pytest.fixture
    def about_code(self):
        return runpy.run_path(str(ROOT / "examples" / "passages.py"))["about_code"]

    def test_hold_the_function_or_its_head_and_request(self, about_code):
        code = "def twice(n):\n    return 2 * n"
        prompts = about_code("Double a number.", f"Here it is:\n\n```python\n{code}\n```\nIt doubles.")
        heads = [prompt for prompt in prompts if "Double a number." in prompt]
        assert heads and all('```python\ndef twice(n):\n    """Double a number."""\n```' in prompt for prompt in heads)
        whole = [prompt for prompt in prompts if prompt not in heads]
        assert whole and all(f"```python\n{code}\n```" in prompt for prompt in whole)

    def test_none_without_a_function(self, about_code):
        assert about_code("Say it.", "As in ```x = 1```, it is def nothing():") == []

    def test_a_long_request_is_no_docstring(self, about_code):
        prompts = about_code("word " * 100, "```python\ndef f():\n    pass\n```")
        assert prompts and not any("word" in prompt for prompt in prompts)


class TestTheTextOfSmollm2:
    def test_is_what_its_table_counts_in_one_shard_a_folder(self):
        page = (TEXT / "README.md").read_text(encoding="utf-8")
        table = re.findall(r"^\| `(\w+)/` \|.*\| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.M)
        assert {folder for folder, *_ in table} == {path.name for path in TEXT.iterdir() if path.is_dir()}
        for folder, *counts in table:
            rows, prompt_tokens, response_tokens = (int(number.replace(",", "")) for number in counts)
            assert count(TEXT / folder) == {
                "shards": 1,
                "rows": rows,
                "prompt_tokens": prompt_tokens,
                "response_tokens": response_tokens,
            }

    def test_is_cut_into_small_shards_where_it_is_trained_on(self, tmp_path):
        """With rows of a kind; the script then ends, since there is no first drafter to go on from."""
        rows = [Row(torch.arange(i % 7 + 2), 1) for i in range(300)]
        source, out = tmp_path / "source" / "text", tmp_path / "out"
        source.mkdir(parents=True)
        (out / "target").mkdir(parents=True)
        write_shard(source / "rows-00000.safetensors", rows)
        environment = {**os.environ, "PYTHON": sys.executable, "TEXT": str(source.parent), "PARTS": "text"}
        environment |= {"ONLY": "second", "INIT": str(tmp_path / "nowhere")}
        for _ in range(2):  # a second call finds them there
            subprocess.run([SCRIPT, out], env=environment, capture_output=True, check=False)
            assert [len(read_shard(path)) for path in shard_paths(out / "text")] == [128, 128, 44]
            there = [(row.tokens.tolist(), row.prompt_length) for row in read_rows(out / "text")]
            assert there == [(row.tokens.tolist(), row.prompt_length) for row in rows]


@pytest.mark.slow
def test_the_script_for_smollm2_makes_a_pair_and_goes_on_where_it_stopped(tmp_path):
    """All stages on the real target, with a few rows and steps; the first call stops in the text."""
    sizes = dict(MAX_PROMPTS=60, SELF_PROMPTS=8, PASSAGES=6, MOST=2, CODE=4, BATCH_SIZE=16)
    sizes |= dict(STEPS=6, ROWS=2, ANCHORS=8, COMPILE=False, HELD_OUT=5)
    environment = {**os.environ, **{name: str(value) for name, value in sizes.items()}, "PYTHON": sys.executable}
    whole, further, second = (tmp_path / name for name in ("whole", "further", "second"))

    def train(out: Path, **variables: object) -> subprocess.CompletedProcess:
        command = [str(SCRIPT), str(out)]
        variables = {name: str(value) for name, value in variables.items()}
        return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=False)

    stopped = train(whole, STOP_AFTER=0)
    assert stopped.returncode == 1 and "shards are missing" in stopped.stderr, stopped.stderr[-2000:]
    for done in (
        train(whole, CPU=1),
        train(further, CPU=1, INIT=whole, TEXT=whole, PARTS="text passages"),
        train(second, CPU=1, INIT=further, TEXT=whole, PARTS="text passages", ONLY="second", SEED=1),
    ):
        assert done.returncode == 0, done.stderr[-2000:]
    for role in ("first", "second"):
        losses = [json.loads(line) for line in (whole / role / "log.jsonl").read_text().splitlines()]
        assert losses[-1]["step"] == 6
    pair = D2SDAssistant.from_pretrained(further / "pair")
    assert all(len(drafter.config.confidence_temperatures or [1.0] * 7) == 7 for drafter in pair.drafters)
    assert sum(parameter.numel() for parameter in pair.parameters()) < 20e6
    assert {drafter.config.draft_vocab_size for drafter in pair.drafters} == {12288}
    kept, changed = zip(pair.drafters, D2SDAssistant.from_pretrained(second / "pair").drafters)
    assert all(a.equal(b) for a, b in zip(*(drafter.state_dict().values() for drafter in kept)))
    assert not all(a.equal(b) for a, b in zip(*(drafter.state_dict().values() for drafter in changed)))


@pytest.mark.slow
def test_minutes_end_with_a_pair_and_no_large_files(tmp_path):
    """Both drafters with path heads in one loop, as on a GPU that is lent for so long."""
    rows = [row for row in read_rows(TEXT / "text")[:400] if len(row.tokens) < 160][:60]
    (tmp_path / "text").mkdir()
    write_shard(tmp_path / "text" / "rows-00000.safetensors", rows)
    sizes = dict(TRAIN_MINUTES=0.1, ROWS=2, ANCHORS=8, SAVE_EVERY=2, HELD_OUT=5, DRAFT_VOCAB=256, PARTS="text")
    environment = {**os.environ, **{name: str(value) for name, value in sizes.items()}, "PYTHON": sys.executable}
    environment["TEXT"] = str(tmp_path)
    out = tmp_path / "out"
    done = subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((out / "both" / "log.jsonl").read_text().splitlines()[-1])["acceptance_length"] >= 1
    assert set(json.loads((out / "calibration.json").read_text())) == {"first", "second"}
    pair, last = (D2SDAssistant.from_pretrained(out / name) for name in ("pair", "both/last"))
    assert all(a.equal(b) for a, b in zip(pair.state_dict().values(), last.state_dict().values()))
    assert all(drafter.path_head is not None for drafter in pair.drafters) and pair.config.tree_budget == 16
    large = {path.name for path in out.rglob("*") if path.stat().st_size >= 16 * 2**20 and "target" not in path.parts}
    assert large == {"checkpoint.safetensors"}
