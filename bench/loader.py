"""The loader alone against litdata's TokensLoader, and how soon a resumed run has its first batch.

    python -m bench.loader [--tokens 32000000] [--seq-len 1024] [--batch 16] [--rounds 7] [--no-peer]

Both read the same random documents, one epoch shuffled, as batches of a training step in the same process, turn by
turn; medians are shown. The peer gives blocks of seq_len + 1 token ids; ours gives inputs, targets, positions and
segments, documents apart.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from train.config.keys.data import TokenizerConfig
from train.data import tokenizer
from train.data.corpus import shards
from train.data.corpus.verified_files import VerifiedFiles
from train.data.examples.causal import CausalExamples
from train.data.loader import Loader, RankShare, split_sizes
from train.data.sampling.batch_plan import BatchPlan, Cursor, StepShape
from train.data.sampling.epoch_order import EpochOrder, Shuffle
from train.util import io

SHARD_TOKENS = 1 << 20
VOCABULARY = 257


def documents(tokens: int) -> list[np.ndarray]:
    """Random documents of about 1,000 tokens, the lengths spread as those of texts are (log-normal)."""
    generator = np.random.default_rng(0)
    lengths = np.maximum(1, generator.lognormal(6.4, 1.0, tokens // 500)).astype(np.int64)
    lengths = lengths[np.cumsum(lengths) <= tokens]
    ids = generator.integers(0, 256, int(lengths.sum()), dtype=np.uint16)
    return np.split(ids, np.cumsum(lengths)[:-1])


def write_corpus(folder: Path, texts: list[np.ndarray]) -> None:
    """Writes the documents to ``folder`` as a prepared corpus."""
    stamps = VerifiedFiles(folder)
    io.write_whole(folder / tokenizer.FILE, tokenizer.build_tokenizer(TokenizerConfig(kind="bytes"), [], "").encode())
    made = tokenizer.load_tokenizer(folder)
    eot = np.array([made.eot], np.uint16)
    numbers = np.cumsum([len(text) for text in texts]) // SHARD_TOKENS
    entries, tables, first = [], [], 0
    for number in range(int(numbers[-1]) + 1):
        part = [texts[n] for n in np.flatnonzero(numbers == number)]
        stored = (("random", len(text), [eot, text, eot]) for text in part)
        entry, table = shards.write_shard(folder / f"train-{number:06d}.tar", first, np.dtype("uint16"), stored)
        stamps.add(folder / entry.name, entry.sha256)
        entries.append(entry)
        tables.append(table)
        first += len(part)
    table_entry = shards.write_table(folder, "train", np.concatenate(tables, axis=1), stamps)
    splits = {"train": shards.split_entry(entries, table_entry)}
    shards.write_index(folder, {"recipe": "random", "settings": {}}, made, "uint16", splits)


def our_loader(folder: Path, seq_len: int, batch: int) -> Loader:
    """Opens the corpus in ``folder`` and returns the loader of a single worker."""
    split = shards.Corpus(folder).split("train")
    plan = BatchPlan(EpochOrder(split_sizes(split), Shuffle(0, 16), True), StepShape(batch, seq_len, batch))
    return Loader(split, plan, RankShare(0, 1, batch), CausalExamples(seq_len, isolate=True))


def peer_batches(folder: Path, texts: list[np.ndarray], seq_len: int, batch: int) -> Iterator[int]:
    """Writes the documents for litdata; yields the number of tokens of each of its batches, epoch after epoch."""
    try:
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize
    except ImportError:
        raise SystemExit(
            "litdata is not installed. Install it in an environment of its own (it brings another torch), "
            "or use --no-peer"
        ) from None
    np.save(folder / "ids.npy", np.concatenate(texts))
    np.save(folder / "ends.npy", np.cumsum([len(text) for text in texts]))
    loader = TokensLoader(block_size=seq_len + 1)
    optimize(
        fn=_peer_documents,
        inputs=[str(folder)],
        output_dir=str(folder / "shards"),
        item_loader=loader,
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )
    while True:
        dataset = StreamingDataset(
            str(folder / "shards"), item_loader=TokensLoader(block_size=seq_len + 1), shuffle=True
        )
        for block in StreamingDataLoader(dataset, batch_size=batch, num_workers=0, drop_last=True):
            assert tuple(block.shape) == (batch, seq_len + 1)
            yield batch * seq_len


def _peer_documents(folder: str) -> Iterator[object]:
    """Yields one tensor of token ids for each document, run by litdata in a process of its own."""
    import torch

    ids, ends = np.load(Path(folder) / "ids.npy"), np.load(Path(folder) / "ends.npy")
    for text in np.split(ids, ends[:-1]):
        yield torch.from_numpy(text.copy())


def our_batches(loader: Loader) -> Iterator[int]:
    """Yields the number of tokens of each batch, epoch after epoch."""
    for micro_batches, _ in loader:
        yield micro_batches[0]["tokens"].numel()


def speed(batches: Iterator[int], seconds: float) -> float:
    """Millions of tokens a second, measured over about ``seconds``."""
    tokens, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        tokens += next(batches)
    return tokens / taken / 1e6


def resume_times(folder: Path, seq_len: int, batch: int, count: int = 10) -> list[tuple[float, float]]:
    """(ms to open the corpus, ms from there to the first batch) at random positions, each with new objects."""
    times = []
    for number in range(count):
        begin = time.perf_counter()
        loader = our_loader(folder, seq_len, batch)
        opened = time.perf_counter()
        step = random.Random(number).randrange(loader.plan.steps_per_epoch)
        loader.seek(Cursor(number % 3, step * seq_len))
        next(loader)
        times.append(((opened - begin) * 1e3, (time.perf_counter() - opened) * 1e3))
        loader.close()
    return times


def main(argv: list[str]) -> int:
    """Runs the comparison, prints it, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench loader", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32_000_000)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        ours, peers = Path(folder, "ours"), Path(folder, "peer")
        ours.mkdir()
        peers.mkdir()
        texts = documents(options.tokens)
        write_corpus(ours, texts)
        loader = our_loader(ours, options.seq_len, options.batch)
        readers = {"trireme": our_batches(loader)}
        if not options.no_peer:
            readers["litdata TokensLoader"] = peer_batches(peers, texts, options.seq_len, options.batch)
        rounds: dict[str, list[float]] = {name: [] for name in readers}
        for reader in readers.values():
            speed(reader, options.seconds)  # warm: files in the page cache, memory at hand
        for _ in range(options.rounds):
            for name, reader in readers.items():
                rounds[name].append(speed(reader, options.seconds))
        loader.close()
        times = resume_times(ours, options.seq_len, options.batch)
    print(f"{len(texts):,} documents, {options.tokens:,} tokens; T {options.seq_len}, B {options.batch}; one process")
    for name, speeds in rounds.items():
        middle, low, high = statistics.median(speeds), min(speeds), max(speeds)
        print(f"  {name:22} {middle:7.1f} Mtok/s   (of {options.rounds}: {low:.1f} to {high:.1f})")
    if len(rounds) == 2:
        ratios = [a / b for a, b in zip(*rounds.values(), strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"  trireme / litdata      {middle:7.2f}          ({low:.2f} to {high:.2f})")
    for name, taken in zip(("open the corpus", "seek to first batch"), zip(*times, strict=True), strict=True):
        middle, worst = statistics.median(taken), max(taken)
        print(f"  {name:22} {middle:7.1f} ms       (worst of {len(taken)} random positions: {worst:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
