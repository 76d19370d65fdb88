# SPDX-License-Identifier: Apache-2.0
"""
Loading of our own folders and repositories, as transformers does it, but whole: what is missing, left over, of another
shape or kind, or not a number is refused, where transformers would go on with random weights and a warning.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .weight_files import check_finite_weights, listing, read_shapes, use_umask


# Where files are looked for; the other arguments of `from_pretrained` are about the model.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Not fields of the configuration, although transformers keeps some of them there.
MODEL_ARGUMENTS = ("dtype", "quantization_config", "torch_dtype")
# In a `config.json`, these would choose other weights or download code.
FORBIDDEN_FIELDS = ("attn_implementation", "experts_implementation", "transformers_weights")
# Fields that say how many modules there are. Each has a weight.
NUMBERS_OF_MODULES = re.compile(r"num_\w*(layers|blocks|convs)|channel_multipliers")
FLOATS = ("F16", "BF16", "F32", "F64")
# What values of a wrong type or without bounds may cause.
BROKEN = (ArithmeticError, AttributeError, LookupError, TypeError)
MAX_TOKENS = 2**24


class CheckedConfigMixin:
    """Configurations that are read from files of their own kind only."""

    model_type: str

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        name = pretrained_model_name_or_path
        fields, kwargs = read_fields(name, **kwargs)
        if fields.get("model_type") != cls.model_type:
            raise ValueError(
                f"{str(name)!r} holds a model of type {fields.get('model_type')!r}, but {cls.__name__} needs "
                f"{cls.model_type!r}: pass the folder or repository of such a model."
            )
        return fields, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Any:
        # Also the way of `AutoConfig`.
        for field, value in config_dict.items():
            if value is not None and field.lstrip("_").startswith(FORBIDDEN_FIELDS):
                raise ValueError(f"`{field}` must not be in config.json: pass it to `from_pretrained` instead.")
        dtype = config_dict.get("dtype", config_dict.get("torch_dtype"))
        known = getattr(torch, str(dtype).removeprefix("torch."), None)
        if dtype is not None and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise ValueError(f"`dtype` in config.json must be a floating-point type such as 'float32', got {dtype!r}.")
        try:
            return super().from_dict(config_dict, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except BROKEN as error:
            raise ValueError(
                f"config.json must hold values of the right types for {cls.__name__}: {error}."
            ) from error


class CheckedModelMixin:
    """
    Models whose `from_pretrained` loads safetensors only, and all weights or none, and whose files have the usual mode.

    What it refuses with a `ValueError`: the folder of another kind of model; weights that are missing, left over, of
    another shape, or hold NaN or infinite values; a configuration that is too large for the weights, before anything is
    allocated; and an index that names files elsewhere. `ignore_mismatched_sizes=True` lets other shapes pass.
    """

    config_class: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args,
        config: Any = None,
        ignore_mismatched_sizes: bool = False,
        use_safetensors: bool | None = None,
        output_loading_info: bool = False,
        **kwargs,
    ) -> Any:
        name = pretrained_model_name_or_path
        if use_safetensors is False:
            raise ValueError("`use_safetensors` must be True: weights in pickles (.bin) are not read.")
        if name is not None:
            config, kwargs = cls._check_files(name, config, ignore_mismatched_sizes, kwargs)
        model, info = super().from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]
            name,
            *model_args,
            config=config,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
        # Quantized weights have other names in the file, so that only transformers can compare them.
        mismatched = [] if ignore_mismatched_sizes else [key for key, *_ in info["mismatched_keys"]]
        _check_names(f"{str(name)!r}", info["missing_keys"], info["unexpected_keys"], mismatched)
        check_finite_weights(model.state_dict(), f"{str(name)!r}")
        return (model, info) if output_loading_info else model

    # diffusers reads off the signature which arguments it may pass.
    @wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        super().save_pretrained(save_directory, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if os.path.isdir(save_directory):
            use_umask(save_directory)

    @classmethod
    def _check_files(cls, name: Any, config: Any, ignore_mismatched_sizes: bool, kwargs: dict) -> tuple[Any, dict]:
        """The configuration, and the arguments that remain, once the headers of the weight files have been compared."""
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        model = {key: kwargs.pop(key) for key in MODEL_ARGUMENTS if key in kwargs}
        fields: Mapping[str, Any]
        if isinstance(config, PreTrainedConfig):
            fields = config.to_dict()
        else:
            fields, kwargs = cls.config_class.get_config_dict(name if config is None else config, **hub, **kwargs)
        paths = _weight_files(name, kwargs.get("variant"), hub)
        found = read_shapes(paths)
        num_bits = 8 * sum(os.path.getsize(path) for path in paths)
        _check_numbers(name, {**fields, **kwargs}, len(found), num_bits)
        if not isinstance(config, PreTrainedConfig):
            config, kwargs = cls.config_class.from_dict(dict(fields), return_unused_kwargs=True, **kwargs)
        if (tokens := sum(getattr(config, "scale_lengths", []))) > MAX_TOKENS:
            raise ValueError(f"`patch_nums` of {str(name)!r} must be at most {MAX_TOKENS} tokens, got {tokens}.")
        model_class: Any = cls
        try:
            with torch.device("meta"):
                expected = model_class(copy.deepcopy(config)).state_dict()
        except (*BROKEN, RuntimeError) as error:
            raise ValueError(
                f"config.json of {str(name)!r} must describe a model, got one that fails: {error}."
            ) from error
        if sum(weight.numel() for weight in expected.values()) > num_bits:
            raise ValueError(f"config.json of {str(name)!r} describes a model that is larger than its weight files.")
        if getattr(config, "quantization_config", None) is None and "key_mapping" not in kwargs:
            wrong = []
            for key in expected.keys() & found.keys():
                shape, dtype = found[key]
                fits = shape == tuple(expected[key].shape) or ignore_mismatched_sizes
                if not fits or (dtype in FLOATS) != expected[key].is_floating_point():
                    wrong.append(f"{key}: {dtype} {shape} instead of {tuple(expected[key].shape)}")
            _check_names(f"{str(name)!r}", expected.keys() - found.keys(), found.keys() - expected.keys(), wrong)
        hub.pop("force_download", None)  # it is done
        return config, {**hub, **model, **kwargs}


def read_fields(name: Any, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    The content of a `config.json`, and the arguments that do not say where it is.

    Raises:
        `ValueError`: If it is none, or if this is the folder of a pipeline.
    """
    if os.path.isfile(str(name)) and not str(name).endswith(".json"):
        raise ValueError(
            f"{str(name)!r} is a file: pass the folder of a model, with config.json and model.safetensors."
        )
    folder = Path(str(name), kwargs.get("subfolder") or "")
    if (folder / "model_index.json").is_file() and not (folder / "config.json").is_file():
        parts = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        raise ValueError(f"{str(folder)!r} holds a pipeline: pass the folder of one of its models, {listing(parts)}.")
    try:
        fields, kwargs = PreTrainedConfig.get_config_dict(name, **kwargs)
        # Whatever it holds, it must have the methods of a dictionary.
        return dict(fields.items()), kwargs
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        detail = str(error).partition("\n")[0]
        raise ValueError(f"config.json of {str(name)!r} must hold fields and their values: {detail}.") from error


