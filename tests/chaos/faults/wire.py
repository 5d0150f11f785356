"""What arrives where the client alone should be heard: on its socket, beside it, at ports."""

import socket
import struct
import threading
import time
from multiprocessing import AuthenticationError

from listening import listeners

from fastusp_backend.protocol import Channel
from fastusp_backend.protocol.messages import ToClient

from ..requests import ENDLESS
from .base import ANY, STANDING, Fault

_HEADER = struct.Struct(">2sBxII")


class Frames(Fault):
    """Malformed frames between the client's own."""

    moments = STANDING
    allowed = frozenset({"refused"})
    names = "refused a message"
    keeps = True

    def draw(self) -> None:
        self.count = self.rng.choice((1, 1, 2, 20))

    def strike(self) -> None:
        self.detail = f"{self.count} frames"
        for _ in range(self.count):
            data = self._frame()
            write(self.world, struct.pack("!i", len(data)) + data)

    def _frame(self) -> bytes:
        rng = self.rng
        garbage = rng.randbytes(rng.choice((0, 3, 8, 40, 2000)))
        carrier, length = rng.randrange(6), rng.choice((len(garbage), rng.randrange(1 << 32)))
        return rng.choice((garbage, _HEADER.pack(b"FU", carrier, length, rng.choice((0, 10))) + garbage))

    def lift(self) -> None:
        """Refusals that the request did not meet are the next one's."""
        time.sleep(0.2)
        while (link := self.world.pool._workers._link) is not None:
            try:
                if link.receive(0.2) is None:
                    return
            except Exception as error:
                if "refused a message" not in str(error):
                    return


class HalfFrame(Fault):
    """A frame without an end on the client's socket, then silence, or the end of the stream."""

    requests = ENDLESS
    allowed = frozenset({"died", "refused"})
    names = r"rank 0|refused a message|the client is gone|no progress"

    def draw(self) -> None:
        self.how = self.rng.choice(("silence", "end", "a length that cannot be"))
        if self.how == "silence":  # what runs goes on
            self.moment = self.moment._replace(kind="idle", amount=0)
            self.limit = 35.0
        elif self.moment.kind == "start":
            self.moment = self.moment._replace(kind="delay")
        self.size = self.rng.choice((1, 3, 4, 5, 100, 70_000))
        self.length = self.rng.choice(((1 << 32) - 1, 1 << 31, (1 << 30) + 1, (1 << 31) - 1))

    def strike(self) -> None:
        self.detail = f"{self.size} bytes, then {self.how}"
        if self.how == "a length that cannot be":
            write(self.world, struct.pack(">I", self.length) + b"FU")
            return
        write(self.world, (struct.pack(">I", 1 << 20) + self.rng.randbytes(self.size))[: self.size])
        if self.how == "end":
            self.world.pool._workers.channel._socket.shutdown(socket.SHUT_WR)


class Strangers(Fault):
    """Processes without the key, or with it, at the control socket: silence, garbage, one byte now and then."""

    moments = ANY
    keeps = True
    limit = 60.0

    def draw(self) -> None:
        self.count = self.rng.choice((1, 3, 9, 20))
        self.keyed = self.moment.kind != "start" and self.rng.random() < 0.5
        self.hows = [self.rng.choice(("silence", "garbage", "drip", "leave")) for _ in range(self.count)]
        self.noise = self.rng.randbytes(5000)
        self._open: list = []
        self._over = threading.Event()

    def strike(self) -> None:
        self.detail = f"{self.count} {'with' if self.keyed else 'without'} the key"
        workers = self.world.pool._workers
        self._address, self._key = workers.run_dir.address, workers.run_dir.key
        for how in self.hows:
            self.run_beside(threading.Thread(target=self._come, args=[how]))

    def _come(self, how: str) -> None:
        while not self._over.wait(0.05):
            try:
                self._meet(how)
                return
            except FileNotFoundError:
                continue  # nobody listens yet
            except (OSError, EOFError, AuthenticationError):
                return  # refused

    def _meet(self, how: str) -> None:
        if self.keyed:
            channel = Channel.connect(self._address, ToClient)
            self._open.append(channel)
            channel.authenticate(self._key, listens=False)
            sock = channel._socket.dup()
        else:
            sock = socket.socket(socket.AF_UNIX)
        with sock:
            if not self.keyed:
                sock.connect(self._address)
            if how == "garbage":
                sock.sendall(self.noise)
            while how != "leave" and not self._over.wait(0.3):
                if how == "drip":
                    sock.sendall(self.noise[:1])

    def lift(self) -> None:
        self._over.set()
        super().lift()
        for channel in self._open:
            channel.close()


class Ports(Fault):
    """Strangers at what the pool's processes open beside: garbage, and connections that stay."""

    moments = STANDING
    keeps = True

    def draw(self) -> None:
        self.noise = self.rng.choice((b"", bytes(8), self.rng.randbytes(4096), b"GET / HTTP/1.1\r\n\r\n"))
        self._open: list[socket.socket] = []

    def strike(self) -> None:
        processes = [*self.world.ranks().values(), self.world.torchrun]
        ports = {x.port for process in processes if process for x in listeners(process) if x.port}
        self.detail = f"{len(ports)} ports"
        for port in ports:
            for _ in range(3):
                sock = socket.socket()
                sock.settimeout(0.2)
                self._open.append(sock)
                try:
                    sock.connect(("127.0.0.1", port))
                    sock.sendall(self.noise)
                except OSError:
                    pass  # it takes nobody

    def lift(self) -> None:
        for sock in self._open:
            sock.close()


def write(world, data: bytes) -> None:
    """Writes to the client's socket, between two frames."""
    workers = world.pool._workers
    if workers is None or workers.channel is None:
        return
    try:
        with workers.channel._send_lock:
            workers.channel._socket.sendall(data)
    except OSError:
        pass  # the workers are gone
