"""Every promise of README.md, tried: against diffusers, on small files, by running the scripts."""
import contextlib, copy, csv, io, json, os, random, re, resource, shutil, signal, struct, subprocess
import sys, tarfile, time, zlib
from pathlib import Path
import diffusers, numpy as np, pytest, safetensors.torch, torch, transformers
import model as M, prepare as P, sample as S, train as T, torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).parent
TINY = "--width 32 --depth 4 --batch-size 16 --bottleneck 16 --route 0.5 --repa 1 --repa-until 0.5"
transformers.set_seed(0)

@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

def run(command, cwd=None, code=0, processes=0, room=None, until=None, how=signal.SIGKILL):
    launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes}" * bool(processes)
    limit = room and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    process = subprocess.Popen(f"{sys.executable} {launch} {HERE}/{command}".split(), cwd=cwd,
        text=True, stdout=-1, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit)
    while until and not until.exists() and process.poll() is None:
        time.sleep(0.01)
    if until:
        os.killpg(process.pid, how)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == code or until and how == signal.SIGKILL, output
    assert code == 0 or "Traceback" not in output or processes, output
    return output

@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    network = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=70)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained(folder := tmp_path_factory.mktemp("teacher"))
    mean, std = torch.tensor([[.485, .456, .406], [.229, .224, .225]])[..., None, None]
    return folder, lambda x: network((x / 2 + 0.5 - mean) / std).last_hidden_state[:, 1:]

@pytest.fixture(scope="session")
def trained(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("work")
    assert "600 pictures" in run(f"prepare.py --limit 600 --teacher {teacher[0]}", folder)
    assert "accuracy" in run(f"train.py {TINY} --steps 48 --sample-every 20", folder, processes=1)
    M.write_json(meta := folder / "data/scenes/meta.json", {**M.read_json(meta), "source": "x"})
    return folder                                     # so later runs on this are not scored

def random_model(channels, patch, heads, axes, neck=None):
    network = M.PRX(M.PRXConfig(channels, patch, 24, 48, 3.5, heads, 4, axes, bottleneck_size=neck))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return network

@pytest.mark.parametrize("sizes, shape, length", [((3, 8, 2, (12, 12), 16), (32, 32), 5),
    ((4, 1, 3, (8, 8)), (5, 9), 1), ((16, 2, 4, (4, 8)), (8, 12), 17)])
def test_agrees_with_diffusers_and_swaps_weights(sizes, shape, length):
    ours = random_model(*sizes)
    ours.save_pretrained("ours")
    theirs = diffusers.PRXTransformer2DModel.from_pretrained("ours", low_cpu_mem_usage=False)
    theirs.save_pretrained("pipeline/transformer")
    back = M.PRX.from_pretrained("pipeline")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), back.parameters()))
    x, t, text = torch.randn(2, sizes[0], *shape), torch.rand(2), torch.randn(2, length, 24)
    for mask in None, torch.arange(length) < torch.tensor([[1], [length]]):
        expected = theirs(x, t, text, attention_mask=mask).sample
        torch.testing.assert_close(back(x, t, text, mask), expected, rtol=1e-5, atol=1e-5)

def test_a_training_step(teacher):
    (folder, theirs), features, seen = teacher, torch.randn(2, 48, 16, 16), []
    for sides in (70, 70), (56, 98), (224, 224):                    # its own, and interpolated
        images, ours = torch.rand(2, 3, *sides) * 2 - 1, P.load_teacher(folder)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    network = random_model(3, 8, 2, (12, 12))
    network.projector, x = torch.nn.Linear(48, 48), torch.rand(2, 3, 32, 32)
    before = copy.deepcopy(network)
    for module in (network, *network.blocks):
        module.register_forward_hook(lambda _, inputs, output: seen.append((*inputs, output)))
    config = T.Config(batch_size=2, patch_size=8, predict="v", t_floor=1, route=0.5, repa=0.7,
                      pdino=0.3, steps=1, warmup=0, cooldown=0, lr=1, clip=1e9)
    cache = P.argparse.Namespace(null=torch.zeros(4, 24), mean=0, std=1, teacher=ours)
    M.rope_table.cache_clear()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        T.train_step(network, {"": torch.optim.SGD(network.parameters())}, cache, config, 0, 0,
                     torch.autocast("cpu", enabled=False), (torch.randn(2, 4, 24), x, features))
    assert M.rope_table.cache_info().misses == 1
    (*_, ropes, _, a), (b, _, _, rope, _, _), (*_, c), (d, *_), (x_t, t, text, _, stay, _) = seen
    rows = torch.arange(2)[:, None]                             # a to d: tokens between the blocks
    assert torch.equal(b, a[rows, stay]) and torch.equal(rope[0], ropes[0][stay])
    assert torch.equal(d, a.index_put((rows, stay), c))
    (output, tokens), t = before(x_t, t, text, None, stay), t[:, None, None, None]
    clean = F.interpolate(x_t - t * output, 224, mode="bicubic")
    alike = F.cosine_similarity(theirs(clean), features.flatten(2).mT, dim=2).mean()
    wanted = F.avg_pool2d(features, 4).flatten(2).mT[rows, stay]
    loss = F.mse_loss(output, (x_t - x) / t) - 0.3 * alike
    (loss - 0.7 * F.cosine_similarity(tokens, wanted, dim=2).mean()).backward()
    for old, new in zip(before.parameters(), network.parameters()):
        torch.testing.assert_close(old - new, old.grad, rtol=1e-3, atol=1e-5)

