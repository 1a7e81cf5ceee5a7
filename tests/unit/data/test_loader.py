"""The stream of training samples: what is in it, in which order, and that it goes on exactly."""

import collections
import dataclasses
import hashlib
import itertools
import json
import threading
import time

import jax
import numpy as np
import pytest

from framepack_jax import bundle, packing, video
from framepack_jax.data import array_records, checks, fingerprint, holdout, pixel_batch, records
from framepack_jax.data.batch import LOST
from framepack_jax.data.config import DataConfig
from framepack_jax.data.loader import open_loader
from framepack_jax.data.records import DatasetError, Index
from framepack_jax.data.shard_writer import write_shards
from framepack_jax.packing import Timeline
from framepack_jax.training import summary
from tests.fixtures.loading import (
    ENDPOINT,
    F1,
    INVERTED,
    PLANNED,
    SYMMETRIC,
    TAILS,
    VANILLA,
    bits,
    take,
)
from tests.fixtures.training_data import SIZES, damage, random_record, write_dataset

SCHEDULES = (INVERTED, F1, VANILLA)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sample_is_what_sampling_reads(dataset, schedule) -> None:
    """Context from a timeline that sampling fills, section by section, is that of the sample."""
    folder, clips = dataset
    _, batches = take(folder, 12, schedule=schedule)
    assert len(checked_sections(batches, clips, schedule)) > 5


@pytest.mark.parametrize("schedule", [SYMMETRIC, ENDPOINT, *PLANNED, *TAILS])
def test_a_sample_of_any_order_is_what_sampling_reads(tmp_path, schedule) -> None:
    """Of whole clips, and of the beginnings of clips."""
    clips = write_dataset(tmp_path, {(32, 48): (7, 9, 12, 8)})
    for sections in ("whole", "random"):
        opened, batches = take(tmp_path, 16, schedule=schedule, sections=sections)
        seen = checked_sections(batches, clips, schedule, random_length=sections == "random")
        assert {number for number, _ in seen} >= {0, 1, 2} and len(seen) > 5
        kinds = {batch.target.shape[1] for batch in batches}
        assert kinds == {frames for _, frames in opened.samples.kinds}


def test_a_share_of_batches_makes_both_ends(tmp_path) -> None:
    write_dataset(tmp_path, {(32, 48): (7, 7)})
    opened, _ = take(tmp_path, 0, schedule=ENDPOINT, windows=(2, 1))
    samples = opened.samples
    counts = collections.Counter(
        (samples.schedule_of(step).window, samples.frames_of(step)) for step in range(6000)
    )
    for kind, share in {(2, 2): 1 / 3, (2, 4): 1 / 6, (1, 1): 1 / 3, (1, 2): 1 / 6}.items():
        assert abs(counts[kind] / 6000 - share) < 0.02
    write_dataset(tmp_path / "short", {(32, 48): (5, 9)})
    with pytest.raises(DatasetError, match=r"1 of the 2 clips .* shorter than 3 sections of 2"):
        take(tmp_path / "short", 0, schedule=ENDPOINT)


