"""Readers on good and damaged files, the global order, rejects."""

import base64
import csv
import gzip
import io
import json
import os
import pickle
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from intermodal.data import tar_index
from intermodal.data.hub import pair_of
from intermodal.data.loader import DataError, Fetcher, Loader, Mixture, Rejects
from intermodal.data.preview import contact_sheet, describe
from intermodal.data.readers import SourceError, open_source
from intermodal.data.records import fetch
from intermodal.data.source import Reject, Sample
from intermodal.data.stream import StreamSource, first_samples
from intermodal.errors import IntermodalError, SampleError
from intermodal.evaluate.baselines import caption_baselines
from intermodal.inputs.image import ImageProcessor, open_image
from intermodal.inputs.processor import PairProcessor
from intermodal.inputs.text import fresh, train_tokenizer

CAPTIONS = [f"picture number {n}" for n in range(12)]


def png(n, size=(9, 7)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (n * 20 % 256, 100, 50)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, samples):
    with tarfile.open(path, "w") as archive:
        for key, parts in samples.items():
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def good_tar(path, start=0, count=6):
    return write_tar(path, {f"{n:04d}": {"png": png(n), "txt": CAPTIONS[n].encode()} for n in range(start, start + count)})


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Indexes of shards are kept in a folder of the test, also those of few samples."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INTERMODAL_CACHE", str(folder))
    monkeypatch.setattr(tar_index, "LEAST_KEPT", 1)
    return folder / "tar-index"


@pytest.fixture
def processor():
    return PairProcessor(ImageProcessor((8, 8)), fresh(train_tokenizer(CAPTIONS, 80), "siglip", context=6), "siglip")


def loader_of(specs, processor, tmp_path, batch=4, weights=None, rank=0, ranks=1, share=0.5, **more):
    mixture = Mixture([open_source(str(spec), side=8) for spec in specs], weights, seed=3)
    rejects = Rejects(tmp_path / "rejects.jsonl", share)
    fetcher = Fetcher(mixture.sources, processor, mixture.seed)
    return Loader(mixture, fetcher, batch=batch, rank=rank, ranks=ranks, rejects=rejects, **more)


def take(loader, count):
    batches = iter(loader)
    return [next(batches).batch for _ in range(count)]


def test_tar_shards_by_pattern(tmp_path):
    good_tar(tmp_path / "a-000.tar")
    good_tar(tmp_path / "a-001.tar", start=6)
    source = open_source(str(tmp_path / "a-{000..001}.tar"))
    assert len(source) == 12
    assert [source[n].texts for n in (0, 7)] == [[CAPTIONS[0]], [CAPTIONS[7]]]
    assert source[7].key == "a-001.tar/0007"
    assert len(open_source(str(tmp_path / "a-*.tar"))) == 12


