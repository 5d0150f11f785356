"""CUDA_VISIBLE_DEVICES by CUDA's rules, and its driver's own count of GPUs."""

import ctypes
import sys
import uuid

import pytest

from fastusp_backend import visible
from fastusp_backend.errors import DeviceError
from fastusp_backend.visible import counted_by_cuda, read

pytestmark = pytest.mark.unit

UUIDS = ("GPU-00aa", "GPU-00bb", "GPU-1111")


@pytest.mark.parametrize(
    "value, left, problem",
    [
        ("0,1,2", (0, 1, 2), ""),
        ("2,1", (2, 1), ""),
        (" 2 , 1 ", (2, 1), ""),
        ("", (), ""),
        ("-1", (), ""),
        ("0,2,-1,1", (0, 2), ""),
        ("1,,0", (1,), ""),
        ("0,7,1", (0,), "reads nothing from '7' on, which names no GPU"),
        ("NoDevFiles", (), "reads nothing from 'NoDevFiles' on, which names no GPU"),
        ("1gpu0,+2", (1, 2), ""),
        ("0,1,0", (), "takes no GPU at all, since '0' names one that was named before"),
        ("0,GPU-1", (0,), "reads nothing from 'GPU-1' on, which names no GPU"),
        ("GPU-1", (2,), ""),
        ("GPU-1111,GPU-00a", (2, 0), ""),
        ("GPU-1,GPU-0,GPU-00aa", (2,), "reads nothing from 'GPU-0' on, which names no GPU"),  # or one of two
        ("GPU-1,0", (2,), "reads nothing from '0' on, which names no GPU"),
        ("GPU-1,GPU-11", (), "takes no GPU at all, since 'GPU-11' names one that was named before"),
        ("gpu-1111", (), "reads nothing from 'gpu-1111' on, which names no GPU"),
        ("GPU-1,MIG-2", (2,), "reads nothing from 'MIG-2' on, which names no GPU"),
    ],
)
def test_the_rules(value, left, problem):
    assert read(value, UUIDS, lambda: UUIDS) == (tuple(UUIDS[i] for i in left), problem)


def test_numbers_are_places_in_cudas_count_and_uuids_are_not():
    counted = UUIDS[::-1]
    assert read("0,2", UUIDS, lambda: counted).uuids == ("GPU-1111", "GPU-00aa")
    assert read("GPU-1,GPU-00b", UUIDS, lambda: counted).uuids == ("GPU-1111", "GPU-00bb")


def test_uuids_as_scripts_write_them():
    for value in ("GPU-1111 ", "gpu-1111", "GPU-1111 trailing text"):
        assert (
            read(value if value.startswith("GPU-") else f"GPU-00aa,{value}", UUIDS, lambda: UUIDS).uuids[-1]
            == "GPU-1111"
        )
    assert read("GPU-00aa ,GPU-1", UUIDS, lambda: UUIDS).uuids == ("GPU-00aa", "GPU-1111")
    assert not read("\u0661", UUIDS, lambda: UUIDS).uuids, "a digit, but not to CUDA"


def test_parts_of_gpus_are_refused():
    with pytest.raises(
        DeviceError, match="^Name whole GPUs in .*: CUDA_VISIBLE_DEVICES=MIG-GPU-1/1/0 names a part of a GPU"
    ):
        read("MIG-GPU-1/1/0", UUIDS, lambda: UUIDS)


@pytest.fixture
def child(monkeypatch, tmp_path):
    """child(script): what is run in this Python's place, to ask CUDA."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    counted_by_cuda.cache_clear()

    def make(script: str) -> None:
        tool = tmp_path / "python"
        tool.write_text("#!/bin/sh\n" + script)
        tool.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tool))

    yield make
    counted_by_cuda.cache_clear()


def test_cuda_is_asked_once_with_all_gpus_visible(child, tmp_path):
    child(
        f'echo asked >> {tmp_path}/log; [ "$*" = "-m fastusp_backend.visible" ] || exit 1\n'
        '[ -z "${CUDA_VISIBLE_DEVICES+set}" ] && [ -z "$PYTHONINSPECT" ] || exit 1\n'
        '[ "$CUDA_DEVICE_ORDER" = FASTEST_FIRST ] && printf "GPU-2\\nGPU-1\\n"'
    )
    assert counted_by_cuda() == counted_by_cuda() == ("GPU-2", "GPU-1")
    assert (tmp_path / "log").read_text() == "asked\n"


@pytest.mark.parametrize(
    "script, reason",
    [
        ("echo 'OSError: CUDA error 999' >&2; exit 1", "OSError: CUDA error 999"),
        ("exit 1", "it crashed"),
        ("sleep 30", "no answer within 0.2 s"),
    ],
)
def test_a_driver_that_does_not_answer_is_told(child, monkeypatch, script, reason):
    monkeypatch.setattr(visible, "SECONDS", 0.2 if "sleep" in script else 30.0)
    child(f"exec {script}" if "sleep" in script else script)
    with pytest.raises(DeviceError, match=rf"^Name GPUs by UUID in .* CUDA_VISIBLE_DEVICES=1,0 .*{reason}"):
        counted_by_cuda()


class Driver:
    """libcuda of GPUs whose UUIDs are n times the same byte."""

    def __init__(self, gpus: int, status: int = 0):
        self.gpus, self.status = gpus, status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, device, number):
        device._obj.value = 10 + number
        return 0

    def cuDeviceGetUuid(self, identity, device):
        identity[:] = [device.value] * 16
        return 0


def test_the_drivers_count(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(2))
    assert visible._count() == [f"GPU-{uuid.UUID(bytes=bytes([n]) * 16)}" for n in (10, 11)]
    assert visible._count()[0] == "GPU-0a0a0a0a-0a0a-0a0a-0a0a-0a0a0a0a0a0a"  # as nvidia-smi -L writes them
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(2, status=100))
    assert visible._count() == []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(2, status=804))
    with pytest.raises(OSError, match="CUDA error 804"):
        visible._count()
