"""The figures show the numbers of the metrics, their files are whole, and their words do not overlap."""

import itertools
import math
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from bayeslora.comparison.plots import (
    overconfidence_picture,
    reliability_diagram,
    render,
    risk_coverage_plot,
    save,
    tradeoff_plot,
)
from bayeslora.comparison.plots.style import grid, looks
from bayeslora.errors import InputError
from bayeslora.methods import METHODS
from bayeslora.metrics.classification import ece, kl_to_truth, reliability
from bayeslora.metrics.detection import aurc, auroc, risk_coverage
from bayeslora.metrics.prediction import Prediction

N, C = 200, 4
NAMES = ("map", "ensemble", "swag", "laplace", "a predictor with a name far too long", "ivon", "blob", "tfb")


def scores(seed, rows=N):
    return torch.randn(rows, C, generator=torch.Generator().manual_seed(seed))


TRUTH = scores(0).softmax(-1)
LABELS = torch.multinomial(TRUTH, 1, generator=torch.Generator().manual_seed(1)).squeeze(-1)


def prediction(seed, rows=N, scale=1.0):
    draws = [scale * (scores(0, rows) + 0.7 * scores(100 * seed + s, rows)) for s in range(1, 4)]
    return Prediction(torch.stack(draws).log_softmax(-1))


def predictions(count, rows=N, scale=2.0):
    return {name: prediction(i, rows, scale) for i, name in enumerate(NAMES[:count], 1)}


def curves(count):
    return {name: (made.log_p, LABELS) for name, made in predictions(count).items()}


def panel(figure, label):
    (axes,) = [axes for axes in figure.axes if axes.get_label() == label]
    return axes


def bars(axes, *labels):
    """Left edge -> (bottom, height) of the bars under the given labels."""
    found = [patch for group in axes.containers if group.get_label() in labels for patch in group]
    return {round(patch.get_x(), 6): (patch.get_y(), patch.get_height()) for patch in found}


def test_a_reliability_diagram_has_two_panels_for_each_predictor():
    labels = [axes.get_label() for axes in reliability_diagram(curves(3)).axes]
    assert labels == [f"{kind} {name}" for name in NAMES[:3] for kind in ("reliability", "counts")]


def test_bars_are_the_accuracy_and_shades_end_at_the_confidence_of_each_bin():
    figure, bins = reliability_diagram(curves(2), bins=12), 12
    for name, (log_p, labels) in curves(2).items():
        diagram = reliability(log_p, labels, bins)
        heights = bars(panel(figure, f"reliability {name}"), "accuracy", "few accuracy")
        shades = bars(panel(figure, f"reliability {name}"), "gap", "few gap")
        counts = bars(panel(figure, f"counts {name}"), "count")
        seen = [b for b in range(bins) if diagram.count[b]]
        assert len(heights) == len(shades) == len(seen)
        for b in seen:
            left = round(float(diagram.edges[b]), 6)
            accuracy, confidence = float(diagram.accuracy[b]), float(diagram.confidence[b])
            assert heights[left] == (0, pytest.approx(accuracy, abs=1e-12))
            assert shades[left] == pytest.approx((min(accuracy, confidence), abs(accuracy - confidence)), abs=1e-12)
        assert [height for _, height in counts.values()] == diagram.count.tolist()


def test_bins_of_fewer_than_ten_examples_are_pale():
    figure = reliability_diagram(curves(1))
    diagram = reliability(*curves(1)["map"])
    drawn = panel(figure, "reliability map")
    few = {round(float(diagram.edges[b]), 6) for b in range(15) if 0 < diagram.count[b] < 10}
    assert few
    assert set(bars(drawn, "few accuracy")) == few
    alphas = {g.get_label(): {p.get_alpha() or p.get_facecolor()[3] for p in g} for g in drawn.containers}
    assert max(alphas["few accuracy"]) < min(alphas["accuracy"])


def test_the_title_of_a_diagram_is_the_calibration_error_of_its_bins():
    figure = reliability_diagram(curves(1), bins=7)
    assert panel(figure, "reliability map").get_title("left") == f"ECE {ece(*curves(1)['map'], 7):.3f}"


def test_all_panels_of_a_kind_share_their_axes():
    figure = reliability_diagram(curves(3))
    for kind in ("reliability", "counts"):
        limits = {(a.get_xlim(), a.get_ylim()) for a in figure.axes if a.get_label().startswith(kind)}
        assert len(limits) == 1


