"""Pixels to image files that carry their own recipe.

A PNG holds two texts: `parameters`, in the layout of AUTOMATIC1111's web UI that many tools read, and
`fastsd`, the full recipe as JSON. A file is written beside its final name, flushed to the disk and then
renamed, so that no reader ever sees half an image and no existing file is lost by accident.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

import fastsd
from fastsd.errors import InputError, NumericError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# The name and the schedule type that the web UI gives to each of our sampler names.
_SAMPLERS = {
    "ddim": ("DDIM", "Uniform"),
    "ddpm": ("DDPM", "Uniform"),
    "pndm": ("PLMS", "Uniform"),
    "lms": ("LMS", "Uniform"),
    "heun": ("Heun", "Uniform"),
    "euler": ("Euler", "Uniform"),
    "euler_a": ("Euler a", "Uniform"),
    "dpmpp_2m": ("DPM++ 2M", "Uniform"),
    "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
    "dpmpp_2m_sde": ("DPM++ 2M SDE", "Uniform"),
    "dpmpp_sde": ("DPM++ SDE", "Uniform"),
    "dpm2": ("DPM2", "Uniform"),
    "dpm2_a": ("DPM2 a", "Uniform"),
    "deis": ("DEIS", "Uniform"),
    "unipc": ("UniPC", "Uniform"),
    "lcm": ("LCM", "Uniform"),
    "tcd": ("TCD", "Uniform"),
    "flow_euler": ("Euler", "Simple"),
    "flow_heun": ("Heun", "Simple"),
    "flow_dpmpp_2m": ("DPM++ 2M", "Simple"),
    "flow_unipc": ("UniPC", "Simple"),
}


@dataclass(frozen=True)
class Recipe:
    """What made an image; the names are those of the pipeline's arguments, so that it can be made again.

    `scheduler` is a short name or a class name, `seed` is None when the caller gave the latents, `width` and
    `height` are pixels, and `extra` holds whatever else the caller set (anything JSON can hold), such as
    `eta` or `dtype`.
    """

    prompt: str
    num_inference_steps: int
    scheduler: str
    guidance_scale: float
    seed: int | None
    width: int
    height: int
    model: str
    negative_prompt: str | None = None
    version: str = fastsd.__version__
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of pure ASCII, so that every PNG reader gets it back exactly."""
        fields = {**asdict(self), "extra": dict(self.extra)}
        return json.dumps(fields, ensure_ascii=True, allow_nan=False)

    def parameters(self) -> str:
        """The text of the web UI: prompt, negative prompt and one line of settings."""
        sampler, schedule = _SAMPLERS.get(self.scheduler, (self.scheduler, None))
        settings: dict[str, object] = {
            "Steps": self.num_inference_steps,
            "Sampler": sampler,
            "Schedule type": schedule,
            "CFG scale": f"{self.guidance_scale:.12g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model": self.model,
            "Version": f"fastsd {self.version}",
        }
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        given = {key: value for key, value in settings.items() if value is not None}
        lines.append(", ".join(f"{key}: {_quote(value)}" for key, value in given.items()))
        return "\n".join(lines)


def _quote(value: object) -> str:
    # The web UI's own rule: what would break its `key: value, key: value` line is written as a JSON string.
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def to_pil(pixels: NDArray[np.floating[Any]] | torch.Tensor) -> list[Image.Image]:
    """Images from floats in 0..1 of shape [batch, height, width, 3] (numpy or torch, any float dtype, any
    device).

    Rounded as `diffusers.image_processor.VaeImageProcessor.numpy_to_pil` does; values outside 0..1 are
    clipped. Raises `InputError` for another shape or dtype, `NumericError` for NaN or Inf.
    """
    array = pixels if isinstance(pixels, np.ndarray) else pixels.detach().cpu().float().numpy()
    is_float = np.issubdtype(array.dtype, np.floating)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape or not is_float:
        raise InputError(
            f"pixels of shape {list(array.shape)} and dtype {array.dtype} are no images: floats in 0..1 of "
            "shape [batch, height, width, 3] are needed"
        )
    images = []
    for one in array:
        # As diffusers: float16 would round twice, x times 255 and then the level.
        values = one.astype(np.float32) if one.dtype == np.float16 else one
        if not np.isfinite(values).all():
            raise NumericError("the image of the VAE has NaN or Inf: decode in float32 (dtype='float32')")
        images.append(Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)))
    return images


def from_pil(images: Image.Image | Sequence[Image.Image]) -> NDArray[np.float32]:
    """Images of one size to floats in 0..1, float32 [batch, height, width, 3]; alpha is dropped.

    Raises `InputError` when there is none, something else than an image, or more than one size.
    """
    pictures = [images] if isinstance(images, Image.Image) else list(images)
    if not pictures or any(not isinstance(one, Image.Image) for one in pictures):
        raise InputError("images must be PIL images or a tensor [batch, height, width, 3] in 0..1")
    if len({one.size for one in pictures}) > 1:
        raise InputError(f"images of one batch must have one size, not {sorted({one.size for one in pictures})}")
    return np.stack([np.asarray(one.convert("RGB")) for one in pictures]).astype(np.float32) / np.float32(255)


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """`path` if a PNG can be written there, checked before any work is spent.

    Raises `InputError` for a suffix other than .png, a folder, a missing or unwritable parent folder,
    something that is no plain file, and an existing file unless `overwrite`.
    """
    text = os.fspath(path)
    path = Path(text)
    if not text or "\0" in text:
        raise InputError(f"the output {text!r} is no file name: use one such as image.png")
    if _is_folder(text):
        inside = str(path / "image.png")
        raise InputError(f"the output {text!r} is a folder: name a file in it, such as {inside!r}")
    if path.suffix.lower() != ".png":
        better = str(path.with_suffix(".png")) if path.name else "image.png"
        raise InputError(f"the output {text!r} is not a .png, the only format written: use {better!r}")
    _check_folder(path.parent)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return path
    except OSError as error:
        _refuse_write(path, error)
    if not overwrite:
        _refuse_existing(path)
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise InputError(f"the output {text!r} exists and is no plain file: choose another name")
    return path


