"""Importance of history: which frames take the places that keep the most detail.

Source: arXiv 2504.12626, equations 3 to 5. By default, the frames nearest in time are the most
important. A schedule with ~cos orders all frames before a section by their similarity to an
estimate of the section, ~hybrid(L) by similarity + L * nearness in time.

Our reading, where the paper is silent: the cosine is averaged over cells, not summed, so that L has
a scale; the time of a section is that of its middle; RoPE indices follow the frames, and frames of
a group stand in order of time, so that temporal kernels see neighbours.

Shapes: B batch, T latent frames, H W rows and columns, C channels.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from framepack_jax.packing.orders import MISSING
from framepack_jax.packing.schedule import Schedule
from framepack_jax.packing.sections import Section, history_ages
from framepack_jax.packing.timeline import Timeline

# Keeps the cosine of a cell of zeros at zero.
TINY = 1e-12


def sim_cos(frames: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """Return the similarity (T,) of frames (T, H, W, C) to an estimate (H, W, C): the cosine of
    their channels, averaged over cells (equation 3, there a sum)."""
    frames, estimate = np.asarray(frames, np.float32), np.asarray(estimate, np.float32)
    products = (frames * estimate).sum(axis=-1)
    norms = np.linalg.norm(frames, axis=-1) * np.linalg.norm(estimate, axis=-1)
    return (products / np.maximum(norms, TINY)).mean(axis=(1, 2))


def sim_time(seconds: np.ndarray) -> np.ndarray:
    """Return the nearness of frames at a distance in seconds (equation 4)."""
    return np.exp(-np.square(seconds))


def rank(
    section: Section, schedule: Schedule, frames: np.ndarray, estimate: np.ndarray, fps: float
) -> list[int]:
    """Return the positions before a section, the most important one first; of equal ones, the
    nearest first.

    Args:
        frames: Latents (T, H, W, C) of the positions 0, 1, ... before the section.
        estimate: Estimate (H, W, C) of a frame of the section.
        fps: Latent frames a second.
    """
    positions = np.arange(len(frames))
    weight = sim_cos(frames, estimate)
    if schedule.nearness:
        middle = (section.targets[0] + section.targets[-1]) / 2
        weight = weight + schedule.nearness * sim_time((middle - positions) / fps)
    return sorted(positions.tolist(), key=lambda p: (-weight[p], -p))


def reorder(section: Section, schedule: Schedule, ranked: Sequence[int]) -> Section:
    """Return a section whose history has the `ranked` positions, the most important one in the
    place that is nearest to the section in order of time. Places beyond are MISSING."""
    ages = history_ages(schedule)
    order = [i for i, group in enumerate(ages) if max(group) != MISSING]
    groups, offset = list(section.groups), section.indices[0] - section.targets[0]
    for i in sorted(order, key=lambda i: -max(ages[i])):
        size = len(groups[i].reads)
        taken, ranked = sorted(ranked[:size]), ranked[size:]
        missing = size - len(taken)
        reads = (MISSING,) * missing + tuple(taken)
        indices = groups[i].indices[:missing] + tuple(p + offset for p in taken)
        groups[i] = dataclasses.replace(groups[i], reads=reads, indices=indices)
    return dataclasses.replace(section, groups=tuple(groups))


def by_importance(
    section: Section, schedule: Schedule, timeline: Timeline, estimate: np.ndarray, fps: float
) -> list[Section]:
    """Return the section of each sample of a timeline, its history ordered by importance to an
    estimate (B, H, W, C) of its frames. Raises ValueError if frames before it are not known."""
    before = timeline.view(range(section.targets[0]))
    return [
        reorder(section, schedule, rank(section, schedule, frames, one, fps))
        for frames, one in zip(before, estimate, strict=True)
    ]
