"""What users of `generate` rely on holds with a D2SDAssistant, to the token."""

import copy

import pytest
import torch
import transformers as tf
from tiny import LAYERS, VOCAB, WINDOW, OracleDrafts, image_inputs, prompt, tiny_assistant, tiny_drafter, tiny_target
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.utils import GenerationMixin

import hf_d2sd
from hf_d2sd import D2SDAssistant
from hf_d2sd.cache import saved_contexts
from hf_d2sd.modeling import CACHE_NAME

NEW = 24
LETTERS = "yzabcdefghijklmnopqrstuv"


@pytest.fixture(params=["drafts of the networks", "drafts mostly right"])
def pair(request, monkeypatch):
    """An assistant for the tiny llama, with few and with many accepted tokens."""
    if request.param == "drafts mostly right":
        OracleDrafts(monkeypatch, plain()[0], 0.8)
    return tiny_assistant(4, 6)


@pytest.fixture(scope="module")
def tokenizer():
    """Every token is one letter."""
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="y", eos_token="z")


def plain(family="llama", inputs=None, **options):
    inputs = {"input_ids": prompt()} if inputs is None else inputs
    return tiny_target(family).generate(**inputs, **{"do_sample": False, "max_new_tokens": NEW, **options})


def ours(assistant, family="llama", inputs=None, **options):
    return plain(family, inputs, assistant_model=assistant, **options)


def generated(sequence):
    return sequence[0, prompt().shape[1] :].tolist()


class TestWhereGenerationEnds:
    def test_at_each_possible_end_of_sequence_token(self, pair):
        for token in sorted(set(generated(plain()))):
            for eos in (token, [token, (token + 1) % VOCAB]):
                expected = plain(eos_token_id=eos, pad_token_id=0)
                assert ours(pair, eos_token_id=eos, pad_token_id=0).tolist() == expected.tolist()

    @pytest.mark.parametrize("count", [1, 2, 3, 7, 23])
    def test_max_new_tokens_and_max_length_are_respected(self, pair, count):
        assert ours(pair, max_new_tokens=count).tolist() == plain(max_new_tokens=count).tolist()
        length = prompt().shape[1] + count
        assert ours(pair, max_new_tokens=None, max_length=length).shape[1] == length

    def test_min_new_tokens_puts_off_the_end(self, pair):
        options = dict(eos_token_id=generated(plain())[1], pad_token_id=0, min_new_tokens=9)
        expected = plain(**options)
        assert ours(pair, **options).tolist() == expected.tolist()
        assert len(generated(expected)) >= 9

    @pytest.mark.parametrize("given", ["min_new_tokens", "min_length"])
    def test_what_puts_off_the_end_is_asked_only_where_the_text_would_end(self, pair, given, monkeypatch):
        kind = MinLengthLogitsProcessor if given == "min_length" else MinNewTokensLengthLogitsProcessor
        asked, stock = [], kind.__call__

        def noting(processor, input_ids, scores):
            asked.append(scores[0, end] in (scores.max(), -torch.inf))  # the latter where another one came before
            return stock(processor, input_ids, scores)

        end = generated(plain())[1]
        monkeypatch.setattr(kind, "__call__", noting)
        options = {"eos_token_id": end, "pad_token_id": 0, given: 9 + prompt().shape[1] * (given == "min_length")}
        text = ours(pair, **options).tolist()
        assert asked and all(asked) and len(asked) < len(text[0]) - prompt().shape[1]
        asked.clear()
        assert text == plain(**options).tolist() and len(asked) == len(text[0]) - prompt().shape[1]
        scored = ours(pair, **options, output_scores=True, return_dict_in_generate=True)
        expected = plain(**options, output_scores=True, return_dict_in_generate=True)
        assert scored.sequences.tolist() == text
        for one, other in zip(scored.scores, expected.scores, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)

    def test_stop_strings_end_on_the_token(self, pair, tokenizer):
        text = "".join(LETTERS[token] for token in generated(plain()))
        for stop in (text[2], text[4:6], text[7:10], text[12:14]):
            expected = plain(stop_strings=[stop], tokenizer=tokenizer)
            assert ours(pair, stop_strings=[stop], tokenizer=tokenizer).tolist() == expected.tolist()
            assert len(generated(expected)) < NEW

    def test_custom_criteria_see_every_prefix_once_as_in_plain_decoding(self, pair):
        class Recorder(StoppingCriteria):
            def __init__(self):
                self.seen = []

            def __call__(self, input_ids, scores, **kwargs):
                self.seen.append(input_ids[0].tolist())
                return torch.tensor([input_ids.shape[1] >= 20])

        recorders = Recorder(), Recorder()
        expected = plain(stopping_criteria=StoppingCriteriaList([recorders[0]]))
        got = ours(pair, stopping_criteria=StoppingCriteriaList([recorders[1]]))
        assert got.tolist() == expected.tolist()
        assert got.shape[1] == 20
        assert recorders[0].seen == recorders[1].seen

    def test_max_time_ends_it(self, pair):
        assert len(generated(ours(pair, max_time=0.0))) == 1


