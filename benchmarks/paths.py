"""The repository's folders. Importing this first lets the benchmarks run from any folder, without installing the
package. `tests/host` drives a real ComfyUI."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"

sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/host")]