def test_a_risk_coverage_plot_has_one_line_for_each_predictor_with_the_values_of_the_metric():
    given = curves(4)
    (axes,) = risk_coverage_plot(given).axes
    assert [line.get_label() for line in axes.lines] == list(given)
    for line, (log_p, labels) in zip(axes.lines, given.values(), strict=True):
        coverage, risk = risk_coverage(log_p, labels)
        seen = coverage >= 0.05
        torch.testing.assert_close(torch.tensor(line.get_xdata()), coverage[seen], rtol=0, atol=0)
        torch.testing.assert_close(torch.tensor(line.get_ydata()), risk[seen], rtol=0, atol=0)


def test_the_legend_of_a_risk_coverage_plot_lists_the_areas_in_ascending_order():
    given = curves(4)
    (axes,) = risk_coverage_plot(given).axes
    texts = [text.get_text().split()[0] for text in axes.get_legend().get_texts()]
    assert texts == [f"{area:.3f}" for area in sorted(aurc(*curve) for curve in given.values())]


@pytest.mark.parametrize(
    ("ood", "truth", "kinds"),
    [
        (None, None, ["reliability"]),
        (predictions(2, 50), None, ["reliability", "uncertainty"]),
        (None, TRUTH, ["reliability", "truth"]),
        (predictions(2, 50), TRUTH, ["reliability", "uncertainty", "truth"]),
    ],
)
def test_the_picture_has_a_row_for_each_thing_that_is_given(ood, truth, kinds):
    figure = overconfidence_picture(predictions(2), LABELS, ood, truth)
    assert [axes.get_label() for axes in figure.axes] == [f"{kind} {name}" for name in NAMES[:2] for kind in kinds]


def test_the_picture_says_in_words_what_is_claimed_and_what_is_right():
    claims = torch.tensor([0.9, 0.1]).log().expand(1, 10, 2)
    labels = torch.tensor([0] * 6 + [1] * 4)
    axes = panel(overconfidence_picture({"map": Prediction(claims)}, labels), "reliability map")
    assert axes.get_title("left") == "says 90 %, is right 60 %"
    (average,) = [line for line in axes.lines if line.get_label() == "average"]
    assert list(average.get_xdata()) == pytest.approx([0.9, 0.9])
    assert list(average.get_ydata()) == pytest.approx([0.9, 0.6])


def binary(confidence):
    claims = torch.tensor([confidence, 1 - confidence]).log().expand(1, 10, 2)
    return Prediction(claims), torch.tensor([0] * 6 + [1] * 4)


def test_the_confidence_of_two_choices_begins_at_half():
    made, labels = binary(0.9)
    axes = panel(overconfidence_picture({"map": made}, labels), "reliability map")
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.5, 1), (0, 1))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["50 %", "75 %", "100 %"]
    assert panel(overconfidence_picture(predictions(1), LABELS), "reliability map").get_xlim() == (0, 1)


def test_no_bar_of_two_choices_is_off_the_axis():
    (made, labels), (even, _) = binary(0.9), binary(0.5)
    figure = overconfidence_picture({"map": made, "swag": even}, labels)  # one half falls into the bin that ends there
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 1)}


def test_six_predictors_stand_in_two_rows_on_a_page_less_than_twice_as_high_as_wide():
    figure = overconfidence_picture(predictions(6), LABELS, predictions(6, 50), TRUTH, title="A title")
    width, height = figure.get_size_inches()
    assert height < 1.75 * width
    figure.draw_without_rendering()
    corners = [panel(figure, f"reliability {name}").get_position().p0 for name in NAMES[:6]]
    assert len({round(y, 3) for _, y in corners}) == 2
    assert len({round(x, 3) for x, _ in corners}) == 3
    sizes = [panel(figure, f"reliability {name}").get_window_extent() for name in NAMES[:6]]
    assert min(box.width for box in sizes) > 2 * figure.dpi
    assert min(box.height for box in sizes) > 1.5 * figure.dpi


