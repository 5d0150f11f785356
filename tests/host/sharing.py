"""Run by the host's own Python: a remote model in ComfyUI's memory management, as if its worker had ComfyUI's GPU.

Arguments: the host's folder, this repository, a FLUX file. ComfyUI runs on the CPU here and asks nobody to leave it, so
the pressure is made by hand: `free_memory` with nothing free.
"""

import asyncio
import functools
import gc
import importlib.util
import os
import sys
import threading
import types
from dataclasses import replace

HOST, REPOSITORY, FILE = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path[0] = HOST  # in place of this folder, whose comfy.py is another

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management as management  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
import utils.extra_config  # noqa: E402, F401 - before a dependency brings a `utils` of its own
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.patcher_extension import WrappersMP  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "fastusp_pack", f"{REPOSITORY}/__init__.py", submodule_search_locations=[REPOSITORY]
)
pack = sys.modules["fastusp_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from fastusp_pack.fastusp_backend.config import Layout, ModelSpec, Settings  # noqa: E402
from fastusp_pack.fastusp_backend.devices import Devices  # noqa: E402
from fastusp_pack.fastusp_backend.errors import DeviceError, PoolError  # noqa: E402
from fastusp_pack.fastusp_backend.models.files import read_model  # noqa: E402
from fastusp_pack.fastusp_backend.pool import Progress, Session  # noqa: E402
from fastusp_pack.fastusp_backend.prompt import Prompt  # noqa: E402
from fastusp_pack.nodes import loader, memory, pools  # noqa: E402
from fastusp_pack.nodes.loader import USPLoader  # noqa: E402
from fastusp_pack.nodes.remote_families import RemoteQwenImage  # noqa: E402
from fastusp_pack.nodes.remote_model import remote_model  # noqa: E402

CPU = torch.device("cpu")
header = read_model(FILE).header
model_spec = ModelSpec.of_file(FILE, storage=None, compute="float32")
size = sum(info.dtype.itemsize * torch.Size(info.shape).numel() for info in header.values())
context, pooled = header["txt_in.weight"].shape[1], header["vector_in.in_layer.weight"].shape[1]


def session_on(ranks: int, residency: str = "keep") -> Session:
    layout = Layout(ulysses=1, ring=ranks)
    return Session(pools.pool_for(Devices(ranks=ranks)), model_spec, (layout,), Settings(residency=residency))


def evaluate(patcher) -> None:
    """As a sampler does: ComfyUI loads the patcher, then the model is called."""
    management.load_models_gpu([patcher])
    prompt = Prompt(torch.zeros(1, 4, context), torch.zeros(1, pooled), torch.ones(1))
    patcher.session.evaluate(torch.zeros(1, 16, 4, 4), torch.ones(1), prompt, Progress())


def dying() -> None:
    raise PoolError("the workers died")


def listed() -> int:
    return len(management.current_loaded_models)


def sizes(patcher) -> tuple[int, int, int]:
    """(model_size, loaded_size, what loading it takes of its device)."""
    wanted = management.LoadedModel(patcher).model_memory_required(patcher.load_device)
    return patcher.model_size(), patcher.loaded_size(), wanted


base = remote_model(session_on(1), header)
pool = base.session.pool
assert sizes(base) == (0, 0, 0), "on other devices it has no size"
evaluate(base)
assert pool.held.state == "resident" and sizes(base) == (0, 0, 0)
assert base.model.memory_required([2, 16, 64, 64], cond_shapes={}) == 0
management.free_memory(1e30, CPU)
assert pool.held.state == "resident", "pressure where the workers hold nothing is not theirs"

memory.weights.follow_unload_all()
evaluate(base)
management.unload_all_models()
assert pool.held.state == "none"

memory.shares_gpu = lambda session, device: True
assert sizes(base) == (size, 0, size)
assert base.model.memory_required([2, 16, 64, 64], cond_shapes={}) > 1e6
evaluate(base)
loaded = pool.held.nbytes
assert loaded >= size and sizes(base) == (loaded, loaded, 0)

management.free_memory(0, CPU)
assert pool.held.state == "resident", "nobody needed the room"
management.get_free_memory = lambda *args, torch_free_too=False, **kwargs: (0, 0) if torch_free_too else 0
management.free_memory(1000, CPU)
assert pool.held.state == "none" and sizes(base) == (size, 0, size)

evaluate(base)
pool._running = True
management.free_memory(1000, CPU)
assert pool.held.state == "resident" and listed() == 0, "it stays, but ComfyUI takes it to be gone"
pool._running = False
base.clone().cleanup()
assert listed() == 1 and pool.held.state == "resident", "the run has ended"
management.free_memory(1000, CPU)
assert pool.held.state == "none"

clone = base.clone()
evaluate(clone)
assert pool.held.state == "resident"
del clone, base
gc.collect()
assert listed() == 1, "the weights are there, so ComfyUI must know whom to ask"
management.free_memory(10 * size, CPU)
assert pool.held.state == "none"

parking = remote_model(replace(session_on(1, "park")), header)
evaluate(parking)
management.free_memory(1000, CPU)
assert pool.held.state == "parked" and sizes(parking) == (size, 0, size)
evaluate(parking)
assert pool.held.state == "resident"
parking.cleanup()
assert pool.held.state == "parked", "a run has ended"
management.unload_all_models()
assert pool.held.state == "none"

# Workers that die over it fail nobody: neither the run that has ended, nor who wants the room.
evaluate(parking)
pool.park = pool.release = dying
parking.cleanup()
management.free_memory(1000, CPU)
management.unload_all_models()
del pool.park, pool.release

# Two pools that share a GPU: the second takes the place of the first.
evaluate(parking)
other = remote_model(session_on(2), header)
modulations = sum(info.size for name, info in header.items() if "mod" in name)
assert size - modulations < sizes(other)[0] < size - 0.3 * modulations, "each of two ranks holds some of them"
for patcher in (parking, other):
    object.__setattr__(patcher.session.pool, "devices", replace(patcher.session.pool.devices, gpus=(0,)))
memory.weights.make_room(other.session, CPU, other)
assert pool.held.state == "parked"

# Wrappers around Qwen-Image's transformer see its arguments where this host's own transformer has them.
seen = []
wrappers = {WrappersMP.DIFFUSION_MODEL: {"test": [lambda _executor, *args, **kwargs: seen.append((args, kwargs))]}}
call = {"context": 3, "control": 4, "ref_latents": 5, "ref_latents_method": 6}
for kind in (QwenImageTransformer2DModel, RemoteQwenImage):
    stub = types.SimpleNamespace(_forward=None, _evaluate=None, _note_arrival=lambda _options: None)
    stub._through_wrappers = functools.partial(RemoteQwenImage._through_wrappers, stub)
    stub._ORDER = RemoteQwenImage._ORDER
    kind.forward(stub, 1, 2, transformer_options={"wrappers": wrappers}, **call)
assert seen[0] == seen[1], seen
type.__setattr__(RemoteQwenImage, "_evaluate_named", lambda _self, **given: given)
given = RemoteQwenImage._evaluate(RemoteQwenImage.__new__(RemoteQwenImage), *seen[0][0], **seen[0][1])
assert {name: given[name] for name in call} == call and given["x"] == 1 and given["attention_mask"] is None
# GPUs that torch sees and NVML does not name are no reason for a CPU rank.
sys.modules["fastusp_pack.fastusp_backend.devices"].list_gpus = lambda: ()
torch.cuda.device_count = lambda: 2
try:
    asyncio.run(USPLoader.validate_inputs(gpus="auto"))
    raise AssertionError("auto took a CPU rank")
except DeviceError as error:
    assert "torch sees 2 GPUs, but NVML" in str(error)
# The event loop of ComfyUI's server, which validates, reads no files and waits for no driver.
threads = []


def noted(known, *args):
    threads.append(threading.current_thread())
    return known(*args)


loader.devices_of = functools.partial(noted, loader.devices_of)
loader.read_named = functools.partial(noted, loader.read_named)
folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(FILE))
choice = {"unet_name": os.path.basename(FILE), "ulysses": 0, "ring": 0}
assert asyncio.run(USPLoader.validate_inputs(gpus="cpu:2", **choice)) is True
assert len(threads) == 2 and threading.main_thread() not in threads
# Each prompt asks: a file is read again when it was written to.
assert asyncio.run(USPLoader.validate_inputs(gpus="cpu:2", **choice)) is True
assert len(threads) == 3
os.utime(FILE, ns=(1, 1))
assert asyncio.run(USPLoader.validate_inputs(gpus="cpu:2", **choice)) is True
assert len(threads) == 5
print("done")
