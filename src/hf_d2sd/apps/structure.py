"""What configs and tokenizers tell of a target and its drafters, before any weight is read."""

from collections.abc import Iterator

from transformers import AutoTokenizer, GenerationConfig

from ..binding import find_misfits
from ..cache import layer_windows
from ..compat import target_state_obstacle
from ..modeling import D2SDDrafterConfig
from ..modeling.compat_d2sd import cached_file
from ..options import settle
from .findings import Finding, fine, note, wrong
from .loading import PairPlan

_OTHER_DRAFTERS = "Use drafters that were trained for this target, or train some: hf-d2sd distill, then train."
_SAMPLE = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]


def check_structure(plan: PairPlan) -> Iterator[Finding]:
    found = check_target(plan)
    yield found
    if found.level == "wrong":
        return
    yield from check_misfits(plan)
    yield from check_layer_ids(plan)
    yield from check_mask_token(plan)
    yield from check_tokenizer(plan)
    yield check_template(plan)
    yield check_dtype(plan)
    yield check_options(plan)


def roles(plan: PairPlan) -> list[tuple[str, D2SDDrafterConfig]]:
    both = ("first", plan.pair_config.first), ("second", plan.pair_config.second)
    return [(role, config) for role, config in both if config is not None]


def check_target(plan: PairPlan) -> Finding:
    """Whether D²SD can decode such a model at all."""
    name = type(plan.target_config).__name__
    advice = "D²SD needs a decoder-only model that keeps keys, values and recurrent states in its cache's layers."
    try:
        layer_windows(plan.target_config)
        target = plan.empty_target
    except ValueError as error:
        return wrong("target", str(error), advice)
    obstacle = target_state_obstacle(target)
    if target.config.is_encoder_decoder or obstacle is not None:
        why = "has an encoder" if obstacle is None else f"has a recurrent state, and {obstacle}"
        return wrong("target", f"{name} {why}.", advice)
    text = plan.target_config.get_text_config(decoder=True)
    return fine("target", f"{type(target).__name__}, {text.num_hidden_layers} layers, width {text.hidden_size}.")


def check_misfits(plan: PairPlan) -> Iterator[Finding]:
    """Vocabulary, width, layers, mask token and tokenizer, as `generate` would refuse them."""
    misfits = list(find_misfits(plan.empty_assistant, plan.empty_target, plan.tokenizer))
    text = plan.target_config.get_text_config(decoder=True)
    sizes = {
        "vocabulary": f"{text.vocab_size} tokens on both sides.",
        "width": f"The target's {text.hidden_size} on both sides.",
        "layers": "; ".join(f"{role} reads {config.target_layer_ids}" for role, config in roles(plan)) + ".",
    }
    for misfit in misfits:
        advice = "Load the target's own tokenizer, or use its drafters." if misfit.subject == "tokenizer" else ""
        advice = advice or ("Set it in config.json." if misfit.subject == "mask token" else _OTHER_DRAFTERS)
        yield wrong(misfit.subject, misfit.words, advice)
    for subject, words in sizes.items():
        if subject not in {misfit.subject for misfit in misfits}:
            yield fine(subject, words)


def check_layer_ids(plan: PairPlan) -> Iterator[Finding]:
    for role, config in roles(plan):
        ids = config.target_layer_ids
        if list(ids) != sorted(set(ids)):
            yield note(
                "layers",
                f"The {role} drafter's target_layer_ids {ids} do not rise: features are joined in this order.",
                f"Unless it was trained so, set them to {sorted(set(ids))} in config.json.",
            )


def check_mask_token(plan: PairPlan) -> Iterator[Finding]:
    """That the mask token is the same for both drafters, and no token that text is made of."""
    masks = {role: config.mask_token_id for role, config in roles(plan)}
    if None in masks.values():
        return
    if len(set(masks.values())) > 1:
        yield note(
            "mask token",
            f"The drafters have different mask tokens: {masks}.",
            "That is right only if they were trained so; a drafter with a wrong one drafts nonsense.",
        )
    ends = _end_tokens(plan)
    special = set(plan.tokenizer.all_special_ids) | set(plan.tokenizer.get_added_vocab().values())
    for role, token in masks.items():
        text = plan.tokenizer.decode([token])
        if token in ends:
            words = f"The {role} drafter's mask token {token} is {text!r}, which ends a text."
            yield note("mask token", words, "Compare it with the one that the drafter was trained with.")
        elif token < len(plan.tokenizer) and token not in special:
            words = f"The {role} drafter's mask token {token} is {text!r}, an ordinary token."
            yield note("mask token", words, "Compare it with the one that the drafter was trained with.")
        else:
            yield fine("mask token", f"{role}: {token}, {text!r}.")


