"""Data sets: determinism, held-out typefaces, splits, folders, augmentation, bad input."""

import importlib.util

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fdda_ext._torchvision import import_torchvision
from fdda_ext.data import Augmentation, augment, calibration_set, load_dataset
from fdda_ext.data.glyphs import (
    CHARACTERS,
    TEST_FACES,
    TRAIN_FACES,
    VALIDATION_FACES,
    _glyph,
    faces_of,
)
from fdda_ext.errors import UsageError


def test_glyphs_have_at_least_sixty_different_classes_without_look_alikes():
    assert len(set(CHARACTERS)) == len(CHARACTERS) >= 60
    for group in ("oO0", "lI1i", "cC", "kK", "pP", "sS", "uU", "vV", "wW", "xX", "zZ", "9q"):
        assert sum(character in CHARACTERS for character in group) <= 1, group


def test_every_face_has_its_characters_and_no_face_is_in_two_kinds_of_split():
    every = (*TRAIN_FACES, *VALIDATION_FACES, *TEST_FACES)
    assert len(set(every)) == len(every)
    missing = {face: _glyph(face, "\u0378").tobytes() for face in every}
    allowed = {"validation": VALIDATION_FACES, "test": TEST_FACES}
    for split in ("train", "calibration", "validation", "test"):
        for character in CHARACTERS:
            faces = faces_of(character, split)
            assert len(faces) >= 3
            assert set(faces) <= set(allowed.get(split, TRAIN_FACES))
            for face in faces:  # a font draws a box for a character that it lacks
                assert _glyph(face, character).tobytes() != missing[face], (face, character)
                assert max(_glyph(face, character).getextrema()) > 200


def test_glyph_image_depends_only_on_split_seed_and_index():
    one, two = load_dataset("glyphs", "train"), load_dataset("glyphs", "train")
    later = two[1007][0]
    assert torch.equal(one[5][0], two[5][0])
    assert torch.equal(one[1007][0], later)
    assert not torch.equal(one[5][0], load_dataset("glyphs", "train", seed=1)[5][0])
    assert not torch.equal(one[5][0], load_dataset("glyphs", "calibration")[5][0])
    for split in ("validation", "test"):  # these do not depend on the seed
        assert torch.equal(
            load_dataset("glyphs", split)[9][0], load_dataset("glyphs", split, seed=3)[9][0]
        )


def test_glyphs_are_normalised_balanced_and_of_any_size():
    data = load_dataset("glyphs", "test")
    images = torch.stack([data[i][0] for i in range(0, len(data), 37)])
    assert images.dtype == torch.float32
    assert abs(float(images.mean())) < 0.15
    assert 0.8 < float(images.std()) < 1.4
    assert len(data) == 150 * data.num_classes
    assert [data[i][1] for i in range(data.num_classes)] == list(range(data.num_classes))
    assert load_dataset("glyphs", "test", image_size=47)[0][0].shape == (3, 47, 47)
    with pytest.raises(IndexError):
        data[len(data)]


def test_digits_splits_do_not_overlap():
    splits = ("train", "calibration", "validation", "test")
    assert sum(len(load_dataset("digits", split)) for split in splits) == 1797
    images, labels = calibration_set("digits", 2)
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [k for k in range(10) for _ in range(2)]


def test_calibration_set_is_one_of_each_class_chosen_by_the_seed():
    images, labels = calibration_set("glyphs", seed=0)
    again, _ = calibration_set("glyphs", seed=0)
    other, _ = calibration_set("glyphs", seed=1)
    assert labels.tolist() == list(range(len(CHARACTERS)))
    assert labels.dtype == torch.int64
    assert torch.equal(images, again)
    assert not torch.equal(images, other)


def make_folder(path, classes=("cat", "dog"), splits=("train", "val"), images=3):
    for split in splits:
        for number, name in enumerate(classes):
            (path / split / name).mkdir(parents=True)
            for i in range(images):
                Image.new("RGB", (40, 30), (50 * number, 10 * i, 90)).save(
                    path / split / name / f"{i}.png"
                )
    return path


