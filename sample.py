"""Draw pictures with a trained model, and judge them.

python sample.py "a red monster with three eyes and a green party hat"
python sample.py "a red dress" --run out/photos --n 4 --out dresses/     # single files
python sample.py --score                         # of held-out monsters, how many are right
"""

import collections
import dataclasses
import itertools
import math
import random
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import model
import prepare
from model import PRX, UserError, shift_time, velocity, whole_file
from prepare import PARTS, caption_of, flag, leave_open, random_monster, render


# ---------------------------------------------------------------------------------------- drawing
def generate(network, empty, text, x, info):
    """Latents from noise x (B, C, H, W), by Euler steps along the velocity.

    The velocity is v_empty + guidance (v_prompt - v_empty) (arXiv 2207.12598); 1 is no guidance.
    v_empty belongs to empty (1, T, D), as dropped captions taught it, v_prompt to text (B, T, D).
    info has `shift`, `predict` and `mask`, as the model was trained, `steps` and `guidance`.
    """
    # As in diffusers' scheduler the last time is shifted twice, so that official models draw alike.
    lowest = shift_time(torch.tensor(0.001), info["shift"]).item()
    times = shift_time(torch.linspace(1, lowest, info["steps"]), info["shift"])
    times = torch.cat((times, torch.zeros(1))).to(x.device)
    text = torch.cat((empty.expand(len(x), -1, -1), text))
    mask = text_mask(text, info)
    for t, next_t in itertools.pairwise(times):
        x_in, t_in = torch.cat((x, x)), t.expand(2 * len(x))  # without and with prompts in a batch
        v = velocity(network(x_in, t_in, text, mask).float(), x_in, t_in, info["predict"])
        v_empty, v_prompt = v.chunk(2)
        x = x + (next_t - t) * (v_empty + info["guidance"] * (v_prompt - v_empty))
    return x


def text_mask(text, info):
    """The mask (B, T) of text (B, T, D), in which rows of zeros are padding, for official models.
    Ours are trained without one and see the padding, so that attention takes the flash kernel."""
    return (text != 0).any(dim=2) if info["mask"] else None


def load_run(source):
    """The network and info of a run: a folder, its ema/, or a copy on the Hub. Raises UserError."""
    folder = model.fetch(source, "*.json", model.WEIGHTS)
    if (folder / "ema").is_dir():
        folder = folder / "ema"
    info = model.read_json(folder / "nanoprx.json")
    if not {"codec", "predict", "mask", "steps", "tokens"} <= info.keys():
        raise UserError(f"{folder}/nanoprx.json is of another version or program; train anew")
    return PRX.from_pretrained(folder), info


def encode_prompts(prompts, info, compute):
    """A list of embeddings (L, D), on the CPU: of the empty caption, then of the prompts."""
    text_encoder = model.load_text_encoder(info["text"], compute)
    words = {word for prompt in prompts for word in text_encoder.tokenize(prompt)}
    unknown = words.difference(info.get("words", words))
    if unknown:  # only Words has such a list
        print(f"these words were in no caption of the training: {', '.join(sorted(unknown))}")
    return [embedding.cpu() for embedding in text_encoder.encode(["", *prompts])]


