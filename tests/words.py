"""A tiny random target with a tokenizer of words and a chat template, on disk."""

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<end>", "<user>", "<reply>", "<think>", "<system>", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{{ {'user': '<user>', 'system': '<system>', 'assistant': '<reply>'}[m['role']] }} "
    "{{ m['content'] }} {% if m['role'] != 'user' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<reply>{% if enable_thinking %} <think>{% endif %}{% endif %}"
)


def save_word_target(folder: Path, layers: int = 2) -> Path:
    """A random Llama over 31 words; a user's turn ends with <reply>."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="z"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = tf.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.5,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_word_drafters(folder: Path, layers: int = 2, **changes) -> tuple[Path, Path]:
    """Two random drafters for `save_word_target`, each in a folder of its own."""
    from tiny import tiny_drafter

    from hf_d2sd import tokenizer_fingerprint

    tokenizer = tf.AutoTokenizer.from_pretrained(save_word_target(folder / "tokenizer"))
    settings = dict(
        vocab_size=len(WORDS),
        num_target_layers=layers,
        target_layer_ids=[0, 1],
        mask_token_id=WORDS.index("<think>"),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    paths = folder / "first", folder / "second"
    for seed, path in enumerate(paths):
        tiny_drafter(seed=seed, **{**settings, **changes}).save_pretrained(path)
    return paths
