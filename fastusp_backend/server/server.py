"""The server's end of all connections: who they are, and a thread that takes what clients ask for to the workers."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError

from msgspec.structs import replace

from ..devices import Devices, supports_bfloat16
from ..door import limited
from ..errors import FastUSPError, ProtocolError
from ..keyfile import Key
from ..meeting import Board
from ..pool import Pool
from ..pool.contact import Contact
from ..protocol import VERSION, Attach, Channel, Ended, Failed, Hello, Message, TlsStream, Welcome
from ..protocol.machines import Ask, Join, Meet, ToFirst
from ..side_door import SideDoor
from .client import Client
from .joined import JoinedWorkers
from .machines import Machines
from .numbers import WorkerNumbers
from .relay import Relay
from .strangers import STRANGERS, Strangers
from .turns import Turns

log = logging.getLogger(__name__)

AUTHENTICATION_SECONDS = 5.0
"""How long a connection may take to prove that it has the key. Ours give up after as long (`door.CONNECT_SECONDS`)."""
GREETING_SECONDS = 10.0
"""How long one that has it may take to say what it wants."""
CLIENTS = 32
"""That may be attached at a time."""
QUIET_SECONDS = 10.0
"""Between two lines about refused connections: whoever knocks does not fill the log."""
IDLE_SECONDS = 5.0
"""After which memory goes in which large tensors have travelled."""


class Server:
    """Listens as soon as it is made. `serve` does its work, until `stop`."""

    def __init__(self, devices: Devices, key: Key, host: str, port: int, machines: int = 1):
        """machines: how many have such devices, this one among them. Raises FastUSPError where it cannot listen there,
        or the key file is none."""
        self._key, self._context = key, key.server_context()
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, port), family=family, backlog=STRANGERS)
        except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that no host can have
            todo = "Give --listen another address of this machine, or port"
            if machines > 1:
                todo = "Give --rdzv-endpoint (on all machines) another address of this machine, or port"
                todo += ", or if it is not machine 0 its --node-rank"
            raise FastUSPError(f"{todo}: {host}:{port}: {error}") from error
        self.port: int = self._listener.getsockname()[1]
        self._machines: Machines | None = None
        if machines > 1:
            where = {"here": host, "port": self.port, "key": str(key.path.resolve())}
            self._machines = Machines(devices, machines, **where, complete=self._begin, ended=self.stop)
        self._pool = Pool(devices, self._joined if machines > 1 else None)
        self._pool.changed = self._look
        self._welcome = Welcome(
            version=VERSION,
            ranks=devices.ranks * machines,
            device=devices.type,
            per_machine=devices.ranks,
            bfloat16=supports_bfloat16(devices),
        )
        self._turns = Turns()
        self._relay = Relay(self._pool, self._everybody)
        self._clients: list[Client] = []
        self._numbers: tuple[Contact | None, WorkerNumbers] = None, WorkerNumbers()
        self._lock = threading.Lock()
        self._strangers = Strangers()
        self._refused, self._refusal = 0, 0.0
        self._stopped = threading.Event()

    def serve(self) -> None:
        """Starts the workers, as soon as all machines are there, and serves until `stop`."""
        for work in (self._accept, self._work):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()
        if self._machines is None:
            self._begin()
        self._stopped.wait()
        self._listener.close()
        if self._machines is not None:
            self._machines.leave()
        for client in self._everybody():
            client.end("the server was ended; start it again there")
        self._pool.close()

    def stop(self) -> None:
        """Has `serve` return. May be called by a signal's handler."""
        self._stopped.set()

    def _begin(self) -> None:
        """Starts the workers before a client asks for them, who would hear why it fails."""
        try:
            self._pool.start()
        except FastUSPError as error:
            log.warning("%s", error)

    def _joined(self, devices: Devices, changed: Callable[[], None]) -> JoinedWorkers:
        return JoinedWorkers(devices, changed, self._machines)

    def _everybody(self) -> list[Client]:
        with self._lock:
            return list(self._clients)

    def _work(self) -> None:
        while not self._stopped.is_set():
            if not self._do_next():
                with contextlib.suppress(FastUSPError):  # they have died: whoever needs them hears of it
                    self._pool.unmap()

    def _do_next(self) -> bool:
        """Whether there was a request, in time. What it held goes at its end."""
        taken = self._turns.take(IDLE_SECONDS)
        if taken is None:
            return False
        client, job = taken
        try:
            if not client.gone:
                self._relay.run(client, job)
        except Exception as error:  # one client's request must not end all others'
            log.exception("a request of %s failed", client.name)
            client.end(f"the server failed in it: {type(error).__name__}: {error}")
        finally:
            self._turns.done(job.message)
        self._look()
        return True

    def _look(self) -> None:
        """Lets the clients go whose workers have ended."""
        for client in self._everybody():
            if client.workers is not None and not client.workers.alive and not client.gone:
                client.end(str(client.workers.failure("stopped")))

    def _numbers_of(self, workers: Contact) -> WorkerNumbers:
        with self._lock:
            if self._numbers[0] is not workers:
                self._numbers = workers, WorkerNumbers()
            return self._numbers[1]

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._stopped.is_set():
                    self._refuse("a connection", error)
                    time.sleep(0.1)  # too many open files, say: it comes again
                continue
            name = f"{address[0]}:{address[1]}"
            self._strangers.admit(sock, address[0])
            try:
                threading.Thread(target=self._meet, args=(sock, name), name=name, daemon=True).start()
            except RuntimeError as error:  # the system gives no more threads, for now
                self._strangers.leave(sock)
                self._refuse(name, error)
                sock.close()

    def _refuse(self, name: str, why: object) -> None:
        with self._lock:
            self._refused += 1
            if time.monotonic() - self._refusal < QUIET_SECONDS:
                return
            count, self._refused, self._refusal = self._refused, 0, time.monotonic()
        more = f" ({count - 1} more before)" if count > 1 else ""
        log.warning("refused %s: %s%s", name, why, more)

    def _meet(self, sock: socket.socket, name: str) -> None:
        try:
            try:
                with limited(sock, AUTHENTICATION_SECONDS):
                    channel = self._authenticate(sock)
            finally:
                self._strangers.leave(sock)
        except (AuthenticationError, EOFError, OSError, RuntimeError) as error:  # the last for want of threads
            self._refuse(name, error or type(error).__name__)
            sock.close()
            return
        try:
            with limited(sock, GREETING_SECONDS):
                wish, beside = self._greet(channel)
            if beside is not None:
                channel.close()
                channel = Channel(beside, ToFirst)
            if isinstance(wish, Attach):
                self._attached(name, channel)
            elif isinstance(wish, Join) and self._machines is not None:
                self._machines.serve(wish, name.rpartition(":")[0], channel)
            elif isinstance(wish, Meet) and self._machines is not None:
                _keep(self._machines.board(wish.run), channel)
            elif wish is not None:
                raise ProtocolError(f"Start `serve` there with --nnodes: it serves one machine, and got {wish}")
        except ProtocolError as error:
            self._refuse(name, error)
            with contextlib.suppress(OSError):  # it is gone
                channel.send(Failed(id=None, kind="protocol", rank=0, text=str(error)))
        except (EOFError, OSError, RuntimeError) as error:
            self._refuse(name, error or type(error).__name__)
        finally:
            channel.close()

    def _authenticate(self, sock: socket.socket) -> Channel:
        """A channel to one that has the key."""
        stream = TlsStream(sock, self._context, listens=True)
        stream.handshake()
        channel = Channel(stream, ToFirst)
        channel.authenticate(self._key.secret, listens=True)
        return channel

    def _greet(self, channel: Channel) -> tuple[Message | None, socket.socket | None]:
        """What the other end wants, None where it wanted to know what there is; and where else it has come in."""
        hello, _ = channel.receive()
        if not isinstance(hello, Hello) or hello.version != VERSION:
            raise ProtocolError(f"expected Hello of protocol version {VERSION}, got {hello}")
        with SideDoor() as door:
            channel.send(replace(self._welcome, side_door=door.name))
            try:
                wish, _ = channel.receive()
            except EOFError:
                return None, None
            return wish, door.let_in(channel) if isinstance(wish, Attach) and wish.beside else None

    def _attached(self, name: str, channel: Channel) -> None:
        """Serves a client until it is gone."""
        with self._lock:
            client = None
            if len(self._clients) < CLIENTS:
                client = Client(name, channel, self._pool, self._turns)
                self._clients.append(client)
        if client is None:
            text = f"Close another ComfyUI that uses these workers, and queue the prompt again: {CLIENTS} are attached"
            self._refuse(name, text)
            channel.send(Ended(text=text))
            return
        log.info("%s attaches%s", name, ", and shares memory" if channel.shares_memory else "")
        try:
            if client.attach(self._numbers_of):
                client.serve()
        except FastUSPError as error:
            client.end(str(error))
        finally:
            with self._lock:
                self._clients.remove(client)
            self._turns.leave(client)
            client.close()
            log.info("%s is gone", client.name)


def _keep(board: Board | None, channel: Channel) -> None:
    """Answers a rank's store. Returns when the rank is gone, or the run is over."""
    while board is not None:
        try:
            ask, _ = channel.receive()
            if not isinstance(ask, Ask):
                raise ProtocolError(f"expected Ask, got {type(ask).__name__}")
            channel.send(board.answer(ask))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        except (EOFError, OSError):
            return
