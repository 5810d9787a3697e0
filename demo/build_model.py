"""Build the demo model: `python -m demo.build_model --out .cache/demo-model`. Downloads nothing.

Writes what vLLM and transformers load: config.json, model.safetensors, tokenizer.json, tokenizer_config.json (with the
chat template), generation_config.json, and build.json, which says how the model was made and marks it complete.
"""

import argparse
import fcntl
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.corpus import Document, load_corpus

BUILD_FILE = "build.json"
VOCAB_SIZE = 4096
# A docstring alone is about 70 tokens; answers this long make a decode worth watching.
_MIN_ANSWER_CHARS = 700
_QUESTIONS = ("What is {}?", "Explain {}.", "How does {} work?", "Tell me about {}.")


@dataclass(slots=True, frozen=True, kw_only=True)
class Settings:
    """What decides the model. `steps` is the goal, `train_seconds` the limit on the time spent training."""

    steps: int = 240
    train_seconds: float = 25.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.train_seconds <= 0:
            raise ValueError("steps and train-seconds must be positive")


def build_model(
    out: Path, settings: Settings | None = None, *, report: Callable[[str], None] = lambda line: None
) -> Path:
    """Build the model into `out`, unless it is there already, made with the same settings; return `out`.

    The folder appears whole or not at all; of two builds at once the second waits and finds it built. Raises
    FileExistsError when `out` holds something other than a demo model.
    """
    settings = settings or Settings()
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(out.parent / f".{out.name}.lock"):
        if _built_fingerprint(out) == _fingerprint(settings):
            report(f"{out} is already built")
            return out
        if out.exists() and not (out / BUILD_FILE).exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} exists and is not a demo model")
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            _build(scratch / "new", settings, report)
            if out.exists():
                out.rename(scratch / "old")
            (scratch / "new").rename(out)
        finally:
            shutil.rmtree(scratch)
    return out


def _build(directory: Path, settings: Settings, report: Callable[[str], None]) -> None:
    started = time.monotonic()
    report("reading the documentation that ships with Python")
    # Imported here: finding a model already built should not cost ten seconds of imports.
    import torch
    from transformers.utils.logging import disable_progress_bar

    from demo.tokenizer import save_tokenizer, train_tokenizer
    from demo.train import CONTEXT_TOKENS, new_model, train

    # On a busy machine a second thread mostly waits for the first one's core: ten times slower was seen.
    torch.set_num_threads(1)
    documents = load_corpus()
    tokenizer = train_tokenizer((text for document in documents for text in document.paragraphs), VOCAB_SIZE)
    conversations = list(as_conversations(documents, settings.seed))
    encodings = tokenizer.encode_batch(conversations, add_special_tokens=False)
    stream = torch.tensor([token for encoding in encodings for token in encoding.ids])
    model = new_model(tokenizer.get_vocab_size(), settings.seed)
    report(
        f"{len(stream):,} tokens of Python's own documentation, {model.num_parameters():,} parameters; "
        f"training for at most {settings.train_seconds:g} s"
    )
    outcome = train(
        model, stream, seed=settings.seed, steps=settings.steps, train_seconds=settings.train_seconds, report=report
    )
    directory.mkdir()
    disable_progress_bar()
    model.save_pretrained(str(directory))
    (directory / "model.safetensors").chmod(0o644)  # written for its owner only; servers may run as another user
    save_tokenizer(tokenizer, directory, context_tokens=CONTEXT_TOKENS)
    _write_generation_config(directory)
    build = {"fingerprint": _fingerprint(settings), "settings": asdict(settings), "outcome": asdict(outcome)}
    (directory / BUILD_FILE).write_text(json.dumps(build, indent=2) + "\n")
    limit = ", cut short by the time limit" if outcome.cut_short else ""
    report(
        f"{outcome.steps} steps{limit}; held-out loss {outcome.loss_short_windows:.2f}, "
        f"{outcome.loss_long_windows:.2f} over whole contexts; {time.monotonic() - started:.0f} s in all"
    )


def as_conversations(documents: Sequence[Document], seed: int) -> Iterator[str]:
    """Yield the documents as question and answer in the chat format, in random order; neighbours share an answer."""
    from demo.tokenizer import ASSISTANT, BOS, EOS, USER

    answers: list[tuple[str, list[str]]] = []
    for document in documents:
        if answers and sum(map(len, answers[-1][1])) < _MIN_ANSWER_CHARS and _related(answers[-1][0], document.title):
            answers[-1][1].extend(document.paragraphs)
        else:
            answers.append((document.title, list(document.paragraphs)))
    order = random.Random(seed)
    order.shuffle(answers)
    for title, paragraphs in answers:
        question = order.choice(_QUESTIONS).format(title)
        yield f"{BOS}{USER}{question}{EOS}{ASSISTANT}" + "\n\n".join(paragraphs) + EOS


def _related(first: str, second: str) -> bool:
    return first.split(".")[0] == second.split(".")[0]


def _write_generation_config(directory: Path) -> None:
    from demo.tokenizer import BOS_ID, EOS_ID, PAD_ID

    content = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    (directory / "generation_config.json").write_text(json.dumps(content, indent=2) + "\n")


def _fingerprint(settings: Settings) -> str:
    """Identify a build: the settings, this package's sources and the Python whose text is learned."""
    digest = hashlib.sha256(json.dumps([asdict(settings), sys.version], sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _built_fingerprint(out: Path) -> str | None:
    try:
        return str(json.loads((out / BUILD_FILE).read_text())["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m demo.build_model", description="Build the demo model, offline.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument(
        "--train-seconds",
        type=float,
        default=defaults.train_seconds,
        help="longest time to train, in seconds; imports and text take 10-15 s more (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of weights and batches (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        settings = Settings(steps=arguments.steps, train_seconds=arguments.train_seconds, seed=arguments.seed)
        build_model(arguments.out, settings, report=lambda line: print(line, flush=True))
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
