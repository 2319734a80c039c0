"""Entropy coding: integers, symbols and floats as few bytes, and back, to the same bits on every machine.

One binary range coder and adaptive models of whole numbers only; docs/format.md, "Coded fields", is their definition.
"""

from featherweight.coding.floats import decode_floats as decode_floats
from featherweight.coding.floats import encode_floats as encode_floats
from featherweight.coding.integers import MOST as MOST
from featherweight.coding.integers import contexts as contexts
from featherweight.coding.integers import costs as costs
from featherweight.coding.integers import decode_integers as decode_integers
from featherweight.coding.integers import encode_integers as encode_integers
from featherweight.coding.symbols import decode_symbols as decode_symbols
from featherweight.coding.symbols import encode_symbols as encode_symbols
