"""Autoregressive generation: published sizes, what each token sees, and sampling against the forward pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tessella.generators.ar import AR
from tessella.generators.guidance import interval
from tessella.generators.sampling import choose, generators, guided, uniforms
from tessella.tokenizer import TokenSpace

LABEL = {"name": "label", "num_classes": 5}
IMAGENET = {"name": "label", "num_classes": 1000}
SPACE = TokenSpace((2, 3), 1, 7, "f" * 16)
STACK = TokenSpace((2, 2), 3, 7, "f" * 16)

VARIANTS: dict[str, dict[str, Any]] = {
    "llamagen": {"rotary": "grid_zero_prefix"},
    "ibq": {"rotary": "grid_zero_prefix", "adaln": True, "gate_init": 1.0},
    "sequence": {"rotary": "sequence"},
    "flattened": {"space": STACK, "order": "flattened"},
    "delay": {"space": STACK, "order": "delay"},
    "delayed line": {"space": TokenSpace((5,), 2, 7, "f" * 16), "order": "delay", "rotary": "grid_zero_prefix"},
    "prefix": {"conditioner": {"name": "prefix", "num_vectors": 3, "in_dim": 4}},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def make(**options: Any) -> AR:
    """With random weights everywhere, the head too."""
    torch.manual_seed(0)
    model = AR(**{"space": SPACE, "conditioner": LABEL, "dim": 32, "num_layers": 2, "num_heads": 2, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens(model: AR, batch_size: int = 2, seed: int = 0) -> Tensor:
    space = model.space
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(space.codebook_size, (batch_size, *space.grid, space.num_codebooks), generator=rng)


def conditions(model: AR, batch_size: int = 2) -> Tensor:
    prefix = torch.randn(batch_size, 3, 4, generator=torch.Generator().manual_seed(0))
    return torch.arange(batch_size) if model.conditioner.length == 1 else prefix


LLAMAGEN = {"b": (12, 12, 768), "l": (24, 16, 1024), "xl": (36, 20, 1280)}
IBQ = {"b": (16, 16, 1024), "l": (20, 20, 1280), "xl": (24, 24, 1536), "xxl": (30, 30, 1920)}


@pytest.mark.parametrize(
    ("size", "codebook_size", "millions"),
    [
        ("b", 16384, 110.89), ("l", 16384, 342.91), ("xl", 16384, 774.70),
        ("b", 512, 86.51), ("l", 512, 310.41), ("xl", 512, 734.07),
    ],
)  # fmt: skip
def test_published_sizes_of_llamagen(size: str, codebook_size: int, millions: float) -> None:
    num_layers, num_heads, dim = LLAMAGEN[size]
    with torch.device("meta"):
        space = TokenSpace((16, 16), 1, codebook_size, "f" * 16)
        model = AR(space, conditioner=IMAGENET, dim=dim, num_layers=num_layers, num_heads=num_heads)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("size", "millions"), [("b", 342.995), ("l", 649.641), ("xl", 1076.103), ("xxl", 2063.332)]
)  # fmt: skip
def test_published_sizes_of_ibq(size: str, millions: float) -> None:
    num_layers, num_heads, dim = IBQ[size]
    with torch.device("meta"):
        space = TokenSpace((16, 16), 1, 16384, "f" * 16)
        model = AR(space, conditioner=IMAGENET, dim=dim, num_layers=num_layers, num_heads=num_heads, adaln=True)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = AR(SPACE, conditioner=IMAGENET, dim=64, num_layers=1, num_heads=2)
    assert model.head.weight.abs().max() == 0
    assert model.conditioner.get_parameter("embedding.weight").std().item() == pytest.approx(0.02, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)


def generated_before(model: AR) -> Tensor:
    """``[N, N]``: is token j generated in an earlier step than token i?"""
    order = model.order
    when = order.from_steps(torch.arange(order.num_steps)[None, :, None].expand(1, -1, order.width)).flatten()
    return when[None, :] < when[:, None]


@variants
def test_a_token_sees_exactly_those_generated_before_it(options: dict[str, Any]) -> None:
    model = make(**options)
    x, condition = tokens(model, 1), conditions(model, 1)
    before = model.logits(x, condition).flatten(1, 2)[0]
    expected = generated_before(model)
    for place in range(model.space.sequence_length):
        moved = x.clone()
        moved.view(-1)[place] = (moved.view(-1)[place] + 1) % 7
        changed = (model.logits(moved, condition).flatten(1, 2)[0] != before).any(-1)
        assert torch.equal(changed, expected[:, place]), place


@variants
def test_loss_is_the_cross_entropy_of_the_tokens(options: dict[str, Any]) -> None:
    model = make(**options)
    x, condition = tokens(model), conditions(model)
    log_p = model.logits(x, condition).double().log_softmax(-1)
    each = -log_p.gather(-1, x.flatten(1, -2)[..., None])[..., 0]
    out = model(x, condition)
    torch.testing.assert_close(out.loss.double(), each.mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.metrics["bits_per_token"].double(), each.mean() / math.log(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(model.bits(x, condition), each.sum((1, 2)) / math.log(2), rtol=1e-5, atol=0)
    if model.space.num_codebooks > 1:
        torch.testing.assert_close(
            out.metrics["bits_per_token_1"].double(), each[..., 1].mean() / math.log(2), rtol=1e-5, atol=0
        )


@variants
def test_greedy_sampling_is_the_argmax_of_the_forward_pass(options: dict[str, Any]) -> None:
    """With the cache, token by token, exactly what one pass over the finished sequence says."""
    model = make(**options)
    condition = conditions(model, 4)
    sampled = model.sample(condition, rng=generators(range(4)), temperature=0)
    assert torch.equal(model.logits(sampled, condition).argmax(-1), sampled.flatten(1, -2))
    assert len(sampled.unique()) > 2


@variants
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_sampling_is_the_inverse_distribution_function_of_the_forward_pass(
    options: dict[str, Any], scale: float
) -> None:
    model = make(**options)
    condition = conditions(model, 4)
    how: dict[str, Any] = {"temperature": 0.9, "top_k": 6, "top_p": 0.95}
    sampled = model.sample(condition, rng=generators(range(4)), guidance=scale, **how)
    logits = model.logits(sampled, condition)
    if scale != 1:
        logits = guided(logits, model.logits(sampled, None), scale)
    uniform = model.order.from_steps(uniforms(generators(range(4)), model.order.num_steps, model.order.width))
    assert torch.equal(choose(logits, uniform, **how), sampled.flatten(1, -2))


@variants
def test_cached_logits_are_the_uncached(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(**options)
    seen: list[Tensor] = []
    step_logits = model._step_logits
    monkeypatch.setattr(model, "_step_logits", lambda *args: seen.append(step_logits(*args)) or seen[-1])
    condition = conditions(model)
    sampled = model.sample(condition, rng=generators(range(2)))
    cached = model.order.from_steps(torch.stack(seen, 1))
    torch.testing.assert_close(cached, model.logits(sampled, condition), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("guidance", "expected"),
    [
        (1.0, [2] * 6),
        (2.0, [4] * 6),
        (interval(2.0, 0.0, 0.5), [4, 4, 4, 2, 2, 2]),
        (interval(2.0, 0.4, 0.7), [4, 4, 4, 4, 4, 2]),  # steps 3 and 4 of 0..5 at progress .5 and .67
        (lambda progress: 1.0, [2] * 6),
    ],
)
def test_the_null_is_computed_while_it_is_needed(guidance: Any, expected: list[int]) -> None:
    model, rows = make(), []
    model.transformer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.sample(torch.tensor([0, 1]), rng=generators(range(2)), guidance=guidance)
    assert rows == expected
    rows.clear()
    model.sample(None, rng=generators(range(2)), guidance=guidance)
    assert rows == [2] * 6


@pytest.mark.parametrize("adaln", [False, True])
def test_guidance_may_change_on_the_way(adaln: bool) -> None:
    """Each token by the scale of its own step, unguided ones exactly so."""
    model = make(adaln=adaln, gate_init=1.0)
    condition, scale = torch.arange(4), interval(3.0, 0.3, 0.7)
    sampled = model.sample(condition, rng=generators(range(4)), guidance=scale)
    own, null = model.logits(sampled, condition), model.logits(sampled, None)
    scales = torch.tensor([scale(step / 6) for step in range(6)])[:, None, None]
    assert scales.unique().tolist() == [1, 3]
    uniform = uniforms(generators(range(4)), 6, 1)
    assert torch.equal(choose(null + scales * (own - null), uniform), sampled.flatten(1, -2))


def test_tokens_follow_the_models_probabilities() -> None:
    """The first token of many samples, against its distribution."""
    model, count = make(), 4000
    sampled = model.sample(torch.zeros(count, dtype=torch.long), rng=generators(range(count)), temperature=1.5)
    expected = (model.logits(sampled[:1], torch.tensor([0]))[0, 0, 0] / 1.5).softmax(-1)
    found = sampled[:, 0, 0, 0].bincount(minlength=7) / count
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


@settings(max_examples=10, deadline=None)
@given(
    grid=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    num_codebooks=st.integers(1, 3),
    order=st.sampled_from(["flattened", "delay"]),
    rotary=st.sampled_from(["sequence", "grid", "grid_zero_prefix"]),
)
def test_any_token_space(grid: list[int], num_codebooks: int, order: str, rotary: str) -> None:
    model = make(space=TokenSpace(tuple(grid), num_codebooks, 7, "f" * 16), order=order, rotary=rotary, dim=24)
    sampled = model.sample(torch.tensor([0, 1]), rng=generators(range(2)), temperature=0)
    assert sampled.shape == (2, *grid, num_codebooks)
    assert torch.equal(model.logits(sampled, torch.tensor([0, 1])).argmax(-1), sampled.flatten(1, -2))


@pytest.mark.parametrize("order", ["flattened", "delay"])
def test_every_codebook_has_rows_of_its_own(order: str) -> None:
    model = make(space=TokenSpace((3,), 2, 7, "f" * 16), order=order)
    x = tokens(model, 1)
    model.logits(x, torch.tensor([0])).square().sum().backward()
    assert model.embedding.weight.grad is not None
    fed = (x + torch.tensor([0, 7])).flatten()[:-1].tolist()  # the last token is fed to none
    empty = [14] if order == "delay" else []
    moved = model.embedding.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert moved == sorted({*fed, *empty})


def test_is_the_llama_of_transformers() -> None:
    """With positions along one sequence, and pairs of rotary dimensions in its order, the same logits and tokens."""
    transformers = pytest.importorskip("transformers", reason="pip install 'tessella[bench]' brings transformers")
    length, codes, dim, heads = 9, 7, 32, 2
    ours = make(
        space=TokenSpace((length,), 1, codes, "f" * 16), conditioner={"name": "none"}, rotary="sequence", dim=dim
    )
    config = transformers.LlamaConfig(
        vocab_size=codes, hidden_size=dim, intermediate_size=256, num_hidden_layers=2, num_attention_heads=heads,
        max_position_embeddings=length, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()

    def in_halves(weight: Tensor) -> Tensor:
        pairs = weight.view(heads, -1, 2, dim)
        return pairs.transpose(1, 2).reshape(dim, dim)

    state = {"model.embed_tokens.weight": ours.embedding.weight, "lm_head.weight": ours.head.weight}
    assert ours.transformer.norm is not None
    state["model.norm.weight"] = ours.transformer.norm.weight
    for number, block in enumerate(ours.transformer.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        gate, value = block.feed_forward.up.weight.chunk(2)
        layer = {
            "self_attn.q_proj": in_halves(q), "self_attn.k_proj": in_halves(k), "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": value,
            "mlp.down_proj": block.feed_forward.down.weight, "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.feed_forward_norm.weight,
        }  # fmt: skip
        state |= {f"model.layers.{number}.{name}.weight": weight for name, weight in layer.items()}
    theirs.load_state_dict(state)
    x = tokens(ours)
    start = ours.conditioner(None, 2)
    with torch.no_grad():
        embedded = torch.cat([start, ours.embedding(x[:, :-1, 0])], 1)
        torch.testing.assert_close(ours.logits(x, None)[:, :, 0], theirs(inputs_embeds=embedded).logits)
        greedy = theirs.generate(inputs_embeds=start, max_new_tokens=length, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.sample(None, rng=generators(range(2)), temperature=0)[..., 0], greedy)


def test_learns_a_sequence_by_heart() -> None:
    torch.manual_seed(0)
    model = AR(SPACE, conditioner=LABEL, dim=32, num_layers=1, num_heads=2, dropout=0.0, token_dropout=0.0)
    x, condition = tokens(model, 5), torch.arange(5)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        model(x, condition).loss.backward()
        optimizer.step()
    assert torch.equal(model.sample(condition, rng=generators(range(5)), temperature=0), x)


def test_rotary_axes_must_divide_the_heads() -> None:
    with pytest.raises(ValueError, match=r"on 3 axes need a head size .* divisible by 6, got 16"):
        make(space=TokenSpace((2, 2, 2), 1, 7, "f" * 16))