def test_image_folder(tmp_path):
    make_folder(tmp_path)
    data = load_dataset(f"folder:{tmp_path}", "test", image_size=16)
    assert (len(data), data.num_classes, data.class_names) == (6, 2, ("cat", "dog"))
    image, label = data[5]
    assert label == 1
    expected = (torch.tensor([50, 20, 90]) / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 16, 16))
    images, labels = calibration_set(f"folder:{tmp_path}", 2, image_size=16)
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    limited = load_dataset(f"folder:{tmp_path}", "test", image_size=16, limit=2)
    assert [limited[i][1] for i in range(len(limited))] == [0, 1]


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA"])
def test_images_of_any_eight_bit_mode_become_rgb(tmp_path, mode):
    make_folder(tmp_path)
    path = tmp_path / "val" / "cat" / "0.png"
    path.unlink()
    image = Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode)
    image.save(path.with_suffix(".tif"))
    white = load_dataset(f"folder:{tmp_path}", "test", image_size=16)
    index = [white.name(i) for i in range(len(white))].index(str(path.with_suffix(".tif")))
    expected = (1 - torch.tensor(white.mean)) / torch.tensor(white.std)
    torch.testing.assert_close(white[index][0], expected[:, None, None].expand(3, 16, 16))


@pytest.mark.parametrize("limit", [None, 20])
def test_images_returns_the_single_images_in_the_given_order(limit):
    whole = load_dataset("glyphs", "calibration")
    data = load_dataset("glyphs", "calibration", limit=limit)
    images, labels = data.images([11, 3, 3])
    assert images.shape == (3, data.channels, 32, 32)
    assert labels.dtype == torch.int64
    for image, label, index in zip(images, labels, (11, 3, 3), strict=True):
        assert torch.equal(image, data[index][0])
        assert label == data[index][1] == data.labels[index]
    assert len(data) == len(data.labels) == (limit or len(whole))
    assert (data.num_classes, data.mean, data.std) == (whole.num_classes, whole.mean, whole.std)
    assert (data.augmentation, data.image_size) == (whole.augmentation, 32)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="which is not one"):
        load_dataset(f"folder:{tmp_path / 'absent'}", "test")
    with pytest.raises(UsageError, match="a folder val or test, got none"):
        load_dataset(f"folder:{tmp_path}", "test")
    with pytest.raises(UsageError, match="a folder validation, got none"):
        load_dataset(f"folder:{tmp_path}", "validation")
    (tmp_path / "train").mkdir()
    with pytest.raises(UsageError, match="one folder of images per class"):
        load_dataset(f"folder:{tmp_path}", "train")
    make_folder(tmp_path / "b")
    (tmp_path / "b" / "train" / "empty").mkdir()
    with pytest.raises(UsageError, match="got 0 of class empty; add images of it, or remove"):
        calibration_set(f"folder:{tmp_path / 'b'}")
    (tmp_path / "images" / "val" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="got no image .* in its 1 folders"):
        load_dataset(f"folder:{tmp_path / 'images'}", "test")
    with pytest.raises(UsageError, match="at least 4 calibration image.*got 3 of class cat"):
        calibration_set(f"folder:{make_folder(tmp_path / 'c')}", 4, image_size=16)
    make_folder(tmp_path / "d", splits=("train",))
    make_folder(tmp_path / "d", ("cat", "eel", "emu"), ("val",))
    with pytest.raises(UsageError, match="only the 2 classes of .*train, got also eel, emu"):
        load_dataset(f"folder:{tmp_path / 'd'}", "test")
    with pytest.raises(UsageError, match="1000 classes, got 2"):
        load_dataset(f"imagenet:{tmp_path / 'c'}", "test")
    Image.new("I;16", (20, 20), 9000).save(tmp_path / "c" / "val" / "cat" / "0.png")
    with pytest.raises(UsageError, match="readable image, got .*0.png .*than 8 bits a channel"):
        load_dataset(f"folder:{tmp_path / 'c'}", "test", image_size=16)[0]
    (tmp_path / "c" / "val" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="readable image, got .*0.png"):
        load_dataset(f"folder:{tmp_path / 'c'}", "test", image_size=16)[0]


