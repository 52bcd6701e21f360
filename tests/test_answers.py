"""Whatever a user's input can raise ends in one line that names the key or file, status 2, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY_RECIPE, tiny_tokenizer, write_pictures

import tessella
from tessella import cli

GENERATOR = """
[generator]
name = "ar"
conditioner = {name = "label"}
dim = 16
num_layers = 1
num_heads = 2
[training]
steps = 2
batch_size = 4
num_workers = 0
"""

TRAIN = ("train", "tiny.toml", "--out", "new")
NEXT = ("train", "next.toml", "--tokenizer", "run", "--out", "new")


def change(*assignments: str) -> tuple[str, ...]:
    return tuple(part for text in assignments for part in ("--set", text))


CASES: list[tuple[tuple[str, ...], str]] = [
    # recipes
    (("train", "nowhere"), "unknown recipe 'nowhere'; choose one of: "),
    (("train", "[/foo]"), "unknown recipe '[/foo]'"),
    (("train", "nowhere.toml"), "no recipe file nowhere.toml"),
    (("train", "itself.toml", "--out", "new"), "recipe itself.toml extends itself: itself.toml -> itself.toml"),
    (("train", "circle.toml", "--out", "new"), "extends itself: circle.toml -> round.toml -> circle.toml"),
    (("train", "five.toml", "--out", "new"), "recipe five.toml: 'extends' must be a recipe's name or file, got 5"),
    (("train", "latin.toml", "--out", "new"), "recipe latin.toml is no UTF-8 text"),
    (("train", "binary.toml", "--out", "new"), "recipe binary.toml"),
    (("train", "broken.toml", "--out", "new"), "recipe broken.toml: "),
    ((*TRAIN, *change("quantizer.name=5")), "5 is no text for 'quantizer.name'; choose one of: "),
    ((*TRAIN, *change("quantizer.name=vqq")), "unknown quantizer 'vqq'; choose one of: "),
    ((*TRAIN, *change("quantizer.sizes=3")), "unknown key 'quantizer.sizes'; accepted: "),
    ((*TRAIN, *change("quantizer=3")), "'quantizer' must be a table"),
    ((*TRAIN, *change("loss=3")), "'loss' must be a table"),
    ((*TRAIN, *change("loss.name=picture")), "unknown objective 'picture'; choose one of: "),
    ((*TRAIN, *change("medium.name=smell")), "unknown medium 'smell'; choose one of: "),
    ((*TRAIN, *change("data.name=cloud")), "unknown data set 'cloud'; choose one of: "),
    ((*TRAIN, *change("training.steps.x=3")), "'training.steps' is no table, so 'training.steps.x' cannot be set"),
    ((*TRAIN, *change("training.steps")), "'training.steps' is no assignment"),
    ((*TRAIN, *change("=3")), "'=3' is no assignment"),
    ((*TRAIN, *change("training.=3")), "'training.=3' is no assignment"),
    ((*TRAIN, *change("nothing.here=3")), "unknown section 'nothing'; accepted: "),
    # settings out of range
    ((*TRAIN, *change("training.lr=fast")), "'training.lr' must be a valid number, got 'fast'"),
    ((*TRAIN, *change("training.lr=nan")), "lr must be positive, got nan"),
    ((*TRAIN, *change("training.lr=0")), "lr must be positive, got 0"),
    ((*TRAIN, *change("training.lr=inf")), "lr must be positive, got inf"),
    ((*TRAIN, *change("training.steps=0")), "steps must be positive"),
    ((*TRAIN, *change("training.steps=1.5")), "'training.steps' must be a valid integer"),
    ((*TRAIN, *change("training.seed=-1")), "seed must be at least 0, got -1"),
    ((*TRAIN, *change("training.num_workers=-1")), "num_workers must be at least 0, got -1"),
    ((*TRAIN, *change("training.max_skip_share=2")), "max_skip_share must lie in [0, 1], got 2"),
    ((*TRAIN, *change("training.weight_decay=-0.1")), "weight_decay must be at least 0, got -0.1"),
    ((*TRAIN, *change("training.final_lr=-1")), "final_lr must be at least 0, got -1"),
    ((*TRAIN, *change("training.warmup_steps=-5")), "warmup_steps must be at least 0, got -5"),
    ((*TRAIN, *change("training.batch_size=3")), "must be a multiple of accumulate"),
    ((*TRAIN, *change("training.betas=[0.9]")), "betas must be two numbers in [0, 1)"),
    ((*TRAIN, *change("training.optimizer=sgd")), "'training.optimizer' must be 'adam', 'adamw' or 'muon'"),
    ((*TRAIN, *change("training.precision=fp8")), "'training.precision' must be 'auto', 'fp32' or 'bf16'"),
    ((*TRAIN, *change("training.ema_decay=1")), "ema_decay must lie in (0, 1)"),
    ((*TRAIN, *change("training.milestones=[-1]")), "milestones must be steps of at least 1"),
    ((*TRAIN, *change("loss.l2_weight=-1")), "l1_weight, l2_weight and perceptual_weight must be >= 0"),
    ((*TRAIN, *change("loss.perceptual_weight=1")), "needs the weights of LPIPS"),
    ((*TRAIN, *change("loss.adversary.start_step=24")), "loss.adversary.start_step (24) is not before the end"),
    ((*TRAIN, *change("autoencoder.num_res_blocks=-1")), "num_res_blocks"),
    ((*TRAIN, *change("autoencoder.channels=0")), "channels"),
    ((*TRAIN, *change("autoencoder.patch_px=5")), "16"),
    ((*TRAIN, *change("quantizer.codebook_size=0")), "codebook_size"),
    ((*TRAIN, *change("quantizer.codebook_size=1000000000000")), "memory"),
    ((*TRAIN, *change("data.crop_px=18")), "18"),
    ((*TRAIN, *change("data.crop_px=0")), "crop_px must be at least 1, got 0"),
    ((*TRAIN, *change("data.crop_px=4000")), "smaller than crop_px=4000"),
    ((*TRAIN, *change("data.path=nowhere")), "'nowhere'"),
    ((*TRAIN, *change("data.held_out=7")), "held_out"),
    # data
    ((*TRAIN, "--data", "nowhere"), "no data at nowhere"),
    ((*TRAIN, "--data", "empty"), "empty"),
    ((*TRAIN, "--data", "texts"), "cannot be used"),
    ((*TRAIN, "--data", "parquet:pictures"), "pictures"),
    ((*TRAIN, "--data", "tokens.parquet"), "tokens.parquet"),
    # places
    (("train", "tiny.toml", "--out", "tiny.toml"), "tiny.toml is a file, not a folder"),
    (("train", "tiny.toml", "--out", "pictures"), "pictures is not empty and holds no run"),
    (("train", "tiny.toml", "--out", "run", *change("training.lr=0.1")), "holds a run of another recipe (training.lr"),
    ((*TRAIN, "--device", "abacus"), "device 'abacus' cannot be used here"),
    ((*TRAIN, "--init", "nowhere"), "no model in nowhere"),
    ((*TRAIN, "--weights", "nowhere"), "nowhere"),
    ((*TRAIN, "--tokenizer", "run"), "--tokenizer is for recipes of generators"),
    # generators
    (("train", "next.toml", "--out", "new"), "a generator needs a tokenizer"),
    (("train", "next.toml", "--tokenizer", "nowhere", "--out", "new"), "no model in nowhere"),
    ((*NEXT, "--weights", "empty"), "--weights is for recipes of tokenizers"),
    ((*NEXT, *change("generator.dim=17")), "17"),
    ((*NEXT, *change("generator.conditioner.num_classes=0")), "num_classes"),
    ((*NEXT, *change("generator.conditioner.num_classes=1")), "label"),
    ((*NEXT, *change('generator.conditioner={name="image", size_px=[16, 16], patch_px=4, num_heads=2}')), "'context'"),
    (("sample", "run", "--out", "new"), "holds a tokenizer, not a generator"),
    (("sample", "generator", "--out", "new", "--temperature", "nan"), "temperature must be a finite number"),
    (("sample", "generator", "--out", "new", "--temperature", "-1"), "temperature must be a finite number"),
    (("sample", "generator", "--out", "new", "--guidance", "nan"), "guidance must be"),
    (("sample", "generator", "--out", "new", "--guidance", "steep:1"), "guidance must be"),
    (("sample", "generator", "--out", "new", "--top-k", "0"), "top_k must be at least 1"),
    (("sample", "generator", "--out", "new", "--top-p", "1.5"), "top_p must be in (0, 1]"),
    (("sample", "generator", "--out", "new", "--class", "owl"), "unknown class 'owl'"),
    (("sample", "generator", "--out", "new", "--option", "num_steps=3"), "unknown option 'num_steps' of AR"),
    (("sample", "generator", "--out", "tiny.toml"), "tiny.toml is a file, not a folder"),
    (("sample", "generator", "--out", "pictures"), "is not empty and holds no samples"),
    # applying
    (("evaluate", "nowhere"), "no model in nowhere"),
    (("evaluate", "tiny.toml"), "no model in tiny.toml"),
    (("evaluate", "run", "--data", "nowhere", "--out", "new"), "no data at nowhere"),
    (("evaluate", "run", "--weights", "nowhere", "--out", "new"), "nowhere"),
    (("evaluate", "run", "--protocol", "adm", "--out", "new"), "give their file with --features"),
    (("evaluate", "run", "--protocol", "adm", "--features", "tiny.toml", "--out", "new"), "tiny.toml"),
    (("evaluate", "generator", "--whole", "--out", "new"), "--whole is for tokenizers"),
    (("evaluate", "generator", "--out", "new"), "give their file with --features"),
    (("tokenize", "saved", "--out", "new"), "was saved without a data set; name one with --data"),
    (("tokenize", "saved", "--out", "new", "--data", "photos", "--whole"), "has no whole signals"),
    (("tokenize", "run", "--out", "tiny.toml"), "tiny.toml"),
    (("tokenize", "run", "--out", "new", "--whole", "--variants", "2"), "they need data.crop_px"),
    (("tokenize", "damaged", "--out", "new"), "model.safetensors"),
    (("detokenize", "run", "pictures", "--out", "new"), "holds no tokens"),
    (("detokenize", "run", "nowhere", "--out", "new"), "no tokens at nowhere"),
    (("detokenize", "saved", "tokens", "--out", "new"), "holds tokens of tokenizer"),
    (("report", "nowhere"), "no model in nowhere"),
    (("report", "run", "--out", "tiny.toml"), "tiny.toml"),
    (("study", "collapse", "--bits", "eight"), "'eight' is no comma-separated list"),
    (("study", "collapse", "--methods", "VQQ", "--out", "new"), "unknown method 'VQQ'; choose from: "),
    (("study", "collapse", "--bits", "3", "--out", "new"), "no size 2^3; choose from: "),
    (("study", "claims", "--only", "usge", "--out", "new"), "unknown experiment 'usge'; choose from: usage, scq, "),
    (("study", "claims", "--out", "new"), "judges pictures by a network: give its weights with --weights"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with good and bad files, a run, a generator and tokens."""
    folder = tmp_path_factory.mktemp("answers")
    before = Path.cwd()
    os.chdir(folder)
    torch.manual_seed(0)
    write_pictures(folder / "pictures", 40)
    Path("tiny.toml").write_text(TINY_RECIPE)
    Path("next.toml").write_text(GENERATOR)
    Path("itself.toml").write_text('extends = "itself.toml"\n')
    Path("circle.toml").write_text('extends = "round.toml"\n')
    Path("round.toml").write_text('extends = "circle.toml"\n')
    Path("five.toml").write_text("extends = 5\n")
    Path("latin.toml").write_bytes("[data]\nname = 'Bücher'\n".encode("latin-1"))
    Path("binary.toml").write_bytes(bytes(range(1, 256)))
    Path("broken.toml").write_text("[data\n")
    Path("empty").mkdir()
    Path("texts").mkdir()
    for number in range(8):
        Path(f"texts/{number}.png").write_text("no picture")
    tessella.train("tiny.toml", out=Path("run"), overrides=["training.steps=1"], device="cpu", quiet=True)
    tessella.train("next.toml", tokenizer=Path("run"), out=Path("generator"), device="cpu", quiet=True)
    tessella.tokenize(Path("run"), Path("tokens"), device="cpu")
    shutil.copy("tokens/tokens-00000.parquet", "tokens.parquet")
    tiny_tokenizer().save("saved")
    shutil.copytree("run", "damaged")
    for file in Path("damaged").rglob("model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    yield folder
    os.chdir(before)


@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[" ".join(case)[:70] for case, _ in CASES])
def test_one_line_and_nothing_left(
    place: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.rmtree(place / "new", ignore_errors=True)  # what another case left is its own fault
    before = sorted(place.rglob("*"))
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tessella", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    assert end.value.code == 2, printed
    assert message in printed.err
    assert "Traceback" not in printed.err
    lines = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, printed.err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [("train", "tiny.toml", "--nope"), ("sample",), ("evaluate", "run", "--split", "middle"), ("nothing",),
     ("tokenize", "run", "--out", "x", "--limit", "0"), ("evaluate", "run", "--protocol", "mine")],
)  # fmt: skip
def test_usage_is_answered_without_torch(place: Path, arguments: tuple[str, ...]) -> None:

    code = (
        "import sys; from tessella.cli import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=place, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def read_only(place: Path) -> Iterator[Path]:
    """A place that cannot be written, even by root."""
    folder = place / "read_only"
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=100k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        folder.rmdir()
        pytest.skip(f"cannot mount a read-only place: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "tiny.toml", "--out", "read_only/run"),
        ("train", "next.toml", "--tokenizer", "run", "--out", "read_only/run"),
        ("tokenize", "run", "--out", "read_only/tokens"),
        ("detokenize", "run", "tokens", "--out", "read_only/files"),
        ("evaluate", "run", "--out", "read_only/records"),
        ("sample", "generator", "--out", "read_only/drawn"),
        ("report", "run", "--out", "read_only/page"),
        ("compare", "run", "--out", "read_only/page"),
        ("export", "run", "--to", "torch", "--out", "read_only/programs"),
        ("study", "collapse", "--data", "pictures", "--methods", "FSQ", "--bits", "6", "--out", "read_only/study"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_place_that_cannot_be_written_is_named(
    place: Path, read_only: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["tessella", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    errors = capsys.readouterr().err
    assert end.value.code == 2, errors
    assert "Read-only file system" in errors
    assert "read_only" in errors
    assert "Traceback" not in errors
