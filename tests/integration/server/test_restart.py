"""A server in its own process, used by OpenAI's client and killed in the middle of a job."""

import json
import warnings

import httpx
import numpy as np
import openai
import pytest

from framepack_jax import video
from tests.fixtures.serving import SECTION, server_process, wait_for

warnings.filterwarnings("ignore", category=DeprecationWarning)


def client_of(address: str, token: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=address, api_key=token, max_retries=0)


def test_a_killed_server_goes_on_with_its_queue(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FRAMEPACK_TOKEN", "secret")
    output = tmp_path / "served"
    with server_process(output) as (process, address):
        videos = client_of(address, "secret").videos
        with pytest.raises(openai.AuthenticationError):
            client_of(address, "wrong").videos.list()
        with pytest.raises(openai.BadRequestError, match="expected WIDTHxHEIGHT"):
            videos.create(prompt="she waves", size="wide")
        options = {"steps": 6, "seed": 3}
        seconds = str(round(4 * SECTION, 2))
        first, second = (
            videos.create(prompt=text, size="64x64", seconds=seconds, extra_body=options)
            for text in ("she waves", "she bows")
        )
        assert (first.status, first.size) != ("completed", "1280x720")
        latents = output / first.id / "latents"
        wait_for((latents / "section_000.npz").exists)
        process.kill()
        process.wait()
        kept = {file.name: file.stat().st_mtime_ns for file in latents.glob("section_*.npz")}
        assert len(kept) < 4, "the video was complete before the server was killed"
    with server_process(output) as (_, address):
        videos = client_of(address, "secret").videos
        # The beginning can be seen before the end is made.
        header = {"authorization": "Bearer secret"}
        stream = f"{address}/videos/{second.id}/stream"
        with httpx.stream("GET", stream, headers=header, timeout=240) as answer:
            pieces = [(piece, videos.retrieve(second.id).status) for piece in answer.iter_raw()]
        assert pieces[0][1] == "in_progress", "the stream began with the end"
        streamed = b"".join(piece for piece, _ in pieces)
        for made in (first, second):
            wait_for(lambda made=made: videos.retrieve(made.id).status == "completed")
        for name, time in kept.items():
            assert (latents / name).stat().st_mtime_ns == time, f"{name} was sampled again"
        record = json.loads((output / first.id / "run.json").read_text())
        assert record["sections"] == 4 == len(list(latents.glob("section_*.npz")))
        (tmp_path / "video.mp4").write_bytes(videos.download_content(first.id).content)
        assert video.mp4_info(tmp_path / "video.mp4").frames == record["frames"] == 33
        (tmp_path / "streamed.mp4").write_bytes(streamed)
        (tmp_path / "second.mp4").write_bytes(videos.download_content(second.id).content)
        frames = [video.read_mp4(tmp_path / f"{n}.mp4")[0] for n in ("streamed", "second")]
        np.testing.assert_array_equal(*frames)
        assert [found.id for found in videos.list(limit=1)] == [second.id, first.id]
        assert videos.delete(second.id).deleted
        assert [found.id for found in videos.list()] == [first.id]
        assert not (output / second.id).exists()
