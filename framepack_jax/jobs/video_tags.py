"""Tags of `video.mp4`: the settings that made a video, for whoever has the file alone.

The title is the prompt; the comment is JSON, which `framepack inspect FILE.mp4` shows. Of paths,
only the last name is written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framepack_jax import video
from framepack_jax.utils.versions import version

PROGRAM = "framepack-jax"
# Flags of a record that name files, and those that concern one machine.
FILES = ("image", "end_image", "extend", "bundle")
LEFT_OUT = ("vae_tile", "mesh", "gif", "png")


def tags(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of the video of a run."""
    flags = record["flags"]
    settings: dict[str, Any] = {"program": f"{PROGRAM} {version(PROGRAM)}"}
    settings |= {name: value for name, value in flags.items() if name not in LEFT_OUT}
    settings |= {name: Path(flags[name]).name for name in FILES if flags.get(name)}
    settings["lora"] = [Path(text).name for text in flags.get("lora", ())]
    settings["key_frame"] = [
        f"{text.partition('=')[0]}={Path(text.partition('=')[2]).name}"
        for text in flags.get("key_frame", ())
    ]
    transformer = record["weights"].get("transformer", {})
    settings |= {
        "schedule": record.get("schedule"),
        "weights": transformer.get("sha256"),
        "steered": record.get("steered"),
        "width": record["width"],
        "height": record["height"],
        "sections": record["sections"],
    }
    kept = {
        k: v for k, v in settings.items() if v not in ("", []) and v is not None and v is not False
    }
    return {"title": flags["prompt"], "comment": json.dumps(kept, ensure_ascii=False)}


def describe(path: Path) -> str:
    """Return the settings in a video of this package, one in a line. Raises ValueError if the file
    is no video, or has no settings."""
    comment = video.read_tags(path).get("comment", "")
    if not comment.startswith(f'{{"program": "{PROGRAM}'):
        raise ValueError(f"video {path} has no settings of {PROGRAM} in its comment")
    settings = json.loads(comment)
    width = max(map(len, settings))
    rows = (f"  {name:{width}}  {_shown(value)}" for name, value in settings.items())
    return "\n".join([str(path), *rows])


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
