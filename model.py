"""Every network of nanoPRX: the PRX transformer, its flow, and the frozen ones that others trained.

Parameters carry the names of the public checkpoints, so that `load_state_dict` is the loader.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import unicodedata
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class UserError(Exception):
    """A user's mistake. The text is one sentence: what is wrong, where, and what to do."""


# ---------------------------------------------------------------------------- the PRX transformer
@dataclasses.dataclass
class PRXConfig:
    """Sizes of the network, under diffusers' names. The defaults are PRX-small's (1.2 B)."""

    in_channels: int = 16  # channels of the latents, 3 for pixels
    patch_size: int = 2  # a token is patch_size x patch_size latents
    context_in_dim: int = 2304  # width of the text embeddings
    hidden_size: int = 1792
    mlp_ratio: float = 3.5
    num_heads: int = 28
    depth: int = 16
    axes_dim: tuple = (32, 32)  # rotary dimensions for rows and for columns, together a head
    theta: int = 10000
    time_factor: float = 1000.0  # multiplies timesteps before their cosines and sines are taken
    time_max_period: int = 10000  # the longest period of these
    bottleneck_size: int | None = None  # width between two layers that read pixel patches


def rope_table(rows, columns, axes_dim, theta, device):
    """Cosines and sines (2, rows * columns, d / 2), d = sum(axes_dim), of the 2-D rotary embedding
    (2104.09864): axes_dim[0] dimensions of a head turn with a token's row, the others with its
    column."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    angles = []
    for position, dim in ((row, axes_dim[0]), (column, axes_dim[1])):
        rates = theta ** -(torch.arange(0, dim, 2, device=device) / dim)
        angles.append(position[:, None] * rates)
    angles = torch.cat(angles, dim=1)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x, rope):
    """Turn each pair (a, b) in the last axis of x (B, heads, L, d) by the angles whose cosines and
    sines are in rope (2, ..., L, d / 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def split_heads(x, heads):
    """(B, L, heads * d) to (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def modulate(x, shift, scale):
    """LayerNorm of x (B, L, D), then times 1 + scale and plus shift, both (B, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Attention(nn.Module):
    """Image tokens look at text and image tokens in one call; text makes keys and values only."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.img_qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.txt_kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_added_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, img, txt, rope, mask):
        """img (B, L, D), txt (B, T, D), rope (2, ..., L, d / 2) and mask (B, T) to (B, L, D)."""
        qkv = self.img_qkv_proj(img)
        q, k, v = split_heads(qkv.float(), 3 * self.heads).chunk(3, dim=1)
        txt_k, txt_v = split_heads(self.txt_kv_proj(txt).float(), 2 * self.heads).chunk(2, dim=1)
        q = apply_rope(self.norm_q(q), rope)
        k = torch.cat((self.norm_added_k(txt_k), apply_rope(self.norm_k(k), rope)), dim=2)
        v = torch.cat((txt_v, v), dim=2)  # (B, heads, T + L, d)
        if mask is not None:  # image tokens are always seen
            mask = F.pad(mask, (0, img.shape[1]), value=True)[:, None, None]  # (B, 1, 1, T + L)
        # On a CPU flash attention is up to seven times slower in bf16, which autocast would choose.
        dtype = torch.float32 if img.device.type == "cpu" else qkv.dtype
        with torch.autocast(img.device.type, enabled=False):
            out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a gated MLP; the timestep gives each a shift, a scale and a gate (adaLN-zero
    of DiT, arXiv 2212.09748)."""

    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        inner = int(width * config.mlp_ratio)
        self.attention = Attention(width, config.num_heads)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.modulation = nn.ModuleDict({"lin": nn.Linear(width, 6 * width)})

    def forward(self, img, txt, time, rope, mask):
        """img (B, L, D), txt (B, T, D), time (B, D), rope and mask as above, to (B, L, D)."""
        modulation = self.modulation["lin"](F.silu(time))[:, None]  # (B, 1, 6 D)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)
        y = self.attention(modulate(img, shift, scale), txt, rope, mask)
        img = torch.addcmul(img, gate, y)
        y = modulate(img, mlp_shift, mlp_scale)
        y = self.down_proj(F.gelu(self.gate_proj(y), approximate="tanh") * self.up_proj(y))
        return torch.addcmul(img, mlp_gate, y)


class PRX(nn.Module):
    """The PRX transformer. repa_dim, the width of a teacher's features, adds REPA's projector
    (arXiv 2410.06940; PRX: FID 18.20 to 14.64) behind the middle block."""

    def __init__(self, config, repa_dim=None):
        super().__init__()
        self.config = config
        width, neck = config.hidden_size, config.bottleneck_size
        patch_dim = config.in_channels * config.patch_size**2
        if neck is None:
            self.img_in = nn.Linear(patch_dim, width)
        else:
            self.img_in = nn.Sequential(nn.Linear(patch_dim, neck), nn.Linear(neck, width))
        time_layers = {"in_layer": nn.Linear(256, width), "out_layer": nn.Linear(width, width)}
        self.time_in = nn.ModuleDict(time_layers)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        final_layers = {"adaLN_modulation": modulation, "linear": nn.Linear(width, patch_dim)}
        self.final_layer = nn.ModuleDict(final_layers)
        for name, parameter in self.named_parameters():
            if "modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)  # blocks begin as the identity, the output as 0
        self.checkpoint_blocks = False
        self.projector = None
        if repa_dim is not None:
            layers = [nn.Linear(width, repa_dim), nn.SiLU(), nn.Linear(repa_dim, repa_dim)]
            self.projector = nn.Sequential(*layers, nn.SiLU(), nn.Linear(repa_dim, repa_dim))

    def forward(self, x, t, text, mask=None, keep=None):
        """Noisy latents x (B, C, H, W), timesteps t (B,) in [0, 1], 1 being noise, and text
        (B, T, D) to clean latents or velocity (B, C, H, W), whichever was trained.

        Rows of zeros in text are padding: `txt_in` makes them a token that the model learns to
        ignore, so that attention takes the flash kernel, which has no mask. mask (B, T), True at
        text, hides others. keep (B, S) numbers the tokens that stay in the routed blocks (TREAD,
        arXiv 2501.04765; PRX: FID 18.20 to 21.61 at 256 px, 17.42 to 14.10 at 1024), as [[1, 4]]:

            0 1 2 3 4 5 -> first blocks -> 0   2 3   5 -----------------> 0 1 2 3 4 5 -> last ones
                                             1     4   -> routed blocks -> 1     4

        In training mode a projector's features of the tokens (B, L or S, repa_dim) come second.
        """
        patch = self.config.patch_size
        rows, columns = x.shape[2] // patch, x.shape[3] // patch
        img = self.img_in(F.pixel_unshuffle(x, patch).flatten(2).mT)  # (B, L, D)
        txt = self.txt_in(text)
        time = self.embed_timesteps(t)
        all_rope = rope_table(rows, columns, self.config.axes_dim, self.config.theta, x.device)
        rope = all_rope
        features = None
        # TREAD routes blocks 2 to 12 of 16 (PRX), 2 to 6 of 8, 1 of 3, and never the last one.
        depth = len(self.blocks)
        first, last = min(2, depth // 3), max(0, min(depth * 3 // 4, depth - 2))
        for number, block in enumerate(self.blocks):
            if keep is not None and number == first:
                all_img = img
                kept_rows = keep[:, :, None].expand(-1, -1, img.shape[2])  # (B, S, D)
                img = img.gather(1, kept_rows)
                rope = all_rope[:, keep][:, :, None]  # (2, B, 1, S, d / 2)
            if self.checkpoint_blocks and self.training:  # computed a second time in backward
                inputs = (img, txt, time, rope, mask)
                img = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
            else:
                img = block(img, txt, time, rope, mask)
            # The 8th of 16, as in PRX, and always a routed one: compute_loss counts on S tokens.
            is_middle = number == max(first, depth // 2 - 1)
            if is_middle and self.projector is not None and self.training:
                features = self.projector(img)
            if keep is not None and number == last:
                img = all_img.scatter(1, kept_rows, img)
                rope = all_rope
        shift, scale = self.final_layer["adaLN_modulation"](time)[:, None].chunk(2, dim=-1)
        img = self.final_layer["linear"](modulate(img, shift, scale))  # (B, L, C * patch * patch)
        output = F.pixel_shuffle(img.mT.unflatten(2, (rows, columns)), patch)
        return output if features is None else (output, features)

    def embed_timesteps(self, t):
        """Cosines and sines of t (B,) at 128 rates (arXiv 1706.03762), and two layers: (B, D)."""
        exponents = torch.arange(128, device=t.device) / 128
        rates = torch.exp(-math.log(self.config.time_max_period) * exponents)
        angles = (t.float() * self.config.time_factor)[:, None] * rates
        waves = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return self.time_in["out_layer"](F.silu(self.time_in["in_layer"](waves)))

    @classmethod
    def from_pretrained(cls, folder):
        """The model in a folder of diffusers' layout. Raises UserError if it holds none."""
        with torch.device("meta"):  # shapes only; load_weights puts the tensors of the file in
            model = cls(read_config(folder))
        return load_weights(model, read_weights(folder, *PRX_FILES), folder)

    def save_pretrained(self, folder):
        """Write config and weights, without REPA's projector, for diffusers and for us."""
        weights = {k: w for k, w in self.state_dict().items() if not k.startswith("projector.")}
        with whole_file(Path(folder) / PRX_FILES[0]) as file:
            save_file(weights, file.name, metadata={"format": "pt"})
        config = {"_class_name": "PRXTransformer2DModel", **dataclasses.asdict(self.config)}
        write_json(Path(folder) / "config.json", config)


PRX_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*.safetensors")


def read_config(folder):
    """The PRXConfig in a folder of diffusers' layout. Raises UserError if it holds none."""
    saved = read_json(Path(folder) / "config.json")
    names = [field.name for field in dataclasses.fields(PRXConfig)]
    config = PRXConfig(**{name: saved[name] for name in names if name in saved})
    return dataclasses.replace(config, axes_dim=tuple(config.axes_dim))  # JSON made it a list


# --------------------------------------------------------------------------------------- the flow
# x_t = (1 - t) x + t noise leads straight from a picture x (t = 0) to noise (t = 1). Its velocity,
# noise - x, is the same all along the line (rectified flow, arXiv 2209.03003).
def velocity(output, x_t, t, predict, t_floor=0.0):
    """The velocity that a model's output (B, C, H, W) at x_t and t (B,) stands for: itself ("v"),
    or that from a clean picture ("x"; JiT, 2511.13720), for which t is clamped at t_floor, since
    near t = 0 the division blows up small errors."""
    if predict == "v":
        return output
    return (x_t - output) / t.clamp(min=t_floor)[:, None, None, None]


def shift_time(t, shift):
    """Move timesteps t in [0, 1] towards noise, as large pictures need it (SD3, 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(n, shift, generator):
    """n timesteps in [0.001, 1]: sigmoids of a normal (SD3), but three in ten uniform (PRX: one),
    shifted. Their quantiles are evenly spaced (VDM, arXiv 2107.00630), which calms the loss."""
    device = generator.device
    start = torch.rand(1, generator=generator, device=device)
    quantiles = (torch.arange(n, device=device) / n + start) % 1
    normal = math.sqrt(2) * torch.erfinv(2 * quantiles - 1)  # the normal's values at them
    is_uniform = torch.rand(n, generator=generator, device=device) < 0.3
    return shift_time(torch.where(is_uniform, quantiles, normal.sigmoid()), shift).clamp(min=1e-3)


# ------------------------------------------------------------------------------- device and files
@dataclasses.dataclass
class Compute:
    """A device, and the type in which it multiplies matrices (for attention see `Attention`)."""

    device: torch.device
    dtype: torch.dtype  # bfloat16, float32, or float16, which wants a GradScaler
    reason: str = ""  # in words, for the user

    def autocast(self):
        """A context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def pick_device(device="auto", dtype="auto"):
    """The Compute for a device and a type by name: the one place that knows what devices are good
    at. "auto" is CUDA, else MPS, else the CPU. Raises UserError if the device is not there."""
    is_available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if device == "auto":
        device = next((name for name, check in is_available.items() if check()), "cpu")
    elif device != "cpu" and not is_available[device]():
        raise UserError(f"--device {device}: torch {torch.__version__} finds no such device here")
    best, reason = "fp32", "the safe choice"
    if device == "cuda":
        torch.cuda.set_device(int(os.getenv("LOCAL_RANK", "0")))  # which torchrun sets
        torch.set_float32_matmul_precision("high")  # TF32
        best, reason = "fp16", "it has no units for bf16"
        if torch.cuda.is_bf16_supported(including_emulation=False):
            best, reason = "bf16", "it has units for it"
    if device == "cpu":
        # A CPU without bf16 units emulates them, 50 times slower than float32. Intel's AVX-512
        # without AMX has them and is slower all the same. Old versions of torch cannot tell: {}.
        found = getattr(torch.cpu, "get_capabilities", dict)()
        is_intel = "Intel" in str(found.get("cpu_name"))
        reason = "it has no fast units for bf16"
        if found.get("amx_bf16") or (found.get("avx512_bf16") and not is_intel):
            best, reason = "bf16", "it has units for it"
    if dtype != "auto":
        best, reason = dtype, "as asked"
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return Compute(torch.device(device), dtypes[best], f"{device} computes in {best}: {reason}")


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to. It gets its name only when it is complete and on the disk; until
    then an older file of that name stays. Raises UserError if it cannot be written."""
    unfinished = Path(f"{path}.partial")
    try:
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_json(path, value):
    """Write value as JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())


def read_json(path):
    """The object in a JSON file. Raises UserError if it is missing or broken."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no JSON object: {error}") from error


def fetch(source, *patterns):
    """The folder `source`, or the one with a Hub repository's files of such names. Says how much is
    to be downloaded. Raises UserError if there is neither."""
    if Path(source).is_dir():
        return Path(source)
    download = partial(huggingface_hub.snapshot_download, source, allow_patterns=patterns)
    try:
        with contextlib.suppress(huggingface_hub.errors.DryRunError):  # without a network
            size = sum(file.file_size or 0 for file in download(dry_run=True) if file.will_download)
            if size > 1e7:
                print(f"{source}: downloading {size / 1e9:.2f} GB")
        return Path(download())
    except Exception as error:  # the library passes on the errors of three others
        raise UserError(
            f"{source} is no folder, and the Hub does not give it ({type(error).__name__}); check "
            "name and network, and log in (hf auth login) if it is private or gated"
        ) from error


def read_weights(folder, *patterns):
    """The tensors in a folder's safetensors files of such names, mapped from disk. Raises
    UserError."""
    weights = {}
    for path in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
        try:
            weights.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    return weights


def load_weights(network, weights, source, compute=None):
    """Put weights into a network. If compute is given, freeze it and move it there: in bf16 on a
    GPU that has it; on a CPU float32 stays on the disk and is read when used. Raises UserError if
    names or shapes do not fit."""
    try:
        network.load_state_dict(weights, assign=True)  # so it may be on the "meta" device
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:600]
        raise UserError(f"the weights in {source} do not fit: {reason}") from error
    if compute is None:
        return network.float()
    is_bf16 = compute.device.type == "cuda" and compute.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    return network.to(compute.device, dtype).eval().requires_grad_(False)


# ---------------------------------------------------------------------------- pictures to latents
class Pixels:
    """The codec that leaves pictures as they are; the cache keeps them as uint8."""

    channels, factor, stored_dtype = 3, 1, "uint8"

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] to the same."""
        return images

    decode = encode


class TinyBlock(nn.Module):
    """Three convolutions that the input also goes around; taef2's smallest blocks have a pool."""

    def __init__(self, has_pool=False):
        super().__init__()
        a, b, c = (nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(a, nn.ReLU(), b, nn.ReLU(), c)
        self.pool = None
        if has_pool:
            widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
            self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(), narrow)

    def forward(self, x):
        """x (B, 64, H, W)."""
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(x + self.conv(x))


class TinyAutoencoder(nn.Module):
    """TAESD and its kin (github.com/madebyollin/taesd): 8 x 8 pixels become one latent."""

    factor, stored_dtype = 8, "float16"

    def __init__(self, channels, has_pool):
        super().__init__()
        self.channels = channels
        encoder = [nn.Conv2d(3, 64, 3, padding=1), TinyBlock()]
        decoder = [nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU()]
        for stage in range(3):
            encoder += [nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False)]
            encoder += [TinyBlock(has_pool and stage == 2) for _ in range(3)]
            decoder += [TinyBlock(has_pool and stage == 0) for _ in range(3)]
            decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1, bias=False)]
        encoder += [nn.Conv2d(64, channels, 3, padding=1)]
        decoder += [TinyBlock(), nn.Conv2d(64, 3, 3, padding=1)]
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*encoder)})
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*decoder)})

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] to latents (B, channels, H / 8, W / 8)."""
        layers = self.encoder["layers"]
        return layers((images / 2 + 0.5).to(layers[0].weight))

    def decode(self, latents):
        """Latents to images, whose values may lie a little outside of [-1, 1]."""
        layers = self.decoder["layers"]
        return layers((torch.tanh(latents / 3) * 3).to(layers[0].weight)) * 2 - 1


def load_codec(name, compute):
    """The codec of that name: pixels, or a tiny autoencoder (taesd, taesdxl, taesd3, taef1, taef2,
    a folder, or another Hub repository). Raises UserError."""
    if name == "pixels":
        return Pixels()
    source = name if Path(name).is_dir() or "/" in name else f"madebyollin/{name}"
    files = ("diffusion_pytorch_model.safetensors", "taef2.safetensors")
    weights = read_weights(fetch(source, *files), *files)
    if "encoder.layers.14.bias" not in weights:
        raise UserError(f"{source} holds no tiny autoencoder; taef2 and taesd are such")
    has_pool = "decoder.layers.2.pool.0.weight" in weights
    network = TinyAutoencoder(len(weights["encoder.layers.14.bias"]), has_pool)
    return load_weights(network, weights, source, compute)


# ----------------------------------------------------------------- frozen: captions to embeddings
MAX_TOKENS = 256  # where captions are cut, as PRX does


class Words:
    """Text embeddings that need no download, for captions of a few hundred different words.

    A word is a random vector seeded by its spelling (the hashing trick, arXiv 0902.2206), a token
    a word beside its left and right neighbours, so that "red circle" is not "circle red".
    """

    dim = 3 * 32

    def tokenize(self, text):
        """Its words in lower case, without articles; Chinese and Japanese by the character."""
        text = unicodedata.normalize("NFC", text.lower())
        alone = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
        marks = "\u0300-\u036f\u0900-\u0dff\u0e31-\u0e4e"  # accents, vowels of Hindi and Thai
        words = re.findall(rf"[{alone}]|(?:(?![{alone}])[\w{marks}])+", text)
        return [word for word in words if word not in ("a", "an", "the")]

    def encode(self, captions):
        """A list of (L, 96), L <= MAX_TOKENS; of the empty caption L is 0."""
        embeddings = []
        for caption in captions:
            words = self.tokenize(caption)[:MAX_TOKENS]
            digests = [hashlib.shake_256(word.encode()).digest(32) for word in words]
            vectors = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
            vectors = (vectors / 127.5 - 1) * math.sqrt(3)  # uniform, of variance 1
            padded = np.pad(vectors, [(1, 1), (0, 0)])
            tokens = np.hstack((vectors, padded[:-2], padded[2:]))
            embeddings.append(torch.from_numpy(tokens).float())
        return embeddings


def embed_rows(network, rows):
    """What a text encoder makes of rows of ids: a list of (L, dim)."""
    device = next(network.parameters()).device
    rows = [torch.tensor(row) for row in rows]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1).to(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # T5 overflows in float16
        embeddings = network(ids)
    return [embedding[: len(row)] for embedding, row in zip(embeddings, rows, strict=True)]


def linears(width, **sizes):
    """Linear layers by name, without biases, from width to these sizes."""
    return nn.ModuleDict({name: nn.Linear(width, n, bias=False) for name, n in sizes.items()})


class T5(nn.Module):
    """The encoder of a T5 v1.1 (arXiv 1910.10683, 2002.05202) such as google/flan-t5-base."""

    unknown, end = 2, 1  # ids

    def __init__(self, config, tokenizer):
        super().__init__()
        self.dim, self.heads = config["d_model"], config["num_heads"]
        vocabulary = tokenizer["model"]["vocab"]
        self.pieces = {piece: (score, id) for id, (piece, score) in enumerate(vocabulary)}
        self.words = {}  # and their ids, as most come again
        self.shared = nn.Embedding(config["vocab_size"], self.dim)
        inner, wide, blocks = self.heads * config["d_kv"], config["d_ff"], nn.ModuleList()
        for _ in range(config["num_layers"]):
            attention = linears(self.dim, q=inner, k=inner, v=inner)
            attention["o"] = nn.Linear(inner, self.dim, bias=False)
            mlp = linears(self.dim, wi_0=wide, wi_1=wide)
            mlp["wo"] = nn.Linear(wide, self.dim, bias=False)
            first = {"SelfAttention": attention, "layer_norm": nn.RMSNorm(self.dim, eps=1e-6)}
            second = {"DenseReluDense": mlp, "layer_norm": nn.RMSNorm(self.dim, eps=1e-6)}
            layer = nn.ModuleList([nn.ModuleDict(first), nn.ModuleDict(second)])
            blocks.append(nn.ModuleDict({"layer": layer}))
        attention = blocks[0]["layer"][0]["SelfAttention"]
        attention["relative_attention_bias"] = nn.Embedding(32, self.heads)
        self.encoder = nn.ModuleDict({"block": blocks})
        self.encoder["final_layer_norm"] = nn.RMSNorm(self.dim, eps=1e-6)

    def tokenize(self, text):
        """The ids of a text's pieces, and of the end."""
        text = re.sub("[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]", "", text)  # control characters
        text = re.sub("[\u1680\u200b-\u200f\u2581\ufeff\ufffd]", " ", text)
        # The tokenizer's own table is NFKC, except that it leaves the wide tilde alone.
        text = "～".join(unicodedata.normalize("NFKC", part) for part in text.split("～"))
        ids = []
        for word in text.split():
            if word not in self.words:
                self.words[word] = self.split_word("▁" + word)
            ids += self.words[word]
        return [*ids, self.end]

    def split_word(self, word):
        """The most probable pieces, by Viterbi's algorithm (arXiv 1804.10959): the best split of
        each beginning of the word is that of a shorter one and one more piece."""
        word = word[: 16 * MAX_TOKENS]  # no piece is longer than 16 letters
        best = [(0.0, [])]  # score and ids for the first 0, 1, 2, ... letters
        for stop in range(1, len(word) + 1):
            score, ids = best[stop - 1]
            unknown = [] if ids[-1:] == [self.unknown] else [self.unknown]  # neighbours are one
            candidates = [(score - 100, ids + unknown)]
            for start in range(max(0, stop - 16), stop):
                if word[start:stop] in self.pieces:
                    piece_score, id = self.pieces[word[start:stop]]
                    candidates.append((best[start][0] + piece_score, [*best[start][1], id]))
            best.append(max(candidates))
        return best[-1][1]

    def encode(self, captions):
        """A list of (L, dim), L <= MAX_TOKENS; the end stays when a caption is cut."""
        rows = [self.tokenize(caption)[:-1] for caption in captions]
        return embed_rows(self, [row[: MAX_TOKENS - 1] + [self.end] for row in rows])

    def forward(self, ids):
        """ids (B, L), -1 at padding, to (B, L, dim)."""
        positions = torch.arange(ids.shape[1])
        distance = positions - positions[:, None]  # (L, L)
        # The table of biases has 16 rows a direction, for distances from these on.
        starts = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91])
        row = torch.bucketize(distance.abs(), starts, right=True) + 16 * (distance > 0)
        table = self.encoder["block"][0]["layer"][0]["SelfAttention"]["relative_attention_bias"]
        bias = table(row.to(ids.device)).permute(2, 0, 1)  # (heads, L, L)
        bias = bias.masked_fill((ids < 0)[:, None, None], -math.inf)
        x = self.shared(ids.clamp(min=0))
        for block in self.encoder["block"]:
            attention, mlp = block["layer"][0]["SelfAttention"], block["layer"][1]["DenseReluDense"]
            y = block["layer"][0]["layer_norm"](x)
            q, k, v = (split_heads(attention[name](y), self.heads) for name in "qkv")
            y = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)  # T5 does not scale
            x = x + attention["o"](y.transpose(1, 2).flatten(2))
            y = block["layer"][1]["layer_norm"](x)
            x = x + mlp["wo"](F.gelu(mlp["wi_0"](y), approximate="tanh") * mlp["wi_1"](y))
        return self.encoder["final_layer_norm"](x)


