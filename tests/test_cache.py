"""The tree cache against plain forwards and against Transformers' own caches."""

import copy

import pytest
import torch
from tiny import WINDOW, prompt, tiny_assistant, tiny_target
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache, QuantizedCache

from hf_d2sd import compat
from hf_d2sd.cache import Place, TreeCache, TreeLayer, check_supported, layer_windows
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.target import Target
from hf_d2sd.tree import CandidateTree

FAMILIES = ("llama", "mistral", "gemma3_text", "gpt_oss")  # full, all sliding, alternating, alternating with sinks
CLOSE = dict(atol=1e-4, rtol=1e-4)


@torch.no_grad()
def step(family: str, input_ids: torch.Tensor, cache):
    """Logits (T, V) of a plain forward that goes on from a cache."""
    return tiny_target(family)(input_ids, **{CACHE_NAME: cache}, use_cache=True).logits[0]


def plain_cache(family: str, with_config: bool) -> DynamicCache:
    return DynamicCache(config=tiny_target(family).config) if with_config else DynamicCache()


def assert_same_contents(cache, other):
    assert len(cache.layers) == len(other.layers)
    for layer, other_layer in zip(cache.layers, other.layers):
        assert type(layer) is type(other_layer)
        assert layer.get_seq_length() == other_layer.get_seq_length()
        torch.testing.assert_close(layer.keys, other_layer.keys, **CLOSE)
        torch.testing.assert_close(layer.values, other_layer.values, **CLOSE)


class TestTakingOverAndGivingBack:
    @pytest.mark.parametrize("with_config", [True, False])
    @pytest.mark.parametrize("before, within", [(0, 4), (4, 3), (WINDOW - 1, 1), (4, 2 * WINDOW), (2 * WINDOW + 3, 5)])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_plain_decoding_goes_on_as_if_it_had_never_stopped(self, family, before, within, with_config):
        """`before` tokens in the plain cache, `within` more in the tree cache, then plain decoding again."""
        tokens = prompt(before + within + 4)
        ours, plain = plain_cache(family, with_config), plain_cache(family, with_config)
        if before:
            step(family, tokens[:, :before], ours)
        tree_cache = TreeCache.take_over(tiny_target(family).config, ours)
        assert tree_cache.get_seq_length() == before
        got = step(family, tokens[:, before : before + within], tree_cache)
        tree_cache.give_back(ours)

        if before:
            step(family, tokens[:, :before], plain)
        torch.testing.assert_close(got, step(family, tokens[:, before : before + within], plain), **CLOSE)
        assert_same_contents(ours, plain)
        for last in range(before + within, tokens.shape[1]):  # one by one: the window moves
            token = tokens[:, last : last + 1]
            torch.testing.assert_close(step(family, token, ours), step(family, token, plain), **CLOSE)
        assert_same_contents(ours, plain)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_nothing_taken_over_is_nothing_given_back(self, family):
        cache = plain_cache(family, True)
        TreeCache.take_over(tiny_target(family).config, cache).give_back(cache)
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(step(family, prompt(), cache), step(family, prompt(), DynamicCache()), **CLOSE)

    def test_the_users_tensors_stay_as_they_are_until_they_are_given_back(self):
        cache = plain_cache("llama", True)
        step("llama", prompt(), cache)
        before = [layer.keys.clone() for layer in cache.layers]
        tree_cache = TreeCache.take_over(tiny_target().config, cache)
        step("llama", prompt(3, seed=1), tree_cache)
        tree_cache.keep(dict.fromkeys(tree_cache.places(), Place(9, [9])), torch.tensor([[2]]), [1])
        tree_cache.crop(-5)
        step("llama", prompt(3, seed=2), tree_cache)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_cache_that_records_its_past_is_taken_over(self, family):
        """As native assisted decoding leaves it: sliding layers hold more than their window."""
        tokens = prompt(3 * WINDOW)
        cache, plain = plain_cache(family, True), plain_cache(family, True)
        cache.activate_past_recording() if hasattr(cache, "activate_past_recording") else None
        step(family, tokens[:, :-3], cache)
        step(family, tokens[:, :-3], plain)
        tree_cache = TreeCache.take_over(tiny_target(family).config, cache)
        for last in (-3, -2):
            token = tokens[:, last : last + 1]
            torch.testing.assert_close(step(family, token, tree_cache), step(family, token, plain), **CLOSE)
        tree_cache.give_back(cache)
        torch.testing.assert_close(step(family, tokens[:, -1:], cache), step(family, tokens[:, -1:], plain), **CLOSE)


def chain_tree(tokens, parents) -> CandidateTree:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    zeros = torch.zeros(len(tokens), dtype=torch.long)
    fields = torch.tensor(tokens), torch.tensor(parents), torch.tensor(depths), zeros.float(), zeros
    return CandidateTree(*(field[None] for field in fields))


