"""What the controls of the page do: queue a video, show it, use its settings again."""

import html
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from framepack_jax import video
from framepack_jax.generation.prompts import timed_prompts
from framepack_jax.server import uploads
from framepack_jax.server.errors import ApiError
from framepack_jax.server.form import EXTENDS, make_job, steering_prompt
from framepack_jax.server.job import END, UPLOAD, Job
from framepack_jax.server.limits import Limits
from framepack_jax.server.model import ServedModel
from framepack_jax.server.queue import JobQueue
from framepack_jax.server.responses import video_body

AUTOMATIC = "automatic"
# Characters of a prompt in the list of videos.
SHOWN_PROMPT = 60
# Rows (seconds, prompt) of the table of prompts over time.
Rows = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Actions:
    """The actions of the page on one server."""

    model: ServedModel
    queue: JobQueue
    limits: Limits

    @property
    def sizes(self) -> list[str]:
        """Sizes to choose from: those of the server, or of the bundle, after the automatic one."""
        served = self.limits.sizes or [f"{w}x{h}" for h, w in self.model.pipe.buckets]
        return [*([] if self.limits.sizes else [AUTOMATIC]), *served]

    def create(self, values: Mapping[str, Any]) -> str:
        """Queue a video from the values of the controls by name; return its id.

        Raises ApiError, OSError.
        """
        self.queue.check_room()
        with self.queue.new_folder() as folder:
            fields = self._fields(values, folder)
            job = make_job(fields, folder, self.limits, self.model, self.queue)
            self.queue.add(folder, job)
        return job.id

    def _fields(self, values: Mapping[str, Any], folder: Path) -> dict[str, str]:
        """Return the fields of a request; copy its files into a folder."""
        fields = {name: plain(values[name]) for name in NUMBERS if values[name] is not None}
        fields["prompt"] = with_times(values["prompt"], values["prompts"])
        for name in ("negative_prompt", "step_cache"):
            if values[name]:
                fields[name] = values[name]
        if values["size"] and values["size"] != AUTOMATIC:
            fields["size"] = values["size"]
        files = [(UPLOAD, values["image"] or values["video"]), (END, values["end_image"])]
        files += [(uploads.KEY_FRAME, file) for file in values["key_frames"] or ()]
        if values["image"] and values["video"]:
            raise ApiError(400, "give a first frame or a video to continue, not both")
        for name, file in files:
            if file:
                shutil.copyfile(file, uploads.new_file(folder, name))
        if values["key_frames"]:
            fields[uploads.KEY_TIMES] = values["key_frame_seconds"] or ""
        if values["extends"]:
            fields[EXTENDS] = values["extends"]
        return fields

    def steer(self, name: str, prompt: str) -> None:
        """Give a video another prompt from its next section on. Raises ApiError, OSError."""
        self.queue.steer(self.queue.get(name), steering_prompt({"prompt": prompt}))

    def delete(self, name: str) -> None:
        """Delete a video; one in progress stops. Raises ApiError."""
        self.queue.delete(self.queue.get(name))

    def listed(self) -> list[tuple[str, str]]:
        """Return (label, id) of all videos, newest first."""
        return [(self._label(job), job.id) for job in reversed(self.queue.jobs())]

    def _label(self, job: Job) -> str:
        body = video_body(self.queue, job)
        prompt = timed_prompts(job.options["prompt"])[0][1]
        if len(prompt) > SHOWN_PROMPT:
            prompt = prompt[: SHOWN_PROMPT - 1] + "…"
        state = body["status"].replace("_", " ")
        return f"{prompt} · {job.seconds} s · {job.size} · seed {job.options['seed']} · {state}"

    def state(self, name: str | None) -> dict[str, Any] | None:
        """Return the `video` object of a video with its place in the queue, None if it is gone."""
        try:
            job = self.queue.get(name or "")
        except ApiError:
            return None
        waiting = [other.id for other in self.queue.waiting()]
        place = waiting.index(job.id) if job.id in waiting else 0
        return video_body(self.queue, job) | {"place": place}

    def settings(self, name: str) -> dict[str, Any]:
        """Return the values of the controls that made a video. Raises ApiError, ValueError."""
        job = self.queue.get(name)
        folder = self.queue.path(job)
        (_, prompt), *later = timed_prompts(job.options["prompt"])
        values = {name: job.options.get(name) for name in NUMBERS}
        values |= {
            "prompt": prompt,
            "prompts": [[seconds, text] for seconds, text in later],
            "negative_prompt": job.options.get("negative_prompt", ""),
            "step_cache": job.options.get("step_cache", "none"),
            "size": job.size,
            "seconds": float(job.seconds),
            "extends": job.extends,
            "key_frame_seconds": ", ".join(f"{seconds:g}" for _, seconds in job.key_frames),
        }
        for option, control in (("image", "image"), ("end_image", "end_image")):
            file = job.files.get(option)
            values[control] = None if file is None else _picture(folder / file)
        values["video"] = str(folder / UPLOAD) if "extend" in job.files else None
        values["key_frames"] = [str(folder / file) for file, _ in job.key_frames]
        return values


