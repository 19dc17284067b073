"""Still images: every mode is loaded as upright RGB in the requested size; a damaged image is reported."""

import os

import numpy as np
import pytest
from PIL import Image

from dali_llava.processing.media import MediaError, load_image, probe


def test_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), pixels)
    info = probe(tmp_path / "a.png")
    assert (info.kind, info.width, info.height, info.has_audio, info.has_video) == ("image", 8, 6, False, False)
    Image.new("RGB", (32, 16), (200, 30, 30)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(load_image(tmp_path / "a.jpg"), int) - (200, 30, 30)).max() <= 3
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter turn clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.rot90(pixels, -1))
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        name = tmp_path / ("b.jpg" if mode == "CMYK" else "b.png")
        image.convert(mode).save(name)
        assert load_image(name.read_bytes()).mode == "RGB"
    shrunk = load_image(tmp_path / "a.jpg", shorter_side=9)
    assert shrunk.size == (18, 9) and load_image(tmp_path / "a.jpg", shorter_side=16).size == (32, 16)
    Image.fromarray(np.full((2, 2), 257 * 100, np.uint16)).save(tmp_path / "16bit.png")
    assert np.asarray(load_image(tmp_path / "16bit.png")).tolist() == [[[100] * 3] * 2] * 2


def test_image_cut_in_the_middle(tmp_path):
    for name in ("a.png", "a.jpg"):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
        with pytest.raises(MediaError, match=f"{name}: is damaged") as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_transparency_lies_on_white(tmp_path):
    hidden = np.zeros((4, 4, 4), np.uint8)
    hidden[..., 0], hidden[2:, :, 3] = 200, 255
    Image.fromarray(hidden).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert (image.getpixel((0, 0)), image.getpixel((0, 3))) == ((255, 255, 255), (200, 0, 0))
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png", transparency=7)
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, 100.0, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[0, 257 * 7, 65535]], np.uint16), [0, 7, 255]),
        (np.array([[-5, 257 * 7, 65535]], np.int32), [0, 7, 255]),
    ],
)
def test_grey_of_many_bits_is_scaled(tmp_path, values, expected):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.asarray(load_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == expected


def test_a_heic_picture_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(MediaError, match="is a HEIC or AVIF picture"):
        load_image(tmp_path / "a.heic")


def test_reported_pictures(shared_data):
    reports = shared_data / "reports"
    assert load_image(reports / "alpha_hidden.png").getpixel((1, 1)) == (255, 255, 255)
    reference = np.asarray(load_image(reports / "tiled_ref.png"), float)
    try:
        image = np.asarray(load_image(reports / "tiled.heic"), float)
    except MediaError as error:
        assert "HEIC" in str(error)
    else:
        assert np.abs(image - reference).mean() < 3
