"""The output at the end of a run: summary, figure and report, from made-up rows."""

import dataclasses
import io
import itertools
import json
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pretrain
import spam_optax
from trainer import hosts
from trainer.config import DEMONSTRATION, RunConfig
from trainer.optimizers import TABLE
from trainer.output import console, figure, report, sinks, summary
from trainer.run_folder import RunFolder
from trainer_in_process import SMALL_FLAGS

OPTIMIZERS = tuple(TABLE)
TENSORS = ["attention/query/kernel", "embed/embedding", "norm/scale"]


def step_row(name, step, loss=2.0, scores=(1.0, 1.0, 1.0), spikes=(0, 0, 0), **others):
    return {
        "optimizer": name,
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "clipped_grad_norm": 0.5,
        "update_norm": 0.1,
        "param_norm": 20.0,
        "spikes_clipped": 0,
        "skipped": None,
        "skipped_steps": 0,
        "batch": step,
        "steps_above_band": 0,
        "tensors": {"spike_score": list(scores), "spike_steps": list(spikes)},
        "fault": False,
        "tokens_per_second": 1000.0,
        "flops_utilization": None,
        **others,
    }


def evaluation_row(name, step, loss=2.0):
    return {
        "optimizer": name,
        "step": step,
        "eval_loss": loss,
        "eval_perplexity": math.exp(loss),
    }


def rows_of(config, halts=()):
    """A run's rows; `halts` says at which step an optimizer's loss was not finite."""
    halts = dict(halts)
    rows = []
    for level, name in enumerate(config.optimizers):
        for step in range(1, halts.get(name, config.steps) + 1):
            loss = 2 + 0.1 * level + 3 * math.exp(-10 * step / config.steps)
            halted = step == halts.get(name)
            rows.append(
                step_row(
                    name,
                    step,
                    None if halted else loss,
                    spikes_clipped=5 if "spam" in name and step % 7 == 0 else 0,
                    fault=step in config.fault_steps,
                )
            )
            due = step % config.eval_every == 0 or step == config.steps
            if due and not halted:
                rows.append(evaluation_row(name, step, loss))
    return rows


# ------------------------------------------------------------------------- analysis


def test_optimizers_that_halted_are_in_the_summary_and_unfinished_ones_are_not():
    names = ("adam", "adamw", "lion", "spam", "adafactor")
    config = RunConfig.from_settings(optimizers=names, steps=4, bursts=0)
    rows = [step_row(name, step) for name in names[:4] for step in (1, 2)]
    rows += [evaluation_row("adam", 2), step_row("adam", 3, loss=None)]
    rows += [step_row("adamw", 3, update_norm=None)]
    rows += [step_row("lion", 3), step_row("lion", 4), evaluation_row("lion", 4, 1.5)]
    summaries = summary.summarize(rows, config)
    assert {name: values["halted_at"] for name, values in summaries.items()} == {
        "adam": 3,
        "adamw": 3,
        "lion": None,
    }
    for name in ("adam", "adamw"):
        assert summaries[name]["final_eval_loss"] is None
        assert summaries[name]["final_eval_perplexity"] is None
    assert summaries["lion"]["final_eval_loss"] == 1.5
    assert summaries["lion"]["final_eval_perplexity"] == pytest.approx(math.exp(1.5))


def test_an_optimizer_that_was_resumed_after_a_halt_has_not_halted():
    config = RunConfig.from_settings(optimizers=("adam",), steps=3, bursts=0)
    rows = [step_row("adam", step) for step in (1, 2, 3)] + [evaluation_row("adam", 3)]
    assert summary.summarize(rows, config)["adam"]["halted_at"] is None


def test_a_final_loss_that_is_not_finite_is_no_halt():
    config = RunConfig.from_settings(optimizers=("adam",), steps=1, bursts=0)
    rows = [step_row("adam", 1), evaluation_row("adam", 1)]
    rows[1] |= {"eval_loss": None, "eval_perplexity": None}
    values = summary.summarize(rows, config)["adam"]
    assert values["final_eval_loss"] is None and values["halted_at"] is None


