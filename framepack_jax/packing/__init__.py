"""The FramePack idea: which frames a section of video sees, how strongly compressed, and where.

schedule    the grammar of a packing schedule
sections    the plan: what every section writes and reads
timeline    latent frames at absolute positions, and the context gathered from them
tokens      seconds, frames, sections and tokens
buckets     canvas sizes
"""

from framepack_jax.packing.buckets import BUCKETS_480P, find_bucket
from framepack_jax.packing.schedule import (
    DEFAULT_CODEBOOK,
    RELEASED_F1,
    RELEASED_INVERTED,
    Context,
    Generate,
    Item,
    Schedule,
    ScheduleError,
    Segment,
    Skip,
    Tail,
    kernel_shape,
    parse,
)
from framepack_jax.packing.sections import (
    MAX_SECTIONS,
    MISSING,
    ORDERS,
    Group,
    Section,
    anchor_position,
    drop_context,
    history_ages,
    inverted_paddings,
    length,
    plan,
    span,
    start_frames,
)
from framepack_jax.packing.timeline import PackedContext, Timeline, read_context, read_target
from framepack_jax.packing.tokens import (
    context_tokens,
    frame_bound,
    frames_of,
    group_tokens,
    position_at,
    sections_for,
    target_tokens,
)

__all__ = [
    "BUCKETS_480P",
    "DEFAULT_CODEBOOK",
    "MAX_SECTIONS",
    "MISSING",
    "ORDERS",
    "RELEASED_F1",
    "RELEASED_INVERTED",
    "Context",
    "Generate",
    "Group",
    "Item",
    "PackedContext",
    "Schedule",
    "ScheduleError",
    "Section",
    "Segment",
    "Skip",
    "Tail",
    "Timeline",
    "anchor_position",
    "context_tokens",
    "drop_context",
    "find_bucket",
    "frame_bound",
    "frames_of",
    "group_tokens",
    "history_ages",
    "inverted_paddings",
    "kernel_shape",
    "length",
    "parse",
    "plan",
    "position_at",
    "read_context",
    "read_target",
    "sections_for",
    "span",
    "start_frames",
    "target_tokens",
]
