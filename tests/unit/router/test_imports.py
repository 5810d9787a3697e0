"""What a router process loads."""

import subprocess
import sys


def test_a_router_stays_small() -> None:
    """It imports no engine and no model library."""
    heavy = "{'torch', 'vllm', 'transformers'}"
    code = f"import sys, services.router.__main__, services.router.app; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
