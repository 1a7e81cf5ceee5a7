"""Check what the models of the demo world must be able to do; exit with code 1 if they cannot.

    python scripts/toy_gates.py vae --bundle outputs/world/vae/bundle
    python scripts/toy_gates.py sections history --bundle outputs/world/sketch/bundle --size 64x64
    python scripts/toy_gates.py hidden drift --bundle tiny --output outputs/gates
    python scripts/toy_gates.py assets

vae       PSNR within 3 pixels of a sprite or a wall, and identity, after encoding and decoding 64
          held-out scenes.
sections  Loss at noise level 1 with true history, of sections 1 to 3 against section 0.
history   Rise of the loss at noise level 0.9 with the oldest context of another clip.
hidden    Share of videos in which a sprite hidden for 1 and 2 s is itself again, and what it loses
          without that context.
drift     Drift of identity, caption agreement and motion over 20 s.
assets    Bytes of the bundles in the package.

`hidden` and `drift` sample videos into --output, and go on from there if they are run again.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from framepack_jax import bundle, packing
from framepack_jax.data.batch import Batch
from framepack_jax.data.precompute import Encoder
from framepack_jax.data.records import Clip
from framepack_jax.data.samples import conditions_of, latent_sample, make_meta
from framepack_jax.evaluation.drift import Estimate, drift, estimate, mean
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.toy import baselines, evaluation, results, rows, scenes, suites, world
from framepack_jax.training import flow_matching, state
from framepack_jax.training.config import TrainConfig

SEED = 11
NEAR = 3
"""Pixels from a border that count as near it."""
CLIP = 17
"""Frames of a scene that `vae` encodes."""
ASSETS = Path(__file__).resolve().parents[1] / "framepack_jax" / "assets"
MOST_BYTES = 25e6
Gate = Literal["vae", "sections", "history", "hidden", "drift", "assets"]


@dataclasses.dataclass(frozen=True)
class Gates:
    """Check the models of the demo world."""

    gates: Annotated[tuple[Gate, ...], tyro.conf.Positional]
    """What to check."""
    bundle: str = "tiny"
    """The bundle."""
    size: str = "128x128"
    """Height and width in pixels."""
    output: Path = Path("outputs/gates")
    """Folder of the videos."""
    scenes: int = 64
    """Number of scenes, or of videos for each figure of hidden and drift, at most 32 there."""
    steps: int = 10
    """Denoising steps."""
    guidance: float = 10.0
    """What the network's guidance input has."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width. Raises ValueError."""
        match = re.fullmatch(r"(\d+)x(\d+)", self.size)
        if not match:
            raise ValueError(f"--size {self.size}: expected HEIGHTxWIDTH, as 128x128")
        return int(match[1]), int(match[2])


@dataclasses.dataclass(frozen=True)
class Check:
    """A figure with its standard error, and the range that it must be in."""

    name: str
    value: float
    error: float
    low: float = -np.inf
    high: float = np.inf

    @property
    def passed(self) -> bool:
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        expected = " and ".join(
            f"{word} {limit:.4g}"
            for word, limit in (("at least", self.low), ("at most", self.high))
            if np.isfinite(limit)
        )
        return (
            f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.value:.4g} ±"
            f" {self.error:.2g}, expected {expected}"
        )


def main(args: Sequence[str] | None = None) -> None:
    """Check the gates, print a line for each figure, and exit with code 1 if one has failed."""
    flags = tyro.cli(Gates, args=args)
    checks = {
        "vae": vae, "sections": sections, "history": history, "hidden": hidden, "drift": drifting,
        "assets": assets,
    }  # fmt: skip
    failed = False
    for gate in flags.gates:
        for check in checks[gate](flags):
            print(f"{gate}: {check}", flush=True)
            failed |= not check.passed
    sys.exit(failed)


