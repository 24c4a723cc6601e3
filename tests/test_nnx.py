"""The Flax layer: rotary embeddings, cached against whole-sequence attention, the cache as `nnx` state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_paged_attn as jpa
from jax_paged_attn.nnx import (
    CacheVariable,
    Llama3RopeScaling,
    PagedAttention,
    PagedSelfAttention,
    StepMetadata,
    apply_rope,
    calibrate,
    rope_frequencies,
)
from jax_paged_attn.rope import YarnRopeScaling

LLAMA3 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 24, 6, 2, 8
PAGE_SIZE = 4


def make_layer(seed: int = 0, **options) -> PagedSelfAttention:
    layer = PagedSelfAttention(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, rngs=nnx.Rngs(seed), **options)
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        if projection.bias is not None:  # which is 0 at first
            projection.bias.set_value(jnp.linspace(-1.0, 1.0, projection.out_features))
    if layer.attention.sinks is not None:
        layer.attention.sinks.set_value(jnp.linspace(-1.0, 2.0, HEADS))
    return layer


def head_norm(size: int) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, scale_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(7))


def shown(options: dict) -> str:
    """The same in every process, unlike the text of a function."""
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items()) or "defaults"


def tokens_of(length: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (length, HIDDEN))


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected))


def test_rope_rotates_pairs_by_position_times_frequency():
    frequencies = rope_frequencies(HEAD_DIM, theta=100.0)
    np.testing.assert_allclose(frequencies, [1.0, 100**-0.25, 0.1, 100**-0.75], rtol=1e-6)
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 3, HEAD_DIM)))
    positions = np.array([0, 1, 7, 100, 3], np.int32)
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, None] * frequencies)
    expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), jnp.asarray(positions), frequencies), expected, atol=1e-4)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = rope_frequencies(64, theta=10000.0)
    scaled = rope_frequencies(64, theta=10000.0, scaling=LLAMA3)
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 64 / 4, wavelengths > 64 / 1
    assert short.any()
    assert long.any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = ~short & ~long
    smooth = (64 / wavelengths[between] - 1.0) / (4.0 - 1.0)
    np.testing.assert_allclose(scaled[between], ((1 - smooth) / 8 + smooth) * plain[between], rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rope_scaling": LLAMA3},
        {"rope_theta": None},
        {"sliding_window": 5},
        {"soft_cap": 2.0},
        {"sinks": True, "sliding_window": 3, "soft_cap": 5.0, "scale": 0.5, "use_bias": True},
        {"implementation": "reference"},
        {"batch_invariant": True},
        {"rotary_dim": 4, "rope_interleaved": True, "use_bias": ("q", "k", "v")},
        {"rope_scaling": YarnRopeScaling(4.0, 8), "qk_norm": head_norm},
    ],
    ids=shown,
)
def test_chunked_steps_over_the_cache_equal_whole_sequences(options: dict):
    """Two sequences, computed in two steps, the second in the middle of pages; padding between nothing and nowhere."""
    if options.get("batch_invariant") and jax.default_backend() != "cpu":
        pytest.skip("on other platforms no engine guarantees it for float32")
    layer = make_layer(**options)
    layer.init_cache(num_pages=9, page_size=PAGE_SIZE, dtype=jnp.float32)
    lengths, split = (11, 7), (6, 3)
    inputs = [tokens_of(length, seed=i) for i, length in enumerate(lengths)]
    tables = np.array([[4, 1, 8], [7, 2, -1]], np.int32)

    outs: list[list[jax.Array]] = [[], []]
    for part in (0, 1):
        begins = (0, 0) if part == 0 else split
        ends = split if part == 0 else lengths
        counts = [end - begin for begin, end in zip(begins, ends, strict=True)]
        positions = np.concatenate([np.arange(b, e) for b, e in zip(begins, ends, strict=True)])
        owner = np.repeat([0, 1], counts)
        slots = tables[owner, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        step = StepMetadata(
            positions=jnp.asarray(np.append(positions, [0, 0]), jnp.int32),
            slot_mapping=jnp.asarray(np.append(slots, [-1, -1]), jnp.int32),
            block_tables=jnp.asarray(tables),
            kv_lens=jnp.asarray(ends, jnp.int32),
            cu_q_lens=jnp.asarray(np.cumsum([0, *counts]), jnp.int32),
            num_seqs=jnp.int32(2),
        )
        x = jnp.concatenate([*(x[b:e] for x, b, e in zip(inputs, begins, ends, strict=True)), jnp.ones((2, HIDDEN))])
        out = layer(x, step)
        outs[0].append(out[: counts[0]])
        outs[1].append(out[counts[0] : sum(counts)])

    for x, parts in zip(inputs, outs, strict=True):
        assert relative_error(jnp.concatenate(parts), layer(x)) < 1e-5


DECODE_OPTIONS = [
    {},
    {"sliding_window": 5, "sinks": True, "soft_cap": 2.0, "use_bias": True},
    {"use_bias": ("q", "v"), "qk_norm": head_norm, "rotary_dim": 4},
]


@pytest.mark.parametrize("options", DECODE_OPTIONS, ids=shown)
@pytest.mark.parametrize("fused", [False, True], ids=["three projections", "one projection"])
def test_decode_steps_equal_whole_sequences(options: dict, fused: bool):
    """Two sequences of which one ends first, token by token; a third row is padding throughout."""
    layer = make_layer(**options)
    inputs = [tokens_of(length, seed=length) for length in (9, 6)]
    want = [layer(x) for x in inputs]
    if fused:
        layer.fuse_projections()
        layer.fuse_projections()  # again: nothing happens
        assert not hasattr(layer, "q_proj")
    layer.init_cache(num_pages=6, page_size=PAGE_SIZE, dtype=jnp.float32)
    tables = np.array([[4, 1, 3], [2, 0, -1], [-1, -1, -1]], np.int32)
    outs: list[list[jax.Array]] = [[], []]
    for position in range(9):
        kv_lens = np.array([position + 1, position + 1 if position < 6 else 0, 0], np.int32)
        step = StepMetadata.decode(tables, kv_lens, PAGE_SIZE)
        assert step.is_decode
        rows = [x[position] if position < len(x) else jnp.ones(HIDDEN) for x in inputs]
        out = layer(jnp.stack([*rows, jnp.ones(HIDDEN)]), step)
        for index, length in enumerate((9, 6)):
            if position < length:
                outs[index].append(out[index])
    for whole, parts in zip(want, outs, strict=True):
        assert relative_error(jnp.stack(parts), whole) < 1e-5


def test_decode_steps_write_nothing_where_there_is_no_page():
    step = StepMetadata.decode(np.array([[3, -1], [3, -1], [5, 2], [5, 2]], np.int32), np.array([4, 5, 0, 9]), 4)
    assert step.positions.tolist() == [3, 4, 0, 8]
    assert step.slot_mapping.tolist()[:3] == [15, -1, -1]


def test_a_step_attends_as_its_kind_says():
    draw = np.random.default_rng(3)
    cache = jpa.PagedKVCache.create(2, 4, PAGE_SIZE, 2, 8, jnp.float32, stacked=True)
    whole = StepMetadata.whole_sequences(2, 5, PAGE_SIZE)
    k, v, q = (jnp.asarray(draw.standard_normal((10, heads, 8)), jnp.float32) for heads in (2, 2, 4))
    cache = cache.write(1, k, v, whole.slot_mapping)
    everything = cache.attend_step(1, q, whole, sliding_window=3)
    decode = StepMetadata.decode(whole.block_tables, whole.kv_lens, PAGE_SIZE)
    last = cache.attend_step(1, q[np.array([4, 9])], decode, sliding_window=3)
    np.testing.assert_allclose(last, everything[np.array([4, 9])], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 100}, {"sinks": True, "soft_cap": 3.0}], ids=str)
def test_whole_sequences_are_computed_in_blocks_without_a_seam(options: dict):
    layer = make_layer(**options)
    batch = jax.random.normal(jax.random.key(1), (2, 300, HIDDEN))
    layer.init_cache(num_pages=2, page_size=300, dtype=jnp.float32)
    paged = layer(batch.reshape(600, HIDDEN), StepMetadata.whole_sequences(2, 300, 300))
    assert relative_error(layer(batch).reshape(600, HIDDEN), paged) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "bound"), [(jnp.float8_e4m3fn, 0.06), (jnp.float8_e5m2, 0.12), (jnp.int8, 0.02)], ids=lambda x: str(x)
)
def test_eight_bit_cache_with_scales(dtype, bound: float):
    layer, x = make_layer(), tokens_of(13)
    expected = layer(x)
    layer.init_cache(num_pages=4, page_size=PAGE_SIZE, dtype=dtype, k_scale=jnp.full(KV_HEADS, 0.03), v_scale=0.03)
    out = layer(x, StepMetadata.whole_sequences(1, 13, PAGE_SIZE))
    assert layer.attention.k_pages is not None
    assert layer.attention.k_pages[...].dtype == dtype
    assert 1e-4 < relative_error(out, expected) < bound


class Chain(nnx.Module):
    """Two layers by attributes whose alphabetical order is not that of the numbers."""

    def __init__(self, **options):
        self.embed = nnx.Embed(32, HIDDEN, rngs=nnx.Rngs(0))
        self.layer_2, self.layer_10 = make_layer(2, **options), make_layer(10, **options)
        self.unused = make_layer()

    def __call__(self, tokens: jax.Array, step: StepMetadata | None = None) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.layer_2(x, step)
        return x + self.layer_10(x, step)


PROMPTS = [[3, 1, 4], list(range(9)), [31]]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "f32"])
def test_calibration_finds_the_largest_number_of_each_head_in_the_pages(dtype):
    model = Chain(dtype=dtype, rope_theta=100.0, sliding_window=5)
    layers = [model.layer_2.attention, model.layer_10.attention]
    largest = np.zeros((2, 2, KV_HEADS), np.float32)
    for prompt in PROMPTS:
        for layer in layers:
            layer.init_cache(num_pages=3, page_size=4, dtype=dtype)
        model(jnp.array(prompt), StepMetadata.whole_sequences(1, len(prompt), page_size=4))
        pages = [[np.asarray(x, np.float32) for x in jax.tree.leaves(nnx.state(x, CacheVariable))] for x in layers]
        largest = np.maximum(largest, np.abs(pages).max((2, 3, 5)))

    rtol = 1e-5 if dtype == jnp.float32 else 2e-2
    for got, want in zip(calibrate(model, PROMPTS, jnp.int8), largest, strict=False):
        np.testing.assert_allclose((got["k_scale"], got["v_scale"]), 1.1 * want / 127, rtol=rtol)
    if dtype == jnp.float32:
        for got, want in zip(calibrate(model, PROMPTS, jnp.float8_e4m3fn, margin=1), largest, strict=False):
            np.testing.assert_array_equal((got["k_scale"], got["v_scale"]), 2 ** np.ceil(np.log2(want / 448)))
    assert len(jax.tree.leaves(nnx.state(model, CacheVariable))) == 4  # the model's own cache is left alone


def test_calibration_without_numbers():
    """Heads of zeros have scale 1; layers that do not run, too. Donated pages do not matter."""
    model = Chain()
    model.layer_2.k_proj.kernel.set_value(model.layer_2.k_proj.kernel[...].at[:, :HEAD_DIM].set(0.0))
    model.layer_2.init_cache(1, 1, jnp.float32)
    for pages in jax.tree.leaves(nnx.state(model, CacheVariable)):
        pages.delete()
    of_layer, _, of_unused = calibrate(model, PROMPTS, jnp.int8)
    assert of_layer["k_scale"][0] == 1.0 > of_layer["k_scale"][1] > 0.0
    assert jax.tree.all(jax.tree.map(lambda scales: (scales == 1.0).all(), of_unused))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one, got none"),
        ({"prompts": [[1], []]}, r"prompts\[1\]: expected at least one token, shape \[T\], got shape \(0,\)"),
        ({"prompts": [1, 2]}, r"prompts\[0\]: expected at least one token, shape \[T\], got shape \(\)"),
        ({"prompts": [[0.5]]}, r"prompts\[0\]: expected dtype int32, or another integer one, got float64"),
        ({"dtype": jnp.bfloat16}, "dtype: expected float8_e4m3fn or float8_e5m2 or int8, got bfloat16"),
        ({"dtype": "int4"}, "dtype: expected .*, got int4"),
        ({"margin": 0}, "margin: expected a positive number, got 0"),
        ({"model": nnx.Linear(2, 2, rngs=nnx.Rngs(0))}, "model: expected PagedAttention layers, got none in Linear"),
        ({"prompts": [[99]]}, "keys of layer 0: expected finite numbers, got nan"),  # `nnx.Embed` has no such token
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_calibration_refuses(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        calibrate(**{"model": Chain(), "prompts": PROMPTS, "dtype": jnp.int8, **change})


def attended(length: int = 13, **options: Any) -> tuple[PagedAttention, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """A layer whose values have another head dim than keys, or are in them, and its operands."""
    layer = PagedAttention(HEADS, KV_HEADS, HEAD_DIM, **options)
    draw = np.random.default_rng(0)
    sizes = (HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, layer.value_dim)
    q, k, v = (jnp.asarray(draw.standard_normal((length, *size)), jnp.float32) for size in sizes)
    return layer, (q, k, None if layer.values_in_keys else v)


@pytest.mark.parametrize(
    "options",
    [
        {"value_dim": 12, "sinks": True, "sliding_window": 4},
        {"value_dim": 5, "values_in_keys": True, "rope_theta": None, "scale": 0.4},
        {"values_in_keys": True, "soft_cap": 2.0},
    ],
    ids=shown,
)
def test_values_of_another_head_dim_or_in_the_keys(options: dict):
    """Whole sequences, a prompt over the cache, and a decode step, beside values that the test takes from the keys."""
    layer, (q, k, v) = attended(**options)
    value_dim, in_keys = options.get("value_dim", HEAD_DIM), options.get("values_in_keys", False)
    plain: Any = {**options, "values_in_keys": False, "value_dim": HEAD_DIM}
    dense = PagedAttention(HEADS, KV_HEADS, HEAD_DIM, **plain)
    rotated = k if layer.rope_theta is None else apply_rope(k, jnp.arange(13), rope_frequencies(HEAD_DIM))
    values = rotated if v is None else v
    padded = jnp.pad(values, ((0, 0), (0, 0), (0, 2 * HEAD_DIM - values.shape[-1])))
    halves = [dense(q, k, half)[..., :HEAD_DIM] for half in jnp.split(padded, 2, axis=-1)]
    want = jnp.concatenate(halves, axis=-1)[..., :value_dim]
    assert layer(q, k, v).shape == (13, HEADS, value_dim)
    assert relative_error(layer(q, k, v), want) < 1e-5

    layer.init_cache(num_pages=4, page_size=PAGE_SIZE, dtype=jnp.float32)
    assert len(jax.tree.leaves(nnx.state(layer, CacheVariable))) == (1 if in_keys else 2)
    whole = StepMetadata.whole_sequences(1, 13, PAGE_SIZE)
    assert relative_error(layer(q, k, v, whole), want) < 1e-5
    decode = StepMetadata.decode(whole.block_tables, whole.kv_lens, PAGE_SIZE)
    assert relative_error(layer(q[-1:], k[-1:], None if v is None else v[-1:], decode), want[-1:]) < 1e-5


@pytest.mark.parametrize("in_keys", [False, True])
def test_a_step_may_see_what_another_layer_wrote(in_keys: bool):
    """As layers that share a cache: queries of their own over it, while no page changes."""
    layer, (q, k, v) = attended(values_in_keys=in_keys)
    layer.init_cache(num_pages=4, page_size=PAGE_SIZE, dtype=jnp.float32)
    step = StepMetadata.whole_sequences(1, 13, PAGE_SIZE)
    layer(q, k, v, step)
    before = jax.tree.map(np.asarray, nnx.state(layer, CacheVariable))
    other = None if v is None else jnp.full_like(v, jnp.nan)
    got = layer(2 * q, jnp.full_like(k, jnp.nan), other, step, writes=False)
    assert relative_error(got, layer(2 * q, k, v)) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(layer, CacheVariable))
    assert relative_error(layer(2 * q, k, v, writes=False), got) < 1e-5  # whole sequences, which no cache is for


def test_calibration_and_eight_bits_of_values_in_keys():
    """One scale for both, and no `v_scale`."""

    class Model(nnx.Module):
        def __init__(self):
            self.attention, (self.q, self.k, _) = attended(value_dim=5, values_in_keys=True, rope_theta=None)

        def __call__(self, tokens: jax.Array, step: StepMetadata | None = None) -> jax.Array:
            return self.attention(self.q[: len(tokens)], self.k[: len(tokens)], None, step)

    model = Model()
    (scales,) = calibrate(model, [range(13), range(2)], jnp.int8)
    np.testing.assert_allclose(scales["k_scale"], 1.1 * jnp.abs(model.k).max((0, 2)) / 127, rtol=1e-6)
    assert "v_scale" not in scales
    model.attention.init_cache(num_pages=4, page_size=PAGE_SIZE, dtype=jnp.int8, **scales)
    out = model(jnp.arange(13), StepMetadata.whole_sequences(1, 13, PAGE_SIZE))
    assert 1e-4 < relative_error(out, model(jnp.arange(13))) < 0.02


def test_values_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="value_dim: expected at most head_dim = 8 of values in keys, got 9"):
        PagedAttention(2, 1, 8, value_dim=9, values_in_keys=True)
    with pytest.raises(ValueError, match="value_dim"):
        PagedAttention(2, 1, 8, value_dim=0)
    with pytest.raises(TypeError, match="values_in_keys"):
        PagedAttention(2, 1, 8, values_in_keys=1)  # pyright: ignore[reportArgumentType]
    layer, (q, k, _) = attended(values_in_keys=True)
    with pytest.raises(ValueError, match="v: expected None, since the values are in the keys, got shape"):
        layer(q, k, k)
    with pytest.raises(ValueError, match="v_scale"):
        layer.init_cache(4, PAGE_SIZE, jnp.int8, k_scale=1.0, v_scale=1.0)
    layer, (q, k, _) = attended()
    with pytest.raises(ValueError, match="v: expected an array, got None"):
        layer(q, k, None)


def test_dtypes_of_weights_and_computation():
    layer = make_layer(dtype=jnp.bfloat16, param_dtype=jnp.float32)
    layer.init_cache(num_pages=4, page_size=PAGE_SIZE, dtype=jnp.bfloat16)
    out = layer(tokens_of(9), StepMetadata.whole_sequences(1, 9, PAGE_SIZE))
    assert layer.q_proj.kernel.dtype == jnp.float32
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), make_layer()(tokens_of(9))) < 2e-2


def test_the_cache_is_state_of_its_own_that_a_jitted_step_donates():
    layer, x = make_layer(), tokens_of(10)
    expected = layer(x)
    layer.init_cache(num_pages=4, page_size=PAGE_SIZE, dtype=jnp.float32)
    graphdef, cache, weights = nnx.split(layer, CacheVariable, ...)
    assert len(jax.tree.leaves(cache)) == 2
    pointers = [pages.unsafe_buffer_pointer() for pages in jax.tree.leaves(cache)]

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, weights, x, step):
        layer = nnx.merge(graphdef, cache, weights)
        return layer(x, step), nnx.state(layer, CacheVariable)

    out, new_cache = run(cache, weights, x, StepMetadata.whole_sequences(1, 10, PAGE_SIZE))
    assert relative_error(out, expected) < 1e-5
    assert [pages.unsafe_buffer_pointer() for pages in jax.tree.leaves(new_cache)] == pointers
    assert all(pages.is_deleted() for pages in jax.tree.leaves(cache))


def test_gradients_reach_weights_and_sinks_without_a_cache():
    layer, x = make_layer(sinks=True, sliding_window=4), tokens_of(9)
    gradients = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    leaves = jax.tree.leaves(gradients)
    assert len(leaves) == 5
    assert all(bool(jnp.isfinite(g).all()) and float(jnp.abs(g).max()) > 0 for g in leaves)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads"):
        PagedAttention(6, 4, 8)
    with pytest.raises(ValueError, match="head_dim"):
        PagedAttention(2, 2, 7)
    with pytest.raises(ValueError, match="sliding_window"):
        PagedAttention(2, 2, 8, sliding_window=0)
    with pytest.raises(ValueError, match="soft_cap"):
        PagedAttention(2, 2, 8, soft_cap=-1.0)
    with pytest.raises(ValueError, match="theta"):
        rope_frequencies(8, theta=0.0)
    with pytest.raises(ValueError, match="low_freq_factor"):
        Llama3RopeScaling(8.0, 4.0, 4.0, 64)
    layer = make_layer()
    with pytest.raises(ValueError, match="k_scale: required for int8"):
        layer.init_cache(4, PAGE_SIZE, jnp.int8)
    with pytest.raises(ValueError, match="num_pages"):
        layer.init_cache(0, PAGE_SIZE, jnp.float32)
    with pytest.raises(ValueError, match="init_cache was never called"):
        layer(tokens_of(4), StepMetadata.whole_sequences(1, 4, PAGE_SIZE))


def test_biases_are_those_that_are_named():
    layer = make_layer(use_bias=("q", "v"))
    projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)
    assert [projection.bias is not None for projection in projections] == [True, False, True, False]
    for wrong in ("q", ("q", "x"), 3):
        with pytest.raises(ValueError, match="use_bias: expected True, False, or names of"):
            make_layer(use_bias=wrong)


def test_norms_are_per_head_and_before_the_rotation():
    layer = make_layer(qk_norm=head_norm)
    x = tokens_of(5)
    q, k, v = (p(x).reshape(5, -1, HEAD_DIM) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    want = layer.o_proj(layer.attention(head_norm(HEAD_DIM)(q), head_norm(HEAD_DIM)(k), v).reshape(5, -1))
    assert relative_error(layer(x), want) < 1e-6


def test_partial_rotations_are_checked():
    for columns, message in ((10, "rotary_dim: expected at most head_dim = 8, got 10"), (3, "expected an even number")):
        with pytest.raises(ValueError, match=message):
            make_layer(rotary_dim=columns)
