"""Drafts learn from what a target writes: what is written, what is learned, and runs that are ended and go on."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import eagle_heads
import pytest
import torch
from llamas import EAGER, llama
from safetensors.torch import load_file

import treespec_compiler as treespec
from treespec_compiler.errors import InvalidOption, UnreadableModel
from treespec_compiler.program.tree_program import tree_program
from treespec_compiler.training.acceptance import HeldOut, acceptance, shifted
from treespec_compiler.training.boosted import _whole, covered
from treespec_compiler.training.losses import cross_entropy, rows_of
from treespec_compiler.training.manifest import claim
from treespec_compiler.training.material import BoostPlan, DraftPlan
from treespec_compiler.training.run import train_draft
from treespec_compiler.training.students.eagle3 import eagle3
from treespec_compiler.training.students.heads import HeadPlan, HeadSizes, commonest, default_taps
from treespec_compiler.training.students.parallel import parallel
from treespec_compiler.training.students.small import SmallPlan
from treespec_compiler.training.texts import Shelf
from treespec_compiler.training.training import TrainingPlan, texts_of
from treespec_compiler.training.writing import WritingPlan, write

PROMPTS = [[(7 * i + 3 * k * k) % 64 for k in range(4 + i % 5)] for i in range(14)]
WRITING = WritingPlan(new_tokens=20, likeliest=8, at_once=4)
PLAN = DraftPlan(
    "eagle3",
    WRITING,
    TrainingPlan(steps=10, texts_a_step=2, evaluate_every=4, held_out=3, checkpoint_seconds=0.0),
    HeadPlan(depth=3, vocabulary=48, intermediate=48),
    SmallPlan(layers=1, hidden=16, heads=2, depth=3),
)


@pytest.fixture(scope="module")
def target():
    """Its next token depends on the last one alone, so that a few texts teach what others go on with."""
    model = llama(1, vocab=64, hidden=32, layers=3)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def program(target):
    return tree_program(target, options=EAGER)


@pytest.fixture(scope="module")
def written(program, tmp_path_factory):
    """Files of texts, behind all prompts."""
    taps = [f"hidden:{k}" for k in default_taps(3)]
    return write(program, PROMPTS, tmp_path_factory.mktemp("texts"), taps, WRITING)


def test_what_is_written_is_the_targets_own(target, written):
    shelf, target = (
        Shelf(written),
        copy.deepcopy(target),
    )  # generate() leaves attributes, for which it were converted anew
    assert len(shelf) == 14 and len(written) == 4
    for number in (0, 5, 13):
        text, prompt = shelf.read(number), PROMPTS[number]
        with torch.no_grad():
            wanted = target.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0]
            answer = target(wanted[None], output_hidden_states=True)
        assert text.prompt == len(prompt) and text.tokens.tolist() == wanted[:-1].tolist()
        hidden = torch.cat([answer.hidden_states[k][0, :-2] for k in default_taps(3)], -1)
        assert text.hidden.shape == hidden.shape
        torch.testing.assert_close(text.hidden, hidden, rtol=1e-2, atol=1e-2)
        logs, ids = answer.logits[0, len(prompt) : -2].log_softmax(-1).topk(8)
        assert text.roots == len(wanted) - 2 - len(prompt) == 18
        assert (text.ids == ids).float().mean() > 0.95  # of equal ones, another may come first
        torch.testing.assert_close(text.log_probabilities, logs, rtol=1e-2, atol=1e-2)
        assert text.ids[:, 0].tolist() == wanted[len(prompt) + 1 : -1].tolist()


def test_files_that_are_there_are_kept_and_others_written_again(program, written):
    folder, taps = written[0].parent, [f"hidden:{k}" for k in default_taps(3)]
    before = [file.read_bytes() for file in written]
    stamps = [file.stat().st_mtime_ns for file in written]
    written[2].unlink()
    assert write(program, PROMPTS, folder, taps, WRITING) == written
    assert [file.read_bytes() for file in written] == before
    assert [file.stat().st_mtime_ns == stamp for file, stamp in zip(written, stamps, strict=True)].count(False) == 1
    with pytest.raises(InvalidOption, match="new_tokens 20 there, 24 here"):
        write(program, PROMPTS, folder, taps, replace(WRITING, new_tokens=24))
    with pytest.raises(InvalidOption, match="prompts"):
        write(program, PROMPTS[1:], folder, taps, WRITING)


def test_answers_of_one_token_teach_nothing(program, tmp_path):
    files = write(program, PROMPTS[:2], tmp_path, [], WritingPlan(new_tokens=1))
    assert len(Shelf(files)) == 0


def head(target, program, written, make=eagle3, seed=0):
    """A student whose every weight says something."""
    plan, embedding = PLAN.head, target.get_input_embeddings().weight
    sizes = HeadSizes.of(program, embedding, plan)
    ids = commonest(Shelf(written).answers(), plan.vocabulary, sizes.vocab)
    student = make(sizes, embedding, target.get_output_embeddings().weight, ids, plan, seed)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in student.weights.values():
            weight += 0.2 * torch.randn(weight.shape, generator=draw)
    return student


@pytest.mark.parametrize("make", [eagle3, parallel], ids=["eagle3", "parallel"])
def test_a_head_in_training_computes_what_it_does_in_decoding(target, program, written, monkeypatch, make):
    """Each root's row at each depth, against the reference on that root's path alone."""
    student, text = head(target, program, written, make), Shelf(written).read(3)
    config = student._config
    for name in ("HEADS", "KV_HEADS", "HEAD_DIM"):
        key = {"HEADS": "num_attention_heads", "KV_HEADS": "num_key_value_heads", "HEAD_DIM": "head_dim"}[name]
        monkeypatch.setattr(eagle_heads, name, config[key])
    weights = {**student.weights, "embed_tokens.weight": target.get_input_embeddings().weight}
    weights = {name: weight.detach() for name, weight in weights.items()}
    logits, tokens = student.logits(text), text.tokens.tolist()
    assert [len(each) for each in logits] == [18, 17, 16]
    for depth, root in [(0, 0), (0, 17), (1, 0), (1, 7), (2, 0), (2, 15)]:
        known = text.prompt + root + 1
        hidden = list(text.hidden[: known - 1].split(32, -1))
        wanted = eagle_heads.reference(config, weights, hidden, tokens[:known], tokens[known : known + depth])
        found = logits[depth][root].double()
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max(), (depth, root)


def test_the_loss_is_the_cross_entropy_with_what_is_known(target, program, written):
    student, text = head(target, program, written), Shelf(written).read(3)
    total = 0.0
    for depth, logits in enumerate(student.logits(text)):
        whole = torch.full((len(logits), 64), -torch.inf)
        whole[:, student._ids] = logits.detach()
        q, p = whole.log_softmax(-1), torch.zeros(len(logits), 64)
        p.scatter_(1, text.ids[depth:], text.log_probabilities[depth:].exp())
        p[:, [i for i in range(64) if i not in set(student._ids.tolist())]] = 0.0
        each = -(p * q.masked_fill(p == 0, 0.0)).sum()
        total += float(each) * 0.8**depth / (1 + 0.8 + 0.64)
    assert float(student.loss(text).detach()) == pytest.approx(total, rel=1e-4)
    twice = replace(text, counts=torch.full((text.roots,), 2.0))
    assert float(student.loss(twice).detach()) == pytest.approx(2 * total, rel=1e-4)


def test_cross_entropy_leaves_out_what_has_no_row():
    logits = torch.tensor([[1.0, 2.0, 0.5]], requires_grad=True)
    ids, logs = torch.tensor([[2, -1]]), torch.tensor([[0.25, 0.75]]).log()
    loss = cross_entropy(logits, ids, logs)
    assert float(loss.detach()) == pytest.approx(-0.25 * float(logits.detach().log_softmax(1)[0, 2]))
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert rows_of(torch.tensor([1, 3]), 5).tolist() == [-1, 0, -1, 1, -1] and rows_of(None, 5) is None


def test_acceptance_counts_guesses_before_the_first_wrong_one():
    hits = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()  # the last root's text ends sooner
    assert acceptance([hits]) == HeldOut(2.0, (2 / 3, 1 / 2), 3)
    assert acceptance([]) == HeldOut(1.0, (), 0)
    assert shifted(torch.tensor([True, False, True]), 2).tolist() == [[True, False], [False, True], [True, False]]


def test_every_text_is_learned_from_before_any_comes_again():
    plan = TrainingPlan(texts_a_step=3, seed=5)
    seen = [index for step in range(10) for index in texts_of(step, 10, plan)]
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10] != seen[10:20] and texts_of(7, 10, plan) == seen[21:24]


def test_the_commonest_ids():
    answers = [torch.tensor([5, 5, 2]), torch.tensor([2, 5, 7])]
    assert commonest(answers, 2, 9).tolist() == [2, 5] and commonest(answers, 4, 9).tolist() == [0, 2, 5, 7]
    assert commonest(answers, 9, 9) is None
    assert default_taps(30) == (2, 15, 27) and default_taps(4) == (1, 2, 3) and default_taps(1) == (0,)


class Killed(Exception):
    pass


def killed_at(*events):
    """Ends a run at each of these events, (stage, number), once."""
    left = list(events)

    def tell(told):
        if left and (told.stage, told.done) == left[0]:
            del left[0]
            raise Killed

    return tell


@pytest.mark.parametrize("kind", ["eagle3", "parallel", "small"])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(program, tmp_path, kind):
    plan = replace(PLAN, kind=kind)
    train_draft(program, PROMPTS, tmp_path / "whole", plan)
    tell = killed_at(
        ("the target writes", 1), ("the target writes what is held out", 0), ("training", 3), ("training", 7)
    )
    # from its beginning, in the middle of an interval, and behind a step whose checkpoint is lost
    parts = replace(plan, training=replace(plan.training, checkpoint_seconds=0.0))
    for _ in range(4):
        with pytest.raises(Killed):
            train_draft(program, PROMPTS, tmp_path / "parts", parts, tell=tell)
    train_draft(program, PROMPTS, tmp_path / "parts", parts, tell=tell)
    for name in ("model.safetensors", "curve.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


@pytest.mark.parametrize("kind", ["eagle3", "parallel"])
def test_a_head_learns_and_is_read_by_its_name(target, program, tmp_path, kind):
    plan = replace(PLAN, kind=kind, training=replace(PLAN.training, steps=60, evaluate_every=30, rate=5e-3))
    measured = train_draft(program, PROMPTS * 2, tmp_path, plan)
    before, after = measured[0].held_out.tokens_per_step, measured[-1].held_out.tokens_per_step
    assert after > before + 0.8
    assert measured[-1].loss < measured[1].loss
    card = json.loads((tmp_path / "config.json").read_text())
    assert card["training"]["tokens_per_step"] == pytest.approx(after, abs=1e-3)
    assert "embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    # its own training prompts, in decoding: what was measured is what it is
    plain = {"max_new_tokens": 20, "options": EAGER}
    accepted = []
    for prompt in PROMPTS[:6]:
        wanted = treespec.generate(target, prompt, **plain)
        out = treespec.generate(target, prompt, draft=f"{kind}:{tmp_path}", policy="1,1,1", **plain)
        assert out.sequences.tolist() == wanted.sequences.tolist()
        accepted.append(out.stats.tokens_per_step)
    assert sum(accepted) / 6 > before + 0.8


@pytest.mark.rare
def test_a_small_model_learns_and_is_one_of_transformers(target, program, tmp_path):
    transformers = pytest.importorskip("transformers")
    training = replace(PLAN.training, steps=60, evaluate_every=60, rate=1e-2)
    measured = train_draft(program, PROMPTS, tmp_path, replace(PLAN, kind="small", training=training))
    assert measured[-1].held_out.tokens_per_step > measured[0].held_out.tokens_per_step + 0.1
    draft = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    out = treespec.generate(target, PROMPTS[0], draft=draft, policy="1,1", max_new_tokens=20, options=EAGER)
    assert out.stats.tokens_per_step > 1.0
    assert json.loads((tmp_path / "training.json").read_text())["plan"]["kind"] == "small"
    # a head's texts are as good for it, and it may begin with a model
    head_plan = replace(PLAN, training=replace(PLAN.training, steps=1))
    train_draft(program, PROMPTS, tmp_path / "head", head_plan, data=tmp_path / "texts")
    small = replace(head_plan, kind="small")
    again = train_draft(program, PROMPTS, tmp_path / "more", small, data=tmp_path / "texts", start=draft)
    assert again[0].held_out.tokens_per_step == pytest.approx(measured[-1].held_out.tokens_per_step, abs=0.1)


@pytest.mark.rare
def test_boosted_members_learn_what_those_before_them_do_not_guess(target, program, tmp_path):
    transformers = pytest.importorskip("transformers")
    training = replace(PLAN.training, steps=24, evaluate_every=24, rate=1e-2)
    plan = replace(PLAN, kind="boosted", training=training, boost=BoostPlan(members=2, sample=1))
    measured = train_draft(program, PROMPTS, tmp_path / "whole", plan, data=tmp_path / "texts")
    tell = killed_at(("training member 1", 20), ("training member 2", 0), ("training member 2", 13))
    for _ in range(3):
        with pytest.raises(Killed):
            train_draft(program, PROMPTS, tmp_path / "parts", plan, data=tmp_path / "texts", tell=tell)
    train_draft(program, PROMPTS, tmp_path / "parts", plan, data=tmp_path / "texts", tell=tell)
    for name in ("member-1/model.safetensors", "member-2/model.safetensors", "members.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    # what the first one guesses is left out for the second one, and only that
    first, second = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / f"member-{i}", dtype=torch.float32)
        for i in (1, 2)
    )
    shelf, left = (
        Shelf(sorted((tmp_path / "texts" / "learned").glob("*.safetensors"))),
        load_file(tmp_path / "whole" / "member-1" / "left.safetensors"),
    )
    same, missed, new = 0, 0, 0
    for i in range(len(shelf)):
        text = shelf.read(i)
        with torch.no_grad():
            right = [
                model(text.tokens[None, :-1]).logits[0, text.prompt :].argmax(-1) == text.ids[:, 0]
                for model in (first, second)
            ]
        same += int((left[f"{i}"] == ~right[0]).sum())
        missed += int((~right[0]).sum())
        new += int((right[1] & ~right[0]).sum())
    total = sum(len(left[f"{i}"]) for i in range(len(shelf)))
    assert same >= 0.95 * total, "the member that was saved is rounded to bfloat16"
    assert new > 0.1 * missed, "the second one guesses some of it"
    members = json.loads((tmp_path / "whole" / "members.json").read_text())
    assert [m["members"] for m in members] == [1, 2]
    assert members[1]["tokens_per_step"] == round(measured[-1].held_out.tokens_per_step, 3)
    assert members[1]["tokens_per_step"] >= members[0]["tokens_per_step"]
    out = treespec.generate(
        target, PROMPTS[0], draft=[first.eval(), second.eval()], policy="1,1", max_new_tokens=20, options=EAGER
    )
    assert out.stats.tokens_per_step > 1.0


def test_a_sample_is_what_a_member_guesses_whole():
    hits = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 0]]).bool()
    assert _whole(hits).tolist() == [True, False, False, True]  # behind the last root there is one token
    left = torch.tensor([False, True, False, False, True])
    assert covered(left, 1).tolist() == left.tolist()
    assert covered(left, 3).tolist() == [False, True, True, True, True]
    assert covered(left[:2], 5).tolist() == [False, True]


def test_a_folder_of_a_run_with_other_prompts_is_refused(program, tmp_path):
    claim(tmp_path / "run.json", {"prompts": "others"}, "out")
    with pytest.raises(InvalidOption, match="another run"):
        train_draft(program, PROMPTS, tmp_path, PLAN)


def spoiled(folder, name, content=b"no such thing"):
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda f: {"plan": replace(PLAN, kind="large")},
            InvalidOption,
            "'large', expected eagle3 or small or parallel or boosted",
        ),
        (lambda f: {"prompts": PROMPTS[:1]}, InvalidOption, "0 held out"),
        (
            lambda f: {"plan": replace(PLAN, training=replace(PLAN.training, memory_mb=0))},
            InvalidOption,
            "memory: got 0, expected 1 at least",
        ),
        (lambda f: {"plan": replace(PLAN, head=replace(PLAN.head, taps=(1, 9)))}, InvalidOption, "from 0 to 3"),
        (
            lambda f: {"plan": replace(PLAN, kind="boosted", boost=BoostPlan(2, 9))},
            InvalidOption,
            "sample: got 9, expected 1 to 3",
        ),
        (lambda f: spoiled(f, "checkpoint.pt"), UnreadableModel, "this run's checkpoint"),
        (lambda f: spoiled(f, "run.json"), UnreadableModel, "what a run was asked for"),
    ],
    ids=["kind", "too few", "memory", "taps", "sample", "checkpoint", "record"],
)
def test_what_is_refused(program, written, tmp_path, change, error, words):
    given = {"prompts": PROMPTS, "plan": PLAN, **(change(tmp_path) or {})}
    with pytest.raises(error, match=words):
        train_draft(program, given["prompts"], tmp_path, given["plan"])


def test_a_file_that_is_none_of_texts(tmp_path):
    spoiled(tmp_path, "00000.safetensors")
    with pytest.raises(UnreadableModel, match="a file of texts"):
        Shelf([tmp_path / "00000.safetensors"])
