"""Pictures and captions in, a cache of latents and text embeddings out.

    python prepare.py                                          # 20,000 monsters into data/monsters
    python prepare.py photos/ --out data/photos --size 64      # a folder of pictures

The caption of photos/cat.jpg stands in photos/cat.txt or photos/cat.caption. The cache is a few
flat files; those in .bin are read with one np.memmap each:

    data/monsters/latents.bin     (N, C, H, W) uint8 or float16
                  text.bin        (sum of all L, D) float16, the embeddings of all captions
                  lengths.bin     (N,) int32, the L of each caption
                  digest.bin      (N,) uint32, a hash of the pixels, by which train.py holds out
                  captions.jsonl  N texts in JSON, one a line
                  teacher.bin     (N, D, h, w) float16, for REPA, if extras/teacher.py made it
                  meta.json       N, shapes, encoders, mean and std of each channel; comes last
                  progress.json   how much of each file is valid, while they grow
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import operator
import os
import random
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

import model
from model import UserError, read_json, write_json

# --------------------------------------------------------------------- the built-in world: monsters
COLOURS = {"red": (222, 48, 48), "yellow": (250, 210, 50), "green": (60, 170, 75)}
COLOURS |= {"cyan": (70, 205, 220), "blue": (45, 95, 225), "purple": (150, 55, 190)}
COLOURS |= {"pink": (250, 140, 190), "white": (252, 252, 248)}
BACKGROUNDS = {"white": (252, 252, 248), "grey": (200, 204, 208), "yellow": (255, 243, 180)}
BACKGROUNDS |= {"pink": (255, 216, 228), "blue": (195, 226, 252), "green": (206, 240, 200)}
INK, WHITE, BONE, TONGUE = (45, 35, 55), (255, 255, 255), (240, 232, 205), (165, 30, 60)
OWN, EACH = "the monster's colour", "each of COLOURS"  # stand in layers in place of an rgb
NEVER_TRAINED = {("red", "round"), ("blue", "square"), ("yellow", "tall"), ("green", "pointed")}


# A shape is a list of points (x, y), in pictures of 32 x 32. It is drawn with its mirror image.
def oval(x, y, width, height, corners=40):
    """An ellipse around (x, y); width and height reach from there to its edge."""
    angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
    return list(zip(x + width * np.cos(angles), y + height * np.sin(angles), strict=True))


def eyes(size, *places):
    """The layers of eyes with pupils."""
    pupils = [oval(x, y + 0.2, 1.3, 1.4) for x, y in places]
    return [(WHITE, [oval(x, y, size, size) for x, y in places]), (INK, pupils)]


BODIES = {
    "round": [oval(16, 20, 10, 10)],
    "square": [[(7, 11), (16, 11), (16, 29), (7, 29)]],
    "tall": [oval(16, 17, 6, 7), [(10, 17), (16, 17), (16, 30), (10, 30)]],
    "wide": [oval(16, 21, 14, 8)],
    "pointed": [[(16, 7), (16, 29), (3, 29)]],
    "hairy": [oval(16, 20, 12.5, 12.5, 5)],  # with its mirror image a star of ten points
}
SPOTS = [oval(9, 15, 2.3, 2.3), oval(12.5, 28, 2.3, 2.3), oval(6, 23, 2.3, 2.3)]
STRIPES = [[(0, y), (16, y), (16, y + 3), (0, y + 3)] for y in (12, 18, 24)]
# The parts of a monster, and the kinds that there are of each. A kind is a list of layers, from
# back to front, each a colour and shapes. Where its name has {}, there is one in each colour.
KINDS = {
    "colour": dict.fromkeys(COLOURS, ()),
    "body": {name: [(OWN, [*shapes, oval(11, 29, 3, 2.5)])] for name, shapes in BODIES.items()},
    "pattern": {"plain skin": (), "{} spots": [(EACH, SPOTS)], "{} stripes": [(EACH, STRIPES)]},
    "eyes": {
        "one eye": eyes(3.6, (16, 17)),
        "two eyes": eyes(2.7, (12.5, 17)),
        "three eyes": eyes(2.5, (12.2, 18.5), (16, 14.5)),
    },
    "mouth": {
        "a smile": [(INK, [[(11, 22), (16, 22), (16, 27.5), (14, 27), (12, 25)]])],
        "a frown": [(INK, [[(12, 28), (12, 24), (16, 22.5), (16, 24.5), (14, 25.5), (13.5, 28)]])],
        "an open mouth": [(TONGUE, [oval(16, 25, 3.2, 3.6)])],
        "fangs": [(INK, [oval(16, 24, 5, 2)]), (WHITE, [[(12.6, 23), (14.4, 23), (13.5, 26.3)]])],
    },
    "head": {
        "a bald head": (),
        "horns": [(BONE, [[(9, 15), (14, 13), (13, 10), (7, 3)]])],
        "ears": [(OWN, [oval(9.5, 10, 3.5, 5)]), (TONGUE, [oval(9.5, 9, 1.5, 2)])],
        "antennae": [(BONE, [oval(11, 4, 2.2, 2.2)]), (INK, [[(15, 14), (13, 14), (11, 5)]])],
        "spikes": [(OWN, [[(16, 3), (15, 11), (12, 4), (11, 12), (8, 6), (8, 17), (16, 17)]])],
        "a {} party hat": [(EACH, [[(11, 11.5), (16, 11.5), (16, 2)], oval(16, 2.5, 1.8, 1.8)])],
        "a {} top hat": [(EACH, [[(12, 2), (16, 2), (16, 12), (8, 12), (11.5, 10)]])],
        "a {} crown": [(EACH, [[(10, 12), (16, 12), (16, 3), (13, 8), (9, 4)]])],
    },
    "background": dict.fromkeys(BACKGROUNDS, ()),
}
PARTS = {part: {} for part in KINDS}  # by part and name: layers, and the rgb in place of a {}
for part, kinds in KINDS.items():
    for kind, (colour, rgb) in itertools.product(kinds, COLOURS.items()):
        PARTS[part][kind.format(colour)] = kinds[kind], rgb


def random_monster(rng, split="train"):
    """A monster of a split, by a random.Random: a dict from parts to names in PARTS."""
    while True:
        monster = {}
        for part, kinds in KINDS.items():
            monster[part] = rng.choice(list(kinds)).format(rng.choice(list(COLOURS)))
        if monster["colour"] not in monster["pattern"] and split_of(monster) == split:
            return monster


def split_of(monster):
    """The split that a monster belongs to, whatever its background: "new" has a pair of colour and
    body in NEVER_TRAINED, "held-out" is an eighth of the others, "train" the rest."""
    if (monster["colour"], monster["body"]) in NEVER_TRAINED:
        return "new"
    words = " ".join(name for part, name in monster.items() if part != "background")
    return "held-out" if hashlib.md5(words.encode()).digest()[0] < 32 else "train"


def leave_open(monster, most, rng):
    """The monster with one to `most` of its parts, by chance, and None in place of the others."""
    told = rng.sample(list(PARTS), rng.randint(1, most))
    return {part: name if part in told else None for part, name in monster.items()}


def caption_of(told, rng):
    """A monster in words, in one of several orders, except what is left open (None). Captions that
    tell much are the largest effect that PRX measured: FID 36.84 to 18.20."""
    adjectives = [told[part] for part in rng.sample(["body", "colour"], 2) if told[part]]
    text = " ".join(["a", *adjectives, "monster"])
    parts = rng.sample(["pattern", "eyes", "mouth", "head"], 4)
    phrases = [told[part] for part in parts if told[part]]
    if phrases:
        text += " with " + " and ".join(", ".join(phrases).rsplit(", ", 1))  # "a, b and c"
    return f"{text} on a {told['background']} background" if told["background"] else text


@functools.cache
def coverage(part, name, size):
    """For each layer of a part, the share (size, size) of pixels covered, bare and with outline."""
    shares, scale = [], size / 8
    for _, shapes in PARTS[part][name][0]:
        image = Image.new("L", (4 * size, 4 * size))
        for shape in shapes:
            ImageDraw.Draw(image).polygon([(x * scale, y * scale) for x, y in shape], fill=255)
        image = ImageChops.lighter(image, ImageOps.mirror(image))
        wider = image.filter(ImageFilter.MaxFilter(2 * round(0.9 * scale) + 1))
        shares.append([np.asarray(each.reduce(4), np.float32) / 255 for each in (image, wider)])
    return shares


@functools.cache
def paint(part, name, behind, size):
    """What a part leaves of the picture behind it, a share (size, size), and what it adds to that,
    (3, size, size). behind is, for a pattern, the body's name, for others the monster's colour."""
    layers, rgb = PARTS[part][name]
    colours = {EACH: rgb, OWN: COLOURS.get(behind)}
    stays, added = np.float32(1), np.float32(0)
    for (colour, _), (inside, outside) in zip(layers, coverage(part, name, size), strict=True):
        tint = np.float32(colours.get(colour, colour))[:, None, None]
        if part == "pattern":
            inside = inside * coverage("body", behind, size)[0][0]
        elif colour not in (INK, TONGUE):  # the others get a darker outline
            stays, added = stays * (1 - outside), added + outside * (0.35 * tint - added)
        stays, added = stays * (1 - inside), added + inside * (tint - added)
    return stays, added


def render(monster, size):
    """Draw a monster: (size, size, 3) uint8."""
    picture = np.float32(BACKGROUNDS[monster["background"]])[:, None, None]
    order = ["body", "pattern", "eyes", "mouth"]  # from back to front
    order.insert(4 if monster["head"].endswith(("hat", "crown")) else 0, "head")
    for part in order:
        behind = monster["body" if part == "pattern" else "colour"]
        stays, added = paint(part, monster[part], behind, size)
        picture = picture * stays + added
    return picture.round().astype(np.uint8).transpose(1, 2, 0)


def draw_monster(number, size):
    """Caption and picture of monster `number`, always the same."""
    rng = random.Random(number)
    monster = random_monster(rng)
    told = leave_open(monster, len(PARTS), rng)
    for part in ("pattern", "head"):
        if told[part] not in (None, *KINDS[part]) and rng.random() < 0.3:  # it has a colour
            # the last word or two: "hat" or "party hat" of "a red party hat"
            told[part] = " ".join(told[part].split()[-rng.randint(1, 2) :])
    return caption_of(told, rng), Image.fromarray(render(monster, size))


# ---------------------------------------------------------------------------- pictures of your own
BY_ENDING = Image.registered_extensions()  # {".jpg": "JPEG", ...}
ENDINGS = {ending for ending, kind in BY_ENDING.items() if kind in Image.OPEN and kind != "EPS"}
FORMATS = [*{BY_ENDING[ending] for ending in ENDINGS}]  # without EPS, which can run programs
Image.MAX_IMAGE_PIXELS = 50_000_000  # pictures of more than twice as many are left out


class LeftOut(Exception):
    """The reason why a picture is not used."""


def find_files(folder):
    """The files in and below a folder, sorted, except captions, hidden files and linked folders."""
    files = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and path.suffix.lower() not in (".txt", ".caption"):
            files.append(path)
    return files


def load_file(path, count):
    """Caption and picture of a file; count: pictures by path without ending. Raises LeftOut."""
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
        if picture.has_transparency_data or picture.mode == "P":  # P has a palette
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture).convert("RGB")
        if profile:  # such as Display P3, used by telephones
            with contextlib.suppress(ImageCms.PyCMSError, OSError):  # a broken one is ignored
                profiles = io.BytesIO(profile), ImageCms.createProfile("sRGB")
                picture = ImageCms.profileToProfile(picture, *profiles, outputMode="RGB")
        return picture.convert("RGB")
    except Exception:  # Pillow's decoders raise whatever they come upon
        raise LeftOut("broken or gigantic picture, or one with more than 8 bits of grey") from None


# ----------------------------------------------------------------------------------- command line
def flag(default, text, low=0, high=float("inf"), **how):
    """A field that `run_script` makes a flag: its default, its help, the range of a number, and
    what argparse takes besides. With `nargs` it is positional."""
    text = f"{text} (default: {default!r})".replace("%", "%%")
    metadata = {"how": how | {"default": default, "help": text}, "range": (low, high)}
    return dataclasses.field(default=default, metadata=metadata)


def run_script(main, settings_class, description):
    """Call main with settings from the command line, one flag for each field of the dataclass. A
    user's mistake ends in its one sentence, a bug in its traceback."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter)
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
        sys.exit(f"{parser.prog}: stopped; what was saved stays")


