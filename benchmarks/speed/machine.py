# SPDX-License-Identifier: Apache-2.0
"""
What the machine is and can do, measured in the run, and the floor that follows from it: no program that does the model's
arithmetic once is faster than its operations at the rate of large matrix products, or than reading weights and cache once
at the rate of the memory.
"""

import copy
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hf_var import VARCache, VARConfig, VARTransformer, VQVAEConfig, VQVAEModel

from .clock import progress, timed
from .models import onednn_matmul


LIBRARIES = ("torch", "transformers", "diffusers")
# Dense products of bf16 in FLOP per second by NVIDIA's data sheets, by a part of the device's name; utilisations are published
# against these. The variants of a chip with other connectors are slower.
BF16_PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Limits:
    """
    Rates of the machine.

    Args:
        flops (`dict[str, float]`): FLOP per second of large matrix products, for each dtype.
        bytes_per_second (`float`): Reading memory.
    """

    flops: dict[str, float]
    bytes_per_second: float


@dataclass(frozen=True)
class Work:
    """
    What drawing a batch of images takes at least.

    Args:
        scale_flops (`list[float]`): Arithmetic of the transformer at each scale.
        scale_bytes (`list[float]`): Weights and cache that each scale reads.
        decoder_flops (`float`): Arithmetic of the decoder.
        cache_bytes (`float`): Size of the cache at the end.
    """

    scale_flops: list[float]
    scale_bytes: list[float]
    decoder_flops: float
    cache_bytes: float

    @property
    def flops(self) -> float:
        """All arithmetic."""
        return sum(self.scale_flops) + self.decoder_flops

    def floor(self, limits: Limits, dtype: torch.dtype, decoder_dtype: torch.dtype | None = None) -> float:
        """
        Seconds: at each scale the slower of arithmetic and memory, then the decoder's arithmetic, in a precision of its own
        if it has one.
        """
        rate = limits.flops[dtype_name(dtype)]
        scales = zip(self.scale_flops, self.scale_bytes, strict=True)
        steps = [max(flops / rate, read / limits.bytes_per_second) for flops, read in scales]
        return sum(steps) + self.decoder_flops / limits.flops[dtype_name(decoder_dtype or dtype)]


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` rather than `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def describe(device: torch.device) -> dict:
    """The machine and the versions, for the report."""
    description = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
    }
    return description | {name: version(name) for name in LIBRARIES}


