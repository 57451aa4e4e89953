"""Redaction hides what counts as a secret, and nothing else."""

import pytest

from train.util.redact import HIDDEN, redact, redact_tree

SHOWN_AS = {
    "s3://key:CANARY@bucket/x": "s3://[hidden]@bucket/x",
    "s3://key:CAN/ARY+=@bucket": "s3://[hidden]@bucket",
    "data.paths=[s3://k:CANARY@a/x,s3://k:CANARY@b/y]": "data.paths=[s3://[hidden]@a/x,s3://[hidden]@b/y]",
    "s3:/key:CANARY@bucket: no such file": "s3:/[hidden]@bucket: no such file",
    "https://CANARY@host/a": "https://[hidden]@host/a",
    "http://host/a?x=1&X-Amz-Signature=CANARY&y=2": "http://host/a?x=1&X-Amz-Signature=[hidden]&y=2",
    "wandb.key=CANARY steps=3": "wandb.key=[hidden] steps=3",
    "tracking.api_key=CANARY password=CANARY": "tracking.api_key=[hidden] password=[hidden]",
}
INNOCENT = [
    "https://host/a@b",
    "data.text_key=body data.label_key=stars key=value group=choice",
    "loss 2.5 (nats per token: 5) tokens=12",
    "PYTHONPATH=/a:/b",
    "s3://bucket/prefix/file.tar",
]


@pytest.mark.parametrize(("text", "shown"), SHOWN_AS.items())
def test_redact_hides_secrets_in_text(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize("text", INNOCENT)
def test_redact_keeps_text_that_only_resembles_a_secret(text):
    assert redact(text) == text


def test_redact_hides_values_of_secret_variables_anywhere(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "CANARY123")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("PIN_TOKEN", "12")
    assert redact("x CANARY123 y, /home/me/token, 12") == "x [hidden] y, /home/me/token, 12"
    assert redact_tree({"a": ["CANARY123", 1, None], "b": {"c": "s3://k:CANARY@b"}}) == {
        "a": ["[hidden]", 1, None],
        "b": {"c": "s3://[hidden]@b"},
    }


def test_tree_hides_secret_variables_by_name_and_no_key_of_ours():
    keys = {"text_key": "body", "label_key": "a"}
    tree = {"env": {"HF_TOKEN": "abc", "NCCL_ALGO": "Ring"}, "data": keys}
    assert redact_tree(tree) == {"env": {"HF_TOKEN": HIDDEN, "NCCL_ALGO": "Ring"}, "data": keys}
