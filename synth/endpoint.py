"""How many calls one server can take, and whether it is there at all. Both are learnt from how its calls end.

The number of calls at once moves as TCP's window does: from a first guess it doubles while replies keep their pace,
then it grows by one a window, and it halves when the server says "too much" or falls silent. A circuit breaker opens
when the server fails several times in a row: it gets no calls for a while, then one trial call (half open), and when
that succeeds, all calls again (closed). Nothing in this file calls a server.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import random
from typing import Literal

FIRST_LIMIT = 16.0
SLOWEST = 2.0  # times the best pace: where it is slower, more calls at once would only wait for each other
FORGET = 1.02  # by which the best pace worsens in a window: what is asked now may take longer than what was
OPEN_AFTER = 5  # failures in a row, the circuit opens
FIRST_OPEN_SECONDS, LONGEST_OPEN_SECONDS = 1.0, 30.0

Failure = Literal["busy", "silence", "fault"]  # the server asks for fewer calls, gives no answer in time, or other

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Permit:
    """The right to one call. Its holder gives it back by `succeeded`, `failed` or `release`."""

    begun: float
    is_trial: bool  # of a half-open circuit


class Endpoint:
    """What is known of one server. Times are the event loop's, in seconds."""

    def __init__(self, name: str, rng: random.Random):
        self.name, self._rng = name, rng
        self.limit = FIRST_LIMIT
        self.in_flight = 0
        self._waiters: collections.deque[asyncio.Future[None]] = collections.deque()
        self._failures = 0  # in a row
        self._is_trying = False
        self._open_until = self._opened_at = self._paused_until = self._halved_at = 0.0
        self._is_doubling, self._best_pace = True, float("inf")
        self._start_window(0.0)

    def is_ready(self, now: float) -> bool:
        """Whether the circuit is closed, and the server has not asked for a pause."""
        return self._failures < OPEN_AFTER and now >= self._paused_until

    def is_half_open(self, now: float) -> bool:
        """Whether the circuit was open for long enough that a trial call may go out, and none has."""
        return self._failures >= OPEN_AFTER and now >= self.half_open_at and not self._is_trying

    @property
    def is_trying(self) -> bool:
        """Whether a trial call is under way."""
        return self._is_trying

    @property
    def half_open_at(self) -> float:
        return max(self._paused_until, self._open_until)

    @property
    def load(self) -> tuple[bool, float]:
        """What orders servers for one more call: first those with room, the idlest first, then the shortest line."""
        calls = self.in_flight + len(self._waiters)
        return (False, calls) if calls < int(self.limit) else (True, calls / self.limit)

    def has_room(self, now: float, called: bool) -> bool:
        """Whether a call may begin. Nobody overtakes those in line, but the one `called` from its head."""
        if self.is_half_open(now):
            return True
        return self.is_ready(now) and self.in_flight < int(self.limit) and (called or not self._waiters)

    def acquire(self, now: float) -> Permit:
        is_trial = self._failures >= OPEN_AFTER
        self._is_trying |= is_trial
        self.in_flight += 1
        self._was_full |= self.in_flight >= int(self.limit)
        return Permit(now, is_trial)

    async def wait(self) -> None:
        """Waits in line until there may be room, or the circuit opens."""
        turn = asyncio.get_running_loop().create_future()
        self._waiters.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiters.remove(turn)
            else:
                self._wake(1)  # its turn had come already, and goes to the next in line
            raise

    def succeeded(self, permit: Permit, now: float, tokens: int) -> None:
        """The call of the permit ended well; it wrote `tokens`, from which the pace is learnt unless they are 0."""
        if self._failures >= OPEN_AFTER:
            log.warning("%s answers again", self.name)
        self._failures = 0
        if tokens and permit.begun >= self._window_start:
            self._window_seconds += now - permit.begun
            self._window_tokens += tokens
            self._window_calls += 1
            if self._window_calls >= self.limit:
                self._end_window(now)
        self.release(permit)

    def failed(self, permit: Permit, now: float, how: Failure, retry_after: float = 0.0) -> None:
        """The call of the permit failed. One that began before the limit last changed tells nothing new about it."""
        self._paused_until = max(self._paused_until, now + retry_after)
        is_news = permit.begun >= self._halved_at
        if how != "fault" and is_news:
            self.limit = max(1.0, self.limit / 2)
            self._halved_at, self._is_doubling = now, False
            self._start_window(now)
        if permit.begun >= self._opened_at and (how != "busy" or is_news):
            self._failures += 1
            if self._failures >= OPEN_AFTER:
                self.open(now)
        if not self.is_ready(now):
            self._wake(len(self._waiters))  # so that they look for another server
        self.release(permit)

    def release(self, permit: Permit) -> None:
        """The call of the permit ended in a way that says nothing about the server."""
        self.in_flight -= 1
        self._is_trying &= not permit.is_trial
        self._wake(int(self.limit) - self.in_flight)

    def open(self, now: float) -> None:
        """Opens the circuit, the longer the more calls have failed."""
        self._failures = max(self._failures, OPEN_AFTER)
        seconds = min(FIRST_OPEN_SECONDS * 2.0 ** (self._failures - OPEN_AFTER), LONGEST_OPEN_SECONDS)
        seconds *= self._rng.uniform(0.5, 1.0)
        log.warning("%s failed %d times in a row, trying it again in %.1f s", self.name, self._failures, seconds)
        self._opened_at, self._open_until = now, now + seconds
        # The server that comes back may be another machine, so what was learnt of this one is forgotten.
        self.limit, self._is_doubling, self._best_pace = min(self.limit, FIRST_LIMIT), True, float("inf")
        self._start_window(now)

    def _wake(self, count: int) -> None:
        """Lets the first `count` in line go on."""
        while count > 0 and self._waiters:
            turn = self._waiters.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def _start_window(self, now: float) -> None:
        self._window_start = now
        self._window_seconds, self._window_tokens, self._window_calls = 0.0, 0, 0
        self._was_full = False

    def _end_window(self, now: float) -> None:
        """Decides about the limit, once as many calls were answered as it lets through at once."""
        pace = self._window_seconds / self._window_tokens
        self._best_pace = min(pace, self._best_pace * FORGET)
        if pace > SLOWEST * self._best_pace:
            self._is_doubling = False
        elif self._was_full:  # else nobody knows how it would do with more
            self.limit += self.limit if self._is_doubling else 1
        self._start_window(now)
