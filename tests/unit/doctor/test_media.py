"""Codecs that are missing."""

import subprocess
import sys

from framepack_jax.doctor import media

CODE = """
from framepack_jax.doctor import media
print(*media.codecs(), sep="\\n")
"""


def seen(tmp_path, package: str) -> str:
    """Return the findings where this package stands in for PyAV."""
    (tmp_path / "av.py").write_text(package)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}){CODE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_this_environment_writes_videos() -> None:
    (found,) = media.codecs()
    assert str(found) == "ok       video: a video is written and read"


def test_a_package_that_cannot_be_imported(tmp_path) -> None:
    found = seen(tmp_path, "raise ImportError('libavcodec.so.61: no such file')")
    assert found.startswith("problem  video: PyAV cannot be imported (libavcodec.so.61")
    assert "pip install --force-reinstall" in found


def test_an_encoder_that_is_missing(tmp_path) -> None:
    package = (
        "import sys, types\n__version__ = '17.0.0'\n__path__ = []\n"
        "codec = types.ModuleType('av.codec')\ncodec.codecs_available = {'h264', 'hevc'}\n"
        "sys.modules['av.codec'] = codec\n"
    )
    found = seen(tmp_path, package)
    assert found.startswith("problem  video: PyAV 17.0.0 has no encoder for H.264 (libx264)")
