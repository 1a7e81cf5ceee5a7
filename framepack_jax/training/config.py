"""Settings of a training run: frozen dataclasses that `configs/*.py` fill in, and that the command
line overrides by dotted names (`--optimizer.learning-rate 1e-5`)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import tyro

from framepack_jax.data.config import DataConfig
from framepack_jax.utils import fields
from framepack_jax.utils.fields import Range
from framepack_jax.utils.paths import IN_STORES

MAX_STEPS, MAX_SEED = 10**9, 2**32 - 1
Positive = Annotated[int, Range(at_least=1, at_most=MAX_STEPS)]
Count = Annotated[int, Range(at_least=0, at_most=MAX_STEPS)]
NonNegative = Annotated[float, Range(at_least=0)]
Decay = Annotated[float, Range(at_least=0, below=1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
NoiseLevel = Annotated[float, Range(above=0, at_most=1)]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Clipping by the global norm, the optimizer, weight decay on matrices, the learning rate."""

    name: Literal["adamw", "adafactor", "adam8bit", "muon"] = "adamw"
    """adamw keeps 8 bytes per parameter; adam8bit (both moments in 8 bits) 2; adafactor (factored
    second moment, no first) almost none; muon (orthogonalised momentum for hidden matrices, adamw
    for the rest, arXiv 2502.16982) 4 to 8."""
    learning_rate: NonNegative = 1e-5
    """Learning rate at the end of the warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or down to a tenth at the last step."""
    warmup_steps: Count = 100
    """Steps of the warm-up, a linear rise from 0."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of matrices; biases and norms have none."""
    b1: Decay = 0.9
    """Decay of the first moment."""
    b2: Decay = 0.99
    """Decay of the second moment."""
    eps: NonNegative = 1e-8
    """Number added to the root of the second moment."""
    clip_norm: NonNegative = 1.0
    """Maximum global norm of the gradient; 0: no clipping."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685), with `trainable` lora."""

    rank: Positive = 32
    """Rank of each adapter; the projections q, k and v share their first factor."""
    alpha: float = 32.0
    """Scale: adapters are multiplied by alpha / rank."""
    targets: str | None = None
    """Regular expression of the adapted linear layers; default: all linear layers of the network's
    blocks, without HunyuanVideo's modulations, which
    `(double|single)/(\\w+_)?(qkv|out|mlp_in|mlp_out|mod)` adds."""
    context: bool = False
    """Also train all parameters of --trainable context, as Helios was trained from Wan. The run
    exports a bundle with them, and beside it the adapters."""


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Distribution of noise levels. t in (0, 1) has it, and is shifted by the token count of the
    section as in sampling: sigma = e^mu t / (e^mu t + 1 - t)."""

    distribution: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of t; logit-normal: Esser et al., arXiv 2403.03206, section 3.1."""
    mean: float = 0.0
    """Mean of the logit of t."""
    std: NonNegative = 1.0
    """Standard deviation of the logit of t."""
    mu: float | None = None
    """Shift; default: the value that the sampler uses for the section. e^mu is what other programs
    call the flow shift."""
    high: Share | None = None
    """Fraction of samples at levels above 0.95, where sampling starts: uniform from there to 1, the
    others below as distributed. Default: as many as the distribution has."""
    stratified: bool = True
    """Space the levels of a batch evenly over the distribution, from a random start, so that each
    step sees all of them. False: draw the level of each sample alone, as runs of earlier versions
    do."""
    shift: dataclasses.InitVar[tyro.conf.Suppress[float | None]] = None

    def __post_init__(self, shift: float | None) -> None:
        if shift is not None:
            raise ValueError(
                f"NoiseSchedule(shift={shift:g}) is now NoiseSchedule(mu={shift:g}): sigma is"
                " shifted by the factor e^mu"
            )
        if self.high is not None and not self.stratified:
            raise ValueError(
                f"--noise-schedule.high {self.high:g} needs levels that are spaced over a batch:"
                " remove --noise-schedule.no-stratified"
            )


