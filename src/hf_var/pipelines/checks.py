# SPDX-License-Identifier: Apache-2.0
"""Whether the models of a pipeline belong together."""

from ..autoencoders import VQVAEConfig, VQVAEModel
from ..priors import VARConfig, VARTransformer
from .lora import is_adapter_module


def check_components(transformer: VARTransformer, vqvae: VQVAEModel) -> None:
    """Raise a `ValueError` unless these are models of the two stages, for the same codes."""
    for name, component, config_class in (("transformer", transformer, VARConfig), ("vqvae", vqvae, VQVAEConfig)):
        # By its configuration: the model itself may be wrapped, by torch.compile for one.
        if not isinstance(getattr(component, "config", None), config_class):
            raise ValueError(
                f"`{name}` must be a model with a {config_class.__name__}, got {type(component).__name__}."
            )
        if is_adapter_module(component):
            raise ValueError(
                f"`{name}` must be the model itself, got PEFT's {type(component).__name__} around it: pass its "
                "`get_base_model()`, which has the adapters in its layers, or its `merge_and_unload()`."
            )
    for field in ("codebook_size", "latent_channels", "patch_nums"):
        ours, theirs = getattr(transformer.config, field), getattr(vqvae.config, field)
        if ours != theirs:
            raise ValueError(
                f"`transformer` and `vqvae` do not belong together: {field} is {ours} in the transformer and {theirs} in "
                "the vqvae."
            )
    if transformer.config.block_lengths != transformer.config.scale_lengths:
        raise ValueError(
            "`transformer` must predict a whole scale at a time, got block_sizes="
            f"{transformer.config.block_sizes} for patch_nums={transformer.config.patch_nums}."
        )
