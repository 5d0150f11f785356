"""One finding of `doctor`, and what all of them come to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...devices import Devices

_WORST_LAST = ("ok", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""
    """What to do, where something is not as it should be; several lines may be one."""

    def __str__(self) -> str:
        lines = [f"{self.status:4s}  {self.name}: {self.text}", *(self.advice.splitlines() if self.advice else [])]
        return "\n      -> ".join(lines[:2]) + "".join(f"\n         {line}" for line in lines[2:])


def worst(checks: Sequence[Check]) -> str:
    return max((check.status for check in checks), key=_WORST_LAST.index, default="ok")


def verdict(checks: Sequence[Check], devices: Devices | None) -> str:
    """Sums up all checks. devices: those that were examined, None if there are none."""
    failed, warned = ([c.name for c in checks if c.status == status] for status in ("fail", "warn"))
    if failed:
        text = f"FastUSP does not work here yet: fix {', '.join(failed)}"
    else:
        text = "FastUSP works here" + f"; look at {', '.join(warned)}" * bool(warned)
    if devices is not None and devices.ranks == 1 and not devices.gpus:
        text += ". One CPU rank has nobody to work with: --gpus cpu:2 tests how ranks work together"
    return text
