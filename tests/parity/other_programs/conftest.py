"""A FramePack model and a HunyuanVideo model in the names of their releases."""

import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel

from tests.fixtures.checkpoints import SIZES
from tests.fixtures.comfyui import State
from tests.fixtures.torch_reference import randomize


@pytest.fixture(scope="module")
def framepack() -> State:
    """A toy FramePack model in the release's names, bfloat16."""
    model = HunyuanVideoFramepackTransformer3DModel(
        **SIZES, has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True
    )
    state = randomize(model, 1).state_dict()
    return {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def tencent(golden) -> State:
    """A toy of Tencent's own code."""
    file = golden / "hunyuan_original" / "mp_rank_00_model_states.pt"
    return torch.load(file, weights_only=True)["module"]
