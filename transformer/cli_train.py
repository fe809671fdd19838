"""`python -m fused_transformer train`: a translation model from two parallel text files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fused_transformer import settings as presets
from fused_transformer.batches import Corpus
from fused_transformer.checkpoint import BEST, LAST, find_checkpoint, load_checkpoint
from fused_transformer.evaluation import Validation, bleu
from fused_transformer.model import Transformer
from fused_transformer.processes import Processes, own_device
from fused_transformer.text import read_parallel
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training import Trainer
from fused_transformer.training_log import LOG, TrainingLog
from fused_transformer.training_run import TrainingRun
from fused_transformer.translation import Translator

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 if done, 130 if interrupted, 1 with a message on standard error if something is wrong."""
    options = _parser().parse_args(arguments)
    processes = Processes()
    try:
        device = own_device(options.device)
        processes = Processes.join(device)
        status = _train(options, device, processes)
        processes.leave()
        return status
    except (OSError, ValueError, FloatingPointError) as error:
        which = f"process {processes.rank}: " if processes.rank else ""
        print(f"train: {which}{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fused_transformer train",
        description="Train a translation model on two UTF-8 text files: line i of one translates line i of the other.",
        epilog=f"The output folder gets {LAST} (all that --resume needs) and {BEST} (the model to translate with), "
        f"and {LOG} (for plot).",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--source", required=True, metavar="FILE", help="text to translate from, a sentence a line")
    files.add_argument("--target", required=True, metavar="FILE", help="its translation, line by line")
    files.add_argument("--valid-source", metavar="FILE", help="held-out text, to measure loss and BLEU during training")
    files.add_argument("--valid-target", metavar="FILE", help="its translation")
    files.add_argument("--test-source", metavar="FILE", help="text to measure BLEU on when training is over (beam 4)")
    files.add_argument("--test-target", metavar="FILE", help="its translation")
    files.add_argument("--output", required=True, metavar="DIR", help="folder for the checkpoints; made if need be")
    run = parser.add_argument_group("run")
    run.add_argument("--resume", action="store_true", help="go on with the training in the output folder")
    run.add_argument(
        "--steps", type=int, default=100_000, help="stop after so many steps in all (default: %(default)s)"
    )
    run.add_argument("--minutes", type=float, help="stop after so many minutes of training and validating in all")
    run.add_argument("--every", type=int, default=1000, help="steps between validations (default: %(default)s)")
    run.add_argument("--average", type=int, default=5, help="validations to average at the end (default: %(default)s)")
    run.add_argument("--bleu-sentences", type=int, default=1000, help="most held-out sentences that are translated "
                     "for BLEU, greedily (default: %(default)s)")  # fmt: skip
    run.add_argument("--compile", action="store_true", help="put the layers through torch.compile")
    run.add_argument("--checkpoint-activations", action="store_true", help="compute the layers' activations twice "
                     "instead of keeping them: less memory, the same numbers")  # fmt: skip
    run.add_argument("--log-every", type=int, default=50, help=f"steps from one line of {LOG} to the next "
                     "(default: %(default)s)")  # fmt: skip
    run.add_argument("--tensorboard", action="store_true", help="write TensorBoard's files too, to DIR/tensorboard")
    run.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    presets.add_arguments(parser)
    return parser


def _train(options: argparse.Namespace, device: torch.device, processes: Processes) -> int:
    _check(options)
    say = partial(print, flush=True) if processes.first else _nothing
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    source, target = read_parallel(options.source, options.target)
    held_out = read_parallel(options.valid_source, options.valid_target) if options.valid_source else None
    test = read_parallel(options.test_source, options.test_target) if options.test_source else None

    folder = Path(options.output)
    if options.resume:
        model, tokenizer, state, tensors = load_checkpoint(folder / LAST)
        settings = presets.chosen(options, state.get("settings", {}))
    else:
        settings = presets.chosen(options)
        tokenizer = Tokenizer(processes.once(lambda: _new_vocabulary(folder, [*source, *target], settings)))
        torch.manual_seed(settings["seed"])
        model = Transformer(presets.model_config(settings, len(tokenizer)))
    corpus = _corpus(source, target, tokenizer, settings, options.source, say)
    trainer = Trainer(
        model.to(device),
        corpus,
        presets.training_options(settings),
        processes=processes,
        compile=options.compile,
        checkpoint_activations=options.checkpoint_activations,
    )
    log = TrainingLog(folder, every=options.log_every, tensorboard=options.tensorboard)
    processes.once(lambda: folder.mkdir(parents=True, exist_ok=True))
    run = TrainingRun(
        trainer,
        tokenizer,
        folder,
        settings,
        validation=_validation(held_out, tokenizer, settings, options),
        every=options.every,
        average=options.average,
        log=log if processes.first else None,
    )
    if options.resume:
        run.resume(state, tensors)
    parameters = sum(p.numel() for p in model.parameters())
    shared = f", {processes.world} processes" if processes.world > 1 else ""
    say(
        f"{len(corpus)} sentence pairs, {len(tokenizer)} subwords, {parameters / 1e6:.1f} million parameters, "
        f"{options.device}, {torch.get_num_threads()} threads{shared}"
    )
    if not run.run(options.steps, options.minutes):
        say(f"stopped and saved after step {trainer.step}; --resume goes on from there")
        return INTERRUPTED
    say(f"done after step {trainer.step}, {run.progress.seconds / 60:.1f} minutes; the model is {folder / BEST}")
    if test is not None and processes.first:
        translator = Translator.load(find_checkpoint(folder), device)
        translations = translator.translate(test[0], beam_size=4)
        score, signature = bleu([best.text for best, *_ in translations], test[1])
        say(f"test BLEU {score:.2f} (beam 4, length penalty 0.6; {signature})")
    return 0


def _nothing(*line: str) -> None:
    """What the processes beside the first have to say."""


def _new_vocabulary(folder: Path, lines: list[str], settings: presets.Settings) -> bytes:
    if (folder / LAST).exists():
        raise ValueError(f"{folder} holds a training already: go on with --resume, or choose another --output")
    return Tokenizer.learn(lines, settings["vocab_size"], algorithm=settings["algorithm"]).to_bytes()


def _check(options: argparse.Namespace) -> None:
    for kind in ("valid", "test"):
        if bool(getattr(options, f"{kind}_source")) != bool(getattr(options, f"{kind}_target")):
            raise ValueError(f"--{kind}-source and --{kind}-target go together, but only one was given")
    for name in ("steps", "minutes", "every", "bleu_sentences", "log_every", "threads"):
        value = getattr(options, name)
        presets.check_finite(name, value)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")


def _corpus(
    source: list[str],
    target: list[str],
    tokenizer: Tokenizer,
    settings: presets.Settings,
    name: str,
    say: Callable[[str], object],
) -> Corpus:
    """The pairs that can be trained on; says how many can't."""
    pairs = list(zip(tokenizer.encode(source), tokenizer.encode(target), strict=True))
    longest = min(settings["max_length"], settings["max_tokens"] - 2)  # bos and eos need room in a batch too
    fitting = [(i, s, t) for i, (s, t) in enumerate(pairs, 1) if s and t and max(len(s), len(t)) <= longest]
    if not fitting:
        raise ValueError(f"{name} and its translation have no pair of 1 to {longest} subwords a side")
    if len(fitting) < len(pairs):
        say(f"left out {len(pairs) - len(fitting)} of {len(pairs)} pairs: empty, or over {longest} subwords")
    return Corpus([s for _, s, _ in fitting], [t for _, _, t in fitting], lines=[i for i, _, _ in fitting])


def _validation(
    held_out: tuple[list[str], list[str]] | None,
    tokenizer: Tokenizer,
    settings: presets.Settings,
    options: argparse.Namespace,
) -> Validation | None:
    if held_out is None:
        return None
    source, target = held_out
    corpus = Corpus(tokenizer.encode(source), tokenizer.encode(target))
    return Validation(corpus, source, target, sentences=options.bleu_sentences, max_tokens=settings["max_tokens"])
