"""The settings of stage 0."""

from __future__ import annotations

from typing import ClassVar

from twice_rec.data.candidates import CandidateConfig
from twice_rec.data.sequences import SequenceConfig
from twice_rec.data.sources import SOURCES
from twice_rec.data.sources.synthetic import SyntheticConfig
from twice_rec.prompts import PromptFormat
from twice_rec.recipe import Recipe, key, one_of, required, rule

SourceName = one_of(SOURCES)


class PrepareRecipe(Recipe, SequenceConfig, CandidateConfig, PromptFormat, SyntheticConfig):
    """Stage 0: from a source of interactions to catalogue, sequences and candidate lists."""

    source: SourceName = required("where the interactions come from")
    source_dir: str | None = key(
        None, "folder of the source's files; the synthetic domain needs none", changes_result=False
    )
    reviews_file: str | None = key(None, "name of the reviews' file in source_dir, if it is not the source's usual one")
    metadata_file: str | None = key(None, "name of the items' file in source_dir, if it is not the source's usual one")

    RENAMED: ClassVar = {f"world_{name.removeprefix('synthetic_')}": name for name in SyntheticConfig.model_fields}
    RENAMED_VALUES: ClassVar = {("source", "world"): "synthetic", ("source", "atomic"): "recbole"}

    @rule
    def source_has_a_folder(self) -> str | None:
        if SOURCES[self.source].reads_folder and self.source_dir is None:
            return f"source {self.source} reads files: set source_dir, or pass --source_dir FOLDER"
        return None
