"""The command that measures diffusers on the same machine."""

import importlib.util

from framepack_jax.bench.workload import Workload
from framepack_jax.utils.versions import PACKAGE

# diffusers' FramePack is measured at the shapes of the released model.
KIND, BUNDLE, SIZE = "hunyuan_packed_dit", "framepack_i2v", (608, 640)
COMMAND = "python -m benchmarks.gpu --parts peer-step peer-vae"


def comparison(work: Workload) -> str:
    """Return how to measure diffusers: a command, and what it needs that is not there."""
    if work.pipe.transformer.spec.kind != KIND:
        return f"diffusers: there is no comparison for a {work.pipe.transformer.spec.kind} yet"
    lines = [f"diffusers, {SIZE[0]} x {SIZE[1]} pixels, {BUNDLE}, random weights, one device:"]
    clone = PACKAGE.parent
    if not (clone / "benchmarks" / "peers.py").exists():
        lines.append("  # in a clone of the repository, as benchmarks/ is not part of the package")
        lines.append("  pip install -e .")
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if missing:
        lines.append(f"  pip install {' '.join(missing)}")
    lines.append(f"  {COMMAND}")
    if (work.layout.height, work.layout.width) != SIZE or work.name != BUNDLE:
        size = "x".join(map(str, SIZE))
        lines.append(f"  framepack bench --bundle {BUNDLE} --size {size} --parts step decode")
    return "\n".join(lines)
