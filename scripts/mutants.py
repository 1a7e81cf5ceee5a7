"""Mutation testing: change one operator, constant or statement at a time, and see whether a test
notices.

Commands:

    python -m pytest -n auto --dist loadfile --cov framepack_jax --cov-context test \\
        --cov-report= --junitxml outputs/mutants/suite.xml && mv .coverage outputs/mutants/
    python scripts/mutants.py --count 200 --seed 0 --output outputs/mutants

The first runs the suite (with pytest-cov) and notes which test runs which lines and how long it
takes. The second tests each mutant by the tests that run its line, the fast ones first, in a copy
of the tree. The output folder then holds results.jsonl (a mutant a line) and summary.md (the share
that was noticed, and the survivors). Run the second again to continue.
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
import shutil
import signal
import sys
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("packing", "diffusion", "generation", "jobs", "conversion", "data", "training")
COPIED = ("framepack_jax", "tests", "configs", "docs", "examples", "benchmarks", "scripts")
PRELOADED = ("jax", "flax.linen", "optax", "torch", "transformers", "diffusers", "hypothesis",
             "orbax.checkpoint", "grain", "cv2", "av", "safetensors", "tyro", "pytest")  # fmt: skip
# Seconds of tests of a mutant, in rounds: the next one runs if no test of those before noticed it.
ROUNDS = (15, 60, 300)
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
    last: int
    kind: str
    start: int
    stop: int
    before: str
    after: str


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
            yield Mutant(name, node.lineno, node.end_lineno, kind, start, stop, before, after)


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
    for folder in FOLDERS:
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


@dataclasses.dataclass(frozen=True)
class Suite:
    """A run of the suite: `seconds` of each test, and the tests that run each line of each file.
    A line that runs on import is run by all tests of its file."""

    seconds: dict[str, float]
    by_line: dict[str, dict[int, set[str]]]
    trusted: dict[str, bool] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, output: Path) -> "Suite":
        """Read suite.xml and .coverage in a folder."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for case in xml.etree.ElementTree.parse(output / "suite.xml").iter("testcase"):
            if case.find("failure") is None and case.find("skipped") is None:
                file = case.attrib["classname"].replace(".", "/")
                seconds[f"{file}.py::{case.attrib['name']}"] += float(case.attrib["time"])
        data = coverage.CoverageData(str(output / ".coverage"))
        data.read()
        by_line = {}
        for file in data.measured_files():
            name = "framepack_jax/" + file.rpartition("/framepack_jax/")[2]
            by_line[name] = {
                line: {context.partition("|")[0] for context in contexts if context}
                for line, contexts in data.contexts_by_lineno(file).items()
            }
        return cls(seconds, by_line)

    def rounds(self, mutant: Mutant) -> list[list[str]]:
        """Tests of a mutant, in rounds of so many seconds as `ROUNDS` says."""
        lines = self.by_line.get(mutant.file, {})
        tests = set().union(*(lines.get(n, set()) for n in range(mutant.line, mutant.last + 1)))
        tests = tests or set().union(*lines.values()) or self.near(mutant.file)
        rounds: list[list[str]] = [[] for _ in ROUNDS]
        spent = 0.0
        for test in sorted(tests & self.seconds.keys(), key=lambda test: self.seconds[test]):
            spent += self.seconds[test]
            for tests_of_round, limit in zip(rounds, itertools.accumulate(ROUNDS), strict=True):
                if spent <= limit:
                    tests_of_round.append(test)
                    break
        return [tests_of_round for tests_of_round in rounds if tests_of_round]

    def near(self, file: str) -> set[str]:
        """Tests that run other files of the folder: all that is in this one runs on import."""
        folder = file.rpartition("/")[0]
        beside = (lines for name, lines in self.by_line.items() if name.startswith(folder))
        return set().union(*(tests for lines in beside for tests in lines.values()))

    def limit(self, tests: list[str]) -> float:
        """Seconds that tests may take."""
        return 60 + 5 * sum(self.seconds[test] for test in tests)

    def trusts(self, test: str, folder: Path) -> bool:
        """Return True if a test passes in the unchanged tree. One that fails is never run again."""
        if test in self.seconds and test not in self.trusted:
            self.trusted[test] = run_tests(folder, [test], self.limit([test]))[0] == "survived"
            if not self.trusted[test]:
                print(f"{test} fails without a mutant", flush=True)
                del self.seconds[test]
        return self.trusted.get(test, True)


