"""Batch groups of several GPUs whose prompts differ in length: their memory grows alike, and one GPU's result comes."""

import pytest
import torch
from support import SMALL, inputs, relative_difference
from test_pool import EAGER, ONE, spec  # noqa: F401 - spec is a fixture

from fastusp_backend.config import Layout, Settings
from fastusp_backend.devices import Devices
from fastusp_backend.pool import Pool, Session
from fastusp_backend.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices, two for each group"),
    pytest.mark.timeout(300),
]

GROUPS, ALL = Layout(batch=2, ulysses=2, ring=1), Layout(ulysses=4, ring=1)


def guided(pool: Pool, spec, layout: Layout, texts: tuple[int, int], settings: Settings) -> torch.Tensor:  # noqa: F811
    prompts = [inputs(SMALL, text=text, size=(16, 12), seed=text) for text in texts]
    positive, negative = (Prompt(given.context, given.y, given.guidance) for given in prompts)
    return Session(pool, spec, (layout,), settings).sample(
        prompts[0].x, torch.linspace(1, 0, 5), sampler="euler", positive=positive, negative=negative, cfg=2.0
    )


def test_groups_whose_prompts_differ_in_length(spec):  # noqa: F811
    """Each group's exchange grows at another prompt; then all four GPUs are one group."""
    one, four = Pool(Devices(ranks=1, gpus=(0,))), Pool(Devices(ranks=4, gpus=(0, 1, 2, 3)))
    try:
        for layout, texts in ((GROUPS, (35, 6)), (GROUPS, (6, 35)), (GROUPS, (90, 6)), (ALL, (90, 6))):
            got = guided(four, spec, layout, texts, Settings())
            assert relative_difference(got, guided(one, spec, ONE, texts, EAGER)) < 0.05, (layout, texts)
    finally:
        four.close()
        one.close()
