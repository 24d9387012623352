import jax
import jax.numpy as jnp
import optax
import page
from checks import check_equal, check_losses, check_skipped, check_statistics

_, (params, state) = page.result.state.optim_state
check_losses(page.result.losses, 0.5)
check_statistics(state, params, steps=40)
assert "weights_auto_loc" in params

template = jax.eval_shape(page.svi.init, jax.random.key(1), page.x, page.y)
assert jax.tree.structure(template) == jax.tree.structure(page.result.state)

after, _ = page.svi.update(page.result.state, page.x, page.y * jnp.nan)
_, (new_params, state) = after.optim_state
check_skipped(state, with_loss=True)
check_equal(new_params, params)
assert optax.tree.get(state, "tensor_nonfinite").sum() > 0
