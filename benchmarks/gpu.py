"""What one GPU does at the shapes of the released model.

    python -m benchmarks.gpu [--parts matmul step ...] [--scale toy] [--json FILE] [--document FILE]

Random weights of the true shapes: 608 x 640 pixels, window 9, bfloat16. First what the device can
do at all - matrix products, copies, attention, convolutions, weights streamed from the host - then
what is made of it: a denoising step, a section, the VAE, a training step of a LoRA, and what
diffusers needs for the same (`peer-*`). Each part runs in a process of its own, so that peak memory
is that part's. `--scale toy` takes the same way at sizes for a CPU; its figures mean nothing.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import device, peers, summary
from benchmarks.bench import (
    BF16,
    FULL,
    ROUNDS,
    SCHEDULE,
    TOY,
    Bench,
    Scale,
    denoiser_inputs,
    filled,
    normal,
    program_bytes,
    relative_error,
    step_flops,
    step_work,
    timed,
)
from framepack_jax import bundle, packing, sharding
from framepack_jax.commands.dry_run_train import abstract_samples
from framepack_jax.commands.records import path_of
from framepack_jax.diffusion import cache, flow, sampler, solver_table
from framepack_jax.models import packed_dit, stack, vae
from framepack_jax.training import state
from framepack_jax.training.config import Config as Training
from framepack_jax.training.config import LoRA
from framepack_jax.training.loop import jitted_step, set_up
from framepack_jax.training.metrics import COST

ROOT = Path(__file__).parent.parent
SECTION_STEPS = 25
# Of attention with its gradient, in forward passes: the backward kernel has two products for each
# of the forward one, and computes the scores again.
ATTENTION_COST = 3.5


def measure_step(bench: Bench) -> None:
    """A forward pass of the transformer in bfloat16, and with the blocks' kernels in 8 bits."""
    params, *args = denoiser_inputs(bench.scale)
    run = functools.partial(packed_dit.velocity, bench.scale.dit, dtype=BF16)

    def step(name: str, params: stack.Params) -> jax.Array | None:
        size = sum(p.nbytes for p in jax.tree.leaves(params))
        return bench.time(
            name, run, params, *args, flops=step_flops(bench.scale), weights=size,
            work=step_work(bench.scale),
        )  # fmt: skip

    exact = step("denoising step", params)
    for dtype in stack.QUANTIZED:
        got = step(f"denoising step, {dtype} weights", quantized(params, dtype))
        if got is not None and exact is not None:
            bench.rows[-1]["relative_error"] = relative_error(got, exact)


