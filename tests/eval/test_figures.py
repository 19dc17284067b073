"""The figures of mean tokens and attention, and their data."""

import numpy as np
import pytest
import torch
from PIL import Image

from dali_llava.eval.avworld.attention_maps import attention_by_content, image_attention
from dali_llava.eval.captioner import load_captioner
from dali_llava.eval.figures import plot_attention, plot_mean_tokens, principal_components
from dali_llava.eval.mean_tokens import encode_rows, mean_tokens, modality_gap
from dali_llava.processing.corpora import load_corpus
from dali_llava.processing.corpora.avworld.avworld import scene_of
from dali_llava.train.losses import AlignmentAttention


def test_principal_components_of_an_ellipse():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((5, 5)))[0][:2]
    points = rng.standard_normal((4000, 2)) * [3.0, 1.0] @ axes + 7.0
    mean, directions = principal_components(points)
    np.testing.assert_allclose(mean, points.mean(axis=0))
    np.testing.assert_allclose(np.abs(directions @ axes.T), np.eye(2), atol=0.05)  # sampling error 1 / sqrt(4000)
    assert all(direction[np.abs(direction).argmax()] > 0 for direction in directions)


def test_gap_is_the_centroids_distance_in_image_deviations():
    image = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # deviation 1
    assert modality_gap(image + [3.0, 4.0], image) == pytest.approx(5.0)
    assert modality_gap(10 * image, image) == 0.0
    assert modality_gap(2 * image + [6.0, 8.0], 2 * image) == pytest.approx(5.0)  # in units of the deviation


def test_figure_is_a_whole_png_with_a_panel_a_method(tmp_path):
    rng = np.random.default_rng(0)
    image, audio = rng.standard_normal((50, 8)), rng.standard_normal((50, 8))
    one = Image.open(plot_mean_tokens(image, {"mmd": audio}, tmp_path / "new" / "one.png"))
    two = Image.open(plot_mean_tokens(image, {"mmd": audio, "ot": audio + 3}, tmp_path / "new" / "two.png"))
    one.load(), two.load()
    assert two.width == 2 * one.width and two.height == one.height
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.png", "two.png"]
    with pytest.raises(ValueError, match="no mean audio tokens"):
        plot_mean_tokens(image, {}, tmp_path / "none.png")


@pytest.mark.parametrize("modality", ["audio", "image"])
def test_mean_tokens_are_a_rows_own_whatever_the_batch(tiny_model_dir, modality):
    model, processor = load_captioner(str(tiny_model_dir))
    rows = load_corpus("avworld", "test", sizes={"test": 5})
    together, apart = (mean_tokens(model, processor, rows, modality, batch_size) for batch_size in (5, 2))
    assert together.shape == (5, model.config.vision_config.hidden_size) and together.dtype == np.float32
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4


def test_attention_is_the_losses_on_the_pictures_grid(tiny_model_dir):
    model, processor = load_captioner(str(tiny_model_dir))
    rows = load_corpus("avworld", "test", sizes={"test": 3})
    torch.manual_seed(0)
    attention = AlignmentAttention(model.config.vision_config.hidden_size, num_heads=4, temperature=0.05)
    maps = image_attention(model, processor, attention, rows)
    audio, image = (encode_rows(model, processor, rows, modality) for modality in ("audio", "image"))
    with torch.no_grad():
        _, weights = attention(audio, image)
    side = maps.shape[1]
    assert maps.shape == (3, side, side) and side * side == weights.shape[1]
    np.testing.assert_allclose(maps.mean(axis=(1, 2)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(maps[1, 1], weights[1, side : 2 * side] * side * side, rtol=1e-4)


def test_attention_is_averaged_over_what_stands_in_the_cells():
    rows = load_corpus("avworld", "test", sizes={"test": 6})
    maps = np.ones((6, 2, 2))
    for row, weights in zip(rows, maps, strict=True):
        for entity in scene_of("test", int(row["id"][-6:]))[0].visible:
            weights[divmod(entity.cell, 2)] = 5.0 if entity.span else 3.0
    assert attention_by_content(maps, rows)["sounds"] == 5.0 and attention_by_content(maps, rows)["ground"] == 1.0


def test_figure_of_the_attention_is_a_whole_png(tmp_path):
    pictures = [Image.new("RGB", (48, 48), colour) for colour in ("red", "blue")]
    maps = np.array([[[0.0, 1.0], [2.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    path = plot_attention(pictures, maps, ["a dog barking", "rain falling"], tmp_path / "attention.png")
    figure = Image.open(path)
    figure.load()
    assert figure.width > 400 and [entry.name for entry in tmp_path.iterdir()] == ["attention.png"]
    with pytest.raises(ValueError, match="2 pictures, 2 maps, 1 captions"):
        plot_attention(pictures, maps, ["a dog barking"], path)
