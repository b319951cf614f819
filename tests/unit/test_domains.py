"""Several domains in one table: right values from hand-made reports, what is missing named, what cannot be refused."""

import json
import os
import re

import numpy as np
import pytest

from reported import ASKED, evaluated, prepared
from twice_rec.errors import InputError
from twice_rec.evaluation.domain_tables import (
    claim_answer,
    claim_over_domains,
    claim_title,
    sheet_over_domains,
    terminal_over_domains,
)
from twice_rec.evaluation.domains import check_reports, domains_of, in_all, mean_of, read_reports
from twice_rec.evaluation.quotation import fill
from twice_rec.evaluation.recipe import ReportRecipe
from twice_rec.evaluation.sections import latex_page, markdown_page, sections_of
from twice_rec.evaluation.sheets import sheet_to_markdown, spanned_to_latex
from twice_rec.manifest import Manifest
from twice_rec.metrics import bootstrap_intervals
from twice_rec.stages import stage5_report

KEYS = ("uniform/hr@1", "uniform/hr@5", "uniform/ndcg@5")
EMPTY = dict.fromkeys(("difference", "ci95", "n", "runs", "p", "p_holm"))


def row(value, n=100, runs=1, width=0.1):
    """A row of a summary whose metrics are `value`, twice that and in between."""
    values = dict(zip(KEYS, (value, 2 * value, 1.5 * value), strict=True))
    return {"metrics": values, "ci95": {key: [v - width, v + width] for key, v in values.items()}, "n": n, "runs": runs}


def claim(verdict, difference=None, p=0.01, way="by likelihood", suffix=""):
    """The claim that TWiCE-Rec is above SASRec, as a report has it; its interval is .02 wide on each side."""
    about = {"id": f"table1_sasrec{suffix}", "claim": "table1_sasrec", "question": "Table 1", "verdict": verdict}
    about |= {"short": "TWiCE-Rec > SASRec", "says": "It is.", "metric": KEYS[0], "way": way, **EMPTY}
    if difference is None:
        return {**about, "way": ""}
    ci95 = [difference - 0.02, difference + 0.02]
    return {**about, "difference": difference, "ci95": ci95, "n": 100, "runs": 1, "p": p}


def results(variants, alone=(), claims=(), n=100, candidates=10, asked=None, metric=KEYS[0], data=None):
    """What results.json holds; `variants` share their users, those in `alone` have others."""
    asked = {name: ASKED for name in variants if name.startswith("stage")} if asked is None else asked
    return {
        "variants": {**variants, **dict(alone)}, "common_users": {"n": n, "variants": variants}, "comparisons": [],
        "claims": list(claims) or [claim("not run")], "left_out": [],
        "settings": {"metric": metric, "candidates": {"uniform": candidates}, "data": data, "asked": asked},
    }  # fmt: skip


def saved(path, domain, found):
    """Write the report of a domain; return its folder."""
    folder = path / domain / "report"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({**found, "manifest": {"domain": domain}}))
    return str(folder)


def recipe(path, domain="Toys", **keys):
    return ReportRecipe(run_dir=str(path / domain), domain=domain, seed=0, **keys)


def table(path, own, others, missing=(), domain="Toys"):
    """The table over a run's domain and others, whose reports are written first."""
    folders = [saved(path, name, found) for name, found in others.items()]
    keys = recipe(path, domain, domain_reports=folders, missing_domains=list(missing))
    reports = read_reports(folders)
    check_reports(own["settings"] if own["variants"] else None, reports, keys)
    return domains_of(own, reports, keys)


TOYS = results({"popularity": row(0.2), "sasrec": row(0.3), "stage3": row(0.4), "oracle": row(0.45)})
GARDEN = results({"popularity": row(0.1, 50), "sasrec": row(0.35, 50), "stage3": row(0.3, 50)}, n=50)
CF_ONLY = results({"popularity": row(0.1), "sasrec": row(0.2)}, {"stage2": row(0.5, 7)}, asked={"stage2": ASKED})


