"""What tests against live PyTorch references share."""

from pathlib import Path

import jax
import numpy as np
import torch

from framepack_jax.conversion import engine, tables, weight_files
from framepack_jax.models import registry, scan


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give every parameter a random value, norms and biases included; returns it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / np.sqrt(parameter[0].numel()))
        elif name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return module.eval()


def relative_error(ours, theirs) -> float:
    """max |a - b| / max |b|; raises where shapes differ or anything is not finite."""
    ours, theirs = (
        x.detach().float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)
        for x in (ours, theirs)
    )
    assert ours.shape == theirs.shape, f"{ours.shape} != {theirs.shape}"
    assert np.isfinite(ours).all() and np.isfinite(theirs).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def to_jax(x: torch.Tensor) -> jax.Array:
    """A float torch tensor as a jax array of the same layout."""
    return jax.numpy.asarray(x.detach().numpy())


def convert_module(module: torch.nn.Module, role: str, folder: Path):
    """A diffusers or transformers module saved to `folder` -> (config, params) of ours."""
    module.save_pretrained(folder)
    plan = engine.plan(tables.recognise(weight_files.open_checkpoint(folder), role))
    stacks = registry.KINDS[plan.source.table.kind].STACKS
    return plan.cfg, scan.stack_layers(dict(plan.leaves()), stacks)
