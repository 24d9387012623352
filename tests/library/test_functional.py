"""`functional`: values as in NumPy's float64, dtypes, limits and errors.

Numbers out of range are in test_bad_arguments.py.
"""

import functools
import math
import types

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from spam_optax import functional

pytestmark = pytest.mark.one_python

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
REAL_DTYPES = DTYPES[:4]
# Results that stay wide are float32; these are the roundings allowed to them.
WIDE_RTOL = {"float64": 1e-13, "complex128": 1e-13}
# One rounding to the gradient's own dtype, of which `eps` is twice.
NARROW_RTOL = {"float16": 1e-3, "bfloat16": 8e-3, **WIDE_RTOL}

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
few_examples = settings(max_examples=40, deadline=None, derandomize=True)


def enabled(dtype):
    """Returns a context that has 64-bit types only for a 64-bit `dtype`."""
    return jax.enable_x64(dtype in ("float64", "complex128"))


def wide_dtype(dtype):
    return "float64" if dtype in ("float64", "complex128") else "float32"


def draw(dtype, shape, seed=0):
    """Draws values over two decades, of either sign or any phase."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape))
    if dtype.startswith("complex"):
        x = x + 1j * rng.normal(size=shape)
    return np.asarray(x).astype(jnp.dtype(dtype))


def precise(x):
    """Returns `x` in NumPy's widest dtype."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def run(function, *arguments, **static):
    """Runs the function compiled, which is much faster than operation by operation."""
    return jax.jit(functools.partial(function, **static))(*arguments)


def clip_by_hand(gradient, nu, threshold):
    """Returns the published clipping in float64, for finite input with a history."""
    gradient, nu = precise(gradient), precise(nu)
    size = np.abs(gradient)
    spikes = size**2 > threshold * nu
    phase = gradient / np.where(size > 0, size, 1)
    return np.where(spikes, phase * np.sqrt(threshold * nu), gradient), spikes


@functools.partial(jax.jit, static_argnums=3)
def rule(gradient, nu, threshold, clip_unseen=False):
    """The score, the mask and the clipping follow one rule."""
    return (
        functional.online_spike_score(gradient, nu),
        functional.spike_mask(gradient, nu, threshold, clip_unseen=clip_unseen),
        functional.clip_spikes(gradient, nu, threshold, clip_unseen=clip_unseen),
    )


# Detection.


@each_dtype
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_offline_score_is_the_size_over_its_mean(dtype, axis):
    gradients = draw(dtype, (6, 5, 4))
    with enabled(dtype):
        score = run(functional.gradient_spike_score, gradients, axis=axis)
    size = np.abs(precise(gradients))
    want = size / size.mean(axis=axis, keepdims=True)
    assert (score.dtype, score.shape) == (wide_dtype(dtype), gradients.shape)
    np.testing.assert_allclose(score, want, rtol=WIDE_RTOL.get(dtype, 1e-6))


compiled_score = jax.jit(functional.gradient_spike_score)


@given(
    st.sampled_from([1, 2, 30]),  # Few shapes, each is compiled.
    st.integers(0, 2**31),
    st.sampled_from([1e-15, 1.0, 1e15]),
)
@few_examples
def test_offline_scores_have_mean_one(steps, seed, unit):
    """Guards the normalisation and that the unit of the gradient cancels."""
    gradients = draw("float32", (steps, 3), seed) * np.float32(unit)
    score = compiled_score(gradients)
    np.testing.assert_allclose(precise(score).mean(axis=0), 1, rtol=1e-5)


def test_offline_score_finds_a_planted_spike():
    gradients = draw("float32", (400, 7))
    gradients[123, 4] = -3000
    score = functional.gradient_spike_score(gradients)
    assert np.argwhere(score > 50).tolist() == [[123, 4]]


def test_offline_score_of_zeros_is_zero_and_nonfinite_entries_enter_no_mean():
    gradients = np.array(
        [[0, 1, np.nan, np.nan], [0, np.nan, np.inf, 3], [0, 3, -np.inf, 1]], "f4"
    )
    inf = np.inf
    want = [[0, 0.5, inf, inf], [0, inf, inf, 1.5], [0, 1.5, inf, 0.5]]
    np.testing.assert_array_equal(functional.gradient_spike_score(gradients), want)


def test_offline_score_where_the_sum_of_the_steps_overflows():
    """Guards the score of the largest spikes there are against becoming 0."""
    gradients = np.array([8e37] * 6 + [0.0] * 6, np.float32)
    score = run(functional.gradient_spike_score, gradients)
    np.testing.assert_allclose(score, [2.0] * 6 + [0.0] * 6, rtol=1e-6)


@each_dtype
def test_online_score_is_the_square_over_the_second_moment(dtype):
    gradient, nu = draw(dtype, (5, 4)), np.abs(draw("float32", (5, 4), 1))
    with enabled(dtype):
        score = run(functional.online_spike_score, gradient, nu)
    want = np.abs(precise(gradient)) ** 2 / precise(nu)
    assert (score.dtype, score.shape) == (wide_dtype(dtype), (5, 4))
    np.testing.assert_allclose(score, want, rtol=WIDE_RTOL.get(dtype, 1e-6))


