"""Token merging: against loops over tokens, exact for equal tokens, and the whole grid for whoever reads features."""

import argparse
import copy
import math
import threading

import pytest
import timm
import torch
from conftest import distance, gradients, lively, rounding, since
from timm.models import save_for_hf
from timm.utils import ParseKwargs
from torch.nn.modules.module import register_module_forward_hook

import timm_vix
from timm_vix._checks import InputError
from timm_vix.conversion.merge_block import attend_groups, merge_similar
from timm_vix.conversion.merge_steps import merge_steps, num_merged
from timm_vix.conversion.merging import MergingBlocks
from timm_vix.mixers import MIXERS
from timm_vix.mixers._mechanism import AttentionMechanism
from timm_vix.mixers._merging import Groups, kinds_of, merge_mask, merge_table, single_groups

HOSTS = {
    "class": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "init_values": 0.5, "qk_norm": True}),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "attention_pool": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 8}),
    "eva_biases": ("eva_giant_patch14_224", {"patch_size": 8}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "vix_rope": ("vix_softmax_cifar", {"rope": "axial"}),
}
# mixers that may stand where tokens have merged, softmax first
FOLLOWERS = [name for name, kind in MIXERS.items() if kind.takes_merged_tokens()]
MERGE = [0, 3, 5, 2]
# which of three patches is where in images of equal patches
KINDS = torch.randint(3, (35,), generator=torch.Generator().manual_seed(0))
# few enough that among 35 tokens of three kinds only equal ones merge
EQUAL = [6, 3, 1, 0]


def host(kind="class", **kwargs):
    """A small model in eval mode, of 7x5 patches of 8 px, 4 layers and 2 heads, with lively weights."""
    name, own = HOSTS[kind]
    size = {"img_size": (56, 40), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return lively(timm.create_model(name, **{**size, **own, **kwargs}).eval())


def merging(kind="class", merge=MERGE, mixer="softmax", **kwargs):
    model = host(kind, **kwargs)
    timm_vix.convert(model, mixer, merge=merge)
    return model


def images(batch=2):
    return torch.randn(batch, 3, 56, 40)


def repeating_images(batch=2):
    """Images of three different patches, as ``KINDS`` has them."""
    patches = torch.randn(batch, 3, 3, 8, 8)
    places = KINDS.reshape(7, 5)
    return patches[:, places].permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, 56, 40)


def without_positions(kind):
    """A host whose patch tokens are equal where the patches are."""
    model = host(kind)
    with torch.no_grad():
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        model.pos_embed[:, prefix:] = 0
    return model


def merge_in_loops(x, keys, members, P, r):
    """One image: tokens as a list, keys (M, D), the members of each token; most similar pairs of even and odd ones."""
    cosine = torch.nn.functional.cosine_similarity
    proposals = []
    for i in range(P, len(x), 2):
        partners = {j: float(cosine(keys[i], keys[j], dim=0).detach()) for j in range(P + 1, len(x), 2)}
        if partners:
            j = max(partners, key=partners.get)
            proposals.append((partners[j], i, j))
    into = {i: j for _, i, j in sorted(proposals, reverse=True)[:r]}
    tokens, groups = [], []
    for j in range(len(x)):
        if j not in into:
            parts = [j, *(i for i in into if into[i] == j)]
            groups.append([token for part in parts for token in members[part]])
            tokens.append(sum(len(members[part]) * x[part] for part in parts) / len(groups[-1]))
    return tokens, groups


def turned(x, table, members):
    """Heads (M, h, D) of groups, whose pairs of channels turn by the mean direction of the group's tokens."""
    sin, cos = table.chunk(2, dim=1)
    waves = torch.complex(cos, sin)[:, ::2]
    waves = torch.stack([waves[group].sum(0) for group in members])
    pairs = torch.view_as_complex(x.unflatten(2, (-1, 2))) * (waves / waves.abs()).unsqueeze(1)
    return torch.view_as_real(pairs).flatten(2)


def model_in_loops(model, image, merge, table=None):
    """The features of all tokens of one image, in a ViT with softmax attention whose tokens merge in loops.

    ``table``: sines and cosines of rotary positions, (N, 2·D).
    """
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    N, members = len(x), [[token] for token in range(len(x))]
    for block, r in zip(model.blocks, merge):
        attn, tokens = block.attn, block.norm1(x)
        q, k, v = attn.qkv(tokens).reshape(len(x), 3, attn.num_heads, attn.head_dim).unbind(1)
        if table is not None:
            q, k = turned(q, table, members), turned(k, table, members)
        heads = []
        for head in range(attn.num_heads):
            weights = torch.exp(q[:, head] @ k[:, head].T / math.sqrt(attn.head_dim))
            weights = weights * torch.tensor([float(len(group)) for group in members], dtype=x.dtype)
            heads.append(weights / weights.sum(1, keepdim=True) @ v[:, head])
        x = x + attn.proj(torch.cat(heads, dim=1))
        tokens, members = merge_in_loops(x, k.mean(1), members, 1, r)
        x = torch.stack(tokens)
        x = x + block.mlp(block.norm2(x))
    place = {token: i for i, group in enumerate(members) for token in group}
    return model.norm(torch.stack([x[place[token]] for token in range(N)]))


