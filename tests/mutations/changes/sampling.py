"""sampling: (file, what, old, new, tests that should notice)."""

SAMPLERS = "fastusp_backend/sampling/samplers.py"
GUIDANCE = "fastusp_backend/sampling/guidance.py"

CHANGES = [
    (
        "fastusp_backend/sampling/cache.py",
        "what was estimated before an evaluation counts after it",
        "        self._estimated = 0.0\n        return False\n",
        "        return False\n",
        "unit/test_cache.py",
    ),
    (
        "fastusp_backend/sampling/cache.py",
        "each rank decides by itself",
        "if self._agree(bool(self._estimated < self._rule.threshold)):",
        "if self._estimated < self._rule.threshold:",
        "unit/test_cache.py",
    ),
    (
        SAMPLERS,
        "heun corrects its last step as well",
        "slope, step = (x - denoised) / sigma, following - sigma\n        if following != 0:",
        "slope, step = (x - denoised) / sigma, following - sigma\n        if following >= 0:",
        "unit/test_samplers.py",
    ),
    (
        GUIDANCE,
        "soft masks count as hard ones before the evaluation",
        "x = x * keep.mask + known * (1 - keep.mask)",
        "x = torch.where(keep.mask > 0.5, x, known)",
        "unit/test_guidance.py",
    ),
    (
        GUIDANCE,
        "the kept image is not noised to the level",
        "known = sigma * keep.noise + (1 - sigma) * keep.latent_image",
        "known = keep.noise + (1 - sigma) * keep.latent_image",
        "unit/test_guidance.py",
    ),
]
