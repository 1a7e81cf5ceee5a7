"""Load the weights of a pipeline, choose their devices, and add low-rank adapters to them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from etils import epath

from framepack_jax import bundle
from framepack_jax.conditioning import load_encoders
from framepack_jax.generation import offload_plan
from framepack_jax.generation.network import Network
from framepack_jax.models.lora import LoRA, attach
from framepack_jax.models.lora import merge as merge_lora
from framepack_jax.parallel.multihost import on_primary

if TYPE_CHECKING:
    from framepack_jax.generation.pipeline import FramePack


def load_weights(
    pipe: "FramePack",
    path: epath.PathLike,
    roles: Sequence[str] | None = None,
    plan: offload_plan.OffloadPlan | None = None,
) -> "FramePack":
    """Return a pipeline with the weights of the bundle at `path`.

    Decoding needs only the `roles` ("vae",). Other roles load all networks and the tokenizers. The
    `plan` says where the weights lie, by default on the device.
    """
    root, manifest = epath.Path(path), bundle.read_manifest(path)

    def load_role(role: str, dtype: str, load: Callable[..., Any]) -> Any:
        return load(root, manifest, role, dtype=jnp.dtype(dtype), mesh=pipe.mesh)

    vae = Network(*bundle.vae_config(manifest), load_role("vae", "float32", bundle.load_params))
    loaded = dataclasses.replace(pipe, vae=vae)
    if plan is not None:
        loaded = dataclasses.replace(loaded, decode_tiling=plan.tiling)
    if roles is not None and set(roles) == {"vae"}:
        return loaded
    read = functools.partial(load_encoders, root, manifest, jnp.dtype(pipe.dtype), pipe.mesh)
    stay = plan is None or plan.encoders
    load = bundle.load_params
    if plan is not None and plan.layers is not None:
        load = functools.partial(bundle.load_offloaded, resident=plan.layers, hosted=plan.hosted)
    return dataclasses.replace(
        loaded,
        encoders=read() if stay else functools.partial(read, streamed=True),
        transformer=Network(
            *bundle.denoiser_config(manifest), load_role("transformer", pipe.dtype, load)
        ),
    )


def plan_weights(
    pipe: "FramePack",
    path: epath.PathLike,
    mode: str,
    canvas: tuple[int, int],
    batch: int = 1,
    roles: Sequence[str] | None = None,
    encoded: int = 1,
) -> offload_plan.OffloadPlan:
    """Decide for one of `offload_plan.MODES` which weights stay on the device.

    A batch of videos of canvas (height, width) is sampled, and clips of up to `encoded` latent
    frames are encoded for it. All hosts get the same plan. Raises ValueError, BundleError.
    """
    _, frames = pipe.geometry.frames_of(0, encoded)
    return on_primary(
        offload_plan.choose, path, mode, offload_plan.Work(canvas, batch, pipe.schedule, frames),
        dtype=pipe.dtype, tiling=pipe.tiling, mesh=pipe.mesh, roles=roles,
    )  # fmt: skip


def add_lora(pipe: "FramePack", lora: LoRA, *, merge: bool = False) -> "FramePack":
    """Return a pipeline with low-rank adapters beside the transformer's kernels, or merged.

    `lora` is the result of `conversion.lora.read`, or of `lora.combine` for several adapters. A
    merged adapter costs no time in sampling, and the transformer's weights of `pipe` are donated.
    Raises ValueError if it does not fit.
    """
    spec, cfg, params = pipe.transformer
    dtype = "float32" if merge else pipe.dtype
    params = attach(params, lora, dtype=jnp.dtype(dtype), mesh=pipe.mesh)
    if merge:
        params = merge_lora(params, donate=True)
    return dataclasses.replace(pipe, transformer=Network(spec, cfg, params))
