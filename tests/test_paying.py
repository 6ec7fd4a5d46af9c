"""What pays: the rule against every policy that there is, and what trying may cost."""

import itertools
import random
from collections import Counter

import pytest

from hf_d2sd.costs import AHEAD, BEGINNING, FIRST, ONCE, PASS, REST, SECOND, CostTable, Curve, Savings
from hf_d2sd.paying import (
    FEW,
    LUCK,
    MOST,
    SHARE,
    Decisions,
    Offer,
    Pace,
    Purse,
    best,
    manner_of,
    purse_out_of,
    trees,
    weights,
)


def rate_of(policy, situations) -> float:
    """Tokens a plain step of a policy, an offer for each situation, all situations being as frequent."""
    return sum(offer.tokens for offer in policy) / sum(offer.cost for offer in policy)


@pytest.mark.parametrize("seed", range(40))
def test_no_policy_is_faster_than_the_rule(seed):
    """All policies are listed: an offer in each of up to four situations. The rule learns the rate from itself."""
    rng = random.Random(seed)
    situations = [
        [Offer(n, rng.uniform(1, 6), rng.uniform(0.5, 3)) for n in range(rng.randint(1, 5))]
        for _ in range(rng.randint(1, 4))
    ]
    fastest = max(rate_of(policy, situations) for policy in itertools.product(*situations))
    rate = 1.0
    for _ in range(10):
        rate = rate_of([best(offers, rate) for offers in situations], situations)
    assert rate == pytest.approx(fastest)


@pytest.mark.parametrize("seed", range(40))
def test_the_tree_is_the_best_of_all_that_could_be_checked(seed):
    """Any set of nodes, not only the likeliest ones: tokens are the anchor's and the nodes' probabilities."""
    rng = random.Random(seed)
    reach = sorted((rng.random() for _ in range(8)), reverse=True)
    steps = list(itertools.accumulate(rng.uniform(0, 0.6) for _ in range(9)))
    rate, rows = rng.uniform(0.5, 3), rng.choice([1, 1, 4])

    def cost(size):
        return 0.3 + steps[size - 1]

    chosen = best(trees(reach, cost, rows, range(1, 10)), rate)
    values = [
        rows + sum(nodes) - rate * cost(1 + count)
        for count in range(9)
        for nodes in itertools.combinations(reach, count)
    ]
    assert chosen.value(rate) == pytest.approx(max(values))


def test_a_node_is_checked_as_long_as_its_probability_is_above_what_its_time_would_yield():
    reach = [0.9, 0.6, 0.4, 0.25, 0.1]
    offers = trees(reach, lambda size: 1 + 0.1 * (size - 1), 1, range(1, 7))
    assert best(offers, 3.0).what == 1 + sum(p > 3.0 * 0.1 for p in reach) == 4


def test_a_size_beyond_the_candidates_is_no_offer():
    assert [offer.what for offer in trees([0.5, 0.4], lambda size: size, 1, (1, 2, 3, 4, 8))] == [1, 2, 3]
    assert [offer.what for offer in trees([], lambda size: size, 1, (1, 2))] == [1]


# What trying may cost ------------------------------------------------------------------------------------------------


def lost(purse: Purse, steps: int, price: float, yields) -> tuple[float, int]:
    """Plain steps lost to tries in a call of so many plain steps' tokens, and how many tries there were.

    Args:
        price: cost of a try beside the plain step's.
        yields: of a try, by its number, plain steps' worth of tokens.
    """
    done, time, tries = 0.0, 0.0, 0
    while done < steps:
        if purse.is_time and purse.affords(price):
            got, cost = yields(tries), 1 + price
            purse.saw(got, cost)
            purse.tried(got - cost)
            done, time, tries = done + got, time + cost, tries + 1
        else:
            purse.saw(1.0)
            done, time = done + 1, time + 1
    return time - done, tries


