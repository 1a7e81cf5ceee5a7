"""Routes of the server, in the form of OpenAI's videos API."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from framepack_jax.server.errors import ApiError
from framepack_jax.server.events import video_events
from framepack_jax.server.form import json_fields, make_job, read_fields, steering_prompt
from framepack_jax.server.guard import Guard
from framepack_jax.server.job import Job
from framepack_jax.server.limits import Limits
from framepack_jax.server.login import add_login
from framepack_jax.server.model import ServedModel
from framepack_jax.server.queue import JobQueue
from framepack_jax.server.responses import deleted_body, list_body, video_body
from framepack_jax.server.stream import video_pieces
from framepack_jax.server.worker import Worker

logger = logging.getLogger(__name__)
MAX_PAGE = 100
NOT_CACHED = {"Cache-Control": "no-store"}
VARIANTS = {"video": ("video.mp4", "video/mp4"), "spritesheet": ("preview.png", "image/png")}


def create_app(
    model: ServedModel, queue: JobQueue, worker: Worker, limits: Limits, token: str | None
) -> FastAPI:
    """Return the application; the worker runs while it does."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(worker.stop)

    # The pages of FastAPI load scripts from other hosts.
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    body = functools.partial(video_body, queue)
    _add_errors(app)
    _add_create(app, model, queue, limits, body)
    _add_read(app, queue, body)
    if token is not None:
        add_login(app, token)
    app.add_middleware(Guard, token=token, max_bytes=limits.upload_bytes)
    return app


def _add_create(
    app: FastAPI, model: ServedModel, queue: JobQueue, limits: Limits, body: Any
) -> None:
    # One image is decoded at a time: a large one takes a gigabyte.
    decoding = asyncio.Lock()

    @app.post("/v1/videos")
    async def create(request: Request) -> dict[str, Any]:
        queue.check_room()
        with queue.new_folder() as folder:
            fields = await read_fields(request, folder)
            async with decoding:
                job = await run_in_threadpool(make_job, fields, folder, limits, model, queue)
            queue.add(folder, job)
        return body(job)


def _add_read(app: FastAPI, queue: JobQueue, body: Any) -> None:
    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/videos")
    def list_videos(
        after: str | None = None, limit: int = 20, order: Literal["asc", "desc"] = "desc"
    ) -> dict[str, Any]:
        if not 1 <= limit <= MAX_PAGE:
            raise ApiError(400, f"limit = {limit}: expected 1 to {MAX_PAGE}", "limit")
        jobs = queue.jobs() if order == "asc" else queue.jobs()[::-1]
        start = 0 if after is None else 1 + jobs.index(queue.get(after))
        page = jobs[start : start + limit]
        return list_body([body(job) for job in page], start + limit < len(jobs))

    @app.get("/v1/videos/{video_id}")
    def retrieve(video_id: str) -> dict[str, Any]:
        return body(queue.get(video_id))

    @app.post("/v1/videos/{video_id}/steer")
    async def steer(video_id: str, request: Request) -> dict[str, Any]:
        job = queue.get(video_id)
        prompt = steering_prompt(json_fields(await request.body()))
        await run_in_threadpool(queue.steer, job, prompt)
        return body(job)

    @app.delete("/v1/videos/{video_id}")
    def delete(video_id: str) -> dict[str, Any]:
        job = queue.get(video_id)
        queue.delete(job)
        return deleted_body(job)

    @app.get("/v1/videos/{video_id}/content")
    def content(video_id: str, variant: str = "video") -> FileResponse:
        return _file(queue, queue.get(video_id), variant)

    @app.get("/v1/videos/{video_id}/events")
    async def events(video_id: str) -> StreamingResponse:
        job = queue.get(video_id)
        stream = video_events(job, functools.partial(body, job))
        return StreamingResponse(stream, media_type="text/event-stream", headers=NOT_CACHED)

    @app.get("/v1/videos/{video_id}/stream")
    async def stream(video_id: str) -> StreamingResponse:
        job = queue.get(video_id)
        pieces = video_pieces(job, queue.path(job))
        return StreamingResponse(pieces, media_type="video/mp4", headers=NOT_CACHED)

    @app.get("/v1/videos/{video_id}/preview")
    def preview(video_id: str) -> FileResponse:
        path = queue.path(queue.get(video_id)) / "preview.png"
        if not path.exists():
            raise ApiError(404, f"video {video_id} has no preview yet", code="not_found")
        return FileResponse(path, media_type="image/png", headers=NOT_CACHED)


def _file(queue: JobQueue, job: Job, variant: str) -> FileResponse:
    """Return a file of a complete video. Raises ApiError."""
    if variant not in VARIANTS:
        raise ApiError(
            400, f"variant {variant!r}: expected one of {', '.join(VARIANTS)}", "variant"
        )
    if not job.finished:
        raise ApiError(
            400,
            f"video {job.id} has no content yet; wait for the status completed",
            code="video_not_ready",
        )
    name, media = VARIANTS[variant]
    path = queue.path(job) / name
    if not path.exists():
        raise ApiError(404, f"{name} of video {job.id} was removed from the disk", code="not_found")
    return FileResponse(path, media_type=media, filename=f"{job.id}{path.suffix}")


def _add_errors(app: FastAPI) -> None:
    """Answer every error in the form of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        headers = {"Retry-After": "10"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        refused = ApiError(error.status_code, str(error.detail))
        return JSONResponse(refused.body(), refused.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return JSONResponse(ApiError(400, f"{name}: {first['msg']}", name).body(), 400)

    @app.exception_handler(OSError)
    async def disk(_: Request, error: OSError) -> JSONResponse:
        logger.error("error: %s", error)
        message = "the server cannot write the video; its log has details"
        return JSONResponse(ApiError(500, message, code="server_error").body(), 500)
