"""`featherweight report`: what the page says, and that nothing in a file can say more than text."""

import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import featherweight as fw
from featherweight.artifact import Artifact, StoredUnit, read, write
from featherweight.artifact.write import to_bytes
from featherweight.cli import main
from featherweight.commands.compressing import compress_command
from featherweight.counting import counted, single
from featherweight.data import batches
from featherweight.errors import UsageError
from featherweight.layers import View, scan
from featherweight.lossless import pack
from featherweight.metrics import accuracy
from featherweight.options import changed, named, told
from featherweight.page import Given, collect, html, markdown
from featherweight.page.chart import chart_of
from featherweight.page.facts import Size, commands
from featherweight.page.given import Front, Run, shaped
from featherweight.page.measure import plain_sizes, stored_in
from featherweight.page.render import MOST, TEMPLATES
from featherweight.target import baselines
from featherweight.weights import Dense
from tests.nets import images, test_images, tiny, words
from tests.test_cli import DATA, MAKE, NETS, TEST

HOSTILE = "</code><script>alert(1)</script>\"'><img src=x onerror=alert(2)>|`\u202e{{ 7 * 7 }}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with small.fw, run.json and front.json of one run."""
    folder = tmp_path_factory.mktemp("report")
    options = f"--data {DATA} --test {TEST} --target 2.5x --measurements 2 --exclude fc.*".split()
    with pytest.MonkeyPatch.context() as patch, (folder / "run.json").open("w") as printed:
        patch.setattr(sys, "stdout", printed)
        place = ["-o", str(folder / "small.fw"), "--front", str(folder / "front.json")]
        assert main(["compress", MAKE, *options, *place, "--json"]) == 0
    return folder


def page(made, run, *options: object) -> str:
    code, out, err = run("report", made / "small.fw", "-o", made / "page.html", *options)
    assert code == 0, err
    assert "page.html" in out
    return (made / "page.html").read_text(encoding="utf-8")


