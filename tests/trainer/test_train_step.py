"""The training step: recorded numbers, its gradient and its metrics."""

import dataclasses
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from trainer import model, train_step
from trainer.config import RunConfig
from trainer.output import sinks, summary
from trainer_in_process import make_task, train_rows

pytestmark = pytest.mark.one_python

COMPARED = ("adam_clip", "spam", "clip_spam")
GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "train_step.json"
CONFIG = RunConfig.from_settings(
    optimizers=("clip_spam",),
    preset="nano",
    embedding="scaled",
    initialization="stable",
    z_loss=1e-4,
    batch_size=4,
    sequence_length=16,
    steps=10,
    bursts=0,
)
EXPLANATION = """
{name}: {value!r}, recorded was {golden!r}.

These are the numbers of the first two steps of one small run on the embedded text.
They change when the model, its initialization, the data, the loss, the optimizer or the
schedule computes something else. If that is what a change is for, say so in its
message, and record the new numbers with

    PYTHONPATH=examples:tests python tests/trainer/test_train_step.py

If not (a refactoring, a faster form, another version of JAX), they must not change:
beyond float32 rounding, what you have found is a mistake.
"""


def measure() -> dict[str, float]:
    """The global metrics of two steps, and the norms of every tensor in the second."""
    task = make_task(CONFIG)
    rows = train_rows(task, *CONFIG.optimizers, steps=2)
    numbers = {}
    for row in rows:
        for key in ("loss", "grad_norm", "clipped_grad_norm", "update_norm"):
            numbers[f"step {row['step']}: {key}"] = row[key]
    for kind in ("grad_norm", "update_norm", "param_norm"):
        for tensor, norm in zip(
            task.tensor_names, rows[-1]["tensors"][kind], strict=True
        ):
            numbers[f"{tensor}: {kind}"] = norm
    return numbers


def test_first_steps_give_the_recorded_numbers():
    golden, measured = json.loads(GOLDEN.read_text()), measure()
    assert measured.keys() == golden.keys()
    for name, value in golden.items():
        assert measured[name] == pytest.approx(value, rel=1e-5, abs=1e-9), (
            EXPLANATION.format(name=name, value=measured[name], golden=value)
        )


@pytest.fixture(scope="module")
def rows(task):
    """A whole run of three optimizers."""
    return train_rows(task, *COMPARED)


def faulty_gradients(task, params, *steps):
    """The gradients at some steps of a run that stays at `params`, with the faults."""

    @jax.jit
    def gradient(windows, fault_state):
        _, clean, _ = train_step.gradient_of_batch(params, windows, task.graphdef, 0.0)
        return task.faults.update(clean, fault_state, params)[0]

    state, batches = task.faults.init(params), iter(task.train)
    return [
        gradient(windows, state._replace(injection_step=jnp.int32(step - 1)))
        for step, windows in enumerate(itertools.islice(batches, max(steps)), start=1)
        if step in steps
    ]


def test_optimizers_meet_identical_parameters_batches_and_faults(rows):
    """Only the optimizer differs between the runs."""
    first = [row for row in rows if row["step"] == 1]
    assert len(first) == len(COMPARED)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len({row[name] for row in first}) == 1


def test_fault_is_a_thousand_times_the_gradient(task, params):
    first_fault = task.config.fault_steps[0]
    clean, faulty = faulty_gradients(task, params, first_fault - 1, first_fault)
    assert optax.tree.norm(faulty) > 500 * optax.tree.norm(clean)


def test_global_norms_are_those_of_the_tensors(rows):
    for row in sinks.steps_of(rows, "clip_spam"):
        for name in ("grad_norm", "clipped_grad_norm", "update_norm", "param_norm"):
            total = math.sqrt(sum(norm**2 for norm in row["tensors"][name]))
            assert row[name] == pytest.approx(total, rel=1e-5)


def test_accumulation_changes_neither_gradient_nor_largest_logits(task, params):
    batch = next(iter(task.train))
    measuring = dataclasses.replace(task.model, qk_clip=100.0)
    graphdef, _ = model.abstract(measuring)
    whole = train_step.gradient_of_batch(params, batch, graphdef, 1e-3)
    parts = train_step.gradient_of_batch(
        params, batch.reshape(2, 2, -1), graphdef, 1e-3
    )
    assert whole[2].shape == (task.model.layers, task.model.heads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole,
        parts,
    )


def test_z_loss_is_in_the_gradient_and_not_in_the_loss(task, params):
    batch = next(iter(task.train))

    def penalty(params):
        _, log_z, _ = train_step.token_losses(params, batch[0], task.graphdef)
        return jnp.mean(log_z**2)

    loss, plain, _ = train_step.gradient_of_batch(params, batch, task.graphdef, 0.0)
    same, gradient, _ = train_step.gradient_of_batch(params, batch, task.graphdef, 0.1)
    assert loss == pytest.approx(float(same), rel=1e-6)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(
            a, b + 0.1 * c, rtol=1e-3, atol=1e-5
        ),
        gradient,
        plain,
        jax.grad(penalty)(params),
    )


def test_loss_is_the_cross_entropy_of_optax(task, params):
    windows = next(iter(task.train))[0]
    tokens = windows.astype(jnp.int32)
    logits = nnx.merge(task.graphdef, params)(tokens[:, :-1])
    reference = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    losses, *_ = train_step.token_losses(params, windows, task.graphdef)
    np.testing.assert_allclose(losses, reference, rtol=1e-5, atol=1e-6)


def test_gradient_norm_after_clipping_is_what_entered_the_moments(rows):
    steps = {name: sinks.steps_of(rows, name) for name in COMPARED}
    for row in steps["adam_clip"]:
        expected = min(1.0, row["grad_norm"])
        assert row["clipped_grad_norm"] == pytest.approx(expected, rel=1e-3)
    clipped = 0
    for row in steps["spam"]:
        close = row["clipped_grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
        if row["spikes_clipped"]:
            clipped += 1
            assert row["clipped_grad_norm"] < row["grad_norm"] * 1.001
        else:
            assert close, "also right in reset steps"
    assert clipped
    for row in steps["clip_spam"]:
        assert row["clipped_grad_norm"] <= 1.001


def test_all_optimizers_follow_one_schedule(rows):
    rates = [
        summary.column(sinks.steps_of(rows, name), "learning_rate")
        for name in ("spam", "clip_spam")
    ]
    np.testing.assert_array_equal(*rates)
    assert rates[0].max() == pytest.approx(4e-3)
    assert rates[0].argmax() == 2  # a tenth of 24 steps
    assert rates[0][-1] < 0.15 * 4e-3


def test_fault_steps_are_four_bursts_of_three():
    config = RunConfig.from_settings(steps=500)
    assert config.burst_starts == (100, 200, 300, 400)
    assert len(config.fault_steps) == 12
    assert RunConfig.from_settings(bursts=0).fault_steps == ()
    assert set(RunConfig.from_settings(steps=3).fault_steps) <= {1, 2, 3}


def test_faults_of_the_demonstration_come_when_spam_clips():
    """And late enough for the guard, which needs 32 steps."""
    config = RunConfig()
    faults = config.fault_steps + config.bad_batch_numbers
    assert len(set(faults)) == 18 and min(faults) > 32
    assert RunConfig.from_settings(bursts=0).bad_batch_numbers == ()
    intervals = config.spam_intervals
    positions = [step % intervals["reset_interval"] for step in faults]
    assert min(positions) >= intervals["grace_steps"]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n")
