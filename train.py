"""Train a text-to-image model on a cache of latents, by the PRX recipe.

    torchrun train.py                                     # the built-in scenes, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data data/photos --batch-size 1024

The same command again goes on where the run stopped. The folder of a run, out/scenes, holds
`ckpt.pt`, `ema/` (the averaged weights, to sample with), `log.csv`, `samples/`, `learning.gif`.
"""
import ctypes, dataclasses, functools, json, os, signal, sys, time
from pathlib import Path
from typing import Literal
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from model import (PRX, PRXConfig, Refused, pick_device, read_json, refusing, sample_timesteps,
                   velocity, whole_file, write_json)
from prepare import (count, load_codec, load_teacher, load_text_encoder, natural, pad, positive,
                     prepare, refuse_differences, run_script, share, weight)
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
    repa: weight = 0.0             # weight of REPA, with a teacher (PRX: 0.5, FID 18.20 to 14.64)
    repa_until: share = 1.0        # share of the run after which it ends (PRX: helps only early)
    pdino: weight = 0.0            # weight of P-DINO, on pixels (PRX: 0.01); needs a teacher
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
def load_array(folder, name, dtype, *shape):
    """The .npy file of that type and shape, mapped into memory. Raises Refused, also at NaN."""
    with refusing(f"{folder}/{name}.npy cannot be used; prepare anew (teacher.npy: --teacher)"):
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
        finite = array.dtype.kind != "f" or np.isfinite(array.sum(dtype=float))
        if (array.dtype, array.shape, finite) != (dtype, shape, True):
            raise ValueError(f"it does not hold finite {dtype} of shape {shape}")
        return array

