"""Logs of other projects: the published numbers come out again, and bad files are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import oracle_metrics as oracle
from excise.errors import InputRefused
from excise.metrics.logs import read, read_open_unlearning, read_run
from excise.metrics.scores import score
from excise.metrics.table import save


@pytest.fixture(scope="module")
def logs(shared: Path) -> Path:
    folder = shared / "data" / "tofu_eval_logs"
    if not (folder / "phi_full.json").exists():
        pytest.skip("TOFU'S EVALUATION LOGS ABSENT: data/tofu_eval_logs")
    return folder


def test_tofu_numbers_come_out_again(logs: Path) -> None:
    full, gold = read(logs / "phi_full.json"), read(logs / "phi_retain90.json")
    found = score(full, gold).values
    assert found["forget_quality_log10"]["value"] == pytest.approx(-15.659, abs=5e-4)
    assert found["model_utility"]["value"] == pytest.approx(0.5221, abs=5e-4)
    assert found["model_utility"]["complete"]
    arithmetic = score(full, gold, truth_ratio="arithmetic").values
    assert arithmetic["model_utility"]["value"] == pytest.approx(0.5034, abs=5e-4)
    assert found["forget_probability"]["value"] == pytest.approx(0.928, abs=5e-4)
    assert found["forget_rouge"]["value"] == pytest.approx(0.925, abs=5e-4)


def test_tofu_gold_looks_forgotten(logs: Path) -> None:
    gold = read(logs / "phi_retain90.json")
    found = score(gold, gold).values
    assert found["forget_probability"]["value"] == pytest.approx(0.135, abs=5e-4)
    assert found["forget_rouge"]["value"] == pytest.approx(0.428, abs=5e-4)
    assert found["forget_quality_log10"]["value"] == 0.0


def test_tofu_log_has_no_tokens_and_says_so(logs: Path) -> None:
    found = score(read(logs / "phi_full.json"))
    assert {"exact_memorization", "extraction_strength", "privleak"} <= found.not_shown.keys()
    assert found.values["forget_perplexity"]["n"] == 300


def entry(values: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"agg_value": 0.0, "value_by_index": values}


def open_unlearning_log() -> dict[str, Any]:
    """Two forget rows, numbered 10 and 2, in the layout of TOFU_EVAL.json."""
    return {
        "forget_Q_A_Prob": entry(
            {"10": {"prob": 0.5, "avg_loss": np.log(2)}, "2": {"prob": 0.25, "avg_loss": np.log(4)}}
        ),
        "forget_Q_A_PARA_Prob": entry({"10": {"avg_loss": np.log(4)}, "2": {"avg_loss": np.log(8)}}),
        "forget_Q_A_PERT_Prob": entry({"10": {"avg_loss": [np.log(2), np.log(8)]}, "2": {"avg_loss": [np.log(8)] * 2}}),
        "forget_Q_A_ROUGE": entry(
            {
                "10": {"rougeL_recall": 0.75, "generation": "SECRET"},
                "2": {"rougeL_recall": 0.25, "generation": "SECRET"},
            }
        ),
        "forget_Truth_Ratio": entry({"10": {"score": 1.0}, "2": {"score": 1.0}}),
        "exact_memorization": entry({"10": {"score": 0.5}, "2": {"score": None}}),
        "extraction_strength": entry({"10": {"score": 0.5}, "2": {"score": 0.0}}),
        "mia_min_k": {
            "forget": entry({"10": {"score": 0.1}, "2": {"score": 0.2}}),
            "holdout": entry({"0": {"score": 3.0}, "1": {"score": 4.0}}),
            "auc": 1.0,
            "agg_value": 1.0,
        },
        "model_utility": {"agg_value": 0.5},
    }


def test_open_unlearning_log(tmp_path: Path) -> None:
    path = tmp_path / "TOFU_EVAL.json"
    path.write_text(json.dumps(open_unlearning_log()))
    tables = read(path)
    found = score(tables).values
    assert found["forget_probability"]["value"] == pytest.approx(0.375)
    assert found["paraphrase_probability"]["value"] == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert found["forget_truth_ratio"]["value"] == pytest.approx(1.0)
    assert found["forget_rouge"]["value"] == pytest.approx(0.5)
    assert found["exact_memorization"] | {"low": 0, "high": 0} == {"value": 0.5, "low": 0, "high": 0, "n": 1}
    assert found["mia_min_k_auc"]["value"] == 1.0  # their score is high for strangers: the sign is turned
    assert tables["forget"].columns["rouge_l_recall"].tolist() == [0.25, 0.75]  # rows in the order of their numbers
    assert not any(v.dtype.kind in "US" for v in tables["forget"].columns.values())


def test_open_unlearning_rows_that_only_some_metrics_know(tmp_path: Path) -> None:
    log = open_unlearning_log()
    log["forget_Q_A_Prob"]["value_by_index"]["7"] = {"avg_loss": 0.0}
    tables = read_open_unlearning(tmp_path / "x.json", log)
    assert tables["forget"].rows == 3
    assert score(tables).values["forget_rouge"]["n"] == 2


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def tofu_log() -> dict[str, Any]:
    return {
        "eval_log_forget.json": {
            "avg_gt_loss": {"0": 0.1},
            "avg_paraphrased_loss": {"0": 0.2},
            "average_perturb_loss": {"0": [1.0, 2.0]},
            "num_token_gt": {"0": 3},
            "num_token_paraphrased": {"0": 3},
            "num_token_perturb": {"0": [3, 4]},
        }
    }


def changed(name: str, value: Any) -> dict[str, Any]:
    log = tofu_log()
    log["eval_log_forget.json"][name] = value
    return log


SECRET = "the forgotten sentence"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"a": \n ' + SECRET,
        "[]",
        "3",
        {},
        {"agg": 0.5},
        {"forget_Q_A_Prob": {"agg_value": 0.4}},
        {"forget_Q_A_Prob": entry({"0": {"prob": 0.5}})},
        {"forget_Q_A_Prob": entry({"0": {"avg_loss": SECRET}})},
        {"forget_Q_A_Prob": entry({SECRET: {"avg_loss": 1.0}})},
        {"forget_Truth_Ratio": entry({"0": {"score": 1.0}})},
        {"eval_log_forget.json": [SECRET]},
        changed("avg_gt_loss", None),
        changed("avg_gt_loss", {"0": SECRET}),
        changed("avg_gt_loss", {"0": float("nan")}),
        changed("avg_gt_loss", {"0": True}),
        changed("num_token_perturb", {"0": [3]}),
        "[" * 100_000,
    ],
    ids=range(19),
)
def test_bad_logs_are_refused_in_one_line_without_their_content(content: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "log.json", content)
    with pytest.raises(InputRefused) as refused:
        read(path)
    line = str(refused.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert SECRET not in line


def test_good_log_of_that_shape_is_read(tmp_path: Path) -> None:
    assert read(write(tmp_path / "log.json", tofu_log()))["forget"].sequences == 4


def test_not_a_text_file_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    for name in ("x.json", "absent.json"):
        with pytest.raises(InputRefused, match=name):
            read(tmp_path / name)


def test_run_folders(tmp_path: Path) -> None:
    for model in ("original", "gold"):
        for side in ("forget", "retain"):
            save(oracle.make_table(side, 4), tmp_path / "run" / "tables" / model / f"{side}.safetensors")
    assert read(tmp_path / "run", "gold").keys() == {"forget", "retain"}
    assert read(tmp_path / "run" / "tables" / "gold").keys() == {"forget", "retain"}
    assert read(tmp_path / "run" / "tables" / "gold" / "forget.safetensors").keys() == {"forget"}
    with pytest.raises(InputRefused, match="gold, original"):
        read_run(tmp_path / "run")
    with pytest.raises(InputRefused, match="gold, original"):
        read_run(tmp_path / "run", "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="no tables"):
        read_run(tmp_path / "empty")


def test_a_renamed_table_is_noticed(tmp_path: Path) -> None:
    save(oracle.make_table("forget", 4), tmp_path / "retain.safetensors")
    with pytest.raises(InputRefused, match="'forget'"):
        read_run(tmp_path)
