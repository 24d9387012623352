"""Fine-tuning of a pre-trained language model on another text: task and study."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.figure
import numpy as np
import optax

from studies import engine, pictures, pretrained, task
from studies.comparison.study import LanguageModel
from studies.pretrained import Pretrained
from studies.task import Run, Score, setting
from trainer import data, model, train_step
from trainer.data import text_files
from trainer.errors import UsageError

SCENARIOS = ("clean", "noise", "batches")
TEXTS = (str(text_files.PROSE), str(text_files.SHAKESPEARE))
COLUMNS = ("label", "best_rate", "final_loss", "spread", "forgetting", "sensitivity")
COLUMNS += ("skipped", "diverged", "bytes_per_parameter", "temporaries")
MARKERS = "os^Dv<>P*X"  # of the lines and points of the figure


@dataclasses.dataclass(frozen=True)
class Options:
    """What is trained, and on what."""

    checkpoint: str | None = setting(
        None,
        "the model: a folder of a run of pretrain.py, or of one of its optimizers"
        " (RUN/checkpoints/NAME); or a folder of Hugging Face with config.json and the"
        " safetensors or the flax_model.msgpack of a LLaMA (default: a small model,"
        " pre-trained first)",
        str,
        "FOLDER",
    )
    data: str | None = setting(
        None,
        "the new text: a file, a glob, or a folder of *.txt, whose last tenth is the"
        " validation set (default: the embedded Shakespeare, or else the embedded"
        " prose)",
        str,
        "SOURCE",
    )
    old_data: str | None = setting(
        None,
        "the text on which forgetting is measured (default: that of the run of"
        " pretrain.py, or else the embedded prose)",
        str,
        "SOURCE",
    )
    tokenizer: str | None = setting(
        None,
        "the tokenizer of the model, as in pretrain.py (default: that of the run, or"
        " tokenizer.json in the folder)",
        str,
        "NAME",
    )


class FineTuning(LanguageModel):
    """Predicts the next token of a new text, beginning with a pre-trained model."""

    def __init__(self, run: Run, base: Pretrained, old_text: str, new_text: str):
        settings = {"tokenizer": base.tokenizer, "separator": base.separator}
        config = dataclasses.replace(
            run.config, model=base.model, data=new_text, **settings
        )
        super().__init__(run._replace(config=config))
        if self._vocabulary > base.model.vocabulary:
            raise UsageError(
                f"the tokenizer {base.tokenizer} has {self._vocabulary} tokens, and the"
                f" model only {base.model.vocabulary}"
            )
        self._graphdef, _ = model.abstract(base.model)
        tokenizer, old, _ = text_files.load(old_text, base.tokenizer, base.separator)
        self._old = data.evaluation_batches(old.validation, tokenizer, config)
        self._params = base.params

    def inputs(self, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
        batches, new = super().inputs(run)
        return batches, {"params": self._params, "new": new, "old": self._old}

    def init(self, seed: jax.typing.ArrayLike) -> optax.Params:
        return jax.tree.map(jax.numpy.asarray, self._params)

    def first(self, seed, test):
        return test["params"]

    def evaluate(self, params, test):
        return super().evaluate(params, test["new"])

    def measure(self, before, after, test):
        """Returns the rise of the loss on the old text."""
        first, last = (
            train_step.evaluate(params, test["old"], graphdef=self._graphdef)
            for params in (before, after)
        )
        return {"forgetting": last - first}


class FineTuneStudy(task.TaskStudy):
    """Fine-tunes one model with several optimizers."""

    score = Score(
        "loss",
        "the loss on the validation part of the new text, in nats,",
        columns=COLUMNS,
        more={
            "forgetting": (
                "forgetting",
                "the rise of the loss on the old text, in nats, from before to after"
                " fine-tuning at the best rate, mean over the seeds.",
            ),
            "temporaries": (
                "temporaries/param",
                "the bytes per parameter that the compiled run takes for parameters,"
                " state, gradients and activations.",
            ),
        },
    )

    def __init__(self, options: Options):
        super().__init__(options)
        folder = pathlib.Path(options.checkpoint)
        self.base = pretrained.read(folder, options.tokenizer)
        self.old_text = options.old_data or self.base.data or TEXTS[0]
        others = [text for text in TEXTS[::-1] if text != self.old_text]
        self.new_text = options.data or others[0]
        tokenizer = self.base.tokenizer, self.base.separator
        self.contents = {
            "checkpoint": self.base.digest,
            "old_text": text_files.load(self.old_text, *tokenizer)[2],
            "new_text": text_files.load(self.new_text, *tokenizer)[2],
        }

    def settings(self, run: Run) -> dict[str, Any]:
        """Returns settings with digests of what was read, wherever it was."""
        given = super().settings(run)
        for name in dataclasses.asdict(self.options):
            del given[name]
        lengths = ("sequence_length", "eval_sequences")
        given |= {name: getattr(run.config, name) for name in lengths}
        return given | self.contents

    def task(self, run: Run) -> FineTuning:
        return FineTuning(run, self.base, self.old_text, self.new_text)

    def compile(self, run: Run) -> engine.Train:
        config = dataclasses.replace(run.config, model=self.base.model)
        return super().compile(run._replace(config=config))

    def decode(self, record: engine.Record) -> engine.Record:
        temporaries = record["temporary_bytes"] / record["parameters"]
        more = {"forgetting": record["forgetting"], "temporaries": temporaries}
        return super().decode(record) | {"more": more}

    def draw(self, results, records):
        return draw(results, np.mean([r["first_eval_loss"] for r in records]))


def draw(results: Sequence[Any], first_loss: float) -> matplotlib.figure.Figure:
    """Draws loss and forgetting over the memory of the optimizer's state.

    Variants of one optimizer, which differ in density or rank, are joined by a line.
    """
    scenarios = list(dict.fromkeys(row.scenario for row in results))
    families = {}
    for row in sorted(results, key=lambda row: row.bytes_per_parameter):
        name = re.sub(r"(, (density|rank)) \S+$", r"\1", row.label)
        families.setdefault(name, []).append(row)
    drawn = matplotlib.figure.Figure(
        figsize=(13, 5.5 * len(scenarios)), layout="constrained", dpi=120
    )
    panels = drawn.subplots(len(scenarios), 2, sharex=True, squeeze=False)
    for scenario, (left, right) in zip(scenarios, panels, strict=True):
        for number, (name, rows) in enumerate(families.items()):
            own = [row for row in rows if row.scenario == scenario]
            has_variants = any(row.label != name for row in rows)
            style = {
                "color": pictures.color_of(number) if has_variants else "black",
                "marker": MARKERS[number % len(MARKERS)],
                "fillstyle": "full" if has_variants else "none",
                "linestyle": "-" if has_variants else "none",
            }
            memory = [row.bytes_per_parameter for row in own]
            loss, low, high = (
                np.array([getattr(row, x) for row in own])
                for x in ("final_loss", "low", "high")
            )
            forgetting = np.array([row.more["forgetting"] for row in own], float)
            spread = [loss - low, high - loss]
            left.errorbar(memory, loss, spread, capsize=2, label=name, **style)
            right.plot(memory, forgetting, **style)
            for row, *heights in zip(own, loss, forgetting, strict=True):
                if row.label == name:
                    continue
                for panel, height in zip((left, right), heights, strict=True):
                    panel.annotate(
                        row.label.rpartition(" ")[2],
                        (row.bytes_per_parameter, height),
                        (4, 4),
                        textcoords="offset points",
                        fontsize=8,
                        color=style["color"],
                    )
        left.axhline(first_loss, color="grey", linestyle=":", linewidth=1)
        right.axhline(0, color="grey", linestyle=":", linewidth=1)
        left.set_title(f"{scenario}: loss on the new text (dotted: before)")
        right.set_title(f"{scenario}: forgetting, the rise of the loss on the old text")
        for panel in (left, right):
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.set_ylabel("nats (lower is better)")
            panel.grid(alpha=0.3)
    drawn.supxlabel("bytes of optimizer state per parameter", fontsize=10)
    drawn.legend(*left.get_legend_handles_labels(), loc="outside right", fontsize=9)
    return drawn
