"""Random faults against a pool of workers, and a look at what comes of each: `python -m tests.chaos --help`.

requests: what is asked of the pool. world: the pool, the model files, the answers that are right. scene: one request
with a fault in it. faults: the kinds of faults. checks: what must be so afterwards. report: what was seen.
"""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS / "dist")]  # where pytest finds `support` and `pools`, too
