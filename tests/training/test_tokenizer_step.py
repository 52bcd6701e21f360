from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import picture_step, tiny_tokenizer
from torch import Tensor

from tessella.data.base import Batch, ImageDataset
from tessella.data.loader import training_batches
from tessella.errors import ConfigError
from tessella.losses.adversarial import Adversary
from tessella.training.logs import read_log
from tessella.training.loop import Loop
from tessella.training.tokenizer import TokenizerStep

CPU = torch.device("cpu")


class Smooth(ImageDataset):
    """Smooth pictures of 32 px, made from their index."""

    def __init__(self) -> None:
        super().__init__(split="train")

    def __len__(self) -> int:
        return 12

    def read(self, index: int):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def sample(self, index: int, rng: object = None):  # type: ignore[no-untyped-def]
        small = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(index)) * 2 - 1
        x = torch.nn.functional.interpolate(small, size=32, mode="bicubic").clamp(-1, 1)[0]
        return {"x": x, "label": 0, "key": f"smooth-{index}"}


def loop(**settings: object) -> Loop:
    chosen = {"steps": 3, "batch_size": 4, "num_workers": 0, "log_every": 1, "warmup_steps": 0, **settings}
    return Loop(**chosen)  # type: ignore[arg-type]


def game(**settings: object) -> TokenizerStep:
    torch.manual_seed(0)
    adversary = Adversary(discriminator_channels=4, **settings)  # type: ignore[arg-type]
    return picture_step(tiny_tokenizer(), adversary=adversary)


def flat(step: TokenizerStep, which: str) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.parameter_groups()[which]]).clone()


def batch(count: int = 4) -> Batch:
    data = Smooth()
    x = torch.stack([data.sample(i)["x"] for i in range(count)])
    return Batch(x=x, label=torch.zeros(count), key=[], skipped=[])


def test_the_loss_is_the_sum_of_its_terms() -> None:
    step = game(weight=0.3)
    step.objective.l1_weight = 0.5
    out = step(batch())
    x_hat = step.model(batch()["x"]).x_hat
    error = x_hat - batch()["x"]
    pixels = 0.5 * error.abs().mean() + error.square().mean()
    assert out.terms["pixels"].item() == pytest.approx(pixels.item(), rel=1e-5)
    assert out.terms["adversary"].item() == pytest.approx(0.3 * out.metrics["adversarial"].item(), rel=1e-6)
    assert out.losses["tokenizer"].item() == pytest.approx(sum(term.item() for term in out.terms.values()), rel=1e-6)


def test_both_networks_train_and_both_norms_are_logged(tmp_path: Path) -> None:
    step = game()
    before = {name: flat(step, name) for name in ("tokenizer", "discriminator")}
    loop().run(step, Smooth(), tmp_path, device=CPU)
    for name, weights in before.items():
        assert not torch.equal(weights, flat(step, name)), name
    for row in read_log(tmp_path / "log.jsonl"):
        for name in ("tokenizer", "discriminator", "pixels", "adversary"):
            assert row[f"grad_norm/{name}"] > 0


def test_the_logged_norm_of_a_term_is_that_of_its_gradient_at_the_reconstruction(tmp_path: Path) -> None:
    first = next(training_batches(Smooth(), batch_size=4, seed=0))
    x_hat = game().train().model(first["x"]).x_hat
    expected = 2 * (x_hat - first["x"]).norm().item() / x_hat.numel()
    loop(steps=1).run(game(), Smooth(), tmp_path, device=CPU)
    (row,) = read_log(tmp_path / "log.jsonl")
    assert row["grad_norm/pixels"] == pytest.approx(expected, rel=1e-4)


