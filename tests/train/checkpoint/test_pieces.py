"""Manifests whose size does not grow with the ranks, and readers that open the files they read."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from helpers import gloo_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from train.checkpoint import manifest, reader
from train.checkpoint.pieces import PieceTable, even_share, pieces_in_file, without_even
from train.checkpoint.reader import Checkpoint, complete
from train.config import load as configuration
from train.util.run_layout import checkpoint_name, shard_name

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def values_of(shapes: dict[str, list[int]], ranks: int, even: bool) -> dict:
    """A manifest of ranks with even shares, which are left out of it or listed."""
    files, names = {}, {kind: list(shapes) for kind in KINDS}
    for rank in range(ranks):
        pieces = []
        for kind in () if even else KINDS:
            for name, shape in shapes.items():
                start, numel = even_share(math.prod(shape), rank, ranks)
                pieces += [[kind, name, start, numel]] if numel else []
        files[shard_name(rank)] = {"size": 1, "sha256": "0" * 64, "pieces": pieces}
    progress = {"step": 5, "cursor": {"epoch": 0, "position": 0}}
    about = {"progress": progress, "val_loss": None, "shapes": shapes, "scalars": {}, "corpus": "f" * 64}
    return {**about, "files": files, "even": names if even else {}}


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_even_pieces_are_those_that_a_list_would_name(ranks: int, numel: int, start: int, length: int):
    tables = [PieceTable(values_of({"a": [numel]}, ranks, even)) for even in (True, False)]
    assert dict(tables[0]) == dict(tables[1])
    assert tables[0].numel("a", "weight") == numel

    def touched(table: PieceTable) -> list:
        found = table.overlapping("a", "weight", start, min(start + length, numel))
        return [piece for piece in found if piece[0] < start + length and start < piece[0] + piece[1]]

    assert touched(tables[0]) == touched(tables[1])


def test_pieces_that_are_not_even_are_listed_or_refused():
    shapes = {"a": [10], "rows": [2, 4]}
    listed = [["weight", "a", 5, 5], ["weight", "rows", 4, 4]]
    assert without_even(listed, shapes, 1, 2, {"rows"}) == ([["weight", "rows", 4, 4]], {"weight": ["a"]})
    with pytest.raises(ValueError, match="not its even share"):
        without_even([["weight", "a", 4, 6]], shapes, 1, 2, {"rows"})


def test_manifest_of_70_billion_parameters_takes_no_second():
    """Of 1,024 ranks at stage 3: written, read, and asked for what one rank reads."""
    layer = [[10240, 8192], [8192, 8192], [57344, 8192], [8192, 28672], [8192], [8192]]
    shapes = {f"backbone.blocks.{n}.{part}.weight": shape for n in range(80) for part, shape in enumerate(layer)}
    shapes |= {"backbone.embed.weight": [32000, 8192], "head.weight": [32000, 8192], "backbone.norm.weight": [8192]}
    assert sum(map(math.prod, shapes.values())) > 68e9
    values = values_of(shapes, 1024, even=True)
    began = time.process_time()
    content = manifest.to_bytes(values)
    table = Checkpoint(Path("step_5"), json.loads(json.dumps(manifest.from_bytes(content, "step_5")))).reader().pieces
    mine = {name: list(table.overlapping(name, "weight", *even_range(shape, 700))) for name, shape in shapes.items()}
    assert len(list(pieces_in_file(values, shard_name(700)))) == 3 * len(shapes)
    assert time.process_time() - began < 1
    assert len(content) < 1 << 20
    assert {piece[2] for pieces in mine.values() for piece in pieces} == {shard_name(700)}


def even_range(shape: list[int], rank: int) -> tuple[int, int]:
    start, numel = even_share(math.prod(shape), rank, 1024)
    return start, start + numel


def opened_by(world, emit, config, corpus: str) -> list[str]:
    """Every opening of a file, in turn, that this rank's resume makes."""
    from train.checkpoint.reader import find_newest
    from train.data.corpus.shards import Corpus
    from train.data.loader import loaders
    from train.run import build_engine, restore

    config, files = configuration.parse(config), []
    corpus_ = Corpus(corpus)
    loader, _ = loaders(corpus_, config, world)
    engine, _ = build_engine(config, corpus_.tokenizer.vocab_size, world, loader)
    checkpoint = find_newest(Path(config.run.dir or "") / "checkpoints", world, lambda text: None)
    usual = reader.CheckpointReader._open
    reader.CheckpointReader._open = lambda self, file: files.append(file) or usual(self, file)
    restore(checkpoint, engine, loader)
    return files


