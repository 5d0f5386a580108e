"""The demo's data, from installed packages: general text, and questions on the chemical elements (demo.yaml)."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from hlora.system.errors import ConfigError, how_to_install
from hlora.system.files import write_text

DEMO_YAML = Path(__file__).parent / "demo.yaml"


def demo_config(output: Path) -> dict[str, Any]:
    """Fields of the demo's configuration; also writes its data to <output>/data.

    Raises ConfigError without the extra `demo`.
    """
    directory = output / "data"
    directory.mkdir(parents=True, exist_ok=True)
    _write_texts(directory)
    _write_questions(directory)
    fields = yaml.safe_load(DEMO_YAML.read_text(encoding="utf-8"))
    return json.loads(json.dumps(fields).replace("runs/demo", json.dumps(output.as_posix())[1:-1]))


def _write_texts(directory: Path) -> None:
    """Python's own documentation, split by topic, and prose unlike it: the data set descriptions of scikit-learn."""
    import pydoc_data.topics

    import sklearn.datasets.descr

    topics = [pydoc_data.topics.topics[name].strip() for name in sorted(pydoc_data.topics.topics)]
    random.Random(0).shuffle(topics)
    held_out = len(topics) // 5
    prose = [file.read_text(encoding="utf-8") for file in sorted(_folder_of(sklearn.datasets.descr).glob("*.rst"))]
    for name, parts in (("general", topics[held_out:]), ("heldout", topics[:held_out]), ("prose", prose)):
        write_text(directory / f"{name}.txt", "\n\n".join(parts))


def _folder_of(package: ModuleType) -> Path:
    return Path(str(package.__file__)).parent


def _write_questions(directory: Path) -> None:
    """Five questions on each chemical element, four choices each; one of the five, drawn by seed, is for the test.

    So the facts asked in the test can be learned, but only from questions that put them another way.
    """
    try:
        import periodictable
    except ImportError:
        raise ConfigError(f"the demo's questions need periodictable. {how_to_install('demo')}") from None
    elements = [(e.name, e.symbol, str(e.number), f"{e.mass:.1f}") for e in periodictable.elements if e.number > 0]
    draw = random.Random(0)
    train, test = [], []
    for index in range(len(elements)):
        rows = [_question(elements, index, *form, draw) for form in _FORMS]
        held_out = draw.randrange(len(rows))
        test.append(rows.pop(held_out))
        train += rows
    for name, rows in (("train", train), ("test", test)):
        draw.shuffle(rows)
        write_text(directory / f"elements-{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


_NAME, _SYMBOL, _NUMBER, _MASS = range(4)
_FORMS = (  # question, what it names, what it asks for
    ("What is the chemical symbol of {}?", _NAME, _SYMBOL),
    ("Which chemical element has the symbol {}?", _SYMBOL, _NAME),
    ("What is the atomic number of {}?", _NAME, _NUMBER),
    ("Which chemical element has the atomic number {}?", _NUMBER, _NAME),
    ("What is the atomic mass of {}?", _NAME, _MASS),
)


def _question(
    elements: Sequence[tuple[str, ...]], index: int, form: str, given: int, asked: int, draw: random.Random
) -> dict[str, Any]:
    answer = elements[index][asked]
    others = sorted({element[asked] for element in elements} - {answer})  # some elements have the same mass
    choices = [answer, *draw.sample(others, 3)]
    draw.shuffle(choices)
    return {"question": form.format(elements[index][given]), "choices": choices, "label": choices.index(answer)}
