"""Who hangs and who is merely slow, by what ranks show of themselves."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support import wait_until

from fastusp_backend import pulse
from fastusp_backend.comm import collective
from fastusp_backend.pool import hangs
from fastusp_backend.pool.hangs import BEHIND_SECONDS, LOOK_SECONDS, START_SECONDS, STOPPED_SECONDS, HangDetector
from fastusp_backend.pulse import COLD_SECONDS, Pulse

pytestmark = pytest.mark.unit

DOING = "while it evaluated the model"
THERE = '  File "/pack/models/flux.py", line 7 in forward'
OTHER = '  File "/pack/worker/control.py", line 8 in _write'
WAITS = '  File "/lib/torch/distributed/distributed_c10d.py", line 9 in broadcast'


class Ranks:
    """Two ranks that exist in their files alone, and a clock. states, faults: what the system says of each."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.now = folder, 100.0
        self.states, self.faults, self.asked = ["R", "R"], [0, 0], []
        self.stacks = [WAITS, THERE]
        self.pulses = []
        for n in range(2):
            self.pulses.append(Pulse(folder / f"pulse-{n}"))
            self.pulses[n].turn_to(DOING)
            (folder / f"stack-{n}").touch()
        monkeypatch.setattr(hangs.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(hangs, "_process", lambda pid: (self.states[pid], self.faults[pid]))
        real = pulse.Reader.read

        def read(reader):
            sign = real(reader)
            return sign and sign._replace(pid=int(reader._path.name[-1]))

        monkeypatch.setattr(pulse.Reader, "read", read)
        monkeypatch.setattr(hangs.os, "kill", self._kill)
        monkeypatch.setattr(hangs.time, "sleep", self._sleep)
        self.detector = HangDetector(folder, 2)

    def _sleep(self, seconds):
        self.now += seconds

    def _kill(self, pid, number):
        self.asked.append((pid, number))
        if number == hangs.STACK_SIGNAL:
            with open(self.folder / f"stack-{pid}", "a") as file:
                file.write(
                    f"Thread 0x2 (most recent call first):\n{OTHER}\n\nCurrent thread 0x1 (most recent call first):\n"
                    f"{self.stacks[pid]}\n"
                )

    def look(self, seconds, awaited="answer"):
        """Looks as the pool does, for some seconds or until somebody hangs."""
        for _ in range(round(seconds / LOOK_SECONDS)):
            self.now += LOOK_SECONDS
            if suspicion := self.detector.look(awaited):
                return self.detector.accuse(suspicion)
        return None


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    return Ranks(tmp_path, monkeypatch)


def beat(ranks, seconds=12.0, which=(0, 1)):
    for n in which:
        ranks.pulses[n].beat(seconds)


def test_what_a_rank_shows_of_its_memory(tmp_path):
    reader = pulse.Reader(tmp_path / "pulse")
    assert reader.memory() is None
    shows = Pulse(tmp_path / "pulse")
    assert reader.memory() is None
    shows.turn_to("x" * 200)
    shows.show_memory(pulse.Memory(weights=1, own=2, free=3, total=2**40))
    assert reader.memory() == (1, 2, 3, 2**40) and reader.read().doing == "x" * 104
    reader.close()
    assert reader.memory() is None


def test_a_stopped_rank_is_named_with_what_it_was_in(ranks):
    ranks.states[1] = "T"
    assert ranks.look(STOPPED_SECONDS - 1) is None
    hang = ranks.look(2)
    assert hang.cause == f"rank 1 (process 1) was stopped (SIGSTOP, Ctrl-Z) {DOING}"
    assert [line.strip() for line in hang.stacks] == ["Rank 0 was in:", WAITS.strip(), "Rank 1 was in:", THERE.strip()]
    assert (1, signal.SIGCONT) in ranks.asked  # or it would not say where it is


def test_a_rank_that_goes_on_in_time_does_not_hang(ranks):
    ranks.states[1] = "T"
    assert ranks.look(STOPPED_SECONDS - 1) is None
    ranks.states[1] = "S"
    assert ranks.look(1) is None
    ranks.states[1] = "T"
    assert ranks.look(STOPPED_SECONDS - 1) is None


@pytest.mark.parametrize("waits", [WAITS, f'  File "{collective.__file__}", line 85 in wait'], ids=["torch", "work"])
def test_who_waits_for_nobody_is_blamed(ranks, waits):
    ranks.stacks[0] = waits
    beat(ranks, 12)
    assert ranks.look(11) is None
    hang = ranks.look(3)
    assert hang.cause == f"rank 1 (process 1) made no progress for 12 s {DOING}" and not hang.waiting
    assert [line.strip() for line in hang.stacks] == [
        "Rank 0 was in:",
        hangs._short(waits),
        "Rank 1 was in:",
        THERE.strip(),
    ]


def test_where_all_wait_all_are_named(ranks):
    ranks.stacks[1] = WAITS
    beat(ranks, 12)
    hang = ranks.look(14)
    assert hang.cause.startswith("rank 0 (process 0) and rank 1 (process 1) made no progress") and hang.waiting


def test_a_rank_that_does_not_tell_its_stack(ranks, monkeypatch):
    monkeypatch.setattr(hangs.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(hangs, "STACK_SECONDS", 0)
    beat(ranks, 12)
    assert ranks.look(14).stacks == [f"Rank {n} did not say where it was" for n in (0, 1)]


def test_beats_are_headway(ranks):
    for _ in range(10):
        beat(ranks, 12)
        assert ranks.look(11) is None


def test_nobody_hangs_while_one_gets_on(ranks):
    beat(ranks, 12)
    for _ in range(10):
        beat(ranks, 12, which=[1])
        assert ranks.look(11) is None


def test_each_rank_says_how_long_it_takes(ranks):
    beat(ranks, 12, which=[0])
    beat(ranks, COLD_SECONDS, which=[1])
    assert ranks.look(COLD_SECONDS - 1) is None
    assert ranks.look(2) is not None


def test_reading_from_a_disk_is_headway(ranks):
    """As when the machine swaps."""
    beat(ranks, 12)
    for _ in range(10):
        ranks.faults[1] += 1
        assert ranks.look(11) is None


@pytest.mark.parametrize("awaited", [None, "answer"])
def test_who_is_not_waited_for_does_not_hang(ranks, awaited):
    ranks.states[0] = "T"
    beat(ranks, 12)
    assert ranks.look(1000, None) is None
    assert ranks.look(9, awaited) is None


def test_time_in_which_nobody_looked_does_not_count(ranks):
    """The machine was suspended, or this process was stopped."""
    beat(ranks, 12)
    ranks.states[1] = "T"
    for _ in range(8):
        ranks.now += 3600
        assert ranks.look(LOOK_SECONDS) is None


def test_what_was_left_behind_may_take_so_long(ranks):
    beat(ranks, COLD_SECONDS)
    assert ranks.look(BEHIND_SECONDS - 1, "end of what was left behind") is None
    assert ranks.look(2, "end of what was left behind") is not None


def test_a_start_has_a_limit(ranks):
    for _ in range(10):
        beat(ranks, 12)
        assert ranks.look(START_SECONDS / 10 - 1, "start") is None
    assert ranks.look(15, "start").cause.startswith("rank 1 (process 1) was not ready within 300 s of the start, while")


def test_a_start_that_reads_its_libraries_from_a_disk_may_take_longer(ranks):
    for _ in range(2 * int(START_SECONDS / LOOK_SECONDS)):
        ranks.faults[0] += 1
        assert ranks.look(LOOK_SECONDS, "start") is None


def test_files_that_are_gone_hide_nobody(ranks):
    """As where temporary files are cleaned while the pool lives."""
    assert ranks.look(1) is None
    for path in ranks.folder.iterdir():
        path.unlink()
    ranks.states[1] = "T"
    hang = ranks.look(STOPPED_SECONDS + 1)
    assert hang.cause.startswith("rank 1 (process 1) was stopped")
    assert hang.stacks == [f"Rank {n} did not say where it was" for n in (0, 1)]  # these write to new files


def test_a_host_without_descriptors_goes_on_looking(ranks, monkeypatch):
    def none_left(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", none_left)
        ranks.states[1] = "T"
        assert ranks.look(2 * STOPPED_SECONDS) is None and ranks.detector.where()
    assert ranks.look(STOPPED_SECONDS + 1).cause.startswith("rank 1 (process 1) was stopped")


def test_ranks_that_show_nothing_yet_do_not_hang(tmp_path):
    looker = HangDetector(tmp_path, 2)
    assert looker.look("start") is None and looker.look("answer") is None
    assert looker.where() == [f"Rank {n} did not say where it was" for n in (0, 1)]


PROGRAM = """
import sys, time
from pathlib import Path
from fastusp_backend.worker.process import show_pulse
from fastusp_backend.pulse import beat, turn_to
def here():
    print("there", flush=True)
    while True:
        pass
show_pulse(Path(sys.argv[1]), 0)
turn_to("while it span")
here()
"""


def test_a_process_that_spins_tells_where(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"there\n"
            sign = pulse.Reader(tmp_path / "pulse-0").read()
            assert (sign.pid, sign.doing) == (process.pid, "while it span")
            looker = HangDetector(tmp_path, 1)
            os.kill(process.pid, signal.SIGSTOP)
            wait_until(lambda: hangs._process(process.pid)[0] == "T", 5)
            assert "in here" in looker.where()[1]
            assert process.poll() is None and hangs._process(process.pid)[0] != "T"
        finally:
            process.kill()


BEATS = """
import sys
from pathlib import Path
from fastusp_backend import pulse
pulse.start(Path(sys.argv[1]))
print("there", flush=True)
while True:
    pulse.beat(12.0)
"""


def test_half_a_beat_is_never_seen(tmp_path):
    """A word that its writer cleared first would be a limit of no seconds."""
    command = [sys.executable, "-c", BEATS, str(tmp_path / "pulse-0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"there\n"
            reader, count, began = pulse.Reader(tmp_path / "pulse-0"), 0, time.monotonic()
            wait_until(lambda: reader.read().seconds == 12.0, 5)
            while time.monotonic() - began < 1:
                sign = reader.read()
                assert sign.seconds == 12.0 and sign.count >= count
                count = sign.count
        finally:
            process.kill()


def test_a_pulse_without_room_is_refused_when_it_is_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Pulse(tmp_path / "pulse-0")
