"""The demo model's training text."""

import pytest

from demo.corpus import Document, load_corpus


@pytest.fixture(scope="module")
def corpus() -> tuple[Document, ...]:
    return load_corpus()


def test_there_is_enough_text_to_learn_from(corpus: tuple[Document, ...]) -> None:
    """Any supported Python ships more than half a million characters of usable prose."""
    assert sum(len(text) for document in corpus for text in document.paragraphs) > 500_000


def test_reference_and_docstrings_are_both_there(corpus: tuple[Document, ...]) -> None:
    """Topics of the language reference and names of the library have documents."""
    titles = {document.title for document in corpus}
    assert {"assert", "asyncio.queues.Queue", "threading.Thread.start"} <= titles


def test_paragraphs_are_clean_prose(corpus: tuple[Document, ...]) -> None:
    """No paragraph holds a line break, a doctest, or mostly punctuation."""
    for document in corpus:
        for text in document.paragraphs:
            assert "\n" not in text
            assert ">>>" not in text
            assert sum(c.isalpha() or c in " ,." for c in text) > 0.8 * len(text)


def test_no_paragraph_is_repeated(corpus: tuple[Document, ...]) -> None:
    """Boilerplate that many modules share is learned once."""
    paragraphs = [text for document in corpus for text in document.paragraphs]
    assert len(paragraphs) == len(set(paragraphs))
