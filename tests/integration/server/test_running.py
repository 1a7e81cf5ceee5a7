"""A video while it is sampled: progress, events, preview, stream, prompts, batches, cancel."""

import dataclasses
import json

import numpy as np

from framepack_jax import video
from tests.fixtures.serving import FIELDS, client_of, ended, idle_client_of, wait_for

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


def test_a_stream_holds_the_frames_of_the_video(model, tmp_path) -> None:
    with client_of(tmp_path / "served", model) as client:
        name = client.post("/v1/videos", json=LONG | {"seed": "5"}).json()["id"]
        streamed = client.get(f"/v1/videos/{name}/stream")
        assert streamed.headers["content-type"] == "video/mp4"
        assert client.get(f"/v1/videos/{name}").json()["status"] == "completed"
        assert client.get(f"/v1/videos/{name}/stream").content == streamed.content
        whole = client.get(f"/v1/videos/{name}/content").content
    for file, data in (("stream.mp4", streamed.content), ("whole.mp4", whole)):
        (tmp_path / file).write_bytes(data)
    came, made = (video.read_mp4(tmp_path / file)[0] for file in ("stream.mp4", "whole.mp4"))
    np.testing.assert_array_equal(came, made)


def test_a_prompt_steers_the_video_in_progress(model, tmp_path) -> None:
    with client_of(tmp_path, model) as client:
        name = client.post("/v1/videos", json=LONG | {"steps": "30"}).json()["id"]
        wait_for(lambda: client.get(f"/v1/videos/{name}").json()["progress"] > 0)
        answer = client.post(f"/v1/videos/{name}/steer", json={"prompt": "she bows"})
        assert answer.status_code == 200 and answer.json()["steering"] == ["she bows"]
        for body, message in (
            ({"prompt": " "}, "prompt is missing"),
            ({"prompt": "0s: a 0s: b"}, "must begin with 0s and rise"),
            ({"prompt": "a", "seed": 3}, "expected one field"),
            ({}, "expected one field"),
        ):
            refused = client.post(f"/v1/videos/{name}/steer", json=body)
            assert refused.status_code == 400 and message in refused.json()["error"]["message"]
        assert ended(client, name)["status"] == "completed"
        late = client.post(f"/v1/videos/{name}/steer", json={"prompt": "she bows"})
        assert late.status_code == 400 and late.json()["error"]["code"] == "video_ended"
    record = json.loads((tmp_path / name / "run.json").read_text())
    assert record["flags"]["prompt"] == "she waves"
    ((section, prompt),) = record["steered"]
    assert prompt == "she bows" and 1 <= section < record["sections"]


def test_waiting_videos_of_equal_size_are_one_batch(model, tmp_path) -> None:
    """One of another size is not among them, nor more than the batch holds."""
    batched = dataclasses.replace(model, batch=2)
    with idle_client_of(tmp_path, batched) as client:
        sizes = ["64x64", "64x80", "64x64", "64x64"]
        names = [
            client.post("/v1/videos", json=FIELDS | {"size": size, "seed": i}).json()["id"]
            for i, size in enumerate(sizes)
        ]
    with client_of(tmp_path, batched) as client:
        assert [ended(client, name)["status"] for name in names] == ["completed"] * 4
        done = [json.loads((tmp_path / name / "run.json").read_text()) for name in names]
    assert [record["batch"] for record in done] == [
        [names[0], names[2]], [names[1]], [names[0], names[2]], [names[3]],
    ]  # fmt: skip


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
