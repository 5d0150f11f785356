"""What `doctor` looks at, without starting workers. Nothing here needs a package that FastUSP needs: their absence is a
fact as well."""

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ...command import run
from ...devices import Devices, Gpu, GpuState, Seen, cuda_visible, gpu_links, gpu_states, list_gpus, visible_gpus
from ...environment import inherited
from ...errors import DeviceError, PoolError

PACKAGES = ("msgspec", "safetensors", "numpy", "nvidia-ml-py", "pillow", "tqdm")
PROBE_SECONDS = 180.0
"""Importing torch from a cold disk takes a minute; CUDA on 8 GPUs some more."""
COMPILER_SECONDS = 60.0

SHOWN = ("CC", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
SHOWN += ("CUDA_*", "GLOO_*", "NCCL_*", "NVSHMEM_*", "OMP_*", "TORCH_SYMM_MEM_*", "TRITON_*")
"""The environment variables that a report shows; no others."""
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a process of its own with these GPUs alone finds, as `probe` writes it. Lists have an entry per GPU, in the
    order of `gpus`."""

    error: str = ""
    """Why there is nothing else."""
    missing: dict[str, str] = field(default_factory=dict)
    """Packages that FastUSP needs and that cannot be imported, and why."""
    torch: str = ""
    cuda: str | None = None
    nccl: str | None = None
    triton: str = ""
    triton_problem: str = ""
    architectures: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    peers: list[list[bool]] = field(default_factory=list)
    """[i][j]: whether i maps j's memory."""
    symmetric: list[str] = field(default_factory=list)
    """Why symmetric memory cannot be allocated; empty where it can."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a machine. Sizes are in bytes; problems are texts, empty where there is none."""

    wanted: str
    """The `gpus` input, as it was given."""
    python: tuple[int, ...]
    system: str
    release: str
    container: bool
    cpus: int
    packages: dict[str, str]
    compiler: str
    compiler_problem: str
    devices: Devices
    gpus: tuple[Gpu, ...]
    states: tuple[GpuState, ...]
    links: dict[str, str]
    """As `nvml.links` has them."""
    iommu: bool
    probe: Probe
    shm_free: int | None
    memfd_problem: str
    run_dir_problem: str
    temporary: str
    descriptors: int | None
    locked: int | None
    host_free: int | None
    environment: dict[str, str]
    dropped: tuple[str, ...]
    visible: str = ""
    """What CUDA_VISIBLE_DEVICES leaves; empty where it is not set, or `gpus` does not heed it."""
    visible_problem: str = ""
    """What of it CUDA does not take."""


def gather(devices: Devices, wanted: str) -> Facts:
    """Looks at the machine for a few seconds. Raises DeviceError where NVML fails."""
    chosen = set(devices.gpus)
    compiler, compiler_problem = _compile()
    probe = _probe(devices)
    heeded = wanted.strip().lower() in ("auto", "all")
    seen = visible_gpus(list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")) if heeded else Seen(())
    usable = platform.system() == "Linux" and bool(probe.torch) and not probe.missing  # the pool can be imported
    return Facts(
        wanted=wanted,
        python=tuple(sys.version_info[:3]),
        system=platform.system(),
        release=platform.release(),
        container=Path("/.dockerenv").exists() or "container" in os.environ,
        cpus=os.cpu_count() or 1,
        packages={name: _version(name) for name in PACKAGES if name not in probe.missing},
        compiler=compiler,
        compiler_problem=compiler_problem,
        devices=devices,
        gpus=tuple(gpu for gpu in list_gpus() if gpu.index in chosen) if chosen else (),
        states=tuple(state for state in gpu_states() if state.index in chosen) if chosen else (),
        links=_links() if len(chosen) > 1 else {},
        iommu=any(Path("/sys/class/iommu").glob("*")),
        probe=probe,
        shm_free=_free("/dev/shm"),
        memfd_problem=_try(_memfd),
        run_dir_problem=_try(_run_dir) if usable else "",
        temporary=tempfile.gettempdir(),
        descriptors=_limit("RLIMIT_NOFILE"),
        locked=_limit("RLIMIT_MEMLOCK"),
        host_free=_host_free() if usable else None,
        environment={k: v for k, v in sorted(os.environ.items()) if shown(k)},
        dropped=_dropped(devices) if usable else (),
        visible=seen.told,
        visible_problem=seen.problem,
    )


def shown(variable: str) -> bool:
    return any(fnmatchcase(variable, pattern) for pattern in SHOWN)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _compile() -> tuple[str, str]:
    """Returns the C compiler that Triton would take, and why it cannot build what Triton builds: an extension of this
    Python."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return "", "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "extension.c"
        source.write_text("#include <Python.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n", encoding="utf-8")
        command = [compiler, str(source), "-O3", "-shared", "-fPIC", "-o", str(source.with_suffix(".so"))]
        try:
            done = run([*command, f"-I{sysconfig.get_path('include')}"], COMPILER_SECONDS)
        except subprocess.TimeoutExpired:
            return compiler, f"it gave no answer within {COMPILER_SECONDS:g} s"
        except OSError as error:
            return compiler, str(error)
    errors = done.stderr.splitlines()
    lines = [line for line in errors if "error" in line] or errors[-1:]
    return compiler, "" if done.returncode == 0 else lines[0] if lines else f"exit status {done.returncode}"


def _probe(devices: Devices) -> Probe:
    """Asks a process of its own: this one must hold no GPU while the workers run, and CUDA may hang or crash."""
    env = inherited(os.environ, _PACKAGE_ROOT) | {"CUDA_VISIBLE_DEVICES": cuda_visible(devices)}
    try:
        command = [sys.executable, "-m", "fastusp_backend.cli.doctor.probe"]
        done = run(command, PROBE_SECONDS, env)
    except subprocess.TimeoutExpired:
        return Probe(error=f"torch and CUDA did not answer within {PROBE_SECONDS:.0f} s")
    try:
        return Probe(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return Probe(error=f"looking at torch and CUDA ended with exit status {done.returncode}: {last}")


def _try(attempt) -> str:
    try:
        attempt()
    except (ImportError, OSError, AttributeError, PoolError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _memfd() -> None:
    """Tries memory without a name, sealed against being cut short, that another process opens through /proc, as ranks
    do with each other's."""
    import fcntl  # not above: Windows has none

    descriptor = os.memfd_create("fastusp-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, 1 << 20)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise OSError("a memfd cannot be sealed")
        with open(f"/proc/{os.getpid()}/fd/{descriptor}", "r+b", buffering=0) as file:
            file.write(b"1")
    finally:
        os.close(descriptor)


def _run_dir() -> None:
    """Tries the pool's own run directory, and a socket in it."""
    from ...pool.rundir import RunDir  # not above: what it needs may be missing

    run_dir = RunDir()
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(run_dir.address)
    finally:
        run_dir.remove()


def _host_free() -> int | None:
    from ...host_memory import available

    return available()


def _dropped(devices: Devices) -> tuple[str, ...]:
    """Finds variables of this process that the workers do not get, or get another value of."""
    from ...pool.processes import worker_environment

    given = worker_environment(devices, Path("/"), os.environ)
    return tuple(sorted(k for k, v in os.environ.items() if shown(k) and given.get(k) != v))


def _free(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _limit(name: str) -> int | None:
    """Returns the soft limit; None for no limit, and where there is no such thing."""
    try:
        resource = importlib.import_module("resource")
    except ImportError:
        return None
    kind = getattr(resource, name)
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _links() -> dict[str, str]:
    """Finds the paths between GPUs; none where they are not told, which is no reason to leave the rest untried."""
    try:
        return gpu_links()
    except DeviceError:
        return {}  # `checks.gpus` says that the path is unknown
