"""models: (file, what, old, new, tests that should notice)."""

POSITIONS = "fastusp_backend/models/positions.py"
LAYERS = "fastusp_backend/models/layers.py"
DETECTION = "fastusp_backend/models/detection.py"
OWNERSHIP = "fastusp_backend/models/ownership.py"

CHANGES = [
    (
        "fastusp_backend/models/placement.py",
        "modulations travel with their block",
        "plans[name].linear and id(layer) not in apart",
        "plans[name].linear",
        "unit/test_placement.py dist/test_placements.py",
    ),
    (
        "fastusp_backend/models/placement.py",
        "slots are not counted",
        "max(ownership.nbytes) - streamed + sum(slots) +",
        "max(ownership.nbytes) - streamed +",
        "unit/test_placement.py dist/test_placements.py",
    ),
    (
        "fastusp_backend/models/placement.py",
        "the last of an odd number of blocks takes the first one's slot",
        "slot = 2 if i == count - 1 and i and i % 2 == 0 else i % 2",
        "slot = i % 2",
        "unit/test_placement.py",
    ),
    (
        POSITIONS,
        "references of method offset grow along the longer side",
        "beside = h + height > w + width",
        "beside = h + height < w + width",
        "unit/test_oracle.py",
    ),
    (
        "fastusp_backend/models/patchify.py",
        "odd sizes are padded with zeros",
        'mode="circular"',
        'mode="constant"',
        "unit/test_patchify.py",
    ),
    (
        "fastusp_backend/models/flux.py",
        "a missing pooled text counts as ones",
        "y = vec.new_zeros(",
        "y = vec.new_ones(",
        "unit/test_oracle.py",
    ),
    (
        "fastusp_backend/models/qwen_image.py",
        "text begins behind the largest reference, not behind the image",
        "words = torch.arange(text, device=device) + max(grid) // 2",
        "words = torch.arange(text, device=device) + max(max(g) for g in (grid, *references.grids)) // 2",
        "unit/test_oracle_qwen.py",
    ),
    (
        "fastusp_backend/models/sd3.py",
        "positions are cut out of the corner",
        "+ (side - n) // 2 for n in grid)",
        "+ 0 * side for n in grid)",
        "unit/test_oracle_sd3.py",
    ),
    (
        "fastusp_backend/models/sd3.py",
        "a block that is left out takes its weights' turn with it",
        "            self.begin_block(number)",
        "            if number in kept: self.begin_block(number)",
        "dist/test_placements.py",
    ),
    (
        "fastusp_backend/models/sd3_blocks.py",
        "the second attention's gate is the first one's",
        "ops.add(img, projected, gate), own.second.gate",
        "ops.add(img, projected, gate), gate",
        "unit/test_oracle_sd3.py",
    ),
    (
        "fastusp_backend/models/z_image.py",
        "what fills the image up lies behind its last row",
        "F.pad(image, (0, 0, 0, missing))",
        "F.pad(image.T[None].float(), (0, missing), mode='replicate')[0].T",
        "unit/test_oracle_z_image.py",
    ),
    (
        "fastusp_backend/models/z_image.py",
        "the text is filled up with zeros",
        "self.cap_pad_token.to(x.dtype)",
        "0 * self.cap_pad_token.to(x.dtype)",
        "unit/test_oracle_z_image.py",
    ),
    (
        "fastusp_backend/models/z_image_blocks.py",
        "the image's refiners attend to the text's rows",
        "joint.attend(image_only=not text)",
        "joint.attend()",
        "unit/test_oracle_z_image.py",
    ),
    (
        "fastusp_backend/kernels/sandwich.py",
        "the norms' epsilon is that of other families",
        "EPS = 1e-5",
        "EPS = 1e-6",
        "unit/test_segments.py",
    ),
    (
        LAYERS,
        "rotary tables are computed in float32",
        "steps = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim",
        "steps = torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device) / dim",
        "unit/test_layers.py",
    ),
    (
        "fastusp_backend/models/detection.py",
        "a LoHa file is not told as a LoRA",
        r"\.(hada_w1|lokr_w1|oft_blocks)|",
        r"\.(lokr_w1|oft_blocks)|",
        "unit/test_other_files.py",
    ),
    (
        DETECTION,
        "an OFT file is not told as a LoRA",
        "lokr_w1|oft_blocks)",
        "lokr_w1)",
        "unit/test_other_files.py",
    ),
    (
        DETECTION,
        "Ovis-Image is taken for FLUX.1",
        '"double_blocks.0.img_mlp.gate_proj.weight"',
        '"double_blocks.0.img_mlp.gate_proj.nothing"',
        "unit/test_other_files.py",
    ),
    (
        OWNERSHIP,
        "the smallest layers find their owners first",
        "key=lambda i: -sizes[i]",
        "key=lambda i: sizes[i]",
        "unit/test_ownership.py",
    ),
    (
        "fastusp_backend/models/segments.py",
        "tokens of the image take the rows of the first tokens",
        "self._rows[len(self._rows) - x.shape[1] :]",
        "self._rows[: x.shape[1]]",
        "unit/test_segments.py",
    ),
]
