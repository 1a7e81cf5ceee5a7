"""Programs on the devices of this machine: attention kernels against a reference, and a video.

Shapes: B batch, L tokens, N heads, D head width.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from framepack_jax import bundle, video
from framepack_jax.doctor.finding import Finding
from framepack_jax.generation.crossfade import to_uint8
from framepack_jax.generation.layout import make_layout
from framepack_jax.generation.pipeline import FramePack, Settings
from framepack_jax.generation.request import Request
from framepack_jax.ops import attention, cudnn
from framepack_jax.utils.messages import first_line

SHAPE = 1, 1024, 2, 64
"""(B, L, N, D) of the attention that is tried; L is the shortest that fused kernels take."""
READ = 1000
"""Keys that may be read."""
LIMIT = 0.02
"""Largest relative error of a kernel in bfloat16."""
FUSED: dict[str, attention.Kernel] = {"gpu": "cudnn", "tpu": "splash"}
SIDE, STEPS = 64, 2
FAILURES = (RuntimeError, ValueError, OSError, NotImplementedError)


def kernels() -> Iterator[Finding]:
    """Compare the attention kernels of this machine, and their gradients, with a softmax of whole
    matrices in float32."""
    platform = jax.default_backend()
    tried: list[attention.Kernel] = ["xla"]
    if platform in FUSED:
        tried.append(FUSED[platform])
    for kernel in tried:
        subject = f"attention by {kernel}"
        if kernel == "cudnn" and not cudnn.installed():
            text = "JAX finds no cuDNN, and attention by XLA is slower"
            yield Finding(subject, "problem", text, 'pip install "framepack-jax[cuda13]"')
            continue
        try:
            error = kernel_error(kernel)
        except FAILURES as failure:
            text = f"it does not run ({first_line(failure)})"
            yield Finding(subject, "problem", text, "update the driver and jax")
            continue
        wrong = not error <= LIMIT
        text = f"relative error {error:.1e}" + (f", more than {LIMIT:g}" if wrong else "")
        remedy = "report it with the output of framepack doctor --json" if wrong else ""
        yield Finding(subject, "problem" if wrong else "ok", text, remedy)


def kernel_error(kernel: attention.Kernel) -> float:
    """Return the largest relative error of a kernel's result and gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    inputs = [jax.random.normal(key, SHAPE, jnp.bfloat16) for key in keys]
    valid = jnp.arange(SHAPE[1])[None, :] < READ

    def result(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with attention.use(kernel):
            return attention.attend(q, k, v, valid)

    def exact(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("float32"):
            scores = jnp.einsum("blnd,bsnd->bnls", q, k) / SHAPE[-1] ** 0.5
            scores = jnp.where(valid[:, None, None], scores, -jnp.inf)
            return jnp.einsum("bnls,bsnd->blnd", jax.nn.softmax(scores), v)

    def all_of(function: Callable[..., jax.Array], *given: jax.Array) -> list[jax.Array]:
        made, pull = jax.vjp(function, *given[:3])
        return [made, *pull(given[3].astype(made.dtype))]

    ours = jax.jit(lambda *given: all_of(result, *given))(*inputs)
    wanted = jax.jit(lambda *given: all_of(exact, *given))(*(x.astype(jnp.float32) for x in inputs))
    return max(map(_relative, ours, wanted))


def _relative(ours: jax.Array, wanted: jax.Array) -> float:
    off = np.asarray(ours, np.float32) - np.asarray(wanted)
    return float(np.linalg.norm(off) / np.linalg.norm(wanted))


def small_video(name: str) -> Iterator[Finding]:
    """Sample a section of a bundle from an image, decode it and write it to a file."""
    began = time.monotonic()
    try:
        frames, size = sampled(name)
    except FAILURES as failure:
        text = f"no video can be made ({first_line(failure)})"
        yield Finding("small video", "problem", text, "mend what is named above first")
        return
    seconds = time.monotonic() - began
    text = f"{frames} frames with {name} in {seconds:.0f} s, {size} bytes"
    yield Finding("small video", "ok", text)


def sampled(name: str) -> tuple[int, int]:
    """Return the numbers of frames and of bytes of a small video. Raises ValueError if it is not
    finite."""
    path = bundle.resolve(name)
    pipe = FramePack.open(path).with_weights(path)
    image = np.full((SIDE, SIDE, 3), 128, np.uint8)
    request = Request("a red circle moves left", image, seed=0)
    layout = make_layout(pipe.geometry, request, sections=1, height=SIDE, width=SIDE)
    settings = dataclasses.replace(Settings.of(pipe.sampling), steps=STEPS)
    inputs = pipe.encode([request], layout, settings)
    made = pipe.sample(layout.plan, inputs, settings, seeds=[0])
    parts = [clip for _, _, clip, _ in pipe.decode(layout.plan, made)]
    frames = jnp.concatenate(parts, axis=1)
    if not np.isfinite(frames).all():
        raise ValueError("its pixels are not finite")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        video.write_mp4(file, np.asarray(to_uint8(frames, SIDE, SIDE))[0], pipe.sampling.fps)
        return frames.shape[1], file.stat().st_size