PROCESSED = [
    dict(repetition_penalty=1.7),
    dict(encoder_repetition_penalty=1.5),
    dict(no_repeat_ngram_size=2),
    dict(encoder_no_repeat_ngram_size=2),
    dict(bad_words_ids=[[3], [4, 5]]),
    dict(sequence_bias=[[[7], 3.0], [[2, 3], -9.0]]),
    dict(suppress_tokens=[3, 9]),
    dict(begin_suppress_tokens=[5]),
    dict(forced_eos_token_id=4),
    dict(forced_bos_token_id=4),
    dict(exponential_decay_length_penalty=(4, 1.5), eos_token_id=6, pad_token_id=0),
    dict(min_length=14, eos_token_id=6, pad_token_id=0),
    dict(remove_invalid_values=True, renormalize_logits=True),
    dict(guidance_scale=1.6),
    dict(prefix_allowed_tokens_fn=lambda row, ids: [2 + len(ids) % 5, 9, 11]),
    dict(watermarking_config=tf.WatermarkingConfig(bias=2.5, seeding_scheme="lefthash")),
]
SAMPLED = [
    dict(temperature=0.7),
    dict(top_k=3),
    dict(top_p=0.6),
    dict(min_p=0.1),
    dict(typical_p=0.5),
    dict(epsilon_cutoff=0.02),
    dict(eta_cutoff=0.02),
    dict(top_h=0.5),
    dict(temperature=1.4, top_k=8, top_p=0.9, repetition_penalty=1.2),
]


@pytest.mark.parametrize("options", PROCESSED, ids=lambda options: "+".join(options))
def test_greedy_with_each_logits_processor_equals_plain_generate(pair, options):
    assert ours(pair, **options).tolist() == plain(**options).tolist()


@pytest.mark.parametrize("options", SAMPLED + PROCESSED, ids=lambda options: "+".join(options))
def test_a_seed_samples_the_text_of_plain_generate(pair, options):
    for seed in range(3):
        tf.set_seed(seed)
        expected = plain(do_sample=True, **options)
        state = torch.get_rng_state()
        tf.set_seed(seed)
        assert ours(pair, do_sample=True, **options).tolist() == expected.tolist()
        assert torch.equal(torch.get_rng_state(), state), "as many draws as plain decoding makes"


def test_a_stateful_processor_is_called_as_in_plain_decoding(pair):
    class Stateful(LogitsProcessor):
        def __init__(self):
            self.calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            scores[:, self.calls % VOCAB] += 30.0  # in place: the raw logits must not change with it
            return scores

    runs = []
    for run in (plain, lambda **options: ours(pair, **options)):
        processor = LogitsProcessorList([Stateful()])
        out = run(logits_processor=processor, return_dict_in_generate=True, output_logits=True)
        runs.append((out.sequences.tolist(), processor[0].calls, torch.stack(out.logits)))
    assert runs[0][:2] == runs[1][:2]
    torch.testing.assert_close(runs[0][2], runs[1][2], atol=1e-4, rtol=1e-4)


