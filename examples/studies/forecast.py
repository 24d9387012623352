"""Time-series forecasting with corrupted inputs: data, model and study.

The model is in the style of PatchTST (Nie et al., 2023, arXiv 2211.14730). The
corruption is that of SPAM (arXiv 2501.06842): a share of the input values gets normal
noise, whose deviation is the severity times the largest value.

Letters in shape comments: B windows, C columns, L hours of input, H hours of forecast,
N patches, D width.
"""

import csv
import dataclasses
import functools
import hashlib
import lzma
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from studies import encoder, task
from studies.task import Run, Score, setting
from trainer import cli
from trainer.errors import UsageError

WEATHER = pathlib.Path(__file__).parents[1] / "data" / "weather_nyc_2013.csv.xz"
TRAIN, VALIDATION = 0.7, 0.1  # shares of the rows; the rest are tests, as published
DATES = ("date", "time", "date time", "datetime", "timestamp")  # of no series
TEST_WINDOWS = 200  # at most, evenly spaced


@dataclasses.dataclass(frozen=True)
class Options:
    """What is forecast, from what, and by which model."""

    csv: str | None = setting(
        None,
        "a CSV file with one column per series, such as ETTh1.csv or the Weather file"
        " of Jena, also packed as .xz (default: the weather of New York's airports)",
        str,
        "FILE",
    )
    share: float = setting(
        0.01, "share of the training inputs that get noise", cli.real(0, 1), "X"
    )
    lookback: int = setting(96, "rows that the model reads")  # L
    horizon: int = setting(12, "rows that it forecasts")  # H
    patch: int = setting(
        16, "rows of a patch, half of which it shares with the next one", cli.whole(2)
    )
    width: int = setting(32, "width of the model, a multiple of --heads")  # D
    heads: int = setting(4, "attention heads")
    layers: int = setting(2, "layers, each attention and a feed-forward layer")

    def __post_init__(self):
        if self.lookback < self.patch:
            raise UsageError(
                f"--lookback must be at least --patch, which is {self.patch}, not"
                f" {self.lookback}"
            )
        encoder.check_heads(self.width, self.heads)


# --------------------------------------------------------------------------- the data


def read_csv(path: pathlib.Path) -> tuple[list[str], np.ndarray]:
    """Reads the columns of a CSV file, which may be packed as .xz.

    The first row has their names. Columns of dates and times are left out.

    Returns:
      The names, and the values as float32 of shape (rows, columns).

    Raises:
      UsageError: If a value is not a finite number, or there are no rows.
      OSError: If the file cannot be read.
    """
    unpack = lzma.open if path.suffix == ".xz" else open
    try:
        # Published files have signs of units in their headings in another encoding.
        # Spreadsheets put a mark before the first one.
        with unpack(
            path, "rt", encoding="utf-8-sig", errors="replace", newline=""
        ) as file:
            names, *rows = csv.reader(file)
    except (EOFError, ValueError, csv.Error, lzma.LZMAError) as error:
        raise UsageError(f"{path} is not a CSV file ({error})") from error
    rows = [(number, row) for number, row in enumerate(rows, start=2) if row]
    kept = [n for n, name in enumerate(names) if name.strip().lower() not in DATES]
    if not rows or not kept:
        raise UsageError(f"{path} has no {'columns' if rows else 'rows'} of numbers")
    values = np.empty((len(rows), len(kept)), np.float32)
    for values_of_row, (number, row) in zip(values, rows, strict=True):
        if len(row) != len(names):
            raise UsageError(
                f"{path}, line {number}: {len(row)} values for {len(names)} columns"
            )
        for place, column in enumerate(kept):
            values_of_row[place] = read_number(row[column])
            if not math.isfinite(values_of_row[place]):
                raise UsageError(
                    f"{path}, line {number}: {names[column]} must be a finite number,"
                    f" not {row[column]!r}"
                )
    return [names[n] for n in kept], values


@functools.cache
def file_digest(path: str) -> str:
    """Returns a digest of a file's content, which is read once."""
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


