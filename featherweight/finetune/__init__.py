"""Training what is continuous in a compressed network."""

from featherweight.finetune.loop import rehearse as rehearse
from featherweight.finetune.loop import train as train
from featherweight.finetune.settings import Finetune as Finetune
from featherweight.finetune.settings import Trained as Trained
from featherweight.finetune.stored import Tuned as Tuned
from featherweight.finetune.stored import finetune as finetune
