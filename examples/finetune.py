"""Fine-tune a language model on another text: what optimizers learn, forget and take.

    python examples/finetune.py

pre-trains a small LLaMA-style model on English prose for a minute, and then goes on
training it on Shakespeare, with seven optimizers at two learning rates. --optimizer
takes these names, among others:

    adamw, adam_clip, spam, clip_spam, stable_spam, guard   two moments per parameter
    sparse_spam, density X   SPAM with moments for a part of each matrix
    galore, rank N           Adam in a subspace of each matrix (GaLore)
    lora, rank N             Adam of adapters of each matrix; all else is frozen

Reported are the loss on the new text, forgetting (the rise of the loss on the old
text), the memory of the optimizer's state, and the memory of the compiled run.

A run leaves a record and is not repeated: after Ctrl-C the same command continues. The
program writes to the folder --output:

    pretrained/    the run of pretrain.py, if no --checkpoint is given
    runs/*.json    settings, losses and gradient norms of every run
    finetune.md    loss, forgetting and memory at the best learning rate
    summary.json   the same numbers
    finetune.png   loss and forgetting over the memory of the optimizer's state
"""

import argparse
import pathlib
from collections.abc import Sequence

import pretrain
from studies import engine, finetune, program
from trainer import cli
from trainer.config import RunConfig
from trainer.data import text_files
from trainer.errors import UsageError

EXAMPLE = program.Example(
    title="Finetune",
    description=__doc__,
    examples="""
examples:
  a sweep with three seeds     finetune.py --seeds 3 --adaptive --steps 400
                                 --learning-rate 1e-3 4e-3 1.6e-2
  your own run of pretrain.py  finetune.py --checkpoint runs/book --data letters.txt
  one optimizer of several     finetune.py --checkpoint runs/first/checkpoints/spam
  a LLaMA of Hugging Face      finetune.py --checkpoint TinyLlama --data letters.txt
                                 --optimizer adamw "sparse_spam, density 0.0025"
                                 --learning-rate 1e-5 1e-4 --workers 1
""",
    question="What do optimizers learn and forget, and how much memory do they take?",
    study=finetune.FineTuneStudy,
    options=finetune.Options,
    base=RunConfig(steps=80, batch_size=8, bursts=3, eval_sequences=128),
    optimizers=(
        *("adamw", "adam_clip", "spam", "sparse_spam, density 0.25"),
        *("sparse_spam, density 0.01", "galore, rank 4", "lora, rank 4"),
    ),
    rates=(1e-3, 4e-3),
    scenarios={
        "flag": "--scenario",
        "choices": finetune.SCENARIOS,
        "default": ["clean"],
        "metavar": "NAME",
        "help": "clean, or faults in three bursts of three steps: noise in the"
        " gradients, or batches of random tokens (noise, batches; default: clean)",
    },
    is_decoder=True,
    numbers={
        "steps": "optimizer steps of each run",
        "batch_size": "sequences in each step",
        "sequence_length": "tokens in each sequence",
        "eval_sequences": "largest number of validation sequences of each text",
    },
)
PRETRAINING = {
    "--optimizer": "adam_clip",
    "--bursts": "0",
    "--data": str(text_files.PROSE),
    "--steps": "500",
    "--eval-every": "500",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code: see `engine.exit_code`."""
    parser = program.make_parser(EXAMPLE)
    options = parser.parse_args(arguments)
    return engine.exit_code(parser, lambda: tune(options))


def tune(options: argparse.Namespace) -> list[engine.Failure]:
    if options.checkpoint is None:
        options.checkpoint = str(pretrain_small(options.output / "pretrained"))
    return program.train(EXAMPLE, options)


def pretrain_small(folder: pathlib.Path) -> pathlib.Path:
    """Pre-trains a small model in `folder`, unless there is one."""
    checkpoints = folder / "checkpoints" / PRETRAINING["--optimizer"]
    last = checkpoints / PRETRAINING["--steps"]
    if not last.exists():
        flags = [x for flag in PRETRAINING.items() for x in flag]
        flags += ["--output", str(folder)]
        resume = ["--resume"] if (folder / "config.json").exists() else []
        code = pretrain.main(flags + resume)
        if code == 1:
            raise UsageError(f"pre-training failed: remove {folder} to try it again")
        if not last.exists():
            raise KeyboardInterrupt
    return folder


if __name__ == "__main__":
    cli.exit_with(main)
