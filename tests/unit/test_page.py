"""The report's page and tables: whole, escaped, readable without a network; what is not there is named."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from reported import ASKED, EVIL, USERS, evaluated, judged, prepared, trained, whole
from twice_rec.errors import InputError
from twice_rec.evaluation import figures, users
from twice_rec.evaluation.calibration import reliability
from twice_rec.evaluation.curves import averaged, smoothed
from twice_rec.evaluation.drawing import SERIES, save
from twice_rec.evaluation.names import metric_name, metric_with_list, variant_name
from twice_rec.evaluation.page import json_in_html
from twice_rec.evaluation.position import position_of
from twice_rec.evaluation.report import read_variants
from twice_rec.evaluation.sections import sections_of
from twice_rec.evaluation.sheets import latex_text, sheet_of, sheet_to_latex, sheet_to_markdown
from twice_rec.manifest import Manifest
from twice_rec.records import Prediction
from twice_rec.stages import stage5_report

VOID = {"meta", "input", "line", "circle", "br", "use", "path", "rect", "link", "img", "polygon"}


class Page(HTMLParser):
    """What a page holds, as far as these tests ask."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.headings, self.unlabelled, self.pictures = [], [], [], [], []
        self.addresses, self.scripts, self.words, self.tags = [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.addresses += [attrs[name] for name in ("href", "src", "action") if name in attrs]
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in ("input", "select") and "label" not in self.open:
            self.unlabelled.append(attrs)
        if tag == "svg":
            self.pictures.append(attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.words).append(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole run's report: its folder, the page's text, and what it holds."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    whole(run_dir)
    assert made(run_dir) == 0
    text = (run_dir / "report" / "index.html").read_text()
    return run_dir / "report", text, Page(text)


def made(run_dir, *flags):
    """Make the report of a run, with a domain whose name is awkward too."""
    flags = ["--run_dir", str(run_dir), "--domain", "A<b>&c", "--bootstrap_samples", "100", *flags]
    return stage5_report.main(["--config", "recipes/tiny/report.yaml", *flags])


def test_the_page_is_whole_and_alone(report):
    folder, text, page = report
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) < 3_000_000
    assert "http" not in text
    for address in page.addresses:
        inside = address.startswith("#") and address[1:] in page.ids
        assert inside or (folder / address).is_file(), address
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.isdisjoint({"img", "link", "iframe", "object", "b", "i"})


def test_titles_and_rationales_are_text(report):
    _, text, page = report
    assert EVIL not in text
    assert "<title>TWiCE-Rec on A&lt;b&gt;&amp;c</title>" in text
    data = json.loads(next(script for script in page.scripts if script.startswith("{")))
    assert data["items"]["I1"] == [EVIL, "Yogi & Co"]
    assert len([script for script in page.scripts if script.strip()]) == 3  # data, browser, printing
    assert not any("innerHTML" in script or "insertAdjacentHTML" in script for script in page.scripts)
    assert json.loads(json_in_html({"a": EVIL + "\u2028"})) == {"a": EVIL + "\u2028"}
    assert not set(json_in_html({"a": EVIL + "\u2028"})) & set("<>&\u2028")


def test_the_page_can_be_read_in_order_and_by_ear(report):
    _, _, page = report
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(later - before <= 1 for before, later in zip(page.headings, page.headings[1:], strict=False))
    assert page.unlabelled == []
    for picture in page.pictures:
        named = picture.get("aria-labelledby", "").split()
        assert picture.get("aria-hidden") == "true" or (
            picture["role"] == "img" and set(named) <= set(page.ids) and named
        )


def test_the_answer_comes_first(report):
    folder, text, _ = report
    assert "This run tests 14 of 15 claims of the paper, some in several ways: " in text
    assert text.index('id="answer"') < text.index('id="tables"') < text.index('id="figures"') < text.index('id="users"')
    assert 'id="not-run"' in text  # groups are measured elsewhere
    results = json.loads((folder / "results.json").read_text())
    assert [row["verdict"] for row in results["claims"] if row["id"] == "rq3_e_b"] == ["shown"]
    assert "E: stage 3 less B: stage 2; HR@1 on uniform lists" in text
    assert "8 users, 1 seed, p " in text


def test_every_figure_is_there_twice_as_a_file(report):
    folder, text, _ = report
    names = {"stages", "lambda", "rationales", "judged", "training", "calibration", "position"}
    assert set(re.findall(r'<figure id="figure-([^"]+)"', text)) == names
    assert {path.name for path in (folder / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "pdf")}
    drawn = re.findall(r"<figure .*?(<svg.*?</svg>)", text, re.DOTALL)
    assert all("<title id=" in svg for svg in drawn)
    assert not any(colour in svg for svg in drawn for colour in SERIES)
    assert all("currentColor" in svg for svg in drawn)


def test_users_have_everything_that_is_known_of_them(report):
    _, _, page = report
    data = json.loads(next(script for script in page.scripts if script.startswith("{")))
    assert sorted(user["id"] for user in data["users"]) == USERS
    assert data["rewards"] == [["collaborative", 4.0], ["structure", 1.0]]
    first = next(user for user in data["users"] if user["id"] == "u1")
    assert first["target"] == "I6"
    assert first["candidates"] == ["I5", "I6"]
    assert first["history"][0] == ["I1", "Excellent", "liked <i>it</i>"]
    answer = first["answers"]["stage3"]
    assert (answer["choice"], answer["rank"], answer["named"]) == ("I6", 1, "I6")
    assert answer["judged"] == [["rules", "score 2. dull"]]
    confidence = first["confidence"][1]
    hit = 1 + 3 * confidence if confidence >= 0.3 else 1
    assert answer["earned"] == pytest.approx([hit, 1.0], abs=0.005)
    assert answer["total"] == pytest.approx(4 * hit + 1, abs=0.02)
    assert "rationale" not in first["answers"]["stage3_item_only"]


def test_a_page_stays_small_whatever_the_texts_are(tmp_path, monkeypatch):
    prepared(tmp_path)
    evaluated(tmp_path, "stage2", [1] * 8, ASKED, rationale="long " * 1000)
    monkeypatch.setattr(users, "MOST_BYTES", 9000)
    assert made(tmp_path, "--comparisons", "[]") == 0
    page = Page((tmp_path / "report" / "index.html").read_text())
    data = json.loads(next(script for script in page.scripts if script.startswith("{")))
    assert 1 < len(data["users"]) < 8
    rationales = [user["answers"]["stage2"]["rationale"] for user in data["users"]]
    assert all(len(text) <= 1504 and text.endswith(" ...") for text in rationales)


def test_answers_about_other_lists_are_not_shown(tmp_path):
    folder = prepared(tmp_path)
    evaluated(tmp_path, "stage2", [1, 2] * 4, ASKED)
    variants, _ = read_variants([tmp_path])
    file = tmp_path / "eval" / "stage2" / "predictions.jsonl"
    file.write_text(file.read_text().replace('["I6", "I5"]', '["I1", "I2"]', 1))
    with pytest.raises(InputError, match="user u1 was asked about another list than .*; evaluate it again"):
        users.read_asked(variants, "uniform", folder, 0)


def test_what_was_not_run_is_named_with_its_command(tmp_path, capsys):
    prepared(tmp_path)
    evaluated(tmp_path, "stage2", [1, 2] * 4, ASKED)
    assert made(tmp_path, "--comparisons", "[]") == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert "This run tests none of 15 claims of the paper yet." in text
    assert set(re.findall(r'<figure id="figure-([^"]+)"', text)) == {"position"}
    absent = re.search(r'<ul class="absent">(.*?)</ul>', text, re.DOTALL)[1]
    commands = re.findall(r"<span>(.*?)</span><code>bash (\S+)", absent)
    by_command = {command: says for says, command in commands}
    assert "RQ2: score 3 in 75.71 %; figure of rationale quality" in by_command["judge.sh"]
    assert "figure of lambda 0 to 5" in by_command["study.sh"]
    assert "training curves of stage 3" in by_command["grpo_step2.sh"]
    assert "calibration of the CF confidence" in by_command["sasrec.sh"]
    assert "RQ5: CTR full &gt; ML; RQ5: CTR ML &gt; random" in by_command["ab_test.sh"]
    assert "| RQ3: E > B " in capsys.readouterr().out


def test_a_report_without_data_or_language_models_is_made(tmp_path):
    prepared(tmp_path)
    evaluated(tmp_path, "popularity", [1] * 8)
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    assert made(tmp_path, "--comparisons", "[]") == 0
    text = (tmp_path / "report" / "index.html").read_text()
    assert 'id="users"' not in text
    assert "<figure" not in text
    Page(text)


def test_what_cannot_be_used_is_named(tmp_path):
    prepared(tmp_path)
    evaluated(tmp_path, "stage3", [1] * 8, ASKED)
    trained(tmp_path, cf_model="ease")
    judged(tmp_path)
    Manifest("judge", {}, {}, {"judge/stage3/scores.json": "other"}).save(tmp_path / "judge" / "stage3")
    assert made(tmp_path, "--comparisons", "[]") == 0
    confidences, scores = json.loads((tmp_path / "report" / "results.json").read_text())["left_out"]
    assert "stage3/scores.json was changed since the judge stage finished" in scores
    assert confidences.startswith("confidences left out: cf_model is ease")
    page = Page((tmp_path / "report" / "index.html").read_text())
    data = json.loads(next(script for script in page.scripts if script.startswith("{")))
    assert data["rewards"] == []
    assert all(user["confidence"] == [] for user in data["users"])
    assert all("judged" in user["answers"]["stage3"] for user in data["users"])


def test_old_figures_go(tmp_path):
    prepared(tmp_path)
    evaluated(tmp_path, "stage2", [1] * 8, ASKED)
    old = tmp_path / "report" / "figures" / "lambda.png"
    old.parent.mkdir(parents=True)
    old.touch()
    assert made(tmp_path, "--comparisons", "[]") == 0
    assert not old.exists()


def row(n=10, runs=1, **metrics):
    values = {f"uniform/{name.replace('_', '@')}": value for name, value in metrics.items()}
    return {"metrics": values, "ci95": {key: [value, value] for key, value in values.items()}, "n": n, "runs": runs}


def test_best_and_second_are_marked_without_the_ceilings():
    summary = {
        "popularity": row(hr_1=0.2, mrr=0.5), "sasrec": row(hr_1=0.3, mrr=0.5),
        "stage3": row(hr_1=0.3, mrr=0.4), "oracle": row(hr_1=0.9, mrr=0.9),
    }  # fmt: skip
    sheet = sheet_of(summary, "uniform", "D")
    marks = {r.variant: [cell.mark for cell in r.cells] for r in sheet.rows}
    assert marks == {
        "popularity": ["", "best"], "sasrec": ["best", "best"], "stage3": ["best", ""], "oracle": ["", ""],
    }  # fmt: skip
    assert [group for group, _ in sheet.groups][-1].startswith("Ceilings")
    assert sheet.columns == ("HR@1", "MRR")
    assert sheet.note.startswith("10 users; 1 seed; bold: the best of a column")
    summary["stage3"] = row(hr_1=0.25, mrr=0.4)
    marks = {r.variant: r.cells[0].mark for r in sheet_of(summary, "uniform", "D").rows}
    assert marks == {"popularity": "", "sasrec": "best", "stage3": "second", "oracle": ""}


def test_different_users_have_no_best_and_certain_columns_go():
    summary = {"sasrec": row(n=1000, hr_1=0.3, hr_10=1.0), "stage3": row(n=10, runs=3, hr_1=0.4, hr_10=1.0)}
    sheet = sheet_of(summary, "uniform", "D")
    assert {cell.mark for r in sheet.rows for cell in r.cells} == {""}
    assert sheet.columns == ("HR@1",)
    assert sheet.note == "HR@10 is 1 for all."
    assert [r.about for r in sheet.rows] == [("1,000", "1"), ("10", "3")]
    assert sheet_of(summary, "hard", "D") is None


def test_the_papers_values_stand_beside_ours():
    summary = {"sasrec": row(hr_1=0.2275, mrr=0.3), "stage3": row(hr_1=0.3, mrr=0.4)}
    cells = {r.variant: r.cells for r in sheet_of(summary, "uniform", "Grocery_and_Gourmet_Food").rows}
    assert cells["sasrec"][0].paper == "0.0288"
    assert cells["stage3"][0].paper == "0.0430"
    assert cells["stage3"][1].paper == ""


def test_latex_is_escaped_and_has_as_many_columns_everywhere():
    assert latex_text("a_b & 5 % {x} \\ $") == r"a\_b \& 5 \% \{x\} \textbackslash{} \$"
    summary = {"sasrec": row(hr_1=0.2, mrr=0.3), "my_model": row(hr_1=0.3, mrr=0.4), "oracle": row(hr_1=1.0, mrr=1.0)}
    sheet = sheet_of(summary, "uniform", "D")
    text = sheet_to_latex(sheet, "All_of it", "list-uniform")
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\caption{All\_of it}" in text
    assert [text.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 2, 1]
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {2}
    assert r"\begin{tabular}{lrr}" in text
    assert r"my\_model & \textbf{0.3000}" in text
    assert r"SASRec & \underline{0.2000}" in text
    assert "**0.3000**" in sheet_to_markdown(sheet)


def test_all_tables_of_a_run_are_well_formed_latex(report):
    text = (report[0] / "tables.tex").read_text()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") >= 5
    for table in re.findall(r"\\begin\{tabular\}\{(l.*?)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        lines = [line for line in table[1].splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(table[0])}
    assert not re.search(r"(?<!\\)[_#$](?![^{]*:)", re.sub(r"\\label\{[^}]*\}", "", text))
    assert (report[0] / "tables.md").read_text().startswith("# TWiCE-Rec on A<b>&c")


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("stage3", "E: stage 3"),
        ("stage3_D_sampled", "D: stage 3, match reward, by votes"),
        ("sasrec_release", "SASRec, release"),
        ("stage3_lambda4", "Stage 3, lambda 4"),
        ("mine", "mine"),
    ],
)
def test_readers_see_names(variant, name):
    assert variant_name(variant) == name


