"""What a training run is made of: frozen dataclasses, which `configs/*.py` fill in and the command
line overrides by dotted names (`--optimizer.learning-rate 1e-5`)."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

import tyro

from framepack_jax.data.config import DataConfig

MAX_STEPS = 10**9


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Global-norm clip, then the optimizer, then weight decay on matrices, then the schedule."""

    name: Literal["adamw", "adafactor", "adam8bit", "muon"] = "adamw"
    """adamw keeps 8 bytes a parameter, adam8bit (both moments in 8 bits) 2, adafactor (no first
    moment, factored second) next to none; muon (hidden matrices by their orthogonalised momentum,
    the rest by adamw, arXiv 2502.16982) 4 to 8."""
    learning_rate: float = 1e-5
    """At the end of the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: as it is, or down to a tenth at the last step."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled; on matrices, not on biases and norms."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.99
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685), with `trainable` lora."""

    rank: int = 32
    """Rank of each adapter; the three projections q, k, v share their first factor."""
    alpha: float = 32.0
    """The adapters' product is multiplied by alpha / rank: set both together."""
    targets: str = r"(double|single)/(\w+_)?(qkv|out|mlp_in|mlp_out)"
    """Regular expression of the linear layers; all of the blocks' but the modulations by default,
    which `(double|single)/(\\w+_)?(qkv|out|mlp_in|mlp_out|mod)` adds."""


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """How noise levels are drawn. t is drawn in (0, 1), then shifted by the section's own token
    count as in sampling: sigma = e^mu t / (e^mu t + 1 - t)."""

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    """Esser et al., arXiv 2403.03206, section 3.1; or even in t."""
    mean: float = 0.0
    """Of the logit of t."""
    std: float = 1.0
    """Of the logit of t."""
    shift: float | None = None
    """mu of the shift; default: that of the sampler, by the tokens of the section."""


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """What is looked at on the way."""

    every: int = 500
    """Steps from one validation to the next; 0: none."""
    samples: int = 16
    """Held-out samples the loss is taken on; at least one of each held-out clip."""
    sigmas: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels of the loss; its noise is the same each time."""
    context: bool = True
    """Also the loss with each context group blanked, and with that of another clip: whether the
    history is used."""
    videos: int = 1
    """Videos sampled from held-out clips; 0: none."""
    sections: int = 2
    """Length of these videos."""
    steps: int = 25
    """Denoising steps of these videos."""
    guidance: float = 10.0
    """Distilled guidance scale in sampling these videos."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 500
    """Steps from one checkpoint to the next; the last step has one in any case."""
    keep: int = 3
    """The newest so many are kept."""
    keep_every: int = 0
    """Those of steps that this divides are kept for good; 0: none."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of a training run, of any task."""

    bundle: str = ""
    """The bundle to start from."""
    output: str = ""
    """Folder of the run: checkpoints, logs, validation results."""
    init: str = "bundle"
    """Initial weights: bundle (those of the bundle), scratch (random), or RUN or RUN@STEP, the
    parameters of another run."""
    network: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Sizes of the network that differ from the bundle's, with --init scratch."""
    batch: int = 8
    """Samples a step, over all devices."""
    steps: int = 10_000
    """Steps of the whole run."""
    seed: int = 0
    """Seed of noise, noise levels and random weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: float = 0.0
    """Decay of the moving average of the parameters; 0: none."""
    max_nonfinite_steps: int = 10
    """Stop the run after this many steps in a row whose loss or gradient is not finite. Their
    updates are skipped."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    log_every: int = 10
    """Steps from one line of the log to the next."""
    tensorboard: bool = True
    """Write TensorBoard event files beside log.jsonl."""
    wandb: str | None = None
    """Log to this Weights & Biases project (needs the extra wandb)."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of training a transformer on packed sections."""

    bundle: str = ""
    """The bundle whose transformer is trained. Its other networks made the dataset, and decode
    validation videos."""
    init: str = "bundle"
    """Initial weights: bundle (those of the bundle), scratch (random), or RUN or RUN@STEP, the
    parameters of another run under a new data order."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    schedule: str | None = None
    """Packing schedule to train for; default: the bundle's."""
    trainable: Literal["all", "context", "lora"] = "all"
    """Train all parameters; or only the embeddings of context and image, which a base model does
    not have; or low-rank adapters beside frozen weights."""
    lora: LoRAConfig = LoRAConfig()
    grad_accum_steps: int = 1
    """Divide a batch into this many parts, taken one after another: less memory, the same result.
    """
    noise_schedule: NoiseSchedule = NoiseSchedule()
    guidance: float = 1.0
    """Value of the network's guidance input in training. The distilled release is sampled with 10;
    training data show the value 1, no guidance."""
    history_noise: float = 0.0
    """Add noise to context latents up to this level, drawn for each sample (0: none)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype that blocks compute in. Trained parameters are float32, frozen ones of this dtype."""
    remat: Literal["none", "dots", "attention", "full", "offload"] = "full"
    """Activations kept for the backward pass: all; results of matrix products and attention;
    results of attention and inputs of blocks; inputs of blocks; or inputs of blocks in host memory.
    """
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        _check(self)


