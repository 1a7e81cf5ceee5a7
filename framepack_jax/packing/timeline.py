"""The timeline: latent frames at absolute positions, and the context gathered from it."""

from collections.abc import Sequence

import jax
import numpy as np
from flax import struct

from framepack_jax.packing.sections import MISSING, Section


class Timeline:
    """Latent frames at absolute positions, on the host, with a mask of the known ones.

    `latents` is (B, T, H, W, C), float32 unless made by `of`; `known` is (T,). In training all
    positions are known.
    """

    def __init__(self, length: int, frame_shape: tuple[int, int, int], batch: int = 1) -> None:
        self.latents = np.zeros((batch, length, *frame_shape), np.float32)
        self.known = np.zeros(length, bool)

    @classmethod
    def of(cls, latents: np.ndarray) -> "Timeline":
        """Return a timeline of latents (B, T, H, W, C) of any dtype, all known, without a copy."""
        timeline = cls.__new__(cls)
        timeline.latents, timeline.known = latents, np.ones(latents.shape[1], bool)
        return timeline

    def write(self, positions: Sequence[int], latents: np.ndarray) -> None:
        """Write latents (B, len(positions), H, W, C) at positions."""
        self.latents[:, list(positions)] = latents
        self.known[list(positions)] = True

    def read(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return latents (B, len(positions), H, W, C); MISSING reads zeros. Raises ValueError if a
        position is not known yet."""
        at = np.asarray(positions, int)
        if unknown := [int(p) for p in at if p != MISSING and not self.known[p]]:
            raise ValueError(f"the timeline does not know positions {unknown} yet")
        latents = self.latents[:, at]
        latents[:, at == MISSING] = 0
        return latents


@struct.dataclass
class PackedContext:
    """Context that the network reads beside the noisy target, by group, in sequence order.

    `latents[i]` (B, F, H, W, C), `indices[i]` (B, F) frame indices, `kernels[i]` its patch kernel;
    `target_indices` (B, w). Only the kernels are static: all sections of a video share one program.
    """

    latents: tuple[jax.Array | np.ndarray, ...]
    indices: tuple[jax.Array | np.ndarray, ...]
    target_indices: jax.Array | np.ndarray
    kernels: tuple[str, ...] = struct.field(pytree_node=False)


def read_target(section: Section, timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """Return the known frames among the targets of a section: latents (B, w, H, W, C), zero where
    none is known, and their mask (w,)."""
    known = timeline.known[list(section.targets)]
    positions = np.where(known, section.targets, MISSING)
    return timeline.read(positions), known


def read_context(section: Section, timeline: Timeline) -> PackedContext:
    """Gather the context of a section from the timeline, as sampling and training both do."""
    batch = timeline.latents.shape[0]

    def per_sample(indices: Sequence[int]) -> np.ndarray:
        return np.tile(np.asarray(indices, np.int32), (batch, 1))

    return PackedContext(
        latents=tuple(timeline.read(group.reads) for group in section.groups),
        indices=tuple(per_sample(group.indices) for group in section.groups),
        target_indices=per_sample(section.indices),
        kernels=tuple(group.kernel for group in section.groups),
    )
