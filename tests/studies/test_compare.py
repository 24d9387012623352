"""The comparison: what a run computes, what the tables say, and the command."""

import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import compare
import pretrain
from studies.comparison import comparison, experiments, single_run
from studies.comparison.experiments import Spec
from trainer import files, loop, optimizers, sharding, train_step
from trainer.config import BURST_LENGTH, RunConfig
from trainer.data import text_files
from trainer.errors import UsageError

BASE = RunConfig.from_settings(
    preset="nano",
    steps=40,
    batch_size=4,
    sequence_length=16,
    eval_sequences=16,
    bursts=2,
)


def spec(label="adam", scenario="clean", **settings):
    config = dataclasses.replace(BASE, **(settings | experiments.faults(scenario)))
    return Spec(label, scenario, config)


@pytest.fixture(scope="module")
def spam():
    """A compiled program, shared by the tests that run it."""
    return single_run.Program(spec("clip_spam"))


# ------------------------------------------------------------------------------ a run


def test_a_run_computes_what_the_trainer_does(spam):
    """With the same faults, losses and gradient norms step by step."""
    this = spec("clip_spam", "noise", learning_rate=8e-3, seed=3)
    record = spam(this)
    config = dataclasses.replace(this.config, optimizers=("clip_spam",))
    task, _ = pretrain.prepare(config, sharding.Parallelism(data=1))
    optimizer = optimizers.make("clip_spam", config)
    rows = []
    with jax.set_mesh(task.mesh):
        loop.train(
            train_step.initial_state(task, optimizer),
            task,
            optimizer,
            iter(task.train),
            record=rows.append,
            save=lambda state, place: None,
            stop=lambda step: False,
        )
    steps = [row for row in rows if "loss" in row]
    for name, ours in (("loss", "losses"), ("grad_norm", "gradient_norms")):
        theirs = [row[name] for row in steps]
        np.testing.assert_allclose(record[ours], theirs, rtol=2e-3)
    np.testing.assert_allclose(
        record["final_eval_loss"], rows[-1]["eval_loss"], rtol=1e-3
    )


def test_scenarios_differ_from_their_first_fault_on(spam):
    clean = spam(spec("clip_spam"))
    noise = spam(spec("clip_spam", "noise"))
    batches = spam(spec("clip_spam", "batches"))
    first = BASE.fault_steps[0]
    assert noise["losses"][:first] == clean["losses"][:first]
    assert noise["gradient_norms"] != clean["gradient_norms"]
    ratio = np.divide(noise["gradient_norms"], clean["gradient_norms"])
    assert ratio[first - 1] > 100
    assert batches["losses"][: first - 1] == clean["losses"][: first - 1]
    assert batches["losses"][first - 1] > clean["losses"][first - 1] + 0.1


def test_coordinate_spikes_hit_one_in_a_thousand():
    this = spec("adam", "coordinates")
    assert this.config.spike_rate == 1e-3
    assert this.config.spike_kind == "scale"
    assert this.program() != spec("adam", "noise").program()
    assert spec("adam", "clean").program() == spec("adam", "noise").program()


def test_a_record_has_its_text_and_what_it_cost(spam):
    record = spam(spec("clip_spam"))
    assert record["digest"] == text_files.text_digest(None)
    # mu and nu, the step and four counters.
    assert record["optimizer_bytes"] == 8 * record["parameters"] + 4 * 5 + 4
    assert record["seconds_per_step"] > 0
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(("size", "part"), [(15, "train"), (150, "validation")])
def test_a_text_shorter_than_a_sequence_is_a_mistake(size, part, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"." * size)
    with pytest.raises(UsageError, match=f"too short: its {part} part"):
        single_run.Program(spec(data=str(text)))


@pytest.mark.parametrize("steps", [40, 300])
def test_every_variant_of_every_experiment_can_be_made(steps):
    base = dataclasses.replace(experiments.BASE, steps=steps)
    for name in experiments.EXPERIMENTS:
        for this in experiments.specs(name, base, [0]):
            experiments.make(this.label, this.config, 1e-3)


