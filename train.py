"""Train a text-to-image model on a cache of latents, by the PRX recipe.

    torchrun train.py                                     # the built-in scenes, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data data/photos --batch-size 1024

The same command again goes on where the run stopped. The folder of a run, out/scenes, holds
`ckpt.pt`, `ema/` (the averaged weights, to sample with), `log.csv`, `samples/`, `learning.gif`.
"""
import ctypes, dataclasses, functools, os, signal, sys, time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from model import (PRX, PRXConfig, Refused, pick_device, read_json, refusing, sample_timesteps,
                   velocity, whole_file, write_json)
from prepare import (count, load_codec, load_text_encoder, natural, pad, positive,
                     prepare, refuse_differences, run_script, share)
from sample import draw, grid, score

@dataclasses.dataclass
class Config:
    """All settings of a run. Each field is a flag, and its comment the help."""
    data: str = "data/scenes"      # a cache that prepare.py wrote
    out: str = ""                  # folder of the run; "": out/ and the cache's name
    init: str = ""                 # a run or a model of the same sizes, to begin as a second stage
    steps: count = 950             # optimizer steps
    batch_size: count = 128        # pictures in a step, over all processes
    micro_batch: natural = 0       # pictures a process takes at once, to save memory; 0: all
    seed: natural = 0              # of the weights, the order, the noise and the timesteps
    save_every: count = 500        # steps from checkpoint to checkpoint
    sample_every: count = 200      # steps from sample grid to sample grid
    patch_size: natural = 0        # side of a token in latents; 0: 8 or more for pixels, else 2
    width: natural = 0             # hidden size of the network; 0: 128 for pixels, else 384
    depth: natural = 0             # blocks; 0: 3 for pixels, else 8
    mlp_ratio: positive = 3.0      # width of the MLP over hidden size
    bottleneck: natural = 64       # of patches of pixels, its width (PRX: 256, patch 32); 0: none
    predict: Literal["x", "v"] = "x"                    # clean picture (JiT) or velocity
    t_floor: share = 0.3           # t below it weighs as little in the loss (JiT and PRX: 0.05)
    shift: positive = 1.0          # timestep shift, in sampling too (PRX: 3 for pixels at 1024 px)
    route: share = 0.0             # share of tokens that skip the middle blocks (TREAD; PRX: 0.5)
    caption_dropout: share = 0.1   # share of captions left empty, for guidance (PRX: 0.1)
    optimizer: Literal["muon", "adamw"] = "muon"        # for the blocks (PRX: FID 15.55 or 18.20)
    muon_lr: positive = 5e-3       # learning rate of Muon (PRX: 1e-4)
    lr: positive = 3e-3            # learning rate of AdamW (PRX: 1e-4)
    warmup: natural = 30           # steps of linear warm-up (PRX: 1,000)
    cooldown: share = 0.3          # last share of the steps, with a linear cool-down (PRX: none)
    clip: positive = 1.0           # norm to which gradients are clipped (PRX: 0.2)
    ema: share = 0.98              # decay of the averaged weights, each step (PRX: 0.999 every 10)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"     # autocast; auto: bf16 if there is hardware
    weights: Literal["fp32", "bf16"] = "fp32"           # bf16 (and autocast): FID 18.20 to 21.87
    compile: Literal["auto", "on", "off"] = "auto"      # torch.compile; auto: on CUDA
# -------------------------------------------------------------------------------------- the data
def load_array(path, dtype, *shape):
    """The .npy file of that type and shape, mapped into memory. Raises Refused, also at NaN."""
    with refusing(f"{path} cannot be used; prepare it anew"):
        array = np.load(path, mmap_mode="r")
        if (array.dtype, array.shape) != (dtype, shape) or array.dtype.kind == "f" and not all(
                np.isfinite(array[row:row + 1024]).all() for row in range(0, len(array), 1024)):
            raise ValueError(f"it does not hold finite {dtype} of shape {shape}")
        return array

