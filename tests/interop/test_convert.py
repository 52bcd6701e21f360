"""Every family: a checkpoint with the published names, shapes and container, against the original's arithmetic."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import tessella
from tessella.interop import FAMILIES, convert
from tessella.interop.base import Checkpoint, Options, empty_generator
from tessella.interop.convert import family_module, recognise
from tessella.interop.reading import sha256
from tessella.tokenizer import TokenSpace
from tests.interop.originals import (
    DIFFUSERS,
    LLAMAGEN,
    TAMING,
    VQGAN,
    Cosmos,
    Llama,
    Magvit,
    MaskGIT,
    Shapes,
    Size,
    State,
    TiTok,
    nearest_code,
)  # fmt: skip

NARROW = Size(channels=32, mult=(1, 1, 2, 2, 4), blocks=2, features=48)
DEEP = Size(channels=32, mult=(1, 1, 2, 2, 4), blocks=4, features=48)
PICTURES = (2, 3, 32, 48)


@dataclass
class Case:
    """A checkpoint, and what its authors' program makes of pictures in [-1, 1]."""

    family: str
    state: State
    encode: Callable[[State, Tensor], Tensor]  # indices [B, *S]
    decode: Callable[[State, Tensor], Tensor]
    extra: State
    pictures: tuple[int, ...] = PICTURES


def dotless(name: str) -> str:
    return "model_ema." + name.replace(".", "")


def discriminator() -> State:
    """What the losses of Lightning modules leave beside the model."""
    shapes = Shapes()
    shapes.conv("loss.discriminator.main.0", 3, 4, 4)
    shapes.norm("loss.discriminator.main.3", 4)
    shapes.conv("loss.perceptual_loss.net.slice1.0", 3, 4, 3)
    shapes["loss.perceptual_loss.lin0.model.1.weight"] = (1, 4, 1, 1)
    return shapes.random(9)


def averaged(state: State, *, frozen: tuple[str, ...] = ()) -> State:
    """``state`` as the moving averages of other weights; of ``frozen`` there is none."""
    plain = {name: x if name in frozen else torch.randn_like(x) for name, x in state.items()}
    average = {dotless(name): x for name, x in state.items() if name not in frozen}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    return {**plain, **average, **counters, dotless("loss.discriminator.main.0.weight"): torch.zeros(4, 3, 4, 4)}


def vqgan_case(family: str, names: Any, size: Size, *, dim: int, metric: str) -> Case:
    model = VQGAN(names, size, dim=dim, codes=64)

    def encode(s: State, x: Tensor) -> Tensor:
        z, codes = model.latent(s, x), s["quantize.embedding.weight"]
        if metric == "dot":
            return (z @ codes.T).argmax(-1)
        if metric == "cosine":
            return (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)
        return nearest_code(z, codes)

    def decode(s: State, indices: Tensor) -> Tensor:
        codes = s["quantize.embedding.weight"][indices]
        return model.picture(s, F.normalize(codes, dim=-1) if metric == "cosine" else codes)

    return Case(family, model.shapes().random(1), encode, decode, {})


def simvq_case() -> Case:
    model = Magvit(Size(32, (1, 2, 2, 4), 2, 32), adaptive=False)
    shapes = model.shapes()
    shapes["quantize.embedding.weight"] = (64, 32)
    shapes.linear("quantize.embedding_proj", 32, 32)

    def codes(s: State) -> Tensor:
        return (
            s["quantize.embedding.weight"] @ s["quantize.embedding_proj.weight"].T + s["quantize.embedding_proj.bias"]
        )

    return Case(
        "simvq", shapes.random(2), lambda s, x: nearest_code(model.latent(s, x), codes(s)),
        lambda s, i: model.picture(s, codes(s)[i]), discriminator(),
    )  # fmt: skip


def magvit_case() -> Case:
    model = Magvit(Size(32, (1, 1, 2, 2, 4), 4, 10), adaptive=True)
    powers = 2 ** torch.arange(10)
    return Case(
        "open_magvit2", model.shapes().random(3), lambda s, x: ((model.latent(s, x) > 0).long() * powers).sum(-1),
        lambda s, i: model.picture(s, ((i[..., None] & powers) > 0) * 2.0 - 1), discriminator(),
    )  # fmt: skip


