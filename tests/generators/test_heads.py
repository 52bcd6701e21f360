from __future__ import annotations

import torch
from torch import nn

from tessella.generators.heads import CodebookHeads

from .examples import LABEL, SMALL, STACK, Example


def test_position_n_is_of_codebook_n_mod_k() -> None:
    heads = CodebookHeads(2, 3, 4)
    for k, head in enumerate(heads):
        nn.init.constant_(head.weight, k + 1)
    logits = heads(torch.tensor([[1.0, 0.0]]).expand(2, 6, 2))
    assert logits.shape == (2, 2, 3, 4)
    assert logits[0, :, :, 0].tolist() == [[1, 2, 3], [1, 2, 3]]


def test_a_matrix_of_all_codebooks_loads_as_before() -> None:
    torch.manual_seed(0)
    matrix, hidden = torch.randn(3 * 4, 2), torch.randn(5, 6, 2)
    heads = CodebookHeads(2, 3, 4)
    heads.load_state_dict({"weight": matrix})
    torch.testing.assert_close(
        heads(hidden), torch.einsum("btkd,kvd->btkv", hidden.unflatten(1, (2, 3)), matrix.view(3, 4, 2))
    )
    again = CodebookHeads(2, 3, 4)
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again(hidden), heads(hidden))


def test_generators_of_several_codebooks_load_as_before() -> None:
    for example, place in (
        (Example("ar", {"conditioner": LABEL, **SMALL}, STACK), "head"),
        (
            Example(
                "coarse_to_fine",
                {"conditioner": LABEL, "num_clusters": 4, "coarse": {"name": "ar", **SMALL}, "fine": SMALL},
                STACK,
            ),
            "fine.head",
        ),
    ):
        generator = example.make()
        state = dict(generator.state_dict())
        matrix = torch.randn(3 * 11, 32)
        for key in [key for key in state if key.startswith(f"{place}.")]:
            del state[key]
        generator.load_state_dict({**state, f"{place}.weight": matrix})
        assert torch.equal(torch.cat([head.weight for head in generator.get_submodule(place)]), matrix)