def pictures_at_once(latent_shape):
    """How many pictures to draw at once: 64 of 32 x 32 latents, fewer of larger ones."""
    return max(1, 2**16 // (latent_shape[1] * latent_shape[2]))


@torch.no_grad()
def draw(network, info, compute, embeddings, seeds):
    """Pictures (B, H, W, 3) uint8 for what `encode_prompts` gives.

    Each begins with noise of its own seed, so that it is the same whatever else is drawn, unless a
    prompt is longer than every caption in the training was. info is a run's nanoprx.json: `codec`,
    `text`, `latent_shape`, `mean`, `std`, how the model was trained (`predict`, `shift`, `mask`,
    `tokens` of the longest caption), how to draw (`steps`, `guidance`), `examples`, and `words`.
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
        images = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
        pictures.append(images.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)


def grid(pictures, prompts, columns):
    """A PIL picture of pictures (N, H, W, 3) uint8, small ones enlarged, each above its prompt."""
    scale = math.ceil(128 / pictures.shape[2])
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    size = columns * (width + 8), math.ceil(len(pictures) / columns) * (height + 82)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = number % columns * (width + 8) + 4, number // columns * (height + 82) + 4
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline="lightgray")
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.NEAREST), (x, y))
        letters = prompt.encode("ascii", "replace").decode()  # the font has no others
        text = "\n".join(textwrap.wrap(letters, width // 6)[:5])
        pen.multiline_text((x, y + height), text, "black", font, spacing=2)
    return sheet


# ---------------------------------------------------------------------------------------- judging
def error(picture, monster):
    """The mean squared distance in RGB, cut off at 110^2, between a picture and a monster."""
    off = picture - render(monster, len(picture)).astype(np.float32)
    return np.einsum("hwc,hwc->hw", off, off).clip(max=110**2).mean()


def variants(monster, part):
    """The monster with each name of one part in turn, but no spots or stripes of its own colour."""
    monsters = [monster | {part: name} for name in PARTS[part]]
    return [each for each in monsters if each["colour"] not in each["pattern"]]


def fit(picture, told):
    """The monster with the parts told that fits a picture best, as found part by part."""
    monster = {part: name or next(iter(PARTS[part])) for part, name in told.items()}
    for part in 3 * list(PARTS):  # again, as the first choices saw the other parts wrong
        if told[part] is None:
            monster = min(variants(monster, part), key=lambda each: error(picture, each))
    return monster


def check(picture, told):
    """Which of the parts told are right in a picture (size, size, 3) uint8, a dict. One is right if
    no other name fits better, once `fit` chose the open ones; "all", if the fit is close, too."""
    monster, result = fit(picture, told), {}
    found = error(picture, monster)
    for part in told:
        if told[part] is not None:
            result[part] = found <= min(error(picture, each) for each in variants(monster, part))
    result["all"] = all(result.values()) and found < 1500  # a blank picture has over 1,900
    return result


def uneven(monsters, others, part):
    """The total variation between two lists of monsters in a part: 0 is equal, 1 disjoint."""
    a, b = (collections.Counter(each[part] for each in group) for group in (monsters, others))
    return sum(abs(a[x] / len(monsters) - b[x] / len(others)) for x in PARTS[part]) / 2


def score(network, info, compute, count):
    """Shares of `count` pictures that are right: "told", held-out monsters told in full, and each
    of their parts; "few", one to three told; "new", colour and body never trained together. Then
    how "uneven" is what "a red monster" and the like leave open, and as many true ones."""
    rng, shares = random.Random(0), {}
    full, new = ([random_monster(rng, x) for _ in range(count)] for x in ("held-out", "new"))
    few = [leave_open(monster, 3, rng) for monster in full]

    def draw_all(monsters):
        embeddings = encode_prompts([caption_of(each, rng) for each in monsters], info, compute)
        return draw(network, info, compute, embeddings, range(count))

    for kind, told in (("told", full), ("few", few), ("new", new)):
        results = [check(*both) for both in zip(draw_all(told), told, strict=True)]
        shares[kind] = np.mean([result["all"] for result in results])
        if kind == "told":
            shares |= {part: np.mean([result[part] for result in results]) for part in PARTS}
    red = [dict.fromkeys(PARTS) | {"colour": monster["colour"]} for monster in full]
    drawn = [fit(*both) for both in zip(draw_all(red), red, strict=True)]
    true = [random_monster(rng) for _ in range(20 * count)]
    parts = ("body", "eyes", "mouth", "head")
    shares["uneven"] = np.mean([uneven(drawn, true, part) for part in parts])
    shares["by chance"] = np.mean([uneven(true[:count], true, part) for part in parts])
    return shares


# ----------------------------------------------------------------------------------- command line
@dataclasses.dataclass
class Settings:
    """All settings of sample.py. Each field is a flag."""

    prompts: str = flag((), "what to draw; none: some captions of the run", nargs="*")
    run: str = flag("out/monsters", "a run, its ema/, or a copy of that on the Hub")
    out: str = flag("sample.png", "one picture (.png) of all, or a folder for one file each")
    n: int = flag(1, "pictures for each prompt", 1)
    steps: int = flag(None, "Euler steps; not given: the run's, 20 in ours", 1)
    guidance: float = flag(None, "guidance scale, 1: off; not given: the run's, 2 in ours")
    seed: int = flag(0, "of the first picture; the next has seed + 1, and so on", 0, 2**32 - 1)
    score: bool = flag(False, "judge pictures of held-out monsters instead")
    device: str = flag("auto", "the best there is", choices=("auto", "cpu", "cuda", "mps"))


def sample(settings):
    """Draw prompts with a trained model, or score it. Raises UserError if there is no such run."""
    compute = model.pick_device(settings.device)
    network, info = load_run(settings.run)
    for name in ("steps", "guidance"):
        if getattr(settings, name) is not None:
            info[name] = getattr(settings, name)
    if settings.score:
        if info["source"] != "":
            raise UserError(f"{settings.run} was not trained on monsters, which --score is for")
        for name, share in score(network, info, compute, 512).items():
            print(f"{name:12}{share:7.1%}")
        return
    prompts = [text for text in settings.prompts or info["examples"] for _ in range(settings.n)]
    seeds = range(settings.seed, settings.seed + len(prompts))
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
