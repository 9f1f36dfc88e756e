"""The demo's world: one coloured shape on a coloured background, and the captions people might write for it.

`Scene` says what a caption says; what it leaves open (a size or a place unsaid) is drawn at random when the scene is
painted. The same tables serve training (`train.py`) and the evaluation (`evaluate.py`).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

PIXELS = 128  # height and width of an image
SUPERSAMPLE = 4  # edges are anti-aliased by drawing larger and averaging

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (220, 30, 35),
    "green": (30, 150, 55),
    "blue": (30, 65, 215),
    "yellow": (250, 225, 40),
    "orange": (245, 130, 20),
    "purple": (125, 45, 165),
    "cyan": (45, 205, 220),
    "pink": (250, 150, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
SIZES = {None: (16.0, 38.0), "small": (16.0, 20.0), "large": (31.0, 38.0)}  # radius in pixels, from and to
PLACES = (None, "left", "right", "top", "bottom", "center")

Size = Literal["small", "large"] | None
Place = Literal["left", "right", "top", "bottom", "center"] | None


@dataclass(frozen=True)
class Scene:
    """What a caption says. `size` and `place` may be None: unsaid."""

    shape: str
    color: str
    background: str
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Geometry:
    """Where the shape lies: centre and radius, in pixels."""

    x: float
    y: float
    radius: float


def held_out(scene: Scene) -> bool:
    """Whether the scene's colour pair × shape is kept out of training (every seventh of the 660 combinations)."""
    names = list(COLORS)
    color, background = names.index(scene.color), names.index(scene.background)
    return (color + 3 * background + 5 * SHAPES.index(scene.shape)) % 7 == 0


def random_scene(rng: np.random.Generator, *, unseen: bool = False) -> Scene:
    """A scene whose colours differ; `unseen` draws from the held-out combinations, else from all others."""
    while True:
        color, background = rng.choice(list(COLORS), size=2, replace=False)
        scene = Scene(
            shape=str(rng.choice(SHAPES)),
            color=str(color),
            background=str(background),
            size=(None, "small", "large")[rng.integers(3)],
            place=PLACES[rng.integers(len(PLACES))],
        )
        if held_out(scene) == unseen:
            return scene


def place_shape(scene: Scene, rng: np.random.Generator) -> Geometry:
    """Draw what the caption leaves open: a radius, and a centre that keeps the whole shape inside the image."""
    radius = float(rng.uniform(*SIZES[scene.size]))
    margin = radius * 1.15 + 3  # the star's tips and the triangle's corners reach beyond the radius
    middle = PIXELS / 2

    def near_edge() -> float:
        return margin + float(rng.uniform(0, 5))

    def near_middle() -> float:
        return middle + float(rng.uniform(-4, 4))

    match scene.place:
        case "left":
            x, y = near_edge(), near_middle()
        case "right":
            x, y = PIXELS - near_edge(), near_middle()
        case "top":
            x, y = near_middle(), near_edge()
        case "bottom":
            x, y = near_middle(), PIXELS - near_edge()
        case "center":
            x, y = near_middle(), near_middle()
        case _:
            x, y = (float(v) for v in rng.uniform(margin, PIXELS - margin, size=2))
    return Geometry(x, y, radius)


def outline(shape: str, at: Geometry) -> list[tuple[float, float]]:
    """The corners of a shape that has corners, in pixels."""
    x, y, r = at.x, at.y, at.radius
    match shape:
        case "square":
            h = 0.88 * r
            return [(x - h, y - h), (x + h, y - h), (x + h, y + h), (x - h, y + h)]
        case "triangle":
            turns = [(k / 3, 1.15 * r) for k in range(3)]
        case "star":
            turns = [(k / 10, 1.15 * r if k % 2 == 0 else 0.48 * r) for k in range(10)]
        case "cross":
            a, b = 0.33 * r, 1.0 * r
            corners = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)]
            corners += [(-u, -v) for u, v in corners]
            return [(x + u, y + v) for u, v in corners]
        case _:
            raise ValueError(f"{shape!r} has no corners")
    return [(x + d * math.sin(2 * math.pi * t), y - d * math.cos(2 * math.pi * t)) for t, d in turns]


def paint(scene: Scene, at: Geometry) -> NDArray[np.uint8]:
    """The scene as pixels, uint8 [128, 128, 3]."""
    s = SUPERSAMPLE
    image = Image.new("RGB", (PIXELS * s, PIXELS * s), COLORS[scene.background])
    draw = ImageDraw.Draw(image)
    fill = COLORS[scene.color]
    if scene.shape in ("circle", "ring"):

        def disc(radius: float, color: tuple[int, int, int]) -> None:
            box = [at.x - radius, at.y - radius, at.x + radius, at.y + radius]
            draw.ellipse([v * s for v in box], fill=color)

        disc(at.radius, fill)
        if scene.shape == "ring":
            disc(0.55 * at.radius, COLORS[scene.background])
    else:
        draw.polygon([(u * s, v * s) for u, v in outline(scene.shape, at)], fill=fill)
    return np.asarray(image.resize((PIXELS, PIXELS), Image.Resampling.BOX))


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of many phrasings of the scene."""

    def one_of(*words: str) -> str:
        return words[rng.integers(len(words))]

    def article(words: str) -> str:
        return ("an " if words[0] in "aeiou" else "a ") + words

    size = {
        None: "",
        "small": one_of("small ", "tiny ", "little "),
        "large": one_of("large ", "big ", "huge "),
    }[scene.size]
    place = scene.place or ""
    where = {
        "": "",
        "center": one_of("in the center", "at the center", "in the middle"),
        "left": one_of("on the left", "at the left", "on the left side"),
        "right": one_of("on the right", "at the right", "on the right side"),
        "top": one_of("at the top", "on top", "at the top edge"),
        "bottom": one_of("at the bottom", "on the bottom", "at the bottom edge"),
    }[place]
    noun = f"{size}{scene.color} {scene.shape}"
    ground = scene.background
    behind = one_of(f"on {article(ground)} background", f"against {article(ground)} background", f"on {ground}")
    terse = ", ".join(part for part in (noun, place, f"{ground} background") if part)
    lead = one_of("", "", "", "a picture of ", "an image of ", "a drawing of ")
    phrasings = [
        f"{lead}{article(noun)} {where} {behind}",
        f"{lead}{article(noun)} {behind} {where}" if where else f"{lead}{article(noun)} {behind}",
        f"{lead}{article(noun)} {where}, {ground} background",
        f"{where}, {article(noun)} {behind}" if where else f"{noun} {behind}",
        f"{article(ground)} background with {article(noun)} {where}",
        f"{noun} {where} {behind}",
        terse,
        terse,
    ]
    text = " ".join(one_of(*phrasings).split()).replace(" ,", ",")
    return text + one_of("", "", "", ".")
