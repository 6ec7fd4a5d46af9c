"""Every causal LM of Transformers, tiny and random: does D²SD write what plain `generate` writes?

    python benchmarks/targets.py [TYPE ...] [--out docs/targets.md]

A model of each type in `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` is built from a small config and decodes greedily in
float32, with drafts that are often right: narrow and wide trees, one sequence and several, a sliding window that is
smaller than the text. The verdict is one of

* equal: each of these texts is plain decoding's;
* refused: a ValueError that names the model, before anything was decoded;
* not built: there is no such model here, or none that decodes text alone;
* CRASH or DIFFERS: a defect. The command exits with 1.

Needs nothing from the Hub. Each type runs in a process of its own with a limit of time and memory.
"""

import argparse
import contextlib
import inspect
import logging
import multiprocessing
import re
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_d2sd import D2SDAssistant, D2SDDrafterConfig, D2SDDrafterModel
from hf_d2sd.candidates import Draft
from hf_d2sd.drafting import Drafter
from hf_d2sd.kernels import KERNELS

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB, LAYERS, WINDOW = 24, 4, 10
PROMPT, NEW_TOKENS, ROWS, SEEDS = 14, 24, 3, 6
SECONDS, GIGABYTES, PARAMETERS = 120, 6, 20_000_000

# The same size has many names; a config is given those that it knows.
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.5, sliding_window=WINDOW,
    bos_token_id=None, eos_token_id=None, pad_token_id=None, tie_word_embeddings=False,
    is_decoder=True,
    # of older models
    n_embd=32, n_layer=LAYERS, n_head=4, n_positions=512, n_inner=48, n_ctx=512, ffn_dim=48, d_model=32,
    num_layers=LAYERS, num_heads=4, ffn_hidden_size=48, word_embed_proj_dim=32, rotary_dim=8, n_heads=4,
        n_layers=LAYERS,
    max_seq_len=512, decoder_layers=LAYERS, decoder_attention_heads=4, decoder_ffn_dim=48, init_std=0.5,
    embedding_size=32, init_range=0.5, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    # of experts
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1,
    topk_group=1, n_shared_experts=1, first_k_dense_replace=1, shared_expert_intermediate_size=24,
    moe_num_experts=4, moe_topk=2, num_experts_per_token=2, moe_k=2, decoder_sparse_step=1,
    # of latent attention
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, qk_head_dim=16,
    # of recurrent layers
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    # of embeddings for each layer
    vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=8, num_kv_shared_layers=2, global_head_dim=16,
    num_global_key_value_heads=1,
)  # fmt: skip
_ROPE = dict(rope_type="default", rope_theta=1e4)
_MAMBA_2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1)
_ALTERNATING = dict(layer_types=["sliding_attention", "full_attention"] * (LAYERS // 2))

# What a type needs beside or instead; with `DEFAULT` its config has its own.
DEFAULT = object()
OWN: dict[str, dict] = {
    "bailing_hybrid": dict(layer_group_size=2),
    "bamba": dict(attn_layer_indices=[1, 3], **_MAMBA_2),
    "cohere_compass_text": dict(rope_parameters=dict.fromkeys(("full_attention", "sliding_attention"), _ROPE),
        **_ALTERNATING),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
                 ffn_config=dict(ffn_hidden_size=48, moe_num_experts=4, moe_top_k=2), num_key_value_heads=2),
    "dory": dict(n_input_layers=1, n_output_layers=1, **_ALTERNATING),
    "gemma3n_text": {**_ALTERNATING, "intermediate_size": [48] * LAYERS, "laurel_rank": 4,
                     "activation_sparsity_pattern": [0.0] * LAYERS},
    "gemma3": dict(vision_config=dict(model_type="siglip_vision_model", image_size=8, patch_size=4),
        mm_tokens_per_image=4,
                   text_config=_ALTERNATING),
    "gemma4": dict(text_config=_ALTERNATING, audio_config=None),
    "gemma4_text": _ALTERNATING,
    "gemma4_unified": dict(text_config=_ALTERNATING, audio_config=None),
    "gemma4_unified_text": _ALTERNATING,
    "falcon_h1": dict(mamba_d_ssm=64, **_MAMBA_2),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp", "mamba"], mamba_num_heads=8, mamba_head_dim=8,
                       ssm_state_size=8, n_groups=2, chunk_size=8, num_hidden_layers=DEFAULT),
    "minimax": dict(sliding_window=None, block_size=8, layer_types=["linear_attention", "full_attention"] * 2),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, mamba_headdim=8, mamba_ngroups=1,
                   n_mamba_heads=8, chunk_size=8, num_mem_blocks=1, use_mem_rope=True, head_dim=DEFAULT),
    "gpt_neo": dict(attention_types=[[["global", "local"], LAYERS // 2]], window_size=WINDOW),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2, **_MAMBA_2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "kimi_linear": dict(linear_head_dim=8, linear_num_heads=4),
    "mamba2": dict(num_heads=8, head_dim=8, n_groups=1),
    "modernbert-decoder": dict(global_attn_every_n_layers=2, local_attention=2 * WINDOW),
    "prophetnet": dict(num_decoder_layers=LAYERS, num_encoder_layers=1, num_decoder_attention_heads=4,
                       num_encoder_attention_heads=4, decoder_ffn_dim=48, pad_token_id=0),
    "rembert": dict(input_embedding_size=32, output_embedding_size=32),
    "fuyu": dict(text_config=dict(model_type="persimmon"), image_size=16, patch_size=8),
    "got_ocr2": dict(text_config=dict(model_type="qwen2"), vision_config=dict(image_size=32, patch_size=8,
        output_channels=8)),
    "xlm": dict(causal=True, pad_index=0, n_langs=1),
    "xmod": dict(languages=["en"], default_language="en"),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip
# Types of that mapping whose models do not write text from a text alone.
ELSEWHERE = {
    "musicgen": "it writes codes of sound, several at each place",
    "musicgen_melody": "it writes codes of sound, several at each place",
}

# Of the weights: far from flat, so that float32 rounding decides between no two tokens, and tame where layers recur.
SCALES = {"hrm_text": 0.1}


class NotBuilt(Exception):
    """There is no tiny model of a type; says why."""


@dataclass(frozen=True)
class Verdict:
    """What became of one type."""

    kind: str
    name: str  # of the class
    verdict: str  # equal, refused, not built, CRASH, DIFFERS
    words: str  # why, or by which attention


def tiny_target(kind: str, seed: int = 1, **changes):
    """A random model of a type, in which no weight is a constant.

    Raises:
        NotBuilt: with the reason.
    """
    if kind in ELSEWHERE:
        raise NotBuilt(ELSEWHERE[kind])
    model_class = getattr(tf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], None)
    if model_class is None:
        raise NotBuilt("this release of Transformers has no such class")
    config = tiny_config(tf.CONFIG_MAPPING[kind], {**OWN.get(kind, {}), **changes})
    if not isinstance(config, model_class.config_class):  # the mapping's models of text alone
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > PARAMETERS:
        raise NotBuilt(f"what this file knows of its configuration makes {size:,} parameters")
    torch.manual_seed(seed)
    model = model_class(config).float().eval()
    for parameter in model.parameters():
        noise, scale = torch.randn_like(parameter), SCALES.get(kind, 0.5)
        parameter.data = parameter.data + 0.1 * noise if parameter.ndim == 1 else scale * noise
    model.generation_config = tf.GenerationConfig()
    return model


def tiny_config(config_class: type, changes: dict):
    """A configuration with those of `SIZES` that it knows; those that it holds inside are small as well."""
    known = set(inspect.signature(config_class.__init__).parameters)
    known |= {name for base in config_class.__mro__ for name in getattr(base, "__annotations__", {})}
    mapped = getattr(config_class, "attribute_map", {})
    sizes = {name: value for name, value in SIZES.items() if name in known or name in mapped}
    sizes = {name: value for name, value in sizes.items() if mapped.get(name) not in sizes}
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        sizes["num_key_value_heads"] = 4  # of latent attention each head has its own
    sizes |= {name: value for name, value in changes.items() if name not in getattr(config_class, "sub_configs", {})}
    for name, inside in getattr(config_class, "sub_configs", {}).items():
        if name not in sizes:
            sizes[name] = _inside(name, inside, changes)
    try:
        return config_class(**{name: value for name, value in sizes.items() if value is not DEFAULT})
    except Exception as error:
        if not all(f"{name}_token_id" in sizes for name in ("pad", "bos", "eos")) or "_token_id" not in str(error):
            raise
        return config_class(**{**sizes, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)})


def _inside(name: str, config_class: type, changes: dict):
    """A configuration in another one; of one that may be of any type `OWN` says the type."""
    sizes = changes.get(name, {})
    if sizes is None:
        return None
    if config_class is tf.AutoConfig and "model_type" not in sizes:
        raise NotBuilt(f"its {name} may be of any model, and this file names none")
    return tiny_config(tf.CONFIG_MAPPING[sizes["model_type"]] if "model_type" in sizes else config_class, sizes)


def tiny_drafter(model, seed: int) -> D2SDDrafterModel:
    text = model.config.get_text_config(decoder=True)
    torch.manual_seed(seed)
    sizes = dict(intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = D2SDDrafterConfig(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_target_layers=text.num_hidden_layers,
        target_layer_ids=[0, 1], block_size=6, mask_token_id=1, initializer_range=0.5, **sizes,
    )  # fmt: skip
    return D2SDDrafterModel(config).eval()


@contextlib.contextmanager
def drafts_often_right(sequences: list[torch.Tensor], accuracy: float, seed: int = 0) -> Iterator[None]:
    """Within, this share of what drafters draft is how each row's sequence goes on; the networks still run."""
    stock, stock_select = Drafter._denoise, Drafter.select
    generator, rows = torch.Generator().manual_seed(seed), {}  # by drafter, which are still in the batch
    padded = [torch.nn.functional.pad(sequence, (0, 64), value=2) for sequence in sequences]

    def corrected(drafter: Drafter, *args) -> Draft:
        draft = stock(drafter, *args)
        places = zip(rows.get(drafter, range(len(sequences))), drafter.context.positions, strict=True)
        truth = torch.stack([padded[row][at + 1 : at + 1 + draft.depth] for row, at in places])
        right = torch.rand(draft.best.shape, generator=generator) < accuracy
        confidence = torch.rand(draft.best.shape, generator=generator).clamp(0.05, 0.99)
        tokens, width = torch.where(right, truth[:, None], draft.best), torch.arange(draft.tokens.shape[-1])
        likely = confidence[..., None] / 10.0**width  # the others are other tokens, and less likely
        return Draft((tokens[..., None] + width) % VOCAB, likely, likely.log(), draft.kept)

    def select(drafter: Drafter, staying: list[int]) -> None:
        stock_select(drafter, staying)
        before = rows.get(drafter, range(len(sequences)))
        rows[drafter] = [before[at] for at in staying]

    Drafter._denoise, Drafter.select = corrected, select
    try:
        yield
    finally:
        Drafter._denoise, Drafter.select = stock, stock_select


CASES = (
    dict(d2sd_num_branches=3, d2sd_tree_budget=12),
    dict(d2sd_num_branches=3, d2sd_tree_budget=64),
    dict(d2sd_num_branches=2, d2sd_tree_budget=32, d2sd_tree_width=2),
)  # fmt: skip


def verdict_of(kind: str, shows_where: bool = False) -> Verdict:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    try:
        model, truths = _that_writes(kind)
        pair = _pair_for(model)
    except NotBuilt as reason:
        return Verdict(kind, name, "not built", str(reason))
    except Exception as error:  # whatever a model does that was made from a config that may not suit it
        if shows_where:
            traceback.print_exc()
        return Verdict(kind, name, "not built", _brief(error))
    try:
        wrong, tokens_a_cycle = _texts_that_differ(model, pair, truths)
    except Exception as error:
        if shows_where:
            traceback.print_exc()
        is_refusal = isinstance(error, ValueError) and _is_named(model, str(error))
        return Verdict(kind, name, "refused" if is_refusal else "CRASH", _brief(error))
    if wrong:
        return Verdict(kind, name, "DIFFERS", ", ".join(wrong))
    if tokens_a_cycle < 1.2:
        return Verdict(kind, name, "DIFFERS", f"{tokens_a_cycle:.2f} tokens a cycle: drafts were hardly ever accepted")
    return Verdict(kind, name, "equal", pair.attention_backend)


def _that_writes(kind: str) -> tuple:
    """A tiny model whose plain texts are not of one token over and over, and these texts."""
    for seed in range(1, SEEDS + 1):
        model = tiny_target(kind, seed)
        texts = _plain_texts(model)
        if len({token for text in texts for token in text[-NEW_TOKENS:].tolist()}) >= 4:
            return model, texts
    raise NotBuilt(f"{SEEDS} random models write next to nothing but one token: no test")


def _plain_texts(model) -> list[torch.Tensor]:
    """Prompts of several lengths, each with its plain continuation."""
    vocab = min(model.config.get_text_config(decoder=True).vocab_size, VOCAB)
    generator, texts = torch.Generator().manual_seed(3), []
    for row in range(ROWS):
        ids = torch.randint(2, vocab - 2, (1, PROMPT - 5 * row), generator=generator)
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0]
        if len(text) != ids.shape[1] + NEW_TOKENS:
            raise NotBuilt("plain generate does not go on from a text")
        texts.append(text)
    return texts


GREEDY = dict(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)


def _pair_for(model) -> D2SDAssistant:
    return D2SDAssistant.from_drafters(tiny_drafter(model, 0), tiny_drafter(model, 1))


def _texts_that_differ(model, pair: D2SDAssistant, truths: list[torch.Tensor]) -> tuple[list[str], float]:
    """The cases in which a text is not plain decoding's, and how many tokens a cycle gave."""
    wrong, cycles, tokens = [], 0, 0
    width = len(truths[0])
    batch = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in truths])[:, :-NEW_TOKENS]
    lengths = torch.tensor([len(text) - NEW_TOKENS for text in truths])
    mask = (torch.arange(batch.shape[1]) >= batch.shape[1] - lengths[:, None]).long()
    together = model.generate(batch, attention_mask=mask, **GREEDY)
    together = [text[width - NEW_TOKENS - length :] for text, length in zip(together, lengths)]
    for number, case in enumerate(CASES):
        for rows in (1, ROWS):
            inputs = dict(input_ids=batch[:rows], attention_mask=mask[:rows])
            # Where padding changes a model's own text, its text of the batch counts as well as that of each row alone.
            for texts in (truths[:1],) if rows == 1 else (truths, together):
                with drafts_often_right(texts, 0.8, seed=number):
                    ours = model.generate(**inputs, assistant_model=pair, **GREEDY, **case)
                if is_equal := _ends_alike(ours, texts):
                    break
            if not is_equal:
                wrong.append(f"{rows} row{'s' * (rows > 1)} with {_in_words(case)}")
            cycles, tokens = cycles + pair.last_stats.cycles * rows, tokens + pair.last_stats.new_tokens
    return wrong, tokens / cycles


