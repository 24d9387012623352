"""The README's Python runs, as one program from top to bottom."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 5
    exec(compile("\n".join(blocks), README.name, "exec"), {})
    # What the comments in the code promise.
    assert capsys.readouterr().out.split("\n")[-3:-1] == ["1", "1.25"]
