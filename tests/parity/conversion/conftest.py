"""Small diffusers models to convert."""

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)

from tests.fixtures.checkpoints import SIZES
from tests.fixtures.torch_reference import randomize


@pytest.fixture(scope="module")
def framepack() -> torch.nn.Module:
    model = HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
    )
    return randomize(model, 1)


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    return randomize(HunyuanVideoTransformer3DModel(**SIZES), 2)


@pytest.fixture(scope="module")
def autoencoder() -> torch.nn.Module:
    model = AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=5,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3, scaling_factor=0.25,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, spatial_compression_ratio=4,
    )  # fmt: skip
    return randomize(model, 3)
