"""Names of modules in LoRA files, by family of transformers.

A new family adds a line to FAMILIES. Sources: kohya-ss/sd-scripts (`networks/lora.py`),
kohya-ss/musubi-tuner (`networks/lora_*.py`, `utils/sai_model_spec.py`), PEFT's saved adapters,
diffusers' `save_lora_adapter`, and ComfyUI (`comfy/lora.py`), whose modules of Wan keep the names
of the release.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from framepack_jax.conversion import transformer, wan_transformer
from framepack_jax.conversion.engine import Table
from framepack_jax.models.hunyuan.config import TransformerConfig
from framepack_jax.models.wan.config import WanConfig

# Prefixes that trainers and wrappers add to module names. Other networks have modules named
# transformer_blocks, which are not the blocks of a module `transformer`.
PREFIX = re.compile(
    r"(lora[._](unet|transformer)|lycoris|base[._]model[._]model|diffusion[._]model|model|module"
    r"|transformer(?!_blocks))[._]"
)


class Naming(NamedTuple):
    """Names of a module's factors in a file.

    Without `alpha`, the scale is multiplied into `up`. `flat` names have underscores instead of
    dots. In `one_rank` files all modules have the same rank. `ranks` in the header are PEFT's.
    """

    table: Table
    down: str
    up: str
    alpha: str | None = None
    flat: bool = False
    one_rank: bool = False
    ranks: bool = False

    @classmethod
    def peft(
        cls, table: Table, prefix: str, *, one_rank: bool = False, ranks: bool = False
    ) -> "Naming":
        """Names of PEFT: the scale is part of `up`."""
        down, up = f"{prefix}{{}}.lora_A.weight", f"{prefix}{{}}.lora_B.weight"
        return cls(table, down, up, one_rank=one_rank, ranks=ranks)

    @classmethod
    def kohya(cls, table: Table, prefix: str, *, flat: bool = False) -> "Naming":
        """Names of kohya-ss/sd-scripts: alpha is a tensor."""
        down, up = f"{prefix}{{}}.lora_down.weight", f"{prefix}{{}}.lora_up.weight"
        return cls(table, down, up, f"{prefix}{{}}.alpha", flat)


class Release(NamedTuple):
    """A released model in the header of a LoRA: `modelspec.architecture`, the repository of its
    code, and `ss_base_model_version`."""

    architecture: str
    repository: str
    version: str


@dataclasses.dataclass(frozen=True)
class Family:
    """Names of the modules of a family's transformers.

    `models` names its models in words. `tables` are the tables to read by whose names they have: of
    equal names, the first table's counts. `namings` are those to write. `example` is a kernel of
    every network, for messages. `config` is the released config, `base` and `packed` the released
    models without and with context.
    """

    models: str
    tables: Mapping[str, Table]
    namings: dict[str, Naming]
    example: str
    config: Any
    base: Release
    packed: Release

    def release(self, cfg: Any) -> Release:
        """Return the released model that a network with this config comes from."""
        return self.packed if cfg.context_kernels else self.base

    @functools.cached_property
    def patterns(self) -> dict[str, re.Pattern[str]]:
        """Return an expression of all flat names of modules for each table."""
        return {naming: _pattern(table, self.config) for naming, table in self.tables.items()}


HUNYUAN = Family(
    models="HunyuanVideo or FramePack",
    tables={
        "diffusers'": transformer.DIFFUSERS,
        "Tencent's": transformer.TENCENT_FRAMEPACK,
        "ComfyUI's": transformer.COMFYUI_FRAMEPACK,
    },
    namings={
        # Read by `pipe.load_lora_weights` and `load_lora_adapter`.
        "diffusers": Naming.peft(transformer.DIFFUSERS, "transformer.", ranks=True),
        # Written by diffusion-pipe and read by every program (docs/other-programs.md). Without
        # metadata, readers use the alpha of one module for all, so that all need the same rank.
        "original": Naming.peft(transformer.TENCENT_FRAMEPACK, "diffusion_model.", one_rank=True),
        # Written by musubi-tuner for FramePack,
        "kohya": Naming.kohya(transformer.DIFFUSERS, "lora_unet_", flat=True),
        # and for HunyuanVideo.
        "kohya-tencent": Naming.kohya(transformer.TENCENT_FRAMEPACK, "lora_unet_", flat=True),
        # ComfyUI reads both namings of factors; this one has alpha as a tensor.
        "comfyui": Naming.kohya(transformer.COMFYUI_FRAMEPACK, "diffusion_model."),
    },
    example="double/00/img_qkv/kernel",
    config=TransformerConfig(),
    base=Release("hunyuan-video", "Tencent/HunyuanVideo", "hunyuan_video"),
    packed=Release("framepack", "lllyasviel/FramePack", "framepack"),
)
WAN = Family(
    models="Wan or Helios",
    tables={
        "diffusers'": wan_transformer.DIFFUSERS,
        "original": wan_transformer.ORIGINAL,
    },
    namings={
        "diffusers": Naming.peft(wan_transformer.DIFFUSERS, "transformer.", ranks=True),
        "original": Naming.peft(wan_transformer.ORIGINAL, "diffusion_model.", one_rank=True),
        "kohya": Naming.kohya(wan_transformer.ORIGINAL, "lora_unet_", flat=True),
        "comfyui": Naming.kohya(wan_transformer.ORIGINAL, "diffusion_model."),
    },
    example="blocks/00/qkv/kernel",
    config=wan_transformer.HELIOS,
    base=Release("wan2.1", "Wan-Video/Wan2.1", "wan"),
    packed=Release("helios", "PKU-YuanGroup/Helios", "helios"),
)
FAMILIES: dict[type, Family] = {TransformerConfig: HUNYUAN, WanConfig: WAN}


def family_of(cfg: Any) -> Family:
    """Return the family of a network with this config."""
    return FAMILIES[type(cfg)]


def recognise(modules: Collection[str], prefer: Family = HUNYUAN) -> tuple[Family, str] | None:
    """Return the family that has most of the modules of a file, and whose names most of them have;
    None if no module is behind known prefixes only.

    If two families have as many, as in a file of modules that both have, `prefer` counts.
    """
    found: tuple[Family, str] | None = None
    most = 0
    for family in sorted(FAMILIES.values(), key=lambda family: family is not prefer):
        namings = [
            [n for n, pattern in family.patterns.items() if known_part(module, pattern.fullmatch)]
            for module in modules
        ]
        if (count := sum(map(bool, namings))) > most:
            most = count
            found = family, Counter(itertools.chain(*namings)).most_common(1)[0][0]
    return found


def known_part(module: str, known: Callable[[str], Any]) -> str | None:
    """Return the flat name of a module from a file without as many known prefixes as it takes for
    `known` to be true of it; None if it never is.

    The name may have dots or underscores in any position.
    """
    # A prefix may also be the start of a name: transformer_ in transformer_blocks.
    while not known(flat(module)):
        if not (prefix := PREFIX.match(module)):
            return None
        module = module[prefix.end() :]
    return flat(module)


def flat(name: str) -> str:
    return name.replace(".", "_")


def _pattern(table: Table, cfg: Any) -> re.Pattern[str]:
    rows = (row for row in table.rows(cfg) if row.targets[0].endswith("/kernel"))
    names = {flat(source.removesuffix(".weight")) for row in rows for source in row.sources}
    return re.compile("|".join(re.escape(name).replace(r"\{i\}", r"\d+") for name in sorted(names)))
