"""Trains with Levanter's own train_lm, from a YAML file, on tokens in a JSON file."""

import dataclasses
import inspect
import json
import pathlib
import runpy
import sys
import types

import numpy as np
import optax
import page
import yaml
from checks import check_equal, check_losses, check_statistics
from levanter.models.llama import LlamaConfig
from levanter.optim.config import OptimizerConfig
from levanter.tracker import NoopTracker
from levanter.trainer import Trainer

import spam_optax
from spam_optax import SkipReason

rows = [{"input_ids": ((np.arange(32) + row) % 7).tolist()} for row in range(256)]
pathlib.Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
OPTIMIZER = yaml.safe_load(pathlib.Path("page.yaml").read_text())["optimizer"]
# The converter to Hugging Face's checkpoints would ask the hub for a tokenizer.
CONVERTER = types.SimpleNamespace(replaced=lambda tokenizer: CONVERTER)
LlamaConfig.hf_checkpoint_converter = lambda self: CONVERTER
MODEL = {
    "type": "llama",
    "max_seq_len": 32,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
}
SOURCE = {
    "type": "url",
    "train_urls": ["train.jsonl"],
    "format": {"type": "prebuilt"},
}
DATA = {
    "tokenizer": "passthrough",
    "vocab_size": 16,
    "enforce_eos": False,
    "cache_dir": "cache",
    "shuffle": False,
    "components": {"tokens": {"source": SOURCE, "format": {"type": "prebuilt"}}},
}
finals = []
logged = {}
train = Trainer.train


def train_and_keep(self, state, loader):
    losses = {}  # Levanter calls its hooks twice for the last step.
    self.add_hook(lambda info: losses.update({info.step: float(info.loss)}), every=1)
    self.add_hook(page.print_scores, every=10)
    info = train(self, state, loader)
    finals.append((info.state, [*losses.values()]))
    return info


def keep_metrics(self, metrics, **kwargs):
    logged.update(metrics)


Trainer.train = train_and_keep
NoopTracker.log = keep_metrics

# An argument with the name of a field of Levanter's would not reach the optimizer.
base = {field.name for field in dataclasses.fields(OptimizerConfig)}
for name in ("spam", "sparse_spam", "stable_spam"):
    arguments = inspect.signature(getattr(spam_optax, name)).parameters
    assert base & set(arguments) == {"learning_rate", "weight_decay"}, name


def run(optimizer, **trainer):
    """Runs the program of the page with a file, and returns the last state."""
    config = {
        "data": DATA,
        "model": MODEL,
        "optimizer": optimizer,
        "trainer": {
            "tracker": {"type": "noop"},
            "num_train_steps": 20,
            "train_batch_size": 8,
            "require_accelerator": False,
            "jax_compilation_cache_dir": "compiled",
            "checkpointer": {"base_path": "checkpoints", "keep": [{"every": 10}]},
            **trainer,
        },
    }
    pathlib.Path("config.yaml").write_text(yaml.safe_dump(config))
    sys.argv = ["page.py", "--config_path", "config.yaml"]
    runpy.run_path("page.py", run_name="__main__")
    return finals[-1]


whole, losses = run(OPTIMIZER, id="whole")
check_losses(losses, 0.8)
check_statistics(whole.opt_state, whole.trainable_model)
seen = optax.tree.get(whole.opt_state, "skip_losses")[:20]
np.testing.assert_allclose(seen, losses, rtol=1e-6)
assert logged["optim/max_spike_score"] > 0
assert logged["optim/skip_reason"] == logged["optim/skipped_total"] == 0
assert 0 < logged["optim/learning_rate"] < OPTIMIZER["learning_rate"]
print(spam_optax.describe_tensors(whole.opt_state, whole.trainable_model))

# A run that starts after step 10, counted from 0, ends as the whole one.
path = "checkpoints/whole/step-10"
resumed, rest = run(OPTIMIZER, id="resumed", load_checkpoint_path=path)
assert rest == losses[11:], (rest, losses)
check_equal(resumed.opt_state, whole.opt_state)
check_equal(resumed.trainable_model, whole.trainable_model)

# The first step makes the model too large, so that all later ones are skipped.
bad = {**OPTIMIZER, "learning_rate": 1e30}
state, _ = run(bad, id="bad", crash_on_nan=False, crash_on_inf=False)
reason = SkipReason(int(optax.tree.get(state.opt_state, "skip_reason")))
assert SkipReason.NORM_NONFINITE in reason, reason
assert logged["optim/skipped_total"] == 19

for name in ("sparse_spam", "stable_spam"):
    optimizer = {"type": name, "learning_rate": 0.003, "track_spikes": True}
    optimizer["skip_spikes"] = {"window": 8, "min_history": 4}
    state, losses = run(optimizer, id=name)
    check_losses(losses, 0.9)
    assert optax.tree.get(state.opt_state, "skip_losses").shape == (8,)
    print(spam_optax.describe_tensors(state.opt_state, state.trainable_model))
