"""Preprocessing of images: sizes, aspect ratios, channels, small images."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from fdda_ext.commands import evaluate, export, pretrain, train
from fdda_ext.data import Augmentation, choose_preprocessing, load_dataset
from fdda_ext.data.dataset import to_channels
from fdda_ext.deploy import load_program, load_student
from fdda_ext.engine import count_outputs, doubt_margin, input_channels
from fdda_ext.errors import UsageError
from fdda_ext.image_size import height_and_width, parse_image_size, show_image_size
from fdda_ext.methods import METHODS, Problem, build_method
from fdda_ext.methods.distillation import ImageSampler
from fdda_ext.models import open_model
from fdda_ext.preprocessing import Preprocessing, PreprocessingConfig
from fdda_ext.quantizing import with_views

# ---- sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["32x64", "32X64", "32 x 64", "[32,64]", [32, 64], (32, 64)])
def test_all_forms_of_a_size_mean_height_times_width(written):
    assert parse_image_size(written) == (32, 64)
    assert show_image_size((32, 64)) == "32x64"


@pytest.mark.parametrize("written", [48, "48", "48x48", [48, 48], (48,)])
def test_a_square_is_one_number(written):
    assert parse_image_size(written) == 48
    assert height_and_width(48) == (48, 48)


@pytest.mark.parametrize("written", ["", "x", "32x", "3.5", 3.5, [1, 2, 3], "-4", True, {}, ["a"]])
def test_other_sizes_are_refused(written):
    with pytest.raises(UsageError, match="evaluate: expected image_size to be a number or HEIGHTx"):
        parse_image_size(written, "evaluate")


def test_options_and_configuration_files_take_sizes(tmp_path):
    for written in ("32x64", "[32,64]"):
        config, text = train.parse_arguments([f"--image-size={written}"])
        assert config.image_size == (32, 64)
        (tmp_path / "config.yaml").write_text(text)
        again, stored = train.parse_arguments([f"--config={tmp_path / 'config.yaml'}"])
        assert (again.image_size, stored) == (config.image_size, text)
    square, text = train.parse_arguments(["--image-size=48"])
    assert square.image_size == 48
    assert "\nimage_size: 48\n" in text
    with pytest.raises(UsageError, match="train: expected image_size to be .*, got 32y64"):
        train.parse_arguments(["--image-size=32y64"])


# ---- preprocessing --------------------------------------------------------------------------


def test_sizes_after_resizing_equal_those_of_torchvision():
    from fdda_ext._torchvision import import_torchvision

    expected = import_torchvision().transforms.functional._compute_resized_output_size
    how = Preprocessing(keep_small=False)
    for height in range(8, 300, 11):
        for width in range(8, 500, 23):
            assert how.resized(height, width) == tuple(expected((height, width), [256]))


def test_an_image_covers_a_frame_that_is_not_square():
    how = Preprocessing(image_size=(40, 80), resize=50, keep_small=False)
    assert how.resized(40, 80) == (50, 100)
    assert how.resized(20, 40) == (50, 100)
    assert how.resized(100, 100) == (100, 100), "the width is that of the frame"
    assert how.resized(60, 400) == (50, 333), "the height is that of the frame"
    for height, width in ((8, 300), (300, 8), (33, 65), (1000, 999)):
        new_height, new_width = how.resized(height, width)
        assert new_height >= 50 and new_width >= 100
        assert new_height == 50 or new_width == 100


def test_images_are_not_enlarged_for_a_margin_unless_prescribed():
    small = Preprocessing().for_size(32)
    assert small == Preprocessing(image_size=32, resize=37)
    assert small.resized(32, 32) == (32, 32)
    assert small.resized(35, 50) == (35, 50), "between crop and resize: unchanged"
    assert small.resized(16, 24) == (32, 48), "enlarged to the crop"
    assert small.resized(48, 74) == (37, 57), "made smaller"
    oblong = Preprocessing().for_size("20x400")
    assert oblong == Preprocessing(image_size=(20, 400), resize=23)
    assert oblong.resized(20, 400) == (20, 400)
    published = Preprocessing(keep_small=False)
    assert published.resized(224, 224) == (256, 256)
    assert published.for_size(224) == published
    assert published.for_size(160).resized(160, 160) == (160, 160)
    assert Preprocessing().resized(224, 224) == (224, 224)
    asked = PreprocessingConfig(resize=37).apply(Preprocessing(), 32)
    assert asked.resized(32, 32) == (37, 37), "an explicit resize wins"
    assert asked.for_channels(1).without_margin.resized(32, 32) == (32, 32)


def test_describe_tells_how_images_are_prepared():
    def said(how, stored=None):
        return how.describe(stored).partition(", mean")[0]

    small, oblong = (Preprocessing().for_size(size) for size in (32, "32x64"))
    assert said(Preprocessing()) == "resize 256 bilinear, crop 224"
    assert said(small, 32) == "32x32 as they are"
    assert said(small, (34, 60)) == "34x60 as they are, crop 32"
    assert said(small, 28) == "28x28, resize 32x32 bilinear"
    assert said(small, (60, 90)) == "60x90, resize 37x55 bilinear, crop 32"
    assert said(PreprocessingConfig(resize=37).apply(Preprocessing(), 32), 32) == (
        "32x32, resize 37x37 bilinear, crop 32"
    )
    assert said(oblong) == "resize 37 bilinear, crop 32x64"
    assert said(oblong, (32, 64)) == "32x64 as they are"


def test_preprocessing_of_old_files_does_not_change():
    stored = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "resize": 37}
    old = Preprocessing.from_dict({**stored, "interpolation": "bilinear"})
    assert old.resized(32, 32) == (37, 37)
    for how in (old, Preprocessing().for_size("32x64").for_channels(4)):
        assert Preprocessing.from_dict(how.to_dict()) == how


def test_preprocessing_of_other_channels():
    gray, rgba = (Preprocessing().for_channels(n) for n in (1, 4))
    assert gray.mean == pytest.approx((0.449,), abs=1e-3)
    assert rgba.mean == pytest.approx((0.485, 0.456, 0.406, 0.449), abs=1e-3)
    assert (gray.channels, rgba.channels, rgba.for_channels(3)) == (1, 4, Preprocessing())
    with pytest.raises(UsageError, match=r"1 \(gray\), 3 \(RGB\) or 4 \(RGBA\) channels, got 2"):
        Preprocessing().for_channels(2)
    with pytest.raises(UsageError, match=r"each of the 1 channel\(s\) .* got \[0.5, 0.5, 0.5\]"):
        PreprocessingConfig(mean=[0.5] * 3).apply(gray, None)


def noisy(size, mode="RGB"):
    image = Image.effect_noise(size, 90)
    return Image.merge(mode, [image.rotate(90 * i) for i in range(len(mode))])


def write_folder(path, sizes, mode="RGB"):
    for split in ("train", "val"):
        for label in "ab":
            (path / split / label).mkdir(parents=True)
            for number, size in enumerate(sizes):
                noisy(size, mode).save(path / split / label / f"{number}.png")
    return f"folder:{path}"


def test_small_images_of_one_size_are_not_resized_by_default(tmp_path):
    spec = write_folder(tmp_path, [(32, 20)] * 3)  # Pillow's sizes are (width, height)
    dataset = load_dataset(spec, "test")
    assert dataset.stored_size == (20, 32)

    def chosen(default, image_size=None, **config):
        return choose_preprocessing(
            dataset, default, PreprocessingConfig(**config), image_size=image_size, channels=3
        )

    own = chosen(Preprocessing())
    assert (own.image_size, own.resize) == ((20, 32), 23)
    prepared = load_dataset(spec, "test", preprocessing=own)
    raw = torch.tensor(list(Image.open(dataset.name(0)).tobytes()), dtype=torch.uint8)
    assert torch.equal(prepared.pixels(0), raw.view(20, 32, 3).permute(2, 0, 1))
    assert chosen(Preprocessing(), 24).image_size == 24
    assert chosen(Preprocessing(keep_small=False)).image_size == 224, "the published size"
    assert chosen(Preprocessing(), resize=30).resized(20, 32) == (30, 48)


def test_large_images_and_images_of_several_sizes_have_no_stored_size(tmp_path):
    spec = write_folder(tmp_path / "several", [(32, 32), (32, 33)])
    assert load_dataset(spec, "test").stored_size is None
    spec = write_folder(tmp_path / "large", [(120, 120)] * 2)
    assert load_dataset(spec, "test").stored_size is None
    spec = write_folder(tmp_path / "damaged", [(32, 32)] * 2)
    (tmp_path / "damaged" / "val" / "a" / "0.png").write_bytes(b"no image")
    assert load_dataset(spec, "test").stored_size == 32


class BrightBorder(nn.Module):
    """A network with class 1 for images with a bright first column, which a crop removes."""

    def forward(self, x):
        bright = x[:, :, :, 0].mean((1, 2)) - x.mean((1, 2, 3))
        return torch.stack([torch.full_like(bright, 0.1), bright], 1)


def test_a_margin_that_changes_answers_gives_a_warning(tmp_path):
    for split in ("train", "val"):
        for label in range(2):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for number in range(8):
                image = Image.new("RGB", (32, 32), (90, 90, 90))
                image.paste((90 + 100 * label,) * 3, (0, 0, 1, 32))
                image.save(tmp_path / split / str(label) / f"{number}.png")

    def doubt(limit=None, **config):
        how = PreprocessingConfig(**config).apply(Preprocessing(), 32)
        spec = f"folder:{tmp_path}"
        data = load_dataset(spec, "test", preprocessing=how, limit=limit)
        return doubt_margin(BrightBorder(), data)

    assert doubt() is None
    found = doubt(resize=40)
    assert "changes 8 of 16 predictions of the float network: 8 are correct" in found
    assert "and 16 without enlarging; --preprocessing.resize=32 turns enlarging off" in found
    assert "4 of 8 predictions" in doubt(resize=40, limit=8)
    assert doubt_margin(BrightBorder(), load_dataset("glyphs", "test")) is None


def test_images_that_are_only_made_smaller_have_no_margin(tmp_path):
    spec = write_folder(tmp_path, [(80, 60)] * 4)
    how = Preprocessing(image_size=32, resize=60, keep_small=False)
    assert load_dataset(spec, "test", preprocessing=how).pixels_without_margin(0) is None


# ---- channels -------------------------------------------------------------------------------


def test_conversion_to_gray_and_rgba_equals_that_of_pillow():
    image = noisy((30, 20))
    pixels = torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(20, 30, 3).permute(2, 0, 1)
    for channels, mode in ((1, "L"), (4, "RGBA")):
        raw = torch.tensor(list(image.convert(mode).tobytes()), dtype=torch.uint8)
        expected = raw.view(20, 30, channels).permute(2, 0, 1)
        assert torch.equal(to_channels(pixels, channels), expected)
        close = to_channels(pixels / 255, channels)
        torch.testing.assert_close(close, expected / 255, atol=0.5 / 255, rtol=0)
    assert torch.equal(to_channels(pixels[:1], 3), pixels[:1].expand(3, -1, -1))


@pytest.mark.parametrize("spec", ["glyphs", "digits", "folder"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_source_gives_every_number_of_channels_and_shape(tmp_path, spec, channels):
    if spec == "folder":
        spec = write_folder(tmp_path, [(50, 40)] * 2)
    data = load_dataset(spec, "test", image_size="24x40", channels=channels)
    assert (data.channels, data.image_size) == (channels, (24, 40))
    images, _ = data.images([0, 1])
    assert images.shape == (2, channels, 24, 40)
    assert images.std() > 0.2
    assert load_dataset(spec, "test", image_size=24).channels == 3


def test_opacity_is_read_from_files(tmp_path):
    spec = write_folder(tmp_path, [(16, 16)] * 2, "RGBA")
    data = load_dataset(spec, "test", image_size=16, channels=4)
    raw = torch.tensor(list(Image.open(data.name(1)).tobytes()), dtype=torch.uint8)
    assert torch.equal(data.pixels(1), raw.view(16, 16, 4).permute(2, 0, 1))


def network_of(channels):
    """Return the class of a network that takes images with ``channels`` channels."""

    class Network(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.late = nn.Conv2d(7, 2, 1)  # created first, but never called
            self.features = nn.Sequential(
                *(nn.Conv2d(channels, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
                *(nn.Conv2d(8, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes)),
            )

        def forward(self, x):
            return self.features(x)

    return Network


class TwoInputs(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = network_of(3)(num_classes)

    def forward(self, x, more):
        return self.body(x) + more


class TwoOutputs(TwoInputs):
    def forward(self, x):
        return self.body(x), x


class Named(TwoInputs):
    def forward(self, x):
        return {"out": self.body(x), "aux": x}


class Map(TwoInputs):
    def forward(self, x):
        return x


class Fixed(nn.Module):
    """A network whose last layer needs images of 64x64."""

    def __init__(self, num_classes):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4 * 16 * 16, num_classes)

    def forward(self, x):
        return self.head(self.features(x).flatten(1))


@pytest.fixture
def networks(monkeypatch):
    """A user's module ``nets`` with networks."""
    module = ModuleType("nets")
    module.Gray, module.Colour, module.Four = network_of(1), network_of(3), network_of(4)
    module.Two, module.TwoInputs, module.TwoOutputs = network_of(2), TwoInputs, TwoOutputs
    module.Named, module.Map, module.Fixed = Named, Map, Fixed
    monkeypatch.setitem(sys.modules, "nets", module)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels_are_those_of_the_first_convolution_that_runs(channels):
    network = network_of(channels)(5).train()
    assert input_channels(network, 32, "train") == channels
    assert network.training
    assert not any(module._forward_pre_hooks for module in network.modules())
    before = nn.Sequential(nn.BatchNorm2d(channels), network.features)
    assert input_channels(before, (16, 24), "train") == channels
    unshuffled = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 1))
    assert input_channels(unshuffled, 32, "train") == 3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("TwoInputs", r"model to take one image tensor, got forward\(x, more\) with 2 inputs"),
        ("TwoOutputs", r"one tensor of logits \[N, classes\], got 2 outputs \(tuple\)"),
        ("Named", r"one tensor of logits .*, got 2 outputs \(dict: out, aux\)"),
        ("Map", r"one tensor of logits .*, got one of shape \[\d, 3, 32, 32\] for \d images?;"),
        ("Two", r"1 \(gray\), 3 \(RGB\) or 4 \(RGBA\) channels, got a first convolution with 2"),
    ],
)
def test_networks_with_other_inputs_or_outputs_are_refused(networks, tmp_path, model, message):
    arguments = [f"--model=module:nets.{model}", "--data=digits"]
    commands = {
        "train": lambda: train.main([*arguments, "--weights=none", f"--out={tmp_path}/a"]),
        "evaluate": lambda: evaluate.main([*arguments, "--weights=none"]),
        "pretrain": lambda: pretrain.main([*arguments, f"--out={tmp_path}/b"]),
    }
    for name, command in commands.items():
        with pytest.raises(UsageError, match=message) as error:
            command()
        assert str(error.value).startswith(f"{name}: ")


