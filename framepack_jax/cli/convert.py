"""`framepack convert`: make a bundle of PyTorch checkpoints."""

import dataclasses
from dataclasses import field
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes

from framepack_jax.cli.common import cli_errors
from framepack_jax.conversion.request import (
    BundleRequest,
    Dtype,
    ModelSettings,
    Networks,
    Tokenizers,
    long_dtype,
)
from framepack_jax.utils.flags import parse
from framepack_jax.utils.paths import IN_STORES


@dataclasses.dataclass(frozen=True)
class Convert:
    """Make a bundle of PyTorch checkpoints.

    Networks come from a diffusers pipeline folder, from single files or folders, or stay in another
    bundle. All of them are checked before the first byte is written. A bundle is a folder, or a
    bundle of this package by its name (tiny, random).
    """

    output: Annotated[str, IN_STORES]
    """Folder of the new bundle."""
    dtype: Dtype | None = None
    """Stored type of all weights; default: the type in the checkpoint. int8 and float8_e4m3fn (fp8)
    quantize the kernels in the blocks of transformer and encoders, with a scale for each output
    channel, and keep the types of all other weights."""
    overwrite: bool = False
    """Replace the bundle at --output."""
    networks: OmitArgPrefixes[Networks] = field(default_factory=Networks)
    tokenizers: OmitArgPrefixes[Tokenizers] = field(default_factory=Tokenizers)
    settings: OmitArgPrefixes[ModelSettings] = field(default_factory=ModelSettings)

    def request(self) -> BundleRequest:
        """Return all options in one object, names of types and bundles resolved."""
        from framepack_jax import bundle

        groups = (self.networks, self.tokenizers, self.settings)
        options: dict[str, Any] = {k: v for group in groups for k, v in vars(group).items()}
        if prefix := options["prefix"]:
            options["prefix"] = f"{prefix.removesuffix('.')}."
        if encoders_from := options["encoders_from"]:
            options["encoders_from"] = str(bundle.resolve(encoders_from))
        return BundleRequest(
            output=self.output, dtype=long_dtype(self.dtype), overwrite=self.overwrite, **options
        )


def main(args: list[str] | None = None, prog: str = "convert_weights.py") -> None:
    """Parse flags and convert; user errors end with one line and exit code 1."""
    flags = parse(Convert, args, prog)
    from framepack_jax.conversion.make_bundle import make_bundle
    from framepack_jax.conversion.sources import is_schedule_assumed
    from framepack_jax.conversion.summary import summarize
    from framepack_jax.parallel import hardware

    hardware.quiet_libtpu()
    with cli_errors(duration=True):
        request = flags.request()
        manifest = make_bundle(request)
        assumed = is_schedule_assumed(request, manifest)
        print(summarize(request.output, manifest, is_schedule_assumed=assumed))
