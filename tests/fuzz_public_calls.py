# SPDX-License-Identifier: Apache-2.0
"""Random calls of everything public with wrong types and values: `python tests/fuzz_public_calls.py [CALLS] [SEED]`."""

import contextlib
import io
import random
import re
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_var import (
    HierarchicalVQVAEConfig,
    HierarchicalVQVAEModel,
    PixelCNNConfig,
    PixelSNAILConfig,
    TextVARConfig,
    VARConfig,
    VARImg2ImgPipeline,
    VARInpaintPipeline,
    VARTextImg2ImgPipeline,
    VARTextInpaintPipeline,
    VARTextToImagePipeline,
    VQVAEConfig,
)
from hf_var.cli import main
from hf_var.conversion import (
    load_official_var,
    load_official_vqvae,
    load_pixelcnn,
    load_pixelsnail,
    load_rqvae,
    load_switti,
    load_taming_vqgan,
    load_vqvae2,
)
from hf_var.pipelines.image_grids import progress_strip, save_progress_gif
from hf_var.pipelines.options import TextCallOptions
from hf_var.schedules import propose_schedules
from hf_var.scoring import classify, log_likelihood
from pipelines import tiny_ar
from pipelines.texts import embeddings_of, make_text_pipeline
from pipelines.tiny import make_pipeline


CODES = torch.zeros(2, 21, dtype=torch.long)
IMAGE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def values() -> list:
    """What a user may pass by mistake, and a few that are right."""
    nan = float("nan")
    plain = [
        None,
        True,
        False,
        0,
        1,
        2,
        -1,
        10**30,
        0.5,
        1.0,
        -0.5,
        nan,
        float("inf"),
        1j,
        "",
        "no",
        "3",
        "latents",
        b"x",
    ]
    lists = [[], [1], [0.5, nan], ["x"], [[1]], [None], (), (1, 2), {}, {"a": 1}, {1}, range(3), object(), print, int]
    numbers = [np.int64(1), np.float32(0.5), np.bool_(True), np.zeros(0), np.array(["x"]), np.zeros((2, 21), int)]
    tensors = [
        CODES,
        CODES[:0],
        CODES + 99,
        CODES.float(),
        CODES.bool(),
        CODES[0],
        torch.tensor(1.0),
        IMAGE,
        IMAGE * nan,
    ]
    models = [torch.zeros(2, 32), torch.full((2, 32), nan), torch.zeros(2, 4, 4, 4), torch.zeros(2, 20, 4)]
    others = [Image.new("RGB", (8, 8)), Image.new("L", (3, 5)), Path("none"), torch.Generator(), torch.float16]
    return plain + lists + numbers + tensors + models + others


