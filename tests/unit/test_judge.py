"""What is judged, what judges are asked, what becomes of their replies; the stage with the rule judge."""

import json
from dataclasses import replace

import pytest

from evaluated import ROOT, well_argued, write_evaluation
from prompt_formats import prompt_format
from twice_rec import prompts
from twice_rec.catalog import ItemCatalog
from twice_rec.data.dataset import PreparedData
from twice_rec.errors import InputError
from twice_rec.evaluation import human_labels, judges
from twice_rec.evaluation.judge import Answer, JudgedRow, JudgeQuestions, judged, questions_of
from twice_rec.evaluation.judge_scores import scores_of, table_of
from twice_rec.evaluation.recipe import JudgeRecipe
from twice_rec.evaluation.rule_judge import RuleJudge
from twice_rec.files import read_records
from twice_rec.prompts import HIDDEN_ITEM, LEVELS
from twice_rec.rationales.answers import Malformed, parse_choice, parse_score
from twice_rec.rationales.completions import Completion
from twice_rec.rationales.curate import NotAnnotated
from twice_rec.rationales.leaks import hide_item
from twice_rec.rationales.recipe import SamplingConfig
from twice_rec.recipe_reader import load_recipe
from twice_rec.records import CONDITIONS, Example, Interaction, Item, Prediction, TrueReasons
from twice_rec.stages import stage0_prepare, stage4b_judge

RECIPE = str(ROOT / "recipes" / "tiny" / "judge.yaml")
ITEMS = [Item(f"B00{n}", title) for n, title in enumerate(("Green Oat Tea", "Rye Cracker Box", "Honey Jar", "Jam"))]
CATALOG = ItemCatalog(ITEMS)
SHOWN = prompt_format()


def example(user="u"):
    return Example(user, (Interaction("B000", 1, 5.0, "Love it"),), ("B001", "B002"), "B002")


def answer(text, user="u"):
    return Answer.of(Prediction(user, "B002", {"uniform": 1}, answers=(text, "never read")), example(user), CATALOG)


def written(item_id, title, rationale="They like tea."):
    think = f"<think> {rationale} </think> " if rationale is not None else ""
    return f"{think}<item_nm> {title} </item_nm> <item_id> {item_id} </item_id>"


# ---------------------------------------------------------------------------------------------------------------------
# Answers and questions


@pytest.mark.parametrize(
    ("text", "item", "rationale", "scores", "can_be_found"),
    [
        (written("B002", "Honey Jar"), "B002", "They like tea.", None, True),  # the target
        (written("B001", "Rye Cracker Box"), "B001", "They like tea.", None, True),
        (written("B003", "Jam"), "B003", "They like tea.", None, False),  # of the catalogue, not of the list
        (written("B999", "Jam"), None, "They like tea.", 0, False),
        (written("B002", "Jam"), None, "They like tea.", 0, False),  # a title of another item
        ("<think> They like tea. </think>", None, "They like tea.", 0, False),
        (written("B002", "Honey Jar", None), "B002", "", 1, False),  # nothing to judge
    ],
)
def test_what_is_judged_and_what_is_settled(text, item, rationale, scores, can_be_found):
    given = answer(text)
    assert (given.item.item_id if given.item else None, given.rationale) == (item, rationale)
    shown, hidden = questions_of([given], ["item_shown", "item_hidden"], seed=0)
    assert (shown.score, shown.is_settled) == (scores, scores is not None)
    assert hidden.is_settled == (not can_be_found)
    rows = [judged("j", question, None) for question in (shown, hidden) if question.is_settled]
    assert all(row.has_verdict and row.choice is None for row in rows)


def test_counterfactual_rationales_are_others_and_each_is_used_once():
    users = [f"u{n}" for n in range(9)]
    given = [answer(written("B002", "Honey Jar", f"Reason of {user}."), user) for user in users]
    given.append(answer(written("B999", "Jam"), "malformed"))
    asked = questions_of(given, ["counterfactual"], seed=3)
    assert [question.example.user_id for question in asked] == [*users, "malformed"]
    donors = [question.donor for question in asked[:-1]]
    assert sorted(donors) == users
    for question in asked[:-1]:
        assert question.donor != question.example.user_id
        assert question.rationale == f"Reason of {question.donor}."
        assert question.item.item_id == "B002"
    assert (asked[-1].donor, asked[-1].score) == ("", 0)
    assert questions_of(given, ["counterfactual"], seed=3) == asked
    assert questions_of(given, ["counterfactual"], seed=4) != asked
    assert questions_of(given[:1], ["counterfactual"], seed=3) == []  # nobody else gave one


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("So the Green Oat Tea fits.", "So the [x] fits."),
        ("so: green  oat-tea (B000), B0001 too", "so: [x] ([x]), B0001 too"),
        ("Green Oat and tea, GREEN OAT TEA! green oat tea", "Green Oat and tea, [x]! [x]"),
        ("They’d like oat tea.", "They’d like oat tea."),
    ],
)
def test_titles_and_ids_are_hidden(text, hidden):
    assert hide_item(text, ITEMS[0], "[x]") == hidden


