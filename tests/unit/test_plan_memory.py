"""`plan`: what it says of GPUs that are there, and of some that are not."""

import re
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from placing import header, placed, spec_with

from fastusp_backend.__main__ import main
from fastusp_backend.cli import inputs, plan
from fastusp_backend.config import Layout
from fastusp_backend.devices import Devices
from fastusp_backend.engine import room
from fastusp_backend.errors import RequestError
from fastusp_backend.models.files import model_and_plans
from fastusp_backend.models.placement import place_file
from fastusp_backend.models.synthetic import CHROMA, FLUX2_DEV, FLUX_DEV, TINY_FLUX
from fastusp_backend.planner import plan_batches
from fastusp_backend.weights.tensor_info import TensorInfo

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]
GB = 10**9


def plan_says(monkeypatch, capsys, path, *arguments):
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", str(path), *arguments])
    code = main()
    return code, *capsys.readouterr()


def kept_free_of(config, tensors=None, ranks=2, *, least=False):
    """As `plan` says it."""
    tensors = tensors or header(config, torch.bfloat16)
    kept = room.kept_free(config, model_and_plans(tensors, spec_with("auto"))[1].values(), ranks)
    return (kept.least if least else kept.usual) + room.CONTEXT


def test_the_page_of_memory_names_what_plan_keeps():
    page = (Path(__file__).resolve().parents[2] / "docs/memory.md").read_text(encoding="utf-8")
    kept = kept_free_of(FLUX_DEV)
    assert f"{kept / 1e9:.1f} GB are kept for all else" in page
    assert f"FLUX.1 on two GPUs {(kept - room.CONTEXT) / 1e9:.1f} GB" in page


def test_plan_answers_for_cards_that_are_not_there(monkeypatch, capsys, tiny_flux):
    code, said, errors = plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0,1", "--free", "24")
    assert code == 0 and not errors
    assert (
        "ulysses 2 x ring 1" in said and re.search(r"any GPUs: whole, \d+ MB", said) and "times are an H100's" in said
    )
    kept = kept_free_of(TINY_FLUX, least=True)
    whole = placed(TINY_FLUX, dtype=torch.bfloat16).device_bytes
    free = f"{(kept + whole) / 1e9 - 1e-3:.4f}"
    code, said, _ = plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0,1", "--free", free, "--card", "rtx4090")
    assert code == 0 and "RTX 4090: 0 of 4 blocks stay, 4 come from host memory" in said
    assert "GB of host memory are needed" in said and "little room is left: nothing is left for" in said
    assert "NVLink," not in said and said.count("\n  PCIe 4 x8") == 1 and "predicted for RTX 4090" in said
    assert "with linear = fp8" in said and " ms a step (PCIe 4 x16)" in said and "times are an H100's" not in said
    assert "PCIe 5" not in said  # which the card cannot have
    code, said, _ = plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0,1", "--free", f"{free}GB", "--card", "3090")
    assert code == 0 and "linear = fp8" not in said and "NVLink bridge" in said and said.count("\n  PCIe 4 x8") == 2
    assert "reach each other's memory (doctor tells): 0 of 4 blocks stay, 4 shared" in said
    assert "little room is left: set weights = host for" in said
    code, said, _ = plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0", "--free", "24", "--linear", "fp8")
    assert code == 0 and "one GPU: whole" in said and "\n  any " in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--gpus", "0,1", "--free", f"{kept_free_of(TINY_FLUX, least=True) / 1e9 + 1e-3:.4f}"),
            "Free memory of the GPUs",
        ),
        (("--gpus", "nonsense"), "or add --free 25 for cards of 24 GB that need not exist"),
        (("--gpus", "auto", "--free", "24"), "Give --gpus a number for each GPU, as 0,1"),
        (("--gpus", "0,0", "--free", "24"), "Give --gpus a number for each GPU, as 0,1"),
        (("--gpus", "cpu:2", "--card", "H100"), "Name a model file, and GPUs: --card H100"),
        (("--gpus", "cpu:2", "--wire", "int8"), "Name a model file, and GPUs: --wire int8"),
        (("--gpus", "0", "--free", "24", "--linear", "fp8", "--card", "A100"), "Leave out --linear fp8"),
    ],
)
def test_what_plan_refuses(monkeypatch, capsys, tiny_flux, arguments, words):
    code, _, errors = plan_says(monkeypatch, capsys, tiny_flux, *arguments)
    assert code == 2 and words in errors and "Traceback" not in errors