class TestReturnedValues:
    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
    @pytest.mark.parametrize("sampling", [dict(), dict(do_sample=True, top_k=5, temperature=1.3)])
    def test_scores_logits_and_hidden_states_are_those_of_plain_generate(self, family, sampling, monkeypatch):
        flags = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)
        tf.set_seed(1)
        expected = plain(family, **flags, **sampling)
        OracleDrafts(monkeypatch, expected.sequences[0], 0.8)
        tf.set_seed(1)
        got = ours(tiny_assistant(4, 6), family, **flags, **sampling)
        assert got.sequences.tolist() == expected.sequences.tolist()
        for name in ("scores", "logits"):
            for one, other in zip(getattr(got, name), getattr(expected, name), strict=True):
                torch.testing.assert_close(one, other, atol=1e-3, rtol=2e-4)
        for one, other in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert len(one) == LAYERS + 1
            for layer, plain_layer in zip(one, other, strict=True):
                torch.testing.assert_close(layer, plain_layer, atol=2e-3, rtol=2e-3)

    def test_what_was_not_asked_for_is_none(self, pair):
        out = ours(pair, return_dict_in_generate=True)
        assert (out.scores, out.logits, out.hidden_states, out.attentions) == (None,) * 4
        assert torch.is_tensor(ours(pair))

    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral", "gpt_oss"])
    def test_the_cache_holds_what_plain_decoding_leaves_in_it(self, family, monkeypatch):
        expected = plain(family, return_dict_in_generate=True)
        OracleDrafts(monkeypatch, expected.sequences[0], 0.8)
        got = ours(tiny_assistant(4, 6), family, return_dict_in_generate=True)
        assert type(got[CACHE_NAME]) is DynamicCache
        assert got[CACHE_NAME].get_seq_length() == got.sequences.shape[1] - 1
        for layer, other in zip(got[CACHE_NAME].layers, expected[CACHE_NAME].layers, strict=True):
            assert type(layer) is type(other)
            torch.testing.assert_close(layer.keys, other.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, other.values, atol=1e-4, rtol=1e-4)