def bf16_peak(device: torch.device) -> float | None:
    """FLOP per second in bf16 by the data sheet, `None` of a device that is not in `BF16_PEAKS`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in BF16_PEAKS.items() if part in name), None)


def processor_name() -> str:
    """As the system calls it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_limits(device: torch.device, dtypes: list[torch.dtype], quick: bool = False) -> Limits:
    """
    Measure the rates.

    Args:
        device (`torch.device`): Where.
        dtypes (`list[torch.dtype]`): Of these.
        quick (`bool`, *optional*, defaults to `False`): With small matrices, for a smoke run whose rates mean nothing.
    """
    progress("measuring the machine")
    size = 256 if quick else 2048 if device.type == "cpu" else 8192
    seconds = 0.02 if quick else 1.0
    flops = {}
    for dtype in dtypes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        # In fp32 two libraries are at hand on a CPU; the floor is that of the faster one.
        libraries = (False, True) if device.type == "cpu" and dtype == torch.float32 else (False,)
        fastest = []
        for switch in libraries:
            with onednn_matmul(switch):
                fastest.append(fastest_call(lambda: functional.linear(left, right), device, seconds))  # noqa: B023
        flops[dtype_name(dtype)] = 2 * size**3 / min(fastest)
    # Larger than any cache; a sum reads everything once. A GPU reads 4 GB in a millisecond, beside which a launch is short.
    numbers = torch.ones((2**20 if quick else 2**27 if device.type == "cpu" else 2**30), device=device)
    read = fastest_call(lambda: numbers.sum(), device, seconds)
    matrix, vector = numbers.view(2**10, -1), torch.ones(numbers.numel() // 2**10, device=device)
    read = min(read, fastest_call(lambda: matrix @ vector, device, seconds))
    return Limits(flops=flops, bytes_per_second=numbers.nbytes / read)


def fastest_call(function: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call among those that fit into `seconds`, three at least."""
    times = []
    function()
    while len(times) < 3 or sum(times) < seconds:
        times.append(timed(function, device)[0])
    return min(times)


def sampling_work(
    config: VARConfig, tokenizer: VQVAEConfig | None, batch_size: int, guided: bool, dtype: torch.dtype
) -> Work:
    """
    Count what drawing a batch takes: matrix products and convolutions only, the AdaLN vectors once, keys and values kept.

    Args:
        config ([`VARConfig`]): The transformer.
        tokenizer ([`VQVAEConfig`], *optional*): The tokenizer whose decoder counts, if it does.
        batch_size (`int`): Images.
        guided (`bool`): Whether the transformer sees every image twice.
        dtype (`torch.dtype`): Of weights and cache.
    """
    rows = 2 * batch_size if guided else batch_size
    transformer = meta_transformer(config)
    layer_weights = sum(tensor.numel() for tensor in transformer.layers.parameters())
    adaln_weights = sum(tensor.numel() for name, tensor in transformer.layers.named_parameters() if ".adaln." in name)
    head_weights = sum(tensor.numel() for tensor in transformer.head.parameters())
    cache, flops, read = VARCache(transformer.config), [], []
    for index, length in enumerate(transformer.config.block_lengths):
        begin = cache.get_seq_length()
        flops.append(block_flops(transformer, cache, rows, length))
        weights = layer_weights + head_weights - (adaln_weights if index > 0 else 0)
        read.append((weights + cache_numbers(config, rows, begin)) * dtype.itemsize)
    decoder_flops = 0.0 if tokenizer is None else tokenizer_flops(tokenizer, batch_size)[1]
    return Work(flops, read, decoder_flops, cache_numbers(config, rows, config.length) * dtype.itemsize)


def tokenizer_flops(config: VQVAEConfig, batch_size: int) -> tuple[float, float]:
    """FLOPs of encoding and of decoding a batch of images."""
    with torch.device("meta"), torch.no_grad():
        vqvae = VQVAEModel(copy.deepcopy(config)).eval()
        images = torch.empty(batch_size, config.in_channels, *config.image_size)
        with FlopCounterMode(display=False) as encoder:
            vqvae.encode(images)
        with FlopCounterMode(display=False) as decoder:
            vqvae.decode(latents=torch.empty(batch_size, config.latent_channels, *config.latent_size))
    return float(encoder.get_total_flops()), float(decoder.get_total_flops())


def cache_numbers(config: VARConfig, rows: int, length: int) -> int:
    """Numbers in keys and values of all layers."""
    return 2 * config.num_hidden_layers * rows * length * config.hidden_size


def meta_transformer(config: VARConfig) -> VARTransformer:
    """A transformer of shapes alone, whose attention is made of products that can be counted."""
    with torch.device("meta"):
        return VARTransformer._from_config(copy.deepcopy(config), attn_implementation="eager").eval()


@torch.no_grad()
def block_flops(transformer: VARTransformer, cache: VARCache, rows: int, length: int) -> float:
    """FLOPs of the next `length` tokens, which are whole blocks; a multiplication and an addition count as two."""
    config = transformer.config
    is_first = cache.get_seq_length() == 0
    inputs = length - config.block_lengths[0] if is_first else length
    scale_inputs = torch.empty(rows, inputs, config.latent_channels, device="meta") if inputs > 0 else None
    labels = torch.zeros(rows, dtype=torch.long, device="meta") if is_first else None
    with FlopCounterMode(display=False) as counter:
        transformer(labels, scale_inputs=scale_inputs, cache=cache)
    return float(counter.get_total_flops())


def as_report(limits: Limits) -> dict:
    """For the JSON file."""
    return asdict(limits)