def test_utilization_is_the_median_of_the_steps_that_have_it():
    config = RunConfig.from_settings(optimizers=("adam",), steps=4, bursts=0)
    known = [None, 0.2, 0.5, 0.3]
    rows = [step_row("adam", i + 1, flops_utilization=x) for i, x in enumerate(known)]
    rows.append(evaluation_row("adam", 4))
    assert summary.summarize(rows, config)["adam"]["flops_utilization"] == 0.3
    for row in rows[:4]:
        row["flops_utilization"] = None
    assert summary.summarize(rows, config)["adam"]["flops_utilization"] is None


@pytest.mark.parametrize("length", [0, 1, 2, 7, 60])
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_running_median_is_that_of_the_finite_values_before(length, window):
    rng = np.random.default_rng(length)
    values = rng.lognormal(size=length)
    values[rng.random(length) < 0.3] = np.nan
    values[rng.random(length) < 0.1] = np.inf
    medians = summary.running_median(values, window)
    assert len(medians) == length
    for i in range(length):
        before = values[max(0, i - window) : i]
        before = before[np.isfinite(before)]
        expected = np.median(before) if len(before) else np.nan
        np.testing.assert_equal(medians[i], expected)


def test_tensor_spikes_are_counted_and_sorted():
    scores = [
        [2.0, 50.0, 1.0, 9.0],
        [90.0, 30.0, 1.5, None],
        [30.0, 20.0, 1.0, 8.0],
    ]
    counts = [[0, 1, 0, 0], [1, 2, 0, 1], [2, 3, 0, 1]]
    steps = [
        step_row("spam", 5 + i, scores=scores[i], spikes=counts[i]) for i in range(3)
    ]
    found = summary.tensor_spikes(steps, ["a", "b", "c", "d"])
    assert [tuple(spikes) for spikes in found] == [
        ("b", 3, 0, 50.0, 5),
        ("a", 2, 0, 90.0, 6),
        ("d", 1, 1, 9.0, 5),
        ("c", 0, 0, 1.5, 6),
    ]


def test_tensors_with_equally_many_spikes_are_sorted_by_their_size():
    row = step_row("spam", 1, scores=[20.0, 40.0, None], spikes=[1, 1, 1])
    found = summary.tensor_spikes([row], ["small", "large", "not finite"])
    assert [spikes.name for spikes in found] == ["not finite", "large", "small"]
    assert found[0].largest is None and found[0].largest_step is None


def test_thinning_keeps_spikes_and_bounds_the_points():
    steps = np.arange(1, 100_001)
    values = np.ones(100_000)
    values[12_345] = 1000.0
    values[50_000] = np.nan
    size = summary.bucket_size(len(steps))
    at, largest = summary.thin(steps, values, summary.largest, size)
    assert len(at) == len(largest) == 2000
    assert at[np.argmax(largest)] == 12_301  # of the 50 steps from there on
    assert np.sort(largest)[-2] == 1 and not np.isnan(largest).any()
    _, mean = summary.thin(steps, values, summary.mean, size)
    assert mean.max() == pytest.approx((49 + 1000) / 50)
    assert np.median(mean) == 1 and not np.isnan(mean).any()


@pytest.mark.parametrize("reduce", [summary.largest, summary.mean])
def test_thinning_leaves_a_short_curve_as_it_is(reduce):
    steps, values = np.arange(1.0, 2000.0), np.random.default_rng(0).random(1999)
    values[3] = np.nan
    size = summary.bucket_size(len(steps))
    at, thinned = summary.thin(steps, values, reduce, size)
    np.testing.assert_array_equal(at, steps)
    np.testing.assert_array_equal(thinned, values)
    assert [len(part) for part in summary.thin(steps[:0], values[:0], reduce, 1)] == [
        0,
        0,
    ]


