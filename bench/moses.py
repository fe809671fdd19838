"""Text as papers on Multi30k train on it and judge it: punctuation normalised, lower case, tokens apart.

    python -m bench.moses train.en train.fr val.en val.fr --output prepared

writes prepared/train.en and so on, line by line. A file's ending is its language, which says where words are cut: in
French "l'herbe" is two tokens. Needs sacremoses.

Source: Koehn et al. 2007 (Moses); Elliott et al. 2016, arXiv:1605.00459, section 4.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

MISSING = "Moses's tokens need sacremoses: pip install sacremoses"


def installed() -> bool:
    return importlib.util.find_spec("sacremoses") is not None


def name() -> str:
    """What made the tokens, as a signature has it."""
    return f"sacremoses {version('sacremoses')}"


def language_of(path: str | Path, given: str | None = None) -> str:
    """`given`, or the ending of a file's name.

    Raises:
        ValueError: there is none.
    """
    language = given or Path(path).suffix[1:]
    if not language:
        raise ValueError(f"the name of {path} ends in no language: give --language, as in --language fr")
    return language


def tokens(sentences: Sequence[str], language: str) -> list[str]:
    """Normalised, in lower case, with a space between tokens."""
    import sacremoses

    normalizer, tokenizer = sacremoses.MosesPunctNormalizer(language), sacremoses.MosesTokenizer(language)
    return [tokenizer.tokenize(normalizer.normalize(line).lower(), return_str=True, escape=False) for line in sentences]


def joined(tokenised: Sequence[str], language: str) -> list[str]:
    """Tokens put together as they are written, still in lower case."""
    import sacremoses

    detokenizer = sacremoses.MosesDetokenizer(language)
    return [detokenizer.detokenize(line.split(), unescape=False) for line in tokenised]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="UTF-8 text, a sentence a line")
    parser.add_argument("--language", help="of all of them (default: each file's ending)")
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="made if need be")
    parsed = parser.parse_args(arguments)
    if not installed():
        parser.error(MISSING)
    names = [path.name for path in parsed.files]
    if len({*names}) < len(names):
        parser.error("two of the files have the same name, and would be written to the same place")
    parsed.output.mkdir(parents=True, exist_ok=True)
    for path in parsed.files:
        target = parsed.output / path.name
        if target.exists() and target.samefile(path):
            parser.error(f"{path} would be written over itself: give another --output")
        try:
            language = language_of(path, parsed.language)
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            parser.error(str(error))
        target.write_text("".join(f"{line}\n" for line in tokens(lines, language)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
