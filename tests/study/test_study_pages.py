"""The numbers in the text of the study's pages are those of the committed results."""

import pytest

from benchmarks import study_pages


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("page", study_pages.PAGES)
def test_a_page_has_the_numbers_that_its_results_give(page):
    text = words((study_pages.DOCS / page).read_text())
    said = study_pages.PAGES[page]()
    assert said and [one for one in said if words(one) not in text] == []


def test_close_pairs_are_those_of_at_most_so_many_points():
    """Of three scores the close two have the order of their NELBOs, and the far one has not."""
    scores = [study_pages.Scored(str(at), 0, 1, *one) for at, one in enumerate([(1.0, 0.5), (0.9, 0.6), (2.0, 0.75)])]
    assert study_pages.close_tau(scores, 10.001) == 1 and study_pages.close_tau(scores, 50) == pytest.approx(-1 / 3)