def vae(flags: Gates) -> Iterator[Check]:
    """Encode and decode the beginnings of held-out scenes."""
    pipe = FramePack.open(bundle.resolve(flags.bundle)).with_weights(bundle.resolve(flags.bundle))
    ratios, kept = [], []
    for case in scenes.drift_cases(SEED, flags.scenes, CLIP, flags.pixels, "vae"):
        truth = case.truth()
        made = baselines.reconstructed(pipe, truth)
        near = np.stack([near_borders(case.scene, number) for number in range(CLIP)])
        wrong = np.square(made[near].astype(np.float64) - truth[near]).mean()
        ratios.append(10 * np.log10(255**2 / wrong))
        kept.append(mean(scenes.drift_figures(case, made)["identity"]))
    yield at_least("PSNR near sprites and walls, dB", estimate(ratios), 27)
    yield at_least("identity", estimate(kept), 0.95)


def near_borders(scene: world.Scene, number: int) -> np.ndarray:
    """Return the pixels (H, W) within NEAR of the border of a sprite or a wall in a frame."""
    covers = [*world.masks(scene, number)]
    if scene.wall is not None:
        middle, wide = scene.wall
        columns = np.abs((np.arange(scene.width) + 0.5) / scene.height - middle) < wide / 2
        covers.append(np.broadcast_to(columns[None], (scene.height, scene.width)))
    near = np.zeros((scene.height, scene.width), bool)
    for cover in covers:
        inside = (cover >= 0.5).astype(np.uint8)
        kernel = np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)
        outside = {"borderType": cv2.BORDER_REPLICATE}
        near |= cv2.dilate(inside, kernel, **outside) > cv2.erode(inside, kernel, **outside)
    return near


def sections(flags: Gates) -> Iterator[Check]:
    """Compare the losses of later sections with that of the first, where sampling starts."""
    held = HeldOut(flags)
    first, *others = (held.losses(number, 1.0) for number in range(4))
    for number, later in enumerate(others, start=1):
        found = estimate(later - first)
        assert found is not None and found.error is not None
        name = f"rise of the loss from section 0 ({first.mean():.4f}) to {number}"
        yield Check(name, found.mean, found.error, high=2 * found.error)


def history(flags: Gates) -> Iterator[Check]:
    """Take the oldest context from another clip."""
    held = HeldOut(flags)
    own = np.concatenate([held.losses(number, 0.9) for number in range(1, 4)])
    swapped = np.concatenate([held.losses(number, 0.9, "k4") for number in range(1, 4)])
    found = estimate((swapped - own) / own.mean())
    assert found is not None and found.error is not None
    name = "rise of the loss with the k4 context of another clip, relative"
    yield Check(name, found.mean, found.error, low=max(0.05, 10 * found.error))


class HeldOut:
    """Sections of held-out scenes, and the losses of a bundle on them."""

    def __init__(self, flags: Gates) -> None:
        path = bundle.resolve(flags.bundle)
        manifest = bundle.read_manifest(path)
        self.schedule = manifest.schedule
        self.plan = packing.plan(self.schedule, 4)
        cfg = TrainConfig(guidance=flags.guidance, dtype="float32", remat="none")
        model = state.model_of(cfg, manifest)
        params = bundle.load_params(path, manifest, "transformer", dtype=jnp.float32)
        encoder = Encoder.load(path, manifest, pixels=False)
        seconds = (1 + 4 * packing.length(self.plan)) / world.FPS
        self.records = []
        for number in range(flags.scenes):
            scene = world.scene(SEED, number, *flags.pixels, split="held-out")
            frames = np.stack(list(world.frames(scene, seconds)))
            clip = Clip(
                f"{number}-0", str(number), 0.0, len(frames), *flags.pixels, scene.caption, {}
            )
            self.records.extend(encoder.records([clip], frames))

        @jax.jit
        def losses(batch: Batch, context: packing.PackedContext, sigma: jax.Array) -> jax.Array:
            keys = flow_matching.sample_keys(jax.random.key(SEED), batch.meta.element)
            changed = batch.replace(context=context)
            levels = jnp.full(keys.shape, sigma)
            wanted = flow_matching.examples(changed, keys, levels)
            return flow_matching.sample_losses(cfg, model, params, changed, keys, wanted)

        self._losses = losses

    def losses(self, number: int, sigma: float, swapped: str = "", size: int = 16) -> np.ndarray:
        """Return the losses (scenes,) of a section, with the context under the kernel `swapped`
        taken from the next scene."""
        section, tokens = self.plan[number], max(len(record.text) for record in self.records)
        samples = [
            latent_sample(
                record, section, conditions_of(record, tokens), make_meta(i, number, 4, i)
            )
            for i, record in enumerate(self.records)
        ]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *samples)
        others = jax.tree.map(lambda leaf: np.roll(leaf, 1, axis=0), batch.context)
        groups = np.asarray(batch.context.kernels) == swapped
        context = flow_matching.changed_context(batch.context, others, ~groups & False, groups)
        parts = [slice(first, first + size) for first in range(0, len(samples), size)]
        cut = [jax.tree.map(lambda leaf, part=part: leaf[part], (batch, context)) for part in parts]
        return np.concatenate([np.asarray(self._losses(*each, sigma)) for each in cut])