@pytest.mark.parametrize("price", [0.05, 0.3, 0.9, 2.5])
@pytest.mark.parametrize("steps", [96, 400, 3000])
def test_drafts_that_are_always_wrong_cost_three_percent_at_most(steps, price):
    loss, tries = lost(Purse(), steps, price, lambda number: 1.0)
    assert loss <= BEGINNING + SHARE * steps
    assert loss <= 0.0305 * steps
    assert tries >= 1 or price > BEGINNING


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_of_tries_no_call_loses_more_than_its_bound(seed):
    rng = random.Random(seed)
    good = rng.random()
    loss, _ = lost(Purse(), 500, rng.uniform(0.1, 1), lambda number: 3.0 if rng.random() < good else 1.0)
    assert loss <= BEGINNING + SHARE * 500


def test_tries_become_rarer_while_they_lose_and_follow_each_other_once_they_gain():
    purse, price, gaps, gap = Purse(), 0.2, [], 0
    for _ in range(2000):
        if purse.is_time and purse.affords(price):
            purse.saw(1.0, 1 + price)
            purse.tried(-price)
            gaps, gap = [*gaps, gap], 0
        else:
            purse.saw(1.0)
            gap += 1
    assert gaps[:4] == [0, 2, 8, 32] and gaps[-1] == 64
    while not purse.is_time:
        purse.saw(1.0)
    for _ in range(30):  # the text is draftable again
        assert purse.is_time and purse.affords(price)
        purse.saw(3.0, 1 + price)
        purse.tried(2 - price)


def never_right(rng: random.Random, price: float):
    """Yields of tries that promise to pay and never do, but for luck: what the real text gave, then what was lost."""
    return lambda purse: purse.saw(1 + price + rng.uniform(0, 0.2), 1 + price, 1.0)


def short_calls(savings: Savings, lengths, price: float, try_once, limit=None) -> tuple[list[float], list[int]]:
    """Plain steps that each of these calls lost to tries, and how many tries it had."""
    losses, tries = [], []
    for length in lengths:
        with purse_out_of(savings, limit or length) as purse:
            tries.append(0)
            for _ in range(length):
                if purse.affords(price):
                    try_once(purse)
                    tries[-1] += 1
                else:
                    purse.saw(1.0)
        losses.append(price * tries[-1])
    return losses, tries


