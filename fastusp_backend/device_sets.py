"""The devices of a pool: this machine's, or a server's."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The devices of one pool, one rank each; it is the pool's key."""

    ranks: int
    gpus: tuple[int, ...] = ()
    """nvidia-smi's indices; empty for CPU ranks."""

    @property
    def type(self) -> str:
        return "cuda" if self.gpus else "cpu"

    @property
    def together(self) -> int:
        """How many of the ranks share a machine."""
        return self.ranks

    def first(self, ranks: int) -> "Devices":
        """Returns the first `ranks` of them."""
        return Devices(ranks=ranks, gpus=self.gpus[:ranks])

    def __str__(self) -> str:
        return "gpu " + ",".join(map(str, self.gpus)) if self.gpus else f"cpu:{self.ranks}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerDevices(Devices):
    """Those of the server at `address` (host:port), as it told them: none of this machine's, so `gpus` is empty.

    key: the path of the key file. kind: `cpu` or `cuda`. bfloat16: whether all of them compute it.
    """

    address: str
    key: str
    kind: str
    per_machine: int
    bfloat16: bool

    @property
    def type(self) -> str:
        return self.kind

    @property
    def together(self) -> int:
        return self.per_machine

    def first(self, ranks: int) -> "ServerDevices":
        """Returns all of them: a server's workers run together. `ranks` is how many they are."""
        assert ranks == self.ranks
        return self

    def __str__(self) -> str:
        return self.address
