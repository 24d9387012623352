"""The main job, end to end, and the modules it is made of."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import signal
import statistics
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import pretrain
from trainer import config, loop, model, optimizers, run_folder, sharding, training
from trainer.config import DEMONSTRATION, OPTIMIZERS, RunConfig
from trainer.data import corpus
from trainer.output import analysis, records
from trainer.run_folder import Run
from trainer_process import (
    CONTINUE,
    Trainer,
    finish,
    wait_for_rows,
    without_timing,
)

SMALL = {"preset": "nano", "steps": 24, "batch_size": 4, "sequence_length": 16}
SMALL_FLAGS = [
    "--preset=nano",
    "--steps=60",
    "--batch-size=4",
    "--sequence-length=16",
    "--eval-every=20",
    "--eval-sequences=16",
    "--checkpoint-every=8",
    "--spike-kind=scale",
    "--data-parallel=1",
]
PAIR = ["--optimizer", "adam", "spam"]
VARIED = ("spam", "sparse_spam", "adam_mini", "galore")  # states of four kinds
STEP_KEYS = {
    "optimizer",
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "clipped_grad_norm",
    "update_norm",
    "param_norm",
    "tensors",
    "spikes_clipped",
    "fault",
    "tokens_per_second",
    "flops_utilization",
}
SUMMARY_KEYS = {
    "bad_data_skipped",
    "final_eval_loss",
    "final_eval_perplexity",
    "halted_at",
    "flops_utilization",
    "worst_loss_jump",
    "worst_burst",
    "spikes_seen",
    "spikes_clipped",
    "tokens_per_second",
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "part.txt"
    text.write_bytes(corpus.SHAKESPEARE.read_bytes()[:20_000])
    run_config = RunConfig(**SMALL, data=str(text))
    return pretrain.make_task(Run(run_config, None), sharding.Parallelism(data=1))[0]


@pytest.fixture(scope="module")
def params(task):
    return training.initial_params(task.config, task.model)


@pytest.fixture(scope="module")
def rows(task):
    """A whole run of every optimizer of the demonstration."""
    return rows_of(task, DEMONSTRATION)


def first_state(task, optimizer):
    return training.initial_state(task.config, task.model, optimizer, task.faults)


def rows_of(task, names, steps=None):
    rows = []
    steps = steps or task.config.steps
    for name in names:
        optimizer = optimizers.make(name, task.config)
        loop.train(
            first_state(task, optimizer),
            task,
            optimizer,
            iter(task.train),
            record=rows.append,
            save=lambda state, place: None,
            stop=lambda step: step == steps,
        )
    return rows


@jax.jit
def mean_loss(params, windows, graphdef):
    return training.loss_fn(params, windows, graphdef)


def faulty_gradient(task, params, step):
    """The gradient at `step` of a run that stays at `params`, with its fault."""
    fault_state = task.faults.init(params)
    fault_state = fault_state._replace(injection_step=jnp.int32(step - 1))
    batch = task.train.__iter__()
    for _ in range(step):
        windows = next(batch)

    @jax.jit
    def gradient(params, fault_state):
        _, clean = training.gradient_of_batch(params, windows, task.graphdef, 0.0)
        return task.faults.update(clean, fault_state, params)[0]

    return gradient(params, fault_state)


# ---------------------------------------------------------------------------- model


@nnx.jit
def logits_of(decoder, tokens):
    return decoder(tokens)


@pytest.fixture(scope="module")
def decoder():
    return model.Decoder(model.PRESETS["nano"], rngs=nnx.Rngs(0))


def parameter_count(shape):
    """By hand: attention, gated feed-forward, norms, embedding, head."""
    block = 4 * shape.width**2 + 3 * shape.width * shape.ffn_width + 2 * shape.width
    tables = (1 + shape.untied_head) * shape.vocabulary * shape.width
    return shape.layers * block + tables + shape.width


def abstract_model(shape):
    decoder = nnx.eval_shape(lambda: model.Decoder(shape, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(decoder))


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("preset", model.PRESETS)
def test_model_has_the_parameters_of_its_shape(preset, untied):
    shape = dataclasses.replace(model.PRESETS[preset], untied_head=untied)
    leaves = jax.tree.leaves(abstract_model(shape))
    assert sum(leaf.size for leaf in leaves) == parameter_count(shape)
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize(
    ("preset", "millions"), [("9m", 9), ("60m", 58), ("130m", 134), ("350m", 368)]
)
def test_published_shapes_have_their_size(preset, millions):
    """With a head of their own, as LLaMA has it."""
    untied = config.complete({"preset": preset}).untied_head
    shape = dataclasses.replace(model.PRESETS[preset], untied_head=untied)
    assert round(parameter_count(shape) / 1e6) == millions


def test_half_precision_keeps_parameters_in_float32():
    shape = dataclasses.replace(model.PRESETS["nano"], compute_dtype="bfloat16")
    leaves = jax.tree.leaves(abstract_model(shape))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)


@pytest.mark.parametrize("embedding", config.EMBEDDINGS)
@pytest.mark.parametrize("dtype", config.COMPUTE_DTYPES)
def test_stream_leaves_a_large_embedding_large(embedding, dtype):
    """Condition 2 of Spike No More: a deviation of 0.63 (scaled) or 1 (normed)."""
    shape = dataclasses.replace(
        model.PRESETS["nano"],
        embedding=embedding,
        initialization="stable",
        compute_dtype=dtype,
    )
    embed = model.Decoder(shape, rngs=nnx.Rngs(0)).embed
    expected = {"plain": (0.4 / 32) ** 0.5, "scaled": 0.4**0.5, "normed": 1.0}
    x = embed(jnp.arange(256))
    assert x.dtype == dtype
    assert x.astype(jnp.float32).std() == pytest.approx(expected[embedding], rel=0.05)


def test_stable_initialization_makes_small_sublayers():
    shape = dataclasses.replace(model.PRESETS["tiny"], initialization="stable")
    blocks = nnx.state(model.Decoder(shape, rngs=nnx.Rngs(0)).blocks)
    std = (2 / (5 * shape.width)) ** 0.5
    residual = std / (2 * shape.layers) ** 0.5
    for part, name, expected in (
        ("attention", "query", std),
        ("ffn", "gate", std),
        ("attention", "out", residual),
        ("ffn", "down", residual),
    ):
        kernel = blocks[part][name]["kernel"][...]
        assert kernel.std() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_rematerialization_does_not_change_the_gradient(params, task, remat):
    shape = dataclasses.replace(task.model, remat=remat)
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: model.Decoder(shape, rngs=nnx.Rngs(0)))
    )
    windows = next(iter(task.train))[0]
    gradient = jax.jit(jax.grad(training.loss_fn), static_argnums=2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        gradient(params, windows, graphdef),
        gradient(params, windows, task.graphdef),
    )


def test_loss_at_initialization_is_that_of_a_uniform_guess(task, params):
    loss = training.evaluate(params, task.validation, graphdef=task.graphdef)
    assert loss == pytest.approx(math.log(256), rel=0.03)


def test_model_is_causal(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % 256)
    logits, other = logits_of(decoder, tokens), logits_of(decoder, changed)
    np.testing.assert_array_equal(logits[:, :7], other[:, :7])
    assert (np.abs(logits[:, 7:] - other[:, 7:]).max(axis=-1) > 0).all()


def test_model_sees_the_order_of_earlier_tokens(decoder):
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    swapped = tokens.at[:, 2].set(tokens[:, 3]).at[:, 3].set(tokens[:, 2])
    last, other = (logits_of(decoder, t)[:, -1] for t in (tokens, swapped))
    assert np.abs(last - other).max() > 1e-6


def test_layers_are_drawn_independently_and_all_used(task, params):
    gradients = faulty_gradient(task, params, 1)
    layers = model.PRESETS["nano"].layers
    for leaf in jax.tree.leaves(gradients["blocks"]):
        assert len(leaf) == layers
        assert (np.abs(leaf).reshape(layers, -1).max(axis=1) > 0).all()
    kernel = params["blocks"]["ffn"]["up"]["kernel"]
    assert not np.array_equal(kernel[0], kernel[1])


def test_scan_unrolling_does_not_change_the_model(decoder):
    config = dataclasses.replace(model.PRESETS["nano"], scan_unroll=2)
    unrolled = model.Decoder(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 256)
    np.testing.assert_allclose(
        logits_of(decoder, tokens), logits_of(unrolled, tokens), atol=1e-5
    )


rotate = jax.jit(model.rotate)


def test_rotary_product_depends_on_the_distance_only():
    tokens = 10
    query, key = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    queries, keys = (
        np.asarray(rotate(np.tile(x, (1, tokens, 1, 1)), 100.0))[0, :, 0]
        for x in (query, key)
    )
    products = queries @ keys.T
    for distance in range(tokens):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert len({round(float(x), 4) for x in products[0]}) == tokens


def test_rotation_keeps_norms_and_the_first_position():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
    rotated = np.asarray(rotate(x, 10_000.0))
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])
    np.testing.assert_allclose(
        np.linalg.norm(rotated, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )


def test_flat_dot_general_is_the_product():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 5))
    dimensions = (((2,), (0,)), ((), ()))
    np.testing.assert_allclose(
        model.flat_dot_general(x, kernel, dimensions), x @ kernel, rtol=1e-5
    )
    with pytest.raises(ValueError, match="last axis"):
        model.flat_dot_general(x, kernel, (((1,), (0,)), ((), ())))


# --------------------------------------------------------------------------- corpus


def test_split_is_contiguous_and_without_overlap():
    text = bytes(range(200)) * 5
    train, validation = corpus.split(text)
    assert len(validation) == 100
    assert train.tobytes() + validation.tobytes() == text


def test_windows_cover_every_target_once():
    tokens = np.arange(100, dtype=np.uint8)
    windows = corpus.Windows(tokens, 7)
    assert len(windows) == 14
    targets = np.concatenate([windows[i][1:] for i in range(len(windows))])
    np.testing.assert_array_equal(targets, np.arange(1, 99))


def test_batches_are_a_function_of_seed_and_step():
    tokens = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8)
    first = corpus.batches(tokens, 16, 4, seed=3)
    second = corpus.batches(tokens, 16, 4, seed=3)
    in_order = [first[n] for n in range(200)]
    for n in (150, 3, 70):  # no order of access matters
        np.testing.assert_array_equal(second[n], in_order[n])
    other = corpus.batches(tokens, 16, 4, seed=4)
    assert not np.array_equal(other[0], first[0])
    assert first[0].shape == (4, 17)
    assert first[0].dtype == np.uint8


def test_an_epoch_holds_every_window_once_and_epochs_differ():
    tokens = np.arange(161, dtype=np.uint8)  # ten windows, named by their first byte
    data = corpus.batches(tokens, 16, 5, seed=0)
    epochs = [[*data[2 * n][:, 0], *data[2 * n + 1][:, 0]] for n in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 160, 16))
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_evaluation_batches_are_spread_and_bounded():
    tokens = np.arange(241, dtype=np.uint8)
    stack = corpus.evaluation_batches(tokens, 8, batch_size=4, limit=10)
    assert stack.shape == (2, 4, 9)
    starts = stack[:, :, 0].reshape(-1)
    assert starts[0] == 0 and starts[-1] == 232
    assert len(set(starts)) == 8
    assert corpus.evaluation_batches(tokens, 100, 4, 10).shape == (1, 2, 101)


# -------------------------------------------------------------------- training steps


def test_optimizers_meet_identical_parameters_batches_and_faults(rows):
    """Up to the first fault nothing but the optimizer differs, and then it does not."""
    first = [row for row in rows if row["step"] == 1]
    assert len(first) == len(DEMONSTRATION)
    for name in ("loss", "grad_norm", "learning_rate"):
        assert len({row[name] for row in first}) == 1


def test_fault_is_a_thousand_times_the_gradient(task, params):
    first_fault = task.config.fault_steps[0]
    clean = faulty_gradient(task, params, first_fault - 1)
    faulty = faulty_gradient(task, params, first_fault)
    assert optax.tree.norm(faulty) > 500 * optax.tree.norm(clean)


@pytest.mark.parametrize(
    "name",
    [
        name if name in VARIED else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_every_optimizer_trains(task, name):
    clean = dataclasses.replace(task.config, bursts=0)
    task = task._replace(config=clean, faults=training.make_faults(clean))
    steps = [row for row in rows_of(task, [name], 4) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert all(row["update_norm"] > 0 for row in steps[1:])
    assert steps[0]["loss"] == pytest.approx(math.log(256), rel=0.05)
    tensors = len(training.tensor_names(task))
    for values in steps[-1]["tensors"].values():
        assert len(values) == tensors


def test_sparse_momentum_is_for_attention_and_feed_forward_matrices(task):
    transform = optimizers.make("sparse_spam", task.config).transform
    params = training.abstract_params(task)
    state = jax.eval_shape(transform.init, params)
    sizes = zip(
        training.tensor_names(task),
        jax.tree.leaves(optax.tree.get(state, "mu")),
        jax.tree.leaves(params),
        strict=True,
    )
    for name, moment, parameter in sizes:
        matrix = re.search(r"(query|key|value|out|gate|up|down)/kernel$", name)
        assert moment.size == parameter.size // (4 if matrix else 1), name


def test_adam_mini_has_one_second_moment_a_head_row_or_column(task):
    transform = optimizers.make("adam_mini", task.config).transform
    state = jax.eval_shape(transform.init, training.abstract_params(task))
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


def test_global_norms_are_those_of_the_tensors(rows):
    for row in records.steps_of(rows, "clip_spam"):
        for name in ("grad_norm", "clipped_grad_norm", "update_norm", "param_norm"):
            total = math.sqrt(sum(norm**2 for norm in row["tensors"][name]))
            assert row[name] == pytest.approx(total, rel=1e-5)


def test_accumulation_does_not_change_the_gradient(task, params):
    batch = next(iter(task.train))
    whole = training.gradient_of_batch(params, batch, task.graphdef, 1e-3)
    parts = training.gradient_of_batch(
        params, batch.reshape(2, 2, -1), task.graphdef, 1e-3
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        whole,
        parts,
    )


def test_z_loss_is_in_the_gradient_and_not_in_the_loss(task, params):
    batch = next(iter(task.train))

    def penalty(params):
        _, log_z = training.token_losses(params, batch[0], task.graphdef)
        return jnp.mean(log_z**2)

    loss, plain = training.gradient_of_batch(params, batch, task.graphdef, 0.0)
    same, gradient = training.gradient_of_batch(params, batch, task.graphdef, 0.1)
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
    losses, _ = training.token_losses(params, windows, task.graphdef)
    np.testing.assert_allclose(losses, reference, rtol=1e-5, atol=1e-6)


def test_gradient_norm_after_clipping_is_what_entered_the_moments(rows):
    steps = {name: records.steps_of(rows, name) for name in DEMONSTRATION}
    for row in steps["adam"]:
        assert row["clipped_grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
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
        analysis.column(records.steps_of(rows, name), "learning_rate")
        for name in ("adam", "clip_spam")
    ]
    np.testing.assert_array_equal(*rates)
    assert rates[0].max() == pytest.approx(4e-3)
    assert rates[0].argmax() == 2  # a tenth of 24 steps
    assert rates[0][-1] < 0.15 * 4e-3


def test_fault_steps_are_four_bursts_of_three():
    config = RunConfig(steps=500)
    assert config.burst_starts == (100, 200, 300, 400)
    assert len(config.fault_steps) == 12
    assert RunConfig(bursts=0).fault_steps == ()
    assert set(RunConfig(steps=3).fault_steps) <= {1, 2, 3}


@pytest.mark.parametrize("steps", [1, 2, 5, 30, 500, 100_000])
def test_every_length_of_run_gives_valid_optimizers(steps):
    config = RunConfig(steps=steps)
    for name in OPTIMIZERS:
        optimizers.make(name, config)
    assert (
        config.spam_intervals["grace_steps"] < config.spam_intervals["reset_interval"]
    )


# -------------------------------------------------------------------------- records


class FakeWandb(types.ModuleType):
    """What the trainer uses of the package."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **kwargs):
        self.runs.append(kwargs)
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_numbers_if_installed(tmp_path, monkeypatch, capsys):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = ["--optimizer=adam", "--steps=10", "--no-spikes", "--wandb=spikes"]
    assert pretrain.main([*SMALL_FLAGS, *flags, f"--output={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    (run,) = wandb.runs
    assert (run["project"], run["id"]) == ("spikes", "run-adam")
    assert run["config"]["learning_rate"] == 4e-3
    assert [step for step, _ in wandb.logged] == [*range(1, 11), 10]
    assert wandb.logged[0][1].keys() >= {"loss", "grad_norm", "update_norm"}
    names = json.loads((tmp_path / "run" / "tensors.json").read_text())
    assert wandb.logged[9][1].keys() >= {f"grad_norm/{name}" for name in names}
    assert wandb.logged[10][1].keys() == {"eval_loss", "eval_perplexity"}
    assert wandb.finished == 1


def test_numbers_that_are_not_finite_are_left_out():
    row = {"optimizer": "adam", "step": 10, "loss": math.nan, "fault": False}
    row["tensors"] = {"grad_norm": [1.0, math.inf]}
    assert records.scalars(row, ["a", "b"]) == {"grad_norm/a": 1.0}


# ------------------------------------------------------------------------- analysis


def test_running_median_and_spikes():
    norms = np.array([1.0, 1.0, 11.0, np.nan, 1.0, 10.0])
    np.testing.assert_array_equal(
        analysis.running_median(norms), [np.nan, 1.0, 1.0, 1.0, 1.0, 1.0]
    )
    # 11 > 10 x 1, and the NaN; 10 is not.
    assert analysis.find_spikes(norms).nonzero()[0].tolist() == [2, 3]


def test_worst_loss_jump_looks_40_steps_ahead_and_20_back():
    losses = np.full(200, 2.0)
    losses[:79] = 9.0  # more than 20 steps before the burst at step 100
    losses[99] = 7.0  # the burst's own step: its loss is from before the update
    losses[139] = 2.5  # step 140, the last that counts
    losses[140] = 8.0
    assert analysis.worst_loss_jump(losses, (100,)) == pytest.approx(0.5)
    assert analysis.worst_loss_jump(losses, (100, 120)) == pytest.approx(8 - 2.25)
    assert analysis.worst_loss_jump(losses, ()) is None
    losses[110] = np.nan
    assert math.isnan(analysis.worst_loss_jump(losses, (100,)))


# ------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the program in a process of its own."""
    with Trainer(tmp_path_factory.mktemp("cache")) as trainer:
        yield trainer.start


def read_lines(path):
    """The rows, read without the program's own reader."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def final_state(folder, name):
    """The arrays of an optimizer's last checkpoint, without knowing their structure."""
    steps = (folder / "checkpoints" / name).iterdir()
    assert {step.name for step in steps} == {"56", "60"}
    with ocp.StandardCheckpointer() as checkpointer:
        path = folder / "checkpoints" / name / "60" / "state"
        return checkpointer.restore(path.resolve())


@pytest.fixture(scope="module")
def finished_run(start, tmp_path_factory):
    """Two optimizers in a process of their own, from an empty folder."""
    folder = tmp_path_factory.mktemp("finished")
    process = start(*SMALL_FLAGS, *PAIR, "--output=run", cwd=folder)
    code, output, errors = finish(process)
    assert code == 0, errors
    return folder / "run", output, errors


def test_run_leaves_its_files_and_no_warnings(finished_run):
    folder, output, errors = finished_run
    assert errors == ""
    assert "Warning" not in output
    assert "final" in output and "spam" in output and output.endswith("are in run\n")
    assert all(len(line) <= 120 for line in output.splitlines())
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "report.html",
        "spike_suppression.png",
        "summary.json",
        "tensorboard",
        "tensors.json",
    }
    for name in ("adam", "spam"):
        (events,) = (folder / "tensorboard" / name).iterdir()
        assert events.name.startswith("events.out.tfevents")
        assert events.stat().st_size > 60 * 100


def test_metrics_have_a_line_a_step_and_an_evaluation(finished_run):
    folder, _, _ = finished_run
    rows = read_lines(folder / "metrics.jsonl")
    fault_steps = {12, 13, 14, 24, 25, 26, 36, 37, 38, 48, 49, 50}
    for name in ("adam", "spam"):
        own = [row for row in rows if row["optimizer"] == name]
        steps = [row for row in own if "loss" in row]
        evaluations = [row for row in own if "eval_loss" in row]
        assert [row["step"] for row in steps] == list(range(1, 61))
        assert all(set(row) == STEP_KEYS for row in steps)
        assert {row["step"] for row in steps if row["fault"]} == fault_steps
        assert [row["step"] for row in evaluations] == [20, 40, 60]
    assert [row["optimizer"] for row in rows] == ["adam"] * 63 + ["spam"] * 63


def test_summary_follows_from_the_metrics(finished_run):
    folder, _, _ = finished_run
    rows = read_lines(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"adam", "spam"}
    for name, values in summary.items():
        assert set(values) == SUMMARY_KEYS
        steps = {
            row["step"]: row
            for row in rows
            if row["optimizer"] == name and "loss" in row
        }
        (final,) = [
            row["eval_loss"]
            for row in rows
            if row["optimizer"] == name and row["step"] == 60 and "eval_loss" in row
        ]
        jumps = []
        for fault in (12, 24, 36, 48):
            before = [steps[s]["loss"] for s in steps if fault - 20 <= s < fault]
            after = [steps[s]["loss"] for s in steps if fault < s <= fault + 40]
            jumps.append(max(after) - statistics.fmean(before))
        norms = {step: row["grad_norm"] for step, row in steps.items()}
        usual = {
            step: statistics.median(norms[s] for s in norms if step - 100 <= s < step)
            for step in norms
            if step > 1
        }
        faults = [step for step, row in steps.items() if row["fault"]]
        assert values["final_eval_loss"] == final
        assert values["worst_loss_jump"] == pytest.approx(max(jumps))
        assert values["spikes_seen"] == sum(norms[s] > 10 * usual[s] for s in usual)
        assert values["spikes_seen"] >= 12
        assert values["spikes_clipped"] == sum(
            row["spikes_clipped"] for row in steps.values()
        )
        assert values["worst_burst"] == pytest.approx(
            max(steps[s]["clipped_grad_norm"] / usual[s] for s in faults)
        )
        assert values["tokens_per_second"] == pytest.approx(
            statistics.median(
                row["tokens_per_second"]
                for row in steps.values()
                if row["tokens_per_second"] is not None
            )
        )
    assert summary["adam"]["spikes_clipped"] == 0
    assert summary["spam"]["spikes_clipped"] > 0


def test_picture_is_a_picture(finished_run):
    folder, _, _ = finished_run
    data = (folder / "spike_suppression.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert 1000 <= width <= 3000 and 800 <= height <= 3000
    assert len(data) > 30_000


def test_killed_run_resumes_bit_for_bit(finished_run, start, tmp_path):
    whole, _, _ = finished_run
    folder = tmp_path / "run"
    process = start(*SMALL_FLAGS, *PAIR, "--output=run", cwd=tmp_path)
    wait_for_rows(process, folder / "metrics.jsonl", 63 + 20)  # of spam
    process.kill()
    finish(process)
    assert len(records.read(folder / "metrics.jsonl")) < 2 * 63

    process = start("--resume", "--output=run", cwd=tmp_path)
    wait_for_rows(process, folder / "metrics.jsonl", 63 + 30)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process)
    assert code == 130
    assert errors.splitlines() == [CONTINUE]
    rows = records.read(folder / "metrics.jsonl")
    assert 63 + 30 <= len(rows) < 2 * 63
    assert set(json.loads((folder / "summary.json").read_text())) == {"adam"}

    process = start("--resume", *SMALL_FLAGS, "--output=run", cwd=tmp_path)
    code, _, errors = finish(process)
    assert (code, errors) == (0, "")
    assert without_timing(records.read(folder / "metrics.jsonl")) == without_timing(
        records.read(whole / "metrics.jsonl")
    )
    summary, expected = (
        json.loads((path / "summary.json").read_text()) for path in (folder, whole)
    )
    assert without_timing(summary.values()) == without_timing(expected.values())
    for name in ("adam", "spam"):
        jax.tree.map(
            np.testing.assert_array_equal,
            final_state(folder, name),
            final_state(whole, name),
        )


def test_nonfinite_step_halts_its_optimizer_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--steps=12", "--spike-kind=nan", "--spike-rate=0.01", "--output=run"]
    assert pretrain.main([*SMALL_FLAGS, *PAIR, *flags]) == 1
    captured = capsys.readouterr()
    summary = json.loads(pathlib.Path("run/summary.json").read_text())
    assert summary["adam"]["halted_at"] == 2  # of the first burst
    assert summary["adam"]["final_eval_loss"] is None
    assert summary["spam"]["halted_at"] is None
    assert summary["spam"]["final_eval_loss"] < 5.6
    assert "NaN" not in pathlib.Path("run/metrics.jsonl").read_text()
    assert pathlib.Path("run/spike_suppression.png").stat().st_size > 30_000
    (line,) = captured.err.splitlines()
    for words in ("adam", "update of step 2", "not finite", "step 1 is kept", "Try"):
        assert words in line
    assert [path.name for path in pathlib.Path("run/checkpoints/adam").iterdir()] == [
        "1"
    ]


def test_run_without_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--optimizer=spam", "--steps=3", "--no-spikes"]
    assert pretrain.main([*SMALL_FLAGS, *flags]) == 0
    (folder,) = pathlib.Path("runs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["spam"]["worst_loss_jump"] is None
    assert summary["spam"]["worst_burst"] is None
    assert "No faults" in capsys.readouterr().out


def test_interrupt_before_the_first_step_ends_at_once(
    task, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def make_task(*_):
        signal.raise_signal(signal.SIGINT)
        return task, types.SimpleNamespace(digest="digest", files="1 file", left_out={})

    monkeypatch.setattr(pretrain, "make_task", make_task)
    assert pretrain.main([*SMALL_FLAGS, "--output=run"]) == 130
    assert json.loads(pathlib.Path("run/summary.json").read_text()) == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    capsys.readouterr()


# ------------------------------------------------------------------ mistakes, help


def refused(capsys, *flags, announced=False):
    """The one line with which the program refuses `flags`.

    Before it has said what it is going to train, unless `announced`.
    """
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(list(flags))
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert bool(captured.out) == announced
    assert captured.err.startswith("pretrain.py: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data=nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--data=empty"], ["empty"]),
        (["--data=hf:"], ["hf: must name a data set"]),
        ([f"--data={'x' * 300}"], ["data file xxx", "name too long"]),
        ([f"--tokenizer={'x' * 300}"], ["cannot load the tokenizer xxx"]),
        (["--output=\udcff"], ["udcff", "must be UTF-8"]),
        (["--data=empty.txt"], ["empty.txt", "is empty"]),
        (["--data=short.txt"], ["train", "90 bytes", "101"]),
        (["--data=medium.txt"], ["validation", "50 bytes", "101"]),
        (["--output=file.txt/run"], ["output folder", "file.txt"]),
        (["--output=file.txt"], ["output folder", "file.txt"]),
        ([f"--output={'x' * 300}"], ["output folder", "name too long"]),
        (["--preset=huge"], ["--preset", "huge", "tiny"]),
        (["--data=*.md"], ["*.md"]),
        (["--data=hf:no/such-data"], ["no/such-data"]),
        (["--tokenizer=nobody/nothing"], ["nobody/nothing"]),
        (["--accumulate=5"], ["--accumulate", "--batch-size", "12"]),
        (["--embedding=odd"], ["--embedding", "odd", "scaled"]),
        (["--remat=some"], ["--remat", "some", "full"]),
        (["--density=0", "--optimizer=sparse_spam"], ["--density", "> 0"]),
        (["--density=1.5"], ["--density", "<= 1"]),
        (["--z-loss=-1"], ["--z-loss", ">= 0"]),
        (["--fsdp=0"], ["--fsdp", ">= 1"]),
        (["--fsdp=64"], ["1 x 64 x 1", "64 devices"]),
        (["--tensor=9"], ["9 devices"]),
        (["--data-parallel=5"], ["5 x 1 x 1", "12 sequences"]),
        (["--coordinator=localhost:1"], ["--num-processes", "together"]),
        (["--distributed"], ["--output"]),
        (
            [
                *("--coordinator=localhost:1", "--num-processes=2", "--process-id=2"),
                "--output=x",
            ],
            ["--process-id", "below", "2"],
        ),
        (["--compile-only"], ["--target", "tpu:v5e:4x4"]),
        (["--compile-only", "--target=cpu:1"], ["tpu:v5e:4x4", "cpu:1"]),
        (["--compile-only", "--target=tpu:v5e:0x2"], ["tpu:v5e:0x2", ">= 1"]),
        (["--target=tpu:v5e:4x4"], ["--target", "--compile-only"]),
        (
            ["--compile-only", "--target=tpu:v5e:4x4", "--accumulate=5"],
            ["--accumulate", "--batch-size", "12"],
        ),
        (["--output="], ["--output", "the name of a folder"]),
        (["--wandb=project"], ["--wandb", "pip install wandb"]),
        (["--optimizer=sgd"], ["--optimizer", "sgd", "clip_spam"]),
        (["--optimizer"], ["--optimizer", "at least one"]),
        (["--steps=0"], ["--steps", ">= 1", "'0'"]),
        (["--steps=many"], ["--steps", "'many'"]),
        (["--steps=1.5"], ["--steps", "'1.5'"]),
        (["--learning-rate=0"], ["--learning-rate", "> 0", "'0'"]),
        (["--learning-rate=nan"], ["--learning-rate", "'nan'"]),
        (["--learning-rate=inf"], ["--learning-rate", "'inf'"]),
        (["--batch-size=-1"], ["--batch-size", "'-1'"]),
        (["--sequence-length=0"], ["--sequence-length", "'0'"]),
        (["--seed=-1"], ["--seed", ">= 0"]),
        (["--bursts=-1"], ["--bursts", ">= 0"]),
        (["--spike-rate=1.5"], ["--spike-rate", "<= 1", "'1.5'"]),
        (["--spike-factor=x"], ["--spike-factor", "'x'"]),
        (["--spike-kind=odd"], ["--spike-kind", "noise"]),
        (["--threshold=0"], ["--threshold", "> 0"]),
        (["--reset-interval=1"], ["--reset-interval", ">= 2"]),
        (["--eval-every=0"], ["--eval-every", ">= 1"]),
        (["--checkpoint-every=0"], ["--checkpoint-every", ">= 1"]),
        (["--no-such-flag"], ["unrecognized", "--no-such-flag"]),
        (["--resume"], ["--resume needs --output"]),
        (["--resume", "--output=nowhere"], ["no run to resume", "nowhere"]),
        (["--resume", "--output=damaged"], ["damaged", "config.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_line_and_exit_code_2(
    flags, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty.txt").touch()
    pathlib.Path("short.txt").write_text("x" * 100)
    pathlib.Path("medium.txt").write_text("x" * 500)
    pathlib.Path("file.txt").write_text("")
    pathlib.Path("damaged").mkdir()
    pathlib.Path("empty").mkdir()
    pathlib.Path("damaged/config.json").write_text("{")
    line = refused(capsys, "--sequence-length=100", *flags)
    for word in words:
        assert word in line
    assert not pathlib.Path("runs").exists()


def test_mistake_in_a_process_of_its_own(start, tmp_path):
    code, output, errors = finish(start("--data=nowhere.txt", cwd=tmp_path))
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors and "usage" not in errors


def test_run_is_not_overwritten(finished_run, capsys):
    folder, _, _ = finished_run
    before = (folder / "config.json").read_text()
    line = refused(capsys, f"--output={folder}")
    assert "--resume" in line and "another folder" in line
    assert (folder / "config.json").read_text() == before


def test_resume_refuses_other_settings(finished_run, tmp_path, capsys):
    folder, _, _ = finished_run
    line = refused(capsys, "--resume", f"--output={folder}", "--learning-rate=1e-3")
    assert "learning_rate = 0.001" in line and "0.004" in line
    line = refused(capsys, "--resume", f"--output={folder}", "--optimizer=spam")
    assert "adam spam" in line


def test_resume_refuses_a_changed_text(tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_text("To be, or not to be. " * 100)
    folder = run_folder.RunFolder(tmp_path / "run")
    config = RunConfig(data=str(book))
    folder.create(Run(config, None, "another digest"))
    book.write_text("that is the question. " * 100)
    assert "has changed" in refused(capsys, "--resume", f"--output={folder.path}")


def test_help_mentions_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as exit_:
        pretrain.main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    parser, _ = pretrain.parse([])
    for action in parser._actions:
        assert any(flag in text for flag in action.option_strings)
    for default in ("0.004", "5000.0", "1000.0", "noise", "tiny", "400"):
        assert f"(default: {default})" in " ".join(text.split())
    assert "examples:" in text
    assert max(map(len, text.splitlines())) <= 88


def damage(path, how):
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = {
        "a line of garbage": [*lines[:3], b"\xff{\n", *lines[4:]],
        "a row without a step": [*lines[:3], b'{"loss": 1.0}\n', *lines[4:]],
        "the last evaluation cut": [*lines[:-1], lines[-1][:-20]],
        "a step missing": [*lines[:4], *lines[5:]],
        "no file": None,
    }[how]
    path.unlink()
    if damaged is not None:
        path.write_bytes(b"".join(damaged))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("a line of garbage", ["metrics.jsonl, line 4, is damaged"]),
        ("a row without a step", ["metrics.jsonl, line 4, is damaged"]),
        ("a step missing", ["4 steps", "of adam", "another folder"]),
        ("no file", ["0 steps", "of adam", "another folder"]),
    ],
)
def test_resume_refuses_damaged_metrics(finished_run, tmp_path, capsys, how, words):
    """A run whose records are gone must not say that it was interrupted for ever."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    damage(folder / "metrics.jsonl", how)
    line = refused(capsys, "--resume", f"--output={folder}", announced=True)
    for word in words:
        assert word in line


def test_resume_without_its_checkpoints_keeps_the_records(
    finished_run, tmp_path, capsys
):
    """A mistyped --checkpoints must not begin the run again, over its metrics."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    before = (folder / "metrics.jsonl").read_bytes()
    flags = "--resume", f"--output={folder}", f"--checkpoints={tmp_path / 'nowhere'}"
    line = refused(capsys, *flags, announced=True)
    for words in ("nowhere/adam", "60 steps of adam", "--checkpoints", "--output"):
        assert words in line
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_resume_goes_back_to_the_records_it_has(finished_run, tmp_path, capsys):
    """Where they lag behind the checkpoints, as after a loss of power."""
    folder = shutil.copytree(finished_run[0], tmp_path / "copy")
    damage(folder / "metrics.jsonl", "the last evaluation cut")
    assert pretrain.main(["--resume", f"--output={folder}", "--data-parallel=1"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "59 steps of spam" in line and "step 60" in line
    whole = records.read(finished_run[0] / "metrics.jsonl")
    assert without_timing(records.read(folder / "metrics.jsonl")) == without_timing(
        whole
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "six"),
        ("preset", "giant"),
        ("optimizers", ["sgd"]),
        ("seed", True),
        ("seed", 2**40),
        ("untied_head", 1),
        ("batch_size", 0),
        ("eval_every", 0),
        ("learning_rate", float("nan")),
        ("density", 7.0),
        ("data", 5),
        ("optimizers", []),
        ("data_digest", None),
    ],
)
def test_resume_refuses_a_damaged_configuration(
    finished_run, tmp_path, capsys, name, value
):
    config = json.loads((finished_run[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    assert "is damaged" in refused(capsys, "--resume", f"--output={tmp_path}")


def test_an_output_that_vanishes_is_told(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def train_all(*_):
        shutil.rmtree(folder)
        return []

    monkeypatch.setattr(pretrain, "train_all", train_all)
    assert pretrain.main(["--preset=nano", f"--output={folder}"]) == 1
    line = f"pretrain.py: what the run wrote is no longer in {folder}\n"
    assert capsys.readouterr().err == line


def test_steps_must_fit_an_int32(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "<= 2147483647" in refused(capsys, "--steps=99999999999")
