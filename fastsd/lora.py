"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): reading adapters, and merging them into the weights.

    W = cast(W0 + sum_i weight_i * scale_i * B_i @ A_i)

    loras = Loras({"unet": unet, "text_encoder": text_encoder})
    loras.load(read("style.safetensors", "sd"), weight=0.8, name="style")
    loras.unload("style")                                # bit for bit as before

The sum is computed in float32, layer by layer on the layer's device, and written into the same tensor, so that a
captured graph and whoever shares the weights go on with the new values, and a step costs what it costs without
LoRA. The layouts of the files are those that `diffusers` converts, by its own converters.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import math
import numbers
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastsd.errors import InputError
from fastsd.files import PICKLES, few, list_folder, one_line
from fastsd.hub import hub_failure, one_revision, refuse_hub, transport_errors
from fastsd.tensors import read_header, read_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

Place = tuple[str, str]  # component, parameter name

# The components that a LoRA of a family may change, the denoiser first.
_COMPONENTS = {
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
_CONVERTERS = {
    "sd": "StableDiffusionLoraLoaderMixin",
    "sdxl": "StableDiffusionXLLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "flux": "FluxLoraLoaderMixin",
}
_MODELS = {
    "Stable Diffusion 1.x": "sd",
    "Stable Diffusion 2.x": "sd",
    "SDXL": "sdxl",
    "SD3": "sd3",
    "Flux.1": "flux",
}
"""The models whose LoRAs can be told apart -> their family."""

_PREFERRED = "pytorch_lora_weights.safetensors"  # the name that diffusers and its training scripts write
_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's LoraConfig of each component in a file's header

# One matrix of a layer, `stem` being the layer: peft's, kohya's, and diffusers' of three ages; XLabs' have a number.
_MATRIX = (
    r"(?P<stem>.+?)(?:[._](?:lora_{peft}|lora_{side}|lora\.{side}|lora_linear_layer\.{side})|(?<=_lora\d)\.{side})"
    r"\.weight"
)
_DOWN = re.compile(_MATRIX.format(peft="A", side="down"))
_UP = re.compile(_MATRIX.format(peft="B", side="up"))
_BIAS = re.compile(r"(?P<stem>.+)\.lora_B\.bias")
_ALPHA = re.compile(r"(?P<stem>.+)\.alpha")

# What adapter files hold besides plain LoRA, in the order in which it is looked for.
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "is a DoRA, which also rescales the columns of the weights",
    r"\.lokr_": "is a LoKr, made of Kronecker products",
    r"\.hada_": "is a LoHa, made of Hadamard products",
    r"\.(oft_|boft_)|\.vera_lambda": "is an OFT or VeRA adapter",
    r"\.lora_mid\.": "holds convolutions in Tucker decomposition",
    r"query_norm\.scale|lora_controlnet|\.norm_(added_)?[qk]\.weight": "is a Control LoRA, which changes the model",
    r"\.diff(_b)?$|\.[wb]_norm$": "holds whole differences of weights (diff)",
}


# ------------------------------------------------------------------------------------------------------------
# What an adapter is


