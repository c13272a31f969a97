"""Draw pictures with a trained model, and judge them.

python sample.py "a red circle left of a blue square"
python sample.py "a boat on a lake" --run out/photos --n 4 --out boats/     # single files
python sample.py --score                             # the prompt accuracy on held-out scenes
"""

import collections
import dataclasses
import itertools
import math
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import prepare
from model import (
    PRX,
    UserError,
    fetch,
    load_codec,
    load_text_encoder,
    pad,
    pick_device,
    read_json,
    shift_time,
    velocity,
    whole_file,
)
from prepare import Scene, Thing, caption, coverage, random_scene


# ---------------------------------------------------------------------------------------- drawing
def generate(model, text, mask, noise, info, steps, guidance_scale):
    """Latents from noise (B, C, H, W), by Euler steps along the velocity.

    text (1 + B, T, D) and mask (1 + B, T) are of the empty caption and of B prompts. The velocity
    is guided away from that of the empty caption (arXiv 2207.12598); a scale of 1 is no guidance.
    info has `shift` and `predict`, as the model was trained.
    """
    # As in diffusers' FlowMatchEulerDiscreteScheduler the end is shifted, then the whole table.
    lowest = shift_time(torch.tensor(0.001), info["shift"]).item()
    times = shift_time(torch.linspace(1, lowest, steps), info["shift"])
    times = torch.cat((times, torch.zeros(1))).to(noise.device)
    rows = torch.arange(1, 1 + len(noise))
    if guidance_scale != 1:
        rows = torch.cat((torch.zeros_like(rows), rows))  # in the same pass
    text, mask = text[rows], None if mask.all() else mask[rows]
    x = noise
    for t, next_t in itertools.pairwise(times):
        x_in, t_in = x.repeat(len(rows) // len(x), 1, 1, 1), t.expand(len(rows))
        v = velocity(model(x_in, t_in, text, mask).float(), x_in, t_in, info["predict"])
        if guidance_scale != 1:
            v_empty, v = v.chunk(2)
            v = v_empty + guidance_scale * (v - v_empty)
        x = x + (next_t - t) * v
    return x


class Pipeline:
    """A model with all it takes to draw. info is what a run keeps in nanoprx.json."""

    def __init__(self, model, info, compute):
        self.model, self.info, self.compute = model, info, compute
        self.codec = load_codec(info["codec"], compute)
        self.text_encoder = load_text_encoder(info["text"], compute, 512)

    def encode(self, captions):
        """Text (B, T, D) and mask (B, T) on the device. Training fills all captions up with zeros
        to one length. Where one is longer here, the mask hides what others get beyond it."""
        embeddings = self.text_encoder.encode(captions)
        lengths = torch.tensor([max(len(each), self.info["tokens"]) for each in embeddings])
        text = pad(embeddings, max(lengths))
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        return text.to(self.compute.device), mask.to(self.compute.device)

    @torch.no_grad()
    def draw(self, prompts, seeds, steps=20, guidance_scale=2.0):
        """Pictures (B, H, W, 3) uint8. Each begins with noise of its own seed, and so is the same
        whatever else is drawn."""
        device, pictures = self.compute.device, []
        statistics = torch.tensor([self.info["mean"], self.info["std"]], device=device)
        mean, std = statistics[:, :, None, None]
        for first in range(0, len(prompts), 64):
            generators = [torch.Generator().manual_seed(s) for s in seeds[first : first + 64]]
            noise = [torch.randn(self.info["latent_shape"], generator=each) for each in generators]
            text, mask = self.encode(["", *prompts[first : first + 64]])
            how = (torch.stack(noise).to(device), self.info, steps, guidance_scale)
            with self.compute.autocast():
                images = self.codec.decode(generate(self.model, text, mask, *how) * std + mean)
            images = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
            pictures.append(images.permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(pictures)


def find_model(source):
    """The folder with the weights of a run, a folder or a Hub repository. Raises UserError."""
    folder = fetch(source, "*.json", "*.safetensors")
    return folder / "ema" if (folder / "ema").is_dir() else folder


def grid(pictures, prompts, columns):
    """A PIL picture of pictures (N, H, W, 3) uint8, small ones enlarged, each above its prompt."""
    scale = math.ceil(128 / pictures.shape[2])
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    size = columns * (width + 8), math.ceil(len(pictures) / columns) * (height + 68)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        x, y = number % columns * (width + 8) + 4, number // columns * (height + 68) + 4
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.NEAREST), (x, y))
        text = "\n".join(textwrap.wrap(prompt, width // 6)[:4])
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
    # Each thing has to have all that was told of it: a blue circle and a red ring do not do.
    told = [{*thing[:3]} - {None} for thing in scene.things]
    orders = itertools.permutations({*thing[:3]} for thing in found.things)
    bound = any(all(a <= b for a, b in zip(told, order, strict=False)) for order in orders)
    # Nothing else may be in the picture: at most 1% of the pixels are off by 110 of RGB.
    error = np.linalg.norm(picture - prepare.render(found, len(picture)).astype(float), axis=-1)
    result["all"] = all(result.values()) and bound and bool(np.mean(error > 110) < 0.01)
    return result


def score(pipeline, count, steps=20, guidance_scale=2.0):
    """Shares of `count` pictures that are right: of held-out scenes told in full ("named", and its
    attributes), with the background left open, told as people may, and of pairs never trained."""
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
        pictures = pipeline.draw(prompts, range(count), steps, guidance_scale)
        results = [check(*both) for both in zip(pictures, scenes, strict=True)]
        shares[kind] = np.mean([result.pop("all") for result in results])
        if kind == "named":
            shares |= {key: np.mean([result[key] for result in results]) for key in results[0]}
    return shares


# ----------------------------------------------------------------------------------- command line
@dataclasses.dataclass
class Settings:
    """All settings of sample.py. Each field is a flag."""

    prompts: Annotated[list[str], "what to draw; none: some captions of the run"] = ()
    run: Annotated[str, "folder of a run, or a Hub repository"] = "out/scenes"
    out: Annotated[str, "one picture (.png, .jpg) of all, or a folder for files"] = "sample.png"
    n: Annotated[int, "pictures for each prompt"] = 1
    steps: Annotated[int, "Euler steps"] = 20
    guidance: Annotated[float, "guidance scale; 1 is none"] = 2.0
    seed: Annotated[int, "of the first picture of each prompt; the next has seed + 1"] = 0
    score: Annotated[bool, "report the prompt accuracy on held-out scenes instead"] = False
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: the best there is"] = "auto"

    def __post_init__(self):
        prepare.check_range(self, 1, math.inf, "n", "steps")


def sample(settings):
    """Draw prompts with a trained model, or score it. Raises UserError where the run is none."""
    compute, folder = pick_device(settings.device), find_model(settings.run)
    info, how = read_json(folder / "nanoprx.json"), (settings.steps, settings.guidance)
    model = PRX.from_pretrained(folder).to(compute.device).eval()
    pipeline = Pipeline(model, info, compute)
    if settings.score:
        if info["source"] != "scenes":
            raise UserError(f"{settings.run} was not trained on scenes, which --score is for")
        for name, share in score(pipeline, 512, *how).items():
            print(f"{name:12}{share:7.1%}")
        return
    words = {word for text in settings.prompts for word in pipeline.text_encoder.tokenize(text)}
    strange = sorted(words - set(info.get("vocabulary", words)))
    if strange:
        print(f"never seen in training: {', '.join(strange)}")
    prompts = [text for text in settings.prompts or info["examples"] for _ in range(settings.n)]
    seeds = [settings.seed + number % settings.n for number in range(len(prompts))]
    pictures = pipeline.draw(prompts, seeds, *how)
    out = Path(settings.out)
    if out.suffix.lower() in (".png", ".jpg", ".jpeg"):
        columns = settings.n if 1 < settings.n < 9 else min(len(prompts), 6)
        files = {out: grid(pictures, prompts, columns)}
    else:
        paths = [out / f"{number:04d}.png" for number in range(len(pictures))]
        files = dict(zip(paths, map(Image.fromarray, pictures), strict=True))
    for path, picture in files.items():
        with whole_file(path) as file:
            picture.save(file, "png" if path.suffix.lower() == ".png" else "jpeg")
    print(f"{settings.out}: {len(pictures)} drawn")


if __name__ == "__main__":
    prepare.run_script(sample, Settings, __doc__, positional="prompts")