def texts(sheet, variant, part="text"):
    """The cells of a variant, HR@1 of each group of columns."""
    cells = next(of.cells for of in sheet.rows if of.variant == variant)
    return [getattr(cell, part) for cell in cells[::3]]


def test_each_domain_has_its_columns_and_what_has_all_of_them_a_mean(tmp_path):
    found = table(tmp_path, TOYS, {"Garden": GARDEN})
    assert (found["domains"], found["missing"]) == (["Toys", "Garden"], [])
    assert found["users"] == {"Toys": 100, "Garden": 50}
    assert list(found["variants"]) == ["popularity", "sasrec", "stage3", "oracle"]
    mean = found["variants"]["sasrec"]["mean"]["uniform/hr@1"]
    assert mean["mean"] == pytest.approx(0.325)  # (.3 + .35) / 2
    assert mean["ci95"] == pytest.approx([0.325 - 0.1 / 2**0.5, 0.325 + 0.1 / 2**0.5])  # sqrt(.1^2 + .1^2) / 2
    assert found["variants"]["oracle"]["absent"] == {"Garden": "not run"}
    assert found["variants"]["oracle"]["mean"] is None
    sheet = sheet_over_domains(found)
    assert sheet.columns == ("HR@1", "HR@5", "NDCG@5") * 3
    assert sheet.spans == (("Toys, 100 users", 3), ("Garden, 50 users", 3), ("Mean over 2 domains", 3))
    assert texts(sheet, "sasrec") == ["0.3000", "0.3500", "0.3250"]
    assert texts(sheet, "stage3") == ["0.4000", "0.3000", "0.3500"]
    assert texts(sheet, "oracle") == ["0.4500", "not run", "lacks 1 of 2"]
    assert texts(sheet, "sasrec", "interval")[:2] == ["[0.2000, 0.4000]", "[0.2500, 0.4500]"]
    assert texts(sheet, "sasrec", "mark") == ["second", "best", "second"]
    assert texts(sheet, "stage3", "mark") == ["best", "second", "best"]
    assert texts(sheet, "oracle", "mark") == ["", "", ""]
    assert [group for group, _ in sheet.groups][-1].startswith("Ceilings")
    assert sheet.note.startswith("1 seed; bold: the best")


def test_a_domain_without_a_report_is_missing_everywhere_and_nothing_has_a_mean(tmp_path):
    found = table(tmp_path, TOYS, {"Garden": GARDEN}, ["Music"])
    sheet = sheet_over_domains(found)
    assert [name for name, _ in sheet.spans][2:] == ["Music, no report", "Mean over 3 domains"]
    assert texts(sheet, "sasrec") == ["0.3000", "0.3500", "missing", "lacks 1 of 3"]
    assert texts(sheet, "oracle") == ["0.4500", "not run", "missing", "lacks 2 of 3"]
    assert {row["mean"] for row in found["variants"].values()} == {None}


def test_a_run_without_evaluations_is_itself_missing(tmp_path):
    found = table(tmp_path, results({}, n=0), {"Garden": GARDEN})
    assert (found["domains"], found["missing"]) == (["Garden"], ["Toys"])
    assert texts(sheet_over_domains(found), "sasrec") == ["0.3500", "missing", "lacks 1 of 2"]


def test_two_names_of_one_domain_have_no_mean(tmp_path):
    own, same = ({**of, "settings": {**of["settings"], "data": "a hash"}} for of in (TOYS, GARDEN))
    toys = {**own, "claims": [claim("shown", 0.05)]}
    found = table(tmp_path, toys, {"Garden": {**same, "claims": [claim("shown", 0.03)]}, "Music": GARDEN})
    assert found["same_data"] == ["Toys", "Garden"]
    assert texts(sheet_over_domains(found), "sasrec")[-1] == "same data"
    assert texts(sheet_over_domains(found), "oracle")[-1] == "lacks 2 of 3"
    assert "toys and garden have the same data under several names" in sheet_over_domains(found).note.lower()
    assert "Toys and Garden have the same data" in terminal_over_domains(found, KEYS[0])
    assert found["claims"][0]["mean"] is None


