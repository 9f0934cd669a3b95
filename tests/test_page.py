"""Tests `keras_mixer/reports/page.py` and what it is made of: the HTML report of runs."""

import base64
import collections
import csv
import io
import itertools
import json
import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import keras
import numpy as np
import pytest
from conftest import rewrite
from matplotlib.figure import Figure
from PIL import Image

import keras_mixer
from keras_mixer.inference.calibration import wilson_interval
from keras_mixer.reports import figures
from keras_mixer.reports import page as page_module
from keras_mixer.reports.analysis import compare, pair_opposites
from keras_mixer.reports.curves import plot_column
from keras_mixer.reports.experiments import Experiment, FinishedRun, read_experiments
from keras_mixer.reports.page import write_page
from keras_mixer.reports.pictures import mosaic, svg
from keras_mixer.reports.report import Report
from keras_mixer.weights import model_folder

INDEX = "index.html"

# === What is tested: three runs of two experiments, and their page ===


def changed(directory, run, flags=(), noise=0.0, **options):
    """Copies a run; its config and flags differ, and its best weights have some noise."""
    shutil.copytree(run, directory, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    rewrite(directory / "config.json", lambda record: record["config"].update(options))
    with open(directory / "flags.txt", "a") as file:
        file.writelines(f"{flag}\n" for flag in flags)
    arrays, facts = model_folder.read_weights(directory / "best")
    draw = np.random.default_rng(0).normal
    arrays = {n: (a + noise * draw(size=a.shape)).astype(a.dtype) for n, a in arrays.items()}
    model_folder.write_weights(directory / "best", arrays, **facts)
    rewrite(directory / "metrics.json", lambda metrics: metrics.pop("seals", None))
    return directory


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Three runs: two seeds of an experiment, and one of another with noise in its weights."""
    folder, source = tmp_path_factory.mktemp("page"), trained.directory
    return [
        changed(folder / "first", source),
        changed(folder / "second", source, ["--seed=1"], seed=1),
        changed(folder / "noisy", source, ["--lr=0.02"], noise=0.1, lr=0.02),
    ]


# As sweeps draw, but with what must neither run nor be loaded.
PLOT = b"""<svg xmlns="http://www.w3.org/2000/svg" width="200.4pt" height="100pt" onload="alert(1)">
<script>console.error("ran")</script><image href="http://localhost:9/x.png" width="9" height="9"/>
<rect width="200" height="100"/></svg>"""
PLOTS = [(PLOT, "Top-1 of each setting")]
COMMAND = "keras-mixer report runs/* --html=report"


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    """The folder of their page."""
    folder = tmp_path_factory.mktemp("report")
    write_page(folder, Report(read_experiments(runs)), COMMAND, PLOTS)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Parsed((folder / INDEX).read_text())


class Parsed(HTMLParser):
    """A page's elements, a list of (tag, attributes), and its text."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.parts = html, [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.parts.append(data)

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# === Content ===


def outputs_of(directory, test):
    """(probabilities, labels) of the test images, by Keras alone."""
    model = keras_mixer.load_mixer(directory)
    logits = model.predict(keras_mixer.preprocess(test.pixels, model), verbose=0)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True), test.labels


@pytest.fixture(scope="module")
def outputs(runs, trained):
    return [outputs_of(run, trained.dataset.test) for run in (runs[0], runs[2])]


def test_scores_are_those_of_a_computation_of_their_own(folder, page, outputs):
    for number, (probabilities, labels) in enumerate(outputs, 1):
        confidence, predicted = probabilities.max(axis=1), probabilities.argmax(axis=1)
        correct, gap = predicted == labels, 0.0
        rows = read_csv(folder / f"reliability-{number}.csv")
        assert len(rows) == 15
        for index, row in enumerate(rows):
            own = (confidence > index / 15) & (confidence <= (index + 1) / 15)
            assert int(row["images"]) == own.sum()
            if own.any():
                assert float(row["accuracy"]) == pytest.approx(correct[own].mean())
                assert float(row["confidence"]) == pytest.approx(confidence[own].mean(), abs=1e-5)
                gap += abs(correct[own].mean() - confidence[own].mean()) * own.mean()
        squares = ((probabilities - np.eye(10)[labels]) ** 2).sum(axis=1).mean()
        nll = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        words = f"Top-1 {100 * correct.mean():.2f}% .* ECE {100 * gap:.2f}% NLL {nll:.4f} Brier "
        assert re.search(f"{words}score {squares:.4f} ECE, the expected", page.text)


