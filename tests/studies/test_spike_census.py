"""The census of gradient spikes: its counts, its statistics and its program."""

import dataclasses
import functools
import itertools
import json
import lzma
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

import spike_census
from spam_optax import functional
from studies.spike_census import (
    architectures,
    counting,
    statistics,
    study,
)
from studies.spike_census.study import Record, Setting
from trainer import model, train_step
from trainer.data import text_files
from trainer.errors import UsageError

# Which tests are nightly: see docs/development.md.
pytestmark = [pytest.mark.slow, pytest.mark.nightly]

TINY = Setting(
    batch_size=2, sequence_length=8, layers=2, width=16, steps=60, learning_rate=1e-2
)
COMMON = "--steps 60 --layers 2 --width 16 --sequence-length 8 --learning-rate 0.01"
FLAGS = ["--models", "llama", "--texts", "shakespeare", "--batch-sizes", "2"]
FLAGS += COMMON.split()


@pytest.fixture(scope="module")
def task():
    return study.make_task(TINY)


@pytest.fixture(scope="module")
def recorded(task):
    """A census, and the parameters and gradients of all steps of its two passes."""
    params, gradients = [], []
    compute = counting.loss_and_gradient

    def record(these, *args, **kwargs):
        loss, gradient = compute(these, *args, **kwargs)
        params.append(jax.device_get(these))
        gradients.append(jax.device_get(gradient))
        return loss, gradient

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "loss_and_gradient", record)
        counted = counting.count_spikes(task, lambda fraction: None)
    return counted, params, gradients


def split_layers(trees):
    """Returns every tensor of a list of trees, flat, and one per layer if stacked.

    Each is an array of steps x coordinates.
    """
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
    tensors = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(stacked):
        if path[0].key == "blocks":
            tensors += [leaf[:, layer] for layer in range(leaf.shape[1])]
        else:
            tensors.append(leaf)
    return [tensor.reshape(len(trees), -1) for tensor in tensors]


def spike_scores(gradients):
    """Returns the library's scores of recorded gradients, tensor by tensor."""
    tensors = split_layers(gradients)
    scores = functional.gradient_spike_score(np.concatenate(tensors, axis=1))
    ends = np.cumsum([tensor.shape[1] for tensor in tensors])
    return np.split(np.asarray(scores), ends[:-1], axis=1)


def spike_counts(scores):
    return np.stack([(score > 50).sum(axis=1) for score in scores], axis=1)


# ------------------------------------------------------------------------ exactness


def test_streamed_counts_are_those_of_recorded_gradients(recorded):
    counted, _, gradients = recorded
    scores = spike_scores(gradients[: TINY.steps])
    count = spike_counts(scores)
    largest = np.stack([score.max(axis=1) for score in scores], axis=1)
    assert count.sum() > 0, "without a spike this test shows nothing"
    np.testing.assert_array_equal(counted.counts["gss_count"], count)
    np.testing.assert_allclose(counted.counts["gss_max"], largest, rtol=2e-6)


def test_second_pass_is_the_first_bit_for_bit(recorded):
    for trees in recorded[1:]:
        assert len(trees) == 2 * TINY.steps
        for first, second in zip(trees, trees[TINY.steps :], strict=False):
            jax.tree.map(np.testing.assert_array_equal, first, second)


def test_online_counts_are_those_of_adams_second_moment_before_the_step(recorded):
    counted, _, gradients = recorded
    for column, tensor in enumerate(split_layers(gradients[: TINY.steps])):
        nu = np.zeros(tensor.shape[1:], np.float64)
        for step, gradient in enumerate(tensor.astype(np.float64)):
            square = gradient**2
            score = np.where(nu > 0, square / np.where(nu > 0, nu, 1), 0)
            if not np.any(np.abs(score / 5000 - 1) < 1e-3):  # not a matter of rounding
                expected = np.sum(score > 5000)
                assert counted.counts["online_count"][step, column] == expected
            largest = counted.counts["online_max"][step, column]
            assert largest == pytest.approx(score.max(), rel=1e-3)
            nu = 0.999 * nu + 0.001 * square


def observe_all(gradients, mean):
    """Returns the statistics of a stream of gradients that needs no parameters."""
    params = jax.tree.map(jnp.zeros_like, gradients[0])
    state = counting.first_state(params, mean)
    seen = []
    for gradient in gradients:
        state, found, finite = counting.observe(
            state, gradient, np.float32(0), np.float32(len(gradients))
        )
        assert finite
        seen.append(jax.device_get(found))
    return state, {name: np.stack([x[name] for x in seen]) for name in seen[0]}


