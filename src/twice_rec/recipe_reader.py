"""The one way to read a recipe.

`load_recipe` checks every key of a YAML file against the class of its stage, and for the stages that use a TRL trainer
also against TRL's own configuration, then applies `--key value` overrides through the same checks. Unknown, misspelt,
duplicate and missing keys, wrong types, values outside a choice and combinations that cannot work are all reported
together. (TRL's own parser accepts 4.5 for an int, values outside a Literal, duplicate keys and abbreviated flags.)

`base: other.yaml` in a recipe takes the keys of another recipe, a path relative to its own; its own keys win.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import json
import logging
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from twice_rec.errors import InputError
from twice_rec.masking import BY_VARIABLE, secret_keys
from twice_rec.recipe import Recipe, Settings, TrainerRecipe, one_of

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=Recipe)

_ENDLESS = "nested too deeply, or a value that holds itself (`&name` and `*name`)"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers that people mean.

    It reads 1e-5 as a string, for want of a dot, 010 as 8 and 1:30 as 90; here the first is a number, the others text.
    """


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:int")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
               r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*))$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same value."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass(frozen=True)
class _Given:
    """One value and where it came from: `line 12`, `grpo.yaml, line 12` or `--key`."""

    value: Any
    where: str


def load_recipe(path: Path | str, recipe: type[C], overrides: Sequence[str] = (), here: bool = True) -> C:
    """Read a recipe.

    Args:
        path: the YAML file.
        recipe: the class of its stage.
        overrides: command-line words, `["--seed", "1", "--lists=[uniform]"]`.
        here: whether this machine is to run it; if not, a GPU's recipe is read without one.

    Raises:
        InputError: one message that lists everything wrong, each with its line or flag.
    """
    return _load(path, recipe, overrides, here)[0]


def show_recipe(path: Path | str, recipe: type[C], overrides: Sequence[str] = ()) -> str:
    """The resolved recipe as YAML: every key of ours and every given one of TRL's, with the place it comes from."""
    loaded, given = _load(path, recipe, overrides, here=False)
    lines = []
    for name, value in loaded.everything().items():
        lines.append(
            f"{name}: {_as_yaml(value)}".ljust(60) + f"  # {given[name].where if name in given else 'default'}"
        )
    return "\n".join(lines)


def _load(
    path: Path | str, recipe: type[C], overrides: Sequence[str], here: bool = True
) -> tuple[C, dict[str, _Given]]:
    """The recipe, and what was given; `here` asks TRL whether this machine can run it."""
    trainer = recipe.trainer_config() if issubclass(recipe, TrainerRecipe) else None
    given, errors = _read(Path(path), overrides, recipe, trainer)
    ours = {name: entry for name, entry in given.items() if name in recipe.model_fields}
    theirs = {name: entry for name, entry in given.items() if name not in ours}
    built = _build(ours, recipe, errors)
    keywords = _trainer_keys(theirs, recipe, trainer, errors, here) if trainer else {}
    if trainer and built is not None:
        faults: Mapping[str, str] = built.trainer_faults(keywords)  # type: ignore[attr-defined]
        errors += [f"{theirs[name].where}: {says}" for name, says in faults.items()]
    if errors or built is None:
        raise _refusal(path, errors)
    if trainer:
        built.trainer_keys.update(keywords)  # type: ignore[attr-defined]
    return built, given


def _refusal(path: Path | str, errors: Sequence[str]) -> InputError:
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    return InputError(f"{path}: {count} in the recipe\n" + "\n".join(f"  {error}" for error in errors))