def test_several_patterns_joined_by_two_colons(tmp_path):
    """For every kind of file, in the order that they are named in; of each the paths are relative to its own folder."""
    for folder, start in (("b", 0), ("a", 6)):
        (tmp_path / folder).mkdir()
        good_tar(tmp_path / folder / "00.tar", start, 3)
        good_tar(tmp_path / folder / "01.tar", start + 3, 3)
        records = [{"image_path": "x.png", "caption": CAPTIONS[start + n]} for n in range(2)]
        (tmp_path / folder / "x.png").write_bytes(png(start))
        (tmp_path / folder / "t.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        Dataset.from_list(records).to_parquet(tmp_path / folder / "t.parquet")
    tars = open_source(f"{tmp_path}/b/{{00..01}}.tar::{tmp_path}/a/*.tar")
    assert [tars[n].texts for n in range(12)] == [[caption] for caption in CAPTIONS]
    for kind in ("jsonl", "parquet"):
        tables = open_source(f"{tmp_path}/b/t.{kind}::{tmp_path}/a/t.{kind}?text=caption")
        assert [tables[n].texts[0] for n in range(4)] == [CAPTIONS[n] for n in (0, 1, 6, 7)], kind
        assert [open_image(tables[n].image).getpixel((0, 0))[0] for n in range(4)] == [0, 0, 120, 120], kind
    for spec, words in (
        (f"{tmp_path}/b/00.tar::{tmp_path}/c/00.tar", "c/00.tar: no such file"),
        (f"{tmp_path}/b/00.tar::{tmp_path}/c/*.tar", r"c/\*.tar: no such file"),
        (f"{tmp_path}/b/00.tar::", "one of the names joined by :: is empty"),
        (f"{tmp_path}/b::{tmp_path}/a", "b is a folder, and only files"),
        (f"{tmp_path}/b/00.tar::{tmp_path}/a/t.jsonl", "files of several kinds"),
    ):
        with pytest.raises(SourceError, match=words):
            open_source(spec)


def strange_tar(path, form):
    """Names that are long, not of ASCII, in folders; members apart from the rest of their sample, twice, of no bytes, and no files."""
    with tarfile.open(path, "w", format=form) as archive:
        names = [
            "a.png",
            "f/b.c/1.PNG",
            "a.txt",
            "f/b.c/1.en.txt",
            "a.png",
            "empty.txt",
            ".hidden",
            "bare",
            "größe/ü.png",
            "ü.é.txt",
        ]
        names += [f"{'d' * 60}/{'k' * 90}.png", f"{'d' * 60}/{'k' * 90}.txt"]
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 0 if name == "empty.txt" else 1 + 300 * number
            archive.addfile(member, io.BytesIO(bytes([number]) * member.size))
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
                other = tarfile.TarInfo(f"other{number}")
                other.type, other.linkname = kind, name[:50]
                archive.addfile(other)
    return path


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("headers", [{}, {"comment": "of the whole archive"}])
def test_a_tar_is_indexed_as_tarfile_reads_it(tmp_path, form, headers, monkeypatch):
    path = strange_tar(tmp_path / "x.tar", form)
    if headers:
        made = tarfile.TarInfo.create_pax_global_header(headers)
        path.write_bytes(made + path.read_bytes())
    wanted: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            folder, _, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if member.isfile():
                key = f"{folder}/{stem}" if folder else stem
                wanted.setdefault(key, {})[suffix.lower()] = (member.offset_data, member.size)
    index = tar_index.scan(path)
    assert index.problem is None
    found = {index.keys[number]: index.parts(number) for number in range(len(index))}
    assert {key: list(parts.items()) for key, parts in found.items()} == {key: list(parts.items()) for key, parts in wanted.items()}
    assert list(found) == list(wanted)
    monkeypatch.setattr(tar_index, "_plain", lambda header: None)
    slow = tar_index.scan(path)
    assert all(np.array_equal(array, slow.arrays()[name]) for name, array in index.arrays().items())


def refuse_to_scan(file):
    raise AssertionError(f"{file} was scanned again")


def contents(source):
    return [(sample.key, bytes(sample.image), sample.texts) for sample in (source[n] for n in range(len(source)))]


def test_an_index_is_kept_until_its_shard_changes(tmp_path, cache, monkeypatch):
    for shard in range(3):
        good_tar(tmp_path / f"{shard}.tar", start=3 * shard, count=3)
    names = sorted(tmp_path.iterdir())
    first = contents(open_source(f"{tmp_path}/*.tar"))
    assert sorted(tmp_path.iterdir()) == names  # nothing is left beside the shards
    assert len(list(cache.iterdir())) == 3
    with monkeypatch.context() as patched:
        patched.setattr(tar_index, "scan", refuse_to_scan)
        again = open_source(f"{tmp_path}/*.tar")
        assert contents(again) == contents(pickle.loads(pickle.dumps(again))) == first
        monkeypatch.chdir(tmp_path)
        assert contents(open_source("{0..2}.tar")) == first
    # another time of change, another size, another format
    before = (tmp_path / "1.tar").stat()
    os.utime(tmp_path / "1.tar", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    good_tar(tmp_path / "2.tar", start=6, count=6)
    scanned, scan = [], tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda file: (scanned.append(file.name), scan(file))[1])
    assert [key for key, _, _ in contents(open_source(f"{tmp_path}/*.tar"))][-1] == "2.tar/0011"
    assert sorted(scanned) == ["1.tar", "2.tar"]
    monkeypatch.setattr(tar_index, "FORMAT", tar_index.FORMAT + 1)
    open_source(f"{tmp_path}/*.tar")
    assert len(scanned) == 5
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_index_is_made_anew(tmp_path, cache, monkeypatch, damage):
    path = good_tar(tmp_path / "a.tar")
    wanted = contents(open_source(str(path)))
    (kept,) = cache.iterdir()
    data = kept.read_bytes()
    offset = data.index(tar_index.scan(path).offset.tobytes())
    flipped = data[: offset + 1] + bytes([data[offset + 1] ^ 1]) + data[offset + 2 :]
    kept.write_bytes({"cut": data[: len(data) // 2], "flipped": flipped, "empty": b"", "other": pickle.dumps([1])}[damage])
    assert contents(open_source(str(path))) == wanted
    assert kept.read_bytes() == data
    monkeypatch.setattr(tar_index, "scan", refuse_to_scan)
    assert contents(open_source(str(path))) == wanted


def test_no_index_is_kept_of_a_shard_that_is_damaged_small_or_written_meanwhile(tmp_path, cache, monkeypatch):
    whole = good_tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 3 * 4 * 512])
    assert [len(open_source(f"{tmp_path}/cut.tar")) for _ in range(2)] == [3, 3]
    assert not cache.exists()
    (tmp_path / "cut.tar").write_bytes(whole)  # it is there to its end by now
    assert not open_source(f"{tmp_path}/cut.tar").problems
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tar_index, "LEAST_KEPT", 7)
    open_source(f"{tmp_path}/a.tar")
    monkeypatch.setattr(tar_index, "LEAST_KEPT", 6)
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda file: (scan(file), os.utime(file, (1, 1)))[0])
    open_source(f"{tmp_path}/a.tar")
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("place", ["/proc/nowhere", "file", "no home"])
def test_where_no_index_can_be_kept_a_shard_is_read_all_the_same(tmp_path, monkeypatch, place):
    path = good_tar(tmp_path / "a.tar")
    (tmp_path / "file").write_text("no folder")
    if place == "no home":
        monkeypatch.setattr(tar_index, "cache_folder", lambda: Path("~nobody-of-this-name/.cache").expanduser())
    else:
        monkeypatch.setenv("INTERMODAL_CACHE", str(tmp_path / place))
    for _ in range(2):
        assert len(contents(open_source(str(path)))) == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "file"]


def test_a_write_that_fails_leaves_the_index_that_was_there(tmp_path, cache, monkeypatch):
    path = good_tar(tmp_path / "a.tar")
    open_source(str(path))
    (kept,) = cache.iterdir()
    data = kept.read_bytes()
    os.utime(path, (1, 1))

    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tar_index.np, "savez", full)
    assert len(open_source(str(path))) == 6
    assert [file.read_bytes() for file in cache.iterdir()] == [data]


