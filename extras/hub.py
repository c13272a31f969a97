"""Make a cache of a data set of the Hugging Face Hub, of Parquet files, tars or an image folder.

    python extras/hub.py user/name --out data/name --size 64            # streamed, never stored
    python extras/hub.py user/name@revision --image-column image --caption-column text
    python extras/hub.py photos/ --out data/photos       # with .tar, .parquet or metadata.jsonl/csv

It takes the flags of prepare.py besides. The picture is the first column that holds one. The
caption is the first of prompt, caption, text and txt, also in a column json; of a list the longest.
In a tar it stands in the .txt or .json of its picture's name. Stopped, the same command goes on.
"""

import collections
import dataclasses
import itertools
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import huggingface_hub

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prepare
from model import UserError
from prepare import LeftOut, flag

CAPTIONS = ("prompt", "caption", "text", "txt")


@dataclasses.dataclass
class Settings(prepare.Settings):
    """All settings of hub.py: those of prepare.py, and these."""

    source: str = flag("", "a data set of the Hub, a tar, or a folder of such files", nargs=None)
    split: str = flag("train", "split of the data set")
    config: str = flag("", "configuration of the data set, if it has several")
    image_column: str = flag("", "column of the pictures; '': the first that holds one")
    caption_column: str = flag("", "column of the captions; '': prompt, caption, text or txt")


class Item(NamedTuple):
    """A picture and its caption: where its bytes are (`bytes`, or a `path`, with `offset` and
    `size` in a tar), and a text, a list of texts, or a LeftOut that says what is wrong."""

    name: str
    picture: dict
    caption: object

    def __str__(self):
        return self.name


def load(item):
    """Caption and picture of an Item. Raises LeftOut."""
    caption = item.caption
    if isinstance(caption, list):  # the longest tells most
        caption = max((each for each in caption if isinstance(each, str)), key=len, default=None)
    if not isinstance(caption, str):
        raise caption if isinstance(caption, LeftOut) else LeftOut("caption that is no text")
    try:
        return caption, prepare.load_picture(read(item.picture))
    except (OSError, AttributeError, TypeError):
        raise LeftOut("no picture, or one that cannot be read") from None


def read(place):
    """The bytes that a place of an Item has or points to."""
    if place.get("bytes") is not None:
        return place["bytes"]
    import fsspec  # which comes with datasets; it reads from tars and the Hub, too

    with fsspec.open(place["path"], "rb") as file:
        file.seek(place.get("offset", 0))
        return file.read(place.get("size", -1))


def find_caption(record):
    """The text, or list of texts, under the first of CAPTIONS in a dict; None if there is none."""
    found = [record[key] for key in CAPTIONS if isinstance(record.get(key), str | list)]
    return found[0] if found else None


# ------------------------------------------------------------------------------------------- tars
def read_tar(path):
    """The Items of a tar, wherever in it their captions are. The caption of a.b.jpg is a.b.txt or
    a.b.json, or, if it is the only picture of sample a, a.txt or a.json. What stands before a
    broken place is used."""
    captions, pictures = {}, []
    try:
        with tarfile.open(path, "r:") as tar:  # an index; nothing is unpacked
            for member in filter(tarfile.TarInfo.isfile, tar):
                place = {"path": str(path), "offset": member.offset_data, "size": member.size}
                stem, ending = os.path.splitext(member.name)
                if ending.lower() in (".txt", ".json"):
                    captions.setdefault(stem, (place, ending.lower()))
                elif ending.lower() in prepare.ENDINGS and os.path.basename(stem)[:1] != ".":
                    pictures.append((stem, f"{path}/{member.name}", place))
    except (tarfile.TarError, OSError, ValueError) as error:
        print(f"{path} is no plain tar, or broken; what stands before is read ({error})")
    stems = collections.Counter(stem for stem, _, _ in pictures)
    samples = collections.Counter(sample_of(stem) for stem, _, _ in pictures)
    for stem, name, place in pictures:
        found = captions.get(stem)
        if found is None and samples[sample_of(stem)] == 1:
            found = captions.get(sample_of(stem))
        caption = LeftOut("no .txt or .json beside it") if found is None else read_caption(*found)
        if stems[stem] > 1:
            caption = LeftOut("two pictures for one caption")
        yield Item(name, place, caption)


def sample_of(stem):
    """The name of a WebDataset sample: up to the first dot behind the last slash."""
    folder, name = os.path.split(stem)
    return os.path.join(folder, name.split(".")[0])


def read_caption(place, ending):
    """The caption in a .txt, or one of CAPTIONS in a .json, or a LeftOut."""
    try:
        text = read(place).decode("utf-8-sig")
        return find_caption(dict(json.loads(text))) if ending == ".json" else text
    except (OSError, ValueError, TypeError, RecursionError):
        return LeftOut("caption that is not UTF-8 or not JSON")


# ----------------------------------------------------------------------- all else, by datasets
def open_dataset(settings):
    """A stream of rows whose pictures are not decoded, and the source with its revision, which is
    pinned. Raises UserError."""
    import datasets

    source, how = settings.source, {"split": settings.split, "streaming": True}
    name, _, revision = source.partition("@")
    try:
        if Path(source).is_dir():
            rows = datasets.load_dataset(source, settings.config or None, **how)
        else:
            how["revision"] = huggingface_hub.dataset_info(name, revision=revision or None).sha
            rows = datasets.load_dataset(name, settings.config or None, **how)
            source = f"{name}@{how['revision']}"
        return rows.decode(False), source
    except Exception as error:  # of these two libraries and those below them
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{settings.source} is no data set that can be read: {reason}") from error


def read_rows(rows, settings):
    """The Items of a stream of rows. Raises UserError if a column is not there."""
    first = [*itertools.islice(rows, 100)]
    names = [*first[0]] if first else []
    pictures = [name for name in names if any(is_picture(row[name]) for row in first)]
    captions = [name for name in (*CAPTIONS, "json") if name in names]
    image_column = settings.image_column or [*pictures, "image"][0]
    caption_column = settings.caption_column or [*captions, "caption"][0]
    for column, name in (("image", image_column), ("caption", caption_column)):
        if name not in names:
            told = f"{settings.source} has no column {name}, but {', '.join(names)}"
            raise UserError(f"{told}; name one with --{column}-column")
    for number, row in enumerate(rows):
        caption, picture = row[caption_column], row[image_column]
        if isinstance(caption, dict):
            caption = find_caption(caption)
        name = picture["path"] if is_picture(picture) else "without a picture"
        yield Item(f"row {number}, {name}", picture, caption)


def is_picture(value):
    """Whether a value of a row is a picture that was not decoded."""
    return isinstance(value, dict) and value.keys() >= {"bytes", "path"}


def main(settings):
    """Write a cache. Raises UserError."""
    source = Path(settings.source)
    tars = [source] if source.suffix == ".tar" else sorted(source.rglob("*.tar"))
    if tars:
        items = itertools.chain.from_iterable(read_tar(path) for path in tars)
    else:
        rows, settings.source = open_dataset(settings)
        items = read_rows(rows, settings)
    prepare.write_cache(settings, items, load)


if __name__ == "__main__":
    prepare.run_script(main, Settings, __doc__)
