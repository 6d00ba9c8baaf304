"""Shards that are printed by commands or lie at addresses, and the names that shards are given by."""

import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_data import CAPTIONS, good_tar, loader_of, png, processor, take, write_tar  # noqa: F401

from intermodal.data import web as web_files
from intermodal.data.patterns import braces, expand
from intermodal.data.readers import SourceError, open_source
from intermodal.data.source import Reject
from intermodal.data.stream import StreamSource, first_samples
from intermodal.data.talks import open_talks
from intermodal.data.tar_streams import samples_of
from intermodal.errors import SampleError


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """`x-000.tar` to `x-003.tar` of three samples each, in the working folder."""
    for number in range(4):
        good_tar(tmp_path / f"x-{number:03d}.tar", start=3 * number, count=3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(spec):
    """The first captions of a pass, in order, and the rejects."""
    found = list(first_samples(open_source(spec), None))
    rejects = [one for one in found if isinstance(one, Reject)]
    return sorted(one.texts[0] for one in found if not isinstance(one, Reject)), rejects


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:cat x-{000..003}.tar",
        "pipe:cat x-{000,001}.tar::pipe:gzip -c < x-{002..003}.tar",
        "x-{000..001}.tar::pipe:cat x-002.tar | cat::x-003.tar",
        "pipe:cat x-{000..003}.tar; yes",  # what comes after the end mark is not waited for
    ],
)
def test_commands_print_shards(shards, spec):
    assert read(spec) == (sorted(CAPTIONS), [])


@pytest.mark.parametrize(
    ("command", "samples", "said"),
    [
        ("cat x-000.tar; exit 3", 3, r"cannot be read after 3 samples: 'cat x-000.tar; exit 3' ended with status 3$"),
        ("cat none.tar", 0, r"after 0 samples: 'cat none.tar' ended with status 1: cat: none.tar: No such file"),
        ("head -c 2560 x-000.tar", 1, r"cut short or damaged after 1 samples: unexpected end of data"),
        ("head -c 2048 x-000.tar", 1, r"cut short or damaged after 1 samples: it ends without an end mark"),
        ("head -c 2560 x-000.tar; exit 4", 1, r"after 1 samples: .* ended with status 4"),
        ("true", 0, r"after 0 samples: it ends without an end mark"),
    ],
)
def test_a_command_that_fails_is_one_reject_beside_the_samples_before(shards, command, samples, said):
    texts, rejects = read(f"pipe:{command}::x-003.tar")
    assert texts == sorted([*CAPTIONS[:samples], *CAPTIONS[9:]])
    (reject,) = rejects
    assert reject.key.endswith(f"pipe:{command}")
    assert re.search(said, reject.reason)
    if not samples:
        with pytest.raises(SampleError, match=f"no usable sample; the last reason: .*{said}"):
            open_source(f"pipe:{command}").next()


def test_members_of_a_printed_shard_are_read_as_those_of_a_file(tmp_path):
    parts = {
        "a/0": {"PNG": png(0), "txt": b"one\n\n two ", "json": b'{"caption": "not this"}'},
        "a/1": {"jpg": png(1), "en.txt": b"a cat", "de.txt": b"eine Katze"},
        "a/2": {"png": png(2), "json": json.dumps({"caption": {"en": "a dog", "de": "ein Hund"}}).encode()},
        "b/2": {"png": b"no picture", "txt": b"words"},
        "b/3": {"png": png(3), "cls": b"1"},
        "b/4": {"png": png(3), "json": b"{"},
    }
    file = write_tar(tmp_path / "x.tar", parts)
    wanted = [open_source(str(file))[n].texts for n in range(3)]
    found = list(first_samples(open_source(f"pipe:cat {file}"), None))
    assert sorted(one.texts for one in found if not isinstance(one, Reject)) == sorted(wanted)
    reasons = [one.reason.removeprefix(f"pipe:cat {file}/") for one in found if isinstance(one, Reject)]
    for reason, said in zip(
        reasons, ("cannot read the picture", "b/3: no caption in its members (.png, .cls);", "b/4.json: not JSON"), strict=True
    ):
        assert reason.startswith(said)
    assert [one.key.split(":pipe:")[1] for one in found if isinstance(one, Reject)] == [f"cat {file}/b/{n}" for n in (2, 3, 4)]
    named = open_source(f"pipe:cat {file}", classes=["red", "blue"])
    assert ["blue"] in [one.texts for one in first_samples(named, None) if not isinstance(one, Reject)]


