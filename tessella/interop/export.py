"""Tokenizers for programs without us: ONNX graphs, or torch programs that need torch alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tessella.checkpoint import load, load_recipe, model_folder
from tessella.extras import require
from tessella.interop.reading import ConversionError
from tessella.storage import atomic_folder
from tessella.tokenizer import Tokenizer

Target = Literal["onnx", "torch"]

_SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
_AXES = ("rows", "columns", "planes")
_EXAMPLE = (2, 3, 4)  # positions along each axis of the example; different, so that no two sizes are taken for one


def export(model: str | Path, *, to: Target, out: str | Path) -> Path:
    """Write ``encode`` and ``decode`` of a tokenizer into the folder ``out``, for any batch and size.

    ``encode`` takes ``x [B, C, *X]`` in [-1, 1] (float32, sides multiples of the stride) to ``indices [B, *S, K]``
    (int64); ``decode`` takes these back to ``x_hat``. Tokenizers of pictures of one size keep that size. Nothing is
    checked inside: NaN in ``x`` or an index out of range gives nonsense, not an error. The nearest code is found in
    float64 among all codes at once, so encoding takes ``8 N V`` bytes for N vectors and V codes.

    Args:
        model: a tokenizer's folder or run.
        to: ``"onnx"``: ``encode.onnx``, ``decode.onnx``; ``"torch"``: ``encode.pt2``, ``decode.pt2``, for
            :func:`torch.export.load`.
        out: replaced if it exists.

    Raises:
        ConversionError: an unknown target, a generator, or a tokenizer that cannot be traced.
    """
    model, out = Path(model), Path(out)
    if to not in get_args(Target):
        raise ConversionError(f"unknown target {to!r}; choose one of: {', '.join(get_args(Target))}")
    if "generator" in load_recipe(model_folder(model)):
        raise ConversionError(f"{model} holds a generator; export the tokenizer in its folder tokenizer/")
    tokenizer = load(model)
    if to == "onnx":
        require("onnxscript", extra="export")
    with atomic_folder(out) as folder, _quiet(), torch.no_grad():
        for name, program in _programs(tokenizer, model, plain_attention=to == "onnx").items():
            file = folder / f"{name}{_SUFFIX[to]}"
            if to == "torch":
                torch.export.save(program, file)
            else:
                _write_onnx(program, name, file)
    return out


class _Encode(nn.Module):
    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, x: Tensor) -> Tensor:
        return self.tokenizer.encode(x)


class _Decode(_Encode):
    def forward(self, indices: Tensor) -> Tensor:
        return self.tokenizer.decode(indices)


def _programs(tokenizer: Tokenizer, model: Path, *, plain_attention: bool) -> dict[str, ExportedProgram]:
    autoencoder = tokenizer.autoencoder
    axes, stride = autoencoder.num_axes, autoencoder.stride
    grid = autoencoder.latent_grid(*(stride * size for size in _EXAMPLE[:axes]))
    batch: Any = Dim("batch", min=1)
    encoded: dict[int, Any] = {0: batch}
    decoded: dict[int, Any] = {0: batch}
    sides = [stride] * axes
    if len(grid) == axes:  # a position for every patch, not a sequence for the whole
        sides = [stride * size for size in _EXAMPLE[:axes]]
        for axis in range(axes):
            size: Any = Dim(_AXES[axis], min=1)
            encoded[2 + axis] = stride * size if stride > 1 else size
            decoded[1 + axis] = size
    x = torch.rand(2, autoencoder.in_channels, *sides) * 2 - 1
    cases = {"encode": (_Encode(tokenizer), x, encoded), "decode": (_Decode(tokenizer), tokenizer.encode(x), decoded)}
    programs = {}
    for name, (module, example, shapes) in cases.items():
        try:
            program = torch.export.export(module.eval(), (example,), dynamic_shapes=(shapes,))
        except Exception as error:  # whatever tracing meets: torch gives it no common type
            reason = str(error).strip().split("\n", 1)[0]
            raise ConversionError(f"{model}: {name} cannot be traced: {reason}") from error
        programs[name] = _standing_alone(program, plain_attention=plain_attention)
    return programs


def _standing_alone(program: ExportedProgram, *, plain_attention: bool) -> ExportedProgram:
    """Without operators of ours, and without assertions, which ONNX has not."""
    ours: dict[Any, Any] = {torch.ops.tessella.nearest.default: _nearest}
    if plain_attention:
        ours[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    program = program.run_decompositions(ours)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if str(node.target).startswith("aten._assert"):
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _nearest(z: Tensor, codebook: Tensor, metric: str, group: str) -> Tensor:
    """What :func:`tessella.ops.nearest` finds, by looking at every score in float64."""
    z, codebook = z.double(), codebook.double()
    scores = z @ codebook.T
    if metric == "euclidean":
        scores = scores - codebook.square().sum(1) / 2
    return scores.argmax(-1)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float | None = None, **__: Any) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q @ k.mT * scale, -1) @ v


def _write_onnx(program: ExportedProgram, name: str, file: Path) -> None:
    names = ("x", "indices") if name == "encode" else ("indices", "x_hat")
    written = torch.onnx.export(
        program, dynamo=True, input_names=names[:1], output_names=names[1:], verbose=False, optimize=True
    )  # fmt: skip
    assert written is not None
    written.save(str(file))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logger.setLevel(level)
