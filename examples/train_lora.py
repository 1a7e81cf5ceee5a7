"""Train a LoRA.

    python examples/train_lora.py DATASET [OUTPUT]

Run examples/prepare.py first for a dataset. For the released model use configs/lora_i2v.py.
"""

import sys
from pathlib import Path

from framepack_jax.__main__ import main as framepack


def main(dataset: Path, output: Path) -> None:
    framepack(["train", "--bundle", "random", "--data.path", str(dataset), "--output", str(output),
               "--trainable", "lora", "--lora.rank", "4", "--lora.alpha", "4", "--batch", "2",
               "--steps", "4", "--optimizer.learning-rate", "1e-3", "--dtype", "float32",
               "--remat", "none", "--validation.every", "0"])  # fmt: skip
    print(f"framepack sample --bundle random --lora {output} uses it")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} DATASET [OUTPUT]")
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "outputs/examples/lora"))