@pytest.mark.parametrize("steps", [1, 1999, 2000, 2001, 3999, 4001, 99_999])
def test_curves_have_at_most_2000_points(steps):
    points = math.ceil(steps / summary.bucket_size(steps))
    assert points <= 2000
    assert points == steps or points > 1000


# -------------------------------------------------------------------- the summary table


def summary_of(name="spam", **values):
    empty = dict.fromkeys(summary.COLUMNS) | {"halted_at": None}
    return {name: empty | {"spikes_seen": 0, "spikes_clipped": 0} | values}


def test_columns_without_information_are_left_out():
    plain, tokens = RunConfig(), RunConfig.from_settings(tokenizer="bpe:512", bursts=0)
    assert set(summary.COLUMNS) - set(summary.columns(summary_of(), plain)) == {
        "final_eval_perplexity",
        "flops_utilization",
        "skipped_steps",
    }
    assert set(summary.COLUMNS) - set(
        summary.columns(summary_of(flops_utilization=0.4, skipped_steps=3), tokens)
    ) == {"worst_loss_jump", "worst_burst"}


def test_table_shows_where_an_optimizer_halted(capsys):
    config = RunConfig.from_settings(optimizers=("adam", "spam"))
    summaries = summary_of("adam", halted_at=12_345) | summary_of(final_eval_loss=2.5)
    console.print_summaries(summaries, config)
    adam, spam = lines_with(capsys.readouterr().out, "adam", "spam")
    assert "halted at 12,345" in adam
    assert "halted" not in spam and "2.500" in spam


def lines_with(text, *words):
    """The first line with each of the words."""
    return [next(line for line in text.splitlines() if word in line) for word in words]


def test_widest_table_is_not_cut(capsys):
    config = RunConfig.from_settings(preset="1b", optimizers=OPTIMIZERS, bursts=4)
    config = dataclasses.replace(config, tokenizer="t5-base")
    values = {
        "halted_at": 99_999,
        "final_eval_perplexity": 12_345.67,
        "worst_loss_jump": -1.234,
        "worst_burst": 1234.5,
        "spikes_seen": 99_999,
        "spikes_clipped": 1_234_567_890,
        "skipped_steps": 99_999,
        "tokens_per_second": 1_234_567.0,
        "flops_utilization": 0.415,
    }
    summaries = {name: summary_of(name, **values)[name] for name in OPTIMIZERS}
    console.print_summaries(summaries, config)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 120
    for line in lines_with(out, *OPTIMIZERS):
        assert "12,345.67" in line and "1,234,567,890" in line and "41.5%" in line
    assert "Losses are in nats per token." in out and "MFU:" in out


def test_notes_explain_the_columns_shown_and_no_others():
    notes = console.notes(summary_of(), RunConfig.from_settings(bursts=0))
    assert notes.startswith("Losses are in nats per byte. Spikes seen: steps")
    assert "burst" not in notes and "MFU" not in notes
    assert "Worst burst: the" in console.notes(summary_of(), RunConfig())


@pytest.mark.parametrize(
    ("bursts", "left", "said"),
    [
        (4, 151.0, "Why SPAM alone does not stop a burst"),
        (
            3,
            151.0,
            "SPAM did not clip the bursts of steps 100, 200, 300. They came less than"
            " 20 steps",
        ),
        (3, 5.0, ""),
    ],
)
def test_a_burst_that_got_through_is_explained(bursts, left, said, capsys):
    """Three bursts in 400 steps fall on the resets."""
    config = RunConfig.from_settings(bursts=bursts, steps=400)
    console.print_summaries(summary_of(worst_burst=left), config)
    out = capsys.readouterr().out
    assert said in out
    assert ("SPAM did not clip" in out) + ("Why SPAM" in out) == bool(said)


# ---------------------------------------------------------------- on the console


def shown_by_progress(capsys, names=DEMONSTRATION, **row):
    config = RunConfig.from_settings(optimizers=names, steps=200)
    with console.Progress(config) as progress:
        for name in names:
            progress.start(name, types.SimpleNamespace(opt_state=(), step=0))
            progress(step_row(name, 100, spikes_clipped=7, **row))
            progress(evaluation_row(name, 100))
    return capsys.readouterr().out.splitlines()