def test_before_its_start_the_discriminator_rests(tmp_path: Path) -> None:
    step = game(start_step=2)
    before = flat(step, "discriminator")
    loop(steps=2).run(step, Smooth(), tmp_path / "a", device=CPU)
    assert torch.equal(before, flat(step, "discriminator"))
    rows = read_log(tmp_path / "a" / "log.jsonl")
    assert all(row["adversarial_weight"] == 0 and row["loss/discriminator"] == 0 for row in rows)
    step = game(start_step=2)
    loop(steps=3).run(step, Smooth(), tmp_path / "b", device=CPU)
    assert not torch.equal(before, flat(step, "discriminator"))


def test_accumulation_gives_both_networks_the_mean_gradient(tmp_path: Path) -> None:
    gradients = []
    for accumulate in (1, 4):
        step = game()
        assert step.objective.adversary is not None
        step.objective.adversary.discriminator = torch.nn.Conv2d(
            3, 1, 8, stride=8
        )  # no batch normalisation: no picture matters
        torch.nn.init.constant_(step.objective.adversary.discriminator.weight, 0.01)  # to another
        loop(steps=1, accumulate=accumulate, clip_norm=math.inf).run(
            step, Smooth(), tmp_path / str(accumulate), device=CPU
        )
        groups = step.parameter_groups()
        gradients.append({name: torch.cat([p.grad.flatten() for p in group]) for name, group in groups.items()})
    for name in ("tokenizer", "discriminator"):
        whole, parts = gradients[0][name], gradients[1][name]
        assert whole.norm() > 0
        assert (whole - parts).norm() < 1e-4 * whole.norm(), name


def test_a_game_continues_with_the_same_bits(tmp_path: Path) -> None:
    whole, first, second = (game(lecam_weight=0.1, warmup_steps=3) for _ in range(3))
    settings = {"batch_size": 4, "checkpoint_every": 2, "ema_decay": 0.9, "decay": "constant"}
    loop(steps=4, **settings).run(whole, Smooth(), tmp_path / "whole", device=CPU)
    loop(steps=2, **settings).run(first, Smooth(), tmp_path / "parts", device=CPU)
    loop(steps=4, **settings).run(second, Smooth(), tmp_path / "parts", device=CPU)
    torch.testing.assert_close(whole.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # inside torch.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_game_gives_the_same_losses(tmp_path: Path) -> None:
    for compiled in (False, True):
        loop(steps=2, compile=compiled).run(game(), Smooth(), tmp_path / str(compiled), device=CPU)
    eager, fast = (read_log(tmp_path / str(compiled) / "log.jsonl") for compiled in (False, True))
    for one, other in zip(eager, fast, strict=True):
        for name, value in one.items():
            if not name.startswith(("seconds", "images_per_s")):
                assert other[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_overfitting_one_batch(tmp_path: Path) -> None:
    step = picture_step(tiny_tokenizer())
    loop(steps=60, lr=5e-3, overfit_batch=True, log_every=20).run(step, Smooth(), tmp_path, device=CPU)
    rows = read_log(tmp_path / "log.jsonl")
    assert rows[-1]["psnr_db"] > rows[0]["psnr_db"] + 5
    keys: set[str] = set()

    class Watch(Smooth):
        def sample(self, index: int, rng: object = None):  # type: ignore[no-untyped-def]
            keys.add(f"{index}")
            return super().sample(index, rng)

    loop(steps=5, overfit_batch=True).run(picture_step(tiny_tokenizer()), Watch(), tmp_path / "b", device=CPU)
    assert len(keys) == 4


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="needs the weights of LPIPS: give their folder with --weights"):
        picture_step(tiny_tokenizer(), perceptual_weight=1.0)
    with pytest.raises(ValueError, match="must be >= 0"):
        picture_step(tiny_tokenizer(), perceptual_weight=-1.0)


def test_a_discriminator_that_never_starts_is_refused(workspace: Path) -> None:
    import tessella

    overrides = ["loss.adversary.start_step=24", "loss.adversary.discriminator_channels=4"]
    with pytest.raises(ConfigError, match=r"start_step \(24\) is not before the end .*\(training.steps = 24\)"):
        tessella.train("tiny.toml", out=Path("run"), overrides=overrides, device="cpu")