def test_counts_of_heavy_tailed_gradients():
    """There are 200 steps, so that the library adds in another order."""
    rng, steps = np.random.default_rng(0), 200
    stream = [
        {
            "blocks": {"kernel": rng.standard_cauchy((2, 5, 7)).astype(np.float32)},
            "embed": rng.standard_cauchy((40, 3)).astype(np.float32) * 1e-6,
        }
        for _ in range(steps)
    ]
    stream[3]["embed"][:] = 0
    for gradient in stream:
        gradient["embed"][0] = 0  # a token that never occurs
    zeros = jax.tree.map(jnp.zeros_like, stream[0])
    first, _ = observe_all(stream, zeros)
    _, counts = observe_all(stream, first.total)
    expected = spike_counts(spike_scores(stream))
    assert expected.any(axis=0).all(), "without a spike this test shows nothing"
    np.testing.assert_array_equal(counts["gss_count"], expected)


def test_scores_have_the_same_bits_where_sums_are_exact():
    """Small integers add up exactly in any order, to means that divide exactly."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 8, (31, 64)).astype(np.float32)
    last = 2.0 ** np.ceil(np.log2(sizes.sum(axis=0))) - sizes.sum(axis=0)
    signs = rng.choice([-1, 1], (32, 64))
    gradients = (np.concatenate([sizes, last[None]]) * signs).astype(np.float32)
    stream = [{"kernel": gradient} for gradient in gradients]
    zeros = {"kernel": jnp.zeros(64)}
    first, _ = observe_all(stream, zeros)
    np.testing.assert_array_equal(
        np.stack([counting.offline_score(g, first.total["kernel"]) for g in gradients]),
        functional.gradient_spike_score(gradients),
    )


def test_training_is_that_of_adam(task, recorded):
    _, params, gradients = recorded
    adam = optax.adam(lambda step: jnp.asarray(task.rates)[step])
    update = jax.jit(adam.update)
    state, expected = adam.init(task.params), task.params
    for step in range(30):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            params[step],
            expected,
        )
        change, state = update(gradients[step], state)
        expected = optax.apply_updates(expected, change)


# --------------------------------------------------------------------- bounded memory


def test_memory_does_not_grow_with_the_steps(task):
    """The state is five copies of the parameters and a counter."""

    def size(steps):
        rates = jax.ShapeDtypeStruct((), jnp.float32)
        state = jax.eval_shape(counting.first_state, task.params, task.params)
        new, found, _ = jax.eval_shape(
            counting.observe, state, task.params, rates, np.float32(steps)
        )
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((new, found)))

    parameters = sum(x.size for x in jax.tree.leaves(task.params))
    tensors = len(counting.tensor_sizes(task.params))
    assert size(10) == size(10**6) == 5 * 4 * parameters + 4 + 4 * 4 * tensors


def test_only_a_row_of_numbers_is_kept_of_a_step(recorded, task):
    counted, _, _ = recorded
    kept = sum(table.nbytes for table in counted.counts.values())
    tensors = len(counting.tensor_sizes(task.params))
    assert kept == TINY.steps * tensors * 4 * 4
    assert counted.losses.shape == (TINY.steps,)


# ------------------------------------------------------------------ what can go wrong


def test_a_run_that_is_not_finite_ends_before_that_step(task, monkeypatch):
    compute = counting.loss_and_gradient
    calls = itertools.count()

    def break_step_56(*args, **kwargs):
        loss, gradient = compute(*args, **kwargs)
        if next(calls) == 55:
            gradient["embed"]["embedding"] *= jnp.nan
        return loss, gradient

    monkeypatch.setattr(counting, "loss_and_gradient", break_step_56)
    counted = counting.count_spikes(task, lambda fraction: None)
    assert counted.halted_at == 56
    assert counted.losses.shape == (55,)
    assert counted.counts["gss_count"].shape[0] == 55
    means = jax.tree.leaves(counted.mean)
    assert all(np.isfinite(mean).all() for mean in means)
    # It was found in the first pass, and both were made without it.
    assert next(calls) == 56 + 2 * 55


def test_a_first_step_that_is_not_finite_is_an_error(task, monkeypatch):
    nan = jax.tree.map(lambda x: x * jnp.nan, task.params)
    monkeypatch.setattr(
        counting, "loss_and_gradient", lambda *args, **kwargs: (jnp.float32(1), nan)
    )
    with pytest.raises(FloatingPointError, match="first step"):
        counting.count_spikes(task, lambda fraction: None)


def test_a_second_pass_that_differs_is_an_error(task, monkeypatch):
    compute = counting.loss_and_gradient
    calls = itertools.count()

    def drift(*args, **kwargs):
        loss, gradient = compute(*args, **kwargs)
        if next(calls) == TINY.steps + 7:
            gradient["norm"]["scale"] *= 1.01
        return loss, gradient

    monkeypatch.setattr(counting, "loss_and_gradient", drift)
    with pytest.raises(RuntimeError, match="differs from the first"):
        counting.count_spikes(task, lambda fraction: None)


# --------------------------------------------------------------------- architectures

# Compiles in half the time what does not run for long.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_llvm_disable_expensive_passes": True}
)
KINDS = {"gpt2": architectures.GPT2, "hawk": architectures.Hawk}


@pytest.fixture(scope="module", params=KINDS)
def decoder(request):
    """A small model. NumPy draws its parameters: compiling JAX's way takes seconds."""
    config = model.ModelConfig(
        layers=2, width=16, heads=2, ffn_width=32, vocabulary=11, positions=12
    )
    graphdef, shapes = nnx.split(
        nnx.eval_shape(lambda: KINDS[request.param](config, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)

    def draw(path, like):
        if path[-1].key == "scale":
            return np.ones(like.shape, like.dtype)
        if path[-1].key == "decay":  # slow, as Hawk's is at first
            return np.full(like.shape, 6.0, like.dtype)
        return rng.normal(scale=0.2, size=like.shape).astype(like.dtype)

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(shapes))
    apply = quick_jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
    return types.SimpleNamespace(graphdef=graphdef, params=params, apply=apply)


def test_later_tokens_do_not_change_earlier_logits(decoder):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (2, 12))
    logits = decoder.apply(decoder.params, tokens)
    for changed in (1, 5, 11):
        other = tokens.copy()
        other[:, changed] = (other[:, changed] + 1) % 11
        new = decoder.apply(decoder.params, other)
        np.testing.assert_array_equal(new[:, :changed], logits[:, :changed])
        assert np.abs(new[:, changed:] - logits[:, changed:]).max() > 1e-3


