"""One step's evaluations of a transformer over all ranks: latents in, a velocity per prompt out, whole on every rank.

The ranks of a batch group share each sequence. Several groups evaluate different prompts (cond and uncond) or, of one
prompt, different images of the batch: nothing travels between them per layer, they gather finished velocities. So a
guided step on two ranks takes the time of one evaluation on one rank, which sharing each sequence does not reach. A
step of one evaluation has nothing to divide: there all ranks share its sequence.

What does not change from step to step is computed once: a prompt's text tokens and the patches of its references here,
its modulations in modulations.py, buffers and graphs of a shape in evaluation.py.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from ..attention import sage
from ..attention.local import choose
from ..comm.collective import GroupExchange
from ..comm.mesh import Mesh
from ..comm.shards import SequenceShards
from ..comm.transport import Transport
from ..config import CacheRule, Settings
from ..errors import RequestError
from ..models.beside import Beside
from ..models.family import NO_RESIDUALS, Residuals, Transformer
from ..models.patchify import patch_grid, patchify
from ..models.prompts import check_control, references_of
from ..models.segments import Segments
from ..prompt import Prompt
from ..pulse import USUAL_SECONDS, beat
from .evaluation import Evaluation, PromptTensors, Shape, exchanged
from .first_block import KEPT, FirstBlockCache, Gather, PromptCache
from .modulations import ModulationTable

CACHED_EVALUATIONS = 4
"""Shapes whose buffers and graphs are cached; the one that was used longest ago makes room."""
WORKING_SET = 24
"""How many tensors of the size of a rank's tokens, (B, L, C), an evaluation has at a time, its buffers included."""
NO_IMAGES = slice(0, 0)


