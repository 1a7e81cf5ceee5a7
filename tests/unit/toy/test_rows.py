"""Rows of an evaluation: bundles, schedules, orders and settings from flags and files."""

from pathlib import Path

import pytest

from framepack_jax.diffusion.step_cache import StepCacheConfig
from framepack_jax.evaluation.drift import Estimate
from framepack_jax.evaluation.tables import Table
from framepack_jax.generation.pipeline import Settings
from framepack_jax.toy import rows, suites
from framepack_jax.toy.suites import DRIFT_METRICS, PROMPT_METRICS

F1, INVERTED = "f1k1_x_f16k4f2k2f1k1_g2", "f1k1_x_g2_f1k1f2k2f16k4_td"
BASE = Settings(steps=3)


def read(tmp_path: Path, *lines: str, bundles=(), schedules=()) -> tuple[rows.RowSpec, ...]:
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return rows.read(tmp_path / "rows.jsonl", bundles, schedules, BASE)


def test_a_line_replaces_the_flags_of_the_command(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        '{"name": "many steps", "steps": 9, "step_cache": {"kind": "tea", "threshold": 0.2}}',
        "",
        f'{{"bundle": "tiny", "schedule": "{INVERTED}", "cfg_scale": 2}}',
        '{"name": "chained", "repeated": true}',
        bundles=["random"], schedules=[F1],
    )  # fmt: skip
    assert [row.label for row in found] == ["many steps", f"tiny {INVERTED}", "chained"]
    assert [row.bundle for row in found] == ["random", "tiny", "random"]
    assert [str(row.schedule) for row in found] == [F1, INVERTED, F1]
    assert [row.repeated for row in found] == [False, False, True]
    cache = StepCacheConfig("tea", 0.2)
    assert found[0].settings == Settings(steps=9, step_cache=cache)
    assert found[1].settings == Settings(steps=3, cfg_scale=2) and found[2].settings == BASE


def test_flags_give_every_bundle_with_every_schedule() -> None:
    found = rows.of_flags(["random", "tiny"], [F1, INVERTED], BASE)
    names = [f"{bundle} {text}" for bundle in ("random", "tiny") for text in (F1, INVERTED)]
    assert [row.label for row in found] == names
    assert [row.label for row in rows.of_flags(["random"], [], BASE)] == ["random"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: Expecting"),
        ("[]", "line 2: expected a JSON object"),
        ("{}", "line 2: its bundle is missing"),
        ('{"bundle": "random", "stepz": 1}', "unknown key 'stepz'; known are bundle, name"),
        ('{"bundle": "random", "steps": "9"}', "steps = '9': expected a whole number or"),
        ('{"bundle": "random", "steps": 0}', "line 2: steps = 0"),
        ('{"bundle": "random", "steps": 1, "steps": 2}', "'steps' is given twice"),
        ('{"bundle": "random", "repeated": 1}', "repeated = 1: expected true or false"),
        ('{"bundle": "random", "schedule": "g9x"}', "line 2: schedule 'g9x'"),
        ('{"bundle": "random", "step_cache": {"kind": "x"}}', "step cache 'x': expected one of"),
        ('{"bundle": "tiny"}', "another row is called tiny, .*; give it a name of its own"),
        ('{"bundle": "random", "name": "tiny/"}', "tiny/ has the same folder"),
        ('{"bundle": "random", "name": ".."}', r"name '\.\.': expected letters or digits"),
    ],
)
def test_bad_lines_are_refused_by_number(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, '{"bundle": "tiny"}', line)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl is empty"):
        read(tmp_path, " ")
    with pytest.raises(ValueError, match=r"--rows .*nowhere cannot be read"):
        rows.read(tmp_path / "nowhere", [], [], BASE)
    with pytest.raises(ValueError, match="--bundle and --schedule at most once"):
        read(tmp_path, "{}", bundles=["random", "tiny"])


def test_rows_open_their_bundles(tmp_path: Path) -> None:
    given = read(tmp_path, '{"steps": 2}', '{"name": "chained", "repeated": true}',
                 bundles=["random"])  # fmt: skip
    plain, chained = rows.open_models(given, "float32")
    assert plain.settings.steps == 2 and not plain.repeated
    assert [row.name for row in suites.forgetting_rows(plain, 0)] == [
        "random", "random, without k2", "random, without k4", "random, without k2 and k4"
    ]  # fmt: skip
    # A model without history has none to hide, and a longer video begins as a shorter one.
    assert [row.name for row in suites.forgetting_rows(chained, 1)] == ["chained"]
    assert suites.drift_rows(chained, 1)[0].extendable
    with pytest.raises(ValueError, match="frozen first frame: a reference row has that name"):
        rows.open_models([rows.RowSpec("random", suites.FROZEN)], None)


def test_summary_takes_its_columns_from_the_tables() -> None:
    def table(title: str, metrics: dict, values: dict) -> Table:
        cells = {row: {n: Estimate(v, 0.1, 4) for n in metrics} for row, v in values.items()}
        return Table(title, "", metrics, cells)

    tables = {
        "quality": table("Over", DRIFT_METRICS, {suites.TRUTH: 1.0, "a": 2.0}),
        "prompts": table("Prompts", PROMPT_METRICS, {"a": 3.0, f"a{suites.SHUFFLED}": 9.0}),
    }
    found = suites.summary(tables, [suites.TRUTH, "a"])
    assert list(found.rows) == [suites.TRUTH, "a"]
    assert found.rows["a"]["quality_sharpness"] == Estimate(2.0, 0.1, 4)
    assert found.rows["a"]["prompts_match"] == Estimate(3.0, 0.1, 4)
    assert found.rows[suites.TRUTH]["prompts_match"] is None
    assert "forgetting_identity" not in found.columns and "drift_sharpness" not in found.columns
