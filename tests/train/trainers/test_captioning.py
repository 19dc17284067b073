"""Views of a picture's tokens: how many, which, and that the captioner is trained on exactly them."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dali_llava.train.collators import CaptionCollator, TokenViewCollator
from dali_llava.train.pretrain_captioner import CaptionerArguments
from dali_llava.train.trainers import TokenViewTrainer, token_view


@pytest.mark.parametrize(("grid", "extra"), [(True, 0), (False, 7), (True, 5), (False, 40)])
def test_view_is_the_grid_and_then_tokens_drawn_from_it(grid, extra):
    torch.manual_seed(0)
    tokens = torch.arange(12.0)[:, None].expand(12, 3)
    view = token_view(tokens, grid, extra)
    assert view.shape == (12 * grid + extra, 3)
    if grid:
        assert torch.equal(view[:12], tokens)
    drawn = view[12 * grid :]
    assert all((tokens == token).all(-1).any() for token in drawn)
    if extra == 40:
        assert len(drawn[:, 0].unique()) < 40  # with replacement
        assert (drawn[:, 0].diff() < 0).any()  # in no order


def test_views_carry_gradients_to_their_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(6, 3, requires_grad=True)
    token_view(tokens, grid=True, extra=4).sum().backward()
    times = tokens.grad[:, 0]
    assert times.min() >= 1 and times.sum() == 6 + 4  # once in the grid, and once for every draw


@pytest.fixture
def trainer(captioner, avworld_processor, tmp_path) -> TokenViewTrainer:
    arguments = CaptionerArguments(output_dir=str(tmp_path), use_cpu=True)
    return TokenViewTrainer(
        model=captioner.eval(),
        args=arguments,
        data_collator=TokenViewCollator(avworld_processor, drawn=(36, 64)),
        processing_class=avworld_processor,
        stage="captioner",
    )


def test_loss_of_the_grid_is_plain_captionings(trainer, captioner, avworld_processor, rows, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self: (True, 0))
    rows = [row | {"frames": row["frames"][:1]} for row in rows]
    loss = trainer.compute_loss(captioner, trainer.data_collator(rows))
    plain = CaptionCollator(avworld_processor, image=True, frame=0)(rows)
    assert torch.equal(loss, captioner(**plain).loss)


def test_loss_is_of_the_tokens_drawn(trainer, captioner, avworld_processor, rows, monkeypatch):
    monkeypatch.setattr(TokenViewCollator, "draw_view", lambda self: (False, 40))
    batch = trainer.data_collator([row | {"frames": row["frames"][:1]} for row in rows])
    torch.manual_seed(5)
    loss = trainer.compute_loss(captioner, dict(batch))
    torch.manual_seed(5)
    grid = captioner.get_image_features(batch["pixel_values"]).pooler_output
    drawn = [tokens[torch.randint(36, (40,))] for tokens in grid]
    words = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    image = BaseModelOutputWithPooling(pooler_output=drawn)
    assert torch.equal(loss, captioner(**words, mm_encoder_outputs={"image": image}).loss)


def test_rows_of_text_alone_train_too(trainer, captioner, rows):
    batch = trainer.data_collator([row | {"frames": []} for row in rows])
    assert torch.isfinite(trainer.compute_loss(captioner, batch))
