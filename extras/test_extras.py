"""Every promise about extras/, and that the four scripts agree with diffusers and transformers, on
random weights and on small files made here."""

import io
import json
import os
import shutil
import string
import tarfile
from pathlib import Path

import bench
import datasets
import diffusers
import heroes
import hub
import numpy as np
import official
import pytest
import teacher
import tokenizers
import torch
import transformers
from diffusers.pipelines.prx import T5GemmaEncoder
from PIL import Image

import model
import prepare
import sample
import train
from test_smoke import CPU, an_empty_folder, encode_picture, random_prx, write_files  # noqa: F401

transformers.set_seed(0)
needs_hub_files = pytest.mark.skipif("HF_HOME" not in os.environ, reason="needs files of the Hub")
MINI = "sentence-transformers/all-MiniLM-L6-v2"
load_transformer = diffusers.PRXTransformer2DModel.from_pretrained


# --------------------------------------------------------------- the four scripts against others
@pytest.mark.parametrize("case", [0, 1, 2])
def test_prx_agrees_with_diffusers_and_weights_go_both_ways(case):
    pixels = {"in_channels": 3, "patch_size": 8, "bottleneck_size": 16}, (32, 32), 5
    thin = {"in_channels": 4, "patch_size": 1, "num_heads": 3}, (5, 9), 1
    wide = {"in_channels": 16, "num_heads": 4, "axes_dim": (4, 8)}, (8, 12), 17
    sizes, shape, length = (pixels, thin, wide)[case]
    ours = random_prx(**sizes)
    ours.save_pretrained("ours")
    theirs = load_transformer("ours")
    theirs.save_pretrained("theirs")
    back, t = model.PRX.from_pretrained("theirs"), torch.rand(2)
    torch.testing.assert_close(back.state_dict(), ours.state_dict(), rtol=0, atol=0)
    x, text = torch.randn(2, sizes["in_channels"], *shape), torch.randn(2, length, 24)
    for mask in (None, torch.arange(length) < torch.tensor([[1], [length]])):
        expected = theirs(x, t, text, attention_mask=mask).sample
        torch.testing.assert_close(back(x, t, text, mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [4, 16])
def test_tiny_autoencoders_agree_with_diffusers(channels):
    theirs = diffusers.AutoencoderTiny(latent_channels=channels)
    theirs.save_pretrained("tiny")
    ours, images = model.load_codec("tiny", CPU), torch.randn(2, 3, 48, 64)
    latents = theirs.encode(images).latents
    torch.testing.assert_close(ours.encode(images), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(99 * latents), theirs.decode(99 * latents).sample)


@needs_hub_files
def test_a_real_text_encoder_gives_unpadded_embeddings_cut_to_256_tokens():
    ours = model.load_text_encoder(MINI, CPU)
    embeddings = ours.encode(["", "a red fox", " ".join(["a red fox on"] * 90)])
    assert [len(each) for each in embeddings] == [2, 5, 256]
    inputs = ours.tokenizer("a red fox", return_tensors="pt")
    theirs = transformers.AutoModel.from_pretrained(MINI)(**inputs).last_hidden_state[0]
    torch.testing.assert_close(embeddings[1], theirs, rtol=1e-4, atol=1e-4)


@needs_hub_files
def test_a_t5_that_was_saved_in_float16_computes_in_float32():
    files = model.fetch("google/flan-t5-base", "*.json")
    sizes = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 3}
    theirs = transformers.T5EncoderModel(transformers.T5Config.from_pretrained(files, **sizes))
    theirs.eval().to(torch.float16).save_pretrained("t5")
    shutil.copy(files / "tokenizer.json", "t5")
    with torch.autocast("cpu"):
        embedding = model.load_text_encoder("t5", CPU).encode([""])[0]
    expected = theirs.float()(torch.tensor([[1]])).last_hidden_state[0]  # of the end alone
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-4)


