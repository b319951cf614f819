"""Rationales by rule for real texts: themes and kinds of titles, the text, the verdict, the self-check."""

import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.prompts import PromptFormat
from twice_rec.rationales.leaks import leaks_of
from twice_rec.rationales.themes import ThemesAnnotator
from twice_rec.rationales.vocabulary import Vocabulary, brand_of, singular, title_parts
from twice_rec.records import Example, Interaction, Item, Rationale

CATALOG = ItemCatalog(
    [
        Item("B1", "Alder organic black tea, 20 bags (pack of 2)", brand="Alder"),
        Item("B2", "Birch organic green teas, 40 ct", details='"Size": "40 ct", "Manufacturer": "Birch"'),
        Item("B3", "Cedar beef jerky", brand="Cedar"),
        Item("B4", "Doum smoked beef jerky, 3 oz", brand="Doum"),
        Item("B5", "Elm dark chocolate with no added sugar", brand="Elm"),
        Item("B6", "Fir organic oats", brand="Fir"),
    ]
)
TITLES = PromptFormat(prompt_history_fields=["title", "item_id"], prompt_candidate_fields=["title", "item_id"])
CANDIDATES = ("B4", "B2", "B5")


def annotate(history, target="B2", shown=TITLES, catalog=CATALOG):
    return ThemesAnnotator(catalog, shown).annotate(Example("u", tuple(history), CANDIDATES, target))


@pytest.mark.parametrize(
    ("word", "stem"),
    [
        ("cookies", "cookie"),
        ("berries", "berry"),
        ("boxes", "box"),
        ("teas", "tea"),
        ("glass", "glass"),
        ("oats", "oat"),
    ],
)
def test_plurals(word, stem):
    assert singular(word) == stem


@pytest.mark.parametrize(
    ("title", "parts"),
    [
        ("Roast Ground Coffee, 12-ounce bag", [["roast", "ground", "coffee"]]),
        ("chips (sugar free | low carb)", [["chips"], ["sugar-free"], ["low-carb"]]),
        ("bars w/ no added sugar & vanilla flavored cream", [["bars"], ["no-sugar"], ["vanilla", "cream"]]),
        ("24 oz. pack of 2", []),
    ],
)
def test_parts_of_a_title_end_at_marks_measures_and_small_words(title, parts):
    assert list(title_parts(title)) == parts


class TestVocabulary:
    words = Vocabulary(CATALOG)

    def test_kinds_are_what_parts_of_titles_end_with(self):
        assert [self.words.kind(item) for item in CATALOG] == [
            "black tea", "green tea", "beef jerky", "beef jerky", "dark chocolate", "organic oat",
        ]  # fmt: skip

    def test_brands_and_measures_are_no_themes(self):
        assert self.words.themes(CATALOG["B2"].title) == ["organic green", "green tea", "organic", "green", "tea"]
        assert brand_of(CATALOG["B2"]) == "Birch"
        assert self.words.themes("no added sugar") == ["no-sugar"]
        assert self.words.themes("sugar") == []

    def test_rare_themes_weigh_more(self):
        assert self.words.weight("organic") == pytest.approx(0.6931, abs=1e-4)  # log(6 titles / 3)
        assert self.words.weight("tea") == pytest.approx(1.0986, abs=1e-4)  # log(6 / 2)
        assert self.words.weight("elsewhere") == 0.0


