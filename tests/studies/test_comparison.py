"""The comparison: its runs, its statistics, its tables and its program."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compare
import pretrain
from studies.comparison import (
    experiments,
    figures,
    report,
    statistics,
    variants,
)
from studies.comparison.statistics import Result
from studies.comparison.study import Comparison, Program
from studies.task import Run
from trainer import loop, optimizers, sharding, train_step
from trainer.config import BURST_LENGTH, RunConfig
from trainer.errors import UsageError

# The studies hardly depend on the version of Python: see docs/development.md.
pytestmark = pytest.mark.slow

STUDY = Comparison()
BASE = RunConfig.from_settings(
    preset="nano",
    steps=40,
    batch_size=4,
    sequence_length=16,
    eval_sequences=16,
    bursts=2,
    bad_batches=0,
)


def run_of(label="adam", scenario="clean", **settings):
    config = BASE.with_settings(**settings, **experiments.faults(scenario))
    return Run(label, scenario, config)


@functools.cache
def program(label):
    return Program(run_of(label))


def train(run):
    """Trains a run of a compiled program, which several tests share."""
    return program(run.label)(run, lambda fraction: None)


# ------------------------------------------------------------------------------ a run


@pytest.mark.parametrize(
    "label", [pytest.param("adam_clip", marks=pytest.mark.nightly), "clip_spam"]
)
def test_a_run_computes_what_the_trainer_does(label):
    """Faults, losses and gradient norms are the same in every step."""
    run = run_of(label, "noise", learning_rate=8e-3, seed=3)
    record = train(run)
    config = dataclasses.replace(run.config, optimizers=(label,))
    task, _ = pretrain.prepare(config, sharding.Parallelism(data=1))
    optimizer = optimizers.make(label, config)
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


def test_scenarios_differ_from_their_first_fault_on():
    clean = train(run_of("adam_clip"))
    noise = train(run_of("adam_clip", "noise"))
    batches = train(run_of("adam_clip", "batches"))
    first = BASE.fault_steps[0]
    assert noise["losses"][:first] == clean["losses"][:first]
    assert noise["gradient_norms"] != clean["gradient_norms"]
    ratio = np.divide(noise["gradient_norms"], clean["gradient_norms"])
    assert ratio[first - 1] > 100
    assert batches["losses"][: first - 1] == clean["losses"][: first - 1]
    assert batches["losses"][first - 1] > clean["losses"][first - 1] + 0.1


def test_a_change_of_the_text_comes_in_the_middle_and_stays():
    shift = run_of("adam_clip", "shift")
    assert STUDY.program(shift) != STUDY.program(run_of("adam_clip"))
    assert STUDY.data_digest(shift) != STUDY.data_digest(run_of("adam_clip"))
    before, after = Program(shift)._inputs(shift), program("adam_clip")
    clean = after._inputs(run_of("adam_clip"))
    half = BASE.steps // 2
    is_same = (before[2] == clean[2]).all(axis=(1, 2))
    assert is_same[:half].all() and not is_same[half:].any()
    assert before[4].shape != clean[4].shape or (before[4] != clean[4]).any()


def test_a_change_of_the_text_needs_bytes():
    with pytest.raises(UsageError, match="needs the tokenizer bytes, not bpe:300"):
        Program(run_of("adam", "shift", tokenizer="bpe:300"))


def test_a_guard_records_which_steps_it_skips():
    run = run_of("guard, adam_clip", "nan", learning_rate=8e-3)
    assert run.config.spike_kind == "nan"
    results = Program(run)(run, lambda fraction: None)
    record = STUDY.decode({"settings": STUDY.settings(run)} | results)
    skipped = np.flatnonzero(record["skip_reasons"]) + 1
    assert skipped.tolist() == list(BASE.fault_steps)
    line = statistics.result([record])
    assert line.skipped == [len(BASE.fault_steps), 0]
    table = report.markdown("guards", [line], [])
    assert f"| {len(BASE.fault_steps)}.0 + 0.0 |" in table


def test_limits_on_the_logits_are_part_of_the_model():
    models = [
        statistics.model_of(STUDY.settings(run))
        for run in experiments.runs_of("attention", experiments.BASE, [0])
    ]
    assert list(dict.fromkeys(models)) == [
        "standard, plain",
        "standard, plain, QK-norm",
        "standard, plain, attention softcap 50",
        "standard, plain, QK-clip 100",
        "standard, plain, QK-clip 30",
    ]


@pytest.mark.nightly
def test_qk_clip_changes_a_run_as_soon_as_a_logit_is_too_large():
    losses = []
    for threshold in (1e-3, 1e3):
        run = run_of("adam", learning_rate=8e-3, qk_clip=threshold)
        losses.append(Program(run)(run, lambda fraction: None)["losses"])
    assert losses[0][:1] == losses[1][:1] and losses[0] != losses[1]


def test_coordinate_spikes_hit_one_in_a_thousand():
    this = run_of("adam", "coordinates")
    assert this.config.spike_rate == 1e-3
    assert this.config.spike_kind == "scale"
    assert STUDY.program(this) != STUDY.program(run_of("adam", "noise"))
    assert STUDY.program(run_of("adam", "clean")) == STUDY.program(
        run_of("adam", "noise")
    )


@pytest.mark.parametrize(("size", "part"), [(15, "train"), (150, "validation")])
def test_a_text_shorter_than_a_sequence_is_a_mistake(size, part, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"." * size)
    with pytest.raises(UsageError, match=f"too short: its {part} part"):
        Program(run_of(data=str(text)))


def test_every_variant_of_every_experiment_can_be_made():
    base = dataclasses.replace(experiments.BASE, steps=40)
    for name in experiments.EXPERIMENTS:
        for this in experiments.runs_of(name, base, [0]):
            variants.make(this.label, this.config, 1e-3)


def test_the_warm_up_keeps_its_share_of_the_interval(monkeypatch):
    def intervals(label, steps):
        made = []
        monkeypatch.setattr(
            optimizers,
            "spam",
            lambda config, rate, **given: made.append(config.spam_intervals | given),
        )
        variants.make(label, dataclasses.replace(BASE, steps=steps), 1e-3)
        return tuple(made[0][x] for x in ("reset_interval", "warmup_steps"))

    assert intervals("spam, interval 0.13 of the run", 300) == (39, 12)
    assert intervals("spam, interval 0.67 of the run", 300) == (201, 60)
    assert intervals("spam, warm-up 0.9 of the interval", 300) == (75, round(0.9 * 75))
    assert intervals("spam: clip", 300)[0] is None


def test_the_control_takes_the_steps_of_spam():
    """They are equal where the gradient is constant, and differ from Adam's."""
    config = dataclasses.replace(BASE, steps=200, reset_interval=100)
    params, gradient = jnp.zeros(3), jnp.array([1.0, -2.0, 0.5])

    def updates_of(label):
        tx = variants.make(label, config, 1.0)
        state, update = tx.init(params), jax.jit(tx.update)
        updates = []
        for _ in range(config.steps):
            step, state = update(gradient, state, params)
            updates.append(step)
        return np.array(updates)

    ours = updates_of("adam, SPAM's steps")
    np.testing.assert_allclose(ours, updates_of("spam"), rtol=1e-4)
    ratios = ours[1:] / updates_of("adam")[1:]  # the warm-up begins at 0
    assert ratios[:98] == pytest.approx(1, rel=1e-4)
    assert ratios.max() > 1.8 and ratios.min() < 0.05