class Denoiser:
    """velocities = denoiser(x, timestep, prompts, go_on, residuals): every prompt evaluated at the same x.

    A prompt always comes with as many others, so that a group evaluates the same of its images each time. owners: the
    rank that has each of the model's modulation layers, as `ModulationTable` takes them.
    """

    def __init__(
        self,
        model: Transformer,
        mesh: Mesh,
        transport: Transport,
        settings: Settings,
        dtype: torch.dtype,
        owners: Sequence[int] | None = None,
    ):
        self._model, self._mesh, self._transport, self._settings, self._dtype = model, mesh, transport, settings, dtype
        config, layout = model.config, mesh.layout
        heads = config.heads // layout.ulysses, config.hidden // config.heads
        _, self._attend = choose(settings.attention, mesh.device, dtype, heads, ring=layout.ring > 1)
        # The main stream orders what travels, and streamed blocks' slots; unpacked values would take twice the memory.
        unpacks = settings.linear == "exact" and any(layer.weight.element_size() == 1 for layer in model.products())
        alone = layout.sequence_ranks == 1 and model.stream is None and not unpacks
        beside = Beside(mesh.device, active=settings.overlap and alone)
        self._segments = Segments(mesh.device, fused=settings.compile, fp8=settings.linear == "fp8", beside=beside)
        self._modulations = ModulationTable(model, dtype, owners)
        self._batch_exchange = GroupExchange(mesh.batch) if mesh.batch else None
        self._prompts: weakref.WeakKeyDictionary[Prompt, PromptTensors] = weakref.WeakKeyDictionary()
        self._evaluations: OrderedDict[Shape, Evaluation] = OrderedDict()
        self._generation = transport.generation
        self._graph_memory: tuple[int, int] | None = None  # the pool that all its graphs share

    def check(self, x: torch.Tensor, prompts: Sequence[Prompt], residuals: Residuals = NO_RESIDUALS) -> None:
        """Raises RequestError for tensors that do not fit the model, or that the batch groups do not divide."""
        for prompt in prompts:
            self._model.check(x, prompt)
            if problem := check_control(x, prompt, residuals, self._model.config):
                raise RequestError(problem)
        groups = self._mesh.layout.batch
        count = len(prompts) if len(prompts) > 1 else len(x)
        if count % groups:
            raise RequestError(f"{groups} batch groups do not divide {count} evaluations a step")

    def shares(self, prompts: Sequence[Prompt]) -> list[slice]:
        """The images of each prompt that this group evaluates: several prompts are divided among the groups, of a
        single one the images."""
        groups, position = self._mesh.layout.batch, self._mesh.batch_position
        if len(prompts) == 1 and groups > 1:
            count = len(prompts[0].context) // groups
            return [slice(position * count, (position + 1) * count)]
        count = len(prompts) // groups
        return [slice(None) if i // count == position else NO_IMAGES for i in range(len(prompts))]

    def prepare(self, timesteps: list[float], prompts: Sequence[Prompt]) -> None:
        """Computes the modulations of all of these timesteps, in one product per layer and one gather for up to
        `modulations.ROWS_AT_ONCE` rows. Collective over all ranks."""
        self._modulations.prepare(timesteps, prompts, self.shares(prompts))

    def probe_memory(
        self,
        x: torch.Tensor,
        prompts: Sequence[Prompt],
        residuals: Residuals = NO_RESIDUALS,
        *,
        evaluations: int = 1,
        spare: int = 0,
        caches: bool = False,
    ) -> bool:
        """Allocates, and frees again, what this group's evaluations of x take beside the modulations of `evaluations`
        of them, while all ranks can still refuse together: within an evaluation, a rank that fails leaves the others
        waiting. spare: bytes of a GPU that must be left where buffers are still to be made. caches: with a
        `FirstBlockCache`. Returns whether all of their shapes were evaluated before, so that nothing compiles. Raises
        torch.OutOfMemoryError, and RequestError where attention is wrong for so many tokens."""
        shares = self.shares(prompts)
        _rows = self._modulations.probe_memory(evaluations, prompts, shares)  # allocated while evaluations are tried
        kept, known = [], True  # likewise
        for prompt, images in zip(prompts, shares, strict=True):
            if images != NO_IMAGES:
                mine, shards = x[images], self._shards_of(x, prompt)
                if caches:
                    shape = KEPT, len(mine), shards.local, self._model.config.hidden
                    kept.append(x.new_empty(shape, dtype=self._dtype))
                known &= self._probe_evaluation(mine, prompt, residuals.of_images(images), spare, shards, caches)
        return known

    def first_block_cache(self, rule: CacheRule, timestep_scale: float, gather: Gather) -> FirstBlockCache:
        """For one sampling run, of prompts that come in every step of it. Raises RequestError for a model of which
        blocks travel."""
        if self._model.stream is not None:
            raise RequestError(
                "set cache = easy, or weights = whole where they fit, in USP Optimization Settings: cache = "
                "first_block leaves blocks out, and some of this model's come from elsewhere in a fixed order"
            )
        return FirstBlockCache(rule, timestep_scale, self._mesh, gather)

    def __call__(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        prompts: Sequence[Prompt],
        go_on: Callable[[], None],
        residuals: Residuals = NO_RESIDUALS,
        cache: FirstBlockCache | None = None,
    ) -> list[torch.Tensor]:
        """x (B, C, h, w) or (B, C, 1, h, w), timestep (B,) on the CPU -> a velocity per prompt, as x, in the compute
        type, with one `residuals` for all.

        go_on runs ahead of every evaluation of this group, as often on all ranks. cache: what may leave out all
        blocks but the first, in evaluations of the same prompts. Collective over all ranks.
        """
        shares = self.shares(prompts)
        self._reserve(x[next(images for images in shares if images != NO_IMAGES)], prompts)
        go_on()
        modulations = self._modulations.rows(tuple(timestep.tolist()), prompts, shares)
        velocities = []
        for prompt, images, rows in zip(prompts, shares, modulations, strict=True):
            if images == NO_IMAGES:
                continue
            if velocities:
                go_on()
            mine = x[images]
            of_prompt = None if cache is None else cache.of(prompt, timestep, prompts=len(prompts))
            velocity = self._evaluate(_flat(mine), rows, prompt, images, residuals.of_images(images), of_prompt)
            velocities.append(velocity.clone().view_as(mine))  # the next evaluation overwrites it
        if self._batch_exchange is None:
            return velocities
        # (batch groups, prompts of a group, images, ...)
        gathered = self._batch_exchange.all_gather(torch.stack(velocities))()
        return list(gathered.flatten(0, 1)) if len(prompts) > 1 else [gathered.flatten(0, 2)]

    def _reserve(self, x: torch.Tensor, prompts: Sequence[Prompt]) -> None:
        """Makes the exchanges' room on all batch groups alike, for the longest of all prompts; x: a group's images."""
        if self._mesh.layout.batch > 1:
            all_of_them = [self._shards_of(x, prompt) for prompt in prompts]
            text, image = (max(getattr(of, stream) for of in all_of_them) for stream in ("text", "image"))
            of_model = exchanged(self._model.config, self._dtype, self._transport.wire(self._settings.wire))
            self._transport.reserve(SequenceShards(self._mesh.layout, text, image), len(x), **of_model)

    def forget_prompts(self) -> None:
        """Drops what was computed from prompts, after weights have changed; buffers and graphs stay. All ranks drop
        alike."""
        self._modulations.forget()
        self._prompts.clear()

    @torch.inference_mode()
    def _evaluate(
        self,
        x: torch.Tensor,
        modulations: Sequence[torch.Tensor],
        prompt: Prompt,
        images: slice,
        residuals: Residuals,
        cache: PromptCache | None,
    ) -> torch.Tensor:
        """x (B, C, h, w) of the prompt's `images` -> velocity, as x, valid until the next evaluation of its shape."""
        evaluation = self._evaluation(self._shape(x, prompt, residuals))
        if x.is_cuda and not any(cached.captured for cached in self._evaluations.values()):
            # When its last graph is gone, nothing may be captured into memory of which some is still in use.
            self._graph_memory = torch.cuda.graph_pool_handle()
        tensors = self._tensors_of(prompt, images)
        return evaluation.run(x, tensors, modulations, residuals.tensors, self._graph_memory, cache)

    def _shards_of(self, x: torch.Tensor, prompt: Prompt) -> SequenceShards:
        """How the tokens of an evaluation of x are cut."""
        shape = self._shape(_flat(x), prompt, NO_RESIDUALS)
        rows, columns = patch_grid(*x.shape[-2:], self._model.config.patch)
        image = self._model.config.filled(rows * columns + shape.references.tokens)
        return SequenceShards(self._mesh.layout, shape.text, image)

    def _probe_evaluation(
        self, x: torch.Tensor, prompt: Prompt, residuals: Residuals, spare: int, shards: SequenceShards, caches: bool
    ) -> bool:
        shape = self._shape(_flat(x), prompt, residuals)
        evaluation = self._evaluations.get(shape)
        if evaluation is not None and evaluation.captured_for(caches=caches):
            return True
        self._check_keys(shards)
        count = WORKING_SET * len(x) * shards.local * self._model.config.hidden
        if evaluation is None:
            count += spare // self._dtype.itemsize
        torch.empty(count, dtype=self._dtype, device=x.device)  # and free it
        if x.is_cuda and evaluation is None:
            torch.cuda.empty_cache()  # exchanges' buffers do not come from torch's cache
        return evaluation is not None

    def _check_keys(self, shards: SequenceShards) -> None:
        """Raises RequestError where the chosen attention is wrong for so many keys."""
        if self._settings.attention != "sage":
            return
        image_alone = self._model.config.image_blocks + self._model.config.second_attentions > 0
        for text in (True, False)[: 1 + image_alone]:
            for position in range(self._mesh.layout.ring):
                keys = shards.valid(position, text=text)
                if problem := sage.problem_with(keys.stop - keys.start):
                    raise RequestError(problem)

    def _shape(self, x: torch.Tensor, prompt: Prompt, residuals: Residuals) -> Shape:
        return Shape(
            tuple(x.shape),
            self._model.config.filled(prompt.context.shape[1]),
            references_of(self._model.config, prompt),
            tuple(tuple(tensor.shape) for tensor in residuals.tensors),
            residuals.input,
            residuals.output,
            residuals.skipped,
        )

    def _tensors_of(self, prompt: Prompt, images: slice) -> PromptTensors:
        if prompt not in self._prompts:
            beat(USUAL_SECONDS)
            mine = prompt.of_images(images)
            patch = self._model.config.patch
            patches = [patchify(_flat(latent).to(self._dtype), patch) for latent in mine.references]
            self._prompts[prompt] = PromptTensors(
                self._embedded(mine.context.to(self._dtype)),
                None if mine.concat is None else _flat(mine.concat).to(self._dtype),
                torch.cat(patches, dim=1) if patches else None,
            )
        return self._prompts[prompt]

    def _embedded(self, context: torch.Tensor) -> torch.Tensor:
        """context (B, T, E) -> this rank's part of the text, (B, Lt, hidden)."""
        config, embed = self._model.config, self._model.embed_text
        shards = SequenceShards(self._mesh.layout, config.filled(context.shape[1]), 0)
        text = embed(context) if config.embeds_whole_text else context
        local = shards.take_text(text, self._mesh.sequence_position, dim=1)
        return local if config.embeds_whole_text else embed(local)

    def _evaluation(self, shape: Shape) -> Evaluation:
        if self._transport.generation != self._generation:
            self._evaluations.clear()  # their graphs hold addresses that have moved
            self._generation = self._transport.generation
        if shape not in self._evaluations:
            beat(USUAL_SECONDS)
            while len(self._evaluations) >= CACHED_EVALUATIONS:
                self._evaluations.popitem(last=False)
            self._evaluations[shape] = Evaluation(
                self._model,
                self._mesh,
                self._transport,
                self._attend,
                self._settings,
                self._segments,
                shape,
                self._dtype,
            )
            if self._transport.generation != self._generation:
                self._evaluations = OrderedDict({shape: self._evaluations[shape]})
                self._generation = self._transport.generation
        self._evaluations.move_to_end(shape)
        return self._evaluations[shape]


def _flat(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) of latents that may have a frame axis of one."""
    return latents.squeeze(2) if latents.dim() == 5 else latents
