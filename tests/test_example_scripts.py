"""The scripts of examples/, each on a small target: what they print is what plain `generate` gives."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import transformers as tf
from tiny import IMAGE_TOKEN, VOCAB, tiny_drafter, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from words import WORDS, save_word_target

from hf_d2sd import D2SDAssistant

ROOT = Path(__file__).parents[1]
ON_TEXT = ("pipeline", "batch", "sampling", "multi_turn", "quantized")
CLAIMS = {  # what a script says of its texts, for each comparison it makes
    "pipeline": ("same text as plain: True", 2),
    "batch": ("same texts: True", 3),
    "sampling": ("same text as plain: True", 3),
    "multi_turn": ("that without the cache: True", 3),
    "quantized": ("plain one: True", 2),
}


def run(monkeypatch, capsys, script: str, *arguments: object) -> str:
    """What a script prints, in this process."""
    path = ROOT / "examples" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A target of words, and a pair for it."""
    sizes = dict(vocab_size=len(WORDS), num_target_layers=2, target_layer_ids=[0, 1], eos_token_id=0, pad_token_id=0)
    pair = D2SDAssistant.from_drafters(tiny_drafter(**sizes), tiny_drafter(seed=1, **sizes))
    folder = tmp_path_factory.mktemp("pair")
    pair.save_pretrained(folder)
    return save_word_target(tmp_path_factory.mktemp("target")), folder


@pytest.mark.parametrize("script", ON_TEXT)
def test_it_writes_the_plain_text(script, words, monkeypatch, capsys):
    target, pair = words
    out = run(monkeypatch, capsys, script, "--target", target, "--pair", pair, "--max-new-tokens", 8)
    claim, times = CLAIMS[script]
    assert out.count(claim) == times, out


@pytest.mark.slow
@pytest.mark.parametrize("script", ON_TEXT)
def test_on_smollm2_it_writes_the_plain_text(script, smollm2_folder, monkeypatch, capsys):
    out = run(monkeypatch, capsys, script, "--target", smollm2_folder)
    claim, times = CLAIMS[script]
    assert out.count(claim) == times, out


IMAGE_TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{{ '<begin>' if part['type'] == 'image' else part['text'] }} {% endfor %}{% endfor %}"
)


def save_image_target(folder: Path) -> Path:
    """The tiny Gemma 3 for images and text, with a processor of 24 words."""
    words = [f"w{i}" for i in range(VOCAB)]
    words[IMAGE_TOKEN : IMAGE_TOKEN + 3] = "<image>", "<begin>", "<finish>"
    table = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(image_token="<image>", boi_token="<begin>", eoi_token="<finish>")
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=table, extra_special_tokens=special)
    images = tf.Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = tf.Gemma3Processor(images, tokenizer, chat_template=IMAGE_TEMPLATE, image_seq_length=4)
    processor.save_pretrained(folder)
    tiny_target("gemma3_image").save_pretrained(folder)
    return folder


def test_an_image_prompt_gets_the_plain_text(tmp_path, monkeypatch, capsys):
    target = save_image_target(tmp_path / "target")
    drafters = tmp_path / "first", tmp_path / "second"
    for seed, folder in enumerate(drafters):
        tiny_drafter(seed=seed).save_pretrained(folder)
    options = ["--target", target, "--drafters", *drafters, "--max-new-tokens", 8, "--question", "w3 w4 w5"]
    *texts, last = run(monkeypatch, capsys, "image_prompt", *options).splitlines()
    plain, drafted = (text.partition(" s: ")[2].strip() for text in texts)
    assert plain and plain == drafted
    assert last.startswith("9 prompt tokens with the image's; 8 tokens in")


def test_a_stream_is_the_plain_text_with_its_sources(words, monkeypatch, capsys):
    target, pair = words
    out = run(
        monkeypatch, capsys, "streaming", "--target", target, "--pair", pair, "--prompt", "f g", "--max-new-tokens", 8
    )
    text = re.sub(r"\033\[\d+m", "", out).partition("\n\nfirst drafter")[0]
    model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(target), tf.AutoTokenizer.from_pretrained(target)
    chat = [{"role": "user", "content": "f g"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert text == tokenizer.decode(plain, skip_special_tokens=True)
    assert len(text) > 3 and "8 tokens came in" in out
