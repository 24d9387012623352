"""What a run shows at its end: summary, picture and page, from rows made up here."""

import base64
import dataclasses
import html.parser
import io
import itertools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spam_optax
from trainer import hosts, training
from trainer.config import DEMONSTRATION, OPTIMIZERS, RunConfig, complete
from trainer.output import analysis, console, picture, records, report
from trainer.run_folder import RunFolder

TENSORS = ["attention/query/kernel", "embed/embedding", "norm/scale"]
PNG = b"\x89PNG not really"


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
    config = RunConfig(optimizers=names, steps=4, bursts=0)
    rows = [step_row(name, step) for name in names[:4] for step in (1, 2)]
    rows += [evaluation_row("adam", 2), step_row("adam", 3, loss=None)]
    rows += [step_row("adamw", 3, update_norm=None)]
    rows += [step_row("lion", 3), step_row("lion", 4), evaluation_row("lion", 4, 1.5)]
    summary = analysis.summarize(rows, config)
    assert {name: values["halted_at"] for name, values in summary.items()} == {
        "adam": 3,
        "adamw": 3,
        "lion": None,
    }
    for name in ("adam", "adamw"):
        assert summary[name]["final_eval_loss"] is None
        assert summary[name]["final_eval_perplexity"] is None
    assert summary["lion"]["final_eval_loss"] == 1.5
    assert summary["lion"]["final_eval_perplexity"] == pytest.approx(math.exp(1.5))


def test_an_optimizer_that_was_resumed_after_a_halt_has_not_halted():
    config = RunConfig(optimizers=("adam",), steps=3, bursts=0)
    rows = [step_row("adam", step) for step in (1, 2, 3)] + [evaluation_row("adam", 3)]
    assert analysis.summarize(rows, config)["adam"]["halted_at"] is None


def test_a_final_loss_that_is_not_finite_is_no_halt():
    config = RunConfig(optimizers=("adam",), steps=1, bursts=0)
    rows = [step_row("adam", 1), evaluation_row("adam", 1)]
    rows[1] |= {"eval_loss": None, "eval_perplexity": None}
    values = analysis.summarize(rows, config)["adam"]
    assert values["final_eval_loss"] is None and values["halted_at"] is None


def test_utilization_is_the_median_of_the_steps_that_know_it():
    config = RunConfig(optimizers=("adam",), steps=4, bursts=0)
    known = [None, 0.2, 0.5, 0.3]
    rows = [step_row("adam", i + 1, flops_utilization=x) for i, x in enumerate(known)]
    rows.append(evaluation_row("adam", 4))
    assert analysis.summarize(rows, config)["adam"]["flops_utilization"] == 0.3
    for row in rows[:4]:
        row["flops_utilization"] = None
    assert analysis.summarize(rows, config)["adam"]["flops_utilization"] is None


@pytest.mark.parametrize("length", [0, 1, 2, 7, 60])
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_running_median_is_that_of_the_finite_values_before(length, window):
    rng = np.random.default_rng(length)
    values = rng.lognormal(size=length)
    values[rng.random(length) < 0.3] = np.nan
    values[rng.random(length) < 0.1] = np.inf
    medians = analysis.running_median(values, window)
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
    found = analysis.tensor_spikes(steps, ["a", "b", "c", "d"])
    assert [spikes[:5] for spikes in found] == [
        ("b", 3, 0, 50.0, 5),
        ("a", 2, 0, 90.0, 6),
        ("d", 1, 1, 9.0, 5),
        ("c", 0, 0, 1.5, 6),
    ]
    np.testing.assert_array_equal(found[2].scores, [9.0, np.nan, 8.0])


def test_tensors_with_equally_many_spikes_are_sorted_by_their_size():
    row = step_row("spam", 1, scores=[20.0, 40.0, None], spikes=[1, 1, 1])
    found = analysis.tensor_spikes([row], ["small", "large", "not finite"])
    assert [spikes.name for spikes in found] == ["not finite", "large", "small"]
    assert found[0].largest is None and found[0].largest_step is None