@pytest.mark.parametrize("free", ["nan", "inf", "-3", "0", "much", "24000"])
def test_sizes_that_are_none(monkeypatch, capsys, tiny_flux, free):
    with pytest.raises(SystemExit) as ended:
        plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0,1", f"--free={free}")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"give a number of GB, as 25 for a card of 24: got {free}" in said


def test_cards_that_are_none(monkeypatch, capsys, tiny_flux):
    with pytest.raises(SystemExit):
        plan_says(monkeypatch, capsys, tiny_flux, "--card", "RTX 1")
    assert "choose the card that is most like yours, of H100, H200" in capsys.readouterr().err


def test_room_without_a_file(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", "--gpus", "0,1", "--free", "24"])
    assert main() == 2 and "Name a model file: --free 24" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["fastusp_backend", "plan", "--gpus", "cpu:2", "--linear", "fp8"])
    assert main() == 2 and "Name a model file: --linear fp8" in capsys.readouterr().err


def test_products_in_fp8_are_not_asked_of_gpus_that_are_not_meant(monkeypatch, capsys, tiny_flux):
    """CPU ranks have them, and imagined GPUs are not those that are there."""
    monkeypatch.setattr(plan, "list_gpus", lambda: pytest.fail("NVML was asked"))
    for devices in (("--gpus", "cpu:2"), ("--gpus", "0,1", "--free", "24")):
        code, said, errors = plan_says(monkeypatch, capsys, tiny_flux, *devices, "--linear", "fp8")
        assert code == 0 and not errors and "weights: 0." in said
        assert ("GPUs that need not be there: --gpus 0,1 --free 25" in said) == (devices[-1] == "cpu:2")


