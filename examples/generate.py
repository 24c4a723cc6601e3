"""Serves several prompts together over one paged cache: `python generate.py [--model DIR] [--prompt TEXT ...]`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from typing import Any

import command_line
import jax
from jax.sharding import AxisType

import jax_paged_attn

try:
    import dtypes
    from checkpoint import Checkpoint, load
    from rich.console import Console, Group
    from rich.live import Live
    from rich.panel import Panel
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    from rich.table import Table
    from rich.text import Text

    from jax_paged_attn.serving import ByteTokenizer, Engine, Generation, Pool, Request
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


@dataclasses.dataclass
class Output:
    """A request on its way to the screen."""

    prompt: str
    generation: Generation
    printed: bool = False

    @property
    def title(self) -> str:
        state = self.generation.finish_reason or ("running" if self.generation.output else "waiting")
        return f"{len(self.generation.output)} tokens, {state}"

    def panel(self, lines: int | None = None) -> Panel:
        """Prompt and text; `lines` keeps the newest lines only."""
        shown = Text(self.prompt, style="bold") + Text(self.generation.text, style="green")
        if lines is not None:
            tail = str(shown).splitlines()[-lines:]
            shown = Text("\n".join(tail), style="green", overflow="ellipsis", no_wrap=True)
        return Panel(shown, title=self.title, title_align="left")


class Display:
    """Finished texts scroll by; below them, on a terminal, those in progress, pages in use and tokens per second."""

    def __init__(self, console: Console, engine: Engine, outputs: list[Output]):
        self._console = console
        self._engine = engine
        self._outputs = outputs
        self._progress = Progress(
            TextColumn("{task.description:>6}"), BarColumn(None), TextColumn("{task.fields[note]}")
        )
        self._pages = self._progress.add_task("pages", total=engine.num_pages, note="")
        wanted = sum(output.generation.request.max_new_tokens for output in outputs)
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
            for output in self._outputs:
                if output.generation.finish_reason and not output.printed:
                    output.printed = True
                    self._console.print(output.panel())
            if live is not None:
                live.update(self._in_progress())

    def _in_progress(self) -> Group:
        engine, tokens = self._engine, self._engine.stats.tokens
        seconds = time.perf_counter() - self._started
        self._progress.update(
            self._pages, completed=engine.pages_in_use, note=f"{engine.pages_in_use}/{engine.num_pages} in use"
        )
        self._progress.update(self._tokens, completed=tokens, note=f"{tokens}, {tokens / seconds:.0f} tokens/s")
        return Group(*(output.panel(lines=2) for output in self._outputs if not output.printed), self._progress)


def summary(engine: Engine, outputs: list[Output], seconds: float) -> Group:
    table = Table(title="summary", title_justify="left")
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=30)
    for name in ("prompt tokens", "new tokens", "finished by", "preempted"):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))  # on narrow terminals, too
    for output in outputs:
        generation = output.generation
        table.add_row(
            Text(" ".join(output.prompt.split())),
            str(len(generation.request.prompt)),
            str(len(generation.output)),
            str(generation.finish_reason),
            str(generation.preemptions),
        )
    device, stats = jax.devices()[0], engine.stats
    busy = stats.host_seconds + stats.wait_seconds
    lines = (
        f"{stats.tokens} tokens in {seconds:.2f} s: {stats.tokens / seconds:.0f} tokens/s, {stats.steps} steps of "
        f"{1000 * busy / stats.steps:.1f} ms, {stats.host_seconds / busy:.0%} of it the host's",
        f"{stats.peak_pages} of {engine.num_pages} pages in use at the peak, {stats.preemptions} preemptions, "
        f"prefix hit rate {stats.hit_rate:.0%}",
        f"cache: {engine.cache_bytes / 1e6:.1f} MB, {' and '.join(map(pool_size, engine.pools))}",
        f"attention: engine '{engine.explain().engine}' of jax_paged_attn {jax_paged_attn.__version__}, "
        f"jax {jax.__version__}, {device.platform} ({device.device_kind})",
    )
    return Group(table, *map(Text, lines))


def pool_size(pool: Pool) -> str:
    """The pages of each layer of a layer group, in words."""
    window = "" if pool.window is None else f" with a window of {pool.window}"
    return f"{pool.num_pages} pages per layer{window}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves several prompts together over one paged key/value cache.")
    positive = functools.partial(command_line.number, int, 1)
    command_line.add_model(parser)
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
    parser.add_argument(
        "--max-len",
        type=positive,
        metavar="N",
        help="longest context in tokens, by default the model's; with dynamic rotary scaling it may be longer",
    )
    dtypes.add_arguments(parser)
    parser.add_argument(
        "--devices", type=positive, default=1, metavar="N", help="heads are split over so many, default %(default)s"
    )
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
    dtypes.check_arguments(parser, arguments)
    return arguments


def load_showing_progress(arguments: argparse.Namespace, console: Console, dtype: Any) -> Checkpoint:
    """The model and its tokenizer; on a terminal, a bar says how much is loaded."""
    mesh = None
    if arguments.devices > 1:
        if arguments.devices > jax.device_count():
            raise ValueError(f"--devices: expected at most {jax.device_count()}, got {arguments.devices}")
        devices = jax.devices()[: arguments.devices]
        mesh = jax.make_mesh((len(devices),), ("model",), axis_types=(AxisType.Auto,), devices=devices)
    with Progress(
        TextColumn("loading"), BarColumn(None), DownloadColumn(binary_units=True), console=console, transient=True
    ) as bar:
        task = bar.add_task("loading", total=None)
        return load(
            arguments.model,
            dtype=dtype,
            max_len=arguments.max_len,
            mesh=mesh,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def prepare(arguments: argparse.Namespace, console: Console) -> tuple[Engine, list[Output]]:
    """Loads the model, sizes the cache, submits the prompts."""
    checkpoint = load_showing_progress(arguments, console, dtypes.dtype_of(arguments))
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    is_own = isinstance(tokenizer, ByteTokenizer)
    texts = arguments.prompt or (DOCUMENTATION_PROMPTS if is_own else dtypes.GENERAL_PROMPTS)
    prompts = [tokenizer.encode(text) for text in texts]
    model.fuse()
    longest = max(map(len, prompts))
    max_len = min(model.config.max_position_embeddings, longest + arguments.max_new_tokens)
    pages = [math.ceil((len(prompt) + arguments.max_new_tokens) / arguments.page_size) for prompt in prompts]
    engine = Engine(
        dtypes.served(model, tokenizer, arguments, prompts),
        num_pages=arguments.num_pages or sum(sorted(pages)[-arguments.max_seqs :]),
        page_size=arguments.page_size,
        max_seqs=arguments.max_seqs,
        max_len=max_len,
        buckets=(arguments.max_seqs, arguments.max_seqs + 56, arguments.max_seqs + 248),
        tokenizer=tokenizer,
    )
    outputs = []
    for index, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        request = Request(
            prompt,
            min(arguments.max_new_tokens, max(1, max_len - len(prompt))),
            stop_tokens=model.config.eos_token_ids,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=(arguments.seed + index) % 2**32,
        )
        outputs.append(Output(text, engine.submit(request)))
    return engine, outputs


def main() -> None:
    arguments = parse_arguments()
    console = Console(highlight=False)
    try:
        engine, outputs = prepare(arguments, console)
        with console.status("compiling"):
            engine.warm_up(samples=arguments.temperature > 0)
    except ModuleNotFoundError as error:  # a tokenizer.json needs one more package
        command_line.fail_without(error)
    except ValueError as error:
        command_line.fail(error)
    seconds = Display(console, engine, outputs).run()
    console.print(summary(engine, outputs, seconds))


if __name__ == "__main__":
    main()
