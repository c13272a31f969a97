"""Every promise of README.md, tried: against diffusers, transformers, and as processes."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import types
import zlib
from pathlib import Path
from typing import Annotated

import diffusers
import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from diffusers.pipelines.prx import T5GemmaEncoder
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

import model
import prepare
import sample
import train

HERE = Path(__file__).parent
CPU = model.Compute(torch.device("cpu"), torch.float32)
TINY = {"width": 32, "depth": 4, "batch_size": 16, "bottleneck": 16, "route": 0.5}
transformers.set_seed(0)


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)


def flags(settings):
    """{"batch_size": 16} as ["--batch-size", "16"]."""
    return [word for key, x in settings.items() for word in (f"--{key.replace('_', '-')}", str(x))]


def start(script, *arguments, processes=1, file_limit=None):
    """Start a script as a process of its own, with torchrun if there are several."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]

    def limit_files():
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.Popen(
        [*launch, HERE / script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limit_files,
    )


def run(script, *arguments, fails=False, **how):
    """Run a script to its end; returns what it printed. If it fails, it does so in a sentence."""
    process = start(script, *arguments, **how)
    output = process.communicate(timeout=240)[0]
    assert (process.returncode != 0) == fails, output
    assert not fails or "Traceback" not in output, output
    return output


def refusal(script, *arguments):
    """What a script says that refuses to work. It runs in this process, which is faster; a failure
    in anything but a sentence is raised here."""
    main, settings_class, positional = {
        "prepare.py": (prepare.prepare, prepare.Settings, "source"),
        "train.py": (train.train, train.Settings, None),
        "sample.py": (sample.sample, sample.Settings, "prompts"),
    }[script]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            prepare.run_script(main, settings_class, "", positional)
    assert ended.value.code not in (0, None)
    return f"{said.getvalue()}{ended.value.code}"


def wait_for(path, process, newer_than=0):
    """Wait until a file is there that was written after a time, or a process ends."""
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > newer_than):
        time.sleep(0.01)


def kill_all(process):
    """SIGKILL for a process and all below it; torchrun's workers have sessions of their own."""
    listing = subprocess.check_output(["ps", "-eo", "pid,ppid"], text=True).split()[2:]
    parents = dict(zip(map(int, listing[::2]), map(int, listing[1::2]), strict=True))
    for pid in parents:
        ancestor = pid
        while ancestor not in (0, process.pid):
            ancestor = parents.get(ancestor, 0)
        if ancestor == process.pid:
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def read_log(folder):
    """The rows of a run's log.csv."""
    with open(Path(folder) / "log.csv") as file:
        return list(csv.DictReader(file))


def weights_of(folder):
    """The averaged weights of a run."""
    return model.PRX.from_pretrained(Path(folder) / "ema").state_dict()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A cache of 600 scenes with features of a tiny teacher, named as other than scenes, so that
    runs on it are not scored."""
    folder = tmp_path_factory.mktemp("scenes")
    make_teacher().save_pretrained(folder / "teacher")
    how = {"limit": 600, "out": str(folder / "data"), "teacher": str(folder / "teacher")}
    prepare.prepare(prepare.Settings(**how))
    meta = model.read_json(folder / "data/meta.json")
    model.write_json(folder / "data/meta.json", meta | {"source": "photos"})
    return folder / "data"


def make_teacher():
    """A small random DINOv2 of transformers'."""
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=70
    )
    network = transformers.Dinov2Model(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def random_prx(**sizes):
    """A small PRX with random weights, also where training begins with zeros."""
    sizes = {"context_in_dim": 24, "hidden_size": 48, "num_heads": 2, "depth": 4} | sizes
    axes = {"axes_dim": (24 // sizes["num_heads"],) * 2}
    network = model.PRX(model.PRXConfig(**(axes | sizes)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


# ------------------------------------------------------------------------------------ the network
@pytest.mark.parametrize(
    ("sizes", "shape", "length"),
    [
        ({"in_channels": 3, "patch_size": 8, "bottleneck_size": 16}, (32, 32), 5),
        ({"in_channels": 4, "patch_size": 1, "num_heads": 3}, (5, 9), 1),
        ({"in_channels": 16, "num_heads": 4, "axes_dim": (4, 8)}, (8, 12), 17),
    ],
)
def test_prx_agrees_with_diffusers_and_weights_go_both_ways(sizes, shape, length):
    ours = random_prx(**sizes)
    ours.save_pretrained("ours")
    theirs = diffusers.PRXTransformer2DModel.from_pretrained("ours", low_cpu_mem_usage=False)
    theirs.save_pretrained("theirs")
    back = model.PRX.from_pretrained("theirs")
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name])
    x, t, text = torch.randn(2, ours.config.in_channels, *shape), torch.rand(2), None
    text = torch.randn(2, length, 24)
    for mask in (None, torch.arange(length) < torch.tensor([[1], [length]])):
        expected = theirs(x, t, text, attention_mask=mask).sample
        torch.testing.assert_close(back(x, t, text, mask), expected, rtol=1e-5, atol=1e-5)


def test_the_default_config_is_the_official_prx():
    with torch.device("meta"):
        ours = model.PRX(model.PRXConfig())
        theirs = diffusers.PRXTransformer2DModel()
    assert sum(parameter.numel() for parameter in ours.parameters()) == 1_170_691_648
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_routed_tokens_skip_the_blocks_that_prx_routes():
    network = random_prx(in_channels=3, patch_size=8, depth=16)
    calls = []
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    keep = torch.tensor([[14, 3, 8], [0, 1, 2]])
    network(torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 5, 24), keep=keep)
    lengths = [inputs[0].shape[1] for inputs, _ in calls]
    assert lengths == [16] * 2 + [3] * 11 + [16] * 3  # blocks 2 to 12 of 16
    rows = torch.arange(2)[:, None]
    before, after, full_rope = calls[1][1], calls[13][0][0], calls[0][0][3]
    routed_img, _, _, routed_rope, _ = calls[2][0]
    assert torch.equal(routed_img, before[rows, keep])
    assert torch.equal(routed_rope[:, :, 0], full_rope[:, keep])
    assert torch.equal(after, before.index_put((rows, keep), calls[12][1]))


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_blocks_compile_to_one_graph_and_one_for_routed_tokens(checkpoint_blocks):
    torch._dynamo.reset()
    network, graphs = random_prx(in_channels=3, depth=6), []
    network.checkpoint_blocks = checkpoint_blocks
    inputs = torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 5, 24)
    keep = torch.tensor([[14, 3, 8], [0, 1, 2]])
    expected, routed = network(*inputs), network(*inputs, keep=keep)

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for block in network.blocks:
        block.compile(backend=compiler, fullgraph=True)
    torch.testing.assert_close(network(*inputs), expected)
    assert len(graphs) == 1
    output = network(*inputs, keep=keep)
    output.square().sum().backward()
    torch.testing.assert_close(output, routed)
    assert len(graphs) == 2


def test_only_long_runs_are_compiled_and_only_on_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: True)
    for device, steps, expected in (
        ("cuda", 1501, True),
        ("cuda", 1500, False),
        ("cpu", 1501, False),
    ):
        compute = model.Compute(torch.device(device), torch.float32)
        assert train.can_compile(train.Settings(steps=steps), compute) is expected
        assert train.can_compile(train.Settings(steps=steps, compile="on"), compute)
        assert not train.can_compile(train.Settings(steps=steps, compile="off"), compute)


