"""Deltas of transferred models: small, equal on the original, refused where they can't be."""

import csv
import io
import os
import re
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_input_data_config, resolve_model_data_config

import timm_vix
from timm_vix.deploy.classifier import load_trained
from timm_vix.deploy.push import check_folder
from timm_vix.deploy.shipping import save_transferred
from timm_vix.train.hub import delta_card, model_card, write_hub

SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
DELTAS = Path(__file__).parents[1] / "examples" / "deltas"
SOURCE = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file of a source's weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    save_file(timm.create_model(SOURCE, **SIZES).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def transferred(tmp_path_factory, weights, digits):
    """The Hub folder of a transfer, by what its second stage trained."""

    def make(part):
        folder = tmp_path_factory.mktemp(part)
        timm_vix.transfer(
            SOURCE, str(digits), "nystrom", layers="last-1", mixer_kwargs=dict(num_landmarks=4), source_kwargs=SIZES,
            weights=weights, block_steps=2, distill_steps=1, distill_part=part, batch_size=4, device="cpu", amp="off",
            block_lr=0.01, out=str(folder),
        )  # fmt: skip
        return folder / "hub"

    return {part: make(part) for part in ("attention", "all")}


def image():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_transfer_is_a_delta_of_its_original(dtype, transferred, weights, tmp_path):
    path = tmp_path / "deltas" / "delta.safetensors"
    _, keywords = save_transferred(str(transferred["attention"]), path, weights, dtype)
    stored = load_file(path)
    assert {name.rpartition(".attn.")[0] for name in stored} == {"blocks.1"}  # of the converted layer alone
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    numbers = 4 * 32 * 32 + 4 * 32  # projections to queries, keys and values, and out of them, with biases
    assert sum(tensor.numel() for tensor in stored.values()) == numbers
    # what a reader of the card does
    model = timm.create_model(
        "vix_from_timm",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=weights, source=None, num_classes=5),
        **keywords,
    ).eval()
    before = model(x := image())
    timm_vix.load_delta(model, path)
    trained = timm.create_model(f"local-dir:{transferred['attention']}", pretrained=True).eval()
    with torch.no_grad():
        for parameter in trained.blocks[1].attn.parameters():
            parameter.copy_(parameter.to(dtype))
    assert torch.equal(model(x), trained(x)) and not torch.equal(model(x), before)


def test_the_code_of_a_card_builds_what_takes_the_delta(transferred, weights, tmp_path):
    path = tmp_path / "delta.safetensors"
    model, keywords = save_transferred(str(transferred["attention"]), path, weights)
    card = delta_card(keywords, path.stat().st_size / 1e6, {"top-1": "70.0 % of 1000 photographs"})
    assert "| top-1 | 70.0 % of 1000 photographs |" in card.text and card.data.license == "other"
    assert "    layers=[1],\n" in card.text and "    num_landmarks=4,\n" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    assert code.count("pretrained=True") == 1
    overlay = f"pretrained_cfg_overlay=dict(file={weights!r}, source=None, num_classes=5)"
    scope = {}
    exec(code.replace("pretrained=True", f"pretrained=True, {overlay}").replace("delta.safetensors", str(path)), scope)
    assert torch.equal(scope["model"].eval()(x := image()), model(x))


def test_what_is_no_delta_is_refused_and_a_previous_file_stays(transferred, weights, tmp_path):
    path = tmp_path / "delta.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=r"is no delta of these weights .*expected .*distill_part=attention"):
        save_transferred(str(transferred["all"]), path, weights)
    other = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"is no delta of these weights"):
        save_transferred(str(transferred["attention"]), path, str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match=r"weights=.*absent.safetensors: vit_tiny_patch16_224 cannot be built"):
        save_transferred(str(transferred["attention"]), path, str(tmp_path / "absent.safetensors"))
    plain = timm.create_model(SOURCE, **SIZES)
    timm.models.save_for_hf(plain, tmp_path / "plain", safe_serialization=True)
    with pytest.raises(ValueError, match="which is no converted model; expected a transfer's"):
        save_transferred(str(tmp_path / "plain"), path, weights)
    assert path.read_bytes() == b"before"


def test_the_folder_of_a_transfer_may_be_pushed(transferred):
    model, card = check_folder(transferred["attention"])
    assert card.data.license == "other"
    assert torch.equal(model(x := image()), load_trained(str(transferred["attention"]))(x))


