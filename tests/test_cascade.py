"""The cascade against a softmax over all keys by the rule, for every kind of attention of the tested families."""

import dataclasses
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from reference import PackedReference, brute_force, refuse_what_flash_attention_refuses
from test_attention import random_tree
from tiny import FAMILIES, prompt, tiny_assistant, tiny_target
from torch import nn

from hf_d2sd import attention
from hf_d2sd.attention import Nodes, TreePlan, cascade, merge, plan_layer
from hf_d2sd.cache import TreeLayer
from hf_d2sd.captured import FixedLayer
from hf_d2sd.kernels import CPU, KERNELS, Packing, Scoring, heads_first, small_attention, tokens_of
from hf_d2sd.tree import CandidateTree

TOLERANCE = 2e-6
TREES = 500


def stacked(trees: list[CandidateTree]) -> CandidateTree:
    """Trees of several sizes as one batch, with fillers."""
    size = max(map(len, trees))

    def column(name, filler):
        return torch.cat([nn.functional.pad(getattr(t, name), (0, size - len(t)), value=filler) for t in trees])

    filled = dict(tokens=0, parents=-1, depths=0, scores=0, ranks=0)
    return CandidateTree(*(column(name, filler) for name, filler in filled.items()))


def family_shape(family: str):
    """Heads, scale and sinks of a family's attention, as its own modules have them."""
    model = tiny_target(family)
    config = model.config.get_text_config()
    module = model.get_decoder().layers[0].self_attn
    sinks = getattr(module, "sinks", None)
    heads = config.num_attention_heads, config.num_key_value_heads
    return SimpleNamespace(
        heads=heads, scale=module.scaling, sinks=None if sinks is None else sinks.detach(), head_dim=8
    )


def ancestors(tree: CandidateTree, row: int, node: int) -> list[int]:
    found = []
    while node != -1:
        found.append(node)
        node = int(tree.parents[row, node])
    return found


def seen_by_rule(tree, row, length, slots, window) -> torch.Tensor:
    """(N, slots + N) bool: stored key i stands length - i before the anchor; ancestors; nearer than the window."""
    size = len(tree)
    seen = torch.zeros(size, slots + size, dtype=torch.bool)
    for node in range(size):
        depth = int(tree.depths[row, node])
        for key in range(length):
            seen[node, key] = window is None or length - key + depth < window
        for key in ancestors(tree, row, node):
            seen[node, slots + key] = window is None or depth - int(tree.depths[row, key]) < window
    return seen


def run(kernel, tree, lengths, window, shape, seed, fixed=False, corrupt=False):
    """What the cascade gives for random states, and what the rule gives; (B, N, H, D) both."""
    generator = torch.Generator().manual_seed(seed)
    rows, size, (heads, key_heads) = len(lengths), len(tree), shape.heads
    layer = TreeLayer(window)
    stored = [torch.randn(rows, key_heads, max(lengths), shape.head_dim, generator=generator) for _ in range(2)]
    layer.update(*stored)
    layer.set_lengths(lengths)
    if fixed:
        layer = fixed_layer(layer, 64, size)
    nodes = Nodes.of_tree(tree)
    segments = list(vars(nodes.segments()).values()) if kernel.packs else []
    plan = plan_layer(kernel, nodes, segments, layer.place(), layer, window, torch.float32)
    query = torch.randn(rows, heads, size, shape.head_dim, generator=generator)
    own = [torch.randn(rows, key_heads, size, shape.head_dim, generator=generator) for _ in range(2)]
    key, value = layer.update(*own)
    if corrupt:
        tree = corrupted(tree)
    got = cascade(
        query, key, value, plan.bounds, plan.few, plan.mask, plan.prefix, plan.segments, shape.sinks, kernel.name,
        shape.scale, 0.0, plan.longest, plan.deepest, plan.causal, plan.has_prefix, plan.limits,
    )  # fmt: skip
    expected = torch.stack(
        [
            brute_force(
                query[row],
                *(torch.cat([s[row], o[row]], dim=1) for s, o in zip(stored, own)),
                seen_by_rule(tree, row, lengths[row], max(lengths), window),
                shape.scale,
                shape.sinks,
            )
            for row in range(rows)
        ]
    )
    return got, expected.transpose(1, 2)


