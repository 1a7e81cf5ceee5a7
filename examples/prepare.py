"""Make a dataset from videos with captions.

    python examples/prepare.py [OUTPUT]

The videos are rendered, each with a caption in a text file beside it. Replace them with a folder of
your own.
"""

import sys
from pathlib import Path

from framepack_jax.__main__ import main as framepack


def main(output: Path) -> None:
    videos = str(output / "videos")
    framepack(["synthetic", "--output", videos, "--clips", "4", "--seconds", "1.5",
               "--size", "32x48"])  # fmt: skip
    framepack(["prepare", "--videos", videos, "--bundle", "random", "--buckets", "32x48",
               "--output", str(output / "dataset")])  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/examples/prepare"))
