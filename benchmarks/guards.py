"""How often guards skip steps of recorded runs, and which spikes they find.

    python -m benchmarks.guards OUTPUT LOG...

reads the loss and the gradient norm of every step of a run from each LOG, and writes
OUTPUT/guards.json and OUTPUT/guards.md. A LOG is any file that
examples/skipped_steps.py reads. The results in benchmarks/results are those of five
runs in the repository KellerJordan/modded-nanogpt (MIT licence).
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import run_logs
import spam_optax
from spam_optax import functional
from trainer.errors import UsageError

RULES = {
    "skip_spikes": {},
    "robust=False": {"robust": False},
    "no share": {"loss_share": 0.0, "norm_share": 0.0},
}
INSERTED, BEGIN = 30, 200  # spikes, evenly spaced from this step on
NATS, FACTOR = 1.0, 10.0  # added to a loss; by which a norm is multiplied


def zclip_steps(norms):
    """Returns the steps in which ZClip, with no fixed limit, clips the norm."""
    tx = spam_optax.zclip(max_norm=None)

    def step(state, norm):
        update, state = tx.update(norm, state)
        return state, update < norm * (1 - 1e-6)

    return jax.lax.scan(step, tx.init(jnp.zeros([])), jnp.asarray(norms))[1]


def measure(loss, norm):
    """Returns the steps skipped in a run, and the spikes found in copies of it."""
    places = np.linspace(BEGIN, len(loss) - 1, INSERTED).astype(int)
    raised = loss.copy()
    raised[places] += NATS
    multiplied = None if norm is None else norm.copy()
    if norm is not None:
        multiplied[places] *= FACTOR

    def row(steps):
        """Returns the counts of a rule; `steps` flags the steps of a run."""
        skipped = int(np.sum(steps(loss, norm)))
        found = [int(np.sum(steps(raised, norm)[places]))]
        if norm is not None:
            found.append(int(np.sum(steps(loss, multiplied)[places])))
        return {"skipped": skipped, "found": found}

    rows = {}
    for name, settings in RULES.items():
        flag = jax.jit(lambda x, y, s=settings: functional.spike_steps(x, y, **s) > 0)
        rows[name] = row(lambda x, y, flag=flag: np.asarray(flag(x, y)))
    if norm is not None:
        flag = jax.jit(zclip_steps)
        rows["zclip"] = row(lambda x, y: np.asarray(flag(y)))
        rows["zclip"]["found"][0] = None  # It sees no loss.
    return {"steps": len(loss), "rules": rows}


def render(results):
    """Returns the page of the results."""
    lines = [
        "# Guards on recorded runs",
        "",
        "`python -m benchmarks.guards` writes this page. A rule should skip few steps"
        " of a healthy run.",
        f"Found: of {INSERTED} losses raised by {NATS:g} nat, and of {INSERTED} norms"
        f" multiplied by {FACTOR:g}.",
        "`zclip` clips the norm where the other rules skip the step.",
        "",
        "| run | steps | rule | skipped | share | losses found | norms found |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        for rule, row in run["rules"].items():
            share = f"{100 * row['skipped'] / run['steps']:.3f} %"
            found = [*row["found"], None][:2]
            cells = ["" if x is None else str(x) for x in found]
            lines.append(
                f"| {name} | {run['steps']:,} | {rule} | {row['skipped']} | {share}"
                f" | {cells[0]} | {cells[1]} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.guards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=pathlib.Path, metavar="OUTPUT")
    parser.add_argument("logs", type=pathlib.Path, nargs="+", metavar="LOG")
    args = parser.parse_args(arguments)
    results = {}
    for path in args.logs:
        try:
            log = run_logs.read(path)
        except UsageError as error:
            parser.error(str(error))
        results[path.stem] = measure(log.losses, log.norms)
        print(path.stem, results[path.stem], flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    (args.output / "guards.json").write_text(text + "\n")
    (args.output / "guards.md").write_text(render(results))


if __name__ == "__main__":
    main()
