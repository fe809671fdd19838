"""The fused ops, each behind one public function with interchangeable backends.

Letters used in every signature, docstring and kernel of this package:

    B batch · L query length · S key length · H heads · D head width · E = H·D model width · F feed-forward width
    V vocabulary · M, N rows and columns of a row-wise op · T tokens of a packed batch

Masks have one meaning on this floor: `keep`, True = attend.

Under torch.compile, torch.export and torch.func, and for meta and fake tensors, an op is one operator of torch,
torch.ops.fused_transformer.<name>, which computes what the eager call does (_compile.py): no graph break, one graph for
all batch sizes and lengths. vmap calls it for each example; forward-mode and second derivatives are errors. Under
torch.autocast dtypes are those that torch's own functions would give (_autocast.py).
"""

from fused_transformer.kernels._dispatch import BACKENDS, OPS, observe, use_backend
from fused_transformer.kernels._dispatch import forced_backend as forced_backend  # for the floor above
from fused_transformer.kernels._philox import new_seed
from fused_transformer.kernels.attention import attention, attention_weights, attention_with_lse
from fused_transformer.kernels.bias_act import bias_act
from fused_transformer.kernels.cross_entropy import cross_entropy
from fused_transformer.kernels.decode_attention import decode_attention, decode_attention_with_lse
from fused_transformer.kernels.embedding import embedding, sinusoidal_positions
from fused_transformer.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_with_total,
    add_rms_norm,
    add_rms_norm_with_total,
    layer_norm,
    rms_norm,
)
from fused_transformer.kernels.linear_cross_entropy import linear_cross_entropy
from fused_transformer.kernels.log_softmax_top_k import log_softmax_top_k

__all__ = [
    "BACKENDS",
    "OPS",
    "add_layer_norm",
    "add_layer_norm_with_total",
    "add_rms_norm",
    "add_rms_norm_with_total",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "bias_act",
    "cross_entropy",
    "decode_attention",
    "decode_attention_with_lse",
    "embedding",
    "layer_norm",
    "linear_cross_entropy",
    "log_softmax_top_k",
    "new_seed",
    "observe",
    "rms_norm",
    "sinusoidal_positions",
    "use_backend",
]
