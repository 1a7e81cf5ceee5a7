"""Small datasets for tests: records of random numbers, in the widths of the random bundle."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from framepack_jax import bundle
from framepack_jax.data import loader, records
from framepack_jax.data.records import BFLOAT16, Clip, Index, Record
from framepack_jax.jobs.provenance import path_of

SIZES = {(32, 48): (7, 4, 9, 5, 3), (48, 32): (5, 6, 3)}
TEXT, POOLED, IMAGE, TOKENS = 32, 24, 24, 9


def random_record(number: int, height: int, width: int, length: int) -> Record:
    """Clip `number`, the same each time; neighbouring frames are alike. Two are of one video."""
    rng = np.random.default_rng([number, length])
    shape = length, height // 8, width // 8, 16
    latents = 0.5 * rng.standard_normal((1, *shape[1:])) + 0.5 * rng.standard_normal(shape)
    place = "a.mp4", 0.0, 1 + 4 * (length - 1), height, width
    clip = Clip(f"video_{number // 2}-{number:03d}", *place, "waves")
    arrays = [
        rng.standard_normal((4 + number % 5, TEXT)), rng.standard_normal(POOLED),
        rng.standard_normal((TOKENS, IMAGE)), latents,
    ]  # fmt: skip
    return Record(clip, *(array.astype(BFLOAT16) for array in arrays))


def damage(folder: Path, record: Record) -> None:
    """Change a byte in the middle of a record where it lies in its shard."""
    packed = records.pack(record)
    for file in (folder / records.SHARDS).iterdir():
        data = bytearray(file.read_bytes())
        if (begin := data.find(packed)) >= 0:
            data[begin + len(packed) // 2] ^= 1
            file.write_bytes(data)
            return
    raise AssertionError(f"{record.clip.id} is in no shard")


def write_dataset(
    folder: Path, sizes: Mapping[tuple[int, int], Sequence[int]] = SIZES
) -> list[Record]:
    """A dataset of clips of these lengths in latent frames, by bucket; returns its records."""
    made, shards = [], []
    for (height, width), lengths in sizes.items():
        mine = [random_record(len(made) + i, height, width, n) for i, n in enumerate(lengths)]
        packed = ((records.pack(record), len(record.latents)) for record in mine)
        shards += records.write_shards(folder, (height, width), packed)
        made += mine
    rng = np.random.default_rng(0)
    records.write_empty(folder, rng.standard_normal((2, TEXT)), rng.standard_normal(POOLED))
    made_by = loader.made_by(bundle.read_manifest(path_of("random")), "latents")
    records.write_index(folder, Index("latents", tuple(shards), made_by, 30.0, 4, 8, 16))
    return made