def test_the_warm_up_keeps_its_share_of_the_interval(monkeypatch):
    def intervals(label, steps):
        made = []
        monkeypatch.setattr(
            optimizers,
            "spam",
            lambda config, rate, **given: made.append(config.spam_intervals | given),
        )
        experiments.make(label, dataclasses.replace(BASE, steps=steps), 1e-3)
        return tuple(made[0][x] for x in ("reset_interval", "warmup_steps"))

    assert intervals("spam, interval 0.13 of the run", 300) == (39, 12)
    assert intervals("spam, interval 0.67 of the run", 300) == (201, 60)
    assert intervals("spam, warm-up 0.9 of the interval", 300) == (75, round(0.9 * 75))
    assert intervals("spam: clip", 300)[0] is None


def test_faults_come_when_gradients_are_clipped(monkeypatch):
    """But for the row that is there to show the difference."""
    made = []
    monkeypatch.setattr(
        optimizers,
        "spam",
        lambda config, rate, **given: made.append(config.spam_intervals | given),
    )
    monkeypatch.setitem(optimizers.TABLE, "spam", experiments.spam_with())
    sweep = experiments.specs("sweeps", experiments.BASE, [0], rates=[1e-3])
    unclipped = []
    for this in sweep:
        experiments.make(this.label, this.config, 1e-3)
        steps = np.array(this.config.fault_steps) % made[-1]["reset_interval"]
        if min(steps) < made[-1]["grace_steps"]:
            unclipped.append(this.label)
    assert unclipped == ["spam, interval 0.25 of the run"]


# ------------------------------------------------------------------- files and grids


def test_a_new_setting_with_its_default_changes_no_file_name():
    this = spec()
    settings = this.settings()
    assert "optimizers" not in settings
    assert this.file_name() == spec(seed=0).file_name()
    assert this.file_name() != spec(seed=1).file_name()
    assert this.file_name() != spec(tokenizer="bpe:512").file_name()
    assert spec("spam, clip unseen").file_name().startswith("spam_clip_unseen-")


def test_a_record_of_other_settings_is_not_taken(tmp_path):
    this = spec()
    assert this.read(tmp_path, "digest") is None
    path = tmp_path / this.file_name()
    path.write_text(json.dumps({"settings": this.settings()}))
    assert this.read(tmp_path, "digest")
    path.write_text(json.dumps({"settings": this.settings() | {"preset": "tiny"}}))
    assert this.read(tmp_path, "digest") is None


def test_a_record_of_another_text_under_the_same_name_is_not_taken(tmp_path):
    """One from before records had a text's digest is."""
    text = tmp_path / "text.txt"
    this = spec(data=str(text))
    path = tmp_path / this.file_name()
    text.write_text("To be, or not to be")
    old = {"settings": this.settings()}
    new = old | {"digest": text_files.text_digest(str(text))}
    text.write_text("Not to be, or to be")
    digest = text_files.text_digest(str(text))
    for content, is_taken in (
        (old, True),
        (new, False),
        (new | {"digest": digest}, True),
    ):
        path.write_text(json.dumps(content))
        assert (this.read(tmp_path, digest) is not None) == is_taken


@pytest.mark.parametrize(
    "content",
    [b'{"settings": {"pre', b"\0\0\0", b"[]", b"{}"],
    ids=["cut short", "never written", "a list", "no settings"],
)
def test_a_damaged_record_is_told_in_one_line(content, tmp_path):
    (tmp_path / spec().file_name()).write_bytes(content)
    with pytest.raises(UsageError, match=r"\.json is damaged: remove it"):
        spec().read(tmp_path, "digest")


def test_a_line_with_runs_missing_is_no_line(tmp_path):
    specs = [
        spec(label, learning_rate=rate) for label in ("adam", "spam") for rate in (1, 2)
    ]
    for this in specs[:3]:
        text = json.dumps({"settings": this.settings()})
        (tmp_path / this.file_name()).write_text(text)
    records, unfinished = comparison.read(tmp_path, specs, "digest")
    assert [record["label"] for record in records] == ["adam", "adam"]
    assert unfinished == ["spam (clean; standard, plain): 1 of 2"]


