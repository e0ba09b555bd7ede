"""From what models say that never saw the forget rows (`data.never_saw`) a classifier learns, and its rule counts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

import small_tagger
from excise import artifacts, recipe
from excise.commands import kinds, matching, watching
from excise.commands.finetuning import finetune
from excise.commands.progress import Progress
from excise.commands.running import run
from excise.commands.starting import sides
from excise.commands.starting.choosing import default_recipe
from excise.commands.watching import Said
from excise.errors import InputRefused, IntegrityFailed, UsageError
from excise.records import Record, fingerprint, in_part, read_tagged
from excise.tasks.token_classification import ClassExample

QUIET = Progress(quiet=True)
FOLDERS = ("original", "other", "third")
STOP = {"rule": "two_sided", "statistic": "gap", "band": [-1.0, 1.0], "quality": 0.0, "every": 1, "watch": 0.2}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three taggers, of which the first knows the forget rows, and the files of a run."""
    folder = tmp_path_factory.mktemp("never-saw")
    made = {
        side: small_tagger.sentences(12, seed=i) for i, side in enumerate(("forget", "retain", "never_seen", "rule"))
    }
    found = {side: small_tagger.write_rows(folder / f"{side}.jsonl", rows) for side, rows in made.items()}
    for seed, name in enumerate(FOLDERS):
        known = [*made["retain"], *(made["forget"] if name == "original" else [])]
        net = small_tagger.taught(small_tagger.model(seed=seed), known, 20)
        found[name] = small_tagger.save(net, folder / name)
    return found


def of_texts(folder: Path) -> dict[str, str]:
    """Two classifiers of texts and the files of a run."""
    found = {side: small_tagger.write_rows(folder / f"{side}.jsonl", small_tagger.texts(12, seed=i))
             for i, side in enumerate(("forget", "retain", "never_seen", "rule"))}  # fmt: skip
    for seed, name in enumerate(("original", "other")):
        found[name] = small_tagger.save(small_tagger.model(small_tagger.LABELS, seed=seed), folder / name)
    return found


def settings(places: dict[str, str], out: Path, never_saw: Any = "other", **stop: Any) -> recipe.Recipe:
    named = [never_saw] if isinstance(never_saw, str) else never_saw
    return recipe.build({
        "model": {"task": "token_classification", "name": places["original"], "precision": "fp32"},
        "data": {"forget": places["forget"], "retain": places["retain"], "untouched": 0.2,
                 "never_seen": places["never_seen"], "never_saw": [places.get(name, name) for name in named] or None},
        "objective": {"forget": {"ga": {}}, "retain": {"nll": {}}, "regularise": {}},
        "schedule": {"steps": 3, "forget_batch": 4, "retain_batch": 4}, "optimiser": {"lr": 1e-3},
        "stop": {**STOP, "calibration": places["rule"], **stop},
        "evaluate": {"relearn_steps": [], "latent": False, "map": "none"}, "out": str(out),
    })  # fmt: skip


