"""Pictures and captions in, a cache of latents and text embeddings out.

    python prepare.py                                          # 20,000 scenes into data/scenes
    python prepare.py photos/ --out data/photos --size 64      # a folder of pictures, or of tars

A caption stands in the .txt, .caption or .json of its picture's name, or in a metadata.jsonl or
metadata.csv with the columns file_name and text. The cache:

    data/scenes/meta.json                   sizes, encoders, mean and std per channel
                shard-00000/latents.npy     (N, C, H, W), N at most 4096
                            text.npy        (sum of all L, D), the embeddings of all captions
                            offsets.npy     (N + 1), caption i has the rows offsets[i : i + 2]
                            captions.json   N texts; shard.json  counts and settings
                            digest.npy      (N,) uint32, of the pixels; train.py holds out by it
                            teacher.npy     (N, D, h, w), features for REPA, if asked for
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import typing
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import model
from model import UserError, read_json, write_json

# ----------------------------------------------------------------------- the built-in world: scenes
COLOURS = {
    "red": (225, 35, 40),
    "green": (40, 165, 70),
    "blue": (40, 85, 225),
    "yellow": (250, 215, 45),
    "purple": (165, 50, 190),
    "cyan": (60, 205, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
ROWS, COLUMNS = {"top": -1, "": 0, "bottom": 1}, {"left": -1, "": 0, "right": 1}
PLACES = {
    f"{row} {column}".strip(): (COLUMNS[column], ROWS[row])
    for row in ROWS
    for column in COLUMNS
    if row or column
}
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
RELATION = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
NEVER_TRAINED = {("red", "triangle"), ("blue", "ring"), ("yellow", "cross"), ("green", "diamond")}
STEP = 0.27  # from the centre of the picture to a place, in picture widths


class Thing(typing.NamedTuple):
    """A shape in a scene; lengths in picture widths. What is None a caption leaves open."""

    colour: str | None
    shape: str
    place: str | None
    x: float
    y: float
    radius: float


class Scene(typing.NamedTuple):
    """One thing, or two that face each other, on a background (None: left open)."""

    background: str | None
    things: list


def put(colour, shape, place, rng):
    """A Thing in about the middle of a place, of about the same size as all."""
    x, y = 0.5 + STEP * np.array(PLACES[place]) + rng.uniform(-0.02, 0.02, 2)
    return Thing(colour, shape, place, x, y, rng.uniform(0.14, 0.17))


def split_of(scene):
    """The split that a scene belongs to, whatever its background: "composition" has a pair in
    NEVER_TRAINED, "held-out" is an eighth of the others, "train" the rest."""
    if any(thing[:2] in NEVER_TRAINED for thing in scene.things):
        return "composition"
    words = sorted(" ".join(thing[:3]) for thing in scene.things)
    digest = hashlib.md5(" ".join(words).encode()).digest()
    return "held-out" if digest[0] % 8 == 0 else "train"


def random_scene(rng, split="train"):
    """Draw a scene of a split with a NumPy generator."""
    while True:
        background, *colours = rng.permutation(list(COLOURS)).tolist()
        places = [rng.choice(list(PLACES)).item()]
        if rng.random() < 0.6:
            places = [rng.choice(list(OPPOSITE)).item()]
            places.append(OPPOSITE[places[0]])
        shapes = rng.choice(SHAPES, len(places)).tolist()
        things = [put(*thing, rng) for thing in zip(colours, shapes, places, strict=False)]
        scene = Scene(background, things)
        if split_of(scene) == split:
            return scene


def leave_open(scene, rng):
    """The scene as people may tell it: the things in either order, and some of it left open."""
    things = [scene.things[number] for number in rng.permutation(len(scene.things))]
    if rng.random() < 1 / 8:
        things = [thing._replace(place=None) for thing in things]
    if len(things) == 1 and rng.random() < 1 / 8:
        things = [things[0]._replace(colour=None)]
    return Scene(None if rng.random() < 1 / 3 else scene.background, things)


def fill_in(told, rng):
    """The scene that people expect where they leave something open. Two things stand side by side
    in the order told, and one lies at the bottom. A thing is black, or white on black. The
    background is white or black, or blue if both are taken."""
    things = []
    usual_places = ["bottom"] if len(told.things) == 1 else ["left", "right"]
    for thing, usual_place in zip(told.things, usual_places, strict=True):
        colour = thing.colour or ("white" if told.background == "black" else "black")
        things.append(put(colour, thing.shape, thing.place or usual_place, rng))
    plain = {"white", "black"} - {thing.colour for thing in things}
    background = told.background or rng.choice(sorted(plain) or ["blue"]).item()
    return Scene(background, things)


def caption(scene):
    """The scene in words, but for what is left open. Long captions are the largest effect that PRX
    measured: with short ones FID went from 18.20 to 36.84."""
    names = ["a " + " ".join(filter(None, thing[:2])) for thing in scene.things]
    place, text = scene.things[0].place, names[0]
    if len(names) == 2:
        text = f"{names[0]} {RELATION[place] if place else 'and'} {names[1]}"
    elif place:
        text = f"{text} at the {place}"
    return f"{text} on a {scene.background} background" if scene.background else text


def coverage(thing, size):
    """The share (size, size) of each pixel that a thing covers, by its distance to the outline."""
    centres = (np.arange(size) + 0.5) / size
    x, y = (centres - thing.x) / thing.radius, (centres[:, None] - thing.y) / thing.radius
    a, b, r = np.abs(x), np.abs(y), np.hypot(x, y)
    distance = {  # in radii, below 0 inside; sizes make all areas much the same
        "circle": r - 1,
        "square": np.maximum(a, b) - 0.89,
        "triangle": np.maximum(y, 0.866 * a - 0.5 * y) - 0.68,
        "diamond": (a + b - 1.25) * 0.7071,
        "cross": np.minimum(np.maximum(a - 0.4, b - 1.15), np.maximum(a - 1.15, b - 0.4)),
        "ring": np.abs(r - 0.85) - 0.3,
    }
    return np.clip(0.5 - distance[thing.shape] * thing.radius * size, 0, 1)


def render(scene, size):
    """Draw a scene: (size, size, 3) uint8."""
    picture = np.full((size, size, 3), COLOURS[scene.background], np.float32)
    for thing in scene.things:
        picture += coverage(thing, size)[..., None] * (COLOURS[thing.colour] - picture)
    return picture.round().astype(np.uint8)


def draw_scene(number, size):
    """Name, caption and picture (size, size, 3) uint8 of scene `number`, always the same, and None
    as there is no reason to leave it out."""
    rng = np.random.default_rng(number)
    while True:
        told = leave_open(random_scene(rng), rng)
        scene = fill_in(told, rng)
        if split_of(scene) == "train":
            return "", caption(told), render(scene, size), None


# ---------------------------------------------------------------------------- pictures of your own
with contextlib.suppress(ImportError):
    import pillow_heif  # which reads the pictures of telephones, if it is installed

    pillow_heif.register_heif_opener()
KINDS = Image.registered_extensions()  # by ending
ENDINGS = {ending for ending, kind in KINDS.items() if kind in Image.OPEN and kind != "EPS"}
FORMATS = {KINDS[ending] for ending in ENDINGS}  # EPS would run a stranger's program
NOT_READ = {
    ".heic": "picture of a kind not read here (convert it, or pip install pillow-heif)",
    ".gz": "archive of a kind not read here (unpack it; a plain .tar is read)",
    ".parquet": "Parquet file (README.md has the lines that make pictures of it)",
}
NOT_READ |= dict.fromkeys((".heif", ".jxl", ".svg", ".raw", ".dng"), NOT_READ[".heic"])
NOT_READ |= dict.fromkeys((".tgz", ".zip", ".7z", ".rar", ".zst", ".xz"), NOT_READ[".gz"])
Image.MAX_IMAGE_PIXELS = 50_000_000  # pictures of more than twice as many are left out


class LeftOut(Exception):
    """The reason why a picture is not used."""


class File:
    """A file, a member of a tar, which is never unpacked, or data that are in memory. Its stem is
    its name up to the last dot; its sample, as WebDataset says, is its name up to the first."""

    def __init__(self, name, path=None, offset=0, size=-1, data=None):
        self.name, self.path, self.offset, self.size, self.data = name, path, offset, size, data
        self.stem, ending = os.path.splitext(name)
        self.ending = ending.lower()
        folder, last = os.path.split(name)
        self.sample = os.path.join(folder, last.split(".")[0])

    def read(self):
        """All bytes."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_files(source):
    """The files in a folder and those below it, and in tars, sorted; none that is hidden, and none
    in linked folders."""
    files = []
    for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
        is_hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if is_hidden or not path.is_file():
            continue
        if path.suffix.lower() != ".tar":
            files.append(File(str(path), path))
            continue
        try:
            with tarfile.open(path, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    if not os.path.basename(member.name).startswith("."):
                        name = os.path.join(path, member.name.removeprefix("./"))
                        files.append(File(name, path, member.offset_data, member.size))
        except Exception as error:  # a broken tar raises whatever tarfile comes upon
            print(f"{path} is no plain tar, or broken; what stands before is read ({error!r})")
    return files


def read_metadata(file):
    """The captions in a metadata.jsonl or metadata.csv of an image folder of the Hub: a dict from
    the name of a picture to its line, as a File of JSON, which `read_caption` reads like others."""
    text = file.read().decode("utf-8-sig", "replace")
    if file.ending == ".csv":
        csv.field_size_limit(2**31 - 1)
        lines = [json.dumps(row) for row in csv.DictReader(io.StringIO(text, newline=None))]
    else:
        lines = text.split("\n")
    captions = {}
    for line in filter(str.strip, lines):
        try:
            name = os.path.normpath(json.loads(line)["file_name"])
            name = os.path.join(os.path.dirname(file.name), name)
        except (ValueError, KeyError, TypeError, RecursionError):
            name = f"{file.name}: {line[:40]}"  # no picture has this name
        captions[name] = File(name + ".json", data=line.encode())
    return captions


def pair_up(files):
    """Pictures with their captions, as a list of (picture, caption files, problem or None).

    A caption belongs to the picture with the same stem. If there is none, it belongs to the picture
    of its sample, if just one there has no caption yet (a.input.jpg, a.outputs.txt). A line of
    metadata names its picture. Other files, such as captions of no picture, are ignored.
    """
    pictures = [file for file in files if file.ending in ENDINGS]
    stems = collections.Counter(picture.stem for picture in pictures)
    captions, listed = collections.defaultdict(list), {}
    for file in files:
        if os.path.basename(file.name) in ("metadata.jsonl", "metadata.csv"):
            listed |= read_metadata(file)
        elif file.ending in (".txt", ".caption", ".json"):
            captions[file.stem if file.stem in stems else file.sample].append(file)
    uncaptioned = collections.Counter(file.sample for file in pictures if file.stem not in captions)
    not_read = {ending: NOT_READ[ending] for ending in NOT_READ if ending not in ENDINGS}
    items = [(file, [], not_read[file.ending]) for file in files if file.ending in not_read]
    for picture in pictures:
        found, problem = captions.get(picture.stem), None
        # If no picture has the sample's name itself, and no other of the sample lacks a caption:
        if found is None and picture.sample not in stems and uncaptioned[picture.sample] == 1:
            found = captions.get(picture.sample)
        if picture.name in listed:
            found = [listed.pop(picture.name)]
        elif found is None:
            problem = "no caption beside it"
        elif stems[picture.stem] > 1:
            problem = "two pictures for one caption, or one twice"
        items.append((picture, found, problem))
    lost = [(file, [], "line of metadata that names no picture") for file in listed.values()]
    return items + lost


def read_caption(files):
    """The caption, on one line, in files that should hold the same. Raises LeftOut."""
    captions = set()
    for file in files:
        data = file.read()
        try:
            is_utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
            text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
        except ValueError:
            raise LeftOut("caption that is not UTF-8") from None
        if file.ending == ".json":
            try:
                record = json.loads(text)
                text = record.get("prompt") or record.get("caption") or record.get("text") or ""
            except (ValueError, AttributeError, RecursionError):
                raise LeftOut("caption file that holds no JSON object") from None
        if isinstance(text, list):  # the longest tells most
            text = max((each for each in text if isinstance(each, str)), key=len, default="")
        if not isinstance(text, str):
            raise LeftOut("caption that is no text")
        text = text.encode(errors="replace").decode()  # lone surrogates cannot be written
        captions.add(" ".join(text.split()))
    captions.discard("")
    if len(captions) != 1:
        raise LeftOut("two captions that differ" if captions else "empty caption")
    return captions.pop()


def load_picture(data):
    """The RGB picture in bytes: upright, in sRGB, on white where transparent. Raises LeftOut."""
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=[*FORMATS]))
        profile = picture.info.get("icc_profile")
        if picture.mode.startswith("I") or picture.mode == "F":
            raise LeftOut(f"grey values of kind {picture.mode}, whose range is not known")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture).convert("RGB")
        if profile and picture.mode != "P":  # such as Display P3, used by telephones
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken one is ignored
                profiles = io.BytesIO(profile), ImageCms.createProfile("sRGB")
                picture = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        return picture.convert("RGB")
    except LeftOut:
        raise
    except Exception:  # Pillow's decoders raise whatever they come upon
        raise LeftOut("broken or gigantic picture") from None


