"""The tests that `scripts/disturb_golden.py` runs exist."""

import ast
import importlib.util

import pytest

from tests.fixtures.paths import ROOT


def readers() -> list[str]:
    """The ids of all tests in its table."""
    spec = importlib.util.spec_from_file_location("disturb", ROOT / "scripts/disturb_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return sorted({test for tests in module.READERS.values() for test in tests})


@pytest.mark.parametrize("test", readers())
def test_readers_exist(test: str) -> None:
    file, _, name = test.partition("::")
    found = ast.parse((ROOT / file).read_text()).body
    names = [node.name for node in found if isinstance(node, ast.FunctionDef)]
    assert name.partition("[")[0] in names