def test_confusion_and_classes_are_counted(folder, outputs):
    for number, (probabilities, labels) in enumerate(outputs, 1):
        pairs = collections.Counter(zip(labels, probabilities.argmax(axis=1), strict=True))
        rows = read_csv(folder / f"confusion-{number}.csv")
        assert {(int(r["true"]), int(r["predicted"])): int(r["images"]) for r in rows} == pairs
        for row in read_csv(folder / f"classes-{number}.csv"):
            name = int(row["name"])
            right = pairs[name, name]
            assert float(row["recall"]) == right / sum(n for p, n in pairs.items() if p[0] == name)
            found = sum(n for p, n in pairs.items() if p[1] == name)
            assert float(row["precision"]) == (right / found if found else 0)


def test_most_confident_mistakes_are_shown_as_the_model_sees_them(page, outputs, trained):
    probabilities, labels = outputs[1]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-confidence[wrong])][:16]
    expected = [
        f"true: {labels[i]}, predicted: {predicted[i]}, probability {confidence[i]:.1%}"
        for i in worst
    ]
    pictures = [image for image in page.all("img") if image["alt"].startswith("true")]
    pictures = pictures[-len(worst) :]
    assert [image["alt"] for image in pictures] == expected
    assert all((image["width"], image["class"]) == ("96", "sharp") for image in pictures)
    pixels = trained.dataset.test.pixels[worst[0]]
    content = io.BytesIO(
        base64.b64decode(pictures[0]["src"].removeprefix("data:image/png;base64,"))
    )
    np.testing.assert_array_equal(np.asarray(Image.open(content))[..., :1], pixels)


def test_runs_and_curves_are_written_as_they_are(folder, runs, trained):
    rows = read_csv(folder / "runs.csv")
    assert [row["run"] for row in rows] == ["first", "second", "noisy"]
    assert [row["experiment"] for row in rows] == ["1", "1", "2"]
    assert {float(row["test"]) for row in rows} == {trained.scores["test"]["top1"]}
    assert {int(row["parameters"]) for row in rows} == {trained.spec.architecture.parameters}
    curves = read_csv(folder / "curves.csv")
    history = read_csv(runs[0] / "history.csv")
    assert len(curves) == 3 * len(history)
    for row, own in zip(curves, history, strict=False):
        for name in ("epoch", "loss", "accuracy", "val_loss", "val_accuracy", "lr"):
            assert row[name] == own[name]


def test_plots_of_a_search_are_pictures(page):
    (plot,) = [image for image in page.all("img") if "svg" in image["src"]]
    content = plot["src"].removeprefix("data:image/svg+xml;base64,")
    assert base64.b64decode(content) == PLOT
    assert plot["alt"] == "Top-1 of each setting"
    assert "Search Optuna’s plots" in page.text


def test_experiments_are_told_by_what_differs(page):
    assert "Option Experiment 1 Experiment 2 lr 0.01 0.02" in page.text
    assert "keras-mixer train" in page.text and "--lr=0.02" in page.text
    assert "Made by keras-mixer report runs/*" in page.text


def experiment_of(*histories):
    """The first experiment, of runs with these columns of history.csv."""
    runs = []
    for columns in histories:
        rows = zip(*columns.values(), strict=True)
        history = [dict(zip(columns, row, strict=True)) for row in rows]
        runs.append(FinishedRun("", {}, None, [], {}, "", {}, history, 0.0))
    return Experiment(1, "", runs, ())


def test_seeds_are_a_mean_with_a_band():
    """Also where one stopped early, or has no value."""
    axes = Figure().subplots()
    first = {"epoch": "123", "lr": "135", "accuracy": ["0.5"] * 3}
    other = {"epoch": "12", "lr": ["2", ""], "accuracy": ["0.7"] * 2}
    experiment = experiment_of(first, other)
    plot_column(axes, [experiment], "lr")
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[1, 1.5], [2, 3], [3, 5]]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert corners == {(1, 1), (1, 2), (2, 3), (3, 5)}
    plot_column(axes, [experiment], "accuracy")
    assert axes.lines[1].get_ydata() == pytest.approx([60, 60, 50]), "in percent"


