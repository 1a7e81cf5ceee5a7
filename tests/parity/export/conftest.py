"""A bundle with a small FramePack transformer."""

import pytest

from tests.fixtures.exported import bundle_of, module_of


@pytest.fixture(scope="module")
def framepack_bundle(tmp_path_factory) -> str:
    return bundle_of(module_of("framepack"), "framepack", tmp_path_factory.mktemp("framepack"))
