"""Processes that are forked in place of being started: what torchrun relies on."""

import os
import signal
import subprocess
import sys

import pytest

from fastusp_backend.worker.forked import fork

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]


@pytest.fixture
def forked(tmp_path):
    """forked(work): the process, and what it has written when it ends."""
    with open(tmp_path / "out", "w+") as out:

        def of(work, **env):
            process = fork(work, env, [out.fileno(), out.fileno()])

            def written() -> str:
                process.wait(30)
                return (tmp_path / "out").read_text()

            return process, written

        yield of


def test_it_has_a_session_an_environment_and_output_of_its_own(forked):
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    def work():
        default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        os.write(1, f"{os.getsid(0) == os.getpid()} {default} {dict(os.environ)}\n".encode())
        os.write(2, b"said\n")
        os._exit(7)

    try:
        process, written = forked(work, LANG="C", RANK="1")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert written() == "True True {'LANG': 'C', 'RANK': '1'}\nsaid\n"
    assert process.returncode == process.poll() == process.wait() == 7
    assert not os.path.exists(f"/proc/{process.pid}"), "its parent has heard of its end"


def test_it_can_be_ended_with_all_of_its_session(forked):
    process, _ = forked(lambda: signal.pause())
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM


def test_what_it_raises_ends_it_alone(forked, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", lambda *about: os.write(2, repr(about[1]).encode()))

    def work():
        raise ValueError("no such thing")

    process, written = forked(work)
    assert written() == "ValueError('no such thing')" and process.returncode == 1