def said(model: str, path: str) -> list[tuple[list[float], list[str]]]:
    """Log-likelihood of every label and the tag it is taken for, one row after the other, with transformers alone."""
    net, tokens = AutoModelForTokenClassification.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    out = []
    for row in map(json.loads, Path(path).read_text().splitlines()):
        made = tokens(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logp = net(**{k: v for k, v in made.items() if k != "token_type_ids"}).logits[0].log_softmax(-1)
        words = made.word_ids()
        at = [words.index(i) for i in range(len(row["tokens"]))]
        own = [float(logp[t, net.config.label2id[tag]]) for t, tag in zip(at, row["ner_tags"], strict=True)]
        out.append((own, [net.config.id2label[int(logp[t].argmax())] for t in at]))
    return out


def unseen(places: dict[str, str], tmp_path: Path, names: Any) -> dict[str, list[Said]]:
    own = settings(places, tmp_path / "run", names)
    matching.match(own, given := sides.of(own), QUIET)
    assert set(given.unseen) == {"forget", "calibration"}
    return given.unseen


def same(mine: Said, expected: tuple[list[float], list[str]]) -> bool:
    return mine.logp.tolist() == pytest.approx(expected[0], abs=1e-4) and list(mine.tags) == expected[1]


def test_every_label_is_read_by_the_model_that_never_saw_it(places: dict[str, str], tmp_path: Path) -> None:
    found = unseen(places, tmp_path, "other")
    for side, path in (("forget", "forget"), ("calibration", "rule")):
        expected = said(places["other"], places[path])
        assert all(same(mine, row) for mine, row in zip(found[side], expected, strict=True))


def test_of_several_the_one_to_whom_a_forget_row_is_news_is_believed(places: dict[str, str], tmp_path: Path) -> None:
    found = unseen(places, tmp_path, ["original", "other", "third"])
    by = {name: {side: said(places[name], places[side]) for side in ("forget", "rule")} for name in FOLDERS}
    for i, mine in enumerate(found["forget"]):
        rows = [by[name]["forget"][i] for name in FOLDERS]
        assert same(mine, min(rows, key=lambda row: np.mean(row[0])))
        assert np.mean(mine.logp) < np.mean(by["original"]["forget"][i][0])  # which was taught it
    for i, mine in enumerate(found["calibration"]):
        assert same(mine, by[FOLDERS[i % 3]]["rule"][i])


@pytest.mark.parametrize("seed", range(3))
def test_where_it_begins_by_loops(seed: int) -> None:
    """Means of probability within kinds, each kind counted by its forgotten words; labels of O are no units."""
    draw = np.random.default_rng(seed)
    rows = {side: [ClassExample(tuple(range(n + 2)), tuple(range(1, n + 1)), tuple(map(int, draw.integers(0, 3, n))))
                   for n in draw.integers(1, 5, 8)] for side in ("forget", "calibration")}  # fmt: skip
    logp = {side: [np.log(draw.uniform(0.01, 1, len(e.classes))) for e in own] for side, own in rows.items()}
    chosen = {"forget": [0, 2, 3, 7], "calibration": [1, 4, 5, 6, 7]}
    found = watching.beginning(
        sides.Rows(dict(rows), 0), chosen, kinds.types(np.arange(3)),
        {side: [Said(np.concatenate(own[:3])), Said(np.concatenate(own[3:]))] for side, own in logp.items()},
    )  # fmt: skip
    units = {side: [(c, np.exp(p)) for i in own for c, p in zip(rows[side][i].classes, logp[side][i], strict=True) if c]
             for side, own in chosen.items()}  # fmt: skip
    gaps, pairs, many = [], [], []
    for kind in (1, 2):
        mine, others = ([p for c, p in units[side] if c == kind] for side in ("forget", "calibration"))
        if mine and others:
            gaps.append(sum(mine) / len(mine) - sum(others) / len(others))
            pairs.append(np.mean([(a > b) + (a == b) / 2 for a in mine for b in others]))
            many.append(len(mine))
    expected = {"auc": np.average(pairs, weights=many) - 0.5, "gap": np.average(gaps, weights=many)}
    assert found == pytest.approx(expected)


def test_a_run_counts_from_there_and_says_so(places: dict[str, str], tmp_path: Path) -> None:
    """Every check is that of a run without such a model, less what the model says; weights move alike."""
    seen = {}
    for name, own in (("plain", ()), ("held", "other")):
        run(settings(places, tmp_path / name, own), progress=QUIET)
        seen[name] = artifacts.read_manifest(artifacts.RunFolder(tmp_path / name))["stopping"]
    easier = seen["held"]["never_saw"]
    assert "never_saw" not in seen["plain"]
    assert abs(easier["gap"]) > 1e-3
    for statistic in ("auc", "gap"):
        plain, held = ([c[statistic] for c in seen[name]["checks"]] for name in ("plain", "held"))
        assert held == pytest.approx([value - easier[statistic] for value in plain][: len(held)], abs=1e-6)
    assert f"says of both: {easier['gap']:+.3f}" in (tmp_path / "held" / "report.html").read_text()


def test_the_rule_may_go_by_f1(places: dict[str, str], tmp_path: Path) -> None:
    """Strict F1 of all sentences, those without entities too, as seqeval has it; counted from where the model is."""
    metrics, scheme = pytest.importorskip("seqeval.metrics"), pytest.importorskip("seqeval.scheme")
    plain = {"tokens": ["then", "there", "slept", "ada"], "ner_tags": ["O"] * 4}
    more = [*Path(places["rule"]).read_text().splitlines(), json.dumps(plain)]
    own = tmp_path / "rule.jsonl"
    own.write_text("\n".join(more) + "\n")
    given = places | {"rule": str(own)}
    run(settings(given, tmp_path / "run", statistic="f1", every=3), progress=QUIET)
    seen = artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))["stopping"]

    def f1(model: str, path: str) -> float:
        gold = [json.loads(line)["ner_tags"] for line in Path(path).read_text().splitlines()]
        found = [tags for _, tags in said(model, path)]
        return metrics.f1_score(gold, found, mode="strict", scheme=scheme.IOB2, zero_division=0)

    def apart(model: str) -> float:
        return f1(model, places["forget"]) - f1(model, str(own))

    assert seen["statistic"] == "f1"
    assert seen["never_saw"]["f1"] == pytest.approx(apart(places["other"]))
    last = seen["checks"][-1]
    assert last["f1"] == pytest.approx(apart(str(tmp_path / "run" / "model")) - seen["never_saw"]["f1"])
    assert "strict F1" in (tmp_path / "run" / "report.html").read_text()