def test_metrics_have_names():
    assert metric_name("uniform/ndcg@10") == "NDCG@10"
    assert metric_with_list("full/hr@1") == "HR@1 in the full catalogue"


def test_reliability_is_counted_by_hand():
    confidences = np.array([[0.05, 0.25], [0.25, 1.0]], dtype=np.float32)
    found = reliability(confidences, np.array([[False, True], [False, True]]))
    assert found.confidence == pytest.approx([0.05, 0.25, 1.0])
    assert found.share.tolist() == [0.0, 0.5, 1.0]
    assert found.count.tolist() == [1, 2, 1]
    assert found.error == pytest.approx((0.05 * 1 + 0.25 * 2 + 0.0) / 4)


def test_curves_are_averaged_over_trainings_and_smoothed():
    logs = [{1: {"reward": 1.0, "kl": 0.5}, 2: {"reward": 3.0, "kl": 0.5}}, {1: {"reward": 3.0}, 2: {"reward": 5.0}}]
    found = averaged(logs)
    assert found.values.keys() == {"reward"}  # the second training has no KL
    assert found.values["reward"].tolist() == [2.0, 4.0]
    assert found.runs == 2
    # windows of three, of two at the ends
    assert smoothed(np.array([1.0, 2.0, 6.0, 3.0]), 3).tolist() == [1.5, 3.0, 11 / 3, 4.5]


