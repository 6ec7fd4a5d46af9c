"""Targets whose rotary positions are triples of time, height and width: images in the prompt, text after them."""

import copy
import functools

import pytest
import torch
import transformers as tf
from tiny import IMAGE_TOKEN, LAYERS, VOCAB, WIDTH, OracleDrafts, prompt, tiny_assistant, tiny_drafter

from hf_d2sd import D2SDAssistant
from hf_d2sd.compat import CACHE_NAME
from hf_d2sd.drafting import Drafter
from hf_d2sd.probing import attention_for
from hf_d2sd.target import Target

IMAGE_START, IMAGE_END, VIDEO_TOKEN = 21, 22, 23
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},  # of 8 dimensions
    initializer_range=0.5,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
VISION = dict(depth=1, num_heads=2, patch_size=2, temporal_patch_size=2, spatial_merge_size=2, initializer_range=0.5)
TOKENS = dict(image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN)
QWEN_TOKENS = dict(TOKENS, vision_start_token_id=IMAGE_START, vision_end_token_id=IMAGE_END)


def _qwen2_vl():
    vision = tf.models.qwen2_vl.configuration_qwen2_vl.Qwen2VLVisionConfig(embed_dim=16, hidden_size=WIDTH, **VISION)
    text = tf.Qwen2VLTextConfig(**copy.deepcopy(TEXT))
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_TOKENS))


