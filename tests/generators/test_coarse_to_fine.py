"""Coarse-to-fine: the map, the two losses, the single fine pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tessella.errors import ConfigError
from tessella.generators.coarse_to_fine import CoarseToFine, FinePredictor
from tessella.generators.sampling import generators
from tessella.ops import kmeans, nearest
from tessella.tokenizer import TokenSpace

LABEL = {"name": "label", "num_classes": 10}
SPACE = TokenSpace((3, 4), 1, 12, "f" * 16)
SMALL = {"dim": 16, "num_layers": 2, "num_heads": 2}


def make(space: TokenSpace = SPACE, *, num_clusters: int = 4, fit: bool = True, **options: Any) -> CoarseToFine:
    torch.manual_seed(0)
    sections: dict[str, Any] = {"coarse": {"name": "ar", **SMALL}, "fine": dict(SMALL), "conditioner": LABEL}
    model = CoarseToFine(space, num_clusters=num_clusters, **{**sections, **options})
    if fit:
        model.fit_codebook(codebook(space, num_clusters), seed=0)
    return model.eval()


def codebook(space: TokenSpace, num_clusters: int) -> Tensor:
    """Code v of codebook k points in direction (v + k) mod C, give or take little."""
    v, k = torch.arange(space.codebook_size), torch.arange(space.num_codebooks)[:, None]
    angle = 2 * math.pi * ((v + k) % num_clusters) / num_clusters + 0.01 * (v // num_clusters)
    length = 1 + v / space.codebook_size
    tables = torch.stack([angle.cos() * length, angle.sin() * length], -1)
    return tables[0] if space.num_codebooks == 1 else tables


def tokens(space: TokenSpace = SPACE, batch: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(space.codebook_size, (batch, *space.grid, space.num_codebooks), generator=rng)


def wake(model: CoarseToFine) -> CoarseToFine:
    """Heads start at zero; give them something to say."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.5)
    return model


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


LLAMAGEN = {"B": (768, 12, 12, 86.51), "L": (1024, 24, 16, 310.41), "XL": (1280, 36, 20, 734.07)}


@pytest.mark.parametrize(("dim", "num_layers", "num_heads", "millions"), LLAMAGEN.values(), ids=LLAMAGEN)
def test_published_parameter_counts(dim: int, num_layers: int, num_heads: int, millions: float) -> None:
    with torch.device("meta"):
        model = CoarseToFine(
            TokenSpace((16, 16), 1, 16384, "f" * 16),
            coarse={"name": "ar", "dim": dim, "num_layers": num_layers, "num_heads": num_heads},
            fine={},
            conditioner={"name": "label", "num_classes": 1000},
        )
    assert num_parameters(model.coarse) / 1e6 == pytest.approx(millions, abs=0.005)
    # GPT-L with an input table of 512 rows instead of 16384.
    assert num_parameters(model.fine) / 1e6 == pytest.approx(326.7, abs=0.05)
    assert num_parameters(model) == num_parameters(model.coarse) + num_parameters(model.fine)


