"""Training: a tiny model learns to translate, and a resumed training is the uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from fused_transformer import Transformer, TransformerConfig
from fused_transformer.batches import Corpus, cut_by_tokens
from fused_transformer.checkpoint import BEST, LAST, load_checkpoint, read_file
from fused_transformer.evaluation import Validation, bleu
from fused_transformer.tokenizer import Tokenizer
from fused_transformer.training import Trainer, TrainingOptions, mean_loss
from fused_transformer.training_run import TrainingRun, averaged_weights
from fused_transformer.translation import Translation, Translator
from tests.transformer.texts import parallel_lines

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE, TARGET = parallel_lines(200, longest=4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn(SOURCE + TARGET, 320)


@pytest.fixture
def corpus(tokenizer):
    return Corpus(tokenizer.encode(SOURCE), tokenizer.encode(TARGET))


OPTIONS = {"max_tokens": 300, "warmup_steps": 40}


def make_trainer(corpus, tokenizer, *, width=32, dropout=0.1, **options):
    torch.manual_seed(5)
    config = TransformerConfig(
        source_vocab_size=len(tokenizer),
        d_model=width,
        num_heads=4,
        d_feedforward=2 * width,
        num_encoder_layers=1,
        num_decoder_layers=1,
        dropout=dropout,
    )
    return Trainer(Transformer(config), corpus, TrainingOptions(**{**OPTIONS, **options}))


def validation(corpus):
    return Validation(corpus, SOURCE, TARGET, sentences=20, max_tokens=300)


def weights(trainer):
    return {name: x.clone() for name, x in trainer.model.state_dict().items()}


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_a_tiny_model_learns_to_translate(corpus, tokenizer):
    trainer = make_trainer(
        corpus,
        tokenizer,
        width=64,
        dropout=0.0,
        label_smoothing=0.0,
        max_tokens=600,
        warmup_steps=30,
        learning_rate_factor=0.25,
    )
    first = trainer.train_step()
    for _ in range(120):
        last = trainer.train_step()
    assert first > 5.0 and last < 0.3
    translations = Translator(trainer.model, tokenizer).translate(SOURCE[:50], beam_size=2)
    right = sum(best.text == target for (best, *_), target in zip(translations, TARGET, strict=False))
    assert right >= 40, [(s, b[0].text) for s, b in zip(SOURCE, translations, strict=False)][:5]


def test_the_loss_of_a_batch_is_the_loss_of_its_sentences(corpus, tokenizer):
    model = make_trainer(corpus, tokenizer).model
    rows = torch.arange(12)
    together = mean_loss(model, corpus, [rows])
    apart = mean_loss(model, corpus, [row[None] for row in rows])
    assert together == pytest.approx(apart, rel=1e-5)
    assert model.training


def test_a_resumed_training_equals_the_uninterrupted_one(corpus, tokenizer, tmp_path):
    whole = make_trainer(corpus, tokenizer)
    losses = [whole.train_step() for _ in range(30)]

    trainer = make_trainer(corpus, tokenizer)
    assert [trainer.train_step() for _ in range(17)] == losses[:17]
    TrainingRun(trainer, tokenizer, tmp_path, {}).run(steps=17)
    torch.manual_seed(999)
    torch.rand(5)  # what happens in between does not matter

    model, loaded_tokenizer, state, tensors = load_checkpoint(tmp_path / LAST)
    resumed = Trainer(model, corpus, TrainingOptions(**OPTIONS))
    TrainingRun(resumed, loaded_tokenizer, tmp_path, {}).resume(state, tensors)
    assert (resumed.step, resumed.tokens) == (17, trainer.tokens)
    assert [resumed.train_step() for _ in range(13)] == losses[17:]
    assert_equal_weights(weights(resumed), weights(whole))
    for name, x in whole.state()[1].items():
        assert torch.equal(resumed.state()[1][name], x), name


def test_validation_does_not_change_the_training(corpus, tokenizer, tmp_path):
    plain = make_trainer(corpus, tokenizer)
    for _ in range(9):
        plain.train_step()
    watched = make_trainer(corpus, tokenizer)
    lines = []
    run = TrainingRun(watched, tokenizer, tmp_path, {}, validation=validation(corpus), every=3, say=lines.append)
    assert run.run(steps=9)
    assert_equal_weights(weights(watched), weights(plain))
    assert [line.split()[:2] for line in lines[:3]] == [["step", "3"], ["step", "6"], ["step", "9"]]
    assert lines[3].startswith("average of the last 3")
    assert [entry["step"] for entry in run.progress.history] == [3, 6, 9]


def test_the_best_checkpoint_is_the_one_with_the_highest_bleu(corpus, tokenizer, tmp_path):
    trainer = make_trainer(corpus, tokenizer)

    class Scripted:
        scores = iter([(5.0, 1.0), (4.0, 3.0), (3.0, 2.0), (2.5, 3.0), (9.0, 2.9)])

        def measure(self, translator, on_batch):
            return next(self.scores)

    seen = {}
    run = TrainingRun(trainer, tokenizer, tmp_path, {}, validation=Scripted(), every=2, say=lambda line: None)
    train_step = trainer.train_step

    def remembered_step():
        value = train_step()
        seen[trainer.step] = weights(trainer)
        return value

    trainer.train_step = remembered_step
    assert run.run(steps=8)
    model, _, state, _ = load_checkpoint(tmp_path / BEST)
    assert state["progress"]["best"] == {"step": 8, "loss": 2.5, "bleu": 3.0}, "equal BLEU: the lower loss"
    assert_equal_weights(model.state_dict(), seen[8])


def test_averaging_is_the_mean_of_the_last_snapshots(corpus, tokenizer, tmp_path):
    trainer = make_trainer(corpus, tokenizer)

    class Scripted:
        scores = iter([(5.0, 1.0), (5.0, 1.0), (5.0, 1.0), (1.0, 50.0)])

        def measure(self, translator, on_batch):
            return next(self.scores)

    run = TrainingRun(trainer, tokenizer, tmp_path, {}, validation=Scripted(), every=2, average=2, say=lambda _: None)
    assert run.run(steps=6)
    snapshots = sorted((tmp_path / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["step-000000004.safetensors", "step-000000006.safetensors"]
    first, second = (load_checkpoint(path)[0].state_dict() for path in snapshots)
    best, _, state, _ = load_checkpoint(tmp_path / BEST)
    assert state["progress"]["best"]["averaged"] == 2
    for name, x in best.state_dict().items():
        torch.testing.assert_close(x, (first[name] + second[name]) / 2)
    assert_equal_weights(averaged_weights(snapshots), dict(best.state_dict()))
    assert_equal_weights(weights(trainer), load_checkpoint(tmp_path / LAST)[0].state_dict())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_a_resumed_run_goes_on_exactly(corpus, tokenizer, tmp_path, number):
    whole = make_trainer(corpus, tokenizer)
    TrainingRun(whole, tokenizer, tmp_path, {}, validation=validation(corpus), every=5, say=lambda _: None).run(
        steps=12
    )

    folder = tmp_path / "stopped"
    folder.mkdir()
    trainer = make_trainer(corpus, tokenizer)
    train_step = trainer.train_step

    def step_then_signal():
        value = train_step()
        if trainer.step == 7:
            os.kill(os.getpid(), number)
        return value

    trainer.train_step = step_then_signal
    handler = signal.getsignal(number)
    run = TrainingRun(trainer, tokenizer, folder, {}, validation=validation(corpus), every=5, say=lambda _: None)
    assert not run.run(steps=12)
    assert signal.getsignal(number) is handler
    assert trainer.step == 7

    model, _, state, tensors = load_checkpoint(folder / LAST)
    resumed = Trainer(model, corpus, trainer.options)
    run = TrainingRun(resumed, tokenizer, folder, {}, validation=validation(corpus), every=5, say=lambda _: None)
    run.resume(state, tensors)
    assert run.run(steps=12)
    assert_equal_weights(weights(resumed), weights(whole))
    assert [entry["step"] for entry in run.progress.history] == [5, 10, 12]


def test_a_signal_during_validation_leaves_it_for_the_resumed_run(corpus, tokenizer, tmp_path):
    class Interrupted(Validation):
        def measure(self, translator, on_batch):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            return super().measure(translator, on_batch)

    trainer = make_trainer(corpus, tokenizer)
    interrupted = Interrupted(corpus, SOURCE, TARGET, sentences=20, max_tokens=300)
    assert not TrainingRun(trainer, tokenizer, tmp_path, {}, validation=interrupted, every=2).run(steps=4)
    model, _, state, tensors = load_checkpoint(tmp_path / LAST)
    assert state["trainer"]["step"] == 2 and state["progress"]["history"] == []
    run = TrainingRun(Trainer(model, corpus, trainer.options), tokenizer, tmp_path, {}, validation=validation(corpus),
                      every=2, say=lambda _: None)  # fmt: skip
    run.resume(state, tensors)
    assert run.run(steps=4)
    assert [entry["step"] for entry in run.progress.history] == [2, 4]


def test_minutes_count_over_all_resumptions(corpus, tokenizer, tmp_path):
    trainer = make_trainer(corpus, tokenizer)
    run = TrainingRun(trainer, tokenizer, tmp_path, {})
    assert run.run(steps=10**9, minutes=0.01)
    steps = trainer.step
    assert steps >= 1 and run.progress.seconds >= 0.6
    run.run(steps=10**9, minutes=0.01)
    assert trainer.step == steps, "the time is used up"


def test_a_run_outside_the_main_thread_works_without_signals(corpus, tokenizer, tmp_path):
    results = []
    run = TrainingRun(make_trainer(corpus, tokenizer), tokenizer, tmp_path, {})
    thread = threading.Thread(target=lambda: results.append(run.run(steps=2)))
    thread.start()
    thread.join()
    assert results == [True]


def test_refused_resumptions(corpus, tokenizer, tmp_path):
    trainer = make_trainer(corpus, tokenizer)
    TrainingRun(trainer, tokenizer, tmp_path, {}).run(steps=2)
    _, _, state, tensors = load_checkpoint(tmp_path / LAST)

    other = Corpus(tokenizer.encode(SOURCE[:-1]), tokenizer.encode(TARGET[:-1]))
    with pytest.raises(ValueError, match="not the text this training was begun with"):
        TrainingRun(make_trainer(other, tokenizer), tokenizer, tmp_path, {}).resume(state, tensors)
    with pytest.raises(ValueError, match=r"other options \(now, then\): seed: 2, 1"):
        TrainingRun(make_trainer(corpus, tokenizer, seed=2), tokenizer, tmp_path, {}).resume(state, tensors)
    tensors.pop("optimizer.decoder.layers.0.norm1.bias.exp_avg")
    with pytest.raises(ValueError, match=r"not whole: it has no 'optimizer\.decoder\.layers\.0\.norm1\.bias\.exp_avg'"):
        TrainingRun(make_trainer(corpus, tokenizer), tokenizer, tmp_path, {}).resume(state, tensors)
    _, _, best, _ = load_checkpoint(tmp_path / BEST)
    with pytest.raises(ValueError, match="a model but no training state"):
        TrainingRun(trainer, tokenizer, tmp_path, {}).resume(best, {})


def test_a_loss_that_is_not_finite_stops_the_training(corpus, tokenizer):
    trainer = make_trainer(corpus, tokenizer)
    with torch.no_grad():
        trainer.model.source_embedding.weight[7] = float("nan")
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match="the loss became nan at step 1"):
        trainer.train_step()
    assert all(torch.equal(x, before[n]) or n == "source_embedding.weight" for n, x in weights(trainer).items())


def test_clipping_bounds_the_gradient(corpus, tokenizer):
    trainer = make_trainer(corpus, tokenizer, clip_norm=0.01)
    trainer.train_step()
    total = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert total == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 0), ("warmup_steps", 0), ("label_smoothing", 1.0), ("clip_norm", -1.0), ("pool_size", 0)],
)
def test_refused_options(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingOptions(**{name: value})


@pytest.mark.parametrize("name", ["max_tokens", "accumulate", "warmup_steps", "pool_size", "seed"])
@pytest.mark.parametrize("value", [1.5, "2", True, None])
def test_counts_must_be_whole_numbers(name, value):
    with pytest.raises(TypeError, match=f"{name} must be an int, got {type(value).__name__}"):
        TrainingOptions(**{name: value})


def test_translations_come_in_the_order_of_the_lines(corpus, tokenizer):
    model = make_trainer(corpus, tokenizer).model
    translator = Translator(model, tokenizer)
    lines = ["un chien voit un chat", "", "chat", "   ", "日本 🦊", "deux hommes"]
    limit = {"beam_size": 2, "top_beams": 2}
    together = translator.translate(lines, max_tokens=12, **limit)
    for line, beams in zip(lines, together, strict=True):
        ((alone),) = translator.translate([line], **limit)
        assert [t.text for t in beams] == [t.text for t in alone]
        assert [t.score for t in beams] == pytest.approx([t.score for t in alone], rel=1e-4)
    assert together[1] == together[3] == [Translation("", 0.0)]
    assert all("\n" not in t.text for beams in together for t in beams)
    assert translator.translate([]) == []


def test_line_breaks_in_a_translation_become_spaces(corpus, tokenizer, monkeypatch):
    translator = Translator(make_trainer(corpus, tokenizer).model, tokenizer)
    monkeypatch.setattr(tokenizer, "decode", lambda rows: ["a\nb\r\nc" for _ in rows])
    ((best,),) = translator.translate(["un chien"], beam_size=1)
    assert best.text == "a b  c"


def test_validation_translates_no_more_than_asked(corpus, tokenizer):
    measured = validation(corpus)
    sentences = []
    loss, score = measured.measure(Translator(make_trainer(corpus, tokenizer).model, tokenizer), sentences.append)
    assert sum(sentences) == 20
    assert loss > 3 and 0 <= score < 30
    assert sorted(torch.cat(measured.batches).tolist()) == list(range(len(corpus)))


def test_bleu_is_sacrebleus():
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]).score == pytest.approx(100)
    assert bleu(["a dog"], ["the cat sat on the mat"]).score < 5
    assert "tok:13a" in bleu(["a"], ["a"]).signature
    with pytest.raises(ValueError, match="a reference for each of 2 hypotheses, got 1"):
        bleu(["a", "b"], ["a"])


def test_last_holds_what_resuming_needs_and_best_only_the_model(corpus, tokenizer, tmp_path):
    TrainingRun(make_trainer(corpus, tokenizer), tokenizer, tmp_path, {"vocab_size": 320}).run(steps=2)
    last, state = read_file(tmp_path / LAST)
    best, _ = read_file(tmp_path / BEST)
    assert state["settings"] == {"vocab_size": 320}
    assert set(best) < set(last) and not any(name.startswith("optimizer.") for name in best)


def test_cutting_keeps_the_order():
    lengths = torch.tensor([[3], [2], [5], [1]])
    assert [rows.tolist() for rows in cut_by_tokens(torch.tensor([2, 0, 1, 3]), lengths, 10)] == [[2, 0], [1, 3]]
