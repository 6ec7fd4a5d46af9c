"""The kernels of a GPU, by stand-ins that refuse what they refuse: right on trees, chosen by measurement, cheap."""

import functools

import pytest
import torch
import transformers as tf
from operators import Operators, of_a_layer
from reference import dense_flash, efficient, flash_cache_kernel, torch_kernel, with_kvcache_2, with_kvcache_3
from test_attention import random_tree
from test_cascade import TOLERANCE, cases, family_shape, run
from tiny import _SIZES, prompt, tiny_assistant, tiny_target

from hf_d2sd import attention, kernels
from hf_d2sd.attention import choose, most_at_once
from hf_d2sd.cache import TreeCache, TreeLayer
from hf_d2sd.captured import FixedLayer
from hf_d2sd.kernels import CPU, KERNELS, Facts, Prefix, Scoring, Ways, bias, fastest, takes
from hf_d2sd.target import Target
from hf_d2sd.tree import CandidateTree

SPLIT = ["torch", "flash_attention_2", "flash_attention_3"]
FEW = 10**6  # more keys than any test has


@pytest.fixture(params=[0, FEW], ids=["in two parts", "in one where keys are few"])
def parts(request, monkeypatch):
    for name in ("SHORT_LAUNCHED", "SHORT_REPLAYED"):
        monkeypatch.setattr(attention, name, request.param)


@pytest.fixture
def in_two_parts(monkeypatch):
    for name in ("SHORT", "SHORT_LAUNCHED", "SHORT_REPLAYED"):
        monkeypatch.setattr(attention, name, 0)


class TestTheCascade:
    @pytest.mark.parametrize("name", SPLIT)
    @pytest.mark.parametrize("family", ["llama", "gpt_oss"])
    def test_equals_attention_over_all_keys(self, family, name, as_on_a_gpu, parts):
        """Rows of several lengths, windows, sinks, buffers that grow and fixed ones."""
        shape, ways = family_shape(family), set()
        for seed, tree, lengths, window, fixed in cases(family):
            got, expected = run(KERNELS[name], tree, lengths, window, shape, seed, fixed)
            assert (got - expected).abs().max() <= TOLERANCE, (seed, lengths, window, fixed)
        ways = set(KERNELS[name].ways.known.values())
        assert ways <= {"dense", "kvcache", "packed"}

    @pytest.mark.parametrize("slowest", ["dense", "kvcache", "packed"])
    def test_whichever_way_is_the_fastest(self, slowest, as_on_a_gpu, in_two_parts):
        """Each way of each backend is taken where it is the fastest; all give the same."""
        for kernel in (flash_cache_kernel("flash_attention_2", with_kvcache_2), torch_kernel(as_on_a_gpu["packed"])):
            taken = set()
            kernel.ways = _Slower(slowest, taken)
            KERNELS[kernel.name] = kernel
            for seed, tree, lengths, window, fixed in list(cases("llama"))[:20]:
                got, expected = run(kernel, tree, lengths, window, family_shape("llama"), seed, fixed)
                assert (got - expected).abs().max() <= TOLERANCE
            assert taken and slowest not in taken

    def test_without_a_packed_call_rows_of_several_lengths_are_masked(self, as_on_a_gpu, in_two_parts):
        kernel = KERNELS["torch"] = torch_kernel()
        for seed, tree, lengths, window, fixed in list(cases("llama"))[:20]:
            got, expected = run(kernel, tree, lengths, window, family_shape("llama"), seed, fixed)
            assert (got - expected).abs().max() <= TOLERANCE

    @pytest.mark.parametrize("name", SPLIT)
    def test_a_row_without_stored_keys_sees_its_own_alone(self, name, as_on_a_gpu, in_two_parts):
        """Kernels leave an infinite log-sum-exp where there is no key: it must weigh nothing."""
        tree = CandidateTree(*(torch.cat([getattr(random_tree(1, 5), field)] * 2) for field in _FIELDS))
        got, expected = run(KERNELS[name], tree, [0, 7], None, family_shape("llama"), 0)
        assert (got - expected).abs().max() <= TOLERANCE

    @pytest.mark.parametrize("name", [*SPLIT, "packed"])
    def test_half_precision_is_as_near_with_a_long_prefix_and_large_own_values(self, name, as_on_a_gpu, in_two_parts):
        """Where the prefix outweighs the nodes, what little they add must not be lost to rounding."""
        torch.manual_seed(0)
        layer, tree = TreeLayer(), random_tree(3, 12)
        stored, own = (torch.randn(1, 2, count, 8).bfloat16() for count in (2000, 12))
        layer.update(stored, stored)
        nodes = attention.Nodes.of_tree(tree)
        segments = list(vars(nodes.segments()).values())
        plan = attention.plan_layer(KERNELS[name], nodes, segments, layer.place(), layer, None, torch.bfloat16)
        query = torch.randn(1, 4, 12, 8).bfloat16()
        key, value = layer.update(own, 8 * own)
        got = attention.cascade(
            query, key, value, plan.bounds, plan.few, plan.mask, plan.prefix, plan.segments, None, name, 8**-0.5,
            0.0, plan.longest, plan.deepest, plan.causal, plan.has_prefix, plan.limits,
        )  # fmt: skip
        seen = torch.cat([torch.ones(12, 2000, dtype=torch.bool), nodes.visible[0]], dim=1)
        keys, values = (states.repeat_interleave(2, 1).double() for states in (key, value))
        scores = (query.double() @ keys.transpose(2, 3) * 8**-0.5).masked_fill(~seen, -torch.inf)
        expected = (scores.softmax(-1) @ values).transpose(1, 2)
        assert (got - expected).abs().max() < 2**-7 * expected.abs().max()


