"""Resize and normalise images as an image encoder reads them."""

import dataclasses
import json

import numpy as np
from etils import epath
from PIL import Image


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize images to `size` (height, width) and normalise them for the image encoder.

    `resample` is the filter of Pillow. The result is (`rescale` * image - `mean`) / `std`.
    """

    size: tuple[int, int]
    resample: int = Image.Resampling.BICUBIC
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Convert uint8 (B, H, W, 3) to float32 (B, height, width, 3)."""
        height, width = self.size
        resized = [
            np.asarray(Image.fromarray(x).resize((width, height), self.resample)) for x in images
        ]
        mean, std = (np.asarray(x, np.float32)[None, None, None, :] for x in (self.mean, self.std))
        return ((np.stack(resized) * self.rescale).astype(np.float32) - mean) / std


def load_image_processor(folder: epath.PathLike) -> ImageProcessor:
    """Read `preprocessor_config.json`.

    Raises ValueError if it is missing, or if its steps are not a resize to a fixed size, a rescale
    and a normalisation.
    """
    file = epath.Path(folder) / "preprocessor_config.json"
    if not file.exists():
        raise ValueError(f"no image processor in {folder}: {file.name} is missing")
    fields = json.loads(file.read_text())
    steps = {name: fields.get(name, True) for name in ("do_resize", "do_rescale", "do_normalize")}
    size = fields["size"]
    if not all(steps.values()) or fields.get("do_center_crop") or set(size) != {"height", "width"}:
        raise ValueError(
            f"image processor {file}: {steps}, do_center_crop {fields.get('do_center_crop')}, size"
            f" {size}; expected all three steps, no crop, and a size of height and width (SigLIP's)"
        )
    return ImageProcessor(
        size=(size["height"], size["width"]),
        resample=fields.get("resample", ImageProcessor.resample),
        rescale=fields.get("rescale_factor", ImageProcessor.rescale),
        mean=tuple(fields.get("image_mean", ImageProcessor.mean)),
        std=tuple(fields.get("image_std", ImageProcessor.std)),
    )