def test_faults_come_when_gradients_are_clipped(monkeypatch):
    """One row is an exception, which shows the difference."""
    made = []
    monkeypatch.setattr(
        optimizers,
        "spam",
        lambda config, rate, **given: made.append(config.spam_intervals | given),
    )
    monkeypatch.setitem(optimizers.TABLE, "spam", variants.spam_with())
    sweep = experiments.runs_of("sweeps", experiments.BASE, [0], rates=[1e-3])
    unclipped = []
    for this in sweep:
        variants.make(this.label, this.config, 1e-3)
        steps = np.array(this.config.fault_steps) % made[-1]["reset_interval"]
        if min(steps) < made[-1]["grace_steps"]:
            unclipped.append(this.label)
    assert unclipped == ["spam, interval 0.25 of the run"]


# ------------------------------------------------------------------- files and grids


def test_a_new_setting_with_its_default_changes_no_file_name():
    name = STUDY.name(run_of())
    assert "optimizers" not in STUDY.settings(run_of())
    assert name == STUDY.name(run_of(seed=0))
    assert name != STUDY.name(run_of(seed=1))
    assert name != STUDY.name(run_of(tokenizer="bpe:512"))
    assert STUDY.name(run_of("spam, clip unseen")).startswith("spam_clip_unseen-")