def _ends_alike(texts: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    return [one[-NEW_TOKENS:].tolist() for one in texts] == [one[-NEW_TOKENS:].tolist() for one in others]


def _in_words(case: dict) -> str:
    return ", ".join(f"{name.removeprefix('d2sd_')} {value}" for name, value in case.items())


def _is_named(model, message: str) -> bool:
    """Whether a message says which model it speaks of."""
    text = model.config.get_text_config(decoder=True)
    return any(type(one).__name__ in message for one in (model, text))


def _brief(error: BaseException) -> str:
    message = str(error) if isinstance(error, (ValueError, NotBuilt)) else f"{type(error).__name__}: {error}"
    return re.sub(r"\s+", " ", message)[:400]


# All types, each in its own process ----------------------------------------------------------------------------------


def run_all(kinds: list[str], jobs: int = 1) -> Iterator[Verdict]:
    """The verdicts of these types, in their order."""
    context = multiprocessing.get_context("fork")
    waiting, running, done = list(kinds), {}, {}
    for kind in kinds:
        while kind not in done:
            while waiting and len(running) < jobs:
                started = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_in_process, args=(started, sender))
                process.start()
                sender.close()
                running[started] = process, receiver
            first, (process, receiver) = next(iter(running.items()))
            done[first] = _outcome(first, process, receiver)
            del running[first]
        yield done[kind]


