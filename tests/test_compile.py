"""Cycles of fixed shapes: compiled once, whatever the trees, and equal to plain `generate`."""

import copy
import pickle

import pytest
import torch
from test_acceptance import Scripted, host_tree
from test_batch import ends_of, pad, prompts
from test_batch import generate as generate_batch
from test_threads import state_of
from test_tree import random_forest
from tiny import OracleDrafts, prompt, tiny_drafter, tiny_target
from torch._dynamo.utils import counters

from hf_d2sd import D2SDAssistant, captured
from hf_d2sd.acceptance import greedy_paths, walk
from hf_d2sd.captured import compile_once
from hf_d2sd.tree import CandidateTree

FAMILIES = ("llama", "qwen3", "mistral", "gemma3_text", "gpt_oss")


@pytest.fixture
def pair():
    """With dynamo and its guards, and without a compiler behind it: that would take minutes."""
    torch._dynamo.reset()
    counters.clear()
    pair = D2SDAssistant.from_drafters(tiny_drafter(4), tiny_drafter(6, seed=1))
    pair.compile(whole=False, backend="eager")
    yield pair
    torch._dynamo.reset()


def generate(family, length, new=40, **options):
    return tiny_target(family).generate(prompt(length), **{"do_sample": False, "max_new_tokens": new, **options})


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


FAST = {("llama", "cpu"), ("gpt_oss", "cpu"), ("llama", "packed"), ("llama", "sdpa")}
CASES = [
    pytest.param(family, backend, marks=() if (family, backend) in FAST else pytest.mark.slow)
    for family in FAMILIES
    for backend in ("cpu", "packed", "sdpa")
]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_nothing_is_compiled_again_in_200_cycles(family, backend, packed, pair, monkeypatch):
    """Prompts of several lengths, and drafts from hardly ever to always right: trees and paths of all shapes."""
    if (family, backend) == ("gpt_oss", "sdpa"):
        pytest.skip("it has no SDPA attention")
    options = dict(d2sd_attention_backend=backend, assistant_model=pair)
    cycles, sizes, paths = 0, set(), set()
    generate(family, 5, **options)
    generate(family, 5, 12, **options)
    first = graphs()
    assert first == 5, "the target's pass, both drafts, the walk, and the moves in the cache"
    for seed in range(40):
        length, accuracy = 3 + 7 * seed % 41, (0.0, 0.5, 0.8, 1.0)[seed % 4]
        plain = generate(family, length)
        with monkeypatch.context() as patch:
            OracleDrafts(patch, plain[0], accuracy, seed=seed)
            with torch.compiler.set_stance("fail_on_recompile"):
                assert generate(family, length, **options).tolist() == plain.tolist()
        stats = pair.last_stats
        cycles, sizes, paths = cycles + stats.cycles, sizes | {*stats.tree_sizes}, paths | {*stats.committed_per_cycle}
        if cycles >= 200:
            break
    assert cycles >= 200
    assert graphs() == first
    assert not counters["graph_break"]
    assert len(sizes) > 5
    assert paths == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_batch_of_fixed_size_equals_plain_generate(family, pair):
    inputs, (_, eos) = pad(prompts(5, 1)), ends_of(family, 5, 1)
    for options in (dict(), dict(return_dict_in_generate=True, output_hidden_states=True)):
        plain = generate_batch(family, inputs, eos_token_id=eos)
        ours = generate_batch(family, inputs, eos_token_id=eos, assistant_model=pair, **options)
        ours = ours.sequences if options else ours
        assert ours.tolist() == plain.tolist()
    assert pair.last_stats.new_tokens == sum(map(len, ends_of(family, 5, 1)[0]))


def test_sampling_and_processors_walk_on_the_host(pair):
    tiny_target("llama")  # to be made before the seed is set
    for options in (dict(do_sample=True, top_k=5), dict(repetition_penalty=1.5)):
        torch.manual_seed(3)
        plain = generate("llama", 9, **options)
        torch.manual_seed(3)
        assert generate("llama", 9, assistant_model=pair, **options).tolist() == plain.tolist()


def test_it_is_on_by_an_option_and_off_by_one(pair):
    plain, other = generate("llama", 9), D2SDAssistant.from_drafters(tiny_drafter(4), tiny_drafter(6, seed=1))
    assert generate("llama", 9, assistant_model=pair, d2sd_compile=False).tolist() == plain.tolist()
    assert generate("llama", 9, assistant_model=other).tolist() == plain.tolist()
    assert graphs() == 0
    other.compile_options = {"whole": False, "backend": "eager"}
    assert generate("llama", 9, assistant_model=other, d2sd_compile=True).tolist() == plain.tolist()
    assert graphs() == 5
    with pytest.raises(ValueError, match="d2sd_compile is 3"):
        generate("llama", 9, assistant_model=pair, d2sd_compile=3)