def test_flow_and_guidance():
    (x, noise), t = torch.randn(2, 3, 1, 2, 2), torch.tensor([0.06, 0.5, 1.0])
    x_t = torch.lerp(x, noise, t[:, None, None, None])
    torch.testing.assert_close(M.velocity(x, x_t, t, "x"), noise - x)
    draws, shifted = (M.sample_timesteps(9**5, s, torch.Generator().manual_seed(0)) for s in (1, 3))
    assert abs((draws < 0.1).float().mean() - 0.7 * 0.0140 - 0.3 * 0.1) < 0.002      # its two parts
    assert draws.min() >= 1e-3 and abs(draws.mean() - 0.5) < 0.005 and M.velocity(x, 0, 0, "v") is x
    torch.testing.assert_close(shifted, (3 * draws / (1 + 2 * draws)).where(draws > 1e-3, shifted))
    constant = lambda x, t, text: text.mean((1, 2))[:, None, None, None].expand_as(x)
    how = {"predict": "v", "shift": 2.0}
    latents = S.generate(constant, torch.full((3, 1, 1), 2.), torch.ones(1, 1), x, how, 5, 3.0)
    torch.testing.assert_close(latents, x - (1 + 3.0 * (2 - 1)))

def test_safetensors():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.tensor(7),
               "d": torch.zeros(0, 2), "e": torch.tensor([True, False, True])}
    M.write_safetensors("ours", tensors)
    safetensors.torch.save_file(tensors, "theirs")
    for read in safetensors.torch.load_file("ours"), M.read_safetensors("theirs"):
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    whole = Path("ours").read_bytes()
    for number in range(2000):           # whatever the bytes, a sentence or tensors, never a crash
        data = bytearray(whole)
        data[random.randrange(len(data))], data[random.randrange(len(data))] = random.randbytes(2)
        Path("bad").write_bytes(data)
        with contextlib.suppress(M.Refused):
            M.read_safetensors("bad")
    for bad in (b"", whole[:40], whole[:-1], whole + b"x", whole.replace(b'"F32"', b'"F4"  '),
                whole.replace(b"[3, 5]", b"[9, 9]"), whole.replace(b"[0, 60]", b"[0, 99]")):
        Path("bad").write_bytes(bad)
        with pytest.raises(M.Refused, match="bad is not a whole safetensors file"):
            M.read_safetensors("bad")

def test_check_is_strict_and_scenes_are_told():
    rng, renders, changed = np.random.default_rng(5), [], []
    for _ in range(300):
        scene = P.random_scene(rng)
        assert not {thing[:2] for thing in scene.things} & P.NEVER_TRAINED
        renders += [P.check(P.render(scene, size), scene) for size in (32, 64)]
        thing, *rest = random.sample(scene.things, len(scene.things))
        others = [thing._replace(colour=new) for new in P.COLOURS if new != thing.colour]
        others += [thing._replace(shape=new) for new in P.SHAPES if new != thing.shape]
        others += [thing._replace(place=new, x=0.5 + P.STEP * x, y=0.5 + P.STEP * y)
                   for new, (x, y) in P.PLACES.items() if new not in [t[2] for t in scene.things]]
        others = [scene._replace(things=things) for things in (rest, *([o, *rest] for o in others))]
        others += [scene._replace(ground=new) for new in P.COLOURS if new != scene.ground]
        for other in random.sample(others, 10):                  # or a picture between the two
            share, a, b = rng.uniform(0.7, 1), P.render(scene, 32), P.render(other, 32)
            changed.append(P.check(((1 - share) * a + share * b).astype(np.uint8), scene))
        assert not P.check(np.full((32, 32, 3), P.COLOURS[scene.ground], np.uint8), scene)
        assert not P.check(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8), scene)
    assert np.mean(renders) >= 0.995 and np.mean(changed) <= 0.01
    a, b, none = P.Words()(["Red circle!", "circle red", ""])
    assert torch.equal(a[0, :32], b[1, :32]) and not torch.equal(a[0], b[1]) and len(none) == 0

