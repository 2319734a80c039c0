"""Networks whose factored weights run as chains of plain layers."""

from featherweight.chains.choose import ChainRow as ChainRow
from featherweight.chains.choose import Cost as Cost
from featherweight.chains.choose import chains_of as chains_of
from featherweight.chains.load import chained as chained
from featherweight.chains.load import load_chained as load_chained
