"""Every promise about the four scripts, tried as functions and as processes. That they agree with
diffusers and transformers is tried in extras/test_extras.py."""

import contextlib
import csv
import dataclasses
import io
import itertools
import math
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from torch._dynamo.testing import CompileCounter

import model
import prepare
import sample
import train

HERE = Path(__file__).parent
CPU = model.Compute(torch.device("cpu"), torch.float32)
TINY = {"width": 32, "depth": 4, "batch_size": 16, "bottleneck": 16, "route": 0.5, "warmup": 1}
torch.manual_seed(0)
random.seed(0)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may ignore it in background jobs


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):  # for each test
    monkeypatch.chdir(tmp_path)


def flags(settings):
    """{"batch_size": 16} as ["--batch-size", "16"]."""
    return [word for key, x in settings.items() for word in (f"--{key.replace('_', '-')}", str(x))]


def start(script, *arguments, processes=1):
    """Start a script as a process of its own, with torchrun if there are several."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, HERE / script, *map(str, arguments)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
    return subprocess.Popen(command, text=True, **how)


def run(script, *arguments, processes=1):
    """Run a script to its end; returns what it printed."""
    process = start(script, *arguments, processes=processes)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return output


def call(script, *arguments):
    """Run a script in this process, which is faster. Returns its sentence if it fails, or None."""
    main = {"prepare": prepare.prepare, "sample": sample.sample, "train": train.train}[script]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(signal, "signal", lambda number, handler: None)
        try:
            prepare.run_script(main, sys.modules[script].Settings, "")
        except SystemExit as ended:
            assert ended.code not in (0, None)
            return f"{said.getvalue()}{ended.code}"


@contextlib.contextmanager
def limited(kind, limit):
    """Within this context the process has a limit of the resource module."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def wait_for(path, process, newer_than=0):
    """Wait until a file is there that was written after a time, or a process ends."""
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > newer_than):
        time.sleep(0.01)


def kill_all(process, out):
    """SIGKILL for a process and all others that write to its folder, such as torchrun's workers."""
    subprocess.run(["pkill", "-KILL", "-f", str(out)])
    process.communicate()


def read_log(folder):
    """The rows of a run's log.csv."""
    return [*csv.DictReader((Path(folder) / "log.csv").read_text().splitlines())]


def weights_of(folder):
    """The averaged weights of a run."""
    return model.PRX.from_pretrained(Path(folder) / "ema").state_dict()


