"""Products of few rows on a CPU: the same values by whatever way, the way that measured fastest, and whose layers."""

import copy

import peft
import pytest
import torch
from tiny import OracleDrafts, prompt, tiny_assistant, tiny_target
from torch import nn
from torch.nn.functional import linear as stock

from hf_d2sd import products
from hf_d2sd.compat import for_few_tokens
from hf_d2sd.target import Target

CLOSE = {
    torch.float32: dict(rtol=1e-5, atol=1e-4),
    torch.bfloat16: dict(rtol=2e-2, atol=2e-2),
    torch.float16: dict(rtol=2e-3, atol=4e-3),
}


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(products, "_choices", {})


class Clock:
    """Says that each way takes so many seconds, in turn; counts how often it is asked."""

    def __init__(self, monkeypatch, *seconds: float):
        self.seconds, self.now, self.asked = seconds, 0.0, 0
        monkeypatch.setattr(products, "clock", self)

    def __call__(self) -> float:
        if self.asked % 2:
            self.now += self.seconds[self.asked // 2 % len(self.seconds)]
        self.asked += 1
        return self.now


@pytest.fixture
def turned(monkeypatch):
    """Of every size, and always the last way: turned around, converted, or shared."""
    monkeypatch.setattr(products, "_LEAST_WEIGHT", 0)
    monkeypatch.setattr(products.Choice, "fastest", lambda self: self.times[0][0])
    for ways in (products._WAYS, products._ONE_ROW):
        for dtype in ways:
            monkeypatch.setitem(ways, dtype, ways[dtype][-1:])


def weight_of(rows: int = 192, columns: int = 176, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(rows, columns) / columns**0.5).to(dtype)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_way_gives_what_linear_gives(dtype, with_bias, monkeypatch):
    monkeypatch.setattr(products, "_SLAB", 1000)  # the last slab is not full
    weight, bias = weight_of(193, 171, dtype), torch.randn(193).to(dtype) if with_bias else None
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 63, 64):
        x = torch.randn(rows, 171).to(dtype)
        exact = stock(x.double(), weight.double(), None if bias is None else bias.double())
        for way in {*products._WAYS[dtype], *(products._ONE_ROW[dtype] if rows == 1 else ())}:
            product = way(x, weight, bias)
            assert product.shape == (rows, 193) and product.dtype == dtype and product.is_contiguous()
            torch.testing.assert_close(product.double(), exact, **CLOSE[dtype])


@pytest.mark.parametrize("shape", [(171,), (1, 171), (2, 3, 171), (1, 2, 3, 171), (64, 1, 171)])
def test_leading_dimensions_stay(shape, turned):
    weight, x = weight_of(193, 171), torch.randn(shape)
    product = products.linear(x, weight)
    assert product.shape == stock(x, weight).shape and product.is_contiguous()
    torch.testing.assert_close(product, stock(x, weight), **CLOSE[torch.float32])
    assert len(products._choices) == 1


def test_rows_that_are_no_contiguous_tensor(turned):
    weight, x = weight_of(193, 171), torch.randn(171, 6).t()
    torch.testing.assert_close(products.linear(x, weight), stock(x, weight), **CLOSE[torch.float32])


def test_the_way_with_the_least_minimum_is_taken_and_then_nothing_is_timed(monkeypatch):
    monkeypatch.setitem(products._WAYS, torch.bfloat16, (stock, products._turned, products._converted))
    clock = Clock(monkeypatch, 1e-4, 4e-4, 3e-4)  # the last way is tried first
    x, weight = torch.randn(5, 176).bfloat16(), weight_of(dtype=torch.bfloat16)
    for _ in range(3 * products._SAMPLES):
        products.linear(x, weight)
    (choice,) = products._choices.values()
    assert choice.best is products._converted
    asked = clock.asked
    assert asked == 2 * 3 * products._SAMPLES
    products.linear(x, weight)
    assert clock.asked == asked


@pytest.mark.parametrize("other, best", [(0.97, stock), (0.9, products._turned)])
def test_stock_is_taken_unless_another_is_clearly_faster(other, best, monkeypatch):
    Clock(monkeypatch, other * 1e-4, 1e-4)
    x, weight = torch.randn(5, 176), weight_of()
    for _ in range(2 * products._SAMPLES):
        products.linear(x, weight)
    assert [choice.best for choice in products._choices.values()] == [best]


def test_long_products_are_timed_once_each(monkeypatch):
    clock = Clock(monkeypatch, 0.02, 0.03)
    for _ in range(3):
        products.linear(torch.randn(5, 176), weight_of())
    assert [choice.best for choice in products._choices.values()] == [products._turned] and clock.asked == 4


