# SPDX-License-Identifier: Apache-2.0
"""
Everything in other libraries that we rely on although they do not document it. A test here that fails with a new release
says what has changed and which of our files relies on it; whatever is private and used in `src` has to be listed here.
"""

import ast
import functools
import inspect
import io
from pathlib import Path

import accelerate
import datasets
import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from transformers import PreTrainedModel, initialization

import hf_var
from hf_var import VARCache, VARPipeline, VARTransformer, VQVAEModel
from hf_var.attention_backends import ATTENTION_BACKENDS
from pipelines.tiny import make_pipeline
from priors.rq import rq_inputs, rq_model
from priors.text import text_inputs, text_model
from priors.tiny import tiny_inputs, tiny_model


pytestmark = pytest.mark.contract

SOURCES = Path(__file__).resolve().parents[1] / "src" / "hf_var"
LIBRARIES = ("accelerate", "datasets", "diffusers", "peft", "torch", "transformers")
# Modules below a library's own name whose interface is documented.
DOCUMENTED = {
    "accelerate.tracking",
    "accelerate.utils",
    "datasets.distributed",
    "diffusers.callbacks",
    "diffusers.image_processor",
    "diffusers.modular_pipelines",
    "diffusers.training_utils",
    "diffusers.utils",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn",
    "torch.utils.data",
    "torch.utils.flop_counter",
    "transformers.utils",
}
# Our own, by names that look like a library's.
OURS = {"_fused_adapters", "_labels_without_adapters", "_per_second"}
LISTED: dict[str, set[str]] = {}


