"""Single-file checkpoints: one safetensors file with the names of the original repositories (ldm, sgm, SD3, Flux).

`diffusers` knows how those names become its own. Its converters take a whole state dict of tensors; here they get
stand-ins that hold only a shape and note what is done to them (`_Deferred`). So names and shapes are compared from the
file's header alone, and then each tensor is read, converted, cast and moved by itself: host memory never holds a second
copy, though converters split, join and transpose.

A file says nothing of its architecture's numbers or of its tokenizer. The numbers are those of the preset that the file
is recognised as (`fastsd.presets`), without network; the tokenizer is in the hub's cache or the caller's `config`.
"""

from __future__ import annotations

import logging
import operator
import os
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastsd import checkpoint, tokenizer
from fastsd.errors import InputError
from fastsd.files import PICKLES, few, list_folder, one_line
from fastsd.hub import MOVED, one_revision, refuse_hub, transport_errors
from fastsd.presets import PRESETS, Preset
from fastsd.tensors import open_file, read_header
from fastsd.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# diffusers' name of a model type -> ours. What tells SDXL-Turbo from SDXL, or the base of SD 2.1 from its 768-v, is not
# in a file: as in diffusers it is taken for the first of them that was published, and `config` says otherwise.
_TYPES = {
    "v1": "sd15",
    "v2": "sd21",
    "xl_base": "sdxl",
    "sd3": "sd3-medium",
    "sd35_medium": "sd35-medium",
    "sd35_large": "sd35-large",
    "flux-schnell": "flux-schnell",
    "flux-dev": "flux-dev",
}

_DENOISER = "model.diffusion_model."
# Class of the denoiser -> its component, and a tensor that only its files have.
_LAYOUTS = {
    "UNet2DConditionModel": ("unet", "input_blocks.0.0.weight"),
    "SD3Transformer2DModel": ("transformer", "joint_blocks.0.x_block.attn.qkv.weight"),
    "FluxTransformer2DModel": ("transformer", "double_blocks.0.img_attn.qkv.weight"),
}
# Component, or class where that decides -> the prefixes that its tensors can have.
_PREFIXES = {
    "unet": (_DENOISER,),
    "transformer": (_DENOISER,),
    "vae": ("vae.", "first_stage_model."),  # diffusers' order
    "text_encoder": (
        "cond_stage_model.transformer.",  # SD 1.x
        "cond_stage_model.model.",  # SD 2.x
        "conditioner.embedders.0.transformer.",  # SDXL
        "text_encoders.clip_l.transformer.",  # SD3, Flux
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "text_encoders.clip_g.transformer."),
    "T5EncoderModel": ("text_encoders.t5xxl.transformer.",),
}
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")  # the others have the names of transformers

# Of training or of other uses of the same encoder: left out where the module has no place for it.
_UNUSED = re.compile(r"position_ids$|logit_scale$|text_projection(\.weight)?$|^(first_stage_model|vae)\.loss\.")

_QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale(_2)?|scale_input|input_scale|comfy_quant|quant_map|absmax"
    r"|quant_state\..*|qweight|qzeros|wscales|SCB)$"
)
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# What else a safetensors file can be, by the names in it; the first that fits.
_OTHERS = {
    r"lora_(up|down|A|B|unet|te)|\.lora\.|\.hada_w\d|\.lokr_w\d": "a LoRA: load its base model, then this by load_lora",
    r"^control_model\.|^controlnet_|^control_(blocks|all)|^(zero|input_hint)_": "a ControlNet without its base model",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter without its base model",
    r"^(emb_params|clip_[lg])$|^<.*>$": "a textual inversion without its base model",
    r"^(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks|add_embedding)\.": (
        "one component in the diffusers layout: pass the folder of its whole checkpoint to Pipeline.from_pretrained"
    ),
    r"^((vae|first_stage_model)\.)?(encoder|decoder)\.(conv_in|down|mid|up)": "a VAE without a denoiser",
    r"(^|\.)text_model\.|(^|\.)encoder\.block\.|(^|\.)resblocks\.": "a text encoder without a denoiser",
}

_CONFIG = "a folder in the diffusers layout, a preset or a hub id"


