"""Drafts against fresh forwards over the whole context, against softmax, and against Transformers' own DFlash."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, LAYERS, VOCAB, WIDTH, OracleDrafts, prompt, tiny_drafter, tiny_target
from torch import nn
from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

from hf_d2sd import D2SDAssistant, attention
from hf_d2sd.cache import TreeCache
from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import DraftContext, Drafter, draft_head
from hf_d2sd.target import Target, TargetPass
from hf_d2sd.tree import CandidateTree

WINDOWED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=7)
ALL_WINDOWED = dict(layer_types=["sliding_attention"] * 2, sliding_window=3)
KINDS = {
    "full": {},
    "alternating": WINDOWED,
    "sliding": ALL_WINDOWED,
    "causal windows": WINDOWED | {"causal_layer_types": ["sliding_attention"]},
    "causal": {"causal_layer_types": ["full_attention"]},
}
GAMMA = 5


def features_of(length: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states of `length` tokens after each layer, embeddings first; any numbers do."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, length, WIDTH, generator=generator) for _ in range(LAYERS + 1))


def part(hidden_states, start: int, end: int) -> TargetPass:
    return TargetPass(torch.empty(0), tuple(layer[:, start:end] for layer in hidden_states))


@pytest.mark.parametrize("layer_ids", [[0, 2], [1], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_the_outputs_of_the_named_layers(family, layer_ids):
    """Counted from 0, of the prompt and of a tree; of the last layer it is what the target's final norm gives."""
    model = tiny_target(family)
    target = Target(model, TreeCache(model.config), set(layer_ids))
    decoder, outputs = model.get_decoder(), {}
    named = dict(enumerate(decoder.layers[:-1])) | {LAYERS - 1: decoder.norm}

    def keep(at):
        return lambda module, args, output: outputs.update({at: output[0] if isinstance(output, tuple) else output})

    hooks = [module.register_forward_hook(keep(at)) for at, module in named.items()]
    inputs = {"input_ids": prompt(5)}
    if family == "gemma3_image":
        inputs["token_type_ids"] = torch.zeros_like(prompt(5))
    try:
        (step,) = target.prefill(new_tokens=5, **inputs)
        assert torch.equal(step.features(layer_ids), torch.cat([outputs[i] for i in layer_ids], dim=-1))
        chain = torch.arange(3)
        step = target.verify(CandidateTree.chain(chain[None] + 4))
        nodes = torch.tensor([[0, 2]])
        expected = torch.cat([outputs[i][:, [0, 2]] for i in layer_ids], dim=-1)
        assert torch.equal(step.features(layer_ids, nodes), expected)
    finally:
        for hook in hooks:
            hook.remove()


def position_of(drafter: Drafter) -> int:
    return drafter.context.positions[0] if drafter.context.positions else 0


def drafter_of(model, target=None) -> Drafter:
    return Drafter(model, target if target is not None else tiny_target())


@torch.no_grad()
def alone(model, block: list[int], hidden_states, known: range, position=None, target=None) -> torch.Tensor:
    """Logits (γ-1, V) by one fresh forward of one block over the known tokens: no cache, and masks by brute force."""
    target = target if target is not None else tiny_target()
    position = known.stop if position is None else position
    context = torch.cat([hidden_states[i + 1][:, known.start : known.stop] for i in model.config.target_layer_ids], -1)
    at = [*known, *range(position, position + len(block))]
    window = model.config.sliding_window
    near = torch.tensor([[abs(q - k) <= (window or 10**9) for k in at] for q in at[len(known) :]])
    masks = {"full_attention": torch.ones_like(near)[None, None], "sliding_attention": near[None, None]}
    for kind in model.config.causal_layer_types or ():
        masks[kind] = masks[kind] & torch.tensor([[k <= q for k in at] for q in at[len(known) :]])
    hidden = model(
        noise_embeds=target.get_input_embeddings()(torch.tensor([block])).to(model.dtype),
        context_hidden_states=context.to(model.dtype),
        position_ids=torch.tensor([at]),
        attention_mask=masks,
    ).last_hidden_state[0, 1:]
    return target.get_output_embeddings()(hidden.float())