def entry_points() -> dict[str, tuple]:
    """By `group.name`: a callable, its right arguments, and names of further ones."""
    pipe = make_pipeline()
    options = (
        "guidance_scale top_k top_p temperature smooth logits_processor refiner refiner_start layer_hooks class_embeds"
    )
    options += (
        " prompt num_images_per_label num_images_per_prompt generator output_type return_dict callback_on_step_end"
    )
    options = [*options.split(), "callback_on_step_end_tensor_inputs", "num_candidates", "score_fn", "class_labels"]
    vary, inpaint = VARImg2ImgPipeline.from_pipe(pipe), VARInpaintPipeline.from_pipe(pipe)
    for each in (pipe, vary, inpaint):
        each.set_progress_bar_config(disable=True)
    pair = {"codes": CODES, "other_codes": CODES}
    vqvae, transformer = pipe.vqvae, pipe.transformer
    latents, soft = {"latents": torch.zeros(2, 4, 4, 4)}, {"features": torch.zeros(2, 4, 4, 4)}
    picture = Image.new("RGB", (8, 8))
    return {
        **raster_entry_points(options),
        **text_entry_points(),
        "pipelines.call": (pipe, {"class_labels": [0, 1]}, options),
        "pipelines.vary": (vary, {"image": IMAGE}, [*options, "strength", "num_kept_scales"]),
        "pipelines.inpaint": (
            inpaint,
            {"image": IMAGE, "mask_image": torch.ones(8, 8)},
            [*options, "paste_original", "feather_width"],
        ),
        "pipelines.encode_images": (pipe.encode_images, {"image": IMAGE}, []),
        "pipelines.decode_progress": (pipe.decode_progress, {"codes": CODES}, ["output_type"]),
        "pipelines.interpolate": (pipe.interpolate, pair, ["weights", "output_type"]),
        "pipelines.mix_scales": (pipe.mix_scales, pair | {"num_scales": 1}, ["output_type"]),
        "pipelines.get_label_ids": (pipe.get_label_ids, {"labels": 1}, []),
        "pipelines.get_class_embeds": (pipe.get_class_embeds, {"labels": 1}, []),
        "pipelines.set_adapters": (pipe.set_adapters, {"adapter_names": "a"}, ["adapter_weights"]),
        "pipelines.fuse_lora": (pipe.fuse_lora, {}, ["components", "lora_scale", "adapter_names"]),
        "pipelines.delete_adapters": (pipe.delete_adapters, {"adapter_names": "a"}, []),
        "pipelines.from_pipe": (VARImg2ImgPipeline.from_pipe, {"pipeline": pipe}, ["guidance_scale", "top_p"]),
        "pipelines.progress_strip": (progress_strip, {"progress": [[picture]]}, []),
        "pipelines.save_progress_gif": (save_progress_gif, {"progress": [[picture]], "path": "x.gif"}, ["fps"]),
        "scoring.log_likelihood": (
            log_likelihood,
            {"pipe": pipe, "codes": CODES},
            ["images", "class_labels", "batch_size"],
        ),
        "scoring.classify": (classify, {"pipe": pipe, "codes": CODES}, ["images", "prior", "batch_size"]),
        "conversion.var": (load_official_var, {"checkpoint": {}}, ["patch_nums", "num_attention_heads", "id2label"]),
        "conversion.vqvae": (load_official_vqvae, {"checkpoint": {}}, ["patch_nums", "beta"]),
        "conversion.taming_vqgan": (load_taming_vqgan, {"checkpoint": {}}, ["section", "patch_nums", "sample_type"]),
        "conversion.rqvae": (load_rqvae, {"checkpoint": {}}, ["patch_nums", "codebook_averages"]),
        "configurations.var": (VARConfig, {}, ["patch_nums", "hidden_size", "num_labels", "id2label", "block_sizes"]),
        "configurations.vqvae": (VQVAEConfig, {}, ["patch_nums", "codebook_size", "channel_multipliers", "quantizer"]),
        "configurations.levels": (
            VQVAEConfig,
            {},
            ["attention_levels", "last_level_attention", "encoder_out_channels"],
        ),
        "configurations.maps": (VQVAEConfig, {}, ["sample_type", "in_channels", "out_channels", "codebook_averages"]),
        "schedules.propose": (propose_schedules, {"image_size": 64}, ["downsampling", "max_tokens"]),
        "cli.run": (run_command, {}, ["words"]),
        "models.transformer": (transformer, {"class_labels": torch.tensor([0, 1])}, ["scale_inputs", "class_embeds"]),
        "models.get_class_embeds": (transformer.get_class_embeds, {"class_labels": torch.tensor([0])}, []),
        "models.encode": (vqvae.encode, {"pixel_values": IMAGE}, ["return_dict"]),
        "models.decode": (vqvae.decode, {"codes": CODES}, ["latents", "num_scales", "return_dict"]),
        "models.next_scale": (vqvae.next_scale, {"latents": None, "content": CODES[:, :1], "k": 0}, []),
        "models.teacher_forcing": (vqvae.teacher_forcing, {"codes": CODES}, []),
        "models.soft_codes": (vqvae.soft_codes, soft, ["temperature", "stochastic", "generator"]),
        "models.at_size": (vqvae.at_size, {"height": 8, "width": 8}, []),
        "models.code_vectors": (vqvae.code_vectors, {"codes": CODES}, []),
        "models.scale_inputs": (vqvae.scale_inputs, latents | {"k": 1}, []),
        "models.enable_tiling": (vqvae.enable_tiling, {}, ["tile_sample_min_size", "tile_overlap_factor"]),
    }


