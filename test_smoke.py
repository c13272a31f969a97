"""Every promise of README.md, tried: against diffusers, on small files, by running the scripts."""
import contextlib, csv, io, json, os, random, re, resource, shutil, signal, struct, subprocess, sys
import tarfile, time, zlib
from pathlib import Path

import numpy as np
import diffusers, pytest, torch, transformers
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
        torch.nn.init.normal_(parameter, std=0.05)
    return network

@pytest.mark.parametrize("sizes, shape, length", [
    ({"in_channels": 3, "patch_size": 8, "num_heads": 2, "axes_dim": (12, 12),
      "bottleneck_size": 16}, (32, 32), 5),
    ({"in_channels": 4, "patch_size": 1, "num_heads": 3, "axes_dim": (8, 8)}, (5, 9), 1),
    ({"in_channels": 16, "patch_size": 2, "num_heads": 4, "axes_dim": (4, 8)}, (8, 12), 17)])
def test_agrees_with_diffusers_and_swaps_weights(sizes, shape, length, tmp_path):
    ours = random_model(**sizes)
    ours.save_pretrained(tmp_path / "ours")
    theirs = diffusers.PRXTransformer2DModel.from_pretrained(
        tmp_path / "ours", low_cpu_mem_usage=False)
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

def test_flow_and_guidance():
    x, noise, t = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([0.06, 0.5, 1.0])
    x_t = torch.lerp(x, noise, t[:, None, None, None])
    torch.testing.assert_close(M.velocity(x, x_t, t, "x"), noise - x)
    draws, shifted = (M.sample_timesteps(200_000, shift, torch.Generator().manual_seed(0))
                      for shift in (1.0, 3.0))
    assert abs((draws < 0.1).float().mean() - 0.7 * 0.0140 - 0.3 * 0.1) < 0.002      # its two parts
    assert draws.min() >= 1e-3 and abs(draws.mean() - 0.5) < 0.005 and M.velocity(x, 0, 0, "v") is x
    torch.testing.assert_close(shifted, (3 * draws / (1 + 2 * draws)).where(draws > 1e-3, shifted))
    constant = lambda x, t, text: text.mean((1, 2))[:, None, None, None].expand_as(x)
    how = {"predict": "v", "shift": 2.0}
    latents = S.generate(constant, torch.full((3, 1, 1), 2.), torch.ones(1, 1), x, how, 5, 3.0)
    torch.testing.assert_close(latents, x - (1 + 3.0 * (2 - 1)))

def test_safetensors(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7),
               "d": torch.zeros(0, 2), "e": torch.tensor([True, False, True])}
    M.write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for read in load_file(tmp_path / "ours"), M.read_safetensors(tmp_path / "theirs"):
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    whole = (tmp_path / "ours").read_bytes()
    for number in range(2000):           # whatever the bytes, a sentence or tensors, never a crash
        data = bytearray(whole)
        data[random.randrange(len(data))], data[random.randrange(len(data))] = random.randbytes(2)
        (tmp_path / "bad").write_bytes(data)
        with contextlib.suppress(M.Refused):
            M.read_safetensors(tmp_path / "bad")
    for bad in (b"", whole[:40], whole[:-1], whole + b"x", whole.replace(b'"F32"', b'"F4"  '),
                whole.replace(b"[3, 5]", b"[9, 9]"), whole.replace(b"[0, 60]", b"[0, 99]")):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(M.Refused, match="bad is not a whole safetensors file"):
            M.read_safetensors(tmp_path / "bad")

def test_check_is_strict_and_scenes_are_told():
    what = lambda scene: (scene.ground, {thing[:3] for thing in scene.things})
    rng, renders, changed = np.random.default_rng(5), [], []
    for _ in range(300):
        scene = P.random_scene(rng)
        assert not {thing[:2] for thing in scene.things} & P.NEVER_TRAINED
        renders += [P.check(P.render(scene, size), scene) for size in (32, 64)]
        thing, *rest = random.sample(scene.things, len(scene.things))
        others = [thing._replace(colour=colour) for colour in P.COLOURS]
        others += [thing._replace(shape=shape) for shape in P.SHAPES]
        others += [thing._replace(place=place, x=0.5 + P.STEP * x, y=0.5 + P.STEP * y)
                   for place, (x, y) in P.PLACES.items() if place not in [r.place for r in rest]]
        others = [scene._replace(things=things) for things in (rest, *([o, *rest] for o in others))]
        others += [scene._replace(ground=ground) for ground in P.COLOURS]
        others = [other for other in others if what(other) != what(scene)]
        changed += [P.check(P.render(other, 32), scene) for other in random.sample(others, 10)]
        assert not P.check(np.full((32, 32, 3), P.COLOURS[scene.ground], np.uint8), scene)
        assert not P.check(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), scene)
    assert np.mean(renders) >= 0.995 and np.mean(changed) <= 0.01
    train = {P.caption(P.random_scene(rng)) for _ in range(500)}
    assert not train & {P.caption(P.random_scene(rng, "held-out")) for _ in range(500)}
    things = P.Thing("red", "circle", "left", 0, 0, 0), P.Thing("blue", "ring", "right", 0, 0, 0)
    assert P.caption(P.Scene("white", things), short=True) == "a red circle and a blue ring"
    a, b, none = P.Words()(["Red circle!", "circle red", ""])
    assert torch.equal(a[0, :32], b[1, :32]) and not torch.equal(a[0], b[1]) and len(none) == 0

