"""The draws of a sample: which section of which video, and what is left out."""

import collections
import contextlib

import numpy as np
import pytest

from framepack_jax import packing
from framepack_jax.data.config import DataConfig
from framepack_jax.data.holdout import FIRST_ELEMENT
from framepack_jax.data.loader import open_loader
from framepack_jax.data.samples import choose_section
from framepack_jax.packing import MISSING
from tests.fixtures.loading import F1, INVERTED, bits, take
from tests.fixtures.training_data import write_dataset

DRAWS = 20_000
FORWARD = packing.parse(packing.RELEASED_F1)


def shares(cfg: DataConfig, length: int = 37) -> tuple[list[float], float]:
    """Share of each section of a clip of four, and of samples whose history is complete."""
    rng, sections, complete = np.random.default_rng(0), collections.Counter(), 0
    for _ in range(DRAWS):
        section, number, count, _ = choose_section(rng, FORWARD, length, cfg)
        assert count == (length - 1) // 9
        sections[number] += 1
        complete += not any(MISSING in group.reads for group in section.groups)
    return [sections[i] / DRAWS for i in range(count)], complete / DRAWS


@pytest.mark.parametrize("sections", ["whole", "random"])
def test_forward_sections_are_drawn_equally_often(sections) -> None:
    """Also with random lengths, which gave the first of four more than half of the samples."""
    found, complete = shares(DataConfig(sections=sections))
    np.testing.assert_allclose(found, 0.25, atol=0.02)
    assert abs(complete - 0.5) < 0.02


def test_sections_are_drawn_by_their_weights() -> None:
    """The last weight holds for all that follow."""
    found, complete = shares(DataConfig(section_weights=(1.0, 3.0, 2.0)))
    np.testing.assert_allclose(found, [1 / 8, 3 / 8, 2 / 8, 2 / 8], atol=0.02)
    assert abs(complete - 0.5) < 0.02
    with pytest.raises(ValueError, match=r"--data.section-weights 1 0: expected numbers above 0"):
        DataConfig(section_weights=(1.0, 0.0))


def test_samples_of_an_empty_start_are_those_of_a_video_from_text(dataset) -> None:
    """Counted; in sections, context and image tokens they are as sampling reads them."""
    folder, clips = dataset
    _, batches = take(folder, 60, schedule=F1, empty_start=0.4, caption_dropout=0.0)
    schedule, empty, first = packing.parse(F1), 0, 0
    for batch in batches:
        for i in range(4):
            latents = clips[batch.meta.clip[i]].latents
            number, sections = int(batch.meta.section[i]), int(batch.meta.sections[i])
            from_text = not batch.conditions.image[i].any()
            plan = packing.plan(schedule, sections, before=0 if from_text else None)
            wanted = latents[list(plan[number].targets)]
            np.testing.assert_array_equal(batch.target[i], wanted)
            known = [x[i].any(axis=(1, 2, 3)) for x in batch.context.latents]
            for there, group in zip(known, plan[number].groups, strict=True):
                np.testing.assert_array_equal(there, [p != MISSING for p in group.reads])
            given = np.concatenate([x[i] for x in batch.given])
            reads = np.concatenate([group.reads for group in plan[number].groups])
            np.testing.assert_array_equal(given, (reads == 0) & (not from_text))
            empty += from_text
            first += from_text and number == 0
    assert abs(empty / 240 - 0.4) < 0.1 and 10 < first < empty


def test_image_tokens_are_dropped_as_often_as_configured(dataset) -> None:
    folder, _ = dataset
    _, batches = take(folder, 60, image_dropout=0.3)
    _, whole = take(folder, 60)
    kept = 0
    for batch, other in zip(batches, whole, strict=True):
        for i in range(4):
            there = bits(batch.conditions.image[i]) == bits(other.conditions.image[i])
            assert there or not batch.conditions.image[i].any()
            kept += there
        assert bits((batch.target, batch.context)) == bits((other.target, other.context))
    assert abs(kept / 240 - 0.7) < 0.09


@pytest.mark.parametrize("chunk", [0, 2])
def test_an_empty_start_is_refused_where_it_cannot_be(tmp_path, chunk) -> None:
    write_dataset(tmp_path, {(32, 48): (6, 8)}, chunk=chunk)
    cfg = DataConfig(path=str(tmp_path), empty_start=0.1)
    why = "start with nothing known anyway" if chunk else "in order 'inverted' read a start image"
    with pytest.raises(ValueError, match=rf"--data.empty-start 0.1: .*{why}"):
        open_loader(cfg, packing.parse(F1 if chunk else INVERTED), 2)
    with pytest.raises(ValueError, match=r"--data.empty-start 1.5: expected a fraction"):
        DataConfig(empty_start=1.5)


def test_numbers_of_samples_stay_below_those_of_held_out_ones(dataset) -> None:
    """Beyond them they begin again, so that keys and 32 bits suffice for any run."""
    folder, _ = dataset
    cfg = DataConfig(path=str(folder), seed=1)
    with contextlib.closing(open_loader(cfg, packing.parse(F1), 4)) as opened:
        for element in (FIRST_ELEMENT + 5, 7 * FIRST_ELEMENT + 5):
            sample = opened.samples.training(element, 0)
            assert sample.meta.element == 5
            assert bits(sample) == bits(opened.samples.training(5, 0))
