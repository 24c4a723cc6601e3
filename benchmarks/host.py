"""The host time of a decode step: of the allocator's batched calls, and of the serving engine around its model.

`python -m benchmarks.host` from the repository's root prints two tables.

The allocator: its batched calls beside its calls per sequence. A step gives each sequence of some 1000 tokens a
slot for one more, makes the arrays of the step, and marks what was computed. Both get the same tokens in turns, and
their arrays are compared before they are timed.

The engine: steady decode of a model of 32 layers with tiny sizes, beside the same jitted step called again and again
with operands that are ready; also with a window in every second layer, which makes two layer groups.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jax_paged_attn as jpa
from benchmarks import options, serve
from benchmarks.timing import Contender, race
from jax_paged_attn.serving import Engine, Request
from jax_paged_attn.serving._programs import Kind

PAGE_SIZE = 16
MAX_PAGES = 80
LENGTHS = (960, 1024)  # tokens of a sequence at first, drawn evenly
GROWTH = 128  # tokens after which sequences are truncated to where they began
SIZES = (1, 4, 16, 64, 256, 1024)
WANTED, GOAL = 15.0, 40.0  # times faster at 256 sequences
ENGINE_WANTED, ENGINE_GOAL = 1.3, 1.1  # times its function's time

Step = Callable[[np.ndarray], jpa.StepArrays]


class Decode:
    """An allocator with sequences that are all in the cache; each call of a step appends one token to each.

    Args:
      num_seqs: B.
      batched: whether `batched_step` or `step_per_sequence` is called.
    """

    def __init__(self, num_seqs: int, batched: bool):
        rng = np.random.default_rng(0)
        self.num_seqs, self.step = num_seqs, self.batched_step if batched else self.step_per_sequence
        self.lengths = rng.integers(*LENGTHS, num_seqs)
        self.allocator = jpa.PageAllocator(num_seqs * MAX_PAGES, PAGE_SIZE)
        self.ids = [self.allocator.allocate(rng.integers(0, 2**15, length)).id for length in self.lengths]
        self.allocator.mark_written_batch(self.ids, self.lengths)
        self.ones = np.ones(num_seqs, np.int32)

    def batched_step(self, tokens: np.ndarray) -> jpa.StepArrays:
        """Tokens int32 `[B]`, as sampled by the step before."""
        size = self.num_seqs
        self.allocator.append_batch(self.ids, tokens[:, None])
        arrays = self.allocator.step(self.ids, self.ones, num_tokens=size, max_seqs=size, max_pages=MAX_PAGES)
        self.allocator.mark_written_batch(self.ids, arrays.kv_lens)
        return arrays

    def step_per_sequence(self, tokens: np.ndarray) -> jpa.StepArrays:
        allocator, size = self.allocator, self.num_seqs
        for id, token in zip(self.ids, tokens.tolist(), strict=True):
            allocator.append(id, [token])
        positions, slots = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        tables = np.full((size, MAX_PAGES), -1, np.int32)
        kv_lens, cu_q_lens = np.zeros(size, np.int32), np.zeros(size + 1, np.int32)
        tables[:size] = allocator.block_tables(self.ids, MAX_PAGES)
        end = 0
        for row, id in enumerate(self.ids):
            last = allocator.length(id)
            begin, end = end, end + 1
            positions[begin:end] = np.arange(last - 1, last)
            slots[begin:end] = allocator.slots(id, last - 1, last)
            kv_lens[row] = last
            cu_q_lens[row + 1 :] = end
        for id, last in zip(self.ids, kv_lens.tolist(), strict=True):
            allocator.mark_written(id, last)
        return jpa.StepArrays(positions, slots, tables, kv_lens, cu_q_lens, np.array(size, np.int32))

    def calls(self) -> Iterator[Callable[[], jpa.StepArrays]]:
        """Steps without end, each with other tokens."""
        rng = np.random.default_rng(1)
        while True:
            for tokens in rng.integers(0, 2**15, (GROWTH, self.num_seqs), np.int32):
                yield lambda tokens=tokens: self.step(tokens)
            for id, length in zip(self.ids, self.lengths.tolist(), strict=True):
                self.allocator.truncate(id, length)


def check_same(num_seqs: int, steps: int = 40) -> None:
    """Raises unless both give the same arrays, page for page."""
    pairs = zip(Decode(num_seqs, True).calls(), Decode(num_seqs, False).calls(), strict=True)
    for _, calls in zip(range(steps), pairs, strict=False):
        batched, per_sequence = (call() for call in calls)
        for name, array in vars(batched).items():
            np.testing.assert_array_equal(array, getattr(per_sequence, name), err_msg=name)


def measure(num_seqs: int, budget: float) -> tuple[Contender, Contender]:
    """Both contenders, timed in turns for `budget` seconds of the batched one."""
    batched = Contender("batched", Decode(num_seqs, True).calls())
    per_sequence = Contender("per sequence", Decode(num_seqs, False).calls())
    race([batched, per_sequence], budget)
    return batched, per_sequence


def served_step(num_seqs: int, steps: int, windows: tuple[int | None, ...]) -> tuple[float, float]:
    """Seconds of an engine's decode step, and of its jitted function alone: the fastest of five turns each.

    Args:
      windows: of the layers, in turns.
    """
    model = serve.tiny_model(num_layers=32, sliding_windows=windows * (32 // len(windows)))
    engine = Engine(
        model.served(),
        num_pages=num_seqs * 8,
        page_size=PAGE_SIZE,
        max_seqs=num_seqs,
        max_len=8 * PAGE_SIZE,
        buckets=(num_seqs,),
        decode_buckets=(num_seqs,),
    )
    for _ in range(num_seqs):
        engine.submit(Request([1], 7 * PAGE_SIZE))
    for _ in range(4):
        engine.step()

    kind = Kind(num_seqs, 1, samples=False, logprobs=False)
    program = engine._programs(kind)
    served, alone = [], []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        served.append((time.perf_counter() - start) / steps)
        engine._read_all()
        plan = engine._plan()
        if plan is None:
            raise RuntimeError("expected requests that generate")
        operand = jnp.asarray(engine._programs.operand(kind, plan, engine._groups))
        jax.block_until_ready((operand, engine._cache))
        start = time.perf_counter()
        for _ in range(steps):
            sampled, engine._last, engine._cache = program(engine._weights, engine._cache, engine._last, operand)
        jax.block_until_ready(sampled)
        alone.append((time.perf_counter() - start) / steps)
    return min(served), min(alone)


def main() -> None:
    parser = options.parser("host", __doc__)
    parser.add_argument("--steps", type=int, default=10, help="decode steps of the engine per turn")
    options.add_seconds(parser, 0.2)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of sequences")
    args = parser.parse_args()
    check_same(17)

    print(f"us of a decode step, page size {PAGE_SIZE}: fastest (median)")
    print(f"{'sequences':>9} {'per sequence':>20} {'batched':>18} {'ratio':>7} {'growth of batched':>18}")
    first = None
    for num_seqs in args.sizes:
        batched, per_sequence = measure(num_seqs, args.seconds)
        first = first or batched.best
        ratio = per_sequence.best / batched.best
        times = [f"{1e6 * c.best:.1f} ({1e6 * c.median:.1f})" for c in (per_sequence, batched)]
        print(f"{num_seqs:>9} {times[0]:>20} {times[1]:>18} {ratio:>6.1f}x {batched.best / first:>17.1f}x", flush=True)
        if num_seqs == 256:
            print(f"          256 sequences: {ratio:.1f} times faster, wanted {WANTED:g}, goal {GOAL:g}")

    print("\nms of a served decode step, 32 layers of tiny sizes")
    print(f"{'sequences':>9} {'groups':>7} {'engine':>10} {'its function':>14} {'ratio':>7}")
    for num_seqs, windows in itertools.product((1, 256), ((None,), (2 * PAGE_SIZE, None))):
        served, alone = served_step(num_seqs, args.steps, windows)
        note = f" (wanted {ENGINE_WANTED:g}, goal {ENGINE_GOAL:g})" if num_seqs == 256 and len(windows) == 1 else ""
        times = f"{1e3 * served:>10.2f} {1e3 * alone:>14.2f} {served / alone:>7.2f}"
        print(f"{num_seqs:>9} {len(windows):>7} {times}{note}", flush=True)


if __name__ == "__main__":
    main()
