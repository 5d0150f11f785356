"""The client side: start worker processes, or attach to a server's, submit work to them, watch them, end them."""

from .attached import ask
from .patches import NO_PATCHES, WeightPatches, name_of
from .pool import Pool
from .progress import Progress
from .session import Session

__all__ = ["NO_PATCHES", "Pool", "Progress", "Session", "WeightPatches", "ask", "name_of"]
