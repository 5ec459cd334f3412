"""Images in many files: cached listings, shards, damaged files, synthetic folders."""

import io
import os
import tarfile

import pytest
import torch
from PIL import Image

from fdda_ext.commands import evaluate, train
from fdda_ext.data import calibration_set, listing, load_dataset, synthetic
from fdda_ext.data.listing import Listing, cached_listing
from fdda_ext.errors import UnreadableImageError, UsageError
from fdda_ext.preprocessing import Preprocessing


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A separate cache that also keeps short and new listings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "CACHE_FROM", 1)
    monkeypatch.setattr(listing, "_SETTLED_SECONDS", -1e9)
    return tmp_path / "cache" / "fdda_ext"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small synthetic set as a folder and as shards."""
    base = tmp_path_factory.mktemp("synthetic")
    arguments = ["--classes=3", "--per-class=4", "--val-per-class=2", "--seed=1"]
    synthetic.main([*arguments, f"--out={base / 'folder'}"])
    synthetic.main([*arguments, f"--out={base / 'shards'}", "--form=shards"])
    return base


def test_a_listing_keeps_names_of_any_bytes():
    names = ["a/b.jpg", "", "日本/ü.png", os.fsdecode(b"\xff\xfe.jpg")]
    kept = Listing.build(["x"], [0] * 4, names)
    assert [kept.name(i) for i in range(4)] == names
    assert kept.name(-1) == names[-1]
    assert kept.name(-4) == names[0]
    with pytest.raises(IndexError):
        kept.name(4)


def make_folder(path, counts=(2, 3)):
    for label, count in enumerate(counts):
        place = path / "val" / f"c{label}"
        place.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (20, 20), (60 * label, 10 * i, 90)).save(place / f"{i}.png")
    # Date the folders back, since the file system's clock may be too coarse for the next change.
    for place in (path / "val", *(path / "val").iterdir()):
        os.utime(place, (1e9, 1e9))
    return path


def names_of(path):
    data = load_dataset(f"folder:{path}", "test", image_size=16)
    return [os.path.relpath(data.name(i), path / "val") for i in range(len(data))]


def test_a_listing_is_read_once_and_again_after_a_change(tmp_path, cache, monkeypatch):
    path = make_folder(tmp_path / "data")
    first = names_of(path)
    assert first == ["c0/0.png", "c0/1.png", "c1/0.png", "c1/1.png", "c1/2.png"]
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("fdda_ext.data.folder._read_folder", None)
    assert names_of(path) == first, "the listing is from the cache"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    nested = path / "val" / "c1" / "more"
    nested.mkdir()
    Image.new("RGB", (20, 20)).save(nested / "9.JPEG")
    (path / "val" / "c1" / "notes.txt").write_text("no image")
    assert names_of(path) == [*first, "c1/more/9.JPEG"]
    (path / "val" / "c0" / "0.png").unlink()
    assert names_of(path) == [*first[1:], "c1/more/9.JPEG"]


def hide_things(path):
    """Add files that Jupyter, macOS, Windows and network drives write into folders of images."""
    image = next(path.rglob("*.png")).read_bytes()
    place = path / "val"
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "c0/.ipynb_checkpoints", "c1/.x/y"):
        (place / folder).mkdir(parents=True)
        (place / folder / "0-checkpoint.png").write_bytes(image)
    for name in ("c0/._0.png", "c1/.hidden.jpg", "c0/Thumbs.db", ".DS_Store"):
        (place / name).write_bytes(image)


def test_hidden_files_and_folders_are_neither_images_nor_classes(tmp_path, cache):
    path = make_folder(tmp_path / "data")
    first = names_of(path)
    hide_things(path)
    assert names_of(path) == first
    assert load_dataset(f"folder:{path}", "test").class_names == ("c0", "c1")
    training = path / "train"
    for name in ("c0", "c1", ".ipynb_checkpoints", "__MACOSX"):
        (training / name).mkdir(parents=True)
    assert load_dataset(f"folder:{path}", "test").num_classes == 2


def test_a_cached_listing_of_another_version_is_ignored(tmp_path, cache, monkeypatch):
    path = make_folder(tmp_path / "data")
    hide_things(path)
    with monkeypatch.context() as older:  # a version that counted hidden files
        older.setattr(listing, "_FORMAT", "fdda_ext.listing.1")
        older.setattr("fdda_ext.data.folder.is_hidden", lambda name: name == "@eaDir")
        assert len(names_of(path)) > 5
    assert len(list(cache.iterdir())) == 1
    assert len(names_of(path)) == 5


def test_a_split_with_fewer_classes_keeps_the_class_numbers(tmp_path, cache, capsys):
    path = make_folder(tmp_path / "data", counts=(2, 3, 1, 2))
    (path / "val").rename(path / "train")
    make_folder(path, counts=(0, 3, 0, 2))  # two empty folders
    (path / "val" / "c0").rmdir()  # one of them is missing
    for _ in range(2):  # the second listing is from the cache
        data = load_dataset(f"folder:{path}", "test", image_size=16)
        assert data.class_names == ("c0", "c1", "c2", "c3")
        assert data.labels.tolist() == [1, 1, 1, 3, 3]
        assert [data[i][1] for i in (0, 4)] == [1, 3]
        assert data.absent_classes() == "images of 2 of 4 classes"
    assert load_dataset(f"folder:{path}", "test", limit=1).absent_classes() == data.absent_classes()
    assert load_dataset(f"folder:{path}", "train").absent_classes() is None
    model = ["--model=torchvision:resnet18", "--weights=none", "--image-size=32"]
    evaluate.main([*model, f"--data=folder:{path}"])
    assert "test data: images of 2 of 4 classes" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [b"", b"no list", None])
def test_a_damaged_cache_is_ignored(tmp_path, cache, damage):
    path = make_folder(tmp_path / "data")
    first = names_of(path)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-3] if damage is None else damage)
    assert names_of(path) == first


def test_a_cache_that_cannot_be_written_gives_a_warning(tmp_path, cache, caplog):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(names_of(make_folder(tmp_path / "data"))) == 5
    assert "could not be kept" in caplog.text


def test_short_and_fresh_listings_are_not_cached(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(listing, "CACHE_FROM", 6)
    names_of(make_folder(tmp_path / "short"))
    monkeypatch.setattr(listing, "CACHE_FROM", 1)
    monkeypatch.setattr(listing, "_SETTLED_SECONDS", 1e12)
    names_of(make_folder(tmp_path / "fresh"))
    assert not cache.exists()


def test_a_hundred_thousand_names_come_from_the_cache(tmp_path, cache):
    names = [f"n{i // 100:08d}/image_{i}.JPEG" for i in range(100_000)]
    labels = [i // 100 for i in range(100_000)]
    made = Listing.build([str(k) for k in range(1000)], labels, names)
    cached_listing(tmp_path, lambda: made)
    kept = cached_listing(tmp_path, lambda: pytest.fail("read again"))
    assert kept.classes == made.classes
    assert torch.equal(kept.labels, made.labels)
    assert all(kept.name(i) == names[i] for i in (0, 1, 54_321, 99_999))


def test_preprocessing_is_applied(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    image = Image.effect_noise((60, 40), 80).convert("RGB")
    image.save(tmp_path / "val" / "a" / "0.png")
    how = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16, 20, "bicubic")
    data = load_dataset(f"folder:{tmp_path}", "test", preprocessing=how)
    assert (data.mean, data.std, data.image_size) == (how.mean, how.std, 16)
    resized = image.resize((30, 20), Image.Resampling.BICUBIC).crop((7, 2, 23, 18))
    expected = torch.tensor(list(resized.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    assert torch.equal(data.pixels(0), expected.permute(2, 0, 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
    assert torch.equal(data[0][0], (data.pixels(0) / 255 - mean) / std)


def test_synthetic_folder_is_deterministic_varied_and_labelled(written, tmp_path):
    data = load_dataset(f"folder:{written / 'folder'}", "train", image_size=64)
    assert (len(data), data.num_classes) == (12, 3)
    sizes = {Image.open(data.name(i)).size for i in range(12)}
    assert len(sizes) == 12
    assert all(200 <= min(size) < 500 and max(size) <= 750 for size in sizes)
    again = tmp_path / "again"
    synthetic.main(
        ["--classes=3", "--per-class=4", "--val-per-class=2", "--seed=1", "--workers=2"]
        + [f"--out={again}"]
    )
    for file in sorted((written / "folder").rglob("*.JPEG")):
        assert (again / file.relative_to(written / "folder")).read_bytes() == file.read_bytes()


def test_synthetic_classes_are_all_different():
    texts = [synthetic.class_text(label) for label in range(synthetic._MOST_CLASSES)]
    assert len(set(texts)) == len(texts)
    assert synthetic.class_text(70) == "*"
    assert synthetic.class_text(71) == "00"
    names = [synthetic.class_name(label) for label in range(2000)]
    assert names == sorted(names)
    for label in (71, 1000, 3000, len(texts) - 1):
        assert len(synthetic.draw_jpeg("val", 0, label, 0)) > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes=0"], "classes between 1 and 5112, got 0"),
        (["--per-class=0"], "per_class at least 1, got 0"),
        (["--workers=0"], "threads between 1"),
        (["--seed=-1"], "seed between 0"),
    ],
)
def test_bad_synthetic_sets_are_refused(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        synthetic.main([f"--out={tmp_path / 'x'}", *arguments])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="a new or empty folder, got"):
        synthetic.main([f"--out={tmp_path / 'full'}"])


def test_shards_hold_the_same_images_as_the_folder(written):
    for split in ("train", "test"):
        folder = load_dataset(f"folder:{written / 'folder'}", split, image_size=32)
        shards = load_dataset(f"shards:{written / 'shards'}", split, image_size=32)
        assert (len(shards), shards.num_classes) == (len(folder), folder.num_classes)
        place = {os.path.basename(folder.name(i))[:-5]: i for i in range(len(folder))}
        for i in range(len(shards)):
            key = shards.name(i).rpartition(":")[2][:-4]
            assert torch.equal(shards.pixels(i), folder.pixels(place[key]))
            assert shards[i][1] == folder[place[key]][1]
    images, labels = calibration_set(f"shards:{written / 'shards'}", 2, image_size=32)
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def png(shade=0):
    file = io.BytesIO()
    Image.new("L", (16, 16), shade).save(file, "PNG")
    return file.getvalue()


def test_bad_shards_are_refused(tmp_path):
    def load(name):
        return load_dataset(f"shards:{tmp_path / name}", "test", image_size=16)

    (tmp_path / "none" / "val").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"uncompressed .tar archives, got none"):
        load("none")
    write_shard(tmp_path / "a" / "val" / "0.tar", [("x.png", png())])
    with pytest.raises(UsageError, match=r"a .cls member for every image, got none for x"):
        load("a")
    write_shard(tmp_path / "b" / "val" / "0.tar", [("x.png", png()), ("x.cls", b"-1")])
    with pytest.raises(UsageError, match=r"a label \(0 or above\), got b'-1'"):
        load("b")
    write_shard(tmp_path / "c" / "val" / "0.tar", [("x.cls", b"1")])
    with pytest.raises(UsageError, match="archives in .* to hold images, got none"):
        load("c")
    whole = write_shard(tmp_path / "d" / "val" / "0.tar", [("x.png", png()), ("x.cls", b"0")])
    whole.write_bytes(whole.read_bytes()[:700])
    with pytest.raises(UsageError, match=r"whole, uncompressed tar archive, got .*0.tar"):
        load("d")
    (tmp_path / "e" / "val").mkdir(parents=True)
    with tarfile.open(tmp_path / "e" / "val" / "0.tar", "w:gz"):
        pass
    with pytest.raises(UsageError, match="uncompressed tar archive"):
        load("e")
    write_shard(tmp_path / "f" / "val" / "0.tar", [("x.png", png()), ("x.cls", b"2")])
    write_shard(tmp_path / "f" / "train" / "0.tar", [("x.png", png()), ("x.cls", b"1")])
    with pytest.raises(UsageError, match="below the 2 classes of .*train, got 2"):
        load("f")


def test_hidden_archives_and_members_are_left_out(tmp_path):
    path = tmp_path / "val"
    samples = [("./a/0", b"0"), (".x/1", b"9"), ("a/.ipynb_checkpoints/2", b"9")]
    samples += [("__MACOSX/a/3", b"9"), ("a/4", b"1")]
    members = [(f"{key}.{e}", d) for key, cls in samples for e, d in (("png", png()), ("cls", cls))]
    write_shard(path / "0.tar", [*members, ("a/._5.png", png()), ("a/.6.png", png())])
    (path / "._0.tar").write_bytes(b"no archive")
    data = load_dataset(f"shards:{tmp_path}", "test", image_size=16)
    assert data.labels.tolist() == [0, 1]
    assert data.num_classes == 2


def test_shards_of_fewer_classes_than_training(tmp_path):
    for split, labels in (("train", range(4)), ("val", (1, 3))):
        members = [(f"{k}.{e}", d) for k in labels for e, d in (("png", png()), ("cls", b"%d" % k))]
        write_shard(tmp_path / split / "0.tar", members)
    data = load_dataset(f"shards:{tmp_path}", "test", image_size=16)
    assert (data.num_classes, data.labels.tolist()) == (4, [1, 3])
    assert data.absent_classes() == "images of 2 of 4 classes"


def test_a_shard_that_changes_is_listed_again(tmp_path, cache):
    path = tmp_path / "data" / "val" / "0.tar"
    write_shard(path, [("d/x.png", png(9)), ("d/x.cls", b"1\n"), ("d/notes.txt", b"?")])
    data = load_dataset(f"shards:{tmp_path / 'data'}", "test", image_size=16)
    assert (len(data), data.num_classes) == (1, 2)
    assert data.name(0) == f"{path}:d/x.png"
    assert int(data.pixels(0).unique()) == 9
    write_shard(path, [(f"{i}.{e}", d) for i in "ab" for e, d in (("png", png()), ("cls", b"0"))])
    assert len(load_dataset(f"shards:{tmp_path / 'data'}", "test", image_size=16)) == 2


def copy_of(source, target):
    for file in source.rglob("*.JPEG"):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    return target


def test_damaged_calibration_images_are_replaced_up_to_the_limit(written, tmp_path, caplog):
    path = copy_of(written / "folder", tmp_path / "data")
    spec = f"folder:{path}"
    whole = load_dataset(spec, "calibration", image_size=32)
    images, _ = calibration_set(spec, image_size=32)
    chosen = [next(i for i in range(12) if torch.equal(whole[i][0], x)) for x in images]
    damaged = whole.name(chosen[1])
    with open(damaged, "r+b") as file:
        file.truncate(2000)
    with pytest.raises(UnreadableImageError, match="readable image, got .*truncated"):
        calibration_set(spec, image_size=32)
    again, labels = calibration_set(spec, image_size=32, max_unreadable=1)
    assert damaged in caplog.text
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(again[[0, 2]], images[[0, 2]])
    assert not torch.equal(again[1], images[1])
    for i in range(4, 8):
        with open(whole.name(i), "wb") as file:
            file.write(b"no image")
    with pytest.raises(UsageError, match="got 0 of class n00000001 and 4 that cannot be read"):
        calibration_set(spec, image_size=32, max_unreadable=9)


QUICK = [
    "--no-report",
    "--image-size=32",
    "--seed=1",  # this random network classifies some images correctly
    "--model=torchvision:resnet18",
    "--weights=none",
    "--baselines=[]",
    "--settings.distillation.steps=4",
    "--settings.distillation.real_batch=2",
    "--settings.distillation.generated_batch=2",
    "--settings.fdda.warmup_iterations=2",
    "--settings.fdda.student_steps_per_iteration=1",
    "--settings.fdda.generator.channels=4",
    "--settings.fdda.batch=4",
]


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_complete_run_on_files(written, tmp_path, capsys, kind):
    out = tmp_path / "run"
    train.main(
        [
            *QUICK,
            f"--data={kind}:{written / kind}",
            f"--out={out}",
            "--preprocessing.interpolation=bicubic",
            "--preprocessing.mean=[0.5,0.5,0.5]",
            "--evaluate-every=3",
            "--evaluate-limit=3",
            "--keep-best",
            "--workers=1",
            "--test-batch=4",
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "bicubic, crop 32, mean 0.5 0.5 0.5, std 0.229 0.224 0.225" in printed
    lines = [x for x in (out / "metrics.jsonl").read_text().splitlines() if "top1" in x]
    assert len(lines) == 2
    assert all('"images": 3' in line for line in lines)
    measured = evaluate.run(evaluate.EvaluateConfig(run=str(out)))
    assert f'"top1": {measured.top1}' in (out / "summary.json").read_text()
    best = evaluate.run(evaluate.EvaluateConfig(run=str(out / "best.safetensors"), test_limit=3))
    assert best.count == 3


def test_commands_skip_damaged_test_images(written, tmp_path, caplog):
    path = copy_of(written / "folder", tmp_path / "data")
    (path / "val" / "n00000001" / "n00000001_0.JPEG").write_bytes(b"no image")
    arguments = ["--model=torchvision:resnet18", "--weights=none", "--image_size=32"]
    arguments.append(f"--data=folder:{path}")
    with pytest.raises(UsageError, match=r"n00000001_0.JPEG .*raise --max_unreadable"):
        evaluate.main(arguments)
    evaluate.main([*arguments, "--max-unreadable=1"])
    assert "n00000001_0.JPEG" in caplog.text
    with pytest.raises(UsageError, match="preprocessing only with images from files, got data gly"):
        evaluate.main(["--model=glyphs_resnet", "--preprocessing.resize=40"])
    with pytest.raises(UsageError, match="preprocessing only with images from files, got data gly"):
        train.main(["--preprocessing.resize=40"])
    with pytest.raises(UsageError, match="evaluate_every with keep_best, got none"):
        train.main(["--keep-best"])
