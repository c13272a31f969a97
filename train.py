"""Train a text-to-image model on a cache of latents, by the PRX recipe.

    torchrun train.py                                     # the built-in scenes, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data data/photos --batch-size 1024

The same command again goes on where the run stopped. The folder of a run, out/scenes, holds
`ckpt.pt`, `ema/` (the averaged weights, to sample with), `log.csv`, `samples/`, `learning.gif`.
"""

import bisect
import copy
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import signal
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import model
import prepare
from model import PRX, PRXConfig, UserError, pad, pick_device, read_config, velocity, whole_file
from sample import Pipeline, encode_prompts, grid, load_network, pictures_at_once, read_info, score


@dataclasses.dataclass
class Settings:
    """All settings of a run. Each field is a flag. PRX's FIDs compare with 18.20, its baseline."""

    data: Annotated[str, "a cache that prepare.py wrote"] = "data/scenes"
    out: Annotated[str, "folder of the run; '': out/ and the cache's name"] = ""
    init: Annotated[
        str, "a run or an official PRX to begin with; its sizes, predict, shift stay"
    ] = ""
    steps: Annotated[int, "optimizer steps; with more a finished run goes on"] = 1200
    batch_size: Annotated[int, "pictures in a step, over all processes (PRX: 256)"] = 128
    micro_batch: Annotated[int, "pictures a process takes at once, to save memory; 0: all"] = 0
    checkpoint_blocks: Annotated[bool, "compute blocks twice, to save memory"] = False
    held_out: Annotated[float, "share of the cache for validation, at most 1,024 pictures"] = 0.02
    prompts: Annotated[str, "file with the prompts of sample grids; '': held-out captions"] = ""
    seed: Annotated[int, "of the weights, the order, the noise and the timesteps"] = 0
    save_every: Annotated[int, "steps from checkpoint to checkpoint"] = 500
    sample_every: Annotated[int, "steps from sample grid to sample grid"] = 200
    patch_size: Annotated[int, "side of a token in latents; 0: 8 or more for pixels, else 2"] = 0
    width: Annotated[int, "hidden size; 0: 128 for pixels, else 384 (PRX: 1792)"] = 0
    depth: Annotated[int, "blocks; 0: 3 for pixels, else 8 (PRX: 16)"] = 0
    mlp_ratio: Annotated[float, "width of the MLP over hidden size (PRX: 3.5)"] = 3.0
    bottleneck: Annotated[int, "width of the bottleneck of pixel patches (PRX: 256); 0: none"] = 64
    predict: Annotated[Literal["x", "v"], "clean picture (JiT; PRX on pixels) or velocity"] = "x"
    t_floor: Annotated[float, "smallest t that the loss divides by (JiT, PRX: 0.05)"] = 0.3
    shift: Annotated[float, "timestep shift, in sampling too (PRX: 3 at 1024 px)"] = 2.0
    repa: Annotated[float, "weight of REPA, with a teacher (PRX: 0.5, FID 14.64)"] = 0.0
    repa_until: Annotated[float, "share of the run after which REPA ends (PRX: early)"] = 1.0
    route: Annotated[float, "share of tokens that skip blocks (TREAD; PRX: 0.5)"] = 0.0
    caption_dropout: Annotated[float, "share of captions left empty, for guidance (PRX: 0.1)"] = 0.1
    optimizer: Annotated[Literal["muon", "adamw"], "of the blocks (PRX: FID 15.55, 18.20)"] = "muon"
    muon_lr: Annotated[float, "learning rate of Muon (PRX: 1e-4)"] = 5e-3
    lr: Annotated[float, "learning rate of AdamW (PRX: 1e-4)"] = 3e-3
    warmup: Annotated[int, "steps of linear warm-up (PRX: 1,000)"] = 30
    cooldown: Annotated[float, "last share of the steps, with a linear cool-down (PRX: 0)"] = 0.3
    clip: Annotated[float, "norm to which gradients are clipped (PRX: 0.2)"] = 1.0
    ema: Annotated[float, "decay of the averaged weights a step (PRX: 0.999 every 10)"] = 0.98
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "auto: the best there is"] = "auto"
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], "of matrix products"] = "auto"
    compile: Annotated[
        Literal["auto", "on", "off"], "torch.compile; auto: on CUDA, for more than 1,500 steps"
    ] = "auto"

    def __post_init__(self):
        self.out = self.out or f"out/{Path(self.data).resolve().name}"
        for name in ("steps", "batch_size", "save_every", "sample_every"):
            if getattr(self, name) == 0:
                raise UserError(f"--{name.replace('_', '-')} 0 has to be 1 or more")
        for name in ("repa_until", "route", "caption_dropout", "ema", "held_out"):
            if getattr(self, name) > 1:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {getattr(self, name)} has to be from 0 to 1")


