"""Which rationales are kept: title check, near-duplicates, leaks, the files and the report, exemplars."""

import json
import random
from dataclasses import replace

import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.errors import InputError
from twice_rec.files import read_records
from twice_rec.rationales.curate import Annotator, Checks, NotAnnotated, curate
from twice_rec.rationales.duplicates import NearDuplicates
from twice_rec.rationales.exemplars import load_exemplars
from twice_rec.rationales.leaks import leaks_of, names_title, words_of
from twice_rec.rationales.recipe import CurationConfig
from twice_rec.rationales.released import ReleasedRationales
from twice_rec.rationales.report import Judged, load_report, save_report, to_markdown
from twice_rec.records import Example, Interaction, Item, Rationale

TEA = Item("B00TEA", "Quiet Leaf Organic Chamomile Tea, 100 count", brand="Quiet Leaf", categories=("Grocery", "Tea"))
HONEY = Item("B0HONEY", "Beeway Raw Clover Honey, 24 oz", details='"Brand": "Beeway", "Size": "24 oz"')
JERKY = Item("B0JERKY", "Firebrand Extra Hot Beef Jerky", categories=("Grocery", "Jerky"))
MUG = Item("B000MUG", "Blue Mug")
CATALOG = ItemCatalog([TEA, HONEY, JERKY, MUG])
CONFIG = CurationConfig(min_words=3, max_words=50)
HISTORY = (Interaction("B00TEA", rating=5.0), Interaction("B000MUG"))
EXAMPLE = Example("u", HISTORY, ("B0HONEY", "B0JERKY"), "B0HONEY")


class TestLeaks:
    @pytest.mark.parametrize(
        ("text", "leaks"),
        [
            ("They drink chamomile, and something sweet to stir in is missing.", ()),
            ("Beeway Raw Clover Honey goes with tea.", ("title", "brand")),
            ("Raw clover honey, 24 oz, goes with tea.", ("title",)),
            ("The raw honey goes with tea.", ()),
            ("Anything by BEEWAY would do.", ("brand",)),
            ("Item b0honey fits.", ("id",)),
            ("They bought chamomile tea. Sweetness is missing.", ()),
            ("They bought the clover honey for it.", ("purchase",)),
            ("This led to the next purchase.", ("purchase",)),
            ("The logic of this choice is clear.", ("purchase",)),
            ("Hence their subsequent purchase of raw clover honey.", ("title", "purchase")),
        ],
    )
    def test_rules(self, text, leaks):
        assert leaks_of(text, HONEY) == leaks

    def test_sizes_and_small_words_name_nothing(self):
        assert not names_title(words_of("24 oz of the"), HONEY.title)
        assert names_title(words_of("a blue mug"), MUG.title)
        assert not names_title(words_of("a blue cup"), MUG.title)
        assert not names_title([], "100 oz")


class TestOtherProducts:
    find = staticmethod(lambda text: Checks(CONFIG, CATALOG).other_product(text, EXAMPLE))

    def test_another_product_is_found(self):
        assert self.find("So the firebrand EXTRA hot beef jerky is next.") == "firebrand extra hot beef jerky"

    def test_target_history_and_short_titles_are_not(self):
        assert self.find(f"After {TEA.title} in a Blue Mug comes {HONEY.title}") is None
        assert self.find("extra hot beef jerky") is None


class TestNearDuplicates:
    WORDS = tuple(f"w{i}" for i in range(500))

    def texts(self, count, words=60):
        draw = random.Random(0)
        return [draw.choices(self.WORDS, k=words) for _ in range(count)]

    def find(self, texts, limit=0.8):
        duplicates = NearDuplicates()
        for text in texts:
            duplicates.add(" ".join(text))
        return duplicates.find(limit)

    def test_different_texts_stay(self):
        assert self.find(self.texts(2000)) == {}

    def test_the_same_words_and_small_changes_are_found(self):
        texts = self.texts(1500)
        changed = [[*text[:-1], "end"] for text in texts[:300]]
        found = self.find([*texts, *changed, ["W0", "w1,"], ["w0", "w1"]])
        assert found == {**{1500 + i: i for i in range(300)}, 1801: 1800}

    def test_half_changed_stays(self):
        texts = self.texts(200)
        assert (
            self.find([*texts, *(text[:30] + other[30:] for text, other in zip(texts, texts[::-1], strict=True))]) == {}
        )

    def test_empty(self):
        assert self.find([]) == {}
        assert self.find([[], []]) == {1: 0}


