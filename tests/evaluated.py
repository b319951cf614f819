"""Evaluations of language models as stage 4 leaves them, with completions that tests choose."""

from pathlib import Path

from twice_rec.data import dataset
from twice_rec.data.dataset import PreparedData
from twice_rec.evaluation.recipe import EvaluateRecipe
from twice_rec.files import write_json, write_records
from twice_rec.rationales.offline import OfflineAnnotator
from twice_rec.recipe_reader import load_recipe
from twice_rec.records import Prediction
from twice_rec.run import StageRun

ROOT = Path(__file__).parents[1]


def write_evaluation(run_dir, variant, completion, users=None, **settings):
    """Write eval/<variant>/.

    Args:
        completion: example -> what the model writes.
        users: how many are asked, from the first in the file on.
        settings: of the evaluation, if they differ from a likelihood with rationales; None leaves one out.
    """
    recipe = load_recipe(ROOT / "recipes" / "tiny" / "evaluate.yaml", EvaluateRecipe, ["--run_dir", str(run_dir)])
    names = (dataset.CATALOG, dataset.SEQUENCES, dataset.PROMPT, dataset.candidates_file("test"))
    inputs = dataset.required_files(run_dir, *names)
    predictions = [
        Prediction(e.user_id, e.target, {"uniform": 1}, 42, tuple(reversed(e.candidates)), (completion(e),))
        for e in list(PreparedData(run_dir / "data").examples("test", "uniform"))[:users]
    ]
    settings = {"ranking": "likelihood", "with_rationale": True, "item_first": False, **settings}
    settings = {name: value for name, value in settings.items() if value is not None}
    with StageRun(recipe, "evaluate", f"eval/{variant}", inputs, settings) as run:
        run.begin()
        write_records(run.path / "predictions.jsonl", predictions)
        write_json(run.path / "metrics.json", {"n": len(predictions)})
        run.finish([run.path / "predictions.jsonl", run.path / "metrics.json"], {})


def well_argued(run_dir):
    """Return example -> a completion that recommends the target, for the reasons of the offline annotator."""
    data = PreparedData(run_dir / "data")
    annotator = OfflineAnnotator(data.catalog)

    def completion(example):
        item = data.catalog[example.target]
        rationale = annotator.annotate(example).text
        return f"<think> {rationale} </think> <item_nm> {item.title} </item_nm> <item_id> {item.item_id} </item_id>"

    return completion