class _Origin(NamedTuple):
    """Where all that is not in the file comes from.

    A preset that the caller named may be downloaded (its configurations and tokenizers); one that only the file was
    recognised as is looked for in the hub's cache.
    """

    preset: Preset | None
    folder: Path | None  # in the diffusers layout, possibly in part; wins over the preset
    named: bool  # by the caller


def source(path: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None) -> checkpoint.Source:
    """A single-file checkpoint of Stable Diffusion 1.x or 2.x, SDXL, SD3, SD3.5 or Flux.1 in its original layout.

    Components that the file lacks (all but the denoiser can be absent) are read from `config`, or else from the
    preset's copy in the hub's cache; SD3 runs without its T5.

    Args:
        path: a safetensors file; float8 tensors are cast as all others.
        config: where architecture, scheduler, tokenizers and absent components come from: a folder in the diffusers
            layout (it may hold only some components), a preset, or a hub id (org/name[@revision]) of which
            configurations and tokenizers are downloaded. None: the preset that the file is recognised as by
            `diffusers.loaders.single_file_utils.infer_diffusers_model_type`. An SD 2.x file is then v-prediction
            (768-v) and an SDXL file is no Turbo; SDXL files with the mark `v_pred` are v-prediction.

    Raises:
        InputError: the file is missing, a pickle, broken, quantised or none of these models; it lacks components
            that `config` lacks, too. The functions of the result raise it for tensors that do not fit the
            configuration and for an absent tokenizer.
    """
    path = Path(os.path.expanduser(path))
    tensors = _open(path)
    kind, class_name = _recognise(path, tensors)
    origin = _origin(path, kind, class_name, config)
    index = _index(path, class_name, origin, config)

    @cache
    def local() -> Path | None:
        """The folder with tokenizers and absent components."""
        if origin.folder is not None or origin.preset is None or origin.preset.hub is None:
            return origin.folder
        return _configurations(origin.preset.hub, None) if origin.named else _cached(origin.preset.hub)

    prefixes: dict[str, str] = {}  # of the tensors of each component in the file
    elsewhere: dict[str, Path] = {}  # where the weights of the others are
    absent: list[str] = []
    for component in checkpoint.loaded_components(index):
        if not checkpoint.has_weights(index, component):
            continue
        known = _PREFIXES.get(index[component][1]) or _PREFIXES.get(component, ())
        prefix = next((prefix for prefix in known if any(name.startswith(prefix) for name in tensors)), None)
        # What can be left out is taken from where the caller says, not from what happens to be cached.
        optional = component in checkpoint.OPTIONAL
        if prefix is not None:
            prefixes[component] = prefix
        elif (folder := origin.folder if optional else local()) is not None and _holds_weights(folder, component):
            elsewhere[component] = folder
        elif not optional:
            absent.append(component)
        else:
            logger.warning("%s has no %s: running without it", path, component)
            index |= {name: [None, None] for name in checkpoint.OPTIONAL}
    if absent:
        _refuse_incomplete(path, absent, local(), origin)

    def read_config(component: str) -> dict[str, Any]:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        preset, folder = origin.preset, origin.folder
        if folder is not None and (preset is None or (folder / component / name).is_file()):
            return checkpoint.read_config(folder, component, name)
        if preset is None or component not in preset.configs:
            raise InputError(f"{str(path)!r} has no component {component!r}: ask for one of {', '.join(index)}")
        found = dict(preset.configs[component])
        if component == "scheduler" and "v_pred" in tensors:
            found["prediction_type"] = "v_prediction"
            found["rescale_betas_zero_snr"] = "ztsnr" in tensors
        return found

    def load(module: torch.nn.Module, component: str, dtype: torch.dtype, device: torch.device) -> None:
        if component in elsewhere:
            checkpoint.load_weights(module, elsewhere[component], component, dtype, device)
            return
        prefix = prefixes[component]
        part = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        where = f"of {component!r} in {str(path)!r}"
        converted = _convert(part, prefix, index[component][1], module, read_config(component), where)
        names = checkpoint.match_names(module, {name: one.shape for name, one in converted.items()}, where)
        checkpoint.assign(module, ((new, converted[name].read()) for name, new in names.items()), dtype, device)

    def read_tokenizer(component: str) -> Tokenizer:
        folder = local()
        if folder is None or not (folder / component).is_dir():
            hub = _current(origin.preset.hub) if origin.preset is not None and origin.preset.hub else None
            looked = f"{str(folder)!r} has none" if folder else f"that of {hub} is not in the hub's cache"
            example = f" (such as {hub})" if hub else ""
            raise InputError(
                f"{str(path)!r} holds no tokenizer and {looked}: pass config=, {_CONFIG}{example}, with a folder "
                f"{component!r}"
            )
        return tokenizer.load(folder / component)

    if origin.preset is not None:
        index.setdefault("_fastsd", origin.preset.defaults)
    return checkpoint.Source(index, read_config, load, read_tokenizer)


