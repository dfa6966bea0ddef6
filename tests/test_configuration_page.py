"""docs/configuration.md says what the classes say."""

from __future__ import annotations

import configuration_page


def test_the_page_is_up_to_date() -> None:
    page = configuration_page.page()
    assert configuration_page.PAGE.read_text() == page, "run `python benchmarks/configuration_page.py`"
    for field in ("seed", "model.clean_loss", "data.augment.randaugment.magnitude", "monitoring.wandb_entity"):
        assert f"| `{field}` |" in page
    assert "|  |\n" not in page  # a field that nobody described
