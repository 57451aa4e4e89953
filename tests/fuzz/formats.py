"""Every format that the product reads from files or words of others: seeds, mutation, and the reader under test."""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz import mutate, processes
from fuzz.format import Format, in_file
from helpers.run_dirs import write_run, write_sweep
from safetensors.torch import save

from cluster.device_health import flight_record
from cluster.host import run_lock
from cluster.raycluster import node_daemon, remote_hosts
from cluster.sweep.ledger import SweepLedger
from cluster.sweep.trial import final_metrics, metric_history
from cluster.worker import exit_record
from cluster.worker.messages import RendezvousAddress, StartOrder
from review.html.page import page_data
from review.importance import key_importances
from review.markdown import render_comment
from review.run_reader import read_runs
from review.scaling.study import fit_study
from train.checkpoint import manifest
from train.checkpoint.reader import list_checkpoints
from train.checkpoint.staging import tensor_name
from train.cli import generate
from train.config import load as configuration
from train.config import sweep_space
from train.data.corpus import shards
from train.data.corpus.verified_files import VerifiedFiles
from train.data.mixing import mixture_corpus
from train.data.prepare import build, sources, workers
from train.data.prepare.corpus_spec import CorpusSpec
from train.data.prepare.prepare import prepare
from train.data.tokenizer import Tokenizer, build_tokenizer
from train.distributed.param_shard import MASTER
from train.errors import UserError
from train.kernel_setup import _differences, _read_choices, describe_attention
from train.pretrained.hf.folder import HFFolder, HFWeights
from train.pretrained.inspect_source import describe_source, list_differences
from train.reporting.goodput import TimeByCause
from train.reporting.tracking import MetricsFile, RunFile
from train.run_dir import resume
from train.run_dir.compare import compare_lines
from train.stability.skipped_rows import read_skipped, rows_of
from train.util.io import read_records
from train.util.run_layout import RunDir

SEEDS = Path(__file__).parent / "seeds"
TYPED = (UserError, manifest.DamagedCheckpoint)
"""The product's own errors for bad input; readers of the review, and of state that may be damaged, raise none."""


def all_formats(folder: Path) -> list[Format]:
    """Every format, its files in ``folder``, which is best on a file system in memory."""
    rooms = (_of_corpora, _of_runs, _of_checkpoints, _of_hugging_face, _of_command_lines, _of_clusters, _of_reviews)
    formats: list[Format] = []
    for room in (*rooms, processes.all_formats):
        (own := folder / room.__name__.strip("_")).mkdir()
        formats += room(own)
    return formats


def _corpus(folder: Path) -> Path:
    """A prepared corpus of some short documents in two shards."""
    (folder / "text").mkdir()
    for n in range(12):
        (folder / "text" / f"{n}.txt").write_text(f"document {n}: the quick brown fox jumps over the lazy dog " * 3)
    overrides = ["data=text", "data.tokenizer.kind=bytes", "data.tokenizer.vocab_size=null", "data.shard_tokens=1000"]
    data = configuration.load(
        [*overrides, f"data.paths=[{folder}/text]", f"data.dir={folder}/corpus", "data.workers=1"]
    ).data
    return prepare(data, lambda event: None)


