"""Sampled text has the target's distribution: against exact probabilities, and draw for draw against `generate`."""

import collections
import functools
import itertools
import random
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
import transformers as tf
from tiny import FAMILIES, OracleDrafts, image_inputs, prompt, tiny_assistant, tiny_target
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel, decoding
from hf_d2sd.cache import TreeCache
from hf_d2sd.choosing import Chooser, Choosers
from hf_d2sd.decoding import Batch, decode
from hf_d2sd.drafting import Drafter
from hf_d2sd.growing import State, grow
from hf_d2sd.observing import Observer
from hf_d2sd.options import DecodingOptions
from hf_d2sd.stats import D2SDStats
from hf_d2sd.target import Target, TargetPass

VOCAB, NEW = 5, 4  # one token from the prefill, three from trees
PROMPT = torch.tensor([[1, 3, 2, 0, 3]])
SETTINGS = {
    "temperature": (dict(temperature=1.3), lambda: [TemperatureLogitsWarper(1.3)]),
    "top_k": (dict(top_k=3), lambda: [TopKLogitsWarper(3)]),
    "top_p": (dict(top_p=0.8), lambda: [TopPLogitsWarper(0.8)]),
    "repetition_penalty": (dict(repetition_penalty=1.8), lambda: [RepetitionPenaltyLogitsProcessor(1.8)]),
}


@functools.cache
def target():
    torch.manual_seed(4)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8)
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = tf.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, initializer_range=0.35, **sizes, **special)
    return tf.LlamaForCausalLM(config).eval()


@functools.cache
def assistant(path_rank: int | None = None):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    drafters = []
    for seed, block_size in enumerate((4, 5)):
        torch.manual_seed(seed)
        config = D2SDDrafterConfig(
            vocab_size=VOCAB,
            num_key_value_heads=1,
            initializer_range=0.35,
            block_size=block_size,
            mask_token_id=0,
            target_layer_ids=[0, 1],
            num_target_layers=2,
            path_rank=path_rank,
            path_candidates=4,
            **sizes,
        )
        drafters.append(D2SDDrafterModel(config).eval())
        if path_rank is not None:
            torch.nn.init.normal_(drafters[-1].path_head.candidate.weight, std=0.6)
    return D2SDAssistant.from_drafters(*drafters, num_branches=3)


@torch.no_grad()
def exact_distribution(processors) -> dict[tuple[int, ...], float]:
    """The probability of every text of NEW tokens, by plain forwards without a cache."""
    texts = {(): 1.0}
    for _ in range(NEW):
        longer = {}
        for text, probability in texts.items():
            ids = torch.cat([PROMPT, torch.tensor([text], dtype=torch.long)], dim=1)
            scores = processors(ids, target()(ids, use_cache=False).logits[:, -1].float())
            for token, share in enumerate(scores.double().softmax(-1)[0].tolist()):
                longer[(*text, token)] = probability * share
        texts = longer
    return texts