class TestKeepingAPath:
    TREE = ([4, 5, 6, 7, 8, 9, 3], [-1, 0, 0, 1, 2, 4, 5])
    PATHS = ([0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4, 5, 6])

    @pytest.mark.parametrize("length", [5, WINDOW, 2 * WINDOW + 3])
    @pytest.mark.parametrize("path", PATHS, ids=str)
    @pytest.mark.parametrize("family", FAMILIES)
    @torch.no_grad()
    def test_what_is_kept_equals_a_recomputation(self, family, path, length):
        model = tiny_target(family)
        target = Target(model, TreeCache(model.config), layer_ids={0})
        list(target.prefill(prompt(length), length))
        tree = chain_tree(*self.TREE)
        target.commit(target.verify(tree), torch.tensor([path]), [len(path)])
        assert target.positions == [target.cache.get_seq_length()] == [length + len(path)]

        whole = torch.cat([prompt(length), tree.tokens[:, path]], dim=1)
        recomputed = DynamicCache()  # without a config its layers keep every token
        step(family, whole, recomputed)
        for layer, expected in zip(target.cache.layers, recomputed.layers):
            torch.testing.assert_close(layer.keys, expected.keys, **CLOSE)
            torch.testing.assert_close(layer.values, expected.values, **CLOSE)

        given = plain_cache(family, True)  # and plain decoding goes on from it
        target.cache.give_back(given)
        torch.testing.assert_close(step(family, prompt(1), given), step(family, prompt(1), recomputed), **CLOSE)

    @pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
    @torch.no_grad()
    def test_on_a_cache_whose_beginning_is_forgotten(self, family):
        """A sliding cache beyond its window was taken over: node indices count from the tree, not from the buffer."""
        length, model = 2 * WINDOW + 3, tiny_target(family)
        cache = plain_cache(family, True)
        step(family, prompt(length), cache)
        target = Target(model, TreeCache.take_over(model.config, cache), layer_ids={0})
        tree, path = chain_tree(*self.TREE), [0, 2, 4, 5]
        target.commit(target.verify(tree), torch.tensor([path]), [len(path)])
        target.cache.give_back(cache)
        expected = plain_cache(family, True)
        step(family, torch.cat([prompt(length), tree.tokens[:, path]], dim=1), expected)
        assert_same_contents(cache, expected)


def states(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, count, 4, generator=generator).unbind()


class TestLayers:
    def test_growth_keeps_the_contents_and_is_geometric(self):
        keys, values = states(3000)
        layer, buffers = TreeLayer(), set()
        for at in range(keys.shape[2]):
            got = layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            buffers.add(got[0].data_ptr())
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert len(buffers) < 20  # few of the 3000 appends made a new buffer

    def test_growth_in_large_steps_keeps_the_contents(self):
        keys, values = states(3000)
        layer, at = TreeLayer(), 0
        for size in (1, 300, 7, 700, 1992):
            layer.update(keys[:, :, at : at + size], values[:, :, at : at + size])
            at += size
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)

    @pytest.mark.parametrize("window", [None, 5])
    def test_cropped_tokens_are_forgotten_and_overwritten(self, window):
        keys, values = states(20)
        layer = TreeLayer(window)
        layer.update(keys[:, :, :12], values[:, :, :12])
        layer.crop(0)
        assert layer.get_seq_length() == 12
        layer.crop(-4)
        assert layer.get_seq_length() == 8
        assert torch.equal(layer.keys, keys[:, :, :8])
        layer.update(keys[:, :, 12:15], values[:, :, 12:15])
        assert torch.equal(layer.keys, torch.cat([keys[:, :, :8], keys[:, :, 12:15]], dim=2))
        assert torch.equal(layer.values, torch.cat([values[:, :, :8], values[:, :, 12:15]], dim=2))

    def test_an_empty_layer_crops_and_resets(self):
        layer = TreeLayer()
        layer.crop(-3)
        layer.reset()
        layer.keep(Place(0, [0]), torch.tensor([[0]]), [1])
        assert layer.get_seq_length() == 0

    def test_reset_forgets_everything(self):
        layer = TreeLayer(4)
        layer.update(*states(9))
        layer.dropped = [3]
        layer.reset()
        assert layer.get_seq_length() == 0
        keys, values = states(2, seed=1)
        assert torch.equal(layer.update(keys, values)[0], keys)

    @pytest.mark.parametrize("window", [2, 3, 8])
    def test_a_sliding_layer_hands_out_what_transformers_own_does(self, window):
        keys, values = states(40)
        ours, stock, at = TreeLayer(window), DynamicSlidingWindowLayer(window), 0
        for size in (1, 1, 4, 1, 9, 1, 1, 1, 12):
            assert ours.get_mask_sizes(size) == stock.get_mask_sizes(size)
            part = keys[:, :, at : at + size], values[:, :, at : at + size]
            for one, other in zip(ours.update(*part), stock.update(*part), strict=True):
                assert torch.equal(one, other)
            assert ours.get_seq_length() == stock.get_seq_length()
            at += size

    def test_keep_takes_nodes_in_any_order(self):
        keys, values = states(10)
        layer = TreeLayer()
        layer.update(keys, values)
        layer.keep(Place(4, [4]), torch.tensor([[0, 3, 1]]), [3])
        assert torch.equal(layer.keys, keys[:, :, [0, 1, 2, 3, 4, 7, 5]])
        assert torch.equal(layer.values, values[:, :, [0, 1, 2, 3, 4, 7, 5]])


