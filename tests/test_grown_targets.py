"""Targets as people have them: embeddings that grew, adapters merged between calls, autocast around a call."""

import copy
import hashlib

import pytest
import torch
import transformers as tf
from tiny import VOCAB, OracleDrafts, prompt, tiny_assistant, tiny_drafter, tiny_target
from tokenizers import Tokenizer, models

from hf_d2sd import D2SDAssistant, bind, tokenizer_fingerprint
from hf_d2sd.drafting import Drafter

OPTIONS = dict(do_sample=False, max_new_tokens=20)


def grown_target(by: int):
    target = copy.deepcopy(tiny_target("llama"))
    target.resize_token_embeddings(VOCAB + by, mean_resizing=False)
    return target


def tokenizer_of(words: list[str]):
    vocabulary = {word: at for at, word in enumerate(words)}
    return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])))


class TestAnEmbeddingThatGrew:
    @pytest.mark.parametrize("by", [1, 8, 40])
    @pytest.mark.parametrize("wide", [{}, dict(d2sd_tree_width=3, d2sd_tree_budget=12)])
    def test_the_drafters_serve_it_as_before(self, by, wide):
        target = grown_target(by)
        for seed in range(3):
            plain = target.generate(prompt(9, seed), **OPTIONS)
            ours = target.generate(prompt(9, seed), assistant_model=tiny_assistant(4, 6), **OPTIONS, **wide)
            assert ours.tolist() == plain.tolist()

    def test_what_it_has_more_is_never_drafted(self):
        target = grown_target(8)
        target.lm_head.weight.data[VOCAB:] = 100 * target.lm_head.weight.data[:8]  # by far the greatest logits
        drafter = Drafter(tiny_drafter(4), target)
        hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
        draft = drafter._read(hidden, torch.float32, torch.zeros(1, 1, 4).long(), 9)
        assert draft.logits.shape[-1] == VOCAB and int(draft.tokens.max()) < VOCAB
        assert int(target.lm_head(hidden).argmax(-1).min()) >= VOCAB, "the control: the head would choose those"

    def test_a_pruned_vocabulary_serves_it_too(self):
        pair = D2SDAssistant.from_drafters(tiny_drafter(4, draft_vocab_size=12))
        target = grown_target(8)
        assert target.generate(prompt(), assistant_model=pair, **OPTIONS).tolist() == (
            target.generate(prompt(), **OPTIONS).tolist()
        )

    def test_one_that_shrank_or_is_another_is_refused_with_both_values(self):
        with pytest.raises(ValueError, match=f"vocab_size is 30, the target's is {VOCAB}"):
            bind(D2SDAssistant.from_drafters(tiny_drafter(vocab_size=30)), tiny_target())
        with pytest.raises(ValueError, match=f"vocab_size is {VOCAB}, the target's is 2000"):
            bind(tiny_assistant(), grown_target(2000 - VOCAB))


class TestATokenizerThatGrew:
    WORDS = [f"w{at}" for at in range(VOCAB)]

    def pair(self) -> D2SDAssistant:
        fingerprint = tokenizer_fingerprint(tokenizer_of(self.WORDS))
        return D2SDAssistant.from_drafters(tiny_drafter(tokenizer_fingerprint=fingerprint))

    def test_added_tokens_are_none_of_the_drafters_business(self):
        tokenizer = tokenizer_of(self.WORDS)
        bind(self.pair(), grown_target(8), tokenizer)
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        tokenizer.add_tokens(["<tool>", "</tool>"])
        assert len(tokenizer) == VOCAB + 3
        bind(self.pair(), grown_target(8), tokenizer)

    @pytest.mark.parametrize("change", ["swapped", "replaced", "shorter"])
    def test_tokens_that_are_no_longer_as_they_were_are_refused(self, change):
        words = list(self.WORDS)
        if change == "swapped":
            words[3], words[4] = words[4], words[3]
        if change == "replaced":
            words[5] = "other"
        if change == "shorter":
            words = words[:-1]
        with pytest.raises(ValueError, match="the same ids would mean other words"):
            bind(self.pair(), grown_target(8), tokenizer_of([*words, "more"]))

    def test_the_fingerprint_is_the_digest_of_all_entries(self):
        """As it was written into the drafters that exist."""
        entries = [(word, at) for at, word in enumerate(self.WORDS)]
        expected = hashlib.sha256(repr(entries).encode()).hexdigest()[:16]
        assert tokenizer_fingerprint(tokenizer_of(self.WORDS)) == expected


def test_a_head_that_an_adapter_is_merged_into_has_its_rows_gathered_anew():
    target, pair = copy.deepcopy(tiny_target("llama")), D2SDAssistant.from_drafters(tiny_drafter(draft_vocab_size=12))
    ids = pair.first.draft_token_ids

    def rows() -> torch.Tensor:
        return Drafter(pair.first, target)._head.weight

    before = rows().clone()
    assert rows() is rows(), "as long as nothing changes they are kept"
    delta = 0.1 * torch.randn(VOCAB, 1) @ torch.randn(1, 32)
    target.lm_head.weight.data += delta  # as PEFT merges: in place, and past the counts of autograd
    assert torch.equal(rows(), target.lm_head.weight[ids]) and not torch.equal(rows(), before)
    target.lm_head.weight.data -= delta
    torch.testing.assert_close(rows(), before)


@pytest.mark.parametrize("backend", [None, "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_autocast_around_a_call(family, backend, monkeypatch):
    """Half precision: the text is plain decoding's under the same autocast, or parts from it at a near-tie."""
    if (family, backend) == ("gpt_oss", "sdpa"):
        pytest.skip("it has no SDPA attention")
    target, assistant = tiny_target(family), tiny_assistant(4, 6)
    with torch.autocast("cpu", torch.float16):
        plain = target.generate(prompt(9), **OPTIONS)
        OracleDrafts(monkeypatch, plain[0], 0.8)
        ours = target.generate(prompt(9), assistant_model=assistant, d2sd_attention_backend=backend, **OPTIONS)
        differing = [at for at, (a, b) in enumerate(zip(ours[0], plain[0])) if a != b]
        if differing:
            logits = target(plain[:, : differing[0]]).logits[0, -1].float()
            gap = logits[plain[0, differing[0]]] - logits[ours[0, differing[0]]]
            assert gap.abs() < 0.02 * logits.abs().max()
    assert assistant.last_stats.mean_acceptance_length > 1.5
