import pathlib

import jax
import numpy as np
import page
from checks import check_equal, check_losses, check_skipped, check_statistics
from flax import nnx

folder = str(pathlib.Path("checkpoints").absolute())
params = nnx.state(page.trainer.model, nnx.Param)
check_statistics(page.state, params)
learning_rate = page.trainer._try_get_learning_rate()
assert 0 < learning_rate < 1e-2


def state_of(trainer):
    return nnx.state((trainer.model, trainer.optimizer))


def train(steps, **options):
    trainer = page.make_trainer(max_steps=steps, **options)
    losses = []
    write = trainer.metrics_logger.log

    def log(prefix, name, value, *rest):
        if name == "loss":
            losses.append(float(value))
        return write(prefix, name, value, *rest)

    trainer.metrics_logger.log = log
    trainer.train([page.batch] * 20)
    return trainer, losses


whole, losses = train(20)
check_losses(losses, 0.9)
check_equal(state_of(whole), state_of(page.trainer))

options = {"checkpoint_root_directory": folder}
first, some = train(10, **options)
second, others = train(20, **options)
assert len(some) == len(others) == 10
assert some + others == losses
check_equal(state_of(second), state_of(whole))

# The model's outputs are NaN: so are loss and gradient, and the loss is not passed.
trainer = page.make_trainer(max_steps=1)
head = trainer.model.lm_head
head.kernel[...] = head.kernel[...] * np.nan
before = jax.tree.map(np.array, nnx.state(trainer.model))
trainer.train([page.batch])
check_skipped(nnx.as_pure(trainer.optimizer.opt_state), with_loss=False)
check_equal(nnx.state(trainer.model), before)