def load_item(item, size):
    """Name, caption, picture (size, size, 3) uint8, cropped to a square, and None; or name, None,
    None and why it is left out."""
    file, captions, problem = item
    name = file.name.encode(errors="replace").decode()
    try:
        if problem is not None:
            raise LeftOut(problem)
        text, picture = read_caption(captions), load_picture(file.read())
    except LeftOut as reason:
        return name, None, None, str(reason)
    except (OSError, MemoryError, OverflowError):  # or a tar that lies about a size
        return name, None, None, "file that cannot be read"
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return name, text, np.array(square), None


# ----------------------------------------------------------------------------------- command line
def add_flag(parser, field, hint, positional):
    """Make a field of a dataclass a flag (or the positional argument), its Annotated text the
    help."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    kind, text = hint, ""
    if typing.get_origin(hint) is Annotated:
        kind, text = typing.get_args(hint)
    how = {"default": default, "type": kind}
    how["help"] = f"{text} (default: {default!r})".replace("%", "%%")
    if kind is bool:
        how |= {"type": None, "action": argparse.BooleanOptionalAction}
    elif typing.get_origin(kind) is Literal:
        how |= {"type": None, "choices": typing.get_args(kind)}
    elif typing.get_origin(kind) is list:
        how |= {"type": typing.get_args(kind)[0], "nargs": "*"}
    elif field.name == positional:
        how["nargs"] = "?"
    name = "--" + field.name.replace("_", "-")
    if field.name == positional:
        name = positional
    parser.add_argument(name, **how)


def run_script(main, settings_class, description, positional=None):
    """Call main with settings from the command line, one flag for each field of the dataclass. A
    user's mistake ends in its one sentence."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(settings_class, include_extras=True)
    for field in dataclasses.fields(settings_class):
        add_flag(parser, field, hints[field.name], positional)
    values, unknown = parser.parse_known_args()
    if unknown:
        flags = parser._option_string_actions
        near = difflib.get_close_matches(unknown[0], flags, cutoff=0)[0]
        parser.error(f"there is no {unknown[0]}; is {near} meant?")
    for name, value in vars(values).items():
        if isinstance(value, int | float):
            highest = 2**32 - 1 if isinstance(value, int) else math.inf
            if not 0 <= value <= highest:  # which refuses nan, too
                parser.error(f"--{name.replace('_', '-')} {value} is not from 0 to {highest}")
    sys.stdout.reconfigure(errors="replace")  # a console may lack letters that a caption has
    try:
        main(settings_class(**vars(values)))
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{parser.prog}: out of memory; train.py has --micro-batch for that: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: stopped; the same command goes on")