def test_grids():
    specs = experiments.specs("main", experiments.BASE, range(3))
    assert len(specs) == len(set(specs)) == 15 * 5 * 3 * 2
    rates = {s.config.learning_rate for s in specs if s.label == "lion"}
    assert rates == {rate / 8 for rate in experiments.RATES}
    only = experiments.specs(
        "main",
        experiments.BASE,
        [0],
        labels=["lion"],
        scenarios=["noise"],
        rates=[1.0, 1.0],  # a run that is named twice is one
    )
    assert [(s.label, s.scenario, s.config.learning_rate) for s in only] == [
        ("lion", "noise", 1.0)
    ]
    models = {
        comparison.model_of(s.settings())
        for s in experiments.specs("initialization", experiments.BASE, [0])
    }
    assert len(models) == 5


# ------------------------------------------------------------------------- statistics


def record(rate=1e-3, seed=0, final=2.0, scenario="clean", **changes):
    return {
        **spec("spam", scenario, learning_rate=rate, seed=seed, steps=200).settings(),
        "first_eval_loss": 5.5,
        "final_eval_loss": final,
        "losses": [3.0] * 200,
        "gradient_norms": [1.0] * 200,
        "optimizer_bytes": 800,
        "parameters": 100,
        "seconds_per_step": 0.1,
    } | changes


def test_a_line_has_the_best_rate_and_the_sensitivity():
    """Diverged runs count with the loss of their initialization."""
    finals = {1e-3: (2.0, 2.2), 2e-3: (1.8, 1.9), 4e-3: (2.5, None), 8e-3: (None, 9.0)}
    records = [
        record(rate, seed, final)
        for rate, seeds in finals.items()
        for seed, final in enumerate(seeds)
    ]
    (line,) = comparison.lines(records)
    assert line.best_rate == 2e-3
    assert not line.is_at_edge
    np.testing.assert_allclose([line.final_loss, line.low, line.high], [1.85, 1.8, 1.9])
    assert line.far_loss == 5.5
    means = [2.1, 1.85, (2.5 + 5.5) / 2, 5.5]
    np.testing.assert_allclose(line.sensitivity, np.mean(means) - 1.85)
    assert (line.diverged, line.runs, line.seeds) == (3, 8, 2)
    assert line.bytes_per_parameter == 8.0
    assert line.worst_jump is None and line.recovery is None


def test_the_best_lines_come_first_and_an_edge_is_marked():
    records = [record(final=2.0), record(final=1.5, label="lion")]
    lines = comparison.lines(records)
    assert [line.label for line in lines] == ["lion", "spam"]
    experiment = experiments.EXPERIMENTS["main"]
    text = comparison.markdown("main", experiment, lines, ["adam (clean): 1 of 15"])
    assert "| lion | 0.001* | 1.500 |" in text
    assert "worst jump" not in text
    assert "LR sensitivity" not in text  # which one rate says nothing of
    assert "Runs that are not finished: adam (clean): 1 of 15." in text


def test_models_of_one_optimizer_share_a_panel():
    models = [{}, {"initialization": "stable"}]
    one = [record(**model) for model in models]
    two = [record(label=label, **model) for model in models for label in ("adam", "b")]
    for runs, panels, names in (
        (one, ["clean; spam"], ["stable, plain", "standard, plain"]),
        (two, ["clean; stable, plain", "clean; standard, plain"], ["adam", "b"]),
    ):
        figure = comparison.picture(comparison.lines(runs))
        assert [axis.get_title() for axis in figure.axes] == panels
        (legend,) = figure.legends
        assert sorted(text.get_text() for text in legend.get_texts()) == names


BURSTS = RunConfig.from_settings(steps=200, bursts=2).burst_starts