def refuse_differences(folder, old, new):
    """Raise UserError if a folder was begun with other settings, but for those added since then."""
    changed = [key for key in new if old.get(key, new[key]) != new[key]]
    if changed:
        told = "; ".join(f"{key} was {old[key]!r} and is now {new[key]!r}" for key in changed)
        raise UserError(f"{folder} was begun with other settings: {told}; give a new --out")


# -------------------------------------------------------------------------------------- the cache
@dataclasses.dataclass
class Settings:
    """All settings of prepare.py. Each field is a flag."""

    source: str = flag("", "a folder of pictures; none: the built-in monsters", nargs="?")
    out: str = flag("", "folder of the cache; '': data/ and the name of the source")
    size: int = flag(0, "side of pictures in pixels; 0: 32 for monsters, else 256", 0, 4096)
    limit: int = flag(0, "pictures to make; 0: 20,000 monsters, or all")
    codec: str = flag("pixels", "makes latents of pictures: pixels, taef2, taesd, ...")
    text: str = flag("words", "makes embeddings of captions: words, google/flan-t5-base, ...")
    device: str = flag("auto", "the best there is", choices=("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        self.source = self.source.rstrip("/") or self.source[:1]  # shells add it to a folder
        self.out = self.out or f"data/{Path(self.source or 'monsters').resolve().name}"
        self.size = self.size or (256 if self.source else 32)
        self.limit = self.limit or (0 if self.source else 20_000)
        if self.size % 16 or (not self.source and self.size > 128):  # their outlines take long
            raise UserError("--size takes multiples of 16, for monsters up to 128")


def prepare(settings):
    """Write the cache of built-in monsters, or of a folder. Raises UserError as `write_cache`."""
    items, load = range(settings.limit), functools.partial(draw_monster, size=settings.size)
    if settings.source:
        if Path(settings.out).resolve().is_relative_to(Path(settings.source).resolve()):
            raise UserError(f"the cache would lie in {settings.source} itself; give another --out")
        items = find_files(Path(settings.source))
        pictures = [path.with_suffix("") for path in items if path.suffix.lower() in ENDINGS]
        load = functools.partial(load_file, count=collections.Counter(pictures))
    write_cache(settings, items, load)


def write_cache(settings, items, load):
    """Write a cache, or go on with one. items is any iterable that is the same each time; str(item)
    names one, and load(item) gives its caption and its PIL picture, or raises LeftOut. Raises
    UserError if nothing can be used, the disk is full, or it was begun with other settings."""
    out, size = Path(settings.out), settings.size
    meta = {key: value for key, value in vars(settings).items() if key not in ("out", "device")}
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
    load_one = functools.partial(load_square, load=load, size=size)
    # Threads read and decode files side by side; monsters are drawn in Python, one at a time.
    loaded = map_ahead(load_one, remaining, 64) if settings.source else map(load_one, remaining)
    batch, batch_size = [], max(1, 2**22 // size**2)  # pictures of 4 million pixels together
    how = {"total": operator.length_hint(items) or None, "initial": meta["seen"], "disable": None}
    for name, caption, picture, note in tqdm(loaded, **how):
        if 0 < settings.limit <= meta["count"]:  # a limit of 0 is none
            break
        meta["seen"] += 1
        if note is not None:
            meta["notes"].setdefault(note, [0, name])[0] += 1  # how many, and an example
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
            futures.append(pool.submit(function, item))
            if len(futures) > ahead:
                yield futures.popleft().result()
        for future in futures:
            yield future.result()


def load_square(item, load, size):
    """Name, caption and picture (size, size, 3) uint8, cropped to a square, of an item, and a
    note for the user, or None. Caption and picture are None if it is left out."""
    try:
        caption, picture = load(item)
        caption = " ".join(caption.encode(errors="replace").decode().split())
        if not model.Words().tokenize(caption):  # such as "!!!" or "the"
            raise LeftOut("caption without words")
    except LeftOut as reason:
        return str(item), None, None, f"left out: {reason}"
    note = "enlarged: picture with a shorter side" if min(picture.size) < size else None
    square = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return str(item), caption, np.asarray(square), note


@torch.no_grad()
def encode(batch, meta, codec, text_encoder, compute):
    """Captions and pictures as bytes for the cache's files, by name; meta is updated."""
    captions, pictures = zip(*batch, strict=True)
    lines = "".join(json.dumps(caption) + "\n" for caption in captions)
    digests = np.array([zlib.crc32(picture) for picture in pictures], np.uint32)
    images = torch.from_numpy(np.stack(pictures)).to(compute.device).permute(0, 3, 1, 2)
    latents, sums = [], np.array(meta["sums"])  # (2, C): sums of pictures' means of x and x**2
    with compute.autocast():
        text = [rows.half().cpu().numpy() for rows in text_encoder.encode(captions)]
        for part in images.split(64):
            x = codec.encode(part / 127.5 - 1).float().cpu().numpy()
            sums = sums + [x.mean((2, 3)).sum(0), (x**2).mean((2, 3)).sum(0)]
            if codec.stored_dtype == "uint8":
                x = ((x + 1) * 127.5).round()
            latents.append(x.astype(codec.stored_dtype).tobytes())
    lengths = np.array([len(rows) for rows in text], np.int32)
    meta["sums"], meta["tokens"] = sums.tolist(), max(meta["tokens"], lengths.max().item())
    parts = {"latents.bin": b"".join(latents), "text.bin": np.concatenate(text).tobytes()}
    parts |= {"lengths.bin": lengths.tobytes(), "digest.bin": digests.tobytes()}
    return parts | {"captions.jsonl": lines.encode()}


def append(out, parts, meta):
    """Write bytes, a dict by the names of files, to the ends of the files, and then say in
    progress.json how much of each is valid. Raises UserError if the disk is full."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            with open(out / name, "ab") as file:
                file.truncate(meta["bytes"].get(name, 0))  # cuts off what a stopped run left
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
        raise UserError(f"{meta['source']} is no folder, or has no picture with a caption")
    mean, square = np.array(meta["sums"]) / meta["count"]
    meta |= {"mean": mean.tolist(), "std": np.sqrt((square - mean**2).clip(1e-6)).tolist()}
    write_json(out / "meta.json", meta)
    (out / "progress.json").unlink()
    print(f"{out} holds {meta['count']:,} pictures; captions have {meta['tokens']} tokens at most")


if __name__ == "__main__":
    run_script(prepare, Settings, __doc__)
