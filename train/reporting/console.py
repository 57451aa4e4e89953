"""Console of a run: renders events as lines on the terminal.

On a terminal a live status line stays below a log of past events; elsewhere the same log is plain text, with a line of
progress every few seconds. An event that lacks a field is shown without it: the console never ends a run. Imports no
torch.
"""

from __future__ import annotations

import math
import shlex
import time
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train import events
from train.errors import shown_name
from train.printable import printable
from train.reporting import failure_block
from train.reporting.terminal import UserConsole
from train.util.format import PREPARING, count, duration, finite, plural, shares

PLAIN_EVERY_S = 5.0
LEAST_ESTIMATE_S = 5.0
"""Least estimate that is shown: a shorter run takes longer to start than to train."""
BAR_WIDTH, LEAST_BAR_WIDTH = 28, 4
GAP, FEWEST_FACTS = 2, 3
"""Columns between the facts of the live line; how many of them a narrow terminal keeps."""
STEP_WORDS = {"step_s_p50": "a step", "step_s_p99": "99 % of steps within"}
PHASES = {
    "ray": "starting Ray",
    "workers": "starting the workers",
    "engine": "building the model",
    "first_step": "first step",
    "eval": "evaluating",
    "save": "saving",
    "sample": "sampling",
}
"""The phases that are shown while they last, in words."""


