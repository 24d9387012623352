"""The results as pictures."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from benchmarks import steps  # noqa: E402

_OURS, _OTHERS, _QUIET = "#c44e52", "#4c72b0", "#b8b8b8"


def draw(results, folder):
    """Writes a picture for each section that was measured."""
    for name, paint in _PICTURES.items():
        data = results.get(name, {}).get("data")
        if data:
            figure = paint(data)
            figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")
            plt.close(figure)


def _color(name):
    return _OURS if "spam" in name.lower() else _OTHERS


def _bars(axes, names, values, texts):
    bars = axes.barh(names, values, color=[_color(x) for x in names])
    axes.bar_label(bars, texts, padding=3, fontsize=8)


def _tidy(axes, title, room=0.15):
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=room)


def _step(data):
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    group = data["matrices"]
    by_order = {
        order: {x["optimizer"]: x for x in group["rows"] if x["order"] == order}
        for order in steps.ORDERS
    }
    best, crossed = (by_order[order] for order in steps.ORDERS)
    names = sorted(best, key=lambda name: -best[name]["milliseconds"])
    rows = [best[name] for name in names]
    fast = [row["milliseconds"] for row in rows]
    slow = [crossed[name]["milliseconds"] for name in names]
    panels[0].barh(names, slow, color=_QUIET)
    panels[0].barh(names, fast, color=[_color(x) for x in names], height=0.5)
    for name, row, here, there in zip(names, rows, fast, slow, strict=True):
        panels[0].annotate(
            f"{here:.0f} ms, {row['ratio']:.2f} x (grey {there:.0f})",
            (max(here, there), name),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    count = f"{group['parameters'] / 1e6:.0f}M"
    _tidy(
        panels[0],
        f"ms of a step of {count} parameters on CPU, and times optax.adamw\n"
        "grey: gradients before parameters in the step's arguments",
        room=0.45,
    )

    state_bytes = [row["state_bytes"] for row in rows]
    temporary = [row["temporary_bytes"] for row in rows]
    panels[1].barh(names, state_bytes, color=[_color(x) for x in names])
    bars = panels[1].barh(names, temporary, left=state_bytes, color=_QUIET)
    totals = [a + b for a, b in zip(state_bytes, temporary, strict=True)]
    panels[1].bar_label(bars, [f"{x:.1f}" for x in totals], padding=3, fontsize=8)
    panels[1].set_yticks([])
    _tidy(panels[1], "bytes per parameter: state\ngrey: temporaries of the step")
    return figure


def _compiled(data):
    rows = [row for row in data["rows"] if row["chip"] == "v5e"][::-1]
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    names = [row["optimizer"] for row in rows]
    values = [row["bytes"] for row in rows]
    _bars(axes, names, values, [f"{x:.1f}" for x in values])
    axes.scatter(
        [row["floor"] for row in rows],
        names,
        marker="|",
        s=140,
        color="black",
        zorder=3,
        label="floor: read and write everything once",
    )
    axes.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.09))
    _tidy(axes, "TPU v5e: bytes moved per parameter")
    return figure


def _state(data):
    models = list(data)
    rows = {
        "weights + Adam": ("optax.adam", _OTHERS),
        "weights + GaLore": ("contrib.galore", "#8172b3"),
        "weights + sparse_spam, paper's density": (
            "sparse_spam, paper's density, bfloat16 moments",
            _OURS,
        ),
        "weights + sparse_spam 1/4": ("sparse_spam 1/4, bfloat16 moments", "#dd8452"),
    }
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.2
    for i, (label, (name, color)) in enumerate(rows.items()):
        places = [x + (i - 1.5) * width for x in range(len(models))]
        values = [
            data[x]["bfloat16_bytes"][name] / 2 / data[x]["parameters"] for x in models
        ]
        bars = axes.bar(places, values, width, color=color, label=label)
        axes.bar_label(bars, [f"{x:.1f}" for x in values], fontsize=7, padding=1)
    axes.set_xticks(range(len(models)), models)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_ylim(0, 4)
    axes.set_title(
        "weights and state in bfloat16, weights alone = 1", loc="left", fontsize=10
    )
    return figure


def _scaling(data):
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    _lines(
        panels[0],
        data["parameters"],
        "parameters",
        lambda row: 1e6 * row["milliseconds"] / row["parameters"],
        "ns per parameter, matrices of 1024 x 1024",
    )
    _lines(
        panels[1],
        data["leaves"],
        "leaves",
        lambda row: row["milliseconds"],
        "ms of a step, 16.8M parameters",
    )
    _lines(
        panels[2],
        data["leaves"],
        "leaves",
        lambda row: row["compile_seconds"],
        "seconds to trace and compile it",
    )
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _lines(axes, rows, across, height, title):
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        mine = [row for row in rows if row["optimizer"] == name]
        places = [row[across] for row in mine]
        axes.plot(places, list(map(height, mine)), "o-", markersize=4, label=name)
    labels = [f"{x / 1e6:.0f}M" if x >= 10**6 else x for x in places]
    axes.set_xscale("log")
    axes.set_xticks(places, labels)
    axes.minorticks_off()
    axes.set_xlabel({"parameters": "parameters", "leaves": "arrays"}[across])
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


_PICTURES = {
    "step": _step,
    "compiled": _compiled,
    "state": _state,
    "scaling": _scaling,
}
