"""Weight patches on a GPU: captured graphs see them, nothing is compiled again, and they leave no trace."""

import pytest
import torch
import torch.nn.functional as F
from formats import write
from safetensors.torch import load_file, save_file
from support import SMALL, inputs, randn, relative_difference

from fastusp_backend.config import Layout, ModelSpec, Settings, WeightPatch
from fastusp_backend.engine import Engine
from fastusp_backend.models.synthetic import write_checkpoint
from fastusp_backend.prompt import Prompt
from fastusp_backend.weights.adapters import apply

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KEY = "double_blocks.0.img_attn.qkv.weight"
ONE = Layout(ulysses=1, ring=1)
FAST, EAGER = Settings(), Settings(compile=False, cuda_graphs=False, overlap=False)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_captured_graphs_see_patches(tmp_path, storage):
    path = tmp_path / "flux.safetensors"
    write_checkpoint(str(path), SMALL, dtype=torch.bfloat16)
    engine = Engine(torch.device("cuda", 0))
    engine.describe(ModelSpec.of_file(str(path), storage=storage, compute="bfloat16"))
    engine.make_room()
    engine.load()
    given = inputs(SMALL, text=24, size=(16, 12), seed=3)
    x, *tensors = (t.cuda() for t in (given.x, given.context, given.y, given.guidance))
    prompt = Prompt(*tensors)

    def evaluate(settings=FAST) -> torch.Tensor:
        (velocity,) = engine.denoiser(ONE, settings)(x, given.timestep, [prompt], lambda: None)
        return velocity.float()

    for _ in range(3):
        plain = evaluate()
    evaluation = next(iter(engine.denoiser(ONE, FAST)._evaluations.values()))
    graph = evaluation._whole
    assert graph is not None
    weights = {name: (p.data_ptr(), p.clone()) for name, p in engine._resident.model.named_parameters()}
    up, down = randn(1536, 4, seed=1) * 0.5, randn(4, 512, seed=2)
    lora = {"kind": "lora", "tensors": {"up": "u", "down": "d"}}
    for number, strength in ((1, 1.0), (2, -0.5)):
        patches = {KEY: (WeightPatch(strength=strength, **lora),)}
        engine.patch(patches, {"u": up, "d": down}, base=number - 1, number=number)
        want = load_file(path)[KEY].cuda().float() + strength * (up.cuda() @ down.cuda())
        parameter = dict(engine._resident.model.named_parameters())["double_blocks.0.img.attn.qkv.weight"]
        torch.testing.assert_close(parameter.float(), want, rtol=2**-8, atol=1e-5)
        got = evaluate()
        assert relative_difference(got, plain) > 0.01
    assert evaluation._whole is graph
    engine.patch({KEY: ()}, {}, base=2, number=0)
    assert torch.equal(evaluate(), plain)
    for name, parameter in engine._resident.model.named_parameters():
        address, value = weights[name]
        assert parameter.data_ptr() == address and torch.equal(parameter, value), name
    engine.patch({KEY: (WeightPatch(strength=-0.5, **lora),)}, {"u": up, "d": down}, base=0, number=3)
    assert relative_difference(evaluate(EAGER), got) < 0.02


