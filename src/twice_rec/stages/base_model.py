"""The tiny base model -> a folder with tokenizer, chat template and random weights (see `llm/base.py`).

It knows nothing: the base of the tiny recipe stands for a model that has read neither items nor users. Reads only the
catalogue's texts and the prompts' wording, never a purchase.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields

from twice_rec import prompts
from twice_rec.artifacts import Work
from twice_rec.catalog import ItemCatalog
from twice_rec.config import BaseModelRecipe, load_recipe
from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.llm.base import BaseSettings, build_model, train_tokenizer
from twice_rec.prompts import PromptFormat
from twice_rec.records import Example, Interaction
from twice_rec.stages.lifecycle import about, need, run_stage, say_finished

logger = logging.getLogger("base")


def base(recipe: BaseModelRecipe) -> None:
    """Train the tokenizer, build the model, save both."""
    files = [need(recipe.run_path / "data" / name, "prepare.sh") for name in (dataset.CATALOG, dataset.PROMPT)]
    work = Work(recipe.run_path, "base", "base", recipe.settings(), files)
    if work.is_finished():
        say_finished(work.path)
        return
    work.begin(recipe.overwrite)
    data = PreparedData(recipe.run_path / "data")
    tokenizer = train_tokenizer(_texts(data.catalog, data.prompt_format), recipe.vocab_size)
    model = build_model(tokenizer, BaseSettings(**{f.name: getattr(recipe, f.name) for f in fields(BaseSettings)}))
    tokenizer.save_pretrained(work.path)
    model.save_pretrained(work.path)
    figures = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer)}
    logger.info("%s parameters, %s tokens", f"{figures['parameters']:,}", f"{figures['vocabulary']:,}")
    work.finish(sorted(path for path in work.path.iterdir() if path.name[0] != "."), figures, about(recipe))


def _texts(catalog: ItemCatalog, shown: PromptFormat) -> Iterator[str]:
    """Item texts, and each item in the prompts' own form with every rating word."""
    for number, item in enumerate(catalog):
        rating = float(1 + number % 5)
        example = Example("", (Interaction(item.item_id, rating=rating),), (item.item_id,), item.item_id)
        for message in prompts.recommend(example, catalog, shown, with_rationale=number % 2 == 0):
            yield message["content"]
        yield prompts.item_info_answer(item, shown)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_stage(
        "base", BaseModelRecipe, lambda path, flags: load_recipe(path, BaseModelRecipe, flags), base, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