def test_thinning_keeps_spikes_and_bounds_the_points():
    steps = np.arange(1, 100_001)
    values = np.ones(100_000)
    values[12_345] = 1000.0
    values[50_000] = np.nan
    size = analysis.bucket_size(len(steps))
    at, largest = analysis.thin(steps, values, analysis.largest, size)
    assert len(at) == len(largest) == 2000
    assert at[np.argmax(largest)] == 12_301  # of the 50 steps from there on
    assert np.sort(largest)[-2] == 1 and not np.isnan(largest).any()
    _, mean = analysis.thin(steps, values, analysis.mean, size)
    assert mean.max() == pytest.approx((49 + 1000) / 50)
    assert np.median(mean) == 1 and not np.isnan(mean).any()


@pytest.mark.parametrize("reduce", [analysis.largest, analysis.mean])
def test_thinning_leaves_a_short_curve_as_it_is(reduce):
    steps, values = np.arange(1.0, 2000.0), np.random.default_rng(0).random(1999)
    values[3] = np.nan
    size = analysis.bucket_size(len(steps))
    at, thinned = analysis.thin(steps, values, reduce, size)
    np.testing.assert_array_equal(at, steps)
    np.testing.assert_array_equal(thinned, values)
    assert [len(part) for part in analysis.thin(steps[:0], values[:0], reduce, 1)] == [
        0,
        0,
    ]


@pytest.mark.parametrize("steps", [1, 1999, 2000, 2001, 3999, 4001, 99_999])
def test_curves_have_at_most_2000_points(steps):
    points = math.ceil(steps / analysis.bucket_size(steps))
    assert points <= 2000
    assert points == steps or points > 1000


# -------------------------------------------------------------------- the summary table


def summary_of(name="spam", **values):
    empty = dict.fromkeys(analysis.COLUMNS) | {"halted_at": None}
    return {name: empty | {"spikes_seen": 0, "spikes_clipped": 0} | values}


def test_columns_are_those_that_say_something():
    plain, tokens = RunConfig(), RunConfig(tokenizer="bpe:512", bursts=0)
    summary = summary_of()
    assert set(analysis.COLUMNS) - set(analysis.columns(summary, plain)) == {
        "final_eval_perplexity",
        "flops_utilization",
    }
    assert set(analysis.COLUMNS) - set(
        analysis.columns(summary_of(flops_utilization=0.4), tokens)
    ) == {"worst_loss_jump", "worst_burst"}


def test_table_says_where_an_optimizer_halted(capsys):
    config = RunConfig(optimizers=("adam", "spam"))
    summary = summary_of("adam", halted_at=12_345) | summary_of(final_eval_loss=2.5)
    console.show(summary, config)
    adam, spam = lines_with(capsys.readouterr().out, "adam", "spam")
    assert "halted at 12,345" in adam
    assert "halted" not in spam and "2.500" in spam


def lines_with(text, *words):
    """The first line with each of the words."""
    return [next(line for line in text.splitlines() if word in line) for word in words]


def test_widest_table_is_not_cut(capsys):
    config = complete({"preset": "1b", "optimizers": OPTIMIZERS, "bursts": 4})
    config = dataclasses.replace(config, tokenizer="t5-base")
    values = {
        "halted_at": 99_999,
        "final_eval_perplexity": 12_345.67,
        "worst_loss_jump": -1.234,
        "worst_burst": 1234.5,
        "spikes_seen": 99_999,
        "spikes_clipped": 1_234_567_890,
        "tokens_per_second": 1_234_567.0,
        "flops_utilization": 0.415,
    }
    summary = {name: summary_of(name, **values)[name] for name in OPTIMIZERS}
    console.show(summary, config)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 120
    for line in lines_with(out, *OPTIMIZERS):
        assert "12,345.67" in line and "1,234,567,890" in line and "41.5%" in line
    assert "Losses are in nats per token." in out and "MFU:" in out


def test_notes_explain_the_columns_shown_and_no_others():
    notes = console.notes(summary_of(), RunConfig(bursts=0))
    assert notes.startswith("Losses are in nats per byte. Spikes seen: steps")
    assert "burst" not in notes and "MFU" not in notes
    assert "Worst burst: the" in console.notes(summary_of(), RunConfig())


@pytest.mark.parametrize(
    ("bursts", "left", "said"),
    [
        (4, 151.0, "Why SPAM alone does not stop a burst"),
        (3, 151.0, "SPAM did not clip the bursts of steps 100, 200, 300: they came at"),
        (3, 5.0, ""),
    ],
)
def test_a_burst_that_got_through_is_explained(bursts, left, said, capsys):
    """Three bursts in 400 steps fall on the resets."""
    config = RunConfig(bursts=bursts, steps=400)
    console.show(summary_of(worst_burst=left), config)
    out = capsys.readouterr().out
    assert said in out
    assert ("SPAM did not clip" in out) + ("Why SPAM" in out) == bool(said)


