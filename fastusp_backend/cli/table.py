"""Tables of text, of which a row can be printed as soon as it is measured.

That may take minutes a row, so widths are declared where the rows are not known yet. Libraries (tabulate, rich) lay a
table out from all of its rows, or draw it anew for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Column:
    head: str
    width: int = 0
    """Characters, to which cells are filled up; longer ones push what follows."""
    format: str = ""
    """How numbers are written, as `.1f`: at the right; `s` for text that stands there, too. Else it is at the left."""

    def cell(self, value: object) -> str:
        """Writes a number by the format, None as nothing, and text as it is."""
        text = "" if value is None else value if isinstance(value, str) else format(value, self.format)
        return text.rjust(self.width) if self.format else text.ljust(self.width)


class Table:
    """Formats rows one by one. markdown: with the bars of Markdown, else with two blanks between columns."""

    def __init__(self, *columns: Column, markdown: bool = False):
        self.columns = columns
        self._markdown = markdown

    def head(self) -> str:
        """Returns the first line; in Markdown the first two."""
        line = self.row(*(column.head for column in self.columns))
        if not self._markdown:
            return line
        return f"{line}\n{self.row(*('-' * max(3, column.width) for column in self.columns))}"

    def row(self, *values: object) -> str:
        cells = [column.cell(value) for column, value in zip(self.columns, values, strict=True)]
        return f"| {' | '.join(cells)} |" if self._markdown else "  ".join(cells).rstrip()


def fitted(columns: Sequence[Column], rows: Sequence[Sequence[object]], *, markdown: bool = False) -> str:
    """Returns the whole table of rows that are known, as wide as they need it."""
    cells = zip(*([column.head for column in columns], *rows), strict=True)
    widths = [max(len(column.cell(value)) for value in values) for column, values in zip(columns, cells, strict=True)]
    wide = (Column(c.head, width, c.format) for c, width in zip(columns, widths, strict=True))
    table = Table(*wide, markdown=markdown)
    return "\n".join([table.head(), *(table.row(*row) for row in rows)])
