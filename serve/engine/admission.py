"""Who waits, who runs, and which KV blocks those who run hold: state in, decision out.

Why blocks can be handed out again at once, while steps that use them are still in flight: links
and stages keep the order of steps. Wherever a later step writes into a block, every earlier step
has been computed already, reads and writes included; and a request reads only slots that it has
written itself, in the same or an earlier step. The stages must merely forget the old table before
a request gets a new one, which `StepPlan.released` says in the very next step.

For the same reason a full block may be shared as soon as the step that fills it is *scheduled*,
long before its result: whoever takes it is part of a later step, which every stage computes after
that one. It is not shared within one step, where the order of rows is the stages' own affair; and
that the request that fills it is aborted or preempted meanwhile changes nothing, because a step
that was sent is computed whole. Nobody writes into a shared block: it is full, and a request's own
tokens begin after it.
"""

from bisect import insort
from operator import attrgetter

from ...settings import KV_BLOCK_TOKENS
from .blocks import BlockPool, blocks_for
from .request import Request

_BY_RANK = attrgetter("rank")


class Admission:
    """Requests by rank, and their KV blocks.

    A request's rank is its priority and, among equals, its arrival. Nobody overtakes a waiting
    request of better rank, and when blocks run out, the running request of the worst rank gives its
    own back and is computed again later. So the best of the running requests always advances. One
    that waits takes blocks from nobody, whatever its rank.

    `requests`, `running` and `waiting` are for reading only.
    """

    def __init__(self, *, num_kv_blocks: int, max_running: int) -> None:
        self._pool = BlockPool(num_kv_blocks)
        self._max_running = max_running
        self._released: list[int] = []
        self.requests: dict[int, Request] = {}
        """All, by id."""
        self.running: list[Request] = []
        """Those that hold KV blocks, the best rank first."""
        self.waiting: list[Request] = []
        """Those without, preempted ones included, the best rank first."""
        self.num_preemptions = 0
        self.num_cache_queries = 0
        """Tokens of prompts that were looked for in the KV cache."""
        self.num_cache_hits = 0
        """Those that were there."""

    @property
    def num_blocks(self) -> int:
        """KV blocks, whoever holds them."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """KV blocks that nobody reads; their contents may still be found by others."""
        return self._pool.num_free

    def holds(self, digest: bytes) -> bool:
        """Whether a KV block with this digest can be found now. Any thread may ask."""
        return self._pool.holds(digest)

    def add(self, request: Request) -> None:
        """Let a request wait; ValueError when it is here already."""
        if request.request_id in self.requests:
            raise ValueError(f"request {request.request_id} is here already")
        self.requests[request.request_id] = request
        insort(self.waiting, request, key=_BY_RANK)

    def remove(self, request: Request) -> None:
        """Forget a request now, whatever of it is in flight."""
        del self.requests[request.request_id]
        (self.running if request in self.running else self.waiting).remove(request)
        self._give_back(request)

    def admit(self) -> Request | None:
        """Give the first waiting request the blocks of all its tokens, if there is room."""
        num_running = len(self.running)
        # At least one block is its own; there is no use in looking for the others before.
        if (
            not self.waiting
            or num_running == self._max_running
            or not self._pool.can_allocate(1 + num_running)
        ):
            return None
        request = self.waiting[0]
        # A preempted request must know all its tokens, or the awaited one would be sampled twice.
        if request.awaits_sample:
            return None
        shared = []
        if request.params.reads_cache:
            shared = self._pool.match(request.cacheable_digests())
            num_cached = request.resume_at(len(shared) * KV_BLOCK_TOKENS)
            del shared[num_cached // KV_BLOCK_TOKENS :]
        needed = blocks_for(len(request.token_ids)) - len(shared)
        # A block for each running request to grow into, else one is soon preempted again.
        if not self._pool.can_allocate(needed + num_running, shared):
            return None
        del self.waiting[0]
        request.block_ids = self._pool.allocate(needed, shared)
        request.num_published = len(shared)
        request.num_scheduled = len(shared) * KV_BLOCK_TOKENS
        if shared:
            request.note_end(request.num_scheduled)
        self._count_hit(request)
        insort(self.running, request, key=_BY_RANK)
        return request

    def make_room(self, request: Request, *, step_id: int) -> bool:
        """Have a block for the request's last token; worse-ranked ones may have to give theirs.

        Those that are part of the step in the making, `step_id`, keep theirs. False: it must wait.
        """
        missing = blocks_for(len(request.token_ids)) - len(request.block_ids)
        while not self._pool.can_allocate(missing):
            victim = self.running[-1]
            # It waits when there is no worse one, or the worst is part of that very step: a better
            # one will end, or preempt it.
            if victim is request or victim.last_step_id == step_id:
                return False
            self._preempt(victim)
        request.block_ids += self._pool.allocate(missing)
        return True

    def publish(self, request: Request) -> None:
        """Share the blocks that a step, now that it is made, fills."""
        for index in range(request.num_published, request.num_scheduled // KV_BLOCK_TOKENS):
            self._pool.publish(request.block_ids[index], request.digest(index))
        request.num_published = request.num_scheduled // KV_BLOCK_TOKENS

    def take_released(self) -> tuple[int, ...]:
        """Requests whose tables the stages must forget, said once."""
        released = tuple(self._released)
        self._released.clear()
        return released

    def forget(self, request: Request) -> None:
        """Remove a request, and let nobody share what it computed."""
        self._pool.forget(request.block_ids)
        self.remove(request)

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls. For tests: slow."""
        self._pool.check_integrity(
            block_id for request in self.running for block_id in request.block_ids
        )
        together = sorted([*self.running, *self.waiting], key=_BY_RANK)
        assert together == sorted(self.requests.values(), key=_BY_RANK)
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_BY_RANK)
        assert len(self.running) <= self._max_running
        assert len(set(self._released)) == len(self._released)
        for request in together:
            assert request.num_blocks_sent <= len(request.block_ids)
            assert request.num_published <= request.num_scheduled // KV_BLOCK_TOKENS
            if request.num_blocks_sent:
                assert blocks_for(request.num_scheduled) <= request.num_blocks_sent
            else:
                assert request.num_scheduled == request.num_published * KV_BLOCK_TOKENS
        for request in self.waiting:
            assert not request.block_ids
            assert request.num_scheduled == 0

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; all of its tokens will be computed again.

        A token that is in flight for it counts when it comes: it was computed before the stages
        hear of this.
        """
        self.running.remove(request)
        self._give_back(request)
        request.num_scheduled = request.num_published = 0
        insort(self.waiting, request, key=_BY_RANK)
        self.num_preemptions += 1

    def _count_hit(self, request: Request) -> None:
        """Once for each request: what it finds after a preemption is mostly its own."""
        if request.num_cached_tokens is not None:
            return
        request.num_cached_tokens = request.num_scheduled
        if request.params.reads_cache:
            self.num_cache_queries += len(request.prompt_ids)
            self.num_cache_hits += min(request.num_scheduled, len(request.prompt_ids))

    def _give_back(self, request: Request) -> None:
        if request.num_blocks_sent:
            self._released.append(request.request_id)
        self._pool.free(request.block_ids)
        request.block_ids, request.num_blocks_sent = [], 0
        request.sent_history = False