@pytest.mark.parametrize("P, M, r", [(1, 10, 3), (0, 7, 3), (3, 9, 2), (2, 3, 1)])
def test_merging_is_that_of_loops(P, M, r):
    x = torch.randn(2, M, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(2, 3, M, 5, dtype=torch.float64)
    place = torch.cat([torch.arange(M), torch.randint(P, M, (6,))]).expand(2, -1)
    counts = torch.stack([torch.bincount(row, minlength=M) for row in place]).float()
    members = [[token for token in range(M + 6) if place[0, token] == group] for group in range(M)]
    r = min(r, (M - P) // 2)
    merged, groups = merge_similar(x, keys, Groups(place, counts), r, P)
    weight = torch.randn(M - r, 4, dtype=torch.float64)
    for image in range(2):
        tokens, expected = merge_in_loops(x[image], keys[image].mean(0), members, P, r)
        assert distance(merged[image], torch.stack(tokens)) < 1e-12
        assert groups.counts[image].tolist() == [len(group) for group in expected]
        assert [sorted(group) for group in expected] == [
            (groups.place[image] == i).nonzero().flatten().tolist() for i in range(M - r)
        ]
        (ours,) = torch.autograd.grad((merged[image] * weight).sum(), x, retain_graph=True)
        (theirs,) = torch.autograd.grad((torch.stack(tokens) * weight).sum(), x)
        assert distance(ours, theirs) < 1e-12


@pytest.mark.parametrize("kind, merge", [("class", MERGE), ("class", [4, 0, 6, 1]), ("vix_rope", MERGE)])
def test_a_model_is_that_of_loops(kind, merge):
    model, twin = merging(kind, merge).double(), host(kind).double()
    x = images().double()
    features = model.forward_features(x)
    table = twin.blocks[0].attn.rope.table if kind == "vix_rope" else None
    expected = torch.stack([model_in_loops(twin, image, merge, table) for image in x])
    assert distance(features, expected) < 1e-6  # counts and similarities are in float32
    features.square().sum().backward()
    expected.square().sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (model, twin))
    assert distance(ours, theirs) < 1e-6


@pytest.mark.parametrize("mixer", FOLLOWERS)
@pytest.mark.parametrize("kind", ["class", "registers", "average", "attention_pool", "distilled"])
def test_equal_tokens_merge_without_a_trace(kind, mixer):
    model, x = without_positions(kind).double(), repeating_images().double()
    timm_vix.convert(model, mixer)
    expected, features, slopes = model(x), model.forward_features(x), gradients(model, x)
    timm_vix.convert(model, mixer, merge=EQUAL)
    assert distance(model(x), expected) < 1e-6  # counts are in float32
    assert distance(model.forward_features(x), features) < 1e-6
    assert distance(gradients(model, x), slopes) < 1e-6


@pytest.mark.parametrize("kind", HOSTS)
def test_attention_of_single_groups_is_the_hosts_own(kind):
    model = host(kind)
    sites = [block.attn for block in model.blocks]
    seen = []
    handle = sites[2].register_forward_hook(lambda m, a, k, y: seen.append((a, k, y)), with_kwargs=True)
    model(images())
    handle.remove()
    timm_vix.convert(model, "softmax", merge=MERGE)
    (args, kwargs, expected), slot = seen[0], model.blocks[2].attn
    attended, keys = attend_groups(slot, *args, single_groups(args[0]), **kwargs)
    assert distance(attended, expected) < rounding(torch.float32)
    assert keys.shape == (2, 2, args[0].shape[1], 16)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", HOSTS)
def test_blocks_in_which_nothing_merges_are_the_hosts_own(kind, training):
    """A threshold of 1 merges no pair of these tokens, but each block goes the way of merging blocks."""
    own = {"init_values": 0.5} if kind == "eva" else {}  # factors of the residuals; eva_biases has none
    model, x = host(kind, drop_path_rate=0.3, **own).double(), images(1).double().requires_grad_()
    found = []
    for merge in (None, {"threshold": 1.0}):
        if merge is not None:
            timm_vix.convert(model, "softmax", merge=merge)
        torch.manual_seed(1)
        y = model.train(training)(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
    assert isinstance(model.blocks, MergingBlocks)
    for plain, merged in zip(*found):
        assert distance(merged, plain) < rounding(torch.float32)  # counts and some tables are in float32


@pytest.mark.parametrize("kind", HOSTS)
def test_features_are_on_the_whole_grid(kind):
    model, x = merging(kind), images()
    last, maps = model.forward_intermediates(x, output_fmt="NLC", return_prefix_tokens=True)
    prefix = model.num_prefix_tokens
    # 35 patches, of which 3, 5 and 2 merge
    for number, found in zip((35, 32, 27, 25), maps):
        patches = found[0] if prefix else found
        assert patches.shape == (2, 35, 32)
        assert [len(image.unique(dim=0)) for image in patches.detach()] == [number, number]
    assert torch.equal(model.forward_features(x), last)
    assert distance(model.forward_head(last), model(x)) < rounding(torch.float32)
    early = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)[0]
    patches = maps[1][0] if prefix else maps[1]
    assert torch.equal(early.flatten(2).transpose(1, 2), patches)


@pytest.mark.parametrize("kind", HOSTS)
def test_no_image_depends_on_its_batch(kind):
    model, x = merging(kind, merge=6), images(4)
    together = model(x)
    for i in range(4):
        assert distance(model(x[i : i + 1])[0], together[i]) < rounding(torch.float32)


def test_merged_masks():
    place = torch.tensor([[0, 1, 1, 2, 1], [0, 1, 2, 2, 2]])
    groups = Groups(place, torch.tensor([[1.0, 3.0, 1.0], [1.0, 1.0, 3.0]]))
    added = torch.randn(2, 2, 5, 5)
    boolean = (torch.rand(5, 5) > 0.3) | torch.eye(5, dtype=torch.bool)
    as_added = torch.zeros(5, 5).masked_fill(~boolean, -torch.inf)
    keys_only = torch.randn(2, 1, 1, 5)
    for mask, full in [
        (added, added),
        (boolean, as_added),
        (keys_only, keys_only),
        (keys_only[0, 0, 0], keys_only[0, 0, 0]),
        (added[..., :1], added[..., :1]),
        (added - 1e9, (added - 1e9) + 1e9),  # as float32 rounds it
        (added.masked_fill(~boolean, -1e9), added + as_added),
        (added.masked_fill(~boolean, torch.finfo(torch.float32).min), added + as_added),
        (added.double().masked_fill(~boolean, torch.finfo(torch.float64).min), added + as_added),
    ]:
        found, full = merge_mask(mask, groups).float().expand(2, 2, 3, 3), full.expand(2, 2, 5, 5)
        full = full - full.amax(3, keepdim=True)
        for b, h, i, j in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 3))).tolist():
            rows, columns = (place[b] == i).nonzero().flatten(), (place[b] == j).nonzero().flatten()
            expected = full[b, h][rows][:, columns].exp().sum() / len(rows)
            torch.testing.assert_close(found[b, h, i, j].exp(), expected)
    assert torch.equal(merge_mask(None, groups).exp().flatten(1), groups.counts)


