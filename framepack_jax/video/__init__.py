"""Images and videos in and out: photographs, PNG, mp4, contact sheets, previews.

Files appear whole or not at all: they are written under another name in the same folder and
renamed at the end. Frames on the host are uint8 RGB.
"""

from framepack_jax.video.colour import check_colours
from framepack_jax.video.contact_sheets import (
    PREVIEW_BIAS,
    PREVIEW_WEIGHT,
    contact_sheet,
    contact_sheet_mp4,
    labelled_sheet,
    latent_preview,
    preview_sheet,
    save_gif,
)
from framepack_jax.video.decode import (
    Info,
    count_frames,
    mp4_info,
    read_frames,
    read_frames_at,
    read_mp4,
    read_span,
)
from framepack_jax.video.images import (
    MAX_ASPECT,
    MIN_SIDE,
    load_image,
    resize_center_crop,
    save_png,
)
from framepack_jax.video.mp4 import (
    DEFAULT_CRF,
    check_encoding,
    fragment_mp4,
    join_mp4,
    read_tags,
    write_mp4,
)
from framepack_jax.video.orientation import shown_size
from framepack_jax.video.source import video_stream

__all__ = [
    "DEFAULT_CRF",
    "MAX_ASPECT",
    "MIN_SIDE",
    "PREVIEW_BIAS",
    "PREVIEW_WEIGHT",
    "Info",
    "check_colours",
    "check_encoding",
    "contact_sheet",
    "contact_sheet_mp4",
    "count_frames",
    "fragment_mp4",
    "join_mp4",
    "labelled_sheet",
    "latent_preview",
    "load_image",
    "mp4_info",
    "preview_sheet",
    "read_frames",
    "read_frames_at",
    "read_mp4",
    "read_span",
    "read_tags",
    "resize_center_crop",
    "save_gif",
    "save_png",
    "shown_size",
    "video_stream",
    "write_mp4",
]
