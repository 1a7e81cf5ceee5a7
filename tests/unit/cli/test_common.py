"""Errors, sizes and the flag groups that the commands share."""

import logging
import subprocess
import sys

import pytest

from framepack_jax.cli.common import MultihostFlags, cli_errors, parse_size, show_log
from framepack_jax.parallel.multihost import Terminated
from tests.fixtures.paths import ROOT


def test_an_error_is_one_line_and_exit_code_1() -> None:
    with pytest.raises(SystemExit, match=r"^error: no such file$"), cli_errors():
        raise OSError("no such file")
    failures, explain = (MemoryError,), lambda error: f"out of memory ({error})"
    with pytest.raises(SystemExit) as ended, cli_errors(failures, explain=explain):
        raise MemoryError("7 GB")
    assert ended.value.code == "error: out of memory (7 GB)"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(TypeError), cli_errors():
        raise TypeError


def test_an_error_of_an_object_store_is_one_line() -> None:
    """The class is one of gcsfs, for example without credentials."""
    failure = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
    said = r"^error: the object store .*401\).*credentials: gcloud"
    with pytest.raises(SystemExit, match=said), cli_errors():
        raise failure("Anonymous caller, 401\nmore")


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_signals_have_their_exit_codes(capsys, interrupt, code: int) -> None:
    with pytest.raises(SystemExit) as ended, cli_errors(interrupted="interrupted; run it again"):
        raise interrupt
    assert ended.value.code == code
    assert capsys.readouterr().err == "interrupted; run it again\n"


def test_the_duration_is_printed_on_success_only(capsys) -> None:
    with cli_errors(duration=True):
        pass
    assert capsys.readouterr().out.endswith(" s in all\n")
    with pytest.raises(SystemExit), cli_errors(duration=True):
        raise ValueError
    assert capsys.readouterr().out == ""


def test_sizes() -> None:
    assert parse_size("--size", "608x640") == parse_size("--size", " 608x640 ", 16) == (608, 640)
    for text in ("wide", "608", "608x", "0x640", "608x640x3", "-608x640"):
        with pytest.raises(ValueError, match=f"--size {text}: expected HEIGHTxWIDTH in pixels, as"):
            parse_size("--size", text)
    with pytest.raises(
        ValueError, match=r"--size 608x650: expected .*, multiples of 16, as 608x640"
    ):
        parse_size("--size", "608x650", 16)


def test_one_process_joins_nobody() -> None:
    assert not MultihostFlags().join()
    with pytest.raises(ValueError, match="need --coordinator-address"):
        MultihostFlags(process_id=0).join()


def test_flags_are_read_without_jax() -> None:
    program = (
        "import sys; from framepack_jax.cli import common; from framepack_jax.utils import flags"
    )
    program += "; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_log_line_is_printed_once_if_a_library_logs_too(capsys) -> None:
    library = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(library)
    try:
        show_log()
        logging.getLogger("framepack_jax.jobs").info("3 sections are kept")
    finally:
        logging.getLogger().removeHandler(library)
    assert capsys.readouterr() == ("3 sections are kept\n", "")


def test_help_may_be_read_in_part() -> None:
    """As by `| head -1`, which closes the pipe."""
    command = [sys.executable, "-m", "framepack_jax", "sample", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, b"")