@pytest.mark.parametrize(
    ("dtype", "nu_dtype"),
    [
        ("float32", "float16"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("complex64", "bfloat16"),
        ("bfloat16", "float64"),
        ("float64", "float32"),
        ("complex128", "bfloat16"),
    ],
)
def test_second_moment_may_have_a_dtype_of_its_own(dtype, nu_dtype):
    """Guards `nu_dtype`: the result keeps the gradient's dtypes, whatever nu's is."""
    gradient = draw(dtype, (50,)) * np.asarray(30).astype(jnp.dtype(dtype))
    nu = np.abs(draw("float32", (50,), 1)).astype(jnp.dtype(nu_dtype))
    with jax.enable_x64("float64" in (dtype, nu_dtype) or dtype == "complex128"):
        score, _, clipped = rule(gradient, nu, 9.0)
    want, spikes = clip_by_hand(gradient, nu, 9.0)
    assert spikes.any() and not spikes.all()
    assert (score.dtype, clipped.dtype) == (wide_dtype(dtype), dtype)
    rtol = max(NARROW_RTOL.get(dtype, 0), 1e-6)
    np.testing.assert_allclose(precise(clipped), want, rtol=rtol)


def test_online_score_without_history_and_of_nonfinite_gradients():
    gradient = jnp.array([7.0, 0.0, jnp.nan, -jnp.inf, 3e19, jnp.nan, 0.0])
    nu = jnp.array([0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    score = functional.online_spike_score(gradient, nu)
    np.testing.assert_array_equal(score, [0, 0, *[np.inf] * 4, 0])


@pytest.mark.parametrize(
    ("dtype", "gradient", "want"),
    [
        # The square of float16's maximum is finite in float32.
        ("float16", [65504, np.inf, -np.inf, np.nan, 0], [0, 1, 1, 1, 0]),
        ("bfloat16", [1e19, 2e19, -1e30, np.nan, -0.0], [0, 1, 1, 1, 0]),
        ("float32", [1.8e19, 1.9e19, -1e30, np.nan, 1e-45], [0, 1, 1, 1, 0]),
        ("float64", [1e30, 1e154, -1e155, np.inf, np.nan], [0, 0, 1, 1, 1]),
        # Each square is finite in the first one, their sum is not.
        ("complex64", [1.5e19 + 1.5e19j, 1e19 + 1e19j, complex(0, np.inf)], [1, 0, 1]),
        ("complex64", [complex(1, np.nan), complex(np.inf, np.nan), 0], [1, 1, 0]),
        ("complex128", [1e20 + 1e20j, 1e154 + 1e154j, complex(np.nan, 0)], [0, 1, 1]),
    ],
)
def test_nonfinite_coordinates_are_found_and_zeroed_the_others_kept(
    dtype, gradient, want
):
    """Guards the dtype squares are taken in; coordinates that stay keep every bit."""
    gradient = np.asarray(gradient).astype(jnp.dtype(dtype))
    want = np.array(want, bool)
    with enabled(dtype):
        mask = run(functional.nonfinite_mask, gradient)
        zeroed = run(functional.zero_nonfinite, gradient)
    assert (mask.dtype, zeroed.dtype) == (bool, dtype)
    np.testing.assert_array_equal(mask, want)
    bits = np.where(want, np.zeros_like(gradient), gradient).tobytes()
    assert np.asarray(zeroed).tobytes() == bits


any_float = st.floats(width=32, allow_subnormal=False)
some_nu = st.floats(0, 2.0**100, width=32, allow_subnormal=False)


@given(
    st.lists(st.tuples(any_float, some_nu), min_size=6, max_size=6),
    st.sampled_from([0.5, 1.0, 5000.0]),
    st.booleans(),
)
@few_examples
def test_mask_and_clipping_agree_with_the_score(coordinates, threshold, clip_unseen):
    """The inputs include NaN and infinities."""
    gradient, nu = (np.array(x, np.float32) for x in zip(*coordinates, strict=True))
    score, mask, clipped = rule(gradient, nu, threshold, clip_unseen)
    # At the limit itself, the two ways to write the rule may round differently.
    hypothesis.assume((np.abs(np.asarray(score) / threshold - 1) > 1e-5).all())
    with np.errstate(over="ignore", invalid="ignore"):
        odd = ~np.isfinite(np.square(gradient))
    want = np.asarray(score) > threshold
    if clip_unseen:
        want |= (nu == 0) & (gradient != 0)
    np.testing.assert_array_equal(mask, want & ~odd)
    kept = ~want & ~odd
    np.testing.assert_array_equal(np.asarray(clipped)[kept], gradient[kept])
    assert np.isfinite(np.square(clipped)).all()
    limit = np.sqrt(threshold * precise(nu))[want | odd]
    assert (np.abs(precise(clipped)[want | odd]) <= limit * (1 + 1e-6)).all()
    assert (np.sign(clipped) * np.sign(np.nan_to_num(gradient)) >= 0).all()


@pytest.mark.parametrize("as_array", [False, True])
def test_a_score_of_just_the_threshold_is_no_spike(as_array):
    """The comparison is > and not >=. A threshold may be an array."""
    gradient = jnp.array([4.0, -4.0, 4.0000005, -4.0000005])
    threshold = jnp.asarray(4.0) if as_array else 4.0
    mask = functional.spike_mask(gradient, jnp.full(4, 4.0), threshold)
    assert mask.tolist() == [False, False, True, True]


# Clipping.


@each_dtype
def test_clipped_gradient_is_the_published_formula(dtype):
    gradient, nu = draw(dtype, (40, 5)), np.abs(draw(wide_dtype(dtype), (40, 5), 1))
    with enabled(dtype):
        _, mask, clipped = rule(gradient, nu, 2.0)
    want, spikes = clip_by_hand(gradient, nu, 2.0)
    assert 20 < spikes.sum() < 180
    assert (clipped.dtype, clipped.shape) == (dtype, gradient.shape)
    np.testing.assert_array_equal(mask, spikes)
    rtol = NARROW_RTOL.get(dtype, 1e-6)
    np.testing.assert_allclose(precise(clipped), want, rtol=rtol)
    np.testing.assert_array_equal(np.asarray(clipped)[~spikes], gradient[~spikes])


@pytest.mark.parametrize("clip_unseen", [False, True])
def test_without_history_a_gradient_passes_unless_clip_unseen(clip_unseen):
    """A zero gradient is never a spike."""
    gradient = jnp.array([3.0, -1e-3, 0.0, 1e18])
    arguments = (gradient, jnp.zeros(4))
    clipped = functional.clip_spikes(*arguments, clip_unseen=clip_unseen)
    mask = functional.spike_mask(*arguments, clip_unseen=clip_unseen)
    np.testing.assert_array_equal(clipped, jnp.zeros(4) if clip_unseen else gradient)
    assert mask.tolist() == [clip_unseen, clip_unseen, False, clip_unseen]


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_nonfinite_real_gradients_become_the_limit_or_zero(dtype):
    gradient = np.array([np.nan, np.inf, -np.inf, np.inf, np.nan])
    nu = np.array([4.0, 4.0, 4.0, 0.0, 0.0])
    with enabled(dtype):
        clipped = rule(jnp.asarray(gradient, dtype), jnp.asarray(nu, dtype), 9.0)[2]
    np.testing.assert_array_equal(precise(clipped), [0, 6, -6, 0, 0])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize(
    ("gradient", "phase"),
    [
        (30 + 40j, 0.6 + 0.8j),
        (-50j, -1j),
        (1e20 + 1e20j, (1 + 1j) / 2**0.5),
        (3e38 - 3e38j, (1 - 1j) / 2**0.5),
        (complex(np.inf, 5), 1),
        (complex(-7, -np.inf), -1j),
        (complex(np.inf, -np.inf), (1 - 1j) / 2**0.5),
        (complex(np.nan, 1), 0),
        (complex(np.inf, np.nan), 0),
        (0, 0),
    ],
)
def test_clipping_keeps_the_phase_of_complex_numbers(gradient, phase, shape):
    """If one part is infinite, its phase is kept. NaN in either part gives 0."""
    gradient = np.full(shape, gradient, np.complex64)
    clipped = rule(gradient, np.full(shape, 0.25, np.float32), 16.0)[2]
    assert (clipped.dtype, clipped.shape) == (jnp.complex64, shape)
    np.testing.assert_allclose(clipped, np.full(shape, 2 * phase), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", [np.inf, -np.inf, -65504.0])
def test_limit_beyond_float16_is_its_maximum(gradient):
    """The limit of 7e5 is finite in float32 and would be infinite in float16."""
    clipped = functional.clip_spikes(jnp.array([gradient], "float16"), jnp.array([1e8]))
    assert clipped.dtype == jnp.float16
    np.testing.assert_array_equal(clipped, np.sign([gradient]) * 65504)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("threshold", [1.0, 5000.0, 1e30])
def test_limit_is_capped_so_that_its_square_stays_finite(dtype, threshold):
    """With nu near its maximum sqrt(threshold * nu) squared would overflow."""
    with enabled(dtype):
        largest = jnp.finfo(wide_dtype(dtype)).max
        phase = (1 - 1j) / 2**0.5 if dtype.startswith("complex") else 1
        gradient = jnp.asarray([np.inf * (1 - 1j if phase != 1 else 1), 0.0], dtype)
        clipped = rule(gradient, jnp.full(2, largest), threshold)[2]
    clipped = precise(clipped)
    assert clipped[1] == 0
    wide = np.dtype(wide_dtype(dtype)).type
    square = wide(clipped[0].real) ** 2 + wide(clipped[0].imag) ** 2
    assert 0.2 * largest < square < np.inf
    np.testing.assert_allclose(clipped[0] / np.abs(clipped[0]), phase, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "clip_unseen"),
    [("bfloat16", False), ("float32", True), ("complex64", False)],
)
def test_when_not_active_only_nonfinite_coordinates_change(dtype, clip_unseen):
    """The flag of the grace steps is traced, as in the transformations."""
    gradient = jnp.asarray([1e6, -1e18, jnp.inf, jnp.nan, 2e19, 0.0], dtype)
    nu = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])

    @jax.jit
    def both(active):
        rule = dict(active=active, clip_unseen=clip_unseen)
        clipped = functional.clip_spikes(gradient, nu, 4.0, **rule)
        return clipped, functional.spike_mask(gradient, nu, 4.0, **rule)

    clipped, mask = both(False)
    np.testing.assert_array_equal(clipped, functional.zero_nonfinite(gradient))
    assert not mask.any()
    clipped, mask = both(True)
    np.testing.assert_array_equal(
        clipped, functional.clip_spikes(gradient, nu, 4.0, clip_unseen=clip_unseen)
    )
    assert mask.tolist() == [True, clip_unseen, False, False, False, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_largest_gradients_with_a_finite_square_pass_without_history(dtype):
    """Guards the cap on the limit: it must not cut what is no spike."""
    with enabled(dtype):
        root = np.sqrt(np.finfo(wide_dtype(dtype)).max)
        gradient = jnp.asarray(root, dtype)
        while functional.nonfinite_mask(gradient):
            gradient = jnp.nextafter(gradient, jnp.zeros_like(gradient))
        assert gradient > 0.99 * root
        clipped = functional.clip_spikes(gradient, jnp.zeros((), dtype))
    assert clipped == gradient


def test_denormal_second_moments_of_float16_are_a_history():
    """Denormal in float16, normal in float32, where the arithmetic is done."""
    nu = jnp.full(3, 6e-8, "float16")
    clipped = functional.clip_spikes(jnp.array([1.0, -jnp.inf, 1e-3], "float16"), nu)
    limit = math.sqrt(5000 * float(nu[0]))
    np.testing.assert_allclose(precise(clipped), [limit, -limit, 1e-3], rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_denormal_second_moments_clip_or_pass_but_break_nothing(dtype):
    """XLA may set them to 0, which is no history. The functions must still agree."""
    gradient = jnp.array([1.0, 1e-12, -jnp.inf, 0.0, jnp.nan], dtype)
    nu = jnp.full(5, 1e-39, dtype)
    _, mask, clipped = rule(gradient, nu, 5000.0)
    mask = np.asarray(mask)
    assert np.isfinite(precise(clipped)).all()
    np.testing.assert_array_equal(
        np.asarray(clipped[:2] != gradient[:2]), mask[:2], strict=True
    )
    assert not mask[2:].any() and (clipped[3:] == 0).all()
    assert -1e-17 < clipped[2] <= 0


# The reset clock and the corrections.


@pytest.mark.parametrize("interval", [1, 3, 500, 2**31 - 1])
def test_reset_position_is_the_remainder(interval):
    steps = np.array([[1, 2, 3], [200, 251, 255]], np.uint8)
    for given_as in (interval, jnp.asarray(interval), float(interval)):
        position = functional.reset_position(steps, given_as)
        assert position.dtype == jnp.int32
        np.testing.assert_array_equal(position, steps.astype(int) % interval)


def test_without_interval_the_position_is_the_step_and_there_is_no_ramp():
    steps = jnp.array([1, 7, 10_000])
    np.testing.assert_array_equal(functional.reset_position(steps, None), steps)
    np.testing.assert_array_equal(functional.reset_ramp(steps, None, 150), np.ones(3))


@pytest.mark.parametrize(
    ("interval", "warmup_steps", "x64"),
    [
        (500, 150, False),
        (500, 150, True),
        (500, 0, False),
        (40, 150, False),
        (7, 1, False),
        (1, 3, False),
    ],
)
def test_ramp_at_every_step(interval, warmup_steps, x64):
    """Checks the formula at 1300 steps, which include two resets."""
    want = []
    for t in range(1, 1301):
        c, ramp = t % interval, 1.0
        if t >= interval and c < warmup_steps:
            ramp = 1 - 0.99 * (1 + math.cos(math.pi * c / (warmup_steps + 1))) / 2
        want.append(ramp)
    with jax.enable_x64(x64):
        steps = jnp.arange(1, 1301)
        ramp = run(lambda t: functional.reset_ramp(t, interval, warmup_steps), steps)
        traced = run(functional.reset_ramp, steps, interval, warmup_steps)
    assert ramp.dtype == traced.dtype == ("float64" if x64 else "float32")
    np.testing.assert_allclose(ramp, want, rtol=0, atol=1e-14 if x64 else 2e-7)
    np.testing.assert_allclose(traced, want, rtol=0, atol=1e-14 if x64 else 2e-7)


@pytest.mark.parametrize("decay", [0, 0.0, 0.5, 0.9, 0.999, 0.99999])
@pytest.mark.parametrize("as_array", [False, True])
def test_bias_correction_has_no_cancellation(decay, as_array):
    """Against float64 at 10 000 steps, where ``1 - decay**step`` is off by 1e-3."""
    steps = np.arange(1, 10_001)
    if as_array:
        correction = jax.jit(functional.bias_correction)(jnp.float32(decay), steps)
        decay = float(np.float32(decay))
    else:
        correction = functional.bias_correction(decay, steps)
    want = -np.expm1(steps * np.log(decay)) if decay else np.ones(10_000)
    assert correction.dtype == jnp.float32
    np.testing.assert_allclose(correction, want, rtol=1e-6)


@pytest.mark.parametrize("decay", [0, np.float32(0.9), np.float64(0.9)])
def test_bias_correction_takes_numbers_and_arrays_of_any_kind(decay):
    """`inject_hyperparams` turns whole numbers into integer arrays."""
    want = 1 - float(decay) ** 3
    for given_as in (decay, np.asarray(decay), jnp.asarray(decay), np.full(2, decay)):
        correction = functional.bias_correction(
            given_as, np.full(np.shape(given_as), 3)
        )
        np.testing.assert_allclose(correction, np.full(np.shape(given_as), want), 1e-6)


def test_bias_correction_in_float64():
    with jax.enable_x64(True):
        correction = functional.bias_correction(0.999, jnp.arange(1, 100))
        traced = jax.jit(functional.bias_correction)(0.999, jnp.arange(1, 100))
    want = -np.expm1(np.arange(1, 100) * np.log(0.999))
    assert correction.dtype == traced.dtype == jnp.float64
    np.testing.assert_allclose(correction, want, rtol=1e-13)
    np.testing.assert_allclose(traced, want, rtol=1e-13)


# The spike score of a curve.


def spike_score_by_hand(values, window, deviations):
    """Computes the score with two loops over Python floats."""
    spikes = 0
    for t in range(window, len(values)):
        known = [values[s] for s in range(t - window, t) if math.isfinite(values[s])]
        if not math.isfinite(values[t]):
            spikes += 1
            continue
        if not known:
            continue
        mean = math.fsum(known) / len(known)
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in known) / len(known))
        distance = abs(values[t] - mean)
        spikes += distance >= deviations * std and distance > 0
    return 100 * spikes / (len(values) - window)


@pytest.mark.parametrize(
    ("window", "dtype"),
    [
        (2, "float32"),
        (64, "bfloat16"),
        (64, "float64"),
        (300, "float32"),
        (639, "float32"),
    ],
)
def test_spike_score_equals_the_double_loop(window, dtype):
    """The curve has noise, jumps up and down, infinities and several NaN in a row."""
    rng = np.random.default_rng(window)
    values = 3 + 0.1 * rng.normal(size=640)
    values[rng.integers(0, 640, 12)] += rng.choice([-40, 40], 12)
    values[[100, 310, 639]] = np.nan, np.inf, -np.inf
    values[200:215] = np.nan
    values = values.astype(jnp.dtype(dtype))
    with enabled(dtype):
        score = run(functional.spike_score, values, window=window)
    want = spike_score_by_hand(precise(values).tolist(), window, 10.0)
    assert (score.dtype, score.shape) == (jnp.float32, ())
    assert want > 0
    np.testing.assert_allclose(score, want, rtol=1e-6)


@pytest.mark.parametrize("window", [50, 150])
def test_spike_score_counts_planted_spikes_exactly(window):
    rng = np.random.default_rng(0)
    values = (2 + 0.01 * rng.normal(size=1000)).astype(np.float32)
    planted = np.arange(400, 1000, 60)
    values[planted] += np.where(np.arange(10) % 2, 30.0, -30.0) ** np.arange(1, 11)
    # Each dwarfs the ones before, so no window hides it.
    score = run(functional.spike_score, values, window=window)
    np.testing.assert_allclose(score, 100 * 10 / (1000 - window), rtol=1e-6)


def test_spike_score_of_a_constant_curve_is_zero_and_of_a_step_up_is_not():
    """Guards the rounding of the mean: a std of 0 makes no spike of the same value."""
    assert functional.spike_score(jnp.full(300, 0.1), window=100) == 0
    values = jnp.full(300, 0.1).at[200].set(0.2)
    np.testing.assert_allclose(functional.spike_score(values, window=100), 0.5)


def test_spike_score_deviations_are_a_threshold_that_counts_itself():
    """The last value lies exactly 2 standard deviations off the mean."""
    values = jnp.array([-1.0, 1.0, -1.0, 1.0, 2.0])
    assert functional.spike_score(values, window=4, deviations=2.0) == 100
    assert functional.spike_score(values, window=4, deviations=2.001) == 0
    assert functional.spike_score(values, window=4, deviations=jnp.float32(2.0)) == 100


@pytest.mark.parametrize("window", [5, 6, 1000])
def test_spike_score_needs_more_values_than_the_window(window):
    with pytest.raises(ValueError, match=rf"window must be < .* \(5\), got {window}\."):
        functional.spike_score(jnp.ones(5), window=window)


# The bounds.


@pytest.mark.parametrize(
    ("width", "num_layers", "vanilla", "scaled", "normed"),
    [
        (1024, 24, 27.29, 1.822, 1.520),
        (2304, 24, 40.44, 1.822, 1.520),
        (5120, 40, 46.54, 1.636, 1.402),
    ],
)
def test_ffn_bound_at_the_first_layer_is_the_papers(
    width, num_layers, vanilla, scaled, normed
):
    """Table rows of Takase et al.; the residual is the embedding, scaled or not."""
    std = math.sqrt(0.4 / width)
    std_out = std / math.sqrt(2 * num_layers)
    for residual_std, want in ((std, vanilla), (0.4**0.5, scaled), (1.0, normed)):
        bound = functional.ffn_jacobian_bound(
            width, 4 * width, std, std_out, residual_std
        )
        assert (bound.dtype, bound.shape) == (jnp.float32, ())
        assert abs(float(bound) - want) < (0.005 if want > 20 else 0.0005)


def test_ffn_bound_takes_arrays():
    widths, stds = np.array([64, 256]), np.array([0.1, 0.2])
    bound = functional.ffn_jacobian_bound(widths, 4 * widths, stds, 0.5, stds)
    want = 1 + stds * 0.5 / stds * (np.sqrt(widths) + np.sqrt(4 * widths)) ** 2
    np.testing.assert_allclose(bound, want, rtol=1e-6)


def test_attention_bound_holds_for_a_random_output_projection():
    """The norm of I + W J / std is below the bound and above a third of its excess."""
    d, std_out, residual_std = 128, 0.05, 0.7
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(d, d)) / math.sqrt(d)
    projection = std_out * rng.normal(size=(d, d))
    norm = np.linalg.norm(np.eye(d) + projection @ jacobian / residual_std, 2)
    bound = functional.attention_jacobian_bound(
        d, std_out, residual_std, np.linalg.norm(jacobian, 2)
    )
    assert (bound.dtype, bound.shape) == (jnp.float32, ())
    assert 1 + (float(bound) - 1) / 3 < norm < bound