# --------------------------------------------------------------------------------------- the data
class Cache:
    """What prepare.py wrote, mapped into memory. Raises UserError where it is none, or broken."""

    def __init__(self, folder, with_teacher):
        self.folder = Path(folder)
        self.meta = model.read_json(self.folder / "meta.json")
        names = ["latents", "text", "offsets", "digest"] + (["teacher"] if with_teacher else [])
        self.shards, self.starts = [], [0]  # starts: where each shard's indices begin, and the end
        try:
            for name, count in self.meta["shards"].items():
                shard = {each: self.map_array(f"{name}/{each}.npy") for each in names}
                if len(shard["latents"]) != count or len(shard["text"]) != shard["offsets"][-1]:
                    raise ValueError(f"the files of {name} do not fit each other")
                self.shards.append(shard)
                self.starts.append(self.starts[-1] + count)
        except (KeyError, OSError, ValueError) as error:
            raise UserError(f"{folder} is no whole cache, prepare it anew: {error}") from error

    def map_array(self, name):
        """An array of the cache, read from the disk only where it is used. It is a plain one, as
        indexing an np.memmap takes longer than copying a row."""
        return np.asarray(np.load(self.folder / name, "r"))

    def split(self, share):
        """The indices of the examples to train on, and of those held out: a share, at most about
        1,024. A hash of the pixels decides, so that equal pictures are on the same side. Fewer than
        four would tell nothing; then none is held out."""
        digests = np.concatenate([shard["digest"] for shard in self.shards])  # (N,) uint32
        is_held_out = digests < min(share, 1024 / len(digests)) * 2**32  # hashes are uniform
        if not 4 <= is_held_out.sum() < len(digests):
            is_held_out[:] = False
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def load(self, indices):
        """Examples as a list of tensors: latents (B, C, H, W), uint8 or float16 as stored, text
        (B, T, D) float32, padded with zeros to the T of the longest caption in the cache, and, with
        a teacher, its features (B, its D, h, w) float16."""
        text = np.zeros((len(indices), self.meta["tokens"], self.meta["text_dim"]), np.float32)
        latents, features = [], []
        for place, index in enumerate(indices):
            number = bisect.bisect_right(self.starts, index) - 1  # of the shard that has it
            shard, row = self.shards[number], index - self.starts[number]
            start, stop = shard["offsets"][row : row + 2]
            text[place, : stop - start] = shard["text"][start:stop]
            latents.append(shard["latents"][row])
            if "teacher" in shard:
                features.append(shard["teacher"][row])
        arrays = [np.stack(latents), text] + ([np.stack(features)] if features else [])
        return [torch.from_numpy(array) for array in arrays]


def index_batches(indices, settings, first_step, rank, world_size):
    """Yield for each step the indices of this process's examples. Seed and step alone decide, so
    that a resumed run sees the same order. A batch may reach into the next epoch."""
    epoch, order = None, None
    for step in range(first_step, settings.steps):
        batch = []
        for n in range(step * settings.batch_size, (step + 1) * settings.batch_size):
            if n // len(indices) != epoch:
                epoch = n // len(indices)
                order = np.random.default_rng((settings.seed, epoch)).permutation(indices)
            batch.append(order[n % len(indices)])
        yield batch[rank::world_size]


