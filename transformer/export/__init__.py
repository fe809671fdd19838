"""Our models in the formats of other programs.

from fused_transformer import export

export.ctranslate2(model, "folder")
"""

from fused_transformer.export.to_ctranslate2 import ctranslate2

__all__ = ["ctranslate2"]