def _of_corpora(folder: Path) -> list[Format]:
    corpus = _corpus(folder)
    index = (corpus / shards.INDEX).read_bytes()

    def read_index() -> None:
        shards.fingerprint(shards.read_index(corpus))

    def with_hash(name: str, content: bytes) -> None:
        """Reads the corpus whose index says that ``content`` is the right one of the file ``name``."""
        (corpus / name).write_bytes(content)
        values = json.loads(index)
        for entry in [values["splits"]["train"]["table"], *values["splits"]["train"]["shards"]]:
            if entry["name"] == name:
                entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (corpus / shards.INDEX).write_bytes(json.dumps(values).encode())
        (corpus / "verified.txt").unlink(missing_ok=True)
        split = shards.Corpus(corpus).split("train")
        for sample in (0, 1, split.samples - 1):
            split.document(sample), split.source(sample)

    files = {name: (corpus / name).read_bytes() for name in ("train.table.npy", "train-000000.tar")}

    def table(content: bytes) -> None:
        with_hash("train.table.npy", content)

    def shard(content: bytes) -> None:
        (corpus / "train.table.npy").write_bytes(files["train.table.npy"])
        with_hash("train-000000.tar", content)

    recipe = json.loads((corpus / "recipe.json").read_bytes())
    spec = CorpusSpec(recipe["recipe"], recipe["settings"], {}, "")
    receipts = corpus / "receipts"
    tar = corpus / "train-000001.tar"

    def finished() -> None:
        build._finished_shard(corpus, tar, VerifiedFiles(corpus))

    def array() -> None:
        shards.open_table(folder / "any.npy")

    arrays = []
    for values, order in ((np.arange(12).reshape(3, 4), "C"), (np.zeros((3, 2), np.float32), "F")):
        np.save(out := io.BytesIO(), np.asarray(values, order=order))  # type: ignore[call-overload]
        arrays.append(out.getvalue())
    verified = (corpus / "verified.txt").read_bytes()
    rows = folder / "rows.jsonl"
    options = sources.ReadOptions("text", "strict", "label", None)
    lines = [
        b'{"text": "a b", "label": "good", "more": [1, {"a": null}]}\n{"text": "c", "label": "bad"}\n',
        b'{"text": "", "label": "good"}',
    ]
    array_file = folder / "rows.json"
    row_arrays = [b'[{"text": "a b", "label": 1}, {"text": "c", "label": true, "more": [0.5, null]}]']

    def read_rows(path: Path) -> None:
        size = path.stat().st_size
        span = workers.ByteSpan(0, sources.SourceFile(str(path), path.name, size, 0), 0, size)
        workers.find_documents([span], options, True).problems.raise_all()

    return [
        Format("corpus: index.json", [index], mutate.json_file, in_file(corpus / shards.INDEX, read_index)),
        Format("corpus: table", [files["train.table.npy"]], mutate.of_bytes, table),
        Format("corpus: .npy header", arrays, mutate.of_bytes, in_file(folder / "any.npy", array)),
        Format("corpus: shard", [files["train-000000.tar"]], mutate.of_bytes, shard),
        Format(
            "corpus: verified.txt",
            [verified],
            mutate.of_bytes,
            in_file(folder / "verified.txt", lambda: VerifiedFiles(folder)),
        ),
        Format(
            "corpus: receipt",
            [(receipts / f"{tar.name}.json").read_bytes()],
            mutate.json_file,
            in_file(receipts / f"{tar.name}.json", finished),
        ),
        Format(
            "corpus: recipe.json",
            [(corpus / "recipe.json").read_bytes()],
            mutate.json_file,
            in_file(corpus / "recipe.json", lambda: build.claim_folder(corpus, spec)),
        ),
        Format("rows of jsonl", lines, mutate.json_lines, in_file(rows, lambda: read_rows(rows))),
        Format(
            "rows of a json array", row_arrays, mutate.json_file, in_file(array_file, lambda: read_rows(array_file))
        ),
        *_of_tokenizers(),
    ]


def _of_tokenizers() -> list[Format]:
    kinds = []
    for kind in ("bytes", "chars", "bpe"):
        settings = configuration.load(
            [f"data.tokenizer.kind={kind}", f"data.tokenizer.vocab_size={270 if kind == 'bpe' else 'null'}"]
        ).data.tokenizer
        kinds.append(build_tokenizer(settings, ["the cat sat on the mat"] * 9, "abcdefgh ").encode())
    kinds += [(SEEDS / f"{name}.json").read_bytes() for name in ("unigram", "wordpiece")]

    def read(content: bytes) -> None:
        tokenizer = Tokenizer(content.decode("utf-8", "replace"))
        ids = tokenizer.encode("ab  abc a b")
        tokenizer.decode(ids), tokenizer.name_of(0), tokenizer.extended(["[MASK]"])

    return [Format("tokenizer.json", kinds, mutate.json_file, read)]