def _check(cfg: TrainConfig) -> None:
    """Raise ValueError that names the field, what it is and what was expected."""
    _check_choices(cfg, "")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"--seed {cfg.seed}: expected a whole number from 0 to 2^32 - 1")
    positive = {
        "batch": cfg.batch, "grad-accum-steps": cfg.grad_accum_steps, "steps": cfg.steps,
        "lora.rank": cfg.lora.rank, "checkpoints.every": cfg.checkpoints.every,
        "checkpoints.keep": cfg.checkpoints.keep, "max-nonfinite-steps": cfg.max_nonfinite_steps,
        "log-every": cfg.log_every, "validation.sections": cfg.validation.sections,
        "validation.steps": cfg.validation.steps, "validation.samples": cfg.validation.samples,
    }  # fmt: skip
    for name, value in positive.items():
        if not 1 <= value <= MAX_STEPS:
            raise ValueError(f"--{name} {value}: expected a whole number of 1 or more")
    counts = {
        "validation.every": cfg.validation.every, "validation.videos": cfg.validation.videos,
        "checkpoints.keep-every": cfg.checkpoints.keep_every,
    }  # fmt: skip
    for name, value in counts.items():
        if not 0 <= value <= MAX_STEPS:
            raise ValueError(f"--{name} {value}: expected a whole number, or 0 for none")
    for name, path in (("output", cfg.output), ("data.path", str(cfg.data.path or ""))):
        if "://" in path:
            raise ValueError(
                f"--{name} {path}: expected a folder on a disk; an object store has to be mounted,"
                " as Cloud Storage FUSE does (a run's log is appended to, records are read in the"
                " middle of files)"
            )
    if cfg.batch % cfg.grad_accum_steps:
        raise ValueError(
            f"--grad-accum-steps {cfg.grad_accum_steps} does not divide --batch {cfg.batch}: a"
            " batch is taken in equal parts"
        )
    shares = {
        "ema": cfg.ema, "history-noise": cfg.history_noise, "optimizer.b1": cfg.optimizer.b1,
        "optimizer.b2": cfg.optimizer.b2,
    }  # fmt: skip
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(f"--{name} {value}: expected a number from 0 to below 1")
    numbers = {
        "optimizer.learning-rate": cfg.optimizer.learning_rate,
        "optimizer.weight-decay": cfg.optimizer.weight_decay,
        "noise-schedule.std": cfg.noise_schedule.std,
        "optimizer.clip-norm": cfg.optimizer.clip_norm, "optimizer.eps": cfg.optimizer.eps,
        "optimizer.warmup-steps": cfg.optimizer.warmup_steps,
    }  # fmt: skip
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"--{name} {value}: expected a finite number of 0 or more")
    sigmas = cfg.validation.sigmas
    if not sigmas or any(not 0 < sigma <= 1 for sigma in sigmas):
        raise ValueError(f"--validation.sigmas {sigmas}: expected numbers in (0, 1]")
    if cfg.init == "scratch" and cfg.trainable != "all":
        raise ValueError(
            f"--init scratch trains all parameters, --trainable {cfg.trainable} would leave random"
            " ones frozen; give --trainable all, or --init bundle"
        )
    if cfg.network and cfg.init == "bundle":
        raise ValueError(
            f"network sizes {dict(cfg.network)} are given, but --init bundle takes a network as it"
            " is; give --init scratch"
        )


def _check_choices(cfg: Any, prefix: str) -> None:
    """Fields with a list of choices, as a file can give them anything."""
    hints = typing.get_type_hints(type(cfg))
    for field in dataclasses.fields(cfg):
        value, name = getattr(cfg, field.name), f"{prefix}{field.name}".replace("_", "-")
        choices = typing.get_args(hints[field.name])
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{name}.")
        elif typing.get_origin(hints[field.name]) is Literal and value not in choices:
            raise ValueError(f"--{name} {value}: expected one of {', '.join(map(str, choices))}")
