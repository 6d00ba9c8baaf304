"""The commands as a shell and torchrun start them: ranks, signals, exit codes. Every wait has an end: a dead-lock fails."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import intermodal
from intermodal.config import override
from intermodal.train.contrastive import train
from intermodal.train.recipe import load_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "siglip.py"
STEPS, PATIENCE = 20, 60
# a worker, because a signal to a group of processes reaches it too
SETTINGS = (f"train.steps={STEPS}", "train.threads=1", "train.precision=fp64", "data.batch=16", "data.workers=1")
COMMAND = (sys.executable, "-m", "intermodal")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun():
    """The start of a command on two ranks, as docs/training.md has it; the port is only because other runs may be on this machine."""
    ranks = ("--nproc-per-node", "2", "--master-port", free_port())
    return (Path(sys.executable).with_name("torchrun"), *ranks, "-m", "intermodal")


@pytest.fixture
def start(tmp_path):
    """`start(*words)` begins a command in a process group of its own; what is still alive at the end of a test is ended."""
    begun = []

    def begin(*words, entry=COMMAND, **environment):
        said = tmp_path / f"said-{len(begun)}.txt"  # a file: a pipe stays open as long as anything that a command started
        with said.open("w") as file:
            process = subprocess.Popen(
                [*map(str, (*entry, *words))],
                stdout=subprocess.DEVNULL,
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
        process.said = said
        begun.append(process)
        return process

    yield begin
    for process in begun:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks, by force after 30 seconds
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def start_training(start, out, *words, **settings):
    return start("train", RECIPE, "--tiny", *SETTINGS, *words, "--out", out, **settings)


def end_of(process):
    """The exit code and what was said on stderr."""
    return process.wait(PATIENCE), process.said.read_text()


def logged(out):
    """The steps that a run has logged."""
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def wait_for_step(process, out, step):
    until = time.monotonic() + PATIENCE
    while max(logged(out), default=0) < step:
        assert process.poll() is None, f"ended before step {step}: {process.said.read_text()}"
        assert time.monotonic() < until, f"no step {step} in {PATIENCE} seconds"
        time.sleep(0.005)


def stopped_steps(out, said):
    """The steps at which the processes say they stopped, each with how to go on; the newest checkpoint is of the first of them."""
    lines = [line for line in said.splitlines() if line.startswith("error: stopped")]
    assert lines, said
    assert all("--resume" in line for line in lines)
    steps = [int(re.search(r"step (\d+) of", line)[1]) for line in lines]
    assert max(folder.name for folder in (out / "checkpoints").iterdir()) == f"step-{steps[0]:08d}"  # nor a ".partial"
    assert steps[0] < STEPS
    return steps


def weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same recipe in one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("alone")
    train_here(out)
    return out


def train_here(out, **settings):
    train(override(load_recipe(RECIPE, tiny=True), SETTINGS), out, console=Console(quiet=True), quiet=True, **settings)


def assert_trained_as(alone, out):
    """One run folder, written by one process, with a model that loads and has the weights of one process."""
    assert logged(out) == list(range(1, STEPS + 1))
    assert [file.name for file in out.rglob("metrics*.jsonl")] == ["metrics.jsonl"]
    assert intermodal.load(out / "model").embed_texts(["a dog"]).isfinite().all()
    assert weights(alone).keys() == weights(out).keys()
    for name, wanted in weights(alone).items():
        torch.testing.assert_close(weights(out)[name], wanted, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_torchrun_trains_what_one_process_does(start, alone, tmp_path):
    """The batch is over all ranks, so two of them make the same steps."""
    code, said = end_of(start_training(start, tmp_path / "run", entry=torchrun()))
    assert code == 0, said
    assert_trained_as(alone, tmp_path / "run")


def test_torchrun_passes_a_stop_to_all_ranks_and_the_same_command_goes_on(start, alone, tmp_path):
    """SIGTERM to torchrun, on sharded weights: both ranks save the same step in time, and the resumed run ends as one process does."""
    out, sharded = tmp_path / "run", "train.parallel=fsdp"
    process = start_training(start, out, sharded, entry=torchrun())
    wait_for_step(process, out, 1)
    process.terminate()
    code, said = end_of(process)
    assert code != 0
    first, second = stopped_steps(out, said)
    assert first == second
    code, said = end_of(start_training(start, out, sharded, "--resume", entry=torchrun()))
    assert code == 0, said
    assert_trained_as(alone, out)


def test_a_stop_of_one_rank_stops_all(start, alone, tmp_path):
    """SIGTERM to one of two ranks: the other does not wait for it for ever but stops at the same step; one process can go on."""
    out, port = tmp_path / "run", free_port()
    ranks = [
        start_training(start, out, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in "01"
    ]
    wait_for_step(ranks[0], out, 1)
    ranks[1].terminate()
    (code, said), (other_code, other_said) = map(end_of, ranks)
    assert (code, other_code) == (130, 130), said + other_said
    assert stopped_steps(out, said) == stopped_steps(out, other_said)
    train_here(out, resume=True)
    assert_trained_as(alone, out)


def test_a_run_stopped_twice_ends_as_one_that_was_not_bit_for_bit(start, alone, tmp_path):
    """Ctrl-C, which a terminal sends to the whole group of processes, then SIGTERM, then the rest."""
    out, resume, done = tmp_path / "run", (), 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start_training(start, out, *resume)
        wait_for_step(process, out, done + 1)
        os.killpg(process.pid, number)
        code, said = end_of(process)
        assert code == 130, said
        assert number.name in said
        (step,) = stopped_steps(out, said)
        assert step > done
        resume, done = ("--resume",), step
    code, said = end_of(start_training(start, out, *resume))
    assert code == 0, said
    assert logged(out) == list(range(1, STEPS + 1))
    assert weights(alone).keys() == weights(out).keys()
    for name, wanted in weights(alone).items():
        assert torch.equal(weights(out)[name], wanted), name


@pytest.mark.parametrize(
    "words",
    [
        ("train", "no-such-recipe.py"),
        ("train", RECIPE, "--tiny", "--resume", "--out", "{empty}"),
        ("eval", "{empty}", "scenes:core"),
        ("eval", "{empty}", "--template", "a {{}}"),
        ("eval", "{empty}", "--task", "zeroshot", "--template", "a {{}}", "--templates", "openai"),
        ("search", "{empty}", "{empty}", "a dog", "--device", "meta"),
        ("data", "preview", "sprites:core", "--out", "{empty}/x.xyz"),
    ],
    ids=[
        "no recipe",
        "nothing to resume",
        "no model",
        "the other task's",
        "two kinds of templates",
        "no device",
        "no picture format",
    ],
)
def test_an_error_of_the_users_is_one_line_and_code_1(start, tmp_path, words):
    """However narrow the terminal is."""
    code, said = end_of(start(*(str(word).format(empty=tmp_path) for word in words), COLUMNS="40"))
    assert code == 1
    assert said.startswith("error:")
    assert said.endswith("\n")
    assert said.count("\n") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_data_worker_is_one_line_and_ends_the_run(start, tmp_path, workers):
    """And is not waited for: workers outlive the first signal, also that by which Python ends them."""
    with tarfile.open(tmp_path / "bare.tar", "w") as shard:
        for number in range(60):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(picture, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(picture.getvalue())
            shard.addfile(member, io.BytesIO(picture.getvalue()))
    data = (f'data.train=["{tmp_path / "bare.tar"}","scenes:core"]', "data.weights=[0.5,0.5]", f"data.workers={workers}")
    code, said = end_of(start_training(start, tmp_path / "run", *data))
    assert code == 1
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "were unusable" in lines[0]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "words",
    [
        ("train", RECIPE, "--no-such-option"),
        ("train",),
        ("no-such-verb",),
        ("data", "no-such-verb"),
        ("eval", "x", "--count", "many"),
    ],
    ids=["unknown option", "missing argument", "unknown verb", "unknown second verb", "a value that does not fit"],
)
def test_a_wrong_command_line_is_code_2(start, words):
    code, said = end_of(start(*words))
    assert code == 2, said
