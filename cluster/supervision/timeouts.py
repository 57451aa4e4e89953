"""Time limits of supervision that depend on one another, with the inequalities between them.

All are seconds. Limits that depend on none of these stay where they are used.
"""

from __future__ import annotations

from cluster.raycluster.node_daemon import NODE_SAVE_S
from cluster.worker.agent import DEVICE_READ_S, EVIDENCE_S
from cluster.worker.fork_server_client import ORPHAN_CHECK_S, ORPHAN_S
from cluster.worker.worker_handle import STACK_DUMP_CHECK_S, STACK_DUMP_S
from train.config.schema import LONGEST_GRACE_S, ClusterConfig

TICK_S = 0.2
"""How long the driver waits for events at a time; so late it may see a signal or a larger cluster."""
POLL_S = 1.0
"""How long an agent holds a poll for events open; then it answers with its worker's heartbeat alone."""
SETTLE_S = 1.0
"""After a failure that may be another's consequence, how long the other ranks may take to end and say why."""
KILL_REPORT_S = 5.0
"""How long an agent may be silent after the driver has killed its worker."""
TEARDOWN_S = 60.0
"""How long a killed worker may take to end: the kernel frees its GPU's memory, and what it has pinned, before."""
SIGNAL_GRACE_S = 0.75
"""How long a lost agent is taken for the victim of a signal to everybody, which the driver is then to receive."""
MUTE_S = 3.0
"""After such a signal, how long an agent may be silent before its worker's exit record is looked for."""
EXIT_RECORD_S = 5.0
"""After such a signal, how long beyond ``cluster.stop_grace`` a worker may take to write its exit record."""
GROW_CHECK_S = 0.5
"""Between checks for whether there is room for more workers."""

INSPECT_S = 3.0
"""How long agents may take to answer with their workers' stacks."""
DRIVER_PAUSE_S = 3.0
"""Where so much time lies between two health checks, the driver itself was stopped, and no agent is called silent."""

DEVICE_CHECK_S = 30.0
"""Between samples of the GPUs' clocks."""

REJOIN_S = 8.0
"""How long a lost worker's slot on a living host may take to be filled before the others go on without it."""
SLOT_CHECK_S = 0.2
"""Between checks for whether slots have been filled."""

USUAL_GRACE_S = float(ClusterConfig().stop_grace)
DRIVER_STOP_S = 150.0
"""How long a driver that was told to stop may take to end, before the drill kills it."""
HOST_CUT_S = 20.0
"""How long, beyond ``cluster.hang_timeout``, the drill keeps a host cut off."""

INEQUALITIES = (
    (TICK_S, POLL_S, "several ticks fall into one poll, so signals are seen before an agent's next heartbeat"),
    (POLL_S + 2 * TICK_S, MUTE_S, "an agent that answers its polls is never mute"),
    (POLL_S + 2 * TICK_S, KILL_REPORT_S, "an agent that lives is not silent after a kill"),
    (KILL_REPORT_S, TEARDOWN_S, "a silent agent is known before a slow worker is given up"),
    (2 * TICK_S, SETTLE_S, "the other ranks' errors are read before they are killed"),
    (2 * TICK_S, DRIVER_PAUSE_S, "the driver's own tick is no pause"),
    (TICK_S, GROW_CHECK_S, "a check happens at most once a tick"),
    (SLOT_CHECK_S, REJOIN_S, "a slot that is filled in time is seen in time"),
    (ORPHAN_S + ORPHAN_CHECK_S, SIGNAL_GRACE_S, "a lost agent's worker is dead before its rank counts as ended"),
    (ORPHAN_CHECK_S, EXIT_RECORD_S, "the exit record is awaited as long as its worker may live"),
    (LONGEST_GRACE_S + ORPHAN_CHECK_S, NODE_SAVE_S, "a node's daemon, which owns the fork server, outlives the save"),
    (USUAL_GRACE_S + EXIT_RECORD_S + TEARDOWN_S, DRIVER_STOP_S, "a driver that waits for its workers is not killed"),
    (
        STACK_DUMP_S + STACK_DUMP_CHECK_S + 2 * DEVICE_READ_S,
        INSPECT_S,
        "an agent that waited for a whole stack, and for its GPU, is still heard",
    ),
    (2 * EVIDENCE_S, KILL_REPORT_S, "an agent that waits for its GPU's counters reports an exit in time"),
    (POLL_S + KILL_REPORT_S + REJOIN_S, HOST_CUT_S, "the job has gone on without the host before it is back"),
)
"""(shorter, longer, why the one must be shorter than the other)."""
