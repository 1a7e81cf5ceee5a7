"""A VAE learns to give back short clips.

The loss is the mean squared error of what it gives back, of a clip and of that clip's first frame
taken alone (as start images are), and a small share of the divergence of its latents from a normal
distribution (HunyuanVideo, arXiv 2412.03603, section 4.1, less the perceptual and the adversarial
term). At its end a run becomes a bundle whose `latent_mean` and `latent_std` are those of the
latents of training clips, so that a transformer sees each channel with mean 0 and variance 1.

Shapes: B batch, T frames, H W rows and columns, C channels.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from framepack_jax import bundle, video
from framepack_jax.data.pixel_batch import signed
from framepack_jax.data.vae_clips import Clips, ListedVideo, find_videos, hold_out, read_clip
from framepack_jax.models.hunyuan import vae
from framepack_jax.models.params import Params, unstack_layers
from framepack_jax.models.quantization import cast_params
from framepack_jax.parallel.sharding import BATCH, constrain
from framepack_jax.training import checkpoints, metrics, optimizer, summary
from framepack_jax.training.checkpoints import RunError
from framepack_jax.training.config import CheckpointConfig, OptimizerConfig
from framepack_jax.training.export import provenance, write_bundle
from framepack_jax.training.prefetch import batch_sharding, check_batch, feed, local_share
from framepack_jax.training.state import State, apply_gradients
from framepack_jax.training.trainer import RATE, stop_signal
from framepack_jax.utils.compare import differences
from framepack_jax.utils.messages import shorten
from framepack_jax.utils.progress import Bar

# Fields that a run keeps from its first step to its last. Where the videos lie is none of them.
FIXED = ("init", "trainable", "network", "frames", "size", "batch", "holdout", "kl", "seed", "ema")
Trainable = Literal["all", "decoder"]
SHOWN = 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="cosine", weight_decay=0.0)
CHECKPOINTS = CheckpointConfig(every=250)


@dataclasses.dataclass(frozen=True)
class VaeTrainConfig:
    """Training a VAE: what is trained, on what, and how."""

    videos: str = ""
    """Folder of videos."""
    bundle: str = ""
    """The bundle whose VAE is trained, and whose other networks the new bundle has."""
    output: str = ""
    """Folder of the run: checkpoints, log, what validation shows."""
    init: str = "bundle"
    """Where training begins: bundle (its weights), scratch (random weights), or RUN or RUN@STEP,
    the parameters of another run."""
    network: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Sizes of the VAE that differ from the bundle's, where it begins from scratch."""
    trainable: Trainable = "all"
    """decoder: latents stay what they are, so that transformers that know them need no more
    training."""
    frames: int = 17
    """Length of a clip, 1 + 4 k; sampling decodes clips of 17."""
    size: tuple[int, int] = (128, 128)
    """Height and width of a clip in pixels, cut at random out of a video's picture."""
    holdout: int = 16
    """Videos that are kept for validation, chosen by their names."""
    batch: int = 4
    """Clips a step, over all devices."""
    steps: int = 2000
    """Steps of the whole run."""
    kl: float = 1e-5
    """Share of the divergence of a latent number from a normal one, beside the squared error."""
    seed: int = 0
    """Of clips, noise and fresh weights."""
    optimizer: OptimizerConfig = OPTIMIZER
    ema: float = 0.99
    """Decay of the moving average of the parameters, which is what is kept; 0: none."""
    max_nonfinite_steps: int = 10
    """So many steps in a row whose loss or gradient is not finite stop the run."""
    validate_every: int = 500
    """Steps from one validation to the next."""
    checkpoints: CheckpointConfig = CHECKPOINTS
    log_every: int = 10
    """Steps from one line of the log to the next."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"--frames {self.frames}: expected 1 + 4 k, as 17")
        if min(self.size) < 8 or any(side % 8 for side in self.size):
            raise ValueError(f"--size {self.size}: expected multiples of 8 pixels")
        whole = {"batch": self.batch, "steps": self.steps, "validate-every": self.validate_every,
                 "log-every": self.log_every,
                 "max-nonfinite-steps": self.max_nonfinite_steps}  # fmt: skip
        for name, value in whole.items():
            if value < 1:
                raise ValueError(f"--{name} {value}: expected a whole number of 1 or more")
        if self.trainable not in get_args(Trainable):
            raise ValueError(f"--trainable {self.trainable}: expected all or decoder")
        if self.holdout < 0 or not self.kl >= 0:
            raise ValueError(f"--holdout {self.holdout}, --kl {self.kl}: expected 0 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema}: expected a decay from 0 to below 1")


class Figures(NamedTuple):
    """Of one step: squared errors of clips and of first frames, divergence a latent number, norm
    of the gradient, and how many updates in a row have been left out."""

    clip: jax.Array
    still: jax.Array
    kl: jax.Array
    grad_norm: jax.Array
    skipped_in_a_row: jax.Array


def losses(
    cfg: vae.VaeConfig, params: Params, clips: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(squared error, that of the first frames alone, divergence a latent number) of clips
    (B, T, H, W, C) in [-1, 1], through a sample of their latents."""

    def through(clips: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = vae.encode(cfg, params, clips, vae.Tiling(frames=None))
        sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        back = vae.decode(cfg, params, sample, vae.Tiling(frames=None))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        return jnp.mean(jnp.square(back - clips)), kl

    keys = jax.random.split(key)
    error, kl = through(clips, keys[0])
    if clips.shape[1] == 1:
        return error, error, kl
    still, still_kl = through(clips[:, :1], keys[1])
    return error, still, (kl + still_kl) / 2


def train_step(
    cfg: VaeTrainConfig,
    network: vae.VaeConfig,
    tx: Any,
    state: State,
    clips: jax.Array,
    rate: jax.Array,
) -> tuple[State, Figures]:
    """One update by clips (B, T, H, W, C) uint8, with the learning rate `rate`."""
    clips = signed(constrain(clips, BATCH, *[None] * 4))
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)

    def loss(params: Params) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        if cfg.trainable == "decoder":
            params = params | {"encoder": jax.lax.stop_gradient(params["encoder"])}
        error, still, kl = losses(network, params, clips, key)
        return error + still + cfg.kl * kl, (error, still, kl)

    (total, parts), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    state, norm = apply_gradients(state, grads, total, tx, cfg.ema, rate)
    return state, Figures(*parts, norm, state.skipped_in_a_row)


