"""Spike-aware optimizers and initializers for JAX: SPAM and Spike No More.

The layers for Flax Linen and NNX are in ``spam_optax.linen`` and ``spam_optax.nnx``.
These two modules need Flax, and you import them by name.
"""

from spam_optax import functional as functional
from spam_optax import initializers as initializers
from spam_optax import testing as testing
from spam_optax._adaclip import AdaClipState as AdaClipState
from spam_optax._adaclip import adaclip as adaclip
from spam_optax._adagc import AdaGCState as AdaGCState
from spam_optax._adagc import adagc as adagc
from spam_optax._adagn import AdaGNState as AdaGNState
from spam_optax._adagn import adagn as adagn
from spam_optax._adam_mini import ScaleByAdamMiniState as ScaleByAdamMiniState
from spam_optax._adam_mini import adam_mini as adam_mini
from spam_optax._adam_mini import scale_by_adam_mini as scale_by_adam_mini
from spam_optax._adam_mini_partition import adam_mini_partition as adam_mini_partition
from spam_optax._clip_update_norm import ClipUpdateNormState as ClipUpdateNormState
from spam_optax._clip_update_norm import clip_update_norm as clip_update_norm
from spam_optax._describe import TensorDescription as TensorDescription
from spam_optax._describe import TensorDescriptions as TensorDescriptions
from spam_optax._describe import describe_tensors as describe_tensors
from spam_optax._gradient_stabilizer import (
    GradientStabilizerState as GradientStabilizerState,
)
from spam_optax._gradient_stabilizer import gradient_stabilizer as gradient_stabilizer
from spam_optax._inject import inject_hyperparams as inject_hyperparams
from spam_optax._momentum_mask import momentum_density as momentum_density
from spam_optax._momentum_mask import momentum_mask as momentum_mask
from spam_optax._monitor import TrackSpikesState as TrackSpikesState
from spam_optax._monitor import tensor_names as tensor_names
from spam_optax._monitor import track_spikes as track_spikes
from spam_optax._paths import matrices_only as matrices_only
from spam_optax._qk_clip import HeadTensor as HeadTensor
from spam_optax._qk_clip import QKClipState as QKClipState
from spam_optax._qk_clip import qk_clip as qk_clip
from spam_optax._qk_clip import query_key_tensors as query_key_tensors
from spam_optax._reset import ResetMomentsState as ResetMomentsState
from spam_optax._reset import reset_moments as reset_moments
from spam_optax._serialization import (
    register_serialization as register_serialization,
)
from spam_optax._skip_spikes import SkipSpikesState as SkipSpikesState
from spam_optax._skip_spikes import skip_spikes as skip_spikes
from spam_optax._spam import ScaleBySpamState as ScaleBySpamState
from spam_optax._spam import scale_by_spam as scale_by_spam
from spam_optax._spam import spam as spam
from spam_optax._spam_adam import ScaleBySpamAdamState as ScaleBySpamAdamState
from spam_optax._spam_adam import scale_by_spam_adam as scale_by_spam_adam
from spam_optax._spam_adam import spam_adam as spam_adam
from spam_optax._spam_clip import SpamClipState as SpamClipState
from spam_optax._spam_clip import spam_clip as spam_clip
from spam_optax._sparse_spam import ScaleBySparseSpamState as ScaleBySparseSpamState
from spam_optax._sparse_spam import scale_by_sparse_spam as scale_by_sparse_spam
from spam_optax._sparse_spam import sparse_spam as sparse_spam
from spam_optax._spike_history import SkipReason as SkipReason
from spam_optax._spike_history import StepHistory as StepHistory
from spam_optax._stable_adamw import ScaleByStableAdamWState as ScaleByStableAdamWState
from spam_optax._stable_adamw import scale_by_stable_adamw as scale_by_stable_adamw
from spam_optax._stable_adamw import stable_adamw as stable_adamw
from spam_optax._stable_spam import ScaleByStableSpamState as ScaleByStableSpamState
from spam_optax._stable_spam import scale_by_stable_spam as scale_by_stable_spam
from spam_optax._stable_spam import stable_spam as stable_spam
from spam_optax._zclip import ZClipState as ZClipState
from spam_optax._zclip import zclip as zclip

__version__ = "0.1.0"
