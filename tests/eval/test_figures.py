"""The figure of mean tokens, and the gap that it shows."""

import numpy as np
import pytest
from PIL import Image

from dali_llava.eval.figures import plot_mean_tokens, principal_components
from dali_llava.eval.modality_gap import mean_tokens, modality_gap
from dali_llava.processing.corpora import load_corpus


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
    assert modality_gap(2 * image + [6.0, 8.0], 2 * image) == pytest.approx(5.0)  # in its own unit


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
    from dali_llava.modeling import LlavaAudioForConditionalGeneration
    from dali_llava.processing import LlavaAudioProcessor

    model = LlavaAudioForConditionalGeneration.from_pretrained(tiny_model_dir)
    processor = LlavaAudioProcessor.from_pretrained(tiny_model_dir)
    rows = load_corpus("avworld", "test", sizes={"test": 5})
    together, apart = (mean_tokens(model, processor, rows, modality, batch_size) for batch_size in (5, 2))
    assert together.shape == (5, model.config.vision_config.hidden_size) and together.dtype == np.float32
    np.testing.assert_allclose(together, apart, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-4