def fixed_layer(layer: TreeLayer, capacity: int, nodes: int) -> FixedLayer:
    """With sevens wherever nothing is stored: nobody must see them."""
    fixed = FixedLayer.of(layer, capacity, nodes)
    for buffer in fixed._buffers:
        buffer[:, :, layer.length :] = 7.0
    fixed.slots = torch.arange(capacity, capacity + nodes)
    return fixed


def corrupted(tree: CandidateTree) -> CandidateTree:
    """One node's parent is another of the same depth, so that only who sees whom changes."""
    parents = tree.parents.clone()
    for node in range(len(tree)):
        same = [n for n in range(node) if tree.depths[0, n] == tree.depths[0, node] - 1 and n != parents[0, node]]
        if same:
            parents[0, node] = same[0]
            return CandidateTree(tree.tokens, parents, tree.depths, tree.scores, tree.ranks)
    return None


@pytest.fixture
def kernels(packed):
    return {"cpu": CPU, "packed": packed}


@pytest.fixture(params=[0, attention.SHORT], ids=["in two parts", "in one where keys are few"])
def parts(request, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", request.param)


def cases(family: str):
    """TREES in all over the families: 1 to 3 rows, each of its own tree and length; windows and buffers in turn."""
    windows = itertools.cycle([None, 1, 2, 4, 9, 30, None])
    for at in range(TREES // len(FAMILIES)):
        seed = 1000 * FAMILIES.index(family) + at
        rng = random.Random(seed)
        rows = rng.choice([1, 1, 2, 3])
        tree = stacked([random_tree(seed + row, rng.randrange(1, 18)) for row in range(rows)])
        yield seed, tree, [rng.randrange(1, 40) for _ in range(rows)], next(windows), at % 3 == 0


@pytest.mark.parametrize("name", ["cpu", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_attention_over_all_keys_on_500_trees(family, name, kernels, parts):
    shape = family_shape(family)
    for seed, tree, lengths, window, fixed in cases(family):
        for sinks in {shape.sinks, None} if shape.sinks is not None else (None, torch.randn(shape.heads[0])):
            shape_of = SimpleNamespace(**{**vars(shape), "sinks": sinks})
            got, expected = run(kernels[name], tree, lengths, window, shape_of, seed, fixed)
            error = (got - expected).abs().max()
            assert error <= TOLERANCE, (seed, lengths, window, fixed, float(error))


@pytest.mark.parametrize("name", ["cpu", "packed"])
def test_another_tree_gives_another_result(name, kernels, parts):
    """The control of the test above: its tolerance tells trees apart that differ in one parent."""
    found = 0
    for seed in range(100):
        tree = random_tree(seed, 12)
        if corrupted(tree) is None:
            continue
        got, expected = run(kernels[name], tree, [9], None, family_shape("llama"), seed, corrupt=True)
        assert (got - expected).abs().max() > 1000 * TOLERANCE
        found += 1
    assert found > 50


@pytest.mark.parametrize("name", ["cpu", "packed"])
def test_half_precision_is_as_near_as_half_precision_is(name, kernels, parts):
    torch.manual_seed(0)
    tree, layer = random_tree(3, 12), TreeLayer()
    layer.update(*(torch.randn(1, 2, 30, 8).bfloat16() for _ in range(2)))
    nodes = Nodes.of_tree(tree)
    kernel = kernels[name]
    segments = list(vars(nodes.segments()).values()) if kernel.packs else []
    plan = plan_layer(kernel, nodes, segments, layer.place(), layer, None, torch.bfloat16)
    query = torch.randn(1, 4, 12, 8).bfloat16()
    key, value = layer.update(*(torch.randn(1, 2, 12, 8).bfloat16() for _ in range(2)))
    got = cascade(query, key, value, plan.bounds, plan.few, plan.mask, plan.prefix, plan.segments, None, name,
                  8**-0.5, 0.0, plan.longest, plan.deepest, plan.causal, plan.has_prefix, plan.limits)  # fmt: skip
    assert got.dtype == torch.bfloat16
    expected = brute_force(query[0], key[0], value[0], seen_by_rule(tree, 0, 30, 30, None), 8**-0.5)
    assert (got[0].transpose(0, 1) - expected).abs().max() < 0.02


def test_merging_two_halves_is_attention_over_both():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    mask = torch.zeros(2, 1, 5, 11)
    whole, lse = small_attention(query, key, value, mask, Scoring(0.3))
    parts = [
        small_attention(query, key[:, :, some], value[:, :, some], mask[..., some], Scoring(0.3))
        for some in (slice(4), slice(4, None))
    ]
    out, merged = merge(*parts[0], *parts[1])
    torch.testing.assert_close(out, whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(merged, lse, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_small_attention_follows_the_rule_with_soft_capping(softcap):
    torch.manual_seed(0)
    query, key, value = 3 * torch.randn(1, 4, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    seen = torch.rand(5, 7) < 0.6
    seen[:, 0] = True
    mask = torch.zeros(5, 7).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    out, _ = small_attention(query, key, value, mask, Scoring(0.5, softcap))
    expected = brute_force(query[0], key[0], value[0], seen, 0.5, softcap=softcap)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_the_lse_is_read_in_either_layout_with_or_without_filling():
    lse = torch.randn(3, 5)
    for given in (lse, lse.T, nn.functional.pad(lse, (0, 4))):
        assert torch.equal(heads_first(given, 5, 3), lse)


def test_packed_tokens_of_a_buffer_with_heads_side_by_side_are_a_view():
    buffer = torch.randn(2, 9, 3, 4)  # (B, slots, H, D), as on a GPU
    handed_out = buffer.transpose(1, 2)[:, :, 2:7]
    tokens = tokens_of(handed_out)
    assert tokens.data_ptr() == handed_out.data_ptr()
    for row in range(2):
        assert torch.equal(tokens[9 * row : 9 * row + 5], buffer[row, 2:7])


def test_the_compiled_operator_is_registered_soundly(parts):
    tree, layer = random_tree(1, 7), TreeLayer()
    layer.update(torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8))
    plan = plan_layer(CPU, Nodes.of_tree(tree), [], layer.place(), layer, None, torch.float32)
    key, value = layer.update(torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8))
    arguments = (torch.randn(1, 4, 7, 8), key, value, plan.bounds, None, plan.mask, [], [], torch.randn(4), "cpu",
                 0.3, 0.0, plan.longest, plan.deepest, True, plan.has_prefix)  # fmt: skip
    torch.library.opcheck(attention._cascade_op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(attention._cascade_op(*arguments), cascade(*arguments))


def test_nothing_as_large_as_nodes_times_context_is_made(monkeypatch):
    """Every tensor that the plan of a pass holds is the same size at 100 and at 3,000 tokens of context."""

    monkeypatch.setattr(attention, "SHORT", 0)

    def sizes(context, window):
        layer = TreeLayer(window)
        layer.update(torch.randn(1, 2, context, 8), torch.randn(1, 2, context, 8))
        nodes = Nodes.of_tree(random_tree(0, 16))
        found = []
        for kernel in (CPU, PackedReference()):
            segments = list(vars(nodes.segments()).values())
            plan = plan_layer(kernel, nodes, segments, layer.place(), layer, window, torch.float32)
            found += [value.numel() for value in vars(plan).values() if torch.is_tensor(value)]
        return found

    for window in (None, 50):
        assert sizes(100, window) == sizes(3000, window)


def test_a_plan_is_copied_once_to_each_other_device():
    layer = TreeLayer()
    layer.update(torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8))
    nodes = Nodes.of_tree(random_tree(0, 5))
    plan = plan_layer(CPU, nodes, [], layer.place(), layer, None, torch.float32)
    plans = TreePlan(CPU, ["full_attention"] * 3, {"full_attention": plan})
    assert plans.of_layer(2, torch.device("cpu")) is plan
    moved = plans.of_layer(0, torch.device("meta"))
    assert moved.mask.device.type == "meta"
    assert plans.of_layer(1, torch.device("meta")) is moved


def test_every_backend_says_why_it_cannot_run():
    facts = attention.Facts.of(tiny_target("llama"))
    for name, kernel in KERNELS.items():
        assert (kernel.obstacle(facts) is None) == (name in ("cpu", "masked"))


class TestWhatFlashAttentionRefuses:
    """A stand-in that took more than the kernel does let a fault through; these would have found it on a CPU."""

    def arguments(self, queries=3, heads=4, **changes):
        q, k, v = torch.randn(queries, heads, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
        query_starts = torch.tensor([0, queries, queries], dtype=torch.int32)
        packing = Packing(query_starts, torch.tensor([0, 5, 9], dtype=torch.int32), queries, 5)
        given = dict(q=q, k=k, v=v, packing=packing) | changes
        return given["q"], given["k"], given["v"], given["packing"]

    def test_one_query_where_a_segment_has_none(self):
        refuse_what_flash_attention_refuses(*self.arguments(queries=3))
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            refuse_what_flash_attention_refuses(*self.arguments(queries=1))
        refuse_what_flash_attention_refuses(*self.arguments(queries=1, heads=2))  # nothing to fold

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(k=torch.randn(9, 2, 8).half()), "dtype"),
            (dict(q=torch.randn(3, 8, 4).transpose(1, 2)), "contiguous last"),
            (dict(q=torch.randn(3, 4, 12), k=torch.randn(9, 2, 12), v=torch.randn(9, 2, 12)), "multiple of 8"),
            (dict(q=torch.randn(3, 5, 8)), "must divide"),
        ],
    )
    def test_what_else_it_does_not_take(self, change, message):
        with pytest.raises(RuntimeError, match=message):
            refuse_what_flash_attention_refuses(*self.arguments(**change))

    @pytest.mark.parametrize("starts", [torch.tensor([0, 3, 3]), torch.tensor([0, 3], dtype=torch.int32)])
    def test_starts_of_another_kind(self, starts):
        q, k, v, packing = self.arguments()
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            refuse_what_flash_attention_refuses(q, k, v, dataclasses.replace(packing, query_starts=starts))

    @pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral"])
    def test_trees_of_one_node_and_chains_of_one_are_taken(self, family, packed, monkeypatch):
        """Plain steps, and the last cycle of every call: one query in a row, and segments without any."""
        target, options = tiny_target(family), dict(do_sample=False, max_new_tokens=12)
        plain = target.generate(prompt(9), **options)
        for shape in (dict(d2sd_tree_budget=1), dict(d2sd_tree_budget=2), {}):
            shape |= dict(d2sd_attention_backend="packed", assistant_model=tiny_assistant(4, 6))
            assert target.generate(prompt(9), **options, **shape).tolist() == plain.tolist()


@pytest.mark.parametrize("named", [True, False], ids=["torch 2.13", "torch 2.10"])
def test_torchs_packed_call_is_asked_for_groups_only_where_it_can_be(named, monkeypatch):
    """torch 2.10 and 2.11 group queries without being asked, and have no word for it."""
    varlen, seen = pytest.importorskip("torch.nn.attention.varlen"), []

    def attend(q, k, v, *positional, return_aux, scale, window_size, **options):
        seen.append(options)
        return torch.zeros_like(q), torch.zeros(q.shape[1], len(q))

    def with_groups(q, k, v, *positional, enable_gqa=False, **options):
        return attend(q, k, v, *positional, enable_gqa=enable_gqa, **options)

    def without_groups(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=None):
        return attend(q, k, v, return_aux=return_aux, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", with_groups if named else without_groups)
    q, k, v, packing = TestWhatFlashAttentionRefuses().arguments()
    out, lse = KERNELS["varlen"].varlen(q, k, v, packing, Scoring(0.3))
    assert out.shape == q.shape and lse.shape == (4, 3)
    assert seen == [dict(enable_gqa=True) if named else {}]
