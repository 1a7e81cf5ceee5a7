"""The page in headless Chromium, and the actions behind its controls.

Screenshots lie in the folder that FRAMEPACK_SCREENSHOTS names, if it does.
"""

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from framepack_jax import video
from framepack_jax.server.errors import ApiError
from framepack_jax.server.limits import Limits
from framepack_jax.server.page_actions import NUMBERS, Actions, with_times
from framepack_jax.server.queue import JobQueue
from tests.fixtures.browser import Browser, browser, needs_chromium
from tests.fixtures.paths import ROOT
from tests.fixtures.serving import server_process, wait_for

PHOTO = ROOT / "examples" / "astronaut.jpg"
# Values of the controls as a visitor finds them.
PLAIN = dict.fromkeys((*NUMBERS, "image", "video", "end_image", "key_frames", "extends")) | {
    "prompt": "she waves", "prompts": [["", ""]], "negative_prompt": "", "step_cache": "none",
    "size": "64x64", "seconds": 0.5, "seed": 3, "steps": 1, "key_frame_seconds": "",
}  # fmt: skip
COMPILED = 240


@pytest.fixture
def actions(model, tmp_path) -> Actions:
    return Actions(model, JobQueue(tmp_path, 3), Limits())


def test_settings_are_used_again(actions, tmp_path) -> None:
    video.save_png(tmp_path / "red.png", np.full((64, 64, 3), (200, 20, 20), np.uint8))
    values = PLAIN | {
        "prompts": [[0.2, "she bows"], ["", ""], ["0.4", "she sits"]], "image": str(PHOTO),
        "end_image": str(tmp_path / "red.png"), "key_frames": [str(tmp_path / "red.png")],
        "key_frame_seconds": "0.2", "cfg_scale": 1.5, "negative_prompt": "blurry",
    }  # fmt: skip
    name = actions.create(values)
    job = actions.queue.get(name)
    assert job.options["prompt"] == "0s: she waves 0.2s: she bows 0.4s: she sits"
    again = actions.settings(name)
    assert again.keys() == values.keys()
    pictures = {"image", "end_image", "key_frames"}
    same = {key: value for key, value in again.items() if key not in pictures}
    expected = values | {"prompts": [[0.2, "she bows"], [0.4, "she sits"]]}
    assert same == {key: expected[key] for key in same}
    np.testing.assert_array_equal(again["image"], video.load_image(PHOTO))
    second = actions.create(values | {"key_frames": again["key_frames"]})
    assert actions.queue.get(second).key_frames == job.key_frames
    assert [label for label, _ in actions.listed()][1].startswith("she waves · 0.5 s · 64x64")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt is missing"),
        ({"prompts": [["soon", "she bows"]]}, "'soon' before 'she bows' is no number"),
        ({"prompts": [[0, "she bows"]]}, "must begin with 0s and rise"),
        ({"size": "wide"}, "expected WIDTHxHEIGHT"),
        ({"image": str(ROOT / "pyproject.toml")}, "no PNG, JPEG"),
        ({"image": str(PHOTO), "video": str(PHOTO)}, "not both"),
        ({"key_frames": [str(PHOTO)]}, "expected the seconds of 1 files"),
        ({"extends": "video_0"}, "does not exist"),
        ({"seconds": 100}, "at most 60"),
    ],
)
def test_wrong_values_are_named_and_leave_no_files(actions, tmp_path, changes, message) -> None:
    with pytest.raises(ApiError, match=message):
        actions.create(PLAIN | changes)
    assert not list(tmp_path.iterdir())


def test_prompts_over_time() -> None:
    assert with_times("she waves", [["", ""], [None, " "]]) == "she waves"
    assert with_times("she waves", [[0.00001, "b"]]) == "0s: she waves 0.00001s: b"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def screenshot(window: Browser, name: str) -> None:
    if folder := os.environ.get("FRAMEPACK_SCREENSHOTS"):
        window.save_screenshot(Path(folder) / f"{name}.png")


def set_length(window: Browser, seconds: float, steps: int) -> None:
    window.type("#seconds input[type=number]", f"{seconds}\n")
    window.type("#steps input[type=number]", f"{steps}\n")


@pytest.mark.browser
@needs_chromium
def test_a_visit(tmp_path) -> None:
    """Generate, watch, cancel, a wrong file, a restart of the server, and a phone."""
    served, port = tmp_path / "served", free_port()
    flags = ("--web", "--port", port, "--sizes", "64x64")
    page = f"http://127.0.0.1:{port}/"
    with browser(tmp_path, (1280, 1400)) as window:
        with server_process(served, *flags) as (process, _):
            window.open(page)
            window.wait("document.querySelector('#generate')")
            screenshot(window, "empty")
            others = (
                "performance.getEntriesByType('resource').map(e => e.name)"
                ".filter(n => !n.startsWith(location.origin) && !n.startsWith('data:'))"
            )
            assert window.run(f"return {others}") == []
            # A file that is no image.
            (tmp_path / "wrong.png").write_text("no image")
            window.type("#image input[type=file]", str(tmp_path / "wrong.png"))
            window.type("#prompt textarea", "she waves")
            set_length(window, 2, 20)
            window.click("generate")
            window.wait("document.querySelector('.toast-wrap, .toast-body')")
            screenshot(window, "wrong")
            assert not list(served.glob("video_*"))
            window.open(page)
            window.wait("document.querySelector('#generate')")
            # A video that grows while it is watched.
            window.type("#image input[type=file]", str(PHOTO))
            window.wait("document.querySelector('#image img')")
            window.type("#prompt textarea", "she waves <b>now</b>")
            set_length(window, 8, 20)
            window.click("generate")
            window.wait("document.querySelector('#preview img')", COMPILED)
            playing = "document.querySelector('#player video')?.videoWidth > 0"
            window.wait(playing, COMPILED)
            assert "stream" in window.run("return document.querySelector('#player video').src")
            assert "in progress" in window.run(
                "return document.querySelector('#progress').innerText"
            )
            screenshot(window, "growing")
            window.type("#new-prompt textarea, #new-prompt input", "she bows")
            window.click("steer")
            window.wait("document.querySelector('#progress').innerText.includes('she bows')")
            process.kill()
            process.wait()
        with server_process(served, *flags):
            window.open(page)
            done = "document.querySelector('#progress')?.innerText.includes('completed')"
            window.wait(done, COMPILED)
            content = "document.querySelector('#player video').src.endsWith('content')"
            window.wait(f"{content} && {playing}")
            screenshot(window, "completed")
            history = "document.querySelector('#history').innerText"
            assert "she waves <b>now</b>" in window.run(f"return {history}")
            window.click("again")
            window.wait(
                "document.querySelector('#prompt textarea').value.startsWith('she waves <b')"
            )
            window.wait("document.querySelector('#image img')")
            seed = json.loads(next(served.glob("video_*/job.json")).read_text())["options"]["seed"]
            assert window.run("return document.querySelector('#seed input').value") == str(seed)
            # A video that is cancelled.
            set_length(window, 20, 50)
            window.click("generate")
            wait_for(lambda: len(list(served.glob("video_*"))) == 2)
            window.wait("document.querySelector('#progress').innerText.includes('in progress')")
            window.click("delete")
            wait_for(lambda: len(list(served.glob("*video_*"))) == 1)
            window.resize(400, 900)
            window.wait("document.querySelector('#history').innerText.includes('completed')")
            screenshot(window, "phone")
            width = "document.documentElement.scrollWidth <= window.innerWidth"
            assert window.run(f"return {width}"), "the page is wider than a phone"