def text_entry_points() -> dict[str, tuple]:
    """The same for the model and the pipelines of texts."""
    pipe, bare = make_text_pipeline(), make_text_pipeline(has_encoders=False)
    options = [*TextCallOptions.__optional_keys__]
    made = {"vary": VARTextImg2ImgPipeline.from_pipe(pipe), "inpaint": VARTextInpaintPipeline.from_pipe(pipe)}
    for each in made.values():
        each.set_progress_bar_config(disable=True)
    embeddings = embeddings_of(pipe, ["a cat", "birds"])
    image = {"prompt": "a cat", "image": IMAGE}
    text = {"encoder_hidden_states": torch.zeros(2, 7, 40), "pooled_projections": torch.zeros(2, 16)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = ["patch_nums", "num_labels", "intermediate_size", "is_causal", "rope_theta", "rope_size"]
    return {
        "pipelines.text": (pipe, {"prompt": ["a cat", "birds"]}, options),
        "pipelines.text_embeds": (bare, embeddings, options),
        "pipelines.text_vary": (made["vary"], image, [*options, "strength", "num_kept_scales"]),
        "pipelines.text_inpaint": (
            made["inpaint"],
            {**image, "mask_image": torch.ones(8, 8)},
            [*options, "paste_original", "feather_width"],
        ),
        "pipelines.encode_prompt": (
            pipe.encode_prompt,
            {"prompt": "a cat"},
            [*embeddings, "negative_prompt", "num_images_per_prompt", "do_classifier_free_guidance"],
        ),
        "pipelines.text_components": (
            VARTextToImagePipeline,
            pipe.components,
            ["guidance_scale", "top_k", "smooth_rule"],
        ),
        "configurations.text": (TextVARConfig, sizes, [*fields, "cross_attention_dim", "crop_conditioning"]),
        "conversion.switti": (load_switti, {"checkpoint": {}}, ["is_causal", "patch_nums", "num_attention_heads"]),
        "models.text": (
            pipe.transformer,
            text,
            ["encoder_attention_mask", "crop_sizes", "scale_inputs", "labels", "cache"],
        ),
    }


def raster_entry_points(options: list[str]) -> dict[str, tuple]:
    """The same for hierarchical tokenizers and the priors of raster order; `options` are those of the other pipelines."""
    pipe, single = tiny_ar.make_pipeline(levels=2), tiny_ar.make_pipeline()
    sizes = {"image_size": 8, "base_channels": 8, "residual_channels": 4, "latent_channels": 4, "codebook_size": 12}
    vqvae = HierarchicalVQVAEModel(HierarchicalVQVAEConfig(strides=(2, 2), **sizes)).eval()
    codes, coarse, fine = torch.zeros(2, 20, dtype=torch.long), torch.zeros(2, 4).long(), torch.zeros(2, 16).long()
    maps = (torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 4, 4))
    classes = torch.tensor([0, 1])
    map_fields = ["map_size", "codebook_size", "num_labels", "id2label", "class_dropout_prob", "hidden_size"]
    map_fields.append("kernel_size")
    own_options = [name for name in options if name in pipe.call_options]
    return {
        "pipelines.raster": (single, {"class_labels": [0, 1]}, options),
        "pipelines.raster_levels": (pipe, {"class_labels": [0, 1]}, own_options),
        "pipelines.raster_progress": (pipe.decode_progress, {"codes": codes}, ["output_type"]),
        "scoring.raster_likelihood": (log_likelihood, {"pipe": pipe, "codes": codes}, ["class_labels", "batch_size"]),
        "scoring.raster_classify": (classify, {"pipe": single, "codes": fine}, ["prior", "batch_size"]),
        "conversion.vqvae2": (load_vqvae2, {"checkpoint": {}}, ["image_size", "strides"]),
        "conversion.pixelcnn": (load_pixelcnn, {"checkpoint": {}}, ["map_size", "id2label", "num_labels"]),
        "conversion.pixelsnail": (load_pixelsnail, {"checkpoint": {}}, ["map_size", "num_attention_heads"]),
        "configurations.hierarchical": (
            HierarchicalVQVAEConfig,
            {},
            ["image_size", "strides", "in_channels", "codebook_size", "normalize_codebook", "commitment_loss_weight"],
        ),
        "configurations.pixelcnn": (PixelCNNConfig, {}, [*map_fields, "first_kernel_size", "num_hidden_layers"]),
        "configurations.pixelsnail": (
            PixelSNAILConfig,
            {},
            [*map_fields, "condition_map_size", "condition_codebook_size", "attention", "dropout"],
        ),
        "models.pixelcnn": (single.prior, {"codes": fine, "class_labels": classes}, ["condition_codes", "labels"]),
        "models.pixelsnail": (
            pipe.bottom_prior,
            {"codes": fine, "class_labels": classes, "condition_codes": coarse},
            ["labels", "cache"],
        ),
        "models.hierarchical_encode": (vqvae.encode, {"pixel_values": IMAGE}, ["return_dict"]),
        "models.hierarchical_decode": (vqvae.decode, {"codes": codes}, ["latents", "num_scales", "return_dict"]),
        "models.hierarchical_latents": (vqvae.latents, {"codes": codes}, ["num_scales"]),
        "models.hierarchical_inputs": (vqvae.quantizer_inputs, {"features": maps}, []),
    }


