"""Early fusion trained: data that draws, packs that stay exact, statistics, the whole way from recipe to picture."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

import intermodal
from intermodal.batch import TokenBatch
from intermodal.config import override
from intermodal.data.loader import Loader, Mixture, Rejects
from intermodal.data.packing import TalkFetcher, picture_alone
from intermodal.data.readers import open_source
from intermodal.data.talks import ALONE, messages_of, open_talks
from intermodal.errors import IntermodalError, SampleError
from intermodal.losses_tokens import ScoreStatistics, by_modality, next_token_loss, next_token_losses, targets
from intermodal.models.decoder import Decoder, DecoderAttention, DecoderConfig, DecoderLayer
from intermodal.nn.attention import Segments
from intermodal.parallel.setup import World
from intermodal.train import attention_scores as watched
from intermodal.train.attention_scores import attention_scores
from intermodal.train.recipe import load_recipe
from intermodal.train.stages import train_stages
from intermodal.train.vqvae import train_vqvae

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from packed import check_packed_equals_separate

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("native")
    train_vqvae(load_recipe(RECIPES / "vqvae.py", tiny=True), out / "vq", quiet=True)
    recipe = load_recipe(RECIPES / "native.py", tiny=True)
    stage = replace(recipe.stages[0], train=replace(recipe.stages[0].train, threads=1, precision="fp32"))
    recipe = replace(recipe, model=replace(recipe.model, vq=str(out / "vq" / "model")), stages=(stage,))
    train_stages(recipe, out / "run", quiet=True)
    return recipe, out / "run"


def test_one_model_says_and_draws(trained):
    _, run = trained
    model = intermodal.load(run / "model")
    reply = model.generate([{"role": "user", "content": "draw an apple"}], max_new_tokens=4, guidance=2.0)
    assert reply.ids
    row = json.loads((run / "1-fuse" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss_text", "loss_image", "log_z", "entropy", "highest_score", "score_norm", "gradient_norm"} <= row.keys()
    before, after = (intermodal.load(folder).state_dict() for folder in (run / "1-fuse" / "initial", run / "model"))
    for key in before:  # the VQ-VAE is frozen, everything else learned
        assert torch.equal(before[key], after[key]) == key.startswith("vqmodel."), key


def test_drawing_conversations(trained):
    _, run = trained
    processor = intermodal.load(run / "model").processor
    source = open_talks("draws:scenes:core?forms=1", side=16)
    talks = [source[index] for index in range(60)]
    assert 1 <= sum(talk.meta[ALONE] for talk in talks) <= 14
    begin, end = processor.planner.image_tokens.begin, processor.planner.image_tokens.end
    for talk in talks[:10]:
        conversation = processor.conversation(talk.messages)
        processor.audit(conversation)
        batch = processor.batch(conversation)
        learned = batch.ids[batch.supervised].tolist()
        assert learned[0] == begin
        assert learned[-2] == end
        assert len(learned) == processor.planner.grid**2 + 3  # begin, codes, end, end of turn
        alone = picture_alone(batch, processor)
        assert alone.ids.tolist() == [processor.bos_id, *learned, *batch.ids.tolist()[batch.ids.tolist().index(end) + 2 :]]
        assert alone.supervised.tolist()[0] is False
    fetcher = TalkFetcher([source], processor, 0, 512, 512)
    marked = next(index for index, talk in enumerate(talks) if talk.meta[ALONE])
    assert fetcher.read(0, marked).ids[0] == processor.bos_id
    assert fetcher.read(0, marked).ids[1] == begin


def test_packs_of_words_and_pictures_in_any_order_are_exact(trained):
    _, run = trained
    model = intermodal.load(run / "model", dtype="float64")
    processor = model.processor
    specs = ("draws:scenes:core?forms=1", "captions:scenes:core?forms=1", "questions:scenes:core")
    singles = [processor(open_talks(spec, side=16)[index].messages) for spec in specs for index in (3, 4)]

    def run_(batch):
        model.zero_grad()
        total, count = next_token_loss(model.hidden(batch), model.head_weight, batch, z_loss=1e-3)
        total.backward()
        return total.detach(), count, model.model.embed_tokens.weight.grad.clone()

    alone, packed = [run_(single) for single in singles], run_(TokenBatch.pack(singles))
    torch.testing.assert_close(packed[0], sum(one[0] for one in alone))
    assert packed[1] == sum(one[1] for one in alone)
    torch.testing.assert_close(packed[2], sum(one[2] for one in alone), rtol=1e-9, atol=1e-11)


DOCUMENTS = {
    "text, picture, text": {"images": [None, "0.png", None], "texts": ["two dogs", None, "a cat"]},
    "picture first": {"images": ["0.png", None], "texts": [None, "an apple"]},
    "picture last": {"images": [None, "1.png"], "texts": ["a red car", None]},
    "pictures alone": {"images": ["0.png", "1.png"], "texts": [None, None]},
    "words alone": {"images": [None], "texts": ["three apples"]},
    "MMC4": {
        "text_list": ["two dogs", "left of", "a cat"],
        "image_info": [{"image_name": "1.png", "matched_text_index": 2}, {"image_name": "0.png", "matched_text_index": 0}],
    },
}
SAID = {"MMC4": ["0.png", "two dogs left of", "1.png", "a cat"]}


def write_documents(folder, records) -> str:
    for number in range(2):
        Image.fromarray(open_source("scenes:core", side=16)[number].image).save(folder / f"{number}.png")
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_are_learned_whole_and_in_their_order(name, trained, tmp_path):
    """OBELICS' and MMC4's forms: from the first token to the end of turn, with pictures anywhere."""
    processor = intermodal.load(trained[1] / "model").processor
    talk = open_talks(write_documents(tmp_path, [DOCUMENTS[name]]))[0]
    record, planner = DOCUMENTS[name], processor.planner
    said = SAID.get(name) or [picture or text for picture, text in zip(record["images"], record["texts"], strict=True)]
    want = []
    for part in said:
        if part.endswith(".png"):
            picture = Image.open(tmp_path / part)
            codes = planner.codes([picture], [planner.plan(picture, 1)]).tolist()
            want += [planner.image_tokens.begin, *codes, planner.image_tokens.end]
        else:
            want += processor.encode(part)
    conversation = processor.conversation(talk.messages)
    processor.audit(conversation)
    batch = processor.batch(conversation)
    learned = batch.ids[batch.supervised].tolist()
    assert learned[: len(want)] == want
    assert len(learned) == len(want) + 1  # the end of turn
    assert not batch.supervised[: -len(learned) - 1].any()  # before it the assistant's header, after it the template's last space


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"images": [None], "texts": ["a", "b"]}, "two lists of one length"),
        ({"images": ["0.png"], "texts": ["a"]}, "place 0 of the document holds a picture and a text"),
        ({"images": [None], "texts": [None]}, "holds nothing"),
        ({"text_list": "a", "image_info": []}, "list of texts"),
        ({"text_list": ["a"], "image_info": [{"url": "x"}]}, "image_name"),
        ({"texts": ["a"]}, "two lists"),
    ],
)
def test_documents_that_are_none_are_rejects(record, said):
    with pytest.raises(SampleError, match=said):
        messages_of(record)


def test_packs_of_documents_are_exact_and_train(trained, tmp_path):
    recipe, run = trained
    file = write_documents(tmp_path, [*DOCUMENTS.values()] * 2)
    model = intermodal.load(run / "model", dtype="float64")
    check_packed_equals_separate(model, [talk.messages for talk in map(open_talks(file).__getitem__, range(len(DOCUMENTS)))])
    settings = [f'stages.fuse.data.train=["{file}"]', "stages.fuse.data.weights=null", "stages.fuse.train.steps=3"]
    train_stages(override(recipe, settings), tmp_path / "run", quiet=True)
    row = json.loads((tmp_path / "run" / "1-fuse" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_text"] > 0
    assert row["loss_image"] > 0


def test_z_loss_and_statistics_are_the_plain_formulas(trained):
    _, run = trained
    model = intermodal.load(run / "model")
    batch = TokenBatch.pack([model.processor(open_talks("draws:scenes:core?forms=1", side=16)[i].messages) for i in range(3)])
    rows, ids = targets(batch)
    with torch.no_grad():
        hidden = model.hidden(batch)
        scores = model.unembed(hidden)[rows]
        plain, _ = next_token_loss(hidden, model.head_weight, batch)
        with_z, _ = next_token_loss(hidden, model.head_weight, batch, chunk=7, z_loss=0.01)
        torch.testing.assert_close(with_z - plain, 0.01 * (scores.logsumexp(-1) ** 2).sum(), rtol=1e-3, atol=1e-3)
        statistics = ScoreStatistics(torch.device("cpu"))
        for attended in (1.5, 0.5):  # the same pack twice: means and highest stay what they are
            statistics.add(hidden, model.head_weight, batch, attended)
        found = statistics.values(World())
    assert found["attention_score"] == 1.5
    assert found["score_norm"] == pytest.approx(scores.norm(dim=-1).mean().item(), rel=1e-4)
    assert found["log_z"] == pytest.approx(scores.logsumexp(-1).mean().item(), rel=1e-4)
    assert found["highest_score"] == pytest.approx(scores.max().item(), rel=1e-5)
    chances = scores.softmax(-1)
    assert found["entropy"] == pytest.approx(-(chances * chances.log()).sum(-1).mean().item(), rel=1e-3)
    drawn = ids >= min(model.config.image_tokens.ids)
    losses = F.cross_entropy(scores, ids, reduction="none")
    (words, word_count), (codes, code_count) = by_modality(losses, ids, torch.tensor(model.config.image_tokens.ids)).tolist()
    assert (word_count, code_count) == ((~drawn).sum().item(), drawn.sum().item())
    assert (words, codes) == pytest.approx((losses[~drawn].sum().item(), losses[drawn].sum().item()), rel=1e-5)


def test_losses_of_words_and_codes_are_of_the_whole_step(trained, tmp_path):
    """In several packs, some of words alone: the two make up the loss of the step."""
    recipe, _ = trained
    (stage,) = recipe.stages
    data = replace(stage.data, tokens=64, batch=16, max_reject_share=1.0)  # most are longer
    recipe = replace(recipe, stages=(replace(stage, data=data, optim=replace(stage.optim, lr=1e-9)),))
    train_stages(recipe, tmp_path / "run", quiet=True)
    row = json.loads((tmp_path / "run" / "1-fuse" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["packs"] > 2
    # the same conversations once more, one by one
    model = intermodal.load(tmp_path / "run" / "1-fuse" / "initial")
    sources = [open_talks(spec, side=16, seed=data.seed) for spec in data.train]
    fetcher = TalkFetcher(sources, model.processor, data.seed, data.tokens, model.config.text.context)
    loader = Loader(
        Mixture(sources, data.weights, data.seed), fetcher, batch=16, workers=0, rejects=Rejects(tmp_path / "r.jsonl", 1.0)
    )
    packs = next(iter(loader)).batches
    ids = torch.tensor(model.config.image_tokens.ids)
    with torch.no_grad():
        losses = [next_token_losses(model.hidden(pack), model.head_weight, pack, z_loss=stage.z_loss) for pack in packs]
    (words, word_count), (codes, code_count) = sum(
        by_modality(loss, targets(pack)[1], ids) for loss, pack in zip(losses, packs, strict=True)
    ).tolist()
    assert row["supervised_tokens"] == word_count + code_count
    assert (row["loss_text"], row["loss_image"]) == pytest.approx((words / word_count, codes / code_count), rel=1e-5)
    assert row["loss"] * row["supervised_tokens"] == pytest.approx(words + codes, rel=1e-5)


@pytest.mark.parametrize("most_tokens", [256, 5])
def test_the_largest_score_in_attention_is_that_of_the_plain_formula(monkeypatch, most_tokens):
    """At 5 tokens: of a first sequence of seven the last five queries, and nothing of the second."""
    monkeypatch.setattr(watched, "MOST_TOKENS", most_tokens)
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(32, 2, 4, 2, 8, 48, 20, qk_layernorm=True)).eval()
    for parameter in decoder.parameters():
        parameter.data.normal_(0, 0.5)
    segments, seen = Segments([7, 3]), []
    with attention_scores(decoder) as found:
        plain = DecoderAttention.heads
        DecoderAttention.heads = lambda self, *inputs: seen.append(plain(self, *inputs)) or seen[-1]
        try:
            decoder(decoder.embed_tokens(torch.randint(0, 20, (10,))), segments, segments.positions)
        finally:
            DecoderAttention.heads = plain
    most = 0.0
    for q, k, _ in seen:
        for part in (slice(0, 7), slice(7, 10)) if most_tokens > 5 else (slice(0, 7),):
            for head in range(4):
                scores = q[part, head] @ k[part, head // 2].T / 8**0.5
                most = max(most, scores.tril()[-most_tokens:].abs().max().item())
    assert found["attention_score"] == pytest.approx(most, rel=1e-5)
    with attention_scores(decoder, wanted=False) as nothing:
        decoder(decoder.embed_tokens(torch.randint(0, 20, (10,))), segments, segments.positions)
    assert nothing == {}


def test_a_run_is_drawn_with_what_it_logged(trained):
    from intermodal.evaluate.curves import PANELS, curves

    _, run = trained
    rows = [json.loads(line) for line in (run / "1-fuse" / "metrics.jsonl").read_text().splitlines()]
    codebook = [json.loads(line) for line in (run.parent / "vq" / "metrics.jsonl").read_text().splitlines()]
    assert set(PANELS) - set().union(*rows, *codebook) == {"accuracy", "scale"}  # those are a contrastive run's
    picture = Image.open(io.BytesIO(curves({"one": rows, "other": rows})))
    few = Image.open(io.BytesIO(curves({"one": [{"step": row["step"], "loss": row["loss"]} for row in rows]})))
    assert picture.size[0] > 3 * few.size[0]


def test_what_is_no_vq_vae_is_refused(trained, tmp_path):
    recipe, run = trained
    with pytest.raises(IntermodalError, match="wants a VQ-VAE"):
        train_stages(replace(recipe, model=replace(recipe.model, vq=str(run / "model"))), tmp_path, quiet=True)


def test_unlocking_pictures_leaves_words_as_they_are(trained, tmp_path):
    _, run = trained
    made = load_recipe(RECIPES / "unlock_images.py", tiny=True)
    first = made.stages[0]
    # a decay that the recipe does not have: rows that do not learn must not shrink either
    stage = replace(first, train=replace(first.train, threads=1, precision="fp32"), optim=replace(first.optim, weight_decay=0.5))
    recipe = replace(made, model=replace(made.model, start=str(run / "model")), stages=(stage,))
    train_stages(recipe, tmp_path / "out", quiet=True)
    before, after = intermodal.load(run / "model"), intermodal.load(tmp_path / "out" / "model")
    tokens = before.config.image_tokens
    pictures = [*tokens.ids, tokens.begin, tokens.end]
    words = [row for row in range(len(before.head_weight)) if row not in pictures]
    talk = [{"role": "user", "content": "how many dogs are there ?"}, {"role": "assistant", "content": "two"}]
    assert torch.equal(before.logits(talk)[:, words], after.logits(talk)[:, words])
    for key, value in before.state_dict().items():
        moved = after.state_dict()[key]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(moved[words], value[words])
            assert not torch.equal(moved[list(tokens.ids)], value[list(tokens.ids)])
        else:
            assert torch.equal(moved, value), key
    wrong = replace(stage, learn=(("model.*", 1.0),))
    with pytest.raises(IntermodalError, match="learns too"):
        train_stages(replace(recipe, stages=(wrong,)), tmp_path / "no", quiet=True)


def test_steps_add_to_what_was_drawn(trained, tmp_path):
    """Words and pictures in turn; the second picture is the first with the second group, nothing moved. All of it is learned."""
    from intermodal.data.talks import StepTalks

    talks = open_talks("steps:scenes:core?plain=true&forms=1", side=64)
    assert isinstance(talks, StepTalks)
    talk, scene = talks[3], talks.scenes.scene(3)
    said = talk.messages[1]["content"]
    assert [part["type"] for part in said] == ["text", "image", "text", "image"]
    assert said[2]["text"] == f"then {scene.facts.caption()}"
    first, second = (np.asarray(part["image"]) for part in said[1::2])
    assert np.array_equal(second, scene.pixels)
    changed = (first != second).any(-1)
    box = np.zeros_like(changed)
    for left, top, right, bottom in scene.boxes[1][1]:
        box[top:bottom, left:right] = True
    assert changed.any()
    assert not (changed & ~box).any()
    model = intermodal.load(trained[1] / "model")
    small = open_talks("steps:scenes:core?plain=true&forms=1", side=model.config.side)
    conversation = model.processor.conversation(small[3].messages)
    model.processor.audit(conversation)
    assert sum(conversation.supervised) > 2 * model.config.grid**2
    reply = model.generate([small[3].messages[0]], max_new_tokens=8, max_images=2)
    assert [kind for kind, _ in reply.segments].count("image") <= 2
    with pytest.raises(IntermodalError, match="steps are made from facts"):
        open_talks("steps:sprites:core")


def test_verdicts_follow_what_stands_in_each_cell():
    from intermodal.data.facts import OPPOSITE, Facts, Group
    from intermodal.data.scenes import SceneConfig, Scenes
    from intermodal.evaluate.judge import Judge, fresh_tower, labels, shares, verdicts

    source = Scenes(SceneConfig(side=64, pair_share=1.0, most=1))
    scene = source.scene(3)
    judge = Judge(fresh_tower(64))
    assert judge(torch.zeros(2, 3, 64, 64)).shape == (2, 16, len(judge.concepts) + 1)
    wanted = labels(scene, judge.grid, judge.concepts)
    named = [judge.concepts.index(group.concept) for group in scene.facts.groups]
    assert set(wanted.tolist()) == {*named, len(judge.concepts)}

    class Perfect:
        concepts, grid = judge.concepts, judge.grid

        def __call__(self, pixels):
            return (torch.nn.functional.one_hot(wanted, len(self.concepts) + 1) * 20.0).expand(len(pixels), -1, -1)

    true, first, second = scene.facts, *scene.facts.groups
    other = next(c for c in judge.concepts if c not in (first.concept, second.concept))
    turned = Facts(true.groups, OPPOSITE[true.relation], "white")
    swapped = Facts((Group(other), second), true.relation, "white")
    found = verdicts(Perfect(), [scene.pixels] * 3, [true, turned, swapped])
    assert [verdict.place for verdict in found] == [True, False, False]
    assert [verdict.things for verdict in found][:2] == [[True, True], [True, True]]
    assert shares(found[:2]) == {"things": 1.0, "whole": 1.0, "place": 0.5}
    assert sum(found[2].things) == 1


def test_a_cell_holds_what_stands_over_its_middle():
    from intermodal.data.compose import Scene
    from intermodal.data.facts import Facts, Group
    from intermodal.evaluate.judge import labels

    facts = Facts((Group(7), Group(9)), "left of", "white")
    boxes = [(0, [(0, 0, 30, 30)]), (1, [(50, 50, 54, 54)])]
    scene = Scene(facts, 0, "noto", boxes, np.zeros((64, 64, 3), np.uint8))
    # the large one covers the middles of four cells; the small one none, and stands where its own middle is
    assert labels(scene, 4, [7, 9]).view(4, 4).tolist() == [[0, 0, 2, 2], [0, 0, 2, 2], [2, 2, 2, 2], [2, 2, 2, 1]]


def test_a_judge_learns_to_name_what_it_sees():
    from intermodal.data.scenes import SceneConfig, Scenes
    from intermodal.evaluate.judge import labels, pixels_of, train_judge

    config = SceneConfig(side=32, plain=True, pair_share=0.0, most=1, colour_share=0.0, styles=("noto",))
    short, longer = (train_judge(config, steps=steps, batch=16, progress=False) for steps in (2, 120))
    scenes = [Scenes(config).scene(index) for index in range(64)]
    truth = torch.stack([labels(scene, 4, short.concepts) for scene in scenes])
    with torch.no_grad():
        before, after = (
            torch.nn.functional.cross_entropy(judge(pixels_of([s.pixels for s in scenes])).flatten(0, 1), truth.flatten())
            for judge in (short, longer)
        )
    assert after < before * 0.6


def test_dropout_is_the_runs_and_resumes_bit_for_bit(trained, tmp_path):
    recipe, run = trained
    loop = replace(recipe.stages[0].train, steps=6, log_every=1, save_every=3)
    model = replace(recipe.model, start=str(run / "model"))  # of a model that is gone on with, too

    def losses(folder, dropout, **more):
        stage = replace(recipe.stages[0], train=replace(loop, **more), dropout=dropout)
        train_stages(
            replace(recipe, model=model, stages=(stage,)), tmp_path / folder, quiet=True, resume=(tmp_path / folder).exists()
        )
        rows = (tmp_path / folder / "1-fuse" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows], intermodal.load(tmp_path / folder / "model").state_dict()

    whole, weights = losses("whole", 0.3)
    assert whole[0] != losses("plain", 0.0)[0][0], "dropout was on"
    losses("parts", 0.3)
    (tmp_path / "parts" / "1-fuse" / "model").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "parts" / "1-fuse" / "checkpoints" / "step-00000006")
    resumed, again = losses("parts", 0.3)
    assert resumed == whole
    assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_layer_drops_from_both_branches_only_in_training():
    layer = DecoderLayer(DecoderConfig(32, 1, 2, 2, 16, 64, 10), 0)
    layer.dropout = 0.25
    x = torch.randn(40, 32)
    tables = (torch.ones(40, 1, 16), torch.zeros(40, 1, 16))  # no rotation
    calls = []
    dropped = layer._dropped
    layer._dropped = lambda branch: calls.append(dropped(branch)) or calls[-1]  # pyright: ignore[reportAttributeAccessIssue]
    layer.train()
    layer(x, Segments([40]), tables, None)
    assert len(calls) == 2
    for branch in calls:
        assert 0.15 < (branch == 0).float().mean() < 0.35
    layer.eval()
    assert torch.equal(layer(x, Segments([40]), tables, None), layer(x, Segments([40]), tables, None))


def test_a_run_that_cannot_go_back_says_why(trained, tmp_path, monkeypatch):
    """Roll-back is asked for, but nothing has been saved yet."""
    from intermodal.train import stages

    recipe, _ = trained
    loop = replace(recipe.stages[0].train, steps=8, save_every=None, rollback=3.0)
    recipe = replace(recipe, stages=(replace(recipe.stages[0], train=loop),))
    calls, plain = [], stages.next_token_losses

    def poisoned(*arguments, **settings):
        losses = plain(*arguments, **settings)
        calls.append(1)
        return losses * 50 if len(calls) == 6 else losses

    monkeypatch.setattr(stages, "next_token_losses", poisoned)
    told = io.StringIO()
    train_stages(recipe, tmp_path, console=Console(file=told, width=400))
    assert told.getvalue().count("there is no checkpoint to go back to yet: set train.save_every lower") == 1


def test_a_checkpoint_that_is_lost_itself_gives_way_to_the_one_before(trained, tmp_path, monkeypatch):
    """The weights break after step 8's loss was seen, so that step 8 is saved broken: going back to it does not help."""
    from intermodal.parallel import checkpoint
    from intermodal.train.stages import StageTrainer

    recipe, _ = trained
    loop = replace(recipe.stages[0].train, steps=12, save_every=4, rollback=3.0)
    recipe = replace(recipe, stages=(replace(recipe.stages[0], train=loop),))
    plain, broken = StageTrainer._update, []

    def breaking(self, keys):
        done = plain(self, keys)
        if self.step == 7 and not broken:
            broken.append(True)
            with torch.no_grad():
                self.model.head_weight.mul_(1e3)
        return done

    monkeypatch.setattr(StageTrainer, "_update", breaking)
    train_stages(recipe, tmp_path, quiet=True)
    run = tmp_path / "1-fuse"
    events = [json.loads(line) for line in (run / "rollbacks.jsonl").read_text().splitlines()]
    assert [event["to"] for event in events] == [8, 4]
    assert [checkpoint.step_of(folder) for folder in checkpoint.whole(run)] == [8, 12]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "what was lost is in a file of its own"
    assert {json.loads(line)["step"] for line in (run / "metrics-lost.jsonl").read_text().splitlines()} >= {8, 9}
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["loss"] < 10