def test_a_mask_of_the_whole_grid_acts_on_equal_tokens_as_before():
    model, x = without_positions("class").double(), repeating_images().double()
    kinds = torch.cat([torch.tensor([3]), KINDS])
    mask = torch.randn(4, 4, dtype=torch.float64)[kinds][:, kinds]
    expected = model(x, attn_mask=mask)
    timm_vix.convert(model, "softmax", merge=EQUAL)
    assert distance(model(x, attn_mask=mask), expected) < 1e-6
    assert distance(model(x), expected) > 1e-3


def block_mask(length, *blocks):
    """A boolean mask (length, length) whose tokens read those of their own block."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for block in blocks:
        mask[block[:, None], block] = True
    return mask


def test_a_mask_treats_tokens_alike_if_their_rows_and_columns_are_equal():
    few = torch.tensor([0.0, -0.0, -1.0, -torch.inf, -1e9])
    draw = torch.Generator().manual_seed(0)
    blocks = block_mask(9, torch.tensor([0, 4, 7]), torch.tensor([1, 2, 3, 8]), torch.tensor([5]))
    masks = [
        few[torch.randint(5, (3, 1, 1, 9), generator=draw)],
        torch.rand(2, 1, 1, 9, generator=draw) > 0.5,
        blocks,
        torch.zeros(9, 9).masked_fill(~blocks, -torch.inf).expand(2, 2, 9, 9),
        torch.randint(2, (5, 2, 9, 9), generator=draw).bool(),
        torch.stack([blocks, torch.ones(9, 9, dtype=torch.bool)])[None],  # heads differ
        torch.ones(9, 9).tril().bool(),
        few[torch.randint(2, (1, 1, 9, 9), generator=draw)],  # zeros of both signs
    ]
    for mask in masks:
        found = kinds_of(mask)
        full = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        for image, kinds in zip(full, found):
            rows = image.transpose(1, 2) if image.shape[1] > 1 else image[..., :0]
            for i, j in torch.cartesian_prod(torch.arange(9), torch.arange(9)).tolist():
                alike = torch.equal(image[..., i], image[..., j])
                alike &= image.shape[1] == 1 or torch.equal(rows[..., i], rows[..., j])
                assert (kinds[i] == kinds[j]) == alike
                unread = not image[..., j].any() if mask.dtype == torch.bool else (image[..., j] < -1e8).all()
                assert kinds[j] % 2 == bool(unread)


@pytest.mark.parametrize(
    "kind, mixer", [*((kind, "softmax") for kind in HOSTS), *(("class", mixer) for mixer in FOLLOWERS[1:])]
)
def test_what_a_mask_of_keys_hides_merges_into_nothing_visible(kind, mixer):
    model, x = merging(kind, [8, 5, 2, 0], mixer=mixer), images().requires_grad_()
    prefix = model.num_prefix_tokens
    read = torch.ones(2, 1, 1, prefix + 35, dtype=torch.bool)
    read[0, ..., prefix + 3 : prefix + 17] = read[1, ..., prefix + 20 :] = False
    other = x.detach().clone()
    shape = (7, 8, 5, 8)  # rows, their pixels, columns, their pixels
    hidden = ~read[:, 0, 0, prefix:].reshape(2, 1, 7, 1, 5, 1).expand(2, 3, *shape).reshape(x.shape)
    other[hidden] = torch.randn(int(hidden.sum()))
    before, after = (model.forward_features(pixels, attn_mask=read) for pixels in (x, other))
    scale = float(before.detach().abs().max())
    for i, visible in enumerate(read[:, 0, 0]):
        assert float((before[i, visible] - after[i, visible]).detach().abs().max()) < rounding(torch.float32) * scale
        assert float((before[i, ~visible] - after[i, ~visible]).detach().abs().max()) > 0.01 * scale
    sum((before[i, visible] ** 2).sum() for i, visible in enumerate(read[:, 0, 0])).backward()
    assert x.grad[~hidden].abs().max() > 0
    assert x.grad[hidden].abs().max() <= rounding(torch.float32) * x.grad.abs().max()
    assert distance(model.forward_features(x, attn_mask=read), model.forward_features(x)) > 1e-3


def test_tokens_of_blocks_that_do_not_read_each_other_stay_apart():
    model, x = merging("class", [8, 5, 2, 0]), images().requires_grad_()
    first, second = torch.arange(0, 21), torch.arange(21, 36)  # the second one has the rows from 32 px
    mask = block_mask(36, first, second)
    features = model.forward_features(x, attn_mask=mask)
    for block, own, others in ((first, slice(0, 32), slice(32, 56)), (second, slice(32, 56), slice(0, 32))):
        (gradient,) = torch.autograd.grad(features[:, block].square().sum(), x, retain_graph=True)
        assert gradient[:, :, own].abs().max() > 0 and gradient[:, :, others].abs().max() == 0
    added = torch.zeros(36, 36).masked_fill(~mask, -torch.inf)
    assert distance(model.forward_features(x, attn_mask=added), features) < rounding(torch.float32)


def test_a_mask_that_leaves_too_few_pairs_is_refused():
    model = merging("class", [8, 5, 2, 0])
    with pytest.raises(InputError, match="is_causal=True: no two tokens attend to the same tokens"):
        model.forward_features(images(), is_causal=True)
    causal = torch.ones(36, 36).tril().bool()
    with pytest.raises(InputError, match=r"attn_mask of shape \[36, 36\]: 8 tokens are to merge, and 0 have another"):
        model.forward_features(images(), attn_mask=causal)
    alike = merging("class", {"threshold": 0.5})
    plain = host("class")
    assert distance(*(net.forward_features(images(1) * 0 + 1, attn_mask=causal) for net in (alike, plain))) < 1e-5
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"8 tokens are to merge, and fewer have another"):
        compiled(images(), attn_mask=causal)
    performer = merging("class", [8, 5, 2, 0], mixer="performer")
    with pytest.raises(InputError, match="with B=2 or 1 and N=36"):
        performer.forward_features(images(), attn_mask=causal)


@pytest.mark.parametrize("low", [-1e9, -torch.inf, torch.finfo(torch.float32).min])
def test_attention_of_groups_under_a_mask_is_that_of_all_their_tokens(low):
    """A query that may read nothing but low values reads as without a mask; padding isn't read at all."""
    place = torch.tensor([[0, 1, 1, 2, 1, 3]])
    groups = Groups(place, torch.tensor([[1.0, 3.0, 1.0, 1.0]]))
    mask = torch.zeros(6, 6).masked_fill(torch.rand(6, 6) < 0.3, low)
    mask[:, 5], mask[2] = low, mask[1]
    mask[4] = mask[1]  # the group's queries have one mask
    mask[:, 0] = 0
    if low > -torch.inf:
        mask[3] = low
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    found = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=merge_mask(mask, groups))
    for head in range(2):
        for token, group in enumerate(place[0].tolist()):
            row = mask[token].double() - mask[token].double().max()
            logits = (k[0, head, place[0]].double() @ q[0, head, group].double()) / math.sqrt(8) + row
            expected = logits.softmax(0) @ v[0, head, place[0]].double()
            torch.testing.assert_close(found[0, head, group].double(), expected, rtol=1e-5, atol=1e-5)


