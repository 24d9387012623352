"""Measures, and writes results.json, results.md and the pictures."""

import argparse
import json
import pathlib

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import (
    compile_time,
    compiled,
    environment,
    pictures,
    presets,
    report,
    scaling,
    state,
    step,
    trainer,
)

SECTIONS = {
    "step": step,
    "compile": compile_time,
    "compiled": compiled,
    "state": state,
    "scaling": scaling,
    "presets": presets,
    "trainer": trainer,
}
RESULTS = pathlib.Path(__file__).parent / "results"

DESCRIPTION = """\
Measure the optimizers of spam_optax beside those of Optax and PyTorch.

  step      time, state and temporaries of a step on this machine: twelve matrices of
            2048 x 2048, and the arrays of a LLaMA of 60M parameters, update and
            apply_updates in one jitted function with donated buffers. The optimizers
            take turns, and the ratio to optax.adamw is taken round by round. PyTorch
            has rows too if torch is installed (and SPAM if pytorch_optimizer is).
  compile   processor seconds that tracing, lowering and compiling a step takes for the
            201 arrays of a LLaMA, for this machine's CPU and for TPU v5e (libtpu).
  compiled  bytes of memory that a step moves and allocates on TPU v5e, v5p and v6e,
            and its collectives on four chips, from the TPU compiler. No TPU is needed,
            but libtpu must be installed.
  state     bytes of state for LLaMA models of 60M to 1B parameters, beside the
            memory that the papers print. Nothing is allocated.
  scaling   time of a step from 1M to 200M parameters, and from 1 to 256 arrays.
  presets   memory of examples/pretrain.py's step for its presets, on TPU v5e and H100,
            from their compilers: libtpu, and the wheels of JAX's CUDA plugin.
  trainer   tokens a second of that step, 60M shape, beside a plain PyTorch loop.
"""

EPILOG = """\
examples:
  everything, about an hour           python -m benchmarks
  does it run?                        python -m benchmarks --quick
  two parts again, the others stay    python -m benchmarks --only step scaling
  tables and pictures, no measuring   python -m benchmarks --only
  the same on a GPU                   JAX_PLATFORMS=cuda python -m benchmarks

Times are reliable only on an idle machine. The report has the load at the start.
The full run needs 10 GiB of memory.
"""


def main():
    args = _arguments()
    output = args.output or (pathlib.Path("runs/benchmarks") if args.quick else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    columns = (
        TextColumn("{task.description:<34}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
    )
    console = Console()
    with Progress(*columns, console=console) as progress:
        for name in args.only:
            about = environment.describe()
            data = SECTIONS[name].measure(args.quick, progress.track)
            results[name] = {"environment": about, "quick": args.quick, "data": data}
            # At once, so that what is measured outlives an interruption.
            file.write_text(json.dumps(results, indent=1) + "\n")
    text = report.render(results)
    (output / "results.md").write_text(text)
    pictures.draw(results, output)
    console.print(f"Results are in {output}.")


def _arguments():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"sections to measure: {', '.join(SECTIONS)}; the results of the others "
        "are kept from the last run",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes and few rounds, two or three minutes; do not use its times",
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="folder to write (default benchmarks/results, with --quick "
        "runs/benchmarks)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