class RunConsole:
    """Shows one run's events. ``show`` takes any event; the other methods speak for the driver."""

    def __init__(self, terminal: UserConsole | None = None, errors: UserConsole | None = None) -> None:
        self.terminal = terminal or UserConsole(soft_wrap=False)
        self.errors = errors or UserConsole(stderr=True)
        self._live: Live | None = None
        self._config: dict[str, Any] = {}
        self._first_step: tuple[int, float] | None = None
        self._last_plain = -math.inf
        self._last: dict[str, Any] = {}
        self._best: float | None = None
        self._preparing: str | None = None

    def show(self, record: dict[str, Any]) -> None:
        """Shows one event, given as its JSON; kinds that are not for people are ignored."""
        match events.from_json(record):
            case events.JobEvent() as event:
                self._job(event)
            case events.PlanEvent() as event:
                self._plan(event)
            case events.PhaseEvent(name=name) if name in PHASES:
                self._status(Text(f"  {PHASES[name]} ...", style="dim"))
            case events.PrepareEvent() as event:
                self._prepare(event)
            case events.StepEvent() as event:
                self._step(event)
            case events.EvalEvent() as event:
                self._eval(event)
            case events.SaveEvent() as event:
                self._save(event)
            case events.SampleEvent() as event:
                self._sample(event)
            case events.NoteEvent(text=text):
                self._line(Text(f"  {text}", style="yellow"))
            case events.DoneEvent(summary=summary):
                self._done(summary)
            case events.FailureEvent() as event:
                self.close()
                block = failure_block.render_failure(event, self._config.get("run", {}).get("dir"), self.errors.is_live)
                self.errors.print(block)
            case events.RecoveredEvent() as event:
                self._line(failure_block.render_recovery(event))
            case events.StoppingEvent():
                text = "  stopping: finishing the step and saving (once more to end at once)"
                self._line(Text(text, style="yellow"))

    def close(self) -> None:
        """Removes the live line and restores the cursor."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # at the start

    def _job(self, event: events.JobEvent) -> None:
        self._config = event.config
        cluster, run = self._config.get("cluster", {}), self._config.get("run", {})
        workers = cluster.get("workers")
        hosts = event.hosts
        device = {"gpu": "a GPU each", "cpu": f"{plural(cluster.get('cpus_per_worker', 1), 'core')} each"}.get(
            event.device, ""
        )
        places = f"{plural(workers, 'worker')}, {device}" + (
            f", on up to {hosts} hosts" if hosts > 1 else ", on this machine"
        )
        self._line(Text.assemble(("Trireme ", "bold"), (str(run.get("name", "")), "bold cyan")))
        self._fact("workers", f"{places}; ZeRO stage {self._config.get('zero', {}).get('stage')}")
        self._fact("run", f"{run.get('dir')}  (libraries' noise: {run.get('dir')}/logs/)")

    def _plan(self, event: events.PlanEvent) -> None:
        model, batch = self._config.get("model", {}), self._config.get("batch", {})
        shape = [
            f"{model[key]} {word}"
            for key, word in (("layers", "layers"), ("width", "wide"), ("heads", "heads"))
            if key in model
        ]
        part = "" if event.trained in (event.params, None) else f", {count(event.trained)} of them trained"
        self._fact("model", f"{count(event.params)} parameters" + part + (f": {', '.join(shape)}" if shape else ""))
        what = plural(count(event.steps), "step")
        if batch:
            what += f" of {batch.get('global')} x {batch.get('seq_len')} tokens"
        estimate = event.estimate_s or 0.0
        about = f", about {duration(estimate)}" if estimate >= LEAST_ESTIMATE_S else ""
        if event.device:
            self._fact("device", _device(event))
        self._fact("kernels", event.kernels or "")
        self._fact("work", what + (f": {count(event.tokens)} tokens" if event.tokens else "") + about)
        if event.start_step:
            self._fact("resumes", f"at step {event.start_step:,}, from its newest checkpoint")

    def _prepare(self, event: events.PrepareEvent) -> None:
        if event.phase == "note":
            self._line(Text(f"  {event.progress['text']}"))
            return
        words = (PREPARING | {"wait": "waiting for another that works on it"}).get(event.phase)
        if words is None:
            self.close()
            return
        text, done, total = f"  preparing the corpus: {words}", event.progress.get("done"), event.progress.get("total")
        if words != self._preparing and not self.terminal.is_live:
            self._line(Text(text))
        self._preparing = words
        self._status(Text(text + (f", {done / total:.0%}" if finite(done) and total else ""), style="dim"))

    # during training

    def _step(self, event: events.StepEvent) -> None:
        now = time.monotonic()
        step, steps = event.step, event.steps or self._config.get("steps")
        if self._first_step is None:
            self._first_step = (step, now)
        eta = self._eta(step, steps, now)
        measured = finite(event.metrics.get("loss"))
        self._last = (
            event.metrics if measured else self._last
        )  # between logged steps the line keeps the last one's numbers
        facts = [f"step {step:,}" + (f"/{steps:,}" if steps else "")]
        facts += [f"loss {self._last['loss']:.4f}"] if self._last else []
        facts += [f"{eta} left"] if eta and step != steps else []
        facts[2:2] = _speed_facts(self._last)
        if self.terminal.is_live:
            facts, width = _fit(facts, self.terminal.width - len(" ") - 2 * GAP)
            row = Table.grid(padding=(0, GAP))
            bar = ProgressBar(
                total=steps or 1, completed=step, width=width, complete_style="cyan", finished_style="cyan"
            )
            row.add_row(Text(" "), bar, *(Text(fact) for fact in facts))
            self._status(row)
        elif measured and (now - self._last_plain >= PLAIN_EVERY_S or step == steps):
            self._last_plain = now
            self._line(Text("  " + "  ".join(facts)))

    def _eta(self, step: int, steps: int | None, now: float) -> str:
        first, since = self._first_step or (step, now)
        if not steps or step <= first:
            return ""
        return duration((now - since) / (step - first) * (steps - step))

    def _eval(self, event: events.EvalEvent) -> None:
        loss = event.metrics.get("val_loss")
        if loss is None or not finite(loss):
            return
        better = self._best is None or loss < self._best
        fall = f"  ({loss - self._best:+.4f})" if self._best is not None else ""
        self._best = loss if better else self._best
        text = Text.assemble(
            ("  step ", "dim"),
            (f"{event.step:,}".rjust(7), "dim"),
            "  validation loss ",
            (f"{loss:.4f}", "bold"),
        )
        if finite(event.metrics.get("bits_per_byte")):
            text.append(f"  {event.metrics['bits_per_byte']:.4f} bits per byte")
        text.append(fall, style="green" if better else "yellow")
        self._line(text)

    def _save(self, event: events.SaveEvent) -> None:
        seconds = f" in {event.seconds:.1f} s" if finite(event.seconds) else ""
        seconds += f", the steps waited {event.stall_s:.2f} s" if finite(event.stall_s) else ""
        self._line(Text(f"  step {event.step:,}".ljust(15) + f" saved{seconds}", style="dim"))

    def _sample(self, event: events.SampleEvent) -> None:
        if event.step < self._config.get("steps", 0):
            return  # samples.jsonl has those of earlier evaluations, which would hide the losses here
        body = Text.assemble((printable(event.prompt), "cyan"), printable(event.text))  # as wide as it is shown
        if self.terminal.is_live:
            self._line(Panel(body, title="a sample", title_align="left", border_style="dim", expand=False))
        else:
            self._line(Text("  a sample:"))
            self._line(Text("\n".join("  | " + line for line in body.plain.splitlines())))

    def _done(self, summary: dict[str, Any]) -> None:
        names = {
            "step": "steps",
            "val_loss": "validation loss",
            "perplexity": "perplexity",
            "bits_per_byte": "bits per byte",
            "tokens": "tokens",
            "wall_s": "time",
            "goodput": "goodput",
        }
        facts = []
        for key, word in names.items():
            value = summary.get(key)
            if finite(value):
                text = (
                    duration(float(value or 0))
                    if key == "wall_s"
                    else count(value)
                    if isinstance(value, int)
                    else f"{value:.4g}"
                )
                facts.append(f"{word} {text}")
        self._line(Text.assemble(("Done", "bold green"), "  " + " · ".join(facts)))
        if spent := summary.get("time_by_cause"):
            self._fact("time", shares(spent))
        if speed := _speed_facts(summary):
            steps = [f"{word} {summary[key]:.3g} s" for key, word in STEP_WORDS.items() if finite(summary.get(key))]
            self._fact("speed", " · ".join([*speed, *steps]))

    # called by the driver

    def startup(self, marks: dict[str, float]) -> None:
        """One line: the seconds after the command at which each phase of the start was reached."""
        names = (
            ("config", "config"),
            ("ray", "Ray up"),
            ("workers", "workers up"),
            ("imports", "imports"),
            ("first_step", "engine"),
            ("first_step_done", "first step"),
        )
        facts = [f"{word} {marks[key]:.1f}" for key, word in names if key in marks]
        self._line(Text("  seconds to the first step: " + " · ".join(facts), style="dim"))

    def finished(self, config: Any) -> None:
        """Shows where the run's files are, and the commands to use next."""
        where = config.run.dir
        self._fact("run", f"{shown_name(where)}  (metrics.jsonl, summary.json, checkpoints/, logs/)")
        run = shlex.quote(f"run.dir={where}")
        generate = f'./launch.sh generate {run} prompt="..."'
        verbs = [generate] if config.objective.name in ("causal", "seq2seq") else []  # what can write
        for word, line in zip(("next", ""), [*verbs, f"./launch.sh evaluate {run}"], strict=False):
            self._fact(word, line)

    def complete(self, config: Any, summary: dict[str, Any]) -> None:
        """Shows the summary of a run that was complete already, and how to train it further."""
        self._done(summary)
        self._line(
            Text(
                f"  {config.run.dir} is complete already: nothing to do. Train it further with steps=..., "
                "or start a new run with run.name=..."
            )
        )
        self.finished(config)

    def stopped(self, config: Any) -> None:
        """Shows how to continue after a stop."""
        self.close()
        self._line(
            Text.assemble(
                ("Stopped and saved.", "bold yellow"), f" Run the same command again to go on: run.dir={config.run.dir}"
            )
        )

    def show_bad_input(self, message: str) -> None:
        """Shows an error of the input: its cause, its location and its cure."""
        self.close()
        self.errors.print(Text.assemble(("error: ", "bold red"), message))

    # drawing

    def _fact(self, name: str, text: str) -> None:
        self._line(Text.assemble((f"  {name:9}", "dim"), text))

    def _line(self, what: RenderableType) -> None:
        self.terminal.print(what, soft_wrap=not self.terminal.is_live)

    def _status(self, what: RenderableType) -> None:
        if not self.terminal.is_live:
            return
        if self._live is None:
            self._live = Live(Group(what), console=self.terminal, transient=True, refresh_per_second=8)
            self._live.start()
        else:
            self._live.update(what)


