# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Is the run going wrong: the bands in which the signals of a sound run stay, and what is said of one that leaves its own."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Optional

from accelerate.logging import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class Band:
    """Where a signal stays; benchmarks and demo/README.md say in which runs that was seen.

    Attributes:
        over: how many values in a row are averaged to one that is looked at.
        below, above: what a value there means, and what to do; None where it means no harm.
    """

    low: float
    high: float
    over: int
    below: Optional[str]
    above: Optional[str]

    def distance(self, value: float) -> float:
        """How far outside; 0 inside, and on a side that means no harm."""
        if value < self.low:
            return self.low - value if self.below else 0.0
        return value - self.high if value > self.high and self.above else 0.0


LEAVES = "the student leaves its teacher: lower --learning_rate, or raise --ttur_ratio"
BANDS = {
}


class Watch:
    """Takes the signals as they come, and says once of each, as a warning, that it is outside its band and does not come back.

    That is: twice in a row, and the second time no nearer. A student starts outside of some, blurred and grey, and comes in.
    """

    def __init__(self):
        self._values: dict[str, list[float]] = defaultdict(list)
        self._outside: dict[str, float] = {}
        self.said: set[str] = set()

    def look(self, iteration: int, numbers: dict[str, float]) -> None:
        """Signals of an iteration, by their names; other numbers are passed over."""
        for name in numbers.keys() & BANDS.keys() - self.said:
            band, values = BANDS[name], self._values[name]
            values.append(numbers[name])
            if len(values) < band.over:
                continue
            mean = sum(values) / len(values)
            values.clear()
            before, distance = self._outside.get(name, 0.0), band.distance(mean)
            self._outside[name] = distance
            if 0 < before <= distance:
                self.said.add(name)
                fix = band.below if mean < band.low else band.above
                logger.warning(f"iteration {iteration}: {name} is {mean:.3g}, outside {band.low:g} to {band.high:g}: {fix}")