def checked_sections(batches, clips, schedule, random_length=False) -> set[tuple[int, int]]:
    """Compare each sample with a sampling step; return (section, sections) of all samples."""
    seen = set()
    for batch, i in itertools.product(batches, range(4)):
        record = clips[batch.meta.clip[i]]
        latents = np.asarray(record.latents, np.float32)
        plan = packing.plan(packing.parse(schedule), int(batch.meta.sections[i]))
        most = (len(latents) - 1) // 2
        made = sum(len(section.targets) for section in plan) // 2
        assert made <= most if random_length else made == most
        timeline = Timeline(packing.length(plan), latents.shape[1:])
        timeline.write([0], latents[None, :1])
        for made, section in enumerate(plan):
            context = packing.read_context(section, timeline)
            if made == batch.meta.section[i]:
                break
            timeline.write(section.targets, latents[None, list(section.targets)])
        sample = jax.tree.map(lambda x, i=i: np.asarray(x[i : i + 1], np.float32), batch.context)
        assert batch.context.kernels == context.kernels
        for ours, theirs in zip(jax.tree.leaves(sample), jax.tree.leaves(context), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        wanted = latents[list(section.targets)]
        np.testing.assert_array_equal(np.asarray(batch.target[i], np.float32), wanted)
        seen.add((int(batch.meta.section[i]), int(batch.meta.sections[i])))
    return seen


def test_a_sample_of_chunks_is_what_sampling_reads_from_nothing(tmp_path) -> None:
    """The first section reads nothing, and its first latent is the anchor of all others. A bundle
    without CLIP and SigLIP leaves their states out."""
    clips = write_dataset(tmp_path, {(32, 48): (6, 8, 2)}, chunk=2)
    opened, batches = take(tmp_path, 12, schedule=F1, caption_dropout=0.5)
    seen = set()
    for batch, i in itertools.product(batches, range(4)):
        assert batch.conditions.pooled is None and batch.conditions.image is None
        latents = np.asarray(clips[batch.meta.clip[i]].latents, np.float32)
        made, count = int(batch.meta.section[i]), int(batch.meta.sections[i])
        assert count == len(latents) // 2
        plan = packing.plan(packing.parse(F1), count, before=0, alone=True)
        timeline = Timeline(packing.length(plan), latents.shape[1:])
        for section in plan[:made]:
            timeline.write(section.targets, latents[None, list(section.targets)])
        context = packing.read_context(plan[made], timeline)
        sample = jax.tree.map(lambda x, i=i: np.asarray(x[i : i + 1], np.float32), batch.context)
        for ours, theirs in zip(jax.tree.leaves(sample), jax.tree.leaves(context), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        known = np.concatenate([np.asarray(x, np.float32) for x in sample.latents], axis=1)
        assert (known == 0).all() == (made == 0)
        wanted = latents[2 * made : 2 * made + 2]
        np.testing.assert_array_equal(np.asarray(batch.target[i], np.float32), wanted)
        seen.add((made, count))
    assert {made for made, _ in seen} == {0, 1, 2, 3}
    blank = opened.blank(0)
    assert np.isnan(np.asarray(blank.conditions.text, np.float32)).all()
    with pytest.raises(DatasetError, match=r"in chunks of 2 latent frames, and sections of 3"):
        take(tmp_path, 0, schedule=F1.replace("g2", "g3"))


def test_without_context_every_chunk_of_a_clip_is_a_video(tmp_path) -> None:
    """Clips that are encoded at once have one beginning."""
    chunked, whole = tmp_path / "chunked", tmp_path / "whole"
    for folder, chunk in ((chunked, 2), (whole, 0)):
        clips = write_dataset(folder, {(32, 48): (6, 8, 2)}, chunk=chunk)
        _, batches = take(folder, 12, schedule="g2")
        seen = set()
        for batch, i in itertools.product(batches, range(4)):
            latents = np.asarray(clips[batch.meta.clip[i]].latents)
            (first,) = [
                first
                for first in range(len(latents) - 1)
                if np.array_equal(latents[first : first + 2], batch.target[i])
            ]
            assert batch.context.target_indices[i].tolist() == [0, 1]
            assert (batch.meta.section[i], batch.meta.sections[i]) == (0, 1)
            seen.add(first)
        assert seen == ({0, 2, 4, 6} if chunk else {0})


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["inverted", "f1"])
def test_frame_indices_are_the_released_ones(golden, tmp_path, kind) -> None:
    """For every section of a clip as long as the release would make it."""
    rows = json.loads((golden / "sections.json").read_text())
    row = next(r for r in rows if r["latent_window_size"] == 9 and 4 < r["sections"] <= 12)
    count = row["sections"]
    write_dataset(tmp_path, {(32, 48): (1 + 9 * count,)})
    schedule = packing.RELEASED_INVERTED if kind == "inverted" else packing.RELEASED_F1
    opened = open_loader(DataConfig(path=str(tmp_path)), packing.parse(schedule), 8)
    found = {}
    for batch in itertools.islice(opened, 12):
        for i in range(8):
            found[int(batch.meta.section[i])] = jax.tree.map(lambda x, i=i: x[i], batch.context)
    assert set(found) == set(range(count))
    for made in range(count):
        golden_row = row[kind][made] if isinstance(row[kind], list) else row[kind]
        context = found[made]
        by_kernel = collections.defaultdict(list)
        for kernel, indices in zip(context.kernels, context.indices, strict=True):
            by_kernel[kernel] += indices.tolist()
        assert context.target_indices.tolist() == golden_row["target"]
        assert by_kernel["k1"] == golden_row["clean"]
        assert by_kernel["k2"] == golden_row["clean_2x"]
        assert by_kernel["k4"] == golden_row["clean_4x"]


def test_captions_are_filled_up_to_as_many_tokens_as_asked_for(dataset) -> None:
    folder, _ = dataset
    (_, (whole,)), (_, (short,)) = take(folder, 1), take(folder, 1, text_tokens=8)
    whole, short = whole.conditions, short.conditions
    assert whole.text.shape[1] == 256 and short.text.shape[1] == short.text_valid.shape[1] == 8
    np.testing.assert_array_equal(short.text, whole.text[:, :8])
    assert np.array_equal(short.text_valid, whole.text_valid[:, :8])
    assert short.text_valid.sum() == whole.text_valid.sum()
    refused = r"up to 8 tokens, 2 of 8 more than --data.text-tokens 6; give --data.text-tokens 8$"
    with pytest.raises(DatasetError, match=refused):
        take(folder, 0, text_tokens=6)
    with pytest.raises(ValueError, match=r"--data\.text-tokens 257"):
        DataConfig(text_tokens=257)


def test_captions_of_a_dataset_without_their_lengths_are_read(tmp_path) -> None:
    """One packed before the index had them: it is the same dataset, and refused alike."""
    write_dataset(tmp_path)
    fingerprint = take(tmp_path, 0)[0].fingerprint
    index = records.read_index(tmp_path)
    assert [len(shard.tokens) for shard in index.shards] == [5, 3]
    text = json.loads((tmp_path / records.INDEX).read_text())
    for shard in text["shards"]:
        del shard["tokens"]
    (tmp_path / records.INDEX).write_text(json.dumps(text))
    assert take(tmp_path, 0)[0].fingerprint == fingerprint
    with pytest.raises(
        DatasetError, match=r"up to 8 tokens, 2 of 8 more than --data.text-tokens 6"
    ):
        take(tmp_path, 0, text_tokens=6)
    with pytest.raises(DatasetError, match=r"the empty prompt in .* has 9 tokens, more than .* 8;"):
        checks.check_captions(tmp_path, index, 8, empty=9)


def test_every_clip_of_every_epoch_and_one_bucket_a_batch(dataset) -> None:
    folder, clips = dataset
    opened, batches = take(folder, 2 * len(clips))
    counts = collections.Counter(int(clip) for batch in batches for clip in batch.meta.clip)
    # Two cycles of the schedule: every clip as often as a batch has samples, twice.
    assert counts == dict.fromkeys(range(len(clips)), 2 * 4)
    by_bucket = collections.defaultdict(list)
    for step, batch in enumerate(batches):
        bucket = opened.bucket_at(step)
        shapes = {(clips[clip].clip.height, clips[clip].clip.width) for clip in batch.meta.clip}
        assert shapes == {bucket}
        assert batch.target.shape[2:4] == opened.latent_size(bucket)
        by_bucket[bucket] += batch.meta.clip.tolist()
        assert batch.meta.element.tolist() == list(range(4 * step, 4 * step + 4))
    orders = []
    for bucket, stream in by_bucket.items():
        size = len(SIZES[bucket])
        epochs = [tuple(stream[i : i + size]) for i in range(0, len(stream) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        orders += [len(set(epochs))]
    assert max(orders) > 1, "every epoch has the same order"


def test_the_stream_goes_on_exactly_with_other_threads(dataset) -> None:
    folder, _ = dataset
    _, whole = take(folder, 9)
    opened, _ = take(folder, 4, threads=1, buffer=2)
    _, rest = take(folder, 5, state=opened.get_state(), threads=8, buffer=3)
    assert [bits(b) for b in whole[4:]] == [bits(b) for b in rest]


def test_a_closed_stream_reads_no_more(dataset) -> None:
    before = set(threading.enumerate())
    opened, _ = take(dataset[0], 1, threads=3, buffer=8)
    reading = set(threading.enumerate()) - before
    assert reading
    opened.close()
    for thread in reading:
        thread.join(60)
        assert not thread.is_alive()


def test_buckets_with_too_few_clips_are_left_out(dataset) -> None:
    folder, _ = dataset
    sizes = {bucket: len(lengths) for bucket, lengths in SIZES.items()}
    least = max(sizes.values())
    assert min(sizes.values()) < least
    opened, _ = take(folder, 12, min_clips=least)
    kept = {bucket for bucket, count in sizes.items() if count == least}
    assert set(opened.buckets) == kept == {opened.bucket_at(step) for step in range(12)}
    _, line = summary.data_lines(opened, 1)
    assert line.startswith("left out     ") and f"fewer than {least} (--data.min-clips)" in line
    for (height, width), count in sizes.items():
        assert (f"{height}x{width}: {count}" in line) == (count < least)
    with pytest.raises(DatasetError, match=rf"has {least + 1} clips .*; the largest has {least}"):
        take(folder, 0, min_clips=least + 1)


@pytest.mark.parametrize("batch", [1, 4, 24])
def test_as_many_samples_are_read_ahead_as_was_asked_for(dataset, monkeypatch, batch) -> None:
    """Whatever the batch: read-ahead must not grow with it."""
    folder, _ = dataset
    reads, read = [], records.VideoSource.__getitem__

    def counted(source: records.VideoSource, number: int) -> records.Record:
        reads.append(source)
        return read(source, number)

    monkeypatch.setattr(records.VideoSource, "__getitem__", counted)
    cfg = DataConfig(path=str(folder), buffer=6, threads=3)
    loader = open_loader(cfg, packing.parse(INVERTED), batch)
    reads.clear()
    next(loader)
    before = -1
    while before != len(reads):
        before = len(reads)
        time.sleep(0.2)
    loader.close()
    # Threads of loaders of other tests may still read.
    mine = sum(source is loader.datasets[0].source for source in reads)
    assert batch + 1 <= mine <= batch + 6 + 3


def test_hosts_share_the_same_batches(dataset) -> None:
    folder, _ = dataset
    _, whole = take(folder, 6)
    first, _ = take(folder, 3, share=(0, 2))
    state = first.get_state()
    halves = [take(folder, 3, share=(i, 2), state=state)[1] for i in range(2)]
    for batch, *parts in zip(whole[3:], *halves, strict=True):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        order = np.argsort(joined.meta.element)
        assert bits(jax.tree.map(lambda x, o=order: x[o], joined)) == bits(batch)


def test_captions_are_dropped_for_the_empty_prompt(dataset) -> None:
    folder, clips = dataset
    text, pooled = records.read_empty(folder, records.read_index(folder))
    _, batches = take(folder, 40, caption_dropout=0.3)
    _, kept = take(folder, 40)
    dropped = 0
    for batch, whole in zip(batches, kept, strict=True):
        assert bits((batch.target, batch.meta.clip)) == bits((whole.target, whole.meta.clip))
        for i in range(4):
            is_empty = np.array_equal(batch.conditions.pooled[i], pooled)
            dropped += is_empty
            wanted = text if is_empty else clips[batch.meta.clip[i]].text
            assert batch.conditions.text_valid[i].sum() == len(wanted)
            assert np.array_equal(batch.conditions.text[i, : len(wanted)], wanted)
            assert not batch.conditions.text[i, len(wanted) :].any()
    assert 30 <= dropped <= 66  # 48 of 160 are expected, three standard deviations are 17


def test_random_lengths_cut_clips(dataset) -> None:
    folder, _ = dataset
    _, batches = take(folder, 20, sections="random")
    lengths = collections.defaultdict(set)
    for batch in batches:
        for clip, sections in zip(batch.meta.clip, batch.meta.sections, strict=True):
            lengths[int(clip)].add(int(sections))
    assert lengths[2] == {1, 2, 3, 4}  # 9 latent frames


def test_held_out_clips_are_not_trained_on(dataset) -> None:
    """Nor any other of their videos; they are the same in each run."""
    folder, clips = dataset
    opened, batches = take(folder, 40, holdout=3)
    trained = {int(clip) for batch in batches for clip in batch.meta.clip}
    assert trained | set(opened.held) == set(range(len(clips))) and len(opened.held) == 4
    assert not {i // 2 for i in trained} & {i // 2 for i in opened.held}
    # The first of them are of different videos.
    assert len({i // 2 for i in opened.held[:2]}) == 2
    assert take(folder, 0, holdout=4, seed=5)[0].held == opened.held
    assert [r.clip.id for r in opened.held_out_records(2)] == opened.clip_ids(opened.held[:2])


def test_held_out_videos_stay_when_a_dataset_grows() -> None:
    """In whatever order they come: four of 24 videos are new, and only these may be held out in the
    place of others."""
    names = [hashlib.sha256(bytes([i])).hexdigest()[:16] for i in range(24)]

    def held(videos: list[str]) -> set[str]:
        shard = records.Shard("a", 32, 48, (3,) * len(videos), tuple(videos))
        trained, kept = holdout.split(Index("latents", (shard,), {}, 30.0, 4, 8, 16), 10)
        assert sorted(trained + kept) == list(range(len(videos))) and len(kept) == 10
        return {videos[number] for number in kept}

    old, new = held(names[4:] * 2), held(names[:2] + names[:3:-1] * 2 + names[:4] + names[2:4])
    assert len(old) == len(new) == 5
    assert new - set(names[:4]) <= old


@pytest.mark.parametrize("share", [(0, 1), (1, 2)])
def test_validation_sees_every_held_out_clip(dataset, share) -> None:
    folder, _ = dataset
    opened, _ = take(folder, 0, holdout=4)
    # Two samples of each clip, though fewer are asked for than there are clips; in twos.
    whole = opened.held_out(8, 4, 2)
    seen = collections.Counter()
    for batch, others, size in whole:
        assert len(batch.meta.clip) == size and size % 2 == 0 and size <= 4
        unique = dict(zip(batch.meta.element.tolist(), batch.meta.clip.tolist(), strict=True))
        seen.update(unique.values())
        assert bits(batch.context.latents) != bits(others.context.latents)
        assert (batch.meta.clip != others.meta.clip).all()
        assert batch.target.shape == others.target.shape
    assert seen == dict.fromkeys(opened.held, 2)
    assert sum(len(set(b.meta.element.tolist())) for b, *_ in opened.held_out(1, 4, 2)) == 4
    part = take(folder, 0, holdout=4, share=share)[0].held_out(8, 4, 2)
    for (batch, _, size), (mine, _, _) in zip(whole, part, strict=True):
        assert mine.meta.element.tolist() == batch.meta.element.tolist()[share[0] :: share[1]]
        assert len(mine.meta.element) * share[1] == size


def test_a_bucket_of_one_clip_has_no_other(tmp_path) -> None:
    write_dataset(tmp_path, {(32, 48): (3, 3, 3), (48, 32): (3,)})
    opened, _ = take(tmp_path, 0, holdout=1)
    opened.held = opened.streams.pop((48, 32))
    assert opened.held_out(1, 4)[0].others is None


def test_abstract_batches_are_the_real_ones(dataset) -> None:
    folder, _ = dataset
    opened, batches = take(folder, 8, share=(1, 2), windows=(1, 2))
    assert {batch.target.shape[1] for batch in batches} == {1, 2}
    for step, batch in enumerate(batches):
        expected = opened.abstract(opened.bucket_at(step), opened.samples.schedule_of(step))
        real = jax.tree.map(lambda x: ((2 * x.shape[0], *x.shape[1:]), x.dtype), batch)
        there = jax.tree.map(lambda x: (x.shape, x.dtype), expected)
        assert jax.tree.leaves(real) == jax.tree.leaves(there)


def test_another_order_is_refused(dataset) -> None:
    folder, _ = dataset
    old, _ = take(folder, 0)
    fingerprint.check_fingerprint(json.loads(json.dumps(old.fingerprint)), old.fingerprint)
    changes = {"batch": {"batch": 8}, "seed": {"seed": 1}, "holdout": {"holdout": 2}}
    for name, options in changes.items():
        new, _ = take(folder, 0, **options)
        with pytest.raises(DatasetError, match=rf"{name} = .* then, .* now.*--init RUN@STEP"):
            fingerprint.check_fingerprint(old.fingerprint, new.fingerprint)


def test_a_dataset_made_otherwise_is_refused_on_resume(tmp_path) -> None:
    """Another tiling of the VAE, other buckets, other clips."""
    write_dataset(tmp_path)
    index, (old, _) = records.read_index(tmp_path), take(tmp_path, 0)
    for name in ("vae_tiling", "buckets"):
        made = index.fingerprint | {name: "another"}
        records.write_index(tmp_path, dataclasses.replace(index, fingerprint=made))
        with pytest.raises(DatasetError, match=f"made by {name}"):
            fingerprint.check_fingerprint(old.fingerprint, take(tmp_path, 0)[0].fingerprint)
    write_dataset(tmp_path, SIZES | {(32, 48): (7, 4, 9, 5, 4)})
    with pytest.raises(DatasetError, match="records = 'Source"):
        fingerprint.check_fingerprint(old.fingerprint, take(tmp_path, 0)[0].fingerprint)


def test_a_dataset_of_another_bundle_is_refused(dataset) -> None:
    folder, _ = dataset
    index, manifest = records.read_index(folder), bundle.read_manifest(bundle.resolve("random"))
    fingerprint.check_bundle(index, manifest)
    role = manifest.roles["vae"]
    other = dataclasses.replace(role, source=role.source | {"sha256": "0"})
    roles = manifest.roles | {"vae": other}
    with pytest.raises(DatasetError, match="made by another bundle: vae differ"):
        fingerprint.check_bundle(index, dataclasses.replace(manifest, roles=roles))
    with pytest.raises(DatasetError, match="prompt_template differ"):
        fingerprint.check_bundle(index, dataclasses.replace(manifest, prompt_template="{}"))


def test_what_cannot_be_trained_on_is_named(dataset, tmp_path) -> None:
    folder, _ = dataset
    with pytest.raises(DatasetError, match=r"8 of the 8 clips .* shorter than a section of 9"):
        open_loader(DataConfig(path=str(folder)), packing.parse(packing.RELEASED_INVERTED), 4)
    nothing = (
        r"--data\.holdout 7 leaves nothing of the 8 .* 4 videos.* give --data\.holdout 6 or less"
    )
    with pytest.raises(DatasetError, match=nothing):
        take(folder, 0, holdout=7)
    assert take(folder, 0, holdout=6)[0].streams
    with pytest.raises(ValueError, match="does not divide over 3 hosts"):
        take(folder, 0, share=(0, 3))
    with pytest.raises(ValueError, match=r"--data.caption-dropout 1.5"):
        DataConfig(caption_dropout=1.5)
    write_dataset(tmp_path, {})
    with pytest.raises(DatasetError, match=r"is empty; .*rejected.jsonl"):
        take(tmp_path, 0)


def test_a_bucket_that_cannot_be_read_ends_the_stream_with_its_name(tmp_path) -> None:
    """Batches of the same shape, of which no update is made, take the place of what is lost."""
    write_dataset(tmp_path)
    opened, _ = take(tmp_path, 0)
    for bucket in opened.buckets:
        opened.abstract(bucket, packing.parse(INVERTED))
    file = next((tmp_path / records.SHARDS).glob("48x32*"))
    file.write_bytes(file.read_bytes()[:3000])
    array_records._reader.cache_clear()
    with pytest.raises(DatasetError, match=r"48x32-00000-\w+\.arrayrecord.* nor can 2 others"):
        list(itertools.islice(opened, 20))
    assert opened.bucket_at(opened.step) == (48, 32)
    shapes = opened.abstract((48, 32), packing.parse(INVERTED))
    blank = opened.blank(0)
    assert jax.tree.map(np.shape, blank) == jax.tree.map(np.shape, shapes)
    assert (blank.meta.clip == LOST).all()
    assert np.isnan(np.asarray(blank.conditions.pooled, np.float32)).all()


def test_another_clip_takes_the_place_of_one_that_cannot_be_read(dataset, tmp_path) -> None:
    """It is the same clip in any thread, on any host, after a stop; all other samples stay."""
    folder, clips = dataset
    write_dataset(tmp_path)
    damage(tmp_path, clips[1])
    _, intact = take(folder, 9)
    opened, batches = take(tmp_path, 9)
    replaced = 0
    for batch, whole in zip(batches, intact, strict=True):
        for i in range(4):
            sample, before = (jax.tree.map(lambda x, i=i: x[i], b) for b in (batch, whole))
            if before.meta.clip != 1:
                assert bits(sample) == bits(before)
                continue
            replaced += 1
            assert sample.meta.clip == -2 and sample.meta.element == before.meta.element
            others = [
                opened.samples.read(int(sample.meta.element), n, packing.parse(INVERTED))
                for n in (0, 2, 3, 4)
            ]
            assert bits(sample.target) in [bits(other.target) for other in others]
    assert replaced >= 3
    assert opened.fault(0) is None and "record 1, cannot be read" in opened.fault(1)
    path = opened.datasets[0].index.shards[0].path
    assert opened.clip_ids([0, 1]) == [clips[0].clip.id, f"{path}, record 1"]
    assert [bits(b) for b in take(tmp_path, 9, threads=1, buffer=1)[1]] == [
        bits(b) for b in batches
    ]
    state = take(tmp_path, 4)[0].get_state()
    halves = [take(tmp_path, 5, share=(i, 2), state=state)[1] for i in range(2)]
    for batch, *parts in zip(batches[4:], *halves, strict=True):
        joined = jax.tree.map(lambda *x: np.stack(x, 1).reshape(-1, *x[0].shape[1:]), *parts)
        assert bits(joined) == bits(batch)


def test_a_readable_clip_of_a_bucket_is_always_found(tmp_path) -> None:
    """However few there are, and whichever sample asks."""
    clips = write_dataset(tmp_path)
    for number in (5, 6):
        damage(tmp_path, clips[number])
    opened, _ = take(tmp_path, 0)
    for element in range(2000):
        assert opened.samples.read_or_replace(element, 5, packing.parse(INVERTED)).meta.clip == -6
    opened.check_buckets()


def test_a_bucket_of_one_clip_that_cannot_be_read_is_named_before_training(tmp_path) -> None:
    clips = write_dataset(tmp_path, {(32, 48): (3, 3, 3), (48, 32): (3,)})
    damage(tmp_path, clips[3])
    opened, _ = take(tmp_path, 0)
    named = (
        r"48x32-00000-\w+\.arrayrecord, record 0, cannot be read .*; it is the only clip of bucket"
        r" 48x32, which has nothing to train on\. Repair a clip of this bucket, or prepare"
    )
    with pytest.raises(DatasetError, match=named):
        opened.check_buckets()


def test_a_fault_anywhere_in_a_video_is_named(tmp_path) -> None:
    """Also where no frame of one of the sections is damaged."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (181, 32, 48, 3), np.uint8)
    video.write_mp4(tmp_path / "a.mp4", frames, 30)
    data = (tmp_path / "a.mp4").read_bytes()
    late = len(data) * 9 // 10
    (tmp_path / "a.mp4").write_bytes(data[:late] + bytes(4000) + data[late + 4000 :])
    record = random_record(0, 32, 48, 46)._replace(latents=None)
    shards = write_shards(tmp_path, (32, 48), [(records.pack(record), 46)])
    empty = records.write_empty(tmp_path, record.text, record.pooled)
    records.write_index(tmp_path, Index("pixels", tuple(shards), {}, 30.0, 4, 8, 16, empty))
    opened, _ = take(tmp_path, 0)
    assert opened.samples.read(0, 0, packing.parse(INVERTED)).meta.clip == 0
    with pytest.raises(ValueError, match=r"a\.mp4"):
        for element in range(20):
            opened.samples.read(element, 0, packing.parse(INVERTED))
    assert "a.mp4" in opened.fault(0)
    for schedule in (SYMMETRIC, ENDPOINT, *PLANNED, *TAILS):
        with pytest.raises(packing.ScheduleError, match=r"far from a section.*--mode latents"):
            take(tmp_path, 0, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_windows_hold_what_sections_read(schedule) -> None:
    parsed = packing.parse(schedule)
    size = packing.span(parsed)
    for sections in (1, 2, 5, 16):
        length = 1 + 2 * sections
        for section in packing.plan(parsed, sections):
            window = pixel_batch.window_of(section, length, size)
            assert window.first >= 1
            table = [None, 0, *range(window.first, window.first + size)]
            for positions in (section.targets, *(group.reads for group in section.groups)):
                at = pixel_batch.rows(positions, window)
                read = [table[row] for row in at]
                assert read == [None if p == packing.MISSING else p for p in positions]
