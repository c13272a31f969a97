"""Draw pictures with a trained model, and judge them.

python sample.py "a red circle left of a blue square"
python sample.py "a red dress" --run out/photos --n 4 --out dresses/     # single files
python sample.py --score                         # the prompt accuracy on held-out scenes
"""

import collections
import dataclasses
import itertools
import math
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import model
import prepare
from model import PRX, UserError, shift_time, velocity, whole_file
from prepare import Scene, Thing, caption, coverage, flag, random_scene


# ---------------------------------------------------------------------------------------- drawing
def generate(network, empty, text, noise, info):
    """Latents from noise (B, C, H, W), by Euler steps along the velocity.

    The velocity is v_empty + guidance (v_prompt - v_empty) (arXiv 2207.12598): of the empty caption
    (1, T, D), which dropped captions taught, and of the prompts, text (B, T, D). 1 is no guidance.
    info has `shift`, `predict` and `mask`, as the model was trained, `steps` and `guidance`.
    """
    # As in diffusers' scheduler the last time is shifted twice, so that official models draw alike.
    lowest = shift_time(torch.tensor(0.001), info["shift"]).item()
    times = shift_time(torch.linspace(1, lowest, info["steps"]), info["shift"])
    times = torch.cat((times, torch.zeros(1))).to(noise.device)
    text = torch.cat((empty.expand(len(noise), -1, -1), text))
    mask = text_mask(text, info)
    x = noise
    for t, next_t in itertools.pairwise(times):
        x_in, t_in = torch.cat((x, x)), t.expand(2 * len(x))  # without and with prompts in a batch
        v = velocity(network(x_in, t_in, text, mask).float(), x_in, t_in, info["predict"])
        v_empty, v_prompt = v.chunk(2)
        x = x + (next_t - t) * (v_empty + info["guidance"] * (v_prompt - v_empty))
    return x


def text_mask(text, info):
    """The mask (B, T) of text (B, T, D), for a model that was trained with one: rows of zeros are
    padding. Others see them, so that attention takes the flash kernel."""
    return (text != 0).any(dim=2) if info["mask"] else None


def load_run(source):
    """The network of a run, and its info: what it takes to `draw` with it. source is the folder of
    a run, its `ema/`, or a copy of that on the Hub. Raises UserError."""
    folder = model.fetch(source, "*.json", model.WEIGHTS)
    if (folder / "ema").is_dir():
        folder = folder / "ema"
    info = model.read_json(folder / "nanoprx.json")
    if not {"codec", "predict", "mask", "steps", "tokens"} <= info.keys():
        raise UserError(f"{folder}/nanoprx.json is of another version or program; train anew")
    return PRX.from_pretrained(folder), info


def encode_prompts(prompts, info, compute):
    """Embeddings of the empty caption and of prompts: a list of (L, D), on the CPU. The text
    encoder, which may be larger than the model, is in memory only meanwhile."""
    text_encoder = model.load_text_encoder(info["text"], compute)
    for prompt in prompts:
        count = len(text_encoder.tokenize(prompt))
        if count > model.MAX_TOKENS:
            print(f"only {model.MAX_TOKENS} of {count} tokens are read: {prompt[:60]}...")
    return [embedding.cpu() for embedding in text_encoder.encode(["", *prompts])]


