"""Continue a video file by one section.

    python examples/continue_video.py VIDEO [OUTPUT]

Run examples/sample.py first for a video. `framepack sample --extend VIDEO` does the same, with a
run folder.
"""

import itertools
import sys
from pathlib import Path

from framepack_jax import FramePack, Settings, bundle, read_frames, read_source
from framepack_jax.video import write_mp4

PROMPT = "the small cyan ring orbits the small yellow triangle; the small yellow triangle stays."


def main(video: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    pipe = FramePack.load(bundle.resolve("tiny"))
    height, width = next(read_frames(video, 30)).shape[:2]
    source = read_source(pipe.geometry, video, 30, height, width)
    (new,) = pipe.stream(
        None, PROMPT, source_video=source, sections=1, height=height, width=width,
        settings=Settings(steps=10),
    )  # fmt: skip
    # `new` starts before the end of the source, whose last frames are cross-faded with it.
    kept = itertools.islice(read_frames(video, 30), new.start)
    write_mp4(output / "continued.mp4", itertools.chain(kept, new.frames), fps=30)
    print(f"{output / 'continued.mp4'}: {new.start + len(new.frames)} frames")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} VIDEO [OUTPUT]")
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "outputs/examples/continue"))
