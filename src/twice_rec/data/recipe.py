"""The settings of stage 0."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from twice_rec.data.candidates import CandidateConfig
from twice_rec.data.download import HUB_FILES, DownloadConfig, fetch, missing_files
from twice_rec.data.sequences import SequenceConfig
from twice_rec.data.sources import SOURCES
from twice_rec.data.sources.base import Source, SourceFormat
from twice_rec.data.sources.synthetic import SyntheticConfig, SyntheticSource
from twice_rec.prompts import PromptFormat
from twice_rec.recipe import Recipe, key, one_of, required, rule
from twice_rec.run import StageRun

SourceName = one_of(SOURCES)


class PrepareRecipe(
    Recipe, SequenceConfig, CandidateConfig, PromptFormat, SyntheticConfig, SourceFormat, DownloadConfig
):
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

    @rule
    def the_hub_has_the_source(self) -> str | None:
        if self.download and self.source not in HUB_FILES:
            return f"download is true, but source is {self.source}; the hub has files for {' and '.join(HUB_FILES)}"
        return None

    def fetch_source(self) -> None:
        """Fetch what `source_dir` lacks, if the recipe says `download`; for errors see `download.fetch`."""
        folder = Path(self.source_dir or ".")
        given = (self.reviews_file, self.metadata_file)
        if self.download and (missing := missing_files(self.source, self.domain, folder, given)):
            StageRun.end_check()
            fetch(missing, self.domain, folder, self.download_revision)

    def open_source(self) -> Source:
        """Return the source; InputError if a file of it is missing or empty."""
        kind = SOURCES[self.source]
        if issubclass(kind, SyntheticSource):
            return kind(self, self.domain, self.seed)
        folder, titles_required = Path(self.source_dir or "."), self.untitled_items == "drop"
        return kind(folder, self.domain, self.reviews_file, self.metadata_file, titles_required, self)