def hidden(flags: Gates) -> Iterator[Check]:
    """Hide a sprite behind a wall, and see whether it comes back as itself."""
    for seconds in (1.0, 2.0):
        found = sampled(flags, seconds=(), hidden=(seconds,))
        with_it, without = (
            np.asarray([float(f["identity"]) for f in found[row].values()])
            for row in ("model", "model, without k4")
        )
        yield at_least(f"itself again after {seconds:g} s", estimate(with_it), 0.8)
        lost = estimate(with_it - without)
        assert lost is not None and lost.error is not None
        name = f"lost without k4 after {seconds:g} s"
        yield Check(name, lost.mean, lost.error, low=2 * lost.error)


def drifting(flags: Gates) -> Iterator[Check]:
    """Sample videos of 20 s."""
    found = sampled(flags, seconds=(20.0,), hidden=())
    made, truth = (list(found[row].values()) for row in ("model", suites.TRUTH))
    lost = estimate(drift(f["identity"]) for f in made)
    assert lost is not None and lost.error is not None
    yield Check("drift of identity over 20 s", lost.mean, lost.error, high=0.05)
    yield at_least("caption agreement", estimate(mean(f["caption"]) for f in made), 0.9)
    moved = [mean(f["dynamics"]) for f in made]
    usual = mean(np.asarray([mean(f["dynamics"]) for f in truth]))
    ratio = estimate(value / usual for value in moved)
    assert ratio is not None and ratio.error is not None
    yield Check("motion over the truth's", ratio.mean, ratio.error, low=0.8, high=1.2)


def sampled(
    flags: Gates, seconds: tuple[float, ...], hidden: tuple[float, ...]
) -> dict[str, dict[str, scenes.Figures]]:
    """Sample what is missing of one suite; return the metrics of each row and case."""
    settings = Settings(steps=flags.steps, distilled_guidance=flags.guidance)
    count = min(flags.scenes, 32)
    cfg = evaluation.EvaluationConfig(
        output=flags.output,
        rows=(rows.RowSpec(flags.bundle, "model", settings=settings),),
        videos=count if seconds else 0,
        seconds=seconds,
        occlusion_videos=count if hidden else 0,
        occlusion_seconds=hidden,
        prompt_pairs=0,
        pair_seconds=0,
        size=flags.pixels,
        settings=settings,
        seed=SEED,
        batch=8,
        dtype=None,
    )
    models = rows.open_models(cfg.rows, cfg.dtype)
    results.begin(cfg.output, evaluation.record(cfg, models))
    wanted = ("model", "model, without k4", suites.TRUTH)
    (suite,) = evaluation.parts(cfg, models)
    suite = dataclasses.replace(suite, rows=[row for row in suite.rows if row.name in wanted])
    evaluation.make_all(cfg.output, [suite], models, settings, cfg.batch)
    return {row.name: evaluation.figures(cfg.output, row, suite) for row in suite.rows}


def assets(flags: Gates) -> Iterator[Check]:
    """Add up the files of the package's bundles."""
    total = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    yield Check("MB of assets in the package", total / 1e6, 0, high=MOST_BYTES / 1e6)


def at_least(name: str, found: Estimate | None, low: float) -> Check:
    """Return a check of a mean that must not be smaller."""
    assert found is not None and found.error is not None, f"{name}: no video has a value"
    return Check(name, found.mean, found.error, low=low)


if __name__ == "__main__":
    main()