@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_autoencoders_agree_with_diffusers(channels, tmp_path):
    theirs, images = diffusers.AutoencoderTiny(latent_channels=channels), torch.randn(2, 3, 48, 64)
    theirs.save_pretrained(tmp_path)
    ours, latents = P.load_codec(str(tmp_path)), theirs.encode(images).latents
    torch.testing.assert_close(ours.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(99 * latents), theirs.decode(99 * latents).sample)

@pytest.mark.skipif("HF_HOME" not in os.environ, reason="needs the files of a Hub cache")
def test_t5_and_two_stages_on_latents_of_a_codec_from_the_hub(tmp_path):
    files, t5 = M.fetch("google/flan-t5-base", "*.json"), tmp_path / "t5"
    theirs = transformers.T5EncoderModel(transformers.T5Config.from_pretrained(
        files, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=3)).eval()
    theirs.save_pretrained(t5)
    shutil.copy(files / "tokenizer.json", t5)
    real, ours = transformers.AutoTokenizer.from_pretrained(t5), P.load_text_encoder(t5, "cpu", 256)
    texts = ["", "a" * 10_000, " \t\n\u3000 12,345.678 9½ Ａ ﬁne～① e\u0301 x\0\1y a\u200bb\u00a0c",
             "👩\u200d👩\u200d👧 family 👍🏽 flag: 🇩🇪 \u2028 \ufeff"]
    pieces = sorted(piece for piece in real.get_vocab() if piece[0] != "<")
    texts += ["".join(random.choices(pieces, k=40)).replace("▁", " ") for _ in range(2000)]
    for first in (0x20, 0xc0, 0x391, 0x410, 0x5d0, 0x620, 0x904, 0x3041, 0x4e00, 0xac00, 0x1f300):
        letters = [*map(chr, range(first, first + 90)), *" 7e,"]           # Latin to Korean, emoji
        texts += ["".join(random.choices(letters, k=60)) for _ in range(99)]
    assert [ours.tokenize(text) for text in texts] == real(texts).input_ids
    captions = [" ".join(random.choices(["a red", "fox on", "sand"], k=k)) for k in (0, 1, 9, 250)]
    for batch in captions, *([each] for each in captions):
        inputs = real(batch, return_tensors="pt", padding=True, truncation=True, max_length=256)
        with torch.no_grad():
            expected = theirs(**inputs).last_hidden_state[inputs.attention_mask.bool()]
        torch.testing.assert_close(torch.cat(ours(batch)), expected, rtol=1e-4, atol=1e-4)
    assert len(ours(captions)[3]) == 256 and ours.cut == 3                   # of the longest
    flags = "--size", 128, "--codec", "taef2", "--text", t5, "--max-tokens", 12, "--limit", 16
    assert "x caption cut" in run("prepare.py", *flags, "--out", "x", cwd=tmp_path)
    M.write_json(tmp_path / "x/meta.json", {**M.read_json(tmp_path / "x/meta.json"), "source": "x"})
    originals = [P.render(P.random_scene(np.random.default_rng(n)), 128) for n in range(16)]
    latents = torch.tensor(np.load(tmp_path / "x/shard-00000/latents.npy")).float()
    decoded = P.load_codec("taef2").decode(latents).clamp(-1, 1) / 2 + 0.5
    error = decoded - torch.tensor(np.stack(originals)).permute(0, 3, 1, 2) / 255
    assert -10 * error.square().mean((1, 2, 3)).log10().mean() > 27                           # dB
    run("train.py", "--data", "x", "--steps", 2, "--batch-size", 4, cwd=tmp_path)
    again = "--data x --init out/x --out next --steps 1 --lr 1e-12 --muon-lr 1e-12 --batch-size 4"
    run("train.py", *again.split(), cwd=tmp_path)
    before, after = (M.PRX.from_pretrained(tmp_path / name) for name in ("out/x", "next"))
    torch.testing.assert_close(after.state_dict(), before.state_dict())
    assert "multiple" in run("prepare.py", "--codec", "taef2", "--size", 44, cwd=tmp_path, code=2)
    run("sample.py", "a", "--run", "next", "--steps", 2, "--out", "one/", cwd=tmp_path)
    assert "not trained on" in run("sample.py", "--score", "--run", "next", cwd=tmp_path, code=2)