def run_tests(folder: Path, tests: list[str], seconds: float) -> tuple[str, float]:
    """("survived", "noticed" or "timeout", seconds) of tests in a copy of the tree, in a process
    that has imported everything but the package."""
    began = time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, tests))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "timeout", time.monotonic() - began
    return ("noticed" if process.exitcode else "survived"), time.monotonic() - began


def _pytest(folder: Path, tests: list[str]) -> None:
    os.setsid()
    os.chdir(folder)
    log = os.open(folder / "pytest.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.path.insert(0, str(folder))
    import pytest

    code = pytest.main(
        ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    )
    os._exit(int(code))


def judge(folder: Path, mutant: Mutant, suite: Suite) -> dict[str, object]:
    """Test one mutant in the copy of the tree."""
    file = folder / mutant.file
    source = file.read_bytes()
    changed = source[: mutant.start] + mutant.after.encode() + source[mutant.stop :]
    try:
        compile(changed, mutant.file, "exec")
    except SyntaxError:
        return dataclasses.asdict(mutant) | {"outcome": "invalid", "seconds": 0.0}
    total, outcome, told = 0.0, "survived", ""
    for tests in suite.rounds(mutant):
        file.write_bytes(changed)
        try:
            outcome, seconds = run_tests(folder, tests, suite.limit(tests))
        finally:
            file.write_bytes(source)
        total += seconds
        if outcome == "noticed":
            told = failed_test(folder)
            if not suite.trusts(told, folder):
                return judge(folder, mutant, suite)
        if outcome != "survived":
            break
    return dataclasses.asdict(mutant) | {
        "outcome": outcome, "seconds": round(total, 1), "told": told,
    }  # fmt: skip


def failed_test(folder: Path) -> str:
    """The name of the test that failed in the last run."""
    lines = (folder / "pytest.log").read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return failed[0].partition(" ")[2].partition(" - ")[0] if failed else ""


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


def work(chosen: list[Mutant], output: Path, name: str) -> None:
    """Judge mutants in a copy of the tree of their own."""
    suite = Suite.read(output)
    folder = output / name
    copy_tree(folder)
    for mutant in chosen:
        result = judge(folder, mutant, suite)
        with open(output / "results.jsonl", "a") as file:
            print(json.dumps(result), file=file)
        where = f"{mutant.file}:{mutant.line} {mutant.kind}"
        print(f"{result['outcome']} {where} {result['seconds']} s", flush=True)


def read_results(output: Path) -> list[dict]:
    """Return the results so far."""
    file = output / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    """Parse flags and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/mutants"))
    flags = parser.parse_args()
    output = flags.output.absolute()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(output / "compiled"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.dont_write_bytecode = True
    for name in PRELOADED:
        try:
            __import__(name)
        except ImportError:
            print(f"{name} is not installed", flush=True)
    fields = [field.name for field in dataclasses.fields(Mutant)]
    done = {Mutant(**{name: r[name] for name in fields}) for r in read_results(output)}
    chosen = [mutant for mutant in sample(flags.count, flags.seed) if mutant not in done]
    processes = [
        multiprocessing.get_context("fork").Process(
            target=work, args=(chosen[part :: flags.processes], output, f"tree{part}")
        )
        for part in range(flags.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    summarize(read_results(output), output / "summary.md")


if __name__ == "__main__":
    main()