def _of_runs(folder: Path) -> list[Format]:
    run = RunDir(write_run(folder / "run", lines=4))
    tree = yaml.safe_load(run.config.read_bytes())
    config = configuration.parse(tree)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(run.path)})})
    corpus = shutil.copytree(folder.parent / "of_corpora" / "corpus", folder / "corpus")
    about = {"folder": str(corpus), "fingerprint": shards.Corpus(corpus).fingerprint}
    skipped = {
        "step": 4,
        "kind": "spike",
        "how": "in place",
        "back_to": 3,
        "skipped": [{"epoch": 0, "position": 8, "rows": [1, 2]}],
        "documents": [],
    }
    summary = json.dumps(
        {"step": 100, "val_loss": 2.5, "stale": 1, "time_by_cause": {"train": 2.0}, "tokens_per_s": 9.0}
    )
    choices = {
        "made_on": {"gpu": "H100", "torch": "2"},
        "choices": {"attention 64": "triton", "rms_norm 8": {"ROWS": 4}},
    }

    def finished() -> None:
        resume.finished_summary(config)
        final_metrics(run.path, ["val_loss"])

    def metrics() -> None:
        compare_lines(run.path, run.path, 20)
        metric_history(run.path, "loss")
        MetricsFile(folder / "copy.jsonl", 20)

    def kernels_json() -> None:
        saved = _read_choices(run.kernels)
        _differences(saved["made_on"], {"gpu": "x"}), describe_attention(saved["choices"])

    small = yaml.dump({key: tree[key] for key in ("steps", "seed", "model", "optimizer", "run", "init")}).encode()
    return [
        Format(
            "run: config.yaml",
            [run.config.read_bytes()],
            mutate.yaml_file,
            in_file(run.config, lambda: configuration.read(run.config)),
        ),
        Format(
            "run: config.yaml of a resume",
            [small],
            mutate.yaml_file,
            in_file(run.config, lambda: resume.check_resumable(config, None)),
        ),
        Format(
            "run: corpus.json",
            [json.dumps(about).encode()],
            mutate.json_file,
            in_file(run.corpus, lambda: mixture_corpus.open_trained_corpus(run)),
        ),
        Format("run: summary.json", [summary.encode()], mutate.json_file, in_file(run.summary, finished)),
        Format("run: metrics.jsonl", [run.metrics.read_bytes()], mutate.json_lines, in_file(run.metrics, metrics)),
        Format(
            "run: skipped.jsonl",
            [(json.dumps(skipped) + "\n").encode() * 2],
            mutate.json_lines,
            in_file(run.skipped, lambda: rows_of(read_skipped(run.skipped))),
        ),
        Format(
            "run: run.json",
            [b'{"wandb_id": "ab", "starts": 2, "seen": 1.5, "seconds": {"train": 2.5}}'],
            mutate.json_file,
            in_file(run.starts, lambda: RunFile(run.path, TimeByCause())),
        ),
        Format(
            "run: kernels.json", [json.dumps(choices).encode()], mutate.json_file, in_file(run.kernels, kernels_json)
        ),
    ]