# ------------------------------------------------------------------------ the model and optimizers
def make_model(settings, meta):
    """The network for a cache's latents. Raises UserError where sizes do not fit."""
    side, is_pixels = meta["latent_shape"][1], meta["codec"] == "pixels"
    patch = settings.patch_size or (max(8, side // 16) if is_pixels else 2)
    width = settings.width or (128 if is_pixels else 384)
    heads = max(4, width // 64)
    # A head's width is halved for rows and columns, and rope turns pairs: a multiple of 4.
    if width % (4 * heads) or side % patch:
        raise UserError(
            f"--width {width} has to be a multiple of {4 * heads} (4 x {heads} heads), and "
            f"--patch-size {patch} has to divide the side of the latents, {side}"
        )
    config = PRXConfig(
        in_channels=meta["latent_shape"][0],
        patch_size=patch,
        context_in_dim=meta["text_dim"],
        hidden_size=width,
        mlp_ratio=settings.mlp_ratio,
        num_heads=heads,
        depth=settings.depth or (3 if is_pixels else 8),
        axes_dim=(width // heads // 2, width // heads // 2),
        theta=100,  # 2403.13298, for few tokens; PRX: 10000
        bottleneck_size=(settings.bottleneck or None) if is_pixels else None,
    )
    return PRX(config, meta["teacher_dim"] if settings.repa else None)


def start_from(settings, meta):
    """The network of --init, and the info to draw with it. Its weights depend on how they were
    trained (prediction, shift, mask) and on the mean and std of latents, so these are kept. Raises
    UserError where the cache does not fit."""
    folder, info = read_info(settings.init)
    config, data = read_config(folder), settings.data
    for name, size in (("patch_size", "patch_size"), ("width", "hidden_size"), ("depth", "depth")):
        if getattr(settings, name) not in (0, getattr(config, size)):
            given = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise UserError(f"{given} does not fit {settings.init}: it has {getattr(config, size)}")
    if meta["text_dim"] != config.context_in_dim:
        raise UserError(
            f"{data} has text embeddings of width {meta['text_dim']} ({meta['text']}), and "
            f"{settings.init} takes {config.context_in_dim}: prepare with --text {info['text']}"
        )
    codecs = {name.removeprefix("madebyollin/") for name in (meta["codec"], info["codec"])}
    # A folder may hold the very codec that the other names, so it is let pass.
    is_other = len(codecs) == 2 and not any(Path(name).is_dir() for name in codecs)
    if is_other or meta["latent_shape"][0] != config.in_channels:
        raise UserError(
            f"{data} has latents of {meta['codec']}, and {settings.init} takes those of "
            f"{info['codec']}: prepare with --codec {info['codec']}"
        )
    offset = (np.array(meta["mean"]) - info["mean"]) / info["std"]
    ratio = np.array(meta["std"]) / info["std"]
    is_far = abs(offset).max() > 3 or ratio.max() > 10 or ratio.min() < 1 / 10
    if is_far and not info.get("mask"):  # official models have 0 and 1, not statistics
        raise UserError(
            f"the latents of {data} have another mean or std than {settings.init} knows: prepare "
            f"with --codec {info['codec']}"
        )
    if meta["latent_shape"][1] % config.patch_size:
        raise UserError(
            f"the side of the latents in {data} is no multiple of {config.patch_size}: prepare "
            "with another --size"
        )
    network = PRX(config, meta["teacher_dim"] if settings.repa else None)
    weights = load_network(settings.init, folder).state_dict()
    network.load_state_dict(weights, strict=False)  # a projector is not saved
    kept = ("predict", "shift", "mask", "mean", "std", "steps", "guidance")
    return network, meta | {"mask": False} | {key: info[key] for key in kept if key in info}


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (kellerjordan.github.io/posts/muon), so that all
    directions learn alike. Updates are as large as AdamW's (arXiv 2502.16982)."""

    def __init__(self, matrices, lr, momentum, dtype):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the products: bfloat16, or float32 where that is slow

    @torch.no_grad()
    def step(self):
        """Update all matrices, those of one shape together."""
        group, by_shape = self.param_groups[0], {}
        for p in group["params"]:
            if "average" not in self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
            by_shape.setdefault(p.shape, []).append(p)
        chunks = []  # of at most 2^26 numbers, as the work below takes several times their memory
        for parameters in by_shape.values():
            size = max(1, 2**26 // parameters[0].numel())
            chunks += [parameters[i : i + size] for i in range(0, len(parameters), size)]
        for parameters in chunks:
            averages = [self.state[p]["average"] for p in parameters]
            gradients = [p.grad for p in parameters]
            # As a loop over both lists would do it, but in fewer kernels.
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            # Nesterov looks ahead, to the average after another gradient like this one.
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
            updates = orthogonalize(torch.stack(ahead).to(self.dtype)).to(ahead[0].dtype)
            # An orthogonal matrix has an RMS of 1 / sqrt(longer side); AdamW's updates have 0.2.
            rate = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
            torch._foreach_add_(parameters, list(updates), alpha=-rate)


def orthogonalize(x):
    """`newton_schulz` of matrices x (N, rows, columns). Several processes share the work: each
    takes every world_size-th matrix, and they exchange the results."""
    if not dist.is_initialized():
        return newton_schulz(x)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    filler = x.new_zeros(-len(x) % world_size, *x.shape[1:])  # so that each has as many
    share = newton_schulz(torch.cat((x, filler))[rank::world_size]).contiguous()
    shares = [torch.empty_like(share) for _ in range(world_size)]
    dist.all_gather(shares, share)
    return torch.stack(shares, dim=1).flatten(0, 1)[: len(x)]  # in the first order again


def newton_schulz(x):
    """Bring the singular values of matrices x (N, rows, columns) near 1, by five steps of a
    polynomial in x that moves them there."""
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x  # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # x becomes 3.4445 x - 4.775 (x xT) x + 2.0315 (x xT)^2 x
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


def make_optimizers(network, settings, compute):
    """AdamW, and Muon for the matrices that a block's tokens go through (PRX: modulation, too)."""
    rest, matrices = [], []
    for name, p in network.named_parameters():
        is_matrix = name.startswith("blocks.") and p.ndim == 2 and "modulation" not in name
        group = matrices if is_matrix and settings.optimizer == "muon" else rest
        group.append(p)
    adamw = torch.optim.AdamW(rest, settings.lr, (0.9, 0.95), weight_decay=0, fused=True)
    dtype = torch.bfloat16 if compute.dtype == torch.bfloat16 else torch.float32
    muon = [Muon(matrices, settings.muon_lr, 0.9, dtype)] if matrices else []  # PRX: 0.95
    return [adamw, *muon]


# --------------------------------------------------------------------------------- a training step
def count_kept(tokens, settings):
    """How many of a picture's tokens go through all blocks (TREAD)."""
    return max(1, round(tokens * (1 - settings.route)))


def normalize(latents, info):
    """Latents (B, C, H, W) as stored, uint8 or float16, to float32, mean 0 and std 1 a channel."""
    if latents.dtype == torch.uint8:
        latents = latents / 127.5 - 1
    statistics = torch.tensor([info["mean"], info["std"]], device=latents.device)
    mean, std = statistics[:, :, None, None]  # (C, 1, 1) each
    return (latents.float() - mean) / std


def make_batch(examples, null_text, run, rank, world_size):
    """What `compute_loss` takes, from examples as `Cache.load` gives them: a dict of x, noise
    (B, C, H, W), t (B,) in [0.001, 1], text (B, T, D), and, if asked for, keep (B, S), the numbers
    of the tokens that go through all blocks, and a teacher's features (B, L, its D).

    Chance is drawn for the whole batch, from seed and step alone, and each process takes its rows.
    null_text (1, T, D) takes the place of dropped captions.
    """
    latents, text, *features = examples
    settings, device, count = run.settings, latents.device, run.settings.batch_size
    mine = slice(rank, None, world_size)  # as `index_batches` shares examples
    # Seed and step are below 2^32, so that no two pairs of them draw the same.
    dice = torch.Generator(device).manual_seed(settings.seed * 2**32 + run.step)
    noise = torch.randn(count, *latents.shape[1:], generator=dice, device=device)[mine]
    t = model.sample_timesteps(count, run.info["shift"], dice)[mine]
    dropped = torch.rand(count, generator=dice, device=device)[mine] < settings.caption_dropout
    text = torch.where(dropped[:, None, None], null_text, text)
    batch = {"x": normalize(latents, run.info), "noise": noise, "t": t, "text": text}
    rows, columns = (side // run.model.config.patch_size for side in latents.shape[2:])
    if settings.route > 0:
        chances = torch.rand(count, rows * columns, generator=dice, device=device)[mine]
        batch["keep"] = chances.argsort(1)[:, : count_kept(rows * columns, settings)]  # (B, S)
    if features:
        grid_of_tokens = F.adaptive_avg_pool2d(features[0].float(), (rows, columns))
        batch["features"] = grid_of_tokens.flatten(2).mT  # (B, L, D)
    return batch


def compute_loss(network, batch, info, t_floor):
    """The two parts of the loss of a `make_batch`, scalars: the mean squared error of velocities,
    and REPA's, which is the mean cosine distance, in [0, 2], of projected tokens and a teacher's
    features, or 0 without those."""
    x, noise, t, text, keep = (batch.get(name) for name in ("x", "noise", "t", "text", "keep"))
    x_t = torch.lerp(x, noise, t[:, None, None, None])  # (1 - t) x + t noise
    mask = (text != 0).any(dim=2) if info["mask"] else None  # rows of zeros are padding
    output = network(x_t, t, text, mask, keep)
    repa = torch.zeros((), device=x.device)
    if "features" in batch:
        output, tokens = output  # tokens (B, L or S, D)
        wanted = batch["features"]
        if keep is not None:
            wanted = wanted.take_along_dim(keep[:, :, None], dim=1)
        repa = 1 - F.cosine_similarity(tokens.float(), wanted, dim=2).mean()
    # The truth goes through the same clamp. So for "x" this is the squared error of the picture,
    # divided by max(t, t_floor)^2, and for "v" that of the output itself.
    truth = x if info["predict"] == "x" else noise - x
    predicted = velocity(output.float(), x_t, t, info["predict"], t_floor)
    return F.mse_loss(predicted, velocity(truth, x_t, t, info["predict"], t_floor)), repa


def learning_rate_factor(step, settings):
    """Linear warm-up from 0 to 1, and a linear cool-down to 0 at the end."""
    warmup = (step + 1) / max(1, settings.warmup)
    cooldown = (settings.steps - step) / max(1, settings.cooldown * settings.steps)
    return min(1, warmup, cooldown)


def train_step(network, run, batch, compute):
    """One step of all optimizers. network is run.model, in DDP if there are several processes.
    Returns (3,): this process's error of velocities and REPA's, and the norm before clipping."""
    settings, count = run.settings, len(batch["x"])
    micro = settings.micro_batch or count
    # After repa_until REPA counts 0 times. It is still computed, as DDP needs a gradient for each
    # parameter.
    repa_weight = settings.repa if run.step < settings.repa_until * settings.steps else 0.0
    losses = torch.zeros(2, device=batch["x"].device)
    for first in range(0, count, micro):
        part = {name: each[first : first + micro] for name, each in batch.items()}
        # DDP averages gradients over processes in the last part's backward only.
        network.require_backward_grad_sync = first + micro >= count
        with compute.autocast():
            mse, repa = compute_loss(network, part, run.info, settings.t_floor)
        share = len(part["x"]) / count
        run.scaler.scale((mse + repa_weight * repa) * share).backward()
        losses += torch.stack((mse, repa)).detach() * share
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
    # In float16 gradients overflow now and then. Then the norm is infinite, and clipping has
    # spoilt all gradients. The scaler leaves out only the optimizer that overflowed; we, all.
    overflows = run.scaler.is_enabled() and not norm.isfinite()
    factor = learning_rate_factor(run.step, settings)
    for optimizer, rate in zip(run.optimizers, (settings.lr, settings.muon_lr), strict=False):
        optimizer.param_groups[0]["lr"] = rate * factor
        if not overflows:
            run.scaler.step(optimizer)
        optimizer.zero_grad()
    run.scaler.update()
    with torch.no_grad():
        averages, weights = list(run.ema.parameters()), list(run.model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - settings.ema)
    run.step += 1
    return torch.cat((losses, norm[None]))


# Bands of timesteps, as PRX reports them, by their column in log.csv.
BANDS = {"held_out_low": (0.0, 0.3), "held_out_middle": (0.3, 0.6), "held_out_high": (0.6, 1.0)}


@torch.no_grad()
def validate(run, cache, indices, compute):
    """Errors of velocities of held-out examples by the averaged weights, a dict by BANDS, empty if
    nothing is held out. Noise and timesteps are fixed: only the weights make a difference."""
    errors = dict.fromkeys(BANDS, 0.0) if len(indices) else {}
    at_once = pictures_at_once(run.info["latent_shape"])
    for first in range(0, len(indices), at_once):
        examples = cache.load(indices[first : first + at_once])
        latents, text, *_ = (example.to(compute.device) for example in examples)
        batch = {"x": normalize(latents, run.info), "text": text}
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(first))
        batch["noise"] = noise.to(compute.device)
        places = (torch.arange(len(text), device=compute.device) + 0.5) / len(text)
        for band, (low, high) in BANDS.items():
            batch["t"] = low + (high - low) * places
            with compute.autocast():
                mse, _ = compute_loss(run.ema, batch, run.info, run.settings.t_floor)
            errors[band] += mse.item() * len(text) / len(indices)
    return errors


# ---------------------------------------------------------------------------------------- the run
class Run:
    """What goes on: the model, its average (EMA), the optimizers, and how far they are."""

    def __init__(self, settings, meta, compute):
        self.settings, self.device = settings, compute.device
        self.step, self.seconds = 0, 0.0  # made and taken so far, before a resume, too
        torch.manual_seed(settings.seed)
        if settings.init:
            self.model, self.info = start_from(settings, meta)
        else:
            self.model = make_model(settings, meta)
            how = {"predict": settings.predict, "shift": settings.shift, "mask": False}
            self.info = meta | how  # all it takes to draw, see sample.Pipeline
        self.model.checkpoint_blocks = settings.checkpoint_blocks
        self.model.to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(self.model, settings, compute)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute.dtype == torch.float16)
        self.parts = {"model": self.model, "ema": self.ema, "scaler": self.scaler}
        self.parts |= {f"optimizer {number}": each for number, each in enumerate(self.optimizers)}
        # What must not change when a run goes on. Steps, learning rates and the like may.
        digest = hashlib.md5(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        self.decisive = {"data": f"the cache with digest {digest[:8]}"}
        names = ("init", "seed", "batch_size", "held_out", "optimizer", "repa", "route")
        self.decisive |= {name: getattr(settings, name) for name in names}
        names = ("predict", "shift", "mask", "mean", "std")
        self.decisive |= {name: self.info[name] for name in names}
        self.decisive |= dataclasses.asdict(self.model.config)

    def save(self, folder):
        """Write the checkpoint, and the average with all it takes to draw. Raises UserError."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "seconds": self.seconds, "decisive": self.decisive}
        self.ema.save_pretrained(folder / "ema")
        model.write_json(folder / "ema" / "nanoprx.json", self.info)
        with whole_file(folder / "ckpt.pt") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # which hides what the disk said
                raise OSError("torch.save failed, is the disk full?") from error

    def load(self, folder):
        """Go on from a folder's checkpoint. Raises UserError if it is of another run, or broken."""
        try:
            state = torch.load(folder / "ckpt.pt", map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder}/ckpt.pt cannot be read; use a new --out: {error}") from error
        prepare.refuse_differences(folder, state["decisive"], self.decisive)
        self.step, self.seconds = state["step"], state["seconds"]
        for name, part in self.parts.items():
            if state[name]:  # a scaler that was not in use has no state
                part.load_state_dict(state[name])

    def trim_log(self, path):
        """Take the rows behind the checkpoint out of log.csv, as these steps come again."""
        lines = path.read_text().splitlines(keepends=True)
        rows = [line for line in lines[1:] if line.strip() and int(line.split(",")[0]) <= self.step]
        with whole_file(path) as file:
            file.write("".join(lines[:1] + rows).encode())

    def measure(self, results, seconds, world_size):
        """A row of log.csv, a dict: means over steps and processes of `train_step`'s results, the
        learning rates, and the speed of these steps, which took so many seconds. Raises UserError
        if a mean is infinite or nan; in float16 the norm may be."""
        means = torch.stack(results).mean(0)
        if world_size > 1:
            dist.all_reduce(means)
        loss, repa_loss, norm = (means / world_size).tolist()
        norm_may_overflow = self.scaler.is_enabled()  # train_step leaves out such steps
        if not (math.isfinite(loss + repa_loss) and (norm_may_overflow or math.isfinite(norm))):
            raise UserError(f"the loss is infinite at step {self.step}; begin anew, lower --lr")
        rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        return {
            "step": self.step,
            "loss": loss,
            "repa_loss": repa_loss,
            "grad_norm": norm,
            "lr": rates[0],
            "muon_lr": rates[1] if len(rates) == 2 else None,
            "pictures_per_second": len(results) * self.settings.batch_size / seconds,
        }


def append_row(path, row):
    """Append a row, a dict, to a CSV file, which begins with the names. Raises UserError."""
    try:
        with open(path, "a") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


# ------------------------------------------------------------------------------------ what it tells
def matrix_rate(compute):
    """The FLOP/s of a large product of matrices, as measured: what the device can reach."""
    side = 8192 if compute.device.type == "cuda" else 512
    x = torch.randn(side, side, device=compute.device).to(compute.dtype)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        (x @ x)[0, 0].item()  # which waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds)


def flops_per_picture(run, compute):
    """Floating-point operations to train on one picture: those of the forward pass, counted, and
    twice as many backward. Model FLOPs utilisation (arXiv 2204.02311) is this times the pictures a
    second, over `matrix_rate`."""
    channels, height, width = run.info["latent_shape"]
    latents = torch.zeros(1, channels, height, width, device=run.device)
    text = torch.zeros(1, run.info["tokens"], run.info["text_dim"], device=run.device)
    kept = count_kept(height * width // run.model.config.patch_size**2, run.settings)
    keep = torch.arange(kept, device=run.device)[None] if run.settings.route else None
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # can be counted
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter, compute.autocast():
        run.ema(latents, latents.new_ones(1), text, keep=keep)
    return 3 * counter.get_total_flops()


def report(run, compute, compiles, trained, held_out, prompts, world_size):
    """Print what is about to happen."""
    settings, info = run.settings, run.info
    parameters = sum(weight.numel() for weight in run.model.parameters())
    patch, (_, height, width) = run.model.config.patch_size, info["latent_shape"]
    is_flash = not info["mask"] and (run.device.type == "cpu" or compute.dtype != torch.float32)
    # Weights, gradients, averages, momentum; AdamW has second moments, too.
    states = 4 if settings.optimizer == "muon" else 5
    epochs = settings.steps * settings.batch_size / len(trained)
    print(f"device: {world_size} x {run.device.type}, {compute.reason}")
    print(
        f"model: {parameters:,} parameters, {height // patch * (width // patch)} image and up to "
        f"{info['tokens']} text tokens, {'flash' if is_flash else 'memory-efficient'} attention, "
        f"{'torch.compile' if compiles else 'no torch.compile'}"
    )
    few = ", too few for a share of them" if settings.held_out and not len(held_out) else ""
    print(
        f"data: {len(trained):,} pictures and {len(held_out):,} held out{few}; {settings.steps:,} "
        f"steps of {settings.batch_size:,} are {epochs:.1f} epochs"
    )
    print(f"memory: about {states * 4 * parameters / 1e9:.2g} GB, and that of activations")
    print("sample grids:", "; ".join(prompt[:80] for prompt in prompts))


def save_grid(folder, pipeline, embeddings, step):
    """Draw the prompts of the run into samples/."""
    prompts = pipeline.info["examples"]
    sheet = grid(pipeline.draw(embeddings, range(len(prompts))), prompts, 6)
    with whole_file(folder / "samples" / f"step_{step:06d}.png") as file:
        sheet.save(file, "png")


def finish(folder, pipeline, run):
    """Write learning.gif, and the prompt accuracy of a run on scenes."""
    paths = sorted((folder / "samples").glob("step_*.png"))
    if paths:  # unless the user has deleted them
        step = math.ceil(len(paths) / 50)
        kept = [Image.open(path) for path in paths[::step]]
        # A GIF has 256 colours. This method keeps those of small things true, too.
        first, *others = [sheet.quantize(method=Image.Quantize.FASTOCTREE) for sheet in kept]
        durations = [400] * len(others) + [2000]  # in milliseconds
        with whole_file(folder / "learning.gif") as file:
            first.save(file, "gif", save_all=True, append_images=others, duration=durations, loop=0)
    print(f"{folder} took {run.seconds / 60:.1f} minutes; python sample.py --run {folder} PROMPT")
    if run.info["source"] == "scenes":
        accuracies = score(pipeline, 128).items()
        print("prompt accuracy:", *(f"{name} {share:.1%}" for name, share in accuracies))


# ------------------------------------------------------------------------------------ the main part
def can_compile(settings, compute):
    """Whether to compile: as --compile says; "auto" is where it works and pays. It takes 10 to 20
    seconds on an H200, more than a short run of a small network gains."""
    if settings.compile != "auto":
        return settings.compile == "on"
    if compute.device.type != "cuda" or settings.steps <= 1500:
        return False
    has_triton = importlib.util.find_spec("triton") is not None  # Windows lacks it
    return has_triton and torch.cuda.get_device_capability() >= (7, 0)  # as it demands


def read_prompts(settings, cache, held_out):
    """The prompts of sample grids, twelve at most. Raises UserError if the file holds none."""
    if settings.prompts:
        try:
            lines = Path(settings.prompts).read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts {settings.prompts} cannot be read: {error}") from error
    else:  # held-out captions of the first shard, and if they are few, its first ones
        captions = prepare.read_captions(cache.folder / next(iter(cache.meta["shards"])))
        lines = [captions[index] for index in held_out if index < len(captions)] + captions
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))[:12]
    if not prompts:
        raise UserError(f"--prompts {settings.prompts} holds no prompt; it takes one a line")
    return prompts


def join_processes(settings, device):
    """The rank of this process and the number of processes, which meet here if torchrun started
    several. The first draws the built-in scenes, if they are wanted and not there. Raises UserError
    if a batch cannot be shared."""
    rank, world_size = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    if settings.batch_size % world_size:
        raise UserError(f"--batch-size is no multiple of the {world_size} processes")
    if rank == 0 and settings.data == "data/scenes" and not Path("data/scenes/meta.json").exists():
        prepare.prepare(prepare.Settings(device=settings.device))
    if world_size > 1:  # the others wait here for the first
        # Tensors on the CPU, such as stop_asked, need gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world_size


def train(settings):
    """Train as the settings say, or go on with what is in the run's folder.

    Raises UserError where data are missing, the folder holds another run, or the loss is infinite.
    """
    compute, folder = pick_device(settings.device, settings.dtype), Path(settings.out)
    rank, world_size = join_processes(settings, compute.device)
    cache = Cache(settings.data, with_teacher=settings.repa > 0)
    run = Run(settings, cache.meta, compute)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from error
    trained, held_out = cache.split(settings.held_out)
    prompts = read_prompts(settings, cache, held_out)
    run.info["examples"] = prompts  # sample.py draws them, too
    if (folder / "ckpt.pt").exists():
        run.load(folder)
        if rank == 0 and (folder / "log.csv").exists():
            run.trim_log(folder / "log.csv")
        if rank == 0 and run.step >= settings.steps:
            print(f"{folder} has made its {run.step} steps; give more --steps, or another --out")
    pipeline = Pipeline(run.ema, run.info, compute)
    compiles = can_compile(settings, compute)
    if rank == 0:
        report(run, compute, compiles, trained, held_out, prompts, world_size)
    if compiles:
        for block in run.model.blocks:  # all alike, so that the first is compiled for all
            block.compile()
    network = run.model
    if world_size > 1:
        network = DistributedDataParallel(network, gradient_as_bucket_view=True)
    train_loop(network, run, cache, (trained, held_out), pipeline, folder, rank, world_size)
    if rank == 0 and run.step < settings.steps:
        print(f"stopped at step {run.step} and saved; the same command goes on")
    elif rank == 0:
        finish(folder, pipeline, run)
    if world_size > 1:
        dist.barrier()  # while the first process draws and scores
        dist.destroy_process_group()


def stop_on_signals():
    """A tensor that becomes 1 when the process is told to stop."""
    stop_asked = torch.zeros(())

    def ask_to_stop(number, frame):
        stop_asked.fill_(1)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Ctrl-C, torchrun's, a closed terminal
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), ask_to_stop)
    return stop_asked


def train_loop(network, run, cache, split, pipeline, folder, rank, world_size):
    """The loop: steps until the last or until told to stop, with samples and checkpoints. split is
    that of the cache."""
    settings, compute, (trained, held_out) = run.settings, pipeline.compute, split
    stop_asked = stop_on_signals()
    embeddings = encode_prompts(run.info["examples"], run.info, compute)
    # The first embedding is that of the empty caption, padded like the captions of the cache.
    null_text = pad(embeddings[:1], cache.meta["tokens"]).to(compute.device)
    # Pictures a second times this is the model FLOPs utilisation of all devices.
    mfu_factor = flops_per_picture(run, compute) / matrix_rate(compute) / world_size
    indices = index_batches(trained, settings, run.step, rank, world_size)
    disable = True if rank > 0 else None  # None: shown on a terminal only
    bar = tqdm(total=settings.steps, initial=run.step, disable=disable)
    began = time.perf_counter() - run.seconds  # as if the run had never been stopped
    results, results_began = [], time.perf_counter()  # of the steps since the last row of the log
    errors = {}  # of the last validation
    for examples in prepare.load_ahead(indices, cache.load):
        examples = [example.to(compute.device) for example in examples]
        batch = make_batch(examples, null_text, run, rank, world_size)
        results.append(train_step(network, run, batch, compute))
        bar.update()
        stops = stop_asked.clone()  # as a signal may come any time
        if world_size > 1:
            dist.all_reduce(stops)  # told to stop, all stop at the same step
        is_last = run.step == settings.steps
        samples = is_last or run.step % settings.sample_every == 0
        saves = is_last or stops > 0 or run.step % settings.save_every == 0
        logs = samples or saves or run.step % 10 == 0  # reading the loss waits for the device
        if not logs:
            continue
        row = run.measure(results, time.perf_counter() - results_began, world_size)
        row["mfu"] = row["pictures_per_second"] * mfu_factor
        run.seconds = row["seconds"] = time.perf_counter() - began
        row |= dict.fromkeys(BANDS)  # empty, where nothing is measured
        if samples and rank == 0:
            errors = validate(run, cache, held_out, compute)
            row |= errors
            save_grid(folder, pipeline, embeddings, run.step)
            bar.write(", ".join(f"{name} {row[name]:.4g}" for name in row if row[name] is not None))
        if rank == 0:
            append_row(folder / "log.csv", row)
        if saves and rank == 0:
            run.save(folder)
        bar.set_postfix(loss=row["loss"], **errors)
        if stops > 0:
            break
        results, results_began = [], time.perf_counter()  # so that drawing and saving do not count


if __name__ == "__main__":
    prepare.run_script(train, Settings, __doc__)
