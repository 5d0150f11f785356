"""xDiT's transformers: FLUX.1's of its own, and Stable Diffusion 3's as its pipeline runs it."""

from types import SimpleNamespace

import torch
from diffusers_models import flux_sizes

from fastusp_backend.models.family import FamilyConfig
from fastusp_backend.models.sd3 import SD3Config


def parallel(model: torch.nn.Module, config: FamilyConfig, text: int, *, ulysses: int, ring: int) -> torch.nn.Module:
    """Returns diffusers' model as xDiT runs it over all ranks; `text`: tokens of a prompt."""
    from xfuser import xFuserArgs
    from xfuser.core.distributed import get_runtime_state, init_distributed_environment, initialize_runtime_state

    init_distributed_environment()
    degrees = {"ulysses_degree": ulysses, "ring_degree": ring}
    engine, _ = xFuserArgs(model="none", attention_backend="CUDNN", **degrees).create_config()
    theirs = model
    if not isinstance(config, SD3Config):
        from xfuser.model_executor.models.transformers.transformer_flux import xFuserFlux1Transformer2DWrapper

        with torch.device("meta"):
            theirs = xFuserFlux1Transformer2DWrapper(**flux_sizes(config))
        theirs.load_state_dict(model.state_dict(), assign=True)
    initialize_runtime_state(SimpleNamespace(transformer=theirs, vae_scale_factor=8), engine)
    if isinstance(config, SD3Config):
        return StableDiffusion(theirs).eval()
    state = get_runtime_state()
    state.max_condition_sequence_length, state.split_text_embed_in_sp = text, True
    return theirs.eval()


class StableDiffusion(torch.nn.Module):
    """Latents' rows and text's tokens are shared out before xDiT's Stable Diffusion 3 and put together after it, which
    there its pipeline does. Rows as well as tokens must be divisible by the ranks."""

    def __init__(self, model: torch.nn.Module):
        from xfuser.core.distributed import get_runtime_state, get_sp_group
        from xfuser.model_executor.models.transformers.transformer_sd3 import xFuserSD3Transformer2DWrapper

        super().__init__()
        self._theirs = xFuserSD3Transformer2DWrapper(model)
        self._state, self._group = get_runtime_state(), get_sp_group()

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **others):
        group, (batch, _, *size) = self._group, hidden_states.shape
        if size[0] // 2 % group.world_size or encoder_hidden_states.shape[1] % group.world_size:
            raise ValueError(f"{group.world_size} ranks do not divide {size[0] // 2} rows of patches and the text")
        height, width = (8 * edge for edge in size)
        self._state.set_input_parameters(height=height, width=width, batch_size=batch, num_inference_steps=1)
        rows, tokens = (
            tensor.chunk(group.world_size, dim)[group.rank_in_group].contiguous()
            for tensor, dim in ((hidden_states, 2), (encoder_hidden_states, 1))
        )
        (output,) = self._theirs(hidden_states=rows, encoder_hidden_states=tokens, **others)
        return (torch.cat(group.all_gather(output[0].contiguous(), separate_tensors=True), 2),)
