"""Measure how much captions decide what happens, without sampling a video.

    python benchmarks/captions.py --bundle tiny [--size 128x128] [--pairs 16] [--json FILE]

Held-out videos of the demo world come in pairs: they begin alike, and one sprite moves differently.
The figure is the loss of a video's first section under the other caption, minus the loss under its
own caption, with the same noise. It is 0 if the model ignores captions. The upper bound, printed
beside it, is the mean square of the difference of the pair. Takes a minute on two cores; sampling
as many videos takes ten.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from framepack_jax import bundle, packing
from framepack_jax.data.batch import Batch
from framepack_jax.data.precompute import Encoder
from framepack_jax.data.records import Clip
from framepack_jax.data.samples import conditions_of, latent_sample, make_meta
from framepack_jax.evaluation.drift import estimate
from framepack_jax.toy import world
from framepack_jax.training import flow_matching, state
from framepack_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class CaptionBenchmark:
    """Measure how much a bundle follows captions."""

    bundle: str = "tiny"
    """The bundle."""
    size: str = "128x128"
    """Height and width in pixels."""
    pairs: int = 16
    """Pairs of held-out videos."""
    sigmas: tuple[float, ...] = (0.5, 0.8, 0.95, 1.0)
    """Noise levels."""
    guidance: float = 10.0
    """What the network's guidance input has."""
    seed: int = 5
    """Of the scenes."""
    json: Path | None = None
    """Keep the figures here."""


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the figures."""
    flags = tyro.cli(CaptionBenchmark, args=args)
    match = re.fullmatch(r"(\d+)x(\d+)", flags.size)
    if not match:
        raise SystemExit(f"error: --size {flags.size}: expected HEIGHTxWIDTH, as 128x128")
    figures = measure(flags, (int(match[1]), int(match[2])))
    print(f"no doubt: {figures['no_doubt']:.4f}")
    for sigma, found in figures["sigmas"].items():
        rise, error = found["rise"], found["error"]
        print(f"sigma {sigma}: loss {found['loss']:.4f}, rise {rise:.5f} +- {error:.5f}")
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def measure(flags: CaptionBenchmark, size: tuple[int, int]) -> dict[str, Any]:
    """Return losses, their rise by noise level, and the upper bound of the rise."""
    path = bundle.resolve(flags.bundle)
    manifest = bundle.read_manifest(path)
    cfg = TrainConfig(guidance=flags.guidance, dtype="float32", remat="none")
    model = state.model_of(cfg, manifest)
    params = bundle.load_params(path, manifest, "transformer", dtype=jnp.float32)
    own = batch_of(flags, size, Encoder.load(path, manifest, pixels=False), manifest)
    other = np.arange(2 * flags.pairs) ^ 1
    text, valid, pooled = (
        x[other] for x in (own.conditions.text, own.conditions.text_valid, own.conditions.pooled)
    )
    theirs = own.conditions.replace(text=text, text_valid=valid, pooled=pooled)
    swapped = own.replace(conditions=theirs)
    keys = flow_matching.sample_keys(jax.random.key(flags.seed), own.meta.element)
    losses = jax.jit(
        lambda batch, sigma: flow_matching.sample_losses(
            cfg,
            model,
            params,
            batch,
            keys,
            flow_matching.examples(batch, keys, jnp.full(keys.shape, sigma)),
        )
    )
    sigmas = {}
    for sigma in flags.sigmas:
        loss, theirs = (np.asarray(losses(batch, sigma)) for batch in (own, swapped))
        rise = estimate(theirs - loss)
        sigmas[str(sigma)] = {"loss": float(loss.mean()), "rise": rise.mean, "error": rise.error}
    target = np.asarray(own.target, np.float32)
    return {"no_doubt": float(np.mean((target - target[other]) ** 2)), "sigmas": sigmas}


def batch_of(
    flags: CaptionBenchmark, size: tuple[int, int], encoder: Encoder, manifest: bundle.Manifest
) -> Batch:
    """Batch the first sections of all videos; both of a pair have the same noise."""
    section = packing.plan(manifest.schedule, 1)[0]
    frames = 1 + 4 * manifest.schedule.window
    samples = []
    for number in range(flags.pairs):
        for scene in world.counterfactual(flags.seed, number, *size):
            clip = Clip(f"{number}-0", str(number), 0.0, frames, *size, scene.caption, {})
            pictures = np.stack(list(world.frames(scene, frames / world.FPS)))
            (record,) = encoder.records([clip], pictures)
            meta = make_meta(number, section=0, sections=1, clip=number)
            samples.append(latent_sample(record, section, conditions_of(record), meta))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)


if __name__ == "__main__":
    main()
