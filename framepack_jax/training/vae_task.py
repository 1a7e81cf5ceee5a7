"""Train a VAE to reconstruct short clips.

The loss is the error of the reconstruction of a clip, plus that of its first frame alone (a start
image is encoded so), plus a small weight times the KL divergence of the latents from a normal
distribution (HunyuanVideo, arXiv 2412.03603, section 4.1, without the perceptual and the
adversarial term). The exported bundle has `latent_mean` and `latent_std` of the latents of training
clips, so a transformer sees each channel with mean 0 and variance 1.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle
from framepack_jax.data.pixel_batch import signed
from framepack_jax.data.vae_clips import Clips, ListedVideo, find_videos, hold_out
from framepack_jax.models.network_spec import VaeSpec
from framepack_jax.models.quantization import cast_params
from framepack_jax.parallel.sharding import BATCH, constrain
from framepack_jax.training import checkpoints, draws, optimizer, summary, vae_losses
from framepack_jax.training.prefetch import batch_sharding, check_batch, local_share
from framepack_jax.training.resume_checks import changed_warmup, raise_if_changed
from framepack_jax.training.state import Params, TrainState
from framepack_jax.training.task import Record, StepMetrics, Validator
from framepack_jax.training.vae_config import VaeTrainConfig
from framepack_jax.training.vae_validation import middle_clips, psnr, validate
from framepack_jax.utils.compare import differences
from framepack_jax.utils.messages import shorten
from framepack_jax.utils.progress import Bar

# Videos that a network's first parameters are fitted to.
FITTED = 256
# Fields that stay the same from the first step to the last. The folder of videos may move.
FIXED = (
    "init", "trainable", "network", "frames", "size", "batch", "holdout", "kl", "error",
    "gradient_error", "edge_weight", "latent_noise", "seed", "ema",
)  # fmt: skip


@dataclasses.dataclass
class VaeTask:
    """Reconstruction of clips by a VAE. The state is replicated on all devices of one host."""

    cfg: VaeTrainConfig
    manifest: bundle.Manifest
    bundle_path: epath.PathLike
    spec: VaeSpec
    network: Any
    tx: optax.GradientTransformationExtraArgs
    mesh: Mesh
    abstract: TrainState[jax.ShapeDtypeStruct]
    loader: Clips
    videos: Sequence[ListedVideo]
    held_out: Sequence[ListedVideo]
    blank: None = None
    max_bad_records: int = 0
    grad_accum_steps: int = 1
    flops_factor: int = 1

    def key(self, step: jax.Array) -> jax.Array:
        """Return the key of the noise of a step."""
        return jax.random.fold_in(jax.random.key(self.cfg.seed), step)

    def merge(self, trained: Params, frozen: Params) -> Params:
        """Return the parameters; the encoder has no gradient if the decoder alone is trained."""
        del frozen
        if self.cfg.trainable == "decoder":
            return trained | {"encoder": jax.lax.stop_gradient(trained["encoder"])}
        return trained

    def loss(
        self, params: Params, batch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (loss, its parts) of clips (B, T, H, W, C) uint8."""
        clips = signed(constrain(batch, BATCH, *[None] * 4))
        of_clip, of_still = jax.random.split(key)
        clip = still = self._losses(params, clips, of_clip)
        if clips.shape[1] > 1:
            still = self._losses(params, clips[:, :1], of_still)
        kl = (clip.kl + still.kl) / 2
        parts = {"clip": clip.squared, "still": still.squared, "kl": kl}
        return clip.error + still.error + self.cfg.kl * kl, parts

    def _losses(self, params: Params, clips: jax.Array, key: jax.Array) -> vae_losses.Losses:
        return vae_losses.losses(self.spec, self.network, self.cfg, params, clips, key)

    def figures(self, steps: Sequence[StepMetrics]) -> dict[str, float]:
        """Return the PSNR of clips and of first frames, and the KL divergence."""
        clip, still, kl = (
            float(np.mean([m.figures[name] for m in steps])) for name in ("clip", "still", "kl")
        )
        return {"psnr": float(psnr(clip)), "still_psnr": float(psnr(still)), "kl": kl}

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Leave the precision as it is."""
        return contextlib.nullcontext()

    def init_state(self) -> tuple[TrainState[jax.Array], Params, str]:
        """See `Task.init_state`."""
        params = first_params(self.cfg, self.spec, self.network, self.manifest, self.bundle_path)
        if self.cfg.init == "scratch" and self.spec.fit is not None:
            clips = middle_clips(self.videos[:FITTED], self.cfg.frames)
            params = self.spec.fit(
                self.network, params, (signed(jnp.asarray(clip)) for clip in clips)
            )
        replicated = NamedSharding(self.mesh, PartitionSpec())
        state = jax.device_put(new_state(self.cfg, self.tx, params), replicated)
        return state, {}, self.cfg.init

    def load_frozen(self) -> Params:
        """Return no parameters: all are in the state."""
        return {}

    def record(self, previous: Record | None) -> Record:
        """Return the configuration, and the names of the videos."""
        names = [video.name for video in self.videos]
        record = {"config": checkpoints.as_record(self.cfg), "videos": names}
        if previous is not None:
            self._check_same_run(record, previous)
        return record

    def _check_same_run(self, record: Record, old: Record) -> None:
        """Raise RunError if the run was started with another configuration or other videos."""
        # A field that is newer than the run had its default.
        then, now = checkpoints.as_record(VaeTrainConfig()) | old["config"], record["config"]
        differing = differences(then, now, [*FIXED, *changed_warmup(then, now)])
        if then["optimizer"]["name"] != now["optimizer"]["name"]:
            differing.append("the optimizer")
        held = [video.name for video in self.held_out]
        raise_if_changed(
            self.cfg, [*differing, *changed_videos(old["videos"], record["videos"], held)]
        )

    def check_data(self) -> None:
        """Do nothing: `find_videos` has looked at every video."""

    def batches(self) -> list[tuple[jax.ShapeDtypeStruct, None]]:
        """Return the one shape of a batch."""
        shape = self.cfg.batch, self.cfg.frames, *self.cfg.size, 3
        where = batch_sharding(self.mesh)
        return [(jax.ShapeDtypeStruct(shape, np.uint8, sharding=where), None)]

    def describe(self, step: int) -> Iterator[str]:
        """See `Task.describe`."""
        cfg = self.cfg
        epochs = cfg.steps * cfg.batch / len(self.videos)
        yield summary.data_line(f"{len(self.videos):,} videos", len(self.held_out), epochs)
        count, encoder = (_count(self.abstract.params), _count(self.abstract.params["encoder"]))
        yield summary.trained_line(count - encoder * (cfg.trainable == "decoder"), count)
        yield summary.batch_line(cfg.batch, 1, self.mesh)
        validates = cfg.validate_every if self.held_out else 0
        yield summary.steps_line(
            step, cfg.steps, cfg.checkpoints.every, validates, "--holdout 0"
        )  # fmt: skip

    def validates_after(self, step: int) -> bool:
        """Return True every `cfg.validate_every` steps and after the last."""
        return step % self.cfg.validate_every == 0 or step == self.cfg.steps

    def validator(self, frozen: Params) -> Validator | None:
        """Return `validate`, if videos are held out."""
        del frozen
        return self._validate if self.held_out else None

    def _validate(
        self, step: int, params: Params, frozen: Params, check: Callable[[], None]
    ) -> dict[str, float]:
        del frozen
        folder = epath.Path(self.cfg.output)
        with jax.set_mesh(self.mesh):
            figures = validate(
                self.spec,
                self.network,
                params,
                self.held_out,
                self.cfg.frames,
                folder,
                step,
                check,
            )
        said = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
        Bar.write(f"step {step}: {said}")
        return figures

    def clip_ids(self, clips: np.ndarray) -> list[str]:
        """Return no names: clips are cut at random."""
        del clips
        return []


def open_task(cfg: VaeTrainConfig, bundle_path: epath.PathLike, mesh: Mesh) -> VaeTask:
    """Open the bundle and the videos of a run. Raises ValueError, BundleError."""
    check_batch(cfg.batch, 1, mesh)
    manifest = bundle.read_manifest(bundle_path)
    spec, network = network_of(cfg, manifest)
    videos, held = hold_out(find_videos(cfg.videos, cfg.frames, cfg.size), cfg.holdout)
    clips = Clips(videos, cfg.frames, cfg.size, cfg.batch, cfg.seed, local_share(mesh, cfg.batch))
    tx = transformation(cfg)
    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        jax.eval_shape(lambda: new_state(cfg, tx, init(cfg, spec, network))),
    )
    return VaeTask(
        cfg, manifest, bundle_path, spec, network, tx, mesh, abstract, clips, videos, held
    )  # fmt: skip


def transformation(cfg: VaeTrainConfig) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer; it leaves the encoder unchanged if the decoder alone is trained."""
    tx = optimizer.make(cfg.optimizer, ())
    if cfg.trainable == "all":
        return tx
    # Names that checkpoints hold.
    parts = {"encoder": "kept", "decoder": "trained"}
    return optax.partition({"trained": tx, "kept": optax.set_to_zero()}, parts)