def examples(count):
    return [replace(EXAMPLE, user_id=f"u{i}") for i in range(count)]


def annotator(texts, label="x", review=None):
    """Annotates user u<i> with texts[i]: a text, a Rationale's changes, or an exception."""

    def annotate(example):
        given = texts[int(example.user_id[1:])]
        if isinstance(given, Exception):
            raise given
        changes = {"text": given} if isinstance(given, str) else given
        values = {"text": "sweet things for tea", "verdict": "relevant", "evidence": (0,), "confidence": 0.5, **changes}
        return Rationale(example.user_id, example.target, annotator="test", **values)

    return Annotator(label, annotate, review)


def test_files_reasons_and_report(tmp_path):
    texts = [
        "tea calls for something sweet",
        NotAnnotated("refused by the model: no"),
        "too short",
        {"verdict": "weak"},
        {"evidence": (2,)},
        "firebrand extra hot beef jerky is what they want",
        "Tea calls for something SWEET.",
        "raw clover honey was bought for tea",
        "this one the check does not like",
        {"text": "word " * 51},
    ]
    review = lambda example, rationale: "self-check: not causal" if "check" in rationale.text else None
    report = curate(examples(10), annotator(texts, review=review), CONFIG, CATALOG, tmp_path)
    accepted = list(read_records(tmp_path / "accepted.jsonl", Rationale))
    assert [(row.user_id, row.text) for row in accepted] == [("u0", texts[0]), ("u7", texts[7])]
    rejected = {row.user_id: row for row in read_records(tmp_path / "rejected.jsonl", Judged)}
    assert {user: row.reason for user, row in rejected.items()} == {
        "u1": "refused by the model: no",
        "u2": "too short",
        "u3": "verdict weak",
        "u4": "evidence outside the history: 2",
        "u5": "argues for another product: firebrand extra hot beef jerky",
        "u6": "near-duplicate: of user u0",
        "u8": "self-check: not causal",
        "u9": "too long",
    }
    assert rejected["u3"].text
    assert not rejected["u1"].text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accepted.jsonl", "rejected.jsonl"]
    assert (report.rows, report.accepted) == (10, 2)
    assert report.reasons["near-duplicate"] == 1
    assert report.verdicts == {"(no answer)": [1, 0], "relevant": [8, 2], "weak": [1, 0]}
    assert report.categories == {"(none)": [10, 2]}
    assert (report.words["min"], report.words["max"], report.words["mean"]) == (5, 7, 6.0)
    assert report.leaks == {"title": 0.5, "brand": 0.0, "id": 0.0, "purchase": 0.5, "any": 0.5}
    assert report.leaks_all["title"] == round(1 / 9, 4)
    assert report.evidence["none_cited"] == 0
    assert report.evidence["share_of_history"] == 0.5


def test_without_a_limit_duplicates_stay(tmp_path):
    config = CurationConfig(min_words=3, max_words=50, max_similarity=None)
    report = curate(examples(3), annotator(["a b c d"] * 3), config, CATALOG, tmp_path)
    assert report.accepted == 3


def test_nothing_accepted_is_no_error(tmp_path):
    report = curate(examples(2), annotator([NotAnnotated("cut off"), "no"]), CONFIG, CATALOG, tmp_path)
    assert report.accepted == 0
    assert report.words == {}
    assert "cut off" in to_markdown(report)