# ---------------------------------------------------------------- on the console


def shown_by_progress(capsys, names=DEMONSTRATION, **row):
    config = RunConfig(optimizers=names, steps=200)
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


@pytest.mark.parametrize("terminal", [False, True])
def test_only_host_0_shows_progress(capsys, monkeypatch, terminal):
    monkeypatch.setattr(hosts, "is_main", lambda: False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    assert shown_by_progress(capsys) == []


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 1, 1), "on 1 cpu; 400"), ((1, 4, 2), "8 cpu (data 1 x fsdp 4 x tensor 2);")],
)
def test_announcement_names_a_mesh_of_several_devices(
    capsys, monkeypatch, shape, words
):
    monkeypatch.setattr(training, "abstract_params", lambda task: np.zeros(1234))
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    console.announce(types.SimpleNamespace(config=RunConfig(), mesh=mesh))
    out = capsys.readouterr().out
    assert out.startswith("tiny model, 1,234 parameters, on ")
    assert words in out
    assert "Faults in steps 80-82, 160-162, 240-242, 320-322\n" in out


def test_moments_of_an_optimizer_are_said_in_one_line():
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
    return picture.figure(rows, analysis.summarize(rows, config), config)


def words_in(figure):
    found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return [artist.get_text() for artist in found]


def rendered(figure):
    """Draws the figure; that of a layout that does not fit is a warning, an error."""
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def test_every_optimizer_has_a_style_of_its_own():
    assert set(picture.STYLES) == set(OPTIMIZERS)
    assert len(set(picture.STYLES.values())) == len(OPTIMIZERS)
    assert picture.FAULT not in {color for color, _ in picture.STYLES.values()}


def test_the_demonstration_keeps_its_picture():
    figure = figure_of(RunConfig())
    loss, *norms, spikes = figure.axes
    assert tuple(figure.get_size_inches()) == (11, 9)
    assert [panel.get_title("left") for panel in norms] == list(DEMONSTRATION)
    thick = [line for line in loss.lines if line.get_linewidth() == 1.8]
    assert [(line.get_color(), line.get_linestyle()) for line in thick] == [
        ("#D55E00", "-"),
        ("#0072B2", "--"),
        ("#009E73", "-"),
        ("#000000", "--"),
    ]
    assert loss.get_ylabel() == "loss (nats per byte)"
    assert "Yellow: faults" in loss.get_title("left")
    assert "Dotted: its momentum resets" in spikes.get_title("left")


def test_all_optimizers_of_which_two_halted():
    config = RunConfig(optimizers=OPTIMIZERS, steps=100)
    figure = figure_of(config, {"adam": 55, "lion": 3})
    assert rendered(figure).startswith(b"\x89PNG")
    loss, *norms, _ = figure.axes
    rows = [round(panel.get_position().y0, 6) for panel in norms]
    full, rest = divmod(len(OPTIMIZERS), 4)
    lengths = [len(list(row)) for _, row in itertools.groupby(rows)]
    assert lengths == [4] * full + [rest] * (rest > 0)
    labeled = [bool(panel.get_ylabel()) for panel in norms]
    assert labeled == [i % 4 == 0 for i in range(len(OPTIMIZERS))]
    for panels in ([loss], norms):
        crosses = [
            (line.get_color(), *line.get_xdata())
            for panel in panels
            for line in panel.lines
            if line.get_marker() == "X"
        ]
        assert crosses == [("#D55E00", 55), ("#56B4E9", 3)]
    words = words_in(figure)
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
    assert rendered(figure_of(RunConfig(**settings), halts)).startswith(b"\x89PNG")


def test_without_spam_or_faults_the_picture_does_not_speak_of_them():
    config = RunConfig(optimizers=("adam", "lion"), bursts=0, tokenizer="bpe:300")
    figure = figure_of(config)
    words = " ".join(words_in(figure))
    assert len(figure.axes) == 3
    assert "SPAM" not in words and "faults" not in words
    assert "loss (nats per token)" in words