def refuse_differences(folder, old, new):
    """Raise UserError if a folder was begun with other settings. One that did not exist then is
    left alone, so that a fork may add some."""
    changed = [key for key in new if old.get(key, new[key]) != new[key]]
    if changed:
        told = "; ".join(f"{key} was {old[key]!r} and is now {new[key]!r}" for key in changed)
        raise UserError(f"{folder} was begun with other settings: {told}; give a new --out")


# -------------------------------------------------------------------------------------- the cache
SHARD_SIZE = 4096


@dataclasses.dataclass
class Settings:
    """All settings of prepare.py. Each field is a flag."""

    source: Annotated[str, "scenes, a folder of pictures or tars, or a tar"] = "scenes"
    out: Annotated[str, "folder of the cache; '': data/ and the source's name"] = ""
    size: Annotated[int, "side of the square pictures in pixels; 0: 32 for scenes, else 256"] = 0
    limit: Annotated[int, "look at no more pictures; 0: 20,000 scenes, or all"] = 0
    codec: Annotated[str, "makes latents of pictures: pixels, taef2, taesd, ..."] = "pixels"
    text: Annotated[str, "makes embeddings of captions: words, google/flan-t5-base, ..."] = "words"
    teacher: Annotated[str, "makes features for REPA: facebook/dinov2-small; '': none"] = ""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: the best there is"] = "auto"

    def __post_init__(self):
        self.source = self.source.rstrip("/") or "/"
        is_scenes = self.source == "scenes"
        self.out = self.out or f"data/{Path(self.source).stem}"
        self.size = self.size or (32 if is_scenes else 256)
        self.limit = self.limit or (20_000 if is_scenes else sys.maxsize)


