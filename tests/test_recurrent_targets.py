"""Targets with recurrent states: what they write is what they write alone, and no attention cache is copied."""

import copy
import json
import threading

import layouts
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from recurrent import FAMILIES, forget, recurrent_target
from test_batch import mostly_right, pad, prompts
from test_threads import state_of
from tiny import LAYERS, OracleDrafts, prompt, tiny_assistant, tiny_target
from transformers import DynamicCache, RwkvConfig, RwkvForCausalLM, StoppingCriteria, StoppingCriteriaList

from hf_d2sd import D2SDAssistant, attention
from hf_d2sd.cache import TreeCache, keep_prefix
from hf_d2sd.compat import own_cache_class, states_of
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.recurrent import Chains
from hf_d2sd.target import Target
from hf_d2sd.tree import CandidateTree

NEW = 24
CLOSE = dict(rtol=1e-3, atol=1e-3)


def here(*families) -> list[str]:
    """Those of the families that this release of Transformers lets decode."""
    return [family for family in families if family in FAMILIES]


def generate(family, inputs, **options):
    settings = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, **options}
    if "assistant_model" not in options:
        forget(recurrent_target(family))
    return recurrent_target(family).generate(**inputs, **settings)


def continuation(family, row, **options) -> list[int]:
    return generate(family, {"input_ids": row[None]}, **options)[0, len(row) :].tolist()


def check_text(family, rows, branches, width, monkeypatch, seed=0, **options):
    """Of `rows` ragged prompts, with drafts that are often right."""
    texts = prompts(rows, seed=10 * seed + branches)
    inputs = pad(texts)
    plain = {name: value for name, value in options.items() if not name.startswith("d2sd")}
    length = inputs["input_ids"].shape[1]
    if family == "minimax":  # padded batches of its own see the padding that is cached
        truths = [continuation(family, text, **plain) for text in texts]
    else:
        truths = generate(family, inputs, **plain)[:, length:].tolist()
    mostly_right(monkeypatch, truths, [len(text) for text in texts])
    pair = tiny_assistant(4, 6)
    tree = dict(d2sd_num_branches=branches, d2sd_tree_width=width, d2sd_tree_budget=24)
    out = generate(family, inputs, assistant_model=pair, **tree, **options)
    assert out[:, length:].tolist() == truths
    assert pair.last_stats.mean_acceptance_length > 1.5
    return pair.last_stats


