"""From videos to a video in a bucket, through a training of two processes that are killed.

The bucket shows when to kill: after a random number of new objects in the folder of checkpoints.
Takes four minutes, as two processes start twelve times."""

import random
import signal
import subprocess
import time

import pytest
from etils import epath

from framepack_jax import bundle
from framepack_jax.cli import prepare, sample
from framepack_jax.cli.common import HOPELESS
from framepack_jax.jobs.run_dir import RunDir
from framepack_jax.training import checkpoints
from framepack_jax.utils import storage
from tests.fixtures.hosts import ended
from tests.fixtures.preparing import scene_frames, write_video
from tests.fixtures.run_folders import PHOTO, assert_same_latents
from tests.fixtures.training_runs import same, two

pytestmark = pytest.mark.storage
STEPS = 30
# Seconds that the processes of one start may take on a busy machine.
PATIENCE = 900
# Which processes are killed at each of ten points.
KILLED = [[0], [1], [0, 1]] * 3 + [[1]]
# Most objects after which the first kill comes, before a checkpoint is whole, and later ones; a
# checkpoint has 33.
FIRST, LATER = 6, 120


def prepared(videos, place: epath.Path) -> epath.Path:
    """A dataset, beside the bundle that encodes it."""
    storage.copy_tree(bundle.resolve("random"), place / "random")
    prepare.main([
        "--videos", str(videos), "--bundle", str(place / "random"), "--output",
        str(place / "dataset"), "--buckets", "32x48", "--min-seconds", "0.5",
    ])  # fmt: skip
    return place


def train(place, folder: epath.Path) -> list[subprocess.Popen]:
    """The processes of the run in a folder, which saves every step."""
    return two(
        place, folder / "run", "--bundle", str(folder / "random"), "--mesh", "fsdp=2",
        "--data.path", str(folder / "dataset"), "--steps", str(STEPS), "--checkpoints.every", "1",
        "--heartbeat-seconds", "15",
    )  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> None:
    for code, _, err in ended(processes, PATIENCE):
        assert code == 0, err[-3000:]


def kill(processes: list[subprocess.Popen], victims: list[int], count: int, names) -> None:
    """Kill some processes once they have written so many objects; the others end by themselves."""
    before, new = names(), set()
    while len(new) < count:
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.02)
        now = names()
        before &= now
        new |= now - before
    for victim in victims:
        processes[victim].kill()
    for number, (code, _, err) in enumerate(ended(processes, PATIENCE)):
        killed = number in victims
        assert (code == -signal.SIGKILL) == killed and code not in (0, HOPELESS, 130, 143), err


def sampled(folder: epath.Path) -> RunDir:
    """A video of the exported bundle."""
    sample.main([
        "--bundle", str(folder / "run" / "bundle"), "--output", str(folder / "video"), "--image",
        str(PHOTO), "--prompt", "waves", "--height", "32", "--width", "48", "--steps", "2",
        "--sections", "2",
    ])  # fmt: skip
    return RunDir.open(folder / "video")


def test_killed_ten_times_it_makes_the_video_of_a_disk(
    place, tmp_path, object_store, bucket, monkeypatch
) -> None:
    """Bit for bit: the losses, the parameters, the bundle, and the latents of the video."""
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    (tmp_path / "videos").mkdir()
    for number in range(4):
        write_video(tmp_path / "videos" / f"{number}.mp4", scene_frames(number, 1.2, 32, 48))
    disk, store = (
        prepared(tmp_path / "videos", epath.Path(folder)) for folder in (tmp_path, bucket)
    )
    finish(train(place, disk))
    draw, kept, broken = random.Random(0), [], 0
    for number, victims in enumerate(KILLED):
        count = draw.randint(1, FIRST if number == 0 else LATER)
        names = lambda: object_store.names(f"{store}/run/checkpoints/")  # noqa: E731
        kill(train(place, store), victims, count, names)
        kept.append(checkpoints.steps_of(store / "run"))
        found = {name.split("/checkpoints/")[1].split("/")[0] for name in names()}
        broken += len(found - {str(step) for step in kept[-1]})
    # Some kills came before the first whole checkpoint, most after one, some within one.
    newest = [max(steps, default=0) for steps in kept]
    assert newest[0] == 0 and len(set(newest)) > 5 and newest[-1] < STEPS and broken, newest
    finish(train(place, store))
    same(store / "run", disk / "run", STEPS)
    assert_same_latents(sampled(store), sampled(disk))
