"""Messages between driver, agents and workers, as dataclasses; light to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.util.run_layout import RunDir


@dataclass(frozen=True)
class SlotInfo:
    """An agent's answer to where it runs: the node, host name, address and GPUs that Ray gave its slot."""

    node: str
    """Ray's id of the node."""
    host: str
    ip: str
    pid: int
    """The agent's own process."""
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class RendezvousAddress:
    """Where the workers of one attempt meet. ``attempt`` counts the attempts of a job from 0."""

    host: str
    port: int
    attempt: int


@dataclass(frozen=True)
class BindResult:
    """An agent's answer to the order to bind the rendezvous socket: its port, or the error."""

    port: int = 0
    error: str | None = None


@dataclass(frozen=True)
class StartOrder:
    """All that it takes to start the worker of one rank. The agent adds what only its host knows."""

    job: str
    """Name of the job's folder on every host."""
    rank: int
    size: int
    local_rank: int
    rendezvous: RendezvousAddress
    target: str
    """Function that the worker runs, ``module:function``."""
    device: str
    """Either "cpu" or "gpu"."""
    config: str
    """The run's configuration as JSON."""
    corpus: str
    cwd: str
    log: str
    """Path of the rank's log."""
    threads: int
    """torch's, within the worker."""
    env: dict[str, str] = field(default_factory=dict)
    """Set in the worker's environment."""
    forwarded: dict[str, str] = field(default_factory=dict)
    """Variables of the driver that are the same on every rank, see ``worker_env``."""
    gpus: tuple[str, ...] = ()
    """GPUs that Ray gave the rank."""
    stop_grace: float = 60.0
    """Seconds that the worker may take to save, after a signal to everybody that ended its agent."""
    interface: str = ""
    """The network interface that the node's address is on; added by the agent."""

    @property
    def flight_record(self) -> Path:
        """Path of the rank's flight record."""
        return RunDir(Path(self.log).parents[1]).flight_record(self.rank)

    def to_json(self) -> dict[str, Any]:
        """The order as a JSON object, as agents send it to the fork server."""
        meeting = {
            "host": self.rendezvous.host,
            "port": self.rendezvous.port,
            "generation": self.rendezvous.attempt,
        }
        fields = asdict(self)
        del fields["rendezvous"]
        return fields | {"meeting": meeting}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StartOrder:
        """The order that ``to_json`` wrote."""
        rest, meeting = {**fields, "gpus": tuple(fields["gpus"])}, fields["meeting"]
        del rest["meeting"]
        rendezvous = RendezvousAddress(meeting["host"], meeting["port"], meeting["generation"])
        return cls(**rest, rendezvous=rendezvous)


@dataclass(frozen=True)
class StartResult:
    """An agent's answer to a ``StartOrder``: the worker's process, or why the fork server could not import its code."""

    pid: int = 0
    ready: float = 0.0
    """When the fork server had imported everything, in seconds since 1970."""
    failed: str | None = None
    refused: str | None = None
    """Why no worker can run on this host until its user does something, in words."""
