"""Make a folder of little heroes with captions, 32 x 32 pixels, out of the tiles of a game.

    python extras/heroes.py                          # downloads the tiles once, 6.8 MB
    python extras/heroes.py heroes-tiles.tar         # or takes a folder, or a clone of crawl/tiles
    python prepare.py heroes --size 32
    torchrun train.py --data data/heroes --steps 1200
    python sample.py --run out/heroes "an elf woman in a red coat with a blue cloak and a bow"

The tiles are from Dungeon Crawl Stone Soup, by its artists, who gave them to the public domain
(CC0, github.com/crawl/tiles). An eighth of all pairs of body and garment is never made: such pairs
are printed as prompts to try.
"""

import dataclasses
import hashlib
import io
import random
import sys
import tarfile
import urllib.request
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prepare

URL = "https://github.com/crawl/tiles/archive/a6ea1655db5c044829d9eea19a232fa6fcac87b0.tar.gz"
# Of the pixels that are used, as archives of one commit are not the same to the byte.
DIGEST = "00e7596b9809c464be38fabd4f950b8d6ead586d8e3ddf25da42af99218dba25"


def by_colour(tile, name, colours):
    """A table of parts that there are in several colours."""
    return {f"a {colour} {name}": tile.format(colour) for colour in colours.split()}


# What a part is called, and its tile. Add your own: a line each.
CLOAKS = by_colour("{}", "cloak", "black blue brown cyan gray magenta red white yellow")
BODIES = {"a man": "human_m", "a woman": "human_f", "an elf man": "elf_m", "an elf woman": "elf_f"}
BODIES |= {"a vampire": "vampire_m", "a mummy": "mummy_m", "a ghoul": "ghoul2_m"}
BODIES |= {"an antman": "formicid", "a birdman": "tengu_winged_m", "a gargoyle": "gargoyle_m"}
BODIES |= by_colour("draconian_{}_m", "lizardman", "red green gold purple white")
HAIR = {"a man": "brown1", "a woman": "fem_black"}
HAIR |= {"an elf man": "legolas", "an elf woman": "fem_yellow"}
GARMENTS = by_colour("robe_{}", "robe", "black blue brown cyan green purple red white yellow")
GARMENTS |= by_colour("coat_{}", "coat", "black red") | {"leather armour": "leather_heavy"}
GARMENTS |= by_colour("dress_{}", "dress", "green white") | {"golden armour": "armour_mummy"}
GARMENTS |= {"a blue shirt": "shirt_blue", "a red shirt": "leather_red", "chain mail": "kryias"}
WEAPONS = {"a sword": "heavy_sword", "an axe": "axe_executioner", "a bow": "bow"}
WEAPONS |= {"a trident": "trident", "a scythe": "scythe", "a whip": "black_whip"}
WEAPONS |= {"a club": "giant_club_plain", "a spear": "spear", "a blue staff": "staff_ring_blue"}
WEAPONS |= {"a golden staff": "staff_ruby", "a wooden staff": "quarterstaff"}
SHIELDS = by_colour("lshield_{}", "shield", "gold green teal") | {"a red shield": "shield_kite4"}
SHIELDS |= {"a blue shield": "shield_kite2", "a checked shield": "shield_knight_rw"}
HATS = by_colour("wizard_{}", "wizard hat", "blue brown purple red white")
HATS |= {"a crown": "crown_gold1", "a turban": "turban_purple", "a straw hat": "straw"}
HATS |= {"a helmet": "fhelm_gray3", "a plumed helmet": "helm_plume", "a fur cap": "bear"}
HATS |= {"a horned helmet": "fhelm_horn2", "a jester's hat": "clown2", "a cyan hood": "hood_cyan"}
# From back to front, by the folder of the tiles. Hair goes with the body.
LAYERS = {"cloak": CLOAKS, "base": BODIES, "hair": HAIR, "body": GARMENTS}
LAYERS |= {"hand1": WEAPONS, "hand2": SHIELDS, "head": HATS}
PAIRS = [(body, garment) for body in BODIES for garment in GARMENTS]
NEVER_MADE = random.Random(0).sample(PAIRS, len(PAIRS) // 8)
MADE = [pair for pair in PAIRS if pair not in NEVER_MADE]


@dataclasses.dataclass
class Settings:
    """All settings of heroes.py."""

    source: str = prepare.flag("", "tar or folder of the tiles; none: download it", nargs="?")
    out: str = prepare.flag("heroes", "folder of the pictures and captions")
    count: int = prepare.flag(20_000, "pictures to make", 1)


def read_tiles(source):
    """The tiles of all parts, RGBA pictures by their files. Raises UserError."""
    try:
        if source and Path(source).is_dir():
            files = {path.as_posix(): path.read_bytes() for path in Path(source).rglob("*.png")}
        else:
            data = Path(source).read_bytes() if source else urllib.request.urlopen(URL).read()
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                files = {each.name: tar.extractfile(each).read() for each in tar if each.isfile()}
        # Of an archive only this release, as others have tiles of the same names.
        names = [name for name in files if "Nov-2015" in name or "releases" not in name]
        files = {name.rpartition("player/")[2]: files[name] for name in names}
        paths = [f"{key}/{tile}.png" for key, layer in LAYERS.items() for tile in layer.values()]
        tiles = {path: Image.open(io.BytesIO(files[path])).convert("RGBA") for path in paths}
    except (OSError, EOFError, tarfile.TarError, KeyError) as error:
        told = source or f"{URL} (without a network: take it from elsewhere, and name the file)"
        raise prepare.UserError(f"no tiles could be read from {told}: {error!r}") from error
    pixels = b"".join(tile.tobytes() for tile in tiles.values())
    if not source and hashlib.sha256(pixels).hexdigest() != DIGEST:
        raise prepare.UserError(f"the tiles of {URL} are not those that this script knows")
    return tiles


def random_hero(rng):
    """The name of a part for each layer, or, half of the time, None. Body and garment are always
    there."""
    parts = {key: rng.choice([*layer, *[None] * len(layer)]) for key, layer in LAYERS.items()}
    parts["base"], parts["body"] = rng.choice(MADE)
    return parts | {"hair": parts["base"]}


def caption(parts, rng):
    """The parts in words, each of them in seven of ten captions."""
    told = {key: part if rng.random() < 0.7 else None for key, part in parts.items()}
    text = (told["base"] or "a hero") + (f" in {told['body']}" if told["body"] else "")
    others = " and ".join(filter(None, map(told.get, ("cloak", "head", "hand1", "hand2"))))
    return f"{text} with {others}" if others else text


def render(parts, tiles):
    """Lay the tiles of parts over one another, on a light ground."""
    picture = Image.new("RGBA", (32, 32), (232, 230, 222))
    for key, part in parts.items():
        if part in LAYERS[key]:
            picture.alpha_composite(tiles[f"{key}/{LAYERS[key][part]}.png"])
    return picture.convert("RGB")


def main(settings):
    """Write the folder. Raises UserError if there are no tiles."""
    tiles, out, rng = read_tiles(settings.source), Path(settings.out), random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    for number in range(settings.count):
        parts = random_hero(rng)
        render(parts, tiles).save(out / f"{number:05d}.png")
        (out / f"{number:05d}.txt").write_text(caption(parts, rng), "utf-8")
    print(f"{out} is made. Not in it, to try:", *map(" in ".join, NEVER_MADE[:6]), sep="\n")


if __name__ == "__main__":
    prepare.run_script(main, Settings, __doc__)
