"""Captions as people's files hold them: metadata of imagefolder, bytes, numbers of classes, other separators and encodings."""

import codecs
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data import png, write_tar
from test_evaluate import Colours
from typer.testing import CliRunner

from intermodal.cli.app import app
from intermodal.data.preview import contact_sheet, describe
from intermodal.data.readers import SourceError, open_source
from intermodal.data.source import Reject
from intermodal.data.stream import first_samples
from intermodal.errors import IntermodalError, SampleError
from intermodal.evaluate.run import evaluate_source

LATIN = "Bär".encode("latin-1")
CLASSES = ["cat", "dog", "", "fox"]


def written(folder, **files):
    """Files by name, where a `/` of the name is written as `__`."""
    for name, data in files.items():
        *above, stem, ending = name.split("__")
        file = folder.joinpath(*above) / f"{stem}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(folder)


def read(spec, **options):
    """Captions by the end of a sample's key, and the rejects' reasons."""
    found = list(first_samples(open_source(str(spec), **options), None))
    texts = {one.key.rpartition("/")[2].rpartition(":")[2]: one.texts for one in found if not isinstance(one, Reject)}
    return texts, [one.reason for one in found if isinstance(one, Reject)]


def as_table(kind, rows, folder):
    """The rows as a metadata file's content."""
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "csv":
        return codecs.BOM_UTF8.decode() + "\n".join(["file_name,text", *(",".join(row.values()) for row in rows)])
    pq.write_table(pa.Table.from_pylist(rows), folder / "made.parquet")
    data = (folder / "made.parquet").read_bytes()
    (folder / "made.parquet").unlink()
    return data


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_in_every_folder_are_read_as_datasets_reads_them(tmp_path, kind):
    top = [{"file_name": "./im/1.png", "text": "one"}, {"file_name": "im/../2.png", "text": "two"}]
    deep = [{"file_name": "3.png", "text": "three"}, {"file_name": "x/4.png", "text": "four"}]
    tables = {
        f"train__metadata__{kind}": as_table(kind, top, tmp_path),
        f"train__deep__metadata__{kind}": as_table(kind, deep, tmp_path),
    }
    names = ("train__im__1__png", "train__2__png", "train__deep__3__png", "train__deep__x__4__png")
    spec = written(tmp_path / "data", **{name: png(number) for number, name in enumerate(names)}, **tables)
    source = open_source(spec)
    assert source.problems == []
    ours = {source[n].key.removeprefix("data/train/"): source[n].texts for n in range(len(source))}
    assert ours == {"im/1.png": ["one"], "2.png": ["two"], "deep/3.png": ["three"], "deep/x/4.png": ["four"]}
    theirs = datasets.load_dataset("imagefolder", data_dir=spec, split="train", cache_dir=str(tmp_path / "cache"))
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    assert {os.path.basename(row["image"]["path"]): [row["text"]] for row in theirs} == {
        os.path.basename(name): texts for name, texts in ours.items()
    }


def test_pictures_without_metadata_and_metadata_without_pictures_are_named(tmp_path):
    rows = [
        {"file_name": "1.png", "text": "one"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "2.png", "text": ""},
        {"text": "of none"},
        {"file_name": "notes.svg", "text": "no picture"},
        {"file_name": "1.png", "text": ""},
    ]
    pictures = {f"train__{n}__png": png(n) for n in (1, 2, 3)}
    spec = written(tmp_path, **pictures, train__notes__svg=b"<svg/>", train__metadata__jsonl=as_table("jsonl", rows, tmp_path))
    texts, reasons = read(spec)
    assert texts == {"1.png": ["one"]}
    assert reasons == [
        "train/2.png: no caption: train/metadata.jsonl:3: the caption is empty",
        "train/3.png: no caption (no text in 3.txt, no metadata row)",
    ]
    first = "train/metadata.jsonl:2 names gone.png, which is not there"
    assert open_source(spec).problems == [
        ("train/metadata.jsonl", f"2 of its 6 records name no picture here; the first: {first}"),
        (
            "train/metadata.jsonl:4",
            "not a caption record: no file_name among text: the picture's path, relative to this file",
        ),
        ("train/metadata.jsonl:6", "the caption is empty"),
    ]
    written(tmp_path, train__metadata__jsonl='{"file_name": "1.png", "description": "x"}')
    assert "no caption column among file_name, description; beside pictures it is one of caption," in read(spec)[1][0]


