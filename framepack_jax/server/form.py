"""Read the request for a video: fields of a form or of JSON, and uploaded images and videos."""

import json
import math
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastapi import Request
from starlette.datastructures import UploadFile

from framepack_jax.generation.geometry import check_size
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.generation.request import check_seed
from framepack_jax.jobs.jobs_file import unique_keys
from framepack_jax.jobs.spec import RANDOM_SEED, Denoising
from framepack_jax.server import uploads
from framepack_jax.server.errors import ApiError
from framepack_jax.server.job import Job
from framepack_jax.server.limits import Limits, parse_size
from framepack_jax.server.model import ServedModel
from framepack_jax.server.queue import JobQueue
from framepack_jax.utils.flags import check_text

DEFAULT_SECONDS = "4"
STEP_CACHES = get_args(get_type_hints(Denoising)["step_cache"])
MAX_TEXT = 10_000
NUMBER = re.compile(r"-?\d{1,20}(\.\d{1,20})?")


async def read_fields(request: Request, folder: Path) -> dict[str, str]:
    """Return the fields of a request as texts; write its files into a folder.

    Raises ApiError for a body that is neither a form nor a JSON object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
        return json_fields(await request.body())
    # Starlette refuses parts above a megabyte that are no files, and other malformed forms.
    async with request.form(max_files=uploads.MAX_FILES, max_fields=32) as form:
        fields: dict[str, str] = {}
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                if name in fields:
                    raise ApiError(400, f"{name!r} is given twice", name)
                fields[name] = value
            else:
                with open(uploads.new_file(folder, name), "xb") as file:
                    shutil.copyfileobj(value.file, file)
    for name in uploads.NAMES:
        if name in fields:
            raise ApiError(400, f"{name} is text; upload a file", name)
    return fields


def json_fields(body: bytes) -> dict[str, str]:
    """Return the fields of a JSON object as texts. Raises ApiError for another body."""
    try:
        given = json.loads(body, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON ({error})") from error
    if not isinstance(given, dict):
        raise ApiError(400, "the body is no JSON object")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ApiError(400, f"{name!r}: expected a text or a number", name)
    return {name: str(value) for name, value in given.items()}


def steering_prompt(fields: dict[str, str]) -> str:
    """Return the prompt that a request steers a video with. Raises ApiError."""
    if set(fields) != {"prompt"}:
        raise ApiError(400, f"{sorted(fields)}: expected one field, prompt", "prompt")
    prompt = _parsed("prompt", fields, Limits())
    _check_prompt(prompt)
    return prompt


def _check_prompt(prompt: str) -> None:
    """Raise ApiError for a prompt without text, or with impossible times."""
    if not prompt.strip():
        raise ApiError(400, "prompt is missing: describe the video", "prompt")
    try:
        timed_prompts(prompt)
    except ValueError as error:
        raise ApiError(400, str(error), "prompt") from error


def make_job(
    fields: dict[str, str], folder: Path, limits: Limits, model: ServedModel, queue: JobQueue
) -> Job:
    """Check a request, whose files are in a folder, and return its job. Raises ApiError."""
    known = {"model", "size", "seconds", uploads.KEY_TIMES, EXTENDS, *OPTIONS}
    if unknown := [name for name in fields if name not in known]:
        raise ApiError(
            400,
            f"{unknown[0]!r} is not known; known are {', '.join(sorted(known))}, and the files"
            f" {', '.join(uploads.NAMES)}",
            unknown[0],
            "unknown_parameter",
        )
    if fields.get("model", model.name) != model.name:
        raise ApiError(
            400,
            f"model {fields['model']!r} is not served here; give {model.name!r} or none",
            "model",
            "model_not_found",
        )
    options = {name: _parsed(name, fields, limits) for name in OPTIONS if name in fields}
    _check_prompt(options.get("prompt", ""))
    seconds = fields.get("seconds", DEFAULT_SECONDS)
    options["seconds"] = _parsed("seconds", {"seconds": seconds}, limits)
    if options.get("seed", RANDOM_SEED) == RANDOM_SEED:
        options["seed"] = secrets.randbits(32)
    if size := fields.get("size", next(iter(limits.sizes), None)):
        options["width"], options["height"] = _size(size, limits, model.max_pixels)
    job = Job("", 0, model.name, seconds, "", options, uploads.files_of(folder))
    job.key_frames = uploads.key_frames(folder, fields.get(uploads.KEY_TIMES))
    job.extends = _extended(fields, queue)
    try:
        layout = model.check(job.spec(folder))
    except ValueError as error:
        text = str(error).replace(f"{folder}/", "").replace(f"{folder.parent}/", "")
        named = next((name for name in uploads.NAMES if name in text), None)
        raise ApiError(400, text, named) from error
    if layout.kept > limits.max_seconds * layout.fps:
        raise ApiError(
            400, f"the video to continue has more than {limits.max_seconds:g} s, which is the limit"
        )
    job.size = f"{layout.width}x{layout.height}"
    return job


def _extended(fields: dict[str, str], queue: JobQueue) -> str | None:
    """Return the id of the completed video that a request continues. Raises ApiError."""
    if EXTENDS not in fields:
        return None
    job = queue.get(fields[EXTENDS])
    if not job.finished:
        raise ApiError(
            400, f"video {job.id} is not completed; continue it once it is", EXTENDS,
            "video_not_ready",
        )  # fmt: skip
    return job.id


def _text(text: str, _: Limits) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{len(text)} characters, at most {MAX_TEXT} are allowed")
    check_text("text", text)
    return text


def _step_cache(text: str, _: Limits) -> str:
    if text not in STEP_CACHES:
        raise ValueError(f"{text[:40]!r}: expected one of {', '.join(STEP_CACHES)}")
    return text


def _number(text: str, _: Limits) -> float:
    if not NUMBER.fullmatch(text) or not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]!r}: expected a number")
    return value


def _integer(text: str, limits: Limits) -> int:
    _number(text, limits)
    return int(text)


def _seconds(text: str, limits: Limits) -> float:
    value = _number(text, limits)
    if not 0 < value <= limits.max_seconds:
        raise ValueError(f"{text}: expected more than 0, at most {limits.max_seconds:g}")
    return value


def _steps(text: str, limits: Limits) -> int:
    value = _integer(text, limits)
    if not 1 <= value <= limits.max_steps:
        raise ValueError(f"{text}: expected 1 to {limits.max_steps}")
    return value


def _seed(text: str, limits: Limits) -> int:
    value = _integer(text, limits)
    if value != RANDOM_SEED:
        check_seed(value)
    return value


# Fields of a request that are options of a video, with their parsers.
OPTIONS: dict[str, Callable[[str, Limits], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "seconds": _seconds,
    "seed": _seed,
    "steps": _steps,
    "distilled_guidance": _number,
    "cfg_scale": _number,
    "cfg_rescale": _number,
    "flow_shift": _number,
    "prompt_blend": _number,
    "step_cache": _step_cache,
    "cache_threshold": _number,
}
# The id of a video of this server to continue.
EXTENDS = "extends"


def _parsed(name: str, fields: dict[str, str], limits: Limits) -> Any:
    try:
        return OPTIONS[name](fields[name], limits)
    except ValueError as error:
        raise ApiError(400, f"{name}: {error}", name) from error


def _size(text: str, limits: Limits, max_pixels: int) -> tuple[int, int]:
    """Parse WIDTHxHEIGHT. Raises ApiError."""
    try:
        width, height = parse_size(text)
    except ValueError as error:
        raise ApiError(400, f"size {error}", "size") from error
    if limits.sizes and text not in limits.sizes:
        raise ApiError(400, f"size {text}: expected one of {', '.join(limits.sizes)}", "size")
    if width * height > max_pixels:
        raise ApiError(
            400, f"size {text} has more than {max_pixels} pixels, which is the limit", "size"
        )
    try:
        check_size(height, width)
    except ValueError as error:
        raise ApiError(400, f"size {text}: {error}", "size") from error
    return width, height
