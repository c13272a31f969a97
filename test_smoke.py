"""Every promise of README.md, tried: against diffusers, on small files, by running the scripts."""
import contextlib, csv, io, json, os, random, re, resource, shutil, signal, struct, subprocess, sys
import tarfile, time, zlib
from pathlib import Path

import numpy as np
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model as M, prepare as P, sample as S, train as T

HERE = Path(__file__).parent
TINY = "--width 32 --depth 3 --batch-size 16 --bottleneck 16 --route 0.5".split()
random.seed(0)
torch.manual_seed(0)

def start(script, *args, cwd, processes=0, room=None, until=None):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *launcher[:4 * bool(processes)], HERE / script]
    limit = room and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    process = subprocess.Popen([*map(str, command), *map(str, args)], cwd=cwd, text=True, stdout=-1,
                               stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit)
    while until and not until.exists() and process.poll() is None:
        time.sleep(0.01)
    return process

def run(script, *args, cwd, code=0, processes=0, room=None):
    process = start(script, *args, cwd=cwd, processes=processes, room=room)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code, output
    assert code == 0 or "Traceback" not in output or processes, output
    return output

@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    assert "600 pictures" in run("prepare.py", "--limit", 600, cwd=folder)
    output = run("train.py", *TINY, "--steps", 48, "--sample-every", 20, cwd=folder, processes=1)
    assert "prompt accuracy" in output and "python sample.py" in output
    return folder

def random_model(**sizes):
    network = M.PRX(M.PRXConfig(context_in_dim=24, hidden_size=48, depth=3, mlp_ratio=3.5, **sizes))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network

@pytest.mark.parametrize("sizes, shape, length", [
    ({"in_channels": 3, "patch_size": 8, "num_heads": 2, "axes_dim": (12, 12),
      "bottleneck_size": 16}, (32, 32), 5),
    ({"in_channels": 4, "patch_size": 1, "num_heads": 3, "axes_dim": (8, 8)}, (5, 9), 1),
    ({"in_channels": 16, "patch_size": 2, "num_heads": 4, "axes_dim": (4, 8)}, (8, 12), 17)])
def test_agrees_with_diffusers_and_swaps_weights(sizes, shape, length, tmp_path):
    from diffusers import PRXTransformer2DModel
    ours = random_model(**sizes)
    ours.save_pretrained(tmp_path / "ours")
    theirs = PRXTransformer2DModel.from_pretrained(tmp_path / "ours", low_cpu_mem_usage=False)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer")
    back = M.PRX.from_pretrained(tmp_path / "pipeline")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters()))
    x, t = torch.randn(2, sizes["in_channels"], *shape), torch.tensor([0.03, 0.9])
    text = torch.randn(2, length, 24)
    for mask in None, torch.arange(length) < torch.tensor([[1], [length]]):
        expected = theirs(x, t, text, attention_mask=mask).sample
        torch.testing.assert_close(back(x, t, text, mask), expected, rtol=1e-5, atol=1e-5)

def test_training_step_takes_the_flash_kernel_and_one_rope_table_and_routes_tokens():
    network, seen = random_model(in_channels=3, patch_size=4, num_heads=2, axes_dim=(12, 12)), []
    for block in network.blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 4, 24)
    M.rope_table.cache_clear()
    for stay in None, torch.rand(2, 16).argsort(1)[:, :6]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            network(*inputs, stay=stay).sum().backward()
    assert M.rope_table.cache_info().misses == 1
    (*_, ropes, _, first), (routed, _, _, rope, _, middle), (last, *_) = seen[3:]
    rows = torch.arange(2)[:, None]
    assert torch.equal(routed, first[rows, stay]) and torch.equal(rope[0], ropes[0][stay])
    assert torch.equal(last, first.index_put((rows, stay), middle))

def test_flow():
    x, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.06, 0.5, 1.0])
    torch.testing.assert_close(M.velocity(x, M.add_noise(x, noise, t), t, "x"), noise - x)
    draws = M.sample_timesteps(200_000, 1.0, torch.Generator().manual_seed(0))
    expected = 0.9 * 0.0140 + 0.1 * 0.1          # below 0.1, of the logit-normal and of the uniform
    assert abs((draws < 0.1).float().mean() - expected) < 0.002
    assert draws.min() >= 1e-3 and abs(draws.mean() - 0.5) < 0.005 and M.velocity(x, 0, 0, "v") is x
    shifted = M.sample_timesteps(200_000, 3.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shifted, (3 * draws / (1 + 2 * draws)).where(draws > 1e-3, shifted))

