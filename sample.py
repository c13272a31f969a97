"""Draw pictures with a trained model.

    python sample.py "a red circle left of a blue square"
    python sample.py "a boat on a lake" --run out/photos --n 4 --out boats/     # single files
    python sample.py --score                             # the prompt accuracy on held-out scenes
"""
import textwrap
from pathlib import Path
from typing import Literal
import numpy as np, torch
from PIL import Image, ImageDraw, ImageFont
from model import PRX, Refused, fetch, pick_device, read_json, shift_time, velocity, whole_file
from prepare import (caption, check, count, load_codec, load_text_encoder, natural, pad,
                     random_scene, run_script, weight)

def generate(model, text, null, noise, info, steps=20, guidance=2.0, mode="null"):
    """Latents for text (B, L, D), by Euler steps along the velocity from noise (B, C, H, W), guided
    away from the answer to null (L, D), the empty caption (arXiv 2207.12598), in the same pass; or,
    mode "self", from the model's own answer to text with tokens routed past blocks (PRX)."""
    x, both = noise, torch.cat((text, null.expand(len(text), -1, -1)))
    times = shift_time(torch.linspace(1, 0, steps + 1, device=x.device), info["shift"])
    dice = torch.Generator().manual_seed(0)
    for t, next_t in zip(times, times[1:]):
        t_batch = t.expand(len(x))
        if mode == "self":                         # the same tokens stay for all of the batch
            ids = torch.randperm(x[0, 0].numel() // model.config.patch_size ** 2, generator=dice)
            stay = ids[:round(len(ids) * (1 - (info.get("route") or 0.5))) or 1].expand(len(x), -1)
            outputs = model(x, t_batch, text), model(x, t_batch, text, None, stay.to(x.device))
        else:
            outputs = model(torch.cat((x, x)), t_batch.repeat(2), both).chunk(2)
        v, v_weak = (velocity(each.float(), x, t_batch, info["predict"]) for each in outputs)
        x = x + (next_t - t) * (v_weak + guidance * (v - v_weak))
    return x

@torch.no_grad()
def draw(model, codec, encode_text, info, prompts, seeds, *how):
    """Pictures (B, H, W, 3) uint8 for prompts. Each begins with the noise of its own seed, so that
    it is the same whatever else is drawn. info is a run's nanoprx.json; how goes to `generate`."""
    device, pictures = next(model.parameters()).device, []
    mean, std = (torch.tensor(info[key], device=device).view(-1, 1, 1) for key in ("mean", "std"))
    for some in range(0, len(prompts), 64):
        text = pad(encode_text(["", *prompts[some:some + 64]]), info["tokens"]).to(device)
        noise = [torch.randn(info["latent_shape"], generator=torch.Generator().manual_seed(seed))
                 for seed in seeds[some:some + 64]]
        x = generate(model, text[1:], text[0], torch.stack(noise).to(device), info, *how)
        images = codec.decode(x * std + mean).float().clamp(-1, 1)
        pictures.append(((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)

def score(model, codec, encode_text, info, *how):
    """The share of 512 fixed held-out scenes drawn as prompted, and that of the eighth of them
    ("composition") whose colour and shape were never trained together."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng, "held-out" if n % 8 else "composition") for n in range(512)]
    prompts = [caption(scene) for scene in scenes]
    pictures = draw(model, codec, encode_text, info, prompts, range(512), *how)
    passed = [check(picture, scene) for picture, scene in zip(pictures, scenes)]
    return {"all": np.mean(passed), "composition": np.mean(passed[::8])}
prompt_accuracy = score           # `sample` has a flag of that name

def grid(pictures, prompts, columns):
    """A PIL picture of pictures (N, H, W, 3) uint8, small ones enlarged, each above its prompt."""
    height, width = pictures.shape[1:3]
    scale = -(-128 // width)
    lines = ["\n".join(textwrap.wrap(prompt, width * scale // 6)[:4]) for prompt in prompts]
    step_x, step_y = width * scale + 8, height * scale + 68           # with room for four lines
    sheet = Image.new("RGB", (columns * step_x, -(-len(pictures) // columns) * step_y), "white")
    for number, (picture, line) in enumerate(zip(pictures, lines)):
        x, y = number % columns * step_x + 4, number // columns * step_y + 4
        picture = Image.fromarray(picture).resize((width * scale, height * scale), Image.NEAREST)
        sheet.paste(picture, (x, y))
        ImageDraw.Draw(sheet).multiline_text((x, y + height * scale), line, "black",
                                             ImageFont.load_default(11), spacing=2)
    return sheet

def sample(
    prompts: str = (),            # what to draw, cut like training captions; none: some of those
    run: str = "out/scenes",      # folder of a run, or a Hub repository
    out: str = "sample.png",      # a .png with all of them, or a folder for single files
    n: count = 1,                 # pictures for each prompt
    steps: count = 20,            # Euler steps; with more, velocity's clamp leaves a little noise
    guidance: weight = 2.0,       # guidance scale; 1 is none
    guidance_mode: Literal["null", "self"] = "null",   # away from the empty caption or routed self
    seed: natural = 0,            # of the first picture of each prompt, the next has seed + 1
    score: bool = False,          # report the prompt accuracy on 512 held-out scenes instead
):
    """Draw the prompts with a trained model, or score it. Raises Refused where the run is none."""
    folder = fetch(run, "*.json", "*.safetensors")
    info = read_json(folder / "nanoprx.json")
    if score and info.get("source") != "scenes":
        raise Refused(f"{run} was not trained on scenes; the prompt accuracy is for those")
    device, autocast = pick_device()
    painter = (PRX.from_pretrained(folder).to(device), load_codec(info["codec"], device),
               load_text_encoder(info["text"], device, info["tokens"]), info)
    with autocast:
        if score:
            shares = prompt_accuracy(*painter, steps, guidance, guidance_mode)
            return print(*(f"{name:12}{part:7.1%}" for name, part in shares.items()), sep="\n")
        prompts = [each for each in prompts or info.get("examples", [""]) for _ in range(n)]
        seeds = [seed + number % n for number in range(len(prompts))]
        pictures = draw(*painter, prompts, seeds, steps, guidance, guidance_mode)
    sheet, columns = out.lower().endswith(".png"), n if 1 < n < 9 else min(len(prompts), 6)
    files = [grid(pictures, prompts, columns)] if sheet else map(Image.fromarray, pictures)
    for number, picture in enumerate(files):
        with whole_file(out if sheet else f"{out}/{number:04d}.png") as file:
            picture.save(file, "png")
    print(f"{out}: {len(pictures)} drawn")

if __name__ == "__main__":
    run_script(sample, __doc__, prompts="*")
