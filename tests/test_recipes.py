"""The shipped recipes do what their names say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import write_pictures

import tessella
from tessella import config
from tessella.autoencoders import conv as autoencoder_module
from tessella.recipe import read_recipe, recipe_names
from tessella.tokenizer import TokenSpace
from tessella.training.logs import read_log

AUDIO = [name for name in recipe_names() if read_recipe(name).get("loss", {}).get("name") == "audio"]
# Dense prediction needs labels beside pictures: tests/test_dense_prediction.py trains those.
SMALL = [
    name for name in recipe_names()
    if (name.endswith("_small") or name.startswith("scq_")) and not name.startswith(("uvim_", "speech_"))
    and name not in AUDIO
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_small_siblings_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures", 8, size=72)
    overrides = ["training.steps=2", "training.batch_size=2", "training.log_every=1", "loss.perceptual_weight=0.0"]
    if "adversary" in read_recipe(name).get("loss", {}):
        overrides += ["loss.adversary.start_step=1", "loss.adversary.warmup_steps=1"]
    folder = tessella.train(name, data="pictures", overrides=overrides, out=Path("run"), device="cpu", quiet=True)
    last = read_log(folder / "log.jsonl")[-1]
    assert last["step"] == 2
    assert ("grad_norm/discriminator" in last) == (len(overrides) == 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in AUDIO if name.endswith("_small")])
def test_small_codecs_train(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sounds = pytest.importorskip("sounds")
    monkeypatch.chdir(tmp_path)
    sounds.write_speech(tmp_path / "speech", 4, rate=24000)
    short = ["training.steps=2", "training.batch_size=2", "training.log_every=1"]
    folder = tessella.train(
        name, data="audio_folder:speech", overrides=[*short, "data.clip_sec=0.4"], out=Path("run"), device="cpu",
        quiet=True,
    )  # fmt: skip
    assert read_log(folder / "log.jsonl")[-1]["step"] == 2
    if name == "fsq_audio_small":
        speech = tessella.train(
            "speech_ar_small", tokenizer=folder, data="audio_folder:speech", overrides=[*short, "data.clip_sec=0.4"],
            out=Path("speaker"), device="cpu", quiet=True,
        )  # fmt: skip
        generator, tokenizer = tessella.load_generator(speech)
        start = torch.randint(1000, (1, 20, 1))
        longer = generator.sample(None, rng=torch.Generator().manual_seed(0), start=start, num_positions=50)  # type: ignore[call-arg]
        assert torch.equal(longer[:, :20], start)
        assert tokenizer.decode(longer).shape == (1, 1, 50 * 160)


@pytest.mark.parametrize("size", [4096, 8192, 65536, 262144])
def test_audio_recipes_build_what_they_say(size: int) -> None:
    name = {4096: "4k", 8192: "8k", 65536: "65k", 262144: "262k"}[size]
    recipe = read_recipe(f"simvq_audio_{name}")
    with torch.device("meta"):
        autoencoder, quantizer = (config.build_section(recipe, section) for section in ("autoencoder", "quantizer"))
    assert (quantizer.codebook_size, quantizer.dim, autoencoder.stride) == (size, 512, 320)
    counts = [sum(p.numel() for p in part.parameters()) for part in (autoencoder.encoder, autoencoder.backbone)]
    assert [round(count / 1e6, 2) for count in counts] == [8.80, 61.90]


@pytest.mark.parametrize(
    ("name", "codebook_size", "parameters"),
    [
        ("llamagen_b", 16384, 110.89), ("llamagen_l", 16384, 342.91), ("llamagen_xl", 16384, 774.70),
        ("ibq_ar_b", 16384, 342.995), ("ibq_ar_l", 16384, 649.641), ("ibq_ar_xl", 16384, 1076.103),
        ("ibq_ar_xxl", 16384, 2063.332), ("maskgit", 1000, 172.438737),
        ("ctf_b", 16384, 86.51 + 326.66), ("ctf_l", 16384, 310.41 + 326.66), ("ctf_xl", 16384, 734.07 + 326.66),
    ],
)  # fmt: skip
def test_generators_have_the_published_sizes(name: str, codebook_size: int, parameters: float) -> None:
    recipe = read_recipe(name)
    recipe["generator"]["conditioner"]["num_classes"] = 1000
    space = TokenSpace((16, 16), 1, codebook_size, "0")
    with torch.device("meta"):
        generator = config.build_section(recipe, "generator", space=space)
    count = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    assert count == pytest.approx(parameters, abs=0.012)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ibq_1024", 107.050), ("ibq_8192", 108.885), ("ibq_16384", 110.982), ("ibq_262144", 173.897),
        ("llamagen_vq16", 71.883403), ("maskgit_fsq", 52.962951 - 0.081920), ("maskgit_vq", 54.515587 - 0.081920),
    ],
)  # fmt: skip
def test_tokenizers_have_the_published_sizes(name: str, parameters: float) -> None:
    recipe = read_recipe(name)
    with torch.device("meta"):
        autoencoder, quantizer = (config.build_section(recipe, section) for section in ("autoencoder", "quantizer"))
        tokenizer = config.build_section(recipe, "tokenizer", autoencoder=autoencoder, quantizer=quantizer)
    count = sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6
    assert count == pytest.approx(parameters, abs=0.0006)


# What papers, their code and their configurations fix, in the units of this package: pictures in [-1, 1].
IBQ_TOKENIZER = {
    "quantizer.commitment_weight": 1.0, "quantizer.codebook_weight": 0.25, "quantizer.entropy_weight": 0.05,
    "quantizer.entropy_temperature": 0.01, "loss.l1_weight": 1.0, "loss.l2_weight": 0.0, "loss.perceptual_weight": 1.0,
    "loss.adversary.loss": "hinge", "loss.adversary.generator_loss": "non_saturating_mean_logit",
    "loss.adversary.weight": 0.1, "loss.adversary.adaptive": False, "loss.adversary.start_step": 0,
    "loss.adversary.lecam_weight": 0.05, "loss.adversary.r1_weight": 0.0, "training.optimizer": "adam",
    "training.lr": 1e-4, "training.betas": [0.5, 0.9], "training.decay": "constant", "training.warmup_steps": 0,
    "training.clip_norm": float("inf"), "training.ema_decay": 0.999, "training.batch_size": 256, "data.flip": False,
}  # fmt: skip
SIMVQ = {
    **IBQ_TOKENIZER, "quantizer.commitment_weight": 0.25, "quantizer.codebook_weight": 1.0,
    "quantizer.entropy_weight": None, "quantizer.entropy_temperature": None, "loss.adversary.lecam_weight": 0.0,
    "training.steps": 250250, "training.milestones": [],
}  # fmt: skip
MASKGIT = {
    # 1 and 10 for pictures in [0, 1]: (2 d)^2 = 4 d^2, and (g / 2)^2 = g^2 / 4.
    "loss.l1_weight": 0.0, "loss.l2_weight": 1.0 / 4, "loss.adversary.r1_weight": 10.0 * 4,
    "loss.perceptual_weight": 0.1, "loss.adversary.discriminator": "stylegan", "loss.adversary.loss": "non_saturating",
    "loss.adversary.generator_loss": "non_saturating", "loss.adversary.weight": 0.1, "loss.adversary.adaptive": False,
    "loss.adversary.r1_every": 1, "training.optimizer": "adam", "training.lr": 1e-4, "training.betas": [0.0, 0.99],
    "training.ema_decay": 0.999, "training.batch_size": 512, "training.steps": 1_000_000, "training.decay": "constant",
}  # fmt: skip
VQGAN_LOSSES = {
    "loss.l1_weight": 1.0, "loss.l2_weight": 0.0, "loss.perceptual_weight": 1.0, "loss.adversary.loss": "hinge",
    "loss.adversary.generator_loss": "hinge", "loss.adversary.weight": 0.8, "loss.adversary.adaptive": True,
    "training.betas": [0.5, 0.9],
}  # fmt: skip
PUBLISHED = {
    **{f"ibq_{size}": {**IBQ_TOKENIZER, "training.milestones": [1251140, 1501370]} for size in (1024, 16384, 262144)},
    "ibq_8192": {**IBQ_TOKENIZER, "training.milestones": [1251140]},
    **{f"simvq_{size}": SIMVQ for size in ("1k", "8k", "65k", "262k")},
    "llamagen_vq16": {
        "quantizer.commitment_weight": 0.25, "quantizer.codebook_weight": 1.0, "quantizer.entropy_weight": 0.0,
        "quantizer.metric": "cosine", "loss.l1_weight": 0.0, "loss.l2_weight": 1.0, "loss.perceptual_weight": 1.0,
        "loss.adversary.loss": "hinge", "loss.adversary.generator_loss": "hinge", "loss.adversary.weight": 0.5,
        "loss.adversary.adaptive": False, "loss.adversary.start_step": 20_000, "training.optimizer": "adam",
        "training.lr": 1e-4, "training.betas": [0.9, 0.95], "training.batch_size": 128, "training.clip_norm": 1.0,
        "training.decay": "constant", "training.warmup_steps": 0,
    },
    "maskgit_fsq": MASKGIT,
    "maskgit_vq": {
        **MASKGIT, "quantizer.commitment_weight": 0.25, "quantizer.codebook_weight": 1.0,
        "quantizer.entropy_weight": 0.1, "quantizer.entropy_temperature": 0.01, "quantizer.init_scale": 0.0541,
    },
    "vqgan": {**VQGAN_LOSSES, "quantizer.commitment_weight": 1.0, "quantizer.codebook_weight": 0.25},
    "scqgan": VQGAN_LOSSES,
    **{
        f"simvq_audio_{size}": {
            # 1,000 times beta = 0.25 and 1
            "quantizer.commitment_weight": 250.0, "quantizer.codebook_weight": 1000.0, "loss.mel_weight": 45.0,
            "loss.adversary.discriminators": ["period", "resolution", "band"], "loss.adversary.weight": 1.0,
            "loss.adversary.feature_weight": 1.0, "loss.adversary.width": 1.0, "loss.adversary.start_step": 0,
            "training.optimizer": "adam", "training.lr": 1e-4, "training.betas": [0.5, 0.9],
            "training.decay": "constant", "training.ema_decay": 0.999, "training.batch_size": 128,
            "training.steps": 138600, "data.clip_sec": 1.0, "data.sample_rate": 24000,
        } for size in ("4k", "8k", "65k", "262k")
    },
    "cifar10_vq": {"quantizer.commitment_weight": 0.25, "quantizer.codebook_weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(("name", "published"), [("maskgit_fsq", 52_962_951), ("maskgit_vq", 54_515_587)])
def test_the_published_form_of_maskgit_differs_by_four_shortcuts(name: str, published: int) -> None:
    recipe = read_recipe(name)
    with torch.device("meta"):
        autoencoder, quantizer = (config.build_section(recipe, section) for section in ("autoencoder", "quantizer"))
    own = sum(parameter.numel() for part in (autoencoder, quantizer) for parameter in part.parameters())
    # The encoder widens 128 -> 256 -> 512 and the decoder narrows: [out, out] in place of [out, in] each time.
    assert own + sum(out * (out - into) for into, out in ((128, 256), (256, 512), (512, 256), (256, 128))) == published
    text = Path(autoencoder_module.__file__).read_text()
    assert "54,515,587" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_and_schedules_are_the_published_ones(name: str) -> None:
    resolved = config.resolve_recipe(read_recipe(name))
    found = {}
    for key in PUBLISHED[name]:
        value = resolved
        for part in key.split("."):
            value = value.get(part) if value is not None else None
        found[key] = value
    assert found == PUBLISHED[name]


AR_SCHEDULES = {
    **{f"llamagen_{size}": (1e-4, [0.9, 0.95], 0.05, 0, "constant", 256) for size in ("b", "l", "xl")},
    **{f"ctf_{size}": (1e-4, [0.9, 0.95], 0.05, 0, "constant", 256) for size in ("b", "l", "xl")},
    "ibq_ar_b": (3e-4, [0.9, 0.95], 0.05, 10009, "linear", 768),
    "ibq_ar_l": (3e-4, [0.9, 0.95], 0.05, 11677, "linear", 768),
    "ibq_ar_xl": (3e-4, [0.9, 0.95], 0.05, 13345, "linear", 768),
    "ibq_ar_xxl": (3e-4, [0.9, 0.95], 0.05, 15013, "linear", 768),
    "maskgit": (1e-4, [0.9, 0.96], 0.045, 5000, "constant", 256),
}


@pytest.mark.parametrize("name", AR_SCHEDULES)
def test_schedules_of_generators_are_the_published_ones(name: str) -> None:
    loop = config.build_section(read_recipe(name), "training")
    found = (loop.lr, list(loop.betas), loop.weight_decay, loop.warmup_steps, loop.decay, loop.batch_size)
    assert found == AR_SCHEDULES[name]
    end = {"ibq_ar_b": 0.1, "ibq_ar_l": 0.1, "ibq_ar_xl": 0.01, "ibq_ar_xxl": 0.01}.get(name, 1.0)
    assert loop.learning_rate(loop.steps) == pytest.approx(end * loop.lr)
    if "ibq" in name:  # flat for the first 5 % after the warm-up
        flat_until = loop.warmup_steps + 0.05 * (loop.steps - loop.warmup_steps)
        assert loop.learning_rate(int(flat_until)) == loop.lr
        assert loop.learning_rate(int(flat_until) + 100) < loop.lr


def test_the_weight_decay_of_the_largest_model_is_said_to_be_constant() -> None:
    text = (Path(config.__file__).parent / "recipes" / "ibq_ar_xxl.toml").read_text()
    assert "raises the weight decay from 0.05 to 0.08" in text


# The share of its length that a used code moves in the first step on latents N(0, 1), at most. The VQGAN's own start,
# entries up to 1/1024, is a few steps of 1e-4 long; codes on the scale of the latents hardly move.
FIRST_STEP = {"vqgan": 0.2, "vqgan_small": 0.02, "cifar10_vq": 0.05}


def with_codes() -> list[str]:
    found = []
    for name in recipe_names():
        quantizer = read_recipe(name).get("quantizer", {}).get("name")
        found += [name] if quantizer in ("vq", "ibq", "scq", "simvq", "gumbel") else []
    return found


@pytest.mark.parametrize("name", with_codes())
def test_the_first_step_leaves_used_codes_about_where_they_start(name: str) -> None:
    recipe = read_recipe(name)
    # The start of all but VQ is the same at any size.
    if recipe["quantizer"]["name"] != "vq":
        recipe["quantizer"]["codebook_size"] = min(recipe["quantizer"]["codebook_size"], 1024)
    torch.manual_seed(0)
    quantizer, loop = config.build_section(recipe, "quantizer"), config.build_section(recipe, "training")
    before = quantizer.codebook.detach().clone()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=loop.learning_rate(0), betas=loop.betas)
    out = quantizer(torch.randn(256, quantizer.dim))
    (out.loss + (out.z_q * torch.randn(256, quantizer.dim)).mean()).backward()
    optimizer.step()
    moved = (quantizer.codebook.detach() - before).norm(dim=-1) / before.norm(dim=-1)
    assert moved[out.indices.unique()].max() < FIRST_STEP.get(name, 0.005)