def test_names_that_begin_with_a_dot_are_passed_over(tmp_path):
    written(
        tmp_path, **{"._1__png": b"of macOS", "._1__txt": b"of macOS", ".cache__2__png": png(2), "1__png": png(1), "1__txt": "one"}
    )
    assert read(tmp_path) == ({"1.png": ["one"]}, [])


def test_captions_in_bytes_are_their_text_and_no_other_type_is_a_caption(tmp_path):
    captions = ["ein Bär".encode(), LATIN, b"", None]
    pq.write_table(pa.table({"image": [png(1)] * 4, "caption": pa.array(captions, pa.binary())}), tmp_path / "t.parquet")
    texts, reasons = read(tmp_path / "t.parquet")
    assert texts == {"0": ["ein Bär"]}
    assert reasons[0].startswith("t.parquet:1: its text is not UTF-8 (byte 0xe4); save it as UTF-8")
    assert reasons[1:] == [f"t.parquet:{n}: the caption is empty" for n in (2, 3)]
    assert open_source(str(tmp_path / "t.parquet")).captions_at(0) == ["ein Bär"]
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "t.jsonl").write_text('{"image": "1.png", "caption": [["x"]]}\n{"image": "1.png", "caption": 5}\n')
    texts, reasons = read(tmp_path / "t.jsonl")
    assert texts == {"2": ["5"]}
    assert reasons[0].startswith("t.jsonl:1: the caption is of type list and no text")


def streams_of(tmp_path, parts):
    """One shard as a file, as what a command prints and through `datasets`."""
    (tmp_path / "shards").mkdir()
    path = write_tar(tmp_path / "shards" / "x.tar", parts)
    return str(path), f"pipe:cat {path}", f"hf:{path.parent}"


def test_a_streamed_tar_takes_and_refuses_the_captions_that_its_file_does(tmp_path):
    parts = {
        "caption": {"png": png(0), "caption": b"x"},
        "label": {"png": png(0), "label": b"x"},
        "list": {"png": png(0), "txt": b"beside a list", "json": b'["x"]'},
        "broken": {"png": png(0), "txt": b"beside no JSON", "json": b"{"},
        "numbered": {"png": png(0), "json": b'{"label": 1}'},
        "latin": {"png": png(0), "txt": LATIN},
        "marked": {"png": png(0), "txt": codecs.BOM_UTF8 + b"after a mark"},
        "json": {"png": png(0), "json": codecs.BOM_UTF8 + b'{"caption": "in JSON"}'},
    }
    file, pipe, _ = streams_of(tmp_path, parts)
    for spec in (file, pipe):
        texts, reasons = read(spec)
        assert texts == {
            "list": ["beside a list"],
            "broken": ["beside no JSON"],
            "marked": ["after a mark"],
            "json": ["in JSON"],
        }
        assert [reason.partition("x.tar/")[2][:40] for reason in reasons] == [
            "caption: no caption in its members (.png",
            "label: no caption in its members (.png, ",
            "numbered.json: its label is 1, the numbe",
            "latin.txt: its text is not UTF-8 (byte 0",
        ]
        assert read(spec, classes=CLASSES)[0]["numbered"] == ["dog"]


def test_a_hub_tar_refuses_bytes_beside_a_picture_unless_the_column_is_named(tmp_path):
    *_, hub = streams_of(tmp_path, {str(n): {"png": png(0), "caption": b"x", "json": b'["x"]'} for n in range(2)})
    texts, reasons = read(hub)
    assert texts == {}
    assert reasons[0].startswith("0.json: a JSON list where an object was expected")
    assert read(f"{hub}?text=caption") == ({"0": ["x"], "1": ["x"]}, [])
    (tmp_path / "marked").mkdir()
    *_, hub = streams_of(tmp_path / "marked", {"0": {"png": png(0), "txt": codecs.BOM_UTF8 + b"after a mark", "json": b'["x"]'}})
    assert read(hub) == ({"0": ["after a mark"]}, [])


