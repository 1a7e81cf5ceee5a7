"""Write videos of the toy world with their captions."""

from pathlib import Path

from framepack_jax.toy.world.description import FPS, Split
from framepack_jax.toy.world.draw import WALLS, scene
from framepack_jax.toy.world.rendering import frames
from framepack_jax.utils.files import atomic_write
from framepack_jax.video import write_mp4


def write(
    folder: Path, number: int, seed: int, seconds: float, size: tuple[int, int] | None = None,
    split: Split = "train", walls: float = WALLS,
) -> Path:  # fmt: skip
    """Write video `number` as an mp4 file, and its caption in a .txt file beside it, unless both
    exist."""
    height, width = size or (None, None)
    made = scene(seed, number, height, width, split, walls)
    file = Path(folder) / f"{number:05d}.mp4"
    if file.exists() and file.with_suffix(".txt").exists():
        return file
    write_mp4(file, frames(made, seconds), FPS)
    with atomic_write(file.with_suffix(".txt")) as partial:
        partial.write_text(made.caption + "\n")
    return file
