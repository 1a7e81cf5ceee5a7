"""Make a video from an image and a prompt.

    python examples/sample.py [OUTPUT [SIZE]]

The bundle `tiny` animates coloured shapes. Replace it with the folder of a converted model for real
images.
"""

import sys
from pathlib import Path

from framepack_jax import FramePack, Settings, bundle, load_image
from framepack_jax.video import write_mp4

IMAGE = Path(__file__).parent / "sprites.png"
PROMPT = (
    "the small cyan ring orbits the small yellow triangle; the small yellow triangle stays;"
    " the camera pans down."
)


def main(output: Path, size: int = 128) -> None:
    output.mkdir(parents=True, exist_ok=True)
    pipe = FramePack.load(bundle.resolve("tiny"))
    video = pipe(
        load_image(IMAGE), PROMPT, sections=1, height=size, width=size, settings=Settings(steps=10)
    )
    write_mp4(output / "video.mp4", video.frames, fps=30)
    print(f"{output / 'video.mp4'}: {len(video.frames)} frames")


if __name__ == "__main__":
    args = [*sys.argv[1:], *("outputs/examples/sample", "128")[len(sys.argv) - 1 :]]
    main(Path(args[0]), int(args[1]))
