"""Input made to harm: each is refused in words, and nothing in it is executed. Every one would leave a canary if it
were.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
from helpers import gloo_ranks

from train.checkpoint import manifest
from train.checkpoint.reader import complete
from train.config import load as configuration
from train.data.corpus.shards import Corpus
from train.data.prepare.prepare import prepare
from train.errors import UserError


@pytest.fixture
def canary(tmp_path: Path):
    """A file that must not come to be."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "it was executed"


class Touch:
    """An object that makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_unpickling_the_canary_would_leave_its_file(tmp_path: Path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "sings")))
    assert (tmp_path / "sings").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.paths=['pipe:touch {}']", "pipe:touch {}: there is no such file"),
        ("save_mirror='pipe:touch {}'", "save_mirror is no plain URL"),
        ("save_mirror='simplecache::file://{}'", "save_mirror is no plain URL"),
        ("model._target_=os.system", "unknown key 'model._target_'"),
        ("+evil='{{_target_:os.system,command:touch {}}}'", "unknown key 'evil'"),
        ("optimizer={{_target_:os.system}}", "optimizer={{'_target_': 'os.system'}}: there is no such choice"),
        ("model={{_target_:os.system,_args_:['touch {}']}}", "there is no such choice"),
        ("hydra.launcher._target_=os.system", "unknown key 'hydra.launcher._target_'"),
        ("run={{name:x,_target_:os.system}}", "unknown key 'run._target_'"),
        ("data.tokenizer.path=${{oc.create:{{_target_:os.system}}}}", "data.tokenizer.path="),
    ],
)
def test_override_that_would_execute_code_is_refused(as_typed, canary: Path, tmp_path: Path, override: str, words: str):
    override, words = override.format(canary), words.format(canary)
    settings = [setting for setting in as_typed() if not setting.startswith(override.partition("=")[0] + "=")]
    with pytest.raises(UserError) as caught:
        read_text([*settings, override], tmp_path / "made")
    assert words in str(caught.value)


def read_text(settings: list[str], folder: Path) -> None:
    """Load settings and prepare their corpus, as a command does first."""
    prepare(configuration.load(settings).data.model_copy(update={"dir": str(folder)}), print)


def member(name: str, content: bytes = b"", **about) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in about.items():
        setattr(info, key, value)
    return info, content


@pytest.fixture
def hostile(corpus: Path, tmp_path: Path):
    """hostile(change, entry): a copy of the corpus whose first shard holds ``entry`` too, and whose index ``change``
    was given; all its hashes are right.
    """

    def made(change=lambda index: None, *entries) -> Path:
        folder = tmp_path / "hostile"
        shutil.copytree(corpus, folder)
        (folder / "verified.txt").unlink(missing_ok=True)
        index = json.loads((folder / "index.json").read_text())
        first = index["splits"]["train"]["shards"][0]
        content = (folder / first["name"]).read_bytes()
        if entries:
            end = io.BytesIO()
            with tarfile.open(fileobj=end, mode="w") as tar:
                for info, held in entries:
                    tar.addfile(info, io.BytesIO(held))
            content = content.rstrip(b"\0")
            content += b"\0" * (-len(content) % 512) + end.getvalue()
            (folder / first["name"]).write_bytes(content)
        first |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        change(index)
        (folder / "index.json").write_text(json.dumps(index))
        return folder

    return made


def read(folder: Path) -> None:
    Corpus(folder).split("train").document(0)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            lambda canary: member("000000999.pickle", pickle.dumps(Touch(canary))),
            "holds '000000999.pickle', which is no part of a sample",
        ),
        (lambda canary: member("000000999.pth", pickle.dumps(Touch(canary))), "holds '000000999.pth'"),
        (lambda canary: member("../../canary", b"x"), "holds '../../canary'"),
        (lambda canary: member(str(canary), b"x"), "canary', which is no part of a sample"),
        (
            lambda canary: member("000000999.tokens.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "a link to '/etc/passwd'",
        ),
        (
            lambda canary: member("000000999.tokens.npy", type=tarfile.LNKTYPE, linkname="../canary"),
            "a link to '../canary'",
        ),
        (
            lambda canary: member("000000999.tokens.npy", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
            "which is no part of a sample",
        ),
        (lambda canary: member("000000999.tokens.npy", type=tarfile.FIFOTYPE), "which is no part of a sample"),
    ],
    ids=["pickle", "pth", "up", "absolute", "symlink", "hardlink", "device", "fifo"],
)
def test_tar_shard_with_other_entries_than_samples_is_refused(hostile, canary: Path, entry, words: str):
    folder = hostile(lambda index: None, entry(canary))
    for _ in range(2):  # the second time its hash is not taken for a proof
        with pytest.raises(UserError, match=r"train-000000\.tar: ") as caught:
            read(folder)
        assert words in str(caught.value)


def lie(*path, value):
    """A change of an index: what stands at ``path`` becomes ``value``."""

    def change(index) -> None:
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = value(index[path[-1]]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("shards", 0, "size"), lambda size: size + 512, "truncated or overwritten"),
        (("shards", 0, "size"), -1, "splits.train.shards.0.size is -1"),
        (("shards", 0, "size"), 10**30, "splits.train.shards.0.size is "),
        (("shards", 0, "samples"), lambda n: n + 10**12, "where the index speaks of 10000000000"),
        (("shards", 0, "samples"), 1.5, "splits.train.shards.0.samples is 1.5"),
        (("shards", 0, "tokens"), lambda n: n + 1, "tokens, and the index says"),
        (("shards", 0, "name"), "../../../etc/passwd", "splits.train.shards.0.name is '../../../etc/passwd'"),
        (("shards", 0, "name"), "pipe:touch canary", "splits.train.shards.0.name is 'pipe:touch canary'"),
        (("table", "name"), "/dev/zero", "splits.train.table.name is '/dev/zero'"),
        (("shards",), {}, "splits.train.shards is {}"),
        (("_target_",), "os.system", "splits.train._target_ is 'os.system'"),
    ],
)
def test_corpus_index_with_false_values_is_refused(hostile, canary: Path, path, value, words: str):
    def change(index) -> None:
        split = index["splits"]["train"]
        split |= {"_target_": None} if path[0] == "_target_" else {}
        lie(*path, value=value)(split)

    with pytest.raises(UserError) as caught:
        read(hostile(change))
    assert words in str(caught.value)


@pytest.mark.parametrize("row", [0, 1])
def test_offset_table_beyond_its_shard_is_refused(hostile, row: int):
    import numpy as np

    folder = hostile()
    index = json.loads((folder / "index.json").read_text())
    entry = index["splits"]["train"]["table"]
    table = np.load(folder / entry["name"])
    for value in (-1, 1 << 40, np.iinfo(np.int64).max):
        table[row, 2] = value
        np.save(folder / entry["name"], table)
        entry |= {"sha256": hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest()}
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"sample 2 lies outside of train-000000\.tar"):
            read(folder)


def test_offset_table_that_is_a_pickle_is_refused(hostile, canary: Path):
    def change(index) -> None:
        entry = index["splits"]["train"]["table"]
        content = pickle.dumps(Touch(canary))
        (canary.parent / "hostile" / entry["name"]).write_bytes(content)
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    with pytest.raises(UserError, match=r"train\.table\.npy"):
        read(hostile(change))


def test_checkpoint_that_is_a_pickle_is_not_loaded(make, corpus: Path, canary: Path):
    """With a manifest that is right about it; and one of DeepSpeed's own kind."""
    config = make("steps=4", "save_every=2")
    gloo_ranks.train_world(config, corpus)
    folder = Path(config.run.dir) / "checkpoints"
    [_, newest] = complete(folder)
    content = pickle.dumps(Touch(canary))
    file, entry = next(iter(newest.manifest["files"].items()))
    (newest.path / file).write_bytes(content)
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (newest.path / manifest.MANIFEST).write_bytes(manifest.to_bytes(newest.manifest))
    foreign = folder / "step_9"
    foreign.mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (foreign / name).write_bytes(content)
    (Path(config.run.dir) / "summary.json").unlink()
    [rank] = gloo_ranks.start(1, gloo_ranks.train, configuration.to_dict(config), str(corpus)).wait()
    assert rank.result == "done"
    said = [event["text"] for event in rank.events if event["event"] == "note"]
    assert any(f"step_4 is damaged and is not used: {file} is no safetensors file" in text for text in said), said
    assert any("step_9 is damaged and is not used: checkpoint.json cannot be read" in text for text in said), said
    assert next(event["start_step"] for event in rank.events if event["event"] == "plan") == 2
