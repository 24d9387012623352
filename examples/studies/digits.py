"""Classification of handwritten digits with a small vision transformer.

The images are the 1,797 digits of 8 x 8 pixels that come with scikit-learn. A training
batch may have wrong labels: a fault that no limit on the gradient sees.

Letters in shape comments: B images, N patches, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from studies import encoder, task
from studies.task import Run, Score, setting
from trainer.errors import UsageError

CLASSES, SIDE, PATCH = 10, 8, 2  # pixels
TEST_SHARE = 0.2
SCENARIOS = ("clean", "noise", "labels")


@dataclasses.dataclass(frozen=True)
class Options:
    """The shape of the model."""

    width: int = setting(32, "width of the model, a multiple of --heads")  # D
    heads: int = setting(4, "attention heads")
    layers: int = setting(2, "layers, each attention and a feed-forward layer")

    def __post_init__(self):
        encoder.check_heads(self.width, self.heads)


def load() -> tuple[np.ndarray, np.ndarray]:
    """Returns the images, float32 in [0, 1] of shape (B, 8, 8), and the digits, int32.

    Raises:
      UsageError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise UsageError(
            "the digits come with scikit-learn: pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    return (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)


class VisionTransformer(nnx.Module):
    """Images in, logits of the ten digits out (Dosovitskiy et al., 2021)."""

    def __init__(self, options: Options, *, rngs: nnx.Rngs):
        patches = (SIDE // PATCH) ** 2
        self.embed = nnx.Linear(PATCH**2, options.width, rngs=rngs)
        self.position = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (patches, options.width))
        )
        self.blocks = nnx.List(
            [
                encoder.Block(options.width, options.heads, rngs=rngs)
                for _ in range(options.layers)
            ]
        )
        self.norm = nnx.LayerNorm(options.width, rngs=rngs)
        self.head = nnx.Linear(options.width, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        rows = SIDE // PATCH
        x = images.reshape(-1, rows, PATCH, rows, PATCH).swapaxes(2, 3)
        x_BND = self.embed(x.reshape(len(images), rows**2, PATCH**2))
        x_BND = x_BND + self.position[None]
        for block in self.blocks:
            x_BND = block(x_BND)
        return self.head(self.norm(x_BND).mean(axis=1))


class Digits(task.Task):
    """Minimizes the cross-entropy of the digits."""

    def __init__(self, options: Options):
        self.options = options
        images, digits = load()
        order = np.random.default_rng(0).permutation(len(images))
        tests = round(TEST_SHARE * len(images))
        self.test, self.train = (
            (images[part], digits[part]) for part in np.split(order, [tests])
        )
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: self.model(0)))

    def model(self, seed: jax.typing.ArrayLike) -> VisionTransformer:
        return VisionTransformer(self.options, rngs=nnx.Rngs(jax.random.key(seed)))

    def inputs(self, run: Run):
        config, (images, digits) = run.config, self.train
        rng = np.random.default_rng(config.seed)
        chosen = rng.integers(len(images), size=(config.steps, config.batch_size))
        labels = digits[chosen]
        if run.scenario == "labels":
            faulty = np.array(config.fault_steps) - 1
            labels[faulty] = rng.integers(CLASSES, size=labels[faulty].shape)
        return (images[chosen], labels), self.test

    def init(self, seed: jax.typing.ArrayLike) -> optax.Params:
        return nnx.to_pure_dict(nnx.state(self.model(seed)))

    def loss(self, params, batch):
        images, labels = batch
        logits = nnx.merge(self.graphdef, params)(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(losses)

    def evaluate(self, params, test):
        return self.loss(params, test)


class DigitsStudy(task.TaskStudy):
    """Trains classifiers under several optimizers, without and with faults."""

    score = Score("test loss", "the cross-entropy of the test images, in nats,")

    def task(self, run: Run) -> Digits:
        del run
        return Digits(self.options)
