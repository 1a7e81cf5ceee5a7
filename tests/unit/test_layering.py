"""Imports point down only, and units of one row never import each other."""

import ast
from pathlib import Path

from tests.fixtures.paths import ROOT

PACKAGE = ROOT / "framepack_jax"

# Lowest row first. A unit is a file or a folder directly inside the package.
ROWS = [
    {"utils"},
    {"parallel"},
    {"ops", "diffusion", "packing", "video"},
    {"models"},
    {"bundle"},
    {"conditioning"},
    {"generation", "data", "conversion"},
    {"training", "jobs", "publishing"},
    {"evaluation"},
    {"planning", "toy", "doctor", "server"},
    {"bench"},
    {"cli", "__main__", "__init__"},
]
TORCH_ONLY_IN = ("conversion", "evaluation/clip_score.py", "evaluation/vbench_worker.py")


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def row_of(unit: str) -> int:
    rows = [number for number, units in enumerate(ROWS) if unit in units]
    assert len(rows) == 1, f"framepack_jax/{unit} has no row of its own in the layering"
    return rows[0]


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            modules.add(node.module)
            if node.module == "framepack_jax":
                modules |= {f"framepack_jax.{alias.name}" for alias in node.names}
    return modules


def test_imports_point_down() -> None:
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        unit = unit_of(path)
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] != "framepack_jax" or len(parts) == 1 or parts[1] == unit:
                continue
            checked += 1
            assert row_of(parts[1]) < row_of(unit), f"{path.relative_to(ROOT)} imports {module}"
    assert checked > 20


def test_test_files_share_by_fixtures_alone() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        for module in imported_modules(path):
            if module.split(".")[0] == "tests":
                assert module.startswith("tests.fixtures"), f"{path} imports {module}"


def test_every_unit_has_a_row() -> None:
    units = {p for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert len(units) > 5
    for path in units:
        row_of(path.stem)


def test_bars_are_lines_in_a_log() -> None:
    """All of them come from `utils.progress`."""
    for path in PACKAGE.rglob("*.py"):
        if any(module.startswith("tqdm") for module in imported_modules(path)):
            assert path == PACKAGE / "utils" / "progress.py", path


def test_torch_is_imported_for_checkpoints_and_a_users_metrics_only() -> None:
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")]:
        roots = {module.split(".")[0] for module in imported_modules(path)}
        if not any(path.is_relative_to(PACKAGE / there) for there in TORCH_ONLY_IN):
            assert not roots & {"torch", "diffusers"}, path