@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_autoencoders_agree_with_diffusers(channels):
    theirs, images = diffusers.AutoencoderTiny(latent_channels=channels), torch.randn(2, 3, 48, 64)
    theirs.save_pretrained("tiny")
    ours, latents = P.load_codec("tiny"), theirs.encode(images).latents
    torch.testing.assert_close(ours.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(99 * latents), theirs.decode(99 * latents).sample)

@pytest.mark.skipif("HF_HOME" not in os.environ, reason="needs the files of a Hub cache")
def test_t5_and_two_stages_on_latents_of_a_codec_from_the_hub():
    files, t5 = M.fetch("google/flan-t5-base", "*.json"), Path("t5")
    theirs = transformers.T5EncoderModel(transformers.T5Config.from_pretrained(files, d_model=48,
        d_kv=8, d_ff=64, num_layers=2, num_heads=3)).eval().requires_grad_(False)
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
        expected = theirs(**inputs).last_hidden_state[inputs.attention_mask.bool()]
        torch.testing.assert_close(torch.cat(ours(batch)), expected, rtol=1e-4, atol=1e-4)
    assert len(ours(captions)[3]) == 256 and ours.cut == 3                   # of the longest
    assert " cut" in run("prepare.py --size 128 --codec taef2 --text t5 --max-tokens 9 --limit 9")
    M.write_json(meta := "data/scenes/meta.json", {**M.read_json(meta), "source": "photos"})
    scenes = (P.random_scene(np.random.default_rng(n)) for n in range(9))
    images = torch.tensor(np.stack([P.render(scene, 128) for scene in scenes])).permute(0, 3, 1, 2)
    latents = torch.tensor(np.load("data/scenes/shard-00000/latents.npy")).float()
    error = P.load_codec("taef2").decode(latents).clamp(-1, 1) / 2 + 0.5 - images / 255
    assert -10 * error.square().mean((1, 2, 3)).log10().mean() > 27                           # dB
    run("train.py --out a --steps 2 --batch-size 4")
    run("train.py --init a --out b --steps 1 --lr 1e-9 --muon-lr 1e-9 --batch-size 4")
    torch.testing.assert_close(*(M.PRX.from_pretrained(name).state_dict() for name in "ab"))
    run("sample.py a --run b --steps 2 --out one/")
    for command, sentence in (("sample.py --score --run b", "not trained on scenes"),
            ("prepare.py --codec taef2 --size 44 --out y", "multiple"),
            ("train.py --repa 1", "teacher.npy"), ("train.py --pdino 1", "these are latents")):
        assert sentence in run(command, code=2)

def make(mode="RGB", size=(40, 30), kind="PNG", colour=None, greys=iter(range(9, 256, 5)), **save):
    picture = Image.new(mode, size, next(greys) if colour is None else colour)
    picture.save(data := io.BytesIO(), kind, **save)
    return data.getvalue()

def test_any_picture_from_a_folder():
    (source := Path("photos/deeper")).mkdir(parents=True)
    rotated, exif, source = Image.new("RGB", (60, 40), "red"), Image.Exif(), source.parent
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
    output = run(f"prepare.py {source} --size 16 --min-words 2")
    for line in ("4 x broken or gig", "1 x shorter side below 8", "1 x no le", "bare.png: no",
                 "1 x longer side above 4", "1 x exact duplicate", "9 pictures, 52.9% of"):
        assert line in output, output
    captions = Path("data/photos/shard-00000/captions.txt").read_text("utf-8").splitlines()
    latents = dict(zip(captions, np.load("data/photos/shard-00000/latents.npy", mmap_mode="r")))
    assert len(latents) == 9 and "deeper/naïve name.bmp in words" in latents
    assert latents["clear.png in words"].min() == 204 and latents["deep.png in words"].min() == 38
    top, bottom = latents["a turn"][:, 2].mean(1), latents["a turn"][:, -3].mean(1)
    assert top[2] > 200 > 50 > top[0] and bottom[0] > 200 > 50 > bottom[2]
    output = run(f"prepare.py {source} --min-size 999 --out {source}", code=2)
    assert "nothing usable" in output and all((source / name).exists() for name in files)