def read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def split(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits rows in time, into training and test.

    The columns are standardized by mean and deviation of the training rows. The rows of
    validation between the two are not used, since every row of the table is reported.
    """
    train_end = round(TRAIN * len(values))
    test_start = round((TRAIN + VALIDATION) * len(values))
    values = values.astype(np.float64)  # the squares of large values are finite
    train = values[:train_end]
    deviation = train.std(axis=0)
    scaled = (values - train.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    scaled = scaled.astype(np.float32)
    return scaled[:train_end], scaled[test_start:]


def windows(rows: jax.typing.ArrayLike, starts: jax.typing.ArrayLike, length: int):
    """Returns the windows that begin at `starts`, of shape (B, length, C)."""
    return rows[starts[:, None] + np.arange(length)[None]]


def corrupt(
    key: jax.Array,
    inputs: jax.Array,
    share: float,
    deviation: jax.typing.ArrayLike,
) -> jax.Array:
    """Adds normal noise to a random share of the values."""
    hit_key, noise_key = jax.random.split(key)
    is_hit = jax.random.bernoulli(hit_key, share, inputs.shape)
    noise = deviation * jax.random.normal(noise_key, inputs.shape)
    return jnp.where(is_hit, inputs + noise, inputs)


# -------------------------------------------------------------------------- the model


class PatchForecaster(nnx.Module):
    """Forecasts each column from its own past, with weights that all columns share.

    Each window is normalized by its own mean and deviation, and the forecast is scaled
    back by the same (reversible instance normalization).
    """

    def __init__(self, options: Options, columns: int, *, rngs: nnx.Rngs):
        self.options = options
        self.stride = options.patch // 2
        patches = (options.lookback - options.patch) // self.stride + 1
        self.gain = nnx.Param(jnp.ones(columns))
        self.offset = nnx.Param(jnp.zeros(columns))
        self.embed = nnx.Linear(options.patch, options.width, rngs=rngs)
        self.position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (patches, options.width))
        )
        self.blocks = nnx.List(
            [
                encoder.Block(options.width, options.heads, rngs=rngs)
                for _ in range(options.layers)
            ]
        )
        self.norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.head = nnx.Linear(patches * options.width, options.horizon, rngs=rngs)

    def __call__(self, x_BLC: jax.Array) -> jax.Array:
        mean = x_BLC.mean(axis=1, keepdims=True)
        deviation = jnp.sqrt(x_BLC.var(axis=1, keepdims=True) + 1e-5)
        gain, offset = self.gain[None, None], self.offset[None, None]
        x_BLC = (x_BLC - mean) / deviation * gain + offset
        y_BHC = self.forecast(x_BLC.swapaxes(1, 2)).swapaxes(1, 2)
        return (y_BHC - offset) / (gain + 1e-10) * deviation + mean

    def forecast(self, x_BCL: jax.Array) -> jax.Array:
        B, C, L = x_BCL.shape
        starts = np.arange(0, L - self.options.patch + 1, self.stride)
        places = starts[:, None] + np.arange(self.options.patch)
        patches = x_BCL.reshape(B * C, L)[:, places]  # (B C, N, patch)
        x = self.embed(patches) + self.position[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).reshape(B * C, -1)).reshape(B, C, -1)


# -------------------------------------------------------------------------- the study


def scenario_of(text: str) -> str:
    """Returns the scenario of the severity that a flag names."""
    return f"severity {cli.real()(text):g}"


def severity_of(scenario: str) -> float:
    return float(scenario.removeprefix("severity "))


class Forecast(task.Task):
    """Minimizes the squared error of the forecast of standardized columns."""

    def __init__(self, options: Options):
        self.options = options
        self.names, values = read_csv(
            WEATHER if options.csv is None else pathlib.Path(options.csv)
        )
        self.train, test = split(values)
        length = options.lookback + options.horizon
        for part, rows in (("training", self.train), ("test", test)):
            if len(rows) < length:
                raise UsageError(
                    f"the {part} part has {len(rows)} rows, and a window needs {length}"
                )
        starts = np.linspace(0, len(test) - length, TEST_WINDOWS).round().astype(int)
        self.test = windows(test, np.unique(starts), length)
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: self.model(0)))

    def model(self, seed: jax.typing.ArrayLike) -> PatchForecaster:
        rngs = nnx.Rngs(jax.random.key(seed))
        return PatchForecaster(self.options, len(self.names), rngs=rngs)

    def inputs(self, run: Run) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Returns where the windows of each step begin, its seed, and its noise.

        The deviation of the noise is the severity times the largest training value. A
        step makes its windows itself: those of a long run would not fit into memory.
        """
        config, options = run.config, self.options
        rng = np.random.default_rng(config.seed)
        last = len(self.train) - options.lookback - options.horizon
        starts = rng.integers(last + 1, size=(config.steps, config.batch_size))
        seeds = rng.integers(2**32, size=config.steps, dtype=np.uint32)
        deviation = severity_of(run.scenario) * np.abs(self.train).max()
        deviations = np.full(config.steps, deviation, np.float32)
        return (starts.astype(np.int32), seeds, deviations), self.test

    def batch(
        self,
        starts: jax.Array,
        seed: jax.typing.ArrayLike,
        deviation: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the inputs and targets of a step, of shape (B, L or H, C)."""
        options = self.options
        length = options.lookback + options.horizon
        rows = windows(jnp.asarray(self.train), starts, length)
        inputs, targets = jnp.split(rows, [options.lookback], axis=1)
        key = jax.random.key(seed)
        return corrupt(key, inputs, options.share, deviation), targets

    def init(self, seed: jax.typing.ArrayLike) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(self.model(seed)))

    def error(self, params: optax.Params, inputs, targets) -> jax.Array:
        forecast = nnx.merge(self.graphdef, params)(inputs)
        return jnp.mean((forecast - targets) ** 2)

    def loss(self, params, batch):
        return self.error(params, *self.batch(*batch))

    def evaluate(self, params, test):
        """Returns the mean squared error on clean windows after the training rows."""
        lookback = self.options.lookback

        def of_window(window):
            return self.error(params, window[None, :lookback], window[None, lookback:])

        return jax.lax.map(of_window, test, batch_size=16).mean()


class ForecastStudy(task.TaskStudy):
    """Trains forecasters under several optimizers and severities."""

    score = Score(
        "test error",
        "the mean squared error of the standardized columns, on test windows without"
        " noise,",
        digits=4,
    )

    def data_digest(self, run: Run) -> str:
        del run
        return "" if self.options.csv is None else file_digest(self.options.csv)

    def task(self, run: Run) -> Forecast:
        del run
        return Forecast(self.options)
