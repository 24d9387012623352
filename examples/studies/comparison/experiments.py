"""The experiments of the comparison: each is a question and a grid of runs."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from studies.comparison import variants
from studies.comparison.study import SCENARIOS
from studies.task import RESET_SHARE, Run
from trainer.config import RunConfig
from trainer.data import text_files

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
# Factors for optimizers whose best rates are known to lie elsewhere. Lion's update is a
# sign, of size 1. GaLore's update is scaled by a quarter. Sparse momentum moves only a
# part of each matrix at a time, and the part is its density.
RATE_SCALES = {
    "lion": 1 / 8,
    "galore": 4,
    "sparse_spam": 4,
    "sparse_spam, density 0.5": 2,
}
SEEDS = (0, 1, 2)
STEPS = 300
# Bursts begin after 1/4, 1/2 and 3/4 of the run. SPAM resets its momentum after 1/3 and
# 2/3, so none falls into the steps after a reset in which it clips nothing.
BASE = RunConfig(
    optimizers=("adam",),
    steps=STEPS,
    batch_size=8,
    sequence_length=64,
    eval_sequences=256,
    bursts=3,
)


class Experiment(NamedTuple):
    """A question and the runs that answer it."""

    question: str
    labels: tuple[str, ...]
    scenarios: tuple[str, ...] = ("clean", "noise")
    rates: tuple[float, ...] = RATES
    models: tuple[dict[str, Any], ...] = ({},)  # settings of RunConfig that differ
    seeds: int | None = None  # the largest number of seeds
    adaptive: bool = False  # whether `studies.sweep` chooses rates and seeds


PROSE = str(text_files.PROSE)
STABLE = {"initialization": "stable", "embedding": "scaled"}
# To a rate at which every model fails.
HIGH_RATES = (*RATES, 3.2e-2, 6.4e-2)
DEPTH_RATES = (5e-4, *HIGH_RATES)
INITIALIZATIONS = (
    {},
    {"initialization": "stable"},
    STABLE,
    {"initialization": "stable", "embedding": "normed"},
    {"initialization": "wesar"},
    {"norm": "scaled"},
    {"norm": "mixed"},
    {"qk_norm": True},
)
DEPTHS = (3, 6, 12, 24, 48)
DEEP = {"layers": 24, "width": 64, "heads": 2, "ffn_width": 172, "batch_size": 4}
FEW_BITS = ("adam", "adam_clip", "adam, SPAM's steps", "adam, b2 0.95", "spam")
FEW_BITS += ("clip_spam", "stable_spam", "stabilizer_adam", "guard, adam_clip")
# Widths with about the parameters of 24 layers of width 64, and their heads.
EQUAL_SIZES = {3: (192, 6), 6: (128, 4), 12: (96, 3), 48: (48, 2)}


def quantized(*names: str) -> tuple[dict[str, Any], ...]:
    """Returns models with few bits, in groups of 32."""
    return tuple({"quantize": name, "quantize_group": 32} for name in names)


def deep(
    *models: dict[str, Any], depths: Sequence[int] = DEPTHS
) -> tuple[dict[str, Any], ...]:
    """Returns each model at every depth, at the same width."""
    return tuple(
        DEEP | {"layers": layers} | model for layers in depths for model in models
    )


def equal_sizes(*models: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Returns each model at every other depth, with about the same parameters."""
    shapes = (
        {"layers": layers, "width": width, "heads": heads, "ffn_width": width * 8 // 3}
        for layers, (width, heads) in EQUAL_SIZES.items()
    )
    return tuple(DEEP | shape | model for shape in shapes for model in models)


EXPERIMENTS = {
    "main": Experiment(
        "Does SPAM beat Adam and clipped Adam, each at its best learning rate?", MAIN
    ),
    "faults": Experiment(
        "Does SPAM help when single coordinates or whole batches are corrupted?",
        ("adam", "adamw_clip", "spam", "clip_spam", "stable_spam", "stabilizer_adam"),
        scenarios=("coordinates", "batches"),
        rates=RATES[1:4],
    ),
    "ablation": Experiment(
        "Does the reset explain SPAM's gain, or the clip, or the bias correction?",
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
        "Does it matter that coordinates without a history are not clipped?",
        ("adam", "spam", "spam, clip unseen"),
        scenarios=("clean",),
        rates=RATES[:4],
        # With a tied head, the softmax gives every row of the embedding a gradient.
        # With an untied head, rows of words that have not occurred yet have none.
        models=(
            {"tokenizer": "bpe:8192", "batch_size": 2},
            {"tokenizer": "bpe:8192", "batch_size": 2, "untied_head": True},
        ),
    ),
    "memory": Experiment(
        "Does sparse momentum beat GaLore and Adam-mini at similar optimizer memory?",
        ("adam", "adam_mini", "galore", "sparse_spam", "sparse_spam, density 0.5"),
        scenarios=("clean",),
    ),
    "initialization": Experiment(
        "Does Spike No More's initialization prevent spikes at high learning rates?",
        ("adam",),
        scenarios=("clean",),
        rates=HIGH_RATES,
        models=(
            {},
            {"initialization": "stable"},
            {"embedding": "scaled"},
            STABLE,
            {"initialization": "stable", "embedding": "normed"},
        ),
    ),
    "sweeps": Experiment(
        "Do SPAM's threshold, interval and warm-up matter?",
        ("spam", *variants.SWEPT),
        scenarios=("noise",),
        rates=RATES[1:4],
    ),
    "combinations": Experiment(
        "Do other defenses make SPAM better?",
        ("spam", "clip_spam", "adaclip, adam", "adaclip, spam", "stabilizer, spam"),
        rates=RATES[1:4],
        models=({}, STABLE),
    ),
    "guards": Experiment(
        "Which faults does a guard stop, and does anything stop it for ever?",
        (
            *("adam", "adam_clip", "spam", "clip_spam"),
            *(*variants.GUARDED, *variants.PUBLISHED),
        ),
        scenarios=SCENARIOS,
        rates=RATES[1:4],
    ),
    "false alarms": Experiment(
        "How many steps of a run without faults does a guard skip?",
        (*variants.GUARDED, *variants.PUBLISHED),
        scenarios=("clean",),
        rates=RATES[1:2],
        models=tuple({"steps": 2000, "data": data} for data in (None, PROSE)),
    ),
    "updates": Experiment(
        "Does clipping the update help, and does a clip that keeps its history?",
        (
            *("adam", "adam_clip", "spam", "clip_spam"),
            *(*variants.UPDATES, *variants.HISTORIES),
        ),
        rates=RATES[1:4],
    ),
    "attention": Experiment(
        "Do limits on the attention logits allow higher learning rates?",
        ("adam",),
        scenarios=("clean",),
        rates=HIGH_RATES,
        models=(
            {},
            {"qk_norm": True},
            {"attention_softcap": 50.0},
            {"qk_clip": 100.0},
            {"qk_clip": 30.0},
        ),
    ),
    "controls": Experiment(
        "How much of SPAM's gain do longer steps or another b2 give to Adam?",
        ("adam", "adam_clip", *variants.CONTROLS, "spam", "clip_spam", "stable_spam"),
        scenarios=("clean",),
    ),
    "long": Experiment(
        "Is it the same in runs ten times as long, with SPAM's published intervals?",
        (
            *("adam", "adam_clip", "adam, SPAM's steps", "adam_clip, SPAM's steps"),
            *("spam", "clip_spam", "stable_spam"),
        ),
        scenarios=("clean",),
        rates=RATES[:3],
        models=({"steps": 3000, "data": PROSE, "reset_interval": 500},),
        adaptive=True,
    ),
    "precision": Experiment(
        "Does SPAM or Stable-SPAM help when linear layers compute with four bits?",
        FEW_BITS,
        scenarios=("clean",),
        rates=HIGH_RATES[:6],
        models=({}, *quantized("int4", "fp4", "fp4_e1m2")),
        adaptive=True,
    ),
    "eight bits": Experiment(
        "Is it the same with bfloat16 or eight bits?",
        ("adam", "adam_clip", "spam", "clip_spam", "stable_spam"),
        scenarios=("clean",),
        rates=HIGH_RATES[:6],
        models=({"compute_dtype": "bfloat16"}, *quantized("int8")),
        adaptive=True,
    ),
    "natural": Experiment(
        "What makes gradients spike without any fault, and what prevents it?",
        (
            *("adam", "adam_clip", "spam", "clip_spam", "stable_spam"),
            *("stabilizer_adam", "guard, adam_clip", "adam, b1 0.98", "adam, b2 0.9"),
            *("adam, b2 0.95", "adam, eps 1e-15", "adam, eps 1e-4"),
        ),
        scenarios=("clean",),
        rates=(8e-3, 3.2e-2),
        models=(
            {},
            {"warmup_steps": 1},
            {"batch_size": 2},
            {"compute_dtype": "bfloat16"},
        ),
    ),
    "depth": Experiment(
        "Does the initialization allow higher learning rates in deeper models?",
        ("adam",),
        scenarios=("clean",),
        rates=DEPTH_RATES,
        models=deep({}, STABLE),
    ),
    "deep": Experiment(
        "Which initialization or norm allows the highest rates with 24 layers?",
        ("adam",),
        scenarios=("clean",),
        rates=DEPTH_RATES,
        models=tuple(DEEP | model for model in INITIALIZATIONS),
    ),
    "depths": Experiment(
        "How do the other initializations and norms change with depth?",
        ("adam",),
        scenarios=("clean",),
        rates=HIGH_RATES[1:],
        models=deep(*INITIALIZATIONS, depths=(3, 12, 48)),  # `deep` has 24
        adaptive=True,
    ),
    "deep clipped": Experiment(
        "Does clipping the norm do for a deep model what the initialization does?",
        ("adam", "adam_clip"),
        scenarios=("clean",),
        rates=DEPTH_RATES,
        models=(DEEP, DEEP | STABLE),
    ),
    "equal size": Experiment(
        "Is it the depth, if models of all depths have the same number of parameters?",
        ("adam",),
        scenarios=("clean",),
        rates=DEPTH_RATES,
        models=equal_sizes({}, STABLE),
        adaptive=True,
    ),
    "warm-up": Experiment(
        "Does the initialization, or QK-norm, replace the warm-up?",
        ("adam", "adam_clip"),
        scenarios=("clean",),
        rates=HIGH_RATES[:6],
        models=tuple(
            DEEP | model | warmup
            for warmup in ({}, {"warmup_steps": 1})
            for model in ({}, STABLE, {"qk_norm": True})
        ),
        adaptive=True,
    ),
    "cliff": Experiment(
        "Which optimizer allows a higher rate or less warm-up in a deep model, and what"
        " does it cost where the model is stable?",
        (
            *("adam", "adam_clip", "spam", "clip_spam", "stable_spam", "muon"),
            *("stabilizer_adam", "guard, adam_clip", "adam, b1 0.98"),
            *("adam, b2 0.95", "adam, SPAM's steps"),
        ),
        scenarios=("clean",),
        rates=HIGH_RATES[:6],
        models=(DEEP, DEEP | {"warmup_steps": 1}),
        adaptive=True,
    ),
}


def runs_of(
    name: str,
    base: RunConfig,
    seeds: Sequence[int],
    *,
    labels: Iterable[str] | None = None,
    scenarios: Iterable[str] | None = None,
    rates: Sequence[float] | None = None,
) -> list[Run]:
    """Returns the runs of an experiment.

    Args:
      name: A key of EXPERIMENTS.
      base: Model, data, steps and batches, where the experiment has no other ones.
      seeds: Seeds of parameters, batches, masks and faults.
      labels: Rows of the table to keep. None keeps all.
      scenarios: Scenarios to keep. None keeps all.
      rates: Learning rates to use instead of those of the experiment.
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
        seeds[: experiment.seeds],
    )
    return [
        Run(
            label,
            scenario,
            base.with_settings(
                learning_rate=rate if rates else rate * RATE_SCALES.get(label, 1),
                seed=seed,
                **(model | faults(scenario) | resets(label, model, base.steps)),
            ),
        )
        for model, scenario, label, rate, seed in grid
    ]


def faults(scenario: str) -> dict[str, Any]:
    """Returns the settings of RunConfig that describe the faults of a scenario."""
    if scenario == "coordinates":
        return {"spike_rate": 1e-3, "spike_kind": "scale"}
    if scenario == "nan":
        return {"spike_rate": 1e-3, "spike_kind": "nan"}
    return {}


def resets(label: str, model: dict[str, Any], steps: int) -> dict[str, Any]:
    """Returns the interval of momentum resets, if the optimizer has any."""
    if not variants.row_of(label).resets:
        return {"reset_interval": None}
    share = round(RESET_SHARE * model.get("steps", steps))
    return {"reset_interval": model.get("reset_interval", share)}