def test_short_titles_long_titles_and_overlaps():
    assert hide_item("A jam, JAM and jams.", ITEMS[3], "[x]") == "A [x], [x] and jams."
    long = Item("A-1", "Organic Corn Flakes A-1, Twin Pack")
    assert hide_item("Organic corn flakes a-1 twin pack or corn flakes A-1", long, "[x]") == "[x] or [x]"
    assert hide_item("Twin pack of organic corn", long, "[x]") == "Twin pack of organic corn"


# ---------------------------------------------------------------------------------------------------------------------
# What language models are asked


def talked(question, *replies, **sampling):
    """The verdict on these replies, and what was asked."""
    dialogue = JudgeQuestions(CATALOG, SHOWN, SamplingConfig(model="m", **sampling)).verdict(question)
    asked, reply = [next(dialogue)], iter(replies)
    try:
        while True:
            asked.append(dialogue.send(Completion(next(reply), "stop", "", 1, 1)))
    except StopIteration as end:
        return end.value, [json.loads(request.body) for request in asked]


def test_what_is_shown_and_how_the_reply_is_read():
    given = answer(written("B002", "Honey Jar", "Tea calls for it: the Honey Jar, B002."))
    shown, hidden = questions_of([given], ["item_shown", "item_hidden"], seed=0)
    verdict, (asked,) = talked(shown, '{"why": "It is so.", "score": 2}')
    assert verdict == (2, "It is so.")
    text = asked["messages"][1]["content"]
    assert "Recommended product:\ntitle: Honey Jar" in text
    assert "Reasons:\nTea calls for it: the Honey Jar, B002." in text
    assert all(LEVELS[level] in text for level in (1, 2, 3))
    assert LEVELS[0] not in text
    assert asked["response_format"]["json_schema"]["schema"]["properties"]["score"]["enum"] == [1, 2, 3]
    verdict, (asked,) = talked(hidden, '{"why": "Sweet.", "candidate": 2}')
    assert verdict == ("B002", "Sweet.")
    text = asked["messages"][1]["content"]
    assert "Products:\n1. title: Rye Cracker Box\n2. title: Honey Jar" in text
    assert f"Reasons:\nTea calls for it: the {HIDDEN_ITEM}, {HIDDEN_ITEM}." in text
    assert "B002" not in text


def test_a_reply_without_a_verdict_is_asked_again_and_then_counted():
    (question,) = questions_of([answer(written("B002", "Honey Jar"))], ["item_shown"], seed=0)
    verdict, asked = talked(question, "Nice.", '{"why": "x", "score": 4}', '{"why": "x", "score": "3"}')
    assert verdict == (3, "x")
    assert "score must be a whole number from 1 to 3, not 4" in asked[2]["messages"][-1]["content"]
    with pytest.raises(NotAnnotated, match="malformed answer: there is no complete JSON object"):
        talked(question, "Nice.", "Fine.", max_reasks=1)

    def nonsense(question):
        raise NotAnnotated("malformed answer: there is no complete JSON object in it")

    row = judged("j", question, nonsense)
    assert (row.score, row.has_verdict) == (None, False)
    assert row.no_verdict.startswith("malformed answer")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"why": "a", "score": 1}', (1, "a")),
        ('<think> 3? {"score": 3} </think> ```json\n{"score": "2", "why": "a\\nb"}\n```', (2, "a b")),
        ('{"why": "a", "score": 0}', "score must be a whole number from 1 to 3, not 0"),  # looked up, never asked for
        ('{"why": "a", "score": 2.5}', "not 2.5"),
        ('{"why": "a", "score": true}', "not true"),
        ('{"why": 1, "score": 2}', "why must be text"),
        ('{"score": 2}', "no key why"),
        ('{"why": "a", "score": 2} {"why": "a", "score": 3}', "several JSON objects that differ"),
    ],
)
def test_scores_are_read_or_refused(text, found):
    if isinstance(found, tuple):
        assert parse_score(text) == found
    else:
        with pytest.raises(Malformed, match=found):
            parse_score(text)