@pytest.mark.parametrize("first", [0, 9])
def test_a_text_that_datasets_cannot_decode_says_what_to_do(tmp_path, first):
    """Within its first five samples at once, else where the stream comes to it."""
    *_, hub = streams_of(tmp_path, {str(n): {"png": png(0), "txt": LATIN if n == first else b"x"} for n in range(10)})
    with pytest.raises(IntermodalError, match="read them as files, or from their addresses"):
        open_source(hub).next()


def test_classes_by_name_where_the_table_keeps_their_names(tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "kinds": datasets.List(datasets.ClassLabel(names=["wild", "tame"])),
        }
    )
    rows = {"image": [{"bytes": png(1), "path": None}] * 3, "label": [1, 0, -1], "kinds": [[0, 1], [1], []]}
    (tmp_path / "t").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t" / "t.parquet")
    for spec in (tmp_path / "t" / "t.parquet", f"hf:{tmp_path / 't'}"):
        texts, reasons = read(spec)
        assert texts == {"0": ["dog"], "1": ["cat"]}
        assert "the caption is empty" in reasons[0]
        assert read(f"{spec}?text=kinds")[0] == {"0": ["wild", "tame"], "1": ["tame"]}
        assert read(spec, classes=CLASSES)[0] == texts  # it is known what they mean
    assert open_source(str(tmp_path / "t" / "t.parquet")).captions_at(0) == ["dog"]


@pytest.mark.parametrize("kind", ["parquet", "hub", "jsonl", "csv", "folder"])
def test_the_number_of_a_class_is_no_caption(tmp_path, kind):
    """As a tar's `.cls`: with the names of classes it is the one on its line."""
    numbers = [1, 3, 2, 9]
    name = "metadata.csv" if kind == "folder" else f"t.{'parquet' if kind == 'hub' else kind}"
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    if kind in ("parquet", "hub"):
        pq.write_table(pa.table({"image": [png(n) for n in range(4)], "label": numbers}), tmp_path / name)
    elif kind == "jsonl":
        rows = [{"image": f"{n}.png", "label": label} for n, label in enumerate(numbers)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (tmp_path / name).write_text("file_name,label\n" + "".join(f"{n}.png,{label}\n" for n, label in enumerate(numbers)))
    if kind == "hub":
        for n in range(4):
            (tmp_path / f"{n}.png").unlink()
    spec = {"hub": f"hf:{tmp_path}", "folder": str(tmp_path)}.get(kind, str(tmp_path / name))
    texts, reasons = read(spec)
    assert texts == {}
    assert "its label is 1, the number of a class and no caption; " in reasons[0]
    assert "--classes FILE" in reasons[0]
    texts, reasons = read(spec, classes=CLASSES)
    assert sorted(texts.values()) == [["dog"], ["fox"]]
    assert [reason.partition("its label ")[2][:20] for reason in reasons] == ["is 2, and line 2 of ", "is 9, and line 9 of "]
    if kind in ("parquet", "jsonl", "hub"):
        assert sorted(read(f"{spec}?text=label", classes=CLASSES)[0].values()) == [["dog"], ["fox"]]


def test_a_caption_goes_before_the_number_beside_it(tmp_path):
    pq.write_table(pa.table({"image": [png(1)], "label": [1], "text": ["a dog"]}), tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", classes=CLASSES) == ({"0": ["a dog"]}, [])


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "hub.csv", "hub.jsonl", "1.txt", "1.en.txt"])
def test_the_mark_at_the_beginning_of_a_file_is_no_part_of_it(tmp_path, name):
    (tmp_path / "1.png").write_bytes(png(1))
    path = str(tmp_path / "1.png")
    text = {"csv": f"image,caption\n{path},Bär\n", "tsv": f"image\tcaption\n{path}\tBär\n", "txt": "Bär"}
    text["jsonl"] = json.dumps({"image": path, "caption": "Bär"})
    folder = tmp_path / "hub" if name.startswith("hub") else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(codecs.BOM_UTF8 + text[name.rpartition(".")[2]].encode())
    spec = f"hf:{folder}" if name.startswith("hub") else tmp_path if name.endswith("txt") else tmp_path / name
    texts, reasons = read(spec)
    assert (list(texts.values()), reasons) == ([["Bär"]], [])


