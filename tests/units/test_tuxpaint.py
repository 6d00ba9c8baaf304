"""The real set from outside. The slow test fetches it from Debian; the others make a package of their own."""

import io
import lzma
import tarfile
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from intermodal.data.loader import Fetcher
from intermodal.data.preview import describe
from intermodal.data.readers import SourceError, open_source
from intermodal.data.tuxpaint import TuxPaint, fetch, read_captions, unpack
from intermodal.errors import IntermodalError, SampleError
from intermodal.evaluate.run import evaluate_source
from intermodal.inputs.image import ImageProcessor
from intermodal.inputs.processor import PairProcessor
from intermodal.inputs.text import fresh, train_tokenizer

CAPTIONS = "A dog.\nde.utf8=Ein Hund.\nfr.utf8=Un chien.\nbroken line\nes.utf8=\n"


def ar(members):
    out = b"!<arch>\n"
    for name, data in members.items():
        out += name.encode().ljust(16) + b"0".ljust(12) + b"0".ljust(6) + b"0".ljust(6) + b"100644".ljust(8)
        out += str(len(data)).encode().ljust(10) + b"`\n" + data + b"\n" * (len(data) % 2)
    return out


def package(path, prefix="./usr/share/tuxpaint/stamps/animals"):
    picture = io.BytesIO()
    Image.new("RGBA", (6, 5), (10, 200, 30, 255)).save(picture, "PNG")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="4"><rect width="8" height="4" fill="#ff0000"/></svg>'
    files = {"dog.png": picture.getvalue(), "dog.txt": CAPTIONS.encode(), "car.svg": svg, "car.txt": b"A car.\n"}
    files |= {"dog_desc_de.ogg": b"sound", "dog.ogg": b"sound", "odd.txt": b"No picture.\n"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{prefix}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    path.write_bytes(ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": lzma.compress(buffer.getvalue())}))
    return path


def test_stamps_are_read_from_the_package(tmp_path):
    unpack(package(tmp_path / "stamps.deb"), tmp_path / "set")
    source = TuxPaint(str(tmp_path / "set"))
    assert len(source) == 2
    samples = {sample.texts[0]: sample for sample in (source[0], source[1])}
    dog = samples["A dog."]
    assert dog.meta["captions"] == {"en": "A dog.", "de": "Ein Hund.", "fr": "Un chien."}
    assert set(dog.meta["sounds"]) == {"en", "de"}
    from intermodal.inputs.image import open_image

    assert open_image(dog.image).getpixel((0, 0)) == (10, 200, 30)
    assert open_image(samples["A car."].image).getpixel((3, 3)) == (255, 0, 0)


def test_languages_and_sides_are_chosen_in_the_name(tmp_path):
    unpack(package(tmp_path / "stamps.deb"), tmp_path / "set")
    where = f"tuxpaint:{tmp_path / 'set'}"
    both = open_source(f"{where}?languages=de,en")
    assert [both[0].texts, both[1].texts] == [["A car."], ["Ein Hund.", "A dog."]]
    with pytest.raises(SampleError, match="no caption in fr"):
        open_source(f"{where}?languages=fr")[0]
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (3, 3)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"Number {number}.\n")
    train, test = (open_source(f"tuxpaint:{folder}?split={side}") for side in ("train", "test"))
    sides = [{source[index].texts[0] for index in range(len(source))} for source in (train, test)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60
    assert 1 <= len(sides[1]) <= 15
    with pytest.raises(IntermodalError, match="languages"):
        open_source(f"{where}?language=de")


def test_no_file_leaves_the_folder(tmp_path):
    unpack(package(tmp_path / "bad.deb", prefix="./usr/share/tuxpaint/stamps/../../../../escaped"), tmp_path / "set")
    assert not list(tmp_path.rglob("escaped"))
    assert not (tmp_path / "set" / "stamps").exists()


@pytest.mark.parametrize("cut", [4, 300, -40])
def test_a_damaged_package_says_so(tmp_path, cut):
    whole = package(tmp_path / "stamps.deb").read_bytes()
    (tmp_path / "cut.deb").write_bytes(whole[:cut])
    with pytest.raises(SourceError, match="not a readable Debian package"):
        unpack(tmp_path / "cut.deb", tmp_path / "set")


def test_what_to_do_when_it_was_not_fetched(tmp_path):
    with pytest.raises(SourceError, match="intermodal data fetch tuxpaint"):
        open_source(f"tuxpaint:{tmp_path / 'nothing'}")


def test_captions_of_an_empty_file(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    assert read_captions(tmp_path / "a.txt") == {}


def test_pictures_that_share_a_caption_are_each_others_positives(tmp_path):
    """In a training batch they are one group; in retrieval either is right for the caption."""
    folder = tmp_path / "set"
    unpack(package(tmp_path / "stamps.deb"), folder)
    (found,) = folder.rglob("car.txt")
    found.write_text("A dog.\n")
    source = TuxPaint(str(folder))
    texts = PairProcessor(ImageProcessor((8, 8)), fresh(train_tokenizer(["a dog ."], 60), "siglip", context=6), "siglip")
    batch = Fetcher([source], texts, 0)[0, [(0, 0), (0, 1)]].batch
    assert batch.groups[0] == batch.groups[1]

    class Apart:
        config = SimpleNamespace(vision=SimpleNamespace(image_size=8))

        def embed_images(self, images):
            return torch.eye(2)[: len(images)]

        def embed_texts(self, captions):
            assert captions == ["A dog."]
            return torch.tensor([[0.0, 1.0]])

    scores = evaluate_source(Apart(), f"tuxpaint:{folder}", "retrieval", progress=False)
    assert scores["image_to_text_recall@1"] == scores["text_to_image_recall@1"] == 1.0
    assert describe(f"tuxpaint:{folder}", 10, 8)["captions on several pictures"] == 1


@pytest.mark.slow
def test_the_real_set(tmp_path):
    """About 950 pictures, 77 languages, captions that several pictures share."""
    source = TuxPaint(str(fetch(tmp_path / "tuxpaint")))
    assert len(source) > 900
    samples, rejected = [], []
    for index in range(len(source)):
        try:
            samples.append(source[index])
        except SampleError as error:
            rejected.append(str(error))
    assert len(samples) > 900
    assert all("not a drawable SVG" in reason for reason in rejected), "16 of the drawings have no size that resvg accepts"
    languages = {code for sample in samples for code in sample.meta["captions"]}
    assert len(languages) >= 77
    texts = Counter(sample.texts[0] for sample in samples)
    assert sum(count > 1 for count in texts.values()) > 90, "captions of several pictures exist and are kept"
