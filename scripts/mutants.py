"""Mutation testing: change one operator, constant or statement at a time, and see whether a test
notices.

Command:  python scripts/mutants.py --count 200 --seed 0 --output outputs/mutants

Each mutant is tested by the fast tests of its folder first, and by slower ones if those pass. All
run in a copy of the tree. The output folder holds results.jsonl (a mutant a line) and summary.md
(the share that was noticed, and the survivors). Run the same command again to continue.
"""

import argparse
import ast
import collections
import copy
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Tests of each folder of the package. Of these, the fast ones run first.
TESTS: dict[str, tuple[str, ...]] = {
    "packing": ("unit/packing", "unit/data unit/generation"),
    "diffusion": ("unit/diffusion", "parity/test_step_cache.py"),
    "generation": ("unit/generation", "integration/test_pipeline.py"),
    "jobs": ("unit/jobs", "integration/run_folders", "integration/test_sample.py"),
    "conversion": ("unit/conversion", "parity/conversion"),
    "data": (
        "unit/data integration/test_loader.py",
        "integration/test_prepare.py integration/test_prepare_again.py",
    ),
    "training": (
        "unit/training",
        "integration/training/test_steps.py integration/training/test_trainable.py"
        " integration/training/test_optimizers.py",
    ),
}
# Tests of single files besides, by a pattern of their names.
OF_FILES = {
    r"conversion/(export|verify)": "parity/export integration/test_verify.py",
    r"conversion/lora": "parity/lora",
    r"conversion/(float8|weight_files|file_formats|inspect)": "parity/other_programs",
    r"generation/(offload|settings|weights)": "integration/test_offload.py",
    r"generation/(encoding|request|layout)": "integration/run_folders/test_inputs.py",
    r"jobs/(errors|inputs)": "integration/cli_errors",
    r"training/vae": "integration/test_train_vae.py",
    r"training/(trainer|resume|stop|initial|checkpoints|programs|watchdog)": (
        "integration/training/test_stopped.py integration/training/test_refusals.py"
        " integration/training/test_unattended.py"
    ),
    r"training/export": "integration/training/test_export.py",
    r"training/bad_records": "integration/training/test_damaged_data.py",
    r"training/skips": "integration/training/test_spikes.py",
}
COPIED = ("framepack_jax", "tests", "configs", "docs", "examples", "benchmarks", "scripts")
PRELOADED = ("jax", "flax.linen", "optax", "torch", "transformers", "diffusers", "hypothesis",
             "orbax.checkpoint", "grain", "cv2", "av", "safetensors", "tyro", "pytest")  # fmt: skip
MAX_SECONDS = 600
SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """The text from offset `start` to `stop` of a file, in bytes, replaced by another."""

    file: str
    line: int
    kind: str
    start: int
    stop: int
    before: str
    after: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.line}:{self.kind}:{self.start}:{self.after}"


def mutants_of(file: Path, name: str) -> Iterator[Mutant]:
    """All mutants of a file."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _mutable(ast.parse(source)):
        for kind, changed in _changes(node):
            start = starts[node.lineno - 1] + node.col_offset
            stop = starts[node.end_lineno - 1] + node.end_col_offset
            before = source[start:stop].decode()
            if isinstance(changed, ast.expr) and not isinstance(changed, ast.Constant | ast.Name):
                after = f"({ast.unparse(changed)})"
            else:
                after = ast.unparse(changed)
            yield Mutant(name, node.lineno, kind, start, stop, before, after)


def _mutable(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that decide what is computed: no annotations, decorators, f-strings and errors."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom):
                continue
            if isinstance(child, ast.AST):
                if hasattr(child, "lineno"):
                    yield child
                yield from _mutable(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind of change, changed node) for a node."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]):
            new.ops = [SWAPPED[type(op)]()]
            yield "comparison", new
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in SWAPPED:
            new.op = SWAPPED[type(op)]()
            yield ("and/or" if isinstance(new, ast.BoolOp) else "arithmetic"), new
        case ast.Constant(value=value) if type(value) in (int, float):
            for by in (1, -1):
                yield "constant", ast.copy_location(ast.Constant(value + by), new)
        case ast.Constant(value=bool() as value):
            yield "constant", ast.copy_location(ast.Constant(not value), new)
        case ast.UnaryOp(op=ast.Not()):
            yield "not", new.operand
        case ast.IfExp():
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield "not", new
        case ast.Expr(value=ast.Call()):
            yield "removed call", ast.Pass()
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield "removed return", ast.Return(ast.Constant(None))
        case ast.Slice(lower=lower, upper=upper) if lower or upper:
            field = "upper" if upper else "lower"
            setattr(new, field, ast.BinOp(getattr(new, field), ast.Add(), ast.Constant(1)))
            # A slice is no expression of its own, so its text has no parentheses.
            yield "slice", ast.Name(ast.unparse(new))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def sample(count: int, seed: int) -> list[Mutant]:
    """So many mutants, in an order whose every beginning has all folders and all kinds."""
    by_folder = []
    for folder in TESTS:
        by_kind: dict[str, list[Mutant]] = collections.defaultdict(list)
        for file in sorted((ROOT / "framepack_jax" / folder).rglob("*.py")):
            for mutant in mutants_of(file, file.relative_to(ROOT).as_posix()):
                by_kind[mutant.kind].append(mutant)
        for kind, found in by_kind.items():
            random.Random(f"{seed} {folder} {kind}").shuffle(found)
        kinds = [by_kind[kind] for kind in sorted(by_kind)]
        random.Random(f"{seed} {folder}").shuffle(kinds)
        by_folder.append(_in_turn(kinds))
    return _in_turn(by_folder)[:count]


def _in_turn(lists: list[list[Mutant]]) -> list[Mutant]:
    """The first of each list, then the second of each."""
    turns = itertools.zip_longest(*lists)
    return [mutant for turn in turns for mutant in turn if mutant is not None]


def copy_tree(folder: Path) -> None:
    """A copy of what tests need."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md"):
        shutil.copy(file, folder)


