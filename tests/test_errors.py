"""Bad input is refused early, with what was seen and what to do."""

import copy

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import LAYERS, VOCAB, WIDTH, image_inputs, prompt, tiny_assistant, tiny_drafter, tiny_target
from tokenizers import Tokenizer, models
from transformers import DynamicCache, StaticCache

from hf_d2sd import D2SDAssistant, D2SDConfig, D2SDDrafterModel, bind, tokenizer_fingerprint
from hf_d2sd.modeling import CACHE_NAME


def generate(target=None, assistant=None, inputs=None, **options):
    target = tiny_target() if target is None else target
    assistant = tiny_assistant(4, 6) if assistant is None else assistant
    options = {"max_new_tokens": 4, "do_sample": False, **options}
    return target.generate(prompt() if inputs is None else inputs, assistant_model=assistant, **options)


def alone(**changes) -> D2SDAssistant:
    return D2SDAssistant.from_drafters(tiny_drafter(**changes))


class TestTheWrongPair:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(hidden_size=16, target_hidden_size=WIDTH), f"hidden_size is 16, the target's is {WIDTH}"),
            (dict(target_hidden_size=64), f"target_hidden_size is 64, the target's is {WIDTH}"),
            (dict(num_target_layers=9), f"num_target_layers is 9, the target's is {LAYERS}"),
            (dict(num_target_layers=None, target_layer_ids=[1, 7]), r"layers \[1, 7\], but the target has 4 layers"),
            (dict(mask_token_id=None), "first drafter's config has no mask_token_id"),
        ],
    )
    def test_is_refused_with_both_values(self, changes, message):
        with pytest.raises(ValueError, match=message):
            generate(assistant=alone(**changes))

    def test_another_vocabulary_is_refused_before_stock_asks_for_tokenizers(self):
        with pytest.raises(ValueError, match=f"first drafter .* vocab_size is 30, the target's is {VOCAB}"):
            generate(assistant=alone(vocab_size=30))

    def test_the_second_drafter_is_checked_too(self):
        pair = D2SDAssistant.from_drafters(tiny_drafter(), tiny_drafter(mask_token_id=None))
        with pytest.raises(ValueError, match="second drafter's config has no mask_token_id"):
            generate(assistant=pair)

    def test_bind_checks_without_generating(self):
        bind(tiny_assistant(4, 6), tiny_target())
        with pytest.raises(ValueError, match="vocab_size"):
            bind(alone(vocab_size=30), tiny_target())

    def test_another_tokenizer_of_the_same_size_is_refused(self):
        def words(order):
            vocabulary = {word: i for i, word in enumerate(order)}
            return tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))

        right, wrong = words("abc"), words("acb")
        pair = alone(tokenizer_fingerprint=tokenizer_fingerprint(right))
        assert generate(assistant=pair, tokenizer=right).shape[1] == prompt().shape[1] + 4
        with pytest.raises(ValueError, match=f"fingerprint {tokenizer_fingerprint(wrong)}"):
            generate(assistant=pair, tokenizer=wrong)

    def test_drafters_of_two_targets_make_no_pair(self):
        with pytest.raises(ValueError, match="vocab_size is 24 and 30"):
            D2SDAssistant.from_drafters(tiny_drafter(), tiny_drafter(vocab_size=30))

    def test_the_second_block_may_not_be_the_shorter_one(self):
        with pytest.raises(ValueError, match=r"block_size \(4\) must be at least the first's \(6\)"):
            D2SDAssistant.from_drafters(tiny_drafter(6), tiny_drafter(4))


