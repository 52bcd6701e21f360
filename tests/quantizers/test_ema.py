from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from tessella.quantizers import EMAVQ


def with_codes(quantizer: EMAVQ, counts: list[float], codes: list[list[float]]) -> EMAVQ:
    quantizer.counts.copy_(torch.tensor(counts))
    quantizer.sums.copy_(torch.tensor(codes) * quantizer.counts[:, None])
    return quantizer


def test_one_update_by_hand() -> None:
    ema = with_codes(EMAVQ(2, 1, decay=0.5, commitment_weight=0.25), [1.0, 1.0], [[0.0], [1.0]])
    out = ema(torch.tensor([[0.2], [0.8], [0.9]]))
    assert out.indices[:, 0].tolist() == [0, 1, 1]
    assert out.loss.item() == pytest.approx(0.25 * (0.2**2 + 0.2**2 + 0.1**2) / 3)
    assert ema.codebook[:, 0].tolist() == [0.0, 1.0], "the codes move at the end of the step"
    ema.after_step()
    assert ema.counts.tolist() == pytest.approx([0.5 + 1, 0.5 + 2])
    assert ema.sums[:, 0].tolist() == pytest.approx([0.2, 0.5 + 1.7])
    assert ema.codebook[:, 0].tolist() == pytest.approx([0.2 / 1.5, 2.2 / 2.5])
    assert ema.num_updates == 1
    ema.after_step()  # nothing came in between
    assert ema.counts.tolist() == pytest.approx([1.5, 2.5])


def test_only_the_commitment_loss_has_a_gradient() -> None:
    ema = with_codes(EMAVQ(2, 1, commitment_weight=0.25), [1.0, 1.0], [[0.0], [1.0]])
    assert not list(ema.parameters())
    z = torch.tensor([[0.8]], requires_grad=True)
    out = ema(z)
    (out.loss + 3 * out.z_q.sum()).backward()
    assert z.grad is not None
    assert z.grad.item() == pytest.approx(3 + 0.25 * 2 * (0.8 - 1))


def test_micro_batches_count_as_one_step() -> None:
    torch.manual_seed(0)
    whole, parts = EMAVQ(8, 3, dead_codes="split"), EMAVQ(8, 3, dead_codes="split")
    parts.load_state_dict(whole.state_dict())
    for _ in range(5):
        z = torch.randn(40, 3)
        whole(z)
        whole.after_step()
        for micro in z.split(16):
            parts(micro)
        parts.after_step()
    torch.testing.assert_close(parts.counts, whole.counts)
    torch.testing.assert_close(parts.codebook, whole.codebook)


def test_how_far_the_first_update_goes_is_a_matter_of_the_start() -> None:
    # 13 vectors at 1 to a code at 0 with d = 0.99: 13 / (0.99 c + 13) of the way, 93 % or 12 %.
    for count, share in ((1.0, 13 / 13.99), (100.0, 13 / 112)):
        ema = EMAVQ(2, 1, init_count=count, codebook_init="kmeans")
        ema.fit(torch.tensor([[0.0], [9.0]]))
        ema(torch.ones(13, 1))
        ema.after_step()
        assert ema.codebook.sort(0).values[0].item() == pytest.approx(share)
    with pytest.raises(ValueError, match="init_count must be above 0 and finite, got 0"):
        EMAVQ(2, 1, init_count=0.0)


def test_the_start_of_a_public_implementation() -> None:
    torch.manual_seed(0)
    reference = VectorQuantize(dim=4, codebook_size=12, decay=0.9, rotation_trick=False, eps=0.0)
    ema = EMAVQ(12, 4, decay=0.9, init_count=10.0)
    ema.sums.copy_(10 * reference.codebook)
    reference._codebook.cluster_size.fill_(1.0)
    reference._codebook.embed_avg.copy_(reference._codebook.embed)
    for _ in range(20):
        z = torch.randn(1, 100, 4)
        reference(z)
        ema(z)
        ema.after_step()
    torch.testing.assert_close(ema.codebook, reference.codebook, rtol=1e-4, atol=1e-5)


