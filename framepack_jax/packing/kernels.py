"""Context kernels by name: their shapes, and the weights that embed them.

Kernels up to k8, and others of as few cells, have weights of their own. The latents of k16, k24,
k32, ... are average-pooled first and embedded by the weights of k8 (arXiv 2504.12626, section 3.2,
pools by 2x2x2; larger factors are our reading).

The group of a tail is named by its treatment and the kernel that embeds it: tc_k4, ta_k4.
"""

import math
import re

LARGEST = 8
# Rows and columns of latents that are averaged to one cell of a tail ta.
TAIL_POOL = 32
NUMBER = "[1-9][0-9]*"
KERNEL = rf"k{NUMBER}(?:h{NUMBER}w{NUMBER})?"
_PARTS = re.compile(rf"k({NUMBER})(?:h({NUMBER})w({NUMBER}))?")


class ScheduleError(ValueError):
    """A schedule or order that cannot be parsed, or cannot be sampled."""


def kernel_shape(kernel: str) -> tuple[int, int, int]:
    """Return (time, height, width) of a kernel name in latent cells: "k2" -> (2, 4, 4)."""
    match = _PARTS.fullmatch(kernel.rpartition("_")[2])
    if not match:
        raise ScheduleError(f"kernel {kernel!r}: expected a name such as k1, k4 or k1h4w4")
    time, height, width = match.groups()
    return int(time), int(height or 2 * int(time)), int(width or 2 * int(time))


def tail_of(kernel: str) -> str:
    """Return the treatment of a tail, "ta" or "tc", from the name of its group; else ""."""
    return kernel.rpartition("_")[0]


def embedding_kernel(kernel: str) -> tuple[str, int]:
    """Return the kernel whose weights embed a kernel, and the factor by which time, height and
    width are average-pooled before: "k32" -> ("k8", 4)."""
    kernel = kernel.rpartition("_")[2]
    time = kernel_shape(kernel)[0]
    pooled = "h" not in kernel and time > LARGEST
    return (f"k{LARGEST}", time // LARGEST) if pooled else (kernel, 1)


def check_kernel(kernel: str) -> None:
    """Raise ScheduleError if no weights can embed a kernel."""
    larger = ", ".join(f"k{LARGEST * factor}" for factor in (2, 3, 4))
    time, height, width = kernel_shape(kernel)
    if "h" not in kernel and time > LARGEST and time % LARGEST:
        raise ScheduleError(
            f"kernel {kernel}: expected k1 to k{LARGEST}, or a multiple of k{LARGEST} ({larger}),"
            " whose latents are pooled first"
        )
    cells, most = time * height * width, math.prod(kernel_shape(f"k{LARGEST}"))
    if "h" in kernel and cells > most:
        raise ScheduleError(
            f"kernel {kernel} covers {cells} latent cells: expected at most {most}, those of"
            f" k{LARGEST}; kernels beyond have no weights of their own: take {larger}"
        )
