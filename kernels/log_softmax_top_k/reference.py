"""log-softmax and top-k in plain torch: the meaning every other backend is tested against.

Any device, any float dtype; arithmetic in float32 (float64 for float64 logits). Stable sorts make the order of ties
what the public function says: by beam, then by logit, then by token. No row is sorted whole, so that it costs little
more than log_softmax and topk where there is no fused backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_transformer.kernels.log_softmax_top_k.checks import values_dtype


def refuses(*_args) -> None:
    return None


def forward(logits, addend, beams: int, k: int):
    rows, vocabulary = logits.shape
    x = logits.to(values_dtype(logits))
    top = x.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)  # a row without a finite logit
    log_sum = torch.exp(x - top).sum(-1, keepdim=True).log()
    tokens = _best(x, min(k, vocabulary))
    x = x.gather(1, tokens)
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


def _best(x: Tensor, k: int) -> Tensor:
    """The tokens of each row's k highest logits, best first, and of equal ones the first: topk takes any of these."""
    vocabulary = x.shape[1]
    last = x.topk(k).values[:, -1:]
    above, level = x > last, x == last
    chosen = above | (level & (level.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    tokens = torch.where(chosen, torch.arange(vocabulary, device=x.device), vocabulary).topk(k, largest=False).values
    tokens = tokens.clamp(max=vocabulary - 1)  # a row with NaN may have chosen fewer
    return tokens.gather(1, x.gather(1, tokens).sort(dim=-1, descending=True, stable=True).indices)