def test_an_index_takes_few_bytes_a_sample(tmp_path, cache):
    """Pictures, captions and JSON of 2,000 samples with keys of nine letters; a Python dict of tuples takes 700 bytes and more for each."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(2000):
            for suffix, size in (("jpg", 700), ("txt", 40), ("json", 300)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = size
                archive.addfile(member, io.BytesIO(bytes(size)))
    for _ in range(2):  # scanned, then kept
        (index,) = open_source(f"{tmp_path}/a.tar").shards
        arrays = index.arrays().values()
        assert all(isinstance(array, np.ndarray) and array.dtype.kind == "u" for array in arrays)
        assert sum(array.nbytes for array in arrays) < 50 * len(index)
        assert len(pickle.dumps(index)) < 50 * len(index) + 2000
    (kept,) = cache.iterdir()
    assert kept.stat().st_size < 50 * len(index) + 4000


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_of_a_machine_begin_at_other_shards_and_read_the_same(tmp_path, monkeypatch, rank):
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", {"0": {"png": png(shard), "txt": b"words %d" % shard}})
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    asked, index = [], tar_index.shard_index
    monkeypatch.setattr(tar_index, "THREADS", 1)
    monkeypatch.setattr(tar_index, "shard_index", lambda file: (asked.append(int(file.stem)), index(file))[1])
    source = open_source(f"{tmp_path}/*.tar")
    assert asked == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [3, 4, 0, 1, 2]][rank]
    assert [source[n].texts for n in range(5)] == [[f"words {n}"] for n in range(5)]


def test_a_tar_source_is_numbered_as_a_list_is(tmp_path):
    good_tar(tmp_path / "a.tar", count=2)
    write_tar(tmp_path / "b.tar", {})  # of the shards one may be empty
    good_tar(tmp_path / "c.tar", start=2, count=2)
    source = open_source(f"{tmp_path}/*.tar")
    assert [sample.key for sample in source] == ["a.tar/0000", "a.tar/0001", "c.tar/0002", "c.tar/0003"]
    assert source[-1].key == "c.tar/0003"
    with pytest.raises(IndexError):
        source[4]


def test_json_captions_and_missing_parts_in_a_tar(tmp_path):
    parts = {
        "a": {"png": png(1), "json": json.dumps({"caption": "from json"}).encode()},
        "b": {"txt": b"no picture"},
        "c": {"png": png(2)},
        "d": {"png": png(2), "json": b"{broken"},
    }
    source = open_source(str(write_tar(tmp_path / "x.tar", parts)))
    assert source[0].texts == ["from json"]
    for index, reason in ((1, "no picture"), (2, "no caption"), (3, "not JSON")):
        with pytest.raises(SampleError, match=reason):
            source[index]


@pytest.mark.parametrize("cut", [0.5, 0.8])
def test_truncated_tar_gives_what_is_whole_and_names_the_shard(tmp_path, cut):
    data = good_tar(tmp_path / "whole.tar").read_bytes()
    used = 6 * 4 * 512  # a header and a block for each of six pictures and captions; the rest of the file is padding
    (tmp_path / "cut.tar").write_bytes(data[: int(used * cut) - 300])
    source = open_source(str(tmp_path / "cut.tar"))
    assert 0 < len(source) < 6
    assert len(source.problems) == 1
    assert "cut.tar" in source.problems[0][0]
    assert "cut short" in source.problems[0][1]


def test_jsonl_csv_and_parquet_read_the_same(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    with (tmp_path / "t.jsonl").open("w") as file:
        file.writelines(json.dumps({"file_name": f"{n}.png", "caption": CAPTIONS[n]}) + "\n" for n in range(4))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filepath", "title"])
        rows.writerows([f"{n}.png", CAPTIONS[n]] for n in range(4))
    records = [{"image": {"bytes": png(n), "path": None}, "text": CAPTIONS[n]} for n in range(4)]
    Dataset.from_list(records).cast_column("image", ImageFeature()).to_parquet(tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        source = open_source(str(tmp_path / name))
        assert [source[n].texts[0] for n in range(4)] == CAPTIONS[:4], name
        assert open_image(source[2].image).getpixel((0, 0)) == (40, 100, 50), name


def test_named_columns_and_bad_lines(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "t.jsonl").write_text(
        '{"pic": "0.png", "words": ["one", "two"]}\n{broken\n{"pic": "0.png"}\n{"pic": "no.png", "words": "x"}\n'
    )
    source = open_source(f"{tmp_path / 't.jsonl'}?image=pic&text=words")
    assert source[0].texts == ["one", "two"]
    with pytest.raises(SampleError, match="not JSON"):
        source[1]
    with pytest.raises(SampleError, match="no caption column among pic"):
        source[2]


def test_addresses_are_off_by_default(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"url": "http://example.invalid/a.png", "caption": "x"}\n')
    with pytest.raises(SampleError, match="allow_urls"):
        open_source(str(tmp_path / "t.jsonl"))[0]


@pytest.fixture
def web():
    """A server of pictures: /0.png to /5.png, anything else is not there."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.strip("/").partition(".")[0]
            found = name.isdigit() and int(name) < 6
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                self.wfile.write(png(int(name)))

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub"])
def test_addresses_and_data_uris_are_read_where_they_are_allowed(tmp_path, web, kind):
    inline = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    records = [{"pic": f"{web}/{n}.png", "words": CAPTIONS[n]} for n in (0, 1)]
    records += [{"pic": inline, "words": CAPTIONS[2]}, {"pic": f"{web}/gone.png", "words": "gone"}]
    file = tmp_path / f"t.{'jsonl' if kind == 'hub' else kind}"
    if kind == "csv":
        with file.open("w", newline="") as lines:
            rows = csv.DictWriter(lines, ["pic", "words"])
            rows.writeheader()
            rows.writerows(records)
    elif kind == "parquet":
        Dataset.from_list(records).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    if kind == "hub":
        stream = open_source(f"hf:{tmp_path}?image=pic&text=words", allow_urls=True)
        found = {sample.texts[0]: open_image(sample.image) for sample in (stream.next() for _ in range(3))}
        rejects = [reject.reason for reject in stream.take_rejects()]
    else:
        source = open_source(f"{file}?image=pic&text=words", allow_urls=True)
        found, rejects = {}, []
        for index in range(len(source)):
            try:
                sample = source[index]
                found[sample.texts[0]] = open_image(sample.image)
            except SampleError as error:
                rejects.append(str(error))
    assert {text: image.getpixel((0, 0))[0] for text, image in found.items()} == {CAPTIONS[n]: n * 20 for n in range(3)}
    assert len(rejects) == 1
    assert "gone.png" in rejects[0]
    assert "404" in rejects[0]


