"""The record that a worker leaves in the run's folder for a driver that has lost its agent."""

from dataclasses import replace

from cluster.worker import exit_record


def test_exit_record_is_read_only_by_the_start_that_it_belongs_to(order):
    assert exit_record.read(order) is None
    exit_record.write(order, 75, None)
    found = exit_record.read(order)
    assert (found["code"], found["error"]) == (75, None)
    assert exit_record.read(replace(order, job="b")) is None
    assert exit_record.read(replace(order, rendezvous=replace(order.rendezvous, attempt=1))) is None