class TestWarmCaches:
    FAMILIES = ("llama", "gemma3_text", "mistral", "gpt_oss", "qwen3")

    def turns(self, family, first_assistant, second_assistant, only_new=False, change=lambda cache: cache, count=NEW):
        """Two turns of a chat over one cache."""
        one = plain(family, return_dict_in_generate=True, assistant_model=first_assistant)
        cache = change(one[CACHE_NAME])
        more = prompt(5, seed=7)
        whole = torch.cat([one.sequences, more], dim=1)
        inputs = {"input_ids": whole}
        if only_new:
            inputs = {"input_ids": whole[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(whole)}
        out = plain(
            family,
            inputs,
            **{CACHE_NAME: cache},
            assistant_model=second_assistant,
            return_dict_in_generate=True,
            max_new_tokens=count,
        )
        fresh = plain(family, {"input_ids": whole}, max_new_tokens=count)
        return out, fresh[:, whole.shape[1] :], len(inputs["input_ids"][0])

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("first", ["ours", "plain"])
    @pytest.mark.parametrize("only_new", [False, True])
    def test_the_next_turn_equals_a_cold_start(self, family, first, only_new):
        pair = tiny_assistant(4, 6)
        out, expected, given = self.turns(family, pair if first == "ours" else None, pair, only_new)
        assert out.sequences[:, given:].tolist() == expected.tolist()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_plain_decoding_goes_on_from_our_cache(self, family):
        out, expected, given = self.turns(family, tiny_assistant(4, 6), None)
        assert out.sequences[:, given:].tolist() == expected.tolist()

    def test_a_copied_cache_leaves_the_original_as_it_was(self):
        pair = tiny_assistant(4, 6)
        out = ours(pair, return_dict_in_generate=True)
        before = [layer.keys.clone() for layer in out[CACHE_NAME].layers]
        again = torch.cat([out.sequences, prompt(3, 5)], 1)
        for _ in range(2):
            got = ours(pair, inputs={"input_ids": again}, **{CACHE_NAME: copy.deepcopy(out[CACHE_NAME])})
            assert got.tolist() == plain(inputs={"input_ids": again}).tolist()
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(out[CACHE_NAME].layers, before))

    def test_a_cropped_cache_is_taken_over(self):
        pair = tiny_assistant(4, 6)
        out = ours(pair, return_dict_in_generate=True)
        out[CACHE_NAME].crop(-9)
        shorter = torch.cat([out.sequences[:, :-9], prompt(2, 5)], 1)
        got = ours(pair, inputs={"input_ids": shorter}, **{CACHE_NAME: out[CACHE_NAME]})
        assert got.tolist() == plain(inputs={"input_ids": shorter}).tolist()

    def test_a_prompt_cache_made_by_a_forward_pass_is_taken_over(self):
        cache = DynamicCache()
        tiny_target()(prompt()[:, :6], **{CACHE_NAME: cache})
        assert ours(tiny_assistant(4, 6), **{CACHE_NAME: cache}).tolist() == plain().tolist()
        assert cache.get_seq_length() == prompt().shape[1] + NEW - 1

    def test_the_drafters_remember_the_first_turn(self):
        """Their contexts cover every token of the target's cache, not only the second turn's."""
        pair = tiny_assistant(4, 6)
        out, _, _ = self.turns("llama", pair, pair)
        _, contexts = saved_contexts(out[CACHE_NAME])
        for context in contexts:
            waiting = sum(features.shape[1] for features, _ in context.waiting)
            assert context.cache.get_seq_length() + waiting == out[CACHE_NAME].get_seq_length()

    def test_a_cache_made_in_inference_mode_is_gone_on_from_outside_of_it(self):
        pair = tiny_assistant(4, 6)
        with torch.inference_mode():
            one = ours(pair, return_dict_in_generate=True)
        whole = torch.cat([one.sequences, prompt(5, seed=7)], dim=1).clone()
        got = ours(pair, inputs={"input_ids": whole}, **{CACHE_NAME: one[CACHE_NAME]})
        assert got.tolist() == plain(inputs={"input_ids": whole}).tolist()

    def test_another_pair_does_not_read_the_first_pairs_context(self):
        other = D2SDAssistant.from_drafters(tiny_drafter(6, seed=5), tiny_drafter(8, seed=6, num_hidden_layers=1))
        out, expected, given = self.turns("llama", tiny_assistant(4, 6), other)
        assert out.sequences[:, given:].tolist() == expected.tolist()


