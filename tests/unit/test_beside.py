"""The text's half of a block is computed beside the image's, and awaited where it is needed."""

import contextlib

import pytest
import torch
from support import SMALL, SMALL_CHROMA, SMALL_FLUX2, SMALL_QWEN, SMALL_SD3, OneRank, inputs

from fastusp_backend.attention import JointAttention
from fastusp_backend.models.beside import Beside
from fastusp_backend.models.layers import Linear
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

OF_TEXT = ".txt.", "txt_mlp", "add_", "context_block"


@pytest.mark.parametrize(
    "config", (SMALL, SMALL_FLUX2, SMALL_CHROMA, SMALL_QWEN, SMALL_SD3), ids=lambda config: type(config).__name__
)
def test_what_is_beside(config, monkeypatch):
    """All of the text's products in blocks, nothing else; exchanges are the main stream's, which has waited for it."""
    state = {"beside": False, "awaited": True}

    @contextlib.contextmanager
    def run(self, *read):
        state.update(beside=True, awaited=False)
        yield
        state["beside"] = False

    def watched(owner, name, check):
        original = getattr(owner, name)

        def call(self, *arguments, **options):
            check(self, **options)
            return original(self, *arguments, **options)

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(Beside, "run", run)
    monkeypatch.setattr(Beside, "join", lambda self: state.update(awaited=True))
    torch.manual_seed(0)
    model = config.build()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.normal_(std=0.02)
    hoisted = set(model.modulations())
    names = {layer: name for name, layer in model.named_modules() if layer not in hoisted and "blocks." in name}
    seen = []

    def of_layer(layer, **_):
        if layer in names:
            seen.append(names[layer])
            assert state["beside"] == any(part in names[layer] for part in OF_TEXT), names[layer]

    def of_exchange(joint, **_):
        assert not state["beside"]

    def of_attention(joint, *, image_only=False, **_):
        assert not state["beside"] and (state["awaited"] or image_only)

    for name in ("forward", "rows"):
        watched(Linear, name, of_layer)
    for name in ("project", "collect", "collect_text", "collect_image"):
        watched(JointAttention, name, of_exchange)
    watched(JointAttention, "attend", of_attention)
    given = inputs(config, text=5, size=(8, 6))
    OneRank(model)(given.x, given.timestep, Prompt(given.context, given.y, given.guidance))
    assert state["awaited"] and not state["beside"]
    assert any(part in name for name in seen for part in OF_TEXT)


def test_without_a_gpu_work_is_done_in_turn():
    beside = Beside(torch.device("cpu"))
    with beside.run(torch.ones(1)):
        made = torch.ones(2) + 1
    beside.join()
    assert made.tolist() == [2, 2]