def test_attention_bound_is_the_formula():
    norms = np.array([0.0, 0.5, 3.0])
    bound = functional.attention_jacobian_bound(900, 0.01, 0.4, norms)
    np.testing.assert_allclose(bound, 1 + 0.01 / 0.4 * 2 * 30 * norms, rtol=1e-6)


# The norm of a Jacobian.


def dense_norm(f, x):
    """The largest singular value, by NumPy, of the Jacobian of arrays to arrays."""
    jacobian = np.asarray(jax.jacobian(f)(x), np.float64)
    return np.linalg.norm(jacobian.reshape(-1, x.size), 2)


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (9, 9), (1, 5), (5, 1)])
def test_jacobian_norm_is_the_largest_singular_value(shape):
    """Of a nonlinear function, with more outputs than inputs or fewer."""
    matrix, x = draw("float32", shape), draw("float32", shape[1:], 1)

    def f(x):
        return jnp.tanh(matrix @ x) + jnp.sin(x).sum()

    norm = run(lambda x: functional.jacobian_norm(f, x), x)
    assert (norm.dtype, norm.shape) == (jnp.float32, ())
    np.testing.assert_allclose(norm, dense_norm(f, x), rtol=1e-5)


def test_jacobian_norm_of_trees_is_that_of_all_arrays_together():
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(2, 3)), "b": [rng.normal(size=4), None]}
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), x)
    flat, unravel = jax.flatten_util.ravel_pytree(x)

    def f(x):
        a, b = x["a"], x["b"][0]
        return (a @ a.T, {"c": jnp.outer(b, a[0]), "d": b.sum()})

    want = dense_norm(lambda y: jax.flatten_util.ravel_pytree(f(unravel(y)))[0], flat)
    got = run(lambda x: functional.jacobian_norm(f, x), x)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_jacobian_norm_is_float32_or_wider(dtype):
    """The function gets wide numbers, and may return narrow ones."""
    matrix = draw(dtype, (6, 6))
    with enabled(dtype):
        x = jnp.ones(6, dtype)
        norm = run(lambda x: functional.jacobian_norm(lambda x: matrix @ x, x), x)
        narrow = functional.jacobian_norm(lambda x: (2 * x).astype(dtype), x)
    assert norm.dtype == narrow.dtype == wide_dtype(dtype)
    np.testing.assert_allclose(norm, np.linalg.norm(precise(matrix), 2), rtol=1e-5)
    np.testing.assert_allclose(narrow, 2, rtol=NARROW_RTOL.get(dtype, 1e-6))


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e20, 1e35])
def test_jacobian_norm_of_tiny_and_huge_jacobians(scale):
    """Guards the squares of a product against under- and overflow."""
    matrix = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 1.0]])
    f = functools.partial(jnp.matmul, np.float32(scale * matrix))
    norm = functional.jacobian_norm(f, jnp.ones(2))
    want = scale * np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(norm, want, rtol=1e-5)


