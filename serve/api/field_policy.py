"""Fields of a request that are not read: which are refused, and which politely ignored.

A field that would change the answer is refused unless it holds its neutral value; a field that
cannot change the answer is dropped. What stands in neither table is read or an error.
"""

from typing import Any

from pydantic_core import PydanticCustomError

_HARMLESS = frozenset(
    {
        "metadata",
        "name",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
BODY_NEUTRAL: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "dimensions": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guardrails": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "output_dimension": (),
    "output_dtype": ("float",),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_mode": (),
    "reasoning_effort": ("none",),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_for_context_length": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def without_neutral(
    data: dict[str, Any], neutral_values: dict[str, tuple[object, ...]]
) -> dict[str, Any]:
    """`data` without harmless fields and those that hold a neutral value.

    Raises:
        PydanticCustomError: of the type of a field that holds another.
    """
    kept = {}
    for key, value in data.items():
        if key in _HARMLESS:
            continue
        if key not in neutral_values:
            kept[key] = value
        elif value not in neutral_values[key]:
            raise PydanticCustomError(
                key,
                "`{field}` is not supported and would change the answer; leave it out",
                {"field": key},
            )
    return kept
