from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture_step, single_threaded, tiny_tokenizer
from PIL import Image
from torch import Tensor, nn

from tessella.checkpoint import latest_checkpoint, load_state
from tessella.data.base import Batch, ImageDataset, Picture
from tessella.errors import TrainingError
from tessella.objectives.base import StepOutput
from tessella.training.base import Step
from tessella.training.logs import read_log
from tessella.training.loop import Loop


class Noise(ImageDataset):
    def __init__(self) -> None:
        super().__init__(split="train", crop_px=8)

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> Picture:
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Picture(Image.fromarray(pixels), index % 3, f"noise-{index}")


def loop(**settings: object) -> Loop:
    return Loop(**{"steps": 3, "batch_size": 4, "num_workers": 0, "log_every": 1, **settings})  # type: ignore[arg-type]


CPU = torch.device("cpu")


def test_learning_rate_by_hand() -> None:
    s = loop(steps=110, lr=0.2, warmup_steps=10, final_lr=0.1)
    assert s.learning_rate(0) == pytest.approx(0.02)
    assert s.learning_rate(9) == pytest.approx(0.2)
    assert s.learning_rate(10) == pytest.approx(0.2)
    assert s.learning_rate(60) == pytest.approx(0.02 + 0.18 / 2)  # half way down the cosine
    assert s.learning_rate(110) == pytest.approx(0.02)
    linear = loop(steps=110, lr=0.2, warmup_steps=10, final_lr=0.1, decay="linear")
    assert linear.learning_rate(35) == pytest.approx(0.02 + 0.18 * 0.75)
    assert loop(lr=0.2, warmup_steps=0, decay="constant").learning_rate(2) == 0.2
    held = loop(steps=110, lr=0.2, warmup_steps=10, hold=0.5, final_lr=0.1, decay="linear")
    assert [held.learning_rate(step) for step in (10, 60, 85, 110)] == pytest.approx([0.2, 0.2, 0.11, 0.02])
    dropped = loop(lr=0.2, warmup_steps=0, decay="constant", milestones=[3, 5])
    assert [dropped.learning_rate(step) for step in (2, 3, 5)] == pytest.approx([0.2, 0.02, 0.002])


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    gradients = []
    for accumulate in (1, 4):
        step = picture_step(tiny_tokenizer(seed=3))
        settings = loop(steps=1, accumulate=accumulate, clip_norm=math.inf)
        settings.run(step, Noise(), tmp_path / str(accumulate), device=CPU)
        gradients.append(torch.cat([p.grad.flatten() for p in step.parameters() if p.grad is not None]))
    assert len(gradients[0]) == sum(p.numel() for p in tiny_tokenizer().parameters())
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


