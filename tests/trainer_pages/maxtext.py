"""Trains with MaxText's own loop and its synthetic data, also across a restart."""

import json
import os
import pathlib

import numpy as np
import optax
import page
from checks import check_equal, check_losses, check_statistics
from flax import nnx
from page import optimizers, train

import spam_optax
from spam_optax import SkipReason

ARGUMENTS = (
    "hardware=cpu",
    "skip_jax_distributed_system=true",
    "base_output_directory=" + os.path.abspath("runs"),
    "dataset_type=synthetic",
    "skip_step_on_spikes=true",
    "metrics_file=metrics.jsonl",
    "checkpoint_period=1000",
    "async_checkpointing=false",
    "learning_rate_schedule_steps=20",
    "per_device_batch_size=4",
    "max_target_length=32",
    "vocab_size=64",
    "base_emb_dim=32",
    "base_num_query_heads=2",
    "base_num_kv_heads=2",
    "head_dim=16",
    "base_mlp_dim=64",
    "base_num_decoder_layers=2",
    "attention=dot_product",
    "dtype=float32",
    "sharding_tolerance=1.0",
    "enable_goodput_recording=false",
    "gradient_clipping_threshold=0",
)
states = []
train_loop = train.train_loop


def train_and_keep(*args, **kwargs):
    states.append(train_loop(*args, **kwargs))


train.train_loop = train_and_keep


def run(name, steps, *arguments, learning_rate=1e-2):
    """Runs MaxText and returns the last parameters, the state and the losses."""
    pathlib.Path("metrics.jsonl").write_text("")
    given = (f"run_name={name}", f"steps={steps}", f"learning_rate={learning_rate}")
    train.main(["page.py", *given, *ARGUMENTS, *arguments])
    state = states.pop()
    opt_state = nnx.to_pure_dict(state["optimizer"]["opt_state"])
    params = nnx.to_pure_dict(state["model"].filter(nnx.Param))
    lines = pathlib.Path("metrics.jsonl").read_text().splitlines()
    return params, opt_state, [json.loads(x)["learning/loss"] for x in lines]


def check_restart(name):
    """A run that stops at step 10 and is started again ends as one that does not."""
    params, opt_state, losses = run(f"{name}_whole", 20)
    check_losses(losses, 0.95)
    _, _, first = run(f"{name}_parts", 10)
    *ends, second = run(f"{name}_parts", 20)
    assert [*first, *second] == losses, (first, second, losses)
    check_equal(ends, (params, opt_state))
    return params, opt_state, losses


# The optimizer of the page. The guard has seen the loss of every step.
params, opt_state, losses = check_restart("page")
check_statistics(opt_state, params)
np.testing.assert_allclose(optax.tree.get(opt_state, "skip_losses")[:20], losses)
print(spam_optax.describe_tensors(opt_state, params))

# One step makes the model too large, so that all later ones are skipped.
no_stop = ("abort_on_nan_loss=false", "abort_on_inf_loss=false")
_, opt_state, _ = run("bad", 20, *no_stop, learning_rate=1e30)
reason = SkipReason(int(optax.tree.get(opt_state, "skip_reason")))
assert SkipReason.NORM_NONFINITE in reason, reason
skipped = int(optax.tree.get(opt_state, "skipped_total"))
assert skipped >= 17, skipped
metrics = json.loads(pathlib.Path("metrics.jsonl").read_text().splitlines()[-1])
assert metrics["optim/skipped_total"] == skipped
assert metrics["optim/skip_reason"] == int(reason)

# States in which `mu` and `nu` are in other places, and moments of other shapes.
train.train_step = page.train_step
for name in ("spam", "sparse_spam"):
    make = getattr(spam_optax, name)
    optimizers.get_optimizer = lambda config, rate, *_, make=make, **__: make(rate)
    params, opt_state, _ = check_restart(name)
    assert optax.tree.get(opt_state, "skip_losses") is None, name
    print(spam_optax.describe_tensors(opt_state, params))
