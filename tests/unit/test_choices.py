"""Choices that are measured once and kept for every later process."""

import os

import pytest

from fastusp_backend import choices
from fastusp_backend.keyfile import usual_path

pytestmark = pytest.mark.unit

WAYS = ("one", "other")
QUESTION = "bias of 576 x 3072 x 12288 bfloat16, NVIDIA H200, torch 2.11.0+cu130 CUDA 13.0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    return tmp_path / "fastusp" / "choices"


def forget(monkeypatch):
    """What another process knows."""
    monkeypatch.setattr(choices, "_chosen", {})
    choices._warn.cache_clear()


def never():
    raise AssertionError("measured again")


def test_what_was_chosen_holds_for_every_later_process(monkeypatch):
    assert choices.known(QUESTION, WAYS) is None
    assert choices.choose(QUESTION, WAYS, lambda: "other") == "other"
    assert choices.choose(QUESTION, WAYS, never) == "other"
    forget(monkeypatch)
    assert choices.choose(QUESTION, WAYS, never) == choices.known(QUESTION, WAYS) == "other"


def test_other_shapes_are_other_choices():
    assert choices.choose(QUESTION, WAYS, lambda: "other") == "other"
    assert choices.choose(QUESTION.replace("576", "288"), WAYS, lambda: "one") == "one"


def test_of_processes_that_measure_at_once_the_first_one_s_choice_holds(monkeypatch, folder):
    def slower():
        choices.choose(QUESTION, WAYS, lambda: "one")  # another process, meanwhile
        forget(monkeypatch)
        return "other"

    assert choices.choose(QUESTION, WAYS, slower) == "one"
    assert choices.choose(QUESTION, WAYS, never) == "one"
    assert [file.read_text() for file in folder.iterdir()] == ["one\n"]  # nothing lies beside it


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"a way of another version\n"])
def test_a_file_that_names_no_way_is_replaced(monkeypatch, folder, text):
    choices.choose(QUESTION, WAYS, lambda: "one")
    (file,) = folder.iterdir()
    file.write_bytes(text)
    forget(monkeypatch)
    assert choices.choose(QUESTION, WAYS, lambda: "other") == "other"
    assert file.read_text() == "other\n"
    assert list(folder.iterdir()) == [file]


def test_where_nothing_can_be_kept_a_choice_holds_for_its_process(monkeypatch, folder, caplog):
    folder.parent.write_text("no folder")
    assert choices.choose(QUESTION, WAYS, lambda: "one") == "one"
    assert choices.choose(QUESTION, WAYS, never) == "one"
    assert "each process measures again" in caplog.text and str(folder) in caplog.text
    forget(monkeypatch)
    assert choices.choose(QUESTION, WAYS, lambda: "other") == "other"


def test_choices_lie_in_the_user_s_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choices.folder() == tmp_path / ".cache" / "fastusp" / "choices"


def test_a_folder_that_is_not_absolute_does_not_count(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert choices.folder() == tmp_path / ".cache" / "fastusp" / "choices"
    assert usual_path() == tmp_path / ".config" / "fastusp" / "key"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home
    monkeypatch.chdir(tmp_path)
    assert choices.choose(QUESTION, WAYS, lambda: "one") == "one"
    assert not list(tmp_path.rglob("*choices*")) and "XDG_CACHE_HOME" in caplog.text


def test_a_full_disk_leaves_nothing_behind(monkeypatch, folder, caplog):
    def full(self, *_, **__):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choices.Path, "write_text", full)
    assert choices.choose(QUESTION, WAYS, lambda: "one") == "one"
    assert not list(folder.iterdir()) and "No space left" in caplog.text
