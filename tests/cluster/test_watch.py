"""From the ends of ranks to the verdict and its block. Tables of pure cases."""

import pytest

from cluster.watch import End, explain, judge

GLOO = "Traceback (most recent call last):\nRuntimeError: [gloo/transport/tcp/pair.cc:538] Connection closed by peer"
OOPS = 'Traceback (most recent call last):\n  File "x.py", line 3, in f\nValueError: the oar broke'


def ends(*given):
    return [End(order=order, **end) for order, end in enumerate(given)]


@pytest.mark.parametrize(
    ("given", "size", "kind", "cause"),
    [
        ([], 2, "running", None),
        ([{"rank": 0, "code": 0}], 2, "running", None),
        ([{"rank": 1, "code": 0}, {"rank": 0, "code": 0}], 2, "done", None),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 75}], 2, "stopped", None),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": 0}], 2, "stopped", None),
        ([{"rank": 1, "code": -9}], 2, "failed", 1),
        # the victims' errors came first, and still the killed rank is the cause
        (
            [{"rank": 0, "code": 1, "error": GLOO}, {"rank": 2, "code": 1, "error": GLOO}, {"rank": 1, "code": -9}],
            3,
            "failed",
            1,
        ),
        ([{"rank": 0, "code": 1, "error": GLOO}, {"rank": 1, "code": 1, "error": OOPS}], 2, "failed", 1),
        # a rank that the driver killed is nobody's cause
        ([{"rank": 0, "code": -9, "ours": True}, {"rank": 1, "code": 1, "error": GLOO}], 2, "failed", 1),
        # only connection errors: the first heard of is as good as it gets
        ([{"rank": 1, "code": 1, "error": GLOO}, {"rank": 0, "code": 1, "error": GLOO}], 2, "failed", 1),
        (
            [{"rank": 1, "code": 2, "error": "wrong corpus"}, {"rank": 0, "code": 2, "error": "wrong corpus"}],
            2,
            "bad_input",
            1,
        ),
        ([{"rank": 0, "code": 1, "error": OOPS}, {"rank": 1, "code": 2, "error": "wrong"}], 2, "failed", 0),
        # code 2 without a message is not bad input: something called exit(2)
        ([{"rank": 0, "code": 2}], 1, "failed", 0),
        ([{"rank": 0, "code": 75}, {"rank": 1, "code": -11}], 2, "failed", 1),
    ],
)
def test_the_verdict_and_its_first_cause(given, size, kind, cause):
    verdict = judge(ends(*given), size)
    assert verdict.kind == kind
    assert (verdict.cause.rank if verdict.cause else None) == cause


def block(*given, size=4):
    return "\n".join(explain(judge(ends(*given), size)))


def test_a_killed_rank_is_named_with_host_pid_signal_and_its_last_words():
    text = block(
        {"rank": 0, "code": 1, "error": GLOO},
        {
            "rank": 3,
            "code": -9,
            "host": "oar7",
            "pid": 4242,
            "tail": ("step 11", "step 12"),
            "peak_mib": 900,
            "memory_mib": 8000,
        },
        {"rank": 1, "code": -9, "ours": True},
    )
    assert text.splitlines()[0] == "rank 3 on oar7 (pid 4242) killed by SIGKILL"
    assert "  step 12" in text
    assert "no lack of memory" in text
    assert "ranks 0, 1 fell with it" in text
    assert "gloo" not in text


def test_a_kill_for_want_of_memory_says_so():
    text = block({"rank": 0, "code": -9, "oom": 1, "peak_mib": 7900, "memory_mib": 8000})
    assert "out of memory" in text
    assert "7,900 MiB" in text


def test_an_exception_shows_its_traceback_and_not_the_log_too():
    text = block({"rank": 2, "code": 1, "error": OOPS, "tail": ("noise",)}, {"rank": 0, "code": 1, "error": GLOO})
    assert text.splitlines()[0] == "rank 2 raised ValueError"
    assert "ValueError: the oar broke" in text
    assert "noise" not in text
    assert "rank 0 fell with it" in text


def test_a_lost_host_is_told_as_lost():
    assert "was lost" in block({"rank": 1, "code": -9, "lost": "was lost with its host"})


def test_an_exit_without_a_word_shows_the_log():
    text = block({"rank": 1, "code": 7, "tail": ("about to exit",)})
    assert "exited with code 7 without a word" in text
    assert "about to exit" in text


def test_many_fallen_ranks_take_one_line():
    given = [{"rank": r, "code": 1, "error": GLOO} for r in range(1, 40)] + [{"rank": 0, "code": -6}]
    lines = explain(judge(ends(*given), 40))
    assert len([line for line in lines if "fell with it" in line]) == 1
    assert "SIGABRT" in lines[0]