class TestConfigs:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(block_size=1), "block_size is 1; it must be at least 2"),
            (dict(mask_token_id=VOCAB), f"mask_token_id is {VOCAB}, outside the vocabulary of {VOCAB}"),
            (dict(mask_token_id=-1), "mask_token_id is -1"),
            (dict(target_layer_ids=[0, LAYERS]), rf"target_layer_ids is \[0, {LAYERS}\]; .* 0 to {LAYERS - 1}"),
            (dict(target_layer_ids=[-1]), r"target_layer_ids is \[-1\]"),
            (dict(target_layer_ids=[]), r"target_layer_ids is \[\]"),
            (dict(draft_vocab_size=0), "draft_vocab_size is 0"),
            (dict(draft_vocab_size=VOCAB + 1), f"draft_vocab_size is {VOCAB + 1}"),
            (dict(layer_types=["full_attention"]), "for each of the 2 layers"),
            (dict(layer_types=["full_attention", "recurrent"]), "recurrent"),
            (dict(layer_types=["sliding_attention"] * 2), "sliding_window is not set"),
            (dict(num_key_value_heads=3), "no multiple of num_key_value_heads=3"),
            (dict(d2sd_format_version=2), "d2sd_format_version=2; this release reads version 1"),
        ],
        ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
    )
    def test_of_drafters_are_checked_when_made(self, changes, message):
        with pytest.raises(ValueError, match=message):
            tiny_drafter(**changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(num_branches=-1), "num_branches is -1; it must be 0 or more"),
            (dict(tree_budget=0), "tree_budget is 0; it must be at least 1"),
            (dict(d2sd_format_version=7), "d2sd_format_version=7"),
            (dict(second={"model_type": "qwen3"}), "unknown format 'qwen3'"),
        ],
    )
    def test_of_pairs_are_checked_when_made(self, changes, message):
        with pytest.raises(ValueError, match=message):
            D2SDConfig(**changes)


class TestCheckpoints:
    def save(self, folder, model=None):
        (model or tiny_assistant(4, 6)).save_pretrained(folder)
        return folder / "model.safetensors"

    @pytest.mark.parametrize("reader", [D2SDAssistant, D2SDDrafterModel])
    def test_of_another_architecture_are_refused_by_name(self, reader, tmp_path):
        tiny_target().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="saved in the format 'llama'"):
            reader.from_pretrained(tmp_path)

    def test_of_a_pair_are_not_read_as_a_drafter(self, tmp_path):
        self.save(tmp_path)
        with pytest.raises(ValueError, match="saved in the format 'd2sd'.* reads 'd2sd_drafter'"):
            D2SDDrafterModel.from_pretrained(tmp_path)

    def test_that_are_truncated_are_refused(self, tmp_path):
        file = self.save(tmp_path)
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(Exception, match="(?i)incomplete|truncated|invalid|safetensor"):
            D2SDAssistant.from_pretrained(tmp_path)

    def test_that_lack_a_tensor_or_hold_a_strange_one_are_refused_with_its_name(self, tmp_path):
        file = self.save(tmp_path)
        tensors = load_file(file)
        missing = {name: value for name, value in tensors.items() if name != "second.fc.weight"}
        save_file(missing, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="missing.*second.fc.weight"):
            D2SDAssistant.from_pretrained(tmp_path)
        save_file({**tensors, "shift_label": torch.zeros(1)}, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="unexpected.*shift_label"):
            D2SDAssistant.from_pretrained(tmp_path)

    def test_that_hold_a_tensor_of_another_shape_are_refused(self, tmp_path):
        file = self.save(tmp_path)
        tensors = load_file(file)
        tensors["first.fc.weight"] = torch.zeros(3, 3)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="mismatched.*first.fc.weight"):
            D2SDAssistant.from_pretrained(tmp_path)

    def test_that_are_pickled_are_not_read(self, tmp_path):
        file = self.save(tmp_path)
        torch.save(load_file(file), tmp_path / "pytorch_model.bin")
        file.unlink()
        with pytest.raises(OSError, match="safetensors"):
            D2SDAssistant.from_pretrained(tmp_path)

    def test_from_drafters_takes_models_and_paths_only(self):
        with pytest.raises(TypeError, match="got LlamaForCausalLM"):
            D2SDAssistant.from_drafters(tiny_target())


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(d2sd_num_branches=-1), "d2sd_num_branches is -1; it must be an integer of at least 0"),
            (dict(d2sd_tree_budget=0), "d2sd_tree_budget is 0; it must be an integer of at least 1"),
            (dict(d2sd_tree_budget=2.5), "d2sd_tree_budget is 2.5"),
            (dict(d2sd_num_branches=True), "d2sd_num_branches is True"),
            (dict(d2sd_block_size=1), "d2sd_block_size is 1; it must be an integer of at least 2"),
            (dict(d2sd_block_size=5), "d2sd_block_size is 5; the first drafter was made for at most 4"),
        ],
    )
    def test_out_of_range_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            generate(**options)

    def test_branches_need_a_second_drafter(self):
        with pytest.raises(ValueError, match="d2sd_num_branches is 2, but the assistant has no second drafter"):
            generate(assistant=alone(), d2sd_num_branches=2)

    def test_a_typo_is_refused_as_by_stock_generate(self):
        with pytest.raises(ValueError, match="d2sd_branches"):
            generate(d2sd_branches=2)

    def test_a_single_drafter_is_no_assistant(self):
        with pytest.raises(ValueError, match=r"D2SDAssistant.from_drafters\(drafter\)"):
            generate(assistant=tiny_drafter())

    def test_an_assistant_writes_nothing_by_itself(self):
        with pytest.raises(TypeError, match=r"target.generate\(..., assistant_model=assistant\)"):
            tiny_assistant(4, 6).generate(prompt())


