"""Forecast time series with corrupted inputs: the error of several optimizers.

    python examples/forecast.py

trains a small model in the style of PatchTST on the weather of three airports: 21
columns, hourly, of the year 2013. It reads 96 hours and forecasts the next 12. A share
of the training inputs gets noise, as in the SPAM paper. The deviation of the noise is
--severity times the largest value. The test windows have no noise. The paper's share is
0.05 or 0.1; with so much noise, these short runs learn nothing.

Every optimizer is trained with every learning rate, severity and seed. A run leaves a
record and is not repeated: after Ctrl-C the same command continues. The program writes
to the folder --output:

    runs/*.json    settings, losses and gradient norms of every run
    forecast.md    the test error at the best learning rate, and its spread
    summary.json   the same numbers
    forecast.png   test error over severity, and over the learning rate
"""

from collections.abc import Sequence

from studies import forecast, program
from trainer import cli
from trainer.config import RunConfig

EXAMPLE = program.Example(
    title="Forecast",
    description=__doc__,
    examples="""
examples:
  a sweep with three seeds        forecast.py --severity 0 1 2 5 --seeds 3 --adaptive
                                    --steps 500
  your own columns                forecast.py --csv measurements.csv
  the published size              forecast.py --csv weather.csv --lookback 336
                                    --horizon 96 --share 0.1 --width 128 --heads 16
                                    --layers 3 --batch-size 128 --steps 20000
""",
    question="Which optimizer forecasts best when inputs are corrupted?",
    study=forecast.ForecastStudy,
    options=forecast.Options,
    base=RunConfig(steps=350, batch_size=8, bursts=0),
    optimizers=("adam", "adam_clip", "spam", "stable_spam"),
    rates=(4e-3, 1.6e-2),
    scenarios={
        "flag": "--severity",
        "type": forecast.scenario_of,
        "default": ["severity 0", "severity 5"],
        "metavar": "X",
        "help": "deviations of the noise, in units of the largest value (default: 0 5)",
    },
    numbers={
        "steps": "optimizer steps of each run",
        "batch_size": "windows in each step",
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    return program.main(EXAMPLE, arguments)


if __name__ == "__main__":
    cli.exit_with(main)