@pytest.mark.parametrize("price", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("length", [5, 20, 60, 96, 150, 1000])
def test_a_call_of_any_length_loses_three_percent_of_it_at_most(length, price):
    """However much its drafts promise."""
    (loss,), _ = short_calls(Savings(), [length], price, never_right(random.Random(0), price))
    assert loss <= 0.03 * length + 1e-9


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_calls_of_any_lengths_lose_three_percent_of_all_of_them(seed, limited):
    """And two steps once, where a call ended sooner than its limit said."""
    rng = random.Random(seed)
    price, lengths = rng.uniform(0.05, 1.2), [rng.choice((3, 10, 20, 60, 200)) for _ in range(200)]
    losses, tries = short_calls(Savings(), lengths, price, never_right(rng, price), None if limited else 500)
    done, lost = 0, 0.0
    for length, loss in zip(lengths, losses):
        done, lost = done + length, lost + loss
        assert lost <= 0.03 * done + (1 + LUCK) * BEGINNING
    assert sum(tries) > 10 and (not limited or lost <= 0.03 * done)


def test_short_calls_save_for_a_try_and_keep_trying_where_it_pays():
    _, tries = short_calls(Savings(), [20] * 12, 0.8, never_right(random.Random(0), 0.8))
    assert tries[0] == 0 and sum(tries) >= 2
    _, tries = short_calls(Savings(), [20] * 12, 0.8, lambda purse: purse.saw(3.0, 1.8))
    first = next(call for call, count in enumerate(tries) if count)
    assert first <= 3 and all(tries[first:])


def test_a_call_that_fails_gives_back_what_it_took():
    savings = Savings()
    with pytest.raises(RuntimeError), purse_out_of(savings, 50):
        raise RuntimeError
    assert savings.held == 0 and savings == Savings()
    saved = Savings(held=-0.7)
    saved.steps.add(30.0, 1.0)
    savings.load(saved.as_dict())
    assert savings == saved
    savings.load({})
    assert savings == Savings()


def test_calls_at_the_same_time_do_not_spend_the_same_savings():
    savings = Savings(held=1.0)
    with purse_out_of(savings, 20) as one, purse_out_of(savings, 20) as other:
        assert one.begun == pytest.approx(1.0 + 20 * AHEAD) and other.begun < 20 * AHEAD + 1e-9


@pytest.mark.parametrize(("added", "first"), [(0.5, 0), (-0.5, 8)])
def test_a_call_tries_later_where_other_calls_drafts_lost(added, first):
    """And once it has tried, by what came of that alone."""
    table = measured_table()
    for _ in range(20):
        table.yielded("added:nothing").add(added, 1.0)
    pace, asked = Pace(lambda rows, length: table, NoWatch(), 4, 64), []
    for step in range(12):
        pace.begin([0], 10 + step)
        if pace.drafts([]):
            asked.append(step)
            pace.purse.tried(1.0)
        pace._reason = "-"
        pace.mark(PASS, 1)
        pace.end([1])
    assert asked == list(range(first, 12))


def test_what_drafts_are_worth_is_known_by_how_tokens_are_chosen():
    """Text drawn at a high temperature says nothing of greedy text, and next time is known for what it is."""
    assert [manner_of(*how) for how in ((False, 0.7), (True, None), (True, 0.7), (True, 2.0))] == [
        "",
        " at 1.0",
        " at 0.7",
        " at 2.0",
    ]
    table = measured_table()
    for _ in range(20):
        table.yielded("added:nothing at 2.0").add(-0.5, 1.0)
        table.yielded("first, few nodes at 2.0").add(0.0, 2.0)
    ratios = []
    for how in ((False, None), (True, 2.0)):
        pace = Pace(lambda rows, length: table, NoWatch(), 4, 64, manner_of(*how))
        pace.begin([0], 10)
        ratios.append((pace.drafts([]), pace._tally("first, few nodes").ratio))
    assert ratios[0] == (True, 1.0) and not ratios[1][0] and ratios[1][1] <= 0.5


def test_what_was_gained_is_not_lost_for_long():
    purse = Purse()
    for _ in range(500):
        purse.saw(5.0, 1.5)
    assert purse.held == MOST
    losses = 0
    while purse.affords(0.5) and losses < 50:
        purse.saw(1.0, 1.5)
        losses += 1
    assert losses < 15


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_costs_stay_true_where_nearly_all_cycles_draft(noise, seed):
    """Plain steps are rare there, and each measurement is longer than the cost by chance."""
    rng = random.Random(seed)
    table = CostTable.guessed(0.05, 0.05, 0.1, 0.1, 1, 8)
    drafted, plain = {(FIRST, 1): 0.003, (PASS, 16): 0.015, (REST, 1): 0.001}, {(PASS, 1): 0.0095, (REST, 1): 0.0005}
    predicted = measured = 0.0
    for cycle in range(2000):
        table.since_plain = 0 if (is_plain := not table.is_measured or table.is_due) else table.since_plain + 1
        parts = plain if is_plain else drafted
        expected = table.of(*(part for part in parts if part[0] != REST))
        cost = table.see({part: seconds * (1 + noise * rng.expovariate(1.0)) for part, seconds in parts.items()})
        if cycle >= 64:
            predicted, measured = predicted + expected, measured + cost
            assert table.of((FIRST, 1), (PASS, 16)) == pytest.approx(1.9, rel=0.05 + 1.5 * noise)
    assert predicted == pytest.approx(measured, rel=0.1)


# A cycle's decisions -------------------------------------------------------------------------------------------------


class NoWatch:
    def start(self): ...
    def stop(self): ...
    def mark(self, *part): ...
    def finished(self):
        return []


def measured_table(first=0.2, second=0.3, node=0.03, rest=0.05, rows=1) -> CostTable:
    curves = {
        FIRST: Curve([(1, first)]),
        SECOND: Curve([(1, second), (4, 2 * second)]),
        PASS: Curve([(1, 0.95), (64, 0.95 + 63 * node)]),
        REST: Curve([(1, rest)]),
    }
    return CostTable(curves, unit=[0.01] * 4, plain_steps=16, cycles=1000)


def decided(reach_first, reach_both, table, **held):
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 64)
    pace.begin([0], 10)
    pace.purse.held = pace.purse.real = held.get("held", MOST)
    if not pace.drafts([]):
        return "plain", 0, pace.nodes([])
    pace.mark(FIRST)
    count = pace.branches(reach_first)
    if count:
        pace.mark(SECOND, count)
    size = pace.nodes(reach_both if count else reach_first)
    return pace._kind, count, size


