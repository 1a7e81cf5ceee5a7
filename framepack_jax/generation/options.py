"""Options of one video, as `FramePack.stream` takes them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from framepack_jax.generation.geometry import Geometry
from framepack_jax.generation.layout import Layout, fit_images, make_layout
from framepack_jax.generation.request import Request, SourceVideo


@dataclasses.dataclass(frozen=True, eq=False)
class VideoOptions:
    """Content, length and size of one video, beside its start image and prompt.

    Args:
        negative_prompt: Used with a CFG scale other than 1.
        end_image: Last image of the video, used as `end_image_as` says, see `Request`.
        key_frames: Images by seconds.
        source_video: Video to continue. Its frames before the first new ones stay as they are.
        seconds: Length of what is generated; the nearest number of sections is taken.
        sections: Length in latent windows, in place of `seconds`.
        fps: Frames per second.
        height, width: Size in pixels, even numbers. By default the bucket nearest to the image.
        seed: Seed of the noise, 64 bits.
        prompt_blend: Seconds around a change of prompt in which both prompts count.
    """

    negative_prompt: str = ""
    end_image: np.ndarray | None = None
    end_image_as: str = "auto"
    key_frames: Mapping[float, np.ndarray] | None = None
    source_video: SourceVideo | None = None
    seconds: float = 5.0
    sections: int | None = None
    fps: float = 30.0
    height: int | None = None
    width: int | None = None
    seed: int = 0
    prompt_blend: float = 1.0

    def prepare(
        self, geometry: Geometry, image: np.ndarray | None, prompt: str
    ) -> tuple[Request, Layout]:
        """Return the request, fitted to its layout, and the layout. Raises ValueError."""
        request = Request(
            prompt, image, self.negative_prompt, self.seed, self.end_image,
            tuple(sorted((self.key_frames or {}).items())), self.source_video, self.end_image_as,
        )  # fmt: skip
        layout = make_layout(
            geometry, request,
            seconds=self.seconds, sections=self.sections, fps=self.fps,
            height=self.height, width=self.width,
        )  # fmt: skip
        return fit_images(geometry, request, layout), layout