def test_earlier_tokens_change_later_logits(decoder):
    """A model that uses its own token alone would be causal too."""
    tokens = np.random.default_rng(0).integers(0, 11, (1, 12))
    other = tokens.copy()
    other[:, 0] = (other[:, 0] + 1) % 11
    new, old = (decoder.apply(decoder.params, these) for these in (other, tokens))
    assert np.abs(new[:, 11] - old[:, 11]).max() > 1e-4  # past the convolution's reach


def test_every_parameter_learns(decoder):
    """Each of two tokens comes twice in turn. Without memory the loss would be 0.69."""
    windows = np.tile([[3, 3, 7, 7]], (4, 4))[:, :13]
    adam = optax.adam(1e-2)

    @quick_jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(train_step.loss_fn)(
            params, windows, decoder.graphdef
        )
        update, state = adam.update(gradient, state)
        return optax.apply_updates(params, update), state, loss

    params, state = decoder.params, adam.init(decoder.params)
    for _ in range(60):
        params, state, loss = step(params, state)
    assert loss < 0.2
    tensors = split_layers([decoder.params, params])
    for name, (old, new) in zip(counting.tensor_sizes(params), tensors, strict=True):
        assert np.any(old != new), name


def test_linear_recurrence_is_the_loop():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.5, 1, (2, 9, 3)), rng.normal(size=(2, 9, 3))
    h, expected = np.zeros((2, 3)), []
    for t in range(9):
        h = a[:, t] * h + b[:, t]
        expected.append(h)
    found = architectures.linear_recurrence(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-5)


def test_hawk_forgets_slowly_at_first():
    """An open gate's decay is drawn from 0.9 to 0.999, whatever the seed."""
    config = model.ModelConfig(layers=1, width=512, heads=1, ffn_width=16)
    decay = architectures.GatedRecurrence(config, rngs=nnx.Rngs(3)).decay[...]
    slowest = np.asarray(jax.nn.sigmoid(decay), np.float64) ** 8
    assert 0.9 <= slowest.min() < 0.91 and 0.99 < slowest.max() <= 0.9991


# ------------------------------------------------------------------------- statistics