def test_jacobian_norm_of_zero_empty_and_nonfinite_jacobians():
    x = jnp.ones(3)
    assert functional.jacobian_norm(jnp.zeros_like, x) == 0
    assert functional.jacobian_norm(jnp.square, jnp.zeros(3)) == 0
    assert functional.jacobian_norm(lambda x: x[:0], x) == 0
    assert functional.jacobian_norm(jnp.square, x[:0]) == 0
    assert functional.jacobian_norm(lambda x: {}, x) == 0
    assert functional.jacobian_norm(lambda x: jnp.ones(2), {}) == 0
    for bad in (jnp.nan, jnp.inf):
        norm = functional.jacobian_norm(lambda x, bad=bad: x.at[1].mul(bad), x)
        assert not jnp.isfinite(norm)


def test_jacobian_norm_rises_with_the_iterations_to_the_norm():
    """Each estimate is a lower bound, and the same in every call."""
    matrix = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    estimate = jax.jit(
        lambda n: functional.jacobian_norm(
            lambda x: matrix @ x, jnp.ones(40), iterations=n
        )
    )
    estimates = [estimate(n) for n in (1, 2, 5, 20, 300)]
    assert estimates == sorted(estimates)
    assert estimates[0] < 0.95 * estimates[-1]
    np.testing.assert_allclose(estimates[-1], np.linalg.norm(matrix, 2), rtol=1e-5)
    assert estimate(5) == estimates[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(1, x), "f must be a function, got 1."),
        (lambda f, x: f(jnp.sin, "x"), "x must be an array, got 'x'."),
        (lambda f, x: f(lambda x: "y", x), "the result of f must be an array, got 'y'"),
    ],
)
def test_jacobian_norm_of_no_function_or_no_array_is_a_type_error(call, message):
    with pytest.raises(TypeError) as caught:
        call(functional.jacobian_norm, jnp.ones(2))
    assert str(caught.value).startswith(f"jacobian_norm: {message}")
    assert "\n" not in str(caught.value)