def test_progress_lines_stand_below_each_other(capsys):
    lines = shown_by_progress(capsys, OPTIMIZERS)
    assert len(lines) == len(OPTIMIZERS)
    assert {line.index(" step 100/200 loss 2.000 clipped 7 ") for line in lines} == {
        max(map(len, OPTIMIZERS))
    }


def test_progress_shows_the_utilization_if_it_is_known(capsys):
    assert "MFU" not in shown_by_progress(capsys)[0]
    assert "MFU 41.3%" in shown_by_progress(capsys, flops_utilization=0.413)[0]


def test_an_optimizer_that_goes_back_keeps_one_bar(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with console.Progress(RunConfig(steps=200)) as progress:
        for name, step in (("adam", 0), ("spam", 0), ("spam", 60)):
            progress.start(name, types.SimpleNamespace(opt_state=(), step=step))
        progress(step_row("spam", 61))
        tasks = progress._bars.tasks
    assert [(t.description, t.completed) for t in tasks] == [("adam", 0), ("spam", 61)]


@pytest.mark.parametrize("terminal", [False, True])
def test_only_host_0_shows_progress(capsys, monkeypatch, terminal):
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert shown_by_progress(capsys) == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 1, 1), "on 1 cpu; 400"), ((1, 4, 2), "8 cpu (data 1 x fsdp 4 x tensor 2);")],
)
def test_announcement_names_a_mesh_of_several_devices(capsys, shape, words):
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    task = types.SimpleNamespace(config=RunConfig(), mesh=mesh, shapes=np.zeros(1234))
    console.print_run(task)
    out = capsys.readouterr().out
    assert out.startswith("tiny model, 1,234 parameters, on ")
    assert words in out
    assert "gradients in steps 80-82, 160-162, 240-242, 320-322; random" in out


def test_moments_of_an_optimizer_are_described_in_one_line():
    params = {
        "embed": jnp.ones((16, 8)),
        "norm": {"scale": jnp.ones(8)},
        "mlp": {"kernel": jnp.ones((8, 32))},
    }
    for tx, line in (
        (spam_optax.spam(), "first and second moments for every parameter"),
        (
            spam_optax.sparse_spam(),
            "first and second moments for 100% of the 136 parameters of embedding,"
            " vector; first and second moments for 25% of the 256 parameters of"
            " feed-forward",
        ),
        (
            spam_optax.adam_mini(),
            "first moments for 100% of the 392 parameters of embedding, feed-forward,"
            " vector, which share 49 second moments",
        ),
    ):
        state = jax.eval_shape(tx.init, params)
        tensors = spam_optax.describe_tensors(state, params)
        assert console.moments(tensors) == line


# -------------------------------------------------------------------------- picture


def figure_of(config, halts=()):
    rows = rows_of(config, halts)
    return figure.make_figure(rows, summary.summarize(rows, config), config)


def words_in(figure):
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [artist.get_text() for artist in found]


def rendered(figure):
    """Draws the figure; that of a layout that does not fit is a warning, an error."""
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def test_every_optimizer_has_a_style_of_its_own():
    styles = [(entry.color, entry.line) for entry in TABLE.values()]
    assert len(set(styles)) == len(TABLE)
    assert figure.FAULT not in {color for color, _ in styles}


def test_the_demonstration_keeps_its_picture():
    drawn = figure_of(RunConfig())
    loss, *norms, spikes = drawn.axes
    assert tuple(drawn.get_size_inches()) == (11, 9)
    assert [panel.get_title("left") for panel in norms] == list(DEMONSTRATION)
    thick = [line for line in loss.lines if line.get_linewidth() == 1.8]
    assert [(line.get_color(), line.get_linestyle()) for line in thick] == [
        ("#D55E00", "-"),
        ("#0072B2", "--"),
        ("#009E73", "-"),
        ("#000000", "--"),
        ("#CC79A7", "-"),
    ]
    assert loss.get_ylabel() == "loss (nats per byte)"
    assert "Yellow: corrupted gradients" in loss.get_title("left")
    assert "Dotted: its momentum resets" in spikes.get_title("left")


