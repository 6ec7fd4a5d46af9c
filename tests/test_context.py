"""The text so far as a source: its index against brute force, its probabilities, its nodes in trees, and its text."""

import math
import random

import pytest
import torch
from recurrent import FAMILIES as RECURRENT
from recurrent import recurrent_target
from test_generate import tokenizer as tokenizer  # noqa: F401, a fixture
from tiny import FAMILIES, VOCAB, image_inputs, prompt, tiny_assistant, tiny_target
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, pipeline

from hf_d2sd import D2SDAssistant, SourceStreamer, bind
from hf_d2sd.benchmark.replaying import Text, replay
from hf_d2sd.candidates import join
from hf_d2sd.context import CELLS, DEPTH, LENGTHS, ContextIndex, ContextSource, Continuations, HitRates, cell_of
from hf_d2sd.modeling import CACHE_NAME
from hf_d2sd.options import settle
from hf_d2sd.training.features import compute_features
from hf_d2sd.training.shards import Row
from hf_d2sd.tree import CONTEXT_RANK, Candidates, CandidateTree

POLICIES = {
    "paper": dict(d2sd_context=6),
    "levels": dict(d2sd_levels=3, d2sd_context=6),
    "samples": dict(d2sd_branch_source="samples", d2sd_context=6),
    "chain": dict(d2sd_num_branches=0, d2sd_context=6, d2sd_tree_budget=8),
    "wide": dict(d2sd_tree_width=3, d2sd_tree_budget=12),
    "ddtree": dict(d2sd_num_branches=0, d2sd_tree_width=3, d2sd_tree_budget=12),
}


def random_text(length: int, letters: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(letters) for _ in range(length)]


# The index -----------------------------------------------------------------------------------------------------------


def matches_by_brute_force(text: list[int]) -> list[tuple[int, int]]:
    """All places behind tokens that are the text's last ones: the longest of `LENGTHS`, then the latest first."""
    found = {}
    for level, length in enumerate(LENGTHS):
        for place in range(length, len(text)):
            if text[place - length : place] == text[len(text) - length :]:
                found[place] = level
    return sorted(((level, place) for place, level in found.items()), key=lambda match: (-match[0], -match[1]))


@pytest.mark.parametrize("letters", [1, 2, 3, 8, 40])
def test_the_index_finds_all_occurrences_the_longest_match_first(letters):
    longest = 0
    for seed in range(20):
        index, text = ContextIndex(), []
        for token in random_text(60, letters, seed):
            text.append(token)
            index.extend([token])
            expected = matches_by_brute_force(text)
            assert list(index.matches(most=100)) == expected
            assert list(index.matches(most=3)) == expected[:3]
            longest = max([longest, *(level for level, _ in expected)])
    assert longest >= 1


def test_an_index_that_grew_is_one_that_was_made_at_once():
    text = random_text(200, 3, 0)
    grown = ContextIndex(text[:50])
    assert len(grown.continuations) > 0, "what is remembered of the shorter text must go"
    for start in range(50, 200, 7):
        grown.extend(text[start : start + 7])
    whole = ContextIndex(text)
    assert (grown.tokens, grown._latest, grown._earlier) == (whole.tokens, whole._latest, whole._earlier)
    assert grown.continuations.tokens == whole.continuations.tokens


def test_what_follows_goes_on_as_a_repetition_where_the_text_ends():
    index = ContextIndex([7, 1, 2, 3, 1, 2, 3])
    assert index.following(4, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert index.following(1, 4) == [1, 2, 3, 1]
    assert ContextIndex([5, 5]).following(1, 3) == [5, 5, 5]


# Continuations and what they are worth -------------------------------------------------------------------------------


def paths_of(tokens, parents, exists=None) -> list[tuple[int, ...]]:
    """Each node's tokens from the top; parents come first."""
    paths: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tokens, parents)):
        assert parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return [path for node, path in enumerate(paths) if exists is None or exists[node]]


def test_continuations_are_what_followed_the_matches_each_path_once():
    for seed in range(30):
        index = ContextIndex(random_text(80, 3, seed))
        found = index.continuations
        paths = paths_of(found.tokens, found.parents)
        assert len(paths) == len(set(paths))
        expected = {
            tuple(index.following(place)[: depth + 1]) for _, place in index.matches() for depth in range(DEPTH)
        }
        assert set(paths) == expected


