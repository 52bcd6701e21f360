"""The block stack: against torch's own layers, against formulas written out, and its cache against none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tessella.attention import KVCache, Linear, Rotary, rotate, sampling
from tessella.transformer import Block, Transformer, default_hidden

DIM, HEADS = 32, 4


def make(num_layers: int = 2, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(DIM, num_layers, HEADS, **{"init_std": 0.2, "gate_init": 1.0, **options}).eval()


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


class TestRotary:
    def test_hand_worked_grid(self) -> None:
        """Head size 8 on two axes: two pairs each, turning by 1 and 10000^(-1/2) = 0.01 a place."""
        cos, sin = Rotary((2, 3), prefix=1).table(8)
        assert cos.shape == (7, 8)
        row, column = 1, 2
        angles = torch.tensor([row, 0.01 * row, column, 0.01 * column]).repeat_interleave(2)
        torch.testing.assert_close(cos[6], angles.cos())
        torch.testing.assert_close(sin[6], angles.sin() * torch.tensor([-1.0, 1.0]).repeat(4))

    def test_hand_worked_sequence(self) -> None:
        cos, _ = Rotary((3,)).table(4)
        torch.testing.assert_close(cos[2], torch.tensor([2.0, 2.0, 0.02, 0.02]).cos())

    def test_prefix_is_not_turned_or_zero(self) -> None:
        x = vectors(3)
        table = Rotary((1, 1), prefix=2).table(DIM)
        assert torch.equal(rotate(x, *table), x)  # the only place of the grid is its origin
        table = Rotary((1, 1), prefix=2, prefix_zero=True).table(DIM)
        assert torch.equal(rotate(x, *table), torch.cat([torch.zeros(2, DIM), x[2:]]))

    def test_repeat_and_overhang(self) -> None:
        plain, twice = Rotary((2, 2)).table(8), Rotary((2, 2), repeat=2).table(8)
        assert torch.equal(twice, plain.repeat_interleave(2, dim=1))
        # The raster goes on in the row below the grid.
        assert torch.equal(Rotary((2, 2), overhang=2).table(8), Rotary((3, 2)).table(8))

    @pytest.mark.parametrize(
        "rotary", [Rotary((5,)), Rotary((2, 3), prefix=1, overhang=2), Rotary((2, 2, 2), repeat=3)]
    )
    def test_length(self, rotary: Rotary) -> None:
        assert rotary.table(24).shape == (2, rotary.length, 24)

    def test_is_complex_multiplication(self) -> None:
        x, angle = vectors(6).double(), torch.rand(6, DIM // 2, dtype=torch.float64)
        both = angle.repeat_interleave(2, dim=-1)
        signs = torch.tensor([-1.0, 1.0]).repeat(DIM // 2)
        expected = torch.view_as_complex(x.view(6, -1, 2)) * torch.polar(torch.ones_like(angle), angle)
        torch.testing.assert_close(rotate(x, both.cos(), both.sin() * signs), torch.view_as_real(expected).flatten(1))

    def test_products_depend_on_the_distance_alone(self) -> None:
        q, k = vectors(1), vectors(1, seed=1)
        table = Rotary((5, 5)).table(DIM)
        at = lambda x, row, column: rotate(x, *table[:, 5 * row + column])  # noqa: E731
        first = (at(q, 0, 3) * at(k, 2, 1)).sum()
        torch.testing.assert_close(first, (at(q, 2, 4) * at(k, 4, 2)).sum(), rtol=1e-4, atol=1e-4)
        assert not torch.isclose(first, (at(q, 2, 4) * at(k, 4, 3)).sum(), rtol=1e-2)

    def test_head_size_must_divide_among_axes(self) -> None:
        with pytest.raises(ValueError, match=r"on 2 axes need a head size .* divisible by 4, got 6"):
            Rotary((2, 2)).table(6)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (1, 1), (2, 1), (1, 2), (1, 3), (0, 1)])
def test_linear_of_any_number_of_rows(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    ours = Linear(DIM, 7, bias=bias)
    theirs = nn.Linear(DIM, 7, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    gradients = []
    for layer in (ours, theirs):
        x = vectors(*shape).requires_grad_()
        out = layer(x)
        assert out.shape == (*shape, 7)
        assert out.is_contiguous()
        out.square().sum().backward()
        gradients.append([out.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert ours(vectors()).shape == (7,)


@pytest.mark.parametrize("mkldnn", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 1), (1,), (2,), (1, 2), (3,), (2, 17), (300,)])
def test_linear_while_sampling(
    shape: tuple[int, ...], bias: bool, mkldnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: mkldnn)
    torch.manual_seed(0)
    layer = Linear(DIM, 7, bias=bias)
    x = vectors(*shape)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    with sampling():
        out = layer(x)
        assert not out.requires_grad
        strided = layer(x[..., None].expand(*x.shape, 2)[..., 0])
        halves = layer.bfloat16()(x.bfloat16())
    assert out.is_contiguous()
    assert out.layout is torch.strided
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(strided, out)
    assert halves.dtype is torch.bfloat16


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_is_torchs_encoder(post_norm: bool, activation: Any) -> None:
    ours = make(3, norm="layer", post_norm=post_norm, activation=activation, bias=True, causal=False)
    gelu = nn.GELU(approximate="tanh" if activation == "gelu_tanh" else "none")
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 4 * DIM, activation=gelu, batch_first=True, norm_first=not post_norm)
    theirs = nn.TransformerEncoder(layer, 3, nn.LayerNorm(DIM), enable_nested_tensor=False).train()
    assert isinstance(theirs.norm, nn.LayerNorm)
    assert (ours.norm is None) == post_norm
    for block, other in zip(ours.blocks, theirs.layers, strict=True):
        other.load_state_dict(
            {
                "self_attn.in_proj_weight": block.attention.qkv.weight,
                "self_attn.in_proj_bias": block.attention.qkv.bias.data.normal_(),
                "self_attn.out_proj.weight": block.attention.out.weight,
                "self_attn.out_proj.bias": block.attention.out.bias,
                "linear1.weight": block.feed_forward.up.weight,
                "linear1.bias": block.feed_forward.up.bias,
                "linear2.weight": block.feed_forward.down.weight,
                "linear2.bias": block.feed_forward.down.bias,
                "norm1.weight": block.attention_norm.weight.data.normal_(),
                "norm1.bias": block.attention_norm.bias.data.normal_(),
                "norm2.weight": block.feed_forward_norm.weight,
                "norm2.bias": block.feed_forward_norm.bias,
            }
        )
    if post_norm:
        theirs.norm = None
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for other in theirs.layers:
        other.self_attn.dropout = 0.0
    x = vectors(2, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def written_out(block: Block, x: Tensor, rotation: Tensor, condition: Tensor) -> Tensor:
    """One causal RMSNorm, SwiGLU block with adaptive norms in float64, one sample, head by head."""
    parameters = {name: p.double() for name, p in block.named_parameters()}
    x, rotation, condition = x.double(), rotation.double(), condition.double()
    silu = lambda a: a * torch.sigmoid(a)  # noqa: E731
    norm = lambda a, weight: a / (a.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight  # noqa: E731
    modulation = parameters["modulation.linear.weight"] @ silu(condition) + parameters["modulation.linear.bias"]
    g1, g2, s1, s2, b1, b2 = modulation.split(DIM)
    y = norm(x, parameters["attention_norm.weight"]) * (1 + s1) + b1
    q, k, v = (y @ parameters["attention.qkv.weight"].T).split(DIM, dim=-1)
    heads = []
    for head in torch.arange(DIM).split(DIM // HEADS):
        turned_q, turned_k = (rotate(a[:, head], *rotation) for a in (q, k))
        logits = turned_q @ turned_k.T / math.sqrt(DIM // HEADS)
        logits = logits.masked_fill(torch.ones_like(logits).triu(1) == 1, -math.inf)
        heads.append(logits.softmax(-1) @ v[:, head])
    h = x + g1 * (torch.cat(heads, -1) @ parameters["attention.out.weight"].T)
    y = norm(h, parameters["feed_forward_norm.weight"]) * (1 + s2) + b2
    gate, value = (y @ parameters["feed_forward.up.weight"].T).chunk(2, dim=-1)
    return h + g2 * ((silu(gate) * value) @ parameters["feed_forward.down.weight"].T)


def test_block_formula() -> None:
    rotary = Rotary((2, 3), prefix=1)
    stack = make(1, rotary=rotary, adaln=True, final_norm=False)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, condition = vectors(7), vectors()
    out = stack(x[None], condition=condition[None])[0]
    expected = written_out(stack.blocks[0], x, rotary.table(DIM // HEADS), condition)  # type: ignore[arg-type]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_final_norm_is_modulated() -> None:
    stack = make(0, adaln=True)
    assert stack.modulation is not None
    stack.modulation.linear.weight.data.zero_()
    stack.modulation.linear.bias.data = torch.cat([torch.full((DIM,), 0.5), torch.full((DIM,), -2.0)])
    x = vectors(1, 1)
    out = stack(x, condition=vectors(1))
    torch.testing.assert_close(out, 1.5 * functional.rms_norm(x, (DIM,), eps=1e-5) - 2)


@pytest.mark.parametrize(
    ("dim", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584), (1536, 4096), (1920, 5120), (3200, 8704)]
)
def test_hidden_sizes_of_llamagen_and_ibq(dim: int, hidden: int) -> None:
    assert default_hidden(dim, "swiglu") == hidden
    assert default_hidden(dim, "gelu") == 4 * dim


def test_initial_weights() -> None:
    torch.manual_seed(0)
    stack = Transformer(256, 2, 4, adaln=True, gate_init=1e-3)
    for name, parameter in stack.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif "norm" in name:
            assert (parameter == 1).all()
        elif "modulation" not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    gates, rest = stack.blocks[0].modulation.linear.weight.split([512, 1024])  # type: ignore[union-attr]
    assert gates.std().item() == pytest.approx(2e-5, rel=0.05)
    assert rest.std().item() == pytest.approx(0.01, rel=0.05)
    assert stack.modulation is not None
    assert stack.modulation.linear.weight.std().item() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("causal", [True, False])
def test_who_sees_whom(causal: bool) -> None:
    stack, x = make(causal=causal), vectors(1, 6)
    before = stack(x)
    for place in range(6):
        moved = x.clone()
        moved[:, place] += 1
        changed = (stack(moved) != before).any(-1)[0]
        assert changed.tolist() == [not causal or other >= place for other in range(6)]


CACHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": {"rotary": Rotary((3, 3), prefix=1, prefix_zero=True)},
    "adaln": {"rotary": Rotary((10,)), "adaln": True},
    "context": {"context_attention": True, "norm": "layer", "activation": "gelu", "bias": True},
}


def given_to(options: dict[str, Any]) -> dict[str, Tensor]:
    """The condition and context that a stack needs."""
    given: dict[str, Tensor] = {}
    if "adaln" in options:
        given["condition"] = vectors(2, seed=1)
    if "context_attention" in options:
        given["context"] = vectors(2, 3, seed=2)
    return given


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("options", CACHED.values(), ids=CACHED)
@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 9)))
def test_cache_changes_nothing(options: dict[str, Any], static: bool, cuts: set[int]) -> None:
    """The sequence in any pieces."""
    stack, x, needed = make(**options), vectors(2, 10), given_to(options)
    with torch.no_grad():
        cache = stack.new_cache(10, static=static)
        ends = [*sorted(cuts), 10]
        pieces = [stack(x[:, a:b], cache=cache, **needed) for a, b in zip([0, *ends], ends, strict=False)]
        torch.testing.assert_close(torch.cat(pieces, 1), stack(x, **needed), rtol=1e-5, atol=1e-5)


def test_constants_are_computed_once() -> None:
    stack = make(adaln=True, context_attention=True)
    calls: list[str] = []
    for name, module in stack.named_modules():
        if name.endswith(("modulation", "context_attention.kv")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    cache = stack.new_cache(3)
    for step in range(3):
        stack(vectors(2, 1, seed=step), condition=vectors(2), context=vectors(2, 4), cache=cache)
    assert len(calls) == len(set(calls)) == 2 + 2 + 1


def test_cache_keeps_the_first_samples() -> None:
    options = CACHED["context"] | {"adaln": True}
    stack, x, needed = make(**options), vectors(2, 4), given_to(options)
    cache = stack.new_cache(4)
    stack(x[:, :2], cache=cache, **needed)
    cache.keep(1)
    rest = stack(x[:1, 2:], cache=cache, condition=needed["condition"][:1], context=needed["context"][:1])
    torch.testing.assert_close(rest, stack(x, **needed)[:1, 2:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_step_is_compiled_once() -> None:
    torch._dynamo.reset()
    stack, x = make(rotary=Rotary((3, 3), prefix=1)), vectors(1, 10)
    step = torch.compile(stack, fullgraph=True, backend="aot_eager")
    cache = stack.new_cache(10, static=True)
    with torch.no_grad():
        pieces = [step(x[:, :1], cache=cache), step(x[:, 1:2], cache=cache)]
        with torch.compiler.set_stance("fail_on_recompile"):
            pieces += [step(x[:, place : place + 1], cache=cache) for place in range(2, 10)]
        torch.testing.assert_close(torch.cat(pieces, 1), stack(x), rtol=1e-5, atol=1e-5)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpoint_activations in (False, True):
        stack = make(adaln=True, dropout=0.3, checkpoint_activations=checkpoint_activations).train()
        torch.manual_seed(1)
        stack(vectors(2, 5), condition=vectors(2)).square().sum().backward()
        gradients.append([p.grad for p in stack.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_dropout_is_of_training() -> None:
    stack, x = make(dropout=0.5, attention_dropout=0.5), vectors(1, 4)
    assert torch.equal(stack(x), stack(x))
    stack.train()
    assert not torch.equal(stack(x), stack(x))


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"adaln": True}, {}, "needs a condition"),
        ({}, {"condition": vectors(1)}, "takes no condition"),
        ({"context_attention": True}, {}, "needs a context"),
        ({}, {"context": vectors(1, 2)}, "takes no context"),
        ({"rotary": Rotary((4,))}, {}, "5 positions, but the rotary table has 4"),
        ({"causal": False}, {"cache": KVCache(2, 5)}, "only a causal transformer can use a cache"),
        ({}, {"cache": KVCache(2, 4)}, "the cache has room for 4 positions, 5 are needed"),
        ({"rotary": Rotary((5,))}, {"cache": KVCache(2, 6)}, "6 positions, but the rotary table has 5"),
    ],
)
def test_refuses(options: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)(vectors(1, 5), **given)


def test_refuses_sizes_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"dim \(30\) must be a multiple of num_heads \(4\)"):
        Transformer(30, 1, 4)
    with pytest.raises(ValueError, match="adaln modulates"):
        Transformer(32, 1, 4, adaln=True, post_norm=True)