_FIELDS = ("tokens", "parents", "depths", "scores", "ranks")


class _Slower(Ways):
    """By its timer one way takes longer than the others; notes what is taken where there is a choice."""

    def __init__(self, slowest: str, taken: set):
        super().__init__(measure=lambda run: (run(), run.slow)[1])
        self.slowest, self.taken = slowest, taken

    def run(self, shape, candidates):
        def noted(name):
            def call():
                self.latest = name
                return candidates[name]()

            call.slow = float(name == self.slowest)
            return call

        result = super().run(shape, {name: noted(name) for name in candidates})
        self.taken |= {self.latest} if len(candidates) > 1 else set()
        return result


class TestTheChoice:
    def test_the_fastest_is_taken_and_measured_once_for_a_shape(self):
        measured = []

        def timer(run):
            measured.append(run())
            return {"a": 3.0, "b": 1.0, "c": 2.0}[measured[-1]]

        ways, candidates = Ways(timer), {name: lambda name=name: name for name in "abc"}
        assert [ways.run((1,), candidates) for _ in range(3)] == ["b"] * 3
        assert measured == ["a", "b", "c"]
        assert ways.run((2,), candidates) == "b" and len(measured) == 6
        assert str(ways) == "b"

    def test_one_way_is_not_measured(self):
        assert Ways(lambda run: 1 / 0).run((1,), {"only": lambda: "it"}) == "it"

    def test_what_does_not_run_is_left_out_aloud(self, caplog, monkeypatch):
        monkeypatch.setattr(kernels.logger, "propagate", True)

        def broken():
            raise RuntimeError("no kernel image is available")

        assert fastest({"new": broken, "old": lambda: 1}, lambda run: (run(), 1.0)[1]) == "old"
        assert "'new'" in caplog.text and "no kernel image" in caplog.text
        with pytest.raises(RuntimeError, match="None of new runs here"):
            fastest({"new": broken}, lambda run: (run(), 1.0)[1])

    def test_while_a_graph_is_captured_nothing_is_measured(self, monkeypatch):
        monkeypatch.setattr(kernels, "_is_capturing", lambda: True)
        ways = Ways(lambda run: 1 / 0)
        assert ways.run((1,), {"first": lambda: 1, "second": lambda: 2}) == 1
        assert ways.known == {}, "it is measured when it can be"

    def test_where_it_switches_is_reported(self):
        assistant = tiny_assistant(4, 6)
        tiny_target("llama").generate(prompt(), assistant_model=assistant, max_new_tokens=4)
        assert assistant.attention_backend.endswith("; up to 512 keys in one call with a mask")

    def test_what_was_taken_is_reported(self, as_on_a_gpu, in_two_parts):
        target, assistant = tiny_target("llama"), tiny_assistant(4, 6)
        options = dict(do_sample=False, max_new_tokens=12, d2sd_attention_backend="flash_attention_2")
        target.generate(prompt(), assistant_model=assistant, **options)
        assert assistant.attention_backend.startswith("flash_attention_2: asked for by d2sd_attention_backend; ")
        assert assistant.attention_backend.endswith("the prefix by kvcache, by measurement")


