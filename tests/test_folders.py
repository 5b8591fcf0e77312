"""Where images come from: folders with links and tying names, data sets that are indexed, streams that are copied."""

import gzip
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset

from timm_vix.data import datasets
from timm_vix.data.datasets import Sample, as_folder
from timm_vix.data.decoding import open_image
from timm_vix.data.folders import find_images, find_unlabelled, list_images, name_of
from timm_vix.data.images import Images
from timm_vix.train.finetune import finetune

load_digits = pytest.importorskip("sklearn.datasets", reason="the images are scikit-learn's digits").load_digits


@pytest.mark.parametrize(
    "data_dir, name",
    [
        (".", "photos"), ("..", "images"), ("../../scans", "scans"), ("deeper/", "deeper"),
        ("torch/cifar10", "torch/cifar10"), ("hfds/uoft-cs/cifar10", "hfds/uoft-cs/cifar10"),
    ],
)  # fmt: skip
def test_images_have_a_name_that_no_path_is_needed_for(data_dir, name, tmp_path, monkeypatch):
    (tmp_path / "images" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "images" / "photos")
    assert name_of(data_dir) == name


def test_links_to_folders_are_followed_as_timm_follows_them(digits, tmp_path):
    """A folder of links, and links inside of class folders."""
    (tmp_path / "linked").mkdir()
    for name in ("digit0", "digit1"):
        (tmp_path / "linked" / name).symlink_to(digits / name)
    (tmp_path / "linked" / "digit2").mkdir()
    shutil.copy(digits / "digit2" / "0.png", tmp_path / "linked" / "digit2" / "own.png")
    theirs = ImageDataset(str(tmp_path / "linked")).reader
    items, classes = list_images(tmp_path / "linked")
    assert [(str(path), label) for path, label in items] == theirs.samples
    assert len(items) == 41 and classes == list(theirs.class_to_idx)
    (tmp_path / "linked" / "digit2" / "more").symlink_to(digits / "digit2")
    items, _ = list_images(tmp_path / "linked")
    assert [label for _, label in items] == [0] * 20 + [1] * 20 + [2] * 21
    assert len(find_unlabelled(tmp_path / "linked")) == 61


