"""A bundle: a folder of engines with a manifest, all that a product needs to make images without torch.

Engines of the target "aoti" run on torch alone, and their weights lie beside them, in files that they share.

`manifest.json`, version 1:
    format, version     "fastsd.bundle", 1
    name                what was exported, as the user named it
    exporter            version of fastsd
    index, scheduler    model_index.json and scheduler_config.json of the checkpoint
    configs             by component, what of its configuration a call is checked against
    defaults            steps and guidance where a call leaves them out
    tokenizers          by component, a folder of the bundle, or the numbers of a stand-in (random weights)
    samplers            by name (the checkpoint's own under that of its class), the file with its tables;
                        {"file", "tokens"} where they hold for one number of image tokens; or the configuration of a
                        flow Euler, which goes by its formula (`sampling.flow`)
    weights             by component, the digest of the weights it was made of; `loras`: what was merged into them
    files               size and sha256 of every file that belongs to no engine
    variants            one for each target and precision: its engines (`Engine`) and its verification end to end; the
                        engines of one component of the checkpoint may list the same file, such as its weights
    arguments           of the `fastsd export` that makes engines of the same checkpoint
    digest              sha256 of all of the above as canonical JSON
A path is relative to the folder. What is listed is checked against its size and sha256 before it is used; what is not
listed is never opened.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import shlex
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastsd import arrays, files, integrity, store
from fastsd.arrays import Array, concatenate
from fastsd.backends import ROWS, Engines, Functions, load_backend
from fastsd.errors import InputError
from fastsd.sampling.loop import row_by_row
from fastsd.text import Conditioning, Encoding

if TYPE_CHECKING:
    from fastsd.families import Components
    from fastsd.sampling.table import StepTable

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
FORMAT, VERSION = "fastsd.bundle", 1

# Targets with the devices that they run on; of those that share a device the likeliest to be the fastest first.
TARGETS = {
    "tensorrt": ("cuda",),
    "tensorrt-rtx": ("cuda",),
    "openvino": ("cpu",),
    "aoti": ("cuda", "cpu"),
    "onnx": ("cuda", "cpu"),
}
TENSORS = ("aoti",)  # targets that compute on torch tensors, on the CPU too, where all others take numpy arrays
DATA = ("onnx", "openvino")  # targets whose engines are graphs; all others are code of the machine that built it
NATIVE = (".plan", ".engine", ".pt2", ".so")  # and so is a file of these suffixes

Range = tuple[int, int, int]  # min, opt, max
Run = Callable[..., tuple[Array, ...]]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an engine.

    Attributes:
        name: as the engine calls it.
        dtype: "float32", "float16", "bfloat16" or "int64".
        shape: numbers, and names of what may vary ("batch", "height", "width", "tokens" or an expression of one).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Engine:
    """One component, built for one target and one profile.

    Attributes:
        component: "text_encoder", "prepare", "denoiser", "vae_decoder", ...
        target: the backend that runs it.
        path: its main file, relative to the bundle.
        precision: of its arithmetic.
        inputs: in the order of the graph.
        outputs: likewise.
        profile: min, opt and max of each dimension that the component has: "batch" (rows of the denoiser's batch, both
            halves of guidance), "height" and "width" (of the latents), "tokens".
        files: size in bytes and sha256 of every file it is made of, by path relative to the bundle.
        options: what the target needs to load it.
        record: how it was made: versions, machine, seconds, memory, and its verification report.
    """

    component: str
    target: str
    path: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profile: Mapping[str, Range]
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """The engines of one target in one precision, which together make images."""

    target: str
    precision: str
    engines: tuple[Engine, ...]
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; see the module."""

    name: str
    exporter: str
    index: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    defaults: Mapping[str, Any]
    tokenizers: Mapping[str, Any]
    samplers: Mapping[str, Any]
    weights: Mapping[str, str]
    loras: Mapping[str, float]
    files: Mapping[str, tuple[int, str]]
    variants: tuple[Variant, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def everything(self) -> dict[str, tuple[int, str]]:
        """Size and sha256 of all files, those of the engines too."""
        engines = (engine.files for variant in self.variants for engine in variant.engines)
        return dict(itertools.chain(self.files.items(), *(one.items() for one in engines)))

    def to_json(self) -> str:
        """The text of the file."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**document, "digest": digest(document)}, indent=1, allow_nan=False)


def digest(document: Mapping[str, Any]) -> str:
    """That of a manifest without its own."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Loaded(NamedTuple):
    """A bundle as `Pipeline` takes it; of the components there are the configurations alone."""

    components: Components
    name: str
    defaults: Mapping[str, Any]
    engines: Engines


def is_bundle(model: str | Path) -> bool:
    """Whether it is the folder of a bundle."""
    return str(model) != "" and (Path(model) / MANIFEST).is_file()


def read(folder: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        InputError: it cannot be read, is of another version or damaged.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_bytes().decode())
        # What has none says by its fields whether it is a manifest.
        if (recorded := document.pop("digest", None)) is not None and recorded != digest(document):
            raise ValueError("its sha256 is not the recorded one")
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({error.strerror}): make it readable") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, error) from None
    if document.pop("format", None) != FORMAT:
        raise InputError(f'{str(path)!r} is no manifest of a bundle: it lacks "format": "{FORMAT}"')
    if (version := document.pop("version", None)) != VERSION:
        raise InputError(
            f"{str(path)!r} has version {version!r}, and this fastsd reads version {VERSION}: export it anew"
        )
    try:
        variants = tuple(
            Variant(**{**variant, "engines": tuple(read_engine(one) for one in variant["engines"])})
            for variant in document.pop("variants")
        )
        manifest = Manifest(**{**document, "files": _listed(document["files"]), "variants": variants})
        _check_types(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None
    return manifest


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{str(path)!r} is damaged ({files.one_line(error)}): export the bundle anew")


def read_engine(plain: Mapping[str, Any]) -> Engine:
    """An engine of its JSON."""
    profile = {name: _range(value) for name, value in plain["profile"].items()}
    specs = {side: read_specs(plain[side]) for side in ("inputs", "outputs")}
    return Engine(**{**plain, **specs, "profile": profile, "files": _listed(plain["files"])})


def read_specs(plain: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of their JSON."""
    return tuple(TensorSpec(one["name"], one["dtype"], tuple(one["shape"])) for one in plain)


def _listed(plain: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    return {str(path): (int(size), str(digest)) for path, (size, digest) in plain.items()}


def _range(value: Sequence[int]) -> Range:
    least, usual, most = (int(one) for one in value)
    if not 1 <= least <= usual <= most:
        raise ValueError(f"a range of {list(value)}")
    return least, usual, most


def _check_types(manifest: Manifest) -> None:
    """Raise `TypeError` where the JSON has another shape than the dataclasses say."""
    objects = ("index", "scheduler", "configs", "defaults", "tokenizers", "samplers", "weights", "loras", "arguments")
    for name, value in [*((name, getattr(manifest, name)) for name in objects), *dict(manifest.configs).items()]:
        if not isinstance(value, dict):
            raise TypeError(f"{name} is no object")
    for name, value in manifest.loras.items():
        if type(value) not in (int, float):
            raise TypeError(f"the weight of {name!r} is no number")
    for variant in manifest.variants:
        if variant.target not in TARGETS or not variant.engines:
            raise ValueError(f"a variant for {variant.target!r} with {len(variant.engines)} engines")
        for engine in variant.engines:
            if engine.path not in engine.files:
                raise ValueError(f"{engine.path!r} is not among the files of its engine")
    for name, where in manifest.tokenizers.items():
        if isinstance(where, str) and not any(path.startswith(f"{where}/") for path in manifest.files):
            raise ValueError(f"{where!r} of {name!r} is not among its files")
    for name, source in manifest.samplers.items():
        path, tokens = _tables_of(source)
        by_formula = isinstance(source, dict) and "file" not in source
        if not by_formula and path not in manifest.files:
            raise ValueError(f"{path!r} of {name!r} is not among its files")
        if not (tokens is None or (type(tokens) is int and tokens > 0)):
            raise TypeError(f"{tokens!r} of {name!r} is no number of tokens")


def _tables_of(source: Any) -> tuple[Any, Any]:
    """The file with the tables of a sampler, None if it goes by a formula, and the tokens that they are for or None."""
    if isinstance(source, dict):
        return source.get("file"), source.get("tokens") if "file" in source else None
    return source, None


def _check_runs(manifest: Manifest, variant: Variant) -> None:
    """Raise where the manifest lacks what a run reads of it."""
    from fastsd import tokenizer

    if missing := {"denoiser", "vae"} - manifest.configs.keys():
        raise ValueError(f"configs lacks {min(missing)}")
    if not (manifest.configs["vae"]["block_out_channels"] and manifest.configs["vae"]["latent_channels"]):
        raise ValueError("the configuration of the vae is empty")
    if not isinstance(manifest.index.get("_fastsd", {}), dict):
        raise TypeError("_fastsd of the index is no object")
    for where in manifest.tokenizers.values():
        if isinstance(where, dict):
            tokenizer.hashing(**where)
        elif not isinstance(where, str):
            raise TypeError(f"{where!r} is no tokenizer")
    for engine in variant.engines:
        if engine.component == "denoiser" and not {"batch", "height", "width"} <= engine.profile.keys():
            raise ValueError(f"the profile of {engine.path!r} lacks a dimension")


# ------------------------------------------------------------------------------------------------------------
# From the folder to functions


def load(
    folder: Path,
    backend: str,
    precision: str,
    device: str,
    *,
    trust: bool = False,
    serve: Callable[[Engine], Run] | None = None,
) -> Loaded:
    """A bundle whose engines are loaded when they are first needed.

    Args:
        folder: of the bundle.
        backend: a target, or "auto": the first of `TARGETS` that the bundle has and this machine runs.
        precision: that of a variant, or "auto": the first one.
        device: "auto", "cpu", "cuda" or "cuda:1".
        trust: load native engines though another machine built them.
        serve: gives what runs an engine that another process holds, with numpy arrays; its files are not looked at,
            and of backend, precision and device nothing is read: the first variant is run. None: engines run here.

    Raises:
        InputError: the bundle is damaged, has no such variant, or none that runs here.
    """
    from fastsd import tokenizer
    from fastsd.families import Components, family

    manifest = read(folder)
    listed = dict(manifest.files) if serve is not None else manifest.everything()
    if serve is None:
        device = "cpu" if device == "cpu:0" else device  # as torch calls it, too
        variant, place = choose(manifest, folder, backend, precision.removeprefix("torch."), device)
    else:
        variant, place = manifest.variants[0], "cpu"
    integrity.check_files(folder, listed, checksums=False, besides=(MANIFEST, SIGNATURE))
    integrity.check_files(folder, manifest.files, besides=None)
    module = family(str(manifest.index.get("_class_name")))
    encoders = [encoder.name for encoder in module.ENCODERS if encoder.name in manifest.configs]
    has = {engine.component for engine in variant.engines}
    if "denoiser" not in has:
        lacking = [name for name in (*encoders, "prepare", "denoiser", "vae_decoder") if name not in has]
        raise InputError(
            f"{str(folder)!r} has only {files.few(sorted(has))}, which makes no images: "
            f"add the rest with --components {','.join(lacking)}"
        )
    try:
        _check_runs(manifest, variant)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder / MANIFEST, error) from None
    denoiser = next(engine for engine in variant.engines if engine.component == "denoiser")
    configs = {name: SimpleNamespace(config=SimpleNamespace(**config)) for name, config in manifest.configs.items()}
    # The default size is one that there is an engine for.
    configs["denoiser"].config.sample_size = [denoiser.profile[side][1] for side in ("height", "width")]

    def read_tokenizer(name: str) -> Any:
        where = manifest.tokenizers.get(name)
        if isinstance(where, dict):
            return tokenizer.hashing(**where)
        return None if where is None else tokenizer.load(folder / where)

    components = Components(
        tokenizers=tuple(read_tokenizer(encoder.tokenizer) for encoder in module.ENCODERS),
        text_encoders=tuple(configs.get(encoder.name) for encoder in module.ENCODERS),
        denoiser=configs["denoiser"],
        vae=configs["vae"],
        scheduler=manifest.scheduler,
        index=manifest.index,
    )
    if serve is None and any(map(is_native, variant.engines)) and not trust and not made_here(folder):
        raise InputError(
            f"{str(folder)!r} holds native engines that were not built on this machine: export it here, or pass "
            "trust=True (--trust) if you trust who built it"
        )
    router = Router(folder, manifest, variant, place, serve)
    tensors = serve is None and variant.target in TENSORS
    if tensors:
        router.look_ahead()
    functions = compose(module, components, router.route, router.admit, place, tensors=tensors)
    table = functools.partial(_table, folder, manifest, components)
    engines = Engines(
        target=variant.target,
        precision=variant.precision,
        device=place,
        functions=functions,
        table=table,
        modules=_modules(module, variant, router) if serve is None else {},
        loras=manifest.loras,
        sizes=_sizes(variant),
    )
    return Loaded(components, manifest.name, manifest.defaults, engines)


def _sizes(variant: Variant) -> dict[str, int]:
    """Bytes of the files of each component; one that several share counts as that of the one which reads most of it."""
    sizes, seen = dict.fromkeys((engine.component for engine in variant.engines), 0), set[str]()
    order = ("denoiser", "vae_decoder")
    for engine in sorted(variant.engines, key=lambda engine: engine.component not in order):
        sizes[engine.component] += sum(size for path, (size, _) in engine.files.items() if path not in seen)
        seen |= engine.files.keys()
    return sizes


def _modules(family: ModuleType, variant: Variant, router: Router) -> Mapping[str, Any]:
    """The weights that lie beside the engines and that a LoRA may change, by component of the checkpoint."""
    if variant.target not in TENSORS:
        return {}
    known = {*(encoder.name for encoder in family.ENCODERS), family.DENOISER[0]}
    named = {Path(str(engine.options.get("weights"))).stem: engine for engine in variant.engines}
    return _Lazy(
        {
            name: functools.partial(router.weights, engine)
            for name, engine in named.items()
            if name in known and engine.options.get("weights") in engine.files
        }
    )


class _Lazy(Mapping[str, Any]):
    """Values that are made when they are asked for."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> Any:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def is_native(engine: Engine) -> bool:
    """Whether an engine is code of the machine that built it, not a graph."""
    return engine.target not in DATA or any(Path(path).suffix.lower() in NATIVE for path in engine.files)


def made_here(folder: Path) -> bool:
    """Whether this machine signed the manifest."""
    try:
        signature = (folder / SIGNATURE).read_text()
        return store.made_here((folder / MANIFEST).read_bytes(), signature)
    except (OSError, UnicodeDecodeError):
        return False


def choose(manifest: Manifest, folder: Path, backend: str, precision: str, device: str) -> tuple[Variant, str]:
    """The variant to run, and the device; an `InputError` says what there is, and why it does not run here."""
    has = [f"{variant.target} in {variant.precision}" for variant in manifest.variants]
    reasons = []
    for kind, target in ((kind, target) for kind in ("cuda", "cpu") for target in TARGETS if kind in TARGETS[target]):
        for variant in manifest.variants:
            if (
                variant.target != target
                or backend not in ("auto", target)
                or precision not in ("auto", variant.precision)
                or device.partition(":")[0] not in ("auto", kind)
            ):
                continue
            place = kind if device == "auto" else device
            try:
                reason = load_backend(target).available(place, target)
            except Exception as error:  # whatever a broken library raises when it is imported
                reason = f"{target} does not load ({type(error).__name__}: {files.one_line(error)}): install it again"
            if reason is None:
                return variant, place
            reasons.append(reason)
    if reasons:
        raise InputError(f"{str(folder)!r} has {' and '.join(has)}, which do not run here: {'; '.join(reasons)}")
    asked = " ".join(word for word in (backend, precision, device) if word != "auto")
    raise InputError(
        f"{str(folder)!r} has {' and '.join(has)}, nothing for {asked}: export that, or ask for what it has"
    )


class Router:
    """The engines of a variant: for each component the tightest one that holds a request, checked and loaded once."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        variant: Variant,
        device: str,
        serve: Callable[[Engine], Run] | None = None,
    ) -> None:
        self._folder, self._manifest, self._variant, self._device = folder, manifest, variant, device
        self._serve = serve or self._load
        self._output = folder if serve is None else "DIR"  # of the command that adds an engine
        self._shared: dict[str, Any] = {"cache": store.home() / "engines"}
        self._loaded: dict[str, Run] = {}
        self._routes: dict[tuple[Any, ...], tuple[Run, frozenset[str]]] = {}
        self._locks = {engine.path: threading.Lock() for engine in variant.engines}
        self._checked: set[str] = set()  # files whose sha256 was that of the manifest
        self._ahead: dict[str, Future[None]] = {}  # those that a thread is looking at

    def route(self, component: str, dims: Mapping[str, int]) -> tuple[Run, frozenset[str]]:
        """The engine of a component for some dimensions, and the names of its inputs; `InputError` if there is none."""
        key = (component, *dims.values())  # a component is always asked for with the same dimensions, in every step
        found = self._routes.get(key)
        if found is None:
            engine = self._tightest(component, dims)
            with self._locks[engine.path]:
                run = self._loaded.get(engine.path)
                if run is None:
                    run = self._loaded[engine.path] = self._serve(engine)
            found = self._routes[key] = run, frozenset(spec.name for spec in engine.inputs)
        return found

    def admit(self, images: int, halves: int, size: tuple[int, int]) -> None:
        """Raise `InputError` if there is no engine for the images, the halves of guidance and (h, w) of the latents."""
        dims = {"batch": halves * images, "height": size[0], "width": size[1]}
        for component in ("prepare", "denoiser", "vae_decoder"):
            self._tightest(component, dims, halves)

    def weights(self, engine: Engine) -> Any:
        """The file of an engine's weights as a module, the one whose tensors the engines read."""
        path = str(engine.options["weights"])
        self._check({path: engine.files[path]})
        return load_backend(engine.target).weights(self._folder / path, engine, self._device, self._shared)

    def look_ahead(self) -> None:
        """Begin to check the weights that every call reads: as long as torch takes to import, which goes on beside."""
        files = {
            path: engine.files[path] for engine in self._variant.engines if (path := engine.options.get("weights"))
        }
        thread = ThreadPoolExecutor(1)
        for path, value in files.items():
            self._ahead[path] = thread.submit(integrity.check_files, self._folder, {path: value}, besides=None)
        thread.shutdown(wait=False)

    def _check(self, files: Mapping[str, tuple[int, str]]) -> None:
        unchecked = {path: value for path, value in files.items() if path not in self._checked}
        for path in unchecked.keys() & self._ahead.keys():
            if (found := self._ahead.get(path)) is not None:
                found.result()  # raises what the check did
                del unchecked[path]
                self._checked.add(path)
        if unchecked:
            integrity.check_files(self._folder, unchecked, besides=None)
        self._checked |= unchecked.keys()

    def _load(self, engine: Engine) -> Run:
        self._check(engine.files)
        graphs = {path for path in engine.files if path.lower().endswith(".onnx")}
        if engine.target in DATA and not (engine.target == "openvino" and engine.path.endswith(".xml")):
            graphs.add(engine.path)  # whatever its name: what reads it goes by the content
        for path in sorted(graphs):  # they may name other files
            integrity.check_external(self._folder / path, self._folder, engine.files)
        run: Run = load_backend(engine.target).load(
            self._folder / engine.path, engine, device=self._device, shared=self._shared
        )
        return run

    def _tightest(self, component: str, dims: Mapping[str, int], halves: int | None = None) -> Engine:
        engines = [engine for engine in self._variant.engines if engine.component == component]
        holds = [
            engine
            for engine in engines
            if all(low <= dims.get(name, low) <= high for name, (low, _, high) in engine.profile.items())
        ]
        if holds:  # a fixed profile before a range up to the same, and what was added later before what was there

            def tightness(engine: Engine) -> tuple[int, int]:
                least, _, most = zip(*engine.profile.values(), strict=True) if engine.profile else ((), (), ())
                return math.prod(most), -math.prod(least)

            return min(reversed(holds), key=tightness)
        if not engines:
            raise InputError(f"the bundle has no {component}: export it with --components {component}")
        factor = _factor(self._manifest.configs["vae"]["block_out_channels"])
        pixels = {name: dims[name] * factor for name in ("height", "width") if name in dims}
        asked = {**pixels, **{name: dims[name] for name in ("batch", "tokens") if name in dims}}
        words = " and ".join(f"{name} {value}" for name, value in asked.items())
        sizes: dict[str, Any] = {**pixels, **self._images(dims, halves), **self._tokens(component, dims)}
        raise InputError(f"no {component} of the bundle holds {words}: `{self._command(sizes)}` adds one")

    def _images(self, dims: Mapping[str, int], halves: int | None) -> dict[str, Any]:
        """Rows of the denoiser's batch as an export counts them."""
        rows = dims.get("batch")
        if rows is None:
            return {}
        if halves is None:  # only the rows are known: an even number may be both halves
            halves = 2 - rows % 2
        return {"batch": rows // halves, **({"guidance": "on"} if halves == 2 else {})}

    def _tokens(self, component: str, dims: Mapping[str, int]) -> dict[str, Any]:
        """Tokens as an export counts them, those of the denoiser: CLIP's in whole windows, SD3's with T5's."""
        from fastsd.families import family

        if "tokens" not in dims:
            return {}
        module, tokens = family(str(self._manifest.index["_class_name"])), dims["tokens"]
        kind = module.__name__.rpartition(".")[2]
        window = int(self._manifest.configs.get(module.ENCODERS[0].name, {}).get("max_position_embeddings", 77))
        if kind in ("sd", "sdxl"):
            tokens = math.ceil(tokens / window) * window
        elif kind == "sd3" and component.startswith("text_encoder"):
            tokens += window
        return {"tokens": tokens}

    def _command(self, sizes: Mapping[str, Any]) -> str:
        """What adds engines for other sizes to the bundle."""
        lane = self._variant
        kind = {"quantize": lane.precision} if lane.precision == "int8" else {"dtype": lane.precision}
        same = dict(self._manifest.arguments)
        words = ["fastsd", "export", str(same.pop("model", self._manifest.name)), "--to", lane.target]
        for name, value in {**kind, **same, "output": self._output, **sizes}.items():
            flag = "-o" if name == "output" else f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, list | tuple) else (value,):
                if one is True:
                    words.append(flag)
                elif one is not None and one is not False:
                    words += [flag, str(one)]
        return shlex.join(words)


def _factor(block_out_channels: Sequence[int]) -> int:
    return int(2 ** (len(block_out_channels) - 1))


def compose(
    family: ModuleType,
    components: Components,
    route: Callable[[str, Mapping[str, int]], tuple[Run, frozenset[str]]],
    admit: Callable[[int, int, tuple[int, int]], None] = lambda images, halves, size: None,
    device: str = "cpu",
    *,
    tensors: bool = False,
) -> Functions:
    """The functions of the straight line out of one function for each component.

    Args:
        family: module of `fastsd.families`.
        components: of which only the configurations are read.
        route: (component, its dimensions) -> what runs it, and the names of its inputs.
        admit: see `Functions`.
        device: "cpu" (numpy arrays) or a CUDA device (torch tensors).
        tensors: torch tensors on the CPU too.
    """
    in_numpy = device == "cpu" and not tensors

    def array(values: Any) -> Array:
        if in_numpy:
            return np.ascontiguousarray(arrays.to_numpy(values) if arrays.is_array(values) else values, np.float32)
        import torch

        return torch.as_tensor(values).to(device, torch.float32)

    def integers(values: Any) -> Array:
        if in_numpy:
            return np.array(values, np.int64)
        import torch

        return torch.tensor(values, device=device)

    def read(place: int, ids: list[list[int]], clip_skip: int | None) -> Encoding:
        encoder = family.ENCODERS[place]
        run, _ = route(encoder.name, {} if encoder.is_clip else {"tokens": len(ids[0])})
        windows = [run(ids=integers([window])) for window in ids]
        states = concatenate([outputs[0][clip_skip or 0] for outputs in windows], 0)  # [windows * tokens, dim]
        return Encoding(states[None], windows[0][1] if encoder.is_clip else None)

    def prepare(timesteps: Array, conditioning: Conditioning, size: tuple[int, int]) -> tuple[Array, ...]:
        batch, tokens = conditioning.context.shape[:2]
        run, names = route("prepare", {"batch": batch, "tokens": tokens, "height": size[0], "width": size[1]})
        latents = (batch, components.vae.config.latent_channels, *size)
        given = {
            "hidden_states": conditioning.context,
            "pooled": conditioning.pooled,
            "time_ids": conditioning.time_ids,
            "guidance_scale": array(conditioning.guidance_scale),
            "latents": arrays.zeros(latents, conditioning.context),
        }
        given = {name: value for name, value in given.items() if name in names}
        rows = []
        for start in range(0, len(timesteps), ROWS):
            chunk = timesteps[start : start + ROWS]
            padded = np.pad(chunk, ((0, ROWS - len(chunk)), (0, 0)), mode="edge")
            modulation, *others = run(timesteps=array(padded), **given)
            rows.append(modulation[: len(chunk)])
        return (concatenate(rows), *others)

    def denoise(latents: Array, modulation: Array, context: Array, *position: Array) -> Array:
        batch, _, height, width = latents.shape
        run, _ = route("denoiser", {"batch": batch, "tokens": context.shape[1], "height": height, "width": width})
        named = dict(zip(("position",), position, strict=False))
        prediction: Array = run(latents=array(latents), modulation=modulation, context=context, **named)[0]
        return prediction

    def one_by_one(component: str, name: str, values: Array, height: int, width: int) -> Array:
        run, _ = route(component, {"height": height, "width": width})
        return concatenate([run(**{name: values[i : i + 1]})[0] for i in range(len(values))])

    sample = row_by_row(denoise)
    if tensors and device != "cpu":  # a graph can capture packages, which work on the caller's stream
        import torch

        from fastsd.sampling.graph import Cuda, Graphs, sampler

        sample = sampler(denoise, Graphs(Cuda(torch.device(device))))
    factor = _factor(components.vae.config.block_out_channels)

    def synchronize() -> None:
        if device != "cpu":
            import torch

            torch.cuda.current_stream(device).synchronize()  # not the device, on which a graph may be being captured

    return Functions(
        read=read,
        prepare=prepare,
        denoise=denoise,
        sample=sample,
        decode=lambda latents: one_by_one("vae_decoder", "latents", latents, *latents.shape[2:]),
        encode=lambda pixels: one_by_one(
            "vae_encoder", "pixels", pixels, pixels.shape[1] // factor, pixels.shape[2] // factor
        ),
        array=array,
        cast=array,
        admit=admit,
        synchronize=synchronize,
    )


# ------------------------------------------------------------------------------------------------------------
# Samplers

MAX_BYTES = 2**26  # of a sampler's tables, unpacked; 50 of them are 0.5 MB, 1000 of 1 to 1000 steps would be 200 MB


def _table(
    folder: Path,
    manifest: Manifest,
    components: Components,
    scheduler: Any,
    steps: int | None,
    tokens: int,
    arguments: Mapping[str, Any],
) -> StepTable:
    """The table of a sampler: from its file, or by its formula; `InputError` if the bundle has none."""
    from fastsd.families import family
    from fastsd.sampling.flow import flow_euler

    known = ", ".join(manifest.samplers)
    if not isinstance(scheduler, str | None):
        raise InputError(f"a bundle has its samplers as tables: name one of {known}")
    source = manifest.samplers.get(scheduler or str(manifest.scheduler.get("_class_name")))
    given = {key: value for key, value in arguments.items() if key != "eta" or value}
    if source is None:
        raise InputError(f"the bundle has no sampler {scheduler!r}: use {known}, or export with --samplers {scheduler}")
    path, only = _tables_of(source)
    if path is not None:
        if given or steps is None:
            raise InputError(f"the samplers of a bundle are tables without {', '.join(given)}: leave it out")
        if only not in (None, tokens):
            raise InputError(
                f"the bundle's tables of {scheduler or manifest.scheduler.get('_class_name')} are for images of {only} "
                f"tokens, not of {tokens}: export a bundle for this size alone, with --height and --width"
            )
        return unpack(_read_listed(folder, path, manifest), steps)
    stand_in = SimpleNamespace(config=source, set_timesteps=flow_euler)
    steps, sized = family(str(manifest.index["_class_name"])).schedule(components, stand_in, steps, tokens)
    try:
        return flow_euler(source, steps, **{**sized, **given})
    except TypeError:
        raise InputError(
            f"flow Euler of a bundle takes steps or sigmas, not {', '.join(given)}: leave it out"
        ) from None


def _read_listed(folder: Path, path: str, manifest: Manifest) -> bytes:
    """A small file that belongs to no engine; `InputError` if it is another than the manifest lists."""
    try:
        data = (folder / path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {str(folder / path)!r} ({error.strerror}): copy the bundle again") from error
    if (len(data), hashlib.sha256(data).hexdigest()) != manifest.files[path]:
        raise InputError(
            f"{str(folder / path)!r} is damaged (its sha256 is not the recorded one): copy the bundle again"
        )
    return data


def unpack(data: bytes, steps: int) -> StepTable:
    """A table of a sampler's file: gzip of lines of JSON, line n for n steps; the others are not parsed.

    Raises:
        InputError: there is none of that number, or the data are damaged.
    """
    from fastsd.sampling.table import StepTable

    stream = zlib.decompressobj(wbits=31)
    try:
        lines = stream.decompress(data, MAX_BYTES).split(b"\n")
    except zlib.error as error:
        raise InputError(f"the sampler's tables are damaged ({error}): export the bundle again") from None
    if not stream.eof:
        raise InputError("the sampler's tables are cut short, or too large: export the bundle again")
    if not 1 <= steps <= len(lines):
        raise InputError(
            f"the bundle has tables of 1 to {len(lines)} steps, not of {steps}: export it with --max-steps {steps}"
        )
    line = lines[steps - 1]
    if line.startswith(b'{"refused"'):
        raise InputError(json.loads(line)["refused"])
    return StepTable.from_json(line)
