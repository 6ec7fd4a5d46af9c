"""Threads that share a target, and an assistant: right texts, and a target that nothing ever happened to."""

import copy
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import FAMILIES, IMAGE_TOKEN, image_inputs, prompt, tiny_assistant, tiny_drafter, tiny_target
from transformers.generation.streamers import BaseStreamer

from hf_d2sd import D2SDAssistant

NEW = 16


def state_of(model) -> dict:
    """All that a call could leave behind: configs, hooks, modules and what stands on them, buffers and weights."""
    modules = {
        name: (id(module), sorted(vars(module)), [str(hooks) for key, hooks in vars(module).items() if "hooks" in key])
        for name, module in model.named_modules()
    }
    tensors = {name: (id(t), t._version) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    configs = {
        name: (id(m.config), m.config.to_dict(), m.config._attn_implementation) for name, m in with_config(model)
    }
    return {
        "modules": modules,
        "tensors": tensors,
        "configs": configs,
        "generation": model.generation_config.to_dict(),
    }


def fresh_target(family: str = "llama"):
    """A copy that has once been asked for hidden states, for which Transformers puts hooks of its own on a model."""
    target = copy.deepcopy(tiny_target(family))
    inputs = image_inputs(9) if hasattr(target.config, "vision_config") else {"input_ids": prompt(9)}
    target(**inputs, output_hidden_states=True)
    return target


def with_config(model):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "config")]


class Leaves(BaseStreamer):
    """Ends the call from within, as a client that hangs up."""

    def put(self, value):
        if value.ndim == 1:
            raise ConnectionResetError("gone")

    def end(self):
        pass


def call(target, kind: str, seed: int, assistant):
    inputs = image_inputs(9, seed) if hasattr(target.config, "vision_config") else {"input_ids": prompt(9, seed)}
    options = dict(do_sample=False, max_new_tokens=NEW)
    if kind == "plain":
        return target.generate(**inputs, **options)
    if kind == "sampled":  # of one token: the text is the greedy one, whatever other threads draw
        options = dict(do_sample=True, top_k=1, max_new_tokens=NEW)
    if kind == "wide":
        options |= dict(d2sd_tree_width=3, d2sd_tree_budget=9)
    if kind == "hangs up":
        options["streamer"] = Leaves()
    if kind == "refused":
        options["num_beams"] = 3
    return target.generate(**inputs, **options, assistant_model=assistant)


FAILING = {"hangs up": ConnectionResetError, "refused": ValueError}
KINDS = ("plain", "greedy", "wide", "sampled", *FAILING)


def mixed_calls(family: str, threads: int, calls: int, assistants: list) -> list[str]:
    """What went wrong when so many threads called so often, in words."""
    target, wrong = fresh_target(family), []
    expected = [call(target, "plain", seed, None).tolist() for seed in range(5)]
    before, start = state_of(target), threading.Barrier(threads)

    def work(number: int) -> None:
        rng = random.Random(number)
        start.wait()
        for _ in range(calls):
            kind, seed = rng.choice(KINDS), rng.randrange(5)
            try:
                text = call(target, kind, seed, assistants[number % len(assistants)]).tolist()
                if kind in FAILING or text != expected[seed]:
                    wrong.append(f"{kind} {seed}: {text}")
            except Exception as error:
                if not isinstance(error, FAILING.get(kind, ())):
                    wrong.append(f"{kind}: {type(error).__name__}: {error}")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    if call(target, "plain", 0, None).tolist() != expected[0]:
        wrong.append("plain decoding afterwards")
    after = state_of(target)
    return wrong + [name for name in before if before[name] != after[name]]


@pytest.mark.parametrize("shared", [True, False], ids=["one assistant", "an assistant each"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_eight_threads_share_a_target(family, shared):
    assistants = [tiny_assistant(4, 6)] if shared else [copy.deepcopy(tiny_assistant(4, 6)) for _ in range(8)]
    assert mixed_calls(family, threads=8, calls=6, assistants=assistants) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_eight_threads_make_fifty_calls_each(family):
    assert mixed_calls(family, threads=8, calls=50, assistants=[tiny_assistant(4, 6)]) == []


@pytest.mark.parametrize("backend", [None, "sdpa", "eager", "packed"])
def test_nothing_of_a_target_changes_while_a_call_runs(backend, packed):
    """Looked at from its own streamer, in the midst of cycles."""
    target = fresh_target()
    before, seen = state_of(target), []

    class Looks(BaseStreamer):
        def put(self, value):
            seen.append(state_of(target) == before)

        def end(self):
            pass

    options = dict(d2sd_attention_backend=backend, assistant_model=tiny_assistant(4, 6), streamer=Looks())
    target.generate(prompt(9), do_sample=False, max_new_tokens=NEW, **options)
    assert len(seen) > 3 and all(seen)


def test_a_target_is_untouched_in_the_middle_of_a_forward(monkeypatch):
    target, looks = fresh_target(), []
    before = state_of(target)
    forward = type(target.model.layers[1].mlp).forward

    def looking(module, states):
        looks.append((state_of(target) == before, states.shape[1]))
        return forward(module, states)

    monkeypatch.setattr(type(target.model.layers[1].mlp), "forward", looking)
    target.generate(prompt(9), do_sample=False, max_new_tokens=6, assistant_model=tiny_assistant(4, 6))
    assert max(size for _, size in looks[1:]) > 1, "trees must pass there"
    assert all(same for same, _ in looks)


def test_last_stats_are_those_of_the_threads_own_latest_call():
    target, assistant = tiny_target("llama"), D2SDAssistant.from_drafters(tiny_drafter(4), tiny_drafter(6, seed=1))
    ready = threading.Barrier(4)

    def work(number: int) -> bool:
        target.generate(prompt(5 + number), do_sample=False, max_new_tokens=3 + number, assistant_model=assistant)
        ready.wait()  # all have called, and none looks before
        return (assistant.last_stats.prompt_tokens, assistant.last_stats.new_tokens) == (5 + number, 3 + number)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert assistant.last_stats.new_tokens in range(3, 7), "a thread without a call sees the latest of all"
    assert copy.deepcopy(assistant).last_stats is None


def test_the_drafters_embedding_has_no_norm_and_the_targets_keeps_its_own():
    """Targets with a norm in their embedding: drafters read it before that norm, by another module of its weights."""
    from hf_d2sd.compat import without_embed_norm

    embed = torch.nn.Embedding(IMAGE_TOKEN, 4)
    embed.embed_norm = torch.nn.LayerNorm(4)
    twin = without_embed_norm(embed)
    assert isinstance(embed.embed_norm, torch.nn.LayerNorm) and isinstance(twin.embed_norm, torch.nn.Identity)
    assert twin.weight is embed.weight
    assert without_embed_norm(torch.nn.Embedding(3, 4)).__class__ is torch.nn.Embedding


def test_the_control_sees_what_a_call_could_leave():
    target = fresh_target()
    before = state_of(target)
    target.config._attn_implementation = "eager"
    assert state_of(target) != before
    target.config._attn_implementation = "sdpa"
    assert state_of(target) == before
    target.model.register_forward_hook(lambda *args: None)
    assert state_of(target) != before