@needs_hub_files
def test_latents_of_a_real_codec_and_a_real_text_encoder_train_and_draw():
    how = {"size": 128, "codec": "taef2", "text": MINI, "limit": 9, "out": "cache"}
    prepare.prepare(prepare.Settings(**how))
    meta = model.read_json("cache/meta.json")
    latents = np.fromfile("cache/latents.bin", np.float16).reshape(9, *meta["latent_shape"])
    images = np.stack([np.asarray(prepare.draw_monster(number, 128)[1]) for number in range(9)])
    decoded = model.load_codec("taef2", CPU).decode(torch.tensor(latents).float()).clamp(-1, 1)
    error = decoded / 2 + 0.5 - torch.tensor(images).permute(0, 3, 1, 2) / 255
    assert -10 * error.square().mean((1, 2, 3)).log10().mean() > 27  # dB
    model.write_json("cache/meta.json", meta | {"source": "photos"})
    how = {"data": "cache", "out": "run", "steps": 2, "batch_size": 4, "warmup": 1, "width": 32}
    train.train(train.Settings(**how))
    sample.sample(sample.Settings(["a red fox"], run="run", steps=2))


# ----------------------------------------------------------------------------------------- hub.py
def prepare_hub(source, capsys, **how):
    """The captions of the cache that hub.py makes of a source, and what was printed."""
    shutil.rmtree("cache", ignore_errors=True)
    hub.main(hub.Settings(**({"source": str(source), "out": "cache", "size": 16} | how)))
    return prepare.read_captions("cache"), capsys.readouterr().out