@pytest.mark.one_python
def test_all_optimizers_of_which_two_halted():
    config = RunConfig.from_settings(optimizers=OPTIMIZERS, steps=100)
    drawn = figure_of(config, {"adam": 55, "lion": 3})
    assert rendered(drawn).startswith(b"\x89PNG")
    loss, *norms, _ = drawn.axes
    rows = [round(panel.get_position().y0, 6) for panel in norms]
    full, rest = divmod(len(OPTIMIZERS), 5)
    lengths = [len(list(row)) for _, row in itertools.groupby(rows)]
    assert lengths == [5] * full + [rest] * (rest > 0)
    labeled = [bool(panel.get_ylabel()) for panel in norms]
    assert labeled == [i % 5 == 0 for i in range(len(OPTIMIZERS))]
    for panels in ([loss], norms):
        crosses = [
            (line.get_color(), *line.get_xdata())
            for panel in panels
            for line in panel.lines
            if line.get_marker() == "X"
        ]
        assert crosses == [("#D55E00", 55), ("#56B4E9", 3)]
    words = words_in(drawn)
    assert "adam  halted at 55" in words and "lion  halted at 3" in words
    assert any(text.startswith("spam  2.6") for text in words)


@pytest.mark.parametrize(
    ("settings", "halts"),
    [
        ({"optimizers": ("lion",), "steps": 1, "bursts": 0}, {}),
        ({"optimizers": ("spam",), "steps": 3}, {"spam": 1}),
        ({"optimizers": ("spam_chain", "sparse_spam"), "bursts": 0}, {}),
    ],
    ids=["one step", "halted at once", "no faults"],
)
def test_other_pictures_can_be_drawn(settings, halts):
    assert rendered(figure_of(RunConfig.from_settings(**settings), halts)).startswith(
        b"\x89PNG"
    )


def test_without_spam_or_faults_the_picture_does_not_mention_them():
    config = RunConfig.from_settings(
        optimizers=("adam", "lion"), bursts=0, tokenizer="bpe:300"
    )
    drawn = figure_of(config)
    words = " ".join(words_in(drawn))
    assert len(drawn.axes) == 3
    assert "SPAM" not in words and "faults" not in words
    assert "loss (nats per token)" in words


def test_a_long_run_keeps_its_spikes_in_few_points():
    config = RunConfig.from_settings(preset="1b", bursts=4, steps=20_000)
    rows = rows_of(config)
    sinks.steps_of(rows, "spam")[4567] |= {
        "grad_norm": 500.0,
        "clipped_grad_norm": 70.0,
    }
    drawn = figure.make_figure(rows, summary.summarize(rows, config), config)
    loss, norms, spikes = drawn.axes
    lines = [*loss.lines, *norms.lines, *spikes.lines]
    assert max(len(line.get_xdata()) for line in lines) == 2000
    before, after = (line.get_ydata() for line in norms.lines)
    assert before.max() == 500 and after.max() == 70
    assert spikes.get_ylabel() == "most in 10 steps"
    burst = loss.patches[0]
    assert (burst.get_x(), burst.get_width()) == (3999.5, 50)  # 3 would not be seen


def test_validation_losses_are_dots():
    config = RunConfig.from_settings(optimizers=("adam",), steps=400)
    rows = rows_of(config)
    loss, *_ = figure.make_figure(rows, summary.summarize(rows, config), config).axes
    (dots,) = loss.collections
    expected = [
        (row["step"], row["eval_loss"]) for row in sinks.evaluations_of(rows, "adam")
    ]
    np.testing.assert_array_equal(dots.get_offsets(), expected)


# ------------------------------------------------------------------------- report.md


