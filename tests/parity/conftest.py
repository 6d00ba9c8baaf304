import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import hf_checkpoints as hf
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(case) -> (directory that transformers wrote, the transformers model). Read only: tests that edit copy it first."""
    made = {}

    def make(case: str):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            model = hf.build(case)
            model.save_pretrained(folder)
            made[case] = (folder, model)
        return made[case]

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """whole(family) -> (directory with weights, image processor and tokenizer, the transformers model, its image processor, its
    tokenizer). Read only."""
    made = {}

    def make(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(f"whole-{family}")
            made[family] = (folder, *hf.save_whole(family, folder))
        return made[family]

    return make