class TestPrompts:
    @pytest.mark.parametrize("chunk", [1, 3, 4, 100])
    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
    def test_chunked_prefill_keeps_all_features(self, family, chunk):
        """The drafts, and so the trees and the counts, are those of an unchunked prefill."""
        pair = tiny_assistant(4, 6)
        whole = ours(pair, family)
        expected = pair.last_stats
        assert ours(pair, family, prefill_chunk_size=chunk).tolist() == whole.tolist() == plain(family).tolist()
        assert pair.last_stats.committed_per_cycle == expected.committed_per_cycle

    def test_inputs_embeds(self, pair):
        embeds = {"inputs_embeds": tiny_target().get_input_embeddings()(prompt())}
        assert ours(pair, inputs=embeds).tolist() == plain(inputs=embeds).tolist() == [generated(plain())]

    def test_an_image_in_the_prompt(self):
        inputs = image_inputs(14)
        got = ours(tiny_assistant(4, 6), "gemma3_image", inputs)
        assert got.tolist() == plain("gemma3_image", inputs).tolist()
        other = dict(inputs, pixel_values=-inputs["pixel_values"])
        assert plain("gemma3_image", other).tolist() != got.tolist(), "the image must matter"

    def test_a_prompt_of_one_token(self, pair):
        inputs = {"input_ids": prompt(1)}
        assert ours(pair, inputs=inputs).tolist() == plain(inputs=inputs).tolist()

    def test_a_mask_of_ones_is_no_padding(self, pair):
        inputs = {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())}
        assert ours(pair, inputs=inputs).tolist() == plain().tolist()

    def test_a_prompt_longer_than_the_sliding_window(self):
        inputs = {"input_ids": prompt(3 * WINDOW)}
        for family in ("mistral", "gemma3_text", "gpt_oss"):
            assert ours(tiny_assistant(4, 6), family, inputs).tolist() == plain(family, inputs).tolist()


class TestStreamers:
    class Tokens(tf.generation.streamers.BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    def test_every_token_is_put_once_and_the_stream_ends(self, pair):
        streamer = self.Tokens()
        out = ours(pair, streamer=streamer)
        assert streamer.tokens == out[0].tolist()
        assert streamer.ended == 1

    def test_the_streamed_text_is_that_of_plain_generate(self, pair, tokenizer, capsys):
        texts = []
        for assistant in (None, pair):
            plain(streamer=tf.TextStreamer(tokenizer), assistant_model=assistant)
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] != ""