def test_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7),
               "d": torch.zeros(0, 2), "e": torch.tensor([True, False, True])}
    M.write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for read in load_file(tmp_path / "ours"), M.read_safetensors(tmp_path / "theirs"):
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    whole = (tmp_path / "ours").read_bytes()
    header = json.loads(whole[8:8 + struct.unpack("<Q", whole[:8])[0]])
    bad = [whole[:end] for end in (0, 5, 40, len(whole) - 1)] + [whole + b"x"]
    for change in {"dtype": "F4"}, {"shape": [-3, -5]}, {"data_offsets": [0, 2 ** 40]}:
        text = json.dumps({**header, "a": {**header["a"], **change}}).encode()
        bad.append(struct.pack("<Q", len(text)) + text + whole[-95:])
    for number in range(2000):           # whatever the bytes, a sentence or tensors, never a crash
        data = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        (tmp_path / "bad").write_bytes(bad[number] if number < len(bad) else data)
        with pytest.raises(M.Refused, match="bad is not a whole safetensors file") \
                if number < len(bad) else contextlib.suppress(M.Refused):
            M.read_safetensors(tmp_path / "bad")

def test_check_is_strict_and_right():
    what = lambda scene: (scene.ground, {thing[:3] for thing in scene.things})
    rng, renders, changed = np.random.default_rng(5), [], []
    for _ in range(300):
        scene = P.random_scene(rng)
        assert not {thing[:2] for thing in scene.things} & P.NEVER_TRAINED
        renders += [P.check(P.render(scene, size), scene) for size in (32, 64)]
        thing, *rest = random.sample(scene.things, len(scene.things))
        others = [scene._replace(ground=ground) for ground in P.COLOURS]
        others += [scene._replace(things=things) for things in (rest, *([each, *rest] for each in (
            *(thing._replace(colour=colour) for colour in P.COLOURS),
            *(thing._replace(shape=shape) for shape in P.SHAPES),
            *(thing._replace(place=place, x=0.5 + P.STEP * x, y=0.5 + P.STEP * y)
              for place, (x, y) in P.PLACES.items() if place not in [r.place for r in rest]))))]
        others = [other for other in others if what(other) != what(scene)]
        changed += [P.check(P.render(other, 32), scene) for other in random.sample(others, 10)]
        assert not P.check(np.full((32, 32, 3), P.COLOURS[scene.ground], np.uint8), scene)
        assert not P.check(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), scene)
    assert np.mean(renders) >= 0.995 and np.mean(changed) <= 0.01

def test_scenes_splits_and_captions():
    rng = np.random.default_rng(0)
    train = {P.caption(P.random_scene(rng)) for _ in range(500)}
    assert not train & {P.caption(P.random_scene(rng, "held-out")) for _ in range(500)}
    things = P.Thing("red", "circle", "left", 0, 0, 0), P.Thing("blue", "ring", "right", 0, 0, 0)
    assert P.caption(P.Scene("white", things)).endswith("left of a blue ring on a white ground")
    assert P.caption(P.Scene("white", things), short=True) == "a red circle and a blue ring"
    a, b, none = P.Words()(["Red circle!", "circle red", ""])
    assert a.shape == b.shape == (2, P.Words.dim) and none.shape == (0, P.Words.dim)
    assert torch.equal(a[0, :32], b[1, :32]) and not torch.equal(a[0], b[1])

@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_autoencoders_agree_with_diffusers(channels, tmp_path):
    from diffusers import AutoencoderTiny
    theirs, images = AutoencoderTiny(latent_channels=channels), torch.rand(2, 3, 48, 64) * 2 - 1
    theirs.save_pretrained(tmp_path)
    ours, latents = P.load_codec(str(tmp_path)), theirs.encode(images).latents
    torch.testing.assert_close(ours.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(99 * latents), theirs.decode(99 * latents).sample)

@pytest.mark.skipif("HF_HOME" not in os.environ, reason="needs the files of a Hub cache")
def test_training_on_latents_of_a_codec_from_the_hub(tmp_path):
    run("prepare.py", "--size", 128, "--codec", "taef2", "--limit", 16, "--out", "x", cwd=tmp_path)
    originals = [P.render(P.random_scene(np.random.default_rng(n)), 128) for n in range(16)]
    latents = torch.tensor(np.load(tmp_path / "x/shard-00000/latents.npy")).float()
    decoded = P.load_codec("taef2").decode(latents).clamp(-1, 1) / 2 + 0.5
    error = decoded - torch.tensor(np.stack(originals)).permute(0, 3, 1, 2) / 255
    assert -10 * error.square().mean((1, 2, 3)).log10().mean() > 27                           # dB
    run("train.py", "--data", "x", "--steps", 2, "--batch-size", 4, cwd=tmp_path)
    run("sample.py", "a", "--run", "out/x", "--steps", 2, "--out", "one/", cwd=tmp_path)
    assert Image.open(tmp_path / "one/0000.png").size == (128, 128)
    how = "a --run out/x --guidance-mode self".split()
    assert "trained with --route" in run("sample.py", *how, cwd=tmp_path, code=2)