def _outcome(kind: str, process, receiver) -> Verdict:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    words = f"no answer within {SECONDS} s"
    if receiver.poll(SECONDS):
        with contextlib.suppress(EOFError):
            return receiver.recv()
        words = "its process ended"
    process.kill()
    process.join()
    return Verdict(kind, name, "CRASH", words)


def _in_process(kind: str, sender) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    sender.send(verdict_of(kind))


# The page ------------------------------------------------------------------------------------------------------------

HEAD = """# Targets

Each type of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES` in Transformers {version}, tiny and random, in float32 on a CPU:
{counts}.

`python benchmarks/targets.py --out docs/targets.md` makes this page, and a slow test makes it again and compares.

*equal* means that greedy texts are those of plain `generate`, token for token: one sequence and a padded batch of
three (where padding changes a model's own text: as a batch, or each row alone), trees of up to 12 and 64 nodes
and trees of width 2, drafts right at 80 percent of the positions, a sliding
window of {window} where the type has one, and {new} new tokens that lead past it. How the tree attends follows: the
*cascade*, or a *mask* over all keys where a model or its size of heads leaves no other way
([attention](how-it-works.md#attention)). *refused* means a `ValueError` that names the model, before anything is
decoded. *not built* types have no model here that writes a text: `benchmarks/targets.py` knows no small
configuration, or the type is for something else.

A type is more than its default settings; every model is tried with a small tree when it is first decoded with, see
[limits](limits.md#targets).

| type | model | | |
|---|---|---|---|
"""