def test_curves_are_drawn_with_what_experiments_differ_in(runs, run, tmp_path):
    status, _, _ = run("report", *runs, f"--plot={tmp_path}/curves.svg")
    assert status == 0
    picture = (tmp_path / "curves.svg").read_text()
    labels = "- -lr=0.01 (2)", "- -lr=0.02 (1)"  # as comments in XML have them
    for text in ("Validation accuracy (%)", "Learning rate", *labels):
        assert f"<!-- {text} -->" in picture
    status, _, err = run("report", *runs, f"--plot={tmp_path}/curves.doc")
    assert (status, err.count("\n")) == (2, 1) and "expected a name in .png, .svg, .pdf" in err
    assert err.startswith("error: --plot=")
    status, _, err = run("report", *runs, "--plot=it.svg", "--output=it.svg")
    assert (status, err) == (2, "error: --plot=it.svg is the file of --output; give another one\n")


# === Statistics ===


@pytest.mark.parametrize("correct, count", [(0, 10), (10, 10), (345, 360), (1, 3)])
def test_intervals_are_wilsons(correct, count):
    z, share = 1.959963984540054, correct / count
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    root = math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    margin = z * root / (1 + z**2 / count)
    expected = center - margin, center + margin
    assert wilson_interval(correct, count) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gained, lost", [(3, 12), (5, 5), (0, 7)])
def test_comparison_is_mcnemars_exact_test(gained, lost):
    reference = np.array([True] * 50 + [False] * gained + [True] * lost + [False] * 4)
    correct = np.array([True] * 50 + [True] * gained + [False] * lost + [False] * 4)
    count, discordant = len(correct), gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1)) / 2**discordant
    compared = compare(correct, reference)
    assert compared[:2] == (gained, lost)
    assert compared.p == pytest.approx(min(1, 2 * tail))
    assert compared.difference == pytest.approx(correct.mean() - reference.mean())
    # Each of the four counts has half an image more: the variance of a mean of differences.
    center = (gained - lost) / (count + 2)
    variance = ((discordant + 1) / (count + 2) - center**2) / (count + 2)
    margin = 1.959963984540054 * math.sqrt(variance)
    assert compared[3:5] == pytest.approx((center - margin, center + margin))


def test_equal_models_do_not_differ():
    correct = np.array([True, False, True])
    compared = compare(correct, correct)
    assert (compared.difference, compared.p) == (0, 1)
    assert compared.low == -compared.high < 0


def test_the_page_compares_with_the_best(folder, outputs):
    (row,) = read_csv(folder / "comparison.csv")
    first, noisy = (p.argmax(axis=1) == labels for p, labels in outputs)
    assert first.mean() > noisy.mean()
    assert (row["best"], row["experiment"]) == ("1", "2")
    assert int(row["lost"]) == (first & ~noisy).sum()
    assert int(row["gained"]) == (noisy & ~first).sum()


# === Weights ===


def waves(counts, generator):
    """A wave of each frequency in a random phase, and its opposite; not one beside the other."""
    x = np.arange(8) * 2 * np.pi / 8
    made = [np.cos(n * x[:, None] + x + generator.uniform(0, 6)) for n in counts]
    return np.array([*made, *(-0.5 * wave for wave in made)])


def test_each_unit_stands_beside_the_one_of_opposite_phase():
    generator = np.random.default_rng(0)
    kernels = waves([3, 0, 2], generator) + 0.01 * generator.normal(size=(6, 8, 8))
    order = pair_opposites(kernels)
    pairs = [set(pair) for pair in order.reshape(3, 2).tolist()]
    assert pairs == [{1, 4}, {2, 5}, {0, 3}], "lowest frequency first"


def test_units_left_over_and_dead_ones_are_kept():
    kernels = np.concatenate([waves([1], np.random.default_rng(0)), np.zeros((3, 8, 8))])
    order = pair_opposites(kernels)
    assert sorted(order) == list(range(5))
    assert {0, 1} in [set(order[:2]), set(order[2:4])]
    assert list(pair_opposites(np.zeros((1, 2, 2)))) == [0]


