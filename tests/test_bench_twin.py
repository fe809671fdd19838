"""The training of bench.twin is that of `train`, by other layers."""

from __future__ import annotations

import pytest
import torch

from bench import twin
from bench.twin import Twin
from fused_transformer import Transformer, TransformerConfig, checkpoint, cli_train
from fused_transformer.batches import Corpus
from fused_transformer.training import batch_loss
from fused_transformer.translation import Translator

SIZES = {"d_model": 32, "num_heads": 4, "d_feedforward": 64, "num_encoder_layers": 2, "num_decoder_layers": 2}


def _batch():
    generator = torch.Generator().manual_seed(0)
    draw = [[torch.randint(5, 50, (n,), generator=generator).tolist() for n in lengths]
            for lengths in ((2, 9, 4, 7), (8, 3, 3, 6))]  # fmt: skip
    return Corpus(*draw).batch(torch.arange(4))


def test_without_dropout_losses_and_gradients_are_the_same():
    config = TransformerConfig(source_vocab_size=50, dropout=0.0, **SIZES)
    torch.manual_seed(0)
    ours = Transformer(config).train()
    torch.manual_seed(0)
    theirs = Twin(config).train()
    losses = [batch_loss(model, _batch(), 0.1) for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = dict(theirs.named_parameters())
    assert list(gradients) == [name for name, _ in ours.named_parameters()]
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_training_steps_are_torchs_and_dropout_is_in_the_papers_places(monkeypatch):
    config = TransformerConfig(source_vocab_size=50, dropout=0.3, **SIZES)
    model = Twin(config).train()
    places = []

    def dropout(x, p=0.5, training=True, inplace=False):
        places.append(p if training else 0.0)
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    batch_loss(model, _batch(), 0.1)
    # Both embeddings; two and three sublayers of two layers each. The others are dropout of feed-forward activations.
    assert sorted(places) == [0.0] * 4 + [0.3] * (2 + 2 * 2 + 2 * 3)


@pytest.mark.parametrize("option", [{"attention_dropout": 0.1}, {"norm_first": True}, {"tie_embeddings": "separate"}],
                         ids=str)  # fmt: skip
def test_what_it_is_not(option):
    with pytest.raises(ValueError, match="the twin"):
        Twin(TransformerConfig(source_vocab_size=50, target_vocab_size=50, **SIZES, **option))


def test_its_checkpoint_is_a_model_of_ours(tmp_path, monkeypatch):
    for module in (cli_train, checkpoint):
        monkeypatch.setattr(module, "Transformer", module.Transformer)  # so that it is put back
    (tmp_path / "text").write_text("un deux trois\nquatre cinq\nsix sept huit neuf\n" * 5)
    files = ["--source", str(tmp_path / "text"), "--target", str(tmp_path / "text"), "--output", str(tmp_path / "run")]
    options = ["--preset", "tiny", "--vocab-size", "300", "--threads", "1"]
    assert twin.main([*files, *options, "--steps", "2"]) == 0
    assert twin.main([*files, *options, "--steps", "4", "--resume"]) == 0
    monkeypatch.undo()
    translator = Translator.load(tmp_path / "run" / "best.safetensors")
    assert len(translator.translate(["un deux", "six"])) == 2
    model, _, state, _ = checkpoint.load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert type(model) is Transformer and state["trainer"]["step"] == 4