def make(mode="RGB", size=(40, 30), kind="PNG", colour=None, shades=iter(range(9, 256, 5)), **save):
    data = io.BytesIO()
    Image.new(mode, size, next(shades) if colour is None else colour).save(data, kind, **save)
    return data.getvalue()

def test_any_picture_from_a_folder(tmp_path):
    source = tmp_path / "photos"
    (source / "deeper").mkdir(parents=True)
    rotated, exif = Image.new("RGB", (60, 40), "red"), Image.Exif()
    rotated.paste("blue", (0, 0, 30, 40))
    exif[0x0112] = 6                                           # the left side is the top
    huge = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    files = {"clear.png": make("RGBA", colour=(0, 0, 0, 51)), "deep.png": make("I;16", colour=9999),
        "grey.png": make("L", colour=7), "cmyk.jpg": make("CMYK", kind="JPEG"), "bare.png": make(),
        "long.png": make(size=(90, 9)), "same.png": make("L", (99, 99), colour=7), "text.png": b"x",
        "palette.png": make("P", colour=0, transparency=0), "two.dots.webp": make(kind="WEBP"),
        "moving.gif": make("P", kind="GIF"), "deeper/naïve name.bmp": make(kind="BMP"),
        "broken.jpg": make("L", (400, 300), "JPEG")[:900], "0.png": b"", "s.png": make("L", (1, 1)),
        "huge.png": make()[:12] + huge + struct.pack(">I", zlib.crc32(huge)) + make()[33:]}
    for name, data in files.items():
        (source / name).write_bytes(data)
        if name != "bare.png":
            (source / name).with_suffix(".txt").write_text(f"{name}\0 in\nwords", "utf-8")
    rotated.save(source / "rotated.jpg", exif=exif, quality=95)
    (source / "rotated.json").write_text('{"prompt": "a\u2028turn"}')
    output = run("prepare.py", source, "--size", 16, "--min-words", 2, cwd=tmp_path)
    for line in ("4 x broken or gig", "1 x shorter side below 8", "1 x no", "left out bare.png: no",
                 "1 x longer side above 4", "1 x exact duplicate", "9 pictures, 52.9% of"):
        assert line in output, output
    shard = tmp_path / "data/photos/shard-00000"
    captions = (shard / "captions.txt").read_text("utf-8").splitlines()
    latents = dict(zip(captions, np.load(shard / "latents.npy", mmap_mode="r")))
    assert len(latents) == 9 and "deeper/naïve name.bmp in words" in latents
    assert latents["clear.png in words"].min() == 204 and latents["deep.png in words"].min() == 38
    top, bottom = latents["a turn"][:, 2].mean(1), latents["a turn"][:, -3].mean(1)
    assert top[2] > 200 > 50 > top[0] and bottom[0] > 200 > 50 > bottom[2]
    output = run("prepare.py", source, "--min-size", 999, "--out", source, cwd=tmp_path, code=2)
    assert "nothing usable" in output and all((source / name).exists() for name in files)

def test_tar_shards_here_and_on_the_hub(tmp_path, monkeypatch):
    (shards := tmp_path / "shards").mkdir()
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
    monkeypatch.setattr(P, "ask_hub", lambda function, repository, *files, **how:
                        f"{shards}/{files[0]}" if files else ["x.txt", "0.tar"])
    for source in f"{shards}/0.tar", "user/name", "user/name:*.tar":
        pictures = list(P.read_source(source))[:2]
        assert [(each.mode, text) for each, text in pictures] == [("RGB", "an x"), ("RGB", "a y")]