def test_probabilities_fall_with_depth_and_those_of_siblings_share_one():
    rates = HitRates()
    several = 0
    for seed in range(30):
        found = ContextIndex(random_text(80, 3, seed)).continuations
        chances = found.chances(rates)
        totals = {}
        for node, parent in enumerate(found.parents):
            above = chances[parent] if parent >= 0 else 1.0
            assert 0 < chances[node] <= above
            totals.setdefault(parent, []).append(chances[node] / above)
        several += sum(len(shares) > 1 for shares in totals.values())
        assert max(sum(shares) for shares in totals.values()) <= 1 + 1e-9
    assert several > 100


def test_a_longer_match_is_worth_more_until_the_text_says_otherwise():
    rates = HitRates()
    short, long = ContextIndex([1, 2, 9, 8, 3, 1]), ContextIndex([*range(20), 99, *range(20)])
    first = [found.continuations.chances(rates)[0] for found in (short, long)]
    assert first[0] < first[1]
    for _ in range(200):
        long.continuations.learn([55], rates)
        short.continuations.learn([2], rates)
    first = [found.continuations.chances(rates)[0] for found in (short, long)]
    assert first[0] > 0.9 and first[1] < 0.1


def test_only_what_the_target_reached_is_counted():
    found = Continuations()
    found.add(2, [1, 2, 3])
    found.add(1, [1, 5])
    found.add(0, [4])
    rates = HitRates()
    counted = []
    rates.count = lambda cell, is_right: counted.append((*CELLS[cell][:3], is_right))
    found.learn([1, 5, 7], rates)
    assert counted == [(2, 1, 0, True), (2, 2, 0, False), (1, 2, 1, True)]
    counted.clear()
    found.learn([9], rates)
    assert counted == [(2, 1, 0, False), (0, 1, 1, False)]


def test_every_node_has_its_cell():
    for level in range(len(LENGTHS)):
        for depth, behind, support in ((1, 0, 1), (2, 1, 2), (3, 4, 3), (4, 0, 9), (5, 2, 1), (24, 0, 1)):
            deep = {1: 1, 2: 2, 3: 3, 4: 3}.get(depth, 4)
            assert CELLS[cell_of(level, depth, behind, support)] == (level, deep, min(behind, 1), min(support, 3))


def test_hit_rates_are_means_of_what_was_seen_and_sixteen_nodes_of_the_prior():
    rates = HitRates()
    before = rates.means[7]
    for is_right in (True, False, True, True):
        rates.count(7, is_right)
    assert rates.means[7] == pytest.approx((16 * before + 3) / 20)
    assert rates.means[8] == HitRates().means[8]


def test_the_best_nodes_of_a_row_are_a_tree():
    source = ContextSource([random_text(80, 3, seed) for seed in range(6)])
    for row in range(6):
        every = source.best(row, 10_000)
        for count in (1, 2, 5, 17):
            best = source.best(row, count)
            assert len(best) == min(count, len(every))
            paths = paths_of(best.tokens, best.parents)
            assert list(map(len, paths)) == best.depths
            assert sorted(best.scores) == sorted(every.scores, reverse=True)[:count][::-1]


def test_rows_without_a_match_are_filled_up():
    source = ContextSource([[1, 2, 3, 1], [4, 5, 6, 7]])
    proposed = source.propose(5, torch.device("cpu"))
    assert proposed.exists.tolist() == [[True] * 5, [False] * 5]
    assert proposed.tokens[0].tolist() == [2, 3, 1, 2, 3]
    source.select([1])
    assert source.propose(5, torch.device("cpu")) is None


# Two sources in one tree ---------------------------------------------------------------------------------------------


def random_candidates(seed: int, rank: int, rows: int = 3, size: int = 14) -> Candidates:
    generator = random.Random(seed)
    columns = {name: [] for name in ("tokens", "parents", "depths", "scores", "exists")}
    for _ in range(rows):
        nodes: dict[tuple[int, ...], tuple] = {}
        while len(nodes) < size:
            parent = generator.choice([(), *nodes])
            path = (*parent, generator.randrange(3))
            if len(path) <= 5 and path not in nodes:
                above = nodes[parent][3] if parent else 0.0
                place = list(nodes).index(parent) if parent else -1
                nodes[path] = (path[-1], place, len(path), above + math.log(generator.uniform(0.05, 1)), True)
        own = generator.randrange(size)  # the nodes behind it do not exist
        for name, values in zip(columns, zip(*nodes.values())):
            columns[name].append(list(values) if name != "exists" else [at <= own for at in range(size)])
    fields = {name: torch.tensor(values) for name, values in columns.items()}
    return Candidates(**fields, ranks=torch.full((rows, size), rank), deepest=5, chains=None)