# Norms of layers, and the spread of embeddings.

layer_norms = jax.jit(functional.layer_gradient_norms, static_argnums=1)


@each_dtype
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layer_norms_are_those_of_the_layers_one_by_one(dtype, axis):
    gradient, other = draw(dtype, (4, 3, 5)), draw(dtype, (6,), 1)
    tree = {"blocks": {"ffn": [gradient]}, "head": other, "none": None}
    with enabled(dtype):
        norms = run(
            functional.layer_gradient_norms, tree, stacked=("blocks",), layer_axis=axis
        )
    assert norms.keys() == {"blocks/ffn/0", "head"}
    assert {x.dtype for x in norms.values()} == {jnp.dtype(wide_dtype(dtype))}
    layers = np.moveaxis(precise(gradient), axis, 0)
    want = [np.linalg.norm(layer) for layer in layers]
    rtol = WIDE_RTOL.get(dtype, 1e-6)
    np.testing.assert_allclose(norms["blocks/ffn/0"], want, rtol=rtol)
    np.testing.assert_allclose(norms["head"], np.linalg.norm(precise(other)), rtol=rtol)


def test_layer_norms_of_huge_and_of_nonfinite_gradients():
    """Guards the squares against overflowing, and one bad layer's from the others."""
    gradient = np.full((4, 9), 1e30, np.float32)
    gradient[1, 2], gradient[2, 0], gradient[3] = np.nan, -np.inf, 1e38
    norms = layer_norms({"w": gradient}, ("w",))["w"]
    np.testing.assert_allclose(norms, [3e30, np.nan, np.inf, 3e38], rtol=1e-6)
    with jax.enable_x64(True):
        norm = layer_norms({"w": np.full(9, 1e307)}, ())["w"]
    np.testing.assert_allclose(norm, 3e307, rtol=1e-14)