def test_a_long_run_keeps_its_spikes_in_few_points():
    config = complete({"preset": "1b", "bursts": 4, "steps": 20_000})
    rows = rows_of(config)
    records.steps_of(rows, "spam")[4567] |= {
        "grad_norm": 500.0,
        "clipped_grad_norm": 70.0,
    }
    figure = picture.figure(rows, analysis.summarize(rows, config), config)
    loss, norms, spikes = figure.axes
    lines = [*loss.lines, *norms.lines, *spikes.lines]
    assert max(len(line.get_xdata()) for line in lines) == 2000
    before, after = (line.get_ydata() for line in norms.lines)
    assert before.max() == 500 and after.max() == 70
    assert spikes.get_ylabel() == "most in 10 steps"
    burst = loss.patches[0]
    assert (burst.get_x(), burst.get_width()) == (3999.5, 50)  # 3 would not be seen


def test_validation_losses_are_dots():
    config = RunConfig(optimizers=("adam",), steps=400)
    rows = rows_of(config)
    loss, *_ = picture.figure(rows, analysis.summarize(rows, config), config).axes
    (dots,) = loss.collections
    expected = [
        (row["step"], row["eval_loss"]) for row in records.evaluations_of(rows, "adam")
    ]
    np.testing.assert_array_equal(dots.get_offsets(), expected)


# ----------------------------------------------------------------------- report.html


class Page(html.parser.HTMLParser):
    """A page's elements, its text, and its tables as lists of rows of cells."""

    VOID = {"meta", "img"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.tables = [], [], []
        self._open, self._cell = [], None
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *beginning):
        """The rows below the heading that begins so."""
        (rows,) = [t[1:] for t in self.tables if t[0][: len(beginning)] == [*beginning]]
        return rows

    @property
    def text(self):
        return " ".join(self.texts)


def page_of(config, rows=None, names=TENSORS, halts=()):
    rows = rows_of(config, halts) if rows is None else rows
    summary = analysis.summarize(rows, config)
    return report.render(rows, summary, config, names, PNG)


ONE = RunConfig(optimizers=("spam",), steps=40, eval_every=10)


def test_page_needs_nothing_beside_it():
    text = page_of(ONE)
    page = Page(text)
    names = {name for name, _ in page.elements}
    assert names.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    (image,) = page.all("img")
    assert image["src"] == "data:image/png;base64," + base64.b64encode(PNG).decode()
    for name, attributes in page.elements:
        assert not {key for key in attributes if key.startswith("on")}
        assert {"href", "src", "srcset", "data"} & set(attributes) <= {"src"}, name
    _, style = text.split("<style>")
    style, _ = style.split("</style>")
    assert "@import" not in style and "url(" not in style and "//" not in style
    assert "prefers-color-scheme: dark" in style
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in (
        page.all("meta")
    )


def test_picture_has_a_text_for_those_who_do_not_see_it():
    config = RunConfig(optimizers=("adam", "spam"), steps=40)
    (image,) = Page(page_of(config, halts={"adam": 31})).all("img")
    assert "adam halted at step 31, spam 2.1" in image["alt"]


def test_what_comes_from_outside_is_escaped():
    evil = "</td><script>alert('1')</script>&amp;\"<img src=x onerror=y>"
    config = dataclasses.replace(ONE, data=evil, tokenizer=evil)
    rows = rows_of(config)
    rows[-2]["tensors"] = {"spike_score": [20.0], "spike_steps": [1]}
    for row in rows[:-2]:
        if "loss" in row:
            row["tensors"] = {"spike_score": [1.0], "spike_steps": [0]}
    page = Page(page_of(config, rows, [evil]))
    assert not page.all("script") and len(page.all("img")) == 1
    assert page.table("tensor")[0][0] == evil
    assert all(["data", evil] in t for t in page.tables if "setting" in t[0])
    assert any(svg["aria-label"].endswith(evil) for svg in page.all("svg"))


