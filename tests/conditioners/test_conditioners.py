"""What every conditioner must do, and the errors of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tessella import config, registry
from tessella.conditioners.base import Conditioner
from tessella.conditioners.image import Image
from tessella.conditioners.label import Label
from tessella.conditioners.none import Unconditional
from tessella.conditioners.prefix import Prefix
from tessella.errors import ConfigError

DIM = 16

EXAMPLES: dict[str, dict[str, Any]] = {
    "label": {"num_classes": 5},
    "none": {},
    "image": {"size_px": [8, 12], "patch_px": 4, "num_layers": 1, "num_heads": 2},
    "prefix": {"num_vectors": 3, "in_dim": 7},
}
every = pytest.mark.parametrize("name", EXAMPLES)
conditional = pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "none"])


def make(name: str, **options: Any) -> Conditioner:
    torch.manual_seed(0)
    conditioner: Conditioner = config.build("conditioners", {"name": name, **EXAMPLES[name], **options}, dim=DIM)
    return conditioner.eval()


def conditions(name: str, batch_size: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    shapes = {"image": (batch_size, 3, 8, 12), "prefix": (batch_size, 3, 7)}
    return torch.arange(batch_size) % 5 if name == "label" else torch.randn(shapes[name], generator=rng)


def test_every_registered_conditioner_has_an_example() -> None:
    assert registry.names("conditioners") == sorted(EXAMPLES)


@every
def test_null(name: str) -> None:
    conditioner = make(name)
    null = conditioner.null(4)
    assert null.shape == (4, conditioner.length, DIM)
    assert torch.equal(conditioner(None, 4), null)
    assert (null == null[:1]).all()
    null.sum().backward()
    assert any(parameter.grad is not None for parameter in conditioner.parameters()), "the null is learned"


@every
def test_spec_builds_the_same_again(name: str) -> None:
    spec = config.spec_of(make(name), leave_out=frozenset({"dim"}))
    assert spec["name"] == name
    assert config.spec_of(config.build("conditioners", spec, dim=DIM), leave_out=frozenset({"dim"})) == spec


@conditional
def test_conditions_are_told_apart(name: str) -> None:
    conditioner = make(name)
    embedded = conditioner(conditions(name, 4), 4)
    assert embedded.shape == (4, conditioner.length, DIM)
    rows = torch.cat([embedded, conditioner.null(1)]).flatten(1)
    assert len(rows.unique(dim=0)) == 5
    torch.testing.assert_close(conditioner(conditions(name, 4)[:1], 1), embedded[:1])


@conditional
def test_training_drops_conditions_at_the_rate_it_says(name: str) -> None:
    conditioner = make(name, dropout=0.25).train()
    torch.manual_seed(0)
    dropped = (conditioner(conditions(name, 2000), 2000) == conditioner.null(2000)).flatten(1).all(1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.04)  # four standard deviations
    conditioner.eval()
    assert not (conditioner(conditions(name, 50), 50) == conditioner.null(50)).flatten(1).all(1).any()


@conditional
def test_training_on_nothing_is_refused(name: str) -> None:
    conditioner = make(name).train()
    with pytest.raises(ValueError, match=rf'must give one for each sample, as batch\["{conditioner.batch_key}"\]'):
        conditioner(None, 4)
    make(name, dropout=1.0).train()(None, 4)  # which would drop it anyway
    make("none").train()(None, 4)


@conditional
def test_all_or_nothing_dropout(name: str) -> None:
    for dropout in (0.0, 1.0):
        conditioner = make(name, dropout=dropout).train()
        dropped = (conditioner(conditions(name, 20), 20) == conditioner.null(20)).flatten(1).all(1)
        assert (dropped == (dropout == 1)).all()


@conditional
def test_one_condition_for_each_sample(name: str) -> None:
    with pytest.raises(ValueError, match="3 samples but 2 conditions"):
        make(name)(conditions(name, 2), 3)


def test_label_table_ends_with_the_null() -> None:
    label = Label(1000, DIM)
    assert label.embedding.weight.shape == (1001, DIM)
    assert torch.equal(label.null(2), label.embedding(torch.tensor([[1000], [1000]])))
    assert torch.equal(label.embed(torch.tensor([7])), label.embedding(torch.tensor([[7]])))


def test_image_tokens_are_in_raster_order_and_know_their_place() -> None:
    image = make("image")
    flat = image(torch.ones(1, 3, 8, 12), 1)[0]
    assert len(flat.unique(dim=0)) == image.length == 6
    # Without the encoder, a patch is told by its own pixels alone.
    assert isinstance(image, Image)
    image.encoder.blocks = torch.nn.ModuleList()
    picture = torch.ones(1, 3, 8, 12)
    picture[..., 4:, 8:] = -1  # row 1, column 2
    assert (image(picture, 1)[0] != image(torch.ones(1, 3, 8, 12), 1)[0]).any(-1).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("conditioner", "condition", "message"),
    [
        (Label(5, DIM), torch.tensor([0, 5]), r"labels must lie in \[0, 5\), got 0 .. 5"),
        (Label(5, DIM), torch.tensor([-1, 2]), r"labels must lie in \[0, 5\), got -1 .. 2"),
        (Label(5, DIM), torch.zeros(2), r"labels must be integers \[B\], got torch.float32 \[2\]"),
        (Label(5, DIM), torch.zeros(2, 1).int(), r"labels must be integers \[B\], got torch.int32 \[2, 1\]"),
        (Unconditional(DIM), torch.zeros(2).int(), r"there are no conditions here, got one of shape \[2\]; pass None"),
        (make("image"), torch.zeros(2, 3, 12, 8), r"pictures must be \[B, 3, 8, 12\], got \[2, 3, 12, 8\]"),
        (Prefix(3, 7, DIM), torch.zeros(2, 3, 8), r"vectors must be \[B, 3, 7\], got \[2, 3, 8\]"),
    ],
)
def test_refuses_conditions(conditioner: Conditioner, condition: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conditioner(condition, 2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("label", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("label", {"dropout": 1.5}, r"dropout must lie in \[0, 1\], got 1.5"),
        ("image", {"patch_px": 5}, "patch_px must divide both sides of size_px, 8 x 12, got 5"),
        ("prefix", {"num_vectors": 0}, "num_vectors must be at least 1, got 0"),
        ("none", {"dropout": 0.1}, "unknown key 'conditioner.dropout'"),
    ],
)
def test_refuses_arguments(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **options)


def test_image_through_strided_convolutions() -> None:
    """Halved as often as a patch is large, to the full width; what a patch shows is at its place."""
    image = make("image", stem="conv", patch_px=4)
    assert isinstance(image, Image)
    convolutions = [layer for layer in image.patches.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [(3, 8, 2), (8, 16, 2), (16, 16, 1)]
    image.encoder.blocks = torch.nn.ModuleList()
    picture = torch.randn(1, 3, 8, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(image(picture, 1)[0, 5, 0], picture)
    seen = gradient[0].abs().sum(0)  # by the norms a little of everything
    assert seen[3:, 7:].mean() > 4 * seen[:3, :7].mean()
    with pytest.raises(ValueError, match="power of two"):
        make("image", size_px=[12, 12], patch_px=6, stem="conv")
