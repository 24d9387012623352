"""How the time of a step grows with the number of parameters and of arrays."""

from benchmarks import optimizers, shapes, steps

NAMES = ("optax.adamw", "spam, no counts", "spam", "sparse_spam 1/4")
MILLIONS = (1, 3, 10, 30, 100, 200)
LEAVES = (1, 16, 64, 256)


def measure(quick, track):
    """Rows by the number of parameters, and by the leaves these are divided into."""
    rounds = 3 if quick else 7
    sizes = MILLIONS[:3] if quick else MILLIONS
    leaves = LEAVES[:2] if quick else LEAVES
    # A matrix of 1024 x 1024 has about a million numbers; 4096 x 4096 are divided.
    by_size = [(n, 1024) for n in sizes]
    by_leaves = [(n, round(4096 / n**0.5)) for n in leaves]
    return {
        title: [
            row
            for count, width in track(divided, description=f"scaling by {title}")
            for row in _rows(count, width, rounds)
        ]
        for title, divided in (("parameters", by_size), ("leaves", by_leaves))
    }


def _rows(count, width, rounds):
    params = shapes.matrices(count, width)
    makers = {name: optimizers.ELEMENTWISE[name] for name in NAMES}
    contenders = [
        steps.compile_contender(name, make, params) for name, make in makers.items()
    ]
    rows = steps.compete(contenders, params, makers, rounds, iter)
    about = {"parameters": shapes.size(params), "leaves": count}
    return [about | row for row in rows]
