"""The `gpus` input: what each form means on a given machine, and what is refused."""

import pytest

from fastusp_backend import devices
from fastusp_backend.devices import MAX_CPU_RANKS, Devices, Gpu, parse_devices, supports_bfloat16
from fastusp_backend.errors import DeviceError

pytestmark = pytest.mark.unit


def gpu(index: int, name: str = "H200", capability: tuple[int, int] = (9, 0)) -> Gpu:
    return Gpu(index=index, name=name, uuid=f"GPU-{index}abc", compute_capability=capability)


def in_order(gpus: tuple[Gpu, ...]):
    """CUDA that counts as NVML does."""
    return lambda: tuple(g.uuid for g in gpus)


MIXED = (gpu(0, "T4", (7, 5)), gpu(1), gpu(2), gpu(3, "T4", (7, 5)), gpu(4))
TWINS = (gpu(0), gpu(1))
NOT_UNDERSTOOD = "Set 'auto', 'all', .* is not understood"


@pytest.mark.parametrize(
    "text, gpus, visible, expected",
    [
        ("auto", MIXED, None, Devices(ranks=3, gpus=(1, 2, 4))),
        ("auto", MIXED, "0,3,4", Devices(ranks=2, gpus=(0, 3))),
        ("auto", MIXED, "4,0,1", Devices(ranks=2, gpus=(4, 1))),
        ("auto", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        ("auto", TWINS, "1", Devices(ranks=1, gpus=(1,))),
        ("auto", TWINS, "", Devices(ranks=1)),
        ("auto", (), None, Devices(ranks=1)),
        ("all", MIXED, None, Devices(ranks=5, gpus=(0, 1, 2, 3, 4))),
        ("all", MIXED, "GPU-4,GPU-2a", Devices(ranks=2, gpus=(4, 2))),
        ("0,1", TWINS, "1", Devices(ranks=2, gpus=(0, 1))),
        ("0,1", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        (" 4 , 1 ", MIXED, None, Devices(ranks=2, gpus=(4, 1))),
        ("AUTO", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        ("cuda:1", TWINS, None, Devices(ranks=1, gpus=(1,))),
        ("cuda:0,1", TWINS, None, Devices(ranks=2, gpus=(0, 1))),
        ("cuda:1, cuda:0", TWINS, None, Devices(ranks=2, gpus=(1, 0))),
        ("cuda:0", TWINS, "1", Devices(ranks=1, gpus=(1,))),
        ("cpu", TWINS, None, Devices(ranks=1)),
        ("cpu:1", (), None, Devices(ranks=1)),
        ("CPU:2", TWINS, None, Devices(ranks=2)),
        (f"cpu:{MAX_CPU_RANKS}", (), None, Devices(ranks=MAX_CPU_RANKS)),
    ],
)
def test_understood(text, gpus, visible, expected):
    assert parse_devices(text, gpus=gpus, visible=visible, counted=in_order(gpus)) == expected


@pytest.mark.parametrize(
    "text, gpus, message",
    [
        ("0,7", TWINS, r"Name GPUs of this machine, 0 \(H200\), 1 \(H200\): .*, and GPU 7 does not exist"),
        ("5,6", TWINS, "Name GPUs .*GPUs 5, 6 do not exist"),
        ("0", (), "Set 'cpu:N' for N CPU ranks, as there is no GPU here"),
        ("all", (), "Set 'cpu:N' for N CPU ranks: .*, and no GPU is visible here"),
        ("1,1", TWINS, "Name each GPU once"),
        ("cpu:0", (), f"Set 1 to {MAX_CPU_RANKS} CPU ranks"),
        (f"cpu:{MAX_CPU_RANKS + 1}", (), f"Set 1 to {MAX_CPU_RANKS} CPU ranks"),
        ("", TWINS, NOT_UNDERSTOOD),
        ("cuda:2", TWINS, r"Name GPUs that CUDA counts, cuda:0 \(H200\), cuda:1 \(H200\): .*cuda:2 does not exist"),
        ("cuda:0", (), "Set 'cpu:N' for N CPU ranks, as CUDA counts no GPU here"),
        ("cuda:1,1", TWINS, "Name each GPU once"),
        ("cuda", TWINS, NOT_UNDERSTOOD),
        ("0,", TWINS, NOT_UNDERSTOOD),
        ("-1", TWINS, NOT_UNDERSTOOD),
        ("cpu:-1", TWINS, NOT_UNDERSTOOD),
        ("0;1", TWINS, NOT_UNDERSTOOD),
        (f"cpu:{'9' * 5000}", (), NOT_UNDERSTOOD),  # more digits than Python reads
        ("9" * 5000, TWINS, NOT_UNDERSTOOD),
        (f"cuda:{'9' * 5000}", TWINS, NOT_UNDERSTOOD),
        ("cpu:٣", (), NOT_UNDERSTOOD),
    ],
)
def test_refused_by_name(text, gpus, message):
    with pytest.raises(DeviceError, match=f"^{message}") as refusal:
        parse_devices(text, gpus=gpus, visible=None)
    assert repr(text) in str(refusal.value)


def test_numbers_count_as_cuda_does():
    """The fastest first, by default: here those that NVML names 1, 2, 4, 0, 3."""

    def fastest_first():
        return tuple(MIXED[i].uuid for i in (1, 2, 4, 0, 3))

    assert parse_devices("all", gpus=MIXED, visible="3,0", counted=fastest_first) == Devices(ranks=2, gpus=(0, 1))
    assert parse_devices("auto", gpus=MIXED, visible="0,1,2", counted=fastest_first) == Devices(ranks=3, gpus=(1, 2, 4))
    assert parse_devices("cuda:0,3", gpus=MIXED, visible=None, counted=fastest_first) == Devices(ranks=2, gpus=(1, 0))
    assert parse_devices("cuda:1", gpus=MIXED, visible="3,0", counted=fastest_first) == Devices(ranks=1, gpus=(1,))


def unasked():
    raise AssertionError("CUDA was asked")


def test_cuda_is_asked_for_numbers_among_several_gpus_alone():
    assert parse_devices("cuda:1", gpus=TWINS, visible=None, counted=unasked) == Devices(ranks=1, gpus=(1,))
    for text, gpus, visible in [("auto", MIXED, None), ("all", MIXED, "GPU-1"), ("all", TWINS[:1], "0")]:
        assert parse_devices(text, gpus=gpus, visible=visible, counted=unasked).gpus
    assert parse_devices("1,0", gpus=TWINS, visible="1", counted=unasked) == Devices(ranks=2, gpus=(1, 0))
    assert parse_devices("auto", gpus=TWINS, visible="-1", counted=unasked) == Devices(ranks=1)


@pytest.mark.parametrize("text", ["auto", "all"])
@pytest.mark.parametrize(
    "visible, message",
    [
        ("MIG-7/1/0", r"Name whole GPUs .*: CUDA_VISIBLE_DEVICES=MIG-7/1/0 names a part of a GPU \(MIG\)"),
        ("0", "Name GPUs of nvidia-smi -L .*: CUDA_VISIBLE_DEVICES=0 leaves GPU-elsewhere, which NVML does not name"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_variable(text, visible, message):
    with pytest.raises(DeviceError, match=rf"^{message} \(gpus = '{text}'\)$"):
        parse_devices(text, gpus=TWINS, visible=visible, counted=lambda: ("GPU-elsewhere",))


@pytest.mark.parametrize(
    "visible, told",
    [
        ("", "CUDA_VISIBLE_DEVICES= leaves none of 2 GPUs"),
        ("7,0", "CUDA_VISIBLE_DEVICES=7,0 leaves none of 2 GPUs: CUDA reads nothing from '7' on, which names no GPU"),
    ],
)
def test_nothing_visible_is_told_with_the_variable(caplog, visible, told):
    given = {"gpus": TWINS, "visible": visible, "counted": in_order(TWINS)}
    devices._tell_of_no_gpu.cache_clear()
    assert parse_devices("auto", **given) == Devices(ranks=1)
    assert f"gpus = 'auto': {told}, so one CPU rank is used" in caplog.text
    with pytest.raises(DeviceError) as refusal:
        parse_devices("all", **given)
    todo = "Name other GPUs in CUDA_VISIBLE_DEVICES, or set 'cpu:N' for N CPU ranks"
    assert str(refusal.value) == f"{todo}: gpus = 'all', and {told}"


def test_processes_see_gpus_by_uuid(monkeypatch):
    monkeypatch.setattr(devices, "list_gpus", lambda: MIXED)
    assert devices.cuda_visible(Devices(ranks=2, gpus=(4, 1))) == "GPU-4abc,GPU-1abc"
    with pytest.raises(DeviceError, match="^Name GPUs that NVML names, 0, 1, 2, 3, 4: GPU 9 does not exist"):
        devices.cuda_visible(Devices(ranks=2, gpus=(0, 9)))
    monkeypatch.setattr(devices, "list_gpus", lambda: pytest.fail("NVML was asked"))
    assert devices.cuda_visible(Devices(ranks=2)) == ""


@pytest.mark.parametrize(
    "gpus, visible, lacks",
    [((), None, "is not found"), (TWINS, "GPU-9", r"names others \(CUDA_VISIBLE_DEVICES=GPU-9 leaves none of 2 GPUs")],
)
def test_gpus_that_torch_alone_sees_are_told(gpus, visible, lacks):
    """One CPU rank in their place would be a silent, and slow, answer."""
    with pytest.raises(
        DeviceError, match=f"^Install .* libnvidia-ml.*gpus = 'auto', and torch sees 2 GPUs, but NVML, .* {lacks}"
    ):
        parse_devices("auto", gpus=gpus, visible=visible, seen_by_torch=2)
    assert parse_devices("cpu:2", gpus=gpus, visible=visible, seen_by_torch=2) == Devices(ranks=2)


def test_one_cpu_rank_for_want_of_gpus_is_told_once(caplog):
    devices._tell_of_no_gpu.cache_clear()
    for _ in range(2):
        parse_devices("auto", gpus=(), seen_by_torch=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "one CPU rank is used" in caplog.text


def test_cards_that_auto_leaves_out_are_told_once(caplog):
    devices._tell_of_others.cache_clear()
    for text in ("auto", "auto", "all", "0,1"):
        parse_devices(text, gpus=MIXED, visible=None)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "identical GPUs, H200; it leaves out 0 (T4), 3 (T4): 'all' takes them too" in record.getMessage()


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


@pytest.mark.parametrize("capability, computes", [((7, 0), 0), ((7, 5), 0), ((8, 0), 1), ((8, 9), 1), ((12, 0), 1)])
def test_bfloat16_begins_with_ampere(monkeypatch, capability, computes):
    monkeypatch.setattr(devices, "list_gpus", lambda: (gpu(0, capability=capability),))
    assert supports_bfloat16(Devices(ranks=1, gpus=(0,))) is bool(computes)


@pytest.mark.parametrize("uuid, index", [("GPU-4abc", 4), ("4ABC", 4), ("gpu-1abc", 1), ("GPU-9abc", None)])
def test_a_pool_uses_its_own_gpus_alone(monkeypatch, uuid, index):
    """As torch and NVML write uuids."""
    monkeypatch.setattr(devices, "list_gpus", lambda: MIXED)
    for held in ((1,), (4, 1), (0, 2, 3)):
        assert devices.uses_gpu(Devices(ranks=len(held), gpus=held), uuid) is (index in held)
    assert not devices.uses_gpu(Devices(ranks=2), uuid)
