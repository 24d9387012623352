"""What `compare.py` compares: runs, and the grids of them that answer a question."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import optax

import spam_optax
from trainer import optimizers
from trainer.config import RunConfig
from trainer.errors import UsageError
from trainer.optimizers import Entry

SCENARIOS = ("clean", "noise", "coordinates", "batches")
MAIN = (
    "adam",
    "adam_clip",
    "adamw_clip",
    "adafactor",
    "lion",
    "adam_mini",
    "galore",
    "muon",
    "spam",
    "clip_spam",
    "sparse_spam",
    "stable_spam",
    "stabilizer_adam",
    "zclip_adam",
    "adagc_adam",
)
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
# Of the rates, for those whose best ones are known to lie elsewhere: Lion's update is a
# sign, of size 1; GaLore's is scaled by a quarter; sparse momentum moves a share of a
# matrix, its density, at a time.
RATE_SCALES = {
    "lion": 1 / 8,
    "galore": 4,
    "sparse_spam": 4,
    "sparse_spam, density 0.5": 2,
}
SEEDS = (0, 1, 2)
STEPS = 300
# Of the run, between momentum resets. Bursts begin after 1/4, 1/2 and 3/4 of it: were
# that in the grace after a reset, when nothing is clipped, they would find no defense.
RESET_SHARE = 1 / 3
BASE = RunConfig(
    optimizers=("adam",),
    steps=STEPS,
    batch_size=8,
    sequence_length=64,
    eval_sequences=256,
    bursts=3,
)


class Spec(NamedTuple):
    """One run."""

    label: str  # row of the table: an optimizer of the trainer's, or a variant here
    scenario: str  # one of SCENARIOS
    config: RunConfig  # `optimizers` does not count

    def settings(self) -> dict[str, Any]:
        """Everything that decides the run's numbers, as JSON knows it."""
        settings = self.config.settings()
        del settings["optimizers"]
        return {"label": self.label, "scenario": self.scenario} | settings

    def file_name(self) -> str:
        """The same for as long as the settings it was made with are the same.

        Settings that have their default do not count: a new one changes no name.
        """
        defaults = RunConfig().settings()
        settings = self.settings()
        given = {k: v for k, v in settings.items() if v != defaults.get(k)}
        text = json.dumps(given, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        rate, seed = self.config.learning_rate, self.config.seed
        label = re.sub("[^a-z0-9_.]+", "_", self.label)
        return f"{label}-{self.scenario}-{rate:g}-seed{seed}-{digest}.json"

    def read(self, folder: pathlib.Path, digest: str) -> dict[str, Any] | None:
        """The record of this run in `folder`; None if there is none.

        `digest` is the text's, see `text_files.text_digest`; its path may have named
        another one then. A record that has none is older than they are, and counts.

        Raises:
          UsageError: If the file is damaged.
        """
        path, settings = folder / self.file_name(), self.settings()
        try:
            record = json.loads(path.read_text())
            found = record["settings"].items()
            is_of_text = record.get("digest", digest) == digest
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"{path} is damaged: remove it to run it again ({error})"
            ) from error
        # A default may have changed since.
        is_ours = all(settings.get(k, v) == v for k, v in found)
        return record if is_ours and is_of_text else None

    def program(self) -> tuple[str, RunConfig]:
        """What is compiled: learning rate, seed and fault steps are its inputs."""
        return self.label, dataclasses.replace(self.config, learning_rate=1.0, seed=0)


class Experiment(NamedTuple):
    """A question, and the runs that answer it."""

    question: str
    labels: tuple[str, ...]
    scenarios: tuple[str, ...] = ("clean", "noise")
    rates: tuple[float, ...] = RATES
    models: tuple[dict[str, Any], ...] = ({},)  # settings of RunConfig


def spam_with(**changes) -> Entry:
    """SPAM with other arguments: interval and warm-up as shares of run and interval.

    Warm-up and grace change with the interval where they are not given.
    """

    def make(config, learning_rate):
        given = dict(changes)
        if given.get("reset_interval"):
            interval = round(given.pop("reset_interval") * config.steps)
            config = dataclasses.replace(config, reset_interval=interval)
        if "warmup_steps" in given:
            interval = config.spam_intervals["reset_interval"]
            given["warmup_steps"] = round(given["warmup_steps"] * interval)
        return optimizers.spam(config, learning_rate, **given)

    return Entry(make, resets=changes.get("reset_interval", True) is not None)


def behind(first: Callable[[], optax.GradientTransformation], name: str) -> Entry:
    """The trainer's optimizer `name` behind another transformation."""
    row = optimizers.TABLE[name]

    def make(config, learning_rate):
        return optax.chain(first(), row.make(config, learning_rate))

    return row._replace(make=make)


def sparse(density: float) -> Entry:
    def make(config, learning_rate):
        config = dataclasses.replace(config, density=density)
        return optimizers.sparse_spam(config, learning_rate)

    return Entry(make, resets=True)


