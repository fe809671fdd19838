"""log-softmax and top-k in plain torch: the meaning every other backend is tested against.

Any device, any float dtype; arithmetic in float32 (float64 for float64 logits). Stable sorts make the order of ties
what the public function says: by beam, then by logit, then by token.
"""

from __future__ import annotations

import torch

from fused_transformer.kernels.log_softmax_top_k.checks import values_dtype


def refuses(*_args) -> None:
    return None


def forward(logits, addend, beams: int, k: int):
    rows, vocabulary = logits.shape
    x = logits.to(values_dtype(logits))
    top = x.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)  # a row without a finite logit
    log_sum = torch.exp(x - top).sum(-1, keepdim=True).log()
    x, tokens = x.sort(dim=-1, descending=True, stable=True)
    x, tokens = x[:, :k], tokens[:, :k]
    values = torch.where(x == -torch.inf, -torch.inf, (x - top) - log_sum)
    hopeless = log_sum.isnan()
    if addend is not None:
        values = values + addend[:, None]
        hopeless = hopeless | ~(addend < torch.inf)[:, None]

    sentences = (rows // beams, beams)
    values, best = values.view(*sentences, values.shape[1]).flatten(1).sort(dim=-1, descending=True, stable=True)
    first = torch.arange(beams, device=logits.device)[:, None] * vocabulary
    places = (tokens.view(*sentences, tokens.shape[1]) + first).flatten(1).gather(1, best[:, :k])
    hopeless = hopeless.view(sentences).any(-1, keepdim=True)
    places = torch.where(hopeless, torch.arange(k, device=logits.device), places)
    return values[:, :k].masked_fill(hopeless, torch.nan), places