def test_printed_shards_are_split_over_ranks_shuffled_and_resumed(shards, tmp_path, processor):  # noqa: F811
    spec = "pipe:cat x-{000..003}.tar"
    parts = []
    for rank in range(2):
        stream = open_source(spec)
        stream.split(rank, 2)
        parts.append([stream.next().texts[0] for _ in range(6)])
    assert sorted(parts[0] + parts[1]) == sorted(CAPTIONS)
    assert all(part != sorted(part, key=CAPTIONS.index) for part in parts)

    def keys(loader, count):
        return [key for batch in take(loader, count) for key in batch.keys]

    whole = keys(loader_of([spec], processor, tmp_path, workers=1), 7)
    first = loader_of([spec], processor, tmp_path, workers=1)
    keys(first, 2)
    second = loader_of([spec], processor, tmp_path)
    second.restore([json.loads(json.dumps(first.state()))])
    assert keys(second, 5) == whole[8:]


def test_a_command_does_not_outlive_its_stream(shards):
    """Nor what it has started: it is of a session of its own, which Ctrl-C does not reach."""
    records = samples_of(["pipe:cat x-000.tar x-001.tar; sleep 100 & echo $! > pid; cat x-002.tar; wait"])
    next(records)
    while not (shards / "pid").exists() or not (pid := (shards / "pid").read_text().strip()):
        time.sleep(0.01)
    assert os.getpgid(int(pid)) != os.getpgid(0)
    records.close()
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def web(shards, monkeypatch):
    """The folder of `shards` on a server, which breaks off in the midst of `broken.tar`, of `drops.tar` after every 2,560 bytes, and says
    once of `busy.tar` to come back; what it was asked for is in `server.asked`. `swapped.tar` is another file each time."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = unquote(urlsplit(self.path).path).strip("/")
            self.server.asked.append((name, self.headers["Range"]))
            file = shards / re.sub("^(broken|drops|busy|swapped)", "x-000", name)
            busy = self.server.asked == [("busy.tar", None)]
            data = file.read_bytes() if file.is_file() and not busy else b""
            tag = f'"{name}{len(self.server.asked) * name.startswith("swapped")}"'
            begin = int(self.headers["Range"][6:-1]) if self.headers["Range"] and self.headers["If-Range"] == tag else 0
            self.send_response(206 if begin else 200 if data else 503 if busy else 404)
            self.send_header("Content-Length", str(len(data) - begin))
            if name != "broken.tar":
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(data[begin:][: 2560 if name.startswith(("broken", "drops", "swapped")) else None])

        def log_message(self, *words):
            pass

    monkeypatch.setattr(web_files, "PAUSES", (0, 0, 0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", server.asked
    server.shutdown()
    server.server_close()


def test_shards_at_addresses(web):
    at, _ = web
    assert read(f"{at}/x-{{000..003}}.tar?key=secret") == (sorted(CAPTIONS), [])
    texts, rejects = read(f"{at}/x-{{000,gone}}.tar?key=secret::{at}/broken.tar")
    assert texts == sorted([*CAPTIONS[:3], CAPTIONS[0]])
    assert [reject.key.rpartition(":")[2] for reject in rejects] == ["x-gone.tar", "broken.tar"]
    assert rejects[0].reason == "cannot be read after 0 samples: HTTP Error 404: Not Found"
    assert rejects[1].reason.startswith("cannot be read after 1 samples: the connection ended after 2,560 of")
    assert not any("secret" in reject.key for reject in rejects)
    assert open_source(f"{at}/x-000.tar").name == "x-000.tar"


def test_the_rest_is_asked_for_where_a_connection_drops(web):
    """As often as it does, and only the rest; but not of a file that has changed meanwhile."""
    at, asked = web
    assert [record["txt"].decode() for record in samples_of([f"{at}/drops.tar"])] == CAPTIONS[:3]
    assert asked == [
        ("drops.tar", None),
        ("drops.tar", "bytes=2560-"),
        ("drops.tar", "bytes=5120-"),
    ]  # its end mark is in these
    texts, rejects = read(f"{at}/swapped.tar::{at}/x-001.tar")
    assert texts == [*CAPTIONS[:1], *CAPTIONS[3:6]]
    assert rejects[0].reason.startswith("cannot be read after 1 samples: the connection ended after 2,560 bytes, and the server")


def test_a_server_that_is_busy_is_asked_again(web):
    at, asked = web
    assert [record["txt"].decode() for record in samples_of([f"{at}/busy.tar"])] == CAPTIONS[:3]
    assert asked == [("busy.tar", None)] * 2


def test_an_address_through_fsspec(shards):
    """Here of its file system in memory: s3fs and gcsfs are the same to it."""
    import fsspec

    for number in range(2):
        with fsspec.open(f"memory://b/x-{number}.tar", "wb") as file:
            file.write((shards / f"x-{number:03d}.tar").read_bytes())
    texts, rejects = read("memory://b/x-{0..2}.tar")
    assert texts == sorted(CAPTIONS[:6])
    assert "x-2.tar" in rejects[0].key


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("s3://b/x-{000..003}.tar", r"s3:// needs the package s3fs \(pip install s3fs\)"),
        ("gs://b/x.tar", r"gs:// needs the package gcsfs \(pip install gcsfs\)"),
        ("nope://b/x.tar", "Protocol not known: nope; read are pipe:COMMAND"),
        ("https://b/x.parquet", "only tar shards are streamed"),
        ("pipe:cat x.tar::", "one of the names joined by :: is empty"),
        ("pipe:cat x.tar::none.tar", r"none\.tar: no such file"),
    ],
)
def test_what_cannot_be_streamed_is_told_at_once(spec, said, monkeypatch):
    for package in ("s3fs", "gcsfs"):  # wherever they are installed
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=said):
        open_source(spec)


def test_conversations_from_printed_shards(shards):
    talks = open_talks("captions:pipe:cat x-{000..001}.tar")
    assert isinstance(talks, StreamSource)
    assert sorted(talks.next().messages[1]["content"] for _ in range(6)) == sorted(CAPTIONS[:6])


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("{000,001}.tar", "000.tar 001.tar"),
        ("x-{08..10}", "x-08 x-09 x-10"),
        ("{8..010}", "008 009 010"),
        ("{0..10..5}", "0 5 10"),
        ("{3..1}{a..c..2}", "3a 3c 2a 2c 1a 1c"),
        ("{a,b{1,2}}/{}", "a/{} b1/{} b2/{}"),
        ("awk '{print}' {x,y}", "awk '{print}' x|awk '{print}' y"),
        ("{{1,2}}", "{1} {2}"),
        ("{a,}b{", "ab{ b{"),
    ],
)
def test_braces_are_expanded_as_a_shell_does(pattern, wanted):
    assert braces(pattern) == wanted.split("|" if "|" in wanted else " ")


def test_files_of_a_list_in_braces_and_a_file_with_braces_in_its_name(shards):
    assert [file.name for file in expand("x-{000,002}.tar")] == ["x-000.tar", "x-002.tar"]
    assert [file.name for file in expand("{x-00{3,1},x-000}.tar")] == ["x-003.tar", "x-001.tar", "x-000.tar"]
    assert [file.name for file in expand("::".join(["x-001.tar"] * 500))] == ["x-001.tar"] * 500
    assert open_source("::".join(["pipe:cat x-001.tar"] * 500)).dataset.num_shards == 500
    os.rename("x-000.tar", "{a,b}::*.tar")
    assert len(open_source("{a,b}::*.tar")) == 3


def test_a_folder_of_shards_says_how_they_are_named(shards):
    with pytest.raises(SourceError, match=rf"holds no pictures .*; for the tar shards in it write {shards}/\*\.tar"):
        open_source(str(shards))
