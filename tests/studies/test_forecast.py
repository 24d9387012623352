"""Forecasting: the data and its corruption, the model, and the program."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forecast as program
from studies import forecast, task
from studies.forecast import Options
from trainer.config import RunConfig
from trainer.errors import UsageError

# The studies hardly depend on the version of Python: see docs/development.md.
pytestmark = pytest.mark.slow

TINY = Options(lookback=8, horizon=4, patch=4, width=8, heads=2, layers=1)
FLAGS = ["--lookback", "8", "--horizon", "4", "--patch", "4"]
FLAGS += ["--width", "8", "--heads", "2", "--layers", "1"]


def run_of(scenario="severity 5", **settings):
    config = RunConfig(bursts=0, **{"steps": 6, "batch_size": 3} | settings)
    return task.Run("adam", scenario, config)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Returns a CSV file of 100 rows, whose later rows are much larger."""
    path = tmp_path_factory.mktemp("series") / "series.csv"
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(100, 2))
    rows[70:] += 1000
    lines = [f"2020-01-01 {n},{a},{b}" for n, (a, b) in enumerate(rows)]
    path.write_text("\n".join(["date,a,b", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny(series):
    return forecast.Forecast(dataclasses.replace(TINY, csv=str(series)))


def batches_of(tiny, run):
    """Returns inputs and targets of all steps, as NumPy arrays."""
    batches, _ = tiny.inputs(run)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(tiny.batch))(*batches))


# --------------------------------------------------------------------------- the data


def test_the_weather_is_the_year_of_three_airports():
    names, values = forecast.read_csv(forecast.WEATHER)
    assert values.shape == (8730, 21) and len(names) == 21
    assert np.isfinite(values).all()


def test_a_packed_file_is_the_same(series, tmp_path):
    import lzma

    packed = tmp_path / "series.csv.xz"
    packed.write_bytes(lzma.compress(series.read_bytes()))
    names, values = forecast.read_csv(packed)
    assert names == ["a", "b"]
    np.testing.assert_array_equal(values, forecast.read_csv(series)[1])


def test_headings_in_another_encoding_and_empty_lines_are_read(tmp_path):
    path = tmp_path / "weather.csv"
    path.write_bytes("Date Time,SWDR (W/m²)\n1,2.5\n\n2,3.5\n".encode("latin-1"))
    names, values = forecast.read_csv(path)
    assert len(names) == 1 and values.tolist() == [[2.5], [3.5]]


def test_columns_are_standardized_by_training_rows_alone():
    values = np.random.default_rng(0).normal(3, 2, size=(200, 3)).astype(np.float32)
    values[:, 2] = 7  # does not vary
    train, test = forecast.split(values)
    assert (len(train), len(test)) == (140, 40)
    np.testing.assert_allclose(train[:, :2].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train[:, :2].std(0), 1, rtol=1e-5)
    np.testing.assert_array_equal(train[:, 2], 0)
    values[140:] += 1000
    np.testing.assert_array_equal(forecast.split(values)[0], train)


def test_training_and_test_have_no_row_in_common(tiny):
    """The rows of the test are those with large values."""
    inputs, targets = batches_of(tiny, run_of("severity 0", steps=200))
    _, test = tiny.inputs(run_of())
    assert max(np.abs(inputs).max(), np.abs(targets).max()) < 10 < test.min()
    assert inputs.shape == (200, 3, 8, 2) and targets.shape == (200, 3, 4, 2)


def test_targets_follow_their_inputs(tiny):
    inputs, targets = batches_of(tiny, run_of("severity 0"))
    window = np.concatenate([inputs, targets], axis=2)[2, 1]
    starts = [n for n in range(59) if (tiny.train[n] == window[0]).all()]
    (start,) = starts
    np.testing.assert_array_equal(window, tiny.train[start : start + 12])


def test_noise_hits_a_share_of_the_inputs_and_no_target(tiny):
    clean, targets = batches_of(tiny, run_of("severity 0", steps=400))
    noisy, same = batches_of(tiny, run_of("severity 2", steps=400))
    np.testing.assert_array_equal(targets, same)
    is_hit = noisy != clean
    assert is_hit.mean() == pytest.approx(0.01, abs=0.002)
    assert np.ptp(is_hit.mean(axis=(1, 2, 3))) > 0  # each step has noise of its own
    noise = (noisy - clean)[is_hit]
    assert noise.std() == pytest.approx(2 * np.abs(tiny.train).max(), rel=0.05)
    assert len(np.unique(noise)) > 0.99 * noise.size
    assert noisy.dtype == np.float32


def test_a_long_run_needs_no_memory_for_its_windows(tiny):
    batches, _ = tiny.inputs(run_of(steps=1000, batch_size=128))
    assert sum(x.nbytes for x in batches) < 1e6


def test_columns_of_huge_numbers_are_standardized():
    values = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    train, test = forecast.split(1e30 * values)
    np.testing.assert_allclose(train, forecast.split(values)[0], rtol=1e-5)
    assert np.isfinite(test).all() and test.dtype == np.float32


def test_records_of_another_file_of_the_same_name_are_not_read(series, tmp_path):
    def digest(path):
        return forecast.ForecastStudy(Options(csv=path)).data_digest(run_of())

    other = tmp_path / "series.csv"
    other.write_text(series.read_text() + "2020-01-02,1,2\n")
    assert digest(None) == ""
    assert len({digest(None), digest(str(series)), digest(str(other))}) == 3


def test_a_mark_of_the_encoding_is_no_part_of_the_first_heading(tmp_path):
    path = tmp_path / "sheet.csv"
    path.write_text("date,a\n2020-01-01,1\n", encoding="utf-8-sig")
    assert forecast.read_csv(path)[0] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a CSV file"),
        ("a,b\n", "has no rows of numbers"),
        ("date\n1\n", "has no columns of numbers"),
        ("date,a\n1,2\n2,x\n", "line 3: a must be a finite number, not 'x'"),
        ("a\n1\nnan\n", "line 3: a must be a finite number, not 'nan'"),
        ("a,b\n1,2\n3\n", "line 3: 1 values for 2 columns"),
        ("a\n" + "1\n" * 16, "the training part has 11 rows, and a window needs 12"),
    ],
)
def test_a_mistake_in_a_file_takes_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        program.main([*FLAGS, "--csv", str(path), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last and last.startswith("forecast.py: error: ")


def test_a_packed_file_that_is_cut_short_is_a_mistake(tmp_path):
    path = tmp_path / "short.csv.xz"
    path.write_bytes(forecast.WEATHER.read_bytes()[:1000])
    with pytest.raises(UsageError, match="is not a CSV file"):
        forecast.read_csv(path)


# -------------------------------------------------------------------------- the model


def test_the_forecast_of_a_shifted_and_scaled_window_is_shifted_and_scaled(tiny):
    model = tiny.model(0)
    window = jax.random.normal(jax.random.key(1), (2, 8, 2))
    scale, shift = jnp.array([[[3.0, 0.5]]]), jnp.array([[[-2.0, 40.0]]])
    plain, moved = model(window), model(window * scale + shift)
    assert plain.shape == (2, 4, 2)
    np.testing.assert_allclose(moved, plain * scale + shift, rtol=1e-3, atol=1e-3)


def test_a_column_is_forecast_from_its_own_past(tiny):
    model = tiny.model(0)
    window = jax.random.normal(jax.random.key(1), (1, 8, 2))
    other = model(window.at[..., 1].set(window[..., 1] ** 2))
    np.testing.assert_allclose(other[..., 0], model(window)[..., 0], rtol=1e-5)
    assert np.abs(other[..., 1] - model(window)[..., 1]).max() > 1e-3


def test_the_test_error_is_the_mean_over_all_windows(tiny):
    params = tiny.init(0)
    _, test = tiny.inputs(run_of())
    error = tiny.error(params, test[:, :8], test[:, 8:])
    np.testing.assert_allclose(tiny.evaluate(params, test), error, rtol=1e-5)


# ------------------------------------------------------------------------ the program


def test_the_program_is_resumable_and_writes_its_files(series, tmp_path, capsys):
    flags = [*FLAGS, "--csv", str(series), "--output", str(tmp_path), "--workers", "1"]
    flags += ["--optimizer", "adam", "--steps", "12"]
    flags += ["--severity", "0", "5", "--learning-rate", "0.01"]
    assert program.main(flags) == 0
    names = sorted(x.name for x in tmp_path.iterdir())
    assert names == ["forecast.md", "forecast.png", "runs", "summary.json"]
    page = (tmp_path / "forecast.md").read_text()
    assert "| test error |" in page and "### severity 5" in page
    (clean, noisy) = json.loads((tmp_path / "summary.json").read_text())["forecast"]
    assert f"| {clean['final_loss']:.4f} |" in page
    assert clean["final_loss"] != noisy["final_loss"]
    first = {x: x.stat().st_mtime_ns for x in (tmp_path / "runs").iterdir()}
    assert program.main([*flags, "--seeds", "2"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert all(x.stat().st_mtime_ns == time for x, time in first.items())


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--csv", "nowhere.csv"], 1, "nowhere.csv: No such file or directory"),
        (["--severity", "-1"], 2, "--severity: must be a finite number >= 0"),
        (["--width", "30"], 2, "--width must be a multiple of --heads, which is 4"),
        (["--lookback", "8"], 2, "--lookback must be at least --patch, which is 16"),
        (["--share", "2"], 2, "argument --share"),
        (["--optimizer", "adamz"], 2, "invalid choice: 'adamz'"),
        (["--optimizer", "galore"], 2, "invalid choice: 'galore'"),
    ],
)
def test_a_mistake_takes_one_line(flags, code, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        program.main([*flags, "--output", str(tmp_path)])
    assert stopped.value.code == code
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_embedded_series_is_small():
    assert pathlib.Path(forecast.WEATHER).stat().st_size < 200_000
