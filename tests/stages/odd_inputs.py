"""What users give, drawn by hypothesis: values of every kind, recipes, flags, and small data sets of every source."""

import dataclasses
import gzip
import json
import typing

import yaml
from hypothesis import strategies as st

from twice_rec.data.sources import SOURCES
from twice_rec.recipe import TrainerRecipe

WORDS = (
    "", " ", "x", "Tea", "null", "nan", "-1", "010", "1e400", "12:30", "2020-13-45", "a/b", "a b", "B0 ", "\u00e9",
    "e\u0301", "\u200b", "\x00", "\x1b[31m", "\u2028", "\ud7ff\U0001f375", "<think>", "</item_id>", "<item_nm> x",
    "<|im_end|>", "[INST]", "<eos>", "{domain}", "{x}", "%s", "${HF_TOKEN}", "${OPENAI_API_KEY}", "../x", "x" * 300,
    "\t", "\r", "\"", "'", "&lt;b&gt;", "var x = 1;", "$5 - $7", "9" * 30, "9" * 5000, ".begun.json", "manifest.json",
    "con", "~", "--seed",
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(WORDS), st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=6)
)
NUMBERS = st.one_of(
    st.sampled_from(
        [0, 1, -1, 2, 0.0, 0.5, -0.5, 1e-9, 1e300, 10**20, 10**400, float("nan"), float("inf"), 1600000000000]
    ),
    st.integers(-3, 100),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
ODD = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2), max_leaves=4
)
PLACE = st.integers(0, 10_000)  # of a row, a key or a byte; taken modulo of how many there are
SHARE = st.floats(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recipes

BROKEN_LINES = (
    "- x", "\t: x", "a: [", "b: {", "%YAML 9.9", "? [a]", "? {a: 1}\n: 2", "&a : *a", "loop: &l [*l]", "*no: x",
    "seed: 1: 2", "!!python/object/apply:os.getcwd []", "!x y", "---", "...", "\ufeffseed: 1", "key", "<<: {seed: 7}",
    "<<: 3", "null: 1", "1: 2", "true: x", "seed: 2026-13-45", "seed: !!int x", "seed: !!binary '?'",
    "run_dir: |\n  a\n  b", "'", "\"\\x", "base: x.yaml", "base: .", "base: 3", "base: recipe.yaml",
    "seed: 9999999999999999999999", "wandb_group: 2001-01-01", "\x00", "domain: \"\\ud800\"",
)  # fmt: skip
FLAGS = (
    "--", "---", "--=3", "--seed", "--seed=", "--seed=1=2", "--seed 1", "-s", "", " ", "--SEED", "--no_such",
    "--run-dir", "[", "{a", "1e5", "--overwrite", "--check", "--show", "--config", "&a [*a]", "!!x y",
    "--domain=\x00", "--\u00e9",
)  # fmt: skip


def fitting(hint):
    """Values of the type of a key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(fitting(arguments[0]), max_size=4)
    if origin is dict:
        return st.dictionaries(TEXTS, fitting(arguments[1]), max_size=2)
    if arguments:
        return st.one_of(*map(fitting, arguments))
    plain = {int: st.integers(-2, 60), float: st.floats(-1, 5), bool: st.booleans(), str: TEXTS, type(None): st.none()}
    return plain.get(hint, ODD)


def values_of(recipe):
    """Key of a stage's recipe, TRL's included -> its values, of the right type or of any."""
    keys = {name: fitting(field.annotation) for name, field in recipe.model_fields.items()}
    if issubclass(recipe, TrainerRecipe):
        for field in dataclasses.fields(recipe.trainer_config()):
            keys.setdefault(
                field.name, st.sampled_from([0, 1, -1, 4, 0.5, True, False, None, "no", "steps", "cosine", {}])
            )
    return {name: st.one_of(values, ODD) for name, values in keys.items() if name != "run_dir"}


@st.composite
def given_keys(draw, recipe):
    """Some (key, value); a few keys are not the recipe's."""
    known = values_of(recipe)
    names = st.one_of(st.sampled_from(sorted(known)), st.sampled_from(["epoch", "", "seed ", "Seed", "base", "0"]))
    return [(name, draw(known.get(name, ODD))) for name in draw(st.lists(names, max_size=4))]


@st.composite
def recipe_files(draw, recipe, base):
    """The bytes of a recipe that rests on `base`, and flags."""
    lines = [f"base: {base}"]
    lines += [
        yaml.safe_dump({name: value}, allow_unicode=True, width=10_000).strip()
        for name, value in draw(given_keys(recipe))
    ]
    for line in draw(st.lists(st.sampled_from([*BROKEN_LINES, *lines]), max_size=1)):
        lines.insert(draw(PLACE) % (len(lines) + 1), line)
    content = "\n".join(lines).encode(draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16"])), "replace")
    if draw(SHARE) > 0.9:
        content = content[: draw(PLACE) % (len(content) + 1)] + draw(st.binary(max_size=3))
    flags = [word for name, value in draw(given_keys(recipe)) for word in (f"--{name}", *_words(value))]
    return content, flags + draw(st.lists(st.sampled_from(FLAGS), max_size=1))


def _words(value):
    """A value as words of the command line."""
    return (
        [str(entry) for entry in value]
        if isinstance(value, list)
        else [value if isinstance(value, str) else json.dumps(value)]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: 12 users, each with 6 of 14 items

ITEMS = [f"B{number:02d}" for number in range(14)]
PURCHASES = [(f"U{user:02d}", (user * 5 + time * 3) % 14, time) for user in range(12) for time in range(6)]


def amazon(
    user="user_id",
    item="parent_asin",
    time="timestamp",
    rating="rating",
    unit=1,
    reviews="D.jsonl",
    items="meta_D.jsonl",
):
    """File -> its rows, of Amazon's data sets."""
    return {
        reviews: [
            {
                user: u,
                item: ITEMS[i],
                time: (1_600_000_000_000 + t * 86_400_000) // unit,
                rating: 4.0,
                "title": "fine",
                "text": "so good",
            }
            for u, i, t in PURCHASES
        ],
        items: [
            {
                item: item_id,
                "title": f"Tea {item_id}",
                "price": 9.5,
                "details": {"Brand": "X"},
                "categories": ["A", "B"],
                "store": "X",
            }
            for item_id in ITEMS
        ],
    }


def recbole():
    """The same of RecBole."""
    return {
        "D.inter": [
            {
                "user_id:token": u,
                "item_id:token": ITEMS[i],
                "rating:float": "4",
                "timestamp:float": str(1_600_000_000 + t),
            }
            for u, i, t in PURCHASES
        ],
        "D.item": [
            {"item_id:token": i, "title:token_seq": f"Tea {i}", "price:float": "9.5", "brand:token": "X"} for i in ITEMS
        ],
    }


def release():
    """The same of the authors' files."""
    users = {u: [i + 1 for name, i, _ in PURCHASES if name == u] for u, _, _ in PURCHASES}

    def row(user, indices, **others):
        *history, target = indices
        return {"user_id": user, "output_id": ",".join(map(str, history)), "positive_item_id": str(target), **others}

    def prompt(indices):
        shown = "".join(
            f"title:Tea\n- item_id:{ITEMS[i - 1]}\n- description:x\n- details:\n- review:nice\n- rating:Good\n\n"
            for i in indices
        )
        return f"[Purchase History] : {shown}[Candidate List]: ..."

    return {
        "amazon_vocab_D.json": [
            {"index": str(number), "title": f"Tea {item}"} for number, item in enumerate(ITEMS, start=1)
        ],
        "amazon_D_llm_meta_1.json": [
            {
                "input": f"[Item Title] : Tea {item}\n\n        ***Instruction***\n x",
                "output": f'<item_info> item_id:{item}\n- description:about\n- details:"Brand": "X" </item_info>',
            }
            for item in ITEMS
        ],
        "amazon_D_sasrec_train_1.json": [row(user, indices[:-2]) for user, indices in users.items()],
        "amazon_D_sasrec_test_1.json": [row(user, indices) for user, indices in users.items()],
        "amazon_D_llm_train_case_1_1.json": [
            row(user, indices[:-2], input=prompt(indices[:-3]), output="<think> they like tea </think>")
            for user, indices in users.items()
        ],
    }


def five_core():
    """The same as Amazon's published 5-core, and the raw reviews."""
    rows = [
        {"user_id": u, "parent_asin": ITEMS[i], "rating": "4.0", "timestamp": str(1_600_000_000_000 + t * 86_400_000)}
        for u, i, t in PURCHASES
    ]
    train = [row for number, row in enumerate(rows) if number % 6 < 4]
    parts = {"train": train, "valid": rows[4::6], "test": rows[5::6]}
    return {**{f"D.{part}.csv": part_rows for part, part_rows in parts.items()}, **amazon()}


OLD_AMAZON = {"user": "reviewerID", "item": "asin", "time": "unixReviewTime", "rating": "overall", "unit": 1000}
DATA = {
    "amazon2023": amazon,
    "amazon2014": lambda: amazon(**OLD_AMAZON, reviews="reviews_D.json.gz", items="meta_D.json.gz"),
    "amazon2023_5core": five_core,
    "recbole": recbole,
    "release": release,
}
assert {name for name, kind in SOURCES.items() if kind.reads_folder} == set(DATA), "a new source is drawn as well"


def rendered(name, rows):
    """The bytes of a file of rows, by its name."""
    if name.startswith("D.i"):
        header = next((list(row) for row in rows if isinstance(row, dict)), [])
        lines = [row.values() if isinstance(row, dict) else [row] for row in rows]
        return "\n".join("\t".join(map(str, line)) for line in [header, *lines]).encode(errors="replace") + b"\n"
    if name.endswith(".csv"):
        header = next((list(row) for row in rows if isinstance(row, dict)), [])
        lines = [row.values() if isinstance(row, dict) else [row] for row in rows]
        return "\n".join(",".join(map(str, line)) for line in [header, *lines]).encode(errors="replace") + b"\n"
    if name.startswith("amazon_vocab"):
        named = {str(row.get("index")): row.get("title") for row in rows if isinstance(row, dict)}
        return json.dumps(named).encode()
    if name.startswith("amazon_"):
        return json.dumps(rows).encode()
    content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode(errors="replace")
    return gzip.compress(content, mtime=0) if name.endswith(".gz") else content


ROW_CHANGES = ("value", "value", "value", "everywhere", "without", "other row", "twice", "key")
BYTE_CHANGES = (
    "cut",
    "bom",
    "crlf",
    "gzip",
    "empty",
    "missing",
    "insert",
    "insert",
    "list",
    "folder",
    "latin-1",
    "utf-16",
    "gbk",
)
BYTES = (
    b"\n\n",
    b"\xff",
    b"\x00",
    b"[" * 100_000,
    b"{",
    b"\xc3",
    b"\r",
    b"\xef\xbb\xbf",
    b"null\n",
    b"1\n",
    b'"',
    b"\t",
    b"\x1f\x8b",
)


@st.composite
def data_sets(draw):
    """(source, file -> bytes): a small data set with up to four things wrong; a folder is None."""
    source = draw(st.sampled_from(sorted(DATA)))
    tables = DATA[source]()
    for kind in draw(st.lists(st.sampled_from(ROW_CHANGES), max_size=3)):
        rows = tables[draw(st.sampled_from(sorted(tables)))]
        _change_rows(draw, rows, kind)
    files = {name: rendered(name, rows) for name, rows in tables.items()}
    for kind in draw(st.lists(st.sampled_from(BYTE_CHANGES), max_size=2 if draw(st.booleans()) else 0)):
        _change_bytes(draw, files, draw(st.sampled_from(sorted(files))), kind)
    return source, files


def _change_rows(draw, rows, kind):
    place = draw(PLACE) % len(rows)
    if not isinstance(row := rows[place], dict) or not row:
        return
    name = sorted(row)[draw(PLACE) % len(row)]
    if kind in ("value", "everywhere"):
        odd = draw(ODD)
        for each in [row] if kind == "value" else [each for each in rows if isinstance(each, dict)]:
            each[name] = odd
    elif kind == "without":
        del row[name]
    elif kind == "key":
        row[draw(TEXTS)] = draw(ODD)
    else:
        rows.insert(place, draw(ODD) if kind == "other row" else dict(row))


def _change_bytes(draw, files, name, kind):
    content = files.get(name)
    if content is None:
        return
    at = draw(PLACE) * 7919 % (len(content) + 1)
    if kind == "missing":
        del files[name]
        return
    files[name] = {
        "cut": lambda: content[:at],
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "crlf": lambda: content.replace(b"\n", b"\r\n"),
        "gzip": lambda: gzip.compress(content, mtime=0),
        "empty": lambda: b"",
        "insert": lambda: content[:at] + draw(st.sampled_from(BYTES)) + content[at:],
        "list": lambda: b"[" + content.strip().replace(b"\n", b",\n") + b"]",
        "folder": lambda: None,
    }.get(kind, lambda: content.decode(errors="replace").encode(kind, "replace"))()


# What stage 0 does with it; every combination is valid.
PREPARE_KEYS = {
    "k_core": st.integers(1, 2),
    "max_history": st.sampled_from([None, 4, 6]),
    "longer_histories": st.sampled_from(["cut", "drop"]),
    "repeats": st.sampled_from(["drop", "drop", "keep"]),
    "untitled_items": st.sampled_from(["keep", "drop"]),
    "split": st.sampled_from(["leave_one_out", "leave_one_out", "temporal"]),
    "num_candidates": st.sampled_from([2, 4, 9, 30]),
    "candidate_lists": st.sampled_from([["uniform"], ["uniform", "popularity", "hard"]]),
    "encoding": st.sampled_from(["utf-8"] * 4 + ["latin-1", "utf-16", "gbk"]),
    "rating_scale": st.sampled_from([[1, 5], [0, 100]]),
    "prompt_history_items": st.sampled_from([None, 2]),
}


def prepare_flags(keys):
    """Some of `PREPARE_KEYS` as flags, with a minimum that small data fulfil."""
    words = [
        word
        for name, value in {"min_history": 3, "k_core": 1, "num_candidates": 4, **keys}.items()
        for word in (f"--{name}", json.dumps(value))
    ]
    return [*words, "--domain", "D"]


# ---------------------------------------------------------------------------------------------------------------------
# Model folders

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 8\n"
TEMPLATES = (
    "",
    "{{",
    "{{ raise_exception('no system role') }}",
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ messages[9].content }}",
    "{{ 1 / 0 }}",
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{{ x.y.z }}{% endfor %}",
)
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SMALL_ODD = ODD.filter(lambda value: not isinstance(value, (int, float)) or abs(value) < 1000)  # no million layers


@st.composite
def model_changes(draw):
    """Names of files -> what becomes of them: a function of their bytes to bytes, or to None if they go."""
    changes = {}
    for name in draw(st.lists(st.sampled_from(MODEL_FILES), min_size=1, max_size=2, unique=True)):
        at, kind = draw(SHARE), draw(st.sampled_from(["missing", "empty", "pointer", "cut", "byte", *["key"] * 5]))
        odd, without = draw(SMALL_ODD), draw(st.booleans())
        changes[name] = {
            "missing": lambda content: None,
            "empty": lambda content: b"",
            "pointer": lambda content: POINTER,
            "cut": lambda content, at=at: content[: int(at * len(content))],
            "byte": lambda content, at=at: (
                content[: int(at * len(content))] + b"?" + content[int(at * len(content)) + 1 :]
            ),
            "key": lambda content, at=at, odd=odd, without=without: _other_key(content, at, odd, without),
        }[kind]
    if draw(SHARE) > 0.8:
        template = draw(st.sampled_from(TEMPLATES)).encode()
        changes["chat_template.jinja"] = lambda content: template
    if draw(SHARE) > 0.9:
        adapter = json.dumps({"base_model_name_or_path": draw(ODD)} if draw(st.booleans()) else draw(ODD)).encode()
        changes |= {"config.json": lambda content: None, "adapter_config.json": lambda content: adapter}
    return changes


def _other_key(content, at, odd, without):
    """JSON, or the header of safetensors, with another value of one key or without it."""
    start = 0 if content[:1] == b"{" else 8
    end = len(content) if start == 0 else 8 + int.from_bytes(content[:8], "little")
    whole = json.loads(content[start:end])
    name = sorted(whole)[int(at * (len(whole) - 1))]
    if without:
        del whole[name]
    else:
        whole[name] = odd
    header = json.dumps(whole).encode()
    return header if start == 0 else len(header).to_bytes(8, "little") + header + content[end:]


# ---------------------------------------------------------------------------------------------------------------------
# Responses of an API

STATUSES = (
    *[200] * 4, 201, 204, 301, 302, 307, 400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529,
)  # fmt: skip
HEADERS = (
    "", "", "Retry-After: 0", "Retry-After: soon", "Retry-After: -1", "retry-after-ms: nan", "Location: /v1/x",
    "Location: ::", "x-should-retry: false", "Content-Type: text/event-stream", "Content-Encoding: gzip",
    "Content-Length: 9",
)  # fmt: skip


def responses(good, key):
    """What becomes of a request: None for a good answer, "close", or (status, header, body)."""
    odd = st.one_of(ODD, st.just(f"trouble with {key}"), st.just({"message": f"Bearer {key}", "code": 402}))
    places = list(_places(good))

    @st.composite
    def changed(draw):
        body = json.loads(json.dumps(good))
        for path in draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
            _put(body, path, draw(odd))
        return body

    bodies = st.one_of(changed(), changed(), odd, st.builds(lambda value: {"error": value}, odd)).map(json.dumps)
    raw = st.one_of(bodies.map(str.encode), bodies.map(lambda text: text.encode()[:-1]), st.binary(max_size=4))
    return st.one_of(st.none(), st.just("close"), st.tuples(st.sampled_from(STATUSES), st.sampled_from(HEADERS), raw))


def _places(value, path=()):
    """The path of every value inside a value."""
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, name)
        yield from _places(value[name], (*path, name))


def _put(body, path, value):
    """Put a value at a path, if it is still there."""
    for name in path[:-1]:
        if not isinstance(body, (dict, list)) or (isinstance(body, list) and name not in range(len(body))):
            return
        body = body[name] if isinstance(body, list) else body.get(name)
    if isinstance(body, dict):
        body[path[-1]] = value
