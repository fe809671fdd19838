"""The Transformer with fused kernels."""

from importlib.metadata import version

import fused_transformer.nn as nn
import fused_transformer.show as show
from fused_transformer.add_norm import AddLayerNorm
from fused_transformer.attention import MultiheadAttention
from fused_transformer.config import TransformerConfig
from fused_transformer.decoding import beam_search, generate, greedy
from fused_transformer.embedding import TokenEmbedding
from fused_transformer.feed_forward import FeedForward
from fused_transformer.fusing import FuseReport, fuse, unfuse
from fused_transformer.graphed import GraphedTransformer
from fused_transformer.incremental import DecoderState
from fused_transformer.inference import PackedTransformer
from fused_transformer.layers import DecoderLayer, EncoderLayer
from fused_transformer.loss import smoothed_cross_entropy
from fused_transformer.maps import AttentionMaps, attention_maps
from fused_transformer.model import Decoder, Encoder, Transformer
from fused_transformer.reporting import ModelReport, model_report
from fused_transformer.schedule import NoamLR
from fused_transformer.search import Hypotheses, NewTokens, SearchOptions

__version__ = version("fused-transformer")

__all__ = [
    "AddLayerNorm",
    "AttentionMaps",
    "Decoder",
    "DecoderLayer",
    "DecoderState",
    "Encoder",
    "EncoderLayer",
    "FeedForward",
    "FuseReport",
    "GraphedTransformer",
    "Hypotheses",
    "ModelReport",
    "MultiheadAttention",
    "NewTokens",
    "NoamLR",
    "PackedTransformer",
    "SearchOptions",
    "TokenEmbedding",
    "Transformer",
    "TransformerConfig",
    "__version__",
    "attention_maps",
    "beam_search",
    "fuse",
    "generate",
    "greedy",
    "model_report",
    "nn",
    "show",
    "smoothed_cross_entropy",
    "unfuse",
]
