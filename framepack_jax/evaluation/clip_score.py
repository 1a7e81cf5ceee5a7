"""Score the frames of a video with a pretrained CLIP, for users who have its weights.

Two metrics of every frame: similarity to the first frame (subject consistency, as in VBench,
arXiv 2311.17982, but by CLIP), and to the caption (CLIPScore, arXiv 2104.08718, without factor).
The network is that of transformers, which needs PyTorch (extra [torch]).

Shapes: P frames, H W rows and columns, D width of the embedding.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax.evaluation.metrics import Metric

METRICS = {
    "likeness": Metric("Likeness to the first frame", "cosine", 1),
    "agreement": Metric("Likeness to the caption", "cosine", 1),
}
AT_ONCE = 32


def measure(folder: Path, frames: Iterable[np.ndarray], caption: str) -> dict[str, np.ndarray]:
    """Measure `METRICS` of frames (H, W, 3) uint8, each (P,); without a caption, only likeness.

    `folder` holds a CLIP model as `save_pretrained` writes it, with tokenizer and image processor.
    Raises ValueError if it does not, or if PyTorch is not installed.
    """
    model, tokenizer, processor = _load(folder)
    images = np.concatenate(list(_embedded(model, processor, frames)))
    found = {"likeness": images @ images[0]}
    if caption:
        found["agreement"] = images @ _text(model, tokenizer, caption)
    return found


def _load(folder: Path) -> tuple[Any, Any, Any]:
    try:
        import torch  # noqa: F401
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    except ImportError as error:
        raise ValueError(
            f"--clip needs PyTorch ({error}): pip install framepack-jax[torch]"
        ) from error
    try:
        made: tuple[Any, ...] = (CLIPModel, AutoTokenizer, CLIPImageProcessor)
        model, tokenizer, processor = (
            kind.from_pretrained(folder, local_files_only=True) for kind in made
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--clip {folder}: expected a folder with a CLIP model, its tokenizer and its image"
            f" processor, as of openai/clip-vit-large-patch14 ({error})"
        ) from error
    return model.eval(), tokenizer, processor


def _embedded(model: Any, processor: Any, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield unit vectors (some frames, D)."""
    import torch

    frames = iter(frames)
    while some := list(islice(frames, AT_ONCE)):
        pixels = processor(some, return_tensors="pt")
        with torch.inference_mode():
            yield _unit(model.get_image_features(**pixels))


def _text(model: Any, tokenizer: Any, caption: str) -> np.ndarray:
    """Return the unit vector (D,) of a caption, truncated to the length of the model."""
    import torch

    ids = tokenizer(caption, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        return _unit(model.get_text_features(**ids))[0]


def _unit(features: Any) -> np.ndarray:
    vectors = features.pooler_output.float().numpy()
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