def test_absent_torchvision_is_reported_with_advice(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps torchvision"):
        import_torchvision.__wrapped__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("nothing", "test"),
            "imagenet:PATH or NAME:PATH with NAME one of cifar10, .*, got nothing",
        ),
        (("folder:", "test"), "got folder:"),
        (("glyphs", "tests"), "split to be one of .*'validation', 'test'.*got tests"),
    ],
)
def test_bad_specs_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        load_dataset(*arguments)
    with pytest.raises(UsageError, match="image_size at least 8, got 4"):
        load_dataset("glyphs", "test", image_size=4)
    with pytest.raises(UsageError, match="images_per_class at least 1, got 0"):
        calibration_set("glyphs", 0)


def coordinates(count: int, size: int = 32) -> torch.Tensor:
    """Return images whose channels are the x and y coordinates, so that crops can be measured."""
    line = torch.linspace(-1 + 1 / size, 1 - 1 / size, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y, torch.zeros_like(x)]).expand(count, 3, size, size).contiguous()


def test_crops_stay_inside_and_have_the_given_area():
    random = torch.Generator().manual_seed(0)
    out = augment(coordinates(2000), Augmentation((0.25, 0.5), (0.8, 1.25), False), random)
    width = (out[:, 0, 0, -1] - out[:, 0, 0, 0]) / (2 * 31 / 32)
    height = (out[:, 1, -1, 0] - out[:, 1, 0, 0]) / (2 * 31 / 32)
    assert float(out.abs().max()) <= 1
    area, ratio = width * height, width / height
    assert 0.24 < float(area.min()) < 0.28
    assert 0.47 < float(area.max()) < 0.51
    assert float(ratio.min()) > 0.79
    assert float(ratio.max()) < 1.26


def test_full_crop_without_flip_changes_nothing_and_flip_mirrors():
    images = torch.randn(50, 3, 17, 17)
    random = torch.Generator().manual_seed(0)
    whole = Augmentation((1.0, 1.0), (1.0, 1.0), False)
    torch.testing.assert_close(augment(images, whole, random), images, atol=1e-4, rtol=0)
    flipped = augment(images, Augmentation((1.0, 1.0), (1.0, 1.0), True), random)
    mirrored = [
        bool(torch.allclose(out, image.flip(-1), atol=1e-4))
        for out, image in zip(flipped, images, strict=True)
    ]
    kept = [
        bool(torch.allclose(out, image, atol=1e-4))
        for out, image in zip(flipped, images, strict=True)
    ]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 10 < sum(mirrored) < 40


def test_same_for_batch_draws_once():
    random = torch.Generator().manual_seed(0)
    out = augment(coordinates(4), Augmentation(), random, same_for_batch=True)
    assert torch.equal(out[0], out[3])
    out = augment(coordinates(4), Augmentation(), random)
    assert not torch.equal(out[0], out[3])


def test_smaller_crops_are_means_of_samples():
    images = torch.rand(3, 2, 24, 48)
    whole = Augmentation((1.0, 1.0), (1.0, 1.0), False)
    small = augment(images, whole, torch.Generator().manual_seed(0), size=(8, 16))
    torch.testing.assert_close(small, F.avg_pool2d(images, 3), atol=1e-4, rtol=0)
    random = torch.Generator().manual_seed(0)
    assert augment(images, Augmentation(), random, size=(10, 20)).shape == (3, 2, 10, 20)


def test_bad_augmentation_is_refused():
    with pytest.raises(UsageError, match="crop_scale within"):
        Augmentation((0.0, 1.0))
    with pytest.raises(UsageError, match="crop_ratio above 0"):
        Augmentation(crop_ratio=(2.0, 1.0))
