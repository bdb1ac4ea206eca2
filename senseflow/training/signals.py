# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The bands in which the signals of a good run stay, and warnings about signals that leave theirs."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Optional

from accelerate.logging import get_logger


logger = get_logger(__name__)


@dataclass(frozen=True)
class Band:
    """The range of a signal in good runs; demo/README.md has the runs in which it was measured.

    Attributes:
        window: how many values are averaged before the mean is compared with the band.
        starts_outside: whether a good run may start outside and come in.
        settles: whether the signal is ignored once it has been inside.
        below, above: the problem and its fix on that side; None if it does no harm.
    """

    low: float
    high: float
    window: int = 1
    starts_outside: bool = False
    settles: bool = False
    below: Optional[str] = None
    above: Optional[str] = None

    def distance(self, value: float) -> float:
        """Distance from the band; 0 inside, and on a side that does no harm."""
        if value < self.low:
            return self.low - value if self.below else 0.0
        return value - self.high if value > self.high and self.above else 0.0


RUNS_AWAY = (
    "the student runs away from its fake score: raise --ttur_ratio or --learning_rate_fake, or lower --learning_rate"
)
FAKE_SCORE_NOT_LEARNING = (
    "the fake score fits the student's images no better than the teacher: raise --learning_rate_fake or --ttur_ratio"
)
TOO_FAST = "steps too large to be undone: lower --learning_rate, and go back to an earlier checkpoint"
COLLAPSES = (
    "images of a prompt become alike: go back to an earlier checkpoint, lower --learning_rate or raise --isg_weight"
)
SCATTERS = "images of a prompt have less in common than the teacher's: stop, and lower --learning_rate"
OVERDRIVEN = "images are overdriven: lower --dmd_guidance_scale, --gan_weight or --learning_rate"
PALE = "images are pale: raise --dmd_guidance_scale, or train on while it rises"
BLURRED = "images are blurred: raise --isg_weight or --gan_weight; if they were sharp before, lower --learning_rate"
NOISY = "images are noisy: lower --gan_weight or --learning_rate"

# signal/dmd_ratio has no band: the distance of the scores depends on the guidance of L_DMD, so only its course counts.
BANDS = {
    # Of every iteration or student update. The fake score's loss over its mean varies by a few percent.
    "signal/fake_lag": Band(0, 1.25, window=50, above=RUNS_AWAY),
    # 1 is the teacher's error; .8 to .9 if the fake score learns, and 1 again once the student matches the teacher.
    "signal/fake_error": Band(0, 0.985, window=50, settles=True, above=FAKE_SCORE_NOT_LEARNING),
    # Half a percent of the weights in one step; large networks are trained with a hundredth of that.
    "signal/update_ratio": Band(0, 5e-3, window=10, above=TOO_FAST),
    # Of validation, relative to the teacher's. Few-step students are a little less diverse, paler and softer.
    "signal/diversity": Band(0.7, 1.4, starts_outside=True, below=COLLAPSES, above=SCATTERS),
    "signal/latent_diversity": Band(0.65, 1.4, starts_outside=True, below=COLLAPSES, above=SCATTERS),
    "signal/saturation": Band(0.75, 1.25, starts_outside=True, below=PALE, above=OVERDRIVEN),
    "signal/contrast": Band(0.75, 1.25, starts_outside=True, below=PALE, above=OVERDRIVEN),
    "signal/latent_contrast": Band(0.75, 1.3, starts_outside=True, below=PALE, above=OVERDRIVEN),
    "signal/sharpness": Band(0.5, 2, starts_outside=True, below=BLURRED, above=NOISY),
}


class SignalMonitor:
    """Warn once of each signal that leaves its band.

    A signal has left if two means in a row are outside; if it may start outside, both must be farther out than any
    mean before them.

    Args:
        adapters: whether the student is adapters. Half of an adapter starts at 0, so updates are relatively large.
    """

    def __init__(self, adapters: bool):
        self._bands = {name: band for name, band in BANDS.items() if not (adapters and name == "signal/update_ratio")}
        self._values: dict[str, list[float]] = defaultdict(list)
        self._nearest: dict[str, float] = {}
        self._times_outside: Counter[str] = Counter()

    def update(self, iteration: int, values: dict[str, float]) -> None:
        """Take the values of an iteration by name; those without a band are ignored."""
        for name in values.keys() & self._bands.keys():
            band, window = self._bands[name], self._values[name]
            window.append(values[name])
            if len(window) < band.window:
                continue
            mean = sum(window) / len(window)
            window.clear()
            distance = band.distance(mean)
            nearest = min(distance, self._nearest.get(name, distance if band.starts_outside else 0.0))
            self._nearest[name] = nearest
            self._times_outside[name] = self._times_outside[name] + 1 if distance > nearest else 0
            if self._times_outside[name] == 2:
                fix = band.below if mean < band.low else band.above
                logger.warning(
                    f"iteration {iteration}: {name} is {mean:.3g}, outside {band.low:g} to {band.high:g}: {fix}"
                )
            if self._times_outside[name] == 2 or (distance == 0 and band.settles):
                del self._bands[name]