def test_layer_norms_take_flax_states_and_part_names_as_a_whole():
    """An NNX state's names have no `value`; `block` is no part of `blocks`."""

    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.Param(jnp.full((2, 4), 3.0))
            self.block = nnx.Param(jnp.full((2, 2), 0.5))

    for tree in (nnx.state(Model()), nnx.to_pure_dict(nnx.state(Model())), Model()):
        norms = layer_norms(tree, ("blocks",))
        np.testing.assert_allclose(norms["blocks"], [6.0, 6.0])
        assert norms["block"] == 1.0
    assert layer_norms(tree, ())["blocks"].shape == ()


@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_token_embedding_variability_is_the_deviation_of_each_row(dtype):
    """It is the deviation of each row from its own mean."""
    table = draw(dtype, (7, 200)) + np.arange(7)[:, None].astype(jnp.dtype(dtype))
    with enabled(dtype):
        got = run(functional.token_embedding_variability, table)
    assert (got.dtype, got.shape) == (wide_dtype(dtype), (7,))
    want = precise(table).std(axis=1)
    np.testing.assert_allclose(got, want, rtol=WIDE_RTOL.get(dtype, 1e-5))


# What all have in common.

RNG = np.random.default_rng(3)
GRADIENT = RNG.normal(size=(4, 6, 3)).astype(np.float32)
GRADIENT[0, 0] = np.nan, np.inf, 1e30
NU = np.abs(RNG.normal(size=(4, 6, 3))).astype(np.float32)
STEPS = np.arange(60, dtype=np.int32).reshape(4, 15)
POSITIVE = RNG.uniform(0.5, 2, (5, 4)).astype(np.float32)
CALLS = {
    "gradient_spike_score": (functional.gradient_spike_score, [GRADIENT]),
    "online_spike_score": (functional.online_spike_score, [GRADIENT, NU]),
    "nonfinite_mask": (functional.nonfinite_mask, [GRADIENT]),
    "zero_nonfinite": (functional.zero_nonfinite, [GRADIENT]),
    "spike_mask": (lambda g, v: functional.spike_mask(g, v, 2.0), [GRADIENT, NU]),
    "clip_spikes": (lambda g, v: functional.clip_spikes(g, v, 2.0), [GRADIENT, NU]),
    "clip_spikes complex": (
        lambda g, v: functional.clip_spikes(g, v, 2.0),
        [jax.lax.complex(GRADIENT, GRADIENT[::-1].copy()), NU],
    ),
    "spike_steps": (
        lambda x: functional.spike_steps(x, window=8, min_history=4),
        [GRADIENT.reshape(4, 18)],
    ),
    "qk_clip_factors": (
        lambda x: jnp.concatenate(functional.qk_clip_factors(x, 5, 1.0), -1),
        [STEPS],
    ),
    "scale_heads": (
        lambda x, f: functional.scale_heads(x, f, 1, 0),
        [NU, jnp.asarray(NU)[:, :, 0, None]],
    ),
    "reset_position": (lambda t: functional.reset_position(t, 7), [STEPS]),
    "reset_ramp": (lambda t: functional.reset_ramp(t, 20, 9), [STEPS]),
    "bias_correction": (lambda t: functional.bias_correction(0.9, t), [STEPS]),
    "bias_correction decays": (
        functional.bias_correction,
        [POSITIVE[0] / 3, STEPS[0, 1:5]],
    ),
    "spike_score": (
        lambda x: functional.spike_score(x, window=5, deviations=2.0),
        [GRADIENT.reshape(4, 18)],
    ),
    "layer_gradient_norms": (
        lambda g: functional.layer_gradient_norms({"w": g}, ("w",))["w"],
        [NU],
    ),
    "token_embedding_variability": (functional.token_embedding_variability, [NU]),
    "jacobian_norm": (
        lambda x: functional.jacobian_norm(lambda x: x * jnp.cumsum(x), x),
        [POSITIVE],
    ),
    "ffn_jacobian_bound": (functional.ffn_jacobian_bound, list(POSITIVE)),
    "attention_jacobian_bound": (
        functional.attention_jacobian_bound,
        list(POSITIVE[:4]),
    ),
}


