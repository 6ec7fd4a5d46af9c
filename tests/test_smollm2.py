"""The real model: SmolLM2-135M-Instruct with the pair in hub_cards/."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

from hf_d2sd import D2SDAssistant
from hf_d2sd.modeling import CACHE_NAME

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Tom has 3 boxes with 12 eggs each. He breaks 5 eggs. How many are left?",
)


@pytest.fixture(scope="module")
def smollm2():
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import load_smollm2

    return load_smollm2(torch.float32)


@pytest.fixture(scope="module")
def pair():
    return D2SDAssistant.from_pretrained(PAIR)


def chat(tokenizer, question: str) -> dict[str, torch.Tensor]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return dict(tokenizer(text, return_tensors="pt", add_special_tokens=False))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_shipped_pair_writes_the_plain_reply_in_fewer_passes(smollm2, pair, question):
    target, tokenizer = smollm2
    inputs = chat(tokenizer, question)
    plain = target.generate(**inputs, do_sample=False, max_new_tokens=48)
    ours = target.generate(**inputs, do_sample=False, max_new_tokens=48, assistant_model=pair)
    assert ours.tolist() == plain.tolist()
    assert pair.last_stats.mean_acceptance_length > 1.2


def test_a_second_turn_goes_on_from_the_first_turns_cache(smollm2, pair):
    target, tokenizer = smollm2
    first = chat(tokenizer, QUESTIONS[0])
    one = target.generate(
        **first, do_sample=False, max_new_tokens=24, assistant_model=pair, return_dict_in_generate=True
    )
    more = tokenizer("\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
    whole = torch.cat([one.sequences, more], dim=1)
    options = dict(attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=24)
    ours = target.generate(whole, **options, **{CACHE_NAME: one[CACHE_NAME]}, assistant_model=pair)
    assert ours.tolist() == target.generate(whole, **options).tolist()
    assert pair.last_stats.prompt_tokens == more.shape[1] + 1


def test_a_seed_samples_the_plain_reply(smollm2, pair):
    target, tokenizer = smollm2
    inputs = chat(tokenizer, QUESTIONS[0])
    options = dict(do_sample=True, temperature=0.8, top_p=0.9, max_new_tokens=32)
    tf.set_seed(5)
    plain = target.generate(**inputs, **options)
    tf.set_seed(5)
    assert target.generate(**inputs, **options, assistant_model=pair).tolist() == plain.tolist()


def test_the_pair_was_made_for_this_tokenizer(smollm2, pair):
    from hf_d2sd import bind

    bind(pair, *smollm2)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_memory_stays_within_its_bound(smollm2):
    done = run("memory.py", "--prompt-tokens", 256, "--new-tokens", 24)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_greedy_equals_plain_generate_on_all_prompts(smollm2, tmp_path):
    """Some 490 prompts of 128 tokens; `python benchmarks/equality.py` is the same with a result file that is kept."""
    done = run("equality.py", "--out", tmp_path / "result.json", "--work", ROOT / "benchmarks" / "work" / "equality")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["differing"] == []


@pytest.mark.slow
def test_the_demo_shows_the_same_text_and_what_was_chosen(smollm2):
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--dtype", "float32", "--max-new-tokens", "24"]
    for options, chosen in (
        ([], r"\d+ cycles: .* expected; why: "),
        (["--branches", "2"], "where plain generate has 1"),
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        shown = " ".join(done.stdout.split())
        assert "the same text: yes" in shown and re.search(chosen, shown), shown
