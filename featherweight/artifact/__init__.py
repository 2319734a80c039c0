"""The `.fw` file: a safetensors file with one JSON metadata entry. docs/format.md is normative."""

from featherweight.artifact.load import fill as fill
from featherweight.artifact.load import load as load
from featherweight.artifact.read import read as read
from featherweight.artifact.schema import Artifact as Artifact
from featherweight.artifact.schema import FoldedNorm as FoldedNorm
from featherweight.artifact.schema import StoredUnit as StoredUnit
from featherweight.artifact.write import write as write
