"""The deliberate mistakes of mutations.py can still be made."""

import mutations


def test_every_mistake_finds_its_text():
    for name, mistake in mutations.MISTAKES.items():
        text = (mutations.ROOT / mistake.file).read_text(encoding="utf-8")
        assert text.count(mistake.right) == 1, name
