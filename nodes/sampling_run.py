"""A sampling run as a whole, with what ComfyUI does before, between and after the workers' requests."""

import os

from ..fastusp_backend.pool import Session
from .sampler_names import menu_name
from .status import node_run, push_pools


def sampling_run(session: Session, executor, noise, latent_image, sampler, *args, **kwargs):
    """An OUTER_SAMPLE wrapper: around the loading of models, the sampler, and the cleaning up. The session's pool
    counts as busy meanwhile, and the node's status line begins and ends with it; the page is told of its end."""
    guider = executor.class_obj
    model = guider.model_patcher.model
    factor = getattr(model.latent_format, "spacial_downscale_ratio", 8)  # older ComfyUIs do not say it
    about = {
        "model": os.path.basename(session.model.path),
        "width": noise.shape[-1] * factor,
        "height": noise.shape[-2] * factor,
        "images": noise.shape[0],
        "sampler": menu_name(sampler),
        "storage": session.model.storage,
        "eight_bits": session.settings.eight_bits,
        "cfg": getattr(guider, "cfg", 1.0),  # not every guider has one
    }
    try:
        with session.pool.sampling(**about), node_run():
            push_pools()
            return executor(noise, latent_image, sampler, *args, **kwargs)
    finally:
        push_pools()
