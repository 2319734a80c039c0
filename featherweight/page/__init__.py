"""One page about one file, for people: what was asked, what came of it, and how to get it again."""

from featherweight.page.facts import Facts, collect
from featherweight.page.given import Bench, Front, Given, Run
from featherweight.page.measure import Measured, measure
from featherweight.page.render import html, markdown

__all__ = ["Bench", "Facts", "Front", "Given", "Measured", "Run", "collect", "html", "markdown", "measure"]
