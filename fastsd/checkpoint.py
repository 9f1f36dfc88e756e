"""Finding a checkpoint in the diffusers folder layout, checking it, and giving its weights to modules.

A checkpoint is a folder with a `model_index.json` and one folder per component (`unet`, `vae`,
`text_encoder`, ...). Only safetensors are read: a pickle can run code when it is opened, so it is refused
with the way to convert it. Everything a caller can get wrong is an `InputError` of one sentence that names
the path and what would be right.
"""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fastsd.errors import InputError
from fastsd.files import PICKLES, existing, few, list_folder, read_json
from fastsd.hub import hub_failure, one_revision, refuse_hub, transport_errors
from fastsd.presets import PRESETS
from fastsd.tensors import Stored, read_header, read_tensors

if TYPE_CHECKING:
    import torch

    from fastsd.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


OPTIONAL = ("text_encoder_3", "tokenizer_3")  # SD3's T5

_UNUSED_COMPONENTS = ("safety_checker", "feature_extractor")
_STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names for a weight file
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)(?:\.(?P<variant>.+?))?(?P<shard>-\d{5}-of-\d{5})?(?:\.(?P<legacy>.+?))?\.safetensors"
)
_INDEX = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)\.safetensors(?:\.(?P<legacy>.+?))?\.index(?:\.(?P<variant>.+?))?\.json"
)


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
    for component in loaded_components(index):
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
                return _download(repo, one_revision(text, at, pinned, revision), variant)
            if at or revision is not None:
                raise InputError("the demo checkpoint ships with fastsd and has no revisions: leave the revision out")
            return _demo()
    path = Path(os.path.expanduser(text))
    if text and os.path.isdir(path):
        if revision is not None:
            raise InputError(f"{text!r} is a local folder and has no revision {revision!r}: leave the revision out")
        return path
    if text and (os.path.lexists(path) or path.suffix.lower() in (*PICKLES, ".safetensors")):
        refuse_file(path)
    if isinstance(model, str):
        name, at, pinned = text.partition("@")
        if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
            return _download(name, one_revision(text, at, pinned, revision), variant)
    _refuse_unknown(text, is_path=not isinstance(model, str))


def _demo() -> Path:
    folder = Path(str(resources.files("fastsd").joinpath("demo", "checkpoint")))
    if not folder.is_dir():
        raise InputError(f"the demo checkpoint is not at {str(folder)!r}: install fastsd again from its wheel")
    return folder


def refuse_file(path: Path) -> NoReturn:
    """Raise the `InputError` that says what to do with a file in place of a checkpoint folder."""
    suffix = path.suffix.lower()
    if suffix in PICKLES:
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
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    needed: list[str] = []
    try:
        info = HfApi(library_name="fastsd").model_info(repo, revision=revision, timeout=10)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if "model_index.json" not in names:
            _refuse_listing(repo, names)
        start = snapshot_download(repo, revision=revision, allow_patterns=["model_index.json"])
        needed = _needed_files(repo, names, read_index(Path(start)), variant)
        # By name, not by commit: so the cache remembers what the revision is, and finds it when offline.
        patterns = [glob.escape(name) for name in (*needed, *_licences(names))]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{repo!r} is no valid hub id: write it as org/name, as in its address") from None
    except RevisionNotFoundError:
        raise InputError(
            f"the hub model {repo!r} has no revision {revision!r}: use a branch, tag or commit of it, or leave it out"
        ) from None
    except transport_errors() as error:
        return _from_cache(repo, revision, variant, needed, error)


def _refuse_listing(repo: str, names: list[str]) -> NoReturn:
    single = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    what = f"the single-file checkpoint {single[0]!r}" if single else few(names)
    raise InputError(
        f"the hub model {repo!r} has no model_index.json but {what}: use a repository in the diffusers layout"
    )


def _needed_files(repo: str, names: Iterable[str], index: Mapping[str, Any], variant: str | None) -> list[str]:
    """The files of a hub repository that a run needs: `names` are all its paths, `index` is its
    model_index.json."""
    folders: dict[str, list[str]] = {component: [] for component in loaded_components(index)}
    for name in names:
        component, _, file = name.partition("/")
        if component in folders and "/" not in file:
            folders[component].append(file)
    sets = {component: weight_sets(files) for component, files in folders.items()}
    available = {key for weights in sets.values() for key in weights}
    needed = ["model_index.json"]
    for component, files in folders.items():
        where = f"the folder {component!r} of the hub model {repo!r}"
        if not files and component in OPTIONAL:
            continue
        if not files:
            raise InputError(f"{where} is missing although model_index.json names it: use a complete repository")
        kept = [file for file in files if file.endswith((".json", ".txt", ".model")) and ".index." not in file]
        if has_weights(index, component):
            chosen = _choose(sets[component], variant, available, files, where)
            kept += [chosen.single] if chosen.single else [*chosen.shards, *filter(None, [chosen.index_file])]
        needed += [f"{component}/{file}" for file in kept]
    return needed


