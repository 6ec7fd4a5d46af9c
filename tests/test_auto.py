"""Cycles that are chosen by what pays: the text is plain decoding's, whatever is chosen and whenever it changes."""

import itertools
import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import OracleDrafts, prompt, tiny_assistant, tiny_drafter, tiny_target
from transformers import GenerationConfig

from hf_d2sd import D2SDAssistant
from hf_d2sd.costs import FIRST, PASS, PARTS, REST, SECOND, CostTable, Costs, Place, costs_of
from hf_d2sd.options import settle

NEW = 40


def fresh_pair(*sizes) -> D2SDAssistant:
    first, second = sizes or (4, 6)
    return D2SDAssistant.from_drafters(tiny_drafter(first), tiny_drafter(second, seed=1))


def machine(step: float = 0.01, first: float = 0.2, second: float = 0.2, node: float = 0.03, rest: float = 0.05):
    """A clock that goes on by what the parts of a cycle take on a machine with such costs, in plain steps.

    The parts themselves take no time on it: `Ticking` moves it on by what is marked.
    """

    def cost(part) -> float:
        name, size = part
        return step * {FIRST: first, SECOND: second * (1 + 0.5 * (size - 1)), PASS: 0.9 + node * (size - 1), REST: rest}[name]

    return cost


class Ticking:
    """A stand-in for `Stopwatch`, on which parts take what a machine says."""

    def __init__(self, cost, noise: float = 0.0, seed: int = 0):
        self.cost, self.noise, self.random = cost, noise, random.Random(seed)
        self.ready, self.parts = [], {}

    def start(self):
        self.parts = {}

    def mark(self, name, size=1):
        if name != REST:
            slower = 1 + self.noise * self.random.expovariate(1.0)
            self.parts[name, size] = self.cost((name, size)) * slower

    def stop(self):
        self.parts[REST, 1] = self.cost((REST, 1)) * (2 if list(self.parts) == [(PASS, 1)] else 1)
        self.ready.append(self.parts)

    def finished(self):
        done, self.ready = self.ready, []
        return done


@pytest.fixture
def on_machine(monkeypatch):
    """Let calls see the times of some machine."""

    def use(**changes):
        noise = changes.pop("noise", 0.0)
        monkeypatch.setattr("hf_d2sd.calling.Stopwatch", lambda device: Ticking(machine(**changes), noise))

    return use


def both(target, ids, assistant, **options):
    options = dict(do_sample=False, max_new_tokens=NEW, **options)
    plain = target.generate(ids, **options)
    return plain, target.generate(ids, **options, assistant_model=assistant, d2sd_auto=True)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss"])
def test_the_text_is_plain_decodings(family, monkeypatch):
    target, ids, assistant = tiny_target(family), prompt(9), fresh_pair()
    expected = target.generate(ids, do_sample=False, max_new_tokens=NEW)
    OracleDrafts(monkeypatch, expected[0], 0.8, seed=3)
    for _ in range(3):
        got = target.generate(ids, do_sample=False, max_new_tokens=NEW, assistant_model=assistant, d2sd_auto=True)
        assert got.tolist() == expected.tolist()
    assert assistant.last_stats.decisions.kinds.total() == assistant.last_stats.cycles
