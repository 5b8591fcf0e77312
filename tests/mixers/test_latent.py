"""Latent attention against masked dense attention in float64, and against softmax attention where it is exact."""

import math

import pytest
import torch
from conftest import LAYOUTS, check_equal, condition, distance, gradients, heads_of, image, joined, rounding, small
from torch.nn.functional import pad


def groups_of(side, size):
    """For each row of an axis its group, and its place in the group; and the rows of a group."""
    rows = math.ceil(side / math.ceil(side / size))
    return [i // rows for i in range(side)], [i % rows for i in range(side)], rows


def pooling_matrix(grid, size, cells):
    """Latents x patches: the mean over those patches of a group that lie in a cell; and the groups of both."""
    (row_group, row, rows), (column_group, column, columns) = (groups_of(side, size) for side in grid)
    patches = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
    group = [(row_group[i], column_group[j]) for i, j in patches]

    def inside(place, cell, length, count):
        return math.floor(cell * length / count) <= place < math.ceil((cell + 1) * length / count)

    matrix, owner = [], []
    for g in sorted(set(group)):
        for a in range(cells[0]):
            for b in range(cells[1]):
                members = [
                    own == g and inside(row[i], a, rows, cells[0]) and inside(column[j], b, columns, cells[1])
                    for (i, j), own in zip(patches, group)
                ]
                if any(members):
                    matrix.append(torch.tensor(members).double() / sum(members))
                    owner.append(g)
    return torch.stack(matrix), owner, group


def masked(q, k, v, mask, bias):
    """Dense attention (queries x keys) with a mask: attended keys, values, and the log of the mass less q K^T."""
    logits = q @ k.T / q.shape[1] ** 0.5 + bias
    weights = logits.masked_fill(~mask, -torch.inf).softmax(1)
    mass = logits.masked_fill(~mask, -torch.inf).logsumexp(1)
    return weights @ k, weights @ v, mass - (q * (weights @ k)).sum(1) / q.shape[1] ** 0.5


def head(q, k, v, P, pool, owner, group, added=None):
    """One head: q, k, v (N, D) and what is added to the logits of keys (N) -> (N, D)."""
    added = torch.zeros(len(k), dtype=q.dtype) if added is None else added
    left = pool * (added[P:] > -1000)
    exists = left.sum(1) > 0  # latents of cells that are masked are left out
    pool, owner = (left / left.sum(1, keepdim=True))[exists], [g for g, here in zip(owner, exists) if here]
    latents = pool @ q[P:]
    of_latent = torch.tensor([[a == b for b in group] for a in owner])
    others = torch.tensor([[a != b for b in owner] for a in owner])
    once = -torch.tensor([owner.count(g) for g in owner], dtype=q.dtype).log()
    latent_k, latent_v, mass = masked(latents, k[P:], v[P:], of_latent, added[P:])
    latent_k, latent_v, mass = masked(latents, latent_k, latent_v, others, mass + once)
    same = torch.tensor([[a == b for b in group] for a in group])
    mask = torch.cat([torch.ones(len(same), P, dtype=torch.bool), same, of_latent.T], dim=1)
    keys, values = torch.cat([k, latent_k]), torch.cat([v, latent_v])
    _, y, _ = masked(q[P:], keys, values, mask, torch.cat([added, mass + once]))
    return torch.cat([(q[:P] @ k.T / q.shape[1] ** 0.5 + added).softmax(1) @ v, y])


CASES = [
    # image, of which 2x2 px are a patch; group_size, latents_per_group, and cells of a group in rows and columns
    ((14, 10), 4, 4, (2, 2)),
    ((14, 10), 3, 2, (2, 1)),
    ((14, 10), 3, 9, (3, 3)),  # a latent for each patch; groups of one row have fewer
    ((14, 10), 1, 4, (1, 1)),
    ((2, 16), 3, 3, (1, 3)),
    ((16, 2), 3, 1, (1, 1)),
]


@pytest.mark.parametrize("size, group_size, latents, cells", CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_masked_dense_attention(layout, size, group_size, latents, cells):
    model = small("latent", img_size=size, group_size=group_size, latents_per_group=latents, **LAYOUTS[layout])
    module = model.double().blocks[0].attn
    P = module.num_prefix_tokens
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    q, k, v = heads_of(module, x)
    parts = pooling_matrix(module.grid, group_size, cells)
    y = torch.stack([torch.stack([head(q[b, a], k[b, a], v[b, a], P, *parts) for a in (0, 1)]) for b in (0, 1)])
    check_equal(module(x), joined(module, y), x, 1e-12)


@pytest.mark.parametrize("size, group_size, latents, cells", CASES[:3], ids=str)
@pytest.mark.parametrize("layout", ["class", "no_prefix"])
def test_masked_tokens_are_left_out(layout, size, group_size, latents, cells):
    """Masked ones, others that count more or less, and a whole cell; but no group whose patches are all masked."""
    model = small("latent", img_size=size, group_size=group_size, latents_per_group=latents, **LAYOUTS[layout])
    module = model.double().blocks[0].attn
    P = module.num_prefix_tokens
    x = torch.randn(1, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    pool, owner, group = pooling_matrix(module.grid, group_size, cells)
    added = torch.randn(module.num_tokens, dtype=torch.float64)
    added[P:][pool[0] > 0] = added[P + 7] = -1e4
    q, k, v = heads_of(module, x)
    y = torch.stack([head(q[0, a], k[0, a], v[0, a], P, pool, owner, group, added) for a in (0, 1)]).unsqueeze(0)
    check_equal(module(x, attn_mask=added[None, None, None, :]), joined(module, y), x, 1e-12)


def test_locality_is_four_channels_of_queries_and_keys():
    """-a |p_i - p_j|^2 = 2 a p_i p_j - a |p_j|^2 - a |p_i|^2; a latent has the mean channels of its cell's patches."""
    (size, group_size, latents, cells), a = CASES[1], 0.05
    model = small("latent", img_size=size, group_size=group_size, latents_per_group=latents, locality=a)
    module = model.double().blocks[0].attn
    x = torch.randn(2, module.num_tokens, 32, dtype=torch.float64, requires_grad=True)
    place = torch.cartesian_prod(torch.arange(7), torch.arange(5)).double()
    square = place.square().sum(1, keepdim=True)
    of_q = torch.cat([2 * a * place, torch.ones_like(square), -a * square], dim=1)
    of_k = torch.cat([place, -a * square, torch.ones_like(square)], dim=1)
    of_q, of_k = (pad(t, (0, 0, 1, 0)).expand(2, 2, -1, -1) for t in (of_q, of_k))  # none for the class token
    q, k, v = heads_of(module, x)
    q, k = torch.cat([q / 4, of_q], dim=3) * math.sqrt(20), torch.cat([k, of_k], dim=3)  # as heads of width 20
    parts = pooling_matrix(module.grid, group_size, cells)
    y = torch.stack([torch.stack([head(q[b, i], k[b, i], v[b, i], 1, *parts) for i in (0, 1)]) for b in (0, 1)])
    check_equal(module(x), joined(module, y), x, 1e-12)


@pytest.mark.parametrize("rope", [None, "axial", "1d"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_softmax_attention_in_a_single_group(layout, rope):
    model = small("latent", rope, group_size=7, **LAYOUTS[layout]).double()
    softmax = small("softmax", rope, **LAYOUTS[layout]).double()
    softmax.load_state_dict(model.state_dict())
    x = image(model).double()
    assert distance(model(x), softmax(x)) < 1e-12
    assert distance(gradients(model, x), gradients(softmax, x)) < 1e-12


def test_is_softmax_attention_where_groups_are_equal_inside():
    """Latents lose nothing of groups whose patches are all alike."""
    model = small("latent", img_size=(16, 16), group_size=4, class_token=False, global_pool="avg").double()
    softmax = small("softmax", img_size=(16, 16), class_token=False, global_pool="avg").double()
    softmax.load_state_dict(model.state_dict())
    x = torch.randn(2, 2, 2, 32).double().repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1, 2)
    mine, theirs = model.blocks[0].attn(x), softmax.blocks[0].attn(x)
    assert distance(mine, theirs) < rounding(torch.float64, condition(lambda x: softmax.blocks[0].attn(x), x))


def test_a_group_whose_patches_are_all_masked_reads_the_others():
    """Latents lose nothing of the other groups, whose patches are all alike; a cell of them is masked, too."""
    model = small("latent", img_size=(16, 16), group_size=4).double()
    softmax = small("softmax", img_size=(16, 16)).double()
    softmax.load_state_dict(model.state_dict())
    masked = torch.zeros(8, 8, dtype=torch.bool)
    masked[:4, :4] = masked[:2, 4:6] = True
    x = torch.randn(2, 65, 32, dtype=torch.float64)
    x[:, 1:][:, ~masked.flatten()] = torch.randn(32, dtype=torch.float64)
    x.requires_grad_()
    read = torch.cat([torch.ones(1, dtype=torch.bool), ~masked.flatten()])[None, None, None, :]
    mine, theirs = (net.blocks[0].attn(x, attn_mask=read) for net in (model, softmax))
    check_equal(mine, theirs, x, rounding(torch.float64, 10))


@pytest.mark.parametrize("value", [0, 1.5, True], ids=repr)
@pytest.mark.parametrize("name", ["group_size", "latents_per_group"])
def test_wrong_keywords_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}: expected an integer of at least 1"):
        small("latent", **{name: value})
