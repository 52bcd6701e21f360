"""MaskGIT: its published size, its loss written out, its decoding step by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tessella.generators import maskgit
from tessella.generators.maskgit import MaskGIT, gumbel, least_confident, masked_cross_entropy
from tessella.generators.sampling import generators
from tessella.generators.schedules import group_ends, low_discrepancy_order
from tessella.tokenizer import TokenSpace

LABEL = {"name": "label", "num_classes": 10}
SPACE = TokenSpace((4, 4), 1, 16, "f" * 16)


def make(space: TokenSpace = SPACE, *, conditioner: dict[str, Any] = LABEL, **options: Any) -> MaskGIT:
    torch.manual_seed(0)
    small = {"dim": 32, "num_layers": 2, "num_heads": 4, "hidden": 48, "num_steps": 4}
    return MaskGIT(space, conditioner=conditioner, **{**small, **options}).eval()


def tokens(space: TokenSpace, batch: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randint(space.codebook_size, (batch, *space.grid, space.num_codebooks), generator=rng)


@pytest.mark.parametrize(("codebook_size", "expected"), [(1024, 172_457_193), (1000, 172_438_737)])
def test_published_parameter_counts(codebook_size: int, expected: int) -> None:
    with torch.device("meta"):
        model = MaskGIT(
            TokenSpace((16, 16), 1, codebook_size, "f" * 16), conditioner={"name": "label", "num_classes": 1000}
        )
    assert sum(p.numel() for p in model.parameters()) == expected
    assert len(model.bias) == codebook_size + 1001


def test_start_is_a_cut_normal_distribution() -> None:
    model = make(dim=64, hidden=256)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert {"codes.weight", "conditioner.embedding.weight", "positions"} <= set(matrices)
    for name, weight in matrices.items():
        assert weight.abs().max() <= 0.04, name
        # 0.8796 is the deviation of a standard normal number known to lie within +-2.
        assert weight.std().item() == pytest.approx(0.02 * 0.8796, rel=0.15), name
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert all(p.eq(float(name.endswith("weight"))).all() for name, p in vectors.items()), (
        "norms start at 1, biases at 0"
    )


@pytest.mark.parametrize("conditioner", [LABEL, {"name": "none"}])
def test_first_loss_is_near_that_of_a_uniform_guess(conditioner: dict[str, Any]) -> None:
    model = make(conditioner=conditioner)
    label = None if conditioner["name"] == "none" else torch.tensor([0, 3, 9])
    loss = model(tokens(SPACE), label)
    num_rows = 16 + (1 if label is None else 11)
    assert len(model.bias) == num_rows
    assert loss.loss.item() == pytest.approx(math.log(num_rows), abs=0.1)


def test_loss_by_hand() -> None:
    # Two samples, p = (1/2, 1/4, 1/4); targets 0 and 1 of the first are hidden, target 0 alone of the second.
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().expand(2, 2, 3)
    targets = torch.tensor([[0, 1], [2, 0]])
    masked = torch.tensor([[True, True], [False, True]])
    two = math.log(2)
    plain = ((two + 2 * two) / 2 + two) / 2
    uniform = 5 * two / 3  # -(ln 1/2 + 2 ln 1/4) / 3
    out = masked_cross_entropy(logits, targets, masked, 0.1)
    assert out.loss.item() == pytest.approx(0.9 * plain + 0.1 * uniform)
    assert out.metrics["bits_per_masked_token"].item() == pytest.approx(plain / two)
    assert out.metrics["accuracy"].item() == pytest.approx((0.5 + 1) / 2)


def test_loss_agrees_with_torch() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 9, 7, dtype=torch.float64), torch.randint(7, (4, 9))
    masked = torch.rand(4, 9) < 0.5
    masked[:, 0] = True
    each = [
        torch.nn.functional.cross_entropy(row[hidden].float(), target[hidden], label_smoothing=0.2)
        for row, target, hidden in zip(logits, targets, masked, strict=True)
    ]
    torch.testing.assert_close(masked_cross_entropy(logits, targets, masked, 0.2).loss, torch.stack(each).mean())


def test_training_hides_the_share_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def record(logits: Tensor, targets: Tensor, masked: Tensor, smoothing: float) -> Any:
        seen.append(masked)
        return masked_cross_entropy(logits, targets, masked, smoothing)

    monkeypatch.setattr(maskgit, "masked_cross_entropy", record)
    model = make(TokenSpace((16, 16), 1, 4, "f" * 16), dim=8, num_layers=1, hidden=8, num_heads=1)
    torch.manual_seed(0)
    for _ in range(20):
        model(torch.zeros(16, 16, 16, 1, dtype=torch.long), torch.zeros(16, dtype=torch.long))
    counts = torch.cat(seen).sum(-1)
    assert counts.min() >= 116
    assert counts.double().mean().item() / 256 == pytest.approx(0.8089, abs=0.03)


def features(model: MaskGIT, indices: Tensor, masked: Tensor, label: Tensor) -> Tensor:
    return model._code_logits(model._features(indices.flatten(1), masked, model.conditioner(label, len(indices))))


def test_hidden_tokens_are_not_seen_and_shown_ones_are_seen_everywhere() -> None:
    model, indices, label = make(), tokens(SPACE), torch.tensor([1, 2, 3])
    masked = torch.zeros(3, 16, dtype=torch.bool)
    masked[:, 5] = True
    before = features(model, indices, masked, label)
    changed = indices.clone()
    changed.view(3, 16)[:, 5] += 1
    changed %= 16
    assert torch.equal(features(model, changed, masked, label), before)
    changed = indices.clone()
    changed.view(3, 16)[:, 6] += 1
    changed %= 16
    assert (features(model, changed, masked, label) != before).any(-1).all()


def test_the_null_label_is_mask() -> None:
    model = make()
    assert torch.equal(model._special[-1], model.conditioner.null(1)[0, 0])
    assert "mask" not in dict(model.named_parameters())
    assert "mask" in dict(make(conditioner={"name": "none"}).named_parameters())


def test_sliced_logits_are_rows_of_the_trained_table() -> None:
    space = TokenSpace((2, 3), 2, 5, "f" * 16)
    model = make(space)
    torch.nn.init.normal_(model.bias)
    x = torch.randn(2, 12, 32)
    table = torch.cat([model.codes.weight, model._special])
    whole = x @ table.T + model.bias
    assert whole.shape[-1] == 2 * 5 + 11
    sliced = model._code_logits(x)
    for position in range(12):
        first = 5 * (position % 2)
        torch.testing.assert_close(sliced[:, position], whole[:, position, first : first + 5])
    # The tokens' own rows are the same ones.
    assert model.first_row.tolist() == [0, 5] * 6


def rows_with_gradient(weight: Tensor) -> list[int]:
    assert weight.grad is not None
    return weight.grad.any(-1).nonzero()[:, 0].tolist()


def test_inputs_are_rows_of_the_table() -> None:
    space = TokenSpace((1, 2), 2, 5, "f" * 16)
    model = make(space)
    indices, masked = torch.tensor([[3, 0, 2, 1]]), torch.tensor([[False, False, False, True]])
    model._features(indices, masked, model.conditioner(torch.tensor([7]), 1)).square().sum().backward()
    # Codes 3 and 2 of the first codebook, code 0 of the second; the label, and MASK for what is hidden.
    assert rows_with_gradient(model.codes.weight) == [2, 3, 5]
    assert rows_with_gradient(model._special) == [7, 10]


@pytest.mark.parametrize("conditioner", [LABEL, {"name": "none"}])
def test_the_loss_moves_every_parameter(conditioner: dict[str, Any]) -> None:
    model = make(conditioner=conditioner)
    model(tokens(SPACE), None if conditioner["name"] == "none" else torch.tensor([0, 3, 9])).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_gumbel_has_its_moments_and_no_infinity() -> None:
    rng = torch.Generator().manual_seed(0)
    noise = gumbel(torch.rand(200_000, generator=rng, dtype=torch.float64))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.std().item() == pytest.approx(math.pi / 6**0.5, abs=0.01)
    extremes = gumbel(torch.tensor([0.0, 1 - 2**-24]))
    assert extremes.isfinite().all()


def test_least_confident_by_hand() -> None:
    # Four tokens, one shown, progress 1/3: floor(4 cos 30 degrees) = 3, at most 3 - 1 hidden ones: the least two.
    confidence = torch.tensor([[-1.0, -3.0, -9.0, -2.0]])
    masked = torch.tensor([[True, True, False, True]])
    assert least_confident(confidence, masked, 1 / 3).tolist() == [[False, True, False, True]]
    # A tie with the first one kept: strictly less only.
    tied = torch.tensor([[-1.0, -1.0, -1.0, -5.0]])
    assert least_confident(tied, masked.new_ones(1, 4), 0.6).tolist() == [[False, False, False, True]]
    # One token alone: nothing can be kept apart from it.
    assert least_confident(torch.zeros(1, 1), masked.new_ones(1, 1), 0.5).tolist() == [[False]]


class Recorder:
    """Stands for the network: records what it is asked and answers with fixed logits."""

    def __init__(self, model: MaskGIT, logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[Tensor] = []
        self.masked: list[Tensor] = []
        self.scales: list[float] = []
        self.logits = logits
        monkeypatch.setattr(model, "_guided_logits", self)

    def __call__(self, tokens: Tensor, masked: Tensor, contexts: Tensor, scale: float) -> Tensor:
        self.tokens.append(tokens)
        self.masked.append(masked)
        self.scales.append(scale)
        return self.logits.expand(*tokens.shape, -1)


def test_decoding_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(TokenSpace((16, 16), 1, 16, "f" * 16))
    recorder = Recorder(model, torch.randn(16), monkeypatch)
    out = model.sample(torch.tensor([0, 1]), rng=generators([0, 1]), num_steps=12)
    assert len(recorder.masked) == 12
    counts = [masked.sum(-1).tolist() for masked in recorder.masked]
    expected = [256, 253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33]
    assert counts == [[count, count] for count in expected]
    for before, after, old, new in zip(
        recorder.masked, recorder.masked[1:], recorder.tokens, recorder.tokens[1:], strict=False
    ):
        assert (after <= before).all(), "a shown token is never hidden again"
        assert torch.equal(new[~before], old[~before]), "a shown token never changes"
    # The last draw fills what was hidden, and nothing is hidden again after it.
    last = recorder.masked[-1]
    assert torch.equal(out.flatten(1)[~last], recorder.tokens[-1][~last])
    assert out.shape == (2, 16, 16, 1)


def test_choice_noise_cools_down(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[float] = []
    monkeypatch.setattr(maskgit, "gumbel", torch.ones_like)

    def record(confidence: Tensor, masked: Tensor, progress: float, num_hidden: Tensor) -> Tensor:
        factors.append(confidence[0, 0].item() + math.log(16))  # of uniform logits only the noise is left
        return least_confident(confidence, masked, progress)

    monkeypatch.setattr(maskgit, "least_confident", record)
    model = make()
    Recorder(model, torch.zeros(16), monkeypatch)
    model.sample(None, rng=generators([0]), num_steps=12)
    # The twelfth would be 0; what is drawn then stays.
    assert factors == pytest.approx([4.125, 3.75, 3.375, 3.0, 2.625, 2.25, 1.875, 1.5, 1.125, 0.75, 0.375], abs=1e-5)


def test_confidence_is_that_of_the_logits_before_temperature_and_truncation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(maskgit, "gumbel", torch.zeros_like)

    def record(confidence: Tensor, masked: Tensor, progress: float, num_hidden: Tensor) -> Tensor:
        seen.append(confidence.clone())
        return least_confident(confidence, masked, progress)

    monkeypatch.setattr(maskgit, "least_confident", record)
    model = make()
    logits = torch.linspace(0, 3, 16)
    Recorder(model, logits, monkeypatch)
    out = model.sample(None, rng=generators([0]), temperature=0.0, top_k=3, num_steps=2)
    assert out.unique().tolist() == [15]
    torch.testing.assert_close(seen[0], logits.log_softmax(-1)[15].expand(1, 16))


def shown_after(model: MaskGIT, monkeypatch: pytest.MonkeyPatch, seed: int = 0, **settings: Any) -> list[set[int]]:
    """The positions that are not hidden after each step but the last."""
    shown: list[set[int]] = []

    def noted(confidence: Tensor, masked: Tensor, progress: float, num_hidden: Tensor) -> Tensor:
        hidden = least_confident(confidence, masked, progress)
        shown.append(set((~hidden[0]).nonzero()[:, 0].tolist()))
        return hidden

    monkeypatch.setattr(maskgit, "least_confident", noted)
    model.sample(torch.tensor([0]), rng=generators([seed]), **settings)
    return shown


def test_the_even_order_is_fixed_and_that_of_the_code_length(monkeypatch: pytest.MonkeyPatch) -> None:
    order = low_discrepancy_order((4, 4, 1)).tolist()
    by_argument = shown_after(make(), monkeypatch, order="even")
    for shown in by_argument:
        assert shown == set(order[: len(shown)])
    assert by_argument == shown_after(make(order="even"), monkeypatch, seed=1)
    assert by_argument != shown_after(make(), monkeypatch)


def test_the_random_order_is_that_of_boundless_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gumbel noise rises with the number it is made of, so beside 1e9 of it confidence counts for nothing.
    by_noise = shown_after(make(), monkeypatch, choice_temperature=1e9)
    assert shown_after(make(), monkeypatch, order="random") == by_noise
    assert shown_after(make(choice_temperature=1e9), monkeypatch) == by_noise
    assert by_noise != shown_after(make(), monkeypatch, order="random", seed=1)


def test_norm_placement() -> None:
    post, pre = make(), make(norm="pre")
    assert post.transformer.norm is None
    assert pre.transformer.norm is not None
    # Before the layers: with nothing in them the sum passes unchanged to the last norm.
    for layer in (part for block in pre.transformer.blocks for part in (block.attention.out, block.feed_forward.down)):
        torch.nn.init.zeros_(layer.weight)
    x = torch.randn(1, 17, 32)
    torch.testing.assert_close(pre.transformer(x), pre.transformer.norm(x))


def test_guidance_may_depend_on_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    recorder = Recorder(model, torch.zeros(16), monkeypatch)
    model.sample(torch.tensor([0]), rng=generators([0]), guidance=lambda progress: 1 + progress, num_steps=4)
    assert recorder.scales == [1, 1.25, 1.5, 1.75]


def test_guided_logits_by_their_formula() -> None:
    model, indices = make(), tokens(SPACE).flatten(1)
    label = torch.tensor([1, 2, 3])
    masked = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    conditional = model._code_logits(model._features(indices, masked, model.conditioner(label, 3)))
    null = model._code_logits(model._features(indices, masked, model.conditioner(None, 3)))
    contexts = torch.cat([model.conditioner(label, 3), model.conditioner.null(3)])
    alpha = 0.2
    torch.testing.assert_close(
        model._guided_logits(indices, masked, contexts, 1 + alpha), conditional + alpha * (conditional - null)
    )
    assert (conditional - null).abs().max() > 1e-4


def test_learns_a_picture_for_each_label() -> None:
    space = TokenSpace((2, 2), 2, 3, "f" * 16)
    model = make(space, conditioner={"name": "label", "num_classes": 2}, dropout=0.0, attention_dropout=0.0).train()
    pictures = torch.randint(3, (2, 2, 2, 2), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    label = torch.arange(2).repeat(16)
    for _ in range(80):
        optimizer.zero_grad()
        model(pictures[label], label).loss.backward()
        optimizer.step()
    model.eval()
    drawn = model.sample(label[:8], rng=generators(range(8)), temperature=0.5, guidance=1.5)
    assert torch.equal(drawn, pictures[label[:8]])
    cost = model.bits(pictures, torch.arange(2)) / 8
    assert cost.max() < 0.25, "bits per token; ignorance costs log2(3) = 1.58"


def test_bits_given_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # A network that gives 1/2 to the token itself where its left neighbour is shown, else 1/16.
    model, indices = make(), tokens(SPACE, 1)
    monkeypatch.setattr(model, "_features", lambda tokens, masked, context: (tokens, masked))

    def logits(state: tuple[Tensor, Tensor]) -> Tensor:
        tokens, masked = state
        right = torch.nn.functional.one_hot(tokens, 16) * math.log(15.0)
        return right * (~masked.roll(1, 1)).float()[..., None]

    monkeypatch.setattr(model, "_code_logits", logits)
    order, ends = low_discrepancy_order((4, 4)).tolist(), group_ends(16)
    group = {p: next(i for i, end in enumerate(ends) if order.index(p) < end) for p in order}
    expected = sum(1.0 if group[(p - 1) % 16] < group[p] else 4.0 for p in range(16))
    assert 16 < expected < 64
    assert model.bits(indices, None).tolist() == pytest.approx([expected])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"min_mask_ratio": -0.1}, r"min_mask_ratio must lie in \[0, 1\], got -0.1"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"choice_temperature": -1.0}, "choice_temperature must be >= 0, got -1.0"),
        ({"order": "raster"}, "unknown order 'raster'; choose one of: confidence, random, even"),
        ({"norm": "sandwich"}, "unknown norm 'sandwich'; choose one of: post, pre"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_sampling_settings() -> None:
    model = make()
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        model.sample(None, rng=generators([0]), num_steps=0)
    with pytest.raises(ValueError, match="unknown order 'raster'"):
        model.sample(None, rng=generators([0]), order="raster")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choice_temperature must be >= 0, got nan"):
        model.sample(None, rng=generators([0]), choice_temperature=float("nan"))
    with pytest.raises(ValueError, match="guidance must be >= 0"):
        model.sample(None, rng=generators([0]), guidance=-1.0)
    with pytest.raises(ValueError, match="top_k must lie in"):
        model.sample(None, rng=generators([0]), top_k=17)
