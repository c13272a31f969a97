"""The PRX transformer (Photoroom and Hugging Face), the flow it is trained with, and its weights.

- only image tokens flow through the blocks; each block projects the text to keys and values anew
- image queries attend to text and image keys in one attention call, RMSNorm on queries and keys
- positions come from a 2-D rotary embedding of the image tokens; text tokens carry none
- parameters carry the names of diffusers' `PRXTransformer2DModel`: weights go both ways unconverted
"""
import contextlib, dataclasses, functools, json, math, os
from pathlib import Path
import numpy as np, torch, torch.nn as nn, torch.nn.functional as F

class Refused(ValueError):
    """Input that cannot be used; the text is the sentence that the user reads."""

@contextlib.contextmanager
def refusing(sentence):
    """Turn what is raised inside, which broken input does in many ways, into a Refused."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:600] if " " in str(error) else repr(error)
        raise error if isinstance(error, Refused) else Refused(f"{sentence}: {reason}")
# ------------------------------------------------------------------------------ the transformer
@dataclasses.dataclass
class PRXConfig:
    """Sizes of the network, under diffusers' names; the defaults are PRX-small's (1.2 B)."""
    in_channels: int = 16            # channels of the latents, 3 for pixels
    patch_size: int = 2              # a token is patch_size x patch_size latents
    context_in_dim: int = 2304       # width of the text embeddings
    hidden_size: int = 1792
    mlp_ratio: float = 3.5
    num_heads: int = 28
    depth: int = 16
    axes_dim: tuple = (32, 32)       # rotary dimensions for rows and columns, together a head
    theta: int = 10000
    time_factor: float = 1000.0
    time_max_period: int = 10000
    bottleneck_size: int | None = None
    def __post_init__(self):
        self.axes_dim = axes = tuple(self.axes_dim or (32, 32))
        if any(dim % 2 for dim in axes) or sum(axes) * self.num_heads != self.hidden_size:
            raise Refused(f"width {self.hidden_size} is no multiple of 4 x {self.num_heads} heads")

@functools.lru_cache(maxsize=8)
def rope_table(rows, columns, axes_dim, theta, device):
    """Cosines and sines, each (rows * columns, 1, head_dim / 2), of the rotary embedding (arXiv
    2104.09864): axes_dim[0] dimensions turn with the row, the others with the column."""
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))            # (L, 2)
    rates = [1 / theta ** (torch.arange(0, dim, 2).double() / dim) for dim in axes_dim]
    angles = torch.cat((places[:, :1] * rates[0], places[:, 1:] * rates[1]), dim=1)
    return [table.float()[:, None].to(device) for table in (angles.cos(), angles.sin())]

def apply_rope(x, rope):
    """Turn each pair (a, b) in the last axis of x (B, L, ...) to (a cos - b sin, b cos + a sin)."""
    (a, b), (cosines, sines) = x.unflatten(-1, (-1, 2)).unbind(-1), rope
    return torch.stack((a * cosines - b * sines, b * cosines + a * sines), dim=-1).flatten(-2)

def modulate(x, shift, scale):
    """LayerNorm of x (B, L, D), times 1 + scale, plus shift (B, 1, D), which the timestep gives."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)

class Block(nn.Module):
    """Attention and a gated MLP over the image tokens (B, L, D). A shift, scale and gate for each
    come from the timestep's vector (B, D) (DiT's adaLN-zero, arXiv 2212.09748)."""
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        linear, self.heads = functools.partial(nn.Linear, bias=False), config.num_heads
        norm = functools.partial(nn.RMSNorm, width // self.heads, eps=1e-6)
        self.attention = nn.ModuleDict({
            "img_qkv_proj": linear(width, 3 * width), "txt_kv_proj": linear(width, 2 * width),
            "norm_q": norm(), "norm_k": norm(), "norm_added_k": norm(),
            "to_out": nn.ModuleList([linear(width, width)])})
        self.gate_proj, self.up_proj = linear(width, inner), linear(width, inner)
        self.down_proj = linear(inner, width)
        self.modulation = nn.ModuleDict({"lin": nn.Linear(width, 6 * width)})
    def attend(self, img, txt, rope, mask):
        """Image queries over text and image keys, which are normed and turned in float32."""
        layers = self.attention
        if mask is not None:                                  # text keys, then image keys
            mask = F.pad(mask.bool(), (0, img.shape[1]), value=True)[:, None, None]
        qkv, txt_kv = layers["img_qkv_proj"](img).float(), layers["txt_kv_proj"](txt).float()
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)         # (B, L, heads, head_dim)
        txt_k, txt_v = txt_kv.unflatten(-1, (2, self.heads, -1)).unbind(2)
        q, k = apply_rope(layers["norm_q"](q), rope), apply_rope(layers["norm_k"](k), rope)
        k, v = torch.cat((layers["norm_added_k"](txt_k), k), dim=1), torch.cat((txt_v, v), dim=1)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))           # (B, heads, L, head_dim)
        with torch.autocast("cpu", enabled=False):     # the CPU's flash kernel is slower in bf16
            out = F.scaled_dot_product_attention(q, k, v, mask)
        return layers["to_out"][0](out.transpose(1, 2).flatten(2))
    def forward(self, img, txt, vec, rope, mask):
        modulation = self.modulation["lin"](F.silu(vec))[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.chunk(6, dim=-1)
        img = torch.addcmul(img, gate, self.attend(modulate(img, shift, scale), txt, rope, mask))
        x = modulate(img, mlp_shift, mlp_scale)
        x = self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))
        return torch.addcmul(img, mlp_gate, x)

