"""A training run from its first step, or from where it was stopped, to its last.

    resume, else begin from a bundle or another run, else from random weights

Everything that decides the result - parameters, optimizer, place in the stream of samples - is in
the checkpoints, and all that is random comes from the number of a sample: a run that is killed
anywhere and gone on with is, to the last bit, the run that never was.
"""

import contextlib
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, packing, video
from framepack_jax.data import fingerprint
from framepack_jax.data import loader as loading
from framepack_jax.data.batch import LOST
from framepack_jax.data.records import DatasetError
from framepack_jax.diffusion import sampler
from framepack_jax.models import quantization
from framepack_jax.parallel import multihost
from framepack_jax.training import checkpoints, metrics, optimizer, state, summary, validation
from framepack_jax.training.bad_records import BadRecords
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import TrainConfig
from framepack_jax.training.flow_matching import Metrics, losses_at, train_step
from framepack_jax.training.prefetch import Fed, check_batch, feed, local_share, place
from framepack_jax.training.state import Model, Params, State
from framepack_jax.utils.compare import THERE_HERE, differences
from framepack_jax.utils.progress import Bar

# Fields of a configuration that a run keeps from its first step to its last.
FIXED = (
    "init", "network", "schedule", "trainable", "lora", "seed", "dtype", "guidance",
    "history_noise", "noise_schedule",
)  # fmt: skip
# The learning rate as the compiled step takes it.
RATE = jax.ShapeDtypeStruct((), np.float32)


class NonFiniteLoss(FloatingPointError):
    """Losses or gradients that stay not finite."""


class Setup(NamedTuple):
    """What a run computes with, before there are any weights."""

    cfg: TrainConfig
    manifest: bundle.Manifest
    model: Model
    tx: optax.GradientTransformation
    mesh: Mesh
    schedule: str
    order: str
    abstract: State
    frozen: Params
    encode: Callable[[Params, jax.Array], jax.Array] | None


def set_up(cfg: TrainConfig, manifest: bundle.Manifest, mesh: Mesh, pixels: bool = False) -> Setup:
    """Check a configuration against its bundle and mesh. Raises ValueError, BundleError."""
    model = state.model_of(cfg, manifest)
    schedule = cfg.schedule or manifest.schedule
    order = packing.default_order(schedule) if cfg.schedule else manifest.order
    model.spec.check_kernels(model.cfg, model.spec.context_kernels(schedule))
    model.spec.check_mesh(model.cfg, mesh)
    check_batch(cfg.batch, cfg.grad_accum_steps, mesh)
    tx = optimizer.make(cfg.optimizer, model.spec.stacks)
    abstract, frozen = state.abstract(cfg, model, tx, mesh)
    encode = _encoder(manifest) if pixels else None
    return Setup(cfg, manifest, model, tx, mesh, schedule, order, abstract, frozen, encode)


def _encoder(manifest: bundle.Manifest) -> Callable[[Params, jax.Array], jax.Array]:
    """Frames (B, P, H, W, 3) in [-1, 1] -> normalised latents, by the VAE of a bundle."""
    spec, cfg = bundle.vae_config(manifest)
    mean = np.asarray(manifest.latent_mean, np.float32)
    std = np.asarray(manifest.latent_std, np.float32)

    def encode(params: Params, frames: jax.Array) -> jax.Array:
        latents = spec.encode(cfg, params, frames)[0].astype(jnp.float32)
        return (latents - mean[None, None, None, None]) / std[None, None, None, None]

    return encode


def jitted_step(setup: Setup) -> Any:
    """The training step of (state, frozen, vae, batch, learning rate), which uses the state up."""
    whole = NamedSharding(setup.mesh, PartitionSpec())
    fixed = setup.cfg, setup.model, setup.tx, setup.encode
    return jax.jit(
        functools.partial(train_step, *fixed),
        donate_argnums=0,
        out_shardings=(state.shardings(setup.abstract), Metrics(*[whole] * len(Metrics._fields))),
    )


def abstract_batch(setup: Setup, loader: Any, bucket: tuple[int, int], schedule: str) -> Any:
    """A global batch of a bucket and a schedule, and how it lies on the mesh."""
    where = NamedSharding(setup.mesh, PartitionSpec(("data", "fsdp")))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        loader.abstract(bucket, schedule),
    )


