"""pool: (file, what, old, new, tests that should notice)."""

ACCOUNT = "fastusp_backend/pool/account.py"
CAUSE = "fastusp_backend/pool/cause.py"
HANGS = "fastusp_backend/pool/hangs.py"
LINK = "fastusp_backend/pool/link.py"
PROCESSES = "fastusp_backend/pool/processes.py"
REQUEST = "fastusp_backend/pool/request.py"
LOG = "fastusp_backend/pool/log.py"
RUNDIR = "fastusp_backend/pool/rundir.py"
SENT = "fastusp_backend/pool/sent.py"
CONTACT = "fastusp_backend/pool/contact.py"

CHANGES = [
    (
        "fastusp_backend/pool/session.py",
        "what ranks never read has graphs made anew",
        "msgspec.structs.replace(self.settings, **_READ_HERE)",
        "self.settings",
        "unit/test_session.py",
    ),
    (
        LOG,
        "a log that was renamed is read again",
        "which = directory, os.fstat(file.fileno()).st_ino",
        "which = directory, path.name",
        "unit/test_worker_log.py",
    ),
    (
        LOG,
        "half a line is a line",
        'whole, newline, _ = file.read().rpartition(b"\\n")',
        'whole, newline = file.read(), b""',
        "unit/test_worker_log.py",
    ),
    (
        ACCOUNT,
        "the first step of ComfyUI's own counts its loading",
        "known = () if seconds is None else (seconds,)",
        "known = (seconds or 9.0,)",
        "unit/test_account.py",
    ),
    (
        "fastusp_backend/pool/session.py",
        "weights that made room are unpacked again",
        "            self.pool.crowded = True\n\n    def evict",
        "            pass\n\n    def evict",
        "unit/test_unpacked.py",
    ),
    (
        "fastusp_backend/pool/session.py",
        "a request that lacks room is asked again in vain",
        "if not unpack or held and held.state",
        "if not unpack or held is None and held.state",
        "unit/test_unpacked.py",
    ),
    (
        ACCOUNT,
        "a cancel counts as an error",
        "except Cancelled:\n            raise",
        "except ZeroDivisionError:\n            raise",
        "unit/test_account.py",
    ),
    (
        CAUSE,
        "a rank that lost another is blamed before the other one",
        '(4 if record["peer_lost"] else 1, record["time"]',
        '(1, record["time"]',
        "unit/test_cause.py",
    ),
    (
        HANGS,
        "time in which nobody looked counts",
        "min(now - self._last, 2 * LOOK_SECONDS), now",
        "now - self._last, now",
        "unit/test_hangs.py",
    ),
    (
        HANGS,
        "all hang as soon as one does",
        "if any(rank.sign is None or",
        "if all(rank.sign is None or",
        "unit/test_hangs.py",
    ),
    (
        HANGS,
        "reading from a disk is no headway",
        "last.count == rank.sign.count and not read",
        "last.count == rank.sign.count",
        "unit/test_hangs.py",
    ),
    (
        HANGS,
        "workers that hang at what was cancelled are never given up",
        'BEHIND_SECONDS if self._awaited != "answer" else float("inf")',
        'float("inf")',
        "unit/test_hangs.py",
    ),
    (
        LINK,
        "the stream's end is told once",
        "self._inbox.put(item)  # the last one",
        "pass",
        "unit/test_link.py",
    ),
    (
        REQUEST,
        "a late reply of an abandoned request is taken for this one's",
        "if message.id != number or isinstance(message, Held):",
        "if isinstance(message, Held):",
        "unit/test_request.py",
    ),
    (
        REQUEST,
        "what is cancelled without an answer is not left behind",
        "workers.leave_behind(number)\n                raise",
        "raise",
        "unit/test_request.py",
    ),
    (
        RUNDIR,
        "a directory that is just being made is swept",
        "path.stat().st_mtime > _SETTLING_SECONDS",
        "path.stat().st_mtime > -1",
        "unit/test_rundir.py",
    ),
    (
        RUNDIR,
        "a directory whose lock was cleaned away is swept under its owner",
        "or _is_locked(path):",
        "or False:",
        "unit/test_rundir.py",
    ),
    (
        SENT,
        "a tensor that its owner changes is taken for what was sent",
        "after[number] = tensor.clone()",
        "after[number] = tensor",
        "unit/test_sent.py",
    ),
    (
        SENT,
        "what was not answered is never forgotten",
        "forget = sorted(self._doubtful.union(dropped))",
        "forget = sorted(dropped)",
        "unit/test_sent.py",
    ),
    (
        SENT,
        "patches in doubt are taken to be there",
        "if base is not None and old == patches.weights:",
        "if old == patches.weights:",
        "unit/test_sent_patches.py",
    ),
    (
        CONTACT,
        "what was released is taken to be there",
        "self.tensors.doubt()\n            self.patches.unload()",
        "pass",
        "unit/test_sent_patches.py",
    ),
    (
        CONTACT,
        "what nobody waits for is not cancelled",
        "if self.alive and self.sent > self.answered and not self.behind:",
        "if self.behind and not self.alive:",
        "unit/test_sent.py",
    ),
    (
        PROCESSES,
        "NCCL listens on every interface",
        '"NCCL_SOCKET_IFNAME": "=lo"',
        '"NCCL_SOCKET_IFNAME": ""',
        "unit/test_processes.py",
    ),
]