def _of_checkpoints(folder: Path) -> list[Format]:
    step = folder / "step_3"
    step.mkdir()
    shapes = {"backbone.embed.weight": [5, 2], "head.bias": [3]}
    tensors = {tensor_name(MASTER, name, 0): torch.ones(int(np.prod(shape))) for name, shape in shapes.items()}
    weights = save(tensors)
    progress = {
        "step": 3,
        "cursor": {"epoch": 0, "position": 96},
        "tokens": 5,
        "updates": 3,
        "skipped_in_row": 0,
        "train_s": 0.5,
        "score": 4.8,
        "best": 4.8,
        "best_step": 3,
        "stale": 0,
        "recent": {"losses": [5.5, 5.3], "reference": {"epoch": 0, "position": 64}},
    }
    pieces = [[MASTER, name, 0, int(np.prod(shape))] for name, shape in shapes.items()]
    entry = {"size": len(weights), "sha256": hashlib.sha256(weights).hexdigest(), "pieces": pieces}
    values = {
        "progress": progress,
        "val_loss": 4.8,
        "shapes": shapes,
        "scalars": {"scale": 1.0},
        "world_size": 1,
        "corpus": "f" * 64,
        "files": {"rank_0.safetensors": entry},
    }

    def use(content: bytes | None = None) -> None:
        whole, _ = list_checkpoints(folder)
        for checkpoint in whole:
            values = [c.manifest for c in whole]
            manifest.select(values, "best", folder), manifest.surplus_steps(values, 1, 1)
            checkpoint.progress.to_dict(), checkpoint.digest
            if checkpoint.damage() is None:
                reader = checkpoint.reader()
                for name, shape in shapes.items():
                    reader.read(name, MASTER, 0, int(np.prod(shape)))

    def read_manifest(content: bytes) -> None:
        """With the right hash of its content, as its author would give it."""
        (step / "rank_0.safetensors").write_bytes(weights)
        if content[:1] == b"{":
            rest = content[1:]
            content = manifest._BEFORE + hashlib.sha256(rest).hexdigest().encode() + manifest._AFTER + rest
        (step / manifest.MANIFEST).write_bytes(content)
        use()

    def read_weights(content: bytes) -> None:
        (step / "rank_0.safetensors").write_bytes(content)
        own = {**entry, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (step / manifest.MANIFEST).write_bytes(manifest.to_bytes({**values, "files": {"rank_0.safetensors": own}}))
        use()

    seed = json.dumps({"version": manifest.VERSION, **values}).encode()
    return [
        Format("checkpoint: checkpoint.json", [seed], mutate.json_file, read_manifest),
        Format("checkpoint: rank_0.safetensors", [weights], safetensors, read_weights),
    ]


def safetensors(draw: Any, content: bytes) -> bytes:
    """A safetensors file with its header mutated as JSON, of the right length; or with its bytes mutated."""
    if draw.random() < 0.3:
        return mutate.of_bytes(draw, content)
    size = int.from_bytes(content[:8], "little")
    header = mutate.json_file(draw, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _of_hugging_face(folder: Path) -> list[Format]:
    configs = [(SEEDS / f"{name}.json").read_bytes() for name in ("llama", "gpt2", "bert", "t5")]
    shapes = {
        "model.embed_tokens.weight": (6, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.self_attn.k_proj.weight": (2, 4),
        "model.layers.0.self_attn.v_proj.weight": (2, 4),
        "model.norm.weight": (4,),
    }
    weights = save({name: torch.ones(shape) for name, shape in shapes.items()})
    config = configuration.load(["model=llama_tiny", "tracking=off"])
    run, index = folder / "config.json", folder / "sharded"
    index.mkdir()
    (index / "config.json").write_bytes(configs[0])
    (index / "part-1.safetensors").write_bytes(weights)
    run.write_bytes(configs[0])

    def describe() -> None:
        source = describe_source(folder, "latest")
        list_differences(source, config, 6, shapes_differ=True)

    def read(path: Path) -> None:
        opened = HFFolder(path)
        source = describe_source(path, "latest")
        assert source.family is not None
        reader = HFWeights(opened, source.family, source.arch["tied"])
        names = ("backbone.embed.weight", "backbone.blocks.0.attention.qkv.weight", "backbone.norm.weight")
        for name in names:
            if (shape := reader.shape(name)) is not None:
                reader.read(name, 0, int(np.prod(shape)))
        opened.digest, reader.unread(names)

    (folder / "model.safetensors").write_bytes(weights)
    weight_map = json.dumps({"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(shapes, "part-1.safetensors")})
    return [
        Format("HF: config.json", configs, mutate.json_file, in_file(run, describe)),
        Format(
            "HF: model.safetensors.index.json",
            [weight_map.encode()],
            mutate.json_file,
            in_file(index / "model.safetensors.index.json", lambda: read(index)),
        ),
        Format(
            "HF: model.safetensors",
            [weights],
            safetensors,
            lambda content: (
                run.write_bytes(configs[0]),
                in_file(folder / "model.safetensors", lambda: read(folder))(content),
            ),
        ),
    ]


def _of_command_lines(folder: Path) -> list[Format]:
    job, sweep = ((SEEDS / f"{name}.txt").read_bytes() for name in ("job", "sweep"))
    points, prompts = folder / "points.yaml", folder / "prompts.txt"
    options = b"temperature=0.7\ntop_k=5\nstop=[a,'b']\nmax_tokens=9\nn=2\nbeams=4\ntop_p=0.9"
    known = dict.fromkeys(("generation", *generate.SETTING_KEYS), "")
    base = configuration.load(["tracking=off"]).generation

    def settings(content: bytes) -> None:
        given = dict(line.partition("=")[::2] for line in content.decode("utf-8", "replace").splitlines())
        generate.choose_settings(base, known | {key: value for key, value in given.items() if key in known})

    def arguments(content: bytes) -> list[str]:
        """The words as Python has them: bytes that are not UTF-8 as surrogates; no argument holds a zero byte."""
        return content.decode("utf-8", "surrogateescape").replace("\0", "").split("\n")

    return [
        Format("overrides of a job", [job], mutate.words, lambda content: configuration.load(arguments(content))),
        Format(
            "overrides of a sweep", [sweep], mutate.words, lambda content: configuration.load_sweep(arguments(content))
        ),
        Format("generation settings", [options], mutate.words, settings),
        Format(
            "sweep: points.yaml",
            [b"- [model.width=64, steps=400]\n- [model.width=32]\n"],
            mutate.yaml_file,
            in_file(points, lambda: sweep_space.read_points([f"sweep.points={points}"])),
        ),
        Format(
            "prompts",
            [b"one\ntwo \xe8\xaa\x9e\n"],
            mutate.of_bytes,
            in_file(prompts, lambda: generate.read_prompts("", str(prompts))),
        ),
    ]


def _of_clusters(folder: Path) -> list[Format]:
    grid = configuration.load_sweep(["optimizer.lr=1e-3,3e-3", "tracking=off", f"sweep.dir={folder}/sweep"])
    ledger = folder / "sweep" / "ledger.jsonl"
    ledger.parent.mkdir()
    own = SweepLedger(ledger.parent, grid, sweep_space.grid(grid))
    own.record_start(0, 2, ["here"])
    own.record_end(0, {"state": "done", "step": 9, "values": [2.5], "why": ""})
    own.record_trial(2, {"optimizer.lr": "2e-3"}, {"a": 1})
    order = StartOrder(
        "job", 0, 1, 0, RendezvousAddress("h", 1, 3), "m:f", "cpu", "{}", "c", "/", str(folder / "rank_0.log"), 1
    )
    exit_record.write(order, 1, "Traceback: x")
    node_folder = folder / "node"
    node_folder.mkdir()
    node = {
        "pid": 4000000,
        "address": "127.0.0.1:6379",
        "ip": "127.0.0.1",
        "head": True,
        "node": "ab",
        "since": 1.0,
        "host": "h",
        "cpus": 2,
        "gpus": 0,
    }
    entry = {
        "is_p2p": False,
        "profiling_name": "gloo:all_reduce",
        "process_group": ["0", "default_pg"],
        "state": "scheduled",
        "retired": False,
        "collective_seq_id": 3,
        "input_sizes": [[2, 3]],
    }
    dump = json.dumps(
        {"pg_config": {"0": {"ranks": "[0, 1]"}}, "entries": [entry, {**entry, "state": "completed"}]}
    ).encode()

    def groups(content: bytes) -> None:
        records = flight_record.read_dump(content)
        flight_record.find_stuck({0: [flight_record.GroupRecord.from_json(record.to_json()) for record in records]})

    def living() -> None:
        with (node_folder / "node.json").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            node_daemon.read_living_node(node_folder)

    end, hosts, lock = folder / "rank_0.end", folder / "hosts.txt", folder / "lock"
    return [
        Format(
            "sweep: ledger.jsonl",
            [ledger.read_bytes()],
            mutate.json_lines,
            in_file(ledger, lambda: SweepLedger(ledger.parent, grid, sweep_space.grid(grid))),
        ),
        Format("exit record", [end.read_bytes()], mutate.json_file, in_file(end, lambda: exit_record.read(order))),
        Format("flight record", [dump], mutate.json_file, groups),
        Format(
            "cluster: node.json",
            [json.dumps(node).encode()],
            mutate.json_file,
            in_file(node_folder / "node.json", living),
        ),
        Format(
            "cluster: hosts file",
            [b"one # a\ntwo\n"],
            mutate.of_bytes,
            in_file(hosts, lambda: remote_hosts.read_hosts(str(hosts))),
        ),
        Format(
            "lock of a folder",
            [b'{"pid": 3, "host": "h", "since": "2026"}'],
            mutate.json_file,
            in_file(lock, lambda: run_lock._holder(lock)),
        ),
        Format(
            "JSON Lines of any kind",
            [ledger.read_bytes()],
            mutate.json_lines,
            in_file(folder / "any.jsonl", lambda: read_records(folder / "any.jsonl")),
        ),
    ]


def _of_reviews(folder: Path) -> list[Format]:
    sweep = write_sweep(
        folder / "s",
        [
            {"state": "done", "params": {"optimizer.lr": 1e-3}},
            {"state": "queued", "params": {"optimizer.lr": 2e-3}},
            {"state": "cut off", "params": {"optimizer.lr": 3e-3}, "gone": True},
        ],
    )
    run = RunDir(write_run(folder / "r", lines=4))
    startup = json.dumps({"driver": 0.5, "config": 1.0, "first_step": 3.0}).encode()
    about = json.dumps({"device": "cpu", "workers": 2, "versions": {"torch": "2"}, "commit": "abc"}).encode()
    run.logs.mkdir()
    config = run.config.read_bytes()
    tree = yaml.safe_load(config)  # parsing the whole one is nearly all that the reading of another file costs
    small = yaml.dump({key: tree[key] for key in ("steps", "model", "optimizer", "run")}).encode()
    run.config.write_bytes(small)

    def read(of: Path) -> Callable[[], None]:
        def review() -> None:
            runs = read_runs([of])
            importances, study = key_importances(runs), fit_study(runs)
            render_comment(runs, importances, study).encode("utf-8", "replace")
            json.dumps(page_data(runs, importances, study))

        return review

    files = {
        **dict.fromkeys((run.metrics, run.samples, run.skipped), mutate.json_lines),
        **dict.fromkeys(
            (run.summary, run.starts, run.startup, run.environment, run.corpus, run.lock, run.logs / "rank_0.end"),
            mutate.json_file,
        ),
        run.config: mutate.yaml_file,
    }
    seeds = {
        run.startup: startup,
        run.environment: about,
        run.lock: b'{"pid": 3, "host": "h", "since": "2026"}',
        run.logs / "rank_0.end": b'{"error": "Traceback\\nValueError: x"}',
        run.skipped: b'{"step": 3}\n',
    }
    formats = []
    for file, mutation in files.items():
        whole = seeds.get(file) or file.read_bytes()
        contents = [config, small] if file == run.config else [whole]
        formats.append(
            Format(f"review: {file.relative_to(run.path)}", contents, mutation, _restored(file, whole, read(run.path)))
        )
    ledger = sweep / "ledger.jsonl"
    return [
        *formats,
        Format("review: ledger.jsonl", [ledger.read_bytes()], mutate.json_lines, in_file(ledger, read(sweep))),
    ]


def _restored(file: Path, seed: bytes, read: Callable[[], None]) -> Callable[[bytes], None]:
    """A reader of one mutated file of several, which is whole again for the others' turns."""

    def written(content: bytes) -> None:
        file.write_bytes(content)
        try:
            read()
        finally:
            file.write_bytes(seed)

    return written