class TestRefusals:
    def refused(self, cache, match, family="llama"):
        with pytest.raises(ValueError, match=match):
            check_supported(tiny_target(family).config, cache)
        with pytest.raises(ValueError):
            tiny_target(family).generate(
                prompt(), **{CACHE_NAME: cache}, assistant_model=tiny_assistant(), max_new_tokens=4
            )

    def test_a_static_cache(self):
        self.refused(StaticCache(config=tiny_target().config, max_cache_len=32), "got StaticCache")

    def test_a_static_cache_by_name(self):
        with pytest.raises(ValueError, match="got StaticCache"):
            tiny_target().generate(
                prompt(), cache_implementation="static", assistant_model=tiny_assistant(), max_new_tokens=4
            )

    def test_an_offloaded_cache(self):
        cache = DynamicCache()
        cache.offloading = True  # by the constructor only where there is an accelerator
        self.refused(cache, "offloaded DynamicCache")

    def test_a_quantized_cache(self):
        pytest.importorskip("optimum.quanto", reason="QuantizedCache needs optimum-quanto")
        self.refused(QuantizedCache("quanto", tiny_target().config), "got QuantizedCache")

    def test_an_encoder_decoder_cache(self):
        with pytest.raises(ValueError, match="got EncoderDecoderCache"):
            check_supported(tiny_target().config, EncoderDecoderCache(DynamicCache(), DynamicCache()))

    def test_a_subclass_that_might_do_anything(self):
        class Mine(DynamicCache):
            pass

        self.refused(Mine(), "got Mine")

    def test_no_cache(self):
        with pytest.raises(ValueError, match="got NoneType"):
            check_supported(tiny_target().config, None)

    def test_layers_of_another_window(self):
        config = copy.deepcopy(tiny_target("mistral").config)
        config.sliding_window = WINDOW + 1
        self.refused(DynamicCache(config=config), "DynamicSlidingWindowLayer", family="mistral")

    def test_sliding_layers_for_a_model_without_windows(self):
        self.refused(DynamicCache(config=tiny_target("mistral").config), "DynamicSlidingWindowLayer")

    def test_a_layer_of_another_kind(self):
        class Other(DynamicLayer):
            pass

        cache = DynamicCache(config=tiny_target().config)
        cache.layers[2] = Other()
        self.refused(cache, "Other")

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("with_config", [True, False])
    def test_what_generate_makes_is_not_refused(self, family, with_config):
        cache = plain_cache(family, with_config)
        check_supported(tiny_target(family).config, cache)
        step(family, prompt(), cache)
        check_supported(tiny_target(family).config, cache)

    def test_layers_whose_state_nothing_here_follows(self):
        from transformers import Llama4TextConfig

        with pytest.raises(ValueError, match="chunked_attention"):
            TreeCache(Llama4TextConfig(num_hidden_layers=4))


def test_a_call_reads_once_what_a_config_says_of_its_layers(monkeypatch):
    """A config that is changed between calls is read anew."""
    read, stock = [], compat.get_layer_types_and_kwargs
    monkeypatch.setattr(compat, "get_layer_types_and_kwargs", lambda config: read.append(config) or stock(config))
    target, pair = tiny_target("mistral"), tiny_assistant(4, 6)
    read.clear()
    target.generate(prompt(5), do_sample=False, max_new_tokens=8, assistant_model=pair)
    of_target = sum(config is target.config for config in read)
    assert of_target <= 3 and len(read) <= 5, "before the call twice, in it once; its drafters' once each"
    config = copy.deepcopy(target.config)
    with compat.layers_read_once():
        assert layer_windows(config) == layer_windows(config) != {"sliding_attention": 3}
    config.sliding_window = 3
    assert layer_windows(config) == {"sliding_attention": 3}
