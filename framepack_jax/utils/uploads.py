"""Copy files that grow to a place where files only appear whole: an object store, or its mount."""

import contextlib
import logging
import shutil
import tempfile
import threading
from pathlib import Path

from etils import epath

from framepack_jax.utils.files import atomic_write

logger = logging.getLogger(__name__)
SECONDS = 30.0


class Uploads:
    """Copy changed files of a temporary folder to `target`, every `seconds` and at the end.

    Files are written to `folder`. A failed copy is logged and made again the next time, so that a
    store that is away for some time does not end a run.
    """

    def __init__(self, target: epath.PathLike, seconds: float = SECONDS) -> None:
        self.target, self.seconds = epath.Path(target), seconds
        self.folder = Path(tempfile.mkdtemp(prefix="framepack-"))
        self._done: dict[Path, tuple[int, int]] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._repeat, name="uploads", daemon=True)
        self._thread.start()

    def _repeat(self) -> None:
        while not self._stop.wait(self.seconds):
            self.copy()

    def copy(self) -> bool:
        """Copy the files that have changed; return whether all could be copied."""
        with self._lock:
            return self._copy()

    def _copy(self) -> bool:
        whole = True
        for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            try:
                self._copy_file(file)
            except Exception as error:  # each store has errors of its own
                whole = False
                place = self.target / str(file.relative_to(self.folder))
                logger.warning("%s cannot be written yet: %s", place, error)
        return whole

    def _copy_file(self, file: Path) -> None:
        found = file.stat()
        stamp = found.st_size, found.st_mtime_ns
        if self._done.get(file) == stamp:
            return
        target = self.target / file.relative_to(self.folder).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as partial:
            shutil.copyfile(file, partial)
        self._done[file] = stamp

    def close(self) -> bool:
        """Copy what has changed, and remove the temporary folder; return whether all files are
        copied. If not, the folder stays and is named in the log."""
        self._stop.set()
        self._thread.join()
        whole = self.copy()
        if whole:
            with contextlib.suppress(OSError):
                shutil.rmtree(self.folder)
        else:
            logger.error(
                "files that could not be copied to %s stay in %s", self.target, self.folder
            )
        return whole