def test_velocity_is_noise_minus_picture():
    x, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.06, 0.5, 1.0])
    x_t = torch.lerp(x, noise, t[:, None, None, None])
    torch.testing.assert_close(model.velocity(x, x_t, t, "x"), noise - x)
    assert model.velocity(x, x_t, t, "v") is x
    halved = model.velocity(x, x_t, t, "x", t_floor=0.12)[0]
    torch.testing.assert_close(halved, (noise - x)[0] / 2)


def test_timesteps_are_partly_uniform_and_shifted():
    draws = model.sample_timesteps(9**5, 1, torch.Generator().manual_seed(0))
    shifted = model.sample_timesteps(9**5, 3, torch.Generator().manual_seed(0))
    below = (draws < 0.1).float().mean()  # 1.4% of the sigmoids of a normal, 10% of the others
    assert abs(below - 0.7 * 0.0140 - 0.3 * 0.1) < 0.002
    assert draws.min() >= 1e-3
    torch.testing.assert_close(shifted, (3 * draws / (1 + 2 * draws)).where(draws > 1e-3, shifted))


@pytest.mark.parametrize("depth", [1, 3, 16])
def test_repa_sees_the_tokens_that_stayed_at_any_depth(depth):
    config = random_prx(in_channels=3, patch_size=8, depth=depth).config
    keep = torch.tensor([[14, 3, 8]])
    inputs = torch.randn(1, 3, 32, 32), torch.rand(1), torch.randn(1, 5, 24)
    _, features = model.PRX(config, repa_dim=7)(*inputs, keep=keep)
    assert features.shape == (1, 3, 7)


def test_float16_overflow_leaves_a_step_out(scenes):
    settings = train.Settings(**TINY, data=str(scenes))
    half = model.Compute(torch.device("cpu"), torch.float16)
    run = train.Run(settings, train.Cache(scenes, False).meta, half)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    batch = {"x": torch.randn(4, 3, 32, 32), "noise": torch.randn(4, 3, 32, 32)}
    batch |= {"t": torch.full((4,), 0.5), "text": torch.randn(4, 9, 96)}
    *_, norm = train.train_step(run.model, run, batch, half)
    assert not norm.isfinite()
    assert run.scaler.get_scale() < 2.0**40
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_loss_is_the_formula_with_routing_and_repa():
    network = model.PRX(random_prx(in_channels=3, patch_size=8).config, repa_dim=48)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    info = {"predict": "x", "mask": False}
    x, noise, t = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    keep = torch.stack([torch.randperm(16)[:8], torch.randperm(16)[:8]])
    batch = {"x": x, "noise": noise, "t": t, "text": torch.randn(2, 4, 24), "keep": keep}
    batch["features"] = torch.randn(2, 16, 48)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        mse, repa = train.compute_loss(network, batch, info, t_floor=0.3)
    x_t = 0.2 * noise + 0.8 * x
    x_t[1] = 0.8 * noise[1] + 0.2 * x[1]
    output, tokens = network(x_t, t, batch["text"], keep=keep)
    weight = 1 / torch.tensor([0.3, 0.8])[:, None, None, None] ** 2
    expected = (weight * (output - x) ** 2).mean()
    wanted = batch["features"][torch.arange(2)[:, None], keep]
    torch.testing.assert_close(mse, expected)
    torch.testing.assert_close(repa, 1 - F.cosine_similarity(tokens, wanted, dim=2).mean())


def test_muon_is_orthogonalized_momentum():
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (6, 4))]
    expected = [matrix.detach().clone() for matrix in matrices]
    averages = [torch.zeros_like(matrix) for matrix in matrices]
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in expected]
    how = {"lr": 0.1, "momentum": 0.9}
    reference = torch.optim.Muon(theirs, **how, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    ours = train.Muon(matrices, **how, dtype=torch.float32)
    for _ in range(3):
        for matrix, other, wanted, average in zip(
            matrices, theirs, expected, averages, strict=True
        ):
            matrix.grad = torch.randn_like(matrix)
            other.grad = matrix.grad.clone()
            average.mul_(0.9).add_(matrix.grad, alpha=0.1)
            x = 0.1 * matrix.grad + 0.9 * average
            x = x / x.norm()
            for _ in range(5):
                a = x @ x.mT if x.shape[0] <= x.shape[1] else x.mT @ x
                b = -4.775 * a + 2.0315 * a @ a
                x = 3.4445 * x + (b @ x if x.shape[0] <= x.shape[1] else x @ b)
            wanted.sub_(x, alpha=0.1 * 0.2 * math.sqrt(6))
        ours.step()
        reference.step()
    for matrix, other, wanted in zip(matrices, theirs, expected, strict=True):
        torch.testing.assert_close(matrix.detach(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(matrix, other, rtol=0.1, atol=0.02)  # which computes in bf16


# ------------------------------------------------------------------------------ the frozen networks
@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_autoencoders_agree_with_diffusers(channels):
    theirs = diffusers.AutoencoderTiny(latent_channels=channels)
    theirs.save_pretrained("tiny")
    ours, images = model.load_codec("tiny", CPU), torch.randn(2, 3, 48, 64)
    latents = theirs.encode(images).latents
    torch.testing.assert_close(ours.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(99 * latents), theirs.decode(99 * latents).sample)


def test_dinov2_agrees_with_transformers():
    theirs = make_teacher()
    theirs.save_pretrained("teacher")
    ours = model.load_teacher("teacher", CPU)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    for sides in ((70, 70), (56, 98), (224, 224)):  # its own size, and interpolated ones
        images = torch.rand(2, 3, *sides) * 2 - 1
        expected = theirs((images / 2 + 0.5 - mean) / std).last_hidden_state[:, 1:]
        features = ours(images).flatten(2).mT
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert ours.features(images, 4).shape == (2, 48, 4, 4)


needs_hub_files = pytest.mark.skipif("HF_HOME" not in os.environ, reason="needs files of the Hub")


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A small random T5 of transformers', with the real tokenizer, and its folder."""
    files, folder = model.fetch("google/flan-t5-base", "*.json"), tmp_path_factory.mktemp("t5")
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 3}
    config = transformers.T5Config.from_pretrained(files, **sizes)
    network = transformers.T5EncoderModel(config).eval().requires_grad_(False)
    network.save_pretrained(folder)
    shutil.copy(files / "tokenizer.json", folder)
    return network, transformers.AutoTokenizer.from_pretrained(folder), folder


@needs_hub_files
def test_t5_cuts_texts_into_the_pieces_of_the_real_tokenizer(t5):
    _, real, folder = t5
    ours = model.load_text_encoder(folder, CPU)
    texts = ["", "a" * 3000, " \t\n\u3000 12,345.678 9½ Ａ ﬁne～① e\u0301 x\0\1y a\u200bb\u00a0c"]
    texts.append("👩\u200d👩\u200d👧 family 👍🏽 flag: 🇩🇪 \u2028 \ufeff")
    pieces = sorted(piece for piece in real.get_vocab() if piece[0] != "<")
    for _ in range(1000):
        texts.append("".join(random.choices(pieces, k=40)).replace("▁", " "))
    for first in (0x20, 0xC0, 0x391, 0x410, 0x5D0, 0x620, 0x904, 0x3041, 0x4E00, 0xAC00, 0x1F300):
        letters = [*map(chr, range(first, first + 90)), *" 7e,"]  # Latin to Korean, emoji
        texts += ["".join(random.choices(letters, k=60)) for _ in range(50)]
    assert [ours.tokenize(text) for text in texts] == real(texts).input_ids


@needs_hub_files
def test_t5_agrees_with_transformers_and_keeps_the_end(t5):
    theirs, real, folder = t5
    ours = model.load_text_encoder(folder, CPU)
    captions = ["", "a red", "fox on sand", " ".join(["a red fox on"] * 90)]
    for batch in (captions, captions[3:]):
        how = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": 256}
        inputs = real(batch, **how)
        expected = theirs(**inputs).last_hidden_state[inputs.attention_mask.bool()]
        torch.testing.assert_close(torch.cat(ours.encode(batch)), expected, rtol=1e-4, atol=1e-4)
    assert len(ours.encode(captions)[3]) == 256


def test_words_know_order_and_scripts():
    words = model.Words()
    first, second, none, long = words.encode(["Red circle!", "circle red", "", "so " * 300])
    assert torch.equal(first[0, :32], second[1, :32])
    assert not torch.equal(first[0], second[0])
    assert len(none) == 0
    assert len(long) == 256
    assert words.tokenize("The café") == words.tokenize("cafe\u0301")
    assert words.tokenize("一只猫") == ["一", "只", "猫"]
    assert words.tokenize("हिन्दी") != words.tokenize("हन्द")


# ------------------------------------------------------------------------------- the official PRX
PROMPTS = [
    "A Red Fox, jumping (quickly) over a “lazy” dog!",
    "Ein grüner Käfer läuft; 50% off & salt &amp; pepper -- nice...",
    "a smiling face 🙂 in a hand-made, blue-green, well-worn, old-fashioned t-shirt,jeans",
    "the city of light " * 100,
    "",
]


def train_gemma_tokenizer():
    """A small byte-pair tokenizer that is built like Gemma's, for transformers."""
    bpe = tokenizers.models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=special)
    words = (HERE / "README.md").read_text("utf-8").lower().split()
    tokenizer.train_from_iterator((f"▁{word}" for word in words), trainer)
    template = {"single": "<bos> $A", "special_tokens": [("<bos>", 2)]}
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**template)
    names = {"bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=256, **names
    )


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """A small random PRXPipeline of diffusers', and its folder."""
    folder = tmp_path_factory.mktemp("official") / "pipe"
    tokenizer = train_gemma_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
    }
    config = transformers.T5GemmaConfig(encoder=sizes, decoder=sizes)
    text_encoder = T5GemmaEncoder(config.encoder).eval().requires_grad_(False)
    for parameter in text_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)  # such that the softcap is felt
    transformer = random_prx(in_channels=16, context_in_dim=48)
    for parameter in transformer.parameters():
        parameter.data *= 3  # such that prompts make a difference
    transformer.save_pretrained(folder.parent / "transformer")
    vae = diffusers.AutoencoderTiny(latent_channels=16)
    for parameter in vae.parameters():
        parameter.data *= 1.7
    pipeline = diffusers.PRXPipeline(
        diffusers.PRXTransformer2DModel.from_pretrained(
            folder.parent / "transformer", low_cpu_mem_usage=False
        ),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder,
        tokenizer,
        vae,
        default_sample_size=64,
    )
    pipeline.save_pretrained(folder)
    config.save_pretrained(folder / "text_encoder")  # the official one is for both halves
    return pipeline, folder


