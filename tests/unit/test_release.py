"""The release's defects, counted in small files by hand, and with a SASRec whose scores are known."""

import json
from collections import Counter

import numpy as np
import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.data import dataset
from twice_rec.data.released_lists import diagnose
from twice_rec.data.sources.release import ReleaseSource
from twice_rec.errors import InputError
from twice_rec.evaluation import release_sasrec
from twice_rec.evaluation.quotation import fill
from twice_rec.evaluation.release import DEFECTS, findings_in_files, in_table_order, order_in_sets
from twice_rec.files import write_records
from twice_rec.records import CandidateLists, Interaction, Item, UserSequence
from twice_rec.stages.command_line import main

SHARED = ["A", "B", "C"]


def test_targets_that_no_other_list_has():
    """Three lists share A, B and C; two targets are outside, one is among them."""
    lists = [([*SHARED, "X"], "X"), (["Y", *SHARED], "Y"), ([*SHARED, "Z"], "B")]
    found = diagnose(lists, Counter(A=9, B=5, C=1, X=6, Y=1))
    assert (found.num_lists, found.num_candidates, found.in_all, found.targets_in_pool) == (3, (4, 4), 3, 1)
    assert found.pool == {"A", "B", "C"}
    assert (found.pool_count, found.catalog_count) == (5.0, 4.4)
    hit_rates = {name: value[0] for name, value in found.hit_rates.items()}
    # A has 9 interactions, so popularity never puts a target first; Y ties with C behind A and B.
    expected = {"random, expected": 1 / 4, "not in the shared pool": 2 / 3, "popularity in training": 0.0}
    assert hit_rates == pytest.approx(expected)
    for mean, low, high in found.hit_rates.values():
        assert low <= mean <= high


def test_lists_that_share_nothing():
    found = diagnose([(["A", "B"], "A"), (["C", "D"], "D")], Counter(A=2, C=1))
    assert found.pool == frozenset()
    # All candidates are equally outside: ties count against the target.
    assert found.hit_rates["not in the shared pool"][0] == 0.0
    assert found.hit_rates["popularity in training"][0] == 0.5


def test_one_list_shares_nothing_with_others():
    assert diagnose([(["A", "B"], "A")], Counter(A=1)).pool == frozenset()


TITLES = ("tea", "rice", "salt", "soap", "Tea", "milk")  # of B1 to B6: two are the same


def answer(rationale, title, item_id):
    return f"<think> {rationale} </think> <item_nm> {title} </item_nm> <item_id> {item_id} </item_id>"


def row(items, candidates=(), output=""):
    """A released row of item numbers, the target last; with candidates, a prompt."""
    history = ",".join(map(str, items[:-1]))
    shown = "".join(f"title:item {i}\n- item_id:B{i}\n\n" for i in candidates)
    text = f"[Purchase History] : none\n[Candidate List]: {shown}"
    return {"user_id": "u", "output_id": history, "positive_item_id": str(items[-1]), "input": text, "output": output}


FILES = {
    "amazon_vocab_D.json": {str(i): title for i, title in enumerate(TITLES, start=1)},
    "amazon_D_llm_meta.json": [
        {
            "input": f"[Item Title] : {title}\n ***Instruction***",
            "output": f"<item_info> item_id:B{i}\n- description:\n- details: </item_info>",
        }
        for i, title in enumerate(TITLES, start=1)
    ],
    "amazon_D_sasrec_train.json": [row([1, 2, 3]), {**row([2, 1, 6]), "user_id": "v"}],
    "amazon_D_sasrec_test.json": [row([1, 2, 3, 4, 5]), {**row([2, 1, 6, 3, 4]), "user_id": "v"}],
    "amazon_D_llm_train_case_1.json": [
        row([1, 2, 3], [3, 6, 5], answer("They bought salt", "salt", "B3")),  # 5 is bought later
        row([2, 1, 6], [6, 2, 5], answer("They like milk.", "milk", "B6")),  # 2 is in the history
        row([1, 2], [2, 3, 4], answer("Try B2 well now, dear friend", "rice", "B2").replace("</item_nm> ", "")),
    ],
    "amazon_D_llm_test.json": [row([1, 2, 3, 4, 5], [5, 2, 4]), row([2, 1, 6, 3, 4], [4, 5])],
}


@pytest.fixture
def released(tmp_path):
    """A folder of released files: two users, three prompts of stage 2, two test prompts."""
    folder = tmp_path / "released"
    folder.mkdir()
    for name, rows in FILES.items():
        (folder / name).write_text(json.dumps(rows))
    return folder


def figures(findings, defect):
    return [(f.value, f.of) for f in findings if f.defect == defect]


