"""Custom sampling, guiders, wrappers and special conditioning: stock's latents, in the workers' loop or stepped."""

import re

import pytest
from comfy import PromptFailed
from workflows import IN_WORKERS, STEPPING, Comparison, Graph

pytestmark = pytest.mark.host


class Custom(Comparison):
    """Adds SamplerCustomAdvanced runs on both models."""

    def __init__(self):
        super().__init__()
        self.usp, self.stock = self.graph.usp(), self.graph.stock()
        self.positive, self.negative = self.graph.prompt(1), self.graph.prompt(2)
        self.noise = self.graph.node("RandomNoise", noise_seed=11)
        self.latent = self.graph.empty()

    def both(self, label, build, where=IN_WORKERS):
        """build(model) -> latent."""
        self.add(label, build(self.usp), build(self.stock), where)

    def run(self, guider, sampler, sigmas, *, noise=None, latent=None):
        inputs = {"noise": noise or self.noise, "latent_image": latent or self.latent}
        return self.graph.node("SamplerCustomAdvanced", guider=guider, sampler=sampler, sigmas=sigmas, **inputs)

    def named(self, name="euler"):
        return self.graph.node("KSamplerSelect", sampler_name=name)

    def sigmas(self, model, steps=6, scheduler="simple"):
        return self.graph.node("BasicScheduler", model=model, scheduler=scheduler, steps=steps, denoise=1.0)

    def guider(self, model):
        return self.graph.node("BasicGuider", model=model, conditioning=self.positive)


def test_sampler_custom_advanced(host):
    custom = Custom()
    node = custom.graph.node

    def shifted(model):
        return node("ModelSamplingFlux", model=model, max_shift=1.15, base_shift=0.5, width=1024, height=768)

    def basic(model):
        model = shifted(model)
        return custom.run(custom.guider(model), custom.named("dpmpp_2m"), custom.sigmas(model, 20))

    def guided(model):
        model = shifted(model)
        guider = node("CFGGuider", model=model, positive=custom.positive, negative=custom.negative, cfg=2.5)
        return custom.run(guider, custom.named("euler_ancestral"), custom.sigmas(model, 8, "beta"))

    def dual(model):
        conds = {"cond1": custom.positive, "cond2": custom.negative, "negative": custom.negative}
        scales = {"cfg_conds": 2.0, "cfg_cond2_negative": 1.5, "style": "regular"}
        guider = node("DualCFGGuider", model=model, **conds, **scales)
        return custom.run(guider, custom.named(), custom.sigmas(model, 4))

    def perpendicular(model):
        conds = {"positive": custom.positive, "negative": custom.negative, "empty_conditioning": custom.negative}
        guider = node("PerpNegGuider", model=model, **conds, cfg=2.0, neg_scale=0.5)
        return custom.run(guider, custom.named(), custom.sigmas(model, 4))

    custom.both("BasicGuider", basic)
    custom.both("CFGGuider", guided)
    custom.both("DualCFGGuider", dual, STEPPING)
    custom.both("PerpNegGuider", perpendicular, STEPPING)
    custom.check(host)


def test_samplers_with_options_and_parts_of_a_schedule(host):
    custom = Custom()
    node = custom.graph.node

    def with_sampler(kind, **options):
        return lambda model: custom.run(custom.guider(model), node(kind, **options), custom.sigmas(model))

    def in_two_parts(model):
        split = node("SplitSigmas", sigmas=custom.sigmas(model), step=2)
        first = custom.run(custom.guider(model), custom.named(), split)
        lower = [split[0], 1]
        return custom.run(custom.guider(model), custom.named(), lower, noise=node("DisableNoise"), latent=first)

    def advanced(model):
        more = {"positive": custom.positive, "negative": custom.negative, "latent_image": custom.latent}
        more |= {"steps": 8, "cfg": 1.0, "sampler_name": "dpmpp_2m", "scheduler": "simple", "noise_seed": 3}
        steps = {"add_noise": "enable", "start_at_step": 2, "end_at_step": 6, "return_with_leftover_noise": "enable"}
        return node("KSamplerAdvanced", model=model, **more, **steps)

    custom.both("eta", with_sampler("SamplerEulerAncestral", eta=0.5, s_noise=0.9))
    custom.both("eta 0", with_sampler("SamplerEulerAncestral", eta=0.0, s_noise=1.0))
    custom.both("lcm scaled", with_sampler("SamplerLCM", s_noise=0.8, s_noise_end=1.0, noise_clip_std=0.0), STEPPING)
    custom.both("two parts", in_two_parts)
    custom.both("KSamplerAdvanced", advanced)
    custom.check(host)