def test_certain_drafts_need_no_second_drafter_and_all_their_nodes_are_checked():
    certain = [0.99**i for i in range(1, 8)]
    table = measured_table(second=3.0)
    assert decided(certain, certain, table) == ("first", 0, 8)


def test_the_second_drafter_runs_where_it_is_cheap():
    reach = [0.8, 0.5, 0.3, 0.2, 0.1, 0.05]
    kind, count, size = decided(reach, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], measured_table(second=0.02))
    assert kind == "both" and count >= 1 and size > 3


def test_a_draft_that_is_sure_of_nothing_is_not_checked():
    assert decided([0.02, 0.01], [], measured_table()) == ("first", 0, 1)


def test_nobody_drafts_with_an_empty_purse():
    assert decided([0.9], [0.9], measured_table(), held=0.0) == ("plain", 0, 1)


def test_a_tree_is_no_larger_than_what_may_be_lost():
    likely = [0.99] * 40
    table = measured_table(second=3.0, node=0.05)
    _, _, size = decided(likely, likely, table, held=0.6)
    cost = table.of((FIRST, 1), (PASS, size))
    assert 1 < size < 41 and cost - 1 <= 0.6


def test_candidates_that_need_no_draft_are_checked_by_themselves():
    table = measured_table()
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 64)
    pace.begin([0], 10)
    reach = [0.9, 0.8, 0.7]
    table.yielded("added:more").add(-3.0, 1.0)  # drafts added nothing where the text so far promised as much
    pace.purse.wait = 8.0
    assert not pace.drafts(reach)
    assert pace.nodes(reach) == 4 and pace._kind == "free"
    pace.mark(PASS, 4)
    pace.end([3])
    assert pace.decisions.kinds == {"free": 1} and pace.decisions.nodes == {4: 1} and pace.decisions.tokens == 3


def test_decisions_are_said_in_one_line():
    decisions = Decisions(
        kinds=Counter(both=30, free=8, plain=3),
        nodes=Counter({16: 30, 4: 8, 1: 3}),
        reasons=Counter({"both drafts pay": 29, "the text so far pays": 8, "measuring a plain step": 3}),
        tokens=107.0,
        predicted=40.04,
        measured=38.0,
    )
    assert str(decisions) == (
        "41 cycles: 30 both drafters, 8 the text so far, 3 plain; 12.6 nodes on average; 2.61 tokens a pass; "
        "cost 38.0 plain steps, 40.0 expected; why: both drafts pay (29), the text so far pays (8)"
    )
    assert str(Decisions()) == "no cycles"


def test_one_decision_holds_for_all_rows_of_a_batch():
    """Probabilities are summed over the rows, and a node must pay for its place in each of them."""
    table = measured_table(second=9.0, node=0.1)
    alone = decided([0.5] * 7, [], table)[2]
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 64)
    pace.begin([0] * 4, 10)
    pace.purse.held = pace.purse.real = MOST
    assert pace.drafts([])
    pace.mark(FIRST)
    assert pace.branches([4 * 0.5] * 7) == 0
    assert pace.nodes([4 * 0.5] * 7) == alone