class Silent(tf.generation.streamers.BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


def soft_capped():
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, head_dim=8)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = tf.Gemma2Config(
        vocab_size=VOCAB, num_key_value_heads=2, attn_logit_softcapping=5.0, initializer_range=0.5, **sizes, **special
    )
    target = tf.Gemma2ForCausalLM(config).eval()
    target.generation_config.eos_token_id = None
    return target


class TestWhatCannotWork:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(num_beams=2), "the settings ask for beam_search"),
            (dict(num_beams=2, do_sample=True), "the settings ask for beam_sample"),
            (dict(penalty_alpha=0.6, top_k=4), "the settings ask for contrastive_search"),
            (dict(use_cache=False), "use_cache is False"),
            (dict(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
            (dict(synced_gpus=True), "synced_gpus"),
            (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens is set"),
            (dict(assistant_early_exit=2), "assistant_early_exit is set"),
            (dict(speculation_type="dflash"), "speculation_type is set, for which a single drafter"),
            (dict(cache_implementation="static"), "takes over a DynamicCache only; got StaticCache"),
        ],
    )
    def test_settings_are_refused_with_the_reason_and_the_alternative(self, options, message):
        with pytest.raises(ValueError, match=message) as error:
            generate(**options)
        assert "without assistant_model" in str(error.value)

    def test_continuous_batching_is_refused(self):
        with pytest.raises(NotImplementedError, match="assistant_model is not supported for continuous batching"):
            generate(cache_implementation="paged")

    def test_what_a_batch_cannot_have_is_refused(self):
        batch = prompt().repeat(3, 1)
        with pytest.raises(ValueError, match="keeps a state of the whole batch"):
            generate(inputs=batch, guidance_scale=1.5)
        with pytest.raises(ValueError, match="streamer takes one sequence, got a batch of 3"):
            generate(inputs=batch, streamer=Silent())
        with pytest.raises(ValueError, match="Row 1 of the prompt has no new token"):
            generate(inputs=batch, attention_mask=torch.tensor([1, 0, 1])[:, None].expand(-1, 9), pad_token_id=0)

    def test_a_cache_of_another_batch_is_refused(self):
        cache = DynamicCache()
        tiny_target()(prompt(4).repeat(2, 1), **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="holds 2 rows and the prompt has 3"):
            generate(inputs=prompt().repeat(3, 1), **{CACHE_NAME: cache})

    def test_a_sliding_cache_that_forgot_what_a_row_sees_is_refused(self):
        """Padding filled the window: the tokens before it are gone, and row 0 still sees them."""
        target, cache = tiny_target("mistral"), DynamicCache(config=tiny_target("mistral").config)
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, 12:] = 0
        target(prompt(20).repeat(2, 1), attention_mask=mask, **{CACHE_NAME: cache})
        whole = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], dim=1)
        with pytest.raises(ValueError, match="tokens that gave way to padding"):
            generate(target, inputs=prompt(23).repeat(2, 1), attention_mask=whole, **{CACHE_NAME: cache})

    @pytest.mark.parametrize(
        ("backend", "message"),
        [
            ("flash", "must be one of .*'varlen'.*'cpu', 'masked', 'sdpa', 'eager'"),
            ("varlen", "cannot run here: FlashAttention needs CUDA and the model is on cpu"),
            ("flash_attention_2", "cannot run here: FlashAttention needs CUDA and the model is on cpu"),
            ("kernels", "cannot run here: FlashAttention needs CUDA"),
        ],
    )
    def test_a_backend_that_cannot_run_is_refused_with_the_reason(self, backend, message):
        with pytest.raises(ValueError, match=message):
            generate(d2sd_attention_backend=backend)

    def test_a_mask_is_refused_where_the_model_has_no_such_attention(self):
        with pytest.raises(ValueError, match="'sdpa' cannot run here: the model has no SDPA attention"):
            generate(tiny_target("gpt_oss"), d2sd_attention_backend="sdpa")

    def test_soft_capping_falls_to_a_backend_that_has_it(self):
        target, pair = soft_capped(), tiny_assistant(4, 6)
        plain = target.generate(prompt(), do_sample=False, max_new_tokens=12)
        assert generate(target, pair, max_new_tokens=12).tolist() == plain.tolist()
        own = target.config._attn_implementation  # eager; in older versions of Transformers SDPA
        reason = "with a mask over all keys, since torch's CPU kernel has no soft-capping"
        assert pair.attention_backend == f"{own}: {reason}"
        with pytest.raises(ValueError, match="'cpu' cannot run here: torch's CPU kernel has no soft-capping"):
            generate(target, pair, d2sd_attention_backend="cpu")

    def test_encoder_decoders_are_refused(self):
        config = tf.T5Config(vocab_size=VOCAB, d_model=WIDTH, num_layers=1, num_heads=2, d_ff=8, d_kv=8)
        target = tf.T5ForConditionalGeneration(config).eval()
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
            generate(target)

    def test_recurrent_states_outside_of_the_cache_are_refused(self):
        sizes = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, attention_hidden_size=WIDTH)
        with pytest.raises(ValueError, match="RwkvForCausalLM has a recurrent state"):
            generate(tf.RwkvForCausalLM(tf.RwkvConfig(**sizes)).eval())

    def test_a_cache_that_holds_the_whole_prompt_is_refused(self):
        cache = DynamicCache()
        tiny_target()(prompt(), **{CACHE_NAME: cache})
        with pytest.raises(ValueError, match="already holds 9 tokens and the prompt has 9"):
            generate(**{CACHE_NAME: cache})

    def test_other_caches_are_refused(self):
        static = StaticCache(config=tiny_target().config, max_cache_len=64)
        with pytest.raises(ValueError, match="got StaticCache"):
            generate(**{CACHE_NAME: static})
        with pytest.raises(ValueError, match="an offloaded DynamicCache"):
            generate(**{CACHE_NAME: DynamicCache(config=tiny_target().config, offloading=True)})

    def test_an_image_cannot_be_split_over_prefill_chunks(self):
        with pytest.raises(ValueError, match="prefill_chunk_size=3 would split the inputs"):
            tiny_target("gemma3_image").generate(
                **image_inputs(), assistant_model=tiny_assistant(4, 6), prefill_chunk_size=3, max_new_tokens=2
            )

    def test_nothing_was_generated_or_changed_by_a_refusal(self):
        pair = copy.deepcopy(tiny_assistant(4, 6))
        pair.last_stats = None
        with pytest.raises(ValueError):
            generate(assistant=pair, d2sd_tree_budget=0)
        assert pair.last_stats is None
