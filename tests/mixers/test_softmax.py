"""Softmax with rotary positions against timm's ``AttentionRope``, and in raster order against a loop."""

import copy
import math

import pytest
import timm
import torch
from conftest import LAYOUTS, check_equal, distance, gradients, heads_of, image, joined, rounding, since, small
from timm.layers import AttentionRope, RotaryEmbeddingCat
from timm.models import save_for_hf

from timm_vix import convert, revert
from timm_vix._checks import InputError
from timm_vix.mixers._layout import TokenLayout
from timm_vix.mixers._mechanism import MechanismHost
from timm_vix.mixers._merging import merge_similar_keys


def timm_twin(module, rope: bool = True) -> AttentionRope:
    """timm's rotary attention with the same weights."""
    twin = AttentionRope(32, 2, num_prefix_tokens=module.num_prefix_tokens).double()
    twin.load_state_dict(module.state_dict(), strict=False)
    return twin


@pytest.mark.parametrize("img_size", [(14, 10), (8, 8), (2, 18)])
@pytest.mark.parametrize("masked", ["", "bool", "float", "causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_axial_positions_are_those_of_timm(layout, masked, img_size):
    model = small("softmax", "axial", img_size=img_size, **LAYOUTS[layout]).double()
    module = model.blocks[0].attn
    N = module.num_tokens
    mask = {"bool": torch.rand(N, N) < 0.7, "float": torch.randn(N, N, dtype=torch.float64)}.get(masked)
    if mask is not None and mask.dtype == torch.bool:
        mask |= torch.eye(N, dtype=torch.bool)
    kwargs = {"attn_mask": mask, "is_causal": masked == "causal"}
    table = RotaryEmbeddingCat(16, in_pixels=False, temperature=100.0, feat_shape=list(module.grid)).get_embed()
    x = torch.randn(2, N, 32, dtype=torch.float64, requires_grad=True)
    ours, theirs = module(x, **kwargs), timm_twin(module)(x, rope=table.double(), **kwargs)
    check_equal(ours, theirs, x, rounding(torch.float32))  # our table was made in float32, as timm's


def raster_attention(module, x: torch.Tensor) -> torch.Tensor:
    """softmax(R(q) R(k)^T / sqrt(D)) v, a query and a head at a time; R turns pair i by place · 10000^(-2i / D)."""
    B, N, C = x.shape
    h, P = module.num_heads, module.num_prefix_tokens
    D = C // h
    q, k, v = heads_of(module, x)

    def turned(vector, token):
        if token < P:
            return vector
        pairs = []
        for i in range(D // 2):
            angle = (token - P) * 10000.0 ** (-2 * i / D)
            a, b = vector[2 * i], vector[2 * i + 1]
            pairs += [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
        return torch.stack(pairs)

    out = torch.zeros(B, h, N, D, dtype=x.dtype)
    for b in range(B):
        for head in range(h):
            keys = torch.stack([turned(k[b, head, t], t) for t in range(N)])
            for t in range(N):
                weights = torch.softmax(keys @ turned(q[b, head, t], t) / math.sqrt(D), dim=0)
                out[b, head, t] = weights @ v[b, head]
    return joined(module, out)


@pytest.mark.parametrize("layout", ["class", "no_prefix"])
def test_raster_positions_are_those_of_a_loop(layout):
    module = small("softmax", "1d", img_size=(6, 8), **LAYOUTS[layout]).double().blocks[0].attn
    x = torch.randn(1, math.prod(module.grid) + module.num_prefix_tokens, 32, dtype=torch.float64)
    assert distance(module(x), raster_attention(module, x)) < rounding(torch.float32)  # so is the table's


@pytest.mark.parametrize("rope", ["axial", "1d"])
def test_attention_depends_on_relative_positions_only(rope):
    """Rolling query and key by the same offset leaves their product alone."""
    module = small("softmax", rope, class_token=False, global_pool="avg").double().blocks[0].attn
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 1, 35, 16)
    layout = TokenLayout(0, (7, 5))
    q, k = (module.rotate(part, layout, layout.grid) for part in (q, k))
    logits = (q @ k.transpose(2, 3)).reshape(7, 5, 7, 5)
    assert distance(logits[2:, 1:, 2:, 1:], logits[:-2, :-1, :-2, :-1]) < rounding(torch.float32)
    assert distance(logits[2:, 1:, 2:, :-1], logits[:-2, :-1, :-2, 1:]) > 0.1


def test_softmax_model_hands_the_mask_to_every_block():
    model = small("softmax", "axial", global_pool="avg").double()
    x = image(model).double()
    mask = torch.ones(36, 36, dtype=torch.bool).tril()
    assert distance(model(x, attn_mask=mask), model(x, is_causal=True)) < rounding(torch.float64)
    assert distance(model(x), model(x, is_causal=True)) > 1e-3


def attention_to_merged_keys(q, k, v, P: int, r: int) -> torch.Tensor:
    """One head, (N, D) each: r even patch keys join the odd one of the largest cosine, in loops."""
    cosine = torch.nn.functional.cosine_similarity
    proposals = []
    for i in range(P, len(k), 2):
        similarity = {j: float(cosine(k[i], k[j], dim=0).detach()) for j in range(P + 1, len(k), 2)}
        if similarity:
            j = max(similarity, key=similarity.get)
            proposals.append((similarity[j], i, j))
    groups = {n: [n] for n in range(len(k))}
    for _, i, j in sorted(proposals, reverse=True)[:r]:
        groups[j] += groups.pop(i)
    keys, values = (torch.stack([sum(x[n] for n in group) / len(group) for group in groups.values()]) for x in (k, v))
    counts = torch.tensor([float(len(group)) for group in groups.values()], dtype=k.dtype)
    weights = counts * torch.exp(q @ keys.T / math.sqrt(q.shape[1]))
    return weights / weights.sum(1, keepdim=True) @ values


@pytest.mark.parametrize("rope", [None, "axial"])
@pytest.mark.parametrize("share, left", [(0.5, 18), (0.7, 25), (0.9, 32)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_keys_are_those_of_a_loop(layout, share, left, rope):
    module = small("softmax", rope, merge_keys=share, **LAYOUTS[layout]).double().blocks[0].attn
    P = module.num_prefix_tokens
    x = torch.randn(2, 35 + P, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = module.project(x, 0, 3)
    grid = TokenLayout(P, module.grid)
    q, k = (module.rotate(part, grid, module.grid) for part in (q, k))
    heads = torch.stack(
        [
            torch.stack([attention_to_merged_keys(*parts, P, 35 - left) for parts in zip(*image)])
            for image in zip(q, k, v)
        ]
    )
    check_equal(module(x), module.merge(heads, x), x, rounding(torch.float64))


@torch.no_grad()
def test_places_are_no_part_of_a_keys_likeness():
    """With locality keys have channels for their place, which don't say which of them are alike."""
    core = small("softmax", merge_keys=0.5, locality=0.3).double().blocks[0].attn.core
    layout = TokenLayout(1, (7, 5))
    q, k, v = torch.randn(3, 1, 2, 36, 16, dtype=torch.float64)
    wide_q, wide_k, wide_v = core.localise(q, k, v, layout, layout)
    merged, _, counts = merge_similar_keys(wide_k, wide_v, None, 1, 0.5, 16)
    plain, _, expected = merge_similar_keys(k, v, None, 1, 0.5, 16)
    assert distance(merged[..., :16], plain) < rounding(torch.float64) and torch.equal(counts, expected)
    by_place = merge_similar_keys(wide_k, wide_v, None, 1, 0.5, wide_k.shape[3])[0]
    assert distance(by_place[..., :16], plain) > 0.1
    y = (wide_q @ merged.transpose(2, 3) * wide_q.shape[3] ** -0.5 + counts).softmax(3)
    found = core(wide_q, wide_k, wide_v, layout, layout)
    assert distance(found, y @ merge_similar_keys(wide_k, wide_v, None, 1, 0.5, 16)[1]) < rounding(torch.float64)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (1, 7)])
def test_few_keys_merge_or_stay(grid):
    core = small("softmax", merge_keys=0.5).double().blocks[0].attn.core
    n = grid[0] * grid[1]
    q, k, v = torch.randn(3, 1, 1, 1 + n, 4, dtype=torch.float64)
    layout = TokenLayout(1, grid)
    expected = attention_to_merged_keys(q[0, 0], k[0, 0], v[0, 0], 1, n // 2)
    assert distance(core(q, k, v, layout, layout)[0, 0], expected) < rounding(torch.float64)


def test_equal_keys_merge_without_a_trace():
    model, plain = (small("softmax", merge_keys=share, pos_embed="none").double() for share in (0.5, 1.0))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 14, 10)
    assert distance(model.forward_features(x), plain.forward_features(x)) < rounding(torch.float64)


def test_keys_and_tokens_merge_together():
    """Merged tokens count as often as their patches where their keys merge again."""
    core = small("softmax", merge_keys=0.5).double().blocks[0].attn.core
    k = torch.randn(1, 1, 3, 4, dtype=torch.float64)[:, :, [0, 1, 1, 2, 2]]  # a prefix key, then two pairs
    q, v = torch.randn(2, 1, 1, 5, 4, dtype=torch.float64)
    counts = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    layout = TokenLayout(1, (1, 4))
    weights = counts * torch.exp(q @ k.transpose(2, 3) / 2)
    expected = weights / weights.sum(3, keepdim=True) @ v
    assert distance(core(q, k, v, layout, layout, counts.log()[None, None, None]), expected) < rounding(torch.float64)


@pytest.mark.parametrize("share", [0.3, 0, 1.5, "half", float("nan"), -1])
def test_other_shares_are_refused(share):
    with pytest.raises(InputError, match=r"merge_keys=.*: expected the share of the keys that is left, from 0.5 to 1"):
        small("softmax", merge_keys=share)
    model = small("softmax")
    with pytest.raises(InputError, match="from 0.5 to 1"):
        convert(model, "softmax", merge_keys=share)


@pytest.mark.parametrize("given", [{"is_causal": True}, {"attn_mask": torch.ones(36, 36, dtype=torch.bool)}])
def test_masks_are_refused_where_keys_merge(given):
    with pytest.raises(InputError, match="softmax takes any attn_mask and is_causal, with merge_keys=1"):
        small("softmax", merge_keys=0.5)(torch.randn(1, 3, 14, 10), **given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@since("2.9", "exports no batch of any size")
def test_merged_keys_are_scripted_exported_and_compiled(tmp_path):
    model = small("softmax", "axial", merge_keys=0.5, depth=1)
    x = image(model, 3)
    expected = model(x)
    assert distance(torch.jit.script(model)(x), expected) < rounding(torch.float32)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    assert distance(program.module()(x), expected) < rounding(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(gradients(compiled, x), gradients(model, x)) < rounding(torch.float32)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.onnx.export(program, (), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (value,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(value), expected) < rounding(torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_merged_keys_in_half_precision(autocast):
    """Within what rounding to half precision, which matches other keys now and then, does without merging, twice."""
    model = small("softmax", merge_keys=0.5)
    plain = small("softmax")
    x = image(model, 8)

    def half(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x) if autocast else copy.deepcopy(model).bfloat16()(x.bfloat16())

    value = half(model)
    assert value.dtype == torch.bfloat16
    assert distance(value, model(x)) < 2 * distance(half(plain), plain(x))


def test_merged_keys_of_an_image_are_its_own():
    model = small("softmax", "axial", merge_keys=0.5).double()
    x = image(model, 4).double()
    for i in range(4):
        assert distance(model(x)[i], model(x[i : i + 1])[0]) < rounding(torch.float64)


def test_merged_keys_at_two_sizes_in_turn():
    model = small("softmax", "axial", merge_keys=0.5, dynamic_img_size=True).double()
    for size in ((14, 10), (6, 18), (14, 10)):
        fixed = small("softmax", "axial", merge_keys=0.5, img_size=size).double()
        fixed.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        assert distance(model(x), fixed(x)) < rounding(torch.float64)


@pytest.mark.parametrize("name", ["levin_128s", "cvt_cifar", "pin_cifar"])
def test_other_hosts_merge_keys(name):
    own = {"mixer": "softmax"} if name != "cvt_cifar" else {}
    model = timm.create_model(name, merge_keys=0.5, **own)
    shares = [module.core.merge_keys for module in model.modules() if isinstance(module, MechanismHost)]
    assert shares and set(shares) == {0.5}


def test_a_conversion_to_merged_keys_is_saved_and_reverted(tmp_path):
    model, x = timm.create_model("eva02_tiny_patch14_224", img_size=(56, 42), depth=3).eval(), torch.randn(2, 3, 56, 42)
    own = model(x)
    convert(model, "softmax", [0, 2], merge_keys=0.5)
    value = model(x)
    assert distance(value, own) > 1e-4
    convert(model, "performer", [1])
    convert(model, "softmax", [1])
    assert torch.equal(model(x), value), "other layers stay as they are"
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), value)
    convert(model, "softmax", [2], merge_keys=1.0)
    assert [type(block.attn).__name__ for block in model.blocks] == ["AttentionSlot", "EvaAttention", "EvaAttention"]
    for reverted in (model, loaded):
        revert(reverted)
        assert torch.equal(reverted(x), own)
