"""Training of any task under an optimizer, with a line that is fitted to points."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from studies import engine, task
from studies.comparison import report, statistics
from trainer.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Options:
    slope: float = 3.0


class Line(task.Task):
    def __init__(self, options):
        self.slope = options.slope

    def inputs(self, run):
        rng = np.random.default_rng(run.config.seed)
        x = rng.normal(size=(run.config.steps, 8)).astype(np.float32)
        return np.stack([x, self.slope * x + 1], axis=1), np.float32(self.slope)

    def init(self, seed):
        return {"slope": jnp.zeros([]), "offset": jnp.zeros([])}

    def start(self, params, seed):
        return jnp.int32(0)

    def loss(self, params, batch):
        x, y = batch
        return jnp.mean((params["slope"] * x + params["offset"] - y) ** 2)

    def gradient(self, params, state, batch):
        return *super().gradient(params, state, batch)[:2], state + 1, {}

    def curves(self, state):
        return {"numbers": state}

    def evaluate(self, params, test):
        return (params["slope"] - test) ** 2


class Lines(task.TaskStudy):
    def task(self, run):
        return Line(self.options)


BASE = RunConfig(steps=60, batch_size=8, bursts=2)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Records of one optimizer, two scenarios, two rates and two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    study = Lines(Options())
    runs = task.grid(BASE, ["adam"], ["clean", "nan"], [0.01, 0.3], [0, 1])
    runs = [
        run._replace(config=dataclasses.replace(run.config, spike_kind="nan"))
        for run in runs
    ]
    assert engine.run_all(study, runs, folder) == []
    return engine.read_all(study, runs, folder)


def test_a_task_is_trained_at_every_rate(records):
    clean, nan = statistics.results(records)
    assert (clean.scenario, clean.best_rate) == ("clean", 0.3)
    assert clean.final_loss < 0.01 < np.mean(clean.curve[0.01])
    assert clean.seeds == 2 and clean.bytes_per_parameter == (2 * 2 * 4 + 8) / 2
    assert nan.diverged == nan.runs == 4
    assert "### clean\n\n|" in report.markdown("a line", [clean, nan], [])


def test_seeds_and_scenarios_differ(records):
    losses = {
        (r["scenario"], r["learning_rate"], r["seed"]): r["losses"] for r in records
    }
    assert losses["clean", 0.3, 0] != losses["clean", 0.3, 1]
    first = min(BASE.fault_steps)
    assert losses["clean", 0.3, 0][:first] == losses["nan", 0.3, 0][:first]
    assert losses["nan", 0.3, 0][first:] == [None] * (BASE.steps - first)


def test_a_model_whose_first_loss_is_not_finite_is_not_trained():
    """Its loss could not be compared with that before training."""
    (run,) = task.grid(BASE, ["adam"], ["clean"], [0.1], [0])
    broken = task.Program(Line(Options(slope=float("nan"))), run)
    with pytest.raises(FloatingPointError, match="before training is not finite"):
        broken(run, lambda fraction: None)


def test_the_state_of_a_task_goes_from_step_to_step():
    (run,) = task.grid(BASE, ["adam"], ["clean"], [0.1], [0])
    record = task.Program(Line(Options()), run)(run, lambda fraction: None)
    assert record["numbers"] == list(range(1, BASE.steps + 1))


def test_resets_come_after_a_third_of_the_run():
    adam, spam = task.grid(BASE, ["adam", "spam"], ["clean"], [0.1], [0])
    assert (adam.config.reset_interval, spam.config.reset_interval) == (None, 20)


def test_the_options_of_a_task_decide_the_name_of_a_record():
    (run,) = task.grid(BASE, ["adam_clip"], ["severity 5"], [0.1], [3])
    names = {Lines(Options(slope)).name(run) for slope in (3.0, 4.0)}
    assert len(names) == 2
    assert all(name.startswith("adam_clip-severity_5-0.1-seed3-") for name in names)