def test_arguments_with_defaults_are_not_counted_as_inputs():
    class Optional(nn.Module):
        def forward(self, x, mask=None, *, scale=1):
            return x.flatten(1)

    assert count_outputs(Optional(), torch.zeros(2, 3, 4, 5), "train") == 60


def problem_of(model, size, training_pixels=None, augmented_images=None):
    config = train.TrainConfig(
        model=f"module:nets.{model}",
        weights="none",
        data="digits",
        image_size=size,
        training_pixels=training_pixels,
        augmented_images=augmented_images,
        baselines=[],
    )
    return train.build_problem(config)[0]


def test_smaller_images_keep_the_ratio_and_multiples_of_32(networks):
    large = problem_of("Colour", "96x192")
    for pixels, size in ((96 * 192, (96, 192)), (9000, (64, 128)), (1, (32, 32))):
        problem = problem_of("Colour", "96x192", pixels)
        assert tuple(problem.images.shape[2:]) == size
        assert torch.equal(problem.full_size_images, large.images)
        assert len(problem.with_images(5).images) == len(problem.with_images(5).full_size_images)
        expected = F.interpolate(large.images, size, mode="area")
        torch.testing.assert_close(problem.images, expected)
    # Calibration images in a student step are crops of the large images.
    sampler = ImageSampler(problem, 4, problem.random())
    assert tuple(sampler.next()[0].shape) == (4, 3, 32, 32)


