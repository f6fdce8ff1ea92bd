"""Questions on contexts that the small encoder reads at once."""

import dataclasses

import pytest


@pytest.fixture(scope="session")
def questions():
    """On contexts that the small encoder reads at once."""
    from latentwire.data.squad import load

    return [
        dataclasses.replace(q, context=f"{q.context[:120].rsplit(' ', 1)[0]}.") for q in load("sample", "dev").questions
    ]
