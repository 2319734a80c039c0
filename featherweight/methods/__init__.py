"""How a stored weight is found: one frozen configuration per method, each solving one matrix at a time."""

from featherweight.methods.base import Method as Method
from featherweight.methods.base import Solution as Solution
from featherweight.methods.base import Status as Status
from featherweight.methods.gptq import Gptq as Gptq
from featherweight.methods.grids import GridSpec as GridSpec
from featherweight.methods.obq import Obq as Obq
from featherweight.methods.pruning import Magnitude as Magnitude
from featherweight.methods.pruning import Obs as Obs
from featherweight.methods.pruning import PruneQuantize as PruneQuantize
from featherweight.methods.rtn import Rtn as Rtn