def maskgit_case() -> Case:
    model = MaskGIT(Size(32, (1, 1, 2, 2, 4), 2, 16), codes=64)
    return Case(
        "maskgit_vqgan", model.shapes().random(4),
        lambda s, x: nearest_code(model.latent(s, (x + 1) / 2), s["quantize.embedding.weight"]),
        lambda s, i: 2 * model.picture(s, s["quantize.embedding.weight"][i]) - 1, {},
    )  # fmt: skip


def titok_case(proxy: bool) -> Case:
    painter = MaskGIT(Size(32, (1, 1, 2, 2, 4), 2, 16), codes=24) if proxy else None
    model = TiTok(side=2, latents=5, dim=6, codes=64, encoder=(64, 2), decoder=(128, 2), proxy=painter)

    def codes(s: State) -> Tensor:
        table = s["quantize.embedding.weight"]
        return F.normalize(table, dim=-1) if proxy else table

    def encode(s: State, x: Tensor) -> Tensor:
        z = model.latent(s, (x + 1) / 2)
        return nearest_code(F.normalize(z, dim=-1) if proxy else z, codes(s))

    return Case(
        "titok",
        model.shapes().random(5),
        encode,
        lambda s, i: 2 * model.picture(s, codes(s)[i]) - 1,
        {},
        (2, 3, 32, 32),
    )


def cosmos_case(halvings: int) -> Case:
    model = Cosmos(Size(32, (2, 4, 4), 2, 24), halvings=halvings)
    return Case("cosmos", model.shapes().random(6), model.indices, model.picture, {})


def container(content: State, kind: str, folder: Path) -> Path:
    """``content`` as its authors store it."""
    if kind == "safetensors":
        save_file({name: x.contiguous() for name, x in content.items()}, folder / "model.safetensors")
        return folder / "model.safetensors"
    file = folder / "weights.ckpt"
    wrapped: dict[str, Any] = {
        "state_dict": {"epoch": 3, "state_dict": content, "optimizer_states": [{}], "hyper_parameters": {"lr": 1e-4}},
        "model": {"model": content, "steps": 7},
        "module": {"module": content},
        "bare": content,
    }
    torch.save(wrapped[kind], file)
    return file