def _read(
    path: Path, overrides: Sequence[str], recipe: type[Recipe], trainer: type | None
) -> tuple[dict[str, _Given], list[str]]:
    """The given keys that some class knows, under their present names, and the errors so far."""
    errors: list[str] = []
    hints = {f.name: None for f in dataclasses.fields(trainer) if f.init} if trainer else {}
    hints |= {name: hint for name, hint in typing.get_type_hints(trainer).items() if name in hints} if trainer else {}
    hints |= {name: field.annotation for name, field in recipe.model_fields.items()}
    given = _read_yaml(path, recipe, errors)
    for flag, texts in _flags(overrides, errors):
        name = _present(flag, f"--{flag}", recipe)
        given[name] = _Given(_flag_value(texts, hints.get(name)), f"--{flag}")
    for (name, old_value), new_value in recipe.RENAMED_VALUES.items():
        if name in given and given[name].value == old_value:
            logger.warning("%s: %s %s is called %s now", given[name].where, name, old_value, new_value)
            given[name] = _Given(new_value, given[name].where)
    owned = getattr(recipe, "OWNED", {})  # they are refused without their values
    secrets = {n: list(secret_keys({n: entry.value})) for n, entry in given.items() if n not in owned}
    if found := [f"{given[n].where}: {', '.join(names)} {BY_VARIABLE}" for n, names in secrets.items() if names]:
        raise _refusal(path, errors + found)  # before anything else looks at the values
    if len(unknown := [name for name in given if name not in hints]) > max(5, len(given) / 3):
        raise _refusal(path, [*errors, f"{len(unknown)} of {len(given)} keys are unknown: another stage's recipe?"])
    for name in unknown:
        near = difflib.get_close_matches(name, hints, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else "see --help for the keys there are"
        errors.append(f"{given.pop(name).where}: unknown key {name}; {hint}")
    return given, errors


def _present(name: str, where: str, recipe: type[Recipe]) -> str:
    """Return the present name of a key, with a warning if an old one is given."""
    if name not in recipe.RENAMED:
        return name
    new = recipe.RENAMED[name]
    logger.warning("%s: %s is called %s now; the old name still works in this version", where, name, new)
    return new


def _read_yaml(
    path: Path, recipe: type[Recipe], errors: list[str], readers: tuple[Path, ...] = ()
) -> dict[str, _Given]:
    """The keys of a file and of its base; `readers` are the recipes that name it as theirs."""
    if path.resolve() in readers:
        raise InputError(f"{path}: a recipe cannot be its own base: {' -> '.join(p.name for p in readers)}")
    root, loader = _parse(path)
    prefix = f"{path}, " if readers else ""
    own: list[str] = []
    given: dict[str, _Given] = {}
    try:
        _report_duplicates(root, own)
        for key_node, value_node in root.value:
            where, given_name = f"line {key_node.start_mark.line + 1}", _name_of(key_node)
            name = _present(given_name, prefix + where, recipe)
            if name in given and name != given_name:
                own.append(f"{where}: {given_name} is called {name} now, which is given too; leave one of them out")
            given.setdefault(name, _Given(loader.construct_object(value_node, deep=True), prefix + where))
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:  # by type of the value
        raise _not_yaml(path, error) from None
    except RecursionError:
        raise InputError(f"{path}: {_ENDLESS}") from None
    finally:
        loader.dispose()
    errors += [prefix + message for message in own]
    if "base" not in given:
        return given
    base = given.pop("base")
    if not isinstance(base.value, str):
        errors.append(f"{base.where}: base must be the path of another recipe, found {_found(base.value)}")
        return given
    try:
        return {**_read_yaml(path.parent / base.value, recipe, errors, (*readers, path.resolve())), **given}
    except InputError as error:
        errors.append(f"{base.where}: base: {error}")
        return given


def _parse(path: Path) -> tuple[yaml.MappingNode, _Loader]:
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; give one of the recipes in it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise _not_yaml(path, error) from None
    except RecursionError:
        raise InputError(f"{path}: {_ENDLESS}") from None
    if root is None:
        raise InputError(f"{path}: the recipe is empty")
    if not isinstance(root, yaml.MappingNode):
        found = {"seq": "list", "str": "text"}.get(kind := root.tag.rpartition(":")[2], kind)
        raise InputError(f"{path}: expected lines of `key: value`, found a {found}")
    return root, loader


def _not_yaml(path: Path, error: Exception) -> InputError:
    """Tell where a file is not YAML, and why; of its text nothing is repeated, since it may hold a secret."""
    marked = isinstance(error, yaml.MarkedYAMLError)
    problem = re.sub(r"(['\"])(?!<)[^'\"]{2,}.*\1", "...", str(error.problem if marked else error))
    mark = (error.problem_mark or error.context_mark) if marked else None
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return InputError(f"{path}: not YAML: {problem}{where}")


def _name_of(key_node: yaml.Node) -> str:
    return key_node.value if isinstance(key_node, yaml.ScalarNode) else "[...]"


def _report_duplicates(node: yaml.Node, errors: list[str]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            name = _name_of(key_node)
            if name in seen:
                errors.append(f"line {line}: {name} is in line {seen[name]} already")
            seen.setdefault(name, line)
            _report_duplicates(value_node, errors)
    elif isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _report_duplicates(child, errors)


def _flags(words: Sequence[str], errors: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Split `--key value ...` and `--key=value` words into (key, values)."""
    current: tuple[str, list[str]] | None = None
    for word in words:
        name = word[2:].partition("=")[0].replace("-", "_")
        if word.startswith("--") and len(word) > 2:
            if current:
                yield current
            current = (name, [word.partition("=")[2]] if "=" in word else [])
        elif current is None:
            errors.append(f"{word!r} on the command line belongs to no --key")
        else:
            current[1].append(word)
    if current:
        yield current


def _flag_value(texts: list[str], hint: Any) -> Any:
    """`--key` alone means true; several words make a list; a word is read as YAML if that fits the key's type."""
    if not texts:
        return True
    values = []
    for text in texts:
        try:
            value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
            json.dumps(value, default=str, skipkeys=True)  # no value that holds itself
        except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError):
            value = text
        if hint is not None and len(texts) == 1 and not _fits(value, hint) and _fits(text, hint):
            value = text
        values.append(value)
    wants_list = any(typing.get_origin(h) is list for h in _alternatives(hint))
    if len(values) == 1 and not (wants_list and not isinstance(values[0], list) and values[0] is not None):
        return values[0]
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def _build(given: Mapping[str, _Given], recipe: type[C], errors: list[str]) -> C | None:
    """The recipe; None with more `errors` if a key or a rule is wrong. Rules over wrong keys are passed over."""
    values = {name: entry.value for name, entry in given.items()}
    try:
        return recipe.model_validate(values)
    except ValidationError as error:
        found = error.errors()
    wrong = {str(fault["loc"][0]): fault for fault in reversed(found) if fault["loc"]}
    for name, field in recipe.model_fields.items():
        if name in wrong:
            errors.append(_complaint(name, field, wrong[name], given))
    if not wrong:
        errors += str(found[0]["ctx"]["error"]).split("\n")
        return None
    sound = recipe.model_construct(**{name: value for name, value in values.items() if name not in wrong})
    for name in wrong:
        sound.__dict__.pop(name, None)
    for check in recipe.rules():
        with contextlib.suppress(AttributeError):  # it reads a key that is wrong itself, reported above
            if message := check(sound):
                errors.append(message)
    return None


_BOUNDS = {
    "greater_than": "above",
    "greater_than_equal": "at least",
    "less_than": "below",
    "less_than_equal": "at most",
}


def _complaint(name: str, field: Any, fault: Mapping[str, Any], given: Mapping[str, _Given]) -> str:
    """One error of pydantic in our words."""
    if fault["type"] == "missing":
        return f"missing key {name}: {field.description}"
    value, where = given[name].value, given[name].where
    if fault["type"] in _BOUNDS:
        bounds = {kind: bound for part in field.metadata for kind, bound in _bounds_of(part).items()}
        limit = f"between {bounds['ge']:g} and {bounds['le']:g}" if {"ge", "le"} <= bounds.keys() else (
            f"{_BOUNDS[fault['type']]} {next(iter(fault['ctx'].values())):g}"
        )  # fmt: skip
        is_float = float in _alternatives(field.annotation) and not isinstance(value, float)
        return f"{where}: {name} is {float(value) if is_float else value}; it must be {limit}"
    hidden = (field.json_schema_extra or {}).get("hidden", False)
    found = f"a {type(value).__name__}, not shown here" if hidden else _found(value)
    return f"{where}: {name} must be {_describe_all(field.annotation)}, found {found}"


def _found(value: Any) -> str:
    """A wrong value in an error: as it is, or if it is a long text, which may be anything, what it is."""
    is_long = isinstance(value, str) and len(value) > 24
    return f"a text of {len(value)} characters" if is_long else repr(value)


def _bounds_of(constraint: Any) -> dict[str, float]:
    """The bounds that one of pydantic's constraints sets."""
    return {kind: getattr(constraint, kind) for kind in ("ge", "gt", "le", "lt") if hasattr(constraint, kind)}


def _trainer_keys(
    given: Mapping[str, _Given], recipe: type[Recipe], trainer: type, errors: list[str], here: bool
) -> dict[str, Any]:
    """The checked keyword arguments for TRL's configuration; with `here`, built once to hear its own complaints."""
    hints = typing.get_type_hints(trainer)
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(trainer)}
    keywords = {}
    for name, (value, where) in ((name, (entry.value, entry.where)) for name, entry in given.items()):
        if name in recipe.OWNED:  # type: ignore[attr-defined]
            errors.append(f"{where}: {name} is set by the stage: {recipe.OWNED[name]}")  # type: ignore[attr-defined]
            continue
        hint = one_of(choices[name]) if choices[name] else _plain(hints[name])
        try:
            keywords[name] = _adapter(hint).validate_python(value)
        except ValidationError:
            errors.append(f"{where}: {name} must be {_describe_all(hint)}, found {_found(value)}")
    if here and not errors:
        try:
            trainer(output_dir="unused", report_to="none", **keywords)
        except Exception as error:  # noqa: BLE001 - whatever TRL makes of a user's values is the user's to hear
            hint = ". On a CPU take recipes/tiny or recipes/smollm" if "use_cpu" in str(error) else ""
            errors.append(f"{trainer.__name__} refuses the values: {error}{hint}")
    return keywords


def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True))