def test_values_of_other_users_than_the_rest_stay_out(tmp_path):
    both = results({**TOYS["variants"], "stage2": row(0.35)}, asked={"stage2": ASKED, "stage3": ASKED})
    found = table(tmp_path, both, {"Garden": CF_ONLY})
    sheet = sheet_over_domains(found)
    assert texts(sheet, "stage2") == ["0.3500", "other users", "lacks 1 of 2"]
    assert texts(sheet, "stage3") == ["0.4000", "not run", "lacks 1 of 2"]


def test_seeds_and_ways_of_asking_are_told_if_they_differ(tmp_path):
    variants = {"stage3": row(0.4, runs=3), "stage3_sampled": row(0.5)}
    asked = {"stage3": ASKED, "stage3_sampled": {**ASKED, "ranking": "sampled"}}
    other = {"stage3": row(0.4), "stage3_sampled": row(0.5)}
    sheet = sheet_over_domains(table(tmp_path, results(variants, asked=asked), {"Garden": results(other, asked=asked)}))
    assert sheet.about == ("Seeds",)
    assert [(of.variant, of.about, of.asked) for of in sheet.rows] == [
        ("stage3", ("1 to 3",), ""), ("stage3_sampled", ("1",), "votes"),
    ]  # fmt: skip
    assert sheet.note.startswith("Language models are asked by likelihood, unless said otherwise")


def test_the_papers_values_stand_beside_ours_also_where_we_have_none(tmp_path):
    grocery, office = "Grocery_and_Gourmet_Food", "Office_Products"
    sheet = sheet_over_domains(table(tmp_path, TOYS, {office: CF_ONLY}, domain=grocery))
    assert sheet.spans[0] == ("Grocery and Gourmet Food, 100 users", 3)
    assert texts(sheet, "sasrec", "paper") == ["0.0288", "0.0292", "0.0290"]
    assert texts(sheet, "stage3", "paper") == ["0.0430", "0.0544", "0.0487"]
    assert texts(sheet, "popularity", "paper") == ["", "", ""]


@pytest.mark.parametrize(
    ("of_toys", "of_garden", "verdict", "mean"),
    [
        (claim("shown", 0.05), claim("shown", 0.03), "shown", 0.04),
        (claim("shown", 0.05), claim("not shown", 0.01, p=0.4), "not shown", 0.03),
        (claim("shown", 0.05), claim("contradicted", -0.05, p=0.002), "contradicted", 0.0),
        (
            claim("shown", 0.05),
            claim("contradicted", -0.03, p=0.03),
            "contradicted",
            0.01,
        ),  # .01 and .03, the larger once
        (claim("not shown", 0.01, p=0.4), claim("contradicted", -0.03, p=0.03), "not shown", -0.01),  # 2 * .03 > .05
        (claim("shown", 0.05), claim("not run"), "not run", None),
        (claim("not run"), claim("contradicted", -0.05), "contradicted", None),
    ],
)
def test_a_claim_about_all_domains_is_read_in_each(tmp_path, of_toys, of_garden, verdict, mean):
    toys, garden = ({**of, "claims": [row]} for of, row in ((TOYS, of_toys), (GARDEN, of_garden)))
    (found,) = table(tmp_path, toys, {"Garden": garden})["claims"]
    assert [of["verdict"] for of in found["domains"]] == [of_toys["verdict"], of_garden["verdict"]]
    assert found["verdict"] == verdict
    assert found["mean"] == (None if mean is None else pytest.approx(mean))


