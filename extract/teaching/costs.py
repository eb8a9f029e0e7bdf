"""What requests cost, and a budget that threads spend together and never exceed."""

import threading

from agiqa.extract.teaching.chats import Fault, Reply
from agiqa.extract.teaching.wording_and_prices import Price

CAUTION = 1.5
"""Factor on an estimate of tokens, for the share of the budget that is set aside."""


class Budget:
    """Money that threads spend together. A request reserves the most that it can cost before it is sent."""

    def __init__(self, most: float | None, spent: float) -> None:
        """`most` USD in all, of which `spent` are gone; None is no limit."""
        self._most = most
        self._reserved, self._open = 0.0, 0
        self._changed = threading.Condition()
        self.spent = spent
        """USD, with the reserves of requests whose cost nobody told."""

    def reserve(self, amount: float) -> bool:
        """Set `amount` aside, after waiting for requests that may cost less than they reserved.

        False, without setting anything aside, if too little is left.
        """
        with self._changed:
            while self._most is not None and self.spent + self._reserved + amount > self._most:
                if not self._open:
                    return False
                self._changed.wait()
            self._reserved, self._open = self._reserved + amount, self._open + 1
            return True

    def reserve_more(self, amount: float) -> bool:
        """Add `amount` to a reserve, without waiting. False, without adding anything, if too little is left."""
        with self._changed:
            fits = self._most is None or self.spent + self._reserved + amount <= self._most
            self._reserved += amount if fits else 0.0
            return fits

    def settle(self, amount: float, cost: float) -> None:
        """Replace a reserve of `amount` by the `cost`."""
        with self._changed:
            self._open -= 1
            self._reserved = self._reserved - amount if self._open else 0.0
            self.spent += cost
            self._changed.notify_all()


def most_cost(price: Price | None, expected: int, max_tokens: int) -> float | None:
    """The most USD that a request of `expected` tokens can cost; None without a price."""
    return None if price is None else price.cost(CAUTION * expected, max_tokens)


def cost_of(price: Price | None, reply: Reply | Fault, *, lost: int = 0) -> float | None:
    """USD of a reply by the tokens that the server counted; an error costs nothing. None if unknown."""
    if price is None:
        return None
    if isinstance(reply, Fault):
        return None if lost else 0.0
    if reply.input_tokens is None or (reply.output_tokens is None and reply.refusal is None):
        return None
    return price.cost(reply.input_tokens, reply.output_tokens or 0)
