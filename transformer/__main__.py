"""`python -m fused_transformer info | train | translate | show | demo | plot`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each command is the function main(arguments) of a module, imported when asked for: `info` must work where the
# libraries of the others are missing.
COMMANDS = {
    "info": ("info", "versions, device, and which backends each op has here"),
    "train": ("cli_train", "train a translation model on two parallel text files"),
    "show": ("cli_show", "pictures: attention heads, positions, distributions, beams, masks"),
    "demo": ("cli_demo", "train a small model on made-up sentences, and see what it learned"),
    "plot": ("cli_plot", "loss, learning rate and BLEU of trainings as curves"),
    "translate": ("cli_translate", "translate text, line by line"),
}
DRAWING_LIBRARIES = ("matplotlib",)
TEXT_LIBRARIES = ("sacrebleu", "safetensors", "sentencepiece", "tqdm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; what it returns is the exit status."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer",
        description="The Transformer with fused kernels.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below; each has its --help")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")
    parsed = parser.parse_args(arguments)
    module, _ = COMMANDS[parsed.command]
    try:
        return import_module(f"fused_transformer.{module}").main(parsed.rest) or 0
    except KeyboardInterrupt:  # while it was imported, which takes seconds
        print(f"{parsed.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = "text" if missing in TEXT_LIBRARIES else "show" if missing in DRAWING_LIBRARIES else None
        if extra is None:
            raise
        print(
            f"{parsed.command} needs {missing}, which is not installed: pip install 'fused-transformer[{extra}]'",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