class Delta(NamedTuple):
    """What one parameter gets: `scale * up @ down`, or `scale * up` where `down` is None (a bias).

    `down` is [rank, in, ...kernel] and `up` [out, rank, 1, ...], on the CPU, in the dtype of the file or float32.
    """

    down: Tensor | None
    up: Tensor
    scale: float

    def shape(self) -> list[int]:
        """The shape of the parameter that it is for; a 1x1 convolution counts as linear."""
        tail = self.up.shape[2:] if self.down is None else self.down.shape[1:]
        return [self.up.shape[0], *(tail if len(tail) < 2 or set(tail[1:]) != {1} else tail[:1])]

    def product(self, like: Tensor) -> Tensor:
        """`up @ down`, in the shape, the dtype and on the device of `like`."""
        up = self.up.to(like.device, like.dtype)
        if self.down is not None:
            up = up.flatten(1) @ self.down.to(like.device, like.dtype).flatten(1)
        return up.reshape(like.shape)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA file in the names of our modules.

    Attributes:
        source: what was read: a file, a folder or a hub id.
        family: "sd", "sdxl", "sd3" or "flux".
        model: the model that its layers look like ("SDXL", "Stable Diffusion 1.x", ...), None if they do not tell.
        deltas: component -> parameter name -> what it gets.
        digest: of all names, scales and stored values.
    """

    source: str
    family: str
    model: str | None
    deltas: Mapping[str, Mapping[str, Delta]]
    digest: str


def parse(text: str) -> tuple[str, float]:
    """`"path[:weight]"` to the path (or hub id) and the weight, 1.0 where there is none.

    What exists as a whole is a path, whatever colons it holds; else only a number after the last colon is a weight, so
    that `C:\\loras\\style.safetensors` is a path too.

    Raises:
        InputError: nothing stands before the colon, or what follows an existing path is no finite number.
    """
    path, colon, tail = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        path, tail = text, "1"
    elif not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)", tail, re.ASCII | re.I):
        if tail == "" or os.path.exists(os.path.expanduser(path)):
            raise InputError(f"the LoRA {text!r} has no number after its last colon: write path or path:weight")
        path, tail = text, "1"
    if not path.strip():
        raise InputError(f"the LoRA {text!r} names no file: write path or path:weight")
    return path, _check_weight(float(tail))


def _check_weight(weight: float) -> float:
    if isinstance(weight, numbers.Real) and not isinstance(weight, bool):
        with contextlib.suppress(OverflowError):
            if math.isfinite(weight):
                return float(weight)
    raise InputError(f"the weight of a LoRA is {weight!r}: it must be a finite number, such as 0.8")


# ------------------------------------------------------------------------------------------------------------
# From what the user typed to a local file


def find(path_or_id: str | os.PathLike[str], *, weight_name: str | None = None, revision: str | None = None) -> Path:
    """The local safetensors file of a LoRA.

    Args:
        path_or_id: a .safetensors file, a folder with one, or a hub id (org/name[@revision]), which is downloaded into
            the hub's cache (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` are honoured).
        weight_name: which file of the folder or the hub model; None takes pytorch_lora_weights.safetensors, or the
            only one there is.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: it is none of these, is a pickle, or leaves open which file is meant.
    """
    text = os.fspath(path_or_id)
    if weight_name is not None and not re.fullmatch(r"(\w[\w. -]*/)*\w[\w. -]*\.safetensors", weight_name):
        raise InputError(f"the weight_name {weight_name!r} is not right: give the name of a .safetensors file in it")
    path = Path(os.path.expanduser(text))
    exists = bool(text) and os.path.lexists(path)
    if exists or path.suffix.lower() in (*PICKLES, ".safetensors"):
        if revision is not None:
            raise InputError(f"{text!r} is a local path and has no revision {revision!r}: leave the revision out")
        if path.is_dir():
            return _in_folder(path, weight_name, f"the folder {text!r}")
        if weight_name is not None and path.is_file():
            raise InputError(f"{text!r} is a file and holds no {weight_name!r}: leave weight_name out")
        return _checked_file(path)
    if isinstance(path_or_id, str):
        repo, at, pinned = text.partition("@")
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo, re.ASCII):
            return _download(repo, one_revision(text, at, pinned, revision), weight_name)
    raise InputError(f"there is no LoRA {text!r}: pass a .safetensors file, a folder with one, or a hub id (org/name)")


def _checked_file(path: Path) -> Path:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        _refuse_pickle(str(path))
    if not path.is_file():
        reason = "is a broken link" if path.is_symlink() else "does not exist"
        raise InputError(f"the LoRA {str(path)!r} {reason}: pass a .safetensors file, a folder with one, or a hub id")
    if suffix != ".safetensors":
        raise InputError(f"the LoRA {str(path)!r} is no .safetensors file: pass one")
    return path


def _in_folder(folder: Path, weight_name: str | None, where: str) -> Path:
    if weight_name is not None and (folder / weight_name).is_file():
        return folder / weight_name
    return _checked_file(folder / _choose(list_folder(folder), weight_name, where))


def _refuse_pickle(name: str) -> NoReturn:
    raise InputError(
        f"{name!r} is a pickle, which can run code when it is opened: if you trust it, convert it once with "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'lora.safetensors') and pass that file"
    )


def _choose(names: Sequence[str], weight_name: str | None, where: str) -> str:
    """The file that is meant among the paths in a folder or a hub model."""
    inside = sorted(name for name in names if "/" not in name)
    found = [name for name in inside if name.endswith(".safetensors")]
    if weight_name is not None:
        if weight_name in names:
            return weight_name
        raise InputError(f"{where} has no {weight_name!r} but {few(found)}: give one that it has")
    if "model_index.json" in inside:
        raise InputError(f"{where} is a whole checkpoint and no LoRA: pass it as the model, or give weight_name")
    if _PREFERRED in found:
        return _PREFERRED
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{where} has {len(found)} safetensors files ({few(found)}): say which with weight_name")
    pickles = [name for name in inside if name.endswith(PICKLES)]
    if pickles:
        _refuse_pickle(pickles[0])
    raise InputError(f"{where} has no safetensors file but {few(inside)}: pass the folder that has one")


def _download(repo: str, revision: str | None, weight_name: str | None) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"the hub model {repo!r}"
    try:
        info = HfApi(library_name="fastsd").model_info(repo, revision=revision, timeout=10)
        name = _choose([sibling.rfilename for sibling in info.siblings or []], weight_name, where)
        return Path(hf_hub_download(repo, name, revision=revision))
    except HFValidationError:
        raise InputError(f"{repo!r} is no valid hub id: write it as org/name, as in its address") from None
    except RevisionNotFoundError:
        raise InputError(f"{where} has no revision {revision!r}: use one that it has, or leave it out") from None
    except LocalEntryNotFoundError as error:
        failure: Exception = error
    except EntryNotFoundError:
        raise InputError(f"{where} has no {weight_name!r}: give the name of a file that it has") from None
    except transport_errors() as error:
        failure = error
    if not constants.HF_HUB_OFFLINE:
        logger.warning("%s; looking for a cached copy of %s", hub_failure(failure), repo)
    try:
        wanted = "*.safetensors" if weight_name is None else glob.escape(weight_name)
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[wanted]))
        return _in_folder(folder, weight_name, f"the cached copy of {repo!r}")
    except LocalEntryNotFoundError:
        refuse_hub(repo, revision, failure)


# ------------------------------------------------------------------------------------------------------------
# From a file to an adapter


def read(
    path_or_id: str | os.PathLike[str], family: str, *, weight_name: str | None = None, revision: str | None = None
) -> Adapter:
    """Read a LoRA for a model of `family` ("sd", "sdxl", "sd3" or "flux").

    The layouts: diffusers and peft (with or without alphas and `lora_adapter_metadata`), the attention processors of
    old diffusers, and what diffusers converts: kohya for SD, SDXL (both namings of its blocks) and Flux, and for Flux
    also XLabs', AI Toolkit's and ComfyUI's. No tensor of the file is passed over: what is no plain LoRA (DoRA, LoKr,
    LoHa, Control LoRA, whole differences, ...) or would be lost on the way is refused by name.

    Args:
        path_or_id: see `find`.
        family: the family of the model.
        weight_name: see `find`.
        revision: see `find`.

    Raises:
        InputError: as `find`; or the file is damaged, not finite, no LoRA, in another layout, or for another family.
    """
    if family not in _COMPONENTS:
        raise InputError(f"the family {family!r} has no LoRA: the families are {', '.join(_COMPONENTS)}")
    path = find(path_or_id, weight_name=weight_name, revision=revision)
    source = os.fspath(path_or_id)
    tensors, settings = _open(path)
    model = _looks_like({name: list(tensor.shape) for name, tensor in tensors.items()})
    if model is not None and _MODELS[model] != family:
        mine = " or ".join(name for name, its in _MODELS.items() if its == family)
        raise InputError(f"{source!r} is a LoRA for {model}: use one that was trained for {mine}")
    tensors = _plain(source, tensors)
    if settings and any(_ALPHA.fullmatch(name) for name in tensors):
        raise InputError(f"{source!r} gives its scale twice, as alphas and as {_METADATA}: save it again with one")
    _fold_alphas(source, tensors)
    deltas = _deltas(source, family, _convert(source, family, tensors), settings)
    return Adapter(source, family, model, deltas, _digest(deltas))


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, finite and copied out of it, and peft's settings in its header."""
    import torch
    from safetensors import safe_open

    where = repr(str(path))
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(read_header(path)):
        # float8 has next to no arithmetic, and bfloat16 holds all its values.
        copied = tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor.clone()
        if not (copied.is_floating_point() or _ALPHA.fullmatch(name)):
            raise InputError(f"{name!r} in {where} is {tensor.dtype}: a LoRA must hold floating-point matrices")
        if not bool(torch.isfinite(copied).all()):
            raise InputError(f"{name!r} in {where} holds NaN or Inf: the file is damaged or its training failed")
        tensors[name] = copied
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    try:
        settings = json.loads(header.get(_METADATA) or "{}")
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"the {_METADATA} of {where} is no JSON object: save the LoRA again")
    return tensors, settings