def _weight_files(name: Any, variant: str | None, hub: dict) -> list[str]:
    """Local paths of the safetensors files of a folder or repository."""
    for file in ("model.safetensors", "model.safetensors.index.json"):
        stem, _, suffix = file.rpartition(".")
        file = file if variant is None else f"{stem}.{variant}.{suffix}"
        try:
            path = cached_file(name, file, **hub)
        except OSError:
            continue
        if suffix == "safetensors":
            return [str(path)]
        return [str(cached_file(name, shard, **hub)) for shard in _shards(str(path))]
    raise ValueError(
        f"{str(name)!r} must hold its weights as model.safetensors or in shards of it"
        f"{'' if variant is None else f', as variant {variant!r}'}: save the model with `save_pretrained`, since pickles "
        "(.bin) are not read."
    )


def _shards(index_path: str) -> list[str]:
    """The names of the files in an index, which lie in the same folder."""
    try:
        index = json.loads(Path(index_path).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        valid = isinstance(index["metadata"], dict) and len(shards) > 0
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        valid, shards = False, []
    if not valid:
        raise ValueError(f"{index_path!r} must be an index with `metadata` and `weight_map`: save the model again.")
    foreign = [shard for shard in shards if not re.fullmatch(r"[^/\\:]+\.safetensors", str(shard))]
    if foreign:
        raise ValueError(f"{index_path!r} must name .safetensors files of its own folder, got {listing(foreign)}.")
    return shards


def _check_numbers(name: Any, fields: Mapping[str, Any], num_tensors: int, num_bits: int) -> None:
    """Raise a `ValueError` for a size that the weights cannot have: a weight takes a bit at least."""
    for field, value in fields.items():
        amount = len(value) if isinstance(value, (list, tuple)) else value
        if NUMBERS_OF_MODULES.fullmatch(field) and isinstance(amount, int) and amount > num_tensors:
            raise ValueError(f"`{field}` of {str(name)!r} is {amount}, too large for files of {num_tensors} weights.")
        # Small files may have large defaults beside them.
        largest = max(map(abs, _integers_in(value)), default=0)
        if largest > max(num_bits, 2**16):
            raise ValueError(f"`{field}` of {str(name)!r} is {largest}, too large for files of {num_bits // 8} bytes.")


def _integers_in(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _integers_in(element)


def _check_names(source: str, missing: Any, left_over: Any, mismatched: Any) -> None:
    """Raise a `ValueError` unless all collections of names are empty."""
    kinds = {"missing": missing, "left over": left_over, "of another shape or type": mismatched}
    found = [f"{kind} {listing(list(names))}" for kind, names in kinds.items() if names]
    if found:
        remedy = (
            "pass `ignore_mismatched_sizes=True` for new weights of these" if mismatched else "save the model again"
        )
        raise ValueError(f"The weights of {source} do not fit its config.json: {', '.join(found)}; {remedy}.")
