"""`plan`: which layout FastUSP would choose, which are legal, what a file's weights take, what travels where they do
not fit, and how long a step takes then."""

import argparse
import re

from .. import host_memory
from ..config import Layout, LinearChoice, WireChoice
from ..devices import Devices, gpu_states, list_gpus, local_devices
from ..errors import DeviceError, RequestError
from ..models.placement import Placement
from ..models.prediction import CARDS, SIZE, Link, Prediction, in_milliseconds, measured_link, pcie_of, slowest_card
from ..planner import legal_layouts, plan_batches
from .arguments import add_degrees, add_gpus
from .file import File
from .inputs import describe
from .scaling import scaling
from .several import add_machines, check, layouts_across, several
from .table import Column, fitted

WITH, WITHOUT = "that reach each other's memory (doctor tells)", "that do not"
CLAIM = """Of one
and two H100 and H200 they are within about 5 % of what was measured where weights stay, else within a fifth. Four H200
were measured with NVLink (FLUX.1, Qwen-Image) and without peer access (FLUX.1), of eight one rank's share with NVLink;
eight without peer access are a guess, and other cards were not measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model file, for its head count and weights; without: FLUX.1's 24")
    add_gpus(parser)
    add_degrees(parser)
    parser.add_argument(
        "--free",
        type=_gigabytes,
        metavar="GB",
        help="as if each GPU had so much free memory, in 10^9 bytes: 17 for a card of 16 GB, 25 for 24, 34 for 32; "
        "needs a model file; the GPUs of --gpus 0,1 need not exist then",
    )
    parser.add_argument(
        "--card",
        type=_card,
        metavar="NAME",
        help=f"whose times to predict, of: {', '.join(CARDS)} (default: the GPUs that are there; with --free an H100)",
    )
    parser.add_argument(
        "--link",
        type=_rate,
        metavar="GB/S",
        help="what the link between the GPUs was measured to carry, as doctor and the panel say it: times over it, too",
    )
    add_machines(parser)
    parser.add_argument("--linear", choices=("exact", "fp8"), default="exact", help="as USP Optimization Settings'")
    parser.add_argument("--wire", choices=("exact", "int8", "fp8"), default="exact", help="likewise")


def _gigabytes(text: str) -> float:
    try:
        value = float(text.upper().removesuffix("GB"))
    except ValueError:
        value = 0.0
    if not 0 < value < 2000:  # more are MB
        raise argparse.ArgumentTypeError(f"give a number of GB, as 25 for a card of 24: got {text}")
    return value


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10_000:
        raise argparse.ArgumentTypeError(f"give the link's GB/s, as 24: got {text}")
    return value


def _card(text: str) -> str:
    for name in CARDS:
        if text.lower().replace(" ", "") in (name.lower().replace(" ", ""), name.lower().removeprefix("rtx ")):
            return name
    raise argparse.ArgumentTypeError(f"choose the card that is most like yours, of {', '.join(CARDS)}: got {text!r}")


def run(arguments: argparse.Namespace) -> int:
    check(arguments)
    imagined = arguments.free is not None
    if imagined and not arguments.model:
        raise RequestError(f"Name a model file: --free {arguments.free:g} says what becomes of its weights")
    devices = _imagine(arguments.gpus) if imagined else _here(arguments.gpus)
    if arguments.card and not (arguments.model and devices.gpus):
        raise RequestError(f"Name a model file, and GPUs: --card {arguments.card} predicts its steps on them")
    card = arguments.card or ("H100" if imagined else None)
    if arguments.link and not (arguments.model and devices.gpus):
        raise RequestError(f"Name a model file, and GPUs: --link {arguments.link:g} predicts steps over it")
    if arguments.wire != "exact" and not (arguments.model and devices.gpus):
        raise RequestError(f"Name a model file, and GPUs: --wire {arguments.wire} predicts steps with it")
    if arguments.linear == "fp8" and not arguments.model:
        raise RequestError("Name a model file: --linear fp8 halves the weights of its blocks")
    if arguments.linear == "fp8" and not _has_fp8(devices, card):
        raise RequestError("Leave out --linear fp8: only GPUs from Ada on (RTX 40, L40, H100) have products in fp8")
    file = File(*describe(arguments.model, devices, bfloat16=True if imagined else None)) if arguments.model else None
    heads = file.config.heads if file else 24
    # Of several machines the wish is that of all their ranks.
    wish = {"ulysses": arguments.ulysses, "ring": arguments.ring} if arguments.nnodes == 1 else {}
    layouts = plan_batches(devices.ranks, heads, **wish)
    print(f"{devices}, {heads} heads: {layouts[-1]}")
    print("legal: " + ", ".join(str(x) for x in legal_layouts(devices.ranks, heads)))
    if arguments.nnodes > 1:
        print("\n".join(layouts_across(arguments, devices.ranks, heads)))
    if file is None:
        return 0
    whole = file.whole(devices.ranks if devices.gpus else 1, arguments.linear).device_bytes / 1e9
    if not devices.gpus:
        print(f"weights: {whole:.2f} GB, in pages of the file that the ranks share")
        print("GPUs that need not be there: --gpus 0,1 --free 25 says what cards of 24 GB hold, and how fast they are")
        return 0
    print(f"weights: {whole:.2f} GB on each GPU, as in the file, if they stay whole")
    hint = arguments.linear == "exact" and _has_fp8(devices, card)
    if imagined:
        free, host = int(arguments.free * 1e9), None
        if not arguments.card:
            print('times are an H100\'s: --card names another, as --card "RTX 4090"')
    else:
        free, card, host = _least_memory(devices), card or _slowest(devices), host_memory.available()
        if free is None:
            print("NVML reports no size of these GPUs' memory: --free 25 says what fits in cards of 24 GB")
            return 0
        if card is None:
            print(f"no times: choose the card that is most like yours with --card, of {', '.join(CARDS)}")
    print(
        "\n".join(
            fits(
                file,
                layouts,
                free,
                host,
                linear=arguments.linear,
                wire=arguments.wire,
                card=card,
                hint=hint,
                link=arguments.link,
            )
        )
    )
    if arguments.nnodes > 1 and card is not None:
        print("\n".join(["", *several(file, arguments, devices.ranks, free, card)]))
    return 0


def _here(text: str) -> Devices:
    """Raises DeviceError."""
    try:
        return local_devices(text)
    except DeviceError as error:
        raise DeviceError(f"{error}; or add --free 25 for cards of 24 GB that need not exist") from error


def _imagine(text: str) -> Devices:
    """GPUs that need not exist, as `0,1`. Raises RequestError."""
    gpus = tuple(map(int, text.split(","))) if re.fullmatch(r"\d+(,\d+)*", text) else ()
    if not gpus or len({*gpus}) < len(gpus):
        raise RequestError(f"Give --gpus a number for each GPU, as 0,1, where --free says what they have: got {text}")
    return Devices(ranks=len(gpus), gpus=gpus)


def _least_memory(devices: Devices) -> int | None:
    """Bytes of the smallest GPU, whoever uses them now; None where NVML tells none."""
    totals = [state.total for state in gpu_states() if state.index in devices.gpus]
    return min((total for total in totals if total is not None), default=None)


def _slowest(devices: Devices) -> str | None:
    """The card that the GPUs are, as `slowest_card`."""
    return slowest_card(gpu.name for gpu in list_gpus() if gpu.index in devices.gpus)


def _has_fp8(devices: Devices, card: str | None) -> bool:
    """Whether the card, if one is meant, or else the devices have products in fp8, as CPU ranks do."""
    if card is not None:
        return CARDS[card].fp8
    return not devices.gpus or all(gpu.compute_capability >= (8, 9) for gpu in list_gpus() if gpu.index in devices.gpus)


def fits(
    file: File,
    layouts: tuple[Layout, ...],
    free: int,
    host: int | None,
    *,
    linear: LinearChoice,
    wire: WireChoice,
    card: str | None,
    hint: bool,
    link: float | None = None,
) -> list[str]:
    """Says what `weights = auto` does where a worker has so many bytes of each GPU, with peer access and without.

    layouts: as `plan_batches` gives them.
    host: bytes of host memory that are available; None for any number.
    linear, wire: as USP Optimization Settings'.
    card: of `CARDS`, whose times to predict; None for none.
    hint: whether to say what `linear = fp8` would change.
    link: GB/s that were measured between the GPUs.

    Raises RequestError where the weights fit neither way.
    """
    ranks = layouts[-1].ranks
    made = Prediction(file.header, file.config, layouts, CARDS[card], linear, wire) if card is not None else None
    fp8 = Prediction(file.header, file.config, layouts, CARDS[card], "fp8", wire) if card is not None and hint else None
    placed: dict[bool, Placement | RequestError] = {}
    told: list[str] = []
    nvlink = CARDS[card].nvlink if card is not None else None
    pcie = pcie_of(CARDS[card]) if card is not None else ()
    measured = () if card is None or link is None else (measured_link(link, CARDS[card]),)
    apart = ranks == 1 or card is not None and nvlink is None
    ways = (False,) if apart else (True, False)
    for peers in ways:
        try:
            placed[peers], kept = file.settle(ranks, linear, free, peers=peers)
        except RequestError as error:
            placed[peers] = error
    if all(isinstance(found, RequestError) for found in placed.values()):
        raise placed[False]
    alike = not apart and str(placed[True]) == str(placed[False])
    for peers in ways[:1] if alike else ways:
        found = placed[peers]
        name = "any GPUs" if alike else f"GPUs {WITH if peers else WITHOUT}"
        if apart:
            name = "one GPU" if ranks == 1 else card
        told.append(f"{name}: {found}")
        if isinstance(found, RequestError):
            continue
        told += _journeys(found, host)
        if found.device_bytes > free - kept:
            larger = "set weights = host for" if found.source == "shared" else "nothing is left for"
            told.append(f"  little room is left: {larger} images above 1024 x 1024")
        links = measured + ((nvlink,) if nvlink and peers else ()) + pcie
        if made is not None:
            told += _times(made, found, links, ranks)
        if hint:
            told += _in_fp8(file, ranks, peers, free, found, fp8, links)
        told.append("")
    if made is not None and not apart and _better_apart(made, placed[True], placed[False], pcie):
        told += ["over PCIe the second way is faster: set NCCL_P2P_DISABLE=1 where ComfyUI starts", ""]
    if made is not None:
        told += [*scaling(file, layouts, free, CARDS[card], linear, wire, measured), ""]
        what = f"{SIZE[0]} x {SIZE[1]}, {file.config.text} tokens of text, wire = {wire}"
        told.append(f"times: predicted for {card}, {what}. {CLAIM}")
    return [f"of {free / 1e9:.1f} GB of each GPU {kept / 1e9:.1f} GB are kept for all else", "", *told]


def _journeys(found: Placement, host: int | None) -> list[str]:
    """What travels in a step."""
    if not found.slabs:
        return []
    told = [f"  {found.streamed_bytes / 1e9:.1f} GB come to each GPU in every step"]
    if found.host_bytes:
        told.append(f"  {found.host_bytes / 1e9:.1f} GB of host memory are needed")
        if host is not None and host < found.host_bytes:
            told[-1] += f", {host / 1e9:.1f} GB are available"
    return told


def _in_fp8(
    file: File, ranks: int, peers: bool, free: int, exact: Placement, made: Prediction | None, links: tuple[Link, ...]
) -> list[str]:
    """What `linear = fp8` would make of a placement, unless it needs more room. made: which predicts its times."""
    try:
        found, _ = file.settle(ranks, "fp8", free, peers=peers)
    except RequestError:  # packed weights may take less
        return []
    if found.streamed_bytes > exact.streamed_bytes:
        return []
    ms = f", {in_milliseconds(made.seconds(found, links[0]))} ms a step ({links[0]})" if made is not None else ""
    return [f"  with linear = fp8 (the picture changes a little): {found}{ms}"]


def _better_apart(
    made: Prediction, together: Placement | RequestError, apart: Placement | RequestError, pcie: tuple[Link, ...]
) -> bool:
    """Whether GPUs that reach each other over PCIe had better not: what comes from other GPUs takes no less of a link
    than what comes from the host."""
    if not isinstance(together, Placement) or not isinstance(apart, Placement):
        return False
    return any(made.seconds(apart, link) < 0.95 * made.seconds(together, link) for link in pcie)


def _times(prediction: Prediction, found: Placement, links: tuple[Link, ...], ranks: int) -> list[str]:
    """A row per link; one where nothing crosses any."""
    rows = [(link, *(in_milliseconds(prediction.seconds(found, link, prompts=n)) for n in (1, 2))) for link in links]
    if ranks == 1 and not found.slabs:
        rows = [("any", *rows[0][1:])]
    columns = Column("link"), Column("ms a step", format="s"), Column("cfg above 1", format="s")
    return ["  " + line for line in fitted(columns, [(str(link), *ms) for link, *ms in rows]).splitlines()]