# Controls whose values are numbers, by the field of a request.
NUMBERS = (
    "seconds", "seed", "steps", "cfg_scale", "distilled_guidance", "cfg_rescale", "prompt_blend",
    "cache_threshold",
)  # fmt: skip


def plain(value: float) -> str:
    """Return a number as a text without an exponent; whole numbers have no point."""
    return str(int(value)) if float(value).is_integer() else f"{value:.10f}".rstrip("0")


def with_times(prompt: str, rows: Rows) -> str:
    """Return a prompt with those of later times: "0s: she waves 4s: she bows".

    Raises ApiError for a row without a time, or with one that is no number.
    """
    later = []
    for seconds, text in rows:
        if not str(text or "").strip():
            continue
        try:
            later.append((float(seconds), str(text).strip()))
        except (TypeError, ValueError):
            message = f"prompts over time: {seconds!r} before {text!r} is no number of seconds"
            raise ApiError(400, message, "prompt") from None
    if not later:
        return prompt
    times = "".join(f" {plain(seconds)}s: {text}" for seconds, text in later)
    return f"0s: {prompt}{times}"


def _picture(path: Path) -> np.ndarray:
    return video.load_image(path)


def progress_html(state: Mapping[str, Any] | None) -> str:
    """Return the state of a video: a bar, and the section in progress."""
    if state is None:
        return ""
    status, percent = state["status"], state["progress"]
    if status == "failed":
        return f'<p class="fp-error">failed: {html.escape(state["error"]["message"])}</p>'
    text = status.replace("_", " ")
    if status == "queued" and state["place"]:
        text += f", {state['place']} before it"
    if status == "in_progress":
        text += f", {percent} %"
    steered = "".join(f"<li>{html.escape(prompt)}</li>" for prompt in state["steering"])
    more = f"<p>prompts since:</p><ul>{steered}</ul>" if steered else ""
    if status == "completed":
        return f"<p>{text}</p>{more}"
    return f'<progress id="fp-bar" max="100" value="{percent}"></progress><p>{text}</p>{more}'


def preview_html(state: Mapping[str, Any] | None, exists: bool) -> str:
    """Return the picture of the section in progress, or the contact sheet."""
    if state is None or not exists:
        return ""
    name, complete = state["id"], state["status"] == "completed"
    label = "contact sheet" if complete else "section in progress"
    # Another address makes the browser load it again.
    version = 0 if complete else int(time.time())
    return f'<img id="fp-preview" alt="{label}" src="/v1/videos/{name}/preview?{version}">'


def player_html(state: Mapping[str, Any] | None) -> str:
    """Return the player: the frames so far while the video grows, then all."""
    if state is None or state["status"] in ("queued", "failed"):
        return ""
    name, complete = state["id"], state["status"] == "completed"
    source = f"/v1/videos/{name}/{'content' if complete else 'stream'}"
    loop = " loop" if complete else ""
    player = f'<video id="fp-video" controls autoplay muted playsinline{loop} src="{source}">'
    link = f'<p><a href="/v1/videos/{name}/content" download="{name}.mp4">Download</a></p>'
    return f"{player}</video>{link if complete else ''}"