def test_names_of_runs_stay_the_same():
    """Records of earlier versions are found by their names."""
    run = Run("clip_spam", "noise", dataclasses.replace(BASE, learning_rate=8e-3))
    assert STUDY.name(run) == "clip_spam-noise-0.008-seed0-8a4dfcc3b87a"


def test_names_of_runs_do_not_depend_on_the_folder(tmp_path, monkeypatch):
    def runs():
        return experiments.runs_of("false alarms", experiments.BASE, [0])

    before = [STUDY.name(run) for run in runs()]
    monkeypatch.chdir(tmp_path)
    assert [STUDY.name(run) for run in runs()] == before
    texts = {STUDY.settings(run)["data"] for run in runs()}
    assert texts == {None, "examples/data/prose_pd.txt.xz"}
    assert all(len(STUDY.data_digest(run)) == 64 for run in runs())


def test_an_incomplete_row_is_left_out(tmp_path):
    runs = [
        run_of(label, learning_rate=rate)
        for label in ("adam", "spam")
        for rate in (1, 2)
    ]
    for run in runs[:3]:
        text = json.dumps(record() | {"settings": STUDY.settings(run)})
        (tmp_path / f"{STUDY.name(run)}.json").write_text(text)
    records, unfinished = report.complete(STUDY, runs, tmp_path)
    assert [record["label"] for record in records] == ["adam", "adam"]
    assert unfinished == ["spam (clean; standard, plain, 2 layers of width 32): 1 of 2"]


def test_grids_of_the_experiments():
    specs = experiments.runs_of("main", experiments.BASE, range(3))
    assert len(specs) == len(set(specs)) == 15 * 5 * 3 * 2
    rates = {s.config.learning_rate for s in specs if s.label == "lion"}
    assert rates == {rate / 8 for rate in experiments.RATES}
    only = experiments.runs_of(
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
        statistics.model_of(STUDY.settings(s))
        for s in experiments.runs_of("initialization", experiments.BASE, [0])
    }
    assert len(models) == 5


def test_no_two_settings_of_an_experiment_share_a_row():
    for name, experiment in experiments.EXPERIMENTS.items():
        rows = {}
        for run in experiments.runs_of(name, experiments.BASE, [0]):
            row = (*statistics.panel_of(STUDY.settings(run)), run.label)
            rows.setdefault(row, []).append(run.config.learning_rate)
        combinations = (experiment.models, experiment.scenarios, experiment.labels)
        assert len(rows) == math.prod(map(len, combinations))
        for rates in rows.values():
            assert len(rates) == len(set(rates)) == len(experiment.rates)


# ------------------------------------------------------------------------- statistics


def record(rate=1e-3, seed=0, final=2.0, scenario="clean", **changes):
    return {
        **STUDY.settings(
            run_of("spam", scenario, learning_rate=rate, seed=seed, steps=200)
        ),
        "first_eval_loss": 5.5,
        "final_eval_loss": final,
        "losses": [3.0] * 200,
        "gradient_norms": [1.0] * 200,
        "optimizer_bytes": 800,
        "parameters": 100,
        "seconds_per_step": 0.1,
        "skip_reasons": None,
    } | changes


