"""Which keys each node of a tree sees: the mask against its rule, and the target's logits against plain forwards."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny import FAMILIES, VOCAB, WINDOW, OracleDrafts, image_inputs, prompt, tiny_assistant, tiny_target
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_d2sd import attention, compat
from hf_d2sd.attention import Nodes, TreeAttention, choose, tree_mask
from hf_d2sd.cache import Place, TreeCache, TreeLayer
from hf_d2sd.probing import attention_for
from hf_d2sd.target import Target
from hf_d2sd.tree import CandidateTree

TOLERANCE = 2e-4  # of logits that differ by 0.1 to 100 where a path is wrong


def random_tree(seed: int, size: int) -> CandidateTree:
    """Any shape: a node's parent is any earlier node; siblings may carry the same token, attention does not mind."""
    generator = torch.Generator().manual_seed(seed)
    parents, depths = [-1], [0]
    for node in range(1, size):
        parents.append(int(torch.randint(0, node, (), generator=generator)))
        if torch.rand((), generator=generator) < 0.5:
            parents[-1] = node - 1  # so that trees get deep
        depths.append(depths[parents[-1]] + 1)
    tokens = torch.randint(2, 20, (size,), generator=generator)
    zeros = torch.zeros(size, dtype=torch.long)
    fields = tokens, torch.tensor(parents), torch.tensor(depths), zeros.float(), zeros
    return CandidateTree(*(field[None] for field in fields))


def path_to(tree: CandidateTree, node: int) -> list[int]:
    path = []
    while node != -1:
        path.append(node)
        node = int(tree.parents[0, node])
    return path[::-1]


def mask_of(tree: CandidateTree, position: int, cached: int, window: int | None) -> torch.Tensor:
    """(N, cached + N): the mask of a layer that hands out the last `cached` of `position` keys."""
    layer = TreeLayer(None if cached == position else window)
    layer.length = position
    return tree_mask(Nodes.of_tree(tree), Place(position, [position]), layer, window)[0]


class TestTheMask:
    @pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 100])
    @pytest.mark.parametrize("position", [0, 1, 3, 8])
    def test_a_node_sees_cached_keys_and_ancestors_within_its_window(self, window, position):
        for seed in range(20):
            tree = random_tree(seed, size=1 + seed % 9)
            # A sliding layer hands out the last W-1 cached keys; one that was never cut hands out all of them.
            for cached in {position, position if window is None else min(position, window - 1)}:
                mask = mask_of(tree, position, cached, window)
                assert mask.shape == (len(tree), cached + len(tree))
                for node in range(len(tree)):
                    at = position + len(path_to(tree, node)) - 1
                    for key in range(cached + len(tree)):
                        if key < cached:
                            key_at, related = position - cached + key, True
                        else:
                            key_at = position + len(path_to(tree, key - cached)) - 1
                            related = key - cached in path_to(tree, node)
                        expected = related and (window is None or at - key_at < window)
                        assert bool(mask[node, key]) == expected, (seed, window, position, cached, node, key)

    def test_the_last_keys_of_a_window_are_all_a_tree_can_see(self):
        """What a sliding layer does not hand out is out of every node's sight."""
        for seed in range(20):
            tree = random_tree(seed, size=8)
            whole = mask_of(tree, 30, 30, window=6)
            assert not whole[:, : 30 - 5].any()
            assert torch.equal(whole[:, 30 - 5 :], mask_of(tree, 30, 5, window=6))

    def test_an_additive_mask_hides_what_the_boolean_one_hides(self):
        seen = torch.rand(5, 9) < 0.5
        for dtype in (torch.float32, torch.bfloat16):
            chosen = TreeAttention("eager", "", "eager", {}, None, [])
            mask = chosen.as_mask(seen[None], dtype)
            assert (mask.shape, mask.dtype) == ((1, 1, 5, 9), dtype)
            assert torch.equal(mask[0, 0] == 0, seen)
            assert (mask[0, 0][~seen] == torch.finfo(dtype).min).all()


@functools.cache
def model_inputs(family: str, length: int):
    return image_inputs(length) if family == "gemma3_image" else {"input_ids": prompt(length)}