def make(mode="RGB", size=(40, 30), kind="PNG", colour=None, **save):
    data = io.BytesIO()
    Image.new(mode, size, colour or 0).save(data, kind, **save)
    return data.getvalue()

def test_any_picture_from_a_folder(tmp_path):
    source = tmp_path / "photos"
    (source / "deeper").mkdir(parents=True)
    rotated, exif = Image.new("RGB", (60, 40), "red"), Image.Exif()
    rotated.paste("blue", (0, 0, 30, 40))
    exif[0x0112] = 6                                           # the left side is the top
    huge = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    files = {"clear.png": make("RGBA", colour=(0, 0, 0, 0)), "deep.png": make("I;16", colour=65535),
        "grey.png": make("L"), "cmyk.jpg": make("CMYK", kind="JPEG"), "bare.png": make(),
        "palette.png": make("P", transparency=0), "two.dots.webp": make(kind="WEBP"),
        "moving.gif": make("P", kind="GIF"), "deeper/naïve name.bmp": make(kind="BMP"),
        "broken.jpg": make(size=(400, 300), kind="JPEG", colour="red")[:900], "empty.png": b"",
        "text.png": b"not a picture", "small.png": make(size=(1, 1)), "deeper/listed.png": make(),
        "huge.png": make()[:12] + huge + struct.pack(">I", zlib.crc32(huge)) + make()[33:]}
    for name, data in files.items():
        (source / name).write_bytes(data)
        if name != "bare.png":
            (source / name).with_suffix(".txt").write_text(f"{name}\0 in\nwords", "utf-8")
    rotated.save(source / "rotated.jpg", exif=exif, quality=95)
    (source / "metadata.jsonl").write_text('{"file_name": "rotated.jpg", "text": "a\u2028turn"}\n')
    (source / "deeper" / "metadata.csv").write_text('file_name,text\nlisted.png,"listed, here"\n')
    output = run("prepare.py", source, "--size", 16, cwd=tmp_path)
    for line in ("4 x broken picture, or of more than 100,000,000 pixels", "1 x no caption",
                 "1 x shorter side below 8", "left out bare.png: no caption"):
        assert line in output, output
    shard = tmp_path / "data/photos/shard-00000"
    captions = (shard / "captions.txt").read_text("utf-8").splitlines()
    latents = dict(zip(captions, np.load(shard / "latents.npy", mmap_mode="r")))
    assert len(latents) == 10 and {"listed, here", "deeper/naïve name.bmp in words"} <= {*latents}
    assert latents["clear.png in words"].min() == latents["deep.png in words"].min() == 255
    top, bottom = latents["a turn"][:, 2].mean(1), latents["a turn"][:, -3].mean(1)
    assert top[2] > 200 > 50 > top[0] and bottom[0] > 200 > 50 > bottom[2]
    output = run("prepare.py", source, "--min-size", 99, "--out", source, cwd=tmp_path, code=2)
    assert "no picture in" in output and all((source / name).exists() for name in files)

