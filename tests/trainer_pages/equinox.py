import equinox as eqx
import jax.numpy as jnp
import page
from checks import check_equal, check_losses, check_skipped, check_statistics

import spam_optax

params = eqx.filter(page.model, eqx.is_inexact_array)
check_losses(page.losses, 0.5)
check_statistics(page.state, params)
assert spam_optax.tensor_names(params)[0] == "layers/0/weight"

model, state, _ = page.train_step(page.model, page.state, page.x, page.y * jnp.nan)
check_skipped(state, with_loss=True)
check_equal(eqx.filter(model, eqx.is_inexact_array), params)