def test_a_result_has_the_best_rate_and_the_sensitivity():
    """Diverged runs count with the loss of their initialization."""
    finals = {1e-3: (2.0, 2.2), 2e-3: (1.8, 1.9), 4e-3: (2.5, None), 8e-3: (None, 9.0)}
    records = [
        record(rate, seed, final)
        for rate, seeds in finals.items()
        for seed, final in enumerate(seeds)
    ]
    (line,) = statistics.results(records)
    assert line.best_rate == 2e-3
    assert not line.is_at_edge
    np.testing.assert_allclose([line.final_loss, line.low, line.high], [1.85, 1.8, 1.9])
    assert line.far_loss == 5.5
    means = [2.1, 1.85, (2.5 + 5.5) / 2, 5.5]
    np.testing.assert_allclose(line.sensitivity, np.mean(means) - 1.85)
    assert (line.diverged, line.runs, line.seeds) == (3, 8, 2)
    assert line.bytes_per_parameter == 8.0
    assert line.worst_jump is None and line.recovery is None


def test_the_best_results_come_first_and_an_edge_is_marked():
    records = [record(final=2.0), record(final=1.5, label="lion")]
    lines = statistics.results(records)
    assert [line.label for line in lines] == ["lion", "spam"]
    text = report.markdown("main: Which?", lines, ["adam (clean): 1 of 15"])
    assert "| lion | 0.001* | 1.500 |" in text
    assert "worst jump" not in text
    assert "LR sensitivity" not in text  # a single rate has none
    assert "Unfinished runs: adam (clean): 1 of 15." in text


def test_the_figure_has_a_panel_for_each_optimizer_or_else_for_each_model():
    models = [{}, {"initialization": "stable"}]
    one = [record(**model) for model in models]
    two = [record(label=label, **model) for model in models for label in ("adam", "b")]
    for runs, panels, names in (
        (one, ["stable, plain", "standard, plain"], []),
        (two, ["adam", "b"], ["stable, plain", "standard, plain"]),
    ):
        figure = figures.draw(statistics.results(runs))
        assert sorted(axis.get_title() for axis in figure.axes) == panels
        texts = [text for legend in figure.legends for text in legend.get_texts()]
        assert sorted(text.get_text() for text in texts) == names


def test_the_figure_of_depth_shows_the_largest_usable_rate():
    """A rate is usable if its loss, and those of lower rates, are near the lowest."""
    losses = {3: (2.0, 2.15, 2.19), 6: (2.1, 2.4, 2.2), 12: (2.2, 2.3, 2.5)}
    shape = {"width": 64, "heads": 2, "ffn_width": 172}
    results = statistics.results(
        record(rate, final=final, layers=layers, **shape)
        for layers, finals in losses.items()
        for rate, final in zip((1e-3, 2e-3, 4e-3), finals, strict=True)
    )
    assert [row.largest_rate for row in results] == [4e-3, 1e-3, 2e-3]
    drawn = figures.draw(results)
    panel, rates, lowest = drawn.axes
    assert panel.get_title() == "standard, plain"
    assert [x.get_label() for x in panel.lines] == ["3 layers", "6 layers", "12 layers"]
    np.testing.assert_array_equal(rates.lines[0].get_xdata(), [3, 6, 12])
    np.testing.assert_array_equal(rates.lines[0].get_ydata(), [4e-3, 1e-3, 2e-3])
    np.testing.assert_array_equal(lowest.lines[0].get_ydata(), [2.0, 2.1, 2.2])
    losses = figures.figure_of_losses(
        [
            record(rate, losses=[3.0] * 20, layers=24, **shape, **model)
            for rate in (1e-3, 4e-3)
            for model in ({}, {"initialization": "stable"})
        ]
    )
    titles = [axis.get_title() for axis in losses.axes]
    assert titles == ["learning rate 0.001", "learning rate 0.004"]
    assert all(len(axis.lines) == 2 for axis in losses.axes)
    text = report.markdown("depth", results, [])
    assert "| standard, plain, 6 layers of width 64 | 0.001* | 0.001 | 2.100 |" in text


