"""Pictures and captions in, a cache of latents and text embeddings out.

    python prepare.py                                          # 20,000 scenes into data/scenes
    python prepare.py photos/ --out data/photos --size 64      # a folder of pictures, or of tars
    torchrun --nproc_per_node=4 prepare.py jackyhate/text-to-image-2M --codec taef2     # the Hub's

A caption is in the .txt, or the .json (`prompt`, `caption` or `text`), of its picture's name.

    data/scenes/meta.json                sizes, encoders, mean and std per channel
                shard-00000/latents.npy  (N, C, H, W); a shard is whole, or has another name
                            text.npy     (sum of all L, D), that of caption i in the rows from
                            offsets.npy  (N + 1), offsets[i] to offsets[i + 1]
                            captions.txt a line each; teacher.npy (N, D, h, w), if asked for
"""
import argparse, contextlib, datetime, fnmatch, hashlib, inspect, io, itertools, json
import math, os, re, shutil, tarfile, unicodedata
from collections import Counter, namedtuple
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, get_args
import numpy as np, torch, torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm
from model import (Refused, ask_hub, fetch, pick_device, read_json, read_safetensors, refusing,
                   write_json)
# --------------------------------------------------------------------- the built-in world: scenes
COLOURS = {"red": (225, 35, 40), "green": (40, 165, 70), "blue": (40, 85, 225),
           "yellow": (250, 215, 45), "purple": (165, 50, 190), "cyan": (60, 205, 225),
           "white": (245, 245, 245), "black": (20, 20, 25)}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = {"top left": (-1, -1), "top": (0, -1), "top right": (1, -1), "left": (-1, 0),
          "right": (1, 0), "bottom left": (-1, 1), "bottom": (0, 1), "bottom right": (1, 1)}
FACING = {"left": ("left of", "right"), "right": ("right of", "left"),
          "top": ("above", "bottom"), "bottom": ("below", "top")}
NEVER_TRAINED = {("red", "triangle"), ("blue", "ring"), ("yellow", "cross"), ("green", "diamond")}
STEP = 0.27                    # from the centre of the picture to a place, in picture widths
Thing = namedtuple("Thing", "colour shape place x y radius")     # lengths in picture widths
Scene = namedtuple("Scene", "ground things")                     # one thing, or two face to face

def random_scene(rng, split="train"):
    """Draw a scene of a split with a NumPy generator: "composition" are the scenes with a pair in
    NEVER_TRAINED, "held-out" every eighth caption of the others, "train" the rest."""
    while True:
        ground, *colours = rng.permutation(list(COLOURS)).tolist()
        pair, things = rng.random() < 0.6, []
        place = rng.choice(list(FACING if pair else PLACES)).item()
        for colour, place in zip(colours, [place, FACING[place][1]] if pair else [place]):
            x, y = 0.5 + STEP * np.array(PLACES[place]) + rng.uniform(-0.02, 0.02, 2)
            things.append(Thing(colour, rng.choice(SHAPES), place, x, y, rng.uniform(0.14, 0.17)))
        scene = Scene(ground, things)
        held_out = hashlib.md5(caption(scene).encode()).digest()[0] % 8 == 0
        composition = any(thing[:2] in NEVER_TRAINED for thing in things)
        if split == ("composition" if composition else "held-out" if held_out else "train"):
            return scene

def caption(scene, short=False):
    """The scene in words. The long form tells all that is checked; the short form leaves out places
    and ground, which cost PRX more than anything else it tried (FID 18.20 to 36.84)."""
    names = [f"a {thing.colour} {thing.shape}" for thing in scene.things]
    if short:
        return " and ".join(names)
    place = scene.things[0].place
    where = f"{FACING[place][0]} {names[1]}" if names[1:] else f"at the {place}"
    return f"{names[0]} {where} on a {scene.ground} ground"

