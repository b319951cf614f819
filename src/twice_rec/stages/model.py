"""`twice-rec model NAME [hub | package]`: a model that recipes name by its folder -> models/.

`recipes/models/` describes those that there are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from twice_rec.errors import InputError
from twice_rec.evaluation.tables import show
from twice_rec.llm.ready_models import PLACES, known_models, make_model, read_description

logger = logging.getLogger(__name__)

_DESCRIPTIONS = Path("recipes/models")  # launchers start in the repository


def model(words: Sequence[str]) -> None:
    """Make the model that the words of the command line name."""
    usage = f"NAME [{' | '.join(PLACES)}]"
    if words[:1] in (["--help"], ["-h"]):
        show(f"usage: twice-rec model {usage}\n\nNAME is one of: {', '.join(known_models(_DESCRIPTIONS))}")
        return
    if not 1 <= len(words) <= 2 or words[0].startswith("-") or (words[1:] and words[1] not in PLACES):
        raise InputError(f"model: expected {usage}, found {' '.join(words) or 'nothing'}")
    description = read_description(words[0], _DESCRIPTIONS)
    folder = make_model(description, Path(), *words[1:])
    logger.info("%s: %s, %s", folder, words[0], description.licence)