def test_tar_shards_here_and_on_the_hub(tmp_path, monkeypatch):
    Path("shards").mkdir()
    for number in range(2):
        with tarfile.open(f"shards/{number}.tar", "w") as tar:
            for name, data in (("a/x.jpg", make(kind="JPEG")), ("a/x.json", b'{"prompt": "an x"}'),
                    ("../y.0.png", make(size=(50, 50))), ("../y.txt", b"a y"),
                    ("/z.png", make()), ("/z.txt", b"\xff\xfe\xff"), ("k.txt", b"alone"),
                    ("\udcff.png", make()), ("\udcff.json", b'{"text": "an \\ud800"}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    Path("shards/2.tar").write_bytes(Path("shards/1.tar").read_bytes()[:2100])
    before = set(tmp_path.parent.rglob("*"))
    output = run("prepare.py shards --size 16", processes=2)
    meta = M.read_json("data/shards/meta.json")
    assert meta["shards"]["shard-00000"] == meta["shards"]["shard-00001"] == 3, output
    assert Path("data/shards/shard-00001/captions.txt").read_text() == "an x\na y\nan ?\n"
    assert all("data" in path.parts for path in set(tmp_path.parent.rglob("*")) - before)
    monkeypatch.setattr(P, "ask_hub", lambda function, repository, *files, **how:
                        f"shards/{files[0]}" if files else ["x.txt", "0.tar"])
    for source in "shards/0.tar", "user/name", "user/name:*.tar":
        pictures = list(P.read_source(source))[:2]
        assert [(each.mode, text) for each, text in pictures] == [("RGB", "an x"), ("RGB", "a y")]

def test_cache_format_and_going_on_after_a_kill(trained, teacher):
    meta, names = M.read_json(trained / "data/scenes/meta.json"), "latents text offsets teacher"
    shard = trained / "data/scenes/shard-00000"
    latents, text, offsets, features = (np.load(shard / f"{name}.npy") for name in names.split())
    assert meta["latent_shape"] == [3, 32, 32] and latents.shape == (600, 3, 32, 32)
    assert latents.dtype == np.uint8 and text.shape == (offsets[-1], 96) and len(offsets) == 601
    measured = latents.mean((0, 2, 3)) / 127.5 - 1, latents.std((0, 2, 3)) / 127.5
    np.testing.assert_allclose((meta["mean"], meta["std"]), measured, atol=1e-4)
    tokens = P.Words()((shard / "captions.txt").read_text().splitlines())[7]
    np.testing.assert_allclose(text[offsets[7]:offsets[8]], tokens, atol=1e-3)
    shown = P.load_teacher(teacher[0], "cpu", 4).on_grid(torch.tensor(latents) / 127.5 - 1)
    assert F.cosine_similarity(torch.tensor(features).float(), shown).min() > 0.98        # of bf16
    run("prepare.py --limit 9000", until=(file := Path("data/scenes/shard-00000/latents.npy")))
    first = file.stat()
    assert "9,000 p" in run("prepare.py --limit 9000", processes=2) and file.stat() == first
    assert "complete" in run("prepare.py --limit 9000")

def test_a_run_and_its_folder_and_sampling(trained):
    out, rows = trained / "out/scenes", list(csv.DictReader(open(trained / "out/scenes/log.csv")))
    assert [row["step"] for row in rows] == "10 20 30 40 48".split()
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert len(list((out / "samples").iterdir())) == Image.open(out / "learning.gif").n_frames == 3
    assert "finished in" in run(f"train.py {TINY} --steps 48 --sample-every 20", trained)
    output = run(f"train.py {TINY} --steps 30 --lr 0.01", trained, code=2)
    assert "lr was 0.003 and is now 0.01" in output and "steps was 48 and is now 30" in output
    assert "not finite" in run(f"train.py {TINY} --lr 1e12 --save-every 1 --out b", trained, code=2)
    assert all(p.isfinite().all() for p in M.PRX.from_pretrained(trained / "b").parameters())
    how = f"--run {trained}/out/scenes --steps 3 --seed 5 --out"
    run(f"sample.py a ring b --n 2 {how} many")
    run(f"sample.py b {how} one")
    many, one = (np.asarray(Image.open(name)) / 1. for name in ("many/0004.png", "one/0000.png"))
    assert one.shape == (32, 32, 3) and abs(many - one).max() <= 2 and one.std() > 1
    assert "12 drawn" in run(f"sample.py {how} all.png")
    assert "composition" in run(f"sample.py --score --guidance-mode self {how} none")

@pytest.mark.parametrize("how, processes", [
    (signal.SIGKILL, 0), (signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 2)])
def test_an_interrupted_run_goes_on_exactly(trained, how, processes):
    command = f"train.py {TINY} --steps 40 --save-every 7 --data {trained}/data/scenes --out"
    output = run(f"{command} cut", None, 0, processes, until=Path("cut/ckpt.pt"), how=how)
    assert how == signal.SIGKILL or "goes on" in output
    assert 0 < torch.load("cut/ckpt.pt", weights_only=True)["log"][0] < 40
    if how == signal.SIGTERM:                              # as if the disk were full of all else
        assert "File too large" in run(f"{command} cut", code=1, room=99_999)
        assert not list(Path("cut").rglob("*.partial"))
    for out in "cut", "whole":
        run(f"{command} {out}", processes=processes)
    cut, whole = (M.PRX.from_pretrained(name).state_dict() for name in ("cut", "whole"))
    torch.testing.assert_close(cut, whole, rtol=0, atol=0)
    steps = [int(row["step"]) for row in csv.DictReader(open("cut/log.csv"))]
    assert steps == sorted(set(steps)) and {10, 40} <= set(steps)

def test_processes_parts_of_a_batch_and_an_ended_repa_change_nothing(trained):
    losses, data = {}, f"--data {trained}/data/scenes"
    for out, how, processes in [("one", "", 0), ("two", "", 2), ("parts", "--micro-batch 6", 0),
            ("off", "--repa 0", 0), ("end", "--repa-until 0", 0), ("dino", "--pdino 1", 0)]:
        run(f"train.py {TINY} --steps 20 --dtype fp32 {data} --out {out} {how}", None, 0, processes)
        losses[out] = [float(row["loss"]) for row in csv.DictReader(open(f"{out}/log.csv"))]
    for one, same, other in ["one", "two", "dino"], ["one", "parts", "off"], ["off", "end", "one"]:
        np.testing.assert_allclose(losses[one], losses[same], rtol=1e-4)
        assert losses[one][1] != losses[other][1]

@pytest.mark.parametrize("name, damage", [
    ("meta.json", lambda d: d.replace(b'"tokens"', b'"t"')), ("meta.json", lambda d: b"{"),
    ("latents.npy", lambda d: d[:-9]), ("latents.npy", lambda d: b""), ("offsets.npy", None),
    ("text.npy", lambda d: d[:-1] + b"\x7f"), ("offsets.npy", lambda d: d[:136] + d[:8] + d[144:])])
def test_a_broken_cache_is_refused(trained, name, damage):
    path = next(shutil.copytree(trained / "data/scenes", Path("cache")).rglob(name))
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(M.Refused, match=name):
        T.Cache(Path("cache"), "cpu")

@pytest.mark.parametrize("command, sentence", [
    ("train.py --stepz 3", "arguments: --stepz"), ("train.py --ema 1.5", "ema: 1.5 is not in [0"),
    ("train.py --width 100", "100 is no mul"), ("sample.py", "out/scenes is not here"),
    ("train.py --patch-size 5", "does not divide latents"), ("train.py --data x", "of no cache"),
    ("prepare.py photos", "neither a tar, a"), ("prepare.py --codec .", "does not hold a Tiny"),
    ("prepare.py x/y", "x/y is not here, and"), ("sample.py a --run x/y", "x/y is not here, and"),
    ("prepare.py --text .", "config.json"), ("train.py --micro-batch -1", "batch: -1 is not in")])
def test_wrong_flags_and_missing_things(command, sentence):
    assert sentence in run(command, code=2) and not os.listdir()

def test_help_tells_every_flag_and_the_readme_links_to_the_right_lines():
    output, readme = run("train.py --help"), (HERE / "README.md").read_text("utf-8")
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert links and all("--" + name.replace("_", "-") in output for name in vars(T.Config()))
    for name, file, number in links:
        line = (HERE / file).read_text("utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), (name, line)
