"""Pictures and captions in, a cache of latents and text embeddings out.

    python prepare.py                                          # 20,000 scenes into data/scenes
    python prepare.py photos/ --out data/photos --size 64      # a folder of pictures

The caption of photos/cat.jpg stands in photos/cat.txt or photos/cat.caption. The cache is a few
flat files, for which one np.memmap each is enough:

    data/scenes/latents.bin     (N, C, H, W) uint8 or float16
                text.bin        (sum of all L, D) float16, the embeddings of all captions
                lengths.bin     (N,) int32, the L of each caption
                digest.bin      (N,) uint32, of the pixels; train.py holds out by it
                captions.jsonl  N texts in JSON, one a line
                teacher.bin     (N, D, h, w) float16, for REPA, if extras/teacher.py made it
                meta.json       N, shapes, encoders, mean and std of each channel; comes last
                progress.json   how far the files are good, while they grow
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import operator
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from tqdm import tqdm

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


# A shape in a scene; lengths in picture widths. What is None a caption leaves open.
Thing = collections.namedtuple("Thing", "colour shape place x y radius")
# One thing, or a list of two that face each other, on the colour of a background.
Scene = collections.namedtuple("Scene", "background things")


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
    distance = {  # in radii, below 0 inside; areas are 3.0 to 3.2, the triangle's 2.4
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
    """Caption and picture of scene `number`, always the same."""
    rng = np.random.default_rng(number)
    while True:
        told = leave_open(random_scene(rng), rng)
        scene = fill_in(told, rng)
        if split_of(scene) == "train":
            return caption(told), Image.fromarray(render(scene, size))


# ---------------------------------------------------------------------------- pictures of your own
KINDS = Image.registered_extensions()  # by ending
ENDINGS = {ending for ending, kind in KINDS.items() if kind in Image.OPEN and kind != "EPS"}
FORMATS = [*{KINDS[ending] for ending in ENDINGS}]  # EPS would run a stranger's program
Image.MAX_IMAGE_PIXELS = 50_000_000  # pictures of more than twice as many are left out


class LeftOut(Exception):
    """The reason why a picture is not used."""


def find_files(folder):
    """The files in and below a folder, sorted, but captions, hidden files and linked folders."""
    files = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and path.suffix.lower() not in (".txt", ".caption"):
            files.append(path)
    return files


def load_file(path, count):
    """Caption and picture of a file; count has how many pictures share a name. Raises LeftOut."""
    captions = [path.with_suffix(each) for each in (".txt", ".TXT", ".caption", ".CAPTION")]
    captions = [caption for caption in captions if caption.exists()]
    if path.suffix.lower() not in ENDINGS:
        raise LeftOut("file of a kind that is not read")
    if not captions:
        raise LeftOut("no .txt or .caption beside it")
    if count[path.with_suffix("")] > 1:
        raise LeftOut("two pictures for one caption")
    try:
        return captions[0].read_text("utf-8-sig"), load_picture(path.read_bytes())
    except (OSError, ValueError):
        raise LeftOut("caption that is not UTF-8, or file that cannot be read") from None


def load_picture(data):
    """The RGB picture in bytes: upright, in sRGB, on white where transparent. Raises LeftOut."""
    try:
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS))
        profile = picture.info.get("icc_profile")
        if picture.mode.startswith("I") or picture.mode == "F":
            raise ValueError("grey values whose range is not known")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture).convert("RGB")
        if profile and picture.mode != "P":  # such as Display P3, used by telephones
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken one is ignored
                profiles = io.BytesIO(profile), ImageCms.createProfile("sRGB")
                picture = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        return picture.convert("RGB")
    except Exception:  # Pillow's decoders raise whatever they come upon
        raise LeftOut("broken or gigantic picture, or one with more than 8 bits of grey") from None


# ----------------------------------------------------------------------------------- command line
def flag(default, text, low=0, high=float("inf"), **how):
    """A field of a settings class that `run_script` makes a flag: its default, its help, the range
    of a number, and what argparse takes besides. With `nargs` it is positional."""
    text = f"{text} (default: {default!r})".replace("%", "%%")
    metadata = {"how": how | {"default": default, "help": text}, "range": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


def run_script(main, settings_class, description):
    """Call main with settings from the command line, one flag for each field of the dataclass. A
    user's mistake ends in its one sentence, a bug in its traceback."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(None, None, description, formatter_class=formatter)
    fields = dataclasses.fields(settings_class)
    for field in fields:
        how = dict(field.metadata["how"])
        if field.type is bool:
            how["action"] = "store_true"
        else:
            how["type"] = field.type
        prefix = "" if "nargs" in how else "--"
        parser.add_argument(prefix + field.name.replace("_", "-"), **how)
    values = vars(parser.parse_args())
    for field in fields:
        (low, high), value = field.metadata["range"], values[field.name]
        if isinstance(value, int | float) and not low <= value <= high:  # which refuses nan, too
            parser.error(f"--{field.name.replace('_', '-')} {value} is not from {low} to {high}")
    sys.stdout.reconfigure(errors="replace")  # a console may lack letters that a caption has
    try:
        main(settings_class(**values))
    except UserError as error:
        sys.exit(f"{parser.prog}: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"{parser.prog}: {error}; pip install {error.name.split('.')[0]}")
    except (MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(f"{parser.prog}: out of memory; take fewer at once, or smaller ones: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{parser.prog}: stopped; the same command goes on")


def refuse_differences(folder, old, new):
    """Raise UserError if a folder was begun with other settings. One that did not exist then is
    left alone, so that a fork may add some."""
    changed = [key for key in new if old.get(key, new[key]) != new[key]]
    if changed:
        told = "; ".join(f"{key} was {old[key]!r} and is now {new[key]!r}" for key in changed)
        raise UserError(
            f"{folder} was begun with other settings: {told}; delete it or give a new --out"
        )


# -------------------------------------------------------------------------------------- the cache
@dataclasses.dataclass
class Settings:
    """All settings of prepare.py. Each field is a flag."""

    source: str = flag("", "a folder of pictures; none: the built-in scenes", nargs="?")
    out: str = flag("", "folder of the cache; '': data/ and the name of the source")
    size: int = flag(0, "side of the square pictures in pixels; 0: 32 for scenes, else 256")
    limit: int = flag(0, "pictures to make; 0: 20,000 scenes, or all")
    codec: str = flag("pixels", "makes latents of pictures: pixels, taef2, taesd, ...")
    text: str = flag("words", "makes embeddings of captions: words, google/flan-t5-base, ...")
    device: str = flag("auto", "the best there is", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        name = Path(self.source).resolve().name if self.source else "scenes"
        self.out = self.out or f"data/{name}"
        self.size = self.size or (256 if self.source else 32)
        self.limit = self.limit or (0 if self.source else 20_000)
        if self.size % 16:
            raise UserError(f"--size {self.size} is no multiple of 16, as patches need it")


def prepare(settings):
    """Write the cache of the built-in scenes, or of a folder. Raises UserError as `write_cache`."""
    if not settings.source:
        write_cache(settings, range(settings.limit), partial(draw_scene, size=settings.size))
        return
    files = find_files(Path(settings.source))
    pictures = [path.with_suffix("") for path in files if path.suffix.lower() in ENDINGS]
    write_cache(settings, files, partial(load_file, count=collections.Counter(pictures)))


def write_cache(settings, items, load):
    """Write a cache, or go on with one. items is any iterable that is the same each time; str(item)
    names one, and load(item) gives its caption and its PIL picture, or raises LeftOut. Raises
    UserError where nothing can be used, the disk is full, or other settings were begun with."""
    out, size = Path(settings.out), settings.size
    names = ("source", "size", "limit", "codec", "text")
    meta = {name: getattr(settings, name) for name in names}
    for path in (out / "meta.json", out / "progress.json"):
        if path.exists():
            refuse_differences(out, read_json(path), meta)
            meta = read_json(path)
    if (out / "meta.json").exists():
        print(f"{out} is complete; for other pictures give a new --out")
        return
    compute = model.pick_device(settings.device)
    codec = model.load_codec(settings.codec, compute)
    text_encoder = model.load_text_encoder(settings.text, compute)
    side = size // codec.factor
    new = {"seen": 0, "count": 0, "sums": [[0.0], [0.0]], "notes": {}, "bytes": {}, "tokens": 1}
    new |= {"latent_shape": [codec.channels, side, side], "latent_dtype": codec.stored_dtype}
    meta = new | {"text_dim": text_encoder.dim} | meta
    print(f"{out}: writing the cache, which has {meta['count']:,} pictures so far")
    remaining = itertools.islice(items, meta["seen"], None)
    total = operator.length_hint(items) or None  # a stream has no length
    load_one = partial(load_square, load=load, size=size)
    batch, batch_size = [], max(1, 2**22 // size**2)  # pictures of 4 million pixels together
    with tqdm(total=total, initial=meta["seen"], unit=" pictures", disable=None) as bar:
        for name, caption, picture, note in map_ahead(load_one, remaining, 64):
            if 0 < settings.limit <= meta["count"]:  # a limit of 0 is none
                break
            bar.update()
            meta["seen"] += 1
            if note is not None:
                meta["notes"].setdefault(note, [0, name])[0] += 1
            if caption is not None:
                batch.append((caption, picture))
                meta["count"] += 1
            if len(batch) == batch_size:
                append(out, encode(batch, meta, codec, text_encoder, compute), meta)
                batch = []
    if batch:
        append(out, encode(batch, meta, codec, text_encoder, compute), meta)
    finish(out, meta)


def map_ahead(function, items, ahead):
    """Yield function(item) for each item, in order. Threads work on the next ones meanwhile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = collections.deque()
        for item in items:
            futures.append(pool.submit(function, item))  # which begins at once
            if len(futures) > ahead:
                yield futures.popleft().result()
        for future in futures:
            yield future.result()


def load_square(item, load, size):
    """Name, caption and picture (size, size, 3) uint8, cropped to a square, of an item, and what is
    to be said about it. Caption and picture are None if it is left out."""
    try:
        caption, picture = load(item)
        caption = " ".join(caption.encode(errors="replace").decode().split())
        if not any(map(str.isalnum, caption)):
            raise LeftOut("caption of no word")
    except LeftOut as reason:
        return str(item), None, None, f"left out: {reason}"
    note = "enlarged: picture with a shorter side" if min(picture.size) < size else None
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return str(item), caption, np.asarray(square), note


@torch.no_grad()
def encode(batch, meta, codec, text_encoder, compute):
    """Bytes for the files of a cache, by name, of captions and pictures; meta is updated."""
    captions, pictures = zip(*batch, strict=True)
    lines = "".join(json.dumps(caption) + "\n" for caption in captions)
    digests = np.array([zlib.crc32(picture) for picture in pictures], np.uint32)
    images = torch.from_numpy(np.stack(pictures)).to(compute.device).permute(0, 3, 1, 2)
    latents, sums = b"", np.array(meta["sums"])  # sums (2, C) of latents and of their squares
    with compute.autocast():
        text = [rows.half().cpu().numpy() for rows in text_encoder.encode(captions)]
        for part in images.split(64):
            x = codec.encode(part / 127.5 - 1).float().cpu().numpy()
            sums = sums + [x.mean((2, 3)).sum(0), (x**2).mean((2, 3)).sum(0)]
            if codec.stored_dtype == "uint8":
                x = ((x + 1) * 127.5).round()
            latents += x.astype(codec.stored_dtype).tobytes()
    lengths = np.array([len(rows) for rows in text], np.int32)
    meta["sums"], meta["tokens"] = sums.tolist(), max(meta["tokens"], lengths.max().item())
    parts = {"latents.bin": latents, "text.bin": np.concatenate(text).tobytes()}
    parts |= {"lengths.bin": lengths.tobytes(), "digest.bin": digests.tobytes()}
    return parts | {"captions.jsonl": lines.encode()}


def append(out, parts, meta):
    """Write bytes, a dict by the names of files, to the ends of the files, and then say in
    progress.json how far they are good. Raises UserError if the disk is full."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            with open(out / name, "ab") as file:
                file.truncate(meta["bytes"].get(name, 0))  # what a stopped run left behind
                file.write(part)
                file.flush()
                os.fsync(file.fileno())
                meta["bytes"][name] = file.tell()
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    write_json(out / "progress.json", meta)


def read_captions(folder):
    """The captions of a cache."""
    with open(Path(folder) / "captions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def finish(out, meta):
    """Write meta.json, with which a cache is whole. Raises UserError if it holds nothing."""
    for note, (count, example) in meta["notes"].items():
        print(f"{count:,} x {note}, such as {example}")
    if meta["count"] == 0:
        raise UserError(f"{meta['source']} has no picture to use; extras/hub.py reads other sets")
    mean, square = np.array(meta["sums"]) / meta["count"]
    meta |= {"mean": mean.tolist(), "std": np.sqrt((square - mean**2).clip(1e-6)).tolist()}
    write_json(out / "meta.json", meta)
    (out / "progress.json").unlink()
    print(f"{out} holds {meta['count']:,} pictures; captions have {meta['tokens']} tokens at most")


if __name__ == "__main__":
    run_script(prepare, Settings, __doc__)