def _licences(names: Iterable[str]) -> list[str]:
    """The texts that whoever passes the weights on must pass on too, of all paths of a hub repository."""
    return [name for name in names if re.fullmatch(r"LICEN[CS]E[^/]*|NOTICE[^/]*|README\.md", name)]


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
        refuse_hub(repo, revision, error)
    try:
        for component in loaded_components(index):
            _component_folder(folder, component)
            if has_weights(index, component):
                weight_files(folder, component, variant)
        if missing := [name for name in needed if not (folder / name).is_file()]:
            raise InputError(f"it lacks {few(missing)}")
    except InputError as incomplete:
        raise InputError(
            f"the cached copy of {repo!r} cannot be used ({incomplete}), and {hub_failure(error)}: run once "
            "with a connection to download the rest"
        ) from error
    if not constants.HF_HUB_OFFLINE:
        logger.warning("%s; using the cached copy of %s", hub_failure(error), repo)
    return folder


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
        files = list_folder(folder)
        hint = "pass the folder of a whole checkpoint in the diffusers layout"
        if "config.json" in files and weight_sets(files):
            hint = "this is one component, so pass the folder above it"
        elif any(name.endswith((".safetensors", *PICKLES)) for name in files):
            hint = "a single-file checkpoint is loaded with Pipeline.from_single_file"
        raise InputError(f"the folder {str(folder)!r} has no model_index.json but {few(files)}: {hint}")
    index = read_json(path)
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
        raise InputError(f"{str(path)!r} is missing (the folder holds {few(list_folder(inside))}): restore it")
    return read_json(path)


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


def weight_sets(names: Iterable[str]) -> dict[str | None, _WeightSet]:
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
        pickles = sorted(name for name in files if name.endswith(PICKLES))
        if pickles:
            raise InputError(
                f"{where} has only pickle weights ({few(pickles)}), which can run code when they are "
                "opened: if you trust them, convert them once with diffusers' "
                "DiffusionPipeline.from_pretrained(...).save_pretrained(folder), or use a checkpoint with "
                "safetensors"
            )
        raise InputError(
            f"{where} has no weights but {few(files)}: it needs {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors"
        )
    if variant in sets:
        return sets[variant]
    if None in sets and variant in available:
        return sets[None]
    have = few([key or "the plain files" for key in sorted(sets, key=lambda key: key or "")])
    if variant is None:
        raise InputError(f"{where} has no plain weights: choose a variant it has ({have})")
    raise InputError(f"{where} has no variant {variant!r}: choose one it has ({have})")


def _open_component(folder: Path, component: str, variant: str | None) -> _Files:
    inside = _component_folder(folder, component)
    names = list_folder(inside)
    sets = weight_sets(names)
    available: set[str | None] = set(sets)
    if variant is not None and variant not in sets:
        for other in folder.iterdir():
            if other.is_dir():
                available.update(weight_sets(list_folder(other)))
    chosen = _choose(sets, variant, available, names, f"the folder {str(inside)!r}")
    if chosen.single:
        return _Files(existing(inside / chosen.single), {})
    if chosen.index_file is None:
        raise InputError(
            f"the folder {str(inside)!r} has shards ({few(chosen.shards)}) but no index: restore its "
            "*.safetensors.index.json"
        )
    return _Files(None, _read_shard_index(inside / chosen.index_file))


def _read_shard_index(path: Path) -> dict[str, Path]:
    """Tensor name -> the file of its shard."""
    weight_map = read_json(existing(path)).get("weight_map")
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
            f"({few(missing)}): download them again"
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
            f"the component folder {str(inside)!r} is missing ({str(folder)!r} holds {few(list_folder(folder))}): "
            "use a complete checkpoint"
        )
    return inside


def loaded_components(index: Mapping[str, Any]) -> list[str]:
    """The components that a pipeline loads: those with a library and a class, without the unused ones."""
    return [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
        and name not in _UNUSED_COMPONENTS
    ]


def has_weights(index: Mapping[str, Any], component: str) -> bool:
    """Whether a component of `model_index.json` is a model."""
    return not re.search("Tokenizer|Scheduler|Processor|Extractor", index[component][1])


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
    return dict(read_tensors(_tensors(Path(folder), component, variant)))


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
    assign(module, ((names[name], tensor) for name, tensor in read_tensors(wanted)), dtype, device)


def match_names(module: torch.nn.Module, shapes: Mapping[str, Sequence[int]], where: str) -> dict[str, str]:
    """Stored name -> the name in `module`, for the tensors that it needs of those stored with `shapes`.

    Accepts what `load_weights` says. Raises `InputError` that counts and names the missing, unexpected and
    misshapen tensors; `where` (such as "in 'unet'") says in it whose they are.
    """
    expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    target = {name: _current_name(name, expected, shapes) for name in shapes}
    tied = ties(module)

    given = {alias for name in target.values() for alias in tied.get(name, [name])}
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
        f"{len(names)} {what}: {few(names, 3)}"
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

    tied = ties(module)
    # T5 overflows in float16 but for the layers that transformers keeps in float32 for it.
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        tensor = tensor.to(device)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(torch.float32 if wide.intersection(name.split(".")) else dtype)
        aliases = tied.get(name, [name])
        # One Parameter object under all its names keeps tied parameters tied.
        shared = torch.nn.Parameter(tensor, requires_grad=False) if len(aliases) > 1 else tensor
        state.update(dict.fromkeys(aliases, shared))
    module.requires_grad_(False).eval()
    module.load_state_dict(state, assign=True)
    place_buffers(module, device)


def _tensors(folder: Path, component: str, variant: str | None) -> dict[str, Stored]:
    """Tensor name -> its place, from the checked headers of a component's files."""
    files = _open_component(folder, component, variant)
    if files.single:
        return read_header(files.single)
    headers = {path: read_header(path) for path in sorted(set(files.weight_map.values()))}
    for name, path in files.weight_map.items():
        if name not in headers[path]:
            raise InputError(f"the shard {str(path)!r} lacks the tensor {name!r} of its index: download it again")
    return {name: headers[path][name] for name, path in files.weight_map.items()}


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


def ties(module: torch.nn.Module) -> dict[str, list[str]]:
    """Parameter name -> all names of the same parameter object."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def place_buffers(module: torch.nn.Module, device: str | torch.device) -> None:
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
