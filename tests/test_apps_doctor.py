"""`hf-d2sd doctor`: a right pair is found right, and each way of being wrong is said in words."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import prompt, tiny_drafter, tiny_target
from words import WORDS, save_word_drafters, save_word_target

from hf_d2sd import D2SDAssistant, D2SDStats
from hf_d2sd.apps import doctor as module
from hf_d2sd.apps import loading, parity
from hf_d2sd.apps.answering import Answer, answer
from hf_d2sd.apps.cards import published_acceptance, read_card
from hf_d2sd.apps.diagnosis import Bench, check_roles, diagnose
from hf_d2sd.apps.doctor import DoctorOptions, check_acceptance, check_weights, doctor, examine
from hf_d2sd.apps.loading import Pair, chat_tokens
from hf_d2sd.cli import main
from hf_d2sd.training.shards import Row, read_rows

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"


def options(target, *drafters, **changes) -> DoctorOptions:
    return DoctorOptions(**{"target": str(target), "drafters": list(map(str, drafters)), **changes})


def words_of(findings, check: str, level: str = "wrong") -> str:
    found = [
        f"{finding.words} {finding.advice}" for finding in findings if (finding.check, finding.level) == (check, level)
    ]
    assert found, f"no {level} {check} among {findings}"
    return "\n".join(found)


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestStructure:
    """Told by configs alone: no weight is read."""

    @pytest.fixture(autouse=True)
    def no_weights(self, monkeypatch):
        def load(plan):
            raise AssertionError("weights were read")

        monkeypatch.setattr(loading.PairPlan, "load", load)

    @pytest.fixture
    def folders(self, tmp_path):
        return save_word_target(tmp_path / "target"), *save_word_drafters(tmp_path)

    def structure(self, *folders, **changes):
        findings = []
        with pytest.raises(AssertionError, match="weights were read") as loaded:
            for finding in examine(options(*folders, **changes)):
                findings.append(finding)
            raise AssertionError("no weights were read")
        wrong = any(finding.level == "wrong" for finding in findings)
        assert (str(loaded.value) == "no weights were read") is wrong, "loading goes on exactly where nothing is wrong"
        return findings

    def test_a_right_pair_has_nothing_wrong(self, folders):
        findings = self.structure(*folders)
        assert {finding.check for finding in findings if finding.level != "fine"} == {"mask token"}, "it is a word"
        checks = "configs target vocabulary width layers mask tokenizer chat dtype options"
        assert list(dict.fromkeys(f.check.split()[0] for f in findings)) == checks.split()

    def test_a_folder_that_is_not_there(self, folders):
        assert "There is no folder ./x/y" in words_of(self.structure("./x/y", *folders[1:]), "configs")

    def test_prompts_that_the_target_has_no_positions_for(self, folders, tmp_path):
        (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a " * 3000}) + "\n")
        words = words_of(self.structure(*folders, prompts=str(tmp_path / "prompts.jsonl")), "configs")
        assert "has 3002 tokens" in words and "positions for 2048" in words

    def test_a_folder_of_another_kind_of_model(self, folders):
        words = words_of(self.structure(folders[0], folders[0]), "configs")
        assert "reads 'd2sd_drafter'" in words and "'llama'" in words

    def test_a_target_without_decoder(self, folders, tmp_path):
        tf.T5Config(d_model=32, num_layers=1, vocab_size=len(WORDS)).save_pretrained(tmp_path / "t5")
        for file in folders[0].glob("tokenizer*"):
            shutil.copy(file, tmp_path / "t5")
        assert "T5Config" in words_of(self.structure(tmp_path / "t5", *folders[1:]), "target")

    def test_a_wrong_vocabulary(self, folders, tmp_path):
        findings = self.structure(folders[0], *save_word_drafters(tmp_path / "other", vocab_size=40))
        words = words_of(findings, "vocabulary")
        assert "first drafter" in words and "second drafter" in words
        assert "vocab_size is 40, the target's is 31" in words and "hf-d2sd distill" in words

    def test_a_wrong_width(self, folders, tmp_path):
        changes = dict(hidden_size=16, target_hidden_size=16, num_attention_heads=2)
        findings = self.structure(folders[0], *save_word_drafters(tmp_path / "other", **changes))
        assert "hidden_size is 16, the target's is 32" in words_of(findings, "width")

    def test_layers_that_the_target_has_not(self, folders, tmp_path):
        changes = dict(num_target_layers=None, target_layer_ids=[0, 5])
        findings = self.structure(folders[0], *save_word_drafters(tmp_path / "other", **changes))
        assert "reads target layers [0, 5], but the target has 2" in words_of(findings, "layers")

    def test_layers_in_an_unusual_order(self, folders):
        change_config(folders[1], target_layer_ids=[1, 0])
        words = words_of(self.structure(*folders), "layers", "note")
        assert "first drafter's target_layer_ids [1, 0] do not rise" in words and "set them to [0, 1]" in words

    def test_no_mask_token(self, folders):
        change_config(folders[2], mask_token_id=None)
        assert "second drafter's config has no mask_token_id" in words_of(self.structure(*folders), "mask token")

    def test_a_mask_token_that_is_a_word(self, folders):
        change_config(folders[1], mask_token_id=WORDS.index("q"))
        words = words_of(self.structure(*folders), "mask token", "note")
        assert "'q', an ordinary token" in words and "different mask tokens: {'first': 21, 'second': 3}" in words

    def test_a_mask_token_that_ends_texts(self, folders):
        for folder in folders[1:]:
            change_config(folder, mask_token_id=0)
        assert "'<end>', which ends a text" in words_of(self.structure(*folders), "mask token", "note")

    def test_another_tokenizer(self, folders):
        path = folders[0] / "tokenizer.json"
        vocabulary = json.loads(path.read_text())
        ids = vocabulary["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        path.write_text(json.dumps(vocabulary))
        words = words_of(self.structure(*folders), "tokenizer")
        assert "was trained with" in words and "the target's own tokenizer" in words

    def test_a_tokenizer_of_a_larger_model(self, folders):
        tokenizer = tf.AutoTokenizer.from_pretrained(folders[0])
        tokenizer.add_tokens(["new", "newer"])
        tokenizer.save_pretrained(folders[0])
        assert "tokenizer has 33 tokens and the target's vocabulary 31" in words_of(
            self.structure(*folders), "tokenizer"
        )

    def test_a_tokenizer_that_nobody_recorded(self, folders, tmp_path):
        findings = self.structure(folders[0], *save_word_drafters(tmp_path / "o", tokenizer_fingerprint=None))
        assert "Not recorded by the first and the second drafter" in words_of(findings, "tokenizer", "note")

    def test_another_chat_template(self, folders):
        tokenizer = tf.AutoTokenizer.from_pretrained(folders[0])
        tokenizer.save_pretrained(folders[1])
        assert "what the drafters' own does" in words_of(self.structure(*folders), "chat template", "fine")
        tokenizer.chat_template = tokenizer.chat_template.replace("<reply>", "<system>")
        tokenizer.save_pretrained(folders[1])
        words = words_of(self.structure(*folders), "chat template")
        assert "'<user> a b <reply>" in words and "'<user> a b <system>" in words

    def test_no_chat_template(self, folders):
        tokenizer = tf.AutoTokenizer.from_pretrained(folders[0])
        tokenizer.chat_template = None
        (folders[0] / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folders[0])
        assert "prompts are taken as they are" in words_of(self.structure(*folders), "chat template", "note")

    def test_another_dtype(self, folders):
        words = words_of(self.structure(*folders, dtype="float16"), "dtype", "note")
        assert "run in float16; the drafters were saved in float32" in words and "65504" in words
        assert "Near-ties" in words_of(self.structure(*folders, dtype="bfloat16"), "dtype", "fine")

    def test_the_fastest_dtype_is_named(self, folders, monkeypatch):
        monkeypatch.setattr(loading, "fastest_dtype", lambda device: torch.bfloat16)
        words = words_of(self.structure(*folders, dtype="fastest"), "dtype", "fine")
        assert "run in bfloat16; the drafters were saved in float32" in words

    def test_options_that_the_pair_cannot_have(self, folders):
        assert "no second drafter" in words_of(self.structure(*folders[:2], num_branches=2), "options")
        assert "made for at most 4" in words_of(self.structure(*folders, block_size=5), "options")


class TestWeights:
    @pytest.fixture
    def folders(self, tmp_path):
        return save_word_target(tmp_path / "target"), *save_word_drafters(tmp_path, draft_vocab_size=8)

    def change(self, folder: Path, **changes) -> None:
        path = folder / "model.safetensors"
        save_file({**load_file(path), **changes}, path, {"format": "pt"})

    def weights(self, folders) -> str:
        return words_of(examine(options(*folders)), "weights")

    def test_numbers_that_are_none(self, folders):
        self.change(folders[1], **{"norm.weight": torch.full((32,), torch.nan)})
        assert "not finite: norm.weight" in self.weights(folders)

    def test_a_matrix_of_zeros(self, folders):
        self.change(folders[2], **{"fc.weight": torch.zeros(32, 64)})
        assert "second drafter has one number all over fc.weight" in self.weights(folders)

    def test_a_draft_vocabulary_that_is_none(self, folders):
        self.change(folders[1], draft_token_ids=torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]))
        assert "must hold different ids of the 31 tokens" in self.weights(folders)
        self.change(folders[1], draft_token_ids=torch.tensor([0, 1, 2, 3, 4, 5, 6, 31]))
        assert "must hold different ids of the 31 tokens" in self.weights(folders)

    def test_tensors_of_another_model(self, folders):
        self.change(folders[1], stranger=torch.zeros(2))
        assert "unexpected: stranger" in self.weights(folders)

    def test_right_weights(self, folders):
        assistant = D2SDAssistant.from_drafters(*map(str, folders[1:]))
        assert [finding.level for finding in check_weights(assistant)] == ["fine", "fine"]

    def test_a_backend_that_cannot_run(self, folders):
        findings = examine(options(*folders, attention_backend="flash_attention_3"))
        words = next(f.words for f in findings if f.check == "attention")
        assert "flash_attention_3" in words

    def test_drafters_that_never_learned_anything(self, folders):
        findings = list(examine(options(*folders, max_prompts=2, max_new_tokens=32, dtype="float32")))
        assert "plain generate" in words_of(findings, "texts", "fine")
        assert len([f for f in findings if (f.check, f.level) == ("forward", "fine")]) == 2
        assert "hardly ever right" in words_of(findings, "acceptance")
        assert "no model card" in words_of(findings, "acceptance")
        assert "get them again" in words_of(findings, "weights")


@pytest.fixture(scope="module")
def healthy():
    sys.path.insert(0, str(ROOT / "examples"))
    from smollm2 import load_smollm2

    target, tokenizer = load_smollm2(torch.float32)
    return Pair(target, tokenizer, D2SDAssistant.from_pretrained(PAIR, dtype=torch.float32))


@pytest.fixture(scope="module")
def bench(healthy):
    """Some of the target's own text: no generation needed."""
    rows = read_rows(ROOT / "examples" / "smollm2_text" / "text")
    return Bench(healthy.target, [row for row in rows if row.response_length > 40 and len(row.tokens) < 120][:4])


