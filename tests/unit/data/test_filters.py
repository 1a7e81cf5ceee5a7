"""Scores of clips, and the thresholds on them."""

import numpy as np
import pytest
from PIL import Image

from framepack_jax.data import filters, scenes
from framepack_jax.data.filters import Thresholds
from tests.fixtures.preparing import SETTINGS, scene_frames, write_video


def test_scores_say_what_they_mean() -> None:
    moving = np.stack(scene_frames(0, 0.5))
    still = np.repeat(moving[:1], 15, axis=0)
    blurred = np.stack(
        [np.asarray(Image.fromarray(f).resize((6, 4)).resize((96, 64))) for f in moving]
    )  # fmt: skip
    barred = moving.copy()
    barred[:, :8] = barred[:, -8:] = 0
    clips = {"moving": moving, "still": still, "blurred": blurred, "barred": barred}
    found = {name: filters.scores(clip) for name, clip in clips.items()}
    assert found["still"]["motion"] == 0 and found["still"]["still"] == 1
    assert found["moving"]["motion"] > 0.5 and found["moving"]["still"] == 0
    assert found["blurred"]["sharpness"] < found["moving"]["sharpness"] / 5
    assert found["barred"]["black_bars"] == 0.25 and found["moving"]["black_bars"] == 0
    assert found["moving"]["hash"] != filters.scores(moving[:, :, ::-1])["hash"]
    dark = filters.scores(moving // 20)
    assert dark["brightness"] < 8 < found["moving"]["brightness"]


@pytest.mark.parametrize("fps", [8, 10, 12, 15])
def test_frames_that_are_repeated_for_the_rate_are_not_still(tmp_path, fps) -> None:
    """Every frame of an animation differs from the one before; at 30 a second most do not."""
    frames = [np.roll(scene_frames(0, 0.1)[0], 3 * k, axis=1) for k in range(3 * fps)]
    (cut,) = scenes.clips(write_video(tmp_path / "a.mp4", frames, fps), SETTINGS)
    assert len(cut.frames) == 89 and cut.scores["still"] == 0
    # So many that the errors of compression, which differ from run to run, do not matter.
    repeated = [frames[k - k % 12] for k in range(3 * fps)]
    (cut,) = scenes.clips(write_video(tmp_path / "b.mp4", repeated, fps), SETTINGS)
    assert cut.scores["still"] > 0.5, "those of the video itself are"


def test_thresholds_name_the_first_that_is_not_met() -> None:
    good = {"motion": 3.0, "sharpness": 90.0, "brightness": 90.0, "black_bars": 0.0, "still": 0.0,
            "hash": 5.0}  # fmt: skip
    cases = {
        "motion": (0.0, "little_motion"), "sharpness": (0.1, "blurred"),
        "brightness": (2.0, "dark"), "black_bars": (0.3, "black_bars"), "still": (0.9, "still"),
    }  # fmt: skip
    judge = Thresholds().judge
    assert judge(2.0, good, ()) is None
    for name, (value, reason) in cases.items():
        assert judge(2.0, good | {name: value}, ()) == reason
    assert judge(1.0, good, ()) == "too_short"
    assert judge(2.0, good, {5.0}) == "duplicate"
    assert Thresholds(keep_duplicates=True).judge(2.0, good, {5.0}) is None
