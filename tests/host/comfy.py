"""A real ComfyUI as a child process, driven over its HTTP API and websocket."""

import functools
import io
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import websocket
from PIL import Image
from ports import free_port
from safetensors.torch import load_file

from fastusp_backend.worker.process import die_with_parent

REPOSITORY = Path(__file__).resolve().parents[2]


def install(folder: Path) -> None:
    """This pack as the registry gives it: without what .comfyignore names, and what git does not have."""
    lists = [(REPOSITORY / name).read_text(encoding="utf-8").splitlines() for name in (".gitignore", ".comfyignore")]
    left_out = [line.strip("/") for lines in lists for line in lines if not line.startswith("#")]
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(".git", *left_out))


def pixels(file) -> torch.Tensor:
    """A picture, (3, h, w) from 0 to 1. file: a path, or an open file."""
    with Image.open(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).movedim(-1, 0) / 255


@dataclass
class Outcome:
    """What one prompt brought: saved latents by node id, saved images (3, h, w) from 0 to 1, and the websocket's
    events. queued, ended: when, as those of `progress`, by time.monotonic()."""

    latents: dict = field(default_factory=dict)
    images: list = field(default_factory=list)
    progress: list = field(default_factory=list)
    previews: int = 0
    last_preview: bytes = b""
    texts: list = field(default_factory=list)
    interrupted: bool = False
    queued: float = 0.0
    ended: float = 0.0

    @property
    def preview(self) -> torch.Tensor:
        """The last preview. Decoded when it is asked for: what comes behind one would seem to come later."""
        return pixels(io.BytesIO(self.last_preview))

    def texts_of(self, node: str) -> list[str]:
        """The status lines that a node showed."""
        return [text for number, text in self.texts if number == node]


class PromptFailed(Exception):
    """The host refused a prompt, or a node raised; `text` is what the page would show, under `kind`, the error's type,
    beside what the prompt has brought before."""

    def __init__(self, text: str, kind: str = "", outcome: Outcome | None = None):
        super().__init__(text)
        self.text, self.kind, self.outcome = text, kind, outcome


class ComfyUI:
    """Starts `path`'s ComfyUI, on the CPU if nothing else is said, with this repository and the test pack as its custom
    nodes. installed: with a copy of what the registry gives, instead. environment: variables beside the usual ones."""

    def __init__(
        self,
        path: Path,
        base: Path,
        arguments: Sequence[str] = ("--cpu",),
        *,
        installed: bool = False,
        environment: Mapping[str, str] | None = None,
    ):
        self.path, self.base = path, base
        for folder in ("custom_nodes", "models/diffusion_models", "output", "input", "temp", "user/default"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        # Else the page shows its templates over everything else some time after it was loaded, as to new users.
        (base / "user/default/comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
        pack = base / "custom_nodes/ComfyUI-FastUSP"
        install(pack) if installed else pack.symlink_to(REPOSITORY)
        (base / "custom_nodes/fastusp-test-pack").symlink_to(REPOSITORY / "tests/host/pack")
        self.port = free_port()
        self.python = os.environ.get("COMFYUI_PYTHON") or str(path / "venv/bin/python")
        command = [self.python, "main.py", *arguments, "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--disable-auto-launch", "--base-directory", str(base), "--preview-method", "latent2rgb"]
        command += ["--preview-size", "64"]  # of 512 they are a quarter of what it computes here, and pages draw them
        command += ["--disable-api-nodes"]  # a third of its start, and nothing here has to do with them
        command += ["--database-url", f"sqlite:///{base}/user/comfyui.db"]
        self.log = base / "comfyui.log"
        # One thread: tensors are small here, and its workers and other tests want the cores.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"} | (environment or {})
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=path,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),  # a run of tests may be killed
            )
        self.client = uuid.uuid4().hex

    def wait_until_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ComfyUI did not start:\n{self.log_text()[-3000:]}")
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, route: str):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{route}", timeout=60) as answer:
            return json.load(answer)

    def post(self, route: str, body: dict):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{route}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise PromptFailed(error.read().decode()) from error

    def pool(self, devices: str) -> dict:
        """What the status route says of a pool."""
        return next(pool for pool in self.get("/fastusp/status")["pools"] if pool["devices"] == devices)

    def run(self, prompt: dict, *, on_progress=None) -> Outcome:
        """Queues an API prompt and follows it to its end. on_progress(value, max) is called for each progress event."""
        outcome = Outcome()
        ws = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=300)
        try:
            outcome.queued = time.monotonic()
            number = self.post("/prompt", {"prompt": prompt, "client_id": self.client})["prompt_id"]
            while True:
                frame = ws.recv()
                if isinstance(frame, bytes):
                    kind = int.from_bytes(frame[:4], "big")
                    if kind in (1, 4):
                        outcome.previews += 1
                        # Before the picture: what kind it is; in newer ones the length of what is told of it, and that.
                        start = 8 if kind == 1 else 8 + int.from_bytes(frame[4:8], "big")
                        outcome.last_preview = frame[start:]
                    elif kind == 3:
                        length = int.from_bytes(frame[4:8], "big")
                        outcome.texts.append((frame[8 : 8 + length].decode(), frame[8 + length :].decode()))
                    continue
                event = json.loads(frame)
                data = event.get("data", {})
                if data.get("prompt_id") not in (None, number):
                    continue
                if event["type"] == "progress":
                    outcome.progress.append((data["value"], data["max"], time.monotonic()))
                    if on_progress:
                        on_progress(data["value"], data["max"])
                elif event["type"] == "execution_error":
                    raise PromptFailed(data["exception_message"], data["exception_type"], outcome)
                elif event["type"] == "execution_interrupted":
                    outcome.interrupted = True
                    return outcome
                elif event["type"] in ("execution_success",) or (
                    event["type"] == "executing" and data.get("node") is None
                ):
                    outcome.ended = time.monotonic()
                    break
        finally:
            ws.close()
        for _ in range(100):
            history = self.get(f"/history/{number}")
            if number in history:
                break
            time.sleep(0.05)
        for node, output in history[number]["outputs"].items():
            for saved in output.get("latents", ()):
                file = self.base / "output" / saved["subfolder"] / saved["filename"]
                outcome.latents[node] = load_file(file)["latent_tensor"]
            for saved in output.get("images", ()):
                file = self.base / "output" / saved["subfolder"] / saved["filename"]
                outcome.images.append(pixels(file))
        return outcome

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