def test_drafts_whose_words_do_not_hold_are_believed_less():
    table = measured_table(second=9.0, node=0.15)
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 64)
    sizes = []
    for _ in range(60):
        pace.begin([0], 10)
        pace.purse.held, pace.purse.real, pace.purse.wait = MOST, MOST, 0.0  # as if losing did not matter
        assert pace.drafts([])
        pace.mark(FIRST)
        pace.branches([0.9, 0.8, 0.7, 0.6])
        sizes.append(pace.nodes([0.9, 0.8, 0.7, 0.6]))
        pace.mark(PASS, sizes[-1])
        pace.end([1])
    assert sizes[0] == 4 and sum(size > 1 for size in sizes[-30:]) <= 10, sizes


def test_a_few_unlucky_cycles_in_a_row_do_not_end_what_pays():
    """Each promises 0.95 tokens more for a cost of 0.3, and gives none: what was gained counts by the promise."""
    table, reach = measured_table(second=9.0), [0.5, 0.3, 0.15]
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 64)
    for cycle in range(6):
        pace.begin([0], 10)
        assert pace.drafts([]), (cycle, pace.purse.held, pace.purse.real)
        pace.mark(FIRST)
        pace.branches(reach)
        nodes = pace.nodes(reach)
        assert nodes > 1
        pace.mark(PASS, nodes)
        pace.end([1])


def a_call(reach, new: int, right: float, seed: int = 0, free: bool = False) -> tuple[float, Pace]:
    """Plain steps lost in a call of so many tokens, and what decided.

    Args:
        reach: of each cycle's drafts, of which a share `right` of that holds; free: the text so far promises as much.
    """
    rng, table = random.Random(seed), measured_table(second=0.2)
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 64)
    done = cost = 0.0
    while done < new:
        pace.begin([0], 10)
        seen = reach if free else []
        if pace.drafts(seen):
            pace.mark(FIRST)
            count, seen = pace.branches(reach), reach
            if count:
                pace.mark(SECOND, count)
        nodes = pace.nodes(seen)
        pace.mark(PASS, nodes)
        accepted = sum(rng.random() < right * p for p in seen[: nodes - 1])
        cost += table.of(*pace._parts)
        pace.end([1 + accepted])
        done += 1 + accepted
    return cost - done, pace


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("new", [96, 400, 3000])
@pytest.mark.parametrize("reach", [[0.99] * 8, [0.9, 0.8, 0.7], [0.6, 0.3, 0.2], [0.3, 0.2], [0.1]])
def test_what_drafts_promise_and_never_keep_costs_a_call_little(reach, new, free):
    loss, pace = a_call(reach, new, right=0.0, free=free)
    assert loss <= (1 + LUCK) * BEGINNING + SHARE * new
    assert free or pace.decisions.kinds["plain"] > 0.8 * new


def test_drafts_that_promise_nothing_are_asked_ever_more_rarely():
    loss, pace = a_call([0.05, 0.02], 96, right=1.0)
    assert loss <= 0.015 * 96 and 3 <= pace.decisions.kinds["first"] <= 5
    assert a_call([0.05, 0.02], 400, right=1.0)[0] <= 0.01 * 400


@pytest.mark.parametrize("seed", range(25))
def test_bad_luck_does_not_end_what_pays(seed):
    """A cycle yields 1.95 tokens for the time of 1.4 on average, and every third one a single token."""
    loss, pace = a_call([0.5, 0.3, 0.15], 96, right=1.0, seed=seed)
    assert pace.decisions.kinds["plain"] <= 5, pace.decisions
    assert loss < 0


@pytest.mark.parametrize(("disappointed", "size"), [(False, 32), (True, FEW)])
def test_large_trees_are_believed_apart_from_small_ones(disappointed, size):
    table = measured_table(node=0.25)
    if disappointed:
        table.yielded("first, many nodes").add(0.0, 100.0)
    pace = Pace(lambda rows, length: table, NoWatch(), 4, 32)
    pace.begin([0], 10)
    pace.purse.held = pace.purse.real = 100.0
    assert pace.drafts([])
    pace.mark(FIRST)
    assert pace.nodes([0.6] * 40) == size