def test_captions_in_another_encoding_are_rejects_that_say_so(tmp_path):
    written(
        tmp_path, **{"1__png": png(1), "1__txt": "Bär", "2__png": png(2), "2__txt": LATIN, "3__png": png(3), "3.de__txt": LATIN}
    )
    texts, reasons = read(tmp_path)
    assert texts == {"1.png": ["Bär"]}
    assert [reason.partition(";")[0] for reason in reasons] == [
        f"{name}: its text is not UTF-8 (byte 0xe4)" for name in ("2.txt", "3.de.txt")
    ]
    for name, head, row in (
        ("t.csv", b"image,caption\n", b"1.png,%s\n"),
        ("t.jsonl", b"", b'{"image": "1.png", "caption": "%s"}\n'),
    ):
        (tmp_path / name).write_bytes(head + row % b"plain" + row % LATIN)
        texts, reasons = read(tmp_path / name)
        assert list(texts.values()) == [["plain"]]
        assert ": its text is not UTF-8 (byte 0xe4); save it as UTF-8" in reasons[0]


@pytest.mark.parametrize("name", ["Bär.png", "Bär" * 50 + ".png"])
def test_names_and_headers_in_another_encoding_are_rejects_that_can_be_shown(tmp_path, name):
    table = f"image,caption\n{name},x\n".encode("latin-1")
    head = table.replace(b"image", "Bär".encode("latin-1"))
    for data, said in (
        (table, "is not UTF-8 (byte 0xe4)"),
        (head, "no picture column among B?r, caption"),
        (table.decode("latin-1"), "no such picture"),
    ):
        written(tmp_path, t__csv=data)
        (reason,) = read(tmp_path / "t.csv")[1]
        assert said in reason.encode("utf-8").decode()
    spec = written(tmp_path / "f", **{"1__png": png(1), "metadata__csv": table.replace(b"image", b"file_name")})
    assert "is not UTF-8 (byte 0xe4)" in open_source(spec).problems[0][1]


@pytest.mark.parametrize(
    ("table", "query"),
    [
        ("filepath\ttitle\n1.png\thello, you; there\n", ""),  # what open_clip reads where nothing else is said
        ("filepath\ttitle\n1.png\thello, you; there\n", "?image=filepath&text=title"),
        ("a\tb, c\n1.png\thello, you; there\n", "?image=a&text=b, c"),
        ('image;caption\n1.png;"hello, you; there"\n', ""),
        ('x,image,caption\n7,1.png,"hello, you; there"\n', ""),
        ('"image","caption"\n"1.png","hello, you; there"\n', ""),
    ],
)
def test_a_csv_is_separated_by_what_its_header_is(tmp_path, table, query):
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "t.csv").write_text(table)
    assert read(f"{tmp_path}/t.csv{query}") == ({"2": ["hello, you; there"]}, [])


def test_a_parquet_of_pictures_alone_has_no_captions_and_says_so(tmp_path):
    spec = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"image": [png(1)] * 2}), spec)
    source = open_source(spec)
    with pytest.raises(SampleError, match=r"t\.parquet:1: no caption column among image; name it with"):
        source.captions_at(1)
    assert source.picture_at(1)[0] == "t.parquet:1"
    with pytest.raises(IntermodalError, match="no caption column among image"):
        evaluate_source(Colours(), spec, "zeroshot", progress=False)
    pq.write_table(pa.table({"image": [png(1)] * 2, "width": [5, 5]}), spec)
    with pytest.raises(SampleError, match="no caption column among image, width"):
        open_source(spec).captions_at(0)