def draw_with_diffusers(pipeline, prompt, guidance, height, width):
    """A picture of diffusers' with seed 3 and five steps, as an array."""
    pictures = pipeline(
        prompt,
        height=height,
        width=width,
        num_inference_steps=5,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        use_resolution_binning=False,
    )
    return np.asarray(pictures.images[0]).astype(float)


@pytest.mark.parametrize(("guidance", "height", "width"), [(5, 64, 64), (1, 64, 64), (5, 96, 48)])
def test_an_official_pipeline_draws_as_in_diffusers(official, guidance, height, width):
    pipeline, folder = official
    how = {"run": folder, "seed": 3, "steps": 5, "guidance": guidance, "out": "o/"}
    output = run("sample.py", *PROMPTS, *flags(how | {"height": height, "width": width}))
    assert "only 256 of" in output
    drawn = [np.asarray(Image.open(path)) for path in sorted(Path("o").iterdir())]
    for picture, prompt in zip(drawn, PROMPTS, strict=True):
        wanted = draw_with_diffusers(pipeline, prompt, guidance, height, width)
        assert abs(picture - wanted).max() <= 2, prompt
    assert abs(drawn[0] - drawn[1] / 1.0).max() > 20


@pytest.mark.parametrize("is_composite", [True, False])
def test_t5gemma_agrees_with_transformers(official, is_composite):
    pipeline, folder = official
    shutil.copytree(folder, "pipe")
    if not is_composite:
        pipeline.text_encoder.config.save_pretrained("pipe/text_encoder")
    else:  # as transformers saves both halves
        path = "pipe/text_encoder/model.safetensors"
        weights = {f"encoder.{key}": value for key, value in load_file(path).items()}
        save_file(weights | {"decoder.norm.weight": torch.ones(48)}, path)
    ours = model.load_text_encoder("pipe", CPU)
    ids, mask = pipeline._tokenize_prompts(PROMPTS, "cpu")
    theirs = pipeline.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[mask]
    embeddings = torch.cat(ours.encode(PROMPTS))
    torch.testing.assert_close(embeddings, theirs, rtol=1e-4, atol=1e-4)


def test_gemma_texts_are_cut_into_the_pieces_of_tokenizers(official, monkeypatch):
    pipeline, folder = official
    ours = model.load_text_encoder(folder, CPU)
    monkeypatch.setattr(model, "clean_prompt", str)
    texts = ["", " ", "  two  spaces ", "<bos>a<unk>b", "\n\t", "👩\u200d👧 é 中文"]
    pieces = sorted(pipeline.tokenizer.get_vocab())
    for _ in range(2000):
        texts.append("".join(random.choices(pieces, k=30)).replace("▁", " "))
    assert [ours.tokenize(text) for text in texts] == pipeline.tokenizer(texts).input_ids


def test_prompts_are_cleaned_as_in_diffusers(official):
    clean = official[0].text_preprocessor.clean_text
    texts = [
        "'A lion's mane', at sunset: \"golden\" savanna --- 35mm film; f/1.8, 4k",
        "Shot on a 50mm lens (bokeh), see page three, 100% cotton+wool",
        "A café in Zürich – “Grüezi”… and 3/4 of a cake | menu [5] {new} * * *",
        "&quot;hello&quot; & friends ~ cat . . . dog",
        "-leading, trailing-",
        ":colon : spaced : out:",
    ]
    for text in [*PROMPTS, *texts]:
        assert model.clean_prompt(text) == clean(text)
    for number in range(200):
        text = prepare.draw_scene(number, 8)[1].title()
        assert model.clean_prompt(text) == clean(text)