@pytest.mark.parametrize("rows", (1, 5))
@pytest.mark.parametrize("width", (1, 4))
@pytest.mark.parametrize("branches", (0, 1, 4))
@pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1"))
def test_greedy_text_is_the_targets(family, branches, width, rows, monkeypatch):
    check_text(family, rows, branches, width, monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_every_family_is_the_targets(family, monkeypatch):
    check_text(family, 3, 4, 1, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("rows, seed", [(1, seed) for seed in range(20)] + [(5, seed) for seed in range(4)])
@pytest.mark.parametrize("width", (1, 4))
@pytest.mark.parametrize("branches", (0, 1, 4))
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_every_family_whatever_the_tree_and_the_batch(family, branches, width, rows, seed, monkeypatch):
    check_text(family, rows, branches, width, monkeypatch, seed)


@pytest.mark.parametrize("family", here("qwen3_next", "mamba2", "jamba"))
def test_rows_that_end_leave_and_take_their_states_along(family, monkeypatch):
    rows = prompts(5, seed=3)
    whole = [continuation(family, row) for row in rows]
    eos = max(range(2, 24), key=lambda token: min(sum(token in row for row in whole), 4))
    check_text(family, 5, 3, 1, monkeypatch, eos_token_id=eos)


@pytest.mark.parametrize("family", here("qwen3_5", "falcon_h1", "mamba2"))
def test_a_seed_draws_the_same_text(family, monkeypatch):
    inputs = {"input_ids": prompt()}
    sampling = dict(do_sample=True, temperature=0.8, top_k=12)
    torch.manual_seed(5)
    expected = generate(family, inputs, **sampling)
    OracleDrafts(monkeypatch, expected[0], 0.8)
    torch.manual_seed(5)
    pair = tiny_assistant(4, 6)
    out = generate(family, inputs, assistant_model=pair, d2sd_num_branches=3, **sampling)
    assert out.tolist() == expected.tolist()
    assert pair.last_stats.mean_acceptance_length > 1.5


@pytest.mark.parametrize("family", ("qwen3_next", "lfm2"))
def test_a_pass_brings_as_many_tokens_as_with_attention_alone(family, monkeypatch):
    seen = {}
    for name, target in (("llama", tiny_target("llama")), (family, recurrent_target(family))):
        options = dict(do_sample=False, max_new_tokens=NEW)
        expected = target.generate(prompt(), **options)
        with monkeypatch.context() as patch:
            OracleDrafts(patch, expected[0], 1.0, confidence=0.99)
            pair = tiny_assistant(4, 6)
            target.generate(prompt(), assistant_model=pair, d2sd_num_branches=2, **options)
        seen[name] = pair.last_stats.acceptance_histogram
    assert seen[family] == seen["llama"]


class TestTurns:
    def turns(self, family, first_assistant, only_new=False, count=1):
        one = generate(family, pad(prompts(count)), return_dict_in_generate=True, assistant_model=first_assistant)
        ids = torch.cat([one.sequences, prompt(5, seed=9).expand(count, -1)], dim=1)
        width = pad(prompts(count))["input_ids"].shape[1]
        mask = torch.cat([pad(prompts(count))["attention_mask"], torch.ones(count, ids.shape[1] - width).long()], 1)
        inputs = {"input_ids": ids, "attention_mask": mask}
        expected = generate(family, {name: value.clone() for name, value in inputs.items()})
        return one[CACHE_NAME], inputs, expected

    @pytest.mark.parametrize("first", ("ours", "plain"))
    @pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1", "jamba"))
    def test_the_next_turn_equals_a_cold_start(self, family, first):
        pair = tiny_assistant(4, 6)
        cache, inputs, expected = self.turns(family, pair if first == "ours" else None)
        out = generate(family, {**inputs, CACHE_NAME: cache}, assistant_model=pair)
        assert out.tolist() == expected.tolist()
        assert pair.last_stats.prompt_tokens < 10

    @pytest.mark.parametrize("family", ("qwen3_5", "lfm2"))
    def test_of_a_batch_too(self, family):
        cache, inputs, expected = self.turns(family, tiny_assistant(4, 6), count=3)
        out = generate(family, {**inputs, CACHE_NAME: cache}, assistant_model=tiny_assistant(4, 6))
        assert out.tolist() == expected.tolist()

    @pytest.mark.parametrize("count", (1, 3))
    @pytest.mark.parametrize("family", here("qwen3_5", "falcon_h1", "mamba2"))
    def test_the_returned_states_are_those_of_plain_decoding(self, family, count):
        flags = dict(return_dict_in_generate=True, eos_token_id=5)
        expected = generate(family, pad(prompts(count)), **flags)
        out = generate(family, pad(prompts(count)), assistant_model=tiny_assistant(4, 6), **flags)
        for ours, theirs in zip(out[CACHE_NAME].layers, expected[CACHE_NAME].layers):
            if hasattr(theirs, "conv_states"):
                torch.testing.assert_close(states_of(ours), states_of(theirs), **CLOSE)
            if getattr(theirs, "keys", None) is not None:
                assert ours.keys.shape == theirs.keys.shape

    @pytest.mark.skipif("mamba2" not in FAMILIES, reason="refused by this release's name of its cache")
    def test_states_alone_do_not_say_how_long_they_are(self):
        cache, inputs, _ = self.turns("mamba2", None)
        with pytest.raises(ValueError, match="recurrent states alone"):
            generate("mamba2", {**inputs, CACHE_NAME: cache}, assistant_model=tiny_assistant())

    def test_a_cache_that_counts_no_tokens(self):
        cache, inputs, _ = self.turns("minimax", tiny_assistant(4, 6))
        assert len(cache.linear_cache) == LAYERS - 1 and cache.layers[1].keys.shape[2] > 20
        with pytest.raises(ValueError, match="MiniMaxCache does not say how many tokens it holds"):
            generate("minimax", {**inputs, CACHE_NAME: cache}, assistant_model=tiny_assistant())

    def test_a_state_is_not_cut_to_a_prefix(self):
        cache, *_ = self.turns("qwen3_5", None)
        length = cache.get_seq_length()
        assert not keep_prefix(cache, length - 1)
        assert keep_prefix(cache, length)


def random_tree(rows: int, size: int, seed: int = 0) -> CandidateTree:
    """(rows, size) with as many children anywhere; the last node of the second row is filling."""
    generator = torch.Generator().manual_seed(seed)
    parents = torch.stack(
        [torch.tensor([-1, *(int(torch.randint(0, at, (), generator=generator)) for at in range(1, size))])] * rows
    )
    if rows > 1:
        parents[1, -1] = -1
    depths = torch.zeros_like(parents)
    for at in range(1, size):
        depths[:, at] = torch.where(
            parents[:, at] >= 0, depths.gather(1, parents[:, at : at + 1].clamp(0))[:, 0] + 1, 0
        )
    tokens = torch.randint(2, 20, parents.shape, generator=generator)
    return CandidateTree(tokens, parents, depths, torch.zeros(parents.shape), torch.zeros_like(parents))


def path_to(tree: CandidateTree, row: int, node: int) -> list[int]:
    path = [node]
    while tree.parents[row, path[0]] >= 0:
        path.insert(0, int(tree.parents[row, path[0]]))
    return path


def nodes_of(tree: CandidateTree, row: int) -> list[int]:
    return [node for node in range(len(tree)) if node == 0 or tree.parents[row, node] >= 0]


def decoded(model, tokens: list[int], prompt_length: int):
    """The model's last output: of the prompt in one pass, then of one token after the other."""
    own, ids = own_cache_class(model.config), torch.tensor([tokens])
    cache = DynamicCache(config=model.config) if own is None else own()
    output = model(ids[:, :prompt_length], use_cache=True, output_hidden_states=True, **{CACHE_NAME: cache})
    for at in range(prompt_length, len(tokens)):
        given = {CACHE_NAME: cache, "position_ids": torch.tensor([[at]])}
        output = model(ids[:, at : at + 1], use_cache=True, output_hidden_states=True, **given)
    return output


class TestTrees:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_node_is_as_if_its_path_had_been_decoded(self, family):
        """Of several trees in turn, of each of which a part is kept."""
        model, read = recurrent_target(family), [prompt(9)[0].tolist(), prompt(9, seed=1)[0].tolist()]
        target = Target(model, TreeCache(model.config), {0, 2}, rows=2)
        with torch.no_grad():
            list(target.prefill(torch.tensor(read), 9, use_cache=True))
            for seed, counts in ((0, [3, 1]), (1, [1, 2])):
                tree = random_tree(2, 7, seed)
                step = target.verify(tree)
                for row, node in ((at, node) for at in range(2) for node in nodes_of(tree, at)):
                    alone = decoded(model, read[row] + tree.tokens[row, path_to(tree, row, node)].tolist(), 9)
                    torch.testing.assert_close(step.logits[row, node], alone.logits[0, -1], **CLOSE)
                    seen = step.features([0, 2])[row, node]
                    expected = torch.cat([alone.hidden_states[at + 1][0, -1] for at in (0, 2)])
                    torch.testing.assert_close(seen, expected, **CLOSE)
                deepest = [max((path_to(tree, row, node) for node in nodes_of(tree, row)), key=len) for row in (0, 1)]
                paths = [path[:count] for path, count in zip(deepest, counts)]
                read = [tokens + tree.tokens[row, paths[row]].tolist() for row, tokens in enumerate(read)]
                target.commit(step, torch.tensor([path + [0] * (3 - len(path)) for path in paths]), counts)

    def test_chains_are_the_paths_to_the_leaves(self):
        tree = random_tree(2, 9)
        chains = Chains.of_tree(tree)
        leaves = [[node for node in nodes_of(tree, row) if node not in tree.parents[row]] for row in range(2)]
        assert chains.tokens.shape == (2, max(map(len, leaves)), int(tree.depths.max()) + 1)
        for row in range(2):
            for chain, leaf in enumerate(leaves[row]):
                path = path_to(tree, row, leaf)
                assert chains.tokens[row, chain, : len(path)].tolist() == tree.tokens[row, path].tolist()
            for node in nodes_of(tree, row):
                assert chains.tokens[row].flatten()[chains.slots[row, node]] == tree.tokens[row, node]

    @pytest.mark.parametrize("family", ("qwen3_next", "falcon_h1"))
    def test_attention_sees_the_prefix_once(self, family, monkeypatch):
        """The keys of a pass are those of the row and of the chains, however many chains there are."""
        seen, stock = [], attention.cascade
        monkeypatch.setattr(
            attention, "cascade", lambda query, key, *rest: seen.append((query, key)) or stock(query, key, *rest)
        )
        model, tree = recurrent_target(family), random_tree(1, 9)
        target = Target(model, TreeCache(model.config), {0}, rows=1)
        with torch.no_grad():
            list(target.prefill(prompt(40), 40))
            target.verify(tree)
        _, count, length = Chains.of_tree(tree).tokens.shape
        assert count > 2
        assert {key.shape[0] for _, key in seen} == {1}
        assert {key.shape[2] for _, key in seen} == {40 + count * length}
        assert {query.shape[2] for query, _ in seen} == {count * length}

    @pytest.mark.parametrize("family", ("qwen3_next", "jamba"))
    def test_only_recurrent_modules_run_again_for_what_is_kept(self, family):
        model, tree = recurrent_target(family), random_tree(1, 9)
        target = Target(model, TreeCache(model.config), {0}, rows=1)
        runs = {}
        handles = [
            module.register_forward_hook(lambda module, *_: runs.update({module: runs.get(module, 0) + 1}))
            for module in model.modules()
        ]
        with torch.no_grad():
            list(target.prefill(prompt(), 9))
            step = target.verify(tree)
            runs.clear()
            target.commit(step, torch.tensor([path_to(tree, 0, 1)]), [2])
        for handle in handles:
            handle.remove()
        with_index = {type(module).__name__ for module in runs if hasattr(module, "layer_idx")}
        assert len(with_index) == 1 and "Attention" not in with_index.pop()
        assert not any(type(module).__name__.endswith(("MLP", "Attention", "Experts")) for module in runs)

    def test_masked_products_give_the_same_text(self, monkeypatch):
        monkeypatch.setattr(attention, "SHORT", 4)
        stats = check_text("falcon_h1", 3, 4, 1, monkeypatch, d2sd_attention_backend="masked")
        assert stats.attention_backend.startswith("masked")


class TestPrompts:
    @pytest.mark.parametrize("family", here("qwen3_5", "mamba2", "jamba"))
    def test_padding_leaves_no_trace_in_the_features(self, family):
        model, rows = recurrent_target(family), prompts(3, seed=1)
        inputs = pad(rows)
        target = Target(model, TreeCache(model.config), {0, 2}, rows=3)
        counts = [len(row) for row in rows]
        width = inputs["input_ids"].shape[1]
        with torch.no_grad():
            (step,) = target.prefill(
                inputs["input_ids"], width, counts=counts, attention_mask=inputs["attention_mask"], use_cache=True
            )
            for at, row in enumerate(rows):
                alone = Target(model, TreeCache(model.config), {0, 2})
                (expected,) = alone.prefill(row[None], len(row))
                torch.testing.assert_close(step.logits[at : at + 1], expected.logits, **CLOSE)
                features = step.features([0, 2])[at, : len(row)]
                torch.testing.assert_close(features, expected.features([0, 2])[0], **CLOSE)
        assert target.positions == counts
        assert target.cache.lengths == counts

    @pytest.mark.parametrize("family", ("qwen3_5", "falcon_h1"))
    def test_prompts_in_chunks(self, family, monkeypatch):
        check_text(family, 3, 2, 1, monkeypatch, prefill_chunk_size=4)


class TestRefusals:
    @pytest.mark.skipif("recurrent_gemma" not in FAMILIES, reason="refused whatever its modules run")
    def test_modules_that_keep_their_states_and_do_not_run_their_class(self):
        target = copy.deepcopy(recurrent_target("recurrent_gemma"))
        add_hook_to_module(target.model.layers[0].temporal_block, ModelHook())
        with pytest.raises(ValueError, match="which keep their states themselves, have another forward"):
            target.generate(prompt(), assistant_model=tiny_assistant(), max_new_tokens=4)

    def test_states_that_are_in_no_cache_layer(self):
        sizes = dict(vocab_size=24, hidden_size=32, num_hidden_layers=LAYERS, attention_hidden_size=32)
        rwkv = RwkvForCausalLM(RwkvConfig(**sizes)).eval()
        with pytest.raises(ValueError, match="it does not keep its states in the cache"):
            rwkv.generate(prompt(), assistant_model=tiny_assistant(), max_new_tokens=4)

    @pytest.mark.skipif("mamba2" in FAMILIES, reason="its cache has the name that all have")
    def test_a_cache_of_another_name(self):
        with pytest.raises(ValueError, match="is served with transformers>=5.24"):
            generate("mamba2", {"input_ids": prompt()}, assistant_model=tiny_assistant())

    def test_states_that_nobody_tried(self, monkeypatch):
        monkeypatch.setattr("hf_d2sd.compat._SERVED_STATES", set())
        with pytest.raises(ValueError, match="'qwen3_5_text' are not among"):
            generate("qwen3_5", {"input_ids": prompt()}, assistant_model=tiny_assistant())

    def test_compiled_passes(self):
        with pytest.raises(ValueError, match="d2sd_compile asks for passes of one shape"):
            generate("qwen3_5", {"input_ids": prompt()}, assistant_model=tiny_assistant(), d2sd_compile=True)

    def test_masks_over_all_keys(self):
        with pytest.raises(ValueError, match="d2sd_attention_backend is 'sdpa'"):
            options = dict(d2sd_attention_backend="sdpa", assistant_model=tiny_assistant())
            generate("qwen3_5", {"input_ids": prompt()}, **options)

    def test_a_criterion_of_a_batch_whose_cache_is_returned(self):
        class Never(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.zeros(len(input_ids), dtype=torch.bool)

        options = dict(stopping_criteria=StoppingCriteriaList([Never()]), assistant_model=tiny_assistant())
        generate("qwen3_5", pad(prompts(2)), **options)
        with pytest.raises(ValueError, match="leave return_dict_in_generate off"):
            generate("qwen3_5", pad(prompts(2)), return_dict_in_generate=True, **options)

    def test_a_cache_of_another_model(self):
        cache = DynamicCache(config=tiny_target("llama").config)
        with pytest.raises(ValueError, match="was not made for this model"):
            generate("qwen3_5", {"input_ids": prompt(), CACHE_NAME: cache}, assistant_model=tiny_assistant())


class TestTheModelStaysAsItWas:
    def test_plain_decoding_afterwards(self):
        model = copy.deepcopy(recurrent_target("jamba"))
        expected = model.generate(prompt(), max_new_tokens=8, do_sample=False)
        model.generate(prompt(), max_new_tokens=8, do_sample=False, assistant_model=tiny_assistant())
        assert model.generate(prompt(), max_new_tokens=8, do_sample=False).tolist() == expected.tolist()
        twin = copy.deepcopy(model)
        assert twin.state_dict().keys() == model.state_dict().keys()
        out = twin.generate(prompt(), max_new_tokens=8, do_sample=False, assistant_model=tiny_assistant())
        assert out.tolist() == expected.tolist()

    def test_threads_share_it(self):
        family, texts = "qwen3_5", prompts(4, seed=2)
        expected = [continuation(family, text) for text in texts]
        found = {}

        def work(at):
            pair = copy.deepcopy(tiny_assistant(4, 6))
            options = {} if at == 0 else dict(assistant_model=pair)  # one of them decodes plainly
            found[at] = continuation(family, texts[at], **options)

        threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[at] for at in range(4)] == expected


def test_a_drafter_laid_out_as_those_of_qwen3_5_drafts_for_it(tmp_path):
    """`block_size` and `num_target_layers` may stand beside the layers that are read."""
    inner = dict(block_size=4, num_target_layers=LAYERS, mask_token_id=1, target_layer_ids=[0, 2])
    folder = layouts.dflash(tmp_path, inner)
    config = json.loads((folder / "config.json").read_text())
    for name in ("block_size", "num_target_layers"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    pair = D2SDAssistant.from_drafters(str(folder))
    assert (pair.first.config.block_size, pair.first.config.num_target_layers) == (4, LAYERS)
    expected = generate("qwen3_5", {"input_ids": prompt()})
    assert generate("qwen3_5", {"input_ids": prompt()}, assistant_model=pair).tolist() == expected.tolist()
    pair.first.config.num_target_layers = LAYERS + 1
    with pytest.raises(ValueError, match="num_target_layers is 5, the target's is 4"):
        generate("qwen3_5", {"input_ids": prompt()}, assistant_model=pair)


def test_the_assistant_of_another_library_is_still_refused():
    with pytest.raises(ValueError, match="not supported with stateful models"):
        recurrent_target("qwen3_5").generate(prompt(), assistant_model=tiny_target("llama"), max_new_tokens=4)


@pytest.mark.parametrize("family", here("qwen3_5", "mamba2", "jamba", "recurrent_gemma"))
def test_a_call_leaves_nothing_in_the_target(family):
    target = copy.deepcopy(recurrent_target(family))
    ids = prompt(9)
    target(ids, output_hidden_states=True)  # for which Transformers puts hooks of its own on a model
    before = state_of(target)
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    target.generate(ids, assistant_model=tiny_assistant(4, 6), **options)
    assert state_of(target) == before


def test_modules_whose_forward_was_replaced_are_watched_too(monkeypatch):
    target, ids = copy.deepcopy(recurrent_target("qwen3_5")), prompt(9)
    plain = target.generate(ids, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    for module in target.modules():
        if hasattr(module, "layer_idx"):
            add_hook_to_module(module, ModelHook())  # as accelerate spreads a model over devices
    OracleDrafts(monkeypatch, plain[0], 0.8)
    pair = tiny_assistant(4, 6)
    ours = target.generate(ids, assistant_model=pair, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    assert torch.equal(ours, plain)
    assert pair.last_stats.mean_acceptance_length > 1.5
