"""Show why an initialization helps: measure every layer of a deep model as it trains.

    python examples/gradient_flow.py

trains a deep, narrow model with Adam from each of a few initializations:

    standard        normal, 0.5 over the square root of the width; plain embedding
    stable          Spike No More: small sub-layers, and a scaled embedding
    stable-plain    its small sub-layers with the plain embedding
    stable-normed   its small sub-layers, and an embedding followed by a LayerNorm
    wesar           WeSaR
    scaled-norm     LayerNorm Scaling, otherwise standard

Before the first step, after 10, 30, 100 and so on, and after the last one, it measures
on one fixed batch of the validation text:

    gradient norm   of all parameters of each layer
    Jacobian norm   how much a small change of the residual stream can grow in a
                    sub-layer: the spectral norm of its Jacobian, normalization
                    included, residual connection left out, over one whole sequence
    stream          the root mean square of the residual stream that enters each layer

Spike No More bounds the Jacobian norms at initialization. The bound of the feed-forward
layer is derived for a layer without a gate, and the model's layers have one. The
program writes to the folder --output:

    gradient_flow.png   gradient and Jacobian norms by layer, a line per measured step
    summary.json        all numbers, with the settings
    runs/               one record per initialization

A run whose record exists is not repeated. So after Ctrl-C the same command continues.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Sequence

from studies import engine
from studies.gradient_flow import MODELS, GradientFlow, Run, draw
from trainer import cli, files
from trainer.config import RunConfig
from trainer.model import ModelConfig
from trainer.settings import declared

# The settings that have a flag.
SETTINGS = {
    "layers": (24, "layers, each attention and a feed-forward layer"),
    "width": (64, "width of the residual stream, a multiple of twice the heads"),
    "heads": (2, "attention heads"),
    "ffn_width": (172, "inner width of the feed-forward layers"),
    "batch_size": (4, "sequences per step, and in the fixed batch"),
    "sequence_length": (64, "bytes per sequence"),
    "steps": (300, "steps of each run"),
    "learning_rate": (8e-3, "peak rate, after a warm-up of a tenth of the steps"),
    "seed": (0, "seed of parameters and batches"),
}
EXAMPLES = """\
examples:
  is one half of it enough?   gradient_flow.py --model standard stable-plain stable
  other methods               gradient_flow.py --model stable wesar scaled-norm
  a rate that is too high     gradient_flow.py --learning-rate 0.064 --output runs/high
  a shallow model             gradient_flow.py --layers 3 --output runs/shallow
"""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser("gradient_flow.py", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        choices=MODELS,
        default=["standard", "stable"],
        metavar="NAME",
        help=f"initializations, of {', '.join(MODELS)} (default: standard stable)",
    )
    accepted = declared(ModelConfig) | declared(RunConfig)
    for name, (default, text) in SETTINGS.items():
        add(
            "--" + name.replace("_", "-"),
            type=cli.parses(accepted[name].metadata["accepted"]),
            default=default,
            metavar=name.split("_")[-1].upper(),
            help=f"{text} (default: {default})",
        )
    add("--data", metavar="FILE", help="a text file (default: the embedded text)")
    add(
        "--workers",
        type=cli.whole(1, 512),
        default=os.cpu_count() or 1,
        metavar="N",
        help="runs side by side, on one core each (default: %(default)s, the cores of"
        " this machine)",
    )
    add(
        "--output",
        type=cli.folder,
        default=pathlib.Path("runs/gradient_flow"),
        metavar="FOLDER",
        help="folder to write to, and to continue in (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: show(options))


def show(options: argparse.Namespace) -> list[engine.Failure]:
    """Trains the missing runs, and writes numbers and picture of all of them."""
    common = {name: getattr(options, name) for name in (*SETTINGS, "data")}
    common |= {"optimizers": ("adam",), "bursts": 0}
    runs = [
        Run(name, RunConfig.from_settings(**common, **MODELS[name]))
        for name in dict.fromkeys(options.model)
    ]
    study, folder = GradientFlow(), options.output
    failures = engine.run_all(study, runs, folder / "runs", options.workers)
    found = engine.read_all(study, runs, folder / "runs")
    records = {record["settings"]["name"]: record for record in found if record}
    if records:
        files.replace(folder / "summary.json", json.dumps(records, indent=1) + "\n")
        draw(records).savefig(folder / "gradient_flow.png")
        print(f"Picture and numbers are in {folder}")
    return failures


if __name__ == "__main__":
    cli.exit_with(main)