def quantized(params: stack.Params, dtype: str) -> stack.Params:
    """The same network with the kernels of its blocks in 8 bits, a scale for each output channel.
    Scales are the best, where `convert_weights.py --dtype fp8` takes powers of two."""
    whole = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if whole else jnp.finfo)(dtype).max)

    @jax.jit
    def eighth(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        def layer(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            kernel = kernel.astype(jnp.float32)
            scale = jnp.abs(kernel).max(0) / largest
            kernel /= jnp.where(scale > 0, scale, 1)[None]
            return (jnp.rint(kernel) if whole else kernel).astype(dtype), scale

        return jax.lax.map(layer, kernel)

    leaves = flatten_dict(params)
    for path in [path for path in leaves if path[-1] == "kernel" and path[0] in packed_dit.STACKS]:
        leaves[path], leaves[(*path[:-1], stack.SCALE)] = eighth(leaves[path])
    return unflatten_dict(leaves)


def measure_section(bench: Bench) -> None:
    """A section of 25 steps with UniPC: as it is, with either step cache, with weights in 8 bits.

    How often a cache leaves the blocks out depends on the weights, and these are random.
    """
    scale = bench.scale
    params, noise, _, context, conditions = denoiser_inputs(scale)
    tokens = packing.target_tokens(SCHEDULE, *noise.shape[2:4])
    sigmas = flow.sigmas(SECTION_STEPS, flow.shift_mu(tokens))
    table = solver_table("unipc", sigmas)
    frames = scale.vae.time_compression * len(noise[0])
    work = {kind: SECTION_STEPS * flops for kind, flops in step_work(scale).items()}

    def measure(name: str, params: stack.Params, config: cache.Config | None = None) -> None:
        def run() -> sampler.Denoised:
            return sampler.denoise(
                packed_dit, scale.dit, params, noise, sigmas, table, context, conditions,
                dtype="bfloat16", cache=config,
            )  # fmt: skip

        try:
            seconds, made = timed(run)
        except Exception as error:
            bench.fail(name, error)
            return
        more = {"work": work} if config is None else {"blocks_run": float(made.blocks_run.mean())}
        bench.add(name, seconds=seconds, seconds_a_frame=seconds / frames, **more)

    measure("section", params)
    for kind in cache.THRESHOLDS:
        measure(f"section, step cache {kind}", params, cache.Config(kind))
    for dtype in stack.QUANTIZED:
        measure(f"section, {dtype} weights", quantized(params, dtype))


def measure_vae(bench: Bench) -> None:
    """A tile of the VAE in time (5 latents, 17 frames), all of the picture."""
    cfg = bench.scale.vae
    params = jax.tree.map(jnp.asarray, vae.init(cfg, jax.random.key(0)))
    height, width = bench.scale.pixels
    for dtype in (BF16, jnp.float32):
        latents = normal(1, 1, 5, height // 8, width // 8, cfg.latent_channels, dtype=dtype)
        frames = normal(2, 1, 17, height, width, 3, dtype=dtype)
        name = jnp.dtype(dtype).name
        bench.time(f"decode 17 frames, {name}", functools.partial(vae.decode, cfg), params, latents)
        bench.time(f"encode 17 frames, {name}", functools.partial(vae.encode, cfg), params, frames)


def measure_train(bench: Bench) -> None:
    """A step of LoRA training at window 9, for batches until one is too large."""
    devices = sharding.make_mesh(devices=jax.local_devices()[:1])
    for remat in bench.scale.remats:
        for batch in _doubling(bench.scale.largest_batch):
            name = f"LoRA step, batch {batch}, remat {remat}"
            try:
                _time_training(bench, name, *lora_training(bench.scale, batch, remat), devices)
            except Exception as error:
                bench.fail(name, error)
                break


def _doubling(most: int) -> Iterator[int]:
    return itertools.takewhile(lambda batch: batch <= most, (2**i for i in itertools.count()))


def lora_training(scale: Scale, batch: int, remat: str) -> tuple[Training, Any]:
    """The config of a LoRA training, and the manifest of a bundle with a transformer this large."""
    manifest = bundle.read_manifest(path_of("framepack_i2v"))
    role = manifest.roles["transformer"]
    role = dataclasses.replace(role, config=dataclasses.asdict(scale.dit))
    manifest = dataclasses.replace(manifest, roles=manifest.roles | {"transformer": role})
    cfg = Training(
        bundle="framepack_i2v", trainable="lora", lora=LoRA(rank=32), batch=batch, remat=remat
    )
    return cfg, manifest


def training_program(
    scale: Scale, cfg: Training, manifest: Any, devices: Any
) -> tuple[Any, list[Any], float]:
    """(the compiled step, its arguments, seconds of compiling) of a training, on a mesh in use."""
    setup = set_up(cfg, manifest, devices)
    abstract = abstract_samples(setup, scale.pixels)
    began = time.monotonic()
    step = jitted_step(setup).lower(setup.abstract, setup.frozen, {}, abstract).compile()
    compiling = time.monotonic() - began
    now = state.with_params(cfg, setup.model, setup.tx, devices, filled(setup.abstract.params))
    return step, [now, filled(setup.frozen), {}, filled(abstract, 1.0)], compiling


def _time_training(bench: Bench, name: str, cfg: Training, manifest: Any, devices: Any) -> None:
    with jax.set_mesh(devices):
        step, (now, *rest), compiling = training_program(bench.scale, cfg, manifest, devices)
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.monotonic()
            now, metrics = step(now, *rest)
            jax.block_until_ready(metrics)
            seconds.append(time.monotonic() - began)
        one = step_work(bench.scale)
        work = {
            "attention both ways": ATTENTION_COST * cfg.batch * one["attention"],
            "products": COST["lora"] * cfg.batch * one["products"],
        }
        bench.add(
            name, seconds=statistics.median(seconds[1:]), compile_s=compiling,
            flops=COST["lora"] * cfg.batch * step_flops(bench.scale), work=work,
            program_bytes=program_bytes(step), loss=float(metrics.loss),
        )  # fmt: skip


VERSIONS = ("jax", "flax", "torch", "diffusers")
MEASURES = {
    "matmul": device.measure_matmul,
    "copy": device.measure_copy,
    "attention": device.measure_attention,
    "conv": device.measure_conv,
    "streaming": device.measure_streaming,
    "step": measure_step,
    "section": measure_section,
    "vae": measure_vae,
    "train": measure_train,
    "peer-step": peers.measure_step,
    "peer-error": peers.measure_error,
    "peer-vae": peers.measure_vae,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Measure what one GPU does. Times are medians of wall-clock seconds."""

    parts: tuple[str, ...] = tuple(MEASURES)
    """What is measured, in this order."""
    scale: Literal["full", "toy"] = "full"
    """Shapes of the released model, or small ones for a try on a CPU."""
    json: Path | None = None
    """File for all figures; those that are done stand in it at any time."""
    document: Path | None = None
    """Markdown file that gets the tables of this device, in place of older ones of the same."""
    limit: float = 900.0
    """Seconds that a part may take; then it is stopped, and the next begins."""
    here: bool = False
    """In this process, without a limit."""

    def __post_init__(self) -> None:
        for name in self.parts:
            if name not in MEASURES:
                raise ValueError(f"--parts {name!r}: expected some of {', '.join(MEASURES)}")


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Parse flags, measure, print."""
    try:
        config = tyro.cli(Config, prog="benchmarks.gpu", args=args)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    results = machine() if config.here else {}

    def keep() -> None:
        if config.json is not None:
            config.json.write_text(json.dumps(results, indent=1))

    for part in config.parts:
        print(f"\n{part}: {(MEASURES[part].__doc__ or '').splitlines()[0]}", flush=True)
        if config.here:
            rows = results[part] = []
            MEASURES[part](Bench({"full": FULL, "toy": TOY}[config.scale], rows, keep))
        else:
            results |= in_a_process(config, part)
        keep()
    if config.document is not None and "device" in results:
        summary.put(config.document, results)
    return results


def in_a_process(config: Config, part: str) -> dict[str, Any]:
    """The figures of a part, and why there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--parts", part, "--here"]
        command += ["--scale", config.scale, "--json", str(file)]
        # What is not needed stays free: for a large step, and for torch beside JAX.
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
        problem = None
        try:
            subprocess.run(
                command, cwd=ROOT, check=True, timeout=config.limit, env=memory | os.environ
            )
        except (subprocess.SubprocessError, OSError) as error:
            print(error, flush=True)
            problem = {"name": part, "error": str(error)}
        figures = json.loads(file.read_text()) if file.exists() else {part: []}
        figures[part] += [problem] if problem else []
        return figures


def machine() -> dict[str, Any]:
    """The device and the versions."""
    device = jax.local_devices()[0]
    names = {
        "device": device.device_kind,
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
    }
    for package in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            names[package] = metadata.version(package)
    return names


if __name__ == "__main__":
    main()