class Cache(torch.utils.data.Dataset):
    """What prepare.py wrote, mapped into memory; what goes with every batch is on the device.
    Raises Refused where a file is missing or broken, or does not fit meta.json."""
    def __init__(self, folder, device):
        self.meta, self.shards = read_json(folder / "meta.json"), []
        with refusing(f"{folder}/meta.json does not describe a cache"):
            shape, dim, tokens, *_ = (self.meta[key] for key in (
                "latent_shape", "text_dim", "tokens", "source", "codec", "text"))
            for name, pictures in self.meta["shards"].items():
                shard = folder / name
                offsets = load_array(shard / "offsets.npy", "int64", pictures + 1)
                if offsets[0] or not {*np.diff(offsets)} <= {*range(tokens + 1)}:
                    raise Refused(f"{shard}/offsets.npy does not rise from 0 by up to {tokens}")
                self.shards.append((
                    load_array(shard / "latents.npy", self.meta["dtype"], pictures, *shape),
                    load_array(shard / "text.npy", "float16", offsets[-1], dim), offsets))
            self.starts = np.cumsum([0, *self.meta["shards"].values()])
            self.mean = torch.tensor(self.meta["mean"], device=device).view(shape[0], 1, 1)
            self.std = torch.tensor(self.meta["std"], device=device).view(shape[0], 1, 1)
    def __getitems__(self, indices):
        """Latents (B, C, H, W) as they are stored, and text (B, tokens, D), padded with zeros."""
        some_latents, some_text = [], []
        for index in indices:
            number = np.searchsorted(self.starts, index, "right") - 1
            (latents, text, offsets), index = self.shards[number], index - self.starts[number]
            some_latents.append(latents[index])
            some_text.append(torch.tensor(text[slice(*offsets[index:index + 2])]))
        return torch.from_numpy(np.stack(some_latents)), pad(some_text, self.meta["tokens"])

