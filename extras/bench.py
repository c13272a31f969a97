"""Measure a training step, of our network and of diffusers' in turn, with the same optimizers.

    python extras/bench.py                                              # the default run's sizes
    python extras/bench.py --width 768 --depth 12 --tokens 256 --text-tokens 64 --compile

MFU, model FLOPs utilisation, is the rate of the operations that the network needs over that of one
large product of matrices on this device, as measured; arXiv 2204.02311 takes the datasheet's.
"""

import dataclasses
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import model
import prepare
import train
from prepare import flag


@dataclasses.dataclass
class Settings:
    """All settings of bench.py."""

    width: int = flag(128, "hidden size", 16)
    depth: int = flag(3, "blocks", 2)
    tokens: int = flag(16, "image tokens, a square number", 1)
    text_tokens: int = flag(17, "text tokens", 1)
    batch_size: int = flag(64, "pictures in a step", 1)
    route: float = flag(0.0, "share of tokens that skip blocks, in our network", 0, 0.95)
    pairs: int = flag(15, "how often each is measured, in turn", 1)
    device: str = flag("auto", "the best there is", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products", choices=("auto", "bf16", "fp32"))
    compile: bool = flag(False, "torch.compile the blocks")


def measure_matrix_rate(compute):
    """The FLOP/s of a large product of matrices."""
    side = 8192 if compute.device.type == "cuda" else 1024
    x = torch.randn(side, side, device=compute.device).to(compute.dtype)
    (x @ x)[0, 0].item()  # which waits for the device
    started = time.perf_counter()
    for _ in range(5):
        (x @ x)[0, 0].item()
    return 5 * 2 * side**3 / (time.perf_counter() - started)


def count_flops(network, inputs, compute):
    """Floating-point operations of a training step: those of the forward pass, and twice as many
    backward."""
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # can be counted
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter, compute.autocast():
        network(*inputs)
    return 3 * counter.get_total_flops()


def make_step(network, inputs, settings, compute):
    """A function that makes a training step, from forward pass to optimizers."""
    optimizers = train.make_optimizers(network, train.Settings(), compute).values()
    if settings.compile:
        for block in network.blocks:
            block.compile()

    def step():
        with compute.autocast():
            output = network(*inputs)
        output = getattr(output, "sample", output)  # diffusers wraps it
        F.mse_loss(output.float(), inputs[0]).backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        norm.item()  # which waits for the device, and all before

    return step


def main(settings):
    """Print a table."""
    from diffusers import PRXTransformer2DModel

    compute = model.pick_device(settings.device, settings.dtype)
    heads, side = max(4, settings.width // 64), math.isqrt(settings.tokens)
    half, batch = settings.width // heads // 2, settings.batch_size
    sizes = {"in_channels": 3, "patch_size": 8, "context_in_dim": 96, "bottleneck_size": 64}
    sizes |= {"hidden_size": settings.width, "depth": settings.depth, "num_heads": heads}
    config = model.PRXConfig(**sizes, mlp_ratio=3.0, axes_dim=(half, half), theta=100)
    inputs = (torch.randn(batch, 3, 8 * side, 8 * side), torch.rand(batch))
    inputs = [x.to(compute.device) for x in (*inputs, torch.randn(batch, settings.text_tokens, 96))]
    kept = max(1, round(side**2 * (1 - settings.route)))
    keep = torch.rand(batch, side**2, device=compute.device).argsort(1)[:, :kept]
    routed = [*inputs, None, keep] if settings.route else inputs
    ours = model.PRX(config).to(compute.device)
    theirs = PRXTransformer2DModel(**dataclasses.asdict(config)).to(compute.device)
    both = {"nanoPRX": (ours, routed), "diffusers": (theirs, inputs)}
    steps = {name: make_step(*each, settings, compute) for name, each in both.items()}
    rate, seconds = measure_matrix_rate(compute), {name: [] for name in steps}
    for number in range(settings.pairs + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= 2:  # the first two warm up, and compile
                seconds[name].append(time.perf_counter() - started)
    print(f"torch {torch.__version__} {compute.device.type} {compute.dtype}, {rate:.3g} FLOP/s")
    print(f"{side**2} + {settings.text_tokens} tokens, batch {batch}")
    print(f"{'':12}{'ms a step':>10}{'pictures/s':>12}{'MFU':>7}")
    for name, times in seconds.items():
        median = statistics.median(times)
        share = count_flops(*both[name], compute) / median / rate
        print(f"{name:12}{1000 * median:10.1f}{batch / median:12,.0f}{share:7.1%}")
    if compute.device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at most, with both networks there")
    ratios = [a / b for a, b in zip(seconds["nanoPRX"], seconds["diffusers"], strict=True)]
    print(f"nanoPRX takes {statistics.median(ratios):.2f} of diffusers' time, the median of pairs")


if __name__ == "__main__":
    prepare.run_script(main, Settings, __doc__)
