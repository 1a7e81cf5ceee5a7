"""Measure diffusers on the same work, and the difference of results. Parts of `benchmarks.gpu`."""

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from einops import rearrange

from benchmarks.bench import Bench, denoiser_inputs, relative_error, step_flops, step_work
from framepack_jax.bench.timing import BF16, ROUNDS
from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.models.hunyuan import transformer
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.hunyuan.spec import TRANSFORMER
from framepack_jax.models.params import stack_layers
from framepack_jax.models.quantization import cast_params

# What attention may run on; of those that refuse, rows say so.
BACKENDS = {
    "cuda": ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"),
    "cpu": ("MATH",),
}


def _torch_timed(bench: Bench, name: str, function: Callable[[], Any], **more: Any) -> float | None:
    """Median seconds of a call, also as a row; None, and a row that says why, where it failed."""
    import torch

    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    try:
        with torch.no_grad():
            for _ in range(2 + ROUNDS):
                began = time.monotonic()
                function()
                wait()
                seconds.append(time.monotonic() - began)
    except Exception as error:
        bench.fail(name, error)
        return None
    first, _, *rest = seconds
    taken = statistics.median(rest)
    more |= {"peak_bytes": torch.cuda.max_memory_allocated()} if on_gpu else {}
    bench.add(name, seconds=taken, first_s=first, **more)
    return taken


@contextlib.contextmanager
def _torch_makes(dtype: Any, device: str) -> Iterator[None]:
    """Create tensors and modules with this dtype on this device."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _model(dit: TransformerConfig) -> Any:
    """Build diffusers' transformer of these sizes with random weights."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    return HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=dit.heads, attention_head_dim=dit.head_dim,
        num_layers=dit.double_layers, num_single_layers=dit.single_layers,
        num_refiner_layers=dit.refiner_layers, text_embed_dim=dit.text_dim,
        pooled_projection_dim=dit.pooled_dim, image_proj_dim=dit.image_dim,
        rope_axes_dim=dit.rope_axes, has_image_proj=True, has_clean_x_embedder=True,
    ).eval()  # fmt: skip


def _inputs(dtype: Any, device: str, x: Any, sigma: Any, context: Any, conditions: Any) -> Any:
    """The arguments of diffusers' transformer for those of ours (`bench.denoiser_inputs`)."""
    import torch

    def tensor(a: Any, dtype: Any = dtype) -> Any:
        return torch.from_numpy(np.asarray(a, np.float32)).to(device, dtype)

    def video(latents: Any) -> Any:
        return tensor(rearrange(np.asarray(latents, np.float32), "b t h w c -> b c t h w"))

    def group(kernel: str) -> tuple[Any, Any]:
        """Latents and frame indices of all that is packed by one kernel."""
        parts = [
            (latents, indices)
            for latents, indices, k in zip(
                context.latents, context.indices, context.kernels, strict=True
            )
            if k == kernel
        ]
        latents, indices = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
        return video(latents), torch.from_numpy(indices[0].astype(np.int64)).to(device)

    named = {}
    for kernel, name in (("k1", "clean"), ("k2", "history_2x"), ("k4", "history_4x")):
        named[f"latents_{name}"], named[f"indices_latents_{name}"] = group(kernel)
    target = torch.from_numpy(np.asarray(context.target_indices[0], np.int64)).to(device)
    return named | {
        "hidden_states": video(x), "timestep": tensor(1000 * np.asarray(sigma), torch.float32),
        "encoder_hidden_states": tensor(conditions.text),
        "encoder_attention_mask": tensor(conditions.text_valid, torch.bool),
        "pooled_projections": tensor(conditions.pooled),
        "image_embeds": tensor(conditions.image), "indices_latents": target,
        "guidance": tensor(1000 * np.asarray(conditions.guidance), torch.float32),
    }  # fmt: skip


