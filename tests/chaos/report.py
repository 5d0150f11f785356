"""What was seen: a line for each fault, a table at the end."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from fastusp_backend.cli.table import Column, fitted

from .checks import ERRORS, first_line
from .faults import Fault
from .scene import Ending

_COLUMNS = ("kind", "tried", "error", "cancelled", "went on", "missed", "median s", "worst s", "next: bits", "rounding")


@dataclass
class Record:
    """One fault. seconds: to the error. latents: of the next prompt, `bits`, `rounding`, `wrong`, or none."""

    number: int
    kind: str
    detail: str = ""
    how: str = ""
    seconds: float = 0.0
    text: str = ""
    next: str = ""
    next_seconds: float = 0.0
    latents: str = ""
    leftovers: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def tell(self, fault: Fault, ending: Ending) -> None:
        self.detail = f"{fault.detail} {fault.moment} {fault.request}"
        self.how = ending.how if ending.struck else "missed"
        self.seconds, self.text = ending.seconds, first_line(ending.error)

    @property
    def group(self) -> str:
        """A column of the table."""
        if self.how in ERRORS:
            return "error"
        return {"result": "went on", "replaced": "went on", "missed": "missed"}.get(self.how, "cancelled")

    def __str__(self) -> str:
        said = f" after {self.seconds:.2f} s: {self.text}" if self.text else ""
        line = f"#{self.number} {self.kind}: {self.detail}: {self.how}{said}; "
        line += f"next in {self.next_seconds:.1f} s {self.next}"
        return "\n".join([line, *(f"    FINDING {finding}" for finding in self.findings)])

    def as_json(self) -> str:
        return json.dumps(asdict(self))


def table(records: Sequence[Record]) -> str:
    """By kind: how often, how it ended, seconds to the error, the next prompt's latents."""
    kinds: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        kinds[record.kind].append(record)
    rows = []
    for kind, of_kind in sorted(kinds.items()):
        groups = [record.group for record in of_kind]
        seconds = [record.seconds for record in of_kind if record.group == "error"]
        latents = [record.latents for record in of_kind]
        rows.append(
            (
                kind,
                str(len(of_kind)),
                *(str(groups.count(group)) for group in ("error", "cancelled", "went on", "missed")),
                f"{statistics.median(seconds):.1f}" if seconds else "",
                f"{max(seconds):.1f}" if seconds else "",
                str(latents.count("bits")),
                str(latents.count("rounding")),
            )
        )
    return fitted([*map(Column, _COLUMNS)], rows, markdown=True)


def summary(records: Sequence[Record]) -> str:
    findings = [finding for record in records for finding in record.findings]
    slowest = max((r for r in records if r.group == "error"), key=lambda r: r.seconds, default=None)
    worst = f"{slowest.seconds:.1f} s ({slowest.kind})" if slowest else "none"
    hangs, orphans, wrong = (
        sum(finding.startswith(mark) for finding in findings) for mark in ("HANG", "ORPHAN", "WRONG LATENTS")
    )
    return (
        f"{len(records)} faults, worst time to the error {worst}, hangs {hangs}, orphans {orphans}, "
        f"wrong latents {wrong}, findings {len(findings)}"
    )