def test_a_report_stands_beside_another(tmp_path):
    for name, text in (("back", "raw clover honey was bought for tea"), ("forward", "tea calls for sweetness")):
        (tmp_path / name).mkdir()
        report = curate(examples(1), annotator([text], name), CONFIG, CATALOG, tmp_path / name)
        other = load_report(tmp_path / "back") if name == "forward" else None
        save_report(report, other, tmp_path / name)
        assert load_report(tmp_path / name).leaks == report.leaks
    table = (tmp_path / "forward" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["", "back", "forward", "change"] in rows
    assert ["names the target's title", "1.000", "0.000", "-1.000"] in rows
    (tmp_path / "back" / "report.json").write_text("{}")
    with pytest.raises(InputError, match="expected the keys"):
        load_report(tmp_path / "back")
    with pytest.raises(InputError, match="no such file"):
        load_report(tmp_path / "none")


def test_released_rationales_are_found_by_their_row():
    texts = {("B00TEA", "B000MUG", "B0HONEY"): "After organic chamomile tea comes honey."}
    released = ReleasedRationales(texts, CATALOG)
    assert EXAMPLE in released
    assert released.annotate(EXAMPLE) == Rationale(
        "u", "B0HONEY", "After organic chamomile tea comes honey.", "relevant", (0,), 1.0, "release"
    )
    with pytest.raises(NotAnnotated):
        released.annotate(replace(EXAMPLE, target="B0JERKY"))


EXEMPLAR = {
    "history": [{"title": "Green Tea", "rating": 2, "review_title": "Stale"}],
    "next": {"title": "Fresh Harvest Sencha Leaves", "brand": "Fresh Harvest"},
    "rationale": "Stale tea made them look for fresh leaves.",
    "forward_rationale": "Stale tea calls for fresher leaves.",
    "verdict": "relevant",
    "evidence": [1],
    "confidence": 0.9,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"verdict": "yes"}, "exemplar 2, verdict: expected one of relevant, weak, irrelevant, found 'yes'"),
        ({"evidence": [2]}, r"exemplar 2, evidence: expected numbers of past purchases, 1 to 1, found \[2\]"),
        ({"confidence": 2}, "exemplar 2, confidence: expected a number from 0 to 1, found 2"),
        ({"history": []}, "exemplar 2, history: expected a list of past purchases"),
        ({"history": [{"rating": 3}]}, "exemplar 2, history 1: no key title"),
        ({"history": [{"title": "x", "stars": 3}]}, "exemplar 2, history 1: unknown key stars"),
        ({"history": [{"title": "x", "rating": "5"}]}, "exemplar 2, history 1, rating: expected a number"),
        ({"next": "tea"}, "exemplar 2, next: expected an object, found str"),
        ({"rationale": " "}, "exemplar 2, rationale: expected text"),
        (
            {"forward_rationale": "So Fresh Harvest Sencha it is."},
            "exemplar 2, forward_rationale: it must argue .* product's title, brand",
        ),
        ({"extra": 1}, "exemplar 2: unknown key extra"),
    ],
)
def test_exemplars_that_teach_something_wrong_are_refused(tmp_path, changes, message):
    path = tmp_path / "exemplars.json"
    path.write_text(json.dumps([EXEMPLAR, {**EXEMPLAR, **changes}]))
    with pytest.raises(InputError, match=f"exemplars.json, {message}"):
        load_exemplars(path)


def test_exemplar_files_that_are_none(tmp_path):
    path = tmp_path / "exemplars.json"
    for text, message in (("{}", "expected a list"), ("[]", "expected a list"), ("[", "not JSON")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_exemplars(path)
    with pytest.raises(InputError, match="no such file"):
        load_exemplars(tmp_path / "none.json")
    path.write_text(json.dumps([EXEMPLAR]))
    (exemplar,) = load_exemplars(path)
    assert exemplar.history[0][0].rating == 2.0
    assert exemplar.target.brand == "Fresh Harvest"


def test_our_exemplars_cover_what_they_should(request):
    for path in sorted(request.config.rootpath.glob("recipes/exemplars/*.json")):
        exemplars = load_exemplars(path)
        assert len(exemplars) >= 4
        assert {"relevant", "irrelevant"} <= {exemplar.verdict for exemplar in exemplars}
        assert len({exemplar.target.categories for exemplar in exemplars}) >= 4
        assert any(
            exemplar.history[number - 1][0].rating <= 2
            for exemplar in exemplars
            for number in exemplar.evidence
            if exemplar.history[number - 1][0].rating
        )