def test_settings_shown_first_are_those_that_the_preset_does_not_bring():
    config = complete({"preset": "60m", "learning_rate": 3e-3, "steps": 20})
    changed, every = [
        dict(table[1:])
        for table in Page(page_of(config)).tables
        if "setting" in table[0]
    ]
    assert changed == {"learning_rate": "0.003", "steps": "20"}
    assert list(every) == [field.name for field in dataclasses.fields(RunConfig)]
    assert every["batch_size"] == "512" and every["data"] == "-"
    page = Page(page_of(complete({"preset": "tiny"})))
    assert "All settings are defaults of the preset tiny." in page.text


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
    config = RunConfig(optimizers=("spam",), steps=3, bursts=0)
    page = Page(page_of(config, rows, names))
    table = page.table("tensor", "steps")
    assert [row[0] for row in table] == [f"tensor {i}" for i in range(13, 3, -1)]
    assert table[0][:5] == ["tensor 13", "11", "1", "195.0", "2"]
    assert table[1][:5] == ["tensor 12", "10", "0", "180.0", "2"]
    paths = page.all("path")[:6]
    assert [path["class"] for path in paths[:3]] == ["bars", "nonfinite", "limit"]
    width = report.BARS / 3
    (bar,) = paths[0]["d"].split("M")[1:]  # 1.0 is the baseline
    assert bar.startswith(f"{2 * width:.1f} {report.HEIGHT}V0.0")  # the highest of all
    assert paths[1]["d"] == f"M{3 * width:.1f} {report.HEIGHT}V0"
    assert paths[4]["d"] == ""


def test_bars_stay_few_and_keep_the_spike():
    config = RunConfig(optimizers=("spam",), steps=20_000, bursts=0)
    rows = rows_of(config)
    for row in rows:
        if "loss" in row:
            row["tensors"] = {"spike_score": [2.0], "spike_steps": [1]}
    records.steps_of(rows, "spam")[777]["tensors"]["spike_score"] = [1e4]
    (bars, _, limit) = Page(page_of(config, rows, ["a"])).all("path")
    heights = [float(bar.split("V")[1]) for bar in bars["d"].split("M")[1:]]
    assert len(heights) == report.BARS
    assert sorted(heights)[0] == 0.0
    assert sorted(heights)[1] > float(limit["d"].split()[1].split("H")[0])


def test_a_run_without_spikes_says_so():
    page = Page(page_of(ONE))
    assert "No tensor had a spike score above 10." in page.text
    assert not page.all("svg")


def test_page_tells_who_halted_and_who_did_not_finish():
    config = RunConfig(optimizers=("adam", "lion", "spam"), steps=40)
    rows = rows_of(config, {"adam": 31, "lion": 12})
    records.steps_of(rows, "lion")[-1].update(loss=2.0, update_norm=None)
    rows = [row for row in rows if row["optimizer"] != "spam" or row["step"] < 30]
    page = Page(page_of(config, rows))
    assert "Halted at step 31: its loss was not finite." in page.text
    assert "Halted at step 12: its update was not finite." in page.text
    assert "Not finished: spam." in page.text
    assert [row[:2] for row in page.table("optimizer")] == [
        ["adam", "halted at 31"],
        ["lion", "halted at 12"],
    ]


def test_evaluations_are_thinned_to_twenty():
    config = RunConfig(optimizers=("adam", "spam"), steps=500, eval_every=5)
    rows = rows_of(config, {"spam": 300})
    table = Page(page_of(config, rows)).table("step")
    assert len(table) == 20
    assert table[0][0] == "5" and table[-1][0] == "500"
    losses = {
        row["step"]: row["eval_loss"] for row in records.evaluations_of(rows, "adam")
    }
    for step, loss, perplexity, *_ in table:
        assert loss == f"{losses[int(step)]:.3f}"
        assert perplexity == f"{math.exp(losses[int(step)]):,.2f}"
    assert table[0][3] != "-" and table[-1][3:] == ["-", "-"]


def test_a_run_that_halted_before_any_evaluation_has_a_page():
    page = Page(page_of(ONE, halts={"spam": 2}))
    assert "There was no evaluation." in page.text


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    rows = rows_of(ONE)
    summary = analysis.summarize(rows, ONE)
    folder.picture.write_bytes(PNG)
    folder.write_tensor_names(tuple(TENSORS))
    report.write(folder, rows, summary, ONE)
    page = folder.report.read_text(encoding="utf-8")
    assert page == report.render(rows, summary, ONE, TENSORS, PNG)

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        report.write(folder, rows[:1], {}, ONE)
    assert folder.report.read_text(encoding="utf-8") == page


def test_rows_as_they_are_read_back_give_the_same_page(tmp_path):
    config = RunConfig(optimizers=("adam", "spam"), steps=60)
    rows = rows_of(config, {"adam": 31})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert page_of(config, records.read(path)) == page_of(config, rows)