def test_tar_shards(tmp_path):
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / f"shards/{number}.tar", "w") as tar:
            for name, data in (("a/x.jpg", make(kind="JPEG")), ("a/x.json", b'{"prompt": "an x"}'),
                    ("../y.0.png", make(size=(50, 50))), ("../y.txt", b"a y"),
                    ("/z.png", make()), ("/z.txt", b"\xff\xfe\xff"), ("k.txt", b"alone"),
                    ("\udcff.png", make()), ("\udcff.json", b'{"text": "an \\ud800"}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "shards/2.tar").write_bytes((tmp_path / "shards/1.tar").read_bytes()[:2100])
    before = set(tmp_path.parent.rglob("*"))
    output = run("prepare.py", "shards", "--size", 16, cwd=tmp_path, processes=2)
    meta = json.loads((tmp_path / "data/shards/meta.json").read_text())
    assert meta["shards"]["shard-00000"] == meta["shards"]["shard-00001"] == 3, output
    assert (tmp_path / "data/shards/shard-00001/captions.txt").read_text() == "an x\na y\nan ?\n"
    assert all("data" in path.parts for path in set(tmp_path.parent.rglob("*")) - before)
    pictures = list(P.read_source(str(tmp_path / "shards/0.tar")))[:2]
    assert [(each.mode, text) for each, text in pictures] == [("RGB", "an x"), ("RGB", "a y")]

def test_cache_format_and_going_on_after_a_kill(trained, tmp_path):
    meta = json.loads((trained / "data/scenes/meta.json").read_text())
    shard = trained / "data/scenes/shard-00000"
    latents, text, offsets = (np.load(shard / f"{name}.npy", mmap_mode="r")
                              for name in ("latents", "text", "offsets"))
    assert meta["latent_shape"] == [3, 32, 32] and latents.shape == (600, 3, 32, 32)
    assert latents.dtype == np.uint8 and text.shape == (offsets[-1], 96) and len(offsets) == 601
    for key, measured in ("mean", latents.mean((0, 2, 3)) - 127.5), ("std", latents.std((0, 2, 3))):
        np.testing.assert_allclose(meta[key], measured / 127.5, atol=1e-4)
    caption = (shard / "captions.txt").read_text().splitlines()[7]
    np.testing.assert_allclose(text[offsets[7]:offsets[8]], P.Words()([caption])[0], atol=1e-3)
    shard = tmp_path / "data/scenes/shard-00000"
    start("prepare.py", "--limit", 9000, cwd=tmp_path, until=shard).kill()
    first = (shard / "latents.npy").stat()
    assert "9,000 pictures" in run("prepare.py", "--limit", 9000, cwd=tmp_path, processes=2)
    assert (shard / "latents.npy").stat() == first

def test_a_run_and_its_folder(trained):
    out = trained / "out/scenes"
    rows = list(csv.DictReader(open(out / "log.csv")))
    assert [row["step"] for row in rows] == "10 20 30 40 48".split()
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert len(list((out / "samples").iterdir())) == Image.open(out / "learning.gif").n_frames == 3
    assert "is finished" in run("train.py", *TINY, "--steps", 48, "--sample-every", 20, cwd=trained)
    output = run("train.py", *TINY, "--steps", 30, "--lr", 0.01, cwd=trained, code=2)
    assert "lr was 0.003 and is now 0.01" in output and "steps was 48 and is now 30" in output

def test_sampling(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue ring\n")
    how = ("--run", trained / "out/scenes", "--steps", 3, "--seed", 5)
    run("sample.py", "a", *how, "--file", "prompts.txt", "--n", 2, "--out", "many", cwd=tmp_path)
    run("sample.py", *how, "a blue ring", "--out", "one/", cwd=tmp_path)
    many, one = (np.asarray(Image.open(tmp_path / name)).astype(int)
                 for name in ("many/0004.png", "one/0000.png"))
    assert one.shape == (32, 32, 3) and abs(many - one).max() <= 2 and one.std() > 1
    assert "2 pictures" in run("sample.py", *how, "a", "b", "--guidance-mode", "self", cwd=tmp_path)
    assert "composition" in run("sample.py", *how, "--score", cwd=tmp_path)

def test_guidance_and_euler():
    def constant(x, t, text, mask=None, stay=None):              # 1 for null or with 2 of 4 tokens
        kept = 1 if stay is None else stay.shape[1]
        return (text.mean((1, 2)) / kept)[:, None, None, None].expand_as(x)
    text, noise = torch.full((2, 3, 4), 2.0), torch.randn(2, 1, 4, 4)
    constant.config = M.PRXConfig(patch_size=2)
    for route in 0.0, 0.5:
        latents = S.generate(constant, text, torch.ones(3, 4), noise, 5, 3.0, "v", 2.0, route)
        torch.testing.assert_close(latents, noise - (1 + 3.0 * (2 - 1)))

@pytest.mark.parametrize("how, processes", [
    (signal.SIGKILL, 0), (signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 2)])
def test_an_interrupted_run_goes_on_exactly(trained, how, processes, tmp_path):
    flags = (*TINY, "--steps", 60, "--save-every", 7, "--data", trained / "data/scenes", "--out")
    process = start("train.py", *flags, tmp_path / "cut", cwd=tmp_path, processes=processes,
                    until=tmp_path / "cut/ckpt.pt")
    os.killpg(process.pid, how)
    output = process.communicate(timeout=60)[0]
    assert how == signal.SIGKILL or not process.returncode and "goes on" in output, output
    assert 0 < torch.load(tmp_path / "cut/ckpt.pt", weights_only=True)["step"] < 60
    if how == signal.SIGTERM:                              # as if the disk were full of all else
        output = run("train.py", *flags, tmp_path / "cut", cwd=tmp_path, code=1, room=99_999)
        assert "File too large" in output and not list((tmp_path / "cut").rglob("*.partial"))
    run("train.py", *flags, tmp_path / "cut", cwd=tmp_path, processes=processes)
    run("train.py", *flags, tmp_path / "whole", cwd=tmp_path, processes=processes)
    cut, whole = (M.PRX.from_pretrained(tmp_path / name / "ema") for name in ("cut", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(cut.parameters(), whole.parameters()))
    steps = [int(row["step"]) for row in csv.DictReader(open(tmp_path / "cut/log.csv"))]
    assert steps == sorted(set(steps)) and {10, 60} <= set(steps)

def test_a_second_stage_begins_with_the_weights_of_the_first(trained, tmp_path):
    run("prepare.py", "--size", 64, "--limit", 64, "--out", "large", cwd=tmp_path)
    flags = "--data", "large", "--init", trained / "out/scenes", "--lr", 1e-12, "--muon-lr", 1e-12
    run("train.py", *TINY, *flags, "--steps", 1, cwd=tmp_path)
    weights = lambda out: M.PRX.from_pretrained(out).state_dict()
    torch.testing.assert_close(weights(tmp_path / "out/large"), weights(trained / "out/scenes"))

def test_processes_and_parts_of_a_batch_change_nothing(trained, tmp_path):
    flags = (*TINY, "--steps", 20, "--dtype", "fp32", "--data", trained / "data/scenes", "--out")
    for out, how, processes in ("one", (), 0), ("two", (), 2), ("parts", ("--micro-batch", 6), 0):
        run("train.py", *flags, out, *how, cwd=tmp_path, processes=processes)
    one, *others = ([float(row["loss"]) for row in csv.DictReader(open(log))]
                    for log in (tmp_path / out / "log.csv" for out in ("one", "two", "parts")))
    np.testing.assert_allclose(others, [one, one], rtol=1e-4)

@pytest.mark.parametrize("name, damage", [
    ("meta.json", lambda d: d.replace(b'"tokens"', b'"t"')), ("meta.json", lambda d: b"{"),
    ("latents.npy", lambda d: d[:-9]), ("null.npy", lambda d: b""), ("offsets.npy", None),
    ("text.npy", lambda d: d[:-1] + b"\x7f"), ("offsets.npy", lambda d: d[:136] + d[:8] + d[144:])])
def test_a_broken_cache_is_refused(trained, name, damage, tmp_path):
    path = next(shutil.copytree(trained / "data/scenes", tmp_path / "cache").rglob(name))
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(M.Refused, match=name):
        T.Cache(tmp_path / "cache", "cpu")

def test_a_loss_that_is_not_finite_is_not_saved(trained, tmp_path):
    output = run("train.py", *TINY, "--steps", 40, "--lr", 1e12, "--save-every", 1, "--data",
                 trained / "data/scenes", "--out", "out", cwd=tmp_path, code=2)
    assert "loss is not finite at step" in output
    for path in (tmp_path / "out/ema").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in M.read_safetensors(path).values())

@pytest.mark.parametrize("code, command, sentence", [
    (2, "train.py --stepz 3", "arguments: --stepz"), (2, "train.py --steps x", "invalid int value"),
    (2, "train.py --ema 1.5", "argument --ema: 1.5 is not from 0 to 1"),
    (2, "train.py --width 100 --heads 3", "the width 100 is not a multiple of 4 x 3 heads"),
    (2, "train.py --patch-size 5", "--patch-size 5 does not divide latents of [32, 32]"),
    (2, "train.py --data data/x", "no cache in data/x"), (2, "sample.py", "give a prompt, --file"),
    (2, "prepare.py photos --captions short", "--captions short is for scenes"),
    (2, "prepare.py photos", "neither a tar file nor"), (1, "sample.py --file x", "No such file"),
    (2, "sample.py a --run x/y", "no folder here"), (2, "prepare.py --codec .", "not hold a tiny")])
def test_wrong_flags_and_missing_things(code, command, sentence, tmp_path):
    assert sentence in run(*command.split(), cwd=tmp_path, code=code)
    assert not list(tmp_path.iterdir())

def test_help_tells_every_flag_and_the_readme_links_to_the_right_lines():
    output, names = run("train.py", "--help", cwd=HERE).split(), T.Config.__dataclass_fields__
    assert {f"--{name.replace('_', '-')}" for name in names} <= {*output}
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text("utf-8"))
    for name, file, number in links:
        line = (HERE / file).read_text("utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), (name, line)
    assert len(links) > 10