def run_command(words=None) -> None:
    """`hf-var` with one wrong word: it returns 0 or 2, and raises nothing."""
    flags = "--seed --top-k --top-p --temperature --class-labels --device --model --resize --columns --output --dtype"
    chosen = random.Random(str(words)[:20]).choice(flags.split())
    text = str(words)[:40]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        status = main(["generate", "--output", "x.png", f"{chosen}={text}"])
    assert status in (0, 2), status


def names_an_argument(error: Exception, arguments: dict) -> bool:
    """Whether the message has the name of something that was passed, or of anything in backticks."""
    text = str(error)
    return bool(re.search(r"`\w+", text)) or any(name in text for name in arguments)


def fuzz(num_calls: int, seed: int) -> tuple[Counter, list[str]]:
    """How calls ended, by group; and a line for each that ended otherwise than it should."""
    generator, ends, failures = random.Random(seed), Counter(), []
    points, pool = entry_points(), values()
    names = sorted(points)
    for number in range(num_calls):
        place = names[number % len(names)]
        group = place.partition(".")[0]
        call, right, further = points[place]
        wrong = generator.sample([*right, *further], k=min(len([*right, *further]), generator.choice((1, 1, 2))))
        arguments = dict(right) | {name: generator.choice(pool) for name in wrong}
        torch.manual_seed(seed)
        try:
            call(**arguments)
            end = "success"
        except Exception as error:
            is_named = isinstance(error, (ValueError, TypeError)) and names_an_argument(error, arguments)
            end = "refused" if is_named else type(error).__name__
            if not is_named:
                given = {name: str(arguments[name])[:50] for name in wrong}
                failures.append(f"{place}: {given}: {type(error).__name__}: {str(error)[:160]}")
        ends[group, end] += 1
    return ends, failures


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        counts, lines = fuzz(*map(int, [*sys.argv[1:], *(["2000", "0"][len(sys.argv) - 1 :])]))
    lines += [f"{' '.join(key)} {count}" for key, count in sorted(counts.items())]
    sys.stdout.write("\n".join(lines) + "\n")
