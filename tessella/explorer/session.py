"""What the page asks for: tokens of a signal and back, what a code is, where codes lie, samples and fillings."""

from __future__ import annotations

import base64
import io
import math
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional

from tessella.data.base import Samples
from tessella.errors import TessellaError
from tessella.evaluation.image import picture_scores
from tessella.explorer.codebook import CodebookUse
from tessella.generators.base import Generator
from tessella.generators.coarse_to_fine import CoarseToFine
from tessella.generators.drawing import classes_of
from tessella.generators.guidance import parse_guidance
from tessella.generators.sampling import generators, sample_seed
from tessella.media.base import Medium
from tessella.media.image import ERROR_GAIN, Image, shown
from tessella.reporting.pictures import (
    Array,
    colour_tables,
    distinct_colours,
    error_maps,
    png,
    principal_components,
    to_pictures,
)
from tessella.tokenizer import Tokenizer

MAX_SIDE = 256  # px; larger pictures are made smaller, so that a touch is answered at once
MAX_SAMPLES = 2**19  # samples of a signal of one axis
_MAX_TABLE = 2**26  # numbers of a codebook that neighbours are looked for in
_NEIGHBOURS = 12
_MAP_POINTS = 4000
_EXAMPLES = 24


class Refused(TessellaError, ValueError):
    """A request that cannot be answered; the message is shown on the page."""


