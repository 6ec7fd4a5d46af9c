"""Targets with adapters of PEFT: switched, merged and taken off between calls, of embedding and head too."""

import copy

import peft
import pytest
import torch
from tiny import OracleDrafts, prompt, tiny_assistant, tiny_drafter, tiny_target

from hf_d2sd import D2SDAssistant, bind
from hf_d2sd.compat import embedding_scale
from hf_d2sd.drafting import Drafter

OPTIONS = dict(do_sample=False, max_new_tokens=20)
INNER, OUTER = ("q_proj", "v_proj", "down_proj"), ("k_proj", "lm_head", "embed_tokens")


def lora(modules=INNER, **more) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM", **more)


def with_adapters(family: str = "llama", **adapters) -> peft.PeftModel:
    """A target with adapters that change its text, each of another seed; the first is active."""
    torch.manual_seed(0)
    (name, config), *others = adapters.items()
    model = peft.get_peft_model(copy.deepcopy(tiny_target(family)), config, adapter_name=name)
    for name, config in others:
        model.add_adapter(name, config)
    return model.eval()


def pruned_pair() -> D2SDAssistant:
    return D2SDAssistant.from_drafters(tiny_drafter(4, draft_vocab_size=12))


def texts(model, assistant, seed: int = 0, **more) -> list[list[int]]:
    """Plain decoding's text and ours."""
    inputs = prompt(9, seed)
    plain = model.generate(input_ids=inputs, **OPTIONS, **more)
    return [
        plain[0].tolist(),
        model.generate(input_ids=inputs, assistant_model=assistant, **OPTIONS, **more)[0].tolist(),
    ]


