"""A video while it is sampled: progress, events, preview, cancel."""

import json

from tests.fixtures.serving import FIELDS, client_of, ended, wait_for

LONG = FIELDS | {"seconds": "1", "steps": "8"}


def test_progress_comes_as_events(model, tmp_path) -> None:
    with client_of(tmp_path, model) as client:
        name = client.post("/v1/videos", json=LONG).json()["id"]
        text = client.get(f"/v1/videos/{name}/events").text
        assert client.get(f"/v1/videos/{name}/preview").headers["content-type"] == "image/png"
    events = [event.split("\n") for event in text.strip().split("\n\n")]
    assert {lines[0] for lines in events} == {"event: video"}
    videos = [json.loads(lines[1].removeprefix("data: ")) for lines in events]
    assert videos[-1]["status"] == "completed"
    progress = [video["progress"] for video in videos]
    assert progress == sorted(progress) and progress[-1] == 100
    assert any(0 < percent < 100 for percent in progress)


def test_a_deleted_video_stops_and_the_next_begins(model, tmp_path) -> None:
    with client_of(tmp_path, model) as client:
        long = LONG | {"seconds": "8", "steps": "50"}
        name = client.post("/v1/videos", json=long).json()["id"]
        wait_for(lambda: client.get(f"/v1/videos/{name}").json()["progress"] > 0)
        assert client.get(f"/v1/videos/{name}").json()["status"] == "in_progress"
        assert client.delete(f"/v1/videos/{name}").json()["deleted"]
        assert client.get(f"/v1/videos/{name}").status_code == 404
        wait_for(lambda: not list(tmp_path.glob("*video*")), 60)
        after = client.post("/v1/videos", json=FIELDS).json()["id"]
        assert ended(client, after)["status"] == "completed"


def test_a_server_that_ends_keeps_the_running_video(model, tmp_path) -> None:
    with client_of(tmp_path, model) as client:
        name = client.post("/v1/videos", json=LONG | {"seconds": "8", "steps": "50"}).json()["id"]
        wait_for(lambda: client.get(f"/v1/videos/{name}").json()["progress"] > 0)
    assert json.loads((tmp_path / name / "run.json").read_text())["status"] == "interrupted"
    assert json.loads((tmp_path / name / "job.json").read_text())["error"] is None
