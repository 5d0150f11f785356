"""API prompts, built node by node, and the comparison of two models in one of them."""

from dataclasses import replace

from comfy import ComfyUI, Outcome

from fastusp_backend.models.synthetic import TINY_CHROMA, TINY_FLUX, TINY_FLUX2, TINY_QWEN_IMAGE, TINY_Z_IMAGE, Z_IMAGE

SMALL = replace(TINY_FLUX, hidden=256, heads=2, mlp=1024, double_blocks=1, single_blocks=1)
WIDE = replace(SMALL, hidden=512, heads=4, mlp=2048)
"""Of as many heads as there are ranks in the tests of layouts."""
SMALL_FLUX2 = replace(TINY_FLUX2, hidden=256, heads=2, mlp=768)
SMALL_CHROMA = replace(TINY_CHROMA, hidden=256, heads=2, mlp=1024)
DEV, SCHNELL = "dev.safetensors", "schnell.safetensors"
SMALL_QWEN = replace(TINY_QWEN_IMAGE, hidden=256, heads=2, mlp=1024, blocks=1)
QWEN_IMAGE = replace(TINY_QWEN_IMAGE, hidden=3072, heads=24, mlp=12288, blocks=1)
"""For GPUs: one block of full size is 1.4 GB."""
ONE_Z_IMAGE = replace(Z_IMAGE, blocks=1)
# Of Z-Image it knows two refiners a stream, and a feed-forward and a timestep that follow from the width.
SMALL_Z_IMAGE = replace(TINY_Z_IMAGE, hidden=256, heads=2, mlp=768, timestep=256, image_blocks=2, context_refiners=2)
IN_WORKERS, STEPPING = "loop in the workers", "stepping ("
TOLERANCE = 2e-5
"""Of the latents' largest value: float32 rounding in another order, over the steps of a run."""

Link = list


class Graph(dict):
    """An API prompt under construction; `node` returns the link to a new node's first output."""

    def node(self, kind: str, **inputs) -> Link:
        number = str(len(self) + 1)
        self[number] = {"class_type": kind, "inputs": inputs}
        return [number, 0]

    def stock(self, file: str = DEV) -> Link:
        return self.node("UNETLoader", unet_name=file, weight_dtype="default")

    def usp(self, gpus: str = "cpu:2", ulysses: int = 0, ring: int = 0, *, file: str = DEV, **more) -> Link:
        inputs = {"unet_name": file, "weight_dtype": "default", "gpus": gpus, "ulysses": ulysses, "ring": ring}
        return self.node("FastUSPLoader", **(inputs | more))

    def prompt(self, seed: int = 1, tokens: int = 7, guidance: float = 3.5, width: int = 4096, **pooled: int) -> Link:
        """pooled: the width of the pooled text, where it is not FLUX.1's."""
        kind = "TestSeededConditioning"
        return self.node(kind, seed=seed, tokens=tokens, width=width, guidance=guidance, **pooled)

    def latent(
        self, width: int = 64, height: int = 64, batch: int = 1, *, seed: int = 3, masked=False, framed=False, **more
    ) -> Link:
        """An image's latent, for img2img and references."""
        switches = {"masked": masked, "framed": framed, **more}
        return self.node("TestSeededLatent", seed=seed, width=width, height=height, batch=batch, **switches)

    def referring(self, prompt: Link, *sizes: tuple[int, int], method: str | None = None, **kind: bool) -> Link:
        """A prompt with reference latents of these sizes. kind: as `latent`'s switches."""
        for seed, (width, height) in enumerate(sizes):
            latent = self.latent(width, height, seed=seed, **kind)
            prompt = self.node("ReferenceLatent", conditioning=prompt, latent=latent)
        if method is None:
            return prompt
        kind = "FluxKontextMultiReferenceLatentMethod"
        return self.node(kind, conditioning=prompt, reference_latents_method=method)

    def empty(self, width: int = 64, height: int = 64, batch: int = 1) -> Link:
        return self.node("EmptySD3LatentImage", width=width, height=height, batch_size=batch)

    def sample(self, model: Link, *, node: str = "KSampler", **inputs) -> Link:
        """A KSampler, or another node with its inputs; what is not given gets a small default."""
        given = {"seed": 5, "steps": 20, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
        given |= inputs
        for name, make in (("positive", self.prompt), ("negative", self._negative), ("latent_image", self.empty)):
            if given.get(name) is None:
                given[name] = make()
        return self.node(node, model=model, **given)

    def _negative(self) -> Link:
        return self.prompt(seed=2)

    def save(self, latent: Link) -> str:
        """Saves; returns the node by whose id `Outcome.latents` holds the tensor."""
        return self.node("SaveLatent", samples=latent, filename_prefix="latent")[0]


def difference(got, want) -> float:
    """The largest difference over the largest value; NaN (never within a bound) where either holds one."""
    return ((got - want).abs().max() / want.abs().max()).item()


class Comparison:
    """One prompt in which stock and FastUSP branches stand side by side."""

    def __init__(self):
        self.graph = Graph()
        self.pairs: list[tuple[str, str, str, str, str]] = []

    def add(self, label: str, got: Link, want: Link, where: str = IN_WORKERS) -> None:
        """got, want: latents of sampler nodes. where: what the status of the one that gives `got` must say."""
        self.pairs.append((label, where, got[0], self.graph.save(got), self.graph.save(want)))

    def check(self, host: ComfyUI, tolerance: float = TOLERANCE) -> Outcome:
        outcome = host.run(self.graph)
        wrong = []
        for label, where, sampler, got, want in self.pairs:
            distance = difference(outcome.latents[got], outcome.latents[want])
            if not distance <= tolerance:
                wrong.append(f"{label}: {distance:.1e}")
            said = outcome.texts_of(sampler)
            if not any(where in text for text in said):
                wrong.append(f"{label}: not {where!r} but {said}")
        assert not wrong, "\n".join(wrong)
        return outcome