@pytest.mark.parametrize("score", ["entropy", "mutual_information"])
def test_the_distributions_sum_to_one_and_the_title_is_their_auroc(score):
    known, unknown = prediction(1), prediction(2, 70, scale=0.5)
    figure = overconfidence_picture({"swag": known}, LABELS, {"swag": unknown}, score=score)
    axes = panel(figure, "uncertainty swag")
    assert sum(height for _, height in bars(axes, "in-distribution").values()) == pytest.approx(1)
    assert sum(height for _, height in bars(axes, "out-of-distribution").values()) == pytest.approx(-1)
    assert axes.get_title("left") == f"AUROC {auroc(getattr(known, score), getattr(unknown, score)):.2f}"


def test_one_dot_is_drawn_for_each_choice_that_an_example_has():
    log_probs = torch.tensor([[[0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]]).log()
    truth = torch.tensor([[0.4, 0.4, 0.2], [1.0, 0.0, 0.0]])
    figure = overconfidence_picture({"map": Prediction(log_probs)}, torch.tensor([0, 0]), truth=truth)
    axes = panel(figure, "truth map")
    (dots,) = axes.collections
    expected = [(0.4, 0.5), (0.4, 0.3), (0.2, 0.2), (1.0, 0.6), (0.0, 0.4)]
    assert [tuple(dot) for dot in dots.get_offsets()] == [pytest.approx(dot) for dot in expected]
    assert axes.get_title("left") == f"KL {kl_to_truth(log_probs[0], truth):.2f} nats from the truth"


def test_a_method_has_its_own_colour_in_every_figure():
    alone, among = looks(["swag"])["swag"], looks(["other", "ensemble", "swag", "map"])["swag"]
    assert alone == among == looks(["SWAG (10 draws)"])["SWAG (10 draws)"]
    diagram = panel(reliability_diagram(curves(3)), "reliability swag")
    drawn = {to_hex(p.get_facecolor()) for g in diagram.containers if g.get_label() == "accuracy" for p in g}
    (line,) = [line for line in risk_coverage_plot(curves(4)).axes[0].lines if line.get_label() == "swag"]
    assert drawn == {alone.colour.lower()} == {to_hex(line.get_color())}


@pytest.mark.parametrize("among", [("map + T",), ("map", "map + T"), ("map", "map + T", "ensemble:3", "swag", "blob")])
def test_a_temperature_has_its_own_colour_in_every_figure(among):
    assert looks(among)["map + T"] == looks(["temperature"])["temperature"]


@pytest.mark.parametrize(
    "names", [tuple(METHODS), ("swag", "swag 2", "swag-3"), ("multiswag", "swag", "mean", "map"), tuple("abcdefghijk")]
)
def test_predictors_of_a_figure_look_different(names):
    chosen = looks(names)
    assert list(chosen) == list(names)
    assert len(set(chosen.values())) == len(names)


def test_every_method_has_a_look_of_its_own():
    assert len({looks([name])[name] for name in METHODS}) == len(METHODS)  # without one it has that of the first


def test_lines_of_the_same_dashes_differ_in_grayscale():
    def light(look):
        return sum(weight * part for weight, part in zip((0.299, 0.587, 0.114), to_rgb(look.colour), strict=True))

    every = looks(f"method {i}" for i in range(11)).values()
    alike = [abs(light(a) - light(b)) for a, b in itertools.combinations(every, 2) if a.dash == b.dash]
    assert min(alike) > 0.15


@pytest.mark.parametrize(("panels", "shape"), [(1, (1, 1)), (4, (1, 4)), (5, (2, 3)), (6, (2, 3)), (9, (3, 3))])
def test_panels_are_at_most_four_side_by_side(panels, shape):
    assert grid(panels) == shape


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8])
def test_no_two_texts_of_a_figure_overlap_and_none_leaves_the_page(count):
    title = "What the fine-tuned models say, and how often they are right about it"
    picture = overconfidence_picture(predictions(count), LABELS, predictions(count, 50), TRUTH, title=title)
    for figure in (picture, reliability_diagram(curves(count)), risk_coverage_plot(curves(count))):
        figure.draw_without_rendering()
        page = figure.bbox.padded(1)
        boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
        assert [word for word, box in boxes if not (page.contains(*box.min) and page.contains(*box.max))] == []
        pairs = itertools.combinations([(word, box.padded(-1)) for word, box in boxes], 2)
        assert [(a, b) for (a, x), (b, y) in pairs if x.overlaps(y)] == []


