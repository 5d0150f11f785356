"""Every family has what docs/adding.md lists, and what most lack is refused unless a family says otherwise."""

import ast
import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import support
import torch

from fastusp_backend.models import synthetic
from fastusp_backend.models.detection import FAMILIES
from fastusp_backend.models.family import FamilyConfig, Residuals, Transformer
from fastusp_backend.models.prompts import check_control, check_prompt
from fastusp_backend.prompt import Prompt

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
NEWEST = re.compile(r"chroma|sd3|stable diffusion 3|z.?image", re.IGNORECASE)
"""How code names the families that came last: what they needed, the next one needs."""


def texts(pattern: str) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob(pattern))]


@pytest.fixture(params=FAMILIES, ids=lambda family: family.family)
def family(request) -> type[FamilyConfig]:
    return request.param


@pytest.fixture
def tiny(family) -> FamilyConfig:
    (sizes,) = (sizes for sizes in synthetic.MODELS.values() if type(sizes.tiny) is family)
    assert type(sizes.full) is family
    return sizes.tiny


def test_a_family_is_told_from_others_and_tells_what_it_runs(family):
    assert family.family in family.runs and family.marks
    assert sum(other.family == family.family for other in FAMILIES) == 1


def test_its_prompts_fit_its_model(tiny):
    with torch.device("meta"):
        model = tiny.build()
    assert isinstance(model, Transformer)
    given = support.inputs(tiny, text=7, size=(6, 8), batch=2)
    model.check(given.x, Prompt(given.context, given.y, given.guidance))


def test_a_row_of_modulations_is_split_without_a_rest(tiny):
    with torch.device("meta"):
        model = tiny.build()
        rows = torch.empty(1, 1, model.modulation_width)

    def leaves(part) -> dict:
        """The views in a tree of tuples, each once."""
        if isinstance(part, torch.Tensor):
            return {part.storage_offset(): part.shape[-1]}
        if part is None:  # what this block does not have
            return {}
        return {start: width for inner in part for start, width in leaves(inner).items()}

    assert sum(leaves(model.split_modulations(rows)).values()) == model.modulation_width


def test_it_has_tests_of_its_own(family):
    """Against diffusers' module, and of ranks against one."""
    members = inspect.getmembers(support) + inspect.getmembers(synthetic)
    names = "|".join({name for name, value in members if type(value) is family})
    for tests in ("unit/test_oracle*", "dist/test_*parity"):
        assert any(re.search(rf"\b({names})\b", text) for text in texts(f"tests/{tests}.py")), tests


def test_something_stands_for_its_transformer_in_comfyui(family):
    assert f'"{family.family}": (' in (ROOT / "nodes/remote_families.py").read_text(encoding="utf-8")


def test_it_has_a_workflow_and_help(family):
    """The workflow's text encoder is loaded by the node that `encoders` names, with the type if it names one; or with
    the VAE, from a file that has all."""
    node, kind = re.match(r"th\S+ of (\w+)(?:, type (\w+))?", family.encoders).groups()
    if family.family == "Stable Diffusion 3":
        node, kind = "CheckpointLoaderSimple", None
    workflows = [json.loads(text) for text in texts("example_workflows/api/*.json")]
    loaders = [(n["class_type"], n["inputs"].get("type")) for workflow in workflows for n in workflow.values()]
    assert (node, kind) in loaders
    for file in ("README.md", "web/docs/FastUSPLoader.md"):
        assert family.family in (ROOT / file).read_text(encoding="utf-8"), file


def without_prose(text: str) -> str:
    """A module's code, without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            prose = [line for line in node.body if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)]
            node.body = [line for line in node.body if line not in prose] or [ast.Pass()]
    return ast.unparse(tree)


def test_what_names_families_is_in_the_list_of_what_a_family_needs():
    """All but files of one family alone, which bear its name."""
    listed = (ROOT / "docs/adding.md").read_text(encoding="utf-8").partition("\n## A sampler")[0]
    naming = ["pyproject.toml"]
    rooms = ("benchmarks", "fastusp_backend", "nodes", "tests")
    for path in (path for room in rooms for path in (ROOT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if not NEWEST.search(path.stem) and NEWEST.search(text) and NEWEST.search(without_prose(text)):
            naming.append(path.relative_to(ROOT).as_posix())
    assert len(naming) > 30 and [name for name in sorted(naming) if f"`{name}`" not in listed] == []


@dataclass(frozen=True, kw_only=True, slots=True)
class Plain(FamilyConfig):
    family = "Plain"
    encoders = "its own"
    patch = 1


def test_what_a_family_does_not_claim_is_refused():
    config = Plain(hidden=128, heads=1, channels=4, context=8)
    x = torch.zeros(1, 4, 2, 2)
    prompt = config.example_prompt(torch.zeros, text=3, size=(2, 2))
    assert list(prompt.tensors()) == ["context"] and check_prompt(x, prompt, config) is None
    assert config.reshaped("img_in.weight", (128, 8)) is None and not config.float16
    referring = Prompt(prompt.context, references=(x,))
    assert check_prompt(x, referring, config) == "remove the reference images from the prompt: Plain takes none"
    control = Residuals((torch.zeros(1, 4, 128),), (0,))
    assert "remove the ControlNet" in check_control(x, prompt, control, config)
    assert "remove the node that leaves out blocks" in check_control(x, prompt, Residuals(skipped=(0,)), config)
    assert check_control(x, prompt, Residuals(), config) is None
