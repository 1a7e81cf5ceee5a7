"""`run.json`: the record of a run, of the current and of earlier formats."""

import contextlib
import json
from typing import Any

from etils import epath

from framepack_jax.jobs.run_files import write_whole
from framepack_jax.jobs.spec import RECORD
from framepack_jax.parallel.multihost import on_primary

FORMAT = 2
# New names of flags in records of earlier formats.
RENAMED_FLAGS = {
    1: {"guidance": "distilled_guidance", "cfg": "cfg_scale", "threshold": "cache_threshold"}
}
# `offload` by the value of `memory` in records of format 1.
OFFLOAD = {"auto": "auto", "high": "none", "low": "full"}
REQUIRED = (
    "status",
    "flags",
    "bundle",
    "weights",
    "sections",
    "height",
    "width",
    "spans",
    "batch",
    "timings",
)


def read_record(folder: epath.Path) -> dict[str, Any]:
    """Read the record of a run, with the names of the current format. Raises ValueError if it is
    missing or damaged, or that of a training run."""
    if (folder / RECORD).exists() and (folder / "checkpoints").exists():
        raise ValueError(
            f"{folder} is a training run, which has no video; sample a video with its bundle"
            f" (framepack sample --bundle {folder / 'bundle'}), and give the folder of that"
        )
    try:
        return _upgraded(json.loads((folder / RECORD).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder} holds no run: it has no {RECORD}; give the --output folder of one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"run {folder}: {RECORD} cannot be read ({error}); put back a copy of it, or make"
            " the video again with --overwrite"
        ) from error


def _upgraded(record: dict[str, Any]) -> dict[str, Any]:
    """Bring a record to the current format. Raises ValueError if a field is missing."""
    version = record["format"]
    if version not in (*RENAMED_FLAGS, FORMAT):
        raise ValueError(f"its format is {version}, expected {FORMAT}")
    if missing := [name for name in REQUIRED if name not in record]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    names = RENAMED_FLAGS.get(version, {})
    flags = {names.get(name, name): value for name, value in record["flags"].items()}
    if "memory" in record:
        record["offload"] = OFFLOAD[record.pop("memory")]
    # The oldest records have no such flag.
    flags.setdefault("end_image_as", "still" if flags.get("end_image") else "auto")
    return record | {"format": FORMAT, "flags": flags}


def write_record(folder: epath.Path, record: dict[str, Any]) -> None:
    """Write the record of a run. Raises OSError."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_whole(folder / RECORD, text.encode())


def record_text(folder: epath.Path) -> str | None:
    """Return the record as it is written, None if there is none; the text changes if another
    process changes the run."""

    def read() -> str | None:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (folder / RECORD).read_text()
        return None

    return on_primary(read)
