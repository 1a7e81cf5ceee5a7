"""Importance of history: order by similarity in closed form, and what it leaves as it is."""

import numpy as np
import pytest

from framepack_jax import bundle, packing
from framepack_jax.generation import encoding
from framepack_jax.generation.pipeline import FramePack
from framepack_jax.packing import MISSING, ScheduleError, Timeline, importance
from tests.fixtures.loading import bits, take
from tests.fixtures.training_data import write_dataset

VANILLA = "td_f4k4f2k2f1k1_g2"


def at_angles(*degrees: float) -> Timeline:
    """A timeline of frames whose cells all point in one direction."""
    angles = np.radians(degrees)
    frames = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None, None]
    # Lengths do not count.
    sizes = np.arange(1, 1 + len(degrees))[:, None, None, None]
    return Timeline.of(np.tile(frames * sizes, (1, 2, 3, 1))[None])


def section_of(text: str, number: int) -> tuple[packing.Section, packing.Schedule]:
    schedule = packing.parse(text)
    return packing.plan(schedule, number + 1)[number], schedule


def ordered(text: str, timeline: Timeline, number: int = 3, fps: float = 7.5) -> packing.Section:
    section, schedule = section_of(text, number)
    estimate = at_angles(0).latents[:, 0]
    return packing.by_importance(section, schedule, timeline, estimate, fps)[0]


def test_the_most_similar_frames_keep_the_most_detail() -> None:
    """Section 3 makes positions 7 and 8; frames before it are given by their angles."""
    timeline = at_angles(50, 10, 40, 0, 80, 20, 60, 0, 0)
    frames, estimate = timeline.latents[0], at_angles(0).latents[0, 0]
    cosines = importance.sim_cos(frames, estimate)
    np.testing.assert_allclose(cosines[:3], np.cos(np.radians([50, 10, 40])), rtol=1e-6)
    section = ordered(f"{VANILLA}~cos", timeline)
    usual, _ = section_of(VANILLA, 3)
    # By similarity: 3, then 1 and 5, then 2, 0, 6, 4; in a group by time.
    assert [group.reads for group in section.groups] == [(0, 2, 4, 6), (1, 5), (3,)]
    assert [group.reads for group in usual.groups] == [(0, 1, 2, 3), (4, 5), (6,)]
    # RoPE indices follow the frames.
    index = {p: i for g in usual.groups for p, i in zip(g.reads, g.indices, strict=True)}
    for group in section.groups:
        assert group.indices == tuple(index[position] for position in group.reads)
    assert (section.targets, section.indices) == (usual.targets, usual.indices)


def test_all_positions_are_read_and_places_without_frames_are_missing() -> None:
    """Position 0 lies beyond the reach of the schedule in order of time."""
    timeline = at_angles(0, *range(80, 10, -10))
    made = ordered("td_f2k2f1k1_g2~cos", timeline)
    assert [group.reads for group in made.groups] == [(5, 6), (0,)]
    assert made.groups[1].indices == (made.indices[0] - 7,)
    few, usual = ordered(f"{VANILLA}~cos", timeline, 1), section_of(VANILLA, 1)[0]
    assert [group.reads for group in few.groups] == [(MISSING,) * 4, (1, 2), (0,)]
    assert few.groups[0].indices == usual.groups[0].indices


