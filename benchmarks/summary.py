"""Format the figures of `benchmarks.gpu` as Markdown, with the lower bound of a step's time at the
rates that the device reached, and the ratio of the measured time to it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.bench import Row
from framepack_jax.utils.files import atomic_write

# The parts whose rows are what the device can do, and those that are measured against it.
DEVICE = ("matmul", "copy", "attention", "conv", "streaming")
WORK = ("step", "section", "vae", "train", "peer-step", "peer-error", "peer-vae")
# Figures of a row that stand in columns, or are of no interest to readers.
COLUMNS = ("name", "ms", "tflop_s", "gb_s", "peak_bytes", "program_bytes", "work", "error", "loss")

MEMORY = (
    "Memory is what the compiler counts for that program: its arguments, results and temporaries."
    " Of sections it is the most that the process had used by then, where that rose; of diffusers"
    " the most that torch had at once."
)


def put(document: Path, results: dict[str, Any]) -> None:
    """Write the tables into a Markdown file, in place of those of the same device, else at its end.
    Raises ValueError as `around`."""
    before, after = around(document, results["device"])
    with atomic_write(document) as partial:
        partial.write_text(before + markdown(results) + after)


def around(document: Path, device: str) -> tuple[str, str]:
    """(text before, text after) a device's tables, with the marks of their beginning and end.

    Raises ValueError where the file has one mark without the other, or one of them twice.
    """
    begin, end = f"<!-- {device} -->\n", f"<!-- end of {device} -->\n"
    text = document.read_text() if document.exists() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if found and not closed:
        raise ValueError(f"{document} has {begin.strip()} and no {end.strip()} after it; put it in")
    if end in before or begin in rest or end in after:
        raise ValueError(
            f"{document} has {begin.strip()} or {end.strip()} more than once, or the second alone;"
            " leave one of each"
        )
    if not found and before and not before.endswith("\n\n"):
        before = before.rstrip("\n") + "\n\n"
    return before + begin, end + after


def markdown(results: dict[str, Any]) -> str:
    """Return both tables: the model on the device, and the rates of the device."""
    rates = best_rates(results)
    versions = ", ".join(
        f"{name} {results[name]}"
        for name in ("python", "jax", "flax", "torch", "diffusers")
        if name in results
    )
    said = ", ".join(f"{what} at {rate:.4g} TFLOP/s" for what, rate in rates.items())
    toy = ", toy sizes" if results.get("scale") == "toy" else ""
    lines = [f"{results['device']}, {results['date']}{toy}; {versions}.", ""]
    if said:
        lines += [f"Floors take {said}, the best of what was measured below.", ""]
    lines += [MEMORY, ""]
    lines += ["| | time | TFLOP/s | times its floor | memory | |", "|---|--:|--:|--:|--:|---|"]
    lines += [_work_row(row, rates) for row in _rows(results, WORK)]
    lines += ["", "| | time | TFLOP/s | GB/s | |", "|---|--:|--:|--:|---|"]
    lines += [_device_row(row) for row in _rows(results, DEVICE)]
    return "\n".join(lines) + "\n"


def best_rates(results: dict[str, Any]) -> dict[str, float]:
    """Return the TFLOP/s of each kind of work that was measured."""
    kinds = {
        "products": [r for r in results.get("matmul", ()) if r["name"].endswith(" bf16")],
        "attention": [r for r in results.get("attention", ()) if "gradient" not in r["name"]],
        "attention both ways": [
            r for r in results.get("attention", ()) if "with gradient" in r["name"]
        ],
    }
    measured = {kind: [row.get("tflop_s", 0) for row in rows] for kind, rows in kinds.items()}
    return {kind: max(found) for kind, found in measured.items() if any(found)}


def roofline_seconds(work: dict[str, float], rates: dict[str, float]) -> float | None:
    """Return the seconds of FLOPs by kind, one kind after the other; None if a rate is unknown."""
    if not work or not work.keys() <= rates.keys():
        return None
    return sum(flops / (rates[kind] * 1e12) for kind, flops in work.items())


def _rows(results: dict[str, Any], parts: Iterable[str]) -> list[Row]:
    return [row for part in parts for row in results.get(part, ())]


def _work_row(row: Row, rates: dict[str, float]) -> str:
    floor = roofline_seconds(row.get("work", {}), rates)
    over = f"{row['ms'] / (1e3 * floor):.2f}" if floor and "ms" in row else ""
    memory = row.get("program_bytes") or row.get("peak_bytes")
    size = f"{memory / 1e9:.1f} GB" if memory else ""
    return _line(row["name"], _time(row), _number(row, "tflop_s"), over, size, _others(row))


def _device_row(row: Row) -> str:
    rates = _number(row, "tflop_s"), _number(row, "gb_s")
    return _line(row["name"], _time(row), *rates, _others(row))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _time(row: Row) -> str:
    return f"{row['ms']:.4g} ms" if "ms" in row else ""


def _number(row: Row, name: str) -> str:
    return f"{row[name]:.4g}" if name in row else ""


def _others(row: Row) -> str:
    """Return the fields without a column, or the error."""
    if "error" in row:
        return row["error"].partition("\n")[0].replace("|", "/")
    return ", ".join(
        f"weights {value / 1e9:.3g} GB"
        if name == "weights"
        else f"{name.replace('_', ' ')} {_short(value)}"
        for name, value in row.items()
        if name not in COLUMNS
    )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
