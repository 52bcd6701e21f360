"""Names on the hub: from a cache without a network, and against a stand-in of the hub's HTTP interface."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_tokenizer

import tessella
from tessella.checkpoint import fingerprint
from tessella.interop import ConversionError, push
from tessella.interop.card import model_card
from tessella.interop.hub import parse
from tests.interop.originals import TAMING, VQGAN, Size

hub = pytest.importorskip("huggingface_hub", reason="the hub's client is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EVALUATION = {
    "psnr": 21.5, "ssim": 0.61, "lpips": {"alex": 0.2}, "l1": 0.05, "l2": 0.007, "usage": 0.9, "perplexity": 90.0,
    "bits_per_pixel": 0.06, "images_per_sec": 3.0, "num_skipped": 0,
    "protocol": {
        "num_images": 24, "pixels": "uint8", "sizes": {"16x16": 24}, "lpips_files": {}, "data": {"name": "photos"},
        "meaning": dict.fromkeys(
            ("psnr", "ssim", "lpips", "l1", "l2", "usage", "perplexity", "bits_per_pixel", "images_per_sec",
             "num_images", "num_skipped"), "as measured"),
    },
}  # fmt: skip


def cached(cache: Path, repo: str, files: dict[str, bytes]) -> None:
    """``files`` as the hub's client keeps what it has downloaded."""
    root = cache / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        file = root / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_names() -> None:
    assert parse("hf://a/b") == ("a/b", None, None)
    assert parse("hf://a/b@v1.0/c/d.ckpt") == ("a/b", "v1.0", "c/d.ckpt")
    with pytest.raises(ConversionError, match="write hf://OWNER/NAME"):
        parse("hf://a")


@pytest.mark.usefixtures("offline")
def test_ours_from_the_cache(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "model")
    cached(tmp_path, "me/mine", {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()})
    assert fingerprint(tessella.from_pretrained("hf://me/mine", cache=tmp_path)) == fingerprint(tokenizer)
    assert fingerprint(tessella.from_pretrained(tmp_path / "model")) == fingerprint(tokenizer)
    with pytest.raises(ConversionError, match="hf://me/other cannot be had"):
        tessella.from_pretrained("hf://me/other", cache=tmp_path)
    with pytest.raises(ConversionError, match="neither a file nor a folder"):
        tessella.from_pretrained(tmp_path / "nothing")


@pytest.mark.usefixtures("offline")
def test_a_published_one_is_converted_once(tmp_path: Path) -> None:
    state = VQGAN(TAMING, Size(32, (1, 2), 1, 8, ()), dim=8, codes=16).shapes().random(0)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    content = (tmp_path / "a.ckpt").read_bytes()
    card = b"---\nlicense: cc-by-nc-4.0\n---\n# A model\n"
    cached(tmp_path, "they/theirs", {"logs/a.ckpt": content, "README.md": card})
    cached(tmp_path, "they/both", {"a.ckpt": content, "b.ckpt": content})
    first = tessella.from_pretrained("hf://they/theirs", cache=tmp_path)
    assert first.recipe is not None
    assert first.recipe["source"]["licence"] == "cc-by-nc-4.0"
    (folder,) = (tmp_path / "converted").iterdir()
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert fingerprint(tessella.from_pretrained("hf://they/theirs", cache=tmp_path)) == fingerprint(first)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ConversionError, match=r"several checkpoints; write hf://they/both/FILE with .*: a\.ckpt, b"):
        tessella.from_pretrained("hf://they/both", cache=tmp_path)
    assert fingerprint(tessella.from_pretrained("hf://they/both/b.ckpt", cache=tmp_path)) == fingerprint(first)


class Hub(BaseHTTPRequestHandler):
    """The calls that an upload and a download make."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.server.address}/me/mine"})  # type: ignore[attr-defined]
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer({"files": files})
        assert "/commit/" in self.path, self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        url = f"{self.server.address}/me/mine/commit/{COMMIT}"  # type: ignore[attr-defined]
        return self.answer({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            return self.answer(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in self.files.items()
                ]
            )
        if self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer({"id": "me/mine", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        return self.file(with_body=True)

    def do_HEAD(self) -> None:
        self.file(with_body=False)

    def file(self, *, with_body: bool) -> None:
        content = self.files[re.sub(r".*/resolve/\w+/", "", self.path)]
        self.send_response(200)
        for name, value in {
            "ETag": f'"{hash(content)}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": len(content),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    handler = type("Handler", (Hub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        address = f"http://127.0.0.1:{listening.server_port}"
        listening.address = address  # type: ignore[attr-defined]
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield address, files
        listening.shutdown()
        thread.join()


def test_there_and_back(tmp_path: Path, server: tuple[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-a-token")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    address, files = server
    tokenizer = tiny_tokenizer()
    tokenizer.save(tmp_path / "model")
    push(
        tmp_path / "model", "me/mine", evaluation=EVALUATION, signals=torch.rand(3, 3, 16, 16) * 2 - 1, licence="MIT",
        data="24 photographs", endpoint=address,
    )  # fmt: skip
    assert sorted(files) == [
        "README.md",
        "checksums.json",
        "evaluation.json",
        "grid.png",
        "model.safetensors",
        "recipe.toml",
    ]
    again = tessella.from_pretrained("hf://me/mine", cache=tmp_path / "cache", endpoint=address)
    assert fingerprint(again) == fingerprint(tokenizer)
    card = files["README.md"].decode()
    assert 'license: "mit"' in card
    assert json.loads(files["evaluation.json"]) == EVALUATION


def test_the_card_says_everything(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    tiny_tokenizer().save(tmp_path / "model")
    card = model_card(tmp_path / "model", "me/mine", EVALUATION, licence="MIT", data="24 photographs")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "tessella", "pipeline_tag": "image-feature-extraction", "license": "mit",
        "tags": ["tokenizer", "discrete", "fsq"],
    }  # fmt: skip
    assert "more information needed" not in card.lower()
    for fact in (
        "| psnr | 21.5 | as measured |",
        "| lpips, alex | 0.2 |",
        "24 photographs",
        "hf://me/mine",
        "grid.png",
        "pixels: uint8",
        "sizes, 16x16: 24",
    ):
        assert fact in body, fact
    with pytest.raises(ConversionError, match=r"licence of the weights \(licence=\.\.\.\); what it was trained on"):
        model_card(tmp_path / "model", "me/mine", EVALUATION)
    with pytest.raises(ConversionError, match="an evaluation with its protocol"):
        model_card(tmp_path / "model", "me/mine", {}, licence="MIT", data="24 photographs")
