"""torch.nn's attention, norms and Transformer over the fused kernels: the same constructors, calls and state_dicts.

`from fused_transformer import nn` beside `from torch import nn as torch_nn`, or `fused_transformer.fuse(model)`, which
turns those of torch.nn inside a model into these.
"""

from fused_transformer.attention import MultiheadAttention
from fused_transformer.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fused_transformer.nn.norms import LayerNorm, RMSNorm
from fused_transformer.nn.stacks import TransformerDecoder, TransformerEncoder
from fused_transformer.nn.transformer import Transformer, TransformerAttention

__all__ = [
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerAttention",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