def output_paths(pattern: str | os.PathLike[str], count: int) -> list[Path]:
    """The files for `count` images from one output name.

    One image goes to `out.png` itself, several to `out_0000.png`, `out_0001.png`, ... An existing folder (or
    a name that ends with a slash) gets `0000.png`, `0001.png`, ..., going on after the highest number it
    already holds.

    Only names are made here; `check_output` says whether each can be written.
    Raises `InputError` for a count below 1 and a named folder that does not exist or cannot be read.
    """
    if count < 1:
        raise InputError(f"{count} images cannot be written: the count must be 1 or more")
    text = os.fspath(pattern)
    path = Path(text)
    if not text or "\0" in text:
        raise InputError(f"the output {text!r} is no file name: use one such as image.png")
    if _is_folder(text):
        _check_folder(path)
        try:
            names = os.listdir(path)
        except OSError as error:
            _refuse_read(text, error)
        taken = [int(name[:-4]) for name in names if re.fullmatch(r"[0-9]{4,}\.png", name)]
        first = max(taken, default=-1) + 1
        return [path / f"{number:04d}.png" for number in range(first, first + count)]
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}_{number:04d}{path.suffix}") for number in range(count)]


def save_png(
    image: Image.Image,
    path: str | os.PathLike[str],
    recipe: Recipe | None,
    *,
    overwrite: bool = False,
    metadata: bool = True,
) -> None:
    """Write `image` with its recipe (unless `metadata` is off or `recipe` is None) as the PNG file `path`,
    atomically.

    The file appears complete under its name or not at all. Without `overwrite` an existing file stays, even
    one that appears during the write. Raises `InputError` as `check_output` does, and when the disk refuses
    the file.
    """
    path = check_output(path, overwrite)
    texts = PngInfo()
    if metadata and recipe is not None:
        try:
            texts.add_text("parameters", recipe.parameters())  # Latin-1 as tEXt, all else as iTXt in UTF-8
        except UnicodeEncodeError:
            raise InputError("the recipe has lone surrogates, which are no text: give valid Unicode") from None
        texts.add_text("fastsd", recipe.to_json())
    try:
        with _temporary(path.parent) as temporary:
            with open(temporary, "wb") as file:
                image.save(file, format="PNG", pnginfo=texts)
                file.flush()
                os.fsync(file.fileno())
            if overwrite:
                os.replace(temporary, path)
            else:
                _publish(temporary, path)
        _sync_folder(path.parent)
    except FileExistsError:
        _refuse_existing(path)
    except OSError as error:
        _refuse_write(path, error)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe that `save_png` put into a PNG, as `Recipe.to_json` wrote it.

    Raises `InputError` when the file cannot be read, is no PNG or carries no recipe of ours.
    """
    text = os.fspath(path)
    try:
        # Not Image.open: no pixel is decoded here, so its limit on their number has no reason.
        with open(text, "rb") as file, PngImageFile(file) as image:
            recipe = image.info.get("fastsd")
    except (SyntaxError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            _refuse_read(text, error)
        reason = "no file name" if "\0" in text else "no PNG file, or a broken one"
        raise InputError(f"{text!r} is {reason}: pass an image that fastsd wrote") from error
    try:
        value = json.loads(recipe) if isinstance(recipe, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(f"{text!r} carries no fastsd recipe: pass an image saved with its metadata")
    return value


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new empty file in `folder` that is gone afterwards, unless it was renamed."""
    path = folder / f".fastsd-{secrets.token_hex(8)}.tmp"
    # Not the tempfile module: its files are private, and an image should get the mode of the user's umask.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Give the finished file its name; FileExistsError if anything has that name, however late it came."""
    try:
        os.link(temporary, path)
    except OSError as error:
        # File systems without hard links (FAT, some network shares): reserve the name, then replace the empty
        # file.
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    # The new name itself reaches the disk with the folder; some file systems cannot sync a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_folder(text: str) -> bool:
    return os.path.isdir(text) or text.endswith(("/", os.sep))


def _check_folder(folder: Path) -> None:
    name = str(folder)
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.lexists(folder) else "does not exist"
        raise InputError(f"the output folder {name!r} {what}: make it first, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the output folder {name!r} is not writable: choose another or change its mode")


def _refuse_existing(path: Path) -> NoReturn:
    raise InputError(f"the output {str(path)!r} exists already: choose another name or allow --overwrite")


def _refuse_write(path: Path, error: OSError) -> NoReturn:
    raise InputError(f"cannot write {str(path)!r} ({error.strerror or error}): choose another place") from error


def _refuse_read(text: str, error: OSError) -> NoReturn:
    raise InputError(f"cannot read {text!r} ({error.strerror or error}): pass what exists and is readable") from error