def p_value(drawn: list[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Of the chi-square test; cells that expect fewer than 5 are pooled. What cannot happen must not have."""
    counts = collections.Counter(drawn)
    if any(expected[text] == 0 for text in counts):
        return 0.0
    cells, rest = [], [0.0, 0.0]
    for text, probability in expected.items():
        count, mean = counts[text], probability * len(drawn)
        if mean >= 5:
            cells.append((count, mean))
        else:
            rest = [rest[0] + count, rest[1] + mean]
    if rest[1] > 0:
        cells.append(tuple(rest))
    observed, means = zip(*cells)
    return scipy.stats.chisquare(observed, means, sum_check=False).pvalue


def marginal(expected, positions) -> dict[tuple[int, ...], float]:
    result = collections.defaultdict(float)
    for text, probability in expected.items():
        result[tuple(text[i] for i in positions)] += probability
    return result


def worst_p_value(drawn, expected) -> float:
    """Over each token alone, the three tokens that trees give, and all of them together."""
    views = [(i,) for i in range(NEW)] + [tuple(range(1, NEW)), tuple(range(NEW))]
    return min(p_value([tuple(text[i] for i in view) for text in drawn], marginal(expected, view)) for view in views)


class Replay:
    """The decoding loop with its forwards remembered: a tree and its logits depend on the tokens so far alone.

    For each prefix that occurs, prefill, drafting, merging and verification run once, for real; the chooser, the walk
    and the loop run every time. So 20,000 texts take seconds.
    """

    def __init__(self, monkeypatch, processors, path_rank: int | None = None, **options):
        self.processors, self.known = LogitsProcessorList(processors), {}
        self.assistant = assistant(path_rank)
        shape = {"num_branches": 3, "tree_budget": None, "block_size": 4, "second_block_size": 5}
        self.options = DecodingOptions(**{**shape, **options})
        self.device, self.positions, self.stats = torch.device("cpu"), [PROMPT.shape[1]], D2SDStats()
        monkeypatch.setattr(decoding, "grow", lambda state: self.look_up()[0])
        self.first_logits = self.real_target(PROMPT)[1][-1].logits

    def real_target(self, input_ids):
        real = Target(target(), TreeCache.take_over(target().config, DynamicCache()), {0, 1})
        return real, list(real.prefill(input_ids, input_ids.shape[1]))

    def look_up(self):
        prefix = tuple(self.chooser.sequence[0].tolist())
        if prefix not in self.known:
            sequence = torch.tensor([prefix])
            real, passes = self.real_target(sequence[:, :-1])
            drafters = [Drafter(model, target()) for model in self.assistant.drafters]
            for drafter in drafters:
                drafter.extend(passes[0], real.positions)
            tree = grow(State(sequence[:, -1], drafters, self.options, [self.chooser.room]))
            self.known[prefix] = tree, real.verify(tree).logits
        return self.known[prefix]

    def verify(self, tree):
        tree, logits = self.look_up()
        return TargetPass(logits, (torch.empty(1, len(tree), 0),))

    def commit(self, step, paths, counts):
        pass

    @torch.no_grad()
    def text(self, chooser_class=Chooser) -> tuple[int, ...]:
        criteria = StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + NEW)])
        choosers = Choosers(PROMPT, self.processors, criteria, do_sample=True)
        self.chooser = choosers.rows[0]
        self.chooser.__class__ = chooser_class
        prefilled = [TargetPass(self.first_logits, (torch.empty(1, PROMPT.shape[1], 0),))]
        decode(Batch(self, [Blind()], choosers, self.options), prefilled, Observer(self.stats))
        return tuple(self.chooser.sequence[0, PROMPT.shape[1] :].tolist())


class Blind:
    """Stands where the drafters do; `Replay` runs the real ones."""

    words = SimpleNamespace(add=lambda tokens: None)  # of the text, which nothing is drafted of
    reads_text = False

    def extend(self, *args):
        pass


def check_frequencies(monkeypatch, name, draws, **options):
    processors = LogitsProcessorList(SETTINGS[name][1]())
    replay = Replay(monkeypatch, processors, **options)
    torch.manual_seed(0)
    drawn = [replay.text() for _ in range(draws)]
    assert worst_p_value(drawn, exact_distribution(processors)) > 1e-4
    assert replay.stats.mean_acceptance_length > 1.2, "trees must be accepted, or the walk is not tested"
    assert len(replay.stats.acceptance_histogram) >= 3


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_occur_as_often_as_the_target_says(monkeypatch, name):
    check_frequencies(monkeypatch, name, 4000)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_texts_occur_as_often_as_the_target_says_in_20000_draws(monkeypatch, name):
    check_frequencies(monkeypatch, name, 20_000)


@pytest.mark.parametrize("options", [{}, {"tree_width": 3, "tree_budget": 9}], ids=["branches", "wide"])
def test_texts_occur_as_often_with_path_heads(monkeypatch, options):
    check_frequencies(monkeypatch, "temperature", 4000, path_rank=4, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_20000_calls_of_generate_have_the_targets_distribution(name):
    options, processors = SETTINGS[name]
    torch.manual_seed(0)
    settings = dict(do_sample=True, top_k=0, max_new_tokens=NEW, assistant_model=assistant())
    drawn = [
        tuple(target().generate(PROMPT, **{**settings, **options})[0, PROMPT.shape[1] :].tolist())
        for _ in range(20_000)
    ]
    assert worst_p_value(drawn, exact_distribution(LogitsProcessorList(processors()))) > 1e-4


@pytest.mark.parametrize("share", [1.0, 0.15])
def test_a_chooser_that_favours_drafts_is_found_out(monkeypatch, share):
    """The control of the tests above: with this probability the first drafted child is taken, whatever the target."""
    processors = LogitsProcessorList(SETTINGS["temperature"][1]())
    replay = Replay(monkeypatch, processors)
    coin = random.Random(0)

    class Biased(Chooser):
        def choose(self, node):
            if self.length > PROMPT.shape[1] and coin.random() < share:
                children = (replay.tree.parents[0] == node).nonzero().flatten()
                if len(children):
                    self._logits = self._logits.clone()
                    self._logits[node] = torch.where(
                        torch.arange(VOCAB) == replay.tree.tokens[0, children[0]], 0.0, -torch.inf
                    )
            return super().choose(node)

        def look(self, logits):
            if self.length > PROMPT.shape[1]:
                replay.tree = replay.look_up()[0]
            return super().look(logits)

    torch.manual_seed(0)
    drawn = [replay.text(Biased) for _ in range(4000)]
    assert worst_p_value(drawn, exact_distribution(processors)) < 1e-8


def test_the_replay_draws_what_generate_draws(monkeypatch):
    """Remembering forwards changes nothing: seed for seed the same texts as the whole of `generate`."""
    replay = Replay(monkeypatch, SETTINGS["temperature"][1]())
    replayed = []
    for seed in range(40):
        torch.manual_seed(seed)
        replayed.append(replay.text())
    monkeypatch.undo()
    for seed in range(40):
        torch.manual_seed(seed)
        settings = dict(do_sample=True, temperature=1.3, top_k=0, max_new_tokens=NEW)
        out = target().generate(PROMPT, assistant_model=replay.assistant, **settings)
        assert tuple(out[0, PROMPT.shape[1] :].tolist()) == replayed[seed]
    assert len(set(replayed)) > 20


def test_exact_probabilities_sum_to_one_and_leave_no_text_certain():
    for _, processors in SETTINGS.values():
        expected = exact_distribution(LogitsProcessorList(processors()))
        assert set(expected) == set(itertools.product(range(VOCAB), repeat=NEW))
        assert sum(expected.values()) == pytest.approx(1, abs=1e-6)
        assert max(expected.values()) < 0.5


# Each alone, and then mixes of them; 200 prompts go through them in turn.
MIXES = [
    dict(temperature=0.7),
    dict(temperature=1.7, top_k=6),
    dict(top_p=0.7),
    dict(top_p=0.9, top_k=10, temperature=1.2),
    dict(min_p=0.05),
    dict(min_p=0.2, temperature=2.0),
    dict(typical_p=0.6),
    dict(eta_cutoff=0.03),
    dict(epsilon_cutoff=0.03),
    dict(repetition_penalty=1.5),
    dict(repetition_penalty=0.8, top_k=5),
    dict(no_repeat_ngram_size=2),
    dict(no_repeat_ngram_size=2, temperature=1.5, top_k=12),
    dict(typical_p=0.9, repetition_penalty=1.2, no_repeat_ngram_size=3),
    dict(temperature=1.4, min_p=0.02, eta_cutoff=0.005, epsilon_cutoff=0.005),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_gives_the_text_of_plain_generate(family, monkeypatch):
    """200 prompts over the ten families, with drafts that are right at 0, 50 or 90 percent of the positions."""
    model, cycles, tokens = tiny_target(family), 0, 0
    for case in range(20):
        seed = 20 * FAMILIES.index(family) + case
        length = 2 + seed % 23
        inputs = image_inputs(length, seed) if family == "gemma3_image" else {"input_ids": prompt(length, seed)}
        options = dict(do_sample=True, max_new_tokens=14, **MIXES[seed % len(MIXES)])
        tf.set_seed(seed)
        plain = model.generate(**inputs, **options)
        pair = tiny_assistant(4, 6)
        with monkeypatch.context() as patch:
            if seed % 3:
                OracleDrafts(patch, plain[0], (0.5, 0.9)[seed % 3 - 1], seed=seed)
            tf.set_seed(seed)
            ours = model.generate(**inputs, assistant_model=pair, **options)
        assert ours.tolist() == plain.tolist(), (seed, options)
        cycles, tokens = cycles + pair.last_stats.cycles, tokens + pair.last_stats.new_tokens
    assert tokens / cycles > 1.5, "drafts must be accepted, or the order of draws is not tested"


def test_another_seed_gives_another_text():
    texts = set()
    for seed in range(5):
        tf.set_seed(seed)
        out = tiny_target().generate(prompt(), do_sample=True, max_new_tokens=14, assistant_model=tiny_assistant())
        texts.add(tuple(out[0].tolist()))
    assert len(texts) == 5
