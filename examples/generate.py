"""Serves several prompts together over one paged cache: `python generate.py [--model DIR] [--prompt TEXT ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from pathlib import Path

import command_line
import jax
import jax.numpy as jnp

import jax_paged_attn

try:
    from checkpoint import ByteTokenizer, Tokenizer, load
    from request import Generation, Request
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Table
    from rich.text import Text
    from serving import Engine
except ModuleNotFoundError as error:
    command_line.fail_without(error)

DOCUMENTATION_PROMPTS = (
    'The "with" statement is used to wrap the execution of a block with ',
    "If an exception is raised in the body, the ",
    "A class definition is an executable statement. ",
    "Slicings\n********\n\nA slicing selects a range of items in ",
    "The following methods are called when ",
    ">>> def f(x):\n...     return ",
)
GENERAL_PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "A list of prime numbers: 2, 3, 5,",
    "Water boils at a lower temperature on a mountain because",
)
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
CACHE_DTYPES = {**DTYPES, "fp8": jnp.float8_e4m3fn, "int8": jnp.int8}


@dataclasses.dataclass
class Stream:
    """A request on its way to the screen."""

    prompt: str
    tokenizer: Tokenizer
    generation: Generation
    printed: bool = False

    def __post_init__(self):
        self._restart()

    @property
    def text(self) -> str:
        """The text to show: whole characters, none of which is taken back. The tokens since last time are added."""
        output = self.generation.output
        if output[: len(self._taken)] != self._taken:
            self._restart()  # with the same prompt, but another output
        for token in output[len(self._taken) :]:
            self._taken.append(token)
            self._text += self._stream.add(token)
        return self._text + self._stream.rest() if self.generation.finish_reason else self._text

    def _restart(self) -> None:
        self._stream = self.tokenizer.stream(self.tokenizer.encode(self.prompt))
        self._taken: list[int] = []
        self._text = ""

    @property
    def title(self) -> str:
        state = self.generation.finish_reason or ("running" if self.generation.output else "waiting")
        return f"{len(self.generation.output)} tokens, {state}"

    def panel(self, lines: int | None = None) -> Panel:
        """Prompt and text; `lines` keeps the newest lines only."""
        shown = Text(self.prompt, style="bold") + Text(self.text, style="green")
        if lines is not None:
            tail = str(shown).splitlines()[-lines:]
            shown = Text("\n".join(tail), style="green", overflow="ellipsis", no_wrap=True)
        return Panel(shown, title=self.title, title_align="left")


class Display:
    """Finished texts scroll by; below them, on a terminal, those in progress, pages in use and tokens per second."""

    def __init__(self, console: Console, engine: Engine, streams: list[Stream]):
        self._console = console
        self._engine = engine
        self._streams = streams
        self._progress = Progress(
            TextColumn("{task.description:>6}"), BarColumn(None), TextColumn("{task.fields[note]}")
        )
        self._pages = self._progress.add_task("pages", total=engine.num_pages, note="")
        wanted = sum(stream.generation.request.max_new_tokens for stream in streams)
        self._tokens = self._progress.add_task("tokens", total=wanted, note="")
        self._started = time.perf_counter()

    def run(self) -> float:
        """Serves everything; returns the seconds it took."""
        if self._console.is_terminal:
            with Live(console=self._console, transient=True, refresh_per_second=15) as live:
                self._serve(live)
        else:
            self._serve(None)
        return time.perf_counter() - self._started

    def _serve(self, live: Live | None) -> None:
        while self._engine.has_work:
            self._engine.step()
            for stream in self._streams:
                if stream.generation.finish_reason and not stream.printed:
                    stream.printed = True
                    self._console.print(stream.panel())
            if live is not None:
                live.update(self._in_progress())

    def _in_progress(self) -> Group:
        engine, seconds = self._engine, time.perf_counter() - self._started
        self._progress.update(
            self._pages, completed=engine.pages_in_use, note=f"{engine.pages_in_use}/{engine.num_pages} in use"
        )
        self._progress.update(
            self._tokens, completed=engine.tokens, note=f"{engine.tokens}, {engine.tokens / seconds:.0f} tokens/s"
        )
        return Group(*(stream.panel(lines=2) for stream in self._streams if not stream.printed), self._progress)


def summary(engine: Engine, streams: list[Stream], seconds: float) -> Group:
    table = Table(title="summary", title_justify="left")
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=30)
    for name in ("prompt tokens", "new tokens", "finished by", "preempted"):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))  # on narrow terminals, too
    for stream in streams:
        generation = stream.generation
        table.add_row(
            Text(" ".join(stream.prompt.split())),
            str(len(generation.request.prompt)),
            str(len(generation.output)),
            str(generation.finish_reason),
            str(generation.preemptions),
        )
    device = jax.devices()[0]
    lines = (
        f"{engine.tokens} tokens in {seconds:.2f} s: {engine.tokens / seconds:.0f} tokens/s, {engine.steps} steps",
        f"{engine.peak_pages} of {engine.num_pages} pages in use at the peak, {engine.preemptions} preemptions",
        f"attention: engine '{engine.explain().engine}' of jax_paged_attn {jax_paged_attn.__version__}, "
        f"jax {jax.__version__}, {device.platform} ({device.device_kind})",
    )
    return Group(table, *map(Text, lines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves several prompts together over one paged key/value cache.")
    positive = functools.partial(command_line.number, int, 1)
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(__file__).parent / "checkpoint",
        help="folder of a Llama in Hugging Face's layout; by default the small byte-level one of this repository",
    )
    parser.add_argument(
        "--prompt",
        type=command_line.text,
        action="append",
        metavar="TEXT",
        help="may be repeated; by default a few examples",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=240, metavar="N", help="per request, default %(default)s"
    )
    parser.add_argument(
        "--page-size", type=positive, default=16, metavar="N", help="tokens per page, default %(default)s"
    )
    parser.add_argument("--num-pages", type=positive, metavar="N", help="by default enough for all requests at once")
    parser.add_argument(
        "--max-seqs", type=positive, default=8, metavar="N", help="requests per step, default %(default)s"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="by default f32 on CPUs, elsewhere the checkpoint's")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="by default as --dtype")
    parser.add_argument(
        "--temperature",
        type=functools.partial(command_line.number, float, 0),
        default=0.7,
        help="0 is greedy, default %(default)s",
    )
    share = functools.partial(command_line.number, float, 0, most=1)
    parser.add_argument("--top-p", type=share, default=0.9, help="default %(default)s")
    seed = functools.partial(command_line.number, int, 0, most=2**32 - 1)
    parser.add_argument("--seed", type=seed, default=3, help="of the first prompt, default %(default)s")
    arguments = parser.parse_args()
    if arguments.cache_dtype in DTYPES and arguments.dtype not in (None, arguments.cache_dtype):
        parser.error(f"--cache-dtype {arguments.cache_dtype}: expected --dtype to be the same, or an 8-bit cache")
    return arguments


def prepare(arguments: argparse.Namespace) -> tuple[Engine, list[Stream]]:
    """Loads the model, sizes the cache, submits the prompts, compiles the steps."""
    name = arguments.dtype or (arguments.cache_dtype if arguments.cache_dtype in DTYPES else None)
    dtype = DTYPES[name] if name else (jnp.float32 if jax.default_backend() == "cpu" else None)
    checkpoint = load(arguments.model, dtype=dtype)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    is_own = isinstance(tokenizer, ByteTokenizer)
    texts = arguments.prompt or (DOCUMENTATION_PROMPTS if is_own else GENERAL_PROMPTS)
    prompts = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, prompts))
    max_len = min(model.config.max_position_embeddings, longest + arguments.max_new_tokens)
    cache_dtype = CACHE_DTYPES[arguments.cache_dtype] if arguments.cache_dtype else None
    pages = [math.ceil((len(prompt) + arguments.max_new_tokens) / arguments.page_size) for prompt in prompts]
    engine = Engine(
        model,
        num_pages=arguments.num_pages or sum(sorted(pages)[-arguments.max_seqs :]),
        page_size=arguments.page_size,
        max_seqs=arguments.max_seqs,
        max_len=max_len,
        buckets=(arguments.max_seqs, arguments.max_seqs + 56, arguments.max_seqs + 248),
        cache_dtype=cache_dtype,
        scales=model.int8_scales(jnp.asarray(max(prompts, key=len))) if cache_dtype == jnp.int8 else None,
    )
    streams = []
    for index, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        request = Request(
            prompt,
            min(arguments.max_new_tokens, max(1, max_len - len(prompt))),
            stop_tokens=model.config.eos_token_ids,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=(arguments.seed + index) % 2**32,
        )
        streams.append(Stream(text, tokenizer, engine.submit(request)))
    return engine, streams


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    try:
        with console.status("loading and compiling"):
            engine, streams = prepare(arguments)
            engine.warm_up()
    except ValueError as error:
        command_line.fail(error)
    seconds = Display(console, engine, streams).run()
    console.print(summary(engine, streams, seconds))


if __name__ == "__main__":
    main()