def test_pictures_of_weights_have_a_tile_for_each(page):
    stems = [image for image in page.all("img") if "stem" in image["alt"]]
    mixing = [image for image in page.all("img") if "token mixing" in image["alt"]]
    assert len(stems) == 2 and "16 kernels" in stems[0]["alt"]
    assert len(mixing) == 4 and "8 hidden units of token mixing, layer 1" in mixing[0]["alt"]


def test_tiles_have_the_range_of_colors():
    kernel = np.arange(2 * 2 * 3 * 5, dtype=float).reshape(2, 2, 3, 5)
    tiles = figures.stem_tiles(kernel)
    assert tiles.shape == (5, 2, 2, 3)
    assert (tiles.min(axis=(1, 2, 3)) == 0).all() and (tiles.max(axis=(1, 2, 3)) == 1).all()
    assert figures.stem_tiles(np.zeros((2, 2, 1, 5))).shape == (5, 2, 2, 3)
    blue, white, red = figures.weight_tiles(np.array([[[-2.0, 0.0, 2.0]]]))[0, 0]
    assert blue[2] > 2 * blue[0] and red[0] > 2 * red[2] and (white > 0.95).all()
    assert re.search('width="([0-9]+)" .* class="sharp"', mosaic(tiles, "tiles"))


def test_a_model_that_is_no_mixer_has_no_pictures_of_one():
    images = keras.Input((4, 4, 1))
    dense = keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(images)))
    found = figures.Findings(None, dense, "test", *[None] * 6)
    render = {figure.name: figure.render for figure in figures.FIGURES}
    assert render["stem"](found, "") == render["token-mixing"](found, "") == []


# === The page as a document ===


def test_the_page_needs_no_network_and_no_handlers(page):
    links = [v for _, a in page.elements for n, v in a.items() if n in ("src", "href")]
    allowed = ("data:", "#", "curves.csv", "runs.csv", "comparison.csv")
    numbered = re.compile(r"(classes|confusion|reliability)-[12]\.csv")
    assert all(link.startswith(allowed) or numbered.fullmatch(link) for link in links)
    assert not [n for _, a in page.elements for n in a if n.startswith("on")]
    assert set(re.findall(r"https?://[^\"'\s]+", page.html)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
    }  # fmt: skip


def test_the_page_can_be_read_without_seeing_it(page):
    assert page.html.startswith('<!DOCTYPE html>\n<html lang="en">')
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-controls", "for"):
            assert attributes.get(name, ids[0]) in ids
        for reference in re.findall(
            r"url\(#([^)]+)\)", " ".join(filter(None, attributes.values()))
        ):
            assert reference in ids
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert {"header", "main", "nav", "footer"} <= {tag for tag, _ in page.elements}
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a["alt"] for a in page.all("img"))
    assert all(a.get("aria-label") or a.get("aria-hidden") for a in page.all("svg"))


def test_the_same_runs_give_the_same_bytes(folder, runs, tmp_path):
    write_page(tmp_path, Report(read_experiments(runs)), COMMAND, PLOTS)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x", "$\\frac{1}{2}$",
    "$unbalanced", "two\nlines", "bell \x07", "half a pair \ud800", "\u202egnp", "{{ 7 * 7 }}中]]>",
)  # fmt: skip


@pytest.fixture
def hostile(runs, tmp_path, monkeypatch):
    """The page of an experiment whose directory, flags, data and classes have hostile names."""
    directory = changed(tmp_path / '"><b onclick=x>$', runs[2], [f"--name={HOSTILE[1]}"])
    data = {"dataset": "folder", "data_dir": f"/x/{HOSTILE[7]}{HOSTILE[0]}".rstrip("/")}
    rewrite(directory / "config.json", lambda record: record["config"].update(data))
    with open(directory / "flags.txt", "ab") as file:
        file.write(b"--variant=\xff<i>$x\n")
    found = figures.examine(runs[2])
    pairs = zip(found.scores["classes"], HOSTILE, strict=True)
    classes = [row | {"name": name} for row, name in pairs]
    found = found._replace(scores=found.scores | {"classes": classes}, names=list(HOSTILE))
    monkeypatch.setattr(page_module, "examine", lambda *_: found)
    report = Report(read_experiments([directory]))
    return write_page(tmp_path, report, HOSTILE[0], [(PLOT, HOSTILE[1])]).read_text()


