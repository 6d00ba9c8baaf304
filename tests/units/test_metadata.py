"""Metadata and tables that are not as they should be: unrelated or stale ones, JSON beyond Python, numbers and labels as captions."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_captions_read import CLASSES, as_table, read, streams_of, written
from test_data import png

from intermodal.data import folders
from intermodal.data.readers import SourceError, open_source

BEYOND = {"deep": "[" * 100_000 + "]" * 100_000, "long": "9" * 5_000}
EMPTY = {"jsonl": "", "csv": "", "unrelated.csv": "some,thing\n1,2\n", "header.csv": "file_name,text\n"}


@pytest.mark.parametrize("kind", BEYOND)
def test_json_beyond_python_is_a_reject_and_no_end(tmp_path, kind):
    wrong = f'{{"file_name": "1.png", "text": "x", "more": {BEYOND[kind]}}}'
    lines = f'{{"file_name": "1.png", "text": "one"}}\n{wrong}\n'
    written(tmp_path, **{"1__png": png(1), "t__jsonl": lines, "f__1__png": png(1), "f__metadata__jsonl": lines})
    said = "too deep inside each other" if kind == "deep" else "not JSON: Exceeds the limit"
    texts, (reason,) = read(tmp_path / "t.jsonl")
    assert (texts, reason.startswith("t.jsonl:2: not JSON"), said in reason) == ({"1": ["one"]}, True, True)
    assert read(tmp_path / "f") == ({"1.png": ["one"]}, [])
    ((key, reason),) = open_source(str(tmp_path / "f")).problems
    assert (key, said in reason) == ("metadata.jsonl:2", True)
    tars = streams_of(tmp_path, {"good": {"png": png(0), "txt": b"x"}, "bad": {"png": png(0), "json": wrong.encode()}})[:2]
    for spec in tars:
        texts, (reason,) = read(spec)
        assert (texts, said in reason) == ({"good": ["x"]}, True)


@pytest.mark.parametrize("digits", ["7" * 19, "7" * 5_000])
def test_digits_that_are_no_number_of_a_class_stay_text(tmp_path, digits):
    written(tmp_path, **{"1__png": png(1), "t__csv": f"image,label\n1.png,{digits}\n1.png,cat\n"})
    assert read(tmp_path / "t.csv") == ({"2": [digits], "3": ["cat"]}, [])


def test_metadata_of_one_class_leave_the_names_of_the_others(tmp_path):
    tree = {"cat__1__png": png(1), "cat__2__png": png(2), "dog__1__png": png(3), "dog__2__png": png(4), "dog__x__3__png": png(5)}
    spec = written(tmp_path, **tree, dog__metadata__csv="file_name,text\n1.png,a dog\n")
    source = open_source(spec)
    assert [source[n].texts for n in range(3)] == [["cat"], ["cat"], ["a dog"]]
    assert read(spec)[1] == [f"dog/{n}.png: no caption (no text in {n[-1]}.txt, no metadata row)" for n in ("2", "x/3")]
    assert source.problems == []


@pytest.mark.parametrize("kind", [*EMPTY, "parquet", "other.parquet", "elsewhere.jsonl"])
def test_metadata_that_name_no_picture_leave_the_names_of_classes(tmp_path, kind):
    rows = pa.table({"file_name": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    pq.write_table(pa.table({"some": [1], "thing": [2]}) if kind == "other.parquet" else rows, tmp_path / "t.parquet")
    gone = as_table("jsonl", [{"file_name": "gone.png", "text": "x"}], tmp_path)
    data = gone if kind == "elsewhere.jsonl" else EMPTY.get(kind, (tmp_path / "t.parquet").read_bytes())
    tree = {"cat__1__png": png(1), "dog__2__png": png(2), f"metadata__{kind.rpartition('.')[2]}": data}
    source = open_source(written(tmp_path / "data", **tree))
    assert [source[n].texts for n in range(2)] == [["cat"], ["dog"]]
    assert len(source.problems) == (kind in ("unrelated.csv", "other.parquet", "elsewhere.jsonl"))


def test_a_damaged_metadata_parquet_is_an_error(tmp_path):
    spec = written(tmp_path, **{"1__png": png(1), "metadata__parquet": "PAR1"})
    with pytest.raises(SourceError, match=r"metadata\.parquet: not readable as parquet"):
        open_source(spec)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_records_of_pictures_elsewhere_are_one_problem(tmp_path, kind):
    rows = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(2_000)]
    spec = written(tmp_path / "f", **{f"s__{n}__png": png(n) for n in range(20)})
    written(tmp_path / "f", **{f"s__metadata__{kind}": as_table(kind, rows, tmp_path)})
    source = open_source(spec)
    line = {"csv": 22, "jsonl": 21, "parquet": 20}[kind]
    said = f"the first: s/metadata.{kind}:{line} names 20.png, which is not there"
    assert source.problems == [(f"s/metadata.{kind}", f"1,980 of its 2,000 records name no picture here; {said}")]
    assert sorted(source[n].texts for n in range(20)) == sorted([f"number {n}"] for n in range(20))


def test_a_table_that_is_no_metadata_is_one_problem(tmp_path):
    spec = written(tmp_path, **{"1__png": png(1), "1__txt": "one", "metadata__csv": "some,thing\n" + "1,2\n" * 50})
    first = "metadata.csv:2: not a caption record: no file_name among some, thing"
    ((key, reason),) = open_source(spec).problems
    assert key == "metadata.csv"
    assert reason.startswith(f"none of its 50 records says which picture it is of; the first: {first}")


def test_metadata_of_parquet_need_no_other_columns_and_no_cache(tmp_path, monkeypatch):
    """Row by row through `datasets` it took a second and more for 8,000 pictures."""
    import datasets

    monkeypatch.setattr(datasets.Dataset, "from_parquet", None)
    classes = datasets.Features({"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    datasets.Dataset.from_dict({"file_name": ["1.png"], "label": [1]}, features=classes).to_parquet(tmp_path / "c.parquet")
    pq.write_table(pa.table({"file_name": ["1.png"], "data": [b"x"]}), tmp_path / "d.parquet")
    for name in "cd":
        written(tmp_path, **{f"{name}__1__png": png(1), f"{name}__metadata__parquet": (tmp_path / f"{name}.parquet").read_bytes()})
    assert read(tmp_path / "c") == ({"1.png": ["dog"]}, [])
    assert "metadata.parquet:0: no caption column among file_name, data" in read(tmp_path / "d")[1][0]


@pytest.mark.parametrize("spec", [".", "./", "{name}", "../{name}", "{path}"])
def test_the_folder_one_is_in_and_folders_by_other_names(tmp_path, monkeypatch, spec):
    """Keys, dots and metadata are the same however the folder is written."""
    inside = {"._1__png": b"of macOS", ".cache__2__png": png(2), "1__png": png(1), "x.y__3__png": png(3)}
    folder = written(tmp_path / "data", **inside, metadata__jsonl='{"file_name": "1.png", "text": "one"}')
    monkeypatch.chdir(tmp_path if spec == "{name}" else folder)
    source = open_source(spec.format(name="data", path=folder))
    assert [source._within(file) for file in source.files] == ["1.png", "x.y/3.png"]
    assert source.captions_at(0) == ["one"]
    monkeypatch.setattr(folders.Path, "relative_to", None)  # a third of the time that a folder of thousands took
    assert len(open_source(folder)) == 2
    assert source[0].key.endswith("1.png")


def table_of(folder, kind, column, values):
    """A table whose pictures have the values in the column."""
    rows = [{"image": f"{n}.png", column: value} for n, value in enumerate(values)]
    written(folder, **{f"{n}__png": png(n) for n in range(len(values))})
    path = folder / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(f"image,{column}\n" + "".join(f"{row['image']},{row[column]}\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_number_of_the_column_that_is_asked_for_is_a_text(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # `datasets` gives the pictures of a parquet as they are written
    path = os.path.relpath(table_of(tmp_path, kind, "count", [1, 3]))
    assert sorted(read(f"{path}?text=count")[0].values()) == [["1"], ["3"]]
    assert sorted(read(f"{path}?text=count", classes=CLASSES)[0].values()) == [["dog"], ["fox"]]
    _, reasons = read(f"{path}?text=count", classes=CLASSES[:2])
    assert len(reasons) == 1
    assert "its count is 3, and line 3 of the 2 class names" in reasons[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["label", "labels", "cls"])
@pytest.mark.parametrize("values", [[1, 3], [1.0, 3.0]])
def test_numbers_of_classes_by_the_name_of_their_column(tmp_path, monkeypatch, kind, column, values):
    monkeypatch.chdir(tmp_path)
    path = os.path.relpath(table_of(tmp_path, kind, column, values))
    texts, reasons = read(f"{path}?text={column}")
    assert texts == {}
    assert f"its {column} is 1, the number of a class and no caption; zero-shot `eval` takes it" in reasons[0]
    assert sorted(read(f"{path}?text={column}", classes=CLASSES)[0].values()) == [["dog"], ["fox"]]
    if column == "label":
        assert "no caption; name it with ?text=COLUMN; zero-shot" in read(path)[1][0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_yes_or_no_is_no_caption_and_nothing_is_none(tmp_path, kind):
    spec = f"{table_of(tmp_path, kind, 'label', [True, False])}"
    for options in ({}, {"classes": CLASSES}):
        texts, reasons = read(spec, **options)
        assert (texts, ["which is no caption" in reason for reason in reasons]) == ({}, [True, True])
    table_of(tmp_path, kind, "label", [float("nan"), 1.0])
    texts, reasons = read(spec, classes=CLASSES)
    assert (list(texts.values()), [reason.partition(": ")[2] for reason in reasons]) == ([["dog"]], ["the caption is empty"])


def test_a_path_with_half_a_character_says_path(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"image": "a\\ud83d.png", "text": "x"}\n{"file_name": "\\ud83d.png", "text": "x"}\n')
    _, reasons = read(tmp_path / "t.jsonl")
    assert [reason.partition(" (")[0] for reason in reasons] == [f"t.jsonl:{n}: the picture's path is not UTF-8" for n in (1, 2)]
    spec = written(tmp_path / "f", **{"1__png": png(1), "metadata__jsonl": (tmp_path / "t.jsonl").read_bytes().splitlines()[1]})
    assert "its file_name is not UTF-8" in open_source(spec).problems[0][1]
