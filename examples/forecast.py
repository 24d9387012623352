"""Forecast time series with corrupted inputs: the error of several optimizers.

    python examples/forecast.py

trains a small model in the style of PatchTST on the weather of three airports: 21
columns, hourly, of the year 2013. It reads 192 hours and forecasts the next 96. A share
of the training inputs gets noise, as in the SPAM paper. The deviation of the noise is
--severity times the largest value. The test windows have no noise.

Every optimizer is trained with every learning rate, severity and seed. A run leaves a
record and is not repeated: after Ctrl-C the same command continues. The program writes
to the folder --output:

    runs/*.json    settings, losses and gradient norms of every run
    forecast.md    the test error at the best learning rate, and its spread
    summary.json   the same numbers
    forecast.png   test error over learning rate, one panel for each optimizer
"""

import dataclasses
from collections.abc import Sequence

from studies import engine, forecast, program
from trainer import cli
from trainer.config import RunConfig

BASE = RunConfig(steps=200, batch_size=4, bursts=0)
OPTIMIZERS = ("adam", "adam_clip", "spam", "stable_spam")
RATES = (1e-3, 4e-3)
SEVERITIES = (0.0, 5.0)
EXAMPLES = """
examples:
  a sweep with three seeds        forecast.py --severity 0 1 2 3 4 5 --seeds 3
                                    --learning-rate 5e-4 1e-3 2e-3 4e-3 8e-3
  your own columns                forecast.py --csv measurements.csv
  the published size              forecast.py --csv weather.csv --lookback 336
                                    --width 128 --heads 16 --layers 3 --batch-size 128
                                    --steps 20000
"""


def make_parser():
    parser = cli.make_parser("forecast.py", __doc__, EXAMPLES)
    program.add_flags(parser, BASE, OPTIMIZERS, RATES, "runs/forecast")
    defaults = forecast.Options()
    group = parser.add_argument_group("task")
    group.add_argument(
        "--severity",
        nargs="+",
        type=cli.real(),
        default=list(SEVERITIES),
        metavar="X",
        help="deviations of the noise, in units of the largest value (default: 0 5)",
    )
    group.add_argument(
        "--share",
        type=cli.real(0, 1),
        default=defaults.share,
        metavar="X",
        help="share of the training inputs that get noise (default: %(default)s)",
    )
    group.add_argument(
        "--csv",
        metavar="FILE",
        help="a CSV file with one column per series, such as ETTh1.csv or the Weather"
        " file of Jena, also packed as .xz (default: the weather of New York's"
        " airports)",
    )
    for name, text in (
        ("lookback", "rows that the model reads"),
        ("horizon", "rows that it forecasts"),
        ("patch", "rows of a patch, half of which it shares with the next one"),
        ("width", "width of the model, a multiple of --heads"),
        ("heads", "attention heads"),
        ("layers", "layers, each attention and a feed-forward layer"),
    ):
        group.add_argument(
            f"--{name}",
            type=cli.whole(2 if name == "patch" else 1),
            default=getattr(defaults, name),
            metavar="N",
            help=f"{text} (default: %(default)s)",
        )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: compare(options))


def compare(options) -> list[engine.Failure]:
    """Trains the missing runs and writes the table and the figure."""
    fields = [field.name for field in dataclasses.fields(forecast.Options)]
    own = forecast.Options(**{name: getattr(options, name) for name in fields})
    forecast.Forecast(own)  # reports a mistake before anything is trained
    base = dataclasses.replace(BASE, steps=options.steps, batch_size=options.batch_size)
    scenarios = [f"severity {x:g}" for x in options.severity]
    question = "Which optimizer forecasts best when inputs are corrupted?"
    study = forecast.ForecastStudy(own)
    return program.run(study, options, base, scenarios, "Forecast", question)


if __name__ == "__main__":
    engine.exit_with(main)
