"""What doctor says of machines that are pretended."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastusp_backend.cli import doctor
from fastusp_backend.cli.doctor.check import Check, verdict
from fastusp_backend.cli.doctor.checks import examine, gpus, host, software
from fastusp_backend.cli.doctor.facts import Facts, Probe
from fastusp_backend.devices import Devices, Gpu, GpuState

pytestmark = pytest.mark.unit


def gpu(index: int, name: str = "H200", capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu(index=index, name=name, uuid=f"GPU-{index}", compute_capability=capability)


def state(index: int, **changed) -> GpuState:
    usual = {"total": 141 << 30, "free": 140 << 30, "compute_mode": "Default", "mig": False, "driver": "580.1"}
    return GpuState(index=index, **usual | changed)


PROBE = Probe(
    torch="2.11.0+cu130",
    cuda="13.0",
    nccl="2.28.9",
    triton="3.6.0",
    architectures=["sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120"],
    names=["H200", "H200"],
    peers=[[False, True], [True, False]],
    symmetric=["", ""],
)
GOOD = Facts(
    wanted="auto",
    python=(3, 12, 3),
    system="Linux",
    release="6.8.0",
    container=False,
    cpus=32,
    packages={"msgspec": "0.20", "safetensors": "0.7"},
    compiler="/usr/bin/gcc",
    compiler_problem="",
    devices=Devices(ranks=2, gpus=(0, 1)),
    gpus=(gpu(0), gpu(1)),
    states=(state(0), state(1)),
    links={"0-1": "NV18"},
    iommu=True,
    probe=PROBE,
    shm_free=16 << 30,
    memfd_problem="",
    run_dir_problem="",
    temporary="/tmp",
    descriptors=65536,
    locked=None,
    host_free=200 << 30,
    environment={},
    dropped=(),
)
CPU = replace(GOOD, wanted="cpu:2", devices=Devices(ranks=2), gpus=(), states=(), links={}, probe=Probe(torch="2.13.0"))


def pretended(probe: dict | None = None, **changed) -> Facts:
    return replace(GOOD, **changed, **({"probe": replace(PROBE, **probe)} if probe else {}))


@pytest.mark.parametrize("machine", [GOOD, CPU], ids=["GPUs", "CPU ranks"])
def test_a_good_machine(machine):
    found = examine(machine)
    assert {check.status for check in found} == {"ok"} and not any(check.advice for check in found)
    joined = any(check.name == "GPU 0 - GPU 1" and "NVLink (NV18)" in check.text for check in found)
    assert joined == bool(machine.gpus)


T4 = gpu(1, "T4", (7, 5))
LATE_TORCH = {"architectures": ["sm_80", "sm_90"]}
CLOSED = [[False, False], [False, False]]

BAD = {
    "Windows": (pretended(system="Windows"), "system", "fail", "WSL 2"),
    "macOS": (pretended(system="Darwin"), "system", "fail", "Linux"),
    "old Python": (pretended(python=(3, 9, 1)), "python", "fail", "3.10"),
    "no msgspec": (pretended(probe={"missing": {"msgspec": "No module"}}), "packages", "fail", "requirements.txt"),
    "no torch": (pretended(probe={"torch": "", "error": "No module named 'torch'"}), "torch", "fail", "ComfyUI"),
    "old torch": (pretended(probe={"torch": "2.6.0+cu124"}), "torch", "fail", "2.7 or newer"),
    "old torch, CPU ranks": (replace(CPU, probe=Probe(torch="2.6.0")), "torch", "fail", "2.7 or newer"),
    "torch for CPUs": (pretended(probe={"cuda": None}), "torch", "fail", "CUDA build"),
    "old driver": (pretended(probe={"error": "driver too old"}), "torch", "fail", "580.1"),
    "one GPU passed on": (pretended(probe={"names": ["H200"]}), "torch", "fail", "--gpus all"),
    "new GPU": (pretended(probe=LATE_TORCH, gpus=(gpu(0), gpu(1, "5090", (12, 0)))), "torch", "fail", "knows this GPU"),
    "no Triton": (pretended(probe={"triton": "", "triton_problem": "ImportError: x"}), "triton", "fail", "torch"),
    "no compiler": (pretended(compiler="", compiler_problem="there is none"), "C compiler", "fail", "apt install gcc"),
    "no headers": (pretended(compiler_problem="Python.h: No such file"), "C compiler", "fail", "python3.12-dev"),
    "no GPU": (replace(CPU, wanted="auto"), "devices", "warn", "libnvidia-ml"),
    "cut short": (
        pretended(visible="CUDA_VISIBLE_DEVICES=0,7,1 leaves GPU 0 of 2", visible_problem="reads nothing from '7' on"),
        "visible GPUs",
        "warn",
        "--gpus 0,1",
    ),
    "all hidden": (
        replace(CPU, wanted="auto", visible="CUDA_VISIBLE_DEVICES= leaves none of 2 GPUs"),
        "visible GPUs",
        "warn",
        "unset it",
    ),
    "unlike GPUs": (pretended(gpus=(gpu(0), T4)), "devices", "warn", "gpus = auto"),
    "old GPU": (pretended(gpus=(gpu(0), T4)), "GPU 1", "warn", "float32"),
    "forbidden": (
        pretended(states=(state(0), state(1, compute_mode="Prohibited"))),
        "GPU 1",
        "fail",
        "-i 1 -c DEFAULT",
    ),
    "exclusive": (pretended(states=(state(0, compute_mode="Exclusive_Process"), state(1))), "GPU 0", "warn", "DEFAULT"),
    "MIG": (pretended(states=(state(0, mig=True), state(1))), "GPU 0", "fail", "MIG off"),
    "full GPU": (pretended(states=(state(0, free=60 << 30), state(1))), "GPU 0", "warn", "Other programs"),
    "no state": (pretended(states=(state(0),)), "GPU 1", "fail", "nvidia-smi"),
    "no peer access": (
        pretended(probe={"peers": CLOSED}, links={"0-1": "PHB"}),
        "GPU 0 - GPU 1",
        "warn",
        "host memory",
    ),
    "PCIe behind an IOMMU": (pretended(links={"0-1": "PHB"}), "GPU 0 - GPU 1", "warn", "NCCL_P2P_DISABLE=1"),
    "no symmetric memory": (pretended(probe={"symmetric": ["", "x"]}), "symmetric memory", "warn", "NCCL_P2P_DISABLE"),
    "Docker's /dev/shm": (pretended(shm_free=64 << 20), "shared memory", "warn", "--shm-size"),
    "no memfd": (pretended(memfd_problem="OSError"), "shared memory", "fail", "memfd_create"),
    "little memory": (pretended(host_free=1 << 30), "host memory", "warn", "1 GB"),
    "few files": (pretended(descriptors=256), "limits", "warn", "ulimit -n"),
    "folder of another": (pretended(run_dir_problem="PermissionError"), "temporary folder", "fail", "TMPDIR"),
    "slow by hand": (pretended(environment={"NCCL_P2P_DISABLE": "1"}), "environment", "warn", "host memory"),
}


@pytest.mark.parametrize("machine, name, status, advice", BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_with_what_to_do(machine, name, status, advice):
    (found,) = [check for check in examine(machine) if check.name == name]
    assert found.status == status and advice in found.advice
    assert str(found).startswith(f"{status}  {name}: ") and "\n      -> " in str(found)
    json.dumps(doctor.report(machine, [found]))


def test_what_does_not_matter_is_no_warning():
    (chosen,) = gpus.visible(pretended(visible="CUDA_VISIBLE_DEVICES=1,0 leaves GPUs 1, 0 of 4"))
    assert (chosen.status, chosen.text) == ("ok", "CUDA_VISIBLE_DEVICES=1,0 leaves GPUs 1, 0 of 4")
    hidden = replace(CPU, wanted="auto", visible="CUDA_VISIBLE_DEVICES= leaves none of 2 GPUs")
    assert [check.status for check in gpus.devices(hidden)] == ["ok"]  # `visible` has told it
    assert software.compiler(replace(CPU, compiler_problem="there is none")).status == "ok"
    assert host.environment(pretended(environment={"NCCL_P2P_DISABLE": "0"}))[0].status == "ok"
    (told,) = host.environment(pretended(environment={"CUDA_VISIBLE_DEVICES": "1"}, dropped=("CUDA_VISIBLE_DEVICES",)))
    assert told.text.endswith("not handed to the workers as it is: CUDA_VISIBLE_DEVICES")
    assert gpus.links(pretended(links={"0-1": "PIX"}, iommu=False))[0].status == "ok"
    untold = gpus.devices(pretended(states=(state(0, total=None, free=None), state(1))))[1]
    assert untold.status == "ok" and untold.text.startswith("NVML reports no memory size, compute capability 9.0")
    assert not gpus.links(replace(CPU, devices=Devices(ranks=2)))


def test_pairs_are_those_of_the_devices_own_order():
    peers = [[False, True, False], [True, False, False], [False, False, False]]
    machine = pretended(
        probe={"peers": peers, "names": ["H200"] * 3},
        devices=Devices(ranks=3, gpus=(4, 1, 2)),
        gpus=(gpu(1), gpu(2), gpu(4)),
        links={"1-4": "NV12"},
    )
    assert {check.name: check.status for check in gpus.links(machine)} == {
        "GPU 1 - GPU 2": "warn",
        "GPU 1 - GPU 4": "ok",
        "GPU 2 - GPU 4": "warn",
    }


@pytest.mark.parametrize("peers", [[[False, True], [False, False]], [[False, False], [True, False]]])
def test_peer_access_goes_both_ways_or_does_not_count(peers):
    two = {"devices": Devices(ranks=2, gpus=(0, 1)), "gpus": (gpu(0), gpu(1)), "links": {"0-1": "PIX"}}
    (check,) = gpus.links(pretended(probe={"peers": peers, "names": ["H200"] * 2}, **two))
    assert check.status == "warn" and check.text == "PCIe (PIX), no peer access"


@pytest.mark.parametrize(
    "capability, runs",
    [
        ((8, 0), True),
        ((8, 9), True),
        ((7, 0), False),
        ((9, 0), True),
        ((10, 0), False),
        ((12, 0), True),
        ((12, 1), True),
    ],
)
def test_code_runs_on_its_major_version(capability, runs):
    assert software.runs_on(["sm_80", "sm_90a", "sm_120", "compute_120"], capability) == runs


def test_the_oldest_torch_is_the_nodes():
    nodes = Path(__file__).resolve().parents[2] / "nodes/comfyui.py"
    assert f"TORCH = {', '.join(map(str, software.TORCH))}\n" in nodes.read_text()


def test_a_machine_that_cannot_work_is_not_tried(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda *_: pretended(system="Windows"))
    monkeypatch.setattr(doctor, "examine", lambda _: [Check("system", "fail", "Windows", "WSL 2")])
    arguments = type("Arguments", (), {"gpus": "cpu:2", "json": True, "seconds": 1.0})
    assert doctor.run(arguments) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["worst"] == "fail" and [check["name"] for check in told["checks"]] == ["system", "trial"]
    arguments.gpus = "cpu:99"
    assert doctor.run(arguments) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["text"].startswith("Set 1 to 16 CPU ranks")


@pytest.mark.parametrize(
    ("statuses", "devices", "text"),
    [
        ("ok ok", GOOD.devices, "FastUSP works here"),
        ("ok warn", GOOD.devices, "FastUSP works here; look at 1"),
        ("fail warn fail", None, "FastUSP does not work here yet: fix 0, 2"),
        ("ok", Devices(ranks=1), "FastUSP works here. One CPU rank has nobody to work with: --gpus cpu:2"),
        ("ok", Devices(ranks=1, gpus=(0,)), "FastUSP works here"),
    ],
)
def test_the_verdict(statuses, devices, text):
    said = verdict([Check(str(n), status, "") for n, status in enumerate(statuses.split())], devices)
    assert said.startswith(text) and ("cpu:2" in said) == ("cpu:2" in text)


def test_the_verdict_is_the_last_line(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda *_: GOOD)
    monkeypatch.setattr(doctor, "examine", lambda _: [Check("system", "fail", "Windows", "WSL 2")])
    assert doctor.run(type("Arguments", (), {"gpus": "cpu:2", "json": False, "seconds": 1.0})) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FastUSP does not work here yet: fix system"