def test_lines_of_many_models_differ_and_their_legend_fits():
    drawn = figures.figure_of_losses(
        [
            record(losses=[3.0] * 20, **experiments.DEEP, **model)
            for model in experiments.INITIALIZATIONS
        ]
    )
    lines = drawn.axes[0].lines
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == len(lines) == len(experiments.INITIALIZATIONS)
    drawn.draw_without_rendering()
    (legend,) = drawn.legends
    box = legend.get_window_extent()
    assert 0 < box.x0 < box.x1 < drawn.bbox.width


def test_the_figure_of_faults_shows_what_each_kind_costs():
    finals = {
        ("spam", "clean"): 2.0,
        ("spam", "noise"): 2.3,
        ("spam", "batches"): 2.1,
        ("spam", "shift"): 2.9,  # another text: its loss cannot be compared
        ("adam", "clean"): 1.9,
        ("adam", "noise"): 1.95,
        ("adam", "batches"): None,
    }
    results = statistics.results(
        [record(final=x, label=label, scenario=s) for (label, s), x in finals.items()]
    )
    assert figures.is_about_faults(results)
    (axis,) = figures.draw(results).axes
    assert [x.get_text() for x in axis.get_yticklabels()] == ["spam", "adam"]
    drawn = {
        (x.get_label(), x.get_marker()): x.get_xdata()
        for x in axis.lines
        if len(x.get_xdata())
    }
    np.testing.assert_allclose(sorted(drawn["noise", "o"]), [0.05, 0.3])
    np.testing.assert_allclose(drawn["batches", "o"], [0.1])
    (edge,) = (x for (_, marker), x in drawn.items() if marker == ">")
    assert edge == [axis.get_xlim()[1]] and edge[0] > 0.3


BURSTS = RunConfig.from_settings(steps=200, bursts=2).burst_starts


@pytest.mark.parametrize(
    ("after", "expected"),
    [(0, 0), (15, 15), (1000, np.inf)],
    ids=["at once", "after 15 steps", "never"],
)
def test_recovery(after, expected):
    """The losses are 3, and the second burst raises them by 1 for some steps."""
    losses = np.full(200, 3.0)
    end = BURSTS[1] + 2
    losses[end : end + after] += 1
    this = record(scenario="noise", losses=list(losses))
    assert statistics.recovery_steps(this) == expected
    assert statistics.recovery_steps(this | {"scenario": "clean"}) is None


def test_too_few_steps_after_the_bursts_show_no_recovery():
    """In 40 steps with three bursts at most 8 steps follow each other without one."""
    this = record(scenario="noise", steps=40, bursts=3, losses=[3.0] * 40)
    assert statistics.recovery_steps(this) is None
    line = statistics.result([this])
    assert line.recovery is None and line.worst_jump == 0


def test_infinite_numbers_differ_from_missing_ones():
    """The losses never recover, and one is not finite."""
    losses = list(np.arange(200.0))
    losses[BURSTS[1] + 4] = None
    noise = record(scenario="noise", losses=losses)
    clean, noise = map(Result.to_json, statistics.results([record(), noise]))
    assert [clean["recovery"], clean["worst_jump"]] == [None, None]
    assert [noise["recovery"], noise["worst_jump"]] == ["inf", "inf"]
    json.dumps([clean, noise], allow_nan=False)


def test_spikes_and_jumps():
    losses = [3.0 + 0.01 * (i % 2) for i in range(200)]
    losses[BURSTS[1] + 4] = 7.0
    line = statistics.result([record(scenario="noise", losses=losses)])
    assert line.spike_score == 1.0  # one of the hundred steps judged
    np.testing.assert_allclose(line.worst_jump, 7 - 3.005)
    losses[-1] = None  # not finite
    assert statistics.spike_percent(record(losses=losses)) == 2.0


