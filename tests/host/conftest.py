"""The hosts: COMFYUI_PATHS, else ~/ComfyUI; each is started once and its pools stay warm from test to test.

A host older than 0.4 knows FLUX at hidden size 3072 alone, which is slow on a CPU: it runs the tests marked `any_host`.
"""

import json
from contextlib import closing
from dataclasses import replace

import controlnets
import loras
import pytest
import torch
from browser import Browser, Page
from comfy import ComfyUI
from ending import wait_for_the_end
from hosts import host_paths, knows_small_flux, version
from safetensors.torch import save_file
from workflows import DEV, SCHNELL, SMALL, SMALL_CHROMA, SMALL_FLUX2, SMALL_QWEN, SMALL_Z_IMAGE

from fastusp_backend.models.synthetic import TINY_SD3, write_checkpoint

FULL_SIZE = replace(SMALL, hidden=3072, heads=24, mlp=12288)


def pytest_configure(config):
    config.addinivalue_line("markers", "any_host: cheap enough for hosts that know full-sized FLUX alone")


def pytest_generate_tests(metafunc):
    if "host" not in metafunc.fixturenames:
        return
    paths, reason = host_paths(), "no ComfyUI at COMFYUI_PATHS or ~/ComfyUI"
    if paths and not metafunc.definition.get_closest_marker("any_host"):
        paths, reason = [p for p in paths if knows_small_flux(p)], "needs a ComfyUI of version 0.4 or newer"
    params = [pytest.param(p, id=version(p)) for p in paths]
    params = params or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize("host", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def host(request, tmp_path_factory):
    """A running ComfyUI with a dev and a schnell file of the sizes that it knows."""
    base = tmp_path_factory.mktemp("host")
    comfyui = ComfyUI(request.param, base)
    try:
        models = base / "models/diffusion_models"
        if knows_small_flux(request.param):
            write_checkpoint(str(models / DEV), SMALL)
            write_checkpoint(str(models / SCHNELL), replace(SMALL, guidance=False), seed=1)
        else:
            write_checkpoint(str(models / DEV), FULL_SIZE, dtype=torch.bfloat16)
        comfyui.wait_until_ready()
        yield comfyui
        pids = [pid for pool in comfyui.get("/fastusp/status")["pools"] for pid in pool.get("pids", ())]
    finally:
        comfyui.stop()
    assert not wait_for_the_end(pids, 5), "workers outlive their host"


@pytest.fixture(scope="session")
def browser(host, tmp_path_factory):
    """One for all pages: half of what a page takes is its beginning."""
    with closing(Browser(tmp_path_factory.mktemp("browser"))) as browser:
        yield browser


@pytest.fixture(scope="session")
def tab(host, browser):
    """The host's page. One for all files: to load it takes longer than most tests of it."""
    with closing(Page(browser, f"http://127.0.0.1:{host.port}/")) as page:
        yield page


@pytest.fixture(scope="module")
def page(tab):
    """The host's page with an empty workflow, beside those that other tests have opened."""
    tab.clear()
    return tab


@pytest.fixture(params=[False, True], ids=["canvas", "Nodes 2.0"])
def renderer(request, page):
    """Who draws the nodes of `page`; whether it is Nodes 2.0."""
    page.evaluate("app.canvas.pause_rendering = false")
    page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {json.dumps(request.param)})")
    yield request.param
    page.evaluate("app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")


@pytest.fixture(scope="session")
def second_hosts():
    """Those that `second_host` has started, the one that runs last."""
    started: list[ComfyUI] = []
    yield started
    for comfyui in started:
        comfyui.stop()


@pytest.fixture
def second_host(host, second_hosts, tmp_path_factory):
    """Another ComfyUI with the dev file, which was told to keep all weights in fp8, and has the pack installed as the
    registry gives it; tests may end it."""
    if not second_hosts or second_hosts[-1].path != host.path or second_hosts[-1].process.poll() is not None:
        base = tmp_path_factory.mktemp("second")
        second_hosts.append(ComfyUI(host.path, base, ("--cpu", "--fp8_e4m3fn-unet"), installed=True))
        (base / "models/diffusion_models" / DEV).symlink_to(host.base / "models/diffusion_models" / DEV)
        second_hosts[-1].wait_until_ready()
    return second_hosts[-1]


@pytest.fixture(scope="session")
def flux2(host):
    """A FLUX.2 file, as of dev."""
    path = host.base / "models/diffusion_models/flux2_dev.safetensors"
    write_checkpoint(str(path), SMALL_FLUX2)
    yield path.name
    path.unlink()


@pytest.fixture(scope="session")
def chroma(host):
    """A Chroma file, whose sizes the hosts take from it: see the tests' node pack."""
    path = host.base / "models/diffusion_models/chroma.safetensors"
    write_checkpoint(str(path), SMALL_CHROMA)
    yield path.name
    path.unlink()


@pytest.fixture(scope="session")
def qwen(host):
    """A Qwen-Image file, whose sizes the hosts take from it: see the tests' node pack."""
    path = host.base / "models/diffusion_models/qwen.safetensors"
    write_checkpoint(str(path), SMALL_QWEN)
    yield path.name
    path.unlink()


@pytest.fixture(scope="session")
def qwen_control_net(host, qwen):
    """A ControlNet for `qwen`, whose tensors make most of it."""
    models = host.base / "models"
    name = controlnets.write_qwen(models / "controlnet", models / "diffusion_models" / qwen)
    yield name
    (models / "controlnet" / name).unlink()


@pytest.fixture(scope="session")
def qwen_lora(host):
    return loras.write(host.base / "models/loras", "qwen", loras.qwen_names(SMALL_QWEN.hidden, seed=0))


@pytest.fixture(scope="session")
def fill(host):
    """A file of FLUX.1 Fill's kind, which takes an image and a mask."""
    path = host.base / "models/diffusion_models/fill.safetensors"
    write_checkpoint(str(path), replace(SMALL, concat_channels=80), seed=2)
    yield path.name
    path.unlink()


@pytest.fixture(scope="session")
def sd3(host):
    """A file of Stable Diffusion 3.5 medium's kind, with as many blocks as heads, as ComfyUI takes it to have."""
    path = host.base / "models/diffusion_models/sd3.safetensors"
    write_checkpoint(str(path), TINY_SD3)
    yield path.name
    path.unlink()


@pytest.fixture(scope="session")
def z_image(host):
    """A Z-Image file, whose sizes the host takes from it: see the tests' node pack."""
    path = host.base / "models/diffusion_models/z_image.safetensors"
    write_checkpoint(str(path), SMALL_Z_IMAGE)
    yield path.name
    path.unlink()


@pytest.fixture
def lora(host):
    """The name of a small LoRA in BFL's names."""
    rank, hidden, name = 2, SMALL.hidden, "lora_unet_double_blocks_0_img_attn_qkv"
    folder = host.base / "models/loras"
    folder.mkdir(exist_ok=True)
    down, up = torch.randn(rank, hidden), torch.randn(3 * hidden, rank)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, folder / "tiny.safetensors")
    return "tiny.safetensors"
