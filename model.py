"""The networks of nanoPRX: the PRX transformer, its flow, and what makes latents and embeddings.

Parameters carry the names of the public checkpoints, so that `load_state_dict` is the loader. Hence
some containers of one layer, such as `to_out`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import unicodedata
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F


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
    axes_dim: tuple = (32, 32)  # rotary dimensions for rows and for columns; their sum is a head's
    theta: int = 10000
    time_factor: float = 1000.0  # multiplies timesteps before their cosines and sines are taken
    time_max_period: int = 10000  # the longest period is about 2 pi times this
    bottleneck_size: int | None = None  # width between two layers that read pixel patches


def rope_table(rows, columns, axes_dim, theta, device):
    """Cosines and sines (2, rows * columns, d / 2) of the 2-D rotary embedding (2104.09864): the
    first axes_dim[0] dimensions of a head turn with a token's row, the others with its column."""
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
    """Attention and gated MLP, which the timestep shifts, scales and gates (DiT, 2212.09748)."""

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
    (arXiv 2410.06940; PRX: FID 18.20 to 14.64) behind the middle block, the 8th of 16."""

    def __init__(self, config, repa_dim=None):
        super().__init__()
        self.config = config
        width, neck, depth = config.hidden_size, config.bottleneck_size, config.depth
        patch_dim = config.in_channels * config.patch_size**2
        if neck is None:
            self.img_in = nn.Linear(patch_dim, width)
        else:
            self.img_in = nn.Sequential(nn.Linear(patch_dim, neck), nn.Linear(neck, width))
        time_layers = {"in_layer": nn.Linear(256, width), "out_layer": nn.Linear(width, width)}
        self.time_in = nn.ModuleDict(time_layers)
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        final_layers = {"adaLN_modulation": modulation, "linear": nn.Linear(width, patch_dim)}
        self.final_layer = nn.ModuleDict(final_layers)
        for name, parameter in self.named_parameters():
            if "modulation" in name or "final_layer" in name:
                nn.init.zeros_(parameter)  # blocks begin as the identity, the output as 0
        # TREAD routes blocks 2 to 12 of 0 to 15, as in PRX, 2 to 6 of 0 to 7, and 1 of 0 to 2.
        self.routed = range(min(2, depth // 3), max(1, depth - max(1, depth // 5)))
        self.repa_block = (depth - 1) // 2  # which is a routed one
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
        for number, block in enumerate(self.blocks):
            if keep is not None and number == self.routed.start:
                all_img = img  # where those not in keep wait
                kept_rows = keep[:, :, None].expand(-1, -1, img.shape[2])  # (B, S, D)
                img = img.gather(1, kept_rows)
                rope = all_rope[:, keep][:, :, None]  # (2, B, 1, S, d / 2)
            img = block(img, txt, time, rope, mask)
            if number == self.repa_block and self.projector is not None and self.training:
                features = self.projector(img)
            if keep is not None and number == self.routed.stop - 1:
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
        """The model in a folder of diffusers' layout. Raises UserError if it has no config.json."""
        saved = read_json(Path(folder) / "config.json")
        names = PRXConfig.__annotations__.keys() & saved.keys()
        config = PRXConfig(**{name: saved[name] for name in names})
        with torch.device("meta"):  # shapes only; the tensors of the file are put in
            model = cls(config)
        model.load_state_dict(safetensors.torch.load_file(Path(folder) / WEIGHTS), assign=True)
        return model.float()

    def save_pretrained(self, folder):
        """Write config and weights, without REPA's projector, for diffusers and for us."""
        weights = {k: w for k, w in self.state_dict().items() if not k.startswith("projector.")}
        with whole_file(Path(folder) / WEIGHTS) as file:
            file.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
        config = {"_class_name": "PRXTransformer2DModel", **dataclasses.asdict(self.config)}
        write_json(Path(folder) / "config.json", config)


# --------------------------------------------------------------------------------------- the flow
# x_t = (1 - t) x + t noise leads straight from a picture x (t = 0) to noise (t = 1). Its velocity,
# noise - x, is the same all along the line (rectified flow, arXiv 2209.03003).
def velocity(output, x_t, t, predict, t_floor=0.0):
    """The velocity (B, C, H, W) that a model's output at x_t and t (B,) stands for. "v": the output
    is the velocity. "x": it is a clean picture (JiT, 2511.13720), and the velocity leads from there
    to x_t; t is clamped at t_floor, since near t = 0 the division blows up small errors."""
    if predict == "v":
        return output
    return (x_t - output) / t.clamp(min=t_floor)[:, None, None, None]