def test_what_the_files_show(released):
    found = findings_in_files(ReleaseSource(released, "D"))
    assert figures(found, "training") == [(20, None)]  # two users are one batch
    assert figures(found, "memory") == [(2, 3)]
    # Both test lists have 4 and 5, both of them targets; 4 and 5 are in no training sequence.
    random = (1 / 3 + 1 / 2) / 2
    pool = [value for value, _ in figures(found, "pool")]
    assert pool == pytest.approx([2, 0, random, 0.0, 0.0, 0.0, 6 / 4])
    assert figures(found, "own_items") == [(1, 2), (1, 3), (1, 3)]
    assert figures(found, "table_1") == [(8, 8)]
    assert figures(found, "title") == [(1, None), (1, 2)]
    assert figures(found, "padding") == [(2, None), (2, None), (0, None)]
    # The last answer lacks one of six tags; the paper's four tags are there.
    assert figures(found, "tags") == [(pytest.approx((1.5 + 1.5 + 1.25) / 3), None), (1.0, None)]
    assert figures(found, "leaks") == [(2, 3), (0, 3), (1, 3), (1, 3)]  # title, brand, id, purchase
    assert figures(found, "length") == [(pytest.approx((11 + 11 + 13) / 3), None), (13, None)]
    assert figures(found, "curation") == [(2, 2)]
    assert figures(found, "filter") == [(5, None), (2, 2), (0, 2), (6, 6)]
    (mean, _), (low, _), (high, _) = figures(found, "set")
    assert 0 <= low <= mean <= high <= 1


def test_every_defect_is_in_the_table_once():
    rows = [finding.row() for finding in in_table_order([])]
    assert [row["defect"] for row in rows] == list(DEFECTS)
    assert {row["counted"] for row in rows if row["defect"] in ("failures", "keys", "evaluation")} == {
        "seen in its code alone"
    }
    assert {"defect": "tau", "release": DEFECTS["tau"], "counted": "needs --run_dir"} in rows


def test_the_order_of_a_set_is_that_of_its_hash_seed():
    lists = [[f"B{10 * i + j}" for j in range(5)] for i in range(20)] + [["A", "A"]]
    once, again, other = (order_in_sets(lists, seed) for seed in (1, 1, 2))
    assert once == again != other
    assert [sorted(items) for items in once] == [sorted(set(items)) for items in lists]
    firsts = [order[0] == own[0] for order, own in zip(once[:-1], lists, strict=False)]
    assert 0 < np.mean(firsts) < 0.6  # a fifth is expected


Z = np.array([0.0, 0.0, -2.0, 1.0, -1.0, 2.0, -0.5])  # of padding and B1 to B6; .3 is passed from -.85 on


class KnownScores:
    """A SASRec that scores an item alike for all users."""

    z = Z

    @classmethod
    def load(cls, path, catalog):
        assert path.name == "model.safetensors"
        return cls()

    def logits(self, histories, items):
        return self.z[items]

    def item_means(self, histories):
        return self.z

    def popularity_share(self, histories):
        return 0.9


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """The users of the released files, prepared; SASRec's scores are `KnownScores`."""
    run, data = tmp_path / "run", tmp_path / "run" / "data"
    ItemCatalog([Item(f"B{i}", title) for i, title in enumerate(TITLES, start=1)]).save(data / dataset.CATALOG)
    sequences = {"u": [1, 2, 3, 4, 5], "v": [2, 1, 6, 3, 4]}
    write_records(
        data / dataset.SEQUENCES,
        [UserSequence(u, tuple(Interaction(f"B{i}") for i in items), 3, 3, 4) for u, items in sequences.items()],
    )
    for split, lists in {"train": ([3, 6, 5], [6, 4, 2]), "test": ([5, 6, 2], [4, 3, 1])}.items():
        shown = [(f"B{items[0]}", {"uniform": tuple(f"B{i}" for i in items)}) for items in lists]
        records = [CandidateLists(user, *one) for user, one in zip("uv", shown, strict=True)]
        write_records(data / dataset.candidates_file(split), records)
    (run / release_sasrec.SASREC).mkdir()
    (run / release_sasrec.SASREC / "model.safetensors").touch()
    monkeypatch.setattr(release_sasrec, "SASRecScorer", KnownScores)
    return run


def test_what_its_sasrec_shows(released, run_dir):
    found = release_sasrec.findings_of_sasrec(ReleaseSource(released, "D"), run_dir)
    # Test: 5 is first of [5, 6, 2], 4 is last of [4, 3, 1]; in training 1 and 2 occur twice, 3 and 6 once.
    assert figures(found, "training") == [(0.5, None), (0.0, None)]
    assert figures(found, "popularity") == [(0.9, None)]
    assert figures(found, "tau") == [(3 / 4, None), (1 / 2, None)]  # 6, 3 and 1 pass, 2 does not; 5 passes, 4 does not
    assert figures(found, "memory") == [(0.5, None), (0.5, None)]  # training: 5 is before 3, 6 is first
    tea, other_tea = 0.5, 1 / (1 + np.exp(-2))
    assert figures(found, "title") == [(pytest.approx(other_tea - tea), None)]
    assert figures(found, "outside") == [(0.5, None), (1.0, None), (pytest.approx(other_tea), None)]
    assert all(0.9 < value < 1 for value, _ in figures(found, "lambda"))