def prepare(settings):
    """Write a cache, or go on with one. Raises UserError where nothing can be used, or the cache
    was begun with other settings."""
    out = Path(settings.out)
    names = ("source", "size", "codec", "text", "teacher")
    decisive = {name: getattr(settings, name) for name in names}
    begun = sorted(out.glob("shard-*/shard.json"))
    if begun:
        refuse_differences(out, read_json(begun[0])["settings"], decisive)
    if (out / "meta.json").exists():
        print(f"{out} is complete; for other pictures give a new --out")
        return
    compute = model.pick_device(settings.device)
    codec = model.load_codec(settings.codec, compute)
    # The side of a patch in pixels, as train.py chooses it.
    side = 8 if settings.codec == "pixels" and settings.size <= 128 else 16
    if settings.size % side:
        near = settings.size // side * side + side
        raise UserError(f"--size {settings.size} is no multiple of {side}; {near} is one")
    text_encoder = model.load_text_encoder(settings.text, compute)
    teacher = model.load_teacher(settings.teacher, compute) if settings.teacher else None
    items, load_one = find_items(settings)
    # Pillow's decoders let other threads run; drawing scenes does not.
    pool = ThreadPoolExecutor(1 if settings.source == "scenes" else os.cpu_count())

    def load(batch):
        return list(pool.map(partial(load_one, size=settings.size), batch))

    with locked(out), tqdm(total=len(items), unit=" pictures", disable=None) as bar:
        for number, first in enumerate(range(0, len(items), SHARD_SIZE)):
            folder, part = out / f"shard-{number:05d}", items[first : first + SHARD_SIZE]
            if is_whole(folder, len(part)):
                bar.update(len(part))
                continue
            shard = encode(folder.name, part, load, (codec, text_encoder, teacher), compute, bar)
            write_shard(folder, *shard, decisive)
        bar.close()
        write_meta(out, settings, codec, text_encoder)