def test_hostile_names_are_only_text(hostile, page):
    parsed = Parsed(hostile)
    assert not {tag for tag, _ in parsed.elements} - {tag for tag, _ in page.elements}
    assert not [n for _, a in parsed.elements for n in a if n.startswith("on")]
    script = re.compile("<script>.*</script>", re.DOTALL)
    assert len(parsed.all("script")) == 1
    assert script.findall(hostile) == script.findall(page.html)
    assert all(re.match("data:image/(png|svg.xml);base64,", a["src"]) for a in parsed.all("img"))
    for name in (*HOSTILE[:5], "two\\nlines", "bell \\x07", "half a pair \\ud800"):
        assert parsed.text.count(" ".join(name.split())) >= 1, name
    for character in "\x07\u202e\ud800":
        assert character not in hostile


def test_hostile_names_in_figures_are_drawn_as_they_are():
    names = ["$\\frac{1}{2}$", "<b>", "中", 'id="x" url(#y)']
    drawn = svg("c", "Confusion", figures.plot_confusion, np.eye(4, dtype=int), names)
    shown = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]
    for name in names:
        assert shown.count(name) == 2


def test_figures_have_the_colors_of_the_page_and_ids_of_their_own():
    lines = [experiment_of({"epoch": "123", "loss": "123"}, {"epoch": "123", "loss": "212"})]

    def plot(figure):
        plot_column(figure.subplots(), lines, "loss")

    one, two = (svg(name, "Loss", plot) for name in ("one", "two"))
    ids = [re.findall(r' id="([^"]+)"', svg) for svg in (one, two)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    references = re.findall(r'(?:href="|url\()#([^")]+)', one)
    assert references and set(references) <= set(ids[0])
    assert "var(--series-0)" in one and "currentColor" in one
    assert not re.search(r"#[0-9a-f]{6}", one), "no color of its own"


def test_many_classes_are_drawn_without_numbers():
    names = [f"class {number}" for number in range(300)]
    drawn = svg("c", "Confusion", figures.plot_confusion, np.eye(300, dtype=int), names)
    assert "class 1" not in drawn and len(drawn) < 100_000


# === The folder and the command ===


def test_runs_without_data_have_their_curves_only(runs, tmp_path, capsys):
    lost = changed(tmp_path / "lost", runs[0], dataset="folder", data_dir="/nowhere")
    (tmp_path / "page").mkdir()
    write_page(tmp_path / "page", Report(read_experiments([lost])))
    html = (tmp_path / "page" / INDEX).read_text()
    assert f"{lost}: the page shows its curves and scores alone" in capsys.readouterr().err
    assert "there is nothing more to show" in html and "Validation accuracy" in html
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        INDEX, "curves.csv", "runs.csv"
    }  # fmt: skip


def test_unfinished_runs_are_named_and_left_out(run, runs, tmp_path):
    for name, missing in (("a", "metrics.json"), ("b", "history.csv")):
        (changed(tmp_path / name, runs[0]) / missing).unlink()
    status, out, err = run("report", "a", "b", "--html=page")
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        f"{tmp_path}/a: left out: no finished run (it holds no metrics.json)",
        f"{tmp_path}/b: left out: no finished run (it holds no history.csv)",
        "error: none of the directories holds a finished run",
    ]
    assert not (tmp_path / "page").exists()
    status, out, err = run("report", "a", runs[2], "--html=page")
    assert status == 0 and out.startswith("| experiment |")
    assert "page: page/index.html" in err
    text = Parsed((tmp_path / "page" / INDEX).read_text()).text
    assert "Report on 1 run" in text
    assert f"keras-mixer report a {runs[2]} --html=page" in text


