from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessella.data.base import DataError
from tessella.data.tokens import Manifest, TokenRow, TokenWriter, read_manifest, read_token_space, read_tokens
from tessella.storage import FolderInUse
from tessella.tokenizer import TokenSpace

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SPACE = TokenSpace(grid=(), num_codebooks=2, codebook_size=1000, fingerprint="0123456789abcdef")


def row(number: int) -> dict:
    indices = (torch.arange(12).reshape(3, 2, 2) + 7 * number) % 1000
    return {"key": f"{number}.png", "label": number - 1, "indices": indices, "extent": (48, 31)}


def write(folder: Path, count: int, space: TokenSpace = SPACE, shard_rows: int = 2) -> None:
    with TokenWriter(folder, space, shard_rows=shard_rows) as writer:
        for number in range(count):
            writer.write(**row(number))


def assert_rows(rows: list[TokenRow], count: int) -> None:
    assert [(r.key, r.label, r.extent) for r in rows] == [(f"{i}.png", i - 1, (48, 31)) for i in range(count)]
    for number, found in enumerate(rows):
        assert found.indices.dtype == torch.int64
        assert torch.equal(found.indices, row(number)["indices"])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "new/tokens", 5)
    folder = tmp_path / "new/tokens"
    names = ["tokens-00000.parquet", "tokens-00001.parquet", "tokens-00002.parquet", "tokens.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert_rows(list(read_tokens(folder, SPACE.fingerprint)), 5)
    assert [r.key for r in read_tokens(folder / "tokens-00001.parquet")] == ["2.png", "3.png"]
    assert read_token_space(folder) == SPACE


def test_the_file_as_others_read_it(tmp_path: Path) -> None:
    write(tmp_path, 1)
    table = pq.read_table(tmp_path / "tokens-00000.parquet")
    assert table.schema.metadata == {
        b"format": b"tessella-tokens", b"version": b"1", b"tokenizer_fingerprint": b"0123456789abcdef",
        b"codebook_size": b"1000", b"num_codebooks": b"2",
    }  # fmt: skip
    assert table.to_pylist() == [
        {"key": "0.png", "label": -1, "extent": [48, 31], "grid": [3, 2], "indices": list(range(12))}
    ]
    assert table.schema.field("indices").type == pa.list_(pa.uint16())


@pytest.mark.parametrize(
    ("codebook_size", "kind"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32"), (2**33, "uint64")],
)
def test_indices_take_the_smallest_type(tmp_path: Path, codebook_size: int, kind: str) -> None:
    space = TokenSpace((), 1, codebook_size, "f")
    with TokenWriter(tmp_path, space) as writer:
        writer.write(key="a", label=0, indices=torch.tensor([[codebook_size - 1], [0]]), extent=(2,))
    assert str(pq.read_schema(tmp_path / "tokens-00000.parquet").field("indices").type) == f"list<element: {kind}>"
    (found,) = read_tokens(tmp_path)
    assert found.indices.tolist() == [[codebook_size - 1], [0]]


@settings(max_examples=20, deadline=None)
@given(
    grids=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), max_size=5),
    num_codebooks=st.integers(1, 3),
    shard_rows=st.integers(1, 4),
)
def test_any_grid_survives(
    tmp_path_factory: pytest.TempPathFactory, grids: list[tuple[int, ...]], num_codebooks: int, shard_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    space = TokenSpace((), num_codebooks, 50, "f")
    written = [torch.randint(50, (*grid, num_codebooks)) for grid in grids]
    with TokenWriter(folder, space, shard_rows=shard_rows) as writer:
        for number, indices in enumerate(written):
            writer.write(key=str(number), label=0, indices=indices.int(), extent=indices.shape[:-1])
    read = list(read_tokens(folder))
    assert len(read) == len(written)
    assert all(torch.equal(found.indices, indices) for found, indices in zip(read, written, strict=True))


def test_an_interrupted_run_leaves_nothing_and_a_rerun_replaces(tmp_path: Path) -> None:
    def interrupted() -> None:
        with TokenWriter(tmp_path, SPACE, shard_rows=1) as writer:
            writer.write(**row(0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_rows(list(read_tokens(tmp_path)), 5)  # the earlier run's are still whole
    write(tmp_path, 1)
    assert_rows(list(read_tokens(tmp_path)), 1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_is_detected_and_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 3)

    def killed(self: Manifest, folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", killed)  # between the first and the last step of giving names
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 5)
    with pytest.raises(DataError, match=r"has no tokens\.json: it holds no tokens, or the run that wrote them was"):
        read_tokens(tmp_path)
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokens-00000.parquet", "tokens.json"]
    assert_rows(list(read_tokens(tmp_path)), 2)


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "tokens-00007.parquet").write_bytes(b"somebody's")
    with pytest.raises(DataError, match=r"holds tokens-00007\.parquet, which no tokens\.json there names"):
        write(tmp_path, 3)
    assert (tmp_path / "tokens-00007.parquet").read_bytes() == b"somebody's"


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, SPACE) as writer:
        writer.write(**row(0))
        with pytest.raises(FolderInUse, match="is being written by process"), TokenWriter(tmp_path, SPACE):
            pass
    assert_rows(list(read_tokens(tmp_path)), 1)


def test_another_tokenizers_tokens_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    expected = r"tokens-00000\.parquet holds tokens of tokenizer 0123456789abcdef, not of fedcba9876543210"
    with pytest.raises(DataError, match=expected):
        read_tokens(tmp_path, "fedcba9876543210")


def test_mixed_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path / "other", 4, TokenSpace((), 2, 1000, "fedcba9876543210"))
    (tmp_path / "other/tokens-00001.parquet").replace(tmp_path / "tokens-00001.parquet")
    with pytest.raises(DataError, match=r"tokens-00001\.parquet is damaged: its checksum is not the one in tokens"):
        list(read_tokens(tmp_path))


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokens at .*/nowhere: neither a folder of token shards nor one of them"):
        read_tokens(tmp_path / "nowhere")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet is no token shard: a Parquet file with columns a$"):
        read_tokens(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match=r"a\.txt is no Parquet file, or not a whole one"):
        read_tokens(tmp_path / "a.txt")


