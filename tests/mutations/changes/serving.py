"""server, meeting, key file, library: (file, what, old, new, tests that should notice)."""

KEYFILE = "fastusp_backend/keyfile.py"
LIBRARY = "fastusp_backend/library.py"
SIDE_DOOR = "fastusp_backend/side_door.py"
NUMBERS = "fastusp_backend/server/numbers.py"
TURNS = "fastusp_backend/server/turns.py"

CHANGES = [
    (
        KEYFILE,
        "any certificate is the server's",
        "return certificate == ssl.PEM_cert_to_DER_cert(self.certificate)",
        "return certificate is not None",
        "unit/test_tls.py",
    ),
    (
        KEYFILE,
        "a key file may be read by others",
        "if not stat.S_ISREG(mode) or mode & 0o077:",
        "if not stat.S_ISREG(mode):",
        "unit/test_servers.py",
    ),
    (
        LIBRARY,
        "a file of the same name and size is taken for the one that is meant",
        "if state.size == spec.file.size and fingerprint(path, state) == spec.fingerprint:",
        "if state.size == spec.file.size:",
        "unit/test_library.py",
    ),
    (
        LIBRARY,
        "a file that changed since its workflow loaded it is sent for",
        '        if change:\n            raise CheckpointError(f"Queue',
        '        if not change and change:\n            raise CheckpointError(f"Queue',
        "unit/test_library.py",
    ),
    (
        NUMBERS,
        "what a client leaves behind is kept for ever",
        "self._workers.orphans += [kept.number for kept in self._tensors.values()]",
        "self._workers.orphans += []",
        "unit/test_server_numbers.py",
    ),
    (
        TURNS,
        "another client comes between a patch and its request",
        "if now - self._since > LONGEST_SECONDS and not isinstance(message, Patch):",
        "if now - self._since > LONGEST_SECONDS:",
        "unit/test_turns.py",
    ),
    (
        TURNS,
        "who comes anew is before those who wait",
        "self._place[client] = next(self._places)",
        "self._place.setdefault(client, 0)",
        "unit/test_turns.py",
    ),
    (
        "fastusp_backend/server/strangers.py",
        "strangers of one address keep others out",
        "oldest = max(self._from.values(), key=len)[0]",
        "oldest = min(self._from.values(), key=len)[0]",
        "unit/test_server_doors.py",
    ),
    (
        SIDE_DOOR,
        "who has not read the memory is let in",
        "if sock is not None and hmac.compare_digest(found.content, content):",
        "if sock is not None and found.content:",
        "unit/test_side_door.py",
    ),
    (
        SIDE_DOOR,
        "a client connects wherever a server says",
        "if not _NAME.fullmatch(name):",
        "if not name.strip():",
        "unit/test_side_door.py",
    ),
    (
        SIDE_DOOR,
        "another user's client, or server, is taken",
        "return _CREDENTIALS.unpack(credentials)[1] == os.geteuid()",
        "return _CREDENTIALS.unpack(credentials)[1] >= 0",
        "unit/test_side_door.py",
    ),
    (
        "fastusp_backend/planner.py",
        "Ulysses goes between machines",
        "degrees.sort(key=lambda u: (per_machine or ranks) % u != 0)",
        "degrees.sort(key=lambda u: False)",
        "unit/test_planner.py",
    ),
    (
        "fastusp_backend/server/machines.py",
        "a machine with other code joins",
        "if join.software != str(self._software):",
        "if not join.software:",
        "unit/test_server_doors.py",
    ),
    (
        "fastusp_backend/server/software.py",
        "a run begins with code that was changed",
        "if (now := self._look()) != self._found:",
        "if not (now := self._look()):",
        "unit/test_software.py",
    ),
]
