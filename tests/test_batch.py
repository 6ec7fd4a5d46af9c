"""Batches: each row is what plain `generate` writes for its prompt alone, and the batch looks as its batch does."""

import functools

import pytest
import torch
import transformers as tf
from test_generate import LETTERS
from test_generate import tokenizer as tokenizer  # noqa: F401, a fixture
from tiny import VOCAB, WINDOW, image_inputs, prompt, tiny_assistant, tiny_drafter, tiny_target
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import RepetitionPenaltyLogitsProcessor

from hf_d2sd import D2SDAssistant, attention
from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter
from hf_d2sd.modeling import CACHE_NAME

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma3_text", "gpt_oss", "phi3", "olmo2")
NEW, PAD = 20, 0
LENGTHS = (4, 13, 2 * WINDOW + 3, 7, 1, 30, 9, 9, 18, 2, 25, 11, 5, 16, 21, 3)


def prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    return [prompt(LENGTHS[(at + seed) % len(LENGTHS)], seed=100 * seed + at)[0] for at in range(count)]


def pad(rows, side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        ids[at, place], mask[at, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(family, inputs, **options):
    return tiny_target(family).generate(
        **inputs, **{"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD, **options}
    )


@functools.cache
def ends_of(family: str, count: int, seed: int) -> tuple[list[list[int]], int]:
    """Each row's plain continuation alone, and an end-of-sequence token that ends some rows and not all."""
    rows = prompts(count, seed)
    whole = [generate(family, {"input_ids": row[None]})[0, len(row) :].tolist() for row in rows]
    hits = {token: sum(token in row for row in whole) for token in range(2, VOCAB)}
    eos = max(hits, key=lambda token: (min(hits[token], count - hits[token]), hits[token]))
    return [row[: row.index(eos) + 1] if eos in row else row for row in whole], eos


def mostly_right(monkeypatch, truths: list[list[int]], starts: list[int]):
    """Drafts that are often what the target says, told apart by the anchor's row: rows keep their order."""
    stock, generator = Drafter._denoise, torch.Generator().manual_seed(0)

    def denoise(drafter, blocks, width):
        draft = stock(drafter, blocks, width)
        rows = [row for row, start in enumerate(starts) if row in drafter.rows_left]
        tokens = draft.best.clone()
        for at, row in enumerate(rows):
            done = drafter.context.positions[at] + 1 - starts[row]
            truth = (truths[row] + [2] * 40)[done : done + tokens.shape[2]]
            right = torch.rand(tokens.shape[1:], generator=generator) < 0.75
            tokens[at] = torch.where(right, torch.tensor(truth), tokens[at])
        confidence = torch.rand(tokens.shape, generator=generator).clamp(0.05, 0.99)
        return Draft.of(tokens, confidence)

    def select(drafter, staying):
        drafter.rows_left = [drafter.rows_left[at] for at in staying]
        drafter.context.select(staying)

    monkeypatch.setattr(Drafter, "_denoise", denoise)
    monkeypatch.setattr(Drafter, "select", select)
    monkeypatch.setattr(Drafter, "rows_left", list(range(len(starts))), raising=False)


def check(family, count, side, seed, monkeypatch, **options):
    rows, (truths, eos) = prompts(count, seed), ends_of(family, count, seed)
    inputs, pair = pad(rows, side), tiny_assistant(4, 6)
    with monkeypatch.context() as patch:
        mostly_right(patch, truths, [len(row) for row in rows])
        out = generate(family, inputs, eos_token_id=eos, assistant_model=pair, **options)
    width = inputs["input_ids"].shape[1]
    longest = max(map(len, truths))
    assert out[:, :width].tolist() == inputs["input_ids"].tolist()
    assert out[:, width:].tolist() == [row + [PAD] * (longest - len(row)) for row in truths]
    return pair.last_stats, truths


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_plain_generates_of_its_prompt(family, count, monkeypatch):
    """Ragged prompts padded left, rows that end at different places, drafts that are often right."""
    stats, truths = check(family, count, "left", count % 3, monkeypatch)
    assert stats.new_tokens == sum(map(len, truths))
    if count == 16:
        assert len({len(row) for row in truths}) > 2, "rows must end at different places"
        assert stats.mean_acceptance_length > 1.5, "drafts must be accepted, or raggedness is not tested"


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("options", [dict(prefill_chunk_size=4), dict(d2sd_num_branches=0), dict(d2sd_tree_budget=5)])
def test_it_holds_with_each_option(family, options, monkeypatch):
    check(family, 5, "left", 1, monkeypatch, **options)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "cpu", "packed"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_it_holds_on_each_backend(family, backend, packed, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 0)
    check(family, 5, "left", 2, monkeypatch, d2sd_attention_backend=backend)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_padding_on_the_right_changes_nothing(family, monkeypatch):
    """Where plain `generate` would go on from the padding, each row goes on from its own last token."""
    check(family, 5, "right", 1, monkeypatch)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_a_padded_batch_equals_plain_generates_batch(family):
    inputs, (_, eos) = pad(prompts(5, 2)), ends_of(family, 5, 2)
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True)
    plain = generate(family, inputs, eos_token_id=eos, **options)
    ours = generate(family, inputs, eos_token_id=eos, assistant_model=tiny_assistant(4, 6), **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    width = inputs["input_ids"].shape[1]
    for name in ("scores", "logits"):
        for step, (one, other) in enumerate(zip(getattr(ours, name), getattr(plain, name), strict=True)):
            going = ~(plain.sequences[:, width : width + step] == eos).any(1)
            torch.testing.assert_close(one[going], other[going], atol=5e-4, rtol=5e-4)
            assert not one[~going].any()
    real = inputs["attention_mask"].bool()
    for step, (one, other) in enumerate(zip(ours.hidden_states, plain.hidden_states, strict=True)):
        going = ~(plain.sequences[:, width : width + step] == eos).any(1)
        for layer, plain_layer in zip(one, other, strict=True):
            assert layer.shape == plain_layer.shape
            chosen = real if step == 0 else going[:, None]
            torch.testing.assert_close(layer[chosen], plain_layer[chosen], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_oss"])
def test_the_returned_cache_holds_what_plain_decoding_leaves_in_it(family):
    """Where plain decoding goes on with padding behind rows that ended, so does the cache."""
    inputs, (_, eos) = pad(prompts(5, 2)), ends_of(family, 5, 2)
    options = dict(eos_token_id=eos, return_dict_in_generate=True)
    plain = generate(family, inputs, **options)
    ours = generate(family, inputs, assistant_model=tiny_assistant(4, 6), **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    real = inputs["attention_mask"].bool()
    real = torch.cat([real, torch.ones(5, plain.sequences.shape[1] - real.shape[1] - 1, dtype=torch.bool)], dim=1)
    for layer, other in zip(ours[CACHE_NAME].layers, plain[CACHE_NAME].layers, strict=True):
        assert type(layer) is type(other)
        assert layer.get_seq_length() == other.get_seq_length()
        stored = real[:, -other.keys.shape[2] :]
        for one, two in ((layer.keys, other.keys), (layer.values, other.values)):
            torch.testing.assert_close(one.transpose(1, 2)[stored], two.transpose(1, 2)[stored], atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("first", ["ours", "plain"])
@pytest.mark.parametrize("only_new", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_the_next_turn_of_a_batch_equals_each_row_alone(family, first, only_new):
    """Rows of several lengths in the cache, with padding before, between and behind."""
    pair, (_, eos) = tiny_assistant(4, 6), ends_of(family, 5, 2)
    if family != "llama":
        eos = None  # a window that is full of padding has forgotten tokens: see test_errors
    inputs = pad(prompts(5, 2))
    one = generate(
        family,
        inputs,
        eos_token_id=eos,
        return_dict_in_generate=True,
        assistant_model=pair if first == "ours" else None,
    )
    width = inputs["input_ids"].shape[1]
    generated = one.sequences[:, width:]
    kept = ((generated == eos).cumsum(1) - (generated == eos).long()) == 0 if eos is not None else generated > -1
    more = torch.stack([prompt(6, seed=at)[0] for at in range(5)])
    whole = torch.cat([one.sequences, more], dim=1)
    mask = torch.cat([inputs["attention_mask"], kept.long(), torch.ones_like(more)], dim=1)
    given = whole[:, one[CACHE_NAME].get_seq_length() :] if only_new else whole
    second = {"input_ids": given, "attention_mask": mask}
    out = generate(family, second, assistant_model=pair, **{CACHE_NAME: one[CACHE_NAME]})
    for row in range(5):
        alone = whole[row : row + 1, mask[row].bool()]
        # The mask is said: left out, it would hide tokens that happen to be the padding's.
        expected = generate(family, {"input_ids": alone, "attention_mask": torch.ones_like(alone)})
        expected = expected[0, alone.shape[1] :]
        assert out[row, given.shape[1] :].tolist() == expected.tolist()


def test_without_an_end_of_sequence_token_all_rows_end_with_the_last():
    """As in plain decoding: a criterion of the user's ends rows at different places, and no row is filled up."""

    class Multiples(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] % 5 == 4

    for seed in range(4):
        inputs = pad(prompts(5, seed))
        options = dict(stopping_criteria=StoppingCriteriaList([Multiples()]), pad_token_id=None, max_new_tokens=60)
        plain = generate("llama", inputs, **options, return_dict_in_generate=True, output_scores=True)
        ours = generate("llama", inputs, **options, assistant_model=tiny_assistant(4, 6), return_dict_in_generate=True,
                        output_scores=True)  # fmt: skip
        assert ours.sequences.tolist() == plain.sequences.tolist()
        assert len(ours.scores) == len(plain.scores)
        assert ours[CACHE_NAME].get_seq_length() == plain[CACHE_NAME].get_seq_length()


def test_stop_strings_end_each_row_on_its_token(tokenizer):  # noqa: F811
    inputs, (truths, eos) = pad(prompts(5, 1)), ends_of("llama", 5, 1)
    stop = LETTERS[truths[0][min(2, len(truths[0]) - 1)]]
    options = dict(stop_strings=[stop], tokenizer=tokenizer, eos_token_id=eos)
    plain = generate("llama", inputs, **options)
    assert generate("llama", inputs, assistant_model=tiny_assistant(4, 6), **options).tolist() == plain.tolist()


PROCESSED = [
    dict(repetition_penalty=1.7),
    dict(encoder_repetition_penalty=1.5),
    dict(no_repeat_ngram_size=2),
    dict(encoder_no_repeat_ngram_size=2),
    dict(bad_words_ids=[[3], [4, 5]]),
    dict(sequence_bias=[[[7], 3.0], [[2, 3], -9.0]]),
    dict(forced_eos_token_id=4),
    dict(prefix_allowed_tokens_fn=lambda row, ids: [2 + (row + len(ids)) % 7, 9 + row, 3]),
]


@pytest.mark.parametrize("options", PROCESSED, ids=lambda options: "+".join(options))
def test_logits_processors_treat_each_row_as_in_plain_decoding(options):
    inputs, (_, eos) = pad(prompts(5, 1)), ends_of("llama", 5, 1)
    plain = generate("llama", inputs, eos_token_id=eos, **options)
    ours = generate("llama", inputs, eos_token_id=eos, assistant_model=tiny_assistant(4, 6), **options)
    assert ours.tolist() == plain.tolist()


def test_a_processor_of_the_users_sees_its_row_where_it_stands():
    class ByRow:
        def __call__(self, input_ids, scores):
            bias = torch.zeros_like(scores)
            for row in range(len(scores)):
                bias[row, 5 + row] = 4.0
            return scores + bias

    inputs = pad(prompts(5, 1))
    processors = LogitsProcessorList([ByRow(), RepetitionPenaltyLogitsProcessor(1.3)])
    plain = generate("llama", inputs, logits_processor=processors)
    ours = generate("llama", inputs, logits_processor=processors, assistant_model=tiny_assistant())
    assert ours.tolist() == plain.tolist()


def test_num_return_sequences_samples_so_many_rows():
    options = dict(do_sample=True, num_return_sequences=3, temperature=1.5)
    torch.manual_seed(0)
    out = generate("llama", pad(prompts(2)), assistant_model=tiny_assistant(4, 6), **options)
    plain = generate("llama", pad(prompts(2)), **options)
    assert out.shape == plain.shape
    width = max(map(len, prompts(2)))
    assert out[:, :width].tolist() == plain[:, :width].tolist()
    assert len(set(map(tuple, out[:3].tolist()))) == 3, "each row is drawn for itself"


def test_a_sampled_batch_has_the_targets_distribution():
    """First and second token of two rows in 1,500 batches of two, against the exact probabilities of each pair."""
    rows = [prompt(3, 1)[0], prompt(7, 2)[0]]
    inputs, counts, draws = pad(rows), [torch.zeros(VOCAB, VOCAB) for _ in rows], 150
    batch = {name: value.repeat(10, 1) for name, value in inputs.items()}
    torch.manual_seed(0)
    for _ in range(draws):
        out = generate("llama", batch, do_sample=True, top_k=4, max_new_tokens=3, assistant_model=tiny_assistant(4, 6))
        for row, tokens in enumerate(out[:, 7:9].tolist()):
            counts[row % 2][tuple(tokens)] += 1
    for row, count in zip(rows, counts):
        expected = exact_pairs(row) * draws * 10
        likely = expected >= 5
        statistic = ((count - expected) ** 2 / expected.clamp(min=1e-9))[likely].sum()
        assert statistic < likely.sum() + 5 * (2 * likely.sum()) ** 0.5
        assert not count[expected == 0].any()


@torch.no_grad()
def exact_pairs(row):
    """(V, V) probabilities of the first two tokens with top_k=4."""
    pairs = torch.zeros(VOCAB, VOCAB)
    first = top_4(tiny_target()(row[None]).logits[0, -1])
    for token in first.nonzero().flatten():
        second = top_4(tiny_target()(torch.cat([row, token[None]])[None]).logits[0, -1])
        pairs[token] = first[token] * second
    return pairs


def top_4(logits):
    return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf).softmax(-1)


def test_images_in_a_padded_batch():
    one, two = image_inputs(14, 1), image_inputs(9, 2)
    rows = pad([one["input_ids"][0], two["input_ids"][0]])
    types = pad([one["token_type_ids"][0], two["token_type_ids"][0]])["input_ids"]
    inputs = {**rows, "token_type_ids": types, "pixel_values": torch.cat([one["pixel_values"], two["pixel_values"]])}
    out = generate("gemma3_image", inputs, assistant_model=tiny_assistant(4, 6))
    for row, alone in enumerate((one, two)):
        expected = generate("gemma3_image", alone)[0, alone["input_ids"].shape[1] :]
        assert out[row, rows["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_inputs_embeds_of_a_padded_batch():
    inputs = pad(prompts(4))
    embedded = tiny_target().get_input_embeddings()(inputs["input_ids"])
    embeds = dict(inputs_embeds=embedded, attention_mask=inputs["attention_mask"])
    assert generate("llama", embeds, assistant_model=tiny_assistant()).tolist() == generate("llama", embeds).tolist()


def test_one_padded_row_is_no_batch():
    row = {"input_ids": torch.cat([torch.full((1, 4), PAD), prompt()], dim=1)}
    row["attention_mask"] = (torch.arange(13) > 3).long()[None]
    pair = tiny_assistant(4, 6)
    one = generate("llama", row, assistant_model=pair, return_dict_in_generate=True)
    assert one.sequences.tolist() == generate("llama", row).tolist()
    more = torch.cat([one.sequences, prompt(4, 3)], dim=1)
    mask = torch.cat([row["attention_mask"], torch.ones(1, more.shape[1] - 13, dtype=torch.long)], dim=1)
    second = {"input_ids": more, "attention_mask": mask}
    got = generate("llama", second, assistant_model=pair, **{CACHE_NAME: one[CACHE_NAME]})
    assert got.tolist() == generate("llama", second).tolist()


def test_sliding_and_half_precision_drafters_serve_batches():
    windowed = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=5)
    pair = D2SDAssistant.from_drafters(tiny_drafter(**windowed).bfloat16(), tiny_drafter(seed=1, **windowed))
    inputs, (_, eos) = pad(prompts(5, 1)), ends_of("llama", 5, 1)
    out = generate("llama", inputs, eos_token_id=eos, assistant_model=pair)
    assert out.tolist() == generate("llama", inputs, eos_token_id=eos).tolist()


def test_the_drafts_of_a_batch_are_those_of_each_row_alone():
    """In every cycle: the rows' contexts do not leak into each other, and drafts see all of their own."""
    rows, pair, seen = prompts(4, 1), tiny_assistant(4, 6), {}
    stock = Drafter._denoise

    def denoise(drafter, blocks, width):
        draft = stock(drafter, blocks, width)
        for at, block in enumerate(blocks.tolist()):
            key = id(drafter.model), drafter.context.positions[at], str(block)
            found = seen.setdefault(key, {}).setdefault(len(blocks) > 1, [])
            found.append(draft.confidence[at].flatten().tolist())
        return draft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "_denoise", denoise)
        always = dict(assistant_model=pair, d2sd_auto=False)  # so that no clock decides which rows draft when
        generate("llama", pad(rows), **always)
        for row in rows:
            generate("llama", {"input_ids": row[None]}, **always)
    both = [found for found in seen.values() if len(found) == 2]
    assert len(both) > 60
    for found in both:  # several, where rows have the same block at the same place
        for one, other in zip(*(sorted(found[kind]) for kind in (True, False)), strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_pipelines_take_batches(tokenizer):  # noqa: F811
    texts = ["".join(LETTERS[token] for token in row.tolist()) for row in prompts(5, 1)]
    options = dict(do_sample=False, max_new_tokens=NEW, eos_token_id=1, pad_token_id=0)
    tokenizer.padding_side = "left"
    pipe = tf.pipeline("text-generation", model=tiny_target(), tokenizer=tokenizer)
    pair = tiny_assistant(4, 6)
    pair.last_stats = None
    assert pipe(texts, batch_size=5, assistant_model=pair, **options) == pipe(texts, batch_size=5, **options)
    assert pair.last_stats.cycles > 0