def test_every_public_function_is_in_the_table_of_calls():
    functions = {
        name
        for name, value in vars(functional).items()
        if isinstance(value, types.FunctionType) and not name.startswith("_")
    }
    assert functions == set(functional.__all__)
    assert functions == {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_jit_and_vmap_equal_eager(name):
    """Rows one by one give the same results as all rows at once, compiled."""
    function, arguments = CALLS[name]
    rows = [function(*row) for row in zip(*arguments, strict=True)]
    want = np.stack(rows)
    batched = run(jax.vmap(function), *arguments)
    assert (batched.dtype, batched.shape) == (want.dtype, want.shape)
    np.testing.assert_allclose(batched, want, rtol=2e-6, atol=1e-7)


F = functional
VECTOR, WHOLE = np.ones(3, np.float32), np.ones(3, np.int32)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (F.gradient_spike_score, [WHOLE]),
        (F.gradient_spike_score, [WHOLE.astype(bool)]),
        (F.gradient_spike_score, [np.ones((0, 3), np.float32)]),
        (F.gradient_spike_score, [np.float32(1)]),
        (F.nonfinite_mask, [WHOLE]),
        (F.zero_nonfinite, [WHOLE]),
        *(
            (f, arguments)
            for f in (
                F.online_spike_score,
                F.spike_mask,
                F.clip_spikes,
            )
            for arguments in (
                [VECTOR, VECTOR[:2]],
                [VECTOR, VECTOR[0]],
                [VECTOR[0], VECTOR],
                [VECTOR, VECTOR[None]],
                [WHOLE, VECTOR],
                [VECTOR, WHOLE],
                [VECTOR, VECTOR.astype(np.complex64)],
            )
        ),
        (F.reset_position, [VECTOR, 3]),
        (F.reset_position, [True, 3]),
        (F.reset_ramp, [VECTOR, 3, 2]),
        (F.spike_score, [VECTOR[:, None]]),
        (F.spike_score, [VECTOR[0]]),
        (F.spike_score, [WHOLE]),
        (F.spike_score, [VECTOR.astype(np.complex64)]),
        (F.layer_gradient_norms, [{"w": WHOLE}]),
        (functools.partial(F.layer_gradient_norms, stacked=["w"]), [{"w": VECTOR[0]}]),
        (functools.partial(F.layer_gradient_norms, stacked=["w"]), [{"w": VECTOR[:0]}]),
        (functools.partial(F.jacobian_norm, jnp.sin), [WHOLE]),
        (functools.partial(F.jacobian_norm, jnp.sin), [VECTOR.astype(np.complex64)]),
        (functools.partial(F.jacobian_norm, jnp.sign), [{"x": VECTOR, "y": WHOLE}]),
        (functools.partial(F.jacobian_norm, jnp.isfinite), [VECTOR]),
        (F.token_embedding_variability, [VECTOR]),
        (F.token_embedding_variability, [NU]),
        (F.token_embedding_variability, [VECTOR[:, None].astype(np.complex64)]),
        (F.token_embedding_variability, [WHOLE[:, None]]),
        (F.token_embedding_variability, [np.ones((3, 0), np.float32)]),
    ],
)
@pytest.mark.parametrize("jitted", [False, True])
def test_wrong_shapes_and_dtypes_are_assertion_errors(function, arguments, jitted):
    """Checked by chex while tracing, so compiled code is checked too."""
    if jitted:
        with pytest.raises(AssertionError):
            jax.eval_shape(function, *arguments[:2], *arguments[2:])
    else:
        with pytest.raises(AssertionError):
            function(*arguments)


def test_the_axis_must_exist():
    with pytest.raises(AssertionError, match="axis '2'"):
        functional.gradient_spike_score(VECTOR, axis=2)


def test_variability_of_a_constant_row_has_a_derivative():
    """The derivative of the root of 0 is defined as 0 and is not NaN."""
    table = jnp.array([[2.0, 2.0], [1.0, 3.0]])
    slope = jax.grad(lambda x: functional.token_embedding_variability(x).sum())(table)
    np.testing.assert_allclose(slope, [[0, 0], [-0.5, 0.5]], rtol=1e-6)
