"""The demos from end to end, a few steps each: that they run, and that the pages have everything."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_demo(tmp_path):
    from intermodal.evaluate.demo import run_demo
    from intermodal.evaluate.demo_llava import run_llava_demo

    page = run_demo(tmp_path, 0, steps=3)
    run_llava_demo(tmp_path, tmp_path / "model", 0, steps=6)
    results = json.loads((tmp_path / "report.json").read_text())
    assert results["training"]["steps"] == 3
    assert {"core", "all"} == set(results["sprites"])
    text = page.read_text()
    assert "LLaVA on the same tower" in text
    assert text.count("data:image/png") > 20


def test_native_demo(tmp_path):
    from intermodal.evaluate.demo_native import COLUMNS, run_native_demo

    page = run_native_demo(tmp_path, 0, steps=3, count=6, judge_steps=4)
    results = json.loads((tmp_path / "report.json").read_text())
    for name, row in results["judged"].items():
        assert row.keys() == COLUMNS.keys() - ({"place"} if name.endswith("one thing") else set())
        assert all(0 <= value <= 1 for value in row.values())
    assert {"drawn", "real", "random codes"} <= results["judged"].keys()
    assert sum(int(name.split()[2]) for name in results["judged"] if name.startswith("drawn: ")) == 6
    assert results["captions"].keys() == {"exact", "things"}
    assert "In two steps" in page.read_text()
