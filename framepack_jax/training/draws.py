"""Numbers that are folded into keys, one for each random draw of a run.

The key of the seed and the number of a sample (below 2^31, see `data.holdout`) make the key of the
sample, and that key and a `Draw` the key of a draw. Draws of no sample have a domain, above all
numbers of samples, in the place of the number.
"""

import enum

WEIGHTS, ADAPTERS, LEVELS = (2**32 - n for n in (1, 2, 3))
"""Domains: random weights, random adapters, noise levels of a batch."""


@enum.unique
class Draw(enum.IntEnum):
    """Draws of a sample. Runs that resume rely on the numbers."""

    NOISE = 0
    TIME = 1
    SAMPLE_NOISE = 2
    SAMPLE_LEVEL = 3
    GUIDANCE = 4
    DROP_ALL = 16
    DROP_OLDEST = 17
    OLDEST = 18
    CLEAN = 19
    FRAME_LEVEL = 20
    FRAME_NOISE = 21
    DROP_HISTORY = 22
    DROP_START = 23
    NOISY_FACTOR = 24
    NOISY_NOISE = 25
    ANCHOR_LEVEL = 26
    ANCHOR_NOISE = 27
    RESAMPLE = 28
    RESAMPLE_SCALE = 29
    ROLLOUT_LEVEL = 30
    ROLLOUT_NOISE = 31
