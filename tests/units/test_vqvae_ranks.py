"""A VQ-VAE over two ranks is that of a single one: revived codes, the entropy term, the critic, the log; a resume, and a NaN on one."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intermodal.config import override
from intermodal.parallel.setup import World
from intermodal.train.codebook import drawn
from intermodal.train.loop import NotFinite, Stopped
from intermodal.train.recipe import load_recipe
from intermodal.train.vqvae import VQTrainer, train_vqvae

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from ranks import on_ranks

RECIPE = Path(__file__).parents[2] / "recipes" / "vqvae.py"
CRITIC = ("adversarial.weight=0.5", "adversarial.start=1", "adversarial.width=8")
SETTINGS = {
    "revived codes": (),
    "entropy": ("codebook.entropy=0.1",),
    "critic": CRITIC,
}


def recipe_of(*changes):
    made = load_recipe(RECIPE, tiny=True)
    made = replace(made, held_out=(), train=replace(made.train, steps=4, threads=1, precision="fp64", log_every=1, save_every=2))
    return override(made, ["codebook.revive=2", *changes])


def all_settings(rank, size, out):
    """The trained model and the critic of each setting."""
    critics, step = {}, VQTrainer._train_step

    def watched(self, fetched, logging):
        values = step(self, fetched, logging)
        critics["now"] = (
            {} if self.model.critic is None else {k: v.detach().clone() for k, v in self.model.critic.state_dict().items()}
        )
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQTrainer, "_train_step", watched)
        found = {}
        for name, changes in SETTINGS.items():
            vq = train_vqvae(recipe_of(*changes), f"{out}/{name}", quiet=True)
            found[name] = {**vq.state_dict(), **{f"critic.{key}": value for key, value in critics["now"].items()}}
        found["resumed"] = stopped_and_resumed(step, f"{out}/resumed")
        found["broken"] = broken_on_the_last_rank(rank, size, step, f"{out}/broken") if size > 1 else None
    return found


def stopped_and_resumed(step, out):
    def stopping(self, fetched, logging):
        values = step(self, fetched, logging)
        if self.step == 1:
            self.asked_to_stop = "test"
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQTrainer, "_train_step", stopping)
        with pytest.raises(Stopped):
            train_vqvae(recipe_of(*CRITIC), out, quiet=True)
    return train_vqvae(recipe_of(*CRITIC), out, resume=True, quiet=True).state_dict()


def broken_on_the_last_rank(rank, size, step, out):
    def breaking(self, fetched, logging):
        if rank + 1 == size:
            fetched.pixels[:] = float("nan")
            Path(out, "keys.json").write_text(json.dumps(fetched.keys))
        return step(self, fetched, logging)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQTrainer, "_train_step", breaking)
        with pytest.raises(NotFinite) as caught:
            train_vqvae(recipe_of(), out, quiet=True)
    return str(caught.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one rank and what each of two ranks made, and where."""
    folder = tmp_path_factory.mktemp("ranks")
    return all_settings(0, 1, str(folder / "one")), on_ranks(2, all_settings, str(folder / "two")), folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_train_what_one_does(name, runs):
    one, two, folder = runs
    for key, value in one[name].items():
        assert torch.equal(two[0][name][key], two[1][name][key]), f"the ranks' {key} differ"
        torch.testing.assert_close(two[0][name][key], value, atol=1e-6, rtol=0, msg=key)
    rows = [
        [json.loads(line) for line in (folder / ranks / name / "metrics.jsonl").read_text().splitlines()]
        for ranks in ("one", "two")
    ]
    assert rows[0][0]["revived"] > 0
    assert ("told_apart" in rows[0][-1]) == (name == "critic")
    for alone, together in zip(*rows, strict=True):
        for key in alone.keys() - {"samples_per_second"}:
            assert together[key] == pytest.approx(alone[key], rel=1e-5), key


def test_a_resume_on_two_ranks_has_the_critic_that_the_run_had(runs):
    _, two, _ = runs
    for key, value in two[0]["critic"].items():
        if not key.startswith("critic."):
            assert torch.equal(two[0]["resumed"][key], value), key


def test_what_is_not_finite_is_told_of_the_rank_that_has_it(runs):
    _, two, folder = runs
    run = folder / "two" / "broken"
    keys = json.loads((run / "keys.json").read_text())
    for told, whose in zip((two[0]["broken"], two[1]["broken"]), ("rank 1's", "this rank's"), strict=True):
        assert told.startswith(f"the loss is nan at step 1; {whose} samples: {', '.join(keys[:8])}")
    assert json.loads((run / "not-finite-1.json").read_text())["samples"] == keys
    assert not (run / "not-finite-0.json").exists()


def test_latents_are_drawn_of_all_ranks_as_one_rank_draws_them():
    latents = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    wanted = drawn(latents, 20, World())
    for ours in on_ranks(2, drawn_on_rank, latents):
        assert torch.equal(ours, wanted)
    assert any(torch.equal(row, latent) for row in wanted for latent in latents[5:])


def drawn_on_rank(rank, size, latents):
    torch.manual_seed(7 + rank)  # of its own, as in a run; the shares are not of one length
    return drawn(latents[:5] if rank == 0 else latents[5:], 20, World(rank, size))
