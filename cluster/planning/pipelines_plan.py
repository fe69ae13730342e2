"""All pipelines of a plan where speeds are known: how many, on which devices, for which streams."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import inf

from ..plan import Pipeline, Plan, UnusedNode
from ..search.ceiling import Ceiling, numbers
from ..search.division import EXACT_DIVIDED, Share, best_division, portion
from ..search.placing import Placing
from ..search.regrouping import regrouped
from ..search.set_bounds import MOST_DEVICES
from ..search.sketch import Sketch
from .prediction import predicted
from .speed_plan import NEAR, SpeedPlanner

_EFFORT = 128_000
"""Of looking at divisions of few devices (see `best_division`), times the layers of the model."""
_GUESSES = 90
"""Divisions of many devices whose yield is guessed."""
_PLANNING = 0.028
"""What may be spent on planning guesses, for each device, as `_effort_of` has it."""
_HOPEFUL = 0.85
"""Of the guess for one pipeline, from which on a guess is planned."""
_EFFORTS = (0.004, 0.008, 0.02, 0.04, 0.15)
"""Of planning a share of 1 to 5 devices that may share experts, about seconds for 32 layers."""
_EFFORT_EACH = 0.032
"""For each of more devices, or of 4 and more that do not share experts."""


class PipelinesPlanner:
    """The best pipelines on the places of a `Placing`, and what they should achieve together.

    For throughput their number is part of the search; otherwise there is one, unless the workload
    names another number.
    """

    def __init__(self, placing: Placing) -> None:
        self._placing = placing
        self._workload = placing.workload
        self._is_busy = placing.workload.objective == "throughput"
        self._planners: dict[Share, SpeedPlanner] = {}
        self._share_of: dict[SpeedPlanner, Share] = {}
        self._num_layers = len(next(iter(placing.weights.values())).layer_bytes)
        self._is_best = False
        """Whether all divisions were searched."""

    @cached_property
    def found(self) -> tuple[SpeedPlanner, ...]:
        """A planner for each pipeline, the fastest first; none: nothing fits."""
        asked, count = self._workload.num_pipelines, len(self._placing.places)
        if not count:
            return ()
        if asked == 1 or (asked is None and not self._is_busy):
            return self._one()
        if self._may_be_several:
            return tuple(sorted(self._several(), key=lambda planner: -planner.score))
        return self._one() if asked is None else ()

    @property
    def is_possible(self) -> bool:
        """Whether anything is found."""
        if (self._workload.num_pipelines or 1) > 1:
            return bool(self.found)
        return bool(self._placing.places) and self._planner(self._every).is_possible

    @cached_property
    def _may_be_several(self) -> bool:
        workload = self._workload
        most = min(len(self._placing.places), workload.max_concurrency)
        if workload.num_pipelines == 1:
            return False
        return most >= max(2, workload.num_pipelines or 2) and self._ceiling.most_pipelines() >= 2

    @cached_property
    def _ceiling(self) -> Ceiling:
        return Ceiling(self._placing)

    def _one(self, *, floor: float = 0.0) -> tuple[SpeedPlanner, ...]:
        planner = self._planner(self._every, floor=floor)
        return (planner,) if planner.found is not None else ()

    @property
    def _every(self) -> Share:
        return Share((1 << len(self._placing.places)) - 1, self._workload.max_concurrency)

    def _planner(self, share: Share, *, floor: float = 0.0) -> SpeedPlanner:
        known = self._planners.get(share)
        # What was found above a floor is found from any lower one, too.
        if known is None or (floor < known.floor and known.score <= known.floor):
            part = self._placing.part(numbers(share.sites), share.streams)
            self._planners[share] = SpeedPlanner(part, floor=floor)
            self._share_of[self._planners[share]] = share
        return self._planners[share]

    def _several(self) -> Sequence[SpeedPlanner]:
        """From a good guess, and from one pipeline, to the best division that can be found."""
        workload, places = self._workload, self._placing.places
        found = [self._guessed()]
        if workload.num_pipelines is None:
            found.append(self._one(floor=_score_of(found[0])))
        best = max(found, key=_score_of)
        if len(places) <= EXACT_DIVIDED:
            division = best_division(
                self,
                len(places),
                workload.max_concurrency,
                start=tuple(self._share_of[planner] for planner in best),
                score=_score_of(best),
                num_pipelines=workload.num_pipelines,
                evenly=not self._is_busy,
                effort=_EFFORT / self._num_layers,
            )
            if division is not None:
                self._is_best = division.is_best
                found.append([self._planner(share) for share in division.shares])
        return _likeliest(found)

    def _guessed(self) -> Sequence[SpeedPlanner]:
        """The best of some divisions into several pipelines; none: none fits."""
        workload = self._workload
        sketch = Sketch(self._placing, self._ceiling)
        divisions = regrouped(
            sketch,
            len(self._placing.places),
            workload.max_concurrency,
            most_pipelines=self._ceiling.most_pipelines(),
            num_pipelines=workload.num_pipelines,
            guesses=_GUESSES,
        )
        if workload.num_pipelines is None:
            least = _HOPEFUL * sketch.yields(self._every)
            divisions = [each for each in divisions if sum(map(sketch.yields, each)) >= least]
        divisions.sort(key=lambda each: -min(sum(map(sketch.yields, each)), self._most_of(each)))
        best: Sequence[SpeedPlanner] = ()
        left = _PLANNING * len(self._placing.places)
        for shares in divisions:
            if best and self._most_of(shares) <= _score_of(best):
                continue
            effort = sum(self._effort_of(share) for share in shares)
            if effort > left and (
                best or workload.num_pipelines is None or shares != divisions[-1]
            ):
                continue
            left -= effort
            planners = [self._planner(share) for share in shares]
            if all(planner.score for planner in planners):
                best = max(best, planners, key=_score_of)
        return best

    def _most_of(self, shares: Sequence[Share]) -> float:
        """Tokens per second of a division at most; inf: nobody knows, of many devices."""
        is_small = len(self._placing.places) <= MOST_DEVICES
        return sum(map(self._ceiling.most, shares)) if is_small else inf

    def _effort_of(self, share: Share) -> float:
        count = share.sites.bit_count()
        if share in self._planners:
            return 0.0
        shares_experts = self._placing.problem(1).shared is not None
        few = len(_EFFORTS) if shares_experts else 3
        effort = _EFFORTS[count - 1] if count <= few else _EFFORT_EACH * count
        return effort * self._num_layers / 32

    def most(self, share: Share) -> float:
        """As `Offers.most`."""
        return self._ceiling.most(share)

    def best(self, share: Share, floor: float) -> float:
        """As `Offers.best`."""
        return self._planner(share, floor=floor).score

    def pipelines(self, num_cpus_of: Mapping[str, int]) -> tuple[Pipeline, ...]:
        """Those that were found, with their times; all that is on a host shares its processors."""
        on_host = Counter(place.node.host for each in self.found for place in each.used())
        threads = {host: max(1, num_cpus_of[host] // count) for host, count in on_host.items()}
        return tuple(planner.pipeline(threads) for planner in self.found)

    def best_possible(self) -> float | None:
        """What no plan can beat (`Plan.best_possible`); None where nobody can say."""
        if self._workload.popularity is not None:
            return None
        if len(self.found) == 1 and not (self._is_busy and self._may_be_several):
            return self.found[0].best_possible()
        if not self._is_busy:
            least = min(planner.streams for planner in self.found)
            return self._planner(Share(self._every.sites, least)).best_possible()
        score = _score_of(self.found)
        is_exact = self._is_best and portion(self._workload.max_concurrency) == 1
        if is_exact and all(each.is_exact for each in self._planners.values()):
            return score
        most = max(self._ceiling.most_in_all(), score)
        if self._workload.num_pipelines is not None:
            return most
        # Above which floor a planner searched does not matter for its bound.
        one = self._planners.get(self._every) or self._planner(self._every, floor=score)
        return max(most, one.bound(score, enough=most))

    def unused(self, pipelines: Sequence[Pipeline], smallest_bytes: int) -> tuple[UnusedNode, ...]:
        """Why each node without a part in these has none, and each device of the others: what the
        best pipeline with it would do."""
        stages = [stage for pipeline in pipelines for stage in pipeline.stages]
        used = {stage.seat for stage in stages}
        used |= {(helper.host, helper.device) for stage in stages for helper in stage.helpers}
        hosts = {host for host, _ in used}
        reasons: dict[tuple[str, str | None], str] = {}
        for number, planner in enumerate(self.found):
            of = f" in pipeline {number}" if len(self.found) > 1 else ""
            for (host, device), reason in planner.unused(smallest_bytes, used).items():
                idle = (host, device if host in hosts else None)
                reasons.setdefault(idle, reason + of * reason.startswith("not needed"))
        return tuple(
            UnusedNode(host=host, device=device, reason=reason)
            for (host, device), reason in sorted(reasons.items(), key=str)
        )

    def predicted(self, plan: Plan) -> Plan:
        """`plan` with the times of its pipelines, as `SpeedPlanner.predicted`."""
        number_of = {(p.node.host, p.device_name): n for n, p in enumerate(self._placing.places)}

        def timed(pipeline: Pipeline) -> Pipeline:
            stages = pipeline.stages
            seats = {(stage.host, stage.device) for stage in stages}
            seats |= {(helper.host, helper.device) for s in stages for helper in s.helpers}
            if not seats <= number_of.keys():
                return pipeline
            places = sorted(number_of[seat] for seat in seats)
            part = self._placing.part(places, pipeline.max_concurrency)
            return predicted(part, pipeline)

        return replace(plan, pipelines=tuple(map(timed, plan.pipelines)), best_possible=None)


def _score_of(planners: Sequence[SpeedPlanner]) -> float:
    return sum(planner.score for planner in planners)


def _likeliest(found: Sequence[Sequence[SpeedPlanner]]) -> Sequence[SpeedPlanner]:
    """Of the best division and those nearly as good the one that yields most as prompts come."""
    least = max(map(_score_of, found)) * (1 - NEAR)
    near = [planners for planners in found if planners and _score_of(planners) >= least]
    return max(near, key=lambda planners: sum(each.likely for each in planners), default=())
