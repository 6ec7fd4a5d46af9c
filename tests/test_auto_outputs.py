"""Cycles that are chosen by what pays: what else a call gives is plain decoding's too, however they switch."""

import threading

import pytest
import torch
from test_auto import Ticking, by_chance, fresh_pair, machine
from test_sampling import p_value
from test_streaming import word_tokenizer  # noqa: F401
from tiny import OracleDrafts, prompt, tiny_target
from transformers import StoppingCriteria, TextIteratorStreamer, TextStreamer

from hf_d2sd import SourceStreamer
from hf_d2sd.modeling import CACHE_NAME

NEW = 40


@pytest.fixture
def on_off(monkeypatch):
    by_chance(monkeypatch, seed=7)


def was_on_and_off(assistant) -> None:
    kinds = assistant.last_stats.decisions.kinds
    assert kinds["plain"] and kinds["first"] + kinds["both"], kinds
    assert max(assistant.last_stats.committed_per_cycle) > 1


# Streams -------------------------------------------------------------------------------------------------------------


def test_streamers_print_and_yield_what_plain_decoding_would(word_tokenizer, on_off, monkeypatch, capsys):  # noqa: F811
    target, ids, assistant = tiny_target(), prompt(9), fresh_pair()
    options = dict(do_sample=False, max_new_tokens=NEW)
    plain = target.generate(ids, **options, streamer=TextStreamer(word_tokenizer))
    shown = capsys.readouterr().out
    OracleDrafts(monkeypatch, plain[0], 0.9)
    options |= dict(assistant_model=assistant, d2sd_auto=True)
    target.generate(ids, **options, streamer=TextStreamer(word_tokenizer))
    assert capsys.readouterr().out == shown != ""
    was_on_and_off(assistant)
    streamer = TextIteratorStreamer(word_tokenizer, timeout=60)
    thread = threading.Thread(target=target.generate, args=(ids,), kwargs=dict(options, streamer=streamer))
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == shown.removesuffix("\n") and len(pieces) > 3


def test_sources_of_streamed_pieces_are_those_of_the_stats(word_tokenizer, on_off, monkeypatch):  # noqa: F811
    target, ids, assistant, pieces = tiny_target(), prompt(9), fresh_pair(), []
    plain = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    OracleDrafts(monkeypatch, plain[0], 0.8)
    streamer = SourceStreamer(word_tokenizer, assistant, on_piece=pieces.append)
    options = dict(assistant_model=assistant, d2sd_auto=True, streamer=streamer)
    target.generate(ids, do_sample=False, max_new_tokens=NEW, **options)
    assert streamer.tokens == plain[0, 9:].tolist()
    assert [piece.source for piece in pieces] == assistant.last_stats.token_sources
    assert {"first", "second", "target"} <= {piece.source for piece in pieces}
    was_on_and_off(assistant)


# Sampling ------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_its_text_with_processors_of_all_kinds(on_off, monkeypatch):
    """Switching takes no draw of torch's generator, and processors see the text as it is."""
    target, ids, assistant = tiny_target("qwen3"), prompt(7), fresh_pair()
    options = dict(do_sample=True, temperature=1.2, top_p=0.9, repetition_penalty=1.3, max_new_tokens=NEW)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = target.generate(ids, **options)
        with monkeypatch.context() as patch:
            OracleDrafts(patch, expected[0], 0.9, seed=seed)
            torch.manual_seed(seed)
            got = target.generate(ids, **options, assistant_model=assistant, d2sd_auto=True)
        assert got.tolist() == expected.tolist()
        was_on_and_off(assistant)


