"""ComfyUI with the workers of several machines, which are network namespaces of this host: the same latents as stock's,
over the hosts' lives and beside each other."""

import contextlib
import os
import re
import signal
import threading
import time

import machines
import pytest
from comfy import ComfyUI, PromptFailed
from workflows import DEV, IN_WORKERS, STEPPING, Comparison, Graph

pytestmark = pytest.mark.host


def know(comfyui: ComfyUI, **clusters: machines.Cluster) -> None:
    entries = (f'[servers.{x}]\naddress = "{at(c)}"\nkey = "{c.key}"\n' for x, c in clusters.items())
    (comfyui.base / "user/fastusp.toml").write_text("".join(entries))


def at(cluster: machines.Cluster) -> str:
    return cluster.servers[0].address


@pytest.fixture(scope="module")
def clusters(network, host, tmp_path_factory):
    """Named in the host's user folder: `pair`, two machines of one rank each, and `four`, of two each."""
    with contextlib.ExitStack() as made:
        file = host.base / "models/diffusion_models" / DEV
        folder = tmp_path_factory.mktemp("machines")
        both = {
            name: made.enter_context(machines.cluster(folder / name, 2, ranks, file))
            for name, ranks in (("pair", 1), ("four", 2))
        }
        for cluster in both.values():
            cluster.servers[1].says("joined")
        know(host, **both)
        yield both
        (host.base / "user/fastusp.toml").unlink()


@pytest.fixture(scope="module")
def four(clusters):
    return clusters["four"]


def run(host: ComfyUI, *, seed: int, steps: int = 3, on_progress=None):
    """What a prompt brought, and its latents. In fp32, whatever the host was told of its weights. seed: another each
    time, since ComfyUI remembers what it has computed."""
    graph = Graph()
    saved = graph.save(graph.sample(graph.usp("four", weight_dtype="fp32"), steps=steps, seed=seed))
    outcome = host.run(graph, on_progress=on_progress)
    return outcome, outcome.latents.get(saved)


def right(host: ComfyUI, *, seed: int):
    """The latents of a prompt, which are stock's."""
    both = Comparison()
    graph = both.graph
    got, want = (graph.sample(model, steps=3, seed=seed) for model in (graph.usp("four"), graph.stock()))
    both.add(f"seed {seed}", got, want)
    return both.check(host).latents[both.pairs[0][3]]


PAIR = [((2, 1), 1.0, "ulysses 2 x ring 1"), ((1, 2), 1.0, "ulysses 1 x ring 2")]
PAIR += [((0, 0), 2.0, "batch 2 x ulysses 1 x ring 1")]
FOUR = [((0, 0), 1.0, "ulysses 2 x ring 2"), ((1, 4), 1.0, "ulysses 1 x ring 4")]
FOUR += [((0, 0), 2.0, "batch 2 x ulysses 2 x ring 1")]


@pytest.mark.parametrize("name, ranks, layouts", [("pair", 2, PAIR), ("four", 4, FOUR)], ids=["pair", "four"])
def test_the_same_latents_as_stock(host, clusters, name, ranks, layouts):
    """Of each layout and of batch groups, in the workers' loop and stepping."""
    address = at(clusters[name])
    for sampler, where in (("euler", IN_WORKERS), ("uni_pc", STEPPING)):
        for degrees, cfg, layout in layouts:
            both = Comparison()
            graph = both.graph
            models = graph.usp(name, *degrees), graph.stock()
            got, want = (graph.sample(x, sampler_name=sampler, steps=4, cfg=cfg) for x in models)
            both.add(f"{layout} {sampler}", got, want, where)
            assert both.check(host).previews
            status = host.pool(address)
            assert (status["state"], status["model"], status["layout"]) == ("idle", DEV, layout)
    assert status["ranks"] == len(status["names"]) == len(status["pids"]) == len(status["memory"]) == ranks
    log = "\n".join(host.get(f"/fastusp/pools/log?devices={address}&from=0")["lines"])
    assert machines.address(1) in log and "error" not in status, log


def test_stop(host, four):
    """The workers stay, and the next prompt is right."""
    right(host, seed=90)
    pids, stopped = host.pool(at(four))["pids"], []

    def stop(value: int, _most: int) -> None:
        if value >= 3 and not stopped:
            host.post("/interrupt", {})
            stopped.append(value)

    outcome, _ = run(host, seed=91, steps=4000, on_progress=stop)
    assert outcome.interrupted and outcome.texts[-1][1] == "FastUSP: interrupted"
    right(host, seed=92)
    assert host.pool(at(four))["pids"] == pids


def test_another_comfyui_and_one_that_ends(host, four, second_host):
    """It waits for its turn, and says so; its end is not the workers', who go on for the first one."""
    know(second_host, four=four)
    want, pids = right(host, seed=93), host.pool(at(four))["pids"]
    assert run(second_host, seed=93)[1].equal(want) and second_host.pool(at(four))["pids"] == pids
    want, second = right(host, seed=94), []
    beside = threading.Thread(target=lambda: second.append(run(second_host, seed=94)))

    def begin(value: int, _most: int) -> None:
        if value >= 1 and not beside.ident:
            beside.start()

    _, long = run(host, seed=95, steps=160, on_progress=begin)
    beside.join()
    ((outcome, latents),) = second
    assert latents.equal(want) and any("waiting for another client" in text for _, text in outcome.texts), outcome.texts
    assert run(second_host, seed=95, steps=160)[1].equal(long)
    second_host.stop()
    right(host, seed=96)
    assert host.pool(at(four))["pids"] == pids


def test_comfyui_is_started_again(host, four, second_hosts, request):
    """It attaches to the same workers, which have its model."""
    for comfyui in second_hosts:
        comfyui.stop()
    second_host = request.getfixturevalue("second_host")
    want, pids = right(host, seed=97), host.pool(at(four))["pids"]
    know(second_host, four=four)
    assert run(second_host, seed=97)[1].equal(want) and second_host.pool(at(four))["pids"] == pids


def test_a_rank_of_another_machine_dies(host, four):
    """The error has the rank, its machine and its log's end, and the next prompt is right."""
    right(host, seed=98)
    pids, killed = host.pool(at(four))["pids"], []

    def kill(value: int, _most: int) -> None:
        if value >= 3 and not killed:
            killed.append(time.monotonic())
            os.kill(pids[3], signal.SIGKILL)

    with pytest.raises(PromptFailed) as raised:
        run(host, seed=99, steps=4000, on_progress=kill)
    assert time.monotonic() - killed[0] < 10
    told = raised.value.text
    assert f"rank 3 (process {pids[3]}) was ended by SIGKILL" in told and f"({machines.address(1)})" in told, told
    assert re.search(r"Last log lines:\n  .+", told), told
    assert host.pool(at(four))["error"] in told
    right(host, seed=100)
    assert not set(host.pool(at(four))["pids"]) & set(pids)