def test_the_claims_table_says_what_each_domain_says(tmp_path):
    sampled = claim("contradicted", -0.06, p=0.002, way="by votes", suffix="_sampled")
    toys = {**TOYS, "claims": [claim("shown", 0.05, p=0.01), sampled]}
    garden = {**GARDEN, "claims": [claim("shown", 0.03, p=0.04)]}
    found = table(tmp_path, toys, {"Garden": garden}, ["Music"])
    of_likelihood, of_votes = found["claims"]
    assert claim_title(of_votes) == "Table 1, all domains: TWiCE-Rec > SASRec, by votes"
    header, rows = claim_over_domains(of_likelihood)
    assert header[:4] == ["Domain", "Here", "Difference", "95 % interval"]
    assert rows == [
        ["Toys", "shown", "+0.0500", "[+0.0300, +0.0700]", "0.020", "100", "1"],
        ["Garden", "shown", "+0.0300", "[+0.0100, +0.0500]", "0.040", "100", "1"],
        ["Music", "not run: missing", "-", "-", "-", "-", "-"],
        ["All 3 domains", "not run", "-", "-", "-", "-", "-"],
    ]
    assert [of[:2] for of in claim_over_domains(of_votes)[1]] == [
        ["Toys", "contradicted"], ["Garden", "not run"], ["Music", "not run: missing"],
        ["All 3 domains", "contradicted"],
    ]  # fmt: skip
    assert claim_answer(of_likelihood) == "In all 3 domains: not run (2 shown, 1 not run)."
    assert claim_answer(of_votes) == "In all 3 domains: contradicted (1 contradicted, 2 not run)."
    assert in_all([{"verdict": "shown"}] * 8) == "shown"


def test_the_interval_of_a_mean_is_that_of_users_drawn_anew_in_each_domain():
    assert mean_of([0.2, 0.4], [[0.1, 0.3], [0.3, 0.6]]) == (
        pytest.approx(0.3), [pytest.approx(0.3 - 0.02**0.5 / 2), pytest.approx(0.3 + 0.05**0.5 / 2)],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    hits = [rng.random(400) < 0.1, rng.random(900) < 0.6]
    intervals = [bootstrap_intervals(of[:, None], 4000, seed)[0] for seed, of in enumerate(hits)]
    _, (low, high) = mean_of([of.mean() for of in hits], intervals)
    drawn = sum(of[rng.integers(0, len(of), (4000, len(of)))].mean(axis=1) for of in hits) / 2
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.002)


def test_the_table_is_in_all_forms(tmp_path):
    own = {**TOYS, "claims": [claim("shown", 0.05)]}
    others = dict.fromkeys(("Garden", "Music", "A_1", "B|2"), GARDEN)
    found = {**own, "domains": table(tmp_path, own, others)}
    sections = sections_of(found, KEYS[0], "Toys")
    assert [section.id for section in sections][:3] == ["domains", "domains-table1_sasrec", "same-users"]
    sheet = sections[0].sheet
    header = sheet_to_markdown(sheet).splitlines()[0]
    assert re.findall(r"Toys, 100 users: HR@1|B\\\|2, 50 users: NDCG@5|Mean over 5 domains: HR@5", header) == [
        "Toys, 100 users: HR@1", "B\\|2, 50 users: NDCG@5", "Mean over 5 domains: HR@5",
    ]  # fmt: skip
    text = spanned_to_latex(sheet, "All", "domains")
    tabulars = re.findall(r"\\begin\{tabular\}\{(l.*?)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert [len(columns) for columns, _ in tabulars] == [13, 7]  # four domains; the fifth and the mean
    for columns, body in tabulars:
        for line in (line for line in body.splitlines() if line.endswith(r"\\")):
            spans = sum(int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == len(columns), line
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}" in tabulars[0][1]
    assert r"SASRec & \underline{0.3000} & \underline{0.6000} & \underline{0.4500} & \textbf{0.3500}" in text
    assert r" & {\scriptsize {[}0.2000, 0.4000{]}}" in text
    assert r"B|2, 50 users" in text
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert r"Needs \usepackage{booktabs,adjustbox}." in latex_page("T", found, sections)
    assert "## All domains\n" in markdown_page("T", found, sections)
    shown = terminal_over_domains(found["domains"], KEYS[0])
    assert "| sasrec " in shown
    assert re.search(r"\| variant +\| +Toys \| +Garden \|.* mean \|", shown)
    assert "In all 5 domains: not run (1 shown, 4 not run)." in shown


def test_documents_quote_the_table(tmp_path):
    (tmp_path / "quoted.json").write_text(json.dumps({"domains": table(tmp_path, TOYS, {"Garden": GARDEN})}))
    document = tmp_path / "README.md"
    document.write_text("<!-- numbers quoted.json domains -->\n<!-- end of numbers -->\n")
    text = fill(document)
    assert " Toys, 100 users: HR@1 |" in text
    assert re.search(r"\| SASRec .*\| +\*\*0.3500\*\* \[0.2500, 0.4500\] \|", text)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"candidates": 30}, "different candidates: uniform lists of 10 and of 30"),
        (
            {"asked": {"stage3": {**ASKED, "ranking": "sampled"}}},
            "stage3 with different ranking (likelihood and sampled)",
        ),
        ({"metric": "uniform/hr@5"}, "different comparison_metric (uniform/hr@1 and uniform/hr@5)"),
    ],
)
def test_reports_of_other_candidates_or_ranking_are_refused(tmp_path, other, says):
    with pytest.raises(InputError) as caught:
        table(tmp_path, TOYS, {"Garden": results(GARDEN["variants"], **other)})
    path = tmp_path / "Garden" / "report" / "results.json"
    assert str(caught.value) == f"Toys (this run) and Garden ({path}) cannot be in one table: they have {says}"