def test_groups_and_positions_of_the_results_are_drawn(tmp_path):
    def group(label, value):
        return {"label": label, "n": 5, "variants": {"stage3": {"hr@1": {"mean": value, "ci95": [0.1, 0.9]}}}}

    rows = [  # of four users, one of whom chooses another item if the order is another
        Prediction(user, "I5", {"uniform": 1}, 42, ("I5", "I6"), (), {}, choices, (0, 1))
        for user, choices in zip(USERS, [("I5", "I6"), *[("I5", "I5")] * 3], strict=False)
    ]
    results = {
        "variants": {}, "common_users": {"variants": {}},
        "groups": {"history_length": [group("5-7", 0.2), group("8-10", 0.4)], "target_popularity": []},
        "position": {"stage3": position_of(rows)},
    }  # fmt: skip
    chart = figures.by_group(results, "uniform/hr@1", "history_length")
    assert chart.table[1] == [["5-7", "5", "0.2000 [0.1000, 0.9000]"], ["8-10", "5", "0.4000 [0.1000, 0.9000]"]]
    assert figures.by_group(results, "uniform/hr@1", "target_popularity") is None
    chart = figures.position(results, {})
    assert "E: stage 3: in 2 orders, 25.0% of choices change" in chart.caption
    svg, files = save(chart, tmp_path)
    assert svg.startswith("<svg viewBox=")
    assert [path.stat().st_size > 1000 for path in files] == [True, True]
    before = [path.read_bytes() for path in files]
    assert save(chart, tmp_path)[0] == svg
    assert [path.read_bytes() for path in files] == before