KINDS = {
    "lora": lora(),
    "lora of embedding and head": lora(OUTER),
    "dora": lora(use_dora=True),
    "whole modules": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "single tokens": lora(trainable_token_indices={"embed_tokens": [1, 2, 3]}),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "oft": peft.OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, r=0, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_the_adapted_targets_own(kind, monkeypatch):
    model, assistant = with_adapters(one=KINDS[kind]), tiny_assistant(4, 6)
    if kind == "whole modules":  # they start as copies
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    plain = model.generate(input_ids=prompt(9), **OPTIONS)[0].tolist()
    OracleDrafts(monkeypatch, torch.tensor(plain), 0.7)
    for options in ({}, dict(d2sd_tree_width=3, d2sd_tree_budget=12)):
        ours = model.generate(input_ids=prompt(9), assistant_model=assistant, **OPTIONS, **options)
        assert ours[0].tolist() == plain
        assert assistant.last_stats.mean_acceptance_length > 1.3


def test_a_batch_and_samples():
    model = with_adapters(one=lora(OUTER))
    inputs = {"input_ids": torch.cat([prompt(9), prompt(9, 1)]), "attention_mask": torch.ones(2, 9).long()}
    inputs["attention_mask"][1, :4] = 0
    ours = model.generate(**inputs, assistant_model=tiny_assistant(4, 6), **OPTIONS)
    assert ours.tolist() == model.generate(**inputs, **OPTIONS).tolist()
    sampled = []
    for options in ({}, dict(assistant_model=tiny_assistant(4, 6))):
        torch.manual_seed(5)
        sampled.append(model.generate(input_ids=prompt(9), do_sample=True, max_new_tokens=20, **options).tolist())
    assert sampled[0] == sampled[1]


class TestBetweenCalls:
    """One model, one pair of drafters: after each change the text is the target's own, and drafters' rows follow."""

    STEPS = {
        "as it is": lambda model: None,
        "switched": lambda model: model.set_adapter("two"),
        "merged": lambda model: model.merge_adapter(),
        "unmerged": lambda model: model.unmerge_adapter(),
        "back": lambda model: model.set_adapter("one"),
        "deleted": lambda model: model.delete_adapter("two"),
    }

    @pytest.mark.parametrize("modules, pair", [(INNER, lambda: tiny_assistant(4, 6)), (OUTER, pruned_pair)])
    def test_switched_merged_unmerged_and_taken_off(self, modules, pair):
        model, assistant = with_adapters(one=lora(modules), two=lora(modules)), pair()
        seen = {}
        for step, change in self.STEPS.items():
            change(model)
            plain, ours = texts(model, assistant)
            assert ours == plain, step
            seen[step] = plain
        with model.disable_adapter():
            plain, ours = texts(model, assistant)
            assert ours == plain == tiny_target("llama").generate(prompt(9), **OPTIONS)[0].tolist()
        assert seen["as it is"] != seen["switched"] != plain, "control: adapters change the text"
        assert seen["as it is"] == seen["back"]
        base = model.merge_and_unload()
        plain, ours = texts(base, assistant)
        assert plain == ours

    def test_a_pruned_vocabularys_rows_are_those_of_the_head_as_it_is(self):
        model, pair = with_adapters(one=lora(OUTER), two=lora(OUTER)), pruned_pair()
        target, ids = model.get_base_model(), pair.first.draft_token_ids

        def rows() -> torch.Tensor:
            return Drafter(pair.first, target)._head.weight

        def expected() -> torch.Tensor:
            with torch.no_grad():
                return target.get_output_embeddings()(torch.eye(32)).T[ids]

        first = rows()
        assert rows() is first, "as long as nothing changes they are kept"
        for step, change in self.STEPS.items():
            change(model)
            torch.testing.assert_close(rows(), expected(), msg=step)
            assert rows() is rows()
        with model.disable_adapter():
            torch.testing.assert_close(rows(), tiny_target("llama").lm_head.weight[ids])
        base = model.merge_and_unload()
        torch.testing.assert_close(Drafter(pair.first, base)._head.weight, base.lm_head.weight[ids])

    def test_adapters_that_are_put_into_the_target_without_a_wrapper(self):
        target, assistant = copy.deepcopy(tiny_target("llama")), pruned_pair()
        before, _ = texts(target, assistant)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(lora(OUTER), target)
        plain, ours = texts(target.eval(), assistant)
        assert plain == ours != before

    def test_the_targets_modules_and_adapters_are_left_as_they_were(self):
        model = with_adapters(one=lora(OUTER))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        texts(model, pruned_pair())
        after = model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_adapter_of_a_scaled_embedding_leaves_its_scale():
    model = with_adapters("gemma3_text", one=lora(OUTER))
    target = model.get_base_model()
    scale = float(embedding_scale(tiny_target("gemma3_text").get_input_embeddings()))
    assert scale == pytest.approx(32**0.5, rel=0.01) == float(embedding_scale(target.get_input_embeddings()))
    pair = D2SDAssistant.from_drafters(tiny_drafter(4, input_embedding_scale=scale))
    bind(pair, target)
    plain, ours = texts(model, pair)
    assert plain == ours


class TestWhatATreeCannotFollow:
    """Each would be decoded to another text in silence."""

    @pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
    def test_virtual_tokens(self, kind):
        model = peft.get_peft_model(copy.deepcopy(tiny_target()), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with pytest.raises(ValueError, match="prepared by PeftModelForCausalLM, for virtual tokens"):
            model.eval().generate(input_ids=prompt(9), assistant_model=tiny_assistant(4, 6), **OPTIONS)
        base = model.get_base_model()  # which generates by itself
        plain, ours = texts(base, tiny_assistant(4, 6))
        assert plain == ours

    def test_an_adapter_that_starts_at_certain_tokens(self):
        model = with_adapters(one=lora(alora_invocation_tokens=prompt(9)[0, -3:].tolist()))
        self.refused(model, "alora_invocation_tokens", input_ids=prompt(9))

    def test_an_adapter_for_each_row(self):
        inputs = dict(input_ids=torch.cat([prompt(9), prompt(9, 1)]), adapter_names=["one", "two"])
        self.refused(with_adapters(one=lora(), two=lora()), "adapter_names gives each row an adapter", **inputs)

    def refused(self, model, message: str, **inputs) -> None:
        """And nothing of it stays, which PEFT leaves in the model when a call ends in an error."""
        others = {"input_ids": inputs["input_ids"]}
        with model.disable_adapter():
            plain = model.generate(**others, **OPTIONS)
        before = model.generate(**inputs, **OPTIONS)
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, assistant_model=tiny_assistant(4, 6), **OPTIONS)
        assert not any(module._forward_pre_hooks for module in model.modules())
        with model.disable_adapter():
            assert model.generate(**others, **OPTIONS).tolist() == plain.tolist()
        assert model.generate(**inputs, **OPTIONS).tolist() == before.tolist()

    def test_one_row_may_name_its_adapter(self):
        model = with_adapters(one=lora(OUTER), two=lora(OUTER))
        plain, ours = texts(model, pruned_pair(), adapter_names=["two"])
        assert plain == ours != texts(model, pruned_pair())[0]