def coverage(thing, size):
    """The share (size, size) of each pixel that a thing covers, from its signed distance."""
    centres = (np.arange(size) + 0.5) / size
    x, y = (centres - thing.x) / thing.radius, (centres[:, None] - thing.y) / thing.radius
    a, b, r = np.abs(x), np.abs(y), np.hypot(x, y)
    distance = {"circle": r - 1,                           # sizes that make all areas much the same
                "square": np.maximum(a, b) - 0.89,
                "triangle": np.maximum(y, 0.866 * a - 0.5 * y) - 0.68,
                "diamond": (a + b - 1.25) * 0.7071,
                "cross": np.minimum(np.maximum(a - 0.4, b - 1.15), np.maximum(a - 1.15, b - 0.4)),
                "ring": np.abs(r - 0.85) - 0.3}[thing.shape]
    return np.clip(0.5 - distance * thing.radius * size, 0, 1)
AREAS = {shape: coverage(Thing("", shape, "", 0.5, 0.5, 0.25), 256).mean() * 16 for shape in SHAPES}

def render(scene, size):
    """Draw a scene: (size, size, 3) uint8."""
    picture = np.full((size, size, 3), COLOURS[scene.ground], np.float32)
    for thing in scene.things:
        picture += coverage(thing, size)[..., None] * (COLOURS[thing.colour] - picture)
    return picture.round().astype(np.uint8)

def check(picture, scene):
    """Whether a picture (size, size, 3) uint8 shows a scene (as GenEval, 2310.11513): in each place
    the right shape fits best, and these fits, drawn, agree in colours and in 99% of the pixels."""
    size, ground, fits = len(picture), np.array(COLOURS[scene.ground]), []
    centres = (np.arange(size) + 0.5) / size
    for thing in scene.things:
        middle, colour = 0.5 + STEP * np.array(PLACES[thing.place]), COLOURS[thing.colour] - ground
        near = np.hypot(centres - middle[0], centres[:, None] - middle[1]) < STEP
        alpha = ((picture - ground) @ colour / (colour @ colour)).clip(0, 1) * near    # coverage
        x, y = ((alpha.sum(n) @ centres + middle[n]) / (alpha.sum() + 1) for n in (0, 1))
        tries = [thing._replace(shape=s, x=x, y=y, radius=max(0.13, (alpha.mean() / area) ** 0.5))
                 for s, area in AREAS.items()]                    # 0.13: a mere trace is no thing
        fits.append(min(tries, key=lambda fit: np.abs(alpha - coverage(fit, size)).sum()))
    error = picture - render(Scene(scene.ground, fits), size).astype(float)
    areas = [np.ones((size, size), bool), *(coverage(fit, size) > 0.5 for fit in fits)]
    true = all(np.linalg.norm(np.median(error[area], axis=0)) < 60 for area in areas)
    clean = (np.linalg.norm(error, axis=-1) > 110).mean() < 0.01
    return bool(true and clean) and all(a.shape == b.shape for a, b in zip(fits, scene.things))
# --------------------------------------------------------- where pictures and captions come from
# A source has parts, each of which makes a shard. A part is a list of items (name, caption, load);
# load() gives the picture, PIL in RGB, or raises Refused with the reason why not.
PART = 4096                    # items in a part, where the source is not a tar
ENDINGS = Image.registered_extensions()          # a dict of formats, all of them loaded by this
FORMATS = [kind for kind in Image.OPEN if kind != "EPS"]      # which would run a stranger's program

def load_picture(read):
    """The RGB picture in what read() gives, upright, on white where transparent. Raises Refused."""
    data = io.BytesIO(read())
    try:
        picture = ImageOps.exif_transpose(Image.open(data, formats=FORMATS))
        if picture.mode.startswith("I"):                                      # 16 bits of grey
            picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except Exception:                  # Pillow's decoders raise whatever they come upon
        raise Refused("broken or gigantic picture")