def test_evaluation_collects_nothing() -> None:
    ema = EMAVQ(4, 2).eval()
    before = ema.codebook.clone()
    ema(torch.randn(10, 2))
    ema.train().after_step()
    assert torch.equal(ema.codebook, before)
    assert ema.counts.tolist() == [1] * 4


def test_codes_tend_to_the_means_of_their_cells() -> None:
    torch.manual_seed(0)
    ema = EMAVQ(2, 1, decay=0.5)
    z = torch.cat([torch.full((30, 1), -1.0), torch.full((10, 1), 2.0)])
    with_codes(ema, [1.0, 1.0], [[-0.5], [0.5]])
    for _ in range(60):
        ema(z)
        ema.after_step()
    assert ema.codebook[:, 0].tolist() == pytest.approx([-1, 2])
    assert ema.counts.tolist() == pytest.approx([60, 20])  # n / (1 - decay)


def test_an_unused_code_keeps_its_place_for_ever() -> None:
    ema = with_codes(EMAVQ(2, 1, decay=0.5), [1.0, 1.0], [[0.0], [7.0]])
    for _ in range(2000):  # 0.5^2000 is below any float
        ema(torch.zeros(3, 1))
        ema.after_step()
    assert ema.codebook[:, 0].tolist() == pytest.approx([0, 7])


def test_a_public_implementation_agrees() -> None:
    torch.manual_seed(0)
    decay = 0.8
    reference = VectorQuantize(dim=3, codebook_size=6, decay=decay, commitment_weight=0.25, rotation_trick=False, eps=0)
    ema = EMAVQ(6, 3, decay=decay, commitment_weight=0.25)
    # It averages with weights (1 - decay) and starts at count 1; the discounted sums are 1 / (1 - decay) times that.
    ema.counts.fill_(1 / (1 - decay))
    ema.sums.copy_(reference.codebook / (1 - decay))
    for _ in range(8):
        z = torch.randn(1, 100, 3)
        _, indices, loss = reference(z)
        out = ema(z)
        ema.after_step()
        assert torch.equal(out.indices[..., 0], indices)
        torch.testing.assert_close(out.loss, loss.sum())
        torch.testing.assert_close(ema.codebook, reference.codebook)


