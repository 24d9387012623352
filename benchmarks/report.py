"""The results as a page of Markdown tables, each with how to read it."""

import statistics

from benchmarks import state, steps

_GIB = 2**30


def render(results):
    """The page; sections that were not measured are left out."""
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks`; `results.json` has the same numbers, "
        "unrounded. Ratios are medians over rounds in which the optimizers take turns, "
        "so that a drift of the machine's speed cancels. Without further arguments "
        "weight decay is 0, except for AdamW, and the learning rate is a constant. "
        "`spam_clip, adam` is `optax.chain(spam_clip(), optax.adam(1e-3))`, and so on. "
        '"No counts" is `count_spikes=False`.',
    ]
    for name, write in _SECTIONS.items():
        if name in results:
            section = results[name]
            data = section["data"]
            parts += write(data) if data is not None else [_MISSING[name]]
            parts.append(_environment(section))
    return "\n\n".join(parts) + "\n"


_MISSING = {
    "compiled": "## Compiled for TPU\n\nNot measured: libtpu is not installed.",
    "presets": "## Memory of the trainer\n\nNot measured: neither libtpu nor JAX's "
    "CUDA plugin is installed.",
    "trainer": "## The trainer beside PyTorch\n\nNot measured: torch is not installed.",
}


def _environment(section):
    about = section["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    quick = "A quick run, whose times mean nothing. " if section["quick"] else ""
    return (
        f"_{quick}{about['date']}, {about['machine']}, {about['cores']} cores, "
        f"{about['memory_gib']:.0f} GiB, {about['system']}, {about['device']}, load at "
        f"the start {about['load_at_start']:.1f}; Python {about['python']}, "
        f"{versions}._"
    )


def _table(header, rows):
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _step(data):
    matrices, leaves = data["matrices"], data["leaves"]
    return [
        "## Time and memory of a step",
        "One step is `update` and `apply_updates` in one jitted function with the "
        "buffers of parameters and state donated. Bytes are per parameter: the "
        "optimizer's state, and what the compiled step allocates on top of its "
        "arguments. The ratio is to `optax.adamw` in the same order of arguments, "
        "with the quartiles over the rounds in brackets.",
        f"### {_parameters(matrices)} in {matrices['leaves']} equal matrices",
        "`step(params, state, gradients)`:",
        _step_table(matrices, steps.PARAMS_FIRST),
        "`step(gradients, state, params)`:",
        _step_table(matrices, steps.GRADIENTS_FIRST),
        _order_reading(matrices),
        *_torch(matrices),
        f"### {_parameters(leaves)} in {leaves['leaves']} arrays of a LLaMA",
        "Embedding, head and norms are dense for `sparse_spam` and GaLore, so they "
        "save less than on matrices alone. GaLore (rank 128) decomposes its "
        "gradients every 200 steps, which no timed step does. "
        "`step(params, state, gradients)`:",
        _step_table(leaves, steps.PARAMS_FIRST),
        "`step(gradients, state, params)`:",
        _step_table(leaves, steps.GRADIENTS_FIRST),
        *_torch(leaves),
    ]


def _parameters(group):
    return f"{group['parameters'] / 1e6:.1f}M float32 parameters"


def _step_table(group, order):
    return _table(
        ["optimizer", "ms", "ratio", "state", "temporaries", "compile s", "rounds"],
        [
            [
                row["optimizer"],
                f"{row['milliseconds']:.0f}",
                _ratio(row),
                f"{row['state_bytes']:.2f}",
                f"{row['temporary_bytes']:.2f}",
                f"{row['compile_seconds']:.1f}",
                row["rounds"],
            ]
            for row in group["rows"]
            if row["order"] == order
        ],
    )


def _ratio(row):
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def _order_reading(group):
    first, last = (
        next(
            row
            for row in group["rows"]
            if row["optimizer"] == "optax.adamw" and row["order"] == order
        )
        for order in steps.ORDERS
    )
    return (
        "The order of the arguments matters on a CPU. JAX gives each result the first "
        "donated buffer of its shape. Since the results are parameters, then state, "
        "`step(params, state, gradients)` writes everything where it was read; "
        "`step(gradients, state, params)` would write the parameters over a moment "
        f"that is still needed, and copies. AdamW takes {first['milliseconds']:.0f} ms "
        f"and {first['temporary_bytes']:.1f} bytes of temporaries per parameter one "
        f"way, {last['milliseconds']:.0f} ms and {last['temporary_bytes']:.1f} bytes "
        "the other. So put the parameters first, in the arguments as in the results."
    )


def _torch(group):
    if not group["torch"]:
        return ["PyTorch was not measured: torch is not installed."]
    adamw = next(
        row["milliseconds"]
        for row in group["rows"]
        if row["optimizer"] == "optax.adamw" and row["order"] == steps.PARAMS_FIRST
    )
    return [
        "PyTorch on the same shapes, eager, in a process of its own with as many "
        "threads. The ratio to `optax.adamw` compares medians of the two processes, "
        "which did not take turns; `density=0.25` of its SPAM holds for every matrix, "
        "embedding and head included, and its state has a mask of one byte per "
        "parameter at any density.",
        _table(
            [
                *("optimizer", "ms", "ratio to torch's fused AdamW"),
                *("state", "ratio to optax.adamw", "rounds"),
            ],
            [
                [
                    row["optimizer"],
                    f"{row['milliseconds']:.0f}",
                    _ratio(row),
                    f"{row['state_bytes']:.2f}",
                    f"{row['milliseconds'] / adamw:.2f}",
                    row["rounds"],
                ]
                for row in group["torch"]
            ],
        ),
    ]


def _compiled(data):
    return [
        "## Compiled for TPU",
        "One float32 matrix of 8192 x 8192 on one chip, in bytes per parameter. "
        '"Moved" is what the compiler\'s cost analysis says the step reads and writes; '
        "the floor is to read the gradient once and to read and write parameter and "
        "state once; temporaries are memory allocated on top. These are the "
        "compiler's figures, not times.",
        _table(
            ["optimizer", "chip", "moved", "floor", "moved / floor", "temporaries"],
            [
                [
                    row["optimizer"],
                    row["chip"],
                    f"{row['bytes']:.2f}",
                    f"{row['floor']:.2f}",
                    f"{row['bytes'] / row['floor']:.2f}",
                    f"{row['temporary_bytes']:.2f}",
                ]
                for row in data["rows"]
            ],
        ),
        "What a step sends between four v5e chips, 2 x 2, by how the matrix is "
        "sharded: over two chips by rows or by columns, or over all four. In "
        "brackets, how many numbers the largest such operation returns: 1 is a "
        "scalar, a counter.",
        _table(
            ["optimizer", "rows", "columns", "both"],
            [
                [name, *(_kinds(data, name, x) for x in ("rows", "columns", "both"))]
                for name in dict.fromkeys(x["optimizer"] for x in data["collectives"])
            ],
        ),
    ]


def _kinds(data, name, sharding):
    kinds = next(
        row["kinds"]
        for row in data["collectives"]
        if row["optimizer"] == name and row["sharding"] == sharding
    )
    return ", ".join(f"{kind} ({size:,})" for kind, size in kinds.items()) or "none"


def _state(data):
    models = list(data)
    rows = data[models[0]]["state_bytes_per_parameter"]
    totals = data[models[0]]["bfloat16_bytes"]
    return [
        "## State of the models",
        "Bytes of optimizer state per parameter, of LLaMA models with float32 "
        "parameters, embedding and untied head (vocabulary 32000) included. Sparse "
        "momentum and GaLore act on the matrices of attention and feed-forward layers; "
        "embedding, head and norms are dense, so small models gain less. The paper's "
        "density is "
        + ", ".join(f"{state.PAPER_DENSITY[x]} ({x})" for x in models)
        + "; GaLore's rank "
        + ", ".join(f"{state.GALORE_RANK[x]}" for x in models)
        + ".",
        _table(
            ["optimizer", *_titles(data)],
            [
                [
                    row,
                    *(
                        f"{data[x]['state_bytes_per_parameter'][row]:.2f}"
                        for x in models
                    ),
                ]
                for row in rows
            ],
        ),
        "Weights and optimizer state together, all in bfloat16, in GiB. The rows "
        '"printed" are quoted: estimates of parameters and optimizer states in '
        "bfloat16 as GaLore (arXiv 2403.03507) and SPAM (arXiv 2501.06842), with a "
        "density chosen to match GaLore's memory, print them; they say G, without "
        "saying whether of 2^30 or 10^9 bytes. Ours are the bytes of the arrays that "
        "`tx.init` makes; no gradients or activations in either. The printed figures "
        "for SPAM leave out the mask, a byte per parameter in the authors' code; ours "
        "needs no memory.",
        _table(
            ["", *_titles(data)],
            [
                *(
                    [
                        f"printed: {name}",
                        *(f"{figures[x]:.2f} G" for x in models),
                    ]
                    for name, figures in state.PAPER_MEMORY.items()
                ),
                *(
                    [
                        row,
                        *(
                            f"{data[x]['bfloat16_bytes'][row] / _GIB:.2f}"
                            for x in models
                        ),
                    ]
                    for row in totals
                ),
            ],
        ),
    ]


def _titles(data):
    return [f"{x} ({data[x]['parameters'] / 1e6:.0f}M)" for x in data]


def _scaling(data):
    return [
        "## Scaling",
        "Milliseconds of a step, and in brackets the ratio to `optax.adamw`, "
        "`step(params, state, gradients)`. By the number of parameters, in matrices "
        "of 1024 x 1024:",
        _scaling_table(data["parameters"], "parameters", _timed),
        "By the number of equal matrices that 16.8M parameters are divided into:",
        _scaling_table(data["leaves"], "leaves", _timed),
        "Seconds to trace and to compile these steps, once in a run:",
        _scaling_table(
            data["leaves"], "leaves", lambda row: f"{row['compile_seconds']:.1f}"
        ),
    ]


def _timed(row):
    return f"{row['milliseconds']:.1f} ({row['ratio']:.2f})"


def _scaling_table(rows, axis, cell):
    values = list(dict.fromkeys(row[axis] for row in rows))
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    cells = {(row["optimizer"], row[axis]): cell(row) for row in rows}
    return _table(
        ["optimizer", *(_count(n) for n in values)],
        [[name, *(cells[name, n] for n in values)] for name in names],
    )


def _count(n):
    return f"{n / 1e6:.1f}M" if n >= 10**6 else n


def _presets(data):
    return [
        "## Memory of the trainer",
        "The very step of `examples/pretrain.py`, compiled for devices that were not "
        "at hand (`--compile-only`), with each preset's published settings: 512 "
        "sequences of 256 tokens a step, bfloat16 compute, full rematerialization, "
        "float32 parameters and moments, sharded over all devices (`--fsdp`). GiB for "
        "each device: parameters and optimizer state; what is allocated beside them; "
        "together, and of how much. Attention on the GPU is XLA's own here, for want "
        "of cuDNN, which takes more than the fused kernel.",
        preset_table(data),
    ]


def preset_table(data):
    """The table that the READMEs of the launch scripts show too."""
    return _table(
        ["preset", "devices", "optimizer", "state", "temporaries", "together", "of"],
        [
            [
                row["preset"],
                f"`{row['target']}`",
                row["optimizer"],
                f"{row['state'] / _GIB:.2f}",
                f"{row['temporaries'] / _GIB:.2f}",
                f"{row['total'] / _GIB:.2f}",
                f"{row['memory'] / _GIB:.0f}",
            ]
            for row in data
        ],
    )


def _trainer(data):
    names = {"trainer_jax": "examples/pretrain.py", "trainer_torch": "PyTorch"}
    rows = [
        [
            names[engine],
            f"{min(data[engine]['seconds']):.2f}",
            f"{statistics.median(data[engine]['seconds']):.2f}",
            f"{data['tokens'] / statistics.median(data[engine]['seconds']):,.0f}",
        ]
        for engine in names
    ]
    parameters = data["trainer_jax"]["parameters"] / 1e6
    return [
        "## The trainer beside PyTorch",
        f"One training step of the 60M shape ({parameters:.1f}M parameters) on "
        f"{data['tokens']} tokens, float32, AdamW behind a limit on the global norm, "
        "on this CPU. The trainer's step measures the norms of every tensor and its "
        "spike scores besides; PyTorch's is a plain eager loop with its fused AdamW. "
        f"Processes that take turns, {len(data['trainer_jax']['seconds'])} each. "
        f"PyTorch's time over the trainer's, median: **{data['ratio']:.2f}**.",
        _table(["loop", "least s", "median s", "tokens/s"], rows),
    ]


_SECTIONS = {
    "step": _step,
    "compiled": _compiled,
    "state": _state,
    "scaling": _scaling,
    "presets": _presets,
    "trainer": _trainer,
}