@pytest.mark.parametrize(("scenario", "jump"), [("noise", 4.0), ("batches", 0.5)])
def test_losses_of_corrupted_batches_do_not_count(scenario, jump):
    """The loss is 7 in the second burst and 3.5 in the step after it."""
    losses = np.where(np.arange(200) % 2, 3.1, 2.9)
    end = BURSTS[1] - 1 + BURST_LENGTH
    losses[BURSTS[1] - 1 : end] = 7.0
    losses[end] = 3.5
    this = record(scenario=scenario, losses=list(losses))
    np.testing.assert_allclose(statistics.worst_jump(this), jump)
    assert (statistics.spike_percent(this) == 0) == (scenario == "batches")


def test_gradient_spikes_do_not_include_the_faults():
    norms = np.random.default_rng(0).normal(1, 0.1, 200).tolist()
    norms[BURSTS[1] - 1] = norms[150] = 12.0
    records = [
        record(1e-3),
        record(2e-3, seed=0, gradient_norms=norms),
        record(2e-3, seed=1),
        record(4e-3, gradient_norms=[*norms[:-1], None]),  # not finite
    ]
    (clean,) = statistics.results(records)
    assert clean.gradient_spikes == {1e-3: 0, 2e-3: 1, 4e-3: 3}
    assert clean.spikes_from == 2e-3
    (noise,) = statistics.results([r | {"scenario": "noise"} for r in records])
    assert noise.gradient_spikes == {1e-3: 0, 2e-3: 0.5, 4e-3: 2}
    # (12 - 1) / 0.1, in one of two seeds.
    assert clean.deviations[2e-3] == pytest.approx(110 / 2, rel=0.2)
    assert clean.deviations[1e-3] == 0
    calm = statistics.result(records[:1])._replace(label="calm")
    assert calm.spikes_from is None
    text = report.markdown("main", [clean, calm], [])
    assert (
        "| spam | clean | standard, plain, 2 layers of width 32"
        f" | 0.0 (0) | 1.0 ({clean.deviations[2e-3]:.0f}) |" in text
    )
    assert "| calm | clean |" not in text


# ------------------------------------------------------------------------- the program

FLAGS = ["--preset=nano", "--steps=40", "--seeds=1", "--workers=1"]
FLAGS += ["--learning-rate", "4e-3", "--optimizer", "adam"]


def test_the_program_is_resumable(tmp_path, capsys):
    """Two runs of one program. A second call makes only the one that is missing."""
    flags = [*FLAGS, f"--output={tmp_path}"]
    assert compare.main(flags) == 0
    runs = sorted((tmp_path / "runs").iterdir())
    assert [path.name.split("-")[1] for path in runs] == ["clean", "noise"]
    kept, removed = runs
    before, first = kept.stat().st_mtime_ns, json.loads(removed.read_text())
    # The two moments and two counters of steps.
    assert first["optimizer_bytes"] == 8 * first["parameters"] + 4 * 2
    assert first["seconds_per_step"] > 0
    removed.unlink()
    assert compare.main(flags) == 0
    assert json.loads(removed.read_text())["losses"] == first["losses"]
    assert kept.stat().st_mtime_ns == before
    page = (tmp_path / "comparison.md").read_text()
    assert page.count("| adam | 0.004* |") == 2
    assert "**LR sensitivity**" in page
    (summary,) = json.loads((tmp_path / "summary.json").read_text()).values()
    assert [line["scenario"] for line in summary] == ["clean", "noise"]
    assert (tmp_path / "main.png").stat().st_size > 10_000
    assert "Tables are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--learning-rate", "0"], "must be a finite number > 0, not '0'"),
        (["--data", "nowhere.txt"], "cannot read the data file nowhere.txt"),
        (
            ["--experiment", "unseen", "--optimizer", "lion"],
            "experiments have no such optimizer or scenario",
        ),
    ],
)
def test_mistakes_take_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main([*FLAGS, *flags, f"--output={tmp_path}"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        compare.main([*FLAGS, f"--output={tmp_path / 'file'}"])
    assert exit_.value.code == 2
    assert "--output: must be a folder" in capsys.readouterr().err
