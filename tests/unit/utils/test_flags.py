"""Flags of the commands: ~ for the home folder, and text that is no text."""

from pathlib import Path

import pytest

from framepack_jax.cli.config_file import defaults
from framepack_jax.cli.convert import Convert
from framepack_jax.cli.evaluate import Evaluate
from framepack_jax.cli.prepare import Prepare
from framepack_jax.cli.resume import Resume
from framepack_jax.cli.sample import Sample
from framepack_jax.cli.train import Train
from framepack_jax.cli.verify import Verify
from framepack_jax.jobs.jobs_file import read_jobs
from framepack_jax.jobs.spec import SPEC_FIELDS, VideoSpec
from framepack_jax.training.config import TrainConfig
from framepack_jax.utils.flags import parse

HOME = Path("/home/someone")


@pytest.fixture(autouse=True)
def home(monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(HOME))


def test_home_in_flags_of_sampling() -> None:
    flags = parse(
        Sample,
        [
            "--bundle=~/b", "--image=~/i.png", "--end-image=~/e.png", "--key-frame", "0.2s=~/k.png",
            "1s=~/a=b.png", "--lora", "~/x.safetensors:0.5", "~/y", "--output=~/o",
            "--jobs=~/j.jsonl", "--extend", "here/~", "--prompt", "~/ a sea", "~",
        ],
        "sample.py",
    )  # fmt: skip
    assert (flags.model.bundle, flags.input.image, flags.output) == (
        f"{HOME}/b",
        HOME / "i.png",
        HOME / "o",
    )
    assert flags.input.key_frame == (f"0.2s={HOME}/k.png", f"1s={HOME}/a=b.png")
    assert flags.model.lora == (f"{HOME}/x.safetensors:0.5", f"{HOME}/y")
    assert (flags.input.end_image, flags.jobs) == (HOME / "e.png", HOME / "j.jsonl")
    assert parse(Resume, ["~"], "framepack resume").folder == HOME
    assert flags.input.extend == Path("here/~") and flags.prompt == ("~/ a sea", "~")


def test_home_in_flags_of_other_commands(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.py").write_text(
        "from framepack_jax.training.config import TrainConfig\n"
        "def get_config(): return TrainConfig(bundle='~/b', steps=7)\n"
    )
    args = ["--config=~/c.py", "--data.path=~/d", "--output", "~/o", "--init=~/run@3"]
    train = parse(Train, args, "train.py", defaults(Train, TrainConfig, args))
    assert (train.bundle, train.steps) == (f"{tmp_path}/b", 7)
    assert (train.data.path, train.output, train.init) == (
        f"{tmp_path}/d", f"{tmp_path}/o", f"{tmp_path}/run@3",
    )  # fmt: skip
    args = ["--config=~/c.py", "--data.path", "~/d", "e", "--data.weights", "1", "0.5"]
    train = parse(Train, args, "train.py", defaults(Train, TrainConfig, args))
    assert (train.data.paths, train.data.weights) == ((f"{tmp_path}/d", "e"), (1.0, 0.5))
    args = ["--videos=~/v", "--bundle=~/b", "--output=~/o"]
    prepare = parse(Prepare, args, "framepack prepare")
    assert (prepare.videos, prepare.bundle) == (tmp_path / "v", f"{tmp_path}/b")
    args = ["--output=~/o", "--vae=~/v", "--prompt-template=~"]
    convert = parse(Convert, args, "framepack convert")
    assert (convert.output, convert.networks.vae) == (f"{tmp_path}/o", tmp_path / "v")
    assert convert.settings.prompt_template == "~"
    verify = parse(Verify, ["~/s", "~/b"], "framepack verify")
    assert (verify.source, verify.bundle) == (tmp_path / "s", f"{tmp_path}/b")
    evaluate = parse(Evaluate, ["--bundle=~/b", "--caption=~"], "framepack evaluate")
    assert evaluate.bundle == (f"{tmp_path}/b",) and evaluate.caption == "~"


def jobs(tmp_path, line: str) -> VideoSpec | ValueError:
    """Return the jobs of a file of one line."""
    (tmp_path / "jobs.jsonl").write_text(line)
    base = {name: getattr(VideoSpec(), name) for name in SPEC_FIELDS}
    ((_, shot),) = read_jobs(tmp_path / "jobs.jsonl", base, tmp_path)
    return shot


def test_home_in_jobs(tmp_path) -> None:
    line = '{"image": "~/a.png", "key_frame": ["1s=~/k.png"], "prompt": "~", "fps": 24}'
    shot = jobs(tmp_path, line)
    assert (shot.image, shot.key_frame) == (HOME / "a.png", (f"1s={HOME}/k.png",))
    assert (shot.prompt, shot.fps) == ("~", 24.0)


@pytest.mark.parametrize(
    ("kind", "args", "flag"),
    [
        (Sample, ["--prompt", "she waves", "caf\udce9"], "--prompt"),
        (Sample, ["--negative-prompt", "caf\udce9"], "--negative-prompt"),
        (Sample, ["--image", "caf\udce9.png"], "--image"),
        (Train, ["--data.path", "caf\udce9"], "--data.path"),
        (Train, ["--data.path", "a", "caf\udce9"], "--data.path"),
    ],
)
def test_what_is_no_text_is_refused_by_its_flag(kind, args, flag) -> None:
    with pytest.raises(SystemExit, match=rf"^error: {flag} 'caf.*': expected text in UTF-8"):
        parse(kind, args, "")


@pytest.mark.parametrize("name", ["prompt", "name", "image"])
def test_what_is_no_text_is_refused_in_jobs(tmp_path, name: str) -> None:
    found = jobs(tmp_path, f'{{"{name}": "\\ud83d"}}')
    assert isinstance(found, ValueError) and f"{name} '\\ud83d': expected text" in str(found)
