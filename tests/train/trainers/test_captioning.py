"""Views of image tokens: their number and content, and that the captioner is trained on exactly these."""

import pytest
import torch
from datasets import Dataset
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dali_llava.train.avworld.pretrain_captioner import CaptionerArguments, encode_pictures
from dali_llava.train.avworld.token_views import TokenViewCollator, TokenViewTrainer, token_views
from dali_llava.train.avworld.unlikelihood import repetition_unlikelihood
from dali_llava.train.data.clips import open_frame
from dali_llava.train.data.collators import CaptionCollator, pixel_values
from dali_llava.train.data.draws import Draws


@pytest.mark.parametrize(("grid", "extra"), [(True, 0), (False, 7), (True, 5), (False, 40)])
def test_view_is_all_tokens_and_then_some_drawn_from_them(generators, grid, extra):
    tokens = [torch.arange(start, stop).float()[:, None].expand(-1, 3) for start, stop in ((0, 12), (12, 36))]
    views = token_views(tokens, generators(2), grid, extra, strays=0.0, contraction=0.0, regression=0.0)
    assert [view.shape for view in views] == [(len(own) * grid + extra, 3) for own in tokens]
    for own, view in zip(tokens, views, strict=True):
        if grid:
            assert torch.equal(view[: len(own)], own)
        drawn = view[len(own) * grid :]
        assert all((own == token).all(-1).any() for token in drawn)
        if extra == 40:
            assert len(drawn[:, 0].unique()) < 40  # with replacement
            assert (drawn[:, 0].diff() < 0).any()  # in random order


def test_strays_come_from_the_other_pictures(generators):
    """On average, half of `strays` of the drawn tokens are replaced, a quarter by tokens of the same picture."""
    pictures = [torch.full((5, 2), float(index)) for index in range(4)]
    views = torch.stack(token_views(pictures, generators(4), grid=False, extra=20000, strays=0.8, regression=0.0))
    foreign = (views[..., 0] != torch.arange(4.0)[:, None]).float().mean(1)
    assert foreign.max() <= 0.8 * 0.75 + 0.02 and len(foreign.unique()) == 4  # a different share for each
    pictures = [torch.full((5, 2), float(index)) for index in range(500)]
    many = torch.stack(token_views(pictures, generators(500), grid=False, extra=200, strays=0.8, regression=0.0))
    share = (many[..., 0] != torch.arange(500.0)[:, None]).float().mean()
    assert share.item() == pytest.approx(0.4, abs=0.03)  # standard error 0.01


def test_drawn_tokens_move_towards_their_own_mean(generators):
    """All drawn tokens of a row move by the same share, uniform up to `contraction`; the ordered tokens do not."""
    corner = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    pictures = [corner + index for index in range(400)]
    views = token_views(pictures, generators(400), grid=True, extra=6, strays=0.0, contraction=0.9, regression=0.0)
    shares = []
    for index, view in enumerate(views):
        assert torch.equal(view[:4], corner + index)
        left = (view[4:] - index).abs()
        assert left.max() - left.min() < 1e-4
        shares.append(1 - left.mean().item())
    assert min(shares) > -1e-4 and max(shares) < 0.9 + 1e-4
    assert torch.tensor(shares).mean().item() == pytest.approx(0.45, abs=0.04)  # standard error 0.013


def test_drawn_tokens_move_towards_the_mean_of_all(generators):
    pictures = [torch.full((4, 2), 1.0 if index % 2 else -1.0) for index in range(400)]  # with mean zero
    views = token_views(pictures, generators(400), grid=True, extra=6, strays=0.0, regression=0.5)
    shares = []
    for picture, view in zip(pictures, views, strict=True):
        assert torch.equal(view[:4], picture)
        shares.append(1 - (view[4:] * picture[0]).mean().item())
        assert (view[4:] - view[4]).abs().max() < 1e-5
    assert min(shares) > -1e-4 and max(shares) < 0.5 + 1e-4
    assert torch.tensor(shares).mean().item() == pytest.approx(0.25, abs=0.025)  # standard error 0.007