def network_of(cfg: VaeTrainConfig, manifest: bundle.Manifest) -> tuple[VaeSpec, Any]:
    """Return spec and config of a bundle's VAE, with the sizes in `cfg.network`. Raises
    BundleError."""
    spec, network = bundle.vae_config(manifest)
    if cfg.network:
        fields = dataclasses.asdict(network) | dict(cfg.network)
        network = bundle.config_from_json(spec.config, fields)
    return spec, network


def init(cfg: VaeTrainConfig, spec: VaeSpec, network: Any) -> Params:
    """Draw random parameters."""
    return spec.init(network, jax.random.fold_in(jax.random.key(cfg.seed), draws.WEIGHTS))


def first_params(
    cfg: VaeTrainConfig,
    spec: VaeSpec,
    network: Any,
    manifest: bundle.Manifest,
    bundle_path: epath.PathLike,
) -> Params:
    """Return the parameters before the first step. Raises BundleError, RunError."""
    if cfg.init == "scratch":
        return init(cfg, spec, network)
    if cfg.init == "bundle":
        if cfg.network:
            raise ValueError("a VAE of other sizes has no weights in the bundle: --init scratch")
        return bundle.load_params(bundle_path, manifest, "vae", dtype=jnp.float32)
    run, step = checkpoints.parse_run(cfg.init)
    params = trained_params(spec, network, run, step)
    knew_motion = checkpoints.read_record(run)["config"]["frames"] > 1
    return params if knew_motion or cfg.frames == 1 else inflated(params)


