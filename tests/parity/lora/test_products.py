"""LoHa and LoKr files, compared with PEFT."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.numpy import load_file, save_file

from framepack_jax.conversion import lora as files
from framepack_jax.conversion import lora_products
from framepack_jax.conversion.weight_files import ConversionError
from framepack_jax.models import lora
from tests.fixtures.lora import PARITY, torch_velocity, velocity
from tests.fixtures.torch_reference import relative_error

# The fixtures and helpers of this file need PyTorch.
pytestmark = pytest.mark.torch
CONFIGS = {
    "loha": LoHaConfig(r=2, alpha=3),
    "lokr": LoKrConfig(r=1, alpha=3, decompose_factor=4),
    "lokr, both decomposed": LoKrConfig(r=1, alpha=3, decompose_both=True),
}


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, module, inputs, tmp_path_factory):
    """(folder that PEFT saves, velocity of the adapted network, alpha)."""
    config = copy.deepcopy(CONFIGS[request.param])
    config.target_modules = [
        # Large enough on both sides for a second factor of low rank.
        name for name, part in module.named_modules()
        if isinstance(part, torch.nn.Linear) and min(part.weight.shape) >= 16
    ]  # fmt: skip
    adapted = inject_adapter_in_model(config, copy.deepcopy(module))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "hada_" in name or "lokr_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    folder = tmp_path_factory.mktemp("saved")
    state = get_peft_model_state_dict(adapted)
    tensors = {f"base_model.model.{k}": v.numpy() for k, v in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
    return folder, torch_velocity(adapted, inputs), config.alpha


def test_beside_the_kernels_and_merged_as_in_peft(saved, model, arguments) -> None:
    folder, theirs, _ = saved
    cfg, params = model
    read = files.read(folder, cfg)
    assert read.applied == read.modules == 58 and not read.unmatched
    attached = lora.attach(params, read.lora)
    assert relative_error(velocity(cfg, attached, *arguments), theirs) < PARITY
    assert relative_error(velocity(cfg, lora.merge(attached), *arguments), theirs) < PARITY
    assert relative_error(velocity(cfg, params, *arguments), theirs) > 0.05


def test_names_of_lycoris_have_alpha_as_a_tensor(saved, model, tmp_path) -> None:
    folder, _, alpha = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {}
    for name, value in tensors.items():
        *module, part = name.removeprefix("base_model.model.").split(".")
        flat = f"lycoris_{'_'.join(module)}"
        named |= {f"{flat}.{part}": value, f"{flat}.alpha": np.array(alpha, np.float32)}
    save_file(named, tmp_path / "lycoris.safetensors")
    ours, theirs = (
        files.read(p, model[0]).lora for p in (tmp_path / "lycoris.safetensors", folder)
    )
    assert ours.keys() == theirs.keys()
    for kernel, factors in theirs.items():
        for mine, other in zip(ours[kernel], factors, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-6)


def test_what_cannot_be_read_is_named(saved, model, tmp_path) -> None:
    folder, _, _ = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    module = first.rpartition(".")[0]
    for name, value, message in (
        (first, None, r"expected hada_w1_a|expected lokr_w2_a|expected .*LoHa"),
        (first, tensors[first][:, :0], "do not share a rank|its factors are"),
        (f"{module}.lokr_w2", np.ones((4, 4), np.float32), "whole second factor"),
        (f"{module}.dora_scale", np.ones(4, np.float32), "DoRA"),
    ):
        changed = tensors | {name: value}
        if value is None:
            del changed[name]
        save_file(changed, tmp_path / "x.safetensors")
        with pytest.raises(ConversionError, match=message):
            files.read(tmp_path / "x.safetensors", model[0])
    config = json.loads((folder / "adapter_config.json").read_text()) | {"peft_type": "OFT"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=r"peft_type = 'OFT'.*expected LORA, LOHA, LOKR"):
        files.read(tmp_path / "adapter_model.safetensors", model[0])


@pytest.mark.parametrize("shape", [(3, 2), (2, 3)])
def test_a_kronecker_product_takes_the_smaller_rank(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    w1, a, b = (random.standard_normal(s, np.float32) for s in (shape, (5, 2), (2, 7)))
    down, up, rank = lora_products.product({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b})
    assert rank == 2 and len(down) == up.shape[1] == 2 * min(shape)
    np.testing.assert_allclose(up @ down, np.kron(w1, a @ b), rtol=1e-5, atol=1e-6)
