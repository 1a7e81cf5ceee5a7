"""Convert a transformer from diffusers' format, and verify the result.

    python examples/convert.py [OUTPUT]

The source is an export of the bundle `random`, so that nothing is downloaded. For the released
model: framepack convert --framepack i2v --output weights/framepack_i2v_hy
"""

import sys
from pathlib import Path

from framepack_jax.__main__ import main as framepack


def main(output: Path) -> None:
    checkpoint, bundle = str(output / "checkpoint"), str(output / "bundle")
    framepack(["export", checkpoint, "--bundle", "random"])
    framepack(["convert", "--transformer", checkpoint, "--encoders-from", "random",
               "--output", bundle])  # fmt: skip
    framepack(["verify", checkpoint, bundle])


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/examples/convert"))