class Session:
    """A tokenizer, what its signals are, how its codes are used, and perhaps a generator of its tokens.

    Args:
        title: of the page.
        tokenizer: in eval mode.
        medium: what the signals are.
        use: counts and patches; None where there was no data to count.
        examples: signals to begin with; None where there are none.
        generator: in eval mode, of this tokenizer's tokens.
    """

    def __init__(
        self, title: str, tokenizer: Tokenizer, medium: Medium, use: CodebookUse | None, examples: Samples | None,
        generator: Generator | None = None,
    ) -> None:  # fmt: skip
        self.title, self.tokenizer, self.medium = title, tokenizer, medium
        self.use, self.examples, self.generator = use, examples, generator
        self._lock = threading.Lock()  # one request computes at a time: they share the cores
        self._table = _table(tokenizer)  # [K, V, D]; None where it is too large
        self._colour_tables = (
            None if self._table is None else colour_tables(self._table, tokenizer.quantizer.num_codebooks)
        )

    # --- what there is ------------------------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What the page says and offers."""
        tokenizer, quantizer = self.tokenizer, self.tokenizer.quantizer
        parameters = sum(p.numel() for p in tokenizer.parameters())
        use = self.use
        about: dict[str, Any] = {
            "title": self.title,
            "medium": self._kind(),
            "quantizer": type(quantizer).__name__,
            "num_codes": quantizer.codebook_size,
            "num_codebooks": quantizer.num_codebooks,
            "parameters": parameters,
            "stride": tokenizer.autoencoder.stride,
            "examples": [] if self.examples is None else self._example_numbers(),
            "usage": None if use is None else sum(map(len, use.codes)) / (len(use.codes) * use.num_codes),
            "counted": None if use is None else {"signals": use.num_signals, "positions": use.num_positions},
            "generator": None,
        }
        if self.generator is not None:
            num_classes, names = classes_of(self.generator)
            kind = type(self.generator).__name__
            labels = None if num_classes is None else [names[n] if names else f"class {n}" for n in range(num_classes)]
            about["generator"] = {"kind": kind, "classes": labels, "grid": list(self.generator.space.grid)}
        return about

    def _kind(self) -> str:
        if isinstance(self.medium, Image):
            return "picture"
        return "sound" if self.medium.suffix == ".wav" else "signal"

    def example(self, number: int) -> Tensor:
        """A signal ``[C, *X]`` of the data."""
        if self.examples is None or not 0 <= number < len(self.examples):
            raise Refused(f"no example {number}")
        return self.examples[number]["x"]

    def _example_numbers(self) -> list[int]:
        assert self.examples is not None
        return sorted(set(np.linspace(0, len(self.examples) - 1, _EXAMPLES).round().astype(int).tolist()))

    def thumbnail(self, number: int) -> bytes:
        """A PNG of an example."""
        return self._preview(self.example(number)[None])

    # --- signals and tokens -------------------------------------------------------------------------------------------

    def open(self, content: bytes, name: str) -> dict[str, Any]:
        """Tokens and views of a file that was dropped on the page."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"dropped{Path(name).suffix[:8]}"
            file.write_bytes(content)
            try:
                x = self.medium.read(file)
            except TessellaError as error:
                reason = str(error).replace(str(file), name)
                raise Refused(reason) from error
        return self.view(x)

    def view(self, x: Tensor) -> dict[str, Any]:
        """Tokens of a signal ``[C, *X]``, and how it looks before, after and in between."""
        said = ""
        if isinstance(self.medium, Image):
            x, said = self._fitted(x)
        elif x.shape[-1] > MAX_SAMPLES:
            x, said = x[..., :MAX_SAMPLES], "only its beginning was read"
        x = x[None].to(self.tokenizer.device)
        with self._lock, torch.inference_mode():
            indices = self.tokenizer.encode(x, pad=True)
            x_hat = self.tokenizer.decode(indices, extent=x.shape[2:]).float().clamp(-1, 1)
        answer = self._answer(indices, x_hat)
        answer |= {"original": self._url(x), "said": said}
        if isinstance(self.medium, Image):
            answer["error"] = _png_url(error_maps(shown(x), shown(x_hat), gain=ERROR_GAIN)[0])
            answer["psnr"] = round(picture_scores(shown(x).cpu(), shown(x_hat).cpu())["psnr"][0].item(), 2)
        bits = indices[0].numel() * math.log2(self.tokenizer.quantizer.codebook_size)
        return answer | {"bits": round(bits), "signal_size": math.prod(x.shape[2:])}

    def decode(self, tokens: Sequence[int], grid: Sequence[int], extent: Sequence[int]) -> dict[str, Any]:
        """The signal of edited tokens, flattened ``[*S, K]``."""
        indices = self._indices(tokens, grid)
        with self._lock, torch.inference_mode():
            x_hat = self.tokenizer.decode(indices, extent=self._checked_extent(extent, grid)).float().clamp(-1, 1)
        return self._answer(indices, x_hat)

    def _fitted(self, x: Tensor) -> tuple[Tensor, str]:
        """A picture at a size that the generator draws, or that is answered at once; and a word about it."""
        height, width = x.shape[1:]
        if self.generator is not None and len(self.generator.space.grid) == 2:
            target = [cells * self.tokenizer.autoencoder.stride for cells in self.generator.space.grid]
            scale = max(target[0] / height, target[1] / width)
            if (height, width) == tuple(target):
                return x, ""
            resized = _resized(x, (max(round(height * scale), target[0]), max(round(width * scale), target[1])))
            top, left = ((have - want) // 2 for have, want in zip(resized.shape[1:], target, strict=True))
            cropped = resized[:, top : top + target[0], left : left + target[1]]
            return cropped, f"scaled and cropped to {target[1]} x {target[0]} px, which the generator draws"
        if max(height, width) <= MAX_SIDE:
            return x, ""
        scale = MAX_SIDE / max(height, width)
        size = (max(round(height * scale), 1), max(round(width * scale), 1))
        return _resized(x, size), f"scaled to {size[1]} x {size[0]} px"

    def _indices(self, tokens: Sequence[int], grid: Sequence[int], *, least: int = 0) -> Tensor:
        quantizer = self.tokenizer.quantizer
        shape = (1, *grid, quantizer.num_codebooks)
        numbers = torch.tensor(tokens, dtype=torch.int64)
        if not grid or any(cells < 1 for cells in grid) or numbers.numel() != math.prod(shape):
            raise Refused(f"{numbers.numel()} tokens do not fill a grid of {' x '.join(map(str, shape[1:]))}")
        if numbers.min() < least or numbers.max() >= quantizer.codebook_size:
            raise Refused(f"codes are from {least} to {quantizer.codebook_size - 1}")
        return numbers.view(shape).to(self.tokenizer.device)

    def _checked_extent(self, extent: Sequence[int], grid: Sequence[int]) -> Sequence[int]:
        if list(self.tokenizer.autoencoder.latent_grid(*self._padded(extent))) != list(grid):
            raise Refused(f"a signal of {' x '.join(map(str, extent))} has no {' x '.join(map(str, grid))} tokens")
        return extent

    def _padded(self, extent: Sequence[int]) -> list[int]:
        stride = self.tokenizer.autoencoder.stride
        return [math.ceil(size / stride) * stride for size in extent]

    def _answer(self, indices: Tensor, x_hat: Tensor) -> dict[str, Any]:
        """Tokens ``[1, *S, K]``, their colours and what they decode to."""
        flat = indices[0].cpu()
        return {
            "tokens": flat.flatten().tolist(),
            "grid": list(flat.shape[:-1]),
            "extent": list(x_hat.shape[2:]),
            "colours": self._colours(flat),
            "reconstruction": self._url(x_hat),
        }

    def _colours(self, indices: Tensor) -> list[str]:
        """One ``rrggbb`` for each of ``indices [*S, K]``, flattened."""
        layers = indices.unbind(-1)
        tables = self._colour_tables
        each = [distinct_colours(layer) if tables is None else tables[k][layer] for k, layer in enumerate(layers)]
        return [bytes(colour).hex() for colour in torch.stack(each, -2).flatten(0, -2).tolist()]

    # --- codes --------------------------------------------------------------------------------------------------------

    def code(self, codebook: int, number: int) -> dict[str, Any]:
        """A code: its vector, how often it occurs, where, and what is near it."""
        quantizer = self.tokenizer.quantizer
        if not (0 <= codebook < quantizer.num_codebooks and 0 <= number < quantizer.codebook_size):
            raise Refused(f"no code {number} of codebook {codebook}")
        vector = self._vector(codebook, number)
        near, distances = self._near(codebook, vector)
        answer: dict[str, Any] = {
            "codebook": codebook,
            "code": number,
            "colour": self._colour(codebook, number),
            "vector": [] if vector is None else [round(value, 4) for value in vector[:64].tolist()],
            "dim": 0 if vector is None else len(vector),
            "count": None if self.use is None else self.use.count(codebook, number),
            "patches": self._patches(codebook, number, 8),
            "neighbours": self._described(codebook, number, near, distances),
            "siblings": None,
        }
        if isinstance(self.generator, CoarseToFine):
            labels = self.generator.labels[codebook].cpu()
            own = (labels == labels[number]).nonzero()[:, 0]
            if self._table is not None and vector is not None:
                far = (self._table[codebook][own] - vector).norm(dim=1)
                order = far.argsort()[: _NEIGHBOURS + 1]
                own, far = own[order], far[order]
                answer["siblings"] = self._described(codebook, number, own.tolist(), far.tolist())
            answer["cluster"] = int(labels[number])
        return answer

    def _vector(self, codebook: int, number: int) -> Tensor | None:
        if self._table is not None:
            return self._table[codebook][number]
        if self.tokenizer.quantizer.num_codebooks > 1:
            return None
        with torch.inference_mode():
            index = torch.tensor([[number]], device=self.tokenizer.device)
            return self.tokenizer.quantizer.indices_to_codes(index)[0].float().cpu()

    def _near(self, codebook: int, vector: Tensor | None) -> tuple[list[int], list[float]]:
        if self._table is None or vector is None:
            return [], []
        table = self._table[codebook]
        distances = torch.cdist(vector[None], table)[0]
        found = distances.topk(min(_NEIGHBOURS + 1, len(table)), largest=False)
        return found.indices.tolist(), found.values.tolist()

    def _described(
        self, codebook: int, number: int, codes: Sequence[int], distances: Sequence[float]
    ) -> list[dict[str, Any]]:
        return [
            {"code": code, "distance": round(distance, 4), "colour": self._colour(codebook, code),
             "patch": next(iter(self._patches(codebook, code, 1)), None),
             "count": None if self.use is None else self.use.count(codebook, code)}
            for code, distance in zip(codes, distances, strict=True)
            if code != number
        ][:_NEIGHBOURS]  # fmt: skip

    def _colour(self, codebook: int, number: int) -> str:
        if self._colour_tables is not None:
            return bytes(self._colour_tables[codebook][number].tolist()).hex()
        return bytes(distinct_colours(torch.tensor(number)).tolist()).hex()

    def _patches(self, codebook: int, number: int, count: int) -> list[str]:
        if self.use is None:
            return []
        return [_png_url(picture) for picture in self.use.patches[codebook].get(number, [])[:count]]

    def map(self, codebook: int) -> dict[str, Any]:
        """Where the codes lie in the plane of their largest variance: the most used ones, and some of the others."""
        if not 0 <= codebook < self.tokenizer.quantizer.num_codebooks:
            raise Refused(f"no codebook {codebook}")
        if self._table is None:
            raise Refused("this codebook is too large to be shown as a map")
        table = self._table[codebook]
        places = principal_components(table, 2)
        places = (places - places.amin(0)) / (places.amax(0) - places.amin(0)).clamp(min=1e-9)
        chosen = set() if self.use is None else set(self.use.most_used(codebook, _MAP_POINTS // 2))
        places, spread = _apart(places)
        rng = torch.Generator().manual_seed(0)
        others = torch.randperm(len(table), generator=rng)[: _MAP_POINTS - len(chosen)].tolist()
        codes = sorted(chosen | set(others))
        return {
            "num_codes": len(table),
            "spread": spread,
            "codes": codes,
            "x": [round(value, 4) for value in places[codes, 0].tolist()],
            "y": [round(value, 4) for value in places[codes, 1].tolist()],
            "counts": None if self.use is None else [self.use.count(codebook, code) for code in codes],
            "colours": [self._colour(codebook, code) for code in codes],
        }

    # --- drawing ------------------------------------------------------------------------------------------------------

    def sample(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A sample of the generator under the page's settings."""
        return self._drawn(None, settings)

    def fill(
        self, tokens: Sequence[int], grid: Sequence[int], region: Sequence[int], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The tokens with those inside a region drawn anew.

        Args:
            tokens, grid: see :meth:`decode`.
            region: first and last row, first and last column; of one axis first and last position.
            settings: see :meth:`sample`.
        """
        generator = self._generator()
        if list(grid) != list(generator.space.grid):
            want, have = (" x ".join(map(str, sizes)) for sizes in (generator.space.grid, grid))
            raise Refused(f"the generator draws {want} tokens; these are {have}")
        known = self._indices(tokens, grid)
        if len(region) != 2 * len(grid):
            raise Refused(f"a region of {len(grid)} axes has {2 * len(grid)} numbers")
        window: list[Any] = [0, *(slice(a, b + 1) for a, b in zip(region[::2], region[1::2], strict=True))]
        known[tuple(window)] = -1
        if not (known < 0).any():
            raise Refused("mark a region first: what is inside it is drawn anew")
        return self._drawn(known, settings)

    def _drawn(self, known: Tensor | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        generator = self._generator()
        num_classes, _ = classes_of(generator)
        label = int(settings.get("label", 0))
        if num_classes is not None and not 0 <= label < num_classes:
            raise Refused(f"classes are 0 to {num_classes - 1}, got {label}")
        condition = None if num_classes is None else torch.tensor([label], device=self.tokenizer.device)
        top_k = settings.get("top_k")
        try:
            with self._lock:
                indices = generator.sample(
                    condition,
                    rng=generators([sample_seed(int(settings.get("seed", 0)), 0)]),
                    temperature=float(settings.get("temperature", 1.0)),
                    top_k=None if top_k in (None, "", 0) else int(top_k),
                    guidance=parse_guidance(str(settings.get("guidance", "1"))),
                    known=known,
                )
                with torch.inference_mode():
                    x_hat = self.tokenizer.decode(indices).float().clamp(-1, 1)
        except (ValueError, NotImplementedError) as error:
            raise Refused(str(error)) from error
        return self._answer(indices, x_hat)

    def _generator(self) -> Generator:
        if self.generator is None:
            raise Refused("no generator: name one, as in tessella explore RUN GENERATOR")
        return self.generator

    # --- files in a page ----------------------------------------------------------------------------------------------

    def _url(self, x: Tensor) -> str:
        """What the page shows or plays of a signal ``[1, C, *X]``."""
        if isinstance(self.medium, Image):
            return _png_url(to_pictures(shown(x))[0])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"signal{self.medium.suffix}"
            if self.medium.suffix != ".wav":
                file = self.medium.preview([x.cpu()], Path(folder) / "signal")
            else:
                self.medium.write(x[0].cpu(), file)
            kind = "audio/wav" if file.suffix == ".wav" else "image/png"
            return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"

    def _preview(self, x: Tensor) -> bytes:
        if isinstance(self.medium, Image):
            picture = to_pictures(shown(x))[0]
            small = PILImage.fromarray(picture)
            small.thumbnail((96, 96))
            stream = io.BytesIO()
            small.save(stream, "PNG")
            return stream.getvalue()
        with tempfile.TemporaryDirectory() as folder:
            return self.medium.preview([x], Path(folder) / "signal").read_bytes()


def _table(tokenizer: Tokenizer) -> Tensor | None:
    quantizer = tokenizer.quantizer
    try:
        table = quantizer.codebook.detach().float().cpu()
    except ValueError:  # too large to be built
        return None
    table = table if table.ndim == 3 else table.expand(quantizer.num_codebooks, *table.shape)
    return table if table[0].numel() <= _MAX_TABLE else None


def _apart(places: Tensor) -> tuple[Tensor, bool]:
    """Points ``[V, 2]``, those that coincide in the turns of a sunflower around their place; and whether any did."""
    _, place, counts = (places * 1e4).round().unique(dim=0, return_inverse=True, return_counts=True)
    order = place.argsort(stable=True)
    turn = torch.empty_like(order)
    turn[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[place[order]]
    radius = 0.06 * (turn / counts[place]).sqrt()
    angle = turn * (math.pi * (3 - math.sqrt(5)))
    moved = places + radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return moved.clamp(0, 1), bool((counts > 1).any())


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    resized: Tensor = functional.interpolate(x[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
    return resized.clamp(-1, 1)


def _png_url(picture: Array) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