def test_the_folder_of_a_transfer_names_no_place_of_its_original(digits, tmp_path):
    timm.models.save_for_hf(timm.create_model(SOURCE, **SIZES), tmp_path / "teacher", safe_serialization=True)
    timm_vix.transfer(
        f"local-dir:{tmp_path / 'teacher'}", str(digits), "nystrom", layers="last-1",
        mixer_kwargs=dict(num_landmarks=4), block_steps=1, distill_steps=0, batch_size=4, device="cpu", amp="off",
        out=str(tmp_path / "run"),
    )  # fmt: skip
    _, card = check_folder(tmp_path / "run" / "hub")
    assert "# teacher with nystrom attention" in card.text and "- source: teacher\n" in card.text
    assert str(tmp_path) not in card.text


def test_what_merges_by_a_threshold_is_a_delta(weights, tmp_path):
    """It takes one image at a time."""
    overlay = dict(file=weights, source=None, num_classes=5)
    student = timm.create_model(SOURCE, pretrained=True, pretrained_cfg_overlay=overlay, **SIZES).eval()
    timm_vix.convert(student, "nystrom", layers=[0], num_landmarks=4, merge={"threshold": 0.9})
    card = model_card("# A model", "other", True)
    write_hub(tmp_path / "hub", student, resolve_input_data_config(student), card)
    model, keywords = save_transferred(str(tmp_path / "hub"), tmp_path / "delta.safetensors", weights, torch.float32)
    assert keywords["merge"] == {"threshold": 0.9}
    assert torch.equal(model(x := image()[:1]), student(x))


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(DELTAS.glob("*")), ids=lambda folder: folder.name)
def test_a_shipped_delta_gives_what_its_card_says(folder, deit, photographs):
    path = folder / "delta.safetensors"
    card = ModelCard.load(folder / "README.md").text
    assert path.stat().st_size < 8e6 and f"({path.stat().st_size / 1e6:.1f} MB)" in card
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    overlay = f"pretrained=True, pretrained_cfg_overlay=dict(file={str(deit)!r}, source=None)"
    code = card.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(code.replace("pretrained=True", overlay).replace("delta.safetensors", str(path)), scope)
    model = scope["model"].eval()
    transform = create_transform(**resolve_model_data_config(model))
    right = number = 0
    with tarfile.open(photographs) as archive, torch.inference_mode():
        members = {Path(member.name).name: member for member in archive if member.isfile()}
        rows = list(csv.DictReader(io.TextIOWrapper(archive.extractfile(members["labels.csv"]))))[::10]
        for row in rows:
            picture = Image.open(archive.extractfile(members[row["file"]])).convert("RGB")
            right += int(model(transform(picture)[None]).argmax()) == int(row["imagenet_class"])
            number += 1
    (top1,) = re.findall(r"\| top-1 \| ([\d.]+) %", card)
    assert 100 * right / number == pytest.approx(float(top1), abs=12)  # of 100 photographs


def test_a_folder_that_is_written_again_is_there_or_the_former_one_is(tmp_path, monkeypatch):
    model = timm.create_model("vix_nystrom_cifar", num_classes=4)
    config, card = resolve_model_data_config(model), ModelCard("---\nlicense: mit\n---\n# first")
    write_hub(tmp_path / "hub", model, config, card)
    replace = os.replace
    errors = [OSError("no"), KeyboardInterrupt(), KeyboardInterrupt()]

    def stop(source: Path, target: Path) -> None:
        if ".partial" in str(source):
            raise errors.pop(0)
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    for error in errors[:2]:
        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            write_hub(tmp_path / "hub", model, config, ModelCard("---\nlicense: mit\n---\n# second"))
        intact = f"cannot write {tmp_path / 'hub'}: no; what was saved before is intact"
        assert str(caught.value) == (intact if isinstance(error, OSError) else "")
        assert "first" in (tmp_path / "hub" / "README.md").read_text() and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "hub").rename(tmp_path / "hub.former")  # killed at this point
    with pytest.raises(KeyboardInterrupt):
        write_hub(tmp_path / "hub", model, config, ModelCard("---\nlicense: mit\n---\n# second"))
    assert "first" in (tmp_path / "hub" / "README.md").read_text() and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "replace", replace)
    write_hub(tmp_path / "hub", model, config, ModelCard("---\nlicense: mit\n---\n# second"))
    assert "second" in (tmp_path / "hub" / "README.md").read_text() and len(list(tmp_path.iterdir())) == 1