class TestTexts:
    def test_it_says_what_comes_back_and_what_that_calls_for(self):
        found = annotate([Interaction("B6"), Interaction("B1", rating=5.0, review_title="Lovely!")])
        assert found.text == (
            "They keep coming back to organic (1 and 2), and have tried tea (2). They rated 2 Excellent "
            '("Lovely!"). The latest, 2, is black tea. This calls for more green teas, with organic again.'
        )
        assert (found.verdict, found.evidence, found.annotator) == ("relevant", (0, 1), "themes")
        assert found.confidence == 1.0  # B3, B4 and B5 share nothing with the history
        assert leaks_of(found.text, CATALOG["B2"]) == ()

    def test_numbers_are_those_that_prompts_show(self):
        shown = TITLES.model_copy(update={"prompt_history_items": 1})
        found = annotate([Interaction("B3"), Interaction("B1")], shown=shown)
        assert found.text.startswith("They have tried tea (1) and organic (1). The latest, 1, is black tea.")
        assert found.evidence == (1,)

    def test_what_was_rated_badly_speaks_against(self):
        assert annotate([Interaction("B1", rating=1.0)]).verdict == "irrelevant"
        found = annotate([Interaction("B1"), Interaction("B4", rating=2.0, review_title="Too salty.")])
        assert 'They did not like 2, rated Bad ("Too salty").' in found.text
        assert "jerky (2)" not in found.text

    def test_one_word_of_one_interaction_is_chance(self):
        assert annotate([Interaction("B6")]).verdict == "weak"  # organic is all they share

    def test_a_word_that_most_texts_have_is_no_theme(self):
        details = {f"A{number}": f"Alder {word} bar" for number, word in enumerate(["oat", "nut"] * 30)}
        catalog = ItemCatalog([Item(name, title, details='"Weight": "heavy oat"') for name, title in details.items()])
        texts = (f"{item.title}. {item.details}" for item in catalog)
        assert Vocabulary(catalog).weight("nut") == 0.0  # in half of the titles
        assert Vocabulary(catalog, texts).all_themes == []

    def test_nothing_in_common_is_irrelevant(self):
        found = annotate([Interaction("B3")])
        assert found.verdict == "irrelevant"
        assert found.evidence == ()

    def test_a_target_that_fits_no_better_than_others_is_not_relevant(self):
        """After jerky as the latest, the other jerky fits better: one of B4, B5 and B6 is below."""
        found = annotate([Interaction("B1"), Interaction("B3")])
        assert found.verdict != "relevant"

    def test_titles_that_are_ids_give_nothing(self):
        catalog = ItemCatalog([Item(f"B00{number}XYZ", f"B00{number}XYZ") for number in range(4)])
        found = ThemesAnnotator(catalog, TITLES).annotate(
            Example("u", (Interaction("B000XYZ"),), ("B001XYZ", "B002XYZ"), "B001XYZ")
        )
        assert found.verdict == "irrelevant"

    def test_a_text_that_would_name_the_target_is_not_written(self):
        catalog = ItemCatalog([Item("A1", "plain oats"), Item("A2", "oats"), Item("A3", "rice")])
        found = annotate([Interaction("A1")], target="A2", catalog=catalog)
        assert found.verdict == "irrelevant"
        assert "oats" not in found.text

    def test_a_known_maker_is_told_without_its_name(self):
        catalog = ItemCatalog(
            [
                Item("A1", "Alder black tea", brand="Alder"),
                Item("A2", "Alder green tea", brand="Alder"),
                Item("A3", "rice"),
            ]
        )
        shown = TITLES.model_copy(update={"prompt_history_fields": ["title", "brand"]})
        example = Example("u", (Interaction("A1"),), ("A2",), "A2")
        text = ThemesAnnotator(catalog, shown).annotate(example).text
        assert "They stay with a maker they know, that of 1." in text
        assert "alder" not in text.lower()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("They have tried tea (1). The latest, 1, is black tea. This calls for more green tea.", True),
        ("They have tried jerky (1). This calls for more beef jerky.", False),
        ("They did not like 1, rated Bad (beef jerky). This calls for something with tea.", True),
        ("They have tried something (1). This calls for it.", False),
    ],
)
def test_a_rationale_is_kept_if_it_leads_to_the_target_alone(text, kept):
    rationale = Rationale("u", "B2", text, "relevant", (), 0.5, "themes")
    found = ThemesAnnotator(CATALOG, TITLES).review(Example("u", (Interaction("B1"),), CANDIDATES, "B2"), rationale)
    assert found == (None if kept else "self-check: another candidate is picked")
