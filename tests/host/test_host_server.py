"""ComfyUI with the workers of a server: the same latents as with its own, and the same words on its page."""

import os
import signal

import pytest
from comfy import PromptFailed
from serving import serving
from workflows import DEV, IN_WORKERS, STEPPING, Comparison, Graph

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(host, tmp_path_factory):
    """Named `box` in the host's user folder."""
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--gpus", "cpu:2", "--models", str(host.base / "models")) as server:
        toml = host.base / "user/fastusp.toml"
        known = {"box": server.address, "gone": "127.0.0.1:1"}
        entries = (f'[servers.{name}]\naddress = "{at}"\nkey = "{server.key}"\n' for name, at in known.items())
        toml.write_text("".join(entries))
        yield server
        toml.unlink()


def test_the_same_latents(host, server):
    both = Comparison()
    graph = both.graph
    for name, where in (("euler", IN_WORKERS), ("uni_pc", STEPPING)):
        inputs = {"sampler_name": name, "steps": 4}
        want = graph.sample(graph.stock(), **inputs)
        for gpus in ("box", server.address):
            both.add(f"{gpus} {name}", graph.sample(graph.usp(gpus), **inputs), want, where)
    outcome = both.check(host)
    assert outcome.previews
    graph = Graph()
    here, there = (graph.save(graph.sample(graph.usp(gpus), steps=3)) for gpus in ("cpu:2", "box"))
    latents = host.run(graph).latents
    assert latents[here].equal(latents[there])
    status = host.pool(server.address)
    assert (status["state"], status["model"], status["ranks"]) == ("idle", DEV, 2) and "error" not in status


def test_what_its_devices_come_to(host, server):
    """Told without a run of servers that fastusp.toml names; nobody else's is asked, though it may be there."""
    told = host.post("/fastusp/plan", {"gpus": "box", "unet_name": DEV})
    assert told["lines"][1].startswith(f"{server.address}: ulysses 2 x ring 1")
    told = host.post("/fastusp/plan", {"gpus": "127.0.0.1:2", "unet_name": DEV})
    assert told == {"gpus": [], "lines": ["127.0.0.1:2 is asked when it runs: it is not in fastusp.toml"]}


def test_what_is_wrong_is_told_at_the_node(host, server):
    def failure(gpus: str) -> str:
        graph = Graph()
        graph.save(graph.sample(graph.usp(gpus), steps=3))
        with pytest.raises(PromptFailed) as raised:
            host.run(graph)
        return raised.value.text

    assert "no server answers at 127.0.0.1:1:" in failure("gone")
    assert "Copy the key file from the server" in failure("127.0.0.1:2")
    told = failure("other")
    assert "a server: 'host:port', or a name from " in told and "fastusp.toml, which has 'box', 'gone': gpus" in told
    graph = Graph()
    graph.save(graph.sample(graph.usp("box"), steps=500))
    killed = []

    def kill(value: int, _most: int) -> None:
        if not killed and value > 1:
            killed.append(host.pool(server.address)["pids"][1])
            os.kill(killed[0], signal.SIGKILL)

    with pytest.raises(PromptFailed) as raised:
        host.run(graph, on_progress=kill)
    assert f"rank 1 (process {killed[0]}) was ended by SIGKILL" in raised.value.text
    graph = Graph()
    saved = graph.save(graph.sample(graph.usp("box"), steps=3))
    assert host.run(graph).latents[saved].isfinite().all()
