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
    vision.png    test loss over learning rate, one panel for each optimizer
"""

import dataclasses
from collections.abc import Sequence

from studies import digits, engine, program
from trainer import cli
from trainer.config import RunConfig

BASE = RunConfig(steps=300, batch_size=64, bursts=3)
OPTIMIZERS = ("adam", "adam_clip", "spam", "stable_spam", "guard, adam_clip")
RATES = (2e-3, 8e-3)
EXAMPLES = """
examples:
  a sweep with three seeds  vision.py --seeds 3
                              --learning-rate 1e-3 2e-3 4e-3 8e-3 1.6e-2
"""


def make_parser():
    parser = cli.make_parser("vision.py", __doc__, EXAMPLES)
    program.add_flags(parser, BASE, OPTIMIZERS, RATES, "runs/vision")
    defaults = digits.Options()
    group = parser.add_argument_group("task")
    group.add_argument(
        "--scenario",
        nargs="+",
        choices=digits.SCENARIOS,
        default=list(digits.SCENARIOS),
        metavar="NAME",
        help=f"only these: {', '.join(digits.SCENARIOS)}",
    )
    for name, text in (
        ("width", "width of the model, a multiple of --heads"),
        ("heads", "attention heads"),
        ("layers", "layers, each attention and a feed-forward layer"),
    ):
        group.add_argument(
            f"--{name}",
            type=cli.whole(1),
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
    own = digits.Options(options.width, options.heads, options.layers)
    digits.load()  # reports that scikit-learn is missing before anything is trained
    base = dataclasses.replace(BASE, steps=options.steps, batch_size=options.batch_size)
    question = "Which optimizer classifies digits best, without and with faults?"
    study = digits.DigitsStudy(own)
    return program.run(study, options, base, options.scenario, "Vision", question)


if __name__ == "__main__":
    engine.exit_with(main)
