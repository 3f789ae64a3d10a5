"""How much one server can take, and whether it is there: learnt from how its calls end. Nothing here calls it.

Concurrency moves as TCP's window does: from a first guess it doubles while replies keep their pace, then grows by one a
window, and halves when the server says "too much" or falls silent. A server that fails several times in a row is shut:
it gets no calls, until one is let through to see whether it is back.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import random
from typing import Literal

FIRST_LIMIT = 16.0
SLOWEST = 2.0  # times the best pace: beyond, more calls at once would only wait for each other
FORGET = 1.02  # a window: what was the best pace once may not be for what is asked now
SHUT_AFTER = 5  # failures in a row
FIRST_SHUT_SECONDS, LONGEST_SHUT_SECONDS = 1.0, 30.0

Failure = Literal["busy", "silence", "fault"]  # it asked for fewer calls, or did not answer in time, or anything else

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Ticket:
    """The right to one call, to be given back by `succeeded`, `failed` or `left`."""

    begun: float
    is_probe: bool


class Endpoint:
    """Times are the event loop's, in seconds. Ready: calls may go there. Due: it was shut, and one call may try it."""

    def __init__(self, name: str, rng: random.Random):
        self.name, self._rng = name, rng
        self.limit = FIRST_LIMIT
        self.in_flight = 0
        self._line: collections.deque[asyncio.Future[None]] = collections.deque()
        self._failures = 0  # in a row
        self._is_probed = False
        self._shut_until = self._shut_at = self._paused_until = self._halved_at = 0.0
        self._is_doubling, self._best_pace = True, float("inf")
        self._start_window(0.0)

    def is_ready(self, now: float) -> bool:
        return self._failures < SHUT_AFTER and now >= self._paused_until

    def is_due(self, now: float) -> bool:
        return self._failures >= SHUT_AFTER and now >= self.opens_at and not self._is_probed

    @property
    def is_probed(self) -> bool:
        return self._is_probed

    @property
    def opens_at(self) -> float:
        return max(self._paused_until, self._shut_until)

    @property
    def load(self) -> tuple[bool, float]:
        """Lower is better for one more call: first who has room, by what is done there; then the shortest line."""
        calls = self.in_flight + len(self._line)
        return (False, calls) if calls < int(self.limit) else (True, calls / self.limit)

    def has_room(self, now: float, called: bool) -> bool:
        """Whether a call may begin; `called`: it comes from the head of the line, nobody else overtakes those in it."""
        if self.is_due(now):
            return True
        return self.is_ready(now) and self.in_flight < int(self.limit) and (called or not self._line)

    def begin(self, now: float) -> Ticket:
        is_probe = self._failures >= SHUT_AFTER
        self._is_probed |= is_probe
        self.in_flight += 1
        self._was_full |= self.in_flight >= int(self.limit)
        return Ticket(now, is_probe)

    async def wait(self) -> None:
        """Until there may be room, or it is shut."""
        turn = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._line.remove(turn)
            else:
                self._call(1)  # it had its turn already: the next one's
            raise

    def succeeded(self, ticket: Ticket, now: float, tokens: int) -> None:
        """`tokens` were written for the call; 0 says nothing about the pace."""
        if self._failures >= SHUT_AFTER:
            log.warning("%s answers again", self.name)
        self._failures = 0
        if tokens and ticket.begun >= self._window_start:
            self._window_seconds += now - ticket.begun
            self._window_tokens += tokens
            self._window_calls += 1
            if self._window_calls >= self.limit:
                self._end_window(now)
        self.left(ticket)

    def failed(self, ticket: Ticket, now: float, how: Failure, retry_after: float = 0.0) -> None:
        """What began before the last change is no news: it cannot have known better."""
        self._paused_until = max(self._paused_until, now + retry_after)
        is_news = ticket.begun >= self._halved_at
        if how != "fault" and is_news:
            self.limit = max(1.0, self.limit / 2)
            self._halved_at, self._is_doubling = now, False
            self._start_window(now)
        if ticket.begun >= self._shut_at and (how != "busy" or is_news):
            self._failures += 1
            if self._failures >= SHUT_AFTER:
                self.shut(now)
        if not self.is_ready(now):
            self._call(len(self._line))  # to look for another
        self.left(ticket)

    def left(self, ticket: Ticket) -> None:
        """The call ended in a way that says nothing about the server."""
        self.in_flight -= 1
        self._is_probed &= not ticket.is_probe
        self._call(int(self.limit) - self.in_flight)

    def shut(self, now: float) -> None:
        self._failures = max(self._failures, SHUT_AFTER)
        seconds = min(FIRST_SHUT_SECONDS * 2.0 ** (self._failures - SHUT_AFTER), LONGEST_SHUT_SECONDS)
        seconds *= self._rng.uniform(0.5, 1.0)
        log.warning("%s failed %d times in a row, trying it again in %.1f s", self.name, self._failures, seconds)
        self._shut_at, self._shut_until = now, now + seconds
        # It may come back as another machine.
        self.limit, self._is_doubling, self._best_pace = min(self.limit, FIRST_LIMIT), True, float("inf")
        self._start_window(now)

    def _call(self, count: int) -> None:
        while count > 0 and self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(None)
                count -= 1

    def _start_window(self, now: float) -> None:
        self._window_start = now
        self._window_seconds, self._window_tokens, self._window_calls = 0.0, 0, 0
        self._was_full = False

    def _end_window(self, now: float) -> None:
        """As many replies as calls fit in, to calls that began under this limit: time for one decision."""
        pace = self._window_seconds / self._window_tokens
        self._best_pace = min(pace, self._best_pace * FORGET)
        if pace > SLOWEST * self._best_pace:
            self._is_doubling = False
        elif self._was_full:  # else nobody knows how it would do with more
            self.limit += self.limit if self._is_doubling else 1
        self._start_window(now)
