"""Train a small Flax Linen transformer on bytes with SPAM, all in one file.

    python examples/linen_pretrain.py

takes about half a minute on two CPU cores. Three things differ from a Linen trainer
without spam_optax. Search the file for them to copy them into yours:

    spam_optax.spam(schedule)              instead of optax.adam(schedule)
    spam_optax.track_spikes(...)           around it: spike statistics of every tensor
    ScaledEmbed, spam_optax.initializers   Spike No More: small sub-layers and a large
                                           shortcut, which make spikes less likely

The text is Shakespeare's, and its last tenth is the validation set. Losses are in nats
per byte. A tensor's spike score is the norm of its gradient divided by the running mean
of that norm. At the end the program prints the largest score of the run. SPAM resets
its momentum every 500 steps, so the default run has no reset.

pretrain.py has injected faults, checkpoints and figures as well.
"""

import argparse
import functools
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress
from flax import linen as nn
from flax.training.train_state import TrainState

import spam_optax
from spam_optax.linen import ScaledEmbed

TEXT = pathlib.Path(__file__).parent / "data" / "shakespeare.txt"
WIDTH, HEADS, NUM_LAYERS = 96, 3, 2
BATCH_SIZE, SEQUENCE_LENGTH = 16, 64
OPTIMIZERS = {
    "adam": optax.adam,
    "spam": functools.partial(spam_optax.spam, count=True),
    "sparse_spam": functools.partial(spam_optax.sparse_spam, count=True),
}


class Block(nn.Module):
    """A pre-norm attention layer and a pre-norm feed-forward layer."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        init = spam_optax.initializers.stable(WIDTH, NUM_LAYERS)
        attention = nn.MultiHeadDotProductAttention(
            HEADS,
            use_bias=False,
            kernel_init=init.kernel,
            out_kernel_init=init.residual,
            name="attention",
        )
        ffn_in = nn.Dense(4 * WIDTH, False, kernel_init=init.kernel, name="ffn_in")
        ffn_out = nn.Dense(WIDTH, False, kernel_init=init.residual, name="ffn_out")
        x = x + attention(nn.RMSNorm(name="attention_norm")(x), mask=mask)
        return x + ffn_out(nn.gelu(ffn_in(nn.RMSNorm(name="ffn_norm")(x))))


class LanguageModel(nn.Module):
    """A decoder of bytes, whose head is the transposed embedding."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = ScaledEmbed(256, WIDTH, name="embed")
        positions = ScaledEmbed(SEQUENCE_LENGTH, WIDTH, name="position_embed")
        x = embed(tokens) + positions(jnp.arange(tokens.shape[1]))[None]
        mask = nn.make_causal_mask(tokens)
        for layer in range(NUM_LAYERS):
            x = Block(name=f"block_{layer}")(x, mask)
        return embed.attend(nn.RMSNorm(name="final_norm")(x))


MODEL = LanguageModel()


def make_optimizer(name: str, peak: float, steps: int) -> optax.GradientTransformation:
    """Makes an optimizer with a warm-up to `peak` and a cosine to a tenth of it."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, peak, warmup_steps=steps // 10, decay_steps=steps, end_value=peak / 10
    )
    return spam_optax.track_spikes(OPTIMIZERS[name](schedule))


@jax.jit
def first_params(seed: int) -> optax.Params:
    tokens = jnp.zeros([1, SEQUENCE_LENGTH], jnp.int32)
    return MODEL.init(jax.random.key(seed), tokens)["params"]


def loss_fn(params: optax.Params, batch: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy of the next byte, in nats."""
    tokens = batch.astype(jnp.int32)
    logits = MODEL.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@functools.partial(jax.jit, donate_argnames="state")
def train_step(state: TrainState, batch: jax.Array):
    """Returns the next state, the loss before it, and each tensor's spike score."""
    loss, gradients = jax.value_and_grad(loss_fn)(state.params, batch)
    state = state.apply_gradients(grads=gradients)
    return state, loss, optax.tree.get(state.opt_state, "tensor_spike_score")


@jax.jit
def evaluate(params: optax.Params, batches: jax.Array) -> jax.Array:
    """Returns the mean loss over a stack of batches."""
    return jax.lax.map(functools.partial(loss_fn, params), batches).mean()