def test_choices_are_numbers_of_the_list():
    assert parse_choice('{"why": "a", "candidate": 10}', 10) == (10, "a")
    with pytest.raises(Malformed, match="candidate must be a whole number from 1 to 10, not 11"):
        parse_choice('{"why": "a", "candidate": 11}', 10)


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def row(user, score=None, judge="a", condition="item_shown", **more):
    return JudgedRow(user, judge, condition, "B001", "text", score, **more)


def test_sums_by_hand():
    rows = [
        row("u", 3), row("v", 1), row("w", None, no_verdict="refused"), row("x", 0, is_settled=True),
        row("u", 1, condition="counterfactual"), row("v", 1, condition="counterfactual"),
        row("w", 2, condition="counterfactual"), row("x", 0, condition="counterfactual", is_settled=True),
        row("u", choice="B001", condition="item_hidden"), row("v", choice="B002", condition="item_hidden"),
        row("x", condition="item_hidden", is_settled=True), row("w", condition="item_hidden", no_verdict="refused"),
    ]  # fmt: skip
    scores = scores_of(rows, {"u": 10, "v": 10, "w": 10, "x": 5}, {}, seed=0)
    assert scores["users"] == 4
    shown, other, hidden = (scores["judges"]["a"][name] for name in ("item_shown", "counterfactual", "item_hidden"))
    assert (shown["n"], shown["without_verdict"], shown["settled"]) == (3, 1, 1)
    assert shown["distribution"] == {"0": 1, "1": 1, "2": 0, "3": 1}
    assert (shown["mean"], shown["share_3"]) == (pytest.approx(4 / 3), pytest.approx(1 / 3))
    assert shown["share_3_ci95"][0] <= 1 / 3 <= shown["share_3_ci95"][1]
    assert (other["n"], other["mean"]) == (4, 1.0)
    # u: 1 - 3, v: 1 - 1; w has no verdict on its own rationale, x needs none.
    assert (other["difference"]["n"], other["difference"]["mean"]) == (2, -1.0)
    assert (hidden["n"], hidden["without_verdict"], hidden["share"]) == (3, 1, pytest.approx(1 / 3))
    assert hidden["chance"] == pytest.approx((1 / 10 + 1 / 10 + 1 / 5) / 3)
    assert scores["agreement"] == []
    text = table_of("stage2", scores)
    assert "stage2, 4 users:" in text
    assert "another user's rationale changes the mean score by -1.000" in text


def test_nothing_to_average_is_null_and_no_zero():
    scores = scores_of([row("u", no_verdict="refused")], {"u": 10}, {}, seed=0)["judges"]["a"]["item_shown"]
    assert (scores["n"], scores["without_verdict"], scores["mean"], scores["share_3"]) == (0, 1, None, None)
    assert json.dumps(scores, allow_nan=False)


def test_every_two_judges_are_compared_on_what_both_judged():
    a = [row("u", 1), row("v", 2), row("w", 3), row("x", 3), row("y", 0, is_settled=True), row("z", 1)]
    b = [replace(r, judge="b", score=s) for r, s in zip(a, (1, 2, 2, 3, 0, None), strict=True)]
    humans = {"Ada": {("u", "item_shown"): 1, ("v", "item_shown"): 3, ("y", "item_shown"): 0}}
    found = scores_of([*a, *b], dict.fromkeys("uvwxyz", 10), humans, seed=0)["agreement"]
    assert [(of["a"], of["b"], of["condition"], of["n"]) for of in found] == [
        ("a", "b", "item_shown", 4),
        ("a", "Ada", "item_shown", 2),
        ("b", "Ada", "item_shown", 2),
    ]
    assert found[0]["kappa"] == pytest.approx(4 / 5)  # worked out in test_agreement
    # 1 and 2 against 1 and 3: mean 1/2; by chance 5/2 + 10/2 - 2 * 3/2 * 2 = 3/2.
    assert found[1]["kappa"] == pytest.approx(1 - (1 / 2) / (3 / 2))