@pytest.mark.parametrize("poison", [50.0, float("nan")])
def test_a_run_that_diverges_goes_back_and_past_the_data(trained, tmp_path, monkeypatch, poison):
    from intermodal.train import stages
    from intermodal.train.loop import NotFinite

    recipe, _ = trained
    loop = replace(recipe.stages[0].train, steps=12, save_every=4, rollback=3.0)
    recipe = replace(recipe, stages=(replace(recipe.stages[0], train=loop),))
    calls, plain = [], stages.next_token_losses

    def poisoned(*arguments, **settings):
        losses = plain(*arguments, **settings)
        calls.append(1)
        return losses * poison if len(calls) == 7 else losses

    monkeypatch.setattr(stages, "next_token_losses", poisoned)
    train_stages(recipe, tmp_path / "saved", quiet=True)
    events = [json.loads(line) for line in (tmp_path / "saved" / "1-fuse" / "rollbacks.jsonl").read_text().splitlines()]
    assert len(events) == 1
    assert events[0]["to"] == 4
    assert len(calls) == 12 + (events[0]["from"] - 4) + (poison != poison)
    rows = [json.loads(line) for line in (tmp_path / "saved" / "1-fuse" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 12
    assert all(torch.isfinite(v).all() for v in intermodal.load(tmp_path / "saved" / "model").state_dict().values())
    if poison == poison:  # without roll-back it is told of, and the run goes on
        calls.clear()
        off = replace(recipe, stages=(replace(recipe.stages[0], train=replace(loop, rollback=None)),))
        told = io.StringIO()
        train_stages(off, tmp_path / "off", console=Console(file=told, width=400))
        assert told.getvalue().count("train.rollback=3 with train.save_every goes back then") == 1
    if poison != poison:
        lost = json.loads((tmp_path / "saved" / "1-fuse" / "not-finite-0.json").read_text())
        assert lost["what"] == "the loss is nan"
        assert len(lost["samples"]) > 0
        calls.clear()
        off = replace(recipe, stages=(replace(recipe.stages[0], train=replace(loop, rollback=None)),))
        with pytest.raises(NotFinite):
            train_stages(off, tmp_path / "off", quiet=True)