def chances(candidates: Candidates, row: int) -> dict[tuple[int, ...], float]:
    """By path, its nodes' probabilities given their parents."""
    paths = paths_of(candidates.tokens[row].tolist(), candidates.parents[row].tolist())
    scores = dict(zip(paths, candidates.scores[row].tolist()))
    exists = dict(zip(paths, candidates.exists[row].tolist()))
    return {path: math.exp(scores[path] - scores.get(path[:-1], 0.0)) for path in paths if exists[path]}


def test_joined_candidates_are_the_union_and_shared_nodes_are_right_unless_both_are_wrong():
    shared = 0
    for seed in range(40):
        first, second = random_candidates(seed, 2), random_candidates(1000 + seed, CONTEXT_RANK)
        joined = join(first, second)
        for row in range(3):
            one, other = chances(first, row), chances(second, row)
            exists = joined.exists[row].tolist()
            paths = paths_of(joined.tokens[row].tolist(), joined.parents[row].tolist())
            kept = [path for path, there in zip(paths, exists) if there]
            assert sorted(kept) == sorted(set(one) | set(other)), "each once"
            for path, score, rank, there in zip(paths, joined.scores[row].tolist(), joined.ranks[row], exists):
                if not there:
                    continue
                wrong = [
                    (1 - one.get(path[:depth], 0.0)) * (1 - other.get(path[:depth], 0.0))
                    for depth in range(1, len(path) + 1)
                ]
                assert score == pytest.approx(sum(math.log(1 - each) for each in wrong), abs=1e-4)
                assert int(rank) == (2 if path in one else CONTEXT_RANK)
                shared += path in one and path in other
    assert shared > 100


def test_a_tree_of_joined_candidates_holds_parents_of_all_its_nodes():
    for seed in range(40):
        joined = join(random_candidates(seed, 2), random_candidates(1000 + seed, CONTEXT_RANK))
        tree = CandidateTree.from_candidates(torch.zeros(3).long(), joined, budget=9)
        for row in range(3):
            one = tree.row(row)
            for node, parent in enumerate(one.parents.tolist()[1:], 1):
                assert 0 <= parent < node and one.depths[parent] == one.depths[node] - 1
                assert one.scores[node] <= one.scores[parent]


# Decoding ------------------------------------------------------------------------------------------------------------

NEW = 40


def repetitive(seed: int = 0) -> torch.Tensor:
    """(1, 24): a passage, and its beginning again."""
    passage = prompt(14, seed)
    return torch.cat([passage, passage[:, :10]], dim=1)