def _qwen2_5_vl():
    sizes = dict(VISION, hidden_size=16, intermediate_size=16, out_hidden_size=WIDTH, window_size=8)
    vision = tf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
        **sizes, fullatt_block_indexes=[0], tokens_per_second=2
    )
    config = tf.Qwen2_5_VLConfig(
        text_config=tf.Qwen2_5_VLTextConfig(**copy.deepcopy(TEXT)), vision_config=vision, **QWEN_TOKENS
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(names: str = "Qwen3VL", **more):
    sizes = dict(VISION, hidden_size=16, intermediate_size=16, out_hidden_size=WIDTH, num_position_embeddings=64)
    vision = getattr(tf, f"{names}Config")().vision_config.__class__(**{**sizes, "deepstack_visual_indexes": [0]})
    text = getattr(tf, f"{names}TextConfig")(**copy.deepcopy(TEXT), head_dim=8, **more)
    config = getattr(tf, f"{names}Config")(text_config=text, vision_config=vision, **QWEN_TOKENS)
    return getattr(tf, f"{names}ForConditionalGeneration")(config)


def _qwen3_vl_moe():
    return _qwen3_vl("Qwen3VLMoe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)


def _glm4v():
    sizes = dict(VISION, hidden_size=16, intermediate_size=16, out_hidden_size=WIDTH, image_size=16)
    vision = tf.Glm4vConfig().vision_config.__class__(**sizes)
    tokens = dict(TOKENS, image_start_token_id=IMAGE_START, image_end_token_id=IMAGE_END)
    config = tf.Glm4vConfig(text_config=tf.Glm4vTextConfig(**copy.deepcopy(TEXT)), vision_config=vision, **tokens)
    return tf.Glm4vForConditionalGeneration(config)


def _qwen3_5():
    sizes = dict(VISION, hidden_size=16, intermediate_size=16, out_hidden_size=WIDTH, num_position_embeddings=64)
    vision = tf.Qwen3_5Config().vision_config.__class__(**sizes)
    delta = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
    types = ["linear_attention", "full_attention"] * (LAYERS // 2)
    text = tf.Qwen3_5TextConfig(**copy.deepcopy(TEXT), head_dim=8, **delta, layer_types=types)
    return tf.Qwen3_5ForConditionalGeneration(tf.Qwen3_5Config(text_config=text, vision_config=vision, **QWEN_TOKENS))


BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "glm4v": _glm4v,
    "qwen3_5": _qwen3_5,
}
RECURRENT = ("qwen3_5",)  # layers with a state beside those that attend
FAMILIES = tuple(family for family in BUILDERS if family not in RECURRENT)
DENSE = tuple(family for family in FAMILIES if "moe" not in family)


@functools.cache
def target_of(family: str):
    torch.manual_seed(sum(map(ord, family)))
    model = BUILDERS[family]().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def image_prompt(length: int, grids=((1, 4, 6),), seed: int = 0, kind: str = "image", ends_with_it=False) -> dict:
    """Words, each image after three of them: a grid of 4 by 6 patches is six tokens, which take three positions."""
    generator, token = torch.Generator().manual_seed(seed), IMAGE_TOKEN if kind == "image" else VIDEO_TOKEN
    words, ids = prompt(length, seed)[0], []
    for at, (frames, height, width) in enumerate(grids):
        ids += [*words[3 * at : 3 * at + 3], IMAGE_START, *[token] * (frames * height * width // 4)]
        ids += [] if ends_with_it else [IMAGE_END]
    input_ids = torch.tensor([[int(one) for one in [*ids, *([] if ends_with_it else words[3 * len(grids) :])]]])
    patches = sum(frames * height * width for frames, height, width in grids)
    suffix = "" if kind == "image" else "_videos"
    return {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == token).long() * (1 if kind == "image" else 2),
        f"pixel_values{suffix}": torch.randn(patches, 24, generator=generator),
        f"{kind}_grid_thw": torch.tensor(grids),
    }


def text_prompt(length: int, seed: int = 0) -> dict:
    return {"input_ids": prompt(length, seed), "mm_token_type_ids": torch.zeros(1, length, dtype=torch.long)}


def batch_of(*rows: dict) -> dict:
    """The rows as a processor hands them out: padded at the left, all images behind each other."""
    width = max(row["input_ids"].shape[1] for row in rows)

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (width - values.shape[1], 0))

    joined = {name: torch.cat([padded(row[name]) for row in rows]) for name in ("input_ids", "mm_token_type_ids")}
    joined["attention_mask"] = torch.cat([padded(torch.ones_like(row["input_ids"])) for row in rows])
    for name in ("pixel_values", "image_grid_thw"):
        if any(name in row for row in rows):
            joined[name] = torch.cat([row[name] for row in rows if name in row])
    return joined


class RowOracles(OracleDrafts):
    """For a batch, whose rows are told apart by the token at their anchor's place."""

    def __init__(self, monkeypatch, rows: list[torch.Tensor], accuracy: float):
        super().__init__(monkeypatch, rows[0], accuracy)
        self.rows, self.anchors, corrected = rows, [], Drafter._denoise

        def denoise(drafter, blocks, width):
            self.anchors = blocks[:, 0, 0].tolist()
            return corrected(drafter, blocks, width)

        monkeypatch.setattr(Drafter, "_denoise", denoise)

    def after(self, position: int, width: int) -> torch.Tensor:
        anchor = self.anchors.pop(0)
        self.sequence = next(
            (row for row in self.rows if row[position : position + 1].tolist() == [anchor]), self.rows[0]
        )
        return super().after(position, width)


def generate(family: str, inputs: dict, **more) -> torch.Tensor:
    return target_of(family).generate(**inputs, **{"do_sample": False, "max_new_tokens": 24, **more})


TREES = {
    "narrow": dict(d2sd_num_branches=3),
    "no branches": dict(d2sd_num_branches=0),
    "wide": dict(d2sd_num_branches=3, d2sd_tree_width=3, d2sd_tree_budget=14),
    "wide, no branches": dict(d2sd_num_branches=0, d2sd_tree_width=3, d2sd_tree_budget=14),
}
PROMPTS = {
    "an image": lambda: image_prompt(9),
    "two images": lambda: image_prompt(11, [(1, 4, 6), (1, 8, 4)]),
    "text alone": lambda: text_prompt(9),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", DENSE + RECURRENT)
def test_greedy_text_is_the_targets_own(family, kind, tree, monkeypatch):
    inputs, assistant = PROMPTS[kind](), tiny_assistant(4, 6)
    plain = generate(family, inputs)
    OracleDrafts(monkeypatch, plain[0], 0.7)
    ours = generate(family, inputs, assistant_model=assistant, **TREES[tree])
    assert ours.tolist() == plain.tolist()
    assert assistant.last_stats.mean_acceptance_length > 1.3, "drafts were taken: trees longer than the anchor count"


@pytest.mark.parametrize("tree", ["narrow", "wide"])
@pytest.mark.parametrize("family", FAMILIES + RECURRENT)
def test_ragged_rows_of_which_some_have_images(family, tree, monkeypatch):
    rows = [image_prompt(9), text_prompt(14, 1), image_prompt(8, [(1, 4, 4), (1, 4, 8)], 2), text_prompt(4, 3)]
    inputs = batch_of(*rows)
    plain = generate(family, inputs)
    alone = [generate(family, row)[0] for row in rows]
    width = inputs["input_ids"].shape[1]
    assert plain[:, width:].tolist() == [out[-24:].tolist() for out in alone], "control"
    assistant = tiny_assistant(4, 6)
    RowOracles(monkeypatch, alone, 0.7)
    ours = generate(family, inputs, assistant_model=assistant, **TREES[tree])
    assert ours.tolist() == plain.tolist()
    assert assistant.last_stats.mean_acceptance_length > 1.3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_nodes_carry_the_triples_that_the_model_itself_would_give_them(family, monkeypatch):
    """Those of `get_rope_index` for the prompt with all of the plain text after it."""
    inputs, target, columns, given = batch_of(image_prompt(9), text_prompt(5, 1)), target_of(family), [], []
    plain = generate(family, inputs)
    longer = {
        "image_grid_thw": inputs["image_grid_thw"],
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 24), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 24)),
    }
    expected, _ = target.model.get_rope_index(plain, **longer)  # (3, 2, L)
    attention_for(target)  # a small tree is tried once
    padding = (inputs["attention_mask"] == 0).sum(1)
    verify = Target.verify

    def watched(worker, tree):
        places = padding[worker.rows, None] + torch.tensor(worker.positions)[:, None] + tree.depths
        columns.append((worker.rows, places))
        return verify(worker, tree)

    monkeypatch.setattr(Target, "verify", watched)
    hook = target.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        generate(family, inputs, assistant_model=tiny_assistant(4, 6))
    finally:
        hook.remove()
    assert len(columns) == len(given) - 1 > 3, "the prefill, then trees"
    for (rows, places), positions in zip(columns, given[1:]):
        places = places.clamp(max=expected.shape[2] - 1)  # deeper nodes than the text is long
        inside = places < expected.shape[2] - 1
        for at, row in enumerate(rows):
            triples = expected[:, row, places[at]]  # (3, N)
            assert positions[-3:, at][:, inside[at]].tolist() == triples[:, inside[at]].tolist()
    assert (expected[0, 0] - torch.arange(len(plain[0])))[-1] == -3, "six tokens of the image take three positions"


