"""Time of PyTorch's training steps of a LLaMA of 60M parameters.

A plain training loop, eager and in float32: forward, backward, global-norm clip and
AdamW. The model is the one of examples/trainer/model.py with the shape "60m" and a
head of its own, matrix for matrix. Runs in a process without JAX, whose threads would
be in the way, and writes JSON to standard output:

    python -m benchmarks.trainer_torch --batch-size 4 --sequence-length 256 --steps 3
"""

import argparse
import json
import os
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, FFN_WIDTH, HEADS, LAYERS = 32_000, 512, 1376, 8, 8
ROTARY_BASE = 10_000.0
LEARNING_RATE, CLIP_NORM = 1e-3, 1.0


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotary_angles(tokens):
    """Cosines and sines of the rotary positions, each of shape (T, K / 2)."""
    half = WIDTH // HEADS // 2
    frequency = ROTARY_BASE ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(tokens), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x, rotary):
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = linear(WIDTH, WIDTH)
        self.key = linear(WIDTH, WIDTH)
        self.value = linear(WIDTH, WIDTH)
        self.out = linear(WIDTH, WIDTH)

    def forward(self, x, rotary):
        query, key, value = (
            project(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(
            rotate(query, rotary), rotate(key, rotary), value, is_causal=True
        )
        return self.out(attended.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = linear(WIDTH, FFN_WIDTH)
        self.up = linear(WIDTH, FFN_WIDTH)
        self.down = linear(FFN_WIDTH, WIDTH)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.attention = Attention()
        self.ffn_norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.ffn = FeedForward()

    def forward(self, x, rotary):
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    def __init__(self, tokens):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.head = linear(WIDTH, VOCABULARY)
        self.register_buffer("rotary", rotary_angles(tokens), persistent=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.5 / WIDTH**0.5)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.rotary)
        return self.head(self.norm(x))


def train_step(model, optimizer, inputs, targets):
    optimizer.zero_grad(set_to_none=True)
    logits = model(inputs)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return loss.item()


def measure(batch, steps, record=lambda loss: None):
    """Seconds of each of `steps` steps on `batch`, after one that warms up.

    Args:
      batch: Token ids of shape (B, T + 1): inputs and, shifted by one, targets.
      steps: Steps to time.
      record: Called with the loss before each step, of the warm-up too.
    """
    windows = torch.from_numpy(batch).long()
    inputs, targets = windows[:, :-1], windows[:, 1:]
    model = Decoder(inputs.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = train_step(model, optimizer, inputs, targets)
        seconds.append(time.perf_counter() - start)
        record(loss)
    return seconds[1:]


def parameter_count():
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(1).parameters())


def main():
    options = _arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    shape = options.batch_size, options.sequence_length + 1
    batch = np.random.default_rng(options.seed).integers(VOCABULARY, size=shape)
    losses = []
    seconds = measure(batch, options.steps, losses.append)
    result = {"seconds": seconds, "losses": losses, "parameters": parameter_count()}
    print(json.dumps(result))


def _arguments():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trainer_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = "timed steps, after one that warms up"
    threads = "threads of an operation (default: a thread a core)"
    parser.add_argument("--batch-size", type=int, required=True, metavar="B")
    parser.add_argument("--sequence-length", type=int, required=True, metavar="T")
    parser.add_argument("--steps", type=int, required=True, metavar="N", help=steps)
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), metavar="N", help=threads
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