@pytest.fixture
def facts_of_a_gpu(monkeypatch):
    """A half-precision model on a GPU with every package, as far as facts go."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    choose.cache_clear()
    yield Facts(torch.device("cuda"), frozenset({"cuda"}), torch.bfloat16, 128, None, "sdpa", True, None)
    choose.cache_clear()


class TestTheOrder:
    def test_packages_that_split_the_prefix_come_first_and_need_not_be_there(self, facts_of_a_gpu, monkeypatch):
        assert choose(facts_of_a_gpu, None)[0] == "torch"  # no package is installed here
        for name in ("flash_attention_2", "flash_attention_3"):
            monkeypatch.setitem(vars(KERNELS[name].packed), "_call", (print, "return_attn_probs"))
            choose.cache_clear()
            assert choose(facts_of_a_gpu, None)[0] == name

    def test_soft_capping_goes_to_a_package_or_to_a_mask(self, facts_of_a_gpu, monkeypatch):
        facts = Facts(**{**vars(facts_of_a_gpu), "softcap": 50.0, "own_implementation": "eager"})
        assert choose(facts, None)[0] == "eager"
        monkeypatch.setitem(vars(KERNELS["flash_attention_2"].packed), "_call", (print, "return_attn_probs"))
        choose.cache_clear()
        assert choose(facts, None)[0] == "flash_attention_2"

    def test_forced_backends_stay_forced(self, facts_of_a_gpu):
        for name in ("varlen", "torch"):
            assert choose(facts_of_a_gpu, name)[0] == name
        with pytest.raises(ValueError, match="does not load"):
            choose(facts_of_a_gpu, "flash_attention_2")

    def test_few_keys_are_attended_to_at_once_where_launches_cost(self, as_on_a_gpu):
        """On an H100 a mask over 1,024 keys took 47 ms where a cascade took 72: the host launches. A graph replays."""
        eager, fixed = TreeLayer(), FixedLayer()
        for name in SPLIT:
            assert [most_at_once(KERNELS[name], eager, rows) for rows in (1, 8)] == [4096, 512]
            assert [most_at_once(KERNELS[name], fixed, rows) for rows in (1, 8)] == [1024, 128]
        assert most_at_once(as_on_a_gpu["packed"], eager, 1) == 0, "the packed cascade stays one"
        assert most_at_once(CPU, eager, 1) == most_at_once(CPU, fixed, 8) == 512

    @pytest.mark.parametrize(("context", "called"), [(100, ["efficient"]), (5000, ["efficient", "flash"])])
    def test_the_switch_is_by_the_context_of_each_pass(self, context, called, as_on_a_gpu):
        target, tree = prefilled(2, "torch", context=context), random_tree(0, 16)
        with torch.no_grad():
            target.verify(tree)  # measures
            target.cache.set_lengths([context])
        with Operators() as counted, torch.no_grad():
            target.verify(tree)
        assert [name for name in ("efficient", "flash") if counted.calls[name]] == called
        assert all(counted.calls[name] == 2 for name in called), "once a layer"


# What a pass asks of the device --------------------------------------------------------------------------------------


@functools.cache
def model_of(layers: int, window: int | None = None):
    torch.manual_seed(0)
    sizes = {**_SIZES, "num_hidden_layers": layers}
    if window is not None:
        return tf.MistralForCausalLM(tf.MistralConfig(**sizes, sliding_window=window)).eval().bfloat16()
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval().bfloat16()


def prefilled(layers: int, backend: str, context: int = 60, rows: int = 1, window: int | None = None) -> Target:
    model = model_of(layers, window)
    target = Target(model, TreeCache(model.config), {0}, rows, backend=backend)
    states = torch.randn(rows, 2, context + 200, 8, dtype=torch.bfloat16)  # so many slots that none are added
    for layer in target.cache.layers:
        layer.update(states, states)
    target.cache.set_lengths([context] * rows)
    target.positions = [context] * rows
    return target


def tree_of(rows: int) -> CandidateTree:
    trees = [random_tree(seed, 16) for seed in range(rows)]
    fields = (torch.cat([getattr(tree, name) for tree in trees]) for name in _FIELDS)
    return CandidateTree(*fields, max_depth=15, max_chains=16)


@functools.cache
def plain_layer() -> int:
    """Operators of a layer in a plain step by Transformers, over its own cache: appending and attending are three."""
    caches = {}
    for layers in (2, 4):
        caches[layers] = tf.DynamicCache(config=model_of(layers).config)
        with torch.no_grad():
            model_of(layers)(prompt(60), **{attention_cache_name(): caches[layers]})

    @torch.no_grad()
    def step(layers):
        model_of(layers)(prompt(1), **{attention_cache_name(): caches[layers]})

    return int(of_a_layer(step).total())


def attention_cache_name() -> str:
    from hf_d2sd.modeling import CACHE_NAME

    return CACHE_NAME


def extra_of_a_layer(backend: str, **shape) -> float:
    targets = {layers: prefilled(layers, backend, **shape) for layers in (2, 4)}
    tree = tree_of(shape.get("rows", 1))

    @torch.no_grad()
    def verify(layers):
        targets[layers].verify(tree)

    for layers in targets:
        verify(layers)  # whatever is measured or made once
        targets[layers].cache.set_lengths([shape.get("context", 60)] * shape.get("rows", 1))
    return of_a_layer(verify).total() - plain_layer()


class TestOperatorsOfALayer:
    """Beside Transformers' own plain step. On a GPU each is a launch, of 5 to 35 µs of the host's time."""

    @pytest.mark.parametrize("name", SPLIT)
    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_cascade_adds_five(self, name, rows, as_on_a_gpu, in_two_parts):
        """Heads repeated for nodes' keys and values, a second attention, three to merge, and one write less."""
        assert extra_of_a_layer(name, rows=rows) == 5

    @pytest.mark.parametrize("name", SPLIT)
    def test_a_mask_over_few_keys_adds_one(self, name, as_on_a_gpu):
        assert extra_of_a_layer(name) == 1

    @pytest.mark.parametrize("name", SPLIT)
    def test_a_window_adds_no_more_than_the_cascade(self, name, as_on_a_gpu, in_two_parts):
        assert extra_of_a_layer(name, window=40) == 5

    def test_the_packed_cascade_adds_seven(self, as_on_a_gpu):
        assert extra_of_a_layer("packed") == 7

    def test_on_a_cpu_one_call_less_than_plain_or_three_more(self, in_two_parts, monkeypatch):
        assert extra_of_a_layer("cpu") == 3
        monkeypatch.setattr(attention, "SHORT", 512)
        assert extra_of_a_layer("cpu") == -1

    @pytest.mark.parametrize("name", [*SPLIT, "packed", "cpu"])
    def test_no_layer_makes_a_tensor_of_host_values(self, name, as_on_a_gpu, in_two_parts):
        targets = {layers: prefilled(layers, name) for layers in (2, 4)}
        made = []
        for target in targets.values():
            with torch.no_grad(), Operators() as counted:
                target.verify(tree_of(1))
            made.append(counted.from_host)
        assert made[0] == made[1]

    def test_keeping_a_path_takes_three(self):
        targets = {layers: prefilled(layers, "cpu") for layers in (2, 4)}
        steps = {layers: targets[layers].verify(tree_of(1)) for layers in targets}
        path = torch.tensor([[0, 1, 3]])
        assert of_a_layer(lambda layers: targets[layers].commit(steps[layers], path, [3])).total() == 3


