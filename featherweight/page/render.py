"""Facts -> a page of HTML, or a section of Markdown. Every text of a file is shown as text, whatever is in it."""

import base64
import hashlib
import importlib.util
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

from featherweight.errors import UsageError
from featherweight.page.chart import chart_of
from featherweight.page.facts import Facts

MINUS = "\N{MINUS SIGN}"
MOST = 40  # weights in the picture; all are in the table below it
TEMPLATES = Path(__file__).with_name("templates")
HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # control, direction and other characters that do not show


def html(facts: Facts) -> str:
    """One page that needs nothing else: no script, no request. The same facts give the same characters.

    Raises:
        UsageError: jinja2 is not installed.
    """
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    shown = _largest(facts)
    return (
        _environment(True)
        .get_template("report.html.j2")
        .render(
            facts=facts,
            chart=chart_of(facts),
            style=_markup(style),
            style_hash=allowed,
            picture=shown,
            top=max((x.dense_bytes for x in shown), default=1),
            most_bits=max((x.row.bits for x in shown), default=1) or 1,
            most_error=max((x.row.error or 0 for x in shown), default=0) or 1,
            largest=max(s.bytes for s in facts.sizes),
        )
    )


def markdown(facts: Facts) -> str:
    """A section for a model card.

    Raises:
        UsageError: jinja2 is not installed.
    """
    return _environment(False).get_template("report.md.j2").render(facts=facts)


def visible(text: Any) -> str:
    """With characters that do not show, or turn the direction of text, written as escapes.

    >>> visible("a\\u202eb")
    'a\\\\u202eb'
    """
    return "".join(f"\\u{ord(c):04x}" if unicodedata.category(c) in HIDDEN else c for c in str(text))


def code(text: Any) -> str:
    """A text as code in a table of Markdown, whatever it holds.

    >>> code("a|b`c")
    '``a\\\\|b`c``'
    """
    plain = visible(text).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", plain)), default=0))
    edge = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{edge}{plain}{edge}{fence}"


def quoted(text: Any) -> str:
    """As a string of Python."""
    return json.dumps(visible(text), ensure_ascii=False)


def words(text: Any) -> str:
    """A text in running Markdown, without any mark-up or link of its own.

    >>> words("<b> [x](y)")
    '\\\\<b\\\\> \\\\[x\\\\]\\\\(y\\\\)'
    """
    return re.sub(r"([\\`*_{}\[\]()<>#|!&~])", r"\\\1", visible(text))


def change(after: float, before: float) -> str:
    """A difference with its sign, minus as a minus sign.

    >>> change(91.24, 91.73), change(2.0, 2.0)
    ('\u22120.49', '±0.00')
    """
    text, sign = f"{abs(after - before):.2f}", "+" if after > before else MINUS
    return f"±{text}" if float(text) == 0 else f"{sign}{text}"


def count(value: float) -> str:
    """A large number in three digits.

    >>> count(40_560_000), count(999)
    ('40.6 M', '999')
    """
    for power, unit in ((9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes in three digits.

    >>> size(279), size(69_496)
    ('279 B', '69.5 kB')
    """
    text = count(value)
    return f"{text}B" if value >= 1000 else f"{text} B"


def ms(value: float) -> str:
    """A time in three digits.

    >>> ms(1.23456), ms(1234.5), ms(0.0306)
    ('1.23 ms', '1.23 s', '30.6 us')
    """
    if value < 0.1:
        return f"{1000 * value:.3g} us"
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def plural(number: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "thread"), plural(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def percent(share: float) -> str:
    """Two digits, of what is not too small for them.

    >>> percent(0.0125), percent(3e-8)
    ('1.2 %', '< 0.001 %')
    """
    return "< 0.001 %" if 0 < share < 1e-5 else f"{100 * share:.2g} %"


def _largest(facts: Facts) -> list[Any]:
    """The weights with the most bytes in fp32, in the order of the file."""
    order = sorted(range(len(facts.layers)), key=lambda i: (-facts.layers[i].dense_bytes, i))[:MOST]
    return [facts.layers[i] for i in sorted(order)]


def check_installed() -> None:
    """Refuse a report before anything is measured for it.

    Raises:
        UsageError: jinja2 is not installed.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise UsageError("a report needs jinja2: pip install jinja2")


def _environment(escaping: bool) -> Any:
    check_installed()
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=escaping,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = visible, code, words, quoted, count, size, percent, ms, plural, sentence
    made.filters |= {f.__name__: f for f in filters}
    made.globals |= {"change": change}
    return made


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # our own style sheet
