# SPDX-License-Identifier: Apache-2.0
"""The golden numbers of public implementations; `fixtures/README.md` says what they are."""

import copy
import functools
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from hf_var import TextVARTransformer
from hf_var.conversion import load_switti


FIXTURES = Path(__file__).parent / "fixtures"
CASES = ("A", "B")


@dataclass(frozen=True)
class GoldenCase:
    """
    What public code made of random models.

    Attributes:
        inputs, expected (`dict[str, torch.Tensor]`): Arguments and results, half precision cast to fp32.
        manifest (`dict`): Everything else.
    """

    inputs: dict[str, torch.Tensor]
    expected: dict[str, torch.Tensor]
    manifest: dict

    @property
    def scalars(self) -> dict:
        return self.manifest["expected_scalars"]

    def assert_close(self, name: str, actual: torch.Tensor) -> None:
        """Compare with the expected tensor `name`: integers exactly, others within what rounding explains."""
        expected = self.expected[name]
        if expected.is_floating_point():
            tolerance = 3 * self.manifest["sensitivity_1e-6"][name] + 2e-6
        else:
            tolerance = 0
        actual = actual.detach().to(expected.dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")

    def assert_gradients_close(self, section: str, gradients: dict[str, torch.Tensor]) -> None:
        """
        Compare every gradient's norm and, where they are stored, its elements; `gradients` has official names, and
        `section` is what stands before the names of the case.
        """
        norms = self.scalars[f"{section}grad_norms"]
        assert norms.keys() <= gradients.keys()
        for name, norm in norms.items():
            actual = gradients[name].double().norm().item()
            assert abs(actual - norm) <= 1e-4 * norm + 2e-6, f"{section}grad_norms {name}: {actual} for {norm}"
        stored = [name for name in self.expected if name.startswith(f"{section}grad/")]
        assert stored
        for name in stored:
            self.assert_close(name, gradients[name.removeprefix(f"{section}grad/")])


@dataclass(frozen=True)
class ParityCase(GoldenCase):
    """
    One pair of models of the official code of VAR.

    Attributes:
        vqvae_weights, var_weights (`dict[str, torch.Tensor]`): Official state dicts.
        var_overrides (`dict`): What the transformer's state dict leaves open.
    """

    vqvae_weights: dict[str, torch.Tensor]
    var_weights: dict[str, torch.Tensor]
    var_overrides: dict

    @property
    def patch_nums(self) -> list[int]:
        return self.manifest["vae_args"]["v_patch_nums"]


@dataclass(frozen=True)
class LineageCase(GoldenCase):
    """One model from before VAR, with the state dict of its code, `weights`."""

    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class SwittiCase(GoldenCase):
    """
    The models of one text-to-image pipeline of Switti.

    Attributes:
        weights (`dict`): State dicts, by `switti`, `vae`, `text_encoder_1` and `text_encoder_2`.
        folder (`Path`): Where the tokenizers of the texts are, `tokenizer_1` and `tokenizer_2`.
    """

    weights: dict[str, dict[str, torch.Tensor]]
    folder: Path

    @property
    def variants(self) -> dict[str, dict[str, bool]]:
        """The official `use_ar` and `use_crop_cond` of the four transformers of one file."""
        return self.manifest["variants"]

    def transformer(self, variant: str) -> TextVARTransformer:
        """One of them."""
        arguments, settings = self.manifest["switti_args"], self.variants[variant]
        weights = {
            name: tensor
            for name, tensor in self.weights["switti"].items()
            if settings["use_crop_cond"] or "crop" not in name
        }
        return load_switti(
            weights,
            is_causal=settings["use_ar"],
            num_attention_heads=arguments["num_heads"],
            rope_theta=arguments["rope_theta"],
            rope_size=arguments["rope_size"],
        )

    def text(self, section: str = "text/") -> dict[str, torch.Tensor]:
        """Arguments of a transformer: of the prompts, or with `section="text/cfg_"` of these and the negative ones."""
        embeds, pooled, bias = (
            self.expected[f"{section}{name}"] for name in ("prompt_embeds", "pooled_prompt_embeds", "attn_bias")
        )
        number = None if section.endswith("_") else len(self.manifest["prompts"])
        return {
            "encoder_hidden_states": embeds[:number],
            "encoder_attention_mask": (bias == 0)[:number],
            "pooled_projections": pooled[:number],
        }


@functools.cache
def load_switti_case(name: str = "switti") -> SwittiCase:
    """Read a case of Switti once per process; nothing may change its tensors."""
    folder = FIXTURES / "parity" / name
    return SwittiCase(
        weights={
            path.name.partition(".")[0]: _upcast(safetensors.torch.load(lzma.decompress(path.read_bytes())))
            for path in folder.glob("*.safetensors.xz")
        },
        inputs=_upcast(safetensors.torch.load_file(folder / "inputs.safetensors")),
        expected=_upcast(safetensors.torch.load_file(folder / "expected.safetensors")),
        manifest=json.loads((folder / "manifest.json").read_text(encoding="utf-8")),
        folder=folder,
    )


@functools.cache
def load_case(name: str) -> ParityCase:
    """Read a case once per process; nothing may change its tensors."""
    folder = FIXTURES / "parity" / name
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    heads = manifest["var_args"]["num_heads"]
    weights = [
        _upcast(safetensors.torch.load(lzma.decompress((folder / f"{part}.safetensors.xz").read_bytes())))
        for part in ("vae", "var")
    ]
    return ParityCase(
        vqvae_weights=weights[0],
        var_weights=weights[1],
        var_overrides={} if manifest["var_args"]["attn_l2_norm"] else {"num_attention_heads": heads},
        inputs=_upcast(safetensors.torch.load_file(folder / "inputs.safetensors")),
        expected=_upcast(safetensors.torch.load_file(folder / "expected.safetensors")),
        manifest=manifest,
    )


@functools.cache
def load_lineage_case(name: str, model: str = "weights") -> LineageCase:
    """Read a case of `lineage`, of several models one, once per process; nothing may change its tensors."""
    folder = FIXTURES / "parity" / "lineage" / name
    weights = safetensors.torch.load(lzma.decompress((folder / f"{model}.safetensors.xz").read_bytes()))
    return LineageCase(
        weights=_upcast(weights),
        inputs=_upcast(safetensors.torch.load_file(folder / "inputs.safetensors")),
        expected=_upcast(safetensors.torch.load_file(folder / "expected.safetensors")),
        manifest=json.loads((folder / "manifest.json").read_text(encoding="utf-8")),
    )


def official_gradients(model: nn.Module, export: Callable) -> dict[str, torch.Tensor]:
    """The gradients of `model` under official names: what `export` makes of a copy whose weights they are."""
    gradients = copy.deepcopy(model)
    for parameter, holder in zip(model.parameters(), gradients.parameters(), strict=True):
        holder.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return export(gradients)


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare names, types, shapes and every bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name


def make_contrast(model: nn.Module) -> nn.Module:
    """Random values in every weight and buffer, so that no two of them can be mistaken for each other."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval()


def _upcast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