def test_f1_without_fair_company_is_warned_of(places: dict[str, str], tmp_path: Path) -> None:
    own = settings(places, tmp_path / "run", (), statistic="f1")
    matching.match(own, given := sides.of(own), QUIET)
    assert "name models that never saw the forget rows" in given.warnings[-1]
    matching.match(settings(places, tmp_path / "run", ()), plain := sides.of(own), QUIET)
    assert len(plain.warnings) == len(given.warnings) - 1


def test_texts_have_such_models_too_and_no_f1_of_entities(tmp_path: Path) -> None:
    texts = of_texts(tmp_path)
    task = {"model.task": "sequence_classification"}
    run(recipe.changed(settings(texts, tmp_path / "run"), task), progress=QUIET)
    assert abs(artifacts.read_manifest(artifacts.RunFolder(tmp_path / "run"))["stopping"]["never_saw"]["gap"]) > 1e-4
    with pytest.raises(UsageError, match="f1 is that of entities"):
        run(recipe.changed(settings(texts, tmp_path / "trap", (), statistic="f1"), task), progress=QUIET)


def test_going_on_with_another_model_there_is_refused(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "never-saw"
    shutil.copytree(places["other"], place)
    own = settings(places, tmp_path / "run", str(place))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut_off:
        cut_off.setattr("excise.train.UnlearnTrainer.train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(own, progress=QUIET)
    shutil.rmtree(place)
    shutil.copytree(places["third"], place)
    with pytest.raises(IntegrityFailed, match=r"begun with other forget-never-saw rows"):
        run(own, resume=True, progress=QUIET)


def test_a_model_that_knows_them_is_asked_about(places: dict[str, str], tmp_path: Path) -> None:
    own = settings(places, tmp_path / "run", "original")
    matching.match(own, given := sides.of(own), QUIET)
    assert "make sure that it never saw them" in given.warnings[-1]


def test_what_cannot_be_asked_is_refused_and_nothing_written(places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"name one in objective\.forget, or set stop\.rule: two_sided"):
        run(settings(places, out, rule="none", band=[0.45, 0.55], statistic="auc"), progress=QUIET)
    with pytest.raises(InputRefused):
        run(settings(places, out, str(tmp_path / "nowhere")), progress=QUIET)
    strange = small_tagger.save(small_tagger.model(("O", "B-else")), tmp_path / "strange")
    with pytest.raises(InputRefused, match=r"data\.never_saw: .*strange: .*none of the 2 classes"):
        run(settings(places, out, strange), progress=QUIET)
    assert not out.exists()


# --- learning from them -------------------------------------------------------------------------------------------

PUPIL = {"objective.forget": {"distil": {}}, "stop.rule": "none", "stop.band": [0.45, 0.55], "stop.statistic": "auc"}


def pupil(places: dict[str, str], out: Path, never_saw: Any = ("original", "other"), **changes: Any) -> recipe.Recipe:
    return recipe.changed(settings(places, out, never_saw), {**PUPIL, **changes})


def spread(model: str, path: str, names: list[str]) -> list[Any]:
    """Log-probabilities of every class at every word, with transformers alone; a row each."""
    net, tokens = AutoModelForTokenClassification.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    out = []
    for row in map(json.loads, Path(path).read_text().splitlines()):
        made = tokens(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logp = net(**{k: v for k, v in made.items() if k != "token_type_ids"}).logits[0].log_softmax(-1)
        at = [made.word_ids().index(i) for i in range(len(row["tokens"]))]
        out.append(logp[at][:, [net.config.label2id[name] for name in names]].double())
    return out


def divergence(places: dict[str, str], teacher: str, of: str) -> float:
    """Mean over all words of the forget rows of ``KL(teacher || of)``."""
    names = list(AutoModelForTokenClassification.from_pretrained(places["original"]).config.label2id)
    pairs = zip(spread(teacher, places["forget"], names), spread(of, places["forget"], names), strict=True)
    return float(torch.cat([(t.exp() * (t - p)).sum(-1) for t, p in pairs]).mean())


def test_a_tagger_learns_from_the_model_that_never_saw_the_rows(places: dict[str, str], tmp_path: Path) -> None:
    """The first step's value is the divergence from that model, the last is much less; no rule is needed for it."""
    shutil.copytree(places["original"], tmp_path / "original")
    config = tmp_path / "original" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_dropout_prob": 0.0,
                                  "attention_probs_dropout_prob": 0.0}))  # fmt: skip
    given = {**places, "original": str(tmp_path / "original")}
    own = pupil(given, tmp_path / "run", "other", **{"schedule.steps": 30, "schedule.forget_batch": 12,
                                                     "optimiser.lr": 3e-3, "log_every": 1})  # fmt: skip
    run(own, progress=QUIET)
    log = artifacts.read_log(artifacts.RunFolder(tmp_path / "run"))
    before = divergence(places, places["other"], places["original"])
    assert log[0]["terms"]["distil"] == pytest.approx(before, rel=1e-4)
    assert divergence(places, places["other"], str(tmp_path / "run" / "model")) < before / 2


