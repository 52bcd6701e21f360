"""Bytes changed at random in every kind of file that the package writes: what reading the files says to it.

    OMP_NUM_THREADS=1 python benchmarks/flips.py [--flips 200] [--seed 0] [--kinds weights state ...] [--out folder]

Each flip gives one byte another value, reads everything that belongs to the file in a process of its own, and puts the
byte back. Counted are: refusals that name the file; files made anew with a warning (caches); refusals that name no
file; other exceptions; and reads without a word, of the same values or of others. Writes flips.json and flips.md into
the folder, prints the table, and fails if any flip went unseen or was refused in a way that helps nobody.

A new kind of file is one more entry of KINDS: what writes it, where it is, and what reads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import pickle
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tessella
from tessella.autoencoders import Conv
from tessella.checkpoint import load_recipe, load_state, save_checkpoint, write_recipe
from tessella.data.token_shards import TokenShards
from tessella.data.tokens import TokenWriter, read_tokens
from tessella.errors import TessellaError
from tessella.evaluation.cache import cached_tensors
from tessella.quantizers import FSQ
from tessella.tokenizer import Tokenizer

OUTCOMES = ("refused, file named", "made anew, with a warning", "refused, file not named", "other exception",
            "silent, same values", "silent, other values")  # fmt: skip
GOOD = OUTCOMES[:2]


@dataclass(frozen=True)
class Kind:
    """A kind of file: what writes it into an empty folder, which files of it are changed, and what reads them."""

    write: Callable[[Path], object]
    files: str
    read: Callable[[Path], object]


def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    autoencoder = Conv(
        channels=8, multipliers=(1,), num_res_blocks=1, num_decoder_res_blocks=1, mid_attention=False, latent_dim=8,
        patch_px=4,
    )  # fmt: skip
    return Tokenizer(autoencoder, FSQ([5, 5, 5]))


def write_checkpoint(folder: Path) -> None:
    model = tokenizer()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 16, 16)).x_hat.mean().backward()
    optimizer.step()
    state = {"position": 1, "optimizers": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save_checkpoint(folder, 1, model, state, keep=1)


def read_checkpoint(folder: Path) -> object:
    return tessella.load(folder).state_dict(), load_state(folder / "checkpoints" / "step-00000001")


def write_run_recipe(folder: Path) -> None:
    write_recipe(folder, {"data": {"name": "folder", "path": "pictures"}, "training": {"steps": 100, "lr": 1e-3}})


def write_tokens(folder: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    space = tokenizer().token_space(16, 16)
    with TokenWriter(folder, space, shard_rows=20, class_names=["a", "b"]) as writer:
        for row in range(40):
            indices = torch.randint(space.codebook_size, (4, 4, 1), generator=rng)
            writer.write(key=f"picture {row}", label=row % 2, indices=indices, extent=(16, 16))


def write_token_cache(folder: Path) -> None:
    write_tokens(folder)
    read_token_cache(folder)


def rows_of(folder: Path) -> object:
    return [(row.key, row.label, row.extent, row.indices) for row in read_tokens(folder)]


def read_token_cache(folder: Path) -> object:
    shards = TokenShards(split="train", path=str(folder))
    return [tuple(shards.sample(index).items()) for index in range(len(shards))]


def features(folder: Path) -> object:
    about = {"network": "a", "pictures": "b"}
    return cached_tensors(folder, "features", about, lambda: {"mean": torch.linspace(0, 1, 500)})


CHECKPOINT = "checkpoints/step-00000001"
KINDS = {
    "weights": Kind(write_checkpoint, f"{CHECKPOINT}/model.safetensors", read_checkpoint),
    "state": Kind(write_checkpoint, f"{CHECKPOINT}/state.pt", read_checkpoint),
    "recipe": Kind(write_checkpoint, f"{CHECKPOINT}/recipe.toml", read_checkpoint),
    "checksums": Kind(write_checkpoint, f"{CHECKPOINT}/checksums.json", read_checkpoint),
    "recipe of a run": Kind(write_run_recipe, "recipe.toml", load_recipe),
    "token shards": Kind(write_tokens, "*.parquet", rows_of),
    "token manifest": Kind(write_tokens, "tokens.json", rows_of),
    "token cache": Kind(write_token_cache, ".*/**/*", read_token_cache),
    "feature cache": Kind(features, "*.safetensors", features),
}


class _Counting(logging.Handler):
    """How many warnings there were."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def digest(values: object) -> str:
    """Of values with tensors in them."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (
                str(value.dtype),
                tuple(value.shape),
                value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
        if isinstance(value, dict):
            return [(plain(key), plain(item)) for key, item in value.items()]
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return hashlib.sha256(pickle.dumps(plain(values))).hexdigest()


def apart(task: Callable[[], str]) -> str:
    """What ``task`` returns in a process of its own: nothing that was read is remembered from one flip to the next."""
    end, start = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(start, task().encode())
        finally:
            os._exit(0)
    os.close(start)
    with os.fdopen(end) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


def outcome(kind: Kind, folder: Path, file: Path, whole: str) -> str:
    warnings = _Counting()
    logger = logging.getLogger("tessella")
    logger.addHandler(warnings)
    logger.propagate = False
    try:
        same = digest(kind.read(folder)) == whole
    except TessellaError as error:
        return OUTCOMES[0] if file.name in str(error) else OUTCOMES[2]
    except Exception as error:
        print(f"{file}: {type(error).__name__}: {error}", file=sys.stderr)
        return OUTCOMES[3]
    if same and warnings.count:
        return OUTCOMES[1]
    return OUTCOMES[4] if same else OUTCOMES[5]


def measure(kind: Kind, flips: int, rng: random.Random) -> Counter[str]:
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        apart(lambda: str(kind.write(folder)))
        files = sorted(path for path in folder.glob(kind.files) if path.is_file())
        assert files, f"no file {kind.files}"
        kept = {path: path.read_bytes() for path in files}
        whole = apart(lambda: digest(kind.read(folder)))
        assert whole, "it cannot even be read whole"
        places = [(path, offset) for path, data in kept.items() for offset in range(len(data))]
        for _ in range(flips):
            file, offset = rng.choice(places)
            changed = bytearray(kept[file])
            changed[offset] ^= rng.randrange(1, 256)
            file.write_bytes(changed)
            counts[apart(lambda: outcome(kind, folder, file, whole)) or "died"] += 1  # noqa: B023
            for path, data in kept.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {name: measure(KINDS[name], arguments.flips, random.Random(arguments.seed)) for name in arguments.kinds}
    columns = [*OUTCOMES, *(["died"] if any("died" in row for row in rows.values()) else [])]
    lines = [f"| kind of file | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in rows.items()]
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        settings = {"flips": arguments.flips, "seed": arguments.seed}
        (arguments.out / "flips.json").write_text(json.dumps({**settings, "rows": rows}, indent=2) + "\n")
        (arguments.out / "flips.md").write_text("\n".join(lines) + "\n")
    if any(row[column] for row in rows.values() for column in columns if column not in GOOD):
        sys.exit(1)


if __name__ == "__main__":
    main()
