"""The tests that `scripts/disturb_golden.py` runs exist."""

import ast
import importlib.util
import re
from types import ModuleType

import pytest

from tests.fixtures.paths import ROOT


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("disturb", ROOT / "scripts/disturb_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DISTURB = load()
ALL = sorted({test for tests in DISTURB.READERS.values() for test in tests})


@pytest.mark.parametrize("test", ALL)
def test_readers_exist(test: str) -> None:
    file, _, name = test.partition("::")
    found = ast.parse((ROOT / file).read_text()).body
    names = [node.name for node in found if isinstance(node, ast.FunctionDef)]
    assert name.partition("[")[0] in names


@pytest.mark.parametrize("value", [True, 0, -2, 0.5, None, "", "a", [], [3, 4], [[], 1]])
def test_every_value_is_disturbed(value) -> None:
    assert DISTURB.disturb_value("config.json name", value) != value


@pytest.mark.golden
def test_entries_of_helios_have_tests_of_their_own(golden) -> None:
    """None falls to the tests of another pipeline, and the names of runs are those of its test."""
    source = (ROOT / "tests/parity/test_helios_sampling.py").read_text()
    runs = set(re.findall(r'"(\w+_\w2v)"', source))
    found = set()
    for thing in DISTURB.things(golden, "^helios/"):
        for test in DISTURB.readers(thing.label):
            assert re.search(r"helios|wan|umt5", test), (thing.label, test)
            found |= set(re.findall(r"\[(\w+_\w2v)\]", test))
    assert found == runs
