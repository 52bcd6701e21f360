"""Grids, error maps and token colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessella.reporting.pictures import (
    distinct_colours,
    error_maps,
    grid,
    oklab_to_rgb,
    principal_components,
    save_image_grid,
    similarity_colours,
    to_pictures,
    token_maps,
)


def test_grid_by_hand() -> None:
    cells = [np.full((1, 1, 3), value, np.uint8) for value in (10, 20, 30)]
    assert grid(cells, columns=2, gap=1)[..., 0].tolist() == [[10, 255, 20], [255, 255, 255], [30, 255, 255]]
    tall = [np.zeros((2, 1, 3), np.uint8), np.zeros((1, 2, 3), np.uint8)]
    assert grid(tall, columns=2, gap=0)[..., 0].tolist() == [[0, 255, 0, 0], [0, 255, 255, 255]]
    with pytest.raises(ValueError, match="pictures is empty"):
        grid([], columns=2)


def test_saved_grid_is_exact_and_leaves_nothing_else(tmp_path: Path) -> None:
    x = torch.randint(0, 256, (4, 3, 5, 6), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "samples" / "grid.png"
    for _ in range(2):  # the second time it is replaced
        save_image_grid(x / 127.5 - 1, file)
    assert [path.name for path in file.parent.iterdir()] == ["grid.png"]
    with Image.open(file) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (12, 14, 3)
    for position, (top, left) in enumerate([(0, 0), (0, 8), (7, 0), (7, 8)]):
        assert np.array_equal(pixels[top : top + 5, left : left + 6], x[position].permute(1, 2, 0).numpy())


def test_save_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.png"):
        save_image_grid(torch.zeros(1, 3, 2, 2), tmp_path / "grid.jpg")
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\].*got \[3, 2, 2\]"):
        save_image_grid(torch.zeros(3, 2, 2), tmp_path / "grid.png")
    assert not any(tmp_path.iterdir())


def test_grey_pictures_become_rgb() -> None:
    assert to_pictures(torch.tensor([[[[-1.0, 1.0]]]]))[0].tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_error_map_by_hand() -> None:
    x = torch.zeros(1, 3, 1, 3)
    x_hat = torch.tensor([0.0, 0.2, -5.0]).expand(1, 3, 1, 3)
    # |0 - 0.2| is a tenth of the range [-1, 1]; five times that is half of 255
    assert error_maps(x, x_hat, gain=5)[0][0, :, 0].tolist() == [0, 128, 255]


def test_oklab_reference_colours() -> None:
    lab = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0.62796, 0.22486, 0.12585], [0.45201, -0.03246, -0.31153]])
    assert oklab_to_rgb(lab).tolist() == [[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]]


def test_principal_components() -> None:
    rng = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=rng).double())[0]
    scale = torch.tensor([9.0, 3.0, 1.0, 0.1, 0.01]).double()
    latent = torch.randn(500, 5, generator=rng).double() * scale
    found = principal_components(latent @ rotation.T + 7, 3)
    for direction in range(3):
        pair = torch.stack([found[:, direction], latent[:, direction]])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.99
    assert principal_components(torch.tensor([[1.0], [3.0]]), 3).tolist() == [[-1, 0, 0], [1, 0, 0]]


def test_small_grids_of_codes_get_distinct_colours_and_neighbours_similar_ones() -> None:
    levels = torch.linspace(-1, 1, 8)
    codebook = torch.cartesian_prod(levels, levels, levels)
    colours = similarity_colours(codebook)
    assert len(colours.unique(dim=0)) == 512
    distance = torch.cdist(codebook, codebook)
    shade = torch.cdist(colours.float(), colours.float())
    neighbours = (distance > 0) & (distance < 0.7)
    assert shade[neighbours].mean() < 0.5 * shade[distance > 2].mean()


@given(st.integers(0, 2**62))
def test_distinct_colours_depend_on_the_index_alone(index: int) -> None:
    assert torch.equal(distinct_colours(torch.tensor([[index, 0]]))[0, 0], distinct_colours(torch.tensor(index)))


def test_distinct_colours_of_neighbours_differ() -> None:
    colours = distinct_colours(torch.arange(1000)).float()
    assert (colours[1:] - colours[:-1]).norm(dim=1).min() > 40


def test_token_maps() -> None:
    codebook = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[[0, 5], [3, 0]]])[..., None]
    colours = similarity_colours(codebook).numpy()
    assert np.array_equal(token_maps(indices, codebook)[0], colours[indices[0, ..., 0].numpy()])
    assert np.array_equal(token_maps(indices, None)[0], distinct_colours(indices[0, ..., 0]).numpy())


def test_token_maps_of_several_codebooks_lie_side_by_side() -> None:
    tables = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    indices = torch.randint(0, 6, (2, 4, 5, 3), generator=torch.Generator().manual_seed(1))
    shown = token_maps(indices, tables)
    assert len(shown) == 2
    assert shown[1].shape == (9, 11, 3)
    assert np.array_equal(shown[1][:4, 6:], similarity_colours(tables[1]).numpy()[indices[1, ..., 1].numpy()])
    assert np.array_equal(shown[1][5:, :5], similarity_colours(tables[2]).numpy()[indices[1, ..., 2].numpy()])


def test_token_map_errors() -> None:
    with pytest.raises(ValueError, match=r"\[B, h, w, K\] or \[B, n, K\], got \[2, 3\]"):
        token_maps(torch.zeros(2, 3, dtype=torch.int64), None)
    with pytest.raises(ValueError, match=r"\[V, D\] or \[1, V, D\], got \[2, 4, 3\]"):
        token_maps(torch.zeros(1, 2, 2, 1, dtype=torch.int64), torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"\[0, 4\), got 4 to 4"):
        token_maps(torch.full((1, 2, 2, 1), 4), torch.zeros(4, 3))