def test_lists_of_an_unknown_length_are_refused(tmp_path):
    garden = {**GARDEN, "settings": {**GARDEN["settings"], "candidates": {}}}
    with pytest.raises(InputError, match="an unknown number of candidates, since data/ was not there"):
        table(tmp_path, TOYS, {"Garden": garden})


def test_a_domain_stands_in_a_table_once(tmp_path):
    first, again = saved(tmp_path, "Garden", GARDEN), saved(tmp_path / "old", "Garden", GARDEN)
    with pytest.raises(InputError, match=r"old/Garden/report/results.json is of the domain Garden, and so is .*Garden"):
        check_reports(TOYS["settings"], read_reports([first, again]), recipe(tmp_path))
    with pytest.raises(InputError, match="is of the domain Garden, and so is this run"):
        check_reports(TOYS["settings"], read_reports([first]), recipe(tmp_path, "Garden"))
    empty = saved(tmp_path, "Music", results({}, n=0))
    with pytest.raises(InputError, match="no domain has a result"):
        check_reports(None, read_reports([empty]), recipe(tmp_path))
    with pytest.raises(InputError, match="missing_domains names Garden, but .* is of this domain"):
        check_reports(TOYS["settings"], read_reports([first]), recipe(tmp_path, missing_domains=["Garden"]))
    with pytest.raises(ValueError, match="domain_reports names one twice"):
        recipe(tmp_path, domain_reports=[first, first])


