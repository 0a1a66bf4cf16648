"""The script that proves the probabilities, on a small file: it runs, and it keeps to its protocol."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from bench.prove_probabilities import PROOFS, ROWS, main, open_leads, parse

ROOT = Path(__file__).parent.parent
ROWS_OF_FILE = 400


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enquiries numbered in the order they came, their outcome half told by the visits; ten are open.

    Of the later ones, which come first, twenty are copies of earlier ones.
    """
    random = np.random.default_rng(3)
    visits = random.poisson(4, ROWS_OF_FILE) + random.integers(0, 4, ROWS_OF_FILE) / 4
    channel, seconds = random.choice(["Fair", "Web", "n/a"], ROWS_OF_FILE), random.permutation(ROWS_OF_FILE)
    for column in (visits, channel, seconds):
        column[20:40] = column[220:240]
    won = random.random(ROWS_OF_FILE) < 1 / (1 + np.exp(3 - 0.6 * visits))
    path = tmp_path_factory.mktemp("leads") / "leads.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["Reference", "Countdown", "Visits", "Channel", "Seconds", "Note", "Enrolled"])
        for number in range(ROWS_OF_FILE):
            label = "" if number < 10 else "Yes" if won[number] else "No"
            cells = visits[number], channel[number], seconds[number], label, label
            writer.writerow([f"E-{number}", ROWS_OF_FILE - number, *cells])
    return path


@pytest.fixture
def arguments(file: Path) -> list[str]:
    return ["--csv", str(file), "--id", "Reference", "--label", "Enrolled", "--missing", "n/a",
            "--exclude", "note", "--order-by", "countdown", "--model", "logistic_regression"]  # fmt: skip


@pytest.fixture
def prove(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the script on the file; returns its status and what it printed."""

    def run(*more: str) -> tuple[int, str]:
        status = main([*arguments, *more])
        return status, capsys.readouterr().out

    return run


def test_every_measured_row_is_printed_with_its_figure_target_and_command(
    prove: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAKELEVEL", raising=False)
    targets = ("--target", "roc_auc=0.999", "--target", "brier=0.3")
    status, text = prove(*targets, "--only", ",".join(ROWS))
    assert status == 1, "a target is missed"
    assert "390 leads" in text
    figure = re.search(r"^ROC AUC: (0\.\d{4}), at least 0\.999: NO$", text, re.MULTILINE)
    assert figure
    assert 0.6 < float(figure[1]) < 0.95
    assert re.search(r"^Brier score: 0\.\d{4}, at most 0\.3: yes$", text, re.MULTILINE)
    assert re.search(r"bins whose rate lies in the mean interval: \d+\n", text)
    for name, row in ROWS.items():
        assert f"{row.heading}: " in text
        assert f"--model logistic_regression {' '.join(targets)} --only {name}\n" in text


def test_folds_are_cut_in_the_order_of_the_file_and_the_last_fifth_in_that_of_the_column(
    arguments: list[str], file: Path
) -> None:
    with open_leads(parse(arguments), lambda *_: None) as leads:
        rows, folds, (later, unlike) = leads.rows, leads.folds, leads.later
    with file.open(encoding="utf-8", newline="") as lines:
        decided = [line for line in csv.DictReader(lines) if line["Enrolled"]]
    outcome = np.array([line["Enrolled"] == "Yes" for line in decided]).astype(int)
    visits = np.array([float(line["Visits"]) for line in decided])
    np.testing.assert_array_equal(rows.leads.columns["visits"].values, visits)
    splitter = StratifiedKFold(5, shuffle=True, random_state=0)
    for (_, held_out), fold in zip(splitter.split(outcome, outcome), folds, strict=True):
        np.testing.assert_array_equal(fold.outcome, outcome[held_out])
        # The model has little but the visits to go by: its scores follow those of the same leads.
        assert abs(np.corrcoef(fold.raw, visits[held_out])[0, 1]) > 0.9
    # The column to order by counts down, so the file's first leads are the later ones.
    np.testing.assert_array_equal(later.outcome, outcome[:78])
    assert abs(np.corrcoef(later.raw, visits[:78])[0, 1]) > 0.9
    earlier = {line["Seconds"] for line in decided[78:]}
    assert unlike.tolist() == [line["Seconds"] not in earlier for line in decided[:78]]
    assert np.count_nonzero(~unlike) == 20


def test_a_row_that_does_not_exist_is_refused_by_name(
    prove: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        prove("--only", "roc")
    assert "there is no row roc; rows: roc_auc, pr_auc" in capsys.readouterr().err


def test_the_learning_curve_grows_by_fifths(prove: Callable[..., tuple[int, str]]) -> None:
    status, text = prove("--learning-curve")
    assert status == 0
    assert re.findall(r"^  (\d+): ROC AUC 0\.\d{4}", text, re.MULTILINE) == ["62", "125", "187", "250", "312"]


def test_every_proof_names_a_test_that_is_there() -> None:
    for proof in PROOFS.values():
        assert f"def {proof.test}(" in (ROOT / "tests" / f"{proof.file}.py").read_text(encoding="utf-8")
