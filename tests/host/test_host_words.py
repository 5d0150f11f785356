"""What a run says on its node, to whom, and how it ends there; what the panel says of its pool meanwhile."""

import os
import signal
import threading
import time

import pytest
import websocket
from comfy import PromptFailed
from workflows import IN_WORKERS, STEPPING, Graph

pytestmark = pytest.mark.host


def sampling(graph: Graph, model=None, **inputs) -> str:
    """Adds a short run; returns its node."""
    sample = graph.sample(graph.usp() if model is None else model, **({"steps": 2} | inputs))
    graph.save(sample)
    return sample[0]


def failed(host, graph: Graph, node: str) -> tuple[str, str]:
    """The error's type as the page shows it, and the node's last line."""
    with pytest.raises(PromptFailed) as error:
        host.run(graph)
    return error.value.kind, error.value.outcome.texts_of(node)[-1]


def said(ws) -> list[bytes]:
    """The texts that have arrived at a client that waits for no more."""
    ws.settimeout(1)
    frames = []
    try:
        while True:
            frames.append(ws.recv())
    except websocket.WebSocketTimeoutException:
        return [f for f in frames if isinstance(f, bytes) and int.from_bytes(f[:4], "big") == 3]


@pytest.mark.any_host
def test_a_run_speaks_to_its_own_client_alone(host):
    other = websocket.create_connection(f"ws://127.0.0.1:{host.port}/ws?clientId=other", timeout=60)
    try:
        graph = Graph()
        node = sampling(graph, seed=301)
        assert any(IN_WORKERS in text for text in host.run(graph).texts_of(node))
        assert said(other) == []
        graph = Graph()
        sampling(graph, seed=302)
        number = host.post("/prompt", {"prompt": graph})["prompt_id"]  # by nobody who listens
        deadline = time.monotonic() + 60
        while number not in host.get(f"/history/{number}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert said(other) == []
    finally:
        other.close()


@pytest.mark.any_host
def test_what_runs_can_be_asked_for(host):
    """By the page of the client whose prompt it is, while it runs: long enough to ask, however busy this machine is."""
    graph, answers = Graph(), []
    model = graph.node("TestAfterEveryEvaluation", model=graph.usp(), seconds=0.5, error="")
    node = sampling(graph, model, steps=4, seed=303)

    def ask(*_):
        answers.append([host.get(f"/fastusp/texts?client={client}") for client in (host.client, "other", "")])

    outcome = host.run(graph, on_progress=ask)
    mine, *others = next(answer for answer in answers if answer[0]["texts"])  # the last ones may come too late
    assert mine["workflow"] is None and mine["texts"][node] in outcome.texts_of(node)
    nothing = {"workflow": None, "texts": {}}
    assert others == [nothing, nothing] and host.get("/fastusp/texts") == nothing
    assert host.get(f"/fastusp/texts?client={host.client}") == nothing


def test_a_refused_run(host):
    """Also in the panel, until a run succeeds."""
    graph = Graph()
    positive = graph.node("TestSeededConditioning", seed=1, tokens=7, width=2048, guidance=3.5)
    kind, line = failed(host, graph, sampling(graph, positive=positive))
    assert kind == "FastUSP.RequestError"
    assert line.startswith("FastUSP: failed: choose the text encoders of FLUX.1, those of Dual") and len(line) < 120
    pool = host.pool("cpu:2")
    assert pool["state"] == "idle" and "(1, 7, 2048)" in pool["error"]
    graph = Graph()
    node = sampling(graph, seed=304)
    assert host.run(graph).texts_of(node)[-1].endswith(IN_WORKERS)
    assert "error" not in host.pool("cpu:2")


def test_what_the_nodes_refuse(host):
    graph = Graph()
    positive = graph.node("TestMaskedConditioning", conditioning=graph.prompt())
    kind, line = failed(host, graph, sampling(graph, positive=positive))
    assert kind == "FastUSP.Unsupported"
    assert line.startswith("FastUSP: failed: Set strength_type to multiply in Apply Style Model: "), line


@pytest.mark.any_host
def test_a_loader_that_fails_and_one_that_does_not(host):
    graph = Graph()
    loader = graph.usp(graph.node("PrimitiveString", value="foo"))
    sampling(graph, loader)
    kind, line = failed(host, graph, loader[0])
    assert kind == "FastUSP.DeviceError" and line.startswith("FastUSP: failed: Set 'auto', 'all', ")
    graph = Graph()
    loader = graph.usp(graph.node("PrimitiveString", value="cpu:2"))
    sampling(graph, loader, seed=305)
    assert host.run(graph).texts_of(loader[0])[-1] == "FastUSP: FLUX.1 on cpu:2"


@pytest.mark.any_host
def test_an_error_of_another_party(host):
    graph = Graph()
    model = graph.node(
        "TestAfterEveryEvaluation", model=graph.usp(), seconds=0.0, error="Theirs, <1.5> times.\nMore of it"
    )
    kind, line = failed(host, graph, sampling(graph, model))
    assert (kind, line) == ("ValueError", "FastUSP: failed: Theirs, ‹1.5› times.")
    assert host.pool("cpu:2")["state"] == "idle" and "error" not in host.pool("cpu:2")


@pytest.mark.any_host
def test_a_pool_is_busy_while_comfyui_has_the_turn(host):
    """Waiting after each evaluation makes it so most of the time."""
    graph, states, over = Graph(), [], threading.Event()
    model = graph.node("TestAfterEveryEvaluation", model=graph.usp(), seconds=0.5, error="")
    node = sampling(graph, model, steps=4, seed=306)

    def look():
        while not over.is_set():
            states.append(host.pool("cpu:2")["state"])

    watch = threading.Thread(target=look)

    def progress(value, _):
        if value == 1:
            watch.start()
        elif value == 3:  # one more evaluation is to come
            over.set()

    outcome = host.run(graph, on_progress=progress)
    watch.join()
    assert len(states) > 5 and set(states) == {"busy"}
    assert any(f"FastUSP: {STEPPING}sampler_post_cfg_function" in text for text in outcome.texts_of(node))
    assert host.pool("cpu:2")["state"] == "idle"


@pytest.mark.any_host
def test_the_menus_name_of_a_sampler(host):
    for name in ("uni_pc_bh2", "dpm_fast"):
        graph = Graph()
        node = sampling(graph, seed=307, sampler_name=name)
        assert host.run(graph).texts_of(node)[-1] == f"FastUSP: {STEPPING}no {name} in the workers)"


def test_a_long_reason_is_cut_on_the_node_and_whole_in_the_log(host):
    graph, began = Graph(), len(host.log_text())
    model = graph.node("TestChangedModel", model=graph.usp(), change="batch function")
    node = sampling(graph, model, seed=310)
    line = host.run(graph).texts_of(node)[-1]
    assert line.startswith(f"FastUSP: {STEPPING}") and line.endswith(" ...") and len(line) <= 80
    assert any(
        line[:-4] in whole and whole.endswith("(fastusp-test-pack) on the model)")
        for whole in host.log_text()[began:].splitlines()
    )


@pytest.mark.any_host
@pytest.mark.thorough
def test_workers_that_died_while_nobody_asked_anything(host):
    graph = Graph()
    sampling(graph, seed=308)
    host.run(graph)
    pids = host.pool("cpu:2")["pids"]
    os.kill(pids[1], signal.SIGKILL)
    deadline = time.monotonic() + 15
    while host.pool("cpu:2")["state"] != "off":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert f"rank 1 (process {pids[1]}) was ended by SIGKILL" in host.pool("cpu:2")["error"]
    graph = Graph()
    sampling(graph, seed=309)
    host.run(graph)
    assert "error" not in host.pool("cpu:2")