class TestOperatorsOfACycle:
    def per_cycle(self, rows: int) -> tuple[float, float]:
        """Operators, and tensors of host values, of one cycle of a call."""
        target, assistant, found = tiny_target("llama"), tiny_assistant(8, 10), []
        for tokens in (6, 26):
            options = dict(do_sample=False, max_new_tokens=tokens, assistant_model=assistant)
            with Operators() as counted:
                target.generate(prompt().expand(rows, -1), **options)
            found.append((counted.total, counted.from_host, assistant.last_stats.cycles // rows))
        few, many = found
        return tuple((many[at] - few[at]) / (many[2] - few[2]) for at in (0, 1))

    def test_of_one_row_one_tensor_comes_from_the_host(self):
        """The accepted path, which the host walks; lengths, positions and rooms are made on the device."""
        operators, from_host = self.per_cycle(rows=1)
        assert from_host <= 1.2
        assert operators <= 600, "four layers of the target, two times two of the drafters, and what is between"

    def test_of_a_batch_no_layer_makes_one(self):
        """What rows of one length need is made on the device; of several lengths once for all layers."""
        assert self.per_cycle(rows=3)[1] <= 3 + 1.2


# What the stand-ins refuse -------------------------------------------------------------------------------------------


class TestWhatTheKernelsRefuse:
    """A stand-in that takes more than its kernel hides faults."""

    def states(self, **shape):
        rows, slots, heads, width = (shape.get(name, size) for name, size in zip("bshd", (2, 9, 2, 8)))
        return torch.randn(rows, slots, heads, width)

    @pytest.mark.parametrize("call", [with_kvcache_2, with_kvcache_3])
    def test_the_call_for_a_cache(self, call):
        q, k, lengths = torch.randn(2, 3, 4, 8), self.states(), torch.tensor([4, 9], dtype=torch.int32)
        options = dict(softmax_scale=0.3, return_softmax_lse=True)
        out, lse, *_ = call(q, k, k, cache_seqlens=lengths, **options)
        assert (out.shape, lse.shape) == (q.shape, (2, 4, 3))
        refused = [
            ((q, k, k.half()), {}, "dtype"),
            ((q.transpose(2, 3), k, k), {}, "contiguous last"),
            ((torch.randn(2, 3, 3, 8), k, k), {}, "must divide"),
            ((q, k, k), dict(cache_seqlens=lengths.long()), "int32"),
            ((q, k, k), dict(cache_leftpad=torch.zeros(4, dtype=torch.int32)[::2]), "contiguous"),
            ((q, k, k), dict(cache_seqlens=lengths[:1]), "shape"),
            ((torch.randn(2, 3, 4, 12), self.states(d=12), self.states(d=12)), {}, "multiple of 8"),
            ((q[:1], k, k), {}, "batch_size"),
        ]
        for states, more, message in refused:
            with pytest.raises(RuntimeError, match=message):
                call(*states, **options, **more)

    def test_torchs_flash_attention(self):
        q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8)
        assert dense_flash(q, k, k, 0.0, False, False, scale=0.3)[0].shape == q.shape
        for states, message in (((q, k, k.half()), "dtype"), ((q[:, :3], k, k), "must divide")):
            with pytest.raises(RuntimeError, match=message):
                dense_flash(*states, scale=0.3)

    def test_memory_efficient_attention(self):
        q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 4, 9, 8)
        mask = bias(torch.zeros(1, 1, 3, 9), torch.float32).expand(1, 4, 3, 9)
        out, lse, *_ = efficient(q, k, k, mask, True, scale=0.3)
        assert out.shape == q.shape and lse.shape == (1, 4, 32)
        refused = [
            ((q, k[:, :2], k[:, :2], mask), "group"),
            ((q, k, k, torch.zeros(1, 4, 3, 9)), "aligned"),
            ((q, k, k, mask.half()), "dtype"),
            ((q, k, k, mask[..., :8]), "shape"),
        ]
        for states, message in refused:
            with pytest.raises(RuntimeError, match=message):
                efficient(*states, True, scale=0.3)

    def test_a_version_that_cannot_skip_first_keys_leaves_windows_to_the_packed_call(self, as_on_a_gpu):
        def old(q, k_cache, v_cache, cache_seqlens=None, softmax_scale=None, causal=False, return_softmax_lse=False):
            raise AssertionError("it was called")

        assert not takes(old, "cache_leftpad") and takes(with_kvcache_3, "cache_leftpad")
        kernel = flash_cache_kernel("old", old)
        query, states = torch.randn(2, 4, 3, 8), torch.randn(2, 9, 2, 8).transpose(1, 2)
        bounds = torch.tensor([[2, 5], [0, 9]])
        starts = [torch.tensor(values, dtype=torch.int32) for values in ([0, 0, 3, 3, 6], [0, 2, 5, 9, 18])]
        prefix = Prefix(bounds, [], 9, *starts, *bounds.T.int().contiguous())
        assert list(kernel.prefix_ways(query, states, states, prefix, Scoring(0.3))) == ["packed"]
        known = Prefix(bounds, [2, 5], 9, *starts)
        assert list(kernel.prefix_ways(query, states, states, known, Scoring(0.3))) == ["kvcache", "packed"]
        kernel.over_prefix(query, states, states, prefix, Scoring(0.3))


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mistral"])
def test_texts_are_plain_generates(family, name, as_on_a_gpu, parts):
    target, options = tiny_target(family), dict(do_sample=False, max_new_tokens=12)
    plain = target.generate(prompt(9), **options)
    for shape in (dict(d2sd_tree_budget=1), dict(d2sd_tree_budget=2), {}):
        shape |= dict(d2sd_attention_backend=name, assistant_model=tiny_assistant(4, 6))
        assert target.generate(prompt(9), **options, **shape).tolist() == plain.tolist()


