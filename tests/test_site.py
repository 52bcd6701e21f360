"""The documentation's site, built as ``make docs`` does, where mkdocs is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tessella.recipe import recipe_names

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the extra 'docs' is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_it_has_every_command_recipe_and_equation(site: Path) -> None:
    commands = (site / "reference/command-line.html").read_text()
    for name in ("train", "tokenize", "study-collapse", "convert-config"):
        assert f'id="tessella-{name}"' in commands
    assert "--overfit-batch" in commands
    recipes = (site / "reference/recipes.html").read_text()
    assert all(f'id="{name}"' in recipes for name in recipe_names())
    quantizers = (site / "reference/quantizers.html").read_text()
    assert 'id="tessella.quantizers.fsq.FSQ"' in quantizers
    assert "<math" in quantizers
    assert "Raises" in quantizers
    for page in site.rglob("*.html"):
        assert "arithmatex" not in page.read_text(), page
        assert ":class:`" not in page.read_text(), page


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(?:https?:)?//|<link[^>]+href="https?://|@import|url\(["\']?https?:'
    )
    for page in site.rglob("*.html"):
        assert not loads.search(page.read_text()), page


def test_every_link_and_anchor_leads_somewhere(site: Path) -> None:
    ids: dict[Path, set[str]] = {}
    for page in site.rglob("*.html"):
        text = page.read_text()
        ids[page.resolve()] = set(re.findall(r'\bid="([^"]+)"', text)) | {""}
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for target in re.findall(r'<a [^>]*href="([^"]+)"', page.read_text()):
            if re.match(r"\w+:", target) or target.startswith("javascript"):
                continue
            path, _, anchor = target.partition("#")
            leads_to = (page.parent / path).resolve() if path else page.resolve()
            leads_to = leads_to / "index.html" if leads_to.is_dir() else leads_to
            assert leads_to.exists(), f"{page}: {target}"
            if leads_to in ids:
                assert anchor in ids[leads_to], f"{page}: {target}"
