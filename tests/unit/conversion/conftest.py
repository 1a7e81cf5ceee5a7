"""A small FramePack transformer in the names of its release."""

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from tests.fixtures.checkpoints import SIZES


@pytest.fixture(scope="module")
def framepack() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
    )
    return model.state_dict()