def test_positions_of_a_group_are_the_mean_direction():
    place = torch.tensor([[0, 1, 1, 0, 2]])
    groups = Groups(place, torch.tensor([[2.0, 2.0, 1.0]]))
    angles = torch.rand(2, 5, 4)
    for given in (angles, angles[0], angles[None]):
        table = merge_table(torch.cat([given.sin(), given.cos()], dim=-1), groups)
        for head, group in torch.cartesian_prod(torch.arange(table.shape[1]), torch.arange(3)).tolist():
            mean = torch.polar(torch.ones(()), angles[head, place[0] == group]).mean(0)
            expected = torch.cat([torch.sin(mean.angle()), torch.cos(mean.angle())])
            torch.testing.assert_close(table[0, head, group], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_of_a_large_group_in_half_precision(dtype):
    angles = 0.3 * torch.rand(1000, 4)
    table = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
    groups = Groups(torch.zeros(1, 1000, dtype=torch.int64), torch.tensor([[1000.0]]))
    sine, cosine = table.double().sum(0).chunk(2)
    expected = torch.cat([sine, cosine]) / torch.cat([torch.hypot(sine, cosine)] * 2)
    assert (merge_table(table, groups)[0, 0, 0].double() - expected).abs().max() < torch.finfo(dtype).eps


def test_a_group_without_a_direction_has_a_gradient():
    table = torch.tensor([[0.0, 1.0], [0.0, -1.0]], requires_grad=True)
    merged = merge_table(table, Groups(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[2.0]])))
    assert merged.tolist() == [[[[0.0, 0.0]]]]
    (gradient,) = torch.autograd.grad(merged.sum(), table)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["class", "eva", "rope_mixed"])
