"""The guard around the optimizer, as the trainer uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import loop, optimizers, train_step
from trainer.config import RunConfig
from trainer_in_process import make_task

SMALL = {"preset": "nano", "batch_size": 4, "sequence_length": 16, "guard": True}


def train(task, name, stop=None):
    """Trains from the beginning; returns the rows, the last state and the error."""
    rows, states = [], []
    optimizer = optimizers.make(name, task.config)
    error = None
    try:
        loop.train(
            train_step.initial_state(task, optimizer),
            task,
            optimizer,
            iter(task.train),
            record=lambda row: rows.append(row) if "loss" in row else None,
            save=lambda state, place: states.append(jax.device_get(state)),
            stop=lambda step: step == stop,
        )
    except loop.Halted as halted:
        error = halted
    return rows, states[-1], error


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_end_the_run_after_eight(capsys):
    """The faults are steps 2 to 12, one behind the other."""
    settings = {"steps": 12, "bursts": 4, "spike_kind": "nan", "accumulate": 2}
    rows, state, error = train(
        make_task(RunConfig.from_settings(**SMALL, **settings)), "clip_spam"
    )
    assert "the update of step 10 is not finite" in str(error)
    assert [row["skipped"] for row in rows] == [None, *["norm nonfinite"] * 8, None]
    assert [row["skipped_steps"] for row in rows[:9]] == list(range(9))
    for row in rows[1:9]:
        assert row["update_norm"] == 0 and row["clipped_grad_norm"] == 0
        assert row["param_norm"] == rows[0]["param_norm"]
    # The guard sees the mean of the micro-batches, which is what is recorded.
    losses = optax.tree.get(state.opt_state, "skip_losses")
    assert losses[0] == jnp.float32(rows[0]["loss"]) and not np.any(losses[1:])
    norms = optax.tree.get(state.opt_state, "skip_norms")
    assert norms[0] == pytest.approx(rows[0]["grad_norm"], rel=1e-6)


@pytest.mark.slow
def test_bursts_are_skipped_and_leave_no_trace():
    """The optimizer inside counts no skipped step, and neither does its schedule."""
    settings = {"steps": 74, "bursts": 1, "reset_interval": 12, "guard": False}
    task = make_task(RunConfig.from_settings(**SMALL | settings))
    rows, state, error = train(task, "guard_clip_spam", stop=48)
    assert error is None and task.config.fault_steps == (37, 38, 39)
    assert {row["step"] for row in rows if row["skipped"]} == {37, 38, 39}
    assert rows[36]["skipped"] == "norm spike"
    assert rows[-1]["skipped_steps"] == optax.tree.get(state, "skipped_total") == 3
    schedule = optimizers.schedule(task.config)
    assert rows[-1]["learning_rate"] == pytest.approx(float(schedule(48 - 3 - 1)))
    for row in rows:
        if not row["skipped"]:  # the resets of the inner step are found
            expected = min(1.0, row["grad_norm"])
            assert row["clipped_grad_norm"] <= expected * 1.001
            assert row["spikes_clipped"] or row["clipped_grad_norm"] == pytest.approx(
                expected, rel=1e-3
            )


def test_the_guard_is_on_from_9m_up_and_can_be_turned_off():
    assert not RunConfig().guard
    assert RunConfig.from_settings(preset="9m").guard
    assert not RunConfig.from_settings(preset="9m", guard=False).guard