# ------------------------------------------------------------------------------------------------------------
# Tensors that are not read yet


class _Deferred:
    """A tensor of known shape that is read later; what converters do to it is noted, and done by `read()`.

    It is what torch calls a tensor-like type: `torch.chunk`, `torch.cat`, ... reach it by `__torch_function__`. Plain
    copies are left out: nothing is written to them, and with them the peak of loading was 1.18 times the size, not 1.00
    (probably holes in the heap that the next aligned allocation of that size does not fit into).

    Attributes:
        meta: its shape, as a tensor on the meta device.
        read: gives the real tensor, in the dtype stored.
        names: the tensors of the file that it is made of.
    """

    def __init__(self, meta: Tensor, read: Callable[[], Tensor], names: frozenset[str]) -> None:
        self.meta, self.read, self.names = meta, read, names

    def __getattr__(self, name: str) -> Any:
        if name in ("clone", "detach"):
            return lambda: self  # see above
        value = getattr(self.meta, name)
        if isinstance(value, Tensor):  # .T
            return _defer(getattr, (self, name), {})
        if callable(value):  # .contiguous(), .chunk(3), ...
            return lambda *args, **options: _defer(getattr(Tensor, name), (self, *args), options)
        return value  # .shape, .ndim, ...

    def __getitem__(self, index: Any) -> Any:
        return _defer(operator.getitem, (self, index), {})

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.cat and len(args[0]) == 1:
            return args[0][0]
        return _defer(function, args, kwargs or {})


def _defer(function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """The outcome of `function` with its shapes now and its values later."""
    operands: list[_Deferred] = []

    def shape_of(operand: _Deferred) -> Tensor:
        operands.append(operand)
        return operand.meta

    def run() -> Any:
        return function(*_replace(args, lambda operand: operand.read()), **options)

    outcome = function(*_replace(args, shape_of), **options)
    names = frozenset().union(*(operand.names for operand in operands))
    if isinstance(outcome, Tensor):
        return _Deferred(outcome, run, names)
    return tuple(_Deferred(part, partial(_part, run, i), names) for i, part in enumerate(outcome))


def _part(run: Callable[[], Any], i: int) -> Tensor:
    part: Tensor = run()[i]
    return part


def _replace(value: Any, tensor: Callable[[_Deferred], Tensor]) -> Any:
    """`value` with the deferred tensors inside, also those in lists and tuples, replaced by `tensor` of them."""
    if isinstance(value, _Deferred):
        return tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_replace(part, tensor) for part in value)
    return value


# ------------------------------------------------------------------------------------------------------------
# The file


def _open(path: Path) -> dict[str, _Deferred]:
    """The tensors of a safetensors file, those of a bare denoiser under the prefix that whole checkpoints give it."""
    if re.match(r"https?:/", str(path)):
        raise InputError(
            f"{str(path)!r} is an address: download the file (`hf download org/name file`) and pass its path"
        )
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder: pass it to Pipeline.from_pretrained")
    if path.suffix.lower() in PICKLES:
        checkpoint.refuse_file(path)
    if path.suffix.lower() == ".gguf":
        raise InputError(
            f"{str(path)!r} is quantised (GGUF), which is not run here: use the safetensors file of the model"
        )
    if not path.is_file():
        reason = "is a broken link" if path.is_symlink() else "does not exist"
        raise InputError(f"{str(path)!r} {reason}: pass the path of a safetensors file")
    stored = read_header(path)
    if not stored:
        raise InputError(f"{str(path)!r} holds no tensors: use the file of a model")
    read = open_file(path)

    quantised = [name for name in stored if _QUANTISED.search(name)]
    quantised += [
        f"{name} ({place.dtype})"
        for name, place in stored.items()
        if len(place.shape) > 1 and place.dtype not in (*_FLOATS, "I64", "BOOL")
    ]
    if quantised:
        raise InputError(
            f"{str(path)!r} is quantised ({few(quantised, 3)}), which is not run here: use the "
            "model in float16, bfloat16 or plain float8"
        )

    bare = any(marker in stored for _, marker in _LAYOUTS.values())
    return {
        f"{_DENOISER if bare else ''}{name}": _Deferred(
            torch.empty(place.shape, device="meta"), partial(read, place), frozenset([name])
        )
        for name, place in stored.items()
    }


