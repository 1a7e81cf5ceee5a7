"""Read the settings of PEFT adapters, from the header of a file or from a file beside it."""

import collections
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors

from framepack_jax.conversion.weight_files import Checkpoint, ConversionError, read_json

METADATA = "lora_adapter_metadata"
ADAPTER_CONFIG = "adapter_config.json"
# Values of PEFT fields with which an adapter is scale * up @ down.
PLAIN = {"use_dora": False, "lora_bias": False, "bias": "none"}
KINDS = ("LORA", "LOHA", "LOKR")
# Initializations that PEFT subtracts from the base weights, which then differ from the release.
CHANGED_BASE = ("pissa", "olora", "corda")
Alphas = Callable[[str, int], float]
# Trainers use alphas of about the rank; float32 ends at 3e38.
MAX_ALPHA = 1e9


def alphas_of(checkpoint: Checkpoint) -> Alphas:
    """Return a function from (module, rank) to the scale of a module without an alpha tensor.

    The scale is that of PEFT's config. Without a config it is 1, as in diffusers, ComfyUI and
    kohya-ss/sd-scripts.
    """
    fields = _peft_config(checkpoint)
    patterns = _checked_alphas(checkpoint, fields)
    root = bool(fields.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        alpha = fields.get("lora_alpha", fields.get("alpha"))
        for key, value in patterns.items():
            name = key.strip("^$").replace("\\.", ".")
            if module == name or (not key.startswith("^") and module.endswith(f".{name}")):
                alpha = value
                break
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)

    return scale


def _checked_alphas(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> dict[str, float]:
    """Return `alpha_pattern` of PEFT's settings.

    Raises ConversionError if the adapter is more than a scaled product, or if alphas are not given
    as numbers by names of modules.
    """
    if (kind := fields.get("peft_type", "LORA")) not in KINDS:
        raise ConversionError(
            f"{checkpoint.path}: its PEFT config has peft_type = {kind!r}, which is not supported;"
            f" expected {', '.join(KINDS)}"
        )
    for name, plain in PLAIN.items():
        if fields.get(name, plain) != plain:
            raise ConversionError(
                f"{checkpoint.path}: its PEFT config has {name} = {fields[name]!r}, which is not"
                f" supported; expected {plain!r}"
            )
    if str(fields.get("init_lora_weights")).lower().startswith(CHANGED_BASE):
        raise ConversionError(
            f"{checkpoint.path}: init_lora_weights = {fields['init_lora_weights']!r} changes the"
            " base weights; save it with PEFT's path_initial_model_for_weight_conversion"
        )
    patterns = fields.get("alpha_pattern") or {}
    numbers = patterns.values() if isinstance(patterns, dict) else [None]
    for alpha in (fields.get("lora_alpha", 1), fields.get("alpha", 1), *numbers):
        if not isinstance(alpha, int | float) or not abs(alpha) < MAX_ALPHA:
            raise ConversionError(
                f"{checkpoint.path}: its PEFT config has {str(alpha)[:40]} for an alpha; expected"
                " lora_alpha to be a number and alpha_pattern {module: number}"
            )
    if special := [key for key in patterns if re.search(r"[*+?|()\[\]{}]", key)]:
        raise ConversionError(
            f"{checkpoint.path}: alpha_pattern {special[0]!r} is a regular expression; only names"
            " of modules are supported"
        )
    return patterns


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return PEFT's settings, from the header of the file or beside it; {} if there are none."""
    file, header = checkpoint.files[0], header_of(checkpoint)
    if METADATA in header:
        try:
            fields = json.loads(header[METADATA])
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{file}: its {METADATA} is not valid JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ConversionError(f"{file}: its {METADATA} is not a JSON object")
        # Files of pipelines have settings by component.
        prefix = "transformer."
        own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
        return own or fields
    beside = config_beside(checkpoint)
    return read_json(beside) if beside else {}


def header_of(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the metadata of a safetensors file; {} for other formats."""
    try:
        return safetensors.safe_open(checkpoint.files[0], "np").metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def config_beside(checkpoint: Checkpoint) -> Path | None:
    """Return the file with PEFT's settings beside a checkpoint, None if there is none."""
    file = checkpoint.files[0]
    beside = file.parent / ADAPTER_CONFIG
    belongs = checkpoint.path.is_dir() or file.stem == "adapter_model"
    return beside if belongs and beside.exists() else None


def peft_metadata(ranks: Mapping[str, int]) -> str:
    """Return the metadata of diffusers' LoraConfig for {module: rank}; every alpha is the rank."""
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    # Anchored: PEFT also matches the ends of longer names.
    others = {f"^{name}": r for name, r in ranks.items() if r != rank}
    fields = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }
    return json.dumps({f"transformer.{name}": value for name, value in fields.items()})
