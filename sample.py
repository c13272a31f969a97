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

import model
import prepare
from model import PRX, UserError, fetch, read_config, read_json, shift_time, velocity, whole_file
from prepare import Scene, Thing, caption, coverage, random_scene


# ---------------------------------------------------------------------------------------- drawing
def generate(network, text, mask, noise, info, steps, guidance_scale):
    """Latents from noise (B, C, H, W), by Euler steps along the velocity.

    text (1 + B, T, D) and mask (1 + B, T) are of the empty caption and of B prompts. The velocity
    is guided away from that of the empty caption (arXiv 2207.12598); a scale of 1 is no guidance.
    info has `shift` and `predict`, as the model was trained.
    """
    # diffusers' FlowMatchEulerDiscreteScheduler shifts the last time twice. So do we, so that
    # official models draw the same pictures.
    lowest = shift_time(torch.tensor(0.001), info["shift"]).item()
    times = shift_time(torch.linspace(1, lowest, steps), info["shift"])
    times = torch.cat((times, torch.zeros(1))).to(noise.device)
    rows = torch.arange(1, 1 + len(noise))
    if guidance_scale > 1:
        rows = torch.cat((torch.zeros_like(rows), rows))  # in the same pass
    text = text[rows]
    mask = None if mask.all() else mask[rows]  # without one, attention takes the fast kernel
    x = noise
    for t, next_t in itertools.pairwise(times):
        x_in, t_in = x.repeat(len(rows) // len(x), 1, 1, 1), t.expand(len(rows))
        v = velocity(network(x_in, t_in, text, mask).float(), x_in, t_in, info["predict"])
        if guidance_scale > 1:
            v_empty, v = v.chunk(2)
            v = v_empty + guidance_scale * (v - v_empty)
        x = x + (next_t - t) * v
    return x


def read_info(source):
    """The folder with the config of a model, and its info: what it takes to draw with it. source is
    a run, its uploaded ema/, or a pipeline of diffusers with a PRX, of which only small files are
    downloaded here. Raises UserError."""
    folder = fetch(source, "*.json")
    if (folder / "model_index.json").exists():
        return folder / "transformer", read_pipeline(source, folder)
    if (folder / "ema").is_dir():
        folder = folder / "ema"
    return folder, read_json(folder / "nanoprx.json")


def load_network(source, folder):
    """The PRX in the folder that `read_info` found, downloaded if need be. Raises UserError."""
    part = "transformer/" if folder.name == "transformer" else ""
    fetch(source, *(part + name for name in model.PRX_FILES))
    return PRX.from_pretrained(folder)


def read_pipeline(source, folder):
    """The info of an official PRX, from the small files in its folder. Raises UserError if it needs
    networks that are not in model.py, before anything large is downloaded."""
    index = read_json(folder / "model_index.json")
    text_encoder, vae = (str(index.get(name, [0, 0])[1]) for name in ("text_encoder", "vae"))
    is_known = text_encoder.startswith("T5Gemma") and vae in ("AutoencoderKL", "AutoencoderTiny")
    channels = read_config(folder / "transformer").in_channels if is_known else 0
    if not is_known or (vae == "AutoencoderKL" and channels != 16):
        raise UserError(
            f"{source} has the text encoder {text_encoder} and the codec {vae}; only T5Gemma with "
            "FLUX.1 latents (AutoencoderKL of 16 channels) or AutoencoderTiny is known here"
        )
    codec, scaling = "taef1", {}  # has the latents of FLUX.1, scaled already
    if vae == "AutoencoderTiny":
        codec = str(fetch(source, "vae/*") / "vae")
        scaling = read_json(f"{codec}/config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    side = (index.get("default_sample_size") or 512) // 8
    is_distilled = "distilled" in str(source)
    return {
        "source": str(source),
        "codec": codec,
        "text": str(source),
        "predict": "v",
        "shift": scheduler.get("shift", 1.0),
        "mask": True,
        "latent_shape": [channels, side, side],
        "mean": [scaling.get("shift_factor") or 0.0] * channels,
        "std": [1 / (scaling.get("scaling_factor") or 1.0)] * channels,
        "steps": 8 if is_distilled else 28,
        "guidance": 1.0 if is_distilled else 5.0,
        "examples": ["A front-facing portrait of a lion in the golden savanna at sunset"],
    }


def encode_prompts(prompts, info, compute):
    """Embeddings of the empty caption and of prompts: a list of (L, D), on the CPU. The text
    encoder, which may be larger than the model, is in memory only meanwhile."""
    text_encoder = model.load_text_encoder(info["text"], compute)
    for prompt in prompts:
        count = len(text_encoder.tokenize(prompt))
        if count > model.MAX_TOKENS:
            print(f"only {model.MAX_TOKENS} of {count} tokens are read: {prompt[:60]}...")
    captions, embeddings = ["", *prompts], []
    for first in range(0, len(captions), 16):
        embeddings += text_encoder.encode(captions[first : first + 16])
    return [embedding.cpu() for embedding in embeddings]


def pictures_at_once(latent_shape):
    """How many pictures to draw at once: 64 of 32 x 32 latents, fewer of larger ones."""
    return max(1, 2**16 // (latent_shape[1] * latent_shape[2]))


class Pipeline:
    """A model with its codec, and its info, which a run keeps in nanoprx.json: `codec` and `text`
    by name, `latent_shape`, `mean` and `std` of latents by channel, how the model was trained
    (`predict`, `shift`, `mask`, `tokens` to which captions were filled up), and defaults (`steps`,
    `guidance`, `examples`, which are prompts)."""

    def __init__(self, network, info, compute):
        self.network, self.info, self.compute = network, info, compute
        self.codec = model.load_codec(info["codec"], compute)

    def pad(self, embeddings):
        """A list of (L, D) as text (B, T, D), filled up with zeros, and mask (B, T), on the device.
        A model that was trained with a mask sees no zeros, another those up to the length of its
        captions in training, which it has learnt to ignore."""
        least = 0 if self.info.get("mask") else self.info["tokens"]
        lengths = torch.tensor([max(len(each), least) for each in embeddings])
        text = model.pad(embeddings, max(lengths))
        mask = torch.arange(text.shape[1]) < lengths[:, None]
        return text.to(self.compute.device), mask.to(self.compute.device)

    @torch.no_grad()
    def draw(self, embeddings, seeds, steps=0, guidance_scale=0.0, height=0, width=0):
        """Pictures (B, H, W, 3) uint8 for what `encode_prompts` gives. Each begins with noise of
        its own seed, and so is the same whatever else is drawn. 0 is the model's own default."""
        steps = steps or self.info.get("steps", 20)
        guidance_scale = guidance_scale or self.info.get("guidance", 2.0)
        channels, rows, columns = self.info["latent_shape"]
        factor = self.codec.factor
        shape = (channels, height // factor or rows, width // factor or columns)
        device, pictures = self.compute.device, []
        statistics = torch.tensor([self.info["mean"], self.info["std"]], device=device)
        mean, std = statistics[:, :, None, None]
        empty, *embeddings = embeddings
        at_once = pictures_at_once(shape)
        for first in range(0, len(embeddings), at_once):
            part = slice(first, first + at_once)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
            text, mask = self.pad([empty, *embeddings[part]])
            with self.compute.autocast():
                latents = generate(
                    self.network, text, mask, noise.to(device), self.info, steps, guidance_scale
                )
                images = self.codec.decode(latents * std + mean)
            if not images.isfinite().all():
                raise UserError("the model drew infinite values; try --dtype fp32")
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
    orders = itertools.permutations({*thing[:3]} for thing in found.things)
    bound = any(all(a <= b for a, b in zip(told, order, strict=False)) for order in orders)
    # Nothing else may be in the picture: at most 1% of its pixels are off by 110 of RGB from a
    # clean drawing of what was found.
    error = np.linalg.norm(picture - prepare.render(found, len(picture)).astype(float), axis=-1)
    result["all"] = all(result.values()) and bound and bool(np.mean(error > 110) < 0.01)
    return result


def score(pipeline, count, steps=0, guidance_scale=0.0):
    """Shares of `count` pictures that are right, by kind: "named", held-out scenes told in full
    (and their attributes); "open", with no background named; "free", told as people may, where
    captions that leave a place open may be in the training; "composition", with pairs that were
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
        embeddings = encode_prompts(prompts, pipeline.info, pipeline.compute)
        pictures = pipeline.draw(embeddings, range(count), steps, guidance_scale)
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
    run: Annotated[str, "a run, or Photoroom/prx-512-t2i and the like on the Hub"] = "out/scenes"
    out: Annotated[str, "one picture (.png, .jpg) of all, or a folder for files"] = "sample.png"
    n: Annotated[int, "pictures for each prompt"] = 1
    steps: Annotated[int, "Euler steps; 0: 20, an official PRX 28, a distilled one 8"] = 0
    guidance: Annotated[float, "guidance scale, 1 is none; 0: 2, an official PRX 5"] = 0.0
    height: Annotated[int, "of the pictures in pixels; 0: as in training"] = 0
    width: Annotated[int, "of the pictures in pixels; 0: as in training"] = 0
    seed: Annotated[int, "of the first picture of each prompt; the next has seed + 1"] = 0
    score: Annotated[bool, "report the prompt accuracy on held-out scenes instead"] = False
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: the best there is"] = "auto"
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], "of matrix products"] = "auto"

    def __post_init__(self):
        if self.n == 0:
            raise UserError("--n 0 draws nothing; it has to be 1 or more")


def sample(settings):
    """Draw prompts with a trained model, or score it. Raises UserError where the run is none."""
    compute = model.pick_device(settings.device, settings.dtype)
    if compute.device.type == "cpu" and settings.dtype == "auto":
        compute = model.pick_device("cpu", "fp32")  # draws the same on each CPU, and nearly as fast
    folder, info = read_info(settings.run)
    how = settings.steps, settings.guidance
    side = read_config(folder).patch_size * (1 if info["codec"] == "pixels" else 8)
    if settings.height % side or settings.width % side:
        raise UserError(f"--height and --width have to be multiples of {side} for {settings.run}")
    if settings.score and info["source"] != "scenes":
        raise UserError(f"{settings.run} was not trained on scenes, which --score is for")
    if settings.score:
        network = load_network(settings.run, folder).to(compute.device).eval()
        for name, share in score(Pipeline(network, info, compute), 512, *how).items():
            print(f"{name:12}{share:7.1%}")
        return
    words = {word for text in settings.prompts for word in model.Words().tokenize(text)}
    strange = sorted(words - set(info.get("vocabulary", words)))
    if strange:
        print(f"never seen in training: {', '.join(strange)}")
    prompts = [text for text in settings.prompts or info["examples"] for _ in range(settings.n)]
    seeds = [settings.seed + number % settings.n for number in range(len(prompts))]
    embeddings = encode_prompts(prompts, info, compute)
    network = load_network(settings.run, folder).to(compute.device).eval()
    pipeline = Pipeline(network, info, compute)
    pictures = pipeline.draw(embeddings, seeds, *how, settings.height, settings.width)
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