def record_of(loss, spikes, setting=TINY):
    spikes = np.asarray(spikes)
    counts = np.stack([spikes, np.zeros_like(spikes)], axis=1)
    tables = {"gss_count": counts, "gss_max": 1.0 + counts}
    tables |= {"online_count": counts, "online_max": 1.0 + counts}
    return Record(
        dataclasses.replace(setting, steps=len(loss)),
        {"embed/embedding": 60, "norm/scale": 40},
        None,
        np.asarray(loss, np.float64),
        tables,
    )


def series(seed, steps=600):
    rng = np.random.default_rng(seed)
    descent = 2 + 3 * np.exp(-np.arange(steps) / 60)
    return descent + 0.05 * rng.normal(size=steps), rng.poisson(0.3, steps) * 10


def test_rank_correlation_is_that_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.poisson(1.0, 80), rng.normal(size=80)
    rho, _ = statistics.shift_test(statistics.ranks(x), statistics.ranks(y))
    assert rho == pytest.approx(stats.spearmanr(x, y).statistic)
    np.testing.assert_allclose(statistics.ranks(x), stats.rankdata(x))


def test_a_step_that_raises_the_next_losses_is_found():
    loss, spikes = series(0)
    for step in np.flatnonzero(spikes):
        loss[step + 1 : step + 6] += 0.1
    found = statistics.relate(loss, spikes, 60)
    assert found["after_rho"] > 0.3 and found["after_rho_p"] < 0.01
    assert found["after_change"] > 0.03 and found["after_change_p"] < 0.01
    assert found["after_bump_rate_many"] > found["after_bump_rate_others"]


def test_a_batch_with_a_high_loss_is_separate_from_later_losses():
    loss, spikes = series(1)
    loss[spikes > 0] += 0.6
    found = statistics.relate(loss, spikes, 60)
    assert found["same_rho"] > 0.5 and found["same_rho_p"] < 0.01
    assert found["same_bump_rate_many"] > 0.9 > found["same_bump_rate_others"]
    assert found["after_rho_p"] > 0.01


def test_unrelated_series_are_called_related_as_often_as_they_should_be():
    """5 % of 200 drifting series, within 4 standard deviations."""
    p = []
    for seed in range(200):
        loss, spikes = series(seed)
        walk = np.random.default_rng(1000 + seed).normal(size=600)
        drift = np.convolve(walk, np.ones(10) / 10, "same")
        spikes = spikes + np.maximum(0, 20 * drift)
        p.append(statistics.relate(loss + 0.1 * drift[::-1], spikes, 60))
    for name in ("same_rho_p", "after_rho_p", "after_change_p"):
        share = np.mean([found[name] < 0.05 for found in p])
        assert share < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize("spikes", [np.zeros(600), np.ones(600)])
def test_equal_spikes_are_related_to_nothing(spikes):
    assert statistics.relate(series(0)[0], spikes, 60) is None


def test_summary_of_a_known_record():
    loss, spikes = np.full(100, 2.0), np.zeros(100, int)
    spikes[[0, 50]] = 3, 1
    summary = statistics.summarize(record_of(loss, spikes))
    assert summary["parameters"] == 100 and summary["final_loss"] == 2
    assert summary["gss_rate"] == pytest.approx(1e6 * 4 / 100 / 100)
    assert summary["gss_share_in_warmup"] == 0.75
    assert summary["gss_rate_after_warmup"] == pytest.approx(1e6 / 90 / 100)
    assert summary["gss_embedding_share_after_warmup"] == 1
    assert summary["online_rate_after_grace"] == pytest.approx(1e6 / 80 / 100)
    largest = {"score": 4.0, "tensor": "embed/embedding", "step": 1}
    assert summary["largest"] == largest
    assert summary["largest_after_warmup"] == largest | {"score": 2.0, "step": 51}


def test_kinds_join_the_layers_of_a_tensor():
    assert statistics.kind_of("blocks.12/ffn/up/kernel") == "ffn/up"
    assert statistics.kind_of("norm/scale") == "norm/scale"
    spikes = np.zeros(100, int)
    spikes[99] = 6
    worst, other = statistics.by_kind([record_of(np.ones(100), spikes)])
    assert worst["kind"] == "embed/embedding" and worst["spikes"] == 1
    assert worst["coordinates"] == pytest.approx(0.6)
    assert worst["rate"] == pytest.approx(1e6 * 6 / 60 / 100)
    assert worst["rate_after_warmup"] == pytest.approx(1e6 * 6 / 60 / 90)
    assert other["rate"] == 0 and worst["largest"] == 7