def test_lambda_changes_nothing_if_all_confidences_are_small(released, run_dir, monkeypatch):
    """A hit earns 1 and a miss 0 then, whatever lambda is."""
    monkeypatch.setattr(KnownScores, "z", Z - 9)
    found = release_sasrec.findings_of_sasrec(ReleaseSource(released, "D"), run_dir)
    assert figures(found, "lambda") == [(pytest.approx(1.0), None)] * 2
    assert figures(found, "tau") == [(0.0, None), (0.0, None)]


def test_a_run_of_other_files_is_refused(released, run_dir):
    items = [Item(f"B{i}", title) for i, title in enumerate(TITLES[:-1], start=1)]
    ItemCatalog(items).save(run_dir / "data" / dataset.CATALOG)
    with pytest.raises(InputError, match="has another catalogue than"):
        release_sasrec.findings_of_sasrec(ReleaseSource(released, "D"), run_dir)


def test_the_command_prints_and_writes_what_documents_quote(released, run_dir, tmp_path, capfd):
    quote = tmp_path / "release.json"
    words = ["release", str(released), "--run_dir", str(run_dir), "--quote", str(quote)]
    assert main(words) == 0
    shown = capfd.readouterr().out
    assert "| training lists with an item that the user bought later" in shown
    assert "1 of 3 |" in shown
    assert "needs --run_dir" not in shown
    quoted = json.loads(quote.read_text())
    assert quoted["about"]["commands"] == [f"twice-rec {' '.join(words)}"]
    assert (quoted["about"]["domain"], len(quoted["about"]["commits"])) == ("D", 1)
    document = tmp_path / "D.md"
    document.write_text("<!-- numbers release.json defects -->\nold\n<!-- end of numbers -->\n")
    assert fill(document) == f"<!-- numbers release.json defects -->\n{shown.strip()}\n<!-- end of numbers -->\n"


@pytest.mark.parametrize(
    ("words", "names", "message"),
    [
        ([], [], "expected FOLDER [DOMAIN] [--run_dir RUN] [--quote FILE], found nothing"),
        (["FOLDER", "A", "B"], [], "expected FOLDER [DOMAIN]"),
        (["FOLDER", "--runs", "x"], [], "found --runs, expected --run_dir or --quote: twice-rec release FOLDER"),
        (["FOLDER", "--run_dir"], [], "found --run_dir, expected a value behind it"),
        (["FOLDER", "--run_dir", "--quote", "x"], [], "found --run_dir, expected a value behind it"),
        (["FOLDER", "A", "--quote", "FOLDER"], [], "is a folder; give the name of a JSON file"),
        (["FOLDER", "A", "--run_dir", "FOLDER"], [], "catalog.jsonl: no such file or folder; it is made by prepare.sh"),
        (["FOLDER"], [], "no amazon_*_llm_test*.json; expected: twice-rec release FOLDER [DOMAIN]"),
        (["FOLDER"], ["A", "B"], "test prompts of A, B; name one domain"),
        (["FOLDER"], ["A"], "no file named amazon_A_sasrec_train*.json"),
    ],
)
def test_what_cannot_be_counted(tmp_path, capfd, words, names, message):
    for name in names:
        (tmp_path / f"amazon_{name}_llm_test_sample.json").write_text(json.dumps([]))
    assert main(["release", *(str(tmp_path) if word == "FOLDER" else word for word in words)]) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("amazon_D_llm_train_case_1.json", None, "no file amazon_D_llm_train_case_1*.json with prompts"),
        ("amazon_D_llm_train_case_1.json", [row([1, 2], [2], "none")], "no complete <think> element in `output`"),
        ("amazon_D_llm_test.json", [row([1, 2], [3])], "1 candidates in `input`, and the target is none of them"),
        ("amazon_D_llm_test.json", [row([1, 9])], "item index outside 1..6"),
        ("amazon_D_llm_test.json", {"a": 1}, "expected a list of objects, as the authors released it"),
    ],
)
def test_files_that_are_not_as_released(released, capfd, name, content, message):
    (released / name).unlink()
    if content is not None:
        (released / name).write_text(json.dumps(content))
    assert main(["release", str(released), "D"]) == 2
    assert message in capfd.readouterr().err