def test_random_views_complete_the_calibration_images(networks):
    real = problem_of("Colour", 64)
    problem = problem_of("Colour", 64, 32 * 32, augmented_images=39)  # ten images
    assert problem.views == 3
    assert problem.images.shape == (30, 3, 32, 32)
    assert torch.equal(problem.full_size_images[::3], real.images)
    assert problem.labels.tolist() == real.labels.repeat_interleave(3).tolist()
    again = problem_of("Colour", 64, 32 * 32, augmented_images=39)
    assert torch.equal(again.images, problem.images)
    for few in (5, 10, 19):
        assert torch.equal(problem_of("Colour", 64, augmented_images=few).images, real.images)


@pytest.mark.parametrize("flip", [False, True])
def test_views_are_crops_of_at_least_half_of_the_image_in_its_colours(networks, flip):
    problem = problem_of("Colour", 64)
    rising = torch.linspace(0, 1, 64).expand(2, 3, 64, 64)
    augmentation = Augmentation(crop_scale=(0.08, 1.0), crop_ratio=(1.0, 1.0), flip=flip)
    problem = replace(
        problem, images=rising, labels=torch.tensor([0, 1]), augmentation=augmentation
    )
    views = with_views(problem, 200).images
    assert len(views) == 200
    range_of_columns = views[:, 0, 0, -1] - views[:, 0, 0, 0]
    assert 0.5**0.5 - 0.05 < range_of_columns.abs().min() < 0.8
    assert range_of_columns.abs().max() <= 1
    assert bool((range_of_columns < 0).any()) == flip


