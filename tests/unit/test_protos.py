"""The committed stubs are what the protos generate."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_matches_protos(tmp_path: Path) -> None:
    """Generating again changes nothing: editing a proto without `make protos` fails here."""
    protos = sorted((ROOT / "protos" / "ascendra" / "v1").glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos"]
        + [f"--{plugin}={tmp_path}" for plugin in ("python_out", "pyi_out", "grpc_python_out", "mypy_grpc_out")]
        + [str(proto.relative_to(ROOT)) for proto in protos],
        cwd=ROOT,
        env={"PATH": str(Path(sys.executable).parent)},
        check=True,
        capture_output=True,
    )
    generated = {path.name: path.read_text() for path in (tmp_path / "ascendra" / "v1").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "ascendra" / "v1").glob("*_pb2*")}
    assert protos
    assert committed == generated