NEVER_CLIPS = 1e30
SWEPT = {
    **{f"spam, threshold {x:g}": spam_with(threshold=x) for x in (50.0, 500.0)},
    **{
        f"spam, interval {x:g} of the run": spam_with(reset_interval=x)
        for x in (0.13, 0.25, 0.67)
    },
    **{
        f"spam, warm-up {x:g} of the interval": spam_with(warmup_steps=x)
        for x in (0, 0.9)
    },
}
VARIANTS = {
    "spam: neither": spam_with(threshold=NEVER_CLIPS, reset_interval=None),
    "spam: reset": spam_with(threshold=NEVER_CLIPS),
    "spam: clip": spam_with(reset_interval=None),
    "spam: reset, restarted correction": spam_with(
        threshold=NEVER_CLIPS, restart_bias_correction=True
    ),
    "spam, restarted correction": spam_with(restart_bias_correction=True),
    "spam, clip unseen": spam_with(clip_unseen=True),
    **SWEPT,
    "sparse_spam, density 0.5": sparse(0.5),
    "adaclip, adam": behind(spam_optax.adaclip, "adam"),
    "adaclip, spam": behind(spam_optax.adaclip, "spam"),
    "stabilizer, spam": behind(spam_optax.gradient_stabilizer, "spam"),
}

STABLE = {"initialization": "stable", "embedding": "scaled"}
EXPERIMENTS = {
    "main": Experiment(
        "Does SPAM beat Adam and clipped Adam, each at its best learning rate?", MAIN
    ),
    "faults": Experiment(
        "And where single coordinates or whole batches are corrupted?",
        ("adam", "adamw_clip", "spam", "clip_spam", "stable_spam", "stabilizer_adam"),
        scenarios=("coordinates", "batches"),
        rates=RATES[1:4],
    ),
    "ablation": Experiment(
        "How much is the reset, how much the clip, how much the bias correction?",
        (
            "spam: neither",
            "spam: reset",
            "spam: clip",
            "spam",
            "spam: reset, restarted correction",
            "spam, restarted correction",
        ),
    ),
    "unseen": Experiment(
        "Does it matter that a coordinate without history is not clipped?",
        ("adam", "spam", "spam, clip unseen"),
        scenarios=("clean",),
        rates=RATES[:4],
        # A tied head's softmax gives every row of the embedding a gradient; in one of
        # its own, the rows of words that have not come yet have none.
        models=(
            {"tokenizer": "bpe:8192", "batch_size": 2},
            {"tokenizer": "bpe:8192", "batch_size": 2, "untied_head": True},
        ),
    ),
    "memory": Experiment(
        "Sparse momentum against GaLore and Adam-mini at like optimizer memory?",
        ("adam", "adam_mini", "galore", "sparse_spam", "sparse_spam, density 0.5"),
        scenarios=("clean",),
    ),
    "initialization": Experiment(
        "At which learning rate does each initialization begin to spike?",
        ("adam",),
        scenarios=("clean",),
        rates=(*RATES, 3.2e-2, 6.4e-2),
        models=(
            {},
            {"initialization": "stable"},
            {"embedding": "scaled"},
            STABLE,
            {"initialization": "stable", "embedding": "normed"},
        ),
    ),
    "sweeps": Experiment(
        "How do threshold, interval and warm-up matter?",
        ("spam", *SWEPT),
        scenarios=("noise",),
        rates=RATES[1:4],
    ),
    "combinations": Experiment(
        "Do the pieces combine?",
        ("spam", "clip_spam", "adaclip, adam", "adaclip, spam", "stabilizer, spam"),
        rates=RATES[1:4],
        models=({}, STABLE),
    ),
}


def specs(
    name: str,
    base: RunConfig,
    seeds: Sequence[int],
    *,
    labels: Iterable[str] | None = None,
    scenarios: Iterable[str] | None = None,
    rates: Sequence[float] | None = None,
) -> list[Spec]:
    """The runs of an experiment, those of one program in a row.

    Args:
      name: A key of EXPERIMENTS.
      base: Model, data, steps and batches, where the experiment does not say.
      seeds: Of parameters, batches, masks and faults.
      labels: The rows of the table to keep. None: all.
      scenarios: The scenarios to keep. None: all.
      rates: Learning rates instead of the experiment's.
    """
    experiment = EXPERIMENTS[name]
    kept = [x for x in experiment.labels if labels is None or x in labels]
    kept_scenarios = [
        x for x in experiment.scenarios if scenarios is None or x in scenarios
    ]
    grid = itertools.product(
        experiment.models,
        kept_scenarios,
        kept,
        dict.fromkeys(rates or experiment.rates),
        seeds,
    )
    return [
        Spec(
            label,
            scenario,
            base.with_settings(
                learning_rate=rate if rates else rate * RATE_SCALES.get(label, 1),
                seed=seed,
                **(model | faults(scenario) | resets(label, base.steps)),
            ),
        )
        for model, scenario, label, rate, seed in grid
    ]


def faults(scenario: str) -> dict[str, Any]:
    """Settings of RunConfig for the gradient's faults, if any."""
    if scenario == "coordinates":
        return {"spike_rate": 1e-3, "spike_kind": "scale"}
    return {}


def resets(label: str, steps: int) -> dict[str, Any]:
    """Settings of RunConfig for an optimizer that resets its momentum."""
    if row_of(label).resets:
        return {"reset_interval": round(RESET_SHARE * steps)}
    return {}


def row_of(label: str) -> Entry:
    return VARIANTS.get(label) or optimizers.TABLE[label]


def make(
    label: str, config: RunConfig, learning_rate: Any
) -> optax.GradientTransformation:
    """The transformation for a peak learning rate, which may be traced."""
    unit = optimizers.schedule(dataclasses.replace(config, learning_rate=1.0))
    try:
        return row_of(label).make(config, lambda step: learning_rate * unit(step))
    except ValueError as error:
        raise UsageError(f"{label}: {error}") from error