def train(
    cfg: TrainConfig,
    bundle_path: epath.PathLike,
    mesh: Mesh,
    *,
    resume: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Train until the last step, or until the run is asked to stop; returns the step it came to.

    Raises ValueError (with RunError, BundleError, DatasetError) for what cannot be trained, OSError
    where a checkpoint cannot be written, NonFiniteLoss.
    """
    manifest = bundle.read_manifest(bundle_path)
    share = local_share(mesh, cfg.batch)
    schedule = cfg.schedule or manifest.schedule
    order = packing.default_order(schedule) if cfg.schedule else manifest.order
    loader = multihost.on_all_hosts(
        loading.open_loader, cfg.data, schedule, order, cfg.batch, share
    )
    fingerprint.check_bundle(loader.index, manifest)
    setup = set_up(cfg, manifest, mesh, pixels=loader.index.mode == "pixels")
    record = {
        "config": checkpoints.as_record(cfg),
        "fingerprint": loader.fingerprint,
        "weights": manifest.roles["transformer"].source.get("sha256"),
    }
    there = multihost.on_primary(checkpoints.steps_of, cfg.output)
    if there and not resume:
        raise RunError(
            f"{cfg.output} holds a run up to step {there[-1]}; choose another --output, or go on"
            " with it: --resume auto"
        )
    if there:
        other = multihost.on_primary(checkpoints.read_record, cfg.output)
    elif cfg.init not in ("bundle", "scratch"):
        other = multihost.on_primary(_record_of, cfg.init)
        _check_init(cfg, record, other)
    else:
        other = {"began": cfg.init}
    record["began"] = other.get("began")
    with (
        sampler.precision(cfg.dtype),
        contextlib.closing(checkpoints.manager(cfg.output, cfg.checkpoints)) as manager,
    ):
        with jax.set_mesh(mesh):
            if there:
                _check_same_run(cfg, record, other)
                begun, data = checkpoints.restore(manager, there[-1], setup.abstract)
                unread = data.pop("unread", [])
                loader.set_state(data)
                frozen = load_frozen(setup, bundle_path)
                say(f"{cfg.output}: goes on after step {there[-1]}")
            else:
                unread: list[int] = []
                begun, frozen, origin = first_state(setup, bundle_path)
                say(f"{cfg.output}: begins from {origin}")
        multihost.on_primary(checkpoints.write_record, cfg.output, record)
        bad = BadRecords(loader, unread)
        return Trainer(setup, bundle_path, loader, manager, frozen, record, bad, say).go(begun)


def first_state(setup: Setup, bundle_path: epath.PathLike) -> tuple[State, Params, str]:
    """(state, frozen parameters, where they come from) before the first step."""
    cfg, model, tx, mesh = setup.cfg, setup.model, setup.tx, setup.mesh
    if cfg.init == "scratch":
        params = state.random_params(cfg, model, mesh)
        return *state.init_state(cfg, model, tx, mesh, params), "random weights"
    if cfg.init == "bundle":
        params = load_network(setup, bundle_path)
        return *state.init_state(cfg, model, tx, mesh, params), f"the transformer of {bundle_path}"
    run, step = checkpoints.parse_run(cfg.init)
    part = "ema" if checkpoints.read_record(run)["config"]["ema"] else "params"
    trained = checkpoints.restore_params(run, step, setup.abstract.params, part)
    frozen = load_frozen(setup, bundle_path)
    return state.with_params(cfg, model, tx, mesh, trained), frozen, f"{run} at step {step}"


def load_network(setup: Setup, bundle_path: epath.PathLike) -> Params:
    """All parameters of the bundle's transformer, trained ones in float32. Raises RunError where
    they are quantized."""
    stored = bundle.stored_dtypes(bundle_path, setup.manifest, "transformer").values()
    if kept := set(quantization.QUANTIZED).intersection(stored):
        raise RunError(
            f"bundle {bundle_path} keeps its transformer in {kept.pop()}, and training takes"
            " weights of 16 or 32 bits; train from one that was converted without that --dtype"
        )
    dtype = {"all": "float32", "lora": setup.cfg.dtype, "context": None}[setup.cfg.trainable]
    params = bundle.load_params(
        bundle_path, setup.manifest, "transformer",
        dtype=dtype and jnp.dtype(dtype), mesh=setup.mesh,
    )  # fmt: skip
    if setup.cfg.trainable != "context":
        return params
    wanted = flatten_dict(setup.abstract.params) | flatten_dict(setup.frozen)
    leaves = flatten_dict(params)
    return unflatten_dict({p: leaves[p].astype(wanted[p].dtype) for p in leaves})


def load_frozen(setup: Setup, bundle_path: epath.PathLike) -> Params:
    """The frozen parameters alone; those that are trained come from elsewhere."""
    if not jax.tree.leaves(setup.frozen):
        return setup.frozen
    kept = flatten_dict(setup.frozen)
    leaves = flatten_dict(load_network(setup, bundle_path))
    return unflatten_dict({path: leaves[path].astype(kept[path].dtype) for path in kept})


def _record_of(run: str) -> dict[str, Any]:
    return checkpoints.read_record(checkpoints.parse_run(run)[0])


def _check_init(cfg: TrainConfig, record: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise RunError where the parameters of another run, of which `there` is the record, are not
    those that this one trains."""
    then, now = there["config"], record["config"]
    names = ["network", "trainable"] + (["lora"] if cfg.trainable == "lora" else [])
    differing = differences(then, now, names, THERE_HERE)
    # Where all are trained, all come from the run.
    if cfg.trainable != "all" and there["weights"] != record["weights"]:
        differing.append("the transformer of the bundle")
    if differing:
        raise RunError(
            f"--init {cfg.init} cannot be begun from ({'; '.join(differing)}); give the same, or"
            " make a bundle of that run (framepack export-run) and begin from it: --bundle"
        )


def _check_same_run(cfg: TrainConfig, record: dict[str, Any], old: dict[str, Any]) -> None:
    """Raise RunError or DatasetError where a run, of which `old` is the record, was begun with
    another configuration or data."""
    fingerprint.check_fingerprint(old["fingerprint"], record["fingerprint"])
    then, now = old["config"], record["config"]
    names = [*FIXED, *(["ema"] if bool(then["ema"]) != bool(now["ema"]) else [])]
    if then["optimizer"]["name"] != now["optimizer"]["name"]:
        names.append("optimizer")
    differing = differences(then, now, names)
    if old["weights"] != record["weights"]:
        differing.append("the transformer of the bundle")
    if differing:
        raise RunError(
            f"{cfg.output} was begun otherwise ({'; '.join(differing)}); go on with what it was"
            f" begun with, or begin another run from it: --output NEW --init {cfg.output}"
        )


class Late(NamedTuple):
    """A step whose figures have not been looked at: its number from 1, the figures, what a sample
    of it costs, and the position in the stream of samples after it."""

    step: int
    figures: Metrics
    cost: metrics.Cost
    position: dict[str, Any]


class Trainer:
    """A run under way."""

    def __init__(
        self,
        setup: Setup,
        bundle_path: epath.PathLike,
        loader: Any,
        manager: Any,
        frozen: Params,
        record: dict[str, Any],
        bad: BadRecords,
        say: Callable[[str], None] = print,
    ) -> None:
        self.setup, self.cfg, self.path = setup, setup.cfg, bundle_path
        self.loader, self.manager, self.frozen = loader, manager, frozen
        self.record, self.bad, self.say = record, bad, say
        self.unsaved = False
        self.position, self.error = loader.get_state(), None
        self.vae: Params = {}
        if setup.encode is not None:
            self.vae = bundle.load_params(
                bundle_path, setup.manifest, "vae", dtype=jnp.float32, mesh=setup.mesh
            )
        self.validator: Any = None

    def go(self, begun: State) -> int:
        """Train from a state to the last step, or to where the run is asked to stop; returns that
        step. Raises NonFiniteLoss, DatasetError."""
        cfg, first = self.cfg, int(begun.step)
        if first >= cfg.steps:
            return first
        self.bad.check_again()
        multihost.on_all_hosts(self.loader.check_buckets)
        validates = bool(cfg.validation.every) and cfg.data.holdout > 0
        rate = optimizer.learning_rate(cfg.optimizer, cfg.steps)
        writers = multihost.on_all_hosts(metrics.writers, cfg, first, self.record)
        self.log = metrics.Log(cfg, rate, writers)
        with contextlib.ExitStack() as exits:
            exits.enter_context(contextlib.closing(self.log))
            if validates:
                # Reads the held-out clips.
                self.validator = multihost.on_all_hosts(
                    Validator, self.setup, self.path, self.loader, self.vae
                )
            for line in summary.run_lines(self.setup, self.loader, first, validates):
                self.say(line)
            programs = self.compile()
            batches = feed(self.loader, self.setup.mesh, cfg.batch, self.loader.blank)
            exits.enter_context(contextlib.closing(batches))
            asked = exits.enter_context(stop_signal())
            self.bar = exits.enter_context(Bar(
                total=cfg.steps, initial=first, desc="training", unit="step",
                disable=metrics.is_quiet(), smoothing=0.1,
            ))  # fmt: skip
            step = self._steps(begun, first, programs, batches, asked)
            checkpoints.wait(self.manager)
        if step < cfg.steps:
            self.bad.check(f"step {step} is saved; ")
        if self.bad:
            self.say(f"clips that could not be read, and were replaced: {self.bad}")
        return step

    def _steps(
        self, now: State, first: int, programs: Any, batches: Iterator[Fed], asked: Any
    ) -> int:
        cfg, late = self.cfg, None
        for step in range(first + 1, cfg.steps + 1):
            fed = next(batches)
            self.error = self.error or fed.error
            self.log.wait(fed.waited)
            if step == first + 1:
                self._begin_clocks()
            compiled, cost = programs[_bucket(fed.batch)]
            now, figures = compiled(now, self.frozen, self.vae, fed.batch, self.log.rate(step - 1))
            if late is not None:
                self._settle(late, now, first)
            late = Late(step, figures, cost, fed.state)
            self.bar.update()
            validates = self._validates(step)
            stop = asked() or step == cfg.steps or self.bad.too_many
            saves = stop or step % cfg.checkpoints.every == 0 or self.unsaved
            if saves or validates:
                self._settle(late, now, first)
                late = None
            # Reading the last figures may have shown that a clip cannot be read.
            if saves or self.unsaved:
                with self._paused():
                    self._save(step, now, fed.state)
            if validates:
                with self._paused():
                    self.validate(self.log, step, now)
            if stop or self.bad.too_many:
                break
        return step

    def _begin_clocks(self) -> None:
        """Neither compiling nor the first batch counts."""
        self.log.begin()
        self.bar.unpause()

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """What is done meanwhile counts neither in the log's rates nor in the bar's estimate."""
        with self.log.paused():
            yield
        self.bar.unpause()

    def _save(self, step: int, now: State, position: dict[str, Any]) -> None:
        data = position | {"unread": sorted(self.bad.numbers)}
        checkpoints.save(self.manager, step, now, data)
        self.unsaved = False

    def _settle(self, late: Late, now: State, first: int) -> None:
        """Take the figures of a step that is over, or about to be; `now` is the newest state.
        Raises NonFiniteLoss, DatasetError."""
        step, cfg = late.step, self.cfg
        figures = Metrics(*jax.device_get(multihost.fetch(tuple(late.figures))))
        if (figures.clips == LOST).any():
            self._end_before(step, now, first)
        self.position = late.position
        self.log.add(step, figures, late.cost)
        self.bar.set_postfix(loss=f"{figures.loss:.4f}", refresh=False)
        self.unsaved |= self.bad.note(step, figures.clips)
        if figures.skipped_in_a_row >= cfg.max_nonfinite_steps:
            kept = self.manager.latest_step()
            numbers = sorted({clip for clip in figures.clips.tolist() if clip >= 0})
            raise NonFiniteLoss(
                f"step {step}: loss or gradient have not been finite for"
                f" {figures.skipped_in_a_row} steps; the last"
                f" batch has clips {', '.join(self.loader.clip_ids(numbers)[:8])}. Those updates"
                " were left out; the last checkpoint is"
                f" {'of step ' + str(kept) if kept is not None else 'not written yet'} in"
                f" {self.manager.directory}. Lower --optimizer.learning-rate, or look at the data"
            )
        if step % cfg.log_every == 0 or step == cfg.steps:
            self.log.line(**({"unread_clips": len(self.bad.numbers)} if self.bad else {}))

    def _end_before(self, step: int, now: State, first: int) -> None:
        """Save the state before `step`, whose batch some process could not read, and raise
        DatasetError. From that step on no update was made: what changed are counts."""
        if step - 1 > first:
            over = int(now.step) - (step - 1)
            before = now.replace(
                step=now.step - over, skipped=now.skipped - over,
                skipped_in_a_row=now.skipped_in_a_row - over,
            )  # fmt: skip
            self._save(step - 1, before, self.position)
            checkpoints.wait(self.manager)
        cause = self.error or "another process cannot read its part of the batch"
        raise DatasetError(
            f"step {step} has no data: {cause}. Once the data can be read, the same command goes on"
            f" after step {step - 1}"
        )

    def compile(self) -> dict[Any, tuple[Any, metrics.Cost]]:
        """Shape of a batch -> (the compiled step, what a sample costs), for every bucket and window
        there is, before the first step, several at a time."""
        step, setup = jitted_step(self.setup), self.setup
        vae = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.vae
        )

        def one(kind: tuple[tuple[int, int], str]) -> Any:
            bucket, schedule = kind
            with jax.set_mesh(setup.mesh), sampler.precision(self.cfg.dtype):
                batch = abstract_batch(setup, self.loader, bucket, schedule)
                lowered = step.lower(setup.abstract, setup.frozen, vae, batch, RATE)
                size = self.loader.latent_size(bucket)
                cost = metrics.sample_cost(setup.model, schedule, batch, size)
                return _bucket(batch), (lowered.compile(), cost)

        kinds = list(itertools.product(self.loader.buckets, self.loader.samples.schedules))
        self.say(
            f"compiling    {len(kinds)} program{'s' * (len(kinds) > 1)} of the step, one for each"
            " bucket and window, before the first step"
        )
        with ThreadPoolExecutor(min(len(kinds), 4)) as pool:
            done = Bar(
                pool.map(one, kinds), total=len(kinds), desc="compiling", unit="program",
                disable=metrics.is_quiet() or len(kinds) == 1,
            )  # fmt: skip
            return dict(done)

    def _validates(self, step: int) -> bool:
        every = self.cfg.validation.every
        return self.validator is not None and (step % every == 0 or step == self.cfg.steps)

    def validate(self, log: metrics.Log, step: int, now: State) -> None:
        """Losses and videos of held-out clips."""
        params = now.params if now.ema is None else now.ema
        log.write(step, self.validator.losses(params, self.frozen))
        for number, frames in enumerate(self.validator.videos(params, self.frozen)):
            multihost.on_primary(save_video, self.cfg.output, step, number, frames)


