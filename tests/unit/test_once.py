"""What fails is not asked again by every prompt."""

import threading

import pytest

from fastusp_backend import once
from fastusp_backend.devices import parse_devices
from fastusp_backend.errors import DeviceError
from fastusp_backend.once import Once

pytestmark = pytest.mark.unit


def test_a_driver_that_fails_is_asked_once_for_a_while(nvml, monkeypatch):
    count = nvml(init="NVMLError_DriverNotLoaded")
    for _ in range(3):
        with pytest.raises(DeviceError, match="failed: Driver Not Loaded"):
            parse_devices("auto")
    assert count() == 1
    nvml({}, forget=False)
    with pytest.raises(DeviceError, match=r"^Restart .* Not Loaded \(\d+ s ago; FastUSP asks again in \d+ s\)$"):
        parse_devices("0")
    monkeypatch.setattr(once, "SECONDS", 0.0)
    assert parse_devices("auto").gpus == (0,)
    assert parse_devices("0").gpus == (0,) and count() == 2


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
