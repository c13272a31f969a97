"""Train a text-to-image model on a cache of latents, by the PRX recipe.

    torchrun train.py                                   # the built-in monsters, minutes on a laptop
    torchrun --nproc_per_node=8 train.py --data data/photos --batch-size 1024

The same command again goes on where the run stopped. The folder of a run, out/monsters, has
ckpt.pt, ema/ (the averaged weights, to sample with), log.csv, samples/ and learning.gif.
"""

import collections
import copy
import dataclasses
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import model
import prepare
from model import PRX, PRXConfig, UserError, pad, pick_device, velocity, whole_file
from prepare import flag
from sample import draw, encode_prompts, grid, load_run, pictures_at_once, score, text_mask


@dataclasses.dataclass
class Settings:
    """All settings of a run. Each field is a flag. PRX's FIDs compare with 18.20, its baseline."""

    data: str = flag("data/monsters", "a cache that prepare.py wrote")
    out: str = flag("", "folder of the run; '': out/ and the cache's name")
    init: str = flag("", "a run to begin with; its sizes, predict and shift stay")
    steps: int = flag(900, "optimizer steps; with more a finished run goes on", 1)
    batch_size: int = flag(64, "pictures in a step, over all processes (PRX: 256)", 1, 2**16)
    micro_batch: int = flag(0, "pictures a process takes at once, to save memory; 0: all")
    held_out: float = flag(0.02, "share for validation, of 4 to 1,024 pictures, or none", 0, 0.5)
    seed: int = flag(0, "of all chance, such as weights, order and noise", 0, 4095)
    save_every: int = flag(500, "steps from checkpoint to checkpoint", 1)
    sample_every: int = flag(150, "steps from sample grid to sample grid", 1)
    patch_size: int = flag(0, "side of a token in latents; 0: 8 or more for pixels, else 2")
    width: int = flag(0, "hidden size; 0: 128 for pixels, else 384 (PRX: 1792)")
    depth: int = flag(0, "blocks; 0: 3 for pixels, else 8 (PRX: 16)")
    bottleneck: int = flag(64, "width of the bottleneck of pixel patches (PRX: 256); 0: none")
    predict: str = flag("x", "clean picture (JiT; PRX on pixels) or velocity", choices=("x", "v"))
    t_floor: float = flag(0.5, "smallest t that the loss divides by (JiT, PRX: 0.05)", 0.001, 1)
    shift: float = flag(3.0, "timestep shift, in sampling too (PRX: 3 at 1024 px)", 0.01)
    repa: float = flag(0.0, "weight of REPA, with extras/teacher.py (PRX: 0.5, FID 14.64)")
    route: float = flag(0.0, "share of tokens that skip blocks (TREAD; PRX: 0.5)", 0, 0.95)
    caption_dropout: float = flag(0.1, "share of captions left empty (PRX: 0.1)", 0, 1)
    optimizer: str = flag("muon", "PRX: FID 15.55, adamw 18.20", choices=("muon", "adamw"))
    muon_lr: float = flag(1e-2, "learning rate of Muon (PRX: 1e-4)")
    lr: float = flag(6e-3, "learning rate of AdamW (PRX: 1e-4)")
    warmup: int = flag(30, "steps of linear warm-up (PRX: 1,000)")
    cooldown: float = flag(0.5, "last share of the steps, with a linear cool-down (PRX: 0)", 0, 1)
    clip: float = flag(1.0, "norm to which gradients are clipped (PRX: 0.2)", 1e-6)
    ema: float = flag(0.98, "decay of the average a step (PRX: 0.999 every 10 steps)", 0, 0.99999)
    device: str = flag("auto", "the best there is", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products", choices=("auto", "bf16", "fp32"))
    compile: bool = flag(False, "torch.compile the blocks, which pays in long runs on a GPU")

    def __post_init__(self):
        self.out = self.out or f"out/{Path(self.data).resolve().name}"
        for name in ("patch_size", "width", "depth", "bottleneck", "predict", "shift"):
            if self.init and getattr(self, name) != getattr(Settings, name):
                raise UserError(f"--init has a {name} of its own; leave the flag for it out")


# --------------------------------------------------------------------------------------- the data
class Cache:
    """What prepare.py wrote, mapped into memory. Raises UserError where it is none, or broken."""

    def __init__(self, folder, with_teacher=False):
        self.folder = Path(folder)
        self.meta = meta = model.read_json(self.folder / "meta.json")
        if with_teacher and "teacher_shape" not in meta:
            raise UserError(f"{folder} has no features for --repa; extras/teacher.py makes them")
        try:
            n = meta["count"]
            self.lengths = self.map("lengths.bin", np.int32, n)
            self.ends = self.lengths.cumsum(dtype=np.int64)  # of each caption's rows in text
            self.text = self.map("text.bin", np.float16, self.ends[-1], meta["text_dim"])
            self.digests = self.map("digest.bin", np.uint32, n)
            self.arrays = [self.map("latents.bin", meta["latent_dtype"], n, *meta["latent_shape"])]
            if with_teacher:
                self.arrays += [self.map("teacher.bin", np.float16, n, *meta["teacher_shape"])]
        except (KeyError, OSError, ValueError) as error:
            raise UserError(f"{folder} is no whole cache; delete and remake it: {error}") from error

    def map(self, name, dtype, *shape):
        """An array, read from the disk where it is used; indexing an np.memmap itself is slow."""
        return np.asarray(np.memmap(self.folder / name, dtype, "r", shape=tuple(map(int, shape))))

    def split(self, share):
        """The indices to train on, and those held out: a share, at most about 1,024, by a hash of
        pixels, so that equal pictures are on one side. Fewer than 4 are none."""
        share = min(share, 1024 / len(self.digests))
        is_held_out = self.digests < share * 2**32  # hashes are uniform
        if not 4 <= is_held_out.sum() < len(is_held_out):
            is_held_out[:] = False
        return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)

    def load(self, indices):
        """Examples as a list of tensors: latents (B, C, H, W), uint8 or float16 as stored, text
        (B, T, D) float32, padded with zeros to the T of the longest caption in the cache, and, with
        a teacher, its features (B, its D, h, w) float16. Raises UserError if one is not finite."""
        text = np.zeros((len(indices), self.meta["tokens"], self.meta["text_dim"]), np.float32)
        for place, index in enumerate(indices):
            stop, length = self.ends[index], self.lengths[index]
            text[place, :length] = self.text[stop - length : stop]
        stacked = [np.stack([array[index] for index in indices]) for array in self.arrays]
        arrays = [stacked[0], text, *stacked[1:]]
        if not all(np.isfinite(array).all() for array in arrays):
            raise UserError(f"{self.folder} holds values that are not finite; delete and remake it")
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
def make_model(settings, meta, first):
    """A network for the latents of a cache, and the info to draw with it. With --init both are of
    the run `first` (--init's, or later this one), as its weights depend on how they were trained
    (prediction, shift, mask) and on the mean and std of latents. Raises UserError."""
    repa_dim = meta["teacher_shape"][0] if settings.repa else None
    if settings.init:
        start, info = load_run(first)
        for name in ("codec", "text"):
            if meta[name] != info[name]:
                raise UserError(f"{first} takes --{name} {info[name]}: prepare {settings.data} so")
        network = PRX(start.config, repa_dim)
        network.load_state_dict(start.state_dict(), strict=False)  # a projector is not saved
        kept = ("predict", "shift", "mask", "mean", "std", "steps", "guidance")
        return network, meta | {name: info[name] for name in kept}
    side, is_pixels = meta["latent_shape"][1], meta["codec"] == "pixels"
    width = settings.width or (128 if is_pixels else 384)
    heads = max(4, width // 64)
    patch = settings.patch_size or (max(8, side // 16) if is_pixels else 2)
    if width % (4 * heads) or side % patch:  # a head is halved twice: by rows and columns, in pairs
        raise UserError(f"--width takes multiples of 64, --patch-size divisors of {side}")
    config = PRXConfig(
        in_channels=meta["latent_shape"][0],
        patch_size=patch,
        context_in_dim=meta["text_dim"],
        hidden_size=width,
        mlp_ratio=3.0,  # PRX: 3.5
        num_heads=heads,
        depth=settings.depth or (3 if is_pixels else 8),
        axes_dim=(width // heads // 2, width // heads // 2),
        theta=100,  # 2403.13298, for few tokens; PRX: 10000
        bottleneck_size=(settings.bottleneck or None) if is_pixels else None,
    )
    how = {"predict": settings.predict, "shift": settings.shift, "mask": False}
    return PRX(config, repa_dim), meta | how | {"steps": 20, "guidance": 2.0}


class Muon(torch.optim.Optimizer):
    """Momentum whose updates are made orthogonal (kellerjordan.github.io/posts/muon), so that all
    directions learn alike. Updates are as large as AdamW's (arXiv 2502.16982)."""

    def __init__(self, matrices, lr, momentum, dtype):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})
        self.dtype = dtype  # of the products: bfloat16, or float32 where that is slow

    @torch.no_grad()
    def step(self):
        """Update all matrices, those of one shape together."""
        group, by_shape = self.param_groups[0], collections.defaultdict(list)
        for p in group["params"]:
            if "average" not in self.state[p]:
                self.state[p]["average"] = torch.zeros_like(p)
            by_shape[p.shape].append(p)
        for shape, parameters in by_shape.items():
            averages = [self.state[p]["average"] for p in parameters]
            gradients = [p.grad for p in parameters]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            # Nesterov looks ahead, to the average after another gradient like this one.
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
            updates = newton_schulz(torch.stack(ahead).to(self.dtype)).to(ahead[0].dtype)
            # An orthogonal matrix has an RMS of 1 / sqrt(longer side); AdamW's updates have 0.2.
            rate = group["lr"] * 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(parameters, list(updates), alpha=-rate)


def newton_schulz(x):
    """Move the singular values of matrices x (N, rows, columns) near 1, by a polynomial in x."""
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if is_tall else x  # the smaller Gram matrix
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # x becomes 3.4445 x - 4.775 (x xT) x + 2.0315 (x xT)^2 x
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


def make_optimizers(network, settings, compute):
    """AdamW, and Muon for the matrices that tokens go through in blocks (PRX: modulation, too, and
    momentum 0.95), q, k and v as one, in a dict by the settings that are their learning rates."""
    rest, matrices = [], []
    for name, p in network.named_parameters():
        is_matrix = name.startswith("blocks.") and p.ndim == 2 and "modulation" not in name
        group = matrices if is_matrix and settings.optimizer == "muon" else rest
        group.append(p)
    adamw = torch.optim.AdamW(rest, settings.lr, (0.9, 0.95), weight_decay=0, fused=True)
    if not matrices:
        return {"lr": adamw}
    return {"lr": adamw, "muon_lr": Muon(matrices, settings.muon_lr, 0.9, compute.dtype)}


# --------------------------------------------------------------------------------- a training step
def normalize(latents, info):
    """Latents (B, C, H, W) as stored, uint8 or float16, to float32, mean 0 and std 1 a channel."""
    if latents.dtype == torch.uint8:
        latents = latents / 127.5 - 1
    mean, std = torch.tensor([info["mean"], info["std"]], device=latents.device)[..., None, None]
    return (latents.float() - mean) / std


def make_batch(examples, run):
    """What `compute_loss` takes, from examples as `Cache.load` gives them: a dict of x, noise
    (B, C, H, W), t (B,) in [0.001, 1], text (B, T, D), and, if asked for, keep (B, S), the numbers
    of the tokens that go through all blocks, and a teacher's features (B, L, its D).

    Chance is drawn for the whole batch, from seed and step alone, and each process takes its rows.
    """
    latents, text, *features = examples
    settings, device, count = run.settings, latents.device, run.settings.batch_size
    mine = slice(run.rank, None, run.world_size)  # as `index_batches` shares examples
    # A CPU's generator reads 32 bits of its seed: 12 for --seed, and 20 for the step.
    dice = torch.Generator(device).manual_seed(settings.seed * 2**20 + run.step)
    noise = torch.randn(count, *latents.shape[1:], generator=dice, device=device)[mine]
    t = model.sample_timesteps(count, run.info["shift"], dice)[mine]
    dropped = torch.rand(count, generator=dice, device=device)[mine] < settings.caption_dropout
    text = torch.where(dropped[:, None, None], run.empty_caption, text)
    batch = {"x": normalize(latents, run.info), "noise": noise, "t": t, "text": text}
    rows, columns = (side // run.model.config.patch_size for side in latents.shape[2:])
    if settings.route > 0:
        kept = max(1, round(rows * columns * (1 - settings.route)))
        chances = torch.rand(count, rows * columns, generator=dice, device=device)[mine]
        batch["keep"] = chances.argsort(1)[:, :kept]  # (B, S)
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
    output = network(x_t, t, text, text_mask(text, info), keep)
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
    """Linear warm-up to 1, and a linear cool-down almost to 0 at the end."""
    warmup = (step + 1) / max(1, settings.warmup)
    cooldown = (settings.steps - step) / max(1, settings.cooldown * settings.steps)
    return min(1, warmup, cooldown)


def train_step(run, batch):
    """One step of all optimizers. Returns (3,): this process's error of velocities and REPA's, and
    the norm of the gradients before clipping."""
    settings, count = run.settings, len(batch["x"])
    micro = settings.micro_batch or count
    losses = torch.zeros(2, device=batch["x"].device)
    for first in range(0, count, micro):
        part = {name: each[first : first + micro] for name, each in batch.items()}
        share = len(part["x"]) / count
        with run.compute.autocast():
            mse, repa = compute_loss(run.model, part, run.info, settings.t_floor)
        ((mse + settings.repa * repa) * share).backward()
        losses += torch.stack((mse, repa)).detach() * share
    if run.world_size > 1:
        for p in run.model.parameters():  # the mean over processes, of equal shares of the batch
            dist.all_reduce(p.grad)
            p.grad /= run.world_size
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    for name, optimizer in run.optimizers.items():
        rate = getattr(settings, name) * learning_rate_factor(run.step, settings)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        averages, weights = list(run.ema.parameters()), list(run.model.parameters())
        torch._foreach_lerp_(averages, weights, 1 - settings.ema)
    run.step += 1
    return torch.cat((losses, norm[None]))


@torch.no_grad()
def validate(run):
    """The averaged weights' held-out loss, or nan. Noise and t are fixed, and t is not shifted."""
    losses, at_once = [], pictures_at_once(run.info["latent_shape"])
    for first in range(0, len(run.held_out), at_once):
        examples = run.cache.load(run.held_out[first : first + at_once])
        latents, text, *_ = (example.to(run.compute.device) for example in examples)
        dice = torch.Generator().manual_seed(first)
        noise = torch.randn(latents.shape, generator=dice).to(latents.device)
        t = (torch.arange(len(text), device=text.device) + 0.5) / len(text)
        batch = {"x": normalize(latents, run.info), "noise": noise, "t": t, "text": text}
        with run.compute.autocast():
            mse, _ = compute_loss(run.ema, batch, run.info, run.settings.t_floor)
        losses += [mse.item()] * len(text)
    return sum(losses) / len(losses) if losses else math.nan


# ---------------------------------------------------------------------------------------- the run
class Run:
    """What goes on: the data, the model, its average (EMA), the optimizers, how far they are."""

    def __init__(self, settings, compute, rank=0, world_size=1):
        self.settings, self.compute = settings, compute
        self.rank, self.world_size, self.folder = rank, world_size, Path(settings.out)
        self.step, self.rows = 0, []  # rows of log.csv, dicts by column
        self.cache = Cache(settings.data, with_teacher=settings.repa > 0)
        self.trained, self.held_out = self.cache.split(settings.held_out)
        is_resumed, meta = (self.folder / "ckpt.pt").exists(), self.cache.meta
        torch.manual_seed(settings.seed)
        first = self.folder if is_resumed else settings.init
        self.model, self.info = make_model(settings, meta, first)
        self.model.to(compute.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(self.model, settings, compute)
        self.parts = {"model": self.model, "ema": self.ema} | self.optimizers
        if is_resumed:
            self.load()
        if settings.compile:
            for block in self.model.blocks:  # all alike, so that the first is compiled for all
                block.compile()
        captions = prepare.read_captions(self.cache.folder)
        examples = [captions[index] for index in self.held_out[:100]] + captions[:100]
        self.info["examples"] = list(dict.fromkeys(examples))[:12]  # no caption twice
        if meta["text"] == "words":
            words = {word for caption in captions for word in model.Words().tokenize(caption)}
            self.info["words"] = sorted(words)
        self.embeddings = encode_prompts(self.info["examples"], self.info, compute)
        # That of the empty caption comes first. It is padded like the captions of the cache.
        self.empty_caption = pad(self.embeddings[:1], meta["tokens"]).to(compute.device)

    def fixed(self):
        """What must not change when a run goes on. Steps, learning rates and the like may."""
        names = ("init", "seed", "batch_size", "held_out", "optimizer", "repa", "route")
        how = {name: getattr(self.settings, name) for name in names}
        names = ("codec", "text", "count", "bytes", "mean")  # by which data are known
        how |= {name: self.cache.meta[name] for name in names}
        how |= {name: self.info[name] for name in ("predict", "shift", "mask")}
        return how | dataclasses.asdict(self.model.config)

    def save(self):
        """Write the checkpoint, and the average with all it takes to draw. Raises UserError."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "rows": self.rows, "fixed": self.fixed()}
        self.ema.save_pretrained(self.folder / "ema")
        model.write_json(self.folder / "ema" / "nanoprx.json", self.info)
        with whole_file(self.folder / "ckpt.pt") as file:
            torch.save(state, file)

    def load(self):
        """Go on from the checkpoint. Raises UserError if it is of another run, or broken."""
        path = self.folder / "ckpt.pt"
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            fixed, self.step, self.rows = (state[name] for name in ("fixed", "step", "rows"))
        except Exception as error:  # of torch.load come many
            raise UserError(f"{path} is broken or of another program; use a new --out") from error
        prepare.refuse_differences(self.folder, fixed, self.fixed())
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def measure(self, results, seconds):
        """Add a row to the log: means over steps and processes of `train_step`'s results, learning
        rates, and the speed of these steps. Raises UserError if a mean is infinite or nan."""
        means = torch.stack(results).mean(0)
        if self.world_size > 1:
            dist.all_reduce(means)
        means = (means / self.world_size).tolist()
        if not all(map(math.isfinite, means)):
            raise UserError(f"the loss is infinite at step {self.step}; begin anew, lower --lr")
        row = {"step": self.step, "loss": means[0], "repa_loss": means[1], "grad_norm": means[2]}
        row |= {name: each.param_groups[0]["lr"] for name, each in self.optimizers.items()}
        row["pictures_per_second"] = len(results) * self.settings.batch_size / seconds
        self.rows.append(row | {"held_out_loss": math.nan})


def write_log(run):
    """Write log.csv anew, so that it has no row later than the checkpoint a run went on from."""
    lines = [",".join(row) for row in run.rows[:1]]  # the names of columns
    lines += [",".join(f"{value:.8g}" for value in row.values()) for row in run.rows]
    with whole_file(run.folder / "log.csv") as file:
        file.write("\n".join([*lines, ""]).encode())


def save_grid(run):
    """Draw the prompts of the run into samples/."""
    prompts = run.info["examples"]
    pictures = draw(run.ema, run.info, run.compute, run.embeddings, range(len(prompts)))
    with whole_file(run.folder / "samples" / f"step_{run.step:06d}.png") as file:
        grid(pictures, prompts, 6).save(file, "png")


def save_film(run):
    """Make learning.gif of the run's grids in samples/."""
    paths = [run.folder / "samples" / f"step_{row['step']:06d}.png" for row in run.rows]
    # A GIF has 256 colours. The method FASTOCTREE, 2, keeps those of small things true, too.
    sheets = [Image.open(path).quantize(method=2) for path in paths if path.exists()]
    if sheets:  # unless the user has deleted them
        durations = [400] * (len(sheets) - 1) + [2000]  # in milliseconds
        how = {"save_all": True, "append_images": sheets[1:], "duration": durations, "loop": 0}
        with whole_file(run.folder / "learning.gif") as file:
            sheets[0].save(file, "gif", **how)


# ------------------------------------------------------------------------------------ the main part
def join_processes(settings, device):
    """The rank of this process and the number of those that torchrun started. The first draws the
    built-in monsters, if they are not there. Raises UserError if a batch cannot be shared."""
    rank, world_size = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    if settings.batch_size % world_size:
        raise UserError(f"--batch-size is no multiple of the {world_size} processes")
    has_data = Path(settings.data, "meta.json").exists()
    if rank == 0 and settings.data == Settings.data and not has_data:
        prepare.prepare(prepare.Settings(device=settings.device))
    if world_size > 1:  # the others wait here for the first
        # Tensors on the CPU, such as that of `train_loop`, need gloo.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world_size


def train(settings):
    """Train, or go on with the run in its folder. Raises UserError where data or run are wrong."""
    compute = pick_device(settings.device, settings.dtype)
    if settings.compile and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--compile needs a compiler; install g++")
    rank, world_size = join_processes(settings, compute.device)
    run = Run(settings, compute, rank, world_size)
    if rank == 0:
        write_log(run)
        size = sum(weight.numel() for weight in run.model.parameters())
        print(f"{size:,} parameters on {world_size} x {compute.device.type}, {compute.dtype}")
        print(f"{len(run.trained):,} pictures, {len(run.held_out):,} held out; step {run.step:,}")
    was_stopped = train_loop(run)
    if rank == 0 and was_stopped:
        print(f"stopped at step {run.step} and saved; the same command goes on")
    elif rank == 0:
        save_film(run)
        print(f"{settings.out} is trained; draw with: python sample.py --run {settings.out} PROMPT")
        if run.info["source"] == "":
            accuracies = score(run.ema, run.info, compute, 64).items()
            print("quick score", *(f"{name} {share:.1%}" for name, share in accuracies), sep=", ")
    if world_size > 1:
        dist.barrier()  # while the first process draws and scores
        dist.destroy_process_group()


def handle_signals(handler):
    """Let a function handle Ctrl-C, torchrun's signal, and that of a terminal that is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, Windows has none
            signal.signal(number, handler)


def train_loop(run):
    """Steps, samples and checkpoints until the end, or until told to stop: then it returns True."""
    settings, device, is_first = run.settings, run.compute.device, run.rank == 0
    stop_asked = threading.Event()
    handle_signals(lambda number, frame: stop_asked.set())
    indices = index_batches(run.trained, settings, run.step, run.rank, run.world_size)
    bar = tqdm(total=settings.steps, initial=run.step, disable=None if is_first else True)
    results, began = [], time.perf_counter()  # of the steps since the last row of the log
    for examples in prepare.map_ahead(run.cache.load, indices, 1):
        batch = make_batch([example.to(device) for example in examples], run)
        results.append(train_step(run, batch))
        bar.update()
        stops = torch.tensor(float(stop_asked.is_set()))
        if run.world_size > 1:
            dist.all_reduce(stops)  # told to stop, all stop at the same step
        is_last, must_stop = run.step == settings.steps, bool(stops > 0)
        must_draw = is_last or run.step % settings.sample_every == 0
        must_save = is_last or must_stop or run.step % settings.save_every == 0
        if not (must_draw or must_save or run.step % 10 == 0):  # reading the loss takes time
            continue
        run.measure(results, time.perf_counter() - began)
        row = run.rows[-1]
        bar.set_postfix(loss=row["loss"])
        if must_draw and is_first:
            row["held_out_loss"] = validate(run)
            save_grid(run)
            bar.write(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if is_first:
            write_log(run)
        if must_save and is_first:
            run.save()
        if must_stop:
            return True
        results, began = [], time.perf_counter()  # so that drawing and saving do not count
    handle_signals(signal.default_int_handler)
    return stop_asked.is_set()


if __name__ == "__main__":
    prepare.run_script(train, Settings, __doc__)