def _looks_like(shapes: Mapping[str, list[int]]) -> str | None:
    """The key of `_MODELS` that the layers of a file belong to, None where they leave it open."""
    names = "\n".join(shapes)

    def inputs(pattern: str) -> set[int]:
        found = (name for name in shapes if _DOWN.fullmatch(name) and re.search(pattern, name))
        return {shapes[name][1] for name in found if len(shapes[name]) > 1}

    if re.search(r"single_transformer_blocks|double_blocks|single_blocks", names):
        return "Flux.1"
    if "joint_blocks" in names:
        return "SD3"
    if re.search(r"(down|up|input|output)_blocks|mid(dle)?_block", names):
        if re.search(r"lora_te2_|text_encoder_2\.|transformer_blocks[._][1-9]", names):
            return "SDXL"
        by_text = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
        widths = inputs(r"attn2.*to_k")
        return by_text.get(widths.pop()) if len(widths) == 1 else None
    if re.search(r"^transformer\.", names, re.MULTILINE):
        by_width = {1536: "SD3", 2432: "SD3", 3072: "Flux.1"}  # SD3-Medium and SD3.5-Medium, SD3.5-Large, Flux.1
        widths = inputs(r"transformer_blocks.*to_q")
        return by_width.get(widths.pop()) if len(widths) == 1 else None
    return None


