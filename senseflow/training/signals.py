# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Is the run going wrong: the bands in which the signals of a sound run stay, and what is said of one that leaves its own."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Optional

from accelerate.logging import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class Band:
    """Where a signal stays in a sound run; demo/README.md has the runs in which that was seen.

    Attributes:
        over: how many values are averaged to the one that is looked at.
        starts_outside: whether that of a sound run may start outside and come in.
        settles: whether it is looked at no more once it has been inside.
        below, above: what a value there means, and what to do about it; None where it means no harm.
    """

    low: float
    high: float
    window: int = 1
    starts_outside: bool = False
    settles: bool = False
    below: Optional[str] = None
    above: Optional[str] = None

    def outside(self, value: float) -> float:
        """How far outside; 0 inside, and on a side that means no harm."""
        if value < self.low:
            return self.low - value if self.below else 0.0
        return value - self.high if value > self.high and self.above else 0.0


RUNS_AWAY = (
    "the student runs away from its fake score: raise --ttur_ratio or --learning_rate_fake, or lower --learning_rate"
)
FAKE_SCORE_NOT_LEARNING = (
    "the fake score knows the student's images no better than the teacher: raise --learning_rate_fake or --ttur_ratio"
)
TOO_FAST = "steps too large to be undone: lower --learning_rate, and go back to an earlier checkpoint"
COLLAPSES = (
    "images of a prompt become alike: go back to an earlier checkpoint, lower --learning_rate or raise --isg_weight"
)
SCATTERS = "images of a prompt have less in common than the teacher's: stop, and lower --learning_rate"
OVERDRIVEN = "images are overdriven: lower --dmd_guidance_scale, --gan_weight or --learning_rate"
PALE = "images are pale: raise --dmd_guidance_scale, or train on while it rises"
BLURRED = (
    "images are blurred: raise --isg_weight or --gan_weight, or lower --learning_rate where they were sharp before"
)
NOISY = "images are noisy: lower --gan_weight or --learning_rate"

# None for signal/dmd_ratio: how far scores are apart depends on the guidance of L_DMD. Its course is what counts.
BANDS = {
    # Of each iteration, or student's turn. The fake score's loss over its mean, which swings by a few percent.
    "signal/fake_lag": Band(0, 1.25, window=50, above=RUNS_AWAY),
    # 1 is the teacher's; .8 to .9 where the fake score learns, and 1 again where the student has become what the teacher is.
    "signal/fake_error": Band(0, 0.985, window=50, settles=True, above=FAKE_SCORE_NOT_LEARNING),
    # A half percent of the weights in one step; large networks are trained with a hundredth of that.
    "signal/update_ratio": Band(0, 5e-3, window=10, above=TOO_FAST),
    # Of validation, as shares of the teacher's. Students of few steps are a little less diverse, pale and soft than teachers.
    "signal/diversity": Band(0.7, 1.4, starts_outside=True, below=COLLAPSES, above=SCATTERS),
    "signal/latent_diversity": Band(0.65, 1.4, starts_outside=True, below=COLLAPSES, above=SCATTERS),
    "signal/saturation": Band(0.75, 1.25, starts_outside=True, below=PALE, above=OVERDRIVEN),
    "signal/contrast": Band(0.75, 1.25, starts_outside=True, below=PALE, above=OVERDRIVEN),
    "signal/latent_contrast": Band(0.75, 1.3, starts_outside=True, below=PALE, above=OVERDRIVEN),
    "signal/sharpness": Band(0.5, 2, starts_outside=True, below=BLURRED, above=NOISY),
}


class SignalMonitor:
    """Takes the signals as they come, and says once of each, as a warning, that it has left its band: it is outside twice in a row,
    and where it may have started there, both times further out than it has been.

    Args:
        adapters: whether the student is adapters, half of which start at 0: updates are large beside them in a sound run, too.
    """

    def __init__(self, adapters: bool):
        self._bands = {name: band for name, band in BANDS.items() if not (adapters and name == "signal/update_ratio")}
        self._values: dict[str, list[float]] = defaultdict(list)
        self._nearest: dict[str, float] = {}
        self._outside: Counter[str] = Counter()
        self._done: set[str] = set()

    def look(self, iteration: int, numbers: dict[str, float]) -> None:
        """Signals of an iteration, by their names; other numbers are passed over."""
        for name in numbers.keys() & self._bands.keys() - self._done:
            band, values = self._bands[name], self._values[name]
            values.append(numbers[name])
            if len(values) < band.window:
                continue
            mean = sum(values) / len(values)
            values.clear()
            now = band.outside(mean)
            self._nearest[name] = nearest = min(now, self._nearest.get(name, now if band.starts_outside else 0.0))
            self._outside[name] = self._outside[name] + 1 if now > nearest else 0
            if now == 0 and band.settles:
                self._done.add(name)
            elif self._outside[name] == 2:
                self._done.add(name)
                fix = band.below if mean < band.low else band.above
                logger.warning(
                    f"iteration {iteration}: {name} is {mean:.3g}, outside {band.low:g} to {band.high:g}: {fix}"
                )
