"""attention on one rank: (file, what, old, new, tests that should notice)."""

FLASH3 = "fastusp_backend/attention/flash3.py"
LOCAL = "fastusp_backend/attention/local.py"
ROUNDS = "fastusp_backend/attention/rounds.py"
LOSSY = "unit/test_lossy_attention.py"
OF_ROUNDS = "unit/test_rounds.py"

CHANGES = [
    (
        "fastusp_backend/attention/trial.py",
        "a package is tried with heads of 128 values, whatever the model has",
        "_TOKENS, *heads, generator",
        "_TOKENS, 2, 128, generator",
        "unit/test_attention_trial.py",
    ),
    (
        FLASH3,
        "the log-sum-exp of 8 bits lacks the keys' mean",
        "return out, lse.add_(heads.shift, alpha=scale)",
        "return out, lse",
        LOSSY,
    ),
    (
        "fastusp_backend/attention/sage.py",
        "SageAttention 2 corrects the log-sum-exp by itself, in 16 bits",
        "    smoothed, shift = smooth(q, k)\n    out, lse",
        "    smoothed, shift = k, smooth(q, k)[1] * 0\n    out, lse",
        LOSSY,
    ),
    (
        "fastusp_backend/attention/sage.py",
        "SageAttention 1 attends to any number of keys",
        "if gives_lse() or keys % _KEYS == 0:",
        "if gives_lse() or keys:",
        LOSSY,
    ),
    (
        LOCAL,
        "a ring may have a back end without a log-sum-exp",
        "lossy.back_end(choice, device, dtype, heads, ring=ring)",
        "lossy.back_end(choice, device, dtype, heads, ring=False)",
        LOSSY,
    ),
    (
        FLASH3,
        "queries of the last tiles are attended as the others are",
        "softmax_scale=scale, num_splits=count",
        "softmax_scale=scale, num_splits=1",
        OF_ROUNDS,
    ),
    (
        FLASH3,
        "of several images parts are written elsewhere",
        "out=out[:, rows], softmax",
        "out=out[:, rows].contiguous(), softmax",
        OF_ROUNDS,
    ),
    (
        "fastusp_backend/attention/trial.py",
        "a package is tried with so few keys that there is one part of them",
        "_TOKENS = 512",
        "_TOKENS = 128",
        OF_ROUNDS,
    ),
    (
        FLASH3,
        "of several images the heads of one fill a round",
        "split(queries, k.shape[1], batch * heads,",
        "split(queries, k.shape[1], heads,",
        OF_ROUNDS,
    ),
    (
        FLASH3,
        "parts are taken whether or not the package joins them",
        "return heads[1] == 128 and not trial.problem(",
        "return heads[1] == 128 or not trial.problem(",
        OF_ROUNDS,
    ),
    (
        LOCAL,
        "a ring gets no log-sum-exp, since last tiles are in parts",
        'splits = not ring and "flash3"',
        'splits = "flash3"',
        OF_ROUNDS,
    ),
    (
        "fastusp_backend/attention/lossy.py",
        "the same in 8 bits",
        "if not ring and flash3.can_split(",
        "if flash3.can_split(",
        OF_ROUNDS,
    ),
    (
        ROUNDS,
        "parts cost nothing but their rounds",
        "+ _CALL + _PART * rest * parts",
        "+ 0 * _CALL * _PART",
        OF_ROUNDS,
    ),
]
