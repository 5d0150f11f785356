"""Tables for people: aligned, row by row or as a whole."""

import pytest

from fastusp_backend.cli.table import Column, Table, fitted

pytestmark = pytest.mark.unit

COLUMNS = Column("name", 6), Column("ms", 5, ".1f"), Column("note")


def test_rows_are_aligned_as_they_come():
    table = Table(*COLUMNS)
    assert [table.head(), table.row("a", 12.34, "x"), table.row("b", None, ""), table.row("c", "-", "y")] == [
        "name       ms  note",
        "a        12.3  x",
        "b",
        "c           -  y",
    ]


def test_markdown():
    table = Table(*COLUMNS, markdown=True)
    assert table.head().splitlines() == ["| name   |    ms | note |", "| ------ | ----- | --- |"]
    assert table.row("longer than that", 1, "") == "| longer than that |   1.0 |  |"


def test_a_whole_table_is_as_wide_as_its_rows():
    columns = [Column("name"), Column("ms", format=".1f")]
    assert fitted(columns, [("a", 1234.5), ("longer", None)]).splitlines() == [
        "name        ms",
        "a       1234.5",
        "longer",
    ]
    assert fitted(columns, [], markdown=True).splitlines() == ["| name | ms |", "| ---- | --- |"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError):
        Table(*COLUMNS).row("a", 1.0)