class TestOtherDoors:
    def test_pipeline_takes_the_assistant_at_construction_and_at_the_call(self, tokenizer, pair):
        text = "".join(LETTERS[token] for token in prompt()[0].tolist())
        options = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=1, pad_token_id=0)
        target = copy.deepcopy(tiny_target())
        stock = tf.pipeline("text-generation", model=target, tokenizer=tokenizer)
        expected = stock(text, **options)
        with_pair = tf.pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=pair)
        pair.last_stats = None
        assert with_pair(text, **options) == expected
        assert pair.last_stats.cycles > 0, "the assistant was used"
        pair.last_stats = None
        assert stock(text, assistant_model=pair, **options) == expected
        assert pair.last_stats.cycles > 0

    def test_the_generation_config_may_hold_the_options(self, pair):
        config = GenerationConfig(max_new_tokens=NEW, do_sample=False, d2sd_tree_budget=5, d2sd_num_branches=1)
        tiny_target().generate(prompt(), generation_config=config, assistant_model=pair)
        assert max(pair.last_stats.tree_sizes) <= 5

    def test_options_stay_out_of_saved_generation_configs(self):
        assert not any(name.startswith("d2sd") for name in GenerationConfig().to_dict())

    def test_block_size_per_call_bounds_the_depth(self, pair):
        assert ours(pair, d2sd_block_size=2, d2sd_num_branches=0).tolist() == plain().tolist()
        assert max(pair.last_stats.offered_per_depth) == 1

    def test_another_assistant_takes_the_stock_way(self):
        other = copy.deepcopy(tiny_target())
        assert plain(assistant_model=other).tolist() == plain().tolist()

    def test_installing_twice_wraps_once(self):
        wrapped = GenerationMixin._assisted_decoding
        hf_d2sd.integration.install()
        assert GenerationMixin._assisted_decoding is wrapped

    def test_offloaded_targets(self, tmp_path, pair):
        """Layers and head on the disk: accelerate's hooks bring weights and inputs together."""
        tiny_target().save_pretrained(tmp_path / "target")
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
        places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
        target = tf.AutoModelForCausalLM.from_pretrained(
            tmp_path / "target", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert target.lm_head.weight.device.type == "meta"
        out = target.generate(prompt(), do_sample=False, max_new_tokens=NEW, assistant_model=pair)
        assert out.tolist() == plain().tolist()

    def test_the_target_is_left_as_it_was(self, pair):
        target = tiny_target("gemma3_text")
        before = copy.deepcopy(target.state_dict())
        implementation = target.config._attn_implementation
        ours(pair, "gemma3_text")
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
        assert target.config._attn_implementation == implementation


class TestStats:
    def test_the_counts_add_up(self, pair):
        out = ours(pair)
        stats = pair.last_stats
        assert stats.new_tokens == NEW == 1 + sum(stats.committed_per_cycle) == sum(stats.tokens_by_source.values())
        assert stats.cycles == len(stats.tree_sizes) == sum(stats.acceptance_histogram.values())
        assert stats.mean_acceptance_length == (NEW - 1) / stats.cycles
        accepted = sum(stats.accepted_per_depth.values())
        assert accepted == sum(stats.branch_hits.values()) == NEW - 1 - stats.cycles
        assert stats.tokens_by_source["target"] == 1 + stats.cycles
        assert all(stats.accepted_per_depth[d] <= stats.offered_per_depth[d] for d in stats.accepted_per_depth)
        assert stats.prompt_tokens == prompt().shape[1] == out.shape[1] - NEW

    def test_a_trace_of_wide_trees(self):
        self.test_a_trace_tells_every_tree_and_what_became_of_it(tiny_assistant(4, 6), 3, 12)

    def test_a_trace_tells_every_tree_and_what_became_of_it(self, pair, width=1, budget=None):
        out = ours(pair, d2sd_trace=True, d2sd_tree_width=width, d2sd_tree_budget=budget)
        trace, prompt_length = pair.last_stats.trace, prompt().shape[1]
        generated = out[0, prompt_length:].tolist()
        assert [token for cycle in trace for token in cycle.emitted] == generated[1:]
        assert [len(cycle.tokens) for cycle in trace] == pair.last_stats.tree_sizes
        anchor = generated[0]
        for cycle in trace:
            assert (cycle.row, cycle.tokens[0], cycle.parents[0], cycle.sources[0]) == (0, anchor, -1, "target")
            assert [cycle.tokens[node] for node in cycle.path[1:]] == cycle.emitted[:-1]
            assert all(cycle.parents[after] == before for before, after in zip(cycle.path, cycle.path[1:]))
            assert all(0 <= confidence <= 1 + 1e-5 for confidence in cycle.confidences)
            anchor = cycle.emitted[-1]

    def test_nothing_is_traced_unless_asked_for(self, pair):
        ours(pair)
        assert pair.last_stats.trace is None

    def test_a_batch_is_traced_row_by_row(self, pair):
        inputs = torch.cat([prompt(), prompt().flip(1)])
        out = tiny_target().generate(
            inputs, do_sample=False, max_new_tokens=NEW, assistant_model=pair, d2sd_trace=True
        )
        for row in range(2):
            emitted = [t for cycle in pair.last_stats.trace if cycle.row == row for t in cycle.emitted]
            assert emitted == out[row, inputs.shape[1] + 1 :][: len(emitted)].tolist() and len(emitted) == NEW - 1

    def test_sources_tell_first_from_second(self, monkeypatch):
        pair = tiny_assistant(4, 6)
        OracleDrafts(monkeypatch, plain()[0], 1.0)
        ours(pair, d2sd_num_branches=0)
        assert set(pair.last_stats.token_sources) == {"first", "target"}
        ours(pair, d2sd_num_branches=4)
        assert "second" in pair.last_stats.token_sources

    def test_after_an_error_the_stats_are_of_the_broken_call(self, pair):
        class Broken(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                if input_ids.shape[1] > 14:
                    raise RuntimeError("broken")
                return torch.tensor([False])

        with pytest.raises(RuntimeError, match="broken"):
            ours(pair, stopping_criteria=StoppingCriteriaList([Broken()]))
        assert pair.last_stats.new_tokens <= 14
        assert ours(pair).tolist() == plain().tolist()