def test_packed_weights_are_captured_again_with_their_factors(tmp_path):
    plain_file, path = tmp_path / "flux.safetensors", tmp_path / "flux.gguf"
    write_checkpoint(str(plain_file), SMALL, dtype=torch.bfloat16)
    value = write("gguf_Q8_0", plain_file, path)[KEY].cuda()
    engine = Engine(torch.device("cuda", 0))
    engine.describe(ModelSpec.of_file(str(path), storage="bfloat16", compute="bfloat16", keep_quantised=True))
    engine.make_room()
    engine.load()
    given, nbytes = inputs(SMALL, text=24, size=(16, 12), seed=3), engine.nbytes
    x, *tensors = (t.cuda() for t in (given.x, given.context, given.y, given.guidance))
    prompt = Prompt(*tensors)

    def evaluate(settings=FAST) -> torch.Tensor:
        """The last of three: eager, captured, replayed."""
        for _ in range(3):
            (velocity,) = engine.denoiser(ONE, settings)(x, given.timestep, [prompt], lambda: None)
        return velocity.float()

    plain = evaluate()
    layer = engine._resident.model.double_blocks[0].img.attn.qkv
    packed = layer.weight.clone()
    up, down = randn(1536, 4, seed=1) * 0.5, randn(4, 512, seed=2)
    for number, strength in ((1, 1.0), (2, -0.5)):
        patch = WeightPatch(kind="lora", tensors={"up": "u", "down": "d"}, strength=strength)
        engine.patch({KEY: (patch,)}, {"u": up, "d": down}, base=number - 1, number=number)
        want = value + strength * (up.cuda() @ down.cuda())
        torch.testing.assert_close(layer.stored.values(torch.bfloat16).float(), want, rtol=2**-8, atol=5e-2)
        got = evaluate()
        (evaluation,) = engine.denoiser(ONE, FAST)._evaluations.values()
        assert evaluation.captured and relative_difference(got, plain) > 0.01
        assert engine.nbytes == nbytes + 2 * 4 * (1536 + 512)
    assert relative_difference(evaluate(EAGER), got) < 0.02
    assert torch.equal(evaluate(), got)  # with graphs to drop
    engine.patch({KEY: ()}, {}, base=2, number=0)
    assert torch.equal(layer.weight, packed) and engine.nbytes == nbytes
    assert torch.equal(evaluate(), plain)


def test_a_widened_input_is_captured_again(tmp_path):
    """Against a file with that input; without a trace."""
    key, path, wide = "img_in.weight", tmp_path / "flux.safetensors", tmp_path / "wide.safetensors"
    write_checkpoint(str(path), SMALL, dtype=torch.bfloat16)
    up, down, given = randn(512, 4, seed=1) * 0.5, randn(4, 128, seed=2), inputs(SMALL, text=24, size=(16, 12), seed=3)
    state = load_file(path)
    save_file(state | {key: (F.pad(state[key].float(), (0, 64)) + up @ down).bfloat16()}, wide)
    x, *tensors = (t.cuda() for t in (given.x, given.context, given.y, given.guidance))
    image = randn(*x.shape, seed=4).cuda()

    def loaded(file) -> Engine:
        engine = Engine(torch.device("cuda", 0))
        engine.describe(ModelSpec.of_file(str(file), storage="bfloat16", compute="bfloat16"))
        engine.make_room()
        engine.load()
        return engine

    def evaluate(engine: Engine, *concat: torch.Tensor) -> torch.Tensor:
        """The last of three: eager, captured, replayed."""
        prompt = Prompt(*tensors, *concat)
        for _ in range(3):
            (velocity,) = engine.denoiser(ONE, FAST)(x, given.timestep, [prompt], lambda: None)
        (evaluation,) = engine.denoiser(ONE, FAST)._evaluations.values()
        assert evaluation.captured
        return velocity.float()

    want, engine = evaluate(loaded(wide), image), loaded(path)
    plain, nbytes = evaluate(engine), engine.nbytes
    patch = WeightPatch(kind="lora", tensors={"up": "u", "down": "d"}, strength=1.0, reshape=(512, 128))
    engine.patch({key: (patch,)}, {"u": up, "d": down}, base=0, number=1)
    assert engine.nbytes == nbytes + 512 * 64 * 2
    assert relative_difference(evaluate(engine, image), want) < 0.02
    engine.patch({key: ()}, {}, base=1, number=0)
    assert torch.equal(evaluate(engine), plain) and engine.nbytes == nbytes


def test_rotations_are_those_of_the_cpu():
    for kind, shape in (("oft", (8, 64, 64)), ("boft", (3, 64, 8, 8))):
        patch = WeightPatch(kind=kind, tensors={"blocks": "b"}, strength=0.7, alpha=2.0)
        weight, tensors = randn(512, 32, seed=1), {"b": randn(*shape, seed=2)}
        want = apply(weight.clone(), patch, tensors)
        torch.testing.assert_close(apply(weight.cuda(), patch, tensors).cpu(), want, rtol=1e-4, atol=1e-4)