def psnr(errors: Any) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of mean squared errors of values in [-1, 1]."""
    return 10 * np.log10(4 / np.maximum(np.asarray(errors), 1e-12))


def train(
    cfg: VaeTrainConfig,
    bundle_path: epath.PathLike,
    mesh: Mesh,
    *,
    resume: bool = True,
    say: Callable[[str], None] = print,
) -> int:
    """Train until the last step, or until the run is asked to stop; returns the step it came to.

    Raises ValueError (with RunError, BundleError), OSError where a checkpoint cannot be written,
    FloatingPointError where losses stay not finite.
    """
    check_batch(cfg.batch, 1, mesh)
    manifest = bundle.read_manifest(bundle_path)
    network = network_of(cfg, manifest)
    videos, held = hold_out(find_videos(cfg.videos, cfg.frames, cfg.size), cfg.holdout)
    clips = Clips(videos, cfg.frames, cfg.size, cfg.batch, cfg.seed, local_share(mesh, cfg.batch))
    record = {"config": checkpoints.as_record(cfg), "videos": [v.name for v in videos]}
    there = checkpoints.steps_of(cfg.output)
    if there and not resume:
        raise RunError(f"{cfg.output} holds a run up to step {there[-1]}; choose another --output")
    tx = transformation(cfg)
    whole = NamedSharding(mesh, PartitionSpec())
    with (
        jax.set_mesh(mesh),
        contextlib.closing(checkpoints.manager(cfg.output, cfg.checkpoints)) as manager,
    ):
        if there:
            _check_same_run(cfg, record, videos, held)
            abstract = jax.eval_shape(lambda: begin(cfg, tx, init(cfg, network)))
            place = functools.partial(jax.ShapeDtypeStruct, sharding=whole)
            abstract = jax.tree.map(lambda x: place(x.shape, x.dtype), abstract)
            state, data = checkpoints.restore(manager, there[-1], abstract)
            clips.set_state(data)
            say(f"{cfg.output}: goes on after step {there[-1]}")
        else:
            params = first_params(cfg, network, manifest, bundle_path)
            state = jax.device_put(begin(cfg, tx, params), whole)
            say(f"{cfg.output}: begins from {cfg.init}")
        checkpoints.write_record(cfg.output, record)
        for line in _run_lines(cfg, mesh, state, videos, held):
            say(line)
        return _run(cfg, network, tx, mesh, manager, clips, held, state)


def transformation(cfg: VaeTrainConfig) -> optax.GradientTransformation:
    """Of gradients into updates; none of the encoder where the decoder alone is trained."""
    tx = optimizer.make(cfg.optimizer, ())
    if cfg.trainable == "all":
        return tx
    parts = {"encoder": "kept", "decoder": "trained"}
    return optax.partition({"trained": tx, "kept": optax.set_to_zero()}, parts)


def network_of(cfg: VaeTrainConfig, manifest: bundle.Manifest) -> vae.VaeConfig:
    """The VAE of a bundle, or one of other sizes. Raises BundleError."""
    _, network = bundle.role_config(manifest, "vae")
    if cfg.network:
        fields = dataclasses.asdict(network) | dict(cfg.network)
        network = bundle.config_from_json(vae.VaeConfig, fields)
    return network


def init(cfg: VaeTrainConfig, network: vae.VaeConfig) -> Params:
    """Random parameters."""
    return vae.init(network, jax.random.fold_in(jax.random.key(cfg.seed), 0))


def first_params(
    cfg: VaeTrainConfig,
    network: vae.VaeConfig,
    manifest: bundle.Manifest,
    bundle_path: epath.PathLike,
) -> Params:
    """Parameters before the first step. Raises BundleError, RunError."""
    if cfg.init == "scratch":
        return init(cfg, network)
    if cfg.init == "bundle":
        if cfg.network:
            raise ValueError("a VAE of other sizes has no weights in the bundle: --init scratch")
        return bundle.load_params(bundle_path, manifest, "vae", dtype=jnp.float32)
    run, step = checkpoints.parse_run(cfg.init)
    params = trained_params(network, run, step)
    knew_motion = checkpoints.read_record(run)["config"]["frames"] > 1
    return params if knew_motion or cfg.frames == 1 else inflated(params)


def inflated(params: Params) -> Params:
    """A VAE of single frames that makes of a clip what it made of its frames: of a single frame
    every tap in time sees the same, so what all weigh is given to the last, which sees the frame
    itself (inflation as in Carreira & Zisserman, arXiv 1705.07750, made causal)."""

    def last(kernel: jax.Array) -> jax.Array:
        return jnp.zeros_like(kernel).at[-1].set(kernel.sum(axis=0))

    leaves = flatten_dict(params)
    convolutions = {
        path for path, leaf in leaves.items() if path[-1] == "kernel" and leaf.ndim == 5
    }
    return unflatten_dict({p: last(x) if p in convolutions else x for p, x in leaves.items()})


def trained_params(network: vae.VaeConfig, run: str, step: int) -> Params:
    """The parameters of a run, their moving average where it keeps one. Raises RunError."""
    part = "ema" if checkpoints.read_record(run)["config"]["ema"] else "params"
    abstract = jax.eval_shape(lambda: vae.init(network, jax.random.key(0)))
    return checkpoints.restore_params(run, step, abstract, part)


def begin(cfg: VaeTrainConfig, tx: Any, params: Params) -> State:
    """The state before the first step."""
    params = cast_params(params, jnp.float32)
    ema = jax.tree.map(jnp.copy, params) if cfg.ema else None
    zero = functools.partial(jnp.zeros, [], jnp.int32)
    return State(zero(), params, tx.init(params), ema, zero(), zero())


def _run_lines(
    cfg: VaeTrainConfig,
    mesh: Mesh,
    state: State,
    videos: Sequence[ListedVideo],
    held: Sequence[ListedVideo],
) -> Iterator[str]:
    """What a run says before it goes on from a state."""
    if (first := int(state.step)) >= cfg.steps:
        return
    epochs = cfg.steps * cfg.batch / len(videos)
    yield summary.data_line(f"{len(videos):,} videos", len(held), epochs)
    count, encoder = _count(state.params), _count(state.params["encoder"])
    trained = count - encoder if cfg.trainable == "decoder" else count
    yield summary.trained_line(trained, count)
    yield summary.batch_line(cfg.batch, 1, mesh)
    validates = cfg.validate_every if held else 0
    yield summary.steps_line(first, cfg.steps, cfg.checkpoints.every, validates, "--holdout 0")
    yield "compiling    the step, before the first one"


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _check_same_run(
    cfg: VaeTrainConfig,
    record: dict[str, Any],
    videos: Sequence[ListedVideo],
    held: Sequence[ListedVideo],
) -> None:
    """Raise RunError where a run was begun otherwise."""
    then, now = checkpoints.read_record(cfg.output), record
    differing = differences(then["config"], now["config"], FIXED)
    if then["config"]["optimizer"]["name"] != now["config"]["optimizer"]["name"]:
        differing.append("the optimizer")
    differing += _changed_videos(then["videos"], [v.name for v in videos], [v.name for v in held])
    if differing:
        raise RunError(
            f"{cfg.output} was begun otherwise ({'; '.join(differing)}); go on with what it was"
            f" begun with, or begin another run from it: --output NEW --init {cfg.output}"
        )


def _changed_videos(then: Sequence[str], now: Sequence[str], held: Sequence[str]) -> Iterator[str]:
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


def _run(
    cfg: VaeTrainConfig, network: vae.VaeConfig, tx: Any, mesh: Mesh, manager: Any, clips: Clips,
    held: Sequence[ListedVideo], state: State,
) -> int:  # fmt: skip
    """From a state to the last step, or to where the run is asked to stop."""
    first = int(state.step)
    if first >= cfg.steps:
        return first
    Path(cfg.output).mkdir(parents=True, exist_ok=True)
    step_of = _compiled(cfg, network, tx, mesh, state)
    rate = optimizer.learning_rate(cfg.optimizer, cfg.steps)
    log = metrics.Jsonl(Path(cfg.output), first)
    position = clips.get_state()
    with contextlib.ExitStack() as stacked:
        stacked.enter_context(contextlib.closing(log))
        batches = stacked.enter_context(contextlib.closing(feed(clips, mesh, cfg.batch)))
        asked = stacked.enter_context(stop_signal())
        bar = stacked.enter_context(
            Bar(total=cfg.steps, initial=first, desc="training", disable=metrics.is_quiet())
        )
        window: list[Figures] = []
        for step in range(first + 1, cfg.steps + 1):
            try:
                fed = next(batches)
            except Exception as error:
                if step - 1 > first:
                    checkpoints.save(manager, step - 1, state, position)
                    checkpoints.wait(manager)
                raise ValueError(
                    f"step {step} has no clips: {error}. Once they can be read, the same command"
                    f" goes on after step {step - 1}"
                ) from error
            position = fed.state
            if step == first + 1:
                bar.unpause()
            state, figures = step_of(state, fed.batch, rate(step - 1))
            window.append(figures)
            bar.update()
            stop = asked() or step == cfg.steps
            if step % cfg.log_every == 0 or stop:
                line = _line(jax.device_get(window))
                log.write(step, line)
                bar.set_postfix(psnr=f"{line['psnr']:.2f}")
                if int(window[-1].skipped_in_a_row) >= cfg.max_nonfinite_steps:
                    raise FloatingPointError(
                        f"step {step}: loss or gradient have not been finite for"
                        f" {int(window[-1].skipped_in_a_row)} steps; lower"
                        " --optimizer.learning-rate, or look at the videos"
                    )
                window = []
            if stop or step % cfg.checkpoints.every == 0:
                checkpoints.save(manager, step, state, fed.state)
            if held and (step == cfg.steps or step % cfg.validate_every == 0):
                params = state.params if state.ema is None else state.ema
                figures = validate(network, params, held, cfg.frames, Path(cfg.output), step)
                log.write(step, figures)
                bar.write(f"step {step}: {_said(figures)}")
                bar.unpause()
            if stop:
                break
        checkpoints.wait(manager)
        return step


def _compiled(
    cfg: VaeTrainConfig, network: vae.VaeConfig, tx: Any, mesh: Mesh, state: State
) -> Any:
    """The step of (state, clips, learning rate), which uses the state up; it lies afterwards where
    it lay before."""
    step = jax.jit(
        functools.partial(train_step, cfg, network, tx),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
    )
    shape = cfg.batch, cfg.frames, *cfg.size, 3
    clips = jax.ShapeDtypeStruct(shape, np.uint8, sharding=batch_sharding(mesh))
    return step.lower(state, clips, RATE).compile()


def _line(window: Sequence[Figures]) -> dict[str, float]:
    clip, still, kl, norm, _ = (float(np.mean(part)) for part in zip(*window, strict=True))
    return {
        "psnr": float(psnr(clip)), "still_psnr": float(psnr(still)), "kl": kl, "grad_norm": norm,
    }  # fmt: skip


def _said(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(cfg: vae.VaeConfig, params: Params, clips: jax.Array) -> jax.Array:
    """Clips (B, T, H, W, C) in [-1, 1] through the modes of their latents."""
    mean, _ = vae.encode(cfg, params, clips, vae.Tiling(frames=None))
    return jnp.clip(vae.decode(cfg, params, mean, vae.Tiling(frames=None)), -1, 1)


def validate(
    network: vae.VaeConfig,
    params: Params,
    held: Sequence[ListedVideo],
    frames: int,
    folder: Path,
    step: int,
) -> dict[str, float]:
    """Signal to noise of the middle clips of held-out videos, whole pictures, and of their first
    frames alone: mean over videos, and the least; a contact sheet of the first few, truth above."""
    clip_errors, still_errors, shown = [], [], []
    for each in held:
        clip = read_clip(each, (each.frames - frames) // 2, frames)
        height, width = (side // 8 * 8 for side in clip.shape[1:3])
        clip = clip[None, :, :height, :width]
        truth = signed(jnp.asarray(clip))
        back = reconstruct(network, params, truth)
        clip_errors.append(jnp.mean(jnp.square(back - truth)))
        still = reconstruct(network, params, truth[:, :1])
        still_errors.append(jnp.mean(jnp.square(still - truth[:, :1])))
        if len(shown) < SHOWN:
            made = np.asarray(jnp.round((back[0] + 1) * 127.5)).astype(np.uint8)
            shown.append(np.concatenate([clip[0, -1], made[-1]], axis=0))
    target = folder / "validation"
    target.mkdir(parents=True, exist_ok=True)
    labels = [each.name for each in held[:SHOWN]]
    sheet = video.labelled_sheet(shown, labels, columns=SHOWN)
    video.save_png(target / f"step_{step:07d}.png", sheet)
    clips, stills = psnr(clip_errors), psnr(still_errors)
    return {
        "held_out/psnr": float(clips.mean()), "held_out/least_psnr": float(clips.min()),
        "held_out/still_psnr": float(stills.mean()),
    }  # fmt: skip


def latent_statistics(
    network: vae.VaeConfig, params: Params, videos: Sequence[ListedVideo], frames: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each latent channel over the middle clips of videos."""
    encode = jax.jit(lambda p, x: vae.encode(network, p, x, vae.Tiling(frames=None))[0])
    total, squares, count = 0.0, 0.0, 0
    for each in videos:
        clip = read_clip(each, (each.frames - frames) // 2, frames)
        height, width = (side // 8 * 8 for side in clip.shape[1:3])
        mean = np.asarray(encode(params, signed(jnp.asarray(clip[None, :, :height, :width]))))
        mean = mean.reshape(-1, mean.shape[-1]).astype(np.float64)
        total, squares = total + mean.sum(0), squares + np.square(mean).sum(0)
        count += len(mean)
    mean = total / count
    std = np.sqrt(squares / count - np.square(mean))
    return tuple(mean.tolist()), tuple(std.tolist())


def export(
    run: str, bundle_path: epath.PathLike, output: str, *, dtype: Literal["bfloat16", "float32"]
    = "bfloat16", copy: bool = True,
) -> str:  # fmt: skip
    """Make a bundle with the VAE of a run (RUN or RUN@STEP); the transformer and the encoders are
    those of the bundle at `bundle_path`. Returns what was written, in a line."""
    folder, step = checkpoints.parse_run(run)
    fields = checkpoints.read_record(folder)
    manifest = bundle.read_manifest(bundle_path)
    cfg = VaeTrainConfig(videos=fields["config"]["videos"], network=fields["config"]["network"])
    network = network_of(cfg, manifest)
    params = jax.tree.map(np.asarray, trained_params(network, folder, step))
    mean, std = manifest.latent_mean, manifest.latent_std
    if (fields["config"]["trainable"], fields["config"]["init"]) != ("decoder", "bundle"):
        trained_on = set(fields["videos"])
        frames, size = fields["config"]["frames"], tuple(fields["config"]["size"])
        videos = [v for v in find_videos(cfg.videos, frames, size) if v.name in trained_on]
        mean, std = latent_statistics(network, params, videos[:256], frames)
    leaves = (
        (name, np.asarray(leaf).astype(jnp.dtype(dtype)))
        for name, leaf in unstack_layers(params, vae.STACKS).items()
    )
    manifest = dataclasses.replace(manifest, latent_mean=mean, latent_std=std)
    made = manifest.roles["vae"].kind, dataclasses.asdict(network)
    origin = f"{folder} at step {step}"
    source = {"name": origin, "training": provenance(folder, step)}
    written = write_bundle(
        manifest, bundle_path, epath.Path(output), "vae", made, leaves, source, copy
    )
    return f"{output}: VAE of {origin}, {written.bytes / 1e6:,.1f} MB; its latents' mean and spread"
