"""featherweight: make a trained PyTorch network small, and prove that it still works."""

__version__ = "0.1.0"

from featherweight.artifact import load as load
from featherweight.errors import FeatherweightError as FeatherweightError
from featherweight.errors import FormatError as FormatError
from featherweight.errors import InfeasibleError as InfeasibleError
from featherweight.errors import SolveError as SolveError
from featherweight.errors import UsageError as UsageError
from featherweight.layers import scan as scan
from featherweight.methods import Gptq as Gptq
from featherweight.methods import GridSpec as GridSpec
from featherweight.methods import Magnitude as Magnitude
from featherweight.methods import Obq as Obq
from featherweight.methods import Obs as Obs
from featherweight.methods import PruneQuantize as PruneQuantize
from featherweight.methods import Rtn as Rtn
from featherweight.pipeline import Compressed as Compressed
from featherweight.pipeline import compress as compress
from featherweight.pipeline import plan as plan
from featherweight.recipe import Override as Override
from featherweight.recipe import Recipe as Recipe
from featherweight.recipe import read_recipe as read_recipe
from featherweight.report import Report as Report
from featherweight.stats import capture as capture