@pytest.mark.parametrize("merge", [MERGE, 4, 0.4, {"threshold": 0.5}], ids=str)
def test_saved_reloaded_and_reverted(kind, merge, tmp_path):
    model, x = host(kind), images(1)
    own, keys, modules = model(x), list(model.state_dict()), [type(module) for module in model.modules()]
    timm_vix.convert(model, "softmax", merge=merge)
    assert list(model.state_dict()) == keys
    value = model(x)
    assert distance(value, own) > 1e-4
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert loaded.blocks.steps == model.blocks.steps
    assert torch.equal(loaded(x), value)
    for reverted in (model, loaded):
        timm_vix.revert(reverted)
        assert torch.equal(reverted(x), own)
        assert [type(module) for module in reverted.modules()] == modules


@pytest.mark.parametrize("merge", [MERGE, 0.4], ids=str)
@pytest.mark.parametrize("mixer, rope", [("softmax", None), ("softmax", "axial"), ("performer", "axial")])
def test_created_as_converted(mixer, rope, merge, tmp_path):
    size = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    plain = lively(timm.create_model("vix_softmax_cifar", rope=rope, **size).eval())
    model = timm.create_model("vix_softmax_cifar", mixer=mixer, rope=rope, merge=merge, **size).eval()
    model.load_state_dict({**model.state_dict(), **plain.state_dict()})
    timm_vix.convert(plain, mixer, merge=merge)
    x = images()
    assert torch.equal(model(x), plain(x))
    for number, saved in enumerate((model, plain)):
        save_for_hf(saved, tmp_path / str(number), safe_serialization=True)
        loaded = timm.create_model(f"local-dir:{tmp_path / str(number)}", pretrained=True).eval()
        assert loaded.blocks.steps == model.blocks.steps
        assert torch.equal(loaded(x), model(x))


def test_layers_that_need_the_grid_stand_before_the_first_merge():
    size = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, layers=[0, 1])
    model = timm.create_model("vix_nystrom_cifar", merge=MERGE, **size)
    assert model.blocks.steps == MERGE
    with pytest.raises(InputError, match="blocks.1 has NystromAttention, which needs the whole patch grid"):
        timm.create_model("vix_nystrom_cifar", merge=4, **size)


def test_what_a_model_is_created_with_stays(tmp_path):
    given = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, merge=MERGE)
    model, x = lively(timm.create_model("vix_softmax_cifar", **given).eval()), images()
    own = model(x)
    timm_vix.convert(model, "performer", [3])
    value = model(x)
    assert distance(value, own) > 1e-4
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), value)
    for converted in (model, loaded):
        with pytest.raises(InputError, match=r"merge=0: the model was created with merge=\[0, 3, 5, 2\]"):
            timm_vix.convert(converted, "softmax", merge=0)
        timm_vix.revert(converted)
        assert torch.equal(converted(x), own)


@pytest.mark.parametrize("text, merge", [("40", 40), ("[0,3,5,2]", MERGE), ("0.5", 0.5), ("{'threshold':0.9}", None)])
def test_keywords_of_a_command_line(text, merge):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    keywords = parser.parse_args(["--model-kwargs", f"merge={text}", "depth=4"]).model_kwargs
    for name in ("vix_softmax_tiny_rope", "vix_from_timm"):
        own = {"mixer": "softmax"} if name == "vix_from_timm" else {}
        model = timm.create_model(name, device="meta", **own, **keywords)
        assert model.blocks.merge == ({"threshold": 0.9} if merge is None else merge)


def test_a_delta_knows_how_its_model_merges(tmp_path):
    model = merging()
    timm_vix.freeze_except(model, "head")
    timm_vix.save_delta(model, tmp_path / "delta.safetensors")
    timm_vix.load_delta(merging(), tmp_path / "delta.safetensors")
    with pytest.raises(
        InputError, match=r"blocks is merging\(merge=\[0, 3, 5, 2\]\) in the file and merging\(merge=4\)"
    ):
        timm_vix.load_delta(merging(merge=4), tmp_path / "delta.safetensors")


def test_merging_stays_until_it_is_taken_away():
    model, x = host(), images()
    own = model(x)
    timm_vix.convert(model, "softmax", merge=5)
    merged = model(x)
    timm_vix.convert(model, "performer", layers=[3])
    assert isinstance(model.blocks, MergingBlocks) and distance(model(x), merged) > 1e-4
    timm_vix.convert(model, "softmax")
    assert torch.equal(model(x), merged)
    timm_vix.convert(model, "softmax", merge=0)
    assert torch.equal(model(x), own) and type(model.blocks) is torch.nn.Sequential
    assert "merge" not in getattr(model, "_model_args", {})


@pytest.mark.parametrize("kind", ["class", "eva"])
def test_merging_alone_is_that_of_softmax(kind, tmp_path):
    model, named, x = host(kind), merging(kind), images()
    timm_vix.convert(model, merge=MERGE)
    assert torch.equal(model(x), named(x))
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))


def test_merging_alone_leaves_the_mixers_as_they_are(tmp_path):
    model, x = host(), images()
    timm_vix.convert(model, "linformer", [0, 1], num_proj_tokens=4)
    lively(model)
    before, learned = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    for keywords in (dict(merge=[0, 3, 5, 2]), dict(scale_logits=9)):
        timm_vix.convert(model, **keywords)
        assert all(torch.equal(value, learned[name]) for name, value in model.state_dict().items())
    assert distance(model(x), before) > 1e-4
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), model(x))
    timm_vix.convert(model, merge=0, scale_logits=0)
    assert torch.equal(model(x), before)


