"""Time of PyTorch's optimizers on the same shapes, in a process without JAX.

Reads a job from standard input and writes rows to standard output, both JSON.
"""

import functools
import importlib.util
import json
import sys
import time

import torch

from benchmarks import turns

BASELINE = "torch.optim.AdamW(fused=True)"


def makers():
    table = {
        BASELINE: lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        "torch.optim.AdamW(foreach=True)": lambda params: torch.optim.AdamW(
            params, lr=1e-3, foreach=True
        ),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        table["pytorch_optimizer.SPAM"] = pytorch_optimizer.SPAM
        table["pytorch_optimizer.SPAM(density=0.25)"] = lambda params: (
            pytorch_optimizer.SPAM(params, density=0.25)
        )
    return table


def seconds(optimizer):
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def state_bytes(optimizer):
    entries = [x for x in optimizer.state.values() if isinstance(x, dict)]
    values = [value for entry in entries for value in entry.values()]
    return sum(x.nbytes for x in values if isinstance(x, torch.Tensor))


def measure(shapes, rounds):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    parameters = sum(p.numel() for p in params)
    optimizers = {name: make(params) for name, make in makers().items()}
    timed = {name: functools.partial(seconds, x) for name, x in optimizers.items()}
    *_, times = turns.interleave(timed, rounds)
    return [
        {
            "optimizer": name,
            **turns.compare(times[name], times[BASELINE]),
            "state_bytes": state_bytes(optimizer) / parameters,
        }
        for name, optimizer in optimizers.items()
    ]


def main():
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    json.dump(measure(job["shapes"], job["rounds"]), sys.stdout)


if __name__ == "__main__":
    main()