def as_page(verdicts: list[Verdict]) -> str:
    counts = Counter(verdict.verdict for verdict in verdicts)
    head = HEAD.format(
        version=tf.__version__,
        counts=", ".join(f"{count} {name}" for name, count in counts.most_common()),
        window=WINDOW,
        new=NEW_TOKENS,
    )
    rows = (f"| `{one.kind}` | {one.name} | {one.verdict} | {_shortly(one)} |\n" for one in verdicts)
    return head + "".join(rows)


def read_page(page: str) -> dict[str, str]:
    """From each type in a page to its verdict."""
    return dict(re.findall(r"^\| `([\w-]+)` \| \w+ \| ([\w ]+) \|", page, re.M))


def _shortly(verdict: Verdict) -> str:
    words = verdict.words.replace("|", "/")
    if verdict.verdict == "equal":
        backend, reason = words.split(": ", 1)
        return "cascade" if backend in KERNELS else "mask: " + reason.removeprefix("with a mask over all keys, since ")
    for known in (
        "D²SD decoding is greedy search or sampling by a decoder with a key-value cache; here ",
        f"{verdict.name} ",
    ):
        words = words.removeprefix(known)
    for known in ("Change that, or call generate without assistant_model.", "Generate without assistant_model."):
        words = words.removesuffix(known).strip()
    return words.rstrip(".")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--out", type=Path, help="write the table here")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--trace", action="store_true", help="run in this process, and show where a defect was raised")
    args = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    verdicts = []
    for verdict in (
        (verdict_of(kind, True) for kind in args.types) if args.trace else run_all(args.types or TYPES, args.jobs)
    ):
        verdicts.append(verdict)
        print(f"{verdict.kind}: {verdict.verdict}: {verdict.words}", flush=True)
    counts = Counter(verdict.verdict for verdict in verdicts)
    if args.out is not None:
        args.out.write_text(as_page(verdicts), encoding="utf-8")
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()))
    return int(bool({"CRASH", "DIFFERS"} & set(counts)))


if __name__ == "__main__":
    sys.exit(main())