def report_of(config, rows=None, names=TENSORS, halts=()):
    rows = rows_of(config, halts) if rows is None else rows
    summaries = summary.summarize(rows, config)
    return report.render(rows, summaries, config, names, "figure.png")


def table_of(text, *beginning):
    """The rows of the tables whose heading begins so, as lists of cells."""
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.M)
    tables = [
        [re.split(r" (?<!\\)\| ", row[2:-2]) for row in table.splitlines()]
        for table in tables
    ]
    return [t[2:] for t in tables if t[0][: len(beginning)] == [*beginning]]


ONE = RunConfig.from_settings(optimizers=("spam",), steps=40, eval_every=10)


def test_texts_do_not_break_a_table():
    odd = "a | b\nc"
    config = dataclasses.replace(ONE, data=odd)
    for table in table_of(report_of(config), "setting"):
        assert ["data", r"a \| b c"] in table


def test_changed_settings_come_before_all_settings():
    config = RunConfig.from_settings(preset="60m", learning_rate=3e-3, steps=20)
    changed, every = map(dict, table_of(report_of(config), "setting"))
    assert changed == {"learning_rate": "0.003", "steps": "20"}
    assert list(every) == list(config.settings())
    assert every["batch_size"] == "512" and every["data"] == "-"
    text = report_of(RunConfig.from_settings(preset="tiny"))
    assert "All settings are defaults of the preset tiny." in text


def test_worst_tensors_are_shown_with_their_scores():
    names = [f"tensor {i}" for i in range(14)]
    spikes = [max(0, i - 2) for i in range(14)]  # the first three never spiked
    scores = [[1.0] * 14, [float(15 * i) for i in range(14)], [1.0] * 14]
    scores[2][13] = None
    rows = [
        step_row("spam", i + 1, scores=score, spikes=spikes)
        for i, score in enumerate(scores)
    ]
    rows.append(evaluation_row("spam", 3))
    config = RunConfig.from_settings(optimizers=("spam",), steps=3, bursts=0)
    (table,) = table_of(report_of(config, rows, names), "tensor")
    assert [row[0] for row in table] == [f"tensor {i}" for i in range(13, 3, -1)]
    assert table[0] == ["tensor 13", "11", "1", "195.0", "2"]
    assert table[1] == ["tensor 12", "10", "0", "180.0", "2"]


def test_report_of_a_run_without_spikes_and_evaluations():
    text = report_of(ONE, halts={"spam": 2})
    assert "No tensor had a spike score above 10." in text
    assert "There was no evaluation." in text
    assert "](figure.png)" in text


def test_report_names_optimizers_that_halted_or_did_not_finish():
    config = RunConfig.from_settings(optimizers=("adam", "lion", "spam"), steps=40)
    rows = rows_of(config, {"adam": 31, "lion": 12})
    sinks.steps_of(rows, "lion")[-1].update(loss=2.0, update_norm=None)
    rows = [row for row in rows if row["optimizer"] != "spam" or row["step"] < 30]
    text = report_of(config, rows)
    assert "Halted at step 31: its loss was not finite." in text
    assert "Halted at step 12: its update was not finite." in text
    assert "Not finished: spam." in text
    (table,) = table_of(text, "optimizer")
    assert [row[:2] for row in table] == [
        ["adam", "halted at 31"],
        ["lion", "halted at 12"],
    ]


def test_evaluations_are_thinned_to_twenty():
    config = RunConfig.from_settings(
        optimizers=("adam", "spam"), steps=500, eval_every=5
    )
    rows = rows_of(config, {"spam": 300})
    (table,) = table_of(report_of(config, rows), "step")
    assert len(table) == 20
    assert table[0][0] == "5" and table[-1][0] == "500"
    losses = {
        row["step"]: row["eval_loss"] for row in sinks.evaluations_of(rows, "adam")
    }
    for step, loss, perplexity, *_ in table:
        assert loss == f"{losses[int(step)]:.3f}"
        assert perplexity == f"{math.exp(losses[int(step)]):,.2f}"
    assert table[0][3] != "-" and table[-1][3:] == ["-", "-"]


