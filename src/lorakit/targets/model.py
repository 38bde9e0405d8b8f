"""A model's input: the place where embedded tokens go in, and where vectors can be put in front of them."""

from __future__ import annotations

from torch import Tensor, nn

from lorakit.core.target import Shape
from lorakit.core.walk import base_modules, join
from lorakit.targets.attention import is_backbone, learned_positions
from lorakit.targets.dense import DenseStorage
from lorakit.targets.embedding import EmbeddingTarget
from lorakit.targets.recognise import layer_target
from lorakit.targets.signature import parameter_names
from lorakit.targets.weightless import WeightlessTarget

INPUTS = "inputs"


class ModelTarget(WeightlessTarget):
    """The input of a model.

    Attributes:
        embedding: The module that turns token ids into vectors.
        arguments: The parameters of the ``forward`` of the module that takes the tokens, in order.
        room: How many positions have a learned vector; None where positions are computed.
        pools_first: Whether heads take the first position, as an encoder's do: in a decoder only the last has seen all.
    """

    def __init__(self, path: str, backbone: nn.Module, embedding: nn.Module, gain: float) -> None:
        super().__init__(path, backbone, INPUTS, DenseStorage(), "inputs")
        width = int(embedding.embedding_dim)  # type: ignore[arg-type]
        self.embedding, self.gain = embedding, gain
        self.shape = Shape("model", out=width, in_=int(embedding.num_embeddings))  # type: ignore[arg-type]
        self.arguments, self.room = parameter_names(backbone), learned_positions(backbone)
        self.pools_first = not any(
            getattr(module, "is_causal", False) for _, module in base_modules(backbone)
        )

    @property
    def stored(self) -> Tensor:
        """The embedding table."""
        table = self.embedding._parameters["weight"]
        assert table is not None
        return table

    def weight(self) -> Tensor:
        """The vectors of all tokens as the model reads them, ``(width, vocabulary)``."""
        table = self.stored.detach().mT
        return table if self.gain == 1 else table * self.gain


def inputs(model: nn.Module) -> dict[str, ModelTarget | str]:
    """The inputs of a model: the model itself under the empty path when it has one, as all but towers have.

    A model with several, such as one for images and text, has each under the path of the part that it belongs to.
    """
    modules = dict(base_modules(model))
    found = {
        path: module for path, module in modules.items() if is_backbone(module) and not _inside(path, modules)
    }
    if len(found) == 1:
        ((path, module),) = found.items()
        return {"": _input("", path, module, model)}
    return {path: _input(path, path, module, model) for path, module in found.items()}


def model_target(model: nn.Module, path: str) -> ModelTarget | str | None:
    """The input at a path, the reason when nothing can be put in front of it, None when there is none."""
    return inputs(model).get(path)


def _inside(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether there is a module further in that takes the tokens too: a head's model only hands them on."""
    start = path + "." if path else ""
    return any(
        other.startswith(start)
        and other != path
        and is_backbone(module)
        and _embedding_path(module) is not None
        for other, module in modules.items()
    )


def _embedding_path(backbone: nn.Module) -> str | None:
    get = getattr(backbone, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    paths = (path for path, module in base_modules(backbone) if module is embedding)
    return next(paths, None) if embedding is not None else None


def _input(path: str, place: str, backbone: nn.Module, model: nn.Module) -> ModelTarget | str:
    if getattr(getattr(backbone, "config", None), "is_encoder_decoder", False):
        return "it is an encoder-decoder, and it is not said which of the two would read the vectors"
    embedding_path = _embedding_path(backbone)
    if embedding_path is None:
        return f"{type(backbone).__name__} does not say what its input embedding is (get_input_embeddings)"
    target = layer_target(model, join(place, embedding_path))
    if isinstance(target, str):
        return f"its input embedding cannot be read: {target}"
    if not isinstance(target, EmbeddingTarget):
        return f"its input embedding is a {type(backbone.get_submodule(embedding_path)).__name__}, not an nn.Embedding"
    return ModelTarget(path, backbone, target.module, target.gain)
