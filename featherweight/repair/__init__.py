"""Put right what compression moved, without training."""

from featherweight.repair.correct import Repair as Repair
from featherweight.repair.correct import repair as repair
