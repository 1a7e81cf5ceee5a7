"""Measure one GPU at the shapes of the released model.

    python -m benchmarks.gpu [--parts matmul step ...] [--scale toy] [--json FILE] [--document FILE]

Weights are random, of the true shapes: 608 x 640 pixels, window 9, bfloat16. The first parts
measure the device: matrix products, copies, attention, convolutions, weights streamed from the
host. The others measure the model: a denoising step, a section, the VAE, a training step of a LoRA,
and the same in diffusers (`peer-*`). Each part runs in a process of its own, so that peak memory is
of this part. With `--json`, several runs can add to one file. `--scale toy` runs at sizes for a
CPU; its figures mean nothing.
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import device, peers, summary
from benchmarks.bench import (
    ATTENTION_COST,
    FULL,
    SCHEDULE,
    TOY,
    Bench,
    Scale,
    denoiser_inputs,
    relative_error,
    step_flops,
    step_work,
)
from framepack_jax import bundle, packing
from framepack_jax.bench.timing import BF16, normal, program_bytes, timed
from framepack_jax.bench.training import training_program
from framepack_jax.diffusion import flow, sampler, solver_table, step_cache
from framepack_jax.models import quantization
from framepack_jax.models.hunyuan import transformer, vae
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.params import Params
from framepack_jax.parallel import sharding
from framepack_jax.training.config import LoRAConfig, TrainConfig
from framepack_jax.training.metrics import COST
from framepack_jax.utils.files import atomic_write

ROOT = Path(__file__).parent.parent
SECTION_STEPS = 25
# Seconds in which a device must say what it is.
ASKED = 300.0


def measure_step(bench: Bench) -> None:
    """Measure a forward pass of the transformer in bfloat16 and with its blocks in 8 bits."""
    run = functools.partial(transformer.velocity, bench.scale.dit, dtype=BF16)

    def step(name: str, dtype: str | None = None) -> jax.Array | None:
        params, *args = denoiser_inputs(bench.scale)
        if dtype is not None:
            params = quantized(params, dtype)
        size = sum(p.nbytes for p in jax.tree.leaves(params))
        return bench.time(
            name, run, params, *args, flops=step_flops(bench.scale), weights=size,
            work=step_work(bench.scale),
        )  # fmt: skip

    exact = step("denoising step")
    for dtype in quantization.QUANTIZED:
        got = step(f"denoising step, {dtype} weights", dtype)
        if got is not None and exact is not None:
            bench.rows[-1]["relative_error"] = relative_error(got, exact)


def quantized(params: Params, dtype: str) -> Params:
    """Quantize the kernels of a network's blocks to 8 bits, each layer as
    `conversion.arrays.quantize` makes it. The kernels in `params` are deleted, each when its own
    is made, so that a device never has them all twice."""
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if integer else jnp.finfo)(dtype).max)

    @jax.jit
    def eighth(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
        def layer(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            kernel = kernel.astype(jnp.float32)
            peak = jnp.abs(kernel).max(0)
            if integer:
                scale = peak / largest
            else:
                least = power_of_two(peak) / power_of_two(jnp.float32(largest))
                scale = jnp.where(peak > largest * least, 2 * least, least)
            scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
            kernel /= scale[None]
            return (jnp.rint(kernel) if integer else kernel).astype(dtype), scale

        return jax.lax.map(layer, kernel)

    leaves = flatten_dict(params)
    for path in [path for path in leaves if path[-1] == "kernel" and path[0] in TRANSFORMER.stacks]:
        kernel = leaves[path]
        leaves[path], leaves[(*path[:-1], quantization.SCALE)] = jax.block_until_ready(
            eighth(kernel)
        )
        kernel.delete()
    return unflatten_dict(leaves)


def power_of_two(x: jax.Array) -> jax.Array:
    """The largest that is not above x > 0, in float32: without its mantissa. (`jnp.ldexp`
    computes a power, which need not be exact.)"""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)


def measure_section(bench: Bench) -> None:
    """Measure a section of 25 UniPC steps: plain, with each step cache, with weights in 8 bits.

    How often a cache leaves the blocks out depends on the weights, and these are random.
    """
    scale = bench.scale
    params, noise, _, context, conditions = denoiser_inputs(scale)
    tokens = packing.target_tokens(SCHEDULE, *noise.shape[2:4])
    sigmas = flow.sigmas(SECTION_STEPS, flow.shift_mu(tokens))
    table = solver_table("unipc", sigmas)
    frames = scale.vae.time_compression * len(noise[0])
    work = {kind: SECTION_STEPS * flops for kind, flops in step_work(scale).items()}

    def measure(
        name: str, params: Params, config: step_cache.StepCacheConfig | None = None
    ) -> None:
        def run() -> sampler.Denoised:
            return sampler.denoise(
                TRANSFORMER, scale.dit, params, noise,
                sampler.SamplerSettings(sigmas, table, dtype="bfloat16", cache=config),
                context, conditions,
            )  # fmt: skip

        try:
            seconds, made = timed(run)
        except Exception as error:
            bench.fail(name, error)
            return
        more = {"work": work} if config is None else {"blocks_run": float(made.blocks_run.mean())}
        bench.add(name, seconds=seconds, seconds_a_frame=seconds / frames, **more)

    measure("section", params)
    for kind in step_cache.THRESHOLDS:
        measure(f"section, step cache {kind}", params, step_cache.StepCacheConfig(kind))
    del params
    for dtype in quantization.QUANTIZED:
        measure(f"section, {dtype} weights", quantized(denoiser_inputs(scale)[0], dtype))


def measure_vae(bench: Bench) -> None:
    """Measure a temporal tile of the VAE: 5 latent frames, 17 frames, the whole picture."""
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
    """Measure a step of LoRA training at window 9, up to the largest batch that fits."""
    devices = sharding.make_mesh(devices=jax.local_devices()[:1])
    for remat in bench.scale.remats:

        def fits(batch: int, remat: str = remat) -> bool:
            name = f"LoRA step, batch {batch}, remat {remat}"
            try:
                _time_training(bench, name, *lora_training(bench.scale, batch, remat), devices)
            except Exception as error:
                bench.fail(name, error)
                return False
            return True

        largest(fits, bench.scale.largest_batch)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 where none does: doubled until one does not,
    then by halves between."""
    good, bad = 0, most + 1
    while bad - good > 1:
        tried = min(max(1, 2 * good), most) if bad > most else (good + bad) // 2
        if fits(tried):
            good = tried
        else:
            bad = tried
    return good