@pytest.mark.parametrize(
    ("after", "expected"),
    [(0, 0), (15, 15), (1000, np.inf)],
    ids=["at once", "after 15 steps", "never"],
)
def test_recovery(after, expected):
    """Losses of 3, which the second burst lifts by 1 for so many steps."""
    losses = np.full(200, 3.0)
    end = BURSTS[1] + 2
    losses[end : end + after] += 1
    this = record(scenario="noise", losses=list(losses))
    assert comparison.recovery_steps(this) == expected
    assert comparison.recovery_steps(this | {"scenario": "clean"}) is None


def test_a_recovery_that_nobody_could_see_is_not_one_of_no_steps():
    """Of 40 steps, three bursts leave at most 8 in a row."""
    this = record(scenario="noise", steps=40, bursts=3, losses=[3.0] * 40)
    assert comparison.recovery_steps(this) is None
    line = comparison.line([this])
    assert line.recovery is None and line.worst_jump == 0


def test_what_is_infinite_is_told_from_what_is_missing():
    """Losses that never come back, and one that is not finite."""
    losses = list(np.arange(200.0))
    losses[BURSTS[1] + 4] = None
    noise = record(scenario="noise", losses=losses)
    clean, noise = map(comparison.to_json, comparison.lines([record(), noise]))
    assert [clean["recovery"], clean["worst_jump"]] == [None, None]
    assert [noise["recovery"], noise["worst_jump"]] == ["inf", "inf"]
    json.dumps([clean, noise], allow_nan=False)


def test_spikes_and_jumps():
    losses = [3.0 + 0.01 * (i % 2) for i in range(200)]
    losses[BURSTS[1] + 4] = 7.0
    line = comparison.line([record(scenario="noise", losses=losses)])
    assert line.spike_score == 1.0  # one of the hundred steps judged
    np.testing.assert_allclose(line.worst_jump, 7 - 3.005)
    losses[-1] = None  # not finite
    assert comparison.spike_percent(record(losses=losses)) == 2.0


@pytest.mark.parametrize(("scenario", "jump"), [("noise", 4.0), ("batches", 0.5)])
def test_the_loss_of_a_corrupted_batch_is_not_the_models(scenario, jump):
    """In the second burst 7, and 3.5 in the step after it."""
    losses = np.where(np.arange(200) % 2, 3.1, 2.9)
    end = BURSTS[1] - 1 + BURST_LENGTH
    losses[BURSTS[1] - 1 : end] = 7.0
    losses[end] = 3.5
    this = record(scenario=scenario, losses=list(losses))
    np.testing.assert_allclose(comparison.worst_jump(this), jump)
    assert (comparison.spike_percent(this) == 0) == (scenario == "batches")


def test_gradient_spikes_begin_at_a_rate_and_are_not_the_faults():
    norms = [1.0] * 200
    norms[BURSTS[1] - 1] = norms[150] = 11.0
    records = [
        record(1e-3),
        record(2e-3, seed=0, gradient_norms=norms),
        record(2e-3, seed=1),
        record(4e-3, gradient_norms=[*norms[:-1], None]),  # not finite
    ]
    (clean,) = comparison.lines(records)
    assert clean.gradient_spikes == {1e-3: 0, 2e-3: 1, 4e-3: 3}
    assert clean.spikes_from == 2e-3
    (noise,) = comparison.lines([r | {"scenario": "noise"} for r in records])
    assert noise.gradient_spikes == {1e-3: 0, 2e-3: 0.5, 4e-3: 2}
    calm = comparison.line(records[:1])._replace(label="calm")
    assert calm.spikes_from is None
    experiment = experiments.EXPERIMENTS["main"]
    text = comparison.markdown("main", experiment, [clean, calm], [])
    assert "| spam | clean | standard, plain | 0.0 | 1.0 | 3.0 |" in text
    assert "| calm | clean | standard, plain | 0.0 |" not in text


# ------------------------------------------------------------------------ the command

FLAGS = ["--optimizer", "adam", "spam", "--preset=nano", "--steps=40", "--seeds=1"]
FLAGS += ["--learning-rate", "4e-3", "--workers=1"]


