"""Measure the demo checkpoint by its pixels: does the image show what the caption says?

    python -m fastsd.demo.evaluate            # writes evaluation.json beside this file

Each caption's image is judged by plain geometry, without a model: the background is the palette colour nearest to the
border's median, the shape is what differs from it, its colour the palette colour nearest to its inside's median, its
kind the outline it overlaps best, its place that of its centroid, its size that of its bounding box. Scenes whose
colour pair × shape was kept out of training are reported apart.
"""

import argparse
import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from fastsd import arrays
from fastsd.demo import world

HERE = Path(__file__).parent
TEMPLATE = 48  # side of the square in which outlines are compared
LEAST_OVERLAP = 0.7  # intersection over union below which a blob is no shape
CENTER = 8.0  # pixels off the middle that still count as the center
SMALL = 25.5  # radius in pixels, between the largest small shape (20) and the smallest large one (31)
OUTLINE = 45.0  # RGB distance from the background that makes a pixel part of the shape; palette colours lie 99 apart


def judge(pixels: NDArray[np.uint8]) -> dict[str, str | None]:
    """What an image uint8 [128, 128, 3] shows; None where it shows nothing that counts."""
    seen: dict[str, str | None] = dict.fromkeys(("background", "color", "shape", "place", "size"))
    image = pixels.astype(np.float64)
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, :2].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    seen["background"] = nearest_color(ground)
    mask = largest(np.linalg.norm(image - ground, axis=-1) > OUTLINE)
    if mask.sum() < 60:
        return seen
    inside = ndimage.binary_erosion(mask, iterations=2)
    seen["color"] = nearest_color(np.median(image[inside if inside.any() else mask], axis=0))
    seen["shape"] = nearest_shape(mask)
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    dy, dx = np.argwhere(mask).mean(axis=0) + 0.5 - world.PIXELS / 2
    if max(abs(dx), abs(dy)) <= CENTER:
        seen["place"] = "center"
    elif abs(dx) > abs(dy):
        seen["place"] = "left" if dx < 0 else "right"
    else:
        seen["place"] = "top" if dy < 0 else "bottom"
    seen["size"] = "small" if max(rows.stop - rows.start, columns.stop - columns.start) < 2 * SMALL else "large"
    return seen


def nearest_color(rgb: NDArray[np.float64]) -> str:
    """The palette's colour nearest to RGB levels 0..255."""
    return min(world.COLORS, key=lambda name: float(np.linalg.norm(rgb - world.COLORS[name])))


def largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part of a mask."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    result: NDArray[np.bool_] = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return result


def normalised(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask's bounding box, stretched to TEMPLATE × TEMPLATE."""
    rows, columns = ndimage.find_objects(mask.astype(int))[0]
    box = mask[rows, columns]
    y = (np.arange(TEMPLATE) + 0.5) * box.shape[0] / TEMPLATE
    x = (np.arange(TEMPLATE) + 0.5) * box.shape[1] / TEMPLATE
    result: NDArray[np.bool_] = box[np.ix_(y.astype(int), x.astype(int))]
    return result


def _template(shape: str) -> NDArray[np.bool_]:
    scene = world.Scene(shape, "white", "black")
    return normalised(world.paint(scene, world.Geometry(64, 64, 40))[..., 0] > 128)


TEMPLATES = {shape: _template(shape) for shape in world.SHAPES}


def nearest_shape(mask: NDArray[np.bool_]) -> str | None:
    """The outline that overlaps the mask best, or None if none does well."""
    box = normalised(mask)
    overlap = {name: (box & other).sum() / (box | other).sum() for name, other in TEMPLATES.items()}
    best = max(overlap, key=lambda name: float(overlap[name]))
    return best if overlap[best] >= LEAST_OVERLAP else None


def score(scenes: list[world.Scene], images: list[NDArray[np.uint8]]) -> dict[str, float]:
    """Share of images that show each attribute, of those whose caption says it."""
    hits: dict[str, list[bool]] = {name: [] for name in ("background", "color", "shape", "place", "size", "all")}
    for scene, pixels in zip(scenes, images, strict=True):
        seen = judge(pixels)
        said = {name: value for name, value in asdict(scene).items() if value is not None}
        for name, value in said.items():
            hits[name].append(seen[name] == value)
        hits["all"].append(all(seen[name] == value for name, value in said.items()))
    return {name: round(float(np.mean(values)), 4) for name, values in hits.items()}


def draw_scenes(count: int, *, unseen: bool, rng: np.random.Generator) -> list[world.Scene]:
    """`count` different scenes."""
    scenes: dict[world.Scene, None] = {}
    while len(scenes) < count:
        scenes[world.random_scene(rng, unseen=unseen)] = None
    return list(scenes)


def round_trip(pipe: Any, count: int, rng: np.random.Generator) -> float:
    """Mean PSNR in dB of images through the VAE and back."""
    values = []
    for scene in draw_scenes(count, unseen=False, rng=rng):
        pixels = world.paint(scene, world.place_shape(scene, rng)).astype(np.float32)[None] / 255
        back = arrays.to_numpy(pipe.decode(pipe.encode(pixels)))
        values.append(-10 * np.log10(np.mean((back - pixels) ** 2)))
    return round(float(np.mean(values)), 2)


def grid(captions: list[str], images: list[NDArray[np.uint8]], columns: int = 6) -> Image.Image:
    """Images in rows, each above its caption."""
    side, text, gap = world.PIXELS, 38, 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + text + gap) - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, (caption, pixels) in enumerate(zip(captions, images, strict=True)):
        x, y = i % columns * (side + gap), i // columns * (side + text + gap)
        sheet.paste(Image.fromarray(pixels), (x, y))
        draw.multiline_text((x, y + side + 1), "\n".join(textwrap.wrap(caption, 25)), "black", font, spacing=1)
    return sheet


def main() -> None:
    """Evaluate a checkpoint and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=400, help="captions seen in training, and as many held out")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=None, help="default: the checkpoint's")
    parser.add_argument("--scheduler", default="dpmpp_2m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--grid", type=Path, help="also write the first 24 held-out images, as they came, as a PNG")
    parser.add_argument("--out", type=Path, default=HERE / "evaluation.json")
    args = parser.parse_args()

    import fastsd

    pipe = fastsd.Pipeline.from_pretrained(args.model, dtype=args.dtype)
    guidance = pipe.defaults["guidance_scale"] if args.guidance_scale is None else args.guidance_scale
    report: dict[str, Any] = {
        "steps": args.steps,
        "scheduler": args.scheduler,
        "guidance_scale": guidance,
        "dtype": args.dtype,
        "captions": args.count,
    }
    for name, unseen in (("seen", False), ("held_out", True)):
        rng = np.random.default_rng((args.seed, unseen))
        scenes = draw_scenes(args.count, unseen=unseen, rng=rng)
        captions = [world.caption(scene, rng) for scene in scenes]
        images: list[NDArray[np.uint8]] = []
        for start in range(0, len(scenes), 20):
            result = pipe(
                captions[start : start + 20],
                num_inference_steps=args.steps,
                guidance_scale=guidance,
                scheduler=args.scheduler,
                seed=args.seed + start,
            )
            images += [np.asarray(one) for one in result.images]
        report[name] = score(scenes, images)
        print(name, report[name], flush=True)
        if unseen and args.grid:
            grid(captions[:24], images[:24]).save(args.grid, optimize=True)
    report["vae_psnr_db"] = round_trip(pipe, 200, np.random.default_rng(args.seed))
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