def pictures_at_once(latent_shape):
    """How many pictures to draw at once: 64 of 32 x 32 latents, fewer of larger ones."""
    return max(1, 2**16 // (latent_shape[1] * latent_shape[2]))


@torch.no_grad()
def draw(network, info, compute, embeddings, seeds):
    """Pictures (B, H, W, 3) uint8 for what `encode_prompts` gives.

    Each begins with noise of its own seed, so that it is the same whatever else is drawn, unless a
    prompt is longer than every caption in the training was. info is what a run keeps in
    nanoprx.json: `codec` and `text` by name, `latent_shape`, `mean` and `std` of latents, how the
    model was trained (`predict`, `shift`, `mask`, `tokens` to which captions were filled up), how
    to draw (`steps`, `guidance`), and `examples`, which are prompts.
    """
    codec, device = model.load_codec(info["codec"], compute), compute.device
    network = network.to(device).eval()
    mean, std = torch.tensor([info["mean"], info["std"]], device=device)[..., None, None]
    text = model.pad(embeddings, max(info["tokens"], *map(len, embeddings))).to(device)
    empty, prompts = text[:1], text[1:]
    pictures, at_once = [], pictures_at_once(info["latent_shape"])
    for first in range(0, len(seeds), at_once):
        part = slice(first, first + at_once)
        dice = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        noise = torch.stack([torch.randn(info["latent_shape"], generator=each) for each in dice])
        with compute.autocast():
            latents = generate(network, empty, prompts[part], noise.to(device), info)
            images = codec.decode(latents * std + mean)
        if not images.isfinite().all():
            raise UserError("the model drew infinite values; train it anew with lower --lr")
        images = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        pictures.append(images.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)


def grid(pictures, prompts, columns):
    """A PIL picture of pictures (N, H, W, 3) uint8, small ones enlarged, each above its prompt."""
    scale = math.ceil(128 / pictures.shape[2])
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    size = columns * (width + 8), math.ceil(len(pictures) / columns) * (height + 68)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = number % columns * (width + 8) + 4, number // columns * (height + 68) + 4
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgray")
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.NEAREST), (x, y))
        letters = prompt.encode("latin-1", "backslashreplace").decode("latin-1")  # of this font
        text = "\n".join(textwrap.wrap(letters, width // 6)[:4])
        pen.multiline_text((x, y + height), text, "black", font, spacing=2)
    return sheet


# ---------------------------------------------------------------------------------------- judging
UNIT_AREAS = {  # of each shape with a radius of 1
    shape: coverage(Thing("", shape, "", 0.5, 0.5, 0.25), 256).mean() / 0.25**2
    for shape in prepare.SHAPES
}


def describe(picture):
    """The Scene that fits a picture (size, size, 3) uint8 best."""
    size, palette = len(picture), np.array(list(prepare.COLOURS.values()))
    nearest = np.square(picture[:, :, None] - palette).sum(-1).argmin(-1)  # (size, size)
    background = np.bincount(nearest.flatten()).argmax()  # things cover less than half
    centres, things = (np.arange(size) + 0.5) / size, []
    for place, offset in prepare.PLACES.items():
        middle = 0.5 + prepare.STEP * np.array(offset)
        distance = np.hypot(centres - middle[0], centres[:, None] - middle[1])
        inside = nearest[distance < 0.13]
        if np.mean(inside != background) < 0.3:
            continue  # there is no thing in this place
        colour = np.bincount(inside[inside != background]).argmax()
        # How far each pixel is on the way from the background to the colour, like `coverage`.
        change = palette[colour] - palette[background]
        covered = (picture - palette[background]) @ change / (change @ change)
        covered = covered.clip(0, 1) * (distance < prepare.STEP)
        x, y = (covered.sum(0) @ centres, covered.sum(1) @ centres) / covered.sum()  # its centre
        fits = []
        for shape, area in UNIT_AREAS.items():
            radius = max(0.13, math.sqrt(covered.mean() / area))
            fits.append(Thing(list(prepare.COLOURS)[colour], shape, place, x, y, radius))
        things.append(min(fits, key=lambda fit: np.abs(covered - coverage(fit, size)).sum()))
    return Scene(list(prepare.COLOURS)[background], things)


def check(picture, scene):
    """What a picture (size, size, 3) uint8 shows of a scene (as GenEval, arXiv 2310.11513): a dict
    of "all", which is strict, and of its attributes. What is None in the scene may be anything."""
    found = describe(picture)
    result = {"background": scene.background in (None, found.background)}
    for number, attribute in enumerate(("colour", "shape", "place")):
        wanted = collections.Counter(thing[number] for thing in scene.things if thing[number])
        result[attribute] = wanted <= collections.Counter(thing[number] for thing in found.things)
    result["count"] = len(found.things) == len(scene.things)
    # All that was told of a thing has to be true of one thing: for a red circle and a blue ring, a
    # blue circle and a red ring are wrong, though all colours and shapes are there.
    told = [{*thing[:3]} - {None} for thing in scene.things]
    shown = [{*thing[:3]} for thing in found.things]
    orders = [zip(told, shown, strict=False), zip(told, reversed(shown), strict=False)]
    is_bound = any(all(words <= others for words, others in order) for order in orders)
    # At most 1% of the pixels are off by 110 of RGB from a clean drawing of what was found.
    error = np.linalg.norm(picture - prepare.render(found, len(picture)).astype(float), axis=-1)
    result["all"] = all(result.values()) and is_bound and bool(np.mean(error > 110) < 0.01)
    return result


def score(network, info, compute, count):
    """Shares of `count` pictures that are right, by kind: "named", held-out scenes told in full
    (and their attributes); "open", with no background named; "free", told as people may, where
    captions that leave something open may be in the training; "composition", with pairs that were
    never trained."""
    shares = {}
    for seed, kind in enumerate(("named", "open", "free", "composition")):
        rng = np.random.default_rng(seed)
        split = "composition" if kind == "composition" else "held-out"
        scenes = [random_scene(rng, split) for _ in range(count)]
        if kind == "open":
            scenes = [scene._replace(background=None) for scene in scenes]
        if kind == "free":
            scenes = [prepare.leave_open(scene, rng) for scene in scenes]
        prompts = [caption(scene) for scene in scenes]
        embeddings = encode_prompts(prompts, info, compute)
        pictures = draw(network, info, compute, embeddings, range(count))
        results = [check(*both) for both in zip(pictures, scenes, strict=True)]
        shares[kind] = np.mean([result.pop("all") for result in results])
        if kind == "named":
            shares |= {key: np.mean([result[key] for result in results]) for key in results[0]}
    return shares


# ----------------------------------------------------------------------------------- command line
@dataclasses.dataclass
class Settings:
    """All settings of sample.py. Each field is a flag."""

    prompts: str = flag((), "what to draw; none: some captions of the run", nargs="*")
    run: str = flag("out/scenes", "a run, its ema/, or a copy of that on the Hub")
    out: str = flag("sample.png", "one picture (.png) of all, or a folder for one file each")
    n: int = flag(1, "pictures for each prompt", 1)
    steps: int = flag(None, "Euler steps; none: as the run says, 20", 1)
    guidance: float = flag(None, "guidance scale, 1 is none; none: as the run says, 2")
    seed: int = flag(0, "of the first picture of a prompt; the next has seed + 1", 0, 2**32)
    score: bool = flag(False, "report the prompt accuracy on held-out scenes instead")
    device: str = flag("auto", "the best there is", choices=("auto", "cpu", "cuda", "mps"))


def sample(settings):
    """Draw prompts with a trained model, or score it. Raises UserError where the run is none."""
    compute = model.pick_device(settings.device)
    if compute.device.type == "cpu":
        compute.dtype = torch.float32  # draws the same on each CPU, and nearly as fast
    network, info = load_run(settings.run)
    for name in ("steps", "guidance"):
        if getattr(settings, name) is not None:
            info[name] = getattr(settings, name)
    if settings.score:
        if info["source"] != "":
            raise UserError(f"{settings.run} was not trained on scenes, which --score is for")
        for name, share in score(network, info, compute, 512).items():
            print(f"{name:12}{share:7.1%}")
        return
    prompts = [text for text in settings.prompts or info["examples"] for _ in range(settings.n)]
    seeds = [settings.seed + number % settings.n for number in range(len(prompts))]
    embeddings = encode_prompts(prompts, info, compute)
    pictures = draw(network, info, compute, embeddings, seeds)
    out, columns = Path(settings.out), min(settings.n if settings.n > 1 else 6, len(prompts), 8)
    files = {out / f"{number:04d}.png": each for number, each in enumerate(pictures)}
    if out.suffix.lower() == ".png":
        files = {out: np.asarray(grid(pictures, prompts, columns))}
    for path, picture in files.items():
        with whole_file(path) as file:
            Image.fromarray(picture).save(file, "png")
    print(f"{settings.out}: {len(pictures)} drawn")


if __name__ == "__main__":
    prepare.run_script(sample, Settings, __doc__)
