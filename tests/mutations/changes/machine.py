"""the machine's devices, files and environment: (file, what, old, new, tests that should notice)."""

CONFIG = "fastusp_backend/config.py"
DEVICES = "fastusp_backend/devices.py"
NVML = "fastusp_backend/nvml.py"
VISIBLE = "fastusp_backend/visible.py"

CHANGES = [
    (
        "fastusp_backend/read_ahead.py",
        "a file is read ahead that takes all free memory",
        "size > SHARE * free",
        "size > free",
        "unit/test_read_ahead.py",
    ),
    (
        "fastusp_backend/read_ahead.py",
        "a file is read ahead for workers that have ended",
        "if not go_on():",
        "if False:",
        "unit/test_read_ahead.py",
    ),
    (
        "fastusp_backend/read_ahead.py",
        "a file is read ahead past the cache",
        "if not _stays(path):",
        "if False:",
        "unit/test_read_ahead.py",
    ),
    (
        "fastusp_backend/pool/session.py",
        "a server's client reads a file ahead",
        "if self.pool.starts > before and not isinstance(self.pool.devices, ServerDevices):",
        "if self.pool.starts > before:",
        "unit/test_read_ahead.py",
    ),
    (
        "nodes/loader.py",
        "USP Loader has no file read ahead",
        "        session.start()\n",
        "        session.pool.start()\n",
        "unit/test_fewer_gpus.py",
    ),
    (
        "fastusp_backend/read_ahead.py",
        "a reader leaves every other of its pieces out",
        "range(first * PIECE, size, READERS * PIECE)",
        "range(first * PIECE, size, 2 * READERS * PIECE)",
        "unit/test_read_ahead.py",
    ),
    (
        DEVICES,
        "every GPU of the machine counts as one of the pool's",
        "g.index in devices.gpus and g.uuid.lower()",
        "g.uuid.lower()",
        "unit/test_devices.py",
    ),
    (
        DEVICES,
        "bfloat16 begins with Turing",
        "compute_capability >= (8, 0)",
        "compute_capability >= (7, 5)",
        "unit/test_devices.py",
    ),
    (
        DEVICES,
        "a GPU may be named twice",
        "if len(set(wanted)) != len(wanted):",
        "if not wanted:",
        "unit/test_devices.py",
    ),
    (
        VISIBLE,
        "what stands behind -1 is read",
        "if named is None:\n            rest",
        'if entry.strip() == "-1":\n            continue\n        if named is None:\n            rest',
        "unit/test_visible.py",
    ),
    (
        VISIBLE,
        "a GPU may be named twice",
        "if named in found:",
        "if named in ():",
        "unit/test_visible.py",
    ),
    (
        NVML,
        "NVLinks to any GPU count for each",
        "count += all(ends) and _place(ends[0]) == _place(ends[1])",
        "count += 1",
        "unit/test_nvml.py",
    ),
    (
        "fastusp_backend/once.py",
        "a driver that fails is asked at once again",
        "< SECONDS:",
        "< 0:",
        "unit/test_once.py",
    ),
    (
        "fastusp_backend/environment.py",
        "ranks inherit the rank of another launcher",
        '    "RANK",\n',
        "",
        "unit/test_processes.py",
    ),
    (
        CONFIG,
        "a file that was written to in place counts as unchanged",
        'return "was changed" if now != self else ""',
        'return "was changed" if now.size != self.size else ""',
        "unit/test_file_state.py",
    ),
    (
        CONFIG,
        "inodes of sshfs count",
        'any(kind.startswith("fuse") for',
        'any(kind == "fuse" for',
        "unit/test_file_state.py",
    ),
]