def run(family: str, assistant, inputs=None, **options) -> torch.Tensor:
    inputs = repetitive() if inputs is None else inputs
    given = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    return tiny_target(family).generate(**given, assistant_model=assistant, **options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_greedy_text_of_every_policy_is_plain_generates(policy, family):
    pair, found = tiny_assistant(4, 6), 0
    for seed in range(3):
        plain = run(family, None, repetitive(seed))
        assert run(family, pair, repetitive(seed), **POLICIES[policy]).equal(plain)
        stats = pair.last_stats
        found += stats.tokens_by_source["context"]
        assert sum(stats.tokens_by_source.values()) == stats.new_tokens == 1 + sum(stats.committed_per_cycle) == NEW
        assert stats.branch_hits[CONTEXT_RANK] == stats.tokens_by_source["context"]
    assert found > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_assistant_without_drafters_decodes_for_any_target(family):
    assistant = D2SDAssistant.from_context()
    found = 0
    for seed in range(3):
        inputs = image_inputs(9, seed) if family == "gemma3_image" else repetitive(seed)
        plain = run(family, None, inputs)
        bind(assistant, tiny_target(family))
        assert run(family, assistant, inputs).equal(plain)
        assert max(assistant.last_stats.tree_sizes) <= 16
        found += assistant.last_stats.tokens_by_source["context"]
        assert set(assistant.last_stats.token_sources) <= {"context", "target"}
    assert found > 0


@pytest.mark.parametrize("family", RECURRENT)
def test_it_decodes_for_recurrent_targets_too(family):
    target, inputs, assistant = recurrent_target(family), repetitive(), D2SDAssistant.from_context(tree_budget=6)
    options = dict(do_sample=False, max_new_tokens=24)
    plain = target.generate(inputs, **options)
    assert target.generate(inputs, assistant_model=assistant, **options).equal(plain)
    assert assistant.last_stats.mean_tree_size > 1.5


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
    for at, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[at, place], mask[at, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


ASSISTANTS = {
    "context alone": (D2SDAssistant.from_context, {}),
    "wide": (lambda: tiny_assistant(4, 6), POLICIES["wide"]),
    "paper": (lambda: tiny_assistant(4, 6), POLICIES["paper"]),
}


@pytest.mark.parametrize("way", ASSISTANTS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_each_plain_generates_and_end_by_themselves(side, way):
    rows = [repetitive(seed)[0, : 24 - 5 * (seed % 3)] for seed in range(5)]
    alone = [run("llama", None, row[None])[0, len(row) :].tolist() for row in rows]
    ends = {token: sum(token in row for row in alone) for token in range(2, VOCAB)}
    eos = max(ends, key=lambda token: min(ends[token], 5 - ends[token]))
    truths = [row[: row.index(eos) + 1] if eos in row else row for row in alone]
    make, options = ASSISTANTS[way]
    assistant, inputs = make(), padded(rows, side)
    out = run("llama", assistant, inputs, eos_token_id=eos, pad_token_id=0, **options)
    width, longest = inputs["input_ids"].shape[1], max(map(len, truths))
    assert out[:, width:].tolist() == [row + [0] * (longest - len(row)) for row in truths]
    assert len(set(map(len, truths))) > 1, "rows must end at different places"
    assert assistant.last_stats.tokens_by_source["context"] > 0
    assert assistant.last_stats.new_tokens == sum(map(len, truths))


def test_padding_is_no_text(monkeypatch):
    texts = []
    stock = ContextSource.__init__
    monkeypatch.setattr(
        ContextSource,
        "__init__",
        lambda source, rows: stock(source, texts := [list(row) for row in rows]) or seen(texts),
    )
    seen = texts.extend
    rows = [repetitive()[0], repetitive(1)[0, :7]]
    for side in ("left", "right"):
        texts.clear()
        run("llama", D2SDAssistant.from_context(), padded(rows, side), pad_token_id=0)
        assert texts == [row.tolist() for row in rows]


@pytest.mark.parametrize("way", ASSISTANTS)
def test_sampling_with_a_seed_gives_plain_generates_text(way):
    make, options = ASSISTANTS[way]
    target, assistant, found = tiny_target("llama"), make(), 0
    for seed in range(6):
        texts = []
        for arguments in ({}, {"assistant_model": assistant, **options}):
            torch.manual_seed(seed)
            sampled = target.generate(repetitive(), do_sample=True, max_new_tokens=NEW, **arguments)
            texts.append(sampled.tolist())
        assert texts[0] == texts[1]
        found += assistant.last_stats.tokens_by_source["context"]
    assert found > 0


def test_streamed_pieces_name_the_context(tokenizer):  # noqa: F811
    assistant = D2SDAssistant.from_context()
    streamer = SourceStreamer(tokenizer, assistant, skip_special_tokens=False)
    out = run("llama", assistant, streamer=streamer)
    pieces = list(streamer)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(out[0, 24:])
    assert [piece.source for piece in pieces] == assistant.last_stats.token_sources
    assert "context" in {piece.source for piece in pieces}


@pytest.mark.parametrize("way", ASSISTANTS)
@pytest.mark.parametrize("only_new", [False, True])
def test_the_next_turn_goes_on_from_the_cache(only_new, way):
    make, options = ASSISTANTS[way]
    assistant = make()
    one = run("llama", assistant, return_dict_in_generate=True, **options)
    whole = torch.cat([one.sequences, prompt(5, 7)], dim=1)
    given = whole[:, one[CACHE_NAME].get_seq_length() :] if only_new else whole
    mask = torch.ones_like(whole)
    inputs = {"input_ids": given, "attention_mask": mask, CACHE_NAME: one[CACHE_NAME]}
    expected = run("llama", None, {"input_ids": whole, "attention_mask": mask})[0, whole.shape[1] :]
    assert run("llama", assistant, inputs, **options)[0, given.shape[1] :].equal(expected)
    again = run("llama", assistant, {"input_ids": whole[:, :-9]}, **options)  # a text that was cut
    assert again.equal(run("llama", None, {"input_ids": whole[:, :-9]}))


class Fives(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 4


@pytest.mark.parametrize("way", ASSISTANTS)
def test_criteria_that_cut_the_texts_of_a_batch_hold_to_the_token(way):
    make, options = ASSISTANTS[way]
    inputs, criteria = padded([repetitive(seed)[0] for seed in range(3)], "left"), StoppingCriteriaList([Fives()])
    plain = run("llama", None, inputs, stopping_criteria=criteria, pad_token_id=0)
    assert run("llama", make(), inputs, stopping_criteria=criteria, pad_token_id=0, **options).equal(plain)


def test_embeddings_as_a_prompt_leave_the_generated_text_as_the_source():
    embeds = {"inputs_embeds": tiny_target("llama").get_input_embeddings()(repetitive()).detach()}
    assistant = D2SDAssistant.from_context()
    assert run("llama", assistant, embeds, max_new_tokens=60).equal(run("llama", None, embeds, max_new_tokens=60))
    assert assistant.last_stats.tokens_by_source["context"] > 0


def test_a_text_that_repeats_itself_yields_more_tokens_a_pass():
    """A target that writes a passage over and over, once it has read it one and a half times."""
    target, pair = tiny_target("llama"), tiny_assistant(4, 6)
    row = Row(prompt(12)[0].repeat(5), 18)
    text = Text(row.tokens, row.prompt_length, lambda layers: compute_features(target, [row], layers)[0])
    lengths = {}
    for nodes in (0, 11):
        options = settle(pair, GenerationConfig(**{**POLICIES["wide"], "d2sd_context": nodes}))
        counts = replay(pair, target, [text], options, 42, [VOCAB - 1])
        assert counts.tokens == 41
        lengths[nodes] = counts.tokens / counts.passes
    assert lengths[0] < 2 and lengths[11] > 6


def test_the_published_tree_stays_what_the_paper_says_unless_asked():
    pair = tiny_assistant(4, 6)
    run("llama", pair)
    assert pair.last_stats.tokens_by_source["context"] == 0
    run("llama", pair, **POLICIES["wide"], d2sd_context=0)
    assert pair.last_stats.tokens_by_source["context"] == 0
    run("llama", pair, **POLICIES["wide"], d2sd_trace=True)
    assert "context" in {source for cycle in pair.last_stats.trace for source in cycle.sources}


def test_no_more_nodes_come_from_the_context_than_the_option_says():
    pair = tiny_assistant(4, 6)
    for nodes in (1, 3):
        run("llama", pair, d2sd_context=nodes, d2sd_trace=True)
        counts = {cycle.sources.count("context") for cycle in pair.last_stats.trace}
        assert max(counts) == nodes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d2sd_context=-1), "d2sd_context is -1"),
        (dict(d2sd_context=4, d2sd_compile=True), "d2sd_compile asks for cycles of fixed shapes"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        run("llama", tiny_assistant(4, 6), **options)


class TestWithoutDrafters:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(d2sd_num_branches=2), "without drafters has no branches"),
            (dict(d2sd_compile=True), "there is no drafter"),
        ],
    )
    def test_what_needs_a_drafter_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            run("llama", D2SDAssistant.from_context(), **options)

    def test_there_is_nothing_to_save(self, tmp_path):
        with pytest.raises(ValueError, match="without drafters has nothing to save"):
            D2SDAssistant.from_context().save_pretrained(tmp_path)

    def test_the_budget_is_the_calls_or_its_own(self):
        assistant = D2SDAssistant.from_context(tree_budget=5)
        for options, most in (({}, 5), (dict(d2sd_tree_budget=9), 9), (dict(d2sd_context=2), 3)):
            run("llama", assistant, **options)
            assert max(assistant.last_stats.tree_sizes) == most
        run("llama", assistant, d2sd_tree_budget=1)
        assert assistant.last_stats.mean_acceptance_length == 1

    def test_it_returns_what_plain_generate_does(self):
        options = dict(return_dict_in_generate=True, output_scores=True, output_hidden_states=True)
        one, other = (run("llama", assistant, **options) for assistant in (None, D2SDAssistant.from_context()))
        assert one.sequences.equal(other.sequences)
        for name in ("scores", "hidden_states"):
            for a, b in zip(getattr(one, name), getattr(other, name), strict=True):
                for x, y in zip(*((a, b) if name == "hidden_states" else ((a,), (b,))), strict=True):
                    torch.testing.assert_close(x, y, atol=5e-3, rtol=5e-3)

    def test_a_pipeline_takes_it_with_each_call(self, tokenizer):  # noqa: F811
        pipe = pipeline("text-generation", model=tiny_target("llama"), tokenizer=tokenizer)
        options = dict(do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        assistant, plain = D2SDAssistant.from_context(), pipe("abcdefabcd", **options)
        assert pipe("abcdefabcd", assistant_model=assistant, **options) == plain
        assert assistant.last_stats.new_tokens == NEW