class TestMap:
    def test_clusters_by_hand(self) -> None:
        model = make()
        assert model.labels.shape == (1, 12)
        for v in range(12):
            for w in range(12):
                assert (model.labels[0, v] == model.labels[0, w]) == (v % 4 == w % 4)
        assert sorted(model.labels.unique().tolist()) == [0, 1, 2, 3]

    def test_every_codebook_has_its_own(self) -> None:
        space = TokenSpace((2, 2), 2, 12, "f" * 16)
        model = make(space)
        indices = tokens(space)
        coarse = model.coarse_indices(indices)
        for k in range(2):
            assert torch.equal(coarse[..., k], model.labels[k][indices[..., k]])
        assert len(model.labels[1].unique()) == 4

    def test_every_codebook_has_labels_of_its_own(self) -> None:
        model = wake(make(TokenSpace((1, 2), 2, 12, "f" * 16)))
        model.fine(torch.tensor([[[[3, 0], [2, 0]]]]), model.fine.conditioner(None, 1)).square().sum().backward()
        gradient = model.fine.labels.weight.grad
        assert gradient is not None
        # Labels 3 and 2 of the first codebook, label 0 of the second, which comes after the first's four.
        assert gradient.any(-1).nonzero()[:, 0].tolist() == [2, 3, 4]

    def test_every_codebook_has_codes_of_its_own(self) -> None:
        model = wake(make(TokenSpace((1, 2), 2, 12, "f" * 16)))
        labels, context = torch.tensor([[[[3, 0], [2, 0]]]]), model.fine.conditioner(None, 1)
        before = model.fine(labels, context)
        with torch.no_grad():
            model.fine.head[1].weight[5] = 0
        after = model.fine(labels, context)
        assert (after != before).nonzero()[:, 1:].tolist() == [[1, 5], [3, 5]]

    def test_is_the_best_of_ten_runs(self) -> None:
        space = TokenSpace((2, 2), 1, 60, "f" * 16)
        codes = torch.nn.functional.normalize(torch.randn(60, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
        model = make(space, num_clusters=16, fit=False)
        model.fit_codebook(5 * codes, seed=3)

        def distortion(labels: Tensor) -> float:
            cells = [codes[labels == c] for c in labels.unique()]
            return sum(((cell - cell.mean(0)) ** 2).sum().item() for cell in cells)

        rng = torch.Generator().manual_seed(3)
        runs = [distortion(nearest(codes, kmeans(codes, 16, num_iterations=100, rng=rng))) for _ in range(10)]
        assert len(set(runs)) > 1
        assert distortion(model.labels[0]) == pytest.approx(min(runs), rel=1e-5)

    def test_reaches_a_coarse_part_that_clusters_again(self) -> None:
        coarse = {"name": "coarse_to_fine", "num_clusters": 2, "coarse": {"name": "ar", **SMALL}, "fine": dict(SMALL)}
        model = make(coarse=coarse)
        assert len(model.coarse.get_buffer("labels").unique()) == 2
        assert model(tokens(), None).loss.item() == pytest.approx(math.log(12 * 4 * 2), abs=1e-6)
        assert model.sample(None, rng=generators([0])).shape == (1, 3, 4, 1)

    def test_direction_or_place(self) -> None:
        # Two directions, each at lengths 1 and 100.
        codes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [100.0, 0.0], [0.0, 100.0]])
        space = TokenSpace((2, 2), 1, 4, "f" * 16)
        by_direction, by_place = (make(space, num_clusters=2, fit=False, normalize=value) for value in (True, False))
        for model in (by_direction, by_place):
            model.fit_codebook(codes, seed=0)
        first, second, third, fourth = by_direction.labels[0].tolist()
        assert first == third != second == fourth
        first, second, third, fourth = by_place.labels[0].tolist()
        assert first == second
        assert third != fourth

    def test_the_seed_alone_decides(self) -> None:
        space = TokenSpace((2, 2), 1, 200, "f" * 16)
        codes = torch.randn(200, 3)

        def fitted(seed: int) -> Tensor:
            model = make(space, num_clusters=16, fit=False)
            torch.manual_seed(seed)  # not read
            model.fit_codebook(codes, seed=7)
            return model.labels

        assert torch.equal(fitted(0), fitted(1))
        assert len(fitted(0).unique()) == 16

    def test_is_stored_and_loaded(self, tmp_path: Path) -> None:
        model, fresh = make(), make(fit=False)
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert torch.equal(fresh.labels, model.labels)
        assert torch.equal(fresh(tokens(), None).loss, model(tokens(), None).loss)

    def test_missing_is_refused(self) -> None:
        model = make(fit=False)
        for use in (
            lambda: model(tokens(), None),
            lambda: model.sample(None, rng=generators([0])),
            lambda: model.bits(tokens(), None),
        ):
            with pytest.raises(RuntimeError, match=r"call fit_codebook\(tokenizer\.quantizer\.codebook, seed="):
                use()

    def test_bad_codebooks(self) -> None:
        model = make(fit=False)
        with pytest.raises(ValueError, match=r"codebook must be \[V, D\] of K, V = \[1, 12\], got \[11, 2\]"):
            model.fit_codebook(torch.randn(11, 2), seed=0)
        with pytest.raises(ValueError, match=r"num_clusters = 4, but there are only 1 distinct directions"):
            model.fit_codebook(torch.arange(1.0, 13.0)[:, None], seed=0)


