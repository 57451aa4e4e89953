"""The base class of drivers: runs one command to its exit code and ends all processes that it started."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from typing import Protocol

from cluster.driver.early_start import EarlyStart
from cluster.host.stop_request import end_now
from cluster.raycluster.remote_hosts import RemoteNodes
from train.errors import NO_ROOM, ExitCode, bad_input, no_room


class DriverConsole(Protocol):
    """A console as a driver uses it, for bad input and at its end, whatever else the console shows."""

    def show_bad_input(self, message: str) -> None:
        """Ends the live display and shows what is wrong with the input and how to correct it."""

    def close(self) -> None:
        """Ends the live display and gives the cursor back; a second call does nothing."""


class Driver(ABC):
    """A command from its early start to its exit code. Subclasses do the work in ``run``."""

    console: DriverConsole

    def __init__(self, early: EarlyStart) -> None:
        self.early = early
        self.remote_nodes: RemoteNodes | None = None
        """Nodes on other hosts that this driver has started and that end with it."""

    @abstractmethod
    def run(self) -> int:
        """Does the work and returns the exit code. UserError is bad input."""

    @abstractmethod
    def remove_empty_folder(self) -> None:
        """After bad input: removes the folder that this command made, unless there is something in it."""

    def main(self) -> int:
        """Runs the command, then ends this process with the exit code, and with it all processes that it started."""
        self.early.signals.on_exit.insert(0, self.console.close)
        try:
            code = self.run()
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in NO_ROOM
            message = no_room(error) if isinstance(error, OSError) and full else bad_input(error)
            if message is not None:
                self.console.show_bad_input(message)
                code = ExitCode.BAD_INPUT
                self.remove_empty_folder()
            else:  # not left to the interpreter, which would first close the fork server, which would kill the workers
                self.console.close()
                traceback.print_exc()
                code = ExitCode.FAILURE
        finally:
            self.console.close()
        if self.remote_nodes is not None:
            self.remote_nodes.close()
        # The kernel ends Ray's processes and the workers on this host with this process: there is nothing to wait for.
        self.early.remove_folder()
        end_now(code)
        return code