# ---------------------------------------------------------------------------------------------------------------------
# Labels of humans


@pytest.fixture
def asked():
    users = ("u", "v", "w")
    given = [answer(written("B002", "Honey Jar", f"Reason of {user}."), user) for user in users]
    given.append(answer(written("B999", "Jam"), "x"))
    return {"stage2": questions_of(given, list(CONDITIONS), seed=0)}


def filled(path, *changes):
    """Fill the lines of an exported file."""
    rows = [
        {**json.loads(line), **change} for line, change in zip(path.read_text().splitlines(), changes, strict=False)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_labels_are_written_without_scores_and_read_back(asked, tmp_path):
    path = tmp_path / "labels.jsonl"
    assert human_labels.export(path, asked, CATALOG, SHOWN, seed=0) == 6  # x is settled, item_hidden has no score
    rows = filled(path, {"judge": "Ada", "score": 3}, {"judge": "Ada", "score": 1}, {"judge": "Bo", "score": 0}, {})
    assert {row["condition"] for row in rows} <= {"item_shown", "counterfactual"}
    assert rows[0]["item"].startswith("title: Honey Jar")
    assert rows[0]["history"] == ["title: Green Oat Tea | rating: Excellent"]
    found = human_labels.read(path, asked, ["rule"])
    key = lambda row: (row["user_id"], row["condition"])
    assert found == {"stage2": {"Ada": {key(rows[0]): 3, key(rows[1]): 1}, "Bo": {key(rows[2]): 0}}}
    with pytest.raises(InputError, match="labels.jsonl exists, and may hold scores"):
        human_labels.export(path, asked, CATALOG, SHOWN, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": "nobody"}, "line 2: user nobody is not judged under"),
        ({"rationale": "Of a model before."}, "line 2: the score is of another rationale than stage2 has now"),
        ({"score": 4}, "line 2: score is 4; it must be 0 to 3"),
        ({"score": "3"}, "line 2: not a Label: score"),
        ({"condition": "item_hidden"}, "line 2: condition is 'item_hidden'; humans score item_shown and"),
        ({"judge": " "}, "line 2: judge is empty; put the name"),
        ({"judge": "rule"}, "line 2: judge is 'rule', as a judge of the recipe is called"),
        ({"more": 1}, "line 2: not a Label: more"),
    ],
)
def test_labels_that_cannot_be(asked, tmp_path, change, message):
    path = tmp_path / "labels.jsonl"
    human_labels.export(path, asked, CATALOG, SHOWN, seed=0)
    filled(path, {"judge": "Ada", "score": 3}, {"judge": "Ada", "score": 3, **change})
    with pytest.raises(InputError, match=message):
        human_labels.read(path, asked, ["rule"])


def test_labels_that_are_there_twice(asked, tmp_path):
    path = tmp_path / "labels.jsonl"
    human_labels.export(path, asked, CATALOG, SHOWN, seed=0)
    (first,) = filled(path, {"judge": "Ada", "score": 3})
    path.write_text(2 * (json.dumps(first) + "\n"))
    with pytest.raises(InputError, match="line 2: Ada judges user .* in line 1 already"):
        human_labels.read(path, asked, ["rule"])
    path.write_text(json.dumps({**first, "variant": "another"}) + "\n")
    assert human_labels.read(path, asked, ["rule"]) == {"stage2": {}}


def test_a_changed_rubric_is_another_question(asked, monkeypatch):
    of_model, by_rule = SamplingConfig(model="m"), JudgeRecipe(run_dir="r", domain="D", seed=0).configs["rule"]
    digest = lambda config=of_model: judges.rubric_of(config, asked["stage2"], CATALOG, SHOWN)
    before = digest()
    assert before == digest()
    assert digest(by_rule) == digest(by_rule) != before
    monkeypatch.setattr(prompts, "LEVELS", {**LEVELS, 3: "satisfying: it rhymes"})
    assert digest() != before


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--judges", "{}"], "judges is empty"),
        (["--judges", "{a: {modle: m}}"], "judges: a: unknown key modle"),
        (["--judges", "{a: {judged_by: openai}}"], "judges: a: judged_by openai needs model"),
        (["--judges", "{a: {temperature: hot}}"], "judges: a: temperature: Input should be a valid number"),
        (["--judges", "{a: {judged_by: me}}"], "judges: a: judged_by: Input should be 'rule', 'openai' or 'batch'"),
        (["--judges", "{a: {max_cost: 1}}"], "judges: a: max_cost is 1"),
        (["--judges", "{a/b: {}}"], "judges has the name 'a/b'"),
        (["--judges", "{a: {base_url: ftp}}"], "judges: a: base_url is no address"),
        (["--judges", "3"], "judges must be a mapping, found a int, not shown here"),
        (["--judged_by", "openai"], "judged_by openai needs model"),
        (["--variants", "../x"], "variants holds '../x'"),
        (["--variants", "base", "base"], "variants names one twice"),
        (["--conditions", "[]"], "conditions is empty"),
        (["--num_judged", "0"], "num_judged is 0; it must be at least 1"),
    ],
)
def test_recipes_that_cannot_be(flags, message):
    with pytest.raises(InputError) as caught:
        load_recipe(RECIPE, JudgeRecipe, flags)
    assert message in str(caught.value)