def list_items(source):
    """The items of a folder with those in it, or of a tar (WebDataset), never unpacked. Files of
    one stem belong together: it ends at the last dot, in a tar at the first."""
    files, pictures, captions = [], [], {}
    if source.is_dir():
        files = [(str(path.relative_to(source)), path, -1, 0)
                 for path in sorted(source.rglob("*")) if path.is_file()]
    else:
        try:
            with tarfile.open(source, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    files.append((member.name, source, member.size, member.offset_data))
        except Exception as error:                 # tarfile raises whatever it comes upon
            source.stat()                          # or the disk's error, where it is gone
            print(f"{source} is read only up to a point: {error!r}")
    for name, path, length, offset in files:
        read = partial(np.fromfile, path, np.uint8, length, offset=offset)
        stem = re.match(r"(?s)(.*/)?[^.]*" if path == source else r"(?s).*(?=\.)|", name).group()
        if ENDINGS.get(Path(name.lower()).suffix) in FORMATS:
            pictures.append((stem, name, partial(load_picture, read)))
        elif name.endswith((".txt", ".json")):
            with contextlib.suppress(Exception):           # json raises whatever it comes upon
                text = read().tobytes().decode("utf-8-sig")
                found = json.loads(text) if name.endswith(".json") else {"text": text}
                captions[stem] = found.get("prompt") or found.get("caption") or found["text"]
    return [(name, str(captions.get(stem, "")), load) for stem, name, load in pictures]

def list_scenes(first, size, short):
    """The items of a part of the scenes. Every third caption leaves the ground open."""
    scenes = [(n, random_scene(np.random.default_rng(n))) for n in range(first, first + PART)]
    return [("", caption(scene, short).split("\n" if n % 3 else " on a ")[0],
             lambda scene=scene: Image.fromarray(render(scene, size))) for n, scene in scenes]

def list_parts(source, size=32, short=False, out="data/downloads"):
    """The parts of "scenes", a folder of pictures, a tar, a folder of tars or a Hub dataset of tars
    (user/name or user/name:pattern): functions that give items, downloaded then. Raises Refused."""
    if source == "scenes":
        return (partial(list_scenes, first, size, short) for first in range(0, 10 ** 12, PART))
    path = Path(source)
    if tars := [path] if path.is_file() else sorted(path.glob("*.tar")):
        return [partial(list_items, tar) for tar in tars]
    if items := list_items(path) if path.is_dir() else []:
        return [partial(items.__getitem__, slice(n, n + PART)) for n in range(0, len(items), PART)]
    dataset, _, pattern = source.partition(":")
    if not path.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        files = ask_hub("list_repo_files", dataset, repo_type="dataset")
        if tars := fnmatch.filter(sorted(files), pattern or "*.tar"):
            return [lambda n=n, tar=tar: list_items(Path(ask_hub(
                "hf_hub_download", dataset, tar, repo_type="dataset",
                local_dir=f"{out}/shard-{n:05d}.download"))) for n, tar in enumerate(tars)]
    raise Refused(f"{source} is neither a tar, a folder with pictures or tars, nor such on the Hub")

def load_squares(items, size, min_size, min_words, max_aspect, **others):
    """A batch of items as captions, pictures (B, size, size, 3) uint8, and (name, why not)."""
    captions, pictures, left_out = [], [], []
    for name, text, load in items:
        try:
            text = " ".join(text.encode(errors="replace").decode().replace("\0", " ").split())
            if len(text.split()) < min_words:
                raise Refused(f"caption below {min_words} words" if text else "no legible caption")
            picture = load()
            if min(picture.size) < min_size:
                raise Refused(f"shorter side below {min_size} pixels")
            if max(picture.size) > min(picture.size) * max_aspect:
                raise Refused(f"longer side above {max_aspect:g} times the shorter")
            picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
            pictures.append(torch.from_numpy(np.array(picture)))
            captions.append(text)
        except Refused as reason:
            left_out.append((name.encode(errors="replace").decode(), str(reason)))
    return captions, torch.stack(pictures) if pictures else torch.empty(0, size, size, 3), left_out

def read_source(source):
    """Yield each usable picture (PIL, RGB) of a source, whole, with its caption."""
    for part in list_parts(source):
        for _, text, load in part():
            with contextlib.suppress(Refused):
                yield load(), text
# ---------------------------------------------------------------------------- the frozen encoders
def load_frozen(kind, name, device="cpu", *how):
    """A network of a kind that is not trained here, from a folder or the Hub. Raises Refused."""
    folder = fetch(name, "config.json", "tokenizer.json", "[md]*.safetensors", "taef2*")
    with refusing(f"{folder} does not hold a {kind.__name__}"):
        weights = read_safetensors(*sorted(folder.glob("*.safetensors"))).items()
        return kind({name: weight.float().to(device) for name, weight in weights
                     if not name.startswith(("decoder.block", "lm_head"))}, folder, *how)     # T5's

class TinyAutoencoder:
    """TAESD and its kin (github.com/madebyollin/taesd): convolutions and ReLU blocks, 64 wide, that
    make 8 x 8 pixels one latent, in float16 in the cache. The weights are named as in diffusers'
    AutoencoderTiny. Layers: c a convolution, d one that halves, u doubling, r ReLU, b a block."""
    factor, dtype = 8, "float16"
    def __init__(self, weights, folder):
        self.weights, self.channels = weights, len(weights["encoder.layers.14.bias"])
        self.decode(self.encode(torch.zeros(1, 3, 8, 8)))                       # is all there?
    def encode(self, images):
        return self.run("encoder", "cbdbbbdbbbdbbbc", images / 2 + 0.5)
    def decode(self, latents):
        return self.run("decoder", "crbbbucbbbucbbbucbc", 3 * torch.tanh(latents / 3)) * 2 - 1
    def conv(self, x, name, stride=1):
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return F.conv2d(x.to(weight.device), weight, bias, stride, padding=weight.shape[-1] // 2)
    @torch.no_grad()
    def run(self, part, layers, x):
        for number, kind in enumerate(layers):
            name = f"{part}.layers.{number}"
            if kind in "cd":
                x = self.conv(x, name, 2 if kind == "d" else 1)
            elif kind == "u":
                x = F.interpolate(x, scale_factor=2)
            elif kind == "b":
                if f"{name}.pool.0.weight" in self.weights:         # taef2's, where x is smallest
                    norm = (self.weights[f"{name}.pool.1.{each}"] for each in ("weight", "bias"))
                    y = F.relu(F.group_norm(self.conv(x, f"{name}.pool.0"), 4, *norm))
                    x = x + self.conv(y, f"{name}.pool.3")
                y = F.relu(self.conv(x, f"{name}.conv.0"))
                y = F.relu(self.conv(y, f"{name}.conv.2"))
                x = x + self.conv(y, f"{name}.conv.4")
            x = F.relu(x) if kind in "rb" else x
        return x

def load_codec(name, device="cpu"):
    """The codec of that name: pixels, or a tiny autoencoder (taesd, taesdxl, taesd3, taef1, taef2,
    another Hub repository or a folder). `encode` makes images (B, 3, H, W) in [-1, 1] latents
    (B, channels, H / factor, W / factor), `decode` undoes it. Raises Refused."""
    if name == "pixels":                       # leaves pictures as they are, uint8 in the cache
        same = lambda images: images
        return argparse.Namespace(channels=3, factor=1, dtype="uint8", encode=same, decode=same)
    source = name if Path(name).is_dir() or "/" in name else f"madebyollin/{name}"
    return load_frozen(TinyAutoencoder, source, device)

class Words:
    """Text embeddings that need no download. A word is a random vector seeded by its own spelling
    (the hashing trick, arXiv 0902.2206); a token is a word beside its left and right neighbours, so
    that "red circle" is not "circle red". Articles and the empty caption have no tokens."""
    dim = 3 * 32
    def __init__(self, max_tokens=64):
        self.max_tokens, self.cut = max_tokens, 0                    # cut: captions that were
    def __call__(self, captions):
        embeddings = []
        for text in captions:
            words = [w for w in re.findall(r"\w+", text.lower()) if w not in ("a", "an", "the")]
            self.cut += len(words) > self.max_tokens
            spelling = b"".join(hashlib.shake_256(word.encode()).digest(32) for word in words)
            rows = np.frombuffer(spelling, np.uint8).reshape(-1, 32) / 127.5 - 1       # uniform, of
            rows = np.pad(rows * 3 ** 0.5, [(1, 1), (0, 0)])    # variance 1; no word at either end
            tokens = np.hstack((rows[1:-1], rows[:-2], rows[2:]))[:self.max_tokens]
            embeddings.append(torch.from_numpy(tokens).float())
        return embeddings

class T5:
    """The encoder of a T5 v1.1 (arXiv 1910.10683 and 2002.05202) such as flan-t5: captions to the
    embeddings (L_i, dim) of their pieces and of the end, which stays when a caption is cut."""
    def __init__(self, weights, folder, max_tokens):
        config, pieces = read_json(folder / "config.json"), read_json(folder / "tokenizer.json")
        self.dim, self.heads, self.depth = map(config.get, ("d_model", "num_heads", "num_layers"))
        self.pieces = {text: (score, n) for n, (text, score) in enumerate(pieces["model"]["vocab"])}
        self.longest, self.unknown = max(map(len, self.pieces)), min(self.pieces.values())[0] - 10
        self.weights, self.max_tokens, self.cut = weights, max_tokens, 0
        self([""])                                                              # is all there?
    def tokenize(self, text):
        """The numbers of the pieces of a text, and 1, the end."""
        text = re.sub("[\1-\10\13\16-\37\177\x8f\x9f]", "", text)           # control characters
        text = re.sub("[\u1680\u200b-\u200f\u2581\ufeff\ufffd]", " ", text)
        text = "～".join(unicodedata.normalize("NFKC", part) for part in text.split("～"))
        return [number for word in text.split() for number in self.split("▁" + word)] + [1]
    @lru_cache(2 ** 17)
    def split(self, word):
        """The most probable pieces that make a word: Viterbi's algorithm (arXiv 1804.10959)."""
        best = [(0.0, [])]           # score and pieces of the best way to each of the last letters
        for end in range(1, len(word) + 1):
            ways = []
            for start, (score, pieces) in enumerate(best, end - len(best)):
                more, number = self.pieces.get(word[start:end], (self.unknown, 2))
                if number != 2 or start == end - 1:
                    again = number == 2 and pieces[-1:] == [2]       # unknown letters are one piece
                    ways.append((score + more, pieces if again else [*pieces, number]))
            best = [*best[1 - self.longest:], max(ways, key=lambda way: way[0])]
        return best[-1][1]
    @torch.no_grad()
    def __call__(self, captions):
        weight = lambda name: self.weights[f"{name}.weight"]
        norm = lambda x, name: F.rms_norm(x, x.shape[-1:], weight(name), 1e-6)
        ids = [self.tokenize(text) for text in captions]
        self.cut += sum(len(each) > self.max_tokens for each in ids)
        ids = [torch.tensor(each[:-1][:self.max_tokens - 1] + [1]) for each in ids]
        ids = torch.nn.utils.rnn.pad_sequence(ids, True, -1).to(weight("shared").device)    # (B, L)
        distance = torch.arange(ids.shape[1]) - torch.arange(ids.shape[1])[:, None]
        starts = torch.tensor([*range(1, 9), 12, 16, 23, 32, 46, 64, 91])    # of the table's ranges
        rows = torch.bucketize(distance.abs(), starts, right=True) + 16 * (distance > 0)
        bias = weight("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")[rows]
        bias = bias.permute(2, 0, 1).masked_fill((ids < 0)[:, None, None], -math.inf)
        x = weight("shared")[ids.clamp(min=0)]                                           # (B, L, D)
        for layer in (f"encoder.block.{number}.layer" for number in range(self.depth)):
            y, name = norm(x, f"{layer}.0.layer_norm"), f"{layer}.0.SelfAttention"
            q, k, v = (F.linear(y, weight(f"{name}.{part}")).unflatten(-1, (self.heads, -1))
                       .transpose(1, 2) for part in "qkv")                   # (B, heads, L, d)
            y = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0).transpose(1, 2).flatten(2)
            x = x + F.linear(y, weight(f"{name}.o"))
            y, name = norm(x, f"{layer}.1.layer_norm"), f"{layer}.1.DenseReluDense"
            gate = F.gelu(F.linear(y, weight(f"{name}.wi_0")), approximate="tanh")
            x = x + F.linear(gate * F.linear(y, weight(f"{name}.wi_1")), weight(f"{name}.wo"))
        return [row[each >= 0] for row, each in zip(norm(x, "encoder.final_layer_norm"), ids)]

def load_text_encoder(name, device="cpu", max_tokens=64):
    """The text encoder of that name: words, or the T5 in a folder or Hub repository. It makes a
    list of captions a list of (L_i, dim) embeddings, L_i <= max_tokens. Raises Refused."""
    return Words(max_tokens) if name == "words" else load_frozen(T5, name, device, max_tokens)

class DINOv2:
    """The vision transformer that REPA and P-DINO look through (arXiv 2304.07193): images (B, 3, H,
    W) in [-1, 1], H and W multiples of its patch size, to features (B, n, dim) of the patches."""
    def __init__(self, weights, folder, side=16):
        config, self.weights = json.loads((folder / "config.json").read_bytes()), weights
        assert config["model_type"] == "dinov2", config["model_type"]   # none with registers
        self.heads, self.depth = config["num_attention_heads"], config["num_hidden_layers"]
        dim, _, _, self.patch = weights["embeddings.patch_embeddings.projection.weight"].shape
        self.shape, self.cells = (dim, side, side), 2 * [side * -(-16 // side)]      # 16 or more
        self.on_grid(torch.zeros(1, 3, 8, 8))                                   # is all there?
    def __call__(self, images):
        both = lambda name: [self.weights[f"{name}.{kind}"] for kind in ("weight", "bias")]
        norm = lambda x, name: F.layer_norm(x, x.shape[-1:], *both(name), 1e-6)
        w, places = self.weights, self.weights["embeddings.position_embeddings"]  # (1, 1 + n, D)
        mean, std = places.new_tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
        x = (images.to(places.device) / 2 + 0.5 - mean) / std                           # ImageNet's
        x = F.conv2d(x, *both("embeddings.patch_embeddings.projection"), self.patch)
        table = places[:, 1:].mT.unflatten(2, 2 * [math.isqrt(places.shape[1])])     # (1, D, h, w)
        x = (x + F.interpolate(table, x.shape[2:], mode="bicubic")).flatten(2).mT     # (B, n, D)
        x = torch.cat(((w["embeddings.cls_token"] + places[:, :1]).expand(len(x), -1, -1), x), 1)
        for layer in (f"encoder.layer.{number}" for number in range(self.depth)):
            y, name = norm(x, f"{layer}.norm1"), f"{layer}.attention"
            q, k, v = (F.linear(y, *both(f"{name}.attention.{part}")).unflatten(
                -1, (self.heads, -1)).transpose(1, 2) for part in ("query", "key", "value"))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + w[f"{layer}.layer_scale1.lambda1"] * F.linear(y, *both(f"{name}.output.dense"))
            y = F.gelu(F.linear(norm(x, f"{layer}.norm2"), *both(f"{layer}.mlp.fc1")))
            x = x + w[f"{layer}.layer_scale2.lambda1"] * F.linear(y, *both(f"{layer}.mlp.fc2"))
        return norm(x, "layernorm")[:, 1:]                                     # without the class
    def on_grid(self, images):
        """Features (B, dim, side, side) of square images: of `cells` patches, averaged."""
        size, images = self.cells[0] * self.patch, images.to(self.weights["layernorm.bias"].device)
        images = F.interpolate(images, 2 * [size], mode="bicubic", antialias=images.shape[3] > size)
        return F.adaptive_avg_pool2d(self(images).mT.unflatten(2, self.cells), self.shape[1:])
load_teacher = partial(load_frozen, DINOv2)                   # called with name, device and side

def pad(embeddings, tokens):
    """A list of (L_i, D) embeddings as one (B, tokens, D), cut or filled up with rows of zeros."""
    filler = embeddings[0].new_zeros(tokens, embeddings[0].shape[1])        # which sets the length
    return torch.nn.utils.rnn.pad_sequence([*(e[:tokens] for e in embeddings), filler], True)[:-1]
# -------------------------------------------------------------------------- the command line
count, natural = Annotated[int, 1, 10 ** 12], Annotated[int, 0, 2 ** 31 - 1]   # seeds have 31 bits
positive, weight, share = (Annotated[float, *ends] for ends in ((1e-12, 1e12), (0, 1e12), (0, 1)))

def run_script(settings, description, run=lambda done: done, **nargs):
    """Call a function or dataclass, each argument of which is a flag (or positional, if in nargs)
    and the comment behind it the help; then run what it gives. Bad input ends in one sentence."""
    parser = argparse.ArgumentParser(
        None, "%(prog)s [flags]; --help tells them all", description, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    comments = dict(re.findall(r"(?m)^    (\w+):[^#\n]*# +(.*)$", inspect.getsource(settings)))
    flags = inspect.signature(settings).parameters
    for name, flag in flags.items():
        kind, *others = get_args(flag.annotation) or [flag.annotation]
        how = dict(action="store_true") if kind is bool else dict(type=kind, nargs=nargs.get(name))
        how = dict(choices=[kind, *others]) if isinstance(kind, str) else how        # of a Literal
        parser.add_argument(name if name in nargs else "--" + name.replace("_", "-"), **how,
                            default=flag.default, help=f"{comments[name]} (default: %(default)r)")
    for name, value in (values := vars(parser.parse_args())).items():
        kind, *limits = get_args(flags[name].annotation) or [str]
        if kind in (int, float) and not limits[0] <= value <= limits[1]:         # of an Annotated
            parser.error(f"argument --{name.replace('_', '-')}: {value} is not in {limits}")
    try:
        run(settings(**values))
    except (Refused, OSError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt) as error:
        sentence = (str(error) or f"stopped: {error!r}; the same command goes on").splitlines()[-1]
        parser.exit(2 if isinstance(error, Refused) else 1, f"{parser.prog}: {sentence}\n")
# -------------------------------------------------------------------------------------- the cache
def prepare(
    source: str = "scenes",      # scenes, a folder of pictures or tars, a tar, user/name on the Hub
    out: str = "",               # folder of the cache; "": data/ and the source's name
    size: natural = 0,           # side of the square pictures in pixels; 0: 32 for scenes, else 256
    limit: natural = 0,          # look at no more (a process: its share); 0: 20,000 scenes, or all
    codec: str = "pixels",       # what makes latents of pictures: pixels, taef2, taesd, ...
    text: str = "words",         # ... embeddings of captions: words, google/flan-t5-base, ...
    teacher: str = "",           # ... features for REPA and P-DINO: facebook/dinov2-small; "": none
    max_tokens: count = 64,      # where captions are cut
    captions: Literal["long", "short"] = "long",   # how scenes are told
    min_size: natural = 0,       # leave out pictures with a shorter side; 0: half of size
    min_words: count = 1,        # ... with fewer words in their caption
    max_aspect: positive = 4.0,  # ... whose longer side is more times the shorter
):
    """Write a cache, or go on with one; under torchrun the processes share parts and limit. Raises
    Refused where nothing can be used, or where the cache was begun with other settings."""
    settings, scenes = {**locals(), "out": None}, source == "scenes"           # all flags but --out
    out = Path(out or f"data/{Path(source.split(':')[0]).stem}")
    size, limit = size or (32 if scenes else 256), limit or (20_000 if scenes else 10 ** 9)
    settings.update(size=size, limit=limit, min_size=min_size or size // 2)
    for shard in out.glob("shard-?????/shard.json"):
        refuse_differences(out, read_json(shard).get("settings", settings), settings)
    if (out / "meta.json").exists():
        return print(f"{out} is complete; for other pictures give a new --out")
    device, autocast = pick_device()
    codec, encode_text = load_codec(codec, device), load_text_encoder(text, device, max_tokens)
    if size % codec.factor:
        raise Refused(f"--size {size} is not a multiple of the codec's {codec.factor} pixels")
    side = size // codec.factor
    grid = side // (max(8, side // 16) if codec.factor == 1 else 2)      # of train.py's tokens
    teacher = teacher and load_teacher(teacher, device, max(1, grid))
    rank, world = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    parts, known = list_parts(source, size, captions == "short", out), set()      # known: digests
    left = limit // world + (rank < limit % world)
    for number, part in itertools.islice(enumerate(parts), rank, None, world):
        folder = out / f"shard-{number:05d}"
        if not folder.exists():
            with autocast:
                write_shard(folder, part()[:left], settings, codec, encode_text, teacher, known)
            shutil.rmtree(folder.with_suffix(".download"), ignore_errors=True)
        left -= read_json(folder / "shard.json")["seen"]
        if left <= 0:
            break
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    wait = torch.distributed.barrier if world > 1 else lambda: None
    wait()                                    # for all shards
    if rank == 0:
        shards = {each: read_json(each / "shard.json") for each in sorted(out.glob("shard-?????"))}
        for reason, n in sum((Counter(s["report"]) for s in shards.values()), Counter()).items():
            print(f"{n:,} x {reason}")
        total, looked_at = (sum(s[key] for s in shards.values()) for key in ("count", "seen"))
        if not total:
            raise Refused(f"nothing usable in {source}; delete {out}/shard-*")
        mean, squares = sum(np.array(s["sums"]) for s in shards.values()) / total
        lengths = np.concatenate([np.diff(np.load(each / "offsets.npy")) for each in shards])
        counts = {each.name: s["count"] for each, s in shards.items() if s["count"]}
        write_json(out / "meta.json", {
            **settings, "count": total, "shards": counts, "dtype": codec.dtype,
            "latent_shape": [codec.channels, side, side], "text_dim": encode_text.dim,
            "teacher_shape": teacher and teacher.shape, "tokens": int(lengths.max()),
            "examples": (out / min(counts) / "captions.txt").read_text("utf-8").splitlines()[:12],
            "mean": mean.tolist(), "std": np.sqrt((squares - mean ** 2).clip(1e-6)).tolist()})
        print(f"{out} holds {total:,} pictures, {total / looked_at:.1%} of those looked at; tokens "
              f"in a caption, quartiles: {np.quantile(lengths, np.arange(5) / 4).tolist()}")
    wait()                                    # for meta.json

def refuse_differences(folder, old, new, free=()):
    """Raise Refused if a folder's settings and new ones differ in others than the free ones."""
    differ = [f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
              for key in sorted({*old, *new} - {*free}) if old.get(key) != new.get(key)]
    if differ:
        raise Refused(f"{folder} has other settings: {'; '.join(differ)}; give those or new --out")

def append_rows(path, rows):
    """Add rows to a .npy file, or begin one; NumPy leaves room in its header for any count."""
    before = len(np.load(path, mmap_mode="r")) if path.exists() else 0
    with open(path, "r+b" if path.exists() else "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": rows.dtype.str, "fortran_order": False,
                                                    "shape": (before + len(rows), *rows.shape[1:])})
        file.seek(0, os.SEEK_END)
        file.write(rows.tobytes())

def write_shard(folder, items, settings, codec, encode_text, teacher, known):
    """Encode items into the folder of a shard, which gets its name when it is whole."""
    unfinished, texts = folder.with_suffix(".partial"), []
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    offsets, report, sums = [0], Counter(), np.zeros((2, codec.channels))
    scenes, processes = settings["source"] == "scenes", int(os.getenv("LOCAL_WORLD_SIZE", 1))
    batches = torch.utils.data.DataLoader(items, 64, collate_fn=partial(load_squares, **settings),
                                          num_workers=0 if scenes else os.cpu_count() // processes)
    for captions, pictures, left_out in tqdm(batches, folder.name, leave=False, unit_scale=64,
                                             disable=os.getenv("RANK", "0") != "0" or None):
        for name, reason in left_out:
            report[reason] += 1
            if report[reason] <= 3:
                tqdm.write(f"left out {name}: {reason}")
        digests = [hashlib.sha1(picture).digest() for picture in pictures.numpy()]
        fresh = [n for n, d in enumerate(digests) if d not in known and d not in digests[:n]]
        known.update(digests)
        report["exact duplicate"] += len(captions) - len(fresh)
        if not fresh:
            continue
        captions, images = [captions[n] for n in fresh], pictures[fresh].permute(0, 3, 1, 2)
        images, tokens = images / 127.5 - 1, encode_text(captions)
        latents = codec.encode(images).cpu().double().numpy()
        sums += latents.mean((2, 3)).sum(0), np.square(latents).mean((2, 3)).sum(0)
        latents = ((latents + 1) * 127.5).round() if codec.dtype == "uint8" else latents
        append_rows(unfinished / "latents.npy", latents.astype(codec.dtype))
        append_rows(unfinished / "text.npy", torch.cat(tokens).half().cpu().numpy())
        if teacher:
            append_rows(unfinished / "teacher.npy", teacher.on_grid(images).half().cpu().numpy())
        offsets.extend(offsets[-1] + np.cumsum([len(each) for each in tokens]))
        texts.extend(captions)
    report["caption cut"], encode_text.cut = encode_text.cut, 0
    np.save(unfinished / "offsets.npy", np.array(offsets))
    (unfinished / "captions.txt").write_text("".join(f"{text}\n" for text in texts), "utf-8")
    done = {"count": len(texts), "seen": len(items), "sums": sums.tolist(), "report": report}
    write_json(unfinished / "shard.json", {"settings": settings, **done})
    unfinished.rename(folder)

if __name__ == "__main__":
    run_script(prepare, __doc__, source="?")
