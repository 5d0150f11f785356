"""The small model that is shipped, as the demo runs it."""

import pytest
import torch

from fastusp_backend import shapes
from fastusp_backend.config import Layout, ModelSpec, Settings
from fastusp_backend.pool import Progress
from fastusp_backend.pool.session import Session

pytestmark = pytest.mark.dist


def test_captions_that_it_never_saw_are_met(shared_pool):
    """The first 10 of the 200 by which its card says how well it draws."""
    captions = shapes.examples(10)
    noise = torch.randn(len(captions), 16, 32, 32, generator=torch.Generator().manual_seed(0))
    spec = ModelSpec.of_file(str(shapes.MODEL), storage=None, compute="float32")
    session = Session(shared_pool(2), spec, (Layout(ulysses=2, ring=1),), Settings())
    sigmas, prompt = torch.linspace(1, 0, 21), shapes.prompt(captions)
    pictures = shapes.decode(session.sample(noise, sigmas, sampler="euler", positive=prompt, progress=Progress()))
    wrong = {
        str(caption): said
        for caption, picture in zip(captions, pictures, strict=True)
        if (said := shapes.unmet(caption, picture))
    }
    assert not wrong, wrong