def rewrite(shard: Path, *, metadata: dict | None = None, **columns: list) -> None:
    table = pq.read_table(shard)
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))
    changed = {key.encode(): value for key, value in (metadata or {}).items()}
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, **changed}), shard)
    (shard.parent / "tokens.json").unlink(missing_ok=True)  # it would notice first


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": "2"}, "is of version 2; read is version 1"),
        ({"codebook_size": "many"}, "damaged metadata: ValueError"),
        ({"codebook_size": "70000"}, "is no token shard: its columns are key: string not null"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    write(tmp_path, 1)
    rewrite(tmp_path / "tokens-00000.parquet", metadata=metadata)
    with pytest.raises(DataError, match=rf"tokens-00000\.parquet.*{message}"):
        read_tokens(tmp_path / "tokens-00000.parquet")


def test_wrong_contents_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shard = tmp_path / "tokens-00000.parquet"
    rewrite(shard, indices=[[*range(11), 1000]])
    with pytest.raises(DataError, match=r"tokens-00000\.parquet, 0\.png: index 1000 is outside \[0, 1000\)"):
        list(read_tokens(shard))
    rewrite(shard, indices=[list(range(11))])
    with pytest.raises(DataError, match=r"0\.png: 11 indices do not fill grid x K = \[3, 2, 2\]"):
        list(read_tokens(shard))


BAD_ROWS = [
    ({"key": ""}, "its key is no name"),
    ({"key": "."}, "its key is no name"),
    ({"key": ".."}, "its key is no name"),
    ({"key": "a/../b"}, "its key is no name"),
    ({"key": "a\0b"}, "its key is no name"),
    ({"key": "x" * 300}, "its key has 300 characters"),
    ({"extent": []}, r"its extent is \[\]"),
    ({"extent": [48]}, r"its extent \[48\] has fewer axes than its grid \[3, 2\]"),
    ({"extent": [0, 31]}, r"its extent is \[0, 31\]; every side must be at least 1"),
    ({"extent": [-48, 31]}, r"its extent is \[-48, 31\]"),
    ({"grid": []}, r"its grid is \[\]"),
    ({"grid": [3, 0]}, r"its grid is \[3, 0\]"),
    ({"grid": [-3, -2]}, r"its grid is \[-3, -2\]"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_ROWS)
def test_rows_that_nothing_could_be_made_of_are_refused(tmp_path: Path, changed: dict, message: str) -> None:
    write(tmp_path, 1)
    shard = tmp_path / "tokens-00000.parquet"
    rewrite(shard, **{name: [value] for name, value in changed.items()})
    with pytest.raises(DataError, match=rf"tokens-00000\.parquet, .*{message}"):
        list(read_tokens(shard))


@pytest.mark.parametrize("changed", [{"key": ".."}, {"key": "x" * 300}, {"extent": (48,)}, {"extent": (0, 31)}])
def test_rows_that_could_not_be_read_are_not_written(tmp_path: Path, changed: dict) -> None:
    with pytest.raises(DataError, match="cannot be written: its "), TokenWriter(tmp_path, SPACE) as writer:
        writer.write(**{**row(0), **changed})


def test_a_file_name_that_is_no_text_is_written_out(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, SPACE) as writer:
        writer.write(**{**row(0), "key": "caf\udce9.png"})
    assert [found.key for found in read_tokens(tmp_path)] == ["caf\\udce9.png"]


def test_the_manifest_says_what_the_shards_hold(tmp_path: Path) -> None:
    write(tmp_path, 3)
    manifest = read_manifest(tmp_path)
    assert manifest.space == SPACE
    assert manifest.medium == {"name": "image"}
    assert [(shard.name, shard.num_rows) for shard in manifest.shards] == [
        ("tokens-00000.parquet", 2),
        ("tokens-00001.parquet", 1),
    ]
    for shard in manifest.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (shard.num_bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_shard_of_other_rows_than_its_manifest_says(tmp_path: Path) -> None:
    write(tmp_path, 3)
    manifest = read_manifest(tmp_path)
    shards = (replace(manifest.shards[0], num_rows=3), manifest.shards[1])
    replace(manifest, shards=shards).write(tmp_path)
    with pytest.raises(DataError, match=r"tokens-00000\.parquet holds 2 rows; its manifest says 3"):
        list(read_tokens(tmp_path))


@pytest.mark.parametrize("name", ["tokens-00000.parquet", "tokens.json"])
def test_no_flipped_byte_is_silent(tmp_path: Path, name: str) -> None:
    write(tmp_path, 3)
    file, rng = tmp_path / name, np.random.default_rng(0)
    whole = file.read_bytes()
    for position in rng.integers(len(whole), size=20):
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            list(read_tokens(tmp_path))
    file.write_bytes(whole)
    assert_rows(list(read_tokens(tmp_path)), 3)


def test_folders_of_version_1_load_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 3)
    names = [shard.name for shard in read_manifest(tmp_path).shards]
    old = {"format": "tessella-tokens", "version": 1, "shards": names, "class_names": ["a", "b"]}
    (tmp_path / "tokens.json").write_text(json.dumps(old, indent=1) + "\n")
    assert_rows(list(read_tokens(tmp_path, SPACE.fingerprint)), 3)
    assert read_manifest(tmp_path).class_names == ("a", "b")
    assert "version 1, without checksums" in caplog.text
    old["shards"] = ["../tokens-00000.parquet"]
    (tmp_path / "tokens.json").write_text(json.dumps(old))
    with pytest.raises(DataError, match="is no name of a shard"):
        read_tokens(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shard = tmp_path / "tokens-00000.parquet"
    whole = shard.read_bytes()
    for length in range(0, len(whole), 97):
        shard.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"tokens-00000\.parquet is no Parquet file, or not a whole one"):
            read_tokens(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    space = TokenSpace((), 1, 256, "f")
    with TokenWriter(tmp_path, space) as writer:
        generator = torch.Generator().manual_seed(0)
        indices = torch.randint(256, (5000, 1), generator=generator)
        writer.write(key="a", label=0, indices=indices, extent=(5000,))
    shard = tmp_path / "tokens-00000.parquet"
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DataError, match=r"tokens-00000\.parquet .*(?i:checksum|crc)"):
        list(read_tokens(tmp_path))
    (tmp_path / "tokens.json").unlink()
    with pytest.raises(DataError, match=r"tokens-00000\.parquet .*(?i:checksum|crc)"):
        list(read_tokens(shard))  # on its own it has the checksums of its pages


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    write(tmp_path, 3)
    manifest = tmp_path / "tokens.json"
    good = json.loads(manifest.read_text())
    for text in ("{", "[]", "{}"):
        manifest.write_text(text)
        with pytest.raises(DataError, match=r"tokens\.json is damaged"):
            read_tokens(tmp_path)
    manifest.write_text(json.dumps({**good, "version": 9}))
    with pytest.raises(DataError, match=r"is of format 'tessella-tokens', version 9; read are 'tessella-tokens', vers"):
        read_tokens(tmp_path)
    manifest.write_text(json.dumps(good, indent=1) + "\n")
    (tmp_path / "tokens-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"tokens-00001\.parquet is missing, which tokens\.json names"):
        read_tokens(tmp_path)


@pytest.mark.parametrize(
    ("indices", "kind", "message"),
    [
        (torch.zeros(3, 2), TypeError, "a: indices must be integers, got torch.float32"),
        (torch.zeros(3, 1).long(), ValueError, r"a: indices must be \[\*S, 2\], got shape \[3, 1\]"),
        (torch.tensor(1), ValueError, r"a: indices must be \[\*S, 2\], got shape \[\]"),
        (torch.tensor([[0, 1000]]), ValueError, r"a: index 1000 is outside \[0, 1000\)"),
        (torch.tensor([[-1, 5]]), ValueError, r"a: index -1 is outside \[0, 1000\)"),
    ],
)
def test_wrong_indices_are_not_written(
    tmp_path: Path, indices: torch.Tensor, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message), TokenWriter(tmp_path, SPACE) as writer:
        writer.write(key="a", label=0, indices=indices, extent=(1,))


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="shard_rows must be at least 1, got 0"):
        TokenWriter(tmp_path, SPACE, shard_rows=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder '.*/file' is a file"):
        TokenWriter(tmp_path / "file", SPACE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'tessella\[data\]'"):
        TokenWriter(tmp_path, SPACE)
