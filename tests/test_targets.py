"""benchmarks/targets.py: every causal LM of Transformers decodes as plain `generate` does, or is refused by name."""

import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import targets  # noqa: E402

PAGE = ROOT / "docs" / "targets.md"


@pytest.mark.parametrize(
    ("kind", "verdict", "words"),
    [
        ("gemma4_text", "equal", "cpu"),  # heads of two sizes, layers that share keys and values, a window
        ("gemma3n_text", "equal", "cpu"),  # beside that, several streams
        ("bloom", "equal", "eager"),  # a bias by position, made from a mask
        ("bart", "equal", "sdpa"),  # counts its positions by the cache
        ("doge", "equal", "reads its mask itself"),
        ("deepseek_v3", "equal", "sdpa"),  # latent attention
        ("glm4_moe_lite", "equal", "sdpa"),
        ("cpmant", "refused", "gives the logits of 35"),
        ("openai-gpt", "refused", "no keys and values"),
        ("gpt_neo", "refused", "count their window by the order of the keys"),
        ("mpt", "refused", "ALiBi"),
        ("xlnet", "refused", "XLNetConfig"),
        ("qwen3_next", "equal", "cpu"),  # layers with a recurrent state
        ("rwkv", "refused", "recurrent state"),
        ("musicgen", "not built", "sound"),
    ],
)
def test_a_type_is_equal_or_refused_by_name(kind, verdict, words):
    if kind not in targets.TYPES:
        pytest.skip("this release has no such type")
    found = targets.verdict_of(kind)
    assert found.verdict == verdict, found
    assert words in found.words


def test_another_text_is_a_defect(monkeypatch):
    """Else the table could not tell."""
    stock, plain_texts = targets.Drafter._denoise, targets._plain_texts

    def with_another_last_token(model):
        return [torch.cat([text[:-1], (text[-1:] + 1) % targets.VOCAB]) for text in plain_texts(model)]

    monkeypatch.setattr(targets, "_plain_texts", with_another_last_token)
    found = targets.verdict_of("llama")
    assert found.verdict == "DIFFERS"
    assert "1 row with num_branches 3" in found.words
    assert targets.Drafter._denoise is stock, "drafts were left as they are within"


def test_a_process_that_ends_is_a_defect_of_its_type(monkeypatch):
    monkeypatch.setattr(targets, "verdict_of", lambda kind: sys.exit(3) if kind == "gpt2" else kind)
    crashed, other = targets.run_all(["gpt2", "llama"])
    assert (crashed.kind, crashed.verdict) == ("gpt2", "CRASH")
    assert other == "llama"


def test_the_page_is_read_as_it_is_written():
    verdicts = [
        targets.Verdict("xlm-roberta", "XLMRobertaForCausalLM", "equal", "cpu: fast"),
        targets.Verdict("musicgen", "MusicgenForCausalLM", "not built", "a | b"),
    ]
    page = targets.as_page(verdicts)
    assert targets.read_page(page) == {"xlm-roberta": "equal", "musicgen": "not built"}
    assert "1 equal, 1 not built" in page


def test_the_page_has_no_defect_and_at_least_130_types_are_equal():
    verdicts = list(targets.read_page(PAGE.read_text(encoding="utf-8")).values())
    assert set(verdicts) == {"equal", "refused", "not built"}
    assert verdicts.count("equal") >= 130


@pytest.mark.slow
def test_every_type_is_what_the_page_says():
    page = PAGE.read_text(encoding="utf-8")
    if f"Transformers {tf.__version__}," not in page:
        pytest.skip("the page is of another release of Transformers")
    assert {one.kind: one.verdict for one in targets.run_all(targets.TYPES)} == targets.read_page(page)


@pytest.mark.slow
def test_no_type_is_a_defect_in_any_release():
    wrong = [one for one in targets.run_all(targets.TYPES) if one.verdict in ("CRASH", "DIFFERS")]
    assert wrong == []
