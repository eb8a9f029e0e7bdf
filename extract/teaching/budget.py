"""A budget that threads spend together, and that is never exceeded."""

import threading


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

    def settle(self, amount: float, cost: float) -> None:
        """Replace a reserve of `amount` by the `cost`."""
        with self._changed:
            self._open -= 1
            self._reserved = self._reserved - amount if self._open else 0.0
            self.spent += cost
            self._changed.notify_all()