def test_shapes_sizes_and_threads_are_measured_apart():
    weight = weight_of()
    for rows in (1, 2, 4, 5, 8):
        products.linear(torch.randn(rows, 176), weight)
    assert len(products._choices) == 3, "one row, up to 4, up to 8"
    products.linear(torch.randn(8, 192), weight.t().contiguous())
    torch.set_num_threads(2)
    products.linear(torch.randn(8, 176), weight)
    assert len(products._choices) == 5


class Marked(torch.Tensor):
    """Of a class whose products are its own."""


NOT_OURS = {
    "no rows": (lambda: (torch.randn(0, 176), weight_of())),
    "many rows": (lambda: (torch.randn(65, 176), weight_of())),
    "a small weight": (lambda: (torch.randn(4, 16), weight_of(16, 16))),
    "a weight with gaps": (lambda: (torch.randn(4, 176), weight_of(192, 352)[:, ::2])),
    "float64": (lambda: (torch.randn(4, 176).double(), weight_of().double())),
    "a weight of another class": (lambda: (torch.randn(4, 176), weight_of().as_subclass(Marked))),
    "rows of another class": (lambda: (torch.randn(4, 176).as_subclass(Marked), weight_of())),
    "a weight that learns": (lambda: (torch.randn(4, 176), nn.Parameter(weight_of()))),
    "another device": (lambda: (torch.randn(4, 176, device="meta"), weight_of().to("meta"))),
}


@pytest.mark.parametrize("case", NOT_OURS)
def test_stock_has_what_is_not_ours(case):
    x, weight = NOT_OURS[case]()
    product, expected = products.linear(x, weight), stock(x, weight)
    assert type(product) is type(expected) and product.requires_grad == expected.requires_grad
    assert product.is_meta or torch.equal(product, expected)
    assert not products._choices


def test_a_weight_that_could_learn_is_ours_while_nothing_does():
    with torch.no_grad():
        products.linear(torch.randn(4, 176), nn.Parameter(weight_of()))
    assert products._choices


def test_stock_where_algorithms_shall_be_deterministic_or_dtypes_are_automatic():
    x, weight = torch.randn(4, 176), weight_of()
    torch.use_deterministic_algorithms(True)
    try:
        products.linear(x, weight)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    assert not products._choices


def test_stock_where_a_graph_is_traced():
    class Layer(nn.Module):
        def forward(self, x, weight):
            return products.linear(x, weight)

    program = torch.export.export(Layer(), (torch.randn(4, 176), weight_of()))
    assert "aten.linear.default" in {str(node.target) for node in program.graph.nodes}
    assert not products._choices


def test_shapes_that_do_not_fit_are_refused_as_stock_refuses_them():
    with pytest.raises(RuntimeError):
        products.linear(torch.randn(4, 175), weight_of())
    with pytest.raises(RuntimeError):
        products.linear(torch.randn(4, 176).bfloat16(), weight_of())


# Models --------------------------------------------------------------------------------------------------------------