def test_a_judge_has_the_keys_of_the_recipe_but_for_its_own():
    flags = ["--judges", "{a: {model: x, max_reasks: 0}, b: {}, c: {judged_by: rule}}", "--judged_by", "openai"]
    configs = load_recipe(RECIPE, JudgeRecipe, [*flags, "--model", "m", "--concurrency", "4"]).configs
    assert [(c.judged_by, c.model, c.max_reasks, c.concurrency) for c in configs.values()] == [
        ("openai", "x", 0, 4),
        ("openai", "m", 2, 4),
        ("rule", "m", 2, 4),
    ]
    assert "base_url" not in configs["a"].what_decides()
    assert configs["a"].what_decides()["model"] == "x"
    assert configs["c"].what_decides() == {"judged_by": "rule"}


# ---------------------------------------------------------------------------------------------------------------------
# The stage, by rule


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    flags = ["--synthetic_users", "120", "--synthetic_items", "60", "--k_core", "2"]
    assert stage0_prepare.main([str(ROOT / "recipes/tiny/prepare.yaml"), "--run_dir", str(run_dir), *flags]) == 0
    good = well_argued(run_dir)
    write_evaluation(run_dir, "stage3", good)
    write_evaluation(run_dir, "stage2", lambda e: good(e) if e.user_id < "AM" else "<think> Fine. </think>", users=80)
    write_evaluation(run_dir, "stage2_item_only", lambda e: "", with_rationale=False)
    write_evaluation(run_dir, "stage2_item_first", lambda e: "", item_first=True)
    write_evaluation(run_dir, "sasrec", lambda e: "", ranking=None)
    return run_dir


def stage(run_dir, *flags):
    return stage4b_judge.main([RECIPE, "--run_dir", str(run_dir), *flags])


