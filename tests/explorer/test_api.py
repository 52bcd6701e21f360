"""The explorer's server: every request, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import single_threaded, tiny_tokenizer, write_pictures
from PIL import Image

from tessella.checkpoint import save_generator
from tessella.commands.explore import explore, open_session
from tessella.errors import ConfigError
from tessella.explorer.codebook import codebook_section, codebook_use, kept_use
from tessella.explorer.session import Session
from tessella.generators.ar import AR
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.generators.maskgit import MaskGIT
from tessella.media.image import Image as ImageMedium
from tessella.quantizers import VQ, Residual
from tessella.tokenizer import Tokenizer

pytest.importorskip("starlette", reason="the page needs the extra ui")
testclient = pytest.importorskip("starlette.testclient", reason="the test client needs httpx")

from tessella.explorer.server import MAX_BYTES, application  # noqa: E402

LABELS = {"name": "label", "num_classes": 2, "class_names": ["cat", "dog"]}
SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2}


def make_generator(kind: str, tokenizer: Tokenizer) -> AR | MaskGIT | CoarseToFine:
    space = tokenizer.token_space(16, 16)
    torch.manual_seed(1)
    if kind == "ar":
        return AR(space, conditioner=LABELS, **SIZES).eval()
    if kind == "maskgit":
        return MaskGIT(space, conditioner=LABELS, **SIZES).eval()
    generator = CoarseToFine(
        space, num_clusters=8, coarse={"name": "ar", **SIZES}, fine=SIZES, conditioner=LABELS, normalize=False
    )
    generator.fit_codebook(tokenizer.quantizer.codebook, seed=0)
    return generator.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer and a generator of its tokens, with pictures beside them."""
    path = tmp_path_factory.mktemp("explored")
    write_pictures(path / "pictures", 12)
    tokenizer = tiny_tokenizer()
    tokenizer.save(path / "tokenizer")
    save_generator(make_generator("ctf", tokenizer), tokenizer, path / "generator")
    return path


def client(session: Session, host: str = "127.0.0.1") -> Any:
    return testclient.TestClient(application(session), base_url=f"http://{host}:8765")


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(folder / "tokenizer", folder / "generator", data=f"folder:{folder / 'pictures'}", device="cpu")


@pytest.fixture
def page(session: Session) -> Any:
    return client(session)