@pytest.mark.parametrize(
    ("part", "kind"),
    [("vae", "AutoencoderDC"), ("text_encoder", "Qwen3VLModel"), ("vae", None)],
)
def test_other_pipelines_are_refused_before_a_download(official, part, kind):
    shutil.copytree(official[1], "pipe", ignore=shutil.ignore_patterns("*.safetensors"))
    index = model.read_json("pipe/model_index.json")
    model.write_json("pipe/model_index.json", index | {part: ["diffusers", kind]})
    assert f"{kind}" in refusal("sample.py", "a", "--run", "pipe")


def test_a_download_is_announced_with_its_size(monkeypatch, capsys):
    def snapshot_download(source, allow_patterns, dry_run=False):
        files = [types.SimpleNamespace(file_size=5e8, will_download=cached) for cached in (0, 1)]
        return files if dry_run else "folder"

    monkeypatch.setattr(model.huggingface_hub, "snapshot_download", snapshot_download)
    assert model.fetch("user/name", "*.json") == Path("folder")
    assert "user/name: downloading 0.50 GB" in capsys.readouterr().out


@pytest.fixture(scope="session")
def captioned(official):
    """A cache of 40 scenes as pictures, for the official pipeline."""
    folder = official[1].parent
    (folder / "photos").mkdir()
    for number in range(40):
        _, text, picture, _ = prepare.draw_scene(number, 64)
        Image.fromarray(picture).save(folder / f"photos/{number}.png")
        (folder / f"photos/{number}.txt").write_text(text)
    how = {"source": str(folder / "photos"), "out": str(folder / "data"), "size": 64}
    how |= {"codec": str(folder / "pipe/vae"), "text": str(folder / "pipe")}
    prepare.prepare(prepare.Settings(**how))
    return folder / "data"


def test_fine_tuning_an_official_prx_goes_on_to_the_bit(official, captioned):
    pipeline, folder = official
    how = {"data": captioned, "init": folder, "steps": 20, "save_every": 4, "batch_size": 8}
    how |= {"lr": 2e-3, "muon_lr": 2e-3, "checkpoint_blocks": "", "held_out": 0.2}
    arguments = [word for word in flags(how) if word]
    cut = start("train.py", *arguments, "--out", "cut")
    wait_for(Path("cut/ckpt.pt"), cut)
    kill_all(cut)
    run("train.py", *arguments, "--out", "cut")
    run("train.py", *arguments, "--out", "whole")
    torch.testing.assert_close(weights_of("cut"), weights_of("whole"), rtol=0, atol=0)
    how = {"run": "whole", "seed": 3, "steps": 5, "guidance": 5, "out": "o/"}
    run("sample.py", "A Red Ring", *flags(how))
    drawn = np.asarray(Image.open("o/0000.png")) / 1.0
    before = draw_with_diffusers(pipeline, "A Red Ring", 5, 64, 64)
    tuned = diffusers.PRXTransformer2DModel.from_pretrained("whole/ema", low_cpu_mem_usage=False)
    parts = pipeline.components | {"transformer": tuned}
    after = draw_with_diffusers(diffusers.PRXPipeline(**parts), "A Red Ring", 5, 64, 64)
    assert abs(drawn - after).max() <= 2
    assert abs(before - after).max() > 2


def test_fine_tuning_keeps_what_the_weights_were_trained_with(official, captioned):
    settings = train.Settings(data=str(captioned), init=str(official[1]), caption_dropout=1.0)
    cache = train.Cache(captioned, with_teacher=False)
    started = train.Run(settings, cache.meta, CPU)
    kept = {name: started.info[name] for name in ("predict", "shift", "mask", "mean", "std")}
    wanted = {"predict": "v", "shift": 3.0, "mask": True, "mean": [0.0] * 16, "std": [1.0] * 16}
    assert kept == wanted
    assert started.model.config.theta == 10000
    masks = []
    started.model.register_forward_hook(lambda module, inputs, output: masks.append(inputs[3]))
    null_text = torch.nn.functional.pad(torch.ones(1, 1, 48), (0, 0, 0, 30))
    examples = [torch.randn(128, 16, 8, 8), torch.ones(128, 31, 48)]
    batch = train.make_batch(examples, null_text, started, 0, 1)
    train.compute_loss(started.model, batch, started.info, 0.3)
    assert masks[0].sum(1).tolist() == [1] * 128  # of the empty caption


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text_dim": 96, "text": "words"}, "prepare with --text"),
        ({"latent_shape": [4, 8, 8]}, "prepare with --codec"),
        ({"latent_shape": [16, 9, 9]}, "no multiple of 2"),
    ],
)
def test_a_cache_that_does_not_fit_the_first_weights_is_refused(
    official, captioned, changes, sentence
):
    settings = train.Settings(data=str(captioned), init=str(official[1]))
    meta = model.read_json(captioned / "meta.json") | changes
    with pytest.raises(model.UserError, match=sentence):
        train.start_from(settings, meta)


def test_other_statistics_than_those_of_the_first_run_are_refused(trained, scenes):
    settings = train.Settings(data=str(scenes), init=str(trained))
    meta = model.read_json(scenes / "meta.json")
    assert train.start_from(settings, meta)[1]["mean"] == meta["mean"]
    with pytest.raises(model.UserError, match="another mean or std"):
        train.start_from(settings, meta | {"mean": [9.0, 9.0, 9.0]})


def test_checkpointed_blocks_have_the_same_gradients():
    gradients = []
    network = random_prx(in_channels=3, patch_size=8)
    x, t, text = torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 5, 24)
    for network.checkpoint_blocks in (False, True):
        network.zero_grad()
        network(x, t, text).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    torch.testing.assert_close(*gradients)


# ------------------------------------------------------------------------------ scenes and judging
def changed_scenes(scene):
    """The scene with one thing about it changed, in each possible way."""
    first, *rest = scene.things
    taken = [thing.place for thing in scene.things]
    others = [first._replace(colour=c) for c in prepare.COLOURS if c != first.colour]
    others += [first._replace(shape=s) for s in prepare.SHAPES if s != first.shape]
    for place, (x, y) in prepare.PLACES.items():
        if place not in taken:
            x, y = 0.5 + prepare.STEP * x, 0.5 + prepare.STEP * y
            others.append(first._replace(place=place, x=x, y=y))
    changed = [scene._replace(things=[other, *rest]) for other in others]
    changed += [scene._replace(background=b) for b in prepare.COLOURS if b != scene.background]
    return [*changed, scene._replace(things=rest)]


def test_check_passes_scenes_and_is_strict():
    rng = np.random.default_rng(5)
    passed, wrong = [], []
    for _ in range(60):
        scene = prepare.random_scene(rng)
        for size in (32, 64):
            passed.append(sample.check(prepare.render(scene, size), scene)["all"])
        for other in random.sample(changed_scenes(scene), 8):  # or a picture between the two
            share = rng.uniform(0.7, 1)
            picture = (1 - share) * prepare.render(scene, 32) + share * prepare.render(other, 32)
            wrong.append(sample.check(picture.round().astype(np.uint8), scene)["all"])
        noise = rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        wrong.append(sample.check(noise, scene)["all"])
    assert np.mean(passed) >= 0.995
    assert np.mean(wrong) <= 0.01


