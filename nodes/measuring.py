"""Measure here: times USP Loader's file on 1, 2, ... all of its devices, as a prompt of ComfyUI's queue.

So it waits for prompts that run and they for it, Stop ends it, and its progress is the queue's. The page queues it
under the id of the USP Loader whose values it has (web/measure.js); the rows come to the page as they are measured.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing

import msgspec
import torch

from ..fastusp_backend.cli import bench, verify
from ..fastusp_backend.cli.inputs import difference, random_inputs
from ..fastusp_backend.config import Settings
from ..fastusp_backend.devices import Devices, ServerDevices
from ..fastusp_backend.errors import FastUSPError
from ..fastusp_backend.pool import Pool, Progress, Session
from .comfyui import ProgressBar, PromptServer, dev_only, get_executing_context, io, model_management
from .files import model_names
from .host import interruptible
from .loader import STORAGE, read_named, spec_on
from .pools import all_pools
from .servers import own_devices
from .settings import SettingsType
from .status import PUSH_SECONDS, node_run, show, workflow_id

log = logging.getLogger(__name__)

TEXT = 512
"""Tokens of the prompt, of random values."""


class USPMeasure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FastUSPMeasure",
            display_name="USP Measure",
            category="FastUSP",
            **dev_only(),
            description="What Measure here of USP Loader queues: times a file on 1, 2, ... all of some devices, and "
            "what 8 bits would gain.",
            inputs=[
                io.Combo.Input("unet_name", options=model_names(), tooltip="As USP Loader's."),
                io.Combo.Input("weight_dtype", options=list(STORAGE), default="default", tooltip="As USP Loader's."),
                io.String.Input("gpus", default="auto", tooltip="As USP Loader's: the devices, all and some of them."),
                io.Int.Input("width", default=1024, min=64, max=4096, step=16, tooltip="Of the image, in pixels."),
                io.Int.Input("height", default=1024, min=64, max=4096, step=16, tooltip="Of the image, in pixels."),
                io.Int.Input("steps", default=8, min=1, max=100, tooltip="Steps that are timed for each row."),
                io.Boolean.Input(
                    "every_layout",
                    default=False,
                    tooltip="Whether all legal layouts are timed, or the one that FastUSP takes by itself.",
                ),
                io.Boolean.Input(
                    "exactness",
                    default=False,
                    tooltip="Whether to measure also by how much 8 bits change a step and the latents.",
                ),
                SettingsType.Input(
                    "settings", optional=True, tooltip="As USP Loader's; its options of 8 bits are measured."
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    async def validate_inputs(cls, unet_name=None, gpus=None) -> bool:
        """As USP Loader's."""

        def check() -> bool:
            if gpus is not None:
                own_devices(gpus)
            if unet_name is not None:
                read_named(unet_name)
            return True

        return await asyncio.to_thread(check)

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        """It is measured whenever it is queued."""
        return float("nan")

    @classmethod
    def execute(
        cls, unet_name, weight_dtype, gpus, width, height, steps, every_layout, exactness, settings=None
    ) -> io.NodeOutput:
        with node_run("making room to measure"), interruptible(), _devices_to_itself():
            file, devices = read_named(unet_name), own_devices(gpus)
            told = Told(gpus, devices, workflow_id(cls.hidden.extra_pnginfo))
            plan = bench.Bench(
                spec=spec_on(devices, file, weight_dtype),
                given=random_inputs(file.config, (width, height), TEXT),
                steps=steps,
                every_layout=every_layout,
                base=msgspec.structs.replace(settings or Settings(), cache="off"),  # a step that is skipped has no time
                crowded=any(pool.crowded for pool in all_pools() if pool.devices == devices),
                watch=told.watch,
            )
            evaluations = plan.count(devices, file.config.heads) * (bench.WARM_UP[devices.type] + steps)
            lossy = len(bench.options(devices)) if exactness else -1
            told.expect(evaluations + (1 + lossy) * (len(verify.TIMESTEPS) + verify.STEPS))
            with closing(plan.rows(devices, file.config.heads)) as rows:  # which hold a pool
                for row in rows:
                    told.add(row)
            if exactness:
                told.compare(plan, file.config.timestep_scale)
            told.show_result()
            return io.NodeOutput(ui={"fastusp": [told.table()]})


@contextlib.contextmanager
def _devices_to_itself() -> Iterator[None]:
    """The workers of pools here leave the devices, and those that ran are started again; so do ComfyUI's models leave.
    Workers first: ComfyUI would have them make room, which costs time and tells the pool that it is crowded."""
    here = (pool for pool in all_pools() if not isinstance(pool.devices, ServerDevices))
    running = [pool for pool in here if pool.status()["state"] != "off"]
    with contextlib.ExitStack() as again:
        for pool in running:
            again.callback(_start_again, pool)
            pool.stop("their devices are measured")
        model_management.unload_all_models()
        model_management.soft_empty_cache()
        yield


def _start_again(pool: Pool) -> None:
    """What was measured counts, also where the workers do not start: the next prompt tries that again."""
    try:
        pool.start()
    except FastUSPError as error:
        log.warning("The workers on %s were not started again: %s", pool.devices, error)