def measure_step(bench: Bench) -> None:
    """Measure diffusers' transformer on the same inputs, with each attention kernel, and compiled.

    Compiled block by block, with the kernel that was fastest.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, *args = denoiser_inputs(bench.scale, weights=False)
    inputs = _inputs(torch.bfloat16, device, *args)
    with _torch_makes(torch.bfloat16, device):
        model = _model(bench.scale.dit)
    # Some kernels take no mask, and of all layers only those that refine the text have one.
    refine = model.context_embedder.forward
    model.context_embedder.forward = sdpa_kernel(SDPBackend.MATH)(refine)

    def measure(kind: str, backend: str) -> float | None:
        kernel = getattr(SDPBackend, backend)

        def run() -> None:
            with sdpa_kernel(kernel):
                model(**inputs)

        return _torch_timed(
            bench, f"diffusers, {kind}, {backend.lower().replace('_', ' ')}", run,
            flops=step_flops(bench.scale), work=step_work(bench.scale),
        )  # fmt: skip

    seconds = {backend: measure("eager", backend) for backend in BACKENDS[device]}
    ran = {backend: taken for backend, taken in seconds.items() if taken is not None}
    if device == "cuda" and ran:
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.compile()
        measure("torch.compile", min(ran, key=lambda backend: ran[backend]))


def measure_error(bench: Bench) -> None:
    """Measure the errors of both forward passes in bfloat16 against diffusers' in float32.

    Weights are equal, widths are the model's, and there are two blocks of each kind; more blocks
    add more."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = dataclasses.replace(bench.scale.dit, double_layers=2, single_layers=2)
    scale = dataclasses.replace(bench.scale, dit=cfg)
    _, x, sigma, context, conditions = denoiser_inputs(scale, weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with _torch_makes(torch.float32, "cpu"):
            model = _model(cfg)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        plan = engine.make_job(
            tables.recognise(weight_files.open_checkpoint(Path(folder)), "transformer")
        )
        params = cast_params(stack_layers(dict(plan.leaves()), TRANSFORMER.stacks), BF16)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    args = params, x, sigma, context, conditions
    ours = jax.jit(functools.partial(transformer.velocity, plan.cfg, dtype=BF16))(*args)
    ours = rearrange(np.asarray(ours, np.float32), "b t h w c -> b c t h w")
    theirs = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = _inputs(dtype, device, *args[1:])
        with torch.no_grad():
            out = model.to(device, dtype)(**inputs, return_dict=False)[0]
        theirs[dtype] = out.float().cpu().numpy()
    exact = theirs[torch.float32]
    bench.say(
        "error against diffusers in float32, 2 + 2 blocks",
        ours_bfloat16=relative_error(ours, exact),
        diffusers_bfloat16=relative_error(theirs[torch.bfloat16], exact),
    )


def measure_vae(bench: Bench) -> None:
    """Measure diffusers' VAE on the same shapes, and its convolution."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    cfg = bench.scale.vae
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    height, width = bench.scale.pixels
    for dtype in (torch.float16, torch.bfloat16):
        with _torch_makes(dtype, device):
            model = AutoencoderKLHunyuanVideo(
                block_out_channels=cfg.channels, layers_per_block=cfg.layers_per_block,
                norm_num_groups=cfg.norm_groups,
            ).eval()  # fmt: skip
            latents = torch.randn(1, 16, 5, height // 8, width // 8)
            frames = torch.randn(1, 3, 17, height, width)
        _torch_timed(
            bench, f"diffusers decode 17 frames, {dtype}", functools.partial(model.decode, latents)
        )
        _torch_timed(
            bench, f"diffusers encode 17 frames, {dtype}", functools.partial(model.encode, frames)
        )
    for t, h, w, channels, out in bench.scale.convs:
        with _torch_makes(torch.bfloat16, device):
            x = torch.randn(1, channels, t + 2, h + 2, w + 2)
            module = torch.nn.Conv3d(channels, out, 3)
        flops = 2.0 * 27 * channels * out * t * h * w
        for name, layout in (("", torch.contiguous_format), (" last", torch.channels_last_3d)):
            module, x = module.to(memory_format=layout), x.to(memory_format=layout)
            kind = f"{x.dtype}, channels{name or ' first'}"
            title = f"torch conv3d {kind}, {t}x{h}x{w} {channels}->{out}"
            _torch_timed(bench, title, functools.partial(module, x), flops=flops)
