"""The tree that a beam search grew: every extension that it looked at, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from fused_transformer.hypotheses import NEVER, Hypotheses

KEPT, FINISHED, DROPPED = "kept", "finished", "dropped"


class BeamStep(NamedTuple):
    """One step of beam search, of the b sentences that were still searched; m = 2 · beam_size extensions each.

    sentences: (b,) int64, their numbers.
    parents: (b, m) int64, which alive hypothesis of the sentence is extended; they are numbered as `kept` lists them.
    tokens: (b, m) int64, by which token.
    log_probs: (b, m) float32, of all tokens so far; -inf: there is no such extension.
    scores: (b, m) float32, with the length penalty, of those that ended and may enter the finished list; -inf for all
        others.
    ended: (b, m) bool, the token is eos.
    kept: (b, beam_size) int64, the extensions that live on, the likeliest first.
    """

    sentences: Tensor
    parents: Tensor
    tokens: Tensor
    log_probs: Tensor
    scores: Tensor
    ended: Tensor
    kept: Tensor


OnStep = Callable[[BeamStep], object]


@dataclass(eq=False)
class Node:
    """One hypothesis that the search looked at.

    Attributes:
        token: its last token.
        step: its number of tokens; 0 is the root, bos.
        log_prob: of all its tokens.
        state: "kept": it was extended, or alive at the end. "finished": it ended with eos and stayed in the finished
            list. "dropped": others were likelier.
        score: with the length penalty, where it ended and the search considered it.
        parent: what it extends; None for the root.
        chosen: the best translation passes through it.
    """

    token: int
    step: int
    log_prob: float
    state: str
    score: float | None = None
    parent: Node | None = None
    chosen: bool = False
    children: list[Node] = field(default_factory=list)

    def tokens(self) -> list[int]:
        """From the first token to this one; bos is left out."""
        tokens, node = [], self
        while node.parent is not None:
            tokens.append(node.token)
            node = node.parent
        return tokens[::-1]


@dataclass(eq=False)
class BeamTree:
    """All that beam search looked at for one sentence.

    Attributes:
        root: bos.
        steps: the nodes of each step, the root's included; those of a step have the order of their probability.
        best: where the best translation ends.
    """

    root: Node
    steps: list[list[Node]]
    best: Node

    def nodes(self, state: str | None = None) -> list[Node]:
        """All but the root, step by step; or those in this state."""
        return [node for step in self.steps[1:] for node in step if state in (None, node.state)]

    def finished(self) -> list[Node]:
        """The finished hypotheses, the best first."""
        return sorted(self.nodes(FINISHED), key=lambda node: -(node.score or 0.0))


class TreeRecorder:
    """Grows a tree of each sentence from the steps that it is called with.

    Args:
        sentences: how many.
        bos_idx: the root's token.
        capacity: of the finished list, `SearchOptions.finished_capacity`.
    """

    def __init__(self, sentences: int, bos_idx: int, capacity: int) -> None:
        self._roots = [Node(bos_idx, 0, 0.0, KEPT) for _ in range(sentences)]
        self._steps = [[[root]] for root in self._roots]
        self._alive = [[root] for root in self._roots]
        self._capacity = capacity

    def __call__(self, step: BeamStep) -> None:
        columns = (x.tolist() for x in step)
        for sentence, parents, tokens, log_probs, scores, ended, kept in zip(*columns, strict=True):
            alive, nodes = self._alive[sentence], []
            for parent, token, log_prob, score in zip(parents, tokens, log_probs, scores, strict=True):
                real = log_prob > NEVER
                above = alive[parent] if real else None
                node = Node(token, len(self._steps[sentence]), log_prob, DROPPED, parent=above)
                if score > NEVER:
                    node.state, node.score = FINISHED, score
                nodes.append(node)
            self._alive[sentence] = [nodes[i] for i in kept]
            for i in kept:
                if not ended[i] and log_probs[i] > NEVER:
                    nodes[i].state = KEPT
            self._steps[sentence].append([node for node in nodes if node.parent is not None])

    def trees(self, found: Hypotheses) -> list[BeamTree]:
        """The trees, when the search is over and has `found` its hypotheses."""
        return [self._tree(i, found) for i in range(len(self._roots))]

    def _tree(self, sentence: int, found: Hypotheses) -> BeamTree:
        steps = self._steps[sentence]
        nodes = [node for step in steps[1:] for node in step]
        for node in nodes:
            assert node.parent is not None
            node.parent.children.append(node)
        finished = [node for node in nodes if node.state == FINISHED]
        finished.sort(key=lambda node: -(node.score or 0.0))  # stable: the earlier wins a tie, as in the search
        for node in finished[self._capacity :]:
            node.state = DROPPED
        if finished:
            best = finished[0]
        else:  # cut at the maximum length, or nothing was allowed
            alive = [node for node in self._alive[sentence] if node.log_prob > NEVER]
            best = alive[0] if alive else self._roots[sentence]
        ending: Node | None = best
        while ending is not None:
            ending.chosen, ending = True, ending.parent
        return BeamTree(self._roots[sentence], steps, best)