def is_whole(folder, count):
    """Whether a shard is there that looked at so many items. A last shard of another --limit looked
    at fewer or more."""
    return folder.exists() and read_json(folder / "shard.json")["seen"] == count


def find_items(settings):
    """What may become pictures of the cache, and the function that loads one of them at a size.
    Raises UserError if the source is not there."""
    if settings.source == "scenes":
        return range(settings.limit), draw_scene
    source = Path(settings.source)
    if not source.exists():
        advice = hub_advice(settings.source)
        raise UserError(f"there is no {settings.source}; give a folder of pictures or tars{advice}")
    return pair_up(list_files(source))[: settings.limit], load_item


def hub_advice(source):
    """How to download what may be a data set of the Hub: user/name, user/name@revision, a URL."""
    url = r"https://huggingface\.co/datasets/"
    match = re.fullmatch(rf"(?:{url})?(\w[\w.-]*/(\w[\w.-]*))(?:(?:@|/tree/)([\w.-]+))?", source)
    if match is None or source.endswith(".tar"):
        return ""
    name, folder, revision = match.groups()
    what = f"{name} --repo-type dataset" + (f" --revision {revision}" if revision else "")
    return f", or download it first, if it is on the Hub: hf download {what} --local-dir {folder}"


@contextlib.contextmanager
def locked(folder):
    """Make a folder to write to, and lock it. Raises UserError if another process has locked it. A
    lock ends with its process. (Windows has no such lock.)"""
    path = folder / "prepare.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another prepare.py writes to {folder}; give another --out") from error
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        file.close()
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing could be used, it is empty


