"""kernels, by their references in torch: (file, what, old, new, tests that should notice)."""

EIGHT_BITS = "fastusp_backend/kernels/eight_bits.py"
TOKENS = "fastusp_backend/kernels/tokens.py"
PLACE = "fastusp_backend/kernels/place.py"
MERGE = "fastusp_backend/kernels/merge.py"
FP8_PRODUCT = "fastusp_backend/kernels/fp8_product.py"

CHANGES = [
    (
        "fastusp_backend/kernels/smooth.py",
        "values are quantised with their mean, which is added once more",
        "mean(1, keepdim=True), v.float() - mean)",
        "mean(1, keepdim=True), v.float())",
        "unit/test_lossy_attention.py",
    ),
    (
        "fastusp_backend/attention/trial.py",
        "a result that is not a number is no error of a package",
        'return "" if error < _BOUND else',
        'return "" if not error >= _BOUND else',
        "unit/test_attention_trial.py",
    ),
    (
        "fastusp_backend/kernels/smooth.py",
        "keys are quantised with their mean",
        "k.float() - k.float().mean(1, keepdim=True), v.float()",
        "k.float(), v.float()",
        "unit/test_lossy_attention.py",
    ),
    (
        EIGHT_BITS,
        "an infinite head arrives finite, not as NaN",
        "scales = largest / torch.full_like(largest, limit)",
        "scales = largest.clamp(max=3e38) / torch.full_like(largest, limit)",
        "unit/test_eight_bits.py unit/test_kernel_references.py",
    ),
    (
        TOKENS,
        "float16 streams are not bounded",
        "posinf=65504.0, neginf=-65504.0) if x.dtype == torch.float16 else x",
        "posinf=65504.0, neginf=-65504.0) if x.dtype == torch.float64 else x",
        "unit/test_kernel_references.py",
    ),
    (
        TOKENS,
        "the layer norm's epsilon is 1e-5",
        "EPS = 1e-6",
        "EPS = 1e-5",
        "unit/test_kernel_references.py unit/test_oracle.py",
    ),
    (
        PLACE,
        "the q and k norms' epsilon is 1e-5",
        "EPS = 1e-6",
        "EPS = 1e-5",
        "unit/test_kernel_references.py unit/test_oracle.py",
    ),
    (
        MERGE,
        "the merged log-sum-exp is the larger one",
        "lse.copy_(torch.logaddexp(lse, part_lse))",
        "lse.copy_(torch.maximum(lse, part_lse))",
        "unit/test_kernel_references.py unit/test_attention.py unit/test_joint_attention.py",
    ),
    (
        FP8_PRODUCT,
        "a refusal counts for other numbers of tokens as well",
        "shape = (len(values), *weight.shape,",
        "shape = (0, *weight.shape,",
        "unit/test_fp8_product.py",
    ),
    (
        FP8_PRODUCT,
        "errors that pass are taken for refusals",
        "if any(passing in str(error) for",
        "if any(passing == str(error) for",
        "unit/test_fp8_product.py",
    ),
    (
        FP8_PRODUCT,
        "Ada is given weights of any pitch",
        "return weight.is_contiguous() and _torch_version()",
        "return _torch_version()",
        "unit/test_fp8_product.py",
    ),
]
