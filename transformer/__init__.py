"""The Transformer with fused kernels."""
