"""The recipe's parts: accumulated batches, 16-bit products, activations computed twice, compiled layers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from fused_transformer import training
from fused_transformer.batches import Corpus, TokenBatches
from fused_transformer.not_finite import NAMED, NotFiniteError
from fused_transformer.training import batch_loss
from tests.oracle import assert_equal
from tests.transformer.trainers import gradients, random_corpus, tiny_trainer, weights

pytestmark = pytest.mark.usefixtures("one_thread")

NO_CLIP = {"clip_norm": 0.0}


def test_accumulated_batches_are_one_large_batch():
    """Batches of unlike numbers of tokens: a mean of their means would be another loss."""
    accumulated, corpus = tiny_trainer(dropout=0.0, **NO_CLIP), random_corpus()
    rows = list(itertools.islice(TokenBatches(corpus, 60, seed=1), 4))
    counts = [int((corpus.target.lengths[r] - 1).sum()) for r in rows]
    assert len(set(counts)) > 1
    large = tiny_trainer(dropout=0.0)
    expected = batch_loss(large.model, corpus.batch(torch.cat(rows)), label_smoothing=0.1)
    expected.backward()
    assert accumulated.train_step() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradients(accumulated), gradients(large))
    assert accumulated.tokens == sum(counts) and accumulated.step == 1
    assert accumulated.batches.position == 4
    norm = torch.cat([x.flatten() for x in gradients(large).values()]).norm()
    assert accumulated.grad_norm == pytest.approx(norm.item(), rel=1e-5)


def test_dropout_follows_from_the_seed_and_the_place_alone():
    one, other, seeded = tiny_trainer(), tiny_trainer(), tiny_trainer(seed=2)
    state = torch.get_rng_state()
    first = one.train_step()
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    torch.manual_seed(99)
    assert other.train_step() == first
    assert_equal(weights(one), weights(other))
    assert seeded.train_step() != first
    plain = tiny_trainer(dropout=0.0)
    assert plain.train_step() != first
    again = tiny_trainer()
    again.batches.position = 4  # other batches, and with them another dropout
    assert again.train_step() != first


def test_each_batch_draws_a_dropout_of_its_own():
    trainer, seeds = tiny_trainer(), []
    trainer._loss.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
    for _ in range(3):
        trainer.train_step()
    assert len(set(seeds)) == 3 * 4


@pytest.mark.parametrize("norm_first", [False, True])
def test_activations_computed_twice_give_the_same_bits(norm_first):
    sizes = {
        "num_encoder_layers": 2, "num_decoder_layers": 2, "norm_first": norm_first, "attention_dropout": 0.2,
        "activation_dropout": 0.2,
    }  # fmt: skip
    kept, saved = {}, {}
    for twice in (False, True):
        trainer = tiny_trainer(dropout=0.3, model=sizes, checkpoint_activations=twice)
        held = []

        def pack(x, held=held):
            held.append(x.untyped_storage().nbytes())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            kept[twice] = [trainer.train_step() for _ in range(3)], gradients(trainer), weights(trainer)
        saved[twice] = sum(held)
    assert kept[True][0] == kept[False][0]
    assert_equal(kept[True][1:], kept[False][1:])
    assert saved[True] < saved[False] / 3, "what is kept from forward to backward"


def test_bfloat16_products_come_close_and_everything_kept_is_float32():
    single, mixed = tiny_trainer(dropout=0.0), tiny_trainer(dropout=0.0, precision="bfloat16")
    losses = [(single.train_step(), mixed.train_step()) for _ in range(5)]
    assert all(x != y and abs(x - y) < 0.02 * x for x, y in losses)
    assert {x.dtype for x in (*weights(mixed).values(), *gradients(mixed).values())} == {torch.float32}
    assert {x.dtype for x in mixed.state()[1].values()} == {torch.float32}


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match="float16 is for GPUs, and the model is on cpu: bfloat16 is for both"):
        tiny_trainer(precision="float16")


@pytest.fixture
def float16_anywhere(monkeypatch):
    """torch has the scaler on CPUs too, which shows what a GPU would do."""
    monkeypatch.setattr(training, "_check_precision", lambda precision, device: None)


@pytest.mark.usefixtures("float16_anywhere")
def test_float16_clips_the_gradient_behind_its_scale():
    single, half = tiny_trainer(dropout=0.0), tiny_trainer(dropout=0.0, precision="float16")
    for _ in range(5):
        assert half.train_step() == pytest.approx(single.train_step(), rel=5e-3)
        assert half.grad_norm == pytest.approx(single.grad_norm, rel=2e-2), "the scale is 65536"
    assert half.scaler.get_scale() == 65536 and half.step == 5


@pytest.mark.usefixtures("float16_anywhere")
def test_an_overflowing_float16_step_is_left_out_and_a_resumed_training_keeps_the_scale():
    trainer = tiny_trainer(precision="float16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = weights(trainer)
    trainer.train_step()
    assert (trainer.step, trainer.tokens) == (0, 0) and trainer.scaler.get_scale() == 2.0**23
    assert_equal(weights(trainer), before)
    assert trainer.schedule.last_epoch == 0
    while trainer.step < 3:
        trainer.train_step()

    resumed = tiny_trainer(precision="float16")
    values, tensors = copy.deepcopy(trainer.state())
    resumed.model.load_state_dict(trainer.model.state_dict())
    resumed.load_state(values, tensors)
    assert resumed.scaler.get_scale() == trainer.scaler.get_scale() < 2.0**24
    assert [resumed.train_step() for _ in range(3)] == [trainer.train_step() for _ in range(3)]
    assert_equal(weights(resumed), weights(trainer))


@pytest.mark.usefixtures("float16_anywhere")
def test_a_float16_gradient_that_no_scale_helps_ends_the_training():
    trainer = tiny_trainer(precision="float16")
    trainer.model.source_embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NotFiniteError, match="gradient's norm became nan at step 1"):
        for _ in range(100):
            trainer.train_step()


def test_a_loss_that_is_not_finite_names_step_and_lines():
    """The lines of one of the step's four batches; its numbers are the text's, from which some were left out."""
    corpus = random_corpus(lines=[1000 + 2 * i for i in range(90)])
    trainer = tiny_trainer(corpus=corpus)
    trainer.train_step()
    rows = list(itertools.islice(TokenBatches(corpus, 60, seed=1), 8))[6]
    before = weights(trainer)
    original = trainer.corpus.batch

    def spoilt(asked):
        if asked.tolist() == rows.tolist():
            with torch.no_grad():
                trainer.model.encoder.layers[0].norm1.weight.fill_(float("inf"))
        else:
            trainer.model.load_state_dict(before)
        return original(asked)

    trainer.corpus.batch = spoilt
    with pytest.raises(NotFiniteError) as caught:
        trainer.train_step()
    expected = sorted(1000 + 2 * i for i in rows.tolist())
    assert (caught.value.step, caught.value.lines) == (2, expected)
    assert f"the loss became nan at step 2, in the batch of lines {', '.join(map(str, expected))};" in str(caught.value)


def test_a_gradient_that_is_not_finite_leaves_the_weights():
    trainer = tiny_trainer()
    trainer.train_step()
    before = weights(trainer)
    trainer.model.encoder.layers[0].norm1.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(NotFiniteError, match=r"gradient's norm became (inf|nan) at step 2, in the batch of lines"):
        trainer.train_step()
    assert_equal(weights(trainer), before)


def test_the_message_about_a_large_batch_stays_short():
    error = NotFiniteError("the loss became nan", 3, list(range(100, 0, -1)))
    assert f", {NAMED} and {100 - NAMED} more; try" in str(error) and error.lines == list(range(1, 101))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at all locals
def test_compiled_layers_train_as_eager_ones(monkeypatch):
    torch._dynamo.reset()
    compile_layers = training.layer_running.compile_layers
    monkeypatch.setattr(training.layer_running, "compile_layers", lambda m: compile_layers(m, backend="eager"))
    eager, compiled = tiny_trainer(), tiny_trainer(compile=True)
    assert [compiled.train_step() for _ in range(3)] == pytest.approx([eager.train_step() for _ in range(3)], rel=1e-5)
    torch.testing.assert_close(weights(compiled), weights(eager), rtol=1e-4, atol=1e-5)
    assert compiled.model.encoder.layers[0]._compiled_call_impl is not None
    assert compiled.state()[1].keys() == eager.state()[1].keys()


def test_a_state_from_before_an_option_existed_has_its_default_and_one_from_later_is_refused():
    trainer = tiny_trainer(accumulate=1)
    values, tensors = trainer.state()
    for name in ("accumulate", "precision"):
        values["options"].pop(name)
    trainer.load_state(values, tensors)
    with pytest.raises(ValueError, match=r"other options \(now, then\): accumulate: 2, 1"):
        tiny_trainer(accumulate=2).load_state(values, tensors)
    values["options"]["colour"] = "red"
    with pytest.raises(ValueError, match=r"begun with options unknown here: .*colour"):
        trainer.load_state(values, tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be positive, got 0"),
        ({"precision": "int4"}, "precision must be one of float32, bfloat16, float16, got 'int4'"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(**options)


@pytest.mark.parametrize(("name", "default"), [("padding_idx", 0), ("bos_idx", 1), ("eos_idx", 2)])
def test_a_corpus_of_other_special_tokens_is_refused(name, default):
    with pytest.raises(ValueError, match=f"the corpus has {name} {default}, and the model 5"):
        tiny_trainer(model={name: 5})
    same = Corpus([[7, 8]], [[9]], **{name: 5})
    assert tiny_trainer(corpus=same, model={name: 5}).train_step() > 0