def test_a_loop_of_links_ends_and_counts_no_image_twice(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    (tmp_path / "data" / "digit1" / "again").symlink_to(tmp_path / "data" / "digit1")
    items, _ = list_images(tmp_path / "data")
    assert [label for _, label in items] == [0] * 20 + [1] * 20 + [2] * 20
    assert len(find_unlabelled(tmp_path / "data")) == 60


@pytest.mark.parametrize("order", [1, -1])
def test_names_that_tie_have_one_order_whatever_the_file_system_says(order, tmp_path):
    classes = ["".join(letters) for letters in itertools.product("cC", "aA", "tT")]
    files = ["00000001.png", "0001.png", "001.png", "01.png", "1.PNG", "1.png", "2.png"]
    for name in classes[::order]:
        (tmp_path / name).mkdir()
        for file in files[::order]:
            Image.new("L", (4, 4)).save(tmp_path / name / file, format="png")
    items, names = list_images(tmp_path)
    assert names == sorted(classes)
    assert [path.name for path, label in items if label == 3] == files
    assert [path.name for path, _ in find_unlabelled(tmp_path / "cat")] == files


@pytest.fixture(scope="module")
def mnist(tmp_path_factory) -> Path:
    """Handwritten digits in the files of MNIST: 60 for training, 20 for validation."""
    root = tmp_path_factory.mktemp("mnist")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    data = load_digits()
    pixels = np.stack(
        [np.array(Image.fromarray((i * 15.9).astype(np.uint8)).resize((28, 28))) for i in data.images[:80]]
    )
    for name, part in (("train", slice(0, 60)), ("t10k", slice(60, 80))):
        for kind, values in (("images-idx3", pixels[part]), ("labels-idx1", data.target[part].astype(np.uint8))):
            head = [0, 0, 8, values.ndim, *(byte for size in values.shape for byte in size.to_bytes(4, "big"))]
            content = bytes(head) + values.tobytes()
            (raw / f"{name}-{kind}-ubyte").write_bytes(content)
            (raw / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    np.save(root / "pixels.npy", pixels)
    return root


def test_a_data_set_that_can_be_indexed_is_used_as_it_is(mnist, tmp_path):
    train, val, classes = find_images("torch/mnist", data_root=str(mnist))
    assert len(classes) == 10 and classes[:3] == ["0 - zero", "1 - one", "2 - two"]
    assert [label for _, label in train + val] == load_digits().target[:80].tolist()
    for (source, _), expected in zip(train + val, np.load(mnist / "pixels.npy"), strict=True):
        assert isinstance(source, Sample) and np.array_equal(np.asarray(open_image(source)), expected)
    assert as_folder("torch/mnist", str(mnist), tmp_path) == "torch/mnist" and not list(tmp_path.iterdir())

    settings = dict(data_dir="torch/mnist", data_root=str(mnist), img_size=28, in_chans=1, batch_size=10, threads=1)
    settings.update(model="vit_tiny_patch16_224", model_kwargs=dict(patch_size=7, embed_dim=32, depth=1, num_heads=2))
    model, _ = finetune(**settings, epochs=2, workers=2, out=str(tmp_path / "run"))
    assert not [path for path in tmp_path.rglob("*.png") if path.name != "curve.png"]
    again, _ = finetune(**settings, epochs=2, out=str(tmp_path / "again"))
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    card = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert "`torch/mnist` (10 classes, 60 images; validation: 20)" in card


def test_other_pixels_of_a_data_set_are_another_checksum(mnist, tmp_path):
    shutil.copytree(mnist, tmp_path / "copy")
    file = tmp_path / "copy" / "MNIST" / "raw" / "train-images-idx3-ubyte"

    def checksum(root):
        items, _, classes = find_images("torch/mnist", data_root=str(root))
        return Images(items, classes, 1, lambda image: image, None, 0, lazy=True).checksum()

    assert checksum(tmp_path / "copy") == checksum(mnist)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert checksum(tmp_path / "copy") != checksum(mnist)


def test_splits_of_a_folder_of_torchvision(digits, tmp_path, capsys):
    """torchvision counts the classes of each split by itself; timm takes the root for a split without a folder."""
    train, val, classes = find_images("torch/image_folder", data_root=str(digits))
    assert "a share of the training images is held out" in capsys.readouterr().out
    assert (len(train), len(val), classes) == (48, 12, ["digit0", "digit1", "digit2"])
    assert not {path for path, _ in train} & {path for path, _ in val}
    (tmp_path / "own").mkdir()
    shutil.copytree(digits, tmp_path / "own" / "train")
    shutil.copytree(digits / "digit2", tmp_path / "own" / "test" / "digit2")
    train, val, _ = find_images("torch/image_folder", data_root=str(tmp_path / "own"))
    assert (len(train), [label for _, label in val]) == (60, [2] * 20)
    assert {path.parent for path, _ in val} == {tmp_path / "own" / "test" / "digit2"}


@pytest.mark.parametrize(
    "name, words",
    [
        ("torch/cifar10", "data_dir='torch/cifar10' cannot be read by timm's dataset factory: train: "),
        ("torch/nothing", "data_dir='torch/nothing' cannot be read by timm's dataset factory: train: "),
    ],
)
def test_a_data_set_that_is_not_there_is_one_line(name, words, tmp_path):
    with pytest.raises(ValueError) as caught:
        find_images(name, data_root=str(tmp_path / "absent"))
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_stream_cannot_train_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "create_dataset", lambda name, root, split: iter([(PIXELS[0], 0)]))
    with pytest.raises(ValueError, match="data_dir='wds/some' can only be read in order; allowed is a data set that"):
        find_images("wds/some")


def test_a_stopped_copy_continues(tmp_path, monkeypatch):
    splits = {"train": [(PIXELS[i % 2], i % 2) for i in range(8)], "validation": [(PIXELS[2], 0), (PIXELS[3], 1)]}
    monkeypatch.setattr(datasets, "create_dataset", lambda name, root, split: splits[split])
    folder = Path(as_folder("tfds/some", str(tmp_path / "root"), tmp_path / "cache"))
    train, _, _ = find_images(str(folder))
    victim, kept = train[3][0], train[4][0].stat().st_mtime_ns
    victim.unlink()
    (folder / "complete").unlink()
    assert as_folder("tfds/some", str(tmp_path / "root"), tmp_path / "cache") == str(folder)
    assert Image.open(victim).getpixel((0, 0))[0] == 0 and train[4][0].stat().st_mtime_ns == kept
    other = as_folder("tfds/some", str(tmp_path / "elsewhere"), tmp_path / "cache")
    assert other != str(folder) and Path(other).name == folder.name == "tfds_some"


def test_photographs_of_a_stream_are_upright(tmp_path, monkeypatch) -> None:
    """As those of a folder are: PNG files don't keep how the camera was turned."""
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter to the right
    photo = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 4)).save(photo, exif=exif)
    with Image.open(photo) as image:
        samples = [(image.convert("RGB"), 0), (PIXELS[1], 1)]
    monkeypatch.setattr(datasets, "create_dataset", lambda name, root, split: samples if split == "train" else None)
    folder = Path(as_folder("wds/some", None, tmp_path / "cache"))
    (first, *_) = sorted(folder.rglob("*.png"))
    with Image.open(first) as image:
        assert image.size == (4, 8)


