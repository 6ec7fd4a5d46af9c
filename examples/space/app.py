"""A page that decodes a prompt with a pair of drafters and plainly, and draws the trees.

    python examples/space/app.py --target HuggingFaceTB/SmolLM2-135M-Instruct

On the Hub it is a Gradio Space; the variables D2SD_TARGET, D2SD_PAIR and D2SD_DTYPE name what it loads.
"""

import argparse
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
import torch
import views
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from hf_d2sd import Cycle, D2SDAssistant
from hf_d2sd.apps.loading import DTYPES, FASTEST, default_device, dtype_of
from hf_d2sd.streaming import SourceStreamer

PAIR = Path(__file__).resolve().parents[2] / "hub_cards" / "SmolLM2-135M-Instruct-D2SD"
PROMPTS = (
    "Tom has 3 boxes with 12 eggs each and breaks 5 eggs. How many are left?",
    "Write a Python function that returns the sum of a list.",
    "Why does bread rise?",
)
INTRODUCTION = """
# D²SD speculative decoding
Two small drafters propose text, the model checks a whole tree of it in one pass, and keeps what it would have written
itself: the same text in fewer passes. How many tokens a pass yields depends on drafters and text; what that is worth
in seconds, on the machine, and this one may well be a small CPU. Unless you choose a strategy, each cycle does what
pays here.
"""


class Stop(StoppingCriteria):
    """Ends a reply that nobody waits for any more."""

    def __init__(self):
        self.now = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.now.is_set(), device=input_ids.device)


@dataclass
class Decoder:
    """Target, tokenizer and pair, which all visitors share."""

    target: torch.nn.Module
    tokenizer: object
    assistant: D2SDAssistant

    @classmethod
    def load(cls, target: str, pair: str, dtype: str) -> "Decoder":
        device = default_device()
        dtype = dtype_of(dtype, device, AutoConfig.from_pretrained(target))
        model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype).to(device).eval()
        drafters = D2SDAssistant.from_pretrained(pair, dtype=model.dtype).to(device).eval()
        decoder = cls(model, AutoTokenizer.from_pretrained(target), drafters)
        for strategy in (views.PLAIN, views.DEFAULT):  # warm-up: the first call is slower, and learns what cycles cost
            for _ in decoder.reply("Why does bread rise?", strategy, 4, 16, 8, 32):
                pass
        return decoder

    @property
    def dtype(self) -> str:
        return str(self.target.dtype).removeprefix("torch.")

    def word(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def reply(
        self, prompt: str, strategy: str, branches: int, budget: int, width: int, tokens: int
    ) -> Iterator[tuple[views.Reply, list[Cycle]]]:
        """The reply as it grows; at its end also the trees."""
        chat = [{"role": "user", "content": prompt}]
        inputs = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.target.device)
        drafts = strategy != views.PLAIN
        streamer, stop = SourceStreamer(self.tokenizer, self.assistant if drafts else None), Stop()
        errors, stats = [], []
        options = dict(do_sample=False, max_new_tokens=int(tokens), streamer=streamer, stopping_criteria=[stop])
        if drafts:
            options |= dict(assistant_model=self.assistant, **views.options(strategy, branches, budget, width))

        def work():
            try:
                self.target.generate(**inputs, **options)
                stats.append(self.assistant.last_stats)  # those of this thread's call
            except Exception as error:  # shown on the page
                errors.append(error)
                streamer.end()

        start, pieces, worker = time.perf_counter(), [], threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            for piece in streamer:
                pieces.append(piece)
                seconds = time.perf_counter() - start
                yield views.Reply(tuple(pieces), len(streamer.tokens), seconds=seconds), []
        finally:
            stop.now.set()
            worker.join()
        if errors:
            raise errors[0]
        reply = views.Reply(tuple(pieces), len(streamer.tokens), len(streamer.tokens), done=True)
        reply = replace(reply, seconds=time.perf_counter() - start)
        if not drafts:
            yield reply, []
            return
        (found,) = stats
        reply = replace(reply, chosen=str(found.decisions or ""))
        yield replace(reply, passes=found.cycles + 1, nodes=views.mean_nodes(found.tree_sizes)), found.trace