@pytest.mark.parametrize(
    ("sizes", "names", "words"),
    [
        ((96, 80), ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "of 80.0 GB of each GPU"),
        ((96, 80), ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 3090"), "predicted for RTX 3090"),
        ((96, 80), ("NVIDIA H100 80GB HBM3", "Tesla T4"), "no times: choose the card"),
        ((96, None), ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "of 96.0 GB of each GPU"),
        ((None, None), ("NVIDIA H100 80GB HBM3", "NVIDIA H200"), "NVML reports no size"),
    ],
)
def test_plan_answers_for_the_gpus_that_are_there(monkeypatch, capsys, tiny_flux, sizes, names, words):
    """As if all memory of the smallest were free; with the times of the slowest, if it is known."""
    totals = {0: 4 * GB, **{number: size and size * GB for number, size in zip((2, 3), sizes, strict=True)}}
    monkeypatch.setattr(plan, "local_devices", lambda _: Devices(ranks=2, gpus=(2, 3)))
    monkeypatch.setattr(inputs, "supports_bfloat16", lambda _: True)
    states = [SimpleNamespace(index=index, total=size) for index, size in totals.items()]
    monkeypatch.setattr(plan, "gpu_states", lambda: states)
    gpus = [
        SimpleNamespace(index=index, name=name, compute_capability=(9, 0) if "H" in name else (8, 0))
        for index, name in zip((2, 3), names, strict=True)
    ]
    monkeypatch.setattr(plan, "list_gpus", lambda: gpus)
    code, said, errors = plan_says(monkeypatch, capsys, tiny_flux)
    assert code == 0 and not errors and words in said and "weights: 0." in said
    code, _, errors = plan_says(monkeypatch, capsys, tiny_flux, "--linear", "fp8")
    assert (code == 2 and "Leave out --linear fp8" in errors) == any("H" not in name for name in names)


def plan_of_flux2(host=None, free=24 * GB, tensors=None):
    """What `fits` says of FLUX.2 on two GPUs."""
    file = plan.File(tensors or header(FLUX2_DEV), FLUX2_DEV, spec_with("auto"))
    return "\n".join(
        plan.fits(file, (Layout(ulysses=2, ring=1),), free, host, linear="exact", wire="exact", card=None, hint=True)
    )


@pytest.mark.parametrize("host", [None, 32 * GB, 64 * GB])
def test_plan_says_how_much_host_memory_it_takes(host):
    said = plan_of_flux2(host)
    assert "50.1 GB of host memory are needed" in said and "52 shared" in said  # with fp8
    assert ("needed, 32.0 GB are available" in said) == (host == 32 * GB) and "64.0" not in said


def test_plan_of_a_packed_file_whose_products_in_fp8_would_take_more():
    """And no word of them where they would help little."""
    small = {name: TensorInfo(info.shape, torch.float8_e4m3fn) for name, info in header(FLUX2_DEV).items()}
    assert "--linear" not in plan_of_flux2(tensors=small)
    packed = {
        name: TensorInfo(info.shape, torch.uint8, packing="Q4_0") if len(info.shape) == 2 else info
        for name, info in small.items()
    }
    kept, need = kept_free_of(FLUX2_DEV, packed), place_file(packed, spec_with("host"), 2, peers=False).device_bytes
    assert "come from host memory" in plan_of_flux2(free=kept + need + GB // 9, tensors=packed)


LITTLE = "  little room is left: set weights = host for images above 1024 x 1024"
FROM_HOST = "%d of %d blocks stay, %d come from host memory: %.1f GB a device"


@pytest.mark.parametrize(
    ("config", "storage", "free", "with_access", "without"),
    [  # the first two were measured, with `capped.py` on two H100
        (FLUX_DEV, None, 16, (0, 57, 12.5, LITTLE), FROM_HOST % (25, 57, 32, 11.7)),
        (FLUX2_DEV, "float8_e4m3fn", 22, None, FROM_HOST % (24, 56, 32, 15.7)),
        (FLUX2_DEV, "float8_e4m3fn", 23, (0, 56, 17.2, LITTLE), FROM_HOST % (26, 56, 30, 16.7)),
        (FLUX2_DEV, "float8_e4m3fn", 24, (2, 54, 17.7, None), FROM_HOST % (27, 56, 29, 17.7)),
    ],
)
def test_room_for_larger_images_is_given_up_before_blocks_come_from_the_host(
    config, storage, free, with_access, without
):
    file = plan.File(
        header(config), config, msgspec.structs.replace(spec_with("auto"), storage=storage, compute="bfloat16")
    )
    layouts = (Layout(ulysses=2, ring=1),)
    said = plan.fits(file, layouts, free * GB, None, linear="exact", wire="exact", card=None, hint=False)
    if with_access is None:
        assert any(line == f"any GPUs: {without}" for line in said) and LITTLE not in said
        return
    stay, shared, size, little = with_access
    first = next(i for i, line in enumerate(said) if f"{stay} of" in line)
    assert said[first].endswith(f"{shared} shared: {size} GB a device") and said.count(LITTLE) == bool(little)
    assert not little or said[first + 2] == LITTLE
    assert any(line.endswith(without) for line in said)


def steps_of_flux(card, free, *, linear="exact", wire="exact", counts=2, link=None):
    """The table of GPUs and links, each cell (cfg 1, above 1), and the sentences below it."""
    file, layouts = plan.File(header(FLUX_DEV), FLUX_DEV, spec_with("auto")), plan_batches(counts, FLUX_DEV.heads)
    said = plan.fits(file, layouts, int(free * GB), None, linear=linear, wire=wire, card=card, hint=False, link=link)
    first = next(i for i, line in enumerate(said) if line.startswith("ms a step, cfg 1 / above 1"))
    rows = [re.split(r"\s\s+", line.strip()) for line in said[first + 1 : said.index("", first)] if line[0] == " "]
    cells = {int(count): dict(zip(rows[0][1:], cells, strict=True)) for count, *cells in rows[1:]}
    return cells, [line for line in said if "predicted to be slower" in line]


def test_plan_says_what_a_step_takes_on_one_to_eight_gpus():
    """Of one that is meant, too."""
    for counts in (1, 2):
        cells, _ = steps_of_flux("H200", 140, counts=counts)
        assert [cells[n]["NVLink, PCIe 5 x16"] for n in (1, 2, 4, 8)] == ["120 / 240", "65 / 120", "35 / 65", "21 / 35"]
        assert cells[2]["PCIe 5 x16"] == "85 / 120"
    assert list(steps_of_flux("H200", 140, counts=3)[0]) == [1, 2, 3, 4, 8]
    (quick, _), (slow, _) = (steps_of_flux("H200", 140, linear=linear) for linear in ("fp8", "exact"))
    assert all(int(quick[n][link].split()[0]) < int(slow[n][link].split()[0]) for n in slow for link in slow[n])


def test_plan_takes_a_wire():
    """Half of the bytes over a link make what a link of twice the rate does."""
    (exact, _), (packed, slower) = (steps_of_flux("H200", 140, wire=wire) for wire in ("exact", "int8"))
    assert packed[2]["PCIe 5 x16"] == "71 / 120" and packed[4]["PCIe 5 x16"] == "51 / 72"
    assert [of["PCIe 4 x8"] for of in packed.values()] == [of["PCIe 4 x16"] for of in exact.values()] and not slower
    assert all(packed[count][link] == exact[count][link] for count in packed for link in packed[1] if "NVLink" in link)


def test_plan_takes_a_link_that_was_measured():
    """A column of its own, first."""
    for rate, like in ((50, "PCIe 5 x16"), (25, "PCIe 4 x16"), (360, "NVLink, PCIe 5 x16")):
        cells, _ = steps_of_flux("H200", 140, link=rate)
        name = next(iter(cells[1]))
        assert name == f"measured {rate} GB/s" and all(of[name] == of[like] for of in cells.values())
    cells, _ = steps_of_flux("H200", 140, link=3)
    assert int(cells[2]["measured 3 GB/s"].split()[0]) > int(cells[2]["PCIe 4 x8"].split()[0])


@pytest.mark.parametrize("rate", ["fast", "0", "-3", "nan", "inf"])
def test_a_link_is_a_number_of_gigabytes(monkeypatch, capsys, tiny_flux, rate):
    with pytest.raises(SystemExit) as ended:
        plan_says(monkeypatch, capsys, tiny_flux, "--gpus", "0,1", f"--link={rate}")
    assert ended.value.code == 2 and f"give the link's GB/s, as 24: got {rate}" in capsys.readouterr().err


def test_plan_says_of_what_text_times_are():
    for config in (FLUX_DEV, CHROMA):
        file, layouts = plan.File(header(config), config, spec_with("auto")), plan_batches(2, config.heads)
        said = plan.fits(file, layouts, 140 * GB, None, linear="exact", wire="exact", card="H200", hint=False)
        assert f"{config.text} tokens of text, wire = exact. Of one\nand" in said[-1]


def test_plan_says_where_more_gpus_are_slower():
    _, slower = steps_of_flux("H100", 80)
    assert "4 GPUs are predicted to be slower than 2 on PCIe 4 x8, cfg above 1" in slower
    assert "4 GPUs are predicted to be slower than 1 on PCIe 4 x8, cfg 1" in slower
    assert not any("NVLink" in line or "PCIe 5" in line for line in slower)
    cells, slower = steps_of_flux("RTX 5090", 34)
    assert list(cells[1]) == ["PCIe 5 x16", "PCIe 4 x16", "PCIe 4 x8"] and not slower
    assert list(steps_of_flux("RTX 4090", 34)[0][1]) == ["PCIe 4 x16", "PCIe 4 x8"]
    _, slower = steps_of_flux("RTX 5090", 34, counts=5)  # a ring sends more
    assert slower == [
        "5 GPUs are predicted to be slower than 4 on PCIe 5 x16 and PCIe 4 x16 and PCIe 4 x8, cfg above 1",
        "5 GPUs are predicted to be slower than 4 on PCIe 4 x16 and PCIe 4 x8, cfg 1",
    ]


def test_plan_says_on_how_many_gpus_there_is_no_room():
    """The weights of modulations are spread over the GPUs."""
    file = plan.File(header(FLUX_DEV), FLUX_DEV, spec_with("auto"))
    free = next(free for free in range(5 * GB, 20 * GB, GB // 8) if not refuses(file, 2, free))
    assert refuses(file, 1, free)
    cells, _ = steps_of_flux("H100", free / GB)
    assert set(cells[1].values()) == {"no room"} and "no room" not in cells[2].values()


def refuses(file, ranks, free):
    try:
        file.settle(ranks, "exact", free, peers=False)
    except RequestError:
        return True
    return False