class Validator:
    """Held-out batches on the devices, and the networks that show them."""

    def __init__(self, setup: Setup, path: epath.PathLike, loader: Any, vae: Params) -> None:
        self.setup, self.path, self.vae = setup, path, vae
        cfg = setup.cfg
        ways = setup.mesh.shape["data"] * setup.mesh.shape["fsdp"]
        held = loader.held_out(cfg.validation.samples, cfg.batch // cfg.grad_accum_steps, ways)
        self.batches = [
            (place(batch, setup.mesh, size), others and place(others, setup.mesh, size))
            for batch, others, size in held
        ]
        self.jitted = jax.jit(functools.partial(losses_at, cfg, setup.model, setup.encode))
        self.records = loader.held_out_records(cfg.validation.videos)
        self.pipe: Any = None

    def losses(self, params: Params, frozen: Params) -> dict[str, float]:
        """See `validation.losses`."""
        cfg = self.setup.cfg.validation

        at = functools.partial(self.jitted, params, frozen, self.vae)
        with jax.set_mesh(self.setup.mesh):
            return validation.losses(at, self.batches, cfg.sigmas, cfg.context)

    def videos(self, params: Params, frozen: Params) -> Iterator[np.ndarray]:
        """Sampled videos above what the VAE makes of the truth, (P, H, W, 3) uint8."""
        setup, cfg = self.setup, self.setup.cfg.validation
        if not cfg.videos or setup.encode is not None:
            return
        if self.pipe is None:
            self.pipe = validation.open_pipe(self.path, setup.schedule, setup.cfg.dtype, setup.mesh)
        network = state.merge_params(params, frozen, state.factor_scale(setup.cfg))
        pipe = validation.with_network(self.pipe, setup.model, network)
        window = packing.parse(setup.schedule).window
        for number, record in enumerate(self.records):
            sections = min(cfg.sections, (len(record.latents) - 1) // window)
            settings = validation.Settings(steps=cfg.steps, distilled_guidance=cfg.guidance)
            made = validation.sample_video(pipe, record, sections, settings, seed=number)
            truth = validation.decoded_clip(pipe, record, 1 + sections * window)
            yield validation.side_by_side(made, truth)


def save_video(output: epath.PathLike, step: int, number: int, frames: np.ndarray) -> None:
    """A validation video and its contact sheet in RUN/validation."""
    folder = Path(output) / "validation" / f"step_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    video.write_mp4(folder / f"{number}.mp4", frames, 30)
    video.save_png(folder / f"{number}.png", video.contact_sheet(frames, 30))


def _bucket(batch: Any) -> tuple[tuple[int, ...], ...]:
    """What tells the batches of buckets apart."""
    return tuple(x.shape for x in jax.tree.leaves(batch))


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """A question, to be asked at every step, whether the run was told to stop: by SIGTERM, to any
    of several processes, or by Ctrl-C."""
    asked, several = threading.Event(), jax.process_count() > 1

    def handle(*_: Any) -> None:
        # Of several processes, JAX tells all of a SIGTERM to one.
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        caught = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, handle) for number in caught}

    def stopping() -> bool:
        return multihost.stopping() if several else asked.is_set()

    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