def _recognise(path: Path, tensors: Mapping[str, _Deferred]) -> tuple[str | None, str]:
    """`diffusers`' name for the type of model (None: unknown to it) and the class of the denoiser."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    supported = f"supported are {', '.join(_TYPES.values())} and their finetunes"
    class_name = next((key for key, (_, marker) in _LAYOUTS.items() if _DENOISER + marker in tensors), None)
    try:
        kind: str | None = infer_diffusers_model_type(tensors)
    except (LookupError, NameError, TypeError, ValueError):  # of shapes that it did not expect
        kind = None
    if kind is not None and kind not in _TYPES:
        raise InputError(f"{str(path)!r} is a model of the type {kind!r}, which is not run here: {supported}")
    if class_name is None:
        _refuse_other(path, tensors, supported)
    # SDXL is recognised by its text encoders; without them its UNet still has the embedding of sizes.
    sizes = tensors.get(f"{_DENOISER}label_emb.0.0.weight")
    if kind == "v1" and sizes is not None and sizes.shape[-1] == 2816:
        kind = "xl_base"
    return kind, class_name


def _refuse_other(path: Path, names: Mapping[str, Any], supported: str) -> NoReturn:
    for pattern, what in _OTHERS.items():
        if any(re.search(pattern, name) for name in names):
            raise InputError(f"{str(path)!r} seems to be {what}; {supported}")
    raise InputError(f"{str(path)!r} is no model known here (it holds {few(names, 3)}): {supported}")


def _convert(
    part: Mapping[str, _Deferred],
    prefix: str,
    class_name: str,
    module: torch.nn.Module,
    config: dict[str, Any],
    where: str,
) -> dict[str, _Deferred]:
    """The tensors of a component by the names of diffusers or transformers, with those that no converter took."""
    from diffusers.loaders import single_file_utils as utils

    converters: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        # The one setting that it needs is a default of the class, and configurations may leave defaults out.
        "UNet2DConditionModel": lambda part: utils.convert_ldm_unet_checkpoint(part, {"layers_per_block": 2, **config}),
        "SD3Transformer2DModel": utils.convert_sd3_transformer_checkpoint_to_diffusers,
        "FluxTransformer2DModel": utils.convert_flux_transformer_checkpoint_to_diffusers,
        "AutoencoderKL": lambda part: utils.convert_ldm_vae_checkpoint(part, module.config),
        "T5EncoderModel": utils.convert_sd3_t5_checkpoint_to_diffusers,
        "CLIP": lambda part: utils.convert_ldm_clip_checkpoint(part, prefix),
        "OpenCLIP": lambda part: utils.convert_open_clip_checkpoint(module, part, prefix),
    }
    clip = "OpenCLIP" if prefix in _OPEN_CLIP else "CLIP"
    try:
        converted = converters[class_name if class_name in converters else clip](dict(part))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"the weights {where} are not those of a {class_name} ({type(error).__name__}: "
            f"{one_line(error)}): pass the config= that belongs to the file"
        ) from error
    expected = module.state_dict()
    if prefix == "text_encoders.clip_l.transformer." and "text_projection.weight" in expected:
        # SD3 takes the pooled output of this encoder before its projection: diffusers' projection is the identity.
        eye = torch.eye(*expected["text_projection.weight"].shape)
        converted["text_projection.weight"] = _Deferred(eye, lambda: eye, frozenset())
    taken = frozenset().union(*(tensor.names for tensor in converted.values()))
    dropped = utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
    converted |= {name: tensor for name, tensor in part.items() if not tensor.names <= taken and name not in dropped}
    return {name: tensor for name, tensor in converted.items() if name in expected or not _UNUSED.search(name)}


# ------------------------------------------------------------------------------------------------------------
# What a file lacks


def _origin(path: Path, kind: str | None, class_name: str, config: str | os.PathLike[str] | None) -> _Origin:
    component = _LAYOUTS[class_name][0]
    preset = PRESETS.get(_TYPES.get(kind or "", ""))
    if preset is not None and preset.index.get(component, [None, None])[1] != class_name:
        preset = None  # diffusers calls v1 whatever it does not know
    if config is not None:
        origin = _configured(config, preset)
    else:
        origin = _Origin(preset, None, named=False)
        if kind == "v2":
            logger.warning(
                "%s is an SD 2.x file, which does not say what it predicts: taken as 768-v; for the 512 base pass "
                "config=, such as a folder with its scheduler/scheduler_config.json",
                path,
            )
    if origin.preset is None and (origin.folder is None or not (origin.folder / "model_index.json").is_file()):
        raise InputError(
            f"{str(path)!r} holds a {class_name} of sizes that no preset has: pass config=, a folder in the diffusers "
            "layout that describes it"
        )
    return origin


def _configured(config: str | os.PathLike[str], preset: Preset | None) -> _Origin:
    """What the caller's `config` stands for; `preset` is that of the file."""
    text = os.fspath(config)
    folder = Path(os.path.expanduser(text))
    if text and folder.is_dir():
        whole = preset is None or (folder / "model_index.json").is_file()
        if not whole and not any((folder / component).is_dir() for component in (preset.index if preset else ())):
            held = few(list_folder(folder))
            raise InputError(f"config= {text!r} holds no component but {held}: pass {_CONFIG}")
        return _Origin(preset, folder, named=True)
    if isinstance(config, str):
        for one in PRESETS.values():
            if text in (one.name, one.hub):
                return _Origin(one, None if one.hub else checkpoint.resolve(one.name), named=True)
        repo, at, revision = text.partition("@")
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
            return _Origin(preset, _configurations(repo, one_revision(text, at, revision, None)), named=True)
    raise InputError(f"config= {text!r} is no existing folder, preset or hub id: pass {_CONFIG}")