def lora_training(scale: Scale, batch: int, remat: str) -> tuple[TrainConfig, Any]:
    """The config of a LoRA training, and the manifest of a bundle with a transformer this large."""
    manifest = bundle.read_manifest(bundle.resolve("framepack_i2v"))
    role = manifest.roles["transformer"]
    role = dataclasses.replace(role, config=dataclasses.asdict(scale.dit))
    manifest = dataclasses.replace(manifest, roles=manifest.roles | {"transformer": role})
    cfg = TrainConfig(
        bundle="framepack_i2v", trainable="lora", lora=LoRAConfig(rank=32), batch=batch, remat=remat
    )
    return cfg, manifest


def _time_training(bench: Bench, name: str, cfg: TrainConfig, manifest: Any, devices: Any) -> None:
    program = training_program(cfg, manifest, devices, bench.scale.pixels)
    seconds, metrics = program.time()
    one = step_work(bench.scale)
    work = {
        "attention both ways": ATTENTION_COST * cfg.batch * one["attention"],
        "products": COST["lora"] * cfg.batch * one["products"],
    }
    bench.add(
        name, seconds=seconds, compile_s=program.compile_seconds,
        flops=COST["lora"] * cfg.batch * step_flops(bench.scale), work=work,
        program_bytes=program_bytes(program.compiled), loss=float(metrics.loss),
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
class GpuBenchmark:
    """Measure one GPU. Times are medians of wall-clock seconds."""

    parts: tuple[str, ...] = tuple(MEASURES)
    """What is measured, in this order."""
    scale: Literal["full", "toy"] = "full"
    """Shapes of the released model, or small ones for a try on a CPU."""
    json: Path | None = None
    """File for all figures; those that are done stand in it at any time. Where it is there already,
    figures of other parts stay."""
    document: Path | None = None
    """Markdown file that gets the tables of this device, in place of older ones of the same: of all
    figures in --json, where that is given."""
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
        config = tyro.cli(GpuBenchmark, prog="benchmarks.gpu", args=args)
        results = begin(config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error

    def keep() -> None:
        if config.json is not None:
            with atomic_write(config.json) as partial:
                partial.write_text(json.dumps(results, indent=1))

    keep()
    for part in config.parts:
        print(f"\n{part}: {(MEASURES[part].__doc__ or '').splitlines()[0]}", flush=True)
        if config.here:
            rows = results[part] = []
            MEASURES[part](Bench({"full": FULL, "toy": TOY}[config.scale], rows, keep))
        else:
            results |= in_a_process(config, [part], config.limit)
        keep()
    if all("error" in row for part in config.parts for row in results[part]) and not config.here:
        raise SystemExit("error: nothing could be measured; what went wrong stands above")
    if config.document is not None:
        try:
            summary.put(config.document, results)
        except (ValueError, OSError) as error:
            raise SystemExit(f"error: {error}") from error
    return results


def begin(config: GpuBenchmark) -> dict[str, Any]:
    """The device, and what the file has of it already. Raises ValueError where figures could not
    be kept in the end, and where the file has those of another device."""
    for flag, file in (("json", config.json), ("document", config.document)):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"--{flag} {file}: there is no folder {file.parent}; make it")
    now = machine(config.scale) if config.here else in_a_process(config, [], ASKED)
    if "device" not in now:
        raise ValueError("JAX found no device; what it said stands above")
    if config.document is not None:
        summary.around(config.document, now["device"])
    if config.json is None or not config.json.exists():
        return now
    try:
        before = json.loads(config.json.read_text())
        known, new = ((of["device"], of["scale"]) for of in (before, now))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"--json {config.json} is there and has no figures of this benchmark; give another file"
        ) from error
    if known != new:
        raise ValueError(
            f"--json {config.json} has figures of {' at scale '.join(known)}, and this is"
            f" {' at scale '.join(new)}; give another file"
        )
    return before | now


def in_a_process(config: GpuBenchmark, parts: Sequence[str], limit: float) -> dict[str, Any]:
    """The device, the figures of parts, and why there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--here", "--parts", *parts]
        command += ["--scale", config.scale, "--json", str(file)]
        # What is not needed stays free: for a large step, and for torch beside JAX.
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
        problem = None
        try:
            subprocess.run(command, cwd=ROOT, check=True, timeout=limit, env=memory | os.environ)
        except (subprocess.SubprocessError, OSError) as error:
            print(error, flush=True)
            problem = str(error)
        figures = json.loads(file.read_text()) if file.exists() else {}
        for part in parts:
            rows = figures.setdefault(part, [])
            rows += [{"name": part, "error": problem}] if problem else []
        return figures


def machine(scale: str) -> dict[str, Any]:
    """The device, the versions, and the scale of what is measured."""
    device = jax.local_devices()[0]
    names = {
        "device": device.device_kind,
        "scale": scale,
        "date": time.strftime("%Y-%m-%d"),
        "python": sys.version.split()[0],
    }
    for package in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            names[package] = metadata.version(package)
    return names


if __name__ == "__main__":
    main()
