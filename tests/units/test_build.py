"""The C++ of the package is compiled once for a processor, kept whole, and done without where it cannot be had."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_decode_step import COMPILED, QUESTIONS, folder, model, steps  # noqa: F401

from intermodal.kernels import build
from intermodal.kernels.build import library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`library` as a process finds it that has not asked yet, with an empty cache folder."""
    build._library.cache_clear()
    monkeypatch.setenv("INTERMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    yield tmp_path
    build._library.cache_clear()


def a_compiler(place, monkeypatch, script):
    made = place / "my c++"
    made.write_text(f"#!/bin/sh\n{script}\n")
    made.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{made}' -O1")


def test_without_a_compiler_the_modules_do_it(fresh, monkeypatch, model, steps):  # noqa: F811
    monkeypatch.setenv("PATH", str(fresh))
    assert library("decode") is None
    assert model.generate(QUESTIONS[0], max_new_tokens=4).ids
    assert not any(steps)
    assert not (fresh / "cache").exists()


@COMPILED
def test_what_was_compiled_needs_no_compiler(fresh, monkeypatch):
    assert library("resize") is not None
    build._library.cache_clear()
    monkeypatch.setenv("PATH", str(fresh))
    assert library("resize") is not None


WRONG = {
    "exit 1": r"decode.cpp could not be compiled.*it ended with 1",
    'echo "x.cpp:3: error: no such lambda" >&2; exit 1': r"decode.cpp could not be compiled.*error: no such lambda",
    "sleep 20": r"decode.cpp could not be compiled.*timed out after 0.5 seconds",
    'for last; do :; done; echo no library > "$last"': r"decode.cpp could not be compiled.*what .*c\+\+ made cannot be loaded",
}


@pytest.mark.filterwarnings("error", "ignore:.* is compiled anew")
@pytest.mark.parametrize("script", WRONG)
def test_a_compiler_that_fails_is_told_of_once(script, fresh, monkeypatch):
    a_compiler(fresh, monkeypatch, script)
    monkeypatch.setattr(build, "SECONDS", 0.5)
    with pytest.warns(UserWarning, match=WRONG[script]):
        assert library("decode") is None
    assert library("decode") is None  # and no warning, which would be an error here
    assert not list((fresh / "cache").rglob("*.so"))


def test_a_compiler_that_is_named_and_not_there_is_told_of(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.warns(UserWarning, match="there is no no-such-compiler -O2, which CXX names"):
        assert library("decode") is None


def test_a_cache_folder_that_cannot_be_used_is_told_of(fresh, monkeypatch):
    (fresh / "file").write_text("")
    monkeypatch.setenv("INTERMODAL_CACHE", str(fresh / "file"))
    a_compiler(fresh, monkeypatch, "exit 0")
    with pytest.warns(UserWarning, match=r"decode.cpp could not be compiled.*Not a directory"):
        assert library("decode") is None
    build._library.cache_clear()
    monkeypatch.setattr(build, "cache_folder", lambda: Path("~no-such-user").expanduser())
    with pytest.warns(UserWarning, match=r"decode.cpp could not be compiled.*home"):
        assert library("decode") is None


@COMPILED
@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_a_damaged_library_is_compiled_anew(damage, fresh, monkeypatch):
    assert library("resize") is not None
    (file,) = (fresh / "cache").rglob("*.so")
    whole = file.read_bytes()
    monkeypatch.setenv("INTERMODAL_CACHE", str(fresh / "other"))  # of one path a process has one library
    damaged = fresh / "other" / "kernels" / file.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"x" * len(whole))
    build._library.cache_clear()
    if damage == "overwritten":
        with pytest.warns(UserWarning, match="is compiled anew, for it cannot be loaded"):
            assert library("resize") is not None
    else:
        assert library("resize") is not None
    assert damaged.read_bytes()[:4] == b"\x7fELF"
    assert [file.stat().st_size for file in damaged.parent.glob("*.so")] == [len(whole)]


@COMPILED
def test_a_library_is_compiled_once_for_a_processor_and_a_source(fresh, monkeypatch):
    made, run = [], build.subprocess.run
    monkeypatch.setattr(build.subprocess, "run", lambda command, **more: made.append(command[-1]) or run(command, **more))
    with ThreadPoolExecutor(4) as pool:
        assert None not in list(pool.map(library, ["resize"] * 4))
    build._library.cache_clear()
    assert library("resize") is not None
    assert len(made) == 1
    assert sorted(file.suffix for file in (fresh / "cache" / "kernels").iterdir()) == ["", ".so"]
    monkeypatch.setattr(build, "_processor", lambda: b"another one")
    build._library.cache_clear()
    assert library("resize") is not None
    assert len(set(made)) == 2
