"""Text at URLs, on a real S3 server and a real HTTP server of this machine, with faults between them and the reader."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from train.config import schema
from train.config.load import load as load_config
from train.data.prepare.prepare import find_prepared, prepare
from train.data.sources import remote
from train.data.sources.source_files import list_files
from train.errors import UserError

KEY, SECRET = "AKIAEXAMPLEEXAMPLE12", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY00"


def quiet(_event):
    pass


class Faults(BaseHTTPRequestHandler):
    """A proxy before the S3 server; ``plan`` says what becomes of the next GET of an object, in order."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]
    plan: list[str]
    always: str | None

    def log_message(self, *args):
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(*self.upstream, timeout=20)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        fault = self._fault()
        if fault == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hang":
            threading.Event().wait(2.5)
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
            self.close_connection = fault == "cut"

    def _fault(self) -> str | None:
        is_object = self.command == "GET" and self.path.partition("?")[0].rpartition("/")[2]
        if not is_object or "list-type" in self.path:
            return None
        if self.always:
            return self.always
        return self.plan.pop(0) if self.plan else None

    do_GET = do_HEAD = do_PUT = do_POST = _forward  # noqa: N815


@pytest.fixture(scope="module")
def s3_server() -> Iterator[tuple[str, int]]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch):
    """A bucket "texts" on the server, reached through ``Faults``; returns boto3's client."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    handler = type("Handler", (Faults,), {"upstream": s3_server, "plan": [], "always": None})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01, 0.01))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    client = boto3.client("s3", endpoint_url=f"http://{s3_server[0]}:{s3_server[1]}")
    client.create_bucket(Bucket="texts")
    client.faults = handler
    yield client
    for entry in client.list_objects_v2(Bucket="texts").get("Contents", []):
        client.delete_object(Bucket="texts", Key=entry["Key"])
    proxy.shutdown()
    proxy.server_close()


def rows(begin: int, end: int) -> bytes:
    return "".join(json.dumps({"text": f"row {number} of the bucket"}) + "\n" for number in range(begin, end)).encode()


def fill(client, folder: Path) -> None:
    """The same three files in the bucket and in a local folder."""
    (folder / "deep").mkdir(parents=True)
    for name, content in {
        "a.jsonl": rows(0, 200),
        "deep/b.jsonl.gz": gzip.compress(rows(200, 300)),
        "c.txt": b"plain",
    }.items():
        client.put_object(Bucket="texts", Key=f"corpus/{name}", Body=content)
        (folder / name).write_bytes(content)


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def all_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "plan", [[], ["500", "cut", "500"], ["cut", "cut", "500", "cut"]], ids=["whole", "few", "more"]
)
def test_bucket_makes_the_shards_of_a_folder_whatever_fails_meanwhile(tmp_path, text_data, bucket, plan, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 3000)
    fill(bucket, tmp_path / "local")
    here = prepare(text_data("local", dir="one"), quiet)
    bucket.faults.plan += plan
    there = prepare(text_data("s3://texts/corpus", dir="two"), quiet)
    assert bucket.faults.plan == []
    assert shard_bytes(here) == shard_bytes(there)
    assert find_prepared(text_data("s3://texts/corpus", dir="two")) == there
    assert SECRET.encode() not in all_bytes(tmp_path)
    assert KEY.encode() not in all_bytes(tmp_path)


def test_patterns_and_single_files_are_found(bucket, tmp_path, text_data):
    fill(bucket, tmp_path / "local")
    assert [file.name for file in list_files(text_data("s3://texts/corpus/*.jsonl"))] == ["a.jsonl"]
    assert [file.name for file in list_files(text_data("s3://texts/corpus/**/*.gz"))] == ["deep/b.jsonl.gz"]
    assert [file.name for file in list_files(text_data("s3://texts/corpus/c.txt"))] == ["c.txt"]


def test_changed_object_is_noticed(bucket, tmp_path, text_data):
    fill(bucket, tmp_path / "local")
    data = text_data("s3://texts/corpus", dir="out")
    prepare(data, quiet)
    bucket.put_object(Bucket="texts", Key="corpus/c.txt", Body=b"other")
    assert find_prepared(data) is None


def test_server_that_keeps_failing_is_named_without_secrets(bucket, tmp_path, text_data):
    fill(bucket, tmp_path / "local")
    for fault in ("500", "cut"):
        bucket.faults.always = fault
        with pytest.raises(UserError, match=r"s3://texts/corpus/a.jsonl: cannot be read: ") as caught:
            prepare(text_data("s3://texts/corpus"), quiet)
        assert SECRET not in str(caught.value)
    assert not (tmp_path / "corpora").exists()


def test_silent_server_is_asked_again(bucket, tmp_path, text_data, monkeypatch):
    monkeypatch.setattr(remote, "_TIMEOUT_S", 1)
    fill(bucket, tmp_path / "local")
    bucket.faults.plan += ["hang"]
    assert prepare(text_data("s3://texts/corpus"), quiet)


@pytest.mark.parametrize("url", ["s3://nowhere/corpus", "s3://nowhere", "s3://texts/nothing", "s3://texts/no.txt"])
def test_missing_bucket_or_object_is_named(bucket, tmp_path, text_data, url):
    fill(bucket, tmp_path / "local")
    with pytest.raises(UserError, match=f"{url}: ") as caught:
        prepare(text_data(url), quiet)
    assert len(str(caught.value).splitlines()) == 2


def test_missing_credentials_are_named(bucket, tmp_path, text_data, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UserError, match=r"no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        prepare(text_data("s3://texts/corpus"), quiet)


class Pages(BaseHTTPRequestHandler):
    """A plain web server: no ranges, and of the first answers only half; or a status of its own."""

    cuts = 0

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer(b"")

    def do_GET(self):
        cut = self.server.cuts > 0
        self.server.cuts -= cut
        self._answer(self.server.content[: len(self.server.content) // 2] if cut else self.server.content)

    def _answer(self, content: bytes) -> None:
        status = 403 if "secret" in self.path else 200 if self.path == "/a.jsonl" else 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(self.server.content) if status == 200 else 0))
        self.end_headers()
        if status == 200:
            self.wfile.write(content)


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.01, 0.01, 0.01))
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        server.content, server.cuts = rows(0, 500), 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_file_of_a_web_server_is_read_without_ranges(web, tmp_path, text_data, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 3000)
    (tmp_path / "a.jsonl").write_bytes(web.content)
    web.cuts = 2
    url = f"http://127.0.0.1:{web.server_port}/a.jsonl"
    assert shard_bytes(prepare(text_data(url, dir="two"), quiet)) == shard_bytes(
        prepare(text_data("a.jsonl", dir="one"), quiet)
    )


@pytest.mark.parametrize("name", ["none.jsonl", "secret.jsonl"])
def test_page_that_is_not_given_is_named(web, text_data, name):
    with pytest.raises(UserError, match=f"/{name}: cannot be read: "):
        prepare(text_data(f"http://127.0.0.1:{web.server_port}/{name}"), quiet)


@pytest.mark.parametrize(
    "url", ["s3://key:hunter22@texts/a", "https://host/a.txt?token=hunter22", "simplecache::s3://b/a"]
)
def test_url_with_a_secret_is_refused_and_not_shown(url):
    with pytest.raises(UserError, match="with a password, a query or a chain") as caught:
        load_config(["data=text", f"data.paths=['{url}']"])
    assert "hunter22" not in str(caught.value)


def test_unknown_kind_of_url_is_named(text_data):
    with pytest.raises(UserError, match=r"gopher://host/a: cannot be opened: Protocol not known: gopher"):
        list_files(text_data("gopher://host/a"))


def test_settings_take_urls(text_data):
    assert isinstance(text_data("s3://bucket/folder"), schema.DataConfig)
