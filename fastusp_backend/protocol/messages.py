"""The messages of the control channel, as msgspec structs told apart by a tag.

Tensors never sit inside a message: a frame carries them beside it under names (see channel.py). Shapes use
B batch, C latent channels, h w latent height and width, T text tokens, E text width.
"""

from typing import Literal

import msgspec

from ..config import CacheRule, Layout, ModelSpec, Settings, WeightPatch

VERSION = 15
"""Raised whenever a message or the framing changes: client and workers of different versions refuse each other."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message):
    """Client's first message."""

    version: int


class Ready(Message):
    """Rank 0's answer: the pool is ready.

    devices: one name per rank.
    pids: the processes, in rank order.
    backend: the process group's; `Held.transport` says what a layout uses beside it.
    """

    version: int
    devices: list[str]
    pids: list[int]
    torch: str
    backend: str


class Request(Message, kw_only=True):
    """What every piece of work names.

    id: chosen by the client and carried by all replies, so that stale ones are dropped.
    patches: the number of the patch set that must be in the weights, 0 for none; see Patch.
    """

    id: int
    model: ModelSpec
    layout: Layout
    settings: Settings
    patches: int = 0


class Sample(Request):
    """Run a whole sampling loop in the workers; answered by a Step per step, then Done.

    sampler: a name of `sampling.SAMPLERS`.
    options: the sampler's numbers, such as eta.
    timestep_scale: the model's timestep per sigma.
    cfg: the guidance scale; 1 evaluates the positive conditioning alone.
    reference_methods: under positive and negative, how their references are placed, where not in the model's own way.
    cache: which evaluations are skipped; None evaluates all.

    Tensors, of which all but x, sigmas and positive.context may be absent:

    x: (B, C, h, w), already noised.
    sigmas: (n + 1,) float32.
    noise: (k, B, C, h, w), the k draws of the sampler.
    positive.context, .y, .guidance, .concat, .reference.0, .1 and so on: as in `prompt.Prompt`; likewise negative.
    mask, latent_image, inpaint_noise: as in `prompt.Inpainting`, for a masked request.
    """

    sampler: str
    options: dict[str, float]
    timestep_scale: float
    cfg: float
    reference_methods: dict[str, str] = {}
    cache: CacheRule | None = None


class Evaluate(Request):
    """One evaluation of the model; answered by Done with tensor `output` (B, C, h, w).

    keep: name of a sent tensor -> the number under which the workers cache it.
    reuse: name of a tensor that is not sent -> the number under which they have it.
    forget: numbers that they drop before that.
    reference_method: how references are placed, None for the model's own way.
    control: what a ControlNet adds to the image stream: under `input` and `output`, for each block the N of a tensor
        control.N (B or 1, n, hidden), or None.
    skipped: the numbers of blocks that are left out, in rising order.

    Tensors: x (B, C, h, w), timestep (B,), control.N, and a prompt's as in `prompt.Prompt`.
    """

    keep: dict[str, int] = {}
    reuse: dict[str, int] = {}
    forget: list[int] = []
    reference_method: str | None = None
    control: dict[Literal["input", "output"], list[int | None]] = {}
    skipped: list[int] = []


class Patch(Message):
    """Bring patch set `number` into the weights of `model`; answered by Done. Tensors: those that the patches name.

    base: the set that is in the weights: weights that are not named stay as they are. None where it may be any set:
        weights that are not named are restored.
    weights: weight's name in the file -> its patches, in order; none restores it.
    """

    id: int
    model: ModelSpec
    number: int
    base: int | None
    weights: dict[str, tuple[WeightPatch, ...]]


class Cancel(Message):
    """Stop request `id` at its next evaluation; answered by Failed of kind `cancelled`. Unknown ids are ignored."""

    id: int


class Release(Message):
    """Drop the resident model, and what Unmap names; the processes stay."""

    id: int


class Park(Message):
    """Move the resident model to host memory, about 1/P on each rank; the next request for it brings it back."""

    id: int


class Unmap(Message):
    """Let go of the memory that evaluations' tensors lay in; the next ones come in other memory. Release does so,
    too."""

    id: int


class Shutdown(Message):
    """End all ranks."""


class Phase(Message):
    """What request `id` is doing before its first step, for people to read."""

    id: int
    text: str


class Held(Message):
    """What the ranks hold from now on; sent when it changes, ahead of the end of request `id`.

    model: None where they hold none.
    state: `resident` on the devices, `parked` in host memory, or `none`.
    nbytes: the size of its weights, on the rank that has most.
    transport: how the ranks of the last layout exchange tokens, empty before the first.
    weights: which blocks stay on the devices and which travel, for people; empty where there are none.
    unpacked: whether they take more room than the file's, see `ModelSpec.unpack`.
    """

    id: int
    model: ModelSpec | None
    state: Literal["resident", "parked", "none"]
    nbytes: int
    transport: str
    weights: str
    unpacked: bool = False


class Step(Message):
    """Step `index` of `total` was evaluated, `seconds` after the previous one. Tensors: x and denoised (B, C, h, w)."""

    id: int
    index: int
    total: int
    sigma: float
    seconds: float


class Done(Message):
    """Request `id` has ended well. Tensors: `output`, where the request has one.

    evaluations: of a sampling loop with a cache, how many times the model was asked for.
    skipped: how many of these were answered from the cache.
    """

    id: int
    evaluations: int = 0
    skipped: int = 0


class Failed(Message):
    """Request `id` has ended without a result; id is None when the frame itself was refused.

    kind: `cancelled` by the client, `refused` (bad request or file; the pool is fine), `protocol`, `out_of_memory`,
    `unpatched` (the weights hold another patch set than the request names), `unkept` (a tensor that it reuses is not
    kept: another client's Release dropped it).
    """

    id: int | None
    kind: Literal["cancelled", "refused", "protocol", "out_of_memory", "unpatched", "unkept"]
    rank: int
    text: str


class Welcome(Message):
    """A server's answer to Hello: what its workers are, whether they run or not.

    ranks, device: how many, and whether they are `cpu` or `cuda` ones.
    per_machine: how many of them share a machine.
    bfloat16: whether all devices compute it.
    side_door: where a client on the server's own machine may come in; empty for nowhere. See `side_door`.
    """

    version: int
    ranks: int
    device: Literal["cpu", "cuda"]
    per_machine: int
    bfloat16: bool
    side_door: str = ""


class Attach(Message):
    """To a server that has said Welcome: this client has requests. Answered by Ready when the workers are, which the
    server starts where none run.

    beside: whether it has connected at the side door, and Found follows.
    """

    beside: bool = False


class Found(Message):
    """What a client has read in the memory that it was shown at the side door; empty where it could read none, and
    goes on over TLS. After what was there to be read all else is said at the side door."""

    content: bytes


class Shown(Message):
    """What a server tells an attached client each second, also as a sign that it is there.

    memory: what each rank has shown of its memory, as `pulse.Memory`; None before it has.
    lines: what was written to the workers' log since the last one.
    """

    memory: list[tuple[int, int, int, int] | None]
    lines: list[str]


class Ended(Message):
    """A server's last message: why the workers do not answer this client any more."""

    text: str


ToWorker = Hello | Sample | Evaluate | Patch | Cancel | Release | Park | Unmap | Shutdown
ToClient = Ready | Phase | Held | Step | Done | Failed
ToServer = Hello | Attach | Found | Sample | Evaluate | Patch | Cancel | Release | Park | Unmap
ToAttached = Welcome | ToClient | Shown | Ended
