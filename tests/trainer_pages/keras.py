import jax.numpy as jnp
import page
from checks import check_equal, check_losses, check_skipped, check_statistics

import spam_optax

check_losses(page.losses, 0.5)
check_statistics(page.state, page.params)
print(spam_optax.describe_tensors(page.state, page.params))
assert "sequential/mlp/kernel" in spam_optax.tensor_names(page.params)

step = page.train_step(page.params, page.state, page.others, page.x, page.y * jnp.nan)
check_skipped(step[1], with_loss=True)
check_equal(step[0], page.params)

loaded = page.keras.saving.load_model("model.keras")
some, others = ([v.value for v in m.variables] for m in (loaded, page.model))
check_equal(some, others)
