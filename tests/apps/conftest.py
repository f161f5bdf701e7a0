import pytest
from support.desktop import Display, text_of


@pytest.fixture(scope="package")
def display():
    display = Display()
    yield display
    display.close()


@pytest.fixture(scope="package")
def text(tmp_path_factory):
    """About 2100 tokens of smollm2."""
    return text_of(tmp_path_factory.mktemp("text") / "topics.txt", 9000)


@pytest.fixture(scope="package")
def short_text(tmp_path_factory):
    """About 1400 tokens."""
    return text_of(tmp_path_factory.mktemp("text") / "short.txt", 6000)


@pytest.fixture(scope="package")
def long_text(tmp_path_factory):
    """Which takes long enough to read that an app is closed in the middle."""
    return text_of(tmp_path_factory.mktemp("text") / "long.txt", 24000)