def visible_texts(figure):
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = [(axis.get_view_interval(), tick) for axis in axes for tick in axis.get_major_ticks()]
    outside = {tick.label1 for (low, high), tick in ticks if not low <= tick.get_loc() <= high}
    texts = figure.findobj(lambda artist: isinstance(artist, matplotlib.text.Text) and artist not in outside)
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def test_a_png_is_written_whole_at_150_dots_an_inch_on_white(tmp_path):
    path = tmp_path / "new" / "figure.png"
    figure = reliability_diagram(curves(1))
    save(figure, path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[:2] == tuple(math.floor(150 * side + 1e-6) for side in reversed(figure.get_size_inches()))
    assert pixels[0, 0].tolist() == [1, 1, 1, 1]
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]


def test_an_svg_can_be_parsed_has_no_date_and_is_the_same_each_time(tmp_path):
    for name in ("one.svg", "two.svg"):
        save(overconfidence_picture(predictions(1), LABELS, predictions(1, 50), TRUTH), tmp_path / name)
    content = (tmp_path / "one.svg").read_bytes()
    assert ElementTree.fromstring(content).tag == "{http://www.w3.org/2000/svg}svg"
    assert b"<dc:date>" not in content
    assert content == (tmp_path / "two.svg").read_bytes()


def test_the_users_settings_change_nothing_and_are_not_changed():
    plain = render(risk_coverage_plot(curves(1)), "svg")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "axes.grid": True, "lines.marker": "x"}):
        before = dict(matplotlib.rcParams)
        loud = render(risk_coverage_plot(curves(1)), "svg")
        assert dict(matplotlib.rcParams) == before
    assert loud == plain


def test_a_figure_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "figure.svg"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    figure = risk_coverage_plot(curves(1))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write the figure to .*figure\.svg \(No space left"):
        save(figure, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["figure.svg"]


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the figure to .*choose another path"):
        save(risk_coverage_plot(curves(1)), tmp_path / "file" / "figure.png")


def test_other_suffixes_are_refused_in_words(tmp_path):
    with pytest.raises(InputError, match=r"figure\.pdf; give a path that ends in \.png or \.svg"):
        save(risk_coverage_plot(curves(1)), tmp_path / "figure.pdf")


@pytest.mark.parametrize("draw", [reliability_diagram, risk_coverage_plot])
def test_missing_matplotlib_is_refused_in_words(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for make in (lambda: draw(curves(1)), lambda: overconfidence_picture(predictions(1), LABELS)):
        with pytest.raises(InputError, match=r"plots need matplotlib: pip install 'bayeslora\[plot\]'"):
            make()


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: reliability_diagram({}), "nothing to draw"),
        (lambda: risk_coverage_plot({}), "nothing to draw"),
        (lambda: overconfidence_picture({}, LABELS), "nothing to draw"),
        (lambda: risk_coverage_plot({"map": (prediction(1).log_p, LABELS - 5)}), "labels of 'map': row 0"),
        (lambda: overconfidence_picture(predictions(1), LABELS[1:]), "labels for 'map' must be 200 integers"),
        (lambda: overconfidence_picture(predictions(2), LABELS, predictions(1)), r"same predictors \(ensemble\)"),
        (lambda: overconfidence_picture(predictions(1), LABELS, truth=2 * TRUTH), "row 0 is not a distribution"),
        (lambda: overconfidence_picture(predictions(1), LABELS, score="variance"), "score is 'variance'; choose"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(draw, words):
    with pytest.raises(InputError, match=words):
        draw()


def test_the_trade_off_shows_accuracy_error_and_cost_of_each_method():
    points = {"map": (0.8, 0.14, 60.0), "ensemble": (0.83, 0.1, 300.0), "swag": (0.79, 0.11, 90.0)}
    figure = tradeoff_plot(points)
    (axes,) = figure.axes
    found = {tuple(float(v) for v in dots.get_offsets()[0]): float(dots.get_sizes()[0]) for dots in axes.collections}
    assert found.keys() == {(0.14, 0.8), (0.1, 0.83), (0.11, 0.79)}
    assert found[0.1, 0.83] == pytest.approx(5 * found[0.14, 0.8])  # the area is the cost
    words = [text.get_text() for text in axes.get_legend().get_texts()]
    assert words == ["1  map  1.0×", "2  ensemble  5.0×", "3  swag  1.5×"]
    assert render(figure, "png") == render(tradeoff_plot(points), "png")
    for bad in ({}, {"map": (0.8, math.nan, 1.0)}):
        with pytest.raises(InputError):
            tradeoff_plot(bad)