def test_a_file_in_the_way_is_refused_and_other_files_stay(run, runs, folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in ("file", "file/page"):
        status, out, err = run("report", runs[0], f"--html={path}")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: --html={path}: ")
    assert (tmp_path / "file").read_text() == "mine"


# === In a browser ===


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window, with its console and its requests on record."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser, folder):
    browser.get((folder / INDEX).as_uri())
    return browser


def rows_shown(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#runs-table tbody tr')]"
        ".filter((row) => row.offsetHeight).map((row) => row.lastElementChild.textContent)"
    )


def test_the_page_opens_without_errors_and_requests(opened, folder):
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"].endswith("BeSent")]
    asked = {url for url in sent if not url.startswith("data:")}
    assert asked == {(folder / INDEX).as_uri()}
    broken = "return [...document.images].filter((i) => !i.naturalWidth || !i.alt).length"
    assert opened.execute_script(broken) == 0
    wide = "return document.documentElement.scrollWidth > window.innerWidth"
    for width in (1200, 400):
        opened.set_window_size(width, 900)
        assert not opened.execute_script(wide), "nothing but tables is scrolled sideways"


def test_experiments_are_called_by_what_differs(opened):
    text = opened.find_element("id", "runs").text
    assert re.search("All experiments: .*--depth=", text)
    cell = opened.find_element("css selector", "#runs-table tbody th").text
    assert cell == "1 --lr=0.01"


def test_tables_are_sorted_by_keyboard_and_filtered(opened):
    assert rows_shown(opened) == ["first", "second", "noisy"]
    button = opened.find_element("xpath", "//*[@id='runs-table']//button[text()='Run']")
    for order, expected in (
        ("ascending", ["first", "noisy", "second"]),
        ("descending", ["second", "noisy", "first"]),
    ):
        button.send_keys("\ue007")  # Enter
        assert rows_shown(opened) == expected
        header = button.find_element("xpath", "..")
        assert header.get_attribute("aria-sort") == order
    seed = opened.find_element("xpath", "//*[@id='runs-table']//button[text()='Seed']")
    seed.send_keys("\ue00d")  # Space
    assert rows_shown(opened)[-1] == "second"
    assert header.get_attribute("aria-sort") == "none"
    opened.execute_script(
        "const index = arguments[0].parentElement.cellIndex;"
        "for (const row of document.querySelectorAll('#runs-table tbody tr'))"
        "  if (row.lastElementChild.textContent === 'first') row.cells[index].dataset.value = '';",
        seed,
    )
    for _ in range(2):
        seed.send_keys("\ue007")
        assert rows_shown(opened)[-1] == "first", "what has no value is last in both orders"
    opened.find_element("id", "filter").send_keys("lr=0.02")
    assert rows_shown(opened) == ["noisy"]
    assert opened.find_element("id", "shown").text == "1 of 3 runs are shown"


# The least ratio of contrast (WCAG 2) of text that is shown, and that text.
CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  const color = getComputedStyle(element).backgroundColor;
  const clear = color === "rgba(0, 0, 0, 0)" && element.parentElement;
  return clear ? behind(element.parentElement) : color;
};
document.querySelectorAll("details").forEach((details) => { details.open = true; });
let worst = [99, ""];
const tags = "p, th, td, a, code, figcaption, caption, dt, dd, h1, h2, h3, h4, text";
for (const element of document.querySelectorAll(tags)) {
  if (element.classList.contains("skip")) continue;
  const style = getComputedStyle(element);
  const color = element.localName === "text" ? style.fill : style.color;
  const [a, b] = [light(color), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < worst[0]) worst = [ratio, element.textContent];
}
return [worst[0], worst[1], getComputedStyle(document.body).backgroundColor];
"""


def test_both_color_schemes_can_be_read(opened):
    grounds = set()
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        ratio, text, ground = opened.execute_script(CONTRAST)
        assert ratio >= 4.5, f"{scheme}: {text}"
        grounds.add(ground)
    assert len(grounds) == 2


def test_on_paper_everything_is_shown_in_dark_on_white(opened):
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    for media, shown in (("screen", False), ("print", True)):
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": dark})
        visible = "return [...document.querySelectorAll('h4')].map((h) => h.checkVisibility())"
        assert set(opened.execute_script(visible)) == {shown}
    script = "return getComputedStyle(document.querySelector('figure')).backgroundColor"
    assert opened.execute_script(script) == "rgb(255, 255, 255)"


def test_the_page_can_be_used_without_its_script(browser, folder):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.get((folder / INDEX).as_uri())
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert rows_shown(browser) == ["first", "second", "noisy"]
    assert not browser.find_element("id", "filter").is_displayed()
    browser.find_element("css selector", "summary").click()
    assert "keras-mixer train" in browser.find_element("tag name", "pre").text
