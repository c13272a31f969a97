"""Add a teacher's features to a cache, for REPA (arXiv 2410.06940): then train.py --repa 0.5.

    python extras/teacher.py data/photos facebook/dinov2-small

The teacher is any DINOv2, DINOv2 with registers or DINOv3 of transformers. It sees the pictures as
the cache has them, decoded. Stopped, the same command goes on. Runs without REPA on this cache go
on, too.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import prepare
from model import UserError
from prepare import flag


@dataclasses.dataclass
class Settings:
    """All settings of teacher.py."""

    data: str = flag("data/monsters", "a cache that prepare.py wrote", nargs="?")
    teacher: str = flag("facebook/dinov2-small", "a folder or Hub repository", nargs="?")


def compute_features(network, images, side):
    """Features (B, D, side, side) of the patches of square images (B, 3, H, W) in [-1, 1], resized
    so that there are at least 16 x 16 patches, over which the features are averaged. Tokens that
    are no patches, of the class and registers, come first and are taken off."""
    count = side * math.ceil(16 / side)  # of patches in a row
    size = count * network.config.patch_size
    images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's
    std = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
    tokens = network((images / 2 + 0.5 - mean) / std).last_hidden_state
    patches = tokens[:, -(count**2) :].mT.unflatten(2, (count, count))
    return F.adaptive_avg_pool2d(patches.float(), side)


@torch.no_grad()
def main(settings):
    """Write teacher.bin, and its name and shape into meta.json. Raises UserError."""
    folder = Path(settings.data)
    meta = model.read_json(folder / "meta.json")
    if "teacher" in meta and (folder / "teacher.bin").exists():
        raise UserError(f"{folder} has the features of {meta['teacher']} already")
    from transformers import AutoModel

    from train import Cache  # here, as a fork's train.py may import this file

    compute = model.pick_device()
    codec = model.load_codec(meta["codec"], compute)
    files = model.fetch(settings.teacher, "config.json", "*.safetensors")
    network = AutoModel.from_pretrained(files).float().to(compute.device).eval()
    cache, side = Cache(folder), min(16, meta["size"] // 8)
    shape = (network.config.hidden_size, side, side)
    row_size = 2 * math.prod(shape)
    path = folder / f"teacher-{settings.teacher.replace('/', '-')}.partial"
    with open(path, "ab") as file:
        done = file.tell() // row_size  # whole rows, if one was stopped
        file.truncate(done * row_size)
        for first in tqdm(range(done, meta["count"], 64), unit=" batches", disable=None):
            numbers = range(first, min(first + 64, meta["count"]))
            latents = cache.load(numbers)[0].to(compute.device)
            if latents.dtype == torch.uint8:
                latents = latents / 127.5 - 1
            with compute.autocast():
                images = codec.decode(latents.float()).float().clamp(-1, 1)
                features = compute_features(network, images, side)
            file.write(features.half().cpu().numpy().tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(path, folder / "teacher.bin")
    meta |= {"teacher": settings.teacher, "teacher_shape": shape}
    model.write_json(folder / "meta.json", meta)
    print(f"{folder}/teacher.bin holds features of shape {shape}; train.py --repa 0.5 uses them")


if __name__ == "__main__":
    prepare.run_script(main, Settings, __doc__)
