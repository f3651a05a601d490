"""Tables of results: names of languages and groups are the data's own, and may hold anything."""

from siglip_train.evals.base import Evaluation
from siglip_train.evals.table import left_out, result_tables


def test_languages_with_slashes_have_rows_of_their_own() -> None:
    metrics = {"image_retrieval_recall@1": 0.25}
    metrics |= {
        f"{language}/image_retrieval_recall@1": n / 8 for n, language in enumerate(("pt/BR", "en/US", "de"))
    }
    rows = [line.split() for line in result_tables({"xm": Evaluation(metrics, {})}).splitlines()]
    assert [row for row in rows if row and row[0] in ("pt/BR", "en/US", "de")] == [
        ["pt/BR", "0.0000"], ["en/US", "0.1250"], ["de", "0.2500"],
    ]  # fmt: skip


def test_a_group_without_a_metric_has_a_gap() -> None:
    metrics = {"a/b/acc1": 0.5, "c/acc1": 1.0, "c/acc5": 1.0}
    rows = [line.split() for line in result_tables({"task": Evaluation(metrics, {})}).splitlines()]
    assert ["a/b", "0.5000"] in rows
    assert ["c", "1.0000", "1.0000"] in rows


def test_what_was_left_out_is_said_in_a_line() -> None:
    whole = Evaluation({}, {"counts": {"seen": 7}})
    bad = Evaluation({}, {"counts": {"seen": 9, "bad/broken image": 2, "excluded/no text": 1}})
    assert left_out({"a": whole, "b": Evaluation({}, {})}) == "samples left out: none"
    assert left_out({"a": whole, "b": bad}) == "samples left out: b 3 (2 broken image, 1 no text)"
