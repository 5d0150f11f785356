"""A sampling run as a whole, with what ComfyUI does before, between and after the workers' requests."""

from ..fastusp_backend.pool import Pool
from .status import node_run, push_pools


def sampling_run(pool: Pool, executor, *args, **kwargs):
    """An OUTER_SAMPLE wrapper: around the loading of models, the sampler, and the cleaning up. `pool` counts as busy
    meanwhile, and the node's status line begins and ends with it; the page is told of its end."""
    try:
        with pool.sampling(), node_run():
            return executor(*args, **kwargs)
    finally:
        push_pools()
