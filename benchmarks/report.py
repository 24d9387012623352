"""Writes the results as a page of Markdown tables, and explains each table."""

import statistics

from benchmarks import state, steps

_GIB = 2**30


def render(results):
    """Returns the page, without the sections that were not measured."""
    parts = [
        "# Benchmarks",
        "`python -m benchmarks` writes this page. `results.json` has the same numbers "
        "without rounding. The optimizers take turns in rounds, and a ratio is the "
        "median over the rounds, so slow changes of the machine's speed cancel. The "
        "learning rate is constant, and weight decay is 0 except in AdamW. "
        "`spam_clip, adam` means `optax.chain(spam_clip(), optax.adam(1e-3))`, and so "
        'on. An optimizer with "no counts" does not count clipped and non-finite '
        "coordinates (the default). The same optimizer without this remark "
        "does (`count=True`).",
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
    quick = "A quick run, without meaningful times. " if section["quick"] else ""
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
        "One step is `update` and `apply_updates` in one jitted function. The buffers "
        "of parameters and state are donated. The state and the temporaries are in "
        "bytes per parameter. Temporaries are what the compiled step allocates in "
        "addition to its arguments. The ratio compares with `optax.adamw` in the same "
        "order of arguments. The numbers in brackets are the quartiles over the "
        "rounds.",
        f"### {_parameters(matrices)} in {matrices['leaves']} equal matrices",
        "`step(params, state, gradients)`:",
        _step_table(matrices, steps.PARAMS_FIRST),
        "`step(gradients, state, params)`:",
        _step_table(matrices, steps.GRADIENTS_FIRST),
        _order_reading(matrices),
        *_torch(matrices),
        f"### {_parameters(leaves)} in {leaves['leaves']} arrays of a LLaMA",
        "`sparse_spam` and GaLore have dense moments for embedding, head and norms, so "
        "they save less here than for matrices alone. GaLore (rank 128) decomposes its "
        "gradients every 200 steps. No timed step is one of these. "
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
        "donated buffer of its shape, and the results are the parameters and then the "
        "state. `step(params, state, gradients)` therefore writes every result where "
        "it was read. `step(gradients, state, params)` would write the parameters over "
        "a moment that is still needed, so it copies. AdamW takes "
        f"{first['milliseconds']:.0f} ms and {first['temporary_bytes']:.1f} bytes of "
        "temporaries per parameter with the first order, and "
        f"{last['milliseconds']:.0f} ms and {last['temporary_bytes']:.1f} bytes with "
        "the second. Put the parameters first, in the arguments and in the results."
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
        "The next table is PyTorch on the same shapes, eager, in a separate process "
        "with the same number of threads. The two processes did not take turns, so the "
        "ratio to `optax.adamw` compares their medians. In PyTorch's SPAM, "
        "`density=0.25` applies to every matrix, including embedding and head. Its "
        "state has a mask of one byte per parameter at any density.",
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


def _compile(data):
    parts = [
        "## Time to compile",
        "The table lists the processor seconds that one step of the "
        f"{data['leaves']} arrays of a LLaMA (22 layers, not stacked) takes before it "
        "can run: JAX traces it and lowers it to StableHLO, and XLA compiles it. The "
        "ratio compares the sum with `optax.adamw`. Operations are those of the "
        "StableHLO program. Temporaries are in bytes per parameter.",
    ]
    titles = {"cpu": "XLA:CPU", "tpu": "The compiler for TPU v5e"}
    for platform, title in titles.items():
        rows = [row for row in data["rows"] if row["platform"] == platform]
        if not rows:
            continue
        baseline = sum(rows[0]["seconds"].values())
        cells = [
            [
                row["optimizer"],
                *(f"{seconds:.2f}" for seconds in row["seconds"].values()),
                f"{sum(row['seconds'].values()) / baseline:.2f}",
                f"{row['operations']:,}",
                f"{row['temporary_bytes']:.2f}",
            ]
            for row in rows
        ]
        stages = ("trace", "lower", "compile")
        header = ["optimizer", *stages, "ratio", "operations", "temporaries"]
        parts += [f"{title}:", _table(header, cells)]
    return parts


def _compiled(data):
    return [
        "## Compiled for TPU",
        "The table is for one float32 matrix of 8192 x 8192 on one chip. All numbers "
        'are bytes per parameter. "Moved" is the compiler\'s estimate of what the step '
        "reads and writes. The floor is what it must at least move: it reads the "
        "gradient once, and reads and writes parameter and state once. Temporaries are "
        "allocated in addition. The compiler computes these numbers; nothing was timed "
        "on a TPU.",
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
        "The next table lists what a step sends between four v5e chips, 2 x 2. The "
        "matrix is sharded by rows over two chips, by columns over two chips, or by "
        "both over all four. The number in brackets is how many numbers the largest "
        "operation of this kind returns. A 1 is a scalar, which is a counter.",
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
        "The table lists bytes of optimizer state per parameter for LLaMA models with "
        "float32 parameters. Embedding and untied head (vocabulary 32000) are "
        "included. Sparse momentum and GaLore act on the matrices of attention and "
        "feed-forward layers. Embedding, head and norms are dense, so small models "
        "gain less. The paper's density is "
        + ", ".join(f"{state.PAPER_DENSITY[x]} ({x})" for x in models)
        + ". GaLore's rank is "
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
        "The next table lists weights and optimizer state together, all in bfloat16, "
        'in GiB. The rows "printed" quote the papers of GaLore (arXiv 2403.03507) and '
        "SPAM (arXiv 2501.06842). SPAM's density is chosen there to match GaLore's "
        "memory. The papers print G and do not define whether it means 2^30 or 10^9 "
        "bytes. The other rows are the bytes of the arrays that `tx.init` makes. "
        "Gradients and activations are not included. The printed numbers for SPAM "
        "leave out the mask, which takes one byte per parameter in the authors' code. "
        "The masks of this library take no memory.",
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
        "The tables list the milliseconds of `step(params, state, gradients)`. The "
        "ratio to `optax.adamw` is in brackets. The first is by the number of "
        "parameters, in matrices of 1024 x 1024:",
        _scaling_table(data["parameters"], "parameters", _timed),
        "The second is by the number of equal matrices that hold 16.8M parameters:",
        _scaling_table(data["leaves"], "leaves", _timed),
        "The third lists the seconds that tracing and compiling these steps takes, "
        "once per run:",
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
        "This is the training step of `examples/pretrain.py`, compiled without the "
        "devices (`--compile-only`). Each preset has its published settings: 512 "
        "sequences of 256 tokens per step, bfloat16 compute, full rematerialization, "
        "and float32 parameters and moments, sharded over all devices (`--fsdp`). The "
        "numbers are GiB per device. The state is parameters and optimizer state. The "
        "last column is the memory of the device. Attention on the GPU is XLA's own "
        "here, because cuDNN was missing. It takes more memory than the fused kernel.",
        preset_table(data),
    ]


def preset_table(data):
    """Returns the table, which the READMEs of the launch scripts have too."""
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
        f"This is one training step of the 60M shape ({parameters:.1f}M parameters) on "
        f"{data['tokens']} tokens on this CPU, in float32, with AdamW after a clip of "
        "the global norm. The trainer's step also measures norms and spike scores of "
        "every tensor. PyTorch runs a plain eager loop with its fused AdamW. The two "
        f"programs take turns, with {len(data['trainer_jax']['seconds'])} processes "
        "each. The median ratio of PyTorch's time to the trainer's is "
        f"**{data['ratio']:.2f}**.",
        _table(["loop", "least s", "median s", "tokens/s"], rows),
    ]


_SECTIONS = {
    "step": _step,
    "compile": _compile,
    "compiled": _compiled,
    "state": _state,
    "scaling": _scaling,
    "presets": _presets,
    "trainer": _trainer,
}
