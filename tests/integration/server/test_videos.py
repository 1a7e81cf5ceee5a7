"""Videos by HTTP: create, wait, download, list and delete."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from framepack_jax import video
from framepack_jax.server.job import JOB
from framepack_jax.server.queue import JobQueue
from tests.fixtures.paths import ROOT
from tests.fixtures.serving import FIELDS, client_of, ended

PHOTO = ROOT / "examples" / "astronaut.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def client(model, folder):
    with client_of(folder, model) as client:
        yield client


@pytest.fixture(scope="module")
def made(client: TestClient) -> dict:
    """A completed video from an uploaded image."""
    files = {"input_reference": ("../../photo.jpg", PHOTO.read_bytes(), "image/jpeg")}
    answer = client.post("/v1/videos", data=FIELDS, files=files)
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] in ("queued", "in_progress")
    return ended(client, answer.json()["id"])


def test_a_completed_video_has_the_fields_of_the_api(made) -> None:
    assert made["status"] == "completed" and made["progress"] == 100 and made["error"] is None
    assert made["object"] == "video" and made["model"] == "random"
    assert (made["prompt"], made["seconds"], made["size"]) == ("she waves", "0.25", "64x64")
    assert made["completed_at"] >= made["created_at"] > 1.7e9


def test_content_is_the_video_of_the_run(client, made, folder, tmp_path) -> None:
    answer = client.get(f"/v1/videos/{made['id']}/content")
    assert answer.headers["content-type"] == "video/mp4"
    (tmp_path / "video.mp4").write_bytes(answer.content)
    info = video.mp4_info(tmp_path / "video.mp4")
    assert (info.frames, info.height, info.width) == (9, 64, 64)
    record = json.loads((folder / made["id"] / "run.json").read_text())
    assert record["flags"]["seed"] == 3 and record["status"] == "finished"
    sheet = client.get(f"/v1/videos/{made['id']}/content", params={"variant": "spritesheet"})
    assert Image.open(io.BytesIO(sheet.content)).format == "PNG"


def test_the_upload_is_the_first_frame_and_its_name_is_not_used(made, folder) -> None:
    start = video.load_image(folder / made["id"] / "inputs" / "image.png")
    expected = video.resize_center_crop(video.load_image(PHOTO), 64, 64)
    assert abs(start.astype(int) - expected).mean() < 1
    assert not list(folder.parent.glob("*photo*")) and not list(folder.rglob("*photo*"))


def test_end_image_and_key_frames(client, folder, tmp_path) -> None:
    red, blue = (png(tmp_path / f"{name}.png", colour) for name, colour in COLOURS.items())
    files = [("end_image", red), ("key_frame", blue), ("key_frame", red)]
    fields = FIELDS | {"seconds": "0.8", "key_frame_seconds": "0.5, 0.2"}
    made = ended(client, client.post("/v1/videos", data=fields, files=files).json()["id"])
    assert made["status"] == "completed", made
    inputs = folder / made["id"] / "inputs"
    assert json.loads((inputs.parent / "run.json").read_text())["key_frames"] == [0.2, 0.5]
    for name, colour in (("end_image", "red"), ("key_frame_00", "red"), ("key_frame_01", "blue")):
        near = abs(video.load_image(inputs / f"{name}.png")[32, 32].astype(int) - COLOURS[colour])
        assert near.max() <= 1, name


COLOURS = {"red": (200, 20, 20), "blue": (20, 20, 200)}


def png(path, colour) -> bytes:
    video.save_png(path, np.broadcast_to(np.uint8(colour), (64, 64, 3)))
    return path.read_bytes()


def test_a_video_is_continued_by_its_id_and_by_its_file(client, made, tmp_path) -> None:
    content = client.get(f"/v1/videos/{made['id']}/content").content
    plain = {name: value for name, value in FIELDS.items() if name != "size"}
    by_id = client.post("/v1/videos", json=plain | {"extends": made["id"]}).json()
    upload = {"input_reference": ("video.mp4", content)}
    by_file = client.post("/v1/videos", data=FIELDS, files=upload).json()
    (tmp_path / "before.mp4").write_bytes(content)
    before = video.read_mp4(tmp_path / "before.mp4")[0]
    for name in (by_id["id"], by_file["id"]):
        assert ended(client, name)["status"] == "completed"
        (tmp_path / "video.mp4").write_bytes(client.get(f"/v1/videos/{name}/content").content)
        frames = video.read_mp4(tmp_path / "video.mp4")[0]
        assert len(frames) == 9 + 8
        # The frames of the cross-fade change; those before are the old ones, encoded again.
        apart = [abs(frames[0].astype(int) - frame).mean() for frame in before]
        assert np.argmin(apart) == 0 and apart[0] < 5
    unknown = client.post("/v1/videos", json=plain | {"extends": "video_0"})
    assert unknown.status_code == 404


def test_a_failed_video_tells_why_and_the_next_is_sampled(client, model, monkeypatch) -> None:
    check = type(model).task
    monkeypatch.setattr(type(model), "task", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    first = ended(client, client.post("/v1/videos", data=FIELDS).json()["id"])
    monkeypatch.setattr(type(model), "task", check)
    assert first["status"] == "failed" and first["error"]["message"] == "no space"
    content = client.get(f"/v1/videos/{first['id']}/content")
    assert content.status_code == 400 and content.json()["error"]["code"] == "video_not_ready"
    second = client.post("/v1/videos", json=FIELDS | {"seed": 4}).json()
    assert ended(client, second["id"])["status"] == "completed"


def test_lists_have_pages_in_both_orders(model, tmp_path) -> None:
    queue = JobQueue(tmp_path, 10)
    names = [put(queue, finished=True) for _ in range(3)]
    with client_of(tmp_path, model) as client:
        page = client.get("/v1/videos", params={"limit": 2}).json()
        assert [video["id"] for video in page["data"]] == names[:0:-1] and page["has_more"]
        rest = client.get("/v1/videos", params={"after": page["last_id"]}).json()
        assert [video["id"] for video in rest["data"]] == names[:1] and not rest["has_more"]
        oldest = client.get("/v1/videos", params={"order": "asc"}).json()
        assert [video["id"] for video in oldest["data"]] == names


def test_a_deleted_video_and_its_files_are_gone(model, tmp_path) -> None:
    name = put(JobQueue(tmp_path, 10), finished=True)
    with client_of(tmp_path, model) as client:
        answer = client.delete(f"/v1/videos/{name}")
        assert answer.json() == {"id": name, "object": "video.deleted", "deleted": True}
        assert not list(tmp_path.glob("*video*"))
        again = client.delete(f"/v1/videos/{name}")
        assert again.status_code == 404 and again.json()["error"]["code"] == "not_found"


def test_a_new_queue_finds_jobs_in_order_and_removes_what_was_not_accepted(tmp_path) -> None:
    queue = JobQueue(tmp_path, 10)
    names = [put(queue) for _ in range(3)]
    (tmp_path / ".new_video_0").mkdir()
    damaged = tmp_path / names[1] / JOB
    damaged.write_text(damaged.read_text()[:50])
    again = JobQueue(tmp_path, 10)
    assert [job.id for job in again.waiting()] == [names[0], names[2]]
    assert not list(tmp_path.glob(".*"))


def put(queue: JobQueue, finished: bool = False) -> str:
    """Put a job into a queue that no worker samples; return its name."""
    from framepack_jax.server.job import Job

    with queue.new_folder() as folder:
        options = {"prompt": "she waves", "seed": 0, "height": 64, "width": 64, "seconds": 0.25}
        job = Job("", 0, "random", "0.25", "64x64", options)
        if finished:
            (folder / "run.json").write_text('{"status": "finished"}')
        queue.add(folder, job)
    return job.id