def _plain(source: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices, biases and alphas of a plain LoRA, all of them in pairs.

    Whole differences that are zero everywhere (ComfyUI's extractions have them) are left out, as diffusers does.
    """
    difference = list(_OTHER_KINDS)[-1]
    tensors = {name: t for name, t in tensors.items() if not re.search(difference, name) or bool(t.any())}
    for pattern, what in _OTHER_KINDS.items():
        found = [name for name in tensors if re.search(pattern, name)]
        if found:
            raise InputError(f"{source!r} {what} ({few(found, 2)}): use a plain LoRA")
    downs, ups, biases, alphas = (
        {match["stem"]: name for name in tensors if (match := pattern.fullmatch(name))}
        for pattern in (_DOWN, _UP, _BIAS, _ALPHA)
    )
    known = {name for names in (downs, ups, biases, alphas) for name in names.values()}
    if unknown := [name for name in tensors if name not in known]:
        what = f"{len(unknown)} of {len(tensors)} tensors are none of a LoRA: {few(unknown, 2)}"
        raise InputError(f"{source!r} is not a plain LoRA ({what}): pass a LoRA for {', '.join(_MODELS)}")
    if not downs:
        raise InputError(f"{source!r} holds no LoRA matrices but {few(tensors, 2)}: pass a LoRA")
    for stem in [*(downs.keys() ^ ups.keys()), *(biases.keys() - ups.keys()), *(alphas.keys() - downs.keys())]:
        raise InputError(f"the layer {stem!r} of {source!r} is not complete: a LoRA has two matrices a layer")
    for stem, name in downs.items():
        down, up = tensors[name], tensors[ups[stem]]
        if (
            min(down.ndim, up.ndim) < 2
            or down.shape[0] != up.shape[1]
            or {*up.shape[2:]} - {1}
            or 0 in (*down.shape, *up.shape)
        ):
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise InputError(
                f"the matrices of {stem!r} in {source!r} are {shapes}: they must be [rank, in, ...] and [out, rank]"
            )
    return tensors


def _fold_alphas(source: str, tensors: dict[str, Tensor]) -> None:
    """Multiply the down matrices by alpha / rank, in place of the alphas.

    So whatever a converter makes of a matrix, its scale goes with it, in float32 where it is no 1. The alphas stay
    and become the ranks, since some converters ask for them.
    """
    import torch

    downs = {match["stem"]: name for name in tensors if (match := _DOWN.fullmatch(name))}
    for name in list(tensors):
        if match := _ALPHA.fullmatch(name):
            if tensors[name].numel() != 1:
                raise InputError(f"{name!r} in {source!r} is {list(tensors[name].shape)}: an alpha is one number")
            down = downs[match["stem"]]
            rank = tensors[down].shape[0]
            alpha = float(tensors[name])
            if alpha != rank:
                tensors[down] = tensors[down].float() * (alpha / rank)
            tensors[name] = torch.tensor(float(rank))


def _convert(source: str, family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in diffusers' or peft's names, by diffusers' converters.

    These drop what they do not know (the T5 parts of Flux, the half of a file that mixes two namings, ...), so every
    tensor carries the names of those that it was made of, and all of them must come out.
    """
    import torch
    from diffusers import loaders

    class Traced(torch.Tensor):
        sources: frozenset[str]

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain: Any = super()
            result = plain.__torch_function__(func, types, args, kwargs)
            sources = frozenset[str]().union(*(t.sources for t in _flat(args) if hasattr(t, "sources")))
            for one in _flat(result):
                if isinstance(one, Traced):
                    one.sources = sources
            return result

    traced = {}
    for name, tensor in tensors.items():
        traced[name] = tensor.as_subclass(Traced)
        traced[name].sources = frozenset([name])
    # kohya numbers the blocks of SDXL as the original code does; all SDXL models have 2 residual blocks a level.
    options = {"unet_config": SimpleNamespace(layers_per_block=2)} if family == "sdxl" else {}
    try:
        converted = getattr(loaders, _CONVERTERS[family]).lora_state_dict(traced, **options)
    except Exception as error:  # whatever a converter makes of names that it does not expect
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise InputError(
            f"diffusers cannot convert {source!r} for {family!r} ({reason}): use a LoRA in the layout of diffusers"
        ) from error
    state: dict[str, Any] = converted if isinstance(converted, dict) else converted[0]
    kept = frozenset[str]().union(*(tensor.sources for tensor in state.values()))
    lost = [
        name
        for name, tensor in tensors.items()
        if name not in kept and (_UP.fullmatch(name) or _BIAS.fullmatch(name)) and bool(tensor.any())
    ]
    if lost:
        raise InputError(
            f"{len(lost)} matrices of {source!r} are in no layout that diffusers converts for {family!r} "
            f"({few(lost, 2)}): use a LoRA without them"
        )
    return {name: tensor.as_subclass(torch.Tensor) for name, tensor in state.items() if not _ALPHA.fullmatch(name)}


def _flat(values: Any) -> Iterable[Any]:
    """The values in nested tuples and lists."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _deltas(
    source: str, family: str, state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, dict[str, Delta]]:
    from diffusers.utils import state_dict_utils as names

    components = _COMPONENTS[family]
    of_text = {**names.DIFFUSERS_TO_PEFT, **names.DIFFUSERS_OLD_TO_PEFT}
    layers: dict[Place, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        if component not in components:  # attention processors saved alone, and some of Flux's layers
            component, rest = components[0], key
        table = names.UNET_TO_DIFFUSERS if component == components[0] else of_text
        (name,) = names.convert_state_dict({rest: tensor}, table)
        if match := re.fullmatch(r"(.+)\.(lora_[AB]\.(?:weight|bias))", name):
            layers.setdefault((component, match[1]), {})[match[2]] = tensor
        else:
            unknown.append(key)
    if unknown:
        raise InputError(
            f"{len(unknown)} matrices of {source!r} are in no layout that diffusers converts for {family!r} "
            f"({few(unknown, 2)}): use a LoRA in the layout of diffusers"
        )
    _check_settings(source, settings)
    deltas: dict[str, dict[str, Delta]] = {}
    for (component, module), layer in layers.items():
        down, up = layer["lora_A.weight"], layer["lora_B.weight"]
        scale = _scale(source, settings, component, module, down.shape[0])
        named = deltas.setdefault(component, {})
        named[f"{module}.weight"] = Delta(down, up, scale)
        if (bias := layer.get("lora_B.bias")) is not None:
            named[f"{module}.bias"] = Delta(None, bias, scale)
    return deltas


def _check_settings(source: str, settings: Mapping[str, Any]) -> None:
    """Refuse peft's options that are no plain LoRA; the keys are those of `LoraConfig` after the component's name."""
    plain: dict[str, tuple[Any, ...]] = {
        "use_dora": (False, None),
        "fan_in_fan_out": (False, None),
        "bias": ("none", None),
        "modules_to_save": ([], None),
        # The others (PiSSA, OLoRA, CorDA, LoftQ) take their start out of the base weights.
        "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    }
    for key, value in settings.items():
        option = key.rpartition(".")[2]
        if option in plain and value not in plain[option]:
            raise InputError(f"{source!r} was trained with {key} = {value!r}: use a LoRA without this option")


def _scale(source: str, settings: Mapping[str, Any], component: str, module: str, rank: int) -> float:
    """alpha / rank (with rsLoRA alpha / sqrt(rank)) by peft's settings, 1 without them."""

    def setting(key: str, pattern: str) -> Any:
        """The value of a module: that of the first pattern that its name ends with, as in peft."""
        patterns = settings.get(f"{component}.{pattern}") or {}
        try:
            for expression, value in patterns.items():
                # The file is not trusted: no expression that takes forever.
                if len(expression) > 500 or re.search(r"\)[*+?{]|\{|([*+?].*){5}", expression):
                    raise ValueError(expression)
                if re.match(rf"(.*\.)?({expression})$", module):
                    return value
        except (AttributeError, TypeError, ValueError, re.error):
            raise InputError(
                f"the {component}.{pattern} of {source!r} cannot be read: give each module's own name there"
            ) from None
        return settings.get(f"{component}.{key}", rank)

    alpha = setting("lora_alpha", "alpha_pattern")
    if setting("r", "rank_pattern") != rank:
        raise InputError(
            f"{component}.{module} in {source!r} has rank {rank}, not that of its {_METADATA}: save it again"
        )
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"the alpha of {component}.{module} in {source!r} is {alpha!r}: it must be a finite number")
    return float(alpha) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)