def _index(path: Path, class_name: str, origin: _Origin, config: object) -> dict[str, Any]:
    """The `model_index.json` of the caller's folder, or else of the preset."""
    if origin.folder is not None and (origin.preset is None or (origin.folder / "model_index.json").is_file()):
        index = checkpoint.read_index(origin.folder)
    else:
        index = dict(origin.preset.index) if origin.preset is not None else {}
    entry = index.get(_LAYOUTS[class_name][0])
    if not isinstance(entry, list) or class_name not in entry:
        raise InputError(
            f"{str(path)!r} holds a {class_name}, and config= {str(config)!r} is for a {index['_class_name']}: pass "
            "the one that belongs to the file"
        )
    return index


def _refuse_incomplete(path: Path, absent: list[str], folder: Path | None, origin: _Origin) -> NoReturn:
    looked = f"nor has {str(folder)!r}" if folder is not None else "and there is no copy in the hub's cache"
    example = ""
    if origin.preset is not None and origin.preset.hub is not None:
        patterns = " ".join(f"'{name}/*'" for name in absent)
        example = (
            f", or put them into the hub's cache (`hf download {_current(origin.preset.hub)} --include {patterns}`)"
        )
    raise InputError(
        f"{str(path)!r} has no weights of {', '.join(absent)}, {looked}: pass config=, a folder in the diffusers "
        f"layout with them{example}"
    )


def _current(hub: str) -> str:
    """The hub id where a repository is today."""
    return MOVED.get(hub, hub)


def _configurations(repo: str, revision: str | None) -> Path:
    """Configurations and tokenizers of a hub repository, downloaded or cached."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=["*.json", "*.txt", "*.model"]))
    except HFValidationError:
        raise InputError(f"{repo!r} is no valid hub id: write it as org/name, as in its address") from None
    except RevisionNotFoundError:
        raise InputError(f"the hub model {repo!r} has no revision {revision!r}: use a branch, tag or commit") from None
    except transport_errors() as error:
        refuse_hub(repo, revision, error)


def _cached(repo: str) -> Path | None:
    """The copy of a hub repository in the cache, complete or not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for one in dict.fromkeys((repo, _current(repo))):
        try:
            return Path(snapshot_download(one, local_files_only=True, allow_patterns=["*.json"]))
        except LocalEntryNotFoundError:
            continue
    return None


def _holds_weights(folder: Path, component: str) -> bool:
    return bool(checkpoint.weight_sets(path.name for path in (folder / component).glob("*")))
