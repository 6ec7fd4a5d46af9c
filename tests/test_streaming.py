"""Streamed pieces are the decoded reply, with the sources that the stats have."""

import threading

import pytest
import torch
import transformers as tf
from tiny import VOCAB, OracleDrafts, prompt, tiny_assistant, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hf_d2sd import Piece, SourceStreamer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def byte_tokenizer():
    """Every token is one byte, so that most characters beyond ASCII are several tokens."""
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate([*BYTES, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def word_tokenizer():
    """Words of a decoder that puts a space between them, and none before the first."""
    backend = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(VOCAB)}, unk_token="▁w0"))
    backend.decoder = decoders.Metaspace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend)


def stream(tokenizer, tokens, **options):
    """The pieces of some tokens that come in the groups given."""
    streamer = SourceStreamer(tokenizer, **options)
    streamer.put(torch.tensor([[0]]))
    for group in tokens:
        streamer.put(torch.tensor(group))
    streamer.end()
    return list(streamer)


@pytest.mark.parametrize("text", ["naïve 中文 👩‍🚀!", "a\nb\n", "é", "plain"])
def test_a_character_of_several_tokens_comes_whole(byte_tokenizer, text):
    pieces = stream(byte_tokenizer, [[token] for token in byte_tokenizer(text).input_ids])
    assert [piece.text for piece in pieces] == list(text)


def test_a_character_that_is_never_finished_is_shown_at_the_end(byte_tokenizer):
    tokens = byte_tokenizer("aé").input_ids[:-1]
    assert [piece.text for piece in stream(byte_tokenizer, [tokens])] == ["a", "\ufffd"]


def test_special_tokens_are_left_out_unless_they_are_asked_for(byte_tokenizer):
    tokens = [*byte_tokenizer("a").input_ids, byte_tokenizer.eos_token_id]
    assert stream(byte_tokenizer, [tokens]) == [Piece("a", "target")]
    with_end = stream(byte_tokenizer, [tokens], skip_special_tokens=False)
    assert with_end == [Piece("a", "target"), Piece("<end>", "target")]


def test_spaces_between_words_are_those_of_the_whole_reply(word_tokenizer):
    tokens = [3, 1, 4, 1, 5]
    pieces = stream(word_tokenizer, [[token] for token in tokens])
    assert "".join(piece.text for piece in pieces) == word_tokenizer.decode(tokens) == "w3 w1 w4 w1 w5"


def test_while_decoding_each_token_has_the_source_that_the_stats_have(word_tokenizer, monkeypatch):
    plain = tiny_target().generate(prompt(), do_sample=False, max_new_tokens=24)
    OracleDrafts(monkeypatch, plain[0], accuracy=0.7)
    pair, pieces = tiny_assistant(4, 6), []
    streamer = SourceStreamer(word_tokenizer, pair, on_piece=pieces.append)
    tiny_target().generate(prompt(), do_sample=False, max_new_tokens=24, assistant_model=pair, streamer=streamer)
    assert [piece.source for piece in pieces] == pair.last_stats.token_sources
    assert {piece.source for piece in pieces} == {"first", "second", "target"}
    assert "".join(piece.text for piece in pieces) == word_tokenizer.decode(plain[0, prompt().shape[1] :])
    assert streamer.tokens == plain[0, prompt().shape[1] :].tolist()


def test_one_streamer_serves_call_after_call_from_another_thread(word_tokenizer):
    streamer = SourceStreamer(word_tokenizer, timeout=60)
    options = dict(do_sample=False, max_new_tokens=6, streamer=streamer)
    for _ in range(2):
        thread = threading.Thread(target=tiny_target().generate, args=(prompt(),), kwargs=options)
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert len(pieces) == 6
        assert {piece.source for piece in pieces} == {"target"}


def test_a_batch_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="one sequence, got a batch of 2"):
        SourceStreamer(word_tokenizer).put(torch.zeros(2, 3))