def _speed_facts(numbers: dict[str, Any]) -> list[str]:
    """Speed, utilisation and GPU memory in words, what is looked for most first; without what was not measured."""
    facts = [f"{count(numbers['tokens_per_s'])} tokens/s"] if numbers.get("tokens_per_s") else []
    facts += [f"MFU {numbers['mfu']:.1%}"] if finite(numbers.get("mfu")) else []
    facts += [f"{numbers['gpu_peak_gib']:.1f} GiB"] if finite(numbers.get("gpu_peak_gib")) else []
    several = (numbers.get("tokens_per_s_per_worker") or 0) < 0.99 * (numbers.get("tokens_per_s") or 0)
    on_gpus = finite(numbers.get("gpu_peak_gib"))
    return facts + ([f"{count(numbers['tokens_per_s_per_worker'])} a GPU"] if several and on_gpus else [])


def _fit(facts: list[str], room: int) -> tuple[list[str], int]:
    """The facts of the live line for which there is room, in columns, and the width of the bar beside them.

    The bar shrinks first; then those go that are looked for least, but never "... left", which is last.
    """
    kept = list(facts)
    while len(kept) > FEWEST_FACTS and _width(kept) > room - LEAST_BAR_WIDTH:
        del kept[-2 if kept[-1].endswith(" left") else -1]
    return kept, min(BAR_WIDTH, max(LEAST_BAR_WIDTH, room - _width(kept)))


def _width(facts: list[str]) -> int:
    return sum(map(len, facts)) + GAP * (len(facts) - 1)


def _device(event: events.PlanEvent) -> str:
    """A rank's device, the precision and its reason, and the rates that utilisation is told of, in words."""
    parts = [event.device or ""]
    if event.precision:
        parts.append(event.precision + (f" ({event.precision_why})" if event.precision_why else ""))
    known = ((event.peak_flops, "by its data sheet"), (event.measured_flops, "measured in matrix products"))
    rates = [f"{_rate(rate)} {how}" for rate, how in known if finite(rate) and rate]
    return "; ".join([*parts, *([", ".join(rates)] if rates else [])])


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"