def test_question_marks_in_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(3):
        write_tar(tmp_path / f"s00{n}.tar", {"a": {"png": png(n), "txt": b"x"}})
    (tmp_path / "1.png").write_bytes(png(1))
    for n in range(2):
        (tmp_path / f"t{n}.jsonl").write_text('{"pic": "1.png", "why?": "x", "other": "y"}\n')
    assert len(open_source("s00?.tar")) == 3
    assert len(open_source("s0?0.tar::s0?[12].tar")) == 3
    assert read("t?.jsonl?image=pic&text=other")[0] == {"1": ["y"]}
    assert len(open_source("t?.jsonl?image=pic")) == 2
    assert read("t0.jsonl?image=pic&text=why?")[0] == {"1": ["x"]}
    for spec, said in (("s01?.tar", r"s01\?\.tar: no such file"), ("t0.jsonl?text", r"no such file.*named by \?image=COLUMN")):
        with pytest.raises(SourceError, match=said):
            open_source(spec)
    with pytest.raises(SourceError, match="a tar has no columns"):
        open_source("s00?.tar?text=x")


@pytest.mark.parametrize("spec", ["", "?text=x", "captions:"])
def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path, monkeypatch, spec):
    from intermodal.data.talks import open_talks

    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.png").write_bytes(png(1))
    with pytest.raises(SourceError, match="the name of a source is empty"):
        open_talks(spec) if spec.startswith("captions") else open_source(spec)


def test_a_table_without_records_is_an_error_that_names_it(tmp_path):
    tables = {"t.csv": b"image,caption\n", "t.tsv": b"", "t.jsonl": b"\n"}
    for name, data in tables.items():
        (tmp_path / name).write_bytes(data)
    empty = pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "t.parquet")
    for name in (*tables, "t.parquet"):
        with pytest.raises(SourceError, match=rf"{name}: it holds no records"):
            contact_sheet(str(tmp_path / name), tmp_path / "sheet.png", 4, 16)
    pq.write_table(pa.table({"image": [png(1)], "caption": ["one"]}), tmp_path / "u.parquet")
    both = open_source(f"{tmp_path}/t.parquet::{tmp_path}/u.parquet")
    assert (len(both), both[0].texts) == (1, ["one"])
    assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_of_nothing_is_not_drawn_and_few_of_many_problems_are_told(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("image,caption\n1.png,\n")
    with pytest.raises(SourceError, match=r"nothing in .*t\.csv could be used; the last reason: t\.csv:2: "):
        contact_sheet(str(tmp_path / "t.csv"), tmp_path / "sheet.png", 4, 16)
    assert not (tmp_path / "sheet.png").exists()
    rows = [{"file_name": "1.png", "text": "one"}, *({"text": f"of none {n}"} for n in range(30))]
    spec = written(tmp_path / "f", **{"1__png": png(1), "metadata__jsonl": as_table("jsonl", rows, tmp_path)})
    assert contact_sheet(spec, tmp_path / "sheet.png", 4, 16) == (1, 30)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if "no file_name among" in line]) == 10
    assert said[-1] == "... and 20 more of f"
    assert len(describe(spec, 4, 16)["problems"]) == 10


def test_a_run_tells_few_of_many_problems_and_keeps_all(tmp_path):
    rows = [*({"file_name": f"{name}.png", "text": name} for name in "12"), *({"text": f"of none {n}"} for n in range(30))]
    spec = written(tmp_path / "f", **{"1__png": png(1), "2__png": png(2), "metadata__jsonl": as_table("jsonl", rows, tmp_path)})
    recipe = Path(__file__).parents[2] / "recipes" / "clip.py"
    settings = [f'data.train=["{spec}"]', "data.batch=2", "data.workers=0", "train.steps=1"]
    done = CliRunner().invoke(app, ["train", str(recipe), "--tiny", *settings, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    said = done.output.replace("\n", "")
    assert said.count("file_name") == 10
    assert "... and 20 more of f" in said
    assert len((tmp_path / "run" / "rejects.jsonl").read_text().splitlines()) == 30
