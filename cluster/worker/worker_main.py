"""Entry point of a forked worker process: joins the process group and runs the target.

Its exit status is its verdict (0 done, 75 stopped and saved, 2 bad input, 1 a failure, a signal: killed). Its events go
through the event pipe, one JSON line each; everything printed goes to the rank's own log.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
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

from cluster.device_health import preflight
from cluster.host import affinity, job_dir
from cluster.worker import cuda_probe, exit_record, flight_dump, ipc, worker_env
from cluster.worker.messages import StartOrder
from train.config.schema import Config
from train.distributed import heartbeat, process_group
from train.errors import NO_ROOM, ExitCode, NotFinite, Stopped, UserError, no_room
from train.events import ErrorEvent, NoteEvent, PhaseEvent, StopAskedEvent
from train.util.format import plural
from train.util.io import FileLock

LEAST_CORES = 2
"""A rank has more threads that work at the same time: a NUMA node where it may use fewer cores is not kept to."""


class StopFlag:
    """True from the first SIGTERM or SIGINT on; the training loop reads it at points where it can save."""

    def __init__(self, events: ipc.EventPipe) -> None:
        self._requested = False
        self._events = events
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if not self._requested:
            self._requested = True
            # From another thread: the main one may hold the lock of the event pipe at this very moment.
            threading.Thread(target=self._events, args=(StopAskedEvent(number),), daemon=True).start()

    def __call__(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self._requested


def load_target(name: str) -> Callable[..., None]:
    """Imports and returns the function that ``module:function`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def worker_main(order: StartOrder, fds: list[int]) -> int:
    """Runs one rank to its end and returns its exit status.

    ``fds``: the event pipe, the memory of the heartbeat, and on rank 0 the listening socket where the ranks meet.
    """
    events_fd, heartbeat_fd, *listen_fd = fds
    heartbeat.attach(heartbeat_fd)
    os.close(heartbeat_fd)
    _redirect_output(order.log)
    flight_dump.serve_requests(order.flight_record)
    os.chdir(order.cwd)
    _set_environment(order)
    torch.set_num_threads(order.threads)
    events = ipc.EventPipe(events_fd)
    stop = StopFlag(events)
    code, error = _run_target(order, events, stop, *listen_fd)
    if stop():
        exit_record.write(order, code, error)
    return code


def _set_environment(order: StartOrder) -> None:
    """Makes the environment what ``worker_env`` says, before torch's C++ and NCCL read it."""
    own = dict(os.environ)
    environment = worker_env.worker_environment(
        own, order, str(job_dir.temp_root() / order.job), job_dir.cache_folder() if order.device == "gpu" else None
    )
    for name in own.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    settings = environment.get("PYTORCH_ALLOC_CONF")
    if order.device == "gpu" and settings and settings != own.get("PYTORCH_ALLOC_CONF"):
        # The fork server has loaded torch, which may have read the variable then.
        torch._C._accelerator_setAllocatorSettings(settings)


def _run_target(
    order: StartOrder, events: ipc.EventPipe, stop: StopFlag, listen_fd: int | None = None
) -> tuple[int, str | None]:
    """Joins the process group and calls the target: the exit status, and the error that was sent if there was one."""
    events(PhaseEvent.now("start"))
    try:
        config = Config.model_validate_json(order.config)
        if order.device == "gpu":
            _check_device()
            _bind_to_gpu(order.threads)
        with _only_writer(order, events):
            rendezvous = process_group.Rendezvous(
                order.rendezvous.host,
                order.rendezvous.port,
                order.rendezvous.attempt,
                listen_fd=listen_fd,
                timeout_s=config.cluster.start_timeout,
            )
            context = process_group.init_group(order.rank, order.size, order.local_rank, order.device, rendezvous)
            events(PhaseEvent.now("connected"))
            if config.cluster.preflight == "auto" and order.device == "gpu":
                preflight.check_ranks(context, events)
            load_target(order.target)(config, order.corpus, context, events, stop)
            process_group.destroy_group()
    except Stopped:
        return ExitCode.STOPPED, None
    except UserError as error:
        events(ErrorEvent("not_finite" if isinstance(error, NotFinite) else "user", str(error)))
        return ExitCode.BAD_INPUT, str(error)
    except preflight.PreflightFailed as error:
        events(ErrorEvent("device", str(error)))
        return ExitCode.FAILURE, str(error)
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


def _traceback(events: ipc.EventPipe) -> str:
    text = traceback.format_exc()
    print(text, file=sys.stderr)
    events(ErrorEvent("exception", text))
    return text


def _redirect_output(log: str) -> None:
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
    # Libraries' warnings of future changes would stand among the last lines of a rank that was killed.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2)


def _check_device() -> None:
    """Raises RuntimeError unless this rank sees exactly the device that Ray gave it."""
    given = os.environ["CUDA_VISIBLE_DEVICES"]
    seen = torch.cuda.device_count()
    if seen != 1:
        raise RuntimeError(
            f"Ray gave this rank GPU {given!r}, but torch sees {plural(seen, 'device')}. {cuda_probe.versions()}"
        )


def _bind_to_gpu(threads: int) -> None:
    """Keeps this rank, with at most so many threads, to the cores of the NUMA node that its GPU is on."""
    card = torch.cuda.get_device_properties(0)
    address = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"  # type: ignore[attr-defined]
    cores = affinity.bind_to_device(address, LEAST_CORES)
    torch.set_num_threads(min(threads, cores))


@contextlib.contextmanager
def _only_writer(order: StartOrder, events: ipc.EventPipe) -> Any:
    """Locks the run's folder against a second rank 0, on rank 0.

    The driver's lock goes when the driver dies; its rank 0 on another host may live some seconds longer, and the next
    rank 0 waits for it here.
    """
    if order.rank:
        yield
        return
    note = NoteEvent("waiting for the last start's rank 0 to be gone")
    with FileLock(Path(order.log).with_name("writer.lock"), on_wait=lambda: events(note)):
        yield
