"""Tools that fail, or hang, are not asked again by every prompt."""

import subprocess
import threading
import time

import pytest

from fastusp_backend import devices, once
from fastusp_backend.devices import list_gpus, parse_devices
from fastusp_backend.errors import DeviceError
from fastusp_backend.once import Once

pytestmark = pytest.mark.unit


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(script): puts an nvidia-smi on the path; how often it was asked is what the result's `count()` says."""
    log, tool = tmp_path / "log", tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    log.touch()
    list_gpus.cache_clear()

    def make(script: str):
        tool.write_text(f"#!/bin/sh\necho asked >> {log}\n{script}\n")
        tool.chmod(0o755)
        return lambda: log.read_text().count("asked")

    yield make
    list_gpus.cache_clear()


def test_a_tool_that_fails_is_asked_once_for_a_while(asked, monkeypatch):
    count = asked("echo no driver; exit 9")
    for _ in range(3):
        with pytest.raises(DeviceError, match="nvidia-smi failed: no driver"):
            parse_devices("auto")
    assert count() == 1
    asked("printf '0, H200, GPU-0, 9.0\\n'")
    with pytest.raises(DeviceError, match=r"no driver\. .* CPU ranks \(asked \d+ s ago; it is asked again in \d+ s\)$"):
        parse_devices("0")
    monkeypatch.setattr(once, "SECONDS", 0.0)
    assert parse_devices("auto").gpus == (0,)
    assert parse_devices("0").gpus == (0,) and count() == 2


@pytest.mark.parametrize(
    "script, words",
    [
        ("echo 'Make sure that it runs.' >&2; exit 9", "nvidia-smi failed: Make sure that it runs."),
        ("echo; echo no driver; echo ' ' >&2; exit 9", "nvidia-smi failed: no driver."),
        ("exit 9", "nvidia-smi failed: exit code 9."),
        ("kill -SEGV $$", "nvidia-smi failed: exit code -11."),
        ("echo 0, H200", "nvidia-smi's answer is not understood: '0, H200'."),
        ("echo", "nvidia-smi's answer is not understood: ''."),
    ],
)
def test_what_went_wrong_is_told_with_what_to_do(asked, script, words):
    asked(script)
    with pytest.raises(DeviceError) as failed:
        list_gpus()
    assert str(failed.value) == f"{words} Reinstall the driver, or use 'cpu:N' for N CPU ranks"


def test_a_tool_that_cannot_be_run(asked, tmp_path):
    asked("")
    (tmp_path / "nvidia-smi").write_text("#!/no/such/shell\n")
    with pytest.raises(DeviceError, match=r"^nvidia-smi cannot be run \(No such file or directory\)\. Reinstall"):
        list_gpus()


def test_a_tool_that_hangs_is_not_waited_for(asked, monkeypatch):
    """As one whose driver hangs, beyond its death."""
    monkeypatch.setattr(devices, "SECONDS", 0.2)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    count, began = asked("exec sleep 8"), time.monotonic()
    for _ in range(2):
        with pytest.raises(
            DeviceError, match=r"^nvidia-smi gave no answer within 0.2 s\. Reinstall the driver, or use"
        ):
            parse_devices("auto")
    assert time.monotonic() - began < 6 and count() == 1


def test_one_asks_and_others_wait_for_the_answer():
    calls, begun, go_on = [], threading.Event(), threading.Event()

    def ask():
        calls.append(1)
        begun.set()
        assert go_on.wait(30)
        return "answer"

    answers, once_asked = [], Once(ask)
    threads = [threading.Thread(target=lambda: answers.append(once_asked())) for _ in range(5)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert answers == ["answer"] * 5 and len(calls) == 1


def test_other_errors_are_not_remembered():
    answers = iter([OSError("no descriptors left"), None])

    def ask():
        if error := next(answers):
            raise error
        return 1

    once_asked = Once(ask)
    with pytest.raises(OSError):
        once_asked()
    assert once_asked() == once_asked() == 1
