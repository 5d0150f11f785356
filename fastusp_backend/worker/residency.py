"""Where the model's weights are: brought for a request, parked, released, and the client told. All ranks hold the same
model at any time, or none; every method is collective."""

import logging
import time
from collections.abc import Callable

import msgspec

from ..engine import Engine
from ..protocol import Held, Message, Patch, Phase
from ..protocol.messages import Request
from .activity import LOADING, PARKING
from .agreement import Agreement, Refused
from .crew import Crew

log = logging.getLogger(__name__)


class Residency:
    """reply: sends the client a message, from rank 0."""

    def __init__(self, agreement: Agreement, crew: Crew, engine: Engine, reply: Callable[[Message], None]):
        self._agreement, self._crew, self._engine, self._reply = agreement, crew, engine, reply
        self._told = Held(id=0, model=None, state="none", nbytes=0, transport="", weights="")

    def bring(self, request: Request | Patch, check: Callable[[], object]) -> None:
        """Has the weights of the request's model on all devices, if check() passes, which describes the model."""
        self._agreement.together(check, LOADING)
        try:
            self._load_or_fetch(request)
        except Refused:
            self._engine.release()
            raise

    def park(self) -> None:
        """Releases weights that no rank, or not every one, has host memory for."""
        try:
            self._agreement.together(self._engine.park, PARKING)
        except Refused as refused:
            log.warning("the weights are released, not parked: rank %d: %s", refused.rank, refused)
            self._engine.release()

    def tell(self, request: int, *, patched: bool = False) -> None:
        """Tells the client what the ranks hold, if that has changed. patched: which may take room."""
        engine, told = self._engine, self._told
        state = "none" if engine.spec is None else "parked" if engine.parked else "resident"
        same = not patched and (engine.spec, state) == (told.model, told.state)  # on all ranks alike
        nbytes = told.nbytes if same else self._crew.maximum(engine.nbytes)
        now = Held(
            id=told.id,
            model=engine.spec,
            state=state,
            nbytes=nbytes,
            transport=engine.transport,
            weights=engine.placement,
            unpacked=engine.unpacked,
        )
        if now != told:
            self._told = msgspec.structs.replace(now, id=request)
            self._reply(self._told)

    def _load_or_fetch(self, request: Request | Patch) -> None:
        engine, started = self._engine, time.perf_counter()
        if not engine.is_resident(request.model):
            self._reply(Phase(id=request.id, text="loading the model"))
            self._agreement.together(engine.make_room, LOADING)
            self._agreement.together(engine.share, LOADING)
            self._agreement.together(engine.load, LOADING)
            if engine.streams or engine.unpacked:
                self._reply(Phase(id=request.id, text=f"loaded: {engine.placement}"))
        elif engine.parked:
            self._reply(Phase(id=request.id, text="bringing the weights back"))
            self._agreement.together(engine.reserve, LOADING)
            self._agreement.together(engine.share, LOADING)
            engine.fetch()
        else:
            return
        log.info("loaded %s in %.2f s", request.model.path, time.perf_counter() - started)
