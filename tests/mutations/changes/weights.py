"""weights: (file, what, old, new, tests that should notice)."""

ADAPTERS = "fastusp_backend/weights/adapters.py"
GGUF_BLOCKS = "fastusp_backend/weights/gguf_blocks.py"
GGUF_HEADER = "fastusp_backend/weights/gguf_header.py"
SCALED_BLOCKS = "fastusp_backend/weights/scaled_blocks.py"
SCALES = "fastusp_backend/weights/scales.py"
STORAGE_PLAN = "fastusp_backend/weights/storage_plan.py"
STORED = "fastusp_backend/weights/stored.py"

CHANGES = [
    (
        "fastusp_backend/weights/storage_plan.py",
        "the scales of a piece's rows lie at the first ones",
        "scale[rows] = piece.scale",
        "scale[: len(piece.scale)] = piece.scale",
        "unit/test_storage_plan.py",
    ),
    (
        ADAPTERS,
        "alpha does not count in an OFT with dora_scale",
        'scale = (patch.alpha or 0.0) if "dora_scale" in parts else 1.0',
        "scale = 1.0",
        "unit/test_dora.py",
    ),
    (
        ADAPTERS,
        "rotations are not limited",
        "skew = skew * (constraint / (skew.norm() + 1e-8)).clamp(max=1.0)",
        "skew = skew * 1.0",
        "unit/test_adapters.py",
    ),
    (
        GGUF_BLOCKS,
        "the late sub-blocks of Q4_K take their high bits from elsewhere",
        "scales = torch.cat([d & 63, (low & 15) | ((d >> 2) & 48)], dim=1)",
        "scales = torch.cat([d & 63, (low & 15) | ((m >> 2) & 48)], dim=1)",
        "unit/test_gguf_blocks.py",
    ),
    (
        SCALED_BLOCKS,
        "the lower half of a byte of nvfp4 comes first",
        "codes = torch.stack([b[..., 1:] >> 4, b[..., 1:] & 15], dim=-1)",
        "codes = torch.stack([b[..., 1:] & 15, b[..., 1:] >> 4], dim=-1)",
        "unit/test_scaled_blocks.py",
    ),
    (
        SCALED_BLOCKS,
        "scales of blocks lie in rows in the file",
        "in_rows = tiles.permute(0, 3, 2, 1, 4).reshape(-1, tiles.shape[1] * 4)",
        "in_rows = tiles.reshape(-1, tiles.shape[1] * 4)",
        "unit/test_scaled_blocks.py",
    ),
    (
        "fastusp_backend/weights/packed_layers.py",
        "what is said of a layer does not go before its params",
        "said = (params if isinstance(params, dict) else {}) | entry",
        "said = entry | (params if isinstance(params, dict) else {})",
        "unit/test_scaled_blocks.py",
    ),
    (
        "fastusp_backend/models/diffusers_layout.py",
        "the final layer's shift and scale stay in diffusers' order",
        "infos = _halves(contents.path, infos[0], parts[0])[::-1]",
        "infos = _halves(contents.path, infos[0], parts[0])",
        "unit/test_diffusers_layout.py",
    ),
    (
        "fastusp_backend/models/diffusers_layout.py",
        "scales of parts are ignored",
        "if telling or contents.scaled or contents.formats:",
        "if contents.scaled or contents.formats:",
        "unit/test_diffusers_layout.py",
    ),
    (
        SCALES,
        "quantisation metadata of layers outside the transformer counts",
        "layers = None if layers is None else set(layers)",
        "layers = None",
        "unit/test_extra_tensors.py unit/test_detection.py unit/test_formats.py",
    ),
    (
        SCALES,
        "a scale of nought is taken",
        "if value == 0 or not math.isfinite(value):",
        "if not math.isfinite(value):",
        "unit/test_damaged_files.py",
    ),
    (
        STORAGE_PLAN,
        "scaled values are rounded twice",
        "through = torch.float32 if scaled or self.cast in FP8 else self.cast",
        "through = self.cast",
        "unit/test_storage_plan.py",
    ),
    (
        STORAGE_PLAN,
        "tensors that are no layer's weight may be fp8",
        "dtype = wished if linear or wished not in FP8 else torch.bfloat16",
        "dtype = wished",
        "unit/test_storage_plan.py",
    ),
    (
        STORED,
        "weights beyond the range of fp8 are stored as NaN",
        "values = values.clamp(-limit, limit)",
        "values = values * 1.0",
        "unit/test_stored.py",
    ),
    (
        STORED,
        "a restored weight keeps the scale of the patched one",
        "self.scale.copy_(other.scale)",
        "pass",
        "unit/test_stored.py unit/test_patching.py",
    ),
    (
        GGUF_HEADER,
        "offsets need not be aligned",
        "if offset % alignment:",
        "if offset % 1:",
        "unit/test_gguf_header.py",
    ),
    (
        GGUF_HEADER,
        "arrays within arrays are read to any depth",
        "elif depth == DEEPEST_ARRAYS:",
        "elif depth == 900:",
        "unit/test_large_headers.py unit/test_gguf_header.py",
    ),
]
