# SPDX-License-Identifier: Apache-2.0
"""
The published algorithm of VAR (Tian et al. 2024, algorithm 2 and section 4.2) rendered plainly, with our weights: what
the benchmarks compare with.

Everything is done where the paper's description has it and nothing is saved: the AdaLN vectors are computed in every layer
at every scale, keys and values grow by concatenation, guidance comes after the head, and the filters sort the whole codebook.
Nothing is slowed down on purpose either: query, key and value are one product and attention is torch's fused one.
"""

import math

import torch
from torch.nn import functional

from hf_var import VARTransformer
from hf_var.scales import bounds

from .plain_vqvae import PlainVQVAE


MAX_LOG_QUERY_SCALE = math.log(100)


class PlainVAR:
    """
    A VAR transformer as functions of the weights of ours.

    Args:
        transformer ([`VARTransformer`]):
            Its weights are shared, except for query, key and value, of which a concatenated copy is made.
        trainable (`bool`, *optional*, defaults to `False`): Whether all weights are copies that want gradients.

    Raises:
        `ValueError`: If the transformer shares its AdaLN projection or has blocks that are no scales.
    """

    def __init__(self, transformer: VARTransformer, trainable: bool = False):
        config = transformer.config
        if config.shared_adaln or config.block_sizes is not None:
            raise ValueError(
                "`transformer` must have one AdaLN projection per layer and one block per scale, got "
                f"shared_adaln={config.shared_adaln} and block_sizes={config.block_sizes}."
            )
        self.config = config
        weights = {name: tensor.detach() for name, tensor in transformer.state_dict().items()}
        for index in range(config.num_hidden_layers):
            prefix = f"layers.{index}.attention"
            parts = [weights.pop(f"{prefix}.{name}_proj.weight") for name in ("q", "k", "v")]
            query_bias, value_bias = (weights.pop(f"{prefix}.{name}_proj.bias") for name in ("q", "v"))
            weights[f"{prefix}.qkv.weight"] = torch.cat(parts)
            weights[f"{prefix}.qkv.bias"] = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
        if trainable:
            weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        self.weights = weights
        levels = torch.arange(len(config.scale_lengths), device=transformer.device)
        self.levels = levels.repeat_interleave(torch.tensor(config.scale_lengths, device=transformer.device))
        # Additive, as long as the whole sequence: 0 where a token sees another, minus infinity elsewhere.
        hidden = self.levels[:, None] < self.levels[None, :]
        self.mask = torch.zeros(hidden.shape, device=transformer.device).masked_fill(hidden, -torch.inf)[None, None]

    def training_loss(
        self, class_labels: torch.Tensor, scale_inputs: torch.Tensor, codes: torch.Tensor
    ) -> torch.Tensor:
        """Cross-entropy of `(batch, length)` codes, all scales at once under the dense mask; without dropout."""
        weights = self.weights
        condition = functional.embedding(class_labels, weights["embeddings.class_embedding.weight"])
        first = condition[:, None] + weights["embeddings.start_position"]
        hidden_states = torch.cat([first, self._linear(scale_inputs, "embeddings.input_proj")], dim=1)
        positions = weights["embeddings.level_embedding"][self.levels] + weights["embeddings.position_embedding"]
        hidden_states = hidden_states + positions
        for index in range(self.config.num_hidden_layers):
            hidden_states = self._layer(hidden_states, condition, index, mask=self.mask)
        logits = self._head(hidden_states, condition)
        return functional.cross_entropy(logits.flatten(0, 1), codes.flatten())

    @torch.no_grad()
    def sample(
        self,
        tokenizer: PlainVQVAE,
        class_labels: torch.Tensor,
        guidance_scale: float,
        top_k: int,
        top_p: float,
        generator: torch.Generator,
        decode: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draw images.

        Args:
            tokenizer ([`PlainVQVAE`]): Makes the inputs of the scales, and images.
            class_labels (`torch.LongTensor` of shape `(batch,)`): Classes.
            guidance_scale (`float`): As in our pipeline: it grows with the scales and 1 is off.
            top_k (`int`): Codes to draw from.
            top_p (`float`): Their probability.
            generator (`torch.Generator`): Source of randomness.
            decode (`bool`, *optional*, defaults to `True`): Whether to return images in place of latents.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Images `(batch, channels, height, width)` in [0, 1], codes `(batch, length)`.
        """
        config, weights = self.config, self.weights
        batch_size, num_scales = len(class_labels), len(config.scale_lengths)
        rows = class_labels
        if guidance_scale != 1:
            rows = torch.cat([class_labels, torch.full_like(class_labels, config.num_labels or 0)])
        condition = functional.embedding(rows, weights["embeddings.class_embedding.weight"])
        positions = weights["embeddings.level_embedding"][self.levels] + weights["embeddings.position_embedding"]
        hidden_states = condition[:, None] + weights["embeddings.start_position"]
        cache: list[tuple[torch.Tensor, torch.Tensor] | None] = [None] * config.num_hidden_layers
        latents, codes = tokenizer.zero_latents(batch_size), []
        for k, (begin, end) in enumerate(bounds(config.scale_lengths)):
            hidden_states = hidden_states + positions[begin:end]
            for index in range(config.num_hidden_layers):
                hidden_states = self._layer(hidden_states, condition, index, cache=cache)
            logits = self._head(hidden_states, condition)
            if guidance_scale != 1:
                weight = 1 + (guidance_scale - 1) * (k / (num_scales - 1) if num_scales > 1 else 1.0)
                logits = weight * logits[:batch_size] + (1 - weight) * logits[batch_size:]
            codes.append(draw(logits, top_k, top_p, generator))
            latents, following = tokenizer.add_scale(latents, codes[-1], k)
            if following is not None:
                hidden_states = self._linear(
                    following.to(condition.dtype).repeat(len(rows) // batch_size, 1, 1), "embeddings.input_proj"
                )
        images = tokenizer.decode_latents(latents).clamp(-1, 1) / 2 + 0.5 if decode else latents
        return images, torch.cat(codes, dim=1)

    def parameters(self) -> list[torch.Tensor]:
        """All weights, for an optimizer."""
        return list(self.weights.values())

    def _linear(self, inputs: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(inputs, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, inputs: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(inputs, inputs.shape[-1:], eps=self.config.layer_norm_eps)

    def _modulation(self, condition: torch.Tensor, name: str, number: int) -> tuple[torch.Tensor, ...]:
        vectors = self._linear(functional.silu(condition), f"{name}.adaln.linear")
        return vectors.unflatten(-1, (number, 1, -1)).unbind(dim=1)  # each (batch, 1, hidden)

    def _layer(
        self,
        hidden_states: torch.Tensor,
        condition: torch.Tensor,
        index: int,
        cache: list | None = None,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        name = f"layers.{index}"
        gate, mlp_gate, scale, mlp_scale, shift, mlp_shift = self._modulation(condition, name, 6)
        attended = self._attention(self._norm(hidden_states) * (1 + scale) + shift, index, cache, mask)
        hidden_states = hidden_states + attended * gate
        inner = self._linear(self._norm(hidden_states) * (1 + mlp_scale) + mlp_shift, f"{name}.mlp.fc1")
        return hidden_states + self._linear(functional.gelu(inner, approximate="tanh"), f"{name}.mlp.fc2") * mlp_gate

    def _attention(
        self, inputs: torch.Tensor, index: int, cache: list | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        name, config = f"layers.{index}.attention", self.config
        projected = self._linear(inputs, f"{name}.qkv").unflatten(-1, (3, config.num_attention_heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4).unbind()  # each (batch, heads, length, head_dim)
        scaling = 0.25 / math.sqrt(config.head_dim)
        if config.qk_norm:
            scaling = 1.0
            per_head = self.weights[f"{name}.log_query_scale"].float().clamp(max=MAX_LOG_QUERY_SCALE).exp()
            query = (functional.normalize(query.float(), dim=-1) * per_head.view(-1, 1, 1)).to(value.dtype)
            key = functional.normalize(key.float(), dim=-1).to(value.dtype)
        if cache is not None:
            if cache[index] is not None:
                key, value = torch.cat([cache[index][0], key], dim=2), torch.cat([cache[index][1], value], dim=2)
            cache[index] = (key, value)
        mask = None if mask is None else mask.to(query.dtype)
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
        return self._linear(attended.transpose(1, 2).flatten(-2), f"{name}.o_proj")  # (batch, length, hidden)

    def _head(self, hidden_states: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        scale, shift = self._modulation(condition, "head_norm", 2)
        return self._linear(self._norm(hidden_states) * (1 + scale) + shift, "head").float()


def draw(logits: torch.Tensor, top_k: int, top_p: float, generator: torch.Generator) -> torch.Tensor:
    """
    Codes `(batch, length)` from `(batch, length, codebook_size)` logits: the `top_k` most likely ones, of these the most
    likely ones of the probability `top_p`, found by sorting all, and one multinomial draw.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if 0 < top_p < 1:
        ascending, order = logits.sort(dim=-1)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        removed[..., -1] = False
        logits = logits.masked_fill(removed.scatter(-1, order, removed), -torch.inf)
    probabilities = logits.softmax(dim=-1).flatten(0, 1)
    device = probabilities.device
    return (
        torch.multinomial(probabilities.to(generator.device), 1, generator=generator)
        .to(device)
        .view(logits.shape[:-1])
    )