class Told:
    """What was measured, and what the page is told of it meanwhile. workflow: its id, or None."""

    def __init__(self, gpus: str, devices: Devices, workflow: str | None):
        self._gpus, self._devices = gpus, devices
        self._rows: list[bench.Row] = []
        self._differences: dict[bench.Row, dict] = {}
        self._done, self._doing, self._sent = 0, "", 0.0
        context = get_executing_context()
        self._of = {"node": context.node_id, "prompt": context.prompt_id, "workflow": workflow}

    def expect(self, evaluations: int) -> None:
        self._total, self._bar = evaluations, ProgressBar(evaluations)

    @contextlib.contextmanager
    def watch(self, name: str, total: int) -> Iterator[Progress]:
        """A `Watch`; ComfyUI's Stop interrupts."""
        end, steps = self._done + total, iter(range(1, total + 1))
        show(f"measuring {name}")

        def tell(text: str, *, now: bool = True) -> None:
            self._doing = f"{name}: {text}"
            self._send(now=now)

        def stepped(*_) -> None:
            self._done += 1
            self._bar.update_absolute(self._done)
            tell(f"{next(steps)} of {total}", now=False)

        try:
            yield Progress(step=stepped, phase=tell, interrupted=model_management.processing_interrupted)
        finally:
            self._done = end
            self._bar.update_absolute(end)

    def add(self, row: bench.Row) -> None:
        self._rows.append(row)
        self._send()

    def compare(self, plan: bench.Bench, timestep_scale: float) -> None:
        """Measures what the rows in 8 bits change, against exact ones of the same layout."""
        lossy = [row for row in self._rows if row.seconds and not row.exact]
        if not lossy:
            return
        given = *plan.given, timestep_scale
        exact = plan.base.without_loss()
        with closing(plan.pool(self._devices)) as pool:

            def results(settings: Settings, name: str) -> list[torch.Tensor] | str:
                session = Session(pool, plan.spec, (lossy[0].layout,), settings)
                return verify.attempt(session, given, verify.STEPS, name, self.watch)

            wanted = results(exact, "comparing: exact values")
            for row in lossy:
                found = results(row.settings, f"comparing {row.name}")
                self._differences[row] = _changes(found, wanted)
                self._send()

    def table(self) -> dict:
        """rows, as `_facts`; best, quickest: the numbers of the rows that are recommended, without loss and in 8 bits
        where that is faster; said: the same in words."""
        ran = [row for row in self._rows if row.seconds]
        best, quickest = bench.best([row for row in ran if row.exact]), bench.best(ran)
        return {
            "rows": [self._facts(row) for row in self._rows],
            "best": self._rows.index(best) if best else None,
            "quickest": self._rows.index(quickest) if quickest and not quickest.exact else None,
            "said": bench.recommend(self._rows, self._devices),
        }

    def show_result(self) -> None:
        best = bench.best([row for row in self._rows if row.seconds and row.exact])
        show(
            f"measured; {best.layout} takes {1000 * best.seconds:.1f} ms a step"
            if best
            else "nothing could be measured"
        )

    def _facts(self, row: bench.Row) -> dict:
        """values: what to set for it in the nodes; changes: see `_changes`."""
        some, alone, layout = self._devices.first(row.layout.ranks), self._rows[0], row.layout
        gpus = self._gpus if some == self._devices else ",".join(map(str, some.gpus)) or str(some)
        degrees = (0, 0) if row.automatic else (layout.ulysses, layout.ring)
        return {
            "ranks": layout.ranks,
            "layout": str(layout),
            "wire": row.settings.wire,
            "linear": row.settings.linear,
            "attention": row.settings.attention,
            "ms": row.seconds and round(1000 * row.seconds, 1),
            "gain": alone.seconds / row.seconds if alone.seconds and row.seconds else None,
            "nbytes": row.nbytes,
            "problem": row.problem.partition("\n")[0],
            "changes": self._differences.get(row),
            "values": {"gpus": gpus, **dict(zip(("ulysses", "ring"), degrees, strict=True))},
        }

    def _send(self, *, now: bool = True) -> None:
        """Tells the page that has queued it. now: also where it was told a moment ago."""
        moment, server = time.monotonic(), PromptServer.instance
        if server.client_id is None or not now and moment - self._sent < PUSH_SECONDS:
            return
        self._sent = moment
        event = {**self._of, "doing": self._doing, "done": self._done, "total": self._total}
        server.send_sync("fastusp.measuring", event | {"table": self.table()}, server.client_id)


def _changes(found: Sequence[torch.Tensor] | str, wanted: Sequence[torch.Tensor] | str) -> dict:
    """By how much, relatively, 8 bits change an evaluation at most, and the latents at the end; or why it is not
    known."""
    for result in (found, wanted):
        if isinstance(result, str):
            return {"problem": result.partition("\n")[0]}
    *evaluations, latents = [difference(a, b) for a, b in zip(found, wanted, strict=True)]
    return {"evaluation": max(evaluations), "latents": latents}
