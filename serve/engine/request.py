"""What is asked of the engine, what comes back, and the state of a request in between."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from ...settings import KV_BLOCK_TOKENS
from .blocks import block_digest, root_digest
from .step import Pooling, SamplingParams, ScoredToken, Scoring, StepRow, TokenHistory

FinishReason = Literal["stop", "length", "abort"]


class Matcher(Protocol):
    """Where one answer stands in its grammar."""

    def allowed(self) -> bytes:
        """What may come next, as `StepRow.allowed`; asking again gives the same."""

    def accept(self, token_id: int) -> None:
        """Go on by a token of the answer; one that ends it is taken too."""


class Grammar(Protocol):
    """What an answer must be. Shared by threads."""

    def start(self) -> Matcher:
        """At the beginning of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationParams:
    """How to continue a prompt, and when to stop."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer besides the model's own; the ending token is still reported."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-text tokens, not past `stop_token_ids`."""
    min_tokens: int = 0
    """Tokens of the answer before which nothing may end it."""
    grammar: Grammar | None = None
    """Keeps the answer to its rules; it ends by an end token where they allow it."""
    num_prompt_logprobs: int | None = None
    """None: the prompt is not scored; k: with the k most likely tokens. Wants every token computed:
    set `reads_cache` to false."""
    pooling: Pooling | None = None
    """Pool the prompt's hidden states; the same holds. The answer is nobody's then: ask for 1."""
    priority: int = 0
    """Lower ones are admitted first and give up their KV blocks last; equal ones by arrival."""
    cache_salt: str = ""
    """Only requests of one salt share KV blocks: nobody else can tell from the time to the first
    token what was asked before."""
    reads_cache: bool = True
    """False computes every token of the prompt anew, for whoever wants what each of them gives."""


@dataclass(kw_only=True, slots=True)
class TokenEvent:
    """One generated token; the last of a request has a finish reason.

    Not frozen, for the reason of `StepRow`.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Token ids and their log-probabilities, most likely first."""
    scored: tuple[ScoredToken, ...] = ()
    """The prompt from its second token on; on the first event, if it was asked for."""
    vector: tuple[float, ...] = ()
    """The pooled prompt, of length 1; on the first event, if it was asked for."""
    num_cached_tokens: int = 0
    """On the first event: tokens of the prompt that were in the KV cache already."""
    finish_reason: FinishReason | None = None
    is_finite: bool = True
    """False: the request's numbers overflowed. It ends here, by "abort", and without this token."""


