"""Exceptions that cross room borders. Every message names the input, what was expected and what to do."""


class FastUSPError(Exception):
    """Base of all errors that FastUSP raises for its users.

    ComfyUI's page puts an error's module before its name: of all of them it is the name of the pack, wherever ComfyUI
    has it from.
    """

    __module__ = "FastUSP"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__module__ = FastUSPError.__module__


class CheckpointError(FastUSPError):
    """A model file that cannot be used: unknown family, truncated, corrupt, wrong tensors."""


class LayoutError(FastUSPError, ValueError):
    """A parallel layout that the ranks or the model's heads do not allow."""


class SettingsError(FastUSPError, ValueError):
    """A number in USP Optimization Settings that means nothing."""


class DeviceError(FastUSPError, ValueError):
    """A `gpus` value that names devices which do not exist."""


class KeyFileError(FastUSPError):
    """A server's key file that is missing, open to others, or no key file."""


class RequestError(FastUSPError):
    """A sampling request that the workers refused; the pool stays usable."""


class OutOfRoom(RequestError):
    """A request for which a device lacked memory."""


class PatchesLost(RequestError):
    """The workers' weights do not have the patch set that a request names; it must be sent anew."""


class TensorsLost(RequestError):
    """The workers do not keep a tensor that a request reuses; it must be sent anew."""


class ProtocolError(FastUSPError):
    """A frame that is malformed, too large, of another version or of an unknown kind. message: of a frame whose tensors
    alone could not be taken."""

    message: object = None


class PoolError(FastUSPError):
    """The worker processes could not start, or died; the next request starts new ones."""


class Cancelled(FastUSPError):
    """The request was cancelled by its client; the workers stay warm."""
