"""Read and write LoRA files of kohya-ss/sd-scripts, musubi-tuner, diffusers and PEFT.

Modules of the transformer may have the names of diffusers, of the original release or of ComfyUI:
`lora_names` has them for each family.
"""

import collections
import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from framepack_jax.conversion import lora_names, lora_peft, lora_products, lora_targets
from framepack_jax.conversion.engine import DTYPES, Step
from framepack_jax.conversion.lora_fusion import (
    Pair,
    folded,
    kernel_steps,
    padded,
    pair_of,
    tensors_of,
    to_kernels,
    to_modules,
    trimmed,
)
from framepack_jax.conversion.safetensors_files import Tensor, stream_safetensors
from framepack_jax.conversion.weight_files import (
    Checkpoint,
    ConversionError,
    open_checkpoint,
)
from framepack_jax.models.lora import Factors, LoRA
from framepack_jax.utils.files import atomic_write
from framepack_jax.utils.messages import shorten

# Largest share of modules that may be missing in the network without a warning.
LARGE_SHARE = 0.1
TENSOR = re.compile(
    r"(?P<module>.+)\.(lora[._](?P<side>A|B|down|up)(\.[\w-]+)?\.weight|(?P<alpha>alpha)"
    rf"|(?P<product>{'|'.join(lora_products.NAMES)}))"
)
SIDES = {"A": "down", "B": "up"}
UNSUPPORTED = {
    r".*\.(dora_scale|lora_magnitude_vector.*)": "a DoRA",
    r".*\.(hada|lokr)_t\d": "a LoHa or LoKr with Tucker factors",
    r".*\.b?oft_\w+": "an OFT",
    r".*\.lora_mid\.weight": "a LoCon with Tucker factors",
    r".*\.lora_\w+(\.[\w-]+)?\.bias": "a LoRA with biases",
    r".*\.(diff|diff_b|set_weight|w_norm|b_norm)": "a file of full differences",
}


@dataclasses.dataclass(frozen=True)
class LoadedLora:
    """The contents of a LoRA file: the factors, the number of its modules, how many of them apply,
    the names of the others, {rank: number of modules}, and the naming."""

    lora: LoRA
    applied: int
    modules: int
    unmatched: tuple[str, ...]
    ranks: dict[int, int]
    naming: str
    models: str

    def summary(self) -> str:
        """Return a summary in one line."""
        ranks = ", ".join(map(str, sorted(self.ranks)))
        said = f"{self.applied} of {self.modules} modules apply, rank {ranks}, {self.naming} names"
        return f"{said}; no place for {shorten(self.unmatched)}" if self.unmatched else said

    def warning(self) -> str | None:
        """Return a warning if a large share of the modules does not apply, else None."""
        if len(self.unmatched) <= LARGE_SHARE * self.modules:
            return None
        return (
            f"{len(self.unmatched) / self.modules:.0%} of the LoRA does not apply:"
            f" {len(self.unmatched)} of its {self.modules} modules are not in this transformer, as"
            f" {shorten(self.unmatched)}; expected is a LoRA of a transformer of {self.models}"
            " alone"
        )


def is_lora(checkpoint: Checkpoint) -> bool:
    """Return True if a checkpoint holds adapters of any kind, supported or not."""
    matches = map(TENSOR.fullmatch, checkpoint.names())
    return any(m and not m["alpha"] for m in matches) or _unsupported(checkpoint) is not None


def files_of(path: Path) -> list[Path]:
    """Return the files that `read` opens: weights, and PEFT's settings if there are any.

    Raises ConversionError if the weights cannot be opened.
    """
    checkpoint = open_checkpoint(path)
    beside = lora_peft.config_beside(checkpoint)
    return [*checkpoint.files, *([beside] if beside else [])]


def read(path: Path, cfg: Any) -> LoadedLora:
    """Read a LoRA of a network with this config from safetensors, PyTorch or PEFT's folder.

    The result lists modules that the network does not have, such as those of a text encoder.
    Raises ConversionError if the file is damaged, is not a LoRA, is an adapter of another kind or
    of another network, or does not fit; the error names all modules that do not fit.
    """
    checkpoint = open_checkpoint(path)
    modules = _modules(checkpoint)
    family = lora_names.family_of(cfg)
    _check_family(path, modules, family)
    places = lora_targets.places_of(family, cfg)
    matched = lora_targets.match_places(path, modules, family, places)
    unmatched = tuple(module for module, place in matched.items() if place is None)
    if len(unmatched) == len(modules):
        examples = [p.name for p in places.values() if family.example in p.step.targets]
        raise ConversionError(
            f"{path}: none of its {len(modules)} modules is one of this network; it names"
            f" {shorten(modules)}; expected are {' or '.join(dict.fromkeys(examples))} and so on,"
            " with dots or underscores, all behind one prefix or none"
        )
    alphas, pairs, problems = lora_peft.alphas_of(checkpoint), {}, []
    for module, place in matched.items():
        if place is None:
            continue
        try:
            if place.name in pairs:
                raise ConversionError(f"{place.name} occurs twice")
            pairs[place.name] = _pair(checkpoint, modules[module], place, alphas)
        except ConversionError as error:
            problems.append(f"{module}: {error}")
    lora: LoRA = {}
    steps = {id(place.step): place.step for place in places.values()}
    for step in steps.values():
        for kernel, factors in to_kernels(step, pairs):
            if kernel in lora:
                problems.append(f"{kernel} is changed under two names")
            lora[kernel] = factors
    _raise_together(path, problems)
    namings = collections.Counter(place.naming for place in matched.values() if place)
    ranks = collections.Counter(len(pair.down) for pair in pairs.values())
    naming = " and ".join(namings)
    return LoadedLora(lora, len(pairs), len(modules), unmatched, dict(ranks), naming, family.models)


