"""OpenCLIP takes our models as the image tower of a CLIP."""

import pytest
import timm
import torch
from conftest import distance

import timm_vix

open_clip = pytest.importorskip("open_clip", reason="OpenCLIP is in the extra 'ecosystem'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

TEXT = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
# it passes no keywords on to timm, so a tower has the size of its name
IMAGE_SIZE = 32


def clip(name: str) -> torch.nn.Module:
    vision = dict(timm_model_name=name, timm_model_pretrained=False, timm_pool="", image_size=IMAGE_SIZE)
    return open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)


def train(model: torch.nn.Module, steps: int = 6) -> list[float]:
    """Contrastive losses of four images with four texts."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    contrast = open_clip.ClipLoss()
    images, texts = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(1, 50, (4, 8))
    losses = []
    for _ in range(steps):
        loss = contrast(*model(images, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", [f"vix_{mixer}_cifar" for mixer in ("nystrom", "linformer", "performer", "axial")])
def test_a_tower_gives_the_features_of_timm(name):
    model = clip(name).eval()
    x = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    alone = timm.create_model(name, num_classes=0).eval()
    alone.load_state_dict(model.visual.trunk.state_dict())
    with torch.no_grad():
        expected = model.visual.head(alone(x))
        assert torch.equal(model.encode_image(x), expected)
        normed = torch.nn.functional.normalize(expected, dim=1)
        assert distance(model.encode_image(x, normalize=True), normed) < 1e-6


def test_a_tower_trains():
    losses = train(clip("vix_linformer_cifar"))
    assert losses[-1] < 0.8 * losses[0]


def test_a_tower_takes_another_size_and_is_converted():
    model = clip("vit_tiny_patch16_224")
    model.visual.set_input_size(IMAGE_SIZE)
    x = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = model.eval().encode_image(x)
    # one landmark a patch is softmax attention
    timm_vix.convert(model.visual.trunk, "nystrom", num_landmarks=4)
    assert distance(model.encode_image(x), before) < 1e-5
    timm_vix.convert(model.visual.trunk, "linformer", num_proj_tokens=1)
    assert distance(model.encode_image(x), before) > 1e-4
    losses = train(model)
    assert losses[-1] < 0.8 * losses[0]
