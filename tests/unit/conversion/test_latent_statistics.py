"""Statistics of latents by the config.json of a VAE."""

import pytest

from framepack_jax.conversion import latent_statistics
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models.hunyuan import spec as hunyuan
from framepack_jax.models.hunyuan.config import VaeConfig
from framepack_jax.models.wan import spec as wan
from framepack_jax.models.wan.vae_config import RELEASED_MEAN, RELEASED_STD, WanVaeConfig

TWO = {"latents_mean": [0, 1.5], "latents_std": [2.0, 3]}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (TWO, ((0.0, 1.5), (2.0, 3.0))),
        ({"scaling_factor": 0.5}, ((0.0, 0.0), (2.0, 2.0))),
        ({"scaling_factor": 0.5, "shift_factor": 0.25}, ((0.25, 0.25), (2.0, 2.0))),
        ({"scaling_factor": None}, ((0.0, 0.0), (1 / 0.476986,) * 2)),
        (None, ((0.0, 0.0), (1 / 0.476986,) * 2)),
    ],
)
def test_config_or_release(fields, expected) -> None:
    assert latent_statistics.read(fields, hunyuan.VAE, VaeConfig(latent_channels=2)) == expected


def test_release_of_wan_has_sixteen_channels() -> None:
    found = latent_statistics.read({"dim": 1536}, wan.VAE, WanVaeConfig())
    assert found == (RELEASED_MEAN, RELEASED_STD)
    with pytest.raises(ConversionError, match="2 latent channels are not known for a wan_vae"):
        latent_statistics.read(None, wan.VAE, WanVaeConfig(latent_channels=2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents_mean": [0.0]}, r"latents_mean = \[0.0\]; expected a list of 2 numbers"),
        ({"latents_mean": None}, "latents_mean = None"),
        ({"latents_mean": [0.0, "x"]}, "latents_mean = 'x'"),
        ({"latents_std": [1.0, float("nan")]}, "latents_std = nan"),
        ({"latents_std": [1.0, 0.0]}, "expected numbers above 0"),
        ({"latents_std": [True, 1.0]}, "latents_std = True"),
    ],
)
def test_what_is_no_statistics_is_refused_by_name(change, says) -> None:
    with pytest.raises(ConversionError, match=says):
        latent_statistics.read(TWO | change, wan.VAE, WanVaeConfig(latent_channels=2))


def test_scaling_factor_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(ConversionError, match="scaling_factor = 'x'"):
        latent_statistics.read({"scaling_factor": "x"}, hunyuan.VAE, VaeConfig())
