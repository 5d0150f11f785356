"""The `gpus` input: what each form means on a given machine, and what is refused."""

import pytest

from fastusp_backend import devices
from fastusp_backend.devices import MAX_CPU_RANKS, Devices, Gpu, gpu_states, list_gpus, parse_devices, supports_bfloat16
from fastusp_backend.errors import DeviceError

pytestmark = pytest.mark.unit


def gpu(index: int, name: str = "H200", capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu(index=index, name=name, uuid=f"GPU-{index}abc", compute_capability=capability)


MIXED = (gpu(0, "T4", (7, 5)), gpu(1), gpu(2), gpu(3, "T4", (7, 5)), gpu(4))
TWINS = (gpu(0), gpu(1))


@pytest.mark.parametrize(
    "text, gpus, visible, expected",
    [
        ("auto", MIXED, None, Devices(ranks=3, gpus=(1, 2, 4))),
        ("auto", MIXED, "0,3,4", Devices(ranks=2, gpus=(0, 3))),
        ("auto", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        ("auto", TWINS, "1", Devices(ranks=1, gpus=(1,))),
        ("auto", TWINS, "", Devices(ranks=1)),
        ("auto", (), None, Devices(ranks=1)),
        ("all", MIXED, None, Devices(ranks=5, gpus=(0, 1, 2, 3, 4))),
        ("all", MIXED, "GPU-2a, GPU-4", Devices(ranks=2, gpus=(2, 4))),
        ("0,1", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        (" 4 , 1 ", MIXED, None, Devices(ranks=2, gpus=(4, 1))),
        ("AUTO", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        ("cpu", TWINS, None, Devices(ranks=1)),
        ("cpu:1", (), None, Devices(ranks=1)),
        ("CPU:2", TWINS, None, Devices(ranks=2)),
        (f"cpu:{MAX_CPU_RANKS}", (), None, Devices(ranks=MAX_CPU_RANKS)),
    ],
)
def test_understood(text, gpus, visible, expected):
    assert parse_devices(text, gpus=gpus, visible=visible) == expected


@pytest.mark.parametrize(
    "text, gpus, message",
    [
        ("0,7", TWINS, r"GPU 7 does not exist. This machine has 0 \(H200\), 1 \(H200\)"),
        ("5,6", TWINS, "GPUs 5, 6 do not exist"),
        ("0", (), "no GPU at all; use 'cpu:N'"),
        ("all", (), "no GPU is visible here; use 'cpu:N'"),
        ("1,1", TWINS, "named twice"),
        ("cpu:0", (), f"between 1 and {MAX_CPU_RANKS} CPU ranks"),
        (f"cpu:{MAX_CPU_RANKS + 1}", (), f"between 1 and {MAX_CPU_RANKS} CPU ranks"),
        ("", TWINS, "is not understood"),
        ("cuda:0", TWINS, "is not understood"),
        ("0,", TWINS, "is not understood"),
        ("-1", TWINS, "is not understood"),
        ("cpu:-1", TWINS, "is not understood"),
        ("0;1", TWINS, "is not understood"),
    ],
)
def test_refused_by_name(text, gpus, message):
    with pytest.raises(DeviceError, match=message) as refusal:
        parse_devices(text, gpus=gpus, visible=None)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize(
    "gpus, visible, lacks", [((), None, "is not found"), (TWINS, "MIG-9", "CUDA_VISIBLE_DEVICES leaves")]
)
def test_gpus_that_torch_alone_sees_are_told(gpus, visible, lacks):
    """One CPU rank in their place would be a silent, and slow, answer."""
    with pytest.raises(DeviceError, match=f"gpus = 'auto': torch sees 2 GPUs, but nvidia-smi, .* {lacks}.* PATH"):
        parse_devices("auto", gpus=gpus, visible=visible, seen_by_torch=2)
    assert parse_devices("cpu:2", gpus=gpus, visible=visible, seen_by_torch=2) == Devices(ranks=2)


def test_one_cpu_rank_for_want_of_gpus_is_told_once(caplog):
    devices._tell_of_no_gpu.cache_clear()
    for _ in range(2):
        parse_devices("auto", gpus=(), seen_by_torch=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "one CPU rank serves" in caplog.text


def test_devices_are_a_key_and_tell_their_kind():
    assert Devices(ranks=2, gpus=(0, 1)).type == "cuda"
    assert Devices(ranks=2).type == "cpu"
    assert str(Devices(ranks=2, gpus=(1, 0))) == "gpu 1,0"
    assert str(Devices(ranks=2)) == "cpu:2"
    assert len({Devices(ranks=2), Devices(ranks=2), Devices(ranks=2, gpus=(0, 1)), Devices(ranks=2, gpus=(1, 0))}) == 3


def test_bfloat16_needs_every_gpu(monkeypatch):
    monkeypatch.setattr(devices, "list_gpus", lambda: MIXED)
    assert supports_bfloat16(Devices(ranks=2, gpus=(1, 2)))
    assert not supports_bfloat16(Devices(ranks=2, gpus=(0, 1)))
    assert not supports_bfloat16(Devices(ranks=2))


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """nvidia_smi(text, code): puts a tool on the path that prints and exits so."""
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def answers(text: str, code: int) -> None:
        tool.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {code}\n")
        tool.chmod(0o755)
        list_gpus.cache_clear()

    yield answers
    list_gpus.cache_clear()


def test_nvidia_smi_is_read(nvidia_smi):
    nvidia_smi("0, NVIDIA A100, GPU-1, 8.0\\n1, NVIDIA L4, GPU-2, 8.9\\n", 0)
    assert list_gpus() == (
        Gpu(index=0, name="NVIDIA A100", uuid="GPU-1", compute_capability=(8, 0)),
        Gpu(index=1, name="NVIDIA L4", uuid="GPU-2", compute_capability=(8, 9)),
    )


def test_memory_that_is_not_told(nvidia_smi):
    """As of a GPU that shares the host's memory."""
    nvidia_smi("0, [N/A], [N/A], Default, [N/A], 580.95\\n1, 81559, 81000, Default, Disabled, 580.95\\n", 0)
    assert [(state.total, state.free, state.mig) for state in gpu_states()] == [
        (None, None, False),
        (81559 << 20, 81000 << 20, False),
    ]


def test_no_devices_is_no_error(nvidia_smi):
    nvidia_smi("No devices were found", 6)
    assert list_gpus() == ()


@pytest.mark.parametrize("text, code", [("driver mismatch", 9), ("0, Old card, GPU-1, [N/A]", 0)])
def test_a_failing_nvidia_smi_is_told_and_cpu_ranks_do_not_ask_it(nvidia_smi, text, code):
    nvidia_smi(text, code)
    with pytest.raises(DeviceError, match="cpu:N|not understood"):
        parse_devices("auto")
    assert parse_devices("cpu:2") == Devices(ranks=2)
