"""Read still images as 8-bit RGB: upright, composited on a background, and scaled from any bit depth."""

import numpy as np
from PIL import Image, ImageOps

from .source import IMAGE_FORMATS, MediaError, one_line


BACKGROUND = (255, 255, 255)  # colour behind transparent pixels


def read_image(name: str, handle, shorter_side: int | None = None) -> Image.Image:
    """Read the image of `handle`. See `load_image`."""
    try:
        with Image.open(handle, formats=IMAGE_FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                image = to_8_bits(image)
            image = on_background(image) if image.has_transparency_data else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"{name}: is damaged ({one_line(error)}); download or export it again") from error
    size = shrunken_size(*image.size, shorter_side)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def to_8_bits(image: Image.Image) -> Image.Image:
    """
    Scale a grey image of integers (modes I, I;16, ...) or floats (F) so that white is 255.

    White is 65535 for integers and 1 for floats. If values exceed that, white is 255 for floats up to 255, 65535 for
    floats up to 65535, and otherwise the largest value. Negative values and NaN become black.
    """
    values = np.nan_to_num(np.asarray(image, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    largest = values.max(initial=0.0)
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    white = next((white for white in ranges if largest <= white), largest)
    return Image.fromarray(np.rint(np.clip(values / white, 0, 1) * 255).astype(np.uint8))


def on_background(image: Image.Image) -> Image.Image:
    """Composite the image on BACKGROUND, in RGB. The colour of fully transparent pixels is not visible."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image).convert("RGB")


def shrunken_size(width: int, height: int, shorter_side: int | None) -> tuple[int, int]:
    scale = 1.0 if shorter_side is None else min(1.0, shorter_side / min(width, height))
    return round(scale * width), round(scale * height)