def test_check_judges_only_what_is_told_and_names_what_is_wrong():
    left = prepare.Thing("red", "circle", "left", 0.23, 0.5, 0.16)
    right = prepare.Thing("blue", "ring", "right", 0.77, 0.5, 0.16)
    picture = prepare.render(prepare.Scene("white", [left, right]), 32)
    told = prepare.Scene(None, [right._replace(place=None), left._replace(place=None)])
    assert all(sample.check(picture, told).values())
    swapped = [left._replace(colour="blue"), right._replace(colour="red")]
    result = sample.check(picture, prepare.Scene("black", swapped))
    assert [name for name, passed in result.items() if not passed] == ["background", "all"]


def test_held_out_is_the_scene_not_the_caption():
    def draw(split, count):
        scenes = [prepare.random_scene(rng, split) for _ in range(count)]
        return {frozenset(thing[:3] for thing in scene.things) for scene in scenes}

    rng = np.random.default_rng(0)
    trained, held_out = draw("train", 3000), draw("held-out", 300)
    assert not trained & (held_out | draw("composition", 300))
    pairs = {thing[:2] for things in trained for thing in things}
    assert not pairs & prepare.NEVER_TRAINED
    for number in range(300):
        _, _, picture, _ = prepare.draw_scene(number, 64)
        assert prepare.split_of(sample.describe(picture)) == "train"


def test_what_a_caption_leaves_open_is_as_people_expect():
    backgrounds, rng = set(), np.random.default_rng(0)
    for number in range(400):
        _, text, picture, _ = prepare.draw_scene(number, 32)
        scene = sample.describe(picture)
        assert scene.background not in {thing.colour for thing in scene.things}
        if "background" not in text:
            backgrounds.add(scene.background)
    assert backgrounds == {"white", "black", "blue"}
    ring, cross = (prepare.Thing("red", shape, None, 0, 0, 0) for shape in ("ring", "cross"))
    scene = prepare.fill_in(prepare.Scene("white", [ring, cross]), rng)
    assert [thing[1:3] for thing in scene.things] == [("ring", "left"), ("cross", "right")]
    scene = prepare.fill_in(prepare.Scene("black", [ring._replace(colour=None)]), rng)
    assert scene.things[0][:3] == ("white", "ring", "bottom")


def test_captions_tell_a_scene_in_several_ways():
    left = prepare.Thing("red", "circle", "left", 0.23, 0.5, 0.16)
    right = prepare.Thing("blue", "ring", "right", 0.77, 0.5, 0.16)
    scene, rng = prepare.Scene("white", [left, right]), np.random.default_rng(0)
    told = {prepare.caption(prepare.leave_open(scene, rng)) for _ in range(200)}
    for text in (
        "a red circle left of a blue ring on a white background",
        "a blue ring right of a red circle",
        "a red circle and a blue ring",
    ):
        assert text in told
    scene = prepare.Scene("white", [left])
    alone = {prepare.caption(prepare.leave_open(scene, rng)) for _ in range(400)}
    assert {"a red circle", "a circle at the left", "a circle on a white background"} <= alone


