"""Training a dense network until its weights have a form (ADMM), so that little is lost when they are given it."""

from featherweight.pull.loop import admm as admm
from featherweight.pull.pull import Pull as Pull
from featherweight.pull.pull import Residual as Residual
from featherweight.pull.settings import AdmmTraining as AdmmTraining
from featherweight.pull.settings import Pulled as Pulled
