"""Compiler flags for tests: effort that goes into speed is not needed for a few steps."""

import jax

QUICK: dict[str, object] = {
    "xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE",
}  # fmt: skip
if jax.__version_info__ < (0, 11):
    # Three times as fast to compile; later compilers have no such choice, and refuse the name.
    QUICK["xla_cpu_use_fusion_emitters"] = False


def quick_flags(devices: int = 1) -> str:
    """`XLA_FLAGS` of a process that compiles quickly, for so many devices made of the CPU."""
    flags = {"xla_force_host_platform_device_count": devices} | QUICK
    return " ".join(f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
                    for name, value in flags.items())  # fmt: skip