# -------------------------------------------------------------------------------- the command line
def test_settings_become_flags_whatever_the_fields(monkeypatch, capsys):
    @dataclasses.dataclass
    class Settings:
        bare: int = 3
        percent: Annotated[float, "50% of it"] = 0.5
        on: Annotated[bool, "on by default"] = True
        names: Annotated[list[str], "some"] = ()

    got = []
    monkeypatch.setattr(sys, "argv", ["x", "--bare", "4", "--no-on", "--names", "a", "b"])
    prepare.run_script(got.append, Settings, "A script.")
    assert got == [Settings(4, 0.5, False, ["a", "b"])]
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        prepare.run_script(got.append, Settings, "A script.")
    assert "50% of it (default: 0.5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train.py --batch_size 3", "is --batch-size meant?"),
        ("train.py --ema 1.5", "--ema 1.5 has to be from 0 to 1"),
        ("train.py --lr -1", "--lr -1.0 is not from 0 to inf"),
        ("sample.py a --n 0", "--n 0 draws nothing"),
        ("train.py --data nowhere", "nowhere/meta.json"),
        ("train.py --device mps", "finds no such device"),
        ("prepare.py nowhere", "there is no nowhere"),
        ("prepare.py user/name@v1", "hf download user/name --repo-type dataset --revision v1"),
        ("prepare.py --codec .", "no tiny autoencoder"),
        ("prepare.py --size 100", "104 is one"),
        ("prepare.py --text x/y", "x/y is no folder"),
        ("sample.py a --run x/y", "x/y is no folder"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(command, sentence):
    assert sentence in refusal(*command.split())
    assert not os.listdir()


def test_a_data_set_of_the_hub_is_told_from_a_path():
    download = "hf download a/b --repo-type dataset"
    assert download in prepare.hub_advice("https://huggingface.co/datasets/a/b/tree/v1")
    for path in ("../b", "./b", "/a/b", "a/b.tar", "b", "a/b/c"):
        assert prepare.hub_advice(path) == ""


def test_a_bug_of_a_fork_keeps_its_traceback():
    random_prx(in_channels=3).save_pretrained("ours")

    class Fork(model.PRX):
        def __init__(self, config):
            super().__init__(config)
            self.missspelt.zero_()

    with pytest.raises(AttributeError, match="missspelt"):
        Fork.from_pretrained("ours")


# --------------------------------------------------------------------------------------- the data
def encode_picture(mode="RGB", size=(40, 30), kind="PNG", colour=0, **save):
    """The bytes of a picture of one colour."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, kind, **save)
    return data.getvalue()


def display_p3():
    """The colour profile of telephones: sRGB's with other primaries (XYZ under D50)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if name in primaries:
            values = [round(value * 65536) for value in primaries[name]]
            struct.pack_into(">3i", profile, offset + 8, *values)
    return bytes(profile)


def prepare_folder(folder, capsys, **how):
    """Prepare a folder of pictures at 16 pixels: latents by caption, and what was printed."""
    prepare.prepare(prepare.Settings(source=str(folder), out="cache", **({"size": 16} | how)))
    latents, captions = [], []
    for shard in sorted(Path("cache").glob("shard-*")):
        captions += json.loads((shard / "captions.json").read_text("utf-8"))
        latents.append(np.load(shard / "latents.npy"))
    return dict(zip(captions, np.concatenate(latents), strict=True)), capsys.readouterr().out


def test_pictures_of_all_kinds_become_what_one_sees(capsys):
    folder = Path("photos/deeper")
    folder.mkdir(parents=True)
    files = {
        "clear.png": encode_picture("RGBA", colour=(0, 0, 0, 51)),
        "cmyk.jpg": encode_picture("CMYK", kind="JPEG"),
        "palette.png": encode_picture("P", transparency=0),
        "two.dots.webp": encode_picture(kind="WEBP"),
        "moving.gif": encode_picture("P", kind="GIF"),
        "deeper/naïve name.BMP": encode_picture(kind="BMP"),
        "profile.png": encode_picture(colour=(200, 80, 60), icc_profile=display_p3()),
    }
    for name, data in files.items():
        path = folder.parent / name
        path.write_bytes(data)
        path.with_suffix(".TXT").write_text(f"{name} in\nwords", "utf-8")
    turned, exif = Image.new("RGB", (60, 40), "red"), Image.Exif()
    turned.paste("blue", (0, 0, 30, 40))
    exif[0x0112] = 6  # the left side is the top
    turned.save(folder.parent / "turned.jpg", exif=exif, quality=95)
    (folder.parent / "turned.json").write_text('{"prompt": "a\u2028turn"}')
    latents, output = prepare_folder("photos", capsys)
    assert "8 pictures, 100.0%" in output
    assert latents["clear.png in words"].min() == 204
    assert latents["profile.png in words"][:, 0, 0].tolist() == [216, 69, 50]
    top, bottom = latents["a turn"][:, 2].mean(1), latents["a turn"][:, -3].mean(1)
    assert top[2] > 200 > 50 > top[0]
    assert bottom[0] > 200 > 50 > bottom[2]


def test_what_cannot_be_used_is_left_out_with_the_reason(capsys):
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    picture = encode_picture()
    files = {
        "good.png": picture,
        "broken.jpg": encode_picture("L", (400, 300), "JPEG")[:900],
        "empty.png": b"",
        "gigantic.png": picture[:12]
        + header
        + struct.pack(">I", zlib.crc32(header))
        + picture[33:],
        "deep.tiff": encode_picture("F", colour=0.5, kind="TIFF"),
        "phone.heic": b"x",
        "more.tar.gz": b"x",
        "train.parquet": b"x",
    }
    Path("photos").mkdir()
    for name, data in files.items():
        Path("photos", name).write_bytes(data)
        Path("photos", name).with_suffix(".txt").write_text("two words")
    Path("photos/bare.png").write_bytes(picture)
    Path("photos/._bare.png").write_bytes(picture)
    captions = {"null.txt": " ", "latin.txt": b"caf\xe9", "list.json": "[]"}
    for name, text in captions.items():
        Path("photos", name).write_bytes(text if isinstance(text, bytes) else text.encode())
        Path("photos", name).with_suffix(".png").write_bytes(picture)
    latents, output = prepare_folder("photos", capsys)
    assert list(latents) == ["two words"]
    for line in (
        "3 x broken or gigantic",
        "1 x grey values of kind F",
        "1 x picture of a kind not read here (convert it, or pip install pillow-heif)",
        "1 x archive of a kind not read here (unpack it; a plain .tar is read): photos/more.tar.gz",
        "1 x Parquet file (README.md has the lines that make pictures of it)",
        "1 x no caption beside it: photos/bare.png",
        "1 x empty caption",
        "1 x caption that is not UTF-8: photos/latin.png",
        "1 x caption file that holds no JSON object: photos/list.png",
        "1 pictures, 8.3%",
    ):
        assert line in output, output


def test_captions_are_paired_never_guessed(capsys):
    Path("photos").mkdir()
    files = {
        "Screenshot 12.30.45.png": encode_picture(),
        "Screenshot 12.30.45.txt": b"half past",
        "Screenshot 12.31.02.png": encode_picture(),
        "Screenshot 12.31.02.txt": b"a minute later",
        "s0.input.png": encode_picture(),
        "s0.outputs.txt": b"outputs",
        "x.png": encode_picture(),
        "x.mask.png": encode_picture(),
        "x.txt": b"an x",
        "twice.png": encode_picture(),
        "twice.jpg": encode_picture(kind="JPEG"),
        "twice.txt": b"which one",
        "differ.png": encode_picture(),
        "differ.txt": b"this",
        "differ.json": b'{"text": "that"}',
        "wide.png": encode_picture(),
        "wide.caption": "two bytes".encode("utf-16"),
        "list.png": encode_picture(),
        "list.txt": b"",
        "list.json": b'{"caption": ["a fox", "a red fox"]}',
        "object.png": encode_picture(),
        "object.json": b'{"caption": {"a": 1}}',
        "deep.png": encode_picture(),
        "deep.json": b"[" * 100_000,
        "numbers.png": encode_picture(),
        "numbers.json": b'{"caption": [5, null]}',
        ".hidden.png": encode_picture(),
    }
    with tarfile.open("photos/shard.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    latents, output = prepare_folder("photos", capsys)
    wanted = ["half past", "a minute later", "outputs", "an x", "two bytes", "a red fox"]
    assert sorted(latents) == sorted(wanted), output
    assert "1 x no caption beside it: photos/shard.tar/x.mask.png" in output
    assert "2 x two pictures for one caption" in output
    assert "1 x two captions that differ" in output
    assert "1 x caption that is no text" in output


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_captions_of_an_image_folder_are_read(ending, capsys):
    Path("photos/train").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "c.jpg"):
        Path("photos/train", name).write_bytes(
            encode_picture(kind=name[-3:].replace("jpg", "jpeg"))
        )
    Path("photos/train/b.txt").write_text("not this one")
    rows = [
        ("a.png", 'an "a",\u2028 with more'),
        ("b.png", "a b"),
        ("c.png", "c1"),
        ("c.jpg", "c2"),
    ]
    rows.append(("lost.png", "nothing"))
    if ending == "jsonl":
        lines = [json.dumps({"file_name": name, "x": [1], "text": text}) for name, text in rows]
        Path("photos/train/metadata.jsonl").write_text("\n".join([*lines, "broken", ""]))
    else:
        with open("photos/train/metadata.csv", "w", newline="") as file:
            csv.writer(file).writerows([("file_name", "caption"), *rows, ("",)])
    latents, output = prepare_folder("photos", capsys)
    assert set(latents) == {'an "a", with more', "a b", "c1", "c2"}
    assert "2 x line of metadata that names no picture: photos/train/lost.png" in output


def test_two_prepare_into_one_folder_are_refused():
    first = start("prepare.py", "--limit", 20_000)
    wait_for(Path("data/scenes/prepare.lock"), first)
    assert "another prepare.py writes" in run("prepare.py", "--limit", 9, fails=True)
    kill_all(first)
    assert "9 pictures" in run("prepare.py", "--limit", 9)
    assert not Path("data/scenes/prepare.lock").exists()


def test_a_folder_that_is_a_file_is_refused(scenes):
    Path("taken").write_text("mine")
    assert "cannot be written" in refusal("prepare.py", "--limit", 9, "--out", "taken")
    how = TINY | {"data": scenes, "steps": 2, "out": "taken"}
    assert "cannot be written" in refusal("train.py", *flags(how))
    assert Path("taken").read_text() == "mine"


def test_a_console_that_lacks_letters_is_no_trouble(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    Path("photos").mkdir()
    Path("photos/猫.png").write_bytes(b"")
    Path("photos/a.png").write_bytes(encode_picture())
    Path("photos/a.txt").write_text("é")
    assert "?.png" in run("prepare.py", "photos", "--size", 16)


def test_a_refused_source_leaves_nothing_and_a_broken_tar_is_read_up_to_there(capsys):
    Path("photos").mkdir()
    Path("photos/a.png").write_bytes(encode_picture())
    with pytest.raises(model.UserError, match="no picture with a caption"):
        prepare_folder("photos", capsys)
    assert not Path("cache").exists()
    with pytest.raises(model.UserError, match="no picture with a caption"):
        prepare.prepare(prepare.Settings(source="photos", out="photos"))
    assert Path("photos/a.png").exists()
    Path("photos/a.txt").write_text("an a")
    assert list(prepare_folder("photos", capsys)[0]) == ["an a"]


def test_the_cache_holds_what_it_says(scenes):
    meta, shard = model.read_json(scenes / "meta.json"), scenes / "shard-00000"
    names = ("latents", "text", "offsets", "teacher")
    latents, text, offsets, features = (np.load(shard / f"{name}.npy") for name in names)
    assert meta["shards"] == {"shard-00000": 600}
    assert latents.shape == (600, *meta["latent_shape"]) == (600, 3, 32, 32)
    assert latents.dtype == np.uint8
    measured = latents.mean((0, 2, 3)) / 127.5 - 1, latents.std((0, 2, 3)) / 127.5
    np.testing.assert_allclose((meta["mean"], meta["std"]), measured, atol=1e-4)
    captions = json.loads((shard / "captions.json").read_text())
    expected = model.Words().encode([captions[7]])[0]
    np.testing.assert_allclose(text[offsets[7] : offsets[8]], expected, atol=1e-3)
    teacher = model.load_teacher(scenes.parent / "teacher", CPU)
    seen = teacher.features(torch.tensor(latents[:9]) / 127.5 - 1, 4)
    assert F.cosine_similarity(torch.tensor(features[:9]).float(), seen).min() > 0.98  # bf16


def test_preparing_goes_on_after_a_kill():
    process = start("prepare.py", "--limit", 6000)
    wait_for(Path("data/scenes/shard-00000"), process)
    kill_all(process)
    before = Path("data/scenes/shard-00000/latents.npy").stat().st_mtime_ns
    assert not Path("data/scenes/meta.json").exists()
    assert "6,000 pictures" in run("prepare.py", "--limit", 6000)
    assert Path("data/scenes/shard-00000/latents.npy").stat().st_mtime_ns == before
    assert "complete" in run("prepare.py", "--limit", 6000)
    assert "size was 32 and is now 64" in refusal("prepare.py", "--size", 64)
    assert not list(Path("data").rglob("*.partial"))


@pytest.mark.parametrize("name", ["meta.json", "latents.npy", "offsets.npy", "digest.npy"])
def test_a_broken_cache_is_refused(scenes, name):
    shutil.copytree(scenes, "cache")
    path = next(Path("cache").rglob(name))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(model.UserError, match=r"cache"):
        train.Cache("cache", with_teacher=False)


# ---------------------------------------------------------------------------- training and drawing
@pytest.fixture(scope="session")
def trained(scenes):
    """A short run on the scenes, with routing and REPA."""
    out = scenes.parent / "run"
    how = TINY | {"steps": 48, "sample_every": 20, "repa": 1, "repa_until": 0.5, "data": scenes}
    assert "took" in run("train.py", *flags(how | {"out": out}))
    return out


def test_a_run_leaves_log_samples_weights_and_a_film(trained):
    rows = read_log(trained)
    assert [row["step"] for row in rows] == ["10", "20", "30", "40", "48"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert len(list((trained / "samples").iterdir())) == 3
    assert Image.open(trained / "learning.gif").n_frames == 3
    theirs = diffusers.PRXTransformer2DModel.from_pretrained(
        trained / "ema", low_cpu_mem_usage=False
    )
    assert theirs.config.depth == 4


def test_a_run_goes_on_with_more_steps_but_not_on_other_data(trained, scenes):
    shutil.copytree(trained, "run")
    shutil.copytree(scenes, "moved")
    how = TINY | {"steps": 50, "repa": 1, "out": "run", "data": "moved/", "lr": 0.001}
    run("train.py", *flags(how))
    assert [row["step"] for row in read_log("run")][-2:] == ["48", "50"]
    meta = model.read_json("moved/meta.json")
    model.write_json("moved/meta.json", meta | {"mean": [0, 0, 0]})
    assert "other settings: data" in refusal("train.py", *flags(how))


def test_a_checkpoint_without_a_newer_setting_goes_on(trained):
    old = {"seed": 0, "size": 32}
    prepare.refuse_differences("x", old, {"seed": 0, "size": 32, "new": 1})
    with pytest.raises(model.UserError, match="seed was 0 and is now 1"):
        prepare.refuse_differences("x", old, {"seed": 1})


def test_an_infinite_loss_ends_in_a_sentence_and_saves_nothing(scenes):
    how = TINY | {"data": scenes, "lr": 2e9, "save_every": 1, "out": "run"}
    assert "the loss is infinite" in run("train.py", *flags(how), fails=True)
    assert all(weight.isfinite().all() for weight in weights_of("run").values())


@pytest.mark.parametrize(
    ("interruptions", "processes"),
    [
        ((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL), 1),
        ((signal.SIGTERM, signal.SIGKILL), 2),
    ],
)
def test_an_interrupted_run_goes_on_to_the_bit(scenes, interruptions, processes):
    settings = TINY | {"data": scenes, "steps": 90, "save_every": 7, "repa": 1}
    saved, checkpoint = [0], Path("cut/ckpt.pt")
    for how in interruptions:
        started = time.time()
        cut = start("train.py", *flags(settings | {"out": "cut"}), processes=processes)
        wait_for(checkpoint, cut, newer_than=started)
        if how == signal.SIGKILL:
            kill_all(cut)
        else:
            cut.send_signal(how)
            assert "goes on" in cut.communicate(timeout=60)[0]
        saved.append(torch.load(checkpoint, weights_only=True)["step"])
    assert saved == sorted(set(saved))
    assert saved[-1] < 90
    for out in ("cut", "whole"):
        run("train.py", *flags(settings | {"out": out}), processes=processes)
    torch.testing.assert_close(weights_of("cut"), weights_of("whole"), rtol=0, atol=0)
    steps = [int(row["step"]) for row in read_log("cut")]
    assert steps == sorted(set(steps))


def test_a_full_disk_ends_in_a_sentence_and_keeps_the_last_checkpoint(trained):
    shutil.copytree(trained, "run")
    before = Path("run/ckpt.pt").read_bytes()
    how = TINY | {"steps": 60, "repa": 1, "out": "run", "data": trained.parent / "data"}
    output = run("train.py", *flags(how), fails=True, file_limit=99_999)
    assert "cannot be written" in output
    assert Path("run/ckpt.pt").read_bytes() == before
    assert not list(Path("run").rglob("*.partial"))


def test_processes_and_parts_of_a_batch_change_nothing(scenes):
    settings = TINY | {"data": scenes, "steps": 20, "dtype": "fp32", "repa": 1}
    losses = {}
    for out, more, processes in (
        ("one", {}, 1),
        ("two", {}, 2),
        ("parts", {"micro_batch": 6}, 1),
    ):
        run("train.py", *flags(settings | more | {"out": out}), processes=processes)
        losses[out] = [float(row["loss"]) for row in read_log(out)]
    np.testing.assert_allclose(losses["one"], losses["two"], rtol=1e-4)
    np.testing.assert_allclose(losses["one"], losses["parts"], rtol=1e-4)
    assert float(read_log("one")[0]["repa_loss"]) > 0


def test_float16_trains_with_a_scaler(scenes):
    settings = TINY | {"data": scenes, "steps": 4, "warmup": 1}
    for dtype in ("fp16", "fp32"):
        run("train.py", *flags(settings | {"dtype": dtype, "out": dtype}))
    state = torch.load("fp16/ckpt.pt", weights_only=True)
    assert state["scaler"]["scale"] > 1
    losses = [[float(row["loss"]) for row in read_log(dtype)] for dtype in ("fp16", "fp32")]
    np.testing.assert_allclose(*losses, rtol=0.05)


def test_a_second_stage_begins_with_the_weights_of_the_first(trained, scenes):
    how = TINY | {"data": scenes, "init": trained, "steps": 1, "lr": 1e-9, "muon_lr": 1e-9}
    run("train.py", *flags(how | {"out": "second", "batch_size": 4}))
    torch.testing.assert_close(weights_of("second"), weights_of(trained))
    output = refusal("train.py", *flags(how | {"out": "third", "width": 64}))
    assert "does not fit" in output


@needs_hub_files
def test_latents_of_a_codec_from_the_hub_and_a_t5_train_and_draw(t5):
    how = {"size": 128, "codec": "taef2", "text": str(t5[2]), "limit": 9}
    prepare.prepare(prepare.Settings(out="cache", **how))
    latents = torch.tensor(np.load("cache/shard-00000/latents.npy")).float()
    images = np.stack([prepare.draw_scene(number, 128)[2] for number in range(9)])
    decoded = model.load_codec("taef2", CPU).decode(latents).clamp(-1, 1) / 2 + 0.5
    error = decoded - torch.tensor(images).permute(0, 3, 1, 2) / 255
    assert -10 * error.square().mean((1, 2, 3)).log10().mean() > 27  # dB
    meta = model.read_json("cache/meta.json")
    model.write_json("cache/meta.json", meta | {"source": "photos"})
    how = TINY | {"data": "cache", "out": "run", "steps": 2, "batch_size": 4}
    run("train.py", *flags(how))
    run("sample.py", "a red fox", *flags({"run": "run", "steps": 2, "out": "fox.jpg"}))
    assert Image.open("fox.jpg").format == "JPEG"
    assert "not trained on scenes" in refusal("sample.py", "--score", "--run", "run")


def test_a_picture_is_the_same_whatever_else_is_drawn(trained):
    how = flags({"run": trained, "steps": 3, "seed": 5})
    run("sample.py", "a ring", "b", *how, "--n", 2, "--out", "many")
    run("sample.py", "b", *how, "--out", "one/")
    assert "never seen in training: dog" in run("sample.py", "a red dog", *how)
    assert "12 drawn" in run("sample.py", *how, "--out", "all.png")
    many, one = (np.asarray(Image.open(path)) / 1.0 for path in ("many/0002.png", "one/0000.png"))
    assert one.shape == (32, 32, 3)
    assert abs(many - one).max() <= 2
    assert one.std() > 1


def make_pipeline(trained, network):
    """A Pipeline of the run with another network."""
    info = model.read_json(trained / "ema/nanoprx.json")
    return sample.Pipeline(network, info, CPU)


def test_longer_prompts_than_in_training_are_not_cut(trained):
    network = random_prx(in_channels=3, patch_size=8, context_in_dim=96)
    torch.nn.init.normal_(network.txt_in.weight)
    for block in network.blocks:
        torch.nn.init.normal_(block.attention.txt_kv_proj.weight)
    pipeline = make_pipeline(trained, network)
    prompt = "a red circle left of a blue square on a white background "
    prompts = [prompt, prompt * 2 + "red", prompt * 2 + "blue"]
    embeddings = sample.encode_prompts(prompts, pipeline.info, CPU)
    together = pipeline.draw(embeddings, [0, 0, 0], 2).astype(float)
    alone = [pipeline.draw([embeddings[0], each], [0], 2)[0] for each in embeddings[1:]]
    assert abs(together - alone).max() <= 2
    assert abs(together[1] - together[2]).max() > 2


def test_the_sampler_is_that_of_diffusers(trained):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    seen = []

    def network(x, t, text, mask):
        seen.append((t[0].item(), len(x)))
        return x * t[:, None, None, None]

    noise = torch.randn(1, 3, 4, 4)
    x = noise.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(x * t / 1000, t, x).prev_sample
    text, mask = torch.zeros(2, 1, 1), torch.ones(2, 1, dtype=torch.bool)
    info = {"shift": 3.0, "predict": "v"}
    ours = sample.generate(network, text, mask, noise, info, 8, guidance_scale=1)
    torch.testing.assert_close(ours, x)
    assert [count for _, count in seen] == [1] * 8  # without guidance one pass a step


def test_guidance_goes_away_from_the_empty_caption():
    def network(x, t, text, mask):
        return text.mean((1, 2))[:, None, None, None].expand_as(x)

    noise, text = torch.randn(3, 1, 2, 2), torch.tensor([1.0, 2, 2, 2])[:, None, None]
    mask, info = torch.ones(4, 1, dtype=torch.bool), {"shift": 1.0, "predict": "v"}
    latents = sample.generate(network, text, mask, noise, info, 5, guidance_scale=3.0)
    torch.testing.assert_close(latents, noise - (1 + 3.0 * (2 - 1)))


def test_score_reports_every_kind_and_attribute(trained):
    network = model.PRX.from_pretrained(trained / "ema")
    shares = sample.score(make_pipeline(trained, network), 2, steps=1)
    kinds = {"named", "open", "free", "composition"}
    assert shares.keys() == kinds | {"colour", "shape", "place", "background", "count"}


# -------------------------------------------------------------------------------------- held out
def test_held_out_pictures_are_chosen_by_content_and_never_trained_on(scenes):
    cache = train.Cache(scenes, with_teacher=False)
    cache.shards[0]["digest"] = np.arange(600, dtype=np.uint32) % 300 * 14_316_557  # evenly
    trained, held_out = cache.split(0.02)
    digests = cache.shards[0]["digest"]
    assert len(held_out) == 14  # seven digests of 300, each twice
    assert not set(digests[trained]) & set(digests[held_out])
    settings = train.Settings(batch_size=100, steps=30)
    seen = {number for batch in train.index_batches(trained, settings, 0, 0, 1) for number in batch}
    assert seen == set(trained)
    assert len(cache.split(0)[1]) == 0
    assert len(cache.split(0.001)[1]) == 0  # too few to tell anything


def test_the_digest_is_of_the_picture(capsys):
    Path("photos").mkdir()
    for name, colour in (("a", 0), ("b", 255), ("c", 0)):
        Path(f"photos/{name}.png").write_bytes(encode_picture("L", colour=colour))
        Path(f"photos/{name}.txt").write_text(name)
    prepare_folder("photos", capsys)
    first, second, third = np.load("cache/shard-00000/digest.npy")
    assert first == third != second


def test_validation_is_by_band_and_only_of_the_weights(scenes):
    cache = train.Cache(scenes, with_teacher=False)
    started = train.Run(train.Settings(**TINY, data=str(scenes), predict="v"), cache.meta, CPU)
    _, held_out = cache.split(0.2)
    errors = train.validate(started, cache, held_out, CPU)
    assert errors == train.validate(started, cache, held_out, CPU)
    # The first output is 0, so that the error is the mean square of noise - x, 2 if x is normalized
    for error in errors.values():
        assert abs(error - 2) < 0.2


def test_prompts_of_the_grids_come_from_a_file_or_are_held_out(trained, scenes):
    cache = train.Cache(scenes, with_teacher=False)
    captions = prepare.read_captions(scenes / "shard-00000")
    held_out = {captions[index] for index in cache.split(0.02)[1]}
    examples = model.read_json(trained / "ema/nanoprx.json")["examples"]
    assert set(examples) <= held_out
    Path("prompts.txt").write_text("a dog\n\n a cat \n")
    settings = train.Settings(prompts="prompts.txt")
    assert train.read_prompts(settings, cache, []) == ["a dog", "a cat"]
