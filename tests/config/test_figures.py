"""docs/model.md says what the cost formulas say."""

from __future__ import annotations

import pytest

from contentv.base.types import Bucket, TokenCounts
from contentv.config.figures import PAGE, filled, shape_of, tokens_of
from contentv.models.mmdit import MMDiTConfig


def test_the_pages_tables_are_those_of_the_formulas() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text) == text, "run `make docs`"


def test_a_changed_number_and_a_missing_table_are_noticed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert filled(text.replace("8,056,627,520", "8,056,627,521")) == text
    with pytest.raises(ValueError, match="no place for the table <!-- memory -->"):
        filled(text.replace("<!-- memory -->", ""))


def test_tokens_of_the_published_default() -> None:
    assert tokens_of(Bucket(125, 432, 768)) == TokenCounts(41_472, 333)
    assert shape_of("contentv_8b") == MMDiTConfig()