def compare(decoder: Decoder, prompt: str, strategy: str, branches: int, budget: int, width: int, tokens: int):
    """Both replies as they grow, one after the other, so that each has the machine for itself.

    Yields what the page's outputs take: drafted, plain, numbers, trees, and the cycle's slider.
    """
    if not prompt.strip():
        raise gr.Error("Write a prompt first.")
    slider = gr.skip()
    ways = [strategy] if strategy == views.PLAIN else [strategy, views.PLAIN]
    replies, cycles = {way: views.Reply() for way in ways}, []
    for way in ways:
        try:
            for reply, found in decoder.reply(prompt, way, int(branches), int(budget), int(width), tokens):
                replies[way], cycles = reply, found or cycles
                yield *_replies_html(replies, strategy), "", cycles, slider
        except ValueError as error:
            raise gr.Error(str(error)) from error
    slider = gr.Slider(1, max(len(cycles), 2), value=1, visible=len(cycles) > 1)
    yield *_replies_html(replies, strategy), views.numbers_html(replies, decoder.dtype), cycles, slider


def _replies_html(replies: dict[str, views.Reply], strategy: str) -> list[str]:
    other = views.reply_html(replies[views.PLAIN], views.PLAIN) if strategy != views.PLAIN else ""
    return [views.reply_html(replies[strategy], strategy), other]


def page(decoder: Decoder) -> gr.Blocks:
    config = decoder.assistant.config
    with gr.Blocks(title="D²SD speculative decoding", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION)
        prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, max_length=2000, elem_id="prompt")
        gr.Examples([[text] for text in PROMPTS], prompt, label="Examples")
        strategy = gr.Radio(list(views.STRATEGIES), value=views.DEFAULT, label="Strategy", elem_id="strategy")
        with gr.Row():
            sliders = [
                gr.Slider(0, 7, config.num_branches, step=1, label="K: prefixes re-drafted", min_width=220),
                gr.Slider(2, 64, config.tree_budget or 32, step=1, label="Budget: nodes a pass", min_width=220),
                gr.Slider(2, 16, max(config.tree_width, 2), step=1, label="Width: tokens a place", min_width=220),
            ]
            for slider, used in zip(sliders, views.sliders_in_use(views.DEFAULT)):
                slider.interactive = used
            tokens = gr.Slider(8, 256, 64, step=8, label="New tokens", min_width=220)
        run = gr.Button("Decode", variant="primary", elem_id="run")
        gr.HTML(views.legend_html())
        with gr.Row():
            with gr.Column(min_width=300):
                drafted = gr.HTML(elem_id="drafted")
            with gr.Column(min_width=300):
                plain = gr.HTML(elem_id="plain")
        numbers = gr.HTML(elem_id="numbers")
        cycle = gr.Slider(1, 2, 1, step=1, label="Cycle", visible=False, elem_id="cycle")
        tree, cycles = gr.HTML(elem_id="tree"), gr.State([])

        controls = [prompt, strategy, *sliders, tokens]
        strategy.change(
            lambda name: [gr.update(interactive=used) for used in views.sliders_in_use(name)],
            strategy,
            sliders,
            queue=False,
            show_progress="hidden",
        )

        def draw(found, number):
            return views.tree_html(found, number, decoder.word)

        def decode(*values):
            yield from compare(decoder, *values)

        outputs = [drafted, plain, numbers, cycles, cycle]
        finished = run.click(decode, controls, outputs, concurrency_limit=1, show_progress="hidden")
        finished.then(draw, [cycles, cycle], tree, show_progress="hidden")
        cycle.input(draw, [cycles, cycle], tree, show_progress="hidden")
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=os.environ.get("D2SD_TARGET", "HuggingFaceTB/SmolLM2-135M-Instruct"))
    parser.add_argument("--pair", default=os.environ.get("D2SD_PAIR", str(PAIR)), help="folder or Hub id")
    parser.add_argument("--dtype", default=os.environ.get("D2SD_DTYPE", FASTEST), choices=DTYPES)
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    args = parser.parse_args()
    blocks = page(Decoder.load(args.target, args.pair, args.dtype))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    look = dict(theme=theme, css=views.STYLE, footer_links=["gradio", "settings"])
    blocks.queue(max_size=20).launch(server_name=args.host, server_port=args.port, ssr_mode=False, share=False, **look)


if __name__ == "__main__":
    main()
