"""The rule judge on rationales written by hand."""

import pytest

from twice_rec.catalog import ItemCatalog
from twice_rec.evaluation.rule_judge import Claim, RuleJudge, claims_of
from twice_rec.records import Example, Interaction, Item, TrueReasons


def item(item_id, diet, kind, size, brand, category):
    details = f'"Brand": "{brand}", "Diet": "{diet}", "Category": "{category}"'
    return Item(item_id, f"{diet} {kind}, {size}", f"{kind} for every day.", details, brand, ("Grocery", category))


PASTA = item("B1", "Keto", "Penne", "Small Bag", "Oakhaven", "Pasta")
TEA = item("B2", "Vegan", "Black Tea", "Gift Box", "Kestrel", "Tea")
SAUCE = item("B3", "Keto", "Pesto", "Twin Pack", "Oakhaven", "Sauces")  # three true reasons
RICE = item("B4", "Vegan", "Wild Rice", "Large Bag", "Oakhaven", "Rice")  # brand is liked, diet disliked
VEGAN_SAUCE = item("B7", "Vegan", "Salsa", "Gift Box", "Oakhaven", "Sauces")
SPICE = item("B5", "Organic", "Paprika", "Sampler", "Juniper", "Spices")  # one true reason: it is called for
COFFEE = item("B6", "Organic", "Cold Brew", "Sampler", "Juniper", "Coffee")  # none
CATALOG = ItemCatalog([PASTA, TEA, SAUCE, RICE, SPICE, COFFEE, VEGAN_SAUCE])
HISTORY = (Interaction("B2"), Interaction("B1"))
EXAMPLE = Example("u", HISTORY, ("B3", "B4", "B5", "B6"), "B3")
TRUE = TrueReasons("u", ("Keto", "Low Sodium", "Oakhaven"), ("Vegan", "Kestrel"), ("Sauces", "Spices"))
JUDGE = RuleJudge(CATALOG, {"u": TRUE}, seed=0)


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        (
            "1 likes Keto. 2 dislikes Kestrel. 3 says nothing. Last was Pasta, so Sauces or Spices.",
            ["likes Keto", "dislikes Kestrel", "past Pasta", "calls for Sauces", "calls for Spices"],
        ),
        (
            "This customer is always happy with Oakhaven and avoids Vegan, low-sodium products and Kestrel.",
            ["likes Oakhaven", "dislikes Vegan", "dislikes Low Sodium", "dislikes Kestrel"],
        ),
        ("They do not like Keto but love Oakhaven.", ["dislikes Keto", "likes Oakhaven"]),
        ("Keto is not for them; never buys Kestrel!", ["dislikes Keto", "dislikes Kestrel"]),
        ("The last purchase, Penne, calls for Pesto.", ["past Pasta", "calls for Sauces"]),
        ("Tea and rice were bought before. Keto, Oakhaven.", ["past Tea", "past Rice"]),
        ("They would enjoy Keto Pesto, Twin Pack.", []),  # a title
        ("They like the Ironwood brand, and curry powder goes well with rice.",
         ["likes Ironwood", "past Spices", "calls for Rice"]),
        ("", []),
        ("Not much can be said.", []),
    ],
)  # fmt: skip
def test_claims(text, claims):
    assert [f"{claim.says} {claim.name}" for claim in claims_of(text)] == claims


def test_product_types_are_their_categories_and_the_longest_name_counts():
    assert claims_of("Needs Rice Crackers.") == [Claim("calls for", "Crackers")]
    assert claims_of("Needs Almond Milk, then almond butter.") == [
        Claim("calls for", "Plant Milk"),
        Claim("calls for", "Spreads"),
    ]


@pytest.mark.parametrize(
    ("text", "product", "score"),
    [
        ("1 likes Keto. 2 likes Oakhaven. Last was Pasta, so Sauces or Spices.", SAUCE, 3),  # all three
        ("1 likes Keto. Last was Pasta, so Sauces.", SAUCE, 3),  # two of three
        ("1 likes Keto. 2 likes Low Sodium.", SAUCE, 2),  # one; what is liked besides is no reason, and not false
        ("Last was Pasta, so Sauces or Spices.", SPICE, 2),  # the only one there is
        ("1 likes Keto. 2 likes Oakhaven. 3 likes Juniper.", SAUCE, 2),  # two true, one false
        ("1 likes Keto. 2 likes Juniper.", SAUCE, 1),  # as many false as true
        ("1 likes Keto. 2 likes Oakhaven. Last was Pasta, so Rice.", SAUCE, 2),  # Rice is not called for
        ("1 likes Oakhaven.", RICE, 1),  # all there are, but Vegan speaks against it as much, said or not
        ("1 likes Oakhaven. 2 dislikes Vegan.", RICE, 1),
        ("Loves Oakhaven and Keto, and Pasta goes well with Sauces.", VEGAN_SAUCE, 2),  # two for it, one against
        ("1 dislikes Keto. 2 likes Oakhaven.", SAUCE, 1),  # Keto is liked
        ("1 dislikes Kestrel. 2 likes Oakhaven. Last was Pasta, so Sauces.", SAUCE, 3),  # true, and not about it
        ("1 likes Low Sodium. 2 dislikes Vegan.", COFFEE, 1),  # nothing could be named
        ("They once bought Coffee. They love Keto and Oakhaven.", SAUCE, 2),  # they never did
        ("They once bought Tea. They love Keto and Oakhaven.", SAUCE, 3),
        ("Keto Oakhaven Sauces Low Sodium Spices", SAUCE, 1),  # a list of names claims nothing
        ("A fine product for everybody.", SAUCE, 1),
        ("They like Keto, Vegan, Oakhaven, Kestrel, Juniper, Organic, so Sauces, Rice, Tea.", SAUCE, 1),  # all at once
    ],
)
def test_scores(text, product, score):
    assert JUDGE.score(text, EXAMPLE, product)[0] == score, JUDGE.read(text, EXAMPLE, product)


def test_it_says_why():
    says = JUDGE.score("1 likes Keto. 2 likes Juniper. 3 dislikes Vegan.", EXAMPLE, RICE)[1]
    assert says == "leaves out Oakhaven; false likes Juniper; against Vegan"
    assert JUDGE.score("Fine.", EXAMPLE, COFFEE)[1] == "names nothing true"


def test_it_finds_the_product_that_a_rationale_is_about():
    assert JUDGE.choose("1 likes Oakhaven. 2 dislikes Keto. 3 likes Vegan.", EXAMPLE)[0] == "B4"
    assert JUDGE.choose("Last was Pasta, so Spices.", EXAMPLE)[0] == "B5"
    drawn = {RuleJudge(CATALOG, {}, seed).choose("Fine.", EXAMPLE)[0] for seed in range(40)}
    assert drawn == {"B3", "B4", "B5", "B6"}  # nothing fits better than another
    assert {RuleJudge(CATALOG, {}, seed).choose("Likes Juniper.", EXAMPLE)[0] for seed in range(20)} == {"B5", "B6"}