class TestQueriesThatShareKeysOnACpu:
    """Few queries of heads that share keys go to torch's kernel as one head's; nothing else changes."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("rows", "nodes", "keys"), [(1, 4, 200), (3, 1, 60), (3, 7, 60), (2, 11, 300)])
    @pytest.mark.parametrize("masked", [True, False])
    def test_outputs_and_lse_are_those_of_one_head_at_a_time(self, dtype, rows, nodes, keys, masked, monkeypatch):
        query = torch.randn(rows, nodes, 6, 16, dtype=dtype).transpose(1, 2)
        key, value = torch.randn(2, rows, 2, keys + 9, 16, dtype=dtype)[:, :, :, :keys]
        hidden = torch.rand(rows, 1, nodes, keys) < 0.3
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min) if masked else None
        shapes, stock = [], kernels._cpu_kernel

        def noting(query, *args, **kwargs):
            shapes.append(query.shape)
            return stock(query, *args, **kwargs)

        monkeypatch.setattr(kernels, "_cpu_kernel", noting)
        out, lse = kernels._grouped_on_cpu(query, key, value, 0.25, mask)
        groups = nodes > 1 if dtype == torch.float32 else True
        assert shapes == [(rows, 2, 3 * nodes, 16) if groups and 3 * nodes <= 32 else (rows, 6, nodes, 16)]
        wide = kernels.repeated(key, 3).float(), kernels.repeated(value, 3).float()
        scores = query.float() @ wide[0].transpose(2, 3) * 0.25
        scores = scores if mask is None else scores + mask.float()
        tolerance = dict(atol=2e-2, rtol=2e-2) if dtype == torch.bfloat16 else dict(atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.float(), scores.softmax(-1) @ wide[1], **tolerance)
        torch.testing.assert_close(lse.float(), scores.logsumexp(-1), **tolerance)
        assert out.shape == query.shape
