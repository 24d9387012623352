"""Classify handwritten digits: the test loss of several optimizers.

    python examples/vision.py

trains a small vision transformer on the 1,797 digits that come with scikit-learn:

    clean   no faults
    noise   three bursts of three steps; their gradients get noise of 1000 times the RMS
    labels  in the same steps, the labels are random

Every optimizer is trained with every learning rate, scenario and seed. A run leaves a
record and is not repeated: after Ctrl-C the same command continues. The program writes
to the folder --output:

    runs/*.json   settings, losses and gradient norms of every run
    vision.md     the test loss at the best learning rate, and its spread
    summary.json  the same numbers
    vision.png    test loss with each kind of fault, and over the learning rate
"""

from collections.abc import Sequence

from studies import digits, program
from trainer import cli
from trainer.config import RunConfig

EXAMPLE = program.Example(
    title="Vision",
    description=__doc__,
    examples="""
examples:
  a sweep with three seeds  vision.py --seeds 3
                              --learning-rate 5e-4 2e-3 8e-3 3.2e-2
""",
    question="Which optimizer classifies digits best, without and with faults?",
    study=digits.DigitsStudy,
    options=digits.Options,
    base=RunConfig(steps=300, batch_size=32, bursts=3),
    optimizers=("adam", "adam_clip", "spam", "stable_spam"),
    rates=(2e-3, 8e-3),
    scenarios=program.scenario_flag(digits.SCENARIOS, "which faults there are"),
    numbers={
        "steps": "optimizer steps of each run",
        "batch_size": "images in each step",
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    return program.main(EXAMPLE, arguments)


if __name__ == "__main__":
    cli.exit_with(main)
