"""Transformers loads a folder that timm saved, by its wrapper of timm's models, and runs its pipelines on it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import distance
from PIL import Image
from small_models import CONVERTED, KINDS, SIZE, build
from timm.data import resolve_input_data_config, resolve_model_data_config

from timm_vix.train.hub import model_card, write_hub

transformers = pytest.importorskip("transformers", reason="Transformers is in the extra 'ecosystem'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def saved(model: torch.nn.Module, folder: Path) -> dict:
    """Save a model as timm does; what Transformers has to be told, beside the folder, to load it.

    timm notes the number of classes twice, and Transformers hands both of them on.
    """
    names = {"label_names": [f"label {i}" for i in range(model.num_classes)]}
    timm.models.save_for_hf(model, folder, names, safe_serialization=True)
    arguments = json.loads((folder / "config.json").read_text())["model_args"]
    return {"model_args": {name: value for name, value in arguments.items() if name != "num_classes"}}


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "rotary"])
def test_a_saved_folder_is_the_same_function(kind, tmp_path):
    rotary = dict(rope="axial", pos_embed="none")
    model = build("nystrom", **rotary) if kind == "rotary" else build(kind)
    arguments = saved(model, tmp_path / "timm")
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "timm", **arguments).eval()
    x = torch.randn(2, 3, 32, 32)
    assert type(classifier) is transformers.TimmWrapperForImageClassification
    assert classifier.config.id2label == {i: f"label {i}" for i in range(5)}
    assert torch.equal(classifier(x).logits, model(x))
    # Transformers' own format keeps what the model was built from, too
    classifier.save_pretrained(tmp_path / "transformers")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "transformers").eval()
    assert torch.equal(again(x).logits, model(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nystrom", CONVERTED])
def test_the_folder_of_a_run_needs_no_further_argument(kind, tmp_path):
    model = build(kind)
    write_hub(
        tmp_path / "hub",
        model,
        resolve_model_data_config(model, dict(img_size=32)),
        model_card("# A model", "apache-2.0", True),
    )
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hub").eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(classifier(x).logits, model(x))
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_of_timm(kind, tmp_path):
    model = build(kind)
    wrapper = transformers.TimmWrapperModel.from_pretrained(tmp_path, **saved(model, tmp_path)).eval()
    x = torch.randn(2, 3, 32, 32)
    outputs = wrapper(x, output_hidden_states=True)
    last, states = model.forward_intermediates(x)
    assert torch.equal(outputs.last_hidden_state, last)
    assert torch.equal(outputs.pooler_output, model.forward_head(last, pre_logits=True))
    assert len(outputs.hidden_states) == 2
    assert all(torch.equal(*pair) for pair in zip(outputs.hidden_states, states))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_classifies_a_picture(kind, tmp_path):
    model = build(kind)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, **saved(model, tmp_path)).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pipeline = transformers.pipeline("image-classification", model=classifier, image_processor=processor)
    check_answers(pipeline, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nystrom", CONVERTED])
def test_a_pipeline_takes_the_folder_of_a_run_by_its_path(kind, tmp_path):
    model = build(kind)
    card, names = model_card("# A model", "apache-2.0", True), [f"label {i}" for i in range(5)]
    write_hub(tmp_path / "hub", model, resolve_input_data_config(model), card, names)
    check_answers(transformers.pipeline("image-classification", model=str(tmp_path / "hub")), tmp_path / "hub")


def check_answers(pipeline, folder: Path) -> None:
    """The shares of the five classes of a picture are those of timm's model of a folder."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    of_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(of_timm))
    expected = of_timm(transform(picture)[None]).softmax(1)[0]
    found = {answer["label"]: answer["score"] for answer in pipeline(picture, top_k=5)}
    assert found.keys() == {f"label {i}" for i in range(5)}
    assert distance(torch.tensor([found[f"label {i}"] for i in range(5)]), expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_are_refused(kind, tmp_path):
    model = build(kind)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, **saved(model, tmp_path))
    with pytest.raises(ValueError, match="output_attentions"):
        classifier(torch.randn(1, 3, 32, 32), output_attentions=True)


def test_fine_tuning_lowers_the_loss(tmp_path):
    arguments = saved(build("nystrom"), tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, **arguments).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 5
    losses = []
    for _ in range(10):
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.xfail(
    raises=TypeError,
    reason="timm 1.0.31 saves num_classes among model_args, and Transformers 5.24.0 passes it on beside its own, for "
    "any model of timm: https://github.com/huggingface/transformers/pull/38860 introduced model_args",
)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vix_nystrom_tiny"])
def test_a_folder_alone_is_enough(name, tmp_path):
    saved(timm.create_model(name, **SIZE), tmp_path)
    transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
