"""Entropy coding, slowly: how many bits a perfect coder would need, in float64, from the definition of the models in
docs/format.md. No bytes are made."""

from math import ceil, log2

CONTEXTS = 36
THRESHOLDS = [ceil(64 * (2 ** (k / 4) - 1)) for k in range(1, CONTEXTS)]


class Models:
    """Adaptive chances of a 1, in 65536ths, each with the number of bits that it has seen; `bits` is what all bits so
    far have cost."""

    def __init__(self, start=None):
        self.state, self.bits = dict(start or {}), 0.0

    def spend(self, name, bit):
        p, n = self.state.get(name, (32768, 2))
        self.bits -= log2(p / 65536 if bit else 1 - p / 65536)
        rate = 131072 // (2 * n + 3)
        p = min(p + (65536 - p) * rate // 65536, 65504) if bit else max(p - p * rate // 65536, 32)
        self.state[name] = p, min(n + 1, 255)

    def tree(self, name, value, width):
        """A number of some bits, from the highest, each by a model of those before it."""
        digits = f"{value:0{width}b}" if width else ""
        for i, digit in enumerate(digits):
            self.spend((name, digits[:i]), digit == "1")


def symbols(values, width):
    """Bits that symbols take."""
    models = Models()
    for value in values:
        models.tree("symbol", value, width)
    return models.bits


def floats(patterns, exponent, mantissa, beside):
    """Bits that floats take, given as whole numbers, `beside` bytes of each as they are, with the byte that says so."""
    models = Models()
    for pattern in patterns:
        digits = f"{pattern:0{1 + exponent + mantissa}b}"
        models.tree("sign", int(digits[0]), 1)
        models.tree("exponent", int(digits[1 : 1 + exponent], 2), exponent)
        models.tree(digits[1 : 1 + exponent], int(digits[1 + exponent : 4 + exponent], 2), 3)
        for i in range(4 + exponent, len(digits) - 8 * beside):
            models.spend(i, digits[i] == "1")
    return models.bits + 8 + 8 * beside * len(patterns)


def context(sizes, r, c):
    """Of an entry, from the magnitudes before it: a weighted mean, in 256ths, of the two to the left, the row so far
    and the column so far."""
    parts = []  # (weight in 256ths of a sixteenth, sum of as many magnitudes, how many)
    if c >= 1:
        parts += [(20, sizes[r][c - 1], 1), (2 * min(c, 16), sum(sizes[r][:c]), c)]
    if c >= 2:
        parts += [(10, sizes[r][c - 2], 1)]
    if r >= 1:
        parts += [(5 * min(r, 8), sum(sizes[i][c] for i in range(r)), r)]
    weight = sum(w for w, _, _ in parts)
    mean = 16 * sum(16 * w * total // count for w, total, count in parts) // weight if parts else 64
    return len([t for t in THRESHOLDS if t <= mean])


def chances(x):
    """(of more, of the second bit) at the beginning in a context, lists by class."""
    ends = [0, *THRESHOLDS, 2 * THRESHOLDS[-1]]
    mean = (ends[x] + ends[x + 1]) // 2
    more = [65536 * mean // (256 + mean)] * 2
    while len(more) < 8:
        more.append(more[-1] ** 2 // 65536)
    second = [65536 * m // (65536 + m) for m in more[:7]]
    return [min(max(m, 32), 65504) for m in more], [min(max(s, 32), 65504) for s in second]


def start():
    """Models of integers before the first one."""
    found = {}
    for x in range(CONTEXTS):
        more, second = chances(x)
        found |= {("more", x, k): (p, 4) for k, p in enumerate(more)}
        found |= {("second", x, k): (p, 4) for k, p in enumerate(second, 2)}
    return found


def integers(values, most, keep=None, signed=True):
    """The models behind the last entry of a matrix, given as lists."""
    models, widest = Models(start()), most.bit_length()
    sizes = [[0] * len(row) for row in values]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if keep is not None and not keep[r][c]:
                continue
            x, size = context(sizes, r, c), abs(value)
            width = size.bit_length()
            for k in range(min(width + 1, widest)):
                models.spend(("more", x, k), width > k)
            for i, digit in enumerate(f"{size:b}"[1:]):
                if i < 2:
                    models.spend(("second", x, width) if i == 0 else ("third", width, f"{size:b}"[1]), digit == "1")
                else:
                    models.bits += 1
            if size and signed:
                models.spend("sign", value < 0)
            sizes[r][c] = size
    return models


def costs(values, where, most):
    """A table: context, magnitude -> bits; a class is as likely as among the values in this context and 4 more that
    are distributed as they are expected to be; 1 bit for a sign and for every bit below the leading one."""
    widest, table = most.bit_length(), []
    for x in range(CONTEXTS):
        widths = [abs(v).bit_length() for v, own in zip(values, where, strict=True) if own == x]
        first, _ = chances(x)
        more = []
        for k in range(widest):
            reached = [w for w in widths if w >= k]
            more.append((4 * first[k] / 65536 + len([w for w in reached if w > k])) / (4 + len(reached)))
        row = []
        for size in range(most + 1):
            width = size.bit_length()
            bits = -sum(log2(p) for p in more[:width]) + width
            row.append(bits - log2(1 - more[width]) if width < widest else bits)
        table.append(row)
    return table
