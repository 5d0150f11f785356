"""A report says what is needed of a pool, and of paths the files' names alone."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.unit

RUN = {"model": "m", "width": 64, "height": 64, "images": 1, "steps": 2, "seconds": 1.0}
STATUS = {
    "devices": "cpu:2",
    "state": "off",
    "starts": 1,
    "names": ["cpu", "cpu"],
    "model": "dev.safetensors",
    "layout": "ulysses 2 x ring 1",
    "options": "wire int8",
    "error": f"{Path.home()}/Tom's models/dev.safetensors was changed",
    "history": [
        RUN | {"ms_per_step": 9.0, "evaluations": 0, "skipped": 0, "eight_bits": "wire int8"},
        RUN | {"ms_per_step": None, "evaluations": 2, "skipped": 1, "eight_bits": ""},
    ],
}


@pytest.fixture
def report(node_module):
    folders = {"diffusion_models": (["/data/Tom's models"], set())}
    paths = SimpleNamespace(base_path="/opt/comfy ui", folder_names_and_paths=folders)
    return node_module("report", comfyui={"folder_paths": paths, "version": lambda: "0.33.0"})


def test_a_report(report):
    lines = [f"line {n}" for n in range(100)]
    text = report.report(SimpleNamespace(status=lambda: STATUS, log_since=lambda n: (lines, 100)))
    for part in (
        "ComfyUI 0.33.0, FastUSP",
        "PyTorch",
        "Rank 1: cpu",
        "Layout: ulysses 2 x ring 1",
        "Options: wire int8",
        "2 steps in 1.0 s, 9.0 ms each, wire int8\n",
        "2 steps in 1.0 s, 1 of 2 evaluations skipped\n",
    ):
        assert part in text
    assert "line 99" in text and "line 39\n" not in text and str(Path.home()) not in text


@pytest.mark.parametrize(
    "text, left",
    [
        ("/data/Tom's models/a/dev.safetensors was cut", "dev.safetensors was cut"),
        ('File "/opt/comfy ui/custom_nodes/x.py", line 3', 'File "x.py", line 3'),
        (f"{sys.prefix}/lib/python3/torch.py: {os.getcwd()}/b.py", "torch.py: b.py"),
        ("~/models/a.gguf ./b/c.txt ../d.txt", "a.gguf c.txt d.txt"),
        ("3 / 5, 1.5 it/s, https://example.org/a/b, and/or", "3 / 5, 1.5 it/s, https://example.org/a/b, and/or"),
    ],
)
def test_of_paths_the_names_are_left(report, text, left):
    assert report.without_folders(text) == left