@dataclass(kw_only=True, slots=True, eq=False)
class Request:
    """One prompt and its answer so far. Only the scheduler changes it."""

    request_id: int
    """Ascending in order of arrival; never used twice."""
    prompt_ids: tuple[int, ...]
    params: GenerationParams
    begun_ids: tuple[int, ...] = ()
    """Its answer so far, where another scheduler began it; counts as if it had been here."""
    rank: tuple[int, int] = field(init=False)
    """Lower ones come first: by priority, then by arrival."""
    token_ids: list[int] = field(init=False)
    """The prompt and the answer so far."""
    block_ids: list[int] = field(default_factory=list)
    """KV blocks it holds, in the order of its positions."""
    num_blocks_sent: int = 0
    """Leading `block_ids` that the stages know of."""
    num_published: int = 0
    """Leading `block_ids` that are full and were offered to others, or come from them."""
    num_cached_tokens: int | None = None
    """Tokens of the prompt that were in the KV cache when it was first admitted."""
    row_ends: list[int] = field(default_factory=list)
    """Where the rows ended in which its prompt was first computed, or found in the cache."""
    num_scheduled: int = 0
    """Leading tokens whose keys and values are computed or on their way through the stages."""
    awaits_sample: bool = False
    """A step in flight will bring its next token."""
    last_step_id: int = -1
    """The last step it took part in."""
    matcher: Matcher | None = field(init=False)
    """Stands behind the last known token; None without a grammar."""
    sent_history: bool = False
    """The last stage knows all its tokens, if its parameters count them."""

    end_ids: frozenset[int] = frozenset()
    """Tokens that end the answer; the scheduler knows the model's own."""
    has_wishes: bool = field(init=False)
    """Whether the last stage must hear more of it than how to sample."""
    _digests: list[bytes] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        self.rank = (self.params.priority, self.request_id)
        self.token_ids = [*self.prompt_ids, *self.begun_ids]
        self.matcher = None if self.params.grammar is None else self.params.grammar.start()
        if self.matcher is not None:
            for token_id in self.begun_ids:
                self.matcher.accept(token_id)
        params = self.params
        self.has_wishes = (
            params.sampling.counts_tokens
            or params.min_tokens > 0
            or params.num_prompt_logprobs is not None
            or params.pooling is not None
            or params.grammar is not None
        )

    def digest(self, index: int) -> bytes:
        """What the full block `index` of its tokens is known by; computed once."""
        digests = self._digests
        while len(digests) <= index:
            start = len(digests) * KV_BLOCK_TOKENS
            parent = digests[-1] if digests else root_digest(self.params.cache_salt)
            digests.append(block_digest(parent, self.token_ids[start : start + KV_BLOCK_TOKENS]))
        return digests[index]

    def cacheable_digests(self) -> Iterator[bytes]:
        """Of its full blocks but the one with its last token, which must be computed in any case:
        the next one is sampled from it."""
        return map(self.digest, range((len(self.token_ids) - 1) // KV_BLOCK_TOKENS))

    def resume_at(self, num_cached: int) -> int:
        """How many of so many cached tokens, whole blocks, to take: as many as let the next row
        begin where one did in the first run. What that run did not compute has no such borders."""
        if num_cached <= (self.num_cached_tokens or 0) or num_cached >= len(self.prompt_ids):
            return num_cached
        if not self.row_ends or num_cached > self.row_ends[-1]:
            return num_cached
        begun = (end for end in self.row_ends if end <= num_cached and end % KV_BLOCK_TOKENS == 0)
        return max(begun, default=0)

    def next_end(self) -> int | None:
        """Where its next row must end, as in the first run; None: it has not come so far before."""
        start = self.num_scheduled
        if self.num_generated and start >= len(self.prompt_ids):
            return start + 1
        index = bisect_right(self.row_ends, start)
        return self.row_ends[index] if index < len(self.row_ends) else None

    def note_end(self, end: int) -> None:
        """Remember where a row of the prompt ended, if it had not come so far before."""
        if end <= len(self.prompt_ids) and (not self.row_ends or end > self.row_ends[-1]):
            self.row_ends.append(end)

    @property
    def num_unscheduled(self) -> int:
        """Known tokens that no step computes yet; 0 while the next token is awaited."""
        return len(self.token_ids) - self.num_scheduled

    @property
    def decodes(self) -> bool:
        """Whether all its known tokens but the last are scheduled."""
        return self.num_scheduled > 0 and self.num_unscheduled <= 1

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - len(self.prompt_ids)

    def row(self, num_tokens: int) -> StepRow:
        """Its next tokens, with the blocks that the stages do not know of.

        They count as scheduled when the scheduler says so; that the last stage has heard of the
        tokens before is noted here.
        """
        start, end = self.num_scheduled, self.num_scheduled + num_tokens
        is_last = end == len(self.token_ids)
        num_sent = self.num_blocks_sent
        row = StepRow(
            request_id=self.request_id,
            position=start,
            token_ids=(self.token_ids[start],)
            if num_tokens == 1
            else tuple(self.token_ids[start:end]),
            new_block_ids=tuple(self.block_ids[num_sent:])
            if len(self.block_ids) > num_sent
            else (),
            sampling=self.params.sampling if is_last else None,
        )
        return self._with_wishes(row) if self.has_wishes else row

    def _with_wishes(self, row: StepRow) -> StepRow:
        """The row with what few requests ask of the last stage."""
        params = self.params
        if row.sampling is not None:
            if params.sampling.counts_tokens and not self.sent_history:
                self.sent_history = True
                answer_ids = tuple(self.token_ids[len(self.prompt_ids) :])
                history = TokenHistory(prompt_ids=self.prompt_ids, answer_ids=answer_ids)
                row = replace(row, history=history)
            if self.num_generated < params.min_tokens:
                row = replace(row, banned_ids=tuple(sorted(self.end_ids)))
            if self.matcher is not None:
                row = replace(row, allowed=self.matcher.allowed())
        if self.num_generated == 0:
            if params.num_prompt_logprobs is not None:
                end = row.position + len(row.token_ids) + 1
                next_ids = self.prompt_ids[row.position + 1 : end]
                scoring = Scoring(next_ids=next_ids, num_top=params.num_prompt_logprobs)
                row = replace(row, scoring=scoring)
            if params.pooling is not None:
                row = replace(row, pooling=params.pooling)
        return row