class Seen(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


def test_a_file_alone_gives_a_page(made, run):
    text, artifact = page(made, run), read(made / "small.fw")
    seen = Seen(text)
    for words_ in (
        f"{(made / 'small.fw').stat().st_size:,}",
        artifact.digest(),
        "conv1.weight",
        "excluded by the recipe",
        "a vector: bias, norm or scale",
        "featherweight compress nets.py:tiny --data nets.py:images --target 2.5x --exclude 'fc.*'",
        f"torch {torch.__version__.partition('+')[0]}",
        "not measured",
        "--bench bench.json",
        "--front front.json",
    ):
        assert words_ in seen.text, words_
    assert str(made) not in text  # a page is sent to others
    assert NETS not in text


def test_everything_is_measured_when_asked(made, run):
    text = Seen(page(made, run, "--model", MAKE, "--test", TEST)).text
    data = batches(test_images())
    half = accuracy(tiny().half().float(), data)["top1"]
    assert re.search(rf"half \S+ 2\.0\S {half:.2f} ", text)
    assert re.search(r"fp32 \S+ 1\.0\S 100\.00 100\.00 ", text)
    after = accuracy(fw.load(made / "small.fw", into=tiny()), data)
    assert f"this file {(made / 'small.fw').stat().st_size:,}" in text
    assert re.search(rf"this file \S+ \S+ {after['top1']:.2f} {after['top5']:.2f} ", text)
    assert "Measured now, the file in a fresh process." in text
    macs = sum(counted(tiny(), single(data[0])).values())
    assert f"Multiply-adds {macs / 1000:.3g} k as many as before" in text


def test_int4_is_rounding_with_a_scale_a_row():
    """Not worse than rounding that is written out, with the largest weight at the end of the grid."""
    artifact = fw.compress(tiny(), images(), method=fw.Gptq(fw.GridSpec(4))).artifact
    rounded, ours, plain = stored_in(4)(tiny(), artifact), 0.0, 0.0
    for unit in scan(tiny()).units:
        w = unit.view.matrix(tiny().get_parameter(unit.name).detach()).double()
        v = unit.view.matrix(rounded.get_parameter(unit.name).detach()).double()
        assert all(len(row.unique()) <= 16 for row in v)
        scale = w.abs().amax(1, keepdim=True) / 7
        ours += float((w - v).square().sum())
        plain += float((w - torch.round(w / scale) * scale).square().sum())
    assert 0.5 * plain < ours < plain


@pytest.mark.parametrize("make", [tiny, words])
def test_plain_sizes_are_those_of_the_network(make):
    net = make()
    artifact = fw.compress(net, method=fw.Rtn(fw.GridSpec(8))).artifact
    units, plain = scan(net).units, plain_sizes(artifact)
    assert plain.baselines == baselines(net, units)
    excluded = fw.compress(net, recipe=fw.Recipe(fw.Rtn(fw.GridSpec(8)), exclude=(units[-1].name,))).artifact
    assert plain_sizes(excluded) == plain
    weights = sum(u.params for u in units)
    assert plain.int4 == plain.baselines.int8 - weights + (weights + 1) // 2


def test_results_of_the_run_are_shown(made, run):
    text = Seen(page(made, run, "--run", made / "run.json", "--front", made / "front.json")).text
    said = json.loads((made / "run.json").read_text())
    assert f"{said['allocation']['limits']['bytes']:,} {said['file_bytes']:,}" in text
    assert "top1 over bytes" in text
    assert "other sizes that the search measured" in text
    assert f"; the dense network has {said['before']['top1']:.2f}." in text
    assert "solve" in text
    own = [("dense fp32", 2.5, 1.0), ("ours", 1.25, 2.0), ("quantize_static", 1.5, None)]
    times = [
        {"runtime": "onnxruntime", "what": w, "batch": b, "ms": b * ms, "lowest": ms, "highest": 9, "faster": f}
        for b in (32, 1)
        for w, ms, f in own
    ]
    bench = {
        "bytes": said["file_bytes"],
        "threads": 2,
        "times": times,
        "verdict": ["it is faster"],
        "left": {"x": "why"},
    }
    (made / "bench.json").write_text(json.dumps(bench))
    text = Seen(page(made, run, "--bench", made / "bench.json")).text
    assert "Speed 1.25 ms dense 2.5 ms, batch 1" in text
    assert "It is faster." in text
    assert "this file onnxruntime 32 40 1.25 to 9 2.00" in text
    assert "quantize_static onnxruntime 1 1.5 1.5 to 9" in text
    assert "Not timed: x: why" in text
    (made / "bench.json").write_text(json.dumps(bench | {"bytes": 7}))
    code, _, err = run("report", made / "small.fw", "--bench", made / "bench.json", "-o", made / "never.html")
    assert code == 2
    assert "about another file, of 7 bytes" in " ".join(err.split())


def test_the_same_file_gives_the_same_page(made, run):
    assert page(made, run) == page(made, run)
    assert not re.search(r"20\d\d-\d\d", Seen(page(made, run)).text)  # no date


def test_a_page_loads_nothing(made, run):
    text = page(made, run, "--run", made / "run.json", "--front", made / "front.json")
    seen = Seen(text)
    assert not re.search(r"(?i)https?:|//[a-z]|url\(|@import", text)
    assert not {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in seen.tags}
    assert not any("style" in attrs or any(a.startswith("on") for a in attrs) for _, attrs in seen.tags)
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_a_page_can_be_read_aloud(made, run):
    seen = Seen(page(made, run, "--run", made / "run.json", "--front", made / "front.json"))
    assert all("scope" in attrs for tag, attrs in seen.tags if tag == "th")
    pictures = [attrs for tag, attrs in seen.tags if tag == "svg" and attrs.get("class") != "inside"]
    assert all("aria-hidden" in a or a.get("aria-label") for a in pictures)
    assert [t for t, _ in seen.tags].count("h1") == 1
    ids = [a["id"] for _, a in seen.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {a["aria-labelledby"] for _, a in seen.tags if "aria-labelledby" in a} <= set(ids)
    assert dict(seen.tags)["html"]["lang"] == "en"


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme):
    """WCAG 2.2: 4.5 for text, 3 for what is drawn."""
    style = (TEMPLATES / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): #(\w{6});", blocks[scheme]))

    def light(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    def contrast(a: str, b: str) -> float:
        return max(light(a), light(b)) / min(light(a), light(b))

    for name in ("ink", "soft", "accent"):
        assert contrast(name, "paper") >= 4.5, name
    assert contrast("ink", "wash") >= 4.5
    for name in ("accent", "mid"):
        assert contrast(name, "paper") >= 3, name
    assert contrast("accent", "track") >= 3  # a bar on its track


# ---------------------------------------------------------------- what a file may say
def hostile() -> Artifact:
    unit = StoredUnit((HOSTILE,), View((2, 3)), Dense(torch.ones(2, 3)), HOSTILE, -3.0, HOSTILE)
    about = {
        "model": HOSTILE,
        "tool": HOSTILE,
        "torch": [1],
        "settings": {HOSTILE: f"{HOSTILE}\n{HOSTILE}", "a": {"b": 1}, "c": None},
    }
    about |= {"left_alone": {HOSTILE: [f"{HOSTILE}2", 3], "x": 5}, "finetuned": [1, {"epochs": 3}]}
    return Artifact((unit,), {f"{HOSTILE}2": torch.ones(2, 2), "plain": torch.ones(2, 2)}, (), about)


def test_hostile_names_stay_text(tmp_path, run):
    write(hostile(), tmp_path / "small.fw")
    seen = Seen(page(tmp_path, run))
    assert not {"script", "img"} & {tag for tag, _ in seen.tags}
    assert not any(a.startswith("on") for _, attrs in seen.tags for a in attrs)
    assert "<script>alert(1)</script>" in seen.text
    assert "{{ 7 * 7 }}" in seen.text
    assert "\u202e" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert r"\u202e" in seen.text
    assert all(0 <= float(a["width"].rstrip("%")) <= 100 for t, a in seen.tags if t == "rect" and a["width"])


def test_hostile_names_stay_in_their_cell_of_markdown(tmp_path, run):
    write(hostile(), tmp_path / "small.fw")
    assert run("report", tmp_path / "small.fw", "--markdown", "-o", tmp_path / "card.md")[0] == 0
    text = (tmp_path / "card.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if "alert" in line and line.startswith("| ")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert not re.search(r"(?<!\\)[<`\[]", row)


KEYS = ["digest", "file_bytes", "repair", "seconds", "before", "after", "points", "chosen", "dense", "bytes"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_whatever_json_is_given_is_refused_in_one_line(value):
    for kind in (Run, Front):
        with pytest.raises(UsageError) as error:
            shaped(kind, value, "it")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_a_run_comes_back_whole(made):
    said = json.loads((made / "run.json").read_text())
    run = shaped(Run, said, "run")
    assert asdict(run)["allocation"]["limits"] == said["allocation"]["limits"]
    assert len(run.allocation.front) == len(said["allocation"]["front"])
    assert run.repair.sites == said["repair"]["sites"]


WRONG = {
    "give both": ["--model", MAKE],
    "give --model and --test": ["--weights", "w.safetensors"],
    "--metric needs": ["--metric", f"{NETS}:mean_output"],
    "cannot read nowhere.json": ["--run", "nowhere.json"],
    "is no JSON": ["--run", "text.json"],
    "run must be an object with 'digest'": ["--run", "empty.json"],
    "front must be an object with 'dense'": ["--front", "empty.json"],
    "bench must be an object with 'bytes'": ["--bench", "empty.json"],
    "is about another file": ["--run", "other.json"],
    "has no function": ["--model", f"{NETS}:nothing", "--test", TEST],
    "does not fit": ["--model", f"{NETS}:words", "--test", TEST],
    "the file with the weights": ["-o", "small.fw"],
    "does not exist": ["-o", "nowhere/page.html"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_in_one_line(made, run, tmp_path, monkeypatch, message):
    (tmp_path / "small.fw").write_bytes((made / "small.fw").read_bytes())
    said = json.loads((made / "run.json").read_text())
    (tmp_path / "text.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "other.json").write_text(json.dumps(said | {"digest": "0" * 32}))
    monkeypatch.chdir(tmp_path)
    code, _, err = run("report", "small.fw", *WRONG[message])
    assert code == 2
    assert message in " ".join(err.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.json", "other.json", "small.fw", "text.json"]
    assert read(tmp_path / "small.fw")


def test_damaged_files_are_refused(tmp_path, run):
    (tmp_path / "small.fw").write_bytes(b"nothing")
    code, _, err = run("report", tmp_path / "small.fw", "-o", tmp_path / "page.html")
    assert code == 1
    assert "not a featherweight file" in err
    assert not (tmp_path / "page.html").exists()


def test_without_jinja_the_install_line_is_printed_before_anything_is_measured(made, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    measured = []
    monkeypatch.setattr("featherweight.commands.reporting.measure", lambda *given: measured.append(given))
    measuring = "--model", f"{NETS}:tiny", "--test", TEST
    code, _, err = run("report", made / "small.fw", "-o", made / "never.html", *measuring)
    assert code == 2
    assert "pip install jinja2" in err
    assert not measured
    assert not (made / "never.html").exists()


# ---------------------------------------------------------------- other files
def test_large_networks_stay_readable():
    units = tuple(
        StoredUnit((f"layer{i}.weight",), View((i + 1, 4)), Dense(torch.ones(i + 1, 4).half()), f"method {i % 3}")
        for i in range(300)
    )
    artifact = Artifact(units, {}, ())
    seen = Seen(html(collect("small.fw", artifact, to_bytes(artifact), Given(), None)))
    assert [a.get("data-label") for t, a in seen.tags if t == "td"].count("bits") == MOST
    assert f"The {MOST} largest of 300 weights" in seen.text
    assert all(f"layer{i}.weight" in seen.text for i in range(300))


@pytest.mark.parametrize("artifact", [Artifact((), {}, ()), Artifact((), {"n": torch.tensor(3)}, ())])
def test_files_with_nearly_nothing(artifact):
    facts = collect("small.fw", artifact, to_bytes(artifact), Given(), None)
    Seen(html(facts))
    assert "small.fw" in markdown(facts)


def test_packed_checkpoints_say_what_they_are(tmp_path, run):
    write(pack(tiny().state_dict()), tmp_path / "small.fw")
    text = Seen(page(tmp_path, run)).text
    assert "packed without loss" in text
    assert "int8" not in text


def test_markdown_is_a_section(made, run):
    code, out, _ = run("report", made / "small.fw", "--markdown", "-o", made / "card.md", "--json")
    assert code == 0
    text = (made / "card.md").read_text()
    assert json.loads(out)["bytes"] == len(text.encode())
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    for table in tables:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|-:")
    assert 'fw.load("small.fw", into=make())' in text
    assert "    featherweight compress nets.py:tiny" in text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(-1e6, 1e6) | st.just(float("nan"))), min_size=1, max_size=5),
    st.floats(-1e6, 1e6),
)
def test_marks_stand_inside_the_chart(points, ours):
    artifact = Artifact((), {"x": torch.ones(3)}, ())
    facts = collect("small.fw", artifact, to_bytes(artifact), Given(), None)
    sizes = tuple(Size(f"s{i}", n, {"loss": y}, "") for i, (n, y) in enumerate(points))
    chart = chart_of(replace(facts, after={"loss": ours}, before={"loss": ours}, sizes=sizes))
    known = sum(y == y for _, y in points)
    if known < 2:
        assert chart is None
        return
    assert chart is not None
    assert len(chart.marks) + len(chart.outside) == known + 1
    assert chart.marks[-1].kind == "ours"
    for mark in chart.marks:
        assert 0 <= mark.x <= 100
        assert 0 <= mark.y <= 100
    for tick in (*chart.x_ticks, *chart.y_ticks):
        assert 0 <= tick.at <= 100
    assert len(chart.y_ticks) >= 2
    assert len(chart.x_ticks) >= 1


# ---------------------------------------------------------------- what files remember
def test_a_file_remembers_what_was_asked_and_no_place(made):
    about = read(made / "small.fw").about
    assert about["settings"] == {"data": "nets.py:images", "exclude": ["fc.*"], "measurements": 2, "target": "2.5x"}
    assert about["model"] == "nets.py:tiny"
    assert about["left_alone"] == {"excluded by the recipe": ["fc.weight"]}
    artifact = read(made / "small.fw")
    kept = {k: v for k, v in about.items() if k not in ("settings", "left_alone", "torch")}
    assert len(to_bytes(artifact)) - len(to_bytes(replace(artifact, about=kept))) < 100


def test_options_are_called_as_on_the_command_line():
    given = {"finetune_epochs": 2, "admm_epochs": 1, "purpose": "speed", "symmetric": False, "sequential": None}
    given |= {
        "target_macs": "0.5x",
        "tie": ["a"],
        "include": None,
        "keep": 0.5,
        "no_repair": True,
        "weights": Path("/a/w"),
    }
    assert told(given | {"test": "x", "output": Path("o")}, compress_command) == {
        "finetune": 2,
        "admm": 1,
        "for": "speed",
        "symmetric": False,
        "target-macs": "0.5x",
        "tie": ["a"],
        "keep": 0.5,
        "no-repair": True,
        "weights": "w",
    }
    assert changed({"as_json": True, "output": Path("o")}, compress_command) == ["--json", "--output"]


def test_paths_are_named_without_their_folders():
    assert named("/home/me/net.py:make") == "net.py:make"
    assert named("package.net:make") == "package.net:make"
    assert named(Path("/home/me/w.safetensors")) == "w.safetensors"
    assert [named(x) for x in ("3,32,32", "layer1.*", 4.0, True, None)] == ["3,32,32", "layer1.*", 4.0, True, None]


def test_in_python_the_target_is_remembered():
    about = fw.compress(tiny(), images(), target=fw.Goal("3x", bops="0.9x", measurements=1)).artifact.about
    assert about["settings"] == {"target": "3x", "target-bops": "0.9x"}


def test_commands_are_written_as_they_were_typed():
    about = {
        "model": "net.py:make",
        "settings": {"bits": 4, "data": "net.py:x y", "symmetric": False, "sequential": True, "exclude": ["a", "b.*"]},
        "finetuned": [{"train": "net.py:t", "epochs": 2}, {"train": "net.py:t", "move-codes": True}],
    }
    assert commands("out.fw", about) == (
        "featherweight compress net.py:make --data 'net.py:x y' --bits 4 --exclude a --exclude 'b.*' --sequential "
        "--asymmetric -o small.fw",
        "featherweight finetune small.fw --model net.py:make --train net.py:t --epochs 2 -o tuned1.fw",
        "featherweight finetune tuned1.fw --model net.py:make --train net.py:t --move-codes -o out.fw",
    )
    assert commands("out.fw", about | {"finetuned": []})[0].endswith("-o out.fw")
    assert commands("out.fw", {"settings": {}}) == ()