def test_a_model_by_name_may_only_merge(tmp_path):
    source = dict(source=HOSTS["class"][0], img_size=(56, 40), patch_size=8, embed_dim=32, depth=4, num_heads=2)
    model, x = timm.create_model("vix_from_timm", merge=0.4, **source).eval(), images()
    assert model.blocks.steps == merge_steps(0.4, 4)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(loaded(x), model(x)) and loaded.blocks.steps == model.blocks.steps


def test_what_is_set_on_a_block_of_a_pass_is_set_on_the_block():
    model = merging()
    for block in model.blocks:
        block.attn, block.note = torch.nn.Identity(), "set"
    assert all(type(b.attn) is torch.nn.Identity and b.note == "set" for b in model.blocks.children())
    for block in model.blocks:
        del block.note
    assert not any(hasattr(block, "note") for block in model.blocks)


def test_a_block_of_a_pass_can_be_copied():
    model, tokens = merging(), torch.randn(2, 36, 32)
    first = next(iter(model.blocks))
    assert torch.equal(copy.deepcopy(first)(tokens), model.blocks[0](tokens))


def test_the_table_tells_what_merges():
    model = host()
    conversion = timm_vix.convert(model, "nystrom", {0: "nystrom"}, merge=[0, 3, 40, 40], num_landmarks=35)
    assert [row.merged for row in conversion.rows] == [0, 3, 16, 8]
    assert "merges 16" in conversion.table()


@pytest.mark.parametrize("mixer", [name for name, kind in MIXERS.items() if issubclass(kind, AttentionMechanism)])
def test_any_mixer_with_keys_may_stand_before_the_first_merge(mixer):
    model, x = host(), images()
    timm_vix.convert(model, mixer, {0: mixer, 1: mixer})
    features = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    timm_vix.convert(model, merge=MERGE)
    merged = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert torch.equal(merged[0], features[0])
    # in the second layer the same attention, then 3 tokens merge: most patches stay where they were
    same = (merged[1] - features[1]).abs().amax(1).flatten(1) < 1e-4
    assert all(35 - 6 <= int(number) < 35 for number in same.sum(1))


@pytest.mark.parametrize(
    "merge, left",
    [(4, [31, 27, 23, 19]), (20, [18, 9, 5, 3]), ([0, 3, 5, 2], [35, 32, 27, 25]), (0.5, [31, 27, 22, 18])],
)
def test_no_layer_merges_more_than_half(merge, left):
    found, now = [], 35
    for step in merge_steps(merge, 4):
        now -= num_merged(step, 35, now)
        found.append(now)
    assert found == left
    model = merging(merge=merge)
    maps = model.forward_intermediates(images(), intermediates_only=True)
    assert [len(m[0].flatten(1).T.unique(dim=0)) for m in maps] == left


