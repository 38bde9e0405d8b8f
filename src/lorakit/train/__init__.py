"""Training and scoring an adapter as a recipe says.

    from lorakit.train import Recipe, evaluate, train

    recipe = Recipe.from_file("recipe.yaml")
    result = train(recipe)
    print(evaluate(recipe, adapter=result.adapter).scores)

Importing this package imports neither transformers nor matplotlib; what needs them does so when called.
"""

from lorakit.train.classifier_scores import LabelScore
from lorakit.train.classifying import Prediction, classify
from lorakit.train.data import load_examples
from lorakit.train.evaluation import Answer, EvalResult, evaluate
from lorakit.train.examples import Example
from lorakit.train.generation import generate
from lorakit.train.progress import PlainProgress, Progress, RichProgress, Silent, StepReport, progress_for
from lorakit.train.recipe import Recipe
from lorakit.train.render import Rendered, RenderedSet, Renderer, render
from lorakit.train.run_files import plot_loss, read_metrics
from lorakit.train.text_vectors import embed
from lorakit.train.train_result import TrainResult
from lorakit.train.trainer import train

__all__ = [
    "Answer",
    "EvalResult",
    "Example",
    "LabelScore",
    "PlainProgress",
    "Prediction",
    "Progress",
    "Recipe",
    "Rendered",
    "RenderedSet",
    "Renderer",
    "RichProgress",
    "Silent",
    "StepReport",
    "TrainResult",
    "classify",
    "embed",
    "evaluate",
    "generate",
    "load_examples",
    "plot_loss",
    "progress_for",
    "read_metrics",
    "render",
    "train",
]
