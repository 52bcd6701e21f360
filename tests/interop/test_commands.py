"""The commands around other programs' models, as one types them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_tokenizer, write_pictures

import tessella
from tessella import cli
from tests.interop.test_convert import container, simvq_case


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tessella", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_convert_compare_and_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = container(simvq_case().state, "state_dict", tmp_path)
    assert run(monkeypatch, "convert", "auto", str(file), "theirs") == 0
    assert run(monkeypatch, "convert", "simvq", str(file), "named") == 0
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    tokens = [tessella.load(folder).encode(x) for folder in ("theirs", "named")]
    assert torch.equal(*tokens)
    assert torch.equal(tessella.from_pretrained("theirs").encode(x), tokens[0])
    assert run(monkeypatch, "convert", "ibq", str(file), "wrong") == 2
    assert not Path("wrong").exists()
    assert "error:" in capsys.readouterr().err
    tiny_tokenizer().save("ours")
    write_pictures(tmp_path / "pictures", 4, size=32)
    command = ("compare", "ours", "theirs", "--data", "pictures", "--out", "compared", "--device", "cpu")
    assert run(monkeypatch, *command) == 0
    page = Path("compared/report.html").read_text()
    assert "theirs" in page
    assert "JPEG" in page


def test_pushing_needs_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save("ours")
    assert run(monkeypatch, "push", "ours", "me/mine") == 2
    assert "first: tessella evaluate ours" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    (("convert", "nothing", "file.pt", "out"), "unknown family 'nothing'; choose one of: "),
    (("convert", "auto", "nowhere.pt", "out"), "nowhere.pt"),
    (("convert-config", "nowhere.yaml", "out.toml"), "nowhere.yaml"),
    (("export", "nowhere", "--to", "onnx"), "no model in nowhere"),
    (("compare", "nowhere", "--out", "out"), "nowhere"),
    (("predict", "ours", "a.png"), "ours"),
])  # fmt: skip
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tiny_tokenizer().save("ours")
    assert run(monkeypatch, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not Path("out").exists()