def forward_path(family: str, inputs: dict, tokens: list[int]) -> torch.Tensor:
    """Logits (V,) after the prompt and these tokens, by one plain forward without a cache."""
    more = torch.tensor([tokens], dtype=torch.long)
    whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], dim=1))
    if "token_type_ids" in inputs:
        whole["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.zeros_like(more)], dim=1)
    with torch.no_grad():
        return tiny_target(family)(**whole, use_cache=False).logits[0, -1]


def prefilled_target(family: str, inputs: dict) -> Target:
    model = tiny_target(family)
    target = Target(model, TreeCache(model.config), layer_ids={0})
    given = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        list(target.prefill(inputs["input_ids"], inputs["input_ids"].shape[1], **given))
    return target


@pytest.mark.parametrize("length", [WINDOW - 6, WINDOW - 1, WINDOW, 2 * WINDOW + 3])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_nodes_logits_are_those_of_its_own_path(family, length, monkeypatch):
    """Two cycles: the second tree stands on what was kept of the first. In two parts, however few the keys."""
    monkeypatch.setattr(attention, "SHORT", 0)
    inputs = model_inputs(family, length)
    target, committed = prefilled_target(family, inputs), []
    for cycle in range(2):
        tree = random_tree(cycle, size=24)
        step = target.verify(tree)
        logits = step.logits[0]
        for node in range(len(tree)):
            tokens = committed + tree.tokens[0, path_to(tree, node)].tolist()
            expected = forward_path(family, inputs, tokens)
            torch.testing.assert_close(logits[node], expected, atol=TOLERANCE, rtol=TOLERANCE)
        path = path_to(tree, len(tree) - 3)
        target.commit(step, torch.tensor([path]), [len(path)])
        committed += tree.tokens[0, path].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_wrong_parent_changes_the_logits(family):
    """The control of the test above: its tolerance tells a path from a path with one other token."""
    target = prefilled_target(family, model_inputs(family, 9))
    tokens, zeros = torch.tensor([[4, 5, 9, 6]]), torch.zeros(1, 4, dtype=torch.long)
    depths = torch.tensor([[0, 1, 1, 2]])
    right = CandidateTree(tokens, torch.tensor([[-1, 0, 0, 1]]), depths, zeros.float(), zeros)
    wrong = CandidateTree(tokens, torch.tensor([[-1, 0, 0, 2]]), depths, zeros.float(), zeros)
    results = []
    for tree in (right, wrong):
        results.append(target.verify(tree).logits[0])
        target.cache.crop(-len(tree))
    torch.testing.assert_close(results[0][:3], results[1][:3], atol=TOLERANCE, rtol=TOLERANCE)
    assert (results[0][3] - results[1][3]).abs().max() > 100 * TOLERANCE


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


class TestTheImplementation:
    def test_active_holds_in_its_own_thread_and_ends_also_after_an_error(self):
        """What a layer is given when it asks for its attention function; nothing of the model changes."""
        model = copy.deepcopy(tiny_target("llama"))
        before, own = copy.deepcopy(model.config), model.config._attn_implementation
        chosen = TreeAttention("eager", "", "eager", {}, model.config, [])
        stock = ALL_ATTENTION_FUNCTIONS[own]

        def asked() -> object:
            return ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, "its own eager one")

        assert own != "eager" and asked() is stock
        with chosen.active():
            assert asked() == "its own eager one"
            assert in_a_thread(asked) is stock
            assert model.config.to_dict() == before.to_dict() and model.config._attn_implementation == own
        assert asked() is stock
        with pytest.raises(RuntimeError, match="inside"):
            with chosen.active():
                raise RuntimeError("inside")
        assert asked() is stock

    def test_an_error_in_the_target_leaves_its_attention_as_it_was(self, monkeypatch, delegate):
        target = with_attention("llama", delegate.name)
        attention_for(target)  # a small tree is tried once
        stock = Target.verify

        def broken(self, tree):
            tree.tokens[0, 0] = VOCAB + 1  # an index error in the embedding, inside the forward
            return stock(self, tree)

        monkeypatch.setattr(Target, "verify", broken)
        with pytest.raises(IndexError):
            target.generate(prompt(), do_sample=False, max_new_tokens=8, assistant_model=tiny_assistant())
        assert target.config._attn_implementation == delegate.name

    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
    def test_another_implementation_prefills_and_the_cascade_verifies(self, family, delegate, monkeypatch):
        target, assistant = with_attention(family, delegate.name), tiny_assistant(4, 6)
        plain = target.generate(prompt(), do_sample=False, max_new_tokens=16)
        OracleDrafts(monkeypatch, plain[0], 0.7)
        attention_for(target)  # a small tree is tried once, beside plain text
        delegate.queries.clear()
        ours = target.generate(prompt(), do_sample=False, max_new_tokens=16, assistant_model=assistant)
        assert ours.tolist() == plain.tolist() == greedy(family)
        assert set(delegate.queries) == {prompt().shape[1]}, "it ran the prefill, and nothing else"
        assert assistant.attention_backend.startswith("cpu: ")
        assert target.config._attn_implementation == delegate.name

    def test_a_model_that_takes_no_other_function_is_verified_with_a_mask(self, monkeypatch):
        """Its own where that is one, else SDPA, else eager."""
        for family, expected in (("llama", "sdpa"), ("gpt_oss", "eager")):
            target, assistant = copy.deepcopy(tiny_target(family)), tiny_assistant(4, 6)
            monkeypatch.setattr(type(target.model), "_supports_attention_backend", False)
            ours = target.generate(prompt(), do_sample=False, max_new_tokens=16, assistant_model=assistant)
            assert ours.tolist() == greedy(family)
            assert assistant.attention_backend.startswith(f"{expected}: with a mask over all keys, since")

    def test_the_choice_is_logged_once(self, caplog, monkeypatch):
        choose.cache_clear()
        monkeypatch.setattr(attention.logger, "propagate", True)
        attention.logger.setLevel("INFO")
        try:
            for _ in range(3):
                tiny_target("qwen2").generate(prompt(), max_new_tokens=4, assistant_model=tiny_assistant(4, 6))
        finally:
            attention.logger.setLevel("WARNING")
        assert 1 <= len([r for r in caplog.records if "D²SD runs candidate trees with 'cpu'" in r.message]) <= 2


