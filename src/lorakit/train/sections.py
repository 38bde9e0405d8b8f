"""What the sections of a recipe have in common: strict keys, suggestions, and paths that start at the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from lorakit.errors import listing, near_matches

if TYPE_CHECKING:
    from typing_extensions import Self


class Section(BaseModel):
    """One mapping of a recipe. A key that it does not know is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", validate_default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _check_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Suggest what an unknown key was meant to be, and report what else is wrong in the same go."""
        unknown = [key for key in value if key not in cls.model_fields] if isinstance(value, Mapping) else []
        if not unknown:
            return handler(value)
        found = [
            InitErrorDetails(type=unknown_key(key, cls.model_fields), loc=(str(key),), input=value[key])
            for key in unknown
        ]
        try:
            handler({key: item for key, item in value.items() if key in cls.model_fields})
        except ValidationError as error:
            found += [
                InitErrorDetails(
                    type=PydanticCustomError(
                        item["type"], "{message}", {**item.get("ctx", {}), "message": item["msg"]}
                    ),
                    loc=item["loc"],
                    input=item["input"],
                )
                for item in error.errors()
            ]
        raise ValidationError.from_exception_data(cls.__name__, found)


def unknown_key(key: object, known: Mapping[str, Any]) -> PydanticCustomError:
    """The error for a key that a section does not have."""
    hint = near_matches(str(key), known) or f" Known here: {listing(known, most=40)}."
    return PydanticCustomError("unknown_key", "is not a key of a recipe.{hint}", {"hint": hint})


def _from_recipe(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    path = path.expanduser()
    return path if folder is None else Path(folder, path)


InputPath = Annotated[Path, AfterValidator(_from_recipe)]
"""A file or folder that is read; relative to the recipe's own folder."""
