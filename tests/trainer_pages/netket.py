import jax
import jax.numpy as jnp
import optax
import page
from checks import check_equal, check_losses, check_skipped, check_statistics

driver = page.driver
params = driver.state.parameters
energies = page.log.data["Energy"]["Mean"].real
check_losses([energy + 11 for energy in energies], 0.6)  # the ground state: above -11
check_statistics(driver._optimizer_state, params)
mu, nu = (optax.tree.get(driver._optimizer_state, name) for name in ("mu", "nu"))
assert {leaf.dtype for leaf in jax.tree.leaves(mu)} == {jnp.dtype("complex128")}
assert {leaf.dtype for leaf in jax.tree.leaves(nu)} == {jnp.dtype("float64")}

# The state that was serialized is that of the driver.
made = page.nk.driver.VMC(page.hamiltonian, page.tx, variational_state=page.state)
restored = page.flax.serialization.from_bytes(made, page.saved)
check_equal(restored._optimizer_state, driver._optimizer_state)

driver.update_parameters(jax.tree.map(lambda p: p * jnp.nan, params))
check_skipped(driver._optimizer_state, with_loss=False)
check_equal(driver.state.parameters, params)