class PerRow(torch.nn.Module):
    """Draws of a row that depend on its own text alone: a logits processor with a seed for each row."""

    def __init__(self, seeds: dict[int, int]):
        super().__init__()
        self.seeds = seeds  # by a row's first token

    def __call__(self, input_ids, scores):
        drawn = []
        for row, logits in zip(input_ids, scores):
            own = row[row > 0]
            generator = torch.Generator().manual_seed(self.seeds[int(own[0])] + 1000 * len(own))
            noise = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
            drawn.append(logits - (-noise.log()).log())
        return torch.stack(drawn)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_with_seeds_of_their_own_are_sampled_as_alone(family, on_off):
    """Gumbel noise by row and place: greedy choice among noisy logits is a draw, which each row repeats by itself."""
    target, assistant = tiny_target(family), fresh_pair()
    prompts = [prompt(length, 20 + length)[0].clone() for length in (5, 8, 8, 12)]
    for first, row in enumerate(prompts, 3):
        row[0] = first
    draws = PerRow({first: 17 * first for first in range(3, 7)})
    options = dict(do_sample=False, max_new_tokens=24, pad_token_id=0, suppress_tokens=[0], eos_token_id=[5])
    alone = [
        target.generate(row[None], **options, logits_processor=[draws])[0, len(row) :].tolist() for row in prompts
    ]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in prompts])
    got = target.generate(
        ids,
        attention_mask=(ids > 0).long(),
        **options,
        logits_processor=[draws],
        assistant_model=assistant,
        d2sd_auto=True,
    )
    for row, expected in zip(got[:, width:].tolist(), alone, strict=True):
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {0}
    assert len({tuple(row[:4]) for row in alone}) == 4
    assert assistant.last_stats.decisions.kinds["plain"] and assistant.last_stats.decisions.kinds["both"]


def test_a_batch_is_sampled_by_the_targets_own_distribution(monkeypatch):
    """Each row's first two tokens, 600 of each, against the probabilities of plain forwards."""
    monkeypatch.setattr("hf_d2sd.calling.Stopwatch", lambda device: Ticking(machine(first=0.05, node=0.01)))
    target, ids, assistant = tiny_target(), prompt(6), fresh_pair()
    rows = 200
    torch.manual_seed(3)
    options = dict(do_sample=True, top_k=3, max_new_tokens=3, assistant_model=assistant, d2sd_auto=True)
    texts = [row for _ in range(3) for row in target.generate(ids.expand(rows, -1), **options)[:, 6:8].tolist()]
    expected = {}
    with torch.no_grad():
        first = target(ids).logits[0, -1].topk(3)
        for token, chance in zip(first.indices.tolist(), first.values.softmax(-1).tolist()):
            second = target(torch.cat([ids, torch.tensor([[token]])], 1)).logits[0, -1].topk(3)
            for other, then in zip(second.indices.tolist(), second.values.softmax(-1).tolist()):
                expected[token, other] = chance * then
    seen = [tuple(text) for text in texts]
    assert p_value(seen, expected) > 1e-3


# What `return_dict_in_generate` gives --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("rows", [1, 3])
def test_scores_logits_hidden_states_and_cache_are_those_of_plain_decoding(family, rows, on_off, monkeypatch):
    target, assistant = tiny_target(family), fresh_pair()
    ids = torch.cat([prompt(9, seed) for seed in range(rows)])
    wanted = ("scores", "logits", "hidden_states")
    options = dict(do_sample=False, max_new_tokens=24, return_dict_in_generate=True, repetition_penalty=1.2)
    options |= {f"output_{name}": True for name in wanted}
    plain = target.generate(ids, **options)
    if rows == 1:
        OracleDrafts(monkeypatch, plain.sequences[0], 0.9)
    ours = target.generate(ids, **options, assistant_model=assistant, d2sd_auto=True)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(plain[name]), atol=1e-3, rtol=1e-3)
    assert len(ours.hidden_states) == len(plain.hidden_states) == 24
    for one, other in zip(ours.hidden_states, plain.hidden_states):
        torch.testing.assert_close(one[-1], other[-1], atol=5e-3, rtol=5e-3)
    assert ours[CACHE_NAME].get_seq_length() == plain[CACHE_NAME].get_seq_length()
    for one, other in zip(ours[CACHE_NAME].layers, plain[CACHE_NAME].layers):
        size = min(one.keys.shape[2], other.keys.shape[2])
        torch.testing.assert_close(one.keys[:, :, -size:], other.keys[:, :, -size:], atol=2e-3, rtol=2e-3)
    assert assistant.last_stats.decisions.kinds["plain"]


class Ends(StoppingCriteria):
    """At a length, which a path may go beyond."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("length", range(12, 22))
def test_a_text_ends_within_a_path_as_in_plain_decoding(length, on_off, monkeypatch):
    target, ids, assistant = tiny_target(), prompt(9), fresh_pair()
    plain = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    OracleDrafts(monkeypatch, plain[0], 0.95)
    options = dict(assistant_model=assistant, d2sd_auto=True, return_dict_in_generate=True)
    ours = target.generate(ids, do_sample=False, max_new_tokens=NEW, stopping_criteria=[Ends(length)], **options)
    assert ours.sequences.tolist() == plain[:, :length].tolist()
    assert ours[CACHE_NAME].get_seq_length() == length - 1