def test_rows_as_they_are_read_back_give_the_same_report(tmp_path):
    config = RunConfig.from_settings(optimizers=("adam", "spam"), steps=60)
    rows = rows_of(config, {"adam": 31})
    folder = RunFolder(tmp_path)
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.write_tensor_names(tuple(TENSORS))
    again = sinks.read(folder.metrics)
    report.write(folder, again, summary.summarize(again, config), config)
    text = folder.report.read_text(encoding="utf-8")
    assert text == report_of(config, rows).replace("figure.png", folder.figure.name)


# ----------------------------------------------------------------- sinks and summary


class FakeWandb(types.ModuleType):
    """The part of the package that the trainer uses."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.metrics, self.finished = [], [], [], 0

    def init(self, **kwargs):
        self.runs.append(kwargs)
        return self

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, numbers):
        self.logged.append(numbers)

    def finish(self):
        self.finished += 1


@pytest.mark.slow
def test_wandb_gets_the_numbers_if_installed(tmp_path, monkeypatch, capsys):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = ["--optimizer=adam", "--steps=10", "--no-spikes", "--wandb=spikes"]
    assert pretrain.main([*SMALL_FLAGS, *flags, f"--output={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    (run,) = wandb.runs
    assert (run["project"], run["id"]) == ("spikes", "run-adam")
    assert run["config"]["learning_rate"] == 4e-3
    assert wandb.metrics == [("*", "step")]
    assert [numbers["step"] for numbers in wandb.logged] == [*range(1, 11), 10]
    assert wandb.logged[0].keys() >= {"train/loss", "train/grad_norm"}
    names = json.loads((tmp_path / "run" / "tensors.json").read_text())
    assert wandb.logged[9].keys() >= {f"train_grad_norm/{name}" for name in names}
    assert wandb.logged[10].keys() == {"step", "eval/loss", "eval/perplexity"}
    assert wandb.finished == 1


def test_charts_have_names_in_groups():
    row = step_row("adam", 10) | {"batch": 27, "tokens_per_second": None}
    row |= {"loss": math.nan, "tensors": {"grad_norm": [1.0, math.inf]}}
    numbers = sinks.scalars(row, ["a", "blocks/b"])
    assert {name.partition("/")[0] for name in numbers} == {"train", "train_grad_norm"}
    assert math.isnan(numbers["train/loss"])  # TensorBoard draws a triangle there.
    assert numbers["train/batches_left_out"] == 17
    assert numbers["train_grad_norm/blocks/b"] == math.inf
    assert "train/tokens_per_second" not in numbers
    assert (
        sinks.scalars(row | {"step": 11}, ["a", "b"])
        .keys()
        .isdisjoint({"train_grad_norm/a"})
    )


def test_running_median_and_spikes():
    norms = np.array([1.0, 1.0, 11.0, np.nan, 1.0, 10.0])
    np.testing.assert_array_equal(
        summary.running_median(norms), [np.nan, 1.0, 1.0, 1.0, 1.0, 1.0]
    )
    # 11 > 10 x 1, and the NaN; 10 is not.
    assert summary.find_spikes(norms).nonzero()[0].tolist() == [2, 3]


def test_worst_loss_jump_looks_40_steps_ahead_and_20_back():
    losses = np.full(200, 2.0)
    losses[:79] = 9.0  # more than 20 steps before the burst at step 100
    losses[99] = 7.0  # the burst's own step: its loss is from before the update
    losses[139] = 2.5  # step 140, the last that counts
    losses[140] = 8.0
    assert summary.worst_loss_jump(losses, (100,)) == pytest.approx(0.5)
    assert summary.worst_loss_jump(losses, (100, 120)) == pytest.approx(8 - 2.25)
    assert summary.worst_loss_jump(losses, ()) is None
    losses[110] = np.nan
    assert math.isnan(summary.worst_loss_jump(losses, (100,)))
