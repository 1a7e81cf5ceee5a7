"""Mean and standard deviation of each latent channel, by the `config.json` of a VAE."""

import math
from collections.abc import Mapping
from typing import Any

from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.network_spec import LatentStatistics, VaeSpec


def read(fields: Mapping[str, Any] | None, spec: VaeSpec, cfg: Any) -> LatentStatistics:
    """Return the statistics of a VAE's latents: by channel (`latents_mean`, `latents_std`), by
    shift and scaling for all channels, or, if `config.json` has neither, those of the released VAE.

    Raises ConversionError if these are no numbers, or if there is no released VAE with as many
    channels.
    """
    fields = fields or {}
    channels = cfg.latent_channels
    if "latents_mean" in fields or "latents_std" in fields:
        mean, std = (
            _by_channel(name, fields.get(name), channels)
            for name in ("latents_mean", "latents_std")
        )
        if min(std) <= 0:
            raise ConversionError(
                f"config.json of the VAE: latents_std = {list(std)}; expected numbers above 0"
            )
        return mean, std
    if fields.get("scaling_factor") or fields.get("shift_factor"):
        shift = _number("shift_factor", fields.get("shift_factor") or 0.0)
        scale = _number("scaling_factor", fields.get("scaling_factor") or 1.0)
        return (shift,) * channels, (1 / scale,) * channels
    released = spec.latent_statistics(cfg)
    if released is None:
        raise ConversionError(
            f"the mean and spread of {channels} latent channels are not known for a {spec.kind}"
            " without the config.json of the VAE; put it beside the weights"
        )
    return released


def _by_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != channels:
        raise ConversionError(
            f"config.json of the VAE: {name} = {values!r}; expected a list of {channels} numbers,"
            " one for each latent channel"
        )
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConversionError(f"config.json of the VAE: {name} = {value!r}; expected a number")
    return float(value)