@pytest.fixture
def quick_workers(tmp_path_factory, monkeypatch):
    """Processes that compile with few optimizations, and no program twice."""
    cache = tmp_path_factory.mktemp("compiled")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_command_is_resumable(tmp_path, capsys):
    """Two runs of one program; of a second call, only the one that is missing."""
    flags = [*FLAGS, "--optimizer=spam", f"--output={tmp_path}"]
    assert compare.main(flags) == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.name.split("-")[1] for path in runs] == ["clean", "noise"]
    kept, removed = runs
    before, text = kept.stat().st_mtime_ns, json.loads(removed.read_text())
    removed.unlink()
    assert compare.main(flags) == 0
    again = json.loads(removed.read_text())
    assert again["losses"] == text["losses"]
    assert kept.stat().st_mtime_ns == before
    page = (tmp_path / "comparison.md").read_text()
    assert page.count("| spam | 0.004* |") == 2
    assert "LR\nsensitivity" in page
    (summary,) = json.loads((tmp_path / "summary.json").read_text()).values()
    assert [line["scenario"] for line in summary] == ["clean", "noise"]
    assert (tmp_path / "main.png").stat().st_size > 10_000
    assert "Tables are in" in capsys.readouterr().out


@pytest.mark.slow
def test_sigterm_ends_the_workers_too(tmp_path):
    """And says how to go on; what they had finished is there."""
    command = [sys.executable, compare.__file__, *FLAGS, "--scenario=clean"]
    with subprocess.Popen(
        [*command, f"--output={tmp_path}"], stderr=subprocess.PIPE, text=True
    ) as process:
        workers = []
        while not workers:  # the resource tracker is a child, too
            time.sleep(0.1)
            workers = [
                child
                for child in children_of(process.pid)
                if "spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_text()
            ]
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert "repeat the command to go on" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    for worker in workers:
        assert not pathlib.Path(f"/proc/{worker}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grid", "report"])
def test_ctrl_c_before_and_after_the_runs(stage, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train_all", lambda *args: True)
    monkeypatch.setattr(compare, stage, interrupt)
    assert compare.main([*FLAGS, f"--output={tmp_path}"]) == 130
    assert "repeat the command to go on" in capsys.readouterr().err


@pytest.mark.slow
def test_two_programs_may_write_the_same_record_at_once(tmp_path, monkeypatch):
    """The other one does when this one has written its file, but not moved it."""
    path, replace = tmp_path / "run.json", os.replace

    def interfere(*args):
        monkeypatch.setattr(os, "replace", replace)
        files.replace(path, "theirs")
        replace(*args)

    monkeypatch.setattr(os, "replace", interfere)
    files.replace(path, "ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


def children_of(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experiment", "nothing"], "invalid choice: 'nothing'"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--learning-rate", "0"], "must be a finite number > 0, not '0'"),
        (["--steps", "3"], "must be a whole number >= 40, not '3'"),
        (["--data", "nowhere.txt"], "cannot read the data file nowhere.txt"),
        (
            ["--experiment", "unseen", "--optimizer", "lion"],
            "experiments have no such optimizer or scenario",
        ),
    ],
)
def test_mistakes_take_one_line(flags, message, tmp_path, capsys):
    flags = [*flags, f"--output={tmp_path}", "--workers=1", "--preset=nano"]
    with pytest.raises(SystemExit) as exit_:
        compare.main(flags)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        compare.main([*FLAGS, f"--output={tmp_path / 'file'}"])
    assert exit_.value.code == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_one_line(tmp_path, capsys, monkeypatch):
    """By the system, for lack of memory."""

    def kill(futures, *_):
        deadline = time.monotonic() + 60
        while not (workers := multiprocessing.active_children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for worker in workers:
            worker.kill()
        usual(futures, *_)

    usual = compare.show_progress
    monkeypatch.setattr(compare, "show_progress", kill)
    with pytest.raises(SystemExit) as exit_:
        compare.main([*FLAGS, f"--output={tmp_path}"])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert "fewer --workers" in error and error.count("\n") == 1