def load_ahead(batches, load):
    """Yield load(batch) of each batch; a thread loads the next one meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for batch in batches:
            ready, ahead = ahead, pool.submit(load, batch)  # which begins at once
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def encode(name, items, load, encoders, compute, bar):
    """Load and encode items, say what is left out, and move the progress bar. Returns the arrays of
    a shard by name, the captions, and a record: seen, count, and sums (2, C) of means and mean
    squares of latents."""
    codec, text_encoder, teacher = encoders
    arrays, captions, left_out = collections.defaultdict(list), [], collections.defaultdict(list)
    sums, cut = np.zeros((2, codec.channels)), 0
    batches = [items[first : first + 64] for first in range(0, len(items), 64)]
    for batch in load_ahead(batches, load):
        bar.update(len(batch))
        for file, _, _, reason in batch:
            if reason is not None:
                left_out[reason].append(file)
        texts = [text for _, text, _, reason in batch if reason is None]
        if not texts:
            continue
        captions += texts
        images = np.stack([picture for _, _, picture, reason in batch if reason is None])
        arrays["digest"].append(np.array([zlib.crc32(picture) for picture in images], np.uint32))
        images = torch.from_numpy(images).to(compute.device).permute(0, 3, 1, 2) / 127.5 - 1
        with compute.autocast(), torch.no_grad():
            parts = images.split(max(1, 2**22 // images.shape[3] ** 2))  # 16 of 512 pixels
            latents = torch.cat([codec.encode(part).float().cpu() for part in parts]).numpy()
            arrays["text"] += [rows.half().cpu().numpy() for rows in text_encoder.encode(texts)]
            if teacher is not None:
                side = min(16, images.shape[3] // 8)
                for part in parts:
                    features = teacher.features(part, side)
                    arrays["teacher"].append(features.half().cpu().numpy())
        cut += sum(len(text_encoder.tokenize(text)) > model.MAX_TOKENS for text in texts)
        sums += np.stack((latents, latents**2)).mean((3, 4)).sum(1)  # (2, C)
        if codec.stored_dtype == "uint8":
            latents = ((latents + 1) * 127.5).round()
        arrays["latents"].append(latents.astype(codec.stored_dtype))
    if not np.isfinite(sums).all():
        raise UserError(f"the codec made infinite latents for {name}; use another --codec")
    for reason, files in left_out.items():
        bar.write(f"{name}: left out {len(files):,} x {reason}: {', '.join(files[:3])}")
    if cut:
        bar.write(f"{name}: kept {cut:,} captions cut to {model.MAX_TOKENS} tokens")
    arrays["offsets"] = [np.cumsum([0, *map(len, arrays["text"])])]
    whole = {key: np.concatenate(parts) for key, parts in arrays.items() if parts}
    record = {"seen": len(items), "count": len(captions), "sums": sums.tolist()}
    return whole, captions, record


def write_shard(folder, arrays, captions, record, decisive):
    """Write the folder of a shard, which gets its name when it is whole. Raises UserError."""
    unfinished = folder.with_suffix(".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array)
        write_json(unfinished / "captions.json", captions)
        write_json(unfinished / "shard.json", record | {"settings": decisive})
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {error}") from error


def read_captions(folder):
    """The captions of a shard."""
    return json.loads((folder / "captions.json").read_text("utf-8"))


def write_meta(out, settings, codec, text_encoder):
    """Write meta.json from what the shards hold. If they hold nothing, delete them and raise
    UserError."""
    records = {path.parent: read_json(path) for path in sorted(out.glob("shard-*/shard.json"))}
    shards = [folder for folder, record in records.items() if record["count"]]
    if not shards:
        for folder in records:
            shutil.rmtree(folder)
        raise UserError(f"{settings.source} holds no picture with a caption that can be used")
    total, seen = (sum(record[key] for record in records.values()) for key in ("count", "seen"))
    mean, square = np.sum([record["sums"] for record in records.values()], axis=0) / total
    lengths = np.concatenate([np.diff(np.load(folder / "offsets.npy")) for folder in shards])
    side = settings.size // codec.factor
    meta = {key: getattr(settings, key) for key in ("source", "codec", "text")} | {
        "shards": {folder.name: records[folder]["count"] for folder in shards},
        "latent_shape": [codec.channels, side, side],
        "text_dim": text_encoder.dim,
        "tokens": max(1, int(lengths.max())),
        "mean": mean.tolist(),
        "std": np.sqrt((square - mean**2).clip(1e-6)).tolist(),
    }
    if settings.text == "words":  # sample.py names the words of a prompt that are not there
        captions = [text for folder in shards for text in read_captions(folder)]
        words = {word for text in captions for word in text_encoder.tokenize(text)}
        meta["vocabulary"] = sorted(words)
    if settings.teacher:
        meta["teacher_dim"] = np.load(shards[0] / "teacher.npy", "r").shape[1]
    write_json(out / "meta.json", meta)
    print(f"{out} holds {total:,} pictures, {total / seen:.1%} of those looked at")
    print("tokens in a caption, quartiles:", *np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]))


if __name__ == "__main__":
    run_script(prepare, Settings, __doc__, positional="source")
