"""The table of optimizers: each trains and keeps the right moments."""

import dataclasses
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pretrain
from trainer import optimizers, train_step
from trainer.config import RunConfig
from trainer.errors import UsageError
from trainer.output import sinks
from trainer_in_process import SMALL_FLAGS, train_rows

# Each has a state of another kind. CI trains the first one only.
VARIED = [
    "sparse_spam",
    pytest.param("adam_mini", marks=pytest.mark.nightly),
    pytest.param("galore", marks=pytest.mark.nightly),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIED)
def test_optimizers_train(task, name):
    clean = dataclasses.replace(task.config, bursts=0)
    task = task._replace(config=clean, faults=train_step.make_faults(clean))
    steps = [row for row in train_rows(task, name, steps=4) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert all(row["update_norm"] > 0 for row in steps[1:])
    assert steps[0]["loss"] == pytest.approx(math.log(256), rel=0.05)
    tensors = len(task.tensor_names)
    for values in steps[-1]["tensors"].values():
        assert len(values) == tensors


@pytest.mark.one_python
@pytest.mark.parametrize("name", optimizers.TABLE)
def test_every_optimizer_keeps_the_state_and_measures_every_tensor(task, name):
    """The step is lowered, and not compiled, since that takes most of the time."""
    optimizer = optimizers.make(name, task.config)
    state, measured = train_step.lower_step(task, optimizer, np.uint8).out_info
    before = jax.eval_shape(lambda: train_step.initial_state(task, optimizer))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    assert measured["update_norm"].shape == ()
    tensors = len(task.tensor_names)
    assert {x.shape for x in measured["tensors"].values()} == {(tensors,)}


def test_the_gradient_behind_the_first_moment_is_recorded_for_all_but_three(task):
    """The other three have no `mu`, or several; their norm is the gradient's."""
    others = set()
    for name in optimizers.TABLE:
        transform = optimizers.make(name, task.config).transform
        state = jax.eval_shape(transform.init, task.shapes)
        if len(optax.tree.get_all_with_path(state, "mu")) != 1:
            others.add(name)
    assert others == {"adafactor", "galore", "muon"}


def test_sparse_momentum_is_for_attention_and_feed_forward_matrices(task):
    transform = optimizers.make("sparse_spam", task.config).transform
    params = task.shapes
    state = jax.eval_shape(transform.init, params)
    sizes = zip(
        task.tensor_names,
        jax.tree.leaves(optax.tree.get(state, "mu")),
        jax.tree.leaves(params),
        strict=True,
    )
    for name, moment, parameter in sizes:
        matrix = re.search(r"(query|key|value|out|gate|up|down)/kernel$", name)
        assert moment.size == parameter.size // (4 if matrix else 1), name


def test_adam_mini_has_one_second_moment_a_head_row_or_column(task):
    transform = optimizers.make("adam_mini", task.config).transform
    state = jax.eval_shape(transform.init, task.shapes)
    nu = optax.tree.get(state, "nu")
    blocks = {name: x["kernel"].shape for name, x in nu["blocks"]["attention"].items()}
    heads, width = task.model.heads, task.model.width
    layers = (task.model.layers, 1)
    assert blocks["query"] == blocks["key"] == (*layers, heads)
    assert blocks["value"] == blocks["out"] == (*layers, width)
    assert nu["embed"]["embedding"].shape == (task.model.vocabulary, 1)
    assert nu["norm"]["scale"].shape == (1,)


def test_stacked_layers_are_projected_one_by_one():
    """GaLore on a stack of matrices is GaLore on each, with a redraw in between."""
    galore = optax.contrib.scale_by_galore(rank=2, update_proj_gap=2)
    stacked = optimizers.for_each_layer(galore)
    params = jnp.ones((2, 6, 4))
    state, alone = stacked.init(params), [galore.init(p) for p in params]
    assert optax.tree.get(state, "mu").shape == (2, 2, 4)
    update, update_alone = jax.jit(stacked.update), jax.jit(galore.update)
    for step in range(3):
        gradients = jax.random.normal(jax.random.key(step), params.shape)
        updates, state = update(gradients, state)
        for layer in range(2):
            want, alone[layer] = update_alone(gradients[layer], alone[layer])
            np.testing.assert_allclose(updates[layer], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 500, 100_000])
def test_every_length_of_run_gives_valid_optimizers(steps):
    config = RunConfig.from_settings(steps=steps)
    for name in optimizers.TABLE:
        optimizers.make(name, config)
    assert (
        config.spam_intervals["grace_steps"] < config.spam_intervals["reset_interval"]
    )


@pytest.mark.slow
def test_one_entry_adds_an_optimizer(tmp_path, monkeypatch, capsys):
    """The command line, training, the figure and the report need nothing else."""

    def make_sgd(config, learning_rate):
        return optax.sgd(learning_rate)

    entry = optimizers.Entry(make_sgd)
    monkeypatch.setitem(optimizers.TABLE, "sgd", entry)
    folder = tmp_path / "run"
    flags = ["--optimizer=sgd", "--steps=3", f"--output={folder}"]
    assert pretrain.main([*SMALL_FLAGS, *flags]) == 0
    steps = sinks.steps_of(sinks.read(folder / "metrics.jsonl"), "sgd")
    assert all(row["update_norm"] > 0 for row in steps[1:])
    assert "sgd" in (folder / "report.md").read_text()
    capsys.readouterr()


def test_an_optimizer_that_is_not_in_the_table_is_refused():
    with pytest.raises(UsageError, match="one of adam, .*, not 'sgd'"):
        optimizers.make("sgd", RunConfig())
