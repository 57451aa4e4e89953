"""The order to start a worker, as it goes over the socket between an agent and the fork server."""

import json

from cluster.worker.messages import StartOrder


def test_start_order_survives_the_socket_with_the_keys_of_the_wire(order):
    wire = json.loads(json.dumps(order.to_json()))
    assert wire["meeting"] == {"host": "127.0.0.1", "port": 29500, "generation": 0}
    assert {"job", "rank", "size", "local_rank", "config", "corpus", "cwd", "log", "threads", "env"} <= wire.keys()
    assert StartOrder.from_json(wire) == order