def batches(pictures, config, first_step, rank, world):
    """Yield for each step the numbers of this process's pictures, from seed and step alone, so that
    a resumed run goes on in order. A batch may reach into the next epoch, so that none is short."""
    order = functools.lru_cache(2)(lambda epoch: np.random.default_rng(
        (config.seed, epoch)).permutation(pictures))
    for step in range(first_step, config.steps):
        batch = range(step * config.batch_size, (step + 1) * config.batch_size)
        yield [order(n // pictures)[n % pictures] for n in batch[rank::world]]
# --------------------------------------------------------------------------- model and optimizers
def make_model(config, meta):
    """The network for a cache; fills in what is 0 in config. Raises Refused where sizes clash."""
    (channels, *sides), pixels = meta["latent_shape"], meta["codec"] == "pixels"
    config.patch_size = config.patch_size or (max(8, sides[0] // 16) if pixels else 2)
    config.width = config.width or (128 if pixels else 384)
    config.depth, heads = config.depth or (3 if pixels else 8), max(4, config.width // 64)
    if any(side % config.patch_size for side in sides):
        raise Refused(f"--patch-size {config.patch_size} does not divide latents of {sides}")
    return PRX(PRXConfig(
        in_channels=channels, patch_size=config.patch_size, context_in_dim=meta["text_dim"],
        hidden_size=config.width, mlp_ratio=config.mlp_ratio, num_heads=heads, depth=config.depth,
        axes_dim=(config.width // heads // 2,) * 2, theta=100,            # 2403.13298; PRX: 10000
        bottleneck_size=pixels and config.bottleneck or None))

def make_optimizers(network, config):
    """AdamW, and Muon (kellerjordan.github.io/posts/muon) for the matrices that a block's tokens go
    through, its updates as large as AdamW's (2502.16982). PRX: momentum 0.95, no weight decay."""
    rest, matrices = [], []
    for name, p in network.named_parameters():
        muon = config.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2
        (matrices if muon and "modulation" not in name else rest).append(p)
    adamw = torch.optim.AdamW(rest, config.lr, (0.9, 0.95), weight_decay=0, fused=True)
    return {"adamw": adamw} if not matrices else {"adamw": adamw, "muon": torch.optim.Muon(
        matrices, config.muon_lr, weight_decay=0, momentum=0.9, adjust_lr_fn="match_rms_adamw")}
# ------------------------------------------------------------------------------------ the training
FREE = ("out", "save_every", "sample_every", "micro_batch", "compile")   # may change on resuming
def train_step(model, optimizers, cache, config, step, rank, autocast, latents, text):
    """One step of all optimizers on this process's latents (B, C, H, W) and text (B, L, D), as they
    are stored. Chance is drawn for all of the batch, by seed and step alone; a process takes its
    rows. Returns the loss, the mean squared error of velocities, and the norm before clipping."""
    device, mine = cache.null.device, slice(rank, None, config.batch_size // len(latents))
    generator = torch.Generator(device).manual_seed(config.seed * 2 ** 32 + step)
    shape = config.batch_size, *latents.shape[1:]
    noise = torch.randn(shape, generator=generator, device=device)[mine].clone()  # not the others'
    t = sample_timesteps(config.batch_size, config.shift, generator)[mine]
    drop = torch.rand(config.batch_size, generator=generator, device=device)[mine]
    x, text = latents.to(device, non_blocking=True), text.to(device, non_blocking=True)
    x = ((x / 127.5 - 1 if x.dtype == torch.uint8 else x.float()) - cache.mean) / cache.std
    x_t = torch.lerp(x, noise, t[:, None, None, None])                      # (1 - t) x + t noise
    text = torch.where((drop < config.caption_dropout)[:, None, None], cache.null, text)
    tokens = x.shape[2] * x.shape[3] // config.patch_size ** 2
    order = torch.rand(config.batch_size, tokens, generator=generator, device=device)[mine]
    stay = order.argsort(1)[:, :max(1, round(tokens * (1 - config.route)))]      # skip no block
    total, micro = 0, config.micro_batch or len(x)
    for part in (slice(first, first + micro) for first in range(0, len(x), micro)):
        model.require_backward_grad_sync = part.stop >= len(x)         # of DDP: after the last part
        with autocast:
            output = model(x_t[part], t[part], text[part], None, stay[part]).float()
        truth = x[part] if config.predict == "x" else noise[part] - x[part]
        error = velocity(output - truth, 0, t[part], config.predict, config.t_floor)   # x_t cancels
        loss = error.square().mean() * len(output) / len(x)
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    scale = min(1, (step + 1) / max(config.warmup, 1),
                (config.steps - step) / max(config.cooldown * config.steps, 1))
    for optimizer, rate in zip(optimizers.values(), (config.lr, config.muon_lr)):
        optimizer.param_groups[0]["lr"] = rate * scale
        optimizer.step()
        optimizer.zero_grad()
    return total, norm

def train(config):
    """Train as the config says, or go on with what is in its folder. Raises Refused where data are
    missing, the folder holds a run with other settings, or the loss is not finite."""
    for option, value in ((-3, 2 ** 25), (-1, 2 ** 31 - 1)) if sys.platform == "linux" else ():
        ctypes.CDLL(None).mallopt(option, value)   # keep freed memory: 12% of a step on a CPU
    (device, bf16), cuda = pick_device(), torch.cuda.is_available()
    rank, world = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    if config.batch_size % world:
        raise Refused(f"--batch-size {config.batch_size} is not a multiple of the processes")
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    data, out = Path(config.data), Path(config.out or f"out/{Path(config.data).name}")
    if not (data / "meta.json").exists():
        if config.data != Config.data:
            raise Refused(f"there is no cache in {data}; python prepare.py SOURCE --out {data}")
        make_model(config, {"latent_shape": (3, 32, 32), "text_dim": 1, "codec": "pixels"})
        prepare()                             # but only when the sizes are known to fit
    cache = Cache(data, device)
    info = cache.meta | {"predict": config.predict, "shift": config.shift, "route": config.route}
    torch.manual_seed(config.seed)
    weights = torch.bfloat16 if config.weights == "bf16" else torch.float32
    network = make_model(config, info).to(device, weights)
    if config.init:
        with refusing(f"--init {config.init} does not fit"):
            network.load_state_dict(PRX.from_pretrained(config.init).state_dict())
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizers = make_optimizers(network, config)
    parts = {"network": network, "ema": ema, **optimizers}
    step, seconds, log = 0, 0.0, ["step,loss,grad_norm,pictures_per_second,seconds"]
    checkpoint = out / "ckpt.pt"
    if checkpoint.exists():
        with refusing(f"{checkpoint} cannot go on"):
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            refuse_differences(out, state["config"], dataclasses.asdict(config), FREE)
            step, seconds, log = state["step"], state["seconds"], state["log"]
            for name, part in parts.items():
                part.load_state_dict(state.pop(name))                    # pop: frees the copy
    if config.compile == "on" or config.compile == "auto" and cuda:
        network.body = torch.compile(network.body)
    model = torch.nn.parallel.DistributedDataParallel(network) if world > 1 else network
    bf16 = config.dtype == "bf16" or config.dtype == "auto" and bf16 or config.weights == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    encode_text = load_text_encoder(info["text"], device, info["tokens"])
    cache.null = pad(encode_text([""]), info["tokens"])[0].to(device)            # (L, D)
    painter = ema.module, load_codec(info["codec"], device), encode_text, info
    first = next(shard for shard, pictures in info["shards"].items() if pictures)
    prompts = (data / first / "captions.txt").read_text("utf-8").splitlines()[:12]
    stopped, parent = [], os.getppid()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopped.append(True))
    loader = torch.utils.data.DataLoader(      # fork: workers share the maps, and ignore Ctrl-C
        cache, batch_sampler=batches(cache.starts[-1], config, step, rank, world), collate_fn=tuple,
        **(dict(num_workers=2, multiprocessing_context="fork", pin_memory=True) if cuda else {}))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        log_file = open(out / "log.csv", "w", buffering=1)
        print(*log, sep="\n", file=log_file)                   # without what will be done again
    bar = tqdm(total=config.steps, initial=step, disable=None if rank == 0 else True)
    losses, since, before = [], time.perf_counter(), step
    for batch in loader:
        loss, norm = train_step(model, optimizers, cache, config, step, rank, autocast, *batch)
        losses.append(loss)
        ema.multi_avg_fn([*ema.parameters()], [*network.parameters()], None)  # no wait for the GPU
        step += 1
        bar.update()
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
            stopped.append(True)              # torchrun was killed; do not go on without it
        last, keep = step == config.steps, step % config.save_every == 0
        look = last or step % config.sample_every == 0
        if not (last or keep or look or step % 10 == 0 or world == 1 and stopped):
            continue                          # reading the loss would wait for the device
        shared = torch.tensor([torch.stack(losses).mean() / world, len(stopped)], device=device)
        if world > 1:                         # told to stop, all stop at the same step
            torch.distributed.all_reduce(shared)
        loss, stop = shared.tolist()
        if not np.isfinite(loss + norm.item()):
            raise Refused(f"the loss is not finite at step {step}, unsaved; begin anew, lower --lr")
        took, since = time.perf_counter() - since, time.perf_counter()
        speed = config.batch_size * (step - before) / took
        losses, before, seconds = [], step, seconds + took
        if rank == 0:
            bar.set_postfix({"loss": f"{loss:.4f}", "pictures/s": f"{speed:.0f}"})
            log.append(f"{step},{loss:.5f},{norm.item():.4f},{speed:.1f},{seconds:.1f}")
            print(log[-1], file=log_file)
            if look:
                pictures = autocast(draw)(*painter, prompts, range(len(prompts)))
                with whole_file(out / "samples" / f"step_{step:06d}.png") as file:
                    grid(pictures, prompts, 6).save(file, "png")
            if last or keep or stop:
                ema.module.save_pretrained(out / "ema")
                write_json(out / "ema" / "nanoprx.json", info)
                (out / "ema" / "README.md").write_text(                       # a model card
                    "---\npipeline_tag: text-to-image\n---\nA PRX that nanoPRX trained for "
                    f"{step:,} steps: `python sample.py --run user/name PROMPT` draws with it.\n")
                with whole_file(checkpoint) as file:
                    torch.save({name: part.state_dict() for name, part in parts.items()} | {
                        "config": dataclasses.asdict(config), "step": step, "seconds": seconds,
                        "log": log}, file)
        if stop:
            break
    bar.close()
    if rank == 0 and step < config.steps:
        print(f"stopped at step {step} and saved; the same command goes on")
    elif rank == 0:
        paths = sorted((out / "samples").glob("step_*.png"))
        first, *others = map(Image.open, paths[::-(len(paths) // 50 + 1)][::-1])     # 50 at most
        with whole_file(out / "learning.gif") as file:
            first.save(file, "gif", save_all=True, append_images=others, duration=400, loop=0)
        print(f"{out} is finished: {step:,} steps in {seconds / 60:.1f} minutes")
        if info["source"] == "scenes":
            shares = autocast(score)(*painter)
            print("prompt accuracy:", *(f"{name} {part:.1%}" for name, part in shares.items()))
        print(f"sample with: python sample.py --run {out} PROMPT")
    if world > 1:
        torch.distributed.barrier()           # while the first process still draws and scores
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    run_script(Config, __doc__, train)