def contract(*uses):
    """Mark a test of what files expect of `"file: names"`; the test's docstring says what that is."""
    for use in uses:
        where, names = use.split(": ")
        LISTED.setdefault(where, set()).update(names.split())

    def decorate(test):
        @functools.wraps(test)
        def checked(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise AssertionError(f"No longer true: {test.__doc__} Relied on in {'; '.join(uses)}.") from error

        return checked

    return decorate


# --------------------------------------------------------------------------------------------------------------------
# transformers


@contract(
    "priors/modeling_var.py: output_capturing.capture_outputs _can_record_outputs",
    "priors/modeling_text_var.py: output_capturing.capture_outputs _can_record_outputs",
    "priors/modeling_rq.py: output_capturing.capture_outputs output_capturing.OutputRecorder _can_record_outputs",
)
def test_hidden_states_and_attentions_are_recorded():
    """`capture_outputs` collects what the layers named in `_can_record_outputs` return, and makes tuples of outputs."""
    model = tiny_model("eager")
    output = model(**tiny_inputs(model.config), output_hidden_states=True, output_attentions=True)
    assert (len(output.hidden_states), len(output.attentions)) == (3, 2)
    assert isinstance(model(torch.tensor([1]), return_dict=False), tuple)
    # Weights of cross-attention are recorded with the others.
    model = text_model("eager")
    assert len(model(**text_inputs(model.config), output_attentions=True).cross_attentions) == 2
    # Of a recorder with `layer_name="layers"` these are not the depth layers, which are of the same class.
    model = rq_model("classes", "eager")
    output = model(**rq_inputs(model.config), output_hidden_states=True, output_attentions=True)
    assert (len(output.hidden_states), len(output.attentions)) == (3, 2)


@contract(
    "priors/modeling_outputs.py: ModelOutput cache_utils.Cache",
)
def test_outputs_with_a_cache_are_made_and_read():
    """The constructor of an output takes `cache`, and `past_key_values` may be a property of it."""
    model = tiny_model()
    cache = VARCache(model.config)
    output = model(torch.tensor([1]), cache=cache)
    assert output["cache"] is output["past_key_values"] is output.past_key_values is cache


@contract(
    "priors/layers.py: modeling_layers.GradientCheckpointingLayer",
    "autoencoders/layers.py: modeling_layers.GradientCheckpointingLayer",
    "priors/modeling_pixelcnn.py: modeling_layers.GradientCheckpointingLayer",
    "priors/modeling_pixelsnail.py: modeling_layers.GradientCheckpointingLayer",
    "autoencoders/plain_layers.py: modeling_layers.GradientCheckpointingLayer",
    "priors/layers_rq.py: modeling_layers.GradientCheckpointingLayer",
    "priors/layers_text_var.py: modeling_layers.GradientCheckpointingLayer",
    "priors/cache.py: gradient_checkpointing",
    "compatibility.py: activation_checkpointing_enable gradient_checkpointing_enable",
)
def test_layers_can_be_checkpointed():
    """Enabling it sets `gradient_checkpointing` on every `GradientCheckpointingLayer`, which are then run twice."""
    from hf_var.compatibility import enable_activation_checkpointing

    model, calls = tiny_model().train(), []
    enable_activation_checkpointing(model, {"use_reentrant": False})
    assert all(layer.gradient_checkpointing for layer in model.layers)
    model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    model(**tiny_inputs(model.config)).loss.backward()
    assert len(calls) == 2


@contract(
    "priors/layers.py: activations.ACT2FN",
    "priors/attention.py: modeling_utils.ALL_ATTENTION_FUNCTIONS _attn_implementation",
    "priors/modeling_rq.py: _attn_implementation",
    "priors/layers_text_var.py: _attn_implementation",
    "priors/costs.py: _from_config",
    "priors/checks.py: _attn_implementation",
    "export/writing.py: _attn_implementation",
)
def test_attention_functions_are_looked_up_by_name():
    """`get_interface(name, default)` finds them, `register` adds to them, and configurations keep the name."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    assert functions.get_interface("eager", len) is len
    assert functions.get_interface("sdpa", len) is functions["sdpa"]
    model = VARTransformer._from_config(tiny_model().config, attn_implementation="blockwise_sdpa")
    assert model.config._attn_implementation == "blockwise_sdpa"
    assert {"gelu_pytorch_tanh", "gelu", "quick_gelu"} <= set(transformers.activations.ACT2FN)


@contract(
    "priors/attention.py: masking_utils.ALL_MASK_ATTENTION_FUNCTIONS",
    "priors/modeling_text_var.py: masking_utils.ALL_MASK_ATTENTION_FUNCTIONS masking_utils.bidirectional_mask_function",
)
def test_masks_are_made_by_name():
    """Mask functions take `q_length`, `kv_length`, the offsets and a `mask_function` of indices."""
    model = tiny_model("eager")
    mask = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
        batch_size=1,
        q_length=2,
        kv_length=3,
        q_offset=1,
        kv_offset=0,
        mask_function=lambda batch_idx, head_idx, query_idx, key_idx: key_idx <= query_idx,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=torch.float32,
        config=model.config,
        device=torch.device("cpu"),
    )
    assert mask.squeeze().tolist() == [[True, True, False], [True, True, True]]
    assert {"eager", "sdpa", "flex_attention"} <= set(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)
    mask = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"](
        batch_size=2,
        q_length=1,
        kv_length=3,
        mask_function=transformers.masking_utils.bidirectional_mask_function,
        attention_mask=torch.tensor([[True, True, False], [True, False, False]]),
        allow_is_causal_skip=False,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    least = torch.finfo(torch.float16).min
    assert mask.squeeze().tolist() == [[0, 0, least], [0, least, least]]


@contract(
    "priors/layers_text_var.py: modeling_llama.LlamaRMSNorm",
    "priors/modeling_text_var.py: modeling_llama.LlamaRMSNorm",
)
def test_the_norm_of_llama_rounds_before_it_scales():
    """It computes in fp32, rounds to the dtype of its input, and multiplies by its weight after that."""
    norm = transformers.models.llama.modeling_llama.LlamaRMSNorm(8, 1e-6)
    nn.init.normal_(norm.weight)
    states = torch.randn(3, 8, dtype=torch.bfloat16)
    exact = states.float() * (states.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = norm.weight * exact.bfloat16()
    assert torch.equal(norm(states), expected)
    assert expected.dtype == torch.float32


@contract(
    "priors/modeling_rq.py: masking_utils.create_causal_mask",
)
def test_causal_masks_are_made_where_they_are_needed():
    """The fourth argument is the cache; torch's attention needs no mask, unless `or_mask_function` adds to the causal one."""
    config, hidden_states = rq_model("classes").config, torch.zeros(1, 3, 32)
    make_mask = transformers.masking_utils.create_causal_mask
    assert make_mask(config, hidden_states, None, None) is None
    mask = make_mask(
        config, hidden_states, None, None, or_mask_function=lambda batch, head, query, key: (query < 2) & (key < 2)
    )
    assert mask.squeeze().tolist() == [[True, True, False], [True, True, False], [True, True, True]]
    cache = transformers.StaticCache(config, 4)
    cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    mask = make_mask(config, hidden_states, None, cache)
    assert mask.squeeze().tolist() == [[True, True, False, False], [True, True, True, False], [True] * 4]


@contract(
    "priors/attention.py: sdpa_attention.sdpa_attention_forward",
)
def test_the_sdpa_function_is_torchs():
    """It returns `(batch, length, heads, head_dim)`, and no weights."""
    model = tiny_model()
    query, key, value = torch.randn(3, 1, 2, 5, 16).unbind()
    module = model.layers[0].attention
    forward = transformers.integrations.sdpa_attention.sdpa_attention_forward
    attended, weights = forward(module, query, key, value, None, dropout=0.0, scaling=0.3, is_causal=False)
    expected = nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(attended, expected.transpose(1, 2))
    assert weights is None


@contract(
    "priors/cache.py: cache_utils.Cache cache_utils.CacheLayerMixin is_croppable",
    "priors/layers.py: cache_utils.Cache",
    "priors/layers_rq.py: cache_utils.Cache",
    "priors/layers_text_var.py: cache_utils.Cache",
    "priors/modeling_text_var.py: cache_utils.Cache",
    "priors/modeling_blocks.py: cache_utils.Cache",
    "priors/modeling_var.py: cache_utils.Cache",
    "priors/modeling_rq.py: cache_utils.Cache cache_utils.DynamicCache",
)
def test_caches_are_made_of_layers():
    """`Cache(layers=...)` hands `update`, `get_seq_length`, `get_mask_sizes`, `reset` and the selections to its layers."""
    model = tiny_model()
    cache = VARCache(model.config)
    keys = torch.randn(2, 2, 5, 16)
    assert cache.update(keys, keys, 1)[0].equal(keys)
    assert (cache.get_seq_length(1), cache.get_seq_length(0), cache.get_mask_sizes(1, 1)) == (5, 0, (6, 0))
    assert not set(transformers.cache_utils.CacheLayerMixin.__abstractmethods__) - set(dir(type(cache.layers[0])))
    cache.update(keys, keys, 0)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.batch_size == 1
    cache.reset()
    assert cache.get_seq_length(1) == 0
    assert transformers.DynamicCache().get_mask_sizes(1, 0) == (1, 0)


@contract(
    "priors/modeling_blocks.py: _init_weights initialization _supports_sdpa _supports_flash_attn _supports_flex_attn _supports_attention_backend _can_compile_fullgraph _input_embed_layer _skip_keys_device_placement accepts_loss_kwargs",
    "priors/modeling_var.py: _init_weights initialization _no_split_modules",
    "priors/modeling_text_var.py: _init_weights initialization _no_split_modules",
    "priors/modeling_rq.py: _supports_sdpa _supports_flash_attn _supports_flex_attn _supports_attention_backend _can_compile_fullgraph _input_embed_layer _no_split_modules _skip_keys_device_placement accepts_loss_kwargs",
    "autoencoders/modeling_vqvae.py: _init_weights initialization _keep_in_fp32_modules_strict",
    "autoencoders/modeling_hierarchical_vqvae.py: _init_weights _keep_in_fp32_modules_strict",
    "priors/modeling_pixel_prior.py: _can_compile_fullgraph _skip_keys_device_placement",
    "priors/modeling_pixelcnn.py: _init_weights initialization _input_embed_layer _no_split_modules",
    "priors/modeling_pixelsnail.py: _init_weights initialization _no_split_modules",
    "training/discriminators.py: _init_weights",
    "priors/configuration_var.py: keys_to_ignore_at_inference",
    "priors/configuration_rq.py: keys_to_ignore_at_inference",
    "priors/configuration_text_var.py: keys_to_ignore_at_inference",
)
def test_attributes_of_models_are_those_that_transformers_reads():
    """`PreTrainedModel` declares them, and `transformers.initialization` draws weights that were not loaded."""
    names = """_init_weights _supports_sdpa _supports_flash_attn _supports_flex_attn _supports_attention_backend
        _can_compile_fullgraph _input_embed_layer _no_split_modules _skip_keys_device_placement _can_record_outputs
        _keep_in_fp32_modules_strict"""
    source = inspect.getsource(transformers.modeling_utils)
    assert not [name for name in names.split() if name not in source]
    trainer = inspect.getsource(transformers.Trainer)
    assert "keys_to_ignore_at_inference" in trainer
    assert "unwrapped_model.accepts_loss_kwargs" in trainer
    weight = torch.empty(4)
    initialization.constant_(weight, 2.0)
    assert weight.tolist() == [2.0] * 4
    loaded = nn.Parameter(torch.zeros(4))
    loaded._is_hf_initialized = True
    initialization.constant_(loaded, 2.0)
    assert loaded.tolist() == [0.0] * 4


@contract(
    "adapter_files.py: hub.cached_file _raise_exceptions_for_missing_entries",
    "cli/exporting.py: _raise_exceptions_for_missing_entries",
    "pipelines/lora.py: hub.DownloadKwargs",
)
def test_files_are_found_in_folders_and_repositories(tmp_path):
    """`cached_file` takes `DownloadKwargs`, and returns None for a missing file if told so."""
    from transformers.utils.hub import DownloadKwargs, cached_file

    (tmp_path / "here.json").write_text("{}")
    assert Path(cached_file(tmp_path, "here.json", revision=None)) == tmp_path / "here.json"
    assert cached_file(tmp_path, "gone.json", _raise_exceptions_for_missing_entries=False) is None
    assert {"revision", "token", "subfolder", "cache_dir"} <= DownloadKwargs.__annotations__.keys()


@contract(
    "pipelines/adapters.py: _hf_peft_config_loaded _weight_conversions",
    "pipelines/lora.py: check_peft_version",
    "compatibility.py: _hf_peft_config_loaded",
)
def test_transformers_asks_one_attribute_for_adapters():
    """A model with `_hf_peft_config_loaded` is saved as an adapter; loading may leave `_weight_conversions` behind."""
    assert transformers.PreTrainedModel._hf_peft_config_loaded is False
    assert "_hf_peft_config_loaded" in inspect.getsource(transformers.PreTrainedModel.save_pretrained)
    assert "_weight_conversions" in inspect.getsource(transformers.core_model_loading)
    with pytest.raises(ValueError, match="PEFT"):
        transformers.utils.check_peft_version(min_version="999")


# --------------------------------------------------------------------------------------------------------------------
# diffusers


@contract(
    "registration.py: pipelines.pipeline_loading_utils LOADABLE_CLASSES",
)
def test_pipelines_and_components_are_registered(tmp_path):
    """Setting `LOADABLE_CLASSES`, `diffusers.pipelines.hf_var` and `diffusers.VARPipeline` makes folders loadable."""
    make_pipeline().save_pretrained(tmp_path)
    index = diffusers.DiffusionPipeline.load_config(tmp_path)
    assert index["transformer"] == ["hf_var", "VARTransformer"]
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is VARPipeline


@contract(
    "registration.py: auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "registration.py: auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING",
)
def test_auto_pipelines_choose_from_dictionaries():
    """Classes with the same key are one model for several tasks, and are found by the name of any of them."""
    from diffusers.pipelines import auto_pipeline

    tasks = ("TEXT2IMAGE", "IMAGE2IMAGE", "INPAINT")
    mappings = [getattr(auto_pipeline, f"AUTO_{task}_PIPELINES_MAPPING") for task in tasks]
    names = ["VARTextToImagePipeline", "VARTextImg2ImgPipeline", "VARTextInpaintPipeline"]
    assert [mapping["hf-var-text"].__name__ for mapping in mappings] == names
    assert all(any(mapping is known for known in auto_pipeline.SUPPORTED_TASKS_MAPPINGS) for mapping in mappings)


@contract("training/autoencoder_kl.py: vae.DiagonalGaussianDistribution")
def test_a_posterior_is_made_of_its_moments():
    """`AutoencoderKL.encode` returns a `DiagonalGaussianDistribution` of the means and log-variances in `parameters`."""
    posterior = diffusers.AutoencoderKL().encode(torch.zeros(1, 3, 8, 8), return_dict=False)[0]
    again = DiagonalGaussianDistribution(posterior.parameters)
    assert type(posterior) is DiagonalGaussianDistribution
    assert torch.equal(again.kl(), posterior.kl())


@contract(
    "evaluation/run.py: _class_name",
    "pipelines/base.py: _class_name _name_or_path",
)
def test_a_pipelines_configuration_names_class_and_origin(tmp_path):
    """`model_index.json` has `_class_name`, and a loaded pipeline's configuration `_name_or_path`."""
    make_pipeline().save_pretrained(tmp_path)
    assert VARPipeline.load_config(tmp_path)["_class_name"] == "VARPipeline"
    assert VARPipeline.from_pretrained(str(tmp_path)).config["_name_or_path"] == str(tmp_path)


@contract(
    "pipelines/base.py: _execution_device _guidance_scale _interrupt",
    "pipelines/previews.py: _interrupt",
    "pipelines/pipeline_base.py: _execution_device model_cpu_offload_seq",
    "pipelines/pipeline_var.py: _execution_device _callback_tensor_inputs",
    "pipelines/pipeline_ar.py: _execution_device _optional_components",
    "pipelines/pipeline_var_text.py: _execution_device _optional_components",
    "scoring.py: _execution_device",
)
def test_what_diffusers_asks_pipelines_for_and_tells_them():
    """
    `_execution_device` is where inputs go, also with offloading; callbacks name one of `_callback_tensor_inputs`, and set
    `_guidance_scale` and `_interrupt`. What `_optional_components` names need not be saved.
    """
    assert "pipeline._guidance_scale = " in inspect.getsource(diffusers.callbacks)
    pipe = make_pipeline()
    assert pipe._execution_device == torch.device("cpu")
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe._execution_device.type == "cpu"
    assert hasattr(pipe.transformer, "_hf_hook")
    source = inspect.getsource(diffusers.DiffusionPipeline)
    assert not [name for name in ("model_cpu_offload_seq", "_optional_components") if name not in source]


@contract(
    "registration.py: auto_pipeline.SUPPORTED_TASKS_MAPPINGS modular_pipeline.MODULAR_PIPELINE_MAPPING",
    "modular/modular_pipeline.py: _dict_to_component_spec",
    "modular/modular_blocks_var.py: _workflow_map",
    "modular/before_denoise.py: _execution_device",
    "modular/denoise.py: _execution_device",
    "modular/encoders.py: _execution_device",
)
def test_modular_pipelines_are_found_by_the_name_of_a_model():
    """
    The class of a pipeline has a model's name in one of the mappings of tasks, this name a function of `model_index.json` that
    returns the name of a class of `diffusers`, and that class the name of its blocks. A component of `model_index.json`
    is a specification with the folder under `repo`.
    """
    from diffusers.modular_pipelines import modular_pipeline
    from diffusers.pipelines import auto_pipeline

    for pipeline_class in (VARPipeline, hf_var.VARInpaintPipeline, hf_var.VARImg2ImgPipeline):
        assert auto_pipeline._get_model(pipeline_class.__name__) == "hf-var"
    assert auto_pipeline._get_model("VARTextInpaintPipeline") == "hf-var-text"
    assert modular_pipeline.MODULAR_PIPELINE_MAPPING["hf-var"]({}) == "VARModularPipeline"
    pipe = hf_var.VARAutoBlocks().init_pipeline()
    assert type(pipe) is hf_var.VARModularPipeline
    assert pipe._execution_device == torch.device("cpu")
    assert pipe.blocks.available_workflows == list(hf_var.VARAutoBlocks._workflow_map)
    spec = {"repo": Path("folder"), "subfolder": "vqvae", "type_hint": ("hf_var", "VQVAEModel")}
    found = pipe._dict_to_component_spec("vqvae", spec)
    assert (found.pretrained_model_name_or_path, found.type_hint) == ("folder", VQVAEModel)
    absent = pipe._dict_to_component_spec("vqvae", {**spec, "type_hint": (None, None)})
    assert (absent.pretrained_model_name_or_path, absent.type_hint) == (None, None)


@contract(
    "autoencoders/modeling_vqvae.py: accelerate_utils.apply_forward_hook _group_offload_block_modules _hf_hook",
    "autoencoders/token_maps.py: accelerate_utils.apply_forward_hook",
    "autoencoders/modeling_hierarchical_vqvae.py: accelerate_utils.apply_forward_hook _group_offload_block_modules",
    "priors/modeling_var.py: _hf_hook",
)
def test_methods_with_the_decorator_bring_weights_back():
    """`apply_forward_hook` runs `_hf_hook.pre_forward` of Accelerate before methods other than `forward`."""
    vqvae, calls = make_pipeline().vqvae, []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(vqvae, Hook())
    assert isinstance(vqvae._hf_hook, Hook)
    vqvae.decode(latents=torch.zeros(1, vqvae.config.latent_channels, *vqvae.config.patch_nums[-1:] * 2))
    assert calls == [vqvae]
    source = Path(inspect.getfile(diffusers.hooks.group_offloading)).read_text(encoding="utf-8")
    assert "_group_offload_block_modules" in source


@contract(
    "pipelines/lora.py: _diffusers_hook",
)
def test_offloaded_layers_are_known_by_their_hook():
    """Group offloading and layerwise casting leave `_diffusers_hook` on modules."""
    transformer = tiny_model()
    diffusers.hooks.apply_group_offloading(transformer, torch.device("cpu"), offload_type="leaf_level")
    assert any(hasattr(module, "_diffusers_hook") for module in transformer.modules())


@contract(
    "pipelines/adapters.py: set_weights_and_activate_adapters",
    "pipelines/lora.py: get_adapter_name lora_base.LoraBaseMixin _lora_loadable_modules _merged_adapters",
    "training/average.py: shadow_params",
)
def test_helpers_for_adapters_and_averages():
    """
    Names are `default_0` and so on, pipelines with adapters have `_lora_loadable_modules` and count `_merged_adapters`, and
    `EMAModel` keeps `shadow_params` in its state.
    """
    transformer = tiny_model()
    assert diffusers.utils.get_adapter_name(transformer) == "default_0"
    diffusers.utils.set_weights_and_activate_adapters(transformer, [], [])
    pipe = make_pipeline()
    pipe._merged_adapters = {"style"}
    assert (pipe.num_fused_loras, pipe.fused_loras, pipe._lora_loadable_modules) == (1, {"style"}, ["transformer"])
    average = diffusers.training_utils.EMAModel(list(transformer.parameters()))
    assert average.state_dict()["shadow_params"] is average.shadow_params


# --------------------------------------------------------------------------------------------------------------------
# PEFT


@contract(
    "pipelines/adapters.py: modules_to_save original_module base_layer delete_adapter active_adapters scaling merged",
    "pipelines/adapters.py: adapter_layer_names enable_adapters",
    "compatibility.py: inject_adapter_in_model",
)
def test_adapters_are_injected_and_found():
    """Layers with adapters have `base_layer`, modules trained whole `original_module` and `modules_to_save`."""
    from peft import LoraConfig, get_peft_model_state_dict

    from hf_var.compatibility import add_adapter

    transformer = tiny_model()
    plain, table = transformer.layers[0].mlp.fc1, transformer.embeddings.class_embedding
    for name in ("a", "b"):
        add_adapter(transformer, LoraConfig(target_modules=["fc1"], modules_to_save=["class_embedding"]), name)
    layer, embedding = transformer.layers[0].mlp.fc1, transformer.embeddings.class_embedding
    assert layer.base_layer is layer.get_base_layer() is plain
    assert embedding.original_module is table
    assert set(embedding.modules_to_save) == set(transformer.peft_config) == {"a", "b"}
    assert "embeddings.class_embedding.weight" in get_peft_model_state_dict(
        transformer, adapter_name="a", save_embedding_layers=False
    )
    layer.set_adapter(["a"])
    layer.delete_adapter("b")
    assert list(layer.lora_A) == list(layer.r) == list(layer.active_adapters) == ["a"]
    embedding.set_adapter([])
    assert list(embedding.active_adapters) == []
    assert embedding.check_set_adapter(["a"]) == "a"
    assert set(embedding.adapter_layer_names) == {"modules_to_save"}
    assert {"lora_A", "lora_B", "lora_magnitude_vector"} <= set(layer.adapter_layer_names)
    weight = plain.weight.detach().clone()
    nn.init.ones_(layer.lora_B["a"].weight)
    layer.scaling["a"] *= 2
    layer.merge(safe_merge=False, adapter_names=["a"])
    assert layer.merged
    assert layer.base_layer is plain
    assert torch.allclose(plain.weight, weight + layer.get_delta_weight("a"))
    for wrapper in (layer, embedding):
        wrapper.enable_adapters(False)
        assert wrapper.disable_adapters


# --------------------------------------------------------------------------------------------------------------------
# accelerate and datasets


@contract(
    "training/accelerator.py: ACCELERATE_USE_FSDP fsdp_version mixed_precision_policy use_regional_compilation zero_stage deepspeed_config",
)
def test_accelerates_plugins_can_be_changed_after_they_were_made():
    """FSDP2's plugin has a settable `mixed_precision_policy`, the environment says whether there is one."""
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
    assert plugin.fsdp_version == 2
    plugin.mixed_precision_policy = policy = torch.distributed.fsdp.MixedPrecisionPolicy(torch.bfloat16)
    assert plugin.mixed_precision_policy is policy
    accelerate.utils.TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
    assert "ACCELERATE_USE_FSDP" in inspect.getsource(accelerate.accelerator) + inspect.getsource(accelerate.state)
    fields = inspect.signature(accelerate.DeepSpeedPlugin).parameters
    assert "zero_stage" in fields
    assert "self.deepspeed_config" in inspect.getsource(accelerate.DeepSpeedPlugin)


@contract(
    "data/sources.py: _resolve_features decode",
    "data/work_units.py: num_shards reshard",
)
def test_streams_know_their_columns_and_shards():
    """`_resolve_features` reads the columns off the first rows, `decode(False)` leaves images encoded."""
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"x": 1}, {"x": 2}]))
    assert stream.features is None
    assert list(stream._resolve_features().features) == ["x"]
    assert stream.num_shards == 1
    assert callable(stream.reshard)
    images = datasets.Dataset.from_dict({"image": [png()]}).cast_column("image", datasets.Image())
    row = next(iter(images.to_iterable_dataset().decode(False)))
    assert row["image"]["bytes"] == png()["bytes"]