def shift_time(t, shift):
    """Move timesteps t in [0, 1] towards noise, as large pictures need it (SD3, 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(n, shift, generator):
    """n timesteps in [0.001, 1], shifted: sigmoids of a normal (SD3), but 3 in 10 uniform (PRX: 1
    in 10). Their quantiles are even, from a random start, which calms the loss (VDM 2107.00630)."""
    device = generator.device
    start = torch.rand(1, generator=generator, device=device)
    uniform = (torch.arange(n, device=device) / n + start) % 1
    normal = math.sqrt(2) * torch.erfinv(2 * uniform - 1)  # makes of a uniform number a normal one
    is_uniform = torch.rand(n, generator=generator, device=device) < 0.3
    return shift_time(torch.where(is_uniform, uniform, normal.sigmoid()), shift).clamp(min=1e-3)


# ------------------------------------------------------------------------------- device and files
WEIGHTS = "diffusion_pytorch_model.safetensors"  # as diffusers names them


@dataclasses.dataclass
class Compute:
    """A device, and the type in which it multiplies matrices (for attention see `Attention`)."""

    device: torch.device
    dtype: torch.dtype  # bfloat16 or float32

    def autocast(self):
        """A context in which matrix products run in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def pick_device(device="auto", dtype="auto"):
    """The Compute for a device (auto, cpu, cuda, mps) and a type (auto, bf16, fp32)."""
    if device == "auto":
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    if device != "cpu" and not getattr(torch, device).is_available():
        raise UserError(f"--device {device} is not there, or PyTorch was built without it")
    best = "fp32"
    if device == "cuda":
        torch.cuda.set_device(int(os.getenv("LOCAL_RANK", "0")))  # which torchrun sets
        torch.set_float32_matmul_precision("high")  # TF32
        if torch.cuda.is_bf16_supported(including_emulation=False):
            best = "bf16"
    if device == "cpu":
        # A CPU without bf16 units emulates them, 50 times slower than float32. Intel's AVX-512
        # without AMX has them and is slower all the same. Old versions of torch cannot tell: {}.
        found = getattr(torch.cpu, "get_capabilities", dict)()
        is_intel = "Intel" in str(found.get("cpu_name"))
        if found.get("amx_bf16") or (found.get("avx512_bf16") and not is_intel):
            best = "bf16"
    chosen = best if dtype == "auto" else dtype
    return Compute(torch.device(device), {"bf16": torch.bfloat16, "fp32": torch.float32}[chosen])


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
    except (OSError, RuntimeError) as error:  # RuntimeError is torch.save's
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(f"{path} cannot be written: {error}") from error


def write_json(path, value):
    """Write value as JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2).encode())


def read_json(path):
    """The object in a JSON file. Raises UserError if it is missing or broken."""
    try:
        return dict(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read; misnamed, or not made yet? {error}") from error


def fetch(source, *patterns):
    """The folder `source`, or a Hub repository's, with files like `patterns`. Raises UserError."""
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # the library passes on the errors of three others
        raise UserError(f"{source} is no folder, nor on the Hub; train it or log in") from error


# ---------------------------------------------------------------------------- pictures to latents
class Pixels:
    """The codec that leaves pictures as they are; the cache keeps them as uint8."""

    channels, factor, stored_dtype = 3, 1, "uint8"

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] to the same."""
        return images

    decode = encode


class TinyBlock(nn.Module):
    """Three convolutions and a skip connection; taef2's blocks on the smallest maps have a pool."""

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
        return self.encoder["layers"](images / 2 + 0.5)

    def decode(self, latents):
        """Latents to images, whose values may lie a little outside of [-1, 1]."""
        return self.decoder["layers"](torch.tanh(latents / 3) * 3) * 2 - 1