class PRX(nn.Module):
    """The PRX transformer: noisy latents, timestep and text in, clean latents or velocity out."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        patch_dim, width = config.in_channels * config.patch_size ** 2, config.hidden_size
        self.img_in = nn.Linear(patch_dim, width) if not config.bottleneck_size else nn.Sequential(
            nn.Linear(patch_dim, config.bottleneck_size), nn.Linear(config.bottleneck_size, width))
        self.time_in = nn.ModuleDict({"in_layer": nn.Linear(256, width),
                                      "out_layer": nn.Linear(width, width)})
        self.txt_in = nn.Linear(config.context_in_dim, width)
        self.projector = None                       # of REPA (2410.06940), while it is trained
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = nn.ModuleDict({
            "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
            "linear": nn.Linear(width, patch_dim)})
        for name, parameter in self.named_parameters():     # blocks begin as identities, the output
            if "modulation" in name or "final_layer" in name:                           # as zeros
                nn.init.zeros_(parameter)
    def forward(self, x, t, text, mask=None, stay=None):
        """x (B, C, H, W) noisy latents, t (B,) in [0, 1], 1 being noise, and text (B, L, D) to
        clean latents or velocity (B, C, H, W), with a projector also to what it makes of the middle
        tokens. Rows of zeros in text are padding; they become the bias of `txt_in`, a token that
        the model learns to ignore, so that attention can take the flash kernel. mask (B, L), False
        at padding, is for models trained with one.
        stay (B, S) numbers the image tokens that do not skip the middle blocks (TREAD, 2501.04765;
        PRX: FID 18.20 to 21.61 at 256 px; it helps at 1024 px, 14.10). With stay = [[4, 1]]:
            0 1 2 3 4 5 -> first blocks -> 0   2 3   5 --------------------> 0 1 2 3 4 5 -> last one
                                             4     1   -> middle blocks -> 4 1                   """
        grid = [side // self.config.patch_size for side in x.shape[2:]]
        rope = rope_table(*grid, self.config.axes_dim, self.config.theta, x.device)
        return self.body(x, t, text, mask, stay, grid, rope)
    def body(self, x, t, text, mask, stay, grid, rope):             # what torch.compile is given
        x = F.pixel_unshuffle(x, self.config.patch_size)                        # (B, C p p, h, w)
        img, txt = self.img_in(x.flatten(2).mT), self.txt_in(text)              # (B, h w, D)
        rates = torch.arange(128, device=t.device) / -128 * math.log(self.config.time_max_period)
        angles = (t.float() * self.config.time_factor)[:, None] * rates.exp()         # 1706.03762
        vec = torch.cat((angles.cos(), angles.sin()), dim=-1)                           # (B, 256)
        vec = self.time_in["out_layer"](F.silu(self.time_in["in_layer"](vec)))
        routed, middle = stay is not None and stay.shape[1] < img.shape[1], None
        first, last = min(2, len(self.blocks) // 3), max(0, len(self.blocks) - 2)  # routed blocks
        for number, block in enumerate(self.blocks):
            if routed and number == first:
                rows, all_img, all_rope = stay[..., None].expand(-1, -1, img.shape[2]), img, rope
                img, rope = img.gather(1, rows), [table[stay] for table in rope]
            img = block(img, txt, vec, rope, mask)
            if self.projector and number == max(0, len(self.blocks) // 2 - 1):
                middle = self.projector(img)                                    # (B, L or S, dim)
            if routed and number == last:
                img, rope = all_img.scatter(1, rows, img), all_rope
        shift, scale = self.final_layer["adaLN_modulation"](vec)[:, None].chunk(2, dim=-1)
        x = self.final_layer["linear"](modulate(img, shift, scale)).mT          # (B, C p p, h w)
        x = F.pixel_shuffle(x.unflatten(2, grid), self.config.patch_size)       # (B, C, H, W)
        return x if middle is None else (x, middle)
    @classmethod
    def from_pretrained(cls, source):
        """The model in a folder or Hub repository in diffusers' layout, in a run's `ema/` or in a
        pipeline's `transformer/`. Raises Refused where something is missing or does not fit."""
        folder = fetch(source, "*config.json", "*diffusion_pytorch_model*.safetensors")
        config = read_json(folder / "config.json")
        sizes = {name: config[name] for name in PRXConfig.__annotations__ if name in config}
        with refusing(f"{folder} does not hold a PRX"):
            model = cls(PRXConfig(**sizes))
            model.load_state_dict(read_safetensors(*sorted(folder.glob("diffusion*.safetensors"))))
        return model
    def save_pretrained(self, folder):
        """Write `config.json` and `diffusion_pytorch_model.safetensors` for diffusers and us."""
        write_safetensors(f"{folder}/diffusion_pytorch_model.safetensors", self.state_dict())
        write_json(f"{folder}/config.json",
                   {"_class_name": "PRXTransformer2DModel", **dataclasses.asdict(self.config)})
