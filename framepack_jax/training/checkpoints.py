"""Records and checkpoints of training runs.

Orbax writes checkpoints in the background and atomically, and restores them onto any mesh and any
number of processes.

    RUN/run.json                 configuration, fingerprint of the data order, and the origin of
                                 the weights (scratch or bundle), also through --init RUN
    RUN/checkpoints/STEP/state   trained parameters, optimizer state, moving average
    RUN/checkpoints/STEP/data    position in the stream of samples, unreadable records, norms of
                                 gradients (`skips`), checksums
    RUN/damaged/STEP             checkpoints that could not be restored
"""

import contextlib
import dataclasses
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from framepack_jax import bundle
from framepack_jax.parallel import multihost
from framepack_jax.training import checksums
from framepack_jax.training.best import Best, read_best
from framepack_jax.training.config import CheckpointConfig
from framepack_jax.training.older_records import FORMAT, upgraded
from framepack_jax.training.state import TrainState
from framepack_jax.utils import storage
from framepack_jax.utils.files import atomic_write_text
from framepack_jax.utils.messages import first_line
from framepack_jax.utils.write_errors import write_errors

FOLDER, RECORD, DAMAGED = "checkpoints", "run.json", "damaged"
CHECKSUMS = "checksums"
# RUN@best is the step with the lowest validation loss.
BEST = "best"


class RunError(ValueError):
    """The run does not exist or cannot be resumed."""


class CheckpointError(RunError):
    """A checkpoint cannot be restored: it is damaged, or the storage fails."""


class _Manager(ocp.CheckpointManager):
    """A manager that never asks whether the run is to stop, and leaves no thread behind.

    All processes must ask with the same rising numbers to stop after the same step. The trainer
    does; the first process's manager would also ask in its own thread, with earlier steps."""

    def reached_preemption(self, step: int) -> bool:
        return False

    def close(self) -> None:
        # Incomplete checkpoints are removed in a thread; at the end of the process, it would fail.
        if self._cleanup_tmp_directory_future is not None:
            with contextlib.suppress(Exception):  # the thread logs it; each store has its own
                self._cleanup_tmp_directory_future.result()
        super().close()


def manager(
    run: epath.PathLike, cfg: CheckpointConfig, best: Best | None = None
) -> ocp.CheckpointManager:
    """Open the checkpoints of a run; the caller closes the manager. All processes call this.

    The checkpoint of the best step is kept beside those that `cfg` keeps."""
    folder = bundle.absolute(run) / FOLDER
    marked = multihost.on_primary(_is_marked, folder)
    mode = ocp.options.AtomicityMode.COMMIT_FILE if marked else ocp.options.AtomicityMode.AUTO
    kept: list[managers.PreservationPolicy] = [managers.LatestN(cfg.keep)]
    kept += [managers.EveryNSteps(cfg.keep_every)] if cfg.keep_every else []
    kept += [best] if best is not None else []
    options = ocp.CheckpointManagerOptions(
        atomicity_options=ocp.options.AtomicityOptions(mode=mode),
        preservation_policy=managers.AnyPreservationPolicy(kept),
        enable_async_checkpointing=True,
        async_options=ocp.AsyncOptions(timeout_secs=cfg.wait_seconds),
        # Remove incomplete checkpoints of a killed run.
        cleanup_tmp_directories=True,
    )
    return _Manager(folder, options=options, item_names=("state", "data"))


