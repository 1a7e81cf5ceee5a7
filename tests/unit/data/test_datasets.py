"""Batches of several datasets."""

import collections
import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.data import fingerprint, records
from framepack_jax.data.config import DataConfig
from framepack_jax.data.loader import Loader, open_loader
from framepack_jax.data.records import DatasetError
from framepack_jax.training import summary
from tests.fixtures.loading import INVERTED, bits, take
from tests.fixtures.training_data import SIZES, damage, write_dataset

MORE = {(32, 48): (8, 6), (64, 32): (4, 4, 5)}
COUNTS = 8, 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two datasets with one bucket in common."""
    place = tmp_path_factory.mktemp("mixed")
    clips = write_dataset(place / "first", SIZES) + write_dataset(place / "second", MORE)
    return (str(place / "first"), str(place / "second")), clips


def mixed(folders, count, *, batch=4, share=(0, 1), state=None, **options):
    """The loader of several datasets and its next batches."""
    cfg = DataConfig(path=folders, **options)
    opened = open_loader(cfg, packing.parse(INVERTED), batch, share)
    if state is not None:
        opened.set_state(json.loads(json.dumps(state)))
    return opened, list(itertools.islice(opened, count))


def dataset_of(opened: Loader, batch) -> int:
    """The place of the dataset of a batch, which has only one."""
    (found,) = {opened.samples.dataset_of(int(clip)).name for clip in batch.meta.clip}
    return ["first", "second"].index(found)


def test_datasets_take_turns_by_their_weights(folders) -> None:
    """A batch has one dataset and one bucket; the samples are those of their records."""
    paths, clips = folders
    opened, batches = mixed(paths, 40, weights=(0.7, 0.3))
    turns = [dataset_of(opened, batch) for batch in batches]
    for first, last in itertools.combinations(range(41), 2):
        assert abs(sum(turns[first:last]) - 0.3 * (last - first)) <= 1 + 1e-9
    for step, batch in enumerate(batches):
        mine = [clips[clip] for clip in batch.meta.clip]
        assert {(r.clip.height, r.clip.width) for r in mine} == {opened.bucket_at(step)}
        assert batch.meta.element.tolist() == list(range(4 * step, 4 * step + 4))
        for i, record in enumerate(mine):
            assert np.array_equal(batch.conditions.pooled[i], record.pooled)
            windows = [record.latents[at : at + 2] for at in range(1, len(record.latents) - 1)]
            assert any(np.array_equal(batch.target[i], window) for window in windows)


def test_each_dataset_goes_through_its_clips_as_if_alone(folders) -> None:
    paths, _ = folders
    opened, batches = mixed(paths, 40, weights=(3, 2))
    by_dataset = collections.defaultdict(list)
    for batch in batches:
        by_dataset[dataset_of(opened, batch)].append(batch.meta.clip.tolist())
    _, alone = take(paths[0], 24)
    assert by_dataset[0] == [batch.meta.clip.tolist() for batch in alone]
    # Three cycles: every clip as often as a batch has samples, three times.
    counts = collections.Counter(itertools.chain(*by_dataset[1][:15]))
    assert counts == dict.fromkeys(range(COUNTS[0], sum(COUNTS)), 3 * 4)


def test_without_weights_all_clips_come_equally_often(folders) -> None:
    opened, batches = mixed(folders[0], sum(COUNTS))
    assert opened.schedule.weights == COUNTS
    counts = collections.Counter(int(clip) for batch in batches for clip in batch.meta.clip)
    assert counts == dict.fromkeys(range(sum(COUNTS)), 4)


def test_a_mixture_goes_on_exactly_on_other_hosts(folders) -> None:
    options = {"weights": (1, 2), "windows": (1, 2), "caption_dropout": 0.3}
    _, whole = mixed(folders[0], 12, **options)
    state = mixed(folders[0], 5, share=(1, 2), **options)[0].get_state()
    halves = [
        mixed(folders[0], 7, share=(i, 2), state=state, threads=1 + i, **options)[1]
        for i in range(2)
    ]
    for batch, *parts in zip(whole[5:], *halves, strict=True):
        joined = jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *parts)
        assert bits(joined) == bits(batch)


def test_worker_processes_read_a_mixture(folders) -> None:
    here, there = (mixed(folders[0], 3, workers=workers)[1] for workers in (0, 1))
    assert [bits(b) for b in here] == [bits(b) for b in there]


def test_clips_of_each_dataset_are_held_out(folders) -> None:
    """The first of them are of all datasets; validation sees all."""
    paths, clips = folders
    opened, batches = mixed(paths, 30, holdout=2, weights=(1, 1))
    held = [opened.samples.dataset_of(number).name for number in opened.held]
    assert held[:2] == ["first", "second"] and min(collections.Counter(held).values()) >= 2
    trained = {int(clip) for batch in batches for clip in batch.meta.clip}
    assert trained | set(opened.held) == set(range(sum(COUNTS)))
    assert not trained & set(opened.held)
    found = [clip for batch, *_ in opened.held_out(1, 4) for clip in batch.meta.clip.tolist()]
    assert set(found) == set(opened.held)
    names = [record.clip.id for record in opened.held_out_records(2)]
    assert names == opened.clip_ids(opened.held[:2])
    assert names == [clips[number].clip.id for number in opened.held[:2]]


def test_another_mixture_is_refused_on_resume(folders) -> None:
    paths, _ = folders
    old = json.loads(json.dumps(mixed(paths, 0, weights=(0.7, 0.3))[0].fingerprint))
    fingerprint.check_fingerprint(old, mixed(paths, 0, weights=(7, 3))[0].fingerprint)
    other = {
        "weights = .7, 3. then, .3, 2. now": {"folders": paths, "weights": (3, 2)},
        "dataset 1: records = ": {"folders": paths[::-1], "weights": (7, 3)},
        "clips = ": {"folders": paths[:1], "weights": (7,)},
    }
    for text, options in other.items():
        with pytest.raises(DatasetError, match=text):
            fingerprint.check_fingerprint(old, mixed(count=0, **options)[0].fingerprint)


def test_a_clip_is_replaced_by_one_of_its_dataset(folders, tmp_path) -> None:
    write_dataset(tmp_path / "first", SIZES)
    clips = write_dataset(tmp_path / "second", MORE)
    damage(tmp_path / "second", clips[0])
    opened, _ = mixed((str(tmp_path / "first"), str(tmp_path / "second")), 0)
    number = COUNTS[0]
    for element in range(20):
        sample = opened.samples.read_or_replace(element, number, packing.parse(INVERTED))
        assert sample.meta.clip == -1 - number
        assert np.array_equal(sample.conditions.pooled, clips[1].pooled)
    path = opened.datasets[1].index.shards[0].path
    assert opened.clip_ids([number]) == [f"{path}, record 0"]
    assert f"{tmp_path}/second/{path}, record 0, cannot be read" in opened.fault(number)


def test_datasets_of_other_networks_or_rates_are_refused(folders, tmp_path) -> None:
    write_dataset(tmp_path, MORE)
    index = records.read_index(tmp_path)
    changes = {
        "fps = 30.0 in .*first, 24.0": {"fps": 24.0},
        "channels = 16": {"channels": 8},
        "mode = latents in .*first, pixels": {"mode": "pixels"},
        "vae = ": {"fingerprint": index.fingerprint | {"vae": "0"}},
        "latent_mean = ": {"fingerprint": index.fingerprint | {"latent_mean": [1.0]}},
    }
    first = folders[0][0]
    for text, change in changes.items():
        records.write_index(tmp_path, dataclasses.replace(index, **change))
        message = f"datasets {first} and {tmp_path} cannot be mixed: {text}.*in {tmp_path}; prepare"
        with pytest.raises(DatasetError, match=message):
            mixed((first, str(tmp_path)), 0)
    # Other clips of the same networks may be mixed.
    cut = index.fingerprint | {"buckets": [[32, 48]], "max_frames": 9}
    records.write_index(tmp_path, dataclasses.replace(index, fingerprint=cut))
    mixed((first, str(tmp_path)), 0)


def test_what_does_not_fit_is_named() -> None:
    cases = {
        r"--data.weights 1 2 3: expected as many .* 2 \(--data.path a b\)": (("a", "b"), (1, 2, 3)),
        "--data.weights 0.5 0: expected numbers above 0": (("a", "b"), (0.5, 0)),
        "--data.weights inf 1: expected": (("a", "b"), (float("inf"), 1)),
        "--data.path names a twice": (("a", "b", "a"), ()),
        "one is an empty text": (("a", ""), ()),
    }
    for message, (path, weights) in cases.items():
        with pytest.raises(ValueError, match=message):
            DataConfig(path=path, weights=weights)


def test_each_dataset_is_summarised(folders) -> None:
    paths, _ = folders
    opened, _ = mixed(paths, 0, weights=(3, 1), holdout=2, min_clips=2)
    first, second, *rest = summary.data_lines(opened, 120)
    counts = [dataset.clips for dataset in opened.datasets]
    assert first.startswith(f"data         {paths[0]}: {counts[0]} clips in 2 buckets (32x48: ")
    assert f"; 0.75 of the batches, 2 more held out; {90 * 4 / counts[0]:.3g} epochs" in first
    assert f"{paths[1]}: {counts[1]} clips" in second and "; 0.25 of the batches" in second
    assert f"; {30 * 4 / counts[1]:.3g} epochs" in second
    assert all(line.startswith("left out ") for line in rest)
