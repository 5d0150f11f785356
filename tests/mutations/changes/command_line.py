"""cli: (file, what, old, new, tests that should notice)."""

BENCH = "fastusp_backend/cli/bench.py"
TABLE = "fastusp_backend/cli/table.py"
GPUS = "fastusp_backend/cli/doctor/checks/gpus.py"

CHANGES = [
    (
        "fastusp_backend/cli/verify.py",
        "options that miss captions are recommended",
        "row.decibels >= budget and row.met >= met",
        "row.decibels >= budget",
        "unit/test_verify.py",
    ),
    (
        BENCH,
        "more GPUs are recommended for any gain",
        "* (1 + MARGIN)",
        "* 1",
        "unit/test_bench.py",
    ),
    (
        BENCH,
        "8 bits are recommended without a gain",
        "(not row.exact, row.layout.ranks, row.seconds)",
        "(row.layout.ranks, row.seconds)",
        "unit/test_bench.py",
    ),
    (
        BENCH,
        "steps that warm up count",
        "statistics.median(seconds[warm_up:])",
        "statistics.median(seconds)",
        "unit/test_bench.py",
    ),
    (
        BENCH,
        "8-bit wires are tried of what has no exact figure",
        'if fastest.problem and option["linear"] == "exact":',
        'if fastest.problem and option["linear"] == "":',
        "unit/test_bench.py",
    ),
    (
        TABLE,
        "a table is as wide as its heads",
        "zip(*([column.head for column in columns], *rows), strict=True)",
        "zip(*([column.head for column in columns],), strict=True)",
        "unit/test_table.py",
    ),
    (
        GPUS,
        "pairs of GPUs are those of nvidia-smi's order",
        "enumerate(facts.devices.gpus)}",
        "enumerate(sorted(facts.devices.gpus))}",
        "unit/test_doctor.py",
    ),
    (
        GPUS,
        "peer access one way is enough",
        "facts.probe.peers[place[i]][place[j]] and facts",
        "facts.probe.peers[place[i]][place[j]] or facts",
        "unit/test_doctor.py",
    ),
    (
        "fastusp_backend/cli/doctor/check.py",
        "a machine is as good as its best check",
        "return max((check.status",
        "return min((check.status",
        "unit/test_doctor.py",
    ),
]
