"""The table that a run prints."""

from __future__ import annotations

from errata.bench.report import tables
from tests.bench.report.test_report import ROWS
from tests.bench.storage.results_logs import row


def test_terminal_table():
    assert tables.table(ROWS).splitlines() == [
        "blip2-opt-2.7b · single · scorer errata · 2 cases",
        "                 Rel  T-Loc",
        "unedited         0.0  100.0",
        "finetune        75.0  100.0",
        "  exact match   50.0",
        "lora           100.0      –",
        "  exact match  100.0",
    ]


def test_a_terminal_table_fits_eighty_columns():
    probes = ["reliability", "rephrase", "image_rephrase", "text_locality", "image_locality"]
    probes += ["same_entity_locality", "hard_locality", "portability", "portability_2hop"]
    probes += ["portability_3hop", "portability_4hop"]
    rows = [row("a", probe, 1.0, editor=f"an-editor-{k}") for probe in probes for k in range(3)]
    lines = tables.table(rows).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.startswith("an-editor-0") for line in lines) == 2  # in two blocks
    assert "Port 2hop" in tables.table(rows)