def test_the_second_drafter_is_not_asked_where_its_drafts_could_not_be_checked():
    """All that is left to lose would go into drafts, and nothing into the pass over them."""
    table = measured_table(second=0.3, node=0.1)
    likely = [0.99] * 8
    assert decided(likely, likely, table, held=0.65)[1] == 1
    assert decided(likely, likely, table, held=0.55)[1] == 0


def test_a_calls_first_draft_tells_nothing_of_what_drafts_cost():
    """It reads the prompt; a dear one must not keep later calls from drafting."""

    class Watch(NoWatch):
        marks: list = []

        def mark(self, *part):
            self.marks.append(part)

    table = measured_table()
    pace = Pace(lambda rows, length: table, watch := Watch(), 4, 64)
    for _ in range(2):
        pace.begin([0], 10)
        pace.mark(FIRST)
        pace.mark(SECOND, 2)
        pace.mark(PASS, 8)
    assert watch.marks == [(ONCE,), (ONCE,), (PASS, 8), (FIRST, 1), (SECOND, 2), (PASS, 8)]
    known = {name: dict(curve.counts) for name, curve in table.curves.items()}
    table.see({(ONCE, 1): 9.0, (PASS, 8): 0.02, (REST, 1): 0.001})
    assert table.curves[FIRST].counts == known[FIRST] and table.curves[PASS].counts[8] == 1


def test_what_was_measured_once_seems_no_dearer_than_guessed():
    table = CostTable.guessed(0.05, 0.05, 0.1, 0.1, 1, 8)
    guessed = table.curves[FIRST](1)
    for measured in (9.0, 9.0, 9.0):
        assert table.hoped(FIRST, 1) == pytest.approx(guessed)
        table.curves[FIRST].add(1, measured)
    assert table.hoped(FIRST, 1) == 9.0


def test_a_size_that_is_hardly_known_is_hoped_to_cost_what_the_known_ones_say():
    curve = Curve([(1, 1.0), (65, 4.2)])  # 0.05 a node
    for _ in range(3):
        curve.add(8, 2.7)
        curve.add(32, 5.1)
    curve.add(16, 4.9)
    assert curve(16) == 4.9
    assert curve.hoped(16) == pytest.approx(2.7 + 2.4 / 3), "between its neighbours, not as guessed: 1.75"
    assert curve.hoped(64) == pytest.approx(curve(32) + 32 * 0.05)
    assert curve.hoped(4) == pytest.approx(2.7 * 1.15 / 1.35), "the guess as far off as at the least known size"
    assert curve.hoped(8) == curve(8) and curve.hoped(32) == curve(32)
    curve.add(16, 2.8)
    assert curve.hoped(16) == curve(16) == 2.8, "nor dearer than it measured"


@pytest.mark.parametrize(("most", "sizes"), [(64, [1, 2, 4, 8, 16, 32, 64]), (24, [1, 2, 4, 8, 16, 24]), (1, [1])])
def test_the_largest_tree_of_a_call_is_the_one_it_allows(most, sizes):
    assert Pace(lambda rows, length: measured_table(), NoWatch(), 4, most)._sizes == sizes


def test_first_passes_that_were_dear_do_not_keep_trees_from_being_checked():
    """They time products and make what is made once; a pass that is never tried again is never known better."""
    table = CostTable.guessed(0.05, 0.05, 0.1, 0.1, 1, 8)
    for seconds in (0.01, 0.01):
        table.see({(PASS, 1): seconds})
    table.see({(FIRST, 1): 0.001, (PASS, 4): 0.05, (REST, 1): 0.0005})
    assert table.curves[PASS](4) > 4
    likely = [0.9, 0.8, 0.7]
    assert decided(likely, likely, table, held=BEGINNING)[2] == 4
    for _ in range(3):
        table.see({(FIRST, 1): 0.001, (PASS, 4): 0.05, (REST, 1): 0.0005})
    assert decided(likely, likely, table, held=BEGINNING)[2] < 4


