"""Facts about a model that manifests and the catalogue state in the same words."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from ..errors import MagnetarError
from ..fetcher.config import ChatFormat, ReleaseHints

Complaint = tuple[tuple[str | int, ...], str]
"""Where, from the part that is checked on; what."""


def complaints(found: Sequence[Complaint]) -> PydanticCustomError:
    """What a validator of a whole part raises: all that is wrong in it, each with its place."""
    said = "; ".join(message for _, message in found)
    return PydanticCustomError("values", "{said}", {"said": said, "found": list(found)})


def checked(check: Callable[[str], object]) -> AfterValidator:
    """A validator that keeps the text and turns what ``check`` raises into its message."""

    def validate(text: str) -> str:
        try:
            check(text)
        except (ValueError, MagnetarError) as error:
            raise PydanticCustomError("value", "{reason}", {"reason": str(error)}) from error
        return text

    return AfterValidator(validate)


class Part(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=False
    )


def _check_window(value: Any) -> int | Literal["none"]:
    if value == "none" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value  # type: ignore[no-any-return]
    raise PydanticCustomError("value", "should be a number of tokens, or none for no window")


Window = Annotated[
    int | Literal["none"],
    PlainValidator(_check_window, json_schema_input_type=int | Literal["none"]),
]


class Facts(Part):
    """What the release's own files may lack."""

    rope_theta: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Base of the rotary position embedding.",
    )
    sliding_window: Window | None = Field(
        default=None, description="Tokens that attention looks back on; `none` for all of them."
    )
    max_context_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest text, prompt and answer, that the model was made for.",
    )
    chat_format: ChatFormat | None = Field(
        default=None,
        description="How messages become tokens; `none` for a model that only completes.",
    )

    def hints(self) -> ReleaseHints:
        """The same for the fetcher."""
        return ReleaseHints(
            rope_theta=self.rope_theta,
            sliding_window=self.sliding_window,
            max_context_tokens=self.max_context_tokens,
            chat_format=self.chat_format,
        )