def masked(model, visible: list[int], block_size: int = GAMMA) -> list[int]:
    return visible + [model.config.mask_token_id] * (block_size - len(visible))


def assert_reads(draft_tokens, draft_confidence, logits):
    best = logits.softmax(-1).max(-1)
    assert draft_tokens.tolist() == best.indices.tolist()
    torch.testing.assert_close(draft_confidence, best.values, atol=1e-5, rtol=1e-5)


def prefixes(tokens: list[int], lengths: list[int]) -> Draft:
    """The first so many of these tokens, drafted with a probability of 0.9 each."""
    first = torch.tensor([[tokens]])
    return Draft.of(first, torch.full(first.shape, 0.9)).cut(torch.tensor([lengths]))


def assert_branch(branches: Draft, row: int, logits, kept: list[int]):
    """What the drafter says at every position, and that the draft is that behind the tokens that it kept."""
    said = branches.logits[0, row]
    assert_reads(said.argmax(-1), said.softmax(-1).amax(-1), logits)
    assert branches.best[0, row].tolist() == kept + said.argmax(-1).tolist()[len(kept) :]
    expected = torch.cat([torch.full((len(kept),), 0.9), said.softmax(-1).amax(-1)[len(kept) :]])
    torch.testing.assert_close(branches.best_confidence[0, row], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
class TestOneDraft:
    @torch.no_grad()
    def test_the_first_draft_is_the_argmax_and_its_softmax_probability(self, kind):
        model, hidden = tiny_drafter(GAMMA, **KINDS[kind]), features_of(20)
        for length in (1, 2, 7, 8, 20):
            drafter = drafter_of(model)
            drafter.extend(part(hidden, 0, length), [length])
            draft = drafter.draft(torch.tensor([6]), GAMMA)
            assert draft.tokens.shape == draft.confidence.shape == (1, 1, GAMMA - 1, 1)
            logits = alone(model, masked(model, [6]), hidden, range(length))
            assert_reads(draft.best[0, 0], draft.best_confidence[0, 0], logits)

    @torch.no_grad()
    def test_branches_in_one_pass_equal_each_branch_alone(self, kind):
        model, hidden = tiny_drafter(GAMMA + 2, seed=1, **KINDS[kind]), features_of(20)
        first = [3, 9, 4, 12]
        lengths = [2, 0, 4, 1, 3]
        for length in (1, 2, 7, 8, 20):
            drafter = drafter_of(model)
            drafter.extend(part(hidden, 0, length), [length])
            branches = drafter.redraft(torch.tensor([6]), prefixes(first, lengths), GAMMA + 2)
            assert branches.tokens.shape == (1, 5, GAMMA + 1, 1)
            assert branches.kept.tolist() == [lengths]
            for row, kept in enumerate(lengths):
                logits = alone(model, masked(model, [6, *first[:kept]], GAMMA + 2), hidden, range(length))
                assert_branch(branches, row, logits, first[:kept])

    @torch.no_grad()
    def test_the_head_reads_all_tokens_as_one_matrix(self, kind):
        """For a view with gaps a linear layer copies its weight once a block: slower than the drafter itself."""
        drafter = drafter_of(tiny_drafter(GAMMA, **KINDS[kind]))
        drafter.extend(part(features_of(20), 0, 9), [9])
        seen, head = [], drafter._head
        drafter._head = lambda hidden: seen.append(hidden) or head(hidden)
        drafter.redraft(torch.tensor([6]), prefixes([3, 9, 4, 12], [2, 0, 1]), GAMMA)
        assert [(hidden.shape[:2], hidden.is_contiguous()) for hidden in seen] == [((1, 3 * (GAMMA - 1)), True)]

    @torch.no_grad()
    def test_what_is_drafted_leaves_no_trace_in_the_context(self, kind):
        model, hidden = tiny_drafter(GAMMA, **KINDS[kind]), features_of(20)
        drafter = drafter_of(model)
        drafter.extend(part(hidden, 0, 15), [15])
        drafter.draft(torch.tensor([6]), GAMMA)
        assert drafter.context.cache.get_seq_length() == 15
        drafter.extend(part(hidden, 15, 16), [16])
        drafter.redraft(torch.tensor([7]), prefixes([2, 3, 4, 5], [1, 2, 3]), GAMMA)
        assert drafter.context.cache.get_seq_length() == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_context_that_grew_by_cycles_equals_a_fresh_forward(kind, seed):
    """Tokens arrive one to five at a time, sometimes twice between drafts; nodes are picked out of a larger pass."""
    model, hidden = tiny_drafter(GAMMA, seed=seed, **KINDS[kind]), features_of(90, seed)
    generator = torch.Generator().manual_seed(seed)
    drafter, known = drafter_of(model), 3
    drafter.extend(part(hidden, 0, known), [known])
    while known < 80:
        accepted = int(torch.randint(1, GAMMA + 1, (), generator=generator))
        nodes = torch.randperm(10, generator=generator)[:accepted].sort().values
        tree = [torch.full((1, 10, WIDTH), 50.0) for _ in hidden]  # features of rejected nodes must not be read
        for layer, states in zip(tree, hidden):
            layer[:, nodes] = states[:, known : known + accepted]
        known += accepted
        drafter.extend(TargetPass(torch.empty(0), tuple(tree)), [known], nodes[None])
        if torch.rand((), generator=generator) < 0.3:
            continue
        if torch.rand((), generator=generator) < 0.5:
            draft = drafter.draft(torch.tensor([6]), GAMMA)
            logits = alone(model, masked(model, [6]), hidden, range(known))
            assert_reads(draft.best[0, 0], draft.best_confidence[0, 0], logits)
        else:
            branches = drafter.redraft(torch.tensor([6]), prefixes([4, 5, 9, 8], [3, 1]), GAMMA)
            for row, visible in enumerate(([6, 4, 5, 9], [6, 4])):
                logits = alone(model, masked(model, visible), hidden, range(known))
                assert_branch(branches, row, logits, visible[1:])


@pytest.mark.parametrize("backend", ["cpu", "packed", "sdpa", "eager"])
@pytest.mark.parametrize("kind", ["causal windows", "causal"])
@torch.no_grad()
def test_every_backend_shows_causal_blocks_earlier_tokens_alone(kind, backend, packed, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 0)
    model, hidden = tiny_drafter(GAMMA, **KINDS[kind]), features_of(30)
    drafter = Drafter(model, tiny_target(), backend=backend)
    for known in (2, 9, 30):
        drafter.extend(part(hidden, position_of(drafter), known), [known])
        branches = drafter.redraft(torch.tensor([6]), prefixes([4, 5, 9, 8], [3, 1]), GAMMA)
        for row, visible in enumerate(([6, 4, 5, 9], [6, 4])):
            logits = alone(model, masked(model, visible), hidden, range(known))
            assert_branch(branches, row, logits, visible[1:])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_reference_tells_contexts_apart(kind):
    """The control of the tests above: one token of context more or less shows in the confidences."""
    model, hidden = tiny_drafter(GAMMA, **KINDS[kind]), features_of(20)
    one, other = (
        alone(model, masked(model, [6]), hidden, known, position=20).softmax(-1) for known in (range(20), range(19))
    )
    assert (one - other).abs().max() > 1e-2


class Wrapped(nn.Module):
    """A head that can only be called, as a quantized one: no `weight` of its own."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden)


def target_with_head(wrapped: bool, bias: bool, seed: int = 0):
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, VOCAB, bias=bias)
    nn.init.normal_(head.weight)
    head.requires_grad_(False)
    if bias:
        nn.init.normal_(head.bias, std=3.0)
    module = Wrapped(head) if wrapped else head
    embed = tiny_target().get_input_embeddings()
    return SimpleNamespace(get_input_embeddings=lambda: embed, get_output_embeddings=lambda: module)


PRUNED = [19, 2, 3, 5, 8, 13, 22]  # in no order


def pruned_drafter(**changes):
    model = tiny_drafter(GAMMA, draft_vocab_size=len(PRUNED), **changes)
    model.draft_token_ids.copy_(torch.tensor(PRUNED))
    return model


class TestPrunedVocabulary:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("wrapped", [False, True])
    @torch.no_grad()
    def test_drafts_are_the_full_heads_argmax_among_the_listed_tokens(self, wrapped, bias):
        target, hidden, drafted = target_with_head(wrapped, bias), features_of(40), set()
        for seed in range(6):
            model = pruned_drafter(seed=seed)
            drafter = drafter_of(model, target)
            for known in (10, 12, 40):
                drafter.extend(part(hidden, position_of(drafter), known), [known])
                draft = drafter.draft(torch.tensor([6]), GAMMA)
                restricted = alone(model, masked(model, [6]), hidden, range(known), target=target)[:, PRUNED]
                best = restricted.softmax(-1).max(-1)
                assert draft.best[0, 0].tolist() == [PRUNED[i] for i in best.indices]
                torch.testing.assert_close(draft.best_confidence[0, 0], best.values, atol=1e-5, rtol=1e-5)
                drafted.update(draft.best[0, 0].tolist())
        assert len(drafted) > 3, "the map is hardly tested by few tokens"

    @torch.no_grad()
    def test_each_target_has_its_own_rows(self):
        model, hidden = pruned_drafter(), features_of(10)
        for seed in (0, 1, 0):
            target = target_with_head(False, True, seed)
            drafter = drafter_of(model, target)
            drafter.extend(part(hidden, 0, 10), [10])
            draft = drafter.draft(torch.tensor([6]), GAMMA)
            restricted = alone(model, masked(model, [6]), hidden, range(10), target=target)[:, PRUNED]
            torch.testing.assert_close(
                draft.best_confidence[0, 0], restricted.softmax(-1).amax(-1), atol=1e-5, rtol=1e-5
            )

    def test_a_target_that_changes_its_dtype_has_its_rows_gathered_anew(self):
        model, head = pruned_drafter(), target_with_head(False, True).get_output_embeddings().bfloat16()
        before = draft_head(model, head)
        assert before.weight.dtype == torch.bfloat16 and draft_head(model, head) is before
        head.float()
        assert draft_head(model, head).weight.tolist() == head.weight[PRUNED].tolist()

    @pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
    def test_a_pruned_pair_decodes_what_plain_generate_does(self, family):
        pair = D2SDAssistant.from_drafters(pruned_drafter(), pruned_drafter(seed=1))
        options = dict(do_sample=False, max_new_tokens=24)
        plain = tiny_target(family).generate(prompt(), **options)
        assert tiny_target(family).generate(prompt(), assistant_model=pair, **options).tolist() == plain.tolist()


class TestContext:
    def context(self):
        return DraftContext(drafter_of(tiny_drafter()).context.cache)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("cut", [24, 23, 20, 19, 11, 1])
    @torch.no_grad()
    def test_cut_forgets_cached_and_waiting_tokens(self, kind, cut):
        """20 tokens cached, 2 + 2 waiting; after the cut other tokens come."""
        model, hidden, others = tiny_drafter(GAMMA, **KINDS[kind]), features_of(40), features_of(40, seed=5)
        drafter = drafter_of(model)
        drafter.extend(part(hidden, 0, 20), [20])
        drafter.draft(torch.tensor([6]), GAMMA)
        drafter.extend(part(hidden, 20, 22), [22])
        drafter.extend(part(hidden, 22, 24), [24])
        drafter.context.cut(cut)
        assert drafter.context.positions == [cut]
        drafter.extend(part(others, cut, 28), [28])
        mixed = tuple(torch.cat([a[:, :cut], b[:, cut:]], dim=1) for a, b in zip(hidden, others))
        draft = drafter.draft(torch.tensor([6]), GAMMA)
        assert_reads(draft.best[0, 0], draft.best_confidence[0, 0], alone(model, masked(model, [6]), mixed, range(28)))

    @torch.no_grad()
    def test_cut_beyond_the_end_changes_nothing(self):
        model, hidden = tiny_drafter(GAMMA), features_of(20)
        drafter = drafter_of(model)
        drafter.extend(part(hidden, 0, 20), [20])
        drafter.context.cut(25)
        assert drafter.context.positions == [20]
        draft = drafter.draft(torch.tensor([6]), GAMMA)
        assert_reads(
            draft.best[0, 0], draft.best_confidence[0, 0], alone(model, masked(model, [6]), hidden, range(20))
        )

    @pytest.mark.parametrize("drafted_before", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    @torch.no_grad()
    def test_after_a_gap_only_what_follows_it_is_known(self, kind, drafted_before):
        """Another model decoded 5 tokens in between: their features are nowhere."""
        model, hidden = tiny_drafter(GAMMA, **KINDS[kind]), features_of(40)
        drafter = drafter_of(model)
        drafter.extend(part(hidden, 0, 20), [20])
        if drafted_before:
            drafter.draft(torch.tensor([6]), GAMMA)
        drafter.extend(part(hidden, 25, 30), [30])
        for known in (30, 33):
            drafter.extend(part(hidden, position_of(drafter), known), [known]) if known > 30 else None
            draft = drafter.draft(torch.tensor([6]), GAMMA)
            logits = alone(model, masked(model, [6]), hidden, range(25, known))
            assert_reads(draft.best[0, 0], draft.best_confidence[0, 0], logits)

    @torch.no_grad()
    def test_cut_to_before_a_gap_leaves_nothing(self):
        model, hidden = tiny_drafter(GAMMA), features_of(40)
        drafter = drafter_of(model)
        drafter.extend(part(hidden, 30, 36), [36])
        drafter.draft(torch.tensor([6]), GAMMA)
        drafter.extend(part(hidden, 36, 38), [38])
        drafter.context.cut(25)
        drafter.extend(part(hidden, 25, 29), [29])
        draft = drafter.draft(torch.tensor([6]), GAMMA)
        assert_reads(
            draft.best[0, 0], draft.best_confidence[0, 0], alone(model, masked(model, [6]), hidden, range(25, 29))
        )


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("pruned", [False, True])
    @pytest.mark.parametrize("family", ["llama", "gemma3_text"])
    def test_half_precision_drafters_serve_a_float32_target(self, family, pruned, dtype, monkeypatch):
        make = pruned_drafter if pruned else tiny_drafter
        pair = D2SDAssistant.from_drafters(make(**WINDOWED).to(dtype), make(seed=1).to(dtype))
        options = dict(do_sample=False, max_new_tokens=24)
        plain = tiny_target(family).generate(prompt(), **options)
        OracleDrafts(monkeypatch, plain[0], 0.6)
        assert tiny_target(family).generate(prompt(), assistant_model=pair, **options).tolist() == plain.tolist()
        assert pair.last_stats.mean_acceptance_length > 1

    @torch.no_grad()
    def test_a_bfloat16_draft_is_near_the_float32_one(self):
        model, hidden = tiny_drafter(GAMMA, initializer_range=0.2), features_of(20)
        drafter = drafter_of(copy.deepcopy(model).bfloat16())
        drafter.extend(part(hidden, 0, 20), [20])
        draft = drafter.draft(torch.tensor([6]), GAMMA)
        expected = alone(model, masked(model, [6]), hidden, range(20)).softmax(-1)
        given = expected.gather(-1, draft.best[0, 0][:, None]).squeeze(-1)
        torch.testing.assert_close(draft.best_confidence[0, 0], given, atol=0.05, rtol=0.1)
        assert draft.confidence.dtype == torch.float32

    def test_float32_drafters_serve_a_bfloat16_target(self):
        target = copy.deepcopy(tiny_target()).bfloat16()
        pair = D2SDAssistant.from_drafters(tiny_drafter(), pruned_drafter())
        out = target.generate(prompt(), assistant_model=pair, do_sample=False, max_new_tokens=16)
        assert out.shape == (1, 25)


class TestNativeParity:
    """The first drafter in Transformers' own decoding, `speculation_type="dflash"`, drafts the same blocks."""

    TOKENS = 40

    def patched(self, tokens: torch.Tensor, start: int, truth: torch.Tensor) -> torch.Tensor:
        """Of drafted tokens (γ-1,) at `start`, some made right; which ones depends on the place alone."""
        generator = torch.Generator().manual_seed(start)
        right = torch.rand(len(tokens), generator=generator) < 0.75
        true = nn.functional.pad(truth[start : start + len(tokens)], (0, max(0, start + len(tokens) - len(truth))))
        return torch.where(right, true, tokens)

    def native(self, patch, target, drafter, truth):
        """(start, drafted tokens, their probabilities) of each cycle in stock decoding."""
        seen, stock = [], DFlashTokenCandidateGenerator.get_candidates

        def get_candidates(generator, input_ids, *args, **kwargs):
            ids, logits = stock(generator, input_ids, *args, **kwargs)
            start = input_ids.shape[1]
            if ids.shape[1] > start:
                seen.append((start, ids[0, start:].tolist(), logits[0].softmax(-1).amax(-1).tolist()))
                ids = torch.cat([input_ids, self.patched(ids[0, start:], start, truth)[None]], dim=1)
            return ids, logits

        patch.setattr(DFlashTokenCandidateGenerator, "get_candidates", get_candidates)
        out = target.generate(
            truth[None, : self.length],
            assistant_model=drafter,
            speculation_type="dflash",
            do_sample=False,
            max_new_tokens=self.TOKENS,
        )
        assert out[0].tolist() == truth.tolist()
        return seen

    def ours(self, patch, target, pair, truth):
        seen, stock = [], Drafter.draft

        def draft(drafter, anchor, block_size, width):
            draft = stock(drafter, anchor, block_size, width)
            start = position_of(drafter) + 1
            seen.append((start, draft.best[0, 0].tolist(), draft.best_confidence[0, 0].tolist()))
            draft.best[0, 0] = self.patched(draft.best[0, 0], start, truth)
            return draft

        patch.setattr(Drafter, "draft", draft)
        out = target.generate(
            truth[None, : self.length],
            assistant_model=pair,
            d2sd_num_branches=0,
            do_sample=False,
            max_new_tokens=self.TOKENS,
        )
        assert out[0].tolist() == truth.tolist()
        return seen

    @pytest.mark.parametrize("length", [4, 23])
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "mistral"])
    def test_both_draft_the_same_tokens_in_every_cycle(self, family, kind, length, monkeypatch):
        target, self.length = tiny_target(family), length
        pair = D2SDAssistant.from_drafters(tiny_drafter(GAMMA, **KINDS[kind]), tiny_drafter(GAMMA, seed=1))
        truth = target.generate(prompt(length), do_sample=False, max_new_tokens=self.TOKENS)[0]
        with monkeypatch.context() as patch:
            native = self.native(patch, target, pair.first, truth)
        with monkeypatch.context() as patch:
            ours = self.ours(patch, target, pair, truth)
        assert [cycle[:2] for cycle in ours] == [cycle[:2] for cycle in native]
        for (*_, confidence), (*_, expected) in zip(ours, native):
            assert confidence == pytest.approx(expected, abs=1e-4)
        assert len(ours) < self.TOKENS / 1.5, "several tokens a cycle must be accepted"
