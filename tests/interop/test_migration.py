"""docs/migration.md: its pairs on the same codes, and that it leaves out no class and no argument."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vector_quantize_pytorch as theirs
from torch import Tensor
from torch.nn import functional as F

from tessella.quantizers import EMAVQ, FSQ, LFQ, VQ, Grouped, Residual, SimVQ

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def sections() -> dict[str, str]:
    """The page's parts by heading."""
    parts = re.split(r"^#+ (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", ["VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "FSQ", "LFQ", "SimVQ"])
def test_every_argument_has_its_row(name: str) -> None:
    signature = inspect.signature(getattr(theirs, name).__init__)
    named = [p.name for p in signature.parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
    rows = sections()[name]
    assert not [argument for argument in named if not re.search(rf"`{argument}[`=]", rows)]


def test_every_class_has_its_place() -> None:
    page = sections()
    classes = [name for name, value in vars(theirs).items() if inspect.isclass(value)]
    assert not [
        name for name in classes if name not in page and f"`{name}`" not in page["Classes without a counterpart"]
    ]


def data(dim: int) -> Tensor:
    return torch.randn(2, 30, dim)


def gradient(loss: Tensor, z: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(loss, z)
    return found


def test_moving_averages() -> None:
    one = theirs.VectorQuantize(
        dim=4, codebook_size=16, decay=0.9, commitment_weight=0.5, rotation_trick=False, eps=0.0
    )
    ours = EMAVQ(16, 4, decay=0.9, commitment_weight=0.5)
    ours.counts.fill_(10)  # sums here are discounted, there they are averages: a count of 1 is one of 1 / (1 - decay)
    ours.sums.copy_(10 * one.codebook)
    one._codebook.cluster_size.fill_(1)
    one._codebook.embed_avg.copy_(one._codebook.embed)
    z = data(4).requires_grad_()
    z_q, indices, loss = one(z)
    out = ours(z)
    assert torch.equal(out.indices[..., 0], indices)
    torch.testing.assert_close(out.z_q, z_q)
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(gradient(out.loss, z), gradient(loss, z))
    ours.after_step()
    used = indices.unique()
    torch.testing.assert_close(ours.codebook[used], one.codebook[used])


def test_codes_that_learn() -> None:
    one = theirs.VectorQuantize(
        dim=4, codebook_size=16, commitment_weight=0.5, rotation_trick=True, learnable_codebook=True, ema_update=False
    )  # fmt: skip
    ours = VQ(16, 4, commitment_weight=0.5, codebook_weight=0.5, estimator="rotation")
    with torch.no_grad():
        ours.embedding.copy_(one.codebook)
    z = data(4).requires_grad_()
    z_q, indices, loss = one(z)
    out = ours(z)
    assert torch.equal(out.indices[..., 0], indices)
    torch.testing.assert_close(out.z_q, z_q)
    torch.testing.assert_close(out.loss, 2 * loss)
    torch.testing.assert_close(gradient(out.loss, z), gradient(loss, z))


def test_directions() -> None:
    one = theirs.VectorQuantize(dim=4, codebook_size=16, use_cosine_sim=True, rotation_trick=False).eval()
    ours = VQ(16, 4, metric="cosine")
    with torch.no_grad():
        ours.embedding.copy_(one.codebook)
    z = data(4)
    z_q, indices, _ = one(z)
    assert torch.equal(ours(z).indices[..., 0], indices)
    torch.testing.assert_close(ours(z).z_q, F.normalize(z_q, dim=-1))


def stages(quantizer: Any) -> Residual:
    """Ours with the codes of a ResidualVQ."""
    ours = Residual(EMAVQ(16, 4), len(quantizer.layers))
    for stage, layer in zip(ours.stages, quantizer.layers, strict=True):
        assert isinstance(stage, EMAVQ)
        stage.sums.copy_(layer.codebook)
    return ours.eval()


def test_residual() -> None:
    one = theirs.ResidualVQ(dim=4, num_quantizers=3, codebook_size=16).eval()
    ours = stages(one)
    z = data(4)
    z_q, indices, _ = one(z)
    assert torch.equal(ours(z).indices, indices)
    torch.testing.assert_close(ours(z).z_q, z_q)
    torch.testing.assert_close(ours.indices_to_codes(indices), one.get_output_from_indices(indices))


def test_groups() -> None:
    one = theirs.GroupedResidualVQ(dim=8, groups=2, num_quantizers=3, codebook_size=16).eval()
    ours = Grouped(Residual(EMAVQ(16, 4), 3), 2).eval()
    for group, part in zip(ours.groups, one.rvqs, strict=True):
        group.load_state_dict(stages(part).state_dict())
    z = data(8)
    z_q, indices, _ = one(z)
    assert torch.equal(ours(z).indices, torch.cat(list(indices), -1))
    torch.testing.assert_close(ours(z).z_q, z_q)


@pytest.mark.parametrize(("options", "convention"), [({}, "wide"), ({"preserve_symmetry": True}, "symmetric")])
def test_finite_scalars(options: dict[str, bool], convention: Any) -> None:
    one, ours = theirs.FSQ(levels=[8, 5, 5], **options), FSQ([8, 5, 5], convention=convention)
    z = data(3)
    z_q, indices = one(z)
    assert torch.equal(ours(z).indices[..., 0], indices.long())
    torch.testing.assert_close(ours(z).z_q, z_q)


def test_bits_are_reversed() -> None:
    one, ours = theirs.LFQ(dim=5, codebook_scale=0.5), LFQ(dim=5, scale=0.5)
    z = data(5)
    z_q, indices, _ = one.eval()(z)
    out = ours(z)
    bits = ours.indices_to_digits(out.indices[..., 0])
    assert torch.equal((bits.flip(-1) << torch.arange(5)).sum(-1), indices)
    torch.testing.assert_close(out.z_q, z_q)


def test_linear_codes() -> None:
    one = theirs.SimVQ(dim=4, codebook_size=16, rotation_trick=False, commitment_weight=2.0)
    ours = SimVQ(16, 4, commitment_weight=0.5, codebook_weight=2.0)
    with torch.no_grad():
        ours.basis.copy_(one.frozen_codebook)
        ours.projection.weight.copy_(one.code_transform.weight)
        ours.projection.bias.zero_()
    z = data(4)
    z_q, indices, loss = one(z)
    out = ours(z)
    assert torch.equal(out.indices[..., 0], indices)
    torch.testing.assert_close(out.z_q, z_q)
    torch.testing.assert_close(out.loss, loss)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="grouped FSQ"):
        Residual(FSQ([5, 5]), 2)