def load_codec(name, compute):
    """The codec of that name: pixels, or a tiny autoencoder (taesd, taesdxl, taesd3, taef1, taef2,
    a folder, or another Hub repository). Raises UserError."""
    if name == "pixels":
        return Pixels()
    source = name if Path(name).is_dir() or "/" in name else f"madebyollin/{name}"
    folder = fetch(source, WEIGHTS, "taef2.safetensors")
    paths = [path for path in (folder / WEIGHTS, folder / "taef2.safetensors") if path.exists()]
    weights = safetensors.torch.load_file(paths[0]) if paths else {}
    last_bias = weights.get("encoder.layers.14.bias")
    if last_bias is None:
        raise UserError(f"{source} holds no tiny autoencoder; taef2 and taesd are such")
    network = TinyAutoencoder(len(last_bias), "decoder.layers.2.pool.0.weight" in weights)
    network.load_state_dict(weights)
    return network.to(compute.device).eval().requires_grad_(False)


# -------------------------------------------------------------------------- captions to embeddings
MAX_TOKENS = 256  # where captions are cut, as PRX does


class Words:
    """Text embeddings that need no download, for captions of a few hundred different words.

    A word is a random vector seeded by its spelling (akin to the hashing trick, 0902.2206), a token
    a word beside its left and right neighbours, which tell whose "red" a red is.
    """

    dim = 3 * 32

    def tokenize(self, text):
        """Its words in lower case, without articles: runs of letters, their marks and numbers."""
        text = unicodedata.normalize("NFC", text.lower())
        spaced = [sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text]
        return [word for word in "".join(spaced).split() if word not in ("a", "an", "the")]

    def encode(self, captions):
        """A list of (L, 96), L <= MAX_TOKENS; of the empty caption L is 0."""
        embeddings = []
        for caption in captions:
            words = self.tokenize(caption)[:MAX_TOKENS]
            digests = [hashlib.shake_256(word.encode()).digest(32) for word in words]
            vectors = np.zeros((len(words) + 2, 32))  # with nothing before and behind
            numbers = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
            vectors[1:-1] = (numbers / 127.5 - 1) * math.sqrt(3)  # uniform, of variance 1
            tokens = np.hstack((vectors[1:-1], vectors[:-2], vectors[2:]))
            embeddings.append(torch.from_numpy(tokens).float())
        return embeddings


class Pretrained:
    """A text encoder of transformers: its tokenizer, its network, and what cleans captions."""

    def __init__(self, tokenizer, network, clean=str):
        self.tokenizer, self.network, self.clean = tokenizer, network, clean
        self.dim = network.config.hidden_size

    def tokenize(self, text):
        """The ids of its pieces."""
        return self.tokenizer(self.clean(text)).input_ids

    @torch.no_grad()
    def encode(self, captions):
        """A list of (L, dim), L <= MAX_TOKENS, without padding."""
        how = {"padding": True, "truncation": True, "max_length": MAX_TOKENS}
        device, embeddings = self.network.device, []
        for first in range(0, len(captions), 64):
            part = [self.clean(caption) for caption in captions[first : first + 64]]
            batch = self.tokenizer(part, **how, return_tensors="pt").to(device)
            ids, mask = batch.input_ids, batch.attention_mask
            with torch.autocast(device.type, enabled=False):  # in the type of its weights
                rows = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
            embeddings += [row[is_text] for row, is_text in zip(rows, mask.bool(), strict=True)]
        return embeddings


def load_text_encoder(name, compute):
    """The text encoder of that name: words, or one of transformers in a folder or Hub repository: a
    T5, UMT5, BERT or MiniLM, or the T5Gemma of an official PRX pipeline. Raises UserError."""
    if name == "words":
        return Words()
    from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

    if not (fetch(name, "*.json") / "model_index.json").exists():
        network, clean = AutoModelForTextEncoding.from_pretrained(name), str
        tokenizer = AutoTokenizer.from_pretrained(name)
    else:  # a pipeline of diffusers, which cleans prompts; without ftfy it fails to
        import ftfy  # noqa: F401
        from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor
        from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

        config = AutoConfig.from_pretrained(name, subfolder="text_encoder")
        config = getattr(config, "encoder", config)  # of both halves, or of the encoder alone
        network = T5GemmaEncoder.from_pretrained(name, subfolder="text_encoder", config=config)
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer")
        clean = TextPreprocessor().clean_text
    network.to(compute.device, compute.dtype if compute.device.type == "cuda" else torch.float32)
    return Pretrained(tokenizer, network.eval().requires_grad_(False), clean)


def pad(embeddings, tokens):
    """A list of (L, D), L <= tokens, filled up with rows of zeros, as one (B, tokens, D)."""
    return torch.stack([F.pad(each, (0, 0, 0, tokens - len(each))) for each in embeddings])
