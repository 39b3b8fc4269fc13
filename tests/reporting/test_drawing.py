"""What pictures are made of: labels that find a place, heat maps whose colours mean what their key says."""

import numpy as np
import pytest

from moe_peft.reporting.drawing import Sheet, drawing, heat
from moe_peft.reporting.experts import _scale
from moe_peft.reporting.methods import place_label
from moe_peft.reporting.theme import themed

LABEL = (1.0, 0.1)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes share ground."""
    (a, b, w, h), (c, d, x, y) = one, other
    return a < c + x and c < a + w and b < d + y and d < b + h


def test_labels_of_points_in_one_place_do_not_cover_each_other():
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(8):
        box = place_label((3.0, 2.0), *LABEL, taken, edge=6.0)
        assert not any(overlap(box, other) for other in taken)
        taken.append(box)


@pytest.mark.parametrize("x", [0.02, 3.0, 5.98])
def test_a_label_stays_on_the_sheet(x):
    left, _, width, _ = place_label((x, 2.0), *LABEL, [], edge=6.0)
    assert left >= 0 and left + width <= 6.0


def test_the_opacity_of_a_cell_grows_with_its_value_and_grey_is_no_value():
    with drawing():
        axes = Sheet(2, 1).axes(0, 0, 2, 1)
        heat(axes, np.array([[0.0, 1.0, 4.0, 9.0, np.nan]]), top=4.0, gamma=0.5)
        image = axes.images[0].get_array()
    assert image is not None
    assert image[0, :4, 3].tolist() == pytest.approx([0.0, 0.5, 1.0, 1.0])
    assert image[0, 4, :3].tolist() != pytest.approx(image[0, 0, :3].tolist())


def test_numbers_stand_in_cells_that_do_not_come_to_nothing():
    with drawing():
        axes = Sheet(2, 1).axes(0, 0, 2, 1)
        heat(axes, np.array([[0.0, 0.4, 0.6, 10.0, np.nan]]), top=10.0, numbers=".0f")
        assert [text.get_text() for text in axes.texts] == ["1", "10"]


@pytest.mark.parametrize(("largest", "top", "even"), [(0.07, 0.125, 0.5), (0.5, 0.5, 1 / 3), (1.0, 1.0, 1 / 3)])
def test_an_even_share_has_a_third_of_the_colour_or_half_where_all_are_nearly_even(largest, top, even):
    values = np.full((3, 16), 1 / 16)
    values[0, 0] = largest
    found, gamma = _scale(values, 16)
    assert found == top and (1 / 16 / top) ** gamma == pytest.approx(even)


def test_a_single_outlier_does_not_pale_the_others():
    values = np.full((10, 40), 1 / 16)
    values[0, 0] = 1.0
    assert _scale(values, 16, outliers=0.5)[0] == 0.125


def test_text_that_looks_like_a_colour_or_an_id_is_left_alone():
    text = ' id="a1" #1c2024 url(#a1) &lt;b&gt;'
    svg = f'<svg x="1"><g id="a1"><text id="t" style="fill: #1c2024">{text}</text></g></svg>'
    assert themed(svg, "name", 1, 1) == (
        '<svg width="96" height="96" viewBox="0 0 72 72">'
        f'<g id="name-a1"><text style="fill: var(--ink)">{text}</text></g></svg>'
    )
