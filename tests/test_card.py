"""Model cards: metadata that the Hub reads, numbers from result files, code that runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tiny import tiny_assistant, tiny_drafter

from hf_d2sd.cli import main
from hf_d2sd.hub.card import CardOptions, card, read_results

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
RESULTS = {
    "dtype": "float32",
    "strategies": {
        "first alone": {"gsm8k_dev": 2.0, "own_dev": 1.5, "math": 9.0, "mean of files": 1.75, "nodes a pass": 8.0},
        "D²SD": {"gsm8k_dev": 3.25, "own_dev": 2.5, "math": 9.0, "mean of files": 2.875, "nodes a pass": 31.75},
    },
}


@pytest.fixture
def folder(tmp_path):
    tiny_assistant(4, 6).save_pretrained(tmp_path / "pair")
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "details.md").write_text("## Training\n\nBy hand: {{ not a template }}.\n")
    return tmp_path


def made(folder, **changes) -> ModelCard:
    settings = dict(
        model=folder / "pair",
        out=folder / "pair" / "README.md",
        base_model="org/target-1B",
        repo="me/target-1B-D2SD",
        results=[folder / "results.json"],
        details=folder / "details.md",
        datasets=["openai/gsm8k"],
    )
    card(CardOptions(**{**settings, **changes}))
    return ModelCard.load(folder / "pair" / "README.md")


class TestCards:
    def test_metadata_says_what_it_is_and_for_which_target(self, folder):
        data = made(folder).data
        assert (data.base_model, data.library_name, data.license) == ("org/target-1B", "transformers", "apache-2.0")
        assert (data.pipeline_tag, data.language, data.datasets) == ("text-generation", "en", ["openai/gsm8k"])
        assert {"d2sd", "dflash", "speculative-decoding"} <= set(data.tags)

    def test_metadata_has_the_pairs_own_numbers(self, folder):
        data = made(folder).data
        assert data.model_name == "target-1B-D2SD"
        seen = {(entry.dataset_type, entry.dataset_name, entry.metric_value) for entry in data.eval_results}
        assert seen == {("openai/gsm8k", "GSM8K", 3.25), ("own_dev", "own_dev", 2.5)}

    def test_the_table_has_every_strategy(self, folder):
        text = made(folder).text
        assert "| strategy | GSM8K | own_dev | mean | nodes a pass |\n|---|---|---|---|---|\n" in text
        assert "\n| first alone | 2.00 | 1.50 | 1.75 | 8.0 |\n| **D²SD** | 3.25 | 2.50 | 2.88 | 31.8 |\n" in text

    def test_another_strategy_may_be_the_pairs_own(self, folder):
        card = made(folder, strategy="first alone")
        assert {entry.metric_value for entry in card.data.eval_results} == {2.0, 1.5}
        assert "\n| **first alone** | 2.00 |" in card.text
        with pytest.raises(ValueError, match="no strategy 'third'; it has first alone, D²SD"):
            made(folder, strategy="third")

    def test_the_summary_of_a_benchmark_is_read(self, folder):
        """Suites without their tasks, the speed-up beside them, plain decoding left out."""

        def cell(alpha, speed, rows):
            return {"alpha": {"value": alpha}, "speed": {"value": speed}, "rows": rows}

        def groups(alpha, speed, rows):
            return {name: cell(alpha + i, speed, rows) for i, name in enumerate(("all", "gsm8k_dev", "gsm8k_dev: a"))}

        cells = {"ar": groups(1.0, 1.0, 1.0), "d2sd": groups(2.5, 1.5, 26.0), "dflash": groups(1.5, 1.25, 8.0)}
        environment = {"processor": "A processor"}
        content = {"settings": {"dtype": "float32"}, "environment": environment, "cells": cells}
        (folder / "summary.json").write_text(json.dumps(content))
        text = made(folder, results=[folder / "summary.json"], strategy="d2sd").text
        assert "dtype float32; A processor" in text
        assert (
            "| strategy | GSM8K | mean | speed-up | nodes a pass |\n|---|---|---|---|---|\n"
            "| dflash | 2.50 | 1.50 | 1.25 | 8.0 |\n| **d2sd** | 3.50 | 2.50 | 1.50 | 26.0 |\n"
        ) in text

    def test_the_drafters_are_described_by_their_files(self, folder):
        text = made(folder).text
        assert "|  | first | second |\n|---|---|---|\n| parameters | 0.0 million | 0.0 million |\n" in text
        assert "\n| block, γ | 4 | 6 |\n" in text
        assert "\n| features of the target's layers | 0, 2 | 0, 2 |\n" in text
        assert "with `d2sd_auto=False`: `num_branches` 4, `tree_width` 1, `tree_budget` none." in text

    def test_what_is_written_by_hand_is_kept_as_it_is(self, folder):
        assert "\n## Training\n\nBy hand: {{ not a template }}.\n\n## Licence" in made(folder).text

    def test_its_code_names_the_target_and_the_repository(self, folder):
        (code,) = re.findall(r"```python\n(.*?)```", made(folder).text, re.S)
        compile(code, "card", "exec")
        assert 'D2SDAssistant.from_pretrained("me/target-1B-D2SD")' in code
        assert code.count('from_pretrained("org/target-1B")') == 2
        assert "apply_chat_template" in code
        assert "apply_chat_template" not in made(folder, chat=False).text
        assert 'custom_generate="me/target-1B-D2SD"' in made(folder).text

    def test_a_single_drafter_has_a_card_too(self, folder):
        tiny_drafter(draft_vocab_size=7).save_pretrained(folder / "one")
        text = made(folder, model=folder / "one", results=[], details=None).text
        assert 'D2SDAssistant.from_drafters("me/target-1B-D2SD")' in text
        assert "\n| draft vocabulary | 7 |\n" in text
        assert "custom_generate" not in text and "Measured" not in text

    def test_another_file_is_no_result(self, folder):
        (folder / "other.json").write_text('{"a": 1}')
        with pytest.raises(ValueError, match="other.json is no result file"):
            read_results(folder / "other.json")

    def test_no_line_ends_in_a_blank(self, folder):
        assert not re.search(r"[ \t]$", made(folder).text, re.M)
        assert "\n\n\n" not in made(folder).text


class TestTheShippedCard:
    def command(self, out: Path) -> list[str]:
        """The script's own, with another place to write to."""
        script = (ROOT / "examples" / "card_smollm2.sh").read_text().replace("\\\n", " ")
        folder = re.search(r"^folder=(\S+)$", script, re.M)[1]
        words = shlex.split(re.search(r'^exec "[^"]*" (.*)$', script, re.M)[1].replace("$folder", folder))
        at = words.index("--out") + 1
        return [*words[:at], str(out), *words[at + 1 :]]

    def test_is_what_the_script_makes_today(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(ROOT)
        main(self.command(tmp_path / "README.md"))
        assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "README.md")
        assert (tmp_path / "README.md").read_text() == (SHIPPED / "README.md").read_text()

    def test_shows_only_pictures_that_are_there(self):
        pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (SHIPPED / "README.md").read_text())
        assert len(pictures) == 2 and all((SHIPPED / name).exists() for name in pictures)

    @pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
    def test_pages_have_the_figures_of_the_card(self, page):
        def figures(page: Path) -> list[list[str]]:
            table = page.read_text().split("| strategy | GSM8K | HumanEval | Spec-Bench | mean | nodes a pass |\n")[1]
            return [line.split("|")[2:-1] for line in table.split("\n\n")[0].splitlines()]

        assert len(figures(ROOT / page)) == 7 and figures(ROOT / page) == figures(SHIPPED / "README.md")
