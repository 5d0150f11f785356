"""Commands whose answer is waited for within a limit; this project's own modules can be such commands.

NVIDIA's libraries are asked in processes of their own: a driver that hangs keeps whoever asks it, even from dying; a
library that was loaded once stays that of an older driver; and CUDA must not be initialised in the host.
"""

import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from .environment import inherited

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def run(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Works as `subprocess.run` with captured output; but one that takes longer is not waited for when it was killed: a
    driver that hangs may keep it for ever. Raises OSError or subprocess.TimeoutExpired."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def ask_module(module: str, *arguments: str, seconds: float, without: Collection[str] = ()) -> str:
    """Returns what `python -m module` prints, in this environment less the variables `without`.

    Raises OSError with the reason alone: no answer in time, or the last line of the process's errors.
    """
    env = {k: v for k, v in inherited(os.environ, _PACKAGE_ROOT).items() if k not in without}
    try:
        done = run([sys.executable, "-m", module, *arguments], seconds, env)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"no answer within {seconds:g} s") from error
    if done.returncode != 0:
        raise OSError((done.stderr.strip().splitlines() or [f"it crashed, exit status {done.returncode}"])[-1])
    return done.stdout