def test_what_is_recommended_and_what_other_orders_change_have_tables():
    """As `groups.details_of` gives them: a figure that is measured and shown nowhere helps nobody."""
    rows = [
        Prediction("u1", "I5", {"uniform": 1}, 42, ("I5", "I6"), (), {}, ("I5", "I6"), (0, 0)),
        Prediction("u2", "I5", {"uniform": 1}, 42, ("I5", "I6"), (), {}, ("I5", "I5"), (0, 1)),
    ]
    results = {
        "variants": {}, "common_users": {"n": 2, "variants": {}}, "comparisons": [], "left_out": [],
        "recommended": {
            "targets": {"targets": {"coverage": 0.25, "popularity": 1234.5}},
            "sasrec": {"uniform": {"coverage": 0.5, "popularity": 3.0}, "full": {"coverage": 0.75, "popularity": 9.0}},
        },
        "position": {"stage3": position_of(rows), "stage2": position_of([replace(rows[0], choices=("I5",))])},
    }  # fmt: skip
    tables = {section.id: section for section in sections_of(results, "uniform/hr@1", "D")}
    assert tables["recommended"].rows[1] == [["The targets", "0.250", "1,234.5"], ["SASRec", "0.500", "3.0"]]
    assert "2 users" in tables["recommended"].says
    # One of two users chooses otherwise; both orders differ with probability 1/2 for that user; HR@1 is 1 and 1/2.
    assert tables["orders"].rows[1] == [["E: stage 3", "2", "2", "0.500", "0.250", "0.2500", "0.000"]]