@dataclasses.dataclass(frozen=True)
class HistoryConfig:
    """Changes of the history in training, each drawn for each sample. Validation reads it whole.
    Helios (arXiv 2603.04379) was trained with drop_all 0.4, drop_oldest 0.4, corrupt 0.333 and
    clean 0.1."""

    drop_all: Share = 0.0
    """Fraction of samples without history and anchor, as at the start of a video from text."""
    drop_oldest: Share = 0.0
    """Fraction of the other samples without their oldest history: 1 + k windows of latent frames, k
    drawn uniformly. The anchor is kept."""
    drop_history: Share = 0.0
    """Fraction of samples without history; anchor and start image are kept."""
    drop_start: Share = 0.0
    """Fraction of samples without anchor and start image; the history is kept."""
    noisy: Share | Literal["random"] = 0.0
    """Noise the history to this factor, 0 to 1, times the noise level of the target; random: to a
    factor drawn from 0 to 1 for each sample. Anchor and start image stay clean. (arXiv 2504.12626,
    table 2, after Diffusion Forcing; one factor a sample is our reading.)"""
    corrupt: Decay = 0.0
    """Add noise to history and anchor, at levels from 0 up to this one that do not depend on the
    target's."""
    corrupt_mode: Literal["frame", "sample", "random"] = "frame"
    """frame: each latent frame has a level of its own. sample: one level for all frames. random:
    as frame in 0.9 of the samples; the others are scaled down by 0.9 to 1 and up again."""
    clean: Share = 0.1
    """Fraction of samples that --history.corrupt leaves as they are."""
    anchor_noise: tuple[Share, Share] | None = None
    """Add noise to anchor and start image, each latent frame at a level of its own from LOW to
    HIGH, instead of that of --history.corrupt. Helios noises given images at 0.111 to 0.135."""

    rollouts: Share = 0.0
    """Fraction of steps, evenly spaced, whose history is the network's own prediction; 0.5 is every
    second step. The true history is noised and denoised in one step. Anchor and start image stay
    as they are. Costs another forward pass in these steps."""
    rollout_level: Share = 0.5
    """Highest noise level of --history.rollouts; the level of a sample is uniform from 0."""

    def __post_init__(self) -> None:
        if self.noisy and self.corrupt:
            raise ValueError(
                f"--history.noisy {self.noisy} and --history.corrupt {self.corrupt:g} both add"
                " noise to the history; give one of them"
            )
        if self.anchor_noise is not None and self.anchor_noise[0] > self.anchor_noise[1]:
            low, high = self.anchor_noise
            raise ValueError(
                f"--history.anchor-noise {low:g} {high:g}: expected the lower level first"
            )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Distillation to few steps of sampling, by multistep consistency (arXiv 2403.06807)."""

    steps: Count = 0
    """Steps of sampling after training, as 4; 0: no distillation, but flow matching."""
    teacher_steps: Positive = 24
    """Steps of the teacher, the network that the run starts from; a multiple of --distill.steps."""

    def __post_init__(self) -> None:
        if self.steps and self.teacher_steps % self.steps:
            raise ValueError(
                f"--distill.teacher-steps {self.teacher_steps} is no multiple of --distill.steps"
                f" {self.steps}: a step of the student is a whole number of the teacher's"
            )


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Validation on held-out clips while training."""

    every: Count = 500
    """Steps from one validation to the next; 0: no validation."""
    samples: Positive = 16
    """Held-out samples for the loss; at least one of each held-out clip."""
    sigmas: tuple[NoiseLevel, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
    """Noise levels of the loss; every validation uses the same noise."""
    context: bool = True
    """Also compute the loss with each context group blanked, and with that of another clip. The
    differences show whether the model uses its history."""
    videos: Count = 1
    """Videos to sample from held-out clips; 0: none."""
    sections: Positive = 2
    """Length of these videos in sections."""
    steps: Positive = 25
    """Denoising steps of these videos; with distillation --distill.steps."""
    guidance: float = 10.0
    """Distilled guidance scale of these videos."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Times of checkpoints, and how long they are kept."""

    every: Positive = 500
    """Steps from one checkpoint to the next; the last step always has one."""
    minutes: NonNegative = 30.0
    """Minutes after which a checkpoint is written in any case; 0: by steps only."""
    keep: Positive = 3
    """Number of newest checkpoints to keep."""
    keep_every: Count = 0
    """Keep checkpoints of steps that are multiples of this for good; 0: none."""
    wait_seconds: Positive = 600
    """Seconds that a process waits for the others to write their parts of a checkpoint. If one of
    them may not write, or its disk is full, all end after that time."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss; RUN@best names it."""


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """Steps that are skipped because their gradient is far larger than before."""

    factor: NonNegative = 0.0
    """Skip the update of a step if the norm of its gradient exceeds this many times the median of
    recent steps, as 10; 0: never."""
    window: Positive = 128
    """Number of steps of the median; no step is skipped before there are so many."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of a training run, of any task."""

    bundle: Annotated[str, IN_STORES] = ""
    """The bundle to start from."""
    output: Annotated[str, IN_STORES] = ""
    """Folder of the run: checkpoints, logs, validation results."""
    init: Annotated[str, IN_STORES] = "bundle"
    """Initial weights: bundle (those of the bundle), scratch (random), or RUN or RUN@STEP, the
    parameters of another run."""
    network: tyro.conf.Suppress[Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Sizes of the network that differ from the bundle's, with --init scratch."""
    batch: Positive = 8
    """Samples a step, over all devices."""
    steps: Positive = 10_000
    """Steps of the whole run."""
    seed: Annotated[int, Range(at_least=0, at_most=MAX_SEED)] = 0
    """Seed of noise, noise levels and random weights."""
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: Decay = 0.0
    """Decay of the moving average of the parameters; 0: none."""
    ema_warmup: bool = True
    """Begin the moving average with smaller decays, (1 + t) / (10 + t) after t updates, so that it
    forgets the initial weights. False: as runs of earlier versions."""
    skip_spikes: SpikeConfig = SpikeConfig()
    max_skipped_steps: Positive = 10
    """Stop the run after this many steps in a row whose update was skipped: the loss or gradient
    was not finite, or --skip-spikes.factor was exceeded."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    stop_seconds: NonNegative = 0.0
    """Seconds from SIGTERM to the end of the process, whether or not the checkpoint is written; 0:
    no limit."""
    watchdog_seconds: NonNegative = 300.0
    """Seconds that a step may take, or ten times the median step if that is longer, before the
    process prints the stacks of its threads and ends with code 1; 0: no limit. Loading, compiling,
    saving and validating may take twelve times as long."""
    log_every: Positive = 10
    """Steps from one line of the log to the next."""
    profile: str | None = None
    """Trace steps START:STOP, as 100:105, with JAX's profiler into RUN/profile."""
    tensorboard: bool = True
    """Write TensorBoard event files beside log.jsonl."""
    wandb: str | None = None
    """Log to this Weights & Biases project (needs the extra wandb)."""


def profile_steps(text: str) -> tuple[int, int]:
    """Parse START:STOP to (first, last) step, both included. Raises ValueError."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    steps = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError(f"--profile {text}: expected START:STOP, steps from 1, as 100:105")
    return steps


def check_run(cfg: RunConfig) -> None:
    """Raise ValueError for a setting of any task that its type does not exclude."""
    if cfg.profile is not None:
        profile_steps(cfg.profile)
    if 0 < cfg.skip_spikes.factor <= 1:
        raise ValueError(
            f"--skip-spikes.factor {cfg.skip_spikes.factor:g} would skip every second step:"
            " expected more than 1, as 10, or 0 to skip none"
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of training a transformer on packed sections."""

    bundle: Annotated[str, IN_STORES] = ""
    """The bundle whose transformer is trained. Its other networks made the dataset, and decode
    validation videos."""
    init: Annotated[str, IN_STORES] = "bundle"
    """Initial weights: bundle (those of the bundle), scratch (random), or RUN or RUN@STEP, the
    parameters of another run under a new data order."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    schedule: str | None = None
    """Packing schedule to train for; default: the bundle's."""
    codebook: Annotated[str | None, IN_STORES] = None
    """Codebook file of a schedule with +D, written by framepack fit-codebook; default: that of the
    bundle."""
    trainable: Literal["all", "context", "lora"] = "all"
    """Train all parameters; or only the embeddings of context and image, which a base model does
    not have; or low-rank adapters beside frozen weights."""
    lora: LoRAConfig = LoRAConfig()
    grad_accum_steps: Positive = 1
    """Divide a batch into this many parts, taken one after another: less memory, the same result.
    """
    noise_schedule: NoiseSchedule = NoiseSchedule()
    guidance: float | tuple[float, float] = 1.0
    """Value of the network's guidance input in training, or LOW and HIGH: drawn uniformly between
    them for each sample. The distilled release is sampled with 10; training data show the value 1,
    no guidance."""
    history: HistoryConfig = HistoryConfig()
    distill: DistillConfig = DistillConfig()
    causal: bool = False
    """Let each latent frame of a section read the frames up to itself and the context, and no later
    frame (CausVid, as in arXiv 2504.12626, table 2). The bundle of the run is sampled so. A bundle
    that is causal already stays causal."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype that blocks compute in. Trained parameters are float32, frozen ones of this dtype."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which devices add up the gradients of blocks; bfloat16 halves the bytes they
    exchange for it, and rounds the gradient of each device."""
    remat: Literal["none", "dots", "attention", "full", "offload"] = "full"
    """Activations kept for the backward pass: all; results of matrix products and attention;
    results of attention and inputs of blocks; inputs of blocks; or inputs of blocks in host memory.
    """
    validation: ValidationConfig = ValidationConfig()

    def __post_init__(self) -> None:
        fields.check(self)
        _check(self)


def _check(cfg: TrainConfig) -> None:
    """Raise ValueError if two settings contradict each other."""
    check_run(cfg)
    if cfg.batch % cfg.grad_accum_steps:
        raise ValueError(
            f"--grad-accum-steps {cfg.grad_accum_steps} does not divide --batch {cfg.batch}: a"
            " batch is divided into equal parts"
        )
    if cfg.reduce_dtype == "bfloat16" != cfg.dtype:
        raise ValueError(
            f"--reduce-dtype bfloat16 with --dtype {cfg.dtype}: gradients have the dtype of the"
            " computation; give --dtype bfloat16, or leave --reduce-dtype out"
        )
    if cfg.data.empty_start and cfg.trainable == "lora":
        raise ValueError(
            f"--data.empty-start {cfg.data.empty_start:g} with --trainable lora: adapters cannot"
            " tell sampling that videos start empty, a bundle can; give --trainable all"
        )
    if cfg.causal and cfg.trainable == "lora" and not cfg.lora.context:
        raise ValueError(
            "--causal with --trainable lora: adapters cannot tell sampling that no frame reads a"
            " later one, a bundle can; give --trainable all or context, or --lora.context"
        )
    if cfg.codebook and cfg.trainable == "lora" and not cfg.lora.context:
        raise ValueError(
            f"--codebook {cfg.codebook} with --trainable lora: adapters are sampled with the bundle"
            " that they were trained from, and with its codebook; give --trainable all"
        )
    if not cfg.validation.sigmas:
        raise ValueError(f"--validation.sigmas {cfg.validation.sigmas}: expected one or more")
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