@pytest.mark.parametrize("held_up", [0.6, 6.0])
def test_what_cycles_cost_is_not_told_by_plain_steps_that_were_held_up(held_up):
    """A first step times products, a busy machine stops one now and then: of no other step that says anything."""
    table = CostTable.guessed(0.05, 0.05, 0.1, 0.1, 1, 8)
    costs = [table.see({(PASS, 1): seconds}) for seconds in (held_up, 0.02, 0.02, 0.02, held_up, 0.02, 0.02, 0.02)]
    assert costs[-1] == pytest.approx(1, rel=0.25), "0.02 of a mean of 0.165, or of 1.5"
    assert costs[4] == pytest.approx(held_up / 0.02, rel=0.3), "but what it cost itself is told"
    assert table.see({(FIRST, 1): 0.01, (PASS, 4): 0.025, (REST, 1): 0.005}) == pytest.approx(2, rel=0.25)


# Rows of a batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("rooms", "emitted"), [([9], [5]), ([50, 40, 70], [20, 30, 1]), (None, [3, 9, 8, 8])])
def test_rows_weigh_one_on_average_and_none_nothing(rooms, emitted, share):
    found = weights(rooms, emitted, share)
    assert sum(found) == pytest.approx(len(emitted)) and min(found) >= share
    slowest = min(range(len(emitted)), key=lambda row: emitted[row])
    assert found[slowest] == max(found)


def test_rows_that_have_as_far_to_go_weigh_the_same():
    assert weights([30] * 4, [0] * 4, 0.2) == pytest.approx([1.0] * 4)
    assert weights([64], [7], 0.2) == [1.0]


@pytest.mark.parametrize("seed", range(20))
def test_what_a_row_weighs_is_what_a_step_less_of_it_saves_of_a_call(seed):
    """By brute force, where rows keep their paces and one takes twice as long as the others."""
    rng = random.Random(seed)
    alone, more, rows = 1.0, rng.uniform(0.01, 0.3), rng.randint(2, 8)
    paces, left = [rng.uniform(1, 4) for _ in range(rows)], [rng.uniform(20, 50) for _ in range(rows)]
    left[rng.randrange(rows)] = 100.0

    def time(left: list[float]) -> float:
        return alone * max(left) + more * sum(left)

    saved = [time(left) - time([steps - (at == row) for at, steps in enumerate(left)]) for row in range(rows)]
    rooms, emitted = [[1e4 * steps * pace for steps, pace in zip(left, paces)], [1e4 * pace for pace in paces]]
    found = weights(rooms, emitted, rows * more / (alone + rows * more))
    assert found == pytest.approx([rows * one / sum(saved) for one in saved], abs=0.05 * rows)


@pytest.mark.parametrize(("rows", "price", "grows"), [(4, 1.6, 0.2), (8, 1.9, 0.4), (16, 2.2, 0.6)])
def test_calls_are_shorter_where_rows_weigh_by_what_they_save(rows, price, grows):
    """Beside rows that all weigh the same, in a simulation: rows of several paces, drafts of `price` plain steps."""

    def time_of(seed: int, weigh) -> float:
        rng = random.Random(seed)
        paces, emitted, time, left = [rng.uniform(1.3, 4) for _ in range(rows)], [0] * rows, 0.0, range(rows)
        while left := [row for row in left if emitted[row] < 96]:
            promised = [max(1.0, rng.gauss(paces[row], 0.8)) for row in left]
            found = weigh([96 - emitted[row] for row in left], [emitted[row] for row in left])
            drafts = sum(weight * tokens for weight, tokens in zip(found, promised)) > price * len(left)
            time += (price if drafts else 1.0) * (1 - grows + grows * len(left) / rows)
            for row, tokens in zip(left, promised):
                emitted[row] += 1
                while drafts and rng.random() < 1 - 1 / tokens:
                    emitted[row] += 1
        return time

    by_weight = sum(time_of(seed, lambda *given: weights(*given, grows)) for seed in range(60))
    alike = sum(time_of(seed, lambda rooms, emitted: [1.0] * len(rooms)) for seed in range(60))
    assert by_weight < 0.98 * alike and by_weight < 1.01 * 60 * 96, (by_weight, alike)
