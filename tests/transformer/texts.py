"""Made-up parallel text that a tiny model can learn: the target says the words in another language, in reverse."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = {
    "un": "one", "deux": "two", "chien": "dog", "chat": "cat", "rouge": "red", "noir": "black", "voit": "sees",
    "mange": "eats", "petit": "small", "grand": "big", "homme": "man", "femme": "woman",
}  # fmt: skip


def parallel_lines(pairs: int, seed: int = 0, longest: int = 5) -> tuple[list[str], list[str]]:
    """`pairs` source lines and their targets."""
    choose = random.Random(seed)
    source = [choose.choices(list(WORDS), k=choose.randint(2, longest)) for _ in range(pairs)]
    target = [[WORDS[word] for word in reversed(line)] for line in source]
    return [" ".join(line) for line in source], [" ".join(line) for line in target]


def write_parallel(folder: Path, pairs: int, name: str = "train", seed: int = 0) -> tuple[str, str]:
    """The same as two files; their paths."""
    paths = []
    for language, lines in zip(("fr", "en"), parallel_lines(pairs, seed), strict=True):
        path = folder / f"{name}.{language}"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        paths.append(str(path))
    return paths[0], paths[1]
