r"""Pure functions of arrays: spike detection, clipping, the reset clock, the metrics.

The optimizers use the same code, so measurements in a notebook match what an optimizer
does. The functions keep no state. They check arguments during tracing, which costs
nothing at run time, and raise AssertionError, TypeError or ValueError if one is not as
described.

Throughout, ``g`` is the gradient of one step (`gradient`, any shape, floating or
complex), ``v`` its second moment before this step (`nu`, the same shape, floating; an
exponential moving average of ``|g|**2``, not bias corrected), and steps are counted
from 1.
"""

from spam_optax.functional.guards import qk_clip_factors, scale_heads, spike_steps
from spam_optax.functional.metrics import (
    attention_jacobian_bound,
    ffn_jacobian_bound,
    jacobian_norm,
    layer_gradient_norms,
    spike_score,
    token_embedding_variability,
)
from spam_optax.functional.reset import (
    bias_correction,
    reset_position,
    reset_ramp,
)
from spam_optax.functional.spikes import (
    clip_spikes,
    gradient_spike_score,
    nonfinite_mask,
    online_spike_score,
    spike_mask,
    zero_nonfinite,
)

__all__ = (
    "attention_jacobian_bound",
    "bias_correction",
    "clip_spikes",
    "ffn_jacobian_bound",
    "gradient_spike_score",
    "jacobian_norm",
    "layer_gradient_norms",
    "nonfinite_mask",
    "online_spike_score",
    "qk_clip_factors",
    "reset_position",
    "reset_ramp",
    "scale_heads",
    "spike_mask",
    "spike_score",
    "spike_steps",
    "token_embedding_variability",
    "zero_nonfinite",
)