def random_prx(std=0.05, **sizes):
    """A small PRX with random weights, also where training begins with zeros."""
    sizes = {"context_in_dim": 24, "hidden_size": 48, "num_heads": 2, "depth": 4} | sizes
    axes = {"axes_dim": (24 // sizes["num_heads"],) * 2}
    network = model.PRX(model.PRXConfig(**(axes | sizes)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return network


@pytest.fixture(scope="session")
def monsters(tmp_path_factory):
    """A cache of 600 monsters with random features, called photos, so that runs are not scored."""
    folder = tmp_path_factory.mktemp("monsters")
    prepare.prepare(prepare.Settings(limit=600, out=str(folder / "data")))
    features = np.random.default_rng(0).normal(size=(600, 12, 4, 4)).astype(np.float16)
    (folder / "data/teacher.bin").write_bytes(features.tobytes())
    meta = model.read_json(folder / "data/meta.json")
    meta |= {"source": "photos", "teacher": "random", "teacher_shape": [12, 4, 4]}
    model.write_json(folder / "data/meta.json", meta)
    return folder / "data"


@pytest.fixture(scope="session")
def trained(monsters):
    """A short run on the monsters, with routing and REPA."""
    out = monsters.parent / "run"
    how = TINY | {"steps": 48, "sample_every": 20, "repa": 1, "data": monsters}
    assert "is trained" in run("train.py", *flags(how | {"out": out}))
    return out


# ------------------------------------------------------------------------------------ the network
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


def test_blocks_compile_to_one_graph_and_one_for_routed_tokens():
    network, counter = random_prx(in_channels=3, depth=6), CompileCounter()
    inputs = torch.randn(2, 3, 32, 32), torch.rand(2), torch.randn(2, 5, 24)
    keep = torch.tensor([[14, 3, 8], [0, 1, 2]])
    expected, routed = network(*inputs), network(*inputs, keep=keep)
    for block in network.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(network(*inputs), expected)
    assert counter.frame_count == 1
    torch.testing.assert_close(network(*inputs, keep=keep), routed)
    assert counter.frame_count == 2


def test_repa_sees_the_tokens_that_stayed_at_any_depth():
    inputs = torch.randn(1, 3, 32, 32), torch.rand(1), torch.randn(1, 5, 24)
    for depth in range(2, 17):
        config = random_prx(in_channels=3, patch_size=8, depth=depth).config
        output, features = model.PRX(config, 7)(*inputs, keep=torch.tensor([[14, 3, 8]]))
        assert output.shape == (1, 3, 32, 32)
        assert features.shape == (1, 3, 7)


def test_timesteps_are_partly_uniform_and_shifted():
    draws = model.sample_timesteps(9**5, 1, torch.Generator().manual_seed(0))
    shifted = model.sample_timesteps(9**5, 3, torch.Generator().manual_seed(0))
    below = (draws < 0.1).float().mean()  # 1.4% of the sigmoids of a normal, 10% of the others
    assert abs(below - 0.7 * 0.0140 - 0.3 * 0.1) < 0.002
    assert draws.min() >= 1e-3
    torch.testing.assert_close(shifted, (3 * draws / (1 + 2 * draws)).where(draws > 1e-3, shifted))


def test_loss_is_the_formula_with_routing_and_repa_and_takes_the_flash_kernel():
    network = model.PRX(random_prx(in_channels=3, patch_size=8).config, repa_dim=48)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, noise, t = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32), torch.tensor([0.2, 0.8])
    keep = torch.stack([torch.randperm(16)[:8], torch.randperm(16)[:8]])
    batch = {"x": x, "noise": noise, "t": t, "text": torch.randn(2, 4, 24), "keep": keep}
    batch["features"] = torch.randn(2, 16, 48)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        mse, repa = train.compute_loss(network, batch, {"predict": "x", "mask": False}, 0.3)
    x_t = torch.stack((0.2 * noise[0] + 0.8 * x[0], 0.8 * noise[1] + 0.2 * x[1]))
    output, tokens = network(x_t, t, batch["text"], keep=keep)
    weight = 1 / torch.tensor([0.3, 0.8])[:, None, None, None] ** 2
    wanted = batch["features"][torch.arange(2)[:, None], keep]
    torch.testing.assert_close(mse, (weight * (output - x) ** 2).mean())
    torch.testing.assert_close(repa, 1 - F.cosine_similarity(tokens, wanted, dim=2).mean())


def test_muon_is_momentum_with_nesterov_whose_singular_values_are_moved_near_one():
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4, 6), (6, 4))]
    expected = [matrix.detach().clone() for matrix in matrices]
    averages, muon = [0, 0, 0], train.Muon(matrices, 0.1, 0.9, torch.float32)
    for _ in range(2):
        for number, matrix in enumerate(matrices):
            matrix.grad = torch.randn_like(matrix)
            averages[number] = 0.9 * averages[number] + 0.1 * matrix.grad
            ahead = 0.9 * averages[number] + 0.1 * matrix.grad
            u, s, vh = torch.linalg.svd(ahead, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
            expected[number] -= 0.1 * 0.2 * math.sqrt(6) * (u * s @ vh)
        muon.step()
    for matrix, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix.detach(), wanted, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------- codecs and encoders
def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in call("prepare", "--text", "google/flan-t5-base")


def test_words_know_order_and_scripts():
    words = model.Words()
    first, second, none, long = words.encode(["Red circle!", "circle red", "", "so " * 300])
    assert torch.equal(first[0, :32], second[1, :32])
    assert not torch.equal(first[0], second[0])
    assert [len(none), len(long)] == [0, 256]
    assert words.tokenize("The cafe\u0301's no. 5") == ["café", "s", "no", "5"]
    assert words.tokenize("हिन्दी") != words.tokenize("हन्द")


# ---------------------------------------------------------------------------- monsters and judging
def test_check_passes_monsters_whatever_is_told_and_is_strict():
    dice, rng, wrong = random.Random(5), np.random.default_rng(5), []
    for _ in range(60):
        monster = prepare.random_monster(dice)
        picture, few = prepare.render(monster, 32), prepare.leave_open(monster, 3, dice)
        assert sample.check(picture, monster)["all"] and sample.check(picture, few)["all"]
        assert sample.check(prepare.render(monster, 64), monster)["all"]
        for part in prepare.PARTS:  # another in one part, or a picture between the two
            other = dice.choice([x for x in sample.variants(monster, part) if x != monster])
            share = dice.uniform(0.6, 1)
            between = (1 - share) * picture + share * prepare.render(other, 32)
            wrong.append(sample.check(between.round().astype(np.uint8), monster)["all"])
        noise = rng.integers(0, 256, picture.shape).astype(np.uint8)
        blank = np.full_like(picture, dice.choice([*prepare.BACKGROUNDS.values()]))
        mean = np.mean([prepare.render(prepare.random_monster(dice), 32) for _ in range(9)], axis=0)
        wrong += [sample.check(each.astype(np.uint8), few)["all"] for each in (noise, blank, mean)]
    assert not any(wrong)


def test_check_judges_only_what_is_told_and_names_what_is_wrong():
    monster = prepare.random_monster(random.Random(0)) | {"head": "horns", "eyes": "two eyes"}
    picture = prepare.render(monster, 32)
    told = monster | {"head": None, "background": None}
    assert sample.check(picture, told).keys() == {*told} - {"head", "background"} | {"all"}
    result = sample.check(picture, monster | {"head": "ears", "eyes": "one eye"})
    assert [name for name, passed in result.items() if not passed] == ["eyes", "head", "all"]


def test_held_out_is_the_monster_not_the_caption():
    def draw(split, count):
        monsters = [prepare.random_monster(dice, split) for _ in range(count)]
        return {tuple(each[part] for part in each if part != "background") for each in monsters}

    dice = random.Random(0)
    trained, held_out = draw("train", 3000), draw("held-out", 300)
    assert not trained & (held_out | draw("new", 300))
    assert not {each[:2] for each in trained} & prepare.NEVER_TRAINED
    for number in range(100):
        picture = np.asarray(prepare.draw_monster(number, 32)[1])
        monster = prepare.random_monster(random.Random(number))
        told = dict.fromkeys(prepare.PARTS) | {"colour": monster["colour"]}
        assert prepare.split_of(monster) == "train" and sample.fit(picture, told) == monster


def test_each_part_looks_like_no_other():
    monster = prepare.random_monster(random.Random(0)) | {"pattern": "plain skin", "colour": "red"}
    for part in prepare.PARTS:
        pictures = [prepare.render(each, 32) for each in sample.variants(monster, part)]
        for a, b in itertools.combinations(pictures, 2):
            assert np.abs(a.astype(float) - b).max() > 30, part


def test_captions_tell_a_monster_in_several_ways():
    dice = random.Random(0)
    names = ("blue", "round", "red spots", "three eyes", "a smile", "a green crown", "yellow")
    monster = dict(zip(prepare.PARTS, names, strict=True))
    told = {prepare.caption_of(monster, dice) for _ in range(2000)}
    with_crown = "three eyes, a smile, red spots and a green crown on a yellow background"
    assert f"a round blue monster with {with_crown}" in told
    assert f"a blue round monster with {with_crown}" in told
    told = {prepare.caption_of(prepare.leave_open(monster, 7, dice), dice) for _ in range(2000)}
    assert {"a round monster", "a monster on a yellow background", "a monster with a smile"} <= told
    assert "a blue monster with a green crown and three eyes" in told


def test_captions_of_the_training_may_leave_out_the_colour_of_a_hat_or_pattern():
    told = {prepare.draw_monster(number, 32)[0] for number in range(2000)}
    for phrase in ("hat", "party hat", "a red party hat", "crown", "spots", "red spots"):
        assert any(f"with {phrase}" in caption for caption in told)


def test_what_captions_leave_open_is_even_in_true_drawings_and_uneven_in_equal_ones():
    others, true = ([prepare.random_monster(random) for _ in range(n)] for n in (4000, 400))
    assert sample.uneven(true, others, "body") < 0.08 < sample.uneven(true[:9], others, "body")


# -------------------------------------------------------------------------------- the command line
def test_settings_become_flags_whatever_the_fields(monkeypatch, capsys):
    @dataclasses.dataclass
    class Settings:
        names: str = prepare.flag((), "some", nargs="*")
        bare_number: int = prepare.flag(3, "from 1 on", 1)
        percent: float = prepare.flag(0.5, "50% of it")
        on: bool = prepare.flag(False, "off without it")

    got = []
    monkeypatch.setattr(sys, "argv", ["x", "a", "b", "--bare-number", "4", "--on"])
    prepare.run_script(got.append, Settings, "A script.")
    assert got == [Settings(["a", "b"], 4, 0.5, True)]
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        prepare.run_script(got.append, Settings, "A script.")
    assert "50% of it (default: 0.5)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("train --init x --predict v", "--init has a predict of its own"),
        ("train --data nowhere", "nowhere/meta.json cannot be read"),
        ("train --batch-size 4000000", "--batch-size 4000000 is not from 1 to 65536"),
        ("sample a --run x/y", "x/y is no folder"),
        ("prepare nowhere", "nowhere is no folder, or has no picture"),
        ("prepare .", "the cache would lie in . itself"),
        ("prepare --codec .", ". holds no tiny autoencoder"),
        ("prepare --size 100", "--size takes multiples of 16, for monsters up to 128"),
    ],
)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(command, sentence):
    assert sentence in call(*command.split())
    assert not os.listdir()


