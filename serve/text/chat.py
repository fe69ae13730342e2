"""Messages to tokens. The formats are code: no template of a model or a request is ever run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import UsageError
from ...fetcher.config import ChatFormat
from .json_tokenizer import CHATML_END, CHATML_START
from .tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

SAFETY_PROMPT = (
    "Always assist with care, respect, and truth. Respond with utmost utility yet securely."
    " Avoid harmful, unethical, prejudiced, or negative content."
    " Ensure replies promote fairness and positivity."
)
"""What Mistral's `safe_prompt` puts before the conversation (its guardrailing page)."""

TEXT_PART_JOINS: dict[ChatFormat, str] = {"mistral-v1": "\n\n", "chatml": "\n", "none": "\n"}
"""What stands between the text parts of one message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: Role
    content: str
    prefix: bool = False
    """The last message, an assistant's, that the answer continues."""


def encode_chat(
    messages: Sequence[ChatMessage], tokenizer: Tokenizer, chat_format: ChatFormat
) -> list[int]:
    """The prompt whose continuation is the assistant's next message, or the rest of its `prefix`.

    Every message is tokenised by itself, so that no message can contain the control tokens that
    frame it. In Mistral v1 ``[INST]`` is plain text and a user can still write it.

    Raises:
        UsageError: a base model, or messages in an order that the format cannot express.
    """
    if chat_format == "none":
        raise UsageError(
            "This is a base model: it completes text and was not trained to chat."
            " Use /v1/completions."
        )
    if not messages:
        raise UsageError("messages is empty; give at least one message.")
    for index, message in enumerate(messages):
        if message.prefix and (message.role != "assistant" or index != len(messages) - 1):
            raise UsageError(
                f"messages[{index}] has prefix: true; only a last message of role assistant can."
            )
    if chat_format == "mistral-v1":
        return _encode_mistral_v1(messages, tokenizer)
    return _encode_chatml(messages, tokenizer)


def _encode_mistral_v1(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[int]:
    """As mistral_common's `MistralTokenizer.v1()` does it.

    The system messages, wherever they stand, open the first user message; neighbours of one role
    become one message.
    """
    turns: list[ChatMessage] = []
    previous: Role | None = None
    for index, message in enumerate(messages):
        if message.role == "system":
            if previous == "assistant":
                raise UsageError(
                    f"messages[{index}] is a system message after an assistant's; the Mistral"
                    " format keeps them all before the first user message. Move it there."
                )
        elif message.role == previous:
            last = turns[-1]
            joined = "\n\n".join(filter(None, (last.content, message.content)))
            turns[-1] = ChatMessage(role=last.role, content=joined, prefix=message.prefix)
        else:
            turns.append(message)
        previous = message.role
    if turns and turns[-1].role == "assistant" and not turns[-1].prefix:
        raise UsageError(
            "The last message is the assistant's; end with a user message, or give it"
            " prefix: true to have it continued."
        )
    if not turns or turns[0].role != "user":
        turns.insert(0, ChatMessage(role="user", content=""))

    system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos_id = tokenizer.control_id("</s>")
    for index, turn in enumerate(turns):
        if turn.role == "user":
            content = f"{system}\n\n{turn.content}" if index == 0 and system else turn.content
            ids += tokenizer.encode(f"[INST] {content} [/INST]", add_bos=False)
            continue
        if not turn.content:
            raise UsageError("An assistant message is empty; leave it out or give it content.")
        ids += tokenizer.encode(turn.content, add_bos=False)
        if not turn.prefix:
            if eos_id is None:
                raise UsageError(
                    "This tokenizer has no </s>, which ends an assistant message in the Mistral"
                    " format; set chat_format to what the model was trained with."
                )
            ids.append(eos_id)
    return ids


def _encode_chatml(messages: Sequence[ChatMessage], tokenizer: Tokenizer) -> list[int]:
    """``<|im_start|>role\\ncontent<|im_end|>\\n`` for each message; no system prompt of ours."""
    start, end = tokenizer.control_id(CHATML_START), tokenizer.control_id(CHATML_END)
    if start is None or end is None:
        raise UsageError(
            f"This tokenizer has no {CHATML_START} and {CHATML_END}; set chat_format to what the"
            " model was trained with."
        )
    ids = tokenizer.encode("", add_bos=True)
    newline = tokenizer.encode("\n", add_bos=False)
    for message in messages:
        text = f"{message.role}\n{message.content}"
        ids += [start, *tokenizer.encode(text, add_bos=False)]
        if not message.prefix:
            ids += [end, *newline]
    if not messages[-1].prefix:
        ids += [start, *tokenizer.encode("assistant\n", add_bos=False)]
    return ids