def windows(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the inputs from each start, with one more byte for the targets."""
    return text[starts[..., None] + np.arange(SEQUENCE_LENGTH + 1)]


def train(
    state: TrainState, text: np.ndarray, options: argparse.Namespace
) -> tuple[TrainState, np.ndarray]:
    """Returns the last state, and the spike scores of all steps and tensors."""
    rng = np.random.default_rng(options.seed)
    scores = []
    steps = range(1, options.steps + 1)
    on_terminal = sys.stdout.isatty()
    for step in rich.progress.track(steps, options.optimizer, disable=not on_terminal):
        starts = rng.integers(len(text) - SEQUENCE_LENGTH, size=BATCH_SIZE)
        state, loss, score = train_step(state, windows(text, starts))
        scores.append(score)  # stays on the device: fetching it would wait for the step
        if step == 1 or step % math.ceil(options.steps / 10) == 0:
            print(f"step {step:>4}/{options.steps}  loss {loss:.3f}", flush=True)
    return state, np.stack(scores)


def report(state: TrainState, scores: np.ndarray, validation: np.ndarray) -> None:
    """Prints the validation loss and the largest spike score of a run."""
    starts = np.arange(0, len(validation) - SEQUENCE_LENGTH, SEQUENCE_LENGTH)
    whole = len(starts) - len(starts) % BATCH_SIZE
    batches = windows(validation, starts[:whole].reshape(-1, BATCH_SIZE))
    loss = evaluate(state.params, batches)
    print(f"validation loss {loss:.3f}, perplexity {jnp.exp(loss):.2f} per byte")

    step, tensor = np.unravel_index(scores.argmax(), scores.shape)
    name = spam_optax.tensor_names(state.params)[tensor]
    spiked = optax.tree.get(state.opt_state, "tensor_spike_steps")[tensor]
    print(f"largest spike score {scores.max():.1f}: {name} in step {step + 1}")
    print(f"steps with a score above 10: {spiked} of {len(scores)}")
    clipped = optax.tree.get(state.opt_state, "clipped_total")
    if clipped is not None:
        print(f"coordinates clipped as spikes: {clipped:,}")


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, without repeating the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


EXAMPLES = """\
examples:
  SPAM, half a minute                          linen_pretrain.py
  Adam from the same parameters and batches    linen_pretrain.py --optimizer adam
  a reset of the momentum, then a ramp         linen_pretrain.py --steps 700
  spikes: a rate that is too high              linen_pretrain.py --learning-rate 0.03
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="linen_pretrain.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(flag, default, text, **kwargs):
        kwargs |= {"type": type(default), "default": default}
        parser.add_argument(flag, help=f"{text} (default: {default})", **kwargs)

    sparse = "optimizer; sparse_spam keeps momentum for a quarter of each matrix"
    rate = "peak rate, after a warm-up of a tenth of the steps, before a cosine decay"
    add("--optimizer", "spam", sparse, choices=OPTIMIZERS)
    add("--steps", 300, "optimizer steps, each on 16 windows of 64 bytes", metavar="N")
    add("--learning-rate", 0.004, rate, metavar="RATE")
    add("--seed", 0, "seed of parameters and batches", metavar="N")
    options = parser.parse_args(arguments)
    if not 1 <= options.steps < 2**31:
        parser.error(f"--steps must be from 1 to 2147483647, not {options.steps}")
    if not 0 < options.learning_rate < math.inf:
        parser.error(f"--learning-rate must be above 0, not {options.learning_rate}")
    if not 0 <= options.seed < 2**31:
        parser.error(f"--seed must be from 0 to 2147483647, not {options.seed}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    tx = make_optimizer(options.optimizer, options.learning_rate, options.steps)
    params = first_params(options.seed)
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
    size = sum(p.size for p in jax.tree.leaves(params))
    work = f"{options.steps} steps with {options.optimizer}"
    print(f"{size:,} parameters, {work}", flush=True)

    text = np.frombuffer(TEXT.read_bytes(), np.uint8)
    training, validation = np.split(text, [len(text) * 9 // 10])
    state, scores = train(state, training, options)
    report(state, scores, validation)


if __name__ == "__main__":
    main()