class TestWhatElseACallMayHave:
    """With one family: the rest of the way is the same for all."""

    @pytest.mark.parametrize("backend", ["sdpa", "eager"])
    def test_masks_in_place_of_the_cascade(self, backend, monkeypatch):
        plain = generate("qwen2_5_vl", image_prompt(9))
        OracleDrafts(monkeypatch, plain[0], 0.7)
        ours = generate(
            "qwen2_5_vl", image_prompt(9), assistant_model=tiny_assistant(4, 6), d2sd_attention_backend=backend
        )
        assert ours.tolist() == plain.tolist()

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_prompt_that_ends_with_an_image(self, family):
        """The last token's axes differ, and each goes on from its own."""
        inputs = image_prompt(3, ends_with_it=True)
        assert int(inputs["mm_token_type_ids"][0, -1]) == 1
        ours = generate(family, inputs, assistant_model=tiny_assistant(4, 6))
        assert ours.tolist() == generate(family, inputs).tolist()

    def test_samples_of_one_seed(self):
        options = dict(do_sample=True, temperature=0.9, top_k=8)
        torch.manual_seed(3)
        plain = generate("qwen3_vl", image_prompt(9), **options)
        torch.manual_seed(3)
        ours = generate("qwen3_vl", image_prompt(9), assistant_model=tiny_assistant(4, 6), **options)
        assert ours.tolist() == plain.tolist()

    def test_several_sequences_for_a_prompt_with_an_image(self):
        inputs = batch_of(image_prompt(9), text_prompt(4, 1))
        options = dict(num_return_sequences=2, do_sample=True, top_k=1)
        ours = generate("qwen2_5_vl", inputs, assistant_model=tiny_assistant(4, 6), **options)
        plain = generate("qwen2_5_vl", inputs)
        assert ours.tolist() == plain.repeat_interleave(2, dim=0).tolist()

    @pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
    def test_a_second_turn_on_the_first_ones_cache(self, family):
        turns, more = {}, prompt(5, 7)
        for name, options in {"plain": {}, "ours": dict(assistant_model=tiny_assistant(4, 6))}.items():
            first = generate(family, image_prompt(9), return_dict_in_generate=True, **options)
            inputs = {"input_ids": torch.cat([first.sequences, more], dim=1), CACHE_NAME: first[CACHE_NAME]}
            turns[name] = generate(family, inputs, **options)
        assert turns["ours"].tolist() == turns["plain"].tolist()

    def test_cycles_of_fixed_shapes(self):
        pair = D2SDAssistant.from_drafters(tiny_drafter(4), tiny_drafter(4, seed=1))
        pair.compile(backend="eager")
        inputs = batch_of(image_prompt(9), text_prompt(5, 1))
        assert generate("glm4v", inputs, assistant_model=pair).tolist() == generate("glm4v", inputs).tolist()

    def test_a_text_prompt_in_chunks(self):
        inputs = {"input_ids": prompt(23)}
        ours = generate("qwen3_vl", inputs, assistant_model=tiny_assistant(4, 6), prefill_chunk_size=7)
        assert ours.tolist() == generate("qwen3_vl", inputs).tolist()

    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
    def test_a_video(self, family, monkeypatch):
        inputs = image_prompt(9, [(3, 4, 4)], kind="video")
        if family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.tensor([1.5])
        plain = generate(family, inputs)
        OracleDrafts(monkeypatch, plain[0], 0.7)
        ours = generate(family, inputs, assistant_model=tiny_assistant(4, 6))
        assert ours.tolist() == plain.tolist()

    def test_an_image_changes_the_text(self):
        """The control of all of these: the random vision tower is seen."""
        one, two = image_prompt(9), image_prompt(9)
        two["pixel_values"] = -two["pixel_values"]
        for family in FAMILIES:
            assert generate(family, one).tolist() != generate(family, two).tolist()