# ------------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with one finished run; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("census")
    assert spike_census.main([*FLAGS, "--output", str(folder)]) == 0
    return folder


def test_the_folder_has_what_the_help_says(finished, recorded):
    names = {path.name for path in finished.iterdir()}
    assert names == {"census.md", "summary.json", "overview.png", "heat_maps", "runs"}
    (run,) = (finished / "runs").iterdir()
    assert run.name.startswith("llama_shakespeare_bytes_b2-")
    record = study.decode(json.loads(run.read_text()))
    counted, _, _ = recorded
    assert record.setting == TINY
    np.testing.assert_array_equal(record.loss, counted.losses)
    for name in ("gss_count", "online_count"):
        np.testing.assert_array_equal(record.counts[name], counted.counts[name])
    np.testing.assert_allclose(
        record.counts["gss_max"], counted.counts["gss_max"], rtol=1e-3
    )
    (figure,) = (finished / "heat_maps").iterdir()
    assert figure.read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["runs"] == {TINY.name: statistics.summarize(record)}
    page = (finished / "census.md").read_text()
    for heading in ("How often", "Whether", "Which tensors"):
        assert f"## {heading}" in page
    widths = {
        line.count("|") for line in page.split("##")[2].splitlines() if "|" in line
    }
    assert len(widths) == 1  # every row of a table has all of its columns


def test_a_run_that_is_there_is_not_run_again(finished, monkeypatch):
    monkeypatch.setattr(counting, "count_spikes", None)
    before = (finished / "census.md").read_text()
    assert spike_census.main([*FLAGS, "--output", str(finished)]) == 0
    assert (finished / "census.md").read_text() == before


def test_a_record_whose_tables_lack_rows_is_damaged(finished):
    (run,) = (finished / "runs").iterdir()
    damaged = json.loads(run.read_text()) | {"loss": [1.0]}
    with pytest.raises(ValueError, match="a row for every step"):
        study.decode(damaged)


def test_other_settings_have_other_records():
    names = {
        study.SpikeCensus().name(dataclasses.replace(TINY, **changes))
        for changes in ({}, {"steps": 70}, {"seed": 1}, {"text": "a/shakespeare"})
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "50"], "must be a whole number >= 51"),
        (["--width", "40"], "--width must be a multiple of 16, not 40"),
        (["--models", "mamba"], "invalid choice: 'mamba'"),
        (["--texts", "nowhere.txt"], "cannot read the data file nowhere.txt"),
        (["--texts", "a/x.txt", "b/x.txt"], "two of the --texts have the same"),
        (["--tokenizer", "bpe:3"], "bpe:3 is no tokenizer"),
        (["--sequence-length", "1000000"], "the text shakespeare is too short"),
    ],
)
def test_a_mistake_takes_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        spike_census.main([*FLAGS, "--output", str(tmp_path), *flags])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"spike_census\.py: error: [^\n]+\n", line)
    assert message in line


# ------------------------------------------------------------------------------ texts


def test_a_packed_text_is_read_like_the_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = "The quick brown föx.\n" * 500
    (tmp_path / "plain.txt").write_text(text, encoding="utf-8")
    with lzma.open(tmp_path / "packed.txt.xz", "wt", encoding="utf-8") as file:
        file.write(text)
    for name in ("bytes", "bpe:300"):
        plain = study.load_text(str(tmp_path / "plain.txt"), name)
        packed = study.load_text(str(tmp_path / "packed.txt.xz"), name)
        np.testing.assert_array_equal(packed.tokens, plain.tokens)
        assert packed.vocabulary == plain.vocabulary
        assert packed.digest == plain.digest


@pytest.mark.parametrize("keep", [0, 40, 100])
def test_a_packed_text_that_is_cut_short_is_an_error(keep, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed = lzma.compress(bytes(range(256)) * 20)
    path = tmp_path / "cut.txt.xz"
    path.write_bytes(packed[:keep])
    with pytest.raises(UsageError, match="cannot unpack the data file"):
        text_files.find(str(path))
    assert not list((tmp_path / "cache").rglob("cut*"))


def test_the_second_text_is_in_the_repository():
    (path,) = text_files.find(str(text_files.PROSE))
    assert path.stat().st_size == 16_688_360
    with path.open("rb") as file:
        assert file.read(4) == b"EMMA"