def test_conversations_from_addresses(tmp_path, web):
    from intermodal.data.talks import open_talks

    (tmp_path / "t.jsonl").write_text(json.dumps({"pic": f"{web}/1.png", "words": "one"}) + "\n")
    for spec in (f"captions:{tmp_path / 't.jsonl'}?image=pic&text=words", f"captions:hf:{tmp_path}?image=pic&text=words"):
        talks = open_talks(spec, allow_urls=True)
        talk = talks.next() if isinstance(talks, StreamSource) else talks[0]
        assert open_image(talk.messages[0]["content"][0]["image"]).getpixel((0, 0)) == (20, 100, 50)
        assert talk.messages[1]["content"] == "one"
        refused = open_talks(spec)
        with pytest.raises(SampleError, match=r"allow_urls|no usable sample"):
            _ = refused.next() if isinstance(refused, StreamSource) else refused[0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_table_of_paths(tmp_path, kind):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "3.png").write_bytes(png(3))
    record = {"image_path": "pics/3.png", "caption": "three"}
    if kind == "parquet":
        Dataset.from_list([record]).to_parquet(tmp_path / "t.parquet")
    else:
        (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n")
    sample = open_source(str(tmp_path / f"t.{kind}"))[0]
    assert open_image(sample.image).getpixel((0, 0)) == (60, 100, 50)


def test_a_table_has_no_other_settings(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(SourceError, match="'imag', did you mean 'image'"):
        open_source(f"{tmp_path / 't.jsonl'}?imag=a")


def test_folder_captions_by_metadata_by_file_and_by_folder_name(tmp_path):
    (tmp_path / "red_fox").mkdir()
    for name in ("a.png", "b.png", "red_fox/c.png", "lonely.png"):
        (tmp_path / name).write_bytes(png(1))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "from metadata"}\n')
    (tmp_path / "b.txt").write_text("first\nsecond\n")
    source = open_source(str(tmp_path))
    found = {"rejected": []}
    for index in range(len(source)):
        try:
            sample = source[index]
            found[sample.key.rpartition("/")[2]] = sample.texts
        except SampleError as error:
            found["rejected"].append(str(error).partition(":")[0])
    assert found == {"a.png": ["from metadata"], "b.png": ["first", "second"], "rejected": ["lonely.png", "red_fox/c.png"]}
    (tmp_path / "metadata.jsonl").unlink()
    assert [open_source(str(tmp_path)).captions_at(index) for index in (1, 3)] == [["first", "second"], ["red fox"]]


def test_sources_that_do_not_open_say_why(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    for spec, words in [
        ("nothing/here.tar", "no such file"),
        (str(tmp_path / "a.tar.gz"), "unpack it"),
        (str(tmp_path / "a.parquet"), "not readable as parquet"),
        ("scenes:cor", "did you mean 'core'"),
        ("scenes:core?pair_shar=1", "did you mean 'pair_share'"),
        (str(tmp_path / "a-{00..02}.tar"), "3 missing"),
    ]:
        with pytest.raises(Exception, match=words.replace("?", r"\?")) as caught:
            open_source(spec)
        assert isinstance(caught.value, SourceError) or "pair_shar" in spec


def test_rejects_are_replaced_counted_and_named_once(tmp_path, processor):
    samples = {f"{n:04d}": {"png": png(n), "txt": CAPTIONS[n].encode()} for n in range(12)}
    samples["0003"]["png"] = b"not a picture"
    samples["0007"]["txt"] = b"   "
    write_tar(tmp_path / "x.tar", samples)
    loader = loader_of([tmp_path / "x.tar"], processor, tmp_path)
    batches = take(loader, 9)  # three epochs of twelve
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 36
    assert not {"x.tar/0003", "x.tar/0007"} & set(keys)
    named = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(named) == 2
    assert loader.rejects.rejected >= 6
    assert {n["key"]: n["reason"][:12] for n in named} == {"x.tar/3": "cannot read ", "x.tar/7": "x.tar/0007: "}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_counts_its_rejects_on_and_names_none_twice(tmp_path, processor, workers):
    samples = {f"{n:04d}": {"png": png(n), "txt": CAPTIONS[n].encode()} for n in range(12)}
    samples["0003"]["png"] = samples["0008"]["png"] = b"not a picture"
    write_tar(tmp_path / "x.tar", samples)

    def made():
        return loader_of([tmp_path / "x.tar"], processor, tmp_path, workers=workers)

    first = made()
    take(first, 4)
    state = json.loads(json.dumps(first.state()))
    resumed = made()
    resumed.restore([state])
    take(resumed, 5)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 2
    (tmp_path / "rejects.jsonl").unlink()
    whole = made()
    take(whole, 9)
    assert (whole.rejects.read, whole.rejects.rejected) == (resumed.rejects.read, resumed.rejects.rejected)
    assert whole.rejects.rejected >= 6
    # on another number of ranks the first goes on counting for all
    two = [loader_of([tmp_path / "x.tar"], processor, tmp_path, rank=rank, ranks=2) for rank in range(2)]
    for loader in two:
        loader.restore([state, state, state])
    assert [loader.rejects.read for loader in two] == [3 * state["rejects"][0], 0]


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_stream_counts_its_rejects_once(tmp_path, processor, at, workers):
    def made():
        mixture = Mixture([stream_of(tmp_path)], seed=3)
        rejects = Rejects(tmp_path / "rejects.jsonl", 0.5)
        return Loader(mixture, Fetcher(mixture.sources, processor, 3), batch=2, rejects=rejects, workers=workers)

    first = made()
    take(first, at)
    second = made()
    second.restore([json.loads(json.dumps(first.state()))])
    take(second, 9 - at)
    named = [json.loads(line)["key"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert named == ["stream/7"]
    whole = made()
    take(whole, 9)
    assert (second.rejects.read, second.rejects.rejected) == (whole.rejects.read, whole.rejects.rejected)
    assert whole.rejects.rejected == 2  # two passes


@pytest.mark.parametrize("every", [1, 5])
def test_streams_count_the_same_however_often_a_run_is_resumed(tmp_path, processor, every):
    """One stream is seldom drawn: it may be saved again before it was read since the resume."""
    folders = [tmp_path / name for name in ("a", "b")]

    def made():
        streams = []
        for folder in folders:
            folder.mkdir(exist_ok=True)
            streams.append(stream_of(folder))
        return Loader(Mixture(streams, (0.95, 0.05), seed=3), Fetcher(streams, processor, 3), batch=2, rejects=Rejects(None, 1.0))

    whole = made()
    take(whole, 20)
    state, parts = None, 0
    while parts < 20:
        loader = made()
        if state is not None:
            loader.restore([state])
        take(loader, every)
        state, parts = json.loads(json.dumps(loader.state())), parts + every
    assert state["rejects"] == [whole.rejects.read, whole.rejects.rejected]


def test_what_looked_at_a_stream_before_a_run_counts_for_nothing(tmp_path):
    stream = stream_of(tmp_path)
    for _ in range(9):
        stream.next()
    stream.split(0, 1)
    assert stream.take_rejects() == []


def test_a_line_that_was_cut_in_the_list_of_rejects_does_not_stop_a_resume(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"key": "a", "reason": "x"}\n{"key": "b", "rea')
    rejects = Rejects(tmp_path / "r.jsonl", 0.5)
    assert rejects.seen == {"a"}
    rejects.note("b", "y")
    assert [json.loads(line)["key"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == ["a", "b"]


def test_too_many_rejects_stop_the_run(tmp_path, processor):
    samples = {f"{n:04d}": {"png": png(n) if n % 2 else b"bad", "txt": b"words"} for n in range(12)}
    write_tar(tmp_path / "x.tar", samples)
    with pytest.raises(DataError, match=r"more than data.max_reject_share=0.05.*rejects.jsonl"):
        take(loader_of([tmp_path / "x.tar"], processor, tmp_path, batch=64, share=0.05), 4)


def test_a_source_with_nothing_usable_stops(tmp_path, processor):
    write_tar(tmp_path / "x.tar", {"a": {"png": b"bad", "txt": b"words"}})
    with pytest.raises(DataError, match="in a row were unusable"):
        take(loader_of([tmp_path / "x.tar"], processor, tmp_path), 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_mid_epoch_is_exact(tmp_path, processor, workers):
    good_tar(tmp_path / "a.tar", count=7)
    specs, weights = [tmp_path / "a.tar", "sprites:core", "scenes:core"], (1.0, 2.0, 1.5)
    whole = take(loader_of(specs, processor, tmp_path, weights=weights, workers=workers), 9)
    first = loader_of(specs, processor, tmp_path, weights=weights, workers=workers)
    take(first, 4)
    state = json.loads(json.dumps(first.state()))
    second = loader_of(specs, processor, tmp_path, weights=weights, workers=workers)
    second.restore([state])
    for resumed, wanted in zip(take(second, 5), whole[4:], strict=True):
        assert resumed.keys == wanted.keys
        assert torch.equal(resumed.images.pixels, wanted.images.pixels)
        assert torch.equal(resumed.texts.ids, wanted.texts.ids)


def test_ranks_see_the_slices_of_one_global_batch(tmp_path, processor):
    good_tar(tmp_path / "a.tar", count=12)
    whole = take(loader_of([tmp_path / "a.tar"], processor, tmp_path), 5)
    ranks = [take(loader_of([tmp_path / "a.tar"], processor, tmp_path, rank=r, ranks=2), 5) for r in (0, 1)]
    for step, batch in enumerate(whole):
        assert ranks[0][step].keys + ranks[1][step].keys == batch.keys
        assert torch.equal(torch.cat([ranks[0][step].texts.ids, ranks[1][step].texts.ids]), batch.texts.ids)


def test_an_epoch_sees_every_sample_once_in_a_new_order(tmp_path, processor):
    good_tar(tmp_path / "a.tar", count=12)
    keys = [key for batch in take(loader_of([tmp_path / "a.tar"], processor, tmp_path), 6) for key in batch.keys]
    assert set(keys[:12]) == set(keys[12:]) == {f"a.tar/{n:04d}" for n in range(12)}
    assert keys[:12] != keys[12:]
    assert keys[:12] != sorted(keys[:12])


def test_weights_decide_the_share():
    mixture = Mixture([open_source("sprites:core", side=8), open_source("scenes:core", side=8)], (3.0, 1.0))
    drawn = [mixture.next()[0] for _ in range(2000)]
    assert 0.7 < drawn.count(0) / 2000 < 0.8
    with pytest.raises(DataError, match="weights is needed"):
        Mixture([open_source("sprites:core"), open_source("scenes:core")])


def stream_of(tmp_path):
    from datasets import load_dataset

    for shard in range(2):
        with (tmp_path / f"s{shard}.jsonl").open("w") as file:
            for n in range(5):
                name = "missing.png" if (shard, n) == (1, 2) else f"{n}.png"
                (tmp_path / f"{n}.png").write_bytes(png(n))
                file.write(json.dumps({"image": str(tmp_path / name), "caption": f"shard {shard} record {n}"}) + "\n")
    files = [str(tmp_path / f"s{shard}.jsonl") for shard in range(2)]
    dataset = load_dataset("json", data_files=files, split="train", streaming=True)
    return StreamSource("stream", dataset, partial(pair_of, {}, False, None), block=4)


def test_ranks_share_a_stream_and_resume_only_on_as_many(tmp_path):
    """Every record of a pass goes to exactly one rank; a rank's state is of its own part."""
    parts = []
    for rank in range(2):
        stream = stream_of(tmp_path)
        stream.next()  # a tokenizer was counted from it: the run begins at the beginning all the same
        stream.split(rank, 2)
        count = 5 if rank == 0 else 4  # the second shard holds an unreadable record
        parts.append([stream.next().texts[0] for _ in range(count)])
        again = stream_of(tmp_path)
        again.split(rank, 2)
        for _ in range(3):
            again.next()
        resumed = stream_of(tmp_path)
        resumed.split(rank, 2)
        resumed.restore(json.loads(json.dumps(again.state())))
        assert [resumed.next().texts[0] for _ in range(count - 3)] == parts[-1][3:]
    assert sorted(parts[0] + parts[1]) == sorted(f"shard {s} record {n}" for s in range(2) for n in range(5) if (s, n) != (1, 2))
    with pytest.raises(IntermodalError, match="2 ranks"):
        stream_of(tmp_path).restore(again.state())


def test_streams_resume_exactly_and_count_rejects(tmp_path):
    whole = stream_of(tmp_path)
    texts = [whole.next().texts[0] for _ in range(30)]
    assert sorted(texts[:9]) == sorted(f"shard {s} record {n}" for s in range(2) for n in range(5) if (s, n) != (1, 2))
    assert any("missing.png" in reject.reason for reject in whole.take_rejects())
    again = stream_of(tmp_path)
    again.restore(whole.state())
    for _ in range(3):
        again.next()
    third = stream_of(tmp_path)
    third.restore(again.state())  # resumed, gone on, resumed once more
    assert [third.next().texts[0] for _ in range(5)] == [whole.next().texts[0] for _ in range(8)][3:]
    for at in (0, 3, 4, 9, 10, 17):
        first = stream_of(tmp_path)
        for _ in range(at):
            first.next()
        second = stream_of(tmp_path)
        second.restore(json.loads(json.dumps(first.state())))
        assert [second.next().texts[0] for _ in range(12)] == texts[at : at + 12], at


def test_packing_a_source_keeps_captions_and_names_what_is_unusable(tmp_path):
    from intermodal.data.pack import pack

    rows = [{"image": f"{n}.png", "captions": [f"one {n}", f"eins {n}"]} for n in range(4)]
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n, (90 + n, 30)))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pack(str(tmp_path / "t.jsonl"), tmp_path / "out" / "s.tar", 40, progress=False) == (3, 1)
    packed = open_source(str(tmp_path / "out" / "s.tar"))
    assert [packed[n].texts for n in range(3)] == [row["captions"] for row in rows[:3]]
    assert [Image.open(io.BytesIO(packed[n].image)).size for n in range(3)] == [(40, 13)] * 3
    assert "3.png" in (tmp_path / "out" / "s.rejects.jsonl").read_text()
    with pytest.raises(SourceError, match="--count"):
        pack("scenes:core", tmp_path / "x.tar", 40)
    assert pack("scenes:core", tmp_path / "x.tar", 32, 2, progress=False) == (2, 0)
    (tmp_path / "n.jsonl").write_text(json.dumps(rows[3]) + "\n")
    with pytest.raises(SourceError, match="nothing in"):
        pack(str(tmp_path / "n.jsonl"), tmp_path / "n.tar", 40, progress=False)


@pytest.mark.parametrize("address", ["http://no host/a.png", "http://[bad/a.png"])
def test_an_address_that_is_none_is_a_reject(address):
    with pytest.raises(SampleError, match=r"a\.png: "):
        fetch(address, True)


def test_stats_of_any_source_say_what_guessing_gives(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [("0.png", "a cat"), ("0.png", "a cat"), ("0.png", "a dog there"), ("gone.png", "a bus"), ("0.png", "a car")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in rows))
    found = describe(str(tmp_path / "t.jsonl"), 100, 8)
    assert (found["samples"], found["looked at"], found["unusable"], found["captions on several pictures"]) == (5, 5, 1, 1)
    guessing = next(value for name, value in found.items() if name.startswith("baselines"))
    assert guessing["chance"] == pytest.approx(1 / 3)
    assert guessing.keys() == {"chance", "most common", "text only", "nearest raw pixels", "bag of words"}
    assert found["words in a caption, mean"] == pytest.approx(9 / 4)
    assert any("gone.png" in reason for reason in found["reasons"])


def test_guessing_captions_from_pixels_and_from_words():
    """Two kinds of pictures that pixels tell apart, under captions whose words are the same: pixels know all, words half."""

    def sample(number: int) -> Sample:
        dark = number % 2 == 0
        ramp = np.linspace(0, 255, 40, dtype=np.uint8)[None, :, None].repeat(40, 0).repeat(3, 2)
        return Sample(str(number), ramp if dark else ramp[:, ::-1].copy(), ["a cat on a dog" if dark else "a dog on a cat"])

    found = caption_baselines([sample(number) for number in range(40)])
    assert (found["chance"], found["nearest raw pixels"], found["bag of words"]) == (0.5, 1.0, 0.5)
    assert 0.3 < found["most common"] < 0.7
    assert found["text only"] in (found["most common"], 1 - found["most common"])  # one of the two is said always
    rare = caption_baselines([Sample(str(n), sample(n).image, ["a cat", "x"] if n % 10 else ["a bus"]) for n in range(40)])
    assert rare["most common"] == rare["text only"] > 0.8
    assert rare["bag of words"] == 1.0


@pytest.mark.parametrize("spec", ["sprites:core", "signs?words=4"])
def test_stats_of_built_in_pictures_have_their_baselines(spec):
    found = describe(spec, 40, 24)
    guessing = next(value for name, value in found.items() if name.startswith("baselines: "))
    assert {"chance", "nearest raw pixels"} <= guessing.keys()
    assert ("baselines on single sprites of the held-out style" in found) == spec.startswith("sprites")


def test_stats_of_scenes_hold_every_baseline():
    found = describe("scenes:core", 30, 24)
    assert found["facts"]["concepts"] == 60
    assert sum(found["facts"]["relations"].values()) == 30
    scenes = found["baselines on held-out combinations"]
    assert set(scenes) == {"chance", "majority", "text_only", "bag_of_words", "raw_pixels"}
    assert scenes["chance"]["image_to_text_recall@1"] == pytest.approx(1 / 30)
    assert found["baselines on single sprites of the held-out style"]["chance"] == pytest.approx(1 / 60)


def test_a_stream_is_looked_at_once(tmp_path):
    """A hub split of fewer records than asked for is not read a second time."""
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    rows = [{"image": str(tmp_path / f"{n}.png"), "caption": f"number {n}"} for n in (0, 1, 9, 2)]
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(first_samples(open_source(f"hf:{tmp_path / 'shards'}"), 100))
    assert sorted(one.texts[0] for one in found if isinstance(one, Sample)) == ["number 0", "number 1", "number 2"]
    assert len([one for one in found if isinstance(one, Reject)]) == 1


def test_a_stream_gives_pictures_as_they_are_encoded(tmp_path):
    """Tried, so that what reaches a worker can be decoded there; in memory and on the way to it they are a tenth of their pixels."""
    (tmp_path / "shards").mkdir()
    parts = {f"00{n}": {"png": png(n) if n != 1 else png(n)[:45], "txt": b"words"} for n in range(3)}
    write_tar(tmp_path / "shards" / "x.tar", parts)
    stream = open_source(f"hf:{tmp_path / 'shards'}")
    samples = [stream.next() for _ in range(2)]
    assert {bytes(sample.image) for sample in samples} == {png(0), png(2)}
    assert {sample.image.name for sample in samples} == {sample.key for sample in samples}
    (reject,) = stream.take_rejects()
    assert reject.key.endswith("1:001")
    assert "cannot read the picture" in reject.reason


def test_a_stream_of_nothing_usable_and_shards_with_equal_keys(tmp_path):
    rows = [{"__key__": f"00{n}", "image": str(tmp_path / "gone.png"), "caption": "x"} for n in range(3)]
    (tmp_path / "shards").mkdir()
    for name in ("a", "b"):
        (tmp_path / "shards" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(first_samples(open_source(f"hf:{tmp_path / 'shards'}"), 100))
    assert len({reject.key for reject in found}) == len(found) == 6


@pytest.mark.parametrize("ranks", [1, 8])
def test_one_rank_counts_what_all_read_of_a_stream(ranks):
    """Two records in a hundred are bad. Where every rank reads a stream whole, the first counts its rejects, among the reads of all."""
    import datasets

    def to_sample(key, record):
        if record["number"] % 50 == 7:
            raise SampleError("bad")
        return Sample(key, None, ["x"])

    class Read(torch.utils.data.Dataset):
        def __getitem__(self, references):
            return SimpleNamespace(read=len(references[1]), rejects=[])

    counted = []
    for rank in range(ranks):
        numbers = datasets.IterableDataset.from_generator(lambda: ({"number": number} for number in range(400)))
        stream = StreamSource("numbers", numbers, to_sample, block=16)
        loader = Loader(Mixture([stream]), Read(), batch=16, rank=rank, ranks=ranks, rejects=Rejects(None, 0.05))
        for _ in zip(range(30), loader, strict=False):
            continue
        counted.append((loader.rejects.rejected, loader.rejects.read))
    (rejected, read), *others = counted
    assert 400 < read < 520
    assert rejected / read == pytest.approx(0.02, abs=0.005)
    assert all(rejected == 0 for rejected, _ in others)


def test_a_streamed_tar_reads_its_json_and_lines_hold_base64(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            for name, data in (
                (f"{number}.png", png(number)),
                (f"{number}.json", json.dumps({"caption": f"number {number}"}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    stream = open_source(f"hf:{tmp_path}")
    assert sorted(stream.next().texts[0] for _ in range(3)) == ["number 0", "number 1", "number 2"]
    named = open_source(f"hf:{tmp_path}?text=json")
    with pytest.raises(SampleError, match="no usable sample"):
        named.next()
    assert "an object and no text" in named.take_rejects()[0].reason
    row = {"image": base64.b64encode(png(1)).decode(), "caption": "one"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    sample = open_source(str(tmp_path / "b.jsonl"))[0]
    assert open_image(sample.image).size == open_image(png(1)).size


def test_a_tar_source_of_many_shards_keeps_few_of_them_open(tmp_path):
    """Also after it was pickled into a worker while files were open."""

    def held():
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(link.exists() and str(link.readlink()).startswith(str(tmp_path)) for link in links)

    for shard in range(80):
        write_tar(tmp_path / f"a-{shard:03d}.tar", {"0": {"png": png(shard % 12), "txt": b"words %d" % shard}})
    source = open_source(str(tmp_path / "a-*.tar"))
    for again in (source, pickle.loads(pickle.dumps(source))):
        assert [again[n % 80].texts for n in range(100)] == [[f"words {n % 80}"] for n in range(100)]
    assert 64 <= held() <= 2 * 64
    del source, again
    assert held() == 0


@pytest.mark.parametrize("picture", [5, True, [1, 2], {"bytes": 5}, ""])
def test_a_record_whose_picture_is_no_picture_is_a_reject(tmp_path, picture):
    (tmp_path / "t.jsonl").write_text("\n" + json.dumps({"image": picture, "caption": "x"}) + "\n")
    (reject,) = first_samples(open_source(str(tmp_path / "t.jsonl")), None)
    assert isinstance(reject, Reject)
    assert picture == "" or reject.reason.startswith("t.jsonl:2: the picture is ")


def test_a_broken_picture_is_named_by_shard_and_member(tmp_path):
    source = open_source(str(write_tar(tmp_path / "x.tar", {"g/3": {"png": b"not a picture", "txt": b"words"}})))
    for image in (source[0].image, pickle.loads(pickle.dumps(source))[0].image, pickle.loads(pickle.dumps(source[0])).image):
        with pytest.raises(SampleError, match=r"cannot read the picture x\.tar/g/3\.png: it is of no picture format") as caught:
            open_image(image)
        assert "BytesIO" not in str(caught.value)
    row = {"image": base64.b64encode(b"no picture" * 20).decode(), "caption": "x"}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    (reject,) = first_samples(open_source(str(tmp_path / "t.jsonl")), None)
    assert reject.reason.startswith("cannot read the picture t.jsonl:1: ")


def test_a_tar_that_is_none_says_why(tmp_path):
    whole = good_tar(tmp_path / "a-0.tar").read_bytes()
    (tmp_path / "a-1.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(SourceError, match=r"a-1\.tar: no plain tar but compressed with gzip: gunzip it first"):
        open_source(str(tmp_path / "a-1.tar"))
    both = open_source(str(tmp_path / "a-*.tar"))
    assert len(both) == 6
    assert "gunzip" in both.problems[0][1]
    write_tar(tmp_path / "empty.tar", {})
    with pytest.raises(SourceError, match="holds no samples"):
        open_source(str(tmp_path / "empty.tar"))


def test_tars_and_folders_have_no_columns_and_give_their_own_advice(tmp_path):
    parts = {"a": {"png": png(1), "cls": b"3"}, "b": {"png": png(1), "json": b'{"words": "x"}'}}
    path = write_tar(tmp_path / "x.tar", parts)
    for spec, words in ((f"{path}?text=words", "a tar has no columns"), (f"{tmp_path}?txt=words", "a folder has no columns")):
        with pytest.raises(SourceError, match=words):
            open_source(spec)
    reasons = [reject.reason for reject in first_samples(open_source(str(path)), None)]
    assert reasons[0].startswith("x.tar/a: no caption in its members (.png, .cls); a caption is a .txt")
    assert reasons[1].startswith("x.tar/b.json: no caption column among words; a caption is a .txt")
    assert not any("COLUMN" in reason for reason in reasons)


def test_captions_of_several_lines_members_and_languages(tmp_path):
    """One caption a line in a tar as in a folder; `1.en.txt` beside `1.png` is a caption where there is no `1.txt`."""
    by_language = {"caption": {"en": "a dog", "pt-BR": ["um cachorro", "um cão"], "de": None}}
    parts = {
        "lines": {"png": png(1), "txt": b"one\n\n two \nthree"},
        "languages": {"png": png(1), "en.txt": b"a cat", "de.txt": b"eine Katze\n"},
        "plain": {"png": png(1), "en.txt": b"a cat", "txt": b"a cow"},
        "json": {"png": png(1), "json": json.dumps(by_language).encode()},
    }
    path = write_tar(tmp_path / "x.tar", parts)
    source = open_source(str(path))
    wanted = [["one", "two", "three"], ["eine Katze", "a cat"], ["a cow"], ["a dog", "um cachorro", "um cão"]]
    assert [source[n].texts for n in range(4)] == wanted
    write_tar(path, {"lines": parts["lines"]})
    assert open_source(f"hf:{tmp_path}").next().texts == wanted[0]  # streamed


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ({"txt": b"one\n\n two "}, ["one", "two"]),
        ({"en.txt": b"a cat", "de.txt": b"eine Katze\nein Kater\n"}, ["eine Katze", "ein Kater", "a cat"]),
        ({"en.txt": b"a cat", "txt": b"a cow"}, ["a cow"]),
        ({"en.txt": b"a cat", "json": b'{"caption": "from json", "image": "elsewhere.png"}'}, ["a cat"]),
    ],
)
def test_captions_beside_a_picture_are_the_same_in_tars_folders_and_streamed_tars(tmp_path, texts, wanted):
    parts = {f"00{n}": {"png": png(n), **texts} for n in range(2)}
    (tmp_path / "streamed").mkdir()
    (tmp_path / "named" / "folder").mkdir(parents=True)
    path = write_tar(tmp_path / "streamed" / "x.tar", parts)
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "named" / "folder", filter="data")
    tar, folder, stream = (open_source(spec) for spec in (str(path), str(tmp_path / "named"), f"hf:{tmp_path / 'streamed'}"))
    assert [tar[n].texts for n in range(2)] == [folder[n].texts for n in range(2)] == [wanted, wanted]
    streamed = [stream.next() for _ in range(2)]
    assert [sample.texts for sample in streamed] == [wanted, wanted]
    assert {open_image(sample.image).getpixel((0, 0))[0] for sample in streamed} == {0, 20}
    if "json" in texts:
        assert open_source(f"hf:{tmp_path / 'streamed'}?text=caption").next().texts == ["from json"]


def test_a_text_in_a_folder_is_of_the_picture_with_the_longest_name_that_it_begins_with(tmp_path):
    for name in ("a.png", "a.v2.png", "b.png"):
        (tmp_path / name).write_bytes(png(1))
    texts = {
        "a.en.txt": "first",
        "a.v2.txt": "second",
        "a.v2.en.txt": "second in English",
        "b.pt-BR.txt": "terceiro",
        "c.en.txt": "none's",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    source = open_source(str(tmp_path))
    assert [source[n].texts for n in range(3)] == [["first"], ["second"], ["terceiro"]]
    (tmp_path / "a.v2.txt").unlink()
    assert open_source(str(tmp_path))[1].texts == ["second in English"]


def test_a_class_number_is_no_caption_and_says_what_to_do(tmp_path):
    path = write_tar(tmp_path / "x.tar", {f"00{n}": {"png": png(n), "cls": b"3"} for n in range(2)})
    wanted = "a .cls is the number of a class and no caption: write the class's name, or a caption, into a .txt beside each picture"
    with pytest.raises(SampleError, match=f"x.tar/000: no caption in its members .*{wanted}"):
        open_source(str(path))[0]
    assert open_source(str(path)).picture_at(0)[0] == "x.tar/000"  # for who needs no captions
    stream = open_source(f"hf:{tmp_path}")
    with pytest.raises(SampleError, match="no usable sample"):
        stream.next()
    assert wanted in stream.take_rejects()[0].reason


def test_a_csv_field_may_hold_a_picture(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    assert len(text) > 131_072
    (tmp_path / "t.csv").write_text(f"image,caption\n{text},noise\n")
    assert np.array_equal(np.asarray(open_image(open_source(str(tmp_path / "t.csv"))[0].image)), noise)


def test_a_packed_shard_survives_a_later_packing_that_fails(tmp_path, monkeypatch):
    from intermodal.data import pack as module

    path, out = good_tar(tmp_path / "a.tar"), tmp_path / "out.tar"
    assert module.pack(str(path), out, 8, progress=False) == (6, 0)
    before = out.read_bytes()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.pack(str(path), out, 8, progress=False)
    assert out.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "out.tar"]


def test_preview_and_pack_tell_of_shards_that_are_cut_short(tmp_path, capsys):
    from intermodal.data.pack import pack

    data = good_tar(tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: 3 * 4 * 512])
    assert pack(str(tmp_path / "a.tar"), tmp_path / "out.tar", 8, progress=False) == (3, 1)
    named = json.loads((tmp_path / "out.rejects.jsonl").read_text())
    assert named["key"].endswith("a.tar")
    assert "cut short" in named["reason"]
    assert contact_sheet(str(tmp_path / "a.tar"), tmp_path / "sheet.png", 10, 16) == (3, 1)
    assert "a.tar: cut short" in capsys.readouterr().err


def test_reasons_that_differ_in_names_alone_are_counted_together(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    rows = [{"image": "0.png", "caption": "x"}] + [{"image": "0.png", "caption": ""}] * 3
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert describe(str(tmp_path / "t.jsonl"), 10, 8)["reasons"] == {"t.jsonl:2: the caption is empty": 3}


def test_scanning_that_takes_long_goes_through_every_shard(tmp_path, monkeypatch):
    for shard in range(5):
        good_tar(tmp_path / f"a-{shard}.tar", count=1)
    clock = iter([0.0, 0.0, 1.0, 3.0])
    monkeypatch.setattr("intermodal.data.tar_index.time", SimpleNamespace(monotonic=lambda: next(clock)))
    source = open_source(str(tmp_path / "a-*.tar"))
    assert [source[n].key for n in range(5)] == [f"a-{shard}.tar/0000" for shard in range(5)]


def test_captions_of_a_table_are_read_without_its_pictures(tmp_path):
    """Also by language, which parquet keeps as a struct as it may keep pictures."""
    image = {"bytes": png(1), "path": "x.png"}
    table = pa.table({"image": [image] * 2, "caption": [{"en": "a dog", "de": "ein Hund"}] * 2})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert source.words.column_names == ["caption"]
    assert source.captions_at(1) == source[1].texts == ["a dog", "ein Hund"]
    assert source.picture_at(1) == (source[1].key, image["bytes"])
