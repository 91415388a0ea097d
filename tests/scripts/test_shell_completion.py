"""Shell completion offers what the scripts take."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = shutil.which("bash")


TYPED = {
    "python -m scripts.tok_": "scripts.tok_encode scripts.tok_eval scripts.tok_train",
    "torchrun --nproc_per_node 8 -m scripts.tok_train --max": "--max-chars",
    "python -m scripts.tok_train --no": "--no-force",
    "python -m scripts.tok_train --bad-rows ": "error skip",
    "python -m scripts.tok_train --corpus b": "",
    "python -m http.server --": "",
    "python script.py --": "",
}


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_completion() -> None:
    script = """
        source scripts/completion.bash
        for typed in "$@"; do
            read -ra COMP_WORDS <<<"$typed"
            [[ "$typed" == *' ' ]] && COMP_WORDS+=("")
            COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
            _nanochat
            echo "${COMPREPLY[@]}"
        done
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(
        [str(BASH), "-c", script, "bash", *TYPED],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.splitlines() == list(TYPED.values())
    assert not result.stderr
