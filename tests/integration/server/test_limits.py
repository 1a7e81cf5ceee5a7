"""Requests and flags that the server refuses, each with a 4xx or one line."""

import asyncio
import io
import itertools
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from framepack_jax.cli import serve
from framepack_jax.server.queue import locked
from tests.fixtures.serving import FIELDS, idle_client_of

UPLOAD = "input_reference"


@pytest.fixture(scope="module")
def client(model, tmp_path_factory) -> TestClient:
    return idle_client_of(
        tmp_path_factory.mktemp("served"), model, max_seconds=2, max_steps=5, max_upload_mb=0.3
    )


def image_bytes(width: int, height: int, format: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(data, format)
    return data.getvalue()


def bomb() -> bytes:
    """A PNG whose header says 280 million pixels."""
    data = bytearray(image_bytes(64, 64))
    data[16:24] = struct.pack(">II", 20_000, 14_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def refused(answer, status: int = 400) -> dict:
    """Return the error of an answer, which has OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt is missing"),
        ({"prompt": "x" * 10_001}, "at most 10000 are allowed"),
        ({"prompt": "a\0b"}, "it has a NUL"),
        ({"prompt": "2s: she waves 1s: she bows"}, "prompt"),
        ({"size": "64"}, "expected WIDTHxHEIGHT"),
        ({"size": "64x64x64"}, "expected WIDTHxHEIGHT"),
        ({"size": "63x64"}, "expected an even number"),
        ({"size": "0x0"}, "expected an even number"),
        ({"size": "1280x720"}, "more than 16384 pixels"),
        ({"seconds": "2.1"}, "at most 2"),
        ({"seconds": "0"}, "more than 0"),
        ({"seconds": "nan"}, "expected a number"),
        ({"seconds": "1e9"}, "expected a number"),
        ({"seconds": "9" * 400}, "expected a number"),
        ({"steps": "6"}, "expected 1 to 5"),
        ({"steps": "1.5"}, "invalid literal"),
        ({"seed": "-2"}, "seed"),
        ({"seed": str(2**64)}, "seed"),
        ({"cfg_scale": "inf"}, "expected a number"),
        ({"model": "sora-2"}, "not served here"),
        ({"extend": "/etc/passwd"}, "'extend' is not known"),
        ({"image": "/etc/passwd"}, "'image' is not known"),
        ({"extends": "../secret"}, "'../secret' does not exist"),
        ({"step_cache": "fast"}, "'fast': expected one of none, tea, first-block"),
        ({"cache_threshold": "0.1"}, "needs --step-cache"),
        ({"key_frame_seconds": "1"}, "expected the seconds of 0 files"),
        ({"end_image": "/etc/passwd"}, "upload a file"),
        ({UPLOAD: "/etc/passwd"}, "upload a file"),
    ],
)
def test_wrong_fields(client, changes, message) -> None:
    # A form even without a file, as OpenAI's client sends.
    parts = {name: (None, text) for name, text in (FIELDS | changes).items()}
    status = 404 if "extends" in changes else 400
    assert message in refused(client.post("/v1/videos", files=parts), status)["message"]


@pytest.mark.parametrize(
    "body", ["{", "[]", '{"prompt": ["x"]}', '{"prompt": true}', '{"a": 1, "a": 2}', "[" * 10_000]
)
def test_wrong_json(client, body) -> None:
    headers = {"content-type": "application/json"}
    refused(client.post("/v1/videos", content=body, headers=headers))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no PNG, JPEG, WebP, mp4, WebM file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "no PNG, JPEG, WebP"),
        (image_bytes(64, 64, "BMP"), "no PNG, JPEG, WebP"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "no PNG, JPEG, WebP"),
        (b"\0\0\0\x20ftypisom" + bytes(64), "cannot be read"),
        (image_bytes(64, 64)[:60], "input_reference"),
        (image_bytes(8, 64), "at least 16 pixels"),
        (bomb(), "million pixels"),
    ],
    ids=["empty", "postscript", "bitmap", "playlist", "video", "cut", "narrow", "bomb"],
)
def test_wrong_images(client, data, message) -> None:
    files = {UPLOAD: ("photo.png", data)}
    error = refused(client.post("/v1/videos", data=FIELDS, files=files))
    assert message in error["message"] and error["param"] == UPLOAD
    assert "/" not in error["message"].replace("width x height", "")


def test_a_large_request_is_refused_while_it_is_read(client) -> None:
    size = 1_000_000
    files = {UPLOAD: ("photo.png", b"\0" * size)}
    assert refused(client.post("/v1/videos", data=FIELDS, files=files), 413)
    parts = itertools.chain(
        [b'--b\r\nContent-Disposition: form-data; name="input_reference"; filename="x"\r\n\r\n'],
        itertools.repeat(b"\0" * 10_000),
    )
    answers = []

    async def receive() -> dict:
        return {"type": "http.request", "body": next(parts), "more_body": True}

    async def send(message: dict) -> None:
        answers.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=b")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/videos", "headers": headers,
        "query_string": b"",
    }  # fmt: skip
    # The body has no end.
    asyncio.run(client.app(scope, receive, send))
    assert answers[0]["status"] == 413 and b"request_too_large" in answers[1]["body"]


def test_malformed_forms(client) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=b", "text/plain"):
        refused(client.post("/v1/videos", content=b"x", headers={"content-type": kind}))
    files = [("prompt", ("a", b"x")), (UPLOAD, ("b", b"x"))]
    refused(client.post("/v1/videos", files=files))
    refused(client.post("/v1/videos", files=[("prompt", (None, "a")), ("prompt", (None, "b"))]))


@pytest.mark.parametrize("name", ["..", "../..", "%2e%2e", "..%2f..%2fetc", "video_0", "a\\..\\b"])
def test_ids_are_names_of_jobs_only(client, name) -> None:
    for path in (name, f"{name}/content", f"{name}/preview", f"{name}/events"):
        assert client.get(f"/v1/videos/{path}").status_code in (404, 405)
    assert client.delete(f"/v1/videos/{name}").status_code in (404, 405)


def test_lists_have_bounds(client) -> None:
    for wrong in ({"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"order": "up"}):
        refused(client.get("/v1/videos", params=wrong))
    refused(client.get("/v1/videos", params={"after": "video_0"}), 404)


def test_refused_requests_leave_no_files(model, tmp_path) -> None:
    client = idle_client_of(tmp_path, model)
    refused(client.post("/v1/videos", data=FIELDS, files={UPLOAD: ("a.png", b"x")}))
    assert not list(tmp_path.iterdir())


def test_a_full_queue_refuses_with_429(model, tmp_path) -> None:
    client = idle_client_of(tmp_path, model, max_queue=2)
    names = [client.post("/v1/videos", json=FIELDS).json()["id"] for _ in range(2)]
    answer = client.post("/v1/videos", json=FIELDS)
    assert refused(answer, 429)["code"] == "queue_full" and answer.headers["retry-after"]
    client.delete(f"/v1/videos/{names[0]}")
    assert client.post("/v1/videos", json=FIELDS).status_code == 200


def test_only_listed_sizes_are_served(model, tmp_path) -> None:
    client = idle_client_of(tmp_path, model, sizes=("64x80", "64x64"))
    plain = {name: value for name, value in FIELDS.items() if name != "size"}
    assert client.post("/v1/videos", json=plain).json()["size"] == "64x80"
    assert client.post("/v1/videos", json=plain | {"size": "64x64"}).json()["size"] == "64x64"
    error = refused(client.post("/v1/videos", json=plain | {"size": "96x64"}))
    assert error["message"] == "size 96x64: expected one of 64x80, 64x64"


def test_a_token_is_needed_for_all_but_health(model, tmp_path) -> None:
    client = idle_client_of(tmp_path, model, token="secret")
    assert client.get("/health").json() == {"status": "ok"}
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        error = refused(client.get("/v1/videos", headers=header), 401)
        assert error["code"] == "invalid_api_key"
        refused(client.post("/v1/videos", json=FIELDS, headers=header), 401)
    assert client.get("/v1/videos", headers={"authorization": "Bearer secret"}).is_success


@pytest.mark.parametrize(
    "header", [{"host": "evil.example:8000"}, {"origin": "http://evil.example"}, {"origin": "null"}]
)
def test_without_a_token_pages_of_other_sites_are_refused(client, header) -> None:
    refused(client.get("/v1/videos", headers=header), 403)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "needs a token"),
        (["--host", "::"], "needs a token"),
        (["--host", "127.0.0.1", "--token", ""], "the token is empty"),
        (["--port", "99999"], "cannot be served"),
        (["--max-queue", "0"], "expected more than 0"),
        (["--sizes", "64x64", "64by64"], "--sizes '64by64': expected WIDTHxHEIGHT"),
        (["--sizes", "640x640", "--max-pixels", "4096"], "--sizes 640x640 has more than"),
        (["--batch", "0"], "--batch 0: expected 1 or more"),
        (["--bundle", "nothing"], "nothing"),
    ],
)
def test_wrong_flags_end_before_the_bundle_is_loaded(tmp_path, monkeypatch, flags, message) -> None:
    monkeypatch.delenv("FRAMEPACK_TOKEN", raising=False)
    given = ["--bundle", "random", "--output", str(tmp_path), "--port", "0", *flags]
    with monkeypatch.context() as patched:
        patched.setattr("framepack_jax.generation.pipeline.FramePack.with_weights", None)
        with pytest.raises(SystemExit, match=message):
            serve.main(given)


def test_a_folder_has_one_server(tmp_path) -> None:
    with locked(tmp_path), pytest.raises(SystemExit, match="in use by another server"):
        serve.main(["--bundle", "random", "--output", str(tmp_path), "--port", "0"])


def test_a_missing_package_is_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match=r'uvicorn .*pip install "framepack-jax\[serve\]"'):
        serve.main(["--bundle", "random", "--output", str(tmp_path)])