def run_tests(folder: Path, tests: str, seconds: float) -> tuple[str, float]:
    """("passed", "failed" or "timeout", seconds) of tests in a copy of the tree, in a process that
    has imported everything but the package."""
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "timeout", time.monotonic() - began
    return ("failed" if process.exitcode else "passed"), time.monotonic() - began


def _pytest(folder: Path, tests: str) -> None:
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / "pytest.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(folder))
    import pytest

    there = [f"tests/{name}" for name in tests.split() if (folder / "tests" / name).exists()]
    code = pytest.main(
        ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", *there]
    )
    # 5: there are no such tests.
    os._exit(0 if code == 5 else int(code))


def judge(folder: Path, mutant: Mutant, known: Path) -> dict[str, object]:
    """Test one mutant in the copy of the tree."""
    rounds = [(tests, limit_of(folder, tests, known)) for tests in rounds_of(mutant.file)]
    file = folder / mutant.file
    source = file.read_bytes()
    changed = source[: mutant.start] + mutant.after.encode() + source[mutant.stop :]
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError:
        return dataclasses.asdict(mutant) | {"outcome": "invalid", "seconds": 0.0}
    total, outcome = 0.0, "passed"
    file.write_bytes(changed)
    try:
        for tests, limit in rounds:
            if not limit:
                continue
            outcome, seconds = run_tests(folder, tests, limit)
            total += seconds
            if outcome != "passed":
                break
    finally:
        file.write_bytes(source)
    outcome = "survived" if outcome == "passed" else "noticed" if outcome == "failed" else outcome
    return dataclasses.asdict(mutant) | {
        "outcome": outcome, "tests": tests, "seconds": round(total, 1),
        "told": _told(folder / "pytest.log"),
    }  # fmt: skip


def _told(log: Path) -> str:
    """The test that failed."""
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return failed[0][:200] if failed else ""


def rounds_of(file: str) -> list[str]:
    """Tests of a file of the package, the fast ones first."""
    rounds = list(TESTS[file.split("/")[1]])
    return rounds + [tests for pattern, tests in OF_FILES.items() if re.search(pattern, file)]


def limit_of(folder: Path, tests: str, known: Path) -> float:
    """Seconds that tests may take: three times those of the unchanged tree; 0 leaves out tests that
    fail without a mutant. `known` keeps what was measured."""
    found = json.loads(known.read_text()) if known.exists() else {}
    if tests not in found:
        outcome, seconds = run_tests(folder, tests, MAX_SECONDS)
        print(f"{tests}: {outcome} in {seconds:.0f} s without a mutant", flush=True)
        found[tests] = round(3 * seconds + 20) if outcome == "passed" else 0
        known.write_text(json.dumps(found))
    return found[tests]


def summarize(results: list[dict], file: Path) -> None:
    """Write the share that was noticed by folder and by kind, and all survivors."""
    valid = [r for r in results if r["outcome"] != "invalid"]
    lines = ["# Mutants", "", "| | mutants | noticed | share |", "|---|---|---|---|"]
    groups: dict[str, list[bool]] = collections.defaultdict(list)
    for result in valid:
        for group in ("all", result["file"].split("/")[1], result["kind"]):
            groups[group].append(result["outcome"] != "survived")
    for group, noticed in groups.items():
        share = sum(noticed) / len(noticed)
        lines.append(f"| {group} | {len(noticed)} | {sum(noticed)} | {share:.0%} |")
    lines += ["", "## Survivors", ""]
    for r in sorted((r for r in valid if r["outcome"] == "survived"), key=lambda r: r["file"]):
        before, after = (" ".join(str(r[key]).split())[:90] for key in ("before", "after"))
        lines.append(f"- {r['file']}:{r['line']} ({r['kind']}): `{before}` -> `{after}`")
    file.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/mutants"))
    flags = parser.parse_args()
    output = flags.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(output / "compiled"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        try:
            __import__(name)
        except ImportError:
            print(f"{name} is not installed", flush=True)
    chosen = sample(flags.count, flags.seed)
    log = output / "results.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {Mutant(**{f.name: r[f.name] for f in dataclasses.fields(Mutant)}).id for r in results}
    folder = output / "tree"
    copy_tree(folder)
    with open(log, "a") as file:
        for number, mutant in enumerate(chosen, start=1):
            if mutant.id in done:
                continue
            result = judge(folder, mutant, output / "limits.json")
            results.append(result)
            print(json.dumps(result), file=file, flush=True)
            where = f"{mutant.file}:{mutant.line} {mutant.kind}"
            print(f"{number}/{len(chosen)} {result['outcome']} {where} {result['seconds']} s",
                  flush=True)  # fmt: skip
            summarize(results, output / "summary.md")
    summarize(results, output / "summary.md")


if __name__ == "__main__":
    main()