class Cache(torch.utils.data.Dataset):
    """What prepare.py wrote, mapped into memory; what goes with every batch is on the device.
    Raises Refused where a file is missing or broken, or does not fit meta.json."""
    def __init__(self, folder, device, repa=0, pdino=0):
        with refusing(f"{folder}/meta.json tells of no cache; prepare one in a new --out"):
            self.meta = meta = json.loads((folder / "meta.json").read_bytes())
            [meta[key] for key in ("source", "text", "examples")]           # are these there, too?
            if pdino and meta["codec"] != "pixels":
                raise Refused("--pdino compares pictures, but these are latents; --repa takes both")
            statistics = torch.tensor([meta["mean"], meta["std"]], device=device)
            self.mean, self.std = statistics.view(2, meta["latent_shape"][0], 1, 1)
            self.starts, self.shards = np.cumsum([0, *meta["shards"].values()]), []
            for name, pictures in meta["shards"].items():
                load = functools.partial(load_array, shard := folder / name)
                offsets = load("offsets", "int64", pictures + 1)
                if offsets[0] or not {*np.diff(offsets)} <= {*range(meta["tokens"] + 1)}:
                    raise Refused(f"{shard}/offsets.npy does not rise from 0 as it should")
                text = load("text", "float16", offsets[-1], meta["text_dim"])
                arrays = [load("latents", meta["dtype"], pictures, *meta["latent_shape"])]
                if repa or pdino:
                    arrays.append(load("teacher", "float16", pictures, *meta["teacher_shape"]))
                self.shards.append((text, offsets, arrays))
    def __getitems__(self, indices):
        """Text (B, tokens, D), zero-padded, stored latents (B, C, H, W), features (B, D, h, w)."""
        some_text, some_rows = [], []
        for index in indices:
            number = np.searchsorted(self.starts, index, "right") - 1
            (text, offsets, arrays), index = self.shards[number], index - self.starts[number]
            some_rows.append([array[index] for array in arrays])
            some_text.append(torch.tensor(text[slice(*offsets[index:index + 2])]))
        arrays = (torch.from_numpy(np.stack(rows)) for rows in zip(*some_rows))
        return pad(some_text, self.meta["tokens"]), *arrays

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
def train_step(model, optimizers, cache, config, step, rank, autocast, batch):
    """One step of all optimizers on what this process's batch takes from the cache. Chance is drawn
    for all of the batch, by seed and step alone; a process takes its rows. Returns the loss, the
    mean squared error of velocities, and the norm before clipping."""
    device, mine = cache.null.device, slice(rank, None, config.batch_size // len(batch[0]))
    text, x, *features = (part.to(device, non_blocking=True) for part in batch)
    generator = torch.Generator(device).manual_seed(config.seed * 2 ** 32 + step)
    dice = {"generator": generator, "device": device}
    noise = torch.randn(config.batch_size, *x.shape[1:], **dice)[mine].clone()  # not the others'
    t = sample_timesteps(config.batch_size, config.shift, generator)[mine]
    drop = torch.rand(config.batch_size, **dice)[mine]
    text = torch.where((drop < config.caption_dropout)[:, None, None], cache.null, text)
    x = ((x / 127.5 - 1 if x.dtype == torch.uint8 else x.float()) - cache.mean) / cache.std
    x_t = torch.lerp(x, noise, level := t[:, None, None, None])              # (1 - t) x + t noise
    tokens = [side // config.patch_size for side in x.shape[2:]]                           # h, w
    order = torch.rand(config.batch_size, *tokens, **dice)[mine].flatten(1).argsort(1)
    stay = order[:, :round(order.shape[1] * (1 - config.route)) or 1]            # skip no block
    total, micro = 0, config.micro_batch or len(x)
    for part in (slice(first, first + micro) for first in range(0, len(x), micro)):
        model.require_backward_grad_sync = part.stop >= len(x)         # of DDP: after the last part
        with autocast:
            output = model(x_t[part], t[part], text[part], None, stay[part])
        output, middle = output if config.repa else (output, None)
        truth = x[part] if config.predict == "x" else noise[part] - x[part]
        error = velocity(output.float() - truth, 0, t[part], config.predict, config.t_floor)
        loss = error.square().mean()                                    # x_t cancels in the error
        total += loss.detach() * len(output) / len(x)
        if config.repa:           # at its end the weight becomes 0, as DDP wants gradients for all
            wanted = F.adaptive_avg_pool2d(features[0][part].float(), tokens).flatten(2).mT
            if middle.shape[1] < wanted.shape[1]:                  # (B, L, D); those that stayed
                wanted = wanted.take_along_dim(stay[part, :, None], dim=1)
            pull = config.repa * (step < config.repa_until * config.steps)
            loss = loss - pull * F.cosine_similarity(middle, wanted, dim=2).mean()
        if config.pdino:                               # gradients go through the frozen teacher
            clean = output if config.predict == "x" else x_t[part] - level[part] * output
            seen = autocast(cache.teacher.on_grid)(clean * cache.std + cache.mean)
            loss = loss + config.pdino * (1 - F.cosine_similarity(seen, features[0][part]).mean())
        (loss * len(output) / len(x)).backward()
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
    device, autocast = pick_device("bf16" if config.weights == "bf16" else config.dtype)
    cuda = device.type == "cuda"
    rank, world = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    if config.batch_size % world:
        raise Refused(f"--batch-size {config.batch_size} is not a multiple of the processes")
    if world > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    data, out = Path(config.data), Path(config.out or f"out/{Path(config.data).name}")
    if config.data == Config.data and not (data / "meta.json").exists():
        make_model(config, {"latent_shape": (3, 32, 32), "text_dim": 1, "codec": "pixels"})
        prepare()                             # but only when the sizes are known to fit
    cache = Cache(data, device, config.repa, config.pdino)
    info = cache.meta | {"predict": config.predict, "shift": config.shift, "route": config.route}
    torch.manual_seed(config.seed)
    weights = torch.bfloat16 if config.weights == "bf16" else torch.float32
    network = make_model(config, info).to(device, weights)
    if config.init:
        with refusing(f"--init {config.init} does not fit"):
            network.load_state_dict(PRX.from_pretrained(config.init).state_dict())
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    averaged = [*network.parameters()]
    if config.repa:              # three layers, as in REPA; not averaged and so not in ema/
        dim, silu = info["teacher_shape"][0], nn.SiLU()
        network.projector = nn.Sequential(nn.Linear(config.width, dim), silu, nn.Linear(dim, dim),
                                          silu, nn.Linear(dim, dim)).to(device, weights)
    optimizers = make_optimizers(network, config)
    parts = {"network": network, "ema": ema, **optimizers}
    step, seconds, log = 0, 0.0, ["step,loss,grad_norm,seconds"]
    if (checkpoint := out / "ckpt.pt").exists():
        with refusing(f"{checkpoint} cannot go on"):
            state = torch.load(checkpoint, map_location=device, weights_only=True)
            refuse_differences(out, state["config"], vars(config), FREE)
            step, seconds, log = state["log"]
            for name, part in parts.items():
                part.load_state_dict(state.pop(name))                    # pop: frees the copy
    if config.compile == "on" or config.compile == "auto" and cuda:
        network.body = torch.compile(network.body)
    model = torch.nn.parallel.DistributedDataParallel(network) if world > 1 else network
    encode_text = load_text_encoder(info["text"], device, info["tokens"])
    cache.teacher = config.pdino and load_teacher(info["teacher"], device, info["teacher_shape"][1])
    cache.null = pad(encode_text([""]), info["tokens"])[0].to(device)            # (L, D)
    painter = ema.module, load_codec(info["codec"], device), encode_text, info
    stopped, parent = [], "TORCHELASTIC_RUN_ID" in os.environ and os.getppid()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stopped.append(True))
    loader = torch.utils.data.DataLoader(      # fork: workers share the maps, and ignore Ctrl-C
        cache, batch_sampler=batches(cache.starts[-1], config, step, rank, world), collate_fn=tuple,
        **(dict(num_workers=2, multiprocessing_context="fork", pin_memory=True) if cuda else {}))
    bar = tqdm(loader, total=config.steps, initial=step, unit=" pictures",
               unit_scale=config.batch_size, disable=None if rank == 0 else True)
    losses, start = [], time.perf_counter() - seconds
    for batch in bar:
        loss, norm = train_step(model, optimizers, cache, config, step, rank, autocast, batch)
        losses.append(loss)
        ema.multi_avg_fn([*ema.parameters()], averaged, None)            # no wait for the GPU
        step += 1
        last, keep = step == config.steps, step % config.save_every == 0
        look = last or step % config.sample_every == 0
        if not (last or keep or look or step % 10 == 0 or world == 1 and stopped):
            continue                          # reading the loss would wait for the device
        told = len(stopped) + (parent and os.getppid() != parent)       # or torchrun was killed
        both = torch.tensor([torch.stack(losses).mean() / world, told], device=device)
        if world > 1:                         # told to stop, all stop at the same step
            torch.distributed.all_reduce(both)
        loss, stop = both.tolist()
        if not np.isfinite(loss + norm.item()):
            raise Refused(f"the loss is not finite at step {step}, unsaved; begin anew, lower --lr")
        losses, seconds = [], time.perf_counter() - start
        if rank == 0:
            bar.set_postfix(step=step, loss=loss)
            log.append(f"{step},{loss:.5f},{norm.item():.4f},{seconds:.1f}")
            with whole_file(out / "log.csv") as file:
                file.write("\n".join([*log, ""]).encode())
            if look:
                pictures = autocast(draw)(*painter, info["examples"], range(len(info["examples"])))
                with whole_file(out / "samples" / f"step_{step:06d}.png") as file:
                    grid(pictures, info["examples"], 6).save(file, "png")
            if last or keep or stop:
                ema.module.save_pretrained(out / "ema")
                write_json(out / "ema" / "nanoprx.json", info)
                card = "---\npipeline_tag: text-to-image\n---\nFor `sample.py --run` of nanoPRX.\n"
                (out / "ema" / "README.md").write_text(card)
                with whole_file(checkpoint) as file:
                    torch.save({"config": vars(config), "log": (step, seconds, log)} | {
                        name: part.state_dict() for name, part in parts.items()}, file)
        if stop:
            break
    if rank == 0 and step < config.steps:
        print(f"stopped at step {step} and saved; the same command goes on")
    elif rank == 0:
        paths = sorted((out / "samples").glob("step_*.png"))
        first, *others = map(Image.open, paths[::-(len(paths) // 50 + 1)][::-1])     # 50 at most
        with whole_file(out / "learning.gif") as file:
            first.save(file, "gif", save_all=True, append_images=others, duration=400, loop=0)
        print(f"{out} finished in {seconds / 60:.1f} minutes; python sample.py --run {out} PROMPT")
        if info["source"] == "scenes":
            shares = autocast(score)(*painter)
            print("prompt accuracy:", *(f"{name} {part:.1%}" for name, part in shares.items()))
    if world > 1:
        torch.distributed.barrier()           # while the first process still draws and scores
        torch.distributed.destroy_process_group()

if __name__ == "__main__":
    run_script(Config, __doc__, train)