def test_turns_and_their_caches_go_on(pair):
    one = generate("mistral", 9, assistant_model=pair, return_dict_in_generate=True)
    whole = torch.cat([one.sequences, prompt(5, 3)], dim=1)
    options = dict(do_sample=False, max_new_tokens=20)
    plain = tiny_target("mistral").generate(whole, **options)
    name = "cache" if "cache" in one else "past_key_values"
    assert one[name].get_seq_length() == one.sequences.shape[1] - 1
    for compiled in (True, False):
        cache = copy.deepcopy(one[name])
        ours = tiny_target("mistral").generate(
            whole, assistant_model=pair, d2sd_compile=compiled, **{name: cache}, **options
        )
        assert ours.tolist() == plain.tolist()


def test_what_was_compiled_is_the_assistants_and_not_copied_or_saved_with_it(pair):
    target = copy.deepcopy(tiny_target("llama"))
    target(prompt(), output_hidden_states=True)  # for which Transformers puts hooks of its own on a model
    before = state_of(target)
    target.generate(prompt(), assistant_model=pair, max_new_tokens=8)
    assert state_of(target) == before
    assert pair._compiled
    assert not copy.deepcopy(pair)._compiled
    assert not pickle.loads(pickle.dumps(pair._compiled))


def test_an_assistant_keeps_what_it_compiled_of_a_few_targets_alone(pair, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda: function)
    monkeypatch.setattr(captured, "_MOST_COMPILED", 3)
    pair, functions = copy.deepcopy(pair), [lambda number=number: number for number in range(5)]
    for function in functions:
        assert compile_once(pair, {}, function) is compile_once(pair, {}, function)
    assert [kept() for kept in pair._compiled.values()] == functions[2:]


def test_the_walk_by_tensors_is_the_walk_by_steps():
    for seed in range(60):
        forest = random_forest(seed, rows=3, size=1 + seed % 14)
        generator = torch.Generator().manual_seed(seed)
        tokens = (
            torch.arange(len(forest)).expand(3, -1) % 3 + 3 * forest.depths
        )  # siblings may share a token: see below
        tokens = distinct_siblings(tokens, forest.parents)
        choices = torch.stack([draw_choices(tokens[r], forest.parents[r], generator) for r in range(3)])
        tree = CandidateTree(tokens, forest.parents, forest.depths, forest.scores, forest.ranks)
        width = int(tree.depths.max()) + 1
        paths = greedy_paths(tokens, tree.parents, tree.depths, tree.visibility(), choices, width)
        for row in range(3):
            chosen = choices[row].tolist()
            path, _ = walk(host_tree(tokens[row].tolist(), tree.parents[row].tolist()), Scripted(chosen.__getitem__))
            assert paths[row].tolist() == path + [0] * (width - len(path))


def distinct_siblings(tokens, parents):
    tokens = tokens.clone()
    for row in range(len(tokens)):
        seen = set()
        for node in range(tokens.shape[1]):
            while (int(parents[row, node]), int(tokens[row, node])) in seen:
                tokens[row, node] += 100
            seen.add((int(parents[row, node]), int(tokens[row, node])))
    return tokens


def draw_choices(tokens, parents, generator):
    """For each node, mostly the token of one of its children."""
    choices = torch.full_like(tokens, 9999)
    for node in range(len(tokens)):
        children = (parents == node).nonzero().flatten()
        if len(children) and torch.rand((), generator=generator) < 0.85:
            choices[node] = tokens[children[torch.randint(len(children), (), generator=generator)]]
    return choices


@pytest.mark.parametrize("shape", [dict(d2sd_tree_width=3, d2sd_tree_budget=14), dict(d2sd_levels=3)])
def test_wide_and_deep_trees_are_compiled_once_too(pair, shape):
    """Trees of the likeliest paths, and of three levels, equal to plain `generate`."""
    options = dict(assistant_model=pair, d2sd_num_branches=2, **shape)
    generate("llama", 5, **options)
    generate("llama", 5, 12, **options)
    first = graphs()
    for seed in range(6):
        length = 3 + 7 * seed
        plain = generate("llama", length)
        assert generate("llama", length, **options).tolist() == plain.tolist()
        assert max(pair.last_stats.tree_sizes) <= shape.get("d2sd_tree_budget", 26)
    assert graphs() == first


@pytest.mark.slow
@pytest.mark.parametrize("wide", [{}, dict(d2sd_tree_width=3, d2sd_tree_budget=14)])
def test_torchs_own_compiler_gives_the_same_text(wide):
    torch._dynamo.reset()
    pair = D2SDAssistant.from_drafters(tiny_drafter(4), tiny_drafter(6, seed=1))
    pair.compile()
    for length in (5, 12, 20):
        options = dict(assistant_model=pair, **wide)
        assert generate("llama", length, 24, **options).tolist() == generate("llama", length, 24).tolist()
    torch._dynamo.reset()