@pytest.mark.parametrize("merge", [10**6, 1e-9, {"threshold": -1}], ids=str)
@pytest.mark.parametrize("size, left", [((56, 40), [18, 9, 5, 3]), ((16, 8), [1, 1, 1, 1]), ((8, 8), [1, 1, 1, 1])])
def test_no_merge_leaves_nothing(size, left, merge):
    """Each layer merges at most one half of what is there; one patch stays, and so do prefix tokens."""
    model, x = host("registers", img_size=size), torch.randn(1, 3, *size)
    rows = timm_vix.convert(model, "softmax", merge=merge).rows
    if isinstance(merge, int):
        assert [row.merged for row in rows] == [a - b for a, b in zip([math.prod(size) // 64, *left], left)]
    maps = model.forward_intermediates(x, intermediates_only=True, return_prefix_tokens=True)
    kinds = [len(patches.flatten(2)[0].T.unique(dim=0)) for patches, _ in maps]
    assert kinds[-1] == (5 if merge == 1e-9 and left[0] > 1 else left[-1])  # the share goes by a fourth in each layer
    assert all(torch.isfinite(patches).all() and prefix.shape == (1, 3, 32) for patches, prefix in maps)


def test_a_share_leaves_no_token_more():
    for patches in (10, 100, 196, 400):
        for depth in (4, 12, 24):
            left = patches
            for step in merge_steps(0.3, depth):
                left -= num_merged(step, patches, left)
            assert left == math.ceil(3 * patches / 10)


def test_the_first_blocks_merge_as_they_did():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, embed_dim=32, num_heads=2).eval()
    for merge in (0.4, 2, [1, 2, 3, 1]):
        timm_vix.convert(model, "softmax", merge=merge)
        features = model.forward_intermediates(x := torch.randn(2, 3, 64, 64), indices=[1], intermediates_only=True)[0]
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([1])
        assert torch.equal(pruned.forward_intermediates(x, indices=[1], intermediates_only=True)[0], features)
        timm_vix.convert(pruned, "performer")  # takes over how the model merges
        timm_vix.convert(pruned, "softmax")
        assert distance(pruned.forward_intermediates(x, indices=[1], intermediates_only=True)[0], features) < 1e-5


@pytest.mark.parametrize("merge", [MERGE, [0, 0, 0, 4], 0.4, 2], ids=str)
def test_a_pruned_model_that_was_created_with_merging_is_converted(merge):
    size = dict(img_size=(56, 40), patch_size=8, embed_dim=32, depth=4, num_heads=2)
    model, x = timm.create_model("vix_softmax_cifar", merge=merge, **size).eval(), images()
    model.prune_intermediate_layers([1])
    features = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    timm_vix.convert(model, "performer")
    timm_vix.convert(model, "softmax")
    assert torch.equal(model.forward_intermediates(x, indices=[1], intermediates_only=True)[0], features)
    unmerged = timm.create_model("vix_softmax_cifar", merge=0, img_size=32, patch_size=8, depth=2, num_classes=5)
    assert timm_vix.convert(unmerged, merge=4).rows[0].merged == 4
    with pytest.raises(InputError, match="merge=3: the model was created with merge="):
        timm_vix.convert(model, merge=3)


def test_threshold_merges_what_is_alike():
    model, x = without_positions("class"), repeating_images(1)
    expected = model(x)
    timm_vix.convert(model, "softmax", merge={"threshold": 0.9999})
    assert distance(model(x), expected) < rounding(torch.float32)
    last = model.forward_intermediates(x, intermediates_only=True)[-1]
    # three kinds are left, some of them several times, where all of a kind came to lie in one half
    assert 3 <= len(last.flatten(2)[0].T.unique(dim=0)) <= 8
    timm_vix.convert(model, "softmax", merge={"threshold": 1.0})
    with pytest.raises(InputError, match="expected a batch of 1, got 2"):
        model(images(2))
    with pytest.raises(
        InputError, match="known only when the model runs; a model for export takes a number or a share"
    ):
        torch.export.export(model, (x,), strict=False)


@pytest.mark.parametrize("kind", ["class", "eva", "vix_rope"])
def test_checkpointing_changes_nothing(kind):
    model, x = merging(kind), images()
    expected = gradients(model, x)
    model.set_grad_checkpointing()
    model.train()
    assert distance(gradients(model, x), expected) < rounding(torch.float32)


@pytest.mark.parametrize("kind", ["class", "eva", "vix_rope"])
def test_hooks_of_blocks_see_the_whole_grid(kind):
    """Whatever they are, and whether they came before or after the conversion."""
    model, x, seen = host(kind), images(), {}
    blocks = list(model.blocks)
    early = blocks[2].register_forward_hook(lambda block, args, y: seen.update(early=(block, args[0], y)))
    timm_vix.convert(model, "softmax", merge=MERGE)
    value, maps = model(x), model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
    assert [type(block.attn) for block in blocks] == [type(block.attn) for block in model.blocks]
    handles = [
        early,
        *(block.register_forward_hook(lambda block, args, y: seen.update({block: y})) for block in blocks),
        blocks[2].register_forward_pre_hook(lambda block, args: seen.update(given=args[0])),
        blocks[3].register_full_backward_hook(lambda block, before, after: seen.update(slope=before[0])),
    ]
    assert torch.equal(model(x), value)
    P = model.num_prefix_tokens
    for block, expected in zip(blocks, maps):
        assert torch.equal(seen[block][:, P:], expected)
    assert seen["early"][0] is blocks[2] and torch.equal(seen["early"][2], seen[blocks[2]])
    assert torch.equal(seen["given"], seen[blocks[1]]) and torch.equal(seen["early"][1], seen["given"])
    model(x).square().sum().backward()
    assert seen["slope"].shape == seen[blocks[2]].shape and seen["slope"].abs().sum() > 0
    for handle in handles:
        handle.remove()
    of_all = register_module_forward_hook(lambda module, args, y: seen.update({module: y}))
    seen.clear()
    model(x)
    of_all.remove()
    assert all(torch.equal(seen[block][:, P:], expected) for block, expected in zip(blocks, maps))
    double = blocks[1].register_forward_hook(lambda block, args, y: 2 * y)
    kept = [blocks[2].register_forward_pre_hook(lambda block, args: (args[0] / 2,))]
    assert distance(model(x), value) < rounding(torch.float32), "what hooks return is taken"
    for handle in (double, *kept):
        handle.remove()
    assert torch.equal(model(x), value)


@pytest.mark.parametrize("kind", ["class", "eva"])
@pytest.mark.parametrize("wrapped", ["forward", "module"])
def test_what_wraps_a_block_hands_keywords_on(wrapped, kind):
    class Wrapper(torch.nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **kwargs):
            return self.block(x, **kwargs)

    class Deaf(Wrapper):
        def forward(self, x, rope=None, attn_mask=None):
            return self.block(x, rope=rope) if kind == "eva" else self.block(x)

    model, x = host(kind), images()
    timm_vix.convert(model, "softmax", merge=MERGE)
    value, block = model(x), model.blocks[2]
    own = block.forward
    if wrapped == "forward":
        block.forward = lambda x, **kwargs: own(x, **kwargs)
    else:
        model.blocks[2] = Wrapper(block)
    assert distance(model(x), value) < rounding(torch.float32)
    if wrapped == "forward":
        block.forward = lambda x, rope=None, attn_mask=None: own(x)
    else:
        model.blocks[2] = Deaf(block)
    with pytest.raises(InputError, match="blocks.2 is called by a forward or a wrapper without keyword arguments"):
        model(x)


def test_two_sizes_in_turn_with_checkpointing():
    model = merging("vix_rope", dynamic_img_size=True, merge=4)
    pair = [torch.randn(1, 3, 56, 40), torch.randn(1, 3, 40, 64)]
    expected = sum(gradients(model, x)[x.numel() :] for x in pair)
    model.set_grad_checkpointing()
    model.train().zero_grad()
    values = [model(x).square().sum() for x in pair]  # both forward passes first
    sum(values).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(found, expected) < rounding(torch.float32)


def test_threads_do_not_meet():
    model, pair = merging("eva"), [images(1), images(3)]
    with torch.no_grad():
        expected = [model(x) for x in pair]
        wrong = []

        def work(number):
            for _ in range(20):
                if distance(model(pair[number]), expected[number]) > rounding(torch.float32):
                    wrong.append(number)

        threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mixer", FOLLOWERS)
def test_half_precision(mixer, autocast):
    model, x = without_positions("average"), repeating_images()
    timm_vix.convert(model, mixer)
    expected = model(x)

    def half():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x) if autocast else copy.deepcopy(model).bfloat16()(x.bfloat16())

    without = half()
    timm_vix.convert(model, mixer, merge=EQUAL)
    value = half()
    assert value.dtype == torch.bfloat16
    assert distance(value, expected) < 3 * distance(without, expected) < 0.2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["class", *(pytest.param(one, marks=pytest.mark.slow) for one in ("eva", "vix_rope"))])