def cases() -> dict[str, tuple[Callable[[], Case], str, torch.dtype, bool]]:
    return {
        "ibq": (lambda: vqgan_case("ibq", TAMING, DEEP, dim=48, metric="dot"), "state_dict", torch.float32, True),
        "ibq-plain": (lambda: vqgan_case("ibq", TAMING, DEEP, dim=48, metric="dot"), "bare", torch.float16, False),
        "taming": (lambda: vqgan_case("taming", TAMING, NARROW, dim=48, metric="euclidean"), "state_dict",
                   torch.float32, False),
        "llamagen": (lambda: vqgan_case("llamagen", LLAMAGEN, NARROW, dim=8, metric="cosine"), "model", torch.float32,
                     False),
        "llamagen-8": (lambda: vqgan_case("llamagen", LLAMAGEN, Size(32, (1, 2, 2, 4), 2, 48, (3,)), dim=8,
                                          metric="cosine"), "bare", torch.bfloat16, False),
        "diffusers": (lambda: vqgan_case("diffusers", DIFFUSERS, Size(32, (1, 2, 4), 2, 4, (1,)), dim=4,
                                         metric="euclidean"), "safetensors", torch.float32, False),
        "simvq": (simvq_case, "state_dict", torch.float32, True),
        "open_magvit2": (magvit_case, "state_dict", torch.float32, True),
        "maskgit_vqgan": (maskgit_case, "bare", torch.float32, False),
        "titok": (lambda: titok_case(False), "safetensors", torch.float32, False),
        "titok-proxy": (lambda: titok_case(True), "bare", torch.float32, False),
        "cosmos-16": (lambda: cosmos_case(2), "safetensors", torch.bfloat16, False),
        "cosmos-8": (lambda: cosmos_case(1), "module", torch.float32, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_converted_tokenizers_encode_and_decode_as_the_originals(name: str, tmp_path: Path) -> None:
    make, kind, dtype, has_average = cases()[name]
    case = make()
    stored = {key: x.to(dtype) for key, x in case.state.items()}
    content = (
        averaged(stored, frozen=("quantize.embedding.weight",) if name == "simvq" else ()) if has_average else stored
    )
    if name == "llamagen":
        content["quantize.codebook_used"] = torch.zeros(65536)
    file = container({**content, **case.extra}, kind, tmp_path)
    out = convert(None, file, tmp_path / "model")
    tokenizer = tessella.load(out)

    original = {key: x.float() for key, x in stored.items()}
    x = torch.rand(case.pictures) * 2 - 1
    indices = case.encode(original, x)
    assert len(indices.unique()) > 2
    ours = tokenizer.encode(x)
    assert torch.equal(ours[..., 0], indices)
    expected = case.decode(original, indices)
    torch.testing.assert_close(
        tokenizer.decode(ours), expected, rtol=0, atol=1e-5 * max(1, float(expected.abs().max()))
    )

    about = tomllib.loads((out / "recipe.toml").read_text())["source"]
    assert about["family"] == case.family
    assert (about["file"], about["sha256"]) == (file.name, sha256(file))
    assert about["weights"] == ("ema" if has_average else "plain")
    assert all(about[key] for key in ("model", "licence", "paper", "protocol"))


def published() -> dict[str, tuple[str, Shapes, int, int | None]]:
    """family, shapes, tensors and numbers (codebooks included) of the released models."""
    simvq = Magvit(Size(128, (1, 2, 2, 4), 2, 128), adaptive=False).shapes()
    simvq["quantize.embedding.weight"] = (65536, 128)
    simvq.linear("quantize.embedding_proj", 128, 128)
    maskgit = MaskGIT(Size(), codes=1024)
    deep = Size(blocks=4)
    magvit = Magvit(Size(blocks=4, features=18), adaptive=True)
    eight = Size(mult=(1, 2, 2, 4), attention=(3,))
    return {
        **{
            f"IBQ-{codes}": ("ibq", VQGAN(TAMING, deep, dim=256, codes=codes).shapes(), 543, numbers)
            for codes, numbers in {1024: None, 8192: None, 16384: 110_982_019, 262144: None}.items()
        },
        "VQGAN-1024": ("taming", VQGAN(TAMING, Size(), dim=256, codes=1024).shapes(), 343, None),
        "LlamaGen VQ-16": ("llamagen", VQGAN(LLAMAGEN, Size(), dim=8, codes=16384).shapes(), 343, 71_883_403),
        "LlamaGen VQ-8": ("llamagen", VQGAN(LLAMAGEN, eight, dim=8, codes=16384).shapes(), None, 70_109_835),
        "SimVQ-65536": ("simvq", simvq, 150, None),
        "Open-MAGVIT2 262144": ("open_magvit2", magvit.shapes(), None, None),
        "MaskGIT-VQGAN 1024": ("maskgit_vqgan", maskgit.shapes(), None, 54_515_587),
        "Cosmos-Tokenizer-DI16x16": ("cosmos", Cosmos(Size(mult=(2, 4, 4)), halvings=2).shapes(), None, None),
        "Cosmos-Tokenizer-DI8x8": ("cosmos", Cosmos(Size(mult=(2, 4, 4)), halvings=1).shapes(), None, None),
        "TiTok-L-32": ("titok", TiTok(side=16, latents=32, dim=12, codes=4096, encoder=(1024, 24), decoder=(1024, 24),
                                      proxy=maskgit).shapes(), None, None),
        "TiTok-BL-64": ("titok", TiTok(side=16, latents=64, dim=64, codes=8192, encoder=(768, 12), decoder=(1024, 24),
                                       proxy=None).shapes(), None, None),
        "VQModel 8192": ("diffusers", VQGAN(DIFFUSERS, Size(mult=(1, 2, 4), features=3, attention=()), dim=3,
                                            codes=8192).shapes(), None, None),
    }  # fmt: skip


@pytest.mark.parametrize("name", published())
def test_every_tensor_of_the_released_sizes_has_its_place(name: str) -> None:
    family, shapes, tensors, numbers = published()[name]
    assert tensors in (None, len(shapes))
    assert numbers in (None, shapes.count())
    checkpoint = Checkpoint(Path("published.ckpt"), shapes.meta())
    assert recognise(checkpoint) == family
    converted = family_module(family).read(checkpoint, Options())
    assert converted.name == name
    assert sum(x.numel() for x in converted.tokenizer.state_dict().values()) == shapes.count()


@pytest.mark.parametrize(
    ("adaptive", "layers", "heads", "dim", "hidden", "tensors", "millions"),
    [
        (False, 12, 12, 768, 2048, 88, 110.89), (False, 24, 16, 1024, 2816, 172, 342.91),
        (False, 36, 20, 1280, 3584, 256, 774.70), (False, 48, 24, 1536, 4096, None, 1410.97),
        (False, 24, 32, 3200, 8704, None, 3096.66),
        (True, 16, 16, 1024, 2816, 150, 342.995), (True, 20, 20, 1280, 3584, 186, 649.641),
        (True, 24, 24, 1536, 4096, 222, 1076.103), (True, 30, 30, 1920, 5120, 276, 2063.332),
    ],
)  # fmt: skip
def test_every_tensor_of_the_released_generators_has_its_place(
    adaptive: bool, layers: int, heads: int, dim: int, hidden: int, tensors: int | None, millions: float
) -> None:
    from tessella.interop import ibq_ar, llamagen
    from tessella.interop.base import Account

    model = Llama(dim=dim, layers=layers, heads=heads, hidden=hidden, codes=16384, adaptive=adaptive)
    shapes = model.shapes()
    assert tensors in (None, len(shapes))
    assert shapes.count() / 1e6 == pytest.approx(millions, abs=0.012)
    checkpoint = Checkpoint(Path("published.pt"), shapes.meta())
    assert recognise(checkpoint) == ("ibq_ar" if adaptive else "llamagen")
    module: Any = ibq_ar if adaptive else llamagen
    recipe = module.generator_recipe(checkpoint)
    assert recipe["generator"]["num_heads"] == heads
    generator = empty_generator(recipe, TokenSpace((16, 16), 1, 16384, "0"))
    account = Account(checkpoint, "a generator")
    account.fit(generator, module.table(layers) if adaptive else module.generator_table(layers))
    account.close()
    assert sum(x.numel() for x in generator.state_dict().values()) == shapes.count()


@pytest.mark.parametrize("adaptive", [False, True])
def test_converted_generators_compute_as_the_originals(adaptive: bool, tmp_path: Path) -> None:
    model = Llama(dim=128, layers=2, heads=2, hidden=256, codes=64, adaptive=adaptive)
    state = model.shapes(classes=5).random(7)
    if adaptive:
        gan = VQGAN(TAMING, DEEP, dim=48, codes=64)
        tokenizer = {f"first_stage_model.{name}": x for name, x in gan.shapes().random(8).items()}
        file = container({**state, **tokenizer}, "state_dict", tmp_path)
        out = convert("ibq_ar", file, tmp_path / "model", size_px=64)
    else:
        gan = VQGAN(LLAMAGEN, NARROW, dim=8, codes=64)
        torch.save({"model": gan.shapes().random(8)}, tmp_path / "vq_ds16_c2i.pt")
        file = tmp_path / "c2i_B.pt"
        torch.save({"module": {**state, "freqs_cis": torch.zeros(17, 16, 2)}}, file)
        out = convert("llamagen", file, tmp_path / "model", size_px=64)
    generator, tokenizer_ = tessella.load_generator(out)
    assert generator.space.grid == (4, 4)
    indices = torch.randint(64, (1, 4, 4, 1))
    with torch.no_grad():
        ours = generator.logits(indices, torch.tensor([3]))[0, :, 0]  # type: ignore[operator]
    torch.testing.assert_close(ours, model.logits(state, 3, indices.flatten(), 4), rtol=1e-4, atol=1e-5)
    assert tokenizer_.decode(indices).shape == (1, 3, 64, 64)
    assert tomllib.loads((out / "recipe.toml").read_text())["source"]["family"] == (
        "ibq_ar" if adaptive else "llamagen"
    )


def test_a_generator_needs_its_tokenizer(tmp_path: Path) -> None:
    state = Llama(dim=64, layers=1, heads=1, hidden=64, codes=64, adaptive=False).shapes(classes=5).random(0)
    torch.save(state, tmp_path / "c2i_B.pt")
    with pytest.raises(tessella.interop.ConversionError, match=r"without its tokenizer.*vq_ds16_c2i\.pt"):
        convert("llamagen", tmp_path / "c2i_B.pt", tmp_path / "model")
    other = VQGAN(LLAMAGEN, NARROW, dim=8, codes=32)
    torch.save(other.shapes().random(8), tmp_path / "vq.pt")
    with pytest.raises(tessella.interop.ConversionError, match="64 codes, the tokenizer 32"):
        convert("llamagen", tmp_path / "c2i_B.pt", tmp_path / "model", tokenizer=tmp_path / "vq.pt")
    assert not (tmp_path / "model").exists()


def test_diffusers_in_both_directions(tmp_path: Path) -> None:
    from tessella.interop.diffusers import export

    case = vqgan_case("diffusers", DIFFUSERS, Size(32, (1, 2, 4), 1, 4, (1,)), dim=4, metric="euclidean")
    save_file(case.state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel", "norm_type": "group"}))
    ours = convert("diffusers", tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "ours")
    back = export(ours, tmp_path / "back")
    from safetensors.torch import load_file

    again = load_file(back / "diffusion_pytorch_model.safetensors")
    assert again.keys() == case.state.keys()
    assert all(torch.equal(again[name], x) for name, x in case.state.items())
    config = json.loads((back / "config.json").read_text())
    assert config["block_out_channels"] == [32, 64, 128]
    assert config["down_block_types"] == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"]
    assert config["up_block_types"] == ["UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"]
    assert (config["layers_per_block"], config["vq_embed_dim"], config["num_vq_embeddings"]) == (1, 4, 64)
    (tmp_path / "config.json").write_text(json.dumps({"norm_type": "spatial"}))
    with pytest.raises(tessella.interop.ConversionError, match=r"config\.json: norm_type is 'spatial'"):
        convert("diffusers", tmp_path / "diffusion_pytorch_model.safetensors", tmp_path / "ours2")


def test_the_names_that_attention_had_before(tmp_path: Path) -> None:
    case = vqgan_case("diffusers", DIFFUSERS, Size(32, (1, 2), 1, 4, ()), dim=4, metric="euclidean")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, x in case.state.items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = x
    save_file(renamed, tmp_path / "model.safetensors")
    tokenizer = tessella.load(convert("diffusers", tmp_path / "model.safetensors", tmp_path / "ours"))
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(tokenizer.encode(x)[..., 0], case.encode(case.state, x))


def test_the_families_are_told_apart() -> None:
    for _, (make, *_) in cases().items():
        case = make()
        checkpoint = Checkpoint(Path("x"), case.state)
        found = [name for name in FAMILIES if family_module(name).recognises(checkpoint)]
        assert found == [case.family]


def test_haar_is_inverted() -> None:
    from tessella.autoencoders.cosmos import haar, inverse_haar

    x = torch.arange(16.0).view(1, 1, 4, 4)
    bands = haar(x)
    assert bands[0, :, 0, 0].tolist() == [2.5, -2.0, -0.5, 0.0]  # of 0 1 / 4 5: mean, rows, columns, both
    torch.testing.assert_close(inverse_haar(bands), x)
    assert math.isclose(float(bands.square().sum()) * 4, float(x.square().sum()))