class Duel(Step):
    """Two parameters, each a constant in the other's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_tokenizer()
        self.a = nn.Parameter(torch.tensor(2.0))
        self.b = nn.Parameter(torch.tensor(3.0))
        self.nan_at: int | None = None
        self.calls = 0

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"a": [self.a], "b": [self.b]}

    def forward(self, batch: Batch) -> StepOutput:
        self.calls += 1
        poison = math.nan if self.calls == self.nan_at else 0.0
        return StepOutput({"a": self.a * self.b.detach() + poison, "b": -self.a.detach() * self.b})

    def preview(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        return [batch["x"]]


def test_each_loss_trains_its_own_parameters_only(tmp_path: Path) -> None:
    step = Duel()
    loop(steps=1, optimizer="adam", lr=0.5, warmup_steps=0, clip_norm=math.inf).run(step, Noise(), tmp_path, device=CPU)
    # Adam's first step is lr * sign(gradient): loss a pulls a down (b > 0), loss b pushes b up (a > 0).
    assert step.a.item() == pytest.approx(1.5)
    assert step.b.item() == pytest.approx(3.5)
    (row,) = read_log(tmp_path / "log.jsonl")
    assert row["grad_norm/a"] == pytest.approx(3.0)
    assert row["grad_norm/b"] == pytest.approx(2.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    step = Duel()
    step.nan_at = 3
    with pytest.raises(TrainingError) as failure:
        loop(steps=9, checkpoint_every=1).run(step, Noise(), tmp_path, device=CPU)
    message = str(failure.value)
    assert "loss/a is nan at step 3" in message
    assert f"last good checkpoint: {tmp_path}/checkpoints/step-00000002" in message
    assert message.count("noise-") == 4
    assert load_state(tmp_path / "checkpoints" / "step-00000002")["position"] == 2


def test_ema_by_hand(tmp_path: Path) -> None:
    step = picture_step(tiny_tokenizer())
    history = []

    def remember(module: nn.Module, args: object) -> None:
        history.append(step.model.to_code.bias.detach().clone())

    step.register_forward_pre_hook(remember)
    model = loop(steps=3, ema_decay=0.75).run(step, Noise(), tmp_path, device=CPU)
    first, second, last = *history[1:], step.model.to_code.bias.detach()  # type: ignore[union-attr]
    average = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * last  # starts at the weights after the first step
    torch.testing.assert_close(model.to_code.bias, average)  # type: ignore[union-attr]


def test_averages_that_remember_the_first_weights_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, settings in {"long": {"ema_decay": 0.1}, "none": {}, "short": {"ema_decay": 0.8}}.items():
        assert not caplog.messages
        loop(steps=3, **settings).run(picture_step(tiny_tokenizer()), Noise(), tmp_path / name, device=CPU)
    assert any("after 3 steps 64 % of the averaged weights" in message for message in caplog.messages)


def test_codebooks_and_biases_are_not_decayed(tmp_path: Path) -> None:
    from tessella.quantizers import VQ

    step = picture_step(tiny_tokenizer(VQ(16, 4)))
    loop(steps=1, weight_decay=0.1).run(step, Noise(), tmp_path, device=CPU)
    folder = latest_checkpoint(tmp_path)
    assert folder is not None
    groups = load_state(folder)["optimizers"]["tokenizer"]["param_groups"]
    decayed = {group["weight_decay"]: len(group["params"]) for group in groups}
    matrices = sum(p.ndim > 1 for name, p in step.model.named_parameters() if not name.startswith("quantizer"))
    assert decayed[0.1] == matrices
    assert decayed[0.0] == len(list(step.model.parameters())) - matrices


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"batch_size": 4, "accumulate": 3}, "must be a multiple of accumulate"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"hold": 1.5}, "hold must lie in"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop(**settings)


# --- interruption ---------------------------------------------------------------------------------------------------


def start(workspace: Path, out: str, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tessella", "train", "tiny.toml", "--out", out, "--device", "cpu", *more]
    return subprocess.Popen(command, cwd=workspace, env=single_threaded(), stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.005)


def final_state(run: Path) -> tuple[bytes, dict[str, object]]:
    folder = run / "checkpoints" / "step-00000024"
    state = load_state(folder)
    assert state.pop("precision") == "fp32"
    del state["seconds"]
    return (folder / "model.safetensors").read_bytes(), state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_continued_ends_with_the_same_bits(workspace: Path, optimizer: str) -> None:
    choice = ("--set", f"training.optimizer={optimizer}")
    code, errors = finish(start(workspace, "whole", *choice))
    assert code == 0, errors
    process = start(workspace, "killed", *choice)
    wait_for(workspace / "killed" / "checkpoints" / "step-00000008", process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (workspace / "killed" / "checkpoints" / "step-00000024").exists()
    code, errors = finish(start(workspace, "killed", *choice))
    assert code == 0, errors
    (weights, state), (other_weights, other_state) = (final_state(workspace / run) for run in ("whole", "killed"))
    assert weights == other_weights
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)
    rows, other_rows = (read_log(workspace / run / "log.jsonl") for run in ("whole", "killed"))
    assert [row["step"] for row in other_rows] == list(range(1, 25))
    assert [row["loss/tokenizer"] for row in rows] == [row["loss/tokenizer"] for row in other_rows]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(workspace: Path, number: signal.Signals) -> None:
    recipe = workspace / "tiny.toml"
    recipe.write_text(recipe.read_text().replace("checkpoint_every = 4", "checkpoint_every = 1000000")
                      .replace("steps = 24", "steps = 100000"))  # fmt: skip
    process = start(workspace, "run")
    log = workspace / "run" / "log.jsonl"
    wait_for(log, process)
    while not log.read_text():
        time.sleep(0.005)
    process.send_signal(number)
    code, errors = finish(process)
    assert code == 128 + number
    assert f"interrupted by {number.name}; saved" in errors
    folder = latest_checkpoint(workspace / "run")
    assert folder is not None
    assert load_state(folder)["position"] == len(log.read_text().splitlines())


def test_another_recipe_in_the_same_folder_is_refused(workspace: Path) -> None:
    import tessella
    from tessella.errors import ConfigError

    short = ["training.steps=1", "training.num_workers=0"]
    tessella.train("tiny.toml", out=Path("run"), overrides=short, device="cpu")
    with pytest.raises(ConfigError, match=r"another recipe \(training.lr: 0.001 -> 0.1\)"):
        tessella.train("tiny.toml", out=Path("run"), overrides=[*short, "training.lr=0.1"], device="cpu")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        tessella.train("tiny.toml", out=Path("pictures"), overrides=short, device="cpu")


def test_unreadable_pictures_are_skipped_counted_and_named(workspace: Path) -> None:
    import tessella

    whole = (workspace / "pictures" / "class_0" / "000.png").read_bytes()
    (workspace / "pictures" / "class_0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    tessella.train("tiny.toml", out=Path("run"), overrides=["training.steps=12"], device="cpu")
    assert "skipped" in (workspace / "run" / "train.log").read_text()
    assert "cut.png" in (workspace / "run" / "train.log").read_text()
    for index in range(20):
        (workspace / "pictures" / "class_1" / f"text{index}.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"more than max_skip_share=0\.05 allows"):
        tessella.train("tiny.toml", out=Path("run2"), overrides=["training.steps=100"], device="cpu")


def test_log_rows_are_json_and_a_half_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(file) == [{"step": 1}]
    assert os.path.getsize(file) > 0


def test_divergence_names_step_checkpoint_and_samples(workspace: Path) -> None:
    import tessella

    overrides = ["training.lr=1e10", "training.warmup_steps=0", "training.clip_norm=inf"]
    with pytest.raises(TrainingError) as failure:
        tessella.train("tiny.toml", out=Path("run"), overrides=overrides, device="cpu", quiet=True)
    message = str(failure.value)
    assert "at step" in message
    assert "last good checkpoint" in message
    assert ".png" in message


def test_what_cannot_take_its_first_step_leaves_nothing(workspace: Path) -> None:
    import tessella

    for overrides in (["data.crop_px=18"], ["quantizer.codebook_size=0"], ["training.seed=-1"]):
        with pytest.raises(ValueError):  # noqa: PT011
            tessella.train("tiny.toml", out=Path("run"), overrides=overrides, device="cpu", quiet=True)
        assert not Path("run").exists(), overrides
    tessella.train("tiny.toml", out=Path("run"), overrides=["training.steps=1"], device="cpu", quiet=True)


def test_data_that_changed_is_said_and_must_be_allowed(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    import tessella
    from tessella.errors import ConfigError

    settings = {"out": Path("run"), "device": "cpu", "quiet": True, "overrides": ["training.steps=12"]}
    tessella.train("tiny.toml", **settings)  # type: ignore[arg-type]
    shutil.rmtree("run/checkpoints/step-00000012")  # as if killed before its end
    (workspace / "pictures/class_0/000.png").unlink()
    with pytest.raises(ConfigError, match=r"the data is not what run began with \(.*\); --allow-changed-data"):
        tessella.train("tiny.toml", **settings)  # type: ignore[arg-type]
    tessella.train("tiny.toml", allow_changed_data=True, **settings)  # type: ignore[arg-type]
    assert "going on all the same" in caplog.text


def test_a_run_has_one_writer(workspace: Path) -> None:
    import tessella
    from tessella.storage import FolderInUse, lock_folder

    with lock_folder(Path("run"), what="training"), pytest.raises(FolderInUse, match="run is being written by process"):
        tessella.train("tiny.toml", out=Path("run"), device="cpu", quiet=True)
    assert not Path("run").exists()
    tessella.train("tiny.toml", out=Path("run"), overrides=["training.steps=1"], device="cpu", quiet=True)
