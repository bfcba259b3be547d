"""The comparison with other quantizers: its table in the README is what the stored figures say, and nothing else."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peer_table import BEGIN, END, markdown, merged, section, update_readme

ROOT = Path(__file__).resolve().parents[1]
STORED: dict[str, Any] = json.loads((ROOT / "tests/benchmarks/peers.json").read_text(encoding="utf-8"))


def test_the_readme_shows_what_is_stored() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) : text.index(END) + len(END)]
    hint = "python tests/benchmarks/peers.py --update README.md writes the section anew"
    assert shown == section(STORED), hint


def test_every_stored_row_is_a_line_that_was_measured_or_says_why_not() -> None:
    text = markdown(STORED)
    for row in STORED["rows"]:
        line = next(line for line in text.splitlines() if row["name"] in line and f"| {row['bits'].upper()} |" in line)
        assert line.count("|") == 12
        if row.get("failure"):
            assert "not done: " in line
        else:
            assert f"{row['metrics']['eps_sqnr_db']:.1f} dB" in line
            assert row["runtime"] == "simulation" or row["latency"]["ratio"] > 0


def test_what_is_stored_names_no_place_and_no_day() -> None:
    text = json.dumps(STORED)
    assert "/tmp" not in text
    assert "/home" not in text
    assert STORED["machine"]
    assert STORED["versions"]


def test_a_readme_is_rewritten_between_its_marks_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        update_readme(readme, STORED)
        assert readme.read_text(encoding="utf-8") == f"before\n{section(STORED)}\nafter\n"
    readme.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="must be there once each"):
        update_readme(readme, STORED)
    assert readme.read_text(encoding="utf-8") == "no marks\n"


def test_failures_are_rows_and_their_bars_do_not_break_the_table() -> None:
    row = {"key": "x", "name": "X", "bits": "w4a4", "failure": "Error: a | b <c>"}
    lines = markdown({**STORED, "rows": [row]}).splitlines()
    assert next(line for line in lines if line.startswith("| X ")).startswith(
        "| X | W4A4 | not done: Error: a \\| b &lt;c> |"
    )


@pytest.mark.skipif(importlib.util.find_spec("nncf") is not None, reason="the peer is installed here")
def test_a_peer_that_is_not_installed_says_what_to_install(tmp_path: Path) -> None:
    job = {"shared": str(tmp_path), "output": str(tmp_path), "bits": "w8a8", "setting": {}, "judge": {}}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = ROOT / "tests/benchmarks/peer_nncf.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    done = subprocess.run([sys.executable, script, tmp_path / "job.json"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["failure"] == "not installed here (nncf): pip install nncf"


ORDER = [row["key"] for row in STORED["rows"]]


def test_rows_measured_anew_replace_their_own_and_leave_the_others() -> None:
    fresh = {**STORED["rows"][3], "note": "measured anew"}
    found = merged({**STORED, "rows": [fresh]}, STORED, ORDER)
    assert found["rows"] == [*STORED["rows"][:3], fresh, *STORED["rows"][4:]]
    assert found["versions"] == STORED["versions"]


def test_a_row_that_is_new_goes_where_its_entry_stands() -> None:
    found = merged({**STORED, "rows": [{**STORED["rows"][0], "key": "new"}]}, STORED, [*ORDER[:2], "new", *ORDER[2:]])
    assert [row["key"] for row in found["rows"]] == [*ORDER[:2], "new", *ORDER[2:]]


def test_a_stored_row_whose_entry_is_gone_goes_too() -> None:
    found = merged({**STORED, "rows": STORED["rows"][:1]}, STORED, ORDER[:-1])
    assert found["rows"] == STORED["rows"][:-1]


@pytest.mark.parametrize("changed", [{"batch": 1}, {"versions": {"torch": "1.0"}}, {"model": {}}])
def test_rows_of_other_conditions_are_not_put_beside_stored_ones(changed: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="run them all"):
        merged({**STORED, **changed, "rows": STORED["rows"][:1]}, STORED, ORDER)
    assert merged({**STORED, **changed}, STORED, ORDER) == {**STORED, **changed}