def broken(healthy, **changes) -> Pair:
    """The pair with other values in the first drafter's config."""
    assistant = D2SDAssistant.from_pretrained(PAIR, dtype=torch.float32)
    for name, value in changes.items():
        setattr(assistant.first.config, name, value)
    return Pair(healthy.target, healthy.tokenizer, assistant)


def acceptance(pair: Pair):
    """α on the doctor's own prompts, judged by the shipped card."""
    options = module.DoctorOptions(target="target", drafters=[str(PAIR)], max_new_tokens=24)
    prompts = [[{"role": "user", "content": text}] for text in module.PROMPTS[: options.max_prompts]]
    replies = [answer(pair, options.judging(), chat_tokens(pair.tokenizer, prompt)) for prompt in prompts]
    return check_acceptance([reply.stats for reply in replies], [str(PAIR)])


class TestDiagnosis:
    """Damage to the shipped pair: α falls, and the reason is found."""

    def test_nothing_is_found_where_nothing_is_wrong(self, healthy, bench):
        found = acceptance(healthy)
        assert found.level == "fine" and "the card says" in found.words
        assert check_roles(healthy.assistant, bench).level == "fine"
        assert list(diagnose(healthy, bench)) == []

    def test_layers_in_a_wrong_order(self, healthy, bench):
        pair = broken(healthy, target_layer_ids=[27, 18, 9])
        assert "less than half" in acceptance(pair).words
        words = words_of(diagnose(pair, bench), "layers")
        assert "with its config's [27, 18, 9]" in words
        assert words.endswith("Set target_layer_ids to [9, 18, 27] in config.json.")

    def test_a_wrong_mask_token(self, healthy, bench):
        word = healthy.tokenizer(" the").input_ids[0]
        pair = broken(healthy, mask_token_id=word)
        assert "less than half" in acceptance(pair).words
        words = words_of(diagnose(pair, bench), "mask token")
        assert "first drafter" in words and f"with its config's {word} (' the')" in words

    def test_swapped_drafters(self, healthy, bench):
        swapped = D2SDAssistant.from_drafters(healthy.assistant.second, healthy.assistant.first)
        found = check_roles(swapped, bench)
        assert found.level == "wrong" and "the drafters are swapped" in found.words

    def test_shuffled_weights(self, healthy, bench):
        pair = broken(healthy)
        for parameter in pair.assistant.first.layers.parameters():
            order = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))
            parameter.data = parameter.data.flatten()[order].view(parameter.shape)
        assert "less than half" in acceptance(pair).words
        words = words_of(diagnose(pair, bench), "weights")
        assert "The first drafter's next token" in words and "damaged" in words

    def test_a_decoding_that_is_not_what_was_trained(self, healthy, monkeypatch):
        rows = read_rows(ROOT / "examples" / "smollm2_text" / "text")[:1]
        assert [finding.level for finding in parity.check_forwards(healthy, rows)] == ["fine", "fine"]
        stock = parity.Drafter._positions
        monkeypatch.setattr(parity.Drafter, "_positions", lambda *arguments: stock(*arguments) + 1)
        one_side = [finding.level for finding in parity.check_forwards(healthy, rows)]
        assert one_side == ["fine", "fine"], "positions count from anywhere: a shift of all is none"
        monkeypatch.setattr(parity.Drafter, "_positions", lambda *arguments: stock(*arguments) * 2)
        found = list(parity.check_forwards(healthy, rows))
        assert "does not compute what was trained" in words_of(found, "forward")


