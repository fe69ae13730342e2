"""Facts about a model that manifests and the catalogue state in the same words."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from ..fetcher.config import ChatFormat, ReleaseHints


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