PIXELS = {label: Image.new("RGB", (4, 4), (40 * label, 0, 0)) for label in range(4)}


@pytest.mark.parametrize("name, found", [("valid", [2, 3]), ("unsupervised", None)])
def test_splits_by_other_names(name, found, tmp_path, monkeypatch, capsys) -> None:
    splits = {"train": [(PIXELS[i % 2], i % 2) for i in range(10)], name: [(PIXELS[2], 0), (PIXELS[3], 1)]}
    monkeypatch.setattr(datasets, "create_dataset", lambda name, root, split: splits[split])
    folder = Path(as_folder("tfds/some", None, tmp_path))
    monkeypatch.setattr(datasets, "create_dataset", None)
    assert as_folder("tfds/some", None, tmp_path) == str(folder), "it is read once"
    if found is None:
        assert not (folder / "val").exists() and "held out" in capsys.readouterr().out
        assert [len(items) for items in find_images(str(folder))[:2]] == [8, 2]
    else:
        colours = [Image.open(path).getpixel((0, 0))[0] // 40 for path, _ in find_images(str(folder))[1]]
        assert colours == found


@pytest.mark.parametrize(
    "bad, words", [((PIXELS[0], None), "TypeError: int()"), (RuntimeError("no\nroute"), "RuntimeError: no route")]
)
def test_what_a_reader_raises_on_the_way_is_one_line(bad, words, tmp_path, monkeypatch) -> None:
    def images():
        yield PIXELS[0], 0
        if isinstance(bad, Exception):
            raise bad
        yield bad

    monkeypatch.setattr(datasets, "create_dataset", lambda name, root, split: images())
    with pytest.raises(ValueError) as caught:
        as_folder("wds/some", None, tmp_path)
    message = str(caught.value)
    assert message.startswith("data_dir='wds/some' cannot be read by timm's dataset factory: ") and words in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("complete"))


def test_columns_of_a_data_set_of_the_hub_have_names_of_their_own(digits, tmp_path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's library reads such a data set")
    names, column = ["dog", "cat"], datasets.ClassLabel
    features = dict(img=datasets.Image(), fine=column(names=names), coarse=column(names=["animal"]))
    for split, numbers in (("train", range(8)), ("valid", range(8, 12))):
        images = [dict(bytes=(digits / f"digit{i % 2}" / f"{i}.png").read_bytes()) for i in numbers]
        rows = dict(img=images, fine=[i % 2 for i in numbers], coarse=[0] * len(numbers))
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        (tmp_path / "own").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "own" / f"{split}-00000-of-00001.parquet")
    train, val, classes = find_images(f"hfds/{tmp_path / 'own'}", data_root=str(tmp_path / "hub"))
    assert ([label for _, label in train], len(val), classes) == ([0, 1] * 4, 4, names)
    with open_image(val[-1][0]) as mine, Image.open(digits / "digit1" / "11.png") as theirs:
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