KINDS = {
    "plain": {},
    "windows": dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6),
    "causal": dict(
        layer_types=["sliding_attention", "full_attention"], sliding_window=6, causal_layer_types=["sliding_attention"]
    ),
    "layerwise": dict(feature_fusion="layerwise"),
    "pruned": dict(draft_vocab_size=9),
    "own head": dict(own_head=True),
    "calibrated": dict(confidence_temperatures=[2.0, 0.5, 1.5, 3.0, 0.7]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_every_kind_of_drafter_decodes_as_it_is_trained(family, kind):
    first, second = (tiny_drafter(6, seed=seed, **KINDS[kind]) for seed in (0, 1))
    pair = Pair(tiny_target(family), None, D2SDAssistant.from_drafters(first, second))
    rows = [Row(prompt(40, seed)[0], 15) for seed in (0, 1)]
    found = list(parity.check_forwards(pair, rows))
    assert [finding.level for finding in found] == ["fine", "fine"], found
    assert "first: 4 blocks" in found[0].words and "second: 12 blocks" in found[1].words


class TestTexts:
    def reply(self, gap: float | None = None, resolution: float = 0.0) -> parity.Reply:
        one = Answer([1, 2], [], 0.1, 0.1, D2SDStats(), [0, 1, 2], None)
        other = Answer([1, 3], [], 0.1, 0.1, D2SDStats(), [0, 1, 3], None)
        return parity.Reply(one, one if gap is None else other, gap, resolution)

    def test_a_near_tie_is_explained_by_its_gap(self):
        found = parity.check_texts([self.reply(), self.reply(0.125, 0.5)], "bfloat16")
        assert found.level == "note" and "1 of 2" in found.words and "0.12 apart, which is rounding" in found.words

    def test_a_clear_difference_is_wrong(self):
        found = parity.check_texts([self.reply(0.125, 0.5), self.reply(2.5, 0.5)], "bfloat16")
        assert found.level == "wrong" and "0.12, 2.5 apart: that is no rounding" in found.words

    def test_the_gap_is_that_of_the_logits_where_the_texts_part(self, tmp_path):
        target = tf.AutoModelForCausalLM.from_pretrained(save_word_target(tmp_path))
        one = Answer([5, 6, 7], [], 0, 0, None, [3, 4, 5, 6, 7], None)
        other = Answer([5, 8, 7], [], 0, 0, None, [3, 4, 5, 8, 7], None)
        gap, resolution = parity._gap(Pair(target, None, None), one, other)
        logits = target(torch.tensor([[3, 4, 5]])).logits[0, -1].detach()
        assert gap == pytest.approx(float((logits[6] - logits[8]).abs()))
        assert 0 < resolution < 1e-4
        shorter = Answer([5, 6], [], 0, 0, None, [3, 4, 5, 6], None)
        assert parity._gap(Pair(target, None, None), one, shorter)[0] == float("inf")


class TestCard:
    TABLE = "| strategy | GSM8K | mean |\n|---|---|---|\n| first alone | 2.0 | 1.5 |\n| **both** | 3.0 | {} |\n"
    LISTED = (
        "---\nmodel-index:\n- name: x\n  results:\n  - task: {{type: text-generation}}\n"
        "    dataset: {{name: d, type: d}}\n    metrics:\n    - {{type: acceptance_length, value: {}}}\n"
        "    - {{type: speed, value: 9.0}}\n---\n"
    )

    def card(self, folder: Path, text: str) -> float | None:
        (folder / "README.md").write_text(text)
        return published_acceptance(read_card(str(folder)))

    def test_metadata_comes_before_tables(self, tmp_path):
        assert self.card(tmp_path, self.TABLE.format("2.25")) == 2.25
        assert self.card(tmp_path, self.LISTED.format("2.75") + self.TABLE.format("2.25")) == 2.75

    def test_a_card_without_figures_and_a_folder_without_card(self, tmp_path):
        assert read_card(str(tmp_path)) is None
        assert self.card(tmp_path, "# A pair\n\n| a | b |\n|---|---|\n| **c** | 3.0 |\n") is None
        stats = D2SDStats(cycles=10, committed_per_cycle=[2] * 10)
        assert "names none" in check_acceptance([stats], [str(tmp_path)]).words
        (tmp_path / "README.md").unlink()
        assert "no model card" in check_acceptance([stats], [str(tmp_path)]).words

    def test_half_of_what_the_card_promises_is_the_limit(self, tmp_path):
        (tmp_path / "README.md").write_text(self.TABLE.format("3.00"))
        levels = [
            check_acceptance([D2SDStats(cycles=2, committed_per_cycle=list(lengths))], [str(tmp_path)]).level
            for lengths in ((2, 2), (1, 2))
        ]
        assert levels == ["fine", "wrong"]

    def test_the_shipped_card_names_its_acceptance(self):
        assert 1.5 < published_acceptance(read_card(str(PAIR))) < 5


def test_without_a_terminal_each_finding_is_a_line_and_the_status_says_whether_any_is_wrong(tmp_path, capsys):
    folders = save_word_target(tmp_path / "target"), *save_word_drafters(tmp_path)
    change_config(folders[1], vocab_size=40)
    change_config(folders[2], vocab_size=40)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--target", str(folders[0]), "--drafters", *map(str, folders[1:])])
    assert ended.value.code == 1
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {line["check"] for line in lines if line["level"] == "wrong"} == {"vocabulary"}
    assert all(line["advice"] for line in lines if line["level"] == "wrong")


def test_as_text_findings_are_a_table_with_a_verdict(tmp_path, capsys):
    folders = save_word_target(tmp_path / "target"), *save_word_drafters(tmp_path)
    change_config(folders[2], mask_token_id=None)
    with pytest.raises(SystemExit):
        doctor(options(*folders, format="text"))
    shown = capsys.readouterr().out
    assert "WRONG" in shown and "Something is wrong: mask token." in shown and "chat template" in shown


class TestWhatPays:
    """Drafters are judged by their own trees; what pays on this machine is shown beside."""

    def test_replies_that_drafters_are_judged_by_have_the_same_trees_on_any_machine(self):
        judging = options("target", "drafter").judging()
        assert judging.d2sd_options() == {"d2sd_auto": False}
        assert options("target", "drafter", auto=True).judging().auto is True
        assert options("target", "drafter").answering().auto is None

    def test_what_was_chosen_is_shown_with_the_costs_where_nothing_says_how_trees_are(self, folders, library_default):
        def found(**named):
            chosen = options(*folders, dtype="float32", max_new_tokens=24, **named)
            return list(module.check_costs(loading.read_plan(chosen).load(), chosen, [prompt(8)]))

        (costs,) = found()
        assert re.match(r"\d+ cycles: .* expected; why: .*\.\nLlamaForCausalLM .* a plain step", costs.words)
        assert found(num_branches=1) == []

    @pytest.fixture
    def folders(self, tmp_path):
        return save_word_target(tmp_path / "target"), *save_word_drafters(tmp_path)


@pytest.mark.parametrize("name", ["max_prompts", "max_new_tokens"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        options("target", "drafter", **{name: 0})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shipped_pair_is_right(healthy, tmp_path, dtype, capsys):
    healthy.target.save_pretrained(tmp_path / "target")
    healthy.tokenizer.save_pretrained(tmp_path / "target")
    doctor(options(tmp_path / "target", PAIR, dtype=dtype))
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert {line["level"] for line in lines if line["check"] != "texts"} == {"fine"}
    compared = [line["words"] for line in lines if line["check"] == "texts"]
    assert len(compared) == (1 if dtype == "float32" else 2) and "float32" in compared[-1]


def test_without_drafters_there_is_nothing_to_check():
    with pytest.raises(ValueError, match="--drafters context names no drafters"):
        options("target", "context")