def inflated(params: Params) -> Params:
    """Turn a VAE of single frames into one that reconstructs each frame of a clip as it did alone.

    On a single frame every temporal tap sees the same picture, so the sum of all taps moves to the
    last one, which sees the frame itself (inflation as in Carreira & Zisserman, arXiv 1705.07750,
    made causal)."""

    def last(kernel: jax.Array) -> jax.Array:
        return jnp.zeros_like(kernel).at[-1].set(kernel.sum(axis=0))

    leaves = flatten_dict(params)
    convolutions = {
        path for path, leaf in leaves.items() if path[-1] == "kernel" and leaf.ndim == 5
    }
    return unflatten_dict({p: last(x) if p in convolutions else x for p, x in leaves.items()})


def trained_params(spec: VaeSpec, network: Any, run: str, step: int) -> Params:
    """Restore the parameters of a run, their moving average if it keeps one. Raises RunError."""
    part = checkpoints.exported_part(checkpoints.read_record(run))
    abstract = spec.abstract_params(network)
    return checkpoints.restore_params(run, step, abstract, part)


def new_state(
    cfg: VaeTrainConfig, tx: optax.GradientTransformationExtraArgs, params: Params
) -> TrainState[jax.Array]:
    """Return the state before the first step."""
    params = cast_params(params, jnp.float32)
    ema = jax.tree.map(jnp.copy, params) if cfg.ema else None
    zero = functools.partial(jnp.zeros, [], jnp.int32)
    return TrainState(zero(), params, tx.init(params), ema, zero(), zero())


def changed_videos(then: Sequence[str], now: Sequence[str], held: Sequence[str]) -> Iterator[str]:
    """Yield how the videos to train on differ from those of before; `held` are held out now."""
    if set(then) == set(now):
        return
    if gone := sorted(set(then) - set(now)):
        yield f"{len(gone)} videos are gone or held out: {shorten(gone)}"
    if new := sorted(set(now) - set(then)):
        yield f"{len(new)} videos are new or were held out: {shorten(new)}"
    kinds = {Path(name).suffix.lower() for name in then}
    if other := sorted(n for n in (*now, *held) if Path(n).suffix.lower() not in kinds):
        yield (
            f"{len(other)} are files of kinds that it had none of, and more kinds count as videos"
            f" than in earlier versions: {shorten(other)}; move them out of the folder"
        )


def _count(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
