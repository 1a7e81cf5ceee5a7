"""README and docs name files, commands and flags that exist, and quote messages of the code."""

import ast
import contextlib
import functools
import importlib
import io
import re
from pathlib import Path

import pytest

from framepack_jax.__main__ import COMMANDS
from tests.fixtures.paths import ROOT

PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        ROOT / "examples" / "README.md",
    ]
)
PACKAGE = ROOT / "framepack_jax"
TOP = ("docs", "tests", "configs", "examples", "benchmarks", "scripts", "framepack_jax")
# Files that commands make, not files of the repository.
MADE = re.compile(r"(outputs|weights|runs|datasets|clips|site)(/|$)|[A-Z]{3,}|\$")
SCRIPTS = {"sample.py": "sample", "train.py": "train", "convert_weights.py": "convert"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:[.-][a-z0-9]+)*")
# Flags of SLURM, and of every program.
FOREIGN = {"--help", "--requeue", "--signal", "--map-by"}


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def split_fences(text: str) -> tuple[str, list[str]]:
    """Return the prose, and the commands of fenced blocks with continued lines joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```[^\n]*\n.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return prose, lines


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as mkdocs and GitHub make them."""
    prose, _ = split_fences(path.read_text())
    headings = re.findall(r"^#+ (.*)$", prose, re.M)
    slugs = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", slug) for slug in slugs}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    prose, _ = split_fences(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    for target in targets:
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else (page.parent / name).resolve()
        assert path.exists(), f"{page_id(page)} links to {target}"
        assert not anchor or anchor in anchors(path), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_files_exist(page: Path) -> None:
    prose, lines = split_fences(page.read_text())
    spans = [word for span in re.findall(r"`([^`\n]+)`", prose) for word in span.split()]
    words = [*spans, *(word for line in lines for word in line.split())]
    for word in words:
        name = word.strip("\"'(),;").rstrip("/")
        parts = name.split("/")
        if MADE.search(name) or not re.fullmatch(r"[\w./-]+", name):
            continue
        if parts[0] in TOP and len(parts) > 1:
            assert (ROOT / name).exists(), f"{page_id(page)} names {name}"
        elif word in spans and (PACKAGE / parts[0]).is_dir() and word.endswith((".py", "/")):
            assert (PACKAGE / name).exists(), f"{page_id(page)} names {name}"
    for module in re.findall(r"-m (benchmarks[.]\w+)", "\n".join([prose, *lines])):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), f"{page_id(page)}: {module}"


@functools.cache
def flags_of(command: str) -> frozenset[str]:
    """Return the flags in the help of a subcommand."""
    module = importlib.import_module(f"framepack_jax.cli.{command.replace('-', '_')}")
    told = io.StringIO()
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        module.main(["--help"], prog=f"framepack {command}")
    return frozenset(FLAG.findall(told.getvalue()))


@functools.cache
def other_flags() -> frozenset[str]:
    """Return the flags of benchmarks and scripts: in their texts, or fields of their flags."""
    flags = set(FOREIGN)
    for folder in ("benchmarks", "scripts"):
        for path in (ROOT / folder).glob("*.py"):
            text = path.read_text()
            fields = re.findall(r"^    (\w+): ", text, re.M)
            flags |= {*FLAG.findall(text), *(f"--{name.replace('_', '-')}" for name in fields)}
            flags |= {f"--no-{name.replace('_', '-')}" for name in fields}
    return frozenset(flags)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_their_flags_exist(page: Path) -> None:
    prose, lines = split_fences(page.read_text())
    inline = re.findall(r"`([^`]+)`", prose)
    # framepack launch -- train.py ...
    parts = (part for text in [*lines, *inline] for part in text.split(" -- "))
    for text in (re.sub(r"^(?=train\.py )", "python ", part) for part in parts):
        for words in re.findall(r"(?<![\w-])framepack ([a-z][a-z-]*)", text):
            assert words in COMMANDS, f"{page_id(page)} names framepack {words}"
        scripts = "|".join(map(re.escape, SCRIPTS))
        for name, rest in re.findall(
            rf"((?<![\w-])framepack [a-z-]+|python (?:{scripts}))\b([^#]*)", text
        ):
            command = SCRIPTS.get(name.split()[1], name.split()[1])
            unknown = {*FLAG.findall(rest)} - flags_of(command)
            assert not unknown, f"{page_id(page)}: {name} has no {sorted(unknown)}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_named_flags_exist(page: Path) -> None:
    prose, _ = split_fences(page.read_text())
    known = other_flags().union(*map(flags_of, COMMANDS))
    for span in re.findall(r"`([^`]+)`", prose):
        if not span.startswith("pip"):
            unknown = {*FLAG.findall(span)} - known
            assert not unknown, f"{page_id(page)} names {sorted(unknown)}"


def literal_texts() -> str:
    """Return the texts of the package, of each f-string the parts between its values."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    """Every bold `message` is in the code, with any values in place of `...`."""
    code = literal_texts()
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = [
        quote
        for bold in re.findall(r"^\*\*(.*?)\*\*", text, re.M | re.S)
        for quote in re.findall(r"`([^`]+)`", bold)
    ]
    assert len(quotes) > 20
    for quote in quotes:
        for part in re.split(r"\.\.\.", " ".join(quote.split())):
            part = part.strip(" ,")
            assert len(part) < 4 or part in code, f"no message of the code has {part!r}"
