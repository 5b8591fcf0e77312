"""Parallel blocks: two layers of a ViT side by side, over all mixers."""

import copy
import logging

import pytest
import timm
import torch
from conftest import VARIANTS, distance, image, is_narrow, lively, on_meta, small, small_arguments, without_values
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from timm.models import save_for_hf
from timm.models.vision_transformer import ParallelThingsBlock

from timm_vix.mixers import MIXERS
from timm_vix.slots.slot import MixerSlot


def side_by_side(model, x: torch.Tensor) -> torch.Tensor:
    """A sequential model's layers 2 i and 2 i + 1 at once: both attentions, then both MLPs."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for first, second in zip(model.blocks[::2], model.blocks[1::2]):
        x = x + sum(block.ls1(block.attn(block.norm1(x))) for block in (first, second))
        x = x + sum(block.ls2(block.mlp(block.norm2(x))) for block in (first, second))
    return model.forward_head(model.norm(x))


def stages(model) -> list[torch.nn.Module]:
    """The blocks of each stage."""
    return [model.blocks] if hasattr(model, "blocks") else [stage.blocks for stage in model.transformers]


def loaded(path, mixer="softmax", depth=4, **kwargs):
    """A model like ``small``'s that takes weights as ``pretrained=True`` does."""
    arguments = small_arguments(mixer, depth=depth, **kwargs)
    overlay = {"file": str(path), "num_classes": 5}
    return timm.create_model("vix_softmax_cifar", pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_a_sequential_model_of_twice_the_depth_loads_in_pairs(mixer, rope, options, tmp_path):
    sequential = small(mixer, rope, **options, depth=4, init_values=0.5)
    save_file(sequential.state_dict(), tmp_path / "model.safetensors")
    model = loaded(tmp_path / "model.safetensors", mixer=mixer, rope=rope, **options, block="parallel", init_values=0.5)
    assert len(model.blocks) == 2 and all(type(block) is ParallelThingsBlock for block in model.blocks)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in sequential.parameters())
    x = image(model)
    assert distance(model.double()(x.double()), side_by_side(sequential.double(), x.double())) < 1e-12


@pytest.mark.parametrize("mixer", MIXERS)
def test_softmax_weights_load_into_every_mixer(mixer, tmp_path, caplog):
    softmax = small("softmax", depth=4)
    save_file(softmax.state_dict(), tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        model = loaded(tmp_path / "model.safetensors", mixer=mixer, block="parallel")
    assert ["needs fine-tuning" in record.message for record in caplog.records].count(True) == 1
    assert torch.equal(model.blocks[1].ffns[0].mlp.fc1.weight, softmax.blocks[2].mlp.fc1.weight)
    assert torch.equal(model.blocks[0].attns[1].norm.bias, softmax.blocks[1].norm1.bias)
    if hasattr(model.blocks[0].attns[0].attn, "qkv"):
        assert torch.equal(model.blocks[1].attns[1].attn.qkv.weight, softmax.blocks[3].attn.qkv.weight)


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_a_saved_parallel_model_comes_back(mixer, rope, options, tmp_path):
    model = small(mixer, rope, **options, block="parallel", depth=4, stem="hmlp")
    model.set_input_size((10, 18))
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(model)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("mixer, rope, options", VARIANTS)
def test_a_parallel_model_is_dynamic_trains_and_copies(mixer, rope, options):
    model = small(mixer, rope, **options, block="parallel", dynamic_img_size=True).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    for size in ((14, 10), (8, 18)):
        x = torch.randn(2, 3, *size)
        for net in (model, twin):
            net.zero_grad()
            net(x).square().sum().backward()
        for mine, other in zip(model.parameters(), twin.parameters()):
            assert mine.grad.isfinite().all() and torch.equal(mine.grad, other.grad)


# the seven layers of a CCT-7 make no pairs
NAMES = timm.list_models(["vix_*", "hybrid_*", "pi[np]_*", "cc*"], exclude_filters=["vix_from_timm", "*_7"])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if is_narrow(n) else pytest.mark.slow) for n in NAMES])
def test_every_name_takes_it(name):
    model = without_values(name, block="parallel")
    sequential = on_meta(name)
    for ours, theirs in zip(stages(model), stages(sequential), strict=True):
        layers = [len(block.attns) for block in ours]
        assert layers == [2] * (len(theirs) // 2) + [1] * (len(theirs) % 2)
    kinds = [
        [type(getattr(m, "core", m)) for m in net.modules() if isinstance(m, (MixerSlot, Attention))]
        for net in (model, sequential)
    ]
    assert kinds[0] == kinds[1]


def test_inherited_weights_of_deit(deit):
    model = timm.create_model(
        "vix_nystrom_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(deit)}, block="parallel"
    )
    weights = load_file(deit)
    assert torch.equal(model.blocks[5].attns[1].attn.proj.weight, weights["blocks.11.attn.proj.weight"])
    assert torch.equal(model.pos_embed, weights["pos_embed"])


@pytest.mark.parametrize(
    "keywords, words",
    [
        ({"depth": 3}, ["depth=3", "even"]),
        ({"depth": "3"}, ["depth='3'", "integer"]),
        ({"block": "side_by_side"}, ["block='side_by_side'", "sequential", "parallel"]),
        ({"fix_init": True}, ["fix_init=True"]),
    ],
    ids=str,
)
def test_a_wrong_keyword_is_named(keywords, words):
    with pytest.raises(ValueError) as error:
        small("nystrom", **{"block": "parallel", **keywords})
    assert not [word for word in words if word not in str(error.value)], error.value


def test_a_depth_that_cannot_pair_is_named(tmp_path):
    save_file(small("softmax", depth=5).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="5 layers.*even"):
        loaded(tmp_path / "model.safetensors", mixer="nystrom", block="parallel")
    save_file(small("softmax", depth=2).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"doesn't fit.*Missing: blocks\.\*\.attns"):
        loaded(tmp_path / "model.safetensors", mixer="nystrom", block="parallel")


def test_a_parallel_checkpoint_does_not_fit_a_sequential_model(tmp_path):
    save_file(lively(small("softmax", depth=4, block="parallel")).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"doesn't fit.*Unexpected: blocks\.\*\.attns"):
        loaded(tmp_path / "model.safetensors")