def picture(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def file_of(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def refused(response: Any, status: int = 422) -> str:
    assert response.status_code == status
    said: str = response.json()["refused"]
    return said


@pytest.mark.parametrize("path", ["/", "/app.js", "/style.css"])
def test_the_page_needs_nothing_from_elsewhere(path: str, page: Any) -> None:
    response = page.get(path)
    assert response.status_code == 200
    assert "http://" not in response.text
    assert "https://" not in response.text
    assert "default-src 'self'" in response.headers["content-security-policy"]


def test_about(page: Any) -> None:
    about = page.get("/api/about").json()
    assert about["medium"] == "picture"
    assert about["num_codes"] == 125
    assert about["generator"]["classes"] == ["cat", "dog"]
    assert 0 < about["usage"] <= 1
    assert page.get(f"/api/examples/{about['examples'][0]}.png").headers["content-type"] == "image/png"


def test_what_is_opened_decodes_to_what_was_shown(page: Any, session: Session) -> None:
    opened = page.post("/api/open?name=a.png", content=file_of(16, 16)).json()
    assert opened["grid"] == [4, 4]
    assert opened["extent"] == [16, 16]
    assert len(opened["tokens"]) == len(opened["colours"]) == 16
    assert picture(opened["original"]).tolist() == np.asarray(Image.open(io.BytesIO(file_of(16, 16)))).tolist()
    again = page.post("/api/decode", json={name: opened[name] for name in ("tokens", "grid", "extent")}).json()
    assert again["reconstruction"] == opened["reconstruction"]
    changed = [(opened["tokens"][0] + 60) % 125, *opened["tokens"][1:]]
    other = page.post("/api/decode", json={**{n: opened[n] for n in ("grid", "extent")}, "tokens": changed}).json()
    assert (picture(other["reconstruction"]) != picture(opened["reconstruction"])).any()


def test_pictures_come_to_the_generator_s_size_or_to_one_that_is_quick(page: Any, folder: Path) -> None:
    opened = page.post("/api/open?name=a.png", content=file_of(90, 40)).json()
    assert opened["extent"] == [16, 16]
    assert "16 x 16 px" in opened["said"]
    alone = client(open_session(folder / "tokenizer", data=f"folder:{folder / 'pictures'}", device="cpu"))
    opened = alone.post("/api/open?name=a.png", content=file_of(600, 301)).json()
    assert opened["extent"] == [128, 256]
    assert "256 x 128 px" in opened["said"]
    opened = alone.post("/api/open?name=a.png", content=file_of(18, 15)).json()  # no multiple of the stride
    assert opened["extent"] == [15, 18]
    assert opened["grid"] == [4, 5]
    again = alone.post("/api/decode", json={name: opened[name] for name in ("tokens", "grid", "extent")}).json()
    assert again["reconstruction"] == opened["reconstruction"]


def test_a_code_and_what_is_near_it(page: Any, session: Session) -> None:
    use = session.use
    assert use is not None
    code = use.most_used(0, 1)[0]
    found = page.get(f"/api/codes/0/{code}").json()
    table = session.tokenizer.quantizer.codebook
    distances = (table - table[code]).norm(dim=1)
    distances[code] = torch.inf
    assert found["neighbours"][0]["distance"] == pytest.approx(distances.min().item(), abs=1e-4)
    assert [near["distance"] for near in found["neighbours"]] == sorted(
        near["distance"] for near in found["neighbours"]
    )
    assert found["count"] == use.count(0, code) > 0
    assert picture(found["patches"][0]).shape == (12, 12, 3)
    assert isinstance(session.generator, CoarseToFine)
    labels = session.generator.labels[0]
    assert found["siblings"]
    assert {labels[near["code"]].item() for near in found["siblings"]} == {labels[code].item()}
    assert found["vector"] == pytest.approx(table[code].tolist(), abs=1e-4)


def test_the_map_has_every_code_of_a_small_codebook(page: Any, session: Session) -> None:
    found = page.get("/api/codes/0").json()
    assert found["codes"] == list(range(125))
    assert session.use is not None
    assert found["counts"] == [session.use.count(0, code) for code in range(125)]
    assert all(0 <= value <= 1 for value in found["x"] + found["y"])


@pytest.mark.parametrize("kind", ["ar", "maskgit", "ctf"])
def test_samples_and_fillings(kind: str) -> None:
    tokenizer = tiny_tokenizer()
    page = client(Session("", tokenizer, ImageMedium(), None, None, make_generator(kind, tokenizer)))
    settings = {"label": 1, "temperature": 1.0, "guidance": "1.5", "top_k": 6, "seed": 3}
    drawn = page.post("/api/sample", json=settings).json()
    assert drawn["grid"] == [4, 4]
    assert drawn["tokens"] == page.post("/api/sample", json=settings).json()["tokens"]
    assert drawn["tokens"] != page.post("/api/sample", json={**settings, "seed": 4}).json()["tokens"]
    asked = {"tokens": drawn["tokens"], "grid": [4, 4], "region": [1, 2, 0, 1], **settings, "seed": 8}
    filled = page.post("/api/fill", json=asked).json()["tokens"]
    inside = {4, 5, 8, 9}
    assert all(filled[cell] == drawn["tokens"][cell] for cell in set(range(16)) - inside)
    assert any(filled[cell] != drawn["tokens"][cell] for cell in inside)
    assert "classes are 0 to 1" in refused(page.post("/api/sample", json={**settings, "label": 2}))
    assert "top_k must lie in" in refused(page.post("/api/sample", json={**settings, "top_k": 500}))
    assert "temperature" in refused(page.post("/api/sample", json={**settings, "temperature": -1}))
    assert "draws 4 x 4 tokens" in refused(page.post("/api/fill", json={**asked, "tokens": [0], "grid": [1, 1]}))


def test_refusals(page: Any, session: Session) -> None:
    assert "at most 16 MiB" in refused(page.post("/api/open?name=a.png", content=bytes(MAX_BYTES + 1)))
    assert "note.png" in refused(page.post("/api/open?name=note.png", content=b"no picture"))
    assert "codes are from 0 to 124" in refused(
        page.post("/api/decode", json={"tokens": [125], "grid": [1, 1], "extent": [4, 4]})
    )
    assert "do not fill" in refused(page.post("/api/decode", json={"tokens": [1, 2], "grid": [1, 1], "extent": [4, 4]}))
    assert "has no" in refused(page.post("/api/decode", json={"tokens": [1], "grid": [1, 1], "extent": [9, 4]}))
    assert "whole numbers" in refused(page.post("/api/decode", json={"tokens": "x", "grid": [1], "extent": [4]}))
    assert "no JSON" in refused(page.post("/api/decode", content=b"{"))
    assert "no code 125" in refused(page.get("/api/codes/0/125"))
    assert "no example" in refused(page.get("/api/examples/99999"))
    for host in ("evil.example", "127.0.0.1.evil.example"):
        assert "is not called" in refused(client(session, host).get("/api/about"), 403)
    for origin in ("https://evil.example", "http://127.0.0.1:3000", "null"):
        assert "is not called" in refused(page.post("/api/sample", json={}, headers={"origin": origin}), 403)
    assert page.get("/api/about", headers={"origin": "http://127.0.0.1:8765"}).status_code == 200
    assert client(session, "[::1]").get("/api/about").status_code == 200
    alone = client(Session("", tiny_tokenizer(), ImageMedium(), None, None))
    assert "no generator" in refused(alone.post("/api/sample", json={}))


def test_others_are_answered_on_request_by_address_alone() -> None:
    session = Session("", tiny_tokenizer(), ImageMedium(), None, None)
    for host, status in (("192.0.2.7", 200), (socket.gethostname(), 200), ("evil.example", 403), ("localhost", 200)):
        opened = testclient.TestClient(application(session, to_others=True), base_url=f"http://{host}:8765")
        assert opened.get("/api/about").status_code == status
    assert "is not called '192.0.2.7'" in refused(client(session, "192.0.2.7").get("/api/about"), 403)


def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    command = [sys.executable, "-m", "tessella", "explore", str(folder / "tokenizer"), "--port", "0", "--device", "cpu",
               "--data", f"folder:{folder / 'pictures'}"]  # fmt: skip
    with subprocess.Popen(
        command, env=single_threaded(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1]
            assert address.startswith("http://127.0.0.1:")
            with urllib.request.urlopen(f"{address}api/about") as answer:
                assert json.load(answer)["num_codes"] == 125
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_several_codebooks_and_none_that_can_be_shown() -> None:
    torch.manual_seed(0)
    stack = client(Session("", tiny_tokenizer(Residual(VQ(16, 4), num_codebooks=2)), ImageMedium(), None, None))
    opened = stack.post("/api/open?name=a.png", content=file_of(8, 8)).json()
    assert len(opened["tokens"]) == 2 * 2 * 2
    assert stack.get("/api/codes/1/3").json()["neighbours"]
    from tessella.quantizers import FSQ

    large = client(Session("", tiny_tokenizer(FSQ([64] * 8)), ImageMedium(), None, None))
    assert "too large" in refused(large.get("/api/codes/0"))
    assert large.get(f"/api/codes/0/{64**8 - 1}").json()["neighbours"] == []


def test_counts_are_kept_beside_the_run_and_made_anew_when_they_do_not_fit(tmp_path: Path) -> None:
    tokenizer, calls = tiny_tokenizer(), []
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make() -> Any:
        calls.append(1)
        return codebook_use(tokenizer, ImageMedium(), [{"x": x}])  # type: ignore[typeddict-item]

    first, second = (kept_use(tmp_path / "kept", tokenizer, "a", make) for _ in range(2))
    assert len(calls) == 1
    assert first.num_positions == 5 * 16
    assert sum(map(int, first.counts[0])) == 5 * 16
    assert [c.tolist() for c in first.codes] == [c.tolist() for c in second.codes]
    code = first.most_used(0, 1)[0]
    assert np.array_equal(first.patches[0][code][0], second.patches[0][code][0])
    kept_use(tmp_path / "kept", tokenizer, "b", make)
    assert len(calls) == 2
    file = tmp_path / "kept" / "codebook.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    kept_use(tmp_path / "kept", tokenizer, "b", make)
    assert len(calls) == 3
    section = codebook_section(first)
    assert section is not None
    assert f"code {code}" in section.blocks[0].html()


def test_patches_are_where_the_code_stands() -> None:
    tokenizer = tiny_tokenizer()
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    use = codebook_use(tokenizer, ImageMedium(), [{"x": x}])  # type: ignore[typeddict-item]
    indices = tokenizer.encode(x)[..., 0]
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    for code, patches in use.patches[0].items():
        places = [padded[n, 4 * r : 4 * r + 12, 4 * c : 4 * c + 12] for n, r, c in (indices == code).nonzero().tolist()]
        assert len(patches) == min(len(places), 8)
        assert all(any(np.array_equal(patch, place) for place in places) for patch in patches)


def test_what_cannot_be_explored(folder: Path, tmp_path: Path) -> None:
    other = tiny_tokenizer(seed=9)
    save_generator(make_generator("ar", other), other, tmp_path / "other")
    with pytest.raises(ConfigError, match="draws tokens of tokenizer"):
        open_session(folder / "tokenizer", tmp_path / "other", device="cpu")
    with pytest.raises(ConfigError, match="name the tokenizer first"):
        open_session(tmp_path / "other", tmp_path / "other", device="cpu")
    assert open_session(tmp_path / "other", device="cpu").generator is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1, port"):
            explore(folder / "tokenizer", port=taken.getsockname()[1], device="cpu")