def png():
    buffer = io.BytesIO()
    diffusers.utils.numpy_to_pil(np.zeros((1, 2, 2, 3)))[0].save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


@contract(
    "data/sources.py: EMPTY_MESSAGES",
)
def test_what_datasets_says_of_empty_files(tmp_path):
    """An empty source is known by the words of the error."""
    from hf_var.data.sources import load_source

    (tmp_path / "train.csv").write_text("label\n")
    with pytest.raises(ValueError, match="is empty"):
        load_source("train_data", str(tmp_path), None, ("train",))


@contract(
    "evaluation/image_sets.py: _fingerprint",
    "data/folders.py: imagefolder.ImageFolder EXTENSIONS METADATA_FILENAMES",
)
def test_datasets_of_images_have_endings_and_a_fingerprint():
    """`ImageFolder` lists endings of images and names of metadata; `_fingerprint` is of what a data set was made from."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    assert {".png", ".jpg", ".webp"} <= set(ImageFolder.EXTENSIONS)
    assert "metadata.csv" in ImageFolder.METADATA_FILENAMES
    first, second = (datasets.Dataset.from_dict({"x": values})._fingerprint for values in ([1], [2]))
    assert first != second
    assert isinstance(first, str)


@contract("attention_backends.py: _native_math _flash_3 _supports_attention_backend")
def test_the_names_of_attention_backends():
    """diffusers' models have the methods, its enumeration the names, and transformers' models say if they have a choice."""
    for method in ("set_attention_backend", "reset_attention_backend"):
        assert hasattr(diffusers.ModelMixin, method)
    assert ATTENTION_BACKENDS.keys() <= {backend.value for backend in AttentionBackendName}
    assert PreTrainedModel._supports_attention_backend is False


# --------------------------------------------------------------------------------------------------------------------
# torch


@contract(
    "pipelines/compilation.py: inductor_config _dynamo _forward_hooks _forward_pre_hooks _version _orig_mod",
    "pipelines/lora.py: _orig_mod",
)
def test_the_compilers_switches_and_what_it_wraps():
    """Inductor has `freezing`, Dynamo marks sizes and addresses; wrapped models are in `_orig_mod`."""
    import torch._inductor.config as inductor_config

    assert not inductor_config.freezing
    with inductor_config.patch(freezing=True):
        assert inductor_config.freezing
    assert callable(torch._dynamo.mark_dynamic)
    assert callable(torch._dynamo.mark_static_address)
    module = nn.Linear(2, 2)
    assert torch.compile(module)._orig_mod is module
    before = module.weight._version
    with torch.no_grad():
        module.weight.add_(1)
    assert module.weight._version > before
    handle = module.register_forward_hook(lambda *_: None)
    assert len(module._forward_hooks) == 1
    handle.remove()
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@contract(
    "autoencoders/modeling_vqvae.py: _no_split_modules",
    "autoencoders/modeling_hierarchical_vqvae.py: _no_split_modules",
)
def test_layers_that_are_not_split_are_named_by_their_class():
    """Accelerate looks for names of classes in `_no_split_modules`."""
    for model_class in (VARTransformer, VQVAEModel):
        names = {type(module).__name__ for module in make_parts() for module in module.modules()}
        assert set(model_class._no_split_modules) <= names


def make_parts():
    pipe = make_pipeline()
    return [pipe.transformer, pipe.vqvae]


# --------------------------------------------------------------------------------------------------------------------
# The list is whole


def private_names(tree):
    """Underscored attributes, strings and attributes of classes; without those that the package defines and reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value
        elif isinstance(node, ast.ClassDef):
            for statement in node.body:
                if isinstance(statement, ast.Assign):
                    yield from (ast.unparse(target) for target in statement.targets)
                elif isinstance(statement, ast.FunctionDef):
                    yield statement.name