def test_view_of_a_row_depends_on_its_own_generator(generators):
    """Without tokens of the batch, the view of a row is the one that it has alone."""
    tokens = list(torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)))
    views = token_views(tokens, generators(3), True, 9, strays=0.0, regression=0.0)
    for own, view, generator in zip(tokens, views, generators(3), strict=True):
        assert torch.equal(token_views([own], [generator], True, 9, strays=0.0, regression=0.0)[0], view)
    assert not torch.equal(views[0], token_views(tokens, generators(3, seed=1), True, 9)[0])


@pytest.fixture
def trainer(captioner, avworld_processor, rows, tmp_path) -> TokenViewTrainer:
    arguments = CaptionerArguments(output_dir=str(tmp_path), use_cpu=True)
    frames = [{"frames": row["frames"][:1]} for row in rows]
    image_tokens = encode_pictures(captioner, avworld_processor, Dataset.from_list(frames))
    return TokenViewTrainer(
        model=captioner.eval(),
        args=arguments,
        data_collator=TokenViewCollator(avworld_processor, image_tokens, drawn=(36, 64)),
        processing_class=avworld_processor,
        stage="captioner",
    )


def test_loss_of_the_grid_is_plain_captionings(trainer, captioner, avworld_processor, rows, view_rows, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (True, 0))
    loss = trainer.compute_loss(captioner, trainer.data_collator(view_rows([True] * 4)))
    plain = CaptionCollator(avworld_processor, image=True, frame=0)(rows)
    assert torch.equal(loss, captioner(**plain).loss)


def test_loss_is_of_the_tokens_drawn(trainer, captioner, avworld_processor, rows, view_rows, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (False, 40))
    dialogues = view_rows([True] * 4)
    batch = trainer.data_collator(dialogues)
    loss = trainer.compute_loss(captioner, dict(batch))
    pixels = pixel_values([open_frame(row, 0) for row in rows], avworld_processor)
    views = token_views(list(captioner.model.encode_image(pixels)), Draws()(dialogues), False, 40)
    drawn = list(captioner.model.multi_modal_projector(torch.stack(views)))
    words = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image = BaseModelOutputWithPooling(pooler_output=drawn)
    assert torch.equal(loss, captioner(**words, mm_encoder_outputs={"image": image}).loss)


def test_unlikelihood_of_repetition_is_added(trainer, captioner, view_rows, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (True, 0))
    batch = trainer.data_collator(view_rows([True] * 4))
    count = (batch["labels"] != -100).sum()
    words = torch.arange(captioner.config.text_config.vocab_size) % 2 == 0
    likelihood, outputs = trainer.compute_loss(captioner, dict(batch), True, count)
    repetition = repetition_unlikelihood(outputs["logits"], batch["labels"], words, count)
    assert 0 < repetition < repetition_unlikelihood(outputs["logits"], batch["labels"], num_items=count)
    trainer.unlikelihood, trainer.words = 0.5, words
    loss = trainer.compute_loss(captioner, dict(batch), num_items_in_batch=count)
    torch.testing.assert_close(loss, likelihood + 0.5 * repetition)


def test_rows_of_text_alone_train_too(trainer, captioner, view_rows):
    batch = trainer.data_collator(view_rows([False] * 4))
    loss = trainer.compute_loss(captioner, dict(batch))
    assert torch.equal(loss, captioner(**batch).loss) and torch.isfinite(loss)


def test_pictures_of_a_mixed_batch_stay_with_their_rows(trainer, captioner, view_rows, monkeypatch):
    """The loss of a batch is the mean of the losses of its rows, weighted by the number of answer tokens."""
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator: (True, 0))
    dialogues = view_rows([True, False, True, True])
    losses = [trainer.compute_loss(captioner, trainer.data_collator([row])) for row in dialogues]
    lengths = torch.tensor([len(row["answer_ids"]) for row in dialogues])
    together = trainer.compute_loss(captioner, trainer.data_collator(dialogues))
    expected = (torch.stack(losses) * lengths).sum() / lengths.sum()
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-4)


def test_projector_learns_from_every_view(trainer, captioner, view_rows, monkeypatch):
    for view in ((True, 0), (False, 40), (True, 40)):
        monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self, generator, view=view: view)
        captioner.zero_grad()
        trainer.compute_loss(captioner, trainer.data_collator(view_rows([True] * 4))).backward()
        assert all(weight.grad.any() for weight in captioner.model.multi_modal_projector.parameters()), view
        assert all(weight.grad is None for weight in captioner.model.vision_tower.parameters()), view