def test_unit_norm_codes_are_directions_of_means() -> None:
    ema = EMAVQ(2, 2, unit_norm=True, decay=0.0)
    with_codes(ema, [1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]])
    out = ema(torch.tensor([[3.0, 1.0], [3.0, 7.0], [3.0, 1.0]]))
    assert out.indices[:, 0].tolist() == [0, 1, 0]
    assert out.z_q.tolist() == [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    ema.after_step()
    expected = torch.nn.functional.normalize(torch.tensor([[3.0, 1.0], [3.0, 7.0]]), dim=-1)
    torch.testing.assert_close(ema.codebook, expected)


def test_splitting_by_hand() -> None:
    # Counts after one step of decay 0.5: [8, 0.05, 1]; the limit is 0.1 * 9.05/3 = 0.302, so code 1 is dead.
    ema = EMAVQ(3, 2, decay=0.5, dead_codes="split", dead_threshold=0.1)
    with_codes(ema, [6.0, 0.1, 2.0], [[1.0, 2.0], [50.0, 50.0], [-9.0, -9.0]])
    ema(torch.tensor([[1.0, 2.0]]).expand(5, 2))
    ema.after_step()
    assert ema.counts.tolist() == pytest.approx([4, 4, 1])
    codes = ema.codebook
    assert codes[0].tolist() == pytest.approx([1, 2])
    assert codes[2].tolist() == pytest.approx([-9, -9])
    ratio = codes[1] / codes[0]
    assert ((ratio - 1).abs() <= 1e-3).all()
    assert ratio[0] != ratio[1], "each entry has its own noise"
    assert not torch.equal(codes[0], codes[1])


def test_splitting_leaves_no_dead_code_and_fills_the_codebook() -> None:
    torch.manual_seed(0)
    z = torch.randn(512, 4) + 3  # off centre: without splitting, few codes are ever used
    usage = {}
    for dead_codes in ("keep", "split", "revive"):
        torch.manual_seed(1)
        ema = EMAVQ(64, 4, dead_codes=dead_codes, dead_threshold=0.1, decay=0.9)  # type: ignore[arg-type]
        for _ in range(40):
            out = ema(z)
            ema.after_step()
        usage[dead_codes] = out.metrics["usage"].item()
        if dead_codes == "split":
            assert ema.counts.min() >= 0.1 * ema.counts.mean() * 0.99
    assert usage["keep"] < 0.5
    assert usage["split"] > 0.9
    assert usage["revive"] > 0.9


def test_revived_codes_are_vectors_of_the_batch() -> None:
    ema = EMAVQ(3, 1, decay=0.5, dead_codes="revive", dead_threshold=0.1)
    with_codes(ema, [6.0, 0.1, 2.0], [[1.0], [50.0], [-9.0]])
    z = torch.tensor([[1.0], [1.5], [0.5], [1.25], [0.75], [99.0]])
    ema(z, torch.tensor([True] * 5 + [False]))
    ema.after_step()
    assert ema.codebook[1, 0].item() in z[:5, 0].tolist()
    assert ema.counts.tolist() == pytest.approx([8, 9.05 / 3, 1])


def test_reviving_without_vectors_waits() -> None:
    ema = EMAVQ(3, 1, decay=0.5, dead_codes="revive", dead_threshold=0.1)
    with_codes(ema, [6.0, 0.1, 2.0], [[1.0], [50.0], [-9.0]])
    ema(torch.ones(4, 1), torch.zeros(4, dtype=torch.bool))
    ema.after_step()
    assert ema.codebook[:, 0].tolist() == pytest.approx([1, 50, -9])
    assert ema.counts.tolist() == pytest.approx([6, 0.1, 2])


@pytest.mark.parametrize("dead_codes", ["split", "revive"])
def test_random_numbers_are_those_of_the_update(dead_codes: str) -> None:
    def run() -> Tensor:
        ema = EMAVQ(16, 2, dead_codes=dead_codes, dead_threshold=0.2, decay=0.5)  # type: ignore[arg-type]
        ema.sums.copy_(torch.linspace(-1, 1, 32).reshape(16, 2))
        for step in range(5):
            ema(torch.randn(20, 2, generator=torch.Generator().manual_seed(step)))
            ema.after_step()
        return ema.codebook

    torch.manual_seed(0)
    first = run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)


def test_bad_options() -> None:
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            EMAVQ(4, 2, decay=decay)
    for threshold in (0.0, 0.5):
        with pytest.raises(ValueError, match="dead_threshold must be in"):
            EMAVQ(4, 2, dead_threshold=threshold)


def test_half_precision_statistics_are_refused() -> None:
    ema = EMAVQ(4, 2).bfloat16()
    ema(torch.randn(5, 2))
    with pytest.raises(TypeError, match="float32 or float64 in training"):
        ema.after_step()


def test_kmeans_start() -> None:
    ema = EMAVQ(3, 1, codebook_init="kmeans")
    ema(torch.tensor([[0.0], [0.2], [5.0], [5.2], [9.0], [9.2]]))
    assert sorted(ema.codebook[:, 0].tolist()) == pytest.approx([0.1, 5.1, 9.1])
    with pytest.raises(RuntimeError, match="not fitted"):
        EMAVQ(3, 1, codebook_init="kmeans").eval()(torch.zeros(4, 1))