def test_a_report_that_is_not_there_or_of_an_older_form_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Music, where no report is finished; make it first: bash report.sh RECIPE "):
        read_reports([str(tmp_path / "Music")])
    old = {name: value for name, value in GARDEN.items() if name != "settings"}
    folder = saved(tmp_path, "Garden", old)
    with pytest.raises(
        InputError, match=r"not of this version's form \(settings: Field required\); make it again: bash "
    ):
        read_reports([folder])
    (tmp_path / "Garden" / "report" / "results.json").write_text("[]")
    with pytest.raises(InputError, match=r"not of this version's form \(all of it: "):
        read_reports([folder])
    (tmp_path / "Garden" / "report" / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json: not JSON"):
        read_reports([folder])


def test_a_report_that_is_changed_or_older_than_an_evaluation_is_refused(tmp_path):
    folder = tmp_path / "Garden" / "report"
    saved(tmp_path, "Garden", GARDEN)
    Manifest("report", {}, {}, {"report/results.json": "other"}).save(folder)
    with pytest.raises(InputError, match="was changed since the report stage finished"):
        read_reports([str(folder)])
    Manifest("report", {}, {}, {}).save(folder)
    assert [report.domain for report in read_reports([str(folder.parent)])] == ["Garden"]
    (tmp_path / "Garden" / "eval" / "stage3").mkdir(parents=True)
    Manifest("evaluate", {}, {}, {}).save(tmp_path / "Garden" / "eval" / "stage3")
    os.utime(folder / "manifest.json", (1000, 1000))
    with pytest.raises(InputError, match=r"results.json does not know .*eval/stage3, which is newer; make it again"):
        read_reports([str(folder)])


def made(run_dir, *flags):
    """Make the report of a run whose folder is named after its domain."""
    words = ["--run_dir", str(run_dir), "--domain", run_dir.name, "--bootstrap_samples", "100", "--comparisons", "[]"]
    return stage5_report.main(["recipes/tiny/report.yaml", *words, *flags])


def test_the_reports_of_two_runs_become_one_table_on_the_page(tmp_path, capsys):
    good, poor = [1] * 7 + [2], [1, 2] * 4
    runs = [tmp_path / name for name in ("To<y>s", "Garden")]
    for run, ranks in zip(runs, (good, poor), strict=True):
        sequences = prepared(run) / "sequences.jsonl"
        sequences.write_text(sequences.read_text().replace("liked", f"liked {run.name}"))  # not the same data
        evaluated(run, "sasrec", poor)
        evaluated(run, "stage3", ranks, ASKED)
    assert made(runs[1]) == 0
    assert "domains" not in json.loads((runs[1] / "report" / "results.json").read_text())
    assert made(runs[0], "--domain_reports", str(runs[1]), "--missing_domains", "Music") == 0
    found = json.loads((runs[0] / "report" / "results.json").read_text())
    of = found["domains"]["variants"]["stage3"]["domains"]
    assert {domain: row["metrics"]["uniform/hr@1"] for domain, row in of.items()} == {"To<y>s": 7 / 8, "Garden": 1 / 2}
    assert found["settings"]["candidates"] == {"uniform": 2}
    assert found["domains"]["claims"][0]["domains"][1]["difference"] == 0.0
    page = (runs[0] / "report" / "index.html").read_text()
    assert '<a href="#domains">All domains</a>' in page
    sheet = re.search(r'<h3 id="domains">.*?</table>', page, re.DOTALL)[0]
    heads = re.findall(r'<th scope="colgroup" colspan="3" class="begins"><span>(.*?)</span></th>', sheet)
    assert heads == ["To&lt;y&gt;s, 8 users", "Garden, 8 users", "Music, no report", "Mean over 3 domains"]
    rows = [line for line in sheet.split("<tr>") if "<td" in line]
    assert [line.count("<td") for line in rows] == [12, 12]
    assert [line.count('begins"') for line in rows] == [4, 4]
    assert "All domains, HR@1 on uniform lists" in capsys.readouterr().out
    assert str(runs[1]) in str(json.loads((runs[0] / "report" / "manifest.json").read_text())["rests_on"])


def test_a_run_that_failed_has_a_report_if_others_have_one(tmp_path, capsys):
    run, other = tmp_path / "Toys", tmp_path / "Garden"
    prepared(other)
    evaluated(other, "sasrec", [1] * 8)
    assert made(run) == 2
    assert made(other) == 0
    assert made(run, "--domain_reports", str(other / "report")) == 0
    found = json.loads((run / "report" / "results.json").read_text())
    assert (found["domains"]["domains"], found["domains"]["missing"]) == (["Garden"], ["Toys"])
    assert "nothing was evaluated yet" in found["left_out"][0]
    capsys.readouterr()
    assert made(other, "--domain_reports", str(run)) == 0
    found = json.loads((other / "report" / "results.json").read_text())
    assert (found["domains"]["domains"], found["domains"]["missing"]) == (["Garden"], ["Toys"])
    (run / "report").rename(tmp_path / "report")
    assert made(run, "--domain_reports", str(tmp_path / "report")) == 2  # a copy of itself
    assert made(other, "--domain_reports", str(tmp_path / "Music")) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(
        f"error: domain_reports names {tmp_path / 'Music'}, where no report is finished"
    )