def test_a_network_for_one_size_is_trained_with_it(networks, caplog):
    assert tuple(problem_of("Fixed", 64, 32 * 32).images.shape[2:]) == (64, 64)
    assert "takes 32x32 images, for training_pixels 1024, got one that does not" in caplog.text


GENERATORS = ("fdda", "gdfq", "qimera", "zaq")
OPTIMISED = ("zeroq", "dsg", "di", "adi")


CASES = [(name, "Gray") for name in METHODS]
CASES += [(name, "Colour") for name in (*GENERATORS, *OPTIMISED)]
CASES += [(name, "Smaller") for name in METHODS]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_every_method_takes_gray_oblong_and_smaller_images(networks, name, model):
    problem: Problem
    if model == "Smaller":
        problem = problem_of("Colour", "64x128", 32 * 64)
        assert tuple(problem.full_size_images.shape[1:]) == (3, 64, 128)
    else:
        problem = problem_of(model, 28 if model == "Gray" else "32x64")
    shape = (1, 28, 28) if model == "Gray" else (3, 32, 64)
    assert tuple(problem.images.shape[1:]) == shape
    assert problem.pixel_range is not None
    assert problem.pixel_range[0].shape == (shape[0], 1, 1)
    with torch.no_grad():  # FDDA needs an image that is classified correctly
        label = int(problem.teacher(problem.images[:1]).argmax())
    labels = problem.labels.clone()
    labels[[0, label]] = labels[[label, 0]]
    problem = replace(problem, labels=labels)
    small: dict[str, list[str]] = {name: ["generator.channels=4", "batch=4"] for name in GENERATORS}
    small |= {name: ["synthesis.images=4", "synthesis.batch=2"] for name in OPTIMISED}
    small["dsg"] += ["noise_images=4"]
    options = [f"--settings.{name}.{option}" for option in small.get(name, [])]
    config, _ = train.parse_arguments([f"--method={name}", *options])
    method = build_method(name, problem, config.settings.scaled(2e-4))
    for iteration in range(min(method.iterations, 6)):
        method.step(iteration)
    with torch.no_grad():
        assert method.student.eval()(problem.full_size_images).isfinite().all()
    generator = getattr(method, "generator", None)
    if generator is not None:
        labels = torch.zeros(3, dtype=torch.int64)
        made = generator.sample(labels, torch.Generator().manual_seed(0))
        assert tuple(made.shape[1:]) == shape


