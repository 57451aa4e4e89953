"""The process of one rank: forked from the host's warm process, it joins the world and runs the target to its end.

Its exit status is its verdict (0 done, 75 stopped and saved, 2 bad input, 1 a failure, a signal: killed), and what it
has to say goes through the event pipe, one JSON line an event. Everything printed goes to the rank's own log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster.worker import exit_record
from train.config.schema import Config
from train.distributed import heartbeat, process_group
from train.errors import NO_ROOM, ExitCode, NotFinite, Stopped, UserError, no_room
from train.events import ErrorEvent, Event, NoteEvent, PhaseEvent, StopAskedEvent
from train.util.io import FileLock


class EventPipe:
    """The way out for what a rank has to say: ``events(event)`` writes one line, whole, from any thread."""

    def __init__(self, fd: int) -> None:
        self._file = os.fdopen(fd, "wb", buffering=0)
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Sends ``event``; numbers of foreign types become floats. A steward that is gone hears nothing."""
        line = json.dumps(event.to_json(), default=float).encode() + b"\n"
        with self._lock, contextlib.suppress(BrokenPipeError):
            while line:
                line = line[self._file.write(line) :]


class StopFlag:
    """True from the first SIGTERM or SIGINT on. The signal only sets the flag: the loop looks where it can save."""

    def __init__(self, events: EventPipe) -> None:
        self._asked = False
        self._events = events
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._heard)

    def _heard(self, number: int, frame: object) -> None:
        if not self._asked:
            self._asked = True
            # From another thread: the main one may hold the lock of the event pipe at this very moment.
            threading.Thread(target=self._events, args=(StopAskedEvent(number),), daemon=True).start()

    def __call__(self) -> bool:
        """Whether the run was asked to stop."""
        return self._asked


def load_target(name: str) -> Callable[..., None]:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def worker_main(request: dict[str, Any], fds: list[int]) -> int:
    """Runs one rank to its end and returns its exit status. ``request`` is what the steward sent (see
    ``Steward.start``), ``fds`` the event pipe, the memory of the pulse, and on rank 0 the socket where the ranks meet.
    """
    events_fd, pulse_fd, *listen_fd = fds
    heartbeat.attach(pulse_fd)
    os.close(pulse_fd)
    _take_over_output(request["log"])
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    torch.set_num_threads(request["threads"])
    events = EventPipe(events_fd)
    stop = StopFlag(events)
    code, error = _run_target(request, events, stop, *listen_fd)
    if stop():
        exit_record.leave(request, code, error)
    return code


def _run_target(
    request: dict[str, Any], events: EventPipe, stop: StopFlag, listen_fd: int | None = None
) -> tuple[int, str | None]:
    """The exit status, and the error that was sent if there was one."""
    events(PhaseEvent.now("start"))
    try:
        config = Config.model_validate_json(request["config"])
        _check_device(request["device"])
        with _only_writer(request, events):
            meeting = process_group.Rendezvous(
                request["meeting"]["host"],
                request["meeting"]["port"],
                request["meeting"]["generation"],
                listen_fd=listen_fd,
                timeout_s=config.cluster.start_timeout,
            )
            world = process_group.init_group(
                request["rank"], request["size"], request["local_rank"], request["device"], meeting
            )
            events(PhaseEvent.now("connected"))
            load_target(request["target"])(config, request["corpus"], world, events, stop)
            process_group.destroy_group()
    except Stopped:
        return ExitCode.STOPPED, None
    except UserError as error:
        events(ErrorEvent("not_finite" if isinstance(error, NotFinite) else "user", str(error)))
        return ExitCode.BAD_INPUT, str(error)
    except OSError as error:
        if error.errno not in NO_ROOM:
            return ExitCode.FAILURE, _traceback(events)
        text = no_room(error)
        events(ErrorEvent("user", text))
        return ExitCode.BAD_INPUT, text
    except BaseException:
        # Whatever it is, an interpreter's exit included: a rank that ends early has to say why.
        return ExitCode.FAILURE, _traceback(events)
    return ExitCode.OK, None


def _traceback(events: EventPipe) -> str:
    text = traceback.format_exc()
    print(text, file=sys.stderr)
    events(ErrorEvent("exception", text))
    return text


def _take_over_output(log: str) -> None:
    """Sends stdout and stderr, those of libraries in C included, to the rank's log."""
    path = Path(log)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # What libraries will change one day is not news, and would stand among the last lines of a rank that was killed.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)


def _check_device(device: str) -> None:
    """Raises RuntimeError unless this rank sees exactly the device that Ray gave it."""
    if device != "gpu":
        return
    given = os.environ["CUDA_VISIBLE_DEVICES"]
    seen = torch.cuda.device_count()
    if seen != 1:
        raise RuntimeError(f"Ray gave this rank GPU {given!r}, but torch sees {seen} devices: is the driver installed?")


@contextlib.contextmanager
def _only_writer(request: dict[str, Any], events: EventPipe) -> Any:
    """Holds the right to write into the run's folder, on rank 0.

    The driver's lock goes when the driver dies; a rank 0 on another host may live some seconds longer. The next one
    waits here.
    """
    if request["rank"]:
        yield
        return
    note = NoteEvent("waiting for the last start's rank 0 to be gone")
    with FileLock(Path(request["log"]).with_name("writer.lock"), on_wait=lambda: events(note)):
        yield
