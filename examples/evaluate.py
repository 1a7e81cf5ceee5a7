"""Measure a video file: sharpness, noise, motion and their drift.

    python examples/evaluate.py VIDEO

Run examples/sample.py first for a video.
"""

import sys
from pathlib import Path

from framepack_jax.__main__ import main as framepack


def main(video: Path) -> None:
    framepack(["evaluate", "--video", str(video)])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} VIDEO")
    main(Path(sys.argv[1]))
