"""Bars and previews of a video while it is sampled."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from framepack_jax.jobs.progress import Progress
from framepack_jax.models.registry import NETWORKS

STEPS = {1: 8, 2: 5}  # of each section; the first is done


@pytest.fixture
def shown(tmp_path):
    """Progress of a video of three sections with blocks in host memory, and its folder."""
    task = SimpleNamespace(
        layout=SimpleNamespace(plan=[None] * 3),
        run=SimpleNamespace(folder=tmp_path),
        on_progress=None,
    )
    with Progress([task], 1, 4, STEPS.__getitem__, NETWORKS["hunyuan_vae"].preview) as progress:
        yield progress, tmp_path / "preview.png"


def test_every_quarter_of_a_section_is_shown(shown) -> None:
    progress, preview = shown
    counted, pictures = [], []
    for section, steps in STEPS.items():
        for step in range(steps):
            for _ in range(3):
                progress.block()
            progress.step(section, step, jnp.zeros((1, 2, 4, 4, 16)))
            sections, bar, blocks = progress.bars
            counted.append((sections.n, bar.n, bar.total, blocks.n))
            if preview.exists():
                pictures.append((section, step + 1))
                preview.unlink()
    first = [(1 + (step == 8), step, 8, 0) for step in range(1, 9)]
    assert counted == first + [(2 + (step == 5), step, 5, 0) for step in range(1, 6)]
    assert pictures == [(1, 2), (1, 4), (1, 6), (1, 8), (2, 1), (2, 2), (2, 4), (2, 5)]


def test_latents_without_a_fit_of_colours_are_not_shown(shown) -> None:
    progress, preview = shown
    progress.step(1, 7, jnp.zeros((1, 2, 4, 4, 5)))
    assert not preview.exists()
    progress.step(1, 7, jnp.full((1, 2, 4, 4, 16), np.nan))
    assert preview.exists()


def test_a_task_is_told_its_sampled_fraction_and_can_stop(shown) -> None:
    progress, _ = shown
    fractions = []
    (task,) = progress.tasks
    task.on_progress = fractions.append
    for section, step in ((1, 3), (1, 7), (2, 0), (2, 4)):
        progress.steps = STEPS[section]
        progress.step(section, step, jnp.zeros((1, 2, 4, 4, 5)))
    np.testing.assert_allclose(fractions, [1.5 / 3, 2 / 3, 2.2 / 3, 1])

    def stop(_: float) -> None:
        raise KeyboardInterrupt

    task.on_progress = stop
    with pytest.raises(KeyboardInterrupt):
        progress.step(1, 3, jnp.zeros((1, 2, 4, 4, 5)))
