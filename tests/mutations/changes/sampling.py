"""sampling: (file, what, old, new, tests that should notice)."""

SAMPLERS = "fastusp_backend/sampling/samplers.py"
GUIDANCE = "fastusp_backend/sampling/guidance.py"

CHANGES = [
    (
        SAMPLERS,
        "heun corrects its last step as well",
        "slope, step = (x - denoised) / sigma, following - sigma\n        if following != 0:",
        "slope, step = (x - denoised) / sigma, following - sigma\n        if following >= 0:",
        "unit/test_samplers.py",
    ),
    (
        SAMPLERS,
        "euler_ancestral forgets the image's share",
        "x = alpha / alpha_down * x + next(noise)",
        "x = x + next(noise)",
        "unit/test_samplers.py",
    ),
    (
        SAMPLERS,
        "dpmpp_2m extrapolates at its last step",
        "if previous is not None and following != 0:\n            ratio",
        "if previous is not None:\n            ratio",
        "unit/test_samplers.py",
    ),
    (
        SAMPLERS,
        "no noise is drawn for eta 0 only where eta is given",
        'options.get("eta", self.options.get("eta", 1.0)) <= 0',
        'options.get("eta", 1.0) < 0',
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
    (
        GUIDANCE,
        "cfg is one too small",
        "(denoised - without[0]) * self.cfg",
        "(denoised - without[0]) * (self.cfg - 1)",
        "unit/test_guidance.py",
    ),
]
