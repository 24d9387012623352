"""One step of the trainer against recorded numbers."""

import json
import pathlib

import pytest

import pretrain
from trainer import loop, optimizers, sharding, training
from trainer.config import RunConfig
from trainer.run_folder import Run

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "train_step.json"
CONFIG = RunConfig(
    optimizers=("clip_spam",),
    preset="nano",
    embedding="scaled",
    initialization="stable",
    z_loss=1e-4,
    batch_size=4,
    sequence_length=16,
    steps=10,
    bursts=0,
)
EXPLANATION = """
{name}: {value!r}, recorded was {golden!r}.

These are the numbers of the first two steps of one small run on the embedded text.
They change when the model, its initialization, the data, the loss, the optimizer or the
schedule computes something else. If that is what a change is for, say so in its
message, and record the new numbers with

    PYTHONPATH=examples python tests/trainer/test_train_step.py

If not (a refactoring, a faster form, another version of JAX), they must not change:
beyond float32 rounding, what you have found is a mistake.
"""


def measure() -> dict[str, float]:
    """The global metrics of two steps, and the norms of every tensor in the second."""
    task, _ = pretrain.make_task(Run(CONFIG, None), sharding.Parallelism(data=1))
    (name,) = CONFIG.optimizers
    optimizer = optimizers.make(name, CONFIG)
    rows = []
    loop.train(
        training.initial_state(CONFIG, task.model, optimizer, task.faults),
        task,
        optimizer,
        iter(task.train),
        record=rows.append,
        save=lambda state, place: None,
        stop=lambda step: step == 2,
    )
    numbers = {}
    for row in rows:
        for key in ("loss", "grad_norm", "clipped_grad_norm", "update_norm"):
            numbers[f"step {row['step']}: {key}"] = row[key]
    for kind in ("grad_norm", "update_norm", "param_norm"):
        for tensor, norm in zip(
            training.tensor_names(task), rows[-1]["tensors"][kind], strict=True
        ):
            numbers[f"{tensor}: {kind}"] = norm
    return numbers


def test_first_steps_give_the_recorded_numbers():
    golden, measured = json.loads(GOLDEN.read_text()), measure()
    assert measured.keys() == golden.keys()
    for name, value in golden.items():
        assert measured[name] == pytest.approx(value, rel=1e-5, abs=1e-9), (
            EXPLANATION.format(name=name, value=measured[name], golden=value)
        )


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n")