def test_nearness_in_time_is_added_with_its_weight() -> None:
    timeline = at_angles(50, 10, 40, 0, 80, 20, 60, 0, 0)
    near = ordered(f"{VANILLA}~hybrid(1000)", timeline, fps=1.5)
    assert near.groups == section_of(VANILLA, 3)[0].groups
    assert ordered(f"{VANILLA}~hybrid(0)", timeline) == ordered(f"{VANILLA}~cos", timeline)
    # Two frames a second; the middle of the section is at 7.5.
    distance = (7.5 - np.arange(7)) / 2
    weights = np.cos(np.radians([50, 10, 40, 0, 80, 20, 60])) + 0.7 * np.exp(-(distance**2))
    section, schedule = section_of(f"{VANILLA}~hybrid(0.7)", 3)
    estimate = at_angles(0).latents[0, 0]
    ranked = importance.rank(section, schedule, timeline.latents[0, :7], estimate, 2)
    # By the cosine alone it would be 3, 1, 5, 2, 0, 6, 4.
    assert ranked == np.argsort(-weights).tolist() == [5, 3, 1, 6, 2, 0, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{VANILLA}~", "importance '': expected ~cos, or .* ~hybrid"),
        (f"{VANILLA}~time", "importance 'time': expected ~cos"),
        (f"{VANILLA}~hybrid(-1)", "expected ~cos"),
        ("f1k1_x_g2_f1k1f2k2_td~cos", "in order 'inverted': expected the order forward"),
        (f"{VANILLA}_x_f1k1~cos", "in order 'endpoint'"),
        ("ta_f2k2f1k1_g2~cos", "with the tail ta: .* expected td"),
        ("g9~cos", "reads no history"),
    ],
)
def test_what_cannot_be_ordered_is_refused_where_it_is_parsed(text: str, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        packing.parse(text)


def test_a_schedule_prints_what_was_parsed() -> None:
    for text in (f"{VANILLA}~cos", "f1k1_x_f2k2f1k1_g2+D~hybrid(0.5)"):
        assert str(packing.parse(text)) == text
        assert packing.parse(text).with_window(5).importance == packing.parse(text).importance


@pytest.mark.parametrize("text", [f"{VANILLA}~hybrid(0.02)", "f1k1_x_f4k4f2k2f1k1_g2~cos"])
def test_a_sample_is_what_sampling_reads(tmp_path, text: str) -> None:
    clips = write_dataset(tmp_path, {(32, 48): (9, 9, 9, 11)})
    pipe = FramePack.open(bundle.resolve("random"), schedule=packing.parse(text))
    _, batches = take(tmp_path, 6, schedule=text, estimate="last")
    moved = 0
    for batch in batches:
        for i, (number, clip) in enumerate(zip(batch.meta.section, batch.meta.clip, strict=True)):
            latents = np.asarray(clips[clip].latents, np.float32)
            section = packing.plan(pipe.schedule, number + 1)[number]
            timeline = Timeline(section.targets[-1] + 1, latents.shape[1:])
            timeline.write(range(section.targets[0]), latents[None, : section.targets[0]])
            read = encoding.by_importance(pipe, section, timeline)
            moved += read != [section]
            context = packing.read_each(read, timeline)
            for ours, theirs in zip(context.latents, batch.context.latents, strict=True):
                np.testing.assert_array_equal(ours[0], theirs[i].astype(np.float32))
            for ours, theirs in zip(context.indices, batch.context.indices, strict=True):
                np.testing.assert_array_equal(ours[0], theirs[i])
    assert moved > 3
    # Of the true section with noise, another order; the same each time.
    _, first = take(tmp_path, 6, schedule=text)
    _, again = take(tmp_path, 6, schedule=text)
    assert bits(first) == bits(again) != bits(batches)


def test_each_sample_of_a_batch_has_an_order_of_its_own() -> None:
    one, two = at_angles(50, 10, 40, 0, 80, 20, 60), at_angles(0, 10, 20, 30, 40, 50, 60)
    timeline = Timeline.of(np.concatenate([one.latents, two.latents]))
    section, schedule = section_of(f"{VANILLA}~cos", 3)
    estimate = np.tile(at_angles(0).latents[:, 0], (2, 1, 1, 1))
    made = packing.by_importance(section, schedule, timeline, estimate, 7.5)
    context = packing.read_each(made, timeline)
    np.testing.assert_array_equal(context.latents[2][0, 0], one.latents[0, 3])
    np.testing.assert_array_equal(context.latents[2][1, 0], two.latents[0, 0])
    assert context.indices[2].shape == (2, 1) and context.indices[2][0] != context.indices[2][1]
    history = [group.reads for group in packing.without_history(made[1], schedule).groups]
    assert history == [(MISSING,) * 4, (MISSING,) * 2, (0,)]
