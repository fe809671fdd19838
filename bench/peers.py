"""What one would use instead of ours: the names in tables and of --peers, and the package that each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """An alternative. `package` is what pip calls it and `module` what Python does, where torch does not bring it."""

    label: str
    what: str
    package: str | None = None
    module: str | None = None
    gpu: bool = False  # runs on a GPU alone
    compiles: bool = False  # for seconds, before it can be timed: --quick leaves it out
    elsewhere: str | None = None  # the program that it is timed by, if not a row of this suite


PEERS = (
    Peer("naive", "the formula in plain torch"),
    Peer("compile", "torch.compile of the naive code", compiles=True),
    Peer("torch.nn", "torch.nn's module with the same weights"),
    Peer("F.cross_entropy", "torch's own loss"),
    Peer("sdpa", "F.scaled_dot_product_attention as torch chooses"),
    Peer("sdpa flash", "its flash backend"),
    Peer("sdpa math", "its math backend"),
    Peer("sdpa efficient", "its memory-efficient backend", gpu=True),
    Peer("sdpa cudnn", "its cuDNN backend", gpu=True),
    Peer("flex", "FlexAttention under torch.compile", compiles=True),
    Peer("attention", "our attention, where the row is of an op for decoding"),
    Peer("cross_entropy", "our loss of all the logits, where the row is of the loss in chunks"),
    Peer("unpacked", "our model, where the row is of the packed one"),
    Peer("flash-attn", "FlashAttention's own package", "flash-attn", "flash_attn", gpu=True),
    Peer("xformers", "its memory-efficient attention", "xformers", "xformers", gpu=True),
    Peer("liger-kernel", "its Triton kernels", "liger-kernel", "liger_kernel", gpu=True),
    Peer("ctranslate2", "decoding", "ctranslate2", "ctranslate2", elsewhere="python -m bench.ctranslate2"),
)
BY_LABEL = {peer.label: peer for peer in PEERS}


def asked_by(word: str, label: str) -> bool:
    """ "sdpa" asks for every "sdpa ..."; a whole label for itself."""
    return label.lower() == word.lower() or label.lower().startswith(word.lower() + " ")


def unknown(words: Iterable[str]) -> list[str]:
    return [word for word in words if not any(asked_by(word, peer.label) for peer in PEERS)]


def wanted(label: str, words: Sequence[str] | None, quick: bool) -> bool:
    """Whether an alternative is timed: one of those asked for; unasked all, with --quick those that need no compiler.

    A label that PEERS lacks is a mistake in a benchmark: --peers could not ask for it.
    """
    peer = BY_LABEL[label]
    if words is not None:
        return any(asked_by(word, label) for word in words)
    return not (quick and peer.compiles)


def installed(peer: Peer) -> bool:
    return peer.module is None or importlib.util.find_spec(peer.module) is not None


def runs(label: str, device: str) -> bool:
    """Whether a row on this device can have it."""
    peer = BY_LABEL[label]
    return installed(peer) and (device == "cuda" or not peer.gpu)


def absent(device: str, words: Sequence[str] | None = None) -> list[str]:
    """A line for each alternative that is not in the tables, with what to do about it; of those asked for, if any."""
    lines = []
    for peer in PEERS:
        if words is not None and not any(asked_by(word, peer.label) for word in words):
            continue
        where = " on a GPU" if peer.gpu else ""
        if not installed(peer):
            lines.append(f"not installed: {peer.label} ({peer.what}{where}): pip install {peer.package}")
        if peer.elsewhere:
            lines.append(f"not in these tables: {peer.label} is timed by {peer.elsewhere}")
        elif installed(peer) and peer.gpu and device != "cuda" and (peer.module or words is not None):
            lines.append(f"not on this device: {peer.label} runs on a GPU alone")
    return lines


def guarded(function: Callable) -> Callable:
    """`function` of a package we do not govern: whatever it raises is its refusal, as a row tells those."""

    def run(*args):
        try:
            return function(*args)
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run
