"""Base models: naming them, fetching the built-in ones, and loading them with their tokenizers.

Importing this package imports no transformers; the functions that need it do so when called.
"""

from lorakit.cache import cache_folder
from lorakit.models.builtin import BUILTINS, Builtin, model_folder
from lorakit.models.classifier import Classifier, head_of, labels_of, load_classifier
from lorakit.models.conversation import ConversationRenderer, Message, stop_ids
from lorakit.models.load import Task, has_encoder_and_decoder, load_model, load_tokenizer
from lorakit.models.resolve import ResolvedModel, resolve

__all__ = [
    "load_model",
    "load_classifier",
    "load_tokenizer",
    "has_encoder_and_decoder",
    "resolve",
    "Classifier",
    "head_of",
    "labels_of",
    "ResolvedModel",
    "Task",
    "ConversationRenderer",
    "Message",
    "stop_ids",
    "model_folder",
    "BUILTINS",
    "Builtin",
    "cache_folder",
]