@pytest.mark.parametrize(
    ("model", "size", "pixels"),
    [
        *(("Gray", "28", "null"), ("Colour", "32x64", "null"), ("Four", "20x36", "null")),
        ("Colour", "64x128", 32 * 64),
    ],
)
def test_a_complete_run_on_gray_oblong_rgba_and_smaller_images(
    networks, tmp_path, model, size, pixels, capsys
):
    out = tmp_path / "run"
    train.main(
        [
            *(f"--model=module:nets.{model}", "--weights=none", "--data=digits", f"--out={out}"),
            *(f"--image-size={size}", "--images-per-class=4", "--baselines=[]", "--test-limit=40"),
            *("--schedule-share=0.002", "--settings.fdda.generator.channels=4"),
            f"--training-pixels={pixels}",
        ]
    )
    assert "no report" not in capsys.readouterr().out
    assert (out / "report.html").exists()
    export.main([f"--run={out}"])
    program, (student, recipe) = load_program(out / "model.int4.safetensors"), load_student(out)
    channels = {"Gray": 1, "Colour": 3, "Four": 4}[model]
    height, width = height_and_width(parse_image_size(size))
    assert program.image.shape == (channels, height, width)
    assert recipe["image_size"] == (height if height == width else [height, width])
    data = load_dataset("digits", "test", image_size=size, channels=channels)
    images, _ = data.images(range(30))
    pixels = torch.randint(0, 256, (5, channels, height, width), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(program(images), student(images))
        assert torch.equal(program(pixels), student(data.normalise(pixels)))
    capsys.readouterr()
    texts = []
    for source in (out, out / "model.int4.safetensors"):
        evaluate.main([f"--run={source}", "--data=digits", "--test-limit=40"])
        texts.append(capsys.readouterr().out.split("top-1")[1].split())
    assert texts[0] == texts[1]
    train.main([f"--out={out}", "--resume"])  # the image size is read from the folder


def test_a_run_on_gray_files(networks, tmp_path, capsys):
    spec = write_folder(tmp_path / "data", [(24, 16)] * 3)
    out = tmp_path / "run"
    train.main(
        [
            *("--model=module:nets.Gray", "--weights=none", f"--data={spec}", f"--out={out}"),
            *("--method=mse", "--baselines=[]", "--no-report", "--preprocessing.mean=[0.3]"),
        ]
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert "images: 16x24 as they are, mean 0.3" in printed
    student, recipe = load_student(out)
    assert (recipe["image_size"], recipe["channels"]) == ([16, 24], 1)
    assert evaluate.run(evaluate.EvaluateConfig(run=str(out))).count == 6
    with pytest.raises(UsageError, match=r"for each of the 1 channel\(s\)"):
        train.main(
            [
                *("--model=module:nets.Gray", "--weights=none", f"--data={spec}"),
                *(f"--out={tmp_path / 'x'}", "--preprocessing.mean=[0.3,0.3,0.3]"),
            ]
        )


def test_pretraining_on_oblong_gray_images(networks, tmp_path):
    arguments = ["--model=module:nets.Gray", "--data=digits", "--image-size=12x20", "--epochs=1"]
    pretrain.main([*arguments, f"--out={tmp_path}", "--images=200", "--batch=50"])
    (file,) = tmp_path.glob("*.safetensors")
    opened = open_model("module:nets.Gray", weights=str(file), num_classes=10)
    assert count_outputs(opened.network, torch.zeros(1, 1, 12, 20), "train") == 10
