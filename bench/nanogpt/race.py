"""Seconds from the command to a held-out loss that nanoGPT's recipe for CPUs reaches, beside nanoGPT itself.

    ./launch.sh bench race --peer PATH --text FILE [--rounds 3] [--steps 2000] [key=value ...]

FILE is tinyshakespeare; PATH a checkout of nanoGPT, of which a copy runs: its prepare.py, then its train.py by the
command that its README gives for CPUs. Ours is ``train experiment=shakespeare_race``. Both train on the first nine
tenths of the same characters, and both times are the wall clock's, from the first command to the mean loss over all of
the last tenth, in rows of 64 characters. The train.py of nanoGPT draws held-out rows at random: that loss is computed
here from its checkpoint, and the seconds of that pass alone are added. They take turns. A time counts only if our loss
is at most nanoGPT's of the same round.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.nanogpt.checkout import load_peer
from bench.tools import goals, results

GOAL = 1 / 3
ROW = 64
PEER_COMMAND = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0"
)
"""Of nanoGPT's README, but for --max_iters and --lr_decay_iters, which are 2000 there."""


OURS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""Variables that launch.sh sets for itself: nanoGPT's scripts import from their own folder."""


class Finish(NamedTuple):
    """How a side came in: seconds since its command, and its loss in nats a character over all of the last tenth."""

    seconds: float
    loss: float


def run_logged(command: list[str], folder: Path, log: Path) -> None:
    """Run a command in ``folder``, its output into ``log``. Raises SystemExit with its last lines if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=folder, stdout=file, stderr=file, env=environment, check=False).returncode
    if code:
        tail = "\n".join(log.read_text("utf-8").splitlines()[-15:])
        raise SystemExit(f"{' '.join(command[:3])} ... ended with {code}:\n{tail}")


def ours(text: Path, overrides: list[str], folder: Path) -> Finish:
    """One run of ours into ``folder``, from nothing but the text."""
    keys = [f"data.paths=[{text}]", f"data.dir={folder}/corpus", f"run.dir={folder}/run", "tracking=off"]
    began = time.perf_counter()
    command = [str(results.REPOSITORY / "launch.sh"), "train", "experiment=shakespeare_race", *keys, *overrides]
    run_logged(command, results.REPOSITORY, folder / "log")
    seconds = time.perf_counter() - began
    return Finish(seconds, json.loads((folder / "run" / "summary.json").read_bytes())["val_loss"])


def theirs(peer: Path, text: Path, steps: int, folder: Path) -> Finish:
    """One run of nanoGPT in a copy of its checkout below ``folder``."""
    checkout = folder / "nanoGPT"
    shutil.copytree(peer, checkout, ignore=shutil.ignore_patterns(".git", "assets", "out*"))
    data = checkout / "data" / "shakespeare_char"
    shutil.copy(text, data / "input.txt")  # its prepare.py would download it
    began = time.perf_counter()
    run_logged([sys.executable, "prepare.py"], data, folder / "log")
    command = [sys.executable, "train.py", *PEER_COMMAND.split(), f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
    run_logged(command, checkout, folder / "log")
    seconds = time.perf_counter() - began
    model = load_model(load_peer(checkout), checkout / "out-shakespeare-char" / "ckpt.pt")
    began = time.perf_counter()
    loss = held_out_loss(model, np.fromfile(data / "val.bin", np.uint16))
    return Finish(seconds + time.perf_counter() - began, loss)


def load_model(nanogpt: ModuleType, checkpoint: Path) -> torch.nn.Module:
    """The model of a checkpoint of its train.py, its best by the held-out rows that it drew."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model: torch.nn.Module = nanogpt.GPT(nanogpt.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    return model.eval()


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, characters: np.ndarray, rows: int = 64) -> float:
    """Mean loss of every character but the first, in rows of ROW from the first on."""
    ids = torch.from_numpy(characters.astype(np.int64))
    inputs, targets = ids[:-1], ids[1:]
    whole = len(inputs) // ROW * ROW
    parts = [(inputs[None, whole:], targets[None, whole:])]
    for start in range(0, whole, rows * ROW):
        part = slice(start, min(start + rows * ROW, whole))
        parts.append((inputs[part].view(-1, ROW), targets[part].view(-1, ROW)))
    return sum(model(x, y)[1].item() * y.numel() for x, y in parts if y.numel()) / len(targets)


def main(arguments: list[str]) -> int:
    """Runs the rounds and prints the table. Returns 0 when the goal is met, ``goals.MISSED`` when it is not."""
    parser = argparse.ArgumentParser(prog="bench race", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of https://github.com/karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, 1,115,394 characters")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="of nanoGPT; ours are the experiment's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration of ours")
    options = parser.parse_intermixed_args(arguments)
    load_peer(options.peer)
    if not options.text.is_file():
        raise SystemExit(f"{options.text} is no file: --text is a copy of tinyshakespeare")
    text, out = options.text.resolve(), Console(soft_wrap=True, highlight=False)
    finishes: dict[str, list[Finish]] = {"nanoGPT": [], "ours": []}
    for number in range(options.rounds):
        for name in list(finishes)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                if name == "ours":
                    finish = ours(text, options.overrides, Path(folder))
                else:
                    finish = theirs(options.peer.resolve(), text, options.steps, Path(folder))
            finishes[name].append(finish)
            out.print(f"round {number + 1}  {name:8}{finish.seconds:7.1f} s  loss {finish.loss:.4f}")
    return report(out, finishes)


def report(out: Console, finishes: dict[str, list[Finish]]) -> int:
    """Prints the table; the exit code of ``main``."""
    table = Table(title=f"{results.processor()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for column in ("", "seconds", "range", "loss", "range"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, runs in finishes.items():
        seconds, losses = zip(*runs, strict=True)
        table.add_row(name, *results.middle(seconds, 1), *results.middle(losses, 4))
    out.print(table)
    rounds = list(zip(finishes["ours"], finishes["nanoGPT"], strict=True))
    ratio = statistics.median(own.seconds / peer.seconds for own, peer in rounds)
    reached = sum(own.loss <= peer.loss for own, peer in rounds)
    out.print(f"ours / nanoGPT: {ratio:.3f} of its seconds (goal: at most {GOAL:.3f})")
    out.print(f"its loss was reached in {reached} of {len(rounds)} rounds")
    return 0 if ratio <= GOAL and reached == len(rounds) else goals.MISSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
