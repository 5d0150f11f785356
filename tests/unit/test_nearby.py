"""Which processors a rank runs on."""

import logging
import os
from types import SimpleNamespace

import pytest
import torch

from fastusp_backend.worker.nearby import processors, stay_near

pytestmark = [pytest.mark.unit, pytest.mark.any_processor]

GPU = torch.device("cuda", 1)


@pytest.fixture
def pci(monkeypatch, tmp_path):
    """pci(local_cpulist): the folder of a GPU's neighbours; None for a GPU of which Linux says nothing."""
    told = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)

    def of(listed):
        if listed is not None:
            (tmp_path / "0000:1b:02.0").mkdir()
            (tmp_path / "0000:1b:02.0" / "local_cpulist").write_text(listed + "\n")
        return tmp_path

    of.told = told
    return of


@pytest.fixture
def allowed(monkeypatch):
    """What this thread may run on, as it is set."""
    now, threads = {0, 1, 2, 3}, torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(now))
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, wanted: (now.clear(), now.update(wanted)))
    yield now
    torch.set_num_threads(threads)


def test_linux_lists_of_processors():
    assert processors("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert processors("\n") == set()


def test_those_beside_the_gpu_of_those_that_are_allowed(pci, allowed):
    torch.set_num_threads(3)
    assert stay_near(GPU, pci("2-5")) == allowed == {2, 3}
    assert torch.get_num_threads() == 2, "more would share processors"


def test_what_guards_a_container_may_forbid_it(pci, allowed, monkeypatch, caplog):
    def forbidden(process, wanted):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    with caplog.at_level(logging.INFO):
        assert stay_near(GPU, pci("2-5")) == set()
    assert "Operation not permitted" in caplog.text


@pytest.mark.parametrize("listed", [None, "", "8-15"])
def test_all_stay_where_none_is_known_or_allowed(pci, allowed, listed):
    assert stay_near(GPU, pci(listed)) == set()
    assert allowed == {0, 1, 2, 3}


def test_a_torch_that_does_not_tell_where_a_gpu_is(pci, allowed):
    del pci.told.pci_bus_id
    assert stay_near(GPU, pci("2-5")) == set()