class TestLoss:
    def test_first_loss_is_that_of_two_uniform_guesses(self) -> None:
        model = make()
        out = model(tokens(), torch.tensor([0, 3, 9]))
        assert out.metrics["fine"].item() == pytest.approx(math.log(12), abs=1e-6)
        assert out.metrics["coarse"].item() == pytest.approx(math.log(4), abs=1e-6)
        assert out.loss.item() == pytest.approx(math.log(48), abs=1e-6)

    def test_by_its_formula(self) -> None:
        model, indices, label = wake(make()), tokens(), torch.tensor([0, 3, 9])
        out = model(indices, label)
        coarse = model.coarse_indices(indices)
        logits = model.fine(coarse, model.fine.conditioner(label, 3))
        picked = [logits[b, n].double().log_softmax(-1)[indices.flatten(1)[b, n]] for b in range(3) for n in range(12)]
        torch.testing.assert_close(out.metrics["fine"].double(), -torch.stack(picked).mean())
        torch.testing.assert_close(out.metrics["coarse"], model.coarse(coarse, label).loss)
        torch.testing.assert_close(out.loss, out.metrics["fine"] + out.metrics["coarse"])

    def test_parts_are_trained_apart(self) -> None:
        model, indices, label = wake(make()), tokens(), torch.tensor([0, 3, 9])
        model(indices, label).loss.backward()
        together = {name: p.grad.clone() for name, p in model.coarse.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.coarse(model.coarse_indices(indices), label).loss.backward()
        assert together
        for name, p in model.coarse.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(together[name], p.grad)

    def test_noise_is_for_training_and_of_the_input_alone(self) -> None:
        model, indices = wake(make(coarse_noise=0.5)), tokens()
        label = torch.tensor([0, 3, 9])
        quiet = wake(make())(indices, label).metrics
        for name, value in model(indices, label).metrics.items():
            torch.testing.assert_close(value, quiet[name])
        labels = model.coarse_indices(indices)
        # Its parts stay in eval mode: no dropout, no dropped condition.
        model.training = True
        noisy = model(indices, label).metrics
        torch.testing.assert_close(noisy["coarse"], quiet["coarse"])
        assert (noisy["fine"] - quiet["fine"]).abs() > 1e-3
        torch.manual_seed(0)
        changed = torch.stack([model._with_noise(labels) != labels for _ in range(200)]).double().mean()
        assert changed.item() == pytest.approx(0.5 * 3 / 4, abs=0.03)


class TestAttention:
    def logits(self, model: CoarseToFine, labels: Tensor) -> Tensor:
        return model.fine(labels, model.fine.conditioner(None, len(labels)))

    @pytest.mark.parametrize("position", [0, 5, 11])
    def test_fine_sees_past_and_future(self, position: int) -> None:
        model, labels = wake(make()), tokens() % 4
        changed = labels.clone()
        changed.flatten(1)[:, position] = (labels.flatten(1)[:, position] + 1) % 4
        differs = (self.logits(model, changed) != self.logits(model, labels)).any(-1)
        assert differs.all()

    def test_fine_knows_where_it_is(self) -> None:
        model = wake(make())
        labels = torch.zeros(1, 3, 4, 1, dtype=torch.long)
        labels[0, 1, 1] = 1
        logits = self.logits(model, labels)[0]
        # All other positions have the same label: only the place tells them apart.
        assert len(logits.round(decimals=5).unique(dim=0)) > 6

    def test_coarse_ignores_the_future(self) -> None:
        # Only a model that predicts each label from those before it gives all sequences together probability 1.
        space = TokenSpace((1, 3), 1, 12, "f" * 16)
        model = wake(make(space))
        every = torch.cartesian_prod(*[torch.arange(4)] * 3).view(64, 1, 3, 1)
        bits = model.coarse.bits(every, torch.full((64,), 5))
        assert bits.std() > 0.1
        assert (-bits).exp2().sum().item() == pytest.approx(1, abs=1e-5)


class TestSampling:
    def count_calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        calls: list[int] = []
        forward = FinePredictor.forward

        def counted(self: FinePredictor, labels: Tensor, context: Tensor) -> Tensor:
            calls.append(len(labels))
            return forward(self, labels, context)

        monkeypatch.setattr(FinePredictor, "forward", counted)
        return calls

    def test_one_fine_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = self.count_calls(monkeypatch)
        model, label = wake(make()), torch.tensor([1, 2])
        out = model.sample(label, rng=generators([0, 1]))
        assert calls == [2]
        assert out.shape == (2, 3, 4, 1)
        model.sample(label, rng=generators([0, 1]), guidance=2.0)
        assert calls == [2, 4], "conditional and unconditional together"
        model.sample(label, rng=generators([0, 1]), guidance=2.0, fine_guidance=1.0)
        assert calls == [2, 4, 2]

    def drawn_labels(self, monkeypatch: pytest.MonkeyPatch, model: CoarseToFine) -> list[Tensor]:
        drawn: list[Tensor] = []
        sample = model.coarse.sample

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            drawn.append(sample(*args, **kwargs))
            return drawn[-1]

        monkeypatch.setattr(model.coarse, "sample", recorded)
        return drawn

    @pytest.mark.parametrize("num_codebooks", [1, 2])
    def test_restricted_to_the_cluster(self, monkeypatch: pytest.MonkeyPatch, num_codebooks: int) -> None:
        model = wake(make(TokenSpace((3, 4), num_codebooks, 12, "f" * 16)))
        drawn = self.drawn_labels(monkeypatch, model)
        free = model.sample(None, rng=generators(range(4)), fine_temperature=2.0)
        assert not torch.equal(model.coarse_indices(free), drawn[0])
        kept = model.sample(None, rng=generators(range(4)), fine_temperature=2.0, restrict_to_cluster=True)
        assert torch.equal(model.coarse_indices(kept), drawn[1])
        assert torch.equal(drawn[0], drawn[1])

    def test_settings_of_the_fine_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, label = wake(make()), torch.tensor([1, 2])
        drawn = self.drawn_labels(monkeypatch, model)

        def best(scale: float) -> Tensor:
            c = model.fine(drawn[-1], model.fine.conditioner(label, 2))
            null = model.fine(drawn[-1], model.fine.conditioner(None, 2))
            return (null + scale * (c - null)).argmax(-1)

        for options, scale in (
            ({"fine_temperature": 0.0}, 1.0),
            ({"fine_top_k": 1}, 1.0),
            ({"fine_top_k": 1, "guidance": 3.0}, 3.0),
            ({"fine_top_k": 1, "guidance": lambda progress: 4.0 + progress}, 4.0),
            ({"fine_top_k": 1, "fine_guidance": 0.0}, 0.0),
            ({"fine_top_k": 1, "fine_guidance": 5.0, "guidance": 2.0}, 5.0),
        ):
            out = model.sample(label, rng=generators([0, 1]), **options)
            assert torch.equal(out.flatten(1), best(scale)), options

    def test_temperature_zero_needs_no_luck(self) -> None:
        model, label = wake(make()), torch.tensor([1, 2])
        one, two = (model.sample(label, rng=generators(seeds), temperature=0.0) for seeds in ([0, 1], [2, 3]))
        assert torch.equal(one, two)

    def test_bad_settings(self) -> None:
        model = make()
        with pytest.raises(ValueError, match=r"temperature must be >= 0, got -1"):
            model.sample(None, rng=generators([0]), fine_temperature=-1.0)
        with pytest.raises(ValueError, match=r"top_k must lie in \[1, 12\]"):
            model.sample(None, rng=generators([0]), fine_top_k=13)
        with pytest.raises(ValueError, match="guidance must be >= 0"):
            model.sample(None, rng=generators([0]), fine_guidance=-1.0)


def test_bits_are_those_of_both_parts() -> None:
    model, indices, label = wake(make()), tokens(), torch.tensor([0, 3, 9])
    labels = model.coarse_indices(indices)
    logits = model.fine(labels, model.fine.conditioner(label, 3))
    fine = []
    for b in range(3):
        total = 0.0
        for n in range(12):
            token, cluster = indices.flatten(1)[b, n], labels.flatten(1)[b, n]
            inside = model.labels[0] == cluster
            p = logits[b, n].detach().double().exp()
            total -= math.log2(p[token] / p[inside].sum())
        fine.append(total)
    expected = model.coarse.bits(labels, label) + torch.tensor(fine, dtype=torch.float64)
    torch.testing.assert_close(model.bits(indices, label), expected, rtol=1e-5, atol=1e-5)


def test_learns_a_picture_for_each_label() -> None:
    space = TokenSpace((2, 2), 1, 12, "f" * 16)
    model = make(space, conditioner={"name": "label", "num_classes": 2}).train()
    pictures = torch.randint(12, (2, 2, 2, 1), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    label = torch.arange(2).repeat(8)
    for _ in range(60):
        optimizer.zero_grad()
        model(pictures[label], label).loss.backward()
        optimizer.step()
    drawn = model.eval().sample(label[:6], rng=generators(range(6)), temperature=0.5)
    assert torch.equal(drawn, pictures[label[:6]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 13}, r"num_clusters must lie in \[2, 12\] \(the codebook size\), got 13"),
        ({"coarse_noise": 1.5}, r"coarse_noise must lie in \[0, 1\], got 1.5"),
        (
            {"fine": {"layers": 2}},
            r"unknown key 'fine.layers'; accepted: dim, num_layers, num_heads, hidden, rotary, dropout",
        ),
        ({"coarse": {"dim": 16}}, r"missing key 'generator.name'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        make(fit=False, **options)
