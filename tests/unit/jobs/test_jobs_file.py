"""Jobs files, and the videos of a command."""

import json
from pathlib import Path

import pytest

from framepack_jax.bundle import Sampling
from framepack_jax.jobs.jobs_file import read_jobs
from framepack_jax.jobs.sampling import videos_of
from framepack_jax.jobs.spec import SPEC_FIELDS, VideoSpec

BASE = {name: getattr(VideoSpec(seed=7), name) for name in SPEC_FIELDS}


def read(folder: Path, text: str) -> list[tuple[Path, VideoSpec | ValueError]]:
    (folder / "jobs.jsonl").write_text(text, encoding="utf-8")
    return list(read_jobs(folder / "jobs.jsonl", BASE, Path("out")))


def test_lines_replace_the_flags_of_the_command(tmp_path) -> None:
    text = '{"prompt": "a\u2028b", "fps": 24}\n\n{"name": "waves", "key_frame": ["1s=k.png"]}\n'
    (first, one), (second, two) = read(tmp_path, text)
    assert (first, second) == (Path("out/job_0001"), Path("out/waves"))
    assert one == VideoSpec(seed=7, prompt="a\u2028b", fps=24.0)
    assert two == VideoSpec(seed=7, key_frame=("1s=k.png",))


def test_the_same_flags_give_the_same_video() -> None:
    """Without a seed too."""
    assert VideoSpec() == VideoSpec(seed=0)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[1]", "expected a JSON object"),
        ('{"seed"', "Expecting ':'"),
        ('{"seed": 1, "seed": 2}', "'seed' is given twice"),
        ('{"sead": 1}', "'sead' is not a flag of a video; known are"),
        ('{"seed": "1"}', "seed = '1': expected a whole number"),
        ('{"seed": true}', "seed = True: expected a whole number"),
        ('{"sampler": "heun"}', "sampler = 'heun': expected one of unipc, unipc-bh2, euler"),
        ('{"key_frame": "1s=k.png"}', "key_frame = '1s=k.png': expected a list"),
        ('{"name": "../up"}', "name '../up': expected the name of a folder"),
        ('{"name": ""}', "expected the name of a folder"),
        ('{"name": 3}', "expected the name of a folder"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_an_error_of_its_own(tmp_path, line: str, named: str) -> None:
    (_, bad), (folder, good) = read(tmp_path, f"{line}\n{{}}")
    assert isinstance(bad, ValueError) and "line 1: " in str(bad) and named in str(bad)
    assert (folder, good) == (Path("out/job_0002"), VideoSpec(seed=7))


def test_a_name_is_given_once(tmp_path) -> None:
    lines = "\n".join(json.dumps({"name": name}) for name in ("a", "b", "a"))
    _, (_, good), (_, bad) = read(tmp_path, lines)
    assert isinstance(good, VideoSpec) and "is used by an earlier line" in str(bad)


def test_each_prompt_has_a_video_for_each_seed() -> None:
    made = videos_of(("a", "b"), (3, -1), {"steps": 2}, Path("out"))
    assert [folder.name for folder, _ in made] == [
        "000_seed_3", "001_seed_drawn", "002_seed_3", "003_seed_drawn",
    ]  # fmt: skip
    assert made[2][1] == VideoSpec(prompt="b", seed=3, steps=2)
    assert videos_of(("a",), (3,), {}, Path("out")) == [
        (Path("out"), VideoSpec(prompt="a", seed=3))
    ]
    for prompts, seeds in (((), (1,)), (("a",), ())):
        with pytest.raises(ValueError, match="at least one prompt"):
            videos_of(prompts, seeds, {}, Path("out"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_blend": -1.0}, "prompt_blend = -1.0"),
        ({"prompt_blend": float("nan")}, "prompt_blend = nan"),
        ({"prompt_blend": float("inf")}, "prompt_blend = inf"),
        ({"cache_threshold": 0.2}, "cache_threshold = 0.2 needs --step-cache"),
        ({"steps": 0}, "steps = 0"),
    ],
)
def test_options_out_of_range(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VideoSpec(**options).filled(Sampling()).settings()


def test_settings_are_those_of_the_options() -> None:
    spec = VideoSpec(
        steps=3, sampler="euler", distilled_guidance=6.0, cfg_scale=2.0, cfg_rescale=0.5,
        step_cache="tea", cache_threshold=0.3,
    )  # fmt: skip
    made = spec.filled(Sampling()).settings()
    assert (made.steps, made.sampler, made.distilled_guidance) == (3, "euler", 6.0)
    assert (made.cfg_scale, made.cfg_rescale) == (2.0, 0.5)
    assert made.step_cache is not None
    assert (made.step_cache.kind, made.step_cache.threshold) == ("tea", 0.3)
    assert VideoSpec().filled(Sampling()).settings().step_cache is None
    of_bundle = Sampling(history_noise=0.1)
    assert VideoSpec().filled(of_bundle).settings().history_noise == 0.1
    assert VideoSpec(history_noise=0.0).filled(of_bundle).settings().history_noise == 0
