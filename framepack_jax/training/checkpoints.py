"""What is kept of a run, by orbax: written in the background, whole or not at all, and restored
onto any mesh and any number of processes.

    RUN/run.json                 the configuration, the fingerprint of the data order, and where
                                 the first of the runs began that led here: scratch or bundle
    RUN/checkpoints/STEP/state   trained parameters, optimizer, moving average
    RUN/checkpoints/STEP/data    where the stream of samples is, and which records were unreadable
"""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from framepack_jax import bundle
from framepack_jax.training.config import CheckpointConfig
from framepack_jax.training.state import TrainState
from framepack_jax.utils.files import atomic_write_text
from framepack_jax.utils.messages import first_line

FOLDER, RECORD = "checkpoints", "run.json"
# Version of the record. Records of version 1 have no "format", and other names of fields.
FORMAT = 2
RENAMED = {
    1: {
        "accumulate": "grad_accum_steps",
        "max_bad_steps": "max_nonfinite_steps",
        "times": "noise_schedule",
    },
}


class RunError(ValueError):
    """A run that is not there, or cannot be gone on with."""


def manager(run: epath.PathLike, cfg: CheckpointConfig) -> ocp.CheckpointManager:
    """The checkpoints of a run; to be closed."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=cfg.keep,
        keep_period=cfg.keep_every or None,
        enable_async_checkpointing=True,
        # What a killed run left half written.
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(
        bundle.absolute(run) / FOLDER, options=options, item_names=("state", "data")
    )


def save(
    manager: ocp.CheckpointManager, step: int, state: TrainState[jax.Array], data: dict[str, Any]
) -> None:
    """Begin to write a checkpoint; an error of the one before is raised here. Raises OSError."""
    if step in manager.all_steps():
        return
    try:
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)
            ),
        )
    except ValueError as error:
        raise _not_written(manager, error) from error


def wait(manager: ocp.CheckpointManager) -> None:
    """Until all is written. Raises OSError where it could not be."""
    try:
        manager.wait_until_finished()
    except ValueError as error:
        raise _not_written(manager, error) from error


def _not_written(manager: ocp.CheckpointManager, error: ValueError) -> OSError:
    """Of what tensorstore says where a disk is full, or gone."""
    full = "No space left" in str(error)
    kept = ocp.path.step.checkpoint_steps(manager.directory)
    whole = f"the newest that is whole is of step {max(kept)}" if kept else "none is whole so far"
    return OSError(
        f"a checkpoint in {manager.directory} could not be written"
        f" ({'the disk is full' if full else str(error)[-300:]}); {whole}, and the same command"
        f" goes on from there once {'there is room' if full else 'that is mended'}"
    )


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: TrainState[jax.ShapeDtypeStruct]
) -> tuple[TrainState[jax.Array], dict[str, Any]]:
    """State and stream position of a step, laid out as `abstract` says. Raises RunError."""
    try:
        found = manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
            ),
        )
    except Exception as error:  # of many kinds, by what is damaged or differs
        raise RunError(
            f"checkpoint {step} in {manager.directory} cannot be restored ({_line(error)}); if it"
            f" is damaged, move it away, and run the same command again to resume from"
            f" {_before(manager, step)}"
        ) from error
    return found["state"], found["data"]


def _before(manager: ocp.CheckpointManager, step: int) -> str:
    older = [s for s in ocp.path.step.checkpoint_steps(manager.directory) if s < step]
    return f"step {max(older)}" if older else "the beginning, as there is none before it"


def restore_params(folder: epath.PathLike, step: int, abstract: Any, part: str) -> Any:
    """`params` or `ema` of a checkpoint alone, laid out as `abstract` says, by all processes
    together; as numpy arrays where that says nothing. Raises RunError."""
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
    except Exception as error:  # of many kinds, by what is damaged or differs
        raise RunError(f"{part} of {path} cannot be restored ({_line(error)})") from error
    leaves = jax.tree_util.tree_leaves_with_path(found)
    lacking = [jax.tree_util.keystr(p, simple=True, separator="/") for p, leaf in leaves
               if isinstance(leaf, jax.ShapeDtypeStruct)]  # fmt: skip
    if lacking:
        raise RunError(
            f"{part} of {path} lacks {len(lacking)} of {len(leaves)} arrays, as {lacking[0]}: it is"
            " of another network, or of another trainable part"
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
        raise RunError(f"{file} is damaged ({error}); restore it, or begin another run") from error
    version = record.pop("format", 1)
    if version > FORMAT:
        raise RunError(
            f"{file} has format {version}, written by a later version; expected {FORMAT}"
        )
    for older in range(version, FORMAT):
        names = RENAMED[older]
        record["config"] = {names.get(name, name): x for name, x in record["config"].items()}
    return record


def record_of(run: str) -> dict[str, Any]:
    """Read the record of RUN or RUN@STEP. Raises RunError."""
    return read_record(parse_run(run)[0])


def exported_part(record: dict[str, Any]) -> str:
    """Return the part of a checkpoint that is used: the moving average if the run keeps one."""
    return "ema" if record["config"]["ema"] else "params"


def steps_of(run: epath.PathLike) -> list[int]:
    """Steps that a run has checkpoints of, in order."""
    folder = epath.Path(run) / FOLDER
    if not folder.exists():
        return []
    return sorted(ocp.path.step.checkpoint_steps(folder))


def parse_run(text: str) -> tuple[str, int]:
    """RUN or RUN@STEP -> (folder, step), the newest by default. Raises RunError."""
    run, at, number = text.rpartition("@")
    if not (at and number.isdigit()):
        run, number = text, ""
    there = steps_of(run)
    if not there:
        raise RunError(
            f"{run} has no checkpoint; expected the folder of a training run, or RUN@STEP"
        )
    step = int(number) if number else there[-1]
    if step not in there:
        listed = ", ".join(map(str, there))
        raise RunError(f"{run} has no checkpoint of step {step}; there are {listed}")
    return run, step


def as_record(config: Any) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def _line(error: BaseException) -> str:
    return first_line(error)[:300]