class Delegate:
    """An attention of another name; it records how many queries each call had."""

    name = "d2sd_tests_delegate"

    def __init__(self):
        self.queries, self.forward = [], sdpa_attention_forward

    def __call__(self, module, query, *args, **kwargs):
        self.queries.append(query.shape[2])
        return self.forward(module, query, *args, **kwargs)


@pytest.fixture
def delegate():
    delegate = Delegate()
    tf.AttentionInterface.register(delegate.name, delegate)
    AttentionMaskInterface.register(delegate.name, sdpa_mask)
    return delegate


def with_attention(family: str, implementation: str):
    target = copy.deepcopy(tiny_target(family))
    target.set_attn_implementation(implementation)
    return target


@functools.cache
def greedy(family: str):
    return tiny_target(family).generate(prompt(), do_sample=False, max_new_tokens=16).tolist()


# Plain steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_share_keys_read_them_together_and_see_the_same(shared, dtype, masked):
    module = SimpleNamespace(num_key_value_groups=6 // shared, training=False)
    query, key, value = (
        torch.randn(2, heads, size, 8, dtype=dtype) for heads, size in ((6, 1), (shared, 9), (shared, 9))
    )
    mask = torch.rand(2, 1, 1, 9) < 0.7 if masked else None
    given = dict(scaling=0.3, is_causal=False)
    stock = attention.stock_sdpa()(module, query, key, value, mask, **given)[0]
    ours = attention._attend_grouped(module, query, key, value, mask, **given)[0]
    assert ours.shape == stock.shape and ours.is_contiguous()
    torch.testing.assert_close(ours, stock, **(dict(atol=2e-2, rtol=2e-2) if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize(
    ("dtype", "own", "groups"), [("bfloat16", "sdpa", True), ("float32", "sdpa", False), ("bfloat16", "eager", False)]
)
def test_plain_steps_in_half_precision_group_their_queries(dtype, own, groups, monkeypatch):
    target = copy.deepcopy(tiny_target("llama")).to(getattr(torch, dtype))
    target.set_attn_implementation(own)
    assistant, heads = copy.deepcopy(tiny_assistant(4, 6)).to(target.dtype), []
    stock = torch.nn.functional.scaled_dot_product_attention

    def noting(query, key, *args, **kwargs):
        heads.append((query.shape[1:3], key.shape[1]))
        return stock(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    options = dict(do_sample=False, max_new_tokens=5, assistant_model=assistant, d2sd_tree_budget=1)
    target.generate(prompt(9), **options)
    shared, group = (
        target.config.num_key_value_heads,
        target.config.num_attention_heads // target.config.num_key_value_heads,
    )
    layers = target.config.num_hidden_layers
    assert group > 1 and heads.count(((shared, group), shared)) == (4 * layers if groups else 0)


def test_deterministic_algorithms_keep_to_stock_attention():
    target = copy.deepcopy(tiny_target("llama")).bfloat16()
    own = TreeAttention.for_model(target)
    entered = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            with own.active_for_one():
                entered.append(compat._running.implementation)
        finally:
            torch.use_deterministic_algorithms(False)
    assert entered == [attention.GROUPED, None]