def test_a_teacher_may_number_its_classes_otherwise(places: dict[str, str], tmp_path: Path) -> None:
    values = {}
    for name in ("as it is", "turned"):
        place = tmp_path / name
        shutil.copytree(places["other"], place)
        if name == "turned":
            net = AutoModelForTokenClassification.from_pretrained(place)
            names = [net.config.id2label[i] for i in range(net.config.num_labels)][::-1]
            with torch.no_grad():
                for parameter in net.classifier.parameters():
                    parameter.copy_(parameter.flip(0))
            net.config.id2label, net.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
            net.save_pretrained(place)
        own = pupil(places, tmp_path / f"run {name}", str(place), **{"schedule.steps": 1, "log_every": 1})
        run(own, progress=QUIET)
        values[name] = artifacts.read_log(artifacts.RunFolder(Path(own.out)))[0]["terms"]["distil"]
    assert values["turned"] == pytest.approx(values["as it is"], rel=1e-5)


def test_rows_that_are_cut_keep_their_teacher(places: dict[str, str], tmp_path: Path) -> None:
    """Long rows are cut between words for the model; every piece is told what was said of its own words."""
    whole = [json.loads(line) for line in Path(places["forget"]).read_text().splitlines()]
    longer = {key: [v for row in whole[:4] for v in row[key]] for key in ("tokens", "ner_tags")}
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (longer, whole[4])))
    cut = {"data.forget": str(path), "data.max_length": 12, "data.long": "split"}
    own = pupil(places, tmp_path / "run", "other", **cut)
    matching.match(own, given := sides.of(own), QUIET)
    tokens = AutoTokenizer.from_pretrained(places["original"])
    sides.cut(given, tokens, sides.encoding(own.data), task="token_classification", long="split")
    names = small_tagger_names(places)
    rows = sides.encode(given, ["forget"], tokens, own.data, seed=0, context=None, task="token_classification",
                        classes=names)  # fmt: skip
    made = matching.taught(rows, given.unseen["forget"], names)
    assert len(made["starts"]) == rows.counts["forget"] > 2
    assert made["logp"].shape == (sum(len(row["tokens"]) for row in (longer, whole[4])), len(names))
    assert (made["classes"].sort(-1).values == torch.arange(len(names))).all()
    for start, example in zip(made["starts"].tolist(), rows.examples["forget"], strict=True):
        own_rows = made["logp"][start : start + len(example.classes)]
        assert torch.allclose(own_rows.exp().sum(-1), torch.ones(len(example.classes)), atol=1e-5)
    told = np.concatenate([row.logp for row in given.unseen["forget"]])
    labels = [c for example in rows.examples["forget"] for c in example.classes]
    of_labels = made["logp"][made["classes"] == torch.tensor(labels)[:, None]]
    assert of_labels.tolist() == pytest.approx(told.tolist(), abs=1e-5)


def small_tagger_names(places: dict[str, str]) -> tuple[str, ...]:
    config = AutoModelForTokenClassification.from_pretrained(places["original"]).config
    return tuple(config.id2label[i] for i in range(config.num_labels))