def _fits(value: Any, hint: Any) -> bool:
    try:
        _adapter(_plain(hint)).validate_python(value)
    except ValidationError:
        return False
    return True


def _plain(hint: Any) -> Any:
    """Enumerations as their values: transformers writes `SchedulerType | str`, meaning the enumeration's values."""
    options = _alternatives(hint)
    if not any(isinstance(option, type) and issubclass(option, enum.Enum) for option in options):
        return hint
    return typing.Union[  # noqa: UP007 - of a tuple
        tuple(
            one_of(member.value for member in option) if isinstance(option, enum.EnumMeta) else option
            for option in options
            if option is not str
        )
    ]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _describe_all(hint: Any) -> str:
    return " or ".join(dict.fromkeys(_describe(option) for option in _alternatives(hint)))


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is list:
        each = _describe(arguments[0])
        return f"a list, each entry {each}" if each.startswith(("a ", "one of ")) else f"a list of {each}"
    if origin is dict or hint is dict:
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, str(hint))


def describe_keys(recipe: type[Recipe]) -> str:
    """The text of `--help`: every key of ours under the group that declares it, its meaning, type and default."""
    groups = [group for group in recipe.__mro__ if issubclass(group, Settings)]
    groups.sort(key=lambda group: group in (Recipe, TrainerRecipe))  # the keys of every stage come last
    lines = []
    for group in groups:
        own = [name for name in vars(group).get("__annotations__", {}) if name in recipe.model_fields]
        if own:
            lines += ["", "Keys of this stage." if group is recipe else (group.__doc__ or "").strip().splitlines()[0]]
        for name in own:
            field = recipe.model_fields[name]
            default = "required" if field.is_required() else f"default {_as_yaml(field.get_default())}"
            lines += [f"  --{name}", f"      {field.description} ({_describe_all(field.annotation)}; {default})"]
    if issubclass(recipe, TrainerRecipe):
        config = f"{recipe.LIBRARY}'s {recipe.TRAINER_CONFIG}"
        lines += ["", f"The keys of {config} work too, as --key value or in the recipe."]
        lines += ["Those that the stage sets itself, or that would do nothing in it, are refused with what to use."]
    return "\n".join(lines[1:])


def _as_yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