def test_cache_format_and_going_on_after_a_kill(trained, tmp_path):
    meta = json.loads((trained / "data/scenes/meta.json").read_text())
    shard = trained / "data/scenes/shard-00000"
    latents, text, offsets = (np.load(shard / f"{k}.npy") for k in "latents text offsets".split())
    assert meta["latent_shape"] == [3, 32, 32] and latents.shape == (600, 3, 32, 32)
    assert latents.dtype == np.uint8 and text.shape == (offsets[-1], 96) and len(offsets) == 601
    measured = latents.mean((0, 2, 3)) / 127.5 - 1, latents.std((0, 2, 3)) / 127.5
    np.testing.assert_allclose((meta["mean"], meta["std"]), measured, atol=1e-4)
    tokens = P.Words()((shard / "captions.txt").read_text().splitlines())[7]
    np.testing.assert_allclose(text[offsets[7]:offsets[8]], tokens, atol=1e-3)
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
    flags = *TINY, "--lr", 1e12, "--save-every", 1, "--out", "bad"
    assert "loss is not finite at step" in run("train.py", *flags, cwd=trained, code=2)
    assert all(p.isfinite().all() for p in M.PRX.from_pretrained(trained / "bad").parameters())

def test_sampling(trained, tmp_path):
    how, prompts = (trained / "out/scenes", "--steps", 3, "--seed", 5), ("a", "a red circle", "b")
    run("sample.py", *prompts, "--n", 2, "--out", "many", "--run", *how, cwd=tmp_path)
    run("sample.py", "b", "--out", "one/", "--run", *how, cwd=tmp_path)
    many, one = (np.asarray(Image.open(tmp_path / name)).astype(int)
                 for name in ("many/0004.png", "one/0000.png"))
    assert one.shape == (32, 32, 3) and abs(many - one).max() <= 2 and one.std() > 1
    assert "2 drawn" in run("sample.py", "a", "b", "--run", *how, cwd=tmp_path)
    how = *how, "--guidance-mode", "self"
    assert "composition" in run("sample.py", "--score", "--run", *how, cwd=tmp_path)

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

def test_processes_and_parts_of_a_batch_change_nothing(trained, tmp_path):
    flags = (*TINY, "--steps", 20, "--dtype", "fp32", "--data", trained / "data/scenes", "--out")
    for out, how, processes in ("one", (), 0), ("two", (), 2), ("parts", ("--micro-batch", 6), 0):
        run("train.py", *flags, out, *how, cwd=tmp_path, processes=processes)
    one, *others = ([float(row["loss"]) for row in csv.DictReader(open(log))]
                    for log in (tmp_path / out / "log.csv" for out in ("one", "two", "parts")))
    np.testing.assert_allclose(others, [one, one], rtol=1e-4)

@pytest.mark.parametrize("name, damage", [
    ("meta.json", lambda d: d.replace(b'"tokens"', b'"t"')), ("meta.json", lambda d: b"{"),
    ("latents.npy", lambda d: d[:-9]), ("latents.npy", lambda d: b""), ("offsets.npy", None),
    ("text.npy", lambda d: d[:-1] + b"\x7f"), ("offsets.npy", lambda d: d[:136] + d[:8] + d[144:])])
def test_a_broken_cache_is_refused(trained, name, damage, tmp_path):
    path = next(shutil.copytree(trained / "data/scenes", tmp_path / "cache").rglob(name))
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(M.Refused, match=name):
        T.Cache(tmp_path / "cache", "cpu")

@pytest.mark.parametrize("command, sentence", [
    ("train.py --stepz 3", "arguments: --stepz"), ("train.py --ema 1.5", "ema: 1.5 is not from 0"),
    ("train.py --width 100", "100 is not a multiple of 4 x 4"), ("sample.py", "give a prompt"),
    ("train.py --patch-size 5", "does not divide latents"), ("train.py --data data/x", "no cache"),
    ("prepare.py photos", "neither a tar, a"), ("prepare.py --codec .", "does not hold a Tiny"),
    ("prepare.py x/y", "x/y is not here, and"), ("sample.py a --run x/y", "x/y is not here, and"),
    ("prepare.py --text .", "config.json"), ("train.py --micro-batch -1", "--micro-batch: -1 is")])
def test_wrong_flags_and_missing_things(command, sentence, tmp_path):
    assert sentence in run(*command.split(), cwd=tmp_path, code=2)
    assert not list(tmp_path.iterdir())

def test_help_tells_every_flag_and_the_readme_links_to_the_right_lines():
    output, names = run("train.py", "--help", cwd=HERE).split(), T.Config.__dataclass_fields__
    assert {f"--{name.replace('_', '-')}" for name in names} <= {*output}
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text("utf-8"))
    for name, file, number in links:
        line = (HERE / file).read_text("utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), (name, line)
    assert len(links) > 10