def test_restart_opens_each_file_that_a_rank_reads_once_and_no_other(make, corpus: Path):
    four = make("zero=3", "cluster.workers=4", "steps=2", "save_every=2", "eval_every=0")
    assert gloo_ranks.train_world(four, corpus) == ["done"] * 4
    [newest] = complete(Path(four.run.dir) / "checkpoints")
    assert newest.manifest["version"] == 3
    assert all(not entry["pieces"] for entry in newest.manifest["files"].values())
    same = gloo_ranks.run(4, opened_by, configuration.to_dict(four), str(corpus))
    assert same == [[shard_name(rank)] for rank in range(4)]
    two = make("zero=3", "cluster.workers=2")
    halves = gloo_ranks.run(2, opened_by, configuration.to_dict(two), str(corpus))
    assert [sorted(files) for files in halves] == [[shard_name(0), shard_name(1)], [shard_name(2), shard_name(3)]]


def test_checkpoint_that_lists_every_piece_is_read_as_before(make, corpus: Path):
    config = make("zero=3", "cluster.workers=2", "steps=2", "save_every=2", "eval_every=0")
    gloo_ranks.train_world(config, corpus)
    folder = Path(config.run.dir) / "checkpoints"
    expected, [newest] = gloo_ranks.state(config, 2), complete(folder)
    old = {key: value for key, value in newest.manifest.items() if key != "even"}
    for file, entry in newest.manifest["files"].items():
        old["files"][file] = {**entry, "pieces": list(pieces_in_file(newest.manifest, file))}
    content = manifest.to_bytes({**old, "version": 2})
    (newest.path / manifest.MANIFEST).write_bytes(content)
    assert complete(folder)[0].manifest["version"] == 2
    assert complete(folder)[0].damage() is None
    found = gloo_ranks.state(config, 2)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("other", [{"even": {"weight": ["b"]}}, {"even": {"weight": "a"}}, {"files": {}}])
def test_manifest_of_even_shares_that_cannot_be_is_damage(other):
    with pytest.raises(manifest.DamagedCheckpoint):
        manifest.from_bytes(manifest.to_bytes({**values_of({"a": [4]}, 2, even=True), **other}), "step_5")


def test_parameter_of_no_elements_has_no_pieces():
    assert PieceTable(values_of({"a": [0, 3]}, 2, even=True))["a", "weight"] == []


def test_terabyte_checkpoints_are_kept_or_dropped_unread(tmp_path: Path):
    """Sparse files of 2^40 bytes in all: what is kept follows from the manifests."""
    began = time.process_time()
    for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0)):
        folder = tmp_path / checkpoint_name(step)
        folder.mkdir()
        values = values_of({"a": [1 << 38]}, 64, even=True)
        values["progress"] |= {"step": step, "score": score}
        for name, entry in values["files"].items():
            entry["size"] = 1 << 34
            with (folder / name).open("wb") as file:
                file.truncate(entry["size"])
        (folder / manifest.MANIFEST).write_bytes(manifest.to_bytes(values))
    whole = complete(tmp_path)
    assert sum(file.stat().st_size for file in whole[0].path.iterdir()) > 1 << 40
    assert manifest.surplus_steps([c.manifest for c in whole], keep_last=1, keep_best=2) == [1]
    gone = sorted(whole[3].manifest["files"])[9]
    (tmp_path / "step_4" / gone).unlink()
    assert whole[3].damage(slice(9, 10)) == f"{gone} cannot be read: No such file or directory"
    assert time.process_time() - began < 5
