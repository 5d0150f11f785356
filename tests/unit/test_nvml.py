"""What NVML tells of GPUs, by a package that pretends some, and what is said where it fails."""

import importlib.util
import inspect
import subprocess
import time
from pathlib import Path

import pynvml
import pytest

from fastusp_backend import nvml as module
from fastusp_backend.devices import (
    Devices,
    Gpu,
    GpuState,
    cuda_visible,
    gpu_links,
    gpu_loads,
    gpu_states,
    list_gpus,
    parse_devices,
    supports_bfloat16,
    uses_gpu,
)
from fastusp_backend.errors import DeviceError

pytestmark = pytest.mark.unit

FAKE = Path(__file__).parents[1] / "fake_nvml/pynvml.py"
GIB = 1 << 30


def test_gpus_by_nvidia_smi_s_index(nvml):
    """A GPU that a scheduler keeps from this user is none of these, and the others keep their indices."""
    nvml(
        {"name": "NVIDIA A100", "compute_capability": [8, 0]}, None, {"name": "NVIDIA L4", "compute_capability": [8, 9]}
    )
    assert list_gpus() == (
        Gpu(index=0, name="NVIDIA A100", uuid="GPU-0", compute_capability=(8, 0)),
        Gpu(index=2, name="NVIDIA L4", uuid="GPU-2", compute_capability=(8, 9)),
    )


def test_states(nvml):
    """The first shares the host's memory, and can be cut into no instances."""
    nvml(
        {"memory": None, "mig": None, "compute_mode": None},
        {"memory": [80 * GIB, 79 * GIB], "mig": 0, "compute_mode": 3},
        {"mig": 1, "memory": [80 * GIB, GIB], "compute_mode": 2, "pcie": [4, 8]},
    )
    driver = {"driver": "580.1"}
    assert gpu_states() == (
        GpuState(index=0, total=None, free=None, compute_mode="unknown", mig=False, **driver),
        GpuState(index=1, total=80 * GIB, free=79 * GIB, compute_mode="Exclusive_Process", mig=False, **driver),
        GpuState(index=2, total=80 * GIB, free=GIB, compute_mode="Prohibited", mig=True, pcie=(4, 8), **driver),
    )


def test_loads(nvml):
    nvml({"memory": [80 * GIB, 60 * GIB], "utilisation": 97, "temperature": 64}, {"memory": None})
    told = {"index": 0, "name": "NVIDIA H200"}
    full = {"used": 20 * GIB, "total": 80 * GIB, "utilisation": 97, "temperature": 64}
    assert gpu_loads() == [told | full, told | {"index": 1} | dict.fromkeys(full)]


def test_links_over_switches(nvml):
    nvml(*[{"nvlinks": ["switch"] * 18, "ancestors": {"1": 40, "2": 50}}] * 3)
    assert gpu_links() == {"0-1": "NV18", "0-2": "NV18", "1-2": "NV18"}


def test_links_between_pairs_and_over_pcie(nvml):
    """Links that are down do not count; of GPUs 1 and 3 nothing is told."""
    nvml(
        {"nvlinks": [1, None, 1, 1, 2], "ancestors": {"1": 50, "2": 50, "3": 0}},
        {"nvlinks": [0, 0, 0], "ancestors": {"2": 20}},
        {"ancestors": {"3": 30}, "nvlinks": [0, None]},
        {},
    )
    assert gpu_links() == {"0-1": "NV3", "0-2": "NV1", "0-3": "PIX", "1-2": "PXB", "2-3": "PHB"}


@pytest.mark.parametrize("machine", [{"init": "NVMLError_LibraryNotFound"}, {}], ids=["no library", "no GPU"])
def test_no_gpus_are_no_error(nvml, machine):
    nvml(**machine)
    assert list_gpus() == gpu_states() == () and gpu_links() == {}


@pytest.mark.parametrize("function", ["nvmlDeviceGetNvLinkState", "nvmlDeviceGetNvLinkRemoteDeviceType"])
@pytest.mark.parametrize("error", ["FunctionNotFound", "Unknown", "NotSupported"])
def test_links_that_an_old_driver_does_not_tell_of_are_none(nvml, monkeypatch, tmp_path, function, error):
    nvml({"ancestors": {"1": 40}, "nvlinks": ["switch"]}, {"nvlinks": ["switch"]})
    refusing = f"{FAKE.read_text()}\ndef {function}(*_):\n    raise NVMLError_{error}\n"
    (tmp_path / "pynvml.py").write_text(refusing)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert gpu_links() == {"0-1": "NODE"}


DRIVER = "Restart the machine or reinstall the driver, or use 'cpu:N' for N CPU ranks"
PACKAGE = (
    "Run pip install --force-reinstall nvidia-ml-py with the Python that runs ComfyUI, or use 'cpu:N' for N CPU ranks"
)


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        ({"init": "NVMLError_DriverNotLoaded"}, "Driver Not Loaded"),
        ({"init": "crash"}, "it crashed, exit status -11"),
        ({"gpus": [{"compute_capability": None}]}, "Not Supported"),
    ],
)
def test_what_fails_is_told_with_what_to_do_and_cpu_ranks_do_not_ask(nvml, machine, told):
    count = nvml(**machine)
    ranks = parse_devices("cpu:2")
    assert ranks == Devices(ranks=2) and not supports_bfloat16(ranks) and not uses_gpu(ranks, "GPU-0")
    assert cuda_visible(ranks) == "" and count() == 0
    with pytest.raises(DeviceError) as failed:
        parse_devices("auto")
    assert str(failed.value) == f"{DRIVER}: NVML, the library that reports NVIDIA's GPUs, failed: {told}"


@pytest.mark.parametrize(
    ("package", "told"),
    [
        ("raise ModuleNotFoundError(\"No module named 'pynvml'\")", "No module named 'pynvml'"),
        ("", "module 'pynvml' has no attribute"),
        (
            f"{FAKE.read_text()}\ndef nvmlDeviceGetName(gpu):\n    return b'H200'\n",
            "none of nvidia-ml-py's, or an old one",
        ),
    ],
    ids=["missing", "another package", "one that returns bytes"],
)
def test_a_package_that_is_missing_or_another_is_told(nvml, monkeypatch, tmp_path, package, told):
    nvml({})
    (tmp_path / "pynvml.py").write_text(package)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DeviceError) as failed:
        list_gpus()
    assert told in str(failed.value) and str(failed.value).startswith(PACKAGE)


def test_a_driver_that_hangs_is_not_waited_for(nvml, monkeypatch):
    """As one that hangs beyond the death of whoever asks it."""
    monkeypatch.setattr(module, "SECONDS", 0.3)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: None)
    nvml(init="hang")
    began = time.monotonic()
    for remembered in (r"$", r" \(\d+ s ago"):
        with pytest.raises(DeviceError, match=rf"^{DRIVER}: .* failed: no answer within 0.3 s{remembered}"):
            parse_devices("auto")
    assert time.monotonic() - began < 6


def test_the_real_package_has_what_the_pretended_one_has():
    spec = importlib.util.spec_from_file_location("fake_pynvml", FAKE)
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    names = [name for name in dir(fake) if name.startswith(("nvml", "NVML"))]
    assert len(names) > 30
    for name in names:
        pretended, real = getattr(fake, name), getattr(pynvml, name)
        if name.startswith("NVMLError"):
            assert issubclass(real, pynvml.NVMLError)
        elif name.startswith("NVML_"):
            assert real == pretended, name
        else:
            required = [p for p in inspect.signature(real).parameters.values() if p.default is p.empty]
            assert len(required) == len(inspect.signature(pretended).parameters), name