# What diffusers does to a plain English prompt. Not here are its rules that take out addresses,
# numbers as in #5 and page 3, codes as in A380, names of files and their kinds, and Chinese.
CLEANING = (
    ("[\u2010-\u2015-]+", "-"),
    ("[`´«»¨]", '"'),
    ("&quot;?|&amp", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[][#®•©™&@·º½¾¿¡§~(){}|\\/*+]+", " "),
    (r"\s+\.\s+", " "),
    ("[\u2018-\u201b]", "'"),  # quotes that lean
    ("[\u201c-\u201f]", '"'),
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^ | $", ""),
    (r"^[\"'](.+)[\"']$", r"\1"),
    (r"^['_,:;-]|['_,:-]$", ""),
)


def clean_prompt(text):
    """A prompt as diffusers gives it to the official PRX: plain and in lower case."""
    text = text.lower()
    for pattern, replacement in CLEANING:
        text = re.sub(pattern, replacement, text)
    if text.count("-") + text.count("_") > 3:  # as in names of files, my_pictures-of-a-cat
        text = text.replace("-", " ").replace("_", " ")
    return unicodedata.normalize("NFC", " ".join(text.split()))


class GemmaNorm(nn.RMSNorm):
    """RMSNorm that scales by 1 + weight."""

    def forward(self, x):
        """x (B, L, D)."""
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight.float(), eps=1e-6).to(x.dtype)


class GemmaLayer(nn.Module):
    """Attention and a gated MLP, each between two norms (Gemma 2, arXiv 2408.00118)."""

    def __init__(self, config):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.scale = config["query_pre_attn_scalar"] ** -0.5
        self.cap = config["attn_logit_softcapping"]
        all_heads, all_kv_heads = (n * config["head_dim"] for n in (self.heads, self.kv_heads))
        sizes = {"q_proj": all_heads, "k_proj": all_kv_heads, "v_proj": all_kv_heads}
        self.self_attn = linears(width, **sizes)
        self.self_attn["o_proj"] = nn.Linear(all_heads, width, bias=False)
        self.mlp = linears(width, gate_proj=inner, up_proj=inner)
        self.mlp["down_proj"] = nn.Linear(inner, width, bias=False)
        self.pre_self_attn_layernorm = GemmaNorm(width)
        self.post_self_attn_layernorm = GemmaNorm(width)
        self.pre_feedforward_layernorm = GemmaNorm(width)
        self.post_feedforward_layernorm = GemmaNorm(width)

    def forward(self, x, angles, is_padding):
        """x (B, L, D), angles (L, d / 2) and is_padding (B, 1, 1, L) to (B, L, D)."""
        y = self.pre_self_attn_layernorm(x)
        q = turn_halves(split_heads(self.self_attn["q_proj"](y), self.heads), angles)
        k = turn_halves(split_heads(self.self_attn["k_proj"](y), self.kv_heads), angles)
        v = split_heads(self.self_attn["v_proj"](y), self.kv_heads)
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v))
        # By hand, as scaled_dot_product_attention has no soft cap. The sliding window of every
        # other layer is left out: it is longer than any prompt.
        scores = self.cap * torch.tanh(q @ k.mT * self.scale / self.cap)  # (B, heads, L, L)
        scores = scores.masked_fill(is_padding, -math.inf)
        y = (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        x = x + self.post_self_attn_layernorm(self.self_attn["o_proj"](y))
        y = self.pre_feedforward_layernorm(x)
        y = F.gelu(self.mlp["gate_proj"](y), approximate="tanh") * self.mlp["up_proj"](y)
        return x + self.post_feedforward_layernorm(self.mlp["down_proj"](y))


def turn_halves(x, angles):
    """Rotary embedding of x (B, heads, L, d): its first half is paired with the second."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class T5Gemma(nn.Module):
    """The encoder of T5Gemma (arXiv 2504.06225), which reads prompts for the official PRX."""

    def __init__(self, config, tokenizer):
        super().__init__()
        config = config.get("encoder", config)
        self.dim, self.head_dim = config["hidden_size"], config["head_dim"]
        self.theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.ids = tokenizer["model"]["vocab"]
        self.ranks = {}  # of pairs of pieces; a file has them as "a b" or as ["a", "b"]
        for rank, pair in enumerate(tokenizer["model"]["merges"]):
            self.ranks[tuple(pair.split(" ") if isinstance(pair, str) else pair)] = rank
        self.words = {}  # and their ids, as most come again
        self.added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(longest_first)})")
        self.embed_tokens = nn.Embedding(config["vocab_size"], self.dim)
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = GemmaNorm(self.dim)

    def tokenize(self, text):
        """The ids of the beginning and of the pieces of a cleaned text."""
        ids = [self.added["<bos>"]]
        for part in self.added_pattern.split(clean_prompt(text)):
            if part in self.added:
                ids.append(self.added[part])
                continue
            # No piece goes on behind the end of a word, so that each word can be cut alone.
            for word in re.findall("▁*[^▁]+|▁+", part.replace(" ", "▁")):
                if word not in self.words:
                    self.words[word] = self.split_word(word)
                ids += self.words[word]
        return ids

    def split_word(self, word):
        """Byte-pair encoding (arXiv 1508.07909): merge the neighbours with the lowest rank, until
        no two have a rank. Letters that are not in the vocabulary are cut into bytes first."""
        pieces = []
        for letter in word[: 32 * MAX_TOKENS]:  # no piece has more than 32 letters
            is_known = letter in self.ids
            pieces += [letter] if is_known else [f"<0x{byte:02X}>" for byte in letter.encode()]
        while True:
            pairs = list(itertools.pairwise(pieces))
            pair = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf), default=None)
            if pair not in self.ranks:
                return [self.ids[piece] for piece in pieces]
            first = pairs.index(pair)
            pieces[first : first + 2] = ["".join(pair)]

    def encode(self, captions):
        """A list of (L, dim), L <= MAX_TOKENS. The empty caption has the beginning alone."""
        return embed_rows(self, [self.tokenize(text)[:MAX_TOKENS] for text in captions])

    def forward(self, ids):
        """ids (B, L), -1 at padding, to (B, L, dim)."""
        x = self.embed_tokens(ids.clamp(min=0)) * math.sqrt(self.dim)
        exponents = torch.arange(0, self.head_dim, 2, device=ids.device) / self.head_dim
        positions = torch.arange(ids.shape[1], device=ids.device)
        angles = positions[:, None] / self.theta**exponents  # (L, d / 2)
        is_padding = (ids < 0)[:, None, None]
        for layer in self.layers:
            x = layer(x, angles, is_padding)
        return self.norm(x)


def load_text_encoder(name, compute):
    """The text encoder of that name: words, the T5 in a folder or Hub repository, or the T5Gemma in
    that of an official PRX. Its `encode` makes of captions a list of (L, dim), L <= MAX_TOKENS.
    Raises UserError."""
    if name == "words":
        return Words()
    folder = fetch(name, "*.json")
    is_pipeline = (folder / "text_encoder").is_dir()
    part, tokenizer_part = ("text_encoder/", "tokenizer/") if is_pipeline else ("", "")
    config = read_json(folder / part / "config.json")
    kinds = {"t5": T5, "t5gemma": T5Gemma, "t5_gemma_module": T5Gemma}
    kind = kinds.get(config.get("model_type"))
    is_old = kind is T5 and "gated" not in config.get("feed_forward_proj", "")
    if kind is None or is_old:
        raise UserError(
            f"{name} holds no text encoder known here; T5 v1.1, as google/flan-t5-base, and the "
            "T5Gemma of Photoroom/prx-512-t2i are"
        )
    tokenizer = read_json(folder / tokenizer_part / "tokenizer.json")
    with torch.device("meta"):
        network = kind(config, tokenizer)
    files = part + "model*.safetensors"
    saved = read_weights(fetch(name, files), files)  # perhaps with the decoder
    prefix = "encoder." if "encoder.norm.weight" in saved else ""  # of T5Gemma as a whole
    names = [key for key in network.state_dict() if prefix + key in saved]
    return load_weights(network, {key: saved[prefix + key] for key in names}, name, compute)


def pad(embeddings, tokens):
    """A list of (L, D), L <= tokens, filled up with rows of zeros, as one (B, tokens, D)."""
    return torch.stack([F.pad(each, (0, 0, 0, tokens - len(each))) for each in embeddings])


# --------------------------------------------------------------------- frozen: pictures to features
class DINOv2(nn.Module):
    """The vision transformer whose features REPA aims at (arXiv 2304.07193)."""

    def __init__(self, config):
        super().__init__()
        width, self.patch = config["hidden_size"], config["patch_size"]
        self.dim, self.heads = width, config["num_attention_heads"]
        places = 1 + (config["image_size"] // self.patch) ** 2
        shapes = {"cls_token": (1, 1, width), "position_embeddings": (1, places, width)}
        shapes["mask_token"] = (1, width)  # in the files, but needed only to train a DINOv2
        tables = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self.embeddings = nn.ParameterDict(tables)
        projection = nn.Conv2d(3, width, self.patch, self.patch)
        self.embeddings.patch_embeddings = nn.ModuleDict({"projection": projection})
        layers = nn.ModuleList()
        for _ in range(config["num_hidden_layers"]):
            qkv = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
            output = nn.ModuleDict({"dense": nn.Linear(width, width)})
            mlp = {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
            layer = nn.ModuleDict({"mlp": nn.ModuleDict(mlp)})
            layer["attention"] = nn.ModuleDict({"attention": nn.ModuleDict(qkv), "output": output})
            for n in (1, 2):
                layer[f"norm{n}"] = nn.LayerNorm(width, eps=1e-6)
                layer[f"layer_scale{n}"] = nn.ParameterDict({"lambda1": torch.ones(width)})
            layers.append(layer)
        self.encoder = nn.ModuleDict({"layer": layers})
        self.layernorm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        """Images (B, 3, H, W) in [-1, 1] to features (B, dim, H / patch, W / patch)."""
        mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's
        std = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        projection = self.embeddings.patch_embeddings["projection"]
        x = projection(((images / 2 + 0.5 - mean) / std).to(projection.weight))
        places = self.embeddings["position_embeddings"]  # of one size of picture, so interpolated
        table = places[:, 1:].mT.unflatten(2, (math.isqrt(places.shape[1]), -1)).float()
        x = x + F.interpolate(table, x.shape[2:], mode="bicubic").to(x)
        class_token = (self.embeddings["cls_token"] + places[:, :1]).expand(len(x), -1, -1)
        tokens = torch.cat((class_token, x.flatten(2).mT), dim=1)  # (B, 1 + h w, D)
        for layer in self.encoder["layer"]:
            y = layer["norm1"](tokens)
            projections = layer["attention"]["attention"]
            names = ("query", "key", "value")
            q, k, v = (split_heads(projections[name](y), self.heads) for name in names)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            y = layer["attention"]["output"]["dense"](y)
            tokens = tokens + layer["layer_scale1"]["lambda1"] * y
            y = layer["mlp"]["fc2"](F.gelu(layer["mlp"]["fc1"](layer["norm2"](tokens))))
            tokens = tokens + layer["layer_scale2"]["lambda1"] * y
        return self.layernorm(tokens)[:, 1:].mT.unflatten(2, x.shape[2:])  # without the class

    @torch.no_grad()
    def features(self, images, side):
        """Features (B, dim, side, side) of square images (B, 3, H, W) in [-1, 1], resized so that
        there are at least 16 x 16 patches, over which the features are averaged."""
        size = side * math.ceil(16 / side) * self.patch
        shrinks = images.shape[3] > size
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=shrinks)
        return F.adaptive_avg_pool2d(self(images).float(), side)


def load_teacher(name, compute):
    """The DINOv2 in a folder or Hub repository. Raises UserError."""
    folder = fetch(name, "config.json", "model.safetensors")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "dinov2":
        raise UserError(f"{name} holds no DINOv2 (without registers), as facebook/dinov2-small is")
    with torch.device("meta"):
        network = DINOv2(config)
    return load_weights(network, read_weights(folder, "model.safetensors"), name, compute)