def own_names(tree):
    """What the package defines for itself: functions, and attributes that a method sets."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "_init_weights":
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (part for each in targets for part in ast.walk(each)):
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                    yield target.attr
                elif isinstance(target, ast.Name) and isinstance(node, ast.AnnAssign):
                    yield target.id


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCES.rglob("*.py"))}
OWN = {name for tree in TREES.values() for name in own_names(tree)} | OURS


def found_in(tree):
    """Private names and undocumented modules of the libraries that a file uses."""
    found = {name for name in private_names(tree) if name.startswith("_") and name.strip("_") and name[1] != "_"} - OWN
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.partition(".")[0] in LIBRARIES:
            if "." in node.module and node.module not in DOCUMENTED:
                found.update(f"{node.module.rpartition('.')[2]}.{alias.name}" for alias in node.names)
    return found


def listed_for(where):
    return LISTED.get(where, set())


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.relative_to(SOURCES).as_posix())
def test_everything_private_is_listed(path):
    where = path.relative_to(SOURCES).as_posix()
    unlisted = found_in(TREES[path]) - listed_for(where)
    assert not unlisted, f"src/hf_var/{where} relies on {sorted(unlisted)}: add a contract test, or do without"


@pytest.mark.parametrize("where", sorted(LISTED))
def test_everything_listed_is_used(where):
    source = (SOURCES / where).read_text(encoding="utf-8")
    assert not [name for name in LISTED[where] if name.rpartition(".")[2] not in source]


def test_the_scan_sees_what_it_should():
    statements = """
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

class Model:
    _no_split_modules = ["Layer"]

    def forward(self):
        return self._execution_device, getattr(self, "_hf_hook"), self._own
"""
    assert found_in(ast.parse(statements)) - {"_own"} == {
        "masking_utils.sdpa_mask",
        "_no_split_modules",
        "_execution_device",
        "_hf_hook",
    }