def attributes(model) -> dict:
    """All that stands on a model's modules, dictionaries one level down."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def linears(model) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}


def same_logits(model, other) -> None:
    torch.testing.assert_close(model(prompt(5)).logits, other(prompt(5)).logits, rtol=1e-4, atol=1e-3)


def test_a_twin_shares_weights_and_the_model_stays_as_it_is(turned):
    model = copy.deepcopy(tiny_target("llama"))
    before = attributes(model)
    twin = for_few_tokens(model)
    assert attributes(model) == before and linears(model) == {nn.Linear} and nn.Linear not in linears(twin)
    assert type(twin) is type(model) and twin.model.norm is model.model.norm
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        same_logits(twin, model)
        model.model.layers[1].mlp.up_proj.weight = nn.Parameter(model.model.layers[1].mlp.up_proj.weight * 2)
        same_logits(twin, model)
    assert products._choices


def test_a_twin_asks_no_more_once_its_ways_are_known(turned, monkeypatch):
    model = copy.deepcopy(tiny_target("llama"))
    twin, asked, has_ways = for_few_tokens(model), [], products._has_ways
    monkeypatch.setattr(products, "_has_ways", lambda *args: asked.append(args) or has_ways(*args))
    with torch.no_grad():
        for _ in range(2 * products._SAMPLES):
            twin(prompt(5))
        before = len(asked)
        same_logits(twin, model)
        assert before and len(asked) == before
        assert torch.equal(twin(prompt(3)).logits, twin(prompt(3)).logits) and len(asked) > before, "other sizes"
    for_few_tokens(model)(prompt(5))
    assert len(asked) > before, "a call's twin is its own: here weights learn, and stock has them"


def test_hooks_that_transformers_puts_on_a_twin_are_not_the_models():
    model = copy.deepcopy(tiny_target("llama"))
    before, twin = attributes(model), for_few_tokens(model)
    seen = twin(prompt(5), output_hidden_states=[1]).hidden_states
    assert attributes(model) == before
    expected = model(prompt(5), output_hidden_states=[1]).hidden_states
    torch.testing.assert_close(seen[1], expected[1], rtol=1e-4, atol=1e-3)
    again = for_few_tokens(model)(prompt(5), output_hidden_states=True).hidden_states
    assert len(again) == len(model(prompt(5), output_hidden_states=True).hidden_states), "each state is captured once"


def test_a_module_that_stands_in_two_places_has_one_twin():
    shared = nn.Linear(4, 4)
    twin = for_few_tokens(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared}))
    assert twin["a"][0] is twin["b"] is not shared


def test_tied_weights_stay_tied():
    model = copy.deepcopy(tiny_target("llama"))
    model.lm_head.weight = model.model.embed_tokens.weight
    twin = for_few_tokens(model)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight is model.model.embed_tokens.weight


def with_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)


def with_early_hook(model):
    model.lm_head.register_forward_pre_hook(lambda *args: None)


def with_forward(model):
    model.model.layers[0].mlp.forward = lambda states: states


def compiled(model):
    model.model.layers[0].mlp.compile(backend="eager")


@pytest.mark.parametrize("change", [with_hook, with_early_hook, with_forward, compiled])
def test_a_model_whose_calls_are_followed_runs_itself(change):
    model = copy.deepcopy(tiny_target("llama"))
    change(model)
    assert for_few_tokens(model) is model


def test_models_without_a_linear_layer_run_themselves():
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4))
    assert for_few_tokens(model) is model
    assert for_few_tokens(nn.Linear(4, 4, device="meta")).__class__ is nn.Linear


def test_adapters_around_linear_layers(turned):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, use_dora=True)
    model = peft.get_peft_model(copy.deepcopy(tiny_target("llama")), config).eval().get_base_model()
    twin = for_few_tokens(model)
    assert twin is not model
    with torch.no_grad():
        same_logits(twin, model)
        before = twin(prompt(5)).logits
        model.model.layers[0].self_attn.q_proj.base_layer.weight.mul_(2)  # in place, as adapters are merged
        same_logits(twin, model)
        assert not torch.allclose(twin(prompt(5)).logits, before, atol=1e-2)


@pytest.mark.parametrize("options", [{}, dict(d2sd_tree_width=3, d2sd_tree_budget=12)], ids=["paper", "wide"])
def test_trees_are_verified_by_these_products_and_the_text_is_plain_decodings(options, turned, monkeypatch):
    target, assistant = copy.deepcopy(tiny_target("llama")), tiny_assistant(4, 6)
    plain = target.generate(prompt(9), do_sample=False, max_new_tokens=20)
    OracleDrafts(monkeypatch, plain[0], 0.7)
    models, forward = [], Target._forward

    def noting(self, inputs):
        models.append(self.few)
        return forward(self, inputs)

    monkeypatch.setattr(Target, "_forward", noting)
    ours = target.generate(prompt(9), do_sample=False, max_new_tokens=20, assistant_model=assistant, **options)
    assert ours.tolist() == plain.tolist()
    assert models and all(one is not target for one in models)
    assert any(key[1] == target.lm_head.weight.shape for key in products._choices)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_a_row_is_shared_by_as_many_threads_as_divide_the_weight(threads):
    weight, x = weight_of(192, 171), torch.randn(1, 1, 171)
    torch.set_num_threads(threads)
    assert len(products._parts_of(weight)) == {1: 1, 2: 2, 3: 3, 5: 1}[threads]
    torch.testing.assert_close(products._shared(x, weight, None), stock(x, weight), **CLOSE[torch.float32])


def test_a_single_row_has_ways_of_its_own(monkeypatch):
    Clock(monkeypatch, 1e-4, 2e-4)  # the last way is tried first
    weight = weight_of()
    for rows in (1, 2):
        for _ in range(2 * products._SAMPLES):
            products.linear(torch.randn(1, rows, 176), weight)
    assert [choice.best for choice in products._choices.values()] == [products._shared, products._turned]


@pytest.mark.parametrize("rows", [1, 3])
def test_plain_steps_take_these_products_too(rows, turned, monkeypatch):
    target, assistant = copy.deepcopy(tiny_target("llama")), tiny_assistant(4, 6)
    ids = prompt(9).expand(rows, -1).contiguous()
    plain = target.generate(ids, do_sample=False, max_new_tokens=8)
    taken, forward = [], Target._forward
    monkeypatch.setattr(Target, "_forward", lambda self, inputs: taken.append(len(self.rows)) or forward(self, inputs))
    ours = target.generate(ids, do_sample=False, max_new_tokens=8, assistant_model=assistant, d2sd_tree_budget=1)
    assert ours.tolist() == plain.tolist()
    assert taken == [rows] * 7 and {key[2] for key in products._choices} >= {1 if rows == 1 else 4}
