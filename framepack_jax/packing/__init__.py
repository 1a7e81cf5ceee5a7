"""The FramePack idea: which frames a section of video sees, how strongly compressed, and where.

kernels     names and shapes of context kernels
schedule    the grammar of a packing schedule
form        the forms of schedules that can be sampled
orders      what the passes of each order make and read
sections    the plan: what every section writes and reads
importance  history by similarity to the section instead of by time
timeline    latent frames at absolute positions, and the context gathered from them
tokens      seconds, frames, sections and tokens
codebook    discretized history
buckets     canvas sizes

A group of n frames of h x w latents under a kernel (t, h', w') is ceil(n/t) ceil(h/h') ceil(w/w')
tokens. A tail tc is one frame. A tail ta of n frames, pooled by p = `TAIL_POOL`, is
ceil(n/t) ceil(ceil(h/p)/h') ceil(ceil(w/p)/w') tokens, of at most `TAIL_FRAMES` frames; no token
reads those of frames that are not there yet.
"""

from framepack_jax.packing.buckets import BUCKETS_480P, find_bucket
from framepack_jax.packing.codebook import discretize
from framepack_jax.packing.importance import by_importance
from framepack_jax.packing.kernels import (
    TAIL_POOL,
    ScheduleError,
    embedding_kernel,
    kernel_shape,
    tail_of,
)
from framepack_jax.packing.orders import MISSING, TAIL_FRAMES, Group, inverted_paddings
from framepack_jax.packing.schedule import (
    DEFAULT_CODEBOOK,
    ORDERS,
    RELEASED_F1,
    RELEASED_INVERTED,
    Context,
    Generate,
    Item,
    Schedule,
    Segment,
    Skip,
    Tail,
    parse,
)
from framepack_jax.packing.sections import (
    MAX_SECTIONS,
    Range,
    Section,
    anchor_position,
    drop_context,
    given_frames,
    history_ages,
    length,
    pass_frames,
    plan,
    reads_far_back,
    reads_nearby,
    span,
    start_frames,
    without_history,
)
from framepack_jax.packing.timeline import (
    PackedContext,
    Timeline,
    read_context,
    read_each,
    read_target,
)
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
    "TAIL_FRAMES",
    "TAIL_POOL",
    "Context",
    "Generate",
    "Group",
    "Item",
    "PackedContext",
    "Range",
    "Schedule",
    "ScheduleError",
    "Section",
    "Segment",
    "Skip",
    "Tail",
    "Timeline",
    "anchor_position",
    "by_importance",
    "context_tokens",
    "discretize",
    "drop_context",
    "embedding_kernel",
    "find_bucket",
    "frame_bound",
    "frames_of",
    "given_frames",
    "group_tokens",
    "history_ages",
    "inverted_paddings",
    "kernel_shape",
    "length",
    "parse",
    "pass_frames",
    "plan",
    "position_at",
    "read_context",
    "read_each",
    "read_target",
    "reads_far_back",
    "reads_nearby",
    "sections_for",
    "span",
    "start_frames",
    "tail_of",
    "target_tokens",
    "without_history",
]