def family_in(path: Path) -> lora_names.Family | None:
    """Return the family of transformers whose names a LoRA file has, None for other names.

    Raises ConversionError if the file is no LoRA.
    """
    found = lora_names.recognise(_modules(open_checkpoint(path)))
    return found[0] if found else None


def _check_family(path: Path, modules: Collection[str], family: lora_names.Family) -> None:
    """Raise ConversionError if the modules of a file are those of another family."""
    found, naming = lora_names.recognise(modules, family) or (family, "")
    if found is not family:
        raise ConversionError(
            f"{path} is a LoRA of a transformer of {found.models} (it names {shorten(modules)}:"
            f" {naming} names), and this is a transformer of {family.models}; give a LoRA of"
            f" {family.models}, or the bundle that this one is for"
        )


def about(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without the fields that `write` sets and without
    hashes of its tensors; {} for other formats."""
    header = lora_peft.header_of(open_checkpoint(path))
    said = re.compile(
        rf"format|{lora_peft.METADATA}|ss_network_(dim|alpha)|sshs_.*|modelspec\.hash_sha256"
    )
    return {key: value for key, value in header.items() if not said.fullmatch(key)}


def write(
    path: epath.PathLike,
    lora: Mapping[str, Factors],
    cfg: Any,
    naming: str = "diffusers",
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a LoRA of a network with this config as a safetensors file, atomically.

    A naming with alpha keeps the bits of the factors if their source file had the same fused
    matrices. A naming without alpha has the scale multiplied into `lora_B`.

    Args:
        path: The file, which ends in .safetensors.
        lora: Factors by path of the kernel.
        cfg: Config of the network.
        naming: A key of the family's `namings` in `lora_names`.
        about: Metadata for the header, which also gets the rank and alpha of the written factors.

    Raises ConversionError for an unknown naming, another suffix, or kernels that the network does
    not have.
    """
    path = epath.Path(path)
    namings = lora_names.family_of(cfg).namings
    if naming not in namings:
        raise ConversionError(f"LoRA naming {naming!r} is unknown; expected {', '.join(namings)}")
    if path.suffix != ".safetensors":
        raise ConversionError(f"{path}: a LoRA is written as .safetensors; name it so")
    spelling = namings[naming]
    pairs = _to_pairs(path, lora, cfg, spelling)
    arrays: dict[str, np.ndarray] = {}
    for name, (step, pair) in pairs.items():
        spelt = lora_names.flat(name) if spelling.flat else name
        down, up = tensors_of(step, pair)
        arrays |= {spelling.down.format(spelt): down, spelling.up.format(spelt): up}
        if spelling.alpha:
            arrays[spelling.alpha.format(spelt)] = np.array(_alpha(pair), np.float32)
    metadata = {**(about or {}), **_rank_and_alpha([pair for _, pair in pairs.values()])}
    if spelling.ranks:
        metadata[lora_peft.METADATA] = lora_peft.peft_metadata(
            {n: len(pair.down) for n, (_, pair) in pairs.items()}
        )
    tensors = [Tensor(name, x.shape, str(x.dtype)) for name, x in arrays.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("wb") as file:
        values = (np.asarray(x, order="C") for x in arrays.values())
        stream_safetensors(file, tensors, values, metadata=metadata)


def _alpha(pair: Pair) -> float:
    """Return the alpha of a module whose ranks have one scale."""
    return len(pair.down) * float(pair.scale[0])


def _rank_and_alpha(pairs: Sequence[Pair]) -> dict[str, str]:
    """Return rank and alpha of all modules under the keys of kohya-ss/sd-scripts.

    If modules differ, the value is "Dynamic", as in its `resize_lora.py`. Factors with a folded
    scale have alpha = rank.
    """
    ranks = {str(len(pair.down)) for pair in pairs}
    alphas = {f"{_alpha(pair):g}" for pair in pairs}
    fields = {"ss_network_dim": ranks, "ss_network_alpha": alphas}
    return {k: values.pop() if len(values) == 1 else "Dynamic" for k, values in fields.items()}


def _to_pairs(
    path: Path, lora: Mapping[str, Factors], cfg: Any, spelling: lora_names.Naming
) -> dict[str, tuple[Step, Pair]]:
    """Return the row and the factors to write of each module."""
    steps = kernel_steps(spelling.table, cfg)
    known = {kernel for step in steps for kernel in step.targets}
    if absent := sorted(lora.keys() - known):
        raise ConversionError(
            f"{path}: {len(absent)} of {len(lora)} kernels of the LoRA are not of this network:"
            f" {shorten(absent)}"
        )
    pairs = {name: (step, pair) for step in steps for name, pair in to_modules(step, lora)}
    for name, (step, pair) in pairs.items():
        if spelling.alpha is None or (pair.scale != pair.scale[0]).any():
            pairs[name] = step, folded(pair)
    if spelling.one_rank:
        rank = max((len(pair.down) for _, pair in pairs.values()), default=0)
        return {name: (step, padded(pair, rank)) for name, (step, pair) in pairs.items()}
    return pairs


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return {"down", "up", "alpha": tensor name} for each module name of the file."""
    if found := _unsupported(checkpoint):
        kind, name = found
        raise ConversionError(
            f"{checkpoint.path} is {kind} ({name}), which is not supported; expected a plain LoRA:"
            " convert it, or train without that option"
        )
    modules: dict[str, dict[str, str]] = {}
    for name in checkpoint.names():
        if match := TENSOR.fullmatch(name):
            side = SIDES.get(match["side"], match["side"])
            kind = "alpha" if match["alpha"] else side or match["product"]
            before = modules.setdefault(match["module"], {}).setdefault(kind, name)
            if before != name:
                raise ConversionError(
                    f"{checkpoint.path}: {before} and {name} are the same factor of one module;"
                    " expected a file with a single adapter"
                )
    if not any(tensors.keys() - {"alpha"} for tensors in modules.values()):
        raise ConversionError(
            f"{checkpoint.path} is not a LoRA: it holds {shorten(checkpoint.names())}; expected"
            " names as lora_unet_MODULE.lora_down.weight (kohya) or MODULE.lora_A.weight (PEFT,"
            " diffusers)"
        )
    return modules


def _unsupported(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return the kind of an unsupported adapter and a tensor that shows it; None for plain LoRA."""
    for name in checkpoint.names():
        for pattern, kind in UNSUPPORTED.items():
            if re.fullmatch(pattern, name):
                return kind, name
    return None


def _pair(
    checkpoint: Checkpoint,
    tensors: Mapping[str, str],
    place: lora_targets.Place,
    alphas: lora_peft.Alphas,
) -> Pair:
    """Read the factors of a module. Raises ConversionError if they do not fit the module."""
    for side in tensors.keys() - {"alpha"}:
        if (dtype := checkpoint.dtype(tensors[side])) not in DTYPES:
            raise ConversionError(f"{tensors[side]} is {dtype}, expected {', '.join(DTYPES)}")
    outputs, *inputs = place.step.source_shapes()[0]
    down, up, rank = _factors(checkpoint, tensors)
    expected = _trimmed((len(down), *inputs)), _trimmed((outputs, len(down)))
    if len(down) < 1 or (_trimmed(down.shape), _trimmed(up.shape)) != expected:
        raise ConversionError(
            f"its factors are {_trimmed(down.shape)} and {_trimmed(up.shape)}, expected (rank,"
            f" {', '.join(map(str, inputs))}) and ({outputs}, rank)"
        )
    scale = alphas(place.name, rank)
    if "alpha" in tensors:
        alpha = checkpoint.read(tensors["alpha"])
        if alpha.size != 1:
            raise ConversionError(f"alpha has shape {alpha.shape}, expected a single number")
        if not abs(value := float(alpha.reshape(()))) < lora_peft.MAX_ALPHA:
            raise ConversionError(f"alpha is {value:g}, expected less than {lora_peft.MAX_ALPHA:g}")
        scale = value / rank
    return trimmed(pair_of(place.step, down, up, np.full(len(down), scale)))


def _factors(
    checkpoint: Checkpoint, tensors: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return `down`, `up` and the rank that alpha is divided by. Raises ConversionError."""
    names = tensors.keys() - {"alpha"}
    if names <= {*lora_products.NAMES}:
        return lora_products.product({name: checkpoint.read(tensors[name]) for name in names})
    if absent := {"down", "up"} - names:
        raise ConversionError(f"it has {shorten(tensors.values())} but no {absent.pop()} factor")
    down, up = (checkpoint.read(tensors[side]) for side in ("down", "up"))
    return down, up, len(down) if down.ndim else 0


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop trailing dimensions of size 1 beyond two, which 1x1 convolutions have."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _raise_together(path: Path, problems: list[str]) -> None:
    if problems:
        listed = shorten(problems, separator="\n  ")
        raise ConversionError(f"{path} does not fit the network:\n  {listed}")
