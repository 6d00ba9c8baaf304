"""Vectors on disk know the model that made them; what `embed`, `search` and `data` verbs say of names and files they cannot take."""

import json

import pyarrow.parquet as pq
import pytest
from test_data import CAPTIONS, good_tar
from test_evaluate import Stub, colour_folder

from intermodal.data.pack import pack
from intermodal.data.preview import contact_sheet
from intermodal.data.readers import SourceError, open_source
from intermodal.errors import IntermodalError
from intermodal.evaluate.embed import embed_source, encoder_on, search


@pytest.mark.parametrize("ending", ["parquet", "npy"])
def test_search_refuses_vectors_of_another_model_and_warns_where_none_is_named(tmp_path, ending):
    file, said = tmp_path / f"e.{ending}", []
    embed_source(Stub(), str(colour_folder(tmp_path)), file)
    assert search(Stub(), str(file), "green", 1, tell=said.append)[0][0][0].endswith("g.png")
    assert said == []
    with pytest.raises(IntermodalError, match="vectors of another model, or of this one before it was trained on"):
        search(Stub(trained=1.0), str(file), "green", 1)
    if ending == "parquet":
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    else:
        (tmp_path / "e.npy.model.json").unlink()
    for trained in (0.0, 1.0):  # as an earlier version wrote it
        search(Stub(trained=trained), str(file), "green", 1, tell=said.append)
    assert len(said) == 2
    assert "does not say which model made its vectors" in said[0]


def test_vectors_written_again_are_of_the_model_that_wrote_them(tmp_path):
    folder, file = colour_folder(tmp_path), tmp_path / "e.npy"
    for trained in (0.0, 1.0):
        embed_source(Stub(trained=trained), str(folder), file)
        search(Stub(trained=trained), str(file), "green", 1)
    assert set(json.loads((tmp_path / "e.npy.model.json").read_text())) == {"intermodal.weights"}


def test_a_text_file_in_another_encoding_says_so(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"red\ngr\xfcn\n")
    with pytest.raises(IntermodalError, match=r"t\.txt:2: not UTF-8 \(byte 0xfc\)"):
        embed_source(Stub(), str(tmp_path / "t.txt"), tmp_path / "e.parquet")
    (tmp_path / "t.txt").write_text("red\ngreen\n", encoding="utf-8-sig")
    assert embed_source(Stub(), str(tmp_path / "t.txt"), tmp_path / "e.parquet") == (2, 0, 0)


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_a_device_without_weights_is_told(device):
    with pytest.raises(IntermodalError, match="--device meta holds no weights"):
        encoder_on("no model", device)


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.psd"])
def test_a_sheet_of_no_picture_format_is_told_before_it_is_drawn(tmp_path, name):
    with pytest.raises(SourceError, match=r"a sheet cannot be written as .*; take \.png"):
        contact_sheet("no such source", tmp_path / name, 2, 16)
    assert contact_sheet("sprites:core", tmp_path / "x.JPG", 2, 16) == (2, 0)


def test_packing_does_not_replace_what_it_reads(tmp_path):
    file = good_tar(tmp_path / "a.tar")
    (tmp_path / "link.tar").symlink_to(file)
    before = file.read_bytes()
    for spec, out in ((str(file), file), (f"{tmp_path}/a.*", tmp_path / "link.tar")):
        with pytest.raises(SourceError, match="would be replaced by its small pictures: give another --out"):
            pack(spec, out, 8, progress=False)
    assert file.read_bytes() == before
    assert pack(str(file), tmp_path / "b.tar", 8, progress=False) == (6, 0)
    assert pack(str(file), tmp_path / "b.tar", 8, progress=False) == (6, 0)
    assert open_source(str(tmp_path / "b.tar"))[5].texts == [CAPTIONS[5]]
