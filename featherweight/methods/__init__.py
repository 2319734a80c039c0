"""How a stored weight is found: one frozen configuration per method, each solving one matrix at a time."""

from featherweight.methods.additive import Additive as Additive
from featherweight.methods.admm import Admm as Admm
from featherweight.methods.admm import Prune as Prune
from featherweight.methods.base import Method as Method
from featherweight.methods.base import Solution as Solution
from featherweight.methods.base import Status as Status
from featherweight.methods.books import Vectors as Vectors
from featherweight.methods.channels import Given as Given
from featherweight.methods.dictionary import DictionaryPairs as DictionaryPairs
from featherweight.methods.ecq import Ecq as Ecq
from featherweight.methods.ecq import EcqStep as EcqStep
from featherweight.methods.factoring import Factorize as Factorize
from featherweight.methods.factoring import Plain as Plain
from featherweight.methods.gptq import Gptq as Gptq
from featherweight.methods.grids import GridSpec as GridSpec
from featherweight.methods.obq import Obq as Obq
from featherweight.methods.patterns import NM as NM
from featherweight.methods.patterns import Blocks as Blocks
from featherweight.methods.patterns import Channels as Channels
from featherweight.methods.patterns import Pattern as Pattern
from featherweight.methods.patterns import Rows as Rows
from featherweight.methods.patterns import Unstructured as Unstructured
from featherweight.methods.pruning import Magnitude as Magnitude
from featherweight.methods.pruning import Obs as Obs
from featherweight.methods.pruning import PruneQuantize as PruneQuantize
from featherweight.methods.rtn import Rtn as Rtn