@since("2.9", "exports no batch of any size")
def test_export_and_compile(kind):
    model = merging(kind)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    x = images(3)
    assert distance(program.module()(x), model(x)) < rounding(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(compiled(x), model(x)) < rounding(torch.float32)
    assert distance(gradients(compiled, x), gradients(model, x)) < rounding(torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = merging(), images()
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (value,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert distance(torch.from_numpy(value), model(x)) < rounding(torch.float32)


@pytest.mark.parametrize(
    "merge, told",
    [
        (-1, "merge=-1: expected the number"),
        (0.0, "merge=0.0: expected the number"),
        (1.0, "above 0 and below 1"),
        (True, "merge=True"),
        ("8", "merge='8'"),
        ([1, 2], "has 2 numbers; the model has 4 layers"),
        ([1, 2, 3, -1], "merge="),
        ({"threshold": 2}, "between -1 and 1"),
        ({"above": 0.5}, "threshold"),
        ({"threshold": math.nan}, "between -1 and 1"),
        (math.nan, "above 0 and below 1"),
        (4.0, "merge=4.0: expected the number"),
        ([], "has 0 numbers; the model has 4 layers"),
    ],
)
def test_wrong_amounts_are_refused(merge, told):
    model = host()
    before = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=told.replace("[", r"\[")):
        timm_vix.convert(model, "softmax", merge=merge)
    assert [type(module) for module in model.modules()] == before
    with pytest.raises(InputError, match=told.replace("[", r"\[")):
        timm.create_model("vix_softmax_cifar", depth=4, merge=merge)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(mixer="nystrom", merge=4), r"blocks.\d has NystromAttention, which needs the whole patch grid"),
        (dict(mixer="fnet", layers=[1], merge=MERGE), "blocks.1 has FourierMixing, without keys"),
        (dict(mixer="pool", layers=[3], merge=MERGE), "blocks.3"),
    ],
)
def test_layers_that_need_the_grid_are_refused(arguments, told):
    model = host()
    before = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=told):
        timm_vix.convert(model, **arguments)
    assert [type(module) for module in model.modules()] == before
    timm_vix.convert(model, "softmax", merge=MERGE)
    with pytest.raises(InputError, match=told):
        timm_vix.convert(model, **{name: value for name, value in arguments.items() if name != "merge"})


def test_other_blocks_are_refused():
    model = timm.create_model("vix_softmax_cifar", block="parallel", depth=4)
    with pytest.raises(InputError, match="is a ParallelThingsBlock; tokens can merge in Block and EvaBlock"):
        timm_vix.convert(model, "softmax", merge=4)
    with pytest.raises(InputError, match="is a ParallelThingsBlock; tokens can merge in Block and EvaBlock"):
        timm.create_model("vix_softmax_cifar", block="parallel", depth=4, merge=4)


def test_torchscript_is_refused():
    with pytest.raises(InputError, match=r"torch\.export"):
        torch.jit.script(merging())


def test_opposite_positions_have_no_direction_in_any_dtype():
    """DINOv3's shortest wave is half of the grid, so that two tokens may have opposite angles."""
    angles = torch.tensor([[0.3, 1.0], [0.3 + math.pi, 1.2]], dtype=torch.float64)
    groups = Groups(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[2.0]]))
    tables = [torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype) for dtype in (torch.float32, torch.float64)]
    single, double = (merge_table(table, groups)[0, 0, 0].double() for table in tables)
    assert torch.allclose(single, double, atol=1e-4)
    assert double[[0, 2]].abs().max() < 1e-12
    assert torch.allclose(double[[1, 3]], torch.tensor([math.sin(1.1), math.cos(1.1)], dtype=torch.float64))


def test_blocks_that_came_later_are_not_left_out():
    model = host()
    timm_vix.convert(model, "softmax", merge=2)
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    x = torch.randn(1, 3, 56, 40)
    for call in (model, model.forward_intermediates):
        with pytest.raises(InputError, match="has 5 blocks, and tokens were to merge in 4"):
            call(x)
    assert "(0-4): 5 x MergingVitBlock(" in repr(model)  # which a debugger asks for, whatever its state
    timm_vix.convert(model, merge=1)
    other = copy.deepcopy(model)
    timm_vix.revert(other)
    assert distance(model(x), other(x)) > 1e-3 and len(other.blocks) == 5