def _digest(deltas: Mapping[str, Mapping[str, Delta]]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for component, named in sorted(deltas.items()):
        for name, delta in sorted(named.items()):
            digest.update(f"{component}.{name} {delta.scale!r}".encode())
            for tensor in (delta.down, delta.up):
                if tensor is not None:
                    digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------
# Into the weights and out again


def check(adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[Place, Delta]:
    """What each parameter of `modules` (component -> module) gets, under the names that the modules have.

    Raises:
        InputError: counts and names the layers that the modules lack, or have in another shape or without weights.
    """
    targets: dict[Place, Delta] = {}
    missing, misshapen, released = [], [], []
    for component, deltas in adapter.deltas.items():
        module = modules.get(component)
        parameters = dict(module.named_parameters(remove_duplicate=False)) if module is not None else {}
        for name, delta in deltas.items():
            # Versions of transformers differ in CLIP's prefix.
            names = (name, name.removeprefix("text_model."), f"text_model.{name}")
            target = next((one for one in names if one in parameters), None)
            if target is None:
                missing.append(f"{component}.{name}")
                continue
            shape = list(parameters[target].shape)
            linear = shape[:2] if set(shape[2:]) == {1} else shape
            if delta.shape() != linear:
                misshapen.append(f"{component}.{target} ({delta.shape()}, the model has {shape})")
            if parameters[target].is_meta:
                released.append(f"{component}.{target}")
            targets[component, target] = delta
    problems = [
        f"{len(names)} {what}: {few(names, 3)}"
        for what, names in (
            ("layers that the model lacks", missing),
            ("layers of another shape", misshapen),
            ("layers whose weights were released", released),
        )
        if names
    ]
    if problems:
        model = f", which looks like one for {adapter.model}," if adapter.model else ""
        raise InputError(
            f"the LoRA {adapter.source!r}{model} does not fit the model ({'; '.join(problems)}): use one that was "
            "trained for this model"
        )
    return targets


class _Entry(NamedTuple):
    adapter: Adapter
    weight: float
    targets: dict[Place, Delta]


class Loras:
    """The adapters that are merged into the weights of `modules` (component -> module).

    The original weights of the layers that adapters touch are kept in host memory, and every set of adapters is
    merged into those: so the weights depend on the set alone, not on its history or order, and removing an adapter
    leaves no rounding behind. Tensors keep their addresses. A call that fails leaves the weights as they were.

    While adapters are loaded nobody else may write to the weights.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules  # not copied: a bundle's read their weights when they are asked for
        self._entries: dict[str, _Entry] = {}
        self._originals: dict[Place, Tensor] = {}

    @property
    def active(self) -> dict[str, float]:
        """Name -> weight, in the order of loading."""
        return {name: entry.weight for name, entry in self._entries.items()}

    @property
    def sources(self) -> dict[str, float]:
        """What each was read from (file, folder or hub id) -> weight, in the order of loading."""
        return {entry.adapter.source: entry.weight for entry in self._entries.values()}

    def key(self, component: str | None = None) -> tuple[tuple[str, float], ...]:
        """What the weights (of one component) depend on besides the checkpoint: digest and weight of each adapter."""
        return tuple(
            sorted(
                (entry.adapter.digest, entry.weight)
                for entry in self._entries.values()
                if component is None or entry.adapter.deltas.get(component)
            )
        )

    def load(self, adapter: Adapter, weight: float = 1.0, name: str | None = None) -> str:
        """Merge an adapter, beside those that are there; returns its name (by default that of its file).

        Raises:
            InputError: the name is taken, the weight is not finite, the adapter does not fit (see `check`), or the
                weights would leave the range of their dtype.
        """
        weight = _check_weight(weight)
        if name is None:
            name = Path(os.path.abspath(adapter.source)).name.removesuffix(".safetensors")
        if not isinstance(name, str) or not name:
            raise InputError(f"the name of a LoRA is {name!r}: it must be text")
        if name in self._entries:
            raise InputError(f"a LoRA named {name!r} is loaded: unload it first, or give this one another name")
        self._become({**self._entries, name: _Entry(adapter, weight, check(adapter, self._modules))})
        return name

    def unload(self, name: str | None = None) -> None:
        """Take one adapter out of the weights, or all of them (None).

        Raises:
            InputError: no adapter has this name.
        """
        if name is not None and name not in self._entries:
            raise InputError(f"no LoRA is named {name!r}: loaded are {few(self._entries)}")
        self._become({} if name is None else {key: entry for key, entry in self._entries.items() if key != name})

    def _become(self, entries: dict[str, _Entry]) -> None:
        """Make the weights those of `entries`; of the layers, only those are written that a change touches."""
        changed = [(self._entries.get(name) or entries[name]) for name in self._entries.keys() ^ entries.keys()]
        places = {place for entry in changed for place in entry.targets}
        # The largest first: if memory is short, it is so before much was written, and going back takes less of it.
        ordered = sorted(places, key=lambda place: (-self._parameter(place).numel(), place))
        written = []
        try:
            for place in ordered:
                written.append(place)
                self._write(place, entries)
            self._entries = entries
        except BaseException:
            for place in written:
                if place in self._originals:
                    self._write(place, self._entries)
            raise
        finally:
            used = {place for entry in self._entries.values() for place in entry.targets}
            self._originals = {place: tensor for place, tensor in self._originals.items() if place in used}

    def _parameter(self, place: Place) -> nn.Parameter:
        component, name = place
        return self._modules[component].get_parameter(name)

    def _write(self, place: Place, entries: Mapping[str, _Entry]) -> None:
        import torch

        with torch.inference_mode():
            weight: Tensor = self._parameter(place)
            original = self._originals.get(place)
            source = weight if original is None else original  # the same values; on a GPU the first is nearer
            if original is None:
                original = self._originals[place] = weight.to("cpu", copy=True)
            here = [entry for entry in entries.values() if place in entry.targets]
            if not here:
                weight.copy_(original)
                return
            merged = source.to(weight.device, torch.promote_types(weight.dtype, torch.float32), copy=True)
            for entry in sorted(here, key=lambda entry: (entry.adapter.digest, entry.weight)):
                delta = entry.targets[place]
                if factor := entry.weight * delta.scale:  # not with 0, which would turn -0.0 into 0.0
                    merged.add_(delta.product(merged), alpha=factor)
            cast = merged.to(weight.dtype)
            if not bool(torch.isfinite(cast).all()):
                raise InputError(
                    f"with these LoRAs {'.'.join(place)} leaves the range of {weight.dtype}: use smaller weights"
                )
            weight.copy_(cast)
