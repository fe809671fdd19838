"""Searches written out for one sentence, with lists, dicts and loops: what the vectorised ones must find.

A model is here a function from a prefix (bos and the tokens so far) to the logits of the next token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fused_transformer.search import SearchOptions

BOS, EOS = 1, 2
INF = math.inf
Logits = Callable[[Sequence[int]], Sequence[float]]
Found = list[tuple[list[int], float, bool, list[float]]]  # tokens without eos, score, finished, log-probabilities


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    if top == -INF:
        return [-INF] * len(logits)
    total = math.log(sum(math.exp(x - top) for x in logits))
    return [x - top - total for x in logits]


def allowed(generated: Sequence[int], token: int, options: SearchOptions, forced: Sequence[int]) -> bool:
    """May `token` follow these tokens?"""
    if len(generated) < len(forced):
        return token == forced[len(generated)]
    if token in options.suppress_tokens or (token == EOS and len(generated) < options.min_length):
        return False
    size = options.no_repeat_ngram_size
    grown = [*generated, token]
    grams = [tuple(grown[i : i + size]) for i in range(len(grown) - size + 1)]
    return not size or grams[-1:] == [] or grams[-1] not in grams[:-1]


def log_probs(model: Logits, prefix: Sequence[int], options: SearchOptions, forced: Sequence[int]) -> list[float]:
    """Of the next token, with the forbidden ones out of question."""
    generated = prefix[1:]
    if len(generated) < len(forced):
        return [0.0 if allowed(generated, token, options, forced) else -INF for token in range(len(model(prefix)))]
    logits = [x if allowed(generated, t, options, forced) else -INF for t, x in enumerate(model(prefix))]
    return log_softmax(logits)


def follow(model: Logits, longest: int, options: SearchOptions, forced: Sequence[int], choose) -> Found:
    """One token after the other: choose(log_probs, position) -> token."""
    prefix, chosen = [BOS], []
    while prefix[-1] != EOS and len(chosen) < longest:
        possible = log_probs(model, prefix, options, forced)
        if max(possible) == -INF:
            return [([], -INF, False, [])]
        token = choose(possible, len(chosen))
        chosen.append(possible[token])
        prefix.append(token)
    finished = prefix[-1] == EOS
    return [(prefix[1:-1] if finished else prefix[1:], sum(chosen), finished, chosen)]


def greedy(model: Logits, longest: int, options: SearchOptions, forced: Sequence[int] = ()) -> Found:
    def likeliest(possible: list[float], position: int) -> int:
        return possible.index(max(possible))

    return follow(model, longest, options, forced, likeliest)


def sample(model: Logits, longest: int, options: SearchOptions, forced: Sequence[int], numbers) -> Found:
    """With numbers[position] in [0, 1) to choose by."""

    def choose(possible: list[float], position: int) -> int:
        weights = {t: math.exp(x / options.temperature) for t, x in enumerate(possible)}
        ranked = sorted(weights, key=lambda t: -possible[t])
        ranked = ranked[: options.top_k or None]
        if options.top_p < 1:
            total, kept, mass = sum(weights[t] for t in ranked), [], 0.0
            for token in ranked:
                if mass < options.top_p:
                    kept.append(token)
                mass += weights[token] / total
            ranked = kept
        elif not options.top_k:
            ranked = sorted(ranked)  # without a rank the order is that of the numbers
        target, mass = numbers[position] * sum(weights[t] for t in ranked), 0.0
        for token in ranked:
            mass += weights[token]
            if mass > target:
                return token
        raise AssertionError("the number is below 1")

    return follow(model, longest, options, forced, choose)


def beams(model: Logits, longest: int, options: SearchOptions, forced: Sequence[int] = ()) -> Found:
    """tensor2tensor's algorithm, or Kasai et al.'s where there is patience."""
    k = options.beam_size
    alive: list = [(0.0, [BOS], [])]
    finished: list = []
    for length in range(1, longest + 1):
        candidates = []
        for total, tokens, chosen in alive:
            for token, log_prob in enumerate(log_probs(model, tokens, options, forced)):
                if log_prob > -INF:
                    candidates.append((total + log_prob, [*tokens, token], [*chosen, log_prob]))
        candidates.sort(key=lambda c: -c[0])
        if options.patience is None:
            candidates = candidates[: 2 * k]
            alive = [c for c in candidates if c[1][-1] != EOS][:k]
            ended = [c for c in candidates if c[1][-1] == EOS]
            finished += [(total / options.penalise(length), *rest) for total, *rest in ended]
            finished = sorted(finished, key=lambda c: -c[0])[:k]
            if not alive:
                break
            hope = alive[0][0] / options.penalise(longest)
            early = options.top_beams == 1 if options.stop_early is None else options.stop_early
            if early and finished and finished[0][0] > hope:
                break
            if not early and len(finished) == k and finished[-1][0] > hope:
                break
        else:
            wanted = math.floor(k * options.patience + 0.5)
            alive = []
            for rank, (total, tokens, chosen) in enumerate(candidates):
                if len(alive) == k or len(finished) == wanted:
                    break
                if tokens[-1] == EOS:
                    if rank < k:
                        finished.append((total / options.penalise(length), tokens, chosen))
                else:
                    alive.append((total, tokens, chosen))
            if len(finished) == wanted or not alive:
                break
    if finished:
        finished.sort(key=lambda c: -c[0])
        return [(tokens[1:-1], score, True, chosen) for score, tokens, chosen in finished[: options.top_beams]]
    return [(tokens[1:], total, False, chosen) for total, tokens, chosen in alive[: options.top_beams]]