def _is_marked(folder: epath.Path) -> bool:
    """Return whether complete checkpoints in a folder are marked by a file. Elsewhere their folder
    is renamed, which mounts of object stores refuse."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return not storage.renames_folders(folder)


def restore_newest(
    manager: ocp.CheckpointManager, abstract: TrainState[jax.ShapeDtypeStruct]
) -> tuple[int, TrainState[jax.Array], dict[str, Any], list[str]]:
    """Restore the newest checkpoint that is whole: return (its step, state, stream position, what
    is to be said of newer ones).

    If older checkpoints can be restored, newer ones that cannot are damaged, and are moved to
    RUN/damaged. If none can, nothing is moved. All processes call this together. Raises
    CheckpointError.
    """
    failed: dict[int, CheckpointError] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state, data = restore(manager, step, abstract)
        except CheckpointError as error:
            failed[step] = error
            continue
        said = [
            f"{error}; it is moved to {multihost.on_primary(_set_aside, manager, bad)}"
            for bad, error in failed.items()
        ]
        if failed:
            manager.reload()
        return step, state, data, said
    first = next(iter(failed.values()))
    raise CheckpointError(
        f"{first}, and no older one can; nothing was changed. If the storage was away, run the same"
        " command again"
    ) from first


def _set_aside(manager: ocp.CheckpointManager, step: int) -> epath.Path:
    """Move a damaged checkpoint out of the folder of checkpoints; return its new place."""
    folder = epath.Path(manager.directory)
    target = folder.parent / DAMAGED / str(step)
    while target.exists():
        target = target.parent / f"{target.name}_again"
    storage.move_folder(folder / str(step), target)
    return target


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: TrainState[jax.ShapeDtypeStruct]
) -> tuple[TrainState[jax.Array], dict[str, Any]]:
    """Return (state, stream position) of a step, sharded as `abstract`. All processes call this
    together. Raises CheckpointError, also if an array differs from its checksum."""
    found = multihost.on_all_hosts(_read, manager, step, abstract)
    data = found["data"]
    # Checkpoints of earlier versions have no checksums.
    if wrong := checksums.differing(found["state"], data.pop(CHECKSUMS, {})):
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} is damaged: {len(wrong)} arrays, as"
            f" {wrong[0]}, differ from their checksums"
        )
    return found["state"], data


def _read(manager: ocp.CheckpointManager, step: int, abstract: Any) -> Any:
    try:
        return manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
    except Exception as error:  # orbax raises many kinds
        raise CheckpointError(
            f"checkpoint {step} in {manager.directory} cannot be restored ({_line(error)})"
        ) from error


def restore_params(folder: epath.PathLike, step: int, abstract: Any, part: str) -> Any:
    """Restore only `params` or `ema` of a checkpoint, sharded as `abstract`, or as numpy arrays if
    `abstract` has no shardings. All processes call this together. Raises RunError."""
    path = bundle.absolute(folder) / FOLDER / str(step) / "state"
    wanted = {part: abstract}
    placed = jax.tree.leaves(abstract)[0].sharding is not None
    restore_args = (
        ocp.checkpoint_utils.construct_restore_args(wanted) if placed
        else jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    )  # fmt: skip
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            args = ocp.args.PyTreeRestore(
                item=wanted, restore_args=restore_args, partial_restore=True
            )
            found = reader.restore(path, args=args)[part]
    except Exception as error:  # orbax raises many kinds
        raise RunError(f"{part} of {path} cannot be restored ({_line(error)})") from error
    leaves = jax.tree_util.tree_leaves_with_path(found)
    lacking = [jax.tree_util.keystr(p, simple=True, separator="/") for p, leaf in leaves
               if isinstance(leaf, jax.ShapeDtypeStruct)]  # fmt: skip
    if lacking:
        raise RunError(
            f"{part} of {path} lacks {len(lacking)} of {len(leaves)} arrays, as {lacking[0]};"
            " it has another network or another trainable part"
        )
    return found


def write_record(run: epath.PathLike, record: dict[str, Any]) -> None:
    """Write the record of a run atomically."""
    folder = epath.Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / RECORD, json.dumps({"format": FORMAT} | record, indent=1) + "\n")


def read_record(run: epath.PathLike) -> dict[str, Any]:
    """Read the record of a run, of any format version. Raises RunError if there is none."""
    file = epath.Path(run) / RECORD
    if not file.exists():
        raise RunError(f"{run} is not a training run (it has no {RECORD})")
    try:
        record = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{file} is damaged ({error}); restore it, or start another run") from error
    version = record.pop("format", 1)
    if version > FORMAT:
        raise RunError(
            f"{file} has format {version}, written by a later version; expected {FORMAT}"
        )
    return record | {"config": upgraded(record["config"], version)}


def record_of(run: str) -> dict[str, Any]:
    """Read the record of RUN or RUN@STEP. Raises RunError."""
    return read_record(parse_run(run)[0])


def exported_part(record: dict[str, Any]) -> str:
    """Return the part of a checkpoint that is used: the moving average if the run keeps one."""
    return "ema" if record["config"]["ema"] else "params"


def steps_of(run: epath.PathLike) -> list[int]:
    """Return the steps with a checkpoint, in order."""
    folder = epath.Path(run) / FOLDER
    if not folder.exists():
        return []
    return sorted(
        step for step in ocp.path.step.checkpoint_steps(folder) if _committed(folder, step)
    )


def _committed(folder: epath.Path, step: int) -> bool:
    """Return whether a checkpoint is complete, however it is marked."""
    metadata = folder / str(step) / "_CHECKPOINT_METADATA"
    # Early versions of orbax wrote none, and renamed the folder of a complete checkpoint.
    return not metadata.exists() or bool(json.loads(metadata.read_text())["commit_timestamp_nsecs"])


def parse_run(text: str) -> tuple[str, int]:
    """Return (folder, step) of RUN (its newest step), RUN@STEP or RUN@best. Raises RunError."""
    run, at, number = text.rpartition("@")
    if not (at and (number.isdigit() or number == BEST)):
        run, number = text, ""
    steps = steps_of(run)
    if not steps:
        raise RunError(
            f"{run} has no checkpoint; expected the folder of a training run, or RUN@STEP"
        )
    if number == BEST:
        if (best := read_best(run, steps).step) is None:
            raise RunError(f"{run} keeps no best checkpoint; train with --checkpoints.keep-best")
        return run, best
    step = int(number) if number else steps[-1]
    if step not in steps:
        listed = ", ".join(map(str, steps))
        raise RunError(f"{run} has no checkpoint of step {step}; it has {listed}")
    return run, step


def as_record(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _line(error: BaseException) -> str:
    return first_line(error)[:300]