def test_captions_in_a_tar_are_paired_never_guessed(capsys):
    names = ("Shot 12.30.45", "Shot 12.31.02", "x", "x.mask", "s0.input", "twice", "deep", "list")
    files = {f"a/{name}.png": encode_picture() for name in names}
    files |= {"a/broken.png": b"", "a/twice.jpg": encode_picture(kind="JPEG"), "a/._x.png": b""}
    files |= {"a/Shot 12.30.45.txt": b"half past", "a/Shot 12.31.02.txt": b"a minute later"}
    files |= {"a/x.txt": b"an x", "a/s0.txt": b"a sample", "a/twice.txt": b"which one"}
    files |= {"a/deep.json": b"[" * 100_000, "a/broken.txt": b"broken"}
    files["a/list.json"] = json.dumps({"caption": ["a fox", "a red fox", 5]}).encode()
    with tarfile.open("shard.tar", "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    captions, output = prepare_hub("shard.tar", capsys)
    wanted = {"half past", "a minute later", "an x", "a sample", "a red fox"}
    assert set(captions) == wanted and len(captions) == 5, output
    assert "2 x left out: two pictures for one caption" in output
    assert "1 x left out: no .txt or .json beside it, such as shard.tar/a/x.mask.png" in output
    assert "1 x left out: caption that is not UTF-8 or not JSON" in output
    os.truncate("shard.tar", os.path.getsize("shard.tar") // 2)
    assert "what stands before is read" in prepare_hub("shard.tar", capsys)[1]


def test_a_folder_with_metadata_is_read(capsys):
    write_files({f"photos/{name}.png": encode_picture() for name in "abc"})
    lines = 'file_name,text\na.png,"an ""a"", with more"\nb.png,a b\nc.png,!!!\n'
    write_files({"photos/metadata.csv": lines})
    captions, output = prepare_hub("photos", capsys)
    assert captions == ['an "a", with more', "a b"]
    assert "1 x left out: caption without words, such as row 2" in output


def write_parquet(folder, count):
    """A folder with a Parquet file with pictures, one of them broken, and lists of captions."""
    os.mkdir(folder)
    pictures = [{"bytes": encode_picture(colour=n % 256), "path": None} for n in range(count)]
    pictures[1]["bytes"] = b"broken"
    captions = [["a", f"number {number}"] for number in range(count)]
    rows = datasets.Dataset.from_dict({"id": [*range(count)], "img": pictures, "caption": captions})
    rows.cast_column("img", datasets.Image()).to_parquet(f"{folder}/rows.parquet")


def test_parquet_columns_are_found_or_named(capsys):
    write_parquet("rows", 5)
    captions, output = prepare_hub("rows", capsys)
    assert captions == ["number 0", "number 2", "number 3", "number 4"]
    assert "1 x left out: broken or gigantic picture" in output
    with pytest.raises(model.UserError, match="has no column title, but id, img, caption"):
        prepare_hub("rows", capsys, caption_column="title")
    with pytest.raises(model.UserError, match="user/name is no data set that can be read"):
        prepare_hub("user/name", capsys)


def test_a_stream_that_was_stopped_goes_on_to_the_same_bytes(monkeypatch):
    write_parquet("rows", 5000)
    how, load = {"source": "rows", "size": 32}, hub.load

    def stop(item):
        if item.name.startswith("row 4500,"):
            raise KeyboardInterrupt
        return load(item)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub, "load", stop)
        hub.main(hub.Settings(out="cut", **how))
    assert model.read_json("cut/progress.json")["count"] == 4096
    for out in ("cut", "whole"):
        hub.main(hub.Settings(out=out, **how))
    for name in os.listdir("whole"):
        assert Path("cut", name).read_bytes() == Path("whole", name).read_bytes(), name


# ------------------------------------------------------------------------------------- teacher.py
@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_features_are_those_of_the_teachers_patches(kind):
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    network = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network.save_pretrained("teacher")
    prepare.prepare(prepare.Settings(limit=70, out="cache"))
    Path("cache/teacher-teacher.partial").write_bytes(b"\0" * 2 * 48 * 16 + b"half a row")
    teacher.main(teacher.Settings("cache", "teacher"))
    run = train.Run(train.Settings(data="cache", repa=0.5, width=16, batch_size=4), CPU)
    latents, _, features = run.cache.load([0, 9])
    size = 16 * config.patch_size
    how = {"mode": "bicubic", "antialias": True}
    images = torch.nn.functional.interpolate(latents[1:] / 127.5 - 1, (size, size), **how)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    tokens = network((images / 2 + 0.5 - mean) / std).last_hidden_state
    patches = tokens[0, 1 + getattr(config, "num_register_tokens", 0) :]  # the class comes first
    wanted = patches.unflatten(0, (4, 4, 4, 4)).mean((1, 3)).permute(2, 0, 1)
    assert torch.nn.functional.cosine_similarity(features[1], wanted, dim=0).min() > 0.98
    assert not features[0].any()  # made before it was stopped
    assert train.train_step(run, train.make_batch(run.cache.load(range(4)), run))[1] > 0


# ------------------------------------------------------------------------------------ official.py
PROMPTS = ("A Red Fox, (quickly) over a “lazy” dog &amp; 50% off", "Ein grüner Käfer 🙂 " * 30, "")


@pytest.fixture(scope="session")
def pipe(tmp_path_factory):
    """A small random PRXPipeline of diffusers, and its folder."""
    folder = tmp_path_factory.mktemp("official") / "pipe"
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *string.printable]
    vocabulary = {word: number for number, word in enumerate(words)}
    letters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    template = tokenizers.processors.TemplateProcessing("<bos> $A", None, [("<bos>", 2)])
    letters.post_processor = template
    how = {"bos_token": "<bos>", "pad_token": "<pad>", "tokenizer_object": letters}
    tokenizer = transformers.PreTrainedTokenizerFast(model_max_length=256, **how)
    sizes = {"vocab_size": len(words), "hidden_size": 48, "intermediate_size": 64, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.T5GemmaConfig(encoder=sizes, decoder=sizes)
    text_encoder = T5GemmaEncoder(config.encoder).eval()
    for parameter in text_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    random_prx(in_channels=16, context_in_dim=48, std=0.15).save_pretrained(folder.parent / "prx")
    transformer = load_transformer(folder.parent / "prx")
    vae = diffusers.AutoencoderTiny(latent_channels=16)
    for parameter in vae.decoder.parameters():
        parameter.data *= 1.8
    vae.decoder.layers[-1].bias.data.fill_(0.5)  # neither black nor white
    parts = (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder, tokenizer, vae)
    pipeline = diffusers.PRXPipeline(transformer, *parts, default_sample_size=64)
    pipeline.save_pretrained(folder)
    config.save_pretrained(folder / "text_encoder")  # the official one is for both halves
    official.main(official.Settings(str(folder), str(folder.parent / "run")))
    return pipeline, folder


def draw_both(pipeline, run, prompt, guidance):
    how = {"run": str(run), "seed": 3, "steps": 5, "guidance": guidance, "out": "o/"}
    sample.sample(sample.Settings([prompt], **how))
    how = {"height": 64, "width": 64, "num_inference_steps": 5, "guidance_scale": guidance}
    how |= {"generator": torch.Generator().manual_seed(3), "use_resolution_binning": False}
    theirs = pipeline(prompt, **how).images[0]
    return np.asarray(Image.open("o/0000.png")) / 1.0, np.asarray(theirs) / 1.0


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_an_official_pipeline_draws_as_in_diffusers(pipe, guidance):
    for prompt in PROMPTS:
        ours, theirs = draw_both(pipe[0], pipe[1].parent / "run", prompt, guidance)
        assert abs(ours - theirs).max() <= 3, prompt
        assert ours.std() > 5


def test_an_official_prx_is_fine_tuned_and_drawn_again_in_diffusers(pipe):
    pipeline, folder = pipe
    write_files({"photos/a.png": encode_picture(), "photos/a.txt": "a picture"})
    how = {"size": 64, "codec": str(folder / "vae"), "text": str(folder), "out": "data"}
    prepare.prepare(prepare.Settings("photos", **how))
    first = str(folder.parent / "run")
    how = {"data": "data", "init": first, "steps": 2, "batch_size": 8, "warmup": 1}
    train.train(train.Settings(**how, out="tuned"))
    info = model.read_json("tuned/ema/nanoprx.json")
    assert [info[name] for name in ("predict", "shift", "mask", "steps")] == ["v", 3.0, True, 28]
    transformer = load_transformer("tuned/ema")
    parts = diffusers.PRXPipeline(**pipeline.components | {"transformer": transformer})
    ours, theirs = draw_both(parts, "tuned", "A Red Ring", 5.0)
    assert abs(ours - theirs).max() <= 3
    assert abs(ours - draw_both(pipeline, first, "A Red Ring", 5.0)[0]).max() > 3


def test_the_bench_prints_a_ratio(capsys):
    bench.main(bench.Settings(width=16, batch_size=4, pairs=2, route=0.5))
    assert "of diffusers' time, the median of pairs" in capsys.readouterr().out


def test_heroes_wear_what_their_captions_say():
    parts = [(key, tile) for key, layer in heroes.LAYERS.items() for tile in layer.values()]
    for n, part in enumerate(parts):
        tile = encode_picture(size=(32, 32), colour=(n, 0, 0))
        write_files({f"t/player/{'/'.join(part)}.png": tile})
    heroes.main(heroes.Settings("t", count=300))
    for path in Path("heroes").glob("*.png"):
        caption, n = path.with_suffix(".txt").read_text(), Image.open(path).getpixel((0, 0))[0]
        hats = [("head", tile) for hat, tile in heroes.HATS.items() if hat in caption]
        assert not hats or parts[n] == hats[0]  # as a hat here covers all
        assert not any(" in ".join(pair) in caption for pair in heroes.NEVER_MADE)
    tar = Path(os.getenv("HF_HOME", "")).parent / "data/heroes-tiles.tar"
    assert not tar.exists() or len(heroes.read_tiles(tar)) == len(parts)