def test_the_stage_by_rule(prepared, capfd):
    flags = ("--variants", "stage2", "stage3", "--num_judged", "50")
    assert stage(prepared, *flags) == 0
    output = capfd.readouterr()
    assert "stage3, 50 users:" in output.out
    assert "eval/stage3/predictions.jsonl" not in output.err
    assert "stage3: 80 of its" in output.err
    rows = {v: list(read_records(prepared / "judge" / v / "verdicts.jsonl", JudgedRow)) for v in ("stage2", "stage3")}
    scores = {v: json.loads((prepared / "judge" / v / "scores.json").read_text()) for v in rows}
    users = {row.user_id for row in rows["stage3"]}
    assert users == {row.user_id for row in rows["stage2"]}
    assert len(users) == 50
    assert len(rows["stage3"]) == 150
    # The rule judge, called by hand.
    data = PreparedData(prepared / "data")
    reasons = {r.user_id: r for r in read_records(prepared / "data" / "true_reasons.jsonl", TrueReasons)}
    examples = {e.user_id: e for e in data.examples("test", "uniform")}
    judge = RuleJudge(data.catalog, reasons, 42)
    for found in rows["stage3"]:
        item = data.catalog[found.item_id]
        if found.condition == "item_hidden":
            assert found.choice == judge.choose(found.rationale, examples[found.user_id])[0]
        else:
            assert found.score == judge.score(found.rationale, examples[found.user_id], item)[0]
    shown, other = (scores["stage3"]["judges"]["rule"][name] for name in ("item_shown", "counterfactual"))
    assert shown["mean"] > other["mean"] + 0.5
    assert other["difference"]["ci95"][1] < 0
    bad = [found for found in rows["stage2"] if found.condition == "item_shown" and found.user_id >= "AM"]
    assert {(found.score, found.is_settled) for found in bad} == {(0, True)}
    hidden = scores["stage3"]["judges"]["rule"]["item_hidden"]
    assert hidden["share_ci95"][0] > hidden["chance"] == pytest.approx(0.1)
    assert stage(prepared, *flags) == 0
    assert capfd.readouterr().err.count("is finished already; nothing to do") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--variants", "stage3_D"], "it is made by evaluate.sh with stage3_D among its variants"),
        (["--variants", "stage2_item_only"], "was asked for the item alone (with_rationale false)"),
        (["--variants", "stage2_item_first"], "with item_first, the ranking by likelihood needs no completion"),
        (["--variants", "sasrec"], "this model scores the catalogue and writes no rationales"),
        (["--variants", "stage3", "--judged_list", "hard"], "no answers about hard lists"),
        (["--variants", "stage3", "--human_labels", "none.jsonl"], "none.jsonl: no such file"),
        (["--variants", "stage3", "--judged_by", "openai", "--model", "m", "--api_key_env", "TWICE_NO_KEY"],
         "the environment variable TWICE_NO_KEY is not set"),
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_said_in_one_line(prepared, capfd, flags, message):
    before = sorted(prepared.glob("judge/*"))
    assert stage(prepared, *flags) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(prepared.glob("judge/*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, rows[0]], "is there twice"),
        (lambda rows: [{**rows[0], "target": "B000000000"}, *rows[1:]], "was asked about another list than data/ has"),
        (lambda rows: [{**rows[0], "ranking": rows[1]["ranking"]}, *rows[1:]], "was asked about another list"),
        (lambda rows: [{**rows[0], "user_id": "nobody"}, *rows[1:]], "user nobody was asked about another list"),
        (lambda rows: [{**rows[0], "answers": []}, *rows[1:]], "has no completion to judge"),
    ],
)
def test_predictions_that_cannot_be(prepared, change, message):
    recipe = load_recipe(RECIPE, JudgeRecipe, ["--run_dir", str(prepared), "--variants", "stage3"])
    rows = [json.loads(line) for line in (prepared / "eval" / "stage3" / "predictions.jsonl").read_text().splitlines()]
    path = prepared / "changed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    with pytest.raises(InputError, match=message):
        judges.read_answers(recipe, PreparedData(prepared / "data"), {"stage3": path})


def test_fewer_users_than_wanted_are_all_judged_and_it_is_said(prepared, capfd):
    assert stage(prepared, "--variants", "stage2", "--num_judged", "300", "--overwrite") == 0
    output = capfd.readouterr()
    assert "num_judged is 300, but there are 80 users: all are judged" in output.err
    assert "stage2, 80 users:" in output.out


def test_humans_are_compared_with_the_rule(prepared, tmp_path, capfd):
    path = tmp_path / "labels.jsonl"
    flags = ("--variants", "stage3", "--num_judged", "20", "--conditions", "item_shown", "counterfactual")
    assert stage(prepared, *flags, "--export_for_labels", str(path)) == 0
    assert "40 lines to fill in" in capfd.readouterr().err
    assert stage(prepared, *flags, "--overwrite") == 0
    rule = {
        (r.user_id, r.condition): r.score for r in read_records(prepared / "judge/stage3/verdicts.jsonl", JudgedRow)
    }
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"judge": "Ada", "score": rule[line["user_id"], line["condition"]]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stage(prepared, *flags, "--human_labels", str(path)) == 2  # another input than before
    assert stage(prepared, *flags, "--human_labels", str(path), "--overwrite") == 0
    found = json.loads((prepared / "judge" / "stage3" / "scores.json").read_text())["agreement"]
    assert [(of["a"], of["b"], of["n"], of["same"]) for of in found] == [("rule", "Ada", 20, 1.0)] * 2
    assert {of["kappa"] for of in found} <= {1.0, None}


def test_without_true_reasons_there_is_no_rule_judge(prepared, capfd):
    path = prepared / "data" / "true_reasons.jsonl"
    hidden = path.rename(path.with_name("hidden"))
    try:
        assert stage(prepared, "--variants", "stage3") == 2
    finally:
        hidden.rename(path)
    assert "only the synthetic domain knows what truly speaks for an item" in capfd.readouterr().err
