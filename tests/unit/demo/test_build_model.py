"""Building the demo model: files, idempotence, atomicity, time limit."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from demo.build_model import BUILD_FILE, Settings, build_model, main
from demo.corpus import load_corpus

pytestmark = pytest.mark.slow

FEW_STEPS = Settings(steps=30, train_seconds=60.0)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A model that two builders made at once, and what they reported."""
    out = tmp_path_factory.mktemp("demo") / "model"
    lines: list[str] = []
    builders = [
        threading.Thread(target=build_model, args=(out, FEW_STEPS), kwargs={"report": lines.append}) for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(timeout=110)
    return out, lines


def test_two_builders_make_one_model(built: tuple[Path, list[str]]) -> None:
    """Of two builds at once, one trains and the other finds the result; neither leaves scratch files."""
    out, lines = built
    assert sum("already built" in line for line in lines) == 1
    assert sum("held-out loss" in line for line in lines) == 1
    assert {path.name for path in out.parent.iterdir()} == {out.name, f".{out.name}.lock"}


def test_files_are_what_servers_load(built: tuple[Path, list[str]]) -> None:
    """The folder has every file of a Hugging Face model, readable by other users, with agreeing token ids."""
    out, _ = built
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == names | {BUILD_FILE}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())
    config = json.loads((out / "config.json").read_text())
    generation = json.loads((out / "generation_config.json").read_text())
    vocab = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == max(vocab.values()) + 1
    assert config["eos_token_id"] == generation["eos_token_id"] == vocab["</s>"]
    assert config["bos_token_id"] == generation["bos_token_id"] == vocab["<s>"]


def test_training_learns_and_long_contexts_hold(built: tuple[Path, list[str]]) -> None:
    """A few steps are clearly better than a uniform guess, and no worse over whole contexts than in short windows."""
    outcome = json.loads((built[0] / BUILD_FILE).read_text())["outcome"]
    assert outcome["loss_short_windows"] < 7.5  # a uniform guess over 4,096 tokens scores 8.3
    assert outcome["loss_long_windows"] < 1.15 * outcome["loss_short_windows"]


def test_other_settings_replace_the_model(built: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A build with other settings takes the place of the old one, without leftovers."""
    out = Path(shutil.copytree(built[0], tmp_path / "model"))
    build_model(out, Settings(steps=1, train_seconds=60.0))
    assert json.loads((out / BUILD_FILE).read_text())["outcome"]["steps"] == 1
    assert (out / "model.safetensors").read_bytes() != (built[0] / "model.safetensors").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".model.lock"}


def test_failed_build_leaves_nothing(tmp_path: Path) -> None:
    """A build that is interrupted leaves neither half a model nor scratch files."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_model(tmp_path / "model", FEW_STEPS, report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".model.lock"]


def test_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds something else is refused, not replaced."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "is not a demo model" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    """Zero steps or no time is an error that names the flags."""
    with pytest.raises(ValueError, match="train-seconds"):
        Settings(train_seconds=0)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "model"), "--steps", "0"])


@pytest.mark.engine
def test_vllm_serves_the_model(built: tuple[Path, list[str]]) -> None:
    """vLLM loads the model and writes words of its training text, also far beyond the short training windows."""
    script = Path(__file__).with_name("generate_with_vllm.py")
    done = subprocess.run(
        [sys.executable, str(script), str(built[0])], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    short, long = json.loads(done.stdout.splitlines()[-1])
    known = {word for document in load_corpus() for text in document.paragraphs for word in text.split()}
    for text in (short, long):
        words = text.split()
        assert len(words) > 5
        assert sum(word in known for word in words) > 0.5 * len(words)
