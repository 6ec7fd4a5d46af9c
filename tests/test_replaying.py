"""Known texts are decoded as they were written: the same tokens, passes and nodes as with the target's passes."""

import pytest
import torch
from tiny import prompt, tiny_drafter, tiny_target
from transformers import GenerationConfig

from hf_d2sd import D2SDAssistant
from hf_d2sd.benchmark.replaying import Text, follow, replay
from hf_d2sd.decoding import decode
from hf_d2sd.options import settle
from hf_d2sd.training.features import compute_features
from hf_d2sd.training.shards import Row

EOS = 23


def pair() -> D2SDAssistant:
    drafters = [tiny_drafter(5, seed=seed, path_rank=4, path_candidates=6) for seed in (0, 1)]
    for drafter in drafters:
        torch.manual_seed(0)
        torch.nn.init.normal_(drafter.path_head.candidate.weight, std=0.5)
    return D2SDAssistant.from_drafters(*drafters)


def known(target, ids: torch.Tensor, reply: torch.Tensor) -> Text:
    row = Row(torch.cat([ids, reply]), len(ids))
    return Text(row.tokens, len(ids), lambda layers: compute_features(target, [row], layers)[0])


@pytest.mark.parametrize("width, branches, budget", [(1, 0, None), (1, 3, None), (4, 0, 12), (4, 3, 12)])
def test_a_replay_counts_what_real_decoding_does(width, branches, budget):
    target, assistant = tiny_target(), pair()
    options = {"d2sd_tree_width": width, "d2sd_num_branches": branches, "d2sd_tree_budget": budget or 1000}
    texts, tokens, passes, nodes = [], 0, 0, 0
    for seed, length in enumerate((9, 6, 12)):
        ids = prompt(length, seed)
        arguments = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": EOS}
        out = target.generate(ids, assistant_model=assistant, **arguments, **options)
        stats = assistant.last_stats
        tokens += sum(stats.committed_per_cycle)
        passes += len(stats.committed_per_cycle)
        nodes += sum(stats.tree_sizes)
        texts.append(known(target, ids[0], out[0, length:]))
    settled = settle(assistant, GenerationConfig(**options))
    counts = replay(assistant, target, texts, settled, 24, [EOS])
    assert (counts.tokens, counts.passes, counts.nodes) == (tokens, passes, nodes)
    assert counts.tokens == sum(len(text.tokens) - text.prompt_length - 1 for text in texts)


class TestOracle:
    """Trees that follow the text for as long as the drafts' candidates do."""

    def counted(self, width: int, loop=follow, heads: bool = True, **options) -> tuple[int, int]:
        target, assistant = tiny_target(), pair() if heads else D2SDAssistant.from_drafters(tiny_drafter(5))
        ids = prompt(9, 0)
        out = target.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=EOS, pad_token_id=EOS)
        asked = {"tree_width": width, "num_branches": 0, "tree_budget": 1000, "context": 0, **options}
        settled = settle(assistant, GenerationConfig(**{f"d2sd_{name}": value for name, value in asked.items()}))
        counts = replay(assistant, target, [known(target, ids[0], out[0, 9:])], settled, 24, [EOS], loop)
        assert counts.tokens == len(out[0]) - 9 - 1
        return counts.tokens, counts.passes

    def test_it_goes_a_whole_block_a_pass_where_every_token_is_a_candidate(self):
        tokens, passes = self.counted(tiny_target().config.vocab_size, heads=False)
        assert passes == -(-tokens // 5)

    def test_of_one_candidate_a_slot_it_is_the_chain(self):
        assert self.counted(2, heads=False) <= self.counted(1, heads=False) == self.counted(1, decode, heads=False)

    @pytest.mark.parametrize("branches", [0, 3])
    def test_no_tree_of_the_same_candidates_gets_further(self, branches):
        best = self.counted(6, num_branches=branches)
        assert all(self.counted(6, decode, num_branches=branches, tree_budget=n) >= best for n in (4, 12, 60))
