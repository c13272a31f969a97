"""Make of an official PRX a folder like a run's, to draw with and to start from.

    python extras/official.py Photoroom/prx-512-t2i-sft --out out/prx
    python sample.py --run out/prx "A front-facing portrait of a lion in the golden savanna"
    python prepare.py photos/ --size 512 --codec taef1 --text Photoroom/prx-512-t2i-sft
    python train.py --init out/prx --data data/photos --lr 2e-5 --muon-lr 2e-5 --micro-batch 4

For the models with FLUX.1 latents: prx-256-t2i, prx-512-t2i, their -sft, prx-512-t2i-sft-distilled
and prx-1024-t2i-beta. Latents are decoded by taef1, the tiny autoencoder for FLUX.1.
"""

import dataclasses
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import prepare
from model import UserError, read_json
from prepare import flag


@dataclasses.dataclass
class Settings:
    """All settings of official.py."""

    source: str = flag("Photoroom/prx-512-t2i-sft", "a pipeline: on the Hub or a folder", nargs="?")
    out: str = flag("out/prx", "folder to make")


def read_info(source, folder):
    """What sample.py has to know, from the small files of a pipeline. Raises UserError if it needs
    networks that are not in model.py."""
    index = read_json(folder / "model_index.json")
    text_encoder, vae = (str(index.get(name, [0, 0])[1]) for name in ("text_encoder", "vae"))
    channels = read_json(folder / "transformer" / "config.json").get("in_channels")
    is_flux = vae == "AutoencoderKL" and channels == 16
    if not text_encoder.startswith("T5Gemma") or not (is_flux or vae == "AutoencoderTiny"):
        known = "T5Gemma with AutoencoderKL of 16 channels or AutoencoderTiny"
        raise UserError(f"{source} has {text_encoder} and {vae}; only {known} can be drawn with")
    codec, scaling = "taef1", {}  # which has the latents of FLUX.1, scaled already
    if vae == "AutoencoderTiny":
        codec = str(model.fetch(source, "vae/*") / "vae")
        scaling = read_json(f"{codec}/config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    side = (index.get("default_sample_size") or 512) // 8
    info = {
        "source": source,
        "text": source,
        "codec": codec,
        "latent_shape": [channels, side, side],
    }
    info["mean"] = [scaling.get("shift_factor") or 0.0] * channels
    info["std"] = [1 / (scaling.get("scaling_factor") or 1.0)] * channels
    # Padding is not seen, so that prompts need not be filled up.
    info |= {"predict": "v", "shift": scheduler.get("shift", 1.0), "mask": True, "tokens": 1}
    how = {"steps": 8, "guidance": 1.0} if "distilled" in source else {"steps": 28, "guidance": 5.0}
    return info | how | {"examples": ["A front-facing portrait of a lion in the savanna at sunset"]}


def main(settings):
    """Make the folder. Raises UserError before anything large is downloaded."""
    folder, out = model.fetch(settings.source, "*.json"), Path(settings.out)
    ours = out / model.WEIGHTS  # a link, if this script made it
    if (out / "ckpt.pt").exists() or (ours.exists() and not ours.is_symlink()):
        raise UserError(f"{out} holds weights already; give another --out")
    info = read_info(settings.source, folder)
    weights = f"transformer/{model.WEIGHTS}"
    path = (model.fetch(settings.source, weights) / weights).resolve(strict=True)
    model.write_json(out / "config.json", read_json(folder / "transformer" / "config.json"))
    ours.unlink(missing_ok=True)
    os.symlink(path, ours)  # 4.7 GB, not copied
    model.write_json(out / "nanoprx.json", info)
    print(f"{out} is ready: python sample.py --run {out} PROMPT")


if __name__ == "__main__":
    prepare.run_script(main, Settings, __doc__)