@pytest.mark.parametrize("kind", ["EasyCache", "LazyCache"])
def test_step_caches(host, kind):
    """As many steps are skipped as stock skips, in the workers' loop; with other options the nodes' own code runs."""
    custom = Custom()
    inputs = {"positive": custom.positive, "latent_image": custom.latent, "steps": 12}
    longer = custom.graph.prompt(4, 23)
    image = custom.graph.latent(masked=True)

    def cached(model, verbose=False, **sampling):
        span = {"reuse_threshold": 1.5, "start_percent": 0.1, "end_percent": 0.95}
        model = custom.graph.node(kind, model=model, **span, verbose=verbose)
        return custom.graph.sample(model, **inputs | sampling)

    guided = {"negative": custom.negative, "cfg": 2.5}
    cases = (
        ("alone", IN_WORKERS, {"negative": custom.negative}),
        ("told of", STEPPING, {"negative": custom.negative, "verbose": True}),
        ("guided", IN_WORKERS, guided),
        ("prompts of two lengths", IN_WORKERS, {"negative": longer, "cfg": 2.5}),
        ("heun", IN_WORKERS, guided | {"sampler_name": "heun"}),
        ("ancestral", IN_WORKERS, guided | {"sampler_name": "euler_ancestral"}),
        ("masked", IN_WORKERS, guided | {"latent_image": image, "denoise": 0.8}),
        ("two images", IN_WORKERS, {"negative": custom.negative, "latent_image": custom.graph.empty(batch=2)}),
    )
    cases = cases if kind == "EasyCache" else cases[:5]  # the others try what both kinds share
    for label, where, more in cases:
        custom.both(label, lambda model, more=more: cached(model, **more), where)
    outcome = custom.check(host)
    counts = [re.search(r", (\d+) of (12|23) (steps|evaluations) from the cache", text) for _, text in outcome.texts]
    counts = [(int(count[1]), *count.groups()[1:]) for count in counts if count]
    assert len(counts) == len(cases) - 1 and ("23", "evaluations") in {count[1:] for count in counts}
    assert all(count > 0 for count, *_ in counts), counts


def test_a_step_cache_and_the_setting_are_one_too_many(host):
    graph = Graph()
    settings = graph.node("FastUSPSettings", wire="exact", attention="auto", cache="easy")
    span = {"reuse_threshold": 0.2, "start_percent": 0.1, "end_percent": 0.95, "verbose": False}
    graph.save(graph.sample(graph.node("EasyCache", model=graph.usp(settings=settings), **span), steps=4))
    with pytest.raises(PromptFailed, match="^Remove the node EasyCache, or set cache = off in USP Optimization"):
        host.run(graph)


@pytest.mark.parametrize("cache", ["easy", "first_block"])
def test_the_setting_skips_steps_and_says_so_where_it_cannot(host, cache):
    graph, numbers = Graph(), {"cache_threshold": 2.0, "cache_start": 0.1}
    settings = graph.node("FastUSPSettings", wire="exact", attention="auto", cache=cache, **numbers)
    model = graph.usp(settings=settings)
    looped, stepped = (graph.sample(model, steps=12, sampler_name=name) for name in ("euler", "uni_pc"))
    graph.save(looped), graph.save(stepped)
    outcome = host.run(graph)
    assert any(re.search(r"[1-9]\d* of 12 steps from the cache$", text) for text in outcome.texts_of(looped[0]))
    assert any(f"stepping, without cache = {cache} (" in text for text in outcome.texts_of(stepped[0]))


def test_special_conditioning(host):
    custom = Custom()
    node, sample = custom.graph.node, custom.graph.sample
    positive, negative = custom.positive, custom.negative
    mask = node("SolidMask", value=0.5, width=128, height=128)
    area = {"width": 64, "height": 64, "x": 64, "y": 0, "strength": 1.0}
    early = node("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.5)
    late = node("ConditioningSetTimestepRange", conditioning=negative, start=0.5, end=1.0)
    latent = custom.graph.empty(128, 128)
    for label, conditioning, where in (
        ("combined", node("ConditioningCombine", conditioning_1=positive, conditioning_2=negative), STEPPING),
        ("area", node("ConditioningSetArea", conditioning=positive, **area), STEPPING),
        ("range", node("ConditioningCombine", conditioning_1=early, conditioning_2=late), STEPPING),
        (
            "mask",
            node("ConditioningSetMask", conditioning=positive, mask=mask, strength=0.7, set_cond_area="default"),
            STEPPING,
        ),
        ("no guidance", node("FluxDisableGuidance", conditioning=positive), IN_WORKERS),
        ("weak guidance", node("FluxGuidance", conditioning=positive, guidance=1.5), IN_WORKERS),
    ):
        inputs = {"positive": conditioning, "negative": negative, "latent_image": latent, "steps": 2}
        custom.both(label, lambda model, inputs=inputs: sample(model, **inputs), where)
        custom.both(f"{label}, cfg", lambda model, inputs=inputs: sample(model, cfg=2.0, **inputs), where)
    custom.check(host)


def test_nodes_that_change_the_guidance(host):
    custom = Custom()
    masked = custom.graph.latent(masked=True)
    for kind, options in (
        ("RescaleCFG", {"multiplier": 0.7}),
        ("Mahiro", {}),
        ("CFGZeroStar", {}),
        ("TCFG", {}),
        ("DifferentialDiffusion", {}),
        ("PerturbedAttentionGuidance", {"scale": 3.0}),  # its patch is of a kind that FLUX does not read
    ):

        def patched(model, kind=kind, options=options):
            model = custom.graph.node(kind, model=model, **options)
            inputs = {"positive": custom.positive, "negative": custom.negative, "latent_image": masked}
            return custom.graph.sample(model, steps=2, cfg=2.0, **inputs)

        custom.both(kind, patched, STEPPING)
    custom.check(host)
