"""The timeline: latent frames at absolute positions, and the context gathered from it."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from einops import reduce
from flax import struct

from framepack_jax.packing.kernels import TAIL_POOL, kernel_shape, tail_of
from framepack_jax.packing.orders import MISSING, Group
from framepack_jax.packing.sections import Section
from framepack_jax.packing.tokens import group_tokens


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

    def sample(self, number: int) -> "Timeline":
        """Return the timeline of one sample, without a copy."""
        timeline = Timeline.__new__(Timeline)
        timeline.latents, timeline.known = self.latents[number : number + 1], self.known
        return timeline

    def view(self, positions: range) -> np.ndarray:
        """Return latents (B, len(positions), H, W, C) at adjacent positions, without a copy. Raises
        ValueError if a position is not known yet."""
        if not self.known[positions.start : positions.stop].all():
            raise ValueError(f"the timeline does not know all of positions {positions} yet")
        return self.latents[:, positions.start : positions.stop]

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
    `target_indices` (B, w). A tail tc is one frame, the mean, with (first index, number of
    indices). A tail ta has latents pooled by `TAIL_POOL`, and comes first: of its tokens, the first
    `masked` (B,) are not read. Only the kernels are static: all sections of a video share one
    program.
    """

    latents: tuple[jax.Array | np.ndarray, ...]
    indices: tuple[jax.Array | np.ndarray, ...]
    target_indices: jax.Array | np.ndarray
    kernels: tuple[str, ...] = struct.field(pytree_node=False)
    masked: jax.Array | np.ndarray | None = None

    @property
    def tail_tokens(self) -> int:
        """Number of tokens of a tail ta, the first group."""
        sides = zip(self.latents[0].shape[1:4], kernel_shape(self.kernels[0]), strict=True)
        return math.prod(-(-side // size) for side, size in sides)


def read_target(section: Section, timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """Return the known frames among the targets of a section: latents (B, w, H, W, C), zero where
    none is known, and their mask (w,)."""
    known = timeline.known[list(section.targets)]
    positions = np.where(known, section.targets, MISSING)
    return timeline.read(positions), known


def read_each(sections: Sequence[Section], timeline: Timeline) -> PackedContext:
    """Gather the context of a section of each sample, or of one section for all samples."""
    if len(sections) == 1:
        return read_context(sections[0], timeline)
    each = [read_context(s, timeline.sample(i)) for i, s in enumerate(sections)]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *each)


def read_context(section: Section, timeline: Timeline) -> PackedContext:
    """Gather the context of a section from the timeline, as sampling and training both do."""
    batch = timeline.latents.shape[0]

    def per_sample(indices: Sequence[int]) -> np.ndarray:
        return np.tile(np.asarray(indices, np.int32), (batch, 1))

    masked = [_masked(g, timeline) for g in section.groups if tail_of(g.kernel) == "ta"]
    return PackedContext(
        latents=tuple(_latents(group, timeline) for group in section.groups),
        indices=tuple(per_sample(_indices(group)) for group in section.groups),
        target_indices=per_sample(section.indices),
        kernels=tuple(group.kernel for group in section.groups),
        masked=np.full(batch, masked[0], np.int32) if masked else None,
    )


def _latents(group: Group, timeline: Timeline) -> np.ndarray:
    """Return the latents of a group; those of a tail are float32."""
    treatment = tail_of(group.kernel)
    if not treatment:
        return timeline.read(group.reads)
    there = [p for p in group.reads if p != MISSING]
    # The positions of a tail follow each other: a view, as there may be thousands.
    frames = timeline.view(range(there[0], there[-1] + 1) if there else range(0))
    if treatment == "tc":
        if not there:
            return np.zeros_like(timeline.latents[:, :1], np.float32)
        return frames.mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    pooled = _pooled(frames)
    missing = len(group.reads) - len(there)
    return np.pad(pooled, [(0, 0), (missing, 0), *[(0, 0)] * 3])


def _pooled(frames: np.ndarray) -> np.ndarray:
    """Average cells of TAIL_POOL x TAIL_POOL latents of frames (B, F, H, W, C), padded by
    replication."""
    edges = [(0, -side % TAIL_POOL) for side in frames.shape[2:4]]
    frames = np.pad(frames, [(0, 0), (0, 0), *edges, (0, 0)], mode="edge").astype(np.float32)
    return reduce(frames, "b f (h ph) (w pw) c -> b f h w c", "mean", ph=TAIL_POOL, pw=TAIL_POOL)


def _indices(group: Group) -> tuple[int, ...]:
    if tail_of(group.kernel) == "tc":
        return group.indices[0], len(group.indices)
    return group.indices


def _masked(group: Group, timeline: Timeline) -> int:
    """Return how many of the first tokens of a tail ta stand for MISSING frames alone."""
    time = kernel_shape(group.kernel)[0]
    missing = sum(p == MISSING for p in group.reads) // time * time
    return group_tokens(missing, group.kernel, *timeline.latents.shape[2:4])