# ------------------------------------------------------------------------------------ the flow
# x_t = (1 - t) x + t noise leads from a picture x to noise; its velocity is noise - x (2209.03003)
def shift_time(t, shift):
    """Move timesteps in [0, 1] towards the noise, as large pictures need it (SD3, 2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)

def sample_timesteps(n, shift, generator):
    """n timesteps on the generator's device: sigmoids of a normal (SD3), three in ten uniform (PRX:
    one), shifted, never below 1e-3. Their quantiles are evenly spaced (VDM, 2107.00630)."""
    start, rare = torch.rand(2, n, generator=generator, device=generator.device)
    uniform = (torch.arange(n, device=generator.device) / n + start[0]) % 1
    normal = 2 ** 0.5 * torch.erfinv(2 * uniform - 1)  # the normal's quantile (MPS lacks ndtri)
    return shift_time(torch.where(rare < 0.3, uniform, normal.sigmoid()), shift).clamp(min=1e-3)

def velocity(output, x_t, t, predict, t_floor=0.05):
    """The velocity that an output at x_t (B, C, H, W) and t (B,) stands for: itself for "v", for
    "x" derived from the clean picture (JiT, 2511.13720), t clamped near 0 as JiT and PRX do."""
    return output if predict == "v" else (x_t - output) / t.clamp(min=t_floor)[:, None, None, None]
# ----------------------------------------------------------------------------- device and files
def pick_device(dtype="auto"):
    """The device, CUDA before Apple's MPS before the CPU, and its autocast to bf16, which is off if
    dtype is "fp32", or "auto" where the device does not compute well in bf16."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.getenv("LOCAL_RANK", 0)))               # of torchrun
        torch.cuda.set_device(device)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif torch.backends.mps.is_available():
        device, bf16 = torch.device("mps"), False
    else:
        device, has = torch.device("cpu"), torch.cpu.get_capabilities().get
        bf16 = has("amx_bf16") or has("avx512_bf16") and "Intel" not in str(has("cpu_name"))
    bf16 = bool(bf16) if dtype == "auto" else dtype == "bf16"   # Intel's without AMX are slow at it
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)

@contextlib.contextmanager
def whole_file(path):
    """A binary file to write to, which gets its name only once it is complete."""
    partial = Path(f"{path}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except RuntimeError as error:       # torch.save's, which hides what the disk said behind it
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        partial.unlink(missing_ok=True)

def write_json(path, value):
    """Write value as JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode())

def read_json(path):
    """The object in a JSON file. Raises Refused where it is missing or broken."""
    with refusing(f"{path} cannot be used"):
        return dict(json.loads(Path(path).read_bytes()).items())

def fetch(source, *patterns):
    """The folder `source`, or that into which the files of a Hub repository that match the patterns
    were downloaded; in it `ema/` or `transformer/`, if it has one. Raises Refused."""
    folder = Path(source) if Path(source).is_dir() else Path(
        ask_hub("snapshot_download", str(source), allow_patterns=patterns))
    return next(filter(Path.is_dir, (folder / "ema", folder / "transformer")), folder)

def ask_hub(function, repository, *files, **how):
    """What a function of huggingface_hub gives for a repository there. Raises Refused."""
    import huggingface_hub                                          # slow to import, seldom needed
    with refusing(f"{' in '.join((*files, repository))} is not here, and the Hub does not give it; "
                  "check name and network, log in (hf auth login) if it is private or gated"):
        return getattr(huggingface_hub, function)(repository, *files, **how)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}

def read_safetensors(*paths):
    """The tensors of safetensors files by name, mapped into memory. The format: an 8-byte length,
    a JSON header of dtypes, shapes and offsets, raw bytes without gaps. Raises Refused."""
    tensors = {}
    for path in paths:
        with refusing(f"{path} is not a whole safetensors file"):
            data = np.memmap(path, np.uint8, "c")      # "c": what is written to is copied
            length = int.from_bytes(data[:8].tobytes(), "little")
            header, data = json.loads(data[8:8 + length].tobytes()), data[8 + length:]
            header.pop("__metadata__", None)
            begins, ends = zip(*sorted(entry["data_offsets"] for entry in header.values()))
            if (*begins, len(data)) != (0, *ends):
                raise ValueError("the tensors do not lie one behind the other to the end")
            for name, entry in header.items():
                raw = torch.from_numpy(data[slice(*entry["data_offsets"])])
                tensors[name] = raw.view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors

def write_safetensors(path, tensors):
    """Write tensors by name as a safetensors file, whole or not at all."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ends = np.cumsum([tensor.nbytes for tensor in tensors.values()]).tolist()
    header = {name: {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                     "data_offsets": [end - tensor.nbytes, end]}
              for (name, tensor), end in zip(tensors.items(), ends)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