def test_a_bug_of_a_fork_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(AttributeError, match="missspelt"):
        prepare.run_script(lambda settings: settings.missspelt, train.Settings, "")


def test_compiling_without_a_compiler_is_one_sentence(monsters, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a compiler" in call("train", "--compile", *flags({"data": monsters}))


# --------------------------------------------------------------------------------------- the data
def encode_picture(mode="RGB", size=(40, 30), kind="PNG", colour=0, **save):
    """The bytes of a picture of one colour."""
    data = io.BytesIO()
    Image.new(mode, size, colour).save(data, kind, **save)
    return data.getvalue()


def swapped_profile():
    """The colour profile of sRGB, with red and green in each other's place."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ").replace(b"....", b"gXYZ")


def write_files(files):
    """Write a dict from names to bytes or text."""
    for name, data in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())


def prepare_folder(folder, capsys, **how):
    """Prepare a folder of pictures at 16 pixels: latents by caption, and what was printed."""
    prepare.prepare(prepare.Settings(source=str(folder), out="cache", **({"size": 16} | how)))
    meta = model.read_json("cache/meta.json")
    latents = np.fromfile("cache/latents.bin", np.uint8).reshape(-1, *meta["latent_shape"])
    captions = prepare.read_captions("cache")
    return dict(zip(captions, latents, strict=True)), capsys.readouterr().out


def test_pictures_of_all_kinds_become_what_one_sees(capsys):
    files = {
        "clear.png": encode_picture("RGBA", colour=(0, 0, 0, 51)),
        "cmyk.jpg": encode_picture("CMYK", kind="JPEG"),
        "palette.png": encode_picture("P", transparency=0),
        "two.dots.webp": encode_picture(kind="WEBP"),
        "deeper/naïve name.BMP": encode_picture(kind="BMP"),
        "profile.png": encode_picture("P", colour=(200, 80, 60), icc_profile=swapped_profile()),
    }
    write_files({f"photos/{name}": data for name, data in (files | {"a.mp4": b""}).items()})
    for name in files:
        Path("photos", name).with_suffix(".TXT").write_text(f"\ufeff{name} in\nwords", "utf-8")
    turned, exif = Image.new("RGB", (60, 40), "red"), Image.Exif()
    turned.paste("blue", (0, 0, 30, 40))
    exif[0x0112] = 6  # the left side is the top
    turned.save("photos/turned.jpg", exif=exif, quality=95)
    Path("photos/turned.caption").write_text("a\u2028turn", "utf-8")
    latents, output = prepare_folder("photos", capsys)
    assert "holds 7 pictures" in output
    assert latents["clear.png in words"].min() == 204
    red, green, _ = latents["profile.png in words"][:, 0, 0]
    assert green > 180 > 100 > red
    top, bottom = latents["a turn"][:, 2].mean(1), latents["a turn"][:, -3].mean(1)
    assert min(top[2], bottom[0]) > 200 > 50 > max(top[0], bottom[2])


def test_what_cannot_be_used_is_left_out_and_counted_by_reason(capsys):
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    picture = encode_picture()
    gigantic = picture[:12] + header + struct.pack(">I", zlib.crc32(header)) + picture[33:]
    files = {
        "broken.jpg": encode_picture("L", (400, 300), "JPEG")[:900],
        "deep.tiff": encode_picture("F", colour=0.5, kind="TIFF"),
        "gigantic.png": gigantic,
        "phone.heic": b"x",
        "bare.png": picture,
        "marks.png": picture,
        "latin.png": picture,
        "twice.png": picture,
        "twice.jpg": encode_picture(kind="JPEG"),
        "z_good.png": picture,
        "z_hidden/.z.png": picture,
    }
    captions = dict.fromkeys(files, "two words") | {"marks.png": "A !! 🙂", "latin.png": b"caf\xe9"}
    del captions["bare.png"]
    write_files({f"photos/{name}": data for name, data in files.items()})
    write_files({f"photos/{name.rsplit('.', 1)[0]}.txt": text for name, text in captions.items()})
    latents, output = prepare_folder("photos", capsys, size=32, limit=1)
    assert list(latents) == ["two words"]  # the limit is of pictures that are used
    for line in (
        "3 x left out: broken or gigantic picture, or one with more than 8 bits of grey",
        "1 x left out: file of a kind that is not read, such as photos/phone.heic",
        "1 x left out: no .txt or .caption beside it, such as photos/bare.png",
        "1 x left out: caption without words, such as photos/marks.png",
        "1 x left out: caption that is not UTF-8, or file that cannot be read",
        "2 x left out: two pictures for one caption, such as photos/twice.jpg",
        "1 x enlarged: picture with a shorter side, such as photos/z_good.png",
    ):
        assert line in output, output


def test_the_cache_gets_the_whole_name_of_its_folder_and_a_folder_named_monsters_is_a_folder(
    capsys,
):
    for name in ("photos.v1", "monsters"):
        write_files({f"{name}/a.png": encode_picture(), f"{name}/a.txt": f"an a of {name}"})
        prepare.prepare(prepare.Settings(source=f"{name}/", size=16))
        assert prepare.read_captions(f"data/{name}") == [f"an a of {name}"]
    os.chdir("monsters")
    assert prepare.Settings(source="..").out == f"data/{Path.cwd().parent.name}"


def test_the_cache_holds_what_it_says(monsters):
    meta = model.read_json(monsters / "meta.json")
    latents = np.memmap(monsters / "latents.bin", np.uint8, "r", shape=(600, *meta["latent_shape"]))
    lengths = np.fromfile(monsters / "lengths.bin", np.int32)
    text = np.fromfile(monsters / "text.bin", np.float16).reshape(lengths.sum(), meta["text_dim"])
    caption, picture = prepare.draw_monster(7, 32)
    assert np.array_equal(latents[7], np.asarray(picture).transpose(2, 0, 1))
    assert prepare.read_captions(monsters)[7] == caption
    measured = latents.mean((0, 2, 3)) / 127.5 - 1, latents.std((0, 2, 3)) / 127.5
    np.testing.assert_allclose((meta["mean"], meta["std"]), measured, atol=1e-4)
    start, expected = lengths[:7].sum(), model.Words().encode([caption])[0]
    np.testing.assert_allclose(text[start:][: lengths[7]], expected, atol=1e-3)
    assert np.fromfile(monsters / "digest.bin", np.uint32)[7] == zlib.crc32(np.asarray(picture))


def test_preparing_goes_on_after_a_kill_and_ends_with_the_same_bytes():
    how = {"limit": 2500, "size": 64, "out": Path("cut").resolve()}
    process = start("prepare.py", *flags(how))
    wait_for(Path("cut/progress.json"), process)
    kill_all(process, how["out"])
    assert not Path("cut/meta.json").exists()
    with open("cut/latents.bin", "ab") as file:
        file.write(b"half a picture")  # that a stopped run left behind
    assert "is now 9" in call("prepare", *flags(how | {"limit": 9}))
    assert "has 1,024 pictures so far" in run("prepare.py", *flags(how))
    call("prepare", *flags(how | {"out": "whole"}))
    for name in os.listdir("whole"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name
    assert "is complete" in run("prepare.py", *flags(how))


def test_what_cannot_be_written_is_a_sentence_and_nothing_is_lost(trained, monsters):
    Path("taken").write_text("mine")
    shutil.copytree(trained, "run")
    before = Path("run/ckpt.pt").read_bytes()
    how = TINY | {"data": monsters, "repa": 1, "steps": 60}
    with limited(resource.RLIMIT_FSIZE, 99_999):
        assert "data/monsters cannot be written" in call("prepare", "--limit", 99)
    with limited(resource.RLIMIT_FSIZE, 900_000):
        assert "ckpt.pt cannot be written" in call("train", *flags(how | {"out": "run"}))
    assert "cannot be written" in call("prepare", "--limit", 9, "--out", "taken")
    assert "cannot be written" in call("train", *flags(how | {"out": "taken"}))
    assert Path("taken").read_text() == "mine"
    assert Path("run/ckpt.pt").read_bytes() == before
    assert not list(Path("run").rglob("*.partial"))


def test_a_broken_cache_is_refused_and_blamed(monsters):
    for name in ("meta.json", "latents.bin", "lengths.bin", "text.bin"):
        shutil.copytree(monsters, "cache", dirs_exist_ok=True)
        path = Path("cache", name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 8 * 4])
        with pytest.raises(model.UserError, match=r"cache"):
            train.Cache("cache")
    shutil.copytree(monsters, "cache", dirs_exist_ok=True)
    np.full(600 * 12 * 16, np.nan, np.float16).tofile("cache/teacher.bin")
    with pytest.raises(model.UserError, match="cache holds values that are not finite"):
        train.Cache("cache", with_teacher=True).load([0])


# ---------------------------------------------------------------------------- training and drawing
def test_a_run_leaves_log_samples_weights_and_a_film(trained):
    rows = read_log(trained)
    assert [row["step"] for row in rows] == ["10", "20", "30", "40", "48"]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert [row["held_out_loss"] != "nan" for row in rows] == [False, True, False, True, True]
    assert Image.open(trained / "learning.gif").n_frames == 3
    Path("plain").touch()
    modes = [path.stat().st_mode for path in (trained / "ema" / model.WEIGHTS, Path("plain"))]
    assert modes[0] == modes[1]  # readable for whom other files are


def test_a_run_goes_on_with_more_steps_but_not_on_other_data(trained, monsters):
    shutil.copytree(trained, "run")
    shutil.copytree(monsters, "moved")
    how = TINY | {"steps": 50, "repa": 1, "out": "run", "data": "moved/", "lr": 0.001}
    Path("run/log.csv").write_bytes(b"step;loss\r\n\0\0\0")  # what another program made of it
    assert call("train", *flags(how)) is None
    assert [row["step"] for row in read_log("run")] == ["10", "20", "30", "40", "48", "50"]
    assert Image.open("run/learning.gif").n_frames == 4
    meta = model.read_json("moved/meta.json")
    model.write_json("moved/meta.json", meta | {"mean": [0, 0, 0]})
    assert "other settings: mean was" in call("train", *flags(how))


def test_a_run_that_starts_anew_forgets_the_log_and_grids_of_one_that_died(monsters):
    write_files({"run/samples/step_000001.png": encode_picture(), "run/log.csv": "step\n10\n"})
    assert call("train", *flags(TINY | {"steps": 2, "out": "run", "data": monsters})) is None
    assert [row["step"] for row in read_log("run")] == ["2"]
    assert Image.open("run/learning.gif").n_frames == 1


def test_a_checkpoint_without_a_newer_setting_goes_on_and_one_of_another_program_does_not(monsters):
    old = {"seed": 0, "size": 32}
    prepare.refuse_differences("x", old, {"seed": 0, "size": 32, "new": 1})
    with pytest.raises(model.UserError, match="seed was 0 and is now 1"):
        prepare.refuse_differences("x", old, {"seed": 1})
    os.mkdir("run")
    torch.save({"model": {}}, "run/ckpt.pt")
    how = TINY | {"steps": 2, "out": "run", "data": monsters}
    assert "broken or of another program" in call("train", *flags(how))


def test_an_infinite_loss_ends_in_a_sentence_and_saves_nothing(monsters):
    how = TINY | {"data": monsters, "steps": 99, "lr": 2e9, "save_every": 1, "out": "run"}
    assert "the loss is infinite" in call("train", *flags(how))
    assert all(weight.isfinite().all() for weight in weights_of("run").values())


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interrupted_run_goes_on_to_the_bit(monsters, processes):
    settings = TINY | {"data": monsters, "steps": 60, "save_every": 7, "repa": 1}
    out, saved = Path("cut").resolve(), [0]
    for how in (signal.SIGTERM, signal.SIGKILL):
        started = time.time()
        cut = start("train.py", *flags(settings | {"out": out}), processes=processes)
        wait_for(out / "ckpt.pt", cut, newer_than=started)
        if how == signal.SIGKILL:
            kill_all(cut, out)
        else:
            cut.send_signal(how)
            assert "goes on" in cut.communicate(timeout=60)[0]
        saved.append(torch.load("cut/ckpt.pt", weights_only=True)["step"])
    assert saved == sorted({*saved, 60})[:3]
    for out in ("cut", "whole"):
        run("train.py", *flags(settings | {"out": out}), processes=processes)
    torch.testing.assert_close(weights_of("cut"), weights_of("whole"), rtol=0, atol=0)
    steps = [int(row["step"]) for row in read_log("cut")]
    assert steps == sorted({*steps})


def test_ctrl_c_while_a_finished_run_is_scored_ends_it():
    how = {"steps": 1, "width": 16, "depth": 2, "batch_size": 2, "bottleneck": 4}
    prepare.prepare(prepare.Settings(limit=64))
    process = start("train.py", *flags(how))
    wait_for(Path("out/monsters/learning.gif"), process)
    while process.poll() is None:  # again, as Python may lose one in a callback
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    assert "stopped; what was saved stays" in process.communicate()[0]


def test_processes_and_parts_of_a_batch_change_nothing(monsters):
    settings = TINY | {"data": monsters, "steps": 20, "dtype": "fp32", "repa": 1}
    call("train", *flags(settings | {"out": "one"}))
    call("train", *flags(settings | {"out": "parts", "micro_batch": 6}))
    run("train.py", *flags(settings | {"out": "two"}), processes=2)
    for column in ("loss", "repa_loss"):
        values = [[float(row[column]) for row in read_log(out)] for out in ("one", "two", "parts")]
        for others in values[1:]:
            np.testing.assert_allclose(values[0], others, rtol=1e-4)
    assert values[0][0] > 0


def test_a_second_stage_begins_with_the_first_and_later_does_not_need_it(trained, monsters):
    shutil.copytree(trained, "first")
    how = {"data": monsters, "init": "first", "lr": 1e-9, "muon_lr": 1e-9, "out": "second"}
    assert call("train", *flags(how | {"steps": 1})) is None
    torch.testing.assert_close(weights_of("second"), weights_of(trained))
    shutil.rmtree("first")
    assert call("train", *flags(how | {"steps": 2})) is None
    meta = model.read_json(monsters / "meta.json")
    settings = train.Settings(init=str(trained), data="x")
    with pytest.raises(model.UserError, match="takes --text words: prepare x so"):
        train.make_model(settings, meta | {"text": "t5"}, trained)


def test_a_picture_is_the_same_whatever_else_is_drawn_and_unknown_words_are_told(trained, capsys):
    how = flags({"run": trained, "steps": 3, "seed": 5})
    assert call("sample", "a red cat", "b", *how, "--n", 2, "--out", "many") is None
    assert "in no caption of the training: b, cat\n" in capsys.readouterr().out
    assert call("sample", "b", *how, "--seed", 7, "--out", "one/") is None
    assert call("sample", *how, "--out", "all.png") is None
    many, one = (np.asarray(Image.open(path)) / 1.0 for path in ("many/0002.png", "one/0000.png"))
    assert one.shape == (32, 32, 3)
    assert abs(many - one).max() <= 2
    assert one.std() > 1


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guidance_is_the_formula(scale):
    def network(x, t, text, mask):
        return text.mean((1, 2))[:, None, None, None].expand_as(x)

    noise, empty, text = torch.randn(3, 1, 2, 2), torch.ones(1, 1, 1), torch.full((3, 1, 1), 2.0)
    info = {"shift": 1.0, "predict": "v", "mask": False, "steps": 5, "guidance": scale}
    latents = sample.generate(network, empty, text, noise, info)
    torch.testing.assert_close(latents, noise - (1 + scale * (2 - 1)))


def test_score_reports_every_kind_and_attribute(trained):
    network = model.PRX.from_pretrained(trained / "ema")
    info = model.read_json(trained / "ema/nanoprx.json") | {"steps": 1}
    kinds = ["told", "few", "new", "uneven", "by chance"]
    assert sample.score(network, info, CPU, 8).keys() == {*kinds, *prepare.PARTS}


def test_held_out_pictures_are_chosen_by_content_and_never_trained_on(monsters):
    cache = train.Cache(monsters)
    cache.digests = digests = np.arange(600, dtype=np.uint32) % 300 * 14_316_557  # evenly
    trained, held_out = cache.split(0.02)
    assert len(held_out) == 14  # seven digests of 300, each twice
    assert not set(digests[trained]) & set(digests[held_out])
    settings = train.Settings(batch_size=100, steps=30)
    seen = {number for batch in train.index_batches(trained, settings, 0, 0, 1) for number in batch}
    assert seen == set(trained)
    assert [len(cache.split(share)[1]) for share in (0, 0.001)] == [0, 0]  # the latter is too few


def test_validation_is_only_of_the_weights(monsters):
    settings = train.Settings(**TINY, data=str(monsters), predict="v", held_out=0.2)
    started = train.Run(settings, CPU)
    assert abs(train.validate(started) - 2) < 0.2  # the first output is 0: mean of (noise - x)^2
    assert train.validate(started) == train.validate(started)


def test_each_seed_and_step_draws_noise_of_its_own(monsters):
    started, values = train.Run(train.Settings(**TINY, data=str(monsters)), CPU), set()
    for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        started.settings.seed, started.step = seed, step
        batch = train.make_batch(started.cache.load(range(16)), started)
        values |= {batch["noise"][0, 0, 0, 0].item(), batch["t"][0].item()}
    assert len(values) == 8