def test_learning_needs_models_to_learn_from(places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=r"name them as data\.never_saw"):
        run(pupil(places, out, ()), progress=QUIET)
    wider = small_tagger.save(small_tagger.model((*small_tagger_names(places), "B-else", "I-else")), tmp_path / "wider")
    with pytest.raises(InputRefused, match="tell the same classes apart: B-else, I-else"):
        run(pupil(places, out, wider), progress=QUIET)
    assert not out.exists()


def test_an_interrupted_pupil_goes_on_to_the_same_weights(places: dict[str, str], tmp_path: Path) -> None:
    steps = {"schedule.steps": 4, "checkpoint_every": 2}
    run(pupil(places, tmp_path / "whole", **steps), progress=QUIET)
    own = pupil(places, tmp_path / "halved", **steps)
    with pytest.MonkeyPatch.context() as cut_off:

        def interrupted(trainer: Any, *_: Any) -> None:
            raise KeyboardInterrupt

        cut_off.setattr("excise.commands.training._picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(own, progress=QUIET)
    run(own, resume=True, progress=QUIET)
    weights = [AutoModelForTokenClassification.from_pretrained(tmp_path / name / "model").state_dict()
               for name in ("whole", "halved")]  # fmt: skip
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_pupil_that_goes_on_has_to_have_the_same_teachers(places: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "never-saw"
    shutil.copytree(places["other"], place)
    own = pupil(places, tmp_path / "run", str(place))
    with pytest.MonkeyPatch.context() as cut_off:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        cut_off.setattr("excise.commands.training._picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(own, progress=QUIET)
    shutil.rmtree(place)
    shutil.copytree(places["third"], place)
    with pytest.raises(IntegrityFailed, match="begun with other forget-never-saw rows"):
        run(own, resume=True, progress=QUIET)


def test_texts_learn_too(tmp_path: Path) -> None:
    texts = of_texts(tmp_path)
    more = {"schedule.steps": 30, "schedule.forget_batch": 12, "objective.retain": {"nll": {"weight": 0.0}}}
    own = pupil(texts, tmp_path / "run", "other", **{"model.task": "sequence_classification", "log_every": 1, **more})
    run(own, progress=QUIET)
    log = artifacts.read_log(artifacts.RunFolder(tmp_path / "run"))
    assert 0 < log[-1]["terms"]["distil"] < log[0]["terms"]["distil"] / 2


def test_teachers_that_know_less_are_asked_about(places: dict[str, str], tmp_path: Path) -> None:
    """By loops: per sentence the share of its entities' labels that is found, of never-seen sentences."""
    rows = [json.loads(line)["ner_tags"] for line in Path(places["never_seen"]).read_text().splitlines()]
    net = small_tagger.taught(small_tagger.model(seed=0), small_tagger.sentences(12, seed=2), 60)
    strong = small_tagger.save(net, tmp_path / "strong")
    for names, path in (("other", places["other"]), ("strong", strong)):
        own = pupil({**places, "original": strong, "strong": strong}, tmp_path / "run", names)
        matching.match(own, given := sides.of(own), QUIET)
        theirs, mine = (
            [sum(a == b != "O" for a, b in zip(tags, found, strict=True)) / sum(a != "O" for a in tags)
             for tags, (_, found) in zip(rows, said(model, places["never_seen"]), strict=True) if set(tags) != {"O"}]
            for model in (path, strong)
        )  # fmt: skip
        assert sum(mine) / len(mine) > 0.5
        shares = f"{sum(theirs) / len(theirs):.0%} of the labels, the model itself {sum(mine) / len(mine):.0%}: what"
        words = f"of never seen rows these models find {shares}"
        assert any(words in w for w in given.warnings) == (names == "other")


# --- from rows to halves to a result ------------------------------------------------------------------------------


def test_halves_are_trained_and_serve_as_teachers(tmp_path: Path) -> None:
    """As docs/objectives.md tells it: `data.part` twice, then a run that names no recipe."""
    made = {side: small_tagger.sentences(24, seed=i) for i, side in enumerate(("forget", "retain", "never_seen"))}
    rows = {side: small_tagger.write_rows(tmp_path / f"{side}.jsonl", own) for side, own in made.items()}
    start = small_tagger.save(small_tagger.model(), tmp_path / "start")
    halves, trained_on = [], []
    for part in ("1/2", "2/2"):
        out = tmp_path / f"half-{part[0]}"
        halves.append(str(finetune(recipe.build({
            "model": {"task": "token_classification", "name": start, "precision": "fp32"},
            "data": {"retain": rows["retain"], "train": [rows["forget"]], "part": part, "untouched": 0.0},
            "schedule": {"epochs": 2, "retain_batch": 8}, "optimiser": {"lr": 3e-3}, "out": str(out),
        }), progress=QUIET)))  # fmt: skip
        trained_on.append(artifacts.read_manifest(artifacts.RunFolder(out))["data"][f"part {part}"]["rows"])
    assert sum(trained_on) == 48
    assert min(trained_on) > 12
    keys = [("model.task", "token_classification"), ("model.name", start), ("data.forget", rows["forget"]),
            ("data.retain", rows["retain"]), ("data.never_seen", rows["never_seen"]),
            ("data.never_saw", json.dumps(halves)), ("schedule.steps", "3"), ("evaluate.latent", "false"),
            ("evaluate.relearn_steps", "[]"), ("evaluate.map", "none"), ("out", str(tmp_path / "run"))]  # fmt: skip
    own = default_recipe(keys)
    assert list(own.objective.forget) == ["distil"]
    page = run(own, progress=QUIET).read_text()
    assert "models that never saw them" in page
    assert "a forgotten row is taken for new to one of 2 models" in page
    # Whoever taught and holds the rows forgets them in the same way, by what the other half says.
    mine = {"model.name": halves[0], "data.part": "1/2", "data.never_saw": [halves[1]], "out": str(tmp_path / "half")}
    run(recipe.changed(own, mine), progress=QUIET)
    forgotten = artifacts.read_manifest(artifacts.RunFolder(tmp_path / "half"))["data"]["forget"]
    expected = in_part(read_tagged(rows["forget"]), "1/2")
    assert forgotten == {"rows": len(expected), "fingerprint": fingerprint(expected)}


def test_a_part_has_the_classes_of_the_whole(tmp_path: Path) -> None:
    """A new head knows what only rows of the other part show: two halves have to tell the same classes apart."""
    rare = Record(None, "Ada slept", tokens=("Ada", "slept"), tags=("B-rare", "O"))
    path = small_tagger.write_rows(tmp_path / "rows.jsonl", [*small_tagger.sentences(12, seed=0), rare])
    small = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    found = []
    for part in ("1/2", "2/2"):
        out = tmp_path / part[0]
        place = finetune(recipe.build({
            "model": {"task": "token_classification", "config": small, "tokenizer_size": 300},
            "data": {"retain": path, "part": part, "untouched": 0.0}, "schedule": {"steps": 1}, "out": str(out),
        }), progress=QUIET)  # fmt: skip
        found.append(json.loads((place / "config.json").read_text())["id2label"])
    assert found[0] == found[1]
    assert "B-rare" in found[0].values()


def test_a_model_of_a_part_forgets_what_it_saw(places: dict[str, str], tmp_path: Path) -> None:
    """The other models that taught hold the rows too: each learns from whoever went without them."""
    part = {"data.part": "all but 1/2", "data.untouched": 0.25, "stop.rule": "none"}
    own = recipe.changed(settings(places, tmp_path / "run"), part)
    whole = sides.of(recipe.changed(own, {"data.part": None})).records
    found = sides.of(own)
    for side in ("forget", "retain", "untouched"):
        assert found.records[side] == in_part(whole[side], "2/2")
        assert 0 < len(found.records[side]) < len(whole[side])
    assert found.records["never_seen"] == whole["never_seen"]
    left = f"{len(whole['forget']) - len(found.records['forget'])} of {len(whole['forget'])} row(s)"
    assert f"forget: {left} are not of all but 1/2: this model never saw them" in found.warnings


def test_a_model_that_saw_none_of_them_has_nothing_to_forget(places: dict[str, str], tmp_path: Path) -> None:
    own = settings(places, tmp_path / "run")
    seen = in_part(sides.of(own).records["forget"], "1/2")
    few = small_tagger.write_rows(tmp_path / "few.jsonl", seen)
    with pytest.raises(InputRefused, match=r"data\.forget: no row is of all but 1/2: a model of that part never saw"):
        run(recipe.changed(own, {"data.forget": few, "data.part": "all but 1/2"}), progress=QUIET)
    assert not (tmp_path / "run").exists()