def _end_tokens(plan: PairPlan) -> set[int]:
    ends = plan.target_config.get_text_config(decoder=True).eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) | {plan.tokenizer.eos_token_id}


def check_tokenizer(plan: PairPlan) -> Iterator[Finding]:
    size, known = plan.target_config.get_text_config(decoder=True).vocab_size, len(plan.tokenizer)
    if known > size:
        yield wrong(
            "tokenizer",
            f"The tokenizer has {known} tokens and the target's vocabulary {size}.",
            "The folder holds another model's tokenizer, or tokens were added without resizing the embedding.",
        )
    unknown = [role for role, config in roles(plan) if config.tokenizer_fingerprint is None]
    if unknown:
        yield note(
            "tokenizer",
            f"Not recorded by the {' and the '.join(unknown)} drafter: whether it is the target's cannot be told.",
        )
    elif known <= size and not list(find_misfits(plan.empty_assistant, plan.empty_target, plan.tokenizer)):
        yield fine("tokenizer", f"Its fingerprint is the drafters': {plan.pair_config.first.tokenizer_fingerprint}.")


def check_template(plan: PairPlan) -> Finding:
    """Drafters learn a template with the text; a pair that is saved with a tokenizer says which."""
    if plan.tokenizer.chat_template is None:
        return note(
            "chat template",
            "The tokenizer has none, so prompts are taken as they are.",
            "If the drafters learned from conversations, give the target's tokenizer its template.",
        )
    theirs = _saved_tokenizer(plan.options.drafters[0])
    if theirs is None or theirs.chat_template is None:
        return fine("chat template", "The target's; the drafters are saved without one to compare.")
    shown = [tokenizer.apply_chat_template(_SAMPLE, tokenize=False) for tokenizer in (plan.tokenizer, theirs)]
    if shown[0] != shown[1]:
        return wrong(
            "chat template",
            f"The target's writes {shown[0]!r} where the drafters' own writes {shown[1]!r}.",
            "Drafters are worse with text of another form: use the template they were trained with.",
        )
    return fine("chat template", "The target's writes what the drafters' own does.")


def _saved_tokenizer(name: str):
    """The tokenizer in a drafter's repository, if there is one."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(name, "tokenizer_config.json", **quiet)
    return AutoTokenizer.from_pretrained(name) if found is not None else None


def check_dtype(plan: PairPlan) -> Finding:
    saved = {role: _dtype_name(config.dtype or plan.pair_config.dtype) for role, config in roles(plan)}
    used = plan.dtype
    if used == "auto":
        used = plan.target_config.dtype or plan.target_config.get_text_config(decoder=True).dtype
    used = _dtype_name(used)
    words = f"Target and drafters run in {used}; the drafters were saved in {', '.join(sorted(set(saved.values())))}."
    if used == "float16" and set(saved.values()) - {"float16"}:
        return note("dtype", words, "float16 ends at 65504: if drafts are bad, run in bfloat16 or float32.")
    if used != "float32":
        words += " Near-ties of the target may be decided in another way than by plain decoding."
    return fine("dtype", words)


def _dtype_name(dtype) -> str:
    return str(dtype or "float32").removeprefix("torch.")


def check_options(plan: PairPlan) -> Finding:
    given = GenerationConfig(**plan.options.d2sd_options())
    try:
        options = settle(plan.empty_assistant, given)
    except ValueError as error:
        return wrong("options", str(error), "Change that option, or the pair's config.json.")
    budget = "without a limit" if options.tree_budget is None else f"of at most {options.tree_budget} nodes"
    return fine(
        "options",
        f"K = {options.num_branches}, trees {budget}, {options.tree_width} tokens wide, γ = {options.block_size}, "
        f"γ₂ = {options.second_block_size}.",
    )
