"""The status line of a node: what it shows, and for how long."""

import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.unit


class Interrupted(Exception):
    pass


@pytest.fixture
def status(node_module, monkeypatch):
    """The node's module; `shown`: what the page was sent, in order."""
    shown = []
    server = SimpleNamespace(client_id="page", send_progress_text=lambda text, node, page: shown.append(text))
    monkeypatch.setitem(sys.modules, "aiohttp", SimpleNamespace(web=SimpleNamespace(Request=object, Response=object)))
    module = node_module(
        "status",
        comfyui={
            "PromptServer": SimpleNamespace(instance=server),
            "get_executing_context": lambda: SimpleNamespace(prompt_id="1", node_id="7"),
            "model_management": SimpleNamespace(InterruptProcessingException=Interrupted),
        },
        answers=dict.fromkeys(("FOREIGN", "foreign", "refused")),
        pools={"all_pools": lambda: [], "on_change": None},
    )
    module.shown = shown
    return module


def test_texts_are_cut_between_words(status):
    assert status.shortened("as it is", 8) == "as it is"
    assert status.shortened("one two, three four", 14) == "one two ..."
    assert status.shortened("x" * 30, 10) == "xxxxxx ..."


def test_the_page_takes_no_text_for_its_own_signs(status):
    status.show("<b> [[link]]")
    assert status.shown == ["FastUSP: ‹b› [ [link]]"]


def test_a_phase_covers_the_headline_until_it_is_restored(status):
    with status.node_run():
        status.set_headline("sampling")
        status.node_status().restore()
        status.node_status().phase("loading")
        status.node_status().restore()
    assert status.shown == [f"FastUSP: {text}" for text in ("preparing", "sampling", "loading", "sampling")]


@pytest.mark.parametrize(
    "error, text", [(Interrupted(), "interrupted"), (ValueError("no\nmore"), "failed: no"), (KeyError(), "failed: Key")]
)
def test_an_end_that_is_none_is_told(status, error, text):
    with pytest.raises(type(error)), status.node_run():
        raise error
    assert status.shown[-1].startswith(f"FastUSP: {text}") and "more" not in status.shown[-1]


def test_a_page_that_is_loaded_anew_is_told_of_its_own_prompt(status):
    status.show("sampling")
    running = [(0, "1", {}, {"client_id": "page", "extra_pnginfo": {"workflow": {"id": "w"}}}, [])]
    status.PromptServer.instance.prompt_queue = SimpleNamespace(get_current_queue_volatile=lambda: (running, []))
    assert status._running_texts("page") == {"workflow": "w", "texts": {"7": "FastUSP: sampling"}}
    for other in ("another page", None):
        assert status._running_texts(other) == {"workflow": None, "texts": {}}


@pytest.mark.parametrize("png", [None, [], {}, {"workflow": None}, {"workflow": {"nodes": []}}])
def test_a_prompt_of_no_workflow(status, png):
    assert status.workflow_id(png) is None


def test_what_changes_without_anybody_telling_is_sent_once(status, monkeypatch):
    told, sent = {"state": "stopping", "phase_seconds": 1.0}, []
    monkeypatch.setattr(status, "all_pools", lambda: [SimpleNamespace(status=lambda: dict(told))])
    status.PromptServer.instance.send_sync = lambda event, data: sent.append((event, data["pools"][0]["state"]))
    status.push_pools()
    told["phase_seconds"] = 2.0  # pages count these themselves
    status.push_changes()
    told["state"] = "idle"
    status.push_changes()
    status.push_changes()
    assert sent == [("fastusp.pools", "stopping"), ("fastusp.pools", "idle")]
