"""Train a transformer by flow matching on packed sections."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing
from framepack_jax.data import loader as loading
from framepack_jax.data.batch import Batch
from framepack_jax.data.fingerprint import check_bundle
from framepack_jax.data.pixel_batch import PixelBatch, to_batch
from framepack_jax.diffusion import sampler
from framepack_jax.models.autoencoder import normalise
from framepack_jax.models.lora_layers import scale_factors
from framepack_jax.models.params import merge_params
from framepack_jax.models.quantization import cast_params
from framepack_jax.parallel import multihost
from framepack_jax.parallel.sharding import BATCH
from framepack_jax.training import (
    checkpoints,
    consistency,
    flow_matching,
    metrics,
    optimizer,
    rollouts,
    state,
    summary,
)
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.history import Places, change_history
from framepack_jax.training.host_facts import data_facts
from framepack_jax.training.initial_weights import first_state, load_frozen, load_teacher
from framepack_jax.training.prefetch import check_batch, local_share
from framepack_jax.training.resume_checks import check_init, check_same_run
from framepack_jax.training.state import Model, Params, TrainState
from framepack_jax.training.task import Cost, Record, StepMetrics
from framepack_jax.training.validation import Validator

# Frames (B, P, H, W, 3) in [-1, 1] and the VAE's parameters -> normalised latents.
Encode = Callable[[Params, jax.Array], jax.Array]


class Networks(NamedTuple):
    """Parameters of the transformer, of the VAE that encodes batches of frames, else empty, and of
    a teacher. Among frozen parameters `teacher` is what those of the transformer lack."""

    transformer: Params
    vae: Params
    teacher: Params = {}  # noqa: RUF012


@dataclasses.dataclass
class FlowMatchingTask:
    """Flow matching on the frames of a section, given its packed context; see `flow_matching`.
    With `cfg.distill`, distillation by `consistency`.

    `abstract` and `frozen` are the state and the frozen parameters as `jax.ShapeDtypeStruct`s with
    shardings. `codebook` (K, C) are the entries of a schedule with `+D`. `loader` and `bundle_path`
    are given by `open_task` only.
    """

    cfg: TrainConfig
    manifest: bundle.Manifest
    model: Model
    tx: optax.GradientTransformationExtraArgs
    mesh: Mesh
    schedule: packing.Schedule
    abstract: TrainState[jax.ShapeDtypeStruct]
    frozen: Params
    encode: Encode | None = None
    codebook: np.ndarray | None = None
    loader: Any = None
    bundle_path: epath.PathLike = ""

    def key(self, step: jax.Array) -> jax.Array:
        """Return the key of all steps; the number of a sample makes its own key."""
        del step
        return jax.random.key(self.cfg.seed)

    def merge(self, trained: Params, frozen: Networks) -> Networks:
        """Return all parameters of the transformer, and those of the VAE."""
        scaled = scale_factors(trained, state.factor_scale(self.cfg))
        if self.cfg.reduce_dtype == "bfloat16":
            # Blocks then have no float32 weights, whose gradient would leave them in float32.
            stacks = [name for name in self.model.spec.stacks if name in scaled]
            scaled = scaled | {name: cast_params(scaled[name], jnp.bfloat16) for name in stacks}
        teacher = merge_params(frozen.teacher, frozen.transformer) if self.distills else {}
        return Networks(merge_params(scaled, frozen.transformer), frozen.vae, teacher)

    def loss(
        self, params: Networks, batch: Batch | PixelBatch, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return (losses (B,) at drawn noise levels; figures for the log)."""
        sections = self.latents(params, batch)
        elements = sections.meta.element
        keys = flow_matching.sample_keys(key, elements)
        sigmas = self.draw_sigmas(key, elements, sections.target.shape)
        ages = packing.history_ages(self.schedule)
        places = Places(ages, sections.target.shape[1], sections.given)
        context = rollouts.with_rollouts(
            self.cfg, self.model, params.transformer, self.schedule, sections, keys
        )
        context = change_history(self.cfg.history, context, places, keys, sigmas)
        sections = self.discretized(sections, context)
        losses = self.losses(params, sections, keys, sigmas)
        figures = {
            "losses": losses, "sigmas": sigmas,
            "sections": sections.meta.section, "clips": sections.meta.clip,
        }  # fmt: skip
        return losses, figures

    def losses(
        self, params: Networks, batch: Batch, keys: jax.Array, sigmas: jax.Array
    ) -> jax.Array:
        """Return losses (B,) at noise levels (B,)."""
        wanted = self.examples(params, batch, keys, sigmas)
        return flow_matching.sample_losses(
            self.cfg, self.model, params.transformer, batch, keys, wanted
        )

    def draw_sigmas(self, key: jax.Array, elements: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draw the noise levels (B,) of samples of latents of a shape."""
        batch = self.cfg.batch
        if self.distills:
            levels = consistency.noise_levels(self.cfg, self.manifest.sampling, shape)
            return consistency.draw_levels(levels, key, elements, batch)
        mu = flow_matching.section_mu(shape)
        return flow_matching.draw_sigmas(self.cfg.noise_schedule, key, elements, batch, mu)

    def examples(
        self, params: Networks, batch: Batch, keys: jax.Array, sigmas: jax.Array
    ) -> flow_matching.Examples:
        """Return what the network is to learn of a batch at noise levels (B,)."""
        if not self.distills:
            return flow_matching.examples(batch, keys, sigmas)

        def velocity(params: Params, x: jax.Array, sigmas: jax.Array) -> jax.Array:
            return flow_matching.velocity(self.cfg, self.model, params, batch, keys, x, sigmas)

        teacher, student = (
            functools.partial(velocity, jax.lax.stop_gradient(network))
            for network in (params.teacher, params.transformer)
        )
        levels = consistency.noise_levels(self.cfg, self.manifest.sampling, batch.target.shape)
        steps = self.cfg.distill.steps
        return consistency.examples(teacher, student, levels, steps, batch, keys, sigmas)

    def latents(self, params: Networks, batch: Batch | PixelBatch) -> Batch:
        """Encode the frames of a batch of pixels."""
        if not isinstance(batch, PixelBatch):
            return batch
        assert self.encode is not None
        return to_batch(batch, functools.partial(self.encode, params.vae))

    def losses_at(
        self,
        trained: Params,
        frozen: Networks,
        batch: Batch | PixelBatch,
        others: Batch | PixelBatch,
        sigma: jax.Array,
        blank: jax.Array,
        other: jax.Array,
    ) -> jax.Array:
        """Return losses (B,) at one noise level, with the same noise in each call.

        `blank` and `other` (groups,) say which context groups are zero, as missing history is, and
        which are replaced by those of `others`, a batch of other clips of the same shape. What a
        student is to learn is computed with the unchanged context.
        """
        params = self.merge(trained, frozen)
        own, theirs = self.latents(params, batch), self.latents(params, others)
        keys = flow_matching.sample_keys(jax.random.key(self.cfg.seed), own.meta.element)
        context = flow_matching.changed_context(own.context, theirs.context, blank, other)
        sigmas = jnp.full(own.meta.element.shape, sigma)
        wanted = self.examples(params, self.discretized(own, own.context), keys, sigmas)
        changed = self.discretized(own, context)
        return flow_matching.sample_losses(
            self.cfg, self.model, params.transformer, changed, keys, wanted
        )

    def discretized(self, batch: Batch, context: packing.PackedContext) -> Batch:
        """Return a batch with another context, whose history is discretized for a schedule with
        `+D`."""
        return dataclasses.replace(
            batch, context=packing.discretize(context, self.schedule, self.codebook)
        )

    def figures(self, steps: Sequence[StepMetrics]) -> dict[str, float]:
        """Return mean losses by noise level and by section."""
        return metrics.by_group(steps)

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """Compute in float32 if the configuration says so."""
        return sampler.precision(self.cfg.dtype)

    @property
    def distills(self) -> bool:
        """True if the network learns from a teacher instead of from the data alone."""
        return bool(self.cfg.distill.steps)

    @property
    def teacher(self) -> Params:
        """Parameters that a teacher has beside the frozen ones, as `jax.ShapeDtypeStruct`s."""
        return state.abstract_teacher(self.cfg, self.abstract.params)

    @property
    def grad_accum_steps(self) -> int:
        """Number of parts of a batch."""
        return self.cfg.grad_accum_steps

    @property
    def flops_factor(self) -> int:
        """Cost of a step in forward passes."""
        return metrics.COST[self.cfg.trainable]

    @property
    def max_bad_records(self) -> int:
        """Number of unreadable clips that are replaced."""
        return self.cfg.data.max_bad_records

    def blank(self, ahead: int) -> Batch | PixelBatch:
        """Return a batch without data, for a host that cannot read its share."""
        return self.loader.blank(ahead)

    def init_state(self) -> tuple[TrainState[jax.Array], Networks, str]:
        """See `Task.init_state`."""
        now, frozen, origin = first_state(self)
        return now, self._networks(frozen), origin

    def load_frozen(self) -> Networks:
        """See `Task.load_frozen`."""
        return self._networks(load_frozen(self))

    def _networks(self, frozen: Params) -> Networks:
        vae: Params = {}
        if self.encode is not None:
            vae = bundle.load_params(
                self.bundle_path, self.manifest, "vae", dtype=jnp.float32, mesh=self.mesh
            )
        return Networks(frozen, vae, load_teacher(self))

    def record(self, previous: Record | None) -> Record:
        """Return the configuration, the data order, and how the first run that led here began."""
        config = checkpoints.as_record(self.cfg)
        config["lora"]["targets"] = state.lora_targets(self.cfg.lora, self.model.spec)
        record: Record = {
            "config": config,
            "fingerprint": self.loader.fingerprint,
            "weights": self.manifest.roles["transformer"].source.get("sha256"),
            "codebook": None if self.codebook is None else bundle.digest(self.codebook),
        }
        if previous is not None:
            check_same_run(self.cfg, record, previous)
        elif self.cfg.init not in ("bundle", "scratch"):
            previous = multihost.on_primary(checkpoints.record_of, self.cfg.init)
            check_init(self.cfg, record, previous)
        else:
            previous = {"began": self.cfg.init}
        return record | {"began": previous.get("began")}

    def check_data(self) -> None:
        """Raise DatasetError if a bucket has too few clips."""
        self.loader.check_buckets()

    def batches(self) -> list[tuple[Any, Cost]]:
        """Return an abstract batch for each bucket, latent window and number of target frames, and
        the cost of a sample."""
        kinds = itertools.product(self.loader.buckets, self.loader.samples.kinds)
        return [self._abstract_batch(bucket, *kind) for bucket, kind in kinds]

    def _abstract_batch(
        self, bucket: tuple[int, int], schedule: packing.Schedule, frames: int
    ) -> tuple[Any, Cost]:
        where = NamedSharding(self.mesh, PartitionSpec(BATCH))
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            self.loader.abstract(bucket, schedule, frames),
        )
        size = self.loader.latent_size(bucket)
        return batch, self.sample_cost(schedule, batch, size)

    def sample_cost(self, schedule: packing.Schedule, batch: Any, size: tuple[int, int]) -> Cost:
        """Return the cost of a sample of a batch, which may be abstract, of latents of `size`."""
        cost = metrics.sample_cost(self.model, schedule, batch, size)
        more: float = consistency.more_passes(self.cfg.distill) * cost.flops
        if share := self.cfg.history.rollouts:
            history = schedule.with_window(rollouts.history_frames(schedule))
            own = metrics.sample_cost(self.model, history, batch, size)
            more += share * own.flops
        return cost._replace(more_flops=more)

    def describe(self, step: int) -> Iterator[str]:
        """See `Task.describe`."""
        yield from summary.run_lines(self, step)

    def validates_after(self, step: int) -> bool:
        """Return True every `cfg.validation.every` steps and after the last."""
        every = self.cfg.validation.every
        return self.validates and (step % every == 0 or step == self.cfg.steps)

    @property
    def validates(self) -> bool:
        """True if clips are held out and validation is not switched off."""
        return bool(self.cfg.validation.every) and self.cfg.data.holdout > 0

    def validator(self, frozen: Networks) -> Validator | None:
        """Read the held-out clips."""
        del frozen
        return Validator(self) if self.validates else None

    def clip_ids(self, clips: np.ndarray) -> list[str]:
        """Return the names of the clips of a batch."""
        return self.loader.clip_ids(sorted({clip for clip in clips.tolist() if clip >= 0}))


def set_up(
    cfg: TrainConfig, manifest: bundle.Manifest, mesh: Mesh, pixels: bool = False
) -> FlowMatchingTask:
    """Check a configuration against its bundle and its mesh; the task has no data yet.

    Raises ValueError, BundleError."""
    model = state.model_of(cfg, manifest)
    schedule = schedule_of(cfg, manifest)
    model.spec.check_kernels(model.cfg, model.spec.context_kernels(schedule))
    model.spec.check_mesh(model.cfg, mesh)
    check_batch(cfg.batch, cfg.grad_accum_steps, mesh)
    rollouts.check(cfg, schedule)
    consistency.check(cfg, manifest)
    if cfg.history.drop_oldest and schedule.importance:
        raise ValueError(
            f"--history.drop-oldest {cfg.history.drop_oldest:g} with schedule {schedule}: history"
            " ordered by importance has no oldest places; give --history.drop-history"
        )
    tx = optimizer.make(cfg.optimizer, model.spec.stacks)
    abstract, frozen = state.abstract_state(cfg, model, tx, mesh)
    encode = _encoder(manifest) if pixels else None
    return FlowMatchingTask(cfg, manifest, model, tx, mesh, schedule, abstract, frozen, encode)


def open_task(cfg: TrainConfig, bundle_path: epath.PathLike, mesh: Mesh) -> FlowMatchingTask:
    """Open the bundle and the datasets of a run. Raises ValueError, BundleError, DatasetError."""
    manifest = bundle.read_manifest(bundle_path)
    share = local_share(mesh, cfg.batch)
    schedule = schedule_of(cfg, manifest)
    loader = multihost.on_all_hosts(loading.open_loader, cfg.data, schedule, cfg.batch, share)
    multihost.assert_same_facts(data_facts, cfg, bundle_path, loader.fingerprint)
    for dataset in loader.datasets:
        check_bundle(dataset.index, manifest)
    task = set_up(cfg, manifest, mesh, pixels=loader.mode == "pixels")
    entries = bundle.entries_for(schedule, bundle_path, manifest, cfg.codebook)
    return dataclasses.replace(task, loader=loader, bundle_path=bundle_path, codebook=entries)


def schedule_of(cfg: TrainConfig, manifest: bundle.Manifest) -> packing.Schedule:
    """Return the packing schedule of a run: its own, else that of the bundle."""
    if cfg.schedule:
        return packing.parse(cfg.schedule)
    return manifest.schedule


def _encoder(manifest: bundle.Manifest) -> Encode:
    """Return a function of (parameters of the bundle's VAE, frames (B, P, H, W, 3) in [-1, 1]) that
    gives normalised latents."""
    spec, cfg = bundle.vae_config(manifest)

    def encode(params: Params, frames: jax.Array) -> jax.Array:
        latents = spec.encode(cfg, params, frames)[0].astype(jnp.float32)
        return normalise(latents, manifest.latent_mean, manifest.latent_std)

    return encode
