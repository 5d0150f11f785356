"""What a host has left for parked weights, by files as Linux and containers write them."""

import pytest

from fastusp_backend import host_memory

pytestmark = pytest.mark.unit

GB = 10**9


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system(cgroup lines, {file: content}): a machine with 64 GB available."""
    for name in ("_MEMINFO", "_OWN_GROUPS", "_GROUPS"):
        monkeypatch.setattr(host_memory, name, tmp_path / name)
    (tmp_path / "_MEMINFO").write_text("MemTotal: 99 kB\nMemAvailable: 62500000 kB\n")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "_OWN_GROUPS").write_text(own)
        for name, content in files.items():
            path = tmp_path / "_GROUPS" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


def v2(folder: str, limit: object, used: int, cache: int) -> dict[str, str]:
    stat = f"anon 5\nactive_file {cache // 2}\ninactive_file {cache // 2}\n"
    values = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}
    return {folder + name: value for name, value in values.items()}


def v1(folder: str, limit: int, used: int, cache: int) -> dict[str, str]:
    stat = f"active_file 0\ntotal_active_file {cache}\ntotal_inactive_file 0"
    values = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"{folder}memory.{name}": f"{value}\n" for name, value in values.items()}


@pytest.mark.parametrize(
    "own, files, expected",
    [
        ("", {}, 64 * GB),
        ("0::/\n", v2("", "max", 10 * GB, 0), 64 * GB),
        ("0::/\n", v2("", 30 * GB, 20 * GB, 0), 10 * GB),
        ("0::/\n", v2("", 30 * GB, 20 * GB, 8 * GB), 18 * GB),
        ("0::/\n", v2("", 30 * GB, 31 * GB, 0), 0),
        ("0::/a/b\n", v2("a/b/", "max", GB, 0) | v2("a/", 9 * GB, GB, 0), 8 * GB),
        ("0::/../not/mounted\n", v2("", 30 * GB, 20 * GB, 0), 10 * GB),
        ("9:cpu:/x\n4:cpu,memory:/x\n0::/\n", v1("memory/x/", 6 * GB, 3 * GB, GB), 4 * GB),
        ("4:memory:/host/path\n", v1("memory/", 6 * GB, 3 * GB, 0), 3 * GB),
        ("4:memory:/\n", v1("memory/", 2**63 - 4096, 3 * GB, 0), 64 * GB),
    ],
)
def test_what_the_host_has_left(system, own, files, expected):
    system(own, files)
    assert host_memory.available() == expected


def test_a_system_that_does_not_say(system):
    host_memory._MEMINFO.unlink()
    assert host_memory.available() is None
